//! How much memory a GPU has for this process ([`nvshare::memory_info`]): cuMemGetInfo, cuDeviceTotalMem and NVML report the
//! same numbers, before the process has a context and after.
//!
//! Before the process has attached, the numbers come from the same page, which it asks the arbiter to show
//! ([`register::look`]), once for each GPU. That takes no slot, and a process that never queries memory never connects.

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

/// The numbers of a GPU by the driver's ordinal, if it has a pool.
pub fn of_device(device: CUdevice) -> Option<MemoryInfo> {
    if let Some(device) = devices::of_device(device) {
        return Some(device.figures());
    }
    let uuid = Driver::get().ok()?.device_uuid(device).ok()?;
    // cuInit has found an arbiter, so if none answers now, one is probably being restarted: wait for it.
    of_gpu(GpuUuid(uuid.bytes), settings().ok()?.connect_timeout)
}

/// The numbers of a GPU, if it has a pool. Waits up to `patience` for an arbiter that may be starting.
pub fn of_gpu(gpu: GpuUuid, patience: Duration) -> Option<MemoryInfo> {
    if let Some(device) = devices::of_gpu(gpu) {
        return Some(device.figures());
    }
    // The memory limit with which the process will register. If the settings are invalid, cuInit fails and says so.
    let limit = settings().map(|settings| settings.shares.memory_limit).unwrap_or_default();
    seen(gpu, patience).map(|page| MemoryInfo::of(&Snapshot::take(&page, SlotSet::EMPTY), None, limit, 0))
}

/// The page of a GPU that was shown to this process before it attached.
struct Seen {
    gpu: GpuUuid,
    /// The process to which it was shown. A forked child has its parent's list but not its mappings.
    pid: u32,
    /// `None` if the arbiter refuses to show it.
    page: Option<MappedPage>,
}

/// If an arbiter's heartbeat is older than this, it may have a successor with another page.
const ARBITER_SEEN_WITHIN: Nanos = 5 * SECOND;

impl Seen {
    /// Checks whether a new arbiter has a new page: a page without clients is not taken over by the next arbiter.
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
    // In a forked child the lock may be held by a thread that does not exist, so this never waits for it, and asks the arbiter
    // instead.
    if let Ok(mut seen) = SEEN.try_lock() {
        leak_pages_of_parent(&mut seen, pid);
        if let Some(seen) = seen.iter_mut().find(|seen| seen.gpu == gpu) {
            seen.renew();
            return seen.page.clone();
        }
    }
    let page = match register::look(&paths::socket(&paths::runtime_dir()), gpu, patience) {
        Ok(page) => Some(page),
        Err(error) => {
            crate::log::initialise();
            let no_arbiter = matches!(error, RegisterError::NoArbiter { .. });
            if no_arbiter {
                tracing::info!(%gpu, "pool size unknown, so the size of the whole GPU is reported: {error}");
                return None;
            }
            tracing::warn!(%gpu, "pool size unknown, so the size of the whole GPU is reported: {error}");
            None
        }
    };
    if let Ok(mut seen) = SEEN.try_lock() {
        seen.push(Seen { gpu, pid, page: page.clone() });
    }
    page
}

/// Drops a parent's pages without unmapping them: something else may be mapped at their addresses in this process.
fn leak_pages_of_parent(seen: &mut Vec<Seen>, pid: u32) {
    while let Some(index) = seen.iter().position(|seen| seen.pid != pid) {
        std::mem::forget(seen.swap_remove(index));
    }
}
