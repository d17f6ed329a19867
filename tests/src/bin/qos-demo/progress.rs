//! What the demo is doing: a line that moves on a terminal, plain lines elsewhere. On standard
//! error, so that the results can be piped.

use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::interrupt;

/// Shows steps and waits.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    began: Instant,
}

impl Progress {
    pub(crate) fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let bar = (!bar.is_hidden()).then_some(bar);
        if let Some(bar) = &bar {
            bar.set_style(
                ProgressStyle::with_template("{spinner} {msg}")
                    .unwrap_or_else(|_| ProgressStyle::default_spinner()),
            );
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        Self { bar, began: Instant::now() }
    }

    /// Tells what begins.
    pub(crate) fn step(&mut self, what: &str) -> Result<()> {
        interrupt::check()?;
        let line = format!("{:>4.0} s  {what}", self.began.elapsed().as_secs_f64());
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
        Ok(())
    }

    /// Tells of a command that is run.
    pub(crate) fn command(&mut self, line: &str) -> Result<()> {
        interrupt::check()?;
        match &self.bar {
            Some(bar) => bar.println(format!("        $ {line}")),
            None => eprintln!("        $ {line}"),
        }
        Ok(())
    }

    /// Lets `time` pass, in which traffic runs.
    pub(crate) fn wait(&mut self, what: &str, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        interrupt::sleep_until(end, || {
            if let Some(bar) = &self.bar {
                let left = end.saturating_duration_since(Instant::now());
                bar.set_message(format!("{what}, {:.0} s more", left.as_secs_f64().ceil()));
            }
        })?;
        if let Some(bar) = &self.bar {
            bar.set_message("");
        }
        Ok(())
    }

    /// Takes the moving line away.
    pub(crate) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}
