//! Where samples come from: NVML, which lists the GPUs, their memory, and how much of it each process has.

use nvml_wrapper::Nvml;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvshare::units::GpuUuid;
use std::collections::HashMap;
use std::path::Path;

/// A GPU, as NVML lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Its UUID.
    pub uuid: GpuUuid,
    /// Its memory in bytes.
    pub total: u64,
    /// Bytes a second over its PCIe link, estimated from generation and width. `None` if NVML does not tell those.
    pub link: Option<u64>,
}

/// Where samples come from: NVML, or a test.
pub trait Source {
    /// The GPUs of this node.
    ///
    /// # Errors
    /// A sentence for the operator.
    fn gpus(&self) -> Result<Vec<Gpu>, String>;

    /// What a GPU's memory is used for at this moment.
    ///
    /// # Errors
    /// A sentence for the operator.
    fn read(&self, gpu: GpuUuid) -> Result<Reading, String>;
}

/// What NVML shows of a GPU's memory at one moment, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reading {
    /// What each process has, by NVML's pid.
    pub processes: HashMap<u32, u64>,
    /// The memory as a whole; `None` if the driver is too old to tell (before 510).
    pub memory: Option<DeviceMemory>,
}

/// A GPU's memory as a whole, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// All of it.
    pub total: u64,
    /// What the driver and the firmware keep for themselves. Not part of `used`.
    pub reserved: u64,
    /// What all processes together have allocated.
    pub used: u64,
}

/// The NVML library.
pub struct NvmlSource(Nvml);

impl NvmlSource {
    /// Loads the library, by path or by a name that the loader finds.
    ///
    /// # Errors
    /// NVML's, as a sentence.
    pub fn open(library: &Path) -> Result<Self, String> {
        Nvml::builder().lib_path(library.as_os_str()).init().map(Self).map_err(|error| error.to_string())
    }
}

/// Bytes a second that a PCIe link carries per lane, by generation, before protocol overhead.
const LANE_BANDWIDTH: [u64; 6] =
    [250_000_000, 500_000_000, 985_000_000, 1_969_000_000, 3_938_000_000, 7_563_000_000];

/// The bandwidth of a link, in bytes a second: 85 % of what its lanes carry, which is what copies reach in practice (on PCIe 5:
/// 51.4 GiB/s of 63 GB/s). `None` for an unknown generation.
fn link_bandwidth(generation: u32, width: u32) -> Option<u64> {
    let lane = LANE_BANDWIDTH.get(generation.checked_sub(1)? as usize)?;
    Some(lane * u64::from(width) * 85 / 100)
}

impl Source for NvmlSource {
    fn gpus(&self) -> Result<Vec<Gpu>, String> {
        let text = |error: nvml_wrapper::error::NvmlError| error.to_string();
        (0..self.0.device_count().map_err(text)?)
            .map(|index| {
                let device = self.0.device_by_index(index).map_err(text)?;
                let uuid = device.uuid().map_err(text)?.parse().map_err(|error| format!("{error}"))?;
                let total = device.memory_info().map_err(text)?.total;
                let lanes = device.max_pcie_link_width().ok().zip(device.max_pcie_link_gen().ok());
                Ok(Gpu {
                    uuid,
                    total,
                    link: lanes.and_then(|(width, generation)| link_bandwidth(generation, width)),
                })
            })
            .collect()
    }

    fn read(&self, gpu: GpuUuid) -> Result<Reading, String> {
        let text = |error: nvml_wrapper::error::NvmlError| error.to_string();
        let device = self.0.device_by_uuid(gpu.to_string()).map_err(text)?;
        let processes = device.running_compute_processes().map_err(text)?;
        let processes = processes.into_iter().filter_map(|process| match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some((process.pid, bytes)),
            UsedGpuMemory::Unavailable => None,
        });
        let memory = device.memory_info().ok();
        Ok(Reading {
            processes: processes.collect(),
            memory: memory.map(|memory| DeviceMemory {
                total: memory.total,
                reserved: memory.reserved,
                used: memory.used,
            }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_links_bandwidth_is_generation_times_width() {
        assert_eq!(link_bandwidth(5, 16), Some(53_556_800_000));
        assert_eq!(link_bandwidth(0, 16), None);
        assert_eq!(link_bandwidth(9, 16), None);
    }
}
