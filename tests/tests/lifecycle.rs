//! The daemon comes and goes, is killed, is flooded with requests; what it granted is held to all the
//! while. Real traffic, real `qosd` and `qos`. Faults are in `faults.rs`. Needs root.

#![expect(clippy::unwrap_used, reason = "the helpers of a test end it where something is not as it must be")]

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use netlink_packet_core::{DefaultNla, NLM_F_ACK};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcMessage, TcOption};
use nix::sys::signal::Signal;
use qos_common::abi::{self, directed};
use qos_common::classify::{Direction, Rule};
use qos_common::compact::{Extra, Granule};
use qos_tests::api::Client;
use qos_tests::ask::{Brief, eventually, measure_undisturbed, undisturbed};
use qos_tests::capture::Capture;
use qos_tests::daemon::{Config, Daemon};
use qos_tests::kernel::{Kernel, Maps, detach_link, pinned_links, programs};
use qos_tests::netlink::{Netlink, TrafficControl, set_offloads};
use qos_tests::topology::{HOST_LINK, LAN, Topology, WAN, reach};
use qos_tests::traffic::{
    Flow, Latency, Measured, RunningUdp, TcpFlow, UdpFlow, charged_length, measure, watched,
};
use qos_userspace::domain::units::BitsPerSecond;
use qos_userspace::domain::{Allocation, AllocationId, Status};
use qos_userspace::manager::report::Counts;
use serde_json::{Value, json};

const WARM_UP: Duration = Duration::from_millis(1_000);
/// In which a rate is taken: a machine that stops for 60 ms takes 2 % of it from a shaped flow.
const WINDOW: Duration = Duration::from_secs(3);
const INTERVAL: Duration = Duration::from_millis(500);

fn mbit(mbit: u64) -> BitsPerSecond {
    BitsPerSecond(mbit * 1_000_000)
}

fn to(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

/// A gateway between `home`, on a line of `line`, and `video`, reconciled twice a second.
fn gateway(line: BitsPerSecond) -> (Topology, Daemon) {
    let net = Topology::pair().unwrap();
    let config =
        Config { more: format!("reconcile_interval = \"{}ms\"", INTERVAL.as_millis()), ..Config::default() };
    let daemon = Daemon::start(&net.gateway, &config).unwrap();
    register(&daemon, line);
    (net, daemon)
}

fn register(daemon: &Daemon, line: BitsPerSecond) {
    let rate = format!("{}bit", line.0);
    daemon
        .qos_line(&format!(
            "session add home --address 192.0.2.10 --address 2001:db8:1::10 --down {rate} --up {rate}"
        ))
        .unwrap();
    daemon
        .qos_line("provider add video --kind application --network 203.0.113.0/24 --network 2001:db8:2::/48")
        .unwrap();
}

/// UDP from `video` to `home`.
fn down(net: &Topology, port: u16, rate: BitsPerSecond, packet: u32) -> RunningUdp {
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    UdpFlow::new(to(video.v4(0), 0), to(home.v4(0), port), rate)
        .packet(packet)
        .start(&video.namespace, &home.namespace)
        .unwrap()
}

/// UDP from `home` to `video`.
fn up(net: &Topology, port: u16, rate: BitsPerSecond, packet: u32) -> RunningUdp {
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    UdpFlow::new(to(home.v4(0), 0), to(video.v4(0), port), rate)
        .packet(packet)
        .start(&home.namespace, &video.namespace)
        .unwrap()
}

fn within(measured: &Measured, expected: BitsPerSecond, tolerance: f64) -> bool {
    (measured.ratio_to(expected) - 1.0).abs() <= tolerance
}

fn link_index(net: &Topology, name: &str) -> u32 {
    Netlink::open(&net.gateway).unwrap().link(name).unwrap().index
}

fn list(daemon: &Daemon, what: &str) -> Vec<Allocation> {
    serde_json::from_value(daemon.qos_line(what).unwrap()["items"].clone()).unwrap()
}

/// Everything that the store knows, as the API tells it.
fn store(daemon: &Daemon) -> BTreeMap<&'static str, Value> {
    ["provider list", "app list", "session list", "profile list", "list"]
        .map(|verb| (verb, daemon.qos_line(verb).unwrap()))
        .into()
}

#[test]
fn an_expired_allocation_is_neither_held_nor_preferred_though_the_daemon_is_dead() {
    let (net, mut daemon) = gateway(mbit(10));
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    // Once nothing is preferred they share one queue, by chance.
    let start = |port, rate| {
        let flow =
            UdpFlow::new(to(video.v4(0), 0), to(home.v4(0), port), mbit(rate)).packet(1_000).scattered();
        flow.start(&video.namespace, &home.namespace).unwrap()
    };
    let (held, preferred, flood) = (start(5_000, 3), start(5_001, 4), start(5_002, 20));
    let limit = daemon
        .grant("--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5000' --max-down 1mbit --enforcement police --for 6s")
        .unwrap();
    let guarantee = daemon
        .grant("--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5001' --guaranteed-down 5mbit --priority 0 --for 6s")
        .unwrap();
    daemon.kill().unwrap();

    let flows: [&dyn Flow; 3] = [&held, &preferred, &flood];
    let before = measure(&flows, WARM_UP, Duration::from_millis(1_500)).unwrap();
    println!("before: {:?}", before.iter().map(Brief).collect::<Vec<_>>());
    // What is policed shares the rest of the line with the flood, and loses some of its million there.
    assert!(before[0].ratio_to(mbit(1)) < 1.03, "{:?}", Brief(&before[0]));
    assert_eq!(before[1].lost, 0, "{:?}", Brief(&before[1]));

    // Over the end.
    flood.set_rate(BitsPerSecond(0));
    let expires = limit.expires_at.unwrap();
    let mut began = SystemTime::now();
    let over = watched(&[&held], || {
        began = SystemTime::now();
        eventually(Duration::from_secs(10), "the end of the allocation", || {
            SystemTime::now() > SystemTime::from(expires) + Duration::from_millis(500)
        });
    })
    .unwrap()
    .remove(0);
    let bin = Duration::from_millis(20);
    let series = over.series(bin);
    let free = series.iter().rposition(|rate| *rate < BitsPerSecond(2_000_000)).map_or(0, |at| at + 1);
    let ended = began + bin * free as u32;
    let late = ended
        .duration_since(SystemTime::from(expires))
        .map_or_else(|early| -(early.duration().as_secs_f64()), |late| late.as_secs_f64());
    println!("no longer held {:.0} ms after the end", late * 1e3);
    assert!(late.abs() < 0.1, "{late} s; {series:?}");

    flood.set_rate(mbit(20));
    let after = measure(&flows, WARM_UP, Duration::from_millis(1_500)).unwrap();
    println!("after: {:?}", after.iter().map(Brief).collect::<Vec<_>>());
    assert!(
        after[0].achieved.0 > 1_060_000 || after[0].lost * 10 > after[0].sent,
        "held still: {:?}",
        Brief(&after[0])
    );
    // 27 Mbit/s share 10: nobody is preferred.
    assert!(after[1].lost * 3 > after[1].sent, "{:?}", Brief(&after[1]));
    let delay = |measured: &Measured| measured.latency.as_ref().map_or(Duration::MAX, Latency::p50);
    assert!(delay(&before[1]) < Duration::from_millis(2), "{:?}", Brief(&before[1]));
    assert!(delay(&after[1]) > Duration::from_millis(5), "one queue for all: {:?}", Brief(&after[1]));

    daemon.restart().unwrap();
    assert_eq!(list(&daemon, "list"), []);
    let mut ended = list(&daemon, "list --ended 5");
    ended.sort_by_key(|allocation| allocation.id);
    assert_eq!(ended.iter().map(|ended| ended.id).collect::<Vec<_>>(), [limit.id, guarantee.id]);
    for ended in ended {
        assert_eq!((ended.status, ended.reason.as_deref()), (Status::Unavailable, Some("expired")));
        assert!(ended.ended_at.is_some());
    }
    let kernel = Kernel::read(&daemon, &net.gateway).unwrap();
    assert!(kernel.maps.allocations.is_empty() && kernel.maps.rules.is_empty(), "{:?}", kernel.maps);
}

#[test]
fn limits_and_counts_hold_through_kill_and_restart_under_load() {
    const CYCLES: usize = 5;
    let (net, mut daemon) = gateway(mbit(200));
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    let police = daemon
        .grant("--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5000' --max-down 8mbit --enforcement police")
        .unwrap();
    let police_up = daemon
        .grant("--provider video --flow 'up udp from 192.0.2.10 to 203.0.113.0/24:5001' --max-up 4mbit --enforcement police")
        .unwrap();
    let shape = daemon
        .grant("--provider video --flow 'between 192.0.2.10:5002 and 203.0.113.0/24 tcp' --max-down 20mbit --max-up 20mbit")
        .unwrap();
    let guarantee = daemon
        .grant("--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5003' --guaranteed-down 5mbit --priority 0")
        .unwrap();

    // 214 bytes are charged: 10,000 packets a second.
    let offered = BitsPerSecond(10_000 * 214 * 8);
    assert_eq!(charged_length(200), 214);
    let policed = down(&net, 5_000, offered, 200);
    let policed_up = up(&net, 5_001, mbit(8), 200);
    let guaranteed = down(&net, 5_003, mbit(4), 600);
    let shaped = TcpFlow::new(to(video.v4(0), 0), to(home.v4(0), 5_002))
        .connections(2)
        .start(&video.namespace, &home.namespace)
        .unwrap();
    thread::sleep(WARM_UP);

    let before = Kernel::read(&daemon, &net.gateway).unwrap();
    let stats = daemon.statistics().unwrap();
    let flows: [&dyn Flow; 4] = [&policed, &policed_up, &shaped, &guaranteed];
    let mut dead = Duration::ZERO;
    let measured = watched(&flows, || {
        for cycle in 0..CYCLES {
            thread::sleep(Duration::from_millis(500));
            daemon.kill().unwrap();
            let killed = Instant::now();
            thread::sleep(Duration::from_millis(200));
            daemon.restart().unwrap();
            dead += killed.elapsed();
            assert!(daemon.status().unwrap().gateway.taken_over, "cycle {cycle}");
            // Nothing was repaired that was not broken.
            assert_eq!(daemon.status().unwrap().gateway.repairs, [], "cycle {cycle}");
        }
        thread::sleep(Duration::from_millis(500));
    })
    .unwrap();
    println!(
        "{CYCLES} restarts, {dead:?} without a daemon: {:#?}",
        measured.iter().map(Brief).collect::<Vec<_>>()
    );

    // A clock begun anew would let 25 ms at once. UDP's arrivals have the kernel's stamps; TCP's are
    // noted by a program that may have to wait for a CPU, and need longer windows.
    let short = (Duration::from_millis(250), 1.05);
    let long = (Duration::from_secs(1), 1.03);
    for (flow, limit, (window, tolerance)) in
        [(&measured[0], mbit(8), short), (&measured[1], mbit(4), short), (&measured[2], mbit(20), long)]
    {
        let series = flow.series(window);
        let worst = flow.peak(window, limit);
        println!("limit {limit}: largest of {} windows of {window:?} {worst}", series.len());
        assert!(worst.0 as f64 <= limit.0 as f64 * tolerance, "limit {limit}: {series:?}");
        assert!(within(flow, limit, 0.03), "limit {limit}: {:?}", Brief(flow));
    }
    assert_eq!(measured[3].lost, 0, "{:?}", Brief(&measured[3]));

    let after = Kernel::read(&daemon, &net.gateway).unwrap();
    assert_eq!(before.links, after.links, "links and programs are those of the beginning");
    assert_eq!(before, after);

    // Pausing gives all counters time to stand.
    for flow in [&policed, &policed_up, &guaranteed] {
        flow.set_rate(BitsPerSecond(0));
    }
    drop(shaped);
    thread::sleep(Duration::from_millis(300));
    let now = daemon.statistics().unwrap();
    let delta = |outcome: &str| now.outcomes[outcome] - stats.outcomes[outcome];
    println!(
        "outcomes: admitted {}, unclassified {}, stale mark {}, no metadata {}",
        delta("admitted"),
        delta("unclassified"),
        delta("stale_mark"),
        delta("lost_mark")
    );
    // A router or neighbour solicitation now and then is nobody's.
    assert!(delta("unclassified") <= 10, "unclassified: {}", delta("unclassified"));
    for outcome in ["stale_mark", "missing_entry", "lost_mark", "truncated", "malformed"] {
        assert_eq!(delta(outcome), 0, "{outcome}");
    }
    let counts = |id: AllocationId| now.allocations[&id];
    for (id, up, flow) in
        [(police.id, false, &policed), (police_up.id, true, &policed_up), (guarantee.id, false, &guaranteed)]
    {
        let counts = if up { counts(id).up } else { counts(id).down };
        let counted = counts.passed.packets + counts.dropped.packets;
        println!(
            "allocation {id}: {} sent, {counted} counted, {} dropped",
            flow.sent(),
            counts.dropped.packets
        );
        // The counters began with the allocation, before the flow, and were carried over every time.
        assert_eq!(counted, flow.sent(), "allocation {id}");
    }
    assert!(counts(shape.id).down.passed.packets > 0);

    // With nothing to charge, clocks stand where they were.
    let maps = Maps::of(&daemon);
    let slots = [police.slot, police_up.slot, shape.slot, guarantee.slot];
    let clocks = || {
        slots.map(|slot| {
            Direction::BOTH.map(|direction| maps.clocks(directed(u32::from(slot), direction)).unwrap())
        })
    };
    let stood = clocks();
    assert!(stood[0][1].maximum != 0 && stood[3][1].guaranteed != 0);
    daemon.kill().unwrap();
    daemon.restart().unwrap();
    assert_eq!(clocks(), stood);
}

#[test]
fn hundreds_of_grants_and_revokes_a_second_disturb_nobody() {
    /// Cycles a second at most, and how many of them.
    const PACE: f64 = 200.0;
    const PACED: u32 = 1_000;
    let (net, daemon) = gateway(mbit(200));
    daemon
        .grant("--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5000' --guaranteed-down 20mbit --max-down 20mbit")
        .unwrap();
    daemon
        .grant("--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5001' --max-down 10mbit --enforcement police")
        .unwrap();
    // Half of what is guaranteed: a sender that is late sends on in bursts.
    let steady = down(&net, 5_000, mbit(10), 1_000);
    let policed = down(&net, 5_001, mbit(20), 1_000);
    let flood = down(&net, 5_002, mbit(60), 1_500);
    thread::sleep(WARM_UP);
    let kernel = Kernel::read(&daemon, &net.gateway).unwrap();
    let known = store(&daemon);

    let mut client = Client::connect(&daemon.socket()).unwrap();
    let request = |port: u16| {
        json!({
            "provider": "video",
            "selectors": [format!("down udp from 203.0.113.0/24 to 192.0.2.10:{port}")],
            "level": {"guaranteed": {"down": "64kbit"}, "maximum": {"down": "1mbit"}},
        })
    };
    let mut grants = Vec::new();
    let mut revokes = Vec::new();
    // A few live at once, as in a real network.
    let mut live = std::collections::VecDeque::new();
    let mut cycle = |number: u32, live: &mut std::collections::VecDeque<u64>| {
        let began = Instant::now();
        let answer =
            client.ask("POST", "/v1/allocations", Some(&request(10_000 + (number % 10_000) as u16))).unwrap();
        grants.push(began.elapsed());
        assert_eq!(answer.status, 201, "{answer:?}");
        live.push_back(answer.body["result"]["id"].as_u64().unwrap());
        if live.len() > 20 {
            let began = Instant::now();
            let id = live.pop_front().unwrap();
            let answer = client.ask("DELETE", &format!("/v1/allocations/{id}"), None).unwrap();
            revokes.push(began.elapsed());
            assert_eq!(answer.status, 200, "{answer:?}");
        }
    };

    let flows: [&dyn Flow; 3] = [&steady, &policed, &flood];
    let mut reached = 0.0;
    let measured = watched(&flows, || {
        let began = Instant::now();
        for number in 0..PACED {
            cycle(number, &mut live);
            let next = began + Duration::from_secs_f64(f64::from(number + 1) / PACE);
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        reached = f64::from(PACED) / began.elapsed().as_secs_f64();
    })
    .unwrap();
    for flow in &measured {
        println!("{:?}", Brief(flow));
    }
    let began = Instant::now();
    let mut more = 0;
    while began.elapsed() < Duration::from_secs(2) {
        cycle(PACED + more, &mut live);
        more += 1;
    }
    let fastest = f64::from(more) / began.elapsed().as_secs_f64();
    for id in live {
        assert_eq!(client.ask("DELETE", &format!("/v1/allocations/{id}"), None).unwrap().status, 200);
    }
    for (what, mut times) in [("grant", grants), ("revoke", revokes)] {
        times.sort_unstable();
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
        println!("{what}: {} of them, p50 {:?}, p99 {:?}, max {:?}", times.len(), at(0.5), at(0.99), at(1.0));
    }
    println!("{reached:.0} grants and as many revokes a second of {PACE} asked; {fastest:.0} unpaced");
    assert_eq!(measured[0].lost, 0, "{:?}", Brief(&measured[0]));
    assert!(within(&measured[0], measured[0].offered, 0.01), "{:?}", Brief(&measured[0]));
    assert!(within(&measured[1], mbit(10), 0.03), "{:?}", Brief(&measured[1]));

    drop((steady, policed, flood));
    // The last class drains within a reconciliation or two.
    eventually(Duration::from_secs(5), "classes and maps are as before", || {
        Kernel::read(&daemon, &net.gateway).unwrap() == kernel
    });
    assert_eq!(store(&daemon), known);
    assert_eq!(daemon.status().unwrap().gateway.repairs, []);
}

#[test]
fn two_hundred_allocations_come_back_with_their_numbers_and_slots() {
    let (net, mut daemon) = gateway(mbit(500));
    let mut client = Client::connect(&daemon.socket()).unwrap();
    let mut grant = |port: u16| {
        let request = json!({
            "provider": "video",
            "selectors": [format!("down udp from 203.0.113.0/24 to 192.0.2.10:{port}"),
                          format!("up udp from 192.0.2.10 to 203.0.113.0/24:{port}")],
            "level": {"guaranteed": {"down": "1mbit"}, "maximum": {"down": "2mbit", "up": "1mbit"}},
            "duration": if port.is_multiple_of(2) { json!("1h") } else { Value::Null },
        });
        let answer = client.ask("POST", "/v1/allocations", Some(&request)).unwrap();
        assert_eq!(answer.status, 201, "{answer:?}");
        answer.body["result"]["id"].as_u64().unwrap()
    };
    let ids: Vec<u64> = (0..210).map(|number| grant(5_000 + number)).collect();
    for id in ids.iter().skip(3).step_by(21) {
        daemon.revoke(AllocationId(*id)).unwrap();
    }
    eventually(Duration::from_secs(5), "revoked classes are gone", || {
        let kernel = Kernel::read(&daemon, &net.gateway).unwrap();
        kernel.classes.iter().filter(|class| class.handle & 0xffff >= 0x4000).count() == 400
    });
    let (known, ended) = (store(&daemon), list(&daemon, "list --ended 50"));
    assert_eq!((known["list"]["items"].as_array().unwrap().len(), ended.len()), (200, 10));
    let kernel = Kernel::read(&daemon, &net.gateway).unwrap();

    for kill in [true, false] {
        if kill {
            daemon.kill().unwrap();
        } else {
            daemon.terminate().unwrap();
        }
        let began = Instant::now();
        daemon.restart().unwrap();
        println!("200 allocations are back after {:?}", began.elapsed());
        assert_eq!(store(&daemon), known);
        assert_eq!(list(&daemon, "list --ended 50"), ended);
        let after = Kernel::read(&daemon, &net.gateway).unwrap();
        // Ends are computed from the wall clock: the same within its jitter.
        let without_ends = |mut kernel: Kernel| {
            kernel.maps.allocations.values_mut().for_each(|record| record.expires_ns = 0);
            kernel.without_programs()
        };
        for (slot, record) in &kernel.maps.allocations {
            let moved = record.expires_ns.abs_diff(after.maps.allocations[slot].expires_ns);
            assert!(moved < 50_000_000, "slot {slot}: the end moved by {moved} ns");
        }
        let differences = without_ends(kernel.clone()).differences(&without_ends(after));
        assert_eq!(differences, [""; 0]);
        assert_eq!(daemon.status().unwrap().gateway.repairs, []);
    }

    // The next one takes a fresh slot, not one of those just freed, and a fresh number.
    let next = daemon
        .grant("--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:4000' --max-down 1mbit")
        .unwrap();
    assert_eq!((next.id, next.slot), (AllocationId(211), 211));
}

#[test]
fn a_revoked_class_drains_and_others_lose_nothing() {
    let (net, daemon) = gateway(mbit(100));
    let slow = daemon
        .grant("--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5000' --max-down 1mbit")
        .unwrap();
    let other = daemon
        .grant("--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5001' --guaranteed-down 10mbit")
        .unwrap();
    let slow_flow = down(&net, 5_000, mbit(3), 500);
    let other_flow = down(&net, 5_001, mbit(9), 1_000);
    thread::sleep(WARM_UP);
    let class = 0x5150_4000 + u32::from(slow.class.unwrap());
    let has_class = || {
        let index = link_index(&net, LAN);
        let classes = Netlink::open(&net.gateway).unwrap().classes(index).unwrap();
        classes.iter().any(|found| found.handle == class)
    };
    assert!(has_class());
    let mut counts = Counts::default();
    let measured = watched(&[&other_flow, &slow_flow], || {
        thread::sleep(Duration::from_millis(500));
        slow_flow.set_rate(BitsPerSecond(0));
        thread::sleep(Duration::from_millis(60));
        counts = daemon.counts(slow.id).unwrap().down;
        // Offered again right before, so that packets wait when it goes.
        slow_flow.set_rate(mbit(3));
        thread::sleep(Duration::from_millis(100));
        daemon.revoke(slow.id).unwrap();
        let gone = eventually(Duration::from_secs(3), "the class is gone", || !has_class());
        println!("the class was gone {gone:?} after `qos revoke`");
        assert!(gone > Duration::ZERO);
        thread::sleep(Duration::from_millis(200));
        slow_flow.set_rate(BitsPerSecond(0));
        thread::sleep(Duration::from_millis(200));
    })
    .unwrap();
    println!("other and slow: {:?}", measured.iter().map(Brief).collect::<Vec<_>>());
    assert!(counts.queue_dropped_packets + counts.dropped.packets > 0, "it never queued: {counts:?}");
    assert_eq!(measured[0].lost, 0);
    assert_eq!(daemon.counts(other.id).unwrap().down.queue_dropped_packets, 0);
    // Free of its limit it runs at what is offered.
    slow_flow.set_rate(mbit(3));
    let free = undisturbed(&slow_flow, WARM_UP, WINDOW).unwrap();
    assert_eq!(free.lost, 0, "{:?}", Brief(&free));
    assert_eq!(daemon.status().unwrap().gateway.repairs, []);
}

#[test]
fn what_waits_in_a_revoked_class_arrives() {
    let (net, daemon) = gateway(mbit(100));
    let flow = down(&net, 5_000, BitsPerSecond(0), 1_500);
    for round in 0..5 {
        let slow = daemon
            .grant(
                "--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5000' --max-down 2mbit",
            )
            .unwrap();
        let mut counts = Counts::default();
        let measured = watched(&[&flow], || {
            flow.set_rate(mbit(4));
            thread::sleep(Duration::from_millis(300));
            flow.set_rate(BitsPerSecond(0));
            // At once: what is queued now is a few tens of milliseconds.
            counts = daemon.counts(slow.id).unwrap().down;
            daemon.revoke(slow.id).unwrap();
            thread::sleep(Duration::from_millis(700));
        })
        .unwrap()
        .remove(0);
        let dropped = counts.dropped.packets + counts.queue_dropped_packets;
        println!("round {round}: {:?}, {dropped} dropped before the revoke", Brief(&measured));
        // A burst may still have been on its way between the count and the end.
        assert!(measured.lost <= dropped + 20, "round {round}: {} lost, {dropped} dropped", measured.lost);
    }
}

#[test]
fn detach_leaves_the_namespace_as_it_was_found() {
    let net = Topology::pair().unwrap();
    let found = |net: &Topology| {
        let mut netlink = Netlink::open(&net.gateway).unwrap();
        let classes: Vec<_> = [LAN, WAN]
            .iter()
            .flat_map(|name| {
                let index = netlink.link(name).unwrap().index;
                netlink.classes(index).unwrap()
            })
            .collect();
        let links: Vec<_> = netlink
            .links()
            .unwrap()
            .into_iter()
            .map(|link| (link.index, link.name, link.mtu, link.up, link.xdp))
            .collect();
        let attached = [LAN, WAN].map(|name| programs(&net.gateway, name).unwrap());
        (netlink.qdiscs().unwrap(), classes, links, attached)
    };
    let flow = down(&net, 5_000, mbit(5), 1_000);
    let before = found(&net);
    for dead in [false, true] {
        let mut daemon = Daemon::start(&net.gateway, &Config::default()).unwrap();
        if !dead {
            register(&daemon, mbit(100));
            daemon
                .grant("--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5000' --max-down 1mbit --guaranteed-down 500kbit")
                .unwrap();
        } else {
            register(&daemon, mbit(50));
            daemon
                .grant("--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5000' --max-down 1mbit")
                .unwrap();
        }
        let held = undisturbed(&flow, WARM_UP, WINDOW).unwrap();
        assert!(within(&held, mbit(1), 0.06), "{:?}", Brief(&held));
        assert_ne!(found(&net), before);

        if dead {
            daemon.kill().unwrap();
            let config = daemon.config_path();
            daemon
                .qos(["detach".as_ref(), "--yes".as_ref(), "--config".as_ref(), config.as_os_str()])
                .unwrap();
        } else {
            let asked = daemon.qos_output(["detach"]).unwrap();
            assert_eq!(asked.status.code(), Some(2), "nobody to ask");
            assert!(String::from_utf8_lossy(&asked.stderr).contains("--yes"));
            daemon.qos(["detach", "--yes"]).unwrap();
            assert!(daemon.wait(Duration::from_secs(5)).unwrap().success());
        }
        assert_eq!(found(&net), before, "dead: {dead}");
        assert!(!daemon.bpffs_dir().exists(), "pins are left");
        assert!(dead || !daemon.socket().exists(), "the socket is left");
        let free = undisturbed(&flow, WARM_UP, Duration::from_secs(1)).unwrap();
        assert_eq!(free.lost, 0, "{:?}", Brief(&free));

        // What was granted comes back with the next start, and only then.
        daemon.restart().unwrap();
        assert!(!daemon.status().unwrap().gateway.taken_over);
        let held = undisturbed(&flow, WARM_UP, WINDOW).unwrap();
        assert!(within(&held, mbit(1), 0.06), "{:?}", Brief(&held));
        daemon.qos(["detach", "--yes"]).unwrap();
        daemon.wait(Duration::from_secs(5)).unwrap();
        assert_eq!(found(&net), before);
    }
}

/// A firewall may write the whole mark, an operator's filter may end before ours: what XDP has charged
/// is then classified again, gets its class and code point, and is not charged twice.
#[test]
fn a_packet_whose_mark_is_lost_is_charged_once() {
    let net = Topology::pair().unwrap();
    let more = "reconcile_interval = \"1h\"".to_owned();
    let daemon = Daemon::start(&net.gateway, &Config { more, ..Config::default() }).unwrap();
    register(&daemon, mbit(10));
    let id = daemon
        .grant("--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5000' --guaranteed-down 1mbit --max-down 2mbit --enforcement police --dscp EF")
        .unwrap()
        .id;
    let index = link_index(&net, WAN);
    detach_link(&daemon.bpffs_dir().join(format!("links/{index}_ingress"))).unwrap();
    let (policed, rest) = (down(&net, 5_000, mbit(4), 1_000), down(&net, 5_001, mbit(20), 1_000));
    let capture = Capture::open(&net.subscriber("home").namespace, HOST_LINK).unwrap();
    let before = daemon.counts(id).unwrap().down;
    let measured =
        measure_undisturbed(&[(&policed, mbit(4)), (&rest, mbit(20))], WARM_UP, Duration::from_secs(2))
            .unwrap();
    let after = daemon.counts(id).unwrap().down;
    println!("{:?}; {:?}", Brief(&measured[0]), Brief(&measured[1]));
    // The line is full of the rest, so that only a class of its own lets it through.
    assert!(within(&measured[0], mbit(2), 0.03), "{:?}", Brief(&measured[0]));
    assert!(within(&measured[1], mbit(8), 0.03), "{:?}", Brief(&measured[1]));
    assert!(after.marked.packets > before.marked.packets, "{after:?}");
    let frame = capture
        .find(Duration::from_secs(1), |frame| frame.ports().is_some_and(|ports| ports.1 == 5_000))
        .unwrap()
        .expect("captured");
    assert_eq!(frame.dscp(), Some(46));
    let lost = daemon.statistics().unwrap().outcomes["lost_mark"];
    assert!(lost > 1_000, "{lost}");
}

/// Whether the daemon is told of it at its next start, or is dead and `qos detach` finds it.
#[test]
fn an_interface_that_leaves_the_configuration_is_left_alone() {
    const EXTRA: &str = "lan1";
    let net = Topology::pair().unwrap();
    let mut netlink = Netlink::open(&net.gateway).unwrap();
    netlink.add_veth(EXTRA, "lan1-peer", &net.subscriber("home").namespace, 1_500).unwrap();
    let extra = netlink.link(EXTRA).unwrap().index;
    netlink.set_up(extra).unwrap();
    let on_extra = || {
        let mut netlink = Netlink::open(&net.gateway).unwrap();
        let qdiscs: Vec<_> = netlink
            .qdiscs()
            .unwrap()
            .into_iter()
            .filter(|qdisc| qdisc.index == extra.cast_signed())
            .collect();
        (qdiscs, netlink.classes(extra).unwrap(), programs(&net.gateway, EXTRA).unwrap())
    };
    let bare = on_extra();
    for dead in [false, true] {
        let mut daemon = Daemon::start(&net.gateway, &Config::default()).unwrap();
        register(&daemon, mbit(100));
        daemon
            .grant(
                "--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5000' --max-down 1mbit",
            )
            .unwrap();
        let without = fs::read_to_string(daemon.config_path()).unwrap();
        let with =
            format!("{without}\n[[interface]]\nname = {EXTRA:?}\nrole = \"lan\"\ncapacity = \"1gbit\"\n");
        daemon.terminate().unwrap();
        fs::write(daemon.config_path(), with).unwrap();
        daemon.restart().unwrap();
        let held = on_extra();
        assert!(held.2.0.is_some() && !held.2.1.is_empty() && held.1.len() >= 5, "{held:?}");

        daemon.kill().unwrap();
        fs::write(daemon.config_path(), without).unwrap();
        if dead {
            let config = daemon.config_path();
            daemon
                .qos(["detach".as_ref(), "--yes".as_ref(), "--config".as_ref(), config.as_os_str()])
                .unwrap();
        } else {
            daemon.restart().unwrap();
            let flow = down(&net, 5_000, mbit(3), 1_000);
            let held = undisturbed(&flow, WARM_UP, WINDOW).unwrap();
            assert!(within(&held, mbit(1), 0.06), "the others go on: {:?}", Brief(&held));
        }
        assert_eq!(on_extra(), bare, "dead: {dead}");
        if !dead {
            daemon.qos(["detach", "--yes"]).unwrap();
            assert!(daemon.wait(Duration::from_secs(5)).unwrap().success());
        }
    }
}

#[test]
fn detach_without_a_daemon_does_not_touch_a_living_one() {
    let (net, daemon) = gateway(mbit(100));
    let kernel = Kernel::read(&daemon, &net.gateway).unwrap();
    let config = daemon.config_path();
    let mut command = std::process::Command::new(daemon.binaries().join("qos"));
    command.args(["--socket", "/nonexistent/qosd.sock", "detach", "--yes", "--config"]).arg(config);
    let output = net.gateway.output(command).unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains(&format!("another qosd (pid {}) ", daemon.id().unwrap())), "{text}");
    assert_eq!(Kernel::read(&daemon, &net.gateway).unwrap(), kernel);
}

/// A way to break what is in the kernel, and what the status must say of it.
struct Break {
    name: &'static str,
    told: &'static str,
    act: fn(&Topology, &Daemon, &Allocation),
}

const BREAKS: &[Break] = &[
    Break {
        name: "a class is deleted",
        told: "was missing",
        act: |net, _, allocation| {
            delete_class(net, LAN, 0x5150_4000 + u32::from(allocation.class.unwrap()));
        },
    },
    Break {
        name: "a class is changed",
        told: "instead of",
        act: |net, _, allocation| {
            change_class(net, LAN, 0x5150_4000 + u32::from(allocation.class.unwrap()), mbit(50));
        },
    },
    Break {
        name: "the root qdisc is deleted",
        told: "root qdisc 5150: was missing",
        act: |net, _, _| {
            Netlink::open(&net.gateway).unwrap().delete_root(link_index(net, LAN)).unwrap();
        },
    },
    Break {
        name: "an allocation's record is changed",
        told: "map allocations, slot",
        act: |_, daemon, allocation| {
            let index = directed(u32::from(allocation.slot), Direction::Downstream);
            let map = Maps::of(daemon).shared::<abi::Allocation>("allocations").unwrap();
            let found = map.read(index);
            map.write(index, abi::Allocation { flags: 0, ..found });
        },
    },
    Break {
        name: "a rule is changed",
        told: "differed from the rule in force",
        act: |_, daemon, _| {
            let map = Maps::of(daemon).shared::<Granule>("rules").unwrap();
            for index in 0..map.length() {
                let found = map.read(index);
                if found != Granule::default() {
                    let rule = Granule::rule([found; 2], 1, 0, Extra::default());
                    map.write(index, Granule::of(&Rule { destination_ports: [1, 1], ..rule }, 0, true)[0]);
                }
            }
        },
    },
    Break {
        name: "the tables of rules are cleared",
        told: "differed from the rules in force",
        act: |_, daemon, _| {
            let map = Maps::of(daemon).shared("tables").unwrap();
            for index in 0..map.length() {
                map.write(index, qos_common::classify::TableSet::EMPTY);
            }
        },
    },
    Break {
        name: "an XDP link is detached",
        told: "xdp had lost our program",
        act: |net, daemon, _| {
            let index = link_index(net, WAN);
            detach_link(&daemon.bpffs_dir().join(format!("links/{index}_xdp_native"))).unwrap();
        },
    },
    Break {
        name: "both tcx links are detached",
        told: "tc ingress, tc egress had lost our program",
        act: |net, daemon, _| {
            let index = link_index(net, LAN);
            for hook in ["ingress", "egress"] {
                detach_link(&daemon.bpffs_dir().join(format!("links/{index}_{hook}"))).unwrap();
            }
        },
    },
    Break {
        name: "a link's pin is removed",
        told: "xdp had lost our program",
        act: |net, daemon, _| {
            let index = link_index(net, WAN);
            fs::remove_file(daemon.bpffs_dir().join(format!("links/{index}_xdp_native"))).unwrap();
        },
    },
    Break {
        name: "all pins are removed",
        told: "was not pinned",
        act: |_, daemon, _| fs::remove_dir_all(daemon.bpffs_dir()).unwrap(),
    },
];

/// Each break, first with the daemon that attached everything, then with one that took it over.
#[test]
fn drift_is_repaired_and_told() {
    let (net, mut daemon) = gateway(mbit(100));
    let allocation = daemon
        .grant("--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5000' --max-down 2mbit --guaranteed-down 1mbit")
        .unwrap();
    let flow = down(&net, 5_000, mbit(6), 1_000);
    thread::sleep(WARM_UP);
    for taken_over in [false, true] {
        if taken_over {
            daemon.kill().unwrap();
            daemon.restart().unwrap();
        }
        let whole = Kernel::read(&daemon, &net.gateway).unwrap();
        for Break { name, told, act } in BREAKS {
            let repairs = daemon.status().unwrap().gateway.repairs.len();
            act(&net, &daemon, &allocation);
            let mut new = Vec::new();
            let took = eventually(2 * INTERVAL + Duration::from_millis(500), name, || {
                let status = daemon.status().unwrap();
                assert_eq!(status.reconcile_error, None, "{name}");
                new = status.gateway.repairs[repairs..].iter().map(|repair| repair.what.clone()).collect();
                new.iter().any(|what| what.contains(told))
            });
            println!("{name}: after {took:?}: {}", new.join("; "));
            let repaired = Kernel::read(&daemon, &net.gateway).unwrap();
            assert_eq!(
                (&repaired.maps, &repaired.classes, &repaired.qdiscs),
                (&whole.maps, &whole.classes, &whole.qdiscs),
                "{name}"
            );
            assert_eq!(
                repaired.links.keys().collect::<Vec<_>>(),
                whole.links.keys().collect::<Vec<_>>(),
                "{name}"
            );
            let held = undisturbed(&flow, Duration::from_millis(400), Duration::from_millis(800)).unwrap();
            assert!(within(&held, mbit(2), 0.06), "{name}: {:?}", Brief(&held));
            let after: Vec<_> = daemon.status().unwrap().gateway.repairs;
            assert!(after.len() <= repairs + new.len(), "{name} is repaired once: {after:?}");
        }
    }
}

#[test]
fn a_foreign_root_qdisc_is_told_and_left_alone_and_the_maximum_holds_without_it() {
    let (net, daemon) = gateway(mbit(100));
    daemon
        .grant("--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5000' --max-down 2mbit")
        .unwrap();
    let flow = down(&net, 5_000, mbit(6), 1_000);
    thread::sleep(WARM_UP);
    let whole = Kernel::read(&daemon, &net.gateway).unwrap();
    let mut netlink = Netlink::open(&net.gateway).unwrap();
    let lan = link_index(&net, LAN);
    netlink.put_token_bucket(lan, mbit(1_000), 1_000_000, 100_000).unwrap();
    eventually(Duration::from_secs(3), "the foreign root is told", || {
        daemon.status().unwrap().reconcile_error.is_some_and(|error| {
            error.contains("lan0: the root queueing discipline is tbf") && error.contains("not ours")
        })
    });
    let held = undisturbed(&flow, WARM_UP, WINDOW).unwrap();
    println!("under a foreign root: {:?}", Brief(&held));
    assert!(within(&held, mbit(2), 0.06), "{:?}", Brief(&held));

    netlink.delete_root(lan).unwrap();
    eventually(Duration::from_secs(3), "the tree is back", || {
        daemon.status().unwrap().reconcile_error.is_none()
            && Kernel::read(&daemon, &net.gateway).unwrap() == whole
    });
    let repairs = daemon.status().unwrap().gateway.repairs;
    assert!(repairs.iter().any(|repair| repair.what.contains("root qdisc 5150: was missing")), "{repairs:?}");
}

#[test]
fn an_interface_that_goes_and_comes_back_is_attached_again() {
    let (net, mut daemon) = gateway(mbit(100));
    let kept = daemon
        .grant("--provider video --flow 'up udp from 192.0.2.10 to 203.0.113.0/24:5000' --max-up 2mbit --guaranteed-up 1mbit")
        .unwrap();
    let flow = up(&net, 5_000, mbit(6), 1_000);
    let held = undisturbed(&flow, WARM_UP, WINDOW).unwrap();
    assert!(within(&held, mbit(2), 0.06), "{:?}", Brief(&held));
    drop(flow);
    let grant_and_revoke = |daemon: &Daemon| {
        let flow = "down udp from 203.0.113.0/24 to 192.0.2.10:5009";
        let id = daemon.grant(&format!("--provider video --flow '{flow}' --max-down 2mbit")).unwrap().id;
        daemon.revoke(id).unwrap();
    };
    // The first class of an allocation divides a line for good.
    grant_and_revoke(&daemon);
    let whole = Kernel::read(&daemon, &net.gateway).unwrap();

    for dead in [false, true] {
        let old = link_index(&net, WAN);
        if dead {
            daemon.kill().unwrap();
        }
        cut_wan(&net);
        if !dead {
            eventually(Duration::from_secs(3), "the loss is told", || {
                let status = daemon.status().unwrap();
                status.gateway.interfaces.iter().any(|link| link.name == WAN && link.index.is_none())
                    && status.gateway.repairs.iter().any(|repair| repair.what == "interface wan0 has gone")
            });
            assert!(
                pinned_links(daemon.bpffs_dir())
                    .unwrap()
                    .keys()
                    .all(|pin| !pin.starts_with(&format!("{old}_")))
            );
            // Grants go on meanwhile, on what is there.
            grant_and_revoke(&daemon);
        }
        mend_wan(&net);
        if dead {
            daemon.restart().unwrap();
        } else {
            eventually(Duration::from_secs(3), "the return is told", || {
                let repairs = daemon.status().unwrap().gateway.repairs;
                repairs.iter().any(|repair| repair.what.starts_with("interface wan0 appeared as number "))
            });
        }
        let new = link_index(&net, WAN);
        assert_ne!(old, new);
        let now = Kernel::read(&daemon, &net.gateway).unwrap();
        let shape = |kernel: &Kernel| {
            kernel
                .classes
                .iter()
                .map(|class| (class.handle, class.parent, class.options.clone()))
                .collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(shape(&now), shape(&whole));
        assert_eq!(now.maps, whole.maps);
        assert_eq!(now.links.len(), 6, "{:?}", now.links);
        let flow = up(&net, 5_000, mbit(6), 1_000);
        let held = undisturbed(&flow, WARM_UP, WINDOW).unwrap();
        assert!(within(&held, mbit(2), 0.06), "dead: {dead}: {:?}", Brief(&held));
        assert_eq!(list(&daemon, "list").iter().map(|found| found.id).collect::<Vec<_>>(), [kept.id]);
    }
}

#[test]
fn a_signal_stops_the_daemon_and_not_what_it_enforces() {
    let (net, mut daemon) = gateway(mbit(100));
    daemon
        .grant("--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5000' --max-down 2mbit")
        .unwrap();
    let flow = down(&net, 5_000, mbit(6), 1_000);
    for (signal, name) in [(Signal::SIGTERM, "SIGTERM"), (Signal::SIGINT, "SIGINT")] {
        daemon.signal(signal).unwrap();
        let began = Instant::now();
        assert!(daemon.wait(Duration::from_secs(5)).unwrap().success());
        println!("{name}: ended after {:?}", began.elapsed());
        assert!(began.elapsed() < Duration::from_secs(2));
        let log = daemon.log_tail();
        assert!(
            log.contains(&format!("{name}: stopping; the programs in the kernel go on enforcing")),
            "{log}"
        );
        assert!(!daemon.socket().exists());
        let held = undisturbed(&flow, WARM_UP, WINDOW).unwrap();
        assert!(within(&held, mbit(2), 0.06), "{:?}", Brief(&held));
        let refused = daemon.qos_output(["status"]).unwrap();
        assert_eq!(refused.status.code(), Some(3));
        assert!(String::from_utf8_lossy(&refused.stderr).contains("cannot reach qosd on "));
        daemon.restart().unwrap();
        assert!(daemon.status().unwrap().gateway.taken_over);
    }

    // A request that never ends holds the daemon up for a while, unless it is told twice.
    for again in [Signal::SIGTERM, Signal::SIGINT] {
        let mut half = Client::connect(&daemon.socket()).unwrap();
        half.begin("POST", "/v1/allocations", 100, b"{").unwrap();
        thread::sleep(Duration::from_millis(200));
        daemon.signal(Signal::SIGTERM).unwrap();
        thread::sleep(Duration::from_millis(500));
        assert!(daemon.is_running().unwrap(), "it waits for the rest");
        daemon.signal(again).unwrap();
        let began = Instant::now();
        assert!(daemon.wait(Duration::from_secs(5)).unwrap().success());
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        let log = daemon.log_tail();
        assert!(log.contains("again: ending at once"), "{log}");
        let held = undisturbed(&flow, Duration::from_millis(300), WINDOW).unwrap();
        assert!(within(&held, mbit(2), 0.06), "{:?}", Brief(&held));
        daemon.restart().unwrap();
    }
    let log = daemon.log_tail();
    assert!(log.contains("qosd is ready"), "{log}");
}

/// Deletes the link to the providers.
fn cut_wan(net: &Topology) {
    let index = link_index(net, WAN);
    Netlink::open(&net.gateway).unwrap().delete_link(index).unwrap();
}

/// Makes it anew, as [`Topology::pair`] had it for IPv4.
fn mend_wan(net: &Topology) {
    let video = &net.provider("video").namespace;
    let mut inside = Netlink::open(&net.gateway).unwrap();
    inside.add_veth(WAN, HOST_LINK, video, 1_500).unwrap();
    set_offloads(video, HOST_LINK, false).unwrap();
    let index = inside.link(WAN).unwrap().index;
    inside.set_up(index).unwrap();
    inside.add_address(index, "203.0.113.1/24".parse().unwrap()).unwrap();
    let mut outside = Netlink::open(video).unwrap();
    let index = outside.link(HOST_LINK).unwrap().index;
    outside.set_up(index).unwrap();
    outside.add_address(index, "203.0.113.10/32".parse().unwrap()).unwrap();
    let gateway = "203.0.113.1".parse().unwrap();
    outside.add_route("0.0.0.0/0".parse().unwrap(), Some(gateway), index).unwrap();
    let home = net.subscriber("home");
    reach(&home.namespace, video, net.provider("video").v4(0).into()).unwrap();
}

fn class_message(net: &Topology, link: &str, handle: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = link_index(net, link).cast_signed();
    message.header.handle = handle.into();
    message
}

fn delete_class(net: &Topology, link: &str, handle: u32) {
    let mut netlink = Netlink::open(&net.gateway).unwrap();
    netlink
        .request(RouteNetlinkMessage::DelTrafficClass(class_message(net, link, handle)), NLM_F_ACK)
        .unwrap();
}

/// Gives a class another ceiling, as `tc class change` would.
fn change_class(net: &Topology, link: &str, handle: u32, rate: BitsPerSecond) {
    // linux/pkt_sched.h: TCA_HTB_PARMS, struct tc_htb_opt {rate, ceil, buffer, cbuffer, quantum, level, prio}.
    const PARMS: u16 = 1;
    let mut netlink = Netlink::open(&net.gateway).unwrap();
    let index = link_index(net, link);
    let found: TrafficControl =
        netlink.classes(index).unwrap().into_iter().find(|class| class.handle == handle).unwrap();
    let mut parms = found.options;
    // Attributes of the class follow one another; the parameters are the first of 44 bytes and kind 1.
    let at = parms.windows(4).position(|head| head == [48, 0, 1, 0]).expect("TCA_HTB_PARMS");
    parms = parms[at + 4..at + 48].to_vec();
    parms[20..24].copy_from_slice(&u32::try_from(rate.0 / 8).unwrap().to_ne_bytes());
    let mut message = class_message(net, link, handle);
    message.header.parent = found.parent.into();
    message.attributes = vec![
        TcAttribute::Kind("htb".to_owned()),
        TcAttribute::Options(vec![TcOption::Other(DefaultNla::new(PARMS, parms))]),
    ];
    netlink.request(RouteNetlinkMessage::NewTrafficClass(message), NLM_F_ACK).unwrap();
}
