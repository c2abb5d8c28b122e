//! Who runs, how long, and who makes room: pure functions of a snapshot, shared by the clients, the
//! arbiter and the simulator.
//!
//! - Everybody's memory fits: all run at once, and nothing ever switches.
//! - It does not fit: slices that are not over go on; then waiters, and those whose turn is over, by their place: deadlines that
//!   have passed, lag, the order in which they came (`order`). Whoever does not fit beside the ones before is passed over, and
//!   a smaller one behind may fill the gap. It delays nobody: who fills a gap came after the first waiter, and such a slice is
//!   protected from everybody but that one (`Rank`).
//! - The first waiter may fill what room is left while others run ([`prefetch`]).
//! - What cannot move is there whoever runs: it counts like a context, and nobody is asked to evict it.
//! - Exactly one is admitted whatever its size, so nobody waits for a fit that cannot come (I3).
//! - What a client has whose drain stands still is asked for last, and who fits beside it goes ahead of who does not.
//! - Who is paused is not admitted, and waits for nothing ([`Suspension`](crate::page::Suspension)).
//! - Clients of one gang on a GPU are admitted together or not at all, if they fit there together.
//!
//! | module | what it holds |
//! |---|---|
//! | `fair_share` | virtual time: who has had less than its share |
//! | `turn` | what a client writes down when it begins to wait, when a slice ends, and when it runs on |
//! | `slice` | how long slices and turns are |
//! | `order` | who is served before whom |
//! | `room` | who makes room, and how much |
//! | `ahead` | who brings memory in before it is back from a pause |
//! | `forecast` | when the turn of one who waits is likely to come |
//!
//! **Bound on a wait** (L1). A waiter's deadline is at most P away ([`enter_queue`]): nothing for one of high priority; for a
//! normal one D, a setting (up to ten times, for a weight of less than a tenth of the largest), and twice a round of the others'
//! shortest turns; twice that for one of low priority. Who begins to wait after it has come stands behind the waiter, of
//! whatever priority: no deadline is earlier than the moment at which its owner begins to wait. So from then on each of the
//! n - 1 others runs before it at most once. Whoever runs while the deadline of a waiter is past runs for one and a half quanta,
//! or to the end of its turn if less than a quantum of that would be left. So a wait is at most
//! P + (n - 1) x (2.5 x longest quantum + longest fill + longest drain).
//!
//! **Processes with several GPUs, and gangs.** Such a process, or gang of processes that wait for each other, gets its GPUs one after the other, in the order of their
//! UUIDs, and keeps what it has while it waits for the next: its slices begin only when it has all
//! ([`NOT_BEGUN`]). So a holder may add to the wait above what it waits itself for its further GPUs. Those
//! all come later in the one order: holders of the last GPU wait for nothing more, so the bound W there is the
//! one above, and for the GPU i it is
//!
//! ```text
//! W(i) = P + (n - 1) x (2.5 x longest quantum + longest fill + longest drain + sum of W(j) + longest fill on j),
//!        over all j after i of which some process has i and j
//! ```
//!
//! A process or gang waits for the sum of W(i) and a fill over its GPUs at most, because it keeps what it has. W grows with the product of the GPUs' queues, as it must where each may stand still for the next, and
//! there is no cycle in it, so it is finite.

mod ahead;
mod fair_share;
mod forecast;
mod order;
mod room;
mod slice;
mod turn;

pub use ahead::{expected, expected_from, gives_way_ahead, head_start, watches_pauses};
pub use forecast::{NEXT, turn_comes};
pub use order::{Order, Standing, Waiting, hurried};
pub use room::{
    evict_share, evictors, lacking, needed, prefetch, prefetcher, spare_holders, spares_are_wanted,
};
pub use slice::{MOST_SHARES, quantum, turn_length};
pub use turn::{
    CREDIT, Entry, NextTurn, SliceEnd, Spent, charged, end_slice, enter_queue, next_turn, turns_in_a_row,
};

use crate::page::Phase;
use crate::slot::{SlotIndex, SlotSet};
use crate::snapshot::{SlotView, Snapshot};
use crate::units::{Granules, Nanos, SECOND, bytes_of, scaled};
use ahead::all_fit;
use order::{Place, hurry};
use slice::Turns;

/// In place of a slice's beginning: its holder has all its memory in place and cannot run yet, because its
/// process waits for another GPU. Such a slice is never over. Whoever claims it for ever keeps the GPU for
/// ever, as with any beginning in the far future.
pub const NOT_BEGUN: Nanos = Nanos::MAX;

/// Whom to admit.
pub fn admit(snapshot: &Snapshot) -> SlotSet {
    Order::new(snapshot, &Standing::of(snapshot)).admit()
}

impl Order<'_> {
    /// Whom to admit.
    pub fn admit(&self) -> SlotSet {
        let (snapshot, queue) = (self.snapshot, self.queue());
        let stuck: u64 = snapshot
            .clients()
            .filter(|(_, view)| view.stuck)
            .map(|(_, view)| u64::from(view.evictable()))
            .sum();
        if stuck > 0 {
            // Those who fit beside what does not move do not wait for it with those who don't.
            let room = u64::from(snapshot.usable()).saturating_sub(stuck) as Granules;
            let beside = fitting(snapshot, &queue, room);
            if !beside.is_empty() {
                return beside;
            }
        }
        // Whoever needs no memory runs beside anybody, and is in nobody's way.
        match queue.iter().find(|(_, demand)| *demand > 0) {
            Some((slot, demand)) if *demand > snapshot.usable() => fitting(snapshot, &queue, 0).with(*slot),
            _ => fitting(snapshot, &queue, snapshot.usable()),
        }
    }

    /// Those who want the GPU, in the order in which they get it.
    fn queue(&self) -> Vec<(SlotIndex, Granules)> {
        let snapshot = self.snapshot;
        let first = self.first_waiter();
        let ends = self.ends();
        let goes_on = |view: &SlotView| {
            let end = ends.as_ref().and_then(|ends| ends.of_holder(view));
            end.is_none_or(|end| end > snapshot.now)
        };
        let rank = |slot: SlotIndex, view: &SlotView| -> (Rank, Option<Place>) {
            if snapshot.admitted.contains(slot) && goes_on(view) {
                let before = first.is_none_or(|first| self.comes_before(slot, first));
                // Between those who run, it counts who came first: hurry is for waiters.
                let place = Some(Place::in_turn(view.ticket, slot));
                return (if before { Rank::Holder } else { Rank::GapFiller }, place);
            }
            let place = self.place(slot);
            let stands = first.is_none_or(|first| place <= self.place(first));
            (if stands { Rank::First } else { Rank::Other }, place)
        };
        let mut queue: Vec<_> = snapshot
            .clients()
            .filter(|(slot, view)| snapshot.admitted.contains(*slot) || waits(view))
            .filter(|(_, view)| view.phase.wants_gpu() && !view.paused)
            .map(|(slot, view)| (rank(slot, view), slot, view.movable()))
            .collect();
        queue.sort_unstable();
        queue.into_iter().map(|(_, slot, demand)| (slot, demand)).collect()
    }
}

/// Those who fit, in the order in which they come; the others are passed over. The first client of a gang needs room for all of
/// its gang's on this GPU, whether they wait already or not, and the others of that gang have it then: else parts of two gangs
/// could have the GPU, and each would wait for room for its other part.
fn fitting(snapshot: &Snapshot, order: &[(SlotIndex, Granules)], mut left: Granules) -> SlotSet {
    let (mut chosen, mut gangs) = (SlotSet::EMPTY, Vec::new());
    for (slot, demand) in order {
        let gang = gang_demand(snapshot, *slot);
        if gang.is_some_and(|(gang, _)| gangs.contains(&gang)) {
            chosen = chosen.with(*slot);
            continue;
        }
        let demand = gang.map_or(*demand, |(_, demand)| demand);
        if demand <= left {
            left -= demand;
            chosen = chosen.with(*slot);
            gangs.extend(gang.map(|(gang, _)| gang));
        }
    }
    chosen
}

/// The number of a client's gang, and granules that all its clients on this GPU need together. `None` without a gang, and for
/// one that does not fit there as a whole: its clients then take turns with each other.
fn gang_demand(snapshot: &Snapshot, slot: SlotIndex) -> Option<(u64, Granules)> {
    let gang = Some(snapshot.view(slot).gang).filter(|gang| *gang != 0)?;
    let members = snapshot.clients().filter(|(_, view)| view.gang == gang);
    let demand: u64 = members.map(|(_, view)| u64::from(view.movable())).sum();
    (demand <= u64::from(snapshot.usable())).then_some((gang, demand as Granules))
}

/// Where a client stands in the queue; its [`Place`] decides between equals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// Runs, and its slice is not over.
    Holder,
    /// Waits, and nobody stands before it; or has used up its turn and stands before all who wait.
    First,
    /// Runs beside a holder in room that the first waiter is too large for.
    GapFiller,
    /// Waits, or runs and its slice is over.
    Other,
}

/// Whether a client that is not admitted stands in the queue.
///
/// One that runs does not: it was recalled, and has yet to see it. Its ticket is that of the slice which is
/// over, older than any waiter's, and a decision that took it for a waiter would give it the next slice too.
fn waits(view: &SlotView) -> bool {
    matches!(view.phase, Phase::Waiting | Phase::Filling)
}

/// Those who stand in the queue and are not admitted.
fn waiters(snapshot: &Snapshot) -> impl Iterator<Item = SlotIndex> {
    let stands = |(slot, view): &(SlotIndex, &SlotView)| waits(view) && !snapshot.admitted.contains(*slot);
    snapshot.clients().filter(stands).map(|(slot, _)| slot)
}

/// Whether anybody waits who is not admitted.
pub fn awaited(snapshot: &Snapshot) -> bool {
    waiters(snapshot).next().is_some()
}

/// Granules that the admitted ones still lack.
fn missing(snapshot: &Snapshot) -> i64 {
    let wanting =
        snapshot.admitted.iter().map(|slot| snapshot.view(slot)).filter(|view| view.phase.wants_gpu());
    wanting.map(|view| i64::from(view.missing())).sum()
}

/// The waiter whose turn is next, if somebody waits who is not admitted.
pub fn first_waiter(snapshot: &Snapshot) -> Option<SlotIndex> {
    // Most often there is none, and to know how all stand costs more than that.
    awaited(snapshot).then(|| Order::new(snapshot, &Standing::of(snapshot)).first_waiter()).flatten()
}

/// When a holder's slice is over, ns, if it runs and somebody waits: when its turn is used up, or when the deadline of a
/// waiter comes, but not before it has run for that one's [`quantum`]. A slice begins when its holder runs, so filling costs
/// nobody any of it, and neither does waiting for another GPU ([`NOT_BEGUN`]).
///
/// It is not over while somebody who came before that waiter is admitted and still fills: the waiter may have what that one
/// lacks, and would otherwise be back before it has evicted it, again and again. (Two whose drains are longer than the
/// quantum kept a third from its memory in this way: found by the simulator.) That is a part of the third one's turn, which
/// the waiter waits for in any case. If it takes longer than the farthest deadline, something is stuck, and others go on.
pub fn slice_end(snapshot: &Snapshot, holder: SlotIndex) -> Option<Nanos> {
    SliceEnds::of(snapshot)?.of_holder(snapshot.view(holder))
}

/// When slices are over because of the waiter whose deadline comes first ([`slice_end`]).
struct SliceEnds {
    turns: Turns,
    /// That deadline, ns.
    deadline: Nanos,
    /// What the switch to that waiter is worth, ns.
    quantum: Nanos,
    /// How much later they are because somebody who came before it fills, ns.
    later: Nanos,
}

impl SliceEnds {
    /// `None` if nobody waits.
    fn of(snapshot: &Snapshot) -> Option<Self> {
        hurried(snapshot).map(|hurried| Self::because_of(hurried, snapshot, Turns::of(snapshot)))
    }

    fn because_of(hurried: SlotIndex, snapshot: &Snapshot, turns: Turns) -> Self {
        let fills = snapshot.admitted.iter().any(|slot| {
            let earlier = || hurry(snapshot, slot) < hurry(snapshot, hurried);
            let before = || snapshot.view(slot).ticket < snapshot.view(hurried).ticket || earlier();
            snapshot.view(slot).phase == Phase::Filling && before()
        });
        let (deadline, quantum) = (snapshot.view(hurried).deadline, quantum(snapshot, hurried));
        let later = if fills { snapshot.settings.deadline } else { 0 };
        Self { turns, deadline, quantum, later }
    }

    /// When the slice of a client is over, ns, if it runs.
    fn of_holder(&self, view: &SlotView) -> Option<Nanos> {
        if view.phase != Phase::Running || view.slice_start == NOT_BEGUN {
            return None;
        }
        let after = |time| view.slice_start.saturating_add(time);
        let most = turn_left(&self.turns, view, self.quantum);
        // An interruption costs one switch there and a part of one back.
        let least = (self.quantum.saturating_mul(3) / 2).min(most);
        let end = self.deadline.clamp(after(least), after(most));
        // And what would be left of the turn is worth coming back for.
        let end = if after(most).saturating_sub(end) < self.quantum { after(most) } else { end };
        Some(end.saturating_add(self.later))
    }

    /// When the slices of all who are admitted and run are over, ns, in no order.
    fn of_admitted(&self, snapshot: &Snapshot) -> impl Iterator<Item = Nanos> {
        snapshot.admitted.iter().filter_map(|slot| self.of_holder(snapshot.view(slot)))
    }
}

impl Order<'_> {
    /// When the slices of those who run are over, ns, in no order: [`next_decision`] is the first of them that has not been
    /// decided yet.
    pub fn slice_ends(&self) -> Vec<Nanos> {
        self.ends().map_or_else(Vec::new, |ends| ends.of_admitted(self.snapshot).collect())
    }

    fn ends(&self) -> Option<SliceEnds> {
        let ends =
            |waiting: Waiting| SliceEnds::because_of(waiting.hurried, self.snapshot, self.standing.turns);
        self.waiting.map(ends)
    }
}

/// What was left of a holder's turn when its slice began, ns: of a whole one, no less than `least`, which the switch to the next
/// one is worth.
fn turn_left(turns: &Turns, view: &SlotView, least: Nanos) -> Nanos {
    let left = turns.length(view).saturating_add_signed(view.turn_used.saturating_neg());
    if view.turn_used == 0 { left.max(least) } else { left }
}

/// When a holder's slice is over at the earliest, ns, whoever comes: a light user's deadline may have come when it
/// begins to wait, so that only the quantum is left. `None` if nobody can end it, because everybody's memory fits.
///
/// From then on a holder keeps little work in flight: nobody tells it of the end beforehand. Of a slice that has not
/// begun, it is as if it began now.
pub fn earliest_end(snapshot: &Snapshot, holder: SlotIndex) -> Option<Nanos> {
    let view = snapshot.view(holder);
    if view.phase != Phase::Running || all_fit(snapshot) {
        return None;
    }
    let begins = if view.slice_start == NOT_BEGUN { snapshot.now } else { view.slice_start };
    let turns = Turns::of(snapshot);
    let others = snapshot.clients().filter(|(slot, _)| !snapshot.admitted.contains(*slot));
    let quanta = others.map(|(slot, _)| quantum(snapshot, slot));
    let soonest = quanta.map(|quantum| quantum.min(turn_left(&turns, view, quantum))).min()?;
    Some(begins.saturating_add(soonest))
}

/// When, at the latest, somebody must decide again though nothing changed: the first end of a slice
/// after the time `decided`, when the asker last decided.
///
/// An end that lies further back was over when that decision was made. Its holder may go on all the same,
/// in room that no waiter can use, and deciding once more would change nothing; whoever changes something
/// decides anyway.
pub fn next_decision(snapshot: &Snapshot, decided: Nanos) -> Option<Nanos> {
    let ends = SliceEnds::of(snapshot)?;
    ends.of_admitted(snapshot).filter(|end| *end > decided).min()
}

/// How long it takes to bring `waiter` in, ns: what it lacks comes in while what is in its way goes
/// out, so the slower of the two directions counts.
pub fn switch_time(snapshot: &Snapshot, waiter: SlotIndex) -> Nanos {
    let missing = snapshot.view(waiter).missing();
    let in_the_way = i64::from(missing).saturating_sub(i64::from(snapshot.free)).clamp(0, i64::from(missing));
    let fill = copy_time(missing, snapshot.bandwidth_in);
    let evict = copy_time(in_the_way as Granules, snapshot.bandwidth_out);
    fill.max(evict)
}

fn copy_time(granules: Granules, bandwidth: u64) -> Nanos {
    scaled(SECOND, bytes_of(granules), bandwidth)
}

// Safe code, for which Miri would take hours.
#[cfg(all(test, not(loom), not(miri)))]
mod tests;

#[cfg(all(test, not(loom), not(miri)))]
mod waits;
