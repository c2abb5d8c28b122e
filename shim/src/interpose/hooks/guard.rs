//! What every handwritten entry point runs in.

use crate::cuda::abi::CuResult;
use crate::cuda::driver::Driver;
use crate::{state, thread};

/// Runs what might panic. A panic is a bug of ours, and no reason to take the host program down.
pub fn guarded(action: impl FnOnce() -> CuResult) -> CuResult {
    if state::driver_has_gone() {
        return CuResult::DEINITIALIZED;
    }
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(action)).unwrap_or_else(|_| {
        tracing::error!("nvshare panicked inside a CUDA call; the call fails with CUDA_ERROR_UNKNOWN");
        CuResult::UNKNOWN
    });
    thread::call_ends();
    result
}

/// Runs `action` in a capture mode that allows it to map memory while another thread captures: reserving, creating and
/// mapping touch no stream, so they cannot end up in anybody's graph.
pub fn relaxed<T>(action: impl FnOnce() -> T) -> T {
    match Driver::get() {
        Ok(driver) => driver.relaxed(action),
        Err(_) => action(),
    }
}
