use super::*;
use crate::reachable::Reachable;
use std::collections::{BTreeSet, VecDeque};

fn gpu(number: usize) -> GpuUuid {
    GpuUuid([number as u8; 16])
}

fn slot() -> SlotIndex {
    SlotIndex::new(0).unwrap()
}

/// An order of the GPUs 0, 1 and 2, which the process has begun to use in another order.
fn three() -> GangOrder {
    let mut order = GangOrder::new();
    [2, 0, 1].into_iter().for_each(|number| order.join(gpu(number), slot()));
    order
}

#[test]
fn they_are_asked_for_one_after_the_other() {
    let mut order = three();
    let may_ask = |order: &GangOrder| [0, 1, 2].map(|number| order.may_ask(gpu(number)));
    assert_eq!(may_ask(&order), [true, false, false]);
    for state in [GpuState::Waiting, GpuState::Draining, GpuState::DrainPaused] {
        order.set(gpu(0), state);
        assert_eq!(may_ask(&order), [true, false, false], "{state:?} is not admitted");
    }
    for state in [GpuState::Growing, GpuState::Ready] {
        order.set(gpu(0), state);
        assert_eq!(may_ask(&order), [true, true, false], "{state:?} is admitted");
    }
    order.set(gpu(1), GpuState::Growing);
    assert!(order.may_ask(gpu(2)) && !order.complete());
    order.set(gpu(1), GpuState::Ready);
    assert!(order.may_ask(gpu(2)) && !order.complete());
    assert!(order.set(gpu(2), GpuState::Ready) && !order.set(gpu(2), GpuState::Ready));
    assert!(order.complete());
}

#[test]
fn who_waits_for_one_gives_up_those_after_it() {
    let mut order = three();
    [0, 1, 2].into_iter().for_each(|number| _ = order.set(gpu(number), GpuState::Ready));
    let must = |order: &GangOrder| [0, 1, 2].map(|number| order.must_give_up(gpu(number)));
    for state in [GpuState::Out, GpuState::Growing, GpuState::Ready] {
        order.set(gpu(1), state);
        assert_eq!(must(&order), [false; 3], "{state:?} waits for nobody");
    }
    order.set(gpu(1), GpuState::Waiting);
    assert_eq!(must(&order), [false, false, true]);
    assert_eq!([0, 1, 2].map(|number| order.waits_beyond(gpu(number))), [true, false, false]);
    order.leave(gpu(1));
    assert_eq!(must(&order), [false; 3]);
    assert!(order.complete());
}

/// It asks for the GPUs after the one that it waits for when it has that one.
#[test]
fn who_waits_for_one_is_expected_on_those_after_it() {
    let mut order = three();
    let asks = |order: &GangOrder| [0, 1, 2].map(|number| order.asks_at(gpu(number)));
    assert!(order.expect(gpu(1), Some(1_000)));
    assert_eq!(asks(&order), [None; 3], "it does not wait");
    order.set(gpu(1), GpuState::Waiting);
    assert_eq!(asks(&order), [None, None, Some(1_000)]);
    assert!(!order.expect(gpu(1), Some(1_000 + SAME_FORECAST - 1)), "that is the same");
    assert!(order.expect(gpu(1), Some(1_000 + SAME_FORECAST)) && !order.expect(gpu(7), Some(1)));
    assert_eq!(asks(&order), [None, None, Some(1_000 + SAME_FORECAST)]);
    assert!(order.expect(gpu(1), None) && !order.expect(gpu(1), None));
    assert_eq!(asks(&order), [None; 3]);
    // The other processes of its gang, of which the last one counts.
    let other = |number, turn| Seen {
        seat: (gpu(number), SlotIndex::new(1).unwrap()),
        state: GpuState::Waiting,
        blocked: false,
        turn,
    };
    order.see([other(0, Some(7)), other(1, Some(9)), other(2, Some(11))]);
    assert_eq!(asks(&order), [None, Some(7), Some(9)]);
    order.see([other(0, None)]);
    assert_eq!(asks(&order), [None; 3], "it does not know");
    order.expect(gpu(1), Some(5));
    order.leave(gpu(1));
    assert_eq!(asks(&order), [None; 3]);
}

#[test]
fn no_gpu_is_all_there_is_to_have() {
    let mut order = GangOrder::new();
    assert!(order.complete());
    assert!(!order.set(gpu(0), GpuState::Ready), "it has not joined");
    order.join(gpu(0), slot());
    assert!(!order.complete());
}

/// A machine whose GPUs hold one process each, and processes that want all of their GPUs again and again. A step is one action
/// of one engine, and any step that is possible may come next.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Machine {
    /// For each GPU, the process that has it.
    holders: Vec<Option<usize>>,
    /// For each GPU, the processes that wait for it, the first one first.
    queues: Vec<VecDeque<usize>>,
    processes: Vec<Process>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Process {
    order: GangOrder,
    /// The GPUs on which its slice has begun.
    begun: BTreeSet<usize>,
    /// The GPUs that it uses so far.
    joined: Vec<usize>,
    /// The GPUs that it will use later, the next one first.
    to_join: VecDeque<usize>,
}

impl Process {
    /// Whether it uses all its GPUs and has them.
    fn runs(&self) -> bool {
        self.to_join.is_empty() && self.order.complete()
    }
}

impl Machine {
    /// Processes that begin to use these GPUs, in this order.
    fn new(gpus: usize, processes: &[&[usize]]) -> Self {
        let process = |uses: &&[usize]| Process {
            order: GangOrder::new(),
            begun: BTreeSet::new(),
            joined: Vec::new(),
            to_join: uses.iter().copied().collect(),
        };
        Self {
            holders: vec![None; gpus],
            queues: vec![VecDeque::new(); gpus],
            processes: processes.iter().map(process).collect(),
        }
    }

    /// The states that one step leads to.
    fn next(&self) -> Vec<Machine> {
        let mut steps = Vec::new();
        for (index, process) in self.processes.iter().enumerate() {
            // It makes a context on its next GPU while it runs, or before it has run.
            if process.order.complete() && !process.to_join.is_empty() {
                let mut step = self.clone();
                let process = &mut step.processes[index];
                let number = process.to_join.pop_front().expect("there is a next one");
                process.order.join(gpu(number), slot());
                process.joined.push(number);
                steps.push(step);
            }
            steps.extend(process.joined.iter().filter_map(|number| self.engine(index, *number)));
        }
        steps
    }

    /// What the engine of a process on a GPU does next, if it does anything.
    fn engine(&self, index: usize, number: usize) -> Option<Machine> {
        let Process { order, begun, .. } = &self.processes[index];
        let (must_give_up, awaited) = (order.must_give_up(gpu(number)), !self.queues[number].is_empty());
        let mut step = self.clone();
        let process = &mut step.processes[index];
        match order.state(gpu(number)) {
            GpuState::Out if order.may_ask(gpu(number)) => {
                process.order.set(gpu(number), GpuState::Waiting);
                step.queues[number].push_back(index);
            }
            GpuState::Waiting if must_give_up => {
                process.order.set(gpu(number), GpuState::Out);
                step.queues[number].retain(|waiter| *waiter != index);
            }
            GpuState::Waiting if self.holders[number].is_none() && self.queues[number][0] == index => {
                process.order.set(gpu(number), GpuState::Growing);
                step.holders[number] = Some(index);
                step.queues[number].pop_front();
            }
            GpuState::Growing => {
                process.order.set(gpu(number), GpuState::Ready);
                if process.order.complete() {
                    process.begun = process.joined.iter().copied().collect();
                }
            }
            GpuState::Ready if must_give_up || awaited && begun.contains(&number) => {
                process.order.set(gpu(number), GpuState::Out);
                process.begun.remove(&number);
                step.holders[number] = None;
            }
            _ => return None,
        }
        Some(step)
    }
}

/// From every state that can be reached, every process can still reach a state in which it runs.
fn nobody_is_blocked(machine: Machine) {
    let processes = machine.processes.len();
    let reachable = Reachable::from(machine, Machine::next);
    for index in 0..processes {
        let what = format!("process {index} runs");
        reachable.all_lead_to(&what, |machine| machine.processes[index].runs());
    }
}

#[test]
fn two_that_came_to_both_gpus_in_opposite_order() {
    nobody_is_blocked(Machine::new(2, &[&[0, 1], &[1, 0]]));
}

#[test]
fn three_in_a_ring() {
    nobody_is_blocked(Machine::new(3, &[&[0, 1], &[1, 2], &[2, 0]]));
}

#[test]
fn one_that_needs_all_beside_those_that_need_one() {
    nobody_is_blocked(Machine::new(3, &[&[2, 1, 0], &[0], &[2], &[1]]));
}
