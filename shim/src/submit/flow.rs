//! Flow control: how much work is in flight, so that a drain is short.
//!
//! Launches are asynchronous, and the driver takes hundreds of them ahead of the GPU: of kernels of 3 ms, seconds. A
//! client whose slice may end must not have more in flight than takes the *drain target*, and the GPU must never wait
//! for the client. So, while its slice can end ([`nvshare::policy::earliest_end`]), every submission passes here
//! ([`Gate::limit`](nvshare::gate::Gate::limit)); while everybody's memory fits, none does, and nothing is paid.
//!
//! Each [`Queue`] is looked at by itself: a stream does its work in order, streams do theirs side by side, and what is in
//! flight in one says nothing of another. A drain takes as long as the longest queue. How much a queue may have in flight is
//! for its pace to say ([`nvshare::pace`]); a marker is an event.

use crate::cuda::abi::*;
use crate::submit::captures;
use crate::submit::drain::StreamMarker;
use crate::submit::gate::gate;
use crate::submit::queue::Queue;
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
    /// While one of them can: how long a drain may take, and when it can, ns.
    limit: Option<(Nanos, Nanos)>,
    paces: FxHashMap<Queue, Pace<StreamMarker>>,
    /// Of the slice that is over, until it is drained.
    over: FxHashMap<Queue, Pace<StreamMarker>>,
    /// Of the queues that were used in the slice before: as it was when that was drained.
    costs: FxHashMap<Queue, CostEstimate>,
    ends: Vec<(GpuUuid, Nanos)>,
}

static FLOW: LazyLock<Mutex<Flow>> = LazyLock::new(Mutex::default);
static CHANGED: Condvar = Condvar::new();

/// Threads that wait here.
static HELD: AtomicU32 = AtomicU32::new(0);
/// How often a thread has.
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

    fn stop(&mut self) {
        if self.limit.take().is_none() {
            return;
        }
        self.costs = self.paces.iter().map(|(queue, pace)| (*queue, pace.cost())).collect();
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
        pace.cost().get().map_or(0, |each| pace.backlog(each, time))
    };
    flow.over.values_mut().map(backlog).max().unwrap_or(0)
}

/// All work of the process is done, and no capture is open: its last marks say what it took.
pub fn drained() {
    let mut flow = flow();
    let over = std::mem::take(&mut flow.over);
    flow.costs.extend(over.into_iter().map(|(queue, pace)| (queue, pace.drained(now()))));
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
    flow.costs.retain(|queue, _| is_other(queue));
}

/// A thread ends, and its own default streams with it.
pub fn thread_ended(thread: ThreadId) {
    let mut flow = flow();
    let is_other = |queue: &Queue| !queue.is_of_thread(thread);
    flow.paces.retain(|queue, _| is_other(queue));
    flow.over.retain(|queue, _| is_other(queue));
    flow.costs.retain(|queue, _| is_other(queue));
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
            Admission::Mark => {
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
