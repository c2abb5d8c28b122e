//! What nvshare does at the entry points that need more than the gate.
//!
//! Each function has the signature of the driver's entry point of that name, and is called in its place. None may
//! unwind into C: whatever could panic runs inside [`guarded`].

#![allow(non_snake_case, clippy::missing_safety_doc, missing_docs)]

mod stream_ordered;

use std::ffi::c_void;

use crate::abi::*;
use crate::contexts;
use crate::device::Shared;
use crate::driver::Driver;
use crate::pools;
use crate::room::keep;
use crate::session;
use crate::synchronous;
use crate::table::real;
use crate::truth;
use crate::unmovable;
pub use stream_ordered::*;

mod ipc;
mod placed;
mod pointers;
mod vmm;

pub use ipc::*;
pub use placed::*;
pub use pointers::*;
pub use vmm::*;

/// Every row of a pitched allocation begins at a multiple of this, as the driver's own do on all recent GPUs.
const PITCH_ALIGNMENT: usize = 512;

/// Runs what might panic. A panic is a bug of ours, and no reason to take the host program down.
fn guarded(action: impl FnOnce() -> CuResult) -> CuResult {
    if session::driver_has_gone() {
        return CuResult::DEINITIALIZED;
    }
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(action)).unwrap_or_else(|_| {
        tracing::error!("nvshare panicked inside a CUDA call; the call fails with CUDA_ERROR_UNKNOWN");
        CuResult::UNKNOWN
    });
    crate::thread::call_ends();
    result
}

/// Runs `action` in a capture mode that allows it to map memory while another thread captures: reserving, creating and
/// mapping touch no stream, so they cannot end up in anybody's graph.
fn relaxed<T>(action: impl FnOnce() -> T) -> T {
    match Driver::get() {
        Ok(driver) => driver.relaxed(action),
        Err(_) => action(),
    }
}

/// Makes or retains a context on a GPU with `call`, and room for it if the GPU is full. On success the process takes `note` of
/// it; if that fails, because the process cannot take part, the context is undone.
fn make_context(
    device: CUdevice,
    call: impl Fn() -> CuResult,
    note: impl FnOnce(Option<crate::arrival::Newcomer>) -> Result<(), CuResult>,
    undo: impl FnOnce() -> CuResult,
) -> CuResult {
    guarded(|| {
        let _one = contexts::one_at_a_time(device);
        let (result, newcomer) = crate::arrival::with_room(call(), device, call);
        if !result.is_success() {
            return result;
        }
        note(newcomer).map_or_else(
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
/// `call` writes a context there if it succeeds.
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
        |newcomer| contexts::noted(made(), device, newcomer),
        // SAFETY: nobody else knows of it yet.
        || unsafe { real::cuCtxDestroy_v2(made()) },
    )
}

/// The driver has made a context current. One that nobody saw being made is known from now on.
fn made_current(result: CuResult) -> CuResult {
    if result.is_success() {
        let _ = guarded(|| {
            let _ = session::current();
            CuResult::SUCCESS
        });
    }
    result
}

fn stream_made(result: CuResult, stream: *const CUstream, flags: u32) -> CuResult {
    if result.is_success()
        && let Some((device, owner)) = session::current()
        && let Ok(current) = device.driver.ctx_current()
    {
        // SAFETY: the driver has just written through this pointer of the caller's.
        device.streams.add(unsafe { *stream }, owner, session::green_of(current), flags);
    }
    result
}

/// Destroys a stream with `call`. What it has to do goes on, so its end is marked first, while it can be. If the driver
/// refuses, the stream is tracked as before.
fn destroy_stream(stream: CUstream, call: impl FnOnce() -> CuResult) -> CuResult {
    if session::driver_has_gone() {
        return call();
    }
    guarded(|| {
        let Ok(driver) = Driver::get() else { return call() };
        let all = session::all();
        let tracked: Vec<_> = relaxed(|| {
            pools::stream_ends(driver, stream);
            all.iter()
                .filter_map(|device| {
                    Some((
                        device,
                        device.streams.remove(driver, stream, || session::work_before_capture(stream))?,
                    ))
                })
                .collect()
        });
        crate::flow::forget_stream(stream);
        let result = call();
        if result.is_success() {
            session::stream_ended(stream);
        } else {
            tracked.into_iter().for_each(|(device, stream)| device.streams.put_back(stream));
        }
        result
    })
}

// Init

pub unsafe fn cuInit(flags: u32) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = unsafe { real::cuInit(flags) };
    guarded(|| match result {
        CuResult::SUCCESS => session::initialise().map_or_else(|error| error, |()| result),
        failed => failed,
    })
}

// Alloc

/// What the pools do not use makes room.
fn allocate(device: &Shared, bytes: u64, context: CUcontext) -> Result<CUdeviceptr, CuResult> {
    device.once_freed(|| match device.allocate(bytes, context) {
        Err(CuResult::OUT_OF_MEMORY) if pools::reclaim(device) => device.allocate(bytes, context),
        result => result,
    })
}

pub unsafe fn cuMemAlloc_v2(dptr: *mut CUdeviceptr, bytesize: usize) -> CuResult {
    guarded(|| {
        let Some((device, context)) = session::current() else {
            // SAFETY: the caller's arguments.
            return unsafe { real::cuMemAlloc_v2(dptr, bytesize) };
        };
        if unmovable::wanted() {
            // SAFETY: the caller's arguments; on success the driver has written the address.
            return keep(
                bytesize as u64,
                || unsafe { real::cuMemAlloc_v2(dptr, bytesize) },
                || unsafe { *dptr },
            );
        }
        if dptr.is_null() {
            return CuResult::INVALID_VALUE;
        }
        // As the driver does: what is refused is at address 0.
        // SAFETY: the caller's pointer to where the address goes, not null.
        unsafe { dptr.write(0) };
        // Nothing is refused for being nothing.
        if bytesize > 0
            && let Err(refused) = session::refuse_unsafe()
        {
            return refused;
        }
        match relaxed(|| allocate(&device, bytesize as u64, context)) {
            Ok(address) => {
                synchronous::allocated(address);
                // SAFETY: the caller's pointer to where the address goes, not null.
                unsafe { dptr.write(address) };
            }
            Err(result) => return result,
        }
        CuResult::SUCCESS
    })
}

pub unsafe fn cuMemAllocPitch_v2(
    dptr: *mut CUdeviceptr,
    pitch: *mut usize,
    width: usize,
    height: usize,
    element_size: u32,
) -> CuResult {
    guarded(|| {
        let Some((device, context)) = session::current() else {
            // SAFETY: the caller's arguments.
            return unsafe { real::cuMemAllocPitch_v2(dptr, pitch, width, height, element_size) };
        };
        for place in [dptr.cast::<u64>(), pitch.cast()] {
            if !place.is_null() {
                // SAFETY: the caller's pointer to eight bytes for the answer, not null.
                unsafe { place.write(0) };
            }
        }
        if dptr.is_null() || pitch.is_null() || !matches!(element_size, 4 | 8 | 16) {
            return CuResult::INVALID_VALUE;
        }
        let row = width.checked_next_multiple_of(PITCH_ALIGNMENT).unwrap_or(0);
        // SAFETY: the caller's pointer to where the pitch goes, not null. The driver says it of what it then refuses too.
        unsafe { pitch.write(if height == 0 { 0 } else { row }) };
        let Some(bytes) = row.checked_mul(height) else {
            tracing::warn!(
                gpu = %device.gpu,
                "cuMemAllocPitch: {height} rows of {width} B are more than an address can count; the width is in bytes"
            );
            // What wraps to nothing is nothing to the driver.
            return match row.wrapping_mul(height) {
                0 => CuResult::INVALID_VALUE,
                _ => CuResult::OUT_OF_MEMORY,
            };
        };
        if bytes == 0 {
            return CuResult::INVALID_VALUE;
        }
        if unmovable::wanted() {
            return keep(
                bytes as u64,
                // SAFETY: the caller's arguments; on success the driver has written the address.
                || unsafe { real::cuMemAllocPitch_v2(dptr, pitch, width, height, element_size) },
                // SAFETY: as above.
                || unsafe { *dptr },
            );
        }
        if let Err(refused) = session::refuse_unsafe() {
            return refused;
        }
        match relaxed(|| allocate(&device, bytes as u64, context)) {
            Ok(address) => {
                synchronous::allocated(address);
                // SAFETY: the caller's pointer to where the address goes, not null.
                unsafe { dptr.write(address) };
            }
            Err(result) => return result,
        }
        CuResult::SUCCESS
    })
}

// Free

pub unsafe fn cuMemFree_v2(dptr: CUdeviceptr) -> CuResult {
    guarded(|| {
        if let Err(broken) = session::intact() {
            return broken;
        }
        if let Some(result) = relaxed(|| pools::free_now(dptr)) {
            return result;
        }
        let begins = |device: &std::sync::Arc<Shared>| {
            device.memory().containing(dptr).is_some_and(|of| of.base == dptr)
        };
        if session::is_capturing()
            && session::all().iter().any(begins)
            && let Err(refused) = session::refuse_unsafe()
        {
            return refused;
        }
        if session::all().iter().any(|device| relaxed(|| device.free(dptr))) {
            return CuResult::SUCCESS;
        }
        // SAFETY: the caller's arguments.
        let result = unsafe { real::cuMemFree_v2(dptr) };
        if result.is_success() {
            crate::room::let_go(dptr);
        }
        if result == CuResult::INVALID_VALUE {
            match Allocated::at(dptr) {
                Some(_) if crate::ipc::containing(dptr).is_some() => tracing::warn!(
                    "cuMemFree({dptr:#x}): it is another process's memory; close it by cuIpcCloseMemHandle"
                ),
                Some(known) if known.is_mapped() => tracing::warn!(
                    "cuMemFree({dptr:#x}): the process has mapped memory there; unmap it by cuMemUnmap"
                ),
                Some(allocation) => tracing::warn!(
                    "cuMemFree({dptr:#x}): it lies inside the allocation of {} at {:#x}; free that address",
                    nvshare::units::format_size(allocation.size),
                    allocation.base
                ),
                None => tracing::warn!(
                    "cuMemFree({dptr:#x}): no allocation begins there; it was never made, or is freed already"
                ),
            }
        }
        result
    })
}

// QueryMemory

/// A figure in a form of 32 bits: as much as it can tell.
fn in_32_bits(bytes: u64) -> u32 {
    bytes.try_into().unwrap_or(u32::MAX)
}

/// Answers with what the current context's GPU has, or has the driver answer. The driver writes what it is given a place
/// for.
fn tell_memory<T>(
    [free, total]: [*mut T; 2],
    figure: impl Fn(u64) -> T,
    ask: impl FnOnce() -> CuResult,
) -> CuResult {
    guarded(|| {
        let Some((device, _)) = session::current() else { return ask() };
        relaxed(|| pools::collect(&device));
        let figures = device.figures();
        for (place, bytes) in [(free, figures.free), (total, figures.total)] {
            if !place.is_null() {
                // SAFETY: the caller's pointer to where the figure goes, not null.
                unsafe { place.write(figure(bytes)) };
            }
        }
        CuResult::SUCCESS
    })
}

pub unsafe fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> CuResult {
    // SAFETY: the caller's arguments.
    tell_memory([free, total], |bytes| bytes as usize, || unsafe { real::cuMemGetInfo_v2(free, total) })
}

pub unsafe fn cuMemGetInfo(free: *mut u32, total: *mut u32) -> CuResult {
    // Today's drivers refuse it in any context that can be made.
    // SAFETY: the caller's arguments.
    match unsafe { real::cuMemGetInfo(free, total) } {
        CuResult::SUCCESS => tell_memory([free, total], in_32_bits, || CuResult::SUCCESS),
        refused => refused,
    }
}

/// The driver has answered for the card; what the client has of it may be less.
fn told_total(result: CuResult, dev: CUdevice, correct: impl FnOnce(u64)) -> CuResult {
    guarded(|| {
        if result.is_success()
            && let Some(figures) = truth::of_device(dev)
        {
            correct(figures.total);
        }
        result
    })
}

pub unsafe fn cuDeviceTotalMem_v2(bytes: *mut usize, dev: CUdevice) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = unsafe { real::cuDeviceTotalMem_v2(bytes, dev) };
    // SAFETY: the driver has just written through this pointer of the caller's.
    told_total(result, dev, |total| unsafe { bytes.write(total as usize) })
}

pub unsafe fn cuDeviceTotalMem(bytes: *mut u32, dev: CUdevice) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = unsafe { real::cuDeviceTotalMem(bytes, dev) };
    // SAFETY: the driver has just written through this pointer of the caller's.
    told_total(result, dev, |total| unsafe { bytes.write(in_32_bits(total)) })
}

// Context

pub unsafe fn cuDevicePrimaryCtxRetain(ctx: *mut CUcontext, dev: CUdevice) -> CuResult {
    // SAFETY: the caller's arguments.
    let retain = || unsafe { real::cuDevicePrimaryCtxRetain(ctx, dev) };
    let note = |newcomer| {
        // SAFETY: on success the driver has written the context.
        let context = unsafe { *ctx };
        contexts::noted(context, dev, newcomer)?;
        contexts::retained(dev, context);
        Ok(())
    };
    // SAFETY: it was retained here.
    make_context(dev, retain, note, || unsafe { real::cuDevicePrimaryCtxRelease_v2(dev) })
}

/// Entry points that end a context, or may: what each does, given how the driver is called.
macro_rules! ends_context {
    ($($name:ident ($arg:ident: $ty:ty) => $action:expr;)*) => {
        $(
            pub unsafe fn $name($arg: $ty) -> CuResult {
                // SAFETY: the caller's arguments.
                let call = || unsafe { real::$name($arg) };
                if session::driver_has_gone() {
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
    cuDevicePrimaryCtxReset (dev: CUdevice) => contexts::reset;
    cuDevicePrimaryCtxReset_v2 (dev: CUdevice) => contexts::reset;
    cuCtxDestroy (ctx: CUcontext) => contexts::destroy;
    cuCtxDestroy_v2 (ctx: CUcontext) => contexts::destroy;
    cuCtxDetach (ctx: CUcontext) => contexts::detach;
    cuGreenCtxDestroy (ctx: CUgreenCtx) => contexts::green_destroy;
}

pub unsafe fn cuCtxCreate(ctx: *mut CUcontext, flags: u32, dev: CUdevice) -> CuResult {
    // SAFETY: the caller's arguments; on success the driver has written the context.
    unsafe { create_context(ctx, dev, || real::cuCtxCreate(ctx, flags, dev)) }
}

pub unsafe fn cuCtxCreate_v2(ctx: *mut CUcontext, flags: u32, dev: CUdevice) -> CuResult {
    // SAFETY: as above.
    unsafe { create_context(ctx, dev, || real::cuCtxCreate_v2(ctx, flags, dev)) }
}

pub unsafe fn cuCtxCreate_v3(
    ctx: *mut CUcontext,
    params: *mut c_void,
    count: i32,
    flags: u32,
    dev: CUdevice,
) -> CuResult {
    // SAFETY: as above.
    unsafe { create_context(ctx, dev, || real::cuCtxCreate_v3(ctx, params, count, flags, dev)) }
}

pub unsafe fn cuCtxCreate_v4(
    ctx: *mut CUcontext,
    params: *mut c_void,
    flags: u32,
    dev: CUdevice,
) -> CuResult {
    // SAFETY: as above.
    unsafe { create_context(ctx, dev, || real::cuCtxCreate_v4(ctx, params, flags, dev)) }
}

pub unsafe fn cuCtxAttach(ctx: *mut CUcontext, flags: u32) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = unsafe { real::cuCtxAttach(ctx, flags) };
    if result.is_success() {
        // SAFETY: the driver has just written through this pointer of the caller's.
        contexts::attached(unsafe { *ctx });
    }
    result
}

pub unsafe fn cuCtxSetCurrent(ctx: CUcontext) -> CuResult {
    // SAFETY: the caller's arguments.
    made_current(unsafe { real::cuCtxSetCurrent(ctx) })
}

pub unsafe fn cuCtxPushCurrent(ctx: CUcontext) -> CuResult {
    // SAFETY: the caller's arguments.
    made_current(unsafe { real::cuCtxPushCurrent(ctx) })
}

pub unsafe fn cuCtxPushCurrent_v2(ctx: CUcontext) -> CuResult {
    // SAFETY: the caller's arguments.
    made_current(unsafe { real::cuCtxPushCurrent_v2(ctx) })
}

pub unsafe fn cuCtxEnablePeerAccess(peer: CUcontext, flags: u32) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = crate::room::with_room(|| unsafe { real::cuCtxEnablePeerAccess(peer, flags) });
    guarded(|| {
        if result.is_success() {
            relaxed(|| crate::peers::enabled(peer));
        }
        result
    })
}

pub unsafe fn cuCtxDisablePeerAccess(peer: CUcontext) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = unsafe { real::cuCtxDisablePeerAccess(peer) };
    guarded(|| {
        if result.is_success() {
            relaxed(|| crate::peers::disabled(peer));
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
    let create = || unsafe { real::cuGreenCtxCreate(ctx, desc, dev, flags) };
    // SAFETY: on success the driver has written the green context.
    let made = || unsafe { *ctx };
    // SAFETY: nobody else knows of it yet.
    make_context(
        dev,
        create,
        |newcomer| contexts::green_made(made(), dev, newcomer),
        || unsafe { real::cuGreenCtxDestroy(made()) },
    )
}

// Stream

pub unsafe fn cuStreamCreate(stream: *mut CUstream, flags: u32) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = crate::room::with_room(|| unsafe { real::cuStreamCreate(stream, flags) });
    guarded(|| stream_made(result, stream, flags))
}

pub unsafe fn cuStreamCreateWithPriority(stream: *mut CUstream, flags: u32, priority: i32) -> CuResult {
    // SAFETY: the caller's arguments.
    let result =
        crate::room::with_room(|| unsafe { real::cuStreamCreateWithPriority(stream, flags, priority) });
    guarded(|| stream_made(result, stream, flags))
}

pub unsafe fn cuStreamDestroy(stream: CUstream) -> CuResult {
    // SAFETY: the caller's arguments.
    destroy_stream(stream, || unsafe { real::cuStreamDestroy(stream) })
}

pub unsafe fn cuStreamDestroy_v2(stream: CUstream) -> CuResult {
    // SAFETY: the caller's arguments.
    destroy_stream(stream, || unsafe { real::cuStreamDestroy_v2(stream) })
}

pub unsafe fn cuGreenCtxStreamCreate(
    stream: *mut CUstream,
    green_ctx: CUgreenCtx,
    flags: u32,
    priority: i32,
) -> CuResult {
    // SAFETY: the caller's arguments.
    let create = || unsafe { real::cuGreenCtxStreamCreate(stream, green_ctx, flags, priority) };
    let result = crate::room::with_room(create);
    guarded(|| {
        if result.is_success()
            && let Some((device, green)) = contexts::green(green_ctx)
        {
            // SAFETY: the driver has just written through this pointer of the caller's.
            device.streams.add(unsafe { *stream }, green.owner, green.green, flags);
        }
        result
    })
}

// Capture

/// Entry points that begin or end a capture of their stream, or have it join one, each in the form for the legacy default stream and in that
/// for a thread's own.
macro_rules! captures {
    ($($action:ident $name:ident / $per_thread:ident (stream $(, $arg:ident: $ty:ty)*);)*) => {
        $(
            pub unsafe fn $name(stream: CUstream $(, $arg: $ty)*) -> CuResult {
                // SAFETY: the caller's arguments.
                guarded(|| session::$action(stream, false, || unsafe { real::$name(stream $(, $arg)*) }))
            }

            pub unsafe fn $per_thread(stream: CUstream $(, $arg: $ty)*) -> CuResult {
                // SAFETY: the caller's arguments.
                guarded(|| session::$action(stream, true, || unsafe { real::$per_thread(stream $(, $arg)*) }))
            }
        )*
    };
}

captures! {
    begin_capture cuStreamBeginCapture / cuStreamBeginCapture_ptsz (stream);
    begin_capture cuStreamBeginCapture_v2 / cuStreamBeginCapture_v2_ptsz (stream, mode: CUstreamCaptureMode);
    begin_capture cuStreamBeginCaptureToGraph / cuStreamBeginCaptureToGraph_ptsz (
        stream, graph: CUgraph, dependencies: *const CUgraphNode, dependency_data: *const c_void,
        num_dependencies: usize, mode: CUstreamCaptureMode
    );
    begin_capture cuStreamBeginRecaptureToGraph / cuStreamBeginRecaptureToGraph_ptsz (
        stream, mode: CUstreamCaptureMode, graph: CUgraph, callback: *mut c_void, user_data: *mut c_void
    );
    begin_capture cuStreamBeginCaptureToCig / cuStreamBeginCaptureToCig_ptsz (stream, params: *mut c_void);
    end_capture cuStreamEndCapture / cuStreamEndCapture_ptsz (stream, graph: *mut CUgraph);
    end_capture cuStreamEndCaptureToCig / cuStreamEndCaptureToCig_ptsz (stream);
    join_capture cuStreamWaitEvent / cuStreamWaitEvent_ptsz (stream, event: CUevent, flags: u32);
}
