//! Identifies a stream.

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::submit::drain::{Current, StreamMarker};
use crate::submit::green;
use crate::thread::ThreadId;

/// A stream: its explicit handle; for a default stream also its context, and its thread if it is a thread's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Queue {
    stream: CUstream,
    context: Option<CUcontext>,
    thread: Option<ThreadId>,
}

impl Queue {
    /// The stream that a call names. `per_thread` says whether null means the thread's own default stream.
    pub fn of(stream: CUstream, per_thread: bool) -> Self {
        let stream = stream.named(per_thread);
        let context = || Driver::get().ok()?.ctx_current().ok();
        Self { stream, context: stream.is_default().then(context).flatten(), thread: stream.thread() }
    }

    /// Whether it has this handle.
    pub fn is_stream(&self, stream: CUstream) -> bool {
        self.stream == stream
    }

    /// Whether it is this thread's own default stream.
    pub fn is_of_thread(&self, thread: ThreadId) -> bool {
        self.thread == Some(thread)
    }

    /// The context of the stream. `None` if the driver does not know the stream.
    pub fn context(&self) -> Option<CUcontext> {
        self.context.or_else(|| Driver::get().ok()?.stream_ctx(self.stream).ok())
    }

    /// Marks the end of its work so far. `None` if that fails: the stream or its context is broken, or there is no such stream.
    pub fn end(&self) -> Option<StreamMarker> {
        let driver = Driver::get().ok()?;
        // A green context may be current to another thread now, but its streams can be marked from its primary context.
        let context = self.context.or_else(|| Some(green::owner_of(self.context()?)))?;
        let _current = Current::new(driver, context).ok()?;
        StreamMarker::record(driver, context, self.stream, true).ok()
    }
}
