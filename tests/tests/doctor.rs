//! Each thing that `qos doctor` finds, produced on a real box with a real `qosd`: what was found, what
//! it costs, what mends it, and that it is gone once it is mended. Needs root.
#![expect(clippy::unwrap_used, reason = "a test and what it calls fail by panicking")]

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::thread::available_parallelism;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use qos_tests::daemon::{Config, Daemon};
use qos_tests::foreign::{AFTER, BEFORE, Foreign, Hook, NAME};
use qos_tests::netlink::{Netlink, is_unknown_device, set_feature, set_queues};
use qos_tests::netns::Namespace;
use qos_tests::skip::skip;
use qos_tests::topology::{Device, HOST_LINK, LAN, Topology, WAN};
use qos_userspace::api::doctor::{Check, Severity, worst};
use qos_userspace::domain::BitsPerSecond;
use serde::Deserialize as _;

/// What `qos doctor` says, and that its exit status agrees.
fn examine(daemon: &Daemon) -> Vec<Check> {
    let output = daemon.qos_output(["doctor"]).unwrap();
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    let checks = Vec::<Check>::deserialize(&answer["items"]).unwrap();
    let expected = match worst(&checks) {
        Severity::Ok => 0,
        Severity::Warning => 1,
        Severity::Error => 4,
    };
    assert_eq!(output.status.code(), Some(expected), "{checks:#?}");
    for check in &checks {
        let is_ok = check.severity == Severity::Ok;
        assert_eq!((check.cost.is_none(), check.mend.is_none()), (is_ok, is_ok), "{check:?}");
    }
    checks
}

fn find<'c>(checks: &'c [Check], name: &str) -> &'c Check {
    checks.iter().find(|check| check.name == name).unwrap_or_else(|| panic!("no {name}: {checks:#?}"))
}

/// A check is as bad as that, and its texts have all parts.
fn says(checks: &[Check], name: &str, severity: Severity, parts: &[&str]) {
    let check = find(checks, name);
    assert_eq!(check.severity, severity, "{check:#?}");
    let text = format!("{check:?}");
    for part in parts {
        assert!(text.contains(part), "{part:?} in {check:#?}");
    }
}

fn has(checks: &[Check], name: &str) -> bool {
    checks.iter().any(|check| check.name == name)
}

fn start(net: &Topology, config: &Config) -> Daemon {
    Daemon::start(&net.gateway, config).unwrap()
}

/// Nothing is reconciled while a test looks, unless it asks for it.
fn calm() -> Config {
    Config { more: "reconcile_interval = \"1h\"".to_owned(), ..Config::default() }
}

fn index(gateway: &Namespace, link: &str) -> u32 {
    Netlink::open(gateway).unwrap().link(link).unwrap().index
}

#[test]
fn a_healthy_box_is_all_right() {
    let net = Topology::pair().unwrap();
    for link in [LAN, WAN] {
        set_queues(&net.gateway, link, 2, 2).unwrap();
    }
    let daemon = start(&net, &calm());
    for line in [
        "session add home --address 192.0.2.10 --down 50mbit --up 10mbit",
        "provider add video --kind application --network 203.0.113.0/24",
        "grant --provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10' --max-down 5mbit --mtu 1400",
    ] {
        daemon.qos_line(line).unwrap();
    }
    let checks = examine(&daemon);
    // What the kernel that runs the tests may lack.
    let wrong: Vec<_> = checks
        .iter()
        .filter(|check| check.severity != Severity::Ok && check.name != "scheduler fq_codel")
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    for link in [LAN, WAN] {
        let programs = format!("programs on {link}");
        says(&checks, &programs, Severity::Ok, &["XDP in the driver judges: the driver runs it", "htb"]);
        says(&checks, &format!("others on {link}"), Severity::Ok, &["no programs but ours"]);
        says(&checks, &format!("qdisc of {link}"), Severity::Ok, &["htb 5150:, ours"]);
        says(&checks, &format!("rx-gro of {link}"), Severity::Ok, &["off"]);
        says(&checks, &format!("queues of {link}"), Severity::Ok, &["2 to receive, 2 to send"]);
    }
    says(&checks, "MTU", Severity::Ok, &["lan0 1500, wan0 1500"]);
    says(&checks, "flowtables", Severity::Ok, &["none on these interfaces"]);
    assert!(!has(&checks, "granted MTUs") && !has(&checks, "ATM cells"), "{checks:#?}");
}

#[test]
fn the_hook_is_told_with_its_reason() {
    let each = |choice: &str| Config { each_interface: format!("xdp = \"{choice}\""), ..calm() };
    for (config, severity, parts) in [
        (each("native"), Severity::Ok, &["XDP in the driver judges: the configuration says so"][..]),
        (
            each("generic"),
            Severity::Warning,
            &["XDP in the stack judges: the configuration says so", "a copy of nearly every packet", "auto"],
        ),
        (each("off"), Severity::Ok, &["tc ingress judges: the configuration says so", "tcx"]),
        (
            Config { more: format!("tc_hooks = \"clsact\"\n{}", calm().more), ..calm() },
            Severity::Ok,
            &["the driver runs it", "tc programs on clsact"],
        ),
    ] {
        let net = Topology::pair().unwrap();
        let daemon = start(&net, &config);
        says(&examine(&daemon), "programs on lan0", severity, parts);
    }

    let net = Topology::pair().unwrap();
    let daemon = start(&net, &Config { more: format!("nat = true\n{}", calm().more), ..calm() });
    let checks = examine(&daemon);
    says(&checks, "programs on wan0", Severity::Ok, &["tc egress judges: NAT has still to put"]);
    says(&checks, "programs on lan0", Severity::Ok, &["XDP in the driver judges"]);
}

#[test]
fn a_device_without_ethernet_is_judged_by_tc_and_that_is_as_good_as_it_gets() {
    let net = Topology::builder()
        .subscriber("home", &["192.0.2.10"])
        .provider("video", &["203.0.113.10"])
        .devices([(LAN, Device::Ethernet), (WAN, Device::Tun)])
        .build()
        .unwrap();
    let daemon = start(&net, &calm());
    let checks = examine(&daemon);
    says(&checks, "programs on wan0", Severity::Ok, &["tc ingress judges: its packets begin with their IP"]);
    assert!(!has(&checks, "queues of wan0"), "a software device has none that matter: {checks:#?}");
}

#[test]
fn a_bridge_has_no_xdp_in_the_driver_and_nothing_can_be_done_about_it() {
    let net = Topology::pair().unwrap();
    let mut netlink = Netlink::open(&net.gateway).unwrap();
    netlink.add_bridge("br0").unwrap();
    let bridge = netlink.link("br0").unwrap().index;
    netlink.set_up(bridge).unwrap();
    let daemon = start(&net, &Config { interfaces: vec![("br0", "lan"), (WAN, "wan")], ..calm() });
    says(&examine(&daemon), "programs on br0", Severity::Ok, &["tc ingress judges: the driver has no XDP"]);
}

#[test]
fn a_driver_that_refuses_xdp_is_told_with_its_reason() {
    let net = Topology::pair().unwrap();
    // veth wants as many queues for receiving as the other end has for sending.
    set_queues(&net.gateway, LAN, 1, 1).unwrap();
    set_queues(&net.subscriber("home").namespace, HOST_LINK, 1, 2).unwrap();
    let daemon = start(&net, &calm());
    let parts =
        ["tc ingress judges: the driver refused XDP (No space left on device", "a queue for each CPU"];
    says(&examine(&daemon), "programs on lan0", Severity::Warning, &parts);
    says(&examine(&daemon), "programs on wan0", Severity::Ok, &["XDP in the driver"]);
}

#[test]
fn a_box_that_only_bridges_needs_no_forwarding() {
    let hosts = Topology::builder().subscriber("home", &["192.0.2.10"]).provider("video", &["203.0.113.10"]);
    let net = hosts.bridged(None).build().unwrap();
    let daemon = start(&net, &calm());
    let checks = examine(&daemon);
    says(&checks, "forwarding", Severity::Ok, &["off", "which bridges don't need"]);
    says(&checks, "programs on lan0", Severity::Ok, &["XDP in the driver judges"]);
    drop(daemon);
    let net = Topology::pair().unwrap();
    net.gateway.set_sysctl("ipv4/ip_forward", "0").unwrap();
    let daemon = start(&net, &calm());
    let parts = ["off: net.ipv4.ip_forward", "not routed", "sysctl -w"];
    says(&examine(&daemon), "forwarding", Severity::Warning, &parts);
}

#[test]
fn a_missing_interface_and_one_that_is_down_are_errors() {
    let net = Topology::pair().unwrap();
    let daemon =
        start(&net, &Config { interfaces: vec![(LAN, "lan"), (WAN, "wan"), ("ppp9", "wan")], ..calm() });
    Netlink::open(&net.gateway).unwrap().set_down(index(&net.gateway, LAN)).unwrap();
    let checks = examine(&daemon);
    says(&checks, "interface ppp9", Severity::Error, &["does not exist", "make the interface"]);
    says(&checks, "programs on ppp9", Severity::Error, &["does not exist"]);
    says(&checks, "interface lan0", Severity::Error, &["it is down", "ip link set lan0 up"]);
}

#[test]
fn more_capacity_than_the_port_has_is_told() {
    let net = Topology::pair().unwrap();
    let daemon = start(&net, &Config { lan_capacity: BitsPerSecond(40_000_000_000), ..calm() });
    let checks = examine(&daemon);
    says(&checks, "interface lan0", Severity::Warning, &["set to 40 Gbit/s, the port has 10 Gbit/s"]);
    says(&checks, "interface wan0", Severity::Ok, &["up, capacity 1 Gbit/s, the port has 10 Gbit/s"]);
}

#[test]
fn observing_is_told_and_needs_no_qdisc() {
    let net = Topology::pair().unwrap();
    let daemon = start(&net, &Config { mode: "observe", ..calm() });
    let checks = examine(&daemon);
    says(&checks, "mode", Severity::Warning, &["observe", "no level is held", "enforce"]);
    says(&checks, "qdisc of lan0", Severity::Ok, &["the kernel's default, noqueue"]);
    says(&checks, "programs on lan0", Severity::Ok, &["scheduler none"]);
}

#[test]
fn somebody_elses_xdp_program_is_named_and_left_alone() {
    let net = Topology::pair().unwrap();
    let foreign = Foreign::attach(&net.gateway, LAN, Hook::Xdp, 0).unwrap();
    let id = Netlink::open(&net.gateway).unwrap().link(LAN).unwrap().xdp.unwrap();
    let mut daemon = start(&net, &calm());
    let checks = examine(&daemon);
    let name = format!("tc ingress judges: XDP has somebody else's program `{NAME}` (id {id}), which stays");
    let parts = [name.as_str(), "drops or redirects", "ip link set dev lan0 xdp off", "restart qosd"];
    says(&checks, "programs on lan0", Severity::Warning, &parts);
    says(&checks, "programs on wan0", Severity::Ok, &["XDP in the driver"]);
    assert_eq!(Netlink::open(&net.gateway).unwrap().link(LAN).unwrap().xdp, Some(id));
    // As it says.
    drop(foreign);
    daemon.terminate().unwrap();
    daemon.restart().unwrap();
    says(&examine(&daemon), "programs on lan0", Severity::Ok, &["XDP in the driver"]);
}

#[test]
fn programs_before_and_behind_ours_are_named_in_their_place() {
    let net = Topology::pair().unwrap();
    let daemon = start(&net, &calm());
    let behind = Foreign::attach(&net.gateway, LAN, Hook::Egress, AFTER).unwrap();
    let checks = examine(&daemon);
    let parts = ["behind ours, with all that we pass: tc egress program `somebodys` (id "];
    says(&checks, "others on lan0", Severity::Ok, &parts);

    let before = Foreign::attach(&net.gateway, LAN, Hook::Ingress, BEFORE).unwrap();
    let checks = examine(&daemon);
    let parts =
        ["before ours: tc ingress program `somebodys` (id ", "; behind ours", "TCX_NEXT", "BPF_F_AFTER"];
    says(&checks, "others on lan0", Severity::Warning, &parts);
    drop((before, behind));
    says(&examine(&daemon), "others on lan0", Severity::Ok, &["no programs but ours"]);

    // A filter comes behind all of tcx.
    let filter = Foreign::loaded().unwrap();
    let mut netlink = Netlink::open(&net.gateway).unwrap();
    let lan = netlink.link(LAN).unwrap().index;
    netlink.put_filter(lan, 7, "watcher", filter.program()).unwrap();
    let parts = ["behind ours", "tc ingress filter `watcher` (id ", "of priority 7"];
    says(&examine(&daemon), "others on lan0", Severity::Ok, &parts);
    drop(daemon);
    assert_eq!(netlink.filters(lan).unwrap().len(), 1, "it stays");
}

#[test]
fn a_filter_before_ours_on_clsact_is_named() {
    let net = Topology::pair().unwrap();
    let filter = Foreign::loaded().unwrap();
    let mut netlink = Netlink::open(&net.gateway).unwrap();
    let lan = netlink.link(LAN).unwrap().index;
    netlink.put_filter(lan, 7, "watcher", filter.program()).unwrap();
    let more = format!("tc_hooks = \"clsact\"\n{}", calm().more);
    let daemon = start(&net, &Config { more, ..calm() });
    let parts = ["before ours: tc ingress filter `watcher` (id ", "of priority 7", "above 20816"];
    says(&examine(&daemon), "others on lan0", Severity::Warning, &parts);
    // All of tcx goes before any filter.
    let _tcx = Foreign::attach(&net.gateway, WAN, Hook::Egress, 0).unwrap();
    says(
        &examine(&daemon),
        "others on wan0",
        Severity::Warning,
        &["before ours: tc egress program `somebodys`"],
    );
}

#[test]
fn offloads_that_hurt_are_told_and_mended_as_it_says() {
    let net = Topology::pair().unwrap();
    let set = |feature, on| set_feature(&net.gateway, LAN, feature, on).unwrap();
    let daemon = start(&net, &calm());
    assert!(!has(&examine(&daemon), "rx-udp-gro-forwarding of lan0"));
    set("rx-gro", true);
    says(&examine(&daemon), "rx-gro of lan0", Severity::Ok, &["no line or level here needs them one by one"]);
    for (feature, cost) in
        [("rx-udp-gro-forwarding", "in bursts"), ("rx-gro-list", "into the first of each list")]
    {
        set(feature, true);
        let (name, mend) = (format!("{feature} of lan0"), format!("ethtool -K lan0 {feature} off"));
        let checks = examine(&daemon);
        says(&checks, &name, Severity::Warning, &["on: ", cost, &mend]);
        assert!(!has(&checks, &format!("{feature} of wan0")), "the other has it off: {checks:#?}");
        set(feature, false);
        assert!(!has(&examine(&daemon), &name));
    }
    // XDP doesn't see what the NIC takes off; nothing depends on it.
    for on in [true, false] {
        set("rx-vlan-hw-parse", on);
        assert_eq!(has(&examine(&daemon), "rx-vlan-hw-parse of lan0"), on);
    }
}

#[test]
fn gro_is_told_where_atm_cells_are_counted() {
    let net = Topology::pair().unwrap();
    set_feature(&net.gateway, LAN, "rx-gro", true).unwrap();
    let daemon = start(&net, &calm());
    says(&examine(&daemon), "rx-gro of lan0", Severity::Ok, &[]);
    daemon
        .qos_line(
            "session add home --address 192.0.2.10 --down 20mbit --up 2mbit --link-layer atm --overhead 32",
        )
        .unwrap();
    let checks = examine(&daemon);
    let parts = ["rounds a merged packet to ATM cells once", "1.4 % too low", "ethtool -K lan0 rx-gro off"];
    says(&checks, "rx-gro of lan0", Severity::Warning, &parts);
    says(&checks, "rx-gro of wan0", Severity::Ok, &["off"]);
    set_feature(&net.gateway, LAN, "rx-gro", false).unwrap();
    says(&examine(&daemon), "rx-gro of lan0", Severity::Ok, &["off"]);
}

#[test]
fn gro_is_told_where_tc_polices_what_it_merged() {
    let net = Topology::pair().unwrap();
    set_feature(&net.gateway, WAN, "rx-gro", true).unwrap();
    let daemon = start(&net, &Config { each_interface: "xdp = \"off\"".to_owned(), ..calm() });
    daemon.qos_line("session add home --address 192.0.2.10 --down 20mbit --up 2mbit").unwrap();
    daemon.qos_line("provider add video --kind application --network 203.0.113.0/24").unwrap();
    let flow = "--provider video --flow 'down from 203.0.113.0/24 to 192.0.2.10' --max-down 1mbit";
    let id = daemon.grant(&format!("{flow} --enforcement police")).unwrap().id;
    let parts = ["1 policed level here: merged packets are dropped whole", "64 KiB"];
    says(&examine(&daemon), "rx-gro of wan0", Severity::Warning, &parts);
    daemon.revoke(id).unwrap();
    daemon.grant(&format!("{flow} --enforcement shape")).unwrap();
    says(&examine(&daemon), "rx-gro of wan0", Severity::Ok, &[]);
}

#[test]
fn atm_lines_get_an_mtu_whose_packets_fill_their_cells() {
    let net = Topology::pair().unwrap();
    let daemon = start(&net, &calm());
    for line in [
        "session add home --address 192.0.2.10 --down 20mbit --up 2mbit --link-layer atm --overhead 40",
        "provider add video --kind application --network 203.0.113.0/24",
    ] {
        daemon.qos_line(line).unwrap();
    }
    // 1,500 + 40 bytes take 33 cells, the last with 4 bytes; 1,496 + 40 fill 32.
    let checks = examine(&daemon);
    let parts =
        ["1 line with an overhead of 40 bytes", "leaves 44 bytes of its last cell empty", "--mtu 1496"];
    says(&checks, "ATM cells", Severity::Ok, &parts);

    let flow = "--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5000' --max-down 5mbit";
    let wasteful = daemon.grant(flow).unwrap();
    let parts = ["1 of 1 levels there allow it", "2.8 %", "grant levels there with --mtu 1496"];
    says(&examine(&daemon), "ATM cells", Severity::Warning, &parts);
    // As it says.
    daemon.revoke(wasteful.id).unwrap();
    daemon.grant(&format!("{flow} --mtu 1496")).unwrap();
    says(&examine(&daemon), "ATM cells", Severity::Ok, &["1 do"]);
}

#[test]
fn a_line_with_less_overhead_than_ethernet_is_told() {
    let net = Topology::pair().unwrap();
    let daemon = start(&net, &calm());
    daemon.qos_line("session add home --address 192.0.2.10 --down 20mbit --up 2mbit --overhead 4").unwrap();
    let parts =
        ["1 line of 4 bytes", "10 bytes too much", "0.7 % of a full one and 14.7 % of one of 64 bytes"];
    says(&examine(&daemon), "line overhead", Severity::Warning, &parts);
}

#[test]
fn mtus_that_do_not_fit_each_other_are_told() {
    let net = Topology::pair().unwrap();
    let daemon = start(&net, &calm());
    let mut netlink = Netlink::open(&net.gateway).unwrap();
    let (lan, wan) = (netlink.link(LAN).unwrap().index, netlink.link(WAN).unwrap().index);
    netlink.set_mtu(lan, 9_000).unwrap();
    let parts = ["they differ: lan0 9000, wan0 1500", "from lan0 to wan0 are fragmented", "lan0 mtu 1500"];
    says(&examine(&daemon), "MTU", Severity::Warning, &parts);
    netlink.set_mtu(lan, 1_500).unwrap();
    netlink.set_mtu(wan, 1_492).unwrap();
    let parts =
        ["by PPPoE's 8 bytes", "oifname wan0 tcp flags syn tcp option maxseg size set rt mtu", "--mtu 1492"];
    says(&examine(&daemon), "MTU", Severity::Warning, &parts);
    netlink.set_mtu(wan, 1_200).unwrap();
    says(&examine(&daemon), "MTU of wan0", Severity::Warning, &["1200, below the 1280", "wan0 mtu 1280"]);
    netlink.set_mtu(wan, 1_500).unwrap();
    let checks = examine(&daemon);
    says(&checks, "MTU", Severity::Ok, &[]);
    assert!(!has(&checks, "MTU of wan0"));
}

#[test]
fn a_granted_mtu_that_no_interface_takes_is_told() {
    let net = Topology::pair().unwrap();
    let daemon = start(&net, &calm());
    daemon.qos_line("session add home --address 192.0.2.10 --down 20mbit --up 2mbit").unwrap();
    daemon.qos_line("provider add video --kind application --network 203.0.113.0/24").unwrap();
    let flow = "--provider video --flow 'down from 203.0.113.0/24 to 192.0.2.10' --max-down 1mbit";
    let id = daemon.grant(&format!("{flow} --mtu 1500")).unwrap().id;
    assert!(!has(&examine(&daemon), "granted MTUs"));
    let mut netlink = Netlink::open(&net.gateway).unwrap();
    let wan = netlink.link(WAN).unwrap().index;
    netlink.set_mtu(wan, 1_400).unwrap();
    let parts = ["above the 1400 bytes of wan0", &format!("allocations {id} (1500)"), "--mtu 1400 or less"];
    says(&examine(&daemon), "granted MTUs", Severity::Warning, &parts);
}

#[test]
fn a_port_and_its_bridge_are_not_to_be_configured_both() {
    let net = Topology::pair().unwrap();
    let mut netlink = Netlink::open(&net.gateway).unwrap();
    netlink.add_bridge("br0").unwrap();
    let (bridge, lan) = (netlink.link("br0").unwrap().index, netlink.link(LAN).unwrap().index);
    netlink.set_up(bridge).unwrap();
    let interfaces = vec![(LAN, "lan"), ("br0", "lan"), (WAN, "wan")];
    let daemon = start(&net, &Config { interfaces, ..calm() });
    assert!(!has(&examine(&daemon), "interface lan0 below another"));
    netlink.set_controller(lan, bridge).unwrap();
    let parts = ["together with its bridge br0", "charged twice", "lan0 or br0"];
    says(&examine(&daemon), "interface lan0 below another", Severity::Error, &parts);
}

#[test]
fn a_device_and_what_it_stands_on_are_not_to_be_configured_both() {
    const TEST: &str = "a_device_and_what_it_stands_on_are_not_to_be_configured_both";
    let net = Topology::pair().unwrap();
    let mut netlink = Netlink::open(&net.gateway).unwrap();
    let lan = netlink.link(LAN).unwrap().index;
    match netlink.add_macvlan("lan0.mac", lan) {
        Err(error) if is_unknown_device(&error) => return skip(TEST, "built without CONFIG_MACVLAN"),
        made => made.unwrap(),
    }
    let device = netlink.link("lan0.mac").unwrap().index;
    netlink.set_up(device).unwrap();
    let interfaces = vec![(LAN, "lan"), ("lan0.mac", "lan"), (WAN, "wan")];
    let daemon = start(&net, &Config { interfaces, ..calm() });
    let parts = ["together with its macvlan device lan0.mac", "its levels get half"];
    says(&examine(&daemon), "interface lan0 below another", Severity::Error, &parts);
}

#[test]
fn a_foreign_root_qdisc_is_an_error_until_it_is_taken_away() {
    let net = Topology::pair().unwrap();
    let daemon = start(&net, &calm());
    let mut netlink = Netlink::open(&net.gateway).unwrap();
    let lan = netlink.link(LAN).unwrap().index;
    netlink.put_token_bucket(lan, BitsPerSecond(1_000_000_000), 1_000_000, 100_000).unwrap();
    let parts = ["tbf ", "which is not ours, and stays", "guarantees", "tc qdisc del dev lan0 root"];
    says(&examine(&daemon), "qdisc of lan0", Severity::Error, &parts);
    // As it says.
    netlink.delete_root(lan).unwrap();
    says(&examine(&daemon), "qdisc of lan0", Severity::Error, &["noqueue: ours is missing", "qos reconcile"]);
    daemon.qos_line("reconcile").unwrap();
    let checks = examine(&daemon);
    says(&checks, "qdisc of lan0", Severity::Ok, &["ours"]);
    says(&checks, "kernel equals state", Severity::Warning, &["1 repair since", "find out who else"]);
}

#[test]
fn one_queue_is_told_where_there_are_several_cpus() {
    const TEST: &str = "one_queue_is_told_where_there_are_several_cpus";
    if available_parallelism().unwrap().get() < 2 {
        return skip(TEST, "one CPU");
    }
    let net = Topology::pair().unwrap();
    set_queues(&net.gateway, LAN, 1, 1).unwrap();
    let daemon = start(&net, &calm());
    // `/sys` of this process shows the network namespace of the machine.
    let parts =
        ["1 to receive", "can't be seen from here", "ethtool -L lan0 rx ", "one CPU takes everything"];
    says(&examine(&daemon), "queues of lan0", Severity::Warning, &parts);
    // As it says.
    set_queues(&net.gateway, LAN, 2, 1).unwrap();
    says(&examine(&daemon), "queues of lan0", Severity::Ok, &["2 to receive"]);
}

#[test]
fn rps_spreads_what_one_queue_brings() {
    const TEST: &str = "rps_spreads_what_one_queue_brings";
    if available_parallelism().unwrap().get() < 2 {
        return skip(TEST, "one CPU");
    }
    let net = Topology::pair().unwrap();
    set_queues(&net.gateway, LAN, 1, 1).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::prepare(&net.gateway, &calm()).unwrap();
    daemon.restart_with(|command| own_sys(command, &net.gateway, folder.path())).unwrap();
    let checks = examine(&daemon);
    says(&checks, "queues of lan0", Severity::Warning, &["1 to receive"]);
    assert!(!find(&checks, "queues of lan0").found.contains("can't be seen"), "{checks:#?}");

    let sys = folder.path();
    net.gateway.run(|| {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let (none, private) = (None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
        mount(none, "/", none, private, none).unwrap();
        mount(Some("sysfs"), sys, Some("sysfs"), MsFlags::empty(), none).unwrap();
        fs::write(sys.join("class/net").join(LAN).join("queues/rx-0/rps_cpus"), "3").unwrap();
    });
    says(&examine(&daemon), "queues of lan0", Severity::Ok, &["RPS hands what comes in to 2 CPUs"]);
}

/// Shows the command the `/sys/class` and `/sys/devices` of a network namespace.
fn own_sys(command: &mut Command, gateway: &Namespace, folder: &Path) {
    let text = |path: &Path| CString::new(path.to_str().unwrap()).unwrap();
    let (at, class, devices) = (text(folder), text(&folder.join("class")), text(&folder.join("devices")));
    let namespace = fs::File::open(gateway.path()).unwrap();
    // SAFETY: system calls alone, which are async-signal-safe; nothing is allocated. The descriptor and
    // the texts live in the closure.
    unsafe {
        command.pre_exec(move || {
            let mount = |from: &std::ffi::CStr, at: &std::ffi::CStr, kind: &std::ffi::CStr, flags| {
                let null = std::ptr::null();
                libc::mount(from.as_ptr(), at.as_ptr(), kind.as_ptr(), flags, null) == 0
            };
            let done = libc::unshare(libc::CLONE_NEWNS) == 0
                && libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) == 0
                && mount(c"", c"/", c"", libc::MS_REC | libc::MS_PRIVATE)
                && mount(c"sysfs", &at, c"sysfs", 0)
                && mount(&class, c"/sys/class", c"", libc::MS_BIND)
                && mount(&devices, c"/sys/devices", c"", libc::MS_BIND);
            if done { Ok(()) } else { Err(io::Error::last_os_error()) }
        });
    }
}

#[test]
fn a_flowtable_is_told() {
    let net = Topology::pair().unwrap();
    let daemon = start(&net, &calm());
    says(&examine(&daemon), "flowtables", Severity::Ok, &["none on these interfaces"]);
    let mut command = Command::new("nft");
    command.arg(
        "add table inet fast; add flowtable inet fast short { hook ingress priority 0; devices = { lan0, wan0 }; }",
    );
    let reason = match net.gateway.output(command) {
        Ok(output) if output.status.success() => None,
        Ok(_) => Some("built without CONFIG_NF_FLOW_TABLE"),
        Err(_) => Some("no `nft` (Debian package nftables)"),
    };
    if let Some(reason) = reason {
        return skip("a_flowtable_is_told", reason);
    }
    let parts = ["in software, on lan0, wan0", "behind our ingress", "by our egress"];
    says(&examine(&daemon), "flowtable fast short", Severity::Ok, &parts);
}

#[test]
fn without_a_daemon_it_looks_itself() {
    let net = Topology::pair().unwrap();
    let mut daemon = start(&net, &calm());
    daemon.kill().unwrap();
    let output = daemon.qos_output(["doctor", "--config", daemon.config_path().to_str().unwrap()]).unwrap();
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = Vec::<Check>::deserialize(&answer["items"]).unwrap();
    assert_eq!(output.status.code(), Some(1), "{checks:#?}");
    says(&checks, "daemon", Severity::Warning, &["start it"]);
    says(&checks, "socket", Severity::Warning, &["left by a qosd that is no more"]);
    // What the daemon left is known by its pins.
    says(&checks, "others on lan0", Severity::Ok, &["no programs but ours"]);
    says(&checks, "qdisc of lan0", Severity::Ok, &["ours"]);
    let text =
        daemon.qos_output(["doctor", "-o", "table", "--config", daemon.config_path().to_str().unwrap()]);
    let text = String::from_utf8(text.unwrap().stdout).unwrap();
    assert!(text.contains("WHAT IT COSTS") && text.contains("nothing can be granted or repaired"), "{text}");
    daemon.restart().unwrap();
}
