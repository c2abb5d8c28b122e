//! A client's shares as they stand in its row: read within their bounds, and written by the arbiter.

use super::layout::Page;
use crate::shares::{ComputeLimit, MemoryLimit, Priority, Shares};
use crate::slot::SlotIndex;
use crate::sync::Ordering;

impl Page {
    /// A client's shares.
    pub fn shares(&self, slot: SlotIndex) -> Shares {
        let (weight, priority) = self.weight_and_priority(slot);
        Shares {
            weight,
            priority,
            memory_limit: self.memory_limit(slot),
            compute_limit: self.compute_limit(slot),
        }
    }

    /// The weight and the priority of a client: those of its shares that decisions look at.
    pub(crate) fn weight_and_priority(&self, slot: SlotIndex) -> (u32, Priority) {
        let row = self.slot(slot);
        let weight = crate::usage::weight(row.weight.load(Ordering::Relaxed));
        (weight, row.priority.load(Ordering::Relaxed))
    }

    /// A client's memory limit.
    pub fn memory_limit(&self, slot: SlotIndex) -> MemoryLimit {
        self.slot(slot).memory_limit.load(Ordering::Relaxed)
    }

    /// A client's compute limit.
    pub fn compute_limit(&self, slot: SlotIndex) -> ComputeLimit {
        self.slot(slot).compute_limit.load(Ordering::Relaxed)
    }

    /// Gives a client other shares, and rings every client: slices become longer or shorter at once, and a client that waits
    /// computes its deadline anew. For the arbiter.
    pub fn set_shares(&self, slot: SlotIndex, shares: Shares) {
        self.store_shares(slot, shares);
        self.decide();
        for slot in self.occupied().iter() {
            self.ring(slot);
        }
    }

    /// Writes a client's shares, without a ring or a decision.
    pub(crate) fn store_shares(&self, slot: SlotIndex, shares: Shares) {
        let row = self.slot(slot);
        row.weight.store(shares.weight, Ordering::Relaxed);
        row.priority.store(shares.priority, Ordering::Relaxed);
        row.memory_limit.store(shares.memory_limit, Ordering::Relaxed);
        row.compute_limit.store(shares.compute_limit, Ordering::Relaxed);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::usage::{DEFAULT_WEIGHT, MAX_WEIGHT};

    #[test]
    fn shares_of_garbage_are_within_their_bounds() {
        use crate::slot::Process;
        let page = Page::for_tests(10);
        let slot = page.open_slot(Process { pid: 1, started: 1 }, "job", 0).unwrap();
        let row = page.slot(slot);
        for garbage in [0, 3, u32::MAX] {
            row.weight.store(garbage, Ordering::Relaxed);
            row.priority.atomic().store(garbage, Ordering::Relaxed);
            row.memory_limit.atomic().store(u64::from(garbage) << 31 | 7, Ordering::Relaxed);
            row.compute_limit.atomic().store(garbage, Ordering::Relaxed);
            let shares = page.shares(slot);
            assert!((1..=MAX_WEIGHT).contains(&shares.weight));
            assert_eq!(Priority::read(shares.priority.into()), Some(shares.priority));
            assert_eq!(ComputeLimit::read(shares.compute_limit.into()), Some(shares.compute_limit));
        }
        // The slot's next owner gets the default shares.
        page.reap(slot);
        let next = page.open_slot(Process { pid: 2, started: 1 }, "job", DEFAULT_WEIGHT).unwrap();
        assert_eq!((next, page.shares(next)), (slot, Shares::default()));
    }
}
