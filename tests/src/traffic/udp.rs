//! A paced UDP flow: every packet carries its number and the time it was sent.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{io, mem};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::sys::socket::{SockType, setsockopt, sockopt};
use nix::sys::time::TimeVal;
use nix::time::{ClockId, ClockNanosleepFlags, clock_gettime, clock_nanosleep};
use qos_userspace::domain::units::BitsPerSecond;

use super::socket::{BATCH, HEAD, bound, now, path_mtu, receive_batch, receive_drops, send_batch, set_dscp};
use super::{Flow, Latency, Measured, charged_length, rate};
use crate::netns::Namespace;

/// Wake-ups are this far apart, in ns, where a burst of [`BURST`] packets allows it.
const TICK: f64 = 500e3;
/// Packets that go out back to back, unless wake-ups would come faster than [`FASTEST`].
const BURST: f64 = 8.0;
/// No wake-ups closer than this, in ns, as far as a batch goes.
const FASTEST: f64 = 200e3;
/// A sender that was late by more than [`STALL`] catches up at this multiple of its rate.
const CATCH_UP: f64 = 1.25;
/// Wake-ups are late by up to this, in ns, on a busy machine; that much is made good at once.
const STALL: f64 = 4e6;
/// A sender that is later than this, in ns, forgives itself the rest: it shows in `offered`.
const FORGIVEN: f64 = 500e6;
/// How long a receiver lets packets collect; their stamps are the kernel's, so nothing is lost by it.
const COLLECT: Duration = Duration::from_millis(4);
const RECEIVE_BUFFER: usize = 16 << 20;
/// How long packets sent within a window may take.
const SETTLE: Duration = Duration::from_secs(1);

/// What a UDP flow is to be.
#[derive(Clone, Debug)]
pub struct UdpFlow {
    from: SocketAddr,
    to: SocketAddr,
    rate: BitsPerSecond,
    ip_length: u32,
    dscp: u8,
    scattered: bool,
}

/// A UDP flow that runs until dropped.
#[derive(Debug)]
pub struct RunningUdp {
    shared: Arc<Shared>,
    receiver: Arc<OwnedFd>,
    source: SocketAddr,
    wire: WireLength,
    window: Mutex<Window>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    /// bit/s.
    rate: AtomicU64,
    /// Sequence number of the next packet.
    sent: AtomicU64,
    /// The same, but while packets are handed over to the kernel it counts them already.
    begun: AtomicU64,
    /// Highest sequence number seen, plus one.
    seen: AtomicU64,
    recording: AtomicBool,
    arrivals: Mutex<Vec<Arrival>>,
    failure: Mutex<Option<String>>,
}

#[derive(Clone, Copy, Debug)]
struct Arrival {
    sequence: u64,
    /// Both in ns of the stamps' clock.
    sent_at: u64,
    at: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Window {
    began: u64,
    ended: u64,
    first: u64,
    behind: u64,
    drops: u64,
}

/// What one datagram is on the wire.
#[derive(Clone, Copy, Debug)]
struct WireLength {
    payload: u32,
    /// Charged bytes, of all its fragments.
    charged: u32,
}

impl UdpFlow {
    /// A flow of 1,500-byte IP packets; source port 0 takes any free one.
    #[must_use]
    pub fn new(from: impl Into<SocketAddr>, to: impl Into<SocketAddr>, rate: BitsPerSecond) -> Self {
        Self { from: from.into(), to: to.into(), rate, ip_length: 1_500, dscp: 0, scattered: false }
    }

    /// Sets the IP length of the packets in bytes, at least 48 (IPv4) or 68 (IPv6). A longer one
    /// than the path's MTU goes in fragments, all of which are charged.
    #[must_use]
    pub fn packet(mut self, ip_length: u32) -> Self {
        self.ip_length = ip_length;
        self
    }

    /// Sets the DSCP, 0 to 63.
    #[must_use]
    pub fn dscp(mut self, dscp: u8) -> Self {
        self.dscp = dscp;
        self
    }

    /// Lets each burst leave up to its own length late, at random. Flows of even pace that share a full
    /// queue fall into step: one finds room each time and another never.
    #[must_use]
    pub fn scattered(mut self) -> Self {
        self.scattered = true;
        self
    }

    /// Starts to send from `sender` to `receiver`.
    ///
    /// # Errors
    /// When an address isn't the namespace's, a port is taken or the packets are too short.
    pub fn start(self, sender: &Namespace, receiver: &Namespace) -> Result<RunningUdp> {
        static FLOWS: AtomicU32 = AtomicU32::new(1);

        let is_v4 = self.to.is_ipv4();
        let headers = if is_v4 { 28 } else { 48 };
        ensure!(
            self.ip_length >= headers + HEAD as u32,
            "{} is too short for a packet that carries its number: at least {}",
            self.ip_length,
            headers + HEAD as u32
        );

        let incoming = bound(receiver, SockType::Datagram, self.to)?;
        setsockopt(&incoming, sockopt::RcvBufForce, &RECEIVE_BUFFER).context("SO_RCVBUFFORCE")?;
        setsockopt(&incoming, sockopt::ReceiveTimestampns, &true).context("SO_TIMESTAMPNS")?;
        setsockopt(&incoming, sockopt::ReceiveTimeout, &TimeVal::new(0, 50_000)).context("SO_RCVTIMEO")?;

        let outgoing = UdpSocket::from(bound(sender, SockType::Datagram, self.from)?);
        outgoing.connect(self.to).with_context(|| format!("{} to {}", self.from, self.to))?;
        // First of the options: to change some makes the socket forget its route.
        let mtu = path_mtu(&outgoing, is_v4)?;
        set_dscp(&outgoing, is_v4, self.dscp)?;
        forbid_path_mtu_discovery(&outgoing, is_v4)?;
        let wire = WireLength {
            payload: self.ip_length - headers,
            charged: charged_datagram(self.ip_length, mtu, is_v4),
        };

        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            rate: AtomicU64::new(self.rate.0),
            sent: AtomicU64::new(0),
            begun: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            recording: AtomicBool::new(false),
            arrivals: Mutex::default(),
            failure: Mutex::default(),
        });
        let incoming = Arc::new(incoming);
        let source = outgoing.local_addr().context("the sender's address")?;
        let flow = FLOWS.fetch_add(1, Ordering::Relaxed);
        let receive = {
            let (shared, incoming) = (Arc::clone(&shared), Arc::clone(&incoming));
            move || shared.guard("receiving", || receive(&shared, &incoming, flow, wire))
        };
        let send = {
            let shared = Arc::clone(&shared);
            move || shared.guard("sending", || send(&shared, &outgoing, flow, wire, self.scattered))
        };
        let threads = vec![thread::spawn(receive), thread::spawn(send)];
        Ok(RunningUdp { shared, receiver: incoming, source, wire, window: Mutex::default(), threads })
    }
}

impl RunningUdp {
    /// Changes the rate; 0 pauses.
    pub fn set_rate(&self, rate: BitsPerSecond) {
        self.shared.rate.store(rate.0, Ordering::Relaxed);
    }

    /// The rate that it is told to send.
    #[must_use]
    pub fn rate(&self) -> BitsPerSecond {
        BitsPerSecond(self.shared.rate.load(Ordering::Relaxed))
    }

    /// Packets sent since the start.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::SeqCst)
    }

    /// Where it comes from, with the port that was taken.
    #[must_use]
    pub fn source(&self) -> SocketAddr {
        self.source
    }

    /// Lets `warm_up` pass and watches this flow alone.
    ///
    /// # Errors
    /// When its sockets failed.
    pub fn measure(&self, warm_up: Duration, window: Duration) -> Result<Measured> {
        Ok(super::measure(&[self], warm_up, window)?.remove(0))
    }

    fn window(&self) -> MutexGuard<'_, Window> {
        self.window.lock().expect("no holder of this lock panics")
    }

    /// What overran the receiver; its socket is open as long as `self`.
    fn drops(&self) -> u64 {
        receive_drops(&*self.receiver).unwrap_or(0)
    }
}

impl Flow for RunningUdp {
    fn begin(&self) {
        self.shared.arrivals().clear();
        self.shared.recording.store(true, Ordering::SeqCst);
        *self.window() = Window {
            began: now(),
            // The first one that can't have arrived before it was recorded.
            first: self.shared.begun.load(Ordering::SeqCst),
            drops: self.drops(),
            ..Window::default()
        };
    }

    fn end(&self) {
        let mut window = self.window();
        window.ended = now();
        window.behind = self.shared.sent.load(Ordering::SeqCst);
    }

    fn collect(&self) -> Result<Measured> {
        let window = *self.window();
        let deadline = Instant::now() + SETTLE;
        while self.shared.seen.load(Ordering::SeqCst) < window.behind && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        // What the receiver lets collect is handed over before recording ends.
        thread::sleep(2 * COLLECT);
        self.shared.recording.store(false, Ordering::SeqCst);
        let arrivals = mem::take(&mut *self.shared.arrivals());
        if let Some(failure) = &*self.shared.failure() {
            return Err(anyhow!("UDP flow from {}: {failure}", self.source));
        }
        Ok(self.evaluate(window, &arrivals, self.drops() - window.drops))
    }
}

impl RunningUdp {
    fn evaluate(&self, window: Window, arrivals: &[Arrival], receiver_dropped: u64) -> Measured {
        let time = Duration::from_nanos(window.ended - window.began);
        let within: Vec<_> = arrivals
            .iter()
            .filter(|arrival| (window.began..window.ended).contains(&arrival.at))
            .map(|arrival| (arrival.at, self.wire.charged))
            .collect();
        let ours: Vec<_> = arrivals
            .iter()
            .filter(|arrival| (window.first..window.behind).contains(&arrival.sequence))
            .collect();
        let mut sequences: Vec<_> = ours.iter().map(|arrival| arrival.sequence).collect();
        let mut highest = 0;
        let mut reordered = 0;
        for &sequence in &sequences {
            reordered += u64::from(sequence < highest);
            highest = highest.max(sequence);
        }
        sequences.sort_unstable();
        sequences.dedup();
        let sent = window.behind.saturating_sub(window.first);
        let received = sequences.len() as u64;
        let first_lost = (window.first..window.behind)
            .zip(sequences.iter().copied().chain([u64::MAX]))
            .find_map(|(sent, received)| (sent != received).then(|| sent - window.first));
        let count = within.len() as u64;
        Measured {
            window: time,
            offered: rate(sent * u64::from(self.wire.charged), time),
            achieved: rate(count * u64::from(self.wire.charged), time),
            goodput: rate(count * u64::from(self.wire.payload), time),
            sent,
            received,
            lost: (sent - received).saturating_sub(receiver_dropped),
            first_lost,
            reordered,
            receiver_dropped,
            stopped: 0.0,
            latency: Latency::new(
                ours.iter().map(|arrival| arrival.at.saturating_sub(arrival.sent_at)).collect(),
            ),
            began: window.began,
            arrivals: within,
        }
    }
}

impl Drop for RunningUdp {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            // A panic in there has been printed; this may run while another unwinds.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn arrivals(&self) -> MutexGuard<'_, Vec<Arrival>> {
        self.arrivals.lock().expect("no holder of this lock panics")
    }

    fn failure(&self) -> MutexGuard<'_, Option<String>> {
        self.failure.lock().expect("no holder of this lock panics")
    }

    fn guard(&self, what: &str, work: impl FnOnce() -> io::Result<()>) {
        if let Err(error) = work() {
            *self.failure() = Some(format!("{what}: {error}"));
        }
    }
}

fn send(shared: &Shared, socket: &UdpSocket, flow: u32, wire: WireLength, scattered: bool) -> io::Result<()> {
    // The default slack of 50 µs would bunch packets up.
    // SAFETY: sets a number of this thread.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_u64) };
    let mut padding = vec![0_u8; wire.payload as usize - HEAD];
    let mut heads = [[0_u8; HEAD]; BATCH];
    let mut sequence = 0_u64;
    // Departure time of the next packet, and when the last burst should have left.
    let mut next = monotonic();
    let mut last = 0.0_f64;
    // Part of its own length by which the next burst is late.
    let mut late = 0.0;
    while !shared.stopped() {
        let rate = shared.rate.load(Ordering::Relaxed);
        if rate == 0 {
            thread::sleep(Duration::from_millis(5));
            next = monotonic();
            continue;
        }
        let interval = f64::from(wire.charged) * 8e9 / rate as f64;
        let largest = (FASTEST / interval).ceil().clamp(BURST, BATCH as f64);
        let burst = (TICK / interval).ceil().clamp(1.0, largest);
        let wake = (next + (burst - 1.0) * interval).max(last + burst * interval / CATCH_UP);
        // At most 50 ms at a time, so that a slow flow stops and changes its rate promptly.
        let time = monotonic();
        let leave = wake + late * burst * interval;
        if leave > time {
            sleep_until(leave.min(time + 50e6));
            if monotonic() < leave {
                continue;
            }
        }
        late = if scattered { fastrand::f64() } else { 0.0 };
        let time = monotonic();
        next = next.max(time - FORGIVEN - burst * interval);
        let due = (((time - next) / interval) as usize + 1).min(burst as usize);
        let stamp = now();
        for (head, sequence) in heads.iter_mut().zip(sequence..).take(due) {
            head[..8].copy_from_slice(&sequence.to_be_bytes());
            head[8..16].copy_from_slice(&stamp.to_be_bytes());
            head[16..].copy_from_slice(&flow.to_be_bytes());
        }
        shared.begun.store(sequence + due as u64, Ordering::SeqCst);
        let taken = match send_batch(socket, &mut heads[..due], &mut padding) {
            Ok(taken) => taken,
            // An ICMP answer to an earlier packet, or a full queue: the path's doing, not a failure.
            Err(error) if is_transient(&error) => 0,
            Err(error) => return Err(error),
        };
        sequence += taken as u64;
        shared.sent.store(sequence, Ordering::SeqCst);
        shared.begun.store(sequence, Ordering::SeqCst);
        next += due as f64 * interval;
        last = wake.max(time - STALL);
    }
    Ok(())
}

fn receive(shared: &Shared, socket: &OwnedFd, flow: u32, wire: WireLength) -> io::Result<()> {
    let mut batch = Vec::new();
    while !shared.stopped() {
        let received = receive_batch(socket, |received| {
            let Some((sequence, rest)) = received.head.split_first_chunk() else { return };
            let Some((sent_at, rest)) = rest.split_first_chunk() else { return };
            // Another flow's, from when it had this port.
            if rest != flow.to_be_bytes() || received.length != wire.payload {
                return;
            }
            batch.push(Arrival {
                sequence: u64::from_be_bytes(*sequence),
                sent_at: u64::from_be_bytes(*sent_at),
                at: received.at,
            });
        });
        match received {
            Ok(count) => {
                if shared.recording.load(Ordering::SeqCst) {
                    shared.arrivals().extend_from_slice(&batch);
                }
                if let Some(highest) = batch.iter().map(|arrival| arrival.sequence).max() {
                    shared.seen.fetch_max(highest + 1, Ordering::SeqCst);
                }
                batch.clear();
                if count < BATCH {
                    thread::sleep(COLLECT);
                }
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Charged bytes of a datagram of `ip_length`, each fragment with its own headers.
fn charged_datagram(ip_length: u32, mtu: u32, is_v4: bool) -> u32 {
    if ip_length <= mtu {
        return charged_length(ip_length);
    }
    let header = if is_v4 { 20 } else { 40 };
    let fragment_header = if is_v4 { header } else { header + 8 };
    let body = ip_length - header;
    // All but the last carry a multiple of 8 bytes (RFC 791 section 3.2, RFC 8200 section 4.5).
    let fragments = body.div_ceil((mtu - fragment_header) / 8 * 8);
    body + fragments * charged_length(fragment_header)
}

/// Longer packets than the path takes are to be fragmented here, not refused.
fn forbid_path_mtu_discovery(socket: &UdpSocket, is_v4: bool) -> Result<()> {
    use std::os::fd::AsRawFd as _;
    let (level, option, value) = if is_v4 {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT)
    };
    // SAFETY: the option is an int, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as u32,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()).context("path MTU discovery off") }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ECONNREFUSED | libc::EHOSTUNREACH | libc::ENETUNREACH | libc::ENOBUFS | libc::EINTR)
    )
}

fn monotonic() -> f64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the clock exists on every Linux");
    time.tv_sec() as f64 * 1e9 + time.tv_nsec() as f64
}

fn sleep_until(time: f64) {
    let time = Duration::from_nanos(time as u64).into();
    // Interrupted by a signal: the caller looks at the clock again.
    let _ = clock_nanosleep(ClockId::CLOCK_MONOTONIC, ClockNanosleepFlags::TIMER_ABSTIME, &time);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fragment_is_charged() {
        for (ip_length, mtu, is_v4, expected) in [
            (1_500, 1_500, true, 1_514),
            (1_501, 1_500, true, 1_481 + 2 * 34),
            (2_980, 1_500, true, 2_960 + 2 * 34),
            (2_981, 1_500, true, 2_961 + 3 * 34),
            (1_500, 1_500, false, 1_514),
            // 1,448 bytes fit behind 40 + 8 bytes of headers.
            (40 + 2 * 1_448, 1_500, false, 2 * 1_448 + 2 * 62),
            (41 + 2 * 1_448, 1_500, false, 1 + 2 * 1_448 + 3 * 62),
        ] {
            assert_eq!(charged_datagram(ip_length, mtu, is_v4), expected, "{ip_length} over {mtu}");
        }
    }
}
