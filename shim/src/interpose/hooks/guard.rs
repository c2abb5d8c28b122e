//! Wrappers in which every hook runs.

use crate::cuda::abi::CuResult;
use crate::cuda::driver::Driver;
use crate::{state, thread};

/// Runs code that might panic. A panic is a bug in nvshare and must not end the application.
pub fn guarded(action: impl FnOnce() -> CuResult) -> CuResult {
    if state::driver_has_gone() {
        return CuResult::DEINITIALIZED;
    }
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(action)).unwrap_or_else(|_| {
        tracing::error!(
            "nvshare panicked inside a CUDA call, which fails with CUDA_ERROR_UNKNOWN; this is a bug in nvshare"
        );
        CuResult::UNKNOWN
    });
    thread::call_ends();
    result
}

/// Runs `action` in the relaxed capture mode, so that it can map memory while another thread captures. That is safe, because
/// reserving, creating and mapping memory use no stream and so cannot become part of a graph.
pub fn relaxed<T>(action: impl FnOnce() -> T) -> T {
    match Driver::get() {
        Ok(driver) => driver.relaxed(action),
        Err(_) => action(),
    }
}
