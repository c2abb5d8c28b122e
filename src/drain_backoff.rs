//! How long a drain stands still before it lets the process's threads go on.
//!
//! Work that waits for a thread at the shut gate never ends, and from outside it looks like work that takes long. So the gate
//! opens again after some time without progress, and is not shut again before the work that stood still has ended: until then
//! nothing can be drained in any case. The time that this takes tells the two cases apart. Work that ends at once when threads
//! go on was waiting for them, and a longer wait would have been useless. Work that goes on for seconds takes long by itself,
//! and the next drain waits twice as long for it. Flow control keeps the submissions in the meantime few.
//!
//! Some processes can never be drained, such as one that launches work while it holds a lock that its host functions take.
//! Each try costs such a process the time that the gate is shut. So after eight tries, the next ones become rare.

use crate::units::{MILLISECOND, Nanos, SECOND};

/// The gate stays shut without progress for at least this long, in ns. In a process whose work in flight is limited to the
/// drain target, drains take less.
const SHORTEST: Nanos = 100 * MILLISECOND;

/// The gate stays shut without progress for at most this long, in ns.
const LONGEST: Nanos = 60 * SECOND;

/// So many tries follow each other without a pause.
const QUICK_TRIES: u32 = 8;

/// The pause before the next try, in ns. It doubles with each further try,
const FIRST_REST: Nanos = 8 * MILLISECOND;
/// up to this many times: to a second.
const RESTS: u32 = 7;

/// What is known of one client's drain, over all its tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrainBackoff {
    /// What a drain may take by all that was known when it began, in ns.
    least: Nanos,
    /// How long the gate stays shut without progress, in ns.
    stand: Nanos,
    tries: u32,
}

impl DrainBackoff {
    /// For a drain that should take at most `target` ns, and is expected to take `foreseen` ns by what the process's work has
    /// taken before.
    pub fn new(target: Nanos, foreseen: Nanos) -> Self {
        let mut patience = Self { least: 0, stand: 0, tries: 0 };
        patience.foresee(target, foreseen);
        patience
    }

    /// A new try begins, and the work in flight is expected to take `foreseen` ns.
    pub fn foresee(&mut self, target: Nanos, foreseen: Nanos) {
        self.least = SHORTEST.max(target.saturating_mul(2)).saturating_add(foreseen.saturating_mul(2));
        self.least = self.least.min(LONGEST);
        self.stand = self.stand.max(self.least);
    }

    /// How long the gate stays shut while threads stand before it and no work is seen to end, in ns.
    pub fn stand(&self) -> Nanos {
        self.stand
    }

    /// The drain is paused and threads go on. Returns for how long at least, in ns.
    pub fn pause(&mut self) -> Nanos {
        self.tries = self.tries.saturating_add(1);
        match self.tries.checked_sub(QUICK_TRIES) {
            None | Some(0) => 0,
            Some(more) => FIRST_REST << (more - 1).min(RESTS),
        }
    }

    /// The work that stood still has ended, `took` ns after threads went on.
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
