//! The bound on a wait (L1), in virtual time: clients of any weight and priority who always want the GPU, none of whom
//! fits beside another.
//!
//! The policy decides, as it does everywhere; what is made here is what clients do with its decisions, as
//! [`crate::client`] has it: they run until they are recalled, drain, queue again, and fill when it is their turn.

use super::*;
use crate::page::{Page, Settings};
use crate::step::{Action, Facts, step};
use crate::units::MILLISECOND;
use crate::usage::MAX_WEIGHT;
use proptest::prelude::*;

/// Granules in the pool.
const POOL: Granules = 1_000;

/// No drain takes longer, and none is worth less.
const DRAIN: Nanos = 50 * MILLISECOND;

/// Turns that are taken in one run: enough for every deadline to come several times.
const TURNS: usize = 400;

/// A client: demand, weight, priority, and what it has used before.
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
    now: Nanos,
    tickets: u64,
    /// Since when each waits.
    since: Vec<Nanos>,
    /// The longest wait of each that has ended.
    waits: Vec<Nanos>,
}

impl World {
    fn new(jobs: &[Job], quantum: Quantum, deadline: Nanos) -> Self {
        let mut snapshot = Snapshot::take(&Page::for_tests(POOL), SlotSet::EMPTY);
        snapshot.settings = Settings { quantum, deadline, ..Settings::default() };
        let now = 1_000 * SECOND;
        for (index, (demand, weight, priority, usage)) in jobs.iter().copied().enumerate() {
            let slot = SlotIndex::new(index).unwrap();
            snapshot.occupied = snapshot.occupied.with(slot);
            snapshot.slots[index] =
                SlotView { demand, weight, priority, usage, last_ran: now, ..SlotView::default() };
        }
        let (since, waits) = (vec![0; jobs.len()], vec![0; jobs.len()]);
        let mut world = Self { snapshot, now, tickets: 0, since, waits };
        (0..jobs.len()).for_each(|index| world.queue(index));
        world
    }

    fn queue(&mut self, index: usize) {
        self.tickets += 1;
        self.since[index] = self.now;
        let slot = SlotIndex::new(index).unwrap();
        let deadline = deadline(&self.snapshot, slot, self.now);
        let view = &mut self.snapshot.slots[index];
        (view.phase, view.ticket, view.deadline) = (Phase::Waiting, self.tickets, deadline);
    }

    fn holder(&self) -> Option<usize> {
        self.snapshot.admitted.iter().next().map(SlotIndex::get)
    }

    /// Decides; the GPU passes to whom the decision admits, after a drain of `drain` ns.
    fn turn(&mut self, drain: Nanos) {
        let chosen = admit(&self.snapshot, self.now);
        assert_eq!(chosen.iter().count(), 1, "none fits beside another");
        let before = self.holder();
        let index = chosen.iter().next().unwrap().get();
        if before == Some(index) {
            return;
        }
        let waited = self.now - self.since[index];
        self.waits[index] = self.waits[index].max(waited);
        assert_eq!(self.next(index, true), Action::StartFilling);
        self.snapshot.admitted = chosen;
        if let Some(before) = before {
            assert_eq!(self.next(before, false), Action::Yield);
            self.give_way(before, drain);
        }
        let slot = SlotIndex::new(index).unwrap();
        self.now += switch_time(&self.snapshot, slot);
        let view = &mut self.snapshot.slots[index];
        (view.phase, view.resident, view.slice_start) = (Phase::Running, view.demand, self.now);
        self.snapshot.free -= view.demand as i32;
    }

    /// What a client does about a decision.
    fn next(&self, index: usize, admitted: bool) -> Action {
        let phase = self.snapshot.slots[index].phase;
        step(phase, Facts { admitted, in_flight: phase == Phase::Running })
    }

    fn give_way(&mut self, index: usize, drain: Nanos) {
        let view = &mut self.snapshot.slots[index];
        let rested = view.slice_start.saturating_sub(view.last_ran);
        let ran = self.now - view.slice_start;
        view.usage = usage::after_running(usage::faded(view.usage, rested), ran);
        (view.phase, view.last_ran, view.consecutive_slices) =
            (Phase::Draining, self.now, view.consecutive_slices + 1);
        self.snapshot.free += view.resident as i32;
        view.resident = 0;
        self.now += drain;
        self.queue(index);
    }
}

/// The bound, as the head of [`crate::policy`] has it.
fn bound(jobs: &[Job], quantum: Quantum, farthest: Nanos, priority: Priority) -> Nanos {
    let n = jobs.len() as u64;
    let fill = copy_time(POOL, crate::page::DEFAULT_BANDWIDTH);
    let longest = match quantum {
        Quantum::Fixed(ns) => ns,
        Quantum::Auto { factor_milli, min, max, .. } => {
            scaled(fill, factor_milli, 1_000).clamp(min, max.max(min))
        }
    };
    let until_deadline = match priority {
        Priority::High => 0,
        Priority::Normal => farthest,
        Priority::Low => 2 * farthest,
    };
    until_deadline + (n - 1) * (longest + fill + DRAIN)
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
            // The holder runs until somebody must decide again, and everybody waits for that.
            world.now = next_decision(&world.snapshot, 0).expect("somebody waits").max(world.now);
        }
        for (index, job) in jobs.iter().enumerate() {
            let most = bound(&jobs, quantum, deadline, job.2);
            // Those who have not had a turn yet, or wait for the next.
            let waits = world.holder() != Some(index);
            let waited = world.waits[index].max(if waits { world.now - world.since[index] } else { 0 });
            prop_assert!(waited <= most, "client {index} waited {waited} ns of at most {most}: {jobs:?}, {quantum:?}");
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
            world.now = next_decision(&world.snapshot, 0).unwrap();
        }
        prop_assert!(turns[2..].iter().all(|normal| turns[1] < *normal && *normal < turns[0]), "{turns:?}");
        prop_assert!(turns[1] > 0, "{turns:?}");
    }
}
