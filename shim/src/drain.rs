//! Draining: waiting for the work that the application has submitted.
//!
//! Never by cuCtxSynchronize, which ruins a capture (DESIGN section 2), but by events. An event in the
//! legacy default stream comes after all earlier work of every *blocking* stream of its context, the
//! per-thread default streams among them; streams made with CU_STREAM_NON_BLOCKING get an event each.
//! So nothing has to be written down at a launch.
//!
//! (Such an event is a barrier, too: later work of the blocking streams waits for it. A drain has none. What tells how a
//! stream's work gets on while it goes on is an event in that stream alone: [`crate::flow`].)
//!
//! A mark in the legacy stream is itself forbidden while a blocking stream captures: callers make sure
//! that no capture is open ([`crate::session`]).
//!
//! Several threads may wait at a time, an engine and those that free memory: none takes an event away from
//! another that still needs it.

use crate::abi::*;
use crate::driver::Driver;
use nvshare::units::Nanos;
use std::sync::{Arc, Mutex, MutexGuard};

/// A stream that the application has made.
#[derive(Debug, Clone, Copy)]
pub struct Tracked {
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
    /// So many of them had not come when that was last looked at.
    orphans_ahead: usize,
}

impl Tracking {
    /// Lets those ends go that have come.
    fn forget_orphans(&mut self) {
        self.orphans.retain(|end| !end.is_past());
        self.orphans_ahead = self.orphans.len();
    }

    /// Remembers the end of a stream. Most processes make and destroy streams and never drain, so those that have come go
    /// whenever there are twice as many as had not: each is looked at twice, on average.
    fn add_orphan(&mut self, end: End) {
        if self.orphans.len() >= 2 * self.orphans_ahead + FEW_ORPHANS {
            self.forget_orphans();
        }
        self.orphans.push(end.into());
    }
}

/// As many ends of destroyed streams as nobody needs to look through.
const FEW_ORPHANS: usize = 16;

/// An event at the end of a stream's work so far. Given back when dropped.
pub struct End {
    driver: &'static Driver,
    context: CUcontext,
    event: CUevent,
}

impl End {
    /// Of a stream of the context that is current; timed or not.
    ///
    /// # Errors
    /// The driver's.
    pub fn record(
        driver: &'static Driver,
        context: CUcontext,
        stream: CUstream,
        timed: bool,
    ) -> Result<Self, CuResult> {
        let timing = if timed { 0 } else { CU_EVENT_DISABLE_TIMING };
        let event = driver.event_create(CU_EVENT_BLOCKING_SYNC | timing)?;
        let end = Self { driver, context, event };
        driver.event_record(event, stream)?;
        Ok(end)
    }

    /// Whether it has come, or can never come.
    pub fn is_past(&self) -> bool {
        self.driver.event_query(self.event) != Err(CuResult::NOT_READY)
    }

    /// The GPU's time since an earlier one of the same stream, ns, if both are timed and past. `None` if there is no telling.
    pub fn since(&self, earlier: &Self) -> Option<Nanos> {
        let milliseconds = self.driver.event_elapsed_ms(earlier.event, self.event).ok()?;
        Some((f64::from(milliseconds) * 1e6) as Nanos)
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
    /// What was known of it, if anything.
    pub fn remove(&self, driver: &'static Driver, stream: CUstream) -> Option<Tracked> {
        let mut tracking = self.tracking();
        let index = tracking.streams.iter().position(|known| known.stream == stream)?;
        let tracked @ Tracked { context, blocking, .. } = tracking.streams.swap_remove(index);
        if blocking {
            return Some(tracked);
        }
        let end =
            Current::new(driver, context).and_then(|_current| End::record(driver, context, stream, false));
        // A stream that cannot be marked (a capture is open in it) has no work that it has submitted.
        if let Ok(end) = end {
            tracking.add_orphan(end);
        }
        Some(tracked)
    }

    /// A stream was not destroyed after all.
    pub fn put_back(&self, stream: Tracked) {
        self.tracking().streams.push(stream);
    }

    /// Marks the present end of everything.
    pub fn mark(&self, driver: &'static Driver) -> Mark {
        let mut tracking = self.tracking();
        tracking.forget_orphans();
        let mut mark = Mark { ends: tracking.orphans.clone(), broken: None };
        let legacy = tracking.contexts.iter().map(|context| (CUstream::LEGACY, *context));
        let own = tracking.streams.iter().filter(|tracked| !tracked.blocking);
        for (stream, context) in legacy.chain(own.map(|tracked| (tracked.stream, tracked.context))) {
            match Current::new(driver, context)
                .and_then(|_current| End::record(driver, context, stream, false))
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

    /// This moment in one GPU's work, and that one in another's.
    pub fn and(mut self, other: Self) -> Self {
        self.ends.extend(other.ends);
        self.broken = self.broken.or(other.broken);
        self
    }
}
