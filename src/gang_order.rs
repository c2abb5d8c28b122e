//! Which of its GPUs a process may ask for, and which it must give up: all of them, or none for long.
//!
//! A process with several GPUs runs only when it has all of them, because any call may use any of them. If two
//! such processes took what they could get, each might hold what the other waits for. So there is one order,
//! the same in every process: by UUID. A process
//!
//! - asks for a GPU only while it has all the ones before it ([`GangOrder::may_ask`]), and keeps those meanwhile;
//! - gives up a GPU when it waits for one before it ([`GangOrder::must_give_up`]): because it lost that one, or
//!   because it came to use that one later.
//!
//! So whoever waits for a GPU holds only GPUs that come before it, and whom it waits for either runs, and has
//! a slice that ends, or waits for a GPU that comes later still. Such a chain cannot close, and who is last in
//! it waits for nobody. How long it can be is reckoned in [`crate::policy`]. That a process keeps what it
//! has until it has all is what makes it run at all, beside others that need only one of its GPUs; what it
//! costs them is the same reckoning.
//!
//! While it has some and waits for the next, its slices on those have not begun. One that has begun is not
//! worth keeping once a later GPU is lost: the process cannot run, so it is idle there
//! ([`GangOrder::waits_beyond`]).
//!
//! This module knows nothing of gates and drivers: the shim acts on it.

use crate::units::GpuUuid;

/// What a process has of one GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GpuState {
    /// Nothing, and waits for nothing: idle, or just being let in.
    Out,
    /// The right to it has ended, and all its memory is still in place: the process waits for its work there.
    Draining,
    /// The same, but memory that was allocated meanwhile is not in place.
    DrainingIncomplete,
    /// The right to it has ended, and all its memory is in place: the drain did not come to an end, and is put off. Until
    /// then the process goes on as if it had it.
    DrainPaused,
    /// Asked for it, and others have it.
    Waiting,
    /// The right to it; memory that was allocated meanwhile still comes in.
    Growing,
    /// The right to it, and all memory in place.
    Ready,
}

/// The GPUs of one process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct GangOrder {
    members: Vec<(GpuUuid, GpuState)>,
}

impl GangOrder {
    /// An order without GPUs.
    pub const fn new() -> Self {
        Self { members: Vec::new() }
    }

    /// The process begins to use a GPU.
    pub fn join(&mut self, gpu: GpuUuid) {
        self.members.push((gpu, GpuState::Out));
        self.members.sort_unstable_by_key(|(gpu, _)| *gpu);
    }

    /// The process uses a GPU no more.
    pub fn leave(&mut self, gpu: GpuUuid) {
        self.members.retain(|(member, _)| *member != gpu);
    }

    /// Says what the process has of a GPU now. True if that is something else than before.
    pub fn set(&mut self, gpu: GpuUuid, stage: GpuState) -> bool {
        let Some((_, present)) = self.members.iter_mut().find(|(member, _)| *member == gpu) else {
            return false;
        };
        std::mem::replace(present, stage) != stage
    }

    /// What the process has of a GPU.
    pub fn stage(&self, gpu: GpuUuid) -> GpuState {
        self.members.iter().find(|(member, _)| *member == gpu).map_or(GpuState::Out, |(_, stage)| *stage)
    }

    fn before(&self, gpu: GpuUuid) -> impl Iterator<Item = GpuState> {
        self.members.iter().filter(move |(member, _)| *member < gpu).map(|(_, stage)| *stage)
    }

    fn after(&self, gpu: GpuUuid) -> impl Iterator<Item = GpuState> {
        self.members.iter().filter(move |(member, _)| *member > gpu).map(|(_, stage)| *stage)
    }

    /// Whether the process may ask for a GPU: it has all before it.
    pub fn may_ask(&self, gpu: GpuUuid) -> bool {
        self.before(gpu).all(|stage| stage == GpuState::Ready)
    }

    /// Whether the process must give up a GPU, or its place in the queue for it: it waits for one before it.
    pub fn must_give_up(&self, gpu: GpuUuid) -> bool {
        self.before(gpu).any(|stage| stage == GpuState::Waiting)
    }

    /// Whether the process waits for a GPU after this one, so that it cannot use this one.
    pub fn waits_beyond(&self, gpu: GpuUuid) -> bool {
        self.after(gpu).any(|stage| stage == GpuState::Waiting)
    }

    /// Whether the process may run: it has every GPU that it uses, or has not been able to give it up yet.
    pub fn complete(&self) -> bool {
        self.members.iter().all(|(_, stage)| matches!(stage, GpuState::Ready | GpuState::DrainPaused))
    }

    /// Puts off the drains of all GPUs where memory is in place: one stands still, so they all do, because each waits for
    /// the work of the whole process.
    pub fn pause_drains(&mut self) {
        for (_, stage) in &mut self.members {
            if *stage == GpuState::Draining {
                *stage = GpuState::DrainPaused;
            }
        }
    }
}

#[cfg(test)]
mod tests;
