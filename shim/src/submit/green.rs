//! The green contexts of this process, and the primary context of each.

use crate::cuda::abi::{CUcontext, CUgreenCtx};
use std::sync::{PoisonError, RwLock};

/// A green context: a part of the GPU's multiprocessors with streams of its own. All other objects are the primary context's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Green {
    /// The green context.
    pub green: CUgreenCtx,
    /// The context handle by which it is used.
    pub context: CUcontext,
    /// Its primary context, whose memory, events and modules it uses.
    pub owner: CUcontext,
}

/// All green contexts.
static GREENS: RwLock<Vec<Green>> = RwLock::new(Vec::new());

/// Finds a green context.
fn find(which: impl Fn(&Green) -> bool) -> Option<Green> {
    let greens = GREENS.read().unwrap_or_else(PoisonError::into_inner);
    greens.iter().copied().find(which)
}

/// Adds one. False if it is known already.
pub fn add(green: Green) -> bool {
    let mut greens = GREENS.write().unwrap_or_else(PoisonError::into_inner);
    let new = !greens.contains(&green);
    if new {
        greens.push(green);
    }
    new
}

/// Removes one that was destroyed.
pub fn remove(green: &Green) {
    GREENS.write().unwrap_or_else(PoisonError::into_inner).retain(|known| known != green);
}

/// Removes and returns the green contexts of a primary context that was destroyed.
pub fn remove_of(owner: CUcontext) -> Vec<Green> {
    let mut greens = GREENS.write().unwrap_or_else(PoisonError::into_inner);
    greens.extract_if(.., |green| green.owner == owner).collect()
}

/// The green context with this handle.
pub fn by_handle(handle: CUgreenCtx) -> Option<Green> {
    find(|green| green.green == handle)
}

/// The green context that has this context handle, or null.
pub fn of_context(context: CUcontext) -> CUgreenCtx {
    find(|green| green.context == context).map_or(CUgreenCtx::NULL, |green| green.green)
}

/// The context to which memory, events and modules created in a context belong: its primary context if it is a green one, else
/// itself.
pub fn owner_of(context: CUcontext) -> CUcontext {
    find(|green| green.context == context).map_or(context, |green| green.owner)
}
