//! What stands in for an entry point of a library.

use crate::cuda::symbol::Symbol;
use std::ffi::c_void;

/// The code that stands in for an entry point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hook(*const c_void);

// SAFETY: the address of a function, which is code: nothing is reached through it but by calling it.
unsafe impl Sync for Hook {}
// SAFETY: as above.
unsafe impl Send for Hook {}

impl Hook {
    /// Its address.
    pub fn address(self) -> usize {
        self.0 as usize
    }
}

/// An entry point that something stands in for.
#[derive(Clone, Copy)]
pub struct Hooked {
    /// What stands in for it.
    pub hook: Hook,
    /// What it stands in for.
    pub real: &'static Symbol,
}

impl Hooked {
    /// `hook` stands in for `real`.
    pub const fn new(hook: *const c_void, real: &'static Symbol) -> Hooked {
        Hooked { hook: Hook(hook), real }
    }
}
