//! Compute turns: the thread that ends the process's turns, and takes the turn from clients that do not give it up.
//!
//! The rules are in [`nvshare::turns`]. The process's threads claim the turn ([`crate::submit::turn`]); this thread looks while the
//! process has it. It charges the time, bounds the work in flight ([`crate::submit::flow`]), and ends the turn when its time is
//! over or when the process has no more work: it keeps the threads from submitting, waits for the end of the work in flight,
//! and gives the turn up. It exists only once the GPU's clients differ in their shares, and sleeps on the slot's doorbell.
//!
//! A process has no more work when all that it submitted is done and nothing was submitted for [`GRACE`] since. While a capture is
//! open nothing can be said of the work in flight; what is captured is no work, so it counts as done.
//!
//! If the work in flight does not end, others take the turn after [`nvshare::turns::PATIENCE`]. The process then goes on beside
//! them, because the work may wait for what its threads have yet to submit, and takes turns again when that work has ended:
//! the second time a second later, the third time two, and so on up to a minute.

use crate::cuda::abi::CU_STREAM_CAPTURE_MODE_RELAXED;
use crate::submit::drain::CompletionMarker;
use crate::submit::gang::{self, Member};
use crate::submit::gate::gate;
use crate::submit::turn::{self, Seat};
use crate::submit::{captures, flow};
use nvshare::shares::Priority;
use nvshare::sync::now;
use nvshare::turns::{Competition, PATIENCE, TURN};
use nvshare::units::{GpuUuid, MILLISECOND, Nanos, SECOND, format_nanos};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// After so long without a submission, and without work in flight, the process gives the turn up, in ns. A program that waits for
/// each kernel pauses for some tens of microseconds.
const GRACE: Nanos = 300_000;

/// How often it is looked whether a process that submits goes on, in ns.
const LOOK: Nanos = 200_000;

/// The interval between two looks at work in flight is the time waited so far divided by this,
const PART: Nanos = 64;
/// but no less than this, in ns, and no more than [`LOOK`] in a turn, and [`LONGEST_LOOK`] beside others.
const SHORTEST_LOOK: Nanos = 20_000;
const LONGEST_LOOK: Nanos = 5 * MILLISECOND;

/// A thread that is about to submit at the end of a turn is waited for, so long, in ns.
const LAST_SUBMISSION: Nanos = 100_000;

/// The work in flight of a process that goes on beside others, in ns.
const BESIDE: Nanos = 50 * MILLISECOND;

/// How long a process that was overdue goes on beside the others at least, in ns, if it was overdue before: twice as long each time,
const FIRST_REST: Nanos = SECOND;
/// and no longer than this, in ns.
const LONGEST_REST: Nanos = 64 * SECOND;

enum State {
    /// The process does not have the turn.
    Out,
    /// It has.
    Has,
    /// Its threads submit nothing any more, since then, ns, and its work in flight ends.
    Ends { since: Nanos },
    /// It did not give the turn up, and goes on beside the others until its work has ended, and until then, ns.
    Beside { until: Nanos },
}

struct Taker {
    member: Member,
    seat: Arc<Seat>,
    state: State,
    /// Up to when the process was charged, ns.
    charged: Nanos,
    /// Until the first submission of a turn is seen: the beginning of the turn, ns, and the gate's count of passes then.
    awaits: Option<(Nanos, u32)>,
    /// The gate's count of passes when it was last looked at, and when that had changed, ns.
    passes: u32,
    active: Nanos,
    /// The end of the work in flight, and when it was seen to have passed, ns.
    mark: Option<CompletionMarker>,
    passed: Option<Nanos>,
    priority: Priority,
    /// How long it goes on beside others the next time, ns, and when it last did.
    rest: Nanos,
    rested: Nanos,
}

struct Running {
    gpu: GpuUuid,
    member: Member,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// Whether the process takes turns, and its thread.
#[derive(Default)]
struct Turns {
    seat: Option<Arc<Seat>>,
    thread: Option<Running>,
}

static TURNS: Mutex<Turns> = Mutex::new(Turns { seat: None, thread: None });

/// Whether a client takes turns now.
fn is_wanted(member: &Member) -> bool {
    member.books.page().shares_are_set() && gang::is_alone(member.gpu)
}

/// Begins to take turns, if the clients of the GPU differ in their shares. The engine calls it before it opens the gate, and
/// whenever its doorbell has rung. It is the thread that ends it.
pub fn look(member: impl FnOnce() -> Member, page: &nvshare::Page) {
    if !page.shares_are_set() {
        return;
    }
    let member = member();
    let mut turns = nvshare::sync::lock(&TURNS);
    if !is_wanted(&member) || turns.thread.as_ref().is_some_and(|running| running.gpu != member.gpu) {
        return;
    }
    let begun = turns.seat.is_some();
    if !begun {
        let seat = Arc::new(Seat::new(member.books.clone()));
        page.begin_turns(member.books.slot(), now());
        turn::sit(&seat);
        flow::turn(Some((MILLISECOND, 0)));
        turns.seat = Some(seat);
    }
    match &turns.thread {
        // It sleeps on the doorbell that the engine woke up for, or on one that rang before there was a seat.
        Some(running) if !begun => running.member.wake_engine(),
        Some(_) => {}
        None => start(&mut turns, member),
    }
}

fn start(turns: &mut Turns, member: Member) {
    let Some(seat) = turns.seat.clone() else { return };
    let stop = Arc::new(AtomicBool::new(false));
    let (of_thread, stopped, gpu) = (member.clone(), stop.clone(), member.gpu);
    let thread = std::thread::Builder::new().name("nvshare-turns".into()).spawn(move || {
        // The application's signals are for its own threads.
        let _ = nix::sys::signal::SigSet::all().thread_set_mask();
        // It looks at intervals of tens of microseconds.
        let _ = nix::sys::prctl::set_timerslack(1_000);
        // Its calls must neither become part of a capture of another thread nor invalidate it.
        let _ = of_thread.driver.exchange_capture_mode(CU_STREAM_CAPTURE_MODE_RELAXED);
        Taker::new(of_thread, seat).run(&stopped);
    });
    match thread {
        Ok(thread) => turns.thread = Some(Running { gpu, member, stop, thread }),
        Err(error) => {
            tracing::warn!(
                %gpu,
                "weight, priority and compute limit do not hold for this process while it runs beside others: a thread could not be started: {error}. Look at ulimit -u and the control group's pids.max"
            );
            end_seat(turns);
        }
    }
}

fn end_seat(turns: &mut Turns) {
    if let Some(seat) = turns.seat.take() {
        seat.ends();
    }
    flow::turn(None);
    turn::stand_up();
}

/// The process leaves the GPU, or its engine has failed: it takes no turns any more. With `join`, its thread has ended afterwards.
pub fn end(gpu: GpuUuid, join: bool) {
    let running = {
        let mut turns = nvshare::sync::lock(&TURNS);
        let running = turns.thread.take_if(|running| running.gpu == gpu);
        if running.is_some() {
            end_seat(&mut turns);
        }
        running
    };
    let Some(Running { member, stop, thread, .. }) = running else { return };
    stop.store(true, Ordering::Release);
    member.wake_engine();
    if join && thread.join().is_err() {
        tracing::error!(%gpu, "nvshare's thread for compute turns ended with a panic; this is a bug in nvshare");
    }
}

impl Taker {
    fn new(member: Member, seat: Arc<Seat>) -> Self {
        Self {
            member,
            seat,
            state: State::Out,
            charged: 0,
            awaits: None,
            passes: 0,
            active: 0,
            mark: None,
            passed: None,
            priority: Priority::default(),
            rest: 0,
            rested: 0,
        }
    }

    fn run(&mut self, stop: &AtomicBool) {
        let books = self.member.books.clone();
        let (page, slot) = (books.page(), books.slot());
        loop {
            let seen = page.doorbell(slot);
            if stop.load(Ordering::Acquire) {
                self.set_passed();
                return page.leave_turn(slot, false);
            }
            let until = self.look(page, slot, now());
            page.wait_doorbell(slot, seen, until);
        }
    }

    /// Does what is due. Returns when to look again, ns; `None`: when the doorbell rings.
    fn look(&mut self, page: &nvshare::Page, slot: nvshare::SlotIndex, time: Nanos) -> Option<Nanos> {
        let competition = Competition::take(page);
        let has = competition.turn.holder == Some(slot);
        match self.state {
            State::Out if has => self.begin(page, slot, &competition, time),
            State::Out => self.wait(page, slot, &competition, time),
            State::Has | State::Ends { .. } if !has => {
                self.charge(page, slot, time);
                self.state = State::Out;
                Some(time)
            }
            State::Has => self.hold(page, slot, competition.turn.began, time),
            State::Ends { since } => self.end_turn(page, slot, since, time),
            State::Beside { until } => self.go_beside(page, slot, until, time),
        }
    }

    fn begin(
        &mut self,
        page: &nvshare::Page,
        slot: nvshare::SlotIndex,
        competition: &Competition,
        time: Nanos,
    ) -> Option<Nanos> {
        let priority = competition.client(slot).priority;
        if priority != std::mem::replace(&mut self.priority, priority) {
            page.enter_competition(slot, true);
        }
        let began = competition.turn.began;
        (self.charged, self.active) = (began.min(time), time);
        self.awaits = Some((began, gate().passes()));
        self.set_passed();
        self.state = State::Has;
        self.hold(page, slot, began, time)
    }

    /// The process does not have the turn.
    fn wait(
        &mut self,
        page: &nvshare::Page,
        slot: nvshare::SlotIndex,
        competition: &Competition,
        time: Nanos,
    ) -> Option<Nanos> {
        if competition.overdue.contains(slot) {
            self.begin_beside(time);
            return Some(time);
        }
        if !is_wanted(&self.member) {
            let mut turns = nvshare::sync::lock(&TURNS);
            if !is_wanted(&self.member) && turns.seat.is_some() {
                end_seat(&mut turns);
            }
            return None;
        }
        self.sit();
        competition.client(slot).claim?;
        if !self.seat.is_holding() {
            // Its threads have gone to the gate, or have ended.
            page.unclaim_turn(slot);
            self.claim_for_threads(page, slot);
            // If there is a thread after all, its claim has rung.
            return None;
        }
        page.settle_turn();
        let again = competition.look_again(slot);
        if again <= competition.now
            && competition.turn.holder != Some(slot)
            && let Some(stuck) = page.seize_turn(time)
        {
            tracing::warn!(
                gpu = %self.member.gpu,
                "the client in slot {} has not given up its compute turn for {}: this process and others go on beside it (`nvshare status` names it)",
                stuck.get(),
                format_nanos(PATIENCE)
            );
        }
        Some(again.max(time + SHORTEST_LOOK))
    }

    /// The engine may have begun anew to take turns, with another seat.
    fn sit(&mut self) {
        let turns = nvshare::sync::lock(&TURNS);
        if let Some(seat) = &turns.seat
            && !Arc::ptr_eq(seat, &self.seat)
        {
            self.seat = seat.clone();
        }
    }

    /// A thread that came while the claim was taken back relies on it.
    fn claim_for_threads(&self, page: &nvshare::Page, slot: nvshare::SlotIndex) {
        fence(Ordering::SeqCst);
        if self.seat.is_holding() {
            page.claim_turn(slot);
        }
    }

    /// The process pays from its first submission in the turn on, and not for the time until nvshare has woken up the thread that
    /// submits. If that takes longer than [`GRACE`], the process is slow.
    fn await_first_submission(&mut self, time: Nanos) {
        let Some((began, passes)) = self.awaits else { return };
        let latest = began.saturating_add(GRACE);
        let first = match self.seat.first_submission(began) {
            Some(first) => first,
            None if gate().passes() != passes => time,
            None if time >= latest => latest,
            None => return,
        };
        self.charged = self.charged.max(first.min(latest));
        self.awaits = None;
    }

    fn charge(&mut self, page: &nvshare::Page, slot: nvshare::SlotIndex, time: Nanos) {
        self.await_first_submission(time);
        if self.awaits.is_none() && time > self.charged {
            page.charge_turn(slot, time - self.charged, time);
            self.charged = time;
        }
    }

    fn set_passed(&mut self) {
        (self.mark, self.passed) = (None, None);
    }

    /// Whether all work in flight is done: since when, as far as it was seen, ns.
    fn done_since(&mut self, time: Nanos) -> Option<Nanos> {
        if self.passed.is_none() {
            if self.mark.is_none() {
                self.mark = captures::with_no_capture(gang::mark);
            }
            let look =
                |mark: &mut CompletionMarker| captures::with_no_capture(|| mark.look()).unwrap_or(true);
            if self.mark.as_mut().is_none_or(look) {
                (self.mark, self.passed) = (None, Some(time));
            }
        }
        self.passed
    }

    /// The process has the turn. Since when it has no work, as far as it was seen, ns.
    fn idle_since(&mut self, time: Nanos) -> Option<Nanos> {
        let passes = gate().passes();
        let busy = passes != self.passes || gate().occupied() || gate().waiting() > 0 || flow::is_holding();
        if busy {
            (self.passes, self.active) = (passes, time);
            self.set_passed();
            return None;
        }
        self.done_since(time)
    }

    fn hold(
        &mut self,
        page: &nvshare::Page,
        slot: nvshare::SlotIndex,
        began: Nanos,
        time: Nanos,
    ) -> Option<Nanos> {
        let idle = self.idle_since(time);
        // What it does nothing in is not charged, if it gives up the turn for it.
        self.charge(page, slot, idle.unwrap_or(time));
        let competition = Competition::take(page);
        let shut = !gate().is_open();
        if let Some(since) = idle
            && (shut || time.saturating_sub(since) >= GRACE)
        {
            page.leave_turn(slot, false);
            self.state = State::Out;
            self.claim_for_threads(page, slot);
            return Some(time);
        }
        let end = competition.turn_end(slot);
        if end <= competition.now || shut || !is_wanted(&self.member) {
            self.seat.end_turn(began);
            self.set_passed();
            self.state = State::Ends { since: time };
            return self.end_turn(page, slot, time, time);
        }
        if time.saturating_sub(began) >= TURN {
            page.renew_turn(slot);
        }
        flow::turn(Some(competition.work_in_flight(slot)));
        let look = match idle {
            Some(since) => since + GRACE,
            // Work is in flight, and nobody submits more.
            None if self.mark.is_some() => {
                time + (time.saturating_sub(self.active) / PART).clamp(SHORTEST_LOOK, LOOK)
            }
            None => time + LOOK,
        };
        Some(look.min(end))
    }

    fn end_turn(
        &mut self,
        page: &nvshare::Page,
        slot: nvshare::SlotIndex,
        since: Nanos,
        time: Nanos,
    ) -> Option<Nanos> {
        let waited = time.saturating_sub(since);
        let submitting = gate().is_open() && gate().occupied() && waited < LAST_SUBMISSION;
        if submitting || self.done_since(time).is_none() {
            self.charge(page, slot, time);
            return Some(time + (waited / PART).clamp(SHORTEST_LOOK, LONGEST_LOOK));
        }
        self.charge(page, slot, time);
        self.state = State::Out;
        let more = self.seat.is_holding();
        page.leave_turn(slot, more);
        self.claim_for_threads(page, slot);
        Some(time)
    }

    fn begin_beside(&mut self, time: Nanos) {
        if time.saturating_sub(self.rested) > 10 * self.rest.max(FIRST_REST) {
            self.rest = 0;
        }
        tracing::debug!(gpu = %self.member.gpu, "its work has not ended for a second: it goes on beside the others for {} and until that work has ended", format_nanos(self.rest));
        self.state = State::Beside { until: time + self.rest };
        self.rest = (2 * self.rest).clamp(FIRST_REST, LONGEST_REST);
        (self.charged, self.awaits) = (time, None);
        self.set_passed();
        // The end of the work so far, before its threads add more.
        let _ = self.done_since(time);
        flow::turn(Some((BESIDE, 0)));
        self.seat.go_beside(true);
    }

    fn go_beside(
        &mut self,
        page: &nvshare::Page,
        slot: nvshare::SlotIndex,
        until: Nanos,
        time: Nanos,
    ) -> Option<Nanos> {
        // Nobody knows what part of the time it had.
        self.charge(page, slot, time);
        if self.done_since(time).is_none() || time < until {
            return Some(time + LONGEST_LOOK);
        }
        self.rested = time;
        self.state = State::Out;
        self.seat.go_beside(false);
        page.no_longer_overdue(slot);
        self.claim_for_threads(page, slot);
        Some(time)
    }
}
