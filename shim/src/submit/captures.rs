//! The captures that are open, and what may be done beside them.
//!
//! While a stream records a graph, nothing may be asked of it and no event may mark it, and some calls of any thread ruin the
//! recording (docs/decisions/0025-beside-an-open-capture.md). So a drain waits for the end of the captures or keeps new ones
//! from beginning ([`CaptureHold`]), and what cannot wait is done only where it is safe.
//!
//! How a capture begins is in [`crate::submit::capture_begin`].

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::submit::drain::{CompletionMarker, WorkBefore};
use crate::submit::queue::Queue;
use crate::submit::{gang, green};
use crate::thread::ThreadId;
use nvshare::sync::now;
use nvshare::units::{GpuUuid, Nanos};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard};

/// The streams that capture. A thread's own default stream is one for each thread and context, whatever handle or entry
/// point names it.
#[derive(Default)]
struct Captures {
    /// Those that began, each from its beginning to its end.
    open: HashMap<Queue, Capture>,
    /// Those that joined one of them, as they came; until none is open.
    joined: HashMap<Queue, WorkBefore>,
    /// Threads that may be having a stream join one at this moment.
    joining: u32,
}

struct Capture {
    context: CUcontext,
    since: Nanos,
    before: WorkBefore,
}

impl Captures {
    fn are_open(&self) -> bool {
        !self.open.is_empty()
    }

    /// What work a stream had before it captured.
    fn work_before(&self, stream: CUstream) -> WorkBefore {
        let queue = Queue::of(stream, false);
        let open = self.open.get(&queue).map(|capture| &capture.before);
        open.or_else(|| self.joined.get(&queue)).cloned().unwrap_or(WorkBefore::Unknown)
    }
}

static CAPTURING: LazyLock<Mutex<Captures>> = LazyLock::new(Mutex::default);

/// How many.
static CAPTURES: AtomicU32 = AtomicU32::new(0);

/// Engines that want to drain: no new capture begins. A word to sleep on.
static HOLD_CAPTURES: AtomicU32 = AtomicU32::new(0);

fn capturing() -> MutexGuard<'static, Captures> {
    nvshare::sync::lock(&CAPTURING)
}

/// Whether a capture is open.
pub fn is_capturing() -> bool {
    CAPTURES.load(Ordering::SeqCst) > 0
}

/// Refuses a call that is not safe while a stream captures, as the driver does, which invalidates the capture too. What is
/// refused depends on the mode of the capture, on the thread that began it, and on the calling thread's own mode. So the
/// driver itself is asked, by a call that it refuses alike and that does nothing else: whether an event has happened that was
/// never recorded. To make an event and to destroy it is safe.
///
/// # Errors
/// What the driver says.
pub fn refuse_unsafe() -> Result<(), CuResult> {
    if !is_capturing() {
        return Ok(());
    }
    let Ok(driver) = Driver::get() else { return Ok(()) };
    let Ok(event) = driver.event_create(CU_EVENT_DISABLE_TIMING) else { return Ok(()) };
    let answer = driver.event_query(event);
    let _ = driver.event_destroy(event);
    match answer {
        Err(CuResult::STREAM_CAPTURE_UNSUPPORTED | CuResult::STREAM_CAPTURE_INVALIDATED) => answer,
        _ => Ok(()),
    }
}

/// The set of captures, held by whoever begins one: no engine begins to hold captures back meanwhile.
pub struct Beginning(MutexGuard<'static, Captures>);

impl Beginning {
    /// Takes the set, to begin a capture. If an engine holds captures back, waits for a while instead and gives `None`; the
    /// caller then comes again. A stream that forks into another's capture belongs to an open one, so it is let through.
    pub fn unless_held(inside: impl Drop, is_open: impl FnOnce() -> bool) -> Option<(impl Drop, Self)> {
        // Held while it is looked whether to begin: see CaptureHold::unless_capturing.
        let set = capturing();
        let hold = HOLD_CAPTURES.load(Ordering::SeqCst);
        let held = hold != 0 && CAPTURES.load(Ordering::SeqCst) == 0;
        // An allocation may have closed the gate behind this thread: see close_unless_capturing.
        if !held && is_open() {
            return Some((inside, Self(set)));
        }
        drop((inside, set));
        if held {
            nvshare::sync::park(&HOLD_CAPTURES, hold);
        }
        None
    }

    /// Begins the capture of a stream with `call`.
    pub fn begin(mut self, stream: CUstream, per_thread: bool, call: impl FnOnce() -> CuResult) -> CuResult {
        let before = work_before(stream.named(per_thread));
        let result = call();
        if result.is_success() {
            let queue = Queue::of(stream, per_thread);
            let context = queue.context().unwrap_or(CUcontext::NULL);
            let capture = Capture { context, since: now(), before };
            if self.0.open.insert(queue, capture).is_none() {
                CAPTURES.fetch_add(1, Ordering::SeqCst);
            }
        }
        result
    }
}

/// What work a stream has, by its explicit name, that is about to capture: afterwards nobody can ask.
fn work_before(stream: CUstream) -> WorkBefore {
    let Ok(driver) = Driver::get() else { return WorkBefore::Unknown };
    if stream.is_default() {
        return WorkBefore::Unknown;
    }
    // It may capture already: then the call fails, or changes nothing.
    let status = driver.stream_capture_status(stream);
    let context = driver.stream_ctx(stream);
    match (status, context) {
        (Ok(CU_STREAM_CAPTURE_STATUS_NONE), Ok(context)) => {
            driver.relaxed(|| WorkBefore::of(driver, green::owner_of(context), stream))
        }
        _ => WorkBefore::Unknown,
    }
}

/// Whether the driver says that a stream, by its explicit name, captures.
fn captures(stream: CUstream) -> bool {
    let status = Driver::get().map(|driver| driver.stream_capture_status(stream));
    matches!(status, Ok(Ok(status)) if status != CU_STREAM_CAPTURE_STATUS_NONE)
}

/// What work a stream that captures had before.
pub fn work_before_capture(stream: CUstream) -> WorkBefore {
    capturing().work_before(stream)
}

/// Lets a stream wait for an event with `call`. If that is one of a capture, the stream takes part in it from then on.
pub fn join_capture(stream: CUstream, per_thread: bool, call: impl FnOnce() -> CuResult) -> CuResult {
    if CAPTURES.load(Ordering::SeqCst) == 0 {
        return call();
    }
    // A stream that somebody marks does not begin to capture meanwhile. The set is not held for that: the driver may block in
    // these calls, until a thread goes on that wants the set.
    let _joining = Joining::begin();
    let stream = stream.named(per_thread);
    let captured = captures(stream);
    let before = work_before(stream);
    let result = call();
    if !captured && captures(stream) {
        capturing().joined.insert(Queue::of(stream, per_thread), before);
    }
    result
}

/// A stream may join a capture, until dropped.
struct Joining(());

impl Joining {
    fn begin() -> Self {
        capturing().joining += 1;
        Self(())
    }
}

impl Drop for Joining {
    fn drop(&mut self) {
        capturing().joining -= 1;
    }
}

/// Ends the capture of a stream with `call`. The driver may refuse: another thread has begun the capture, or the stream
/// captures nothing or for another. The capture then goes on, unless the driver says that the stream captures no more,
/// as for a capture that was invalidated.
pub fn end_capture(stream: CUstream, per_thread: bool, call: impl FnOnce() -> CuResult) -> CuResult {
    let result = call();
    if result.is_success() || !captures(stream.named(per_thread)) {
        let ended = Queue::of(stream, per_thread);
        captures_ended(|queue, _| *queue == ended);
    }
    result
}

/// A stream that the application made is destroyed, and a capture of it has ended with it.
pub fn stream_ended(stream: CUstream) {
    let ended = Queue::of(stream, false);
    captures_ended(|queue, _| *queue == ended);
}

/// A thread ends, and its own default streams with it.
pub fn thread_ended(thread: ThreadId) {
    captures_ended(|queue, _| queue.is_of_thread(thread));
}

/// Captures are over that nobody has ended: their stream, their context or their thread is gone.
pub fn captures_ended(is_over: impl Fn(&Queue, CUcontext) -> bool) {
    let over = {
        let mut set = capturing();
        let before = set.open.len();
        set.open.retain(|queue, capture| !is_over(queue, capture.context));
        if !set.are_open() {
            set.joined.clear();
        }
        before - set.open.len()
    };
    if over > 0 {
        CAPTURES.fetch_sub(over as u32, Ordering::SeqCst);
        // An engine may have put off a free, or a drain, until now.
        gang::wake_engines();
    }
}

/// Closes the gate, because a GPU has more memory than is in place, unless a capture is open; none can begin
/// once it is closed. Whether it did.
pub fn close_unless_capturing(gpu: GpuUuid) -> bool {
    let set = capturing();
    let none = !set.are_open();
    if none {
        gang::growing(gpu);
    }
    none
}

/// Runs `action` while no capture is open and none can begin, or not at all. The action waits for nothing: threads that
/// begin or end a capture, allocate or free are held meanwhile.
pub fn with_no_capture<T>(action: impl FnOnce() -> T) -> Option<T> {
    let set = capturing();
    (!set.are_open()).then(action)
}

/// The end of all work so far, although captures are open, if that can be told without ruining one. The gate is shut, and
/// nobody is inside.
///
/// Nothing of a stream that captures is on its way to the GPU but what it had before, and that was marked. All others can be
/// asked and marked by a thread in the relaxed mode.
pub fn mark_beside_captures() -> Option<CompletionMarker> {
    let set = capturing();
    (set.joining == 0).then(|| gang::mark_beside(|stream| set.work_before(stream)))?
}

/// Looks whether such a mark has passed. `None` if that cannot be told any more: a capture has come that forbids it.
pub fn look_beside_captures(mark: &mut CompletionMarker) -> Option<bool> {
    let set = capturing();
    if set.are_open() && !mark.is_complete() && !gang::may_mark_defaults() {
        return None;
    }
    Some(mark.look())
}

/// When the latest of the captures that are open began, ns.
pub fn latest_capture() -> Option<Nanos> {
    capturing().open.values().map(|capture| capture.since).max()
}

/// Keeps new captures from beginning, but for those that belong to an open one.
pub struct CaptureHold(());

impl CaptureHold {
    /// Begins to. Waits for nothing: whoever drains leaves the gate open while a capture [is](CaptureHold::is_broken), so
    /// that it can end, and looks again when one has ended, which rings the engines.
    pub fn begin() -> Self {
        HOLD_CAPTURES.fetch_add(1, Ordering::SeqCst);
        Self(())
    }

    /// Keeps new captures from beginning, or nothing if one is open, for whoever cannot wait for its end: it may be
    /// the caller's own.
    pub fn unless_capturing() -> Option<Self> {
        HOLD_CAPTURES.fetch_add(1, Ordering::SeqCst);
        let hold = Self(());
        // Whoever begins one has the set for all of that: it is in there now, or finds the hold.
        with_no_capture(|| hold)
    }

    /// Whether a capture is open: still, or because it slipped in.
    pub fn is_broken(&self) -> bool {
        CAPTURES.load(Ordering::SeqCst) > 0
    }
}

impl Drop for CaptureHold {
    fn drop(&mut self) {
        HOLD_CAPTURES.fetch_sub(1, Ordering::SeqCst);
        nvshare::sync::unpark_all(&HOLD_CAPTURES);
    }
}

/// Wakes whoever waits to begin a capture: the process has failed, and is told so.
pub fn wake_beginners() {
    nvshare::sync::unpark_all(&HOLD_CAPTURES);
}
