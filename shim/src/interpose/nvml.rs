//! NVML inside the process reports the same amounts of memory as the driver ([`crate::process::memory_info`]).
//!
//! NVML reports the memory of the whole GPU, and a framework that sizes itself by that would exceed its pool. So
//! two of NVML's functions are replaced. Each calls NVML's own first, so that a wrong handle, a null pointer
//! or a wrong version gets NVML's error, and then replaces the numbers of the whole GPU by the client's. The GPU of a
//! handle is found by the UUID that NVML reports. For a GPU without a pool NVML's numbers stay.
//!
//! Programs find NVML by dlopen and dlsym ([`crate::interpose::dlsym`]), seldom by linking; the functions are exported too.
//!
//! # Functions that are not replaced
//!
//! [`ENTRIES`] has a row for every function that reports memory. Those that report processes are not replaced:
//! a program that looks for other processes needs their true memory. Nor are those for the PCI window (BAR1), and for
//! the size of a MIG instance, whose pool is found by the instance's own handle.

#![allow(non_snake_case, missing_docs)]

use crate::cuda::library::Soname;
use crate::cuda::symbol::Symbol;
use crate::interpose::hook::Hooked;
use crate::process::memory_info;
use crate::state;
use nvshare::memory_info::MemoryInfo;
use nvshare::units::GpuUuid;
use std::ffi::{CStr, c_char, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// NVML's library, by its name in the dynamic linker.
static LIBRARY: Soname = Soname::new(c"libnvidia-ml.so.1");

/// `nvmlReturn_t`.
type Return = u32;

const SUCCESS: Return = 0;

/// NVML is not loaded, or does not have this function.
const FUNCTION_NOT_FOUND: Return = 13;

/// `nvmlDevice_t`.
type Device = *mut c_void;

/// `nvmlMemory_t`. Reserved memory counts as used.
#[repr(C)]
pub struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

/// `nvmlMemory_v2_t`.
#[repr(C)]
pub struct MemoryV2 {
    version: u32,
    total: u64,
    reserved: u64,
    free: u64,
    used: u64,
}

/// The version word of [`MemoryV2`]: its size, and 2 in the highest byte.
const MEMORY_V2: u32 = size_of::<MemoryV2>() as u32 | 2 << 24;

/// How long the first query may wait for an arbiter that is starting. Short, because a program may query NVML and never
/// use a GPU.
const TIMEOUT: Duration = Duration::from_secs(1);

/// A function of NVML, and its replacement if there is one.
pub struct Entry {
    export: &'static str,
    hooked: Option<Hooked>,
}

/// The replacement of an exported symbol of NVML.
pub fn by_export(export: &[u8]) -> Option<Hooked> {
    ENTRIES.iter().find(|entry| entry.export.as_bytes() == export)?.hooked
}

macro_rules! functions {
    (
        hooked { $($name:ident($($arg:ident: $type:ty),*);)* }
        left { $($left:ident)* }
    ) => {
        /// NVML's own addresses.
        #[allow(non_upper_case_globals)]
        mod slot {
            use super::*;
            $(pub(super) static $name: Symbol = Symbol::of(&LIBRARY, concat!(stringify!($name), "\0"));)*
        }

        /// NVML's own functions.
        mod real {
            use super::*;
            $(pub(super) unsafe fn $name($($arg: $type),*) -> Return {
                let Some(real) = slot::$name.get() else { return FUNCTION_NOT_FOUND };
                // SAFETY: NVML's function of this name has this signature, the one in nvml.h.
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
        #[allow(dead_code)]
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

        /// Every function of NVML that reports memory.
        static ENTRIES: &[Entry] = &[
            $(Entry {
                export: stringify!($name),
                hooked: Some(Hooked::new(hook::$name as *const c_void, &slot::$name)),
            },)*
            $(Entry { export: stringify!($left), hooked: None },)*
        ];
    };
}

functions! {
    hooked {
        nvmlDeviceGetMemoryInfo(device: Device, memory: *mut Memory);
        nvmlDeviceGetMemoryInfo_v2(device: Device, memory: *mut MemoryV2);
    }
    left {
        nvmlDeviceGetAttributes
        nvmlDeviceGetAttributes_v2
        nvmlDeviceGetBAR1MemoryInfo
        nvmlDeviceGetComputeRunningProcesses
        nvmlDeviceGetComputeRunningProcesses_v2
        nvmlDeviceGetComputeRunningProcesses_v3
        nvmlDeviceGetConfComputeMemSizeInfo
        nvmlDeviceGetGraphicsRunningProcesses
        nvmlDeviceGetGraphicsRunningProcesses_v2
        nvmlDeviceGetGraphicsRunningProcesses_v3
        nvmlDeviceGetMPSComputeRunningProcesses
        nvmlDeviceGetMPSComputeRunningProcesses_v2
        nvmlDeviceGetMPSComputeRunningProcesses_v3
        nvmlDeviceGetRunningProcessDetailList
    }
}

/// The bodies of the functions.
mod body {
    use super::*;

    pub(super) unsafe fn nvmlDeviceGetMemoryInfo(device: Device, memory: *mut Memory) -> Return {
        // SAFETY: the caller's arguments.
        let result = unsafe { real::nvmlDeviceGetMemoryInfo(device, memory) };
        correct(result, device, |figures| {
            let MemoryInfo { total, free, .. } = figures;
            // SAFETY: NVML has just written there.
            unsafe { memory.write_unaligned(Memory { total, free, used: total - free }) };
        })
    }

    pub(super) unsafe fn nvmlDeviceGetMemoryInfo_v2(device: Device, memory: *mut MemoryV2) -> Return {
        // SAFETY: the caller's arguments.
        let result = unsafe { real::nvmlDeviceGetMemoryInfo_v2(device, memory) };
        correct(result, device, |figures| {
            // SAFETY: NVML has just read the version there.
            let version = unsafe { (&raw const (*memory).version).read_unaligned() };
            if version != MEMORY_V2 {
                crate::log::initialise();
                tracing::info!(
                    version,
                    "nvmlDeviceGetMemoryInfo_v2 was called with a version that nvshare does not know, so it reports the memory of the whole GPU"
                );
                return;
            }
            let MemoryInfo { total, free, own, others } = figures;
            // SAFETY: NVML has just written all fields of this version.
            unsafe { memory.write_unaligned(MemoryV2 { version, total, reserved: others, free, used: own }) };
        })
    }
}

/// Replaces NVML's answer for the whole GPU: `write` writes the client's numbers.
fn correct(result: Return, device: Device, write: impl FnOnce(MemoryInfo)) -> Return {
    if result == SUCCESS && state::enabled() {
        // A panic must not unwind into C; NVML's own answer stays then.
        let written = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            if let Some(figures) = gpu(device).and_then(|gpu| memory_info::of_gpu(gpu, patience())) {
                write(figures);
            }
        }));
        if written.is_err() {
            tracing::error!(
                "nvshare panicked inside an NVML call, which reports the memory of the whole GPU instead; this is a bug in nvshare"
            );
        }
    }
    result
}

/// How long a query waits for an arbiter: [`TIMEOUT`] for the first one, then not at all, because a monitor queries every
/// second.
fn patience() -> Duration {
    static WAITED: AtomicBool = AtomicBool::new(false);
    if WAITED.swap(true, Ordering::Relaxed) { Duration::ZERO } else { TIMEOUT }
}

/// The GPU of a handle.
fn gpu(device: Device) -> Option<GpuUuid> {
    static UUID: Symbol = Symbol::of(&LIBRARY, "nvmlDeviceGetUUID\0");
    let address = UUID.get()?;
    let uuid: unsafe extern "C" fn(Device, *mut c_char, u32) -> Return =
        // SAFETY: NVML's function of this name has this signature, the one in nvml.h.
        unsafe { std::mem::transmute(address) };
    let mut text = [0u8; 96];
    // SAFETY: a handle that NVML has just accepted, and a buffer of the length that is passed.
    if unsafe { uuid(device, text.as_mut_ptr().cast(), text.len() as u32) } != SUCCESS {
        return None;
    }
    CStr::from_bytes_until_nul(&text).ok()?.to_str().ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_are_laid_out_as_in_nvml_h() {
        assert_eq!((size_of::<Memory>(), size_of::<MemoryV2>()), (24, 40));
        assert_eq!(std::mem::offset_of!(MemoryV2, total), 8);
        assert_eq!(MEMORY_V2, 0x0200_0028, "as nvidia-ml-py has it");
    }

    #[test]
    fn only_functions_that_report_the_memory_of_the_gpu_are_replaced() {
        let hooked: Vec<_> = ENTRIES.iter().filter(|e| e.hooked.is_some()).map(|e| e.export).collect();
        assert_eq!(hooked, ["nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo_v2"]);
        assert!(by_export(b"nvmlDeviceGetMemoryInfo_v2").is_some());
        assert!(by_export(b"nvmlDeviceGetMemoryInfo_v3").is_none());
        assert!(by_export(b"nvmlDeviceGetBAR1MemoryInfo").is_none());
    }
}
