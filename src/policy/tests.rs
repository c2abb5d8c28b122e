use super::fair_share::{self, mean, virtual_times};
use super::*;
use crate::page::{Page, Quantum, Settings};
use crate::shares::Priority;
use crate::slot::SLOTS;
use crate::units::{MILLISECOND, SECOND};
use crate::usage::DEFAULT_WEIGHT;
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

fn admit(snapshot: &Snapshot, now: Nanos) -> SlotSet {
    super::admit(&snapshot.at(now))
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

/// It runs beside anybody, whoever came first.
#[test]
fn one_without_memory_is_in_nobodys_way() {
    let clients = [(Phase::Running, 0, 0, 1), (Phase::Waiting, 50, 0, 2), (Phase::Waiting, 1, 0, 3)];
    assert_eq!(admit(&snapshot(10, &clients, &[0]), 0), set(&[0, 1]));
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

/// Whose memory is needed last goes first: waiters need theirs in the order in which they are served, and an idle client after
/// what its pauses say, or after as long again as it has been idle.
#[test]
fn whoever_needs_its_memory_last_evicts_first() {
    let clients = [
        (Phase::Filling, 8, 0, 1),
        (Phase::Idle, 4, 2, 0),
        (Phase::Waiting, 8, 3, 2),
        (Phase::Waiting, 8, 3, 3),
        (Phase::Idle, 4, 2, 0),
    ];
    let mut snapshot = snapshot(10, &clients, &[0]).at(100 * SECOND);
    snapshot.slots.iter_mut().for_each(|view| view.deadline = 1_000 * SECOND);
    (snapshot.slots[1].idle_since, snapshot.slots[4].idle_since) = (100 * SECOND - 1, 90 * SECOND);
    let shares = |snapshot: &Snapshot| [1, 2, 3, 4].map(|index| evict_share(snapshot, slot(index)));
    assert_eq!(lacking(&snapshot), 8);
    assert_eq!(shares(&snapshot), [0, 3, 3, 2], "who has been idle for longest, then the last in the queue");
    // It comes back every 50 ms, and the first waiter's turn is in 100 ms.
    snapshot.slots[4].idle_since = 100 * SECOND - 1;
    snapshot.slots[4].pause = 50 * MILLISECOND;
    assert_eq!(shares(&snapshot), [0, 3, 3, 2], "the one of which nobody knows anything has just been idle");
    snapshot.slots[1].pause = 150 * MILLISECOND;
    assert_eq!(shares(&snapshot), [2, 3, 3, 0]);
    snapshot.slots[0].demand = 4;
    assert_eq!((lacking(&snapshot), shares(&snapshot)), (4, [1, 0, 3, 0]), "no more than is lacking");
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
    assert_eq!(
        (lacking(&snapshot), shares(&snapshot)),
        (2, [0, 0, 1, 1]),
        "the idle one, and the last in the queue"
    );
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
    snapshot.settings.deadline = 10_000 * SECOND;
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
        turn_length(&snapshot, slot(0))
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
        let holder = slot(turn % n);
        let length = turn_length(&snapshot, holder);
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
    assert_eq!(turn_length(&snapshot, slot(0)), 3 * SECOND);
    assert_eq!(turn_length(&snapshot, slot(1)), SECOND);
    snapshot.slots[2].weight = 1;
    assert_eq!(turn_length(&snapshot, slot(0)), u64::from(MOST_SHARES) * SECOND);
}

#[test]
fn a_waiter_whose_deadline_has_come_waits_for_the_least_and_no_more() {
    let mut snapshot = three_batch_jobs([5; 3]);
    snapshot.slots[0].slice_start = SECOND;
    let whole = SECOND + turn_length(&snapshot, slot(0));
    assert!(whole > 4 * SECOND);
    assert_eq!(slice_end(&snapshot, slot(0)), Some(whole));
    snapshot.slots[1].deadline = 3 * SECOND;
    assert_eq!(slice_end(&snapshot, slot(0)), Some(3 * SECOND));
    snapshot.slots[1].deadline = SECOND;
    assert_eq!(
        slice_end(&snapshot, slot(0)),
        Some(2_500 * MILLISECOND),
        "the least is what two switches are worth"
    );
    // Whoever is in more of a hurry goes first, though another came before.
    snapshot.slots[2].deadline = 0;
    assert_eq!(admit(&snapshot, 2_500 * MILLISECOND), set(&[2]));
    // And is not taken for one who fills a gap, once it runs.
    snapshot.admitted = set(&[2]);
    snapshot.slots[0].phase = Phase::Idle;
    snapshot.slots[2].phase = Phase::Running;
    snapshot.slots[2].slice_start = 2_500 * MILLISECOND;
    assert_eq!(admit(&snapshot, 2_500 * MILLISECOND), set(&[2]));
}

/// The client in slot 1 comes from phase Idle at this moment, with this virtual time; what it writes down.
fn comes(snapshot: &Snapshot, virtual_time: Nanos) -> Entry {
    let mut snapshot = snapshot.at(100 * SECOND);
    // It has had the GPU before.
    let (slice_start, last_ran) = (SECOND, 2 * SECOND);
    snapshot.slots[1] =
        SlotView { phase: Phase::Idle, virtual_time, slice_start, last_ran, ..snapshot.slots[1] };
    enter_queue(&snapshot, slot(1))
}

/// A newcomer comes beside those who have come to 10 and 30 s, and have used up a turn.
#[test]
fn a_newcomer_begins_at_the_mean_and_is_served_at_once_for_its_first_seconds() {
    let mut snapshot = three_batch_jobs([1, 0, 1]).at(100 * SECOND);
    (snapshot.slots[0].virtual_time, snapshot.slots[2].virtual_time) = (10 * SECOND, 30 * SECOND);
    snapshot.slots[1].phase = Phase::Idle;
    let first = enter_queue(&snapshot, slot(1));
    assert_eq!(first, Entry { virtual_time: 20 * SECOND, credit: CREDIT, deadline: 100 * SECOND });
    // It has run for 3 s of its turn, and was interrupted or comes again.
    let entry = |used: Nanos, phase, consecutive_slices| {
        let mut snapshot = snapshot.clone();
        let (virtual_time, turn_start) = (first.virtual_time + used, first.virtual_time);
        snapshot.slots[1] = SlotView {
            phase,
            virtual_time,
            turn_start,
            consecutive_slices,
            credit: first.credit,
            slice_start: SECOND,
            last_ran: 2 * SECOND,
            ..snapshot.slots[1]
        };
        enter_queue(&snapshot, slot(1))
    };
    for phase in [Phase::Idle, Phase::Draining] {
        assert_eq!(entry(3 * SECOND, phase, 0).credit, 2 * SECOND);
        assert_eq!(entry(3 * SECOND, phase, 0).deadline, 100 * SECOND, "what is left is enough");
        assert_eq!(entry(5 * SECOND, phase, 0).credit, 0);
        assert!(entry(5 * SECOND, phase, 0).deadline > 160 * SECOND);
        assert_eq!(entry(SECOND, phase, 1).credit, 0, "it has used up a turn");
    }
}

/// Those who begin at once are equals, whoever is idle on the GPU and whatever that one has had: turns grow as they should from
/// the first one on. One that comes a second later has a second's credit.
#[test]
fn a_newcomer_beside_newcomers_has_no_credit() {
    let mut snapshot = three_batch_jobs([0; 3]).at(100 * SECOND);
    snapshot.slots[2] = SlotView { phase: Phase::Idle, virtual_time: 50 * SECOND, ..snapshot.slots[2] };
    snapshot.slots[0] = SlotView { phase: Phase::Idle, ..snapshot.slots[0] };
    snapshot.slots[1].phase = Phase::Idle;
    let first = enter_queue(&snapshot, slot(0));
    assert_eq!((first.virtual_time, first.credit), (50 * SECOND, 0));
    let view = &mut snapshot.slots[0];
    (view.phase, view.virtual_time, view.slice_start) = (Phase::Running, first.virtual_time, 100 * SECOND);
    let second = enter_queue(&snapshot, slot(1));
    assert_eq!((second.virtual_time, second.credit), (50 * SECOND, 0));
    let later = enter_queue(&snapshot.at(101 * SECOND), slot(1));
    assert_eq!((later.virtual_time, later.credit), (51 * SECOND, SECOND));
}

/// A person's requests beside a batch job that has just begun: the job is new, and has had 2 s.
#[test]
fn a_light_user_is_served_at_once_beside_a_newcomer() {
    let mut snapshot = three_batch_jobs([0; 3]).at(100 * SECOND);
    snapshot.occupied = set(&[0, 1]);
    snapshot.slots[1] = SlotView {
        phase: Phase::Idle,
        virtual_time: 7 * SECOND,
        slice_start: SECOND,
        last_ran: 97 * SECOND,
        ..snapshot.slots[1]
    };
    // Nobody wants the GPU when the job begins: it is not behind those who have had it.
    snapshot.slots[0] = SlotView { phase: Phase::Idle, slice_start: 0, ..snapshot.slots[0] };
    let job = enter_queue(&snapshot, slot(0));
    assert_eq!((job.virtual_time, job.credit), (7 * SECOND, 0));
    let view = &mut snapshot.slots[0];
    (view.phase, view.virtual_time, view.turn_start) = (Phase::Running, job.virtual_time, job.virtual_time);
    view.slice_start = 98 * SECOND;
    let request = enter_queue(&snapshot, slot(1));
    assert_eq!((request.credit, request.deadline), (2 * SECOND, 100 * SECOND));
}

/// A pause in which nobody needed the GPU cost nobody anything.
#[test]
fn what_nobody_needed_is_not_charged() {
    let clients = [(Phase::Running, 3, 3, 1), (Phase::Running, 3, 3, 2)];
    let mut snapshot = snapshot(10, &clients, &[0, 1]).at(20 * SECOND);
    (snapshot.slots[0].slice_start, snapshot.slots[1].slice_start) = (10 * SECOND, 10 * SECOND);
    snapshot.slots[0].weight = DEFAULT_WEIGHT;
    snapshot.slots[1].weight = DEFAULT_WEIGHT;
    let charged = |measured: Option<u64>, unused: u64| {
        let spent = Spent { measured: measured.map(|s| s * SECOND), unused: unused * SECOND };
        let end = end_slice(&snapshot, slot(0), spent);
        assert_eq!(
            (end.ran, end.turn_used),
            (10 * SECOND, 10 * SECOND as i64),
            "a turn is a turn all the same"
        );
        assert_eq!(end.virtual_time, end.charged);
        end.charged / SECOND
    };
    assert_eq!([charged(None, 0), charged(None, 4), charged(None, 10), charged(None, 99)], [5, 3, 0, 0]);
    assert_eq!([charged(Some(2), 0), charged(Some(9), 4), charged(Some(99), 0)], [2, 6, 10]);
}

#[test]
fn who_comes_and_lags_is_served_the_sooner_the_more_it_lags() {
    let mut snapshot = three_batch_jobs([0; 3]);
    // The mean of the others is 20 s.
    (snapshot.slots[0].virtual_time, snapshot.slots[2].virtual_time) = (10 * SECOND, 30 * SECOND);
    let now = 100 * SECOND;
    let far = comes(&snapshot, 20 * SECOND).deadline - now;
    // D, and twice a turn of each of the two others; the switch takes next to no time.
    assert!(far > snapshot.settings.deadline + 4 * SECOND && far < snapshot.settings.deadline + 5 * SECOND);
    for (virtual_time, comes_to, credit, deadline) in
        [(0, 15, CREDIT, 0), (15, 15, CREDIT, 0), (18, 18, 2 * SECOND, 0), (20, 20, 0, far), (30, 30, 0, far)]
    {
        let entry = comes(&snapshot, virtual_time * SECOND);
        assert_eq!((entry.virtual_time, entry.credit), (comes_to * SECOND, credit), "{virtual_time}");
        assert_eq!(entry.deadline, now + deadline, "{virtual_time}");
    }
    let half = comes(&snapshot, 20 * SECOND - SECOND / 2).deadline - now;
    assert!(half.abs_diff(far / 2) < 10, "half of what the switch is worth: half the way");
    // It owes no more than what would have been its own until its deadline.
    let owes = comes(&snapshot, 1_000 * SECOND).virtual_time;
    assert!(owes > 20 * SECOND && owes < 20 * SECOND + far, "{owes}");
}

/// A switch of a tenth of a second is worth half a second: who lags by so much is served at once.
#[test]
fn who_lags_by_what_the_switch_to_it_is_worth_is_served_at_once() {
    let mut snapshot = three_batch_jobs([0; 3]);
    snapshot.settings.quantum = Quantum::Fixed(SECOND / 2);
    snapshot.slots.iter_mut().for_each(|view| view.virtual_time = 20 * SECOND);
    let now = 100 * SECOND;
    assert_eq!(comes(&snapshot, 19_500 * MILLISECOND).deadline, now);
    let far = comes(&snapshot, 20 * SECOND).deadline - now;
    let near = comes(&snapshot, 19_600 * MILLISECOND).deadline - now;
    assert!(near.abs_diff(far / 5) < 10, "four fifths of it: a fifth of the way");
}

#[test]
fn who_has_used_up_a_turn_has_no_credit_until_it_has_been_idle() {
    let mut snapshot = three_batch_jobs([0; 3]);
    snapshot.slots[0].virtual_time = 30 * SECOND;
    assert_eq!(comes(&snapshot, 0).credit, CREDIT);
    let again = |phase, credit, consecutive_slices| {
        let mut snapshot = snapshot.clone();
        let (slice_start, last_ran) = (SECOND, 2 * SECOND);
        snapshot.slots[1] =
            SlotView { phase, credit, consecutive_slices, slice_start, last_ran, ..snapshot.slots[1] };
        enter_queue(&snapshot, slot(1)).credit
    };
    assert_eq!(again(Phase::Draining, 0, 0), 0, "it came without one");
    assert_eq!(again(Phase::Draining, CREDIT, 1), 0, "it has used up a turn");
    assert_eq!(again(Phase::Draining, SECOND, 0), CREDIT, "it was interrupted");
}

#[test]
fn time_on_the_gpu_at_once_is_divided() {
    let clients = [(Phase::Running, 3, 3, 1), (Phase::Running, 3, 3, 2), (Phase::Idle, 3, 3, 3)];
    let mut snapshot = snapshot(10, &clients, &[0, 1]).at(20 * SECOND);
    snapshot.slots[..3].iter_mut().for_each(|view| view.weight = DEFAULT_WEIGHT);
    // The first from 10 s on; the second from 14 s on; the third ran from 5 to 12 s.
    snapshot.slots[0].slice_start = 10 * SECOND;
    snapshot.slots[1].slice_start = 14 * SECOND;
    (snapshot.slots[2].slice_start, snapshot.slots[2].last_ran) = (5 * SECOND, 12 * SECOND);
    assert_eq!(fair_share::shared(&snapshot, slot(0)), (1 + 2 + 3) * SECOND);
    assert_eq!(fair_share::shared(&snapshot, slot(1)), 3 * SECOND);
    assert_eq!(fair_share::shared(&snapshot, slot(2)), 0, "it does not run");
    // By weight: three quarters of the last 6 s.
    snapshot.slots[1].weight = 3 * DEFAULT_WEIGHT;
    assert_eq!(fair_share::shared(&snapshot, slot(1)), 4_500 * MILLISECOND);
    assert_eq!(virtual_times(&snapshot)[1], 1_500 * MILLISECOND);
    assert_eq!(fair_share::shared(&snapshot, slot(0)), (1 + 2) * SECOND + 1_500 * MILLISECOND);
    assert_eq!(end_slice(&snapshot, slot(1), Spent::default()).ran, 6 * SECOND);
}

/// A burst in the middle of a turn: the batch job keeps its place and what is left of its turn, exactly.
/// A small one that finds room beside everybody runs all the time. What the others owe one another is kept all the same.
#[test]
fn who_is_far_ahead_does_not_lift_the_mean() {
    let clients = [
        (Phase::Running, 8, 8, 1),
        (Phase::Waiting, 8, 0, 2),
        (Phase::Running, 1, 1, 3),
        (Phase::Draining, 8, 0, 0),
    ];
    let mut snapshot = snapshot(10, &clients, &[0, 2]);
    for (view, seconds) in snapshot.slots.iter_mut().zip([50, 50, 1_000, 40]) {
        (view.virtual_time, view.turn_start) = (seconds * SECOND, seconds * SECOND);
    }
    // It has had the GPU before.
    snapshot.slots[3].slice_start = 1;
    snapshot.slots[..4].iter_mut().for_each(|view| view.weight = DEFAULT_WEIGHT);
    assert_eq!(enter_queue(&snapshot, slot(3)).virtual_time, 40 * SECOND);
    // Who is ahead by a turn or two counts.
    let times = virtual_times(&snapshot);
    assert_eq!(mean(&snapshot, &times, SECOND, None), Some(50 * SECOND));
    assert_eq!(mean(&snapshot, &times, 700 * SECOND, None), Some((50 + 50 + 1_000) * SECOND / 3));
}

#[test]
fn who_was_interrupted_goes_on_where_it_was() {
    let mut snapshot = three_batch_jobs([5; 3]);
    let length = turn_length(&snapshot, slot(0));
    snapshot.slots[0].slice_start = SECOND;
    // The first waiter comes from phase Idle with a credit.
    snapshot.slots[1] =
        SlotView { credit: CREDIT, deadline: 2 * SECOND, consecutive_slices: 0, ..snapshot.slots[1] };
    let end = slice_end(&snapshot, slot(0)).unwrap();
    assert_eq!(end, SECOND + SECOND * 3 / 2, "one and a half quanta");
    assert_eq!(admit(&snapshot, end), set(&[1]));
    let mut snapshot = snapshot.at(end);
    let interrupted = end_slice(&snapshot, slot(0), Spent::default());
    assert!(!interrupted.used_up);
    let view = &mut snapshot.slots[0];
    (view.turn_used, view.last_ran, view.phase) = (interrupted.turn_used, end, Phase::Waiting);
    // The burst is over.
    snapshot.slots[1].phase = Phase::Idle;
    snapshot.admitted = SlotSet::EMPTY;
    assert_eq!(admit(&snapshot, end), set(&[0]), "before the one that has waited all the time");
    snapshot.admitted = set(&[0]);
    let view = &mut snapshot.slots[0];
    (view.phase, view.slice_start) = (Phase::Running, 10 * SECOND);
    assert_eq!(turn_length(&snapshot, slot(0)), length, "the burst changed nothing");
    assert_eq!(slice_end(&snapshot, slot(0)), Some(10 * SECOND + length - (end - SECOND)));
}

#[test]
fn what_is_nearly_over_is_not_interrupted() {
    let mut snapshot = three_batch_jobs([5; 3]);
    let length = turn_length(&snapshot, slot(0));
    snapshot.slots[0].slice_start = SECOND;
    snapshot.slots[1].credit = CREDIT;
    for (left, end) in [(2 * SECOND, SECOND + length - 2 * SECOND), (SECOND / 2, SECOND + length)] {
        snapshot.slots[1].deadline = SECOND + length - left;
        assert_eq!(slice_end(&snapshot, slot(0)), Some(end));
    }
}

/// It lags by more than a turn and a half, so it has another turn, without a switch.
#[test]
fn who_lags_runs_on() {
    let mut snapshot = three_batch_jobs([0; 3]);
    snapshot.slots[0].slice_start = SECOND;
    (snapshot.slots[1].virtual_time, snapshot.slots[2].virtual_time) = (20 * SECOND, 20 * SECOND);
    for index in [1, 2] {
        snapshot.slots[index].turn_start = 20 * SECOND;
    }
    let end = slice_end(&snapshot, slot(0)).unwrap();
    assert_eq!(admit(&snapshot, end), set(&[0]));
    assert_eq!(next_turn(&snapshot.at(end - 1), slot(0)), None, "its turn is not over");
    let turn = next_turn(&snapshot.at(end), slot(0)).unwrap();
    assert_eq!(turn, NextTurn { turn_start: end - SECOND, turn_used: -((end - SECOND) as i64) });
    (snapshot.slots[0].turn_start, snapshot.slots[0].turn_used) = (turn.turn_start, turn.turn_used);
    assert_eq!(slice_end(&snapshot, slot(0)), Some(end + turn_length(&snapshot, slot(0))));
    // And if it does not lag it gives way.
    snapshot.slots[0].virtual_time = 20 * SECOND;
    snapshot.slots[0].turn_used = 0;
    assert_eq!(next_turn(&snapshot.at(end), slot(0)), None);
    assert_eq!(admit(&snapshot, end), set(&[1]));
}

#[test]
fn turns_are_short_enough_for_all_within_the_deadline() {
    let mut snapshot = three_batch_jobs([40; 3]);
    snapshot.settings.deadline = 5 * SECOND;
    let length = turn_length(&snapshot, slot(0));
    assert!(length > 2_400 * MILLISECOND && length <= 2_500 * MILLISECOND, "two others in 5 s: {length}");
    snapshot.settings.deadline = SECOND;
    assert_eq!(turn_length(&snapshot, slot(0)), SECOND, "no less than the quantum of a switch");
}

#[test]
fn a_slice_can_end_when_the_quantum_is_over_though_nobody_waits_yet() {
    let mut snapshot = three_batch_jobs([20; 3]);
    snapshot.slots[0].slice_start = 7 * SECOND;
    assert!(slice_end(&snapshot, slot(0)) > Some(8 * SECOND));
    assert_eq!(earliest_end(&snapshot.at(9 * SECOND), slot(0)), Some(8 * SECOND));
    for waiter in [1, 2] {
        snapshot.slots[waiter].phase = Phase::Idle;
    }
    assert_eq!(slice_end(&snapshot, slot(0)), None);
    assert_eq!(earliest_end(&snapshot.at(9 * SECOND), slot(0)), Some(8 * SECOND), "one may come");
    assert_eq!(earliest_end(&snapshot.at(9 * SECOND), slot(1)), None, "has no slice");
    snapshot.slots[0].slice_start = NOT_BEGUN;
    assert_eq!(earliest_end(&snapshot.at(9 * SECOND), slot(0)), Some(10 * SECOND), "as if it began now");
    for waiter in [1, 2] {
        snapshot.slots[waiter].demand = 1;
    }
    assert_eq!(earliest_end(&snapshot.at(9 * SECOND), slot(0)), None, "all fit");
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
    let mut snapshot = three_batch_jobs([0; 3]).at(0);
    let far = enter_queue(&snapshot, slot(1)).deadline;
    for (priority, distance) in [(Priority::High, 0), (Priority::Normal, far), (Priority::Low, 2 * far)] {
        snapshot.slots[1].priority = priority;
        assert_eq!(enter_queue(&snapshot, slot(1)).deadline, distance, "{priority}");
    }
    // Whoever has had nothing beside those who have is next, unless it said that it is in no hurry.
    snapshot.slots[0].virtual_time = 10 * SECOND;
    assert_eq!(comes(&snapshot, 0).deadline, 100 * SECOND + 2 * far);
}

/// The clients of high and low priority among three batch jobs, and who is next.
#[test]
fn high_priority_is_next_once_the_least_is_over() {
    let mut snapshot = three_batch_jobs([5; 3]);
    snapshot.slots[0].slice_start = SECOND;
    snapshot.slots[2].priority = Priority::High;
    snapshot.slots[2].deadline = enter_queue(&snapshot.at(SECOND + 1), slot(2)).deadline;
    assert_eq!(first_waiter(&snapshot.at(SECOND + 1)), Some(slot(2)), "though another came before");
    let least = 2_500 * MILLISECOND;
    assert_eq!(slice_end(&snapshot, slot(0)), Some(least), "the least, and not the whole turn");
    assert_eq!(admit(&snapshot, least), set(&[2]));
    // One that has waited for its whole deadline goes before it.
    snapshot.slots[1].deadline = SECOND;
    assert_eq!(admit(&snapshot, least), set(&[1]));
}

/// Whoever is of low priority goes when nobody else waits, or when its deadline has come.
#[test]
fn low_priority_goes_last() {
    let mut snapshot = three_batch_jobs([0; 3]);
    snapshot.slots[1].priority = Priority::Low;
    snapshot.slots[0].slice_start = SECOND;
    let end = slice_end(&snapshot, slot(0)).unwrap();
    assert_eq!(admit(&snapshot, end), set(&[2]), "though it came before");
    snapshot.slots[2].phase = Phase::Idle;
    assert_eq!(admit(&snapshot, end), set(&[0]), "and the holder has another turn");
    snapshot.slots[0].phase = Phase::Idle;
    assert_eq!(admit(&snapshot, end), set(&[1]));
    (snapshot.slots[0].phase, snapshot.slots[2].phase) = (Phase::Running, Phase::Waiting);
    snapshot.slots[1].deadline = end;
    assert_eq!(admit(&snapshot, end), set(&[1]));
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
                turns in prop::collection::vec((any::<u64>(), any::<i64>(), any::<u64>(), any::<u64>()), SLOTS),
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
            (view.deadline, view.virtual_time, view.consecutive_slices, view.weight) = fairness[index];
            (view.turn_start, view.turn_used, view.credit, view.pause) = turns[index];
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

    /// A waiter whose deadline has come gets in as soon as every slice is over: nobody's lag starves it.
    #[test]
    fn the_first_waiter_is_next(snapshot in honest()) {
        let mut snapshot = snapshot.at(u64::MAX);
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
        let standing = Standing::of(&snapshot);
        let ahead = Order::new(&snapshot, &standing).lacking_ahead().map_or(0, |(last, room)| room.min(snapshot.view(last).evictable()));
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
        let standing = Standing::of(&snapshot);
        let order = Order::new(&snapshot, &standing);
        let last = waiters(&snapshot).max_by_key(|slot| order.place(*slot)).unwrap();
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

    /// The bound on a wait rests on this: no deadline is before the moment at which its owner queues, and priority moves it one
    /// way only.
    #[test]
    fn deadlines_are_in_bounds_and_in_the_order_of_priorities(snapshot in honest(), now in 0..u64::MAX / 4) {
        let mut snapshot = snapshot.at(now);
        for (slot, view) in snapshot.clone().clients() {
            let mut by = |priority| {
                snapshot.slots[slot.get()].priority = priority;
                enter_queue(&snapshot, slot).deadline
            };
            let [high, normal, low] = [Priority::High, Priority::Normal, Priority::Low].map(&mut by);
            prop_assert_eq!(high, now);
            prop_assert!(high <= normal && normal <= low);
            snapshot.slots[slot.get()].priority = view.priority;
        }
    }

    /// Whatever it has come to: nobody comes back with more than the credit, and a turn that is over is counted in full.
    #[test]
    fn credit_and_turns_are_in_bounds(snapshot in honest(), now: u64) {
        let snapshot = snapshot.at(now);
        for (slot, view) in snapshot.clients() {
            let entry = enter_queue(&snapshot, slot);
            prop_assert!(entry.credit <= CREDIT);
            prop_assert!(end_slice(&snapshot, slot, Spent::default()).virtual_time >= view.virtual_time);
            prop_assert!(fair_share::shared(&snapshot, slot) <= now.saturating_sub(view.slice_start));
            if let Some(turn) = next_turn(&snapshot, slot) {
                prop_assert!(turn.turn_used <= 0 && snapshot.admitted.contains(slot));
            }
        }
    }

    /// The sweep over everybody's slices gives each what it would have by itself: of every ns, its part by weight of those who ran
    /// then. So nothing is charged twice, and those who run at once come to the same virtual time.
    #[test]
    fn time_at_once_is_divided_by_weight_among_those_who_run(
        slices in prop::collection::vec((0..60u64, 0..60u64, any::<bool>(), 1..=3u32), 1..5),
        now in 30..60u64,
    ) {
        // Of 27,720 ns each, which all sums of four such weights divide.
        const STEP: u64 = 27_720;
        let mut snapshot = snapshot(100, &vec![(Phase::Idle, 1, 1, 0); slices.len()], &[]).at(now * STEP);
        for (view, (from, to, runs, weight)) in snapshot.slots.iter_mut().zip(&slices) {
            let (phase, last_ran) = if *runs { (Phase::Running, 0) } else { (Phase::Idle, to * STEP) };
            (view.phase, view.slice_start, view.last_ran) = (phase, from * STEP, last_ran);
            view.weight = weight * DEFAULT_WEIGHT;
        }
        let had = |from: u64, to: u64, runs: bool| if runs { (from > 0).then_some(from..now) } else { Some(from..to) };
        let spans: Vec<_> = slices.iter().map(|(from, to, runs, _)| had(*from, *to, *runs).unwrap_or(0..0)).collect();
        for (index, (_, _, runs, weight)) in slices.iter().enumerate() {
            let at_once = |step: u64| -> u64 {
                let those = spans.iter().zip(&slices).filter(|(span, _)| span.contains(&step));
                those.map(|(_, slice)| u64::from(slice.3)).sum()
            };
            let steps = || spans[index].clone().filter(|step| *step < now);
            let virtually: u64 = steps().map(|step| STEP / at_once(step)).sum();
            let expected = if *runs { virtually } else { 0 };
            prop_assert_eq!(virtual_times(&snapshot)[index], expected, "{}", index);
            prop_assert_eq!(fair_share::shared(&snapshot, slot(index)), expected * u64::from(*weight), "{}", index);
        }
    }

    /// A newcomer takes nothing from anybody: the mean that lags are measured from is the same with it and without it.
    #[test]
    fn a_newcomer_moves_nobodys_mean(snapshot in honest(), index in 0..SLOTS) {
        let mut snapshot = snapshot.at(1_000 * SECOND);
        for view in &mut snapshot.slots {
            // What can be added up.
            view.virtual_time %= 1_000 * SECOND;
        }
        snapshot.occupied = snapshot.occupied.with(slot(index));
        let weight = snapshot.slots[index].weight.max(1);
        snapshot.slots[index] = SlotView { phase: Phase::Idle, demand: 5, weight, ..SlotView::default() };
        let far = 10_000 * SECOND;
        let mean = |snapshot: &Snapshot, except| mean(snapshot, &virtual_times(snapshot), far, except);
        let Some(before) = mean(&snapshot, None) else { return Ok(()) };
        let entry = enter_queue(&snapshot, slot(index));
        (snapshot.slots[index].phase, snapshot.slots[index].virtual_time) = (Phase::Waiting, before);
        prop_assert!(mean(&snapshot, None).unwrap().abs_diff(before) <= 1);
        // What it writes down is that mean, but for those who are too far ahead to count.
        prop_assert!(entry.virtual_time <= before);
    }

    /// Deciding is a function: the same snapshot and time give the same answer, and an answer that is
    /// published is its own answer until something changes. (With `auto`, a slice's length depends on
    /// who is next, and with weights on who else is there, so a new first waiter is such a change.)
    #[test]
    fn it_settles(snapshot in honest(), now: u64) {
        let mut snapshot = snapshot;
        snapshot.settings.quantum = Quantum::Fixed(1_000);
        for view in &mut snapshot.slots {
            // So those who wait stand in the order of their tickets, as those do who run.
            (view.weight, view.deadline, view.priority) = (100, u64::MAX, Priority::Normal);
            (view.virtual_time, view.turn_start, view.turn_used, view.credit) = (0, 0, 0, 0);
        }
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
        let _ = (next_decision(&snapshot, 0), lacking(&snapshot), evictors(&snapshot), first_waiter(&snapshot), needed(&snapshot));
        for (slot, _) in snapshot.clients() {
            let _ = (quantum(&snapshot, slot), switch_time(&snapshot, slot), evict_share(&snapshot, slot));
            let _ = (turn_length(&snapshot, slot), enter_queue(&snapshot.at(now), slot), end_slice(&snapshot.at(now), slot, Spent::default()));
            let _ = (next_turn(&snapshot.at(now), slot), prefetch(&snapshot, slot), earliest_end(&snapshot.at(now), slot));
            let _ = turn_comes(&snapshot.at(now), slot);
        }
        page.decide();
        page.audit();
    }
}
