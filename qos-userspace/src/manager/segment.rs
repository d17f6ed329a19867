//! Segments that lines share: what is promised on them, and what is left.

use std::collections::BTreeMap;

use super::decide::{check_rate, find_segment, given, only, refuse_in_use};
use super::{Change, Decision, Refusal, RefusalCode, State, direction_field, direction_word};
use crate::domain::segment::MOST_SEGMENTS;
use crate::domain::{Allocation, BitsPerSecond, Directed, Direction, Name, Segment, Session};

/// Sums of the guarantees on the lines behind each segment, in bit/s. One that carries none is not in it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Promised(BTreeMap<Name, Directed<u64>>);

impl Promised {
    pub(super) fn of(&self, segment: &Name) -> Directed<u64> {
        self.0.get(segment).copied().unwrap_or_default()
    }

    pub(super) fn add(&mut self, session: &Session, allocation: &Allocation) {
        for (direction, rate) in given(&allocation.level.guaranteed) {
            for segment in &session.segments {
                *self.0.entry(segment.clone()).or_default().get_mut(direction) += rate.0;
            }
        }
    }

    pub(super) fn remove(&mut self, session: &Session, allocation: &Allocation) {
        for (direction, rate) in given(&allocation.level.guaranteed) {
            for segment in &session.segments {
                let Some(promised) = self.0.get_mut(segment) else { continue };
                *promised.get_mut(direction) -= rate.0;
                if *promised == Directed::default() {
                    self.0.remove(segment);
                }
            }
        }
    }
}

pub(super) fn put(state: &State, segment: &Segment) -> Result<Decision, Refusal> {
    let mut warnings = Vec::new();
    for direction in Direction::BOTH {
        let (key, word) = (direction_field(direction), direction_word(direction));
        let capacity = *segment.capacity.get(direction);
        check_rate(&format!("capacity.{key}"), capacity)?;
        if let Some(rest) = segment.rest.get(direction).filter(|rest| *rest > capacity) {
            let reason = format!("is above the capacity of {capacity}");
            return Err(Refusal::invalid(format!("rest.{key}"), rest, &reason));
        }
        let promised = BitsPerSecond(*state.index.promised.of(&segment.name).get(direction));
        let there = segment.promisable(direction);
        if promised > there {
            warnings.push(format!("{word}: {promised} are promised already, {there} are there for it"));
        }
    }
    Ok(Decision { changes: vec![Change::PutSegment(segment.clone())], warnings })
}

pub(super) fn remove(state: &State, name: &Name) -> Result<Decision, Refusal> {
    find_segment(state, "name", name)?;
    let behind = state.sessions.values().filter(|session| session.segments.contains(name));
    refuse_in_use("segment", name, "session", behind.map(|session| &session.name))?;
    Ok(only(Change::DeleteSegment(name.clone())))
}

/// Checks the segments that a session names.
pub(super) fn check_of_session(state: &State, segments: &[Name]) -> Result<(), Refusal> {
    if segments.len() > MOST_SEGMENTS {
        let reason = format!("are too many segments: a line is behind {MOST_SEGMENTS} at most");
        return Err(Refusal::invalid("segments", segments.len(), &reason));
    }
    for (index, name) in segments.iter().enumerate() {
        let field = format!("segments[{index}]");
        find_segment(state, &field, name)?;
        if segments[..index].contains(name) {
            return Err(Refusal::invalid(field, name, "is named twice"));
        }
    }
    Ok(())
}

/// What is left on the fullest segment before a line; none: it is behind none.
pub(super) fn left(
    state: &State,
    session: &Session,
    direction: Direction,
    without: &[&Allocation],
) -> Option<BitsPerSecond> {
    session.segments.iter().map(|name| state.left_on_segment(name, direction, without)).min()
}

/// Whether the segments before a line have room for one more guarantee on it.
pub(super) fn admit(
    state: &State,
    session: &Session,
    direction: Direction,
    asked: BitsPerSecond,
    without: &[&Allocation],
) -> Result<(), Refusal> {
    for name in &session.segments {
        let left = state.left_on_segment(name, direction, without);
        if asked > left {
            let message = format!("segment {name} {}: asked {asked}, left {left}", direction_word(direction));
            let field = format!("level.guaranteed.{}", direction_field(direction));
            return Err(Refusal::new(RefusalCode::InsufficientCapacity, field, asked, message));
        }
    }
    Ok(())
}
