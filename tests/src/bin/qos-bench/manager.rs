//! The service manager: decisions a second of the core alone, grants a second that are durable and in the
//! kernel, how soon one is enforced, and how long a start with everything takes.
//!
//! The core is given states of several sizes in turn, in the same process. The daemon is the real one, with
//! clients on connections of their own that stay open. Each figure has its baseline from the same run: a
//! decision that finds nothing to do, and transactions of one row in an SQLite file on the same disk, made as
//! durable as the daemon's.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};
use qos_tests::api::Client;
use qos_tests::daemon::{Config, Daemon};
use qos_tests::topology::Topology;
use qos_userspace::domain::{BitsPerSecond, Directed, Enforcement, LinkLayer, Name, selector};
use qos_userspace::manager::{
    self, Change, Command, GrantRequest, LINE_SLOTS, LevelRequest, NewSession, SlotKind, State,
};
use qos_userspace::store::{SqliteStore, Store as _};
use rusqlite::Connection;
use serde::Serialize;
use serde_json::json;

use crate::gateway::{self, CAPACITY};
use crate::programs::cpu_time;

/// Sizes that the core is measured at beside the largest.
const SIZES: [u32; 2] = [1_000, 10_000];
/// Most allocations that there are slots for.
pub(crate) const LARGEST: u32 = SlotKind::Allocation.last() as u32;
/// Of so many allocations in the core one is guaranteed something.
const GUARANTEED_OF: u32 = 5;
/// Of so many allocations at a start one is shaped: 8,192 of all that there are slots for.
const SHAPED_OF: u32 = 8;
/// Decisions of a round.
const DECISIONS: u32 = 5_000;
/// Clients at once, and their lines.
const CLIENTS: u32 = 32;
/// In which grants are counted, and in which the baseline is.
const WINDOW: Duration = Duration::from_secs(2);
const BASELINE: Duration = Duration::from_millis(500);
/// Grants of one client while nobody else asks.
const SINGLE: u32 = 200;
/// Changes of one transaction while a store is filled.
const TOGETHER: usize = 1_000;

/// Goals on two virtual CPUs.
mod goal {
    pub(super) const DECISIONS: f64 = 300_000.0;
    pub(super) const GROWTH: f64 = 1.3;
    pub(super) const GRANTS: f64 = 3_000.0;
    pub(super) const P99_MS: f64 = 25.0;
    pub(super) const ENFORCED_MS: f64 = 5.0;
    pub(super) const START_S: f64 = 5.0;
}

/// Everything that one run measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    kernel: String,
    cpus: usize,
    rounds: usize,
    core: Vec<Core>,
    /// Median over rounds, policed grants of 32 clients.
    policed: Grants,
    /// The same with a guarantee each: a class in the kernel's scheduler.
    guaranteed: Grants,
    /// One client, one grant after the other: from request to answer in ms. The kernel enforces it before.
    answered_policed: Spread,
    answered_guaranteed: Spread,
    /// Transactions of one row a second in SQLite with `synchronous = FULL`, the median of all rounds.
    sqlite_per_second: f64,
    start: Start,
}

/// The core at one size: ns of one, medians over rounds.
#[derive(Debug, Serialize)]
struct Core {
    allocations: u32,
    lines: u32,
    /// A decision that finds nothing to do.
    empty: f64,
    /// A grant of a policed level, and of a guarantee.
    policed: f64,
    guaranteed: f64,
    /// A guarantee for which there is no room, with an offer of what there is.
    refused: f64,
    /// A revocation.
    revoked: f64,
    /// A grant and its revocation, each decided and applied.
    carried_out: f64,
}

/// Grants by many clients at once.
#[derive(Debug, Serialize)]
struct Grants {
    per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
}

#[derive(Debug, Serialize)]
struct Spread {
    count: usize,
    median_ms: f64,
    p99_ms: f64,
}

/// Starts of a daemon with many allocations, in seconds.
#[derive(Debug, Serialize)]
struct Start {
    allocations: u32,
    shaped: u32,
    lines: u32,
    /// With nothing in the kernel.
    from_nothing: f64,
    /// Taking over what a daemon left behind that was killed.
    taking_over: f64,
}

pub(crate) fn measure(rounds: usize, most: u32) -> Result<Report> {
    let core = core(rounds, most)?;
    let (grants, singles, sqlite_per_second) = grants(rounds)?;
    let ([policed, guaranteed], [answered_policed, answered_guaranteed]) = (grants, singles);
    Ok(Report {
        kernel: nix::sys::utsname::uname()?.release().to_string_lossy().into_owned(),
        cpus: thread::available_parallelism()?.get(),
        rounds,
        core,
        policed,
        guaranteed,
        answered_policed,
        answered_guaranteed,
        sqlite_per_second,
        start: start(most)?,
    })
}

fn address(line: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a40_0000 + line)
}

fn line_name(line: u32) -> Result<Name> {
    Ok(format!("line-{line}").parse()?)
}

/// A state with as many lines, and what led to it.
fn with_lines(lines: u32) -> Result<(State, Vec<Change>)> {
    let mut state = gateway::state(qos_common::abi::MAX_RULES);
    let network: IpNet = "203.0.113.0/24".parse()?;
    gateway::add_provider(&mut state, "video", network)?;
    let mut changes: Vec<Change> = state.providers.values().cloned().map(Change::PutProvider).collect();
    for line in 0..lines {
        let session = NewSession {
            name: line_name(line)?,
            addresses: vec![IpNet::from(std::net::IpAddr::from(address(line)))],
            rate: Directed { up: BitsPerSecond(50_000_000), down: BitsPerSecond(100_000_000) },
            link_layer: LinkLayer::Ethernet,
            overhead: None,
            delay_us: 0,
            loss_ppm: 0,
            segments: Vec::new(),
            bras: None,
            source: None,
        };
        changes.extend(gateway::decide(&mut state, &Command::AddSession(session))?);
    }
    Ok((state, changes))
}

/// What a grant is for.
#[derive(Clone, Copy)]
enum Kind {
    Policed,
    Guaranteed,
    /// More than a line has.
    TooMuch,
    Shaped,
}

/// A grant for a line, from a port that no other one on it is from.
fn request(line: u32, port: u32, kind: Kind) -> Result<Command> {
    let rate = |mbit: u64| Directed { up: None, down: Some(BitsPerSecond(mbit * 1_000_000)) };
    let level = match kind {
        Kind::Policed => LevelRequest {
            maximum: rate(2),
            enforcement: Some(Enforcement::Police),
            ..LevelRequest::default()
        },
        Kind::Guaranteed => LevelRequest { guaranteed: rate(1), ..LevelRequest::default() },
        Kind::TooMuch => LevelRequest { guaranteed: rate(500), ..LevelRequest::default() },
        Kind::Shaped => LevelRequest { maximum: rate(2), ..LevelRequest::default() },
    };
    let flow = format!("down udp from 203.0.113.0/24:{port} to {}", address(line));
    Ok(Command::Grant(Box::new(GrantRequest {
        provider: "video".parse()?,
        application: None,
        selectors: selector::parse_flows(&flow)?,
        profile: None,
        level,
        precedence: 0,
        duration: Some(SignedDuration::from_hours(1)),
    })))
}

/// A state that has room for the grants of a round and no more.
fn with_allocations(allocations: u32) -> Result<(State, u32)> {
    let lines = allocations.min(LINE_SLOTS - 1);
    let (mut state, _) = with_lines(lines)?;
    for number in 0..allocations - 1 {
        let kind = if number.is_multiple_of(GUARANTEED_OF) { Kind::Guaranteed } else { Kind::Policed };
        gateway::decide(&mut state, &request(number % lines, 1 + number / lines, kind)?)?;
    }
    Ok((state, lines))
}

/// The core at each size in turn.
fn core(rounds: usize, most: u32) -> Result<Vec<Core>> {
    let mut states = Vec::new();
    for size in SIZES.into_iter().filter(|size| *size < most).chain([most]) {
        let (state, lines) = with_allocations(size)?;
        states.push((state, lines, size, [const { Vec::new() }; 6]));
    }
    for round in 0..rounds as u32 {
        for (state, lines, _, times) in &mut states {
            let found = time_decisions(state, *lines, round)?;
            times.iter_mut().zip(found).for_each(|(times, found)| times.push(found));
        }
    }
    let figures = states.into_iter().map(|(_, lines, allocations, mut times)| {
        let [empty, policed, guaranteed, refused, revoked, carried_out] =
            std::array::from_fn(|place| crate::median(&mut times[place]));
        Core { allocations, lines, empty, policed, guaranteed, refused, revoked, carried_out }
    });
    Ok(figures.collect())
}

/// CPU time of decisions of each kind, in ns, in the order of [`Core`].
fn time_decisions(state: &mut State, lines: u32, round: u32) -> Result<[f64; 6]> {
    // Spread over lines in an order that no cache guesses.
    let line = |number: u32| (number.wrapping_add(round).wrapping_mul(2_654_435_761)) % lines;
    let commands = |kind| -> Result<Vec<Command>> {
        (0..DECISIONS).map(|number| request(line(number), 40_000 + number, kind)).collect()
    };
    let (policed, guaranteed) = (commands(Kind::Policed)?, commands(Kind::Guaranteed)?);
    let refused = commands(Kind::TooMuch)?;
    let ids: Vec<_> = state.allocations.keys().copied().collect();
    let revoked: Vec<Command> =
        (0..DECISIONS).map(|number| Command::Revoke { id: ids[line(number) as usize % ids.len()] }).collect();
    let now = Timestamp::now();
    let decided = |commands: &[Command], is_granted: bool| -> Result<f64> {
        let begin = cpu_time()?;
        for command in commands {
            let decision = std::hint::black_box(manager::decide(state, command, now));
            ensure!(decision.is_ok() == is_granted, "{command:?}: {decision:?}");
        }
        Ok((cpu_time()? - begin) / commands.len() as f64)
    };
    let empty = decided(&vec![Command::Expire; DECISIONS as usize], true)?;
    let times = [
        empty,
        decided(&policed, true)?,
        decided(&guaranteed, true)?,
        decided(&refused, false)?,
        decided(&revoked, true)?,
    ];
    let begin = cpu_time()?;
    for command in &policed {
        let granted = manager::decide(state, command, now)?;
        granted.changes.iter().for_each(|change| state.apply(change));
        let id = state.allocations.keys().next_back().copied().context("something is granted")?;
        let revoked = manager::decide(state, &Command::Revoke { id }, now)?;
        revoked.changes.iter().for_each(|change| state.apply(change));
    }
    let [empty, policed, guaranteed, refused, revoked] = times;
    let carried_out = (cpu_time()? - begin) / f64::from(DECISIONS);
    Ok([empty, policed, guaranteed, refused, revoked, carried_out])
}

fn daemon_config() -> Config {
    Config {
        lan_capacity: CAPACITY,
        wan_capacity: CAPACITY,
        // Nothing but what is asked for is done.
        more: "reconcile_interval = \"1h\"".to_owned(),
        ..Config::default()
    }
}

fn body(line: u32, port: u32, guaranteed: bool) -> serde_json::Value {
    let flow = format!("down udp from 203.0.113.0/24:{port} to {}", address(line));
    let level = if guaranteed {
        json!({"guaranteed": {"down": "64kbit"}})
    } else {
        json!({"maximum": {"down": "2mbit"}, "enforcement": "police"})
    };
    json!({"provider": "video", "selectors": [flow], "level": level, "duration": "1h"})
}

fn post(client: &mut Client, path: &str, body: &serde_json::Value) -> Result<serde_json::Value> {
    let answer = client.ask("POST", path, Some(body))?;
    ensure!(answer.status == 201, "POST {path} {body}: {} {}", answer.status, answer.body);
    Ok(answer.body)
}

/// Grants of many clients, of one client, and the baseline's transactions a second.
fn grants(rounds: usize) -> Result<([Grants; 2], [Spread; 2], f64)> {
    let net = Topology::pair()?;
    let daemon = Daemon::start(&net.gateway, &daemon_config())?;
    let mut client = Client::connect(&daemon.socket())?;
    let provider = json!({"name": "video", "kind": "application", "networks": ["203.0.113.0/24"]});
    post(&mut client, "/v1/providers", &provider)?;
    for line in 0..CLIENTS {
        let line = json!({
            "name": line_name(line)?, "addresses": [format!("{}/32", address(line))],
            "rate": {"down": "1gbit", "up": "1gbit"},
        });
        post(&mut client, "/v1/sessions", &line)?;
    }
    let mut sqlite = Baseline::new(&daemon.state_dir())?;
    let mut rows = Vec::new();
    let mut figures = [const { [const { Vec::new() }; 3] }; 2];
    let mut singles = [const { Vec::new() }; 2];
    for _ in 0..rounds {
        for (guaranteed, (figures, singles)) in
            [false, true].into_iter().zip(figures.iter_mut().zip(&mut singles))
        {
            rows.push(sqlite.transactions_per_second()?);
            let (found, ids) = many(&daemon, guaranteed)?;
            figures.iter_mut().zip(found).for_each(|(figures, found)| figures.push(found));
            revoke(&daemon, &ids)?;
            let mut ids = Vec::new();
            for number in 0..SINGLE {
                let body = body(number % CLIENTS, 1 + number, guaranteed);
                let begin = Instant::now();
                let granted = post(&mut client, "/v1/allocations", &body)?;
                singles.push(begin.elapsed().as_secs_f64() * 1e3);
                ids.push(granted["result"]["id"].as_u64().context("no id")?);
            }
            revoke(&daemon, &ids)?;
        }
    }
    let grants = figures.map(|mut figures| {
        let [per_second, p50_ms, p99_ms] = std::array::from_fn(|place| crate::median(&mut figures[place]));
        Grants { per_second, p50_ms, p99_ms }
    });
    let singles = singles.map(|mut times| {
        let (median_ms, p99_ms) = (crate::median(&mut times), at(&mut times, 0.99));
        Spread { count: times.len(), median_ms, p99_ms }
    });
    Ok((grants, singles, crate::median(&mut rows)))
}

/// A share of sorted values lies below what is returned.
fn at(values: &mut [f64], share: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get((values.len() as f64 * share) as usize).copied().unwrap_or(f64::NAN)
}

/// Grants by all clients for a while: a second, median and 99th percentile in ms; and what was granted.
fn many(daemon: &Daemon, guaranteed: bool) -> Result<([f64; 3], Vec<u64>)> {
    let (start, socket) = (&Barrier::new(CLIENTS as usize), &daemon.socket());
    let results: Vec<Result<Vec<(f64, u64)>>> = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|line| {
                scope.spawn(move || {
                    let client = Client::connect(socket);
                    start.wait();
                    let (mut client, mut granted) = (client?, Vec::new());
                    let begin = Instant::now();
                    while begin.elapsed() < WINDOW {
                        // Those of a client alone have other ports.
                        let body = body(line, 10_000 + granted.len() as u32, guaranteed);
                        let asked = Instant::now();
                        let answer = post(&mut client, "/v1/allocations", &body)?;
                        let id = answer["result"]["id"].as_u64().context("no id")?;
                        granted.push((asked.elapsed().as_secs_f64() * 1e3, id));
                    }
                    Ok(granted)
                })
            })
            .collect();
        let join = |client: thread::ScopedJoinHandle<'_, _>| {
            client.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a client panicked")))
        };
        clients.into_iter().map(join).collect()
    });
    let granted: Vec<_> = results.into_iter().collect::<Result<Vec<_>>>()?.concat();
    let mut times: Vec<f64> = granted.iter().map(|(time, _)| *time).collect();
    let per_second = times.len() as f64 / WINDOW.as_secs_f64();
    Ok(([per_second, at(&mut times, 0.5), at(&mut times, 0.99)], granted.iter().map(|(_, id)| *id).collect()))
}

/// Takes everything back, by as many clients.
fn revoke(daemon: &Daemon, ids: &[u64]) -> Result<()> {
    let socket = &daemon.socket();
    let share = ids.len().div_ceil(CLIENTS as usize).max(1);
    let results: Vec<Result<()>> = thread::scope(|scope| {
        let clients: Vec<_> = ids
            .chunks(share)
            .map(|ids| {
                scope.spawn(move || {
                    let mut client = Client::connect(socket)?;
                    for id in ids {
                        let answer = client.ask("DELETE", &format!("/v1/allocations/{id}"), None)?;
                        ensure!(answer.status == 200, "revoking {id}: {answer:?}");
                    }
                    Ok(())
                })
            })
            .collect();
        let join = |client: thread::ScopedJoinHandle<'_, _>| {
            client.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a client panicked")))
        };
        clients.into_iter().map(join).collect()
    });
    results.into_iter().collect()
}

/// The least that durability costs with SQLite: rows by themselves.
struct Baseline(Connection);

impl Baseline {
    fn new(folder: &Path) -> Result<Self> {
        let connection = Connection::open(folder.join("baseline.sqlite"))?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        connection.pragma_update(None, "synchronous", "full")?;
        connection.execute_batch("CREATE TABLE rows (id INTEGER PRIMARY KEY, text TEXT) STRICT")?;
        Ok(Self(connection))
    }

    fn transactions_per_second(&mut self) -> Result<f64> {
        let begin = Instant::now();
        let mut count = 0;
        while begin.elapsed() < BASELINE {
            self.0.prepare_cached("INSERT INTO rows (text) VALUES (?)")?.execute(["one row"])?;
            count += 1;
        }
        Ok(f64::from(count) / begin.elapsed().as_secs_f64())
    }
}

/// Starts with so many allocations.
fn start(allocations: u32) -> Result<Start> {
    let lines = allocations.min(LINE_SLOTS - 1);
    let net = Topology::pair()?;
    let mut daemon = Daemon::prepare(&net.gateway, &daemon_config())?;
    std::fs::create_dir_all(daemon.state_dir())?;
    {
        let mut store = SqliteStore::open(daemon.state_dir().join("qos.sqlite"))?;
        let (mut state, mut changes) = with_lines(lines)?;
        for number in 0..allocations {
            let kind = if number.is_multiple_of(SHAPED_OF) { Kind::Shaped } else { Kind::Policed };
            changes.extend(gateway::decide(&mut state, &request(number % lines, 1 + number / lines, kind)?)?);
        }
        for changes in changes.chunks(TOGETHER) {
            store.commit(changes, &[])?;
        }
    }
    let timed = |daemon: &mut Daemon| -> Result<f64> {
        let begin = Instant::now();
        daemon.restart()?;
        Ok(begin.elapsed().as_secs_f64())
    };
    let from_nothing = timed(&mut daemon)?;
    let counted = daemon.status()?.counted;
    ensure!(counted.allocations == allocations as usize, "{counted:?}");
    daemon.kill()?;
    let taking_over = timed(&mut daemon)?;
    ensure!(daemon.status()?.gateway.taken_over, "it began anew");
    Ok(Start { allocations, shaped: allocations.div_ceil(SHAPED_OF), lines, from_nothing, taking_over })
}

#[expect(clippy::print_stdout, reason = "a program that reports to its terminal")]
pub(crate) fn print(report: &Report) {
    let text = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    println!("kernel {}, {} CPUs, medians of {} rounds in turn\n", report.kernel, report.cpus, report.rounds);
    let header =
        ["allocations", "lines", "nothing due", "policed", "guaranteed", "refused", "revoked", "and applied"];
    let rows: Vec<Vec<String>> = report
        .core
        .iter()
        .map(|core| {
            let times =
                [core.empty, core.policed, core.guaranteed, core.refused, core.revoked, core.carried_out];
            let counts = [core.allocations.to_string(), core.lines.to_string()];
            counts.into_iter().chain(times.map(|ns| format!("{ns:.0}"))).collect()
        })
        .collect();
    println!("ns a decision\n\n{}", crate::markdown(&text(&header), &rows));
    let grants = [("policed", &report.policed), ("guaranteed", &report.guaranteed)];
    let rows: Vec<Vec<String>> = grants
        .iter()
        .map(|(what, grants)| {
            vec![
                (*what).to_owned(),
                format!("{:.0}", grants.per_second),
                format!("{:.2}", grants.per_second / report.sqlite_per_second),
                format!("{:.1}", grants.p50_ms),
                format!("{:.1}", grants.p99_ms),
            ]
        })
        .collect();
    println!(
        "{CLIENTS} clients; one row a transaction in SQLite: {:.0} a second\n\n{}",
        report.sqlite_per_second,
        crate::markdown(&text(&["grants", "a second", "of SQLite", "p50 ms", "p99 ms"]), &rows)
    );
    println!("{}", crate::markdown(&text(&["", "measured", "goal"]), &goals(report)));
}

fn goals(report: &Report) -> Vec<Vec<String>> {
    let row = |what: String, measured: String, goal: String| vec![what, measured, goal];
    let mut rows = Vec::new();
    if let [first, .., last] = &report.core[..] {
        let slowest = last.policed.max(last.guaranteed);
        let growth = (last.policed / first.policed).max(last.guaranteed / first.guaranteed);
        rows.push(row(
            format!("decisions a second, {} allocations", last.allocations),
            format!("{:.0}", 1e9 / slowest),
            format!("≥ {:.0}", goal::DECISIONS),
        ));
        rows.push(row(
            format!("a decision, of one among {}", first.allocations),
            format!("{growth:.2}"),
            format!("≤ {:.1}", goal::GROWTH),
        ));
    }
    for (what, grants, single) in [
        ("policed", &report.policed, &report.answered_policed),
        ("guaranteed", &report.guaranteed, &report.answered_guaranteed),
    ] {
        rows.push(row(
            format!("grants a second, durable, {what}"),
            format!("{:.0}", grants.per_second),
            format!("≥ {:.0}", goal::GRANTS),
        ));
        rows.push(row(
            format!("the same, p99 of {CLIENTS} clients"),
            format!("{:.1} ms", grants.p99_ms),
            format!("≤ {:.0} ms", goal::P99_MS),
        ));
        rows.push(row(
            format!("one client, enforced and durable, {what}, median"),
            format!("{:.2} ms", single.median_ms),
            format!("≤ {:.0} ms", goal::ENFORCED_MS),
        ));
    }
    let Start { allocations, shaped, lines, from_nothing, taking_over } = &report.start;
    rows.push(row(
        format!("start with {allocations} allocations, {shaped} shaped, {lines} lines"),
        format!("{from_nothing:.1} s"),
        format!("≤ {:.0} s", goal::START_S),
    ));
    rows.push(row(
        "the same, taking over".to_owned(),
        format!("{taking_over:.1} s"),
        format!("≤ {:.0} s", goal::START_S),
    ));
    rows
}
