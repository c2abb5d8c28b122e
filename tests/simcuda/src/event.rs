//! Events: a moment in a stream that can be asked about, waited for and timed.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use simstate::time::now_ns;

use crate::abi::{Error, Handle, Result};
use crate::driver::lock;
use crate::graph::{self, Capture};
use crate::ipc_event::SharedEvent;
use crate::op::Op;
use crate::stream::{Fence, Stream};

pub const DISABLE_TIMING: u32 = 2;
pub const INTERPROCESS: u32 = 4;
pub const KNOWN_FLAGS: u32 = 7;

/// An event.
pub struct Event {
    pub context: Handle,
    pub flags: u32,
    /// What other processes see of it, if they may.
    pub shared: Option<Arc<SharedEvent>>,
    state: Mutex<State>,
}

#[derive(Clone)]
enum State {
    /// Never recorded: counts as done.
    Fresh,
    /// Recorded in a stream; the stamp is zero until then.
    Recorded { fence: Fence, stamp: Arc<AtomicU64> },
    /// Recorded by a node of a graph.
    Stamped(u64),
    /// Other processes know.
    Shared,
    /// Recorded in a capture, after these nodes.
    Captured { capture: Arc<Capture>, tail: Vec<usize> },
}

impl Event {
    pub fn new(context: Handle, flags: u32, shared: Option<Arc<SharedEvent>>) -> Event {
        Event { context, flags, shared, state: Mutex::new(State::Fresh) }
    }

    /// What it is up to. Of a shared event that nobody here has recorded, others know.
    fn state(&self) -> State {
        let state = lock(&self.state).clone();
        match (&state, &self.shared) {
            (State::Fresh, Some(_)) => State::Shared,
            _ => state,
        }
    }

    /// The shared part, and the number of its last recording.
    fn last(&self) -> Option<(&Arc<SharedEvent>, u64)> {
        self.shared.as_ref().map(|shared| (shared, shared.last()))
    }

    fn set(&self, state: State) {
        *lock(&self.state) = state;
    }

    /// Marks the event as recorded now, by a node of a running graph.
    pub fn stamp(&self) {
        self.set(State::Stamped(now_ns()));
    }

    /// Records the event behind everything in the stream.
    pub fn record(self: &Arc<Self>, stream: &Arc<Stream>, external: bool) -> Result {
        stream.usable()?;
        if stream.capturing.load(SeqCst) {
            if external {
                return graph::record(stream, Op::Stamp(self.clone()));
            }
            let (capture, tail) = graph::position(stream)?;
            self.set(State::Captured { capture, tail });
            return Ok(());
        }
        if let Some(shared) = &self.shared {
            let number = shared.record();
            if stream.idle() {
                shared.reach(number);
            } else {
                stream.submit(Op::Reach(shared.clone(), number), Vec::new());
            }
            self.set(State::Shared);
        } else if stream.idle() {
            let stamp = Arc::new(AtomicU64::new(now_ns()));
            self.set(State::Recorded { fence: Fence::of(stream), stamp });
        } else {
            let stamp = Arc::new(AtomicU64::new(0));
            let fence = stream.submit(Op::Time(stamp.clone()), Vec::new());
            self.set(State::Recorded { fence, stamp });
        }
        Ok(())
    }

    /// Records the event in a stream, behind work of other streams too.
    pub fn record_after(self: &Arc<Self>, stream: &Arc<Stream>, after: Vec<Fence>) -> Result {
        stream.usable()?;
        let stamp = Arc::new(AtomicU64::new(0));
        let fence = stream.submit(Op::Time(stamp.clone()), after);
        self.set(State::Recorded { fence, stamp });
        Ok(())
    }

    /// Lets a stream wait for the event.
    pub fn wait_in(self: &Arc<Self>, stream: &Arc<Stream>, external: bool) -> Result {
        stream.usable()?;
        match self.state() {
            State::Captured { capture, tail } => graph::join(stream, &capture, &tail),
            _ if stream.capturing.load(SeqCst) && external => graph::record(stream, Op::Await(self.clone())),
            State::Fresh | State::Stamped(_) => Ok(()),
            State::Recorded { .. } | State::Shared if stream.capturing.load(SeqCst) => {
                // Work outside the capture can't become a dependency of the graph.
                graph::invalidate(stream);
                Err(Error::STREAM_CAPTURE_ISOLATION)
            }
            State::Recorded { fence, .. } => {
                if !fence.reached() {
                    stream.submit(Op::Nothing, vec![fence]);
                }
                Ok(())
            }
            State::Shared => {
                if let Some((shared, last)) = self.last()
                    && !shared.reached(last)
                {
                    stream.submit(Op::AwaitReached(shared.clone(), last), Vec::new());
                }
                Ok(())
            }
        }
    }

    /// Fails with "not ready" until the event has happened.
    pub fn query(&self) -> Result {
        match self.state() {
            State::Fresh | State::Stamped(_) => Ok(()),
            State::Captured { .. } => Err(Error::CAPTURED_EVENT),
            State::Recorded { fence, .. } => {
                let reached = fence.reached();
                fence.stream.core.healthy()?;
                if reached { Ok(()) } else { Err(Error::NOT_READY) }
            }
            State::Shared => match self.last() {
                Some((shared, last)) if !shared.reached(last) => Err(Error::NOT_READY),
                _ => Ok(()),
            },
        }
    }

    /// Waits until the event has happened.
    pub fn synchronize(&self) -> Result {
        match self.state() {
            State::Fresh | State::Stamped(_) => Ok(()),
            State::Captured { .. } => Err(Error::CAPTURED_EVENT),
            State::Recorded { fence, .. } => {
                fence.wait();
                fence.stream.core.healthy()
            }
            State::Shared => {
                if let Some((shared, last)) = self.last() {
                    shared.wait(last);
                }
                Ok(())
            }
        }
    }

    /// When the event happened.
    pub fn time(&self) -> Result<u64> {
        if self.flags & DISABLE_TIMING != 0 {
            return Err(Error::INVALID_HANDLE);
        }
        match self.state() {
            State::Fresh | State::Shared => Err(Error::INVALID_HANDLE),
            State::Captured { .. } => Err(Error::CAPTURED_EVENT),
            State::Stamped(when) => Ok(when),
            State::Recorded { fence, stamp } => {
                fence.stream.core.healthy()?;
                if fence.reached() { Ok(stamp.load(SeqCst)) } else { Err(Error::NOT_READY) }
            }
        }
    }
}
