//! How long the machine stopped: time in which its processors ran nothing, not even what comes first.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// How often a processor is looked at.
const PERIOD: Duration = Duration::from_millis(1);

/// A thread on each processor, ahead of all others, that notes when it was woken late.
#[derive(Debug)]
pub struct Watch {
    ended: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<Vec<Range<Instant>>>>>,
}

impl Watch {
    /// Watches from now on.
    ///
    /// # Errors
    /// When this process may not choose its processors.
    pub fn start() -> Result<Self> {
        let ended = Arc::new(AtomicBool::new(false));
        let usable = sched_getaffinity(Pid::from_raw(0)).context("processors of this process")?;
        let processors = (0..CpuSet::count()).filter(|&one| usable.is_set(one).unwrap_or(false));
        let threads = processors
            .map(|processor| {
                let ended = Arc::clone(&ended);
                thread::spawn(move || watch(processor, &ended))
            })
            .collect();
        Ok(Self { ended, threads })
    }

    /// Ends, and tells when processors stopped.
    ///
    /// # Errors
    /// When a processor couldn't be watched.
    pub fn stopped(mut self) -> Result<Stops> {
        self.ended.store(true, Ordering::Relaxed);
        let mut each = Vec::new();
        for thread in self.threads.drain(..) {
            each.extend(thread.join().map_err(|_| anyhow::anyhow!("a watch of a processor panicked"))??);
        }
        Ok(Stops::new(each))
    }
}

/// Times at which at least one processor had stopped. What goes through the network stack needs the one that
/// it is on, and packets go from one to another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stops {
    /// In order, apart from each other.
    times: Vec<Range<Instant>>,
}

impl Stops {
    /// Of times in any order.
    fn new(mut each: Vec<Range<Instant>>) -> Self {
        each.sort_unstable_by_key(|time| time.start);
        let mut times: Vec<Range<Instant>> = Vec::new();
        for time in each {
            match times.last_mut() {
                Some(last) if time.start <= last.end => last.end = last.end.max(time.end),
                _ => times.push(time),
            }
        }
        Self { times }
    }

    /// How long it stopped within a window.
    #[must_use]
    pub fn within(&self, window: &Range<Instant>) -> Duration {
        let within = |time: &Range<Instant>| {
            time.end.min(window.end).saturating_duration_since(time.start.max(window.start))
        };
        self.times.iter().map(within).sum()
    }

    /// The share of a window for which it stopped, 0 to 1.
    #[must_use]
    pub fn share_of(&self, window: &Range<Instant>) -> f64 {
        let length = window.end.saturating_duration_since(window.start).as_secs_f64();
        if length > 0.0 { self.within(window).as_secs_f64() / length } else { 0.0 }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

fn watch(processor: usize, ended: &AtomicBool) -> Result<Vec<Range<Instant>>> {
    let mut here = CpuSet::new();
    here.set(processor)?;
    sched_setaffinity(Pid::from_raw(0), &here).with_context(|| format!("going to processor {processor}"))?;
    let priority = libc::sched_param { sched_priority: 50 };
    // SAFETY: the parameter lives through the call, which concerns this thread alone.
    let outcome = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) };
    nix::errno::Errno::result(outcome).context("a thread ahead of others")?;
    let mut stopped = Vec::new();
    while !ended.load(Ordering::Relaxed) {
        let due = Instant::now() + PERIOD;
        thread::sleep(PERIOD);
        let woken = Instant::now();
        if woken.saturating_duration_since(due) > PERIOD {
            stopped.push(due..woken);
        }
    }
    Ok(stopped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_of_several_processors_count_once() {
        let began = Instant::now();
        let at = |ms: u64| began + Duration::from_millis(ms);
        let stops = Stops::new(vec![at(50)..at(60), at(10)..at(30), at(20)..at(40), at(22)..at(23)]);
        assert_eq!(stops.times, [at(10)..at(40), at(50)..at(60)]);
        assert_eq!(stops.within(&(at(0)..at(100))), Duration::from_millis(40));
        assert_eq!(stops.within(&(at(35)..at(55))), Duration::from_millis(10));
        assert_eq!(stops.within(&(at(41)..at(49))), Duration::ZERO);
        assert!((stops.share_of(&(at(0)..at(100))) - 0.4).abs() < 1e-9);
        assert_eq!(stops.share_of(&(at(20)..at(20))).to_bits(), 0.0_f64.to_bits());
    }
}
