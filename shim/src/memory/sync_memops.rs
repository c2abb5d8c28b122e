//! Synchronous memory operations (`CU_POINTER_ATTRIBUTE_SYNC_MEMOPS`): on memory with this attribute cuMemcpy and cuMemset
//! return only when they are done, because a network card may access the memory too.
//!
//! The driver refuses the attribute for memory mapped by cuMemMap, as all memory of nvshare is. Instead nvshare sets a
//! context flag with the same effect for all memory (CUDA 12.1), in every context, because operations of any context may
//! use the memory. The application does not see the flag unless it has set it itself.

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::memory::devices;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

/// Whether any allocation was made synchronous.
static ANY: AtomicBool = AtomicBool::new(false);

/// The contexts in which nvshare, and not the application, has set the flag.
static FLAGGED: Mutex<Vec<CUcontext>> = Mutex::new(Vec::new());

fn flagged() -> MutexGuard<'static, Vec<CUcontext>> {
    nvshare::sync::lock(&FLAGGED)
}

/// The base addresses of the allocations for which the application has set the attribute.
static MEMORY: Mutex<BTreeSet<CUdeviceptr>> = Mutex::new(BTreeSet::new());

fn memory() -> MutexGuard<'static, BTreeSet<CUdeviceptr>> {
    nvshare::sync::lock(&MEMORY)
}

/// Sets or clears the attribute of an allocation. The contexts' flags are never cleared.
///
/// # Errors
/// The driver's: it has no such flag.
pub fn set(base: CUdeviceptr, on: bool) -> Result<(), CuResult> {
    if on {
        ANY.store(true, Ordering::Release);
        devices::contexts().into_iter().try_for_each(flag)?;
        memory().insert(base);
    } else if ANY.load(Ordering::Acquire) {
        memory().remove(&base);
    }
    Ok(())
}

/// Whether the attribute of an allocation is set.
pub fn is_set(base: CUdeviceptr) -> bool {
    ANY.load(Ordering::Acquire) && memory().contains(&base)
}

/// Clears the attribute of a new allocation.
pub fn allocated(base: CUdeviceptr) {
    let _ = set(base, false);
}

fn flag(context: CUcontext) -> Result<(), CuResult> {
    let driver = Driver::get().map_err(|_| CuResult::NOT_INITIALIZED)?;
    let mut flagged = flagged();
    if flagged.contains(&context) {
        return Ok(());
    }
    driver.ctx_push_current(context)?;
    let set = driver.ctx_flags().and_then(|flags| match flags & CU_CTX_SYNC_MEMOPS {
        0 => driver.ctx_set_flags(flags | CU_CTX_SYNC_MEMOPS).map(|()| true),
        _ => Ok(false),
    });
    let _ = driver.ctx_pop_current();
    match set {
        Ok(true) => flagged.push(context),
        Ok(false) => {}
        Err(result) => {
            tracing::warn!(
                "CU_POINTER_ATTRIBUTE_SYNC_MEMOPS cannot be set: nvshare needs a context flag for it that this driver does not have ({result}); a driver of CUDA 12.1 or newer has it"
            );
            return Err(result);
        }
    }
    Ok(())
}

/// Sets the flag in a new context, if any allocation has had the attribute.
pub fn context_made(context: CUcontext) {
    if ANY.load(Ordering::Acquire) {
        let _ = flag(context);
    }
}

/// Drops the record of a context that is destroyed, because its handle may be reused.
pub fn context_ends(context: CUcontext) {
    flagged().retain(|known| *known != context);
}

/// Whether nvshare, and not the application, has set the flag of the current context.
pub fn is_flagged() -> bool {
    ANY.load(Ordering::Acquire) && current().is_some_and(|context| flagged().contains(&context))
}

/// The application has set the flag of the current context itself.
pub fn flag_is_the_applications() {
    flagged().retain(|context| Some(*context) != current());
}

fn current() -> Option<CUcontext> {
    Driver::get().ok()?.ctx_current().ok()
}
