//! Who has had less than its share: virtual time, as fair queueing has it.
//!
//! A client's *virtual time* is the GPU time that it has had, divided by its weight: whoever is behind the others goes next.
//! Time in which several clients ran at once is divided among them by weight ([`SharedTime`]). The *mean* is the average over those who want
//! the GPU, by weight, without those who are far ahead ([`mean`]); a client's *lag* is how far it is behind the mean. Lags add up
//! to nothing as long as nobody is, so serving those who lag keeps everybody at its share. (Parekh and Gallager, "A generalized processor sharing approach to flow control", 1993;
//! Stoica and others, "A proportional share resource allocation algorithm for real-time, time-shared systems", 1996, from
//! which mean and lag are taken.)

use crate::page::Phase;
use crate::policy::NOT_BEGUN;
use crate::slot::{SLOTS, SlotIndex};
use crate::snapshot::{SlotView, Snapshot};
use crate::units::Nanos;
use crate::usage::{self, real_of, virtual_of};

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

/// How the GPU's time was divided since the oldest slice began that is not over. Those who run at once share it by weight:
/// where weights differ they take compute turns ([`crate::turns`]), and where they don't the hardware gives each of k a k-th. So
/// the virtual time of all of them grows alike, by the time that passes over the sum of their weights. Of what ran beside a
/// slice, only the latest slice of each is known: who ran for two short ones counts for the second.
///
/// One sweep over the beginnings and ends of all slices gives the virtual time that a client has come to who ran all along, up
/// to each of them. What another one has come to, who began later, is a difference of two of these.
struct SharedTime {
    now: Nanos,
    /// Moments at which somebody began or ended, ns, in their order, and what one who ran all along has come to by then, ns of
    /// virtual time.
    had: [(Nanos, Nanos); 2 * SLOTS],
    moments: usize,
}

impl SharedTime {
    fn of(snapshot: &Snapshot) -> Self {
        let now = snapshot.now;
        let mut shared = Self { now, had: [(0, 0); 2 * SLOTS], moments: 0 };
        let begun = |view| slice_begun(view).filter(|begun| *begun < now);
        let Some(oldest) = snapshot.clients().filter_map(|(_, view)| begun(view)).min() else {
            return shared;
        };
        // How much more weight runs, or less, from this time on.
        let mut changes = [(0, 0i64); 2 * SLOTS];
        let mut count = 0;
        for (_, view) in snapshot.clients() {
            if let Some((from, to)) = last_slice(view, now)
                && from.max(oldest) < to.min(now)
            {
                let weight = i64::from(usage::weight(view.weight));
                changes[count] = (from.max(oldest), weight);
                changes[count + 1] = (to.min(now), -weight);
                count += 2;
            }
        }
        let changes = &mut changes[..count];
        changes.sort_unstable();
        let (mut since, mut weights, mut had) = (oldest, 0i64, 0u64);
        for (moment, (time, change)) in changes.iter().enumerate() {
            had = had.saturating_add(virtual_of(time - since, weights.max(1) as u64));
            (since, weights) = (*time, weights + change);
            shared.had[moment] = (*time, had);
        }
        shared.moments = count;
        shared
    }

    /// What a client has come to in its present slice, ns of virtual time.
    fn of_slice(&self, view: &SlotView) -> Nanos {
        let Some(begun) = slice_begun(view).filter(|begun| *begun < self.now) else { return 0 };
        let moments = &self.had[..self.moments];
        let before = moments.partition_point(|(time, _)| *time < begun);
        // Its own beginning is one of them, and so is this moment, at which its slice ends as far as anybody knows.
        match (moments.get(before), moments.last()) {
            (Some((_, then)), Some((_, had))) => had - then,
            _ => 0,
        }
    }
}

/// What everybody has come to, ns of virtual time, present slices included, by slot.
pub(super) fn virtual_times(snapshot: &Snapshot) -> [Nanos; SLOTS] {
    let shared = SharedTime::of(snapshot);
    let mut times = [0; SLOTS];
    for (slot, view) in snapshot.clients() {
        times[slot.get()] = view.virtual_time.saturating_add(shared.of_slice(view));
    }
    times
}

/// What the present slice of the client in `slot` adds to its virtual time, ns.
pub(super) fn virtual_in_slice(snapshot: &Snapshot, slot: SlotIndex) -> Nanos {
    SharedTime::of(snapshot).of_slice(snapshot.view(slot))
}

/// The GPU time, ns, that the client in `slot` has had in its present slice: its part of it by weight, of those who ran.
pub(super) fn shared(snapshot: &Snapshot, slot: SlotIndex) -> Nanos {
    let view = snapshot.view(slot);
    real_of(virtual_in_slice(snapshot, slot), u64::from(usage::weight(view.weight))).min(ran(snapshot, slot))
}

/// The mean virtual time of those who want the GPU, by weight, without `except`; `None` if nobody else does. `times` are the
/// [`virtual_times`].
///
/// Who is ahead by more than `far`, ns of virtual time, does not count. A small client that always finds room beside the
/// others runs all the time, and nobody can take from it what it has had: with it in the mean, all others lag by more than a lag
/// may be, and which of them has had less is forgotten.
pub(super) fn mean(
    snapshot: &Snapshot,
    times: &[Nanos; SLOTS],
    far: Nanos,
    except: Option<SlotIndex>,
) -> Option<Nanos> {
    let of_those_up_to = |most: Nanos| {
        let (mut sum, mut weights) = (0u128, 0u64);
        for (slot, view) in snapshot.clients() {
            let time = times[slot.get()];
            if Some(slot) != except && view.phase.wants_gpu() && time <= most {
                let weight = usage::weight(view.weight);
                sum += u128::from(weight) * u128::from(time);
                weights += u64::from(weight);
            }
        }
        (weights > 0).then(|| (sum / u128::from(weights)) as Nanos)
    };
    let mut mean = of_those_up_to(Nanos::MAX)?;
    // Each round leaves somebody out, and never the one who has had least.
    loop {
        let lower = of_those_up_to(mean.saturating_add(far))?;
        if lower >= mean {
            return Some(mean);
        }
        mean = lower;
    }
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
