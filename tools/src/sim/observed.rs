//! A GPU's snapshot, with what the policy says of it: each question is put once for each change, however many clients ask.
//!
//! Every client of a real GPU asks the policy for itself. Here all see the same snapshot at the same moment, so the answer to
//! one is the answer to all: whom to admit, when slices end, who must
//! evict, who brings memory in ahead of its turn.

use nvshare::policy;
use nvshare::slot::{SlotIndex, SlotSet};
use nvshare::snapshot::Snapshot;
use nvshare::units::{Granules, Nanos};
use std::cell::OnceCell;
use std::ops::{Deref, DerefMut};

/// The snapshot. Whoever changes anything in it forgets the answers.
#[derive(Debug)]
pub struct Observed {
    snapshot: Snapshot,
    answers: Answers,
}

#[derive(Debug, Default)]
struct Answers {
    admit: OnceCell<SlotSet>,
    awaited: OnceCell<bool>,
    prefetcher: OnceCell<Option<SlotIndex>>,
    slice_ends: OnceCell<Vec<Nanos>>,
    evictors: OnceCell<SlotSet>,
    needed: OnceCell<Option<Nanos>>,
}

impl From<Snapshot> for Observed {
    fn from(snapshot: Snapshot) -> Self {
        Self { snapshot, answers: Answers::default() }
    }
}

impl Deref for Observed {
    type Target = Snapshot;

    fn deref(&self) -> &Snapshot {
        &self.snapshot
    }
}

impl DerefMut for Observed {
    fn deref_mut(&mut self) -> &mut Snapshot {
        self.answers = Answers::default();
        &mut self.snapshot
    }
}

impl Observed {
    /// As [`policy::admit`].
    pub fn admit(&self) -> SlotSet {
        *self.answers.admit.get_or_init(|| policy::admit(&self.snapshot))
    }

    /// As [`policy::awaited`].
    pub fn awaited(&self) -> bool {
        *self.answers.awaited.get_or_init(|| policy::awaited(&self.snapshot))
    }

    /// As [`policy::prefetcher`].
    pub fn prefetcher(&self) -> Option<SlotIndex> {
        *self.answers.prefetcher.get_or_init(|| policy::prefetcher(&self.snapshot))
    }

    /// As [`policy::needed`].
    pub fn needed(&self) -> Option<Nanos> {
        *self.answers.needed.get_or_init(|| policy::needed(&self.snapshot))
    }

    /// As [`policy::next_decision`].
    pub fn next_decision(&self, decided: Nanos) -> Option<Nanos> {
        let ends = self.answers.slice_ends.get_or_init(|| policy::slice_ends(&self.snapshot).collect());
        ends.iter().copied().filter(|end| *end > decided).min()
    }

    /// As [`policy::evict_share`].
    pub fn evict_share(&self, slot: SlotIndex) -> Granules {
        let evictors = self.answers.evictors.get_or_init(|| policy::evictors(&self.snapshot));
        if evictors.contains(slot) { policy::evict_share(&self.snapshot, slot) } else { 0 }
    }

    /// As [`policy::prefetch`].
    pub fn prefetch(&self, slot: SlotIndex) -> Granules {
        if self.prefetcher() == Some(slot) { policy::prefetch(&self.snapshot, slot) } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvshare::page::{Phase, Settings};
    use nvshare::slot::SLOTS;
    use nvshare::snapshot::SlotView;

    #[test]
    fn a_change_makes_it_ask_again() {
        let mut observed = Observed::from(Snapshot {
            now: 1,
            capacity: 10,
            free: 10,
            admitted: SlotSet::EMPTY,
            occupied: SlotSet::EMPTY,
            settings: Settings::default(),
            bandwidth_in: 1,
            bandwidth_out: 1,
            slots: [SlotView::default(); SLOTS],
        });
        assert_eq!((observed.admit(), observed.prefetcher()), (SlotSet::EMPTY, None));
        let slot = SlotIndex::new(3).unwrap();
        observed.occupied = observed.occupied.with(slot);
        observed.slots[3] = SlotView { phase: Phase::Waiting, demand: 5, weight: 100, ..SlotView::default() };
        assert_eq!(observed.prefetcher(), Some(slot));
        assert_eq!((observed.awaited(), observed.prefetch(slot)), (true, 5));
        observed.admitted = observed.admit();
        assert_eq!((observed.admitted, observed.prefetcher()), (SlotSet::EMPTY.with(slot), None));
        assert_eq!((observed.awaited(), observed.prefetch(slot)), (false, 0));
    }
}
