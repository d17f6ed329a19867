//! Lines that sources tell of: over a real socket with a real store, and the service by itself.

use std::collections::BTreeMap;
use std::time::Instant;

use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::service::{Operations as _, ServiceError};
use super::testing::{Recorder, TestDaemon, grant, service};
use crate::domain::subscriber::{Event, Facts, Report};
use crate::domain::{BitsPerSecond, Directed, Name, Subscriber};
use crate::manager::record::Actor;
use crate::manager::subscriber::{SubscriberQuery, Taken};
use crate::manager::{Change, Command, RefusalCode, SlotKind};

fn at(seconds: i64) -> Timestamp {
    "2026-01-01T00:00:00Z".parse::<Timestamp>().unwrap() + SignedDuration::from_secs(seconds)
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn up_at(seconds: i64, line: &str, key: &str, addresses: &[&str]) -> Report {
    let facts = Facts {
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        rate: Directed { up: Some(BitsPerSecond(2_000_000)), down: Some(BitsPerSecond(20_000_000)) },
        bras: Some("bras1".to_owned()),
        ..Facts::default()
    };
    let event = Event::Up { line: name(line), key: Some(key.to_owned()), facts };
    Report { source: None, at: at(seconds), event }
}

fn down_at(seconds: i64, line: &str, key: &str) -> Report {
    let event = Event::Down { line: name(line), key: Some(key.to_owned()) };
    Report { source: None, at: at(seconds), event }
}

/// Tells a daemon, and returns what became of each report.
fn tell(daemon: &TestDaemon, reports: &[Report]) -> Vec<Taken> {
    let answer = daemon.must("POST", "/v1/subscribers", &json!({ "reports": reports }).to_string());
    serde_json::from_value(answer["items"].clone()).unwrap()
}

fn found(daemon: &TestDaemon, query: &str) -> Vec<Subscriber> {
    let answer = daemon.must("GET", &format!("/v1/subscribers?{query}"), "");
    serde_json::from_value(answer["items"].clone()).unwrap()
}

fn changed() -> Taken {
    Taken::Changed(Vec::new())
}

/// A provider, and a line that is known and not in service, at the address that [`grant`] is for.
fn furnished(more: &str) -> TestDaemon {
    let daemon = TestDaemon::start_with(more);
    daemon.must(
        "POST",
        "/v1/providers",
        r#"{"name":"acme","kind":"application","networks":["203.0.113.0/24"]}"#,
    );
    daemon
}

fn sessions(daemon: &TestDaemon) -> Vec<Value> {
    daemon.must("GET", "/v1/sessions", "")["items"].as_array().unwrap().clone()
}

#[test]
fn a_line_comes_into_service_with_the_first_grant_on_it() {
    let daemon = furnished("");
    let line = up_at(0, "dsl-1", "1", &["192.0.2.10/32", "2001:db8:1::/56"]);
    assert_eq!(tell(&daemon, &[line]), [changed()]);
    assert_eq!(sessions(&daemon), [] as [Value; 0]);

    let tried = daemon.must("POST", "/v1/allocations?dry_run=true", &grant(5_000, "5mbit", ""));
    assert_eq!(tried["result"]["session"], "dsl-1");
    assert_eq!(sessions(&daemon), [] as [Value; 0]);
    let (status, refused) = daemon.ask("POST", "/v1/allocations", &grant(5_000, "25mbit", ""));
    assert_eq!((status, &refused["error"]["code"]), (409, &json!("insufficient_capacity")), "{refused}");
    assert_eq!(sessions(&daemon), [] as [Value; 0]);

    let granted = daemon.must("POST", "/v1/allocations", &grant(5_000, "5mbit", ""));
    assert_eq!(granted["result"]["session"], "dsl-1");
    match daemon.recorder.record().applied.last_chunk().unwrap() {
        [Change::PutSession(session), Change::PutAllocation(_)] => {
            assert!(session.on_demand && session.addresses.len() == 2, "{session:?}");
        }
        other => panic!("{other:?}"),
    }
    let decisions = daemon.must("GET", "/v1/decisions?session=dsl-1&verdict=done", "");
    let actions: Vec<_> = decisions["items"].as_array().unwrap().iter().map(|item| &item["action"]).collect();
    assert_eq!(actions, ["start_session", "grant"]);
    let before = sessions(&daemon);
    let daemon = daemon.restart();
    assert_eq!(sessions(&daemon), before);
    // The second finds it in service.
    daemon.must("POST", "/v1/allocations", &grant(5_001, "5mbit", ""));
    assert_eq!(sessions(&daemon), before);
}

#[test]
fn a_line_that_is_down_or_of_unknown_speed_gets_nothing() {
    let daemon = furnished("");
    tell(&daemon, &[up_at(0, "dsl-1", "1", &["192.0.2.10/32"]), down_at(5, "dsl-1", "1")]);
    let (status, refused) = daemon.ask("POST", "/v1/allocations", &grant(5_000, "5mbit", ""));
    assert_eq!(refused["error"]["code"], "session_down", "{status} {refused}");

    let mut unknown = up_at(10, "dsl-1", "2", &["192.0.2.10/32"]);
    if let Event::Up { facts, .. } = &mut unknown.event {
        facts.rate.down = None;
    }
    tell(&daemon, &[unknown.clone()]);
    let (_, refused) = daemon.ask("POST", "/v1/allocations", &grant(5_000, "5mbit", ""));
    let message = refused["error"]["message"].as_str().unwrap();
    assert!(message.contains("`line_rate_down`"), "{message}");

    let daemon = furnished("line_rate_down = '10mbit'");
    tell(&daemon, &[unknown]);
    daemon.must("POST", "/v1/allocations", &grant(5_000, "5mbit", ""));
    assert_eq!(sessions(&daemon)[0]["rate"]["down"], 10_000_000);
}

#[test]
fn a_source_that_falls_silent_is_not_believed_for_longer_than_the_time_to_live() {
    let daemon = furnished("session_ttl = '1h'");
    let mut stale = up_at(0, "dsl-1", "1", &["192.0.2.10/32"]);
    stale.source = Some(name("radius"));
    tell(&daemon, &[stale.clone()]);
    let (_, refused) = daemon.ask("POST", "/v1/allocations", &grant(5_000, "5mbit", ""));
    assert_eq!(refused["error"]["code"], "session_down", "{refused}");
    stale.at = Timestamp::now();
    assert_eq!(tell(&daemon, &[stale]), [changed()]);
    daemon.must("POST", "/v1/allocations", &grant(5_000, "5mbit", ""));
}

#[test]
fn a_line_in_service_follows_what_is_told() {
    let daemon = furnished("session_grace = '1h'");
    tell(&daemon, &[up_at(0, "dsl-1", "1", &["192.0.2.10/32"])]);
    daemon.must("POST", "/v1/allocations", &grant(5_000, "5mbit", ""));
    assert_eq!(tell(&daemon, &[down_at(5, "dsl-1", "1")]).len(), 1);
    assert!(sessions(&daemon)[0]["down_since"].is_string());
    assert_eq!(tell(&daemon, &[up_at(6, "dsl-1", "2", &["192.0.2.99/32"])]), [changed()]);
    assert_eq!(sessions(&daemon)[0]["addresses"], json!(["192.0.2.99/32"]));
    let allocation = daemon.must("GET", "/v1/allocations/1", "");
    assert_eq!(allocation["selectors"][0]["destination"], "192.0.2.99/32");

    // Another line takes over the address of one in service: what was granted there must not be the other's.
    let taken = tell(&daemon, &[up_at(7, "dsl-2", "3", &["192.0.2.99/32"])]);
    let Taken::Changed(warnings) = &taken[0] else { panic!("{taken:?}") };
    assert!(warnings.iter().any(|warning| warning.contains("dsl-1")), "{warnings:?}");
    assert_eq!(daemon.must("GET", "/v1/allocations/1", "")["status"], "unavailable");
    let held = found(&daemon, "address=192.0.2.99");
    assert_eq!(held.iter().map(|known| known.line.as_str()).collect::<Vec<_>>(), ["dsl-2"]);
    let displaced = found(&daemon, "line=dsl-1").pop().unwrap();
    assert_eq!(displaced.reason.as_deref(), Some("its address went to line dsl-2"));
    assert_eq!((displaced.down_since, displaced.facts.addresses.len()), (Some(at(7)), 0));
}

#[test]
fn each_report_gets_the_warnings_of_its_own_line() {
    let daemon = furnished("");
    let lines = [up_at(0, "dsl-0", "1", &["192.0.2.9/32"]), up_at(0, "dsl-1", "1", &["192.0.2.10/32"])];
    tell(&daemon, &lines);
    daemon.must("POST", "/v1/allocations", &grant(5_000, "1mbit", ""));
    daemon.must("POST", "/v1/allocations", &grant(5_000, "1mbit", "").replace("192.0.2.10", "192.0.2.9"));
    daemon.must(
        "POST",
        "/v1/sessions",
        r#"{"name":"named","addresses":["192.0.2.50/32"],"rate":{"down":"20mbit","up":"2mbit"}}"#,
    );
    // The first only lives; the second takes an address that an operator gave to another.
    let taken = tell(&daemon, &[lines[0].clone(), up_at(1, "dsl-1", "1", &["192.0.2.50/32"])]);
    assert_eq!(taken[0], Taken::Unchanged);
    let Taken::Changed(warnings) = &taken[1] else { panic!("{taken:?}") };
    assert!(warnings[0].starts_with("in service it stays as it was: "), "{warnings:?}");
}

#[test]
fn what_an_operator_named_is_not_changed_by_a_source() {
    let daemon = TestDaemon::start();
    daemon.furnish();
    let mut report = up_at(0, "dsl-1", "1", &["192.0.2.77/32"]);
    report.source = Some(name("radius"));
    let taken = tell(&daemon, &[report]);
    assert_eq!(
        taken,
        [Taken::Changed(vec!["in service line dsl-1 stays as it was: an operator named it".to_owned()])]
    );
    assert_eq!(sessions(&daemon)[0]["addresses"], json!(["192.0.2.10/32"]));
}

#[test]
fn of_two_sessions_the_later_counts_whatever_order_they_are_told_in() {
    let (first, second) = (up_at(10, "a", "1", &["192.0.2.10/32"]), up_at(20, "a", "2", &["192.0.2.11/32"]));
    let ends = [down_at(15, "a", "1"), down_at(30, "a", "2")];
    for (reports, is_up, last) in [
        (vec![&first, &second, &ends[0]], true, "2"),
        (vec![&second, &first, &ends[0]], true, "2"),
        (vec![&first, &ends[0], &second, &ends[1]], false, "2"),
        (vec![&first, &ends[0], &first], false, "1"),
        (vec![&ends[0]], false, ""),
    ] {
        let daemon = TestDaemon::start();
        for report in &reports {
            tell(&daemon, &[(*report).clone()]);
        }
        let known = found(&daemon, "line=a").pop();
        assert_eq!(known.as_ref().is_some_and(|known| known.down_since.is_none()), is_up, "{reports:?}");
        let key = known.and_then(|known| known.key).unwrap_or_default();
        assert_eq!(key, last, "{reports:?}");
    }
}

#[test]
fn the_older_of_two_lines_at_one_address_stays_down_until_it_begins_again() {
    let daemon = TestDaemon::start();
    tell(&daemon, &[up_at(10, "old", "1", &["192.0.2.0/24"]), up_at(20, "new", "2", &["192.0.2.7/32"])]);
    // It does not know yet, and is still told to be up.
    assert_eq!(tell(&daemon, &[up_at(25, "old", "1", &["192.0.2.0/24"])]), [Taken::Unchanged]);
    assert_eq!(found(&daemon, "address=192.0.2.7")[0].line, name("new"));
    assert_eq!(found(&daemon, "address=192.0.2.8"), []);
    let taken = tell(&daemon, &[up_at(30, "old", "3", &["192.0.2.0/24"])]);
    assert_eq!(taken, [Taken::Changed(vec!["line new is down: its address went to line old".to_owned()])]);
    assert_eq!(found(&daemon, "address=192.0.2.7")[0].line, name("old"));
}

#[test]
fn a_bras_that_starts_again_has_no_lines() {
    let daemon = TestDaemon::start();
    let reports: Vec<_> =
        (0..5).map(|host| up_at(host, &format!("l{host}"), "k", &[&format!("192.0.2.{host}/32")])).collect();
    tell(&daemon, &reports);
    let event = Event::BrasDown { bras: "bras1".to_owned() };
    tell(&daemon, &[Report { source: Some(name("other")), at: at(3), event: event.clone() }]);
    assert_eq!(found(&daemon, "up=true").len(), 5);
    assert_eq!(tell(&daemon, &[Report { source: None, at: at(3), event }]), [changed()]);
    // One came up after it.
    let up: Vec<_> = found(&daemon, "bras=bras1&up=true").into_iter().map(|known| known.line).collect();
    assert_eq!(up, [name("l4")]);
}

#[test]
fn what_can_not_be_is_refused_and_the_rest_is_taken() {
    let daemon = TestDaemon::start();
    type Spoil = fn(&mut Facts);
    let cases: [(Spoil, &str); 8] = [
        (|facts| facts.addresses.clear(), "addresses: nothing is too little"),
        (|facts| facts.addresses = vec!["192.0.2.1/24".parse().unwrap()], "addresses"),
        (|facts| facts.addresses.push("192.0.2.0/24".parse().unwrap()), "overlaps"),
        (
            |facts| {
                facts.addresses =
                    (0..17).map(|host| IpNet::from(std::net::IpAddr::from([10, 0, 0, host]))).collect();
            },
            "17 are too many",
        ),
        (|facts| facts.rate.down = Some(BitsPerSecond(0)), "rate.down"),
        (|facts| facts.overhead = Some(300), "overhead"),
        (|facts| facts.loss_ppm = 1_000_001, "loss_ppm"),
        (|facts| facts.bras = Some(String::new()), "bras"),
    ];
    for (spoil, told) in cases {
        let mut bad = up_at(0, "bad", "1", &["192.0.2.7/32"]);
        if let Event::Up { facts, .. } = &mut bad.event {
            spoil(facts);
        }
        let taken = tell(&daemon, &[bad, up_at(0, "good", "1", &["192.0.2.8/32"])]);
        assert!(matches!(&taken[0], Taken::Refused(why) if why.contains(told)), "{told}: {taken:?}");
        assert_eq!(found(&daemon, "").len(), 1, "{told}");
    }
    let (status, _) = daemon.ask("POST", "/v1/subscribers", r#"{"reports":[{"at":"x"}]}"#);
    assert_eq!(status, 400);
    assert_eq!(daemon.ask("GET", "/v1/subscribers?limit=0", "").0, 400);
    let decisions = daemon.must("GET", "/v1/decisions?session=bad&verdict=refused", "");
    assert_eq!(decisions["items"].as_array().map(Vec::len), Some(8), "{decisions}");
}

#[test]
fn changes_are_followed_by_their_numbers() {
    let daemon = TestDaemon::start();
    let reports: Vec<_> =
        (0..7).map(|host| up_at(0, &format!("l{host}"), "k", &[&format!("192.0.2.{host}/32")])).collect();
    tell(&daemon, &reports);
    let (mut after, mut seen) = (0, Vec::new());
    loop {
        let page = found(&daemon, &format!("after={after}&limit=3"));
        let Some(last) = page.last() else { break };
        after = last.sequence;
        seen.extend(page.into_iter().map(|known| known.line.to_string()));
    }
    assert_eq!(seen, ["l0", "l1", "l2", "l3", "l4", "l5", "l6"]);
    // A sign of life is no change; a new address is one.
    let again = [up_at(1, "l2", "k", &["192.0.2.2/32"]), up_at(1, "l4", "k", &["192.0.2.44/32"])];
    assert_eq!(tell(&daemon, &again), [Taken::Unchanged, changed()]);
    let daemon = daemon.restart();
    tell(&daemon, &[down_at(2, "l1", "k")]);
    let lines: Vec<_> =
        found(&daemon, &format!("after={after}")).into_iter().map(|known| known.line).collect();
    assert_eq!(lines, [name("l4"), name("l1")]);
}

#[test]
fn reports_that_cannot_be_written_change_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut service = service(directory.path(), &Recorder::default(), usize::MAX).unwrap();
    let actor = Actor::Source(name("test"));
    let request = serde_json::from_str(&grant(5_000, "5mbit", "")).unwrap();
    service.take_reports(&[up_at(0, "dsl-1", "1", &["192.0.2.10/32"])], &actor).unwrap();
    let provider = r#"{"name":"acme","kind":"application","networks":["203.0.113.0/24"]}"#;
    service.execute(Command::AddProvider(serde_json::from_str(provider).unwrap()).into()).unwrap();
    service.execute(Command::Grant(request).into()).unwrap();
    let all = SubscriberQuery::default();
    let (state, known) = (service.state().clone(), service.subscribers(&all).unwrap());

    service.give_room(0);
    // A line in service that would follow, and one that is not.
    let reports = [up_at(5, "dsl-1", "2", &["192.0.2.11/32"]), up_at(5, "dsl-2", "1", &["192.0.2.12/32"])];
    let error = service.take_reports(&reports, &actor).unwrap_err();
    assert!(matches!(error, ServiceError::Unwritten(_)), "{error:?}");
    let error = service.take_reports(&reports[1..], &actor).unwrap_err();
    assert!(matches!(error, ServiceError::Store(_)), "{error:?}");
    assert_eq!(service.subscribers(&all).unwrap(), known);
    assert_eq!(service.state(), &state);
    service.give_room(usize::MAX);
    assert_eq!(service.take_reports(&reports, &actor).unwrap(), [changed(), changed()]);
}

#[test]
fn an_idle_line_makes_room_for_another() {
    let directory = tempfile::tempdir().unwrap();
    let recorder = Recorder::default();
    let mut service = service(directory.path(), &recorder, usize::MAX).unwrap();
    let most = usize::from(SlotKind::Session.last());
    let actor = Actor::Source(name("test"));
    let provider = r#"{"name":"acme","kind":"application","networks":["203.0.113.0/24"]}"#;
    service.execute(Command::AddProvider(serde_json::from_str(provider).unwrap()).into()).unwrap();
    let address = |host: usize| format!("10.0.{}.{}/32", host / 256, host % 256);
    let reports: Vec<_> = (0..=most)
        .map(|host| {
            let mut report = up_at(0, &format!("l{host}"), "k", &[&address(host)]);
            if let Event::Up { facts, .. } = &mut report.event {
                facts.rate = Directed { up: Some(BitsPerSecond(64_000)), down: Some(BitsPerSecond(64_000)) };
            }
            report
        })
        .collect();
    service.take_reports(&reports, &actor).unwrap();
    let ask = |host: usize| {
        let text = format!(
            r#"{{"provider":"acme","selectors":["down udp from 203.0.113.0/24 to {}"],"level":{{"maximum":{{"down":"10kbit"}},"enforcement":"police"}}}}"#,
            address(host)
        );
        Command::Grant(serde_json::from_str(&text).unwrap())
    };
    let all: Vec<_> = (0..most).map(|host| ask(host).into()).collect();
    assert!(service.execute_all(&all).iter().all(Result::is_ok));
    match service.execute(ask(most).into()) {
        Err(ServiceError::Refused(refusal)) => assert_eq!(refusal.code, RefusalCode::InsufficientSlots),
        other => panic!("{other:?}"),
    }
    let (id, line) =
        service.state().allocations.values().nth(3).map(|known| (known.id, known.session.clone())).unwrap();
    service.execute(Command::Revoke { id }.into()).unwrap();
    assert_eq!(service.state().sessions.len(), most);
    service.execute(ask(most).into()).unwrap();
    assert_eq!(service.state().sessions.len(), most);
    assert!(!service.state().sessions.contains_key(&line.unwrap()));
}

/// Whatever is told in whatever order, no address is of two lines, and the line of an address is found.
#[test]
fn no_history_gives_an_address_to_two_lines() {
    let prefixes = [
        "10.0.0.0/30",
        "10.0.0.0/31",
        "10.0.0.1/32",
        "10.0.0.2/32",
        "2001:db8::/48",
        "2001:db8::/64",
        "::/1",
    ];
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    for history in 0..20 {
        let directory = tempfile::tempdir().unwrap();
        let mut service = service(directory.path(), &Recorder::default(), usize::MAX).unwrap();
        let mut sequence = 0;
        for step in 0..60 {
            let (line, key) = (format!("l{}", random.u8(..4)), random.u8(..3).to_string());
            let seconds = (step - random.i64(0..4)).max(0);
            let report = match random.u8(..8) {
                0..=4 => up_at(seconds, &line, &key, &[prefixes[random.usize(..prefixes.len())]]),
                5 | 6 => down_at(seconds, &line, &key),
                _ => Report {
                    source: None,
                    at: at(seconds),
                    event: Event::BrasDown { bras: "bras1".to_owned() },
                },
            };
            let before = service.subscribers(&SubscriberQuery::default()).unwrap();
            let taken = service.take_reports(&[report], &Actor::Daemon).unwrap();
            let all = service.subscribers(&SubscriberQuery::default()).unwrap();
            let told = format!("seed {seed}, history {history}, step {step}: {all:?}");
            assert_eq!(matches!(taken[0], Taken::Changed(_)), all != before, "{told}");
            let last = all.last().map_or(0, |known| known.sequence);
            assert!(last >= sequence && (last > sequence) == (all != before), "{told}");
            sequence = last;
            let mut held: BTreeMap<IpNet, &Subscriber> = BTreeMap::new();
            for known in &all {
                for address in &known.facts.addresses {
                    for (other, holder) in &held {
                        assert!(!other.contains(address) && !address.contains(other), "{told}: {holder:?}");
                    }
                    held.insert(*address, known);
                    let query =
                        SubscriberQuery { address: Some(address.broadcast()), ..SubscriberQuery::default() };
                    assert_eq!(service.subscribers(&query).unwrap(), std::slice::from_ref(known), "{told}");
                }
            }
        }
    }
}

/// Not among the tests that always run: a million lines take half a minute.
#[test]
#[ignore = "takes half a minute; prints figures"]
fn time_of_a_million_lines() {
    const LINES: u32 = 1_000_000;
    let directory = tempfile::tempdir().unwrap();
    let mut service = service(directory.path(), &Recorder::default(), usize::MAX).unwrap();
    let resident = || {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4 / 1024
    };
    let (before, begin) = (resident(), Instant::now());
    let address = |line: u32| std::net::Ipv4Addr::from(0x0a00_0000 + line);
    for first in (0..LINES).step_by(2_000) {
        let reports: Vec<_> = (first..first + 2_000)
            .map(|line| {
                let addresses = [
                    format!("{}/32", address(line)),
                    format!("2001:db8:{:x}:{:x}00::/56", line >> 8, line & 0xff),
                ];
                up_at(0, &format!("line-{line}"), "k", &[&addresses[0], &addresses[1]])
            })
            .collect();
        let taken = service.take_reports(&reports, &Actor::Daemon).unwrap();
        assert!(taken.iter().all(|taken| *taken == changed()));
    }
    let whole = begin.elapsed().as_secs_f64();
    let mut times: Vec<_> = (0..20_000)
        .map(|_| {
            let line = fastrand::u32(..LINES);
            let query = SubscriberQuery { address: Some(address(line).into()), ..SubscriberQuery::default() };
            let begin = Instant::now();
            let found = service.subscribers(&query).unwrap();
            let time = begin.elapsed().as_secs_f64() * 1e6;
            assert_eq!(found[0].line.as_str(), format!("line-{line}"));
            time
        })
        .collect();
    times.sort_by(f64::total_cmp);
    println!(
        "{LINES} lines with two prefixes each: taken in {whole:.1} s; found by address in {:.1} µs (median), {:.1} µs \
         (99th percentile); {} MiB more resident",
        times[times.len() / 2],
        times[times.len() * 99 / 100],
        resident() - before
    );
}
