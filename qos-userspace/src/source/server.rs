//! The server that RADIUS accounting is sent to.
//!
//! A packet is judged where it is received: who sent it, whether it is whole, whether it is known already. What it
//! tells waits in a queue, and all that waits goes to the sink in one call. Only then it is acknowledged, so that a
//! BRAS repeats what was not kept. What finds the queue full is dropped, and repeated by the BRAS too.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use jiff::Timestamp;
use nix::sys::socket::{setsockopt, sockopt};
use serde::{Deserialize, Serialize};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use super::accounting::{LineAttribute, Told, read};
use super::radius::{ACCOUNTING_REQUEST, LONGEST_PACKET, Packet, STATUS_SERVER};
use super::{Secret, Sink, SourceError, Throttle};
use crate::domain::Name;
use crate::domain::subscriber::Report;
use crate::manager::subscriber::Taken;

/// The port that RADIUS accounting has (RFC 2866, section 3).
pub const PORT: u16 = 1_813;

/// Packets that wait at most: what a BRAS of tens of thousands of lines sends at once, and is written in a second.
const QUEUE: usize = 16_384;
/// Reports that go to the sink together at most.
const MOST_TOGETHER: usize = 1_024;
/// How long an answer is kept for a BRAS that did not get it, and how many are: RFC 5080, section 2.2.2.
const KEPT_FOR: Duration = Duration::from_secs(30);
const MOST_KEPT: usize = 65_536;
/// What the kernel keeps for a socket until it is read, in bytes, as far as it lets us.
const RECEIVE_BUFFER: usize = 8 << 20;
/// Time after which the sink is tried again where it took nothing.
const RETRY: Duration = Duration::from_millis(200);

/// What the server is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RadiusConfig {
    /// Where it listens; at least one.
    pub listen: Vec<SocketAddr>,
    /// Who may send, and what both know.
    pub clients: Vec<RadiusClient>,
    /// What names a line: the first of these that a packet has; at least one.
    pub line: Vec<LineAttribute>,
    /// What the lines' source is called.
    pub source: Name,
}

/// Some that may send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RadiusClient {
    /// Their addresses.
    pub address: IpNet,
    /// What they sign with.
    pub secret: Secret,
}

impl RadiusConfig {
    /// The client that is meant by the longest prefix.
    fn client(&self, address: IpAddr) -> Option<&RadiusClient> {
        let address = address.to_canonical();
        let matching = self.clients.iter().filter(|client| client.address.contains(&address));
        matching.max_by_key(|client| client.address.prefix_len())
    }
}

/// How many packets there were, since the daemon started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RadiusStatistics {
    /// Came in.
    pub received: u64,
    /// Were acknowledged, repeated ones and those that told nothing included.
    pub acknowledged: u64,
    /// Of those acknowledged: had been before, and were sent again.
    pub repeated: u64,
    /// Of those acknowledged: told something that can't be true, or nothing that can be used.
    pub refused: u64,
    /// Were dropped.
    pub dropped: RadiusDropped,
}

/// Packets that were not answered, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RadiusDropped {
    /// From an address that is no client's.
    pub unknown_client: u64,
    /// Signed with another secret, or changed on the way.
    pub wrong_secret: u64,
    /// No RADIUS packets.
    pub malformed: u64,
    /// Something else than accounting.
    pub other_code: u64,
    /// The same was being worked on.
    pub in_progress: u64,
    /// Too many waited.
    pub overload: u64,
    /// What they told could not be written.
    pub unwritten: u64,
}

/// Counters, and when trouble was last told.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    statistics: Mutex<RadiusStatistics>,
    strangers: Throttle,
    dropped: Throttle,
    useless: Throttle,
    unwritten: Throttle,
}

impl Counters {
    pub(crate) fn statistics(&self) -> RadiusStatistics {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, RadiusStatistics> {
        self.statistics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What tells a packet from others: a BRAS sends the same again with all of it the same (RFC 2866, section 4.1).
type Identity = (SocketAddr, u8, [u8; 16]);

/// What was answered lately, or will be.
#[derive(Debug, Default)]
struct Recent {
    /// None: it waits.
    answers: HashMap<Identity, Option<Arc<[u8]>>>,
    order: VecDeque<(Instant, Identity)>,
}

/// What is known of a packet.
enum Known {
    No,
    Waits,
    Answered(Arc<[u8]>),
}

impl Recent {
    /// Notes that the packet waits, unless it is known.
    fn begin(&mut self, identity: Identity, now: Instant) -> Known {
        while let Some((since, oldest)) = self.order.front() {
            if now.duration_since(*since) < KEPT_FOR && self.order.len() < MOST_KEPT {
                break;
            }
            self.answers.remove(oldest);
            self.order.pop_front();
        }
        match self.answers.get(&identity) {
            Some(Some(answer)) => return Known::Answered(Arc::clone(answer)),
            Some(None) => return Known::Waits,
            None => {}
        }
        self.answers.insert(identity, None);
        self.order.push_back((now, identity));
        Known::No
    }

    fn answered(&mut self, identity: &Identity, answer: &Arc<[u8]>) {
        if let Some(kept) = self.answers.get_mut(identity) {
            *kept = Some(Arc::clone(answer));
        }
    }

    /// Forgets a packet that is not answered, so that it is taken when it comes again.
    fn forget(&mut self, identity: &Identity) {
        self.answers.remove(identity);
        // It is one of the newest.
        if let Some(place) = self.order.iter().rposition(|(_, other)| other == identity) {
            self.order.remove(place);
        }
    }
}

/// A packet that is answered when what it tells is kept.
#[derive(Debug)]
struct Waiting {
    socket: Arc<UdpSocket>,
    identity: Identity,
    answer: Arc<[u8]>,
    report: Report,
}

/// What all sockets share.
#[derive(Debug)]
struct Shared {
    config: RadiusConfig,
    counters: Arc<Counters>,
    recent: Mutex<Recent>,
    queue: mpsc::Sender<Waiting>,
}

impl Shared {
    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Binds the sockets and serves them until the tasks are dropped.
///
/// # Errors
/// Where a socket can't be bound.
pub(crate) async fn start(
    config: &RadiusConfig,
    sink: impl Sink,
    counters: Arc<Counters>,
    tasks: &mut JoinSet<()>,
) -> Result<Vec<SocketAddr>, SourceError> {
    let mut sockets = Vec::new();
    for address in &config.listen {
        let failed = |source| SourceError::Listen { address: *address, source };
        let socket = UdpSocket::bind(address).await.map_err(failed)?;
        // A smaller buffer loses packets in a storm, which are repeated.
        let _ = setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER);
        sockets.push((socket.local_addr().map_err(failed)?, Arc::new(socket)));
    }
    let (queue, waiting) = mpsc::channel(QUEUE);
    let shared = Arc::new(Shared { config: config.clone(), counters, recent: Mutex::default(), queue });
    let mut addresses = Vec::new();
    for (address, socket) in sockets {
        info!(%address, clients = config.clients.len(), "listening to RADIUS accounting");
        tasks.spawn(receive(socket, Arc::clone(&shared)));
        addresses.push(address);
    }
    tasks.spawn(pass_on(waiting, sink, shared));
    Ok(addresses)
}

async fn receive(socket: Arc<UdpSocket>, shared: Arc<Shared>) {
    // One more than a packet has, so that one that is longer is seen to be.
    let mut buffer = [0; LONGEST_PACKET + 1];
    loop {
        match socket.recv_from(&mut buffer).await {
            Ok((length, peer)) => {
                shared.counters.lock().received += 1;
                if let Some(answer) = judge(&shared, &socket, &buffer[..length], peer) {
                    send(&shared, &socket, &answer, peer).await;
                }
            }
            // Such as ICMP's word of a peer that is gone.
            Err(error) => debug!(%error, "cannot receive"),
        }
    }
}

/// Looks at a packet. Returns what it is to be answered with at once, if it is.
fn judge(shared: &Shared, socket: &Arc<UdpSocket>, bytes: &[u8], peer: SocketAddr) -> Option<Arc<[u8]>> {
    let counters = &shared.counters;
    let Some(client) = shared.config.client(peer.ip()) else {
        counters.lock().dropped.unknown_client += 1;
        if let Some(more) = counters.strangers.pass() {
            warn!(%peer, more, "RADIUS packet dropped: no [[radius.client]] has this address");
        }
        return None;
    };
    let packet = match Packet::parse(bytes) {
        Ok(packet) => packet,
        Err(error) => {
            counters.lock().dropped.malformed += 1;
            if let Some(more) = counters.dropped.pass() {
                warn!(%peer, more, "RADIUS packet dropped: {error}");
            }
            return None;
        }
    };
    if !matches!(packet.code(), ACCOUNTING_REQUEST | STATUS_SERVER) {
        counters.lock().dropped.other_code += 1;
        if let Some(more) = counters.dropped.pass() {
            warn!(%peer, more, code = packet.code(), "RADIUS packet dropped: only accounting is served here");
        }
        return None;
    }
    if !packet.is_authentic(&client.secret) {
        counters.lock().dropped.wrong_secret += 1;
        if let Some(more) = counters.dropped.pass() {
            warn!(%peer, more, "RADIUS packet dropped: it is not signed with the secret of {}", client.address);
        }
        return None;
    }
    if packet.code() == STATUS_SERVER {
        return Some(packet.answer(&client.secret).into());
    }
    let identity = (peer, packet.id(), packet.authenticator());
    match shared.recent().begin(identity, Instant::now()) {
        Known::No => {}
        Known::Waits => {
            counters.lock().dropped.in_progress += 1;
            return None;
        }
        Known::Answered(answer) => {
            counters.lock().repeated += 1;
            return Some(answer);
        }
    }
    let answer: Arc<[u8]> = packet.answer(&client.secret).into();
    let (line, source) = (&shared.config.line, &shared.config.source);
    let report = match read(&packet, peer.ip().to_canonical(), Timestamp::now(), line, source) {
        Told::Report(report) => report,
        told => {
            if let Told::Useless(reason) = told {
                counters.lock().refused += 1;
                if let Some(more) = counters.useless.pass() {
                    warn!(%peer, more, "RADIUS packet acknowledged, but of no use: it has {reason}");
                }
            }
            shared.recent().answered(&identity, &answer);
            return Some(answer);
        }
    };
    let waiting = Waiting { socket: Arc::clone(socket), identity, answer, report };
    if shared.queue.try_send(waiting).is_err() {
        shared.recent().forget(&identity);
        counters.lock().dropped.overload += 1;
        if let Some(more) = counters.unwritten.pass() {
            warn!(%peer, more, "RADIUS packet dropped: {QUEUE} wait to be written");
        }
    }
    None
}

async fn send(shared: &Shared, socket: &UdpSocket, answer: &[u8], peer: SocketAddr) {
    match socket.send_to(answer, peer).await {
        Ok(_) => shared.counters.lock().acknowledged += 1,
        // It asks again, and is answered from what is kept.
        Err(error) => debug!(%peer, %error, "cannot answer"),
    }
}

/// Takes what waits to the sink, and answers what was kept.
async fn pass_on(mut queue: mpsc::Receiver<Waiting>, sink: impl Sink, shared: Arc<Shared>) {
    let mut batch = Vec::new();
    while queue.recv_many(&mut batch, MOST_TOGETHER).await > 0 {
        let reports = batch.iter().map(|waiting| waiting.report.clone()).collect();
        match sink.take(reports).await {
            Ok(taken) => {
                for (waiting, taken) in batch.drain(..).zip(taken) {
                    told(&shared, &waiting.report, taken);
                    shared.recent().answered(&waiting.identity, &waiting.answer);
                    send(&shared, &waiting.socket, &waiting.answer, waiting.identity.0).await;
                }
            }
            Err(error) => {
                shared.counters.lock().dropped.unwritten += batch.len() as u64;
                if let Some(more) = shared.counters.unwritten.pass() {
                    warn!(more, "what RADIUS told was not written, and is not acknowledged: {error}");
                }
                for waiting in batch.drain(..) {
                    shared.recent().forget(&waiting.identity);
                }
                tokio::time::sleep(RETRY).await;
            }
        }
        batch.clear();
    }
}

fn told(shared: &Shared, report: &Report, taken: Taken) {
    match taken {
        Taken::Changed(warnings) => {
            for warning in warnings {
                warn!("RADIUS: {warning}");
            }
        }
        Taken::Unchanged => {}
        Taken::Refused(reason) => {
            shared.counters.lock().refused += 1;
            if let Some(more) = shared.counters.useless.pass() {
                warn!(more, ?report.event, "what RADIUS told was refused, and is acknowledged: {reason}");
            }
        }
    }
}

#[cfg(test)]
mod tests;
