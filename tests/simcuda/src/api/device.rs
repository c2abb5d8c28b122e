//! Devices and what they say about themselves. The figures are a T4's where nothing else follows from the simulation.

use std::ffi::{c_char, c_int, c_uint};

use super::driver_api;
use crate::abi::{Error, Handle, Out, Result, Text, set_text};
use crate::context::Context;
use crate::driver::{Device, driver, lock};
use crate::handles;
use std::sync::Arc;

driver_api! {
    fn cuDeviceGet(device: Out<c_int>, ordinal: c_int) {
        driver()?.device(ordinal)?;
        device.set(ordinal)
    }

    fn cuDeviceGetCount(count: Out<c_int>) {
        count.set(driver()?.devices.len() as c_int)
    }

    fn cuDeviceGetName(name: Out<c_char>, len: c_int, device: c_int) {
        driver()?.device(device)?;
        set_text(name, len, "Simulated GPU")
    }

    fn cuDeviceGetUuid(uuid: Out<[u8; 16]>, device: c_int) {
        self::uuid(uuid, device)
    }

    fn cuDeviceGetUuid_v2(uuid: Out<[u8; 16]>, device: c_int) {
        self::uuid(uuid, device)
    }

    fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: c_int) {
        let driver = driver()?;
        driver.device(device)?;
        bytes.set(driver.segment.memory() as usize)
    }

    /// Of the time when sizes had 32 bits.
    fn cuDeviceTotalMem(bytes: Out<c_uint>, device: c_int) {
        let driver = driver()?;
        driver.device(device)?;
        bytes.set(driver.segment.memory().try_into().unwrap_or(c_uint::MAX))
    }

    fn cuDeviceGetAttribute(value: Out<c_int>, attribute: c_int, device: c_int) {
        let driver = driver()?;
        let index = driver.device(device)?.index;
        value.set(self::attribute(attribute, driver.segment.pci_bus(index) as c_int)?)
    }

    fn cuDeviceComputeCapability(major: Out<c_int>, minor: Out<c_int>, device: c_int) {
        driver()?.device(device)?;
        major.set(7)?;
        minor.set(5)
    }

    fn cuDeviceGetPCIBusId(id: Out<c_char>, len: c_int, device: c_int) {
        let driver = driver()?;
        let index = driver.device(device)?.index;
        set_text(id, len, &pci_bus_id(driver.segment.pci_bus(index)))
    }

    fn cuDeviceGetByPCIBusId(device: Out<c_int>, id: Text) {
        let driver = driver()?;
        let wanted = id.get()?.to_ascii_lowercase();
        let is_it = |index: &usize| {
            let full = pci_bus_id(driver.segment.pci_bus(*index));
            [full.as_str(), &full[5..], &full[..10]].contains(&wanted.as_str())
        };
        let found = (0..driver.devices.len()).find(is_it).ok_or(Error::INVALID_DEVICE)?;
        device.set(found as c_int)
    }

    fn cuDeviceGetExecAffinitySupport(supported: Out<c_int>, kind: c_uint, device: c_int) {
        let _ = kind;
        driver()?.device(device)?;
        supported.set(0)
    }

    fn cuDevicePrimaryCtxRetain(context: Out<Handle>, device: c_int) {
        let device = driver()?.device(device)?;
        context.required()?;
        context.set(self::retain(device)?.handle())
    }

    fn cuDevicePrimaryCtxRelease(device: c_int) {
        self::release(device)
    }

    fn cuDevicePrimaryCtxRelease_v2(device: c_int) {
        self::release(device)
    }

    fn cuDevicePrimaryCtxReset(device: c_int) {
        self::reset(device)?;
        // The caller's hold goes with it, as after the CUDA runtime's cudaDeviceReset on a real GPU.
        let device = driver()?.device(device)?;
        let mut primary = lock(&device.primary);
        primary.references = primary.references.saturating_sub(1);
        Ok(())
    }

    fn cuDevicePrimaryCtxReset_v2(device: c_int) {
        self::reset(device)
    }

    fn cuDevicePrimaryCtxSetFlags(device: c_int, flags: c_uint) {
        self::set_flags(device, flags)
    }

    fn cuDevicePrimaryCtxSetFlags_v2(device: c_int, flags: c_uint) {
        self::set_flags(device, flags)
    }

    fn cuDevicePrimaryCtxGetState(device: c_int, flags: Out<c_uint>, active: Out<c_int>) {
        let device = driver()?.device(device)?;
        let primary = lock(&device.primary);
        flags.set_if_wanted(primary.flags);
        active.set_if_wanted(c_int::from(primary.context.is_some()));
        Ok(())
    }
}

fn uuid(uuid: Out<[u8; 16]>, device: c_int) -> Result {
    let driver = driver()?;
    uuid.set(driver.segment.uuid(driver.device(device)?.index))
}

fn pci_bus_id(bus: u32) -> String {
    format!("0000:{bus:02x}:00.0")
}

/// Retains the primary context of a GPU, and makes it if there is none.
pub(super) fn retain(device: &'static Device) -> Result<Arc<Context>> {
    let mut primary = lock(&device.primary);
    let handle = *primary.handle.get_or_insert_with(handles::fresh);
    let retained = match &primary.context {
        Some(context) => context.clone(),
        None => Context::create(device, Some(handle), primary.flags)?,
    };
    primary.references += 1;
    primary.context = Some(retained.clone());
    Ok(retained)
}

pub(super) fn release(device: c_int) -> Result {
    let device = driver()?.device(device)?;
    let mut primary = lock(&device.primary);
    primary.references = primary.references.checked_sub(1).ok_or(Error::INVALID_CONTEXT)?;
    match primary.references {
        0 => primary.context.take().map_or(Ok(()), |context| context.destroy()),
        _ => Ok(()),
    }
}

/// Ends the context. It stays retained as often as it was: who has retained it releases it still.
fn reset(device: c_int) -> Result {
    let device = driver()?.device(device)?;
    let mut primary = lock(&device.primary);
    primary.context.take().map_or(Ok(()), |context| context.destroy())
}

fn set_flags(device: c_int, flags: c_uint) -> Result {
    let device = driver()?.device(device)?;
    if flags & !0xff != 0 {
        return Err(Error::INVALID_VALUE);
    }
    let mut primary = lock(&device.primary);
    primary.flags = flags;
    if let Some(context) = &primary.context {
        context.flags.store(flags, std::sync::atomic::Ordering::SeqCst);
    }
    Ok(())
}

/// `CUdevice_attribute` and its value.
fn attribute(attribute: c_int, pci_bus: c_int) -> Result<c_int> {
    Ok(match attribute {
        1..=3 => 1024,   // threads per block; block x, y
        4 => 64,         // block z
        5 => i32::MAX,   // grid x
        6 | 7 => 65535,  // grid y, z
        8 => 48 << 10,   // shared memory per block
        9 => 64 << 10,   // constant memory
        10 => 32,        // warp
        11 => i32::MAX,  // pitch
        12 => 65536,     // registers per block
        13 => 1_590_000, // clock, kHz
        14 => 512,       // texture alignment
        15 => 1,         // overlap of copies and kernels
        16 => 40,        // multiprocessors
        17 | 18 => 0,    // kernel timeout; integrated
        19 => 1,         // maps host memory
        20 => 0,         // compute mode
        21 => 131_072,   // texture sizes
        22 => 131_072,
        23 => 65_536,
        24..=26 => 16_384,
        27 | 28 => 32_768,
        29 => 2048,
        30 => 512, // surface alignment
        31 => 1,   // concurrent kernels
        32 => 0,   // ECC
        33 => pci_bus,
        34 | 35 => 0,                     // PCI device; TCC
        36 => 5_001_000,                  // memory clock, kHz
        37 => 256,                        // memory bus width
        38 => 4 << 20,                    // L2
        39 => 1024,                       // threads per multiprocessor
        40 => 2,                          // copy engines
        41 => 1,                          // unified addressing
        42..=49 | 51..=74 | 77 => 16_384, // more texture and surface sizes
        50 => 0,                          // PCI domain
        75 => 7,                          // compute capability
        76 => 5,
        78..=80 => 1,   // stream priorities, L1 caches
        81 => 64 << 10, // shared memory per multiprocessor
        82 => 65536,    // registers per multiprocessor
        83 => 1,        // managed memory
        84..=86 => 0,   // multi-GPU board; host atomics
        87 => 32,       // single to double performance
        88 => 0,        // pageable memory access
        89 | 90 => 1,   // concurrent managed access; preemption
        91 => 1,        // host pointers of registered memory
        92..=94 => 1,   // stream memory operations
        95 => 1,        // cooperative launch
        96 => 0,
        97 => 64 << 10, // shared memory per block, opt-in
        98 => 0,
        99 => 1, // host registration
        100 | 101 => 0,
        102 => 1,       // virtual memory management
        103 => 1,       // exports memory as file descriptors
        104 | 105 => 0, // and as handles of Windows
        106 => 16,      // blocks per multiprocessor
        107..=114 => 0, // compression, persisting L2
        115 => 1,       // memory pools
        116..=119 => 0, // GPUDirect, pools of other processes
        120 | 121 => 0, // clusters, deferred mapping
        122 | 123 => 1, // stream memory operations
        124 => 0,       // DMA-BUF
        125 => 1,       // IPC events
        126..=129 => 0, // more memory operations, fabric handles
        130 => 0,       // NUMA
        131 => -1,
        132 | 133 => 0,
        134 => 0, // the host's NUMA node
        135..=140 => 0,
        141 => 1, // VMM of host memory, by NUMA node
        142 => 1, // memory pools of host memory, by NUMA node
        143 => 0,
        144 => 1, // memory pools of host memory
        145 => 1, // VMM of host memory
        146..=161 => 0,
        _ => return Err(Error::INVALID_VALUE),
    })
}
