//! Memory of other processes ([`crate::ipc`]).

#![allow(non_snake_case, clippy::missing_safety_doc, missing_docs)]

use super::guard::{guarded, relaxed};
use crate::cuda::abi::*;
use crate::interpose::driver_calls;
use crate::memory::devices;
use crate::process::{contexts, membership};
use crate::submit::pass;
use crate::{async_pool, ipc};

pub unsafe fn cuIpcGetMemHandle(handle: *mut CUipcMemHandle, dptr: CUdeviceptr) -> CuResult {
    guarded(|| {
        let _pass = match pass::enter_query() {
            Ok(pass) => pass,
            Err(result) => return result,
        };
        // The driver gives handles for stream-ordered memory only if its pool was created for that, and such pools are the
        // driver's own.
        let ours = match async_pool::find(dptr) {
            _ if handle.is_null() || contexts::is_broken() => None,
            Some(_) => Some(Err(CuResult::INVALID_VALUE)),
            None => relaxed(|| ipc::get(&devices::all(), dptr)),
        };
        match ours {
            Some(Ok(made)) => {
                // SAFETY: the caller's pointer to where the handle goes, not null.
                unsafe { handle.write(made) };
                ipc::this_process().into_iter().for_each(membership::exports);
                CuResult::SUCCESS
            }
            Some(Err(result)) => result,
            // SAFETY: the caller's arguments.
            None => unsafe { driver_calls::cuIpcGetMemHandle(handle, dptr) },
        }
    })
}

/// # Safety
/// `pdptr` is null, or points to where an address goes.
unsafe fn open(
    pdptr: *mut CUdeviceptr,
    handle: &CUipcMemHandle,
    flags: u32,
    driver: impl FnOnce() -> CuResult,
) -> CuResult {
    guarded(|| {
        let current = contexts::current_intact().filter(|_| !pdptr.is_null());
        let ours =
            current.and_then(|(device, context)| relaxed(|| ipc::open(&device, context, handle, flags)));
        match ours {
            Some(Ok(address)) => {
                // SAFETY: the caller's promise, and it is not null.
                unsafe { pdptr.write(address) };
                ipc::exporter(handle).into_iter().for_each(membership::opened);
                CuResult::SUCCESS
            }
            Some(Err(result)) => result,
            None => driver(),
        }
    })
}

pub unsafe fn cuIpcOpenMemHandle(pdptr: *mut CUdeviceptr, handle: CUipcMemHandle, flags: u32) -> CuResult {
    // SAFETY: the caller's arguments, for both.
    unsafe { open(pdptr, &handle, flags, || driver_calls::cuIpcOpenMemHandle(pdptr, handle, flags)) }
}

pub unsafe fn cuIpcOpenMemHandle_v2(pdptr: *mut CUdeviceptr, handle: CUipcMemHandle, flags: u32) -> CuResult {
    // SAFETY: the caller's arguments, for both.
    unsafe { open(pdptr, &handle, flags, || driver_calls::cuIpcOpenMemHandle_v2(pdptr, handle, flags)) }
}

pub unsafe fn cuIpcCloseMemHandle(dptr: CUdeviceptr) -> CuResult {
    guarded(|| {
        if !contexts::is_broken() && relaxed(|| ipc::close(dptr)) {
            return CuResult::SUCCESS;
        }
        // SAFETY: the caller's arguments.
        unsafe { driver_calls::cuIpcCloseMemHandle(dptr) }
    })
}
