//! Libraries by their names, and the C library's own `dlsym`.
//!
//! A lookup must not change what the application sees. The driver's library is opened when the first CUDA call
//! needs it and not before, lazily bound and not into the global scope; if the application has opened it already,
//! this only adds a reference. It is never closed, because addresses in it are kept. Symbols are looked
//! up with the C library's own dlsym, because the dynamic linker resolves `dlsym` to the shim's.

use std::ffi::{CStr, CString, c_char, c_void};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The driver's library, by its name in the dynamic linker.
pub static LIBCUDA: Soname = Soname::new(c"libcuda.so.1");

/// A library by its name, opened when it is first needed.
pub struct Soname {
    name: &'static CStr,
    /// The handle, or 0. Not a `OnceLock`: opening the library runs its constructors, and a dlsym in one of them
    /// asks for the handle again, in the same thread.
    handle: AtomicUsize,
}

/// An opened library.
#[derive(Clone, Copy, Debug)]
pub struct Library(pub(super) NonZeroUsize);

impl Library {
    /// The address of one of its symbols.
    pub fn symbol(self, name: &CStr) -> Option<usize> {
        let handle = self.0.get() as *mut c_void;
        // SAFETY: a handle that dlopen gave and that is never closed, and a C string.
        let address = unsafe { real_dlsym()(handle, name.as_ptr()) };
        (!address.is_null()).then_some(address as usize)
    }
}

impl Soname {
    /// A library of this name, which is not opened yet.
    pub const fn new(name: &'static CStr) -> Self {
        Self { name, handle: AtomicUsize::new(0) }
    }

    /// The library; opens it if need be.
    pub fn library(&self) -> Option<Library> {
        self.open(libc::RTLD_LAZY | libc::RTLD_LOCAL)
    }

    /// The library, if it has been opened.
    pub fn library_if_loaded(&self) -> Option<Library> {
        self.open(libc::RTLD_LAZY | libc::RTLD_LOCAL | libc::RTLD_NOLOAD)
    }

    fn open(&self, flags: i32) -> Option<Library> {
        if let Some(handle) = NonZeroUsize::new(self.handle.load(Ordering::Acquire)) {
            return Some(Library(handle));
        }
        // SAFETY: a C string. The library's constructors run as they would if the application opened it.
        let handle = unsafe { libc::dlopen(self.name.as_ptr(), flags) } as usize;
        let handle = NonZeroUsize::new(handle)?;
        // Every dlopen of the same library returns the same handle, so a race is harmless.
        self.handle.store(handle.get(), Ordering::Release);
        Some(Library(handle))
    }
}

/// The driver's library; opens it if need be.
pub fn library() -> Option<Library> {
    LIBCUDA.library()
}

/// `dlsym`.
pub type Dlsym = unsafe extern "C" fn(*mut c_void, *const c_char) -> *mut c_void;

/// The symbol versions of `dlsym` and `dlopen`: that of glibc's first release for this architecture, and that of the release
/// that moved them from libdl to libc.
#[cfg(target_arch = "x86_64")]
const VERSIONS: [&CStr; 2] = [c"GLIBC_2.2.5", c"GLIBC_2.34"];
#[cfg(target_arch = "riscv64")]
const VERSIONS: [&CStr; 2] = [c"GLIBC_2.27", c"GLIBC_2.34"];
#[cfg(not(any(target_arch = "x86_64", target_arch = "riscv64")))]
const VERSIONS: [&CStr; 2] = [c"GLIBC_2.17", c"GLIBC_2.34"];

/// The C library's dlsym, or that of another preloaded library that comes after the shim.
///
/// Found on first use: no initialisation can be relied on to have run before.
pub fn real_dlsym() -> Dlsym {
    static REAL: AtomicUsize = AtomicUsize::new(0);
    let mut address = REAL.load(Ordering::Acquire);
    if address == 0 {
        address = real_symbol(c"dlsym").unwrap_or(no_dlsym as *const c_void as usize);
        // Two threads may get here at the same time; they find the same address.
        REAL.store(address, Ordering::Release);
    }
    // SAFETY: an address that was found under the name dlsym.
    unsafe { std::mem::transmute::<usize, Dlsym>(address) }
}

/// A symbol of the C library's dynamic linker, or of another preloaded library that comes after the shim.
pub fn real_symbol(name: &CStr) -> Option<usize> {
    VERSIONS
        .iter()
        // SAFETY: C strings. dlvsym isn't interposed, and looks at no more than the loaded libraries.
        .map(|version| unsafe { libc::dlvsym(libc::RTLD_NEXT, name.as_ptr(), version.as_ptr()) } as usize)
        .find(|address| *address != 0)
}

/// The address of a symbol in the first library that is loaded and exports it, other than `not`. For a function that the caller
/// of the shim's would have found without the shim, in a library whose name is not known.
pub fn loaded_symbol(name: &CStr, not: usize) -> Option<usize> {
    unsafe extern "C" fn list(
        info: *mut libc::dl_phdr_info,
        _size: libc::size_t,
        paths: *mut c_void,
    ) -> libc::c_int {
        // SAFETY: the C library passes the object's description, and what is passed below.
        let (paths, path) = unsafe { (&mut *paths.cast::<Vec<CString>>(), (*info).dlpi_name) };
        if !path.is_null() {
            // SAFETY: the object's path, a C string.
            paths.push(unsafe { CStr::from_ptr(path) }.to_owned());
        }
        0
    }
    let mut paths: Vec<CString> = Vec::new();
    // SAFETY: the callback takes what is passed here. It opens nothing, because the dynamic linker holds a lock meanwhile.
    unsafe { libc::dl_iterate_phdr(Some(list), (&raw mut paths).cast()) };
    paths.iter().filter(|path| !path.is_empty()).find_map(|path| {
        let flags = libc::RTLD_LAZY | libc::RTLD_LOCAL | libc::RTLD_NOLOAD;
        // SAFETY: a C string. Opening what is loaded runs no code of it, and only adds a reference.
        let handle = unsafe { libc::dlopen(path.as_ptr(), flags) };
        let handle = NonZeroUsize::new(handle as usize)?;
        let address = Library(handle).symbol(name);
        // SAFETY: as above; the application has its own reference.
        unsafe { libc::dlclose(handle.get() as *mut c_void) };
        address.filter(|address| *address != not)
    })
}

/// Used if the C library has no dlsym, which should not happen: finds nothing.
unsafe extern "C" fn no_dlsym(_handle: *mut c_void, _name: *const c_char) -> *mut c_void {
    std::ptr::null_mut()
}
