//! How long a drain stands still before it lets the process's threads go on.
//!
//! Work that waits for a thread at the shut gate never ends, and from outside it looks like work that takes long. So the gate
//! opens again after a while without progress, and is not shut again before the work that stood still has ended: until then
//! nothing can be drained in any case. How long that took tells the two apart. What ends at once when threads go on was
//! waiting for them, and a longer stand would have been no use; what goes on for seconds takes long by itself, and next
//! time deserves twice that. Submissions meanwhile are few, by flow control.
//!
//! A process that never is where it could be drained, such as one that launches with a lock held that its host functions
//! take, loses a stand for each try. So tries that end at once become rare.

use crate::units::{MILLISECOND, Nanos, SECOND};

/// A drain stands still for so long at least. Drains are shorter, in a process whose work in flight is held to the drain
/// target.
const SHORTEST: Nanos = 100 * MILLISECOND;

/// And at most so long.
const LONGEST: Nanos = 60 * SECOND;

/// So many tries follow one another at once.
const QUICK_TRIES: u32 = 8;

/// The next ones follow after a time that doubles from this one,
const FIRST_REST: Nanos = 8 * MILLISECOND;
/// as often as this: a second.
const RESTS: u32 = 7;

/// What is known of one drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrainBackoff {
    /// What a drain may take by all that was known when it began.
    least: Nanos,
    /// Stands still at most so long.
    stand: Nanos,
    tries: u32,
}

impl DrainBackoff {
    /// Of a drain that should take `target` at most, and takes `foreseen` by what the process's work took before, ns.
    pub fn new(target: Nanos, foreseen: Nanos) -> Self {
        let mut patience = Self { least: 0, stand: 0, tries: 0 };
        patience.foresee(target, foreseen);
        patience
    }

    /// A new try: what is in flight is foreseen to take so long.
    pub fn foresee(&mut self, target: Nanos, foreseen: Nanos) {
        self.least = SHORTEST.max(target.saturating_mul(2)).saturating_add(foreseen.saturating_mul(2));
        self.least = self.least.min(LONGEST);
        self.stand = self.stand.max(self.least);
    }

    /// How long the gate stays shut while threads stand before it and nothing is seen to end, ns.
    pub fn stand(&self) -> Nanos {
        self.stand
    }

    /// Threads go on. How long they do at least, ns.
    pub fn pause(&mut self) -> Nanos {
        self.tries = self.tries.saturating_add(1);
        match self.tries.checked_sub(QUICK_TRIES) {
            None | Some(0) => 0,
            Some(more) => FIRST_REST << (more - 1).min(RESTS),
        }
    }

    /// What stood still has ended, so long after threads went on, ns.
    pub fn ended(&mut self, took: Nanos) {
        self.stand = took.saturating_mul(2).clamp(self.least, LONGEST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: Nanos = 50 * MILLISECOND;

    #[test]
    fn work_that_waits_for_threads_is_tried_again_soon_and_then_less_often() {
        let mut patience = DrainBackoff::new(TARGET, 0);
        for _ in 0..QUICK_TRIES {
            assert_eq!((patience.stand(), patience.pause()), (SHORTEST, 0));
            patience.ended(MILLISECOND);
        }
        let rests: Vec<_> = (0..20).map(|_| patience.pause()).collect();
        assert!(rests.is_sorted() && rests[0] == FIRST_REST && rests[19] == FIRST_REST << RESTS, "{rests:?}");
        assert_eq!(patience.stand(), SHORTEST);
    }

    /// A stand is as long as twice what the work took when it was let alone, so the next try is the last.
    #[test]
    fn work_that_takes_long_by_itself_is_waited_for() {
        let mut patience = DrainBackoff::new(TARGET, 0);
        patience.pause();
        patience.ended(10 * SECOND);
        assert_eq!(patience.stand(), 20 * SECOND);
        patience.pause();
        patience.ended(1000 * SECOND);
        assert_eq!(patience.stand(), LONGEST);
        patience.pause();
        patience.ended(MILLISECOND);
        assert_eq!(patience.stand(), SHORTEST, "and it was no use");
    }

    #[test]
    fn what_is_foreseen_is_waited_for_twice() {
        assert_eq!(DrainBackoff::new(TARGET, 10 * SECOND).stand(), SHORTEST + 20 * SECOND);
        assert_eq!(DrainBackoff::new(TARGET, u64::MAX).stand(), LONGEST);
        assert_eq!(DrainBackoff::new(SECOND, 0).stand(), 2 * SECOND);
    }
}
