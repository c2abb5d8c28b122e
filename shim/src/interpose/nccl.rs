//! The functions of NCCL that make and end communicators. NCCL's ranks wait for each other on the GPU, so their processes
//! run at the same time or not at all ([`crate::process::membership`]). Which they are, NCCL is told itself: all ranks of a
//! communicator give the same unique id.
//!
//! The functions call NCCL's own and change nothing. Collectives are not looked at.
//!
//! Programs find NCCL by linking (PyTorch) or by dlopen and dlsym ([`crate::interpose::dlsym`]; vLLM, CuPy, JAX). In a program
//! that has NCCL linked statically, NCCL's own functions are found in whichever library exports them; one that exports none
//! is not recognised, and NVSHARE_GANG says who belongs together.
//!
//! A communicator that is split from another, shrunk or grown has members of the one it comes from, so it has the same key.
//! Those of one process alone (ncclCommInitAll) need none.

#![allow(non_snake_case, missing_docs)]

use crate::cuda::library::{Soname, loaded_symbol};
use crate::cuda::symbol::Symbol;
use crate::interpose::hook::Hooked;
use crate::process::membership;
use crate::state;
use nvshare::wire::GangKey;
use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::sync::Mutex;

/// NCCL, by its name in the dynamic linker.
static LIBRARY: Soname = Soname::new(c"libnccl.so.2");

/// `ncclResult_t`.
type Return = u32;

const SUCCESS: Return = 0;
const IN_PROGRESS: Return = 7;

/// NCCL's own function was not found, although somebody has called it. `ncclInternalError`.
const NOT_FOUND: Return = 3;

/// `ncclComm_t`.
type Comm = *mut c_void;

/// `ncclConfig_t`, which nothing here reads.
type Config = c_void;

/// `ncclUniqueId`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct UniqueId([u8; 128]);

/// The key of each communicator of this process.
static COMMUNICATORS: Mutex<Option<HashMap<usize, GangKey>>> = Mutex::new(None);

fn key(id: &UniqueId) -> GangKey {
    nvshare::membership::key("nccl", &id.0)
}

/// Makes a communicator with a key: the process has the key while `make` runs, because its ranks wait for each other in it.
///
/// # Safety
/// `made` is null or points to where `make` writes the communicator.
unsafe fn make(key: Option<GangKey>, made: *mut Comm, make: impl FnOnce() -> Return) -> Return {
    let Some(key) = key.filter(|_| state::enabled()) else { return make() };
    quietly(|| membership::add(key));
    let result = make();
    // SAFETY: the caller's promise. In a group, NCCL writes the communicator at once and makes it at the group's end.
    let comm = if made.is_null() { std::ptr::null_mut() } else { unsafe { made.read() } };
    quietly(|| {
        if ![SUCCESS, IN_PROGRESS].contains(&result) {
            return membership::remove(key);
        }
        if !comm.is_null() {
            nvshare::sync::lock(&COMMUNICATORS).get_or_insert_default().insert(comm.addr(), key);
        }
    });
    result
}

/// Makes a communicator of the members of another one.
///
/// # Safety
/// As for [`make`].
unsafe fn derive(parent: Comm, made: *mut Comm, call: impl FnOnce() -> Return) -> Return {
    let key = nvshare::sync::lock(&COMMUNICATORS).as_ref().and_then(|keys| keys.get(&parent.addr()).copied());
    // SAFETY: the caller's promise.
    unsafe { make(key, made, call) }
}

/// Ends a communicator.
fn end(comm: Comm, call: impl FnOnce() -> Return) -> Return {
    let key = nvshare::sync::lock(&COMMUNICATORS).as_mut().and_then(|keys| keys.remove(&comm.addr()));
    let result = call();
    if let Some(key) = key {
        quietly(|| membership::remove(key));
    }
    result
}

/// A panic must not unwind into C. What was to be told the arbiter is lost then.
fn quietly(tell: impl FnOnce()) {
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(tell)).is_err() {
        tracing::error!("nvshare panicked inside a call of NCCL; this is a bug in nvshare");
    }
}

/// The replacement of an exported symbol of NCCL.
pub fn by_export(export: &[u8]) -> Option<Hooked> {
    ENTRIES.iter().find(|(name, _)| name.as_bytes() == export).map(|(_, hooked)| *hooked)
}

macro_rules! functions {
    ($($name:ident($($arg:ident: $type:ty),*);)*) => {
        /// NCCL's own addresses.
        #[allow(non_upper_case_globals)]
        mod slot {
            use super::*;
            $(pub(super) static $name: Symbol = Symbol::of(&LIBRARY, concat!(stringify!($name), "\0"));)*
        }

        /// NCCL's own functions.
        mod real {
            use super::*;
            $(pub(super) unsafe fn $name($($arg: $type),*) -> Return {
                let own = export::$name as *const c_void as usize;
                let name = const {
                    match std::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                        Ok(name) => name,
                        Err(_) => panic!("the name ends with its only NUL"),
                    }
                };
                let found = slot::$name.get_if_loaded().filter(|found| *found != own);
                let Some(real) = found.or_else(|| loaded_symbol(name, own)) else {
                    crate::log::initialise();
                    tracing::error!("{} was called and no library that is loaded has it", stringify!($name));
                    return NOT_FOUND;
                };
                // SAFETY: NCCL's function of this name has this signature, the one in nccl.h.
                let real: unsafe extern "C" fn($($type),*) -> Return = unsafe { std::mem::transmute(real) };
                // SAFETY: the caller's arguments.
                unsafe { real($($arg),*) }
            })*
        }

        /// The functions whose addresses lookups return; private for the reason in [`crate::interpose::entry_points`].
        mod hook {
            use super::*;
            $(pub(super) unsafe extern "C" fn $name($($arg: $type),*) -> Return {
                // SAFETY: the caller's arguments.
                unsafe { body::$name($($arg),*) }
            })*
        }

        /// The exported functions.
        mod export {
            use super::*;
            $(
                #[cfg_attr(not(test), unsafe(no_mangle))]
                pub unsafe extern "C" fn $name($($arg: $type),*) -> Return {
                    // SAFETY: the caller's arguments.
                    unsafe { body::$name($($arg),*) }
                }
            )*
        }

        /// The functions that are replaced.
        static ENTRIES: &[(&str, Hooked)] = &[
            $((stringify!($name), Hooked::new(hook::$name as *const c_void, &slot::$name)),)*
        ];
    };
}

functions! {
    ncclCommInitRank(made: *mut Comm, ranks: c_int, id: UniqueId, rank: c_int);
    ncclCommInitRankConfig(made: *mut Comm, ranks: c_int, id: UniqueId, rank: c_int, config: *mut Config);
    ncclCommInitRankScalable(
        made: *mut Comm, ranks: c_int, rank: c_int, count: c_int, ids: *mut UniqueId, config: *mut Config
    );
    ncclCommSplit(parent: Comm, color: c_int, order: c_int, made: *mut Comm, config: *mut Config);
    ncclCommShrink(
        parent: Comm, without: *mut c_int, count: c_int, made: *mut Comm, config: *mut Config, flags: c_int
    );
    ncclCommGrow(
        parent: Comm, ranks: c_int, id: *const UniqueId, rank: c_int, made: *mut Comm, config: *mut Config
    );
    ncclCommDestroy(comm: Comm);
    ncclCommAbort(comm: Comm);
}

/// The bodies of the functions.
mod body {
    use super::*;

    pub(super) unsafe fn ncclCommInitRank(
        made: *mut Comm,
        ranks: c_int,
        id: UniqueId,
        rank: c_int,
    ) -> Return {
        // SAFETY: the caller's arguments, for both.
        unsafe { make(Some(key(&id)), made, || real::ncclCommInitRank(made, ranks, id, rank)) }
    }

    pub(super) unsafe fn ncclCommInitRankConfig(
        made: *mut Comm,
        ranks: c_int,
        id: UniqueId,
        rank: c_int,
        config: *mut Config,
    ) -> Return {
        // SAFETY: the caller's arguments, for both.
        unsafe { make(Some(key(&id)), made, || real::ncclCommInitRankConfig(made, ranks, id, rank, config)) }
    }

    pub(super) unsafe fn ncclCommInitRankScalable(
        made: *mut Comm,
        ranks: c_int,
        rank: c_int,
        count: c_int,
        ids: *mut UniqueId,
        config: *mut Config,
    ) -> Return {
        // All ranks give the same ids, so the first one names the communicator.
        // SAFETY: NCCL reads as many ids there as `count` says.
        let first = (count > 0 && !ids.is_null()).then(|| key(unsafe { &*ids }));
        // SAFETY: the caller's arguments, for both.
        unsafe { make(first, made, || real::ncclCommInitRankScalable(made, ranks, rank, count, ids, config)) }
    }

    pub(super) unsafe fn ncclCommSplit(
        parent: Comm,
        color: c_int,
        order: c_int,
        made: *mut Comm,
        config: *mut Config,
    ) -> Return {
        // SAFETY: the caller's arguments, for both.
        unsafe { derive(parent, made, || real::ncclCommSplit(parent, color, order, made, config)) }
    }

    pub(super) unsafe fn ncclCommShrink(
        parent: Comm,
        without: *mut c_int,
        count: c_int,
        made: *mut Comm,
        config: *mut Config,
        flags: c_int,
    ) -> Return {
        // SAFETY: the caller's arguments, for both.
        unsafe { derive(parent, made, || real::ncclCommShrink(parent, without, count, made, config, flags)) }
    }

    pub(super) unsafe fn ncclCommGrow(
        parent: Comm,
        ranks: c_int,
        id: *const UniqueId,
        rank: c_int,
        made: *mut Comm,
        config: *mut Config,
    ) -> Return {
        let grow = || {
            // SAFETY: the caller's arguments.
            unsafe { real::ncclCommGrow(parent, ranks, id, rank, made, config) }
        };
        // SAFETY: NCCL reads an id there, if the pointer is not null.
        match unsafe { id.as_ref() } {
            // A new rank knows only this id, and the rank that hands it out knows the old communicator too: it has both keys,
            // this one for as long as it lives.
            Some(id) if !parent.is_null() => {
                quietly(|| membership::add(key(id)));
                // SAFETY: the caller's arguments.
                unsafe { derive(parent, made, grow) }
            }
            // SAFETY: the caller's arguments.
            Some(id) => unsafe { make(Some(key(id)), made, grow) },
            // SAFETY: the caller's arguments.
            None => unsafe { derive(parent, made, grow) },
        }
    }

    pub(super) unsafe fn ncclCommDestroy(comm: Comm) -> Return {
        // SAFETY: the caller's argument.
        end(comm, || unsafe { real::ncclCommDestroy(comm) })
    }

    pub(super) unsafe fn ncclCommAbort(comm: Comm) -> Return {
        // SAFETY: the caller's argument.
        end(comm, || unsafe { real::ncclCommAbort(comm) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_makes_or_ends_a_communicator_is_replaced() {
        assert!(by_export(b"ncclCommInitRank").is_some() && by_export(b"ncclCommAbort").is_some());
        for name in ["ncclAllReduce", "ncclGroupEnd", "ncclCommInitAll", "nccl", "ncclCommInitRan"] {
            assert!(by_export(name.as_bytes()).is_none(), "{name}");
        }
        assert_eq!(size_of::<UniqueId>(), 128, "as in nccl.h");
    }
}
