//! The gate: threads that submit GPU work pass it, and memory moves only while it is shut.
//!
//! Each thread has a *lane*, a counter of its own that is odd while the thread is inside. To enter, it
//! makes its counter odd and then looks at the gate; to shut, the engine shuts the gate and then looks
//! at every counter. Each side stores before it loads, with a barrier between, so at least one of them
//! sees the other: either the thread finds the gate shut and turns back, or the engine finds the
//! counter odd and waits for it (Dekker's argument). The barrier is asymmetric
//! ([`crate::sync::light_barrier`]): entering costs two stores and two loads to memory that no other
//! thread writes, no lock, no fence and no system call.
//!
//! Leaving is the same argument once more: the thread makes its counter even and then looks whether
//! somebody is shutting the gate and sleeps on the counter.
//!
//! A lane outlives its thread and becomes the next thread's: there are as many as threads were alive at a time. The
//! engine may still look at it after it changed hands, and waits for whoever is inside, as it should.
//!
//! Whoever shuts the gate may find that those inside do not come out, or that the work submitted before does not end,
//! because one waits for a thread that stands before the gate. Then it opens the gate again, having moved nothing, and
//! tries later: so it waits for those inside only until a time ([`Gate::vacated`]).

use crate::sync::{
    Arc, AtomicU32, Mutex, MutexGuard, Ordering, heavy_barrier, light_barrier, now, park, park_until,
    register_barriers, unpark_all,
};
use crate::units::Nanos;

/// A bit of the gate's state: it is open.
const OPEN: u32 = 1;
/// And another: whoever wants in is to keep the pace first. [`Gate::try_enter`] says no, so that those
/// who pass an open gate pay nothing for it. It can be set while the gate is shut, so that nobody is in before.
const LIMITED: u32 = 2;
/// And another, for ever: there is nothing to guard any more, and whoever goes in has an error to tell. The fast way in is
/// closed then, and the slow one open, so that nobody misses it and nobody waits.
const FAILED: u32 = 4;

fn is_open(state: u32) -> bool {
    state & (OPEN | FAILED) != 0
}

fn has_failed(state: u32) -> bool {
    state & FAILED != 0
}

/// One thread's announcement: odd while it is inside. Padded, because it is written all the time.
#[repr(align(128))]
pub struct Lane {
    passes: AtomicU32,
}

impl Lane {
    fn new() -> Self {
        Self { passes: AtomicU32::new(0) }
    }

    /// Whether the lane's thread is inside.
    pub fn inside(&self) -> bool {
        self.passes.load(Ordering::Relaxed) & 1 == 1
    }
}

#[derive(Default)]
struct Lanes {
    all: Vec<Arc<Lane>>,
    /// Those of threads that have ended.
    free: Vec<Arc<Lane>>,
}

/// The gate of a process.
pub struct Gate {
    state: AtomicU32,
    /// Threads that stand before the shut gate.
    waiting: AtomicU32,
    lanes: Mutex<Lanes>,
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

impl Gate {
    /// A gate that is shut, with nobody inside: nothing runs before the client is admitted.
    pub fn new() -> Self {
        register_barriers();
        Self { state: AtomicU32::new(0), waiting: AtomicU32::new(0), lanes: Mutex::new(Lanes::default()) }
    }

    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
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

    /// The lane's thread ends: another one may have the lane. Only the lane's own thread may call it.
    pub fn retire(&self, lane: Arc<Lane>) {
        if lane.inside() {
            // The thread was ended in the middle of a call. Nobody waits for it for ever.
            self.leave(&lane);
        }
        self.lanes().free.push(lane);
    }

    /// Goes in if the gate is open and nobody limits who passes. Only the lane's own thread may call it, from outside.
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
        false
    }

    /// Goes in, waiting until the gate opens; `wake_engine` is called before each wait, to tell the engine
    /// that somebody wants in, and `keep_pace` before it goes into a gate that is limited.
    pub fn enter(&self, lane: &Lane, keep_pace: impl Fn(), wake_engine: impl Fn()) {
        let mut paced = false;
        loop {
            if !paced && self.is_limited() {
                keep_pace();
                paced = true;
            }
            if self.enter_if(lane, |state| state == OPEN || has_failed(state) || paced && is_open(state)) {
                return;
            }
            let state = self.state.load(Ordering::Acquire);
            if is_open(state) {
                continue;
            }
            self.waiting.fetch_add(1, Ordering::AcqRel);
            wake_engine();
            park(&self.state, state);
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            // That was the pace of the slice that is over.
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

    /// Lets nobody in from now on, until [`Gate::open`], and does not wait for those inside. Whoever calls it and then
    /// submits work is already held.
    pub fn close(&self) {
        if !has_failed(self.state.fetch_and(!OPEN, Ordering::SeqCst)) {
            heavy_barrier();
        }
    }

    /// Waits until nobody is inside a gate that is [closed](Gate::close), or until the time `until`; true if nobody is.
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

    /// Opens the gate, and wakes whoever stands before it. All memory is in place.
    pub fn open(&self) {
        self.state.fetch_or(OPEN, Ordering::Release);
        unpark_all(&self.state);
    }

    /// Lets everybody in from now on, by the slow way, to be told of an error.
    pub fn fail(&self) {
        self.state.fetch_or(FAILED, Ordering::SeqCst);
        unpark_all(&self.state);
    }

    /// Has everybody keep the pace who goes in from now on, or once the gate opens.
    pub fn limit(&self) {
        self.state.fetch_or(LIMITED, Ordering::AcqRel);
    }

    /// Takes [`Gate::limit`] back.
    pub fn unlimit(&self) {
        self.state.fetch_and(!LIMITED, Ordering::AcqRel);
    }

    /// Whether the gate is open, and whoever goes in keeps the pace.
    pub fn is_limited(&self) -> bool {
        self.state.load(Ordering::Relaxed) == OPEN | LIMITED
    }

    /// Whether the gate is open.
    pub fn is_open(&self) -> bool {
        is_open(self.state.load(Ordering::Acquire))
    }

    /// How many threads stand before the shut gate.
    pub fn waiting(&self) -> u32 {
        self.waiting.load(Ordering::Acquire)
    }

    /// How often threads have gone in, all together, modulo 2^32: whether anything was submitted
    /// between two looks.
    pub fn passes(&self) -> u32 {
        self.lanes().all.iter().fold(0, |sum, lane| sum.wrapping_add(lane.passes.load(Ordering::Relaxed)))
    }

    /// Whether some thread is inside.
    pub fn occupied(&self) -> bool {
        self.lanes().all.iter().any(|lane| lane.inside())
    }
}
