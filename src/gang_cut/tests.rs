use super::*;
use crate::reachable::Reachable;
use proptest::prelude::*;

/// How many collectives a process may launch before another one has launched them.
const AHEAD: u32 = 2;

/// A process whose only work is collectives: one ends when all processes have launched it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Process {
    row: Row,
    /// Collectives that it has launched.
    launched: u32,
    /// It has allocated memory for which there is no room before the gang has left: its threads wait, unless it is in stage Let, in
    /// which all memory is in place on the host.
    lacks: bool,
    /// Its engine waits in a call of the driver until its work has ended.
    blocked: bool,
}

/// Processes of one gang, a GPU each. A step is one action of one engine or of one thread, and any step that is possible may come
/// next.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Gang {
    processes: Vec<Process>,
}

impl Gang {
    fn new(count: usize) -> Self {
        let process = Process { row: Row::default(), launched: 0, lacks: false, blocked: false };
        Self { processes: vec![process; count] }
    }

    fn others(&self, index: usize) -> Vec<Row> {
        let others = self.processes.iter().enumerate().filter(|(other, _)| *other != index);
        others.map(|(_, process)| process.row).collect()
    }

    /// Whether the work of a process is done.
    fn done(&self, index: usize) -> bool {
        let launched = self.processes[index].launched;
        self.processes.iter().all(|process| process.launched >= launched)
    }

    fn may_launch(&self, index: usize) -> bool {
        let least = self.processes.iter().map(|process| process.launched).min().unwrap();
        self.processes[index].launched < least + AHEAD
    }

    fn with(&self, index: usize, change: impl FnOnce(&mut Process)) -> Self {
        let mut gang = self.clone();
        change(&mut gang.processes[index]);
        gang.normalised()
    }

    /// Only differences of numbers count.
    fn normalised(mut self) -> Self {
        let processes = &mut self.processes;
        let launched = processes.iter().map(|process| process.launched).min().unwrap();
        let numbers = |left: bool| {
            let of = processes.iter().filter(move |process| left || process.row.cut.stage != Stage::Left);
            of.map(|process| process.row.cut.number).min()
        };
        // A process that has left takes the newest number when it runs again, so an old one is as good as any.
        let number = numbers(false).or_else(|| numbers(true)).unwrap();
        for process in &mut *processes {
            process.launched -= launched;
            process.row.cut.number = process.row.cut.number.saturating_sub(number);
        }
        // A process may try again and again before another one looks once. How far it is ahead does not count, only whether by more
        // than one.
        let mut numbers: Vec<_> = processes.iter().map(|process| process.row.cut.number).collect();
        numbers.sort_unstable();
        numbers.dedup();
        let mut near = vec![numbers[0]];
        for pair in numbers.windows(2) {
            near.push(near[near.len() - 1] + (pair[1] - pair[0]).min(2));
        }
        for process in processes {
            let at = numbers.iter().position(|number| *number == process.row.cut.number).unwrap();
            process.row.cut.number = near[at];
        }
        self
    }

    fn launch(&self, index: usize) -> Self {
        self.with(index, |process| process.launched += 1)
    }

    /// The states that one step leads to.
    fn next(&self) -> Vec<Gang> {
        (0..self.processes.len()).flat_map(|index| self.steps_of(index)).collect()
    }

    fn steps_of(&self, index: usize) -> Vec<Gang> {
        let (row, others, done) = (self.processes[index].row, self.others(index), self.done(index));
        let (cut, lacks) = (row.cut, self.processes[index].lacks);
        let mut steps = Vec::new();
        if self.processes[index].blocked {
            if done {
                steps.push(self.with(index, |process| process.blocked = false));
            }
            return steps;
        }
        if !done && matches!(cut.stage, Stage::Shut | Stage::Step) {
            steps.push(self.with(index, |process| process.blocked = true));
        }
        if cut.stage == Stage::Run && !lacks {
            steps.push(
                self.with(index, |process| (process.lacks, process.row.state) = (true, GpuState::Growing)),
            );
        }
        let mut step =
            |change: &dyn Fn(&mut Row)| steps.push(self.with(index, |process| change(&mut process.row)));
        let shut = |row: &mut Row| {
            row.cut = super::shut(cut, &others);
            (row.state, row.stands, row.wants) = (GpuState::Draining, false, true);
        };
        match cut.stage {
            Stage::Left if row.state == GpuState::Out => step(&|row| row.state = GpuState::Ready),
            Stage::Left => {
                if may_run(cut, &others, false) {
                    step(&|row| {
                        row.cut = run_on(cut, &others);
                        (row.works, row.wants) = (true, false);
                    });
                }
                // It is recalled before it has worked.
                if others_work(&others) {
                    step(&|row| {
                        row.works = true;
                        shut(row);
                    });
                } else {
                    step(&|row| row.state = GpuState::Out);
                }
            }
            Stage::Run if lacks => {
                // Its memory does not come before the gang has left. Its GPU may have chosen it to be filled, and another GPU may have
                // recalled another one; some GPU recalls one.
                let all_run = others.iter().all(|row| !row.works || row.cut.stage == Stage::Run);
                if all_run || is_called_from_filling(cut, &others) {
                    step(&shut);
                }
            }
            Stage::Run => {
                // It is recalled, or called.
                step(&shut);
                if self.may_launch(index) && may_run(cut, &others, true) {
                    steps.push(self.launch(index));
                }
            }
            Stage::Shut if is_called_to_step(cut, &others) => step(&|row| {
                (row.cut, row.stands) = (super::step(cut, &others), true);
            }),
            Stage::Drained if is_called_to_step(cut, &others) => step(&|row| {
                (row.cut, row.stands) = (super::step(cut, &others), false);
            }),
            Stage::Shut | Stage::Drained | Stage::Step if is_called_to_let(cut, &others) => step(&|row| {
                row.stands = cut.stage != Stage::Drained;
                row.cut = let_go_on(cut, &others);
                row.state = GpuState::DrainPaused;
            }),
            Stage::Shut | Stage::Drained if done => {
                let kept = keep_up(cut, &others);
                let drained = Cut::new(Stage::Drained, kept.number);
                if drained != cut {
                    step(&|row| row.cut = drained);
                } else if all_have_drained(drained, &others) {
                    assert!(
                        (0..self.processes.len()).all(|other| self.done(other)),
                        "process {index} leaves while work waits for it: {self:#?}"
                    );
                    steps.push(self.with(index, |process| {
                        process.row.cut = leave(drained);
                        (process.row.works, process.row.wants) = (false, false);
                        (process.row.state, process.lacks) = (GpuState::Out, false);
                    }));
                } else if somebody_is_absent(drained, &others) {
                    step(&|row| {
                        row.cut = anew(drained, &others);
                        if somebody_is_absent(row.cut, &others) {
                            row.cut = let_go_on(row.cut, &others);
                            (row.stands, row.state) = (false, GpuState::DrainPaused);
                        }
                    });
                }
            }
            Stage::Shut => {
                if somebody_is_behind(cut, &others) {
                    step(&|row| (row.cut, row.stands) = (super::step(cut, &others), true));
                }
                // Its own thread, or another's, stands at a gate.
                step(&|row| {
                    row.cut = let_go_on(cut, &others);
                    (row.stands, row.state) = (true, GpuState::DrainPaused);
                });
            }
            Stage::Drained => {}
            Stage::Step | Stage::Let => {
                if keep_up(cut, &others) != cut {
                    step(&|row| row.cut = keep_up(cut, &others));
                }
                let stands = row.stands && !done;
                let over = is_called_to_shut(cut, &others) || !stands && !work_stands(&others);
                if over {
                    step(&shut);
                } else if row.stands && done {
                    step(&|row| row.stands = false);
                }
                if cut.stage == Stage::Step && !over {
                    // After a while in which it was of no use.
                    step(&|row| {
                        row.cut = let_go_on(cut, &others);
                        (row.stands, row.state) = (true, GpuState::DrainPaused);
                    });
                }
                let may = cut.stage == Stage::Let || done && !row.stands && !over && !lacks;
                if may && self.may_launch(index) {
                    steps.push(self.launch(index));
                }
            }
        }
        steps
    }

    fn all_run(&self) -> bool {
        self.processes.iter().all(|process| process.row.cut.stage == Stage::Run)
    }

    fn all_are_out(&self) -> bool {
        self.processes.iter().all(|process| process.row.state == GpuState::Out)
    }
}

/// From every state that can be reached, the gang can still reach one in which all run, and one in which all have left; and nobody
/// ever leaves while another one's work waits for what it has not launched.
fn stops_and_runs(gang: Gang) {
    let reachable = Reachable::from(gang, Gang::next);
    reachable.all_lead_to("all run", Gang::all_run);
    reachable.all_lead_to("all are out", Gang::all_are_out);
}

#[test]
fn two_processes_stop_together() {
    stops_and_runs(Gang::new(2));
}

#[test]
fn three_processes_stop_together() {
    stops_and_runs(Gang::new(3));
}

/// Else two that let their threads go on would wait for each other.
#[test]
fn whoever_goes_on_under_the_same_number_is_not_absent() {
    let at = |stage, number| Row { works: true, cut: Cut::new(stage, number), ..Row::default() };
    assert!(!somebody_is_absent(Cut::new(Stage::Let, 7), &[at(Stage::Let, 7)]));
    assert!(somebody_is_absent(Cut::new(Stage::Let, 7), &[at(Stage::Shut, 5)]));
    assert!(somebody_is_absent(Cut::new(Stage::Drained, 7), &[at(Stage::Shut, 7)]));
    assert!(somebody_is_absent(Cut::new(Stage::Drained, 7), &[at(Stage::Run, 6)]));
    assert!(
        !somebody_is_absent(Cut::new(Stage::Drained, 7), &[at(Stage::Drained, 6)]),
        "its engine will look"
    );
    assert!(!somebody_is_absent(Cut::new(Stage::Drained, 7), &[Row { works: false, ..at(Stage::Run, 6) }]));
}

#[test]
fn a_member_whose_work_does_not_end_is_not_waited_for() {
    let own = Cut::new(Stage::Drained, 7);
    let works = Row { works: true, cut: Cut::new(Stage::Shut, 7), ..Row::default() };
    assert!(!all_have_drained(own, &[works]));
    assert!(all_have_drained(own, &[Row { endless: true, ..works }]));
    assert!(all_have_drained(own, &[Row { cut: own, ..works }]));
    assert!(all_have_drained(own, &[Row { works: false, ..works }]));
    assert!(
        !all_have_drained(own, &[Row { cut: Cut::new(Stage::Drained, 6), ..works }]),
        "of an earlier try"
    );
    assert!(may_run(own, &[Row { endless: true, ..works }], false), "its work may wait for this process");
}

proptest! {
    #[test]
    fn any_word_is_a_row_and_a_row_is_read_as_it_was_written(word: u64) {
        let row = Row::from(word);
        prop_assert_eq!(Row::from(u64::from(row)), row);
    }

    /// Whatever the others show, a number moves by one step beyond the newest that was seen.
    #[test]
    fn rows_that_lie_move_the_number_by_one(own: u64, words: Vec<u64>) {
        let rows: Vec<_> = words.into_iter().map(Row::from).collect();
        let own = Row::from(own).cut;
        let numbers: Vec<_> = rows.iter().map(|row| row.cut.number).chain([own.number]).collect();
        for next in [shut(own, &rows), let_go_on(own, &rows), step(own, &rows), keep_up(own, &rows)] {
            let known = numbers.iter().any(|number| [*number, number.wrapping_add(1)].contains(&next.number));
            prop_assert!(known, "{next:?} of {numbers:?}");
        }
        let _ = (may_run(own, &rows, true), all_have_drained(own, &rows), work_stands(&rows));
    }
}
