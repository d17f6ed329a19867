//! The server, spoken to over UDP as a BRAS does.

use tokio::sync::Semaphore;

use super::*;
use crate::domain::Subscriber;
use crate::domain::subscriber::Event;
use crate::source::SinkError;
use crate::source::radius::testing::{is_answer, packet, request};

/// Keeps what it is told, when it may.
#[derive(Clone, Debug)]
struct Recorder {
    calls: Arc<Mutex<Vec<Vec<Report>>>>,
    /// A permit for each call.
    may: Arc<Semaphore>,
    fails: Arc<Mutex<bool>>,
}

impl Recorder {
    fn new(permits: usize) -> Self {
        Self { calls: Arc::default(), may: Arc::new(Semaphore::new(permits)), fails: Arc::default() }
    }

    fn calls(&self) -> Vec<Vec<Report>> {
        self.calls.lock().expect("no panic").clone()
    }
}

impl Sink for Recorder {
    async fn take(&self, reports: Vec<Report>) -> Result<Vec<Taken>, SinkError> {
        self.may.acquire().await.expect("open").forget();
        if *self.fails.lock().expect("no panic") {
            return Err(SinkError("the disk is full".into()));
        }
        let taken = reports.iter().map(|report| match &report.event {
            Event::Up { line, .. } if line.as_str() == "refused" => Taken::Refused("not so".to_owned()),
            _ => Taken::Unchanged,
        });
        let taken = taken.collect();
        self.calls.lock().expect("no panic").push(reports);
        Ok(taken)
    }

    async fn open(&self, _: &Name) -> Result<Vec<Subscriber>, SinkError> {
        Ok(Vec::new())
    }
}

/// A server that runs, and a BRAS.
struct Running {
    recorder: Recorder,
    counters: Arc<Counters>,
    server: SocketAddr,
    bras: UdpSocket,
    _tasks: JoinSet<()>,
}

fn secret() -> Secret {
    Secret::from("testing123".to_owned())
}

fn config(host: &str) -> RadiusConfig {
    let client = |address: &str, secret| RadiusClient { address: address.parse().expect("a prefix"), secret };
    RadiusConfig {
        listen: vec![SocketAddr::new(host.parse().expect("an address"), 0)],
        clients: vec![
            client("127.0.0.0/16", Secret::from("another".to_owned())),
            client("127.0.0.0/24", secret()),
            client("::1/128", secret()),
        ],
        line: vec![LineAttribute::UserName],
        source: "radius".parse().expect("a name"),
    }
}

impl Running {
    async fn start(host: &str, permits: usize) -> Self {
        let (recorder, counters) = (Recorder::new(permits), Arc::<Counters>::default());
        let mut tasks = JoinSet::new();
        let addresses = start(&config(host), recorder.clone(), Arc::clone(&counters), &mut tasks).await;
        let server = addresses.expect("a socket")[0];
        let bras = UdpSocket::bind((host, 0)).await.expect("a socket");
        bras.connect(server).await.expect("a way");
        Self { recorder, counters, server, bras, _tasks: tasks }
    }

    async fn send(&self, bytes: &[u8]) {
        self.bras.send(bytes).await.expect("sent");
    }

    async fn answer(&self) -> Option<Vec<u8>> {
        self.answer_within(Duration::from_secs(10)).await
    }

    async fn answer_within(&self, limit: Duration) -> Option<Vec<u8>> {
        let mut buffer = vec![0; LONGEST_PACKET];
        let length = tokio::time::timeout(limit, self.bras.recv(&mut buffer)).await.ok()?.expect("received");
        buffer.truncate(length);
        Some(buffer)
    }

    async fn is_silent(&self) -> bool {
        self.answer_within(Duration::from_millis(150)).await.is_none()
    }

    async fn until(&self, what: &str, reached: impl Fn(&RadiusStatistics) -> bool) {
        for _ in 0..500 {
            if reached(&self.counters.statistics()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{what}: {:?}", self.counters.statistics());
    }
}

fn start_of(id: u8, line: &str) -> Vec<u8> {
    let attributes = [
        (1, line.as_bytes().to_vec()),
        (40, vec![0, 0, 0, 1]),
        (44, vec![b'a', id]),
        (8, vec![192, 0, 2, id]),
        (33, b"proxy".to_vec()),
    ];
    request(id, &attributes, &secret())
}

#[tokio::test]
async fn a_packet_is_acknowledged_when_what_it_tells_is_kept() {
    for host in ["127.0.0.1", "::1"] {
        let running = Running::start(host, 0).await;
        let start = start_of(1, "dsl-1");
        running.send(&start).await;
        assert!(running.is_silent().await, "not before it is kept");
        running.recorder.may.add_permits(1);
        let answer = running.answer().await.expect("an answer");
        assert!(is_answer(&answer, &start, &secret()));
        assert_eq!(running.recorder.calls().concat().len(), 1);
    }
}

#[tokio::test]
async fn all_that_waits_is_kept_together() {
    let running = Running::start("127.0.0.1", 1).await;
    running.send(&start_of(1, "dsl-1")).await;
    running.answer().await.expect("an answer");
    for id in 2..=41 {
        running.send(&start_of(id, &format!("dsl-{id}"))).await;
    }
    running.until("all came in", |statistics| statistics.received == 41).await;
    running.recorder.may.add_permits(2);
    for _ in 2..=41 {
        running.answer().await.expect("an answer");
    }
    let calls: Vec<_> = running.recorder.calls().iter().map(Vec::len).collect();
    assert!(calls.len() <= 3 && calls.iter().sum::<usize>() == 41, "{calls:?}");
}

#[tokio::test]
async fn what_is_sent_again_is_answered_as_before_and_told_once() {
    let running = Running::start("127.0.0.1", 0).await;
    let start = start_of(1, "dsl-1");
    running.send(&start).await;
    running.send(&start).await;
    running.until("the second is dropped", |statistics| statistics.dropped.in_progress == 1).await;
    running.recorder.may.add_permits(5);
    let first = running.answer().await.expect("an answer");
    running.send(&start).await;
    assert_eq!(running.answer().await.expect("an answer"), first);
    assert_eq!(running.recorder.calls().concat().len(), 1);
    let statistics = running.counters.statistics();
    assert_eq!((statistics.received, statistics.acknowledged, statistics.repeated), (3, 2, 1));
}

#[tokio::test]
async fn what_was_not_kept_is_not_acknowledged_until_it_is() {
    let running = Running::start("127.0.0.1", 9).await;
    *running.recorder.fails.lock().expect("no panic") = true;
    let start = start_of(1, "dsl-1");
    running.send(&start).await;
    running.until("it fails", |statistics| statistics.dropped.unwritten == 1).await;
    assert!(running.is_silent().await);
    *running.recorder.fails.lock().expect("no panic") = false;
    running.send(&start).await;
    assert!(is_answer(&running.answer().await.expect("an answer"), &start, &secret()));
}

#[tokio::test]
async fn what_is_not_from_a_client_or_no_packet_is_dropped_by_reason() {
    let running = Running::start("127.0.0.1", 9).await;
    let other = Secret::from("another".to_owned());
    let start = start_of(1, "dsl-1");
    running.send(&start[..start.len() - 1]).await;
    running.send(&vec![0xff; LONGEST_PACKET + 100]).await;
    running.send(&request(2, &[(40, vec![0, 0, 0, 1])], &other)).await;
    running.send(&packet(1, 3, &[(1, b"dsl-1".to_vec())], &secret())).await;
    running.send(&packet(STATUS_SERVER, 4, &[], &secret())).await;
    let stranger = UdpSocket::bind("127.1.0.1:0").await.expect("a socket");
    stranger.send_to(&start, running.server).await.expect("sent");
    running.until("all came in", |statistics| statistics.received == 6).await;
    let dropped = RadiusDropped {
        unknown_client: 1,
        wrong_secret: 2,
        malformed: 2,
        other_code: 1,
        ..RadiusDropped::default()
    };
    assert_eq!(running.counters.statistics().dropped, dropped);
    assert!(running.is_silent().await);
    assert!(running.recorder.calls().is_empty());
    let alive = packet(STATUS_SERVER, 5, &[(80, vec![0; 16])], &secret());
    running.send(&alive).await;
    assert!(is_answer(&running.answer().await.expect("an answer"), &alive, &secret()));
}

#[tokio::test]
async fn what_can_never_be_used_is_acknowledged_and_counted() {
    let running = Running::start("127.0.0.1", 9).await;
    for (bytes, refused) in [
        (start_of(1, "refused"), 1),
        (request(2, &[(40, vec![0, 0, 0, 1]), (8, vec![192, 0, 2, 1])], &secret()), 2),
        (request(3, &[(1, b"dsl-1".to_vec()), (40, vec![0, 0, 0, 1])], &secret()), 2),
    ] {
        running.send(&bytes).await;
        assert!(is_answer(&running.answer().await.expect("an answer"), &bytes, &secret()));
        assert_eq!(running.counters.statistics().refused, refused);
    }
}

#[tokio::test]
async fn what_finds_the_queue_full_is_dropped_and_taken_later() {
    let (queue, mut waiting) = mpsc::channel(1);
    let shared =
        Shared { config: config("127.0.0.1"), counters: Arc::default(), recent: Mutex::default(), queue };
    let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.expect("a socket"));
    let peer = SocketAddr::from(([127, 0, 0, 1], 5_000));
    for id in [1, 2] {
        assert!(judge(&shared, &socket, &start_of(id, "dsl-1"), peer).is_none());
    }
    assert_eq!(shared.counters.statistics().dropped.overload, 1);
    waiting.recv().await.expect("the first");
    judge(&shared, &socket, &start_of(2, "dsl-1"), peer);
    assert_eq!(waiting.recv().await.expect("the second").identity.1, 2);
}

#[test]
fn answers_are_kept_for_a_time_and_in_bounded_number() {
    let mut recent = Recent::default();
    let identity = |number: usize| {
        let port = u16::try_from(number % 50_000).expect("fits");
        (SocketAddr::from(([10, 0, (number / 50_000) as u8, 1], port)), 1, [0; 16])
    };
    let now = Instant::now();
    for number in 0..MOST_KEPT + 10 {
        assert!(matches!(recent.begin(identity(number), now), Known::No));
    }
    assert_eq!((recent.answers.len(), recent.order.len()), (MOST_KEPT, MOST_KEPT));
    assert!(matches!(recent.begin(identity(MOST_KEPT), now), Known::Waits));
    recent.forget(&identity(MOST_KEPT));
    assert!(matches!(recent.begin(identity(MOST_KEPT), now + KEPT_FOR), Known::No));
    assert_eq!((recent.answers.len(), recent.order.len()), (1, 1));
}
