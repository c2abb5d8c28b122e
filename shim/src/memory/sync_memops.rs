//! Synchronous memory operations: cuMemcpy and cuMemset that may return before they are done must not, for memory that a
//! network card reads or writes beside them (`CU_POINTER_ATTRIBUTE_SYNC_MEMOPS`).
//!
//! For memory that is mapped by hand, which all of nvshare's is, the driver refuses that attribute. It has a flag of
//! contexts that says the same of all memory (CUDA 12.1), and that is set in its place, in every context: what is submitted
//! in any of them may concern the memory. The application does not see the flag unless it has set it itself.

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::memory::devices;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

/// Whether any allocation was made synchronous.
static ANY: AtomicBool = AtomicBool::new(false);

/// The contexts that have the flag from here, and not from the application.
static FLAGGED: Mutex<Vec<CUcontext>> = Mutex::new(Vec::new());

fn flagged() -> MutexGuard<'static, Vec<CUcontext>> {
    nvshare::sync::lock(&FLAGGED)
}

/// Where the allocations begin that the application has made synchronous.
static MEMORY: Mutex<BTreeSet<CUdeviceptr>> = Mutex::new(BTreeSet::new());

fn memory() -> MutexGuard<'static, BTreeSet<CUdeviceptr>> {
    nvshare::sync::lock(&MEMORY)
}

/// Has synchronous operations on an allocation be so, or no longer.
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

/// Whether synchronous operations on an allocation are so.
pub fn is_set(base: CUdeviceptr) -> bool {
    ANY.load(Ordering::Acquire) && memory().contains(&base)
}

/// A new allocation begins there.
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
                "memory cannot be made synchronous (CU_POINTER_ATTRIBUTE_SYNC_MEMOPS): this driver's contexts have no such flag ({result}); CUDA 12.1 has"
            );
            return Err(result);
        }
    }
    Ok(())
}

/// A context was made: synchronous operations are so in it too.
pub fn context_made(context: CUcontext) {
    if ANY.load(Ordering::Acquire) {
        let _ = flag(context);
    }
}

/// A context is about to be destroyed: another may have its name.
pub fn context_ends(context: CUcontext) {
    flagged().retain(|known| *known != context);
}

/// Whether the current context has the flag from here.
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
