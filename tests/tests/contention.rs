//! Many ask at once for what is there once: exactly what fits is granted, whoever is first, and store, state
//! and kernel agree on it. Real `qosd`, 64 connections to its socket. Needs root.

#![expect(clippy::print_stdout, reason = "figures of tests, for whoever reads them")]
#![expect(clippy::unwrap_used, reason = "the helpers of a test end it where something is not as it must be")]

use std::collections::BTreeSet;
use std::sync::Barrier;
use std::thread;

use qos_tests::api::{Answer, Client};
use qos_tests::daemon::{Config, Daemon};
use qos_tests::kernel::Kernel;
use qos_tests::random::Random;
use qos_tests::topology::Topology;
use qos_userspace::domain::Allocation;
use qos_userspace::domain::units::BitsPerSecond;
use qos_userspace::manager::capacity::SMALLEST_REST;
use rusqlite::{Connection, OpenFlags};
use serde_json::{Value, json};

const CLIENTS: u16 = 64;
/// What is left when they begin, in bit/s.
const LAST: u64 = 1_000_000;
const LINE: u64 = 20_000_000;
const LINK: u64 = 200_000_000;
const SEED: u64 = 64;

/// Who fights for what: a row each.
struct Fight {
    /// What the refusals must begin with.
    limit: &'static str,
    /// Each client asks for a line of its own; else all for one.
    own_lines: bool,
    /// Names the application `player`.
    application: bool,
    /// What can be promised downstream of what they fight for while nothing is, in bit/s.
    promisable: u64,
    /// Contract of the provider, as JSON.
    contract: Value,
    /// Contract of its application.
    application_contract: Value,
    /// Capacity of the segment that all lines are behind, in bit/s.
    segment: u64,
}

/// Nothing but the line, the segment and the link limit anything.
fn fight(limit: &'static str, promisable: u64) -> Fight {
    Fight {
        limit,
        own_lines: true,
        application: false,
        promisable,
        contract: json!({}),
        application_contract: json!({}),
        segment: LINK,
    }
}

#[test]
fn the_last_megabit_of_a_line_is_granted_once() {
    fought(&Fight { own_lines: false, ..fight("line home-1 downstream: ", LINE - SMALLEST_REST.0) });
}

#[test]
fn the_last_megabit_of_a_segment_is_granted_once() {
    fought(&Fight { segment: 5_000_000, ..fight("segment dslam downstream: ", 5_000_000) });
}

#[test]
fn the_last_megabit_of_the_link_is_granted_once() {
    // The default class and each line's rest have their share.
    let promisable = LINK - SMALLEST_REST.0 * (u64::from(CLIENTS) + 2);
    fought(&fight("link downstream: ", promisable));
}

#[test]
fn the_last_megabit_of_a_contract_is_granted_once() {
    let contract = json!({"guaranteed": {"down": "7mbit"}});
    fought(&Fight { contract, ..fight("contract of provider video, guaranteed downstream: ", 7_000_000) });
}

#[test]
fn the_last_megabit_of_an_applications_share_is_granted_once() {
    fought(&Fight {
        application: true,
        contract: json!({"guaranteed": {"down": "7mbit"}}),
        application_contract: json!({"guaranteed": {"down": "3mbit"}}),
        ..fight("contract of application player of provider video, guaranteed downstream: ", 3_000_000)
    });
}

fn fought(fight: &Fight) {
    let net = Topology::pair().unwrap();
    let config = Config {
        lan_capacity: BitsPerSecond(LINK),
        // Nothing is repaired unasked.
        more: "reconcile_interval = \"1h\"".to_owned(),
        ..Config::default()
    };
    let mut daemon = Daemon::start(&net.gateway, &config).unwrap();
    let mut client = Client::connect(&daemon.socket()).unwrap();
    set_up(&mut client, fight);
    fill(&mut client, fight);
    let mut random = Random::new(SEED);
    println!("seed {SEED}");
    for round in 0..3 {
        // All the same, so that ten fit; or some of each size.
        let mut rate = || if round == 0 { LAST / 10 } else { 8_000 * (1 + random.below(30)) };
        let asked: Vec<u64> = (0..CLIENTS).map(|_| rate()).collect();
        let answers = ask_at_once(&daemon, fight, &asked);
        let granted = judge(fight, &asked, &answers);
        agree(&daemon, &net, &mut client, granted.len() + 1);
        if round == 0 {
            assert_eq!(granted.len(), 10);
            daemon.kill().unwrap();
            daemon.restart().unwrap();
            client = Client::connect(&daemon.socket()).unwrap();
            agree(&daemon, &net, &mut client, granted.len() + 1);
        }
        for id in granted {
            assert_eq!(client.ask("DELETE", &format!("/v1/allocations/{id}"), None).unwrap().status, 200);
        }
    }
    agree(&daemon, &net, &mut client, 1);
}

fn set_up(client: &mut Client, fight: &Fight) {
    let mut must = |method: &str, path: &str, body: Value| {
        let answer = client.ask(method, path, Some(&body)).unwrap();
        assert!((200..300).contains(&answer.status), "{method} {path} {body}: {answer:?}");
    };
    let segment = json!({"capacity": {"down": format!("{}bit", fight.segment), "up": "1gbit"}});
    must("PUT", "/v1/segments/dslam", segment);
    for number in 0..=CLIENTS {
        // The last line is wide, for what fills the link.
        let down = if number == CLIENTS { LINK } else { LINE };
        let line = json!({
            "name": format!("home-{number}"),
            "addresses": [format!("{}/32", address(number))],
            "rate": {"down": format!("{down}bit"), "up": "10mbit"},
            "segments": if number == CLIENTS && fight.segment == LINK { json!([]) } else { json!(["dslam"]) },
        });
        must("POST", "/v1/sessions", line);
    }
    let provider = json!({
        "name": "video", "kind": "application", "networks": ["203.0.113.0/24"], "contract": fight.contract,
    });
    must("POST", "/v1/providers", provider);
    let application = json!({"name": "player", "contract": fight.application_contract});
    must("POST", "/v1/providers/video/applications", application);
}

/// Grants so much before that the last megabit is left.
fn fill(client: &mut Client, fight: &Fight) {
    let line = if fight.own_lines { CLIENTS } else { 1 };
    let request = request(fight, line, 1, fight.promisable - LAST);
    let answer = client.ask("POST", "/v1/allocations", Some(&request)).unwrap();
    assert_eq!(answer.status, 201, "{answer:?}");
}

fn address(line: u16) -> String {
    format!("192.0.2.{}", 100 + line)
}

fn request(fight: &Fight, line: u16, port: u16, rate: u64) -> Value {
    let flow = format!("down udp from 203.0.113.0/24:{port} to {}", address(line));
    let mut request = json!({
        "provider": "video", "selectors": [flow], "level": {"guaranteed": {"down": format!("{rate}bit")}},
    });
    if fight.application {
        request["application"] = json!("player");
    }
    request
}

/// Each client on a connection of its own; all ask when the last one is ready.
fn ask_at_once(daemon: &Daemon, fight: &Fight, asked: &[u64]) -> Vec<Answer> {
    let start = Barrier::new(asked.len());
    let (start, socket) = (&start, &daemon.socket());
    thread::scope(|scope| {
        let clients: Vec<_> = (0u16..)
            .zip(asked)
            .map(|(number, rate)| {
                let line = if fight.own_lines { number } else { 1 };
                scope.spawn(move || {
                    let mut client = Client::connect(socket).unwrap();
                    // The connection is taken before all others ask.
                    assert_eq!(client.ask("GET", "/v1/profiles", None).unwrap().status, 200);
                    let request = request(fight, line, 1_000 + number, *rate);
                    start.wait();
                    client.ask("POST", "/v1/allocations", Some(&request)).unwrap()
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    })
}

/// Checks that what was granted fits and nothing that was refused would; returns the numbers.
fn judge(fight: &Fight, asked: &[u64], answers: &[Answer]) -> Vec<u64> {
    let mut granted = Vec::new();
    let mut sum = 0;
    for (rate, answer) in asked.iter().zip(answers).filter(|(_, answer)| answer.status == 201) {
        granted.push(answer.body["result"]["id"].as_u64().unwrap());
        sum += rate;
    }
    assert!(sum <= LAST, "{sum} of {LAST} bit/s granted");
    let left = LAST - sum;
    for (rate, answer) in asked.iter().zip(answers).filter(|(_, answer)| answer.status != 201) {
        assert_eq!((answer.status, answer.error("code")), (409, "insufficient_capacity"), "{answer:?}");
        assert!(answer.error("message").starts_with(fight.limit), "{answer:?}");
        assert!(*rate > left, "{rate} bit/s would fit, {left} are left: {answer:?}");
    }
    println!("{} {} of {CLIENTS} granted, {left} bit/s left", fight.limit.trim(), granted.len());
    granted
}

/// Checks that state, store and kernel hold the same allocations, `count` of them.
fn agree(daemon: &Daemon, net: &Topology, client: &mut Client, count: usize) {
    let answer = client.ask("GET", "/v1/allocations", None).unwrap();
    let known: Vec<Allocation> = serde_json::from_value(answer.body["items"].clone()).unwrap();
    assert_eq!(known.len(), count);

    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY;
    let store = Connection::open_with_flags(daemon.state_dir().join("qos.sqlite"), flags).unwrap();
    let mut statement = store.prepare("SELECT id FROM allocations").unwrap();
    let stored = statement.query_map([], |row| row.get(0)).unwrap();
    let stored: BTreeSet<i64> = stored.map(Result::unwrap).collect();
    assert_eq!(stored, known.iter().map(|known| known.id.0.cast_signed()).collect());

    let repaired = client.ask("POST", "/v1/reconcile", None).unwrap();
    assert_eq!((repaired.status, &repaired.body["items"]), (200, &json!([])));
    assert_eq!(daemon.status().unwrap().gateway.repairs, []);
    let kernel = Kernel::read(daemon, &net.gateway).unwrap();
    let enforced: BTreeSet<u16> = kernel.maps.allocations.keys().map(|index| (index / 2) as u16).collect();
    assert_eq!(enforced, known.iter().map(|known| known.slot).collect());
    assert_eq!(kernel.maps.rules.len(), known.len());
}
