//! Memory that comes in before its client is back from a pause.
//!
//! A client that pauses for longer than a switch takes gives way, and its switch back begins only when it is back. One whose
//! pauses are regular says when it will be back ([`SlotView::returns_at`], from [`crate::pauses::Rhythm`]). From a little more
//! than a switch before that moment on it is *expected*: it brings its memory in, where nobody needs the room sooner. Then
//! its switch moves nothing.
//!
//! A client whose process waits for another GPU first is expected when that is likely to come ([`crate::policy::turn_comes`]), or at once
//! if it is [`NEXT`] there.
//!
//! - It takes nothing from anybody who waits or runs: while somebody waits, or fills, nobody is expected, and room is made
//!   only by clients without work that need their memory later.
//! - A holder in a pause gives way to it if its own forecast says that it will be back later ([`gives_way_ahead`]). It would
//!   have to as soon as the other is back.
//! - A forecast that was wrong costs what was moved: not more than the client's memory, out and in. One that is overdue by as
//!   much as it was early is no forecast any more, and a pause of another length is none for the next pauses.

use crate::page::Phase;
use crate::policy::{NEXT, awaited, copy_time, missing};
use crate::slot::SlotIndex;
use crate::snapshot::{SlotView, Snapshot};
use crate::units::{Granules, MILLISECOND, Nanos};

/// Whether the GPU has room for the memory of all clients: then nobody ever gives way.
pub fn all_fit(snapshot: &Snapshot) -> bool {
    let demand: u64 = snapshot.clients().map(|(_, view)| u64::from(view.movable())).sum();
    demand <= u64::from(snapshot.usable())
}

/// What a client's thread may be late by, and the look that finds another one's pause, ns.
const LATE: Nanos = 20 * MILLISECOND;

/// So long before it is back an idle client is expected, and so long afterwards it still is, ns: the longest switch to it, in
/// which all of its memory comes in and as much goes out, a quarter of that, and a little. Shorter pauses are not worth a
/// forecast. The time does not shrink with what is still to come in: else the client would stop in between.
pub fn head_start(snapshot: &Snapshot, slot: SlotIndex) -> Nanos {
    let all = snapshot.view(slot).movable().min(snapshot.usable());
    let switch = copy_time(all, snapshot.bandwidth_in).max(copy_time(all, snapshot.bandwidth_out));
    switch.saturating_add(switch / 4).saturating_add(LATE)
}

/// When an idle client will be back, ns, if it has said so and is not overdue. One that is [`NEXT`] on another GPU never is.
fn forecast(snapshot: &Snapshot, slot: SlotIndex) -> Option<Nanos> {
    let at = snapshot.view(slot).returns_at;
    let due = || at == NEXT || snapshot.now <= at.saturating_add(head_start(snapshot, slot));
    (at > 0 && due()).then_some(at)
}

/// In how long an idle client needs its memory, ns: as it has said; else after the mean of its pauses, or in as long as it has
/// been idle, whichever is more.
pub(super) fn next_use(snapshot: &Snapshot, slot: SlotIndex) -> Nanos {
    let view = snapshot.view(slot);
    let as_before = || view.pause.max(snapshot.now.saturating_sub(view.idle_since));
    forecast(snapshot, slot).map_or_else(as_before, |at| at.saturating_sub(snapshot.now))
}

/// The idle client that brings its memory in before it is back: of those whose time has come, the first one to return.
/// Nobody while somebody waits, or fills.
pub fn expected(snapshot: &Snapshot) -> Option<SlotIndex> {
    let due = |slot: SlotIndex| {
        let at = forecast(snapshot, slot)?;
        (at.saturating_sub(head_start(snapshot, slot)) <= snapshot.now).then_some((at, slot))
    };
    let lacks = |view: &SlotView| view.phase == Phase::Idle && view.returns_at > 0 && view.missing() > 0;
    let idle = || snapshot.clients().filter(|(_, view)| lacks(view));
    // Most often there is none, and the rest costs more.
    let (_, slot) = idle().filter_map(|(slot, _)| due(slot)).min()?;
    (!awaited(snapshot) && missing(snapshot) == 0).then_some(slot)
}

/// When an idle client that lacks memory will be expected, ns.
pub fn expected_from(snapshot: &Snapshot, slot: SlotIndex) -> Option<Nanos> {
    let view = snapshot.view(slot);
    let lacks = view.phase == Phase::Idle && view.missing() > 0;
    let at = forecast(snapshot, slot).filter(|_| lacks)?;
    Some(at.saturating_sub(head_start(snapshot, slot)))
}

/// Whether a client makes room for the one that is expected: it has no work, and needs its memory later. Not one that has said when its
/// pause will be over, for one that is [`NEXT`]: that may come later still.
pub(super) fn makes_room(snapshot: &Snapshot, slot: SlotIndex, expected: SlotIndex) -> bool {
    let view = snapshot.view(slot);
    let pauses = || view.pause > 0 && forecast(snapshot, slot).is_some();
    slot != expected
        && !view.phase.wants_gpu()
        && next_use(snapshot, slot) > next_use(snapshot, expected)
        && !(snapshot.view(expected).returns_at == NEXT && pauses())
}

/// Whether the client in `slot`, which runs, takes note of its pauses though nobody needs the GPU: not everybody's memory fits,
/// and another client is in a pause, as far as anybody knows: it has paused before, and this pause has not lasted for four
/// times as long. Else there is nobody to bring memory in ahead of, and a client is left alone that works beside one that is
/// idle.
pub fn watches_pauses(snapshot: &Snapshot, slot: SlotIndex) -> bool {
    let pauses = |(other, view): (SlotIndex, &SlotView)| {
        let idle = snapshot.now.saturating_sub(view.idle_since);
        other != slot && !view.paused && view.phase == Phase::Idle && idle < view.pause.saturating_mul(4)
    };
    snapshot.clients().any(pauses) && !all_fit(snapshot)
}

/// Granules that the expected client lacks and the pool does not have.
pub(super) fn lacking_for(snapshot: &Snapshot, expected: SlotIndex) -> Granules {
    let lacks = i64::from(snapshot.view(expected).missing()) - i64::from(snapshot.free);
    lacks.clamp(0, i64::from(Granules::MAX)) as Granules
}

/// Whether a holder without work gives way, that will be back at `returns_at`, ns: a client is expected before, and those who
/// are idle do not hold enough of what it lacks. Never for one that is [`NEXT`]: nobody knows when that one comes.
pub fn gives_way_ahead(snapshot: &Snapshot, slot: SlotIndex, returns_at: Nanos) -> bool {
    let Some(expected) = expected(snapshot) else { return false };
    let idle: u64 = snapshot
        .clients()
        .filter(|(other, _)| *other != slot && makes_room(snapshot, *other, expected))
        .map(|(_, view)| u64::from(view.evictable()))
        .sum();
    let comes = snapshot.view(expected).returns_at;
    comes != NEXT
        && comes < returns_at
        && snapshot.view(slot).evictable() > 0
        && u64::from(lacking_for(snapshot, expected)) > idle
}

// Safe code, for which Miri would take hours.
#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use crate::page::Page;
    use crate::policy::{admit, evict_share, evictors, lacking, needed, prefetch, prefetcher};
    use crate::slot::SlotSet;
    use crate::units::SECOND;
    use proptest::prelude::*;

    /// Of each client: phase, granules that it needs and has, and in how many ms it is expected back.
    type Clients<'a> = &'a [(Phase, Granules, Granules, u64)];

    /// The moment at which all of them are looked at, ns.
    const NOW: Nanos = 1_000 * SECOND;

    fn slot(index: usize) -> SlotIndex {
        SlotIndex::new(index).unwrap()
    }

    /// Whoever runs or fills is admitted. A granule takes 1 ms each way, so a client of 1,000 has a head start of 1.27 s.
    fn snapshot(capacity: Granules, clients: Clients) -> Snapshot {
        let mut snapshot = Snapshot::take(&Page::for_tests(capacity), SlotSet::EMPTY).at(NOW);
        let a_thousand_a_second = crate::units::bytes_of(1_000);
        (snapshot.bandwidth_in, snapshot.bandwidth_out) = (a_thousand_a_second, a_thousand_a_second);
        for (index, (phase, demand, resident, ms)) in clients.iter().copied().enumerate() {
            snapshot.occupied = snapshot.occupied.with(slot(index));
            if matches!(phase, Phase::Running | Phase::Filling) {
                snapshot.admitted = snapshot.admitted.with(slot(index));
            }
            let returns_at = if ms > 0 { NOW + ms * MILLISECOND } else { 0 };
            let view = &mut snapshot.slots[index];
            *view = SlotView { phase, demand, resident, returns_at, weight: 100, ..SlotView::default() };
            (view.idle_since, view.ticket) = (NOW - SECOND, index as u64);
            (view.deadline, view.slice_start) = (Nanos::MAX, NOW);
            snapshot.free -= resident as i32;
        }
        snapshot
    }

    fn of(snapshot: &Snapshot, ask: impl Fn(&Snapshot, SlotIndex) -> Granules) -> Vec<Granules> {
        snapshot.clients().map(|(slot, _)| ask(snapshot, slot)).collect()
    }

    #[test]
    fn an_idle_client_is_expected_a_head_start_before_it_is_back_and_so_long_afterwards() {
        use Phase::Idle;
        let mut snapshot = snapshot(1_200, &[(Idle, 1_000, 200, 5_000), (Idle, 1_000, 1_000, 9_000)]);
        let (back, start) = (NOW + 5 * SECOND, head_start(&snapshot, slot(0)));
        assert_eq!(start, 1_270 * MILLISECOND);
        assert_eq!(expected_from(&snapshot, slot(0)), Some(back - start));
        assert_eq!(expected_from(&snapshot, slot(1)), None, "all of its memory is there");
        for (now, is) in
            [(back - start - 1, false), (back - start, true), (back + start, true), (back + start + 1, false)]
        {
            assert_eq!(expected(&snapshot.at(now)), is.then(|| slot(0)), "at {now}");
        }
        snapshot.now = back - start;
        assert_eq!((of(&snapshot, prefetch), of(&snapshot, evict_share)), (vec![0, 0], vec![0, 800]));
        // The other one has said nothing, and has been idle for 4.73 s: longer than the first one will be.
        snapshot.slots[1].returns_at = 0;
        assert_eq!(of(&snapshot, evict_share), [0, 800]);
        // It will be back sooner.
        snapshot.slots[1].returns_at = back - 1;
        assert_eq!(of(&snapshot, evict_share), [0, 0]);
        // What comes next on another GPU comes whenever that is.
        snapshot.slots[0].returns_at = NEXT;
        for now in [NOW - SECOND, NOW, NOW + 1_000 * SECOND] {
            let snapshot = snapshot.at(now);
            assert_eq!((expected(&snapshot), expected_from(&snapshot, slot(0))), (Some(slot(0)), Some(0)));
            assert_eq!(of(&snapshot, evict_share), [0, 800]);
        }
        snapshot.slots[1].pause = SECOND;
        assert_eq!(of(&snapshot, evict_share), [0, 0], "the other one may be back from its pause before");
        snapshot.slots[1].returns_at = 0;
        assert_eq!(of(&snapshot, evict_share), [0, 800], "nobody knows when it will be back");
        snapshot.slots[1].returns_at = NEXT;
        assert_eq!(of(&snapshot, evict_share), [0, 0], "neither comes before the other");
        snapshot.slots[1].pause = 0;
        (snapshot.slots[0].returns_at, snapshot.slots[1].returns_at) = (back, back - 1);
        // What is free is there for it all the same.
        snapshot.slots[1].resident = 900;
        snapshot.slots[1].demand = 900;
        snapshot.free = 100;
        assert_eq!(of(&snapshot, prefetch), [100, 0]);
    }

    #[test]
    fn nobody_is_expected_while_somebody_waits_or_fills() {
        use Phase::{Filling, Idle, Running, Waiting};
        let who = |phase, resident| {
            let clients = [(Idle, 1_000, 0, 500), (Running, 1_000, 1_000, 0), (phase, 1_000, resident, 0)];
            expected(&snapshot(2_500, &clients))
        };
        assert_eq!((who(Waiting, 0), who(Filling, 0)), (None, None));
        assert_eq!((who(Idle, 0), who(Running, 1_000)), (Some(slot(0)), Some(slot(0))));
    }

    #[test]
    fn a_holder_gives_way_to_who_is_back_before_it_if_there_is_no_other_room() {
        use Phase::{Idle, Running};
        let with = |resident, demand| {
            let clients = [(Idle, 1_000, 200, 600), (Running, 1_000, 1_000, 0), (Idle, demand, resident, 0)];
            snapshot(2_000, &clients)
        };
        let gives = |snapshot: &Snapshot, ms: u64| gives_way_ahead(snapshot, slot(1), NOW + ms * MILLISECOND);
        assert!(!gives(&with(0, 0), 1_000), "800 are free");
        assert!(!gives(&with(800, 800), 1_000), "the third one has as much");
        let mut snapshot = with(0, 0);
        snapshot.free = 799;
        assert_eq!([601, 600, 0].map(|ms| gives(&snapshot, ms)), [true, false, false]);
        let before = std::mem::replace(&mut snapshot.slots[0].returns_at, NEXT);
        assert!(!gives(&snapshot, 601), "nobody knows when it comes");
        snapshot.slots[0].returns_at = before;
        snapshot.now = NOW - SECOND;
        assert!(!gives(&snapshot, 1_000), "it is not expected yet");
    }

    #[test]
    fn pauses_are_watched_beside_who_has_paused_lately() {
        use Phase::{Idle, Running, Waiting};
        let watches = |phase, pause, capacity| {
            let mut snapshot = snapshot(capacity, &[(Running, 1_000, 1_000, 0), (phase, 1_000, 0, 0)]);
            snapshot.slots[1].pause = pause;
            watches_pauses(&snapshot, slot(0))
        };
        assert!(watches(Idle, SECOND / 4 + 1, 1_200));
        assert!(!watches(Idle, SECOND / 4, 1_200), "it has been idle for four times that");
        assert!(!watches(Idle, 0, 1_200), "nobody knows that it pauses");
        assert!(!watches(Waiting, SECOND, 1_200) && !watches(Idle, SECOND, 2_000));
    }

    fn any_client() -> impl Strategy<Value = (Phase, Granules, Granules, u64)> {
        let phase = prop_oneof![6 => Just(Phase::Idle), 2 => Just(Phase::Running), 1 => (0..6u32).prop_map(Phase::from)];
        (phase, 0..800u32, 0..800u32, prop_oneof![1 => Just(0), 4 => 1..3_000u64])
    }

    fn anybody() -> impl Strategy<Value = Snapshot> {
        (100..2_000u32, prop::collection::vec(any_client(), 1..8)).prop_map(|(capacity, mut clients)| {
            let mut left = capacity;
            for (phase, demand, resident, _) in &mut clients {
                let has = if *phase == Phase::Running { *demand } else { (*resident).min(*demand) };
                *resident = has.min(left);
                left -= *resident;
            }
            let mut snapshot = snapshot(capacity, &clients);
            snapshot.admitted = admit(&snapshot);
            snapshot
        })
    }

    /// All do what they are asked to, until nothing is asked any more. Granules that each has brought in.
    fn settle(snapshot: &mut Snapshot, came: &mut [u64]) {
        for _ in 0..1_000 {
            let evicts: Vec<_> =
                evictors(snapshot).iter().map(|slot| (slot, evict_share(snapshot, slot))).collect();
            for (slot, share) in &evicts {
                snapshot.slots[slot.get()].resident -= share;
                snapshot.free += *share as i32;
            }
            let room = prefetcher(snapshot).map_or(0, |slot| prefetch(snapshot, slot));
            if let Some(slot) = prefetcher(snapshot) {
                snapshot.slots[slot.get()].resident += room;
                snapshot.free -= room as i32;
                came[slot.get()] += u64::from(room);
            }
            if room == 0 && evicts.is_empty() {
                return;
            }
        }
        panic!("memory goes to and fro");
    }

    proptest! {
        /// Whoever waits, fills, drains or runs loses nothing to who is expected, neither memory nor its turn, nor any room.
        #[test]
        fn who_is_expected_takes_nothing_from_who_waits_or_runs(snapshot in anybody()) {
            let before = snapshot.clone();
            let Some(who) = expected(&snapshot) else { return Ok(()) };
            prop_assert_eq!(snapshot.view(who).phase, Phase::Idle);
            prop_assert!(!awaited(&snapshot) && lacking(&snapshot) == 0);
            for slot in evictors(&snapshot).iter() {
                prop_assert!(!snapshot.view(slot).phase.wants_gpu(), "{slot:?} makes room");
                prop_assert!(next_use(&snapshot, slot) > next_use(&snapshot, who));
            }
            let mut after = snapshot;
            settle(&mut after, &mut [0; 8]);
            prop_assert_eq!((lacking(&after), needed(&after), admit(&after)), (0, needed(&before), admit(&before)));
            for (slot, view) in before.clients().filter(|(_, view)| view.phase.wants_gpu()) {
                prop_assert_eq!(after.view(slot), view);
            }
        }

        /// Whoever comes now that was not expected finds what there was, or makes those evict that were brought in.
        #[test]
        fn who_comes_all_the_same_is_admitted_as_before(snapshot in anybody(), index in 0..8usize) {
            let comes = |snapshot: &Snapshot| {
                let mut snapshot = snapshot.clone();
                snapshot.slots[index].phase = Phase::Waiting;
                admit(&snapshot)
            };
            prop_assume!(snapshot.occupied.contains(slot(index)) && snapshot.slots[index].phase == Phase::Idle);
            let mut after = snapshot.clone();
            settle(&mut after, &mut [0; 8]);
            prop_assert_eq!(comes(&after), comes(&snapshot));
        }

        /// Forecasts of which none comes true, of clients of one size: each brings in no more than its memory, once.
        #[test]
        fn wrong_forecasts_move_no_more_than_each_ones_memory_once(
            demand in 1..800u32, capacity in 800..2_000u32, returns in prop::collection::vec(0..20_000u64, 1..8),
        ) {
            let clients: Vec<_> = returns.iter().map(|ms| (Phase::Idle, demand, 0, *ms)).collect();
            let mut snapshot = snapshot(capacity, &clients);
            let mut came = [0; 8];
            for step in 0..300 {
                snapshot.now = NOW + step * 100 * MILLISECOND;
                settle(&mut snapshot, &mut came);
            }
            prop_assert!(came.iter().all(|granules| *granules <= u64::from(demand)), "{came:?} of {demand}");
        }
    }
}
