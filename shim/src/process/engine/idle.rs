//! Whether a holder makes use of its GPU while somebody else needs it, and how long its pauses are.
//!
//! A holder pauses when all its work has ended and no thread has passed the gate since. The engine finds that out by looking
//! at the gate's count of passes and at a marker of the end of all work, every few milliseconds, and only while the GPU is
//! needed: a launch tells nobody anything. How long a pause is worth waiting for is [`Pauses::worth_waiting`].

use super::{Engine, Turn};
use crate::submit::captures;
use crate::submit::drain::CompletionMarker;
use crate::submit::gate::gate;
use crate::submit::{flow, gang};
use nvshare::pauses::Pauses;
use nvshare::policy;
use nvshare::sync::now;
use nvshare::units::{MILLISECOND, Nanos, format_nanos};

/// What a holder makes of its GPU while somebody needs it.
pub(super) enum Use {
    /// Nothing.
    Idle,
    /// It works, or may, or pauses for a while; look again at this time, ns.
    Look(Nanos),
    /// It holds it for when it has its other GPUs too.
    Kept,
}

/// What is known of a holder's work.
#[derive(Default)]
pub(super) struct Idle {
    /// The gate's count when it was last looked at, and when that was.
    passes: u32,
    looked: Nanos,
    /// When a thread was last seen to have passed, or to stand inside or before the gate.
    active: Nanos,
    /// That was between two looks that followed one another, so it is known when.
    watched: bool,
    /// The end of all work at the last pass.
    mark: Option<CompletionMarker>,
    /// Since when all work is done and nobody has passed.
    paused: Option<Nanos>,
    pauses: Pauses,
}

impl Idle {
    /// The context in which the marker was made goes: make it anew.
    pub fn drop_markers(&mut self) {
        self.mark = None;
    }

    /// The gate opens.
    pub fn begins(&mut self) {
        let time = now();
        (self.active, self.looked, self.watched) = (time, time, true);
        (self.mark, self.paused) = (None, None);
    }

    /// Threads are back at the gate: the pause, if there was one, is over.
    pub fn returns(&mut self) {
        if let Some(since) = self.paused.take() {
            // The engine may have moved memory since they came.
            let came = gate().waiting_since();
            let end = if gate().waiting() > 0 && came > since { came } else { now() };
            self.pauses.observe(end.saturating_sub(since));
        }
    }

    /// Looks at the gate. Whether somebody has passed since the last look, or is about to.
    fn sees_passes(&mut self, time: Nanos, interval: Nanos) -> bool {
        let (gate, passes) = (gate(), gate().passes());
        let followed = time.saturating_sub(self.looked) <= interval;
        self.looked = time;
        // Whoever stands before the gate is about to have all GPUs.
        if passes == self.passes && !gate.occupied() && gate.waiting() == 0 && !flow::is_holding() {
            return false;
        }
        self.returns();
        (self.passes, self.active, self.watched, self.mark) = (passes, time, followed, None);
        true
    }
}

impl Engine {
    /// Whether the process makes use of this GPU. Called only while somebody needs it, for a switch of `switch` ns.
    ///
    /// It is the process that is idle, and not the GPU alone: what runs on another GPU of the process may use
    /// this one's memory, and nothing can be submitted there without this one.
    pub(super) fn look_idle(&mut self, switch: Nanos) -> Use {
        let begun = self.device.books.slice_has_begun();
        if !begun && gang::is_blocked(self.device.gpu) {
            // What it waits for may be waiting for this GPU.
            return Use::Idle;
        }
        if gang::waits_beyond(self.device.gpu) {
            // It keeps what it has for a slice that is to come, and not for one that it had (nvshare::gang_order).
            return if begun { Use::Idle } else { Use::Kept };
        }
        let (time, grace) = (now(), self.page().settings().idle_grace);
        let again = time + (grace / 2).max(MILLISECOND);
        // A look may come a little late.
        if self.idle.sees_passes(time, 2 * grace + 5 * MILLISECOND) {
            gang::idle(false);
            return Use::Look(time + grace);
        }
        if self.idle.paused.is_none() {
            let quiet_until = self.idle.active + grace;
            if time < quiet_until {
                return Use::Look(quiet_until);
            }
            let first = self.idle.mark.is_none();
            if first {
                self.idle.mark = captures::with_no_capture(gang::mark);
            }
            let ended = |mark: &mut CompletionMarker| captures::with_no_capture(|| mark.look()) == Some(true);
            if !self.idle.mark.as_mut().is_some_and(ended) {
                return Use::Look(again);
            }
            // It ended between the last pass and the marker, or since the last look.
            self.idle.paused = Some(if first { self.idle.active } else { time });
            self.idle.mark = None;
        }
        let since = self.idle.paused.unwrap_or(time);
        let kept = if self.idle.watched { self.idle.pauses.worth_waiting(switch) } else { 0 };
        let until = since + kept.max(grace);
        if time < until {
            return Use::Look(until.min(again));
        }
        if !gang::idle(true) {
            // Another process of the gang works, and may need what this one has.
            return Use::Look(again);
        }
        tracing::debug!(gpu = %self.device.gpu, "idle for {}: giving way", format_nanos(time - since));
        self.client.idle(since, self.idle.pauses.expected(time - since));
        Use::Idle
    }

    /// A client whose slice was over is back in the queue before its threads are back at the gate: they were waiting
    /// for its work, which is done only now. If they don't come, not even after a pause that is worth waiting for, it has
    /// nothing to do.
    pub(super) fn wants_its_turn(&mut self) -> Turn {
        if gate().waiting() > 0 {
            self.idle.returns();
            return Turn::Wanted;
        }
        if gang::others_want() {
            return Turn::Wanted;
        }
        let since = *self.idle.paused.get_or_insert(self.drained_at);
        let snapshot = self.device.snapshot();
        let kept = self.idle.pauses.worth_waiting(policy::switch_time(&snapshot, self.slot()));
        let quiet = since.max(self.drained_at) + kept.max(self.page().settings().idle_grace);
        if now() < quiet {
            return Turn::Look(quiet);
        }
        self.client.idle(since, self.idle.pauses.expected(now().saturating_sub(since)));
        Turn::NotWanted
    }
}
