//! The GPUs of this process, and the gang that it belongs to: the process's gate is open when it has all its GPUs, because work
//! on one GPU may use the memory of another, and when the other processes of its gang have theirs.
//!
//! Each GPU's engine records its state here ([`GpuState`]), and asks what it may do ([`nvshare::gang_order`]).
//! A change of state rings the doorbells of the other engines: one may now ask for its GPU, or must give it up. The other
//! processes of a gang see it in memory that they share ([`crate::submit::gang_seats`]), and how they stop together is
//! in [`nvshare::gang_cut`]. A process that belongs to no gang has nobody to wait for, and does the same.
//!
//! What the others show decides when this process runs, and never whether its memory may move: that depends on its own states.
//!
//! **Locks.** [`GANG`] is the innermost lock: a GPU's map of memory and the set of captures may be held when it
//! is taken, and no thread blocks while it holds it. The gate is opened and shut under it, so that
//! no engine can open the gate at the moment when another GPU's memory is evicted.

use crate::cuda::abi::CUstream;
use crate::cuda::driver::Driver;
use crate::submit::drain::{CompletionMarker, Streams, WorkBefore};
use crate::submit::gang_seats::Seats;
use crate::submit::gate::gate;
use crate::submit::turn;
use nvshare::Books;
use nvshare::gang_cut::{self, Cut, Row, Stage};
use nvshare::gang_order::{GangOrder, GpuState, Seat, Seen};
use nvshare::gang_page::Place;
use nvshare::map::{MappedGangPage, MappedPage};
use nvshare::slot::SlotSet;
use nvshare::units::{GpuUuid, Nanos};
use std::sync::{Arc, Mutex, MutexGuard};

/// What the gang needs of a GPU of the process.
#[derive(Clone)]
pub struct Member {
    /// The GPU.
    pub gpu: GpuUuid,
    /// The driver.
    pub driver: &'static Driver,
    /// The client's accounts.
    pub books: Books<MappedPage>,
    /// The streams that may have work.
    pub streams: Arc<Streams>,
}

impl Member {
    /// Wakes the GPU's engine.
    pub fn wake_engine(&self) {
        self.books.page().ring(self.books.slot());
    }
}

/// What an engine knows of its GPU that the other processes of the gang must know.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    /// A client that is not admitted needs the GPU.
    pub needed: bool,
    /// Other clients have the GPU or wait for it.
    pub contended: bool,
    /// The members of the gang on this GPU do not fit there together.
    pub too_large: bool,
    /// The process waits for this GPU, and a client whose work does not end is in its way.
    pub blocked: bool,
    /// When its turn is likely to come, ns, if it waits for this GPU.
    pub turn: Option<Nanos>,
}

/// How a drain stands whose work is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// The GPU is given up.
    Yes,
    /// The other processes of the gang have not drained yet; the memory stays in place.
    OthersWork,
    /// Threads were let in meanwhile, so that there may be new work.
    No,
}

struct Gang {
    order: GangOrder,
    members: Vec<Member>,
    /// How far this process is in a cut of its gang. A process without a gang makes its cuts alone.
    cut: Cut,
    /// The gate has been open since the process last drained.
    works: bool,
    /// In stage Let: the work for whose end the threads go on is this process's.
    stands: bool,
    endless: bool,
    idle: bool,
    /// How often threads were let in by steps.
    steps: u64,
    reports: Vec<(GpuUuid, Report)>,
    seats: Seats,
    /// What the other processes showed at the last look.
    others: Vec<Row>,
}

static GANG: Mutex<Gang> = Mutex::new(Gang {
    order: GangOrder::new(),
    members: Vec::new(),
    cut: Cut { stage: Stage::Left, number: 0 },
    works: false,
    stands: false,
    endless: false,
    idle: false,
    steps: 0,
    reports: Vec::new(),
    seats: Seats::new(),
    others: Vec::new(),
});

fn gang() -> MutexGuard<'static, Gang> {
    nvshare::sync::lock(&GANG)
}

impl Gang {
    /// Sets the state of a GPU, opens or shuts the gate accordingly, and wakes the other engines.
    fn set(&mut self, gpu: GpuUuid, stage: GpuState) {
        if self.order.set(gpu, stage) {
            self.changed(gpu);
        }
    }

    /// Opens or shuts the gate after the state of this GPU, and perhaps of others, has changed, and wakes the other engines.
    fn changed(&mut self, gpu: GpuUuid) {
        self.open_or_shut(Some(gpu));
        self.wake_all_but(gpu);
    }

    /// Opens or shuts the gate. `changes` is the GPU whose engine will look at its slice in any case.
    fn open_or_shut(&mut self, changes: Option<GpuUuid>) {
        self.look();
        if self.order.complete() && self.others_let_it_run() {
            self.begin(changes);
            gate().open();
        } else if gate().is_open() {
            shut_gate();
        }
        self.show();
    }

    /// Whether the gate may open as far as the other processes of the gang are concerned.
    fn others_let_it_run(&mut self) -> bool {
        if self.order.members().any(|(_, state)| state == GpuState::DrainPaused) {
            return true;
        }
        let before = self.works;
        if !before
            && self.seats.is_somebody_silent()
            && self.reports.iter().any(|(_, report)| report.contended)
        {
            return false;
        }
        if !before {
            // Shown before the others are looked at, so that a cut that begins now either is seen here or sees this.
            self.works = true;
            self.show();
            self.look();
        }
        self.works = before || gang_cut::may_run(self.cut, &self.others, false);
        let may = self.works && gang_cut::may_run(self.cut, &self.others, before);
        if may {
            (self.cut, self.idle, self.endless) = (gang_cut::run_on(self.cut, &self.others), false, false);
        }
        may
    }

    /// Looks at what the other processes show. They are none if the members on one GPU do not fit there together.
    fn look(&mut self) {
        if self.seats.is_empty() && self.others.is_empty() {
            return;
        }
        let rows = self.seats.look();
        let apart = self.reports.iter().any(|(_, report)| report.too_large)
            || rows.iter().any(|(_, row, _)| row.too_large);
        let rows = if apart { Vec::new() } else { rows };
        let seen = |(seat, row, turn): &(Seat, Row, Option<Nanos>)| {
            let (seat, turn) = (*seat, *turn);
            Seen { seat, state: row.state, blocked: row.blocked, turn }
        };
        self.order.see(rows.iter().map(seen));
        self.others = rows.into_iter().map(|(_, row, _)| row).collect();
    }

    /// What the others must know of this process and a GPU.
    fn row(&self, gpu: GpuUuid) -> Row {
        let report = self.reports.iter().find(|(of, _)| *of == gpu).map(|(_, report)| *report);
        let Report { needed, too_large, blocked, .. } = report.unwrap_or_default();
        Row {
            state: self.order.state(gpu),
            cut: self.cut,
            works: self.works,
            wants: gate().waiting() > 0,
            needed,
            idle: self.idle,
            stands: self.stands,
            endless: self.endless,
            too_large,
            blocked,
        }
    }

    /// Shows the other processes what they must know of this one.
    fn show(&mut self) {
        let mut seats = std::mem::replace(&mut self.seats, Seats::new());
        seats.show(|gpu| (self.row(gpu), self.order.turn(gpu)));
        self.seats = seats;
    }

    /// The process runs from now on: begins its slices. A slice that has begun earlier on a GPU that the process kept while it
    /// could not run begins again if no client waits there.
    fn begin(&self, changes: Option<GpuUuid>) {
        if self.members.iter().all(|member| member.books.slice_has_begun()) {
            return;
        }
        for member in &self.members {
            if !member.books.begin_slice() {
                member.books.renew_slice();
            }
            if Some(member.gpu) != changes {
                member.wake_engine();
            }
        }
    }

    /// Lets nobody in by steps any more, because some memory is not in place.
    fn end_step(&self) {
        if self.steps > 0 {
            gate().let_nobody_in();
        }
    }

    fn wake_all_but(&self, gpu: GpuUuid) {
        self.members.iter().filter(|member| member.gpu != gpu).for_each(|member| member.wake_engine());
    }

    /// All work of the process is done, and its gate is shut.
    fn stop_working(&mut self) {
        if self.works {
            self.cut = gang_cut::leave(self.cut);
        }
        (self.works, self.stands, self.endless) = (false, false, false);
    }
}

fn shut_gate() {
    gate().close();
    turn::gate_shut();
}

/// Whether this is the only GPU of the process, and the process is in no gang with others. If it is not, then a wait on this GPU
/// may hold up work on another one.
pub fn is_alone(gpu: GpuUuid) -> bool {
    let gang = gang();
    gang.seats.is_empty() && gang.members.iter().all(|member| member.gpu == gpu)
}

/// Wakes all engines of the process.
pub fn wake_engines() {
    gang().members.iter().for_each(|member| member.wake_engine());
}

/// Adds a GPU to the gang. The gate stays shut until the process has this one too.
pub fn join(member: Member) {
    let mut gang = gang();
    gang.order.join(member.gpu, member.books.slot());
    gang.members.push(member);
    // A GPU is not ready until its engine has said so.
    shut_gate();
    gang.end_step();
}

/// Removes a GPU from the gang, because its engine has ended.
pub fn leave(gpu: GpuUuid) {
    let mut gang = gang();
    gang.order.leave(gpu);
    gang.members.retain(|member| member.gpu != gpu);
    gang.reports.retain(|(of, _)| *of != gpu);
    gang.seats.leave(gpu);
    if gang.members.is_empty() {
        gang.stop_working();
        gate().open();
    } else {
        gang.changed(gpu);
    }
    // After an error the gate lets everybody in.
    turn::gate_shut();
}

/// The GPUs of the process, and its slots there.
pub fn clients() -> Vec<(GpuUuid, Books<MappedPage>)> {
    gang().members.iter().map(|member| (member.gpu, member.books.clone())).collect()
}

/// The client of a GPU has a place in the page of gangs from now on.
pub fn sit(gpu: GpuUuid, page: MappedGangPage, place: Place) {
    let mut gang = gang();
    let Some(member) = gang.members.iter().find(|member| member.gpu == gpu).cloned() else { return };
    gang.seats.sit(gpu, page, place, move || member.wake_engine());
    gang.show();
    gang.members.iter().for_each(|member| member.wake_engine());
}

/// Reports what an engine knows of its GPU, looks at the other processes of the gang, and opens or shuts the gate accordingly.
/// Returns when to look again at the latest, ns, if ever.
pub fn update(gpu: GpuUuid, report: Report) -> Option<Nanos> {
    let mut gang = gang();
    let blocked = gang.order.block(gpu, report.blocked);
    let turn = gang.order.expect(gpu, report.turn);
    gang.reports.retain(|(of, _)| *of != gpu);
    gang.reports.push((gpu, report));
    if blocked || turn {
        gang.wake_all_but(gpu);
    }
    if gang.seats.is_empty() {
        return None;
    }
    gang.open_or_shut(None);
    gang.seats.next_check()
}

/// What this process and the others of its gang wait for, for the log.
pub fn describe() -> String {
    let mut gang = gang();
    let own: Vec<_> =
        gang.members.iter().map(|member| format!("{}: {}", member.gpu, gang.row(member.gpu))).collect();
    let others = gang
        .seats
        .look()
        .into_iter()
        .map(|((gpu, slot), row, _)| format!("; slot {} of {gpu}: {row}", slot.get()));
    format!(
        "this process, {}, {} threads at its gate, {} inside{}",
        own.join("; "),
        gate().waiting(),
        if gate().occupied() { "some" } else { "none" },
        others.collect::<String>()
    )
}

/// Whether this process shares a gang with others, or has several GPUs.
pub fn is_shared() -> bool {
    let gang = gang();
    !gang.seats.is_empty() || gang.members.len() > 1
}

/// The slots of the gang's other processes on a GPU.
pub fn beside(gpu: GpuUuid) -> SlotSet {
    let mut gang = gang();
    let rows = gang.seats.look();
    rows.into_iter().filter(|((of, _), ..)| *of == gpu).map(|((_, slot), ..)| slot).collect()
}

/// Whether threads stand at the gate of this process or of another one of its gang, which needs this one's GPUs too.
pub fn is_wanted() -> bool {
    gate().waiting() > 0 || others_want()
}

/// Whether threads stand at the gate of another process of the gang.
pub fn others_want() -> bool {
    let mut gang = gang();
    gang.look();
    gang.others.iter().any(|row| row.wants)
}

/// Whether somebody needs a GPU of another process of the gang.
pub fn others_are_needed() -> bool {
    let mut gang = gang();
    gang.look();
    gang.others.iter().any(|row| row.needed)
}

/// Says whether this process makes no use of its GPUs. Whether none of its gang does.
pub fn idle(idle: bool) -> bool {
    let mut gang = gang();
    gang.idle = idle;
    gang.look();
    gang.show();
    idle && gang.others.iter().all(|row| row.idle || !row.works)
}

/// Whether another process of the gang drains, so that this one must.
pub fn is_called_to_drain() -> bool {
    let mut gang = gang();
    gang.look();
    gang.works && gang_cut::is_called_to_shut(gang.cut, &gang.others)
}

/// Whether a process with work in flight that waits for memory on a GPU must drain instead: another GPU of the process drains, or
/// another process of the gang does.
pub fn is_called_away(gpu: GpuUuid) -> bool {
    let mut gang = gang();
    if !gang.works {
        return false;
    }
    gang.look();
    let drains =
        |state| matches!(state, GpuState::Draining | GpuState::DrainingIncomplete | GpuState::DrainPaused);
    let another_drains = gang.order.members().any(|((of, _), state)| of != gpu && drains(state));
    another_drains || gang_cut::is_called_from_filling(gang.cut, &gang.others)
}

/// This process has drained, and threads stand at a gate. If another one does not answer, a new cut begins, in which this process
/// has not drained yet, so that nobody leaves by what it has shown. Whether that other one still does not answer: then the threads
/// must go on, because it may be waiting for them in a call of the driver.
pub fn cut_anew() -> bool {
    let mut gang = gang();
    gang.look();
    let anew = gang.works
        && gang.cut.stage == Stage::Drained
        && gang_cut::somebody_is_absent(gang.cut, &gang.others);
    if anew {
        gang.cut = gang_cut::anew(gang.cut, &gang.others);
        gang.show();
        gang.look();
    }
    anew && gang_cut::somebody_is_absent(gang.cut, &gang.others)
}

/// Whether a process of the gang works that neither drains nor answers: see [`gang_cut::somebody_is_absent`].
pub fn is_somebody_absent() -> bool {
    let mut gang = gang();
    gang.look();
    gang.works && gang_cut::somebody_is_absent(gang.cut, &gang.others)
}

/// Whether a drain must pause because another process's does, for work that waits for threads.
pub fn is_called_to_pause() -> bool {
    let mut gang = gang();
    gang.look();
    gang.works && gang_cut::is_called_to_let(gang.cut, &gang.others)
}

/// What a process does whose gang lets threads go on a few calls at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Steps {
    /// The gang does not.
    No,
    /// The work that stands still is this process's: its threads wait.
    Awaited,
    /// Another process's work stands still.
    Taken,
}

/// Adopts what the gang does about work that stands still.
pub fn steps() -> Steps {
    let mut gang = gang();
    gang.look();
    if gang.works && gang_cut::is_called_to_step(gang.cut, &gang.others) {
        gang.stands = gang.cut.stage != Stage::Drained;
        gang.cut = gang_cut::step(gang.cut, &gang.others);
        gang.show();
    }
    match gang.cut.stage {
        Stage::Step if gang.stands => Steps::Awaited,
        Stage::Step => Steps::Taken,
        _ => Steps::No,
    }
}

/// Work of this process stands still. If another one has drained and threads stand at its gate, the gang lets those go on a few
/// calls at a time from now on: true.
pub fn begin_steps() -> bool {
    let mut gang = gang();
    gang.look();
    let begins =
        gang.works && gang.cut.stage == Stage::Shut && gang_cut::somebody_is_behind(gang.cut, &gang.others);
    if begins {
        gang.cut = gang_cut::step(gang.cut, &gang.others);
        gang.stands = true;
        gang.show();
        tracing::debug!("work of this process waits for processes of its gang: their threads go on by steps");
    }
    begins
}

/// The stage Step is over for this process if the work that stood still has ended in all: then it drains on. Whether it is.
/// `ended`: that of this process has.
pub fn steps_are_over(ended: bool) -> bool {
    let mut gang = gang();
    gang.stands &= !ended;
    gang.show();
    gang.look();
    let called = gang_cut::is_called_to_shut(gang.cut, &gang.others);
    let over = called || !gang.stands && !gang_cut::work_stands(&gang.others);
    if over {
        gang.cut = gang_cut::shut(gang.cut, &gang.others);
        gang.show();
    }
    over
}

/// How often threads were let in by steps. A marker of all work that was made before another number is no marker of all work.
pub fn step_count() -> u64 {
    gang().steps
}

/// Lets some threads in through the shut gate, if the gang is in stage Step because of another process's work, and all memory of
/// this process is in place. The engines of the process take this back before they mark its work.
pub fn let_in(threads: u32) -> bool {
    let mut gang = gang();
    let in_place = |state| matches!(state, GpuState::Ready | GpuState::Draining);
    let may = gang.cut.stage == Stage::Step
        && !gang.stands
        && gang.order.members().all(|(_, state)| in_place(state));
    if may {
        gang.steps += 1;
        gate().let_in(threads);
    }
    may
}

/// Says whether work of this process is in flight that has not ended for long, although nothing waits at a gate.
pub fn endless(endless: bool) {
    let mut gang = gang();
    gang.endless = endless;
    gang.show();
}

/// The work that stood still has ended. Whether other processes' work still stands.
pub fn stands_no_more() -> bool {
    let mut gang = gang();
    gang.stands = false;
    gang.look();
    gang.cut = gang_cut::keep_up(gang.cut, &gang.others);
    gang.show();
    gang_cut::work_stands(&gang.others)
}

/// The process has a GPU with all memory in place. It runs if it has its other GPUs too.
pub fn ready(gpu: GpuUuid) {
    gang().set(gpu, GpuState::Ready);
}

/// The process is admitted to a GPU, and its memory comes in.
pub fn filling(gpu: GpuUuid) {
    let mut gang = gang();
    if matches!(gang.order.state(gpu), GpuState::Out | GpuState::Waiting) {
        gang.set(gpu, GpuState::Growing);
    }
}

/// Some memory on a GPU that the process has is not in place: shuts the gate.
pub fn growing(gpu: GpuUuid) {
    let mut gang = gang();
    // The gate is shut for whoever has a ticket, too.
    gang.end_step();
    match gang.order.state(gpu) {
        GpuState::Ready => gang.set(gpu, GpuState::Growing),
        GpuState::Draining | GpuState::DrainPaused => gang.set(gpu, GpuState::DrainingIncomplete),
        // A GPU that was given up gets all missing memory when it is filled again.
        _ => {}
    }
}

/// The process waits for a GPU that other clients have.
pub fn waiting(gpu: GpuUuid) {
    gang().set(gpu, GpuState::Waiting);
}

/// The process neither has a GPU nor waits for it: shuts the gate.
pub fn out(gpu: GpuUuid) {
    gang().set(gpu, GpuState::Out);
}

/// The process drains a GPU: shuts the gate; threads may still be inside. `incomplete` says that some of its memory is not in
/// place. `leaves`: the GPU's last context is being destroyed, which is no reason for the rest of the gang to stop.
pub fn drain(gpu: GpuUuid, incomplete: bool, leaves: bool) {
    let mut gang = gang();
    let stage = if incomplete { GpuState::DrainingIncomplete } else { GpuState::Draining };
    let was_ready = gang.order.state(gpu) == GpuState::Ready;
    if gang.order.set(gpu, stage) {
        gang.wake_all_but(gpu);
    }
    if was_ready && !gang.works && !leaves {
        // Shown before the others are looked at: one that begins now because this one was ready is seen here, or sees this.
        gang.show();
        gang.look();
        gang.works = gang_cut::others_work(&gang.others);
    }
    gang.look();
    if gang.works && !leaves {
        (gang.cut, gang.stands, gang.endless) = (gang_cut::shut(gang.cut, &gang.others), false, false);
    }
    // Also if it is shut already: another engine may be shutting it and not have executed its memory barrier yet.
    shut_gate();
    gang.show();
}

/// A drain that began with [`drain`] has found all work done that was marked when [`step_count`] was `steps`. The GPU is given up
/// if the other processes of the gang have drained too, or if `leaves`.
pub fn drained(gpu: GpuUuid, leaves: bool, steps: u64) -> Drained {
    let mut gang = gang();
    let drains = matches!(gang.order.state(gpu), GpuState::Draining | GpuState::DrainingIncomplete);
    if !drains || gang.steps != steps || gang.cut.stage == Stage::Step && !leaves {
        return Drained::No;
    }
    if gang.works && !leaves && gang.cut.is_shut() {
        gang.look();
        let cut = gang_cut::keep_up(gang.cut, &gang.others);
        gang.cut = Cut::new(Stage::Drained, cut.number);
        gang.show();
        // Twice, because a look reads one row after the other, and one that has drained may take that back meanwhile.
        for _ in 0..2 {
            gang.look();
            if !gang_cut::all_have_drained(gang.cut, &gang.others) {
                return Drained::OthersWork;
            }
        }
    }
    gang.stop_working();
    gang.set(gpu, GpuState::Out);
    Drained::Yes
}

/// Pauses a drain, and with it those of the process's other GPUs: the gate opens if all memory of the process is in
/// place. The caller holds the lock of this GPU's map, in which no memory is missing.
pub fn pause_drain(gpu: GpuUuid) {
    let mut gang = gang();
    gang.look();
    gang.stands = gang.cut.stage != Stage::Drained;
    gang.endless = false;
    gang.cut = gang_cut::let_go_on(gang.cut, &gang.others);
    gang.order.set(gpu, GpuState::DrainPaused);
    gang.order.pause_drains();
    gang.changed(gpu);
}

/// Whether the process may have work that uses a GPU's memory: it has the GPU, or is draining it.
pub fn has(gpu: GpuUuid) -> bool {
    !matches!(gang().order.state(gpu), GpuState::Out | GpuState::Waiting)
}

/// Whether the drain of a GPU is paused.
pub fn is_paused(gpu: GpuUuid) -> bool {
    gang().order.state(gpu) == GpuState::DrainPaused
}

/// Whether the process has a GPU with all memory in place.
pub fn is_ready(gpu: GpuUuid) -> bool {
    gang().order.state(gpu) == GpuState::Ready
}

/// See [`GangOrder::may_ask`].
pub fn may_ask(gpu: GpuUuid) -> bool {
    let mut gang = gang();
    gang.look();
    gang.order.may_ask(gpu)
}

/// See [`GangOrder::must_give_up`].
pub fn must_give_up(gpu: GpuUuid) -> bool {
    let mut gang = gang();
    gang.look();
    gang.order.must_give_up(gpu)
}

/// See [`GangOrder::waits_beyond`].
pub fn waits_beyond(gpu: GpuUuid) -> bool {
    let mut gang = gang();
    gang.look();
    gang.order.waits_beyond(gpu)
}

/// See [`GangOrder::asks_at`].
pub fn asks_at(gpu: GpuUuid) -> Option<Nanos> {
    let mut gang = gang();
    gang.look();
    gang.order.asks_at(gpu)
}

/// Whether the process may wait for long for what lets it run: see [`GangOrder::is_blocked`], or a process of its gang does not
/// answer.
pub fn is_blocked(gpu: GpuUuid) -> bool {
    let gang = gang();
    gang.order.is_blocked(gpu) || gang.seats.is_somebody_silent()
}

/// Marks the end of all work of the process so far on every GPU, because work on one may use memory of
/// another. No capture may be open.
pub fn mark() -> CompletionMarker {
    let members = gang().members.clone();
    let marks = members.iter().map(|member| member.streams.mark(member.driver));
    marks.reduce(CompletionMarker::and).unwrap_or_default()
}

/// The same although captures are open, if possible: see [`Streams::mark_beside`].
///
/// [`Streams::mark_beside`]: crate::submit::drain::Streams::mark_beside
pub fn mark_beside(before: impl Fn(CUstream) -> WorkBefore) -> Option<CompletionMarker> {
    let members = gang().members.clone();
    let marks = members.iter().map(|member| member.streams.mark_beside(member.driver, &before));
    marks
        .collect::<Option<Vec<_>>>()
        .map(|marks| marks.into_iter().reduce(CompletionMarker::and).unwrap_or_default())
}

/// Whether the second step of a marker is possible although captures are open: see [`Streams::may_mark_defaults`].
///
/// [`Streams::may_mark_defaults`]: crate::submit::drain::Streams::may_mark_defaults
pub fn may_mark_defaults() -> bool {
    let members = gang().members.clone();
    members.iter().all(|member| member.streams.may_mark_defaults(member.driver))
}
