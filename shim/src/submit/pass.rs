//! How a thread passes the gate to submit work, and what that costs it.
//!
//! A thread has a *lane* of the gate ([`nvshare::gate`]). The fast path takes two loads and two stores to that lane. The slow
//! path is for a thread without a lane, for a gate that is shut, for flow control ([`crate::submit::flow`]), and for a process
//! whose memory is lost.

use crate::cuda::abi::CuResult;
use crate::submit::gate::gate;
use crate::submit::queue::Queue;
use crate::submit::{flow, gang};
use crate::{state, thread};
use nvshare::gate::Lane;
use std::cell::{Cell, RefCell};
use std::sync::Arc;

thread_local! {
    /// This thread's lane, or null before its first pass. Separate from its owner below, because a plain
    /// pointer can be read without checking whether it is initialised or destroyed.
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

/// Permission to be inside the gate; the thread leaves when it is dropped.
///
/// It is a pointer to the lane, or one byte further if the lane exists only for this pass ([`LATE`]), or [`Pass::OUTSIDE`].
pub struct Pass(*const Lane);

/// A bit of a pass: the lane exists only for this pass, because the thread's thread-locals are destroyed.
const LATE: usize = 1;

impl Pass {
    /// The pass of a call that does not use the gate: in a process without nvshare, or within another call.
    const OUTSIDE: Self = Self(std::ptr::without_provenance(LATE));
}

impl Drop for Pass {
    #[inline]
    fn drop(&mut self) {
        if self.0.addr() & LATE != 0 {
            return self.end_late();
        }
        // SAFETY: the lane exists as long as its thread, and a pass stays in its thread.
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
        // SAFETY: the reference that `own_lane` has leaked for this pass.
        let lane = unsafe { Arc::from_raw(lane) };
        gate().leave(&lane);
        gate().retire(lane);
        thread::call_ends();
    }
}

/// Whether this thread is inside the gate, within a call.
pub fn is_inside() -> bool {
    let lane = LANE.get();
    // SAFETY: the lane exists as long as its thread.
    !lane.is_null() && unsafe { &*lane }.inside()
}

/// Passes the gate to submit work to a queue. Waits while memory is evicted, or while too much work of that queue is in flight.
///
/// # Errors
/// The result that the call must return without being made: memory could not be moved, and data is lost.
#[inline]
pub fn enter(queue: impl Fn() -> Queue) -> Result<Pass, CuResult> {
    match try_enter_fast() {
        Some(pass) => Ok(pass),
        // What the closure has is moved to memory here, and not before the fast path.
        None => enter_slow(&move || flow::pace(queue())),
    }
}

/// Passes the gate for a call that needs memory mapped and submits nothing.
///
/// # Errors
/// As [`enter`].
#[inline]
pub fn enter_query() -> Result<Pass, CuResult> {
    try_enter_fast().map_or_else(|| enter_slow(&|| ()), Ok)
}

/// Passes a gate that is open without a limit, from outside. `None` if the slow path is needed.
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
        // Inside: a call within another call, from a callback of the driver or a library that wraps the driver.
        return Ok(Pass::OUTSIDE);
    }
    if state::driver_has_gone() {
        // The engines have ended, so the gate is not opened any more.
        return Err(CuResult::DEINITIALIZED);
    }
    let (lane, late) = own_lane();
    // SAFETY: a thread's lane exists as long as the thread, and a lane made for this pass as long as the pass.
    gate().enter(unsafe { &*lane }, keep_pace, gang::wake_engines);
    let pass = Pass(lane.map_addr(|address| address | if late { LATE } else { 0 }));
    // A gate that has failed lets every thread in, so that it returns this error.
    state::intact().map(|()| pass)
}

/// This thread's lane, and whether it exists only for this pass, because the thread-locals that would retire it are destroyed.
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
    // Without an owner, the reference is leaked, and the pass gets it back.
    (pointer, lane.map(Arc::into_raw).is_some())
}
