//! The gate: threads pass it to submit GPU work, and memory moves only while it is shut.
//!
//! Each thread has a *lane*, a counter of its own that is odd while the thread is inside. To enter, it
//! makes its counter odd and then looks at the gate; to shut, the engine shuts the gate and then looks
//! at every counter. Each side stores before it loads, with a barrier between, so at least one of them
//! sees the other: either the thread finds the gate shut and turns back, or the engine finds the
//! counter odd and waits for it (Dekker's argument). The barrier is asymmetric
//! ([`crate::sync::light_barrier`]): entering costs two stores and two loads to memory that no other
//! thread writes, no lock, no fence and no system call.
//!
//! The same argument holds for leaving: the thread makes its counter even and then looks whether the gate is shut, because then
//! the engine may be asleep on the counter and must be woken.
//!
//! A lane outlives its thread and is given to the next new thread, so there are as many lanes as threads were alive at a
//! time. The engine may look at a lane that has changed hands meanwhile; it then waits for the thread that has it now, which
//! is right, because that thread may be inside too.
//!
//! The engine shuts the gate and may find that a thread inside does not come out, or that work submitted before does not end,
//! because it waits for a thread that stands before the gate. Then the engine opens the gate again, without having moved
//! anything, and tries later. So it waits for the threads inside only until a given time ([`Gate::vacated`]).

use crate::sync::{
    Arc, AtomicU32, AtomicU64, Mutex, MutexGuard, Ordering, heavy_barrier, light_barrier, lock, now, park,
    park_until, register_barriers, unpark_all,
};
use crate::units::Nanos;

/// In the gate's state: the gate is open.
const OPEN: u32 = 1;
/// In the gate's state: a thread that wants in keeps the pace first. [`Gate::try_enter`] refuses then, so that the limit costs
/// nothing while it is not set. It can be set while the gate is shut, so that no thread is in before.
const LIMITED: u32 = 2;
/// In the gate's state, for ever: the process's engine has failed. [`Gate::try_enter`] refuses and [`Gate::enter`] lets every
/// thread in at once, so that each sees the failure and returns an error to the application.
const FAILED: u32 = 4;

fn is_open(state: u32) -> bool {
    state & (OPEN | FAILED) != 0
}

fn has_failed(state: u32) -> bool {
    state & FAILED != 0
}

/// One thread's announcement: a counter that is odd while the thread is inside. On cache lines of its own, because it is
/// written at every call.
#[repr(align(128))]
pub struct Lane {
    passes: AtomicU32,
}

impl Lane {
    fn new() -> Self {
        Self { passes: AtomicU32::new(0) }
    }

    /// Whether the lane's thread is inside.
    #[inline]
    pub fn inside(&self) -> bool {
        self.passes.load(Ordering::Relaxed) & 1 == 1
    }
}

#[derive(Default)]
struct Lanes {
    all: Vec<Arc<Lane>>,
    /// The lanes of threads that have ended.
    free: Vec<Arc<Lane>>,
}

/// The gate of a process.
pub struct Gate {
    state: AtomicU32,
    /// How often threads that stand before the gate were told to try again. They sleep on it, and not on the state, because tickets
    /// let them in too and leave the state as it is.
    calls: AtomicU32,
    /// Threads that stand before the shut gate.
    waiting: AtomicU32,
    /// When the first of the threads that wait began to, ns.
    waiting_since: AtomicU64,
    /// Passes that had to wait.
    held: AtomicU64,
    /// Times that a thread made its lane's counter odd and turned back.
    turned_back: AtomicU32,
    /// How many threads may go in although the gate is shut ([`Gate::let_in`]).
    tickets: AtomicU32,
    lanes: Mutex<Lanes>,
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

impl Gate {
    /// A gate that is shut, with no thread inside: nothing runs before the client is admitted.
    pub fn new() -> Self {
        register_barriers();
        Self {
            state: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
            waiting_since: AtomicU64::new(0),
            held: AtomicU64::new(0),
            turned_back: AtomicU32::new(0),
            calls: AtomicU32::new(0),
            tickets: AtomicU32::new(0),
            lanes: Mutex::new(Lanes::default()),
        }
    }

    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        lock(&self.lanes)
    }

    /// A lane for a new thread.
    pub fn lane(&self) -> Arc<Lane> {
        let mut lanes = self.lanes();
        if let Some(lane) = lanes.free.pop() {
            return lane;
        }
        let lane = Arc::new(Lane::new());
        lanes.all.push(lane.clone());
        lane
    }

    /// Gives a lane back, because its thread ends; another thread may get it. Only the lane's own thread may call it.
    pub fn retire(&self, lane: Arc<Lane>) {
        if lane.inside() {
            // The thread was ended in the middle of a call. Without this, the engine would wait for it for ever.
            self.leave(&lane);
        }
        self.lanes().free.push(lane);
    }

    /// Goes in if the gate is open and not [limited](Gate::limit); false if not. Only the lane's own thread may call it,
    /// from outside.
    #[inline]
    pub fn try_enter(&self, lane: &Lane) -> bool {
        self.enter_if(lane, |state| state == OPEN)
    }

    #[inline]
    fn enter_if(&self, lane: &Lane, may: impl Fn(u32) -> bool) -> bool {
        let passes = lane.passes.load(Ordering::Relaxed);
        lane.passes.store(passes.wrapping_add(1), Ordering::Relaxed);
        light_barrier();
        if may(self.state.load(Ordering::Acquire)) {
            return true;
        }
        self.leave(lane);
        self.turned_back.fetch_add(1, Ordering::Relaxed);
        false
    }

    /// Goes in, and waits until the gate opens. Before each wait it calls `wake_engine`, which tells the engine that a thread
    /// wants in; before it goes into a gate that is limited, it calls `keep_pace`.
    pub fn enter(&self, lane: &Lane, keep_pace: impl Fn(), wake_engine: impl Fn()) {
        let mut paced = false;
        let mut held = false;
        loop {
            // Read before everything that may let the thread in: whoever changes that calls afterwards.
            let calls = self.calls.load(Ordering::Acquire);
            if !paced && self.is_limited() {
                keep_pace();
                paced = true;
            }
            let may = |state| state == OPEN || has_failed(state) || paced && is_open(state);
            if self.enter_if(lane, |state| may(state) || !is_open(state) && self.take_ticket()) {
                return;
            }
            if is_open(self.state.load(Ordering::Acquire)) {
                continue;
            }
            if !std::mem::replace(&mut held, true) {
                self.held.fetch_add(1, Ordering::Relaxed);
            }
            if self.waiting.fetch_add(1, Ordering::AcqRel) == 0 {
                self.waiting_since.store(now(), Ordering::Relaxed);
            }
            wake_engine();
            park(&self.calls, calls);
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            // It kept the pace of the slice that is over.
            paced = false;
        }
    }

    /// Comes out. Only the lane's own thread may call it, from inside.
    #[inline]
    pub fn leave(&self, lane: &Lane) {
        let passes = lane.passes.load(Ordering::Relaxed);
        // Release: what the thread did inside happens before whatever the engine does next.
        lane.passes.store(passes.wrapping_add(1), Ordering::Release);
        light_barrier();
        if self.state.load(Ordering::Relaxed) & OPEN == 0 {
            unpark_all(&lane.passes);
        }
    }

    /// Shuts the gate until [`Gate::open`]. Does not wait for the threads inside ([`Gate::vacated`] does).
    pub fn close(&self) {
        if !has_failed(self.state.fetch_and(!OPEN, Ordering::SeqCst)) {
            heavy_barrier();
        }
    }

    /// Takes a ticket, if there is one. The thread's lane says already that it is inside, so whoever takes the tickets back
    /// sees the thread or its ticket.
    fn take_ticket(&self) -> bool {
        let mut left = self.tickets.load(Ordering::Relaxed);
        while left > 0 {
            match self.tickets.compare_exchange_weak(left, left - 1, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => left = now,
            }
        }
        false
    }

    /// Lets this many of the threads that stand before the shut gate in, or of those that come. All memory is in place (I2), and
    /// stays until the tickets are [taken back](Gate::let_nobody_in).
    pub fn let_in(&self, threads: u32) {
        self.tickets.store(threads, Ordering::SeqCst);
        self.call();
    }

    /// Lets nobody in any more. Threads may be inside ([`Gate::vacated`]).
    pub fn let_nobody_in(&self) {
        self.tickets.swap(0, Ordering::SeqCst);
        heavy_barrier();
    }

    /// Waits until no thread is inside a gate that was [closed](Gate::close), or until the time `until` (CLOCK_MONOTONIC ns).
    /// True if no thread is inside.
    pub fn vacated(&self, until: Nanos) -> bool {
        let lanes = self.lanes().all.clone();
        // A lane that is made after this look belongs to a thread that will find the gate shut.
        for lane in lanes {
            loop {
                let passes = lane.passes.load(Ordering::Acquire);
                if passes & 1 == 0 {
                    break;
                }
                if now() >= until {
                    return false;
                }
                park_until(&lane.passes, passes, until);
            }
        }
        true
    }

    /// Tells the threads that stand before the gate to try again.
    fn call(&self) {
        self.calls.fetch_add(1, Ordering::Release);
        unpark_all(&self.calls);
    }

    /// Opens the gate, and wakes the threads that stand before it. All memory is in place (I2).
    pub fn open(&self) {
        self.state.fetch_or(OPEN, Ordering::Release);
        self.call();
    }

    /// Lets every thread in from now on, by [`Gate::enter`], to be told of an error. It cannot be taken back.
    pub fn fail(&self) {
        self.state.fetch_or(FAILED, Ordering::SeqCst);
        self.call();
    }

    /// From now on, or once the gate opens, a thread keeps the pace before it goes in.
    pub fn limit(&self) {
        self.state.fetch_or(LIMITED, Ordering::AcqRel);
    }

    /// Takes [`Gate::limit`] back.
    pub fn unlimit(&self) {
        self.state.fetch_and(!LIMITED, Ordering::AcqRel);
    }

    /// Whether the gate is open and [limited](Gate::limit).
    pub fn is_limited(&self) -> bool {
        self.state.load(Ordering::Relaxed) == OPEN | LIMITED
    }

    /// Whether the gate lets threads in: it is open, or has [failed](Gate::fail).
    pub fn is_open(&self) -> bool {
        is_open(self.state.load(Ordering::Acquire))
    }

    /// How many threads stand before the shut gate.
    pub fn waiting(&self) -> u32 {
        self.waiting.load(Ordering::Acquire)
    }

    /// When the first of the threads that wait began to, CLOCK_MONOTONIC ns; of no meaning if none waits. A thread counts as
    /// waiting a moment before it writes this.
    pub fn waiting_since(&self) -> Nanos {
        self.waiting_since.load(Ordering::Relaxed)
    }

    /// How many passes have had to wait at the shut gate since there is this gate.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// A number that changes when a thread goes in or comes out: the sum of all lanes' counters, modulo 2^32. It tells whether
    /// anything was submitted between two looks.
    pub fn passes(&self) -> u32 {
        self.lanes().all.iter().fold(0, |sum, lane| sum.wrapping_add(lane.passes.load(Ordering::Relaxed)))
    }

    /// How often threads have gone in and come out, modulo 2^31. Unlike [`Gate::passes`], it does not count those that turned
    /// back. While threads pass, the number may be off by a few; the next look corrects it.
    pub fn entered(&self) -> u32 {
        let turned_back = self.turned_back.load(Ordering::Relaxed);
        (self.passes() / 2).wrapping_sub(turned_back) & (u32::MAX >> 1)
    }

    /// Whether some thread is inside.
    pub fn occupied(&self) -> bool {
        self.lanes().all.iter().any(|lane| lane.inside())
    }
}
