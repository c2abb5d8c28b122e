//! Faults that a test lets GPUs have: lines of the file that `NVSHARE_SIM_NVML_FAULTS` names, which is read at every call.
//!
//! | line | what happens |
//! |---|---|
//! | `1 lost` | GPU 1 has fallen off the bus: every call for it fails as NVML's do (NVML_ERROR_GPU_IS_LOST) |
//! | `1 hang` | calls for GPU 1 do not return until the line is gone, as those of a driver that waits for a GPU |
//! | `0 xid 79` | GPU 0 has had this critical error, which every set of events that GPU 0 is registered in gets once |

use std::ffi::c_uint;
use std::time::Duration;

/// How often a call that waits reads the file again.
pub const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What a line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// NVML no longer reaches the GPU.
    Lost(usize),
    /// Calls for the GPU do not return.
    Hang(usize),
    /// The GPU has had a critical error of this number.
    Xid(usize, u64),
}

/// `nvmlEventData_t`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct EventData {
    pub device: usize,
    pub event_type: u64,
    pub event_data: u64,
    pub gpu_instance: c_uint,
    pub compute_instance: c_uint,
}

/// `nvmlEventTypeXidCriticalError`.
pub const CRITICAL_XID: u64 = 8;

/// The faults, in the order of the file's lines. Lines that say something else are left out.
pub fn all() -> Vec<Fault> {
    let Some(file) = std::env::var_os("NVSHARE_SIM_NVML_FAULTS") else { return Vec::new() };
    std::fs::read_to_string(file).unwrap_or_default().lines().filter_map(read).collect()
}

fn read(line: &str) -> Option<Fault> {
    let words: Vec<_> = line.split_whitespace().collect();
    match words[..] {
        [gpu, "lost"] => Some(Fault::Lost(gpu.parse().ok()?)),
        [gpu, "hang"] => Some(Fault::Hang(gpu.parse().ok()?)),
        [gpu, "xid", number] => Some(Fault::Xid(gpu.parse().ok()?, number.parse().ok()?)),
        _ => None,
    }
}

/// Whether NVML still reaches a GPU. Does not return while the GPU hangs.
pub fn reached(gpu: usize) -> bool {
    while all().contains(&Fault::Hang(gpu)) {
        std::thread::sleep(LOOK_AGAIN);
    }
    !all().contains(&Fault::Lost(gpu))
}

/// A set of events: the GPUs that are registered in it, and how many lines of the file it has been told.
#[derive(Default)]
pub struct EventSet {
    pub gpus: Vec<usize>,
    pub told: usize,
}

impl EventSet {
    /// The next critical error of a GPU of this set.
    pub fn next(&mut self) -> Option<(usize, u64)> {
        let faults = all();
        while let Some(fault) = faults.get(self.told) {
            self.told += 1;
            match *fault {
                Fault::Xid(gpu, number) if self.gpus.contains(&gpu) => return Some((gpu, number)),
                _ => {}
            }
        }
        None
    }
}
