//! What a request leaves open: which level it gets, who gives way to it, and what it could have instead.
//!
//! A request may name the smallest rate that is of use beside the one it would like, and it may name what it
//! needs, a delay or jitter budget, without a priority or a burst. It gets as much of the rate as there is,
//! and the latest priority with the largest burst that keeps the budgets: what costs others least.

use qos_common::clock::MIN_RATE;

use super::decide::given;
use super::grant::Asker;
use super::{LevelRequest, Preempt, Refusal, RefusalCode, contract, segment};
use crate::domain::level::{LAST_PRIORITY, default_burst};
use crate::domain::{Allocation, BitsPerSecond, ByteCount, Directed, Direction, Level};

/// Parts of the usual burst that are tried, largest first.
const BURST_PARTS: [u64; 4] = [1, 2, 4, 8];

/// A level that is asked for, and what of it is left to us.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    /// The level, everything filled in.
    pub(super) level: Level,
    /// The smallest guarantees that are of use; none: the whole of what the level says.
    pub(super) least: Directed<Option<BitsPerSecond>>,
    /// Nobody has named a priority.
    pub(super) is_priority_open: bool,
    /// Nobody has named a burst.
    pub(super) is_burst_open: Directed<bool>,
}

/// What came of it.
#[derive(Clone, Debug)]
pub(super) struct Chosen<'a> {
    pub(super) allocation: Allocation,
    /// Who gives way to it.
    pub(super) preempted: Vec<&'a Allocation>,
    pub(super) warnings: Vec<String>,
}

/// Admits `allocation` at the level that is wanted, as far as it is left open at the one that costs least.
///
/// # Errors
/// The refusal of the best that it could have, with what could be had instead.
pub(super) fn choose<'a>(
    asker: &Asker<'a>,
    allocation: Allocation,
    wanted: &Wanted,
) -> Result<Chosen<'a>, Refusal> {
    let mut candidate = allocation;
    let refusal = match first_admitted(asker, &mut candidate, wanted, &[]) {
        Ok(warnings) => return Ok(Chosen { allocation: candidate, preempted: Vec::new(), warnings }),
        Err(refusal) if refusal.code == RefusalCode::InsufficientCapacity => refusal,
        Err(refusal) => return Err(refusal),
    };
    if asker.state.network.preempt == Preempt::LowerPriority
        && let Some((preempted, warnings)) = preempt(asker, &mut candidate, wanted)
    {
        return Ok(Chosen { allocation: candidate, preempted, warnings });
    }
    Err(Refusal { counter_offer: offer(asker, candidate, wanted).map(Box::new), ..refusal })
}

/// Tries the levels that the request leaves open, without the allocations in `without`. The allocation has the
/// first that is admitted.
fn first_admitted(
    asker: &Asker<'_>,
    allocation: &mut Allocation,
    wanted: &Wanted,
    without: &[&Allocation],
) -> Result<Vec<String>, Refusal> {
    let mut last = None;
    for level in candidates(asker, wanted, without) {
        allocation.level = level;
        match asker.admit(allocation, without) {
            Ok(warnings) => return Ok(warnings),
            Err(refusal) => last = Some(refusal),
        }
    }
    Err(last.unwrap_or_else(|| Refusal::invalid("level", "nothing", "is asked for")))
}

/// Levels that would do, the least costly to others first.
fn candidates(asker: &Asker<'_>, wanted: &Wanted, without: &[&Allocation]) -> Vec<Level> {
    let mut level = wanted.level.clone();
    for (direction, least) in given(&wanted.least) {
        let most = level.guaranteed.get(direction).unwrap_or(least);
        *level.guaranteed.get_mut(direction) = Some(most.min(fits(asker, direction, without)).max(least));
    }
    let seeks = level.delay_us.is_some() || level.jitter_us.is_some();
    let priorities: Vec<u8> = match wanted.is_priority_open && seeks {
        true => (asker.best_priority()..=LAST_PRIORITY).rev().collect(),
        false => vec![level.priority],
    };
    let parts = if seeks { &BURST_PARTS[..] } else { &BURST_PARTS[..1] };
    let mut levels: Vec<Level> = Vec::new();
    for priority in priorities {
        for part in parts {
            let tried = with_bursts(asker, Level { priority, ..level.clone() }, wanted, *part);
            if levels.last() != Some(&tried) {
                levels.push(tried);
            }
        }
    }
    levels
}

/// The level with that part of the usual burst where none is named.
fn with_bursts(asker: &Asker<'_>, mut level: Level, wanted: &Wanted, part: u64) -> Level {
    let mtu = asker.state.network.mtu;
    for direction in Direction::BOTH {
        let rate = level.guaranteed.get(direction).or(*level.maximum.get(direction));
        if let Some(rate) = rate.filter(|_| *wanted.is_burst_open.get(direction)) {
            let burst = default_burst(rate, mtu).0 / part;
            *level.burst.get_mut(direction) = Some(ByteCount(burst.max(u64::from(mtu))));
        }
    }
    level
}

/// The most that could be guaranteed in a direction: what is left of the contracts, the line, its segments and
/// the link.
fn fits(asker: &Asker<'_>, direction: Direction, without: &[&Allocation]) -> BitsPerSecond {
    let state = asker.state;
    let contracts = contract::left(state, asker.provider, asker.application, direction, without);
    let line = asker.session.map(|session| state.left_on_line(&session.name, direction, without));
    let segments = asker.session.map(|session| segment::left(state, session, direction, without));
    let link = state.left_on_link(direction, without);
    contracts.into_iter().chain(line).chain(segments.flatten()).fold(link, BitsPerSecond::min)
}

/// Looks for allocations of a later priority, on the same line or, where the request is for none, on none,
/// without which the request is admitted: the latest priority first, and of that the youngest. No more than
/// have to.
fn preempt<'a>(
    asker: &Asker<'a>,
    allocation: &mut Allocation,
    wanted: &Wanted,
) -> Option<(Vec<&'a Allocation>, Vec<String>)> {
    let takes = |other: &&Allocation| {
        other.level.priority > wanted.level.priority
            && Direction::BOTH.into_iter().any(|direction| other.has_class(direction))
    };
    let mut pool: Vec<&Allocation> = match asker.session {
        Some(session) => asker.state.allocations_on(&session.name).filter(takes).collect(),
        None => {
            asker.state.allocations.values().filter(|other| other.session.is_none()).filter(takes).collect()
        }
    };
    pool.sort_by_key(|other| (other.level.priority, other.granted_at, other.id));
    let mut gone: Vec<&Allocation> = Vec::new();
    loop {
        gone.push(pool.pop()?);
        if first_admitted(asker, allocation, wanted, &gone).is_ok() {
            break;
        }
    }
    // The best of those that would go stays, if it can.
    for place in (0..gone.len()).rev() {
        let mut fewer = gone.clone();
        fewer.remove(place);
        if !fewer.is_empty() && first_admitted(asker, allocation, wanted, &fewer).is_ok() {
            gone = fewer;
        }
    }
    let warnings = first_admitted(asker, allocation, wanted, &gone).ok()?;
    Some((gone, warnings))
}

/// The best that could be had instead; none: nothing of the kind.
fn offer(asker: &Asker<'_>, mut allocation: Allocation, wanted: &Wanted) -> Option<LevelRequest> {
    let asked = &wanted.level;
    let mut level = Level { delay_us: None, jitter_us: None, hard: false, ..asked.clone() };
    for direction in Direction::BOTH {
        let guaranteed = level.guaranteed.get(direction).or(*wanted.least.get(direction));
        let Some(rate) = guaranteed else { continue };
        let most = rate.min(fits(asker, direction, &[]));
        if most.0 < MIN_RATE {
            return None;
        }
        *level.guaranteed.get_mut(direction) = Some(most);
    }
    if let (Some(loss), Some(session)) = (level.loss, asker.session) {
        level.loss = Some(loss.max(f64::from(session.loss_ppm) / 1e6));
    }
    let seeks = asked.delay_us.is_some() || asked.jitter_us.is_some();
    if wanted.is_priority_open && seeks {
        level.priority = asker.best_priority();
    }
    let part = BURST_PARTS[if seeks { BURST_PARTS.len() - 1 } else { 0 }];
    allocation.level = with_bursts(asker, level, wanted, part);
    asker.admit(&mut allocation, &[]).ok()?;
    let bound = allocation.delay_bound.up.or(allocation.delay_bound.down);
    let level = &mut allocation.level;
    level.delay_us = asked.delay_us.zip(bound).map(|(asked, bound)| asked.max(bound.whole_us));
    level.jitter_us = asked.jitter_us.zip(bound).map(|(asked, bound)| asked.max(bound.jitter_us()));
    let is_as_asked = *level == Level { hard: level.hard, ..asked.clone() } && !asked.hard;
    (!is_as_asked).then(|| LevelRequest::of(level))
}
