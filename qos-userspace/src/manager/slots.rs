//! Slots: indices in the kernel's maps, given out longest free first.
//!
//! A packet in flight carries its allocation's slot in `skb->mark`, and its class number follows from
//! another, so a slot that was just freed must not name something else at once. Slots that were
//! never used go first, in ascending order; then those that were freed, in the order in which they
//! were. The store keeps the freed ones in that order, so a restart changes nothing.

use std::collections::BTreeMap;

use qos_common::abi::{ALLOCATION_SLOTS, APPLICATION_SLOTS, PROVIDER_SLOTS};

/// Lines that have a place among the class numbers.
pub const LINE_SLOTS: u32 = 10_241;
/// Allocations that have one, place zero ("none") among them.
pub const CLASS_SLOTS: u32 = 1 << 14;

/// What a slot is for. Slots of different kinds have nothing to do with each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SlotKind {
    /// Providers, 1 to 1,023.
    Provider,
    /// Applications, 1 to 4,095.
    Application,
    /// Sessions, 1 to 10,240.
    Session,
    /// Allocations, 1 to 65,535.
    Allocation,
    /// Allocations with a class at egress, 1 to 16,383.
    Class,
}

impl SlotKind {
    /// All kinds.
    pub const ALL: [Self; 5] =
        [Self::Provider, Self::Application, Self::Session, Self::Allocation, Self::Class];

    /// Its name, in the singular.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Provider => "provider",
            Self::Application => "application",
            Self::Session => "session",
            Self::Allocation => "allocation",
            Self::Class => "class",
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
            Self::Class => CLASS_SLOTS,
        };
        (slots - 1) as u16
    }
}

/// The free slots of one kind.
#[derive(Clone, Debug)]
pub(super) struct FreeSlots {
    last: u16,
    /// A bit for each slot that is or was in use, slot zero among them.
    touched: Vec<u64>,
    /// Those that were in use and are free, by the count of releases.
    queue: BTreeMap<u64, u16>,
    /// The same, the other way round.
    freed: BTreeMap<u16, u64>,
    releases: u64,
}

/// Two are equal that give out the same slots in the same order.
impl PartialEq for FreeSlots {
    fn eq(&self, other: &Self) -> bool {
        self.last == other.last
            && self.touched == other.touched
            && self.queue.values().eq(other.queue.values())
    }
}

impl FreeSlots {
    pub(super) fn new(kind: SlotKind) -> Self {
        let last = kind.last();
        let mut touched = vec![0; usize::from(last) / 64 + 1];
        touched[0] = 1;
        Self { last, touched, queue: BTreeMap::new(), freed: BTreeMap::new(), releases: 0 }
    }

    /// The slot that has been free for the longest; none: all are in use.
    pub(super) fn first(&self) -> Option<u16> {
        let fresh = (0u16..).zip(&self.touched).find(|(_, word)| **word != u64::MAX);
        fresh
            .map(|(index, word)| index * 64 + word.trailing_ones() as u16)
            .filter(|slot| *slot <= self.last)
            .or_else(|| self.queue.values().next().copied())
    }

    /// Takes a slot out; one that is not free stays as it is.
    pub(super) fn take(&mut self, slot: u16) {
        if let Some(release) = self.freed.remove(&slot) {
            self.queue.remove(&release);
        }
        if let Some(word) = self.touched.get_mut(usize::from(slot / 64)) {
            *word |= 1 << (slot % 64);
        }
    }

    /// Puts a slot behind all others.
    pub(super) fn release(&mut self, slot: u16) {
        self.take(slot);
        self.releases += 1;
        self.freed.insert(slot, self.releases);
        self.queue.insert(self.releases, slot);
    }

    #[cfg(test)]
    pub(super) fn taken(&self) -> std::collections::BTreeSet<u16> {
        (1..=self.last)
            .filter(|slot| self.touched[usize::from(slot / 64)] >> (slot % 64) & 1 == 1)
            .filter(|slot| !self.freed.contains_key(slot))
            .collect()
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
