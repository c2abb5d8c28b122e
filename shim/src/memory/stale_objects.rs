//! Handles of objects (cuMemCreate) whose memory is gone.
//!
//! The driver follows whatever it is given as a handle, and would crash on an address, which is what ours are. So a handle that
//! was ours is never given to it. Memory goes with the last release of its handle, or, before that, with the last context or when
//! an engine cannot go on; then the application still has its references, and each of its releases succeeds, as natively.

use crate::cuda::abi::{CUmemGenericAllocationHandle, CuResult};
use crate::memory::region::Region;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

/// The handles, and how many references the application still has to each. Addresses come again, so there are no more of
/// these than there were objects at a time.
static GONE: Mutex<BTreeMap<CUmemGenericAllocationHandle, u32>> = Mutex::new(BTreeMap::new());

fn gone() -> MutexGuard<'static, BTreeMap<CUmemGenericAllocationHandle, u32>> {
    nvshare::sync::lock(&GONE)
}

/// Whether a handle was one of ours, and its memory is gone.
pub fn is_stale(handle: CUmemGenericAllocationHandle) -> bool {
    gone().contains_key(&handle)
}

/// cuMemRelease of a handle whose memory is gone. `None` if it is no such handle.
pub fn release(handle: CUmemGenericAllocationHandle) -> Option<CuResult> {
    let mut gone = gone();
    let references = gone.get_mut(&handle)?;
    let left = references.checked_sub(1);
    *references = left.unwrap_or(0);
    Some(if left.is_some() { CuResult::SUCCESS } else { CuResult::INVALID_VALUE })
}

/// A region is gone. If it was an object, so is the memory behind its handle.
pub fn ended(region: &Region) {
    if let Some(object) = region.object() {
        gone().insert(region.base, object.references);
    }
}

/// A new object has this handle.
pub fn reused(handle: CUmemGenericAllocationHandle) {
    gone().remove(&handle);
}
