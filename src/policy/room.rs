//! Who makes room for whom, and how much.

use crate::page::Phase;
use crate::policy::ahead::{self, expected};
use crate::policy::order::{Order, Standing, Waiting};
use crate::policy::{awaited, first_waiter, missing, switch_time};
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
    Order::new(snapshot, &Standing::of(snapshot)).prefetch(slot)
}

/// Granules that the [`prefetcher`], in `slot`, may bring in ahead of its turn.
fn room_ahead(snapshot: &Snapshot, slot: SlotIndex) -> Granules {
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
    who_needs_room(snapshot, || first_waiter(snapshot)).map(|slot| switch_time(snapshot, slot))
}

fn who_needs_room(snapshot: &Snapshot, first: impl FnOnce() -> Option<SlotIndex>) -> Option<SlotIndex> {
    let fills = || {
        let fillers = snapshot.admitted.iter().filter(|slot| snapshot.view(*slot).phase == Phase::Filling);
        fillers.max_by_key(|slot| snapshot.view(*slot).missing())
    };
    let who = if lacking(snapshot) > 0 { fills() } else { None };
    who.or_else(first)
}

/// Granules that a client must evict now: its share of what the admitted ones lack ([`Order::evict_shares`]).
pub fn evict_share(snapshot: &Snapshot, slot: SlotIndex) -> Granules {
    Order::new(snapshot, &Standing::of(snapshot)).evict_shares()[slot.get()]
}

/// Those who must evict now.
pub fn evictors(snapshot: &Snapshot) -> SlotSet {
    Order::new(snapshot, &Standing::of(snapshot)).evictors()
}

impl Order<'_> {
    /// As [`prefetch`].
    pub fn prefetch(&self, slot: SlotIndex) -> Granules {
        if self.prefetcher() == Some(slot) { room_ahead(self.snapshot, slot) } else { 0 }
    }

    /// As [`prefetcher`].
    pub fn prefetcher(&self) -> Option<SlotIndex> {
        self.first_waiter().or_else(|| expected(self.snapshot))
    }

    /// As [`needed`].
    pub fn needed(&self) -> Option<Nanos> {
        who_needs_room(self.snapshot, || self.first_waiter()).map(|slot| switch_time(self.snapshot, slot))
    }

    /// Those who must evict now.
    pub fn evictors(&self) -> SlotSet {
        let shares = self.evict_shares();
        (0..SLOTS).filter_map(SlotIndex::new).filter(|slot| shares[slot.get()] > 0).collect()
    }

    /// Granules that each client must evict now, by slot: its share of what the admitted ones lack.
    ///
    /// Clients that are not admitted make room in this order: the one that needs its memory last evicts first
    /// (`next_uses`).
    /// A client that still drains will evict when it has, and keeps its place, unless its drain stands still.
    /// When nothing is lacking, the last in the queue makes room for the first; or, if nobody waits, those who are idle make room
    /// for one that is expected sooner.
    pub fn evict_shares(&self) -> [Granules; SLOTS] {
        let mut shares = [0; SLOTS];
        let snapshot = self.snapshot;
        let lacking = lacking(snapshot);
        if lacking == 0
            && let Some((last, granules)) = self.lacking_ahead()
        {
            shares[last.get()] = snapshot.view(last).evictable().min(granules);
            return shares;
        }
        let expected = if lacking == 0 { expected(snapshot) } else { None };
        let mut left = expected.map_or(lacking, |expected| ahead::lacking_for(snapshot, expected));
        if left == 0 {
            return shares;
        }
        let makes_room = |slot: SlotIndex, view: &SlotView| {
            let asked = match expected {
                Some(expected) => ahead::makes_room(snapshot, slot, expected),
                None => !(snapshot.admitted.contains(slot) && view.phase.wants_gpu()),
            };
            view.evictable() > 0 && asked
        };
        let clients: Vec<(SlotIndex, &SlotView)> =
            snapshot.clients().filter(|(slot, view)| makes_room(*slot, view)).collect();
        // Where there is one, nobody need know when it needs its memory.
        let uses = if clients.len() > 1 { self.next_uses(&clients) } else { vec![0; clients.len()] };
        let mut order: Vec<_> =
            clients.iter().zip(uses).map(|((slot, view), next)| (view.stuck, Reverse(next), *slot)).collect();
        order.sort_unstable();
        for (_, _, slot) in order {
            let share = snapshot.view(slot).evictable().min(left);
            left -= share;
            shares[slot.get()] = share;
        }
        shares
    }

    /// In how long each of `clients`, which are not admitted, will need its memory, ns. A waiter needs it when those before it
    /// have had their turns. An idle client's pauses say it; and one that has been idle for longer than those stays so for as
    /// long again, as far as anybody knows. (Which of the pages in memory is needed last is the best one to give up: Belady, "A
    /// study of replacement algorithms for a virtual-storage computer", 1966.)
    fn next_uses(&self, clients: &[(SlotIndex, &SlotView)]) -> Vec<Nanos> {
        let queue = &self.standing.places;
        let turn = self.standing.turns.distance();
        let next_use = |(slot, _): &(SlotIndex, &SlotView)| {
            let Some(place) = self.place(*slot) else {
                return ahead::next_use(self.snapshot, *slot);
            };
            let before = queue.iter().flatten().filter(|other| **other < place);
            turn.saturating_mul(before.count() as u64)
        };
        clients.iter().map(next_use).collect()
    }

    /// The last in the queue, and granules that the first could bring in ahead of its turn ([`prefetch`]) if the last made
    /// room, once those who run have all of theirs. What was left lying of the last would stay until its own turn, which is the
    /// farthest, and the holder's would have to go instead at the next switch, while nobody runs.
    ///
    /// Nobody else is asked: those between come back sooner, and of those who are idle perhaps the next who comes fits beside
    /// them.
    pub(super) fn lacking_ahead(&self) -> Option<(SlotIndex, Granules)> {
        let snapshot = self.snapshot;
        let Waiting { first, last, .. } = self.waiting.filter(|who| who.last != who.first)?;
        if missing(snapshot) != 0 {
            return None;
        }
        let lacks = i64::from(snapshot.view(first).missing()) - i64::from(snapshot.free);
        Some((last, lacks.clamp(0, i64::from(Granules::MAX)) as Granules))
    }
}
