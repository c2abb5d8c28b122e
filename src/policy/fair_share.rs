//! Who has had less than its share: virtual time, as fair queueing has it.
//!
//! A client's *virtual time* is the GPU time that it has had, divided by its weight: whoever is behind the others goes next.
//! GPU time that k clients had at once counts a k-th for each ([`shared`]). The *mean* is the average over those who want
//! the GPU, by weight; a client's *lag* is how far it is behind the mean. Lags add up to nothing, so serving those who lag
//! keeps everybody at its share. (Parekh and Gallager, "A generalized processor sharing approach to flow control", 1993;
//! Stoica and others, "A proportional share resource allocation algorithm for real-time, time-shared systems", 1996, from
//! which mean and lag are taken.)
//!
//! A lag is kept within bounds whenever a client begins to wait ([`enter_queue`]): who was away for an hour comes back with
//! a lag of [`CREDIT`] and no more, and who was served ahead of its share, because it had waited for long, does not owe that
//! for ever.
//!
//! A *turn* is what a client may run before the next one runs. One that is interrupted, for somebody with a lag, keeps its
//! ticket and what is left of its turn ([`end_slice`]).

use crate::page::Phase;
use crate::policy::NOT_BEGUN;
use crate::policy::order::Order;
use crate::policy::slice::{round, times_lighter, turn_length};
use crate::shares::Priority;
use crate::slot::SlotIndex;
use crate::snapshot::{SlotView, Snapshot};
use crate::units::{Nanos, SECOND};
use crate::usage::{self, DEFAULT_WEIGHT};

/// The largest lag that a client comes back with, ns of virtual time.
pub const CREDIT: Nanos = 5 * SECOND;

/// A client with this part of [`CREDIT`] is served at once, and one with less of it the later.
const AT_ONCE: u64 = 4;

/// GPU time as virtual time, ns: a client of [`DEFAULT_WEIGHT`] has one for the other.
fn virtual_of(time: Nanos, weight: u32) -> Nanos {
    let time = u128::from(time) * u128::from(DEFAULT_WEIGHT) / u128::from(usage::weight(weight));
    u64::try_from(time).unwrap_or(u64::MAX)
}

/// When a client's slice began that is not over, ns: it runs, or it grew and fills while its work goes on.
fn slice_begun(view: &SlotView) -> Option<Nanos> {
    let running = matches!(view.phase, Phase::Running | Phase::Filling) && view.slice_start > view.last_ran;
    (running && view.slice_start != NOT_BEGUN).then_some(view.slice_start)
}

/// When the client's present slice, or else its last one, began and ended; `None` if it has had none.
fn last_slice(view: &SlotView, now: Nanos) -> Option<(Nanos, Nanos)> {
    let ended = || (view.slice_start < view.last_ran).then_some((view.slice_start, view.last_ran));
    slice_begun(view).map(|begun| (begun, now)).or_else(ended)
}

/// The GPU time, ns, that the client in `slot` has had in its present slice: while k ran at once, each had a k-th. Of what
/// ran beside it, only the latest slice of each is known: who ran for two short ones counts for the second.
pub(crate) fn shared(snapshot: &Snapshot, slot: SlotIndex) -> Nanos {
    let now = snapshot.now;
    let Some(start) = slice_begun(snapshot.view(slot)).filter(|start| *start < now) else { return 0 };
    let end = now;
    // How many more, or fewer, run from this time on.
    let mut changes = Vec::new();
    for (other, view) in snapshot.clients() {
        if other != slot
            && let Some((from, to)) = last_slice(view, now)
            && from.max(start) < to.min(end)
        {
            changes.extend([(from.max(start), 1i32), (to.min(end), -1)]);
        }
    }
    if changes.is_empty() {
        return end - start;
    }
    changes.sort_unstable();
    let (mut since, mut k, mut had) = (start, 1i32, 0u64);
    for (time, change) in changes {
        had += (time - since) / k.max(1) as u64;
        (since, k) = (time, k + change);
    }
    had + (end - since) / k.max(1) as u64
}

/// What the client in `slot` has come to, ns of virtual time, its present slice included.
pub(crate) fn virtual_time(snapshot: &Snapshot, slot: SlotIndex) -> Nanos {
    let view = snapshot.view(slot);
    view.virtual_time.saturating_add(virtual_of(shared(snapshot, slot), view.weight))
}

/// The mean virtual time of those who want the GPU, by weight, without `except`; `None` if nobody else does.
pub(crate) fn mean(snapshot: &Snapshot, except: Option<SlotIndex>) -> Option<Nanos> {
    let (mut sum, mut weights) = (0u128, 0u128);
    for (slot, view) in snapshot.clients() {
        if Some(slot) != except && view.phase.wants_gpu() {
            let weight = u128::from(usage::weight(view.weight));
            sum += weight * u128::from(virtual_time(snapshot, slot));
            weights += weight;
        }
    }
    (weights > 0).then(|| (sum / weights) as Nanos)
}

/// What a client writes into its slot when it begins to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Its virtual time, brought within bounds, ns.
    pub virtual_time: Nanos,
    /// Its lag, ns of virtual time; 0 for one that takes its turns.
    pub credit: Nanos,
    /// When it should have its slice, ns.
    pub deadline: Nanos,
}

/// What the client in `slot` writes down that begins to wait now.
///
/// Its deadline is at most P away: nothing for high priority; for a normal one D, a setting, and twice a [`round`] of the
/// shortest turns of those who want the GPU; twice all that for low priority. A client that comes from phase Idle, and has not used up a
/// turn since, is served the sooner the more it lags, and at once with a quarter of [`CREDIT`].
pub fn enter_queue(snapshot: &Snapshot, slot: SlotIndex) -> Entry {
    let view = snapshot.view(slot);
    let far = {
        // As one of those who take turns, which it is not yet.
        let mut snapshot = snapshot.clone();
        let view = &mut snapshot.slots[slot.get()];
        (view.phase, view.credit) = (Phase::Waiting, 0);
        farthest(&snapshot, slot)
    };
    let Some(mean) = mean(snapshot, Some(slot)) else {
        let deadline = snapshot.now.saturating_add(distance(view.priority, far, 0));
        return Entry { virtual_time: view.virtual_time, credit: 0, deadline };
    };
    let owes = mean.saturating_add(debt(snapshot, slot, far));
    let virtual_time = view.virtual_time.clamp(mean.saturating_sub(CREDIT), owes);
    let light = view.phase == Phase::Idle || has_credit(view);
    let credit = if light { mean.saturating_sub(virtual_time) } else { 0 };
    let deadline = snapshot.now.saturating_add(distance(view.priority, far, credit));
    Entry { virtual_time, credit, deadline }
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
        .saturating_add(round(snapshot, slot).saturating_mul(2))
}

/// Whether a client came with a lag, and has not used up a turn since: it takes no turns with the others.
pub(super) fn has_credit(view: &SlotView) -> bool {
    view.credit > 0 && view.consecutive_slices == 0
}

/// How far a deadline is away, ns.
fn distance(priority: Priority, far: Nanos, credit: Nanos) -> Nanos {
    let late = CREDIT.saturating_sub(credit.saturating_mul(AT_ONCE));
    let nearer = u128::from(far) * u128::from(late) / u128::from(CREDIT);
    match priority {
        Priority::High => 0,
        Priority::Normal => nearer as Nanos,
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
    let advances = u128::from(far) * u128::from(DEFAULT_WEIGHT) / u128::from(weights.max(1));
    u64::try_from(advances).unwrap_or(u64::MAX)
}

/// What a client writes into its slot when a slice ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SliceEnd {
    /// How long the slice was, ns.
    pub ran: Nanos,
    /// Its virtual time, ns.
    pub virtual_time: Nanos,
    /// What it has used of its turn, ns.
    pub turn_used: i64,
    /// That was all of it.
    pub used_up: bool,
}

/// The slice of the client in `slot` ends now.
pub fn end_slice(snapshot: &Snapshot, slot: SlotIndex) -> SliceEnd {
    let view = snapshot.view(slot);
    let ran = slice_begun(view).map_or(0, |begun| snapshot.now.saturating_sub(begun));
    SliceEnd {
        ran,
        virtual_time: virtual_time(snapshot, slot),
        turn_used: used_of_turn(snapshot, slot) as i64,
        used_up: used_of_turn(snapshot, slot) >= turn_length(snapshot, slot),
    }
}

/// What the client in `slot` has used of its turn, ns, its present slice included.
pub(super) fn used_of_turn(snapshot: &Snapshot, slot: SlotIndex) -> Nanos {
    let view = snapshot.view(slot);
    let ran = slice_begun(view).map_or(0, |begun| snapshot.now.saturating_sub(begun));
    let ran = i64::try_from(ran).unwrap_or(i64::MAX);
    view.turn_used.saturating_add(ran).max(0) as Nanos
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
    let begun = slice_begun(view).filter(|_| view.phase == Phase::Running)?;
    let over =
        snapshot.admitted.contains(slot) && used_of_turn(snapshot, slot) >= turn_length(snapshot, slot);
    let order = Order::of(snapshot);
    let ran = i64::try_from(snapshot.now.saturating_sub(begun)).unwrap_or(i64::MAX);
    let first = order.first_waiter().filter(|_| over)?;
    (order.place(slot) < order.place(first))
        .then(|| NextTurn { turn_start: virtual_time(snapshot, slot), turn_used: -ran })
}
