//! The entry points of stream-ordered memory and its pools. The implementation is in [`crate::async_pool`].
//!
//! These calls go to the driver:
//! - those in a stream that captures: they become nodes of a graph, whose memory the driver allocates at its launch;
//! - those of a pool that nvshare does not serve ([`async_pool::gpu_of`]), and frees of its memory;
//! - invalid calls, for which the driver returns the right error.
//!
//! Freeing during a capture memory that was allocated outside it is such an invalid call: the driver refuses it with
//! INVALID_VALUE, as without nvshare, because a free node must free memory of an allocation node.

#![allow(non_snake_case, clippy::missing_safety_doc, missing_docs)]

use super::guard::{guarded, relaxed};
use crate::async_pool::{self, StreamRef};
use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::interpose::driver_calls;
use crate::memory::device::Device;
use crate::memory::sync_memops;
use crate::process::{driver_memory, reservation};
use crate::submit::queue::Queue;
use crate::submit::{captures, pass};
use nvshare::units::format_size;
use std::ffi::c_void;
use std::sync::Arc;

/// Passes the gate and makes a call to the driver, which may submit work.
fn by_the_driver((stream, per_thread): (CUstream, bool), call: impl FnOnce() -> CuResult) -> CuResult {
    match pass::enter(|| Queue::of(stream, per_thread)) {
        Ok(_pass) => call(),
        Err(result) => result,
    }
}

/// Logs stream-ordered memory that the driver has allocated, in a pool of its own or for a graph.
fn made_unmovable(result: CuResult, bytes: usize) -> CuResult {
    if result.is_success() {
        tracing::debug!(
            "the driver has allocated {} of stream-ordered memory itself, which nvshare cannot move",
            format_size(bytes as u64)
        );
    }
    result
}

/// Where an allocation comes from.
enum Source {
    /// A pool that nvshare serves.
    Ours(Arc<Device>, CUmemoryPool, StreamRef),
    /// A pool that the driver serves: other processes may open its memory, or a tool watches this process.
    DriversPool,
    /// The driver: a node of a graph, or an invalid call.
    Driver,
}

fn source(stream: CUstream, per_thread: bool, pool: Option<CUmemoryPool>) -> Source {
    let place =
        Driver::get().ok().and_then(|driver| Some((driver, StreamRef::find(driver, stream, per_thread)?)));
    let Some((driver, place)) = place else { return Source::Driver };
    let Some(pool) = pool.or_else(|| driver.device_mem_pool(place.device).ok()) else {
        return Source::Driver;
    };
    match async_pool::gpu_of(driver, pool) {
        Some(device) => Source::Ours(device, pool, place),
        None => Source::DriversPool,
    }
}

/// # Safety
/// `dptr` is null, or points to where an address goes.
unsafe fn allocate(
    dptr: *mut CUdeviceptr,
    bytes: usize,
    stream: (CUstream, bool),
    pool: Option<CUmemoryPool>,
    own: impl Fn() -> CuResult,
) -> CuResult {
    guarded(|| {
        if !dptr.is_null() {
            // As the driver does: a refused allocation is at address 0, whoever refuses it and why.
            // SAFETY: the caller's promise, and it is not null.
            unsafe { dptr.write(0) };
        }
        let sensible = !dptr.is_null() && bytes > 0;
        let own = || by_the_driver(stream, &own);
        let source = if sensible { source(stream.0, stream.1, pool) } else { Source::Driver };
        let (device, pool, place) = match source {
            Source::Ours(device, pool, place) => (device, pool, place),
            // Reserved before the call, so that no other client takes the same granules.
            Source::DriversPool => {
                // SAFETY: the caller's promise; the driver has written through it by then.
                let result = unsafe { driver_memory::reserve_address(dptr, bytes as u64, own) };
                return made_unmovable(result, bytes);
            }
            Source::Driver => return made_unmovable(own(), bytes),
        };
        if let Err(refused) = captures::refuse_unsafe() {
            return refused;
        }
        match relaxed(|| async_pool::allocate(&device, pool, &place, bytes as u64)) {
            Ok(address) => {
                sync_memops::allocated(address);
                // SAFETY: as above.
                unsafe { dptr.write(address) };
            }
            Err(result) => return result,
        }
        CuResult::SUCCESS
    })
}

fn free(dptr: CUdeviceptr, stream: CUstream, per_thread: bool, own: impl FnOnce() -> CuResult) -> CuResult {
    guarded(|| {
        let Ok(driver) = Driver::get() else { return own() };
        let place = StreamRef::find(driver, stream, per_thread);
        if place.is_some()
            && async_pool::begins(dptr)
            && let Err(refused) = captures::refuse_unsafe()
        {
            return refused;
        }
        let found = place.and_then(|place| relaxed(|| async_pool::free_in_order(driver, &place, dptr)));
        let result = found.unwrap_or_else(|| {
            let result = by_the_driver((stream, per_thread), own);
            if result.is_success() {
                reservation::release(dptr);
            }
            result
        });
        if result == CuResult::INVALID_VALUE {
            tracing::warn!(
                "cuMemFreeAsync({dptr:#x}) is refused, as without nvshare: no allocation begins there that can be freed in \
                 this stream; it was never made, is freed already, or the stream captures and no node of the graph made it"
            );
        }
        result
    })
}

pub unsafe fn cuMemAllocAsync(dptr: *mut CUdeviceptr, bytesize: usize, stream: CUstream) -> CuResult {
    // SAFETY: the caller's arguments, for both.
    unsafe {
        allocate(dptr, bytesize, (stream, false), None, || {
            driver_calls::cuMemAllocAsync(dptr, bytesize, stream)
        })
    }
}

pub unsafe fn cuMemAllocAsync_ptsz(dptr: *mut CUdeviceptr, bytesize: usize, stream: CUstream) -> CuResult {
    // SAFETY: the caller's arguments, for both.
    unsafe {
        allocate(dptr, bytesize, (stream, true), None, || {
            driver_calls::cuMemAllocAsync_ptsz(dptr, bytesize, stream)
        })
    }
}

pub unsafe fn cuMemAllocFromPoolAsync(
    dptr: *mut CUdeviceptr,
    bytesize: usize,
    pool: CUmemoryPool,
    stream: CUstream,
) -> CuResult {
    // SAFETY: the caller's arguments, for both.
    unsafe {
        allocate(dptr, bytesize, (stream, false), Some(pool), || {
            driver_calls::cuMemAllocFromPoolAsync(dptr, bytesize, pool, stream)
        })
    }
}

pub unsafe fn cuMemAllocFromPoolAsync_ptsz(
    dptr: *mut CUdeviceptr,
    bytesize: usize,
    pool: CUmemoryPool,
    stream: CUstream,
) -> CuResult {
    // SAFETY: the caller's arguments, for both.
    unsafe {
        allocate(dptr, bytesize, (stream, true), Some(pool), || {
            driver_calls::cuMemAllocFromPoolAsync_ptsz(dptr, bytesize, pool, stream)
        })
    }
}

pub unsafe fn cuMemFreeAsync(dptr: CUdeviceptr, stream: CUstream) -> CuResult {
    // SAFETY: the caller's arguments.
    free(dptr, stream, false, || unsafe { driver_calls::cuMemFreeAsync(dptr, stream) })
}

pub unsafe fn cuMemFreeAsync_ptsz(dptr: CUdeviceptr, stream: CUstream) -> CuResult {
    // SAFETY: the caller's arguments.
    free(dptr, stream, true, || unsafe { driver_calls::cuMemFreeAsync_ptsz(dptr, stream) })
}

/// Whether nvshare can serve a pool: plain memory of a GPU that other processes cannot open.
fn is_plain(props: &CUmemPoolProps) -> bool {
    props.kind == CU_MEM_ALLOCATION_TYPE_PINNED
        && props.handle_types == 0
        && props.location.kind == CU_MEM_LOCATION_TYPE_DEVICE
        && props.usage == 0
}

pub unsafe fn cuMemPoolCreate(pool: *mut CUmemoryPool, props: *const CUmemPoolProps) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = unsafe { driver_calls::cuMemPoolCreate(pool, props) };
    guarded(|| {
        if result.is_success() {
            // SAFETY: the driver has just read and written through these.
            let (pool, props) = unsafe { (*pool, &*props) };
            if is_plain(props) {
                async_pool::made(pool, props.location.id, props.max_size as u64);
            }
        }
        result
    })
}

pub unsafe fn cuMemPoolDestroy(pool: CUmemoryPool) -> CuResult {
    guarded(|| {
        // SAFETY: the caller's arguments.
        let (result, device) = async_pool::destroy(pool, || unsafe { driver_calls::cuMemPoolDestroy(pool) });
        if let Some(device) = device {
            relaxed(|| async_pool::collect(&device));
        }
        result
    })
}

/// The GPU of a pool that nvshare serves.
fn ours(pool: CUmemoryPool) -> Option<Arc<Device>> {
    async_pool::gpu_of(Driver::get().ok()?, pool)
}

pub unsafe fn cuMemPoolTrimTo(pool: CUmemoryPool, min_bytes_to_keep: usize) -> CuResult {
    guarded(|| {
        if let Some(device) = ours(pool) {
            if let Err(refused) = captures::refuse_unsafe() {
                return refused;
            }
            relaxed(|| async_pool::trim_to(&device, pool, min_bytes_to_keep as u64));
            return CuResult::SUCCESS;
        }
        // SAFETY: the caller's arguments.
        unsafe { driver_calls::cuMemPoolTrimTo(pool, min_bytes_to_keep) }
    })
}

pub unsafe fn cuMemPoolGetAttribute(
    pool: CUmemoryPool,
    attribute: CUmemPool_attribute,
    value: *mut c_void,
) -> CuResult {
    guarded(|| {
        let figure =
            (CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT..=CU_MEMPOOL_ATTR_USED_MEM_HIGH).contains(&attribute);
        if figure
            && !value.is_null()
            && let Some(device) = ours(pool)
            && let Some(bytes) = relaxed(|| async_pool::attribute(&device, pool, attribute))
        {
            // SAFETY: the caller's pointer to where this attribute goes, eight bytes.
            unsafe { value.cast::<u64>().write(bytes) };
            return CuResult::SUCCESS;
        }
        // SAFETY: the caller's arguments.
        unsafe { driver_calls::cuMemPoolGetAttribute(pool, attribute, value) }
    })
}

pub unsafe fn cuMemPoolSetAttribute(
    pool: CUmemoryPool,
    attribute: CUmemPool_attribute,
    value: *mut c_void,
) -> CuResult {
    // The driver checks and stores the value, and answers queries of it.
    // SAFETY: the caller's arguments.
    let result = unsafe { driver_calls::cuMemPoolSetAttribute(pool, attribute, value) };
    guarded(|| {
        if result.is_success() && ours(pool).is_some() {
            // SAFETY: the driver has just read the value, four bytes for a switch or eight for an amount.
            let value = unsafe {
                match attribute {
                    CU_MEMPOOL_ATTR_REUSE_FOLLOW_EVENT_DEPENDENCIES
                    | CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC
                    | CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES => u64::from(*value.cast::<u32>()),
                    CU_MEMPOOL_ATTR_RELEASE_THRESHOLD..=CU_MEMPOOL_ATTR_USED_MEM_HIGH => *value.cast::<u64>(),
                    // Not used here, and of unknown size.
                    _ => return result,
                }
            };
            async_pool::set_attribute(pool, attribute, value);
        }
        result
    })
}

/// The driver stores the access rights of a pool, and answers queries of them. nvshare does not give other GPUs access to a
/// pool's memory yet.
pub unsafe fn cuMemPoolSetAccess(pool: CUmemoryPool, map: *const CUmemAccessDesc, count: usize) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = unsafe { driver_calls::cuMemPoolSetAccess(pool, map, count) };
    guarded(|| {
        if result.is_success()
            && count > 0
            && let Some(device) = ours(pool)
        {
            // SAFETY: the driver has just read this array of `count`.
            let map = unsafe { std::slice::from_raw_parts(map, count) };
            let other = |access: &&CUmemAccessDesc| {
                access.flags != CU_MEM_ACCESS_FLAGS_PROT_NONE
                    && access.location != CUmemLocation::device(device.ordinal)
            };
            if let Some(access) = map.iter().find(other) {
                tracing::warn!(
                    gpu = %device.gpu,
                    "cuMemPoolSetAccess: device {} will have no access to this pool's memory, which nvshare maps on its own \
                     GPU only; copy it there with cuMemcpyPeerAsync, or allocate with cuMemAlloc",
                    access.location.id
                );
            }
        }
        result
    })
}
