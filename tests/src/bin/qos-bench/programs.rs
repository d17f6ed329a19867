//! The programs by `BPF_PROG_TEST_RUN`: a driving program writes the next packet's headers into the
//! frame and tail-calls the program that is measured.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{Array, PerCpuArray, PerCpuValues, ProgramArray};
use aya::programs::{ProgramFd, TestRun as _, TestRunOptions};
use aya::util::nr_cpus;
use aya::{Ebpf, EbpfLoader, Pod};
use nix::time::{ClockId, clock_gettime};
use qos_common::abi::{self, ALLOCATION_SLOTS, Allocation, Clocks, IN_USE, POLICE, Provider, directed};
use qos_common::classify::Direction;
use qos_common::clock::Meter;
use qos_common::mark::{MarkLayout, Marked, Owner};
use qos_userspace::gateway::classifier::Classifier;
use qos_userspace::gateway::memory::SharedArray;
use qos_userspace::gateway::object::{Object, remove_pins};
use serde::Serialize;

use crate::median;
use crate::world::{self, HEADERS};

/// Of a frame, as the driving programs have it.
const HEAD: usize = 96;
/// Packets of one measurement.
const REPEAT: u32 = 200_000;
/// Calls that tell what a call costs.
const CALLS: u32 = 15;
/// Room for packets in the driving programs' list.
const STEPS: u32 = 1 << 17;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("QOS_KERNEL_FOLDER"), "/qos-bench-kernel"));

/// What one program costs.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    /// Median, the driving program included.
    pub(crate) ns: f64,
    /// Median over that of the empty program.
    pub(crate) ns_over_empty: f64,
}

/// A packet of the driving program's list, as `Step` of its source.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Step {
    pub(crate) headers: [u8; HEADERS],
    pub(crate) reserved: [u8; 2],
    pub(crate) mark: u32,
}

// SAFETY: `repr(C)`, integers only, padding named.
unsafe impl Pod for Step {}

/// The driving programs.
pub(crate) struct Driver {
    pub(crate) object: Ebpf,
    steps: SharedArray<Step>,
    /// CPU time in ns of a call that runs an XDP program next to never.
    call: f64,
    /// Bytes of a frame.
    frame: usize,
}

impl Driver {
    pub(crate) fn load() -> Result<Self> {
        Self::with_room(STEPS)
    }

    /// With room for that many packets in the list, and flows to look up.
    pub(crate) fn with_room(packets: u32) -> Result<Self> {
        let mut loader = EbpfLoader::new();
        for map in ["steps", "flows", "flows6"] {
            loader.map_max_entries(map, packets);
        }
        let mut object = loader.load(OBJECT).context("loading the benchmark's programs")?;
        for (name, program) in object.programs_mut() {
            match program {
                aya::programs::Program::Xdp(program) => program.load(),
                aya::programs::Program::SchedClassifier(program) => program.load(),
                _ => bail!("{name} is of no type that is measured"),
            }
            .with_context(|| format!("loading {name}"))?;
        }
        let steps = match object.map("steps") {
            Some(aya::maps::Map::Array(map)) => {
                use std::os::fd::AsFd as _;
                SharedArray::of_map(map.fd().as_fd(), packets)?
            }
            _ => bail!("the benchmark's object has no map `steps`"),
        };
        let mut driver = Self { object, steps, call: 0.0, frame: 60 };
        // Two runs: for a single one the kernel does less.
        let calls: Result<Vec<_>> = (0..CALLS).map(|_| driver.run("bench_empty", 2)).collect();
        driver.call = median(&mut calls?);
        Ok(driver)
    }

    /// Sets the list of packets, of which the next run takes the first.
    pub(crate) fn set_steps(&mut self, steps: &[Step]) -> Result<()> {
        ensure!(!steps.is_empty() && steps.len() <= self.steps.length() as usize, "{} packets", steps.len());
        self.frame = world::frame_length(&steps[0].headers);
        for (step, position) in steps.iter().zip(0..) {
            self.steps.write(position, *step);
        }
        let mut length: Array<_, u32> = self.object.map_mut("length").context("map `length`")?.try_into()?;
        length.set(0, steps.len() as u32, 0)?;
        let first = PerCpuValues::try_from(vec![0; nr_cpus().map_err(|(_, error)| error)?])?;
        let mut cursor: PerCpuArray<_, u32> =
            self.object.map_mut("cursor").context("map `cursor`")?.try_into()?;
        cursor.set(0, first, 0)?;
        Ok(())
    }

    /// Sets the one packet of `bench_frame`: the first bytes of `frame`, which is longer.
    pub(crate) fn set_frame(&mut self, frame: &[u8]) -> Result<()> {
        let head =
            frame.first_chunk::<HEAD>().with_context(|| format!("a frame of {} bytes", frame.len()))?;
        let mut heads: Array<_, [u8; HEAD]> =
            self.object.map_mut("head").context("map `head`")?.try_into()?;
        heads.set(0, *head, 0)?;
        Ok(())
    }

    /// Sets the program that the driving ones go on with.
    pub(crate) fn set_target(&mut self, target: &ProgramFd, xdp: bool) -> Result<()> {
        let map = if xdp { "xdp_targets" } else { "tc_targets" };
        let mut targets = ProgramArray::try_from(self.object.map_mut(map).context(map)?)?;
        targets.set(0, target, 0)?;
        Ok(())
    }

    pub(crate) fn own_fd(&self, name: &str) -> Result<ProgramFd> {
        let program = self.object.program(name).with_context(|| format!("program {name}"))?;
        Ok(match program {
            aya::programs::Program::Xdp(program) => program.fd()?.try_clone()?,
            aya::programs::Program::SchedClassifier(program) => program.fd()?.try_clone()?,
            _ => bail!("{name} is of no type that is measured"),
        })
    }

    /// Mean time in ns of a run of a driving program, over `repeat` of them, its target's included.
    ///
    /// The kernel tells whole ns a run. So this takes the CPU time of the thread, in which nothing counts
    /// that the scheduler lets run in between, less that of a call that does nothing: of XDP some 0.5 ms, for
    /// `bpf_prog_change_xdp`, known to a tenth. A call of 200,000 runs is exact to a quarter of a ns.
    pub(crate) fn time(&mut self, program: &'static str, repeat: u32) -> Result<f64> {
        let call = match self.object.program(program) {
            Some(aya::programs::Program::Xdp(_)) => self.call,
            _ => 0.0,
        };
        Ok((self.run(program, repeat)? - call) / f64::from(repeat))
    }

    /// Runs a driving program; returns the CPU time in ns that the call took.
    pub(crate) fn run(&mut self, program: &'static str, repeat: u32) -> Result<f64> {
        let frame = vec![0; self.frame];
        let options = TestRunOptions { data_in: Some(&frame), repeat, ..TestRunOptions::default() };
        let begin = cpu_time()?;
        match self.object.program_mut(program).context(program)? {
            aya::programs::Program::Xdp(program) => program.test_run(options)?,
            aya::programs::Program::SchedClassifier(program) => program.test_run(options)?,
            _ => bail!("{program} is of no type that is measured"),
        };
        Ok(cpu_time()? - begin)
    }
}

/// CPU time of this thread in ns.
pub(crate) fn cpu_time() -> Result<f64> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    Ok(time.tv_sec() as f64 * 1e9 + time.tv_nsec() as f64)
}

/// One thing to measure.
struct Case {
    name: String,
    xdp: bool,
    target: ProgramFd,
    steps: Vec<Step>,
    /// Rules that must be in force.
    rules: u32,
}

/// The object with rules, allocations and providers, pinned in a place of its own.
struct Loaded {
    object: Option<Object>,
    pins: PathBuf,
    classifier: Classifier,
    installed: u32,
    mark: MarkLayout,
}

impl Drop for Loaded {
    fn drop(&mut self) {
        self.object.take();
        // What can't be removed is named by the next run, which finds it.
        let _ = remove_pins(&self.pins);
    }
}

impl Loaded {
    fn new() -> Result<Self> {
        let pins = PathBuf::from(format!("/sys/fs/bpf/qos-bench-{}", std::process::id()));
        let mut object = Object::load(&pins, abi::MAX_RULES)?;
        let mark = MarkLayout::new(0xffff_f000, 0).context("20 bits")?;
        let mut settings: Array<_, abi::Settings> = object.take("settings")?;
        settings.set(0, abi::Settings { abi: abi::ABI_VERSION, mark, ..Default::default() }, 0)?;
        let classifier = Classifier::new(object.rule_maps()?)?;
        let allocations: SharedArray<Allocation> = object.shared("allocations")?;
        let clocks: SharedArray<Clocks> = object.shared("clocks")?;
        for slot in 1..ALLOCATION_SLOTS {
            let record = directed(slot, Direction::Upstream);
            clocks.write(record, Clocks::default());
            allocations.write(
                record,
                Allocation {
                    id: u64::from(slot),
                    expires_ns: u64::MAX,
                    guaranteed: Meter::new(1_000_000, 25_000),
                    maximum: Meter::new(400_000_000_000, 1_000_000),
                    flags: IN_USE | POLICE,
                    class: 0x5150_4000 + slot,
                    provider: (slot % 64 + 1) as u16,
                    overhead: 14,
                    ..Default::default()
                },
            );
        }
        let providers: SharedArray<Provider> = object.shared("providers")?;
        for slot in 1..=64 {
            let aggregate = [Meter::new(400_000_000_000, 1_000_000); 2];
            providers.write(slot, Provider { aggregate, kind: 1, ..Default::default() });
        }
        Ok(Self { object: Some(object), pins, classifier, installed: 0, mark })
    }

    fn fd(&self, program: &'static str) -> Result<ProgramFd> {
        let object = self.object.as_ref().context("loaded until dropped")?;
        Ok(object.program_fd(program)?.try_clone()?)
    }

    fn install(&mut self, rules: u32) -> Result<()> {
        if rules != self.installed {
            let old: Vec<_> = (0..self.installed).map(world::rule).collect();
            self.classifier.remove(&old)?;
            self.classifier.insert(&(0..rules).map(world::rule).collect::<Vec<_>>())?;
            self.installed = rules;
        }
        Ok(())
    }

    fn steps(&self, rules: u32, flows: u32, marked: bool) -> Vec<Step> {
        world::flows(rules, flows)
            .into_iter()
            .map(|(rule, flow)| {
                let slot = rule + 1;
                let mark = self
                    .mark
                    .write(0, Marked { direction: Direction::Upstream, owner: Owner::of_allocation(slot) });
                let headers = world::headers(rule, flow, [2, 0, 0, 0, 0, 1]);
                Step { headers, reserved: [0; 2], mark: if marked { mark } else { 0 } }
            })
            .collect()
    }
}

/// Measures all programs.
pub(crate) fn measure(rounds: usize) -> Result<Vec<Figure>> {
    let mut driver = Driver::load()?;
    let mut loaded = Loaded::new()?;
    let case =
        |name: &str, xdp, target, steps, rules| Case { name: name.to_owned(), xdp, target, steps, rules };
    let mut cases = vec![
        case("XDP: empty", true, driver.own_fd("bench_empty")?, loaded.steps(1_000, 1_000, false), 1_000),
        case(
            "XDP: parse only",
            true,
            driver.own_fd("bench_parse")?,
            loaded.steps(1_000, 1_000, false),
            1_000,
        ),
        case("tc: empty", false, driver.own_fd("bench_empty_tc")?, loaded.steps(1_000, 1_000, true), 1_000),
    ];
    for (rules, flows) in [(10, 1_000), (1_000, 1_000), (10_000, 1_000), (10_000, 10_000)] {
        cases.push(Case {
            name: format!("XDP: whole ingress path with police, {rules} rules, {flows} flows"),
            xdp: true,
            target: loaded.fd("qos_xdp_lan")?,
            steps: loaded.steps(rules, flows, false),
            rules,
        });
    }
    for (marked, what) in [(true, "classified at ingress"), (false, "classified here")] {
        cases.push(Case {
            name: format!("tc: egress path, {what}, 1000 rules, 1000 flows"),
            xdp: false,
            target: loaded.fd("qos_egress_wan")?,
            steps: loaded.steps(1_000, 1_000, marked),
            rules: 1_000,
        });
    }
    let mut samples = vec![Vec::new(); cases.len()];
    for _ in 0..rounds {
        for (case, samples) in cases.iter().zip(&mut samples) {
            loaded.install(case.rules)?;
            driver.set_steps(&case.steps)?;
            driver.set_target(&case.target, case.xdp)?;
            // Once to warm up, once to measure.
            let program = if case.xdp { "bench_xdp" } else { "bench_tc" };
            driver.run(program, REPEAT)?;
            samples.push(driver.time(program, REPEAT)?);
        }
    }
    let medians: Vec<f64> = samples.iter_mut().map(|values| median(values)).collect();
    let empty = |xdp: bool| if xdp { medians[0] } else { medians[2] };
    Ok(cases
        .iter()
        .zip(&medians)
        .map(|(case, ns)| Figure { name: case.name.clone(), ns: *ns, ns_over_empty: ns - empty(case.xdp) })
        .collect())
}
