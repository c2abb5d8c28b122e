//! Handles of objects that are gone (cuMemRelease, and nothing maps them any more).

use crate::cuda::abi::CUmemGenericAllocationHandle;
use crate::memory::region::Region;
use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Handles of objects that are gone. The driver follows whatever it is given as a handle, and would crash on an address.
/// Addresses come again, so there are no more of these than there were objects at a time.
static GONE: Mutex<BTreeSet<CUmemGenericAllocationHandle>> = Mutex::new(BTreeSet::new());

fn gone() -> MutexGuard<'static, BTreeSet<CUmemGenericAllocationHandle>> {
    GONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a handle was one of ours, and is no longer.
pub fn is_stale(handle: CUmemGenericAllocationHandle) -> bool {
    gone().contains(&handle)
}

/// A region is gone. If it was an object, so is its handle.
pub fn ended(region: &Region) {
    if region.object().is_some() {
        gone().insert(region.base);
    }
}

/// A new object has this handle.
pub fn reused(handle: CUmemGenericAllocationHandle) {
    gone().remove(&handle);
}
