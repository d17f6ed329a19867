//! Levels, granted by `qos` to a real `qosd`, held by real traffic: rates, aggregates, counters,
//! observation. Lines are in `lines.rs`, single packets in `selectors.rs` and `marking.rs`. Needs root.
#![expect(clippy::unwrap_used, reason = "a test and what it calls fail by panicking")]

use std::io::Read as _;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use qos_tests::ask::{Brief, measure_undisturbed, send_for, since};
use qos_tests::capture::Capture;
use qos_tests::daemon::{Config, Daemon};
use qos_tests::kernel::programs;
use qos_tests::topology::{HOST_LINK, Host, Topology, WAN};
use qos_tests::traffic::{Flow, Measured, RunningUdp, TcpFlow, UdpFlow, are_within, charged_length};
use qos_userspace::domain::units::BitsPerSecond;
use qos_userspace::domain::{AllocationId, Direction};

const WARM_UP: Duration = Duration::from_millis(1_000);
const WINDOW: Duration = Duration::from_secs(3);
/// The contract's tolerance.
const TOLERANCE: f64 = 0.03;

fn mbit(mbit: u64) -> BitsPerSecond {
    BitsPerSecond(mbit * 1_000_000)
}

fn kbit(kbit: u64) -> BitsPerSecond {
    BitsPerSecond(kbit * 1_000)
}

fn to(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

fn address(host: &Host, v6: bool) -> IpAddr {
    if v6 { host.v6(0).into() } else { host.v4(0).into() }
}

/// An address with a port as selectors have it.
fn endpoint(address: IpAddr, port: u16) -> String {
    if address.is_ipv6() { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

fn times(rate: BitsPerSecond, factor: f64) -> BitsPerSecond {
    BitsPerSecond((rate.0 as f64 * factor) as u64)
}

/// Allocations need no session, and stand under the link where there is none.
fn without_sessions() -> Config {
    Config { more: "require_session = false".to_owned(), ..Config::default() }
}

/// A gateway between `home` and `video`, with a provider of either kind. The IPv6 address of `home`
/// is on a line, the IPv4 address on none.
fn pair(config: &Config) -> (Topology, Daemon) {
    let net = Topology::pair().unwrap();
    let daemon = Daemon::start(&net.gateway, config).unwrap();
    daemon.qos_line("session add fibre --address 2001:db8:1::10 --down 400mbit --up 400mbit").unwrap();
    for line in [
        "provider add video --kind application --network 203.0.113.0/24 --network 2001:db8:2::/48",
        "provider add isp --kind network --network 192.0.2.0/24 --network 2001:db8:1::/48",
    ] {
        daemon.qos_line(line).unwrap();
    }
    (net, daemon)
}

/// What is sent to find out whether a rate is held.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Probe {
    /// Paced at 1.5 times the rate, with so many bytes of IP packet.
    Udp(u32),
    Tcp,
}

enum Running {
    Udp(RunningUdp),
    Tcp(qos_tests::traffic::RunningTcp),
}

impl Running {
    fn flow(&self) -> &dyn Flow {
        match self {
            Self::Udp(flow) => flow,
            Self::Tcp(flow) => flow,
        }
    }
}

/// Every pair of rows runs at once: one provider's traffic down, another's up.
#[test]
fn a_maximum_is_held_within_three_percent() {
    let (net, daemon) = pair(&without_sessions());
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    let mut wrong = Vec::new();
    let mut port = 5_000;
    for (enforcement, probe) in [
        ("police", Probe::Udp(1_500)),
        ("shape", Probe::Udp(1_500)),
        ("shape", Probe::Tcp),
        ("police", Probe::Udp(200)),
        ("shape", Probe::Udp(200)),
    ] {
        for rate in [1, 10, 100] {
            if probe == Probe::Udp(200) && rate == 100 {
                // 60,000 packets a second and direction are the machine's limit, not ours.
                continue;
            }
            for v6 in [false, true] {
                port += 1;
                let case = format!("{enforcement} {probe:?} {rate} Mbit/s IPv{}", if v6 { 6 } else { 4 });
                let (near, far) = (address(home, v6), address(video, v6));
                let protocol = if probe == Probe::Tcp { "tcp" } else { "udp" };
                let mut ids = Vec::new();
                let mut flows = Vec::new();
                for (direction, provider, from, target) in
                    [("down", "video", (video, far), (home, near)), ("up", "isp", (home, near), (video, far))]
                {
                    let granted = daemon.grant(&format!(
                        "--provider {provider} --flow '{direction} {protocol} from {} to {}' \
                         --max-{direction} {rate}mbit --enforcement {enforcement}",
                        from.1,
                        endpoint(target.1, port)
                    ));
                    ids.push(granted.unwrap().id);
                    let (source, sink) = (to(from.1, 0), to(target.1, port));
                    let offered = times(mbit(rate), 1.5);
                    let running = match probe {
                        Probe::Udp(length) => {
                            let flow = UdpFlow::new(source, sink, offered).packet(length);
                            Running::Udp(flow.start(&from.0.namespace, &target.0.namespace).unwrap())
                        }
                        Probe::Tcp => {
                            let flow = TcpFlow::new(source, sink);
                            Running::Tcp(flow.start(&from.0.namespace, &target.0.namespace).unwrap())
                        }
                    };
                    let told = if probe == Probe::Tcp { BitsPerSecond(0) } else { offered };
                    flows.push((running, told));
                }
                let watched: Vec<_> = flows.iter().map(|(flow, told)| (flow.flow(), *told)).collect();
                let measured = measure_undisturbed(&watched, WARM_UP, WINDOW).unwrap();
                for (direction, measured) in ["down", "up"].into_iter().zip(&measured) {
                    let off = measured.ratio_to(mbit(rate)) - 1.0;
                    println!("{case} {direction}: {:+.2} %, {:?}", off * 100.0, Brief(measured));
                    if off.abs() > TOLERANCE {
                        wrong.push(format!(
                            "{case} {direction}: {:+.2} %, {:?}",
                            off * 100.0,
                            Brief(measured)
                        ));
                    }
                }
                drop(flows);
                for id in ids {
                    daemon.revoke(id).unwrap();
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// One address of a subscriber and what it is granted.
struct Address {
    /// kbit/s.
    maximum: u64,
    guaranteed: Option<u64>,
    enforcement: &'static str,
}

/// A provider with two addresses and, some, less in all than the two maxima, in kbit/s.
struct Eighth {
    aggregate: Option<u64>,
    addresses: [Address; 2],
}

fn police(maximum: u64) -> Address {
    Address { maximum, guaranteed: None, enforcement: "police" }
}

fn shape(maximum: u64) -> Address {
    Address { maximum, guaranteed: None, enforcement: "shape" }
}

fn guaranteed(guaranteed: u64, maximum: u64) -> Address {
    Address { maximum, guaranteed: Some(guaranteed), enforcement: "police" }
}

#[test]
fn eight_providers_and_sixteen_addresses_at_once_each_at_its_own_level() {
    let eight = [
        Eighth { aggregate: None, addresses: [police(500), shape(1_000)] },
        Eighth { aggregate: None, addresses: [shape(2_000), police(3_000)] },
        Eighth { aggregate: None, addresses: [police(4_000), police(5_000)] },
        Eighth { aggregate: None, addresses: [shape(6_000), shape(7_000)] },
        Eighth { aggregate: Some(3_000), addresses: [police(2_000), police(2_500)] },
        Eighth { aggregate: Some(4_000), addresses: [shape(3_000), police(3_500)] },
        Eighth { aggregate: Some(5_000), addresses: [guaranteed(3_000, 4_000), police(4_500)] },
        Eighth { aggregate: Some(6_000), addresses: [guaranteed(1_500, 6_000), shape(8_000)] },
    ];
    let near: Vec<String> = (0..16).map(|n| format!("192.0.2.{}", 10 + n)).collect();
    let near: Vec<&str> = near.iter().map(String::as_str).collect();
    let mut builder = Topology::builder().subscriber("flats", &near);
    for n in 0..eight.len() {
        builder = builder.provider(&format!("p{n}"), &[&format!("203.0.113.{}", 10 + n)]);
    }
    let net = builder.build().unwrap();
    let flats = net.subscriber("flats");
    let daemon = Daemon::start(&net.gateway, &without_sessions()).unwrap();

    let mut flows = Vec::new();
    for (n, provider) in eight.iter().enumerate() {
        let host = net.provider(&format!("p{n}"));
        let aggregate = provider.aggregate.map(|kbit| format!("--max-down {kbit}kbit")).unwrap_or_default();
        let add = format!("provider add p{n} --kind application --network {}/32 {aggregate}", host.v4(0));
        daemon.qos_line(&add).unwrap();
        for (index, address) in provider.addresses.iter().enumerate() {
            let target = flats.v4(2 * n + index);
            let sure = address.guaranteed.map(|kbit| format!("--guaranteed-down {kbit}kbit"));
            daemon
                .grant(&format!(
                    "--provider p{n} --flow 'down from {}/32 to {target}' --max-down {}kbit {} \
                     --enforcement {}",
                    host.v4(0),
                    address.maximum,
                    sure.unwrap_or_default(),
                    address.enforcement
                ))
                .unwrap();
            let offered = times(kbit(address.maximum), 1.4);
            let flow = UdpFlow::new(to(host.v4(0), 0), to(target, 5_000), offered).packet(1_000);
            flows.push((flow.start(&host.namespace, &flats.namespace).unwrap(), offered));
        }
    }
    let watched: Vec<_> = flows.iter().map(|(flow, offered)| (flow as &dyn Flow, *offered)).collect();
    let measured = measure_undisturbed(&watched, WARM_UP, WINDOW).unwrap();

    let mut wrong = Vec::new();
    let mut check = |what: String, measured: &[Measured], low: u64, high: u64| {
        let achieved = BitsPerSecond(measured.iter().map(|measured| measured.achieved.0).sum());
        let text = format!("{what}: {achieved} of {} to {}", kbit(low), kbit(high));
        println!("{text}");
        if !are_within(measured, (kbit(low), kbit(high)), TOLERANCE) {
            wrong.push(text);
        }
    };
    for (n, (provider, two)) in eight.iter().zip(measured.chunks(2)).enumerate() {
        for (index, (address, one)) in provider.addresses.iter().zip(two.chunks(1)).enumerate() {
            let low =
                if provider.aggregate.is_none() { address.maximum } else { address.guaranteed.unwrap_or(0) };
            check(format!("p{n} address {index}"), one, low, address.maximum);
        }
        if let Some(aggregate) = provider.aggregate {
            check(format!("p{n} together"), two, aggregate, aggregate);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Starts a flow that pauses, to the port `port` of `target`.
fn paused(from: &Host, target: &Host, v6: bool, port: u16, length: u32) -> RunningUdp {
    UdpFlow::new(to(address(from, v6), 0), to(address(target, v6), port), BitsPerSecond(0))
        .packet(length)
        .start(&from.namespace, &target.namespace)
        .unwrap()
}

/// What became of an allocation's traffic, in packets.
struct Expected {
    case: &'static str,
    level: &'static str,
    offered: BitsPerSecond,
    /// Drops by the limit there must, or must not, be.
    drops: bool,
    /// Rate that is in profile, of `length`-byte packets; none: nothing is.
    in_profile: Option<BitsPerSecond>,
}

#[test]
fn counters_say_what_was_sent_and_received() {
    let (net, daemon) = pair(&without_sessions());
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    let time = Duration::from_secs(2);
    let mut port = 5_000;
    for Expected { case, level, offered, drops, in_profile } in [
        Expected {
            case: "within the maximum",
            level: "--max-down 10mbit --enforcement police",
            offered: mbit(5),
            drops: false,
            in_profile: None,
        },
        Expected {
            case: "over the maximum",
            level: "--max-down 2mbit --enforcement police",
            offered: mbit(5),
            drops: true,
            in_profile: None,
        },
        Expected {
            case: "within the guarantee",
            level: "--guaranteed-down 10mbit --enforcement police",
            offered: mbit(5),
            drops: false,
            in_profile: Some(mbit(5)),
        },
        Expected {
            case: "guaranteed, excess and dropped",
            level: "--guaranteed-down 2mbit --max-down 4mbit --enforcement police",
            offered: mbit(6),
            drops: true,
            in_profile: Some(mbit(2)),
        },
        Expected {
            case: "no maximum",
            level: "--guaranteed-down 2mbit --enforcement police",
            offered: mbit(6),
            drops: false,
            in_profile: Some(mbit(2)),
        },
        Expected {
            case: "shaped, within",
            level: "--guaranteed-down 1mbit --max-down 8mbit",
            offered: mbit(5),
            drops: false,
            in_profile: Some(mbit(1)),
        },
    ] {
        for v6 in [false, true] {
            port += 1;
            let (near, far) = (address(home, v6), address(video, v6));
            let flow = format!("down udp from {far} to {}", endpoint(near, port));
            let id = daemon.grant(&format!("--provider video --flow '{flow}' {level}")).unwrap().id;
            let length = 1_000;
            let charge = u64::from(charged_length(length));
            let sender = paused(video, home, v6, port, length);
            let provider = || *daemon.statistics().unwrap().providers.iter().next_back().unwrap().1;
            let (before, provider_before) = (daemon.counts(id).unwrap(), provider());
            let sent = send_for(&sender, offered, time).unwrap();
            let (after, provider_after) = (daemon.counts(id).unwrap(), provider());
            let counts = since(&before.down, &after.down);
            let case = format!("{case} IPv{}: {:?} counted {counts:?}", if v6 { 6 } else { 4 }, Brief(&sent));
            println!("{case}");

            assert_eq!(sent.receiver_dropped, 0, "the machine is too busy: {case}");
            assert_eq!(counts.passed.packets + counts.dropped.packets, sent.sent, "{case}");
            assert_eq!(counts.passed.packets - counts.queue_dropped_packets, sent.received, "{case}");
            assert_eq!(counts.dropped.packets > 0, drops, "{case}");
            assert_eq!(counts.in_profile.packets + counts.excess.packets, counts.passed.packets, "{case}");
            for count in [counts.passed, counts.dropped, counts.in_profile, counts.excess] {
                assert_eq!(count.bytes, count.packets * charge, "{case}");
            }
            assert_eq!(counts.marked.packets, 0, "{case}");
            match in_profile {
                None => assert_eq!(counts.in_profile.packets, 0, "{case}"),
                Some(rate) if rate == offered => assert_eq!(counts.excess.packets, 0, "{case}"),
                Some(rate) => {
                    // And the burst of 25 ms or two packets at the start, and one packet.
                    let bytes = rate.0 as f64 / 8.0 * time.as_secs_f64();
                    let most = bytes + (rate.0 as f64 / 8.0 * 0.025).max(3_000.0) + charge as f64;
                    let found = counts.in_profile.bytes as f64;
                    assert!(
                        (bytes * 0.97..=most * 1.03).contains(&found),
                        "{bytes} to {most} were due: {case}"
                    );
                }
            }
            assert_eq!(since(&before.up, &after.up), Default::default(), "{case}");
            let whole = since(&provider_before.down, &provider_after.down);
            assert_eq!((whole.passed, whole.dropped), (counts.passed, counts.dropped), "provider: {case}");
            drop(sender);
            daemon.revoke(id).unwrap();
        }
    }
}

#[test]
fn observing_drops_delays_and_marks_nothing_but_says_what_it_would() {
    let (net, daemon) = pair(&Config { mode: "observe", ..without_sessions() });
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    daemon.qos_line("session add dsl --address 192.0.2.10 --down 4mbit --up 2mbit").unwrap();
    assert_eq!(daemon.status().unwrap().gateway.mode, "observe");
    let time = Duration::from_secs(2);
    for v6 in [false, true] {
        let (near, far) = (address(home, v6), address(video, v6));
        let flow = format!("down udp from {far} to {}", endpoint(near, 5_000));
        let id = daemon
            .grant(&format!(
                "--provider video --flow '{flow}' --max-down 2mbit --dscp EF --enforcement police"
            ))
            .unwrap()
            .id;
        let capture = Capture::open(&home.namespace, HOST_LINK).unwrap();
        let sender = paused(video, home, v6, 5_000, 1_000);
        // Five times the maximum and more than twice the line.
        let sent = send_for(&sender, mbit(10), time).unwrap();
        let counts = daemon.counts(id).unwrap().down;
        let case = format!("IPv{}: {:?} counted {counts:?}", if v6 { 6 } else { 4 }, Brief(&sent));
        println!("{case}");

        assert_eq!((sent.lost, sent.receiver_dropped), (0, 0), "{case}");
        let latency = sent.latency.expect("they arrived");
        assert!(latency.p50() < Duration::from_millis(2), "{case}");
        let frame = capture
            .find(Duration::from_secs(1), |frame| frame.ports().is_some_and(|ports| ports.1 == 5_000))
            .unwrap()
            .expect("captured");
        assert_eq!((frame.dscp(), frame.ecn()), (Some(0), Some(0)), "{case}");
        frame.verify_checksums().unwrap();
        assert_eq!(counts.passed.packets + counts.dropped.packets, sent.sent, "{case}");
        let would_pass = counts.passed.bytes as f64 * 8.0 / time.as_secs_f64();
        assert!((would_pass / 2e6 - 1.0).abs() < 0.06, "{would_pass} bit/s would have passed: {case}");
        assert_eq!(counts.marked.packets, counts.passed.packets, "would have been marked: {case}");
        drop(sender);
        daemon.revoke(id).unwrap();
    }
    let status = daemon.status().unwrap();
    assert!(status.gateway.interfaces.iter().all(|interface| interface.scheduler == "none"), "{status:?}");
}

/// A datagram longer than the MTU goes in fragments, of which only the first has ports.
#[test]
fn fragments_are_charged_to_the_allocation_of_their_first() {
    let (net, daemon) = pair(&without_sessions());
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    let time = Duration::from_secs(2);
    for (v6, length, fragments, charge) in [
        // IP bytes, fragments, and what all of them are charged: data and headers.
        (false, 4_000, 3, 3_980 + 3 * (20 + 14)),
        (false, 1_501, 2, 1_481 + 2 * (20 + 14)),
        (true, 4_000, 3, 3_960 + 3 * (48 + 14)),
        (true, 1_501, 2, 1_461 + 2 * (48 + 14)),
    ] {
        let (near, far) = (address(home, v6), address(video, v6));
        let case = format!("IPv{} of {length}", if v6 { 6 } else { 4 });
        let grant = |port: u16, level: &str| -> AllocationId {
            let flow = format!("down udp from {far} to {}", endpoint(near, port));
            daemon.grant(&format!("--provider video --flow '{flow}' {level}")).unwrap().id
        };
        let ours = grant(5_000, "--max-down 20mbit --enforcement police");
        let other = grant(5_001, "--max-down 20mbit --enforcement police");
        let sender = paused(video, home, v6, 5_000, length);

        let sent = send_for(&sender, mbit(8), time).unwrap();
        let (counts, others) = (daemon.counts(ours).unwrap().down, daemon.counts(other).unwrap().down);
        println!("{case}: {:?} counted {counts:?}", Brief(&sent));
        assert_eq!((sent.lost, sent.receiver_dropped), (0, 0), "{case}");
        assert_eq!(counts.passed.packets, sent.sent * fragments, "{case}");
        assert_eq!(counts.passed.bytes, sent.sent * charge, "{case}");
        assert_eq!(others, Default::default(), "{case}");
        daemon.revoke(ours).unwrap();

        // Over the limit: what passes is the rate, whatever of it can be put together.
        let held = grant(5_000, "--max-down 4mbit --enforcement police");
        let sent = send_for(&sender, mbit(8), time).unwrap();
        let counts = daemon.counts(held).unwrap().down;
        println!("{case} held: {:?} counted {counts:?}", Brief(&sent));
        let passed = counts.passed.bytes as f64 * 8.0 / time.as_secs_f64();
        assert!((0.97..1.05).contains(&(passed / 4e6)), "{passed} bit/s: {case}");
        assert_eq!(counts.passed.packets + counts.dropped.packets, sent.sent * fragments, "{case}");
        drop(sender);
        daemon.revoke(held).unwrap();
        daemon.revoke(other).unwrap();
    }
}

/// What is explained is what happens, and an explanation costs nothing.
#[test]
fn explaining_agrees_with_the_packets_and_charges_nothing() {
    let (net, daemon) = pair(&without_sessions());
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    for v6 in [false, true] {
        let (near, far) = (address(home, v6), address(video, v6));
        let flow = format!("down udp from {far} to {}", endpoint(near, 5_000));
        let id = daemon
            .grant(&format!("--provider video --flow '{flow}' --max-down 1mbit --enforcement police"))
            .unwrap()
            .id;
        let capture = Capture::open(&video.namespace, HOST_LINK).unwrap();
        let sender = paused(video, home, v6, 5_000, 1_400);
        send_for(&sender, kbit(500), Duration::from_millis(500)).unwrap();
        let frame = capture
            .find(Duration::from_secs(1), |frame| frame.ports().is_some_and(|ports| ports.1 == 5_000))
            .unwrap()
            .expect("captured");
        let before = daemon.counts(id).unwrap();
        // Sixty packets of 1,400 bytes are half a second of the maximum.
        for _ in 0..60 {
            let explained = daemon.explain(Direction::Downstream, &frame.bytes).unwrap();
            let explanation = &explained.explanation;
            assert_eq!(explanation.outcome, "admitted", "{explained:?}");
            assert_eq!((explanation.allocation, explanation.selector), (Some(id), Some(0)), "{explained:?}");
            assert_eq!((explanation.charged, explanation.length), (1_414, Some(1_400)), "{explained:?}");
            assert_eq!(explained.allocation.as_ref().map(|found| found.id), Some(id), "{explained:?}");
            assert_eq!((explanation.source, explanation.destination), (Some(far), Some(near)));
        }
        let upwards = daemon.explain(Direction::Upstream, &frame.bytes).unwrap().explanation;
        assert_eq!((upwards.outcome.as_str(), upwards.allocation), ("unclassified", None), "{upwards:?}");
        assert_eq!(daemon.counts(id).unwrap(), before, "an explanation is not counted");

        // Ten times the maximum: whoever asks in between hears mostly of drops.
        sender.set_rate(mbit(10));
        std::thread::sleep(Duration::from_millis(300));
        let outcomes: Vec<String> = (0..20)
            .map(|_| daemon.explain(Direction::Downstream, &frame.bytes).unwrap().explanation.outcome)
            .collect();
        let over = outcomes.iter().filter(|outcome| *outcome == "over_maximum").count();
        println!("IPv{}: {over} of {} over the maximum", if v6 { 6 } else { 4 }, outcomes.len());
        assert!(over >= 15, "{outcomes:?}");
        let held: Measured = sender.measure(Duration::ZERO, WINDOW).unwrap();
        assert!((held.ratio_to(mbit(1)) - 1.0).abs() < TOLERANCE, "{:?}", Brief(&held));
        drop(sender);
        daemon.revoke(id).unwrap();
        let after = daemon.explain(Direction::Downstream, &frame.bytes).unwrap().explanation;
        assert_eq!((after.outcome.as_str(), after.allocation), ("unclassified", None), "{after:?}");
    }
}

/// While somebody traces, packets are told of; nothing is lost when that begins or ends, and afterwards
/// the programs are those of before.
#[test]
fn tracing_tells_of_packets_while_somebody_listens() {
    let (net, daemon) = pair(&without_sessions());
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    let plain = programs(&net.gateway, WAN).unwrap();
    for v6 in [false, true] {
        let (near, far) = (address(home, v6), address(video, v6));
        let flow = format!("down udp from {far} to {}", endpoint(near, 5_000));
        let id = daemon
            .grant(&format!("--provider video --flow '{flow}' --max-down 200kbit --enforcement police"))
            .unwrap()
            .id;
        let held = paused(video, home, v6, 5_000, 1_000);
        let free = paused(video, home, v6, 6_000, 1_000);
        // Together 100 packets a second, half of what is told of; half of those with a limit are too many.
        held.set_rate(kbit(400));
        free.set_rate(kbit(400));
        std::thread::sleep(WARM_UP);

        let mut told = tempfile::NamedTempFile::new().unwrap();
        let mut command = Command::new(daemon.binaries().join("qos"));
        command.arg("--socket").arg(daemon.socket()).arg("trace").stdout(told.reopen().unwrap());
        let mut listener = net.gateway.spawn(command).unwrap();
        let traced = free.measure(Duration::ZERO, WINDOW).unwrap();
        assert_ne!(programs(&net.gateway, WAN).unwrap().0, plain.0, "another program takes its place");
        listener.kill().unwrap();
        let after = free.measure(Duration::ZERO, WINDOW).unwrap();
        for (measured, what) in [(traced, "as it began"), (after, "as it ended")] {
            assert_eq!(measured.lost, 0, "{what}: {:?}", Brief(&measured));
        }
        assert_eq!(programs(&net.gateway, WAN).unwrap(), plain);

        let mut text = String::new();
        told.read_to_string(&mut text).unwrap();
        let lines_of = |outcome: &str, port, allocation: &str| {
            let to = format!(" to {} length 1000 {allocation}", endpoint(near, port));
            text.lines()
                .filter(|line| line.starts_with(&format!("{outcome} down udp from ")) && line.ends_with(&to))
                .count()
        };
        let allocation = format!("allocation {}", id.0);
        // In three seconds, less the time that loading takes.
        for (outcome, port, allocation, expected) in [
            ("admitted", 5_000, allocation.as_str(), 40..90),
            ("over_maximum", 5_000, allocation.as_str(), 40..90),
            ("unclassified", 6_000, "no allocation", 80..170),
        ] {
            let found = lines_of(outcome, port, allocation);
            assert!(expected.contains(&found), "{outcome} {port}: {found} lines: {text}");
        }
        daemon.revoke(id).unwrap();
    }
}
