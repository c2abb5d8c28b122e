//! Threads of nvshare's own in somebody else's process: they handle none of its signals.

use nix::sys::signal::{SigSet, SigmaskHow};
use std::io;
use std::thread::{Builder, JoinHandle};

/// Starts a thread with all signals blocked: a signal handler of the application runs in a thread of the application, and one that
/// ends a system call early ends none here.
pub(crate) fn spawn<T: Send + 'static>(
    builder: Builder,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    // A thread begins with the mask of the thread that makes it.
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
    let spawned = builder.spawn(run);
    let _ = before.and_then(|before| before.thread_set_mask());
    spawned
}
