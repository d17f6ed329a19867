//! Slots: indices in the kernel's maps, given out longest free first.
//!
//! A packet in flight carries its allocation's slot in `skb->mark`, and a class number follows from
//! a slot, so a slot that was just freed must not name something else at once. Slots that were
//! never used go first, in ascending order; then those that were freed, in the order in which they
//! were. The store keeps the freed ones in that order, so a restart changes nothing.

use std::collections::{BTreeMap, BTreeSet};

use qos_common::abi::{ALLOCATION_SLOTS, APPLICATION_SLOTS, PROVIDER_SLOTS};

/// Lines that have a place among the class numbers.
pub const LINE_SLOTS: u32 = 8_001;

/// What a slot is for. Slots of different kinds have nothing to do with each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SlotKind {
    /// Providers, 1 to 1,023.
    Provider,
    /// Applications, 1 to 4,095.
    Application,
    /// Sessions, 1 to 8,000.
    Session,
    /// Allocations, 1 to 16,383.
    Allocation,
}

impl SlotKind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Provider, Self::Application, Self::Session, Self::Allocation];

    /// Its name, in the singular.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Provider => "provider",
            Self::Application => "application",
            Self::Session => "session",
            Self::Allocation => "allocation",
        }
    }

    /// The highest slot.
    #[must_use]
    pub const fn last(self) -> u16 {
        let slots = match self {
            Self::Provider => PROVIDER_SLOTS,
            Self::Application => APPLICATION_SLOTS,
            Self::Session => LINE_SLOTS,
            Self::Allocation => ALLOCATION_SLOTS,
        };
        (slots - 1) as u16
    }
}

/// The free slots of one kind.
#[derive(Clone, Debug)]
pub(super) struct FreeSlots {
    /// By when they were freed (0: never used) and number.
    queue: BTreeSet<(u64, u16)>,
    /// When those that were used were freed.
    freed: BTreeMap<u16, u64>,
    /// Counts releases.
    releases: u64,
}

/// Two are equal that give out the same slots in the same order.
impl PartialEq for FreeSlots {
    fn eq(&self, other: &Self) -> bool {
        self.queue.iter().map(|(_, slot)| slot).eq(other.queue.iter().map(|(_, slot)| slot))
    }
}

impl FreeSlots {
    pub(super) fn new(kind: SlotKind) -> Self {
        Self { queue: (1..=kind.last()).map(|slot| (0, slot)).collect(), freed: BTreeMap::new(), releases: 0 }
    }

    /// The slot that has been free for the longest; none: all are in use.
    pub(super) fn first(&self) -> Option<u16> {
        self.queue.first().map(|(_, slot)| *slot)
    }

    /// Takes a slot out; one that is not free stays as it is.
    pub(super) fn take(&mut self, slot: u16) {
        let freed = self.freed.remove(&slot).unwrap_or(0);
        self.queue.remove(&(freed, slot));
    }

    /// Puts a slot behind all others.
    pub(super) fn release(&mut self, slot: u16) {
        self.take(slot);
        self.releases += 1;
        self.freed.insert(slot, self.releases);
        self.queue.insert((self.releases, slot));
    }

    #[cfg(test)]
    pub(super) fn numbers(&self) -> BTreeSet<u16> {
        self.queue.iter().map(|(_, slot)| *slot).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_free_slot_goes_first() {
        let mut free = FreeSlots::new(SlotKind::Provider);
        for expected in 1..=1_023 {
            assert_eq!(free.first(), Some(expected));
            free.take(expected);
            if expected == 5 {
                free.release(2);
                free.release(1);
            }
        }
        assert_eq!(free.first(), Some(2));
        free.take(2);
        free.release(2);
        assert_eq!(free.first(), Some(1));
        free.take(1);
        free.take(2);
        assert_eq!(free.first(), None);
        free.release(700);
        assert_eq!(free.first(), Some(700));
    }
}
