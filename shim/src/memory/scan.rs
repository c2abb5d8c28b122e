//! Kernels by which the GPU looks at its own memory before it moves: which granules are all zero ([`crate::memory::zero_scan`]),
//! and what the fingerprint of each is ([`crate::memory::fingerprint`]).
//!
//! The GPU scans at the speed of its memory. The kernels are written in PTX; [`compiled`] has their code for most GPUs, and the
//! driver compiles it for others ([`compiling`]). The chunks to scan and the results are in one table in pinned host memory, because a
//! full GPU may have no room even for that. One launch scans any number of chunks.
//!
//! A result is valid only for the moment of the scan. Until the memory is evicted nothing may write to it:
//! the gate is shut, and the submitted work is done.
//!
//! The driver loads a kernel only when all work of the context is done, and keeps other threads' calls out meanwhile
//! (docs/driver-facts.md). So a kernel is loaded only while the client has no work in flight ([`kernel`]).

pub mod compiled;
mod compiling;
pub mod kernel;

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::memory::CHUNK;
use crate::memory::error::{SwapError, driver_said};
use compiled::Compiled;
use nvshare::units::GRANULE;
use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::ptr::NonNull;

/// Threads of a block, as the kernel requires.
pub const THREADS: u32 = 256;

/// Granules of one entry of the table, as in the kernels.
pub const SLOTS: usize = 32;
const _: () =
    assert!(CHUNK == SLOTS as u64 * GRANULE, "a chunk has an entry, and a bit of a u32 for each granule");

/// The least capacity of a table, in chunks: 16 GiB of full ones.
const LEAST: usize = 256;

/// Bytes of a page of host memory.
const PAGE: usize = 4096;

/// A chunk in the table of one kind of scan: the host writes address and granules, the kernel writes the results behind them.
/// Two words and then the results of [`SLOTS`] granules, as the kernel has it.
///
/// # Safety
/// Every byte that the kernel may write is a valid value of the type.
pub unsafe trait Entry: Copy + Send + 'static {
    /// The kernel as PTX text, for the driver's compiler.
    const PTX: &'static CStr;
    /// The kernel as code, for the GPUs that it was compiled for.
    const COMPILED: &'static [Compiled];
    /// The kernel's name in it.
    const KERNEL: &'static CStr;
    /// What a scan finds of a chunk.
    type Answer;

    /// An entry without results.
    fn new(address: CUdeviceptr, granules: u64) -> Self;

    /// What the kernel has written.
    fn answer(&self) -> Self::Answer;
}

/// An entry for a chunk that is to be scanned; `None` if it is not one to [`CHUNK`] bytes of whole granules.
fn entry<E: Entry>(address: CUdeviceptr, size: u64) -> Option<E> {
    let whole = address.is_multiple_of(GRANULE) && size.is_multiple_of(GRANULE);
    (whole && (GRANULE..=CHUNK).contains(&size)).then(|| E::new(address, size / GRANULE))
}

/// Pinned memory for the entries of a scan, and the event that passes when the scan is done.
struct Table<E> {
    host: NonNull<c_void>,
    device: CUdeviceptr,
    capacity: usize,
    answered: CUevent,
    entry: PhantomData<E>,
}

impl<E: Entry> Table<E> {
    fn new(driver: &Driver, entries: usize) -> Result<Self, SwapError> {
        let capacity = entries.next_power_of_two().max(LEAST);
        let answered = driver
            .event_create(CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING)
            .map_err(driver_said("cuEventCreate"))?;
        match driver.mem_host_alloc(Self::bytes(capacity)) {
            Ok((host, device)) => Ok(Self { host, device, capacity, answered, entry: PhantomData }),
            Err(result) => {
                let _ = driver.event_destroy(answered);
                Err(driver_said("cuMemHostRegister")(result))
            }
        }
    }

    /// Bytes for so many entries, whole pages.
    fn bytes(capacity: usize) -> usize {
        (capacity * size_of::<E>()).next_multiple_of(PAGE)
    }

    /// The entries, which begin at a page boundary.
    fn entries(&self) -> *mut E {
        self.host.as_ptr().cast()
    }

    fn write(&mut self, entries: &[E]) {
        assert!(entries.len() <= self.capacity);
        // SAFETY: the table has the capacity, and no kernel uses it, because it was spare (see `Scanner::spare`).
        unsafe { self.entries().copy_from_nonoverlapping(entries.as_ptr(), entries.len()) };
    }

    /// Reads the first entries, after the kernel is done.
    fn read(&self, entries: usize) -> Vec<E> {
        assert!(entries <= self.capacity);
        // SAFETY: `write` has initialised these, and every byte that the kernel may write is a valid value (see `Entry`).
        (0..entries).map(|index| unsafe { self.entries().add(index).read_volatile() }).collect()
    }

    fn destroy(self, driver: &Driver) {
        let _ = driver.event_destroy(self.answered);
        // SAFETY: no kernel uses it, because it was spare.
        unsafe { driver.mem_free_host(self.host, Self::bytes(self.capacity)) };
    }
}

/// A scan in progress. Its table stays pinned until the scan is finished, or until its context is destroyed.
#[must_use = "the result comes from Scanner::finish"]
pub struct Scan<E> {
    table: Table<E>,
    chunks: usize,
}

impl<E> Scan<E> {
    /// Whether the scan is done, or can never be.
    pub fn is_answered(&self, driver: &Driver) -> bool {
        driver.event_is_past(self.table.answered)
    }
}

/// The kernel, loaded into a context.
pub struct Scanner<E: Entry> {
    driver: &'static Driver,
    module: CUmodule,
    kernel: CUfunction,
    /// Tables that no kernel uses.
    spare: Vec<Table<E>>,
}

impl<E: Entry> Scanner<E> {
    /// Loads the kernel's code into the current context. No work of the context may be in flight, because the driver waits for it.
    ///
    /// # Errors
    /// The driver's, for example that the code is for another GPU.
    pub fn new(driver: &'static Driver, code: &[u8]) -> Result<Self, SwapError> {
        let module = driver.module_load(code).map_err(driver_said("cuModuleLoadData"))?;
        let begun = driver.module_function(module, E::KERNEL).map_err(driver_said("cuModuleGetFunction"));
        let begun = begun.and_then(|kernel| Ok((kernel, Table::new(driver, LEAST)?)));
        match begun {
            Ok((kernel, table)) => {
                // A driver with lazy loading would load the kernel at its first launch. Older drivers have no such call, and
                // have loaded it with the module.
                let _ = driver.func_load(kernel);
                Ok(Self { driver, module, kernel, spare: vec![table] })
            }
            Err(error) => {
                let _ = driver.module_unload(module);
                Err(error)
            }
        }
    }

    /// Submits a scan of chunks to `stream`, given the address and bytes of each: whole granules, [`CHUNK`] at most. Several
    /// scans may be in progress. `keys` are the kernel's parameters behind table and slots, if it has any.
    ///
    /// All of the memory must be mapped until the scan is done: an access to unmapped memory would break the application's
    /// context.
    ///
    /// # Errors
    /// The driver's, or CUDA_ERROR_INVALID_VALUE for what is not a chunk. No scan is in progress then.
    pub fn scan(
        &mut self,
        chunks: &[(CUdeviceptr, u64)],
        stream: CUstream,
        [first, second]: [u64; 2],
    ) -> Result<Scan<E>, SwapError> {
        let no_chunk = || SwapError::Driver { call: "a scan", result: CuResult::INVALID_VALUE };
        let entries = chunks.iter().map(|(address, size)| entry(*address, *size));
        let entries: Vec<_> = entries.collect::<Option<_>>().ok_or_else(no_chunk)?;
        let slots = u32::try_from(entries.len() * SLOTS).map_err(|_| no_chunk())?;
        let mut table = self.table(entries.len())?;
        table.write(&entries);
        // SAFETY: these are the kernel's parameters, of which it has two or four. It accesses the table, which nothing else uses until the event
        // below has passed, and the memory, for which the caller is responsible.
        let launched = unsafe {
            let parameters = [table.device, u64::from(slots), first, second];
            self.driver.launch(self.kernel, slots.max(1), THREADS, stream, parameters)
        };
        if let Err(result) = launched {
            self.spare.push(table);
            return Err(driver_said("cuLaunchKernel")(result));
        }
        // If recording fails, it is unknown when the kernel is done with the table: it is not reused, and the driver frees it
        // with the context.
        self.driver.event_record(table.answered, stream).map_err(driver_said("cuEventRecord"))?;
        Ok(Scan { table, chunks: entries.len() })
    }

    /// Waits for a scan. The result is what was found of each chunk, in the order in which they were passed.
    ///
    /// # Errors
    /// The driver's: the context is broken.
    pub fn finish(&mut self, scan: Scan<E>) -> Result<Vec<E::Answer>, SwapError> {
        let Scan { table, chunks } = scan;
        self.driver.event_synchronize(table.answered).map_err(driver_said("cuEventSynchronize"))?;
        let answer = table.read(chunks).iter().map(E::answer).collect();
        self.spare.push(table);
        Ok(answer)
    }

    /// A table that no kernel uses.
    fn table(&mut self, entries: usize) -> Result<Table<E>, SwapError> {
        match self.spare.iter().position(|table| table.capacity >= entries) {
            Some(index) => Ok(self.spare.swap_remove(index)),
            None => Table::new(self.driver, entries),
        }
    }

    /// Releases everything. The context in which it was made must be current, and all scans finished. Waits for all work of the
    /// context.
    pub fn destroy(self) {
        for table in self.spare {
            table.destroy(self.driver);
        }
        let _ = self.driver.module_unload(self.module);
    }
}

// SAFETY: the pinned memory of a table belongs to the scanner, and is accessed only through it.
unsafe impl<E: Entry> Send for Scanner<E> {}

#[cfg(test)]
mod tests;
