//! The GPUs of this process together: its gate is open when it has all of them, and work on one may use the
//! memory of another.
//!
//! Each GPU's engine says here what it has ([`Stage`]), and asks what that means for it ([`crate::order`]).
//! Whoever changes a stage rings the other engines: one may ask now, or must give up, or is cut off.
//!
//! **Locks.** [`TOGETHER`] is the innermost: a GPU's map of memory and the set of captures may be held when it
//! is taken, and nothing is waited for while it is held. That the gate opens and shuts under it is what keeps
//! one engine from opening it in the moment in which another GPU's memory goes.

use crate::abi::CUstream;
use crate::device::Shared;
use crate::drain::{Mark, WorkBefore};
use crate::order::{Order, Stage};
use crate::session::gate;
use nvshare::units::GpuUuid;
use std::sync::{Arc, Mutex, MutexGuard};

#[derive(Default)]
struct Together {
    order: Order,
    members: Vec<Arc<Shared>>,
}

static TOGETHER: Mutex<Together> = Mutex::new(Together { order: Order::new(), members: Vec::new() });

fn together() -> MutexGuard<'static, Together> {
    TOGETHER.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Together {
    /// Writes down what the process has of a GPU, shuts or opens the gate, and tells the other engines.
    fn set(&mut self, gpu: GpuUuid, stage: Stage) {
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
        self.ring_all_but(gpu);
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
                member.knock();
            }
        }
    }

    fn ring_all_but(&self, gpu: GpuUuid) {
        self.members.iter().filter(|member| member.gpu != gpu).for_each(|member| member.knock());
    }
}

/// Rings all engines of the process: something has changed that concerns them all.
pub fn ring_all() {
    together().members.iter().for_each(|member| member.knock());
}

/// The process begins to use a GPU. Nobody goes in before it has that one too.
pub fn join(shared: Arc<Shared>) {
    let mut together = together();
    together.order.join(shared.gpu);
    together.members.push(shared);
    // No GPU of the process is ready whose engine has not said so.
    gate().close();
}

/// The process uses a GPU no more, and no engine is there to ask for it.
pub fn leave(gpu: GpuUuid) {
    let mut together = together();
    together.order.leave(gpu);
    together.members.retain(|member| member.gpu != gpu);
    together.ring_all_but(gpu);
    if together.order.complete() {
        gate().open();
    }
}

/// A GPU is the process's, with all memory in place: it runs, if it has the others too.
pub fn ready(gpu: GpuUuid) {
    together().set(gpu, Stage::Ready);
}

/// A GPU that is the process's has more memory now than is in place: nobody more goes in.
pub fn growing(gpu: GpuUuid) {
    let mut together = together();
    match together.order.stage(gpu) {
        Stage::Ready => together.set(gpu, Stage::Growing),
        Stage::Draining | Stage::DrainPaused => together.set(gpu, Stage::DrainingIncomplete),
        // One that was given up fills all that is missing when it comes back.
        _ => {}
    }
}

/// Others have the GPU that the process asked for.
pub fn waiting(gpu: GpuUuid) {
    together().set(gpu, Stage::Waiting);
}

/// The process does not have a GPU, and does not wait for it: nobody more goes in.
pub fn out(gpu: GpuUuid) {
    together().set(gpu, Stage::Out);
}

/// A GPU is to be given up: nobody more goes in. Its memory is all in place, or not. Those inside may still be there.
pub fn drain(gpu: GpuUuid, incomplete: bool) {
    let mut together = together();
    let stage = if incomplete { Stage::DrainingIncomplete } else { Stage::Draining };
    if together.order.set(gpu, stage) {
        together.ring_all_but(gpu);
    }
    // Also if it is closed already: another engine may be in the middle of closing it, with its barrier still to come.
    gate().close();
}

/// The work of the process on all GPUs is done, as far as a drain that began with [`drain`] knows: the GPU is given up. False
/// if threads were let in meanwhile; then nothing is known.
pub fn drained(gpu: GpuUuid) -> bool {
    let mut together = together();
    let is = matches!(together.order.stage(gpu), Stage::Draining | Stage::DrainingIncomplete);
    if is {
        together.set(gpu, Stage::Out);
    }
    is
}

/// A drain is put off, and with it those of the process's other GPUs: threads go in, if all memory of the process is in
/// place. The caller holds the map of this GPU's memory, in which nothing is missing.
pub fn pause_drain(gpu: GpuUuid) {
    let mut together = together();
    together.order.set(gpu, Stage::DrainPaused);
    together.order.pause_drains();
    together.changed(gpu);
}

/// Whether the process may have work that uses a GPU's memory: it has that one, or is about to give it up.
pub fn has(gpu: GpuUuid) -> bool {
    !matches!(together().order.stage(gpu), Stage::Out | Stage::Waiting)
}

/// Whether a drain is put off.
pub fn is_paused(gpu: GpuUuid) -> bool {
    together().order.stage(gpu) == Stage::DrainPaused
}

/// Whether a GPU is the process's, with all memory in place.
pub fn is_ready(gpu: GpuUuid) -> bool {
    together().order.stage(gpu) == Stage::Ready
}

/// See [`Order::may_ask`].
pub fn may_ask(gpu: GpuUuid) -> bool {
    together().order.may_ask(gpu)
}

/// See [`Order::must_give_up`].
pub fn must_give_up(gpu: GpuUuid) -> bool {
    together().order.must_give_up(gpu)
}

/// See [`Order::waits_beyond`].
pub fn waits_beyond(gpu: GpuUuid) -> bool {
    together().order.waits_beyond(gpu)
}

/// Marks the present end of all work of the process, on every GPU: a kernel or a copy on one may use memory of
/// another. No capture is open.
pub fn mark() -> Mark {
    let members = together().members.clone();
    let marks = members.iter().map(|member| member.streams.mark(member.driver));
    marks.reduce(Mark::and).unwrap_or_default()
}

/// The same although captures are open, if that can be done: see [`Streams::mark_beside`].
///
/// [`Streams::mark_beside`]: crate::drain::Streams::mark_beside
pub fn mark_beside(before: impl Fn(CUstream) -> WorkBefore) -> Option<Mark> {
    let members = together().members.clone();
    let marks = members.iter().map(|member| member.streams.mark_beside(member.driver, &before));
    marks.collect::<Option<Vec<_>>>().map(|marks| marks.into_iter().reduce(Mark::and).unwrap_or_default())
}

/// Whether a mark may be finished although captures are open: see [`Streams::may_mark_defaults`].
///
/// [`Streams::may_mark_defaults`]: crate::drain::Streams::may_mark_defaults
pub fn may_mark_defaults() -> bool {
    let members = together().members.clone();
    members.iter().all(|member| member.streams.may_mark_defaults(member.driver))
}
