//! Draining: waiting for the work that the application has submitted.
//!
//! Never by cuCtxSynchronize, which ruins a capture (DESIGN section 2), but by events. An event in the
//! legacy default stream comes after all earlier work of every *blocking* stream of its context, the
//! per-thread default streams among them; streams made with CU_STREAM_NON_BLOCKING get an event each.
//! So nothing has to be written down at a launch.
//!
//! A mark in the legacy stream is itself forbidden while a blocking stream captures: callers make sure
//! that no capture is open ([`crate::session`]).

use crate::abi::*;
use crate::driver::Driver;
use std::sync::{Mutex, MutexGuard};

#[derive(Debug, Clone, Copy)]
struct Tracked {
    stream: CUstream,
    context: CUcontext,
}

/// The streams that a process has, and the contexts whose default streams count too.
#[derive(Debug, Default)]
pub struct Streams {
    tracked: Mutex<Tracking>,
}

#[derive(Debug, Default)]
struct Tracking {
    contexts: Vec<CUcontext>,
    /// Streams that the legacy stream does not wait for.
    independent: Vec<Tracked>,
    /// Events at the end of streams that were destroyed with work in them.
    orphans: Vec<(CUcontext, CUevent)>,
}

/// A moment in everything that was submitted.
pub struct Mark {
    events: Vec<(CUcontext, CUevent)>,
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

fn record(driver: &Driver, context: CUcontext, stream: CUstream) -> Result<(CUcontext, CUevent), CuResult> {
    let event = driver.event_create(CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING)?;
    if let Err(error) = driver.event_record(event, stream) {
        let _ = driver.event_destroy(event);
        return Err(error);
    }
    Ok((context, event))
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
        tracking.independent.retain(|known| known.context != context);
        tracking.orphans.retain(|(of, _)| *of != context);
    }

    /// A stream was made.
    pub fn add(&self, stream: CUstream, context: CUcontext, flags: u32) {
        if flags & CU_STREAM_NON_BLOCKING != 0 {
            self.tracking().independent.push(Tracked { stream, context });
        }
    }

    /// A stream is about to be destroyed. Its work goes on, so its end is remembered.
    pub fn remove(&self, driver: &Driver, stream: CUstream) {
        let mut tracking = self.tracking();
        let Some(index) = tracking.independent.iter().position(|known| known.stream == stream) else {
            return;
        };
        let Tracked { context, .. } = tracking.independent.swap_remove(index);
        let end = Current::new(driver, context).and_then(|_current| record(driver, context, stream));
        // A stream that cannot be marked (a capture is open in it) has no work that it has submitted.
        if let Ok(end) = end {
            tracking.orphans.push(end);
        }
    }

    /// Marks the present end of everything.
    ///
    /// # Errors
    /// The driver's, if an event cannot be recorded: its context is broken.
    pub fn mark(&self, driver: &Driver) -> Result<Mark, CuResult> {
        let mut tracking = self.tracking();
        let mut mark = Mark { events: std::mem::take(&mut tracking.orphans) };
        let streams = tracking
            .contexts
            .iter()
            .map(|context| Tracked { stream: CUstream::LEGACY, context: *context })
            .chain(tracking.independent.iter().copied());
        for Tracked { stream, context } in streams {
            let event = Current::new(driver, context).and_then(|_current| record(driver, context, stream));
            match event {
                Ok(event) => mark.events.push(event),
                Err(error) => {
                    mark.destroy(driver);
                    return Err(error);
                }
            }
        }
        Ok(mark)
    }

    /// Keeps an unfinished mark, so that a later one covers it.
    pub fn keep(&self, mark: Mark) {
        self.tracking().orphans.extend(mark.events);
    }

    /// Waits for everything that has been submitted so far.
    ///
    /// # Errors
    /// The driver's: a context is broken, and what it had to do will never be done.
    pub fn wait(&self, driver: &Driver) -> Result<(), CuResult> {
        self.mark(driver)?.wait(driver)
    }
}

impl Mark {
    /// Waits until everything before it is done.
    ///
    /// # Errors
    /// The driver's.
    pub fn wait(self, driver: &Driver) -> Result<(), CuResult> {
        let done = self.events.iter().try_for_each(|(_, event)| driver.event_synchronize(*event));
        self.destroy(driver);
        done
    }

    /// Whether everything before it is done, or can never be.
    pub fn is_done(&self, driver: &Driver) -> bool {
        self.events.iter().all(|(_, event)| driver.event_query(*event) != Err(CuResult::NOT_READY))
    }

    /// Gives the events back.
    pub fn destroy(self, driver: &Driver) {
        for (_, event) in self.events {
            let _ = driver.event_destroy(event);
        }
    }
}
