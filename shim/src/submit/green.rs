//! The green contexts of this process, and the primary context that each is made of.

use crate::cuda::abi::{CUcontext, CUgreenCtx};
use std::sync::{PoisonError, RwLock};

/// A green context: a part of the GPU's multiprocessors, with streams of its own and all else of a primary context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Green {
    /// The green context.
    pub green: CUgreenCtx,
    /// The context by which it is used.
    pub context: CUcontext,
    /// The primary context that it was made of, whose memory, events and modules it uses.
    pub owner: CUcontext,
}

/// All of them.
static GREENS: RwLock<Vec<Green>> = RwLock::new(Vec::new());

/// Looks for one.
fn find(which: impl Fn(&Green) -> bool) -> Option<Green> {
    let greens = GREENS.read().unwrap_or_else(PoisonError::into_inner);
    greens.iter().copied().find(which)
}

/// One was made. False if it is known already.
pub fn add(green: Green) -> bool {
    let mut greens = GREENS.write().unwrap_or_else(PoisonError::into_inner);
    let new = !greens.contains(&green);
    if new {
        greens.push(green);
    }
    new
}

/// One was destroyed.
pub fn remove(green: &Green) {
    GREENS.write().unwrap_or_else(PoisonError::into_inner).retain(|known| known != green);
}

/// A primary context has ended, and its green contexts with it: removes and returns them.
pub fn remove_of(owner: CUcontext) -> Vec<Green> {
    let mut greens = GREENS.write().unwrap_or_else(PoisonError::into_inner);
    greens.extract_if(.., |green| green.owner == owner).collect()
}

/// A green context by its own handle.
pub fn by_handle(handle: CUgreenCtx) -> Option<Green> {
    find(|green| green.green == handle)
}

/// The green context that a context stands for, or null.
pub fn of_context(context: CUcontext) -> CUgreenCtx {
    find(|green| green.context == context).map_or(CUgreenCtx::NULL, |green| green.green)
}

/// The context that memory, events and modules belong to which are made in a context: the primary context of a green one.
pub fn owner_of(context: CUcontext) -> CUcontext {
    find(|green| green.context == context).map_or(context, |green| green.owner)
}
