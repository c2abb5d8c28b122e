//! The state of this process: whether nvshare is active in it, and whether its memory is intact.
//!
//! Atomics only, so that a forked child and an ending thread can read it at any time.

use crate::cuda::abi::CuResult;
use crate::cuda::driver::Driver;
use std::ffi::CStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// Set in a forked child of a process that had attached: the GPUs belong to the parent.
static FORKED: AtomicBool = AtomicBool::new(false);

/// Set if no arbiter answered and the user has asked to go on without one.
static PASSTHROUGH: AtomicBool = AtomicBool::new(false);

/// The result of every call after memory could not be moved, because the application's data is lost. 0 before that.
static FAILED: AtomicI32 = AtomicI32::new(0);

/// Set by an exit handler: from then on the driver may shut down at any time.
static EXITING: AtomicBool = AtomicBool::new(false);

/// Whether nvshare is active in this process.
pub fn enabled() -> bool {
    static ON: OnceLock<bool> = OnceLock::new();
    *ON.get_or_init(|| {
        // A program with other rights than those of the user who starts it (setuid), which has loaded the shim because of
        // /etc/ld.so.preload: that user's NVSHARE_* must not direct it.
        // SAFETY: reads a word that the kernel gave the process.
        if unsafe { libc::getauxval(libc::AT_SECURE) } != 0 {
            return false;
        }
        // SAFETY: getenv with a C string; the value is read at once.
        let value = unsafe { libc::getenv(c"NVSHARE_DISABLE".as_ptr()) };
        // SAFETY: a C string, if there is one.
        value.is_null() || unsafe { CStr::from_ptr(value) } != c"1"
    }) && !FORKED.load(Ordering::Relaxed)
        && !PASSTHROUGH.load(Ordering::Relaxed)
}

/// Makes nvshare inactive, because this is a forked child of a process that had attached.
pub fn set_forked() {
    FORKED.store(true, Ordering::Relaxed);
}

/// Makes nvshare inactive, because there is no arbiter and the user has asked to go on without one.
pub fn set_passthrough() {
    PASSTHROUGH.store(true, Ordering::Relaxed);
}

/// Makes every call that uses a GPU return `result` from now on, because memory of a GPU cannot be moved any more. The first
/// such result stays, as with the driver's own errors.
pub fn set_failed(result: CuResult) {
    let _ = FAILED.compare_exchange(0, result.0, Ordering::SeqCst, Ordering::Relaxed);
}

/// Checks that memory can be moved.
///
/// # Errors
/// It cannot; this is the result of every call that uses a GPU.
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

/// Whether the process is exiting and the driver has shut down, after which it answers every call with DEINITIALIZED.
pub fn driver_has_gone() -> bool {
    EXITING.load(Ordering::Relaxed)
        && Driver::get().is_ok_and(|driver| driver.ctx_current() == Err(CuResult::DEINITIALIZED))
}
