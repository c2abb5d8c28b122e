//! Counts how often the primary context of each GPU is retained: by the application, by libraries, by green contexts.
//!
//! The count tells which release is the last. nvshare may have missed a retain, so after such a release the driver is asked
//! whether the context still exists ([`is_active`]).

use crate::cuda::abi::{CUcontext, CUdevice};
use crate::cuda::driver::Driver;
use std::sync::{Mutex, MutexGuard};

struct Primary {
    device: CUdevice,
    context: CUcontext,
    retained: u32,
}

static PRIMARIES: Mutex<Vec<Primary>> = Mutex::new(Vec::new());

fn primaries() -> MutexGuard<'static, Vec<Primary>> {
    nvshare::sync::lock(&PRIMARIES)
}

/// Whether a context is the primary one of its GPU.
pub fn is_primary(context: CUcontext) -> bool {
    primaries().iter().any(|primary| primary.context == context)
}

/// Counts a retain of the primary context of a GPU.
pub fn retained(device: CUdevice, context: CUcontext) {
    let mut primaries = primaries();
    match primaries.iter_mut().find(|primary| primary.device == device) {
        // After a reset the context may have another handle.
        Some(primary) => (primary.context, primary.retained) = (context, primary.retained + 1),
        None => primaries.push(Primary { device, context, retained: 1 }),
    }
}

/// Whether the GPU has a primary context now. False if the driver cannot tell.
pub fn is_active(device: CUdevice) -> bool {
    Driver::get().is_ok_and(|driver| driver.primary_ctx_is_active(device) == Ok(true))
}

/// The primary context of a GPU, if it was ever retained.
pub fn of_device(device: CUdevice) -> Option<CUcontext> {
    primaries().iter().find(|primary| primary.device == device).map(|primary| primary.context)
}

/// The primary context of a GPU, if the next release is the last one.
pub fn last_release(device: CUdevice) -> Option<CUcontext> {
    let primaries = primaries();
    let primary = primaries.iter().find(|primary| primary.device == device)?;
    (primary.retained <= 1).then_some(primary.context)
}

/// Counts a release of the primary context of a GPU.
pub fn released(device: CUdevice) {
    if let Some(primary) = primaries().iter_mut().find(|primary| primary.device == device) {
        primary.retained = primary.retained.saturating_sub(1);
    }
}
