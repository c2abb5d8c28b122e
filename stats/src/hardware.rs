//! What NVML says of the GPUs: number, model, memory, load.

use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::{Device, Nvml};
use nvshare::units::GpuUuid;
use std::collections::HashMap;
use std::path::Path;

/// What NVML says of a GPU at a moment. What it does not say is `None`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GpuHardware {
    /// Its number on this node.
    pub index: Option<u32>,
    /// Its model.
    pub model: Option<String>,
    /// All its memory, and what of it is in use, in bytes.
    pub memory: Option<(u64, u64)>,
    /// Part of the last moments in which a kernel ran, 0 to 1.
    pub utilization: Option<f64>,
    /// Its temperature, degrees Celsius.
    pub temperature: Option<u32>,
    /// What it draws, W.
    pub power: Option<f64>,
}

/// NVML, if this machine has it.
pub struct Hardware {
    nvml: Nvml,
    /// What does not change.
    known: HashMap<GpuUuid, (Option<u32>, Option<String>)>,
}

impl Hardware {
    /// Loads NVML and starts it, which can take seconds where no other program has a GPU open. `library` is a path, or a name
    /// that the loader finds. `None`: there is none, or it has no driver.
    pub fn open(library: &Path) -> Option<Self> {
        let nvml = Nvml::builder().lib_path(library.as_os_str()).init().ok()?;
        Some(Self { nvml, known: HashMap::new() })
    }

    /// What it says of a GPU now. Takes tens of microseconds.
    pub fn look(&mut self, gpu: GpuUuid) -> GpuHardware {
        let Ok(device) = self.nvml.device_by_uuid(gpu.to_string()) else { return GpuHardware::default() };
        let fixed = |device: &Device| (device.index().ok(), device.name().ok());
        let (index, model) = self.known.entry(gpu).or_insert_with(|| fixed(&device)).clone();
        GpuHardware {
            index,
            model,
            memory: device.memory_info().ok().map(|memory| (memory.total, memory.used)),
            utilization: device.utilization_rates().ok().map(|rates| f64::from(rates.gpu.min(100)) / 100.0),
            temperature: device.temperature(TemperatureSensor::Gpu).ok(),
            power: device.power_usage().ok().map(|milliwatts| f64::from(milliwatts) / 1e3),
        }
    }
}
