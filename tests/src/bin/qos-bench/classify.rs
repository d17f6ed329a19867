//! The classifier under a rule set: what a look-up costs beside one look-up in the kernel's own maps, what
//! the whole ingress path costs, and how long rules take to come and go.
//!
//! Rules are granted as allocations by the manager and put into the kernel as by `qosd`, with 64 providers
//! and 1,000 lines. Every answer is compared with a linear search. `lpm` is one look-up of the packet's
//! destination among as many distinct prefixes as there are rules, `hash` one of the whole flow among those
//! of the uniform traffic; `classify` is the look-up alone, `path` the whole ingress from parsing to the
//! verdict.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::lpm_trie::Key as Prefix;
use aya::maps::{HashMap as BpfHashMap, LpmTrie, MapData};
use aya::programs::ProgramFd;
use aya::{Ebpf, EbpfLoader, Pod};
use ipnet::{IpNet, Ipv4Net};
use qos_common::abi::{ABI_VERSION, ALLOCATION_SLOTS};
use qos_tests::classbench::{self, Tuple, TupleRule};
use qos_tests::random::Random;
use qos_tests::topology::Topology;
use qos_userspace::domain::{BitsPerSecond, Directed, LinkLayer};
use qos_userspace::gateway::Kernel;
use qos_userspace::gateway::memory::SharedArray;
use qos_userspace::gateway::object::remove_pins;
use qos_userspace::manager::{Change, Command, Gateway as _, NewSession, State};
use serde::Serialize;

use crate::programs::{Driver, Step};
use crate::world;
use crate::{gateway, median};

static CLASSIFIER: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("QOS_KERNEL_FOLDER"), "/qos-bench-classify"));

const PROVIDERS: u32 = 64;
const LINES: u32 = 1_000;
/// Flows of the uniform and the flood traffic, and of the hot.
const FLOWS: usize = 100_000;
const HOT_FLOWS: usize = 1_000;
/// Packets of one measurement.
const REPEAT: u32 = 1_000_000;
const COLD_REPEAT: u32 = 200_000;
/// Rules that are added and removed under traffic.
const UPDATES: u32 = 500;

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
    repeat: u32,
    steps: Vec<Step>,
}

/// Everything that one run measured. Times of packets are `SUBJECT_TRAFFIC_ns`, medians, and
/// `SUBJECT_TRAFFIC_min_ns`; what is over the empty program in terms of the LPM look-up in the same traffic
/// is `SUBJECT_TRAFFIC_of_lpm`.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    kernel: String,
    cpus: usize,
    rounds: usize,
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
}

pub(crate) fn measure(options: &Options) -> Result<Report> {
    let rules = match &options.rules {
        Some(path) => classbench::read_rules(path)?,
        None => classbench::generate(options.count, 1),
    };
    let trace = options.trace.as_deref().map(classbench::read_trace).transpose()?.unwrap_or_default();
    let uniform = classbench::uniform(&rules, FLOWS, 2);
    let flood = classbench::flood(FLOWS, 3);

    let mut gateway = Gateway::start()?;
    let loaded = gateway.load(&rules)?;
    let mut driver = Driver::load()?;
    let mut classifier = Classifier::load(&gateway.pins)?;

    let mut compared = 0;
    let mut mismatches = 0;
    for packets in [&uniform, &flood, &trace] {
        let answers = classifier.answers(&mut driver, packets)?;
        let wanted = classbench::first_matches(&rules, packets);
        compared += packets.len();
        mismatches +=
            answers.iter().zip(&wanted).filter(|(answer, rule)| **answer != loaded.answer(**rule)).count();
    }

    fill_baselines(&mut driver, &rules, &uniform)?;
    let packets = time_packets(options.rounds, &mut driver, &classifier, &gateway, &uniform, &flood)?;
    let mut updates = gateway.update(&mut driver, &mut classifier, &uniform)?;
    updates.sort_unstable_by(f64::total_cmp);
    let at = |part: f64| updates[((updates.len() - 1) as f64 * part) as usize];
    Ok(Report {
        kernel: nix::sys::utsname::uname()?.release().to_string_lossy().into_owned(),
        cpus: thread::available_parallelism()?.get(),
        rounds: options.rounds,
        rules: rules.len(),
        allocations: loaded.allocations,
        compared,
        mismatches,
        packets,
        load_ms: loaded.time.as_secs_f64() * 1e3,
        update_us_p50: at(0.5),
        update_us_p99: at(0.99),
        update_us_max: at(1.0),
        kernel_bytes: gateway.kernel_bytes()?,
        user_bytes: loaded.user_bytes,
        verified: verified(),
    })
}

/// A gateway with providers and lines.
struct Gateway {
    net: Topology,
    pins: PathBuf,
    kernel: Option<Kernel>,
    state: State,
}

/// The rules in the kernel.
struct Loaded {
    allocations: usize,
    /// Rules of each allocation but perhaps the last.
    share: usize,
    time: Duration,
    user_bytes: u64,
}

impl Loaded {
    /// What the classifier must say where this rule is the first that matches.
    fn answer(&self, rule: Option<usize>) -> Answer {
        rule.map_or(Answer::default(), |rule| Answer {
            slot: (rule / self.share) as u32 + 1,
            selector: (rule % self.share) as u32,
        })
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.kernel.take();
        // What can't be removed is named by the next run, which finds it.
        let _ = remove_pins(&self.pins);
    }
}

impl Gateway {
    fn start() -> Result<Self> {
        let net = Topology::builder()
            .subscriber("home", &["192.0.2.10"])
            .provider("video", &["203.0.113.10"])
            .build()?;
        let pins = PathBuf::from(format!("/sys/fs/bpf/qos-bench-{}", std::process::id()));
        let mut state = gateway::state();
        for number in 0..PROVIDERS {
            gateway::add_provider(&mut state, &provider(number), "0.0.0.0/0".parse()?)?;
        }
        for number in 0..LINES {
            let address = IpNet::new(std::net::Ipv4Addr::from(0x6440_0000 + number).into(), 32)?;
            gateway::decide(&mut state, &Command::AddSession(session(number, address)?))?;
        }
        let config = gateway::config(pins.clone(), false);
        let mut started = Self { net, pins, kernel: None, state };
        started.kernel = Some(started.net.gateway.run(|| Kernel::start(&config, &started.state))?);
        Ok(started)
    }

    fn grant(&mut self, provider: &str, rules: &[TupleRule], precedence: u16) -> Result<Vec<Change>> {
        let selectors = rules.iter().map(TupleRule::selector).collect::<Result<_>>()?;
        gateway::grant(&mut self.state, provider, selectors, precedence)
    }

    fn apply(&mut self, changes: &[Change]) -> Result<()> {
        let Self { net, kernel, state, .. } = self;
        let kernel = kernel.as_mut().context("started")?;
        Ok(net.gateway.run(|| kernel.apply(state, changes))?)
    }

    /// Grants all rules and puts them into the kernel, which has none: as few to an allocation as there are
    /// slots for.
    fn load(&mut self, rules: &[TupleRule]) -> Result<Loaded> {
        let before = resident()?;
        let share = rules.len().div_ceil(ALLOCATION_SLOTS as usize - 2);
        let mut changes = Vec::new();
        for (rules, number) in rules.chunks(share).zip(0..) {
            changes.extend(self.grant(&provider(number % PROVIDERS), rules, 0)?);
        }
        let allocations = changes.len();
        let begin = Instant::now();
        self.apply(&changes)?;
        let time = begin.elapsed();
        drop(changes);
        Ok(Loaded { allocations, share, time, user_bytes: resident()?.saturating_sub(before) })
    }

    /// Adds and removes rules one by one while another CPU looks packets up. Returns how long each took
    /// until packets obeyed it, in µs.
    fn update(
        &mut self,
        driver: &mut Driver,
        classifier: &mut Classifier,
        uniform: &[Tuple],
    ) -> Result<Vec<f64>> {
        let mut busy = Driver::load()?;
        busy.set_steps(&steps(uniform)[..HOT_FLOWS])?;
        busy.set_target(&classifier.program("bench_classify")?, true)?;
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let traffic = scope.spawn(|| -> Result<()> {
                while !stop.load(Ordering::SeqCst) {
                    busy.time("bench_xdp", 20_000)?;
                }
                Ok(())
            });
            let times = self.update_under_traffic(driver, classifier);
            stop.store(true, Ordering::SeqCst);
            traffic.join().map_err(|_| anyhow::anyhow!("the traffic panicked"))??;
            times
        })
    }

    fn update_under_traffic(&mut self, driver: &mut Driver, classifier: &mut Classifier) -> Result<Vec<f64>> {
        let mut random = Random::new(4);
        let mut times = Vec::new();
        for number in 0..UPDATES {
            // Every tenth has short prefixes.
            let length = if number % 10 == 0 { 8 } else { 32 };
            let rule = TupleRule {
                source: net(random.next() as u32, length)?,
                destination: net(random.next() as u32, length)?,
                source_ports: [0, u16::MAX],
                destination_ports: [number as u16 + 1; 2],
                protocol: Some(17),
            };
            let packet = classbench::uniform(&[rule], 1, u64::from(number));
            // Above all others.
            let granted = self.grant(&provider(0), &[rule], 1)?;
            let Some(Change::PutAllocation(allocation)) = granted.first() else {
                bail!("a grant that is none: {granted:?}");
            };
            let (id, slot) = (allocation.id, u32::from(allocation.slot));
            let begin = Instant::now();
            self.apply(&granted)?;
            times.push(begin.elapsed().as_secs_f64() * 1e6);
            let found = classifier.answers(driver, &packet)?;
            ensure!(found == [Answer { slot, selector: 0 }], "{rule:?} is not obeyed: {found:?}");
            let ended = gateway::decide(&mut self.state, &Command::Revoke { id })?;
            let begin = Instant::now();
            self.apply(&ended)?;
            times.push(begin.elapsed().as_secs_f64() * 1e6);
            let found = classifier.answers(driver, &packet)?;
            ensure!(found.iter().all(|answer| answer.slot != slot), "{rule:?} is obeyed still: {found:?}");
        }
        Ok(times)
    }

    fn program(&self, name: &'static str) -> Result<ProgramFd> {
        Ok(self.kernel.as_ref().context("started")?.object().program_fd(name)?.try_clone()?)
    }

    /// What the kernel says that the classifier's maps take.
    fn kernel_bytes(&self) -> Result<u64> {
        let mut bytes = 0;
        for name in ["rule_half", "tables", "rule_words", "rule_slots", "rules", "rule_extras"] {
            let map = MapData::from_pin(maps_of(&self.pins).join(name))?;
            let number = map.fd().as_fd().as_raw_fd();
            let text = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
            let locked = text.lines().find_map(|line| line.strip_prefix("memlock:"));
            bytes += locked.context("the kernel does not tell a map's memory")?.trim().parse::<u64>()?;
        }
        Ok(bytes)
    }
}

fn provider(number: u32) -> String {
    format!("provider-{number}")
}

fn session(number: u32, address: IpNet) -> Result<NewSession> {
    Ok(NewSession {
        name: format!("line-{number}").parse()?,
        addresses: vec![address],
        rate: Directed { up: BitsPerSecond(10_000_000), down: BitsPerSecond(50_000_000) },
        link_layer: LinkLayer::Ethernet,
        overhead: None,
        delay_us: 0,
        loss_ppm: 0,
    })
}

fn net(address: u32, length: u8) -> Result<Ipv4Net> {
    Ok(Ipv4Net::new(address.into(), length)?.trunc())
}

fn maps_of(pins: &Path) -> PathBuf {
    pins.join(format!("maps_{ABI_VERSION}"))
}

/// Resident memory of this process in bytes.
fn resident() -> Result<u64> {
    let text = fs::read_to_string("/proc/self/status")?;
    let kilobytes = text.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
    Ok(kilobytes.context("no VmRSS in /proc/self/status")?.parse::<u64>()? * 1_024)
}

/// What the classifier found.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Answer {
    slot: u32,
    selector: u32,
}

// SAFETY: `repr(C)`, integers only, no padding.
unsafe impl Pod for Answer {}

/// Programs with the classifier alone, over the maps of a gateway.
struct Classifier {
    object: Ebpf,
    answers: SharedArray<Answer>,
    next: SharedArray<u32>,
}

/// Packets whose answers are kept.
const ANSWERS: u32 = 1 << 17;

impl Classifier {
    fn load(pins: &Path) -> Result<Self> {
        let paths = fs::read_dir(maps_of(pins))?.map(|entry| Ok(entry?.path()));
        let paths = paths.collect::<Result<Vec<_>>>()?;
        let mut loader = EbpfLoader::new();
        for path in &paths {
            let name = path.file_name().and_then(|name| name.to_str()).context("a pin's name")?;
            // There are other files.
            if let Ok(map) = MapData::from_pin(path) {
                loader.map_max_entries(name, map.info()?.max_entries());
                loader.map_pin_path(name, path);
            }
        }
        let mut object = loader.load(CLASSIFIER).context("loading the classifier alone")?;
        for (name, program) in object.programs_mut() {
            match program {
                aya::programs::Program::Xdp(program) => {
                    program.load().with_context(|| format!("loading {name}"))?;
                }
                _ => bail!("{name} is of no type that is measured"),
            }
        }
        let shared = |name: &str| match object.map(name) {
            Some(aya::maps::Map::Array(map)) => Ok(map.fd().as_fd().try_clone_to_owned()?),
            _ => bail!("the classifier alone has no map `{name}`"),
        };
        Ok(Self {
            answers: SharedArray::of_map(shared("bench_answers")?.as_fd(), ANSWERS)?,
            next: SharedArray::of_map(shared("bench_found")?.as_fd(), 1)?,
            object,
        })
    }

    fn program(&self, name: &str) -> Result<ProgramFd> {
        match self.object.program(name) {
            Some(aya::programs::Program::Xdp(program)) => Ok(program.fd()?.try_clone()?),
            _ => bail!("the classifier alone has no program `{name}`"),
        }
    }

    /// What each packet is classified as.
    fn answers(&mut self, driver: &mut Driver, packets: &[Tuple]) -> Result<Vec<Answer>> {
        driver.set_target(&self.program("bench_answer")?, true)?;
        let mut found = Vec::with_capacity(packets.len());
        for packets in packets.chunks(ANSWERS as usize) {
            driver.set_steps(&steps(packets))?;
            self.next.write(0, 0);
            driver.time("bench_xdp", packets.len() as u32)?;
            ensure!(self.next.read(0) == packets.len() as u32, "not all packets were classified");
            found.extend((0..packets.len() as u32).map(|position| self.answers.read(position)));
        }
        Ok(found)
    }
}

fn steps(packets: &[Tuple]) -> Vec<Step> {
    let step = |packet: &Tuple| Step {
        headers: world::frame([2, 0, 0, 0, 0, 1], packet),
        reserved: [0; 2],
        mark: 0,
    };
    packets.iter().map(step).collect()
}

/// A flow as the driving programs read it from a frame.
#[repr(C)]
#[derive(Clone, Copy)]
struct Flow {
    source: u32,
    destination: u32,
    ports: [[u8; 2]; 2],
    protocol: u32,
}

// SAFETY: `repr(C)`, integers only, no padding.
unsafe impl Pod for Flow {}

/// As many distinct prefixes as there are rules, those of the rules' destinations first, and the flows of
/// the uniform traffic.
fn fill_baselines(driver: &mut Driver, rules: &[TupleRule], uniform: &[Tuple]) -> Result<()> {
    let mut random = Random::new(5);
    let mut prefixes: HashSet<Ipv4Net> = rules.iter().map(|rule| rule.destination).collect();
    while prefixes.len() < rules.len() {
        prefixes.insert(net(random.next() as u32, random.choose(&[16, 20, 22, 24, 24, 28, 32]))?);
    }
    let mut trie: LpmTrie<_, u32, u32> =
        driver.object.map_mut("prefixes").context("map `prefixes`")?.try_into()?;
    for prefix in prefixes {
        let key = Prefix::new(u32::from(prefix.prefix_len()), prefix.network().to_bits().to_be());
        trie.insert(&key, 1, 0)?;
    }
    let mut flows: BpfHashMap<_, Flow, u32> =
        driver.object.map_mut("flows").context("map `flows`")?.try_into()?;
    for packet in uniform {
        let flow = Flow {
            source: packet.source.to_be(),
            destination: packet.destination.to_be(),
            ports: [packet.source_port.to_be_bytes(), packet.destination_port.to_be_bytes()],
            protocol: u32::from(packet.protocol),
        };
        flows.insert(flow, 1, 0)?;
    }
    Ok(())
}

/// Times every subject in every traffic, in turns.
fn time_packets(
    rounds: usize,
    driver: &mut Driver,
    classifier: &Classifier,
    gateway: &Gateway,
    uniform: &[Tuple],
    flood: &[Tuple],
) -> Result<BTreeMap<String, f64>> {
    let (uniform, flood) = (steps(uniform), steps(flood));
    let traffic =
        |name, program, repeat, steps: &[Step]| Traffic { name, program, repeat, steps: steps.to_vec() };
    let traffics = [
        traffic("hot", "bench_xdp", REPEAT, &uniform[..HOT_FLOWS]),
        traffic("uniform", "bench_xdp", REPEAT, &uniform),
        traffic("flood", "bench_xdp", REPEAT, &flood),
        traffic("cold", "bench_cold", COLD_REPEAT, &uniform),
    ];
    let mut samples: BTreeMap<(usize, Subject), Vec<f64>> = BTreeMap::new();
    for round in 0..rounds {
        for (number, traffic) in traffics.iter().enumerate() {
            driver.set_steps(&traffic.steps)?;
            // Every other round the other way round: what comes first finds other caches.
            let mut subjects: Vec<Subject> = Subject::ALL.iter().map(|(subject, _)| *subject).collect();
            if round % 2 == 1 {
                subjects.reverse();
            }
            for subject in subjects {
                let program = match subject {
                    Subject::Empty => driver.own_fd("bench_empty")?,
                    Subject::Lpm => driver.own_fd("bench_lpm")?,
                    Subject::Hash => driver.own_fd("bench_hash")?,
                    Subject::Classify => classifier.program("bench_classify")?,
                    Subject::Path => gateway.program("qos_xdp_lan")?,
                };
                driver.set_target(&program, true)?;
                // Once round the flows to warm up.
                driver.time(traffic.program, traffic.steps.len() as u32)?;
                let time = driver.time(traffic.program, traffic.repeat)?;
                samples.entry((number, subject)).or_default().push(time);
            }
        }
    }
    let mut figures = BTreeMap::new();
    for (number, traffic) in traffics.iter().enumerate() {
        let mut over_empty = BTreeMap::new();
        for (subject, name) in Subject::ALL {
            let Some(times) = samples.get_mut(&(number, subject)) else { continue };
            let middle = median(times);
            figures.insert(format!("{name}_{}_ns", traffic.name), middle);
            figures.insert(format!("{name}_{}_min_ns", traffic.name), times[0]);
            over_empty.insert(subject, middle - figures[&format!("empty_{}_ns", traffic.name)]);
            if subject > Subject::Lpm {
                let ratio = over_empty[&subject] / over_empty[&Subject::Lpm];
                figures.insert(format!("{name}_{}_of_lpm", traffic.name), ratio);
            }
        }
    }
    Ok(figures)
}

/// Instructions of each loaded program of ours that the verifier followed.
fn verified() -> BTreeMap<String, u32> {
    aya::programs::loaded_programs()
        .flatten()
        .filter_map(|program| {
            let name = program.name_as_str()?;
            let ours = name.starts_with("qos_") || name.starts_with("bench_");
            ours.then(|| Some((name.to_owned(), program.verified_instruction_count()?)))?
        })
        .collect()
}

#[expect(clippy::print_stdout, reason = "a program that reports to its terminal")]
pub(crate) fn print(report: &Report) {
    println!(
        "kernel {}, {} CPUs, medians of {} rounds in turn; {} rules of {} allocations, {PROVIDERS} providers, \
         {LINES} lines\n",
        report.kernel, report.cpus, report.rounds, report.rules, report.allocations
    );
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["ns over empty", "LPM", "hash", "classify", "of LPM", "of hash", "path", "of LPM"]);
    for traffic in ["hot", "uniform", "flood", "cold"] {
        let over = |name: &str| {
            report.packets[&format!("{name}_{traffic}_ns")] - report.packets[&format!("empty_{traffic}_ns")]
        };
        let [lpm, hash, classify, path] = ["lpm", "hash", "classify", "path"].map(over);
        table.add_row([
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
    println!("{table}\n");
    println!("{} answers of {} are wrong", report.mismatches, report.compared);
    println!("all rules from nothing: {:.0} ms", report.load_ms);
    println!(
        "one rule, until packets obey it: median {:.0} µs, p99 {:.0} µs, longest {:.0} µs",
        report.update_us_p50, report.update_us_p99, report.update_us_max
    );
    println!(
        "memory: kernel {:.1} MiB, user {:.1} MiB",
        report.kernel_bytes as f64 / f64::from(1 << 20),
        report.user_bytes as f64 / f64::from(1 << 20)
    );
    let verified: Vec<_> = report.verified.iter().map(|(name, count)| format!("{name} {count}")).collect();
    println!("instructions verified: {}", verified.join(", "));
}
