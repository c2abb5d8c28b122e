//! What is known about each entry point of the CUDA driver: one table, [`ENTRIES`], a row per exported symbol.
//!
//! # What a row makes
//!
//! A row of class [`Class::Submit`] or [`Class::NeedsMemory`] makes the exported C function of that name, which
//! passes the gate (`pass::enter()` or `pass::enter_query()`; the gate is left when the guard drops) and
//! forwards to the driver; one of class [`Class::Grows`] forwards without a gate. If the driver then has no memory
//! for itself, nvshare makes room on the GPU and repeats the call ([`crate::process::reservation`]). The classes
//! [`Class::Alloc`] to [`Class::Init`] name a handwritten function in `crate::interpose::hooks`:
//!
//! ```text
//! table row      cuMemAlloc_v2(dptr: *mut CUdeviceptr, bytesize: usize) @ 3020;
//! you write      hooks::cuMemAlloc_v2(dptr: *mut CUdeviceptr, bytesize: usize) -> CuResult    (pub unsafe fn)
//! you may call   entry_points::real::cuMemAlloc_v2(dptr, bytesize) -> CuResult                       (the driver's own)
//! ```
//!
//! The exported `cuMemAlloc_v2` calls the hook if `state::enabled()` and the driver's own if not. `entry_points::real::*`
//! exists for every hooked row, and answers CUDA_ERROR_NOT_FOUND if the driver does not have the symbol.
//! [`real_address`] gives the driver's address of any symbol, in the table or not. A hook must not unwind: the exported
//! function is `extern "C"`, so a panic that reaches it aborts the process. The functions of [`Class::Lookup`] are in
//! `crate::interpose::proc_address`. A [`Class::Pass`] row makes nothing: the application gets the driver's own function.
//! The row records that the function was considered.
//!
//! `@` is the first API version at which `cuGetProcAddress` answers the base name (the name without `_v2`, `_ptds`,
//! `_ptsz`) with this symbol; a request for an older version gets an older row.
//!
//! Rows that submit work are grouped by which argument names the stream (`first`, `ninth`, `last`, ...), because
//! [`crate::submit::flow`] counts the work of each stream separately.
//!
//! `checks(...)` after the arguments marks a call that copies or sets one contiguous range of bytes, and says which of its
//! addresses are checked against the ends of allocations ([`crate::memory::bounds`]):
//!
//! | checks | arguments | checked |
//! |---|---|---|
//! | `destination` | to, from, bytes | to |
//! | `source` | to, from, bytes | from |
//! | `both` | to, from, bytes | to and from |
//! | `peers` | to, its context, from, its context, bytes | to and from |
//! | `elements N` | to, value, count of elements of N bytes | to |
//!
//! # Why forwarding needs only the number of arguments
//!
//! Every argument of every forwarded function is a pointer, a handle, an integer of up to 64 bits, or `CUmemLocation`
//! by value, which is two 32-bit words. The System V ABI of x86-64 puts each of them into one general register, the
//! first six in rdi to r9 and the others in one 8-byte slot of the stack each; AAPCS64 on Linux does the same with x0
//! to x7 and 8-byte slots. A function with the same number of `usize` arguments is called in the same way. Whatever a caller
//! leaves in the unused upper half of a register or slot is passed on unchanged, and the driver ignores it. All return a
//! 32-bit integer. Driver functions that take a float or a large struct by value (`cuParamSetf`,
//! `cuTexRefSetMipmapLevelBias` and `Clamp`, `cuIpcOpenMemHandle`, `cuIpcOpenEventHandle`,
//! `cuEGLStreamProducerPresentFrame`) must never be given such a row; they are hooked, with their types, or
//! [`Class::Pass`].
//!
//! # Cost
//!
//! Besides passing the gate, a forwarded call costs one load and one branch: the driver's address is kept in a static per
//! row once it has been looked up. Rows with `checks` also look up where the allocation ends ([`crate::memory::bounds`]).
//!
//! # Two functions per hooked row
//!
//! [`Hooked::hook`] is the address of a private function with the same body as the exported one. If it were the exported
//! function, an executable that defines `cuInit` itself (generated stub loaders do) would override it in symbol resolution,
//! and its stub would receive its own address as the driver's.

use crate::cuda::abi::*;
use crate::cuda::library;
use crate::cuda::symbol::Symbol;
use crate::interpose::driver_calls::{self, symbol};
use crate::interpose::hook::Hooked;
use std::ffi::{CStr, c_char, c_void};

/// What nvshare does with an entry point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// Submits work to the GPU, or touches the contents of its memory: passes the gate.
    Submit,
    /// Submits nothing, but the driver reads the mapping of an address among the arguments: passes the gate.
    NeedsMemory,
    /// Allocates memory of the GPU.
    Alloc,
    /// Frees memory of the GPU.
    Free,
    /// Creates, maps or releases physical memory that the application maps itself.
    Map,
    /// Hands memory to other processes, which may use it at any time: it stays on the GPU from then on.
    Export,
    /// Maps memory of another process, or unmaps it.
    Import,
    /// Allocates or frees memory that only the driver can place (arrays, managed memory), and that nvshare cannot move.
    Placed,
    /// The driver may allocate memory of its own: if it finds none, nvshare makes room and repeats the call.
    Grows,
    /// Creates, queries or destroys a pool of stream-ordered memory.
    Pool,
    /// Queries memory: how much there is, where an allocation begins.
    QueryMemory,
    /// Creates or destroys a context, makes it current, or gives it access to another.
    Context,
    /// Creates or destroys a stream.
    Stream,
    /// Begins or ends the recording of a graph, or has a stream take part in one.
    Capture,
    /// Initialises the driver.
    Init,
    /// Hands out addresses of entry points.
    Lookup,
    /// Needs nothing from nvshare: the application calls the driver's own function.
    Pass,
}

impl Class {
    /// All of them.
    #[cfg(test)]
    pub const ALL: [Class; 17] = [
        Class::Submit,
        Class::NeedsMemory,
        Class::Alloc,
        Class::Free,
        Class::Map,
        Class::Export,
        Class::Import,
        Class::Placed,
        Class::Grows,
        Class::Pool,
        Class::QueryMemory,
        Class::Context,
        Class::Stream,
        Class::Capture,
        Class::Init,
        Class::Lookup,
        Class::Pass,
    ];
}

/// What is known about an entry point.
#[derive(Clone, Copy)]
pub struct Entry {
    /// The exported symbol, as in `cuMemcpyHtoD_v2_ptds`.
    pub export: &'static str,
    /// What `cuGetProcAddress` calls it, as in `cuMemcpyHtoD`.
    pub base: &'static str,
    /// The first API version at which `cuGetProcAddress` answers `base` with it.
    pub since: u32,
    /// Whether it is the form whose default stream is the thread's own (`_ptds`, `_ptsz`).
    pub per_thread: bool,
    /// How many arguments it takes; not known for rows that only pass through.
    pub arity: Option<u8>,
    /// What nvshare does with it.
    pub class: Class,
    /// For forwarded rows: which argument names the stream, as the row's group in the table says.
    pub stream: Option<&'static str>,
    /// Which addresses are checked against the ends of allocations, as the row says; empty if none are.
    pub checks: &'static str,
    /// The function that replaces it and where the driver's own is; `None` for rows that pass through.
    pub hooked: Option<Hooked>,
}

impl Entry {
    const fn new(export: &'static str, since: u32, arity: Option<u8>, class: Class) -> Entry {
        let per_thread = is_per_thread(export);
        Entry {
            export,
            base: base_name(export),
            since,
            per_thread,
            arity,
            class,
            stream: None,
            checks: "",
            hooked: None,
        }
    }

    const fn in_stream(mut self, at: &'static str) -> Entry {
        self.stream = Some(at);
        self
    }

    const fn checking(mut self, checks: &'static str) -> Entry {
        self.checks = checks;
        self
    }

    const fn hooked(mut self, hook: *const c_void, real: &'static Symbol) -> Entry {
        self.hooked = Some(Hooked::new(hook, real));
        self
    }
}

const fn is_per_thread(export: &str) -> bool {
    let name = export.as_bytes();
    let n = name.len();
    n > 5
        && name[n - 5] == b'_'
        && name[n - 4] == b'p'
        && name[n - 3] == b't'
        && matches!((name[n - 2], name[n - 1]), (b'd', b's') | (b's', b'z'))
}

/// The symbol without the suffixes for its version and its default stream.
const fn base_name(export: &'static str) -> &'static str {
    let mut end = export.len();
    if is_per_thread(export) {
        end -= "_ptds".len();
    }
    let name = export.as_bytes();
    if end > 3 && name[end - 3] == b'_' && name[end - 2] == b'v' && name[end - 1].is_ascii_digit() {
        end -= "_v2".len();
    }
    export.split_at(end).0
}

/// The row of an exported symbol.
///
/// A linear search through names: lookups happen a few hundred times in the life of a process, and a search that
/// neither allocates nor locks is safe however early a lookup comes.
pub fn by_export(export: &[u8]) -> Option<&'static Entry> {
    ENTRIES.iter().find(|entry| entry.export.as_bytes() == export)
}

/// The row that `cuGetProcAddress(base, ..., version)` is answered from.
///
/// With `per_thread`, an entry point that has `_ptds` or `_ptsz` forms is answered from those, any other from its only form.
pub fn by_version(base: &[u8], version: u32, per_thread: bool) -> Option<&'static Entry> {
    let newest = |per_thread: bool| {
        ENTRIES
            .iter()
            .filter(|e| e.base.as_bytes() == base && e.per_thread == per_thread && e.since <= version)
            .max_by_key(|e| e.since)
    };
    let entry = if per_thread { newest(true).or_else(|| newest(false)) } else { newest(false) }?;
    RENAMED
        .iter()
        .find(|r| r.base.as_bytes() == base && r.since <= version)
        .and_then(|r| by_export(r.export.as_bytes()))
        .or(Some(entry))
}

/// The driver's address of an exported symbol, whether or not the table has a row for it.
pub fn real_address(export: &CStr) -> Option<usize> {
    match by_export(export.to_bytes()).and_then(|entry| entry.hooked) {
        Some(hooked) => hooked.real.get(),
        None => library::library()?.symbol(export),
    }
}

/// The newest API version all of whose symbols have rows.
pub const KNOWN_VERSION: u32 = 13_050;

/// A base name that newer versions answer with an export of another name.
struct Renamed {
    base: &'static str,
    since: u32,
    export: &'static str,
}

/// CUDA 12 gave `cuGraphInstantiate` the signature of `cuGraphInstantiateWithFlags`.
const RENAMED: &[Renamed] =
    &[Renamed { base: "cuGraphInstantiate", since: 12_000, export: "cuGraphInstantiateWithFlags" }];

/// Passes the gate as the class of a forwarded call requires.
macro_rules! enter {
    (Submit $at:ident $name:ident $($a:ident)*) => {
        crate::submit::pass::enter(move || {
            let per_thread = const { is_per_thread(stringify!($name)) };
            crate::submit::queue::Queue::of(CUstream(stream!($at $($a)*)), per_thread)
        })
    };
    (NeedsMemory $at:ident $name:ident $($a:ident)*) => {
        crate::submit::pass::enter_query()
    };
    (Grows $at:ident $name:ident $($a:ident)*) => {
        Ok::<(), CuResult>(())
    };
}

/// The stream that a call submits to: its first, ninth or last argument, or a field of the launch configuration to which the
/// first argument points. `default`, also for a call that names several streams, is the default stream.
macro_rules! stream {
    (first $a:ident $($rest:ident)*) => { $a };
    (ninth $a0:ident $a1:ident $a2:ident $a3:ident $a4:ident $a5:ident $a6:ident $a7:ident $a8:ident $($rest:ident)*) => { $a8 };
    (last $a:ident) => { $a };
    (last $a:ident $($rest:ident)+) => { stream!(last $($rest)+) };
    // SAFETY: null, or a configuration that the driver will read.
    (attributes $a:ident $($rest:ident)*) => { unsafe { stream_of($a as *const CUlaunchConfig) } };
    (default $($a:ident)*) => { 0 };
}

/// # Safety
/// `config` is null or points to a launch's configuration.
unsafe fn stream_of(config: *const CUlaunchConfig) -> usize {
    // SAFETY: the caller's promise.
    unsafe { config.as_ref() }.map_or(0, |config| config.stream.0)
}

/// Names the parameters of a forwarded function: `arguments!(2 => callback ...)` is `callback!(... a0 a1)`.
macro_rules! arguments {
    (0 => $then:ident $rest:tt) => { $then!($rest); };
    (1 => $then:ident $rest:tt) => { $then!($rest a0); };
    (2 => $then:ident $rest:tt) => { $then!($rest a0 a1); };
    (3 => $then:ident $rest:tt) => { $then!($rest a0 a1 a2); };
    (4 => $then:ident $rest:tt) => { $then!($rest a0 a1 a2 a3); };
    (5 => $then:ident $rest:tt) => { $then!($rest a0 a1 a2 a3 a4); };
    (6 => $then:ident $rest:tt) => { $then!($rest a0 a1 a2 a3 a4 a5); };
    (7 => $then:ident $rest:tt) => { $then!($rest a0 a1 a2 a3 a4 a5 a6); };
    (8 => $then:ident $rest:tt) => { $then!($rest a0 a1 a2 a3 a4 a5 a6 a7); };
    (9 => $then:ident $rest:tt) => { $then!($rest a0 a1 a2 a3 a4 a5 a6 a7 a8); };
    (10 => $then:ident $rest:tt) => { $then!($rest a0 a1 a2 a3 a4 a5 a6 a7 a8 a9); };
    (11 => $then:ident $rest:tt) => { $then!($rest a0 a1 a2 a3 a4 a5 a6 a7 a8 a9 a10); };
}

/// The type of a forwarded argument: one machine word.
macro_rules! word {
    ($argument:ident) => {
        usize
    };
}

/// CUDA_ERROR_INVALID_VALUE if a call's range reaches beyond the end of an allocation, as `checks` in its row says
/// ([`crate::memory::bounds`]); `None` if the call goes to the driver.
macro_rules! check_bounds {
    (() $name:ident $($a:ident)*) => { None };
    ((elements $width:literal) $name:ident $to:ident $value:ident $count:ident $($stream:ident)?) => {
        crate::memory::bounds::refuse(stringify!($name), $to, $count.saturating_mul($width))
    };
    ((destination) $name:ident $to:ident $from:ident $bytes:ident $($stream:ident)?) => {
        crate::memory::bounds::refuse(stringify!($name), $to, $bytes)
    };
    ((source) $name:ident $to:ident $from:ident $bytes:ident $($stream:ident)?) => {
        crate::memory::bounds::refuse(stringify!($name), $from, $bytes)
    };
    ((both) $name:ident $to:ident $from:ident $bytes:ident $($stream:ident)?) => {
        crate::memory::bounds::refuse(stringify!($name), $to, $bytes)
            .or_else(|| crate::memory::bounds::refuse(stringify!($name), $from, $bytes))
    };
    ((peers) $name:ident $to:ident $to_context:ident $from:ident $from_context:ident $bytes:ident $($stream:ident)?) => {
        check_bounds!((both) $name $to $from $bytes)
    };
}

/// The body of a forwarded function.
macro_rules! forward {
    (($class:ident $at:ident $checks:tt $name:ident) $($a:ident)*) => {
        #[inline(always)]
        pub(super) unsafe fn $name($($a: usize),*) -> CuResult {
            type Real = unsafe extern "C" fn($(word!($a)),*) -> CuResult;
            let Some(real) = symbol::$name.get() else { return CuResult::NOT_FOUND };
            let real: Real =
                // SAFETY: the address is that of the driver's function of this name, and the module's head says why a
                // function of as many words can be called in its place.
                unsafe { std::mem::transmute(real) };
            if let Some(refused) = check_bounds!($checks $name $($a)*) {
                return refused;
            }
            /// # Safety
            /// The caller's arguments.
            #[inline(always)]
            unsafe fn once(real: Real, $($a: usize),*) -> CuResult {
                let _pass = match enter!($class $at $name $($a)*) {
                    Ok(pass) => pass,
                    Err(result) => return result,
                };
                // SAFETY: the application's own arguments, unchanged; the pass keeps memory in place meanwhile.
                unsafe { real($($a),*) }
            }
            // SAFETY: the caller's arguments.
            let result = unsafe { once(real, $($a),*) };
            if result != CuResult::OUT_OF_MEMORY {
                return result;
            }
            // The closure keeps the arguments in memory. For the first try they stay in registers: a launch has eleven.
            // SAFETY: as above.
            crate::process::driver_memory::make_room(&move || unsafe { once(real, $($a),*) })
        }
    };
}

/// The function whose address lookups return, and the exported one.
macro_rules! outer {
    (($name:ident) $($a:ident)*) => {
        #[allow(missing_docs)]
        pub(super) unsafe extern "C" fn $name($($a: usize),*) -> CuResult {
            // SAFETY: the caller's arguments.
            unsafe { body::$name($($a),*) }
        }
    };
    ((export $name:ident) $($a:ident)*) => {
        #[cfg_attr(not(test), unsafe(no_mangle))]
        pub unsafe extern "C" fn $name($($a: usize),*) -> CuResult {
            // SAFETY: the caller's arguments.
            unsafe { body::$name($($a),*) }
        }
    };
}

/// Where the handwritten function of a row is.
macro_rules! handwritten {
    (Lookup $name:ident) => {
        crate::interpose::proc_address::$name
    };
    ($class:ident $name:ident) => {
        crate::interpose::hooks::$name
    };
}

macro_rules! entry_points {
    (
        forwarded { $($fclass:ident $fat:ident { $($fname:ident($arity:tt) $(checks($($checks:tt)+))? @ $fsince:literal;)* })* }
        hooked { $($hclass:ident { $($hname:ident($($arg:ident: $ty:ty),*) @ $hsince:literal;)* })* }
        passed { $($pname:ident @ $psince:literal;)* }
    ) => {
        /// The bodies of the functions.
        #[allow(non_snake_case, clippy::too_many_arguments)]
        mod body {
            use super::*;
            $($(arguments!($arity => forward ($fclass $fat ($($($checks)+)?) $fname));)*)*
            $($(
                #[inline(always)]
                pub(super) unsafe fn $hname($($arg: $ty),*) -> CuResult {
                    if crate::state::enabled() {
                        // SAFETY: the caller's arguments.
                        unsafe { handwritten!($hclass $hname)($($arg),*) }
                    } else {
                        // SAFETY: the caller's arguments.
                        unsafe { driver_calls::$hname($($arg),*) }
                    }
                }
            )*)*
        }

        /// The functions whose addresses lookups return.
        #[allow(non_snake_case, clippy::too_many_arguments)]
        mod hook {
            use super::*;
            $($(arguments!($arity => outer ($fname));)*)*
            $($(
                pub(super) unsafe extern "C" fn $hname($($arg: $ty),*) -> CuResult {
                    // SAFETY: the caller's arguments.
                    unsafe { body::$hname($($arg),*) }
                }
            )*)*
        }

        /// The exported functions. Test builds do not export them, or they would replace the tests' own calls to the driver.
        #[allow(non_snake_case, dead_code, clippy::too_many_arguments)]
        mod export {
            use super::*;
            $($(arguments!($arity => outer (export $fname));)*)*
            $($(
                #[cfg_attr(not(test), unsafe(no_mangle))]
                pub unsafe extern "C" fn $hname($($arg: $ty),*) -> CuResult {
                    // SAFETY: the caller's arguments.
                    unsafe { body::$hname($($arg),*) }
                }
            )*)*
        }

        /// Every entry point.
        pub static ENTRIES: &[Entry] = &[
            $($(
                Entry::new(stringify!($fname), $fsince, Some($arity), Class::$fclass)
                    .in_stream(stringify!($fat))
                    .checking(stringify!($($($checks)+)?))
                    .hooked(hook::$fname as *const c_void, &symbol::$fname),
            )*)*
            $($(
                Entry::new(stringify!($hname), $hsince, Some([$(stringify!($arg)),*].len() as u8), Class::$hclass)
                    .hooked(hook::$hname as *const c_void, &symbol::$hname),
            )*)*
            $(Entry::new(stringify!($pname), $psince, None, Class::Pass),)*
        ];
    };
}

super::rows::with_rows!(entry_points);

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, HashSet};

    /// What real frameworks asked the driver for: the symbol, the versions, whether per-thread forms too, whether by dlsym too.
    fn recorded() -> Vec<(&'static str, Vec<u32>, bool, bool)> {
        include_str!("../../tests/data/cuda-entry-points.tsv")
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| {
                let columns: Vec<_> = line.split('\t').collect();
                let versions = columns[1].split(',').filter_map(|v| v.parse().ok()).collect();
                (columns[0], versions, columns[2] == "ptds", columns[3] == "dlsym")
            })
            .collect()
    }

    #[test]
    fn every_recorded_symbol_has_a_row() {
        let recorded = recorded();
        assert_eq!(recorded.len(), 401);
        for (symbol, versions, per_thread, by_dlsym) in recorded {
            if by_dlsym {
                assert!(by_export(symbol.as_bytes()).is_some(), "no row exports {symbol}");
            }
            for version in versions {
                let entry = by_version(symbol.as_bytes(), version, false);
                assert!(entry.is_some_and(|e| !e.per_thread), "no row answers {symbol} at {version}");
                if per_thread && version >= 7000 {
                    let entry = by_version(symbol.as_bytes(), version, true);
                    assert!(
                        entry.is_some_and(|e| e.per_thread),
                        "no _ptsz row answers {symbol} at {version}"
                    );
                }
            }
        }
    }

    /// An asynchronous call (`Async`, or a `_ptsz` form) names its stream in an argument; a synchronous one (`_ptds`) does not.
    #[test]
    fn rows_are_grouped_by_the_argument_that_names_the_stream() {
        // One submits to several streams; for the other no description of its arguments was at hand.
        let by_default = ["cuLaunchCooperativeKernelMultiDevice", "cuFabricCpyBatchAsync"];
        for entry in ENTRIES.iter().filter(|entry| entry.class == Class::Submit) {
            let Some(at) = entry.stream else { continue };
            let asynchronous = entry.base.contains("Async") || entry.export.ends_with("_ptsz");
            if by_default.contains(&entry.base) && at == "default" {
                continue;
            }
            assert!(!asynchronous || at != "default", "{} names its stream somewhere", entry.export);
            assert!(!entry.export.ends_with("_ptds") || at == "default", "{}", entry.export);
        }
    }

    #[test]
    fn a_stream_is_found_among_the_arguments() {
        fn found(a: usize, b: usize, c: usize) -> [usize; 4] {
            [
                stream!(first a b c),
                stream!(last a b c),
                stream!(default a b c),
                stream!(ninth a a a a a a a a b c),
            ]
        }
        assert_eq!(found(5, 6, 7), [5, 7, 0, 6]);
        let config = CUlaunchConfig { shape: [1; 7], stream: CUstream(9) };
        // SAFETY: a configuration, and none.
        assert_eq!(unsafe { (stream_of(&config), stream_of(std::ptr::null())) }, (9, 0));
    }

    /// All forms of a call check the same addresses, except those older than CUDA 3.2: they take 32-bit addresses, which no
    /// allocation has today.
    #[test]
    fn every_copy_and_memset_of_one_range_checks_its_addresses() {
        let checks = |base: &str| match base.trim_end_matches("Async") {
            "cuMemcpy" | "cuMemcpyDtoD" => "both",
            "cuMemcpyPeer" => "peers",
            "cuMemcpyHtoD" => "destination",
            "cuMemcpyDtoH" => "source",
            "cuMemsetD8" => "elements 1",
            "cuMemsetD16" => "elements 2",
            "cuMemsetD32" => "elements 4",
            _ => "",
        };
        let mut checked = 0;
        for entry in ENTRIES {
            let expected = if entry.since < 3_020 { "" } else { checks(entry.base) };
            assert_eq!(entry.checks, expected, "{}", entry.export);
            checked += usize::from(!expected.is_empty());
        }
        assert_eq!(checked, 32);
    }

    #[test]
    fn no_symbol_has_two_rows() {
        let mut seen = HashSet::new();
        for entry in ENTRIES {
            assert!(seen.insert(entry.export), "{} has two rows", entry.export);
        }
        // Nor may two rows answer the same request.
        let mut seen = HashSet::new();
        for entry in ENTRIES {
            let answer = (entry.base, entry.since, entry.per_thread);
            assert!(seen.insert(answer), "{answer:?} is answered by {} and another", entry.export);
        }
    }

    #[test]
    fn versions_of_an_entry_point_grow_with_their_suffix() {
        let mut forms: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for entry in ENTRIES {
            forms.entry((entry.base, entry.per_thread)).or_default().push(entry);
        }
        for rows in forms.values_mut() {
            // `cuX`, `cuX_v2`, `cuX_v3` is also the order of the names, with or without `_ptsz`, once that is cut
            // off.
            rows.sort_by_key(|e| e.export.trim_end_matches("_ptds").trim_end_matches("_ptsz"));
            assert!(
                rows.is_sorted_by_key(|e| e.since),
                "{:?}",
                rows.iter().map(|e| e.export).collect::<Vec<_>>()
            );
        }
    }

    #[test]
    fn all_versions_of_a_submission_pass_the_gate() {
        // A class is a property of what an entry point does; where versions differ, the exceptions are listed.
        let exempt = [
            "cuMemAlloc",
            "cuMemAllocPitch",
            "cuMemFree",
            "cuMemGetAddressRange",
            "cuArrayCreate",
            "cuArray3DCreate",
        ];
        let mut classes: BTreeMap<_, HashSet<_>> = BTreeMap::new();
        for entry in ENTRIES.iter().filter(|e| !exempt.contains(&e.base)) {
            classes.entry(entry.base).or_default().insert(entry.class);
        }
        for (base, classes) in classes {
            assert_eq!(classes.len(), 1, "{base} is of several classes: {classes:?}");
        }
    }

    #[test]
    fn a_symbol_is_split_into_base_name_and_suffixes() {
        let entry = |export: &str| by_export(export.as_bytes()).unwrap();
        assert_eq!(entry("cuMemcpyHtoD_v2_ptds").base, "cuMemcpyHtoD");
        assert!(entry("cuMemcpyHtoD_v2_ptds").per_thread);
        assert_eq!(entry("cuCtxCreate_v4").base, "cuCtxCreate");
        assert_eq!(entry("cuLaunchKernel").base, "cuLaunchKernel");
        assert_eq!(entry("cuStreamBeginCapture_v2").arity, Some(2));
    }

    #[test]
    fn versions_choose_the_row() {
        let at = |base: &str, version, per_thread| {
            by_version(base.as_bytes(), version, per_thread).unwrap().export
        };
        assert_eq!(at("cuMemAlloc", 3019, false), "cuMemAlloc");
        assert_eq!(at("cuMemAlloc", 13000, false), "cuMemAlloc_v2");
        assert_eq!(at("cuMemAlloc", 13000, true), "cuMemAlloc_v2");
        assert_eq!(at("cuMemcpyHtoDAsync", 12000, true), "cuMemcpyHtoDAsync_v2_ptsz");
        assert_eq!(at("cuGetProcAddress", 11030, false), "cuGetProcAddress");
        assert_eq!(at("cuGetProcAddress", 12000, true), "cuGetProcAddress_v2");
        assert_eq!(at("cuGraphInstantiate", 11040, false), "cuGraphInstantiate_v2");
        assert_eq!(at("cuGraphInstantiate", 12000, false), "cuGraphInstantiateWithFlags");
        assert!(by_version(b"cuLaunchKernelEx", 11050, false).is_none());
    }

    #[test]
    fn forwarded_arities_are_those_of_cuda_h() {
        // A sample by hand; all were compared with the prototypes in CUDA 13's cuda.h when the table was made.
        for (export, arity) in [
            ("cuLaunchKernel", 11),
            ("cuLaunchKernelEx_ptsz", 4),
            ("cuLaunchCooperativeKernel", 10),
            ("cuMemcpyBatchAsync", 9),
            ("cuMemcpyBatchAsync_v2_ptsz", 8),
            ("cuMemcpyAtoA_v2", 5),
            ("cuMemPrefetchAsync", 4),
            ("cuMemPrefetchAsync_v2", 5),
            ("cuGraphInstantiate_v2", 5),
            ("cuGraphInstantiateWithFlags", 3),
            ("cuGraphExecUpdate", 4),
            ("cuGraphExecUpdate_v2", 3),
            ("cuStreamBatchMemOp_v2", 4),
        ] {
            assert_eq!(by_export(export.as_bytes()).unwrap().arity, Some(arity), "{export}");
        }
    }

    #[test]
    fn rows_have_the_class_of_what_they_do() {
        let class = |export: &str| by_export(export.as_bytes()).unwrap().class;
        for export in ["cuMemcpyPeerAsync_ptsz", "cuMemsetD2D32Async", "cuGraphUpload", "cuLaunchHostFunc"] {
            assert_eq!(class(export), Class::Submit, "{export}");
        }
        assert_eq!(class("cuMemAllocFromPoolAsync_ptsz"), Class::Alloc);
        assert_eq!(class("cuMemFreeAsync"), Class::Free);
        for export in [
            "cuEventRecord",
            "cuStreamGetAttribute_ptsz",
            "cuCtxSynchronize",
            "cuIpcOpenEventHandle",
            "cuParamSetf",
        ] {
            assert_eq!(class(export), Class::Pass, "{export}");
        }
        for class in Class::ALL {
            assert!(ENTRIES.iter().any(|e| e.class == class), "{class:?} has no row");
        }
    }
}
