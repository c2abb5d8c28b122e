//! How contexts come and go.
//!
//! **A context ends** when the driver says so, and not before: it may refuse, as for a primary context, or end one later
//! than the call, as for one that is retained or attached to more often. But what nvshare has in a context must be out of it
//! before the driver destroys it, because a handle that went with its context may crash the driver. So it is taken out
//! first, in a way that can be undone:
//!
//! ```text
//!   take out                         the driver         ended                        not ended
//!   engine: to another context, or   destroys,          memory of the context is     engine: back
//!     out of all of them             or refuses         released, captures are over  streams tracked again
//!   streams and events: forgotten,                      after the last: detach
//!     what they had to do is done
//! ```
//!
//! **A primary context** is retained and released, by the application, by libraries, by green contexts. nvshare counts that to
//! know the last release, and then looks whether the context is still there, since others may count where nobody sees it. A
//! reset ends the context and leaves the count: who has retained it releases it later, and if somebody retains it before,
//! there is a new one.
//!
//! **A context that was made where nobody saw it** (by a function of cuGetExportTable, or with a driver newer than the table)
//! is known from its first use on: when it becomes current, or when something is made in it.
//!
//! On one GPU only one context comes or goes at a time.

use crate::abi::*;
use crate::device::{Heir, Shared};
use crate::drain::{self, Green};
use crate::driver::Driver;
use crate::session;
use crate::{flow, pools};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// A lock for each GPU, made once.
static COMING_AND_GOING: Mutex<Vec<(CUdevice, &'static Mutex<()>)>> = Mutex::new(Vec::new());

/// Keeps other threads from making or ending a context on a GPU.
pub fn one_at_a_time(device: CUdevice) -> MutexGuard<'static, ()> {
    let lock = {
        let mut all = COMING_AND_GOING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match all.iter().find(|(of, _)| *of == device) {
            Some((_, lock)) => *lock,
            None => {
                let lock: &'static Mutex<()> = Box::leak(Box::default());
                all.push((device, lock));
                lock
            }
        }
    };
    lock.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A context was made on a GPU, by the client that the process has registered for it if it has.
///
/// # Errors
/// The process cannot take part; the log says why.
pub fn noted(
    context: CUcontext,
    device: CUdevice,
    newcomer: Option<crate::arrival::Newcomer>,
) -> Result<(), CuResult> {
    session::context_made(context, device, newcomer)?;
    crate::synchronous::context_made(context);
    Ok(())
}

/// Ends a context with `call`, if the driver does: `has_ended` says whether it did, by what the call returned.
pub fn end(
    context: CUcontext,
    call: impl FnOnce() -> CuResult,
    has_ended: impl FnOnce(CuResult) -> bool,
) -> CuResult {
    let Some((shared, heir)) = session::ending(context) else { return call() };
    shared.leave_context(context, heir);
    let idle = await_context(&shared, context);
    let parted = shared.streams.part(context, !idle);
    flow::forget();
    if idle {
        pools::context_ended(context);
    }
    let (result, ended) = drain::end_life(context, || {
        let result = call();
        (result, has_ended(result))
    });
    if ended {
        parted.gone();
        session::context_ended(context);
    } else {
        shared.streams.rejoin(context, parted);
        if heir == Heir::Nowhere {
            shared.go_back(context);
        }
    }
    result
}

/// Waits for the work of a context. False if an open capture forbids to ask; the driver ends that with the context.
fn await_context(shared: &Shared, context: CUcontext) -> bool {
    let mark = || shared.streams.mark_context(shared.driver, context);
    let Some(mut mark) = session::with_no_capture(mark) else { return false };
    if !shared.await_mark(&mut mark) {
        return false;
    }
    // A broken context does no work any more.
    if let Some(result) = mark.broken() {
        tracing::debug!(gpu = %shared.gpu, "waiting for the work of a context that ends: {result}");
    }
    true
}

// --- Contexts that the application makes --------------------------------------------------------

/// How often contexts were attached to beyond the first time (cuCtxAttach).
static ATTACHMENTS: Mutex<Option<HashMap<CUcontext, u32>>> = Mutex::new(None);

fn attachments<T>(action: impl FnOnce(&mut HashMap<CUcontext, u32>) -> T) -> T {
    let mut attachments = ATTACHMENTS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    action(attachments.get_or_insert_default())
}

/// cuCtxAttach was made.
pub fn attached(context: CUcontext) {
    attachments(|all| *all.entry(context).or_default() += 1);
}

/// cuCtxDestroy.
pub fn destroy(context: CUcontext, call: impl FnOnce() -> CuResult) -> CuResult {
    let Some((shared, owner)) = session::known(context) else { return call() };
    let _one = one_at_a_time(shared.device);
    // The driver destroys neither a green context by this handle nor a primary one.
    if owner != context || is_primary(context) {
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

struct Primary {
    device: CUdevice,
    context: CUcontext,
    retained: u32,
}

static PRIMARIES: Mutex<Vec<Primary>> = Mutex::new(Vec::new());

fn primaries() -> MutexGuard<'static, Vec<Primary>> {
    PRIMARIES.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn is_primary(context: CUcontext) -> bool {
    primaries().iter().any(|primary| primary.context == context)
}

/// The primary context of a GPU was retained once more.
pub fn retained(device: CUdevice, context: CUcontext) {
    let mut primaries = primaries();
    match primaries.iter_mut().find(|primary| primary.device == device) {
        // After a reset it may be another.
        Some(primary) => (primary.context, primary.retained) = (context, primary.retained + 1),
        None => primaries.push(Primary { device, context, retained: 1 }),
    }
}

/// Whether the GPU has a primary context now, as far as the driver says.
fn is_active(device: CUdevice) -> bool {
    Driver::get().is_ok_and(|driver| driver.primary_ctx_is_active(device) == Ok(true))
}

/// Makes a call that releases the primary context of a GPU once. The caller keeps others from making and ending contexts.
pub fn release(device: CUdevice, call: impl FnOnce() -> CuResult) -> CuResult {
    let last = {
        let primaries = primaries();
        let primary = primaries.iter().find(|primary| primary.device == device);
        primary.filter(|primary| primary.retained <= 1).map(|primary| primary.context)
    };
    let result = match last {
        Some(context) => end(context, call, |result| result.is_success() && !is_active(device)),
        None => call(),
    };
    if result.is_success()
        && let Some(primary) = primaries().iter_mut().find(|primary| primary.device == device)
    {
        primary.retained = primary.retained.saturating_sub(1);
    }
    result
}

/// Makes a call that resets the primary context of a GPU: it ends, and is retained as often as before.
pub fn reset(device: CUdevice, call: impl FnOnce() -> CuResult) -> CuResult {
    let _one = one_at_a_time(device);
    let context = primaries().iter().find(|primary| primary.device == device).map(|primary| primary.context);
    match context {
        Some(context) => end(context, call, CuResult::is_success),
        None => call(),
    }
}

// --- Contexts that nobody saw being made --------------------------------------------------------

/// Takes note of the current context, which is not known. `None` if the driver says that it is none, or if the process
/// cannot take part: the log says why.
#[cold]
pub fn adopt(context: CUcontext) -> Option<(Arc<Shared>, CUcontext)> {
    if !session::enabled() {
        return None;
    }
    let driver = Driver::get().ok()?;
    let device = driver.ctx_device().ok()?;
    // A primary context that was reset can be current, and is none.
    driver.event_create(CU_EVENT_DISABLE_TIMING).and_then(|event| driver.event_destroy(event)).ok()?;
    match driver.stream_contexts(CUstream::LEGACY) {
        Ok((owner, green)) if !green.is_null() => {
            noted(owner, device, None).ok()?;
            session::green_made(Green { green, context, owner });
        }
        _ => noted(context, device, None).ok()?,
    }
    let known = session::known(context)?;
    tracing::debug!(gpu = %known.0.gpu, "a context that nobody saw being made is in use");
    Some(known)
}

// --- Green contexts -----------------------------------------------------------------------------

/// A green context was made, and retains the primary context of its GPU.
///
/// # Errors
/// The process cannot take part. The caller destroys it.
pub fn green_made(
    green: CUgreenCtx,
    device: CUdevice,
    newcomer: Option<crate::arrival::Newcomer>,
) -> Result<(), CuResult> {
    let driver = Driver::get().map_err(|_| CuResult::NOT_INITIALIZED)?;
    let context = driver.ctx_from_green(green)?;
    // Which it is: nobody else says so, and it cannot end meanwhile.
    let owner = driver.primary_ctx_retain(device)?;
    let _ = driver.primary_ctx_release(device);
    noted(owner, device, newcomer)?;
    session::green_made(Green { green, context, owner });
    retained(device, owner);
    Ok(())
}

/// cuGreenCtxDestroy.
pub fn green_destroy(handle: CUgreenCtx, call: impl FnOnce() -> CuResult) -> CuResult {
    let Some((shared, green)) = session::green(handle) else { return call() };
    let _one = one_at_a_time(shared.device);
    let _ = session::with_no_capture(|| shared.streams.mark_green(shared.driver, &green));
    let destroy = || {
        let result = call();
        (result, result.is_success())
    };
    let result = release(shared.device, || drain::end_life(green.context, destroy).0);
    if result.is_success() {
        session::green_ended(&green);
    }
    result
}

/// The GPU of a green context, and the green context. It is noted if it is not known.
pub fn green(handle: CUgreenCtx) -> Option<(Arc<Shared>, Green)> {
    session::green(handle).or_else(|| {
        let driver = Driver::get().ok()?;
        let context = driver.ctx_from_green(handle).ok()?;
        let _current = drain::Current::new(driver, context).ok()?;
        adopt(context)?;
        session::green(handle)
    })
}
