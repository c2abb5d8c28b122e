//! The lock word: who may load and run, and how a decision is published.
//!
//! `version:16 | admitted:48`, a bit per slot. A decision is four steps, and anybody may take them:
//!
//! 1. read the word;
//! 2. look at the slots;
//! 3. ask the pure function [`policy::admit`];
//! 4. swap the word for the new mask with the next version, if nobody else did meanwhile.
//!
//! A lost swap means that someone else decided: start over. **Every decision is published, also one
//! that changes nothing**: its new version makes every other decision that looked earlier lose its
//! swap. So decisions stand in one order, each looked at the slots after the one before it was
//! published, and whoever changes its slot and then decides is seen by its own decision and by all
//! later ones. That is why no wake-up is lost, without a lock that a stopped process could hold.
//!
//! The version wraps after 65,536 decisions: a decider would have to sleep through exactly that many
//! to publish a stale look, and what it publishes is corrected by the client that it wrongs, which decides again.

use crate::page::Page;
use crate::policy;
use crate::slot::{SLOTS, SlotSet};
use crate::snapshot::Snapshot;
use crate::sync::Ordering;

/// Swaps that a decision loses before it stops being polite. Honest deciders come nowhere near: each loss is
/// a whole decision of somebody else's. Only who writes garbage into the word all the time does, and it
/// must not keep everybody else in a loop.
const MOST_LOST: u32 = if cfg!(loom) { u32::MAX } else { 1_000 };

/// The bits of the word that hold the mask.
const MASK: u64 = (1 << 48) - 1;
const _: () = assert!(SLOTS <= 48);

/// The lock word, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LockWord {
    /// Counts decisions.
    pub version: u16,
    /// Who may load and run.
    pub admitted: SlotSet,
}

impl From<u64> for LockWord {
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
    fn decided(self, admitted: SlotSet) -> Self {
        Self { version: self.version.wrapping_add(1), admitted }
    }
}

impl Page {
    /// Who may load and run.
    pub fn admitted(&self) -> SlotSet {
        LockWord::from(self.header.lock.load(Ordering::Acquire)).admitted
    }

    /// Decides who may load and run, publishes it, and rings whoever has something to do about it:
    /// those whose bit changed, those who must make room, and those who have just become unable to run
    /// on for ever because somebody waits; and the first waiter, if it can fill some room ahead of its turn.
    ///
    /// Call it after every change that a decision looks at: a new waiter, a release, a change of
    /// demand, the end of a slice, a death, a change of settings. Returns the snapshot it decided on,
    /// with the new mask in it.
    pub fn decide(&self) -> Snapshot {
        let mut lost = 0;
        loop {
            let word = self.header.lock.load(Ordering::Acquire);
            let lock = LockWord::from(word);
            let mut snapshot = Snapshot::take(self, lock.admitted);
            let next = lock.decided(policy::admit(&snapshot));
            let published =
                self.header.lock.compare_exchange(word, next.into(), Ordering::AcqRel, Ordering::Acquire);
            if published.is_err() {
                lost += 1;
                if lost < MOST_LOST {
                    continue;
                }
                self.header.lock.store(next.into(), Ordering::Release);
            }
            snapshot.admitted = next.admitted;
            for slot in self.concerned(lock.admitted, &snapshot).iter() {
                self.ring(slot);
            }
            return snapshot;
        }
    }

    fn concerned(&self, before: SlotSet, snapshot: &Snapshot) -> SlotSet {
        let changed = before.difference(snapshot.admitted);
        let keepers =
            if policy::spares_are_wanted(snapshot) { policy::keepers(snapshot) } else { SlotSet::EMPTY };
        let evicting = policy::evictors(snapshot);
        let mut concerned = changed.bits() | keepers.bits() | evicting.bits();
        let first = policy::first_waiter(snapshot);
        if first.is_some() || !evicting.is_empty() {
            // Holders learn that their slice has an end now, or that their memory is wanted if they have no work.
            concerned |= snapshot.admitted.bits();
        }
        let concerned = SlotSet::from_bits(concerned);
        match first {
            Some(first) if policy::prefetch(snapshot, first) > 0 => concerned.with(first),
            _ => concerned,
        }
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

    /// Somebody writes nothing but lock words, as fast as it can.
    #[test]
    #[cfg_attr(miri, ignore = "a thousand looks at a page take Miri minutes")]
    fn a_word_that_never_stands_still() {
        use std::sync::atomic::AtomicBool;
        let (page, stop) = (Page::for_tests(4), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        page.header.lock.fetch_add(0x1_0000_0000_0001, Ordering::Relaxed);
                    }
                });
            }
            for _ in 0..20 {
                page.decide();
            }
            stop.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn every_decision_has_a_version_of_its_own() {
        let page = Page::for_tests(4);
        let version = || LockWord::from(page.header.lock.load(Ordering::Relaxed)).version;
        let before = version();
        page.decide();
        assert_eq!(version(), before + 1);
    }
}
