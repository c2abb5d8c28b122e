//! Flow control: how much work is in flight, so that a drain is short.
//!
//! Launches are asynchronous, and the driver takes hundreds of them ahead of the GPU: of kernels of 3 ms, seconds. A
//! client whose slice may end must not have more in flight than takes the *drain target*, and the GPU must never wait
//! for the client. So, while its slice can end ([`nvshare::policy::earliest_end`]), every submission passes here
//! ([`Gate::limit`](nvshare::gate::Gate::limit)); while everybody's memory fits, none does, and nothing is paid.
//!
//! Each [`Queue`] is looked at by itself: a stream does its work in order, streams do theirs side by side, and what is in
//! flight in one says nothing of another. A drain takes as long as the longest queue.
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

use crate::cuda::abi::*;
use crate::submit::captures;
use crate::submit::drain::StreamMarker;
use crate::submit::gate::gate;
use crate::submit::queue::Queue;
use crate::thread::ThreadId;
use nvshare::sync::now;
use nvshare::units::{GpuUuid, MILLISECOND, Nanos};
use rustc_hash::FxHashMap;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard};
use std::time::Duration;

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

impl Marker for StreamMarker {
    fn is_past(&self) -> bool {
        self.is_past()
    }

    fn since(&self, earlier: &Self) -> Option<Nanos> {
        self.since(earlier)
    }
}

/// What somebody who wants to submit does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Submits.
    Go,
    /// Marks the work so far, says so with [`Pace::marked`], and asks again.
    CompletionMarker,
    /// Waits, at most until this time, ns, and asks again.
    Wait(Nanos),
}

/// What a submission took in the last few stretches of work, ns.
#[derive(Debug, Clone, Copy)]
struct CostEstimate {
    last: [Nanos; 4],
    next: usize,
    known: bool,
}

impl CostEstimate {
    const UNKNOWN: Self = Self { last: [0; 4], next: 0, known: false };

    /// The longest of them.
    fn get(&self) -> Option<Nanos> {
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
    each: CostEstimate,
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
    fn new(target: Nanos, until: Nanos, each: CostEstimate, time: Nanos) -> Self {
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
            each,
            credit: 0,
            held: false,
            stuck: None,
            stall_bypass: 0,
        }
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
    fn drained(mut self, time: Nanos) -> CostEstimate {
        self.look(time);
        self.each
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
            && self.each.get().is_some_and(little)
    }

    /// Sees what is done.
    fn look(&mut self, time: Nanos) {
        self.looked_at = time;
        while self.marks.front().is_some_and(|stretch| stretch.mark.is_past()) {
            let Some(Stretch { count, mark, busy }) = self.marks.pop_front() else { return };
            // The first has waited for what was in flight before.
            if let Some(last) = &self.last
                && count > self.done
            {
                let took = mark.since(last).unwrap_or(time.saturating_sub(self.done_at));
                self.each.observe(count - self.done, took, busy);
            }
            (self.done, self.done_at, self.last) = (count, time, Some(mark));
            (self.stuck, self.stall_bypass) = (None, 0);
        }
    }

    /// How long the GPU has work for, ns, if each submission takes so long. The stretch that is under way counts less with time,
    /// but not less than nothing: it may take longer than foreseen, and what is behind it has not begun.
    fn backlog(&self, each: Nanos, time: Nanos) -> Nanos {
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
        let Some(each) = self.each.get() else {
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
        Admission::CompletionMarker
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

/// The pace of each queue, and when the slice of each of the process's GPUs can end.
#[derive(Default)]
struct Flow {
    /// While one of them can: how long a drain may take, and when it can, ns.
    limit: Option<(Nanos, Nanos)>,
    paces: FxHashMap<Queue, Pace<StreamMarker>>,
    /// Of the slice that is over, until it is drained.
    over: FxHashMap<Queue, Pace<StreamMarker>>,
    /// Of the queues that were used in the slice before: as it was when that was drained.
    each: FxHashMap<Queue, CostEstimate>,
    ends: Vec<(GpuUuid, Nanos)>,
}

static FLOW: LazyLock<Mutex<Flow>> = LazyLock::new(Mutex::default);
static CHANGED: Condvar = Condvar::new();

/// Threads that wait here.
static HELD: AtomicU32 = AtomicU32::new(0);
/// How often a thread has.
static HOLDS: AtomicU64 = AtomicU64::new(0);

fn flow() -> MutexGuard<'static, Flow> {
    FLOW.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Flow {
    /// The pace of a queue, if its work is limited.
    fn pace(&mut self, queue: Queue) -> Option<&mut Pace<StreamMarker>> {
        let (target, until) = self.limit?;
        let known = || self.each.get(&queue).copied().unwrap_or(CostEstimate::UNKNOWN);
        Some(self.paces.entry(queue).or_insert_with(|| Pace::new(target, until, known(), now())))
    }

    fn stop(&mut self) {
        if self.limit.take().is_none() {
            return;
        }
        self.each = self.paces.iter().map(|(queue, pace)| (*queue, pace.each)).collect();
        self.over = std::mem::take(&mut self.paces);
        gate().unlimit();
        CHANGED.notify_all();
    }
}

/// Says when the slice of a GPU can end, ns, or that it cannot. Called by the GPU's engine, while it runs, and before the
/// gate opens: of threads that stand before it, each could have launched for seconds a moment later.
pub fn limit(gpu: GpuUuid, end: Option<Nanos>, target: Nanos) {
    let mut flow = flow();
    flow.ends.retain(|(known, _)| *known != gpu);
    flow.ends.extend(end.map(|end| (gpu, end)));
    let Some(until) = flow.ends.iter().map(|(_, end)| *end).min() else { return flow.stop() };
    // No mark is made here: the threads that submit may keep the driver to themselves for seconds.
    if flow.limit.replace((target, until)).is_none() {
        gate().limit();
    }
    flow.paces.values_mut().for_each(|pace| pace.limit(until));
}

/// The slice of this GPU is over, or the process uses it no more.
pub fn end(gpu: GpuUuid) {
    let mut flow = flow();
    flow.ends.retain(|(known, _)| *known != gpu);
    if flow.ends.is_empty() {
        flow.stop();
    }
}

/// How long the work of the slice that is over takes from this time on, ns, by what is known of it; 0 if nothing is.
pub fn foreseen(time: Nanos) -> Nanos {
    let mut flow = flow();
    let backlog = |pace: &mut Pace<StreamMarker>| {
        // What a capture forbids to look at is thought to be as it was.
        let _ = captures::with_no_capture(|| pace.look(time));
        pace.each.get().map_or(0, |each| pace.backlog(each, time))
    };
    flow.over.values_mut().map(backlog).max().unwrap_or(0)
}

/// All work of the process is done, and no capture is open: its last marks say what it took.
pub fn drained() {
    let mut flow = flow();
    let over = std::mem::take(&mut flow.over);
    flow.each.extend(over.into_iter().map(|(queue, pace)| (queue, pace.drained(now()))));
}

/// A context is about to be destroyed, and its events with it: the marks mean nothing any more.
pub fn drop_markers() {
    let mut flow = flow();
    flow.paces.clear();
    flow.over.clear();
}

/// A stream is about to be destroyed: its handle may come back as another's.
pub fn drop_stream(stream: CUstream) {
    let mut flow = flow();
    let is_other = |queue: &Queue| !queue.is_stream(stream);
    flow.paces.retain(|queue, _| is_other(queue));
    flow.over.retain(|queue, _| is_other(queue));
    flow.each.retain(|queue, _| is_other(queue));
}

/// A thread ends, and its own default streams with it.
pub fn thread_ended(thread: ThreadId) {
    let mut flow = flow();
    let is_other = |queue: &Queue| !queue.is_of_thread(thread);
    flow.paces.retain(|queue, _| is_other(queue));
    flow.over.retain(|queue, _| is_other(queue));
    flow.each.retain(|queue, _| is_other(queue));
}

/// Waits until a submission to a queue may go. Outside the gate: it may be shut meanwhile.
#[cold]
pub fn pace(queue: Queue) {
    let mut flow = flow();
    while let Some(pace) = flow.pace(queue) {
        if pace.has_credit() {
            return;
        }
        // Nothing is counted while a capture is open: what is captured is no work yet, and to ask whether an event has
        // passed would ruin it.
        let Some(turn) = captures::with_no_capture(|| pace.next(now())) else { return };
        match turn {
            Admission::Go => return,
            Admission::CompletionMarker => {
                let count = pace.submitted();
                drop(flow);
                let Some(mark) = captures::with_no_capture(|| queue.end()).flatten() else { return };
                flow = self::flow();
                // Else one may have begun meanwhile: the mark is as good as none.
                let _ = captures::with_no_capture(|| {
                    if let Some(pace) = flow.pace(queue) {
                        pace.marked(count, mark);
                    }
                });
            }
            Admission::Wait(until) => {
                if !gate().is_limited() {
                    return;
                }
                HELD.fetch_add(1, Ordering::Relaxed);
                HOLDS.fetch_add(1, Ordering::Relaxed);
                let rest = Duration::from_nanos(until.saturating_sub(now()));
                flow = CHANGED.wait_timeout(flow, rest).unwrap_or_else(|poisoned| poisoned.into_inner()).0;
                HELD.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

/// Whether a thread waits here.
pub fn holds_somebody() -> bool {
    HELD.load(Ordering::Relaxed) > 0
}

/// How often threads have waited here.
pub fn holds() -> u64 {
    HOLDS.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests;
