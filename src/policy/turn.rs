//! Turns: what a client writes into its slot when it begins to wait, when a slice ends, and when it runs on.
//!
//! A *turn* is what a client may run before the next one runs. One that is interrupted, for somebody with a lag, keeps its
//! ticket and what is left of its turn ([`end_slice`]).
//!
//! A lag is kept within bounds whenever a client begins to wait ([`enter_queue`]): who was away for an hour comes back with
//! a lag of [`CREDIT`] and no more, and who was served ahead of its share, because it had waited for long, does not owe that
//! for ever.

use crate::page::Phase;
use crate::policy::fair_share::{
    mean, ran, shared, slice_begun, used_of_turn, virtual_in_slice, virtual_times,
};
use crate::policy::order::{Order, Standing, turn_is_over};
use crate::policy::slice::{Turns, quantum, times_lighter};
use crate::shares::Priority;
use crate::slot::{SLOTS, SlotIndex};
use crate::snapshot::{SlotView, Snapshot};
use crate::units::{Nanos, SECOND, scaled};
use crate::usage::{self, virtual_of};

/// The largest lag that a client comes back with, ns of virtual time.
pub const CREDIT: Nanos = 5 * SECOND;

/// Who lags by less than this takes turns with the others, ns of virtual time.
const LEAST_CREDIT: Nanos = CREDIT / 16;

/// A client that lags by so much is served at once, ns of virtual time, and one that lags by less the later. Where a switch
/// to it is worth less than that, its [`quantum`] takes the place of this.
const AT_ONCE: Nanos = CREDIT / 4;

/// What a client writes into its slot when it begins to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Its virtual time, brought within bounds, ns.
    pub virtual_time: Nanos,
    /// Its lag, or what is left of a credit, ns of virtual time; 0 for one that takes its turns.
    pub credit: Nanos,
    /// When it should have its slice, ns.
    pub deadline: Nanos,
}

/// What the client in `slot` writes down that begins to wait now.
///
/// Its deadline is at most P away: nothing for high priority; for a normal one D, a setting, and twice a round of the
/// shortest turns of those who want the GPU; twice all that for low priority. A client that comes from phase Idle and has a
/// credit has a nearer deadline, and one whose credit is a quarter of [`CREDIT`], or what a switch to it is worth, has it now.
///
/// A *newcomer*, which has not had the GPU yet, begins at the mean: it has missed nothing. It has a credit all the same, so that
/// somebody who opens a notebook is served at once. That moves its deadlines alone. With a lag instead, those who came
/// before would be ahead of it for as long, and light users among them would wait.
pub fn enter_queue(snapshot: &Snapshot, slot: SlotIndex) -> Entry {
    let view = snapshot.view(slot);
    let far = {
        // As one of those who take turns, which it is not yet.
        let mut snapshot = snapshot.clone();
        let view = &mut snapshot.slots[slot.get()];
        (view.phase, view.credit) = (Phase::Waiting, 0);
        farthest(&snapshot, slot)
    };
    let newcomer = is_newcomer(view);
    let times = virtual_times(snapshot);
    let Some(mean) = mean(snapshot, &times, Turns::of(snapshot).far(), Some(slot)) else {
        let deadline = snapshot.now.saturating_add(distance(view.priority, far, 0, AT_ONCE));
        let virtual_time = if newcomer { farthest_ahead(snapshot, &times, slot) } else { view.virtual_time };
        return Entry { virtual_time, credit: 0, deadline };
    };
    let debt = debt(snapshot, slot, far);
    // Who has waited all the time keeps its lag: it was not away.
    let lag = if view.phase == Phase::Idle { CREDIT } else { debt.max(CREDIT) };
    let bounds = (mean.saturating_sub(lag), mean.saturating_add(debt));
    let virtual_time = if newcomer { mean } else { view.virtual_time.clamp(bounds.0, bounds.1) };
    let light = view.phase == Phase::Idle || view.has_credit();
    let left = if newcomer { newcomers_credit(snapshot, slot) } else { credit_left(view) };
    let credit = mean.saturating_sub(virtual_time).max(left);
    let credit = if light && credit >= LEAST_CREDIT { credit.min(CREDIT) } else { 0 };
    let at_once = quantum(snapshot, slot).min(AT_ONCE);
    let deadline = snapshot.now.saturating_add(distance(view.priority, far, credit, at_once));
    Entry { virtual_time, credit, deadline }
}

/// Whether a client has not had the GPU yet.
fn is_newcomer(view: &SlotView) -> bool {
    view.slice_start == 0
}

/// The credit of the newcomer in `slot`, ns: as much as somebody has run who wants the GPU, at most [`CREDIT`]. Those who begin at
/// the same time are equals, and take turns from the first one on.
fn newcomers_credit(snapshot: &Snapshot, slot: SlotIndex) -> Nanos {
    let others = snapshot.clients().filter(|(other, view)| *other != slot && view.phase.wants_gpu());
    let has_run = |(other, view): (SlotIndex, &SlotView)| {
        if view.consecutive_slices > 0 { CREDIT } else { used_of_turn(snapshot, other).min(CREDIT) }
    };
    others.map(has_run).max().unwrap_or(0)
}

/// What is left of the credit that a client came with, ns of virtual time: it uses it up as it runs. What it lags by is as much or
/// more, unless it came as a newcomer.
fn credit_left(view: &SlotView) -> Nanos {
    let used = view.virtual_time.saturating_sub(view.turn_start);
    if view.has_credit() { view.credit.saturating_sub(used) } else { 0 }
}

/// What the client has come to, other than the one in `slot`, that has had most, ns of virtual time. While nobody wants the GPU,
/// that is where a newcomer begins, as start-time fair queueing has it: nobody is ahead of it then.
fn farthest_ahead(snapshot: &Snapshot, times: &[Nanos; SLOTS], slot: SlotIndex) -> Nanos {
    let others = snapshot.clients().filter(|(other, _)| *other != slot);
    others.map(|(other, _)| times[other.get()]).max().unwrap_or(0)
}

/// How far the deadline of a client of normal priority is away at most, ns: D, and twice a round of the others' shortest turns,
/// so that deadlines bind nobody who takes its turns. For one whose weight is less than a tenth of the largest, D counts up
/// to ten times: one turn in such a time is more than its share.
fn farthest(snapshot: &Snapshot, slot: SlotIndex) -> Nanos {
    let times = times_lighter(snapshot, slot);
    snapshot
        .settings
        .deadline
        .saturating_mul(u64::from(times))
        .saturating_add(Turns::of(snapshot).round(snapshot, slot).saturating_mul(2))
}

/// How far a deadline is away, ns: the less the more credit there is, and nothing with `at_once` of it.
fn distance(priority: Priority, far: Nanos, credit: Nanos, at_once: Nanos) -> Nanos {
    let at_once = at_once.max(1);
    match priority {
        Priority::High => 0,
        Priority::Normal => scaled(far, at_once.saturating_sub(credit), at_once),
        Priority::Low => far.saturating_mul(2),
    }
}

/// How far a client may be ahead of the mean that begins to wait, ns of virtual time: what the mean advances by until its
/// deadline. Then it is served in any case, and owing more would change nothing but the mean.
fn debt(snapshot: &Snapshot, slot: SlotIndex, far: Nanos) -> Nanos {
    let weights: u64 = snapshot
        .clients()
        .filter(|(other, view)| *other != slot && view.phase.wants_gpu())
        .map(|(_, view)| u64::from(usage::weight(view.weight)))
        .sum();
    virtual_of(far, weights)
}

/// What a client writes into its slot when a slice ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SliceEnd {
    /// How long the slice was, ns.
    pub ran: Nanos,
    /// The GPU time that it is charged with, ns.
    pub charged: Nanos,
    /// Its virtual time, ns.
    pub virtual_time: Nanos,
    /// What it has used of its turn, ns.
    pub turn_used: i64,
    /// That was all of it.
    pub used_up: bool,
}

/// What is known of a slice beside how long it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Spent {
    /// The GPU time that the client has had in it, ns, if that was measured: while clients take compute turns it is
    /// ([`crate::turns`]).
    pub measured: Option<Nanos>,
    /// For how long the client had no work, and nobody needed the GPU, ns. It cost nobody anything, and is not charged.
    pub unused: Nanos,
}

/// The slice of the client in `slot` ends now. What nobody has measured is taken to be its part by weight of the time in which
/// several ran, as if all of them had been as busy.
pub fn end_slice(snapshot: &Snapshot, slot: SlotIndex, spent: Spent) -> SliceEnd {
    let (view, ran) = (snapshot.view(slot), ran(snapshot, slot));
    let used = ran.saturating_sub(spent.unused);
    let of_used = |time| if used < ran { scaled(time, used, ran) } else { time };
    let weight = u64::from(usage::weight(view.weight));
    let (charged, virtually) = match spent.measured {
        Some(time) => (time.min(used), virtual_of(time.min(used), weight)),
        None => (of_used(shared(snapshot, slot)), of_used(virtual_in_slice(snapshot, slot))),
    };
    SliceEnd {
        ran,
        charged,
        virtual_time: view.virtual_time.saturating_add(virtually),
        turn_used: used_of_turn(snapshot, slot) as i64,
        used_up: turn_is_over(snapshot, &Turns::of(snapshot), slot),
    }
}

/// What a client writes into its slot whose next turn begins within its slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextTurn {
    /// Its virtual time now, ns.
    pub turn_start: Nanos,
    /// What it had used of the turn before its slice, ns: less than nothing.
    pub turn_used: i64,
}

/// The next turn of the client in `slot`, if it has used up the one before, still runs, and stands before all who wait:
/// it lags, and there would be nothing in a switch to somebody who doesn't.
pub fn next_turn(snapshot: &Snapshot, slot: SlotIndex) -> Option<NextTurn> {
    let view = snapshot.view(slot);
    let runs =
        view.phase == Phase::Running && slice_begun(view).is_some() && snapshot.admitted.contains(slot);
    let standing = Standing::of(snapshot);
    if !runs || !turn_is_over(snapshot, &standing.turns, slot) {
        return None;
    }
    let ran = i64::try_from(ran(snapshot, slot)).unwrap_or(i64::MAX);
    let order = Order::new(snapshot, &standing);
    let first = order.first_waiter()?;
    (order.place(slot) < order.place(first))
        .then(|| NextTurn { turn_start: standing.virtual_times[slot.get()], turn_used: -ran })
}

/// How many turns a client has used up one after the other when a slice of it has ended; `before` that they were so many. It
/// has `more` to do or not, and its turn is `over` or was interrupted.
#[must_use]
pub fn turns_in_a_row(before: u32, more: bool, over: bool) -> u32 {
    match (more, over) {
        (true, true) => before.saturating_add(1),
        (true, false) => before,
        (false, _) => 0,
    }
}

/// The GPU time with which the client in `slot` is charged for its slice so far, ns.
pub fn charged(snapshot: &Snapshot, slot: SlotIndex) -> Nanos {
    shared(snapshot, slot)
}
