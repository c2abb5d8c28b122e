//! The simulated GPU's NVML, to be loaded as `libnvidia-ml.so.1` on machines without a GPU.
//!
//! It reads the segment that the simulated GPU's processes share (see [`simstate`]) and shows memory, processes and
//! load as they are there. It belongs to no GPU's processes itself: looking costs nothing. What isn't simulated (power,
//! temperature, clocks) has plausible constants where monitors insist on a number, and is otherwise absent.
//!
//! The functions are those that `nvml-wrapper`, `pynvml` and frameworks use; others are not exported.

// Entry points are named as in `nvml.h`.
#![allow(non_snake_case)]

mod faults;
mod ffi;

use std::ffi::{CStr, c_char, c_uint};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use faults::{CRITICAL_XID, EventData, EventSet};
use ffi::{Error, Memory, MemoryV2, Out, PciInfo, Process, ProcessV1, Result, Text, Utilization, set_text};
use simstate::{Gpu, ProcessUsage, Segment, ledger, time};

/// A GPU's handle: its number plus one, so that null is none.
type Device = usize;

/// What another pid namespace calls a process, less what this one calls it: no pid is as large (PID_MAX_LIMIT is 2^22).
const OTHER_PIDS: u32 = 1 << 23;

const VALUE_NOT_AVAILABLE: c_uint = c_uint::MAX;

static USERS: AtomicU32 = AtomicU32::new(0);
static SEGMENT: Mutex<Option<Segment>> = Mutex::new(None);

fn segment() -> Result<Segment> {
    let segment = SEGMENT.lock().unwrap_or_else(PoisonError::into_inner);
    segment.clone().ok_or(Error::UNINITIALIZED)
}

/// The GPU's number, the segment and the GPU.
fn gpu(device: Device) -> Result<(usize, Segment, &'static Gpu)> {
    let segment = segment()?;
    let index = device.checked_sub(1).ok_or(Error::INVALID_ARGUMENT)?;
    let gpu = segment.gpu(index).ok_or(Error::INVALID_ARGUMENT)?;
    if faults::reached(index) { Ok((index, segment, gpu)) } else { Err(Error::GPU_IS_LOST) }
}

fn init() -> Result {
    let mut segment = SEGMENT.lock().unwrap_or_else(PoisonError::into_inner);
    if segment.is_none() {
        let (_, attached) = Segment::from_env().map_err(|error| {
            eprintln!("libnvidia-ml (simulated): {error}");
            Error::DRIVER_NOT_LOADED
        })?;
        *segment = Some(attached);
    }
    USERS.fetch_add(1, SeqCst);
    Ok(())
}

fn shutdown() -> Result {
    let mut segment = SEGMENT.lock().unwrap_or_else(PoisonError::into_inner);
    let last =
        USERS.fetch_update(SeqCst, SeqCst, |users| users.checked_sub(1)).map_err(|_| Error::UNINITIALIZED)?;
    if last == 1 {
        *segment = None;
    }
    Ok(())
}

/// Defines entry points that return an `nvmlReturn_t`.
macro_rules! nvml_api {
    ($($(#[$doc:meta])* fn $($name:ident)/+ ($($arg:ident : $type:ty),* $(,)?) $body:block)*) => {
        $(nvml_api!(@each [$(#[$doc])*] ($($name)+) ($($arg: $type),*) $body);)*
    };
    // One body, several versions of the name.
    (@each $docs:tt ($($name:ident)+) $arguments:tt $body:block) => {
        $(nvml_api!(@one $docs $name $arguments $body);)+
    };
    (@one [$(#[$doc:meta])*] $name:ident ($($arg:ident : $type:ty),*) $body:block) => {
        $(#[$doc])*
        #[unsafe(no_mangle)]
        extern "C" fn $name($($arg: $type),*) -> c_uint {
            let body = || -> Result { $body };
            match body() {
                Ok(()) => 0,
                Err(error) => error.0,
            }
        }
    };
}

nvml_api! {
    fn nvmlInit_v2 / nvmlInit() {
        init()
    }

    fn nvmlInitWithFlags(flags: c_uint) {
        let _ = flags;
        init()
    }

    fn nvmlShutdown() {
        shutdown()
    }

    fn nvmlSystemGetDriverVersion(version: Out<c_char>, len: c_uint) {
        segment()?;
        set_text(version, len, "580.0.0-simulated")
    }

    fn nvmlSystemGetNVMLVersion(version: Out<c_char>, len: c_uint) {
        segment()?;
        set_text(version, len, "13.580.0")
    }

    fn nvmlSystemGetCudaDriverVersion / nvmlSystemGetCudaDriverVersion_v2(version: Out<i32>) {
        version.set(13000)
    }

    fn nvmlSystemGetProcessName(pid: c_uint, name: Out<c_char>, len: c_uint) {
        segment()?;
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).map_err(|_| Error::NOT_FOUND)?;
        let first = command.split(|&byte| byte == 0).next().unwrap_or_default();
        let mut text = String::from_utf8_lossy(first).into_owned();
        // Cut and not refused, as by the real one.
        while text.len() >= len as usize && text.pop().is_some() {}
        set_text(name, len, &text)
    }

    fn nvmlDeviceGetCount_v2 / nvmlDeviceGetCount(count: Out<c_uint>) {
        count.set(segment()?.gpu_count() as c_uint)
    }

    fn nvmlDeviceGetHandleByIndex_v2 / nvmlDeviceGetHandleByIndex(index: c_uint, device: Out<Device>) {
        gpu(index as usize + 1)?;
        device.set(index as usize + 1)
    }

    fn nvmlDeviceGetHandleByUUID(uuid: Text, device: Out<Device>) {
        let wanted = uuid.get()?;
        let segment = segment()?;
        let found = (0..segment.gpu_count()).find(|&index| segment.uuid_text(index) == wanted);
        let found = found.ok_or(Error::NOT_FOUND)? + 1;
        gpu(found)?;
        device.set(found)
    }

    fn nvmlDeviceGetHandleByPciBusId_v2 / nvmlDeviceGetHandleByPciBusId(id: Text, device: Out<Device>) {
        let wanted = id.get()?.to_ascii_lowercase();
        let segment = segment()?;
        let is_it = |&index: &usize| {
            let short = bus_id(&segment, index);
            wanted == short || wanted == format!("0000{short}") || wanted == short[5..]
        };
        device.set((0..segment.gpu_count()).find(is_it).ok_or(Error::NOT_FOUND)? + 1)
    }

    fn nvmlDeviceGetName(device: Device, name: Out<c_char>, len: c_uint) {
        gpu(device)?;
        set_text(name, len, "Simulated GPU")
    }

    fn nvmlDeviceGetUUID(device: Device, uuid: Out<c_char>, len: c_uint) {
        let (index, segment, _) = gpu(device)?;
        set_text(uuid, len, &segment.uuid_text(index))
    }

    fn nvmlDeviceGetIndex(device: Device, index: Out<c_uint>) {
        index.set(gpu(device)?.0 as c_uint)
    }

    fn nvmlDeviceGetMinorNumber(device: Device, minor: Out<c_uint>) {
        minor.set(gpu(device)?.0 as c_uint)
    }

    fn nvmlDeviceGetMemoryInfo(device: Device, memory: Out<Memory>) {
        let (_, segment, gpu) = gpu(device)?;
        let (total, used) = (segment.memory(), ledger::used(gpu));
        memory.set(Memory { total, free: total.saturating_sub(used), used })
    }

    fn nvmlDeviceGetMemoryInfo_v2(device: Device, memory: Out<MemoryV2>) {
        let (_, segment, gpu) = gpu(device)?;
        let version = memory.get()?.version;
        if version != size_of::<MemoryV2>() as c_uint | 2 << 24 {
            return Err(Error::VERSION_MISMATCH);
        }
        let (total, used) = (segment.memory(), ledger::used(gpu));
        memory.set(MemoryV2 { version, total, reserved: 0, free: total.saturating_sub(used), used })
    }

    /// The share of the last second that the engines were taken.
    fn nvmlDeviceGetUtilizationRates(device: Device, rates: Out<Utilization>) {
        let (_, _, gpu) = gpu(device)?;
        let now = time::now_ns();
        rates.set(Utilization { gpu: gpu.compute_load.percent(now), memory: gpu.copy_load.percent(now) })
    }

    fn nvmlDeviceGetComputeRunningProcesses(device: Device, count: Out<c_uint>, processes: Out<ProcessV1>) {
        running(device, count, processes, |usage| ProcessV1 { pid: usage.pid, used: usage.total() })
    }

    fn nvmlDeviceGetComputeRunningProcesses_v2 / nvmlDeviceGetComputeRunningProcesses_v3(
        device: Device, count: Out<c_uint>, processes: Out<Process>,
    ) {
        running(device, count, processes, |usage| Process {
            pid: usage.pid,
            used: usage.total(),
            gpu_instance: VALUE_NOT_AVAILABLE,
            compute_instance: VALUE_NOT_AVAILABLE,
        })
    }

    fn nvmlDeviceGetGraphicsRunningProcesses / nvmlDeviceGetGraphicsRunningProcesses_v2
        / nvmlDeviceGetGraphicsRunningProcesses_v3 / nvmlDeviceGetMPSComputeRunningProcesses_v3(
        device: Device, count: Out<c_uint>, processes: Out<Process>,
    ) {
        let _ = processes;
        gpu(device)?;
        count.set(0)
    }

    fn nvmlDeviceGetPciInfo_v3 / nvmlDeviceGetPciInfo_v2(device: Device, info: Out<PciInfo>) {
        let (index, segment, _) = gpu(device)?;
        let id = bus_id(&segment, index);
        info.set(PciInfo {
            bus_id_legacy: text_array(&id),
            domain: 0,
            bus: segment.pci_bus(index),
            device: 0,
            pci_device_id: 0x1eb8_10de,
            pci_subsystem_id: 0,
            bus_id: text_array(&format!("0000{id}")),
        })
    }

    fn nvmlDeviceGetCurrPcieLinkGeneration / nvmlDeviceGetMaxPcieLinkGeneration(
        device: Device, generation: Out<c_uint>,
    ) {
        gpu(device)?;
        generation.set(3)
    }

    fn nvmlDeviceGetCurrPcieLinkWidth / nvmlDeviceGetMaxPcieLinkWidth(device: Device, width: Out<c_uint>) {
        gpu(device)?;
        width.set(16)
    }

    /// Milliwatts; a constant.
    fn nvmlDeviceGetPowerUsage(device: Device, power: Out<c_uint>) {
        gpu(device)?;
        power.set(30_000)
    }

    /// Milliwatts; a constant.
    fn nvmlDeviceGetEnforcedPowerLimit / nvmlDeviceGetPowerManagementLimit(device: Device, limit: Out<c_uint>) {
        gpu(device)?;
        limit.set(70_000)
    }

    /// Degrees Celsius; a constant.
    fn nvmlDeviceGetTemperature(device: Device, sensor: c_uint, temperature: Out<c_uint>) {
        gpu(device)?;
        if sensor != 0 {
            return Err(Error::INVALID_ARGUMENT);
        }
        temperature.set(40)
    }

    fn nvmlDeviceGetCudaComputeCapability(device: Device, major: Out<i32>, minor: Out<i32>) {
        gpu(device)?;
        major.set(7)?;
        minor.set(5)
    }

    fn nvmlEventSetCreate(set: Out<usize>) {
        segment()?;
        set.set(Box::into_raw(Box::<Mutex<EventSet>>::default()) as usize)
    }

    fn nvmlDeviceGetSupportedEventTypes(device: Device, types: Out<u64>) {
        gpu(device)?;
        types.set(CRITICAL_XID)
    }

    fn nvmlDeviceRegisterEvents(device: Device, types: u64, set: usize) {
        let (index, _, _) = gpu(device)?;
        if types & !CRITICAL_XID != 0 {
            return Err(Error::NOT_SUPPORTED);
        }
        events(set)?.lock().unwrap_or_else(PoisonError::into_inner).gpus.push(index);
        Ok(())
    }

    fn nvmlEventSetWait_v2(set: usize, data: Out<EventData>, timeout_ms: c_uint) {
        let set = events(set)?;
        let end = Instant::now() + Duration::from_millis(u64::from(timeout_ms));
        loop {
            if let Some((gpu, xid)) = set.lock().unwrap_or_else(PoisonError::into_inner).next() {
                return data.set(EventData {
                    device: gpu + 1,
                    event_type: CRITICAL_XID,
                    event_data: xid,
                    gpu_instance: VALUE_NOT_AVAILABLE,
                    compute_instance: VALUE_NOT_AVAILABLE,
                });
            }
            if Instant::now() >= end {
                return Err(Error::TIMEOUT);
            }
            std::thread::sleep(faults::LOOK_AGAIN);
        }
    }

    fn nvmlEventSetFree(set: usize) {
        if set == 0 {
            return Err(Error::UNINITIALIZED);
        }
        // SAFETY: nvmlEventSetCreate made it of a box, and the caller frees it once.
        drop(unsafe { Box::from_raw(set as *mut Mutex<EventSet>) });
        Ok(())
    }

    fn nvmlDeviceGetMigMode(device: Device, current: Out<c_uint>, pending: Out<c_uint>) {
        let _ = (current, pending);
        gpu(device)?;
        Err(Error::NOT_SUPPORTED)
    }
}

/// A set of events by its handle.
fn events(set: usize) -> Result<&'static Mutex<EventSet>> {
    // SAFETY: null, or nvmlEventSetCreate made it and the caller has not freed it, as nvml.h asks for.
    unsafe { (set as *const Mutex<EventSet>).as_ref() }.ok_or(Error::UNINITIALIZED)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlErrorString(error: c_uint) -> *const c_char {
    let text: &'static CStr = match error {
        0 => c"Success",
        1 => c"Uninitialized",
        2 => c"Invalid Argument",
        3 => c"Not Supported",
        4 => c"Insufficient Permissions",
        6 => c"Not Found",
        7 => c"Insufficient Size",
        9 => c"Driver Not Loaded",
        10 => c"Timeout",
        13 => c"Function Not Found",
        15 => c"GPU is lost",
        25 => c"Argument Version Mismatch",
        _ => c"Unknown Error",
    };
    text.as_ptr()
}

/// Lists the processes on a GPU: how many there are if there is no room for all, otherwise all of them.
fn running<T>(device: Device, count: Out<c_uint>, places: Out<T>, of: impl Fn(ProcessUsage) -> T) -> Result {
    let (_, _, gpu) = gpu(device)?;
    let room = count.get()?;
    // NVML shows processes with a context; ours have a row from their first allocation or context on.
    let rows = ledger::usage(gpu).into_iter().filter(|usage| usage.total() > 0);
    let all: Vec<_> = match std::env::var("NVSHARE_SIM_NVML_PIDS").as_deref() {
        Ok("none") => Vec::new(),
        Ok("other") => rows.map(|usage| ProcessUsage { pid: usage.pid + OTHER_PIDS, ..usage }).collect(),
        _ => rows.collect(),
    };
    count.set(all.len() as c_uint)?;
    if (room as usize) < all.len() {
        return Err(Error::INSUFFICIENT_SIZE);
    }
    if places.is_null() { Ok(()) } else { places.fill(all.into_iter().map(of)) }
}

/// `domain:bus:device.function`, with a domain of four digits.
fn bus_id(segment: &Segment, index: usize) -> String {
    format!("0000:{:02x}:00.0", segment.pci_bus(index))
}

fn text_array<const N: usize>(text: &str) -> [c_char; N] {
    let mut array = [0; N];
    for (place, byte) in array.iter_mut().zip(text.bytes().take(N - 1)) {
        *place = byte as c_char;
    }
    array
}

#[cfg(test)]
mod tests {
    use super::ffi;

    #[test]
    fn structs_are_laid_out_as_in_nvml_h() {
        assert_eq!(size_of::<ffi::Memory>(), 24);
        assert_eq!(size_of::<ffi::MemoryV2>(), 40);
        assert_eq!(size_of::<ffi::ProcessV1>(), 16);
        assert_eq!(size_of::<ffi::Process>(), 24);
        assert_eq!(size_of::<ffi::PciInfo>(), 68);
        assert_eq!(size_of::<crate::faults::EventData>(), 32);
    }
}
