//! The GPUs of this process together: its gate is open when it has all of them, and work on one may use the
//! memory of another.
//!
//! Each GPU's engine says here what it has ([`GpuState`]), and asks what that means for it ([`nvshare::gang_order`]).
//! Whoever changes a stage rings the other engines: one may ask now, or must give up, or is cut off.
//!
//! **Locks.** [`GANG`] is the innermost: a GPU's map of memory and the set of captures may be held when it
//! is taken, and nothing is waited for while it is held. That the gate opens and shuts under it is what keeps
//! one engine from opening it in the moment in which another GPU's memory goes.

use crate::cuda::abi::CUstream;
use crate::cuda::driver::Driver;
use crate::submit::drain::{CompletionMarker, Streams, WorkBefore};
use crate::submit::gate::gate;
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
    /// What this client has and asks for.
    pub books: Books<MappedPage>,
    /// The streams that may have work.
    pub streams: Arc<Streams>,
}

impl Member {
    /// Wakes the GPU's engine.
    fn wake_engine(&self) {
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
    /// Writes down what the process has of a GPU, shuts or opens the gate, and tells the other engines.
    fn set(&mut self, gpu: GpuUuid, stage: GpuState) {
        if self.order.set(gpu, stage) {
            self.changed(gpu);
        }
    }

    /// What the process has of this GPU has changed, or of others too.
    fn changed(&mut self, gpu: GpuUuid) {
        if self.order.complete() {
            self.begin(gpu);
            gate().open();
        } else if gate().is_open() {
            gate().close();
        }
        self.wake_all_but(gpu);
    }

    /// The process runs from now on, and so do its slices. If it could not run for a while, those of the GPUs
    /// that it had meanwhile begin anew where nobody waits.
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

/// Wakes all engines of the process: something has changed that concerns them all.
pub fn wake_engines() {
    gang().members.iter().for_each(|member| member.wake_engine());
}

/// The process begins to use a GPU. Nobody goes in before it has that one too.
pub fn join(member: Member) {
    let mut gang = gang();
    gang.order.join(member.gpu);
    gang.members.push(member);
    // No GPU of the process is ready whose engine has not said so.
    gate().close();
}

/// The process uses a GPU no more, and no engine is there to ask for it.
pub fn leave(gpu: GpuUuid) {
    let mut gang = gang();
    gang.order.leave(gpu);
    gang.members.retain(|member| member.gpu != gpu);
    gang.wake_all_but(gpu);
    if gang.order.complete() {
        gate().open();
    }
}

/// A GPU is the process's, with all memory in place: it runs, if it has the others too.
pub fn ready(gpu: GpuUuid) {
    gang().set(gpu, GpuState::Ready);
}

/// A GPU that is the process's has more memory now than is in place: nobody more goes in.
pub fn growing(gpu: GpuUuid) {
    let mut gang = gang();
    match gang.order.state(gpu) {
        GpuState::Ready => gang.set(gpu, GpuState::Growing),
        GpuState::Draining | GpuState::DrainPaused => gang.set(gpu, GpuState::DrainingIncomplete),
        // One that was given up fills all that is missing when it comes back.
        _ => {}
    }
}

/// Others have the GPU that the process asked for.
pub fn waiting(gpu: GpuUuid) {
    gang().set(gpu, GpuState::Waiting);
}

/// The process does not have a GPU, and does not wait for it: nobody more goes in.
pub fn out(gpu: GpuUuid) {
    gang().set(gpu, GpuState::Out);
}

/// A GPU is to be given up: nobody more goes in. Its memory is all in place, or not. Those inside may still be there.
pub fn drain(gpu: GpuUuid, incomplete: bool) {
    let mut gang = gang();
    let stage = if incomplete { GpuState::DrainingIncomplete } else { GpuState::Draining };
    if gang.order.set(gpu, stage) {
        gang.wake_all_but(gpu);
    }
    // Also if it is closed already: another engine may be in the middle of closing it, with its barrier still to come.
    gate().close();
}

/// The work of the process on all GPUs is done, as far as a drain that began with [`drain`] knows: the GPU is given up. False
/// if threads were let in meanwhile; then nothing is known.
pub fn drained(gpu: GpuUuid) -> bool {
    let mut gang = gang();
    let is = matches!(gang.order.state(gpu), GpuState::Draining | GpuState::DrainingIncomplete);
    if is {
        gang.set(gpu, GpuState::Out);
    }
    is
}

/// A drain is put off, and with it those of the process's other GPUs: threads go in, if all memory of the process is in
/// place. The caller holds the map of this GPU's memory, in which nothing is missing.
pub fn pause_drain(gpu: GpuUuid) {
    let mut gang = gang();
    gang.order.set(gpu, GpuState::DrainPaused);
    gang.order.pause_drains();
    gang.changed(gpu);
}

/// Whether the process may have work that uses a GPU's memory: it has that one, or is about to give it up.
pub fn has(gpu: GpuUuid) -> bool {
    !matches!(gang().order.state(gpu), GpuState::Out | GpuState::Waiting)
}

/// Whether a drain is put off.
pub fn is_paused(gpu: GpuUuid) -> bool {
    gang().order.state(gpu) == GpuState::DrainPaused
}

/// Whether a GPU is the process's, with all memory in place.
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

/// Marks the present end of all work of the process, on every GPU: a kernel or a copy on one may use memory of
/// another. No capture is open.
pub fn mark() -> CompletionMarker {
    let members = gang().members.clone();
    let marks = members.iter().map(|member| member.streams.mark(member.driver));
    marks.reduce(CompletionMarker::and).unwrap_or_default()
}

/// The same although captures are open, if that can be done: see [`Streams::mark_beside`].
///
/// [`Streams::mark_beside`]: crate::submit::drain::Streams::mark_beside
pub fn mark_beside(before: impl Fn(CUstream) -> WorkBefore) -> Option<CompletionMarker> {
    let members = gang().members.clone();
    let marks = members.iter().map(|member| member.streams.mark_beside(member.driver, &before));
    marks
        .collect::<Option<Vec<_>>>()
        .map(|marks| marks.into_iter().reduce(CompletionMarker::and).unwrap_or_default())
}

/// Whether a mark may be finished although captures are open: see [`Streams::may_mark_defaults`].
///
/// [`Streams::may_mark_defaults`]: crate::submit::drain::Streams::may_mark_defaults
pub fn may_mark_defaults() -> bool {
    let members = gang().members.clone();
    members.iter().all(|member| member.streams.may_mark_defaults(member.driver))
}
