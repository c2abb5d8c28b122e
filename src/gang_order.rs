//! Which of its GPUs a process may ask for, and which it must give up.
//!
//! A process with several GPUs runs only when it has all of them, because any call may use any of them. If two such processes
//! took GPUs in any order, each might hold one that the other waits for. So all processes take GPUs in the same order, by
//! UUID. (Ordered acquisition of locks prevents a circular wait in the same way.) A process
//!
//! - asks for a GPU only while it has all the ones before it ([`GangOrder::may_ask`]), and keeps those meanwhile;
//! - gives up a GPU when it waits for one before it ([`GangOrder::must_give_up`]): because it lost that one, or
//!   because it came to use that one later.
//!
//! So a process that waits for a GPU holds only GPUs that come before it. The process that has that GPU either runs, and its
//! slice ends, or waits for a GPU that comes later still. Such a chain cannot close, and the last process in it waits for
//! no other. [`crate::policy`] has a bound on how long the wait is. A process keeps the GPUs that it has until it has all,
//! because else it would never run beside others that need only one of its GPUs; the same bound says what that costs the
//! others.
//!
//! While the process has some GPUs and waits for the next, its slices on those have not begun. A slice that has begun and
//! loses a later GPU is given up: the process cannot run, so it is idle on the earlier one ([`GangOrder::waits_beyond`]).
//!
//! This module knows neither gates nor drivers. The shim acts on its answers.

use crate::units::GpuUuid;

/// What a process has of one GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GpuState {
    /// It has nothing and waits for nothing: idle, or about to be admitted.
    Out,
    /// It is not admitted any more, and all its memory is still in place: the process waits for its work there.
    Draining,
    /// As [`GpuState::Draining`], but memory that was allocated meanwhile is not in place.
    DrainingIncomplete,
    /// It is not admitted any more, and all its memory is in place. The drain did not come to an end and is paused;
    /// meanwhile the process goes on as if it were admitted.
    DrainPaused,
    /// It has asked for the GPU, and others have it.
    Waiting,
    /// It is admitted; memory that was allocated meanwhile still comes in.
    Growing,
    /// It is admitted, and all its memory is in place.
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

    /// The process no longer uses a GPU.
    pub fn leave(&mut self, gpu: GpuUuid) {
        self.members.retain(|(member, _)| *member != gpu);
    }

    /// Writes what the process has of a GPU now. True if that has changed; false also for a GPU that the process does not
    /// use.
    pub fn set(&mut self, gpu: GpuUuid, state: GpuState) -> bool {
        let Some((_, present)) = self.members.iter_mut().find(|(member, _)| *member == gpu) else {
            return false;
        };
        std::mem::replace(present, state) != state
    }

    /// What the process has of a GPU; [`GpuState::Out`] of one that it does not use.
    pub fn state(&self, gpu: GpuUuid) -> GpuState {
        self.members.iter().find(|(member, _)| *member == gpu).map_or(GpuState::Out, |(_, state)| *state)
    }

    fn before(&self, gpu: GpuUuid) -> impl Iterator<Item = GpuState> {
        self.members.iter().filter(move |(member, _)| *member < gpu).map(|(_, state)| *state)
    }

    fn after(&self, gpu: GpuUuid) -> impl Iterator<Item = GpuState> {
        self.members.iter().filter(move |(member, _)| *member > gpu).map(|(_, state)| *state)
    }

    /// Whether the process may ask for a GPU: it has all GPUs before it.
    pub fn may_ask(&self, gpu: GpuUuid) -> bool {
        self.before(gpu).all(|state| state == GpuState::Ready)
    }

    /// Whether the process must give up a GPU, or its place in the queue for it: it waits for a GPU before it.
    pub fn must_give_up(&self, gpu: GpuUuid) -> bool {
        self.before(gpu).any(|state| state == GpuState::Waiting)
    }

    /// Whether the process waits for a GPU after this one, so that it cannot use this one.
    pub fn waits_beyond(&self, gpu: GpuUuid) -> bool {
        self.after(gpu).any(|state| state == GpuState::Waiting)
    }

    /// Whether the process may run: of every GPU that it uses, it is admitted or its drain is paused.
    pub fn complete(&self) -> bool {
        self.members.iter().all(|(_, state)| matches!(state, GpuState::Ready | GpuState::DrainPaused))
    }

    /// Pauses the drains of all GPUs where memory is in place. If one stands still, they all do, because each waits for the
    /// work of the whole process.
    pub fn pause_drains(&mut self) {
        for (_, state) in &mut self.members {
            if *state == GpuState::Draining {
                *state = GpuState::DrainPaused;
            }
        }
    }
}

// Not under Miri: this module has no unsafe code and no atomics, and its tests search all states, which takes Miri hours.
#[cfg(all(test, not(miri)))]
mod tests;
