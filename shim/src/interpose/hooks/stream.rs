//! How streams are created and destroyed.

#![allow(non_snake_case, clippy::missing_safety_doc, missing_docs)]

use super::guard::{guarded, relaxed};
use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::interpose::driver_calls;
use crate::memory::devices;
use crate::process::{contexts, driver_memory};
use crate::submit::{captures, flow, green};
use crate::{async_pool, state};

fn stream_made(result: CuResult, stream: *const CUstream, flags: u32) -> CuResult {
    if result.is_success()
        && let Some((device, owner)) = contexts::current()
        && let Ok(current) = device.driver.ctx_current()
    {
        // SAFETY: the driver has just written through this pointer of the caller's.
        device.streams.add(unsafe { *stream }, owner, green::of_context(current), flags);
    }
    result
}

/// Destroys a stream with `call`. Its work goes on, so its end is marked before. If the driver refuses, the stream is tracked
/// again.
fn destroy_stream(stream: CUstream, call: impl FnOnce() -> CuResult) -> CuResult {
    if state::driver_has_gone() {
        return call();
    }
    guarded(|| {
        let Ok(driver) = Driver::get() else { return call() };
        let all = devices::all();
        let tracked: Vec<_> = relaxed(|| {
            async_pool::stream_ends(driver, stream);
            all.iter()
                .filter_map(|device| {
                    Some((
                        device,
                        device.streams.remove(driver, stream, || captures::work_before_capture(stream))?,
                    ))
                })
                .collect()
        });
        flow::drop_stream(stream);
        let result = call();
        if result.is_success() {
            captures::stream_ended(stream);
        } else {
            tracked.into_iter().for_each(|(device, stream)| device.streams.put_back(stream));
        }
        result
    })
}

pub unsafe fn cuStreamCreate(stream: *mut CUstream, flags: u32) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = driver_memory::with_room(|| unsafe { driver_calls::cuStreamCreate(stream, flags) });
    guarded(|| stream_made(result, stream, flags))
}

pub unsafe fn cuStreamCreateWithPriority(stream: *mut CUstream, flags: u32, priority: i32) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = driver_memory::with_room(|| unsafe {
        driver_calls::cuStreamCreateWithPriority(stream, flags, priority)
    });
    guarded(|| stream_made(result, stream, flags))
}

pub unsafe fn cuStreamDestroy(stream: CUstream) -> CuResult {
    // SAFETY: the caller's arguments.
    destroy_stream(stream, || unsafe { driver_calls::cuStreamDestroy(stream) })
}

pub unsafe fn cuStreamDestroy_v2(stream: CUstream) -> CuResult {
    // SAFETY: the caller's arguments.
    destroy_stream(stream, || unsafe { driver_calls::cuStreamDestroy_v2(stream) })
}

pub unsafe fn cuGreenCtxStreamCreate(
    stream: *mut CUstream,
    green_ctx: CUgreenCtx,
    flags: u32,
    priority: i32,
) -> CuResult {
    // SAFETY: the caller's arguments.
    let create = || unsafe { driver_calls::cuGreenCtxStreamCreate(stream, green_ctx, flags, priority) };
    let result = driver_memory::with_room(create);
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
