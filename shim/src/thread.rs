//! The application's threads: a number for each, and what goes when one ends.
//!
//! A thread that ends goes on making CUDA calls: in the destructors of C++ thread-locals, which run first, and in those of
//! pthread keys, which run after them in an order that nobody chose. The C library runs the thread-locals of Rust with
//! either. So no call may need a thread-local that has a destructor: what a call finds gone, it does without.
//!
//! The shim is linked so that its own thread-locals go with the pthread keys (`build.rs`): later than those of C++, never
//! in a thread that exits the process, and without the dynamic loader's lock, which glibc takes to write a destructor
//! down. The engine's thread must not want that lock: a library's constructor that does CUDA work holds it and waits for
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
    /// There is one once something is kept by the thread's number.
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

/// What is to be done when a thread ends: set once, by [`at_end`].
static AT_END: OnceLock<&'static [fn(ThreadId)]> = OnceLock::new();

/// Sets what is called, in this order and in the ending thread, when a thread ends that something was kept by. Who keeps
/// something lies in rooms above this file, so they are named by whoever knows them all ([`crate::process::attach`]).
pub fn at_end(handlers: &'static [fn(ThreadId)]) {
    let _ = AT_END.set(handlers);
}

/// The calling thread's number, to keep something by it until the thread ends ([`ended`]).
pub fn id_to_keep() -> ThreadId {
    if END.try_with(|_| ()).is_err() {
        // The end has been announced already.
        KEPT_LATE.set(true);
    }
    id()
}

/// A call is over. If the calling thread's end was announced before, what the call has kept by its number goes with it.
#[inline]
pub fn call_ends() {
    if KEPT_LATE.get() {
        ended();
    }
}

/// The calling thread ends: what was kept by its number goes.
#[cold]
fn ended() {
    // A panic must not unwind into the C library, which runs destructors.
    let cleared = std::panic::catch_unwind(|| {
        for handler in AT_END.get().into_iter().copied().flatten() {
            handler(id());
        }
    });
    if cleared.is_err() {
        tracing::error!("nvshare panicked at the end of a thread");
    }
    KEPT_LATE.set(false);
}
