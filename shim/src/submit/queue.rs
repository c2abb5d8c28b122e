//! A name for what does its work in order.

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::submit::drain::{Current, StreamMarker};
use crate::submit::green;
use crate::thread::ThreadId;

/// What does its work in order: a stream, by an explicit name, and for default streams of which context, or which thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Queue {
    stream: CUstream,
    context: Option<CUcontext>,
    thread: Option<ThreadId>,
}

impl Queue {
    /// That of the stream that a call names, whose default stream is the thread's own or not.
    pub fn of(stream: CUstream, per_thread: bool) -> Self {
        let stream = stream.named(per_thread);
        let context = || Driver::get().ok()?.ctx_current().ok();
        Self { stream, context: stream.is_default().then(context).flatten(), thread: stream.thread() }
    }

    /// Whether a stream of the application's goes by this name.
    pub fn is_stream(&self, stream: CUstream) -> bool {
        self.stream == stream
    }

    /// Whether it is a thread's own default stream, and which thread's.
    pub fn is_of_thread(&self, thread: ThreadId) -> bool {
        self.thread == Some(thread)
    }

    /// The context of the stream. `None` if the driver does not know the stream.
    pub fn context(&self) -> Option<CUcontext> {
        self.context.or_else(|| Driver::get().ok()?.stream_ctx(self.stream).ok())
    }

    /// Its present end. `None` if it has none: the stream or its context is broken, or there is no such stream.
    pub fn end(&self) -> Option<StreamMarker> {
        let driver = Driver::get().ok()?;
        // A green context may be current to another thread now. Its streams can be marked from its primary one.
        let context = self.context.or_else(|| Some(green::owner_of(self.context()?)))?;
        let _current = Current::new(driver, context).ok()?;
        StreamMarker::record(driver, context, self.stream, true).ok()
    }
}
