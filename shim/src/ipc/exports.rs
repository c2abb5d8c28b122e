//! Memory of this process that other processes may open.

use crate::cuda::abi::{CUdeviceptr, CuResult};
use crate::ipc::channel::{Extent, Pieces, Refusal};
use crate::ipc::handle::{Exporter, Handle, Key};
use crate::ipc::server::{self, Lender};
use crate::memory::device::Device;
use crate::memory::region::{Backing, Region};
use nvshare::units::format_size;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

/// An allocation that has a handle.
struct Export {
    device: Weak<Device>,
    base: CUdeviceptr,
    key: Key,
}

impl Export {
    /// Whether the allocation still exists.
    fn lives(&self, number: u64) -> bool {
        self.device.upgrade().is_some_and(|device| device.memory().exported(self.base, number).is_some())
    }
}

/// The allocations that have handles, by number.
struct Table<T> {
    rows: HashMap<u64, T>,
    /// With so many rows, those of allocations that do not exist any more are removed.
    full: usize,
}

/// Up to so many rows none are removed.
const FEW: usize = 64;

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { rows: HashMap::new(), full: FEW }
    }
}

impl<T> Table<T> {
    /// The row of this number, added if it is new. Removes the rows of allocations that do not exist any more, so rarely that
    /// each new row costs two checks of others on average, however many there are.
    fn row(&mut self, number: u64, lives: impl Fn(u64, &T) -> bool, make: impl FnOnce() -> T) -> &mut T {
        if self.rows.len() >= self.full && !self.rows.contains_key(&number) {
            self.rows.retain(|number, row| lives(*number, row));
            self.full = FEW.max(2 * self.rows.len());
        }
        self.rows.entry(number).or_insert_with(make)
    }
}

static EXPORTS: Mutex<Option<Table<Export>>> = Mutex::new(None);

fn exports() -> MutexGuard<'static, Option<Table<Export>>> {
    nvshare::sync::lock(&EXPORTS)
}

/// This process as an exporter, once its server runs.
static SERVER: Mutex<Option<Exporter>> = Mutex::new(None);

/// This process as an exporter, if its server runs.
pub fn this_process() -> Option<Exporter> {
    *nvshare::sync::lock(&SERVER)
}

/// Starts the server's thread, if it does not run yet.
pub fn serve() -> std::io::Result<Exporter> {
    let mut server = nvshare::sync::lock(&SERVER);
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
            tracing::error!(
                "nvshare panicked while it exported memory: other processes cannot open memory of this one any more"
            );
        }
    })?;
    *server = Some(exporter);
    Ok(exporter)
}

/// cuIpcGetMemHandle: the allocation that contains `address` stays on the GPU from now on, and other processes may open it.
/// `None` if it is not on this GPU. The caller is inside the gate.
pub fn get(device: &Arc<Device>, address: CUdeviceptr) -> Option<Result<Handle, CuResult>> {
    static NUMBERS: AtomicU64 = AtomicU64::new(1);
    let shared = match device.share(address) {
        Ok(shared) => shared,
        Err(CuResult::INVALID_VALUE) => return None,
        Err(result) => {
            tracing::warn!(
                gpu = %device.gpu,
                "cuIpcGetMemHandle({address:#x}): this memory cannot be shared with other processes: part of it lies in \
                 host memory because the GPU is full, or the GPU cannot export memory as file descriptors"
            );
            return Some(Err(result));
        }
    };
    let base = shared.base;
    let made = serve().and_then(|exporter| Ok((exporter, Key::draw()?)));
    let (exporter, fresh) = match made {
        Ok(made) => made,
        Err(error) => {
            tracing::error!(
                gpu = %device.gpu,
                "cuIpcGetMemHandle: the socket through which other processes open this memory could not be made: {error}"
            );
            return Some(Err(CuResult::OPERATING_SYSTEM));
        }
    };
    let mut exports = exports();
    let exports = exports.get_or_insert_default();
    let number = device.memory().export(base, || NUMBERS.fetch_add(1, Ordering::Relaxed));
    let Some(number) = number else { return Some(Err(CuResult::INVALID_VALUE)) };
    let lives = |number, export: &Export| export.lives(number);
    let export = exports.row(number, lives, || {
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

/// An allocation that another process has open.
struct Loan {
    device: Weak<Device>,
    base: CUdeviceptr,
    number: u64,
    region: CUdeviceptr,
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Some(device) = self.device.upgrade()
            && device.memory().take_back(self.region)
        {
            // The application has freed it, so the engine, which has a context, releases it.
            device.wake_engine();
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
        let export = exports.as_ref().and_then(|exports| exports.rows.get(&number)).ok_or(Refusal::Gone)?;
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
        // Under the map's lock, so that neither the region is released nor its context destroyed meanwhile.
        let memory = device.memory();
        let (_, region) = memory.exported(loan.base, loan.number).ok_or(CuResult::INVALID_VALUE)?;
        device.driver.ctx_push_current(region.context)?;
        let pieces = region
            .chunks
            .iter()
            .skip(from as usize)
            .take(most)
            .map(|chunk| match chunk.backing {
                Backing::Device(handle) => Ok((device.imported.export(device.driver, handle)?, chunk.size)),
                // It stays on the GPU, so this happens only if the client has failed.
                _ => Err(CuResult::INVALID_VALUE),
            })
            .collect();
        let _ = device.driver.ctx_pop_current();
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn an_export_costs_the_same_however_many_exist() {
        let looks = |count: u64| {
            let (mut table, looks) = (Table::default(), Cell::new(0u64));
            for number in 0..count {
                let lives = |_, _: &()| {
                    looks.set(looks.get() + 1);
                    true
                };
                table.row(number, lives, || ());
                table.row(number, lives, || unreachable!("it has one"));
            }
            assert_eq!(table.rows.len() as u64, count);
            looks.get() / count
        };
        assert!(looks(10_000) <= 2 && looks(100_000) <= 2);
    }

    #[test]
    fn rows_of_freed_allocations_are_removed() {
        let mut table = Table::default();
        for number in 0..100_000 {
            // Only the last ten exist.
            table.row(number, |known, ()| known + 10 > number, || ());
            assert!(table.rows.len() <= FEW);
        }
    }
}
