//! What is known about each entry point of the CUDA driver: one table, [`ENTRIES`], a row per exported symbol.
//!
//! # What a row makes
//!
//! A row of class [`Class::Submit`] or [`Class::NeedsMemory`] makes the exported C function of that name, which
//! passes the gate (`pass::enter()` or `pass::enter_query()`; the gate is left when the guard drops) and
//! forwards to the driver; one of class [`Class::Grows`] forwards without a gate. If the driver then has no memory
//! for itself, room is made and the call is made again ([`crate::process::reservation`]). The classes [`Class::Alloc`] to
//! [`Class::Init`] name a handwritten function in `crate::interpose::hooks`:
//!
//! ```text
//! table row      cuMemAlloc_v2(dptr: *mut CUdeviceptr, bytesize: usize) @ 3020;
//! you write      hooks::cuMemAlloc_v2(dptr: *mut CUdeviceptr, bytesize: usize) -> CuResult    (pub unsafe fn)
//! you may call   entry_points::real::cuMemAlloc_v2(dptr, bytesize) -> CuResult                       (the driver's own)
//! ```
//!
//! The exported `cuMemAlloc_v2` calls the hook if `state::enabled()` and the driver's own if not. `entry_points::real::*`
//! exists for every hooked row, and answers CUDA_ERROR_NOT_FOUND where the driver hasn't the symbol. The address
//! alone, of any symbol whether or not in the table, is [`real_address`]. A hook must not unwind: the exported
//! function is `extern "C"`, so a panic that reaches it aborts the process. [`Class::Lookup`] is
//! `crate::interpose::dlsym`'s. A [`Class::Pass`] row makes nothing: the application gets the driver's own function, and the
//! row says that somebody thought about it.
//!
//! `@` is the API version since which `cuGetProcAddress` answers the base name (the name without `_v2`, `_ptds`,
//! `_ptsz`) with this symbol; an older request gets an older row.
//!
//! What submits work stands under where its arguments name the stream: [`crate::submit::flow`] counts each stream's work by
//! itself.
//!
//! # Why forwarding needs only the number of arguments
//!
//! Every argument of every forwarded function is a pointer, a handle, an integer of up to 64 bits, or `CUmemLocation`
//! by value, which is two 32-bit words. The System V ABI of x86-64 puts each of them into one general register, the
//! first six in rdi to r9 and the others in one 8-byte slot of the stack each; AAPCS64 on Linux does the same with x0
//! to x7 and 8-byte slots. So does a function of as many `usize`. Whatever a caller leaves in the unused upper half
//! of a register or slot is handed on unchanged, and the callee ignores it as it would have without us. All return a
//! 32-bit integer. Driver functions that take a float or a large struct by value (`cuParamSetf`,
//! `cuTexRefSetMipmapLevelBias` and `Clamp`, `cuIpcOpenMemHandle`, `cuIpcOpenEventHandle`,
//! `cuEGLStreamProducerPresentFrame`) must never be given such a row; they are hooked, with their types, or
//! [`Class::Pass`].
//!
//! # Cost
//!
//! A forwarded call adds, to the gate, one load and one branch: the driver's address is kept in a static per row once
//! it has been looked up. Those that copy or set a row of bytes look up where the allocation ends ([`crate::memory::bounds`]).
//!
//! # Extra names for the same code
//!
//! The address of a hook that [`Hooked::hook`] gives away is of a private function, not of the exported one of the
//! same body: an executable that defines `cuInit` itself (generated stub loaders do) would otherwise catch that
//! address in symbol resolution, and its stub would be handed itself as the driver.

use crate::cuda::abi::*;
use crate::cuda::library;
use crate::cuda::symbol::Symbol;
use crate::interpose::driver_calls::{self, symbol};
use crate::interpose::hook::Hooked;
use std::ffi::{CStr, c_char, c_void};

/// What an entry point is to nvshare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// Submits work to the GPU, or touches the contents of its memory: passes the gate.
    Submit,
    /// Submits nothing, but the driver looks at the mapping of an address that it is given: passes the gate.
    NeedsMemory,
    /// Allocates memory of the GPU.
    Alloc,
    /// Frees it.
    Free,
    /// Physical memory that the application maps itself.
    Map,
    /// Hands memory to others, who may use it at any time: it stays on the GPU from then on.
    Export,
    /// Maps memory of another process, or unmaps it.
    Import,
    /// Allocates or frees memory that only the driver can place, and that cannot move.
    Placed,
    /// The driver may need memory of its own for it: if it finds none, room is made.
    Grows,
    /// Makes, asks or ends a pool of stream-ordered memory.
    Pool,
    /// Tells about memory: how much there is, where an allocation begins.
    QueryMemory,
    /// Creates or destroys a context, makes it current, or opens it to another.
    Context,
    /// Creates or destroys a stream.
    Stream,
    /// Begins or ends the recording of a graph, or has a stream take part in one.
    Capture,
    /// Initialises the driver.
    Init,
    /// Hands out addresses of entry points.
    Lookup,
    /// None of nvshare's business.
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
    /// What it is to nvshare.
    pub class: Class,
    /// For what is forwarded: which argument names its stream, as its group in the table says.
    pub stream: Option<&'static str>,
    /// What stands in for it and where the driver's own is; `None` for rows that pass through.
    pub hooked: Option<Hooked>,
}

impl Entry {
    const fn new(export: &'static str, since: u32, arity: Option<u8>, class: Class) -> Entry {
        let per_thread = is_per_thread(export);
        Entry { export, base: base_name(export), since, per_thread, arity, class, stream: None, hooked: None }
    }

    const fn in_stream(mut self, at: &'static str) -> Entry {
        self.stream = Some(at);
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

/// The symbol without the suffixes that tell its version and its default stream.
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
/// With `per_thread` an entry point that has such forms is answered from them, any other as without.
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

/// The driver's address of an exported symbol, whether or not the table knows it.
pub fn real_address(export: &CStr) -> Option<usize> {
    match by_export(export.to_bytes()).and_then(|entry| entry.hooked) {
        Some(hooked) => hooked.real.get(),
        None => library::library()?.symbol(export),
    }
}

/// The newest API version that this table knows in full.
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

/// Takes the pass that a class of forwarded calls needs.
macro_rules! enter {
    (Submit $at:ident $name:ident $($a:ident)*) => {
        crate::submit::pass::enter(|| {
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

/// The stream that a call submits to, by where its arguments say it: the first of them, the ninth, the last, the launch's
/// attributes in the first. By default, or where a call names several, the default stream.
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

/// A word of arguments, whatever its name.
macro_rules! word {
    ($argument:ident) => {
        usize
    };
}

/// The answer to a call that copies or sets one row of bytes beyond the end of an allocation ([`crate::memory::bounds`]).
macro_rules! beyond {
    (@set $width:literal $name:ident $to:ident $value:ident $count:ident $($stream:ident)?) => {
        crate::memory::bounds::refuse(stringify!($name), $to, $count.saturating_mul($width))
    };
    (@to $name:ident $to:ident $from:ident $bytes:ident $($stream:ident)?) => {
        crate::memory::bounds::refuse(stringify!($name), $to, $bytes)
    };
    (@from $name:ident $to:ident $from:ident $bytes:ident $($stream:ident)?) => {
        crate::memory::bounds::refuse(stringify!($name), $from, $bytes)
    };
    (@both $name:ident $to:ident $from:ident $bytes:ident $($stream:ident)?) => {
        crate::memory::bounds::refuse(stringify!($name), $to, $bytes)
            .or_else(|| crate::memory::bounds::refuse(stringify!($name), $from, $bytes))
    };
    (@peers $name:ident $to:ident $into:ident $from:ident $of:ident $bytes:ident $($stream:ident)?) => {
        beyond!(@both $name $to $from $bytes)
    };
    (cuMemsetD8_v2 $($a:ident)*) => { beyond!(@set 1 cuMemsetD8_v2 $($a)*) };
    (cuMemsetD8_v2_ptds $($a:ident)*) => { beyond!(@set 1 cuMemsetD8_v2_ptds $($a)*) };
    (cuMemsetD8Async $($a:ident)*) => { beyond!(@set 1 cuMemsetD8Async $($a)*) };
    (cuMemsetD8Async_ptsz $($a:ident)*) => { beyond!(@set 1 cuMemsetD8Async_ptsz $($a)*) };
    (cuMemsetD16_v2 $($a:ident)*) => { beyond!(@set 2 cuMemsetD16_v2 $($a)*) };
    (cuMemsetD16_v2_ptds $($a:ident)*) => { beyond!(@set 2 cuMemsetD16_v2_ptds $($a)*) };
    (cuMemsetD16Async $($a:ident)*) => { beyond!(@set 2 cuMemsetD16Async $($a)*) };
    (cuMemsetD16Async_ptsz $($a:ident)*) => { beyond!(@set 2 cuMemsetD16Async_ptsz $($a)*) };
    (cuMemsetD32_v2 $($a:ident)*) => { beyond!(@set 4 cuMemsetD32_v2 $($a)*) };
    (cuMemsetD32_v2_ptds $($a:ident)*) => { beyond!(@set 4 cuMemsetD32_v2_ptds $($a)*) };
    (cuMemsetD32Async $($a:ident)*) => { beyond!(@set 4 cuMemsetD32Async $($a)*) };
    (cuMemsetD32Async_ptsz $($a:ident)*) => { beyond!(@set 4 cuMemsetD32Async_ptsz $($a)*) };
    (cuMemcpy $($a:ident)*) => { beyond!(@both cuMemcpy $($a)*) };
    (cuMemcpy_ptds $($a:ident)*) => { beyond!(@both cuMemcpy_ptds $($a)*) };
    (cuMemcpyAsync $($a:ident)*) => { beyond!(@both cuMemcpyAsync $($a)*) };
    (cuMemcpyAsync_ptsz $($a:ident)*) => { beyond!(@both cuMemcpyAsync_ptsz $($a)*) };
    (cuMemcpyDtoD_v2 $($a:ident)*) => { beyond!(@both cuMemcpyDtoD_v2 $($a)*) };
    (cuMemcpyDtoD_v2_ptds $($a:ident)*) => { beyond!(@both cuMemcpyDtoD_v2_ptds $($a)*) };
    (cuMemcpyDtoDAsync_v2 $($a:ident)*) => { beyond!(@both cuMemcpyDtoDAsync_v2 $($a)*) };
    (cuMemcpyDtoDAsync_v2_ptsz $($a:ident)*) => { beyond!(@both cuMemcpyDtoDAsync_v2_ptsz $($a)*) };
    (cuMemcpyHtoD_v2 $($a:ident)*) => { beyond!(@to cuMemcpyHtoD_v2 $($a)*) };
    (cuMemcpyHtoD_v2_ptds $($a:ident)*) => { beyond!(@to cuMemcpyHtoD_v2_ptds $($a)*) };
    (cuMemcpyHtoDAsync_v2 $($a:ident)*) => { beyond!(@to cuMemcpyHtoDAsync_v2 $($a)*) };
    (cuMemcpyHtoDAsync_v2_ptsz $($a:ident)*) => { beyond!(@to cuMemcpyHtoDAsync_v2_ptsz $($a)*) };
    (cuMemcpyDtoH_v2 $($a:ident)*) => { beyond!(@from cuMemcpyDtoH_v2 $($a)*) };
    (cuMemcpyDtoH_v2_ptds $($a:ident)*) => { beyond!(@from cuMemcpyDtoH_v2_ptds $($a)*) };
    (cuMemcpyDtoHAsync_v2 $($a:ident)*) => { beyond!(@from cuMemcpyDtoHAsync_v2 $($a)*) };
    (cuMemcpyDtoHAsync_v2_ptsz $($a:ident)*) => { beyond!(@from cuMemcpyDtoHAsync_v2_ptsz $($a)*) };
    (cuMemcpyPeer $($a:ident)*) => { beyond!(@peers cuMemcpyPeer $($a)*) };
    (cuMemcpyPeer_ptds $($a:ident)*) => { beyond!(@peers cuMemcpyPeer_ptds $($a)*) };
    (cuMemcpyPeerAsync $($a:ident)*) => { beyond!(@peers cuMemcpyPeerAsync $($a)*) };
    (cuMemcpyPeerAsync_ptsz $($a:ident)*) => { beyond!(@peers cuMemcpyPeerAsync_ptsz $($a)*) };
    ($name:ident $($a:ident)*) => { None };
}

/// The body of a forwarded function.
macro_rules! forward {
    (($class:ident $at:ident $name:ident) $($a:ident)*) => {
        #[inline(always)]
        pub(super) unsafe fn $name($($a: usize),*) -> CuResult {
            let Some(real) = symbol::$name.get() else { return CuResult::NOT_FOUND };
            let real: unsafe extern "C" fn($(word!($a)),*) -> CuResult =
                // SAFETY: the address is that of the driver's function of this name, and the module's head says why a
                // function of as many words can be called in its place.
                unsafe { std::mem::transmute(real) };
            if let Some(refused) = beyond!($name $($a)*) {
                return refused;
            }
            let call = || {
                let _pass = match enter!($class $at $name $($a)*) {
                    Ok(pass) => pass,
                    Err(result) => return result,
                };
                // SAFETY: the application's own arguments, unchanged; the pass keeps memory in place meanwhile.
                unsafe { real($($a),*) }
            };
            crate::process::driver_memory::with_room(call)
        }
    };
}

/// The function that is handed out, and the one that is exported.
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
        forwarded { $($fclass:ident $fat:ident { $($fname:ident($arity:tt) @ $fsince:literal;)* })* }
        hooked { $($hclass:ident { $($hname:ident($($arg:ident: $ty:ty),*) @ $hsince:literal;)* })* }
        passed { $($pname:ident @ $psince:literal;)* }
    ) => {
        /// What the functions do.
        #[allow(non_snake_case, clippy::too_many_arguments)]
        mod body {
            use super::*;
            $($(arguments!($arity => forward ($fclass $fat $fname));)*)*
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

        /// The functions that are handed out.
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

        /// The functions that are exported. Not in tests, whose own calls to the driver they would catch.
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

    /// What real frameworks asked the driver for: symbol, versions, per-thread forms too, by dlsym too.
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

    /// What is asynchronous, or has a form for threads with default streams of their own that is (`_ptsz`), names its stream;
    /// what is synchronous (`_ptds`) has none to name.
    #[test]
    fn what_names_a_stream_stands_under_where() {
        // What several streams do, and what is newer than any description of its arguments that was at hand.
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

    #[test]
    fn no_symbol_has_two_rows() {
        let mut seen = HashSet::new();
        for entry in ENTRIES {
            assert!(seen.insert(entry.export), "{} is there twice", entry.export);
        }
        // Nor may two rows compete for one answer.
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
    fn names_are_taken_apart() {
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
    fn what_is_of_which_class() {
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
