//! What a look-up costs as rules become more: ours, one look-up in a trie of as many prefixes, one in a hash of
//! as many flows, and the same rules in a set of nftables.
//!
//! All are figures over doing nothing, of uniform traffic, each count of rules by itself and everything in turns.
//! The first three are timed as by `bench classify`; nftables at the ingress hook of an interface whose packets
//! are all dropped there, with the set and without.

use std::ops::ControlFlow;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use qos_common::abi::{MAX_RULES, MAX_RULES_RANGE};
use qos_tests::classbench::{self, Tuple, TupleRule};
use qos_tests::random::Random;
use serde::Serialize;

use crate::forwarding::Router;
use crate::nftables::{self, Verdict};
use crate::plot::{self, Series};
use crate::programs::{Driver, Step};
use crate::rules::{Classifier, Gateway, LINES, fill_baselines, steps};
use crate::{markdown, median};

/// Packets of a list, at least; with more rules as many as there are.
const PACKETS: usize = 100_000;
/// Packets of one measurement, at least, and measurements of a round.
const CHUNK: u32 = 200_000;
const CHUNKS: u32 = 3;
/// Comparisons of a packet with a rule that checking may take.
const COMPARISONS: usize = 4_000_000_000;
/// Time of one round of nftables.
const ROUND: Duration = Duration::from_millis(200);

/// Everything that one run measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    kernel: String,
    cpus: usize,
    rounds: usize,
    points: Vec<Point>,
    skipped: Vec<String>,
}

/// One count of rules. Times are of a packet, medians, over doing nothing.
#[derive(Debug, Serialize)]
struct Point {
    rules: usize,
    /// Packets whose answer was compared with the linear search.
    compared: usize,
    mismatches: usize,
    load_ms: f64,
    classify_ns: f64,
    lpm_ns: f64,
    hash_ns: f64,
    #[serde(flatten)]
    nftables: Option<Nftables>,
}

#[derive(Debug, Serialize)]
struct Nftables {
    nftables_ns: f64,
    /// Rules that its set holds; the others overlap them in a way that such a set refuses.
    nftables_rules: usize,
    /// Part of the packets that were in the set.
    nftables_matched: f64,
    nftables_load_ms: f64,
}

pub(crate) fn measure(counts: &[usize], rounds: usize) -> Result<Report> {
    let mut report = Report {
        kernel: nix::sys::utsname::uname()?.release().to_string_lossy().into_owned(),
        cpus: thread::available_parallelism()?.get(),
        rounds,
        points: Vec::new(),
        skipped: Vec::new(),
    };
    for count in counts {
        let most = *MAX_RULES_RANGE.end();
        if *count > most as usize {
            report.skipped.push(format!("{count} rules: the classifier takes {most}"));
            continue;
        }
        let point = measure_count(*count, rounds, &mut report.skipped);
        report.points.push(point.with_context(|| format!("{count} rules"))?);
    }
    Ok(report)
}

fn measure_count(count: usize, rounds: usize, skipped: &mut Vec<String>) -> Result<Point> {
    let rules = classbench::generate(count, 1);
    let packets = classbench::uniform(&rules, count.max(PACKETS), 2);
    let mut gateway = Gateway::start("growth", None, LINES, MAX_RULES.max(count as u32))?;
    let loaded = gateway.load(&rules)?;
    let mut driver = Driver::with_room(packets.len().max(1 << 17) as u32)?;
    let mut classifier = Classifier::load(&gateway.pins)?;

    let sample = &packets[..packets.len().min(COMPARISONS / count)];
    let answers = classifier.answers(&mut driver, sample)?;
    let wanted = classbench::first_matches(&rules, sample);
    let wrong =
        answers.iter().zip(&wanted).filter(|(answer, rule)| **answer != loaded.answer(**rule)).count();

    // Each of the hash's flows is there, and comes as often as the others, in an order that nobody guesses.
    let flows = if count < packets.len() { classbench::uniform(&rules, count, 3) } else { packets.clone() };
    fill_baselines(&mut driver, None, &rules, &flows)?;
    let [of_rules, of_flows] = [packets.clone(), again(&flows, packets.len())].map(|packets| steps(&packets));
    let mut subjects = [
        (driver.own_fd("bench_empty")?, &of_rules, Vec::new()),
        (driver.own_fd("bench_lpm")?, &of_rules, Vec::new()),
        (driver.own_fd("bench_hash")?, &of_flows, Vec::new()),
        (classifier.program("bench_classify")?, &of_rules, Vec::new()),
    ];
    let mut nft = match Table::load(&rules, &of_rules)? {
        ControlFlow::Continue(table) => Some(table),
        ControlFlow::Break(reason) => {
            skipped.push(format!("{count} rules, {reason}"));
            None
        }
    };
    let chunk = CHUNK.max(packets.len() as u32);
    for _ in 0..rounds {
        for (program, steps, times) in &mut subjects {
            driver.set_steps(steps)?;
            driver.set_target(program, true)?;
            // Once round the flows to warm up.
            driver.run("bench_xdp", steps.len() as u32)?;
            for _ in 0..CHUNKS {
                times.push(driver.time("bench_xdp", chunk)?);
            }
        }
        nft.as_mut().map_or(Ok(()), Table::round)?;
    }
    let [empty, lpm, hash, classify] = subjects.map(|(_, _, mut times)| median(&mut times));
    Ok(Point {
        rules: count,
        compared: sample.len(),
        mismatches: wrong,
        load_ms: loaded.time.as_secs_f64() * 1e3,
        classify_ns: classify - empty,
        lpm_ns: lpm - empty,
        hash_ns: hash - empty,
        nftables: nft.map(Table::figures).transpose()?,
    })
}

/// `count` packets of these flows.
fn again(flows: &[Tuple], count: usize) -> Vec<Tuple> {
    let mut packets: Vec<_> = flows.iter().cycle().take(count).copied().collect();
    Random::new(8).shuffle(&mut packets);
    packets
}

/// The rules in nftables, and an interface without them.
struct Table {
    driver: Driver,
    /// With the set, and without.
    routers: [Router; 2],
    times: [Vec<f64>; 2],
    /// Packets that came to the set.
    sent: u64,
    rules: usize,
    load_time: Duration,
}

impl Table {
    fn load(rules: &[TupleRule], steps: &[Step]) -> Result<ControlFlow<String, Self>> {
        let routers = [Router::new()?, Router::new()?];
        let held = nftables::holdable(rules);
        let mut load_time = Duration::ZERO;
        for (router, rules) in routers.iter().zip([&held[..], &[]]) {
            let text = nftables::text(rules, Verdict::Drop, Verdict::Drop)?;
            match nftables::load(&router.namespace, &text)? {
                ControlFlow::Continue(time) => load_time = load_time.max(time),
                ControlFlow::Break(reason) => return Ok(ControlFlow::Break(reason)),
            }
        }
        let mut driver = Driver::with_room(steps.len().max(1 << 17) as u32)?;
        driver.set_steps(steps)?;
        let times = [Vec::new(), Vec::new()];
        Ok(ControlFlow::Continue(Self { driver, routers, times, sent: 0, rules: held.len(), load_time }))
    }

    fn round(&mut self) -> Result<()> {
        for (place, router) in self.routers.iter().enumerate() {
            let (packets, time) = self.driver.take(&router.path(), ROUND)?;
            self.times[place].push(time);
            if place == 0 {
                self.sent += packets;
            }
        }
        Ok(())
    }

    fn figures(mut self) -> Result<Nftables> {
        let matched = nftables::counted(&self.routers[0].namespace)?;
        let [with, without] = &mut self.times;
        Ok(Nftables {
            nftables_ns: median(with) - median(without),
            nftables_rules: self.rules,
            nftables_matched: matched as f64 / self.sent as f64,
            nftables_load_ms: self.load_time.as_secs_f64() * 1e3,
        })
    }
}

/// Writes the plot.
pub(crate) fn draw(report: &Report, path: &Path) -> Result<()> {
    let of = |name, color, figure: fn(&Point) -> Option<f64>| Series {
        name,
        color,
        points: report.points.iter().filter_map(|point| Some((point.rules as f64, figure(point)?))).collect(),
    };
    let svg = plot::log_log(
        "A look-up among many rules, uniform traffic",
        "rules",
        "ns a packet over none",
        &[
            of("qos", "#0072b2", |point| Some(point.classify_ns)),
            of("LPM trie, as many prefixes", "#d55e00", |point| Some(point.lpm_ns)),
            of("hash, as many flows", "#009e73", |point| Some(point.hash_ns)),
            of("nftables, concatenated set", "#aa3377", |point| Some(point.nftables.as_ref()?.nftables_ns)),
        ],
    );
    std::fs::write(path, svg).with_context(|| format!("writing {}", path.display()))
}

#[expect(clippy::print_stdout, reason = "a program that reports to its terminal")]
pub(crate) fn print(report: &Report) {
    let Report { kernel, cpus, rounds, .. } = report;
    println!("kernel {kernel}, {cpus} CPUs, medians of {rounds} rounds in turn; ns a packet over none\n");
    let header = [
        "rules",
        "qos",
        "LPM",
        "hash",
        "nftables",
        "load qos, ms",
        "load nftables, ms",
        "held by nftables",
        "wrong answers",
    ];
    let rows: Vec<_> = report
        .points
        .iter()
        .map(|point| {
            let nft = |figure: fn(&Nftables) -> f64| {
                point.nftables.as_ref().map_or("-".to_owned(), |nft| format!("{:.0}", figure(nft)))
            };
            vec![
                point.rules.to_string(),
                format!("{:.1}", point.classify_ns),
                format!("{:.1}", point.lpm_ns),
                format!("{:.1}", point.hash_ns),
                nft(|nft| nft.nftables_ns),
                format!("{:.0}", point.load_ms),
                nft(|nft| nft.nftables_load_ms),
                nft(|nft| nft.nftables_rules as f64),
                format!("{} of {}", point.mismatches, point.compared),
            ]
        })
        .collect();
    println!("{}", markdown(&header.map(str::to_owned), &rows));
    let goals = goals(&report.points);
    if !goals.is_empty() {
        println!("{}", markdown(&["", "measured", "goal"].map(str::to_owned), &goals));
    }
    for line in &report.skipped {
        println!("skipped: {line}");
    }
}

/// What has a goal: small sets beside a trie, and a million rules beside a hundred thousand.
fn goals(points: &[Point]) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    for point in points.iter().filter(|point| point.rules <= 1_000) {
        rows.push(vec![
            format!("{} rules, over LPM", point.rules),
            format!("{:+.1} ns", point.classify_ns - point.lpm_ns),
            "≤ +20 ns".to_owned(),
        ]);
    }
    let find = |rules| points.iter().find(|point| point.rules == rules);
    if let (Some(many), Some(most)) = (find(100_000), find(1_000_000)) {
        let ratio = format!("{:.2}", most.classify_ns / many.classify_ns);
        rows.push(vec!["1,000,000 rules, of 100,000".to_owned(), ratio, "≤ 3.00".to_owned()]);
        let time = format!("{:.1} s", most.load_ms / 1e3);
        rows.push(vec!["1,000,000 rules, load".to_owned(), time, "≤ 20 s".to_owned()]);
    }
    rows
}
