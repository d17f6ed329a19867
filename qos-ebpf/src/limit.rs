//! Limits: what a packet is charged, and whether it passes.

use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd};

use qos_common::abi::{Allocation, Clocks, Counters, Outcome, POLICE, Provider, SHAPE, directed};
use qos_common::classify::Direction;
use qos_common::clock::{Arrival, Meter, ticks};

use crate::maps::{self, Account};

/// Compare-exchange attempts on a clock before the charge is simply added.
const TRIES: usize = 8;

/// What the limits say of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Judgement {
    /// Within the guaranteed capacity.
    InProfile,
    /// Above it, within the maximum.
    Excess,
    /// Over the allocation's maximum.
    OverMaximum,
    /// Over the provider's aggregate.
    OverAggregate,
    /// A map entry that must exist does not.
    Missing,
}

impl Judgement {
    #[inline(always)]
    pub(crate) fn outcome(self) -> Outcome {
        match self {
            Self::InProfile | Self::Excess => Outcome::Admitted,
            Self::OverMaximum => Outcome::OverMaximum,
            Self::OverAggregate => Outcome::OverAggregate,
            Self::Missing => Outcome::MissingEntry,
        }
    }
}

/// Judges `bytes` of an account at `now_ns`. With `CHARGE`, moves the clocks and counts; without,
/// only says what would be.
#[inline(always)]
pub(crate) fn judge<const CHARGE: bool>(
    Account { allocation, clocks, counters }: Account,
    direction: Direction,
    now_ns: u64,
    bytes: u32,
) -> Judgement {
    let provider_slot = u32::from(allocation.provider);
    let provider_record = directed(provider_slot, direction);
    let (Some(provider), Some(provider_clocks), Some(provider_counters)) = (
        maps::provider(provider_slot),
        maps::provider_clocks(provider_record),
        maps::provider_counters(provider_record),
    ) else {
        return Judgement::Missing;
    };
    let judgement =
        clocks_say::<CHARGE>(allocation, clocks, provider, provider_clocks, direction, ticks(now_ns), bytes);
    if CHARGE {
        count(counters, judgement, bytes);
        count(provider_counters, judgement, bytes);
    }
    judgement
}

#[inline(always)]
fn clocks_say<const CHARGE: bool>(
    allocation: &Allocation,
    clocks: *mut Clocks,
    provider: &Provider,
    provider_clocks: *mut Clocks,
    direction: Direction,
    now: u64,
    bytes: u32,
) -> Judgement {
    let bytes = u64::from(bytes);
    let aggregate = &provider.aggregate[direction as usize];
    // SAFETY: the maps returned pointers to live elements; all access is atomic.
    let (guaranteed, maximum, total) = unsafe {
        (&raw mut (*clocks).guaranteed, &raw mut (*clocks).maximum, &raw mut (*provider_clocks).maximum)
    };
    if allocation.guaranteed.is_set() && conforms::<CHARGE>(&allocation.guaranteed, guaranteed, now, bytes) {
        if CHARGE {
            charge(&allocation.maximum, maximum, now, bytes);
            charge(aggregate, total, now, bytes);
        }
        return Judgement::InProfile;
    }
    let limited = allocation.flags & (POLICE | SHAPE) != 0 && allocation.maximum.is_set();
    if limited && !conforms::<CHARGE>(&allocation.maximum, maximum, now, bytes) {
        return Judgement::OverMaximum;
    }
    if aggregate.is_set() && !conforms::<CHARGE>(aggregate, total, now, bytes) {
        if CHARGE && limited {
            // What the aggregate drops is not charged to the allocation either.
            add(maximum, allocation.maximum.cost(bytes).wrapping_neg());
        }
        return Judgement::OverAggregate;
    }
    Judgement::Excess
}

/// Tells whether a packet conforms and, with `CHARGE`, moves the clock if it does.
#[inline(always)]
fn conforms<const CHARGE: bool>(meter: &Meter, clock: *mut u64, now: u64, bytes: u64) -> bool {
    for _ in 0..TRIES {
        let before = load(clock);
        match meter.arrive(before, now, bytes) {
            Arrival::Over => return false,
            Arrival::Conforms { clock: after } => {
                if !CHARGE || exchange(clock, before, after) {
                    return true;
                }
            }
        }
    }
    // Other CPUs moved the clock each time: it is busy, so not idle, and adding the cost keeps it
    // exact in the long run.
    add(clock, meter.cost(bytes));
    true
}

/// Moves a clock whatever it says.
#[inline(always)]
fn charge(meter: &Meter, clock: *mut u64, now: u64, bytes: u64) {
    if !meter.is_set() {
        return;
    }
    for _ in 0..TRIES {
        let before = load(clock);
        if exchange(clock, before, meter.charge(before, now, bytes)) {
            return;
        }
    }
    add(clock, meter.cost(bytes));
}

#[inline(always)]
fn load(clock: *mut u64) -> u64 {
    // SAFETY: points to an aligned element of a live map; an aligned 64-bit load is not torn.
    unsafe { clock.read_volatile() }
}

#[inline(always)]
fn exchange(clock: *mut u64, before: u64, after: u64) -> bool {
    // SAFETY: as for `load`.
    let (_, done) = unsafe {
        atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(clock, before, after)
    };
    done
}

/// Moves a clock, or a count beside one, of a live map's element.
#[inline(always)]
pub(crate) fn add(clock: *mut u64, ticks: u64) {
    // SAFETY: as for `load`.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(clock, ticks) };
}

#[inline(always)]
fn count(counters: *mut Counters, judgement: Judgement, bytes: u32) {
    let bytes = u64::from(bytes);
    // SAFETY: points to this CPU's own element of a live map, and bottom halves are off.
    let counters = unsafe { &mut *counters };
    match judgement {
        Judgement::InProfile => {
            counters.in_profile_packets += 1;
            counters.in_profile_bytes += bytes;
        }
        Judgement::Excess => {
            counters.excess_packets += 1;
            counters.excess_bytes += bytes;
        }
        Judgement::OverMaximum | Judgement::OverAggregate => {
            counters.dropped_packets += 1;
            counters.dropped_bytes += bytes;
        }
        Judgement::Missing => {}
    }
}

/// Counts a packet that was re-marked. One look-up after the other: from a loop over both LLVM makes
/// `a | b` of the two pointers, which the verifier refuses.
#[inline(always)]
pub(crate) fn count_marked(allocation: &Allocation, slot: u32, direction: Direction, bytes: u32) {
    if let Some(counters) = maps::counters(directed(slot, direction)) {
        add_marked(counters, bytes);
    }
    if let Some(counters) = maps::provider_counters(directed(u32::from(allocation.provider), direction)) {
        add_marked(counters, bytes);
    }
}

#[inline(always)]
fn add_marked(counters: *mut Counters, bytes: u32) {
    // SAFETY: as in `count`.
    let counters = unsafe { &mut *counters };
    counters.marked_packets += 1;
    counters.marked_bytes += u64::from(bytes);
}
