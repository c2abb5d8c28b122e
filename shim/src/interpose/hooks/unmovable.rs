//! Memory that only the driver can place ([`crate::process::reservation`]).

#![allow(non_snake_case, clippy::missing_safety_doc, missing_docs)]

use super::guard::guarded;
use crate::cuda::abi::*;
use crate::interpose::driver_calls;
use crate::process::driver_memory::{reserve, reserve_address};
use crate::process::reservation::release;

/// Bytes of one channel of an array's element, by `CUarray_format`: 4 for every format that is not listed, which also covers
/// the block-compressed formats.
fn format_bytes(format: u32) -> u64 {
    match format {
        0x01 | 0x08 => 1,
        0x02 | 0x09 | 0x10 => 2,
        _ => 4,
    }
}

/// Flags of arrays whose memory is allocated separately: sparse ones, and those that are mapped later.
const CUDA_ARRAY3D_SPARSE: u32 = 0x40;
const CUDA_ARRAY3D_DEFERRED_MAPPING: u32 = 0x80;

fn array_bytes(sides: [usize; 3], format: u32, channels: u32) -> u64 {
    let element = format_bytes(format) * u64::from(channels);
    sides.iter().fold(element, |bytes, side| bytes.saturating_mul((*side).max(1) as u64))
}

/// Bytes of an array of up to three dimensions.
///
/// # Safety
/// `desc` is null, or points to a description.
unsafe fn array_3d_bytes(desc: *const CUDA_ARRAY3D_DESCRIPTOR) -> u64 {
    // SAFETY: the caller's promise.
    let desc = unsafe { desc.as_ref() };
    let elsewhere = CUDA_ARRAY3D_SPARSE | CUDA_ARRAY3D_DEFERRED_MAPPING;
    desc.filter(|desc| desc.flags & elsewhere == 0)
        .map_or(0, |desc| array_bytes([desc.width, desc.height, desc.depth], desc.format, desc.channels))
}

/// Creates an array of `bytes` bytes.
///
/// # Safety
/// `call` writes a handle to `array` if it succeeds.
unsafe fn make(bytes: u64, array: *mut CUarray, call: impl Fn() -> CuResult) -> CuResult {
    // SAFETY: the caller's promise.
    guarded(|| reserve(bytes, call, || unsafe { *array }.0 as u64).unwrap_or_else(|refused| refused))
}

pub unsafe fn cuArrayCreate_v2(array: *mut CUarray, desc: *const CUDA_ARRAY_DESCRIPTOR) -> CuResult {
    // SAFETY: the caller's pointer to a description, if it is one.
    let bytes = unsafe { desc.as_ref() }
        .map_or(0, |desc| array_bytes([desc.width, desc.height, 1], desc.format, desc.channels));
    // SAFETY: the caller's arguments.
    unsafe { make(bytes, array, || driver_calls::cuArrayCreate_v2(array, desc)) }
}

pub unsafe fn cuArray3DCreate_v2(array: *mut CUarray, desc: *const CUDA_ARRAY3D_DESCRIPTOR) -> CuResult {
    // SAFETY: the caller's arguments.
    unsafe { make(array_3d_bytes(desc), array, || driver_calls::cuArray3DCreate_v2(array, desc)) }
}

pub unsafe fn cuMipmappedArrayCreate(
    array: *mut CUarray,
    desc: *const CUDA_ARRAY3D_DESCRIPTOR,
    levels: u32,
) -> CuResult {
    // SAFETY: the caller's pointer to a description, if it is one.
    let finest = unsafe { array_3d_bytes(desc) };
    // Each further level has at most half of the one before.
    let bytes = if levels > 1 { finest.saturating_mul(2) } else { finest };
    // SAFETY: the caller's arguments.
    unsafe { make(bytes, array, || driver_calls::cuMipmappedArrayCreate(array, desc, levels)) }
}

/// Releases the reservation for a handle, if the driver has freed its memory.
fn freed(result: CuResult, handle: u64) -> CuResult {
    guarded(|| {
        if result.is_success() {
            release(handle);
        }
        result
    })
}

pub unsafe fn cuArrayDestroy(array: CUarray) -> CuResult {
    // SAFETY: the caller's arguments.
    freed(unsafe { driver_calls::cuArrayDestroy(array) }, array.0 as u64)
}

pub unsafe fn cuMipmappedArrayDestroy(array: CUarray) -> CuResult {
    // SAFETY: the caller's arguments.
    freed(unsafe { driver_calls::cuMipmappedArrayDestroy(array) }, array.0 as u64)
}

pub unsafe fn cuMemAllocManaged(dptr: *mut CUdeviceptr, bytesize: usize, flags: u32) -> CuResult {
    guarded(|| {
        // If the GPU accesses a page of managed memory and has no room for any, the access is an illegal address
        // (tests/gpu/facts.cu), so room is reserved. The application may ask for more than the GPU has, because the driver pages;
        // then all that is left is reserved.
        let device = crate::process::contexts::current_intact().map(|(device, _)| device);
        let left = device.as_ref().map_or(0, |device| {
            nvshare::units::bytes_of(device.books.usable().saturating_sub(device.books.demand()))
        });
        // The client's memory limit counts all of it, wherever it would lie.
        if let Some(Err(refused)) = device.map(|device| device.within_limit(bytesize as u64)) {
            if !dptr.is_null() {
                // As the driver does when it refuses.
                // SAFETY: the caller's pointer to where the address goes, not null.
                unsafe { dptr.write(0) };
            }
            return refused;
        }
        // SAFETY: the caller's arguments; on success the driver has written the address.
        unsafe {
            reserve_address(dptr, (bytesize as u64).min(left), || {
                driver_calls::cuMemAllocManaged(dptr, bytesize, flags)
            })
        }
    })
}
