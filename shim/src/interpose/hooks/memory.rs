//! cuInit, cuMemAlloc, cuMemFree, and queries of how much memory there is.

#![allow(non_snake_case, clippy::missing_safety_doc, missing_docs)]

use super::guard::{guarded, relaxed};
use crate::cuda::abi::*;
use crate::interpose::driver_calls;
use crate::memory::device::Device;
use crate::memory::{devices, sync_memops, unmovable};
use crate::process::driver_memory::reserve_address;
use crate::process::{attach, contexts, memory_info, reservation};
use crate::submit::captures;
use crate::{async_pool, state};

pub unsafe fn cuInit(flags: u32) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = unsafe { driver_calls::cuInit(flags) };
    guarded(|| match result {
        CuResult::SUCCESS => attach::initialise().map_or_else(|error| error, |()| result),
        failed => failed,
    })
}

/// Every row of a pitched allocation begins at a multiple of so many bytes, as with the driver on all recent GPUs.
const PITCH_ALIGNMENT: usize = 512;

/// Allocates memory. If there is none, releases the unused memory of pools and tries again.
fn allocate(device: &Device, bytes: u64, context: CUcontext) -> Result<CUdeviceptr, CuResult> {
    device.once_freed(|| match device.allocate(bytes, context) {
        Err(CuResult::OUT_OF_MEMORY) if async_pool::reclaim(device) => device.allocate(bytes, context),
        result => result,
    })
}

pub unsafe fn cuMemAlloc_v2(dptr: *mut CUdeviceptr, bytesize: usize) -> CuResult {
    guarded(|| {
        let Some((device, context)) = contexts::current_intact() else {
            // SAFETY: the caller's arguments.
            return unsafe { driver_calls::cuMemAlloc_v2(dptr, bytesize) };
        };
        if unmovable::wanted() {
            // SAFETY: the caller's arguments; on success the driver has written the address.
            return unsafe {
                reserve_address(dptr, bytesize as u64, || driver_calls::cuMemAlloc_v2(dptr, bytesize))
            };
        }
        if dptr.is_null() {
            return CuResult::INVALID_VALUE;
        }
        // As the driver does: a refused allocation is at address 0.
        // SAFETY: the caller's pointer to where the address goes, not null.
        unsafe { dptr.write(0) };
        // As the driver does: 0 bytes are refused for that reason, before a capture is considered.
        if bytesize > 0
            && let Err(refused) = captures::refuse_unsafe()
        {
            return refused;
        }
        match relaxed(|| allocate(&device, bytesize as u64, context)) {
            Ok(address) => {
                sync_memops::allocated(address);
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
        let Some((device, context)) = contexts::current_intact() else {
            // SAFETY: the caller's arguments.
            return unsafe { driver_calls::cuMemAllocPitch_v2(dptr, pitch, width, height, element_size) };
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
        // As the driver does, also for an allocation that it refuses afterwards.
        // SAFETY: the caller's pointer to where the pitch goes, not null.
        unsafe { pitch.write(if height == 0 { 0 } else { row }) };
        let Some(bytes) = row.checked_mul(height) else {
            tracing::warn!(
                gpu = %device.gpu,
                "cuMemAllocPitch is refused: {height} rows of {width} B are more than 2^64 B; the width is in bytes"
            );
            // As the driver does, whose product wraps around.
            return match row.wrapping_mul(height) {
                0 => CuResult::INVALID_VALUE,
                _ => CuResult::OUT_OF_MEMORY,
            };
        };
        if bytes == 0 {
            return CuResult::INVALID_VALUE;
        }
        if unmovable::wanted() {
            // SAFETY: the caller's arguments; on success the driver has written the address.
            return unsafe {
                reserve_address(dptr, bytes as u64, || {
                    driver_calls::cuMemAllocPitch_v2(dptr, pitch, width, height, element_size)
                })
            };
        }
        if let Err(refused) = captures::refuse_unsafe() {
            return refused;
        }
        match relaxed(|| allocate(&device, bytes as u64, context)) {
            Ok(address) => {
                sync_memops::allocated(address);
                // SAFETY: the caller's pointer to where the address goes, not null.
                unsafe { dptr.write(address) };
            }
            Err(result) => return result,
        }
        CuResult::SUCCESS
    })
}

pub unsafe fn cuMemFree_v2(dptr: CUdeviceptr) -> CuResult {
    guarded(|| {
        if let Err(broken) = state::intact() {
            return broken;
        }
        if contexts::is_broken() {
            // Nothing is freed now: the memory is released with the context.
            // SAFETY: the caller's arguments.
            return unsafe { driver_calls::cuMemFree_v2(dptr) };
        }
        let begins = |device: &std::sync::Arc<Device>| {
            device.memory().containing(dptr).is_some_and(|of| of.base == dptr)
        };
        if captures::is_capturing()
            && (async_pool::find(dptr).is_some() || devices::all().iter().any(begins))
            && let Err(refused) = captures::refuse_unsafe()
        {
            return refused;
        }
        if let Some(result) = relaxed(|| async_pool::free_now(dptr)) {
            return result;
        }
        if devices::all().iter().any(|device| relaxed(|| device.free(dptr))) {
            return CuResult::SUCCESS;
        }
        // SAFETY: the caller's arguments.
        let result = unsafe { driver_calls::cuMemFree_v2(dptr) };
        if result.is_success() {
            reservation::release(dptr);
        }
        if result == CuResult::INVALID_VALUE {
            match super::pointers::Allocated::at(dptr) {
                Some(_) if crate::ipc::containing(dptr).is_some() => tracing::warn!(
                    "cuMemFree({dptr:#x}) is refused, as without nvshare: it is memory of another process; close it by cuIpcCloseMemHandle"
                ),
                Some(known) if known.is_mapped() => tracing::warn!(
                    "cuMemFree({dptr:#x}) is refused, as without nvshare: the memory there was mapped by cuMemMap; unmap it by cuMemUnmap"
                ),
                Some(allocation) => tracing::warn!(
                    "cuMemFree({dptr:#x}) is refused, as without nvshare: it lies inside the allocation of {} at {:#x}; free that address",
                    nvshare::units::format_size(allocation.size),
                    allocation.base
                ),
                None => tracing::warn!(
                    "cuMemFree({dptr:#x}) is refused, as without nvshare: no allocation begins there; it was never made, or is freed already"
                ),
            }
        }
        result
    })
}

/// Bytes as a 32-bit number, or the largest such number if they are more.
fn in_32_bits(bytes: u64) -> u32 {
    bytes.try_into().unwrap_or(u32::MAX)
}

/// Reports free and total memory of the current context's GPU, or has the driver answer if the GPU is not known. Each pointer
/// may be null, as with the driver.
fn tell_memory<T>(
    [free, total]: [*mut T; 2],
    figure: impl Fn(u64) -> T,
    ask: impl FnOnce() -> CuResult,
) -> CuResult {
    guarded(|| {
        let Some((device, _)) = contexts::current_intact() else { return ask() };
        relaxed(|| async_pool::collect(&device));
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
    tell_memory(
        [free, total],
        |bytes| bytes as usize,
        || unsafe { driver_calls::cuMemGetInfo_v2(free, total) },
    )
}

pub unsafe fn cuMemGetInfo(free: *mut u32, total: *mut u32) -> CuResult {
    // Present drivers refuse this old form in any context.
    // SAFETY: the caller's arguments.
    match unsafe { driver_calls::cuMemGetInfo(free, total) } {
        CuResult::SUCCESS => tell_memory([free, total], in_32_bits, || CuResult::SUCCESS),
        refused => refused,
    }
}

/// Replaces the driver's answer for the whole GPU by the client's total, which may be less.
fn told_total(result: CuResult, dev: CUdevice, correct: impl FnOnce(u64)) -> CuResult {
    guarded(|| {
        if result.is_success()
            && let Some(figures) = memory_info::of_device(dev)
        {
            correct(figures.total);
        }
        result
    })
}

pub unsafe fn cuDeviceTotalMem_v2(bytes: *mut usize, dev: CUdevice) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = unsafe { driver_calls::cuDeviceTotalMem_v2(bytes, dev) };
    // SAFETY: the driver has just written through this pointer of the caller's.
    told_total(result, dev, |total| unsafe { bytes.write(total as usize) })
}

pub unsafe fn cuDeviceTotalMem(bytes: *mut u32, dev: CUdevice) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = unsafe { driver_calls::cuDeviceTotalMem(bytes, dev) };
    // SAFETY: the driver has just written through this pointer of the caller's.
    told_total(result, dev, |total| unsafe { bytes.write(in_32_bits(total)) })
}
