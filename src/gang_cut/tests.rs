use super::*;
use crate::reachable::Reachable;
use proptest::prelude::*;

/// How many collectives a process may launch before another one has launched them.
const AHEAD: u32 = 2;

/// How far the number of one process may be ahead of another's that has not looked meanwhile. Else a process could try again and
/// again before the other one looks once, and there would be no end of states.
const NUMBERS: u32 = 5;

/// A process whose only work is collectives: one ends when all processes have launched it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Process {
    row: Row,
    /// Collectives that it has launched.
    launched: u32,
}

/// Processes of one gang, a GPU each. A step is one action of one engine or of one thread, and any step that is possible may come
/// next.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Gang {
    processes: Vec<Process>,
}

impl Gang {
    fn new(count: usize) -> Self {
        let process = Process { row: Row::default(), launched: 0 };
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
        for process in processes {
            process.launched -= launched;
            process.row.cut.number = process.row.cut.number.saturating_sub(number);
        }
        self
    }

    fn launch(&self, index: usize) -> Self {
        self.with(index, |process| process.launched += 1)
    }

    /// The states that one step leads to.
    fn next(&self) -> Vec<Gang> {
        let steps = (0..self.processes.len()).flat_map(|index| self.steps_of(index));
        let near = |gang: &Gang| gang.processes.iter().all(|process| process.row.cut.number <= NUMBERS);
        steps.filter(near).collect()
    }

    fn steps_of(&self, index: usize) -> Vec<Gang> {
        let (row, others, done) = (self.processes[index].row, self.others(index), self.done(index));
        let cut = row.cut;
        let mut steps = Vec::new();
        let mut step =
            |change: &dyn Fn(&mut Row)| steps.push(self.with(index, |process| change(&mut process.row)));
        let shut = |row: &mut Row| {
            row.cut = super::shut(cut, &others);
            (row.state, row.stands, row.wants) = (GpuState::Draining, false, true);
        };
        match cut.stage {
            Stage::Left if row.state == GpuState::Out => step(&|row| row.state = GpuState::Ready),
            Stage::Left if may_run(cut, &others, false) => step(&|row| {
                row.cut = run_on(cut, &others);
                (row.works, row.wants) = (true, false);
            }),
            Stage::Left => {}
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
                    step(&|row| {
                        row.cut = leave(drained);
                        (row.works, row.wants, row.state) = (false, false, GpuState::Out);
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
                if cut.stage == Stage::Step && row.stands && !done {
                    // After a while in which it was of no use.
                    step(&|row| (row.cut, row.state) = (let_go_on(cut, &others), GpuState::DrainPaused));
                }
                let may = cut.stage == Stage::Let || done && !row.stands && !over;
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
