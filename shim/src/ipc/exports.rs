//! Our memory that other processes may open.

use super::channel::{Extent, Pieces, Refusal};
use super::handle::{Exporter, Handle, Key};
use super::server::{self, Lender};
use crate::abi::{CUdeviceptr, CuResult};
use crate::device::Shared;
use crate::memory::{Backing, Region};
use nvshare::units::format_size;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

/// An allocation that has a handle.
struct Export {
    device: Weak<Shared>,
    base: CUdeviceptr,
    key: Key,
}

impl Export {
    /// Whether the allocation still lives.
    fn lives(&self, number: u64) -> bool {
        self.device.upgrade().is_some_and(|device| device.memory().exported(self.base, number).is_some())
    }
}

static EXPORTS: Mutex<Option<HashMap<u64, Export>>> = Mutex::new(None);

fn exports() -> MutexGuard<'static, Option<HashMap<u64, Export>>> {
    EXPORTS.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Where this process can be asked, once it can.
static SERVER: Mutex<Option<Exporter>> = Mutex::new(None);

/// Where this process can be asked, if it can.
pub fn this_process() -> Option<Exporter> {
    *SERVER.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Starts the thread that answers, with the first export.
pub fn serve() -> std::io::Result<Exporter> {
    let mut server = SERVER.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(exporter) = *server {
        return Ok(exporter);
    }
    let exporter = Exporter::here()?;
    let listener = server::open(&exporter)?;
    std::thread::Builder::new().name("nvshare-ipc".into()).spawn(move || {
        // The application's signals are for its own threads.
        let _ = nix::sys::signal::SigSet::all().thread_set_mask();
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            server::serve(listener, &Exports);
        }));
        if ended.is_err() {
            tracing::error!("nvshare panicked while it handed out memory: no other process can open any more of this one's");
        }
    })?;
    *server = Some(exporter);
    Ok(exporter)
}

/// cuIpcGetMemHandle: the allocation that `address` lies in stays on the GPU from now on, and others may open it.
/// `None` if it is none of this GPU's. The caller is inside the gate.
pub fn get(device: &Arc<Shared>, address: CUdeviceptr) -> Option<Result<Handle, CuResult>> {
    static NUMBERS: AtomicU64 = AtomicU64::new(1);
    let shared = match device.share(address) {
        Ok(shared) => shared,
        Err(CuResult::INVALID_VALUE) => return None,
        Err(result) => {
            tracing::warn!(
                gpu = %device.gpu,
                "cuIpcGetMemHandle({address:#x}): other processes cannot be given this memory: part of it lies in host \
                 memory for want of room, or the GPU has none that can be exported"
            );
            return Some(Err(result));
        }
    };
    let base = shared.base;
    let made = serve().and_then(|exporter| Ok((exporter, Key::draw()?)));
    let (exporter, fresh) = match made {
        Ok(made) => made,
        Err(error) => {
            tracing::error!(gpu = %device.gpu, "memory cannot be handed to other processes: {error}");
            return Some(Err(CuResult::OPERATING_SYSTEM));
        }
    };
    let mut exports = exports();
    let exports = exports.get_or_insert_default();
    exports.retain(|number, export| export.lives(*number));
    let number = device.memory().export(base, || NUMBERS.fetch_add(1, Ordering::Relaxed));
    let Some(number) = number else { return Some(Err(CuResult::INVALID_VALUE)) };
    let export = exports.entry(number).or_insert_with(|| {
        tracing::debug!(
            gpu = %device.gpu,
            "{} at {base:#x} may be opened by other processes, and stays on the GPU",
            format_size(shared.size)
        );
        Export { device: Arc::downgrade(device), base, key: fresh }
    });
    Some(Ok(Handle::new(exporter, number, export.key)))
}

struct Exports;

/// A region that another process has open.
struct Loan {
    device: Weak<Shared>,
    base: CUdeviceptr,
    number: u64,
    region: CUdeviceptr,
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Some(device) = self.device.upgrade()
            && device.memory().take_back(self.region)
        {
            // The application has freed it: the engine releases it, in a context.
            device.knock();
        }
    }
}

fn extent(region: &Region, base: CUdeviceptr, bytes: u64) -> Extent {
    Extent::new(region.size, base - region.base, bytes, region.chunks.len() as u32)
}

impl Lender for Exports {
    type Loan = Loan;

    fn lend(&self, number: u64, key: &Key) -> Result<(Loan, Extent), Refusal> {
        let exports = exports();
        let export = exports.as_ref().and_then(|exports| exports.get(&number)).ok_or(Refusal::Gone)?;
        if !export.key.is(key) {
            return Err(Refusal::Denied);
        }
        let device = export.device.upgrade().ok_or(Refusal::Gone)?;
        let mut memory = device.memory();
        let (allocation, region) = memory.exported(export.base, number).ok_or(Refusal::Gone)?;
        let extent = extent(region, allocation.base, allocation.size);
        memory.lend(allocation.region);
        let device = export.device.clone();
        Ok((Loan { device, base: export.base, number, region: allocation.region }, extent))
    }

    fn pieces(&self, loan: &Loan, from: u32, most: usize) -> Result<Pieces, CuResult> {
        let device = loan.device.upgrade().ok_or(CuResult::INVALID_VALUE)?;
        // Under the map's lock: what is in it is not released, and its context not destroyed, meanwhile.
        let memory = device.memory();
        let (_, region) = memory.exported(loan.base, loan.number).ok_or(CuResult::INVALID_VALUE)?;
        device.driver.ctx_push_current(region.context)?;
        let pieces = region
            .chunks
            .iter()
            .skip(from as usize)
            .take(most)
            .map(|chunk| match chunk.backing {
                Backing::Device(handle) => Ok((device.driver.mem_export(handle)?, chunk.size)),
                // It was fixed, so it is there as long as the client works.
                _ => Err(CuResult::INVALID_VALUE),
            })
            .collect();
        let _ = device.driver.ctx_pop_current();
        pieces
    }
}
