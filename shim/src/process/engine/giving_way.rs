//! Giving way: the gate is shut, the work in flight is waited for, and if it does not end because it waits for threads
//! at the gate, the gate opens again and all that is tried later ([`nvshare::drain_backoff`]).
//!
//! ```text
//!               no capture is open,
//!               or one is for long         nothing ends, and threads stand at the gate
//!   Capturing ─────────────────────▶ Shut ────────────────────────────────────────────▶ Paused
//!       ▲                           │   ▲                                                 │
//!       └────── one has begun ──────┘   └─────────── what stood still has ended ──────────┘
//!                                   └──▶ all is done: the client has drained
//! ```
//!
//! All memory is in place until the end, so nothing is lost by opening the gate. The engine looks again and again, and sleeps
//! on its doorbell in between: whatever else it has to do is done meanwhile, and nothing here waits without a bound.
//!
//! A capture that is open is waited for, since most end soon. One that stays open may wait for another process, or for a person;
//! then the client drains beside it, if all work in flight can be told without ruining the capture
//! ([`captures::mark_beside_captures`]).
//!
//! A process drains each of its GPUs by itself, and for each waits for the work on all of them. So one drain that is
//! put off puts off the others ([`gang::pause_drain`]).

use crate::process::engine::Engine;
use crate::settings::settings;
use crate::submit::captures::{self, CaptureHold};
use crate::submit::drain::CompletionMarker;
use crate::submit::gate::gate;
use crate::submit::{flow, gang};
use nvshare::drain_backoff::DrainBackoff;
use nvshare::page::Stall;
use nvshare::sync::now;
use nvshare::units::{MILLISECOND, Nanos, SECOND, format_nanos};

/// Between two looks at work in flight, a part of the time that it has been waited for already,
const PART: Nanos = 64;
/// and no less than this: a look takes a microsecond or two.
const SHORTEST_POLL_INTERVAL: Nanos = 20_000;
/// No drain that is within its target ends later for it than by this,
const USUAL_POLL_INTERVAL: Nanos = MILLISECOND / 4;
const USUAL: Nanos = 100 * MILLISECOND;
/// and one that takes long, by this.
const LONGEST_POLL_INTERVAL: Nanos = 10 * MILLISECOND;

/// Work that has not ended for so long is said to be endless, and a capture to be open for long.
const LONG: Nanos = 2 * SECOND;

/// A capture is waited for until it has been open for so long, if the client can drain beside it.
const CAPTURE_WAIT: Nanos = SECOND;

/// Threads that were let in keep no pace for so long: what the work waits for may come after many submissions.
const FREE: Nanos = 50 * MILLISECOND;

/// A client that gives way.
pub struct GivingWay {
    /// It has more to do, as far as anybody knows.
    more: bool,
    /// Its last context goes, and captures are no matter any more.
    leaves: bool,
    began: Nanos,
    ran: Nanos,
    backoff: DrainBackoff,
    state: State,
}

enum State {
    /// A capture is open, and the gate too.
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
    /// When something was last seen to end, or the gate was shut.
    progress: Nanos,
    /// Since when threads stand before it.
    standing: Option<Nanos>,
    /// The end of all work, once nobody is inside.
    mark: Option<CompletionMarker>,
    left: usize,
}

/// The gate is open, for a while.
struct Paused {
    since: Nanos,
    /// It is not shut again before.
    until: Nanos,
    /// What stood still. `None` if a capture forbade to mark it as yet.
    mark: Option<CompletionMarker>,
    /// It has ended, so long after threads went on, ns.
    ended: Option<Nanos>,
}

/// What comes of a look.
pub enum Look {
    Drained,
    /// Look again at this time, ns, or when the doorbell rings.
    Again(Nanos),
}

fn again(since: Nanos, time: Nanos) -> Look {
    let waited = time.saturating_sub(since);
    let longest = if waited < USUAL { USUAL_POLL_INTERVAL } else { LONGEST_POLL_INTERVAL };
    Look::Again(time + (waited / PART).clamp(SHORTEST_POLL_INTERVAL, longest))
}

impl GivingWay {
    /// The context in which the marks were made goes: make them anew.
    pub(super) fn drop_markers(&mut self) {
        match &mut self.state {
            State::Capturing { .. } => {}
            State::Shut(shut) => (shut.mark, shut.left) = (None, usize::MAX),
            State::Paused(paused) => paused.mark = None,
        }
    }
}

impl Engine {
    /// Begins to give way. With `more` to do it asks for the GPU again at once.
    pub(super) fn give_way(&mut self, more: bool) {
        let ran = self.client.drain();
        self.begin_giving_way(more, ran, false);
        if let Look::Drained = self.look_drained() {
            self.gave_way();
        }
    }

    /// The last context goes: waits until all work is done, and lets threads go on in between as ever.
    pub(super) fn drain_for_good(&mut self) {
        if !gang::has(self.device.gpu) {
            // It has drained, or never run.
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
        self.giving_way = Some(GivingWay { more, leaves, began: time, ran, backoff, state });
        self.foresee();
    }

    /// Shuts the gate, if no capture is open.
    fn shut(&mut self, leaves: bool) -> State {
        let hold = CaptureHold::begin();
        if !leaves && hold.is_broken() {
            return State::Capturing { hold, since: now() };
        }
        self.shut_gate(false)
    }

    fn shut_gate(&mut self, beside_captures: bool) -> State {
        let since = now();
        {
            // Under the map's lock: an allocation may shut the gate meanwhile, and have its memory missing (I2).
            let memory = self.device.memory();
            gang::drain(self.device.gpu, memory.is_missing());
        }
        flow::end(self.device.gpu);
        State::Shut(Shut { beside_captures, progress: since, standing: None, mark: None, left: usize::MAX })
    }

    fn foresee(&mut self) {
        let target = self.page().settings().drain_target;
        if let Some(GivingWay { state: State::Shut(_), backoff, .. }) = &mut self.giving_way {
            backoff.foresee(target, flow::foreseen(now()));
        }
    }

    /// Lets threads in again: all memory is in place, if need be in host memory. False if the host has none for what was
    /// allocated meanwhile.
    fn open_again(&mut self) -> bool {
        let mut memory = self.device.memory();
        if memory.is_missing() {
            if let Err(error) = self.device.back_all_by_host(&mut memory) {
                tracing::debug!(gpu = %self.device.gpu, "the gate stays shut in the middle of a drain: {error}");
            }
            if memory.is_missing() {
                return false;
            }
        }
        memory.open = true;
        gang::pause_drain(self.device.gpu);
        true
    }

    /// Looks how far it has come with giving way, and does what is due.
    pub(super) fn look_drained(&mut self) -> Look {
        loop {
            let Some(mut giving_way) = self.giving_way.take() else { return Look::Again(Nanos::MAX) };
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
                    // Before the hold ends that kept new captures from beginning.
                    giving_way.state = self.shut_gate(true);
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

    fn look_at_captures(&mut self, hold: &CaptureHold, since: Nanos) -> Step {
        let time = now();
        if !hold.is_broken() {
            self.host_shortage.drain_stall_ends(&self.device);
            return Step::Shut;
        }
        let open_since = captures::latest_capture().map_or(since, |latest| latest.min(since));
        let beside = open_since + CAPTURE_WAIT;
        if time < beside {
            // The end of a capture rings.
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
            // Another GPU's drain stood still.
            return Step::Pause(shut.mark.take());
        }
        let time = now();
        if shut.mark.is_none() && gate().vacated(time) {
            shut.mark = match (leaves, shut.beside_captures) {
                (true, _) => Some(gang::mark()),
                (false, true) => captures::mark_beside_captures(),
                (false, false) => captures::with_no_capture(gang::mark),
            };
            if shut.mark.is_none() && self.open_again() {
                // A capture has begun before the gate was shut, or is one beside which nothing can be marked.
                return Step::Capture;
            }
        }
        if let Some(mark) = &mut shut.mark {
            let looked =
                if shut.beside_captures { captures::look_beside_captures(mark) } else { Some(mark.look()) };
            if looked == Some(true) && self.is_drained(mark) {
                return Step::Look(Look::Drained);
            }
            if looked.is_none() && self.open_again() {
                return Step::Capture;
            }
            if mark.left() < shut.left {
                (shut.left, shut.progress) = (mark.left(), time);
            }
        }
        if gate().waiting() == 0 {
            shut.standing = None;
            if time.saturating_sub(shut.progress) >= LONG {
                self.device.books.stalled(Stall::EndlessWork);
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

    /// All that was marked is done. Whether the client has drained: threads may have been let in by another engine.
    fn is_drained(&mut self, mark: &CompletionMarker) -> bool {
        if let Some(result) = mark.broken() {
            // The application's own calls will tell it: its context is broken. There is no work left to
            // wait for, and its memory can go.
            tracing::debug!(gpu = %self.device.gpu, "while draining: {result}");
        }
        // Under the map's lock: what is allocated from now on is not to be mapped.
        let mut memory = self.device.memory();
        let drained = gang::drained(self.device.gpu);
        if drained {
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
        // No more than what was marked already: an event in the legacy stream, now, would keep others out.
        let mark = paused.mark.as_mut();
        if mark.is_some_and(CompletionMarker::has_passed) {
            paused.ended.get_or_insert(went_on);
        }
        if !open || (paused.mark.is_none() && went_on >= LONG) {
            // An allocation found no room, or another GPU is given up, or a capture forbids to know any more.
            return Step::Shut;
        }
        if let Some(took) = paused.ended {
            self.device.books.stalled(Stall::DrainAwaitsSubmission);
            if time < paused.until {
                return Step::Look(Look::Again(paused.until));
            }
            backoff.ended(took);
            return Step::Shut;
        }
        if went_on >= LONG {
            self.device.books.stalled(Stall::EndlessWork);
        }
        if went_on >= FREE {
            self.keep_pace(paused.since);
        }
        Step::Look(again(paused.since, time))
    }

    /// Threads that go on in the middle of a drain keep the pace, so that they don't make it longer.
    fn keep_pace(&self, since: Nanos) {
        let target = self.page().settings().drain_target;
        if target > 0 && settings().is_ok_and(|settings| settings.flow_control) {
            flow::limit(self.device.gpu, Some(since), target);
        }
    }

    /// Nobody needs what it has any more: it runs on, if it can run.
    pub(super) fn resume_if_not_needed(&mut self) -> bool {
        let gpu = self.device.gpu;
        let paused = matches!(&self.giving_way, Some(GivingWay { state: State::Paused(_), .. }));
        if !paused || self.client.is_needed() || gang::must_give_up(gpu) {
            return false;
        }
        tracing::debug!(%gpu, "its work did not end, and nobody waits for it any more: going on");
        self.giving_way = None;
        self.host_shortage.drain_stall_ends(&self.device);
        // If it was for the sake of what lies in host memory, that is tried again, and more and more seldom.
        let rest = self.comes_home.1;
        self.comes_home = (now() + rest, (2 * rest).min(super::COMES_HOME_REST));
        self.client.resume();
        true
    }

    /// It has drained: lets others run.
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
        self.comes_home = (0, super::OVERFLOW_POLL_INTERVAL);
        flow::drained();
        self.swap.quiet = true;
        crate::async_pool::drained(&self.device);
        let more = more || gate().waiting() > 0;
        let may_ask = gang::may_ask(gpu) && self.host_shortage.asks_at().is_none();
        self.client.drained(more && may_ask);
    }
}

/// What a look leads to.
enum Step {
    Look(Look),
    /// Wait for the end of a capture.
    Capture,
    /// Shut the gate, and try.
    Shut,
    /// The same, although a capture is open.
    ShutBesideCaptures,
    /// The gate is open again, behind this mark if there is one.
    Pause(Option<CompletionMarker>),
}
