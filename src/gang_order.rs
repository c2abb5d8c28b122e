//! Which of its GPUs a process, or a gang of processes, may ask for, and which it must give up.
//!
//! A process with several GPUs runs only when it has all of them, because any call may use any of them. A *gang* is a set of
//! processes that wait for each other's work, such as the ranks of a training: it runs only when each of them has its GPUs,
//! because else the work of one would hold a GPU and wait for another that cannot run. If two of them took GPUs in any order,
//! each might hold one that the other waits for. So all take GPUs in the same order, by UUID. (Ordered acquisition of locks
//! prevents a circular wait in the same way.) Where several processes of a gang use one GPU, they ask at the same time, and
//! the policy admits all of them or none. A process or a gang
//!
//! - asks for a GPU only while it has all the ones before it ([`GangOrder::may_ask`]), and keeps those meanwhile;
//! - gives up a GPU when it waits for one before it ([`GangOrder::must_give_up`]): because it lost that one, or
//!   because it came to use that one later.
//!
//! So whoever waits for a GPU holds only GPUs that come before it. The holder of that GPU either runs, and its
//! slice ends, or waits for a GPU that comes later still. Such a chain cannot close, and the last one in it waits for
//! no other. [`crate::policy`] has a bound on how long the wait is. A process keeps the GPUs that it has until it has all,
//! because else it would never run beside others that need only one of its GPUs; the same bound says what that costs the
//! others.
//!
//! While the process has some GPUs and waits for the next, its slices on those have not begun. A slice that has begun and
//! loses a later GPU is given up: the process cannot run, so it is idle on the earlier one ([`GangOrder::waits_beyond`]).
//!
//! A process of a gang sees what the others have in memory that they share ([`crate::gang_page`]), a moment after they have it.
//! One may begin just as another one gives up a GPU that it has not used yet. That one sees it and drains with it
//! ([`crate::gang_cut::others_work`]). How the processes stop together is in [`crate::gang_cut`].
//!
//! **What comes next.** While it waits for one GPU the process is idle on the later ones, and will need its memory there as soon as
//! it has the one. So it says when its turn is likely to come ([`GangOrder::expect`], [`crate::policy::turn_comes`]), and is expected on
//! the later ones then ([`GangOrder::asks_at`]), as a client is that is back from a pause. Without that, of three gangs that take turns
//! the memory of the next one would be the first to go on those GPUs, because it has been idle for longest.
//!
//! **Who blocks for ever.** A process that waits for a GPU where a client's work does not end ([`GangOrder::is_blocked`]) does
//! not keep its other GPUs from those who wait for them: that work may be waiting for one of those.
//!
//! This module knows neither gates nor drivers. The shim acts on its answers.

use crate::slot::SlotIndex;
use crate::units::{GpuUuid, MILLISECOND, Nanos};
use std::cmp::Ordering;

/// What a process has of one GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum GpuState {
    /// It has nothing and waits for nothing: idle, or about to be admitted.
    #[default]
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
    /// It is admitted, and some of its memory still comes in: all of it, or what was allocated meanwhile.
    Growing,
    /// It is admitted, and all its memory is in place.
    Ready,
}

/// A GPU, and the slot of a process there.
pub type Seat = (GpuUuid, SlotIndex);

/// What another process of the gang shows of one of its seats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// The seat.
    pub seat: Seat,
    /// What the process has there.
    pub state: GpuState,
    /// It waits there for a client whose work does not end.
    pub blocked: bool,
    /// When its turn is likely to come there, ns, or [`NEXT`](crate::policy::NEXT), if it waits.
    pub turn: Option<Nanos>,
}

/// A forecast that differs from the one before by less than this, ns, is taken for the same, so that nobody is woken for it.
const SAME_FORECAST: Nanos = 10 * MILLISECOND;

/// The GPUs of one process, and those of the other processes of its gang.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct GangOrder {
    /// This process's.
    members: Vec<(Seat, GpuState)>,
    /// The other processes'.
    others: Vec<(Seat, GpuState)>,
    /// The seats that wait for a client whose work does not end.
    blocked: Vec<Seat>,
    /// When the turns of seats that wait are likely to come, ns.
    turns: Vec<(Seat, Nanos)>,
}

impl GangOrder {
    /// An order without GPUs.
    pub const fn new() -> Self {
        Self { members: Vec::new(), others: Vec::new(), blocked: Vec::new(), turns: Vec::new() }
    }

    /// The process begins to use a GPU, where it has this slot.
    pub fn join(&mut self, gpu: GpuUuid, slot: SlotIndex) {
        self.members.push(((gpu, slot), GpuState::Out));
    }

    /// The process no longer uses a GPU.
    pub fn leave(&mut self, gpu: GpuUuid) {
        self.members.retain(|((member, _), _)| *member != gpu);
        self.blocked.retain(|(member, _)| *member != gpu);
        self.turns.retain(|((member, _), _)| *member != gpu);
    }

    /// Writes what the process has of a GPU now. True if that has changed; false also for a GPU that the process does not
    /// use.
    pub fn set(&mut self, gpu: GpuUuid, state: GpuState) -> bool {
        let Some((_, present)) = self.members.iter_mut().find(|((member, _), _)| *member == gpu) else {
            return false;
        };
        std::mem::replace(present, state) != state
    }

    /// Writes what the other processes of the gang show.
    pub fn see(&mut self, others: impl IntoIterator<Item = Seen>) {
        self.others.clear();
        let own = |seat: &Seat| self.members.iter().any(|(member, _)| member == seat);
        self.blocked.retain(own);
        self.turns.retain(|(seat, _)| own(seat));
        for Seen { seat, state, blocked, turn } in others {
            self.others.push((seat, state));
            self.blocked.extend(blocked.then_some(seat));
            self.turns.extend(turn.map(|turn| (seat, turn)));
        }
    }

    /// Writes when the turn of the process on a GPU that it waits for is likely to come, ns, if that is known. True if that has
    /// changed by more than a little.
    pub fn expect(&mut self, gpu: GpuUuid, turn: Option<Nanos>) -> bool {
        let Some(seat) = self.seat(gpu) else { return false };
        let before = self.turn(gpu);
        if let (Some(before), Some(turn)) = (before, turn)
            && before.abs_diff(turn) < SAME_FORECAST
        {
            return false;
        }
        self.turns.retain(|(known, _)| *known != seat);
        self.turns.extend(turn.map(|turn| (seat, turn)));
        before != turn
    }

    /// When the turn of the process on a GPU that it waits for is likely to come, ns, as it was last written.
    pub fn turn(&self, gpu: GpuUuid) -> Option<Nanos> {
        let seat = self.seat(gpu)?;
        self.turns.iter().find(|(known, _)| *known == seat).map(|(_, turn)| *turn)
    }

    /// When the process will ask for a GPU, ns, if it waits for others before it and knows when it is likely to have them: then it
    /// will need its memory there.
    pub fn asks_at(&self, gpu: GpuUuid) -> Option<Nanos> {
        let waits = |seat: &Seat| {
            let mut all = self.members.iter().chain(&self.others);
            seat.0 < gpu && all.any(|(one, state)| one == seat && *state == GpuState::Waiting)
        };
        self.turns.iter().filter(|(seat, _)| waits(seat)).map(|(_, turn)| *turn).max()
    }

    /// Writes whether the process waits for a GPU where a client's work does not end. True if that has changed.
    pub fn block(&mut self, gpu: GpuUuid, blocked: bool) -> bool {
        let Some(seat) = self.seat(gpu) else { return false };
        let before = self.blocked.contains(&seat);
        self.blocked.retain(|known| *known != seat);
        self.blocked.extend(blocked.then_some(seat));
        before != blocked
    }

    /// What the process has of a GPU; [`GpuState::Out`] of one that it does not use.
    pub fn state(&self, gpu: GpuUuid) -> GpuState {
        self.members.iter().find(|((member, _), _)| *member == gpu).map_or(GpuState::Out, |(_, state)| *state)
    }

    fn seat(&self, gpu: GpuUuid) -> Option<Seat> {
        self.members.iter().map(|(seat, _)| *seat).find(|(member, _)| *member == gpu)
    }

    /// The states of all seats on the GPUs on one side of a GPU.
    fn those(&self, gpu: GpuUuid, side: Ordering) -> impl Iterator<Item = GpuState> {
        let all = self.members.iter().chain(&self.others);
        all.filter(move |((other, _), _)| other.cmp(&gpu) == side).map(|(_, state)| *state)
    }

    fn before(&self, gpu: GpuUuid) -> impl Iterator<Item = GpuState> {
        self.those(gpu, Ordering::Less)
    }

    fn after(&self, gpu: GpuUuid) -> impl Iterator<Item = GpuState> {
        self.those(gpu, Ordering::Greater)
    }

    /// Whether the process may ask for a GPU: it has all GPUs before it. Their memory may still come in, so that the GPUs
    /// are filled at the same time.
    pub fn may_ask(&self, gpu: GpuUuid) -> bool {
        self.before(gpu).all(|state| matches!(state, GpuState::Growing | GpuState::Ready))
    }

    /// Whether the process must give up a GPU, or its place in the queue for it: it waits for a GPU before it.
    pub fn must_give_up(&self, gpu: GpuUuid) -> bool {
        self.before(gpu).any(|state| state == GpuState::Waiting)
    }

    /// Whether the process waits for a GPU after this one, so that it cannot use this one.
    pub fn waits_beyond(&self, gpu: GpuUuid) -> bool {
        self.after(gpu).any(|state| state == GpuState::Waiting)
    }

    /// Whether the gang waits, for a GPU other than this one, for a client whose work does not end.
    pub fn is_blocked(&self, gpu: GpuUuid) -> bool {
        let seat = self.seat(gpu);
        self.blocked.iter().any(|blocked| Some(*blocked) != seat)
    }

    /// What the process has of each of its GPUs.
    pub fn members(&self) -> impl Iterator<Item = (Seat, GpuState)> {
        self.members.iter().copied()
    }

    /// Whether the process may run as far as its own GPUs are concerned: of every GPU that it uses, it is admitted or its
    /// drain is paused.
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
