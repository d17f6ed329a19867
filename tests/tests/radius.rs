//! RADIUS accounting to the real `qosd`, by the real `radclient`. Needs root.
#![expect(clippy::unwrap_used, reason = "a test and what it calls fail by panicking")]

use std::io::Write as _;
use std::net::{SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::time::Duration;

use qos_tests::ask::eventually;
use qos_tests::daemon::{Config, Daemon};
use qos_tests::skip::skip;
use qos_tests::topology::Topology;
use serde_json::Value;

const LISTEN: &str = "127.0.0.1";
const SECRET: &str = "testing123";

fn started() -> (Topology, Daemon) {
    let net = Topology::builder()
        .subscriber("home", &["192.0.2.10", "192.0.2.77"])
        .provider("video", &["203.0.113.10"])
        .build()
        .unwrap();
    let more = format!(
        r#"
[radius]
listen = ["{LISTEN}", "::1"]
line = ["agent-circuit-id", "user-name"]
[[radius.client]]
address = "127.0.0.0/8"
secret = "{SECRET}"
[[radius.client]]
address = "::1"
secret = "another secret"
"#
    );
    let daemon = Daemon::start(&net.gateway, &Config { more, ..Config::default() }).unwrap();
    (net, daemon)
}

/// Whether there is a `radclient`; skips the test where there is none.
fn has_radclient(test: &str) -> bool {
    let found = Command::new("radclient").arg("-v").output().is_ok();
    if !found {
        skip(test, "no `radclient` (Debian package freeradius-utils)");
    }
    found
}

/// Sends a request of these attributes once, and says whether it was acknowledged; `radclient` checks the answer.
fn send(net: &Topology, server: &str, secret: &str, attributes: &str) -> bool {
    let mut command = Command::new("radclient");
    command.args(["-r", "1", "-t", "3", server, "acct", secret]);
    command.stdin(Stdio::from(told(attributes)));
    let output = net.gateway.output(command).unwrap();
    output.status.success()
}

/// A file that holds a text, from its beginning.
fn told(text: &str) -> std::fs::File {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.reopen().unwrap()
}

fn acknowledged(net: &Topology, attributes: &str) {
    assert!(send(net, &format!("{LISTEN}:1813"), SECRET, attributes), "{attributes}");
}

/// The lines that are known to have an address.
fn lines(daemon: &Daemon, address: &str) -> Vec<Value> {
    daemon.qos_line(&format!("session find {address}")).unwrap()["items"].as_array().unwrap().clone()
}

fn line(daemon: &Daemon, address: &str) -> Value {
    let mut found = lines(daemon, address);
    assert_eq!(found.len(), 1, "{address}: {found:?}");
    found.remove(0)
}

fn session(status: &str, line: &str, key: &str, address: &str) -> String {
    format!(
        "Acct-Status-Type = {status}, User-Name = \"{line}\", Acct-Session-Id = \"{key}\", \
         NAS-Identifier = \"bras1\", NAS-IP-Address = 198.51.100.1, Framed-IP-Address = {address}"
    )
}

#[test]
fn a_line_is_known_when_its_start_is_acknowledged_and_down_after_its_stop() {
    if !has_radclient("a_line_is_known_when_its_start_is_acknowledged_and_down_after_its_stop") {
        return;
    }
    let (net, daemon) = started();
    let rates = "Actual-Data-Rate-Upstream = 5000000, Actual-Data-Rate-Downstream = 50000000, \
                 Access-Loop-Encapsulation = 0x020100, Framed-Protocol = PPP, \
                 Framed-IPv6-Prefix = 2001:db8:10::/64, Delegated-IPv6-Prefix = 2001:db8:1000::/56";
    acknowledged(&net, &format!("{}, {rates}", session("Start", "dsl-1", "a1", "192.0.2.10")));
    let known = line(&daemon, "192.0.2.10");
    assert_eq!((&known["line"], &known["key"]), (&"dsl-1".into(), &"bras1/a1".into()));
    assert_eq!((&known["source"], &known["bras"]), (&"radius".into(), &"bras1".into()));
    assert_eq!(known["rate"], serde_json::json!({"up": 5_000_000, "down": 50_000_000}));
    assert_eq!((&known["link_layer"], &known["overhead"]), (&"ptm".into(), &30.into()));
    assert_eq!(line(&daemon, "2001:db8:1000::7")["line"], "dsl-1");

    // What is granted follows it, as any line.
    daemon.qos_line("provider add video --kind application --network 203.0.113.0/24").unwrap();
    daemon
        .grant("--provider video --flow 'down udp from 203.0.113.0/24 to 192.0.2.10:5000' --max-down 4mbit")
        .unwrap();
    acknowledged(&net, &session("Interim-Update", "dsl-1", "a1", "192.0.2.77"));
    assert!(lines(&daemon, "192.0.2.10").is_empty());
    assert_eq!(line(&daemon, "192.0.2.77")["down_since"], Value::Null);

    // Of another session of it, which has ended long since.
    acknowledged(&net, &session("Stop", "dsl-1", "a0", "192.0.2.10"));
    assert_eq!(line(&daemon, "192.0.2.77")["down_since"], Value::Null);
    acknowledged(&net, &session("Stop", "dsl-1", "a1", "192.0.2.77"));
    assert_ne!(line(&daemon, "192.0.2.77")["down_since"], Value::Null);
}

#[test]
fn a_bras_that_starts_again_takes_its_lines_with_it() {
    if !has_radclient("a_bras_that_starts_again_takes_its_lines_with_it") {
        return;
    }
    let (net, daemon) = started();
    acknowledged(&net, &session("Start", "dsl-1", "a1", "192.0.2.10"));
    acknowledged(&net, &session("Start", "dsl-2", "a2", "192.0.2.11"));
    let other = session("Start", "dsl-3", "a3", "192.0.2.12").replace("bras1", "bras2");
    acknowledged(&net, &other);
    acknowledged(&net, "Acct-Status-Type = Accounting-On, NAS-Identifier = \"bras1\", Acct-Delay-Time = 0");
    for (address, is_down) in [("192.0.2.10", true), ("192.0.2.11", true), ("192.0.2.12", false)] {
        assert_eq!(line(&daemon, address)["down_since"].is_null(), !is_down, "{address}");
    }
}

#[test]
fn what_is_not_signed_with_the_secret_is_neither_answered_nor_believed() {
    if !has_radclient("what_is_not_signed_with_the_secret_is_neither_answered_nor_believed") {
        return;
    }
    let (net, daemon) = started();
    let start = session("Start", "dsl-1", "a1", "192.0.2.10");
    assert!(!send(&net, &format!("{LISTEN}:1813"), "wrong", &start));
    assert!(!send(&net, "[::1]:1813", SECRET, &start));
    assert!(lines(&daemon, "192.0.2.10").is_empty());
    let statistics = daemon.status().unwrap().sources.radius.unwrap();
    assert_eq!((statistics.received, statistics.dropped.wrong_secret), (2, 2));
    assert!(send(&net, "[::1]:1813", "another secret", &start));
    assert_eq!(line(&daemon, "192.0.2.10")["line"], "dsl-1");

    // Whatever else comes does no harm.
    let socket = net.gateway.run(|| UdpSocket::bind("127.0.0.1:0")).unwrap();
    let server = SocketAddr::from(([127, 0, 0, 1], 1_813));
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..2_000 {
        let length = random.usize(0..300);
        let bytes: Vec<u8> = (0..length).map(|_| random.u8(..)).collect();
        socket.send_to(&bytes, server).unwrap();
    }
    eventually(Duration::from_secs(20), "all of it is dropped", || {
        let statistics = daemon.status().unwrap().sources.radius.unwrap();
        statistics.dropped.malformed + statistics.dropped.other_code + statistics.dropped.wrong_secret > 1_000
    });
    acknowledged(&net, &session("Stop", "dsl-1", "a1", "192.0.2.10"));
}

#[test]
fn what_was_acknowledged_is_known_after_a_crash() {
    if !has_radclient("what_was_acknowledged_is_known_after_a_crash") {
        return;
    }
    let (net, mut daemon) = started();
    for number in 1..=4 {
        acknowledged(&net, &session("Start", &format!("dsl-{number}"), "a", &format!("192.0.2.{number}")));
        daemon.kill().unwrap();
        daemon.restart().unwrap();
        for number in 1..=number {
            assert_eq!(line(&daemon, &format!("192.0.2.{number}"))["line"], format!("dsl-{number}"));
        }
    }
}
