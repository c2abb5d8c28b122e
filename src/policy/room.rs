//! Who makes room for whom, and how much.

use crate::page::Phase;
use crate::policy::ahead::{self, expected};
use crate::policy::order::Order;
use crate::policy::slice::turn_distance;
use crate::policy::{awaited, first_waiter, missing, switch_time, waiters};
use crate::slot::{SLOTS, SlotIndex, SlotSet};
use crate::snapshot::{SlotView, Snapshot};
use crate::units::{Granules, Nanos};
use std::cmp::Reverse;

/// Granules that the admitted ones still lack and the pool does not have.
///
/// A granule that is taken, or given, changes both sides of this alike, so everybody comes to the
/// same figure while memory is on the move.
pub fn lacking(snapshot: &Snapshot) -> Granules {
    (missing(snapshot) - i64::from(snapshot.free)).clamp(0, i64::from(Granules::MAX)) as Granules
}

/// Who may bring memory in ahead of its turn: the first waiter, or else who is expected back from a pause.
pub fn prefetcher(snapshot: &Snapshot) -> Option<SlotIndex> {
    first_waiter(snapshot).or_else(|| expected(snapshot))
}

/// Granules that a client may bring in ahead of its turn, if it is the one who may ([`prefetcher`]): as far as there is room
/// that neither those who run nor those who fill need. Its switch then moves only the rest.
pub fn prefetch(snapshot: &Snapshot, slot: SlotIndex) -> Granules {
    if prefetcher(snapshot) != Some(slot) {
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
    awaited(snapshot) || lacking(snapshot) > 0
}

/// Whether anybody waits for the GPU, or fills and lacks room: then who has no work gives way, and with it the memory that
/// is needed last can go. How long the switch is that this is for, ns; `None` if nobody needs it.
pub fn needed(snapshot: &Snapshot) -> Option<Nanos> {
    let fills = || {
        let fillers = snapshot.admitted.iter().filter(|slot| snapshot.view(*slot).phase == Phase::Filling);
        fillers.max_by_key(|slot| snapshot.view(*slot).missing())
    };
    let who = if lacking(snapshot) > 0 { fills() } else { None };
    who.or_else(|| first_waiter(snapshot)).map(|slot| switch_time(snapshot, slot))
}

/// Granules that a client must evict now: its share of what the admitted ones lack.
///
/// Clients that are not admitted make room in this order: the one that needs its memory last evicts first (`next_uses`).
/// A client that still drains will evict when it has, and keeps its place, unless its drain stands still.
/// When nothing is lacking, the last in the queue makes room for the first; or, if nobody waits, those who are idle make room
/// for one that is expected sooner.
pub fn evict_share(snapshot: &Snapshot, slot: SlotIndex) -> Granules {
    eviction_plan(snapshot).find(|(evictor, _)| *evictor == slot).map_or(0, |(_, share)| share)
}

/// Those who must evict now.
pub fn evictors(snapshot: &Snapshot) -> SlotSet {
    eviction_plan(snapshot).filter(|(_, share)| *share > 0).map(|(slot, _)| slot).collect()
}

/// In how long clients that are not admitted will need their memory, ns, by slot. A waiter needs it when those before it have
/// had their turns. An idle client's pauses say it; and one that has been idle for longer than those stays so for as long
/// again, as far as anybody knows. (Which of the pages in memory is needed last is the best one to give up: Belady, "A study
/// of replacement algorithms for a virtual-storage computer", 1966.)
pub(super) fn next_uses(snapshot: &Snapshot) -> [Nanos; SLOTS] {
    let mut uses = [0; SLOTS];
    let order = Order::of(snapshot);
    let mut queue: Vec<SlotIndex> = Vec::new();
    for (slot, view) in snapshot.clients() {
        if view.phase.wants_gpu() {
            queue.push(slot);
        } else {
            uses[slot.get()] = ahead::next_use(snapshot, slot);
        }
    }
    queue.sort_by_cached_key(|slot| order.place(*slot));
    let turn = turn_distance(snapshot);
    for (turns, slot) in queue.into_iter().enumerate() {
        uses[slot.get()] = turn.saturating_mul(turns as u64);
    }
    uses
}

fn eviction_plan(snapshot: &Snapshot) -> impl Iterator<Item = (SlotIndex, Granules)> {
    let lacking = lacking(snapshot);
    let ahead = if lacking == 0 { lacking_ahead(snapshot) } else { None };
    let expected = if lacking == 0 && ahead.is_none() { expected(snapshot) } else { None };
    let makes_room = |slot: SlotIndex, view: &SlotView| match (ahead, expected) {
        (Some((last, _)), _) => slot == last,
        (None, Some(expected)) => ahead::makes_room(snapshot, slot, expected),
        (None, None) => !(snapshot.admitted.contains(slot) && view.phase.wants_gpu()),
    };
    let mut left = match (ahead, expected) {
        (Some((_, granules)), _) => granules,
        (None, Some(expected)) => ahead::lacking_for(snapshot, expected),
        (None, None) => lacking,
    };
    let mut order: Vec<(SlotIndex, &SlotView)> = if left == 0 {
        Vec::new()
    } else {
        snapshot.clients().filter(|(slot, view)| view.evictable() > 0 && makes_room(*slot, view)).collect()
    };
    if order.len() > 1 {
        let uses = next_uses(snapshot);
        order.sort_unstable_by_key(|(slot, view)| (view.stuck, Reverse(uses[slot.get()]), *slot));
    }
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
pub(super) fn lacking_ahead(snapshot: &Snapshot) -> Option<(SlotIndex, Granules)> {
    let first = first_waiter(snapshot).filter(|_| missing(snapshot) == 0)?;
    let order = Order::of(snapshot);
    let last = waiters(snapshot).max_by_key(|slot| order.place(*slot)).filter(|last| *last != first)?;
    let lacks = i64::from(snapshot.view(first).missing()) - i64::from(snapshot.free);
    Some((last, lacks.clamp(0, i64::from(Granules::MAX)) as Granules))
}
