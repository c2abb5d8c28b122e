//! Allocations that the driver makes itself, for tools that watch them.
//!
//! compute-sanitizer knows where an allocation ends because it observes the driver's allocation. nvshare maps whole
//! granules, so the tool would not find an overrun within the last granule; and cuda-gdb cannot read evicted memory. With
//! such a tool attached, cuMemAlloc, cuMemAllocPitch and cuMemAllocAsync go to the driver ([`crate::process::reservation`]
//! accounts for them). That memory cannot move, so other clients wait if they do not fit beside it. NVSHARE_UNMOVABLE
//! decides regardless of tools.

use crate::cuda::library::library;
use crate::settings::settings;
use std::ffi::{CStr, OsString, c_int, c_void};
use std::sync::OnceLock;

static WANTED: OnceLock<bool> = OnceLock::new();

/// Whether the driver makes allocations itself.
pub fn wanted() -> bool {
    WANTED.get().copied().unwrap_or(false)
}

/// Decides it, after cuInit: by then a tool of CUDA_INJECTION64_PATH is loaded. Logs the decision if it is not the default.
pub fn decide() {
    let chosen = settings().ok().and_then(|settings| settings.unmovable);
    WANTED.get_or_init(|| {
        let why = match chosen {
            Some(true) => "NVSHARE_UNMOVABLE=1".to_owned(),
            Some(false) => return false,
            None => match tool() {
                Some(tool) => tool,
                None => return false,
            },
        };
        tracing::warn!(
            "{why}: this process's allocations are the driver's own, so that the tool finds overruns; they cannot move, so other processes wait if they do not fit beside them. NVSHARE_UNMOVABLE=0 makes them movable"
        );
        true
    });
}

/// The tool that watches this process's allocations, and how it was detected, as text.
fn tool() -> Option<String> {
    by_environment(std::env::vars_os())
        .or_else(|| loaded(is_of_sanitizer).then(|| "compute-sanitizer's library is loaded".into()))
        .or_else(|| is_debugged().then(|| "cuda-gdb is attached".into()))
}

fn by_environment(variables: impl Iterator<Item = (OsString, OsString)>) -> Option<String> {
    let attached = |(name, value): (OsString, OsString)| {
        let name = name.to_string_lossy().into_owned();
        let path = name == "CUDA_INJECTION64_PATH" && is_of_sanitizer(&value.to_string_lossy());
        (path || name.starts_with("NV_SANITIZER_INJECTION_"))
            .then(|| format!("compute-sanitizer is attached ({name} is set)"))
    };
    // The least one, so that the message does not depend on the order of the environment.
    variables.filter_map(attached).min()
}

/// Whether a path is that of compute-sanitizer's library, or of a tool that uses its interface.
fn is_of_sanitizer(path: &str) -> bool {
    path.rsplit('/').next().is_some_and(|file| file.starts_with("libsanitizer-"))
}

/// Whether a library is loaded whose path satisfies `fits`.
fn loaded(fits: fn(&str) -> bool) -> bool {
    unsafe extern "C" fn look(info: *mut libc::dl_phdr_info, _size: usize, fits: *mut c_void) -> c_int {
        // SAFETY: the C library passes a description of a loaded object, whose name is a C string or null, and the pointer
        // that it was given.
        let (name, fits) = unsafe { ((*info).dlpi_name, *fits.cast::<fn(&str) -> bool>()) };
        // SAFETY: as above.
        let name = (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) }.to_string_lossy());
        name.is_some_and(|name| fits(&name)).into()
    }
    let mut fits = fits;
    // SAFETY: the callback reads what it is given, and `fits` lives as long as the call.
    unsafe { libc::dl_iterate_phdr(Some(look), (&raw mut fits).cast()) != 0 }
}

/// Whether cuda-gdb has set the driver's variable that says so.
fn is_debugged() -> bool {
    library().and_then(|library| library.symbol(c"cudbgIpcFlag")).is_some_and(|flag| {
        // SAFETY: the driver's variable of that name, a word (cudadebugger.h).
        unsafe { (flag as *const u32).read_volatile() != 0 }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attached(variables: &[(&str, &str)]) -> Option<String> {
        by_environment(variables.iter().map(|(name, value)| (name.into(), value.into())))
    }

    #[test]
    fn compute_sanitizer_is_known_by_its_environment() {
        assert_eq!(
            attached(&[("HOME", "/root"), ("CUDA_INJECTION64_PATH", "/x/libsanitizer-collection.so")]),
            Some("compute-sanitizer is attached (CUDA_INJECTION64_PATH is set)".into())
        );
        assert_eq!(
            attached(&[
                ("NV_SANITIZER_INJECTION_PORT_RANGE_END", "9"),
                ("NV_SANITIZER_INJECTION_PORT_BASE", "1")
            ]),
            Some("compute-sanitizer is attached (NV_SANITIZER_INJECTION_PORT_BASE is set)".into())
        );
    }

    #[test]
    fn other_tools_do_not_watch_allocations() {
        assert_eq!(attached(&[("CUDA_INJECTION64_PATH", "/opt/nsight/libToolsInjection64.so")]), None);
        assert_eq!(attached(&[("CUDA_INJECTION64_PATH", "/libsanitizer-x/libcupti.so")]), None);
        assert_eq!(attached(&[]), None);
    }

    #[test]
    fn what_is_loaded_is_found() {
        assert!(loaded(|path| path.contains("libc.so")));
        assert!(!loaded(is_of_sanitizer));
    }
}
