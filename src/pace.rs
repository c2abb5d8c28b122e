//! The pace of one queue of work: how much work may be in flight, so that a drain is short and the GPU never waits.
//!
//! A queue does its work in order. A thread asks before it submits to the queue ([`Pace::next`]); *markers* in the queue tell
//! how far the GPU has got. This module knows no driver: a marker is anything that can say that the GPU has passed it
//! ([`Marker`]).
//!
//! ```text
//!   done            markers: the work up to here is done, once the GPU has passed      submitted
//!    │──────|──────|──────|──────|──────|──────|──────|──────|──────|──────|───────────────│
//!    └──────── backlog: submissions in flight, times what each has taken lately ───────────┘
//!           at most the drain target, and what is left of the slice until it can end
//! ```
//!
//! A marker is an event in the queue behind all its work so far. So graphs and copies need no markers of their own, and no
//! stream waits for another that would not have waited without. A full backlog has about sixteen markers.
//!
//! The cost of a submission is the GPU's own time between two markers, divided by the number of submissions between them. The
//! estimate is the longest of the last four. It takes a measurement only if the second marker was in the queue before the GPU
//! came to the first: then the GPU had work all the time. Without that, the measurement is only an upper bound. Observation
//! times are not used, because markers that were completed a second apart may be observed together. Only the GPU's progress
//! matters: an application that waits for the GPU has a small backlog, however long and however often it waits.
//!
//! A thread that would make the backlog too long waits until half of it is done, or most of it if it is mostly a single kernel:
//! the GPU still has work then. A kernel that is submitted while the backlog in front of it is within the bound ends at most
//! its own length after that backlog, so a drain takes at most the target and one kernel.
//!
//! Work may wait for work that is yet to be submitted (a collective on several GPUs, a stream that waits for a value). Then no
//! marker passes while all threads are held. So a thread that has seen no progress for a second submits all the same, and
//! each second after that twice as many submissions pass.

use crate::units::{MILLISECOND, Nanos, SECOND};
use std::collections::VecDeque;

/// A full backlog has this many markers.
const PARTS: u64 = 16;

/// The most markers in flight.
const MOST_MARKS: usize = 64;

/// The most submissions between two markers: as many as the driver takes before it makes a thread wait (about a thousand,
/// measured on an H100).
const MOST_UNMARKED: u64 = 1024;

/// The most submissions between two looks at the clock.
const MOST_CREDIT: u64 = 16;

/// Submissions that may be in flight while their cost is unknown. With one, the GPU would wait for the client after each.
const UNKNOWN: u64 = 2;

/// Submissions that may be in flight for each that is done in this slice ([`Pace::window`]).
const CONFIRMED: u64 = 2;

/// In drain targets: after this long without progress, beyond twice the expected time, some submissions pass all the same. It
/// is longer than most kernels whose length is not known yet.
const STALL_TIMEOUT: u64 = 20;

/// It is no less than this, ns, however little may be in flight.
const LEAST_STALL_TIMEOUT: Nanos = SECOND;

/// The most submissions that pass at a time without progress, as a power of two: as many as the driver takes.
const MOST_STALL_BYPASS: u32 = 10;

/// How often a waiting thread looks while the cost is unknown, in ns.
const POLL_INTERVAL: Nanos = MILLISECOND / 2;

/// A place in the submitted work that the GPU passes.
pub trait Marker {
    /// Whether the GPU has passed it.
    fn is_past(&self) -> bool;

    /// The GPU's time since it passed an earlier marker, in ns, if it has passed both and can tell.
    fn since(&self, earlier: &Self) -> Option<Nanos>;
}

/// What a thread that wants to submit does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Submits.
    Go,
    /// Puts a marker behind the work so far, hands it over with [`Pace::marked`], and asks again.
    Mark,
    /// Waits at most until this time (CLOCK_MONOTONIC ns), and asks again.
    Wait(Nanos),
}

/// What a submission has taken in the last four stretches of work, in ns.
#[derive(Debug, Clone, Copy)]
pub struct CostEstimate {
    last: [Nanos; 4],
    next: usize,
    known: bool,
}

impl CostEstimate {
    /// The estimate before any measurement.
    pub const UNKNOWN: Self = Self { last: [0; 4], next: 0, known: false };

    /// The longest of them, in ns, at least 1. `None` before any measurement.
    pub fn get(&self) -> Option<Nanos> {
        self.known.then(|| self.last.iter().copied().max().unwrap_or(0).max(1))
    }

    /// `count` submissions took `took` ns together. Unless the GPU was `busy` all that time, that is only an upper bound.
    fn observe(&mut self, count: u64, took: Nanos, busy: bool) {
        let each = took / count;
        if busy && self.known {
            self.last[self.next] = each;
            self.next = (self.next + 1) % self.last.len();
        } else if self.get().is_none_or(|known| each < known) {
            self.last = [each; 4];
            self.known = true;
        }
    }
}

/// The work between two markers.
struct Stretch<M> {
    /// Submissions up to its end, from the beginning of the slice.
    count: u64,
    /// The marker at its end.
    mark: M,
    /// All of it was in the queue before the GPU came to its beginning.
    busy: bool,
}

/// The pace at which a process submits to one queue, while its slice can end.
pub struct Pace<M> {
    /// The drain target, in ns.
    target: Nanos,
    /// When the slice can end, CLOCK_MONOTONIC ns.
    until: Nanos,
    submitted: u64,
    marks: VecDeque<Stretch<M>>,
    marked_at: Nanos,
    /// Submissions that are done, and when that was observed.
    done: u64,
    done_at: Nanos,
    /// When a thread last looked how far the GPU is, ns.
    looked_at: Nanos,
    /// The last marker that the GPU has passed. The first one ends the work that was in flight before the count began.
    last: Option<M>,
    /// The first marker is in the queue, behind the work that was in flight before.
    begun: bool,
    cost: CostEstimate,
    /// Submissions that may pass without another look.
    credit: u64,
    /// The backlog was too long, and is not yet short enough.
    held: bool,
    /// Since when a thread waits and no marker has passed, ns.
    stuck: Option<Nanos>,
    /// How often submissions have passed without progress, since the last progress.
    stall_bypass: u32,
}

impl<M: Marker> Pace<M> {
    /// For a queue that may have an unknown amount of work in flight already, from the time `time` on (ns). `target` is the
    /// drain target in ns, `until` the time at which the slice can end, and `cost` what an earlier pace has measured.
    pub fn new(target: Nanos, until: Nanos, cost: CostEstimate, time: Nanos) -> Self {
        Self {
            target,
            until,
            submitted: 0,
            marks: VecDeque::new(),
            marked_at: time,
            done: 0,
            done_at: time,
            looked_at: time,
            last: None,
            begun: false,
            cost,
            credit: 0,
            held: false,
            stuck: None,
            stall_bypass: 0,
        }
    }

    /// The present estimate of a submission's cost.
    pub fn cost(&self) -> CostEstimate {
        self.cost
    }

    /// Sets the drain target, in ns, and the time at which the slice can end, ns.
    pub fn limit(&mut self, target: Nanos, until: Nanos) {
        if (target, until) != (self.target, self.until) {
            (self.target, self.until) = (target, until);
            self.credit = 0;
        }
    }

    /// All submissions are done at the time `time` (ns): returns the estimate after a last look. (For long submissions that look matters most, because
    /// they may all have been in the queue together.)
    pub fn drained(mut self, time: Nanos) -> CostEstimate {
        self.look(time);
        self.cost
    }

    /// How long the backlog may be, in ns: an eighth less than the target, as a margin, and the time until the slice can end.
    fn bound(&self, time: Nanos) -> Nanos {
        (self.target - self.target / 8).saturating_add(self.until.saturating_sub(time))
    }

    /// Whether a look at the markers can be left out, which costs a microsecond in the driver: little is in flight in any case,
    /// and the last look was not long ago.
    fn at_ease(&self, time: Nanos) -> bool {
        let bound = self.bound(time);
        let little = |each| self.backlog(each, time) <= bound / 2 && self.left() > 0;
        self.begun
            && !self.held
            && time.saturating_sub(self.looked_at) < self.target / PARTS
            && self.cost.get().is_some_and(little)
    }

    /// Looks which markers the GPU has passed, at the time `time` (ns), and measures.
    pub fn look(&mut self, time: Nanos) {
        self.looked_at = time;
        while self.marks.front().is_some_and(|stretch| stretch.mark.is_past()) {
            let Some(Stretch { count, mark, busy }) = self.marks.pop_front() else { return };
            // The first marker waited for work that was not counted.
            if let Some(last) = &self.last
                && count > self.done
            {
                let took = mark.since(last).unwrap_or(time.saturating_sub(self.done_at));
                self.cost.observe(count - self.done, took, busy);
            }
            (self.done, self.done_at, self.last) = (count, time, Some(mark));
            (self.stuck, self.stall_bypass) = (None, 0);
        }
    }

    /// For how long the GPU has work, in ns, if each submission takes `each` ns. The stretch that is under way counts for less
    /// as time passes, but never for less than nothing: it may take longer than expected, and the work behind it has not
    /// begun.
    pub fn backlog(&self, each: Nanos, time: Nanos) -> Nanos {
        let first = self.marks.front().map_or(self.submitted, |stretch| stretch.count);
        let under_way =
            (first - self.done).saturating_mul(each).saturating_sub(time.saturating_sub(self.done_at));
        under_way.saturating_add((self.submitted - first).saturating_mul(each))
    }

    /// What a thread that wants to submit does, at the time `time` (ns). [`Admission::Go`] counts the submission.
    pub fn next(&mut self, time: Nanos) -> Admission {
        if self.has_credit() {
            return Admission::Go;
        }
        if !self.at_ease(time) {
            self.look(time);
        }
        if !self.begun {
            // Without a marker at the beginning, the cost of the first stretch could not be measured; in a slice of two or
            // three kernels there may be no other.
            return self.mark(time);
        }
        let unmarked = self.submitted - self.last_marked();
        let Some(each) = self.cost.get() else {
            return match () {
                () if unmarked > 0 && self.marks.len() < MOST_MARKS => self.mark(time),
                () if self.submitted - self.done >= UNKNOWN => self.wait(time, time + POLL_INTERVAL, 0),
                () => self.go(),
            };
        };
        let bound = self.bound(time);
        let window = self.window();
        let part = (bound / PARTS / each).min(window / 2).clamp(1, MOST_UNMARKED);
        // Also after some time: submissions that were quick may have become slow.
        let late = unmarked > 0 && time.saturating_sub(self.marked_at) >= bound / PARTS;
        if (unmarked >= part || late) && self.marks.len() < MOST_MARKS {
            return self.mark(time);
        }
        let backlog = self.backlog(each, time);
        let enough = if self.held || self.last.is_none() { bound / 2 } else { bound };
        self.held = backlog > enough;
        let left = self.left();
        if self.held || left == 0 {
            let longest = (bound / PARTS).max(each / 64);
            let too_long = if self.held { backlog - bound / 2 } else { backlog / 2 };
            let until = time + too_long.clamp(POLL_INTERVAL / 8, longest.max(POLL_INTERVAL / 8));
            let foreseen =
                self.marks.front().map_or(0, |stretch| (stretch.count - self.done).saturating_mul(each));
            return self.wait(time, until, foreseen);
        }
        self.stuck = None;
        let room = ((enough - backlog) / each).min(part - unmarked.min(part)).min(left);
        self.credit = room.min(MOST_CREDIT).saturating_sub(1);
        self.go()
    }

    /// Submissions that may be in flight, however small the estimate is. Submissions that were quick in the last slice may be
    /// slow in this one, a thousand can be launched before the first is done, and a drain waits for all of them. So the number
    /// in flight doubles as submissions are seen to get done, as a connection's window does after it was idle (RFC 5681, slow
    /// start).
    fn window(&self) -> u64 {
        UNKNOWN.max(self.done.saturating_mul(CONFIRMED))
    }

    /// How many more may be submitted within the [window](Pace::window).
    fn left(&self) -> u64 {
        self.window().saturating_sub(self.submitted - self.done)
    }

    fn mark(&mut self, time: Nanos) -> Admission {
        self.marked_at = time;
        Admission::Mark
    }

    /// Whether a submission may pass without a look at the clock or the markers. Counts it if so.
    pub fn has_credit(&mut self) -> bool {
        let has = self.credit > 0;
        if has {
            self.credit -= 1;
            self.submitted += 1;
        }
        has
    }

    /// Waits, or passes without progress, and with it twice as many submissions each time: the one that the GPU waits for may
    /// come after a thousand others. The stretch under way is expected to take `foreseen` ns.
    fn wait(&mut self, time: Nanos, until: Nanos, foreseen: Nanos) -> Admission {
        let since = *self.stuck.get_or_insert(time);
        let patience = (STALL_TIMEOUT * self.target).max(LEAST_STALL_TIMEOUT).saturating_add(2 * foreseen);
        if time.saturating_sub(since) < patience {
            return Admission::Wait(until);
        }
        self.credit = (1 << self.stall_bypass.min(MOST_STALL_BYPASS)) - 1;
        self.stall_bypass += 1;
        self.stuck = Some(time);
        self.go()
    }

    fn go(&mut self) -> Admission {
        self.submitted += 1;
        Admission::Go
    }

    /// Hands over a marker that is in the queue behind the first `count` submissions.
    pub fn marked(&mut self, count: u64, mark: M) {
        // The thread may have been asked by the pace of an earlier slice.
        let count = count.min(self.submitted);
        if count > self.last_marked() || !self.begun {
            self.begun = true;
            // The marker is in the queue by now. If the GPU has not passed the marker before it yet, all work between the two
            // was in the queue before the GPU came to it.
            let busy = self.marks.back().is_some_and(|before| !before.mark.is_past());
            self.marks.push_back(Stretch { count, mark, busy });
        }
    }

    /// Submissions up to the last marker, passed or not.
    fn last_marked(&self) -> u64 {
        self.marks.back().map_or(self.done, |stretch| stretch.count)
    }

    /// Submissions since the beginning of the slice.
    pub fn submitted(&self) -> u64 {
        self.submitted
    }
}

// Not under Miri: this module has no unsafe code and no atomics, and its tests simulate seconds of a GPU, which takes Miri hours.
#[cfg(all(test, not(miri)))]
mod tests;
