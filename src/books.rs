//! What a client has and what it asks for, in the page: its granules, its demand, its slice and its counters.
//!
//! [`Books`] may be used from every thread of the process. They have one lock for all moves of granules, because an account
//! has one move in flight at a time ([`crate::account`]). The phases belong to [`crate::Client`], which belongs to one thread.

use crate::account::Free;
use crate::journal::Event;
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
    /// The client stopped being admitted. The memory that is in place stays until the client is asked to evict.
    Recalled,
}

/// A client's phase in memory that only its own process can write: a word of [`Phase`], or [`NOT_TOLD`]. It is no part of the
/// protocol between clients, so loom need not see it.
pub type PrivatePhase = Arc<std::sync::atomic::AtomicU32>;

/// In a [`PrivatePhase`]: the process does not keep one, so the arbiter goes by the page.
pub const NOT_TOLD: u32 = u32::MAX;

/// What a client has and asks for. Cheap to clone, and usable from every thread of the process.
///
/// The caller takes granules before it maps memory, and gives them back after it has released the memory. So the GPU never
/// holds more than the books say.
pub struct Books<P> {
    pub(crate) page: P,
    pub(crate) slot: SlotIndex,
    /// Held during a move: an account has one move in flight at a time.
    author: Arc<Mutex<()>>,
    /// The client's phase, for the arbiter when it asks. The page has it too, where everybody can overwrite it.
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

/// How long a fill that finds no free granules sleeps before it looks whether it is still admitted, in ns. (A decision rings
/// the doorbell, and this sleep is on the pool's futex.) Only a fill that loses its bit while it waits, because a client died
/// or a context grew, waits this long for nothing.
pub(crate) const STARVED_POLL_INTERVAL: Nanos = 10 * MILLISECOND;

impl<P: Deref<Target = Page>> Books<P> {
    /// The books of the client that owns `slot`, without a [`PrivatePhase`].
    pub(crate) fn new(page: P, slot: SlotIndex) -> Self {
        Self { page, slot, author: Arc::new(Mutex::new(())), private_phase: None }
    }

    /// Writes into the client's journal. Only the client's own thread does so.
    pub(crate) fn note(&self, event: Event) {
        self.page.journals[self.slot.get()].write(now(), event);
    }

    /// The same of something that began at the time `begun`, ns, and has ended.
    pub(crate) fn note_span(&self, begun: Nanos, begins: Event, ends: Event) {
        self.page.journals[self.slot.get()].write(begun, begins);
        self.note(ends);
    }

    fn author(&self) -> MutexGuard<'_, ()> {
        // A panic between two stores leaves a move announced, and the next move replaces it.
        lock(&self.author)
    }

    /// Writes the phase that the arbiter is told when it asks.
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

    /// Granules that the client's allocations need.
    pub fn demand(&self) -> Granules {
        self.page.view(self.slot).demand
    }

    /// Whether the client is admitted at this moment: it may load and run.
    pub fn admitted(&self) -> bool {
        self.page.admitted().contains(self.slot)
    }

    /// Takes `amount` granules, waiting until the pool has them.
    ///
    /// [`Fill::Recalled`] if the client stopped being admitted. Nothing was taken then.
    pub fn take(&self, amount: Granules) -> Fill {
        self.take_unless(amount, || false)
    }

    /// As [`Books::take`], and gives up with [`Fill::Recalled`] when `hopeless` says that the pool will never have them.
    /// `hopeless` is asked before each wait.
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

    /// Sleeps while the pool's counter shows what [`Books::try_take`] returned, at most 10 ms. Then it rings those who are to make
    /// room for the admitted ones.
    ///
    /// The last decision has rung the client that was to make room at that moment. Who that is changes with time: a deadline passes,
    /// or a client that runs gets further ahead. So the client that was rung may look too late and find that another one is to
    /// make room, which nobody has rung.
    pub fn wait_for_granules(&self, seen: Free) {
        let until = now().saturating_add(STARVED_POLL_INTERVAL);
        futex_wait_low(self.page.header.free.atomic(), seen.granules as u32, Some(until));
        if now() >= until {
            let snapshot = Snapshot::take(&self.page, self.page.admitted());
            policy::evictors(&snapshot).iter().for_each(|slot| self.page.ring(slot));
        }
    }

    /// Takes `amount` granules if the pool has them.
    ///
    /// # Errors
    /// The pool's counter, if it held too few.
    pub fn try_take(&self, amount: Granules) -> Result<(), Free> {
        let _author = self.author();
        self.page.take(self.slot, amount)
    }

    /// Granules that the client may bring in ahead of its turn at this moment.
    pub fn ahead(&self) -> Granules {
        policy::prefetch(&Snapshot::take(&self.page, self.page.admitted()), self.slot)
    }

    /// Takes `amount` granules if the client is the first waiter and nobody else needs them now. False if not.
    pub fn take_ahead(&self, amount: Granules) -> bool {
        amount <= self.ahead() && self.try_take(amount).is_ok()
    }

    /// Gives back `amount` granules, or all if it holds fewer, and wakes those who wait for granules.
    pub fn give(&self, amount: Granules) {
        let _author = self.author();
        self.page.give(self.slot, amount);
    }

    /// Raises the client's demand by `amount` granules, and decides anew. True if the client is still admitted: then it may
    /// [take](Books::try_take) the granules at once.
    ///
    /// The caller has shut its gate before, or opens it only when it has the granules (I2).
    pub fn grow(&self, amount: Granules) -> bool {
        self.change_demand(|demand| demand.saturating_add(u64::from(amount)));
        self.page.decide().admitted.contains(self.slot)
    }

    /// Lowers the client's demand by `amount` granules, and decides anew.
    pub fn shrink(&self, amount: Granules) {
        self.change_demand(|demand| demand.saturating_sub(u64::from(amount)));
        self.page.decide();
    }

    fn change_demand(&self, change: impl Fn(u64) -> u64) {
        let _author = self.author();
        let word = &self.page.slot(self.slot).own.demand;
        word.store(change(word.load(Ordering::Relaxed)), Ordering::Release);
    }

    /// The most granules that this client's allocations can have: the pool without all contexts, and without the unmovable
    /// granules of other clients.
    pub fn usable(&self) -> Granules {
        let snapshot = Snapshot::take(&self.page, SlotSet::EMPTY);
        snapshot.usable() + snapshot.view(self.slot).unmovable
    }

    /// Begins the client's slice if it has not begun; true if it begins now. The caller's threads may run from now on. A caller
    /// that is not the client's own thread must then ring that thread, so that it looks for the end of the slice.
    ///
    /// Only while the client is in phase Running and cannot leave it.
    pub fn begin_slice(&self) -> bool {
        let word = &self.page.slot(self.slot).own.slice_start;
        // A load first: most calls find that it has begun.
        word.load(Ordering::Relaxed) == NOT_BEGUN
            && word.compare_exchange(NOT_BEGUN, now(), Ordering::Release, Ordering::Relaxed).is_ok()
    }

    /// Whether the client's present slice has begun.
    pub fn slice_has_begun(&self) -> bool {
        self.page.slot(self.slot).own.slice_start.load(Ordering::Relaxed) != NOT_BEGUN
    }

    /// Begins the present slice anew, unless somebody waits for its end. For a client that could not run for a while because
    /// its process waited for another GPU. To be called under the same conditions as [`Books::begin_slice`].
    pub fn renew_slice(&self) {
        let snapshot = Snapshot::take(&self.page, self.page.admitted());
        if !policy::awaited(&snapshot) {
            self.page.slot(self.slot).own.slice_start.store(now(), Ordering::Release);
        }
    }

    /// Granules that the client should move out now, so that those who are admitted have room.
    pub fn to_evict(&self) -> Granules {
        policy::evict_share(&Snapshot::take(&self.page, self.page.admitted()), self.slot)
    }

    /// Says that `amount` of the client's resident granules cannot move any more, and decides anew.
    pub fn pin(&self, amount: Granules) {
        self.change_unmovable(|unmovable| unmovable.saturating_add(u64::from(amount)));
    }

    /// Says that `amount` of the client's pinned granules can move again, and decides anew. To be called before they are given
    /// back.
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

    /// Counts a copy of `bytes` that took `took` ns by the GPU's clock, and takes it into the link's measured bandwidth.
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

    /// Says that the client is to give way and cannot, and why. May be called again while that lasts, also with another reason.
    /// The first call decides anew, because others may be able to run beside the memory that does not move. Only the client's
    /// own thread may call it.
    pub fn stalled(&self, why: Stall) {
        let own = &self.page.slot(self.slot).own;
        if why == Stall::None {
            return self.stall_ended();
        }
        if own.stall.load(Ordering::Relaxed) == Stall::None {
            own.stall_since.store(now(), Ordering::Relaxed);
            add(&own.stalls, 1);
            own.stall.store(why, Ordering::Release);
            self.note(Event::Stalled(why));
            self.page.decide();
        }
        own.stall.store(why, Ordering::Release);
    }

    /// Says that the client can give way again, has given way, or need not any more. Costs one load if it was not stalled.
    pub fn stall_ended(&self) {
        let own = &self.page.slot(self.slot).own;
        if own.stall.load(Ordering::Relaxed) != Stall::None {
            own.stall.store(Stall::None, Ordering::Release);
            own.stall_since.store(0, Ordering::Relaxed);
            self.note(Event::Stalled(Stall::None));
            self.page.decide();
        }
    }

    /// Publishes the host memory that this client was promised and has not allocated yet, in a word whose format its readers
    /// know ([`Books::host_promises`]).
    pub fn promise_host(&self, word: u64) {
        self.page.slot(self.slot).own.host_promise.store(word, Ordering::SeqCst);
    }

    /// The words that the other clients of this GPU have published by [`Books::promise_host`].
    pub fn host_promises(&self) -> impl Iterator<Item = u64> {
        let others = self.page.occupied().without(self.slot);
        others.iter().map(|slot| self.page.slot(slot).own.host_promise.load(Ordering::SeqCst))
    }

    /// Ends the client. Its own thread has ended, or calls this last. Gives back all granules but `lost`, which could not be
    /// released. If none are lost, the arbiter clears the slot when it next looks; else the slot stays until the process ends,
    /// with `lost` unmovable granules.
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
        self.note(Event::Phase(phase));
        self.page.decide();
    }

    /// Counts a drain that was paused and will begin again.
    pub fn drain_retried(&self) {
        add(&self.page.slot(self.slot).own.drain_retries, 1);
    }

    /// Counts bytes that leave the GPU without a copy, because they are zero.
    pub fn elided(&self, bytes: u64) {
        add(&self.page.slot(self.slot).own.bytes_elided, bytes);
    }

    /// Counts bytes that leave the GPU without a copy, because the host has the same.
    pub fn unchanged(&self, bytes: u64) {
        add(&self.page.slot(self.slot).own.bytes_unchanged, bytes);
    }

    /// Counts bytes whose GPU memory was handed to a replica.
    pub fn handed_over(&self, bytes: u64) {
        add(&self.page.slot(self.slot).compute.bytes_handed_over, bytes);
    }

    /// Counts bytes whose GPU memory has come from a replica.
    pub fn taken_over(&self, bytes: u64) {
        add(&self.page.slot(self.slot).compute.bytes_taken_over, bytes);
    }

    /// Writes how often threads of the process have passed the gate to submit work, in all, and how often they had to wait there.
    pub fn submitted(&self, submissions: u64, held: u64) {
        let own = &self.page.slot(self.slot).own;
        own.submissions.store(submissions, Ordering::Relaxed);
        own.held_submissions.store(held, Ordering::Relaxed);
    }

    /// Counts a copy of `bytes` without its time, because other work shared the link or the copy was not in a hurry.
    pub fn moved(&self, direction: Direction, bytes: u64) {
        let own = &self.page.slot(self.slot).own;
        let total = match direction {
            Direction::In => &own.bytes_in,
            Direction::Out => &own.bytes_out,
        };
        add(total, bytes);
    }
}

/// Adds to a counter that has one writer, modulo 2^64.
pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
}
