//! How contexts are created and destroyed.
//!
//! **A context ends** only when the driver has destroyed it. The driver may refuse to, as for a primary context, or do so
//! later, as for a context that is retained or attached more than once. But nvshare must have left the context
//! before the driver destroys it, because using a handle that was destroyed with its context may crash the driver. So nvshare
//! leaves the context first, in a way that can be undone:
//!
//! ```text
//!   leave                            the driver         destroyed                    not destroyed
//!   engine: moves to another         destroys it,       memory of the context is     engine moves back,
//!     context, or leaves all         or refuses         released, captures end;      streams are tracked again
//!   streams and events: dropped,                        after the last: detach
//!     after their work is done
//! ```
//!
//! **A primary context** is retained and released by the application, by libraries and by green contexts. nvshare counts this
//! to know the last release, and then asks the driver whether the context still exists, because nvshare may have missed a
//! retain. A reset destroys the context and leaves the count: each retain still has to be released, and a retain in
//! between creates a new context.
//!
//! **A context whose creation nvshare did not see** (by a function of cuGetExportTable, or with a driver newer than the table)
//! is recorded at its first use: when it becomes current, or when something is created in it.
//!
//! On one GPU only one context is created or destroyed at a time.

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::memory::device::Device;
use crate::memory::devices;
use crate::memory::engine_context::Successor;
use crate::process::{attach, primary};
use crate::submit::green::Green;
use crate::submit::{captures, drain, flow};
use crate::{async_pool, state};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// A lock for each GPU, created at its first use.
static COMING_AND_GOING: Mutex<Vec<(CUdevice, &'static Mutex<()>)>> = Mutex::new(Vec::new());

/// Keeps other threads from creating or destroying a context on a GPU.
pub fn one_at_a_time(device: CUdevice) -> MutexGuard<'static, ()> {
    let lock = {
        let mut all = nvshare::sync::lock(&COMING_AND_GOING);
        match all.iter().find(|(of, _)| *of == device) {
            Some((_, lock)) => *lock,
            None => {
                let lock: &'static Mutex<()> = Box::leak(Box::default());
                all.push((device, lock));
                lock
            }
        }
    };
    nvshare::sync::lock(lock)
}

/// Records a context that was created on a GPU, with the `client` that the process has registered if it has.
///
/// # Errors
/// The process cannot attach; the log says why.
pub fn noted(
    context: CUcontext,
    device: CUdevice,
    client: Option<crate::process::attach::UnattachedClient>,
) -> Result<(), CuResult> {
    attach::context_made(context, device, client)?;
    crate::memory::sync_memops::context_made(context);
    Ok(())
}

/// Makes a `call` that may destroy a context. `has_ended` says by its result whether it has.
pub fn end(
    context: CUcontext,
    call: impl FnOnce() -> CuResult,
    has_ended: impl FnOnce(CuResult) -> bool,
) -> CuResult {
    let Some((device, successor)) = devices::ending(context) else { return call() };
    // The context's work must end before the engine leaves. When the engine leaves, it unloads modules and unregisters host memory. The
    // driver waits for the work then, and other threads' calls wait for the driver; the work may need one of those calls to end. While a
    // capture is open, nobody can ask whether the work is done. The driver ends the capture with the context.
    let idle = await_context(&device, context);
    device.leave_context(context, successor);
    let parted = device.streams.part(context, !idle);
    flow::drop_markers();
    if idle {
        async_pool::context_ended(context);
    }
    let (result, ended) = drain::end_life(context, || {
        let result = call();
        (result, has_ended(result))
    });
    if ended {
        parted.gone();
        attach::context_ended(context);
    } else {
        device.streams.rejoin(context, parted);
        if successor == Successor::None {
            device.engine_context.go_back(context);
        }
    }
    result
}

/// Waits for the work of a context. False if an open capture forbids querying it; the driver ends the capture with the context.
fn await_context(device: &Device, context: CUcontext) -> bool {
    let mark = || device.streams.mark_context(device.driver, context);
    let Some(mut mark) = captures::with_no_capture(mark) else { return false };
    if !device.await_mark(&mut mark) {
        return false;
    }
    // A broken context does no work any more.
    if let Some(result) = mark.broken() {
        tracing::debug!(gpu = %device.gpu, "a context that is being destroyed is broken, so its work counts as done: {result}");
    }
    true
}

// --- Contexts that the application makes --------------------------------------------------------

/// For each context the number of cuCtxAttach calls that were not detached.
static ATTACHMENTS: Mutex<Option<HashMap<CUcontext, u32>>> = Mutex::new(None);

fn attachments<T>(action: impl FnOnce(&mut HashMap<CUcontext, u32>) -> T) -> T {
    let mut attachments = nvshare::sync::lock(&ATTACHMENTS);
    action(attachments.get_or_insert_default())
}

/// Counts a cuCtxAttach.
pub fn attached(context: CUcontext) {
    attachments(|all| *all.entry(context).or_default() += 1);
}

/// cuCtxDestroy.
pub fn destroy(context: CUcontext, call: impl FnOnce() -> CuResult) -> CuResult {
    let Some((device, owner)) = devices::known(context) else { return call() };
    let _one = one_at_a_time(device.ordinal);
    // The driver destroys neither a green context by this handle nor a primary one.
    if owner != context || primary::is_primary(context) {
        return call();
    }
    let result = end(context, call, CuResult::is_success);
    if result.is_success() {
        attachments(|all| all.remove(&context));
    }
    result
}

/// cuCtxDetach.
pub fn detach(context: CUcontext, call: impl FnOnce() -> CuResult) -> CuResult {
    if attachments(|all| all.get(&context).copied()).unwrap_or(0) == 0 {
        return destroy(context, call);
    }
    let result = call();
    if result.is_success() {
        attachments(|all| {
            if let Some(count) = all.get_mut(&context) {
                *count = count.saturating_sub(1);
            }
        });
    }
    result
}

// --- Primary contexts ---------------------------------------------------------------------------

/// Makes a `call` that releases the primary context of a GPU once. The caller holds [`one_at_a_time`].
pub fn release(device: CUdevice, call: impl FnOnce() -> CuResult) -> CuResult {
    let result = match primary::last_release(device) {
        Some(context) => end(context, call, |result| result.is_success() && !primary::is_active(device)),
        None => call(),
    };
    if result.is_success() {
        primary::released(device);
    }
    result
}

/// Makes a `call` that resets the primary context of a GPU: the context is destroyed, and its count stays.
pub fn reset(device: CUdevice, call: impl FnOnce() -> CuResult) -> CuResult {
    let _one = one_at_a_time(device);
    reset_alone(device, call)
}

/// The same for the older form of the call, which the CUDA runtime makes in cudaDeviceReset: it also decreases the count by
/// one (tests/gpu/contexts_odd.cu). If a driver should not do that, the count here is too low, which is safe: at a release
/// that seems to be the last, the driver is asked whether the context still exists.
pub fn reset_and_release(device: CUdevice, call: impl FnOnce() -> CuResult) -> CuResult {
    let _one = one_at_a_time(device);
    let result = reset_alone(device, call);
    if result.is_success() {
        primary::released(device);
    }
    result
}

fn reset_alone(device: CUdevice, call: impl FnOnce() -> CuResult) -> CuResult {
    match primary::of_device(device) {
        Some(context) => end(context, call, CuResult::is_success),
        None => call(),
    }
}

// --- Contexts whose creation nvshare did not see ------------------------------------------------

/// The GPU of the current context, and the context to which memory allocated now belongs: the current one, or for a green
/// context its primary context.
pub fn current() -> Option<(Arc<Device>, CUcontext)> {
    let context = Driver::get().ok()?.ctx_current().ok().filter(|context| !context.is_null())?;
    devices::known(context).or_else(|| adopt(context))
}

/// The same, unless the context is broken: work in it has failed, and the driver answers nearly every call with that error,
/// whatever the arguments (docs/driver-facts.md). Such a call must go to the driver.
pub fn current_intact() -> Option<(Arc<Device>, CUcontext)> {
    current().filter(|(device, _)| device.driver.ctx_intact().is_ok())
}

/// Whether the current context is broken, so that calls must go to the driver.
pub fn is_broken() -> bool {
    current().is_some_and(|(device, _)| device.driver.ctx_intact().is_err())
}

/// Records the current context, which is not known yet. `None` if the driver says that it is not a valid context, or if the
/// process cannot attach; then the log says why.
#[cold]
pub fn adopt(context: CUcontext) -> Option<(Arc<Device>, CUcontext)> {
    if !state::enabled() {
        return None;
    }
    let driver = Driver::get().ok()?;
    let device = driver.ctx_device().ok()?;
    // A primary context that was reset may still be current although it does not exist. Creating an event fails then.
    driver.event_create(CU_EVENT_DISABLE_TIMING).and_then(|event| driver.event_destroy(event)).ok()?;
    match driver.stream_contexts(CUstream::LEGACY) {
        Ok((owner, green)) if !green.is_null() => {
            noted(owner, device, None).ok()?;
            devices::green_made(Green { green, context, owner });
        }
        _ => noted(context, device, None).ok()?,
    }
    let known = devices::known(context)?;
    tracing::debug!(gpu = %known.0.gpu, "recorded a context whose creation nvshare did not see");
    Some(known)
}

// --- Green contexts -----------------------------------------------------------------------------

/// Records a green context that was created. It retains the primary context of its GPU.
///
/// # Errors
/// The process cannot attach. The caller destroys the green context.
pub fn green_made(
    green: CUgreenCtx,
    device: CUdevice,
    client: Option<crate::process::attach::UnattachedClient>,
) -> Result<(), CuResult> {
    let driver = Driver::get().map_err(|_| CuResult::NOT_INITIALIZED)?;
    let context = driver.ctx_from_green(green)?;
    // The only way to get the handle of its primary context, which exists as long as the green context does.
    let owner = driver.primary_ctx_retain(device)?;
    let _ = driver.primary_ctx_release(device);
    noted(owner, device, client)?;
    devices::green_made(Green { green, context, owner });
    primary::retained(device, owner);
    Ok(())
}

/// cuGreenCtxDestroy.
pub fn green_destroy(handle: CUgreenCtx, call: impl FnOnce() -> CuResult) -> CuResult {
    let Some((device, green)) = devices::green(handle) else { return call() };
    let _one = one_at_a_time(device.ordinal);
    let _ = captures::with_no_capture(|| device.streams.mark_green(device.driver, &green));
    let destroy = || {
        let result = call();
        (result, result.is_success())
    };
    let result = release(device.ordinal, || drain::end_life(green.context, destroy).0);
    if result.is_success() {
        attach::green_ended(&green);
    }
    result
}

/// The GPU of a green context, and the green context. It is recorded if it is not known yet.
pub fn green(handle: CUgreenCtx) -> Option<(Arc<Device>, Green)> {
    devices::green(handle).or_else(|| {
        let driver = Driver::get().ok()?;
        let context = driver.ctx_from_green(handle).ok()?;
        let _current = drain::Current::new(driver, context).ok()?;
        adopt(context)?;
        devices::green(handle)
    })
}
