//! A GPU's snapshot, with what the policy says of it: each question is put once for each change, however many clients ask.
//!
//! Every client of a real GPU asks the policy for itself. Here all see the same snapshot at the same moment, so the answer to
//! one is the answer to all: whom to admit, when slices end, who must evict, who brings memory in ahead of its turn.

use nvshare::policy::{self, Order, Standing, Waiting};
use nvshare::slot::{SLOTS, SlotIndex, SlotSet};
use nvshare::snapshot::Snapshot;
use nvshare::units::{Granules, Nanos};
use std::cell::OnceCell;
use std::ops::{Deref, DerefMut};

/// The snapshot. Whoever changes anything in it forgets the answers that depend on that.
#[derive(Debug)]
pub struct Observed {
    snapshot: Snapshot,
    usable: OnceCell<Granules>,
    hurried: OnceCell<Option<SlotIndex>>,
    of_time: OfTime,
    of_memory: OfMemory,
    /// As of an earlier moment, when nothing but that and memory was other than it is now.
    earlier: Option<Standing>,
}

/// What depends on the time, too.
#[derive(Debug, Default)]
struct OfTime {
    standing: OnceCell<Standing>,
    waiting: OnceCell<Option<Waiting>>,
}

/// What depends on the time, and on whose memory is on the GPU, too.
#[derive(Debug, Default)]
struct OfMemory {
    admit: OnceCell<SlotSet>,
    prefetcher: OnceCell<Option<SlotIndex>>,
    slice_ends: OnceCell<Vec<Nanos>>,
    evict_shares: OnceCell<[Granules; SLOTS]>,
    needed: OnceCell<Option<Nanos>>,
}

impl From<Snapshot> for Observed {
    fn from(snapshot: Snapshot) -> Self {
        Self {
            snapshot,
            usable: OnceCell::new(),
            hurried: OnceCell::new(),
            of_time: OfTime::default(),
            of_memory: OfMemory::default(),
            earlier: None,
        }
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
        self.usable.take();
        self.hurried.take();
        self.of_time = OfTime::default();
        self.of_memory = OfMemory::default();
        self.earlier = None;
        &mut self.snapshot
    }
}

impl Observed {
    fn hurried(&self) -> Option<SlotIndex> {
        *self.hurried.get_or_init(|| policy::hurried(&self.snapshot))
    }

    fn order(&self) -> Order<'_> {
        let stand = || match &self.earlier {
            Some(earlier) => earlier.at(&self.snapshot),
            None => Standing::of(&self.snapshot),
        };
        let standing = self.of_time.standing.get_or_init(stand);
        let order = || Order::with_hurried(&self.snapshot, standing, self.hurried());
        let waiting = *self.of_time.waiting.get_or_init(|| order().waiting());
        Order::by(&self.snapshot, standing, waiting)
    }

    /// Time passes. Returns what it was before, ns.
    pub fn pass(&mut self, now: Nanos) -> Nanos {
        let before = std::mem::replace(&mut self.snapshot.now, now);
        if now != before {
            self.earlier = std::mem::take(&mut self.of_time).standing.into_inner().or(self.earlier.take());
            self.of_memory = OfMemory::default();
        }
        before
    }

    /// As [`Snapshot::usable`].
    pub fn usable(&self) -> Granules {
        *self.usable.get_or_init(|| self.snapshot.usable())
    }

    /// A client's granules come in from the pool.
    pub fn takes(&mut self, slot: SlotIndex, granules: Granules) {
        self.of_memory = OfMemory::default();
        self.snapshot.slots[slot.get()].resident += granules;
        self.snapshot.free -= granules as i32;
    }

    /// A client's granules go back to the pool.
    pub fn gives(&mut self, slot: SlotIndex, granules: Granules) {
        self.of_memory = OfMemory::default();
        self.snapshot.slots[slot.get()].resident -= granules;
        self.snapshot.free += granules as i32;
    }

    /// As [`policy::admit`].
    pub fn admit(&self) -> SlotSet {
        *self.of_memory.admit.get_or_init(|| self.order().admit())
    }

    /// As [`policy::awaited`].
    pub fn awaited(&self) -> bool {
        self.hurried().is_some()
    }

    /// As [`policy::prefetcher`].
    pub fn prefetcher(&self) -> Option<SlotIndex> {
        *self.of_memory.prefetcher.get_or_init(|| {
            if self.awaited() { self.order().first_waiter() } else { policy::expected(&self.snapshot) }
        })
    }

    /// As [`policy::needed`].
    pub fn needed(&self) -> Option<Nanos> {
        *self.of_memory.needed.get_or_init(|| self.order().needed())
    }

    /// As [`policy::next_decision`].
    pub fn next_decision(&self, decided: Nanos) -> Option<Nanos> {
        let ends = self.of_memory.slice_ends.get_or_init(|| self.order().slice_ends());
        ends.iter().copied().filter(|end| *end > decided).min()
    }

    /// As [`policy::turn_comes`].
    pub fn turn_comes(&self, slot: SlotIndex) -> Option<Nanos> {
        self.order().turn_comes(slot)
    }

    /// A client that is idle says when it will be back, ns; 0 if it does not know. True if it has said something else before.
    pub fn foresees(&mut self, slot: SlotIndex, at: Nanos) -> bool {
        let view = &mut self.snapshot.slots[slot.get()];
        let changed = std::mem::replace(&mut view.returns_at, at) != at;
        if changed {
            // Nobody's place and no slice depends on that.
            self.of_memory = OfMemory::default();
        }
        changed
    }

    /// As [`policy::evict_share`].
    pub fn evict_share(&self, slot: SlotIndex) -> Granules {
        self.of_memory.evict_shares.get_or_init(|| self.order().evict_shares())[slot.get()]
    }

    /// As [`policy::prefetch`].
    pub fn prefetch(&self, slot: SlotIndex) -> Granules {
        if self.prefetcher() == Some(slot) { self.order().prefetch(slot) } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvshare::page::{Phase, Settings};
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
