//! Whoever asks how much memory there is gets the same figures ([`nvshare::memory_info`]), whether from cuMemGetInfo,
//! cuDeviceTotalMem or NVML, before the process has a context and after.
//!
//! Before the process has attached, its figures come from the same page: it asks the arbiter to see it
//! ([`register::look`]), once for each GPU. It takes no slot for that, and whoever never asks connects to nobody.

use crate::cuda::abi::CUdevice;
use crate::cuda::driver::Driver;
use crate::memory::devices;
use crate::settings::settings;
use nvshare::map::MappedPage;
use nvshare::memory_info::MemoryInfo;
use nvshare::paths;
use nvshare::register::{self, RegisterError};
use nvshare::slot::SlotSet;
use nvshare::snapshot::Snapshot;
use nvshare::sync::now;
use nvshare::units::{GpuUuid, Nanos, SECOND};
use std::sync::Mutex;
use std::time::Duration;

/// The figures of a GPU of the driver's, if it has a pool.
pub fn of_device(device: CUdevice) -> Option<MemoryInfo> {
    if let Some(device) = devices::of_device(device) {
        return Some(device.figures());
    }
    let uuid = Driver::get().ok()?.device_uuid(device).ok()?;
    // cuInit has found an arbiter: if it is gone now, another one is about to come.
    of_gpu(GpuUuid(uuid.bytes), settings().ok()?.connect_timeout)
}

/// The figures of a GPU, if it has a pool. Waits so long for an arbiter that may be starting.
pub fn of_gpu(gpu: GpuUuid, patience: Duration) -> Option<MemoryInfo> {
    if let Some(device) = devices::of_gpu(gpu) {
        return Some(device.figures());
    }
    // What it will register with. If that makes no sense, cuInit fails and says so.
    let limit = settings().map(|settings| settings.shares.memory_limit).unwrap_or_default();
    seen(gpu, patience).map(|page| MemoryInfo::of(&Snapshot::take(&page, SlotSet::EMPTY), None, limit, 0))
}

/// What this process has seen of a GPU before it attached.
struct Seen {
    gpu: GpuUuid,
    /// Who has seen it. A child of fork has its parent's list and none of its mappings.
    pid: u32,
    /// `None` if the arbiter will not show it, however often it is asked.
    page: Option<MappedPage>,
}

/// An arbiter that has not been seen for this long has perhaps a successor with another page.
const ARBITER_SEEN_WITHIN: Nanos = 5 * SECOND;

impl Seen {
    /// A page that has no client goes with its arbiter, and the next one makes another: looks whether it has.
    fn renew(&mut self) {
        let Some(page) = &self.page else { return };
        let (_, _, heartbeat) = page.arbiter();
        if now().saturating_sub(heartbeat) < ARBITER_SEEN_WITHIN {
            return;
        }
        if let Ok(page) = register::look(&paths::socket(&paths::runtime_dir()), self.gpu, Duration::ZERO) {
            self.page = Some(page);
        }
    }
}

static SEEN: Mutex<Vec<Seen>> = Mutex::new(Vec::new());

fn seen(gpu: GpuUuid, patience: Duration) -> Option<MappedPage> {
    let pid = std::process::id();
    // Whoever forks may have held the lock in another thread, so nobody may wait for it: then the arbiter is asked.
    if let Ok(mut seen) = SEEN.try_lock() {
        leak_those_of_others(&mut seen, pid);
        if let Some(seen) = seen.iter_mut().find(|seen| seen.gpu == gpu) {
            seen.renew();
            return seen.page.clone();
        }
    }
    let page = match register::look(&paths::socket(&paths::runtime_dir()), gpu, patience) {
        Ok(page) => Some(page),
        Err(error) => {
            crate::log::initialise();
            let nobody = matches!(error, RegisterError::NoArbiter { .. });
            if nobody {
                tracing::info!(%gpu, "how large its pool is cannot be said: {error}");
                return None;
            }
            tracing::warn!(%gpu, "how large its pool is cannot be said, what the driver says is taken for it: {error}");
            None
        }
    };
    if let Ok(mut seen) = SEEN.try_lock() {
        seen.push(Seen { gpu, pid, page: page.clone() });
    }
    page
}

/// Something else may be mapped by now where a parent's page was: it must be neither read nor unmapped.
fn leak_those_of_others(seen: &mut Vec<Seen>, pid: u32) {
    while let Some(index) = seen.iter().position(|seen| seen.pid != pid) {
        std::mem::forget(seen.swap_remove(index));
    }
}
