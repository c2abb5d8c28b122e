//! Giving way, that is, draining: the engine shuts the gate and waits for the work in flight. If the work does not end because
//! it waits for threads at the gate, the engine opens the gate again and drains later ([`nvshare::drain_backoff`]).
//!
//! ```text
//!               no capture is open,
//!               or one is for long         no work ends, and threads wait at the gate
//!   Capturing ─────────────────────▶ Shut ────────────────────────────────────────────▶ Paused
//!       ▲                           │   ▲                                                 │
//!       └──── a capture begins ─────┘   └────────────── that work has ended ──────────────┘
//!                                   └──▶ all work is done: the client has drained
//! ```
//!
//! All memory stays in place until the end, so the gate can be opened at any time. The engine polls, and sleeps
//! on its doorbell in between, so it does its other tasks meanwhile and never blocks here without a bound.
//!
//! The engine waits for an open capture, because most end soon. A capture that stays open may be waiting for another process
//! or for a user. Then the client drains beside it, if all work in flight can be marked without invalidating the capture
//! ([`captures::mark_beside_captures`]).
//!
//! A process drains each of its GPUs separately, and each drain waits for the work on all of them. So a drain that is
//! paused pauses the others ([`gang::pause_drain`]).
//!
//! The processes of a gang drain together: none gives its GPUs up before all have drained, and a drain that stands still while
//! threads wait at any of their gates pauses those of all ([`nvshare::gang_cut`]).
//!
//! While a drain is paused, memory that is allocated lies in host memory if there is no room, so that the gate stays open.

use crate::process::engine::Engine;
use crate::settings::settings;
use crate::submit::captures::{self, CaptureHold};
use crate::submit::drain::CompletionMarker;
use crate::submit::gang::{Drained, Steps};
use crate::submit::gate::gate;
use crate::submit::{flow, gang};
use nvshare::drain_backoff::DrainBackoff;
use nvshare::page::Stall;
use nvshare::sync::now;
use nvshare::units::{MILLISECOND, Nanos, SECOND, format_nanos};

/// The interval between two polls of work in flight is the time waited so far divided by this,
const PART: Nanos = 64;
/// but no less than this, because a poll takes a microsecond or two,
const SHORTEST_POLL_INTERVAL: Nanos = 20_000;
/// no more than this during the first [`USUAL`] of a drain,
const USUAL_POLL_INTERVAL: Nanos = MILLISECOND / 4;
const USUAL: Nanos = 100 * MILLISECOND;
/// and no more than this later.
const LONGEST_POLL_INTERVAL: Nanos = 10 * MILLISECOND;

/// Work that has not ended for so long is reported as endless, and a capture as open for long.
const LONG: Nanos = 2 * SECOND;

/// How long the engine waits for an open capture, from its beginning, before it tries to drain beside it.
const CAPTURE_WAIT: Nanos = SECOND;

/// How long flow control does not limit threads that a paused drain has let in: the submission for which the work waits may
/// come after many others.
const FREE: Nanos = 50 * MILLISECOND;

/// How long a process of a gang waits without progress before those that have drained go on by steps, ns. Short, because steps
/// of no use cost nothing: the GPUs of those that have drained are idle.
const GANG_STAND: Nanos = 5 * MILLISECOND;

/// How long a step takes at least, ns: time for threads that were let in to submit, and for another process to see that its work
/// has ended.
const STEP: Nanos = MILLISECOND;

/// The most threads that go in at one step. The number doubles from 1 with each step.
const MOST_STEPS: u32 = 64;

/// How long a gang goes on by steps before all its gates open, ns.
const STEPS_TIMEOUT: Nanos = SECOND / 2;

/// After so long a drain says in the log what it waits for, ns.
const TOLD_AFTER: Nanos = 10 * SECOND;

/// A drain in progress.
pub struct GivingWay {
    /// The client is expected to have more work.
    more: bool,
    /// The last context is being destroyed, so captures need not be protected any more.
    leaves: bool,
    /// When the drain began, ns.
    began: Nanos,
    /// How long the slice was, ns.
    ran: Nanos,
    backoff: DrainBackoff,
    state: State,
    /// The log says why it takes so long.
    told: bool,
}

enum State {
    /// Waiting for a capture to end; the gate is open.
    Capturing {
        hold: CaptureHold,
        since: Nanos,
    },
    Shut(Shut),
    Paused(Paused),
}

/// The gate is shut.
struct Shut {
    /// Captures may be open.
    beside_captures: bool,
    /// When some work was last seen to end, or else when the gate was shut, ns.
    progress: Nanos,
    /// Since when threads wait at the gate, ns.
    standing: Option<Nanos>,
    /// The process has drained: since when threads wait, and another process of the gang does not answer, ns.
    absent: Option<Nanos>,
    /// The end of all work; made when no thread is inside the gate.
    mark: Option<CompletionMarker>,
    /// How much of the marked work was left at the last poll ([`CompletionMarker::left`]).
    left: usize,
    /// The gang lets threads go on a few calls at a time.
    step: Option<GangStep>,
    /// [`gang::step_count`] when the mark was made.
    steps: u64,
}

/// What is known of a gang's stage Step.
struct GangStep {
    /// When it began, ns.
    since: Nanos,
    /// How many threads may go in at the next step.
    threads: u32,
    /// When threads were last let in, ns, until the work that they have submitted is marked.
    let_in: Option<Nanos>,
    /// When the work of the last step was seen to have ended, ns.
    ended: Option<Nanos>,
}

/// The gate is open again for a while.
struct Paused {
    /// Since when it is open, ns.
    since: Nanos,
    /// It is not shut again before this time, ns.
    until: Nanos,
    /// The work that did not end. `None` if a capture has prevented marking it so far.
    mark: Option<CompletionMarker>,
    /// How long after the gate was opened that work ended, ns.
    ended: Option<Nanos>,
}

/// The result of a poll.
pub enum Look {
    Drained,
    /// Poll again at this time, ns, or when the doorbell rings.
    Again(Nanos),
}

fn again(since: Nanos, time: Nanos) -> Look {
    let waited = time.saturating_sub(since);
    let longest = if waited < USUAL { USUAL_POLL_INTERVAL } else { LONGEST_POLL_INTERVAL };
    Look::Again(time + (waited / PART).clamp(SHORTEST_POLL_INTERVAL, longest))
}

impl GivingWay {
    /// Drops the markers, because the context in which they were made is being destroyed; they are made again.
    pub(super) fn drop_markers(&mut self) {
        match &mut self.state {
            State::Capturing { .. } => {}
            State::Shut(shut) => (shut.mark, shut.left) = (None, usize::MAX),
            State::Paused(paused) => paused.mark = None,
        }
    }
}

impl Engine {
    /// Begins a drain. If the client has `more` work, it asks for the GPU again right after it.
    pub(super) fn give_way(&mut self, more: bool) {
        self.client.paused_beside_nobody(self.idle.take_unused());
        let ran = self.client.drain();
        self.begin_giving_way(more, ran, false);
        if let Look::Drained = self.look_drained() {
            self.gave_way();
        }
    }

    /// Drains because the last context is being destroyed, and waits until that is done. The drain may still pause.
    pub(super) fn drain_for_good(&mut self) {
        if !gang::has(self.device.gpu) {
            // Already drained, or it has never run.
            return gang::out(self.device.gpu);
        }
        self.begin_giving_way(false, 0, true);
        loop {
            let seen = self.page().doorbell(self.slot());
            match self.look_drained() {
                Look::Drained => break,
                Look::Again(until) => self.page().wait_doorbell(self.slot(), seen, Some(until)),
            }
        }
        self.giving_way = None;
        self.host_shortage.drain_stall_ends(&self.device);
    }

    fn begin_giving_way(&mut self, more: bool, ran: Nanos, leaves: bool) {
        let time = now();
        let backoff = DrainBackoff::new(self.page().settings().drain_target, 0);
        let state = self.shut(leaves);
        self.giving_way = Some(GivingWay { more, leaves, began: time, ran, backoff, state, told: false });
        self.foresee();
    }

    /// Shuts the gate, if no capture is open.
    fn shut(&mut self, leaves: bool) -> State {
        let hold = CaptureHold::begin();
        if !leaves && hold.is_broken() {
            return State::Capturing { hold, since: now() };
        }
        self.shut_gate(false, leaves)
    }

    fn shut_gate(&mut self, beside_captures: bool, leaves: bool) -> State {
        let since = now();
        {
            // Under the map's lock, because an allocation without room may be shutting the gate at the same time.
            let memory = self.device.memory();
            gang::drain(self.device.gpu, memory.is_missing(), leaves);
        }
        flow::end(self.device.gpu);
        State::Shut(Shut {
            beside_captures,
            progress: since,
            standing: None,
            absent: None,
            mark: None,
            left: usize::MAX,
            step: None,
            steps: gang::step_count(),
        })
    }

    fn foresee(&mut self) {
        let target = self.page().settings().drain_target;
        if let Some(GivingWay { state: State::Shut(_), backoff, .. }) = &mut self.giving_way {
            backoff.foresee(target, flow::foreseen(now()));
        }
    }

    /// Opens the gate again. Memory that was allocated meanwhile is mapped to host memory first; false if the host has not
    /// enough, so that the gate stays shut.
    fn open_again(&mut self) -> bool {
        let mut memory = self.device.memory();
        if memory.is_missing() {
            if let Err(error) = self.device.back_all_by_host(&mut memory) {
                tracing::debug!(gpu = %self.device.gpu, "a drain cannot be paused, so the gate stays shut: {error}");
            }
            if memory.is_missing() {
                return false;
            }
        }
        memory.open = true;
        gang::pause_drain(self.device.gpu);
        true
    }

    /// Polls the drain, and takes the steps that are due.
    pub(super) fn look_drained(&mut self) -> Look {
        loop {
            let Some(mut giving_way) = self.giving_way.take() else { return Look::Again(Nanos::MAX) };
            self.tell(&mut giving_way);
            let looked = match &mut giving_way.state {
                State::Capturing { hold, since } => self.look_at_captures(hold, *since),
                State::Shut(shut) => {
                    let (stand, leaves) = (giving_way.backoff.stand(), giving_way.leaves);
                    self.look_at_work(shut, stand, leaves)
                }
                State::Paused(paused) => self.look_at_pause(paused, &mut giving_way.backoff),
            };
            match looked {
                Step::Look(look) => {
                    self.giving_way = Some(giving_way);
                    return look;
                }
                Step::Shut => {
                    giving_way.state = self.shut(giving_way.leaves);
                    self.giving_way = Some(giving_way);
                    self.foresee();
                }
                Step::ShutBesideCaptures => {
                    // The gate is shut before the hold, which keeps new captures from beginning, ends.
                    giving_way.state = self.shut_gate(true, giving_way.leaves);
                    tracing::debug!(gpu = %self.device.gpu, "a capture stays open: draining beside it");
                    self.giving_way = Some(giving_way);
                    self.foresee();
                }
                Step::Capture => {
                    giving_way.state = State::Capturing { hold: CaptureHold::begin(), since: now() };
                    self.giving_way = Some(giving_way);
                }
                Step::Pause(mark) => {
                    let time = now();
                    let until = time + giving_way.backoff.pause();
                    giving_way.state = State::Paused(Paused { since: time, until, mark, ended: None });
                    self.device.books.drain_retried();
                    tracing::debug!(
                        gpu = %self.device.gpu,
                        "the work in flight has not ended after {}, and threads wait to submit more: they go on, and the drain is tried again",
                        format_nanos(giving_way.backoff.stand())
                    );
                    self.giving_way = Some(giving_way);
                }
            }
        }
    }

    /// Says once what a drain waits for that takes very long.
    fn tell(&self, giving_way: &mut GivingWay) {
        let took = now().saturating_sub(giving_way.began);
        if giving_way.told || took < TOLD_AFTER {
            return;
        }
        giving_way.told = true;
        let missing = self.device.memory().is_missing();
        let stage = match &giving_way.state {
            State::Capturing { .. } => "waits for a capture to end",
            State::Shut(Shut { mark: None, .. }) => "waits until no thread is inside a call",
            State::Shut(_) => "waits for the work in flight",
            State::Paused(_) => "lets threads go on for work that does not end without them",
        };
        tracing::warn!(
            gpu = %self.device.gpu,
            "has not been able to give the GPU up for {}: it {stage}{}. {}",
            format_nanos(took),
            if missing { ", and memory that was allocated meanwhile is not in place" } else { "" },
            gang::describe()
        );
    }

    fn look_at_captures(&mut self, hold: &CaptureHold, since: Nanos) -> Step {
        let time = now();
        if !hold.is_broken() {
            self.host_shortage.drain_stall_ends(&self.device);
            return Step::Shut;
        }
        let open_since = captures::latest_capture().map_or(since, |latest| latest.min(since));
        let beside = open_since + CAPTURE_WAIT;
        if time < beside {
            // The end of a capture rings the doorbell.
            return Step::Look(Look::Again(beside));
        }
        if captures::mark_beside_captures().is_some() {
            return Step::ShutBesideCaptures;
        }
        if time.saturating_sub(since) >= LONG {
            self.device.books.stalled(Stall::OpenCapture);
        }
        Step::Look(Look::Again(time + CAPTURE_WAIT))
    }

    fn look_at_work(&mut self, shut: &mut Shut, stand: Nanos, leaves: bool) -> Step {
        if gang::is_paused(self.device.gpu) {
            // The drain of another GPU of the process was paused.
            return Step::Pause(shut.mark.take());
        }
        if !leaves && gang::is_called_to_pause() && self.open_again() {
            // Work of another process of the gang stands still.
            return Step::Pause(shut.mark.take());
        }
        let time = now();
        if !leaves && let Some(look) = self.look_at_steps(shut, time) {
            return Step::Look(look);
        }
        self.forget_old_mark(shut);
        if shut.mark.is_none() && gate().vacated(time) {
            shut.mark = match (leaves, shut.beside_captures) {
                (true, _) => Some(gang::mark()),
                (false, true) => captures::mark_beside_captures(),
                (false, false) => captures::with_no_capture(gang::mark),
            };
            if shut.mark.is_none() && self.open_again() {
                // A capture began before the gate was shut, or one is open beside which no marker can be made.
                return Step::Capture;
            }
        }
        if let Some(mark) = &mut shut.mark {
            let looked =
                if shut.beside_captures { captures::look_beside_captures(mark) } else { Some(mark.look()) };
            if looked == Some(true) {
                match self.is_drained(mark, leaves, shut.steps) {
                    Drained::Yes => return Step::Look(Look::Drained),
                    Drained::OthersWork => return self.look_at_absent(shut, stand, time),
                    Drained::No => {}
                }
            }
            if looked.is_none() && self.open_again() {
                return Step::Capture;
            }
            if mark.left() < shut.left {
                (shut.left, shut.progress) = (mark.left(), time);
            }
        }
        if !leaves && time.saturating_sub(shut.progress) >= GANG_STAND && gang::begin_steps() {
            return Step::Look(Look::Again(time + STEP));
        }
        if gate().waiting() == 0 && !gang::others_want() {
            shut.standing = None;
            if time.saturating_sub(shut.progress) >= LONG {
                self.device.books.stalled(Stall::EndlessWork);
                gang::endless(true);
            }
        } else {
            let standing = (*shut.standing.get_or_insert(time)).max(shut.progress);
            if time.saturating_sub(standing) >= stand {
                self.device.books.stalled(Stall::DrainAwaitsSubmission);
                if self.open_again() {
                    return Step::Pause(shut.mark.take());
                }
            }
        }
        Step::Look(again(shut.progress, time))
    }

    /// The process has drained, and others of its gang have not. If threads wait, and one of the others neither drains nor answers,
    /// the threads go on: that other process may wait in a call of the driver for what they submit.
    fn look_at_absent(&mut self, shut: &mut Shut, stand: Nanos, time: Nanos) -> Step {
        let waited_for = (gate().waiting() > 0 || gang::others_want()) && gang::is_somebody_absent();
        if !waited_for {
            shut.absent = None;
        } else if time.saturating_sub(*shut.absent.get_or_insert(time)) >= stand + STEPS_TIMEOUT
            && gang::cut_anew()
        {
            self.device.books.stalled(Stall::DrainAwaitsSubmission);
            if self.open_again() {
                return Step::Pause(shut.mark.take());
            }
        }
        // Whoever drains rings, and so does whoever lets its threads go on.
        Step::Look(Look::Again(time + LONGEST_POLL_INTERVAL))
    }

    /// Takes part in the gang's stage Step, if it is in one. `None`: go on as usual.
    fn look_at_steps(&mut self, shut: &mut Shut, time: Nanos) -> Option<Look> {
        let steps = gang::steps();
        if steps == Steps::No {
            if shut.step.take().is_some() {
                Self::end_step(shut);
            }
            return None;
        }
        let step = shut.step.get_or_insert(GangStep { since: time, threads: 1, let_in: None, ended: None });
        let of_no_use = time.saturating_sub(step.since) >= STEPS_TIMEOUT;
        if let Some(since) = step.let_in {
            if time < since + STEP {
                return Some(Look::Again(since + STEP));
            }
            (step.let_in, step.ended) = (None, None);
            Self::end_step(shut);
        }
        self.forget_old_mark(shut);
        if shut.mark.is_none() && gate().vacated(time) {
            shut.mark = captures::with_no_capture(gang::mark);
        }
        let done =
            shut.mark.as_mut().is_some_and(|mark| captures::with_no_capture(|| mark.look()) == Some(true));
        if gang::steps_are_over(done) {
            shut.step = None;
            Self::end_step(shut);
            shut.progress = time;
            return None;
        }
        if of_no_use {
            // All gates open after a while.
            return None;
        }
        let step = shut.step.as_mut()?;
        if done && steps == Steps::Taken && gate().waiting() > 0 {
            // The work of another process that waited for this step's ends at the same time, which that one sees a moment later.
            if time >= *step.ended.get_or_insert(time) + STEP && gang::let_in(step.threads) {
                (step.let_in, step.threads) = (Some(time), (2 * step.threads).min(MOST_STEPS));
            }
        }
        Some(Look::Again(time + STEP / 2))
    }

    /// Drops a mark that was made before threads were let in by a step of this engine or of another one of the process.
    fn forget_old_mark(&self, shut: &mut Shut) {
        let steps = gang::step_count();
        if steps != shut.steps {
            gate().let_nobody_in();
            (shut.mark, shut.left, shut.steps) = (None, usize::MAX, steps);
        }
    }

    /// Lets no more threads in, and has the work marked that they have submitted.
    fn end_step(shut: &mut Shut) {
        gate().let_nobody_in();
        (shut.mark, shut.left) = (None, usize::MAX);
    }

    /// Whether the client has drained, now that the marked work is done: another engine may have let threads in.
    fn is_drained(&mut self, mark: &CompletionMarker, leaves: bool, steps: u64) -> Drained {
        if let Some(result) = mark.broken() {
            // The context is broken, which the application learns from its own calls. There is no work left to
            // wait for, and the memory can be evicted.
            tracing::debug!(gpu = %self.device.gpu, "a context is broken, so its work counts as drained: {result}");
        }
        // Under the map's lock, so that memory allocated from now on is not mapped.
        let mut memory = self.device.memory();
        let drained = gang::drained(self.device.gpu, leaves, steps);
        if drained == Drained::Yes {
            memory.open = false;
        }
        drained
    }

    fn look_at_pause(&mut self, paused: &mut Paused, backoff: &mut DrainBackoff) -> Step {
        let (time, gpu) = (now(), self.device.gpu);
        let open = gang::is_paused(gpu) && gate().is_open();
        if paused.mark.is_none() {
            paused.mark = captures::with_no_capture(gang::mark);
        }
        let went_on = time.saturating_sub(paused.since);
        // Only what is marked already: an event in the legacy stream would now block work that threads submit.
        let mark = paused.mark.as_mut();
        if mark.is_some_and(CompletionMarker::has_passed) {
            paused.ended.get_or_insert(went_on);
        }
        if !open || (paused.mark.is_none() && went_on >= LONG) || gang::is_called_to_drain() {
            // An allocation found no room, another GPU is being given up, a capture has prevented marking for long, or the
            // work that stood still in another process of the gang has ended.
            return Step::Shut;
        }
        if let Some(took) = paused.ended {
            self.device.books.stalled(Stall::DrainAwaitsSubmission);
            if gang::stands_no_more() || went_on < LONG && gang::is_somebody_absent() {
                // The last process of the gang whose work stands still calls all to drain.
                return Step::Look(Look::Again(time + LONGEST_POLL_INTERVAL));
            }
            if time < paused.until {
                return Step::Look(Look::Again(paused.until));
            }
            backoff.ended(took);
            return Step::Shut;
        }
        if went_on >= LONG {
            self.device.books.stalled(Stall::EndlessWork);
            gang::endless(true);
        }
        if went_on >= FREE {
            self.keep_pace(paused.since);
        }
        Step::Look(again(paused.since, time))
    }

    /// Limits the submissions of threads that run during a paused drain, so that they do not make it longer.
    fn keep_pace(&self, since: Nanos) {
        let target = self.page().settings().drain_target;
        if target > 0 && settings().is_ok_and(|settings| settings.flow_control) {
            flow::limit(self.device.gpu, Some(since), target);
        }
    }

    /// Ends a paused drain if no other client needs this one's memory any more: the client runs on. False if not.
    pub(super) fn resume_if_not_needed(&mut self) -> bool {
        let gpu = self.device.gpu;
        let paused = matches!(&self.giving_way, Some(GivingWay { state: State::Paused(_), .. }));
        if !paused || self.client.is_needed() || gang::must_give_up(gpu) || gang::others_are_needed() {
            return false;
        }
        tracing::debug!(%gpu, "the drain is given up: the work did not end, and no other process waits for the GPU any more");
        self.giving_way = None;
        self.host_shortage.drain_stall_ends(&self.device);
        // If the drain was to move memory from the host back to the GPU, that is tried again after a longer pause.
        let rest = self.returns.1;
        self.returns = (now() + rest, (2 * rest).min(super::RETURN_PAUSE));
        self.client.resume();
        true
    }

    /// The client has drained: other clients may run.
    pub(super) fn gave_way(&mut self) {
        let Some(GivingWay { more, began, ran, .. }) = self.giving_way.take() else { return };
        self.host_shortage.drain_stall_ends(&self.device);
        let (drained, gpu) = (now(), self.device.gpu);
        let took = drained - began;
        // The numbers are for programs: what came when, and how long it was.
        tracing::debug!(
            %gpu, at_ns = began, ran_ns = ran, drained_ns = took,
            "drained in {} after a slice of {}", format_nanos(took), format_nanos(ran)
        );
        self.drained_at = drained;
        self.returns = (0, super::OVERFLOW_POLL_INTERVAL);
        flow::drained();
        self.swap.quiet = true;
        crate::async_pool::drained(&self.device);
        let more = more || gate().waiting() > 0;
        // Whoever gave way because it is blocked would be the next one again, because it has not run.
        let may_ask = gang::may_ask(gpu)
            && self.host_shortage.asks_at().is_none()
            && !self.leaves_it_to_others()
            && !self.client.is_paused();
        self.client.drained(more && may_ask);
    }
}

/// The next step of a drain.
enum Step {
    /// None: poll again later.
    Look(Look),
    /// Wait for the end of a capture.
    Capture,
    /// Shut the gate and wait for the work.
    Shut,
    /// The same, although a capture is open.
    ShutBesideCaptures,
    /// The gate is open again, until the work before this marker has ended.
    Pause(Option<CompletionMarker>),
}
