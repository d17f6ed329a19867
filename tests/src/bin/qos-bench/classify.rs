//! The classifier under a rule set: what a look-up costs beside one look-up in the kernel's own maps, what
//! the whole ingress path costs, and how long rules take to come and go.
//!
//! Rules are granted as allocations by the manager and put into the kernel as by `qosd`, with 64 providers
//! and 1,000 lines. Every answer is compared with a linear search. `lpm` is one look-up of the packet's
//! destination among as many distinct prefixes as there are rules, `hash` one of the whole flow among those
//! of the uniform traffic; `classify` is the look-up alone, `path` the whole ingress from parsing to the
//! verdict. An IPv6 set is made of the IPv4 one ([`widening`]), which is measured in turn with it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread;

use anyhow::{Context as _, Result};
use aya::programs::ProgramFd;
use qos_common::abi::MAX_RULES;
use qos_common::classify::Family;
use qos_tests::classbench::{self, Plan, Tuple, TupleRule};
use serde::Serialize;

use crate::programs::{Driver, Step};
use crate::rules::{
    Classifier, Gateway, LINES, Loaded, PROVIDERS, fill_baselines, steps, verified, widening,
};
use crate::{forward, markdown, median};

/// Flows of the uniform and the flood traffic, and of the hot.
const FLOWS: usize = 100_000;
const HOT_FLOWS: usize = 1_000;
/// Packets of one measurement: each flow comes twice or more. What disturbs the machine disturbs few of
/// several short ones.
const CHUNK: u32 = 200_000;
/// Measurements of a round, of each subject and traffic. Caches are cold enough for one to tell.
const CHUNKS: u32 = 5;
const COLD_CHUNKS: u32 = 1;

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Empty,
    Lpm,
    Hash,
    Classify,
    Path,
}

impl Subject {
    const ALL: [(Self, &'static str); 5] = [
        (Self::Empty, "empty"),
        (Self::Lpm, "lpm"),
        (Self::Hash, "hash"),
        (Self::Classify, "classify"),
        (Self::Path, "path"),
    ];
}

/// What comes in.
struct Traffic {
    name: &'static str,
    /// The driving program.
    program: &'static str,
    chunks: u32,
    steps: Vec<Step>,
}

const TRAFFICS: [&str; 4] = ["hot", "uniform", "flood", "cold"];

/// Everything that one run measured.
///
/// Times of packets are `SUBJECT_TRAFFIC_ns`, medians, and `SUBJECT_TRAFFIC_min_ns`. `empty_ns` is what the
/// empty program takes in the hot traffic. Driving another traffic takes longer, by `empty_TRAFFIC_ns -
/// empty_ns`, which is left out of the others: `SUBJECT_TRAFFIC_ns - empty_ns` is over the empty program in
/// the same traffic. This in terms of the same of a baseline is `SUBJECT_TRAFFIC_of_lpm` and
/// `SUBJECT_TRAFFIC_of_hash`. Of an IPv6 set there are `ipv4_SUBJECT_TRAFFIC_ns` and `SUBJECT_TRAFFIC_of_ipv4`
/// too, of the IPv4 set that it is made of.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    kernel: String,
    cpus: usize,
    rounds: usize,
    /// `ipv4` or `ipv6`.
    family: &'static str,
    rules: usize,
    allocations: usize,
    /// Packets whose answer was compared with the linear search.
    compared: usize,
    mismatches: usize,
    #[serde(flatten)]
    packets: BTreeMap<String, f64>,
    load_ms: f64,
    update_us_p50: f64,
    update_us_p99: f64,
    update_us_max: f64,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    forwarding: Option<forward::Figures>,
    /// Maps of the classifier.
    kernel_bytes: u64,
    /// What the process grew by while the rules were granted and put into the kernel.
    user_bytes: u64,
    /// Programs, and the instructions that the verifier followed.
    verified: BTreeMap<String, u32>,
}

/// What to measure with.
pub(crate) struct Options {
    pub(crate) rules: Option<PathBuf>,
    pub(crate) trace: Option<PathBuf>,
    pub(crate) count: usize,
    pub(crate) rounds: usize,
    pub(crate) ipv6: Option<Plan>,
    pub(crate) forward: bool,
}

pub(crate) fn measure(options: &Options) -> Result<Report> {
    let narrow = Packets {
        plan: None,
        rules: match &options.rules {
            Some(path) => classbench::read_rules(path)?,
            None => classbench::generate(options.count, 1),
        },
        flood: classbench::flood(FLOWS, 3),
        trace: options.trace.as_deref().map(classbench::read_trace).transpose()?.unwrap_or_default(),
    };
    let wide = options.ipv6.map(|plan| narrow.widened(plan));
    let packets = wide.as_ref().unwrap_or(&narrow);
    let mut set = Set::load(packets)?;
    let (compared, mismatches) = set.compare(packets)?;
    let mut other = wide.is_some().then(|| Set::load(&narrow)).transpose()?;

    let mut sets = vec![&mut set];
    sets.extend(&mut other);
    let figures = time_packets(options.rounds, &mut sets)?;
    let mut updates = set.gateway.update(&mut set.driver, &mut set.classifier, &set.uniform)?;
    updates.sort_unstable_by(f64::total_cmp);
    let at = |part: f64| updates[((updates.len() - 1) as f64 * part) as usize];
    let forwarding = options
        .forward
        .then(|| forward::measure(&packets.rules, &set.uniform, &set.gateway, options.rounds))
        .transpose()?;
    Ok(Report {
        kernel: nix::sys::utsname::uname()?.release().to_string_lossy().into_owned(),
        cpus: thread::available_parallelism()?.get(),
        rounds: options.rounds,
        family: if options.ipv6.is_some() { "ipv6" } else { "ipv4" },
        rules: packets.rules.len(),
        allocations: set.loaded.allocations,
        compared,
        mismatches,
        packets: figures,
        load_ms: set.loaded.time.as_secs_f64() * 1e3,
        update_us_p50: at(0.5),
        update_us_p99: at(0.99),
        update_us_max: at(1.0),
        forwarding,
        kernel_bytes: set.gateway.kernel_bytes()?,
        user_bytes: set.loaded.user_bytes,
        verified: verified(),
    })
}

/// A set, and what packets come to it besides those of its rules.
struct Packets {
    /// How they were made of IPv4 ones; none: they are.
    plan: Option<Plan>,
    rules: Vec<TupleRule>,
    flood: Vec<Tuple>,
    trace: Vec<Tuple>,
}

impl Packets {
    /// The flood too: random IPv6 addresses would be within nobody's prefixes.
    fn widened(&self, plan: Plan) -> Self {
        let widening = widening(plan);
        let packets = |packets: &[Tuple]| packets.iter().map(|packet| widening.packet(packet)).collect();
        Self {
            plan: Some(plan),
            rules: self.rules.iter().map(|rule| widening.rule(rule)).collect(),
            flood: packets(&self.flood),
            trace: packets(&self.trace),
        }
    }
}

/// A set in the kernel, with the programs that drive packets through it.
struct Set {
    family: Family,
    gateway: Gateway,
    loaded: Loaded,
    driver: Driver,
    classifier: Classifier,
    uniform: Vec<Tuple>,
    traffics: Vec<Traffic>,
}

impl Set {
    fn load(Packets { plan, rules, flood, .. }: &Packets) -> Result<Self> {
        let family = rules[0].family;
        let uniform = classbench::uniform(rules, FLOWS, 2);
        let mut gateway = Gateway::start(&format!("{family:?}"), *plan, LINES, MAX_RULES)?;
        let loaded = gateway.load(rules)?;
        let mut driver = Driver::load()?;
        let classifier = Classifier::load(&gateway.pins)?;
        fill_baselines(&mut driver, *plan, rules, &uniform)?;
        let traffic = |name| {
            let (program, chunks, packets) = match name {
                "hot" => ("bench_xdp", CHUNKS, &uniform[..HOT_FLOWS]),
                "flood" => ("bench_xdp", CHUNKS, &flood[..]),
                "cold" => ("bench_cold", COLD_CHUNKS, &uniform[..]),
                _ => ("bench_xdp", CHUNKS, &uniform[..]),
            };
            Traffic { name, program, chunks, steps: steps(packets) }
        };
        let traffics = TRAFFICS.map(traffic).into();
        Ok(Self { family, gateway, loaded, driver, classifier, uniform, traffics })
    }

    /// Compares every answer with the linear search; returns how many there are, and how many are wrong.
    fn compare(&mut self, Packets { rules, flood, trace, .. }: &Packets) -> Result<(usize, usize)> {
        let (mut compared, mut mismatches) = (0, 0);
        for packets in [&self.uniform, flood, trace] {
            let answers = self.classifier.answers(&mut self.driver, packets)?;
            let wanted = classbench::first_matches(rules, packets);
            compared += packets.len();
            let pairs = answers.iter().zip(&wanted);
            mismatches += pairs.filter(|(answer, rule)| **answer != self.loaded.answer(**rule)).count();
        }
        Ok((compared, mismatches))
    }

    fn program(&self, subject: Subject) -> Result<ProgramFd> {
        match (subject, self.family) {
            (Subject::Empty, _) => self.driver.own_fd("bench_empty"),
            (Subject::Lpm, Family::V4) => self.driver.own_fd("bench_lpm"),
            (Subject::Lpm, Family::V6) => self.driver.own_fd("bench_lpm6"),
            (Subject::Hash, Family::V4) => self.driver.own_fd("bench_hash"),
            (Subject::Hash, Family::V6) => self.driver.own_fd("bench_hash6"),
            (Subject::Classify, _) => self.classifier.program("bench_classify"),
            (Subject::Path, _) => self.gateway.program("qos_xdp_lan"),
        }
    }
}

/// Times every subject in every traffic of every set, in turns.
fn time_packets(rounds: usize, sets: &mut [&mut Set]) -> Result<BTreeMap<String, f64>> {
    let mut samples: BTreeMap<(usize, &str, Subject), Vec<f64>> = BTreeMap::new();
    for round in 0..rounds {
        for traffic in 0..TRAFFICS.len() {
            for (number, set) in sets.iter_mut().enumerate() {
                let mut programs: Vec<(Subject, ProgramFd)> = Subject::ALL
                    .iter()
                    .map(|(subject, _)| Ok((*subject, set.program(*subject)?)))
                    .collect::<Result<_>>()?;
                // Every other round the other way round: what comes first finds other caches.
                if round % 2 == 1 {
                    programs.reverse();
                }
                let Set { driver, traffics, .. } = &mut **set;
                let traffic = &traffics[traffic];
                driver.set_steps(&traffic.steps)?;
                for (subject, program) in programs {
                    driver.set_target(&program, true)?;
                    // Once round the flows to warm up.
                    driver.run(traffic.program, traffic.steps.len() as u32)?;
                    for _ in 0..traffic.chunks {
                        let time = driver.time(traffic.program, CHUNK)?;
                        samples.entry((number, traffic.name, subject)).or_default().push(time);
                    }
                }
            }
        }
    }
    let mut figures = BTreeMap::new();
    for number in (0..sets.len()).rev() {
        let prefix = if number == 0 { "" } else { "ipv4_" };
        let mut empty_hot = None;
        for traffic in TRAFFICS {
            let mut over_empty: BTreeMap<Subject, f64> = BTreeMap::new();
            let mut empty = 0.0;
            for (subject, name) in Subject::ALL {
                let times = samples.get_mut(&(number, traffic, subject)).context("not measured")?;
                let middle = median(times);
                let name = format!("{prefix}{name}_{traffic}");
                if subject == Subject::Empty {
                    empty = middle;
                }
                over_empty.insert(subject, middle - empty);
                let driving = match subject {
                    Subject::Empty => 0.0,
                    _ => empty - *empty_hot.get_or_insert(empty),
                };
                figures.insert(format!("{name}_ns"), middle - driving);
                figures.insert(format!("{name}_min_ns"), times[0] - driving);
                for (baseline, of) in [(Subject::Lpm, "lpm"), (Subject::Hash, "hash")] {
                    if subject > Subject::Hash {
                        let ratio = over_empty[&subject] / over_empty[&baseline];
                        figures.insert(format!("{name}_of_{of}"), ratio);
                    }
                }
            }
        }
        figures.insert(format!("{prefix}empty_ns"), empty_hot.context("nothing was measured")?);
    }
    if sets.len() > 1 {
        for name in ["classify", "path"] {
            for traffic in TRAFFICS {
                let over = |prefix: &str| {
                    figures[&format!("{prefix}{name}_{traffic}_ns")] - figures[&format!("{prefix}empty_ns")]
                };
                let ratio = over("") / over("ipv4_");
                figures.insert(format!("{name}_{traffic}_of_ipv4"), ratio);
            }
        }
    }
    Ok(figures)
}

impl Report {
    /// Time over the empty program.
    fn over(&self, figure: &str) -> f64 {
        self.packets[&format!("{figure}_ns")] - self.packets["empty_ns"]
    }

    /// Every figure that has a goal: what it is, itself, and the goal. The goals are for 100,000 rules.
    fn goals(&self) -> Vec<[String; 3]> {
        let ratio = |figure: &str| format!("{:.2}", self.packets[figure]);
        let mebibytes = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        [
            ("wrong answers", self.mismatches.to_string(), "≤ 0"),
            ("classify, hot, of LPM", ratio("classify_hot_of_lpm"), "≤ 0.12"),
            ("classify, uniform, of LPM", ratio("classify_uniform_of_lpm"), "≤ 0.25"),
            ("classify, cold, of LPM", ratio("classify_cold_of_lpm"), "≤ 0.60"),
            ("classify, flood, of hash", ratio("classify_flood_of_hash"), "≤ 0.60"),
            ("path, hot, of LPM", ratio("path_hot_of_lpm"), "≤ 0.80"),
            ("path, hot, over empty", format!("{:.0} ns", self.over("path_hot")), "≤ 130 ns"),
            ("path, uniform, of LPM", ratio("path_uniform_of_lpm"), "≤ 0.60"),
            ("all rules from nothing", format!("{:.0} ms", self.load_ms), "≤ 1,500 ms"),
            ("one rule comes or goes, median", format!("{:.0} µs", self.update_us_p50), "≤ 100 µs"),
            ("one rule comes or goes, p99", format!("{:.0} µs", self.update_us_p99), "≤ 5,000 µs"),
            ("memory, kernel", mebibytes(self.kernel_bytes), "≤ 32 MiB"),
            ("memory, user", mebibytes(self.user_bytes), "≤ 96 MiB"),
        ]
        .into_iter()
        .map(|(what, figure, goal)| (what.to_owned(), figure, goal))
        .chain(TRAFFICS.iter().filter_map(|traffic| {
            let ratio = self.packets.get(&format!("classify_{traffic}_of_ipv4"))?;
            Some((format!("classify, {traffic}, of IPv4"), format!("{ratio:.2}"), "≤ 1.60"))
        }))
        .chain(self.forwarding.iter().flat_map(forward::Figures::goals))
        .map(|(what, figure, goal)| [what, figure, goal.to_owned()])
        .collect()
    }
}

#[expect(clippy::print_stdout, reason = "a program that reports to its terminal")]
pub(crate) fn print(report: &Report) {
    println!(
        "kernel {}, {} CPUs, medians of {} rounds in turn; {} {} rules of {} allocations, {PROVIDERS} providers, \
         {LINES} lines; {} answers compared; the longest change of one rule took {:.0} µs; the empty program \
         takes {:.1} ns\n",
        report.kernel,
        report.cpus,
        report.rounds,
        report.rules,
        if report.family == "ipv6" { "IPv6" } else { "IPv4" },
        report.allocations,
        report.compared,
        report.update_us_max,
        report.packets["empty_ns"]
    );
    let mut rows = Vec::new();
    for traffic in TRAFFICS {
        let [lpm, hash, classify, path] =
            ["lpm", "hash", "classify", "path"].map(|name| report.over(&format!("{name}_{traffic}")));
        rows.push(vec![
            traffic.to_owned(),
            format!("{lpm:.0}"),
            format!("{hash:.0}"),
            format!("{classify:.1}"),
            format!("{:.2}", classify / lpm),
            format!("{:.2}", classify / hash),
            format!("{path:.0}"),
            format!("{:.2}", path / lpm),
        ]);
    }
    let header = ["ns over empty", "LPM", "hash", "classify", "of LPM", "of hash", "path", "of LPM"]
        .map(str::to_owned);
    println!("{}", markdown(&header, &rows));
    if let Some(figures) = &report.forwarding {
        let header = ["router, one CPU", "packets/s", "of no rules"].map(str::to_owned);
        println!("{}\n{}\n", markdown(&header, &figures.rows()), figures.note(report.rules));
    }
    let header = ["", "measured", "goal at 100,000 rules"].map(str::to_owned);
    let rows: Vec<_> = report.goals().into_iter().map(Vec::from).collect();
    println!("{}", markdown(&header, &rows));
    let verified: Vec<_> = report.verified.iter().map(|(name, count)| format!("{name} {count}")).collect();
    println!("instructions verified: {}", verified.join(", "));
}
