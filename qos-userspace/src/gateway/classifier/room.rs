//! Room in an array: runs that are taken, and given back.

use std::collections::{BTreeMap, BTreeSet};

/// There is no room left.
#[derive(Debug)]
pub(super) struct NoRoom;

/// Which runs of an array are free. The smallest that suffices is taken; runs that meet are joined.
#[derive(Debug)]
pub(super) struct Room {
    /// Length of each free run, by its start.
    free: BTreeMap<u32, u32>,
    /// The same runs, by length and start.
    by_length: BTreeSet<(u32, u32)>,
    /// Runs that programs may still read.
    retired: Vec<(u32, u32)>,
}

impl Room {
    /// `length` places, all of them free.
    pub(super) fn new(length: u32) -> Self {
        let mut room = Self { free: BTreeMap::new(), by_length: BTreeSet::new(), retired: Vec::new() };
        room.put(0, length);
        room
    }

    /// Number of places that are free or will be.
    #[cfg(test)]
    pub(super) fn left(&self) -> u32 {
        self.free.values().sum::<u32>() + self.retired.iter().map(|(_, length)| length).sum::<u32>()
    }

    /// Start of a run of `length`, which is taken; none is needed for zero.
    pub(super) fn take(&mut self, length: u32) -> Option<u32> {
        if length == 0 {
            return Some(0);
        }
        let &(found, start) = self.by_length.range((length, 0)..).next()?;
        self.free.remove(&start);
        self.by_length.remove(&(found, start));
        self.put(start + length, found - length);
        Some(start)
    }

    /// The same. What was retired is used again where nothing else is left: `wait` returns once nobody reads
    /// it, or tells that this can't be known.
    pub(super) fn take_or_wait(&mut self, length: u32, wait: impl FnOnce() -> bool) -> Result<u32, NoRoom> {
        if let Some(start) = self.take(length) {
            return Ok(start);
        }
        if self.retired.is_empty() || !wait() {
            return Err(NoRoom);
        }
        self.release_retired();
        self.take(length).ok_or(NoRoom)
    }

    /// Gives a run back that nobody reads.
    pub(super) fn release(&mut self, mut start: u32, mut length: u32) {
        if let Some((&before, &free)) = self.free.range(..start).next_back()
            && before + free == start
        {
            self.forget(before, free);
            start = before;
            length += free;
        }
        if let Some(&free) = self.free.get(&(start + length)) {
            self.forget(start + length, free);
            length += free;
        }
        self.put(start, length);
    }

    /// Gives a run back that is read still: see [`Room::take_or_wait`].
    pub(super) fn retire(&mut self, start: u32, length: u32) {
        if length > 0 {
            self.retired.push((start, length));
        }
    }

    /// What was retired is free: nobody reads it any longer.
    fn release_retired(&mut self) {
        for (start, length) in std::mem::take(&mut self.retired) {
            self.release(start, length);
        }
    }

    fn put(&mut self, start: u32, length: u32) {
        if length > 0 {
            self.free.insert(start, length);
            self.by_length.insert((length, start));
        }
    }

    fn forget(&mut self, start: u32, length: u32) {
        self.free.remove(&start);
        self.by_length.remove(&(length, start));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_never_overlap_and_all_comes_back(
            steps in prop::collection::vec((1u32..40, any::<bool>(), any::<prop::sample::Index>()), 1..200),
        ) {
            let mut room = Room::new(500);
            let mut held: Vec<(u32, u32)> = Vec::new();
            for (length, give, which) in steps {
                if give && !held.is_empty() {
                    let (start, length) = held.swap_remove(which.index(held.len()));
                    room.retire(start, length);
                    if length % 2 == 0 {
                        room.release_retired();
                    }
                } else if let Some(start) = room.take(length) {
                    prop_assert!(start + length <= 500);
                    prop_assert!(held.iter().all(|&(s, l)| start + length <= s || s + l <= start));
                    held.push((start, length));
                }
                prop_assert_eq!(room.left(), 500 - held.iter().map(|(_, length)| length).sum::<u32>());
            }
            for (start, length) in held {
                room.release(start, length);
            }
            room.release_retired();
            prop_assert_eq!(room.take(500), Some(0));
        }
    }
}
