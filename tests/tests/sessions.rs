//! Lines that change, go, and come back, and what becomes of the packets of what was granted on them. Needs
//! root.
#![expect(clippy::unwrap_used, reason = "a test and what it calls fail by panicking")]

use std::thread;
use std::time::{Duration, Instant};

use qos_tests::ask::{Brief, eventually, undisturbed};
use qos_tests::daemon::{Config, Daemon};
use qos_tests::kernel::Kernel;
use qos_tests::topology::Topology;
use qos_tests::traffic::{RunningUdp, UdpFlow};
use qos_userspace::domain::{AllocationId, BitsPerSecond};
use serde_json::Value;

const WARM_UP: Duration = Duration::from_millis(700);
const WINDOW: Duration = Duration::from_secs(2);

const fn mbit(mbit: u64) -> BitsPerSecond {
    BitsPerSecond(mbit * 1_000_000)
}

/// A subscriber with two addresses, of which the line has the first.
fn started(more: &str) -> (Topology, Daemon) {
    let net = Topology::builder()
        .subscriber("home", &["192.0.2.10", "192.0.2.77"])
        .provider("video", &["203.0.113.10"])
        .build()
        .unwrap();
    let more = format!("reconcile_interval = \"1h\"\n{more}");
    let daemon = Daemon::start(&net.gateway, &Config { more, ..Config::default() }).unwrap();
    daemon.qos_line("session add home --address 192.0.2.10 --down 50mbit --up 50mbit").unwrap();
    daemon.qos_line("provider add video --kind application --network 203.0.113.0/24").unwrap();
    (net, daemon)
}

/// A flow down to one of the subscriber's addresses.
fn flow(net: &Topology, address: usize, port: u16, rate: BitsPerSecond) -> RunningUdp {
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    let ends = ((video.v4(0), 0), (home.v4(address), port));
    UdpFlow::new(ends.0, ends.1, rate).start(&video.namespace, &home.namespace).unwrap()
}

fn achieves(flow: &RunningUdp, due: BitsPerSecond, what: &str) {
    let measured = undisturbed(flow, WARM_UP, WINDOW).unwrap();
    assert!((measured.ratio_to(due) - 1.0).abs() < 0.04, "{what}: {:?}", Brief(&measured));
}

fn grant(daemon: &Daemon, port: u16, level: &str) -> AllocationId {
    let flow = format!("down udp from 203.0.113.0/24 to 192.0.2.10:{port}");
    daemon.grant(&format!("--provider video --flow '{flow}' {level}")).unwrap().id
}

/// Nothing in the kernel is other than the state says.
fn agrees(daemon: &Daemon) {
    let answer = daemon.qos_line("reconcile").unwrap();
    assert_eq!(answer["items"], Value::Array(Vec::new()), "repaired");
}

fn warnings(answer: &Value) -> Vec<String> {
    answer["warnings"].as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

#[test]
fn what_is_granted_follows_its_line_to_another_address() {
    let (net, daemon) = started("");
    let policed = grant(&daemon, 5_000, "--max-down 4mbit --enforcement police");
    grant(&daemon, 5_001, "--guaranteed-down 6mbit --max-down 8mbit");
    let flows = [
        flow(&net, 0, 5_000, mbit(10)),
        flow(&net, 0, 5_001, mbit(10)),
        flow(&net, 1, 5_000, mbit(10)),
        flow(&net, 1, 5_001, mbit(10)),
    ];
    achieves(&flows[0], mbit(4), "policed");
    achieves(&flows[1], mbit(8), "shaped");
    achieves(&flows[2], mbit(10), "on no line");
    let before = daemon.counts(policed).unwrap().down;

    daemon.qos_line("session stop home").unwrap();
    achieves(&flows[0], mbit(4), "within the grace time");
    let answer = daemon
        .qos_line("session start home --address 192.0.2.77 --down 50mbit --up 50mbit --bras bras1")
        .unwrap();
    assert_eq!(warnings(&answer), [""; 0]);
    achieves(&flows[2], mbit(4), "policed at the new address");
    achieves(&flows[3], mbit(8), "shaped at the new address");
    achieves(&flows[0], mbit(10), "the old address is nobody's");
    let after = daemon.counts(policed).unwrap().down;
    assert!(after.passed.packets > before.passed.packets, "counters go on");
    agrees(&daemon);
    let session = daemon.qos_line("session show home").unwrap();
    assert_eq!((&session["bras"], &session["down_since"]), (&Value::from("bras1"), &Value::Null));
}

#[test]
fn a_line_that_comes_back_slower_keeps_what_fits() {
    let (net, daemon) = started("");
    grant(&daemon, 5_000, "--guaranteed-down 8mbit --max-down 8mbit --priority 1");
    let worst = grant(&daemon, 5_001, "--guaranteed-down 8mbit --priority 4");
    let flows = [5_000, 5_001, 5_002].map(|port| flow(&net, 0, port, mbit(9)));
    let start = "session start home --address 192.0.2.10 --up 50mbit --down";
    let dry = daemon.qos_line(&format!("{start} 10mbit --dry-run")).unwrap();
    assert_eq!(daemon.status().unwrap().counted.allocations, 2, "nothing but a question");
    let told = daemon.qos_line(&format!("{start} 10mbit")).unwrap();
    assert_eq!(warnings(&dry), warnings(&told));
    assert!(
        warnings(&told)[0]
            .starts_with(&format!("allocation {worst} ends: network terminated: line home downstream")),
        "{told}"
    );
    achieves(&flows[0], mbit(8), "what is still guaranteed, before all others");
    let whole: u64 = flows.iter().map(|flow| undisturbed(flow, WARM_UP, WINDOW).unwrap().achieved.0).sum();
    assert!(whole as f64 <= 10e6 * 1.04, "the line: {whole}");
    agrees(&daemon);
    let ended = daemon.qos_line("list --ended 1").unwrap();
    assert_eq!(ended["items"][0]["id"], worst.0);
    assert_eq!(daemon.qos_line(&format!("{start} 50mbit")).unwrap()["warnings"], Value::Array(Vec::new()));
    achieves(&flows[1], mbit(9), "all of it again");
    agrees(&daemon);
}

#[test]
fn a_line_that_stays_away_is_forgotten() {
    let (net, mut daemon) = started("session_grace = \"3s\"");
    grant(&daemon, 5_000, "--max-down 4mbit --enforcement police");
    grant(&daemon, 5_001, "--guaranteed-down 6mbit --max-down 8mbit");
    let flows = [5_000, 5_001].map(|port| flow(&net, 0, port, mbit(10)));
    let began = Instant::now();
    daemon.qos_line("session stop home").unwrap();
    let refused = daemon
        .grant("--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5002' --max-down 1mbit")
        .unwrap_err();
    assert!(format!("{refused:#}").contains("line home: is down since"), "{refused:#}");
    // The time goes on while nobody is there to count it.
    daemon.kill().unwrap();
    thread::sleep(Duration::from_secs(1));
    daemon.restart().unwrap();
    eventually(Duration::from_secs(20), "the grace time is over", || {
        daemon.status().unwrap().counted.allocations == 0
    });
    assert!(began.elapsed() >= Duration::from_secs(3), "after {:?}", began.elapsed());
    let counted = daemon.status().unwrap().counted;
    assert_eq!((counted.sessions, counted.providers), (0, 1));
    for flow in &flows {
        achieves(flow, mbit(10), "nobody's");
    }
    agrees(&daemon);
    let ended = daemon.qos_line("list --ended 2").unwrap();
    for allocation in ended["items"].as_array().unwrap() {
        let reason = allocation["reason"].as_str().unwrap();
        assert!(reason.starts_with("network terminated: line home was down since"), "{reason}");
    }
    // The line takes a slot again, and begins undivided.
    daemon.qos_line("session start home --address 192.0.2.10 --down 20mbit --up 20mbit").unwrap();
    agrees(&daemon);
    achieves(&flows[0], mbit(10), "on its line");
}

#[test]
fn what_the_kernel_refuses_of_a_line_that_moves_leaves_all_as_it_was() {
    let (net, daemon) = started("max_checks = 16\nrequire_session = false");
    // The new address has as many rules over it as may be.
    for last in 5_001..=5_016 {
        let flow = format!("down udp from 203.0.113.0/24 to 192.0.2.77:5000-{last}");
        daemon
            .grant(&format!("--provider video --flow '{flow}' --max-down 1mbit --enforcement police"))
            .unwrap();
    }
    grant(&daemon, 5_000, "--guaranteed-down 6mbit --max-down 8mbit --precedence 2");
    let traffic = flow(&net, 0, 5_000, mbit(10));
    achieves(&traffic, mbit(8), "before");
    let before = Kernel::read(&daemon, &net.gateway).unwrap();
    let start = "session start home --address 192.0.2.77 --down 20mbit --up 50mbit --overhead 40";
    let refused = daemon.qos_line(start).unwrap_err();
    assert!(format!("{refused:#}").contains("max_checks"), "{refused:#}");
    let after = Kernel::read(&daemon, &net.gateway).unwrap();
    assert_eq!(before.differences(&after), [""; 0]);
    assert_eq!(daemon.qos_line("session show home").unwrap()["rate"]["down"], 50_000_000);
    achieves(&traffic, mbit(8), "after");
    agrees(&daemon);
}

#[test]
fn a_line_that_is_known_from_a_file_is_served_when_something_is_granted_on_it() {
    let net = Topology::builder()
        .subscriber("home", &["192.0.2.10", "192.0.2.77"])
        .provider("video", &["203.0.113.10"])
        .build()
        .unwrap();
    let daemon = Daemon::start(&net.gateway, &Config::default()).unwrap();
    daemon.qos_line("provider add video --kind application --network 203.0.113.0/24").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("lines.csv");
    std::fs::write(&file, "line,addresses,down,up,key\nhome,192.0.2.10,50mbit,50mbit,1\n").unwrap();
    daemon.qos_line(&format!("session import {}", file.display())).unwrap();
    let sessions = daemon.qos_line("session list").unwrap();
    assert_eq!(sessions["items"], Value::Array(Vec::new()));

    let policed = grant(&daemon, 5_000, "--max-down 4mbit --enforcement police");
    grant(&daemon, 5_001, "--guaranteed-down 6mbit --max-down 8mbit");
    agrees(&daemon);
    let flows =
        [flow(&net, 0, 5_000, mbit(10)), flow(&net, 0, 5_001, mbit(10)), flow(&net, 1, 5_000, mbit(10))];
    achieves(&flows[0], mbit(4), "policed");
    achieves(&flows[1], mbit(8), "shaped");

    std::fs::write(&file, "line,addresses,down,up,key\nhome,192.0.2.77,50mbit,50mbit,2\n").unwrap();
    daemon.qos_line(&format!("session import {}", file.display())).unwrap();
    achieves(&flows[2], mbit(4), "policed at the new address");
    agrees(&daemon);
    daemon.qos_line(&format!("revoke {policed}")).unwrap();
    achieves(&flows[2], mbit(10), "revoked");
}
