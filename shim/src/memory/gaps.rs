//! The free bytes of a slab.

use std::collections::{BTreeMap, BTreeSet};

/// The gaps, by offset and by length.
#[derive(Debug)]
pub struct Gaps {
    whole: u64,
    /// Offset and length of each.
    gaps: BTreeMap<u64, u64>,
    /// Length and offset of each.
    lengths: BTreeSet<(u64, u64)>,
}

impl Gaps {
    pub(super) fn new(whole: u64) -> Self {
        Self { whole, gaps: BTreeMap::from([(0, whole)]), lengths: BTreeSet::from([(whole, 0)]) }
    }

    fn insert(&mut self, offset: u64, length: u64) {
        self.gaps.insert(offset, length);
        self.lengths.insert((length, offset));
    }

    fn remove(&mut self, offset: u64) -> Option<u64> {
        let length = self.gaps.remove(&offset)?;
        self.lengths.remove(&(length, offset));
        Some(length)
    }

    /// The length of the largest gap.
    pub(super) fn largest(&self) -> u64 {
        self.lengths.last().map_or(0, |(length, _)| *length)
    }

    /// Takes `size` bytes from the smallest gap that fits; returns their offset.
    pub(super) fn take(&mut self, size: u64) -> Option<u64> {
        let (length, offset) = *self.lengths.range((size, 0)..).next()?;
        self.remove(offset);
        if length > size {
            self.insert(offset + size, length - size);
        }
        Some(offset)
    }

    pub(super) fn give(&mut self, mut offset: u64, mut size: u64) {
        if let Some((before, length)) = self.gaps.range(..offset).next_back().map(|(o, l)| (*o, *l))
            && before + length == offset
        {
            self.remove(before);
            (offset, size) = (before, size + length);
        }
        if let Some(length) = self.remove(offset + size) {
            size += length;
        }
        self.insert(offset, size);
    }

    pub(super) fn empty(&self) -> bool {
        self.gaps.get(&0) == Some(&self.whole)
    }
}
