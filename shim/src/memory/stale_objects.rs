//! Handles of objects (cuMemCreate) whose memory has been released.
//!
//! The driver dereferences handles, and nvshare's handles are addresses, on which it would crash. So a former handle of
//! nvshare is never passed to the driver. An object's memory is released with the last reference to it, or earlier with the
//! last context or when an engine fails. In the latter cases the application still has references, and each release of one
//! succeeds, as it does without nvshare.

use crate::cuda::abi::{CUmemGenericAllocationHandle, CuResult};
use crate::memory::region::Region;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

/// The handles, and how many references the application still has to each. Addresses are reused, so there are never more
/// of these than there were objects at one time.
static GONE: Mutex<BTreeMap<CUmemGenericAllocationHandle, u32>> = Mutex::new(BTreeMap::new());

fn gone() -> MutexGuard<'static, BTreeMap<CUmemGenericAllocationHandle, u32>> {
    nvshare::sync::lock(&GONE)
}

/// Whether a handle is that of an object whose memory has been released.
pub fn is_stale(handle: CUmemGenericAllocationHandle) -> bool {
    gone().contains_key(&handle)
}

/// cuMemRelease of such a handle. `None` if it is not one.
pub fn release(handle: CUmemGenericAllocationHandle) -> Option<CuResult> {
    let mut gone = gone();
    let references = gone.get_mut(&handle)?;
    let left = references.checked_sub(1);
    *references = left.unwrap_or(0);
    Some(if left.is_some() { CuResult::SUCCESS } else { CuResult::INVALID_VALUE })
}

/// Records the handle of a released region, if it was an object.
pub fn ended(region: &Region) {
    if let Some(object) = region.object() {
        gone().insert(region.base, object.references);
    }
}

/// Drops the record of a handle that a new object has.
pub fn reused(handle: CUmemGenericAllocationHandle) {
    gone().remove(&handle);
}
