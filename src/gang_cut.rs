//! The cut of a gang: how processes that wait for each other stop together.
//!
//! The processes of a gang ([`crate::gang_order`]) submit work that waits for work of the others: a collective ends when all
//! ranks have launched it. If one of them gave up its GPU while another has launched a collective that the first one has not,
//! that collective would run, and hold its GPU, until the first one has its GPU back; and whoever has that GPU meanwhile may
//! wait for the other one. So no process gives up a GPU before all have *drained*: their gates are shut, and all work that they
//! have submitted is done. Nobody needs to know what the work is.
//!
//! Each process writes a [`Row`] that all others can read. A *cut* has a number and a [`Stage`], and each process adopts the
//! newest number that it sees:
//!
//! ```text
//!            somebody drains                   its work is done              all that work have drained
//!      Run ──────────────────▶ Shut(n) ──────────────────────▶ Drained(n) ──────────────────────────────▶ Left(n + 1)
//!       ▲                       │   ▲                              │
//!       │      work stands still│   │ no work stands still         │ somebody's work stands still
//!       │                       ▼   │                              │
//!       │       Step(n + 1), then Shut(n + 2) ◀────────────────────┤
//!       └─────── Let(n + 1), then Shut(n + 2) ◀────────────────────┘
//!        nobody needs the GPUs
//! ```
//!
//! **Work that stands still.** If the gates were shut while some process had launched a collective and another had not, the
//! first one's work does not end. Only a process that is in stage Shut begins one of two stages:
//!
//! - Step: those that have drained let the threads at their gates submit a few calls at a time, and wait for the end of these. So
//!   those that are behind catch up with those that are ahead, and not much further. It ends when the work that stood
//!   still has ended. It may be begun early, because it costs nothing if it is of no use.
//! - Let: all gates open until the work that stood still has ended. For work that Step does not help: several processes, of which
//!   each waits for another's next call.
//!
//! Then all shut again, under a new number.
//!
//! **Who does not answer.** A process may wait in a call of the driver until its work has ended, because a thread of it that loads a
//! kernel, for example, has the driver's lock. Then it cannot begin Step or Let, and it may be the only one in stage Shut.
//! So if it neither drains nor goes on for a while, and threads wait, one that has drained goes back to stage Shut under a new
//! number, which takes back what it has shown. If the other one still does not answer after that, it begins Let.
//!
//! A process whose memory comes in while it has work in flight does not run, so it has no gate to shut. It drains all the
//! same when another one does ([`is_called_from_filling`]).
//!
//! **Why a cut is consistent.** A process that leaves in stage Drained(n) has seen every other process that works in
//! Drained(n), or beyond it in Left. Step(n + 1) and Let(n + 1) are begun by a process in Shut(n) only, and whoever was seen in Drained(n) was
//! past that: the number grows, so it cannot be in Shut(n) again. So nobody lets threads in under n + 1 once one has seen all
//! in Drained(n), and each finds the same. A process may also go back from Drained(n) to Shut(n + 1). It begins Let only if it then
//! still sees another process that has not drained. And a process leaves only after two looks in a row have shown all in
//! Drained(n). So when Let begins, nobody has left.
//!
//! A process that had no work when the cut began is not waited for. It sets [`Row::works`] before it opens its gate, looks at
//! the others after that, and opens only if none of them has begun a cut; a process that begins a cut writes its stage and
//! looks for [`Row::works`] after that. Each stores before it loads, so at least one of them sees the other (Dekker's argument, as in
//! [`crate::gate`]; the loom test holds it).
//!
//! **Members that do not answer** are left out ([`Row::endless`], and whoever does not acknowledge its doorbell): the others
//! go on as if it were not there. What its work waits for then decides whether it ever ends, as without nvshare.
//!
//! The rows are in memory that every client can write ([`crate::gang_page`]), so any word is some row, and a row that lies
//! costs time and no more: what a process does with its own memory depends on its own state alone.

use crate::gang_order::GpuState;

/// How far a process is in a cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Stage {
    /// It has left the cut of this number's predecessor with its work done, or has had no work yet.
    #[default]
    Left,
    /// It runs, or may.
    Run,
    /// Its gate is shut, and submitted work may be in flight.
    Shut,
    /// Its gate is shut, and no work is in flight. All its memory is in place.
    Drained,
    /// Its gate is shut. If it has no work in flight, its threads may submit a few calls at a time.
    Step,
    /// Threads go on, so that work that stands still can end.
    Let,
}

/// A stage of a cut, and its number, which grows (modulo 2^32) with every stage but Drained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Cut {
    /// The stage.
    pub stage: Stage,
    /// The number.
    pub number: u32,
}

impl Cut {
    /// A stage with this number.
    pub fn new(stage: Stage, number: u32) -> Self {
        Self { stage, number }
    }

    /// Whether this number is newer.
    pub fn is_newer_than(self, other: Self) -> bool {
        newer(self.number, other.number)
    }

    /// Whether the gate is shut because of the cut.
    pub fn is_shut(self) -> bool {
        matches!(self.stage, Stage::Shut | Stage::Drained)
    }
}

/// Whether threads go on in this stage, so that work that stands still can end.
fn goes_on(stage: Stage) -> bool {
    matches!(stage, Stage::Let | Stage::Step)
}

fn newer(number: u32, than: u32) -> bool {
    number.wrapping_sub(than) as i32 > 0
}

/// What a process of a gang has of one GPU, and what the others must know of the process. One word in shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Row {
    /// What it has of the GPU.
    pub state: GpuState,
    /// How far the process is in a cut.
    pub cut: Cut,
    /// The process may have work in flight: its gate has been open since it last drained.
    pub works: bool,
    /// Threads of the process stand at its gate.
    pub wants: bool,
    /// A client outside needs this GPU.
    pub needed: bool,
    /// The process makes no use of its GPUs.
    pub idle: bool,
    /// In the stages Step and Let: the work for whose end threads go on is this process's, and in flight.
    pub stands: bool,
    /// Work of the process is in flight that has not ended for long although nothing waits at a gate of the gang.
    pub endless: bool,
    /// The members of the gang on this GPU do not fit there together.
    pub too_large: bool,
    /// The process waits for this GPU, and a client there whose work does not end is in its way.
    pub blocked: bool,
}

/// For logs.
impl std::fmt::Display for Row {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{:?}, {:?} {}", self.state, self.cut.stage, self.cut.number)?;
        let flags = [
            (self.works, "has work"),
            (self.stands, "its work stands still"),
            (self.wants, "threads wait at its gate"),
            (self.needed, "others need the GPU"),
            (self.idle, "idle"),
            (self.endless, "its work does not end"),
            (self.too_large, "too large"),
            (self.blocked, "blocked"),
        ];
        flags.iter().filter(|(set, _)| *set).try_for_each(|(_, what)| write!(out, ", {what}"))
    }
}

/// The bits of a row that stand for themselves, from the lowest on.
const FLAGS: u32 = 6;

impl Row {
    fn flags(&self) -> [bool; 8] {
        [
            self.works,
            self.wants,
            self.needed,
            self.idle,
            self.stands,
            self.endless,
            self.too_large,
            self.blocked,
        ]
    }
}

impl From<Row> for u64 {
    fn from(row: Row) -> Self {
        let state = match row.state {
            GpuState::Out => 0,
            GpuState::Draining => 1,
            GpuState::DrainingIncomplete => 2,
            GpuState::DrainPaused => 3,
            GpuState::Waiting => 4,
            GpuState::Growing => 5,
            GpuState::Ready => 6,
        };
        let stage = match row.cut.stage {
            Stage::Left => 0,
            Stage::Run => 1,
            Stage::Shut => 2,
            Stage::Drained => 3,
            Stage::Let => 4,
            Stage::Step => 5,
        };
        let flags = row.flags().iter().rev().fold(0, |bits, flag| bits << 1 | Self::from(*flag));
        state | stage << 3 | flags << FLAGS | Self::from(row.cut.number) << 32
    }
}

impl From<u64> for Row {
    /// Any 64 bits are some row.
    fn from(word: u64) -> Self {
        let state = match word & 7 {
            1 => GpuState::Draining,
            2 => GpuState::DrainingIncomplete,
            3 => GpuState::DrainPaused,
            4 => GpuState::Waiting,
            5 => GpuState::Growing,
            6 => GpuState::Ready,
            _ => GpuState::Out,
        };
        let stage = match word >> 3 & 7 {
            1 => Stage::Run,
            2 => Stage::Shut,
            3 => Stage::Drained,
            4 => Stage::Let,
            5 => Stage::Step,
            _ => Stage::Left,
        };
        let flag = |number: u32| word >> (FLAGS + number) & 1 == 1;
        Self {
            state,
            cut: Cut { stage, number: (word >> 32) as u32 },
            works: flag(0),
            wants: flag(1),
            needed: flag(2),
            idle: flag(3),
            stands: flag(4),
            endless: flag(5),
            too_large: flag(6),
            blocked: flag(7),
        }
    }
}

/// The newest cut of the others, if it is newer than this process's own.
fn news(own: Cut, others: &[Row]) -> Option<Cut> {
    let newest = others.iter().map(|row| row.cut).fold(own, |newest, cut| {
        // Of several with one number, a process that is in the cut says more than one that has left it.
        let equal = cut.number == newest.number && newest != own && newest.stage == Stage::Left;
        if cut.is_newer_than(newest) || equal { cut } else { newest }
    });
    newest.is_newer_than(own).then_some(newest)
}

/// Whether a process that runs must drain because the gang has begun a cut.
pub fn is_called_to_shut(own: Cut, others: &[Row]) -> bool {
    news(own, others).is_some_and(Cut::is_shut)
}

/// Whether a process with work in flight that waits for memory must drain instead, because another one drains or lets threads go
/// on. What that one waits for may be what this one's threads submit, and those who have the memory may wait in the same way.
pub fn is_called_from_filling(own: Cut, others: &[Row]) -> bool {
    // Also under its own number, if it began to run while others let their threads go on.
    let stops = |cut: Cut| (cut.is_shut() || goes_on(cut.stage)) && !own.is_newer_than(cut);
    others.iter().any(|row| row.works && stops(row.cut))
}

/// Whether a process that drains, or has drained, must let its threads go on.
pub fn is_called_to_let(own: Cut, others: &[Row]) -> bool {
    let news = || news(own, others).is_some_and(|cut| matches!(cut.stage, Stage::Let | Stage::Run));
    (own.is_shut() || own.stage == Stage::Step) && news()
}

/// Whether a process that drains, or has drained, must let its threads submit a few calls at a time.
pub fn is_called_to_step(own: Cut, others: &[Row]) -> bool {
    own.is_shut() && news(own, others).is_some_and(|cut| cut.stage == Stage::Step)
}

/// The cut of a process that works and begins to drain, on its own account or because it is called to. One that is in a cut
/// already stays as it is.
#[must_use]
pub fn shut(own: Cut, others: &[Row]) -> Cut {
    match news(own, others) {
        Some(cut) if cut.is_shut() => Cut::new(Stage::Shut, cut.number),
        _ if own.is_shut() => own,
        newest => Cut::new(Stage::Shut, newest.unwrap_or(own).number.wrapping_add(1)),
    }
}

/// The cut of a process that has drained and begins anew, because [`somebody_is_absent`].
#[must_use]
pub fn anew(own: Cut, others: &[Row]) -> Cut {
    Cut::new(Stage::Shut, news(own, others).unwrap_or(own).number.wrapping_add(1))
}

/// The cut of a process that lets its threads go on, on its own account or because it is called to.
#[must_use]
pub fn let_go_on(own: Cut, others: &[Row]) -> Cut {
    match news(own, others) {
        Some(cut) if cut.stage == Stage::Let => cut,
        newest => Cut::new(Stage::Let, newest.unwrap_or(own).number.wrapping_add(1)),
    }
}

/// The cut of a process that has its gang take a few calls at a time, on its own account or because it is called to.
#[must_use]
pub fn step(own: Cut, others: &[Row]) -> Cut {
    match news(own, others) {
        Some(cut) if cut.stage == Stage::Step => cut,
        newest => Cut::new(Stage::Step, newest.unwrap_or(own).number.wrapping_add(1)),
    }
}

/// The cut of a process that begins to run, or gives a cut up and runs on. It takes the newest number, and makes no newer one:
/// it is no news to those who let their threads go on under it.
#[must_use]
pub fn run_on(own: Cut, others: &[Row]) -> Cut {
    Cut::new(Stage::Run, news(own, others).unwrap_or(own).number)
}

/// The cut of a process that leaves with its work done.
#[must_use]
pub fn leave(own: Cut) -> Cut {
    Cut::new(Stage::Left, own.number.wrapping_add(1))
}

/// The cut of a process that has missed that the gang has gone on to other stages and is back in one like its own: it stays as it
/// is, under the newer number.
#[must_use]
pub fn keep_up(own: Cut, others: &[Row]) -> Cut {
    match news(own, others) {
        Some(cut) if own.is_shut() && cut.is_shut() => Cut::new(own.stage, cut.number),
        Some(cut) if goes_on(own.stage) && goes_on(cut.stage) => Cut::new(own.stage, cut.number),
        _ => own,
    }
}

/// Whether the processes that work have all drained, so that one in stage Drained may give up its GPUs. Under this number,
/// or under a later one in which they have left.
pub fn all_have_drained(own: Cut, others: &[Row]) -> bool {
    others.iter().all(|row| {
        let drained = row.cut.stage == Stage::Drained && row.cut.number == own.number;
        let left = row.cut.stage == Stage::Left && !newer(own.number, row.cut.number);
        !row.works || row.endless || drained || left
    })
}

/// Whether some other process's work stands still, for whose end threads go on.
pub fn work_stands(others: &[Row]) -> bool {
    others.iter().any(|row| row.works && goes_on(row.cut.stage) && row.stands && !row.endless)
}

/// Whether another process has drained, and threads stand at its gate: work of this one that does not end may be waiting for
/// what those submit.
pub fn somebody_is_behind(own: Cut, others: &[Row]) -> bool {
    let behind = |row: &Row| row.works && row.wants && row.cut == Cut::new(Stage::Drained, own.number);
    others.iter().any(behind)
}

/// Whether another process works that has neither drained nor seen this cut. If that lasts, it waits in a call of the driver, which
/// may end only when a thread of this process submits what that process's work waits for.
pub fn somebody_is_absent(own: Cut, others: &[Row]) -> bool {
    let answers = |cut: Cut| {
        let drained = matches!(cut.stage, Stage::Drained | Stage::Left);
        drained || cut.is_newer_than(own) || cut.number == own.number && cut.stage != Stage::Shut
    };
    others.iter().any(|row| row.works && !row.endless && !answers(row.cut))
}

/// Whether other processes work, so that one that has its GPU and gives it up must drain with them, even if it has not worked.
pub fn others_work(others: &[Row]) -> bool {
    others.iter().any(|row| row.works && !row.endless)
}

/// Whether a process may open its gate as far as the others are concerned: they have their GPUs, and none has begun a cut.
/// A process that runs already (`running`) goes on while another one's memory grows.
pub fn may_run(own: Cut, others: &[Row], running: bool) -> bool {
    let there = |row: &Row| match row.state {
        GpuState::Ready | GpuState::DrainPaused => true,
        GpuState::Growing => running && row.works,
        _ => row.endless,
    };
    others.iter().all(there) && !is_called_to_shut(own, others)
}

// Not under Miri: this module has no unsafe code and no atomics, and its tests search all states, which takes Miri hours.
#[cfg(all(test, not(loom), not(miri)))]
mod tests;
