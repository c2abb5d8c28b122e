//! The bound on a wait (L1), in virtual time: clients of any weight and priority who always want the GPU, none of whom
//! fits beside another.
//!
//! The policy decides, as it does everywhere; what is made here is what clients do with its decisions, as
//! [`crate::client`] has it: they run until they are recalled, drain, queue again, and fill when it is their turn.

use super::slice::MOST_SHARES;
use super::*;
use crate::page::{Page, Quantum, Settings};
use crate::shares::Priority;
use crate::step::{Action, Facts, step};
use crate::units::MILLISECOND;
use crate::usage::{DEFAULT_WEIGHT, MAX_WEIGHT};
use proptest::prelude::*;

/// Granules in the pool.
const POOL: Granules = 1_000;

/// No drain takes longer, and none is worth less.
const DRAIN: Nanos = 50 * MILLISECOND;

/// Turns that are taken in one run: enough for every deadline to come several times.
const TURNS: usize = 400;

/// A client: demand, weight, priority, and the virtual time that it has come to before.
type Job = (Granules, u32, Priority, Nanos);

fn jobs() -> impl Strategy<Value = Vec<Job>> {
    let priority = prop_oneof![Just(Priority::Low), Just(Priority::Normal), Just(Priority::High)];
    // More than half of the pool each.
    let job = (POOL / 2 + 1..=POOL, 1..=MAX_WEIGHT, priority, 0..60 * SECOND);
    prop::collection::vec(job, 2..10)
}

fn quanta() -> impl Strategy<Value = Quantum> {
    prop_oneof![
        (1..20_000u64).prop_map(|ms| Quantum::Fixed(ms * MILLISECOND)),
        (1_000..8_000u32, 1..20u32, 1..1_000u64, 1..60u64).prop_map(|(factor_milli, grows, min, max)| {
            Quantum::Auto {
                factor_milli,
                longest_milli: factor_milli * grows,
                min: min * MILLISECOND,
                max: max * SECOND,
            }
        }),
    ]
}

struct World {
    snapshot: Snapshot,
    tickets: u64,
    /// Since when each waits.
    since: Vec<Nanos>,
    /// The longest wait of each that has ended.
    waits: Vec<Nanos>,
    /// GPU time of each, ns.
    had: Vec<Nanos>,
}

impl World {
    fn new(jobs: &[Job], quantum: Quantum, deadline: Nanos) -> Self {
        let mut snapshot = Snapshot::take(&Page::for_tests(POOL), SlotSet::EMPTY);
        snapshot.settings = Settings { quantum, deadline, ..Settings::default() };
        let now = 1_000 * SECOND;
        for (index, (demand, weight, priority, virtual_time)) in jobs.iter().copied().enumerate() {
            let slot = SlotIndex::new(index).unwrap();
            snapshot.occupied = snapshot.occupied.with(slot);
            snapshot.slots[index] =
                SlotView { demand, weight, priority, virtual_time, last_ran: now, ..SlotView::default() };
        }
        let (since, waits) = (vec![0; jobs.len()], vec![0; jobs.len()]);
        snapshot.now = now;
        let mut world = Self { snapshot, tickets: 0, since, waits, had: vec![0; jobs.len()] };
        (0..jobs.len()).for_each(|index| world.queue(index, true));
        world
    }

    fn now(&self) -> Nanos {
        self.snapshot.now
    }

    /// Begins to wait, for the next turn or for what is left of the one that was interrupted.
    fn queue(&mut self, index: usize, next_turn: bool) {
        self.since[index] = self.now();
        let entry = enter_queue(&self.snapshot, SlotIndex::new(index).unwrap());
        if next_turn {
            self.tickets += 1;
        }
        let view = &mut self.snapshot.slots[index];
        if next_turn {
            (view.ticket, view.turn_used) = (self.tickets, 0);
            (view.virtual_time, view.turn_start, view.credit) =
                (entry.virtual_time, entry.virtual_time, entry.credit);
        }
        (view.phase, view.deadline) = (Phase::Waiting, entry.deadline);
    }

    fn holder(&self) -> Option<usize> {
        self.snapshot.admitted.iter().next().map(SlotIndex::get)
    }

    /// Decides; the GPU passes to whom the decision admits, after a drain of `drain` ns. True if it passes to another.
    fn turn(&mut self, drain: Nanos) -> bool {
        let chosen = admit(&self.snapshot);
        assert_eq!(chosen.iter().count(), 1, "none fits beside another");
        let before = self.holder();
        let slot = chosen.iter().next().unwrap();
        let index = slot.get();
        if before == Some(index) {
            if let Some(turn) = next_turn(&self.snapshot, slot) {
                self.tickets += 1;
                let view = &mut self.snapshot.slots[index];
                (view.ticket, view.credit) = (self.tickets, 0);
                (view.turn_start, view.turn_used) = (turn.turn_start, turn.turn_used);
                view.consecutive_slices += 1;
            }
            return false;
        }
        let waited = self.now() - self.since[index];
        self.waits[index] = self.waits[index].max(waited);
        assert_eq!(self.next(index, true), Action::StartFilling);
        self.snapshot.admitted = chosen;
        if let Some(before) = before {
            assert_eq!(self.next(before, false), Action::Yield);
            self.give_way(before, drain);
        }
        self.snapshot.now += switch_time(&self.snapshot, slot);
        let now = self.now();
        let view = &mut self.snapshot.slots[index];
        (view.phase, view.resident, view.slice_start) = (Phase::Running, view.demand, now);
        self.snapshot.free -= view.demand as i32;
        true
    }

    /// What a client does about a decision.
    fn next(&self, index: usize, admitted: bool) -> Action {
        let phase = self.snapshot.slots[index].phase;
        step(phase, Facts { admitted, in_flight: phase == Phase::Running })
    }

    fn give_way(&mut self, index: usize, drain: Nanos) {
        let end = end_slice(&self.snapshot, SlotIndex::new(index).unwrap(), Spent::default());
        self.had[index] += end.ran;
        let now = self.now();
        let view = &mut self.snapshot.slots[index];
        (view.phase, view.last_ran, view.virtual_time) = (Phase::Draining, now, end.virtual_time);
        view.turn_used = end.turn_used;
        view.consecutive_slices += u32::from(end.used_up);
        self.snapshot.free += view.resident as i32;
        view.resident = 0;
        self.snapshot.now += drain;
        self.queue(index, end.used_up);
    }

    /// The holder runs until somebody must decide again, and everybody waits for that.
    fn run(&mut self) {
        self.snapshot.now = next_decision(&self.snapshot, 0).expect("somebody waits").max(self.now());
    }
}

/// The bound, as the head of [`crate::policy`] has it.
fn bound(jobs: &[Job], quantum: Quantum, deadline: Nanos, index: usize) -> Nanos {
    let n = jobs.len() as u64;
    let fill = copy_time(POOL, crate::page::DEFAULT_BANDWIDTH);
    let (quantum, shortest) = match quantum {
        Quantum::Fixed(ns) => (ns, ns),
        Quantum::Auto { factor_milli, min, max, .. } => {
            let quantum = scaled(fill, u64::from(factor_milli), 1_000).clamp(min, max.max(min));
            (quantum, quantum)
        }
    };
    let most = jobs.iter().map(|job| job.1).max().unwrap_or(1);
    let times = u64::from(most.div_ceil(MOST_SHARES).div_ceil(jobs[index].1).clamp(1, MOST_SHARES));
    let round = (n - 1) * (u64::from(MOST_SHARES) * shortest + fill);
    let far = times * deadline + 2 * round;
    let until_deadline = match jobs[index].2 {
        Priority::High => 0,
        Priority::Normal => far,
        Priority::Low => 2 * far,
    };
    // An interruption is worth a quantum and a half, and what is left of a turn is not broken off for less than one.
    let runs = quantum * 3 / 2 + quantum;
    until_deadline + (n - 1) * (runs + fill + DRAIN)
}

proptest! {
    #[test]
    fn nobody_waits_longer_than_the_bound(
        jobs in jobs(),
        quantum in quanta(),
        // From less than a turn to more than all of them take.
        deadline in prop_oneof![Just(0), 1..SECOND, SECOND..100 * SECOND],
        drains in prop::collection::vec(0..=DRAIN, TURNS),
    ) {
        let mut world = World::new(&jobs, quantum, deadline);
        for drain in drains {
            world.turn(drain);
            world.run();
        }
        for index in 0..jobs.len() {
            let most = bound(&jobs, quantum, deadline, index);
            // Those who have not had a turn yet, or wait for the next.
            let waits = world.holder() != Some(index);
            let waited = world.waits[index].max(if waits { world.now() - world.since[index] } else { 0 });
            prop_assert!(waited <= most, "client {index} waited {waited} ns of at most {most}: {jobs:?}, {quantum:?}");
        }
    }

    /// Who always wants the GPU has it by its weight, whatever the deadlines: within 5 % after a hundred turns or so.
    #[test]
    fn gpu_time_is_by_weight(
        weights in prop::collection::vec(1..=10u32, 2..8),
        deadline in prop_oneof![Just(0), 1..SECOND, SECOND..100 * SECOND],
        min in 1..1_000u64,
        drains in prop::collection::vec(0..=DRAIN, 1..9),
    ) {
        let jobs: Vec<Job> = weights.iter().map(|weight| (POOL, weight * 100, Priority::Normal, 0)).collect();
        let quantum = Quantum::Auto {
            factor_milli: 5_000, longest_milli: 20_000, min: min * MILLISECOND, max: 60 * SECOND,
        };
        let mut world = World::new(&jobs, quantum, deadline);
        for turn in 0..100 * jobs.len() {
            // Drains that always shorten the same ones' turns.
            world.turn(drains[turn % drains.len()]);
            world.run();
        }
        let (sum, all) = (weights.iter().sum::<u32>(), world.had.iter().sum::<Nanos>());
        for (weight, had) in weights.iter().zip(&world.had) {
            let share = *had as f64 / all as f64;
            let exact = f64::from(*weight) / f64::from(sum);
            prop_assert!((share / exact - 1.0).abs() < 0.05, "{share} where {exact} is right: {weights:?} {:?}", world.had);
        }
    }

    /// Priority is what it says: the one of high priority waits for one least slice of each who came before it, and the
    /// one of low priority has fewer turns than its equals.
    #[test]
    fn priority_decides_who_has_more_turns(demand in POOL / 2 + 1..=POOL, n in 3..8usize, seconds in 1..5u64) {
        let mut all = vec![(demand, DEFAULT_WEIGHT, Priority::Normal, 0); n];
        all[0].2 = Priority::High;
        all[1].2 = Priority::Low;
        let mut world = World::new(&all, Quantum::Fixed(seconds * SECOND), 60 * SECOND);
        let mut turns = vec![0; n];
        for _ in 0..TURNS {
            world.turn(0);
            turns[world.holder().unwrap()] += 1;
            world.run();
        }
        prop_assert!(turns[2..].iter().all(|normal| turns[1] < *normal && *normal < turns[0]), "{turns:?}");
        prop_assert!(turns[1] > 0, "{turns:?}");
    }
}
