//! `kill -9` at random points, under load: what was answered is there afterwards, what was not answered is
//! there whole or not at all, and store, state and kernel agree. Real `qosd`; clients grant, extend and revoke
//! and have their lines go, come and move while it is killed. `QOS_CRASHES` says how often, `QOS_SEED` where
//! the random numbers begin. Needs root.

#![expect(clippy::print_stdout, reason = "figures of tests, for whoever reads them")]
#![expect(clippy::unwrap_used, reason = "the helpers of a test end it where something is not as it must be")]

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use qos_tests::api::Client;
use qos_tests::daemon::{Config, Daemon};
use qos_tests::kernel::Kernel;
use qos_tests::random::Random;
use qos_tests::topology::Topology;
use qos_userspace::domain::{Allocation, Session};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Clients at work, each on a line of its own.
const CLIENTS: u64 = 4;
/// Allocations of a client before it rather revokes than asks for more.
const MOST: usize = 12;
/// Longest time from a daemon's being ready to its end, in µs.
const LONGEST_LIFE: u64 = 50_000;
/// Longest time from a daemon's launch to its end where it is killed at its start, in µs.
const LONGEST_START: u64 = 150_000;
/// How often what the kernel holds is read past the daemon as well.
const READ_EVERY: u64 = 10;
/// By which an allocation is extended.
const EXTENSION: SignedDuration = SignedDuration::from_hours(1);

#[test]
fn what_was_answered_survives_a_few_crashes() {
    crash(25);
}

#[test]
#[ignore = "slow: 500 crashes"]
fn what_was_answered_survives_five_hundred_crashes() {
    crash(500);
}

fn variable<T: FromStr>(name: &str) -> Option<T> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value} is no number")))
}

fn crash(times: u64) {
    let times = variable("QOS_CRASHES").unwrap_or(times);
    let seed = variable("QOS_SEED").unwrap_or(9);
    println!("{times} crashes, QOS_SEED={seed}");
    let net = Topology::pair().unwrap();
    // Nothing is repaired unasked, and no line is given up.
    let more = "reconcile_interval = \"1h\"\nsession_grace = \"24h\"".to_owned();
    let mut daemon = Daemon::start(&net.gateway, &Config { more, ..Config::default() }).unwrap();
    let mut clients: Vec<Person> = (0..CLIENTS).map(|number| Person::new(number, seed)).collect();
    register(&daemon, &clients);

    let mut random = Random::new(seed);
    let mut tally = Tally::default();
    for crash in 1..=times {
        let life = Duration::from_micros(random.below(LONGEST_LIFE));
        let socket = daemon.socket();
        thread::scope(|scope| {
            for client in &mut clients {
                let socket = &socket;
                scope.spawn(move || client.work(socket));
            }
            thread::sleep(life);
            daemon.kill().unwrap();
        });
        if random.once_in(5) {
            // While it starts, too: then it has met nobody.
            daemon.launch().unwrap();
            thread::sleep(Duration::from_micros(random.below(LONGEST_START)));
            daemon.kill().unwrap();
            tally.at_start += 1;
        }
        let began = (Instant::now(), Timestamp::now());
        daemon.restart().unwrap();
        tally.down += began.0.elapsed();
        check(&daemon, &mut clients, began.1, &mut tally, &format!("crash {crash} of {times}"));
        if crash % READ_EVERY == 0 || crash == times {
            compare(&daemon, &net);
        }
    }
    for client in &clients {
        tally.answered += client.answered;
    }
    println!("{tally:?}, {:?} a start", tally.down / times as u32);
    assert!(tally.answered > 0 && tally.unanswered > 0, "{tally:?}: there was no load");
}

/// What happened.
#[derive(Debug, Default)]
struct Tally {
    /// Crashes while the daemon started, beside those under load.
    at_start: u64,
    /// Commands that were answered.
    answered: u64,
    /// Commands under way when the daemon was killed, and how many of them had been carried out.
    unanswered: u64,
    carried_out: u64,
    /// From the starts to the first answers.
    down: Duration,
}

/// What a client asked for last and was not answered.
#[derive(Clone, Debug)]
enum Unanswered {
    Grant { port: u16 },
    Extend { id: u64 },
    Revoke { id: u64 },
    Start { place: u8 },
    Stop,
}

/// An allocation as it was answered.
#[derive(Clone, Debug)]
struct Known {
    port: u16,
    expires_at: Option<Timestamp>,
}

/// Somebody who asks for allocations on a line, and what they know of both.
struct Person {
    number: u64,
    random: Random,
    /// Which address of the two that it may have the line has.
    place: u8,
    is_up: bool,
    allocations: BTreeMap<u64, Known>,
    /// Highest number of an allocation that was answered.
    highest: u64,
    next_port: u16,
    answered: u64,
    unanswered: Option<Unanswered>,
}

impl Person {
    fn new(number: u64, seed: u64) -> Self {
        Self {
            number,
            random: Random::new(seed ^ (number + 1) << 32),
            place: 0,
            is_up: true,
            allocations: BTreeMap::new(),
            highest: 0,
            next_port: 1,
            answered: 0,
            unanswered: None,
        }
    }

    fn line(&self) -> String {
        format!("line-{}", self.number)
    }

    fn address(&self, place: u8) -> String {
        format!("192.0.2.{}", 20 + 2 * self.number + u64::from(place))
    }

    fn session(&self, place: u8) -> Value {
        json!({
            "name": self.line(), "addresses": [format!("{}/32", self.address(place))],
            "rate": {"down": "100mbit", "up": "50mbit"},
        })
    }

    /// Asks for one thing after the other until nobody answers.
    fn work(&mut self, socket: &std::path::Path) {
        let Ok(mut client) = Client::connect(socket) else { return };
        while self.ask(&mut client) {
            self.answered += 1;
        }
    }

    /// Asks for something; false: it was not answered.
    fn ask(&mut self, client: &mut Client) -> bool {
        let own: Vec<u64> = self.allocations.keys().copied().collect();
        let lasting = self.allocations.iter().filter(|(_, known)| known.lasts());
        let lasting: Vec<u64> = lasting.map(|(id, _)| *id).collect();
        let choice = self.random.below(20);
        match choice {
            0 if self.is_up => self.stop(client),
            1 | 2 => {
                let place = self.random.below(2) as u8;
                self.start(client, place)
            }
            3..=5 if !lasting.is_empty() => {
                let id = self.random.choose(&lasting);
                self.extend(client, id)
            }
            6..=10 if !lasting.is_empty() => {
                let id = self.random.choose(&lasting);
                self.revoke(client, id)
            }
            _ if !self.is_up => self.start(client, self.place),
            _ if own.len() >= MOST && !lasting.is_empty() => {
                let id = self.random.choose(&lasting);
                self.revoke(client, id)
            }
            _ => self.grant(client),
        }
    }

    /// Asks, and returns the answer's body; none: nobody answered.
    fn told(
        &mut self,
        client: &mut Client,
        unanswered: Unanswered,
        (method, path, body): (&str, &str, Option<Value>),
        status: u16,
    ) -> Option<Value> {
        self.unanswered = Some(unanswered);
        let answer = client.ask(method, path, body.as_ref()).ok()?;
        assert_eq!(answer.status, status, "{method} {path} {body:?}: {answer:?}");
        self.unanswered = None;
        Some(answer.body["result"].clone())
    }

    fn grant(&mut self, client: &mut Client) -> bool {
        let port = self.next_port;
        self.next_port += 1;
        let duration = match self.random.below(4) {
            0 => json!("1s"),
            1 => Value::Null,
            _ => json!("1h"),
        };
        let flow = |way: &str, from: &str, to: &str| format!("{way} udp from {from} to {to}");
        let (near, far) = (format!("{}:{port}", self.address(self.place)), "203.0.113.0/24");
        let mut request = json!({
            "provider": "video",
            "selectors": [flow("down", far, &near), flow("up", &near, far)],
            "level": {"maximum": {"down": "2mbit", "up": "1mbit"}, "enforcement": "police"},
            "duration": duration,
        });
        if self.random.once_in(2) {
            request["application"] = json!("player");
            request["level"] = json!({"guaranteed": {"down": "1mbit"}, "priority": 2, "dscp": 34});
        }
        let asked = ("POST", "/v1/allocations", Some(request));
        let Some(granted) = self.told(client, Unanswered::Grant { port }, asked, 201) else { return false };
        let granted: Allocation = serde_json::from_value(granted).unwrap();
        assert!(granted.id.0 > self.highest, "{granted:?} has a number that was given out before");
        self.know(&granted, port);
        true
    }

    fn know(&mut self, allocation: &Allocation, port: u16) {
        self.highest = allocation.id.0;
        let known = Known { port, expires_at: allocation.expires_at };
        self.allocations.insert(allocation.id.0, known);
    }

    fn extend(&mut self, client: &mut Client, id: u64) -> bool {
        let asked = ("POST", &*format!("/v1/allocations/{id}/extend"), Some(json!({"by": "1h"})));
        // Those without an end can't be.
        let Some(end) = self.allocations[&id].expires_at else { return self.revoke(client, id) };
        let Some(extended) = self.told(client, Unanswered::Extend { id }, asked, 200) else { return false };
        let extended: Allocation = serde_json::from_value(extended).unwrap();
        assert_eq!(extended.expires_at, Some(end + EXTENSION), "{extended:?}");
        self.allocations.get_mut(&id).unwrap().expires_at = extended.expires_at;
        true
    }

    fn revoke(&mut self, client: &mut Client, id: u64) -> bool {
        let asked = ("DELETE", &*format!("/v1/allocations/{id}"), None);
        let revoked = self.told(client, Unanswered::Revoke { id }, asked, 200).is_some();
        if revoked {
            self.allocations.remove(&id);
        }
        revoked
    }

    fn start(&mut self, client: &mut Client, place: u8) -> bool {
        let asked = ("PUT", &*format!("/v1/sessions/{}", self.line()), Some(self.session(place)));
        let started = self.told(client, Unanswered::Start { place }, asked, 200).is_some();
        if started {
            (self.place, self.is_up) = (place, true);
        }
        started
    }

    fn stop(&mut self, client: &mut Client) -> bool {
        let asked = ("POST", &*format!("/v1/sessions/{}/stop", self.line()), None);
        let stopped = self.told(client, Unanswered::Stop, asked, 200).is_some();
        self.is_up &= !stopped;
        stopped
    }

    /// Checks the line as it is after a crash; returns whether what was not answered had been carried out.
    fn check_line(&mut self, line: &Session) -> bool {
        let is_at = |place| line.addresses == [format!("{}/32", self.address(place)).parse().unwrap()];
        let is = |place, up| is_at(place) && line.down_since.is_none() == up;
        let carried_out = match self.unanswered {
            Some(Unanswered::Start { place }) => is(place, true).then_some((place, true)),
            Some(Unanswered::Stop) => is(self.place, false).then_some((self.place, false)),
            _ => None,
        };
        match carried_out {
            Some(now) => (self.place, self.is_up) = now,
            None => assert!(is(self.place, self.is_up), "place {}, up {}: {line:?}", self.place, self.is_up),
        }
        carried_out.is_some()
    }

    /// Checks what is granted on the line likewise. What expired before `began` must be gone, what expires after
    /// `until` must be there.
    fn check_allocations(
        &mut self,
        found: &BTreeMap<u64, Allocation>,
        (began, until): (Timestamp, Timestamp),
    ) -> bool {
        let mut carried_out = false;
        let place = self.address(self.place);
        for (id, known) in &mut self.allocations {
            let allocation = found.get(id);
            let end = match self.unanswered {
                Some(Unanswered::Revoke { id: revoked }) if revoked == *id && allocation.is_none() => {
                    carried_out = true;
                    continue;
                }
                Some(Unanswered::Extend { id: extended }) if extended == *id => {
                    let end = allocation.and_then(|allocation| allocation.expires_at);
                    carried_out = end == known.expires_at.map(|end| end + EXTENSION);
                    if carried_out { end } else { known.expires_at }
                }
                _ => known.expires_at,
            };
            known.expires_at = end;
            let Some(allocation) = allocation else {
                assert!(end.is_some_and(|end| end <= until), "allocation {id} is lost: {known:?}");
                continue;
            };
            assert_eq!(allocation.expires_at, end, "{allocation:?}");
            assert!(end.is_none_or(|end| end > began), "it was over: {allocation:?}");
            let near = format!("{place}:{}", known.port);
            let flows: Vec<String> = allocation.selectors.iter().map(ToString::to_string).collect();
            assert!(flows.iter().all(|flow| flow.contains(&near)), "{flows:?}, not {near}");
        }
        self.allocations.retain(|id, _| found.contains_key(id));
        // What is there beyond it can only be what was asked for last.
        for allocation in found
            .values()
            .filter(|found| !self.allocations.contains_key(&found.id.0))
            .cloned()
            .collect::<Vec<_>>()
        {
            let Some(Unanswered::Grant { port }) = self.unanswered else {
                panic!("nobody was granted {allocation:?}; last asked: {:?}", self.unanswered)
            };
            assert!(!carried_out && allocation.id.0 > self.highest, "{allocation:?}");
            assert!(
                allocation.selectors[0].to_string().ends_with(&format!("{place}:{port}")),
                "{allocation:?}"
            );
            self.know(&allocation, port);
            carried_out = true;
        }
        carried_out
    }
}

impl Known {
    /// Whether it goes only when somebody revokes it.
    fn lasts(&self) -> bool {
        self.expires_at.is_none_or(|end| end.duration_since(Timestamp::now()) > EXTENSION / 2)
    }
}

fn register(daemon: &Daemon, clients: &[Person]) {
    let mut client = Client::connect(&daemon.socket()).unwrap();
    let mut must = |path: &str, body: Value| {
        let answer = client.ask("POST", path, Some(&body)).unwrap();
        assert_eq!(answer.status, 201, "{body}: {answer:?}");
    };
    must("/v1/providers", json!({"name": "video", "kind": "application", "networks": ["203.0.113.0/24"]}));
    must("/v1/providers/video/applications", json!({"name": "player"}));
    for client in clients {
        must("/v1/sessions", client.session(0));
    }
}

fn get<T: DeserializeOwned>(client: &mut Client, path: &str) -> Vec<T> {
    let answer = client.ask("GET", path, None).unwrap();
    assert_eq!(answer.status, 200, "{path}: {answer:?}");
    serde_json::from_value(answer.body["items"].clone()).unwrap()
}

/// Holds what the daemon says against what each client was told.
fn check(daemon: &Daemon, clients: &mut [Person], began: Timestamp, tally: &mut Tally, what: &str) {
    let mut client = Client::connect(&daemon.socket()).unwrap();
    let found: Vec<Allocation> = get(&mut client, "/v1/allocations");
    let until = Timestamp::now();
    let lines: Vec<Session> = get(&mut client, "/v1/sessions");
    println!("{what}: {} allocations", found.len());
    assert_eq!(lines.len(), clients.len());
    let of_no_line: Vec<_> = found.iter().filter(|found| found.session.is_none()).collect();
    assert!(of_no_line.is_empty(), "{of_no_line:?}");
    for person in clients {
        let line = person.line();
        let own =
            found.iter().filter(|found| found.session.as_ref().is_some_and(|name| name.as_str() == line));
        let own = own.map(|found| (found.id.0, found.clone())).collect();
        let mut carried_out =
            person.check_line(lines.iter().find(|found| found.name.as_str() == line).unwrap());
        carried_out |= person.check_allocations(&own, (began, until));
        tally.carried_out += u64::from(carried_out);
        tally.unanswered += u64::from(person.unanswered.take().is_some());
    }
    // The start has left nothing to be repaired.
    let status = client.ask("GET", "/v1/status", None).unwrap();
    assert_eq!(status.body["gateway"]["repairs"], json!([]));
    assert_eq!(status.body["gateway"]["taken_over"], true);
    let repaired = client.ask("POST", "/v1/reconcile", None).unwrap();
    assert_eq!((repaired.status, &repaired.body["items"]), (200, &json!([])));
}

/// Holds what the kernel enforces, read past the daemon, against what the daemon says.
fn compare(daemon: &Daemon, net: &Topology) {
    // What expires in between is on one side only, and gone on both the next time.
    let mut client = Client::connect(&daemon.socket()).unwrap();
    let (known, kernel) = loop {
        let before: Vec<Allocation> = get(&mut client, "/v1/allocations");
        let kernel = Kernel::read(daemon, &net.gateway).unwrap();
        if get::<Allocation>(&mut client, "/v1/allocations") == before {
            break (before, kernel);
        }
    };
    let enforced: BTreeSet<u16> = kernel.maps.allocations.keys().map(|index| (index / 2) as u16).collect();
    assert_eq!(enforced, known.iter().map(|known| known.slot).collect());
    let selectors: usize = known.iter().map(|known| known.selectors.len()).sum();
    assert_eq!(kernel.maps.rules.len(), selectors);
    let leaf = |class: u16| 0x4000 + u32::from(class);
    let classes: BTreeSet<u32> = kernel.classes.iter().map(|class| class.handle & 0xffff).collect();
    let expected: BTreeSet<u32> = known.iter().filter_map(|known| known.class.map(leaf)).collect();
    let found: BTreeSet<u32> = classes.range(0x4000..).copied().collect();
    assert_eq!(found, expected, "classes of allocations");
}
