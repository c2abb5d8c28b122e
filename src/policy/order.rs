//! Who is served before whom.

use crate::policy::fair_share::{mean, used_of_turn, virtual_times};
use crate::policy::slice::Turns;
use crate::policy::{waiters, waits};
use crate::shares::Priority;
use crate::slot::{SLOTS, SlotIndex};
use crate::snapshot::{SlotView, Snapshot};
use crate::units::Nanos;

/// A client's place among those who want the GPU and have no turn that goes on. The least is served first; between equals,
/// the numbers behind it decide, and then the slot.
///
/// Order by lag alone would be as fair, but turns of equals would change places with every millisecond that a turn is
/// shorter than another. So those whose lag is small take their turns in the order in which they came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    class: Class,
    /// What those of one class are compared by.
    by: u64,
    ticket: u64,
    slot: SlotIndex,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    /// Its deadline has passed. By that, ns: the earliest first.
    Late,
    /// It lags by more than a turn and a half. By what it has had, ns of virtual time: the least first.
    Behind,
    /// It takes its turns. By its ticket: who came first is first.
    InTurn,
    /// It is ahead by more than a turn and a half. By what it has had, ns of virtual time.
    Ahead,
    /// Of low priority: after everybody, until its deadline. By its ticket.
    Low,
}

impl Place {
    /// That of one who takes its turns.
    pub fn in_turn(ticket: u64, slot: SlotIndex) -> Self {
        Self { class: Class::InTurn, by: ticket, ticket, slot }
    }
}

/// What a decision compares clients by: computed once for it. Nothing in it depends on whose memory is on the GPU, nor on who
/// is admitted.
#[derive(Debug, Clone)]
pub struct Standing {
    /// How long turns are.
    pub(super) turns: Turns,
    /// What everybody has come to, ns of virtual time, by slot.
    pub(super) virtual_times: [Nanos; SLOTS],
    /// The mean virtual time, ns.
    mean: Nanos,
    /// A lag up to this, ns of virtual time, is that of one who takes turns.
    tolerance: Nanos,
    /// The places of those who want the GPU, by slot.
    pub(super) places: [Option<Place>; SLOTS],
}

impl Standing {
    /// How the clients of a snapshot stand.
    pub fn of(snapshot: &Snapshot) -> Self {
        Self::by_turns(snapshot, Turns::of(snapshot))
    }

    /// How they stand at the moment of a snapshot in which nothing has changed but the time, and whose memory is on the GPU.
    #[must_use]
    pub fn at(&self, snapshot: &Snapshot) -> Self {
        Self::by_turns(snapshot, self.turns)
    }

    fn by_turns(snapshot: &Snapshot, turns: Turns) -> Self {
        let virtual_times = virtual_times(snapshot);
        let tolerance = turns.tolerance();
        let mean = mean(snapshot, &virtual_times, turns.far(), None).unwrap_or(0);
        let mut standing = Self { turns, virtual_times, mean, tolerance, places: [None; SLOTS] };
        for (slot, view) in snapshot.clients().filter(|(_, view)| view.phase.wants_gpu()) {
            standing.places[slot.get()] = Some(standing.place(snapshot, slot, view));
        }
        standing
    }

    /// Where a client stands. One that has used up its turn stands behind those who have not, as if it queued now.
    fn place(&self, snapshot: &Snapshot, slot: SlotIndex, view: &SlotView) -> Place {
        if waits(view) {
            self.place_of_turn(snapshot, slot, view)
        } else if turn_is_over(snapshot, &self.turns, slot) {
            self.among_others(slot, view.priority, u64::MAX, self.virtual_times[slot.get()])
        } else {
            self.among_others(slot, view.priority, view.ticket, view.turn_start)
        }
    }

    /// Where it stands that waits, or stood when its turn began.
    fn place_of_turn(&self, snapshot: &Snapshot, slot: SlotIndex, view: &SlotView) -> Place {
        if view.deadline <= snapshot.now {
            return Place { class: Class::Late, by: view.deadline, ticket: view.ticket, slot };
        }
        self.among_others(slot, view.priority, view.ticket, view.turn_start)
    }

    fn among_others(&self, slot: SlotIndex, priority: Priority, ticket: u64, had: Nanos) -> Place {
        let (class, by) = if priority == Priority::Low {
            (Class::Low, ticket)
        } else if had < self.mean.saturating_sub(self.tolerance) {
            (Class::Behind, had)
        } else if had > self.mean.saturating_add(self.tolerance) {
            (Class::Ahead, had)
        } else {
            (Class::InTurn, ticket)
        };
        Place { class, by, ticket, slot }
    }
}

/// The order in which the clients of a snapshot are served: for whoever asks the policy several questions about it.
#[derive(Debug, Clone, Copy)]
pub struct Order<'a> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) standing: &'a Standing,
    pub(super) waiting: Option<Waiting>,
}

/// Those who wait and are not admitted, as far as a decision names them. Nothing in it depends on whose memory is on the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// The one whose turn is next.
    pub first: SlotIndex,
    /// The one whose turn is last.
    pub last: SlotIndex,
    /// The one whose deadline is the earliest.
    pub hurried: SlotIndex,
}

impl<'a> Order<'a> {
    /// By how the clients of the same snapshot stand.
    pub fn new(snapshot: &'a Snapshot, standing: &'a Standing) -> Self {
        Self::with_hurried(snapshot, standing, hurried(snapshot))
    }

    /// The same, if it is known whose deadline is the earliest of those who wait ([`hurried`]).
    pub fn with_hurried(snapshot: &'a Snapshot, standing: &'a Standing, hurried: Option<SlotIndex>) -> Self {
        let mut order = Self { snapshot, standing, waiting: None };
        let mut places = waiters(snapshot).filter_map(|slot| order.place(slot));
        if let (Some(hurried), Some(one)) = (hurried, places.next()) {
            let (first, last) =
                places.fold((one, one), |(first, last), place| (first.min(place), last.max(place)));
            order.waiting = Some(Waiting { first: first.slot, last: last.slot, hurried });
        }
        order
    }

    /// The same, by those who wait, if they are known.
    pub fn by(snapshot: &'a Snapshot, standing: &'a Standing, waiting: Option<Waiting>) -> Self {
        Self { snapshot, standing, waiting }
    }

    /// Those who wait, if somebody does who is not admitted.
    pub fn waiting(&self) -> Option<Waiting> {
        self.waiting
    }

    /// Where a client stands that wants the GPU.
    pub(super) fn place(&self, slot: SlotIndex) -> Option<Place> {
        self.standing.places[slot.get()]
    }

    /// Whether one who is admitted came before a waiter, or stood before it: it is not in the waiter's way.
    pub(super) fn comes_before(&self, slot: SlotIndex, waiter: SlotIndex) -> bool {
        let ticket = |slot: SlotIndex| (self.snapshot.view(slot).ticket, slot);
        let stood = || self.standing.place_of_turn(self.snapshot, slot, self.snapshot.view(slot));
        ticket(slot) < ticket(waiter) || Some(stood()) < self.place(waiter)
    }

    /// The waiter whose turn is next, if somebody waits who is not admitted.
    pub fn first_waiter(&self) -> Option<SlotIndex> {
        self.waiting.map(|waiting| waiting.first)
    }
}

/// The waiter whose deadline is the earliest, if somebody waits who is not admitted.
pub fn hurried(snapshot: &Snapshot) -> Option<SlotIndex> {
    waiters(snapshot).min_by_key(|slot| hurry(snapshot, *slot))
}

/// By what waiters are compared whose deadlines count: the least is in the greatest hurry.
pub(super) fn hurry(snapshot: &Snapshot, slot: SlotIndex) -> (Nanos, u64, SlotIndex) {
    let view = snapshot.view(slot);
    (view.deadline, view.ticket, slot)
}

/// Whether a client that runs, or has just given way, has used up its turn.
pub(super) fn turn_is_over(snapshot: &Snapshot, turns: &Turns, slot: SlotIndex) -> bool {
    used_of_turn(snapshot, slot) >= turns.length(snapshot.view(slot))
}
