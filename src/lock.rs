//! The lock word: which clients may load and run, and how a decision is published.
//!
//! [`LockWord`](crate::lock_word::LockWord) is the word taken apart. A decision is four steps, and anybody may take them:
//!
//! 1. read the word;
//! 2. look at the slots;
//! 3. ask the policy, which is a pure function of them ([`Order::admit`]);
//! 4. swap the word for the new mask with the next version, unless the word has changed meanwhile.
//!
//! A swap that fails means that another participant has decided: start over. **Every decision is published, also one that
//! changes nothing**: its new version makes the swap fail of every decision that looked at the slots earlier. So decisions have
//! one order, and each looked at the slots after the one before it was published. A client that changes its slot and then
//! decides is therefore seen by its own decision and by all later ones. So no wake-up is lost, and there is no lock that a
//! stopped process could hold.
//!
//! The version wraps after 65,536 decisions. A decider that sleeps through exactly that many publishes a decision on old
//! facts. The client that this decision wrongs decides again, and so corrects it.

use crate::page::Page;
use crate::policy::{self, Order, Standing};
use crate::slot::SlotSet;
use crate::snapshot::Snapshot;
use crate::sync::Ordering;

/// Swaps that a decision loses before it writes the word without one. Deciders that keep the protocol come nowhere near:
/// each lost swap is a whole decision of another participant. Only a process that writes garbage into the word all the time
/// causes so many, and it must not keep everybody else in a loop.
const MOST_LOST: u32 = if cfg!(loom) { u32::MAX } else { 1_000 };

impl Page {
    /// The clients that may load and run.
    pub fn admitted(&self) -> SlotSet {
        self.header.lock.load(Ordering::Acquire).admitted
    }

    /// Decides who may load and run, publishes the decision, and rings the clients that have something to do about it:
    /// those whose bit changed; those that must make room; the admitted ones if somebody waits, because their slices can
    /// end now; and whoever can bring some memory in ahead of its turn.
    ///
    /// Call it after every change that a decision looks at: a new waiter, a release, a change of demand, the end of a
    /// slice, a death, a change of settings. Returns the snapshot on which it decided, with the new mask in it.
    pub fn decide(&self) -> Snapshot {
        let mut lost = 0;
        loop {
            let seen = self.header.lock.observe(Ordering::Acquire);
            let lock = seen.value;
            let mut snapshot = Snapshot::take(self, lock.admitted);
            let standing = Standing::of(&snapshot);
            let next = lock.decided(Order::new(&snapshot, &standing).admit());
            let published =
                self.header.lock.compare_exchange(&seen, next, Ordering::AcqRel, Ordering::Acquire);
            if published.is_err() {
                lost += 1;
                if lost < MOST_LOST {
                    continue;
                }
                self.header.lock.store(next, Ordering::Release);
            }
            snapshot.admitted = next.admitted;
            for slot in concerned(lock.admitted, &snapshot, &standing).iter() {
                self.ring(slot);
            }
            return snapshot;
        }
    }
}

/// The clients that a decision rings. `before` were admitted by the decision before it. `standing` is how the clients of the
/// snapshot stand, whoever is admitted.
fn concerned(before: SlotSet, snapshot: &Snapshot, standing: &Standing) -> SlotSet {
    let order = Order::new(snapshot, standing);
    let changed = before.difference(snapshot.admitted);
    let spare_holders =
        if policy::spares_are_wanted(snapshot) { policy::spare_holders(snapshot) } else { SlotSet::EMPTY };
    let evicting = order.evictors();
    let mut concerned = changed.bits() | spare_holders.bits() | evicting.bits();
    let first = order.prefetcher();
    if first.is_some() || !evicting.is_empty() {
        // Holders learn that their slice has an end now, or that their memory is wanted if they have no work.
        concerned |= snapshot.admitted.bits();
    }
    let concerned = SlotSet::from_bits(concerned);
    match first {
        Some(first) if order.prefetch(first) > 0 => concerned.with(first),
        _ => concerned,
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

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
                        page.header.lock.atomic().fetch_add(0x1_0000_0000_0001, Ordering::Relaxed);
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
        let version = || page.header.lock.load(Ordering::Relaxed).version;
        let before = version();
        page.decide();
        assert_eq!(version(), before + 1);
    }
}
