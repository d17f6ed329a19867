//! The part of `skb->mark` that carries a classification from ingress to egress.
//!
//! A configurable run of bits holds, from its lowest bit: two bits of generation (zero is "not
//! classified"), one bit of direction, and the slot of the allocation, or of the line behind all slots of
//! allocations. Bits outside the run belong to the operator's own rules and are never changed.

use crate::abi::{ALLOCATION_SLOTS, LINE_SLOTS};
use crate::classify::Direction;

/// Bits of generation and direction below the slot.
const SLOT_SHIFT: u32 = 3;

/// Fewest bits a layout may have: 131,072 slots.
pub const MIN_BITS: u32 = 20;

const _: () = assert!(ALLOCATION_SLOTS + LINE_SLOTS <= 1 << (MIN_BITS - SLOT_SHIFT));

/// Where in `skb->mark` the classification stands, and which generation of the object wrote it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MarkLayout {
    mask: u32,
    shift: u32,
    generation: u32,
}

const _: () = assert!(size_of::<MarkLayout>() == 12);

/// A classification that an earlier hook wrote into a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marked {
    /// The direction in which the packet was classified.
    pub direction: Direction,
    /// What it belongs to.
    pub owner: Owner,
}

/// What a packet belongs to: an allocation, a line, or nothing that is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner(u32);

impl Owner {
    /// The allocation in `slot`; slot zero: no allocation takes the packet, and its line is not told.
    #[inline(always)]
    #[must_use]
    pub const fn of_allocation(slot: u32) -> Self {
        Self(slot)
    }

    /// No allocation, and the line in `slot`; slot zero: no line is told.
    #[inline(always)]
    #[must_use]
    pub const fn of_line(slot: u32) -> Self {
        Self(if slot == 0 { 0 } else { ALLOCATION_SLOTS + slot })
    }

    /// The allocation's slot; zero: there is none.
    #[inline(always)]
    #[must_use]
    pub const fn allocation(self) -> u32 {
        if self.0 < ALLOCATION_SLOTS { self.0 } else { 0 }
    }

    /// The line's slot; zero: it is not told.
    #[inline(always)]
    #[must_use]
    pub const fn line(self) -> u32 {
        self.0.saturating_sub(ALLOCATION_SLOTS)
    }
}

impl MarkLayout {
    /// Layout in the run of ones of `mask`, for the object's `generation` (counted modulo three).
    ///
    /// None where the ones are not one run of at least [`MIN_BITS`].
    #[must_use]
    pub const fn new(mask: u32, generation: u32) -> Option<Self> {
        let shift = mask.trailing_zeros();
        if mask.count_ones() < MIN_BITS || mask.leading_zeros() + mask.count_ones() + shift != 32 {
            return None;
        }
        Some(Self { mask, shift, generation: generation % 3 + 1 })
    }

    /// Number of slots that the layout can name, slot zero ("no allocation") among them.
    #[must_use]
    pub const fn slots(&self) -> u32 {
        1 << (self.mask.count_ones() - SLOT_SHIFT)
    }

    /// `mark` with the classification written into it.
    #[inline(always)]
    #[must_use]
    pub const fn write(&self, mark: u32, marked: Marked) -> u32 {
        let value = self.generation | (marked.direction as u32) << 2 | marked.owner.0 << SLOT_SHIFT;
        (mark & !self.mask) | ((value << self.shift) & self.mask)
    }

    /// The classification in `mark`, if this generation of the object wrote one.
    #[inline(always)]
    #[must_use]
    pub const fn read(&self, mark: u32) -> Option<Marked> {
        let value = (mark & self.mask) >> self.shift;
        if value & 0b11 != self.generation || self.generation == 0 {
            return None;
        }
        let owner = Owner(value >> SLOT_SHIFT);
        Some(Marked { direction: Direction::from_bit((value >> 2) & 1), owner })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_run_of_enough_bits_is_taken() {
        for (mask, taken) in [
            (0x000f_ffff, true),
            (0xffff_f000, true),
            (u32::MAX, true),
            (0x0007_ffff, false),
            (0xffff_e000, false),
            (0, false),
            (0x7fff_0fff, false),
        ] {
            assert_eq!(MarkLayout::new(mask, 0).is_some(), taken, "{mask:#x}");
        }
    }

    #[test]
    fn a_classification_survives_and_foreign_bits_stay() {
        let layout = MarkLayout::new(0x7fff_f800, 4).expect("20 bits");
        let allocations = [0, 1, ALLOCATION_SLOTS - 1].map(Owner::of_allocation);
        let lines = [1, LINE_SLOTS - 1].map(Owner::of_line);
        for owner in allocations.into_iter().chain(lines) {
            for direction in [Direction::Upstream, Direction::Downstream] {
                let mark = layout.write(0x8000_02bc, Marked { direction, owner });
                assert_eq!(layout.read(mark), Some(Marked { direction, owner }));
                assert_eq!(mark & 0x8000_07ff, 0x8000_02bc);
            }
        }
        for (owner, allocation, line) in [
            (Owner::of_allocation(0), 0, 0),
            (Owner::of_allocation(ALLOCATION_SLOTS - 1), ALLOCATION_SLOTS - 1, 0),
            (Owner::of_line(0), 0, 0),
            (Owner::of_line(1), 0, 1),
            (Owner::of_line(LINE_SLOTS - 1), 0, LINE_SLOTS - 1),
        ] {
            assert_eq!((owner.allocation(), owner.line()), (allocation, line));
        }
    }

    #[test]
    fn another_generation_and_no_classification_are_told_apart() {
        let (one, two) =
            (MarkLayout::new(0x1f_ffff, 1).expect("21"), MarkLayout::new(0x1f_ffff, 2).expect("21"));
        let mark = one.write(0, Marked { direction: Direction::Upstream, owner: Owner::of_allocation(7) });
        assert_eq!(two.read(mark), None);
        assert_eq!(one.read(0), None);
        assert_eq!(one.read(0xffe0_0000), None);
    }

    /// Packets that are on their way while a gateway is upgraded from maps of version 3, or goes back to
    /// them, where 0xffff_e000 was the usual mask.
    #[test]
    fn the_usual_layout_and_the_one_before_it_do_not_read_each_other() {
        let (usual, before) = (MarkLayout::new(0xffff_f000, 0).expect("20 bits"), 13);
        for slot in [0, 1, 2, 3, 16_383] {
            for direction in [Direction::Upstream, Direction::Downstream] {
                let owner = Owner::of_allocation(slot);
                let written = (1 | (direction as u32) << 2 | slot << SLOT_SHIFT) << before;
                assert_eq!(usual.read(written), None);
                assert_ne!(usual.write(0, Marked { direction, owner }) >> before & 0b11, 1);
            }
        }
    }
}
