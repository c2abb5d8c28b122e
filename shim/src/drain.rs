//! Draining: waiting for the work that the application has submitted.
//!
//! Never by cuCtxSynchronize, which ruins a capture (DESIGN section 2), but by events, in two steps, so that nothing has to be
//! written down at a launch:
//!
//! 1. Each stream that the application has made, and that has work, gets an event.
//! 2. When those have passed, the legacy default stream of each context gets one: it comes after all earlier work of every
//!    blocking stream of the context, the threads' own default streams among them, which only their threads can name.
//!
//! An event in the legacy stream is a barrier: later work of all blocking streams waits for it. Made in the first step, it
//! would keep out what the work in front of it may be waiting for: the copy that a resident kernel spins for, in another
//! stream. So it comes when no stream that is known has work. (What tells how a stream's work gets on while it goes on is an
//! event in that stream alone, too: [`crate::flow`].)
//!
//! Neither is allowed while a stream captures: a mark that is made, or looked at, meanwhile is not past.
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

/// A moment in everything that was submitted, or somewhat later.
#[derive(Default)]
pub struct Mark {
    ends: Vec<Arc<End>>,
    /// Contexts whose legacy streams are to be marked when the ends have passed.
    legacy: Vec<(&'static Driver, CUcontext)>,
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

    /// Marks the present end of everything. No capture is open.
    pub fn mark(&self, driver: &'static Driver) -> Mark {
        let mut tracking = self.tracking();
        tracking.forget_orphans();
        let legacy = tracking.contexts.iter().map(|context| (driver, *context)).collect();
        let mut mark = Mark { ends: tracking.orphans.clone(), legacy, broken: None };
        for Tracked { stream, context, .. } in &tracking.streams {
            // To ask costs less than an event, and most streams of most programs have no work.
            if driver.stream_query(*stream) == Err(CuResult::NOT_READY) {
                mark.add(driver, *context, *stream);
            }
        }
        mark
    }
}

impl Mark {
    fn add(&mut self, driver: &'static Driver, context: CUcontext, stream: CUstream) {
        match Current::new(driver, context).and_then(|_current| End::record(driver, context, stream, false)) {
            Ok(end) => self.ends.push(end.into()),
            Err(error) => self.broken = self.broken.or(Some(error)),
        }
    }

    /// Whether everything before it is done, or can never be. No capture is open.
    pub fn look(&mut self) -> bool {
        self.ends.retain(|end| !end.is_past());
        if self.ends.is_empty() && !self.legacy.is_empty() {
            self.mark_legacy();
            self.ends.retain(|end| !end.is_past());
        }
        self.ends.is_empty()
    }

    /// Whether what is marked already is done. Marks nothing more.
    pub fn has_passed(&mut self) -> bool {
        self.ends.retain(|end| !end.is_past());
        self.ends.is_empty()
    }

    /// How much of it is not done yet, in no unit: it gets less, and none means that all is done.
    pub fn left(&self) -> usize {
        self.ends.len() + self.legacy.len()
    }

    fn mark_legacy(&mut self) {
        for (driver, context) in std::mem::take(&mut self.legacy) {
            self.add(driver, context, CUstream::LEGACY);
        }
    }

    /// What the driver said of a context that is broken, whose work will never be done. All other is, once
    /// [`Mark::look`] says so.
    pub fn broken(&self) -> Option<CuResult> {
        self.broken
    }

    /// Waits for what is marked already. [`Mark::look`] says whether that was all.
    pub fn wait(&mut self) {
        for end in self.ends.drain(..) {
            if let Err(result) = end.driver.event_synchronize(end.event) {
                self.broken = self.broken.or(Some(result));
            }
        }
    }

    /// This moment in one GPU's work, and that one in another's.
    pub fn and(mut self, other: Self) -> Self {
        self.ends.extend(other.ends);
        self.legacy.extend(other.legacy);
        self.broken = self.broken.or(other.broken);
        self
    }
}
