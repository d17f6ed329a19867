//! What is known of the open sessions, and what of it is still to be told.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Instant;

use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};
use tracing::warn;

use super::super::Throttle;
use super::row::{Row, Session};
use super::{MOST_ENDS, OVERLAP};
use crate::domain::Name;

/// Numbers that may have been given out, and not be visible yet, when rows are read for the first time.
const FIRST_OVERLAP: i64 = 10_000;

/// What only one session has at a time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Claim {
    Line(Name),
    Address(IpNet),
}

/// An open session.
#[derive(Debug)]
struct Open {
    session: Session,
    /// It was told to be up, and no other took its place since.
    told: bool,
}

/// The end of a session that was told to be up.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) at: Timestamp,
    pub(super) line: Name,
    pub(super) key: String,
}

/// What is to be told.
#[derive(Debug, Default)]
pub(super) struct Reports {
    /// By time.
    pub(super) downs: Vec<Ended>,
    /// By the time at which they began; whether it is told for the first time.
    pub(super) ups: Vec<(Session, bool)>,
}

/// What is known.
#[derive(Debug, Default)]
pub(super) struct Known {
    open: BTreeMap<i64, Open>,
    /// By what they claim, who began last at the end.
    claims: HashMap<Claim, BTreeSet<(Timestamp, i64)>>,
    /// Who has to be looked at.
    changed: BTreeSet<i64>,
    ended: Vec<Ended>,
    /// The highest number, and when it was read.
    marks: VecDeque<(Instant, i64)>,
    /// The latest time of an update.
    updated: Option<Timestamp>,
    /// Up to where ends were looked for.
    looked_to: i64,
    contested: Throttle,
}

impl Known {
    /// The number above which rows have to be read, for they may not have been there when others were.
    pub(super) fn read_from(&self) -> i64 {
        self.marks.front().map_or(0, |(_, id)| *id)
    }

    /// All rows up to this number have been read, as far as they were there.
    pub(super) fn read_to(&mut self, id: i64) {
        let now = Instant::now();
        self.marks.push_back((now, id.max(self.marks.back().map_or(0, |(_, id)| *id))));
        // The first one that is left is old enough.
        while self.marks.get(1).is_some_and(|(at, _)| now.duration_since(*at) >= OVERLAP) {
            self.marks.pop_front();
        }
        if self.marks.len() == 1 {
            self.marks.push_front((now, id.saturating_sub(FIRST_OVERLAP).max(0)));
        }
    }

    /// Since when updates have to be read; none: all rows were read anyway.
    pub(super) fn updated_since(&self) -> Option<Timestamp> {
        let overlap = SignedDuration::try_from(OVERLAP).unwrap_or_default();
        self.updated.map(|updated| updated.checked_sub(overlap).unwrap_or(Timestamp::MIN))
    }

    /// Takes a session that is open.
    pub(super) fn take(&mut self, session: Session) {
        self.updated = self.updated.max(Some(session.seen.min(Timestamp::now())));
        let id = session.id;
        let told = match self.open.remove(&id) {
            Some(open) if open.session == session => {
                self.open.insert(id, open);
                return;
            }
            Some(open) => {
                self.withdraw(&open.session);
                // One that has another name is another line.
                if open.told && open.session.line != session.line {
                    self.end(open.session, session.seen);
                    false
                } else {
                    open.told
                }
            }
            None => false,
        };
        for claim in claims(&session) {
            self.claims.entry(claim).or_default().insert((session.start, id));
        }
        self.open.insert(id, Open { session, told });
        self.changed.insert(id);
    }

    /// Numbers of sessions whose end is to be looked for.
    pub(super) fn next_to_end(&mut self) -> Vec<i64> {
        let from = self.open.range(self.looked_to + 1..).map(|(id, _)| *id);
        let ids: Vec<_> = from.take(MOST_ENDS).collect();
        self.looked_to = if ids.len() < MOST_ENDS { 0 } else { ids.last().copied().unwrap_or_default() };
        ids
    }

    /// Takes the ends of the sessions that were asked for; one that is not there any more ended.
    pub(super) fn take_ends(&mut self, asked: &[i64], rows: &[Row], now: Timestamp) {
        let found: HashMap<_, _> = rows.iter().map(|row| (row.id(), row.moment(1))).collect();
        for id in asked {
            let at = match found.get(id) {
                Some(Some(at)) => *at,
                Some(None) => continue,
                None => now,
            };
            if let Some(open) = self.open.remove(id) {
                self.withdraw(&open.session);
                self.changed.remove(id);
                if open.told {
                    self.end(open.session, at);
                }
            }
        }
    }

    /// The same for lines that were told to be up before anything was read.
    pub(super) fn take_ends_by_key(&mut self, asked: &[(String, Name)], rows: &[Row], now: Timestamp) {
        let found: HashMap<_, _> =
            rows.iter().filter_map(|row| Some((row.first()?, row.moment(1)))).collect();
        for (key, line) in asked {
            let at = match found.get(key.as_str()) {
                Some(Some(at)) => *at,
                Some(None) => continue,
                None => now,
            };
            self.ended.push(Ended { at, line: line.clone(), key: key.clone() });
        }
    }

    fn end(&mut self, session: Session, at: Timestamp) {
        self.ended.push(Ended { at, line: session.line, key: session.key });
    }

    /// Lets go of what a session claims, and has those looked at that may have it then.
    fn withdraw(&mut self, session: &Session) {
        for claim in claims(session) {
            let Some(claimants) = self.claims.get_mut(&claim) else { continue };
            claimants.remove(&(session.start, session.id));
            match claimants.last() {
                Some((start, next)) if (*start, *next) < (session.start, session.id) => {
                    self.changed.insert(*next);
                }
                Some(_) => {}
                None => {
                    self.claims.remove(&claim);
                }
            }
        }
    }

    /// The session that keeps this one from counting.
    fn rival(&self, session: &Session) -> Option<i64> {
        let own = (session.start, session.id);
        let last = |claim| self.claims.get(&claim).and_then(|claimants| claimants.last()).copied();
        claims(session).filter_map(last).find(|other| *other > own).map(|(_, id)| id)
    }

    /// What is to be told of all that changed. It counts as told then.
    pub(super) fn reports(&mut self) -> Reports {
        let mut ups = Vec::new();
        for id in std::mem::take(&mut self.changed) {
            let Some(session) = self.open.get(&id).map(|open| open.session.clone()) else { continue };
            if let Some(rival) = self.rival(&session).and_then(|id| self.open.get(&id)) {
                if let Some(more) = self.contested.pass() {
                    let (older, newer) = (&session, &rival.session);
                    warn!(
                        more,
                        "two sessions are open on one address or line, and the newer counts: {} of line {} since {}, \
                         {} of line {} since {}",
                        older.key,
                        older.line,
                        older.start,
                        newer.key,
                        newer.line,
                        newer.start
                    );
                }
                continue;
            }
            // Whom it displaces is told anew if it counts again.
            let beaten: Vec<_> = claims(&session)
                .filter_map(|claim| self.claims.get(&claim))
                .flatten()
                .map(|(_, other)| *other)
                .filter(|other| *other != id)
                .collect();
            for other in beaten {
                if let Some(open) = self.open.get_mut(&other) {
                    open.told = false;
                }
            }
            if let Some(open) = self.open.get_mut(&id) {
                ups.push((session, !open.told));
                open.told = true;
            }
        }
        ups.sort_by_key(|(session, _)| (session.start, session.id));
        let mut downs = std::mem::take(&mut self.ended);
        downs.sort_by_key(|ended| ended.at);
        Reports { downs, ups }
    }

    /// How many are open, and how many of them don't count.
    pub(super) fn counts(&self) -> (u64, u64) {
        let contested = self.open.values().filter(|open| self.rival(&open.session).is_some()).count();
        (self.open.len() as u64, contested as u64)
    }
}

fn claims(session: &Session) -> impl Iterator<Item = Claim> {
    let addresses = session.facts.addresses.iter().map(|address| Claim::Address(*address));
    std::iter::once(Claim::Line(session.line.clone())).chain(addresses)
}
