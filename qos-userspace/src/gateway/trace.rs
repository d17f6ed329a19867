//! Lines of the programs' sampled debugging, as the tracing programs write them into a ring buffer.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use aya::Ebpf;
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use qos_common::abi::Outcome;

use super::kernel::outcome_name;
use crate::domain::selector::grammar::protocol_name;

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

/// The line with words for numbers.
fn readable(line: &str) -> String {
    let word = |field: &str| {
        let Some((name, value)) = field.split_once('=') else { return field.to_owned() };
        let number = value.parse::<u64>().ok();
        match (name, number) {
            ("outcome", Some(number)) => Outcome::ALL
                .into_iter()
                .find(|outcome| *outcome as u64 == number)
                .map_or_else(|| field.to_owned(), |outcome| outcome_name(outcome).to_owned()),
            ("direction", Some(0)) => "up".to_owned(),
            ("direction", Some(1)) => "down".to_owned(),
            ("protocol", Some(number)) => {
                u8::try_from(number).map_or_else(|_| field.to_owned(), protocol_name)
            }
            ("allocation", Some(0)) => "no allocation".to_owned(),
            ("allocation", Some(id)) => format!("allocation {id}"),
            _ => field.to_owned(),
        }
    };
    line.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_words() {
        for (line, expected) in [
            (
                "outcome=2 direction=1 protocol=17 from 192.0.2.1:5 to 192.0.2.2:6 length 60 allocation=3",
                "over_maximum down udp from 192.0.2.1:5 to 192.0.2.2:6 length 60 allocation 3",
            ),
            (
                "outcome=1 direction=0 protocol=200 from [2001:db8::1]:0 to [2001:db8::2]:0 length 60 allocation=0",
                "unclassified up 200 from [2001:db8::1]:0 to [2001:db8::2]:0 length 60 no allocation",
            ),
            ("outcome=99 direction=7", "outcome=99 direction=7"),
        ] {
            assert_eq!(readable(line), expected);
        }
    }
}
