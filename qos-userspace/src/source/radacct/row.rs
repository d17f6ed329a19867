//! What a row tells of a session.

use std::net::IpAddr;

use ipnet::IpNet;
use jiff::Timestamp;

use super::super::accounting::{is_assigned, without_parts};
use super::super::name::line_name;
use crate::domain::subscriber::{Event, Facts, LONGEST_KEY};
use crate::domain::{BitsPerSecond, Directed, Name};

/// A row, its columns as text in the order in which they were asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Row(pub(super) Vec<Option<String>>);

/// A session that is open.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Session {
    pub(super) id: i64,
    pub(super) key: String,
    pub(super) line: Name,
    pub(super) start: Timestamp,
    /// The last sign of life.
    pub(super) seen: Timestamp,
    pub(super) facts: Facts,
}

impl Session {
    pub(super) fn up(&self) -> Event {
        Event::Up { line: self.line.clone(), key: Some(self.key.clone()), facts: self.facts.clone() }
    }
}

impl Row {
    fn text(&self, column: usize) -> Option<&str> {
        self.0.get(column)?.as_deref().map(str::trim).filter(|text| !text.is_empty())
    }

    /// The number; of what is none, the lowest.
    pub(super) fn id(&self) -> i64 {
        self.text(0).and_then(|text| text.parse().ok()).unwrap_or(i64::MIN)
    }

    /// The key, or whatever else comes first.
    pub(super) fn first(&self) -> Option<&str> {
        self.text(0)
    }

    /// A time; 0 is that of a database that has no null there.
    pub(super) fn moment(&self, column: usize) -> Option<Timestamp> {
        let seconds = self.text(column)?.parse().ok().filter(|seconds| *seconds > 0)?;
        Timestamp::from_second(seconds).ok()
    }

    /// None: no line can be made of it.
    pub(super) fn session(&self, rate_unit: u64) -> Option<Session> {
        let key = self.text(1).filter(|key| key.len() <= LONGEST_KEY)?;
        let line = line_name(self.text(2)?.as_bytes())?;
        let (start, update) = (self.moment(4), self.moment(5));
        let seen = start.max(update)?;
        let addresses = without_parts((6..10).filter_map(|column| self.text(column)).filter_map(prefix));
        if addresses.is_empty() {
            return None;
        }
        let rate = |column| {
            let rate = self.text(column)?.parse::<f64>().ok()? * rate_unit as f64;
            // Up to here every whole number of bits is exact.
            (1.0..9_007_199_254_740_992.0).contains(&rate).then_some(BitsPerSecond(rate as u64))
        };
        let facts = Facts {
            addresses,
            rate: Directed { up: rate(10), down: rate(11) },
            bras: self.text(3).map(|text| text.strip_suffix("/32").unwrap_or(text).to_owned()),
            ..Facts::default()
        };
        Some(Session {
            id: self.text(0)?.parse().ok()?,
            key: key.to_owned(),
            line,
            start: start.unwrap_or(seen),
            seen,
            facts,
        })
    }
}

/// PostgreSQL writes hosts with their length, and the others without.
fn prefix(text: &str) -> Option<IpNet> {
    let prefix: IpNet = text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))?;
    match prefix {
        IpNet::V4(v4) if !is_assigned(&v4.addr()) => None,
        prefix => Some(prefix),
    }
}
