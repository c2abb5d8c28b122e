//! Who runs, how long, and who makes room: pure functions of a snapshot, shared by the clients, the
//! arbiter and the simulator.
//!
//! - Everybody's memory fits: all run at once, and nothing ever switches.
//! - It does not fit: slices that are not over go on; then waiters in the order of their deadlines; then
//!   those whose slice is over. Whoever does not fit beside the ones before is passed over, and a
//!   smaller one behind may fill the gap. It delays nobody: who fills a gap came after the first
//!   waiter, and such a slice is protected from everybody but that one (`Rank`).
//! - The first waiter may fill what room is left while others run ([`prefetch`]).
//! - What cannot move is there whoever runs: it counts like a context, and nobody is asked to evict it.
//! - Exactly one is admitted whatever its size, so nobody waits for a fit that cannot come (I3).
//! - What a client has whose drain stands still is asked for last, and who fits beside it goes ahead of who does not.
//!
//! **Bound on a wait** (L1). A waiter's deadline is at most P away ([`deadline`]): nothing for one of high priority, D,
//! a setting, for a normal one, 2 x D for one of low priority. Who begins to wait after it has come stands behind the
//! waiter, of whatever priority: no deadline is earlier than the moment at which its owner begins to wait. So from then on
//! each of the n - 1 others runs before it at most once; and whoever runs while the deadline of the first waiter is past
//! runs for the quantum at most. So a wait is at most P + (n - 1) x (longest quantum + longest fill + longest drain).
//!
//! **Processes with several GPUs.** Such a process gets its GPUs one after the other, in the order of their
//! UUIDs, and keeps what it has while it waits for the next: its slices begin only when it has all
//! ([`NOT_BEGUN`]). So a holder may add to the wait above what it waits itself for its further GPUs. Those
//! all come later in the one order: holders of the last GPU wait for nothing more, so the bound W there is the
//! one above, and for the GPU i it is
//!
//! ```text
//! W(i) = (n - 1) x (longest quantum + longest fill + longest drain + sum of W(j) + longest fill on j),
//!        over all j after i of which some process has i and j
//! ```
//!
//! It grows with the product of the GPUs' queues, as it must where each may stand still for the next, and
//! there is no cycle in it, so it is finite.

use crate::page::{Phase, Quantum};
use crate::shares::Priority;
use crate::slot::{SlotIndex, SlotSet};
use crate::snapshot::{SlotView, Snapshot};
use crate::units::{Granules, Nanos, SECOND, bytes_of};
use crate::usage::{self, DEFAULT_WEIGHT};
use std::cmp::Reverse;

/// In place of a slice's beginning: its holder has all its memory in place and cannot run yet, because its
/// process waits for another GPU. Such a slice is never over. Whoever claims it for ever keeps the GPU for
/// ever, as with any beginning in the far future.
pub const NOT_BEGUN: Nanos = Nanos::MAX;

/// Whom to admit, now.
pub fn admit(snapshot: &Snapshot, now: Nanos) -> SlotSet {
    let order: Vec<_> = queue(snapshot, now).collect();
    let stuck: u64 =
        snapshot.clients().filter(|(_, view)| view.stuck).map(|(_, view)| u64::from(view.evictable())).sum();
    if stuck > 0 {
        // Those who fit beside what does not move do not wait for it with those who don't.
        let beside = fitting(&order, u64::from(snapshot.usable()).saturating_sub(stuck) as Granules);
        if !beside.is_empty() {
            return beside;
        }
    }
    match order.first() {
        Some((slot, demand)) if *demand > snapshot.usable() => fitting(&order[1..], 0).with(*slot),
        _ => fitting(&order, snapshot.usable()),
    }
}

/// Those who fit, in the order in which they come; the others are passed over.
fn fitting(order: &[(SlotIndex, Granules)], mut left: Granules) -> SlotSet {
    let mut chosen = SlotSet::EMPTY;
    for (slot, demand) in order {
        if *demand <= left {
            left -= demand;
            chosen = chosen.with(*slot);
        }
    }
    chosen
}

/// Where a client stands in the queue; its ticket decides between equals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// Runs, and its slice is not over.
    Holder,
    /// Waits, and nobody has waited longer.
    FirstWaiter,
    /// Runs beside a holder in room that the first waiter is too large for.
    GapFiller,
    /// Waits.
    Waiter,
    /// Runs, and its slice is over.
    Overdue,
}

fn rank(snapshot: &Snapshot, slot: SlotIndex, first: Option<SlotIndex>, now: Nanos) -> Rank {
    if !snapshot.admitted.contains(slot) {
        return if first == Some(slot) { Rank::FirstWaiter } else { Rank::Waiter };
    }
    if slice_end(snapshot, slot).is_some_and(|end| end <= now) {
        return Rank::Overdue;
    }
    // Who came later and is in less of a hurry runs in a gap. Who came later and was in more of one had its turn.
    if first.is_none_or(|first| comes_before(snapshot, slot, first)) { Rank::Holder } else { Rank::GapFiller }
}

/// A client's place among those of its rank: the earliest deadline, and who came first between equals.
fn place(snapshot: &Snapshot, slot: SlotIndex) -> (Nanos, u64, SlotIndex) {
    let view = snapshot.view(slot);
    (view.deadline, view.ticket, slot)
}

/// Those who want the GPU, in the order in which they get it.
fn queue(snapshot: &Snapshot, now: Nanos) -> impl Iterator<Item = (SlotIndex, Granules)> {
    let first = first_waiter(snapshot);
    let mut order: Vec<_> = snapshot
        .clients()
        .filter(|(slot, view)| snapshot.admitted.contains(*slot) || waits(view))
        .filter(|(_, view)| view.phase.wants_gpu())
        .map(|(slot, view)| {
            let rank = rank(snapshot, slot, first, now);
            // Between those who run, it counts who came first: hurry is for waiters.
            let (deadline, ticket, _) = place(snapshot, slot);
            let deadline = if matches!(rank, Rank::FirstWaiter | Rank::Waiter) { deadline } else { 0 };
            (rank, deadline, ticket, slot, view.movable())
        })
        .collect();
    order.sort_unstable();
    order.into_iter().map(|(.., slot, demand)| (slot, demand))
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

/// The waiter whose turn is next, if somebody waits who is not admitted.
pub fn first_waiter(snapshot: &Snapshot) -> Option<SlotIndex> {
    waiters(snapshot).min_by_key(|slot| place(snapshot, *slot))
}

/// When a holder's slice is over, ns, if it runs and somebody waits. A slice begins when its holder
/// runs, so filling costs nobody any of it, and neither does waiting for another GPU ([`NOT_BEGUN`]).
///
/// It is not over while somebody who came before the waiter is admitted and still fills: the waiter may have what that one
/// lacks, and would otherwise be back before it has evicted it, again and again. (Two whose drains are longer than the
/// quantum kept a third from its memory in this way: found by the simulator.) That is a part of the third one's turn, which
/// the waiter waits for in any case. If it takes longer than the farthest deadline, something is stuck, and others go on.
pub fn slice_end(snapshot: &Snapshot, holder: SlotIndex) -> Option<Nanos> {
    let view = snapshot.view(holder);
    let waiter = first_waiter(snapshot)?;
    (view.phase == Phase::Running && view.slice_start != NOT_BEGUN).then(|| {
        let after = |time| view.slice_start.saturating_add(time);
        let (least, most) = (after(quantum(snapshot, waiter)), after(slice(snapshot, holder, waiter)));
        // A waiter whose deadline has come does not wait for more than the least.
        let end = snapshot.view(waiter).deadline.clamp(least, most.max(least));
        let fills = snapshot.admitted.iter().any(|slot| {
            slot != holder
                && snapshot.view(slot).phase == Phase::Filling
                && comes_before(snapshot, slot, waiter)
        });
        if fills { end.saturating_add(snapshot.settings.deadline) } else { end }
    })
}

/// Whether one who is admitted came before a waiter, or was in more of a hurry: it is not in the waiter's way.
fn comes_before(snapshot: &Snapshot, slot: SlotIndex, waiter: SlotIndex) -> bool {
    let ticket = |slot: SlotIndex| (snapshot.view(slot).ticket, slot);
    ticket(slot) < ticket(waiter) || place(snapshot, slot) < place(snapshot, waiter)
}

/// When a holder's slice is over at the earliest, ns, whoever comes: a light user's deadline may have come when it
/// begins to wait, so that only the quantum is left. `None` if nobody can end it, because everybody's memory fits.
///
/// From then on a holder keeps little work in flight: nobody tells it of the end beforehand. Of a slice that has not
/// begun, it is as if it began now.
pub fn earliest_end(snapshot: &Snapshot, holder: SlotIndex, now: Nanos) -> Option<Nanos> {
    let view = snapshot.view(holder);
    let demand: u64 = snapshot.clients().map(|(_, view)| u64::from(view.movable())).sum();
    if view.phase != Phase::Running || demand <= u64::from(snapshot.usable()) {
        return None;
    }
    let begins = if view.slice_start == NOT_BEGUN { now } else { view.slice_start };
    let others = snapshot.clients().filter(|(slot, _)| !snapshot.admitted.contains(*slot));
    let soonest = others.map(|(slot, _)| quantum(snapshot, slot)).min()?;
    Some(begins.saturating_add(soonest))
}

/// When, at the latest, somebody must decide again though nothing changed: the first end of a slice
/// after the time `decided`, when the asker last decided.
///
/// An end that lies further back was over when that decision was made. Its holder may go on all the same,
/// in room that no waiter can use, and deciding once more would change nothing; whoever changes something
/// decides anyway.
pub fn next_decision(snapshot: &Snapshot, decided: Nanos) -> Option<Nanos> {
    snapshot.admitted.iter().filter_map(|slot| slice_end(snapshot, slot)).filter(|end| *end > decided).min()
}

/// How long a slice is at least that ends because `waiter` waits, ns.
pub fn quantum(snapshot: &Snapshot, waiter: SlotIndex) -> Nanos {
    match snapshot.settings.quantum {
        Quantum::Fixed(ns) => ns,
        Quantum::Auto { factor_milli, min, max, .. } => {
            scaled(switch_time(snapshot, waiter), factor_milli, 1_000).clamp(min, max.max(min))
        }
    }
}

/// Those who want the GPU or have it.
fn contenders(snapshot: &Snapshot) -> impl Iterator<Item = &SlotView> {
    snapshot.clients().map(|(_, view)| view).filter(|view| view.phase.wants_gpu())
}

/// How long `holder`'s slice is while `waiter` waits and its deadline has not come, ns: a quantum, grown by a half in each
/// round of slices that those who want the GPU have used up, times the holder's weight over the least. What grows is the
/// quantum of a common switch and not of this very one (`common_switch_time`), which is only the least.
///
/// A round's growth is spread evenly over its slices: those of four follow one another with an eighth more. So taking
/// turns stays fair while it becomes cheaper: after any n slices of n clients, Jain's index over their GPU time is 0.98.
/// A newcomer brings everybody back to the shortest.
pub fn slice(snapshot: &Snapshot, holder: SlotIndex, waiter: SlotIndex) -> Nanos {
    let weight = snapshot.view(holder).weight;
    let least = contenders(snapshot).map(|view| view.weight).min().unwrap_or(weight).max(1);
    let most = least.saturating_mul(MOST_SHARES);
    scaled(even_slice(snapshot, waiter), weight.clamp(least, most), least)
}

/// How long a slice is for the least weight, ns.
fn even_slice(snapshot: &Snapshot, waiter: SlotIndex) -> Nanos {
    let least = quantum(snapshot, waiter);
    match snapshot.settings.quantum {
        Quantum::Fixed(_) => least,
        Quantum::Auto { factor_milli, longest_milli, min, max } => {
            let switch = common_switch_time(snapshot);
            let shortest = scaled(switch, factor_milli, 1_000).clamp(min, max.max(min));
            let longest = scaled(shortest, longest_milli.max(factor_milli), factor_milli);
            Turns::of(snapshot).grown(shortest, longest.min(max.max(shortest))).max(least)
        }
    }
}

/// Slices that those who want the GPU have used up in turn.
struct Turns {
    /// All of them, so many times.
    rounds: u32,
    /// So many of them once more.
    since: u32,
    /// So many are there.
    clients: u32,
}

impl Turns {
    /// The one that has used up fewest says how many rounds, and the others' tickets whether they have queued once more
    /// since it queued. Whoever is further ahead counts no more for that: else the one behind would lift all of those with
    /// each slice of its own, and slices would grow by several steps at once (docs/decisions/0012-growth-by-rounds.md).
    fn of(snapshot: &Snapshot) -> Self {
        let behind = contenders(snapshot).map(|view| (view.consecutive_slices, Reverse(view.ticket))).min();
        let (rounds, Reverse(ticket)) = behind.unwrap_or((0, Reverse(0)));
        let since = contenders(snapshot).filter(|view| view.ticket > ticket).count() as u32;
        Self { rounds, since, clients: contenders(snapshot).count().max(1) as u32 }
    }

    /// What `shortest` has grown to, at most `longest`, ns.
    fn grown(&self, shortest: Nanos, longest: Nanos) -> Nanos {
        // A hundred million times at least, and more than any longest; a page may claim four thousand million rounds.
        const ENOUGH: u32 = 48;
        let steps = self.rounds.min(ENOUGH) * self.clients + self.since;
        let more = |time: Nanos| time.saturating_add(time / (2 * u64::from(self.clients)));
        let lengths = std::iter::successors(Some(shortest), |time| (*time < longest).then(|| more(*time)));
        lengths.take(steps as usize + 1).last().unwrap_or(shortest).min(longest)
    }
}

/// How long a switch takes while those who want the GPU take turns, ns, whosever turn it is: the largest comes in, but for
/// what finds room beside the second largest before ([`prefetch`]); or, where any two fit, but for the room for all.
///
/// What lies on the GPU at this moment does not count: of what has gone from its memory since, one waiter lacks a tenth more
/// than the next, and slices that differ by so much on top of their growth are not fair (seen on an H100).
fn common_switch_time(snapshot: &Snapshot) -> Nanos {
    let (mut largest, mut second, mut all) = (0, 0, 0u64);
    for view in contenders(snapshot) {
        let demand = view.movable();
        all += u64::from(demand);
        (largest, second) = if demand > largest { (demand, largest) } else { (largest, second.max(demand)) };
    }
    let usable = u64::from(snapshot.usable());
    let two = u64::from(largest) + u64::from(second);
    let moves = if two > usable { two } else { all }.saturating_sub(usable).min(u64::from(largest));
    let moves = moves as Granules;
    copy_time(moves, snapshot.bandwidth_in).max(copy_time(moves, snapshot.bandwidth_out))
}

/// A slice is at most so many times as long for its holder's weight: the bound on everybody's wait depends on it.
pub const MOST_SHARES: u32 = 10;

fn scaled(time: Nanos, by: u32, of: u32) -> Nanos {
    let scaled = u128::from(time) * u128::from(by) / u128::from(of.max(1));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

/// What `view`'s client has used of the GPU, up to `now`, per share of the default weight, ns.
fn used(view: &SlotView, now: Nanos) -> Nanos {
    let runs = view.phase == Phase::Running && view.slice_start <= now;
    let usage = if runs {
        let rested = view.slice_start.saturating_sub(view.last_ran);
        usage::after_running(usage::faded(view.usage, rested), now - view.slice_start)
    } else {
        usage::faded(view.usage, now.saturating_sub(view.last_ran))
    };
    scaled(usage, DEFAULT_WEIGHT, usage::weight(view.weight))
}

/// When a client that begins to wait now should have its slice, ns, never before now: the farthest deadline of the
/// settings away, for most. Then who came first goes first, and they take turns.
///
/// A light user is one that has used less than half of what those who want the GPU used in the mean. Its deadline is
/// nearer in proportion, and one that has used an eighth of the mean has it now. Nobody's is farther for heavy use:
/// with later ones for who has used a little more, some would have two turns before others have one.
///
/// High priority is now, as for who has used nothing: it goes next, once the holder's least is over. Low priority is
/// twice as far as anybody's, whatever it used.
pub fn deadline(snapshot: &Snapshot, slot: SlotIndex, now: Nanos) -> Nanos {
    let mine = used(snapshot.view(slot), now);
    let others = snapshot.clients().filter(|(other, view)| *other != slot && view.phase.wants_gpu());
    let (mut n, mut sum) = (1u128, u128::from(mine));
    for (_, view) in others {
        n += 1;
        sum += u128::from(used(view, now));
    }
    // How far between 1/8 and 4/8 of the mean, thousandths.
    let eighths_milli = (8_000 * u128::from(mine) * n).checked_div(sum).unwrap_or(8_000);
    let way_milli = (eighths_milli.saturating_sub(1_000) / 3).min(1_000) as u32;
    let way_milli = match snapshot.view(slot).priority {
        Priority::High => 0,
        Priority::Normal => way_milli,
        Priority::Low => 2_000,
    };
    now.saturating_add(scaled(snapshot.settings.deadline, way_milli, 1_000))
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
    let ns = u128::from(bytes_of(granules)) * u128::from(SECOND) / u128::from(bandwidth.max(1));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

/// Granules that the admitted ones still lack and the pool does not have.
///
/// A granule that is taken, or given, changes both sides of this alike, so everybody comes to the
/// same figure while memory is on the move.
pub fn lacking(snapshot: &Snapshot) -> Granules {
    (missing(snapshot) - i64::from(snapshot.free)).clamp(0, i64::from(Granules::MAX)) as Granules
}

/// Granules that the admitted ones still lack.
fn missing(snapshot: &Snapshot) -> i64 {
    let wanting =
        snapshot.admitted.iter().map(|slot| snapshot.view(slot)).filter(|view| view.phase.wants_gpu());
    wanting.map(|view| i64::from(view.missing())).sum()
}

/// Granules that a client may bring in ahead of its turn: the first waiter, as far as there is room that neither
/// those who run nor those who fill need. Its switch then moves only the rest.
pub fn prefetch(snapshot: &Snapshot, slot: SlotIndex) -> Granules {
    if first_waiter(snapshot) != Some(slot) {
        return 0;
    }
    let spare = i64::from(snapshot.free) - missing(snapshot);
    i64::from(snapshot.view(slot).missing()).min(spare).max(0) as Granules
}

/// Those who hold more granules than their allocations need: memory that was freed a moment ago, kept for the next
/// allocation. They give it back when anybody could use it, so a decision with a waiter, or with granules lacking, rings them.
pub fn spare_holders(snapshot: &Snapshot) -> SlotSet {
    snapshot.clients().filter(|(_, view)| view.resident > view.demand).map(|(slot, _)| slot).collect()
}

/// Whether anybody could use what [`spare_holders`] hold.
pub fn spares_are_wanted(snapshot: &Snapshot) -> bool {
    first_waiter(snapshot).is_some() || lacking(snapshot) > 0
}

/// Granules that a client must evict now: its share of what the admitted ones lack.
///
/// Clients that are not admitted make room in this order: the one that ran last evicts first, since
/// its turn is furthest away. A client that still drains will evict when it has, and keeps its place, unless its drain stands
/// still.
/// When nothing is lacking, the last in the queue makes room for the first.
pub fn evict_share(snapshot: &Snapshot, slot: SlotIndex) -> Granules {
    eviction_plan(snapshot).find(|(evictor, _)| *evictor == slot).map_or(0, |(_, share)| share)
}

/// Those who must evict now.
pub fn evictors(snapshot: &Snapshot) -> SlotSet {
    eviction_plan(snapshot).filter(|(_, share)| *share > 0).map(|(slot, _)| slot).collect()
}

fn eviction_plan(snapshot: &Snapshot) -> impl Iterator<Item = (SlotIndex, Granules)> {
    let lacking = lacking(snapshot);
    let ahead = if lacking == 0 { lacking_ahead(snapshot) } else { None };
    let makes_room = |slot: SlotIndex, view: &SlotView| match ahead {
        Some((last, _)) => slot == last,
        None => !(snapshot.admitted.contains(slot) && view.phase.wants_gpu()),
    };
    let mut order: Vec<(SlotIndex, &SlotView)> =
        snapshot.clients().filter(|(slot, view)| view.evictable() > 0 && makes_room(*slot, view)).collect();
    order.sort_unstable_by_key(|(slot, view)| (view.stuck, Reverse(view.last_ran), *slot));
    let mut left = ahead.map_or(lacking, |(_, granules)| granules);
    order.into_iter().map(move |(slot, view)| {
        let share = view.evictable().min(left);
        left -= share;
        (slot, share)
    })
}

/// The last in the queue, and granules that the first could bring in ahead of its turn ([`prefetch`]) if the last made room,
/// once those who run have all of theirs. What was left lying of the last would stay until its own turn, which is the
/// farthest, and the holder's would have to go instead at the next switch, while nobody runs.
///
/// Nobody else is asked: those between come back sooner, and of those who are idle perhaps the next who comes fits beside them.
fn lacking_ahead(snapshot: &Snapshot) -> Option<(SlotIndex, Granules)> {
    let first = first_waiter(snapshot).filter(|_| missing(snapshot) == 0)?;
    let last = waiters(snapshot).max_by_key(|slot| place(snapshot, *slot)).filter(|last| *last != first)?;
    let lacks = i64::from(snapshot.view(first).missing()) - i64::from(snapshot.free);
    Some((last, lacks.clamp(0, i64::from(Granules::MAX)) as Granules))
}

#[cfg(all(test, not(loom)))]
mod tests;

#[cfg(all(test, not(loom)))]
mod waits;
