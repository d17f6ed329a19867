//! Lines and links under overload: guarantees, priorities, ceilings, delay, and how cells are
//! counted. Real `qosd`, real traffic. Needs root.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test and what it calls fail by panicking")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::slice;
use std::time::{Duration, Instant};

use qos_common::length::{LinkLayer, charged};
use qos_tests::api::Client;
use qos_tests::ask::{Brief, measure_undisturbed, send_for, undisturbed};
use qos_tests::capture::Injector;
use qos_tests::daemon::{Config, Daemon};
use qos_tests::frames::FrameSpec;
use qos_tests::netlink::Netlink;
use qos_tests::topology::{HOST_LINK, Host, LAN, Topology, UPLINK, WAN};
use qos_tests::traffic::{
    Flow, Latency, Measured, RunningUdp, TcpFlow, UdpFlow, are_within, charged_length, sum_to,
};
use qos_userspace::domain::units::BitsPerSecond;
use qos_userspace::domain::{AllocationId, Direction};
use serde_json::json;

const WARM_UP: Duration = Duration::from_millis(1_000);
const WINDOW: Duration = Duration::from_secs(3);
/// The contract's tolerance.
const TOLERANCE: f64 = 0.03;

fn mbit(mbit: f64) -> BitsPerSecond {
    BitsPerSecond((mbit * 1e6) as u64)
}

fn to(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

/// Two subscribers' lines, a subscriber on no line, and three providers with one address each.
fn street(config: &Config) -> (Topology, Daemon) {
    let net = Topology::builder()
        .subscriber("one", &["192.0.2.10"])
        .subscriber("two", &["192.0.2.20"])
        .subscriber("none", &["192.0.2.30"])
        .provider("video", &["203.0.113.10"])
        .provider("games", &["203.0.113.20"])
        .provider("other", &["198.51.100.10"])
        .build()
        .unwrap();
    let daemon = Daemon::start(&net.gateway, config).unwrap();
    for line in [
        "provider add video --kind application --network 203.0.113.10/32",
        "provider add games --kind application --network 203.0.113.20/32",
        "provider add isp --kind network --network 192.0.2.0/24",
    ] {
        daemon.qos_line(line).unwrap();
    }
    (net, daemon)
}

/// A flow of 1,500-byte packets and, where it has a level, its allocation.
#[derive(Clone, Copy)]
struct Sender {
    name: &'static str,
    from: &'static str,
    to: &'static str,
    /// Mbit/s.
    offered: f64,
    /// Arguments of its grant; none: it is the rest.
    level: Option<&'static str>,
    /// What it gets at least and at most, in Mbit/s, within the tolerance.
    gets: (f64, f64),
}

/// Grants what the senders are to have, lets all of them send at once and checks what each gets.
/// Returns what all of them together get.
fn overload(net: &Topology, daemon: &Daemon, up: bool, senders: &[Sender]) -> Vec<Measured> {
    let mut flows = Vec::new();
    let mut ids = Vec::new();
    for (port, sender) in (5_000..).zip(senders) {
        let (from, target) = if up {
            (net.subscriber(sender.from), net.provider(sender.to))
        } else {
            (net.provider(sender.from), net.subscriber(sender.to))
        };
        if let Some(level) = sender.level {
            let direction = if up { "up" } else { "down" };
            let provider = if up { "isp" } else { sender.from };
            let flow = format!("{direction} udp from {} to {}:{port}", from.v4(0), target.v4(0));
            ids.push(daemon.grant(&format!("--provider {provider} --flow '{flow}' {level}")).unwrap().id);
        }
        let offered = mbit(sender.offered);
        let flow = UdpFlow::new(to(from.v4(0), 0), to(target.v4(0), port), offered);
        flows.push((flow.start(&from.namespace, &target.namespace).unwrap(), offered));
    }
    let watched: Vec<_> = flows.iter().map(|(flow, offered)| (flow as &dyn Flow, *offered)).collect();
    let measured = measure_undisturbed(&watched, WARM_UP, WINDOW).unwrap();
    let due: f64 = senders.iter().map(|sender| sender.gets.0).sum();
    let mut wrong = Vec::new();
    for (sender, measured) in senders.iter().zip(&measured) {
        let (low, high) = sender.gets;
        let text = format!("{}: {low} to {high} Mbit/s were due, {:?}", sender.name, Brief(measured));
        println!("{text}");
        // A packet a second is the least that shows.
        let slack = 0.02;
        // What others could not send while the machine stopped is anybody's.
        let left = (due - low) * measured.stopped;
        let bounds = (mbit(low - slack), mbit(high + slack + left));
        if !are_within(slice::from_ref(measured), bounds, TOLERANCE) {
            wrong.push(text);
        }
    }
    drop(flows);
    for id in ids {
        daemon.revoke(id).unwrap();
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    measured
}

/// That all together have so many Mbit/s, within the tolerance.
#[track_caller]
fn have_all_of(due: f64, measured: &[Measured]) {
    let share = sum_to(measured, mbit(due));
    println!("all together: {share:.3} of {due} Mbit/s");
    assert!((share - 1.0).abs() < TOLERANCE, "all together: {share:.3} of {due} Mbit/s");
}

#[test]
fn guarantees_are_delivered_while_others_overload_the_link() {
    let (net, daemon) = street(&Config { lan_capacity: mbit(50.0), ..Config::default() });
    daemon.qos_line("session add one --address 192.0.2.10 --down 60mbit --up 60mbit").unwrap();
    daemon.qos_line("session add two --address 192.0.2.20 --down 40mbit --up 40mbit").unwrap();
    let measured = overload(
        &net,
        &daemon,
        false,
        &[
            // Priority 7 gets its guarantee and nothing else, though priority 0 wants more.
            Sender {
                name: "guaranteed 10, priority 7",
                from: "video",
                to: "one",
                offered: 14.0,
                level: Some("--guaranteed-down 10mbit --priority 7"),
                gets: (10.0, 10.0),
            },
            Sender {
                name: "guaranteed 5 of at most 8, priority 0, police",
                from: "games",
                to: "two",
                offered: 10.0,
                level: Some("--guaranteed-down 5mbit --max-down 8mbit --priority 0 --enforcement police"),
                gets: (5.0, 8.0),
            },
            Sender {
                name: "excess of priority 0",
                from: "games",
                to: "one",
                offered: 45.0,
                level: Some("--priority 0"),
                gets: (31.9, 35.0),
            },
            Sender {
                name: "rest of line two",
                from: "other",
                to: "two",
                offered: 30.0,
                level: None,
                gets: (0.0, 0.02),
            },
            Sender {
                name: "on no line",
                from: "other",
                to: "none",
                offered: 30.0,
                level: None,
                gets: (0.0, 0.02),
            },
        ],
    );
    have_all_of(50.0, &measured);
    // Of priority 0, which leaves 10 to others.
    have_all_of(40.0, &measured[1..3]);
}

#[test]
fn guarantees_are_delivered_and_the_ceiling_holds_while_others_overload_only_the_line() {
    let (net, daemon) = street(&Config::default());
    daemon.qos_line("session add one --address 192.0.2.10 --down 20mbit --up 10mbit").unwrap();
    daemon.qos_line("session add two --address 192.0.2.20 --down 40mbit --up 10mbit").unwrap();
    let line = [
        Sender {
            name: "guaranteed 8, priority 7",
            from: "video",
            to: "one",
            offered: 12.0,
            level: Some("--guaranteed-down 8mbit --priority 7"),
            gets: (8.0, 8.0),
        },
        Sender {
            name: "guaranteed 2 of at most 4, priority 3",
            from: "games",
            to: "one",
            offered: 6.0,
            level: Some("--guaranteed-down 2mbit --max-down 4mbit --priority 3"),
            gets: (2.0, 2.0),
        },
        Sender {
            name: "excess of priority 0",
            from: "video",
            to: "one",
            offered: 25.0,
            level: Some("--priority 0"),
            gets: (9.9, 10.0),
        },
        Sender {
            name: "policed, in the rest",
            from: "games",
            to: "one",
            offered: 5.0,
            level: Some("--max-down 3mbit --enforcement police"),
            gets: (0.0, 0.02),
        },
        Sender { name: "rest", from: "other", to: "one", offered: 10.0, level: None, gets: (0.0, 0.02) },
    ];
    let beside = Sender {
        name: "another line",
        from: "other",
        to: "two",
        offered: 10.0,
        level: None,
        gets: (10.0, 10.0),
    };
    let all: Vec<_> = line.into_iter().chain([beside]).collect();
    let measured = overload(&net, &daemon, false, &all);
    have_all_of(20.0, &measured[..5]);

    // Out of the line: 95 % of its speed, so that the queue stands in the gateway.
    let measured = overload(
        &net,
        &daemon,
        true,
        &[
            Sender {
                name: "up: guaranteed 4, priority 7",
                from: "one",
                to: "video",
                offered: 6.0,
                level: Some("--guaranteed-up 4mbit --priority 7"),
                gets: (4.0, 4.0),
            },
            Sender {
                name: "up: excess of priority 0",
                from: "one",
                to: "games",
                offered: 8.0,
                level: Some("--priority 0"),
                gets: (5.4, 5.5),
            },
            Sender {
                name: "up: rest",
                from: "one",
                to: "other",
                offered: 6.0,
                level: None,
                gets: (0.0, 0.02),
            },
            Sender {
                name: "up: another line",
                from: "two",
                to: "other",
                offered: 5.0,
                level: None,
                gets: (5.0, 5.0),
            },
        ],
    );
    have_all_of(9.5, &measured[..3]);
}

#[test]
fn the_rest_gets_what_is_left_of_its_line_and_no_more() {
    let (net, daemon) = street(&Config::default());
    daemon.qos_line("session add one --address 192.0.2.10 --down 10mbit --up 10mbit").unwrap();
    let measured = overload(
        &net,
        &daemon,
        false,
        &[
            Sender {
                name: "guaranteed 4",
                from: "video",
                to: "one",
                offered: 3.0,
                level: Some("--guaranteed-down 4mbit --priority 2"),
                gets: (3.0, 3.0),
            },
            Sender { name: "rest", from: "other", to: "one", offered: 12.0, level: None, gets: (7.0, 7.0) },
        ],
    );
    have_all_of(10.0, &measured);
}

/// However much is allocated, with whatever priority, the rest has what the configuration gives it.
#[test]
fn the_rest_is_sure_of_what_the_configuration_says() {
    let more = "line_rest = \"1mbit\"".to_owned();
    let (net, daemon) = street(&Config { more, ..Config::default() });
    daemon.qos_line("session add one --address 192.0.2.10 --down 10mbit --up 10mbit").unwrap();
    let refused =
        "grant --provider video --flow 'down from 203.0.113.10 to 192.0.2.10' --guaranteed-down 9.5mbit";
    let error = daemon.qos_line(refused).unwrap_err().to_string();
    assert!(error.contains("line one downstream: asked 9.5 Mbit/s, left 9 Mbit/s"), "{error}");
    overload(
        &net,
        &daemon,
        false,
        &[
            Sender {
                name: "all it can",
                from: "video",
                to: "one",
                offered: 15.0,
                level: Some("--guaranteed-down 4mbit --max-down 10mbit --priority 0"),
                gets: (9.0, 9.0),
            },
            Sender { name: "rest", from: "other", to: "one", offered: 12.0, level: None, gets: (1.0, 1.0) },
        ],
    );
}

/// A box at the subscriber's end sends into the line upwards: there its speed is used whole.
#[test]
fn the_soft_direction_is_shaped_below_the_lines_speed() {
    for (line_side, down, up) in [("lan", 10.0, 7.6), ("wan", 9.5, 8.0)] {
        let (net, daemon) = street(&Config { line_side, ..Config::default() });
        daemon.qos_line("session add one --address 192.0.2.10 --down 10mbit --up 8mbit").unwrap();
        let rest = |name, from, to, offered, gets| Sender { name, from, to, offered, level: None, gets };
        overload(&net, &daemon, false, &[rest("down", "other", "one", 15.0, (down, down))]);
        overload(&net, &daemon, true, &[rest("up", "one", "other", 12.0, (up, up))]);
    }
}

/// Bytes that wait at the line's far end while `flow` runs, the median of two seconds.
fn far_end_backlog(netlink: &mut Netlink, uplink: u32) -> u32 {
    let mut seen: Vec<u32> = (0..40)
        .map(|_| {
            std::thread::sleep(Duration::from_millis(50));
            netlink.backlog(uplink).unwrap()
        })
        .collect();
    seen.sort_unstable();
    seen[seen.len() / 2]
}

/// The line's other end has a deep buffer, as they do: on the subscriber's side of a box at the network's
/// end, on the network's side of one at the subscriber's.
#[test]
fn a_standing_queue_at_the_far_end_moves_into_the_gateway() {
    const SPEED: f64 = 8.0;
    for (line_side, link, from, target) in [("lan", LAN, "one", "other"), ("wan", WAN, "other", "one")] {
        let observing = Config { mode: "observe", line_side, ..Config::default() };
        let (net, daemon) = street(&observing);
        daemon.qos_line("session add one --address 192.0.2.10 --down 8mbit --up 8mbit").unwrap();
        let segment = net.segment(link);
        let mut netlink = Netlink::open(segment).unwrap();
        let uplink = netlink.link(UPLINK).unwrap().index;
        netlink.put_token_bucket(uplink, mbit(SPEED), 200_000, 3_028).unwrap();
        let (sender, receiver) = if line_side == "lan" {
            (net.subscriber(from), net.provider(target))
        } else {
            (net.provider(from), net.subscriber(target))
        };
        // Which fills a buffer until it overflows, however short the way.
        sender.namespace.set_sysctl("ipv4/tcp_congestion_control", "reno").unwrap();
        let flow = TcpFlow::new(to(sender.v4(0), 0), to(receiver.v4(0), 5_000))
            .start(&sender.namespace, &receiver.namespace)
            .unwrap();
        std::thread::sleep(Duration::from_secs(3));
        let standing = far_end_backlog(&mut netlink, uplink);

        let enforcing = Config { mode: "enforce", ..observing };
        std::fs::write(daemon.config_path(), daemon.config_text(&enforcing).unwrap()).unwrap();
        daemon.qos_line("reload").unwrap();
        // What stands there drains by the twentieth that is left of the line; more slowly where the machine
        // stops, and the gateway catches up.
        let mut moved = standing;
        for _ in 0..3 {
            std::thread::sleep(Duration::from_secs(6));
            moved = far_end_backlog(&mut netlink, uplink);
            if moved < 10_000 {
                break;
            }
        }
        let measured = flow.measure(Duration::ZERO, WINDOW).unwrap();
        println!("{line_side}: {standing} bytes wait at the far end, then {moved}; {:?}", Brief(&measured));
        assert!(standing > 40_000, "{line_side}: {standing} bytes stand at the far end while nothing shapes");
        assert!(
            moved < standing / 5 && moved < 10_000,
            "{line_side}: {moved} bytes of {standing} stay there"
        );
        // Of what is left of the line.
        let share = measured.ratio_to(mbit(0.95 * SPEED));
        assert!((0.9..=1.01).contains(&share), "{line_side}: the flow has {share:.2} of what is left");
    }
}

/// Latency of a probe while the line is overloaded. The machine may spoil a window: of up to three
/// the best counts, and the first that keeps to `limit` is the last.
fn latency(probe: &RunningUdp, limit: Duration, percentile: f64) -> Latency {
    let mut best: Option<Latency> = None;
    for _ in 0..3 {
        let measured = probe.measure(WARM_UP, WINDOW).unwrap();
        println!("  {:?}", Brief(&measured));
        let latency = measured.latency.expect("the probe gets through");
        if best.as_ref().is_none_or(|best| latency.percentile(percentile) < best.percentile(percentile)) {
            best = Some(latency);
        }
        if best.as_ref().is_some_and(|best| best.percentile(percentile) <= limit) {
            break;
        }
    }
    best.expect("measured three times")
}

#[test]
fn the_standing_queue_of_the_rest_is_bounded() {
    let (net, daemon) = street(&Config::default());
    let (one, video, other) = (net.subscriber("one"), net.provider("video"), net.provider("other"));
    // Mbit/s; the share of the line that an allocation takes away from the rest.
    for (speed, share) in [(2.0, 0.0), (2.0, 0.5), (20.0, 0.0), (20.0, 0.8), (100.0, 0.5)] {
        let bits = mbit(speed).0;
        daemon
            .qos_line(&format!("session add one --address 192.0.2.10 --down {bits}bit --up {bits}bit"))
            .unwrap();
        let mut flows = Vec::new();
        let mut start = |from: &Host, port: u16, rate: BitsPerSecond| {
            let flow = UdpFlow::new(to(from.v4(0), 0), to(one.v4(0), port), rate);
            flows.push(flow.start(&from.namespace, &one.namespace).unwrap());
        };
        let mut grant = None;
        if share > 0.0 {
            let flow = format!("down udp from {} to {}:5000", video.v4(0), one.v4(0));
            let sure = mbit(speed * share);
            let grant_line = format!(
                "--provider video --flow '{flow}' --guaranteed-down {}bit --max-down {}bit",
                sure.0, sure.0
            );
            grant = Some(daemon.grant(&grant_line).unwrap().id);
            start(video, 5_000, mbit(speed * share * 1.2));
        }
        start(other, 5_001, mbit(speed * 1.5));
        let probe = UdpFlow::new(to(other.v4(0), 0), to(one.v4(0), 5_002), mbit(speed / 20.0))
            .packet(200)
            .start(&other.namespace, &one.namespace)
            .unwrap();
        println!("line of {speed} Mbit/s, {share} of it allocated:");
        let limit = Duration::from_millis(250);
        let latency = latency(&probe, limit, 0.99);
        assert!(latency.p99() <= limit, "{speed} Mbit/s, {share} allocated: p99 {:?}", latency.p99());
        drop((flows, probe));
        if let Some(id) = grant {
            daemon.revoke(id).unwrap();
        }
        daemon.qos_line("session remove one").unwrap();
    }
}

#[test]
fn high_priority_waits_five_milliseconds_at_most_on_an_overloaded_line() {
    let (net, daemon) = street(&Config::default());
    daemon.qos_line("session add one --address 192.0.2.10 --down 20mbit --up 5mbit").unwrap();
    let (one, video, games, other) =
        (net.subscriber("one"), net.provider("video"), net.provider("games"), net.provider("other"));
    let grant = |provider: &str, from: &Host, port: u16, level: &str| -> AllocationId {
        let flow = format!("down udp from {} to {}:{port}", from.v4(0), one.v4(0));
        daemon.grant(&format!("--provider {provider} --flow '{flow}' {level}")).unwrap().id
    };
    grant("games", games, 5_001, "--guaranteed-down 10mbit --priority 4");
    let start = |from: &Host, port: u16, rate: f64| {
        let flow = UdpFlow::new(to(from.v4(0), 0), to(one.v4(0), port), mbit(rate));
        flow.start(&from.namespace, &one.namespace).unwrap()
    };
    let (_overload, rest) = (start(games, 5_001, 15.0), start(other, 5_002, 20.0));
    let probe = start(video, 5_000, 1.5);
    // What of the rest gets through: where a leaf is a plain queue that may be nothing of the probe.
    println!("without a grant:");
    let without = latency(&rest, Duration::ZERO, 0.5);
    println!("with one:");
    let granted = daemon
        .grant(&format!(
            "--provider video --flow 'down udp from {} to {}:5000' --guaranteed-down 2mbit --priority 0",
            video.v4(0),
            one.v4(0)
        ))
        .unwrap();
    let limit = Duration::from_millis(5);
    let with = latency(&probe, limit, 0.99);
    println!("p99 without {:?}, with {:?}", without.p99(), with.p99());
    assert!(with.p99() <= limit, "p99 {:?}", with.p99());
    assert!(without.p50() > 2 * limit, "the overload is none: p50 {:?}", without.p50());
    let bound = granted.delay_bound.down.expect("guaranteed into the line").whole_us;
    assert!(with.p99() <= Duration::from_micros(bound.into()), "p99 {:?}, bound {bound} µs", with.p99());
}

/// How a line frames, and what an IP packet of some length is charged there, computed by hand.
struct Framed {
    framing: &'static str,
    layer: LinkLayer,
    overhead: i16,
    /// IP bytes, charged bytes, and what HTB charges, which can't count less than the Ethernet header
    /// of its interface (`class.rs` of the scheduler).
    packets: &'static [(u32, u32, u32)],
}

const FRAMED: [Framed; 4] = [
    Framed {
        framing: "--link-layer atm --overhead 32",
        layer: LinkLayer::Atm,
        overhead: 32,
        // 64 + 32 fill two cells of 48 to the last byte, and so on.
        packets: &[
            (64, 2 * 53, 2 * 53),
            (65, 3 * 53, 3 * 53),
            (640, 14 * 53, 14 * 53),
            (641, 15 * 53, 15 * 53),
            (1_500, 32 * 53, 32 * 53),
        ],
    },
    Framed {
        framing: "--link-layer atm --overhead 10",
        layer: LinkLayer::Atm,
        overhead: 10,
        packets: &[
            (82, 2 * 53, 2 * 53),
            (86, 2 * 53, 3 * 53),
            (87, 3 * 53, 3 * 53),
            (1_500, 32 * 53, 32 * 53),
        ],
    },
    Framed {
        framing: "--link-layer ptm --overhead 22",
        layer: LinkLayer::Ptm,
        overhead: 22,
        // A byte more for each 64 that were begun.
        packets: &[(106, 130, 130), (107, 132, 132), (1_500, 1_522 + 24, 1_522 + 24)],
    },
    Framed {
        framing: "--link-layer ethernet --overhead 38",
        layer: LinkLayer::Ethernet,
        overhead: 38,
        packets: &[(100, 138, 138), (1_500, 1_538, 1_538)],
    },
];

#[test]
fn cells_and_overhead_are_counted_as_the_line_counts_them() {
    let (net, daemon) = street(&Config::default());
    let (one, video, other) = (net.subscriber("one"), net.provider("video"), net.provider("other"));
    let mut wrong = Vec::new();
    for Framed { framing, layer, overhead, packets } in FRAMED {
        daemon
            .qos_line(&format!("session add one --address 192.0.2.10 --down 4mbit --up 4mbit {framing}"))
            .unwrap();
        for &(length, charge, queued) in packets {
            assert_eq!(charged(length, overhead, layer), charge, "{framing}, {length} bytes");
            let case = format!("{framing}, {length} bytes");
            let paced =
                |rate: f64, charge: u32| mbit(rate * f64::from(charged_length(length)) / f64::from(charge));
            let pace = |rate: f64| paced(rate, charge);
            // How far from `due`, on a line that charges such a packet `charge`.
            let off = |flow: &RunningUdp, due: f64, charge: u32| {
                undisturbed(flow, WARM_UP / 2, WINDOW / 2).unwrap().ratio_to(paced(due, charge)) - 1.0
            };
            let start = |from: &Host, rate: f64| {
                UdpFlow::new(to(from.v4(0), 0), to(one.v4(0), 5_000), pace(rate))
                    .packet(length)
                    .start(&from.namespace, &one.namespace)
                    .unwrap()
            };
            for (enforcement, held) in [("police", charge), ("shape", queued)] {
                let flow = format!("down udp from {} to {}:5000", video.v4(0), one.v4(0));
                let id = daemon
                    .grant(&format!(
                        "--provider video --flow '{flow}' --max-down 2mbit --enforcement {enforcement}"
                    ))
                    .unwrap()
                    .id;
                // Counted: what the line charges, whatever the queue does.
                let flow = start(video, 0.0);
                let sent = send_for(&flow, pace(1.2), Duration::from_millis(500)).unwrap();
                let counts = daemon.counts(id).unwrap().down;
                if (counts.passed.packets, counts.passed.bytes) != (sent.sent, sent.sent * u64::from(charge))
                {
                    wrong.push(format!("{case}, {enforcement}: sent {}, counted {counts:?}", sent.sent));
                }
                flow.set_rate(pace(3.0));
                let off = off(&flow, 2.0, held);
                println!("{case}, {enforcement}: {:+.2} %", off * 100.0);
                if off.abs() > TOLERANCE {
                    wrong.push(format!("{case}, {enforcement}: {:+.2} %", off * 100.0));
                }
                drop(flow);
                daemon.revoke(id).unwrap();
            }
            // The line itself: the rest may have all of it.
            let flow = start(other, 6.0);
            let off = off(&flow, 4.0, queued);
            println!("{case}, the line: {:+.2} %", off * 100.0);
            if off.abs() > TOLERANCE {
                wrong.push(format!("{case}, the line: {:+.2} %", off * 100.0));
            }
        }
        daemon.qos_line("session remove one").unwrap();
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Registers so many lines that the next ones are in a group of their own.
fn fill_the_root(daemon: &Daemon) {
    let mut client = Client::connect(&daemon.socket()).unwrap();
    for number in 1..=1_024 {
        let address = Ipv4Addr::from(0x0a40_0000 + number);
        let body = json!({
            "name": format!("filler-{number}"), "addresses": [format!("{address}/32")],
            "rate": {"down": "1mbit", "up": "1mbit"},
        });
        let answer = client.ask("POST", "/v1/sessions", Some(&body)).unwrap();
        assert_eq!(answer.status, 201, "{}", answer.body);
    }
}

/// Lines above the first 1,024 are in an HTB below the root's. One of them is overloaded, then the link.
#[test]
fn lines_in_groups_are_held_as_those_of_the_root() {
    let (net, daemon) = street(&Config { lan_capacity: mbit(50.0), ..Config::default() });
    daemon.qos_line("session add two --address 192.0.2.20 --down 40mbit --up 40mbit").unwrap();
    fill_the_root(&daemon);
    daemon.qos_line("session add one --address 192.0.2.10 --down 20mbit --up 10mbit").unwrap();
    let to_one = FrameSpec::udp(
        (net.provider("other").mac, net.provider("other").gateway_mac),
        (net.provider("other").v4(0).into(), net.subscriber("one").v4(0).into()),
        (5_000, 5_001),
    );
    let explained = daemon.explain(Direction::Downstream, &to_one.build().unwrap()).unwrap().explanation;
    assert_eq!(explained.class.as_deref(), Some("5325:2002"), "the second of the first group");

    let line = [
        Sender {
            name: "guaranteed 8, and excess of priority 7",
            from: "video",
            to: "one",
            offered: 12.0,
            level: Some("--guaranteed-down 8mbit --priority 7"),
            gets: (11.0, 11.0),
        },
        Sender {
            name: "excess of priority 0, at most 9",
            from: "games",
            to: "one",
            offered: 20.0,
            level: Some("--max-down 9mbit --priority 0"),
            gets: (9.0, 9.0),
        },
        Sender { name: "rest", from: "other", to: "one", offered: 15.0, level: None, gets: (0.0, 0.02) },
    ];
    let measured = overload(&net, &daemon, false, &line);
    have_all_of(20.0, &measured);

    // The group shares the link with the root's lines; what is guaranteed comes first in both.
    let link = [
        Sender { gets: (8.0, 12.0), ..line[0] },
        Sender {
            name: "the root's, guaranteed 20 of at most 30",
            from: "games",
            to: "two",
            offered: 40.0,
            level: Some("--guaranteed-down 20mbit --max-down 30mbit --priority 0"),
            gets: (30.0, 30.0),
        },
        Sender {
            name: "on no line",
            from: "other",
            to: "none",
            offered: 40.0,
            level: None,
            gets: (0.0, 12.0),
        },
    ];
    let measured = overload(&net, &daemon, false, &link);
    have_all_of(50.0, &measured);
}

/// The first grant on a line, and its revoke, are nothing to its other traffic, in the root as in a group.
#[test]
fn grants_and_revokes_lose_no_packet_of_the_lines_rest() {
    let (net, daemon) = street(&Config::default());
    daemon.qos_line("session add two --address 192.0.2.20 --down 20mbit --up 20mbit").unwrap();
    fill_the_root(&daemon);
    daemon.qos_line("session add one --address 192.0.2.10 --down 20mbit --up 20mbit").unwrap();
    let other = net.provider("other");
    for name in ["one", "two"] {
        let (line, video) = (net.subscriber(name), net.provider("video"));
        let start = |from: &Host, port: u16, rate: f64| {
            let flow = UdpFlow::new(to(from.v4(0), 0), to(line.v4(0), port), mbit(rate));
            flow.start(&from.namespace, &line.namespace).unwrap()
        };
        let (rest, claimed) = (start(other, 5_001, 8.0), start(video, 5_000, 4.0));
        let grants = std::cell::Cell::new(0);
        let [rest, claimed] = std::thread::scope(|scope| {
            let flows = scope.spawn(|| {
                let flows: [(&dyn Flow, BitsPerSecond); 2] = [(&rest, mbit(8.0)), (&claimed, mbit(4.0))];
                qos_tests::traffic::measure(&flows.map(|(flow, _)| flow), WARM_UP, WINDOW).unwrap()
            });
            // The first grant, which divides the line, is within the window.
            std::thread::sleep(2 * WARM_UP);
            while !flows.is_finished() {
                let flow = format!("down udp from {} to {}:5000", video.v4(0), line.v4(0));
                let level = "--guaranteed-down 5mbit --max-down 6mbit";
                let id = daemon.grant(&format!("--provider video --flow '{flow}' {level}")).unwrap().id;
                daemon.revoke(id).unwrap();
                grants.set(grants.get() + 1);
            }
            <[Measured; 2]>::try_from(flows.join().unwrap()).unwrap()
        });
        println!("{name}: {} grants, {:?}, {:?}", grants.get(), Brief(&rest), Brief(&claimed));
        assert!(grants.get() > 10, "{} grants", grants.get());
        assert_eq!((rest.lost, claimed.lost), (0, 0), "{name}");
    }
}

/// A line that is full when the first allocation comes: what waits goes out beside what comes then, once,
/// and the class that it waited in goes when nothing else is to be done.
#[test]
fn a_full_line_is_divided_by_its_first_grant_at_the_price_of_one_queue() {
    const SPEED: f64 = 20.0;
    /// The longest that there is, at the speed of its line: fq_codel's limit.
    const QUEUE: Duration = Duration::from_millis(50);
    const BIN: Duration = Duration::from_millis(100);
    let (net, daemon) = street(&Config::default());
    let (one, video, other) = (net.subscriber("one"), net.provider("video"), net.provider("other"));
    let mut netlink = Netlink::open(&net.gateway).unwrap();
    let lan = netlink.link(LAN).unwrap().index;
    let mut minors = || -> Vec<u32> {
        let found = netlink.classes(lan).unwrap().into_iter().filter(|class| class.kind == "htb");
        let mut minors: Vec<u32> = found.map(|class| class.handle & 0xffff).collect();
        minors.sort_unstable();
        minors
    };
    daemon.qos_line("session add one --address 192.0.2.10 --down 20mbit --up 20mbit").unwrap();
    assert_eq!(minors(), [1, 2, 0x2001]);
    for (queue, divides) in [("one class", false), ("divided", true)] {
        let mut granted = None;
        let flow = UdpFlow::new(to(other.v4(0), 0), to(one.v4(0), 5_001), mbit(1.5 * SPEED));
        let flow = flow.start(&other.namespace, &one.namespace).unwrap();
        let measured = std::thread::scope(|scope| {
            let measured = scope.spawn(|| flow.measure(WARM_UP, WINDOW).unwrap());
            std::thread::sleep(2 * WARM_UP);
            if divides {
                // On which nothing is sent: all of the line is left to its rest.
                let flow = format!("down udp from {} to {}:5000", video.v4(0), one.v4(0));
                let level = "--guaranteed-down 2mbit";
                granted =
                    Some(daemon.grant(&format!("--provider video --flow '{flow}' {level}")).unwrap().id);
            }
            measured.join().unwrap()
        });
        let share = |rate: BitsPerSecond| rate.0 as f64 / 1e6 / SPEED;
        let least = measured.series(BIN).into_iter().map(share).fold(f64::MAX, f64::min);
        let most = share(measured.peak(BIN, mbit(SPEED)));
        println!("{queue}: in {BIN:?} {least:.2} to {most:.2} of the line, {:?}", Brief(&measured));
        let once = if divides { QUEUE } else { Duration::ZERO };
        let limit = |time: Duration| 1.0 + TOLERANCE + once.as_secs_f64() / time.as_secs_f64();
        assert!(measured.ratio_to(mbit(SPEED)) <= limit(WINDOW), "{queue}: {:?}", Brief(&measured));
        // A bin's edge is worth some packets.
        assert!(most <= limit(BIN) + 0.1, "{queue}: up to {most:.2} in a bin");
        let lost = measured.stopped * WINDOW.as_secs_f64() / BIN.as_secs_f64();
        assert!(least >= 0.8 - lost, "{queue}: {least:.2} in a bin, {:?}", Brief(&measured));
        if let Some(id) = granted {
            let deadline = Instant::now() + Duration::from_secs(15);
            while minors() != [1, 2, 0x12, 0x13, 0x4001] {
                assert!(Instant::now() < deadline, "{:x?}", minors());
                std::thread::sleep(Duration::from_millis(100));
            }
            daemon.revoke(id).unwrap();
        }
    }
    // It stays divided until it goes.
    assert_eq!(minors(), [1, 2, 0x12, 0x13]);
    daemon.qos_line("session remove one").unwrap();
    assert_eq!(minors(), [1, 2]);
}

/// A packet whose headers announce more than there is can't be classified; it goes into its line's rest
/// all the same, and can't be used to get round the line.
#[test]
fn what_can_not_be_read_to_its_end_stays_within_its_line() {
    let net = Topology::pair().unwrap();
    let daemon = Daemon::start(&net.gateway, &Config::default()).unwrap();
    daemon.qos_line("session add home --address 2001:db8:1::10 --down 2mbit --up 2mbit").unwrap();
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    let addresses = (video.v6(0).into(), home.v6(0).into());
    let spec = FrameSpec::udp((video.mac, video.gateway_mac), addresses, (5_000, 5_001));
    let mut frame = FrameSpec { length: 1_000, ..spec }.build().unwrap();
    // Destination options (RFC 8200, section 4.6), 2,048 bytes of them.
    frame[20] = 60;
    frame[54..56].copy_from_slice(&[17, 255]);
    let explained = daemon.explain(Direction::Downstream, &frame).unwrap().explanation;
    assert_eq!(explained.outcome, "truncated", "{explained:?}");

    let injector = Injector::open(&video.namespace, HOST_LINK).unwrap();
    let received = || {
        let link = Netlink::open(&home.namespace).unwrap().link(HOST_LINK).unwrap();
        link.counters.rx_bytes
    };
    // 8 Mbit/s, for long enough that the queue is full.
    let send = |time: Duration| {
        let began = Instant::now();
        for number in 0.. {
            let due = Duration::from_millis(number);
            if due >= time {
                break;
            }
            std::thread::sleep(due.saturating_sub(began.elapsed()));
            injector.send(&frame).unwrap();
        }
        began.elapsed()
    };
    send(WARM_UP);
    let before = received();
    let time = send(WINDOW);
    let rate = (received() - before) as f64 * 8.0 / time.as_secs_f64();
    assert!((rate / 2e6 - 1.0).abs() < TOLERANCE, "{rate} bit/s");
}

/// What one socket sends in two sizes: number of each size, and when it was sent.
struct Sent {
    is_small: bool,
    number: u32,
    latency: Duration,
}

/// Small packets of one 5-tuple have a level of their own, above that of its large ones.
#[test]
fn the_length_of_a_packet_decides_its_level_within_one_flow() {
    const SMALL: usize = 100;
    const LARGE: usize = 1_400;
    for v6 in [false, true] {
        let net = Topology::pair().unwrap();
        let daemon = Daemon::start(&net.gateway, &Config::default()).unwrap();
        let (home, video) = (net.subscriber("home"), net.provider("video"));
        let (near, far): (IpAddr, IpAddr) = if v6 {
            (home.v6(0).into(), video.v6(0).into())
        } else {
            (home.v4(0).into(), video.v4(0).into())
        };
        daemon.qos_line(&format!("session add home --address {near} --down 20mbit --up 20mbit")).unwrap();
        daemon
            .qos_line(&format!(
                "provider add video --kind application --network {far}/{}",
                if v6 { 128 } else { 32 }
            ))
            .unwrap();
        let target = if v6 { format!("[{near}]:5000") } else { format!("{near}:5000") };
        for (length, level) in [
            ("0-300", "--guaranteed-down 2mbit --priority 0"),
            ("301-65535", "--max-down 5mbit --enforcement shape --priority 7"),
        ] {
            let flow = format!("down udp from {far} to {target} length {length}");
            daemon.grant(&format!("--provider video --flow '{flow}' {level}")).unwrap();
        }

        let receiver = home.namespace.run(|| UdpSocket::bind((near, 5_000)).unwrap());
        receiver.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let sender = video.namespace.run(|| UdpSocket::bind((far, 0)).unwrap());
        sender.connect((near, 5_000)).unwrap();
        let began = Instant::now();
        // Every 2 ms a small packet and one or two large ones, 8 Mbit/s of those.
        let arrived = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut numbers = [0_u32; 2];
                let mut send = |is_small: bool| {
                    let mut payload = vec![0; if is_small { SMALL } else { LARGE }];
                    let number = &mut numbers[usize::from(is_small)];
                    payload[..4].copy_from_slice(&number.to_be_bytes());
                    payload[4..12].copy_from_slice(&(began.elapsed().as_nanos() as u64).to_be_bytes());
                    *number += 1;
                    sender.send(&payload).unwrap();
                };
                for round in 0..1_000 {
                    while began.elapsed() < Duration::from_millis(2) * round {
                        std::thread::sleep(Duration::from_micros(200));
                    }
                    send(false);
                    send(true);
                    if round % 3 == 0 {
                        send(false);
                    }
                }
            });
            let mut arrived = Vec::new();
            let mut buffer = [0; 2_000];
            while let Ok(length) = receiver.recv(&mut buffer) {
                let sent = u64::from_be_bytes(buffer[4..12].try_into().unwrap());
                arrived.push(Sent {
                    is_small: length == SMALL,
                    number: u32::from_be_bytes(buffer[..4].try_into().unwrap()),
                    latency: began.elapsed().saturating_sub(Duration::from_nanos(sent)),
                });
            }
            arrived
        });
        let of = |is_small| arrived.iter().filter(move |sent| sent.is_small == is_small);
        let median = |is_small| {
            let mut latencies: Vec<_> = of(is_small).map(|sent| sent.latency).collect();
            latencies.sort_unstable();
            latencies[latencies.len() / 2]
        };
        let (small, large) = (of(true).count(), of(false).count());
        println!("{small} small, {:?}; {large} large, {:?}", median(true), median(false));
        assert_eq!(small, 1_000, "all of the small ones arrive");
        assert!((700..1_150).contains(&large), "the large ones are shaped: {large} of 1,334");
        for is_small in [false, true] {
            let numbers: Vec<_> = of(is_small).map(|sent| sent.number).collect();
            assert!(numbers.is_sorted(), "small {is_small}: in the order they were sent");
        }
        assert!(median(true) * 5 < median(false), "the small ones don't wait behind the large ones");
    }
}
