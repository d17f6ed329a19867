//! A gateway that masquerades its subscribers: real nftables, real `qosd`, real traffic. Needs root,
//! and `nft`, or skips.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test and what it calls fail by panicking")]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use qos_tests::ask::{Brief, undisturbed};
use qos_tests::boxes::{BoxUnderTest, Kind};
use qos_tests::capture::Capture;
use qos_tests::daemon::Daemon;
use qos_tests::skip::skip;
use qos_tests::topology::{HOST_LINK, Topology};
use qos_tests::traffic::{TcpFlow, UdpFlow, made_good, stopped_while};
use qos_userspace::domain::{AllocationId, BitsPerSecond};

const WINDOW: Duration = Duration::from_secs(2);
/// Ethernet, IPv4 and UDP headers.
const HEADERS: usize = 14 + 20 + 8;

fn mbit(mbit: u64) -> BitsPerSecond {
    BitsPerSecond(mbit * 1_000_000)
}

/// A masquerading gateway with a line of 20 Mbit/s; none where there is no `nft`.
fn masquerading(test: &str) -> Option<(Topology, Daemon)> {
    let BoxUnderTest { daemon, net, .. } = match BoxUnderTest::start(Kind::Nat).unwrap() {
        Ok(started) => started,
        Err(reason) => {
            skip(test, &reason);
            return None;
        }
    };
    for line in [
        "session add home --address 192.0.2.10 --down 20mbit --up 20mbit",
        "provider add video --kind application --network 203.0.113.0/24",
    ] {
        daemon.qos_line(line).unwrap();
    }
    Some((net, daemon))
}

fn grant(daemon: &Daemon, flow: &str, level: &str) -> AllocationId {
    daemon.grant(&format!("--provider video --flow '{flow}' {level}")).unwrap().id
}

/// What arrives, outside of what a flow can measure.
#[derive(Clone, Copy)]
struct Received {
    /// In bit/s.
    rate: f64,
    /// Share of the time for which the machine stopped.
    stopped: f64,
}

/// Measures what `receive` gets, in bytes a call, once the burst is over.
fn received(mut receive: impl FnMut() -> usize) -> Received {
    let warm = Instant::now() + WINDOW / 2;
    while Instant::now() < warm {
        receive();
    }
    let count = || {
        let (began, mut bytes) = (Instant::now(), 0);
        while began.elapsed() < WINDOW {
            bytes += receive();
        }
        bytes as f64 * 8.0 / began.elapsed().as_secs_f64()
    };
    let (stopped, rate) = stopped_while(count).unwrap();
    Received { rate, stopped }
}

/// What `home` receives, charged as the gateway does, of a UDP stream that `video` sends back to whoever
/// asked: 1,000-byte IP packets at `offered`.
fn stream_back(net: &Topology, port: u16, offered: BitsPerSecond) -> Received {
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    let server = video.namespace.run(|| UdpSocket::bind((video.v4(0), port)).unwrap());
    let client = home.namespace.run(|| UdpSocket::bind((home.v4(0), 0)).unwrap());
    client.connect((video.v4(0), port)).unwrap();
    client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    client.send(b"send").unwrap();
    let mut asked = [0; 16];
    let (_, whom) = server.recv_from(&mut asked).unwrap();
    assert_ne!(whom.ip(), home.v4(0), "the gateway masquerades");
    let payload = [0; 1_000 - 28];
    let gap = Duration::from_secs_f64(((payload.len() + HEADERS) * 8) as f64 / offered.0 as f64);
    thread::scope(|scope| {
        scope.spawn(|| {
            let began = Instant::now();
            let mut due = Duration::ZERO;
            while due < 2 * WINDOW {
                thread::sleep(due.saturating_sub(began.elapsed()));
                // What a full socket drops is not offered.
                let _ = server.send_to(&payload, whom);
                due += gap;
            }
        });
        let mut buffer = [0; 2_048];
        received(|| client.recv(&mut buffer).unwrap() + HEADERS)
    })
}

/// The same of a TCP connection that `home` opened, 1,448 of 1,514 bytes being payload.
fn download(net: &Topology, port: u16) -> Received {
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    let listener = video.namespace.run(|| TcpListener::bind((video.v4(0), port)).unwrap());
    let mut client = home.namespace.run(|| TcpStream::connect((video.v4(0), port)).unwrap());
    let (mut server, _) = listener.accept().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            let block = vec![0; 64 << 10];
            // Until the client hangs up.
            while server.write_all(&block).is_ok() {}
        });
        let mut buffer = vec![0; 64 << 10];
        let payload = received(|| {
            let read = client.read(&mut buffer).unwrap();
            assert!(read > 0, "the connection ended");
            read
        });
        drop(client);
        Received { rate: payload.rate * 1_514.0 / 1_448.0, ..payload }
    })
}

fn is_near(Received { rate, stopped }: Received, expected: BitsPerSecond, tolerance: f64, what: &str) {
    println!(
        "{what}: {:.3} Mbit/s of {expected}, the machine stopped for {:.1} %",
        rate / 1e6,
        stopped * 100.0
    );
    let share = made_good(rate / expected.0 as f64, stopped);
    assert!((share - 1.0).abs() < tolerance, "{what}: {rate} bit/s, {expected} are due, {stopped} stopped");
}

#[test]
fn levels_are_held_down_to_subscribers_behind_masquerading() {
    let name = "levels_are_held_down_to_subscribers_behind_masquerading";
    let Some((net, daemon)) = masquerading(name) else { return };
    let status = daemon.status().unwrap();
    let wan = status.gateway.interfaces.iter().find(|interface| interface.name == "wan0").unwrap();
    assert_eq!((wan.xdp.as_str(), wan.tc.as_str() == "none"), ("unused", false), "{wan:?}");
    for (port, level, due) in [
        (5_000, "--max-down 2mbit --enforcement police --dscp EF", mbit(2)),
        (5_001, "--max-down 3mbit --enforcement shape --dscp EF", mbit(3)),
    ] {
        let id = grant(&daemon, &format!("down udp from 203.0.113.0/24:{port} to 192.0.2.10"), level);
        let capture = Capture::open(&net.subscriber("home").namespace, HOST_LINK).unwrap();
        is_near(stream_back(&net, port, mbit(6)), due, 0.03, level);
        let frame = capture
            .find(Duration::from_secs(1), |frame| frame.ports().is_some_and(|ports| ports.0 == port))
            .unwrap()
            .expect("captured");
        assert_eq!(frame.dscp(), Some(46), "{level}");
        let counts = daemon.counts(id).unwrap();
        assert!(counts.down.passed.packets > 500 && counts.up.passed.packets == 0, "{counts:?}");
    }
    // The line holds what has no level.
    is_near(stream_back(&net, 5_002, mbit(30)), mbit(20), 0.03, "rest");
    let shaped = "--max-down 4mbit --enforcement shape";
    grant(&daemon, "down tcp from 203.0.113.0/24:6000 to 192.0.2.10", shaped);
    is_near(download(&net, 6_000), mbit(4), 0.03, shaped);
}

#[test]
fn levels_are_held_up_from_subscribers_behind_masquerading() {
    let name = "levels_are_held_up_from_subscribers_behind_masquerading";
    let Some((net, daemon)) = masquerading(name) else { return };
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    let to = |port| SocketAddr::from((video.v4(0), port));
    let from = SocketAddr::from((home.v4(0), 0));
    for (port, level, due) in [
        (5_000, "--max-up 2mbit --enforcement police --dscp AF41", mbit(2)),
        (5_001, "--max-up 3mbit --enforcement shape --dscp AF41", mbit(3)),
    ] {
        grant(&daemon, &format!("up udp from 192.0.2.10 to 203.0.113.0/24:{port}"), level);
        let flow = UdpFlow::new(from, to(port), mbit(6))
            .packet(1_000)
            .start(&home.namespace, &video.namespace)
            .unwrap();
        let held = undisturbed(&flow, WINDOW / 2, WINDOW).unwrap();
        println!("{level}: {:?}", Brief(&held));
        assert!((held.ratio_to(due) - 1.0).abs() < 0.03, "{level}: {:?}", Brief(&held));
        let capture = Capture::open(&video.namespace, HOST_LINK).unwrap();
        let frame = capture
            .find(Duration::from_secs(1), |frame| frame.ports().is_some_and(|ports| ports.1 == port))
            .unwrap()
            .expect("captured");
        assert_eq!(frame.dscp(), Some(34), "{level}");
        assert_ne!(frame.addresses().unwrap().0, home.v4(0), "the gateway masquerades");
    }
    grant(&daemon, "up tcp from 192.0.2.10 to 203.0.113.0/24:6001", "--max-up 4mbit --enforcement shape");
    let flow = TcpFlow::new(from, to(6_001)).start(&home.namespace, &video.namespace).unwrap();
    let held = flow.measure(WINDOW, WINDOW).unwrap();
    println!("TCP shaped: {:?}", Brief(&held));
    assert!((held.ratio_to(mbit(4)) - 1.0).abs() < 0.03, "TCP shaped: {:?}", Brief(&held));
    drop(flow);
    // A twentieth is left free in the direction out of the line. What has no level is held to it, and so is
    // what is policed at more than it and has no class of its own.
    grant(&daemon, "up udp from 192.0.2.10 to 203.0.113.0/24:5003", "--max-up 25mbit --enforcement police");
    for (port, what) in [(5_002, "rest"), (5_003, "policed without a guarantee")] {
        let flow = UdpFlow::new(from, to(port), mbit(30)).start(&home.namespace, &video.namespace).unwrap();
        let held = undisturbed(&flow, WINDOW / 2, WINDOW).unwrap();
        println!("{what}: {:?}", Brief(&held));
        assert!((held.ratio_to(mbit(19)) - 1.0).abs() < 0.03, "{what}: {:?}", Brief(&held));
    }
}

#[test]
fn masquerading_is_taken_into_account_by_a_reload_and_forgotten_by_another() {
    let name = "masquerading_is_taken_into_account_by_a_reload_and_forgotten_by_another";
    let Some((net, daemon)) = masquerading(name) else { return };
    let policed = |direction: &str| format!("--max-{direction} 2mbit --enforcement police");
    grant(&daemon, "down udp from 203.0.113.0/24:5000 to 192.0.2.10", &policed("down"));
    grant(&daemon, "up udp from 192.0.2.10 to 203.0.113.0/24:5001", &policed("up"));
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    let up = UdpFlow::new((home.v4(0), 0), (video.v4(0), 5_001), mbit(6))
        .packet(1_000)
        .start(&home.namespace, &video.namespace)
        .unwrap();
    let text = std::fs::read_to_string(daemon.config_path()).unwrap();
    for (nat, judged, down) in [(true, "egress", 2), (false, "xdp", 6), (true, "egress", 2)] {
        let text = text.replace("nat = true", &format!("nat = {nat}"));
        std::fs::write(daemon.config_path(), text).unwrap();
        daemon.qos_line("reload").unwrap();
        let interfaces = daemon.status().unwrap().gateway.interfaces;
        let wan = interfaces.iter().find(|interface| interface.name == "wan0").unwrap();
        assert_eq!(wan.judged, judged, "nat = {nat}: {wan:?}");
        // Where it judges what comes in by the WAN, it sees the address of the gateway itself.
        is_near(stream_back(&net, 5_000, mbit(6)), mbit(down), 0.03, &format!("down, nat = {nat}"));
        let held = undisturbed(&up, WINDOW / 2, WINDOW).unwrap();
        assert!((held.ratio_to(mbit(2)) - 1.0).abs() < 0.03, "up, nat = {nat}: {:?}", Brief(&held));
        assert_eq!(daemon.qos_line("reconcile").unwrap()["items"].as_array().map(Vec::len), Some(0));
    }
}
