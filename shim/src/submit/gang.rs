//! The GPUs of this process as a gang: the process's gate is open when it has all of them, because work on one GPU may use the
//! memory of another.
//!
//! Each GPU's engine records its state here ([`GpuState`]), and asks what it may do ([`nvshare::gang_order`]).
//! A change of state rings the doorbells of the other engines: one may now ask for its GPU, or must give it up.
//!
//! **Locks.** [`GANG`] is the innermost lock: a GPU's map of memory and the set of captures may be held when it
//! is taken, and no thread blocks while it holds it. The gate is opened and shut under it, so that
//! no engine can open the gate at the moment when another GPU's memory is evicted.

use crate::cuda::abi::CUstream;
use crate::cuda::driver::Driver;
use crate::submit::drain::{CompletionMarker, Streams, WorkBefore};
use crate::submit::gate::gate;
use crate::submit::turn;
use nvshare::Books;
use nvshare::gang_order::{GangOrder, GpuState};
use nvshare::map::MappedPage;
use nvshare::units::GpuUuid;
use std::sync::{Arc, Mutex, MutexGuard};

/// What the gang needs of a GPU of the process.
#[derive(Clone)]
pub struct Member {
    /// The GPU.
    pub gpu: GpuUuid,
    /// The driver.
    pub driver: &'static Driver,
    /// The client's accounts.
    pub books: Books<MappedPage>,
    /// The streams that may have work.
    pub streams: Arc<Streams>,
}

impl Member {
    /// Wakes the GPU's engine.
    pub fn wake_engine(&self) {
        self.books.page().ring(self.books.slot());
    }
}

#[derive(Default)]
struct Gang {
    order: GangOrder,
    members: Vec<Member>,
}

static GANG: Mutex<Gang> = Mutex::new(Gang { order: GangOrder::new(), members: Vec::new() });

fn gang() -> MutexGuard<'static, Gang> {
    nvshare::sync::lock(&GANG)
}

impl Gang {
    /// Sets the state of a GPU, opens or shuts the gate accordingly, and wakes the other engines.
    fn set(&mut self, gpu: GpuUuid, stage: GpuState) {
        if self.order.set(gpu, stage) {
            self.changed(gpu);
        }
    }

    /// Opens or shuts the gate after the state of this GPU, and perhaps of others, has changed, and wakes the other engines.
    fn changed(&mut self, gpu: GpuUuid) {
        if self.order.complete() {
            self.begin(gpu);
            gate().open();
        } else if gate().is_open() {
            shut_gate();
        }
        self.wake_all_but(gpu);
    }

    /// The process runs from now on: begins its slices. A slice that has begun earlier on a GPU that the process kept while it
    /// could not run begins again if no client waits there.
    fn begin(&self, gpu: GpuUuid) {
        if self.members.iter().all(|member| member.books.slice_has_begun()) {
            return;
        }
        for member in &self.members {
            if !member.books.begin_slice() {
                member.books.renew_slice();
            }
            if member.gpu != gpu {
                member.wake_engine();
            }
        }
    }

    fn wake_all_but(&self, gpu: GpuUuid) {
        self.members.iter().filter(|member| member.gpu != gpu).for_each(|member| member.wake_engine());
    }
}

fn shut_gate() {
    gate().close();
    turn::gate_shut();
}

/// Whether this is the only GPU of the process.
pub fn is_alone(gpu: GpuUuid) -> bool {
    gang().members.iter().all(|member| member.gpu == gpu)
}

/// Wakes all engines of the process.
pub fn wake_engines() {
    gang().members.iter().for_each(|member| member.wake_engine());
}

/// Adds a GPU to the gang. The gate stays shut until the process has this one too.
pub fn join(member: Member) {
    let mut gang = gang();
    gang.order.join(member.gpu);
    gang.members.push(member);
    // A GPU is not ready until its engine has said so.
    shut_gate();
}

/// Removes a GPU from the gang, because its engine has ended.
pub fn leave(gpu: GpuUuid) {
    let mut gang = gang();
    gang.order.leave(gpu);
    gang.members.retain(|member| member.gpu != gpu);
    gang.wake_all_but(gpu);
    if gang.order.complete() {
        gate().open();
    }
    // After an error the gate lets everybody in.
    turn::gate_shut();
}

/// The process has a GPU with all memory in place. It runs if it has its other GPUs too.
pub fn ready(gpu: GpuUuid) {
    gang().set(gpu, GpuState::Ready);
}

/// Some memory on a GPU that the process has is not in place: shuts the gate.
pub fn growing(gpu: GpuUuid) {
    let mut gang = gang();
    match gang.order.state(gpu) {
        GpuState::Ready => gang.set(gpu, GpuState::Growing),
        GpuState::Draining | GpuState::DrainPaused => gang.set(gpu, GpuState::DrainingIncomplete),
        // A GPU that was given up gets all missing memory when it is filled again.
        _ => {}
    }
}

/// The process waits for a GPU that other clients have.
pub fn waiting(gpu: GpuUuid) {
    gang().set(gpu, GpuState::Waiting);
}

/// The process neither has a GPU nor waits for it: shuts the gate.
pub fn out(gpu: GpuUuid) {
    gang().set(gpu, GpuState::Out);
}

/// The process drains a GPU: shuts the gate; threads may still be inside. `incomplete` says that some of its memory is not in
/// place.
pub fn drain(gpu: GpuUuid, incomplete: bool) {
    let mut gang = gang();
    let stage = if incomplete { GpuState::DrainingIncomplete } else { GpuState::Draining };
    if gang.order.set(gpu, stage) {
        gang.wake_all_but(gpu);
    }
    // Also if it is shut already: another engine may be shutting it and not have executed its memory barrier yet.
    shut_gate();
}

/// A drain that began with [`drain`] has found all work done: the GPU is given up. False if threads were let in meanwhile, so
/// that there may be new work.
pub fn drained(gpu: GpuUuid) -> bool {
    let mut gang = gang();
    let is = matches!(gang.order.state(gpu), GpuState::Draining | GpuState::DrainingIncomplete);
    if is {
        gang.set(gpu, GpuState::Out);
    }
    is
}

/// Pauses a drain, and with it those of the process's other GPUs: the gate opens if all memory of the process is in
/// place. The caller holds the lock of this GPU's map, in which no memory is missing.
pub fn pause_drain(gpu: GpuUuid) {
    let mut gang = gang();
    gang.order.set(gpu, GpuState::DrainPaused);
    gang.order.pause_drains();
    gang.changed(gpu);
}

/// Whether the process may have work that uses a GPU's memory: it has the GPU, or is draining it.
pub fn has(gpu: GpuUuid) -> bool {
    !matches!(gang().order.state(gpu), GpuState::Out | GpuState::Waiting)
}

/// Whether the drain of a GPU is paused.
pub fn is_paused(gpu: GpuUuid) -> bool {
    gang().order.state(gpu) == GpuState::DrainPaused
}

/// Whether the process has a GPU with all memory in place.
pub fn is_ready(gpu: GpuUuid) -> bool {
    gang().order.state(gpu) == GpuState::Ready
}

/// See [`GangOrder::may_ask`].
pub fn may_ask(gpu: GpuUuid) -> bool {
    gang().order.may_ask(gpu)
}

/// See [`GangOrder::must_give_up`].
pub fn must_give_up(gpu: GpuUuid) -> bool {
    gang().order.must_give_up(gpu)
}

/// See [`GangOrder::waits_beyond`].
pub fn waits_beyond(gpu: GpuUuid) -> bool {
    gang().order.waits_beyond(gpu)
}

/// Marks the end of all work of the process so far on every GPU, because work on one may use memory of
/// another. No capture may be open.
pub fn mark() -> CompletionMarker {
    let members = gang().members.clone();
    let marks = members.iter().map(|member| member.streams.mark(member.driver));
    marks.reduce(CompletionMarker::and).unwrap_or_default()
}

/// The same although captures are open, if possible: see [`Streams::mark_beside`].
///
/// [`Streams::mark_beside`]: crate::submit::drain::Streams::mark_beside
pub fn mark_beside(before: impl Fn(CUstream) -> WorkBefore) -> Option<CompletionMarker> {
    let members = gang().members.clone();
    let marks = members.iter().map(|member| member.streams.mark_beside(member.driver, &before));
    marks
        .collect::<Option<Vec<_>>>()
        .map(|marks| marks.into_iter().reduce(CompletionMarker::and).unwrap_or_default())
}

/// Whether the second step of a marker is possible although captures are open: see [`Streams::may_mark_defaults`].
///
/// [`Streams::may_mark_defaults`]: crate::submit::drain::Streams::may_mark_defaults
pub fn may_mark_defaults() -> bool {
    let members = gang().members.clone();
    members.iter().all(|member| member.streams.may_mark_defaults(member.driver))
}
