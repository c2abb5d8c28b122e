//! What this process is to nvshare: whether nvshare does anything here, and whether its memory is intact.
//!
//! Atomics only, so that a forked child and a thread that ends can ask at any time.

use crate::cuda::abi::CuResult;
use crate::cuda::driver::Driver;
use std::ffi::CStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// Set in a forked child of a process that had attached: the GPUs are the parent's.
static FORKED: AtomicBool = AtomicBool::new(false);

/// No arbiter answered, and the user asked to go on without one.
static PASSTHROUGH: AtomicBool = AtomicBool::new(false);

/// What every call returns once memory could not be moved, because the application's data is lost. 0 while all is well.
static FAILED: AtomicI32 = AtomicI32::new(0);

/// Set by an exit handler that runs beside the driver's own: from then on the driver may be gone any time.
static EXITING: AtomicBool = AtomicBool::new(false);

/// Whether nvshare does anything in this process.
pub fn enabled() -> bool {
    static ON: OnceLock<bool> = OnceLock::new();
    *ON.get_or_init(|| {
        // SAFETY: getenv with a C string; the value is looked at before anybody can change it.
        let value = unsafe { libc::getenv(c"NVSHARE_DISABLE".as_ptr()) };
        // SAFETY: a C string, if there is one.
        value.is_null() || unsafe { CStr::from_ptr(value) } != c"1"
    }) && !FORKED.load(Ordering::Relaxed)
        && !PASSTHROUGH.load(Ordering::Relaxed)
}

/// This is a forked child of a process that had attached: nvshare does nothing here from now on.
pub fn set_forked() {
    FORKED.store(true, Ordering::Relaxed);
}

/// There is no arbiter, and the user asked to go on without: nvshare does nothing here from now on.
pub fn set_passthrough() {
    PASSTHROUGH.store(true, Ordering::Relaxed);
}

/// Memory of a GPU cannot be moved any more: every call that uses a GPU returns `result` from now on. The first such result
/// stays, as with the driver's own.
pub fn set_failed(result: CuResult) {
    let _ = FAILED.compare_exchange(0, result.0, Ordering::SeqCst, Ordering::Relaxed);
}

/// Whether memory can be moved.
///
/// # Errors
/// What every call that uses a GPU returns, because it cannot.
pub fn intact() -> Result<(), CuResult> {
    match FAILED.load(Ordering::Acquire) {
        0 => Ok(()),
        code => Err(CuResult(code)),
    }
}

/// The process has begun to exit. An exit handler calls it.
pub extern "C" fn set_exiting() {
    EXITING.store(true, Ordering::Relaxed);
}

/// Whether the process is ending and the driver has gone already: it answers every call with DEINITIALIZED from then on.
pub fn driver_has_gone() -> bool {
    EXITING.load(Ordering::Relaxed)
        && Driver::get().is_ok_and(|driver| driver.ctx_current() == Err(CuResult::DEINITIALIZED))
}
