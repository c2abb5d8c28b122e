//! Who is served before whom.

use crate::policy::fair_share::{mean, used_of_turn, virtual_time};
use crate::policy::slice::{turn_length, turn_worth};
use crate::policy::{waiters, waits};
use crate::shares::Priority;
use crate::slot::SlotIndex;
use crate::snapshot::Snapshot;
use crate::units::Nanos;

/// A client's place among those who want the GPU and have no turn that goes on. The least is served first; between equals,
/// the numbers behind it decide, and then the slot.
///
/// Order by lag alone would be as fair, but turns of equals would change places with every millisecond that a turn is
/// shorter than another. So those whose lag is small take their turns in the order in which they came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    /// Its deadline, ns, has passed: the earliest first.
    Late(Nanos, u64, SlotIndex),
    /// It lags by more than a turn and a half: who has had least first, ns of virtual time.
    Behind(Nanos, u64, SlotIndex),
    /// It takes its turns: who came first is first.
    InTurn(u64, SlotIndex),
    /// It is ahead by more than a turn and a half.
    Ahead(Nanos, u64, SlotIndex),
    /// Of low priority: after everybody, until its deadline.
    Low(u64, SlotIndex),
}

/// What a decision compares clients by.
pub(super) struct Order<'a> {
    snapshot: &'a Snapshot,
    /// The mean virtual time, ns.
    mean: Nanos,
    /// A lag up to this, ns of virtual time, is that of one who takes turns.
    tolerance: Nanos,
}

impl<'a> Order<'a> {
    pub fn of(snapshot: &'a Snapshot) -> Self {
        let worth = turn_worth(snapshot);
        Self { snapshot, mean: mean(snapshot, None).unwrap_or(0), tolerance: worth.saturating_add(worth / 2) }
    }

    /// Where a client stands. One that has used up its turn stands behind those who have not, as if it queued now.
    pub fn place(&self, slot: SlotIndex) -> Place {
        let view = self.snapshot.view(slot);
        if waits(view) {
            self.place_of_turn(slot)
        } else if turn_is_over(self.snapshot, slot) {
            self.among_others(slot, u64::MAX, virtual_time(self.snapshot, slot))
        } else {
            self.among_others(slot, view.ticket, view.turn_start)
        }
    }

    /// Where it stands that waits, or stood when its turn began.
    fn place_of_turn(&self, slot: SlotIndex) -> Place {
        let view = self.snapshot.view(slot);
        if view.deadline <= self.snapshot.now {
            return Place::Late(view.deadline, view.ticket, slot);
        }
        self.among_others(slot, view.ticket, view.turn_start)
    }

    fn among_others(&self, slot: SlotIndex, ticket: u64, had: Nanos) -> Place {
        if self.snapshot.view(slot).priority == Priority::Low {
            Place::Low(ticket, slot)
        } else if had < self.mean.saturating_sub(self.tolerance) {
            Place::Behind(had, ticket, slot)
        } else if had > self.mean.saturating_add(self.tolerance) {
            Place::Ahead(had, ticket, slot)
        } else {
            Place::InTurn(ticket, slot)
        }
    }

    /// Whether one who is admitted came before a waiter, or stood before it: it is not in the waiter's way.
    pub fn comes_before(&self, slot: SlotIndex, waiter: SlotIndex) -> bool {
        let ticket = |slot: SlotIndex| (self.snapshot.view(slot).ticket, slot);
        ticket(slot) < ticket(waiter) || self.place_of_turn(slot) < self.place(waiter)
    }

    /// The waiter whose turn is next.
    pub fn first_waiter(&self) -> Option<SlotIndex> {
        waiters(self.snapshot).min_by_key(|slot| self.place(*slot))
    }
}

/// Whether a client that runs, or has just given way, has used up its turn.
pub(super) fn turn_is_over(snapshot: &Snapshot, slot: SlotIndex) -> bool {
    used_of_turn(snapshot, slot) >= turn_length(snapshot, slot)
}
