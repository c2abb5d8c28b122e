//! Draining: waiting for the work that the application has submitted.
//!
//! cuCtxSynchronize is never used, because it invalidates captures (docs/driver-facts.md). A drain waits for events instead,
//! recorded in two steps, so that launches need no bookkeeping:
//!
//! 1. Each stream that the application has created and that has work gets an event.
//! 2. When those have passed, the legacy default stream of each context gets one. It comes after all earlier work of every
//!    blocking stream of the context, including the per-thread default streams, which only their own threads can name.
//!
//! An event in the legacy stream is a barrier: later work of all blocking streams waits for it. Recorded in the first step, it
//! could block a submission for which earlier work waits, such as a copy in another stream for which a resident kernel spins.
//! So it is recorded only when no known stream has work. (For the same reason the progress of a stream that keeps working is
//! measured by events in that stream only: [`crate::submit::flow`].)
//!
//! A stream that captures can be neither queried nor marked: the event would become part of its graph. The
//! legacy stream may not be used at all while a blocking stream captures. So usually markers are neither made nor polled
//! during a capture; [`Streams::mark_beside`] makes one where that is possible ([`crate::submit::captures`]).
//!
//! A green context has default streams of its own, and can be current to only one thread at a time. So it is marked as a whole
//! (cuGreenCtxRecordEvent) from its primary context; the streams created in it are marked separately as well.
//!
//! Streams that a library creates through cuGetExportTable are not seen. Those that block the legacy stream, and
//! those of green contexts, are waited for nevertheless.
//!
//! Several threads may wait at the same time (an engine, and threads that free memory). They share events, and none destroys
//! an event that another still needs.

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::submit::green::Green;
use nvshare::units::Nanos;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard};

/// A stream that the application has created.
#[derive(Debug, Clone, Copy)]
pub struct Tracked {
    stream: CUstream,
    /// The context in which it is marked: its own, or the primary context of its green context.
    context: CUcontext,
    /// Its green context, or null.
    green: CUgreenCtx,
    /// Whether the legacy stream waits for it.
    blocking: bool,
}

/// The streams of a process on one GPU, and the contexts, whose default streams count too.
#[derive(Default)]
pub struct Streams {
    tracked: Mutex<Tracking>,
}

#[derive(Default)]
struct Tracking {
    contexts: Vec<CUcontext>,
    greens: Vec<Green>,
    /// Streams that the application has created.
    streams: Vec<Tracked>,
    /// Markers of the ends of streams that were destroyed with work in them.
    orphans: Vec<Arc<StreamMarker>>,
    /// How many of those had not passed when they were last polled.
    orphans_ahead: usize,
}

impl Tracking {
    /// Drops the markers of destroyed streams that have passed.
    fn drop_past_orphans(&mut self) {
        self.orphans.retain(|end| !end.is_past());
        self.orphans_ahead = self.orphans.len();
    }

    /// Keeps the marker of a destroyed stream. A process may create and destroy streams and never drain, so passed markers are
    /// dropped whenever there are twice as many as were left the last time: each is polled twice, on average.
    fn add_orphan(&mut self, end: StreamMarker) {
        if self.orphans.len() >= 2 * self.orphans_ahead + FEW_ORPHANS {
            self.drop_past_orphans();
        }
        self.orphans.push(end.into());
    }
}

/// Up to so many markers of destroyed streams are kept without polling them.
const FEW_ORPHANS: usize = 16;

/// The streams and green contexts of a context that is about to be destroyed.
pub struct Parted {
    greens: Vec<Green>,
    streams: Vec<Tracked>,
    /// Markers of destroyed streams.
    orphans: Vec<Arc<StreamMarker>>,
    /// Its work may not have ended.
    busy: bool,
}

/// How many contexts are being destroyed whose work may not have ended. It cannot be marked any more; the driver waits for it.
/// Until then no marker counts as passed.
static ENDING_BUSY: AtomicU32 = AtomicU32::new(0);

impl Drop for Parted {
    fn drop(&mut self) {
        if self.busy {
            ENDING_BUSY.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// Whether a context exists. A thread that uses the context or its events holds the read lock, a thread that destroys it the
/// write lock. So an event that was destroyed with its context is never passed to the driver, where the handle may be
/// reused. The lock of a primary context is taken before those of its green contexts.
type Life = Arc<RwLock<bool>>;

static LIVES: Mutex<Vec<(CUcontext, Life)>> = Mutex::new(Vec::new());

fn life(context: CUcontext) -> Life {
    let mut lives = nvshare::sync::lock(&LIVES);
    if let Some((_, life)) = lives.iter().find(|(known, _)| *known == context) {
        return life.clone();
    }
    let life = Arc::new(RwLock::new(true));
    lives.push((context, life.clone()));
    life
}

fn alive(life: &Life) -> Option<RwLockReadGuard<'_, bool>> {
    let alive = life.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    alive.then_some(alive)
}

/// Destroys a context with `call`, which also returns whether the context is gone, while no thread uses an event of it. The
/// handle may belong to another context afterwards.
pub fn end_life<T>(context: CUcontext, call: impl FnOnce() -> (T, bool)) -> (T, bool) {
    let life = life(context);
    let mut alive = life.write().unwrap_or_else(|poisoned| poisoned.into_inner());
    let (result, ended) = call();
    if ended {
        *alive = false;
        nvshare::sync::lock(&LIVES).retain(|(known, _)| *known != context);
    }
    (result, ended)
}

/// An event at the end of a stream's work so far. Destroyed when dropped.
pub struct StreamMarker {
    driver: &'static Driver,
    context: CUcontext,
    life: Life,
    event: CUevent,
}

impl StreamMarker {
    /// Records it in a stream of `context`, which is current; with a timestamp if `timed`.
    ///
    /// # Errors
    /// The driver's.
    pub fn record(
        driver: &'static Driver,
        context: CUcontext,
        stream: CUstream,
        timed: bool,
    ) -> Result<Self, CuResult> {
        let life = life(context);
        let _there = alive(&life).ok_or(CuResult::CONTEXT_IS_DESTROYED)?;
        let event = Self::recorded(driver, timed, |event| driver.event_record(event, stream))?;
        Ok(Self { driver, context, life: life.clone(), event })
    }

    /// Creates an event and records it with `record`; destroys it if that fails. The caller keeps the context from being
    /// destroyed.
    fn recorded(
        driver: &'static Driver,
        timed: bool,
        record: impl FnOnce(CUevent) -> Result<(), CuResult>,
    ) -> Result<CUevent, CuResult> {
        let timing = if timed { 0 } else { CU_EVENT_DISABLE_TIMING };
        let event = driver.event_create(CU_EVENT_BLOCKING_SYNC | timing)?;
        record(event).map(|()| event).inspect_err(|_| {
            let _ = driver.event_destroy(event);
        })
    }

    /// Whether it has passed, or can never pass.
    pub fn is_past(&self) -> bool {
        alive(&self.life).is_none_or(|_there| self.driver.event_is_past(self.event))
    }

    /// Waits until it has passed.
    fn wait(&self) -> Result<(), CuResult> {
        alive(&self.life).map_or(Ok(()), |_there| self.driver.event_synchronize(self.event))
    }

    /// The GPU's time since an earlier marker of the same stream, ns. `None` unless both are timed and have passed.
    pub fn since(&self, earlier: &Self) -> Option<Nanos> {
        let _there = alive(&self.life)?;
        let milliseconds = self.driver.event_elapsed_ms(earlier.event, self.event).ok()?;
        Some((f64::from(milliseconds) * 1e6) as Nanos)
    }
}

impl Drop for StreamMarker {
    fn drop(&mut self) {
        if let Some(_there) = alive(&self.life) {
            let _ = self.driver.event_destroy(self.event);
        }
    }
}

/// The work that a stream had when it began to capture or joined a capture.
#[derive(Clone)]
pub enum WorkBefore {
    /// It was idle.
    None,
    /// It had work, which ends at this marker.
    Until(Arc<StreamMarker>),
    /// Not known.
    Unknown,
}

impl WorkBefore {
    /// The work of a stream of `context` that does not capture yet and is not a default stream.
    pub fn of(driver: &'static Driver, context: CUcontext, stream: CUstream) -> Self {
        match driver.stream_query(stream) {
            Ok(()) => Self::None,
            Err(CuResult::NOT_READY) => {
                end_of(driver, context, stream).map_or(Self::Unknown, |end| Self::Until(end.into()))
            }
            Err(_) => Self::Unknown,
        }
    }
}

/// Marks the end of all work submitted until it was made, or until somewhat later.
#[derive(Default)]
pub struct CompletionMarker {
    /// The markers that have not passed yet.
    ends: Vec<Arc<StreamMarker>>,
    /// Contexts whose legacy streams are to be marked when `ends` have passed.
    legacy: Vec<Later>,
    /// Green contexts that are to be marked as a whole then.
    greens: Vec<(Later, Green, Life)>,
    /// The driver's error for a context that cannot be marked, because it is broken and does no work any more.
    broken: Option<CuResult>,
}

/// A context that is to be marked later, and may have been destroyed by then.
struct Later {
    driver: &'static Driver,
    context: CUcontext,
    life: Life,
}

impl Later {
    fn new(driver: &'static Driver, context: CUcontext) -> Self {
        Self { driver, context, life: life(context) }
    }

    fn of_green(driver: &'static Driver, green: &Green) -> (Self, Green, Life) {
        (Self::new(driver, green.owner), *green, life(green.context))
    }

    /// Marks the work submitted to the legacy stream and to the streams for which it waits. `None` if the context is gone.
    fn legacy(&self) -> Option<Result<StreamMarker, CuResult>> {
        let _there = alive(&self.life)?;
        Some(self.end(|event| self.driver.event_record(event, CUstream::LEGACY)))
    }

    /// Marks the work submitted to all streams of one of its green contexts. `None` if either context is gone.
    fn green(&self, green: &Green, life: &Life) -> Option<Result<StreamMarker, CuResult>> {
        let _both = (alive(&self.life)?, alive(life)?);
        Some(self.end(|event| self.driver.green_ctx_record_event(green.green, event)))
    }

    fn end(&self, record: impl FnOnce(CUevent) -> Result<(), CuResult>) -> Result<StreamMarker, CuResult> {
        let Self { driver, context, ref life } = *self;
        let _current = Current::new(driver, context)?;
        let event = StreamMarker::recorded(driver, false, record)?;
        Ok(StreamMarker { driver, context, life: life.clone(), event })
    }
}

/// Makes `context` current for as long as this lives.
pub struct Current<'a>(&'a Driver);

impl<'a> Current<'a> {
    /// Makes `context` current.
    ///
    /// # Errors
    /// The driver's: the context is gone or broken.
    pub fn new(driver: &'a Driver, context: CUcontext) -> Result<Self, CuResult> {
        driver.ctx_push_current(context)?;
        Ok(Self(driver))
    }
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        let _ = self.0.ctx_pop_current();
    }
}

impl Parted {
    /// The context is gone, and its green contexts with it.
    pub fn gone(self) {
        self.greens.iter().for_each(|green| _ = end_life(green.context, || ((), true)));
    }
}

impl Streams {
    fn tracking(&self) -> MutexGuard<'_, Tracking> {
        nvshare::sync::lock(&self.tracked)
    }

    /// Adds a context, whose default streams may have work.
    pub fn add_context(&self, context: CUcontext) {
        let mut tracking = self.tracking();
        if !tracking.contexts.contains(&context) {
            tracking.contexts.push(context);
        }
    }

    /// Adds a green context.
    pub fn add_green(&self, green: Green) {
        let mut tracking = self.tracking();
        if !tracking.greens.contains(&green) {
            tracking.greens.push(green);
        }
    }

    /// Marks the end of a green context that is about to be destroyed, because its work goes on. [`Streams::remove_green`]
    /// follows when it is destroyed.
    pub fn mark_green(&self, driver: &'static Driver, green: &Green) {
        let (later, green, life) = Later::of_green(driver, green);
        if let Some(Ok(end)) = later.green(&green, &life) {
            self.tracking().add_orphan(end);
        }
    }

    /// A green context was destroyed: its streams are detached and do no more work.
    pub fn remove_green(&self, green: &Green) {
        let mut tracking = self.tracking();
        tracking.greens.retain(|known| known != green);
        tracking.streams.retain(|known| known.green != green.green);
    }

    /// Takes out a context that is about to be destroyed, with its green contexts and streams. Its work is done, unless `busy`:
    /// then the driver will wait for it.
    pub fn part(&self, context: CUcontext, busy: bool) -> Parted {
        let mut tracking = self.tracking();
        if busy {
            ENDING_BUSY.fetch_add(1, Ordering::AcqRel);
        }
        tracking.contexts.retain(|known| *known != context);
        let orphans = tracking.orphans.extract_if(.., |end| end.context == context).collect();
        let greens = tracking.greens.extract_if(.., |known| known.owner == context).collect();
        let streams = tracking.streams.extract_if(.., |known| known.context == context).collect();
        Parted { greens, streams, orphans, busy }
    }

    /// Puts a context back that was not destroyed.
    pub fn rejoin(&self, context: CUcontext, mut parted: Parted) {
        self.add_context(context);
        let mut tracking = self.tracking();
        tracking.greens.append(&mut parted.greens);
        tracking.streams.append(&mut parted.streams);
        tracking.orphans.append(&mut parted.orphans);
    }

    /// Adds a stream that was created in a context, or in one of its green contexts. The legacy stream does not wait for
    /// streams of green contexts.
    pub fn add(&self, stream: CUstream, context: CUcontext, green: CUgreenCtx, flags: u32) {
        let blocking = green.is_null() && flags & CU_STREAM_NON_BLOCKING == 0;
        self.tracking().streams.push(Tracked { stream, context, green, blocking });
    }

    /// Removes a stream that is about to be destroyed. Its work goes on, so its end is marked, unless the legacy stream waits
    /// for it. In a stream that captures, the event would become part of the graph and never pass; the only work of such a
    /// stream is what it had `before` the capture. Returns the stream, if it was known.
    pub fn remove(
        &self,
        driver: &'static Driver,
        stream: CUstream,
        before: impl FnOnce() -> WorkBefore,
    ) -> Option<Tracked> {
        // An unknown stream may have been destroyed with its context. The driver accepts such a handle when it destroys it,
        // but may crash on it in any other call.
        if !self.tracking().streams.iter().any(|known| known.stream == stream) {
            return None;
        }
        let captures = driver.stream_capture_status(stream) != Ok(CU_STREAM_CAPTURE_STATUS_NONE);
        // Called before the lock is taken: the lock of the captures comes first in the order of locks.
        let before = if captures { before() } else { WorkBefore::Unknown };
        let mut tracking = self.tracking();
        let index = tracking.streams.iter().position(|known| known.stream == stream)?;
        let tracked @ Tracked { context, blocking, .. } = tracking.streams.swap_remove(index);
        if blocking {
            return Some(tracked);
        }
        if captures {
            if let WorkBefore::Until(end) = before {
                tracking.orphans.push(end);
            }
            return Some(tracked);
        }
        let end = Current::new(driver, context)
            .and_then(|_current| StreamMarker::record(driver, context, stream, false));
        if let Ok(end) = end {
            tracking.add_orphan(end);
        }
        Some(tracked)
    }

    /// Puts a stream back that was not destroyed.
    pub fn put_back(&self, stream: Tracked) {
        self.tracking().streams.push(stream);
    }

    /// Marks the end of all work submitted so far. No capture may be open.
    pub fn mark(&self, driver: &'static Driver) -> CompletionMarker {
        self.mark_those(driver, |_| true, |_| true)
    }

    /// Marks the end of all work submitted so far although captures are open. `None` if that would invalidate a capture.
    /// `before` returns the work that a capturing stream had before its capture. No stream begins or joins a capture meanwhile.
    pub fn mark_beside(
        &self,
        driver: &'static Driver,
        before: impl Fn(CUstream) -> WorkBefore,
    ) -> Option<CompletionMarker> {
        let mut captured = Vec::new();
        {
            let tracking = self.tracking();
            for Tracked { stream, .. } in &tracking.streams {
                match driver.stream_capture_status(*stream) {
                    Ok(CU_STREAM_CAPTURE_STATUS_NONE) => continue,
                    // Its context is broken, so it does no work any more.
                    Err(result) if !result.is_of_capture() => continue,
                    _ => {}
                }
                match before(*stream) {
                    WorkBefore::None => captured.push((*stream, None)),
                    WorkBefore::Until(end) => captured.push((*stream, Some(end))),
                    WorkBefore::Unknown => return None,
                }
            }
        }
        if !self.may_mark_defaults(driver) {
            return None;
        }
        let mut mark =
            self.mark_those(driver, |_| true, |stream| !captured.iter().any(|(of, _)| *of == stream));
        mark.ends.extend(captured.into_iter().filter_map(|(_, end)| end));
        Some(mark)
    }

    /// Whether the second step of a marker invalidates no capture: no blocking stream captures, and there is no green context,
    /// because marking one as a whole would invalidate the captures of its streams.
    pub fn may_mark_defaults(&self, driver: &'static Driver) -> bool {
        let tracking = self.tracking();
        // If the legacy stream may not be used now, the driver answers with an error and invalidates nothing.
        let status = |context: &CUcontext| {
            let _current = Current::new(driver, *context)?;
            driver.stream_capture_status(CUstream::LEGACY)
        };
        // A broken context does no work any more.
        let usable = |context| match status(context) {
            Ok(status) => status == CU_STREAM_CAPTURE_STATUS_NONE,
            Err(result) => !result.is_of_capture(),
        };
        tracking.greens.is_empty() && tracking.contexts.iter().all(usable)
    }

    /// Marks the end of all work submitted so far in a context and its green contexts.
    pub fn mark_context(&self, driver: &'static Driver, context: CUcontext) -> CompletionMarker {
        self.mark_those(driver, |known| known == context, |_| true)
    }

    fn mark_those(
        &self,
        driver: &'static Driver,
        which: impl Fn(CUcontext) -> bool,
        streams: impl Fn(CUstream) -> bool,
    ) -> CompletionMarker {
        let mut tracking = self.tracking();
        tracking.drop_past_orphans();
        let ends = tracking.orphans.iter().filter(|end| which(end.context)).cloned().collect();
        let legacy = tracking.contexts.iter().filter(|context| which(**context));
        let greens = tracking.greens.iter().filter(|green| which(green.owner));
        let mut mark = CompletionMarker {
            ends,
            legacy: legacy.map(|context| Later::new(driver, *context)).collect(),
            greens: greens.map(|green| Later::of_green(driver, green)).collect(),
            broken: None,
        };
        for Tracked { stream, context, .. } in
            tracking.streams.iter().filter(|tracked| which(tracked.context) && streams(tracked.stream))
        {
            // A query costs less than an event, and most streams have no work.
            if driver.stream_query(*stream) == Err(CuResult::NOT_READY) {
                mark.add(end_of(driver, *context, *stream));
            }
        }
        mark
    }
}

/// Marks the end of a stream's work so far, with `context` made current.
fn end_of(driver: &'static Driver, context: CUcontext, stream: CUstream) -> Result<StreamMarker, CuResult> {
    let _current = Current::new(driver, context)?;
    StreamMarker::record(driver, context, stream, false)
}

impl CompletionMarker {
    fn add(&mut self, end: Result<StreamMarker, CuResult>) {
        match end {
            Ok(end) => self.ends.push(end.into()),
            Err(error) => self.broken = self.broken.or(Some(error)),
        }
    }

    /// Whether all work before it is done, or can never be done. Makes the markers of the second step when it is time. No
    /// capture may be open.
    pub fn look(&mut self) -> bool {
        self.ends.retain(|end| !end.is_past());
        if self.ends.is_empty() && !self.is_complete() {
            self.mark_defaults();
            self.ends.retain(|end| !end.is_past());
        }
        self.ends.is_empty() && ENDING_BUSY.load(Ordering::Acquire) == 0
    }

    /// Whether the work that is marked so far is done. Makes no further marker.
    pub fn has_passed(&mut self) -> bool {
        self.ends.retain(|end| !end.is_past());
        self.ends.is_empty()
    }

    /// Whether it will make no further marker.
    pub fn is_complete(&self) -> bool {
        self.legacy.is_empty() && self.greens.is_empty()
    }

    /// How many markers have not passed or are not made yet. It decreases, and 0 means that all is done.
    pub fn left(&self) -> usize {
        self.ends.len() + self.legacy.len() + self.greens.len()
    }

    /// Marks the default streams, and green contexts as a whole.
    fn mark_defaults(&mut self) {
        let (legacy, greens) = (std::mem::take(&mut self.legacy), std::mem::take(&mut self.greens));
        legacy.iter().filter_map(Later::legacy).for_each(|end| self.add(end));
        greens
            .iter()
            .filter_map(|(later, green, life)| later.green(green, life))
            .for_each(|end| self.add(end));
    }

    /// The driver's error for a broken context, whose work will never be done. The work of all other contexts is done when
    /// [`CompletionMarker::look`] says so.
    pub fn broken(&self) -> Option<CuResult> {
        self.broken
    }

    /// Waits for the work that is marked so far. [`CompletionMarker::look`] says whether that was all.
    pub fn wait(&mut self) {
        for end in self.ends.drain(..) {
            if let Err(result) = end.wait() {
                self.broken = self.broken.or(Some(result));
            }
        }
    }

    /// A marker of the work of both.
    pub fn and(mut self, other: Self) -> Self {
        self.ends.extend(other.ends);
        self.legacy.extend(other.legacy);
        self.greens.extend(other.greens);
        self.broken = self.broken.or(other.broken);
        self
    }
}
