//! Ctrl-C and SIGTERM: seen between two steps, so that what was made is taken apart in order.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static CAUGHT: AtomicBool = AtomicBool::new(false);

/// How often waiting looks for a signal.
const LOOK: Duration = Duration::from_millis(50);

/// Somebody wants the demo to end.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub(crate) struct Interrupted;

/// Takes the signals from here on. Children don't inherit that.
pub(crate) fn catch() -> Result<()> {
    extern "C" fn note(_signal: libc::c_int) {
        CAUGHT.store(true, Ordering::SeqCst);
    }
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler does nothing but store to an atomic.
        unsafe { sigaction(signal, &action) }.with_context(|| format!("handling {signal}"))?;
    }
    Ok(())
}

/// An error when a signal has come.
pub(crate) fn check() -> Result<(), Interrupted> {
    if CAUGHT.load(Ordering::SeqCst) { Err(Interrupted) } else { Ok(()) }
}

/// Sleeps until `end`, telling of each look.
pub(crate) fn sleep_until(end: Instant, mut look: impl FnMut()) -> Result<(), Interrupted> {
    loop {
        check()?;
        look();
        match end.checked_duration_since(Instant::now()) {
            None | Some(Duration::ZERO) => return Ok(()),
            Some(left) => thread::sleep(left.min(LOOK)),
        }
    }
}

/// Waits for a signal.
pub(crate) fn wait() {
    while check().is_ok() {
        thread::sleep(LOOK);
    }
}
