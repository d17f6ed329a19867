//! Sessions that the real FreeRADIUS writes into SQLite, PostgreSQL and MariaDB, as `qosd` knows them. Needs root.
#![expect(clippy::unwrap_used, reason = "a test and what it calls fail by panicking")]

use std::time::Duration;

use qos_tests::ask::eventually;
use qos_tests::daemon::{Config, Daemon};
use qos_tests::freeradius::{FreeRadius, Kind};
use qos_tests::skip::skip;
use qos_tests::topology::Topology;
use qos_userspace::source::radacct::RadacctStatus;
use serde_json::Value;

/// How long what a BRAS told may take to be known.
const SOON: Duration = Duration::from_secs(20);

/// FreeRADIUS, and `qosd` that reads what it writes; skips the test where a package is missing.
fn started(test: &str, kind: Kind) -> Option<(Topology, FreeRadius, Daemon)> {
    if let Some(package) = kind.missing() {
        skip(test, &format!("no Debian package {package}"));
        return None;
    }
    let net = Topology::builder()
        .subscriber("home", &["192.0.2.10"])
        .provider("video", &["203.0.113.10"])
        .build()
        .unwrap();
    let radius = FreeRadius::start(&net.gateway, kind).unwrap();
    let more = format!("[radacct]\nurl = {:?}\npoll = \"300ms\"\n", radius.url());
    let daemon = Daemon::start(&net.gateway, &Config { more, ..Config::default() }).unwrap();
    Some((net, radius, daemon))
}

fn account(radius: &FreeRadius, status: &str, line: &str, key: &str, address: &str) {
    let request = format!(
        "Acct-Status-Type = {status}, User-Name = \"{line}\", Acct-Session-Id = \"{key}\", \
         NAS-IP-Address = 198.51.100.1, Framed-IP-Address = {address}, \
         Framed-IPv6-Prefix = 2001:db8:{key}::/64, Delegated-IPv6-Prefix = 2001:db8:{key}00::/56"
    );
    radius.account(&request).unwrap();
}

fn lines(daemon: &Daemon, address: &str) -> Vec<Value> {
    daemon.qos_line(&format!("session find {address}")).unwrap()["items"].as_array().unwrap().clone()
}

fn is_up(daemon: &Daemon, address: &str, line: &str) -> bool {
    matches!(&lines(daemon, address)[..], [one] if one["line"] == line && one["down_since"].is_null())
}

fn is_down(daemon: &Daemon, address: &str) -> bool {
    lines(daemon, address).iter().all(|line| !line["down_since"].is_null())
}

fn status(daemon: &Daemon) -> RadacctStatus {
    daemon.status().unwrap().sources.radacct.unwrap()
}

fn sessions_are_followed(radius: &mut FreeRadius, daemon: &mut Daemon) {
    account(radius, "Start", "dsl-1", "a1", "192.0.2.10");
    eventually(SOON, "it is up", || is_up(daemon, "192.0.2.10", "dsl-1"));
    for address in ["2001:db8:a1::7", "2001:db8:a100:ff::7"] {
        assert!(is_up(daemon, address, "dsl-1"), "{address}");
    }
    let known = lines(daemon, "192.0.2.10").remove(0);
    assert_eq!((&known["source"], &known["bras"]), (&"radacct".into(), &"198.51.100.1".into()));

    account(radius, "Interim-Update", "dsl-1", "a1", "192.0.2.77");
    eventually(SOON, "it is at another address", || is_up(daemon, "192.0.2.77", "dsl-1"));
    account(radius, "Stop", "dsl-1", "a1", "192.0.2.77");
    eventually(SOON, "it is down", || is_down(daemon, "192.0.2.77"));

    account(radius, "Start", "dsl-2", "a2", "192.0.2.20");
    account(radius, "Start", "dsl-3", "a3", "192.0.2.30");
    eventually(SOON, "both are up", || {
        is_up(daemon, "192.0.2.20", "dsl-2") && is_up(daemon, "192.0.2.30", "dsl-3")
    });
    // What ends while nobody looks.
    daemon.terminate().unwrap();
    account(radius, "Stop", "dsl-2", "a2", "192.0.2.20");
    daemon.restart().unwrap();
    eventually(SOON, "one is down", || is_down(daemon, "192.0.2.20"));
    assert!(is_up(daemon, "192.0.2.30", "dsl-3"));

    account(radius, "Start", "dsl-4", "a4", "192.0.2.30");
    eventually(SOON, "the newer has the address", || is_up(daemon, "192.0.2.30", "dsl-4"));
    eventually(SOON, "the other is counted", || status(daemon).contested == 1);

    radius.stop_database().unwrap();
    radius.start_database().unwrap();
    // Of the second after the last start, since FreeRADIUS ends only what began before.
    std::thread::sleep(Duration::from_millis(1_100));
    radius
        .account("Acct-Status-Type = Accounting-On, Acct-Session-Id = \"0\", NAS-IP-Address = 198.51.100.1")
        .unwrap();
    eventually(SOON, "its BRAS has started again", || is_down(daemon, "192.0.2.30"));
    eventually(SOON, "nothing is open", || status(daemon).open == 0);
    assert_eq!((status(daemon).error, status(daemon).refused), (None, 0));
}

#[test]
fn sessions_in_sqlite_are_followed() {
    let Some((_net, mut radius, mut daemon)) = started("sessions_in_sqlite_are_followed", Kind::Sqlite)
    else {
        return;
    };
    sessions_are_followed(&mut radius, &mut daemon);
}

#[test]
fn sessions_in_postgresql_are_followed() {
    let Some((_net, mut radius, mut daemon)) = started("sessions_in_postgresql_are_followed", Kind::Postgres)
    else {
        return;
    };
    sessions_are_followed(&mut radius, &mut daemon);
}

#[test]
fn sessions_in_mariadb_are_followed() {
    let Some((_net, mut radius, mut daemon)) = started("sessions_in_mariadb_are_followed", Kind::MariaDb)
    else {
        return;
    };
    sessions_are_followed(&mut radius, &mut daemon);
}

#[test]
fn a_database_that_is_away_is_told_and_read_again() {
    let test = "a_database_that_is_away_is_told_and_read_again";
    let Some((_net, mut radius, daemon)) = started(test, Kind::Postgres) else { return };
    account(&radius, "Start", "dsl-1", "a1", "192.0.2.10");
    eventually(SOON, "it is up", || is_up(&daemon, "192.0.2.10", "dsl-1"));
    radius.stop_database().unwrap();
    eventually(SOON, "it is told", || status(&daemon).error.is_some());
    assert!(is_up(&daemon, "192.0.2.10", "dsl-1"), "nothing is known to have ended");
    radius.start_database().unwrap();
    account(&radius, "Stop", "dsl-1", "a1", "192.0.2.10");
    eventually(SOON, "it is read again", || is_down(&daemon, "192.0.2.10"));
    assert_eq!(status(&daemon).error, None);
}
