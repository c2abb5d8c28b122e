//! What NVML says of the GPUs: which there are, number, model, memory, load.

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
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

/// Why NVML does not answer; the sentence is NVML's.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct HardwareError(#[from] NvmlError);

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
        Self::start(library).ok()
    }

    /// As [`Hardware::open`], for whoever cannot do without.
    ///
    /// # Errors
    /// The library cannot be loaded, or it finds no driver.
    pub fn start(library: &Path) -> Result<Self, HardwareError> {
        let nvml = Nvml::builder().lib_path(library.as_os_str()).init()?;
        Ok(Self { nvml, known: HashMap::new() })
    }

    /// The GPUs of this node, by their numbers. Those that NVML does not open are left out: one that has failed need not hide
    /// the others.
    ///
    /// # Errors
    /// NVML does not even say how many there are.
    pub fn gpus(&self) -> Result<Vec<GpuUuid>, HardwareError> {
        let uuid = |index| self.nvml.device_by_index(index).and_then(|device| device.uuid()).ok();
        Ok((0..self.nvml.device_count()?).filter_map(|index| uuid(index)?.parse().ok()).collect())
    }

    /// Whether NVML still reaches a GPU: it finds it, and reads its memory.
    ///
    /// # Errors
    /// It does not; the sentence is NVML's.
    pub fn reach(&self, gpu: GpuUuid) -> Result<(), HardwareError> {
        self.nvml.device_by_uuid(gpu.to_string())?.memory_info()?;
        Ok(())
    }

    /// The NUMA node of the processors that are next to a GPU, as the kernel has it for the GPU's place on the PCI bus. `None` where there
    /// are no such nodes, or nobody says.
    pub fn numa_node(&self, gpu: GpuUuid) -> Option<i64> {
        // Not NVML's nvmlDeviceGetNumaNodeId: that is the node of the GPU's own memory, on machines where it has one.
        let place = self.nvml.device_by_uuid(gpu.to_string()).ok()?.pci_info().ok()?;
        let (domain, bus, device) = (place.domain, place.bus, place.device);
        let file = format!("/sys/bus/pci/devices/{domain:04x}:{bus:02x}:{device:02x}.0/numa_node");
        std::fs::read_to_string(file).ok()?.trim().parse().ok().filter(|node| *node >= 0)
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

/// Calls `tell` with a GPU and the number of the error whenever the driver reports a critical one (an Xid) of these GPUs, from a thread of its
/// own, until `tell` says no or NVML ends. The Xids of programs that did something wrong are among them.
///
/// # Errors
/// NVML cannot be used, or reports no errors of any of these GPUs.
pub fn watch_errors(
    library: &Path,
    gpus: &[GpuUuid],
    mut tell: impl FnMut(GpuUuid, u64) -> bool + Send + 'static,
) -> Result<(), HardwareError> {
    /// In ms. A set of events cannot be woken up.
    const LOOK_AGAIN: u32 = 1_000;
    let nvml = Nvml::builder().lib_path(library.as_os_str()).init()?;
    let reports = |gpu: &&GpuUuid| {
        let types = nvml.device_by_uuid(gpu.to_string()).and_then(|device| device.supported_event_types());
        types.is_ok_and(|types| types.contains(EventTypes::CRITICAL_XID_ERROR))
    };
    let watched: Vec<_> = gpus.iter().filter(reports).copied().collect();
    if watched.is_empty() {
        return Err(NvmlError::NotSupported.into());
    }
    let (begun, begins) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let register = |set, gpu: &GpuUuid| {
            let device = nvml.device_by_uuid(gpu.to_string())?;
            device.register_events(EventTypes::CRITICAL_XID_ERROR, set).map_err(|error| error.error)
        };
        let set = match nvml.create_event_set().and_then(|set| watched.iter().try_fold(set, register)) {
            Ok(set) => set,
            Err(error) => {
                let _ = begun.send(Err(error));
                return;
            }
        };
        let _ = begun.send(Ok(()));
        loop {
            let event = match set.wait(LOOK_AGAIN) {
                Err(NvmlError::Timeout) => continue,
                Err(_) => return,
                Ok(event) => event,
            };
            let gpu = event.device.uuid().ok().and_then(|uuid| uuid.parse().ok());
            let error = match event.event_data {
                Some(XidError::Value(number)) => number,
                _ => 0,
            };
            if gpu.is_some_and(|gpu| !tell(gpu, error)) {
                return;
            }
        }
    });
    Ok(begins.recv().unwrap_or(Err(NvmlError::Unknown))?)
}
