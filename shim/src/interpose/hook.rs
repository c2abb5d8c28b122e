//! The function that replaces an entry point of a library.

use crate::cuda::symbol::Symbol;
use std::ffi::c_void;

/// The address of a function that replaces an entry point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hook(*const c_void);

// SAFETY: the address of a function, never used to reach data.
unsafe impl Sync for Hook {}
// SAFETY: as above.
unsafe impl Send for Hook {}

impl Hook {
    /// Its address.
    pub fn address(self) -> usize {
        self.0 as usize
    }
}

/// An entry point that nvshare replaces.
#[derive(Clone, Copy)]
pub struct Hooked {
    /// The replacement.
    pub hook: Hook,
    /// The library's own.
    pub real: &'static Symbol,
}

impl Hooked {
    /// `hook` replaces `real`.
    pub const fn new(hook: *const c_void, real: &'static Symbol) -> Hooked {
        Hooked { hook: Hook(hook), real }
    }
}
