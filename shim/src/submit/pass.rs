//! How a thread passes the gate to submit work, and what that costs it.
//!
//! A thread has a *lane* of the gate ([`nvshare::gate`]). The fast way in is two loads and two stores to that lane. The slow way
//! is for a thread without a lane, for a gate that is shut, for flow control ([`crate::submit::flow`]), and for a process whose
//! memory is lost.

use crate::cuda::abi::CuResult;
use crate::submit::gate::gate;
use crate::submit::queue::Queue;
use crate::submit::{flow, gang};
use crate::{state, thread};
use nvshare::gate::Lane;
use std::cell::{Cell, RefCell};
use std::sync::Arc;

thread_local! {
    /// This thread's lane, or null before its first pass. Apart from its owner below, because a plain
    /// pointer can be read without asking whether it was initialised or destroyed.
    static LANE: Cell<*const Lane> = const { Cell::new(std::ptr::null()) };
    static OWNER: RefCell<Option<LaneOwner>> = const { RefCell::new(None) };
}

struct LaneOwner(Arc<Lane>);

impl Drop for LaneOwner {
    fn drop(&mut self) {
        LANE.set(std::ptr::null());
        gate().retire(self.0.clone());
    }
}

/// Leave to be inside; ends when dropped.
///
/// Points to a lane; or one byte further, if the lane ends with the pass; or is [`Pass::OUTSIDE`].
pub struct Pass(*const Lane);

/// A bit of a pass: a thread whose thread-locals are gone has a lane for each pass.
const LATE: usize = 1;

impl Pass {
    /// Of a call that the gate does not hold: in a process without nvshare, or in the middle of another call.
    const OUTSIDE: Self = Self(std::ptr::without_provenance(LATE));
}

impl Drop for Pass {
    #[inline]
    fn drop(&mut self) {
        if self.0.addr() & LATE != 0 {
            return self.end_late();
        }
        // SAFETY: the lane lives as long as its thread, and a pass stays in its thread.
        gate().leave(unsafe { &*self.0 });
    }
}

impl Pass {
    #[cold]
    #[inline(never)]
    fn end_late(&self) {
        let lane = self.0.map_addr(|address| address & !LATE);
        if lane.is_null() {
            return;
        }
        LANE.set(std::ptr::null());
        // SAFETY: the reference that `own_lane` keeps for this pass alone.
        let lane = unsafe { Arc::from_raw(lane) };
        gate().leave(&lane);
        gate().retire(lane);
        thread::call_ends();
    }
}

/// Whether this thread is inside the gate, in the middle of a call.
pub fn is_inside() -> bool {
    let lane = LANE.get();
    // SAFETY: the lane lives as long as its thread.
    !lane.is_null() && unsafe { &*lane }.inside()
}

/// Goes through the gate to submit work to a queue of the GPU's, waiting while memory is out, or while too much of that queue's
/// work is in flight.
///
/// # Errors
/// What the driver's call must return instead: memory could not be moved, and data is lost.
#[inline]
pub fn enter(queue: impl Fn() -> Queue) -> Result<Pass, CuResult> {
    try_enter_fast().map_or_else(|| enter_slow(&|| flow::pace(queue())), Ok)
}

/// Goes through the gate for a call that wants memory mapped and submits nothing.
///
/// # Errors
/// As [`enter`].
#[inline]
pub fn enter_query() -> Result<Pass, CuResult> {
    try_enter_fast().map_or_else(|| enter_slow(&|| ()), Ok)
}

/// Through a gate that is open to all, from outside.
#[inline]
fn try_enter_fast() -> Option<Pass> {
    let lane = LANE.get();
    if !lane.is_null() {
        // SAFETY: as above.
        let inside = unsafe { &*lane };
        if !inside.inside() && gate().try_enter(inside) {
            return Some(Pass(lane));
        }
    }
    None
}

#[cold]
#[inline(never)]
fn enter_slow(keep_pace: &dyn Fn()) -> Result<Pass, CuResult> {
    if !state::enabled() || is_inside() {
        // Inside: a call within a call, of a driver callback or of a library that wraps the driver.
        return Ok(Pass::OUTSIDE);
    }
    if state::driver_has_gone() {
        // Nobody opens the gate any more.
        return Err(CuResult::DEINITIALIZED);
    }
    let (lane, late) = own_lane();
    // SAFETY: a lane of this thread's lives as long as the thread, and one that ends with the pass at least as long.
    gate().enter(unsafe { &*lane }, keep_pace, gang::wake_engines);
    let pass = Pass(lane.map_addr(|address| address | if late { LATE } else { 0 }));
    // A gate that has failed lets everybody in, to be told so here.
    state::intact().map(|()| pass)
}

/// This thread's lane, and whether it ends with the pass: nobody would give it back, because the thread-locals are gone.
fn own_lane() -> (*const Lane, bool) {
    let known = LANE.get();
    if !known.is_null() {
        return (known, false);
    }
    let lane = gate().lane();
    let pointer = Arc::as_ptr(&lane);
    LANE.set(pointer);
    let mut lane = Some(lane);
    let _ = OWNER.try_with(|owner| *owner.borrow_mut() = lane.take().map(LaneOwner));
    // Without an owner, the pass keeps the reference.
    (pointer, lane.map(Arc::into_raw).is_some())
}
