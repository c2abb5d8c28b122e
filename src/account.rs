//! A slot's account and the pool's counter: the two words between which granules move.
//!
//! A move touches both words, and its owner can be killed between the two writes. Each move goes through three states, so
//! that the arbiter knows of a dead client's move whether it happened:
//!
//! 1. **Announced**: the owner writes kind, size and a sequence number into its account.
//! 2. **Counted**: the pool's counter changes by one compare-and-swap, which also leaves a tag there,
//!    the slot and the sequence number. The participant that wants to change the counter next first *helps*: it
//!    marks the tagged account as **Applied**. Only then may it overwrite the tag.
//! 3. **Closed**: the owner writes its new balance, with no operation in flight.
//!
//! A move that stands as Announced was counted if and only if the tag names it; a move that stands as
//! Applied was counted. So the books of a killed client are settled exactly ([`crate::audit`]).
//!
//! The sequence number has 21 bits. A helper that is stopped between its look at the tag and its compare-and-swap would
//! mark the wrong move only if it slept through exactly 2^21 moves of that one slot and woke during the next.

use crate::slot::{SLOTS, SlotIndex};
use crate::units::{Granules, MAX_GRANULES};

const COUNT_BITS: u32 = 20;
const SEQUENCE_BITS: u32 = 21;
const SEQUENCE_MASK: u32 = (1 << SEQUENCE_BITS) - 1;
const _: () = assert!(MAX_GRANULES == (1 << COUNT_BITS) - 1);

/// Which way granules move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// From the pool to the client.
    Take,
    /// From the client to the pool.
    Give,
}

/// How far a move has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Its owner has written what it is about to do.
    Announced,
    /// The pool's counter has changed, and a helper has marked that.
    Applied,
}

/// A move of granules between a client and the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    /// Which way.
    pub kind: Kind,
    /// Its size, in granules.
    pub amount: Granules,
    /// How far it has come.
    pub progress: Progress,
}

/// A slot's account: what its client holds, and the move in flight. One word in the page:
/// `state:3 | sequence:21 | amount:20 | resident:20`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Account {
    /// Granules that the client holds on the GPU, without the move in flight.
    pub resident: Granules,
    /// Number of the last move, modulo 2^21.
    pub sequence: u32,
    /// The move in flight, if any.
    pub operation: Option<Operation>,
}

impl From<u64> for Account {
    /// Any 64 bits are some account: garbage gives wrong numbers, never an invalid value.
    fn from(word: u64) -> Self {
        let amount = (word >> COUNT_BITS) as Granules & MAX_GRANULES;
        let state = (word >> (2 * COUNT_BITS + SEQUENCE_BITS)) & 7;
        let kind = if state & 1 == 0 { Kind::Take } else { Kind::Give };
        let operation = match state >> 1 {
            1 => Some(Operation { kind, amount, progress: Progress::Announced }),
            2 => Some(Operation { kind, amount, progress: Progress::Applied }),
            _ => None,
        };
        Self {
            resident: word as Granules & MAX_GRANULES,
            sequence: (word >> (2 * COUNT_BITS)) as u32 & SEQUENCE_MASK,
            operation,
        }
    }
}

impl From<Account> for u64 {
    fn from(account: Account) -> Self {
        let (amount, state) = account.operation.map_or((0, 0), |operation| {
            let progress = match operation.progress {
                Progress::Announced => 1,
                Progress::Applied => 2,
            };
            (operation.amount, progress << 1 | u64::from(operation.kind == Kind::Give))
        });
        u64::from(account.resident & MAX_GRANULES)
            | u64::from(amount & MAX_GRANULES) << COUNT_BITS
            | u64::from(account.sequence & SEQUENCE_MASK) << (2 * COUNT_BITS)
            | state << (2 * COUNT_BITS + SEQUENCE_BITS)
    }
}

impl Account {
    /// The account after its move was counted and closed.
    pub fn closed(self) -> Self {
        let resident = match self.operation {
            Some(Operation { kind: Kind::Take, amount, .. }) => {
                self.resident.saturating_add(amount).min(MAX_GRANULES)
            }
            Some(Operation { kind: Kind::Give, amount, .. }) => self.resident.saturating_sub(amount),
            None => self.resident,
        };
        Self { resident, operation: None, ..self }
    }

    /// The account after its move was called off, uncounted.
    pub fn cancelled(self) -> Self {
        Self { operation: None, ..self }
    }

    /// The account with the next move in flight.
    pub(crate) fn announced(self, kind: Kind, amount: Granules) -> Self {
        let sequence = (self.sequence + 1) & SEQUENCE_MASK;
        let operation = Some(Operation { kind, amount, progress: Progress::Announced });
        Self { sequence, operation, ..self }
    }
}

/// Which move changed the pool's counter last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag {
    /// The slot whose move it was.
    pub slot: SlotIndex,
    /// That slot's sequence number.
    pub sequence: u32,
}

/// The pool's counter: free granules, and the tag of the last change. One word in the page:
/// `(unused):3 | sequence:21 | slot:8 | granules:32`. Its low half is a futex.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Free {
    /// Free granules. A negative number is a debt: contexts grew ([`crate::audit`]) while clients held everything. What
    /// clients give back pays the debt first; until it is paid, nobody can take.
    pub granules: i32,
    /// Whose move was counted last, if it was a client's.
    pub tag: Option<Tag>,
}

/// In the tag's slot field: no slot. The arbiter changed the counter.
const NO_SLOT: u64 = 0xff;

impl From<u64> for Free {
    /// Any 64 bits are some counter: a tag that names no slot is read as none.
    fn from(word: u64) -> Self {
        let tag = SlotIndex::new((word >> 32 & 0xff) as usize)
            .map(|slot| Tag { slot, sequence: (word >> 40) as u32 & SEQUENCE_MASK });
        Self { granules: word as u32 as i32, tag }
    }
}

impl From<Free> for u64 {
    fn from(free: Free) -> Self {
        let (slot, sequence) =
            free.tag.map_or((NO_SLOT, 0), |tag| (tag.slot.get() as u64, u64::from(tag.sequence)));
        u64::from(free.granules as u32) | slot << 32 | sequence << 40
    }
}

const _: () = assert!(SLOTS < NO_SLOT as usize);

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slot(index: usize) -> SlotIndex {
        SlotIndex::new(index).unwrap()
    }

    proptest! {
        #[test]
        fn words_round_trip(resident in 0..=MAX_GRANULES, amount in 0..=MAX_GRANULES, sequence in 0..=SEQUENCE_MASK,
                            kind in prop_oneof![Just(Kind::Take), Just(Kind::Give)],
                            progress in prop_oneof![Just(Progress::Announced), Just(Progress::Applied)],
                            granules: i32, index in 0..SLOTS) {
            let operation = Some(Operation { kind, amount, progress });
            for account in [Account { resident, sequence, operation }, Account { resident, sequence, operation: None }] {
                prop_assert_eq!(Account::from(u64::from(account)), account);
            }
            for tag in [None, Some(Tag { slot: slot(index), sequence })] {
                let free = Free { granules, tag };
                prop_assert_eq!(Free::from(u64::from(free)), free);
            }
        }

        #[test]
        fn any_word_is_an_account(word: u64) {
            let account = Account::from(word);
            prop_assert!(account.closed().resident <= MAX_GRANULES);
            let _ = Free::from(word);
        }
    }
}
