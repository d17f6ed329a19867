//! What tests of levels ask of the daemon, in the product's own types.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use qos_userspace::api::types::{Explained, Outcome, Status};
use qos_userspace::domain::units::BitsPerSecond;
use qos_userspace::domain::{Allocation, AllocationId, Direction};
use qos_userspace::hex;
use qos_userspace::manager::report::{Counts, DirectedCounts, Statistics};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::daemon::Daemon;
use crate::traffic::{Flow, Measured, measure};

/// Idle share below which others keep the machine from doing what is measured.
const IDLE: f64 = 0.1;
/// Share of the window that processors may have stopped: a shaped flow may lose as much of its rate, which
/// [`Measured::ratio_to`] takes into account.
const STOPPED: f64 = 0.05;
/// How often a measurement that the machine spoilt is taken.
const REPEATS: u32 = 8;
/// Pause before the first repeat; a longer one before each later one.
const PAUSE: Duration = Duration::from_millis(500);
/// Time that a process spends on repeats, in ms. A machine that is still busy then is measured as it is.
static PATIENCE: AtomicU64 = AtomicU64::new(30_000);
/// A sender that got less than this share of its rate out was kept from it by the machine.
const OFFERED: f64 = 0.97;

impl Daemon {
    /// Runs `qos grant ARGS` and returns what was granted.
    ///
    /// # Errors
    /// When it is refused.
    pub fn grant(&self, args: &str) -> Result<Allocation> {
        let outcome: Outcome<Allocation> = typed(&self.qos_line(&format!("grant {args}"))?)?;
        Ok(outcome.result)
    }

    /// Runs `qos revoke`.
    ///
    /// # Errors
    /// When there is no such allocation.
    pub fn revoke(&self, id: AllocationId) -> Result<()> {
        self.qos(["revoke", &id.to_string()]).map(drop)
    }

    /// Runs `qos stats`.
    ///
    /// # Errors
    /// When the daemon doesn't answer.
    pub fn statistics(&self) -> Result<Statistics> {
        typed(&self.qos_line("stats")?)
    }

    /// What `qos stats` says of an allocation.
    ///
    /// # Errors
    /// When it isn't there.
    pub fn counts(&self, id: AllocationId) -> Result<DirectedCounts> {
        self.statistics()?.allocations.get(&id).copied().with_context(|| format!("no counts of {id}"))
    }

    /// Runs `qos status`.
    ///
    /// # Errors
    /// When the daemon doesn't answer.
    pub fn status(&self) -> Result<Status> {
        typed(&self.qos_line("status")?)
    }

    /// Runs `qos explain` on a frame.
    ///
    /// # Errors
    /// When the frame can't be run.
    pub fn explain(&self, direction: Direction, frame: &[u8]) -> Result<Explained> {
        let direction = match direction {
            Direction::Upstream => "up",
            Direction::Downstream => "down",
        };
        typed(&self.qos(["explain", "--direction", direction, "--hex", &hex::encode(frame)])?)
    }
}

fn typed<T: DeserializeOwned>(answer: &Value) -> Result<T> {
    T::deserialize(answer).with_context(|| format!("an answer of another kind: {answer}"))
}

/// Like [`measure`], and again, up to eight times, when the machine and not what is tested fell short:
/// a sender that didn't get its rate out, an overrun receiver, or processors that stopped or were kept
/// so busy by others that the gateway's timers came late. It stops doing so once this process has spent
/// 30 s on repeats, and measures the machine as it is. `offered` is what each flow was told to send; zero for one
/// that sends what it can.
///
/// # Errors
/// When a flow's sockets failed.
#[expect(clippy::print_stdout, reason = "it is told beside what a test says itself")]
pub fn measure_undisturbed(
    flows: &[(&dyn Flow, BitsPerSecond)],
    warm_up: Duration,
    window: Duration,
) -> Result<Vec<Measured>> {
    let watched: Vec<&dyn Flow> = flows.iter().map(|(flow, _)| *flow).collect();
    let mut repeats = 1;
    loop {
        let (before, began) = (processor_time()?, Instant::now());
        let measured = measure(&watched, warm_up, window)?;
        let (time, stopped) = (began.elapsed(), measured.first().map_or(0.0, |measured| measured.stopped));
        let idle = idle_share(before, processor_time()?);
        let short = measured.iter().zip(flows).any(|(measured, (_, offered))| {
            measured.receiver_dropped > 0 || (measured.offered.0 as f64) < offered.0 as f64 * OFFERED
        });
        if !short && idle >= IDLE && stopped <= STOPPED {
            return Ok(measured);
        }
        println!(
            "spoilt, {repeats} of {REPEATS}: {:.0} % idle, stopped for {:.1} % of the time{}",
            idle * 100.0,
            stopped * 100.0,
            if short { ", less offered than was to be" } else { "" }
        );
        let pause = PAUSE * repeats;
        let spent = (pause + time).as_millis() as u64;
        let left =
            PATIENCE.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(spent));
        if repeats == REPEATS || left.is_err() {
            return Ok(measured);
        }
        std::thread::sleep(pause);
        repeats += 1;
    }
}

/// Time of all processors together since boot, in ticks: idle, and in all (proc(5), `/proc/stat`).
fn processor_time() -> Result<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
    let line = text.lines().next().context("/proc/stat is empty")?;
    // user, nice, system, idle, iowait, irq, softirq, steal; guest time is in user already.
    let ticks: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .take(8)
        .map(str::parse)
        .collect::<Result<_, _>>()
        .context("/proc/stat")?;
    Ok((ticks.iter().skip(3).take(2).sum(), ticks.iter().sum()))
}

/// Share of the processors' time between two readings that nobody had work for.
fn idle_share(before: (u64, u64), after: (u64, u64)) -> f64 {
    (after.0 - before.0) as f64 / ((after.1 - before.1) as f64).max(1.0)
}

/// [`measure_undisturbed`] of one UDP flow.
///
/// # Errors
/// When its sockets failed.
pub fn undisturbed(
    flow: &crate::traffic::RunningUdp,
    warm_up: Duration,
    window: Duration,
) -> Result<Measured> {
    Ok(measure_undisturbed(&[(flow, flow.rate())], warm_up, window)?.remove(0))
}

/// Waits until something holds, and tells how long that took.
///
/// # Panics
/// When it does not hold within `limit`.
pub fn eventually(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
    began.elapsed()
}

/// Sends for `time` from a pause to a pause, so that every packet counts, and waits for the last one.
/// The flow pauses afterwards.
///
/// # Errors
/// When its sockets failed.
pub fn send_for(flow: &crate::traffic::RunningUdp, rate: BitsPerSecond, time: Duration) -> Result<Measured> {
    flow.set_rate(BitsPerSecond(0));
    // A sender looks at its rate every 50 ms, or more often.
    std::thread::sleep(Duration::from_millis(120));
    flow.begin();
    flow.set_rate(rate);
    std::thread::sleep(time);
    flow.set_rate(BitsPerSecond(0));
    std::thread::sleep(Duration::from_millis(120));
    flow.end();
    flow.collect()
}

/// What was counted between two readings.
#[must_use]
pub fn since(before: &Counts, after: &Counts) -> Counts {
    let count = |pick: fn(&Counts) -> qos_userspace::manager::report::Count| {
        let (before, after) = (pick(before), pick(after));
        qos_userspace::manager::report::Count {
            packets: after.packets - before.packets,
            bytes: after.bytes - before.bytes,
        }
    };
    Counts {
        passed: count(|counts| counts.passed),
        dropped: count(|counts| counts.dropped),
        queue_dropped_packets: after.queue_dropped_packets - before.queue_dropped_packets,
        marked: count(|counts| counts.marked),
        in_profile: count(|counts| counts.in_profile),
        excess: count(|counts| counts.excess),
        mtu: after.mtu,
    }
}

/// A result in one line, without its arrivals.
pub struct Brief<'a>(pub &'a Measured);

impl fmt::Debug for Brief<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let m = self.0;
        write!(
            f,
            "offered {}, achieved {}, sent {}, received {}, lost {}, reordered {}, overran {}",
            m.offered, m.achieved, m.sent, m.received, m.lost, m.reordered, m.receiver_dropped
        )?;
        if let Some(first) = m.first_lost {
            write!(f, ", number {first} is missing first")?;
        }
        if m.stopped > 0.0 {
            write!(f, ", the machine stopped for {:.1} %", m.stopped * 100.0)?;
        }
        match &m.latency {
            Some(latency) => {
                write!(f, ", p50 {:?}, p99 {:?}, max {:?}", latency.p50(), latency.p99(), latency.max())
            }
            None => Ok(()),
        }
    }
}
