//! Who has had less than its share: virtual time, as fair queueing has it.
//!
//! A client's *virtual time* is the GPU time that it has had, divided by its weight: whoever is behind the others goes next.
//! GPU time that k clients had at once counts a k-th for each ([`shared`]). The *mean* is the average over those who want
//! the GPU, by weight; a client's *lag* is how far it is behind the mean. Lags add up to nothing, so serving those who lag
//! keeps everybody at its share. (Parekh and Gallager, "A generalized processor sharing approach to flow control", 1993;
//! Stoica and others, "A proportional share resource allocation algorithm for real-time, time-shared systems", 1996, from
//! which mean and lag are taken.)

use crate::page::Phase;
use crate::policy::NOT_BEGUN;
use crate::slot::SlotIndex;
use crate::snapshot::{SlotView, Snapshot};
use crate::units::Nanos;
use crate::usage::{self, DEFAULT_WEIGHT};

/// GPU time as virtual time, ns: a client of [`DEFAULT_WEIGHT`] has one for the other.
fn virtual_of(time: Nanos, weight: u32) -> Nanos {
    let time = u128::from(time) * u128::from(DEFAULT_WEIGHT) / u128::from(usage::weight(weight));
    u64::try_from(time).unwrap_or(u64::MAX)
}

/// When a client's slice began that is not over, ns: it runs, or it grew and fills while its work goes on.
pub(super) fn slice_begun(view: &SlotView) -> Option<Nanos> {
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

/// How long the client's slice has lasted that is not over, ns.
pub(super) fn ran(snapshot: &Snapshot, slot: SlotIndex) -> Nanos {
    slice_begun(snapshot.view(slot)).map_or(0, |begun| snapshot.now.saturating_sub(begun))
}

/// What the client in `slot` has used of its turn, ns, its present slice included.
pub(super) fn used_of_turn(snapshot: &Snapshot, slot: SlotIndex) -> Nanos {
    let ran = i64::try_from(ran(snapshot, slot)).unwrap_or(i64::MAX);
    snapshot.view(slot).turn_used.saturating_add(ran).max(0) as Nanos
}
