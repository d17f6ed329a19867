//! The API over a real socket with a real store, and the service by itself.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::service::{Asked, Operations as _, ServiceError};
use super::testing::{Recorder, TestDaemon, ask, grant, service};
use crate::domain::{AllocationId, BitsPerSecond, Contract, Directed, Name, ProviderKind};
use crate::manager::record::{RecordQuery, Verdict};
use crate::manager::{Change, Command, NewProvider, RefusalCode};

const LIMIT: Duration = Duration::from_secs(10);

/// Waits for something that another thread brings about.
fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn text<'v>(value: &'v Value, pointer: &str) -> &'v str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_else(|| panic!("{pointer} in {value}"))
}

fn ids(daemon: &TestDaemon) -> Vec<u64> {
    let listing = daemon.must("GET", "/v1/allocations", "");
    let items = listing["items"].as_array().expect("items");
    items.iter().map(|item| item["id"].as_u64().expect("id")).collect()
}

#[test]
fn a_grant_is_written_enforced_listed_and_revoked() {
    let daemon = TestDaemon::start();
    daemon.furnish();
    let before = daemon.recorder.record().applied.len();

    let (status, answer) =
        daemon.ask("POST", "/v1/allocations", &grant(5_000, "5mbit", r#","application":"video""#));
    assert_eq!(status, 201, "{answer}");
    assert_eq!(answer["result"]["id"], 1);
    assert_eq!(answer["result"]["status"], "available");
    assert_eq!(answer["result"]["session"], "dsl-1");
    assert_eq!(answer["dry_run"], false);
    match daemon.recorder.record().applied[before..].as_ref() {
        [Change::PutAllocation(allocation)] => assert_eq!(allocation.id, AllocationId(1)),
        other => panic!("{other:?}"),
    }

    assert_eq!(ids(&daemon), [1]);
    let shown = daemon.must("GET", "/v1/allocations/1", "");
    assert_eq!(shown, answer["result"]);
    assert_eq!(daemon.must("GET", "/v1/allocations?provider=other", "")["items"], json!([]));

    let revoked = daemon.must("DELETE", "/v1/allocations/1", "");
    assert_eq!(revoked["result"]["status"], "unavailable");
    assert!(ids(&daemon).is_empty());
    let ended = daemon.must("GET", "/v1/allocations?ended=10", "");
    assert_eq!(ended["items"][0]["id"], 1);
    assert_eq!(daemon.must("GET", "/v1/allocations/1", "")["status"], "unavailable");
    assert!(matches!(daemon.recorder.record().applied.last(), Some(Change::EndAllocation(_))));
}

#[test]
fn a_dry_run_says_what_would_be_and_changes_nothing() {
    let daemon = TestDaemon::start();
    daemon.furnish();
    let before = daemon.recorder.record().applied.len();
    let (status, answer) = daemon.ask("POST", "/v1/allocations?dry_run=true", &grant(5_000, "5mbit", ""));
    assert_eq!((status, &answer["dry_run"]), (200, &json!(true)), "{answer}");
    assert!(ids(&daemon).is_empty());
    assert_eq!(daemon.recorder.record().applied.len(), before);
    // The number was not used up.
    assert_eq!(daemon.must("POST", "/v1/allocations", &grant(5_000, "5mbit", ""))["result"]["id"], 1);
}

#[test]
fn everything_can_be_registered_shown_and_removed() {
    let daemon = TestDaemon::start();
    daemon.furnish();
    let profile = r#"{"level":{"guaranteed":{"down":"1mbit"},"dscp":46},"duration":{"longest":"1h"}}"#;
    assert_eq!(daemon.must("PUT", "/v1/profiles/voice", profile)["result"]["level"]["dscp"], 46);
    for (path, name) in [
        ("/v1/providers", "acme"),
        ("/v1/applications", "video"),
        ("/v1/providers/acme/applications", "video"),
        ("/v1/sessions", "dsl-1"),
        ("/v1/profiles", "voice"),
    ] {
        assert_eq!(daemon.must("GET", path, "")["items"][0]["name"], name, "{path}");
    }
    for path in ["/v1/providers/acme", "/v1/sessions/dsl-1", "/v1/profiles/voice"] {
        daemon.must("GET", path, "");
    }
    for path in [
        "/v1/providers/acme/applications/video",
        "/v1/providers/acme",
        "/v1/sessions/dsl-1",
        "/v1/profiles/voice",
    ] {
        let removed = daemon.must("DELETE", path, "");
        let name = path.rsplit('/').next().expect("a name");
        assert_eq!(removed["result"]["name"], name);
        assert_eq!(daemon.ask("DELETE", path, "").0, 404, "{path} a second time");
    }
}

#[test]
fn lines_come_change_go_and_come_back() {
    let daemon = TestDaemon::start();
    daemon.furnish();
    daemon.must("POST", "/v1/allocations", &grant(5_000, "5mbit", ""));
    let before = daemon.must("GET", "/v1/sessions/dsl-1", "");
    let address = before["addresses"][0].clone();
    let facts = |down: &str, address: &Value| {
        json!({"name": "dsl-1", "addresses": [address], "rate": {"down": down, "up": "2mbit"}, "source": "radius"})
            .to_string()
    };
    let answer = daemon.must("PUT", "/v1/sessions/dsl-1", &facts("10mbit", &address));
    let seen = answer["result"]["seen_at"].clone();
    assert!(seen.is_string() && answer["warnings"] == json!([]), "{answer}");
    let again = daemon.must("PUT", "/v1/sessions/dsl-1", &facts("10mbit", &address));
    assert_eq!(again["result"]["seen_at"], seen, "a sign of life changes nothing");

    let stopped = daemon.must("POST", "/v1/sessions/dsl-1/stop", "");
    assert!(stopped["result"]["down_since"].is_string(), "{stopped}");
    assert!(stopped["warnings"][0].as_str().expect("a text").starts_with("granted until "), "{stopped}");
    let twice = daemon.must("POST", "/v1/sessions/dsl-1/stop", "");
    assert_eq!(twice["result"]["down_since"], stopped["result"]["down_since"]);
    let (status, refused) = daemon.ask("POST", "/v1/allocations", &grant(5_001, "1mbit", ""));
    assert_eq!((status, &refused["error"]["code"]), (409, &json!("session_down")), "{refused}");

    let told = daemon.must("PUT", "/v1/sessions/dsl-1?dry_run=true", &facts("4mbit", &address));
    assert_eq!(ids(&daemon).len(), 1, "{told}");
    let told = daemon.must("PUT", "/v1/sessions/dsl-1", &facts("4mbit", &address));
    assert!(told["warnings"][0].as_str().expect("a text").starts_with("allocation 1 ends: "), "{told}");
    assert!(ids(&daemon).is_empty());
    let (status, refused) = daemon.ask("PUT", "/v1/sessions/dsl-2", &facts("4mbit", &address));
    assert_eq!((status, &refused["error"]["field"]), (400, &json!("name")), "{refused}");
    assert_eq!(daemon.ask("POST", "/v1/sessions/dsl-2/stop", "").0, 404);
}

#[test]
fn a_session_that_is_removed_while_it_is_asked_for_is_not_found() {
    let daemon = TestDaemon::start_with("reconcile_interval = '1h'");
    daemon.furnish();
    daemon.must("POST", "/v1/sessions/dsl-1/stop", "");
    // The service is held up until all three wait for it in this order.
    let held_up = daemon.recorder.record();
    let answers: Vec<(u16, Value)> = thread::scope(|scope| {
        let asked = [
            ("POST", "/v1/reconcile"),
            // It is down already: nothing is changed.
            ("POST", "/v1/sessions/dsl-1/stop"),
            ("DELETE", "/v1/sessions/dsl-1"),
        ]
        .map(|(method, path)| {
            let daemon = &daemon;
            let asked = scope.spawn(move || daemon.ask(method, path, ""));
            thread::sleep(Duration::from_millis(200));
            asked
        });
        drop(held_up);
        asked.into_iter().map(|asked| asked.join().expect("an answer")).collect()
    });
    let [reconciled, stopped, removed] = &answers[..] else { panic!("{answers:?}") };
    assert_eq!((reconciled.0, removed.0), (200, 200), "{answers:?}");
    assert_eq!((stopped.0, &stopped.1["error"]["code"]), (404, &json!("not_found")), "{answers:?}");
}

#[test]
fn contracts_segments_and_ends_are_changed() {
    let daemon = TestDaemon::start();
    daemon.furnish();
    let put = |path: &str, body: Value| daemon.must("PUT", path, &body.to_string());
    let dslam = json!({"capacity": {"down": "8mbit", "up": "2mbit"}, "rest": {"down": "1mbit"}});
    assert_eq!(put("/v1/segments/dslam-7", dslam)["result"]["name"], "dslam-7");
    let line = json!({"name": "dsl-9", "addresses": ["192.0.2.99/32"], "rate": {"down": "20mbit", "up": "2mbit"},
                      "segments": ["dslam-7"]});
    daemon.must("POST", "/v1/sessions", &line.to_string());
    let shown = daemon.must("GET", "/v1/segments/dslam-7", "");
    assert_eq!(shown["promised"]["down"], 0, "{shown}");
    assert_eq!(daemon.ask("DELETE", "/v1/segments/dslam-7", "").0, 409, "in use");
    daemon.must("DELETE", "/v1/sessions/dsl-9", "");
    daemon.must("DELETE", "/v1/segments/dslam-7", "");
    assert_eq!(daemon.ask("GET", "/v1/segments/dslam-7", "").0, 404);

    daemon.must("POST", "/v1/allocations", &grant(5_000, "5mbit", r#","duration":"1h""#));
    let was = daemon.must("GET", "/v1/providers/acme", "")["contract"].clone();
    let change = json!({"contract": {"guaranteed": {"down": "4mbit"}}, "was": was});
    let told = put("/v1/providers/acme/contract", change.clone());
    assert!(told["warnings"].to_string().contains("allocation 1 on line dsl-1"), "{told}");
    let (status, refused) = daemon.ask("PUT", "/v1/providers/acme/contract", &change.to_string());
    assert_eq!(status, 409, "it has changed since: {refused}");
    let none = json!({"contract": {}});
    put("/v1/providers/acme/applications/video/contract", none.clone());
    assert_eq!(daemon.ask("PUT", "/v1/providers/acme/applications/vidoe/contract", &none.to_string()).0, 404);

    let end = |daemon: &TestDaemon| daemon.must("GET", "/v1/allocations/1", "")["expires_at"].clone();
    let before = end(&daemon);
    let (status, refused) = daemon.ask("POST", "/v1/allocations/1/extend", r#"{"by":"-1h"}"#);
    assert_eq!((status, &refused["error"]["field"]), (400, &json!("by")), "{refused}");
    assert_eq!(end(&daemon), before);
    daemon.must("POST", "/v1/allocations/1/extend", r#"{"by":"1h"}"#);
    assert!(end(&daemon).as_str() > before.as_str());
}

#[test]
fn what_is_wrong_with_a_request_is_said_with_field_and_value() {
    let daemon = TestDaemon::start();
    daemon.furnish();
    let selector = |selector: &str| format!(r#"{{"provider":"acme","selectors":[{selector}]}}"#);
    for (name, method, path, body, status, code, field, value, message) in [
        (
            "unknown route",
            "GET",
            "/v1/nothing",
            String::new(),
            404,
            "unknown_route",
            None,
            None,
            "there is no /v1/nothing",
        ),
        (
            "another version",
            "GET",
            "/v2/status",
            String::new(),
            404,
            "unknown_route",
            None,
            None,
            "the API begins at /v1/",
        ),
        (
            "unknown method",
            "PATCH",
            "/v1/allocations",
            String::new(),
            405,
            "unknown_method",
            None,
            None,
            "/v1/allocations does not take PATCH",
        ),
        (
            "no such provider",
            "GET",
            "/v1/providers/nobody",
            String::new(),
            404,
            "not_found",
            Some("provider"),
            Some("nobody"),
            "there is no provider `nobody`",
        ),
        (
            "no such allocation",
            "GET",
            "/v1/allocations/99",
            String::new(),
            404,
            "not_found",
            Some("allocation"),
            Some("99"),
            "there is no allocation `99`",
        ),
        (
            "revoke of nothing",
            "DELETE",
            "/v1/allocations/99",
            String::new(),
            404,
            "not_found",
            Some("id"),
            Some("99"),
            "99",
        ),
        (
            "a name that is none",
            "GET",
            "/v1/providers/..%2f",
            String::new(),
            400,
            "invalid",
            Some("path"),
            Some("/v1/providers/..%2f"),
            "`../` is not a name",
        ),
        (
            "a number that is none",
            "GET",
            "/v1/allocations/abc",
            String::new(),
            400,
            "invalid",
            Some("path"),
            Some("/v1/allocations/abc"),
            "`abc`",
        ),
        (
            "unknown option",
            "GET",
            "/v1/allocations?colour=red",
            String::new(),
            400,
            "invalid",
            Some("query"),
            Some("colour=red"),
            "unknown field `colour`",
        ),
        (
            "no body",
            "POST",
            "/v1/allocations",
            String::new(),
            400,
            "malformed",
            None,
            None,
            "the body is not JSON: EOF while parsing",
        ),
        (
            "half a body",
            "POST",
            "/v1/allocations",
            "{\"provider\":\n\"ac".into(),
            400,
            "malformed",
            None,
            None,
            "at line 2 column 3",
        ),
        (
            "more than a body",
            "POST",
            "/v1/providers/acme/applications",
            "{\"name\":\"a\"} x".into(),
            400,
            "malformed",
            None,
            None,
            "trailing characters at line 1 column 14",
        ),
        ("not an object", "POST", "/v1/allocations", "[1]".into(), 400, "invalid", None, None, "expected"),
        (
            "unknown member",
            "POST",
            "/v1/allocations",
            r#"{"provider":"acme","selectors":[],"colour":"red"}"#.into(),
            400,
            "invalid",
            Some("colour"),
            Some("red"),
            "unknown field `colour`",
        ),
        (
            "missing member",
            "POST",
            "/v1/allocations",
            r#"{"provider":"acme"}"#.into(),
            400,
            "invalid",
            None,
            None,
            "missing field `selectors`",
        ),
        (
            "wrong type",
            "POST",
            "/v1/allocations",
            r#"{"provider":"acme","selectors":[],"level":{"maximum":{"down":true}}}"#.into(),
            400,
            "invalid",
            Some("level.maximum.down"),
            Some("true"),
            "expected a number of bit/s or a text such as \"20mbit\"",
        ),
        (
            "not a rate",
            "POST",
            "/v1/allocations",
            r#"{"provider":"acme","selectors":[],"level":{"maximum":{"down":"fast"}}}"#.into(),
            400,
            "invalid",
            Some("level.maximum.down"),
            Some("fast"),
            "`fast` has no number",
        ),
        (
            "negative rate",
            "POST",
            "/v1/allocations",
            r#"{"provider":"acme","selectors":[],"level":{"maximum":{"down":-5}}}"#.into(),
            400,
            "invalid",
            Some("level.maximum.down"),
            Some("-5"),
            "expected a number of bit/s",
        ),
        (
            "selector text",
            "POST",
            "/v1/allocations",
            selector(r#""down sideways""#),
            400,
            "invalid",
            Some("selectors[0]"),
            Some("down sideways"),
            "sideways",
        ),
        (
            "inverted ports",
            "POST",
            "/v1/allocations",
            selector(r#"{"source_ports":[9,5]}"#),
            400,
            "invalid",
            None,
            None,
            "the range 9-5 is inverted",
        ),
        (
            "no selector",
            "POST",
            "/v1/allocations",
            r#"{"provider":"acme","selectors":[],"level":{"maximum":{"down":"1mbit"}}}"#.into(),
            400,
            "invalid",
            Some("selectors"),
            None,
            "selectors",
        ),
        (
            "unknown provider",
            "POST",
            "/v1/allocations",
            grant(5_000, "1mbit", "").replace("acme", "nobody"),
            404,
            "not_found",
            Some("provider"),
            Some("nobody"),
            "nobody",
        ),
        (
            "foreign network",
            "POST",
            "/v1/allocations",
            grant(5_000, "1mbit", "").replace("203.0.113.0", "198.51.100.0"),
            403,
            "forbidden",
            None,
            None,
            "203.0.113.0/24",
        ),
        (
            "more than the line",
            "POST",
            "/v1/allocations",
            grant(5_000, "40mbit", ""),
            409,
            "insufficient_capacity",
            None,
            None,
            "dsl-1",
        ),
        (
            "provider twice",
            "POST",
            "/v1/providers",
            r#"{"name":"acme","kind":"network","networks":["192.0.2.0/24"]}"#.into(),
            409,
            "conflict",
            Some("name"),
            Some("acme"),
            "acme",
        ),
        (
            "provider in use",
            "DELETE",
            "/v1/providers/acme",
            String::new(),
            409,
            "conflict",
            None,
            None,
            "acme",
        ),
        (
            "odd packet",
            "POST",
            "/v1/explain",
            r#"{"direction":"up","packet":"450"}"#.into(),
            400,
            "invalid",
            Some("packet"),
            Some("450"),
            "each byte takes two",
        ),
    ] {
        let before = daemon.recorder.record().applied.len();
        let (found, answer) = daemon.ask(method, path, &body);
        let error = &answer["error"];
        assert_eq!((found, error["code"].as_str()), (status, Some(code)), "{name}: {answer}");
        assert!(text(&answer, "/error/message").contains(message), "{name}: {answer}");
        if let Some(field) = field {
            assert_eq!(error["field"], field, "{name}: {answer}");
        }
        if let Some(value) = value {
            assert_eq!(error["value"], value, "{name}: {answer}");
        }
        assert_eq!(daemon.recorder.record().applied.len(), before, "{name} changed something");
    }
    assert!(ids(&daemon).is_empty());
}

#[test]
fn a_body_beyond_the_limit_and_one_nested_too_deeply_are_refused() {
    let daemon = TestDaemon::start();
    let (status, answer) =
        daemon.ask("POST", "/v1/allocations", &" ".repeat(super::extract::LARGEST_BODY + 1));
    assert_eq!((status, text(&answer, "/error/code")), (413, "too_large"));
    let (status, answer) = daemon.ask("POST", "/v1/allocations", &"[".repeat(100_000));
    assert_eq!(status, 400, "{answer}");
    // It lives.
    daemon.must("GET", "/v1/status", "");
}

#[test]
fn a_body_that_announces_more_than_the_limit_is_refused_before_it_comes() {
    let daemon = TestDaemon::start();
    let mut stream = UnixStream::connect(daemon.socket()).expect("connected");
    stream
        .write_all(b"POST /v1/allocations HTTP/1.1\r\nhost: q\r\nconnection: close\r\ncontent-length: 1000000000\r\n\r\n{")
        .expect("sent");
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).expect("an answer");
    assert!(line.contains("413"), "{line}");
}

#[test]
fn clients_at_the_same_time_get_different_numbers() {
    let daemon = TestDaemon::start();
    daemon.furnish();
    let (daemon_ref, clients) = (&daemon, 16_u16);
    let mut granted: Vec<u64> = thread::scope(|scope| {
        let threads: Vec<_> = (0..clients)
            .map(|client| {
                scope.spawn(move || {
                    let body = grant(5_000 + client, "100kbit", "");
                    let answer = daemon_ref.must("POST", "/v1/allocations", &body);
                    answer["result"]["id"].as_u64().expect("id")
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    granted.sort_unstable();
    assert_eq!(granted, (1..=u64::from(clients)).collect::<Vec<_>>());
    assert_eq!(ids(&daemon), granted);
}

#[test]
fn many_requests_go_over_one_connection() {
    let daemon = TestDaemon::start();
    let mut stream = UnixStream::connect(daemon.socket()).expect("connected");
    for _ in 0..3 {
        stream.write_all(b"GET /v1/profiles HTTP/1.1\r\nhost: q\r\n\r\n").expect("sent");
        let mut reader = BufReader::new(stream.try_clone().expect("cloned"));
        let mut line = String::new();
        reader.read_line(&mut line).expect("an answer");
        assert_eq!(line.trim(), "HTTP/1.1 200 OK");
        while line != "\r\n" {
            line.clear();
            reader.read_line(&mut line).expect("a header");
        }
        let mut body = [0; br#"{"items":[]}"#.len()];
        std::io::Read::read_exact(&mut reader, &mut body).expect("the body");
        assert_eq!(&body, br#"{"items":[]}"#);
    }
}

#[test]
fn a_refusal_of_the_kernel_leaves_store_and_state_as_before() {
    let daemon = TestDaemon::start();
    daemon.furnish();
    daemon.must("POST", "/v1/allocations", &grant(5_000, "1mbit", ""));
    let before = daemon.must("GET", "/v1/allocations", "");

    daemon.recorder.record().refuse = 1;
    let (status, answer) = daemon.ask("POST", "/v1/allocations", &grant(5_001, "1mbit", ""));
    assert_eq!((status, text(&answer, "/error/code")), (500, "kernel"), "{answer}");
    let message = text(&answer, "/error/message");
    assert!(message.contains("class 5150:4001 refused: No space left on device"), "{message}");
    assert_eq!(daemon.must("GET", "/v1/allocations", ""), before);

    daemon.recorder.record().refuse = 1;
    assert_eq!(daemon.ask("DELETE", "/v1/allocations/1", "").0, 500);
    assert_eq!(daemon.must("GET", "/v1/allocations", ""), before);

    let daemon = daemon.restart();
    assert_eq!(daemon.must("GET", "/v1/allocations", ""), before, "in the store too");
    daemon.must("POST", "/v1/allocations", &grant(5_001, "1mbit", ""));
}

#[test]
fn a_restart_brings_everything_back_and_drops_what_expired() {
    let daemon = TestDaemon::start();
    daemon.furnish();
    daemon.must("PUT", "/v1/profiles/voice", r#"{"level":{"dscp":46}}"#);
    daemon.must("POST", "/v1/allocations", &grant(5_000, "1mbit", ""));
    daemon.must("POST", "/v1/allocations", &grant(5_001, "1mbit", r#","duration":"PT1S""#));
    let lists = ["/v1/providers", "/v1/applications", "/v1/sessions", "/v1/profiles"];
    let before: Vec<_> = lists.iter().map(|path| daemon.must("GET", path, "")).collect();
    let one = daemon.must("GET", "/v1/allocations/1", "");

    let daemon = daemon.restart();
    thread::sleep(Duration::from_millis(1_100));
    let daemon = daemon.restart();
    let after: Vec<_> = lists.iter().map(|path| daemon.must("GET", path, "")).collect();
    assert_eq!(after, before);
    assert_eq!(daemon.must("GET", "/v1/allocations", "")["items"], json!([one]));
    let record = daemon.recorder.record();
    let state = record.started_with.as_ref().expect("started");
    assert_eq!(state.allocations.keys().collect::<Vec<_>>(), [&AllocationId(1)]);
}

#[test]
fn an_allocation_ends_when_its_time_has_come() {
    let daemon = TestDaemon::start_with("reconcile_interval = '1h'");
    daemon.furnish();
    let answer = daemon.must("POST", "/v1/allocations", &grant(5_000, "1mbit", r#","duration":"1s""#));
    let end: jiff::Timestamp = text(&answer, "/result/expires_at").parse().expect("a time");
    eventually("the end", || ids(&daemon).is_empty());
    let late = jiff::Timestamp::now().duration_since(end);
    assert!(late.is_positive() && late < jiff::SignedDuration::from_millis(500), "{late:?} after its end");
    assert!(text(&daemon.must("GET", "/v1/allocations/1", ""), "/reason").contains("expired"));
    assert!(matches!(daemon.recorder.record().applied.last(), Some(Change::EndAllocation(_))));
}

#[test]
fn drift_is_repaired_by_itself_and_reported() {
    let daemon = TestDaemon::start_with("reconcile_interval = '100ms'");
    daemon.recorder.record().drift.push("lan0: class 5150:2 was missing".to_owned());
    let repaired = || daemon.must("GET", "/v1/status", "")["gateway"]["repairs"].clone();
    eventually("the repair", || repaired() != json!([]));
    assert_eq!(repaired()[0]["what"], "lan0: class 5150:2 was missing");

    daemon.recorder.record().refuse_reconcile = true;
    let error = || daemon.must("GET", "/v1/status", "")["reconcile_error"].clone();
    eventually("the error", || error() != Value::Null);
    assert!(error().as_str().expect("text").contains("cannot bring the kernel to the state"));
    daemon.recorder.record().refuse_reconcile = false;
    eventually("that it is well again", || error() == Value::Null);
}

#[test]
fn reconciliation_on_demand_says_what_it_repaired() {
    let daemon = TestDaemon::start_with("reconcile_interval = '1h'");
    daemon.recorder.record().drift.push("program detached from lan0".to_owned());
    assert_eq!(daemon.must("POST", "/v1/reconcile", "")["items"], json!(["program detached from lan0"]));
    assert_eq!(daemon.must("POST", "/v1/reconcile", "")["items"], json!([]));
}

#[test]
fn debugging_is_on_as_long_as_somebody_listens() {
    let daemon = TestDaemon::start();
    let mut stream = UnixStream::connect(daemon.socket()).expect("connected");
    stream.write_all(b"GET /v1/trace HTTP/1.1\r\nhost: q\r\n\r\n").expect("sent");
    eventually("that it is on", || daemon.recorder.record().tracing);
    daemon.recorder.record().trace_lines.push("one packet".to_owned());
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while !line.contains("one packet") {
        line.clear();
        assert_ne!(reader.read_line(&mut line).expect("a line"), 0, "the stream ended");
    }
    drop(reader);
    eventually("that it is off", || !daemon.recorder.record().tracing);
}

#[test]
fn a_listener_to_debugging_does_not_hold_the_end_up() {
    let daemon = TestDaemon::start();
    let mut stream = UnixStream::connect(daemon.socket()).expect("connected");
    stream.write_all(b"GET /v1/trace HTTP/1.1\r\nhost: q\r\n\r\n").expect("sent");
    eventually("that it is on", || daemon.recorder.record().tracing);
    let start = Instant::now();
    drop(daemon);
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}

#[test]
fn statistics_explanations_and_status_are_passed_on() {
    let daemon = TestDaemon::start();
    daemon.furnish();
    daemon.must("POST", "/v1/allocations", &grant(5_000, "1mbit", ""));
    let statistics = daemon.must("GET", "/v1/statistics", "");
    assert_eq!(statistics["allocations"]["1"]["down"]["passed"]["bytes"], 1_500_000);
    let packet = format!(r#"{{"direction":"down","packet":"0x45 00 {}","layer3":true}}"#, "00".repeat(18));
    let explained = daemon.must("POST", "/v1/explain", &packet);
    assert_eq!(explained["explanation"]["charged"], 20);
    assert_eq!(explained["explanation"]["direction"], "down");
    assert_eq!(explained["allocation"]["id"], 1);
    let status = daemon.must("GET", "/v1/status", "");
    assert_eq!(
        status["counted"],
        json!({"providers":1,"applications":1,"sessions":1,"profiles":0,"allocations":1})
    );
    assert_eq!(status["link"], json!({"up":100_000_000,"down":100_000_000}));
    let checks = daemon.must("GET", "/v1/doctor", "");
    let checks = checks["items"].as_array().expect("items");
    assert!(checks.iter().any(|check| check["name"] == "interface lan0" && check["severity"] == "error"));
    assert!(checks.iter().any(|check| check["name"] == "programs on lan0" && check["severity"] == "ok"));
}

#[test]
fn after_detach_nothing_is_done_any_more() {
    let daemon = TestDaemon::start();
    daemon.furnish();
    assert_eq!(daemon.ask("POST", "/v1/detach", ""), (204, Value::Null));
    assert!(daemon.recorder.record().detached);
    let (status, answer) = daemon.ask("POST", "/v1/allocations", &grant(5_000, "1mbit", ""));
    assert_eq!((status, text(&answer, "/error/code")), (503, "stopping"), "{answer}");
}

/// Asks from a thread of its own that has become another user.
fn ask_as(daemon: &TestDaemon, uid: u32, groups: &[u32]) -> (u16, Value) {
    let (socket, groups) = (daemon.socket(), groups.to_vec());
    thread::spawn(move || {
        // The calls of libc would change all threads of the process; the kernel's own change one.
        // SAFETY: the arguments are numbers and a pointer to as many groups as are said.
        unsafe {
            assert_eq!(libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()), 0);
            assert_eq!(libc::syscall(libc::SYS_setresgid, uid, uid, uid), 0);
            assert_eq!(libc::syscall(libc::SYS_setresuid, uid, uid, uid), 0);
        }
        let mut stream = UnixStream::connect(socket).expect("connected");
        ask(&mut stream, "GET", "/v1/status", b"")
    })
    .join()
    .expect("no panic")
}

#[test]
fn only_those_who_may_use_the_socket_are_served() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can become other users");
        return;
    }
    let daemon = TestDaemon::start_with("allow_users = [4001]\nallow_groups = [4002]");
    for (uid, groups, status) in [
        (0, vec![], 200),
        (4_001, vec![], 200),
        (4_003, vec![4_002], 200),
        (4_003, vec![4_001], 403),
        (4_003, vec![], 403),
    ] {
        let (found, answer) = ask_as(&daemon, uid, &groups);
        assert_eq!(found, status, "uid {uid}, groups {groups:?}: {answer}");
        if found == 403 {
            assert_eq!(text(&answer, "/error/code"), "peer_refused");
            assert_eq!((text(&answer, "/error/field"), text(&answer, "/error/value")), ("uid", "4003"));
        }
    }
}

/// What the history says, the newest first: action, verdict and who it concerns.
fn decisions(daemon: &TestDaemon, query: &str) -> Vec<Value> {
    let listing = daemon.must("GET", &format!("/v1/decisions?{query}"), "");
    let items = listing["items"].as_array().expect("items");
    items
        .iter()
        .map(|item| json!([item["action"], item["verdict"], item["code"], item["allocation"]]))
        .collect()
}

#[test]
fn every_decision_is_kept_with_who_asked_and_why() {
    let daemon = TestDaemon::start();
    daemon.furnish();
    daemon.must(
        "POST",
        "/v1/allocations",
        &grant(5_000, "5mbit", r#","application":"video","duration":"1h""#),
    );
    daemon.ask("POST", "/v1/allocations", &grant(5_001, "1gbit", ""));
    daemon.ask("POST", "/v1/allocations?dry_run=true", &grant(5_002, "1mbit", ""));
    daemon.must("POST", "/v1/allocations/1/extend", r#"{"by":"1h"}"#);
    daemon.must("DELETE", "/v1/allocations/1", "");
    assert_eq!(daemon.ask("DELETE", "/v1/allocations/1", "").0, 404);
    daemon.must("POST", "/v1/reconcile", "");

    let all = daemon.must("GET", "/v1/decisions", "");
    let first = &all["items"].as_array().expect("items").last().expect("one")["sequence"];
    assert_eq!(first, 1);
    assert_eq!(
        decisions(&daemon, "provider=acme&limit=4"),
        [
            json!(["revoke", "done", null, 1]),
            json!(["extend", "done", null, 1]),
            json!(["grant", "refused", "insufficient_capacity", null]),
            json!(["grant", "done", null, 1]),
        ]
    );
    assert_eq!(
        decisions(&daemon, "allocation=1&verdict=refused"),
        [json!(["revoke", "refused", "not_found", 1])]
    );
    assert_eq!(decisions(&daemon, "limit=1"), [json!(["reconcile", "done", null, null])]);
    assert_eq!(decisions(&daemon, "application=video").len(), 4, "with its registration");
    assert_eq!(decisions(&daemon, "session=dsl-1&since=2099-01-01T00:00:00Z"), [] as [Value; 0]);
    assert_eq!(decisions(&daemon, "before=3").len(), 2);

    let refused = &daemon.must("GET", "/v1/decisions?verdict=refused&provider=acme", "")["items"][0];
    assert_eq!(text(refused, "/actor"), format!("uid {}", nix::unistd::geteuid()));
    assert!(text(refused, "/reason").contains("left"), "{refused}");
    assert_eq!(text(refused, "/session"), "dsl-1");
    assert_eq!(refused["asked"]["level"], json!({"guaranteed": {"down": 1_000_000_000}}));

    for (query, said) in [("limit=0", "limit"), ("limit=1001", "1 to 1000"), ("verdict=maybe", "maybe")] {
        let (status, answer) = daemon.ask("GET", &format!("/v1/decisions?{query}"), "");
        assert_eq!(status, 400, "{answer}");
        assert!(text(&answer, "/error/message").contains(said), "{answer}");
    }
}

#[test]
fn what_was_refused_or_failed_is_written_without_a_change() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let recorder = Recorder::default();
    // One commit is that of the start.
    let mut service = service(directory.path(), &recorder, 1).expect("started");
    let remove = Command::RemoveProvider { name: "isp".parse::<Name>().expect("a name") };
    service.execute(remove.into()).expect_err("there is none");
    service.execute(add_provider("acme").into()).expect_err("full");
    assert!(service.records(&RecordQuery::default()).is_err(), "the disk is full still");
    assert!(service.idle() <= Duration::from_secs(1), "it is tried again");
    service.give_room(1);
    let records = service.records(&RecordQuery::default()).expect("written");
    let found: Vec<_> =
        records.iter().map(|record| (record.sequence, record.action.as_str(), record.verdict)).collect();
    assert_eq!(found, [(2, "add_provider", Verdict::Failed), (1, "remove_provider", Verdict::Refused)]);
    assert!(records[0].reason.as_ref().is_some_and(|reason| reason.contains("no space is left")));
    assert_eq!(records[0].actor, "qosd");
}

fn add_provider(name: &str) -> Command {
    Command::AddProvider(NewProvider {
        name: name.parse::<Name>().expect("a name"),
        kind: ProviderKind::Application,
        networks: vec!["203.0.113.0/24".parse().expect("a network")],
        contract: Contract {
            maximum: Directed { down: Some(BitsPerSecond(1_000_000)), up: None },
            ..Contract::default()
        },
    })
}

#[test]
fn a_full_disk_changes_nothing() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let recorder = Recorder::default();
    // One commit is that of the start.
    let mut service = service(directory.path(), &recorder, 1).expect("started");
    let error = service.execute(add_provider("acme").into()).expect_err("full");
    assert!(matches!(error, ServiceError::Unwritten(_)), "{error}");
    assert!(service.state().providers.is_empty());
    assert!(matches!(recorder.record().applied[..], [Change::PutProvider(_), Change::DeleteProvider(_)]));
    assert_ne!(service.idle(), Duration::ZERO, "the kernel took it back");
}

#[test]
fn what_can_neither_be_written_nor_taken_back_is_told_and_tried_again() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let recorder = Recorder::default();
    let mut service = service(directory.path(), &recorder, 1).expect("started");
    recorder.record().refuse_after = Some(1);
    let error = service.execute(add_provider("acme").into()).expect_err("full");
    assert!(matches!(error, ServiceError::Unwritten(_)), "{error}");
    assert!(error.to_string().contains("no space is left"), "{error}");
    // Neither state nor store has it; the kernel is brought to that at once.
    assert!(service.state().providers.is_empty());
    assert_eq!(service.idle(), Duration::ZERO);
    let before = recorder.record().reconciled;
    service.tick();
    assert_eq!(recorder.record().reconciled, before + 1);
}

#[test]
fn commands_are_written_together_and_answered_each_for_itself() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let recorder = Recorder::default();
    // One commit is that of the start, and one is for all of these.
    let mut service = service(directory.path(), &recorder, 2).expect("started");
    let remove = Command::RemoveProvider { name: "isp".parse::<Name>().expect("a name") };
    let tried = Asked { dry_run: true, ..Asked::from(add_provider("tried")) };
    let asked = [
        add_provider("acme").into(),
        add_provider("acme").into(),
        tried,
        add_provider("isp").into(),
        remove.clone().into(),
        add_provider("third").into(),
    ];
    recorder.record().refuse_after = Some(3);
    let answers = service.execute_all(&asked);
    assert!(answers[0].is_ok());
    assert!(
        matches!(&answers[1], Err(ServiceError::Refused(refusal)) if refusal.code == RefusalCode::Conflict)
    );
    assert!(answers[2].is_ok() && answers[3].is_ok() && answers[4].is_ok());
    assert!(matches!(answers[5], Err(ServiceError::Kernel(_))), "the kernel refuses one of them");
    let names: Vec<_> = service.state().providers.keys().map(Name::as_str).collect();
    assert_eq!(names, ["acme"]);

    // And where they can't be written none of them stands.
    recorder.record().refuse_after = None;
    let before = service.state().providers.clone();
    let answers =
        service.execute_all(&[add_provider("isp").into(), add_provider("isp").into(), remove.into()]);
    assert!(matches!(answers[0], Err(ServiceError::Unwritten(_))));
    assert!(
        matches!(answers[1], Err(ServiceError::Refused(_))),
        "what was refused was so for its own reason"
    );
    assert!(matches!(answers[2], Err(ServiceError::Unwritten(_))));
    assert_eq!(service.state().providers, before);
}
