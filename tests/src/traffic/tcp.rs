//! TCP in bulk: as many bytes as the path takes, over one or several connections.
//!
//! The wire rate is computed from `TCP_INFO`: segments with data that reached the receiver, each
//! counted as a full one (the sender's MSS, options, IP header and 14 bytes). A bulk sender sends
//! no others, but for the odd one at a window's edge; segments that arrive twice did use the path
//! and are counted twice.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Backlog, SockType, SockaddrStorage, connect, listen, setsockopt, sockopt};
use nix::sys::time::TimeVal;

use super::socket::{bound, get_option, now, set_dscp};
use super::{Flow, Measured, charged_length, rate};
use crate::netns::Namespace;

/// How long the handshakes may take.
const CONNECT: TimeVal = TimeVal::new(10, 0);
/// How long the receiver lets data collect.
const COLLECT: Duration = Duration::from_millis(1);
const CHUNK: usize = 64 << 10;

/// What a TCP flow is to be.
#[derive(Clone, Debug)]
pub struct TcpFlow {
    from: SocketAddr,
    to: SocketAddr,
    connections: u16,
    dscp: u8,
}

/// A TCP flow that runs until dropped, which resets its connections.
#[derive(Debug)]
pub struct RunningTcp {
    shared: Arc<Shared>,
    /// Sending and receiving end of each connection.
    connections: Arc<Vec<(TcpStream, TcpStream)>>,
    window: Mutex<Option<(Snapshot, Option<Snapshot>)>>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    /// Payload bytes.
    received: AtomicU64,
    recording: AtomicBool,
    /// When, in ns, and how many payload bytes.
    arrivals: Mutex<Vec<(u64, u32)>>,
    failure: Mutex<Option<String>>,
}

#[derive(Clone, Debug)]
struct Snapshot {
    at: u64,
    /// Payload bytes of all connections.
    received: u64,
    connections: Vec<(TcpInfo, TcpInfo)>,
}

/// `struct tcp_info` of linux/tcp.h (6.1) up to the field that is last needed here.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct TcpInfo {
    _state_to_backoff: [u8; 5],
    options: u8,
    _scales_and_flags: [u8; 2],
    _rto_ato: [u32; 2],
    snd_mss: u32,
    _rcv_mss_to_rcv_space: [u32; 20],
    total_retrans: u32,
    _rates: [u64; 2],
    _bytes_acked_received: [u64; 2],
    _segs_to_min_rtt: [u32; 4],
    data_segs_in: u32,
    data_segs_out: u32,
}

const _: () = assert!(std::mem::offset_of!(TcpInfo, total_retrans) == 100);
const _: () = assert!(std::mem::offset_of!(TcpInfo, data_segs_in) == 152);

impl TcpFlow {
    /// One connection; source port 0 takes any free one.
    #[must_use]
    pub fn new(from: impl Into<SocketAddr>, to: impl Into<SocketAddr>) -> Self {
        Self { from: from.into(), to: to.into(), connections: 1, dscp: 0 }
    }

    /// Sets the number of parallel connections. A source port that isn't 0 is the first one's, and
    /// the others count up from it.
    #[must_use]
    pub fn connections(mut self, connections: u16) -> Self {
        self.connections = connections;
        self
    }

    /// Sets the DSCP of the sender's packets, 0 to 63.
    #[must_use]
    pub fn dscp(mut self, dscp: u8) -> Self {
        self.dscp = dscp;
        self
    }

    /// Connects from `sender` to `receiver` and starts to send.
    ///
    /// # Errors
    /// When an address isn't the namespace's, a port is taken, or no connection comes about within
    /// ten seconds.
    pub fn start(self, sender: &Namespace, receiver: &Namespace) -> Result<RunningTcp> {
        ensure!(self.connections > 0, "a TCP flow of no connections");
        let listener = bound(receiver, SockType::Stream, self.to)?;
        listen(&listener, Backlog::MAXCONN).with_context(|| format!("listening on {}", self.to))?;
        setsockopt(&listener, sockopt::ReceiveTimeout, &CONNECT).context("SO_RCVTIMEO")?;
        let listener = TcpListener::from(listener);

        let connections = (0..self.connections)
            .map(|index| self.connect(index, sender, &listener))
            .collect::<Result<Vec<_>>>()?;
        let connections = Arc::new(connections);
        let shared = Arc::new(Shared::default());
        let threads = [receive as fn(&Shared, &[_]) -> io::Result<()>, send]
            .map(|work| {
                let (shared, connections) = (Arc::clone(&shared), Arc::clone(&connections));
                thread::spawn(move || {
                    if let Err(error) = work(&shared, &connections) {
                        *shared.failure() = Some(error.to_string());
                    }
                })
            })
            .into();
        Ok(RunningTcp { shared, connections, window: Mutex::default(), threads })
    }

    fn connect(
        &self,
        index: u16,
        sender: &Namespace,
        listener: &TcpListener,
    ) -> Result<(TcpStream, TcpStream)> {
        let mut from = self.from;
        if from.port() != 0 {
            from.set_port(from.port() + index);
        }
        let outgoing = bound(sender, SockType::Stream, from)?;
        set_dscp(&outgoing, self.to.is_ipv4(), self.dscp)?;
        // It bounds connect() too (socket(7)).
        setsockopt(&outgoing, sockopt::SendTimeout, &CONNECT).context("SO_SNDTIMEO")?;
        connect(outgoing.as_raw_fd(), &SockaddrStorage::from(self.to))
            .with_context(|| format!("connecting {from} to {}", self.to))?;
        let (incoming, _) = listener.accept().with_context(|| format!("accepting on {}", self.to))?;
        let ends = (TcpStream::from(outgoing), incoming);
        for end in [&ends.0, &ends.1] {
            end.set_nonblocking(true).context("O_NONBLOCK")?;
            // Dropped, the connection is reset: nothing of it lingers in a namespace that is going.
            setsockopt(end, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })
                .context("SO_LINGER")?;
        }
        Ok(ends)
    }
}

impl RunningTcp {
    /// Lets `warm_up` pass and watches this flow alone.
    ///
    /// # Errors
    /// When its sockets failed.
    pub fn measure(&self, warm_up: Duration, window: Duration) -> Result<Measured> {
        Ok(super::measure(&[self], warm_up, window)?.remove(0))
    }

    /// Where its connections come from.
    ///
    /// # Errors
    /// When a socket has failed.
    pub fn sources(&self) -> Result<Vec<SocketAddr>> {
        self.connections.iter().map(|(end, _)| end.local_addr().context("a connection's address")).collect()
    }

    fn snapshot(&self) -> io::Result<Snapshot> {
        Ok(Snapshot {
            at: now(),
            received: self.shared.received.load(Ordering::SeqCst),
            connections: self
                .connections
                .iter()
                .map(|(from, to)| Ok((tcp_info(from)?, tcp_info(to)?)))
                .collect::<io::Result<_>>()?,
        })
    }

    fn evaluate(&self, before: &Snapshot, after: &Snapshot, arrivals: Vec<(u64, u32)>) -> Result<Measured> {
        let is_v4 = self.connections[0].0.local_addr().context("a connection's address")?.is_ipv4();
        let time = Duration::from_nanos(after.at - before.at);
        let (mut sent, mut received, mut lost) = (0_u64, 0_u64, 0_u64);
        let (mut offered_bytes, mut achieved_bytes, mut payload_bytes) = (0_u64, 0_u64, 0_u64);
        for ((from, to), (from_before, to_before)) in after.connections.iter().zip(&before.connections) {
            let out = u64::from(from.data_segs_out.wrapping_sub(from_before.data_segs_out));
            let into = u64::from(to.data_segs_in.wrapping_sub(to_before.data_segs_in));
            let charged = u64::from(from.charged_segment(is_v4));
            sent += out;
            received += into;
            lost += u64::from(from.total_retrans.wrapping_sub(from_before.total_retrans));
            offered_bytes += out * charged;
            achieved_bytes += into * charged;
            payload_bytes += into * u64::from(from.snd_mss);
        }
        let expansion = achieved_bytes as f64 / payload_bytes.max(1) as f64;
        Ok(Measured {
            window: time,
            offered: rate(offered_bytes, time),
            achieved: rate(achieved_bytes, time),
            goodput: rate(after.received - before.received, time),
            sent,
            received,
            lost,
            reordered: 0,
            first_lost: None,
            receiver_dropped: 0,
            stopped: 0.0,
            latency: None,
            began: before.at,
            arrivals: arrivals
                .into_iter()
                .filter(|(at, _)| (before.at..after.at).contains(at))
                .map(|(at, payload)| (at, (f64::from(payload) * expansion) as u32))
                .collect(),
        })
    }
}

impl Flow for RunningTcp {
    fn begin(&self) {
        self.shared.arrivals().clear();
        self.shared.recording.store(true, Ordering::SeqCst);
        *self.window.lock().expect("no holder of this lock panics") =
            self.shared.keep(self.snapshot()).map(|before| (before, None));
    }

    fn end(&self) {
        let after = self.shared.keep(self.snapshot());
        self.shared.recording.store(false, Ordering::SeqCst);
        if let Some(window) = &mut *self.window.lock().expect("no holder of this lock panics") {
            window.1 = after;
        }
    }

    fn collect(&self) -> Result<Measured> {
        if let Some(failure) = &*self.shared.failure() {
            return Err(anyhow!("TCP flow: {failure}"));
        }
        let arrivals = std::mem::take(&mut *self.shared.arrivals());
        match self.window.lock().expect("no holder of this lock panics").take() {
            Some((before, Some(after))) => self.evaluate(&before, &after, arrivals),
            _ => Err(anyhow!("TCP flow: its window was not opened and closed")),
        }
    }
}

impl Drop for RunningTcp {
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

    fn arrivals(&self) -> MutexGuard<'_, Vec<(u64, u32)>> {
        self.arrivals.lock().expect("no holder of this lock panics")
    }

    fn failure(&self) -> MutexGuard<'_, Option<String>> {
        self.failure.lock().expect("no holder of this lock panics")
    }

    fn keep<T>(&self, result: io::Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                *self.failure() = Some(format!("TCP_INFO: {error}"));
                None
            }
        }
    }
}

impl TcpInfo {
    /// Charged bytes of a full segment.
    fn charged_segment(&self, is_v4: bool) -> u32 {
        /// `TCPI_OPT_TIMESTAMPS` of linux/tcp.h.
        const TIMESTAMPS: u8 = 1;
        let ip = if is_v4 { 20 } else { 40 };
        let tcp = 20 + if self.options & TIMESTAMPS != 0 { 12 } else { 0 };
        charged_length(self.snd_mss + ip + tcp)
    }
}

fn tcp_info(socket: &TcpStream) -> io::Result<TcpInfo> {
    // SAFETY: any bits are numbers.
    unsafe { get_option(socket, libc::IPPROTO_TCP, libc::TCP_INFO) }
}

fn receive(shared: &Shared, connections: &[(TcpStream, TcpStream)]) -> io::Result<()> {
    let mut waiting: Vec<_> =
        connections.iter().map(|(_, end)| PollFd::new(end.as_fd(), PollFlags::POLLIN)).collect();
    while !shared.stopped() {
        poll(&mut waiting, PollTimeout::from(50_u8))?;
        let at = now();
        let mut bytes = 0;
        for (_, end) in connections {
            while let Some(count) = discard(end)? {
                bytes += count;
            }
        }
        shared.received.fetch_add(bytes, Ordering::SeqCst);
        if bytes > 0 && shared.recording.load(Ordering::SeqCst) {
            // A millisecond's data is far below 4 GiB.
            shared.arrivals().push((at, bytes as u32));
        }
        thread::sleep(COLLECT);
    }
    Ok(())
}

fn send(shared: &Shared, connections: &[(TcpStream, TcpStream)]) -> io::Result<()> {
    let mut waiting: Vec<_> =
        connections.iter().map(|(end, _)| PollFd::new(end.as_fd(), PollFlags::POLLOUT)).collect();
    let zeros = vec![0_u8; CHUNK];
    while !shared.stopped() {
        poll(&mut waiting, PollTimeout::from(50_u8))?;
        for (end, _) in connections {
            // A few chunks at a time, so that all connections get their turn.
            for _ in 0..4 {
                match io::Write::write(&mut &*end, &zeros) {
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
        }
    }
    Ok(())
}

/// Takes up to 1 MiB off the socket without copying it (`MSG_TRUNC`, tcp(7)); `None` when there is
/// nothing.
fn discard(socket: &TcpStream) -> io::Result<Option<u64>> {
    // SAFETY: with MSG_TRUNC the kernel writes nothing.
    let count = unsafe {
        libc::recv(socket.as_raw_fd(), std::ptr::null_mut(), 1 << 20, libc::MSG_TRUNC | libc::MSG_DONTWAIT)
    };
    match count {
        0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
        1.. => Ok(Some(count.unsigned_abs() as u64)),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            error => Err(error),
        },
    }
}
