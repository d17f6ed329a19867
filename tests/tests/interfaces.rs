//! Interfaces that come, go and are renamed while `qosd` runs. Needs root.
#![expect(clippy::unwrap_used, reason = "a test and what it calls fail by panicking")]

use std::net::SocketAddr;
use std::time::Duration;

use qos_tests::ask::{Brief, eventually, undisturbed};
use qos_tests::boxes::{BoxUnderTest, Kind};
use qos_tests::daemon::{Config, Daemon};
use qos_tests::kernel::programs;
use qos_tests::netlink::Netlink;
use qos_tests::topology::{LAN, Topology, WAN};
use qos_tests::traffic::{RunningUdp, UdpFlow};
use qos_userspace::domain::BitsPerSecond;
use qos_userspace::manager::report::InterfaceStatus;

/// Less than the time between two looks that nobody asked for.
const SOON: Duration = Duration::from_secs(2);
const RATE: BitsPerSecond = BitsPerSecond(2_000_000);

fn status(daemon: &Daemon, link: &str) -> InterfaceStatus {
    let interfaces = daemon.status().unwrap().gateway.interfaces;
    interfaces.into_iter().find(|interface| interface.name == link).unwrap()
}

fn rename(net: &Topology, from: &str, to: &str) {
    let mut netlink = Netlink::open(&net.gateway).unwrap();
    let index = netlink.link(from).unwrap().index;
    netlink.rename(index, to).unwrap();
}

/// Twice [`RATE`] each way, of which a level leaves half: down, up.
fn levels(net: &Topology, daemon: &Daemon) -> [RunningUdp; 2] {
    for line in [
        "session add home --address 192.0.2.10 --down 100mbit --up 100mbit",
        "provider add video --kind application --network 203.0.113.0/24",
    ] {
        daemon.qos_line(line).unwrap();
    }
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    [("down", video, home), ("up", home, video)].map(|(direction, from, to)| {
        let (source, target) = (from.v4(0), to.v4(0));
        let flow = format!("{direction} udp from {source} to {target}:5000");
        let level = format!("--max-{direction} 2mbit --enforcement police");
        daemon.grant(&format!("--provider video --flow '{flow}' {level}")).unwrap();
        UdpFlow::new(
            SocketAddr::from((source, 0)),
            SocketAddr::from((target, 5_000)),
            BitsPerSecond(2 * RATE.0),
        )
        .packet(1_000)
        .start(&from.namespace, &to.namespace)
        .unwrap()
    })
}

fn achieves(flow: &RunningUdp, expected: BitsPerSecond, what: &str) {
    let measured = undisturbed(flow, Duration::from_millis(500), Duration::from_secs(1)).unwrap();
    assert!((measured.ratio_to(expected) - 1.0).abs() < 0.03, "{what}: {:?}", Brief(&measured));
}

#[test]
fn an_interface_that_is_not_there_yet_is_waited_for() {
    let net = Topology::pair().unwrap();
    rename(&net, WAN, "later0");
    let daemon = Daemon::start(&net.gateway, &Config::default()).unwrap();
    assert_eq!(status(&daemon, WAN).index, None);
    assert!(daemon.log_tail().contains("interface wan0 does not exist"), "{}", daemon.log_tail());
    let doctor = daemon.qos_output(["doctor"]).unwrap();
    assert_eq!(doctor.status.code(), Some(4), "a missing interface is an error to the doctor");

    // Meanwhile the other side is held: up at LAN ingress, down at LAN egress.
    let [down, up] = levels(&net, &daemon);
    achieves(&up, RATE, "up, without the WAN");
    achieves(&down, RATE, "down, without the WAN");

    rename(&net, "later0", WAN);
    eventually(SOON, "the interface is attached to", || status(&daemon, WAN).judged == "xdp");
    achieves(&up, RATE, "up");
    achieves(&down, RATE, "down");
    assert!(status(&daemon, WAN).scheduler == "htb");
}

#[test]
fn an_interface_that_is_renamed_is_let_go_and_found_again() {
    let net = Topology::pair().unwrap();
    let daemon = Daemon::start(&net.gateway, &Config::default()).unwrap();
    let [down, up] = levels(&net, &daemon);
    for round in 0..3 {
        rename(&net, WAN, "other0");
        eventually(SOON, "it is gone", || status(&daemon, WAN).index.is_none());
        assert_eq!(programs(&net.gateway, "other0").unwrap(), (None, vec![], vec![]), "round {round}");
        let mut netlink = Netlink::open(&net.gateway).unwrap();
        let index = netlink.link("other0").unwrap().index;
        assert!(netlink.classes(index).unwrap().is_empty(), "round {round}");
        achieves(&up, RATE, "up, without the WAN");
        achieves(&down, RATE, "down, without the WAN");
        rename(&net, "other0", WAN);
        eventually(SOON, "it is back", || status(&daemon, WAN).judged == "xdp");
    }
    achieves(&up, RATE, "up");
    achieves(&down, RATE, "down");
    let repairs = daemon.status().unwrap().gateway.repairs;
    assert!(repairs.iter().any(|repair| repair.what.contains("wan0 has gone")), "{repairs:?}");
    assert!(repairs.iter().any(|repair| repair.what.contains("wan0 appeared")), "{repairs:?}");
}

#[test]
fn an_interface_that_is_deleted_under_load_leaves_the_others_enforcing() {
    let four = BoxUnderTest::start(Kind::RouterFour).unwrap().unwrap();
    let [down, up] = levels(&four.net, &four.daemon);
    let mut netlink = Netlink::open(&four.net.gateway).unwrap();
    for link in [LAN, WAN] {
        let index = netlink.link(link).unwrap().index;
        netlink.delete_link(index).unwrap();
        eventually(SOON, "it is gone", || status(&four.daemon, link).index.is_none());
        achieves(&up, RATE, "up");
        achieves(&down, RATE, "down");
    }
}

#[test]
fn a_link_that_goes_down_and_up_under_load_is_enforced_on_as_before() {
    let net = Topology::pair().unwrap();
    let daemon = Daemon::start(&net.gateway, &Config::default()).unwrap();
    let [down, up] = levels(&net, &daemon);
    let mut netlink = Netlink::open(&net.gateway).unwrap();
    for link in [LAN, WAN] {
        let index = netlink.link(link).unwrap().index;
        let before = programs(&net.gateway, link).unwrap();
        for _ in 0..3 {
            netlink.set_down(index).unwrap();
            std::thread::sleep(Duration::from_millis(300));
            netlink.set_up(index).unwrap();
            achieves(&up, RATE, "up");
            achieves(&down, RATE, "down");
        }
        assert_eq!(programs(&net.gateway, link).unwrap(), before, "{link}");
        let found = status(&daemon, link);
        assert_eq!((found.judged.as_str(), found.scheduler.as_str()), ("xdp", "htb"), "{found:?}");
    }
    assert_eq!(daemon.qos_line("reconcile").unwrap()["items"].as_array().map(Vec::len), Some(0));
    let repairs = daemon.status().unwrap().gateway.repairs;
    assert!(repairs.is_empty(), "nothing had gone: {repairs:?}");
}
