//! The largest packet of a level: what TCP is told when it opens, what the sender of a packet that is too
//! big is told, and what becomes of packets that may be fragmented. Real stacks, real `qosd`. That
//! connections which were open before keep to it is shown on every kind of box, in `boxes.rs`. Needs root.
#![expect(clippy::unwrap_used, reason = "a test and what it calls fail by panicking")]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::thread;
use std::time::Duration;

use etherparse::{Icmpv6Slice, SlicedPacket, TransportSlice};
use nix::sys::socket::{getsockopt, sockopt};
use qos_common::checksum::replace_word;
use qos_tests::capture::{Capture, Frame, Injector};
use qos_tests::daemon::{Config, Daemon};
use qos_tests::frames::{FrameSpec, TCP};
use qos_tests::topology::{HOST_LINK, Host, Topology};
use qos_userspace::domain::Allocation;

const SOON: Duration = Duration::from_secs(1);

fn started(config: &Config) -> (Topology, Daemon) {
    let net = Topology::pair().unwrap();
    let daemon = Daemon::start(&net.gateway, config).unwrap();
    for line in [
        "session add home --address 192.0.2.10 --address 2001:db8:1::10 --down 100mbit --up 100mbit",
        "provider add video --kind application --network 203.0.113.0/24 --network 2001:db8:2::/48",
    ] {
        daemon.qos_line(line).unwrap();
    }
    (net, daemon)
}

fn address(host: &Host, v6: bool) -> IpAddr {
    if v6 { host.v6(0).into() } else { host.v4(0).into() }
}

fn grant(daemon: &Daemon, flow: &str, mtu: u16) -> Allocation {
    daemon.grant(&format!("--provider video --flow '{flow}' --mtu {mtu}")).unwrap()
}

/// Opens a connection from `home` to `video`, sends both ways, and returns the segment sizes that the two
/// ends use, and the largest IP packets that each of them received: home, video.
fn connection(net: &Topology, v6: bool, port: u16) -> ([u32; 2], [u16; 2]) {
    const SIZE: usize = 200_000;
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    let target = SocketAddr::new(address(video, v6), port);
    let listener = video.namespace.run(|| TcpListener::bind(target).unwrap());
    let captures = [home, video].map(|host| Capture::open(&host.namespace, HOST_LINK).unwrap());
    let mut near = home.namespace.run(|| TcpStream::connect(target).unwrap());
    let (mut far, _) = listener.accept().unwrap();
    let sizes = [&near, &far].map(|stream| getsockopt(&stream.as_fd(), sockopt::TcpMaxSeg).unwrap());
    thread::scope(|scope| {
        for (from, to) in [(near.try_clone(), far.try_clone()), (far.try_clone(), near.try_clone())] {
            let (mut from, mut to) = (from.unwrap(), to.unwrap());
            scope.spawn(move || from.write_all(&[7; SIZE]).unwrap());
            scope.spawn(move || to.read_exact(&mut [0; SIZE]).unwrap());
        }
    });
    near.flush().unwrap();
    far.flush().unwrap();
    let largest = captures.map(|capture| {
        let frames = capture.collect(Duration::from_millis(200)).unwrap();
        frames.iter().filter(|frame| !frame.outgoing).filter_map(Frame::ip_length).max().unwrap_or_default()
    });
    (sizes, largest)
}

/// Segment size in packets of `mtu` bytes, with the time stamps that Linux puts into each.
fn segment(mtu: u16, v6: bool) -> u32 {
    u32::from(mtu) - if v6 { 60 } else { 40 } - 12
}

#[test]
fn connections_that_open_keep_to_the_mtu_and_later_ones_are_large_again() {
    for more in ["", "tc_hooks = \"clsact\""] {
        let (net, daemon) = started(&Config { more: more.to_owned(), ..Config::default() });
        let mut port = 5_000;
        for v6 in [false, true] {
            let (home, video) = (address(net.subscriber("home"), v6), address(net.provider("video"), v6));
            for (flow, mtu, limited) in [
                (format!("down tcp from {video} to {home}"), 1_400, [true, false]),
                (format!("up tcp from {home} to {video}"), 1_300, [false, true]),
                (format!("between {home} and {video} tcp"), 1_280, [true, true]),
            ] {
                port += 1;
                let case = format!("{more} {flow} mtu {mtu}");
                let whole = [segment(1_500, v6); 2];
                assert_eq!(connection(&net, v6, port).0, whole, "{case}: before");
                let id = grant(&daemon, &flow, mtu).id;
                let (sizes, largest) = connection(&net, v6, port + 1_000);
                // Handshakes are lowered both ways: who opens is told of the traffic down by its SYN,
                // and the other end of the traffic up by the answer.
                assert!(sizes.iter().all(|size| *size <= whole[0]), "{case}: {sizes:?}");
                for (largest, limited) in largest.into_iter().zip(limited) {
                    assert!(!limited || (1_000..=mtu).contains(&largest), "{case}: {largest} bytes");
                }
                let counts = daemon.counts(id).unwrap();
                assert!(counts.up.mtu.mss_lowered + counts.down.mtu.mss_lowered > 0, "{case}: {counts:?}");
                assert_eq!(counts.up.mtu.dropped_packets + counts.down.mtu.dropped_packets, 0, "{case}");
                daemon.revoke(id).unwrap();
                assert_eq!(connection(&net, v6, port + 2_000).0, whole, "{case}: revoked");
            }
        }
    }
}

/// A SYN from `home` to `video` with these options, padded to whole words.
fn syn(net: &Topology, v6: bool, options: &[u8]) -> Vec<u8> {
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    let spec = FrameSpec {
        macs: (home.mac, home.gateway_mac),
        addresses: (address(home, v6), address(video, v6)),
        protocol: TCP,
        length: (if v6 { 40 } else { 20 }) + 20 + options.len() as u16,
        ..FrameSpec::udp(
            (home.mac, home.gateway_mac),
            (address(home, v6), address(video, v6)),
            (40_000, 9_999),
        )
    };
    let mut frame = spec.build().unwrap();
    let tcp = 14 + if v6 { 40 } else { 20 };
    frame[tcp + 12] = (((20 + options.len()) / 4) << 4) as u8;
    frame[tcp + 13] = 2;
    frame[tcp + 20..].copy_from_slice(options);
    // The checksum over what was written now: from that of the whole.
    let written = frame.clone();
    let parsed = SlicedPacket::from_ethernet(&written).unwrap();
    let Some(TransportSlice::Tcp(segment)) = parsed.transport else { panic!("TCP") };
    let checksum = match parsed.net.unwrap() {
        etherparse::NetSlice::Ipv4(ip) => {
            segment.to_header().calc_checksum_ipv4(&ip.header().to_header(), segment.payload())
        }
        etherparse::NetSlice::Ipv6(ip) => {
            segment.to_header().calc_checksum_ipv6(&ip.header().to_header(), segment.payload())
        }
        etherparse::NetSlice::Arp(_) => panic!("IP"),
    };
    let checksum = checksum.unwrap().to_be_bytes();
    frame[tcp + 16..tcp + 18].copy_from_slice(&checksum);
    frame
}

#[test]
fn options_of_a_handshake_may_stand_in_any_order_and_malformed_ones_are_left_alone() {
    let (net, daemon) = started(&Config::default());
    grant(&daemon, "between 192.0.2.10 and 203.0.113.0/24 tcp", 1_300);
    grant(&daemon, "between 2001:db8:1::10 and 2001:db8:2::/48 tcp", 1_300);
    let injector = Injector::open(&net.subscriber("home").namespace, HOST_LINK).unwrap();
    for v6 in [false, true] {
        let largest: u16 = if v6 { 1_240 } else { 1_260 };
        let size = |size: u16| [2, 4, size.to_be_bytes()[0], size.to_be_bytes()[1]];
        let with = |before: &[u8], size: [u8; 4], behind: &[u8]| [before, &size, behind].concat();
        for (what, before, after) in [
            ("alone", size(1_460).to_vec(), size(largest).to_vec()),
            ("never raised", size(500).to_vec(), size(500).to_vec()),
            ("as large", size(largest).to_vec(), size(largest).to_vec()),
            ("zero", size(0).to_vec(), size(0).to_vec()),
            ("odd", with(&[1], size(1_460), &[1, 1, 1]), with(&[1], size(largest), &[1, 1, 1])),
            (
                "behind others",
                with(&[4, 2, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 3, 3, 7, 1], size(9_000), &[0, 0, 0, 0]),
                with(&[4, 2, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 3, 3, 7, 1], size(largest), &[0, 0, 0, 0]),
            ),
            ("last of forty", with(&[1; 36], size(65_535), &[]), with(&[1; 36], size(largest), &[])),
            ("behind the end", with(&[0, 0, 0, 0], size(1_460), &[]), with(&[0, 0, 0, 0], size(1_460), &[])),
            ("of another length", vec![2, 3, 5, 180], vec![2, 3, 5, 180]),
            ("cut off", vec![1, 2, 4, 5], vec![1, 2, 4, 5]),
            (
                "behind a length of zero",
                with(&[8, 0, 0, 0], size(1_460), &[]),
                with(&[8, 0, 0, 0], size(1_460), &[]),
            ),
            (
                "behind one too long",
                with(&[8, 60, 0, 0], size(1_460), &[]),
                with(&[8, 60, 0, 0], size(1_460), &[]),
            ),
            ("none", vec![], vec![]),
        ] {
            let case = format!("{what}, IPv{}", if v6 { 6 } else { 4 });
            let capture = Capture::open(&net.provider("video").namespace, HOST_LINK).unwrap();
            injector.send(&syn(&net, v6, &before)).unwrap();
            let is_ours = |frame: &Frame| frame.ports() == Some((40_000, 9_999)) && !frame.outgoing;
            let frame = capture.find(SOON, is_ours).unwrap().unwrap_or_else(|| panic!("{case}: arrives"));
            let options = &frame.bytes[14 + (if v6 { 40 } else { 20 }) + 20..];
            assert_eq!(options.get(..after.len()), Some(after.as_slice()), "{case}");
            frame.verify_checksums().unwrap_or_else(|error| panic!("{case}: {error}"));
        }
    }
}

/// What tells of a packet that was too big: source, MTU, quote.
fn answer(frame: &Frame) -> Option<(IpAddr, u32, Vec<u8>)> {
    let headers = frame.headers()?;
    let (mtu, quote) = match headers.transport? {
        TransportSlice::Icmpv4(icmp) if (icmp.type_u8(), icmp.code_u8()) == (3, 4) => {
            let [_, _, high, low] = icmp.bytes5to8();
            (u32::from(u16::from_be_bytes([high, low])), icmp.payload().to_vec())
        }
        TransportSlice::Icmpv6(icmp) if (icmp.type_u8(), icmp.code_u8()) == (2, 0) => {
            (u32::from_be_bytes(icmp.bytes5to8()), icmp.payload().to_vec())
        }
        _ => return None,
    };
    Some((frame.addresses()?.0, mtu, quote))
}

/// Whether the checksum of an answer is right.
fn is_whole(frame: &Frame) -> bool {
    let headers = frame.headers().unwrap();
    match (headers.transport.unwrap(), headers.net.unwrap()) {
        (TransportSlice::Icmpv4(icmp), _) => {
            icmp.icmp_type().calc_checksum(icmp.payload()) == icmp.checksum()
        }
        (TransportSlice::Icmpv6(icmp), etherparse::NetSlice::Ipv6(ip)) => {
            Icmpv6Slice::is_checksum_valid(&icmp, ip.header().source(), ip.header().destination())
        }
        _ => false,
    }
}

#[test]
fn the_sender_of_a_packet_that_is_too_big_is_told_and_fragmentable_ones_pass() {
    let (net, daemon) = started(&Config::default());
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    // Both ways: the gateway answers in its own name, its first on the side that the packet came from.
    for (v6, direction, gateway) in [
        (false, "down", "198.51.100.1"),
        (false, "up", "192.0.2.1"),
        (true, "down", "2001:db8:2::1"),
        (true, "up", "2001:db8:1::1"),
    ] {
        let case = format!("{direction} IPv{}", if v6 { 6 } else { 4 });
        let (from, to) = if direction == "up" { (home, video) } else { (video, home) };
        let (source, target) = (address(from, v6), address(to, v6));
        let flow = format!("{direction} udp from {source} to {target}");
        let id = grant(&daemon, &flow, 1_300).id;
        let counts = || {
            let counts = daemon.counts(id).unwrap();
            if direction == "up" { counts.up } else { counts.down }
        };
        let frame = |length| {
            let macs = (from.mac, from.gateway_mac);
            let mut frame = FrameSpec { length, ..FrameSpec::udp(macs, (source, target), (7_777, 8_888)) }
                .build()
                .unwrap();
            // etherparse sets "don't fragment" in IPv4.
            assert!(v6 || frame[14 + 6] & 0x40 != 0);
            frame.truncate(14 + usize::from(length));
            frame
        };
        let injector = Injector::open(&from.namespace, HOST_LINK).unwrap();
        let arrives = |capture: &Capture, length: u16| {
            let found = capture.find(Duration::from_millis(300), |frame| {
                frame.ports() == Some((7_777, 8_888)) && !frame.outgoing && frame.ip_length() == Some(length)
            });
            found.unwrap().is_some()
        };

        let there = Capture::open(&to.namespace, HOST_LINK).unwrap();
        injector.send(&frame(1_300)).unwrap();
        assert!(arrives(&there, 1_300), "{case}: what is as large passes");

        let back = Capture::open(&from.namespace, HOST_LINK).unwrap();
        let sent = frame(1_301);
        injector.send(&sent).unwrap();
        let told = back.find(SOON, |frame| !frame.outgoing && answer(frame).is_some()).unwrap();
        let told = told.unwrap_or_else(|| panic!("{case}: the sender is told"));
        let (own, mtu, quote) = answer(&told).unwrap();
        assert_eq!((own, mtu), (gateway.parse().unwrap(), 1_300), "{case}");
        assert_eq!(told.addresses().unwrap().1, source, "{case}");
        assert_eq!(quote, sent[14..14 + quote.len()], "{case}: it quotes the packet");
        assert_eq!(quote.len(), if v6 { 1_232 } else { 548 }, "{case}");
        assert!(is_whole(&told), "{case}: checksum");
        assert!(!arrives(&there, 1_301), "{case}: what is larger does not pass");
        assert_eq!((counts().mtu.dropped_packets, counts().mtu.senders_told), (1, 1), "{case}");

        if !v6 {
            let mut fragmentable = frame(1_400);
            fragmentable[14 + 6] &= !0x40;
            let word = |at: usize| u16::from_be_bytes([fragmentable[at], fragmentable[at + 1]]);
            let sum = replace_word(word(14 + 10), word(14 + 6) | 0x4000, word(14 + 6));
            fragmentable[14 + 10..14 + 12].copy_from_slice(&sum.to_be_bytes());
            injector.send(&fragmentable).unwrap();
            assert!(arrives(&there, 1_400), "{case}: what may be fragmented passes");
            assert_eq!(counts().mtu.passed_packets, 1, "{case}");
        }

        // 200 answers a second and 50 at once; the rest are dropped in silence.
        let back = Capture::open(&from.namespace, HOST_LINK).unwrap();
        for _ in 0..1_000 {
            injector.send(&sent).unwrap();
        }
        let answers = back
            .collect(Duration::from_millis(500))
            .unwrap()
            .iter()
            .filter(|frame| !frame.outgoing && answer(frame).is_some())
            .count();
        assert!((50..400).contains(&answers), "{case}: {answers} answers to 1,000 packets");
        assert_eq!(counts().mtu.dropped_packets, 1_001, "{case}");
        assert_eq!(counts().mtu.senders_told, answers as u64 + 1, "{case}");
        assert_eq!(counts().passed.packets, if v6 { 1 } else { 2 }, "{case}: what is dropped is not charged");
        daemon.revoke(id).unwrap();
    }
}

#[test]
fn observing_tells_nobody() {
    let (net, daemon) = started(&Config { mode: "observe", ..Config::default() });
    let id = grant(&daemon, "between 192.0.2.10 and 203.0.113.0/24", 1_300).id;
    let (sizes, largest) = connection(&net, false, 5_000);
    assert_eq!((sizes, largest), ([segment(1_500, false); 2], [1_500; 2]));
    let counts = daemon.counts(id).unwrap();
    assert!(counts.down.mtu.dropped_packets > 100, "what would be: {counts:?}");
}

#[test]
fn an_mtu_that_no_host_need_take_is_refused() {
    let (_net, daemon) = started(&Config::default());
    for (flow, mtu, reason) in [
        ("down from 203.0.113.0/24 to 192.0.2.10", "575", "576"),
        ("down from 203.0.113.0/24 to 192.0.2.10", "0", "576"),
        ("down from 203.0.113.0/24 to 192.0.2.10", "65536", "65535"),
        ("down from 2001:db8:2::/48 to 2001:db8:1::10", "1279", "less than 1280, the smallest of IPv6"),
    ] {
        let output =
            daemon.qos_output(["grant", "--provider", "video", "--flow", flow, "--mtu", mtu]).unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(reason), "{mtu}: {text}");
    }
    daemon.grant("--provider video --flow 'down from 203.0.113.0/24 to 192.0.2.10' --mtu 576").unwrap();
    daemon.grant("--provider video --flow 'down from 2001:db8:2::/48 to 2001:db8:1::10' --mtu 1280").unwrap();
}
