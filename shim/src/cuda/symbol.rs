//! The address of one entry point of a library.

use crate::cuda::library::{LIBCUDA, Library, Soname};
use std::ffi::CStr;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The driver's address of one entry point, looked up when it is first wanted.
pub struct Symbol {
    library: &'static Soname,
    name: &'static CStr,
    address: AtomicUsize,
}

/// Values of [`Symbol::address`] that aren't addresses.
const UNKNOWN: usize = 0;
const MISSING: usize = 1;

impl Symbol {
    /// An entry point of the driver, by its name with a NUL at the end.
    pub const fn new(name: &'static str) -> Symbol {
        Symbol::of(&LIBCUDA, name)
    }

    /// An entry point of a library, by its name with a NUL at the end.
    pub const fn of(library: &'static Soname, name: &'static str) -> Symbol {
        match CStr::from_bytes_with_nul(name.as_bytes()) {
            Ok(name) => Symbol { library, name, address: AtomicUsize::new(UNKNOWN) },
            Err(_) => panic!("the name of an entry point ends with its only NUL"),
        }
    }

    /// The library's address, or `None` if the library does not have this entry point or cannot be loaded.
    #[inline(always)]
    pub fn get(&self) -> Option<usize> {
        match self.address.load(Ordering::Acquire) {
            address if address > MISSING => Some(address),
            _ => self.look_up(Soname::library),
        }
    }

    /// The same, but does not load the library: `None` if it is not loaded.
    pub fn get_if_loaded(&self) -> Option<usize> {
        match self.address.load(Ordering::Acquire) {
            address if address > MISSING => Some(address),
            _ => self.look_up(Soname::library_if_loaded),
        }
    }

    /// Sets the address of an entry point that the library does not export but the driver returned otherwise.
    pub fn adopt(&self, address: usize) {
        _ = self.address.compare_exchange(MISSING, address, Ordering::AcqRel, Ordering::Acquire);
    }

    #[cold]
    #[inline(never)]
    fn look_up(&self, library: fn(&Soname) -> Option<Library>) -> Option<usize> {
        if self.address.load(Ordering::Acquire) == MISSING {
            return None;
        }
        // If the library cannot be opened, nothing is remembered: a later call tries again.
        let address = library(self.library)?.symbol(self.name);
        // Two threads may get here at the same time; they find the same address.
        self.address.store(address.unwrap_or(MISSING), Ordering::Release);
        address
    }
}
