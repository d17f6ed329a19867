//! A daemon in this process for tests: the real service, store, socket and API over a gateway that
//! only remembers what it was told.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use ipnet::IpNet;
use jiff::Timestamp;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::{Notify, oneshot};

use super::auth::Keys;
use super::northbound::Northbound;
use super::service::{Service, ServiceError};
use super::worker::Worker;
use super::{Api, serve, socket};
use crate::config::Config;
use crate::domain::{AllocationId, Direction, Name, Subscriber};
use crate::manager::record;
use crate::manager::record::RecordQuery;
use crate::manager::report::{
    ClassifierStatistics, Count, Counts, DirectedCounts, Explanation, GatewayStatus, InterfaceStatus,
    RepairReport, RuleSetStatistics, Statistics, Why,
};
use crate::manager::subscriber::SubscriberQuery;
use crate::manager::{Change, Gateway, State};
use crate::source::Monitor;
use crate::store::sqlite::SqliteStore;
use crate::store::{Store, StoreError};

/// What the gateway was told, and what it shall say.
#[derive(Debug, Default)]
pub(crate) struct Record {
    /// Every change that was carried out.
    pub(crate) applied: Vec<Change>,
    /// How often it was asked to reconcile.
    pub(crate) reconciled: usize,
    /// What the next reconciliation repairs.
    pub(crate) drift: Vec<String>,
    /// So many of the next changes are refused.
    pub(crate) refuse: usize,
    /// So many changes are applied before all others are refused; none: as `refuse` says.
    pub(crate) refuse_after: Option<usize>,
    /// The process ends, as by `kill -9`, at the change that comes after so many; with that one carried out or
    /// not.
    pub(crate) crash: Option<(usize, bool)>,
    /// What it has repaired.
    pub(crate) repaired: Vec<RepairReport>,
    /// Reconciliations are refused.
    pub(crate) refuse_reconcile: bool,
    /// Debugging is on.
    pub(crate) tracing: bool,
    /// Debugging that was not read yet.
    pub(crate) trace_lines: Vec<String>,
    /// It was detached.
    pub(crate) detached: bool,
    /// The state when it was started.
    pub(crate) started_with: Option<State>,
    /// The state when it was reconciled last.
    pub(crate) reconciled_with: Option<State>,
}

/// What a test unwinds with where the process would end.
#[derive(Debug)]
pub(crate) struct Crash;

impl Crash {
    /// Ends what the process does, without a word.
    pub(crate) fn now() -> ! {
        std::panic::resume_unwind(Box::new(Self))
    }
}

/// A gateway that only remembers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recorder(Arc<Mutex<Record>>);

/// What it says when it refuses.
#[derive(Debug, thiserror::Error)]
#[error("HTB on lan0: class 5150:4001 refused")]
pub(crate) struct Refused(#[source] std::io::Error);

impl Refused {
    fn new() -> Self {
        Self(std::io::Error::from_raw_os_error(libc::ENOSPC))
    }
}

impl Recorder {
    pub(crate) fn record(&self) -> MutexGuard<'_, Record> {
        self.0.lock().expect("no test panics while it holds it")
    }

    /// The start of a gateway, as [`Service::start`] wants it.
    pub(crate) fn start(&self, state: &State) -> Result<Self, Refused> {
        self.record().started_with = Some(state.clone());
        Ok(self.clone())
    }
}

impl Gateway for Recorder {
    type Error = Refused;
    type Config = crate::gateway::GatewayConfig;

    fn apply(&mut self, _state: &State, changes: &[Change], _inverse: &[Change]) -> Result<(), Refused> {
        let mut record = self.record();
        match &mut record.crash {
            Some((0, carried_out)) => {
                if *carried_out {
                    record.applied.extend_from_slice(changes);
                }
                record.crash = None;
                drop(record);
                Crash::now();
            }
            Some((left, _)) => *left -= 1,
            None => {}
        }
        if record.refuse > 0 {
            record.refuse -= 1;
            return Err(Refused::new());
        }
        match &mut record.refuse_after {
            Some(0) => return Err(Refused::new()),
            Some(left) => *left -= 1,
            None => {}
        }
        record.applied.extend_from_slice(changes);
        Ok(())
    }

    fn reconfigure(&mut self, _config: &Self::Config, _state: &State) -> Result<(), Refused> {
        let mut record = self.record();
        if record.refuse > 0 {
            record.refuse -= 1;
            return Err(Refused::new());
        }
        Ok(())
    }

    fn interfaces_changed(&self) -> Result<bool, Self::Error> {
        Ok(false)
    }

    fn reconcile(&mut self, state: &State) -> Result<Vec<String>, Refused> {
        let mut record = self.record();
        record.reconciled += 1;
        if record.refuse_reconcile {
            return Err(Refused::new());
        }
        record.reconciled_with = Some(state.clone());
        let drift = std::mem::take(&mut record.drift);
        let reports = drift.iter().map(|what| RepairReport { at: Timestamp::now(), what: what.clone() });
        record.repaired.extend(reports);
        Ok(drift)
    }

    fn statistics(&mut self, state: &State) -> Result<Statistics, Refused> {
        let passed = Count { packets: 1_000, bytes: 1_500_000 };
        let down = Counts {
            passed,
            in_profile: passed,
            dropped: Count { packets: 10, bytes: 15_000 },
            ..Counts::default()
        };
        let counts = DirectedCounts { down, ..DirectedCounts::default() };
        Ok(Statistics {
            at_ns: 1_000_000_000,
            allocations: state.allocations.keys().map(|id| (*id, counts)).collect(),
            providers: state.providers.keys().map(|name| (name.clone(), counts)).collect(),
            outcomes: BTreeMap::from([("admitted".to_owned(), 1_000), ("over_limit".to_owned(), 10)]),
            classifier: ClassifierStatistics {
                rules: 3,
                rules_most: 131_072,
                memory_bytes: 29 << 20,
                worst_case_comparisons: 3,
                max_checks: 512,
                look_ups: 1_010,
                tables: 2_020,
                forks: 0,
                comparisons: 1_515,
                sets: vec![RuleSetStatistics {
                    direction: "down".to_owned(),
                    family: "ipv4".to_owned(),
                    hash_tables: 1,
                    hashed_rules: 2,
                    trees: 1,
                    tree_rules: 1,
                    longest_hashed: (2, 1),
                    longest_in_trees: (1, 1),
                    worst_case_comparisons: 3,
                }],
            },
        })
    }

    fn explain(
        &mut self,
        direction: Direction,
        packet: &[u8],
        _layer3: bool,
    ) -> Result<Explanation, Refused> {
        Ok(Explanation {
            outcome: "admitted".to_owned(),
            allocation: Some(AllocationId(1)),
            selector: Some(0),
            in_profile: true,
            charged: packet.len() as u32,
            class: Some("5150:4001".to_owned()),
            direction: if direction == Direction::Upstream { "up" } else { "down" }.to_owned(),
            source: "203.0.113.7".parse().ok(),
            destination: "192.0.2.10".parse().ok(),
            protocol: Some(17),
            source_port: Some(5_004),
            destination_port: Some(4_000),
            dscp: Some(46),
            length: Some(28),
            fragment: false,
            tables: 1,
            forks: 0,
            rules: 2,
            expired: 0,
            way: vec!["table 1: tree, 2 rules compared, matches selector 0 of 1".to_owned()],
        })
    }

    fn status(&self) -> GatewayStatus {
        GatewayStatus {
            mode: "enforce".to_owned(),
            abi: 1,
            kernel: "6.1.0".to_owned(),
            taken_over: false,
            interfaces: vec![InterfaceStatus {
                name: "lan0".to_owned(),
                role: "lan".to_owned(),
                capacity: crate::domain::BitsPerSecond(100_000_000),
                index: Some(2),
                framing: Some("ethernet".to_owned()),
                judged: "xdp".to_owned(),
                why: Some(Why::Best),
                xdp: "native".to_owned(),
                tc: "tcx".to_owned(),
                scheduler: "htb".to_owned(),
                classes: 2,
            }],
            rules: (1, 131_072),
            worst_case_comparisons: 1,
            allocations: (1, 65_535),
            repairs: self.record().repaired.clone(),
        }
    }

    fn trace(&mut self, on: bool) -> Result<(), Refused> {
        self.record().tracing = on;
        Ok(())
    }

    fn traced(&mut self) -> Vec<String> {
        std::mem::take(&mut self.record().trace_lines)
    }

    fn detach(self) -> Result<(), Refused> {
        self.record().detached = true;
        Ok(())
    }
}

/// A configuration for `directory`, with more keys at its top.
pub(crate) fn config(directory: &Path, more: &str) -> Config {
    Config::parse(&config_text(directory, more), Path::new("qos.toml")).expect("valid")
}

/// Its text. Tables in `more` come last.
pub(crate) fn config_text(directory: &Path, more: &str) -> String {
    let (more, tables) = more.split_at(more.find("[northbound]").unwrap_or(more.len()));
    format!(
        r#"
state_dir = "{0}/state"
socket = "{0}/qosd.sock"
{more}
[[interface]]
name = "lan0"
role = "lan"
capacity = "100mbit"
[[interface]]
name = "wan0"
role = "wan"
capacity = "100mbit"
{tables}
"#,
        directory.display()
    )
}

/// The store of a configuration.
pub(crate) fn store(config: &Config) -> SqliteStore {
    std::fs::create_dir_all(&config.state_dir).expect("state directory");
    SqliteStore::open(config.database()).expect("store")
}

/// A daemon; it ends with the value.
#[derive(Debug)]
pub(crate) struct TestDaemon {
    directory: Arc<TempDir>,
    more: String,
    pub(crate) recorder: Recorder,
    /// Where providers are served.
    pub(crate) providers: Vec<SocketAddr>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl TestDaemon {
    pub(crate) fn start() -> Self {
        Self::start_with("")
    }

    /// Starts one with more keys in its configuration.
    pub(crate) fn start_with(more: &str) -> Self {
        let directory = tempfile::tempdir().expect("temporary directory");
        // Other users shall get as far as the socket.
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).expect("mode");
        Self::start_in(Arc::new(directory), more)
    }

    /// Stops it and starts another on the same directory.
    pub(crate) fn restart(mut self) -> Self {
        self.end();
        Self::start_in(Arc::clone(&self.directory), &self.more)
    }

    fn start_in(directory: Arc<TempDir>, more: &str) -> Self {
        let recorder = Recorder::default();
        let mut config = config(directory.path(), more);
        config.path = directory.path().join("qos.toml");
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = {
            let recorder = recorder.clone();
            std::thread::spawn(move || run(config, recorder, stopped, &ready))
        };
        let providers = is_ready.recv().expect("the daemon starts");
        Self { directory, more: more.to_owned(), recorder, providers, stop: Some(stop), thread: Some(thread) }
    }

    fn end(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the daemon ends without a panic");
        }
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Has it load another configuration.
    pub(crate) fn reload(&self, more: &str) -> (u16, Value) {
        std::fs::write(self.directory().join("qos.toml"), config_text(self.directory(), more))
            .expect("written");
        self.ask("POST", "/v1/reload", "{}")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("qosd.sock")
    }

    /// Asks for something, and returns the status and the JSON body.
    pub(crate) fn ask(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let mut stream = UnixStream::connect(self.socket()).expect("connected");
        ask(&mut stream, method, path, body.as_bytes())
    }

    /// Asks for something that must be done, and returns the body.
    pub(crate) fn must(&self, method: &str, path: &str, body: &str) -> Value {
        let (status, answer) = self.ask(method, path, body);
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    /// A provider, an application of it and a line.
    pub(crate) fn furnish(&self) {
        self.must(
            "POST",
            "/v1/providers",
            r#"{"name":"acme","kind":"application","networks":["203.0.113.0/24"],"contract":{"maximum":{"down":"50mbit"}}}"#,
        );
        self.must("POST", "/v1/providers/acme/applications", r#"{"name":"video"}"#);
        self.must(
            "POST",
            "/v1/sessions",
            r#"{"name":"dsl-1","addresses":["192.0.2.10/32"],"rate":{"down":"20mbit","up":"2mbit"}}"#,
        );
    }
}

impl Drop for TestDaemon {
    fn drop(&mut self) {
        self.end();
    }
}

/// A grant of `rate` downstream for a port of the line of [`TestDaemon::furnish`].
pub(crate) fn grant(port: u16, rate: &str, more: &str) -> String {
    format!(
        r#"{{"provider":"acme","selectors":["down udp from 203.0.113.0/24:{port} to 192.0.2.10"],"level":{{"guaranteed":{{"down":"{rate}"}}}}{more}}}"#
    )
}

/// One HTTP request on a connection that ends with it.
pub(crate) fn ask(stream: &mut UnixStream, method: &str, path: &str, body: &[u8]) -> (u16, Value) {
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: qosd\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    // The daemon may refuse and close before it has read everything.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP answer: {answer}"));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status line");
    let body = if body.is_empty() { Value::Null } else { serde_json::from_str(body).expect(body) };
    (status, body)
}

fn run(
    config: Config,
    recorder: Recorder,
    stopped: oneshot::Receiver<()>,
    ready: &std::sync::mpsc::Sender<Vec<SocketAddr>>,
) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let (access, config_path, socket) =
            (config.access.clone(), config.path.clone(), config.socket.clone());
        let keys = Arc::new(Keys::default());
        let northbound = Northbound::open(&config, &keys).expect("what the configuration names");
        let worker = Worker::spawn(move || {
            let store = store(&config);
            Service::start(config, 1_500, store, |state| recorder.start(state))
        })
        .expect("the service starts");
        let (listener, _socket) = socket::bind(&socket, &access).expect("a socket");
        let known = Arc::clone(&keys);
        worker.handle().run(move |service| known.replace(&service.state().keys)).await.expect("it runs");
        let stop = Arc::new(Notify::new());
        let handle = worker.handle();
        let sources = Monitor::default();
        let api = Api { handle, access, config_path, sources, keys, northbound: northbound.clone(), stop };
        let (providers_closing, providers_closed) = oneshot::channel::<()>();
        let mut addresses = Vec::new();
        if let Some(northbound) = northbound {
            let listeners = northbound.listen().expect("free ports");
            addresses.extend(listeners.iter().map(|listener| listener.local_addr().expect("an address")));
            tokio::spawn(northbound.serve(listeners, api.clone(), async {
                let _ = providers_closed.await;
            }));
        }
        let (closing, closed) = oneshot::channel::<()>();
        let server = tokio::spawn(serve(listener, api, async {
            let _ = closed.await;
        }));
        ready.send(addresses).expect("somebody waits");
        let _ = stopped.await;
        let _ = closing.send(());
        let _ = providers_closing.send(());
        tokio::task::spawn_blocking(|| worker.stop()).await.expect("joined").expect("no panic");
        let _ = tokio::time::timeout(std::time::Duration::from_secs(5), server).await;
    });
}

/// A store that fails when it is told to.
#[derive(Debug)]
pub(crate) struct FailingStore<S> {
    pub(crate) inner: S,
    /// The commits that succeed before all others fail.
    pub(crate) commits_left: usize,
}

impl<S: Store> Store for FailingStore<S> {
    fn load(&mut self, network: crate::manager::Network) -> Result<State, StoreError> {
        self.inner.load(network)
    }

    fn commit(&mut self, changes: &[Change], records: &[record::Record]) -> Result<(), StoreError> {
        if self.commits_left == 0 {
            self.inner.roll_back();
            return Err(StoreError::Full { path: PathBuf::from("/qos.sqlite") });
        }
        self.commits_left -= 1;
        self.inner.commit(changes, records)
    }

    fn history(&mut self, limit: usize) -> Result<Vec<crate::domain::Allocation>, StoreError> {
        self.inner.history(limit)
    }

    fn records(&mut self, query: &RecordQuery) -> Result<Vec<record::Record>, StoreError> {
        self.inner.records(query)
    }

    fn put_subscriber(&mut self, subscriber: &Subscriber) -> Result<(), StoreError> {
        self.inner.put_subscriber(subscriber)
    }

    fn roll_back(&mut self) {
        self.inner.roll_back();
    }

    fn subscriber(&mut self, line: &Name) -> Result<Option<Subscriber>, StoreError> {
        self.inner.subscriber(line)
    }

    fn subscribers_within(&mut self, prefix: &IpNet) -> Result<Vec<Subscriber>, StoreError> {
        self.inner.subscribers_within(prefix)
    }

    fn subscribers_at(&mut self, bras: &str, source: Option<&Name>) -> Result<Vec<Subscriber>, StoreError> {
        self.inner.subscribers_at(bras, source)
    }

    fn subscribers(&mut self, query: &SubscriberQuery) -> Result<Vec<Subscriber>, StoreError> {
        self.inner.subscribers(query)
    }

    fn forget_subscribers(&mut self, before: Timestamp, most: u32) -> Result<usize, StoreError> {
        self.inner.forget_subscribers(before, most)
    }
}

impl Service<FailingStore<SqliteStore>, Recorder> {
    /// That many commits succeed from now on.
    pub(crate) fn give_room(&mut self, commits: usize) {
        self.store_mut().commits_left = commits;
    }
}

/// A service on a store in `directory`, without a thread of its own.
pub(crate) fn service(
    directory: &Path,
    recorder: &Recorder,
    commits_left: usize,
) -> Result<Service<FailingStore<SqliteStore>, Recorder>, ServiceError> {
    let config = config(directory, "");
    let inner = store(&config);
    Service::start(config, 1_500, FailingStore { inner, commits_left }, |state| recorder.start(state))
}
