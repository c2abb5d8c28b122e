//! A GPU's snapshot, with what the policy says of it: each question is put once for each change, however many clients ask.
//!
//! Every client of a real GPU asks the policy for itself. Here all see the same snapshot at the same moment, so the answer to
//! one is the answer to all: whom to admit, when slices end, who must evict, who is the first waiter.

use nvshare::policy::{self, Order, Standing};
use nvshare::slot::{SLOTS, SlotIndex, SlotSet};
use nvshare::snapshot::Snapshot;
use nvshare::units::{Granules, Nanos};
use std::cell::OnceCell;
use std::ops::{Deref, DerefMut};

/// The snapshot. Whoever changes anything in it forgets the answers that depend on that.
#[derive(Debug)]
pub struct Observed {
    snapshot: Snapshot,
    standing: OnceCell<Standing>,
    awaited: OnceCell<bool>,
    first_waiter: OnceCell<Option<SlotIndex>>,
    of_memory: OfMemory,
}

/// What depends on whose memory is on the GPU, too.
#[derive(Debug, Default)]
struct OfMemory {
    admit: OnceCell<SlotSet>,
    slice_ends: OnceCell<Vec<Nanos>>,
    evict_shares: OnceCell<[Granules; SLOTS]>,
    needed: OnceCell<Option<Nanos>>,
}

impl From<Snapshot> for Observed {
    fn from(snapshot: Snapshot) -> Self {
        Self {
            snapshot,
            standing: OnceCell::new(),
            awaited: OnceCell::new(),
            first_waiter: OnceCell::new(),
            of_memory: OfMemory::default(),
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
        self.standing.take();
        self.awaited.take();
        self.first_waiter.take();
        self.of_memory = OfMemory::default();
        &mut self.snapshot
    }
}

impl Observed {
    fn order(&self) -> Order<'_> {
        Order::new(&self.snapshot, self.standing.get_or_init(|| Standing::of(&self.snapshot)))
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
        *self.awaited.get_or_init(|| policy::awaited(&self.snapshot))
    }

    /// As [`policy::first_waiter`].
    pub fn first_waiter(&self) -> Option<SlotIndex> {
        *self.first_waiter.get_or_init(|| if self.awaited() { self.order().first_waiter() } else { None })
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

    /// As [`policy::evict_share`].
    pub fn evict_share(&self, slot: SlotIndex) -> Granules {
        self.of_memory.evict_shares.get_or_init(|| self.order().evict_shares())[slot.get()]
    }

    /// As [`policy::prefetch`].
    pub fn prefetch(&self, slot: SlotIndex) -> Granules {
        if self.first_waiter() == Some(slot) { self.order().prefetch(slot) } else { 0 }
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
        assert_eq!((observed.admit(), observed.first_waiter()), (SlotSet::EMPTY, None));
        let slot = SlotIndex::new(3).unwrap();
        observed.occupied = observed.occupied.with(slot);
        observed.slots[3] = SlotView { phase: Phase::Waiting, demand: 5, weight: 100, ..SlotView::default() };
        assert_eq!(observed.first_waiter(), Some(slot));
        assert_eq!((observed.awaited(), observed.prefetch(slot)), (true, 5));
        observed.admitted = observed.admit();
        assert_eq!((observed.admitted, observed.first_waiter()), (SlotSet::EMPTY.with(slot), None));
        assert_eq!((observed.awaited(), observed.prefetch(slot)), (false, 0));
    }
}
