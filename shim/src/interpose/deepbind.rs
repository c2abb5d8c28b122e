//! `dlopen` with RTLD_DEEPBIND: a library loaded with this flag searches its own dependencies first, so its calls into CUDA
//! would find the driver's functions and not the shim's, and its `dlsym` would be the C library's.
//!
//! The exported `dlopen` removes the flag for libraries that concern CUDA, that is, whose file contains the name of one of
//! CUDA's libraries. All others are loaded with the flags that the caller passes. With NVSHARE_DEEPBIND=1 the flag is never
//! removed. A library that is loaded into another namespace (dlmopen) gets its own driver and cannot be reached; the arbiter
//! sees its memory (docs/operations/troubleshooting.md).
//!
//! As with `dlsym` ([`crate::interpose::dlsym`]), the C library identifies the caller by the return address, for its search path
//! and namespace. So the function is a few instructions of assembly that end in a jump. Nothing here allocates.

use crate::cuda::library::real_symbol;
use crate::state;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

type Dlopen = unsafe extern "C" fn(*const c_char, c_int) -> *mut c_void;

/// The filter's result for the assembly: the flags to pass on, and the function to jump to. Returned in rax and rdx.
#[repr(C)]
struct Verdict {
    flags: usize,
    then: Dlopen,
}

/// The exported `dlopen`.
///
/// # Safety
///
/// As for the C library's.
#[cfg(target_arch = "x86_64")]
#[cfg_attr(not(test), unsafe(no_mangle))]
#[unsafe(naked)]
#[allow(dead_code)]
pub unsafe extern "C" fn dlopen(_file: *const c_char, _flags: c_int) -> *mut c_void {
    // As in dlsym: 24 bytes align the stack for the call, and are released before the jump.
    core::arch::naked_asm!(
        ".cfi_startproc",
        "endbr64",
        "sub rsp, 24",
        ".cfi_adjust_cfa_offset 24",
        "mov [rsp], rdi",
        "call {filter}",
        "mov rdi, [rsp]",
        "mov rsi, rax",
        "add rsp, 24",
        ".cfi_adjust_cfa_offset -24",
        "jmp rdx",
        ".cfi_endproc",
        filter = sym filter,
    )
}

/// The exported `dlopen`.
///
/// # Safety
///
/// As for the C library's.
#[cfg(not(target_arch = "x86_64"))]
#[cfg_attr(not(test), unsafe(no_mangle))]
#[allow(dead_code)]
pub unsafe extern "C" fn dlopen(file: *const c_char, flags: c_int) -> *mut c_void {
    let verdict = filter(file, flags);
    // SAFETY: the caller's file.
    unsafe { (verdict.then)(file, verdict.flags as c_int) }
}

/// The C library's dlopen, or that of another preloaded library that comes after the shim.
fn real_dlopen() -> Dlopen {
    static REAL: AtomicUsize = AtomicUsize::new(0);
    let mut address = REAL.load(Ordering::Acquire);
    if address == 0 {
        address = real_symbol(c"dlopen").unwrap_or(no_dlopen as *const c_void as usize);
        // Two threads may get here at the same time; they find the same address.
        REAL.store(address, Ordering::Release);
    }
    // SAFETY: an address that was found under the name dlopen.
    unsafe { std::mem::transmute::<usize, Dlopen>(address) }
}

/// Stands in for a C library without dlopen, which doesn't exist: nothing is found.
unsafe extern "C" fn no_dlopen(_file: *const c_char, _flags: c_int) -> *mut c_void {
    std::ptr::null_mut()
}

extern "C" fn filter(file: *const c_char, flags: c_int) -> Verdict {
    let then = real_dlopen();
    let as_asked = Verdict { flags: flags as usize, then };
    if flags & libc::RTLD_DEEPBIND == 0 || file.is_null() || !state::enabled() || is_left_alone() {
        return as_asked;
    }
    // SAFETY: a C string, as the C library expects it.
    if !concerns_cuda(unsafe { CStr::from_ptr(file) }) {
        return as_asked;
    }
    Verdict { flags: (flags & !libc::RTLD_DEEPBIND) as usize, then }
}

fn is_left_alone() -> bool {
    // SAFETY: getenv with a C string; the value is read at once.
    let value = unsafe { libc::getenv(c"NVSHARE_DEEPBIND".as_ptr()) };
    // SAFETY: a C string, if there is one.
    !value.is_null() && unsafe { CStr::from_ptr(value) } == c"1"
}

/// Text that the file of a library contains if it calls the driver or NVML, or depends on a library that does.
const CUDAS: [&[u8]; 3] = [b"libcuda", b"cuda.so", b"libnvidia-ml.so"];

/// How the names of the driver's own libraries begin, whose calls nvshare leaves alone.
const DRIVERS: [&[u8]; 2] = [b"libcuda.so", b"libnvidia-"];

fn concerns_cuda(file: &CStr) -> bool {
    let path = file.to_bytes();
    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or(path);
    if DRIVERS.iter().any(|driver| name.starts_with(driver)) {
        return false;
    }
    find(file).and_then(Contents::of).is_some_and(|contents| {
        CUDAS.iter().any(|name| {
            // SAFETY: both are that long.
            unsafe {
                !libc::memmem(contents.address, contents.length, name.as_ptr().cast(), name.len()).is_null()
            }
        })
    })
}

/// Opens the file that dlopen would probably load: a path, or a name in LD_LIBRARY_PATH or in the usual directories of
/// libraries. A file that is only in the caller's own search path or in the linker's cache is not found.
fn find(file: &CStr) -> Option<OwnedFd> {
    if file.to_bytes().contains(&b'/') {
        return open(file);
    }
    // SAFETY: getenv with a C string; the value is used only in this function.
    let searched = unsafe { libc::getenv(c"LD_LIBRARY_PATH".as_ptr()) };
    // SAFETY: a C string, if there is one.
    let searched = if searched.is_null() { b"" } else { unsafe { CStr::from_ptr(searched) }.to_bytes() };
    let usual: [&[u8]; 5] =
        [b"/lib/x86_64-linux-gnu", b"/usr/lib/x86_64-linux-gnu", b"/lib64", b"/usr/lib64", b"/usr/local/lib"];
    let folders = searched.split(|byte| matches!(byte, b':' | b';')).filter(|folder| !folder.is_empty());
    folders.chain(usual).find_map(|folder| {
        // On the stack, because the caller may be a malloc that is being initialised.
        let mut path = [0u8; libc::PATH_MAX as usize];
        let name = file.to_bytes_with_nul();
        let room = path.get_mut(..folder.len() + 1 + name.len())?;
        room[..folder.len()].copy_from_slice(folder);
        room[folder.len()] = b'/';
        room[folder.len() + 1..].copy_from_slice(name);
        open(CStr::from_bytes_with_nul(room).ok()?)
    })
}

fn open(path: &CStr) -> Option<OwnedFd> {
    // SAFETY: a C string.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    // SAFETY: a descriptor that was just opened and has no other owner.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The bytes of a file, mapped as long as this exists.
struct Contents {
    address: *mut c_void,
    length: usize,
}

impl Contents {
    fn of(file: OwnedFd) -> Option<Self> {
        // SAFETY: all zeros is a valid value.
        let mut about: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let known = unsafe { libc::fstat(file.as_raw_fd(), &mut about) } == 0;
        let length = usize::try_from(about.st_size).ok().filter(|length| known && *length > 0)?;
        // SAFETY: a new mapping, only read. Truncating a library while it is loaded would crash the process without this too.
        let address = unsafe {
            libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0)
        };
        (address != libc::MAP_FAILED).then_some(Self { address, length })
    }
}

impl Drop for Contents {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping.
        unsafe { libc::munmap(self.address, self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CString;
    use tempfile::NamedTempFile;

    fn library(contents: &[u8]) -> (NamedTempFile, CString) {
        let file = NamedTempFile::new().unwrap();
        std::fs::write(file.path(), contents).unwrap();
        let path = CString::new(file.path().to_str().unwrap()).unwrap();
        (file, path)
    }

    #[test]
    fn a_library_that_names_cudas_libraries_concerns_cuda() {
        for contents in [&b"..\0libcuda.so.1\0.."[..], b"\0libcudart.so.13\0", b"\0libtorch_cuda.so\0"] {
            let (_file, path) = library(contents);
            assert!(concerns_cuda(&path), "{}", String::from_utf8_lossy(contents));
        }
    }

    #[test]
    fn other_libraries_are_loaded_as_asked() {
        let (_file, path) = library(b"\0libstdc++.so.6\0barracuda\0");
        assert!(!concerns_cuda(&path));
        let (_file, path) = library(b"");
        assert!(!concerns_cuda(&path));
        assert!(!concerns_cuda(c"/nowhere/at/all.so"));
        assert!(!concerns_cuda(c"libm.so.6"));
        assert!(!concerns_cuda(c"libcuda.so.1"), "the driver itself");
    }

    #[test]
    fn only_that_flag_is_removed() {
        let (_file, path) = library(b"libcuda.so.1");
        let flags = libc::RTLD_NOW | libc::RTLD_GLOBAL | libc::RTLD_NODELETE;
        let given = |asked| filter(path.as_ptr(), asked).flags as c_int;
        assert_eq!(given(flags | libc::RTLD_DEEPBIND), flags);
        assert_eq!(given(flags), flags);
        let none = filter(std::ptr::null(), flags | libc::RTLD_DEEPBIND).flags as c_int;
        assert_eq!(none, flags | libc::RTLD_DEEPBIND);
    }
}
