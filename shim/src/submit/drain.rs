//! Draining: waiting for the work that the application has submitted.
//!
//! Never by cuCtxSynchronize, which ruins a capture (docs/driver-facts.md), but by events, in two steps, so that nothing has to be
//! written down at a launch:
//!
//! 1. Each stream that the application has made, and that has work, gets an event.
//! 2. When those have passed, the legacy default stream of each context gets one: it comes after all earlier work of every
//!    blocking stream of the context, the threads' own default streams among them, which only their threads can name.
//!
//! An event in the legacy stream is a barrier: later work of all blocking streams waits for it. Made in the first step, it
//! would keep out what the work in front of it may be waiting for: the copy that a resident kernel spins for, in another
//! stream. So it comes when no stream that is known has work. (What tells how a stream's work gets on while it goes on is an
//! event in that stream alone, too: [`crate::submit::flow`].)
//!
//! While a stream captures nothing may be asked of it, and it can be marked by no event: that would be a part of its graph. The
//! legacy stream may not be used at all while a blocking stream captures. So a mark is usually neither made nor looked at
//! meanwhile; [`Streams::mark_beside`] makes one where it can be done ([`crate::submit::captures`]).
//!
//! A green context has default streams of its own, and is current to one thread at a time; so it is marked as a whole
//! (cuGreenCtxRecordEvent) from its primary context, and the streams that were made in it by themselves besides.
//!
//! Streams that a library makes by functions of cuGetExportTable are seen by nobody. Those that block the legacy stream, and
//! those of green contexts, are waited for all the same.
//!
//! Several threads may wait at a time, an engine and those that free memory: none takes an event away from
//! another that still needs it.

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::submit::green::Green;
use nvshare::units::Nanos;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard};

/// A stream that the application has made.
#[derive(Debug, Clone, Copy)]
pub struct Tracked {
    stream: CUstream,
    /// Where it is marked: its context, or the primary context of its green one.
    context: CUcontext,
    /// The green context that it is of.
    green: CUgreenCtx,
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
    greens: Vec<Green>,
    /// Streams that the application has made.
    streams: Vec<Tracked>,
    /// The ends of streams that were destroyed with work in them.
    orphans: Vec<Arc<StreamMarker>>,
    /// So many of them had not come when that was last looked at.
    orphans_ahead: usize,
}

impl Tracking {
    /// Lets those ends go that have come.
    fn drop_past_orphans(&mut self) {
        self.orphans.retain(|end| !end.is_past());
        self.orphans_ahead = self.orphans.len();
    }

    /// Remembers the end of a stream. Most processes make and destroy streams and never drain, so those that have come go
    /// whenever there are twice as many as had not: each is looked at twice, on average.
    fn add_orphan(&mut self, end: StreamMarker) {
        if self.orphans.len() >= 2 * self.orphans_ahead + FEW_ORPHANS {
            self.drop_past_orphans();
        }
        self.orphans.push(end.into());
    }
}

/// As many ends of destroyed streams as nobody needs to look through.
const FEW_ORPHANS: usize = 16;

/// What is known of a context that is about to end.
pub struct Parted {
    greens: Vec<Green>,
    streams: Vec<Tracked>,
    /// Ends of streams that were destroyed.
    orphans: Vec<Arc<StreamMarker>>,
    /// Its work may still be under way.
    busy: bool,
}

/// Contexts that are about to end with work that nobody can mark any more: the driver waits for it. Until then no mark has
/// passed.
static ENDING_BUSY: AtomicU32 = AtomicU32::new(0);

impl Drop for Parted {
    fn drop(&mut self) {
        if self.busy {
            ENDING_BUSY.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// Whether a context is there. Who uses it or its events reads this meanwhile, and who destroys it writes: an event that
/// went with its context is never given to the driver again, for which the handle may be another's. Of a green context the
/// primary one's is taken first.
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

/// Ends a context with `call`, which says whether it has ended, while nobody uses an event of it. The same handle may be
/// another context's afterwards.
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

/// An event at the end of a stream's work so far. Given back when dropped.
pub struct StreamMarker {
    driver: &'static Driver,
    context: CUcontext,
    life: Life,
    event: CUevent,
}

impl StreamMarker {
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
        let life = life(context);
        let _there = alive(&life).ok_or(CuResult::CONTEXT_IS_DESTROYED)?;
        let event = Self::recorded(driver, timed, |event| driver.event_record(event, stream))?;
        Ok(Self { driver, context, life: life.clone(), event })
    }

    /// An event, recorded or given back. The context is there, and stays so meanwhile.
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

    /// Whether it has come, or can never come.
    pub fn is_past(&self) -> bool {
        alive(&self.life).is_none_or(|_there| self.driver.event_is_past(self.event))
    }

    /// Waits until it has come.
    fn wait(&self) -> Result<(), CuResult> {
        alive(&self.life).map_or(Ok(()), |_there| self.driver.event_synchronize(self.event))
    }

    /// The GPU's time since an earlier one of the same stream, ns, if both are timed and past. `None` if there is no telling.
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

/// What work a stream had when it began to capture, or joined a capture.
#[derive(Clone)]
pub enum WorkBefore {
    /// It was idle.
    None,
    /// Its end.
    Until(Arc<StreamMarker>),
    /// That could not be told.
    Unknown,
}

impl WorkBefore {
    /// That of a stream that is not a default one, and that does not capture yet, marked from its context.
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

/// A moment in everything that was submitted, or somewhat later.
#[derive(Default)]
pub struct CompletionMarker {
    ends: Vec<Arc<StreamMarker>>,
    /// Contexts whose legacy streams are to be marked when the ends have passed.
    legacy: Vec<Later>,
    /// Green contexts that are to be marked as a whole, at the same moment.
    greens: Vec<(Later, Green, Life)>,
    /// What the driver said of a context that cannot be marked: it does no work any more.
    broken: Option<CuResult>,
}

/// A context to be marked in, which may have gone by then.
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

    /// Marks what has been submitted to the legacy stream, and to the streams that it waits for. `None` if the context has
    /// gone.
    fn legacy(&self) -> Option<Result<StreamMarker, CuResult>> {
        let _there = alive(&self.life)?;
        Some(self.end(|event| self.driver.event_record(event, CUstream::LEGACY)))
    }

    /// Marks what has been submitted in a green context of it, in whichever stream. `None` if either has gone.
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

impl Parted {
    /// The context is gone, and its green ones with it.
    pub fn gone(self) {
        self.greens.iter().for_each(|green| _ = end_life(green.context, || ((), true)));
    }
}

impl Streams {
    fn tracking(&self) -> MutexGuard<'_, Tracking> {
        nvshare::sync::lock(&self.tracked)
    }

    /// A context whose default streams may have work.
    pub fn add_context(&self, context: CUcontext) {
        let mut tracking = self.tracking();
        if !tracking.contexts.contains(&context) {
            tracking.contexts.push(context);
        }
    }

    /// The same, of a green context.
    pub fn add_green(&self, green: Green) {
        let mut tracking = self.tracking();
        if !tracking.greens.contains(&green) {
            tracking.greens.push(green);
        }
    }

    /// A green context is about to be destroyed. Its work goes on, so its end is remembered. It stays known for as long as
    /// it is there.
    pub fn mark_green(&self, driver: &'static Driver, green: &Green) {
        let (later, green, life) = Later::of_green(driver, green);
        if let Some(Ok(end)) = later.green(&green, &life) {
            self.tracking().add_orphan(end);
        }
    }

    /// A green context was destroyed: its streams are detached, and can do no more.
    pub fn remove_green(&self, green: &Green) {
        let mut tracking = self.tracking();
        tracking.greens.retain(|known| known != green);
        tracking.streams.retain(|known| known.green != green.green);
    }

    /// A context is about to go, and its green contexts and streams with it. All its work is done, or, if it may be `busy`, the
    /// driver will wait for it.
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

    /// The context did not go.
    pub fn rejoin(&self, context: CUcontext, mut parted: Parted) {
        self.add_context(context);
        let mut tracking = self.tracking();
        tracking.greens.append(&mut parted.greens);
        tracking.streams.append(&mut parted.streams);
        tracking.orphans.append(&mut parted.orphans);
    }

    /// A stream was made, in a context or in a green one of it. In a green one the legacy stream of the context waits for
    /// no stream.
    pub fn add(&self, stream: CUstream, context: CUcontext, green: CUgreenCtx, flags: u32) {
        let blocking = green.is_null() && flags & CU_STREAM_NON_BLOCKING == 0;
        self.tracking().streams.push(Tracked { stream, context, green, blocking });
    }

    /// A stream is about to be destroyed. Its work goes on, so its end is remembered, unless the legacy stream waits for it. An
    /// event in a stream that captures would become a part of the graph, and never come: such a stream has the work that it had
    /// `before` it captured. What was known of it, if anything.
    pub fn remove(
        &self,
        driver: &'static Driver,
        stream: CUstream,
        before: impl FnOnce() -> WorkBefore,
    ) -> Option<Tracked> {
        // A stream that is not known may have gone with its context. The driver destroys it by its handle all the same, and may
        // crash on it in any other call.
        if !self.tracking().streams.iter().any(|known| known.stream == stream) {
            return None;
        }
        let captures = driver.stream_capture_status(stream) != Ok(CU_STREAM_CAPTURE_STATUS_NONE);
        // Before the lock here: whoever marks beside a capture has the set of captures first.
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

    /// A stream was not destroyed after all.
    pub fn put_back(&self, stream: Tracked) {
        self.tracking().streams.push(stream);
    }

    /// Marks the present end of everything. No capture is open.
    pub fn mark(&self, driver: &'static Driver) -> CompletionMarker {
        self.mark_those(driver, |_| true, |_| true)
    }

    /// Marks the present end of everything although captures are open, if that can be done without ruining one. `before` tells
    /// of a stream that captures what work it had before. No stream begins or joins a capture meanwhile.
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
                    // Its context is broken: it does no work any more, captured or not.
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

    /// Whether the second step of a mark ruins no capture: none of a blocking stream is open. To mark a green context as a whole
    /// would ruin those of its streams.
    pub fn may_mark_defaults(&self, driver: &'static Driver) -> bool {
        let tracking = self.tracking();
        // The driver answers with an error if the legacy stream may not be used now, and ruins nothing.
        let status = |context: &CUcontext| {
            let _current = Current::new(driver, *context)?;
            driver.stream_capture_status(CUstream::LEGACY)
        };
        // A context that is broken does no work any more.
        let usable = |context| match status(context) {
            Ok(status) => status == CU_STREAM_CAPTURE_STATUS_NONE,
            Err(result) => !result.is_of_capture(),
        };
        tracking.greens.is_empty() && tracking.contexts.iter().all(usable)
    }

    /// Marks the present end of all work in a context and its green ones.
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
            // To ask costs less than an event, and most streams of most programs have no work.
            if driver.stream_query(*stream) == Err(CuResult::NOT_READY) {
                mark.add(end_of(driver, *context, *stream));
            }
        }
        mark
    }
}

/// The end of a stream's work so far, marked from this context.
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

    /// Whether everything before it is done, or can never be. No capture is open.
    pub fn look(&mut self) -> bool {
        self.ends.retain(|end| !end.is_past());
        if self.ends.is_empty() && !self.is_complete() {
            self.mark_defaults();
            self.ends.retain(|end| !end.is_past());
        }
        self.ends.is_empty() && ENDING_BUSY.load(Ordering::Acquire) == 0
    }

    /// Whether what is marked already is done. Marks nothing more.
    pub fn has_passed(&mut self) -> bool {
        self.ends.retain(|end| !end.is_past());
        self.ends.is_empty()
    }

    /// Whether it marks nothing more.
    pub fn is_complete(&self) -> bool {
        self.legacy.is_empty() && self.greens.is_empty()
    }

    /// How much of it is not done yet, in no unit: it gets less, and none means that all is done.
    pub fn left(&self) -> usize {
        self.ends.len() + self.legacy.len() + self.greens.len()
    }

    /// The default streams, and whatever stream of a green context is not known.
    fn mark_defaults(&mut self) {
        let (legacy, greens) = (std::mem::take(&mut self.legacy), std::mem::take(&mut self.greens));
        legacy.iter().filter_map(Later::legacy).for_each(|end| self.add(end));
        greens
            .iter()
            .filter_map(|(later, green, life)| later.green(green, life))
            .for_each(|end| self.add(end));
    }

    /// What the driver said of a context that is broken, whose work will never be done. All other is, once
    /// [`CompletionMarker::look`] says so.
    pub fn broken(&self) -> Option<CuResult> {
        self.broken
    }

    /// Waits for what is marked already. [`CompletionMarker::look`] says whether that was all.
    pub fn wait(&mut self) {
        for end in self.ends.drain(..) {
            if let Err(result) = end.wait() {
                self.broken = self.broken.or(Some(result));
            }
        }
    }

    /// This moment in one GPU's work, and that one in another's.
    pub fn and(mut self, other: Self) -> Self {
        self.ends.extend(other.ends);
        self.legacy.extend(other.legacy);
        self.greens.extend(other.greens);
        self.broken = self.broken.or(other.broken);
        self
    }
}
