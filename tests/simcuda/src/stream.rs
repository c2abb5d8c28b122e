//! Streams: queues of operations, each with a worker thread.
//!
//! An operation has a number in its stream; the stream is done with everything up to `completed`. A [`Fence`] is a
//! stream and a number, and is all that events, waits and synchronisation are made of. An operation may carry fences
//! that its worker waits for first. They name operations that were submitted earlier, so waiting never goes round in
//! circles.
//!
//! **The legacy stream** is ordered with all blocking streams of its context: an operation in it carries a fence of
//! each of them, and an operation in a blocking stream carries a fence of it.
//!
//! **No thread without work.** A worker starts with the first operation that can't be completed on the spot, and ends
//! with the stream. Recording an event in an idle stream, waiting for a finished one and launching an empty kernel
//! are done by the caller.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};

use crate::abi::{Error, Handle, Result};
use crate::context::Core;
use crate::driver::lock;
use crate::graph::{self, Participation};
use crate::handles;
use crate::op::Op;

pub const NON_BLOCKING: u32 = 1;
pub const LEAST_PRIORITY: i32 = 0;
pub const GREATEST_PRIORITY: i32 = -5;

const WORKER_STACK: usize = 256 << 10;

/// What kind of stream it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Legacy,
    PerThread,
    Created,
}

/// A stream.
pub struct Stream {
    pub handle: Handle,
    pub id: u64,
    pub core: Arc<Core>,
    pub role: Role,
    pub flags: u32,
    pub priority: i32,
    /// The legacy stream of the context, for a stream that is ordered with it.
    legacy: Option<Arc<Stream>>,
    submitted: AtomicU64,
    completed: AtomicU64,
    queue: Mutex<Queue>,
    work: Condvar,
    done: Condvar,
    pub capturing: AtomicBool,
    pub capture: Mutex<Option<Participation>>,
    /// Its green context is gone.
    detached: AtomicBool,
}

#[derive(Default)]
struct Queue {
    operations: VecDeque<Queued>,
    worker: bool,
    closed: bool,
}

struct Queued {
    number: u64,
    after: Vec<Fence>,
    op: Op,
}

/// A moment in a stream: when it is done with an operation and all before.
#[derive(Clone)]
pub struct Fence {
    pub stream: Arc<Stream>,
    number: u64,
}

impl Fence {
    /// When everything submitted so far is done.
    pub fn of(stream: &Arc<Stream>) -> Fence {
        Fence { stream: stream.clone(), number: stream.submitted.load(SeqCst) }
    }

    pub fn reached(&self) -> bool {
        self.stream.completed.load(SeqCst) >= self.number
    }

    pub fn wait(&self) {
        if self.reached() {
            return;
        }
        let mut queue = lock(&self.stream.queue);
        while !self.reached() {
            queue = self.stream.done.wait(queue).unwrap_or_else(|e| e.into_inner());
        }
    }
}

impl Stream {
    pub fn create(
        core: &Arc<Core>,
        role: Role,
        flags: u32,
        priority: i32,
        legacy: Option<Arc<Stream>>,
    ) -> Arc<Stream> {
        static IDS: AtomicU64 = AtomicU64::new(1);
        let stream = Arc::new(Stream {
            handle: handles::fresh(),
            id: IDS.fetch_add(1, SeqCst),
            core: core.clone(),
            role,
            flags,
            priority,
            legacy: legacy.filter(|_| flags & NON_BLOCKING == 0),
            submitted: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            queue: Mutex::default(),
            work: Condvar::new(),
            done: Condvar::new(),
            capturing: AtomicBool::new(false),
            capture: Mutex::default(),
            detached: AtomicBool::new(false),
        });
        core.add_stream(&stream);
        stream
    }

    /// Whether it is ordered with the legacy stream.
    pub fn blocking(&self) -> bool {
        self.legacy.is_some()
    }

    /// Whether an operation submitted now could run at once.
    #[inline]
    pub fn idle(&self) -> bool {
        let ordered = match (&self.legacy, self.role) {
            (Some(_), _) => self.core.legacy_pending.load(SeqCst) == 0,
            (None, Role::Legacy) => self.core.blocking_pending.load(SeqCst) == 0,
            (None, _) => true,
        };
        ordered && self.completed.load(SeqCst) >= self.submitted.load(SeqCst)
    }

    /// Fails if the context has failed, or the stream has lost its green one.
    pub fn exists(&self) -> Result {
        self.core.healthy()?;
        if self.detached.load(SeqCst) { Err(Error::STREAM_DETACHED) } else { Ok(()) }
    }

    /// Fails if the stream can't be used now: the context has failed, or the legacy stream would have to wait for one
    /// that is being captured.
    #[inline]
    pub fn usable(&self) -> Result {
        self.exists()?;
        if self.role == Role::Legacy && self.core.open_captures.load(SeqCst) > 0 {
            graph::refuse_implicit(&self.core)?;
        }
        Ok(())
    }

    /// Submits an operation, or puts it into the graph that is being captured; the fence says when it is done.
    pub fn enqueue(self: &Arc<Self>, op: Op) -> Result<Option<Fence>> {
        self.usable()?;
        if self.capturing.load(SeqCst) {
            graph::record(self, op)?;
            return Ok(None);
        }
        Ok(Some(self.submit(op, Vec::new())))
    }

    /// Submits an operation and waits for it, as synchronous calls do. Not while the stream is captured.
    pub fn run(self: &Arc<Self>, op: Op) -> Result {
        self.usable()?;
        graph::refuse_unsafe(&self.core)?;
        if self.capturing.load(SeqCst) {
            graph::invalidate(self);
            return Err(Error::STREAM_CAPTURE_UNSUPPORTED);
        }
        self.submit(op, Vec::new()).wait();
        self.core.healthy()
    }

    /// Submits an operation that waits for `after` first.
    pub fn submit(self: &Arc<Self>, op: Op, mut after: Vec<Fence>) -> Fence {
        match (&self.legacy, self.role) {
            (Some(legacy), _) => after.push(Fence::of(legacy)),
            (None, Role::Legacy) => {
                let others = self.core.live_streams();
                after.extend(others.iter().filter(|other| other.blocking()).map(Fence::of));
            }
            (None, _) => {}
        }
        after.retain(|fence| !fence.reached());
        let mut queue = lock(&self.queue);
        let number = self.submitted.load(SeqCst) + 1;
        self.pending(|count| count.fetch_add(1, SeqCst));
        self.submitted.store(number, SeqCst);
        queue.operations.push_back(Queued { number, after, op });
        if !queue.worker {
            queue.worker = true;
            self.start_worker();
        }
        self.work.notify_one();
        Fence { stream: self.clone(), number }
    }

    fn pending(&self, change: impl Fn(&std::sync::atomic::AtomicUsize) -> usize) {
        match (&self.legacy, self.role) {
            (Some(_), _) => change(&self.core.blocking_pending),
            (None, Role::Legacy) => change(&self.core.legacy_pending),
            (None, _) => 0,
        };
    }

    fn start_worker(self: &Arc<Self>) {
        let stream = self.clone();
        let thread =
            std::thread::Builder::new().name(format!("sim-stream-{}", self.id)).stack_size(WORKER_STACK);
        thread
            .spawn(move || {
                block_signals();
                stream.work_off();
            })
            .expect("a thread for a stream of the simulated GPU");
    }

    fn work_off(&self) {
        loop {
            let next = {
                let mut queue = lock(&self.queue);
                loop {
                    if let Some(next) = queue.operations.pop_front() {
                        break next;
                    }
                    if queue.closed {
                        queue.worker = false;
                        return;
                    }
                    queue = self.work.wait(queue).unwrap_or_else(|e| e.into_inner());
                }
            };
            next.after.iter().for_each(Fence::wait);
            if let Err(error) = next.op.execute(&self.core) {
                self.core.fail(error);
            }
            // What the operation holds (graphs, events) is let go before anybody learns that it is done.
            drop(next.op);
            let _queue = lock(&self.queue);
            self.completed.store(next.number, SeqCst);
            self.pending(|count| count.fetch_sub(1, SeqCst));
            self.done.notify_all();
        }
    }

    /// The green context of the stream is gone: nothing more can be submitted.
    pub fn detach(&self) {
        self.detached.store(true, SeqCst);
    }

    /// Lets the worker end once it has nothing left to do.
    pub fn close(&self) {
        lock(&self.queue).closed = true;
        self.work.notify_all();
    }

    pub fn closed(&self) -> bool {
        lock(&self.queue).closed
    }
}

/// The application's signal handlers run on the application's threads.
fn block_signals() {
    // SAFETY: both calls only write the set they are given and change the calling thread's mask.
    unsafe {
        let mut all = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
    }
}
