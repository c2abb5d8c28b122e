//! How contexts are created, destroyed and made current, and given access to one another's memory.

#![allow(non_snake_case, clippy::missing_safety_doc, missing_docs)]

use super::guard::{guarded, relaxed};
use crate::cuda::abi::*;
use crate::interpose::driver_calls;
use crate::memory::peer_access;
use crate::process::attach::UnattachedClient;
use crate::process::{contexts, driver_memory, first_context, primary};
use crate::state;
use std::ffi::c_void;

/// Creates or retains a context on a GPU with `call`, making room for it if the GPU is full. On success `note` records it; if
/// that fails, because the process cannot attach, `undo` destroys or releases it.
fn make_context(
    device: CUdevice,
    call: impl Fn() -> CuResult,
    note: impl FnOnce(Option<UnattachedClient>) -> Result<(), CuResult>,
    undo: impl FnOnce() -> CuResult,
) -> CuResult {
    guarded(|| {
        let _one = contexts::one_at_a_time(device);
        let (result, client) = first_context::with_room(call(), device, call);
        if !result.is_success() {
            return result;
        }
        note(client).map_or_else(
            |error| {
                let _ = undo();
                error
            },
            |()| CuResult::SUCCESS,
        )
    })
}

/// The same for cuCtxCreate.
///
/// # Safety
/// `call` writes to `context` if it succeeds.
unsafe fn create_context(
    context: *const CUcontext,
    device: CUdevice,
    call: impl Fn() -> CuResult,
) -> CuResult {
    // SAFETY: the driver has just written through this pointer of the caller's.
    let made = || unsafe { *context };
    make_context(
        device,
        call,
        |client| contexts::noted(made(), device, client),
        // SAFETY: the application does not know of it yet.
        || unsafe { driver_calls::cuCtxDestroy_v2(made()) },
    )
}

/// Records the context that the driver has made current, if its creation was not seen.
fn made_current(result: CuResult) -> CuResult {
    if result.is_success() {
        let _ = guarded(|| {
            let _ = contexts::current();
            CuResult::SUCCESS
        });
    }
    result
}

pub unsafe fn cuDevicePrimaryCtxRetain(ctx: *mut CUcontext, dev: CUdevice) -> CuResult {
    // SAFETY: the caller's arguments.
    let retain = || unsafe { driver_calls::cuDevicePrimaryCtxRetain(ctx, dev) };
    let note = |client| {
        // SAFETY: on success the driver has written the context.
        let context = unsafe { *ctx };
        contexts::noted(context, dev, client)?;
        primary::retained(dev, context);
        Ok(())
    };
    // SAFETY: undoes the retain above.
    make_context(dev, retain, note, || unsafe { driver_calls::cuDevicePrimaryCtxRelease_v2(dev) })
}

/// Entry points that destroy a context, or may: each passes its argument and the driver's call to an action.
macro_rules! ends_context {
    ($($name:ident ($arg:ident: $ty:ty) => $action:expr;)*) => {
        $(
            pub unsafe fn $name($arg: $ty) -> CuResult {
                // SAFETY: the caller's arguments.
                let call = || unsafe { driver_calls::$name($arg) };
                if state::driver_has_gone() {
                    return call();
                }
                guarded(|| ($action)($arg, call))
            }
        )*
    };
}

fn release_primary(device: CUdevice, call: impl FnOnce() -> CuResult) -> CuResult {
    let _one = contexts::one_at_a_time(device);
    contexts::release(device, call)
}

ends_context! {
    cuDevicePrimaryCtxRelease (dev: CUdevice) => release_primary;
    cuDevicePrimaryCtxRelease_v2 (dev: CUdevice) => release_primary;
    cuDevicePrimaryCtxReset (dev: CUdevice) => contexts::reset_and_release;
    cuDevicePrimaryCtxReset_v2 (dev: CUdevice) => contexts::reset;
    cuCtxDestroy (ctx: CUcontext) => contexts::destroy;
    cuCtxDestroy_v2 (ctx: CUcontext) => contexts::destroy;
    cuCtxDetach (ctx: CUcontext) => contexts::detach;
    cuGreenCtxDestroy (ctx: CUgreenCtx) => contexts::green_destroy;
}

pub unsafe fn cuCtxCreate(ctx: *mut CUcontext, flags: u32, dev: CUdevice) -> CuResult {
    // SAFETY: the caller's arguments; on success the driver has written the context.
    unsafe { create_context(ctx, dev, || driver_calls::cuCtxCreate(ctx, flags, dev)) }
}

pub unsafe fn cuCtxCreate_v2(ctx: *mut CUcontext, flags: u32, dev: CUdevice) -> CuResult {
    // SAFETY: as above.
    unsafe { create_context(ctx, dev, || driver_calls::cuCtxCreate_v2(ctx, flags, dev)) }
}

pub unsafe fn cuCtxCreate_v3(
    ctx: *mut CUcontext,
    params: *mut c_void,
    count: i32,
    flags: u32,
    dev: CUdevice,
) -> CuResult {
    // SAFETY: as above.
    unsafe { create_context(ctx, dev, || driver_calls::cuCtxCreate_v3(ctx, params, count, flags, dev)) }
}

pub unsafe fn cuCtxCreate_v4(
    ctx: *mut CUcontext,
    params: *mut c_void,
    flags: u32,
    dev: CUdevice,
) -> CuResult {
    // SAFETY: as above.
    unsafe { create_context(ctx, dev, || driver_calls::cuCtxCreate_v4(ctx, params, flags, dev)) }
}

pub unsafe fn cuCtxAttach(ctx: *mut CUcontext, flags: u32) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = unsafe { driver_calls::cuCtxAttach(ctx, flags) };
    if result.is_success() {
        // SAFETY: the driver has just written through this pointer of the caller's.
        contexts::attached(unsafe { *ctx });
    }
    result
}

pub unsafe fn cuCtxSetCurrent(ctx: CUcontext) -> CuResult {
    // SAFETY: the caller's arguments.
    made_current(unsafe { driver_calls::cuCtxSetCurrent(ctx) })
}

pub unsafe fn cuCtxPushCurrent(ctx: CUcontext) -> CuResult {
    // SAFETY: the caller's arguments.
    made_current(unsafe { driver_calls::cuCtxPushCurrent(ctx) })
}

pub unsafe fn cuCtxPushCurrent_v2(ctx: CUcontext) -> CuResult {
    // SAFETY: the caller's arguments.
    made_current(unsafe { driver_calls::cuCtxPushCurrent_v2(ctx) })
}

pub unsafe fn cuCtxEnablePeerAccess(peer: CUcontext, flags: u32) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = driver_memory::with_room(|| unsafe { driver_calls::cuCtxEnablePeerAccess(peer, flags) });
    guarded(|| {
        if result.is_success()
            && let Some((_, user)) = contexts::current()
        {
            relaxed(|| peer_access::enabled(user, peer));
        }
        result
    })
}

pub unsafe fn cuCtxDisablePeerAccess(peer: CUcontext) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = unsafe { driver_calls::cuCtxDisablePeerAccess(peer) };
    guarded(|| {
        if result.is_success()
            && let Some((_, user)) = contexts::current()
        {
            relaxed(|| peer_access::disabled(user, peer));
        }
        result
    })
}

pub unsafe fn cuGreenCtxCreate(
    ctx: *mut CUgreenCtx,
    desc: CUdevResourceDesc,
    dev: CUdevice,
    flags: u32,
) -> CuResult {
    // SAFETY: the caller's arguments.
    let create = || unsafe { driver_calls::cuGreenCtxCreate(ctx, desc, dev, flags) };
    // SAFETY: on success the driver has written the green context.
    let made = || unsafe { *ctx };
    // SAFETY: the application does not know of it yet.
    make_context(
        dev,
        create,
        |client| contexts::green_made(made(), dev, client),
        || unsafe { driver_calls::cuGreenCtxDestroy(made()) },
    )
}
