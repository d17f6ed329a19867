//! Re-marking on the wire: code point, checksums, ECN, and everything else as it was. Needs root.
#![expect(clippy::unwrap_used, reason = "a test and what it calls fail by panicking")]

use std::net::IpAddr;
use std::time::Duration;

use etherparse::NetSlice;
use qos_tests::ask::measure_undisturbed;
use qos_tests::capture::{Capture, Frame, Injector};
use qos_tests::daemon::{Config, Daemon};
use qos_tests::frames::{FrameSpec, GRE, ICMP, ICMP6, SCTP, TCP, UDP};
use qos_tests::topology::{HOST_LINK, Host, Topology};
use qos_tests::traffic::TcpFlow;
use qos_userspace::domain::BitsPerSecond;

const PATIENCE: Duration = Duration::from_secs(2);
/// Code point that the allocations write.
const EF: u8 = 46;

fn address(host: &Host, v6: bool) -> IpAddr {
    if v6 { host.v6(0).into() } else { host.v4(0).into() }
}

/// `home` and `video`, whose traffic either way is marked EF, shaped or policed.
fn marked(v6: bool, enforcement: &str) -> (Topology, Daemon) {
    let net = Topology::pair().unwrap();
    let daemon = Daemon::start(&net.gateway, &Config::default()).unwrap();
    let (near, far) = (address(net.subscriber("home"), v6), address(net.provider("video"), v6));
    daemon.qos_line(&format!("session add line --address {near} --down 50mbit --up 50mbit")).unwrap();
    daemon.qos_line(&format!("provider add video --kind application --network {far}")).unwrap();
    daemon
        .grant(&format!(
            "--provider video --flow 'between {near} and {far}' --max-down 40mbit --max-up 40mbit \
             --dscp EF --enforcement {enforcement}"
        ))
        .unwrap();
    (net, daemon)
}

/// The frame as it must look behind the gateway: hardware addresses, a hop less, and the code point.
fn expected(sent: &[u8], seen: &[u8], v6: bool) -> Vec<u8> {
    let mut frame = sent.to_vec();
    frame[..12].copy_from_slice(&seen[..12]);
    if v6 {
        let class = EF << 2 | (frame[15] >> 4 & 3);
        frame[14] = frame[14] & 0xf0 | class >> 4;
        frame[15] = frame[15] & 0x0f | class << 4;
        frame[21] -= 1;
    } else {
        frame[15] = EF << 2 | frame[15] & 3;
        frame[22] -= 1;
        // The checksum is judged by itself.
        frame[24..26].copy_from_slice(&seen[24..26]);
    }
    frame
}

#[test]
fn code_points_are_written_and_nothing_else_changes() {
    for v6 in [false, true] {
        for enforcement in ["police", "shape"] {
            let (net, daemon) = marked(v6, enforcement);
            let (home, video) = (net.subscriber("home"), net.provider("video"));
            let mut frames = 0_u64;
            for (from, target) in [(video, home), (home, video)] {
                let injector = Injector::open(&from.namespace, HOST_LINK).unwrap();
                let capture = Capture::open(&target.namespace, HOST_LINK).unwrap();
                // A length that no other traffic has tells the frames apart.
                let mut length = 200;
                for protocol in [UDP, TCP, SCTP, GRE, if v6 { ICMP6 } else { ICMP }] {
                    for dscp in [0, 10, EF, 63] {
                        for ecn in 0..4 {
                            for options in [vec![], vec![1; 4], vec![1; 40]] {
                                if v6 && !options.is_empty() {
                                    continue;
                                }
                                length += 1;
                                let spec = FrameSpec {
                                    protocol,
                                    dscp,
                                    ecn,
                                    length,
                                    options,
                                    ..FrameSpec::udp(
                                        (from.mac, from.gateway_mac),
                                        (address(from, v6), address(target, v6)),
                                        (5_000, 5_001),
                                    )
                                };
                                let sent = spec.build().unwrap();
                                injector.send(&sent).unwrap();
                                let seen = capture
                                    .find(PATIENCE, |frame| {
                                        !frame.outgoing && frame.bytes.len() == sent.len()
                                    })
                                    .unwrap()
                                    .unwrap_or_else(|| panic!("{enforcement}: lost: {spec:?}"));
                                assert_eq!(seen.dscp(), Some(EF), "{enforcement}: {spec:?}");
                                assert_eq!(seen.ecn(), Some(ecn), "{enforcement}: {spec:?}");
                                assert_eq!(
                                    seen.bytes,
                                    expected(&sent, &seen.bytes, v6),
                                    "{enforcement}: {spec:?}"
                                );
                                seen.verify_checksums()
                                    .unwrap_or_else(|error| panic!("{enforcement}: {spec:?}: {error}"));
                                frames += u64::from(dscp != EF);
                            }
                        }
                    }
                }
            }
            let all = daemon.statistics().unwrap();
            let counts = all.allocations.values().next().expect("one allocation");
            let counted = counts.up.marked.packets + counts.down.marked.packets;
            // Answers to what arrived (port unreachable, resets, echoes) may be marked too.
            assert!(counted >= frames, "{counted} of {frames} marked packets counted: {counts:?}");
            println!("IPv{} {enforcement}: {frames} frames marked", if v6 { 6 } else { 4 });
        }
    }
}

/// Bulk TCP from hosts that leave segmentation and checksums to their NIC: the gateway meets
/// super-packets, and what arrives is marked, whole and right.
#[test]
fn super_packets_are_marked_and_arrive_whole() {
    for v6 in [false, true] {
        let net = Topology::builder()
            .subscriber("home", &["192.0.2.10", "2001:db8:1::10"])
            .provider("video", &["203.0.113.10", "2001:db8:2::10"])
            .offloads(true)
            .build()
            .unwrap();
        let daemon = Daemon::start(&net.gateway, &Config::default()).unwrap();
        let (home, video) = (net.subscriber("home"), net.provider("video"));
        let (near, far) = (address(home, v6), address(video, v6));
        daemon.qos_line(&format!("session add line --address {near} --down 80mbit --up 80mbit")).unwrap();
        daemon.qos_line(&format!("provider add video --kind application --network {far}")).unwrap();
        daemon
            .grant(&format!(
                "--provider video --flow 'down tcp from {far} to {near}' --max-down 20mbit --dscp AF41"
            ))
            .unwrap();
        let capture = Capture::open(&home.namespace, HOST_LINK).unwrap();
        let flow =
            TcpFlow::new((far, 0), (near, 80)).dscp(10).start(&video.namespace, &home.namespace).unwrap();
        let (any, limit) = (BitsPerSecond(0), BitsPerSecond(20_000_000));
        let (warm_up, window) = (Duration::from_secs(1), Duration::from_secs(2));
        let measured = measure_undisturbed(&[(&flow, any)], warm_up, window).unwrap().remove(0);
        let rate = measured.ratio_to(limit);
        println!("IPv{}: {:.3} of 20 Mbit/s", if v6 { 6 } else { 4 }, rate);
        assert!((rate - 1.0).abs() < 0.03, "{} of 20 Mbit/s", measured.achieved);
        let data = |frame: &Frame| !frame.outgoing && frame.bytes.len() > 1_000;
        for _ in 0..100 {
            let frame = capture.find(PATIENCE, data).unwrap().expect("the flow runs");
            assert_eq!(frame.dscp(), Some(34), "AF41");
            if let Some(NetSlice::Ipv4(ip)) = frame.headers().and_then(|headers| headers.net) {
                assert_eq!(ip.header().header_checksum(), ip.header().to_header().calc_header_checksum());
            }
        }
    }
}
