//! A gateway that has a rule set, granted as allocations by the manager and put into the kernel as by `qosd`;
//! the classifier alone over its maps, and the look-ups that it is compared with.

use std::collections::HashSet;
use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::lpm_trie::Key;
use aya::maps::{HashMap as BpfHashMap, LpmTrie, MapData};
use aya::programs::ProgramFd;
use aya::{Ebpf, EbpfLoader, Pod};
use ipnet::IpNet;
use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;
use qos_common::abi::{ABI_VERSION, ALLOCATION_SLOTS};
use qos_common::classify::Family;
use qos_tests::classbench::{self, ALL_PORTS, Plan, Prefix, Tuple, TupleRule, Widening};
use qos_tests::random::Random;
use qos_userspace::domain::{BitsPerSecond, Directed, LinkLayer};
use qos_userspace::gateway::Kernel;
use qos_userspace::gateway::memory::SharedArray;
use qos_userspace::gateway::object::{RULE_MAPS, remove_pins};
use qos_userspace::manager::{Change, Command, Gateway as _, NewSession, State};

use crate::forwarding::Router;
use crate::gateway;
use crate::programs::{Driver, Step};
use crate::world;

static CLASSIFIER: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("QOS_KERNEL_FOLDER"), "/qos-bench-classify"));

/// What a gateway has besides its rules.
pub(crate) const PROVIDERS: u32 = 64;
pub(crate) const LINES: u32 = 1_000;
/// Rules that are added and removed under traffic.
const UPDATES: u32 = 500;
/// Flows of the traffic meanwhile, and packets of one call.
const BUSY_FLOWS: usize = 1_000;
const BUSY: u32 = 200_000;

/// What makes IPv6 sets by a plan.
pub(crate) const fn widening(plan: Plan) -> Widening {
    Widening { seed: 6, plan }
}

/// A gateway with providers, lines and rules.
pub(crate) struct Gateway {
    /// Dropped before the router.
    kernel: Option<Kernel>,
    pub(crate) router: Router,
    pub(crate) pins: PathBuf,
    state: State,
    /// How its rules were made of IPv4 ones; none: they are.
    plan: Option<Plan>,
}

/// The rules in the kernel.
pub(crate) struct Loaded {
    pub(crate) allocations: usize,
    /// Rules of each allocation but perhaps the last.
    share: usize,
    pub(crate) time: Duration,
    /// What the process grew by.
    pub(crate) user_bytes: u64,
}

impl Loaded {
    /// What the classifier must say where this rule is the first that matches.
    pub(crate) fn answer(&self, rule: Option<usize>) -> Answer {
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
    /// With no rules yet, and room for `max_rules`. `name` tells it from others of this process.
    pub(crate) fn start(name: &str, plan: Option<Plan>, lines: u32, max_rules: u32) -> Result<Self> {
        let router = Router::new()?;
        let pins = PathBuf::from(format!("/sys/fs/bpf/qos-bench-{}-{name}", std::process::id()));
        let mut state = gateway::state(max_rules);
        let (everything, first) = match plan {
            None => ("0.0.0.0/0", "100.64.0.0/32"),
            Some(_) => ("::/0", "fd64::/128"),
        };
        for number in 0..PROVIDERS {
            gateway::add_provider(&mut state, &provider(number), everything.parse()?)?;
        }
        for number in 0..lines {
            gateway::decide(&mut state, &Command::AddSession(session(number, first.parse()?)?))?;
        }
        let config = gateway::config(pins.clone(), false, max_rules);
        let kernel = router.namespace.run(|| Kernel::start(&config, &state))?;
        Ok(Self { kernel: Some(kernel), router, pins, state, plan })
    }

    fn grant(&mut self, provider: &str, rules: &[TupleRule], precedence: u16) -> Result<Vec<Change>> {
        let selectors = rules.iter().map(TupleRule::selector).collect::<Result<_>>()?;
        gateway::grant(&mut self.state, provider, selectors, precedence)
    }

    /// For grants and revokes, which nothing was before.
    fn apply(&mut self, changes: &[Change]) -> Result<()> {
        let Self { router, kernel, state, .. } = self;
        let kernel = kernel.as_mut().context("started")?;
        Ok(router.namespace.run(|| kernel.apply(state, changes, &[]))?)
    }

    /// Grants all rules and puts them into the kernel, which has none: as few to an allocation as there are
    /// slots for.
    pub(crate) fn load(&mut self, rules: &[TupleRule]) -> Result<Loaded> {
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
    pub(crate) fn update(
        &mut self,
        driver: &mut Driver,
        classifier: &mut Classifier,
        uniform: &[Tuple],
    ) -> Result<Vec<f64>> {
        let mut busy = Driver::load()?;
        busy.set_steps(&steps(uniform)[..BUSY_FLOWS])?;
        busy.set_target(&classifier.program("bench_classify")?, true)?;
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let traffic = scope.spawn(|| -> Result<()> {
                while !stop.load(Ordering::SeqCst) {
                    busy.run("bench_xdp", BUSY)?;
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
            let mut rule = TupleRule {
                family: Family::V4,
                source: classbench::prefix(random.next() as u32, length),
                destination: classbench::prefix(random.next() as u32, length),
                source_ports: ALL_PORTS,
                destination_ports: [number as u16 + 1; 2],
                protocol: Some(17),
            };
            if let Some(plan) = self.plan {
                rule = widening(plan).rule(&rule);
            }
            let packet = classbench::uniform(&[rule], 1, u64::from(number));
            // Above all others.
            let granted = self.grant(&provider(0), &[rule], 1)?;
            let Some(Change::PutAllocation(allocation)) = granted.first() else {
                bail!("a grant that is none: {granted:?}");
            };
            let (id, slot) = (allocation.id, u32::from(allocation.slot));
            // What packets look through is changed when this returns.
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

    pub(crate) fn program(&self, name: &'static str) -> Result<ProgramFd> {
        Ok(self.kernel.as_ref().context("started")?.object().program_fd(name)?.try_clone()?)
    }

    /// What the kernel says that the classifier's maps take.
    pub(crate) fn kernel_bytes(&self) -> Result<u64> {
        let mut bytes = 0;
        for name in RULE_MAPS {
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

fn session(number: u32, first: IpNet) -> Result<NewSession> {
    let address = match first {
        IpNet::V4(net) => IpNet::new((u32::from(net.addr()) + number).to_be_bytes().into(), 32)?,
        IpNet::V6(net) => {
            IpNet::new((u128::from(net.addr()) + u128::from(number)).to_be_bytes().into(), 128)?
        }
    };
    Ok(NewSession {
        name: format!("line-{number}").parse()?,
        addresses: vec![address],
        rate: Directed { up: BitsPerSecond(10_000_000), down: BitsPerSecond(50_000_000) },
        link_layer: LinkLayer::Ethernet,
        overhead: None,
        delay_us: 0,
        loss_ppm: 0,
        segments: Vec::new(),
        bras: None,
        source: None,
    })
}

fn maps_of(pins: &Path) -> PathBuf {
    pins.join(format!("maps_{ABI_VERSION}"))
}

/// Resident memory of this process in bytes.
/// What this process takes; what it has freed is given back first.
fn resident() -> Result<u64> {
    // SAFETY: the call has no conditions.
    unsafe { libc::malloc_trim(0) };
    let text = fs::read_to_string("/proc/self/status")?;
    let kilobytes = text.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
    Ok(kilobytes.context("no VmRSS in /proc/self/status")?.parse::<u64>()? * 1_024)
}

/// What the classifier found.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    slot: u32,
    selector: u32,
}

// SAFETY: `repr(C)`, integers only, no padding.
unsafe impl Pod for Answer {}

/// Programs with the classifier alone, over the maps of a gateway.
pub(crate) struct Classifier {
    object: Ebpf,
    answers: SharedArray<Answer>,
    next: SharedArray<u32>,
}

/// Packets whose answers are kept.
const ANSWERS: u32 = 1 << 17;

impl Classifier {
    pub(crate) fn load(pins: &Path) -> Result<Self> {
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

    pub(crate) fn program(&self, name: &str) -> Result<ProgramFd> {
        match self.object.program(name) {
            Some(aya::programs::Program::Xdp(program)) => Ok(program.fd()?.try_clone()?),
            _ => bail!("the classifier alone has no program `{name}`"),
        }
    }

    /// What each packet is classified as.
    pub(crate) fn answers(&mut self, driver: &mut Driver, packets: &[Tuple]) -> Result<Vec<Answer>> {
        driver.set_target(&self.program("bench_answer")?, true)?;
        // Each CPU has a place of its own in the list, and a run that has to wait may go on elsewhere
        // (`bpf_test_timer_continue`, net/bpf/test_run.c, Linux 6.1).
        let _here = Pinned::new()?;
        let mut found = Vec::with_capacity(packets.len());
        for packets in packets.chunks(ANSWERS as usize) {
            driver.set_steps(&steps(packets))?;
            self.next.write(0, 0);
            driver.run("bench_xdp", packets.len() as u32)?;
            ensure!(self.next.read(0) == packets.len() as u32, "not all packets were classified");
            found.extend((0..packets.len() as u32).map(|position| self.answers.read(position)));
        }
        Ok(found)
    }
}

/// Keeps the calling thread on the CPU where it is, until it is dropped.
struct Pinned {
    before: CpuSet,
}

impl Pinned {
    fn new() -> Result<Self> {
        let before = sched_getaffinity(Pid::from_raw(0))?;
        let mut here = CpuSet::new();
        here.set(sched_getcpu()?)?;
        sched_setaffinity(Pid::from_raw(0), &here)?;
        Ok(Self { before })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A CPU that is gone since is the kernel's to replace.
        let _ = sched_setaffinity(Pid::from_raw(0), &self.before);
    }
}

/// Packets as the driving program writes them.
pub(crate) fn steps(packets: &[Tuple]) -> Vec<Step> {
    steps_to([2, 0, 0, 0, 0, 1], packets)
}

/// The same, to an interface.
pub(crate) fn steps_to(mac: [u8; 6], packets: &[Tuple]) -> Vec<Step> {
    let step = |packet: &Tuple| Step { headers: world::frame(mac, packet), reserved: [0; 2], mark: 0 };
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

/// The same of an IPv6 packet.
#[repr(C)]
#[derive(Clone, Copy)]
struct Flow6 {
    addresses: [[u8; 16]; 2],
    ports: [[u8; 2]; 2],
    protocol: u32,
}

// SAFETY: as above.
unsafe impl Pod for Flow6 {}

/// Fills what packets of rules of this plan are looked up in by the baselines: as many distinct prefixes as
/// there are rules, those of the rules' destinations first, and the flows of these packets.
pub(crate) fn fill_baselines(
    driver: &mut Driver,
    plan: Option<Plan>,
    rules: &[TupleRule],
    packets: &[Tuple],
) -> Result<()> {
    let mut random = Random::new(5);
    let mut prefixes: HashSet<Prefix> = rules.iter().map(|rule| rule.destination).collect();
    while prefixes.len() < rules.len() {
        let length = random.choose(&[16, 20, 22, 24, 24, 28, 32]);
        let prefix = classbench::prefix(random.next() as u32, length);
        prefixes.insert(plan.map_or(prefix, |plan| widening(plan).prefix(prefix)));
    }
    let ports = |packet: &Tuple| [packet.source_port.to_be_bytes(), packet.destination_port.to_be_bytes()];
    match plan {
        None => {
            fill_trie(driver, "prefixes", &prefixes, v4)?;
            fill_hash(driver, "flows", packets, |packet| Flow {
                source: v4(packet.source),
                destination: v4(packet.destination),
                ports: ports(packet),
                protocol: u32::from(packet.protocol),
            })
        }
        Some(_) => {
            fill_trie(driver, "prefixes6", &prefixes, u128::to_be_bytes)?;
            fill_hash(driver, "flows6", packets, |packet| Flow6 {
                addresses: [packet.source, packet.destination].map(u128::to_be_bytes),
                ports: ports(packet),
                protocol: u32::from(packet.protocol),
            })
        }
    }
}

/// An IPv4 address in network order.
const fn v4(left_aligned: u128) -> u32 {
    ((left_aligned >> 96) as u32).to_be()
}

fn fill_trie<K: Pod>(
    driver: &mut Driver,
    map: &'static str,
    prefixes: &HashSet<Prefix>,
    key: impl Fn(u128) -> K,
) -> Result<()> {
    let mut trie: LpmTrie<_, K, u32> = driver.object.map_mut(map).context(map)?.try_into()?;
    for prefix in prefixes {
        trie.insert(&Key::new(u32::from(prefix.length), key(prefix.bits)), 1, 0)?;
    }
    Ok(())
}

fn fill_hash<K: Pod>(
    driver: &mut Driver,
    map: &'static str,
    packets: &[Tuple],
    key: impl Fn(&Tuple) -> K,
) -> Result<()> {
    let mut flows: BpfHashMap<_, K, u32> = driver.object.map_mut(map).context(map)?.try_into()?;
    for packet in packets {
        flows.insert(key(packet), 1, 0)?;
    }
    Ok(())
}

/// Instructions of each loaded program of ours that the verifier followed.
pub(crate) fn verified() -> std::collections::BTreeMap<String, u32> {
    aya::programs::loaded_programs()
        .flatten()
        .filter_map(|program| {
            let name = program.name_as_str()?;
            let ours = name.starts_with("qos_") || name.starts_with("bench_");
            ours.then(|| Some((name.to_owned(), program.verified_instruction_count()?)))?
        })
        .collect()
}
