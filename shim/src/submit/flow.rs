//! Flow control: limits the work in flight, so that a drain is short.
//!
//! Launches are asynchronous, and the driver queues hundreds of them: with kernels of 3 ms that is seconds of work. A
//! client whose slice may end must not have more work in flight than the GPU can do in the *drain target*, and yet the GPU
//! must never run out of work. So while its slice can end ([`nvshare::policy::earliest_end`]), every submission passes here
//! ([`Gate::limit`](nvshare::gate::Gate::limit)). While the memory of all clients fits on the GPU, no submission does, and
//! flow control costs nothing.
//!
//! Each [`Queue`] is limited separately: a stream does its work in order, streams run concurrently, and the work in flight in
//! one says nothing about another. A drain takes as long as the longest queue. How much a queue may have in flight is decided
//! by its pace ([`nvshare::pace`]), whose markers are events here.

use crate::cuda::abi::*;
use crate::submit::captures;
use crate::submit::drain::StreamMarker;
use crate::submit::gate::gate;
use crate::submit::queue::Queue;
use crate::submit::turn;
use crate::thread::ThreadId;
use nvshare::pace::{Admission, CostEstimate, Marker, Pace};
use nvshare::sync::now;
use nvshare::units::{GpuUuid, Nanos};
use rustc_hash::FxHashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard};
use std::time::Duration;

impl Marker for StreamMarker {
    fn is_past(&self) -> bool {
        self.is_past()
    }

    fn since(&self, earlier: &Self) -> Option<Nanos> {
        self.since(earlier)
    }
}

/// The pace of each queue, and when the slice of each of the process's GPUs can end.
#[derive(Default)]
struct Flow {
    /// While work in flight is limited: the drain target, and when the slice or the turn can end, ns.
    limit: Option<(Nanos, Nanos)>,
    /// The limit for a compute turn, while the process takes turns. It is the lower one.
    turn: Option<(Nanos, Nanos)>,
    paces: FxHashMap<Queue, Pace<StreamMarker>>,
    /// The paces of the slice that has ended, until it is drained.
    over: FxHashMap<Queue, Pace<StreamMarker>>,
    /// The cost estimates of the queues that were used in the previous slice, from the end of that slice.
    costs: FxHashMap<Queue, CostEstimate>,
    /// When the slice of each GPU can end, for those that can, ns.
    ends: Vec<(GpuUuid, Nanos)>,
}

static FLOW: LazyLock<Mutex<Flow>> = LazyLock::new(Mutex::default);
static CHANGED: Condvar = Condvar::new();

/// How many threads wait here.
static HELD: AtomicU32 = AtomicU32::new(0);
/// How often a thread has waited here.
static HOLDS: AtomicU64 = AtomicU64::new(0);

fn flow() -> MutexGuard<'static, Flow> {
    nvshare::sync::lock(&FLOW)
}

impl Flow {
    /// The pace of a queue, if its work is limited.
    fn pace(&mut self, queue: Queue) -> Option<&mut Pace<StreamMarker>> {
        let (target, until) = self.limit?;
        let known = || self.costs.get(&queue).copied().unwrap_or(CostEstimate::UNKNOWN);
        Some(self.paces.entry(queue).or_insert_with(|| Pace::new(target, until, known(), now())))
    }

    /// Limits the work in flight from now on, or no more.
    fn set(&mut self, limit: Option<(Nanos, Nanos)>) {
        let Some((target, until)) = limit else { return self.stop() };
        // No marker is made here, because submitting threads may hold the driver's locks for seconds.
        if self.limit.replace((target, until)).is_none() {
            gate().limit();
        }
        self.paces.values_mut().for_each(|pace| pace.limit(target, until));
    }

    fn stop(&mut self) {
        if self.limit.take().is_some() {
            self.begin_anew();
            gate().unlimit();
        }
    }

    /// The slice is over, or no work is limited any more.
    fn begin_anew(&mut self) {
        self.costs = self.paces.iter().map(|(queue, pace)| (*queue, pace.cost())).collect();
        self.over = std::mem::take(&mut self.paces);
        CHANGED.notify_all();
    }
}

/// Sets when the slice of a GPU can end, ns, or that it cannot. The GPU's engine calls it while the client runs, and before it
/// opens the gate: otherwise each waiting thread could at once submit seconds of work.
pub fn limit(gpu: GpuUuid, end: Option<Nanos>, target: Nanos) {
    let mut flow = flow();
    flow.ends.retain(|(known, _)| *known != gpu);
    flow.ends.extend(end.map(|end| (gpu, end)));
    if flow.turn.is_none() {
        let until = flow.ends.iter().map(|(_, end)| *end).min();
        flow.set(until.map(|until| (target, until)));
    }
}

/// Sets how much work the process may have in flight while it takes compute turns: beyond the end of its turn, in ns, and that end,
/// ns; `None`: it takes none any more.
pub fn turn(limit: Option<(Nanos, Nanos)>) {
    let mut flow = flow();
    if limit.is_some() || flow.turn.is_some() {
        flow.turn = limit;
        // Where a slice can end, the engine limits the work again when it next looks.
        flow.set(limit);
    }
}

/// The slice of this GPU has ended, or the process does not use the GPU any more.
pub fn end(gpu: GpuUuid) {
    let mut flow = flow();
    flow.ends.retain(|(known, _)| *known != gpu);
    if flow.turn.is_some() {
        flow.begin_anew();
    } else if flow.ends.is_empty() {
        flow.stop();
    }
}

/// An estimate of how long the work of the slice that has ended takes from `time` on, ns; 0 if unknown.
pub fn foreseen(time: Nanos) -> Nanos {
    let mut flow = flow();
    let backlog = |pace: &mut Pace<StreamMarker>| {
        // If a capture forbids querying the markers, the last known state is used.
        let _ = captures::with_no_capture(|| pace.look(time));
        pace.cost().get().map_or(0, |each| pace.backlog(each, time))
    };
    flow.over.values_mut().map(backlog).max().unwrap_or(0)
}

/// All work of the process is done: its last markers give the cost estimates for the next slice.
pub fn drained() {
    let mut flow = flow();
    let over = std::mem::take(&mut flow.over);
    flow.costs.extend(over.into_iter().map(|(queue, pace)| (queue, pace.drained(now()))));
}

/// Drops all markers, because a context is about to be destroyed with its events.
pub fn drop_markers() {
    let mut flow = flow();
    flow.paces.clear();
    flow.over.clear();
}

/// Drops the state of a stream that is about to be destroyed, because its handle may be reused.
pub fn drop_stream(stream: CUstream) {
    let mut flow = flow();
    let is_other = |queue: &Queue| !queue.is_stream(stream);
    flow.paces.retain(|queue, _| is_other(queue));
    flow.over.retain(|queue, _| is_other(queue));
    flow.costs.retain(|queue, _| is_other(queue));
}

/// Drops the state of the own default streams of a thread that has ended.
pub fn thread_ended(thread: ThreadId) {
    let mut flow = flow();
    let is_other = |queue: &Queue| !queue.is_of_thread(thread);
    flow.paces.retain(|queue, _| is_other(queue));
    flow.over.retain(|queue, _| is_other(queue));
    flow.costs.retain(|queue, _| is_other(queue));
}

/// Waits until a submission to a queue is admitted: until the process has the compute turn, if it takes turns, and until little
/// enough is in flight. Called outside the gate, which may be shut meanwhile.
#[cold]
pub fn pace(queue: Queue) {
    loop {
        // Submissions are not counted while a capture is open: captured calls submit no work, and querying an event would
        // invalidate the capture.
        if captures::is_capturing() {
            return;
        }
        turn::wait();
        let mut flow = flow();
        let Some(pace) = flow.pace(queue) else { return };
        if pace.has_credit() {
            return;
        }
        let Some(turn) = captures::with_no_capture(|| pace.next(now())) else { return };
        match turn {
            Admission::Go => return,
            Admission::Mark => {
                let count = pace.submitted();
                drop(flow);
                let Some(mark) = captures::with_no_capture(|| queue.end()).flatten() else { return };
                flow = self::flow();
                // If a capture has begun meanwhile, the marker is dropped.
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
                drop(CHANGED.wait_timeout(flow, rest));
                HELD.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

/// Whether a thread waits here, or for a compute turn.
pub fn is_holding() -> bool {
    HELD.load(Ordering::Relaxed) > 0 || turn::is_holding()
}

/// How often threads have waited here.
pub fn holds() -> u64 {
    HOLDS.load(Ordering::Relaxed)
}
