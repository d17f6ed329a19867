//! Changes of the configuration while `qosd` runs, by `qos reload` and by SIGHUP. Needs root.
#![expect(clippy::unwrap_used, reason = "a test and what it calls fail by panicking")]

use std::fs;
use std::time::Duration;

use nix::sys::signal::Signal;
use qos_tests::ask::{Brief, eventually, undisturbed};
use qos_tests::daemon::{Config, Daemon};
use qos_tests::kernel::{Kernel, programs};
use qos_tests::netlink::Netlink;
use qos_tests::netns::Namespace;
use qos_tests::topology::{LAN, Topology, WAN};
use qos_tests::traffic::{RunningUdp, watched};
use qos_userspace::domain::BitsPerSecond;
use serde_json::Value;

const fn mbit(mbit: u64) -> BitsPerSecond {
    BitsPerSecond(mbit * 1_000_000)
}

/// Nothing is reconciled while a test looks, unless it asks for it.
fn config() -> Config {
    Config { more: "reconcile_interval = \"1h\"".to_owned(), ..Config::default() }
}

fn started() -> (Topology, Daemon) {
    let net = Topology::pair().unwrap();
    let daemon = Daemon::start(&net.gateway, &config()).unwrap();
    for line in [
        "session add home --address 192.0.2.10 --down 50mbit --up 50mbit",
        "provider add video --kind application --network 203.0.113.0/24",
    ] {
        daemon.qos_line(line).unwrap();
    }
    (net, daemon)
}

fn write(daemon: &Daemon, config: &Config) {
    fs::write(daemon.config_path(), daemon.config_text(config).unwrap()).unwrap();
}

/// What `qos reload` says it changed.
fn reload(daemon: &Daemon) -> Vec<String> {
    let answer = daemon.qos_line("reload").unwrap();
    answer["items"].as_array().unwrap().iter().map(|item| item.as_str().unwrap().to_owned()).collect()
}

fn achieves(flow: &RunningUdp, due: BitsPerSecond, what: &str) {
    let measured = undisturbed(flow, Duration::from_millis(700), Duration::from_secs(2)).unwrap();
    assert!((measured.ratio_to(due) - 1.0).abs() < 0.03, "{what}: {:?}", Brief(&measured));
}

#[test]
fn flows_that_are_not_concerned_lose_nothing() {
    let (net, daemon) = started();
    let level = "--guaranteed-down 8mbit --max-down 10mbit --priority 0";
    let flow = "down udp from 203.0.113.0/24 to 192.0.2.10:5000";
    daemon.grant(&format!("--provider video --flow '{flow}' {level}")).unwrap();
    let level = "--max-down 10mbit --enforcement police";
    let flow = "down udp from 203.0.113.0/24 to 192.0.2.10:5001";
    let policed = daemon.grant(&format!("--provider video --flow '{flow}' {level}")).unwrap().id;
    let flows = [net.stream(5_000, mbit(4)).unwrap(), net.stream(5_001, mbit(4)).unwrap()];
    achieves(&flows[0], mbit(4), "before");
    let before = daemon.counts(policed).unwrap().down;
    let measured = watched(&[&flows[0], &flows[1]], || {
        for round in 0..10 {
            let mut changed = config();
            if round % 2 == 0 {
                changed.lan_capacity = mbit(900);
                changed.soft_share = 0.9;
                changed.more.push_str("\nlink_rest = \"1mbit\"\nline_rest = \"64kbit\"");
                changed.interfaces.push(("later0", "wan"));
            }
            write(&daemon, &changed);
            let expected = ["soft_share", "line_rest", "link_rest", "interface lan0", "interface later0"];
            let said = reload(&daemon);
            for (key, said) in expected.iter().zip(&said) {
                assert!(said.starts_with(key), "{said} in the place of {key}");
            }
            assert_eq!(said.len(), expected.len(), "{said:?}");
        }
        assert_eq!(reload(&daemon), [""; 0], "the same again changes nothing");
    })
    .unwrap();
    for measured in &measured {
        assert_eq!((measured.lost, measured.reordered), (0, 0), "{:?}", Brief(measured));
    }
    let after = daemon.counts(policed).unwrap().down;
    assert!(after.passed.packets > before.passed.packets, "counters go on");
    assert_eq!(after.dropped.packets, 0);
    assert_eq!(daemon.statistics().unwrap().outcomes["lost_mark"], 0);
}

#[test]
fn what_is_concerned_changes() {
    let (net, daemon) = started();
    let rest = net.stream(6_000, mbit(60)).unwrap();
    achieves(&rest, mbit(50), "the line's speed");
    write(&daemon, &Config { lan_capacity: mbit(30), ..config() });
    assert_eq!(reload(&daemon), ["interface lan0"]);
    achieves(&rest, mbit(30), "the interface's capacity");
    assert_eq!(daemon.status().unwrap().link.down, mbit(30));
    let refused = daemon
        .grant("--provider video --flow 'down from 203.0.113.0/24 to 192.0.2.10' --guaranteed-down 40mbit")
        .unwrap_err();
    assert!(format!("{refused:#}").contains("left"), "admission has the new capacity: {refused:#}");

    // Observing: nothing is held back, and no class is left.
    write(&daemon, &Config { mode: "observe", ..config() });
    assert_eq!(reload(&daemon), ["mode", "interface lan0"]);
    achieves(&rest, mbit(60), "observing");
    assert!(classes(&net.gateway, LAN).is_empty() && classes(&net.gateway, WAN).is_empty());
    write(&daemon, &config());
    assert_eq!(reload(&daemon), ["mode"]);
    achieves(&rest, mbit(50), "enforcing again");

    // The hooks of one interface, by the signal.
    let text =
        daemon.config_text(&config()).unwrap().replace("name = \"wan0\"", "name = \"wan0\"\nxdp = \"off\"");
    fs::write(daemon.config_path(), text).unwrap();
    signal_reload(daemon, &net, &rest);
}

#[test]
fn sums_follow_the_configuration() {
    let (_net, daemon) = started();
    let mut port = 5_000;
    let mut grant = |rate: &str| {
        port += 1;
        let flow = format!("down udp from 203.0.113.0/24 to 192.0.2.10:{port}");
        daemon.grant(&format!("--provider video --flow '{flow}' --guaranteed-down {rate}"))
    };
    let with_rest = |rest: &str| {
        let mut config = config();
        config.more.push_str(&format!("\nline_rest = \"{rest}\""));
        config
    };
    let before = grant("1mbit").unwrap().id;
    write(&daemon, &with_rest("5mbit"));
    assert_eq!(reload(&daemon), ["line_rest"]);
    let refused = format!("{:#}", grant("45mbit").unwrap_err());
    assert!(refused.contains("44 Mbit/s"), "of 50 Mbit/s 5 are for the rest, and 1 is granted: {refused}");
    let more = grant("44mbit").unwrap().id;
    daemon.revoke(more).unwrap();
    daemon.revoke(before).unwrap();
    // A line that was there before the change goes with all of its sums.
    daemon.qos_line("session remove home").unwrap();
    daemon.qos_line("session add home --address 192.0.2.10 --down 900mbit --up 50mbit").unwrap();
    assert!(grant("896mbit").is_err());
    let all = grant("895mbit").unwrap().id;
    write(&daemon, &with_rest("20mbit"));
    let refused = format!("{:#}", daemon.qos_line("reload").unwrap_err());
    assert!(refused.contains("has less than what is granted"), "{refused}");
    daemon.revoke(all).unwrap();
    assert!(grant("896mbit").is_err(), "what was refused did not stay");
    grant("895mbit").unwrap();
}

fn signal_reload(mut daemon: Daemon, net: &Topology, rest: &RunningUdp) {
    let lan = programs(&net.gateway, LAN).unwrap();
    daemon.signal(Signal::SIGHUP).unwrap();
    eventually(Duration::from_secs(5), "tc judges at the WAN", || {
        daemon.status().unwrap().gateway.interfaces.iter().any(|found| found.judged == "tc")
    });
    assert_eq!(programs(&net.gateway, WAN).unwrap().0, None);
    assert_eq!(programs(&net.gateway, LAN).unwrap(), lan, "the other is not touched");
    achieves(rest, mbit(50), "judged by tc");
    assert!(daemon.log_tail().contains("SIGHUP: changed interface wan0"), "{}", daemon.log_tail());

    // Without an interface: what it had goes with it. With another role: likewise, and comes anew.
    fs::write(daemon.config_path(), daemon.config_text(&config()).unwrap().replace("wan0", "wan9")).unwrap();
    assert_eq!(reload(&daemon), ["interface wan0 (removed)", "interface wan9 (added)"]);
    assert_eq!(programs(&net.gateway, WAN).unwrap(), (None, vec![], vec![]));
    assert!(classes(&net.gateway, WAN).is_empty());
    achieves(rest, mbit(50), "judged at LAN egress");
    let swapped = Config { interfaces: vec![(LAN, "wan"), (WAN, "lan")], ..config() };
    write(&daemon, &swapped);
    reload(&daemon);
    let status = daemon.status().unwrap();
    let roles: Vec<_> = status
        .gateway
        .interfaces
        .iter()
        .map(|found| (found.name.as_str(), found.role.as_str(), found.judged.as_str()))
        .collect();
    assert_eq!(roles, [(LAN, "wan", "xdp"), (WAN, "lan", "xdp")]);
    write(&daemon, &config());
    reload(&daemon);
    achieves(rest, mbit(50), "as at the beginning");

    daemon.signal(Signal::SIGHUP).unwrap();
    eventually(Duration::from_secs(5), "nothing changed", || {
        daemon.log_tail().contains("SIGHUP: the configuration is as it was")
    });
}

fn classes(gateway: &Namespace, link: &str) -> Vec<u32> {
    let mut netlink = Netlink::open(gateway).unwrap();
    let index = netlink.link(link).unwrap().index;
    netlink.classes(index).unwrap().into_iter().map(|class| class.handle).collect()
}

#[test]
fn a_bad_configuration_is_refused_whole() {
    let (net, daemon) = started();
    let flow = "down udp from 203.0.113.0/24 to 192.0.2.10:5000";
    daemon.grant(&format!("--provider video --flow '{flow}' --guaranteed-down 40mbit")).unwrap();
    let whole = daemon.config_text(&config()).unwrap();
    let mut netlink = Netlink::open(&net.gateway).unwrap();
    let nobody = Namespace::new("nobody").unwrap();
    netlink.add_veth("spare0", "spare0", &nobody, 1_500).unwrap();
    let spare = netlink.link("spare0").unwrap().index;
    netlink.put_token_bucket(spare, mbit(1_000), 1_000_000, 100_000).unwrap();
    let before = Kernel::read(&daemon, &net.gateway).unwrap();

    let capacity = "capacity = \"1000000000bit\"";
    let another = format!("{whole}\n[[interface]]\nname = \"spare0\"\nrole = \"wan\"\n{capacity}\n");
    for (what, text, expected) in [
        ("not TOML", "mode = ".to_owned(), "not TOML"),
        ("an unknown key", format!("line_sied = \"lan\"\n{whole}"), "unknown key `line_sied`"),
        ("no interface", whole.split("[[interface]]").next().unwrap().to_owned(), "[[interface]]"),
        (
            "less than is granted",
            whole.replacen(capacity, "capacity = \"30mbit\"", 1),
            "has less than what is granted",
        ),
        (
            "another directory",
            whole.replace("/state\"", "/elsewhere\""),
            "state_dir can't change while qosd runs",
        ),
        ("other bits", format!("mark_mask = 0x0fffff00\n{whole}"), "mark_mask can't change"),
        // The kernel refuses after other things were done.
        (
            "a foreign qdisc",
            another.replace("soft_share = 0.95", "soft_share = 0.5"),
            "root queueing discipline is tbf",
        ),
    ] {
        fs::write(daemon.config_path(), text).unwrap();
        let output = daemon.qos_output(["reload"]).unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(expected), "{what}: {said}");
        let now = Kernel::read(&daemon, &net.gateway).unwrap();
        assert_eq!(before.differences(&now), [""; 0], "{what}");
        let status: Value = daemon.qos_line("status").unwrap();
        assert_eq!(status["gateway"]["interfaces"].as_array().unwrap().len(), 2, "{what}");
    }
    fs::write(daemon.config_path(), &whole).unwrap();
    assert_eq!(reload(&daemon), [""; 0]);
}
