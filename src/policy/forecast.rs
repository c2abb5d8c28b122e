//! When the turn of a client that waits is likely to come.
//!
//! A process with several GPUs, or one of a gang, that waits for one GPU has not asked for the later ones yet ([`crate::gang_order`]):
//! there it is idle, and will want its memory as soon as it has the first one. So whoever waits says when that is likely to be, and
//! its idle clients are expected then ([`super::expected`]): their memory is not the first to go, and comes in ahead if there is room.
//! Of one that is [`NEXT`] it comes in from now on, as where it waits. A forecast that is wrong costs what one of a pause costs:
//! bytes that move for nothing, and nobody's turn.

use crate::page::Phase;
use crate::policy::order::{Order, Standing};
use crate::policy::{NOT_BEGUN, switch_time, turn_left, waiters};
use crate::slot::SlotIndex;
use crate::snapshot::Snapshot;
use crate::units::Nanos;

/// In place of a time: nobody's turn comes before, whenever that is. Less than any time, so that of two forecasts the later one is the
/// greater one.
pub const NEXT: Nanos = 1;

/// When the client in `slot` is likely to be admitted, ns, or [`NEXT`]; `None` if it does not wait.
pub fn turn_comes(snapshot: &Snapshot, slot: SlotIndex) -> Option<Nanos> {
    Order::new(snapshot, &Standing::of(snapshot)).turn_comes(slot)
}

impl Order<'_> {
    /// As [`turn_comes`]: those before it have a turn each, from when the first of them has room.
    pub fn turn_comes(&self, slot: SlotIndex) -> Option<Nanos> {
        let mut places: Vec<_> = waiters(self.snapshot).filter_map(|other| self.place(other)).collect();
        places.sort_unstable();
        let place = self.place(slot)?;
        let before = places.binary_search(&place).ok()?;
        if before == 0 {
            return Some(NEXT);
        }
        let turns = self.standing.turns.distance().saturating_mul(before as u64);
        Some(self.first_has_room()?.saturating_add(turns))
    }

    /// When enough of those who are admitted have had their turns for the first waiter to have room, ns.
    fn first_has_room(&self) -> Option<Nanos> {
        let (snapshot, ends) = (self.snapshot, self.ends()?);
        let leaves = |holder: SlotIndex| {
            let view = snapshot.view(holder);
            match view.phase {
                Phase::Running if view.slice_start != NOT_BEGUN => {
                    ends.of_holder(view).unwrap_or(snapshot.now)
                }
                // Its turn is still to begin.
                Phase::Waiting | Phase::Filling | Phase::Running => {
                    let turn = turn_left(&self.standing.turns, view, ends.quantum);
                    snapshot.now.saturating_add(switch_time(snapshot, holder)).saturating_add(turn)
                }
                Phase::Draining | Phase::Idle | Phase::Leaving => snapshot.now,
            }
        };
        let has = |holder: SlotIndex| u64::from(snapshot.view(holder).movable());
        let mut leaving: Vec<_> =
            snapshot.admitted.iter().map(|holder| (leaves(holder).max(snapshot.now), has(holder))).collect();
        leaving.sort_unstable();
        let first = u64::from(snapshot.view(self.first_waiter()?).movable());
        let mut taken: u64 = leaving.iter().map(|(_, granules)| granules).sum();
        let mut moment = snapshot.now;
        for (leaves, granules) in leaving {
            if taken.saturating_add(first) <= u64::from(snapshot.usable()) {
                break;
            }
            (moment, taken) = (leaves, taken - granules);
        }
        Some(moment)
    }
}

// Safe code, for which Miri would take hours.
#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use crate::page::{Page, Quantum};
    use crate::slot::SlotSet;
    use crate::snapshot::SlotView;
    use crate::units::{Granules, MILLISECOND, SECOND, bytes_of};

    const NOW: Nanos = 1_000 * SECOND;

    fn slot(index: usize) -> SlotIndex {
        SlotIndex::new(index).unwrap()
    }

    /// Clients with a phase, granules that they need and have, and since how many ms their slice has lasted. A granule takes 1 ms each
    /// way, and a turn 100 ms. Whoever runs or fills is admitted, and all queued in the order of their slots.
    fn snapshot(capacity: Granules, clients: &[(Phase, Granules, Granules, u64)]) -> Snapshot {
        let mut snapshot = Snapshot::take(&Page::for_tests(capacity), SlotSet::EMPTY).at(NOW);
        (snapshot.bandwidth_in, snapshot.bandwidth_out) = (bytes_of(1_000), bytes_of(1_000));
        snapshot.settings.quantum = Quantum::Fixed(100 * MILLISECOND);
        for (index, (phase, demand, resident, ran)) in clients.iter().copied().enumerate() {
            snapshot.occupied = snapshot.occupied.with(slot(index));
            if matches!(phase, Phase::Running | Phase::Filling) {
                snapshot.admitted = snapshot.admitted.with(slot(index));
            }
            let view = &mut snapshot.slots[index];
            *view = SlotView { phase, demand, resident, weight: 100, ..SlotView::default() };
            (view.ticket, view.deadline) = (index as u64 + 1, NOW + 60 * SECOND);
            (view.slice_start, view.last_ran) = (NOW - ran * MILLISECOND, NOW - SECOND);
            snapshot.free -= resident as i32;
        }
        snapshot
    }

    /// In how many ms the turn of each comes; 0 for the one that is next.
    fn comes(snapshot: &Snapshot) -> Vec<Option<u64>> {
        let within = |at: Nanos| if at == NEXT { 0 } else { (at - NOW) / MILLISECOND };
        snapshot.clients().map(|(slot, _)| turn_comes(snapshot, slot).map(within)).collect()
    }

    /// In how many ms there is room for the one that is next.
    fn has_room(snapshot: &Snapshot) -> u64 {
        (Order::new(snapshot, &Standing::of(snapshot)).first_has_room().unwrap() - NOW) / MILLISECOND
    }

    /// A switch moves the 60 granules that two of them together have too many.
    #[test]
    fn each_comes_when_those_before_it_have_had_their_turns() {
        use Phase::{Idle, Running, Waiting};
        let waits = (Waiting, 80, 0, 0);
        let clients = [(Running, 80, 80, 30), waits, waits, waits, (Idle, 80, 0, 0)];
        assert_eq!(comes(&snapshot(100, &clients)), [None, Some(0), Some(230), Some(390), None]);
        // Who has waited for too long is next.
        let mut late = snapshot(100, &clients);
        late.slots[2].deadline = NOW - SECOND;
        assert_eq!(comes(&late), [None, Some(230), Some(0), Some(390), None]);
    }

    #[test]
    fn the_turn_of_one_that_fills_or_waits_for_another_gpu_is_still_to_begin() {
        use Phase::{Filling, Running, Waiting};
        assert_eq!(has_room(&snapshot(100, &[(Filling, 80, 50, 0), (Waiting, 80, 50, 0)])), 130);
        let mut waits = snapshot(100, &[(Running, 80, 80, 30), (Waiting, 80, 0, 0)]);
        assert_eq!(has_room(&waits), 70);
        waits.slots[0].slice_start = NOT_BEGUN;
        assert_eq!(has_room(&waits), 100);
        waits.slots[0].phase = Phase::Draining;
        assert_eq!(has_room(&waits), 0);
    }

    #[test]
    fn the_first_waits_for_as_many_as_are_in_its_way() {
        use Phase::{Running, Waiting};
        let with = |demand| {
            has_room(&snapshot(100, &[(Running, 50, 50, 80), (Running, 40, 40, 10), (Waiting, demand, 0, 0)]))
        };
        assert_eq!(with(50), 20, "beside the second one");
        assert_eq!(with(80), 90);
        assert_eq!(with(300), 90, "it is admitted alone");
    }
}
