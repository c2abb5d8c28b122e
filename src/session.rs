//! A client with a thread of its own, for programs that have threads or tasks.
//!
//! A [`Client`] belongs to one thread, which must look at the page whenever its doorbell rings: also while the program has nothing to
//! do on the GPU, because others may need the memory that it has there. A [`Session`] is that thread. It walks the client through its
//! phases and moves memory through the [`Runtime`]; the program's own threads only *enter* before they use the GPU and *leave*
//! afterwards:
//!
//! ```text
//!   a thread of the program             the session's thread
//!   ───────────────────────             ─────────────────────────────────────────────────
//!   enter() ───────────────────────────▶ asks for the GPU, waits, brings the memory in
//!   has a Pass: submits work  ◀───────── opens the gate
//!     should_yield() is true  ◀───────── somebody waits, and the slice is over: shuts the gate
//!   waits for its work, drops the Pass ▶ the last pass is back: evicts when it is asked to
//! ```
//!
//! Any number of threads may have a pass at a time. Memory is in place while somebody has one, and is moved only while nobody has. So
//! whoever has a pass waits for its own work before dropping it, and must not wait for a thread that is about to enter: that thread may
//! wait for the pass. While nobody has a pass, the client keeps the GPU until somebody else needs it for longer than the
//! operator's `--idle-grace`.
//!
//! [`Session::entering`] is the same for asynchronous programs: a future that blocks no executor.
//!
//! After fork(2) the child has neither the thread nor the page. Every function here says so by [`SessionError::Forked`], and dropping
//! a session or a pass there does nothing. The child may register for itself.

use crate::books::Books;
use crate::client::{Client, Next, Runtime};
use crate::map::MappedPage;
use crate::memory_info::MemoryInfo;
use crate::page::{Page, Phase};
use crate::quiet_thread;
use crate::snapshot::Snapshot;
use crate::sync::now;
use crate::units::{Granules, Nanos, bytes_of, format_size};
use std::collections::BTreeMap;
use std::future::Future;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What a runtime's errors must be, so that every thread of the program can be told.
pub type RuntimeError = dyn std::error::Error + Send + Sync;

/// Why a program cannot use the GPU through its session.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SessionError {
    /// The runtime could not move memory. The client has left, and the session cannot go on.
    #[error("the session has ended, because memory could not be moved: {0}")]
    Runtime(Arc<RuntimeError>),
    /// The runtime panicked. The client has left, and the session cannot go on.
    #[error("the session has ended, because its runtime panicked: {0}")]
    Panicked(String),
    /// The session was closed.
    #[error("the session is closed")]
    Closed,
    /// This is a child of the process that has the session.
    #[error(
        "this process was forked from the one that has the session (pid {parent}): a client is one process, so register again in the child"
    )]
    Forked {
        /// The process that has the session.
        parent: u32,
    },
    /// The GPU did not come in time.
    #[error("the GPU did not come within {0:?}")]
    TimedOut(Duration),
    /// The memory would never fit.
    #[error(
        "{} more is more than this client can have on the GPU: {} are left, beside what others have that cannot move, and within its memory limit",
        format_size(*wanted), format_size(*left)
    )]
    TooLarge {
        /// Bytes wanted.
        wanted: u64,
        /// Bytes that it can have at most.
        left: u64,
    },
}

/// What the session's thread and the program's threads have in common.
struct State {
    /// Passes are given: all memory is in place.
    open: bool,
    /// Passes that are out.
    inside: usize,
    /// Threads and futures that wait for a pass.
    waiting: usize,
    /// The futures among them that have been polled.
    wakers: BTreeMap<u64, Waker>,
    next_waker: u64,
    /// The client needs more memory than it had when the gate last opened.
    grown: bool,
    closing: bool,
    /// Since when nobody has had a pass or waited for one, ns.
    quiet_since: Nanos,
    /// Why nobody gets a pass any more.
    end: Option<SessionError>,
}

struct Shared<P> {
    books: Books<P>,
    pid: u32,
    state: Mutex<State>,
    /// For threads that wait for a pass.
    changed: Condvar,
    /// The same as `State::open`, for a look without the lock.
    open: AtomicBool,
}

impl<P: Deref<Target = Page>> Shared<P> {
    fn state(&self) -> MutexGuard<'_, State> {
        // No panic leaves it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_open(&self, state: &mut State, open: bool) {
        state.open = open;
        self.open.store(open, Ordering::Release);
    }

    /// Wakes all who wait for a pass. Without the lock: a waker is the executor's code, which may poll or drop a future of ours at once.
    fn wake(&self, mut state: MutexGuard<'_, State>) {
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        self.changed.notify_all();
        wakers.into_values().for_each(Waker::wake);
    }

    /// Wakes the session's thread.
    fn ring(&self) {
        self.books.page().ring(self.books.slot());
    }

    fn check_process(&self) -> Result<(), SessionError> {
        if std::process::id() == self.pid { Ok(()) } else { Err(SessionError::Forked { parent: self.pid }) }
    }

    /// A pass, if the gate is open; `None` if not yet.
    fn try_pass(self: &Arc<Self>, state: &mut State) -> Result<Option<Pass<P>>, SessionError> {
        if let Some(end) = &state.end {
            return Err(end.clone());
        }
        if state.closing {
            return Err(SessionError::Closed);
        }
        if !state.open {
            return Ok(None);
        }
        state.inside += 1;
        Ok(Some(Pass { shared: self.clone() }))
    }

    fn no_longer_waits(&self, state: &mut State) {
        state.waiting -= 1;
        if state.waiting == 0 && state.inside == 0 {
            state.quiet_since = now();
        }
    }

    /// Waits until the last pass is back: work may use the memory until then.
    fn wait_for_passes(&self) {
        loop {
            let seen = self.books.page().doorbell(self.books.slot());
            if self.state().inside == 0 {
                return;
            }
            self.books.page().wait_doorbell(self.books.slot(), seen, None);
        }
    }

    fn end(&self, why: SessionError) {
        let mut state = self.state();
        state.end = Some(why);
        self.set_open(&mut state, false);
        self.wake(state);
    }
}

/// A client with a thread of its own. Its functions may be called from every thread of the process that made it.
pub struct Session<P: Deref<Target = Page> = MappedPage> {
    shared: Arc<Shared<P>>,
    thread: Option<JoinHandle<()>>,
}

/// The right to use the GPU: all of the client's memory stays in place until this is dropped. Whoever has it waits for the work that
/// it has submitted before dropping it.
#[must_use = "the memory may move as soon as this is dropped"]
pub struct Pass<P: Deref<Target = Page> = MappedPage> {
    shared: Arc<Shared<P>>,
}

impl<P: Deref<Target = Page>> Pass<P> {
    /// Whether to drop this soon, because somebody else waits and this client's slice is over. One load.
    pub fn should_yield(&self) -> bool {
        !self.shared.open.load(Ordering::Acquire)
    }
}

impl<P: Deref<Target = Page>> Drop for Pass<P> {
    fn drop(&mut self) {
        if self.shared.check_process().is_err() {
            return;
        }
        let mut state = self.shared.state();
        state.inside -= 1;
        if state.inside == 0 {
            state.quiet_since = now();
            drop(state);
            // It may be awaited, or be the last one before the session closes.
            self.shared.ring();
        }
    }
}

impl<P> Session<P>
where
    P: Deref<Target = Page> + Clone + Send + Sync + 'static,
{
    /// Starts the thread. It owns the client and the runtime, and drops the runtime before the client leaves: what the runtime frees
    /// when it is dropped is free for others then.
    ///
    /// # Errors
    /// No thread can be made. The client has left.
    pub fn start<R>(client: Client<P>, runtime: R) -> std::io::Result<Self>
    where
        R: Runtime + Send + 'static,
        R::Error: std::error::Error + Send + Sync + 'static,
    {
        let state = State {
            open: false,
            inside: 0,
            waiting: 0,
            wakers: BTreeMap::new(),
            next_waker: 0,
            grown: false,
            closing: false,
            quiet_since: now(),
            end: None,
        };
        let shared = Arc::new(Shared {
            books: client.books().clone(),
            pid: std::process::id(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            open: AtomicBool::new(false),
        });
        let (books, own) = (shared.books.clone(), shared.clone());
        let builder = std::thread::Builder::new().name("nvshare-session".into());
        let thread = quiet_thread::spawn(builder, move || Walker { client, runtime, shared: own }.run())
            .inspect_err(|_| books.end(0))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// The client's books, for the program's threads. Not to be used in a forked child, which does not have the page.
    pub fn books(&self) -> &Books<P> {
        &self.shared.books
    }

    /// Waits until the GPU is this client's and all its memory is in place.
    ///
    /// # Errors
    /// The session has ended, or this is a forked child.
    pub fn enter(&self) -> Result<Pass<P>, SessionError> {
        self.enter_until(None)
    }

    /// The same, for at most `timeout`.
    ///
    /// # Errors
    /// As for [`Session::enter`], and [`SessionError::TimedOut`]: then the client no longer asks for the GPU because of this call.
    pub fn enter_within(&self, timeout: Duration) -> Result<Pass<P>, SessionError> {
        // A time that cannot be told is one that does not come.
        self.enter_until(Instant::now().checked_add(timeout).map(|end| (end, timeout)))
    }

    fn enter_until(&self, end: Option<(Instant, Duration)>) -> Result<Pass<P>, SessionError> {
        self.shared.check_process()?;
        let mut state = self.shared.state();
        if let Some(pass) = self.shared.try_pass(&mut state)? {
            return Ok(pass);
        }
        state.waiting += 1;
        self.shared.ring();
        let entered = loop {
            state = match end {
                None => self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some((end, timeout)) => {
                    let left = end.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break Err(SessionError::TimedOut(timeout));
                    }
                    self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
            match self.shared.try_pass(&mut state) {
                Ok(None) => {}
                Ok(Some(pass)) => break Ok(pass),
                Err(error) => break Err(error),
            }
        };
        self.shared.no_longer_waits(&mut state);
        drop(state);
        if entered.is_err() {
            // It may take the request back.
            self.shared.ring();
        }
        entered
    }

    /// As [`Session::enter`], as a future: it asks for the GPU when it is first polled, and takes the request back when it is dropped.
    pub fn entering(&self) -> Entering<P> {
        Entering { shared: self.shared.clone(), waits: false, waker: None }
    }

    /// Raises the client's demand by `granules`. `add` then puts the memory where [`Runtime::fill`] finds it; it must not call the
    /// session. The memory is in place from the next pass on. Passes that are out keep what they have, and should be dropped soon
    /// ([`Pass::should_yield`] becomes true).
    ///
    /// # Errors
    /// The client could never have so much ([`SessionError::TooLarge`]; `add` was not called), or this is a forked child.
    pub fn grow(&self, granules: Granules, add: impl FnOnce()) -> Result<(), SessionError> {
        self.shared.check_process()?;
        {
            // The thread opens the gate under this lock, so it cannot open it between the two.
            let mut state = self.shared.state();
            let left = self.memory_info().free;
            if left < bytes_of(granules) {
                return Err(SessionError::TooLarge { wanted: bytes_of(granules), left });
            }
            self.shared.set_open(&mut state, false);
            state.grown = true;
            self.shared.books.grow(granules);
            add();
        }
        self.shared.ring();
        Ok(())
    }

    /// Lowers the client's demand by `granules`, which the caller has freed and, as far as they were on the GPU, given back
    /// ([`Books::give`]).
    ///
    /// # Errors
    /// This is a forked child.
    pub fn shrink(&self, granules: Granules) -> Result<(), SessionError> {
        self.shared.check_process()?;
        self.shared.books.shrink(granules);
        Ok(())
    }

    /// How much memory there is for this client, in bytes. Not to be used in a forked child.
    pub fn memory_info(&self) -> MemoryInfo {
        let (page, slot) = (self.shared.books.page(), self.shared.books.slot());
        let snapshot = Snapshot::take(page, page.admitted());
        MemoryInfo::of(&snapshot, Some(slot), page.memory_limit(slot), 0)
    }

    /// Ends the session: nobody gets a pass any more; when the last pass is back, the runtime is dropped and the client leaves.
    /// Waits for that. Dropping the session does the same.
    ///
    /// # Errors
    /// Why the session had ended before, or that this is a forked child.
    pub fn close(mut self) -> Result<(), SessionError> {
        self.shared.check_process()?;
        self.end_thread();
        match self.shared.state().end.take() {
            None | Some(SessionError::Closed) => Ok(()),
            Some(error) => Err(error),
        }
    }
}

impl<P: Deref<Target = Page>> Session<P> {
    fn end_thread(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        let mut state = self.shared.state();
        state.closing = true;
        self.shared.set_open(&mut state, false);
        self.shared.wake(state);
        self.shared.ring();
        // It catches its panics.
        let _ = thread.join();
    }
}

impl<P: Deref<Target = Page>> Drop for Session<P> {
    fn drop(&mut self) {
        if self.shared.check_process().is_ok() {
            self.end_thread();
        } else {
            // The thread is the parent's, and so is the page: nothing may be told to either.
            std::mem::forget(self.thread.take());
        }
    }
}

/// A future of a pass ([`Session::entering`]).
#[must_use = "a future does nothing unless it is polled"]
pub struct Entering<P: Deref<Target = Page> = MappedPage> {
    shared: Arc<Shared<P>>,
    /// It counts among those that wait.
    waits: bool,
    waker: Option<u64>,
}

impl<P: Deref<Target = Page>> Future for Entering<P> {
    type Output = Result<Pass<P>, SessionError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.shared.check_process()?;
        let shared = self.shared.clone();
        // Dropped after the lock, because it is the executor's.
        let _before;
        let mut state = shared.state();
        if let Some(pass) = shared.try_pass(&mut state)? {
            return Poll::Ready(Ok(pass));
        }
        _before = self.waker.take().and_then(|key| state.wakers.remove(&key));
        let key = state.next_waker;
        state.next_waker += 1;
        state.wakers.insert(key, context.waker().clone());
        self.waker = Some(key);
        if !self.waits {
            self.waits = true;
            state.waiting += 1;
            drop(state);
            shared.ring();
        }
        Poll::Pending
    }
}

impl<P: Deref<Target = Page>> Drop for Entering<P> {
    fn drop(&mut self) {
        if !self.waits || self.shared.check_process().is_err() {
            return;
        }
        let mut state = self.shared.state();
        let _waker = self.waker.take().and_then(|key| state.wakers.remove(&key));
        self.shared.no_longer_waits(&mut state);
        drop(state);
        self.shared.ring();
    }
}

/// The session's thread.
struct Walker<P: Deref<Target = Page>, R> {
    client: Client<P>,
    runtime: R,
    shared: Arc<Shared<P>>,
}

/// What the thread does after it has looked at the state.
enum Then {
    Look,
    Sleep(Option<Nanos>),
    Leave,
}

impl<P, R> Walker<P, R>
where
    P: Deref<Target = Page> + Clone,
    R: Runtime,
    R::Error: std::error::Error + Send + Sync + 'static,
{
    fn run(mut self) {
        // After a panic only the runtime's own data may be wrong, and it is dropped.
        let walked = catch_unwind(AssertUnwindSafe(|| self.walk()));
        let Self { client, runtime, shared } = self;
        let why = match walked {
            Ok(Ok(())) => SessionError::Closed,
            Ok(Err(error)) => SessionError::Runtime(Arc::new(error)),
            Err(panic) => SessionError::Panicked(text_of(&*panic)),
        };
        shared.end(why);
        shared.wait_for_passes();
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(runtime))) {
            shared.end(SessionError::Panicked(text_of(&*panic)));
        }
        client.leave();
    }

    fn walk(&mut self) -> Result<(), R::Error> {
        loop {
            let then = match self.client.poll(&mut self.runtime)? {
                Next::Open => self.open(),
                Next::Yield => self.begin_drain(),
                Next::Sleep { seen, until } => match self.look() {
                    Then::Sleep(own) => {
                        let until = [until, own].into_iter().flatten().min();
                        let books = &self.shared.books;
                        books.page().wait_doorbell(books.slot(), seen, until);
                        Then::Look
                    }
                    then => then,
                },
            };
            if matches!(then, Then::Leave) {
                return Ok(());
            }
        }
    }

    /// All memory is in place.
    fn open(&mut self) -> Then {
        let shared = self.shared.clone();
        let mut state = shared.state();
        if std::mem::take(&mut state.grown) {
            // Since the fill looked.
            self.client.refill();
            return Then::Look;
        }
        self.client.books().begin_slice();
        if !state.closing {
            shared.set_open(&mut state, true);
            shared.wake(state);
        }
        Then::Look
    }

    fn begin_drain(&mut self) -> Then {
        let shared = self.shared.clone();
        shared.set_open(&mut shared.state(), false);
        self.client.drain();
        Then::Look
    }

    /// What the program's threads want of the client in its present phase.
    fn look(&mut self) -> Then {
        let shared = self.shared.clone();
        let mut state = shared.state();
        let wanted = state.waiting > 0 && !state.closing;
        let busy = state.inside > 0;
        match self.client.phase() {
            Phase::Draining if !busy => self.client.drained(wanted),
            Phase::Idle if state.closing && !busy => return Then::Leave,
            Phase::Idle if wanted => self.client.request(),
            Phase::Waiting if !wanted => self.client.withdraw(),
            Phase::Running if state.grown => {
                state.grown = false;
                self.client.refill();
            }
            Phase::Running if !busy && !wanted => return self.rest(&shared, &mut state),
            _ => return Then::Sleep(None),
        }
        Then::Look
    }

    /// Running, and nobody has anything to do: gives way if somebody else needs the GPU for long enough.
    fn rest(&mut self, shared: &Shared<P>, state: &mut State) -> Then {
        if !state.closing {
            if !self.client.awaited() {
                // Whoever comes to wait rings this client, because it is admitted.
                return Then::Sleep(None);
            }
            let until = state.quiet_since.saturating_add(shared.books.page().settings().idle_grace);
            if now() < until {
                return Then::Sleep(Some(until));
            }
        }
        shared.set_open(state, false);
        self.client.idle(state.quiet_since, 0, 0);
        self.client.release(false);
        Then::Look
    }
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().map(str::to_owned);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

#[cfg(test)]
mod tests;
