//! Free room in a slab.

use std::collections::BTreeMap;

/// Offset and length of each gap, by offset.
#[derive(Debug)]
pub struct Gaps {
    whole: u64,
    gaps: BTreeMap<u64, u64>,
}

impl Gaps {
    pub(super) fn new(whole: u64) -> Self {
        Self { whole, gaps: BTreeMap::from([(0, whole)]) }
    }

    pub(super) fn take(&mut self, size: u64) -> Option<u64> {
        let (offset, length) = self.gaps.iter().map(|(o, l)| (*o, *l)).find(|(_, length)| *length >= size)?;
        self.gaps.remove(&offset);
        if length > size {
            self.gaps.insert(offset + size, length - size);
        }
        Some(offset)
    }

    pub(super) fn give(&mut self, mut offset: u64, mut size: u64) {
        if let Some((before, length)) = self.gaps.range(..offset).next_back().map(|(o, l)| (*o, *l))
            && before + length == offset
        {
            self.gaps.remove(&before);
            (offset, size) = (before, size + length);
        }
        if let Some(length) = self.gaps.remove(&(offset + size)) {
            size += length;
        }
        self.gaps.insert(offset, size);
    }

    pub(super) fn empty(&self) -> bool {
        self.gaps.get(&0) == Some(&self.whole)
    }
}
