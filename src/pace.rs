//! The pace of one queue of work: how much of it may be in flight, so that a drain is short and the GPU never waits.
//!
//! A queue does its work in order. Whoever submits to it asks ([`Pace::next`]); *markers* in the queue tell how far the GPU has
//! got. This knows no driver: a marker is whatever can say that it is past ([`Marker`]).
//!
//! ```text
//!   done            marks: the work up to here is done, when the GPU says so          submitted
//!    │──────|──────|──────|──────|──────|──────|──────|──────|──────|──────|───────────────│
//!    └─────────── backlog: so many submissions, times what each has taken of late ─────────┘
//!           at most the drain target, and what is left of the slice until it can end
//! ```
//!
//! A mark is an event in the queue behind all its work so far, so graphs and copies need nothing of their own, and no stream
//! waits for another that would not have without. There are about sixteen in a full backlog. What a submission takes is the
//! GPU's own time between two marks, over the submissions between them; it counts if the second mark was in the queue before
//! the GPU came to the first, so that it was never without work meanwhile, and the longest of the last few does. Else it says
//! only that they took no longer. (When somebody *sees* that marks have passed says nothing: they may be seen together that
//! passed a second apart.) Only the GPU's progress is looked at: an application that waits for the GPU, however long and
//! however often, is one with a small backlog.
//!
//! Whoever would make the backlog too long waits until half of it is done, or, of one that is mostly a single kernel,
//! most of it: the GPU still has work then. A kernel that is submitted when the backlog in front of it is within the
//! bound ends at most its own length after it, so a drain takes at most the target and one kernel.
//!
//! Work may wait for work that is yet to be submitted (a collective on several GPUs, a stream that waits for a value), and
//! then nothing passes while everybody is held. So whoever has seen no progress for a second goes all the same, and each second
//! after that twice as many.

use crate::units::{MILLISECOND, Nanos};
use std::collections::VecDeque;

/// Parts of a full backlog between two marks.
const PARTS: u64 = 16;

/// The most marks that are looked at.
const MOST_MARKS: usize = 64;

/// The most submissions without a mark: as many as the driver takes before it has a thread wait (about a thousand,
/// seen on an H100).
const MOST_UNMARKED: u64 = 1024;

/// Submissions between two looks at the clock.
const MOST_CREDIT: u64 = 16;

/// Submissions that may be in flight while nobody knows how long one takes. Never one: the GPU would wait for the client
/// after each.
const UNKNOWN: u64 = 2;

/// Submissions that may be in flight for each that is done in this slice, before what was known of them is believed.
const CONFIRMED: u64 = 2;

/// So many targets without progress, beyond twice what was foreseen, and some submissions go all the same. Longer than most
/// kernels take, of which nobody knows yet that they are long.
const STALL_TIMEOUT: u64 = 20;

/// At most so many at a time go all the same, as a power of two: as many as the driver takes.
const MOST_STALL_BYPASS: u32 = 10;

/// How often somebody who waits looks at least, ns, of a backlog that nobody knows.
const POLL_INTERVAL: Nanos = MILLISECOND / 2;

/// A moment in the submitted work that the GPU comes to.
pub trait Marker {
    /// Whether it has.
    fn is_past(&self) -> bool;

    /// The GPU's time since an earlier one, ns, if both are past and there is telling.
    fn since(&self, earlier: &Self) -> Option<Nanos>;
}

/// What somebody who wants to submit does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Submits.
    Go,
    /// Marks the work so far, says so with [`Pace::marked`], and asks again.
    Mark,
    /// Waits, at most until this time, ns, and asks again.
    Wait(Nanos),
}

/// What a submission took in the last few stretches of work, ns.
#[derive(Debug, Clone, Copy)]
pub struct CostEstimate {
    last: [Nanos; 4],
    next: usize,
    known: bool,
}

impl CostEstimate {
    /// Of work that nobody has seen yet.
    pub const UNKNOWN: Self = Self { last: [0; 4], next: 0, known: false };

    /// The longest of them.
    pub fn get(&self) -> Option<Nanos> {
        self.known.then(|| self.last.iter().copied().max().unwrap_or(0).max(1))
    }

    /// So many took so long. If the GPU may have been without work for a part of that, it says only that they took no
    /// longer.
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

/// Work between two marks.
struct Stretch<M> {
    /// Submissions up to its end.
    count: u64,
    /// At its end.
    mark: M,
    /// All of it was in the queue before the GPU came to its beginning.
    busy: bool,
}

/// The pace at which a process submits to a queue, while its slice can end.
pub struct Pace<M> {
    target: Nanos,
    /// When its slice can end, ns.
    until: Nanos,
    submitted: u64,
    marks: VecDeque<Stretch<M>>,
    marked_at: Nanos,
    /// Submissions that are done, and when that was seen.
    done: u64,
    done_at: Nanos,
    /// When somebody last looked what is done, ns.
    looked_at: Nanos,
    /// The last mark that has passed, and with it what was in flight before anybody counted.
    last: Option<M>,
    /// The beginning is marked: the end of what was in flight before.
    begun: bool,
    cost: CostEstimate,
    /// Submissions that may go without another look.
    credit: u64,
    /// The backlog was too long, and is not yet short enough.
    held: bool,
    /// Since when somebody waits and nothing has passed, ns.
    stuck: Option<Nanos>,
    /// How often some went nevertheless since the last progress.
    stall_bypass: u32,
}

impl<M: Marker> Pace<M> {
    /// Of a queue that may have work in flight already, nobody knows how much. What a submission takes is known from
    /// before, if it is.
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

    /// What its submissions have taken.
    pub fn cost(&self) -> CostEstimate {
        self.cost
    }

    /// The slice can end at another time, ns.
    pub fn limit(&mut self, until: Nanos) {
        if until != self.until {
            self.until = until;
            self.credit = 0;
        }
    }

    /// All that it submitted is done. What is known of a submission now, which is most for long ones: perhaps they were
    /// all in the queue together.
    pub fn drained(mut self, time: Nanos) -> CostEstimate {
        self.look(time);
        self.cost
    }

    /// How long the backlog may be, ns. An eighth less than what is asked for, for what is not foreseen.
    fn bound(&self, time: Nanos) -> Nanos {
        (self.target - self.target / 8).saturating_add(self.until.saturating_sub(time))
    }

    /// Whether nobody need look what is done, which the driver takes a microsecond to say: little is in flight in any case,
    /// and it was looked at not long ago.
    fn at_ease(&self, time: Nanos) -> bool {
        let bound = self.bound(time);
        let little = |each| self.backlog(each, time) <= bound / 2 && self.left() > 0;
        self.begun
            && !self.held
            && time.saturating_sub(self.looked_at) < self.target / PARTS
            && self.cost.get().is_some_and(little)
    }

    /// Sees what is done.
    pub fn look(&mut self, time: Nanos) {
        self.looked_at = time;
        while self.marks.front().is_some_and(|stretch| stretch.mark.is_past()) {
            let Some(Stretch { count, mark, busy }) = self.marks.pop_front() else { return };
            // The first has waited for what was in flight before.
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

    /// How long the GPU has work for, ns, if each submission takes so long. The stretch that is under way counts less with time,
    /// but not less than nothing: it may take longer than foreseen, and what is behind it has not begun.
    pub fn backlog(&self, each: Nanos, time: Nanos) -> Nanos {
        let first = self.marks.front().map_or(self.submitted, |stretch| stretch.count);
        let under_way =
            (first - self.done).saturating_mul(each).saturating_sub(time.saturating_sub(self.done_at));
        under_way.saturating_add((self.submitted - first).saturating_mul(each))
    }

    /// What a submission does now. [`Admission::Go`] counts it.
    pub fn next(&mut self, time: Nanos) -> Admission {
        if self.has_credit() {
            return Admission::Go;
        }
        if !self.at_ease(time) {
            self.look(time);
        }
        if !self.begun {
            // Else nobody would know what the first took, and in a slice of two or three kernels ever know anything.
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
        // After some time anyway: what was thought to be quick may be slow.
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

    /// Submissions that may be in flight, however quick they are thought to be. What was quick in the last slice may be
    /// slow in this one, a thousand of them are launched before the first is done, and a drain waits for all: so what is
    /// in flight doubles as it is seen to get done, as a connection's window does after it was idle (RFC 5681, slow start).
    fn window(&self) -> u64 {
        UNKNOWN.max(self.done.saturating_mul(CONFIRMED))
    }

    /// What may be submitted of that.
    fn left(&self) -> u64 {
        self.window().saturating_sub(self.submitted - self.done)
    }

    fn mark(&mut self, time: Nanos) -> Admission {
        self.marked_at = time;
        Admission::Mark
    }

    /// Whether a submission may go without a look at anything. Counts it.
    pub fn has_credit(&mut self) -> bool {
        let has = self.credit > 0;
        if has {
            self.credit -= 1;
            self.submitted += 1;
        }
        has
    }

    /// Waits, or goes all the same, and others with it, twice as many each time: what the GPU waits for may come after a
    /// thousand more. What is under way was foreseen to take so long, ns.
    fn wait(&mut self, time: Nanos, until: Nanos, foreseen: Nanos) -> Admission {
        let since = *self.stuck.get_or_insert(time);
        let patience = (STALL_TIMEOUT * self.target).saturating_add(2 * foreseen);
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

    /// So many were submitted when they were asked for the mark; `mark` is behind them.
    pub fn marked(&mut self, count: u64, mark: M) {
        // Asked of the pace of an earlier slice, perhaps.
        let count = count.min(self.submitted);
        if count > self.last_marked() || !self.begun {
            self.begun = true;
            // Asked after the mark was made: what is not past now was not when its work was in the queue.
            let busy = self.marks.back().is_some_and(|before| !before.mark.is_past());
            self.marks.push_back(Stretch { count, mark, busy });
        }
    }

    /// Submissions up to the last mark, which may have passed.
    fn last_marked(&self) -> u64 {
        self.marks.back().map_or(self.done, |stretch| stretch.count)
    }

    /// Submissions so far.
    pub fn submitted(&self) -> u64 {
        self.submitted
    }
}

#[cfg(test)]
mod tests;
