//! The captures that are open, and operations that are possible beside them.
//!
//! A stream that captures a graph can be neither queried nor marked by an event, and some calls of any thread invalidate the
//! capture (docs/decisions/0025-beside-an-open-capture.md). So a drain waits for the end of the captures and keeps new ones
//! from beginning ([`CaptureHold`]), and operations that cannot wait are done only where they are safe.
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

/// The streams that capture.
#[derive(Default)]
struct Captures {
    /// The streams in which a capture was begun and has not ended.
    open: HashMap<Queue, Capture>,
    /// The streams that have joined a capture, with the work that they had before. Cleared when no capture is open.
    joined: HashMap<Queue, WorkBefore>,
    /// How many threads are making calls by which a stream may join a capture.
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

    /// The work that a stream had before it captured.
    fn work_before(&self, stream: CUstream) -> WorkBefore {
        let queue = Queue::of(stream, false);
        let open = self.open.get(&queue).map(|capture| &capture.before);
        open.or_else(|| self.joined.get(&queue)).cloned().unwrap_or(WorkBefore::Unknown)
    }
}

static CAPTURING: LazyLock<Mutex<Captures>> = LazyLock::new(Mutex::default);

/// How many captures are open.
static CAPTURES: AtomicU32 = AtomicU32::new(0);

/// How many holds there are: while there is one, no new capture begins. Threads that want to begin one sleep on this word.
static HOLD_CAPTURES: AtomicU32 = AtomicU32::new(0);

fn capturing() -> MutexGuard<'static, Captures> {
    nvshare::sync::lock(&CAPTURING)
}

/// Whether a capture is open.
pub fn is_capturing() -> bool {
    CAPTURES.load(Ordering::SeqCst) > 0
}

/// Refuses a call that is unsafe while a stream captures, as the driver does; like the driver, it also invalidates the capture.
/// Whether the driver refuses depends on the mode of the capture, on the thread that began it, and on the calling thread's own
/// mode. So this makes a call to the driver that is refused under the same conditions and has no other effect: a query of an
/// event that was never recorded. Creating and destroying an event is safe.
///
/// # Errors
/// The driver's.
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

/// The locked set of captures, held while a capture begins.
pub struct Beginning(MutexGuard<'static, Captures>);

impl Beginning {
    /// Locks the set, to begin a capture. If an engine holds back captures, leaves the gate (`inside`), waits for a while and
    /// returns `None`; the caller then tries again. While a capture is open, others are let through, because a capture that
    /// begins in another stream may be needed to end the open one.
    pub fn unless_held(inside: impl Drop, is_open: impl FnOnce() -> bool) -> Option<(impl Drop, Self)> {
        // Locked before the hold is read: see CaptureHold::unless_capturing.
        let set = capturing();
        let hold = HOLD_CAPTURES.load(Ordering::SeqCst);
        let held = hold != 0 && CAPTURES.load(Ordering::SeqCst) == 0;
        // An allocation may have shut the gate after this thread passed it: see close_unless_capturing.
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

/// The work of a stream that is about to capture, by its explicit handle. After that it cannot be queried.
fn work_before(stream: CUstream) -> WorkBefore {
    let Ok(driver) = Driver::get() else { return WorkBefore::Unknown };
    if stream.is_default() {
        return WorkBefore::Unknown;
    }
    // If it captures already, the call fails or changes nothing.
    let status = driver.stream_capture_status(stream);
    let context = driver.stream_ctx(stream);
    match (status, context) {
        (Ok(CU_STREAM_CAPTURE_STATUS_NONE), Ok(context)) => {
            driver.relaxed(|| WorkBefore::of(driver, green::owner_of(context), stream))
        }
        _ => WorkBefore::Unknown,
    }
}

/// Whether the driver says that a stream captures, by its explicit handle.
fn captures(stream: CUstream) -> bool {
    let status = Driver::get().map(|driver| driver.stream_capture_status(stream));
    matches!(status, Ok(Ok(status)) if status != CU_STREAM_CAPTURE_STATUS_NONE)
}

/// The work that a capturing stream had before its capture.
pub fn work_before_capture(stream: CUstream) -> WorkBefore {
    capturing().work_before(stream)
}

/// Makes a stream wait for an event with `call`. If the event belongs to a capture, the stream joins it.
pub fn join_capture(stream: CUstream, per_thread: bool, call: impl FnOnce() -> CuResult) -> CuResult {
    if CAPTURES.load(Ordering::SeqCst) == 0 {
        return call();
    }
    // `joining` keeps other threads from marking streams meanwhile ([`mark_beside_captures`]). The set is not locked for that,
    // because the driver may block in these calls until another thread goes on, and that thread may need the set.
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

/// Counts as a thread that may have a stream join a capture, until dropped.
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

/// Ends the capture of a stream with `call`. The driver may refuse, because another thread has begun the capture, or because
/// the stream does not capture or has only joined a capture. The capture then goes on, unless the driver says that the stream
/// does not capture any more, as after a capture that was invalidated.
pub fn end_capture(stream: CUstream, per_thread: bool, call: impl FnOnce() -> CuResult) -> CuResult {
    let result = call();
    if result.is_success() || !captures(stream.named(per_thread)) {
        let ended = Queue::of(stream, per_thread);
        captures_ended(|queue, _| *queue == ended);
    }
    result
}

/// Ends the capture of a stream that was destroyed.
pub fn stream_ended(stream: CUstream) {
    let ended = Queue::of(stream, false);
    captures_ended(|queue, _| *queue == ended);
}

/// Ends the captures of the own default streams of a thread that has ended.
pub fn thread_ended(thread: ThreadId) {
    captures_ended(|queue, _| queue.is_of_thread(thread));
}

/// Removes the captures that have ended, also because their stream, context or thread is gone.
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
        // An engine may have deferred a free or a drain until now.
        gang::wake_engines();
    }
}

/// Shuts the gate, because some memory of a GPU is not in place, unless a capture is open. Returns whether it did. No capture
/// can begin while the gate is shut.
pub fn close_unless_capturing(gpu: GpuUuid) -> bool {
    let set = capturing();
    let none = !set.are_open();
    if none {
        gang::growing(gpu);
    }
    none
}

/// Runs `action` if no capture is open, and keeps captures from beginning meanwhile. The action must not block: threads that
/// begin or end a capture, allocate or free wait for it.
pub fn with_no_capture<T>(action: impl FnOnce() -> T) -> Option<T> {
    let set = capturing();
    (!set.are_open()).then(action)
}

/// Marks the end of all work so far although captures are open. `None` if that would invalidate one. The gate is shut, and
/// no thread is inside.
///
/// The only work of a capturing stream is what it had before the capture, and that was marked then. All other streams can be
/// queried and marked by a thread in the relaxed capture mode.
pub fn mark_beside_captures() -> Option<CompletionMarker> {
    let set = capturing();
    (set.joining == 0).then(|| gang::mark_beside(|stream| set.work_before(stream)))?
}

/// Whether such a marker has passed. `None` if that cannot be determined any more, because a capture has begun that forbids it.
pub fn look_beside_captures(mark: &mut CompletionMarker) -> Option<bool> {
    let set = capturing();
    if set.are_open() && !mark.is_complete() && !gang::may_mark_defaults() {
        return None;
    }
    Some(mark.look())
}

/// When the latest of the open captures began, ns.
pub fn latest_capture() -> Option<Nanos> {
    capturing().open.values().map(|capture| capture.since).max()
}

/// Keeps new captures from beginning, unless one is open.
pub struct CaptureHold(());

impl CaptureHold {
    /// Begins a hold. Does not wait for open captures: an engine that drains leaves the gate open while a capture
    /// [is open](CaptureHold::is_broken), so that it can end, and checks again when one has ended, which wakes the engines.
    pub fn begin() -> Self {
        HOLD_CAPTURES.fetch_add(1, Ordering::SeqCst);
        Self(())
    }

    /// Begins a hold, or returns `None` if a capture is open. For a caller that cannot wait for the capture's end, because it
    /// may be its own.
    pub fn unless_capturing() -> Option<Self> {
        HOLD_CAPTURES.fetch_add(1, Ordering::SeqCst);
        let hold = Self(());
        // A thread that begins a capture keeps the set locked from reading the hold until the capture is in the set. So this
        // either finds that capture, or the thread will find the hold.
        with_no_capture(|| hold)
    }

    /// Whether a capture is open: an earlier one, or one that began just before the hold.
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

/// Wakes the threads that wait to begin a capture: the process has failed, and their calls return its error.
pub fn wake_beginners() {
    nvshare::sync::unpark_all(&HOLD_CAPTURES);
}
