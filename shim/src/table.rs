//! What is known about each entry point of the CUDA driver: one table, [`ENTRIES`], a row per exported symbol.
//!
//! # What a row makes
//!
//! A row of class [`Class::Submit`] or [`Class::NeedsMemory`] makes the exported C function of that name, which
//! passes the gate (`session::enter()` or `session::enter_query()`; the gate is left when the guard drops) and
//! forwards to the driver; one of class [`Class::Grows`] forwards without a gate. If the driver then has no memory
//! for itself, room is made and the call is made again ([`crate::room`]). The classes [`Class::Alloc`] to [`Class::Init`] name a handwritten function in
//! `crate::hooks`:
//!
//! ```text
//! table row      cuMemAlloc_v2(dptr: *mut CUdeviceptr, bytesize: usize) @ 3020;
//! you write      hooks::cuMemAlloc_v2(dptr: *mut CUdeviceptr, bytesize: usize) -> CuResult    (pub unsafe fn)
//! you may call   table::real::cuMemAlloc_v2(dptr, bytesize) -> CuResult                       (the driver's own)
//! ```
//!
//! The exported `cuMemAlloc_v2` calls the hook if `session::enabled()` and the driver's own if not. `table::real::*`
//! exists for every hooked row, and answers CUDA_ERROR_NOT_FOUND where the driver hasn't the symbol. The address
//! alone, of any symbol whether or not in the table, is [`real_address`]. A hook must not unwind: the exported
//! function is `extern "C"`, so a panic that reaches it aborts the process. [`Class::Lookup`] is
//! `crate::interpose`'s. A [`Class::Pass`] row makes nothing: the application gets the driver's own function, and the
//! row says that somebody thought about it.
//!
//! `@` is the API version since which `cuGetProcAddress` answers the base name (the name without `_v2`, `_ptds`,
//! `_ptsz`) with this symbol; an older request gets an older row.
//!
//! What submits work stands under where its arguments name the stream: [`crate::flow`] counts each stream's work by
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
//! it has been looked up. Those that copy or set a row of bytes look up where the allocation ends ([`crate::bounds`]).
//!
//! # Extra names for the same code
//!
//! The address of a hook that [`Hooked::hook`] gives away is of a private function, not of the exported one of the
//! same body: an executable that defines `cuInit` itself (generated stub loaders do) would otherwise catch that
//! address in symbol resolution, and its stub would be handed itself as the driver.

use std::ffi::{CStr, c_char, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::abi::*;
use crate::driver;

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

/// The driver's address of one entry point, looked up when it is first wanted.
pub struct Real {
    library: &'static driver::Soname,
    name: &'static CStr,
    address: AtomicUsize,
}

/// Values of [`Real::address`] that aren't addresses.
const UNKNOWN: usize = 0;
const MISSING: usize = 1;

impl Real {
    const fn new(name: &'static str) -> Real {
        Real::of(&driver::LIBCUDA, name)
    }

    /// An entry point of a library, by its name with a NUL at the end.
    pub const fn of(library: &'static driver::Soname, name: &'static str) -> Real {
        match CStr::from_bytes_with_nul(name.as_bytes()) {
            Ok(name) => Real { library, name, address: AtomicUsize::new(UNKNOWN) },
            Err(_) => panic!("the name of an entry point ends with its only NUL"),
        }
    }

    /// The driver's address, or `None` if the driver hasn't this entry point or can't be loaded.
    #[inline(always)]
    pub fn get(&self) -> Option<usize> {
        match self.address.load(Ordering::Acquire) {
            address if address > MISSING => Some(address),
            _ => self.look_up(driver::Soname::library),
        }
    }

    /// The same, but never the reason why the driver's library is loaded.
    pub fn get_if_loaded(&self) -> Option<usize> {
        match self.address.load(Ordering::Acquire) {
            address if address > MISSING => Some(address),
            _ => self.look_up(driver::Soname::library_if_loaded),
        }
    }

    /// Takes the driver's word for an address that its symbol table doesn't give.
    pub fn adopt(&self, address: usize) {
        _ = self.address.compare_exchange(MISSING, address, Ordering::AcqRel, Ordering::Acquire);
    }

    #[cold]
    #[inline(never)]
    fn look_up(&self, library: fn(&driver::Soname) -> Option<driver::Library>) -> Option<usize> {
        if self.address.load(Ordering::Acquire) == MISSING {
            return None;
        }
        // Without the library nothing is known about the symbol, so nothing is remembered either.
        let address = library(self.library)?.symbol(self.name);
        // Two threads may get here together; they find the same.
        self.address.store(address.unwrap_or(MISSING), Ordering::Release);
        address
    }
}

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

/// An entry point that something stands in for.
#[derive(Clone, Copy)]
pub struct Hooked {
    /// What stands in for it.
    pub hook: Hook,
    /// What it stands in for.
    pub real: &'static Real,
}

impl Hooked {
    /// `hook` stands in for `real`.
    pub const fn new(hook: *const c_void, real: &'static Real) -> Hooked {
        Hooked { hook: Hook(hook), real }
    }
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

    const fn hooked(mut self, hook: *const c_void, real: &'static Real) -> Entry {
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
        None => driver::library()?.symbol(export),
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
        crate::session::enter(|| {
            let per_thread = const { is_per_thread(stringify!($name)) };
            crate::flow::Queue::of(CUstream(stream!($at $($a)*)), per_thread)
        })
    };
    (NeedsMemory $at:ident $name:ident $($a:ident)*) => {
        crate::session::enter_query()
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

/// The answer to a call that copies or sets one row of bytes beyond the end of an allocation ([`crate::bounds`]).
macro_rules! beyond {
    (@set $width:literal $name:ident $to:ident $value:ident $count:ident $($stream:ident)?) => {
        crate::bounds::refuse(stringify!($name), $to, $count.saturating_mul($width))
    };
    (@to $name:ident $to:ident $from:ident $bytes:ident $($stream:ident)?) => {
        crate::bounds::refuse(stringify!($name), $to, $bytes)
    };
    (@from $name:ident $to:ident $from:ident $bytes:ident $($stream:ident)?) => {
        crate::bounds::refuse(stringify!($name), $from, $bytes)
    };
    (@both $name:ident $to:ident $from:ident $bytes:ident $($stream:ident)?) => {
        crate::bounds::refuse(stringify!($name), $to, $bytes)
            .or_else(|| crate::bounds::refuse(stringify!($name), $from, $bytes))
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
            let Some(real) = slot::$name.get() else { return CuResult::NOT_FOUND };
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
            crate::room::with_room(call)
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
        crate::interpose::$name
    };
    ($class:ident $name:ident) => {
        crate::hooks::$name
    };
}

macro_rules! entry_points {
    (
        forwarded { $($fclass:ident $fat:ident { $($fname:ident($arity:tt) @ $fsince:literal;)* })* }
        hooked { $($hclass:ident { $($hname:ident($($arg:ident: $ty:ty),*) @ $hsince:literal;)* })* }
        passed { $($pname:ident @ $psince:literal;)* }
    ) => {
        /// The driver's addresses.
        #[allow(non_upper_case_globals)]
        mod slot {
            use super::Real;
            $($(pub(super) static $fname: Real = Real::new(concat!(stringify!($fname), "\0"));)*)*
            $($(pub(super) static $hname: Real = Real::new(concat!(stringify!($hname), "\0"));)*)*
        }

        /// The driver's own functions, for the handwritten ones that stand in for them.
        ///
        /// Each answers CUDA_ERROR_NOT_FOUND if the driver has no such function.
        #[allow(non_snake_case, clippy::missing_safety_doc, clippy::too_many_arguments, dead_code)]
        pub mod real {
            use super::*;
            $($(
                #[doc = concat!("The driver's `", stringify!($hname), "`.")]
                #[inline]
                pub unsafe fn $hname($($arg: $ty),*) -> CuResult {
                    let Some(real) = slot::$hname.get() else { return CuResult::NOT_FOUND };
                    let real: unsafe extern "C" fn($($ty),*) -> CuResult =
                        // SAFETY: the driver's function of this name has this signature, the one in cuda.h.
                        unsafe { std::mem::transmute(real) };
                    // SAFETY: the caller's arguments.
                    unsafe { real($($arg),*) }
                }
            )*)*
        }

        /// What the functions do.
        #[allow(non_snake_case, clippy::too_many_arguments)]
        mod body {
            use super::*;
            $($(arguments!($arity => forward ($fclass $fat $fname));)*)*
            $($(
                #[inline(always)]
                pub(super) unsafe fn $hname($($arg: $ty),*) -> CuResult {
                    if crate::session::enabled() {
                        // SAFETY: the caller's arguments.
                        unsafe { handwritten!($hclass $hname)($($arg),*) }
                    } else {
                        // SAFETY: the caller's arguments.
                        unsafe { real::$hname($($arg),*) }
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
                    .hooked(hook::$fname as *const c_void, &slot::$fname),
            )*)*
            $($(
                Entry::new(stringify!($hname), $hsince, Some([$(stringify!($arg)),*].len() as u8), Class::$hclass)
                    .hooked(hook::$hname as *const c_void, &slot::$hname),
            )*)*
            $(Entry::new(stringify!($pname), $psince, None, Class::Pass),)*
        ];
    };
}

entry_points! {
    forwarded {
        Submit first {
            cuLaunchHostFunc(3) @ 10_000;
            cuLaunchHostFunc_ptsz(3) @ 10_000;
            cuLaunchHostFunc_v2(4) @ 13_010;
            cuLaunchHostFunc_v2_ptsz(4) @ 13_010;
            cuStreamAddCallback(4) @ 5_000;
            cuStreamAddCallback_ptsz(4) @ 7_000;
            cuStreamAttachMemAsync(4) @ 6_000;
            cuStreamAttachMemAsync_ptsz(4) @ 7_000;
            cuStreamBatchMemOp(4) @ 8_000;
            cuStreamBatchMemOp_ptsz(4) @ 8_000;
            cuStreamBatchMemOp_v2(4) @ 11_070;
            cuStreamBatchMemOp_v2_ptsz(4) @ 11_070;
            cuStreamWaitValue32(4) @ 8_000;
            cuStreamWaitValue32_ptsz(4) @ 8_000;
            cuStreamWaitValue32_v2(4) @ 11_070;
            cuStreamWaitValue32_v2_ptsz(4) @ 11_070;
            cuStreamWaitValue64(4) @ 9_000;
            cuStreamWaitValue64_ptsz(4) @ 9_000;
            cuStreamWaitValue64_v2(4) @ 11_070;
            cuStreamWaitValue64_v2_ptsz(4) @ 11_070;
            cuStreamWriteValue32(4) @ 8_000;
            cuStreamWriteValue32_ptsz(4) @ 8_000;
            cuStreamWriteValue32_v2(4) @ 11_070;
            cuStreamWriteValue32_v2_ptsz(4) @ 11_070;
            cuStreamWriteValue64(4) @ 9_000;
            cuStreamWriteValue64_ptsz(4) @ 9_000;
            cuStreamWriteValue64_v2(4) @ 11_070;
            cuStreamWriteValue64_v2_ptsz(4) @ 11_070;
        }
        Submit ninth {
            cuLaunchCooperativeKernel(10) @ 9_000;
            cuLaunchCooperativeKernel_ptsz(10) @ 9_000;
            cuLaunchKernel(11) @ 4_000;
            cuLaunchKernel_ptsz(11) @ 7_000;
        }
        Submit last {
            cuGLMapBufferObjectAsync(4) @ 2_030;
            cuGLMapBufferObjectAsync_v2(4) @ 3_020;
            cuGLMapBufferObjectAsync_v2_ptsz(4) @ 7_000;
            cuGLUnmapBufferObjectAsync(2) @ 2_030;
            cuGraphLaunch(2) @ 10_000;
            cuGraphLaunch_ptsz(2) @ 10_000;
            cuGraphUpload(2) @ 11_010;
            cuGraphUpload_ptsz(2) @ 11_010;
            cuGraphicsMapResources(3) @ 3_000;
            cuGraphicsMapResources_ptsz(3) @ 7_000;
            cuGraphicsUnmapResources(3) @ 3_000;
            cuGraphicsUnmapResources_ptsz(3) @ 7_000;
            cuLaunchGridAsync(4) @ 2_000;
            cuMemBatchDecompressAsync(5) @ 12_060;
            cuMemBatchDecompressAsync_ptsz(5) @ 12_060;
            cuMemDiscardAndPrefetchBatchAsync(8) @ 13_000;
            cuMemDiscardAndPrefetchBatchAsync_ptsz(8) @ 13_000;
            cuMemDiscardBatchAsync(5) @ 13_000;
            cuMemDiscardBatchAsync_ptsz(5) @ 13_000;
            cuMemMapArrayAsync(3) @ 11_010;
            cuMemMapArrayAsync_ptsz(3) @ 11_010;
            cuMemPrefetchAsync(4) @ 8_000;
            cuMemPrefetchAsync_ptsz(4) @ 8_000;
            cuMemPrefetchAsync_v2(5) @ 12_020;
            cuMemPrefetchAsync_v2_ptsz(5) @ 12_020;
            cuMemPrefetchBatchAsync(8) @ 13_000;
            cuMemPrefetchBatchAsync_ptsz(8) @ 13_000;
            cuMemcpy2DAsync(2) @ 2_000;
            cuMemcpy2DAsync_v2(2) @ 3_020;
            cuMemcpy2DAsync_v2_ptsz(2) @ 7_000;
            cuMemcpy3DAsync(2) @ 2_000;
            cuMemcpy3DAsync_v2(2) @ 3_020;
            cuMemcpy3DAsync_v2_ptsz(2) @ 7_000;
            cuMemcpy3DBatchAsync(5) @ 12_080;
            cuMemcpy3DBatchAsync_ptsz(5) @ 12_080;
            cuMemcpy3DBatchAsync_v2(4) @ 13_000;
            cuMemcpy3DBatchAsync_v2_ptsz(4) @ 13_000;
            cuMemcpy3DPeerAsync(2) @ 4_000;
            cuMemcpy3DPeerAsync_ptsz(2) @ 7_000;
            cuMemcpy3DWithAttributesAsync(3) @ 13_020;
            cuMemcpy3DWithAttributesAsync_ptsz(3) @ 13_020;
            cuMemcpyAsync(4) @ 4_000;
            cuMemcpyAsync_ptsz(4) @ 7_000;
            cuMemcpyAtoHAsync(5) @ 2_000;
            cuMemcpyAtoHAsync_v2(5) @ 3_020;
            cuMemcpyAtoHAsync_v2_ptsz(5) @ 7_000;
            cuMemcpyBatchAsync(9) @ 12_080;
            cuMemcpyBatchAsync_ptsz(9) @ 12_080;
            cuMemcpyBatchAsync_v2(8) @ 13_000;
            cuMemcpyBatchAsync_v2_ptsz(8) @ 13_000;
            cuMemcpyDtoDAsync(4) @ 3_000;
            cuMemcpyDtoDAsync_v2(4) @ 3_020;
            cuMemcpyDtoDAsync_v2_ptsz(4) @ 7_000;
            cuMemcpyDtoHAsync(4) @ 2_000;
            cuMemcpyDtoHAsync_v2(4) @ 3_020;
            cuMemcpyDtoHAsync_v2_ptsz(4) @ 7_000;
            cuMemcpyHtoAAsync(5) @ 2_000;
            cuMemcpyHtoAAsync_v2(5) @ 3_020;
            cuMemcpyHtoAAsync_v2_ptsz(5) @ 7_000;
            cuMemcpyHtoDAsync(4) @ 2_000;
            cuMemcpyHtoDAsync_v2(4) @ 3_020;
            cuMemcpyHtoDAsync_v2_ptsz(4) @ 7_000;
            cuMemcpyPeerAsync(6) @ 4_000;
            cuMemcpyPeerAsync_ptsz(6) @ 7_000;
            cuMemcpyWithAttributesAsync(5) @ 13_020;
            cuMemcpyWithAttributesAsync_ptsz(5) @ 13_020;
            cuMemsetD16Async(4) @ 3_020;
            cuMemsetD16Async_ptsz(4) @ 7_000;
            cuMemsetD2D16Async(6) @ 3_020;
            cuMemsetD2D16Async_ptsz(6) @ 7_000;
            cuMemsetD2D32Async(6) @ 3_020;
            cuMemsetD2D32Async_ptsz(6) @ 7_000;
            cuMemsetD2D8Async(6) @ 3_020;
            cuMemsetD2D8Async_ptsz(6) @ 7_000;
            cuMemsetD32Async(4) @ 3_020;
            cuMemsetD32Async_ptsz(4) @ 7_000;
            cuMemsetD8Async(4) @ 3_020;
            cuMemsetD8Async_ptsz(4) @ 7_000;
            cuSignalExternalSemaphoresAsync(4) @ 10_000;
            cuSignalExternalSemaphoresAsync_ptsz(4) @ 10_000;
            cuWaitExternalSemaphoresAsync(4) @ 10_000;
            cuWaitExternalSemaphoresAsync_ptsz(4) @ 10_000;
        }
        Submit attributes {
            cuLaunchKernelEx(4) @ 11_060;
            cuLaunchKernelEx_ptsz(4) @ 11_060;
        }
        Submit default {
            cuFabricCpyBatchAsync(4) @ 13_050;
            cuFabricCpyBatchAsync_ptsz(4) @ 13_050;
            cuGLMapBufferObject(3) @ 2_000;
            cuGLMapBufferObject_v2(3) @ 3_020;
            cuGLMapBufferObject_v2_ptds(3) @ 7_000;
            cuGLUnmapBufferObject(1) @ 2_000;
            cuLaunch(1) @ 2_000;
            cuLaunchCooperativeKernelMultiDevice(3) @ 9_000;
            cuLaunchGrid(3) @ 2_000;
            cuMemcpy(3) @ 4_000;
            cuMemcpy_ptds(3) @ 7_000;
            cuMemcpy2D(1) @ 2_000;
            cuMemcpy2D_v2(1) @ 3_020;
            cuMemcpy2D_v2_ptds(1) @ 7_000;
            cuMemcpy2DUnaligned(1) @ 2_000;
            cuMemcpy2DUnaligned_v2(1) @ 3_020;
            cuMemcpy2DUnaligned_v2_ptds(1) @ 7_000;
            cuMemcpy3D(1) @ 2_000;
            cuMemcpy3D_v2(1) @ 3_020;
            cuMemcpy3D_v2_ptds(1) @ 7_000;
            cuMemcpy3DPeer(1) @ 4_000;
            cuMemcpy3DPeer_ptds(1) @ 7_000;
            cuMemcpyAtoA(5) @ 2_000;
            cuMemcpyAtoA_v2(5) @ 3_020;
            cuMemcpyAtoA_v2_ptds(5) @ 7_000;
            cuMemcpyAtoD(4) @ 2_000;
            cuMemcpyAtoD_v2(4) @ 3_020;
            cuMemcpyAtoD_v2_ptds(4) @ 7_000;
            cuMemcpyAtoH(4) @ 2_000;
            cuMemcpyAtoH_v2(4) @ 3_020;
            cuMemcpyAtoH_v2_ptds(4) @ 7_000;
            cuMemcpyDtoA(4) @ 2_000;
            cuMemcpyDtoA_v2(4) @ 3_020;
            cuMemcpyDtoA_v2_ptds(4) @ 7_000;
            cuMemcpyDtoD(3) @ 2_000;
            cuMemcpyDtoD_v2(3) @ 3_020;
            cuMemcpyDtoD_v2_ptds(3) @ 7_000;
            cuMemcpyDtoH(3) @ 2_000;
            cuMemcpyDtoH_v2(3) @ 3_020;
            cuMemcpyDtoH_v2_ptds(3) @ 7_000;
            cuMemcpyHtoA(4) @ 2_000;
            cuMemcpyHtoA_v2(4) @ 3_020;
            cuMemcpyHtoA_v2_ptds(4) @ 7_000;
            cuMemcpyHtoD(3) @ 2_000;
            cuMemcpyHtoD_v2(3) @ 3_020;
            cuMemcpyHtoD_v2_ptds(3) @ 7_000;
            cuMemcpyPeer(5) @ 4_000;
            cuMemcpyPeer_ptds(5) @ 7_000;
            cuMemsetD16(3) @ 2_000;
            cuMemsetD16_v2(3) @ 3_020;
            cuMemsetD16_v2_ptds(3) @ 7_000;
            cuMemsetD2D16(5) @ 2_000;
            cuMemsetD2D16_v2(5) @ 3_020;
            cuMemsetD2D16_v2_ptds(5) @ 7_000;
            cuMemsetD2D32(5) @ 2_000;
            cuMemsetD2D32_v2(5) @ 3_020;
            cuMemsetD2D32_v2_ptds(5) @ 7_000;
            cuMemsetD2D8(5) @ 2_000;
            cuMemsetD2D8_v2(5) @ 3_020;
            cuMemsetD2D8_v2_ptds(5) @ 7_000;
            cuMemsetD32(3) @ 2_000;
            cuMemsetD32_v2(3) @ 3_020;
            cuMemsetD32_v2_ptds(3) @ 7_000;
            cuMemsetD8(3) @ 2_000;
            cuMemsetD8_v2(3) @ 3_020;
            cuMemsetD8_v2_ptds(3) @ 7_000;
        }
        NeedsMemory none {
            cuGraphAddBatchMemOpNode(5) @ 11_070;
            cuGraphAddChildGraphNode(5) @ 10_000;
            cuGraphAddMemcpyNode(6) @ 10_000;
            cuGraphAddMemsetNode(6) @ 10_000;
            cuGraphAddNode(5) @ 12_020;
            cuGraphAddNode_v2(6) @ 12_030;
            cuGraphAddNode_v3(6) @ 13_040;
            cuGraphBatchMemOpNodeSetParams(2) @ 11_070;
            cuGraphExecBatchMemOpNodeSetParams(3) @ 11_070;
            cuGraphExecChildGraphNodeSetParams(3) @ 11_010;
            cuGraphExecMemcpyNodeSetParams(4) @ 10_020;
            cuGraphExecMemsetNodeSetParams(4) @ 10_020;
            cuGraphExecNodeSetParams(3) @ 12_020;
            cuGraphExecUpdate(4) @ 10_020;
            cuGraphExecUpdate_v2(3) @ 12_000;
            cuGraphInstantiate(5) @ 10_000;
            cuGraphInstantiate_v2(5) @ 11_000;
            cuGraphInstantiateWithFlags(3) @ 11_040;
            cuGraphInstantiateWithParams(3) @ 12_000;
            cuGraphInstantiateWithParams_ptsz(3) @ 12_000;
            cuGraphMemcpyNodeSetParams(2) @ 10_000;
            cuGraphMemsetNodeSetParams(2) @ 10_000;
            cuGraphNodeSetParams(2) @ 12_020;
            cuGraphNodeSetParams_v2(2) @ 13_040;
            cuLogicalEndpointBindAddr(6) @ 13_030;
            cuMemAdvise(4) @ 8_000;
            cuMemAdvise_v2(4) @ 12_020;
            cuMemGetLocationInfo(5) @ 13_040;
            cuMemRangeGetAttribute(5) @ 8_000;
            cuMemRangeGetAttributes(6) @ 8_000;
            cuMulticastBindAddr(5) @ 12_010;
            cuMulticastBindAddr_v2(6) @ 13_010;
            cuSurfObjectCreate(2) @ 5_000;
            cuTexObjectCreate(4) @ 5_000;
            cuTexRefSetAddress(4) @ 2_000;
            cuTexRefSetAddress_v2(4) @ 3_020;
            cuTexRefSetAddress2D(4) @ 2_020;
            cuTexRefSetAddress2D_v2(4) @ 3_020;
            cuTexRefSetAddress2D_v3(4) @ 4_010;
        }
        Grows none {
            cuCtxSetLimit(2) @ 3_010;
            cuEventCreate(2) @ 2_000;
            cuFuncLoad(1) @ 12_040;
            cuKernelGetFunction(2) @ 12_000;
            cuLibraryGetGlobal(4) @ 12_000;
            cuLibraryGetModule(2) @ 12_000;
            cuLibraryLoadData(8) @ 12_000;
            cuLibraryLoadFromFile(8) @ 12_000;
            cuMemAllocHost(2) @ 2_000;
            cuMemAllocHost_v2(2) @ 3_020;
            cuMemHostAlloc(3) @ 2_020;
            cuMemHostRegister(3) @ 4_000;
            cuMemHostRegister_v2(3) @ 6_050;
            cuModuleGetFunction(3) @ 2_000;
            cuModuleGetGlobal(4) @ 2_000;
            cuModuleGetGlobal_v2(4) @ 3_020;
            cuModuleLoad(2) @ 2_000;
            cuModuleLoadData(2) @ 2_000;
            cuModuleLoadDataEx(5) @ 2_010;
            cuModuleLoadFatBinary(2) @ 2_000;
        }
    }
    hooked {
        Init {
            cuInit(flags: u32) @ 2_000;
        }
        Lookup {
            cuGetProcAddress(symbol: *const c_char, pfn: *mut *mut c_void, version: i32, flags: u64) @ 11_030;
            cuGetProcAddress_v2(
                symbol: *const c_char, pfn: *mut *mut c_void, version: i32, flags: u64,
                status: *mut CUdriverProcAddressQueryResult
            ) @ 12_000;
        }
        Alloc {
            cuMemAlloc_v2(dptr: *mut CUdeviceptr, bytesize: usize) @ 3_020;
            cuMemAllocPitch_v2(
                dptr: *mut CUdeviceptr, pitch: *mut usize, width: usize, height: usize, element_size: u32
            ) @ 3_020;
            cuMemAllocAsync(dptr: *mut CUdeviceptr, bytesize: usize, stream: CUstream) @ 11_020;
            cuMemAllocAsync_ptsz(dptr: *mut CUdeviceptr, bytesize: usize, stream: CUstream) @ 11_020;
            cuMemAllocFromPoolAsync(
                dptr: *mut CUdeviceptr, bytesize: usize, pool: CUmemoryPool, stream: CUstream
            ) @ 11_020;
            cuMemAllocFromPoolAsync_ptsz(
                dptr: *mut CUdeviceptr, bytesize: usize, pool: CUmemoryPool, stream: CUstream
            ) @ 11_020;
        }
        Free {
            cuMemFree_v2(dptr: CUdeviceptr) @ 3_020;
            cuMemFreeAsync(dptr: CUdeviceptr, stream: CUstream) @ 11_020;
            cuMemFreeAsync_ptsz(dptr: CUdeviceptr, stream: CUstream) @ 11_020;
        }
        Pool {
            cuMemPoolCreate(pool: *mut CUmemoryPool, props: *const CUmemPoolProps) @ 11_020;
            cuMemPoolDestroy(pool: CUmemoryPool) @ 11_020;
            cuMemPoolGetAttribute(
                pool: CUmemoryPool, attribute: CUmemPool_attribute, value: *mut c_void
            ) @ 11_020;
            cuMemPoolSetAccess(pool: CUmemoryPool, map: *const CUmemAccessDesc, count: usize) @ 11_020;
            cuMemPoolSetAttribute(
                pool: CUmemoryPool, attribute: CUmemPool_attribute, value: *mut c_void
            ) @ 11_020;
            cuMemPoolTrimTo(pool: CUmemoryPool, min_bytes_to_keep: usize) @ 11_020;
        }
        Map {
            cuMemCreate(
                handle: *mut CUmemGenericAllocationHandle, size: usize, prop: *const CUmemAllocationProp, flags: u64
            ) @ 10_020;
            cuMemRelease(handle: CUmemGenericAllocationHandle) @ 10_020;
            cuMemMap(
                ptr: CUdeviceptr, size: usize, offset: usize, handle: CUmemGenericAllocationHandle, flags: u64
            ) @ 10_020;
            cuMemUnmap(ptr: CUdeviceptr, size: usize) @ 10_020;
            cuMemSetAccess(ptr: CUdeviceptr, size: usize, desc: *const CUmemAccessDesc, count: usize) @ 10_020;
            cuMemRetainAllocationHandle(
                handle: *mut CUmemGenericAllocationHandle, addr: *mut c_void
            ) @ 11_000;
            cuMemAddressFree(ptr: CUdeviceptr, size: usize) @ 10_020;
            cuMemAddressReserve(
                ptr: *mut CUdeviceptr, size: usize, alignment: usize, addr: CUdeviceptr, flags: u64
            ) @ 10_020;
            cuMemGetAllocationPropertiesFromHandle(
                prop: *mut CUmemAllocationProp, handle: CUmemGenericAllocationHandle
            ) @ 10_020;
        }
        Import {
            cuIpcOpenMemHandle(pdptr: *mut CUdeviceptr, handle: CUipcMemHandle, flags: u32) @ 4_010;
            cuIpcOpenMemHandle_v2(pdptr: *mut CUdeviceptr, handle: CUipcMemHandle, flags: u32) @ 11_000;
            cuIpcCloseMemHandle(dptr: CUdeviceptr) @ 4_010;
        }
        Export {
            cuIpcGetMemHandle(handle: *mut CUipcMemHandle, dptr: CUdeviceptr) @ 4_010;
            cuMemExportToShareableHandle(
                shareable: *mut c_void, handle: CUmemGenericAllocationHandle, kind: u32, flags: u64
            ) @ 10_020;
            cuMemGetHandleForAddressRange(
                out: *mut c_void, ptr: CUdeviceptr, size: usize, kind: u32, flags: u64
            ) @ 11_070;
            cuMulticastBindMem(
                multicast: CUmemGenericAllocationHandle, multicast_offset: usize,
                handle: CUmemGenericAllocationHandle, offset: usize, size: usize, flags: u64
            ) @ 12_010;
            cuMulticastBindMem_v2(
                multicast: CUmemGenericAllocationHandle, dev: CUdevice, multicast_offset: usize,
                handle: CUmemGenericAllocationHandle, offset: usize, size: usize, flags: u64
            ) @ 13_010;
        }
        Placed {
            cuArrayCreate_v2(array: *mut CUarray, desc: *const CUDA_ARRAY_DESCRIPTOR) @ 3_020;
            cuArray3DCreate_v2(array: *mut CUarray, desc: *const CUDA_ARRAY3D_DESCRIPTOR) @ 3_020;
            cuMipmappedArrayCreate(
                array: *mut CUarray, desc: *const CUDA_ARRAY3D_DESCRIPTOR, levels: u32
            ) @ 5_000;
            cuArrayDestroy(array: CUarray) @ 2_000;
            cuMipmappedArrayDestroy(array: CUarray) @ 5_000;
            cuMemAllocManaged(dptr: *mut CUdeviceptr, bytesize: usize, flags: u32) @ 6_000;
        }
        QueryMemory {
            cuMemGetInfo(free: *mut u32, total: *mut u32) @ 2_000;
            cuMemGetInfo_v2(free: *mut usize, total: *mut usize) @ 3_020;
            cuMemGetAddressRange_v2(base: *mut CUdeviceptr, size: *mut usize, dptr: CUdeviceptr) @ 3_020;
            cuDeviceTotalMem(bytes: *mut u32, dev: CUdevice) @ 2_000;
            cuDeviceTotalMem_v2(bytes: *mut usize, dev: CUdevice) @ 3_020;
            cuPointerGetAttribute(
                data: *mut c_void, attribute: CUpointer_attribute, ptr: CUdeviceptr
            ) @ 4_000;
            cuPointerGetAttributes(
                num_attributes: u32, attributes: *mut CUpointer_attribute, data: *mut *mut c_void,
                ptr: CUdeviceptr
            ) @ 7_000;
            cuPointerSetAttribute(
                value: *const c_void, attribute: CUpointer_attribute, ptr: CUdeviceptr
            ) @ 6_000;
            cuMemGetAccess(flags: *mut u64, location: *const CUmemLocation, ptr: CUdeviceptr) @ 10_020;
            cuCtxGetFlags(flags: *mut u32) @ 7_000;
            cuCtxSetFlags(flags: u32) @ 12_010;
        }
        Context {
            cuDevicePrimaryCtxRetain(ctx: *mut CUcontext, dev: CUdevice) @ 7_000;
            cuDevicePrimaryCtxRelease(dev: CUdevice) @ 7_000;
            cuDevicePrimaryCtxRelease_v2(dev: CUdevice) @ 11_000;
            cuDevicePrimaryCtxReset(dev: CUdevice) @ 7_000;
            cuDevicePrimaryCtxReset_v2(dev: CUdevice) @ 11_000;
            cuCtxCreate(ctx: *mut CUcontext, flags: u32, dev: CUdevice) @ 2_000;
            cuCtxCreate_v2(ctx: *mut CUcontext, flags: u32, dev: CUdevice) @ 3_020;
            cuCtxCreate_v3(
                ctx: *mut CUcontext, params: *mut c_void, count: i32, flags: u32, dev: CUdevice
            ) @ 11_040;
            cuCtxCreate_v4(ctx: *mut CUcontext, params: *mut c_void, flags: u32, dev: CUdevice) @ 12_050;
            cuCtxDestroy(ctx: CUcontext) @ 2_000;
            cuCtxDestroy_v2(ctx: CUcontext) @ 4_000;
            cuCtxAttach(ctx: *mut CUcontext, flags: u32) @ 2_000;
            cuCtxDetach(ctx: CUcontext) @ 2_000;
            cuCtxSetCurrent(ctx: CUcontext) @ 4_000;
            cuCtxPushCurrent(ctx: CUcontext) @ 2_000;
            cuCtxPushCurrent_v2(ctx: CUcontext) @ 4_000;
            cuCtxEnablePeerAccess(peer: CUcontext, flags: u32) @ 4_000;
            cuCtxDisablePeerAccess(peer: CUcontext) @ 4_000;
            cuGreenCtxCreate(
                ctx: *mut CUgreenCtx, desc: CUdevResourceDesc, dev: CUdevice, flags: u32
            ) @ 12_040;
            cuGreenCtxDestroy(ctx: CUgreenCtx) @ 12_040;
        }
        Stream {
            cuStreamCreate(stream: *mut CUstream, flags: u32) @ 2_000;
            cuStreamCreateWithPriority(stream: *mut CUstream, flags: u32, priority: i32) @ 5_050;
            cuStreamDestroy(stream: CUstream) @ 2_000;
            cuStreamDestroy_v2(stream: CUstream) @ 4_000;
            cuGreenCtxStreamCreate(
                stream: *mut CUstream, green_ctx: CUgreenCtx, flags: u32, priority: i32
            ) @ 12_050;
        }
        Capture {
            cuStreamBeginCapture(stream: CUstream) @ 10_000;
            cuStreamBeginCapture_ptsz(stream: CUstream) @ 10_000;
            cuStreamBeginCapture_v2(stream: CUstream, mode: CUstreamCaptureMode) @ 10_010;
            cuStreamBeginCapture_v2_ptsz(stream: CUstream, mode: CUstreamCaptureMode) @ 10_010;
            cuStreamBeginCaptureToGraph(
                stream: CUstream, graph: CUgraph, dependencies: *const CUgraphNode,
                dependency_data: *const c_void, num_dependencies: usize, mode: CUstreamCaptureMode
            ) @ 12_030;
            cuStreamBeginCaptureToGraph_ptsz(
                stream: CUstream, graph: CUgraph, dependencies: *const CUgraphNode,
                dependency_data: *const c_void, num_dependencies: usize, mode: CUstreamCaptureMode
            ) @ 12_030;
            cuStreamBeginRecaptureToGraph(
                stream: CUstream, mode: CUstreamCaptureMode, graph: CUgraph, callback: *mut c_void,
                user_data: *mut c_void
            ) @ 13_030;
            cuStreamBeginRecaptureToGraph_ptsz(
                stream: CUstream, mode: CUstreamCaptureMode, graph: CUgraph, callback: *mut c_void,
                user_data: *mut c_void
            ) @ 13_030;
            cuStreamBeginCaptureToCig(stream: CUstream, params: *mut c_void) @ 13_010;
            cuStreamBeginCaptureToCig_ptsz(stream: CUstream, params: *mut c_void) @ 13_010;
            cuStreamEndCapture(stream: CUstream, graph: *mut CUgraph) @ 10_000;
            cuStreamEndCapture_ptsz(stream: CUstream, graph: *mut CUgraph) @ 10_000;
            cuStreamEndCaptureToCig(stream: CUstream) @ 13_010;
            cuStreamEndCaptureToCig_ptsz(stream: CUstream) @ 13_010;
            // A stream that waits for an event of a capture takes part in it from then on.
            cuStreamWaitEvent(stream: CUstream, event: CUevent, flags: u32) @ 3_020;
            cuStreamWaitEvent_ptsz(stream: CUstream, event: CUevent, flags: u32) @ 7_000;
        }
    }
    passed {
        cuArray3DCreate @ 2_000;
        cuArray3DGetDescriptor @ 2_000;
        cuArray3DGetDescriptor_v2 @ 3_020;
        cuArrayCreate @ 2_000;
        cuArrayGetDescriptor @ 2_000;
        cuArrayGetDescriptor_v2 @ 3_020;
        cuArrayGetMemoryRequirements @ 11_060;
        cuArrayGetPlane @ 11_020;
        cuArrayGetSparseProperties @ 11_010;
        cuCheckpointOperationComplete @ 13_040;
        cuCheckpointProcessCheckpoint @ 12_080;
        cuCheckpointProcessGetRestoreThreadId @ 12_080;
        cuCheckpointProcessGetState @ 12_080;
        cuCheckpointProcessLock @ 12_080;
        cuCheckpointProcessRestore @ 12_080;
        cuCheckpointProcessUnlock @ 12_080;
        cuCoredumpDeregisterCompleteCallback @ 13_020;
        cuCoredumpDeregisterStartCallback @ 13_020;
        cuCoredumpGetAttribute @ 12_010;
        cuCoredumpGetAttributeGlobal @ 12_010;
        cuCoredumpRegisterCompleteCallback @ 13_020;
        cuCoredumpRegisterStartCallback @ 13_020;
        cuCoredumpSetAttribute @ 12_010;
        cuCoredumpSetAttributeGlobal @ 12_010;
        cuCtxFromGreenCtx @ 12_040;
        cuCtxGetApiVersion @ 3_020;
        cuCtxGetCacheConfig @ 3_020;
        cuCtxGetCurrent @ 4_000;
        cuCtxGetDevResource @ 12_040;
        cuCtxGetDevice @ 2_000;
        cuCtxGetDevice_v2 @ 13_000;
        cuCtxGetExecAffinity @ 11_040;
        cuCtxGetId @ 12_000;
        cuCtxGetLimit @ 3_010;
        cuCtxGetSharedMemConfig @ 4_020;
        cuCtxGetStreamPriorityRange @ 5_050;
        cuCtxPopCurrent @ 2_000;
        cuCtxPopCurrent_v2 @ 4_000;
        cuCtxRecordEvent @ 12_050;
        cuCtxResetPersistingL2Cache @ 11_000;
        cuCtxSetCacheConfig @ 3_020;
        cuCtxSetSharedMemConfig @ 4_020;
        cuCtxSynchronize @ 2_000;
        cuCtxSynchronize_v2 @ 13_000;
        cuCtxWaitEvent @ 12_050;
        cuDestroyExternalMemory @ 10_000;
        cuDestroyExternalSemaphore @ 10_000;
        cuDevResourceGenerateDesc @ 12_040;
        cuDevSmResourceSplit @ 13_010;
        cuDevSmResourceSplitByCount @ 12_040;
        cuDeviceCanAccessPeer @ 4_000;
        cuDeviceComputeCapability @ 2_000;
        cuDeviceGet @ 2_000;
        cuDeviceGetAttribute @ 2_000;
        cuDeviceGetByPCIBusId @ 4_010;
        cuDeviceGetCliqueCount @ 13_040;
        cuDeviceGetCliqueInfo @ 13_040;
        cuDeviceGetCount @ 2_000;
        cuDeviceGetDefaultMemPool @ 11_020;
        cuDeviceGetDevResource @ 12_040;
        cuDeviceGetExecAffinitySupport @ 11_040;
        cuDeviceGetFabricClusterUuid @ 13_040;
        cuDeviceGetGraphMemAttribute @ 11_040;
        cuDeviceGetHostAtomicCapabilities @ 13_000;
        cuDeviceGetLuid @ 10_000;
        cuDeviceGetMemPool @ 11_020;
        cuDeviceGetName @ 2_000;
        cuDeviceGetNvSciSyncAttributes @ 10_020;
        cuDeviceGetP2PAtomicCapabilities @ 13_000;
        cuDeviceGetP2PAttribute @ 8_000;
        cuDeviceGetPCIBusId @ 4_010;
        cuDeviceGetProperties @ 2_000;
        cuDeviceGetTexture1DLinearMaxWidth @ 11_010;
        cuDeviceGetUuid @ 9_020;
        cuDeviceGetUuid_v2 @ 11_040;
        cuDeviceGraphMemTrim @ 11_040;
        cuDevicePrimaryCtxGetState @ 7_000;
        cuDevicePrimaryCtxSetFlags @ 7_000;
        cuDevicePrimaryCtxSetFlags_v2 @ 11_000;
        cuDeviceRegisterAsyncNotification @ 12_040;
        cuDeviceSetGraphMemAttribute @ 11_040;
        cuDeviceSetMemPool @ 11_020;
        cuDeviceUnregisterAsyncNotification @ 12_040;
        cuDriverGetVersion @ 2_020;
        cuEGLStreamConsumerAcquireFrame @ 7_000;
        cuEGLStreamConsumerConnect @ 7_000;
        cuEGLStreamConsumerConnectWithFlags @ 8_000;
        cuEGLStreamConsumerDisconnect @ 7_000;
        cuEGLStreamConsumerReleaseFrame @ 7_000;
        cuEGLStreamProducerConnect @ 7_000;
        cuEGLStreamProducerDisconnect @ 7_000;
        cuEGLStreamProducerPresentFrame @ 7_000;
        cuEGLStreamProducerReturnFrame @ 7_000;
        cuEventCreateFromEGLSync @ 9_000;
        cuEventDestroy @ 2_000;
        cuEventDestroy_v2 @ 4_000;
        cuEventElapsedTime @ 2_000;
        cuEventElapsedTime_v2 @ 12_080;
        cuEventQuery @ 2_000;
        cuEventRecord @ 2_000;
        cuEventRecord_ptsz @ 7_000;
        cuEventRecordWithFlags @ 11_010;
        cuEventRecordWithFlags_ptsz @ 11_010;
        cuEventSynchronize @ 2_000;
        cuExternalMemoryGetMappedBuffer @ 10_000;
        cuExternalMemoryGetMappedMipmappedArray @ 10_000;
        cuFlushGPUDirectRDMAWrites @ 11_030;
        cuFuncGetAttribute @ 2_020;
        cuFuncGetModule @ 11_000;
        cuFuncGetName @ 12_030;
        cuFuncGetParamCount @ 13_020;
        cuFuncGetParamInfo @ 12_040;
        cuFuncIsLoaded @ 12_040;
        cuFuncSetAttribute @ 9_000;
        cuFuncSetBlockShape @ 2_000;
        cuFuncSetCacheConfig @ 3_000;
        cuFuncSetSharedMemConfig @ 4_020;
        cuFuncSetSharedSize @ 2_000;
        cuGLCtxCreate @ 2_000;
        cuGLCtxCreate_v2 @ 3_020;
        cuGLGetDevices @ 4_010;
        cuGLGetDevices_v2 @ 6_050;
        cuGLInit @ 2_000;
        cuGLRegisterBufferObject @ 2_000;
        cuGLSetBufferObjectMapFlags @ 2_030;
        cuGLUnregisterBufferObject @ 2_000;
        cuGetErrorName @ 6_000;
        cuGetErrorString @ 6_000;
        cuGetExportTable @ 3_000;
        cuGraphAddDependencies @ 10_000;
        cuGraphAddDependencies_v2 @ 12_030;
        cuGraphAddEmptyNode @ 10_000;
        cuGraphAddEventRecordNode @ 11_010;
        cuGraphAddEventWaitNode @ 11_010;
        cuGraphAddExternalSemaphoresSignalNode @ 11_020;
        cuGraphAddExternalSemaphoresWaitNode @ 11_020;
        cuGraphAddHostNode @ 10_000;
        cuGraphAddKernelNode @ 10_000;
        cuGraphAddKernelNode_v2 @ 12_000;
        cuGraphAddMemAllocNode @ 11_040;
        cuGraphAddMemFreeNode @ 11_040;
        cuGraphBatchMemOpNodeGetParams @ 11_070;
        cuGraphChildGraphNodeGetGraph @ 10_000;
        cuGraphClone @ 10_000;
        cuGraphConditionalHandleCreate @ 12_030;
        cuGraphCreate @ 10_000;
        cuGraphDebugDotPrint @ 11_030;
        cuGraphDestroy @ 10_000;
        cuGraphDestroyNode @ 10_000;
        cuGraphEventRecordNodeGetEvent @ 11_010;
        cuGraphEventRecordNodeSetEvent @ 11_010;
        cuGraphEventWaitNodeGetEvent @ 11_010;
        cuGraphEventWaitNodeSetEvent @ 11_010;
        cuGraphExecDestroy @ 10_000;
        cuGraphExecEventRecordNodeSetEvent @ 11_010;
        cuGraphExecEventWaitNodeSetEvent @ 11_010;
        cuGraphExecExternalSemaphoresSignalNodeSetParams @ 11_020;
        cuGraphExecExternalSemaphoresWaitNodeSetParams @ 11_020;
        cuGraphExecGetFlags @ 12_000;
        cuGraphExecGetId @ 13_010;
        cuGraphExecHostNodeSetParams @ 10_020;
        cuGraphExecKernelNodeSetParams @ 10_010;
        cuGraphExecKernelNodeSetParams_v2 @ 12_000;
        cuGraphExternalSemaphoresSignalNodeGetParams @ 11_020;
        cuGraphExternalSemaphoresSignalNodeSetParams @ 11_020;
        cuGraphExternalSemaphoresWaitNodeGetParams @ 11_020;
        cuGraphExternalSemaphoresWaitNodeSetParams @ 11_020;
        cuGraphGetEdges @ 10_000;
        cuGraphGetEdges_v2 @ 12_030;
        cuGraphGetId @ 13_010;
        cuGraphGetNodes @ 10_000;
        cuGraphGetRootNodes @ 10_000;
        cuGraphHostNodeGetParams @ 10_000;
        cuGraphHostNodeSetParams @ 10_000;
        cuGraphKernelNodeCopyAttributes @ 11_000;
        cuGraphKernelNodeGetAttribute @ 11_000;
        cuGraphKernelNodeGetParams @ 10_000;
        cuGraphKernelNodeGetParams_v2 @ 12_000;
        cuGraphKernelNodeSetAttribute @ 11_000;
        cuGraphKernelNodeSetParams @ 10_000;
        cuGraphKernelNodeSetParams_v2 @ 12_000;
        cuGraphMemAllocNodeGetParams @ 11_040;
        cuGraphMemFreeNodeGetParams @ 11_040;
        cuGraphMemcpyNodeGetParams @ 10_000;
        cuGraphMemsetNodeGetParams @ 10_000;
        cuGraphNodeFindInClone @ 10_000;
        cuGraphNodeGetContainingGraph @ 13_010;
        cuGraphNodeGetDependencies @ 10_000;
        cuGraphNodeGetDependencies_v2 @ 12_030;
        cuGraphNodeGetDependentNodes @ 10_000;
        cuGraphNodeGetDependentNodes_v2 @ 12_030;
        cuGraphNodeGetEnabled @ 11_060;
        cuGraphNodeGetLocalId @ 13_010;
        cuGraphNodeGetParams @ 13_020;
        cuGraphNodeGetToolsId @ 13_010;
        cuGraphNodeGetType @ 10_000;
        cuGraphNodeSetEnabled @ 11_060;
        cuGraphReleaseUserObject @ 11_030;
        cuGraphRemoveDependencies @ 10_000;
        cuGraphRemoveDependencies_v2 @ 12_030;
        cuGraphRetainUserObject @ 11_030;
        cuGraphicsEGLRegisterImage @ 7_000;
        cuGraphicsGLRegisterBuffer @ 3_000;
        cuGraphicsGLRegisterImage @ 3_000;
        cuGraphicsResourceGetMappedEglFrame @ 7_000;
        cuGraphicsResourceGetMappedMipmappedArray @ 5_000;
        cuGraphicsResourceGetMappedPointer @ 3_000;
        cuGraphicsResourceGetMappedPointer_v2 @ 3_020;
        cuGraphicsResourceSetMapFlags @ 3_000;
        cuGraphicsResourceSetMapFlags_v2 @ 6_050;
        cuGraphicsSubResourceGetMappedArray @ 3_000;
        cuGraphicsUnregisterResource @ 3_000;
        cuGraphicsVDPAURegisterOutputSurface @ 3_010;
        cuGraphicsVDPAURegisterVideoSurface @ 3_010;
        cuGreenCtxGetDevResource @ 12_040;
        cuGreenCtxGetId @ 12_090;
        cuGreenCtxRecordEvent @ 12_040;
        cuGreenCtxWaitEvent @ 12_040;
        cuImportExternalMemory @ 10_000;
        cuImportExternalSemaphore @ 10_000;
        cuIpcGetEventHandle @ 4_010;
        cuIpcOpenEventHandle @ 4_010;
        cuKernelGetAttribute @ 12_000;
        cuKernelGetLibrary @ 12_050;
        cuKernelGetName @ 12_030;
        cuKernelGetParamCount @ 13_020;
        cuKernelGetParamInfo @ 12_040;
        cuKernelSetAttribute @ 12_000;
        cuKernelSetCacheConfig @ 12_000;
        cuLibraryEnumerateKernels @ 12_040;
        cuLibraryGetKernel @ 12_000;
        cuLibraryGetKernelCount @ 12_040;
        cuLibraryGetManaged @ 12_000;
        cuLibraryGetUnifiedFunction @ 12_000;
        cuLibraryUnload @ 12_000;
        cuLinkAddData @ 5_050;
        cuLinkAddData_v2 @ 6_050;
        cuLinkAddFile @ 5_050;
        cuLinkAddFile_v2 @ 6_050;
        cuLinkComplete @ 5_050;
        cuLinkCreate @ 5_050;
        cuLinkCreate_v2 @ 6_050;
        cuLinkDestroy @ 5_050;
        cuLogicalEndpointAddDevice @ 13_030;
        cuLogicalEndpointBindMem @ 13_030;
        cuLogicalEndpointCreate @ 13_030;
        cuLogicalEndpointDestroy @ 13_030;
        cuLogicalEndpointExport @ 13_030;
        cuLogicalEndpointGetLimits @ 13_030;
        cuLogicalEndpointIdRelease @ 13_030;
        cuLogicalEndpointIdReserve @ 13_030;
        cuLogicalEndpointImport @ 13_030;
        cuLogicalEndpointQuery @ 13_030;
        cuLogicalEndpointUnbind @ 13_030;
        cuLogsCurrent @ 12_090;
        cuLogsDumpToFile @ 12_090;
        cuLogsDumpToMemory @ 12_090;
        cuLogsRegisterCallback @ 12_090;
        cuLogsUnregisterCallback @ 12_090;
        cuMemAlloc @ 2_000;
        cuMemAllocPitch @ 2_000;
        cuMemFree @ 2_000;
        cuMemFreeHost @ 2_000;
        cuMemGetAddressRange @ 2_000;
        cuMemGetAllocationGranularity @ 10_020;
        cuMemGetDefaultMemPool @ 13_000;
        cuMemGetMemPool @ 13_000;
        cuMemHostGetDevicePointer @ 2_020;
        cuMemHostGetDevicePointer_v2 @ 3_020;
        cuMemHostGetFlags @ 2_030;
        cuMemHostUnregister @ 4_000;
        cuMemImportFromShareableHandle @ 10_020;
        cuMemPoolExportPointer @ 11_020;
        cuMemPoolExportToShareableHandle @ 11_020;
        cuMemPoolGetAccess @ 11_020;
        cuMemPoolImportFromShareableHandle @ 11_020;
        cuMemPoolImportPointer @ 11_020;
        cuMemSetMemPool @ 13_000;
        cuMipmappedArrayGetLevel @ 5_000;
        cuMipmappedArrayGetMemoryRequirements @ 11_060;
        cuMipmappedArrayGetSparseProperties @ 11_010;
        cuModuleEnumerateFunctions @ 12_040;
        cuModuleGetFunctionCount @ 12_040;
        cuModuleGetLoadingMode @ 11_070;
        cuModuleGetSurfRef @ 3_000;
        cuModuleGetTexRef @ 2_000;
        cuModuleUnload @ 2_000;
        cuMulticastAddDevice @ 12_010;
        cuMulticastCreate @ 12_010;
        cuMulticastGetGranularity @ 12_010;
        cuMulticastUnbind @ 12_010;
        cuOccupancyAvailableDynamicSMemPerBlock @ 10_020;
        cuOccupancyMaxActiveBlocksPerMultiprocessor @ 6_050;
        cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags @ 7_000;
        cuOccupancyMaxActiveClusters @ 11_070;
        cuOccupancyMaxPotentialBlockSize @ 6_050;
        cuOccupancyMaxPotentialBlockSizeWithFlags @ 7_000;
        cuOccupancyMaxPotentialClusterSize @ 11_070;
        cuParamSetSize @ 2_000;
        cuParamSetTexRef @ 2_000;
        cuParamSetf @ 2_000;
        cuParamSeti @ 2_000;
        cuParamSetv @ 2_000;
        cuProfilerInitialize @ 4_000;
        cuProfilerStart @ 4_000;
        cuProfilerStop @ 4_000;
        cuStreamCopyAttributes @ 11_000;
        cuStreamCopyAttributes_ptsz @ 11_000;
        cuStreamGetAttribute @ 11_000;
        cuStreamGetAttribute_ptsz @ 11_000;
        cuStreamGetCaptureInfo @ 10_010;
        cuStreamGetCaptureInfo_ptsz @ 10_010;
        cuStreamGetCaptureInfo_v2 @ 11_030;
        cuStreamGetCaptureInfo_v2_ptsz @ 11_030;
        cuStreamGetCaptureInfo_v3 @ 12_030;
        cuStreamGetCaptureInfo_v3_ptsz @ 12_030;
        cuStreamGetCtx @ 9_020;
        cuStreamGetCtx_ptsz @ 9_020;
        cuStreamGetCtx_v2 @ 12_050;
        cuStreamGetCtx_v2_ptsz @ 12_050;
        cuStreamGetDevResource @ 13_010;
        cuStreamGetDevResource_ptsz @ 13_010;
        cuStreamGetDevice @ 12_080;
        cuStreamGetDevice_ptsz @ 12_080;
        cuStreamGetFlags @ 5_050;
        cuStreamGetFlags_ptsz @ 7_000;
        cuStreamGetGreenCtx @ 12_040;
        cuStreamGetId @ 12_000;
        cuStreamGetId_ptsz @ 12_000;
        cuStreamGetPriority @ 5_050;
        cuStreamGetPriority_ptsz @ 7_000;
        cuStreamIsCapturing @ 10_000;
        cuStreamIsCapturing_ptsz @ 10_000;
        cuStreamQuery @ 2_000;
        cuStreamQuery_ptsz @ 7_000;
        cuStreamSetAttribute @ 11_000;
        cuStreamSetAttribute_ptsz @ 11_000;
        cuStreamSynchronize @ 2_000;
        cuStreamSynchronize_ptsz @ 7_000;
        cuStreamUpdateCaptureDependencies @ 11_030;
        cuStreamUpdateCaptureDependencies_ptsz @ 11_030;
        cuStreamUpdateCaptureDependencies_v2 @ 12_030;
        cuStreamUpdateCaptureDependencies_v2_ptsz @ 12_030;
        cuSurfObjectDestroy @ 5_000;
        cuSurfObjectGetResourceDesc @ 5_000;
        cuSurfRefGetArray @ 3_000;
        cuSurfRefSetArray @ 3_000;
        cuTensorMapEncodeIm2col @ 12_000;
        cuTensorMapEncodeIm2colWide @ 12_080;
        cuTensorMapEncodeTiled @ 12_000;
        cuTensorMapReplaceAddress @ 12_000;
        cuTensorMapSetAllocationClass @ 13_050;
        cuTexObjectDestroy @ 5_000;
        cuTexObjectGetResourceDesc @ 5_000;
        cuTexObjectGetResourceViewDesc @ 5_000;
        cuTexObjectGetTextureDesc @ 5_000;
        cuTexRefCreate @ 2_000;
        cuTexRefDestroy @ 2_000;
        cuTexRefGetAddress @ 2_000;
        cuTexRefGetAddress_v2 @ 3_020;
        cuTexRefGetAddressMode @ 2_000;
        cuTexRefGetArray @ 2_000;
        cuTexRefGetBorderColor @ 8_000;
        cuTexRefGetFilterMode @ 2_000;
        cuTexRefGetFlags @ 2_000;
        cuTexRefGetFormat @ 2_000;
        cuTexRefGetMaxAnisotropy @ 5_000;
        cuTexRefGetMipmapFilterMode @ 5_000;
        cuTexRefGetMipmapLevelBias @ 5_000;
        cuTexRefGetMipmapLevelClamp @ 5_000;
        cuTexRefGetMipmappedArray @ 5_000;
        cuTexRefSetAddressMode @ 2_000;
        cuTexRefSetArray @ 2_000;
        cuTexRefSetBorderColor @ 8_000;
        cuTexRefSetFilterMode @ 2_000;
        cuTexRefSetFlags @ 2_000;
        cuTexRefSetFormat @ 2_000;
        cuTexRefSetMaxAnisotropy @ 5_000;
        cuTexRefSetMipmapFilterMode @ 5_000;
        cuTexRefSetMipmapLevelBias @ 5_000;
        cuTexRefSetMipmapLevelClamp @ 5_000;
        cuTexRefSetMipmappedArray @ 5_000;
        cuThreadExchangeStreamCaptureMode @ 10_010;
        cuUserObjectCreate @ 11_030;
        cuUserObjectRelease @ 11_030;
        cuUserObjectRetain @ 11_030;
        cuVDPAUCtxCreate @ 3_010;
        cuVDPAUCtxCreate_v2 @ 3_020;
        cuVDPAUGetDevice @ 3_010;
        cuptiGetVersion @ 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, HashSet};

    /// What real frameworks asked the driver for: symbol, versions, per-thread forms too, by dlsym too.
    fn recorded() -> Vec<(&'static str, Vec<u32>, bool, bool)> {
        include_str!("../tests/data/cuda-entry-points.tsv")
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
