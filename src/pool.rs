//! The pool: how granules move between it and the clients, by the protocol of [`crate::account`].

use crate::account::{Account, Free, Kind, Operation, Progress, Tag};
use crate::page::Page;
use crate::slot::SlotIndex;
use crate::sync::Ordering;
use crate::units::Granules;

impl Page {
    /// Reads the pool's counter.
    pub fn free(&self) -> Free {
        self.header.free.load(Ordering::Acquire)
    }

    /// Reads a slot's account.
    pub fn account(&self, slot: SlotIndex) -> Account {
        self.slot(slot).account.load(Ordering::Acquire)
    }

    /// Writes a slot's account.
    fn set_account(&self, slot: SlotIndex, account: Account) {
        // A swap and not a store: a helper may swap the same word, and swaps stand in one order.
        self.slot(slot).account.swap(account, Ordering::AcqRel);
    }

    /// Marks the move that `free` is tagged with as Applied, so that the tag may be overwritten.
    fn help(&self, free: Free) {
        let Some(tag) = free.tag else { return };
        let word = &self.slot(tag.slot).account;
        let seen = word.observe(Ordering::Acquire);
        let account = seen.value;
        let Some(operation) = account.operation else { return };
        if account.sequence != tag.sequence || operation.progress != Progress::Announced {
            return;
        }
        let applied =
            Account { operation: Some(Operation { progress: Progress::Applied, ..operation }), ..account };
        // Failure means that the owner has closed the move, or that another helper has marked it. Either way the tag is free.
        let _ = word.compare_exchange(&seen, applied, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Replaces the pool's counter by what `change` makes of it, and leaves `tag` on it.
    ///
    /// # Errors
    /// The counter for which `change` returned `None`. Nothing has changed then.
    fn count(&self, tag: Option<Tag>, change: impl Fn(i32) -> Option<i32>) -> Result<(), Free> {
        self.header.free.fetch_update(Ordering::AcqRel, Ordering::Acquire, |free| {
            let granules = change(free.granules)?;
            self.help(*free);
            Some(Free { granules, tag })
        })
    }

    /// Moves `amount` granules from the pool into `slot`'s account. Only the slot's owner may call it.
    ///
    /// # Errors
    /// The counter, if it held too few. Nothing has changed then.
    pub(crate) fn take(&self, slot: SlotIndex, amount: Granules) -> Result<(), Free> {
        let account = self.account(slot).announced(Kind::Take, amount);
        self.set_account(slot, account);
        let tag = Some(Tag { slot, sequence: account.sequence });
        let enough = |free: i32| free.checked_sub_unsigned(amount).filter(|left| *left >= 0);
        match self.count(tag, enough) {
            Ok(()) => {
                self.set_account(slot, account.closed());
                Ok(())
            }
            Err(free) => {
                self.set_account(slot, account.cancelled());
                Err(free)
            }
        }
    }

    /// Moves `amount` granules from `slot`'s account to the pool, at most what it holds, and wakes those who wait for
    /// granules. Returns how many were moved. Only the slot's owner may call it, or the arbiter for a dead owner.
    pub(crate) fn give(&self, slot: SlotIndex, amount: Granules) -> Granules {
        let account = self.account(slot);
        let amount = amount.min(account.resident);
        if amount == 0 {
            return 0;
        }
        let account = account.announced(Kind::Give, amount);
        self.set_account(slot, account);
        let tag = Some(Tag { slot, sequence: account.sequence });
        // Saturating: a counter of garbage must not overflow. The audit repairs it.
        let _ = self.count(tag, |free| Some(free.saturating_add_unsigned(amount)));
        self.set_account(slot, account.closed());
        crate::sync::futex_wake_low(self.header.free.atomic());
        amount
    }

    /// Adds to the pool's counter, or subtracts, on the arbiter's own behalf.
    pub(crate) fn adjust_free(&self, by: i32) {
        let _ = self.count(None, |free| Some(free.saturating_add(by)));
        if by > 0 {
            crate::sync::futex_wake_low(self.header.free.atomic());
        }
    }

    /// Takes granules as [`Page::take`] does, and stops after so many steps, as a killed client does:
    /// 0 announces nothing, 1 announces, 2 also counts, 3 also closes.
    #[cfg(any(loom, test))]
    pub fn stop_in_take(&self, slot: SlotIndex, amount: Granules, steps: u32) {
        let account = self.account(slot).announced(Kind::Take, amount);
        if steps >= 1 {
            self.set_account(slot, account);
        }
        if steps >= 2 {
            let tag = Some(Tag { slot, sequence: account.sequence });
            let _ = self.count(tag, |free| Some(free.saturating_sub_unsigned(amount)));
        }
        if steps >= 3 {
            self.set_account(slot, account.closed());
        }
    }

    /// Closes the move in flight of a slot whose owner is dead, as counted or as called off.
    pub(crate) fn settle(&self, slot: SlotIndex) -> Account {
        // The tag is read before the account. In the other order, a helper could mark the account and overwrite the tag
        // between the two reads: then the account would say Announced, the tag would name another move, and a move that
        // was counted would be called off.
        let free = self.free();
        let account = self.account(slot);
        let settled = match account.operation {
            None => account,
            Some(Operation { progress: Progress::Applied, .. }) => account.closed(),
            Some(Operation { progress: Progress::Announced, .. }) => {
                if free.tag == Some(Tag { slot, sequence: account.sequence }) {
                    account.closed()
                } else {
                    account.cancelled()
                }
            }
        };
        self.set_account(slot, settled);
        settled
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slot(index: usize) -> SlotIndex {
        SlotIndex::new(index).unwrap()
    }

    proptest! {
        /// A client killed at any point of a move, with or without another client's move after it,
        /// leaves books that settle to exactly what happened.
        #[test]
        fn a_killed_move_settles_exactly(kind in prop_oneof![Just(Kind::Take), Just(Kind::Give)],
                                         amount in 1..50u32, counted: bool, overwritten: bool) {
            let page = Page::for_tests(200);
            let (dead, other) = (slot(0), slot(1));
            page.take(dead, 60).unwrap();
            let account = page.account(dead).announced(kind, amount);
            page.set_account(dead, account);
            if counted {
                let tag = Some(Tag { slot: dead, sequence: account.sequence });
                let by = if kind == Kind::Take { -(amount as i32) } else { amount as i32 };
                page.count(tag, |free| Some(free + by)).unwrap();
            }
            if overwritten {
                page.take(other, 7).unwrap();
            }
            let settled = page.settle(dead);
            page.give(dead, settled.resident);
            prop_assert_eq!(page.free().granules, if overwritten { 193 } else { 200 });
            prop_assert_eq!(page.account(dead).resident, 0);
        }
    }

    #[test]
    fn a_refused_take_changes_nothing() {
        let page = Page::for_tests(10);
        page.take(slot(0), 8).unwrap();
        assert_eq!(page.take(slot(1), 3).unwrap_err().granules, 2);
        assert_eq!((page.free().granules, page.account(slot(1)).resident), (2, 0));
        assert_eq!(page.account(slot(1)).operation, None);
    }

    #[test]
    fn a_debt_is_paid_before_anybody_takes() {
        let page = Page::for_tests(10);
        page.take(slot(0), 10).unwrap();
        page.adjust_free(-4);
        assert_eq!(page.give(slot(0), 3), 3);
        assert_eq!(page.take(slot(1), 1).unwrap_err().granules, -1);
        page.give(slot(0), 3);
        page.take(slot(1), 2).unwrap();
    }
}
