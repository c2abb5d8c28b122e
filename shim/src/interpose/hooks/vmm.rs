//! Memory that the application maps itself ([`crate::memory::vmm`]).

#![allow(non_snake_case, clippy::missing_safety_doc, missing_docs)]

use super::guard::{guarded, relaxed};
use crate::cuda::abi::*;
use crate::interpose::driver_calls;
use crate::memory::mappings::{self, Verdict};
use crate::memory::{devices, stale_objects};
use crate::process::membership;
use crate::submit::pass;
use std::ffi::c_void;
use std::os::fd::RawFd;

/// Whether a range overlaps allocations, whose mappings belong to nvshare. Like the driver, nvshare refuses to change
/// mappings of allocations.
fn is_allocated(address: CUdeviceptr, size: usize) -> bool {
    devices::all().iter().any(|device| device.memory().overlaps(address, size as u64))
        || crate::ipc::containing(address).is_some()
}

/// Makes a call that changes the mappings of a range. If only the driver can judge it ([`Verdict::InPlace`]), repeats it inside
/// the gate, where all memory is in place.
fn judged(
    (address, size): (CUdeviceptr, usize),
    ask: impl Fn(bool) -> Option<Verdict>,
    driver: impl FnOnce() -> CuResult,
) -> CuResult {
    guarded(|| {
        if is_allocated(address, size) {
            return CuResult::INVALID_VALUE;
        }
        let inside = || match relaxed(|| ask(true)) {
            Some(Verdict::Answer(result)) => result,
            // The memory was unmapped meanwhile.
            _ => CuResult::INVALID_VALUE,
        };
        match relaxed(|| ask(false)) {
            None => driver(),
            Some(Verdict::Answer(result)) => result,
            Some(Verdict::InPlace) => pass::enter_query().map_or_else(|result| result, |_pass| inside()),
        }
    })
}

/// Makes a call with the GPU that it concerns, which `ask` finds; with the driver if it concerns none.
fn ours(
    ask: impl Fn(&crate::memory::device::Device) -> Option<CuResult>,
    driver: impl FnOnce() -> CuResult,
) -> CuResult {
    guarded(|| {
        let mine = relaxed(|| devices::all().iter().find_map(|device| ask(device)));
        mine.unwrap_or_else(driver)
    })
}

/// The same for a call on a range of addresses, which is refused if it overlaps allocations.
fn ours_in(
    (address, size): (CUdeviceptr, usize),
    ask: impl Fn(&crate::memory::device::Device) -> Option<CuResult>,
    driver: impl FnOnce() -> CuResult,
) -> CuResult {
    let refused = |device: &crate::memory::device::Device| {
        is_allocated(address, size).then_some(CuResult::INVALID_VALUE).or_else(|| ask(device))
    };
    ours(refused, driver)
}

pub unsafe fn cuMemCreate(
    handle: *mut CUmemGenericAllocationHandle,
    size: usize,
    prop: *const CUmemAllocationProp,
    flags: u64,
) -> CuResult {
    guarded(|| {
        // SAFETY: the caller's arguments.
        let driver = || unsafe { driver_calls::cuMemCreate(handle, size, prop, flags) };
        // SAFETY: the caller's pointer to the properties, if it is one.
        let Some(wanted) = (unsafe { prop.as_ref() }).filter(|_| !handle.is_null() && flags == 0) else {
            return driver();
        };
        let on_gpu = wanted.location.kind == CU_MEM_LOCATION_TYPE_DEVICE
            && wanted.kind == CU_MEM_ALLOCATION_TYPE_PINNED;
        let Some(device) = devices::of_device(wanted.location.id).filter(|_| on_gpu) else {
            return driver();
        };
        match relaxed(|| device.once_freed(|| device.create_object(size as u64, *wanted))) {
            Ok(object) => {
                // SAFETY: the caller's pointer to where the handle goes, not null.
                unsafe { handle.write(object) };
                CuResult::SUCCESS
            }
            Err(result) => result,
        }
    })
}

pub unsafe fn cuMemRelease(handle: CUmemGenericAllocationHandle) -> CuResult {
    // SAFETY: the caller's arguments.
    let driver =
        || stale_objects::release(handle).unwrap_or_else(|| unsafe { driver_calls::cuMemRelease(handle) });
    ours(|device| device.release_object(handle), driver)
}

pub unsafe fn cuMemMap(
    ptr: CUdeviceptr,
    size: usize,
    offset: usize,
    handle: CUmemGenericAllocationHandle,
    flags: u64,
) -> CuResult {
    let (range, offset_in_it) = ((ptr, size as u64), offset as u64);
    judged(
        (ptr, size),
        |inside| {
            let all = devices::all();
            let overlaps = all.iter().any(|device| device.is_mapped(ptr, size as u64));
            all.iter()
                .find_map(|device| device.map_object(range, offset_in_it, handle, flags, overlaps, inside))
        },
        || match stale_objects::is_stale(handle) {
            true => CuResult::INVALID_VALUE,
            // SAFETY: the caller's arguments.
            false => unsafe { driver_calls::cuMemMap(ptr, size, offset, handle, flags) },
        },
    )
}

pub unsafe fn cuMemAddressReserve(
    ptr: *mut CUdeviceptr,
    size: usize,
    alignment: usize,
    addr: CUdeviceptr,
    flags: u64,
) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = unsafe { driver_calls::cuMemAddressReserve(ptr, size, alignment, addr, flags) };
    if result.is_success() {
        // SAFETY: the driver has just written through this pointer of the caller's.
        mappings::reserved(unsafe { *ptr }, size as u64);
    }
    result
}

pub unsafe fn cuMemUnmap(ptr: CUdeviceptr, size: usize) -> CuResult {
    judged(
        (ptr, size),
        |_| mappings::unmap(&devices::all(), ptr, size as u64).map(Verdict::Answer),
        // SAFETY: the caller's arguments.
        || unsafe { driver_calls::cuMemUnmap(ptr, size) },
    )
}

pub unsafe fn cuMemAddressFree(ptr: CUdeviceptr, size: usize) -> CuResult {
    ours_in(
        (ptr, size),
        |device| device.has_mapped(ptr, size as u64).then_some(CuResult::INVALID_VALUE),
        || {
            // SAFETY: the caller's arguments.
            let result = unsafe { driver_calls::cuMemAddressFree(ptr, size) };
            if result.is_success() {
                mappings::freed(ptr);
            }
            result
        },
    )
}

pub unsafe fn cuMemSetAccess(
    ptr: CUdeviceptr,
    size: usize,
    desc: *const CUmemAccessDesc,
    count: usize,
) -> CuResult {
    // SAFETY: the caller's arguments.
    let driver = || unsafe { driver_calls::cuMemSetAccess(ptr, size, desc, count) };
    if desc.is_null() {
        return driver();
    }
    // SAFETY: the caller's array of `count`, not null.
    let access = unsafe { std::slice::from_raw_parts(desc, count) };
    judged(
        (ptr, size),
        |inside| mappings::set_access(&devices::all(), (ptr, size as u64), access, inside),
        driver,
    )
}

pub unsafe fn cuMemRetainAllocationHandle(
    handle: *mut CUmemGenericAllocationHandle,
    addr: *mut c_void,
) -> CuResult {
    guarded(|| {
        let address = addr as CUdeviceptr;
        if !handle.is_null() {
            if let Some(object) = devices::all().iter().find_map(|device| device.retain_object(address)) {
                // SAFETY: the caller's pointer to where the handle goes, not null.
                unsafe { handle.write(object) };
                return CuResult::SUCCESS;
            }
            if is_allocated(address, 1) {
                // Like the driver, nvshare gives no handle for memory of cuMemAlloc.
                return CuResult::INVALID_VALUE;
            }
        }
        // SAFETY: the caller's arguments.
        unsafe { driver_calls::cuMemRetainAllocationHandle(handle, addr) }
    })
}

pub unsafe fn cuMemGetAllocationPropertiesFromHandle(
    prop: *mut CUmemAllocationProp,
    handle: CUmemGenericAllocationHandle,
) -> CuResult {
    guarded(|| {
        let ours = devices::all().iter().find_map(|device| device.object_prop(handle));
        match ours.filter(|_| !prop.is_null()) {
            Some(known) => {
                // SAFETY: the caller's pointer to where the properties go, not null.
                unsafe { prop.write(known) };
                CuResult::SUCCESS
            }
            None if stale_objects::is_stale(handle) => CuResult::INVALID_VALUE,
            // SAFETY: the caller's arguments.
            None => unsafe { driver_calls::cuMemGetAllocationPropertiesFromHandle(prop, handle) },
        }
    })
}

/// Makes a `call` that exports memory, passing the driver's handle in place of nvshare's. If it succeeds, the memory stays on
/// the GPU. It is refused if the memory was not created for export by handles of these `types`. Other handles are passed
/// unchanged.
fn handing_on(
    handle: CUmemGenericAllocationHandle,
    types: u32,
    call: impl Fn(CUmemGenericAllocationHandle) -> CuResult,
) -> CuResult {
    guarded(|| match pass::enter_query() {
        Ok(_pass) => {
            let ours = devices::all().iter().find_map(|device| device.hand_on(handle, types, &call));
            ours.unwrap_or_else(|| match stale_objects::is_stale(handle) {
                true => CuResult::INVALID_VALUE,
                false => call(handle),
            })
        }
        Err(result) => result,
    })
}

pub unsafe fn cuMemExportToShareableHandle(
    shareable: *mut c_void,
    handle: CUmemGenericAllocationHandle,
    kind: u32,
    flags: u64,
) -> CuResult {
    // SAFETY: the caller's arguments, and the handle behind its own.
    let result = handing_on(handle, kind, |handle| unsafe {
        driver_calls::cuMemExportToShareableHandle(shareable, handle, kind, flags)
    });
    if result.is_success() && kind == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR {
        // SAFETY: for this kind of handle the driver has just written an int there.
        membership::exported(unsafe { shareable.cast::<RawFd>().read() });
    }
    result
}

/// Whoever has imported memory of another process, and has memory of its own imported by that one, may wait for its work.
pub unsafe fn cuMemImportFromShareableHandle(
    handle: *mut CUmemGenericAllocationHandle,
    shareable: *mut c_void,
    kind: u32,
) -> CuResult {
    guarded(|| {
        // SAFETY: the caller's arguments.
        let result = unsafe { driver_calls::cuMemImportFromShareableHandle(handle, shareable, kind) };
        if result.is_success() && kind == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR {
            // The descriptor travels in the place of a pointer.
            membership::imported(shareable as usize as RawFd);
        }
        result
    })
}

pub unsafe fn cuMulticastBindMem(
    multicast: CUmemGenericAllocationHandle,
    multicast_offset: usize,
    handle: CUmemGenericAllocationHandle,
    offset: usize,
    size: usize,
    flags: u64,
) -> CuResult {
    // SAFETY: as above.
    handing_on(handle, 0, |handle| unsafe {
        driver_calls::cuMulticastBindMem(multicast, multicast_offset, handle, offset, size, flags)
    })
}

pub unsafe fn cuMulticastBindMem_v2(
    multicast: CUmemGenericAllocationHandle,
    dev: CUdevice,
    multicast_offset: usize,
    handle: CUmemGenericAllocationHandle,
    offset: usize,
    size: usize,
    flags: u64,
) -> CuResult {
    // SAFETY: as above.
    handing_on(handle, 0, |handle| unsafe {
        driver_calls::cuMulticastBindMem_v2(multicast, dev, multicast_offset, handle, offset, size, flags)
    })
}

pub unsafe fn cuMemGetHandleForAddressRange(
    out: *mut c_void,
    ptr: CUdeviceptr,
    size: usize,
    kind: u32,
    flags: u64,
) -> CuResult {
    guarded(|| {
        let _pass = match pass::enter_query() {
            Ok(pass) => pass,
            Err(result) => return result,
        };
        // SAFETY: the caller's arguments.
        let driver = || unsafe { driver_calls::cuMemGetHandleForAddressRange(out, ptr, size, kind, flags) };
        let is_its = |device: &std::sync::Arc<crate::memory::device::Device>| {
            device.memory().containing(ptr).is_some()
        };
        match devices::all().iter().find(|device| is_its(device)) {
            // A network card may access it from now on, so it must stay on the GPU.
            Some(device) => {
                device.share_if(ptr, || driver().ok()).map_or_else(|result| result, |_| CuResult::SUCCESS)
            }
            None => driver(),
        }
    })
}
