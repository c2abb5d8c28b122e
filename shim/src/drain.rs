//! Draining: waiting for the work that the application has submitted.
//!
//! Never by cuCtxSynchronize, which ruins a capture (DESIGN section 2), but by events. An event in the
//! legacy default stream comes after all earlier work of every *blocking* stream of its context, the
//! per-thread default streams among them; streams made with CU_STREAM_NON_BLOCKING get an event each.
//! So nothing has to be written down at a launch.
//!
//! Such an event is a barrier, too: later work of the blocking streams waits for it. A drain has none, so it does no harm
//! there. What tells how work gets on while it goes on ([`Purpose::Pace`]) must not be one: there each blocking stream gets
//! an event of its own, which comes after all earlier work of the legacy stream as well. Only where that cannot be known
//! to be all, because threads have used default streams of their own, or where there is nothing to join, it is the
//! legacy stream's.
//!
//! A mark in the legacy stream is itself forbidden while a blocking stream captures: callers make sure
//! that no capture is open ([`crate::session`]).
//!
//! Several threads may wait at a time, an engine and those that free memory: none takes an event away from
//! another that still needs it.

use crate::abi::*;
use crate::driver::Driver;
use nvshare::units::Nanos;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

#[derive(Debug, Clone, Copy)]
struct Tracked {
    stream: CUstream,
    context: CUcontext,
    /// The legacy stream waits for it.
    blocking: bool,
}

/// The streams that a process has, and the contexts whose default streams count too.
#[derive(Default)]
pub struct Streams {
    tracked: Mutex<Tracking>,
}

#[derive(Default)]
struct Tracking {
    contexts: Vec<CUcontext>,
    /// Streams that the application has made.
    streams: Vec<Tracked>,
    /// The ends of streams that were destroyed with work in them.
    orphans: Vec<Arc<End>>,
}

/// An event at the end of a stream's work so far. Given back when dropped.
struct End {
    driver: &'static Driver,
    context: CUcontext,
    stream: CUstream,
    event: CUevent,
}

/// What a mark is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To wait for everything.
    Drain,
    /// To see, and time, how work gets on, without being in its way.
    Pace,
}

/// Threads have used default streams of their own, by the entry points that mean these. (Such a stream that is named by its
/// handle is not noticed. It matters to the pace alone, and beside blocking streams alone: more is in flight then.)
static PER_THREAD: AtomicBool = AtomicBool::new(false);

/// A thread submits to its own default stream.
#[inline]
pub fn per_thread() {
    if !PER_THREAD.load(Ordering::Relaxed) {
        PER_THREAD.store(true, Ordering::Relaxed);
    }
}

impl End {
    /// In the context that is current.
    fn record(
        driver: &'static Driver,
        context: CUcontext,
        stream: CUstream,
        purpose: Purpose,
    ) -> Result<Self, CuResult> {
        let timing = if purpose == Purpose::Pace { 0 } else { CU_EVENT_DISABLE_TIMING };
        let event = driver.event_create(CU_EVENT_BLOCKING_SYNC | timing)?;
        let end = Self { driver, context, stream, event };
        driver.event_record(event, stream)?;
        Ok(end)
    }

    /// Whether it has come, or can never come.
    fn is_past(&self) -> bool {
        self.driver.event_query(self.event) != Err(CuResult::NOT_READY)
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.driver.event_destroy(self.event);
    }
}

/// A moment in everything that was submitted.
#[derive(Default)]
pub struct Mark {
    ends: Vec<Arc<End>>,
    /// What the driver said of a context that cannot be marked: it does no work any more.
    broken: Option<CuResult>,
}

/// Makes `context` current for as long as this lives.
pub struct Current<'a>(&'a Driver);

impl<'a> Current<'a> {
    /// Makes it current.
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

impl Streams {
    fn tracking(&self) -> MutexGuard<'_, Tracking> {
        self.tracked.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// A context whose default streams may have work.
    pub fn add_context(&self, context: CUcontext) {
        let mut tracking = self.tracking();
        if !tracking.contexts.contains(&context) {
            tracking.contexts.push(context);
        }
    }

    /// A context is about to go, and its streams with it.
    pub fn remove_context(&self, context: CUcontext) {
        let mut tracking = self.tracking();
        tracking.contexts.retain(|known| *known != context);
        tracking.streams.retain(|known| known.context != context);
        tracking.orphans.retain(|end| end.context != context);
    }

    /// A stream was made.
    pub fn add(&self, stream: CUstream, context: CUcontext, flags: u32) {
        let blocking = flags & CU_STREAM_NON_BLOCKING == 0;
        self.tracking().streams.push(Tracked { stream, context, blocking });
    }

    /// A stream is about to be destroyed. Its work goes on, so its end is remembered, unless the legacy stream waits for it.
    pub fn remove(&self, driver: &'static Driver, stream: CUstream) {
        let mut tracking = self.tracking();
        let Some(index) = tracking.streams.iter().position(|known| known.stream == stream) else {
            return;
        };
        let Tracked { context, blocking, .. } = tracking.streams.swap_remove(index);
        if blocking {
            return;
        }
        let end = Current::new(driver, context)
            .and_then(|_current| End::record(driver, context, stream, Purpose::Drain));
        // A stream that cannot be marked (a capture is open in it) has no work that it has submitted.
        if let Ok(end) = end {
            tracking.orphans.push(end.into());
        }
    }

    /// Marks the present end of everything.
    pub fn mark(&self, driver: &'static Driver, purpose: Purpose) -> Mark {
        let mut tracking = self.tracking();
        tracking.orphans.retain(|end| !end.is_past());
        let mut mark = Mark { ends: tracking.orphans.clone(), broken: None };
        let by_stream = purpose == Purpose::Pace && !PER_THREAD.load(Ordering::Relaxed);
        let has_blocking =
            |context| tracking.streams.iter().any(|stream| stream.blocking && stream.context == context);
        let legacy = tracking.contexts.iter().filter(|context| !(by_stream && has_blocking(**context)));
        let own = tracking.streams.iter().filter(|stream| by_stream || !stream.blocking);
        let streams = legacy
            .map(|context| (CUstream::LEGACY, *context))
            .chain(own.map(|tracked| (tracked.stream, tracked.context)));
        for (stream, context) in streams {
            match Current::new(driver, context)
                .and_then(|_current| End::record(driver, context, stream, purpose))
            {
                Ok(end) => mark.ends.push(end.into()),
                Err(error) => mark.broken = mark.broken.or(Some(error)),
            }
        }
        mark
    }
}

impl Mark {
    /// Waits until everything before it is done.
    ///
    /// # Errors
    /// The driver's: a context is broken, and what it had to do will never be done. All else is.
    pub fn wait(self) -> Result<(), CuResult> {
        let mut result = self.broken.map_or(Ok(()), Err);
        for end in &self.ends {
            result = result.and(end.driver.event_synchronize(end.event));
        }
        result
    }

    /// Whether everything before it is done, or can never be.
    pub fn is_done(&self) -> bool {
        self.ends.iter().all(|end| end.is_past())
    }

    /// The GPU's time from an earlier mark to this one, ns: of the stream that took longest. Both are timed and done.
    /// `None` if there is no telling.
    pub fn since(&self, earlier: &Self) -> Option<Nanos> {
        let between = |end: &Arc<End>| {
            let same = |other: &&Arc<End>| other.context == end.context && other.stream == end.stream;
            let from = earlier.ends.iter().find(same)?;
            let milliseconds = end.driver.event_elapsed_ms(from.event, end.event).ok()?;
            Some((f64::from(milliseconds) * 1e6) as Nanos)
        };
        self.ends.iter().filter_map(between).max()
    }

    /// This moment in one GPU's work, and that one in another's.
    pub fn and(mut self, other: Self) -> Self {
        self.ends.extend(other.ends);
        self.broken = self.broken.or(other.broken);
        self
    }
}
