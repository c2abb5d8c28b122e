//! Memory that the application maps itself ([`crate::vmm`]).

use super::{guarded, relaxed};
use crate::abi::*;
use crate::session;
use crate::table::real;
use std::ffi::c_void;

/// Whether any of a range is memory that the application has not mapped itself, whose mappings are nvshare's. The driver
/// takes no allocation apart.
fn is_allocated(address: CUdeviceptr, size: usize) -> bool {
    session::all().iter().any(|device| device.memory().overlaps(address, size as u64))
        || crate::ipc::containing(address).is_some()
}

/// Asks each GPU of the process whether it concerns it, and the driver if none says so.
fn ours(
    ask: impl Fn(&crate::device::Shared) -> Option<CuResult>,
    driver: impl FnOnce() -> CuResult,
) -> CuResult {
    guarded(|| {
        let mine = relaxed(|| session::all().iter().find_map(|device| ask(device)));
        mine.unwrap_or_else(driver)
    })
}

/// The same, for a call that changes the mappings of a range.
fn ours_in(
    (address, size): (CUdeviceptr, usize),
    ask: impl Fn(&crate::device::Shared) -> Option<CuResult>,
    driver: impl FnOnce() -> CuResult,
) -> CuResult {
    let refused = |device: &crate::device::Shared| {
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
        let driver = || unsafe { real::cuMemCreate(handle, size, prop, flags) };
        // SAFETY: the caller's pointer to the properties, if it is one.
        let Some(wanted) = (unsafe { prop.as_ref() }).filter(|_| !handle.is_null() && flags == 0) else {
            return driver();
        };
        let on_gpu = wanted.location.kind == CU_MEM_LOCATION_TYPE_DEVICE
            && wanted.kind == CU_MEM_ALLOCATION_TYPE_PINNED;
        let Some(device) = session::of_device(wanted.location.id).filter(|_| on_gpu) else {
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
    ours(|device| device.release_object(handle), || unsafe { real::cuMemRelease(handle) })
}

pub unsafe fn cuMemMap(
    ptr: CUdeviceptr,
    size: usize,
    offset: usize,
    handle: CUmemGenericAllocationHandle,
    flags: u64,
) -> CuResult {
    ours_in(
        (ptr, size),
        |device| device.map_object(ptr, size as u64, offset as u64, handle, flags),
        // SAFETY: the caller's arguments.
        || unsafe { real::cuMemMap(ptr, size, offset, handle, flags) },
    )
}

pub unsafe fn cuMemUnmap(ptr: CUdeviceptr, size: usize) -> CuResult {
    ours_in(
        (ptr, size),
        |device| device.unmap_objects(ptr, size as u64),
        // SAFETY: the caller's arguments.
        || unsafe { real::cuMemUnmap(ptr, size) },
    )
}

pub unsafe fn cuMemAddressFree(ptr: CUdeviceptr, size: usize) -> CuResult {
    ours_in(
        (ptr, size),
        |device| device.has_mapped(ptr, size as u64).then_some(CuResult::INVALID_VALUE),
        // SAFETY: the caller's arguments.
        || unsafe { real::cuMemAddressFree(ptr, size) },
    )
}

pub unsafe fn cuMemSetAccess(
    ptr: CUdeviceptr,
    size: usize,
    desc: *const CUmemAccessDesc,
    count: usize,
) -> CuResult {
    // SAFETY: the caller's arguments.
    let driver = || unsafe { real::cuMemSetAccess(ptr, size, desc, count) };
    if desc.is_null() {
        return driver();
    }
    // SAFETY: the caller's array of `count`, not null.
    let access = unsafe { std::slice::from_raw_parts(desc, count) };
    ours_in((ptr, size), |device| device.set_access(ptr, size as u64, access), driver)
}

pub unsafe fn cuMemRetainAllocationHandle(
    handle: *mut CUmemGenericAllocationHandle,
    addr: *mut c_void,
) -> CuResult {
    guarded(|| {
        let address = addr as CUdeviceptr;
        if !handle.is_null() {
            if let Some(object) = session::all().iter().find_map(|device| device.retain_object(address)) {
                // SAFETY: the caller's pointer to where the handle goes, not null.
                unsafe { handle.write(object) };
                return CuResult::SUCCESS;
            }
            if super::Allocated::at(address).is_some() {
                // The driver has no handle for memory of cuMemAlloc.
                return CuResult::INVALID_VALUE;
            }
        }
        // SAFETY: the caller's arguments.
        unsafe { real::cuMemRetainAllocationHandle(handle, addr) }
    })
}

pub unsafe fn cuMemGetAllocationPropertiesFromHandle(
    prop: *mut CUmemAllocationProp,
    handle: CUmemGenericAllocationHandle,
) -> CuResult {
    guarded(|| {
        let ours = session::all().iter().find_map(|device| device.object_prop(handle));
        match ours.filter(|_| !prop.is_null()) {
            Some(known) => {
                // SAFETY: the caller's pointer to where the properties go, not null.
                unsafe { prop.write(known) };
                CuResult::SUCCESS
            }
            // SAFETY: the caller's arguments.
            None => unsafe { real::cuMemGetAllocationPropertiesFromHandle(prop, handle) },
        }
    })
}

/// Makes a call with the driver's handle behind one that the application has: its memory leaves the process, and
/// stays where it is, unless it was not made to be handed on by `types` of handles. Others' handles are as they are.
fn handing_on(
    handle: CUmemGenericAllocationHandle,
    types: u32,
    call: impl FnOnce(CUmemGenericAllocationHandle) -> CuResult,
) -> CuResult {
    guarded(|| {
        let fixed = session::enter_query().and_then(|_pass| {
            session::all().iter().find_map(|device| device.fix_object(handle, types)).unwrap_or(Ok(handle))
        });
        fixed.map_or_else(|error| error, call)
    })
}

pub unsafe fn cuMemExportToShareableHandle(
    shareable: *mut c_void,
    handle: CUmemGenericAllocationHandle,
    kind: u32,
    flags: u64,
) -> CuResult {
    // SAFETY: the caller's arguments, and the handle behind its own.
    handing_on(handle, kind, |handle| unsafe {
        real::cuMemExportToShareableHandle(shareable, handle, kind, flags)
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
        real::cuMulticastBindMem(multicast, multicast_offset, handle, offset, size, flags)
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
        real::cuMulticastBindMem_v2(multicast, dev, multicast_offset, handle, offset, size, flags)
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
        let _pass = match session::enter_query() {
            Ok(pass) => pass,
            Err(result) => return result,
        };
        // A network card may write there from now on.
        for device in session::all() {
            match device.share(ptr) {
                Ok(_) => break,
                Err(CuResult::INVALID_VALUE) => {}
                Err(result) => return result,
            }
        }
        // SAFETY: the caller's arguments.
        unsafe { real::cuMemGetHandleForAddressRange(out, ptr, size, kind, flags) }
    })
}
