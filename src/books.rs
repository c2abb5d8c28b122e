//! What a client has and what it asks for: its granules, its demand, its slice and its counters in the page.
//!
//! [`Books`] may be used from every thread of the process. Moves of granules have one author at a time, because an
//! account has one move in flight ([`crate::account`]). The phases are the business of [`crate::Client`], which belongs
//! to one thread.

use crate::account::Free;
use crate::page::{Direction, Page, Phase, Stall};
use crate::policy::{self, NOT_BEGUN};
use crate::slot::{SlotIndex, SlotSet};
use crate::snapshot::Snapshot;
use crate::sync::{Arc, AtomicU64, Mutex, MutexGuard, Ordering, futex_wait_low, lock, now};
use crate::units::{Granules, MILLISECOND, Nanos};
use std::ops::Deref;

/// How a [`Runtime::fill`](crate::Runtime::fill) ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// All memory is in place.
    Complete,
    /// The right to load was withdrawn. What is in place stays until it is asked for.
    Recalled,
}

/// A client's phase in memory of its own process alone: a word of [`Phase`], or [`NOT_TOLD`]. Not a part of the protocol
/// between clients, and so no matter for loom.
pub type PrivatePhase = Arc<std::sync::atomic::AtomicU32>;

/// The process does not say: the page has to be believed.
pub const NOT_TOLD: u32 = u32::MAX;

/// What a client has and asks for. Cheap to clone; usable from every thread of the process.
///
/// Granules are counted before they are mapped and after they are released, so the GPU never holds
/// more than the books say.
pub struct Books<P> {
    pub(crate) page: P,
    pub(crate) slot: SlotIndex,
    /// An account has one move in flight at a time, and one author.
    author: Arc<Mutex<()>>,
    /// The client's phase, for the arbiter when it asks. The page says it too, where everybody can overwrite it.
    pub(crate) private_phase: Option<PrivatePhase>,
}

impl<P: Clone> Clone for Books<P> {
    fn clone(&self) -> Self {
        Self {
            page: self.page.clone(),
            slot: self.slot,
            author: self.author.clone(),
            private_phase: self.private_phase.clone(),
        }
    }
}

/// How long a fill that finds no free granules sleeps before it looks whether it was recalled, ns. A
/// recall rings the doorbell and not the pool's futex; only a fill that was admitted and then
/// overruled, by a death or by a context that grew, ever waits this long for nothing.
pub(crate) const STARVED_LOOK: Nanos = 10 * MILLISECOND;

impl<P: Deref<Target = Page>> Books<P> {
    /// Of the client that owns `slot`, which tells its phase nowhere but in the page.
    pub(crate) fn new(page: P, slot: SlotIndex) -> Self {
        Self { page, slot, author: Arc::new(Mutex::new(())), private_phase: None }
    }

    fn author(&self) -> MutexGuard<'_, ()> {
        // A panic between two stores leaves an operation announced, which the next move closes.
        lock(&self.author)
    }

    /// What the arbiter is told when it asks.
    pub(crate) fn tell(&self, phase: Phase) {
        if let Some(private_phase) = &self.private_phase {
            private_phase.store(phase.into(), std::sync::atomic::Ordering::Relaxed);
        }
    }

    /// The page.
    pub fn page(&self) -> &Page {
        &self.page
    }

    /// The client's slot.
    pub fn slot(&self) -> SlotIndex {
        self.slot
    }

    /// Granules that the client holds on the GPU.
    pub fn resident(&self) -> Granules {
        self.page.account(self.slot).resident
    }

    /// Granules that its allocations need.
    pub fn demand(&self) -> Granules {
        self.page.view(self.slot).demand
    }

    /// Whether the client may load and run, as things stand.
    pub fn admitted(&self) -> bool {
        self.page.admitted().contains(self.slot)
    }

    /// Takes `amount` granules, waiting until the pool has them.
    ///
    /// [`Fill::Recalled`] when the client stopped being admitted; nothing was taken then.
    pub fn take(&self, amount: Granules) -> Fill {
        self.take_unless(amount, || false)
    }

    /// As [`Books::take`], and gives up when `hopeless` says that the pool will never have them. It is
    /// asked before each wait.
    pub fn take_unless(&self, amount: Granules, hopeless: impl Fn() -> bool) -> Fill {
        loop {
            if !self.admitted() || hopeless() {
                return Fill::Recalled;
            }
            match self.try_take(amount) {
                Ok(()) => return Fill::Complete,
                Err(free) => self.wait_for_granules(free),
            }
        }
    }

    /// Sleeps while the pool's counter still shows what [`Books::try_take`] saw, or for a while.
    pub fn wait_for_granules(&self, seen: Free) {
        let until = now().saturating_add(STARVED_LOOK);
        futex_wait_low(self.page.header.free.atomic(), seen.granules as u32, Some(until));
    }

    /// Takes `amount` granules if the pool has them.
    ///
    /// # Errors
    /// What the pool had.
    pub fn try_take(&self, amount: Granules) -> Result<(), Free> {
        let _author = self.author();
        self.page.take(self.slot, amount)
    }

    /// Granules that it may bring in ahead of its turn, as things stand.
    pub fn ahead(&self) -> Granules {
        policy::prefetch(&Snapshot::take(&self.page, self.page.admitted()), self.slot)
    }

    /// Takes `amount` granules if the client waits, is the next, and nobody else needs that room now.
    pub fn take_ahead(&self, amount: Granules) -> bool {
        amount <= self.ahead() && self.try_take(amount).is_ok()
    }

    /// Gives back `amount` granules, or all if it holds fewer, and wakes who waits for them.
    pub fn give(&self, amount: Granules) {
        let _author = self.author();
        self.page.give(self.slot, amount);
    }

    /// Says that the client's allocations need `amount` granules more, and decides anew. True when it
    /// is still admitted: then it may [take](Books::try_take) what it needs at once.
    ///
    /// The caller has shut its gate before, or opens it only when it has the granules (I2).
    pub fn grow(&self, amount: Granules) -> bool {
        self.change_demand(|demand| demand.saturating_add(u64::from(amount)));
        self.page.decide().admitted.contains(self.slot)
    }

    /// Says that the client's allocations need `amount` granules less.
    pub fn shrink(&self, amount: Granules) {
        self.change_demand(|demand| demand.saturating_sub(u64::from(amount)));
        self.page.decide();
    }

    fn change_demand(&self, change: impl Fn(u64) -> u64) {
        let _author = self.author();
        let word = &self.page.slot(self.slot).own.demand;
        word.store(change(word.load(Ordering::Relaxed)), Ordering::Release);
    }

    /// The most granules that this client's allocations can have: the pool less all contexts, and less what
    /// other clients cannot move.
    pub fn usable(&self) -> Granules {
        let snapshot = Snapshot::take(&self.page, SlotSet::EMPTY);
        snapshot.usable() + snapshot.view(self.slot).unmovable
    }

    /// The client's threads run from now on: its slice begins, if it has not; true if it does. If this is not
    /// the client's own thread, that one must be rung: it finds the end of the slice when it next looks.
    ///
    /// Only while the client is in phase Running and cannot leave it.
    pub fn begin_slice(&self) -> bool {
        let word = &self.page.slot(self.slot).own.slice_start;
        // A look first: most calls find that it has begun.
        word.load(Ordering::Relaxed) == NOT_BEGUN
            && word.compare_exchange(NOT_BEGUN, now(), Ordering::Release, Ordering::Relaxed).is_ok()
    }

    /// Whether its present slice has begun.
    pub fn slice_has_begun(&self) -> bool {
        self.page.slot(self.slot).own.slice_start.load(Ordering::Relaxed) != NOT_BEGUN
    }

    /// Begins the present slice anew, unless somebody waits for its end: nobody loses by it. For a client that
    /// could not run for a while, because its process waited for another GPU. When, as [`Books::begin_slice`].
    pub fn renew_slice(&self) {
        let snapshot = Snapshot::take(&self.page, self.page.admitted());
        if policy::first_waiter(&snapshot).is_none() {
            self.page.slot(self.slot).own.slice_start.store(now(), Ordering::Release);
        }
    }

    /// Says that `amount` of the granules that it holds cannot move any more, and decides anew.
    pub fn pin(&self, amount: Granules) {
        self.change_unmovable(|unmovable| unmovable.saturating_add(u64::from(amount)));
    }

    /// Takes [`Books::pin`] back, before the granules are given back.
    pub fn unpin(&self, amount: Granules) {
        self.change_unmovable(|unmovable| unmovable.saturating_sub(u64::from(amount)));
    }

    fn change_unmovable(&self, change: impl Fn(u64) -> u64) {
        {
            let _author = self.author();
            let word = &self.page.slot(self.slot).own.unmovable;
            word.store(change(word.load(Ordering::Relaxed)), Ordering::Release);
        }
        self.page.decide();
    }

    /// Counts a copy, and takes it into the link's measured bandwidth.
    pub fn copied(&self, direction: Direction, bytes: u64, took: Nanos) {
        let own = &self.page.slot(self.slot).own;
        self.moved(direction, bytes);
        let time = match direction {
            Direction::In => &own.fill_ns,
            Direction::Out => &own.evict_ns,
        };
        add(time, took);
        self.page.observe_copy(direction, bytes, took);
    }

    /// Says that the client is to give way and cannot, and why; again and again as long as that is so, if need be. The first
    /// time it is decided anew, because others may go on beside what does not move. Only the thread that walks the client
    /// through its phases calls it.
    pub fn stalled(&self, why: Stall) {
        let own = &self.page.slot(self.slot).own;
        if why == Stall::None {
            return self.stall_ended();
        }
        if own.stall.load(Ordering::Relaxed) == Stall::None {
            own.stall_since.store(now(), Ordering::Relaxed);
            add(&own.stalls, 1);
            own.stall.store(why, Ordering::Release);
            self.page.decide();
        }
        own.stall.store(why, Ordering::Release);
    }

    /// Says that the client can give way again, or has, or need not any more. Costs a load if it was not stalled.
    pub fn stall_ended(&self) {
        let own = &self.page.slot(self.slot).own;
        if own.stall.load(Ordering::Relaxed) != Stall::None {
            own.stall.store(Stall::None, Ordering::Release);
            own.stall_since.store(0, Ordering::Relaxed);
            self.page.decide();
        }
    }

    /// Publishes what host memory this client was promised and has not made yet, in a word that those understand who
    /// promise any ([`Books::host_promises`]).
    pub fn promise_host(&self, word: u64) {
        self.page.slot(self.slot).own.host_promise.store(word, Ordering::SeqCst);
    }

    /// What the other clients of this GPU have published by [`Books::promise_host`].
    pub fn host_promises(&self) -> impl Iterator<Item = u64> {
        let others = self.page.occupied().without(self.slot);
        others.iter().map(|slot| self.page.slot(slot).own.host_promise.load(Ordering::SeqCst))
    }

    /// Ends the client, whose own thread is no more, or ends with this: gives back all but `lost` granules, of which nobody
    /// knows how to release them. Without any the arbiter clears the slot when it next looks; else the slot stays, with that
    /// much that cannot move, until the process ends.
    pub fn end(&self, lost: Granules) {
        let lost = lost.min(self.resident());
        self.give(self.resident() - lost);
        self.change_demand(|_| u64::from(lost));
        self.change_unmovable(|_| u64::from(lost));
        self.stall_ended();
        let own = &self.page.slot(self.slot).own;
        own.wait_since.store(0, Ordering::Relaxed);
        let phase = if lost == 0 { Phase::Leaving } else { Phase::Idle };
        self.tell(phase);
        own.phase.store(phase, Ordering::Release);
        self.page.decide();
    }

    /// Counts a drain that let the client's threads go on, and will be begun again.
    pub fn drain_retried(&self) {
        add(&self.page.slot(self.slot).own.drain_retries, 1);
    }

    /// Counts a copy that tells nothing of the link, because it was in no hurry.
    pub fn moved(&self, direction: Direction, bytes: u64) {
        let own = &self.page.slot(self.slot).own;
        let total = match direction {
            Direction::In => &own.bytes_in,
            Direction::Out => &own.bytes_out,
        };
        add(total, bytes);
    }
}

/// Adds to a counter that has one writer.
pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
}
