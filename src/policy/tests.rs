use super::*;
use crate::page::{Page, Settings};
use crate::slot::SLOTS;
use crate::units::{MILLISECOND, SECOND};
use proptest::prelude::*;

fn slot(index: usize) -> SlotIndex {
    SlotIndex::new(index).unwrap()
}

/// Clients by slot, given as (phase, demand, resident, ticket); the rest is empty.
fn snapshot(
    capacity: Granules,
    clients: &[(Phase, Granules, Granules, u64)],
    admitted: &[usize],
) -> Snapshot {
    let mut snapshot = Snapshot::take(&Page::for_tests(capacity), SlotSet::EMPTY);
    for (index, (phase, demand, resident, ticket)) in clients.iter().copied().enumerate() {
        snapshot.occupied = snapshot.occupied.with(slot(index));
        let view = &mut snapshot.slots[index];
        *view = SlotView { phase, demand, resident, ticket, ..SlotView::default() };
        snapshot.free -= resident as i32;
    }
    snapshot.admitted = admitted.iter().map(|index| slot(*index)).collect();
    snapshot.settings = Settings { quantum: Quantum::Fixed(100 * MILLISECOND), ..Settings::default() };
    snapshot
}

fn set(indices: &[usize]) -> SlotSet {
    indices.iter().map(|index| slot(*index)).collect()
}

#[test]
fn all_run_when_all_fit() {
    let snapshot =
        snapshot(10, &[(Phase::Running, 5, 5, 1), (Phase::Waiting, 5, 0, 2), (Phase::Idle, 9, 0, 0)], &[0]);
    assert_eq!(admit(&snapshot, u64::MAX), set(&[0, 1]));
}

#[test]
fn a_slice_goes_on_until_it_is_over() {
    let mut snapshot = snapshot(10, &[(Phase::Running, 8, 8, 1), (Phase::Waiting, 8, 0, 2)], &[0]);
    snapshot.slots[0].slice_start = 1_000;
    let end = 1_000 + 100 * MILLISECOND;
    assert_eq!(slice_end(&snapshot, slot(0)), Some(end));
    assert_eq!(admit(&snapshot, end - 1), set(&[0]));
    assert_eq!(admit(&snapshot, end), set(&[1]));
}

#[test]
fn a_slice_that_has_not_begun_is_never_over() {
    let mut snapshot = snapshot(10, &[(Phase::Running, 8, 8, 1), (Phase::Waiting, 8, 0, 2)], &[0]);
    snapshot.slots[0].slice_start = NOT_BEGUN;
    for ns in [0, 1, u64::MAX] {
        snapshot.settings.quantum = Quantum::Fixed(ns);
        assert_eq!(slice_end(&snapshot, slot(0)), None);
        assert_eq!(next_decision(&snapshot, 0), None);
        assert_eq!(admit(&snapshot, u64::MAX), set(&[0]));
    }
    // It gains nothing by it in anybody's gap: the first waiter still comes before.
    snapshot.slots[0].ticket = 3;
    snapshot.occupied = snapshot.occupied.with(slot(2));
    snapshot.slots[2] = SlotView { phase: Phase::Running, demand: 2, ticket: 1, ..SlotView::default() };
    snapshot.admitted = set(&[0, 2]);
    assert_eq!(admit(&snapshot, 0), set(&[1, 2]));
}

#[test]
fn a_small_one_fills_the_gap_and_leaves_it_in_time() {
    let clients = [(Phase::Running, 6, 6, 1), (Phase::Waiting, 8, 0, 2), (Phase::Waiting, 3, 0, 3)];
    let mut snapshot = snapshot(10, &clients, &[0]);
    assert_eq!(admit(&snapshot, 0), set(&[0, 2]));
    snapshot.admitted = set(&[0, 2]);
    snapshot.slots[2].phase = Phase::Running;
    snapshot.slots[2].slice_start = 99 * MILLISECOND;
    assert_eq!(
        admit(&snapshot, 100 * MILLISECOND),
        set(&[1]),
        "the small one's young slice protects it from nobody"
    );
}

#[test]
fn one_that_fits_nowhere_is_admitted_alone() {
    let snapshot = snapshot(10, &[(Phase::Waiting, 50, 0, 1), (Phase::Waiting, 1, 0, 2)], &[]);
    assert_eq!(admit(&snapshot, 0), set(&[0]));
}

#[test]
fn contexts_count() {
    let mut snapshot = snapshot(10, &[(Phase::Running, 5, 5, 1), (Phase::Waiting, 5, 0, 2)], &[0]);
    snapshot.slots[1].context = 1;
    assert_eq!(admit(&snapshot, 0), set(&[0]));
}

#[test]
fn what_cannot_move_counts_whoever_runs_and_nobody_evicts_it() {
    let clients = [(Phase::Running, 6, 6, 1), (Phase::Waiting, 6, 0, 2)];
    let mut snapshot = snapshot(10, &clients, &[0]);
    snapshot.slots[0].unmovable = 2;
    let end = snapshot.slots[0].slice_start + 100 * MILLISECOND;
    assert_eq!(admit(&snapshot, end), set(&[1]), "6 and the 2 that stay are 8 of 10");
    // The first one has given way, and the second one lacks 2 of its 6.
    snapshot.slots[0].phase = Phase::Idle;
    snapshot.admitted = set(&[1]);
    assert_eq!(evict_share(&snapshot, slot(0)), 2);
    snapshot.slots[0].unmovable = 5;
    assert_eq!(evict_share(&snapshot, slot(0)), 1, "all that can move");
    snapshot.slots[0].phase = Phase::Waiting;
    snapshot.slots[0].unmovable = 4;
    snapshot.slots[1].demand = 4;
    assert_eq!(admit(&snapshot, end), set(&[0, 1]), "what stays is not counted twice");
}

#[test]
fn whoever_ran_last_evicts_first() {
    let mut snapshot =
        snapshot(10, &[(Phase::Waiting, 8, 0, 1), (Phase::Idle, 4, 4, 2), (Phase::Waiting, 5, 5, 3)], &[0]);
    snapshot.slots[1].last_ran = 10;
    snapshot.slots[2].last_ran = 20;
    assert_eq!(lacking(&snapshot), 7);
    assert_eq!(
        (evict_share(&snapshot, slot(2)), evict_share(&snapshot, slot(1)), evict_share(&snapshot, slot(0))),
        (5, 2, 0)
    );
}

/// Its work does not end. Who fits beside what it has does not wait for it, and whose memory can move makes room.
#[test]
fn others_go_on_beside_a_drain_that_stands_still() {
    let clients = [
        (Phase::Draining, 6, 6, 1),
        (Phase::Waiting, 8, 0, 2),
        (Phase::Waiting, 3, 0, 3),
        (Phase::Idle, 4, 2, 0),
    ];
    let mut snapshot = snapshot(10, &clients, &[]);
    assert_eq!(admit(&snapshot, 0), set(&[1]), "it ends soon");
    snapshot.slots[0].stuck = true;
    snapshot.slots[0].last_ran = 1;
    assert_eq!(admit(&snapshot, 0), set(&[2]));
    snapshot.admitted = set(&[2]);
    assert_eq!((lacking(&snapshot), evictors(&snapshot)), (1, set(&[3])));
    snapshot.slots[0].stuck = false;
    assert_eq!(evictors(&snapshot), set(&[0]));
    // Nobody fits beside it: the first waiter has what there is.
    snapshot.slots[0].stuck = true;
    (snapshot.slots[2].demand, snapshot.admitted) = (7, SlotSet::EMPTY);
    assert_eq!(admit(&snapshot, 0), set(&[1]));
}

/// What is left of the last waiter goes while another runs, for who is next. What is left of others stays.
#[test]
fn the_last_in_the_queue_makes_room_for_the_first_while_another_runs() {
    let clients = [
        (Phase::Running, 5, 5, 1),
        (Phase::Waiting, 8, 0, 2),
        (Phase::Waiting, 8, 1, 3),
        (Phase::Waiting, 8, 2, 4),
        (Phase::Idle, 8, 1, 0),
    ];
    let mut snapshot = snapshot(10, &clients, &[0]);
    let shares = |snapshot: &Snapshot| [1, 2, 3, 4].map(|index| evict_share(snapshot, slot(index)));
    assert_eq!((snapshot.free, shares(&snapshot)), (1, [0, 0, 2, 0]));
    assert_eq!(evictors(&snapshot), set(&[3]));
    // It has gone, and the first one has brought in what there was room for.
    (snapshot.slots[3].resident, snapshot.slots[1].resident, snapshot.free) = (0, 3, 0);
    assert_eq!(shares(&snapshot), [0; 4]);
    (snapshot.slots[3].resident, snapshot.slots[1].resident) = (1, 2);
    snapshot.slots[1].demand = 2;
    assert_eq!(shares(&snapshot), [0; 4], "the first one has all");
    // While somebody fills, what goes out is for that one.
    snapshot.slots[1].demand = 8;
    snapshot.slots[0].demand = 7;
    snapshot.slots[4].last_ran = 1;
    assert_eq!((lacking(&snapshot), shares(&snapshot)), (2, [1, 0, 0, 1]));
    // One who waits alone is first and last.
    snapshot.slots[0].demand = 5;
    snapshot.slots[2].phase = Phase::Idle;
    snapshot.slots[3].phase = Phase::Idle;
    assert_eq!(shares(&snapshot), [0; 4]);
}

#[test]
fn a_debt_is_somebodys_share() {
    let mut snapshot = snapshot(10, &[(Phase::Running, 4, 4, 1), (Phase::Idle, 6, 6, 0)], &[0]);
    snapshot.free = -2;
    assert_eq!(evict_share(&snapshot, slot(1)), 2);
}

#[test]
fn auto_is_a_multiple_of_the_switch() {
    let mut snapshot = snapshot(1024, &[(Phase::Running, 768, 768, 1), (Phase::Waiting, 512, 0, 2)], &[0]);
    (snapshot.bandwidth_in, snapshot.bandwidth_out) = (2 << 30, 1 << 30);
    snapshot.settings.quantum =
        Quantum::Auto { factor_milli: 5_000, longest_milli: 20_000, min: 0, max: u64::MAX };
    // 1 GiB comes in at 2 GiB/s; 256 granules are free, so half a GiB goes out at 1 GiB/s.
    assert_eq!(switch_time(&snapshot, slot(1)), 500 * MILLISECOND);
    assert_eq!(quantum(&snapshot, slot(1)), 2_500 * MILLISECOND);
}

/// Between a decision and the moment in which the one that it recalled sees it, others decide: an allocation does.
#[test]
fn who_was_recalled_does_not_come_back_before_it_has_seen_it() {
    let clients = [(Phase::Running, 8, 8, 1), (Phase::Waiting, 8, 0, 2)];
    let mut snapshot = snapshot(10, &clients, &[0]);
    let over = snapshot.slots[0].slice_start + 100 * MILLISECOND;
    assert_eq!(admit(&snapshot, over), set(&[1]));
    snapshot.admitted = set(&[1]);
    assert_eq!(first_waiter(&snapshot), None);
    assert_eq!(admit(&snapshot, over), set(&[1]), "its ticket is of the slice that is over");
    snapshot.slots[0] = SlotView { phase: Phase::Waiting, ticket: 3, ..snapshot.slots[0] };
    assert_eq!(first_waiter(&snapshot), Some(slot(0)));
    assert_eq!(admit(&snapshot, over), set(&[1]));
}

/// A holder and two waiters of a pool that holds one of them, with slices of 1 s at least.
fn three_batch_jobs(streaks: [u32; 3]) -> Snapshot {
    let clients = [(Phase::Running, 8, 8, 1), (Phase::Waiting, 8, 0, 2), (Phase::Waiting, 8, 0, 3)];
    let mut snapshot = snapshot(10, &clients, &[0]);
    snapshot.settings.quantum =
        Quantum::Auto { factor_milli: 5_000, longest_milli: 20_000, min: SECOND, max: 60 * SECOND };
    for (index, consecutive_slices) in streaks.into_iter().enumerate() {
        let view = &mut snapshot.slots[index];
        (view.consecutive_slices, view.weight, view.deadline) =
            (consecutive_slices, DEFAULT_WEIGHT, 100 * SECOND + index as u64);
    }
    snapshot
}

/// A pool of 10, and switches that move a granule in a second.
fn slow_link(clients: &[(Phase, Granules, Granules, u64)], admitted: &[usize]) -> Snapshot {
    let mut snapshot = snapshot(10, clients, admitted);
    snapshot.settings.quantum =
        Quantum::Auto { factor_milli: 5_000, longest_milli: 20_000, min: 1, max: 1_000 * SECOND };
    (snapshot.bandwidth_in, snapshot.bandwidth_out) = (bytes_of(1), bytes_of(1));
    snapshot
}

#[test]
fn what_grows_is_the_quantum_of_a_common_switch() {
    let length = |demands: [Granules; 3], residents: [Granules; 2]| {
        let clients = [
            (Phase::Running, demands[0], demands[0], 1),
            (Phase::Waiting, demands[1], residents[0], 2),
            (Phase::Waiting, demands[2], residents[1], 3),
        ];
        let mut snapshot = slow_link(&clients, &[0]);
        snapshot.slots[..3].iter_mut().for_each(|view| view.consecutive_slices = 2);
        slice(&snapshot, slot(0), slot(1))
    };
    let grown = |switches: u64| (0..6).fold(5 * switches * SECOND, |time, _| time + time / 6);
    // Two of them are in one another's way with 6.
    assert_eq!(length([8, 8, 8], [2, 0]), grown(6));
    assert_eq!(length([8, 8, 8], [0, 2]), grown(6), "whoever has what is left");
    assert_eq!(length([8, 7, 3], [3, 0]), grown(5), "the two largest");
    assert_eq!(length([4, 4, 4], [2, 0]), grown(2), "any two fit, and all three lack 2");
    assert_eq!(length([9, 2, 1], [1, 1]), grown(1));
    // The least is what this very switch takes.
    assert_eq!(length([10, 1, 1], [0, 0]), grown(1));
}

/// Two run, of which one fills; the waiter has drained, and has not evicted anything yet.
#[test]
fn a_slice_is_not_over_while_one_who_came_before_the_waiter_fills() {
    let clients = [(Phase::Running, 5, 5, 2), (Phase::Filling, 5, 1, 1), (Phase::Waiting, 5, 4, 3)];
    let mut snapshot = snapshot(10, &clients, &[0, 1]);
    snapshot.settings.quantum = Quantum::Fixed(SECOND);
    let later = |snapshot: &Snapshot| slice_end(snapshot, slot(0)).unwrap() - SECOND;
    let farthest = snapshot.settings.deadline;
    assert_eq!(later(&snapshot), farthest);
    assert_eq!(admit(&snapshot, 2 * SECOND), set(&[0, 1]));
    assert_eq!(evict_share(&snapshot, slot(2)), 4, "so the waiter makes room");
    assert_eq!(admit(&snapshot, SECOND + farthest), set(&[1, 2]), "something is stuck, and others go on");
    snapshot.slots[1].phase = Phase::Running;
    assert_eq!(later(&snapshot), 0);
    // Who came after the waiter, and fills a gap, does not delay it.
    (snapshot.slots[1].phase, snapshot.slots[1].ticket) = (Phase::Filling, 4);
    assert_eq!(later(&snapshot), 0);
}

/// Jain's index: 1 if all have the same, 1/n if one has everything.
fn jain(shares: &[f64]) -> f64 {
    let sum: f64 = shares.iter().sum();
    sum * sum / (shares.len() as f64 * shares.iter().map(|share| share * share).sum::<f64>())
}

/// How long the slices are of clients that take turns, which have used up so many before.
fn lengths_of_turns(streaks: &[u32], turns: usize) -> Vec<Nanos> {
    let clients: Vec<_> = (0..streaks.len()).map(|index| (Phase::Waiting, 8, 0, index as u64)).collect();
    let mut snapshot = snapshot(10, &clients, &[0]);
    snapshot.settings.quantum =
        Quantum::Auto { factor_milli: 5_000, longest_milli: 20_000, min: SECOND, max: 60 * SECOND };
    for (view, consecutive_slices) in snapshot.slots.iter_mut().zip(streaks) {
        view.consecutive_slices = *consecutive_slices;
    }
    let turn = |turn: usize| {
        let n = streaks.len();
        let (holder, next) = (slot(turn % n), slot((turn + 1) % n));
        let length = slice(&snapshot, holder, next);
        // It drains, and stands at the end of the queue.
        let view = &mut snapshot.slots[holder.get()];
        (view.consecutive_slices, view.ticket) = (view.consecutive_slices + 1, (n + turn) as u64);
        length
    };
    (0..turns).map(turn).collect()
}

#[test]
fn slices_grow_while_all_use_them_up() {
    let grown = |times| (0..times).fold(SECOND, |time, _| time + time / 8);
    let lengths = lengths_of_turns(&[0; 4], 20);
    for (turn, length) in lengths.iter().enumerate() {
        assert_eq!(*length, grown(turn).min(4 * SECOND), "20 switches where the shortest has 5");
    }
    // A newcomer, who is last in the queue, brings everybody back to the shortest; and it does not matter who came when.
    assert_eq!(lengths_of_turns(&[9, 30, u32::MAX - 9, 0], 4), lengths[..4]);
    assert_eq!(lengths_of_turns(&[2, 1, 1, 1], 9), lengths[4..13]);
}

#[test]
fn a_heavier_weight_has_longer_slices() {
    let mut snapshot = three_batch_jobs([0; 3]);
    snapshot.slots[0].weight = 300;
    assert_eq!(slice(&snapshot, slot(0), slot(1)), 3 * SECOND);
    assert_eq!(slice(&snapshot, slot(1), slot(2)), SECOND);
    snapshot.slots[2].weight = 1;
    assert_eq!(slice(&snapshot, slot(0), slot(1)), u64::from(MOST_SHARES) * SECOND);
}

#[test]
fn a_waiter_whose_deadline_has_come_waits_for_the_least_and_no_more() {
    let mut snapshot = three_batch_jobs([5; 3]);
    snapshot.slots[0].slice_start = SECOND;
    let whole = SECOND + slice(&snapshot, slot(0), slot(1));
    assert!(whole > 3 * SECOND);
    assert_eq!(slice_end(&snapshot, slot(0)), Some(whole));
    snapshot.slots[1].deadline = 3 * SECOND;
    assert_eq!(slice_end(&snapshot, slot(0)), Some(3 * SECOND));
    snapshot.slots[1].deadline = SECOND;
    assert_eq!(slice_end(&snapshot, slot(0)), Some(2 * SECOND), "the least is what a switch is worth");
    // Whoever is in more of a hurry goes first, though another came before.
    snapshot.slots[2].deadline = 0;
    assert_eq!(admit(&snapshot, 2 * SECOND), set(&[2]));
    // And is not taken for one who fills a gap, once it runs.
    snapshot.admitted = set(&[2]);
    snapshot.slots[0].phase = Phase::Idle;
    snapshot.slots[2].phase = Phase::Running;
    snapshot.slots[2].slice_start = 2 * SECOND;
    assert_eq!(admit(&snapshot, 2 * SECOND), set(&[2]));
}

#[test]
fn light_users_have_earlier_deadlines_than_heavy_ones() {
    let mut snapshot = three_batch_jobs([0; 3]);
    snapshot.settings.deadline = 30 * SECOND;
    let far = 30 * SECOND;
    assert_eq!(deadline(&snapshot, slot(1), 0), far, "nobody has used anything");
    for index in 0..3 {
        snapshot.slots[index].usage = 6 * SECOND;
    }
    assert_eq!(deadline(&snapshot, slot(1), 5), far + 5);
    snapshot.slots[1].usage = 500 * MILLISECOND;
    assert_eq!(deadline(&snapshot, slot(1), 0), 0, "less than an eighth of the mean: at once");
    // The mean is 4.4 s then, and this one has used 2.18 eighths of it, so it is 0.394 of the way from 1 to 4.
    snapshot.slots[1].usage = 1_200 * MILLISECOND;
    assert_eq!(deadline(&snapshot, slot(1), 0), far * 393 / 1_000);
    for (usage, why) in [(4, "more than half of the mean"), (60, "and no farther")] {
        snapshot.slots[1].usage = usage * SECOND;
        assert_eq!(deadline(&snapshot, slot(1), 0), far, "{why}");
    }
    snapshot.slots[1].usage = 12 * SECOND;
    snapshot.slots[1].weight = 1_000;
    assert_eq!(deadline(&snapshot, slot(1), 0), far * 393 / 1_000, "ten times the weight");
}

#[test]
fn a_slice_can_end_when_the_quantum_is_over_though_nobody_waits_yet() {
    let mut snapshot = three_batch_jobs([20; 3]);
    snapshot.slots[0].slice_start = 7 * SECOND;
    assert!(slice_end(&snapshot, slot(0)) > Some(8 * SECOND));
    assert_eq!(earliest_end(&snapshot, slot(0), 9 * SECOND), Some(8 * SECOND));
    for waiter in [1, 2] {
        snapshot.slots[waiter].phase = Phase::Idle;
    }
    assert_eq!(slice_end(&snapshot, slot(0)), None);
    assert_eq!(earliest_end(&snapshot, slot(0), 9 * SECOND), Some(8 * SECOND), "one may come");
    assert_eq!(earliest_end(&snapshot, slot(1), 9 * SECOND), None, "has no slice");
    snapshot.slots[0].slice_start = NOT_BEGUN;
    assert_eq!(earliest_end(&snapshot, slot(0), 9 * SECOND), Some(10 * SECOND), "as if it began now");
    for waiter in [1, 2] {
        snapshot.slots[waiter].demand = 1;
    }
    assert_eq!(earliest_end(&snapshot, slot(0), 9 * SECOND), None, "all fit");
}

#[test]
fn the_first_waiter_may_fill_what_room_is_left() {
    // The holder has all of its 6; the waiters come after it.
    let clients = [(Phase::Running, 6, 6, 1), (Phase::Waiting, 8, 1, 2), (Phase::Waiting, 8, 0, 3)];
    let mut snapshot = snapshot(10, &clients, &[0]);
    assert_eq!(snapshot.free, 3);
    assert_eq!(prefetch(&snapshot, slot(1)), 3);
    assert_eq!(prefetch(&snapshot, slot(2)), 0, "not the next");
    assert_eq!(prefetch(&snapshot, slot(0)), 0, "runs");
    snapshot.slots[1].demand = 2;
    assert_eq!(prefetch(&snapshot, slot(1)), 1, "all that it lacks");
    snapshot.slots[1].demand = 8;
    snapshot.slots[0].demand = 8;
    assert_eq!(prefetch(&snapshot, slot(1)), 1, "the holder has grown");
    snapshot.slots[0].demand = 10;
    assert_eq!(prefetch(&snapshot, slot(1)), 0);
}

#[test]
fn priority_moves_a_deadline_and_no_farther_than_the_bound() {
    let mut snapshot = three_batch_jobs([0; 3]);
    let far = snapshot.settings.deadline;
    for (priority, distance) in [(Priority::High, 0), (Priority::Normal, far), (Priority::Low, 2 * far)] {
        snapshot.slots[1].priority = priority;
        assert_eq!(deadline(&snapshot, slot(1), 0), distance, "{priority}");
    }
    // Whoever has used nothing beside those who have is next, unless it said that it is in no hurry.
    snapshot.slots[0].usage = 10 * SECOND;
    assert_eq!(deadline(&snapshot, slot(1), 0), 2 * far);
}

/// The clients of high and low priority among three batch jobs, and who is next.
#[test]
fn high_priority_is_next_once_the_least_is_over() {
    let mut snapshot = three_batch_jobs([5; 3]);
    snapshot.slots[0].slice_start = SECOND;
    snapshot.slots[2].priority = Priority::High;
    snapshot.slots[2].deadline = deadline(&snapshot, slot(2), SECOND + 1);
    assert_eq!(first_waiter(&snapshot), Some(slot(2)), "though another came before");
    assert_eq!(slice_end(&snapshot, slot(0)), Some(2 * SECOND), "the least, and not the whole slice");
    assert_eq!(admit(&snapshot, 2 * SECOND), set(&[2]));
    // One that has waited for its whole deadline goes before it.
    snapshot.slots[1].deadline = SECOND;
    assert_eq!(admit(&snapshot, 2 * SECOND), set(&[1]));
}

fn any_phase() -> impl Strategy<Value = Phase> {
    (0..6u32).prop_map(Phase::from)
}

fn any_beginning() -> impl Strategy<Value = Nanos> {
    prop_oneof![4 => 0..1000u64, 1 => Just(NOT_BEGUN)]
}

prop_compose! {
    /// A page that honest clients could have made: residents fit, and the counter is what is left.
    fn honest()(capacity in 1..1000u32,
                clients in prop::collection::vec((any_phase(), 0..400u32, 0..100u32, 0..20u32, any::<u64>(), any_beginning(), any::<u64>(), 0..4u32), 0..SLOTS),
                fairness in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u32>(), 1..=crate::usage::MAX_WEIGHT), SLOTS),
                priorities in prop::collection::vec(0..3u32, SLOTS),
                admitted: u64, fixed: bool, ns in 0..1_000_000u64) -> Snapshot {
        let mut snapshot = snapshot(capacity, &[], &[]);
        let mut free = capacity as i32;
        for (index, (phase, demand, resident, context, ticket, slice_start, last_ran, stays)) in clients.into_iter().enumerate() {
            let context = context.min(free as u32 / 4);
            free -= context as i32;
            let resident = resident.min(demand).min(free as u32);
            free -= resident as i32;
            snapshot.occupied = snapshot.occupied.with(slot(index));
            snapshot.slots[index] = SlotView { phase, demand, resident, context, unmovable: resident * stays / 4, ticket, slice_start, last_ran, ..SlotView::default() };
            let view = &mut snapshot.slots[index];
            (view.deadline, view.usage, view.consecutive_slices, view.weight) = fairness[index];
            view.priority = Priority::read(priorities[index]).unwrap();
        }
        snapshot.free = free;
        snapshot.admitted = SlotSet::from_bits(admitted & snapshot.occupied.bits());
        if !fixed {
            snapshot.settings.quantum = Quantum::Auto { factor_milli: 5_000, longest_milli: 20_000, min: ns, max: ns * 2 };
        }
        snapshot
    }
}

/// All evict what they are asked to. How many granules.
fn make_room(snapshot: &mut Snapshot) -> Granules {
    let shares: Vec<_> = snapshot.clients().map(|(slot, _)| (slot, evict_share(snapshot, slot))).collect();
    for (slot, share) in &shares {
        snapshot.slots[slot.get()].resident -= share;
        snapshot.free += *share as i32;
    }
    shares.iter().map(|(_, share)| share).sum()
}

/// A client brings in what it lacks, or so much.
fn bring_in(snapshot: &mut Snapshot, slot: SlotIndex, most: Granules) {
    let granules = snapshot.view(slot).missing().min(most);
    snapshot.slots[slot.get()].resident += granules;
    snapshot.free -= granules as i32;
}

proptest! {
    /// I3.
    #[test]
    fn whom_it_admits_fits_or_is_alone(snapshot in honest(), now: u64) {
        let chosen = admit(&snapshot, now);
        let total: u32 = chosen.iter().map(|slot| snapshot.view(slot).movable()).sum();
        // A client without memory runs beside anybody.
        let with_memory = chosen.iter().filter(|slot| snapshot.view(*slot).movable() > 0).count();
        prop_assert!(total <= snapshot.usable() || with_memory == 1);
        prop_assert!(chosen.iter().all(|slot| snapshot.occupied.contains(slot) && snapshot.view(slot).phase.wants_gpu()));
    }

    /// Nobody is left out for nothing: whoever is not admitted does not fit beside those who are.
    #[test]
    fn nobody_waits_beside_room(snapshot in honest(), now: u64) {
        let chosen = admit(&snapshot, now);
        let total: u32 = chosen.iter().map(|slot| snapshot.view(slot).movable()).sum();
        for (slot, view) in snapshot.clients() {
            if waits(view) && !chosen.contains(slot) {
                prop_assert!(total + view.movable() > snapshot.usable());
            }
        }
    }

    /// The first waiter gets in as soon as every slice is over: the order of tickets starves nobody.
    #[test]
    fn the_first_waiter_is_next(snapshot in honest()) {
        let mut snapshot = snapshot;
        for view in &mut snapshot.slots {
            view.slice_start = 0;
        }
        for (index, view) in snapshot.slots.iter_mut().enumerate() {
            // The admitted run, and the others have seen that they don't.
            match (view.phase.wants_gpu(), snapshot.admitted.contains(slot(index))) {
                (true, true) => view.phase = Phase::Running,
                (true, false) => view.phase = Phase::Waiting,
                _ => {}
            }
        }
        if let Some(waiter) = first_waiter(&snapshot) {
            prop_assert!(admit(&snapshot, u64::MAX).contains(waiter));
        }
    }

    /// When all who want the GPU fit, all are admitted: nothing ever switches.
    #[test]
    fn it_never_switches_when_all_fit(snapshot in honest(), now: u64) {
        let recalled = |slot, view: &SlotView| view.phase == Phase::Running && !snapshot.admitted.contains(slot);
        let wanting: Vec<_> =
            snapshot.clients().filter(|(slot, view)| view.phase.wants_gpu() && !recalled(*slot, view)).collect();
        if wanting.iter().map(|(_, view)| view.movable()).sum::<u32>() <= snapshot.usable() {
            prop_assert_eq!(admit(&snapshot, now), wanting.iter().map(|(slot, _)| *slot).collect());
        }
    }

    /// Of those who take turns each has had about the same after any round, whenever they came: Jain's index over GPU time
    /// is 0.98 (0.9797 if they are very many).
    #[test]
    fn taking_turns_is_fair_while_slices_grow(streaks in prop::collection::vec(0..30u32, 2..12)) {
        let lengths = lengths_of_turns(&streaks, 100);
        let n = streaks.len();
        for (first, window) in lengths.windows(n).enumerate() {
            let shares: Vec<_> = window.iter().map(|length| *length as f64).collect();
            prop_assert!(jain(&shares) >= 0.98, "{} from slice {first} on: {window:?}", jain(&shares));
        }
        prop_assert!(lengths.is_sorted());
        prop_assert_eq!(lengths.last(), Some(&(4 * SECOND)));
    }

    /// What the admitted lack is there, among those who are not admitted: a fill always completes.
    #[test]
    fn the_shares_cover_what_is_lacking(snapshot in honest(), now: u64) {
        let mut snapshot = snapshot;
        snapshot.admitted = admit(&snapshot, now);
        let total: u32 = snapshot.admitted.iter().map(|slot| snapshot.view(slot).movable()).sum();
        prop_assume!(total <= snapshot.usable());
        let given: u32 = snapshot.clients().map(|(slot, _)| evict_share(&snapshot, slot)).sum();
        // When nothing is lacking, what the last in the queue has of what the first could bring in.
        let ahead = lacking_ahead(&snapshot).map_or(0, |(last, room)| room.min(snapshot.view(last).evictable()));
        prop_assert_eq!(given, if lacking(&snapshot) > 0 { lacking(&snapshot) } else { ahead });
        for (slot, view) in snapshot.clients() {
            prop_assert!(evict_share(&snapshot, slot) <= view.evictable());
        }
    }

    /// What the last one makes room for is brought in ahead, all of it, and then no more is asked of anybody: nobody's memory goes
    /// to and fro.
    #[test]
    fn what_goes_ahead_comes_in_ahead(snapshot in honest(), now: u64) {
        let mut snapshot = snapshot;
        snapshot.admitted = admit(&snapshot, now);
        let total: u32 = snapshot.admitted.iter().map(|slot| snapshot.view(slot).movable()).sum();
        prop_assume!(total <= snapshot.usable());
        make_room(&mut snapshot);
        for slot in snapshot.admitted.iter() {
            bring_in(&mut snapshot, slot, Granules::MAX);
            snapshot.slots[slot.get()].phase = Phase::Running;
        }
        prop_assert_eq!(lacking(&snapshot), 0);
        let who = evictors(&snapshot);
        let given = make_room(&mut snapshot);
        let Some(first) = first_waiter(&snapshot) else { prop_assert_eq!(given, 0); return Ok(()) };
        let last = waiters(&snapshot).max_by_key(|slot| place(&snapshot, *slot)).unwrap();
        prop_assert!(who.is_empty() || last != first && who == SlotSet::EMPTY.with(last));
        let room = prefetch(&snapshot, first);
        prop_assert!(room >= given);
        bring_in(&mut snapshot, first, room);
        prop_assert_eq!(make_room(&mut snapshot), 0);
        prop_assert!(last == first || snapshot.view(first).missing() == 0 || snapshot.view(last).evictable() == 0, "all that there was");
    }

    /// Who fills ahead of its turn takes nothing that those who run lack, and only one does.
    #[test]
    fn prefetching_is_in_nobodys_way(snapshot in honest(), now: u64) {
        let mut snapshot = snapshot;
        snapshot.admitted = admit(&snapshot, now);
        let ahead: Vec<_> = snapshot.clients().map(|(slot, _)| prefetch(&snapshot, slot)).filter(|room| *room > 0).collect();
        prop_assert!(ahead.len() <= 1);
        if let Some(room) = ahead.first() {
            prop_assert_eq!(lacking(&snapshot), 0);
            snapshot.free -= *room as i32;
            prop_assert_eq!(lacking(&snapshot), 0);
        }
    }

    /// The bound on a wait rests on this: no deadline is before the moment at which its owner queues, nor farther than P
    /// away; and priority moves it one way only.
    #[test]
    fn deadlines_are_in_bounds_and_in_the_order_of_priorities(snapshot in honest(), now in 0..u64::MAX / 2) {
        let mut snapshot = snapshot;
        for (slot, view) in snapshot.clone().clients() {
            let mut by = |priority| {
                snapshot.slots[slot.get()].priority = priority;
                deadline(&snapshot, slot, now)
            };
            let [high, normal, low] = [Priority::High, Priority::Normal, Priority::Low].map(&mut by);
            let far = snapshot.settings.deadline;
            prop_assert_eq!(high, now);
            prop_assert!(high <= normal && normal <= low);
            prop_assert!(normal - now <= far && low - now <= 2 * far, "{normal} {low} of {far}");
            snapshot.slots[slot.get()].priority = view.priority;
        }
    }

    /// Deciding is a function: the same snapshot and time give the same answer, and an answer that is
    /// published is its own answer until something changes. (With `auto`, a slice's length depends on
    /// who is next, and with weights on who else is there, so a new first waiter is such a change.)
    #[test]
    fn it_settles(snapshot in honest(), now: u64) {
        let mut snapshot = snapshot;
        snapshot.settings.quantum = Quantum::Fixed(1_000);
        snapshot.slots.iter_mut().for_each(|view| (view.weight, view.deadline) = (100, view.ticket));
        let chosen = admit(&snapshot, now);
        prop_assert_eq!(admit(&snapshot, now), chosen);
        for (slot, was) in snapshot.clone().clients() {
            // What its owner does next: the admitted run, the others wait again at the end.
            let view = &mut snapshot.slots[slot.get()];
            if chosen.contains(slot) && !snapshot.admitted.contains(slot) {
                *view = SlotView { phase: Phase::Waiting, ..*was };
            } else if !chosen.contains(slot) && snapshot.admitted.contains(slot) && was.phase.wants_gpu() {
                *view = SlotView { phase: Phase::Draining, ..*was };
            }
        }
        snapshot.admitted = chosen;
        let again = admit(&snapshot, now);
        // Only the waiter that has become the first may take a gap away from who fills it.
        let next = first_waiter(&snapshot).filter(|waiter| again.contains(*waiter));
        prop_assert!(next.is_some() || chosen.iter().all(|slot| again.contains(slot)), "{chosen:?} then {again:?}");
    }

    /// Garbage in every field, and still an answer.
    #[test]
    fn garbage_gives_some_answer(words in prop::collection::vec(any::<u64>(), crate::page::PAGE_BYTES / 8), now: u64) {
        let page = Page::for_tests(1);
        crate::map::scribble(&page, &words);
        let snapshot = Snapshot::take(&page, page.admitted());
        let chosen = admit(&snapshot, now);
        prop_assert!(chosen.iter().all(|slot| snapshot.occupied.contains(slot)));
        let _ = (next_decision(&snapshot, 0), lacking(&snapshot), evictors(&snapshot), first_waiter(&snapshot));
        for (slot, _) in snapshot.clients() {
            let _ = (quantum(&snapshot, slot), switch_time(&snapshot, slot), evict_share(&snapshot, slot));
            let _ = (slice(&snapshot, slot, slot), deadline(&snapshot, slot, now));
        }
        page.decide();
        page.audit();
    }
}
