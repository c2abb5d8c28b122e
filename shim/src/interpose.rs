//! The two doors by which programs find the driver's entry points without the dynamic linker binding them: `dlsym`,
//! and `cuGetProcAddress`, which the driver itself offers. Both give out hooks where [`crate::table`] has them;
//! `dlsym` is NVML's door too, with the hooks of [`crate::nvml`].
//!
//! # dlsym
//!
//! The shim's exported `dlsym` sees every lookup of the process, CUDA's or not, so:
//!
//! - It must be invisible. The C library tells by the return address who asks, and for RTLD_NEXT and RTLD_DEFAULT
//!   answers accordingly. Therefore the function is a few instructions of assembly: a filter looks at the name, and
//!   unless the filter has an answer of its own, control *jumps* to the C library's dlsym with registers and stack as
//!   they came. (Other machines than x86-64 call instead, and get RTLD_NEXT relative to the shim.)
//! - It must work before anything is initialised, in constructors of other libraries or under a malloc that looks its
//!   next one up. The filter doesn't allocate, and takes no lock, for names that aren't CUDA's or NVML's.
//! - It may only substitute these libraries' own symbols. Other libraries export `cu...` names too: wrappers, stubs, or
//!   something that begins with the same letters. So the C library is asked first, and a hook is given only in place
//!   of the very address that `libcuda.so.1` (or `libnvidia-ml.so.1`) has for that name.
//!
//! RTLD_DEFAULT needs no filter: the shim is preloaded, so what that finds is the shim's export. RTLD_NEXT is asked
//! on behalf of the shim: if what comes after the shim is the driver's symbol, a caller before the shim should have
//! found the shim's, and one after it would run work past the gate.
//!
//! Lookups leave `dlerror` as the C library's own would: the last call that the filter makes before it answers is the
//! successful one, and everything else ends in the jump.
//!
//! # cuGetProcAddress
//!
//! The driver is asked with the very same arguments, and what it answers is translated ([`translate`]): the address
//! tells which row of the table it is, and the name, version and stream flag that it was asked by only where the
//! driver gives other addresses than its symbol table. An entry point or version newer than the table is passed on as
//! it is: a hook for an older signature would be worse than none. It is counted ([`nvshare_unknown_entry_points`]), and
//! named once in the log, with the count.

use std::collections::BTreeSet;
use std::ffi::{CStr, c_char, c_void};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::abi::*;
use crate::nvml;
use crate::session;
use crate::table::{self, Entry, Hooked};

/// `dlsym`.
pub type Dlsym = unsafe extern "C" fn(*mut c_void, *const c_char) -> *mut c_void;

/// The versions under which the C library exports `dlsym` and `dlopen`: that of the first release for the machine, and that of the
/// release that moved it from libdl to libc.
#[cfg(target_arch = "x86_64")]
const VERSIONS: [&CStr; 2] = [c"GLIBC_2.2.5", c"GLIBC_2.34"];
#[cfg(target_arch = "riscv64")]
const VERSIONS: [&CStr; 2] = [c"GLIBC_2.27", c"GLIBC_2.34"];
#[cfg(not(any(target_arch = "x86_64", target_arch = "riscv64")))]
const VERSIONS: [&CStr; 2] = [c"GLIBC_2.17", c"GLIBC_2.34"];

/// The C library's dlsym, or that of another preloaded library that comes after the shim.
///
/// Found on first use, whoever comes first; no initialisation can be relied on to have run before.
pub fn real_dlsym() -> Dlsym {
    static REAL: AtomicUsize = AtomicUsize::new(0);
    let mut address = REAL.load(Ordering::Acquire);
    if address == 0 {
        address = real_symbol(c"dlsym").unwrap_or(no_dlsym as *const c_void as usize);
        // Two threads may get here together; they find the same.
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

/// Stands in for a C library without dlsym, which doesn't exist: nothing is found.
unsafe extern "C" fn no_dlsym(_handle: *mut c_void, _name: *const c_char) -> *mut c_void {
    std::ptr::null_mut()
}

/// What the filter tells the assembly: an answer, or where to jump for one. Returned in rax and rdx.
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
    // On entry the stack is 8 bytes off the 16 that a call needs; 24 bytes mend that and hold both arguments. They
    // are given back before the jump, so that the C library finds the caller's return address where it looks for it.
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

/// Decides about one lookup. Nearly all of them end at the first comparison.
extern "C" fn filter(handle: *mut c_void, name: *const c_char) -> Verdict {
    let otherwise = real_dlsym();
    // SAFETY: the C library would read the name too. The second byte is there if the first isn't the terminator.
    let ours = !name.is_null()
        && unsafe {
            match *name as u8 {
                b'c' => *name.add(1) == b'u' as c_char,
                b'n' => *name.add(1) == b'v' as c_char,
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

/// What the decision about a lookup depends on.
trait World {
    /// Whether nvshare is on in this process.
    fn enabled(&self) -> bool;
    /// The library's own address of a hooked row, if the library is loaded.
    fn real_address(&self, hooked: &Hooked) -> Option<usize>;
    /// The C library's answer.
    fn ask(&self, handle: usize, name: &CStr) -> Option<usize>;
}

/// The process that we are in.
struct Process;

impl World for Process {
    fn enabled(&self) -> bool {
        session::enabled()
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

/// The hook to answer a lookup with, or `None` if the C library should answer it.
fn substitute(handle: usize, name: &CStr, world: &impl World) -> Option<usize> {
    let name_of_nvml = name.to_bytes().starts_with(b"nv");
    let hooked = if name_of_nvml {
        nvml::by_export(name.to_bytes())?
    } else {
        table::by_export(name.to_bytes())?.hooked?
    };
    if handle == libc::RTLD_DEFAULT as usize || !world.enabled() {
        return None;
    }
    let real = world.real_address(&hooked)?;
    (world.ask(handle, name)? == real).then(|| hooked.hook.address())
}

/// How many times the driver gave out an entry point that the table doesn't know: what the application does with
/// those, nvshare doesn't see. For whoever asks from inside the process; the log names them.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub extern "C" fn nvshare_unknown_entry_points() -> u64 {
    UNKNOWN.load(Ordering::Relaxed)
}

static UNKNOWN: AtomicU64 = AtomicU64::new(0);

/// `cuGetProcAddress` of CUDA 11.3.
///
/// # Safety
///
/// As for the driver's.
#[allow(non_snake_case)]
pub unsafe fn cuGetProcAddress(
    symbol: *const c_char,
    pfn: *mut *mut c_void,
    version: i32,
    flags: u64,
) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = unsafe { table::real::cuGetProcAddress(symbol, pfn, version, flags) };
    let again = |version| {
        let mut address = std::ptr::null_mut();
        // SAFETY: the caller's symbol, and room for what the driver writes.
        unsafe { table::real::cuGetProcAddress(symbol, &mut address, version, flags) }.ok().ok()?;
        Some(address as usize)
    };
    // SAFETY: the caller's symbol, and the pointer that the driver has written through.
    unsafe { answer(result, symbol, pfn, version, flags, again) }
}

/// `cuGetProcAddress` since CUDA 12.
///
/// # Safety
///
/// As for the driver's.
#[allow(non_snake_case)]
pub unsafe fn cuGetProcAddress_v2(
    symbol: *const c_char,
    pfn: *mut *mut c_void,
    version: i32,
    flags: u64,
    status: *mut CUdriverProcAddressQueryResult,
) -> CuResult {
    // SAFETY: the caller's arguments. The status is the driver's to write; a hook changes nothing about it.
    let result = unsafe { table::real::cuGetProcAddress_v2(symbol, pfn, version, flags, status) };
    let again = |version| {
        let (mut address, mut status) = (std::ptr::null_mut(), 0);
        // SAFETY: the caller's symbol, and room for what the driver writes.
        unsafe { table::real::cuGetProcAddress_v2(symbol, &mut address, version, flags, &mut status) }
            .ok()
            .ok()?;
        Some(address as usize)
    };
    // SAFETY: the caller's symbol, and the pointer that the driver has written through.
    unsafe { answer(result, symbol, pfn, version, flags, again) }
}

/// Puts the hook in the place of what the driver answered.
///
/// # Safety
///
/// `symbol` and `pfn` as the driver requires them, if `result` is success.
unsafe fn answer(
    result: CuResult,
    symbol: *const c_char,
    pfn: *mut *mut c_void,
    version: i32,
    flags: u64,
    again: impl Fn(i32) -> Option<usize>,
) -> CuResult {
    if !result.is_success() || symbol.is_null() || pfn.is_null() {
        return result;
    }
    // SAFETY: the driver has just written it, or left it as it was, which is then the caller's affair.
    let address = unsafe { *pfn } as usize;
    // Success without an address is how the driver tells by `status` that there is none.
    if address == 0 {
        return result;
    }
    // SAFETY: a C string that the driver has read.
    let base = unsafe { CStr::from_ptr(symbol) };
    let request = Request {
        base: base.to_bytes(),
        version: version.max(0) as u32,
        per_thread: flags & CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM != 0,
    };
    match translate(&request, address, |hooked| hooked.real.get_if_loaded(), |v| again(v as i32)) {
        Translation::Hook(hooked) => {
            hooked.real.adopt(address);
            // SAFETY: the driver has just written it.
            unsafe { *pfn = hooked.hook.address() as *mut c_void };
        }
        Translation::Pass => {}
        Translation::Unknown => note_unknown(base, version),
    }
    result
}

/// What `cuGetProcAddress` was asked for.
struct Request<'a> {
    base: &'a [u8],
    version: u32,
    per_thread: bool,
}

/// What to make of the driver's answer.
#[derive(Clone, Copy)]
enum Translation {
    /// Give this out instead.
    Hook(Hooked),
    /// It is none of nvshare's business.
    Pass,
    /// The table doesn't know it.
    Unknown,
}

/// Finds the row behind an address that the driver gave.
fn translate(
    request: &Request<'_>,
    address: usize,
    real_address: impl Fn(&Hooked) -> Option<usize>,
    again: impl Fn(u32) -> Option<usize>,
) -> Translation {
    let is_it = |e: &Entry| e.hooked.filter(|hooked| real_address(hooked) == Some(address));
    let version = request.version.min(table::KNOWN_VERSION);
    let row = table::by_version(request.base, version, request.per_thread);
    // One function may have several names in the driver, so the row that the request names comes first, then others
    // of its base name: drivers older than the table answer with older forms.
    if let Some(hooked) = row.and_then(is_it) {
        return Translation::Hook(hooked);
    }
    let mut of_base = table::ENTRIES.iter().filter(|e| e.base.as_bytes() == request.base);
    if let Some(hooked) = of_base.find_map(is_it) {
        return Translation::Hook(hooked);
    }
    let Some(row) = row else {
        return table::ENTRIES.iter().find_map(is_it).map_or(Translation::Unknown, Translation::Hook);
    };
    // The address says nothing. A request beyond what the table knows may have been answered with a signature beyond
    // it too, unless the newest version that it does know gets the same answer.
    if request.version > table::KNOWN_VERSION && again(table::KNOWN_VERSION) != Some(address) {
        return Translation::Unknown;
    }
    let Some(hooked) = row.hooked else { return Translation::Pass };
    if real_address(&hooked).is_some() {
        return Translation::Hook(hooked);
    }
    // The driver doesn't export this form. If it exports none of them there is only the name to go by, which is
    // enough if it leaves no choice between signatures.
    let forms = table::ENTRIES
        .iter()
        .filter(|e| e.base.as_bytes() == request.base && e.per_thread == row.per_thread && e.since <= version)
        .count();
    if forms == 1 { Translation::Hook(hooked) } else { Translation::Unknown }
}

fn note_unknown(base: &CStr, version: i32) {
    static NAMED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let so_far = UNKNOWN.fetch_add(1, Ordering::Relaxed) + 1;
    let name = base.to_string_lossy().into_owned();
    let new = NAMED.lock().unwrap_or_else(PoisonError::into_inner).insert(name);
    if new {
        // The CUDA runtime looks everything up before it calls cuInit.
        crate::log::initialise();
        tracing::info!(
            entry_point = ?base,
            version,
            so_far,
            "the driver gave out an entry point that nvshare doesn't know: what is done with it passes nvshare by"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{Class, ENTRIES, by_export};
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
    fn only_hooked_symbols_of_the_driver_are_substituted() {
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
    fn next_is_what_comes_after_the_shim_and_default_needs_no_help() {
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
    fn figures_of_nvml_are_substituted_and_nothing_else_of_it() {
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
    fn nothing_is_substituted_when_off_or_without_a_driver() {
        assert_eq!(substitute(LIBCUDA, c"cuInit", &FakeProcess { enabled: false, ..process() }), None);
        let p = FakeProcess { loaded: false, ..process() };
        assert_eq!(substitute(LIBCUDA, c"cuInit", &p), None);
        assert_eq!(*p.asked.borrow(), 0);
    }

    /// What becomes of a request that the driver answers with the function of `answer`, or with an unheard-of
    /// address.
    fn translated(
        base: &str,
        version: u32,
        per_thread: bool,
        answer: Option<&str>,
    ) -> Result<&'static str, bool> {
        translated_by(base, version, per_thread, answer, |_| true, |_| None)
    }

    /// `Ok` is the hook; `Err` says whether the request was understood.
    fn translated_by(
        base: &str,
        version: u32,
        per_thread: bool,
        answer: Option<&str>,
        exports: impl Fn(&Entry) -> bool,
        again: impl Fn(u32) -> Option<usize>,
    ) -> Result<&'static str, bool> {
        let request = Request { base: base.as_bytes(), version, per_thread };
        let entry_of = |hooked: &Hooked| {
            ENTRIES.iter().find(|e| e.hooked.is_some_and(|h| std::ptr::eq(h.real, hooked.real))).unwrap()
        };
        let real = |hooked: &Hooked| exports(entry_of(hooked)).then(|| made_up_of(hooked));
        let address = answer.map_or(0x10, |export| made_up(row(export)));
        match translate(&request, address, real, again) {
            Translation::Hook(hooked) => Ok(entry_of(&hooked).export),
            Translation::Pass => Err(true),
            Translation::Unknown => Err(false),
        }
    }

    #[test]
    fn every_hooked_row_is_found_by_its_address() {
        for entry in ENTRIES.iter().filter(|e| e.hooked.is_some()) {
            let got = translated(entry.base, entry.since, entry.per_thread, Some(entry.export));
            assert_eq!(got, Ok(entry.export));
        }
    }

    #[test]
    fn rows_that_pass_are_left_alone() {
        for entry in ENTRIES.iter().filter(|e| e.class == Class::Pass) {
            assert_eq!(
                translated(entry.base, entry.since, entry.per_thread, Some(entry.export)),
                Err(true),
                "{}",
                entry.export
            );
        }
    }

    #[test]
    fn an_older_driver_answers_with_an_older_form() {
        assert_eq!(translated("cuCtxCreate", 12_050, false, Some("cuCtxCreate_v2")), Ok("cuCtxCreate_v2"));
        assert_eq!(
            translated("cuMemPrefetchAsync", 13_000, true, Some("cuMemPrefetchAsync_ptsz")),
            Ok("cuMemPrefetchAsync_ptsz")
        );
    }

    #[test]
    fn asking_for_the_asker_gives_the_hook_of_the_right_form() {
        assert_eq!(
            translated("cuGetProcAddress", 11_030, false, Some("cuGetProcAddress")),
            Ok("cuGetProcAddress")
        );
        assert_eq!(
            translated("cuGetProcAddress", 12_000, true, Some("cuGetProcAddress_v2")),
            Ok("cuGetProcAddress_v2")
        );
    }

    #[test]
    fn an_address_of_no_symbol_is_known_by_name_version_and_flag() {
        assert_eq!(translated("cuLaunchKernel", 12_000, true, None), Ok("cuLaunchKernel_ptsz"));
        assert_eq!(translated("cuLaunchKernel", 12_000, false, None), Ok("cuLaunchKernel"));
        assert_eq!(translated("cuGraphInstantiate", 12_000, false, None), Ok("cuGraphInstantiateWithFlags"));
        assert_eq!(translated("cuEventRecord", 12_000, false, None), Err(true));
        assert_eq!(translated("cuNeverHeardOf", 12_000, false, None), Err(false));
    }

    #[test]
    fn a_version_newer_than_the_table_is_hooked_only_if_nothing_changed() {
        let newer = table::KNOWN_VERSION + 1000;
        let ask = |again: Option<usize>| {
            translated_by("cuMemcpyBatchAsync", newer, false, None, |_| true, move |_| again)
        };
        assert_eq!(ask(Some(0x10)), Ok("cuMemcpyBatchAsync_v2"));
        assert_eq!(ask(Some(0x20)), Err(false));
        // Known by its address: no need to ask.
        assert_eq!(translated("cuMemcpyAsync", newer, false, Some("cuMemcpyAsync")), Ok("cuMemcpyAsync"));
    }

    #[test]
    fn a_form_that_the_driver_does_not_export_is_hooked_only_if_there_is_no_other() {
        let none = |_: &Entry| false;
        assert_eq!(
            translated_by("cuGraphLaunch", 12_000, true, None, none, |_| None),
            Ok("cuGraphLaunch_ptsz")
        );
        assert_eq!(translated_by("cuMemPrefetchAsync", 12_020, false, None, none, |_| None), Err(false));
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
