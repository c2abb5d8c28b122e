//! The lock word taken apart: the number of the last decision, and the clients that may load and run by it.
//!
//! [`crate::lock`] has the protocol by which it changes.

use crate::slot::{SLOTS, SlotSet};

/// The bits of the word that hold the mask; the version has those above.
const MASK: u64 = (1 << 48) - 1;
const _: () = assert!(SLOTS <= 48);

/// The lock word: `version:16 | admitted:48`, a bit for each slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LockWord {
    /// Counts decisions, modulo 2^16.
    pub version: u16,
    /// The clients that may load and run.
    pub admitted: SlotSet,
}

impl From<u64> for LockWord {
    /// Any 64 bits are some lock word: bits of no slot are dropped.
    fn from(word: u64) -> Self {
        Self { version: (word >> 48) as u16, admitted: SlotSet::from_bits(word & MASK) }
    }
}

impl From<LockWord> for u64 {
    fn from(lock: LockWord) -> Self {
        u64::from(lock.version) << 48 | lock.admitted.bits()
    }
}

impl LockWord {
    /// The word of the next decision, which admits these clients.
    pub(crate) fn decided(self, admitted: SlotSet) -> Self {
        Self { version: self.version.wrapping_add(1), admitted }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_word_round_trips_and_garbage_has_no_foreign_bits() {
        for word in [0, 1, u64::MAX, 0x1234_5678_9abc_def0] {
            let lock = LockWord::from(word);
            assert_eq!(LockWord::from(u64::from(lock)), lock);
            assert!(lock.admitted.iter().all(|slot| slot.get() < SLOTS));
        }
    }
}
