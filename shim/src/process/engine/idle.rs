//! Whether a holder makes use of its GPU while somebody else needs it, and how long its pauses are.
//!
//! A holder pauses when all its work has ended and no thread has passed the gate since. The engine finds that out by looking
//! at the gate's count of passes and at a marker of the end of all work: a launch tells nobody anything. How long a pause is
//! worth waiting for is [`Pauses::worth_waiting`], and when a client will be back from a long one, [`Rhythm::expected`].
//!
//! It looks every few milliseconds while the GPU is needed, or somebody is expected; else as often as it must to know of a
//! pause that is longer than a switch when it began ([`policy::watches_pauses`]), or not at all.

use super::{Engine, Turn};
use crate::submit::captures;
use crate::submit::drain::CompletionMarker;
use crate::submit::gate::gate;
use crate::submit::{flow, gang};
use nvshare::pauses::{Pauses, Rhythm};
use nvshare::policy;
use nvshare::snapshot::Snapshot;
use nvshare::sync::now;
use nvshare::units::{MILLISECOND, Nanos, format_nanos};

/// While nobody needs the GPU, a holder looks so many times in the time of a switch.
const LOOKS: Nanos = 8;

/// And not more often than this, ns.
const SELDOM: Nanos = 10 * MILLISECOND;

/// What a switch on another GPU of the gang is taken to cost, ns: that of some GiB over PCIe.
const UNKNOWN_SWITCH: Nanos = 300 * MILLISECOND;

/// What a holder makes of its GPU while somebody needs it.
pub(super) enum Use {
    /// Nothing.
    Idle,
    /// It works, or may, or pauses for a while; look again at this time, ns.
    Look(Nanos),
    /// Nobody needs it, or the holder holds it for when it has its other GPUs too.
    Kept,
}

/// A pause that lasts.
#[derive(Clone, Copy)]
struct Pause {
    since: Nanos,
    /// Two looks that followed one another lie about its beginning.
    seen: bool,
    /// It began while the GPU was needed, or the holder gave way in it: it counts among those that may be worth waiting for.
    counts: bool,
}

/// What is known of a holder's work.
#[derive(Default)]
pub(super) struct Idle {
    /// The gate's count when it was last looked at, and when that was.
    passes: u32,
    looked: Nanos,
    /// When a thread was last seen to have passed, or to stand inside or before the gate.
    active: Nanos,
    /// That was between two looks that followed one another at once, so it is known when; or at least without a long pause
    /// between them.
    watched: bool,
    followed: bool,
    /// The end of all work at the last pass.
    mark: Option<CompletionMarker>,
    /// All work is done and nobody has passed.
    paused: Option<Pause>,
    pauses: Pauses,
    /// Its pauses of more than `long` ns, which is the time of the longest switch.
    rhythm: Rhythm,
    long: Nanos,
    /// How long the pauses of the present slice were together that were seen to begin while nobody needed the GPU, ns.
    unused: Nanos,
}

impl Idle {
    /// The context in which the marker was made goes: make it anew.
    pub fn drop_markers(&mut self) {
        self.mark = None;
    }

    /// The gate opens.
    pub fn begins(&mut self) {
        let time = now();
        (self.active, self.looked, self.watched, self.followed) = (time, time, true, true);
        (self.mark, self.paused) = (None, None);
    }

    /// How long it has paused in the slice that ends now while nobody needed the GPU, ns. A pause that somebody came in is over
    /// with the slice, and the time for which the GPU was kept then counts with it: one switch at most.
    pub fn take_unused(&mut self) -> Nanos {
        std::mem::take(&mut self.unused)
    }

    /// Threads are back at the gate: the pause, if there was one, is over.
    pub fn returns(&mut self) {
        if let Some(pause) = self.paused.take() {
            // The engine may have moved memory since they came.
            let came = gate().waiting_since();
            let end = if gate().waiting() > 0 && came > pause.since { came } else { now() };
            let lasted = end.saturating_sub(pause.since);
            if pause.counts {
                self.pauses.observe(lasted);
            } else if pause.seen {
                self.unused += lasted;
            }
            if pause.seen && lasted > self.long {
                self.rhythm.observe(lasted);
            }
        }
    }

    /// When the client will be back from its pause, ns, if its pauses are regular; else 0.
    fn returns_at(&self) -> Nanos {
        let seen = self.paused.filter(|pause| pause.seen);
        let at = |pause: Pause| Some(pause.since.saturating_add(self.rhythm.expected()?));
        seen.and_then(at).unwrap_or(0)
    }

    /// Looks at the gate. Whether somebody has passed since the last look, or is about to. Looks follow one another at once if
    /// no more than `interval` ns lie between them.
    fn sees_passes(&mut self, time: Nanos, interval: Nanos) -> bool {
        let (gate, passes) = (gate(), gate().passes());
        let since = time.saturating_sub(self.looked);
        self.looked = time;
        let close = interval.max(self.long / 4);
        // Whoever stands before the gate is about to have all GPUs.
        if passes == self.passes && !gate.occupied() && gate.waiting() == 0 && !flow::is_holding() {
            return false;
        }
        // A pause that ended while nobody looked has ended nobody knows when.
        self.paused.take_if(|pause| since > close.max(time.saturating_sub(pause.since) / LOOKS));
        self.returns();
        (self.passes, self.active, self.mark) = (passes, time, None);
        (self.watched, self.followed) = (since <= interval, since <= close);
        true
    }
}

impl Engine {
    /// Whether the process makes use of this GPU, for those who need it or may need it soon.
    ///
    /// It is the process that is idle, and not the GPU alone: what runs on another GPU of the process may use
    /// this one's memory, and nothing can be submitted there without this one.
    pub(super) fn look_idle(&mut self, snapshot: &Snapshot) -> Use {
        let own = policy::needed(snapshot);
        let needed = own.or_else(|| gang::others_are_needed().then_some(UNKNOWN_SWITCH));
        let begun = self.device.books.slice_has_begun();
        if !begun && own.is_some() && gang::is_blocked(self.device.gpu) {
            // What it waits for may be waiting for this GPU.
            return Use::Idle;
        }
        if gang::waits_beyond(self.device.gpu) {
            // It keeps what it has for a slice that is to come, and not for one that it had (nvshare::gang_order).
            return if own.is_some() && begun { Use::Idle } else { Use::Kept };
        }
        let (time, grace) = (now(), self.page().settings().idle_grace);
        let closely = needed.is_some() || policy::expected(snapshot).is_some();
        if !closely && !policy::watches_pauses(snapshot, self.slot()) {
            return Use::Kept;
        }
        self.idle.long = policy::head_start(snapshot, self.slot());
        let seldom = (self.idle.long / LOOKS).max(SELDOM).max(grace);
        let interval = if closely { (grace / 2).max(MILLISECOND) } else { seldom };
        let again = time + interval;
        // A look may come a little late.
        if self.idle.sees_passes(time, 2 * grace + 5 * MILLISECOND) {
            gang::idle(false);
            return Use::Look(if closely { time + grace } else { again });
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
            let since = if first { self.idle.active } else { time };
            self.idle.paused = Some(Pause { since, seen: self.idle.followed, counts: closely });
            self.idle.mark = None;
        }
        let since = self.idle.paused.map_or(time, |pause| pause.since);
        // Of one that began unseen nobody knows how long it has lasted.
        let kept = if self.idle.watched || needed.is_none() {
            self.idle.pauses.worth_waiting(self.swap.switch_time(needed.unwrap_or(self.idle.long)))
        } else {
            0
        };
        let until = since + kept.max(grace);
        if time < until {
            return Use::Look(until.min(again));
        }
        let returns_at = self.idle.returns_at();
        if needed.is_none()
            && !(returns_at > time && policy::gives_way_ahead(snapshot, self.slot(), returns_at))
        {
            // A decision rings it when somebody is expected.
            return Use::Look(again.max(time + (time - since) / (4 * LOOKS)));
        }
        if !gang::idle(true) {
            // Another process of the gang works, and may need what this one has.
            return Use::Look(again);
        }
        tracing::debug!(gpu = %self.device.gpu, "idle for {}: giving way", format_nanos(time - since));
        if let Some(pause) = &mut self.idle.paused {
            if pause.seen && !pause.counts {
                self.idle.unused += time - since;
            }
            pause.counts = true;
        }
        self.client.idle(since, self.idle.pauses.expected(time - since), returns_at);
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
        let drained = Pause { since: self.drained_at, seen: false, counts: true };
        let since = self.idle.paused.get_or_insert(drained).since;
        let snapshot = self.device.snapshot();
        let switch = self.swap.switch_time(policy::switch_time(&snapshot, self.slot()));
        let kept = self.idle.pauses.worth_waiting(switch);
        let quiet = since.max(self.drained_at) + kept.max(self.page().settings().idle_grace);
        if now() < quiet {
            return Turn::Look(quiet);
        }
        let expected = self.idle.pauses.expected(now().saturating_sub(since));
        self.client.idle(since, expected, self.idle.returns_at());
        Turn::NotWanted
    }
}
