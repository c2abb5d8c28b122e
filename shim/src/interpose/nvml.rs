//! NVML inside the process: what it says about memory agrees with what the driver says ([`crate::process::memory_info`]).
//!
//! NVML tells about the whole card, and a framework that sizes itself by that comes out too large for its pool. So
//! two of its functions have something stand in for them. Each asks NVML first, so that a wrong handle, a null pointer
//! or a wrong version gets NVML's own error, and then puts the client's figures in place of the card's. Which GPU a
//! handle means, NVML says by the UUID. A GPU that has no pool keeps the card's figures.
//!
//! Programs find NVML by dlopen and dlsym ([`crate::interpose::dlsym`]), seldom by linking; the functions are exported too.
//!
//! # What is left as it is
//!
//! [`ENTRIES`] has a row for every function that tells something of memory. Those that tell about processes stay as
//! they are: a process that looks for others wants to see them as they are. So do the window to the bus (BAR1), and
//! the size of a MIG instance, whose pool is counted by the instance's own handle.

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

/// NVML's library, by what the dynamic linker knows it by.
static LIBRARY: Soname = Soname::new(c"libnvidia-ml.so.1");

/// `nvmlReturn_t`.
type Return = u32;

const SUCCESS: Return = 0;

/// NVML, or this function of it, isn't there.
const FUNCTION_NOT_FOUND: Return = 13;

/// `nvmlDevice_t`.
type Device = *mut c_void;

/// `nvmlMemory_t`. What is reserved counts as used.
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

/// The version word of [`MemoryV2`]: its size, and a 2 above it.
const MEMORY_V2: u32 = size_of::<MemoryV2>() as u32 | 2 << 24;

/// How long the first question may wait for an arbiter that is starting: NVML may be asked by a program that never
/// uses a GPU.
const TIMEOUT: Duration = Duration::from_secs(1);

/// A function of NVML, and what stands in for it, if anything.
pub struct Entry {
    export: &'static str,
    hooked: Option<Hooked>,
}

/// What stands in for an exported symbol of NVML.
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

        /// The functions that are handed out; private for the reason that [`crate::interpose::entry_points`] gives.
        mod hook {
            use super::*;
            $(pub(super) unsafe extern "C" fn $name($($arg: $type),*) -> Return {
                // SAFETY: the caller's arguments.
                unsafe { body::$name($($arg),*) }
            })*
        }

        /// The functions that are exported.
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

        /// Every function of NVML that tells something of memory.
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

/// What the functions do.
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
            // SAFETY: NVML has read the version there, and has taken it.
            let version = unsafe { (&raw const (*memory).version).read_unaligned() };
            if version != MEMORY_V2 {
                crate::log::initialise();
                tracing::info!(
                    version,
                    "NVML knows a layout of memory figures that nvshare does not: they are the card's"
                );
                return;
            }
            let MemoryInfo { total, free, own, others } = figures;
            // SAFETY: of this version NVML has just written all.
            unsafe { memory.write_unaligned(MemoryV2 { version, total, reserved: others, free, used: own }) };
        })
    }
}

/// NVML has answered for the card: `write`s the client's figures over it.
fn correct(result: Return, device: Device, write: impl FnOnce(MemoryInfo)) -> Return {
    if result == SUCCESS && state::enabled() {
        // A panic must not unwind into C, and NVML's own answer is there.
        let written = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            if let Some(figures) = gpu(device).and_then(|gpu| memory_info::of_gpu(gpu, patience())) {
                write(figures);
            }
        }));
        if written.is_err() {
            tracing::error!("nvshare panicked inside an NVML call, which answers for the whole card");
        }
    }
    result
}

/// Long for the first question, and then none: whoever looks every second must not wait every second.
fn patience() -> Duration {
    static WAITED: AtomicBool = AtomicBool::new(false);
    if WAITED.swap(true, Ordering::Relaxed) { Duration::ZERO } else { TIMEOUT }
}

/// Which GPU a handle means.
fn gpu(device: Device) -> Option<GpuUuid> {
    static UUID: Symbol = Symbol::of(&LIBRARY, "nvmlDeviceGetUUID\0");
    let address = UUID.get()?;
    let uuid: unsafe extern "C" fn(Device, *mut c_char, u32) -> Return =
        // SAFETY: NVML's function of this name has this signature, the one in nvml.h.
        unsafe { std::mem::transmute(address) };
    let mut text = [0u8; 96];
    // SAFETY: a handle that NVML has just taken, and as many bytes of room as are announced.
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
    fn only_figures_of_the_card_have_a_stand_in() {
        let hooked: Vec<_> = ENTRIES.iter().filter(|e| e.hooked.is_some()).map(|e| e.export).collect();
        assert_eq!(hooked, ["nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo_v2"]);
        assert!(by_export(b"nvmlDeviceGetMemoryInfo_v2").is_some());
        assert!(by_export(b"nvmlDeviceGetMemoryInfo_v3").is_none());
        assert!(by_export(b"nvmlDeviceGetBAR1MemoryInfo").is_none());
    }
}
