//! Events: a moment in a stream that can be asked about, waited for and timed.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use simstate::time::now_ns;

use crate::abi::{Error, Handle, Result};
use crate::driver::lock;
use crate::graph::{self, Capture};
use crate::op::Op;
use crate::stream::{Fence, Stream};

pub const DISABLE_TIMING: u32 = 2;
pub const KNOWN_FLAGS: u32 = 7;

/// An event.
pub struct Event {
    pub context: Handle,
    pub flags: u32,
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
    /// Recorded in a capture, after these nodes.
    Captured { capture: Arc<Capture>, tail: Vec<usize> },
}

impl Event {
    pub fn new(context: Handle, flags: u32) -> Event {
        Event { context, flags, state: Mutex::new(State::Fresh) }
    }

    fn state(&self) -> State {
        lock(&self.state).clone()
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
        if stream.idle() {
            let stamp = Arc::new(AtomicU64::new(now_ns()));
            self.set(State::Recorded { fence: Fence::of(stream), stamp });
        } else {
            let stamp = Arc::new(AtomicU64::new(0));
            let fence = stream.submit(Op::Time(stamp.clone()), Vec::new());
            self.set(State::Recorded { fence, stamp });
        }
        Ok(())
    }

    /// Lets a stream wait for the event.
    pub fn wait_in(self: &Arc<Self>, stream: &Arc<Stream>, external: bool) -> Result {
        stream.usable()?;
        match self.state() {
            State::Captured { capture, tail } => graph::join(stream, &capture, &tail),
            _ if stream.capturing.load(SeqCst) && external => graph::record(stream, Op::Await(self.clone())),
            State::Fresh | State::Stamped(_) => Ok(()),
            State::Recorded { .. } if stream.capturing.load(SeqCst) => {
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
        }
    }

    /// When the event happened.
    pub fn time(&self) -> Result<u64> {
        if self.flags & DISABLE_TIMING != 0 {
            return Err(Error::INVALID_HANDLE);
        }
        match self.state() {
            State::Fresh => Err(Error::INVALID_HANDLE),
            State::Captured { .. } => Err(Error::CAPTURED_EVENT),
            State::Stamped(when) => Ok(when),
            State::Recorded { fence, stamp } => {
                fence.stream.core.healthy()?;
                if fence.reached() { Ok(stamp.load(SeqCst)) } else { Err(Error::NOT_READY) }
            }
        }
    }
}
