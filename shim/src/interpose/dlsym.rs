//! `dlsym`, by which programs find the entry points of the driver, of NVML and of NCCL at run time. It returns the hooks of
//! [`crate::interpose::entry_points`], [`crate::interpose::nvml`] and [`crate::interpose::nccl`].
//!
//! The shim's exported `dlsym` sees every lookup of the process, CUDA's or not, so:
//!
//! - It must be invisible. The C library identifies the caller by the return address, and for RTLD_NEXT and RTLD_DEFAULT
//!   answers accordingly. Therefore the function is a few instructions of assembly: a filter checks the name, and
//!   unless the filter has an answer, control *jumps* to the C library's dlsym with registers and stack
//!   unchanged. (On architectures other than x86-64 it is a call, and RTLD_NEXT is relative to the shim.)
//! - It must work before anything is initialised, in constructors of other libraries or under a malloc that looks up the
//!   next malloc. For names that are not CUDA's, NVML's or NCCL's the filter neither allocates nor takes a lock.
//! - It may replace only these libraries' own symbols. Other libraries export `cu...` names too: wrappers, stubs, or
//!   unrelated functions. So the C library is asked first, and a hook is returned only instead
//!   of the address that `libcuda.so.1` (or `libnvidia-ml.so.1`) has for that name.
//!
//! RTLD_DEFAULT needs no filter: the shim is preloaded, so the search finds the shim's export. RTLD_NEXT is resolved
//! relative to the shim: if the next symbol is the driver's, a caller before the shim should have
//! found the shim's, and a caller after it would submit work without passing the gate.
//!
//! Lookups leave `dlerror` as the C library's own dlsym does: the last call that the filter makes before it answers has
//! succeeded, and all other cases end in the jump.

use crate::cuda::library::{Dlsym, real_dlsym};
use crate::interpose::hook::Hooked;
use crate::interpose::{entry_points, nccl, nvml};
use crate::state;
use std::ffi::{CStr, c_char, c_void};

/// The filter's result for the assembly: an answer, or if that is null the function to jump to. Returned in rax and rdx.
#[repr(C)]
struct Verdict {
    answer: *const c_void,
    otherwise: Dlsym,
}

/// The exported `dlsym`.
///
/// # Safety
///
/// As for the C library's.
#[cfg(target_arch = "x86_64")]
#[cfg_attr(not(test), unsafe(no_mangle))]
#[unsafe(naked)]
#[allow(dead_code)]
pub unsafe extern "C" fn dlsym(_handle: *mut c_void, _name: *const c_char) -> *mut c_void {
    // On entry the stack is 8 bytes off the alignment of 16 that a call needs; 24 bytes restore it and hold both arguments.
    // They are released before the jump, so that the C library finds the caller's return address at the top of the stack.
    core::arch::naked_asm!(
        ".cfi_startproc",
        "endbr64",
        "sub rsp, 24",
        ".cfi_adjust_cfa_offset 24",
        "mov [rsp], rdi",
        "mov [rsp + 8], rsi",
        "call {filter}",
        "mov rdi, [rsp]",
        "mov rsi, [rsp + 8]",
        "add rsp, 24",
        ".cfi_adjust_cfa_offset -24",
        "test rax, rax",
        "jz 2f",
        "ret",
        "2:",
        "jmp rdx",
        ".cfi_endproc",
        filter = sym filter,
    )
}

/// The exported `dlsym`.
///
/// # Safety
///
/// As for the C library's.
#[cfg(not(target_arch = "x86_64"))]
#[cfg_attr(not(test), unsafe(no_mangle))]
#[allow(dead_code)]
pub unsafe extern "C" fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void {
    let verdict = filter(handle, name);
    if !verdict.answer.is_null() {
        return verdict.answer.cast_mut();
    }
    // SAFETY: the caller's arguments.
    unsafe { (verdict.otherwise)(handle, name) }
}

/// Filters one lookup. Nearly all end at the first comparison.
extern "C" fn filter(handle: *mut c_void, name: *const c_char) -> Verdict {
    let otherwise = real_dlsym();
    // SAFETY: the C library would read the name too. There is a second byte if the first is not the terminator.
    let ours = !name.is_null()
        && unsafe {
            match *name as u8 {
                b'c' => *name.add(1) == b'u' as c_char,
                b'n' => *name.add(1) == b'v' as c_char || *name.add(1) == b'c' as c_char,
                _ => false,
            }
        };
    if !ours {
        return Verdict { answer: std::ptr::null(), otherwise };
    }
    // SAFETY: a C string, as the C library expects it.
    let name = unsafe { CStr::from_ptr(name) };
    let answer = substitute(handle as usize, name, &Process).map_or(std::ptr::null(), |a| a as *const c_void);
    Verdict { answer, otherwise }
}

/// The environment on which the result of a lookup depends.
trait World {
    /// Whether nvshare is active in this process.
    fn enabled(&self) -> bool;
    /// The library's own address of a hooked row, if the library is loaded.
    fn real_address(&self, hooked: &Hooked) -> Option<usize>;
    /// The C library's answer.
    fn ask(&self, handle: usize, name: &CStr) -> Option<usize>;
}

/// This process.
struct Process;

impl World for Process {
    fn enabled(&self) -> bool {
        state::enabled()
    }

    fn real_address(&self, hooked: &Hooked) -> Option<usize> {
        hooked.real.get_if_loaded()
    }

    fn ask(&self, handle: usize, name: &CStr) -> Option<usize> {
        // SAFETY: the caller's handle and a C string.
        let address = unsafe { real_dlsym()(handle as *mut c_void, name.as_ptr()) };
        (!address.is_null()).then_some(address as usize)
    }
}

/// The hook with which to answer a lookup, or `None` if the C library should answer it.
fn substitute(handle: usize, name: &CStr, world: &impl World) -> Option<usize> {
    let hooked = match name.to_bytes() {
        nvml if nvml.starts_with(b"nv") => nvml::by_export(nvml)?,
        nccl if nccl.starts_with(b"nc") => nccl::by_export(nccl)?,
        driver => entry_points::by_export(driver)?.hooked?,
    };
    if handle == libc::RTLD_DEFAULT as usize || !world.enabled() {
        return None;
    }
    let real = world.real_address(&hooked)?;
    (world.ask(handle, name)? == real).then(|| hooked.hook.address())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interpose::entry_points::{ENTRIES, Entry, by_export};
    use std::cell::RefCell;

    const LIBCUDA: usize = 0x1000;
    const OTHER: usize = 0x2000;

    /// A made-up address of a driver's function: the number of its row.
    fn made_up(entry: &Entry) -> usize {
        0x7000_0000 + ENTRIES.iter().position(|e| e.export == entry.export).unwrap() * 16
    }

    fn made_up_of(hooked: &Hooked) -> usize {
        let is_it = |e: &&Entry| e.hooked.is_some_and(|h| std::ptr::eq(h.real, hooked.real));
        made_up(ENTRIES.iter().find(is_it).unwrap())
    }

    fn row(export: &str) -> &'static Entry {
        by_export(export.as_bytes()).unwrap()
    }

    /// A process with a driver and with another library that exports the same names.
    struct FakeProcess {
        enabled: bool,
        loaded: bool,
        asked: RefCell<u32>,
    }

    impl World for FakeProcess {
        fn enabled(&self) -> bool {
            self.enabled
        }

        fn real_address(&self, hooked: &Hooked) -> Option<usize> {
            self.loaded.then(|| made_up_of(hooked))
        }

        fn ask(&self, handle: usize, name: &CStr) -> Option<usize> {
            *self.asked.borrow_mut() += 1;
            let real = made_up(row(name.to_str().unwrap()));
            match handle {
                LIBCUDA => Some(real),
                OTHER => Some(real + 4),
                h if h == libc::RTLD_NEXT as usize => Some(real),
                _ => None,
            }
        }
    }

    fn process() -> FakeProcess {
        FakeProcess { enabled: true, loaded: true, asked: RefCell::new(0) }
    }

    #[test]
    fn only_hooked_symbols_of_the_driver_are_replaced() {
        let hook = |name: &str| row(name).hooked.unwrap().hook.address();
        let p = process();
        assert_eq!(substitute(LIBCUDA, c"cuLaunchKernel", &p), Some(hook("cuLaunchKernel")));
        assert_eq!(substitute(LIBCUDA, c"cuGetProcAddress_v2", &p), Some(hook("cuGetProcAddress_v2")));
        assert_eq!(substitute(LIBCUDA, c"cuEventRecord", &p), None);
        assert_eq!(substitute(LIBCUDA, c"curl_easy_init", &p), None);
        assert_eq!(substitute(LIBCUDA, c"cu", &p), None);
        assert_eq!(substitute(OTHER, c"cuLaunchKernel", &p), None);
        assert_eq!(substitute(0x3000, c"cuLaunchKernel", &p), None);
    }

    #[test]
    fn rtld_next_is_relative_to_the_shim_and_rtld_default_is_not_filtered() {
        let p = process();
        assert!(substitute(libc::RTLD_NEXT as usize, c"cuMemAlloc_v2", &p).is_some());
        assert_eq!(*p.asked.borrow(), 1);
        assert_eq!(substitute(libc::RTLD_DEFAULT as usize, c"cuMemAlloc_v2", &p), None);
        assert_eq!(*p.asked.borrow(), 1);
    }

    /// A process that has opened NVML.
    struct WithNvml;

    impl World for WithNvml {
        fn enabled(&self) -> bool {
            true
        }

        fn real_address(&self, _hooked: &Hooked) -> Option<usize> {
            Some(0x5000)
        }

        fn ask(&self, handle: usize, _name: &CStr) -> Option<usize> {
            Some(if handle == OTHER { 0x6000 } else { 0x5000 })
        }
    }

    #[test]
    fn of_nvml_only_functions_that_report_memory_are_replaced() {
        let hook = nvml::by_export(b"nvmlDeviceGetMemoryInfo").unwrap().hook.address();
        assert_eq!(substitute(LIBCUDA, c"nvmlDeviceGetMemoryInfo", &WithNvml), Some(hook));
        assert_ne!(substitute(LIBCUDA, c"nvmlDeviceGetMemoryInfo_v2", &WithNvml), Some(hook));
        assert!(substitute(LIBCUDA, c"nvmlDeviceGetMemoryInfo_v2", &WithNvml).is_some());
        assert_eq!(substitute(OTHER, c"nvmlDeviceGetMemoryInfo", &WithNvml), None, "another library's");
        for name in [c"nvmlDeviceGetUUID", c"nvmlDeviceGetComputeRunningProcesses_v3", c"nvidia", c"nv"] {
            assert_eq!(substitute(LIBCUDA, name, &WithNvml), None, "{name:?}");
        }
    }

    #[test]
    fn nothing_is_replaced_if_inactive_or_without_a_driver() {
        assert_eq!(substitute(LIBCUDA, c"cuInit", &FakeProcess { enabled: false, ..process() }), None);
        let p = FakeProcess { loaded: false, ..process() };
        assert_eq!(substitute(LIBCUDA, c"cuInit", &p), None);
        assert_eq!(*p.asked.borrow(), 0);
    }

    #[test]
    fn lookups_of_this_process_go_to_the_c_library() {
        let found = filter(libc::RTLD_DEFAULT, c"malloc".as_ptr());
        assert!(found.answer.is_null());
        // SAFETY: a C string.
        let malloc = unsafe { (found.otherwise)(libc::RTLD_DEFAULT, c"malloc".as_ptr()) };
        // SAFETY: a C string.
        assert_eq!(malloc, unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"malloc".as_ptr()) });
        // SAFETY: as above, through the function under test.
        assert_eq!(malloc, unsafe { dlsym(libc::RTLD_DEFAULT, c"malloc".as_ptr()) });
        for odd in [c"", c"c", c"cu", c"cuLaunchKernel", c"cuda", c"n", c"nv", c"nvmlDeviceGetMemoryInfo"] {
            assert!(filter(libc::RTLD_DEFAULT, odd.as_ptr()).answer.is_null());
        }
    }
}
