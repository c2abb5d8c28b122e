//! The entry points, by topic.
//!
//! They are written in the [`driver_api`] macro, which makes of each a C function that applies injected faults and turns
//! the outcome into a `CUresult`, and lists it in the topic's `EXPORTS`. `cuGetProcAddress` searches those lists and
//! not the dynamic symbols, so it gives the same addresses as `dlsym` even if somebody interposes `dlsym`.
//!
//! A function that `cuda.h` has in a per-thread-default-stream form (`_ptds`, `_ptsz`) names that form too; its body
//! gets to know as `null` which stream the null handle means.
//!
//! Two functions are not CUDA's: `nvsharesim_counters` and `nvsharesim_usage`.

#![allow(non_snake_case)]

mod array;
mod context;
mod copy;
mod device;
mod gated;
mod graph;
mod graph_edit;
mod green;
mod init;
mod inspect;
mod ipc;
mod launch;
mod memory;
mod peer;
mod pool;
mod proc_address;
mod stream;
mod values;
mod vmm;

use std::ffi::c_void;

use crate::abi::Result;
pub(crate) use gated::is_gated;

/// An exported function.
pub(crate) struct Export {
    pub name: &'static str,
    pub address: *const c_void,
}

/// All exported functions.
pub(crate) fn exports() -> impl Iterator<Item = Export> {
    let topics = [
        array::EXPORTS,
        context::EXPORTS,
        copy::EXPORTS,
        device::EXPORTS,
        gated::EXPORTS,
        graph::EXPORTS,
        graph_edit::EXPORTS,
        green::EXPORTS,
        init::EXPORTS,
        ipc::EXPORTS,
        launch::EXPORTS,
        memory::EXPORTS,
        peer::EXPORTS,
        pool::EXPORTS,
        proc_address::EXPORTS,
        stream::EXPORTS,
        values::EXPORTS,
        vmm::EXPORTS,
    ];
    topics.into_iter().flatten().map(|export| Export { name: export.name, address: export.address })
}

/// A function's name without the suffixes that say which version and flavour it is.
pub(crate) fn base_name(export: &str) -> &str {
    let name = export.strip_suffix("_ptsz").or_else(|| export.strip_suffix("_ptds")).unwrap_or(export);
    ["_v2", "_v3", "_v4"].iter().find_map(|version| name.strip_suffix(version)).unwrap_or(name)
}

/// What every call goes through: faults on demand, and the watch for calls that come too early.
#[inline]
fn enter(name: &str, body: impl FnOnce() -> Result) -> i32 {
    if let Some(error) = crate::driver::injected_fault(name) {
        return error;
    }
    crate::module::await_loads(name);
    match crate::watch::check(name).and_then(|()| body()) {
        Ok(()) => 0,
        Err(error) => error.0,
    }
}

/// Defines entry points: `fn name / per_thread_form |null| (arguments) { body }`, where the second name and `|null|`
/// belong together and are optional.
macro_rules! driver_api {
    ($(
        $(#[$doc:meta])*
        fn $name:ident $(/ $variant:ident |$null:ident|)? ($($arg:ident : $type:ty),* $(,)?) $body:block
    )*) => {
        pub(super) const EXPORTS: &[$crate::api::Export] = &[$(
            $crate::api::Export { name: stringify!($name), address: $name as *const std::ffi::c_void },
            $($crate::api::Export { name: stringify!($variant), address: $variant as *const std::ffi::c_void },)?
        )*];

        /// The bodies.
        mod body {
            use super::*;
            $(driver_api!(@body $name ($($null)?) ($($arg: $type),*) $body);)*
        }

        $(driver_api!(@export $(#[$doc])* $name $(/ $variant)? ($($arg: $type),*));)*
    };

    (@body $name:ident () ($($arg:ident : $type:ty),*) $body:block) => {
        #[inline]
        #[allow(clippy::too_many_arguments)]
        pub(super) fn $name($($arg: $type),*) -> $crate::abi::Result $body
    };
    (@body $name:ident ($null:ident) ($($arg:ident : $type:ty),*) $body:block) => {
        #[inline]
        #[allow(clippy::too_many_arguments)]
        pub(super) fn $name($null: $crate::context::Null, $($arg: $type),*) -> $crate::abi::Result $body
    };

    (@export $(#[$doc:meta])* $name:ident ($($arg:ident : $type:ty),*)) => {
        $(#[$doc])*
        #[unsafe(no_mangle)]
        #[allow(clippy::too_many_arguments)]
        extern "C" fn $name($($arg: $type),*) -> i32 {
            $crate::api::enter(stringify!($name), || body::$name($($arg),*))
        }
    };
    (@export $(#[$doc:meta])* $name:ident / $variant:ident ($($arg:ident : $type:ty),*)) => {
        $(#[$doc])*
        #[unsafe(no_mangle)]
        #[allow(clippy::too_many_arguments)]
        extern "C" fn $name($($arg: $type),*) -> i32 {
            $crate::api::enter(stringify!($name), || body::$name($crate::context::Null::Legacy, $($arg),*))
        }

        $(#[$doc])*
        #[unsafe(no_mangle)]
        #[allow(clippy::too_many_arguments)]
        extern "C" fn $variant($($arg: $type),*) -> i32 {
            $crate::api::enter(stringify!($variant), || body::$name($crate::context::Null::PerThread, $($arg),*))
        }
    };
}
use driver_api;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_addresses_real() {
        let mut names = std::collections::HashSet::new();
        for export in exports() {
            assert!(names.insert(export.name), "{} twice", export.name);
            assert!(!export.address.is_null());
        }
        assert!(names.len() > 200, "{}", names.len());
    }

    #[test]
    fn suffixes_are_taken_off() {
        assert_eq!(base_name("cuMemcpyHtoD_v2_ptds"), "cuMemcpyHtoD");
        assert_eq!(base_name("cuStreamQuery_ptsz"), "cuStreamQuery");
        assert_eq!(base_name("cuInit"), "cuInit");
    }
}
