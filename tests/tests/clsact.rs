//! Filters on `clsact`, where a kernel has no tcx: here by configuration. Real `qosd`, real traffic.
//! Needs root.
#![expect(clippy::unwrap_used, reason = "a test and what it calls fail by panicking")]

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use qos_tests::ask::{Brief, eventually, undisturbed};
use qos_tests::capture::Capture;
use qos_tests::daemon::{Config, Daemon};
use qos_tests::kernel::programs;
use qos_tests::netlink::{Filter, Netlink};
use qos_tests::skip::skip;
use qos_tests::topology::{HOST_LINK, LAN, Topology, WAN};
use qos_tests::traffic::{RunningUdp, UdpFlow};
use qos_userspace::domain::BitsPerSecond;

const WARM_UP: Duration = Duration::from_secs(1);
/// For repairs, of which there are two a second.
const PATIENCE: Duration = Duration::from_secs(5);

fn mbit(mbit: u64) -> BitsPerSecond {
    BitsPerSecond(mbit * 1_000_000)
}

/// On clsact, reconciled twice a second.
fn config() -> Config {
    Config { more: "tc_hooks = \"clsact\"\nreconcile_interval = \"500ms\"".to_owned(), ..Config::default() }
}

fn gateway() -> (Topology, Daemon) {
    let net = Topology::pair().unwrap();
    let daemon = Daemon::start(&net.gateway, &config()).unwrap();
    for line in [
        "session add home --address 192.0.2.10 --down 20mbit --up 20mbit",
        "provider add video --kind application --network 203.0.113.0/24",
        "grant --provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5000' --guaranteed-down 1mbit --max-down 2mbit --enforcement police --dscp EF",
    ] {
        daemon.qos_line(line).unwrap();
    }
    (net, daemon)
}

fn policed(net: &Topology) -> RunningUdp {
    let (home, video) = (net.subscriber("home"), net.provider("video"));
    UdpFlow::new(SocketAddr::from((video.v4(0), 0)), SocketAddr::from((home.v4(0), 5_000)), mbit(5))
        .packet(1_000)
        .start(&video.namespace, &home.namespace)
        .unwrap()
}

/// The flow has its maximum and its code point, which only a whole chain of hooks gives it.
fn is_held(net: &Topology, flow: &RunningUdp, what: &str) {
    let capture = Capture::open(&net.subscriber("home").namespace, HOST_LINK).unwrap();
    let held = undisturbed(flow, WARM_UP, Duration::from_secs(1)).unwrap();
    assert!((held.ratio_to(mbit(2)) - 1.0).abs() < 0.06, "{what}: {:?}", Brief(&held));
    let frame = capture
        .find(Duration::from_secs(1), |frame| frame.ports().is_some_and(|ports| ports.1 == 5_000))
        .unwrap()
        .expect("captured");
    assert_eq!(frame.dscp(), Some(46), "{what}");
}

/// All filters of the gateway's interfaces.
fn filters(net: &Topology) -> Vec<Filter> {
    let mut netlink = Netlink::open(&net.gateway).unwrap();
    let mut found = Vec::new();
    for name in [LAN, WAN] {
        let index = netlink.link(name).unwrap().index;
        found.extend(netlink.filters(index).unwrap());
    }
    found
}

fn clsact(net: &Topology, link: &str) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = Netlink::open(&net.gateway).unwrap().link(link).unwrap().index.cast_signed();
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle { major: 0xffff, minor: 0 };
    message
}

fn add_qdisc(net: &Topology, link: &str, kind: &str) {
    let mut message = clsact(net, link);
    message.attributes.push(TcAttribute::Kind(kind.to_owned()));
    let message = RouteNetlinkMessage::NewQueueDiscipline(message);
    Netlink::open(&net.gateway).unwrap().request(message, NLM_F_ACK | NLM_F_CREATE).unwrap();
}

fn delete_qdisc(net: &Topology, link: &str) {
    let message = RouteNetlinkMessage::DelQueueDiscipline(clsact(net, link));
    Netlink::open(&net.gateway).unwrap().request(message, NLM_F_ACK).unwrap();
}

fn delete_filter(net: &Topology, filter: &Filter) {
    let mut message = TcMessage::default();
    message.header.index = filter.index;
    message.header.parent = filter.parent.into();
    message.header.handle = filter.handle.into();
    message.header.info = filter.info;
    message.attributes.push(TcAttribute::Kind("bpf".to_owned()));
    let message = RouteNetlinkMessage::DelTrafficFilter(message);
    Netlink::open(&net.gateway).unwrap().request(message, NLM_F_ACK).unwrap();
}

#[test]
fn levels_are_held_and_taken_over_with_one_filter_a_hook() {
    let (net, mut daemon) = gateway();
    let status = daemon.status().unwrap();
    assert!(status.gateway.interfaces.iter().all(|interface| interface.tc == "clsact"), "{status:?}");
    let flow = policed(&net);
    is_held(&net, &flow, "fresh");
    let before = filters(&net);
    assert_eq!(before.len(), 4, "{before:?}");
    for _ in 0..3 {
        daemon.kill().unwrap();
        is_held(&net, &flow, "dead");
        daemon.restart().unwrap();
        assert!(daemon.status().unwrap().gateway.taken_over);
        let after = filters(&net);
        let places = |filters: &[Filter]| -> Vec<_> {
            filters.iter().map(|filter| (filter.index, filter.parent, filter.info, filter.handle)).collect()
        };
        assert_eq!(places(&after), places(&before));
        assert!(after.iter().zip(&before).all(|(now, was)| now.program == was.program), "{after:?}");
        is_held(&net, &flow, "taken over");
    }
}

#[test]
fn lost_filters_are_told_and_attached_again() {
    let (net, daemon) = gateway();
    let flow = policed(&net);
    let whole = filters(&net);
    for filter in &whole {
        delete_filter(&net, filter);
        assert_eq!(filters(&net).len(), 3);
        eventually(PATIENCE, "a deleted filter is back", || filters(&net) == whole);
    }
    delete_qdisc(&net, LAN);
    eventually(PATIENCE, "a deleted clsact is back", || filters(&net) == whole);
    let repairs = daemon.status().unwrap().gateway.repairs;
    for told in [
        "lan0: tc ingress had lost our program; attached again",
        "wan0: tc egress had lost our program; attached again",
        "lan0: tc ingress, tc egress had lost our program; attached again",
    ] {
        assert!(repairs.iter().any(|repair| repair.what == told), "{told}: {repairs:?}");
    }
    is_held(&net, &flow, "repaired");
}

#[test]
fn detach_removes_the_clsact_that_qosd_made_and_no_other() {
    let (net, daemon) = gateway();
    daemon.qos(["detach", "--yes"]).unwrap();
    let bare =
        || Netlink::open(&net.gateway).unwrap().qdiscs().unwrap().iter().all(|it| it.kind == "noqueue");
    assert!(bare(), "nothing is left");

    // One that an operator made, on one interface.
    add_qdisc(&net, LAN, "clsact");
    let mut second = Daemon::start(&net.gateway, &config()).unwrap();
    assert_eq!(filters(&net).len(), 4);
    second.qos(["detach", "--yes"]).unwrap();
    second.wait(Duration::from_secs(5)).unwrap();
    assert_eq!(filters(&net), []);
    let left: Vec<_> = Netlink::open(&net.gateway)
        .unwrap()
        .qdiscs()
        .unwrap()
        .into_iter()
        .filter(|qdisc| qdisc.kind == "clsact")
        .collect();
    assert_eq!(left.len(), 1, "{left:?}");
    delete_qdisc(&net, LAN);

    // In the place of clsact, on the second interface: nothing is left of the first one either.
    add_qdisc(&net, WAN, "ingress");
    let mut third = Daemon::prepare(&net.gateway, &config()).unwrap();
    let error = format!("{:#}", third.restart().unwrap_err());
    assert!(
        error.contains("to wan0: it has an `ingress` queueing discipline")
            && error.contains("`tc qdisc del dev wan0 ingress`"),
        "{error}"
    );
    delete_qdisc(&net, WAN);
    assert!(bare(), "a start that failed leaves nothing");
}

#[test]
fn the_configuration_may_change_between_tcx_and_clsact() {
    let (net, mut daemon) = gateway();
    if programs(&net.gateway, LAN).is_err() {
        skip("the_configuration_may_change_between_tcx_and_clsact", "no tcx");
        return;
    }
    let flow = policed(&net);
    let clsact = fs::read_to_string(daemon.config_path()).unwrap();
    let auto = clsact.replace("tc_hooks = \"clsact\"", "tc_hooks = \"auto\"");
    for (text, hooks, count) in [(&auto, "tcx", 0), (&clsact, "clsact", 4), (&auto, "tcx", 0)] {
        daemon.terminate().unwrap();
        fs::write(daemon.config_path(), text).unwrap();
        daemon.restart().unwrap();
        let status = daemon.status().unwrap();
        assert!(status.gateway.interfaces.iter().all(|interface| interface.tc == hooks), "{status:?}");
        assert_eq!(filters(&net).len(), count);
        let (_, ingress, egress) = programs(&net.gateway, LAN).unwrap();
        let tcx = usize::from(hooks == "tcx");
        assert_eq!((ingress.len(), egress.len()), (tcx, tcx), "{hooks}");
        is_held(&net, &flow, hooks);
    }
}
