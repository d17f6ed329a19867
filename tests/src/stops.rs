//! How long the machine stopped: time in which its processors ran nothing, not even what comes first.

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
    threads: Vec<JoinHandle<Result<Duration>>>,
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

    /// The time for which that processor stopped which stopped longest.
    ///
    /// # Errors
    /// When a processor couldn't be watched.
    pub fn stopped(mut self) -> Result<Duration> {
        self.ended.store(true, Ordering::Relaxed);
        let mut longest = Duration::ZERO;
        for thread in self.threads.drain(..) {
            let stopped = thread.join().map_err(|_| anyhow::anyhow!("a watch of a processor panicked"))?;
            longest = longest.max(stopped?);
        }
        Ok(longest)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

fn watch(processor: usize, ended: &AtomicBool) -> Result<Duration> {
    let mut here = CpuSet::new();
    here.set(processor)?;
    sched_setaffinity(Pid::from_raw(0), &here).with_context(|| format!("going to processor {processor}"))?;
    let priority = libc::sched_param { sched_priority: 50 };
    // SAFETY: the parameter lives through the call, which concerns this thread alone.
    let outcome = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) };
    nix::errno::Errno::result(outcome).context("a thread ahead of others")?;
    let mut stopped = Duration::ZERO;
    while !ended.load(Ordering::Relaxed) {
        let due = Instant::now() + PERIOD;
        thread::sleep(PERIOD);
        let late = due.elapsed();
        if late > PERIOD {
            stopped += late;
        }
    }
    Ok(stopped)
}
