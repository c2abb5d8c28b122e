//! The slots of a page: how many there are, the index of one, a set of them, and who owns one.
//!
//! These are plain values. The other modules of the protocol name slots by them; this module imports none of the others.

use std::fmt;

/// How many clients one GPU can have at a time. The lock word has a bit for each.
pub const SLOTS: usize = if cfg!(loom) { 3 } else { 48 };

/// The bits of a [`SlotSet`] that stand for a slot.
const IN_USE: u64 = if SLOTS == 64 { u64::MAX } else { (1 << SLOTS) - 1 };

/// A client's place in the page: an index below [`SLOTS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotIndex(u8);

impl SlotIndex {
    /// The slot with this index, if there is one.
    pub fn new(index: usize) -> Option<Self> {
        (index < SLOTS).then_some(Self(index as u8))
    }

    /// The index.
    pub fn get(self) -> usize {
        usize::from(self.0)
    }
}

/// A set of slots.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct SlotSet(u64);

impl SlotSet {
    /// No slot.
    pub const EMPTY: Self = Self(0);

    /// The slots whose bits are set; bits of no slot are dropped.
    pub fn from_bits(bits: u64) -> Self {
        Self(bits & IN_USE)
    }

    /// A bit per slot.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Whether the slot is in it.
    pub fn contains(self, slot: SlotIndex) -> bool {
        self.0 >> slot.get() & 1 == 1
    }

    /// The set with the slot in it.
    #[must_use]
    pub fn with(self, slot: SlotIndex) -> Self {
        Self(self.0 | 1 << slot.get())
    }

    /// The set without the slot.
    #[must_use]
    pub fn without(self, slot: SlotIndex) -> Self {
        Self(self.0 & !(1 << slot.get()))
    }

    /// The slots that are in exactly one of the two sets: the symmetric difference.
    #[must_use]
    pub fn difference(self, other: Self) -> Self {
        Self(self.0 ^ other.0)
    }

    /// Whether it holds no slot.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// How many slots it holds.
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// The slots, by index.
    pub fn iter(self) -> impl Iterator<Item = SlotIndex> {
        let mut bits = self.0;
        std::iter::from_fn(move || {
            let slot = SlotIndex::new(bits.trailing_zeros() as usize)?;
            bits &= bits - 1;
            Some(slot)
        })
    }
}

/// As [`SlotSet::from_bits`].
impl From<u64> for SlotSet {
    fn from(bits: u64) -> Self {
        Self::from_bits(bits)
    }
}

impl From<SlotSet> for u64 {
    fn from(set: SlotSet) -> Self {
        set.bits()
    }
}

impl FromIterator<SlotIndex> for SlotSet {
    fn from_iter<I: IntoIterator<Item = SlotIndex>>(slots: I) -> Self {
        slots.into_iter().fold(Self::EMPTY, Self::with)
    }
}

impl fmt::Debug for SlotSet {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_set().entries(self.iter().map(SlotIndex::get)).finish()
    }
}

/// Who owns a slot. One word in the page, `generation:32 | pid:32`, so that a slot changes hands in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// How many owners the slot has had, this one included.
    pub generation: u32,
    /// The process, as the arbiter sees it; 0 for nobody.
    pub pid: u32,
}

impl From<u64> for Owner {
    fn from(word: u64) -> Self {
        Self { generation: (word >> 32) as u32, pid: word as u32 }
    }
}

impl From<Owner> for u64 {
    fn from(owner: Owner) -> Self {
        u64::from(owner.generation) << 32 | u64::from(owner.pid)
    }
}

/// A process. The two values identify it for ever, because the kernel does not reuse a pid with the same start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Process {
    /// The pid, as the arbiter sees it.
    pub pid: u32,
    /// When it started, in clock ticks since boot (field 22 of /proc/PID/stat).
    pub started: u64,
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_set_lists_what_was_put_in() {
        let slots: Vec<_> = [0, 5, 47].into_iter().map(|index| SlotIndex::new(index).unwrap()).collect();
        let set: SlotSet = slots.iter().copied().collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), slots);
        assert_eq!(set.len(), 3);
        assert!(!set.without(slots[1]).contains(slots[1]));
    }

    #[test]
    fn bits_of_no_slot_are_dropped_and_an_owner_round_trips() {
        assert_eq!(SlotSet::from_bits(u64::MAX).len(), SLOTS);
        assert_eq!(SlotIndex::new(SLOTS), None);
        let owner = Owner { generation: 3, pid: 77 };
        assert_eq!(Owner::from(u64::from(owner)), owner);
    }
}
