//! Lines of the programs' sampled debugging, as the tracing programs write them into a ring buffer.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use aya::Ebpf;
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use qos_common::abi::Outcome;

use super::kernel::outcome_name;

/// Lines that wait for a reader; older ones are dropped.
const KEPT: usize = 4_096;

/// Reads the ring buffer.
pub(super) struct Tracer {
    logger: EbpfLogger<Lines>,
    lines: Lines,
}

impl std::fmt::Debug for Tracer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracer").finish_non_exhaustive()
    }
}

impl Tracer {
    /// # Errors
    /// Where the object has no ring buffer.
    pub(super) fn new(ebpf: &mut Ebpf) -> Result<Self, aya_log::Error> {
        let lines = Lines::default();
        Ok(Self { logger: EbpfLogger::init_with_logger(ebpf, lines.clone())?, lines })
    }

    /// The lines since the last call, oldest first.
    pub(super) fn take(&mut self) -> Vec<String> {
        self.logger.flush();
        let mut lines = self.lines.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.drain(..).map(|line| readable(&line)).collect()
    }
}

/// A logger that keeps what it is told.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<VecDeque<String>>>);

impl Log for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == KEPT {
            lines.pop_front();
        }
        lines.push_back(record.args().to_string());
    }

    fn flush(&self) {}
}

/// The line with the numbers of outcomes and directions as words.
fn readable(line: &str) -> String {
    let word = |field: &str| {
        if let Some(number) = field.strip_prefix("outcome=") {
            let known = Outcome::ALL.into_iter().find(|outcome| (*outcome as u32).to_string() == number);
            return known.map_or_else(|| field.to_owned(), |outcome| outcome_name(outcome).to_owned());
        }
        match field {
            "direction=0" => "up".to_owned(),
            "direction=1" => "down".to_owned(),
            other => other.to_owned(),
        }
    };
    line.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_words() {
        let line = "outcome=2 direction=1 protocol=17 192.0.2.1:5 192.0.2.2:6 length=60 slot=3";
        let expected = "over_maximum down protocol=17 192.0.2.1:5 192.0.2.2:6 length=60 slot=3";
        assert_eq!(readable(line), expected);
        assert_eq!(readable("outcome=99 direction=0"), "outcome=99 up");
    }
}
