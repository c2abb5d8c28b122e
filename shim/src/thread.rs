//! The application's threads: a number for each, and the handlers that run when one ends.
//!
//! An ending thread may still make CUDA calls: in the destructors of C++ thread-locals, which run first, and in those of
//! pthread keys, which run after them in unspecified order. Rust's thread-locals are destroyed in one of these two phases.
//! So no call may depend on a thread-local with a destructor: a call that finds it destroyed goes on without it.
//!
//! The shim is linked so that its own thread-locals are destroyed with the pthread keys (`build.rs`): after those of C++, never
//! in a thread that exits the process, and without the dynamic loader's lock, which glibc takes to register a destructor.
//! The engine's thread must not take that lock: a library's constructor that does CUDA work holds it and waits for
//! the engine.

use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// A thread's number. No other thread of the process ever has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ThreadId(u64);

struct End;

impl Drop for End {
    fn drop(&mut self) {
        ended();
    }
}

thread_local! {
    // Plain values, which can be read at any time.
    static NUMBER: Cell<u64> = const { Cell::new(0) };
    static KEPT_LATE: Cell<bool> = const { Cell::new(false) };
    /// Initialised when something is first kept under the thread's number; its destructor announces the thread's end.
    static END: End = const { End };
}

/// The calling thread's number.
pub fn id() -> ThreadId {
    static LAST: AtomicU64 = AtomicU64::new(0);
    if NUMBER.get() == 0 {
        NUMBER.set(LAST.fetch_add(1, Ordering::Relaxed) + 1);
    }
    ThreadId(NUMBER.get())
}

/// The handlers that run when a thread ends; set once, by [`at_end`].
static AT_END: OnceLock<&'static [fn(ThreadId)]> = OnceLock::new();

/// Sets the handlers that are called, in this order and in the ending thread, when a thread ends under whose number something
/// was kept ([`id_to_keep`]). The rooms that keep something lie above this file, so [`crate::process::attach`], which knows
/// them all, passes their handlers here.
pub fn at_end(handlers: &'static [fn(ThreadId)]) {
    let _ = AT_END.set(handlers);
}

/// The calling thread's number, to keep something under it until the thread ends ([`ended`]).
pub fn id_to_keep() -> ThreadId {
    if END.try_with(|_| ()).is_err() {
        // The handlers have run already: they run again when this call ends.
        KEPT_LATE.set(true);
    }
    id()
}

/// Called at the end of a call. If the thread's handlers had run before, they run again for what this call has kept.
#[inline]
pub fn call_ends() {
    if KEPT_LATE.get() {
        ended();
    }
}

/// Runs the handlers: the calling thread ends.
#[cold]
fn ended() {
    // A panic must not unwind into the C library, which runs the destructors.
    let cleared = std::panic::catch_unwind(|| {
        for handler in AT_END.get().into_iter().copied().flatten() {
            handler(id());
        }
    });
    if cleared.is_err() {
        tracing::error!("nvshare panicked when a thread of this process ended; this is a bug in nvshare");
    }
    KEPT_LATE.set(false);
}
