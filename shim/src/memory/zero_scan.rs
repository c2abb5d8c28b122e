//! Finds the granules that hold nothing but zeros, so that they are never copied: a framework that takes most of the
//! GPU for itself and uses a little of it switches at the cost of what it uses.
//!
//! The GPU looks, at the speed of its memory (16 GiB in 4 ms, docs/driver-facts.md), with a kernel that comes as PTX text
//! (`zero_scan.ptx`) and that the driver compiles. What to look at and what was found stand in one table in pinned host
//! memory, because on a full GPU there may be no room for even that. One launch looks at any number of chunks.
//!
//! A wrong "all zero" loses an application's data, a wrong "in use" costs a copy of two MiB. So a granule is zero only
//! where the kernel has said so, after it has seen all of it: whatever else becomes of a scan, memory counts as in use.
//!
//! A scan is an answer about a moment. Between it and the moment when the memory is taken away nothing may write:
//! the gate is shut, and the work that was submitted is done.

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::memory::CHUNK;
use crate::memory::error::{SwapError, driver_said};
use nvshare::units::GRANULE;
use std::ffi::{CStr, c_void};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

/// The kernel, for the driver's compiler.
const PTX: &CStr = match CStr::from_bytes_with_nul(concat!(include_str!("zero_scan.ptx"), "\0").as_bytes()) {
    Ok(text) => text,
    Err(_) => panic!("the text has no NUL"),
};

/// The kernel's name in it.
const KERNEL: &CStr = c"nvshare_zero_granules";

/// Threads of a block, as the kernel requires.
const THREADS: u32 = 256;

/// Granules of an entry of the table, as the kernel has it.
const SLOTS: usize = 32;
const _: () =
    assert!(CHUNK == SLOTS as u64 * GRANULE, "a chunk has an entry, and a bit of a u32 for each granule");

/// Chunks for which a table has room at least: 16 GiB of full ones.
const LEAST: usize = 256;

/// Bytes of a page of host memory.
const PAGE: usize = 4096;

/// What the kernel writes for a granule that is all zero.
const ZERO: u8 = 1;

/// What host and kernel tell each other about a chunk.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Entry {
    address: CUdeviceptr,
    granules: u64,
    zero: [u8; SLOTS],
}

impl Entry {
    /// A question about a chunk; `None` if this is no chunk.
    fn ask(address: CUdeviceptr, size: u64) -> Option<Self> {
        let whole = address.is_multiple_of(GRANULE) && size.is_multiple_of(GRANULE);
        (whole && (GRANULE..=CHUNK).contains(&size)).then_some(Self {
            address,
            granules: size / GRANULE,
            zero: [0; SLOTS],
        })
    }

    /// The answer: bit i is set unless granule i is known to be all zero.
    fn in_use(&self) -> u32 {
        (0..self.granules as usize).filter(|i| self.zero[*i] != ZERO).fold(0, |bits, i| bits | 1 << i)
    }
}

/// Pinned memory for the entries of a scan, and the event that says that they are answered.
struct Table {
    host: NonNull<c_void>,
    device: CUdeviceptr,
    capacity: usize,
    answered: CUevent,
}

impl Table {
    fn new(driver: &Driver, entries: usize) -> Result<Self, SwapError> {
        let capacity = entries.next_power_of_two().max(LEAST);
        let answered = driver
            .event_create(CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING)
            .map_err(driver_said("cuEventCreate"))?;
        match driver.mem_host_alloc(Self::bytes(capacity)) {
            Ok((host, device)) => Ok(Self { host, device, capacity, answered }),
            Err(result) => {
                let _ = driver.event_destroy(answered);
                Err(driver_said("cuMemHostRegister")(result))
            }
        }
    }

    /// Whole pages.
    fn bytes(capacity: usize) -> usize {
        (capacity * size_of::<Entry>()).next_multiple_of(PAGE)
    }

    /// They begin at a page.
    fn entries(&self) -> *mut Entry {
        self.host.as_ptr().cast()
    }

    fn write(&mut self, entries: &[Entry]) {
        assert!(entries.len() <= self.capacity);
        // SAFETY: there is room; and no kernel uses the table, because it was spare (see `Scanner::spare`).
        unsafe { self.entries().copy_from_nonoverlapping(entries.as_ptr(), entries.len()) };
    }

    /// The first entries. To be called when the kernel is done with them.
    fn read(&self, entries: usize) -> Vec<Entry> {
        assert!(entries <= self.capacity);
        // SAFETY: `write` has written these, and any bytes that the kernel wrote are good ones.
        (0..entries).map(|index| unsafe { self.entries().add(index).read_volatile() }).collect()
    }

    fn destroy(self, driver: &Driver) {
        let _ = driver.event_destroy(self.answered);
        // SAFETY: it was spare.
        unsafe { driver.mem_free_host(self.host, Self::bytes(self.capacity)) };
    }
}

/// A question that is under way. Its table is pinned until it is finished, or until its context ends.
#[must_use = "the answer is in Scanner::finish"]
pub struct Scan {
    table: Table,
    chunks: usize,
}

impl Scan {
    /// Whether the answer is there, or will never be.
    pub fn is_answered(&self, driver: &Driver) -> bool {
        driver.event_is_past(self.table.answered)
    }
}

/// The kernel, loaded into a context.
pub struct Scanner {
    driver: &'static Driver,
    module: CUmodule,
    kernel: CUfunction,
    /// Tables that no kernel uses.
    spare: Vec<Table>,
}

impl Scanner {
    /// Loads the kernel into the current context. The first time in a process, the driver loads its compiler for that.
    ///
    /// # Errors
    /// The driver's; one without its compiler cannot. Then everything is in use, as far as anybody knows.
    pub fn new(driver: &'static Driver) -> Result<Self, SwapError> {
        let module = driver.module_load_ptx(PTX).map_err(driver_said("cuModuleLoadData"))?;
        let begun = driver.module_function(module, KERNEL).map_err(driver_said("cuModuleGetFunction"));
        let begun = begun.and_then(|kernel| Ok((kernel, Table::new(driver, LEAST)?)));
        match begun {
            Ok((kernel, table)) => {
                // The driver may load a kernel at its first launch; older ones have no call for it, and do it above.
                let _ = driver.func_load(kernel);
                Ok(Self { driver, module, kernel, spare: vec![table] })
            }
            Err(error) => {
                let _ = driver.module_unload(module);
                Err(error)
            }
        }
    }

    /// Asks about chunks, address and bytes of each: whole granules, [`CHUNK`] at most. The GPU looks when `stream`
    /// gets there. Several questions may be under way.
    ///
    /// All of the memory must be mapped, and stay so until the answer is there: an access to any other breaks the
    /// context, the application's.
    ///
    /// # Errors
    /// The driver's, CUDA_ERROR_INVALID_VALUE for what is no chunk. Nothing is being looked at then.
    pub fn scan(&mut self, chunks: &[(CUdeviceptr, u64)], stream: CUstream) -> Result<Scan, SwapError> {
        let no_chunk = || SwapError::Driver { call: "a scan", result: CuResult::INVALID_VALUE };
        let entries = chunks.iter().map(|(address, size)| Entry::ask(*address, *size));
        let entries: Vec<_> = entries.collect::<Option<_>>().ok_or_else(no_chunk)?;
        let slots = u32::try_from(entries.len() * SLOTS).map_err(|_| no_chunk())?;
        let mut table = self.table(entries.len())?;
        table.write(&entries);
        // SAFETY: the kernel's two parameters. It uses the table, which is in nobody else's hands until the event
        // below has passed, and the memory, for which the caller answers.
        let launched = unsafe {
            let parameters = [table.device, u64::from(slots)];
            self.driver.launch(self.kernel, slots.max(1), THREADS, stream, parameters)
        };
        if let Err(result) = launched {
            self.spare.push(table);
            return Err(driver_said("cuLaunchKernel")(result));
        }
        // Without its event nobody will know when the table is free again: it goes with the context.
        self.driver.event_record(table.answered, stream).map_err(driver_said("cuEventRecord"))?;
        Ok(Scan { table, chunks: entries.len() })
    }

    /// Waits for the answer: for each chunk, in the order of the question, a bit for each granule, the lowest for the
    /// first. It is clear if the granule is all zero.
    ///
    /// # Errors
    /// The driver's: the context is broken.
    pub fn finish(&mut self, scan: Scan) -> Result<Vec<u32>, SwapError> {
        let Scan { table, chunks } = scan;
        self.driver.event_synchronize(table.answered).map_err(driver_said("cuEventSynchronize"))?;
        let answer = table.read(chunks).iter().map(Entry::in_use).collect();
        self.spare.push(table);
        Ok(answer)
    }

    /// A table that no kernel uses.
    fn table(&mut self, entries: usize) -> Result<Table, SwapError> {
        match self.spare.iter().position(|table| table.capacity >= entries) {
            Some(index) => Ok(self.spare.swap_remove(index)),
            None => Table::new(self.driver, entries),
        }
    }

    /// Gives everything back, in the context that it was made in. All scans must be finished.
    pub fn destroy(self) {
        for table in self.spare {
            table.destroy(self.driver);
        }
        let _ = self.driver.module_unload(self.module);
    }
}

// SAFETY: the pinned memory of a table is the scanner's alone, and is read and written by whoever has the scanner.
unsafe impl Send for Scanner {}

/// How long an engine waits for the kernel to be loaded: the driver's compiler takes tenths of a second for it, once in a
/// machine's life with each driver.
const LOADED_WITHIN: Duration = Duration::from_secs(2);

/// How long a context does not end because a kernel is being loaded into it. It is longer than any compiler takes: what takes
/// longer waits for the dynamic loader's lock, which was free a moment ago, and whoever took it may be the one who ends the
/// context.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(30);

/// The kernel, as it is being loaded.
///
/// The driver opens its compiler for that, which is a library, and so needs the dynamic loader's lock. A library that does
/// CUDA work in a constructor holds that lock while it waits at the gate for this client's next turn. So a thread of its own
/// loads the kernel; the engine waits for it once, and until it is there copies zeros like anything else.
///
/// The library may also end its context in the constructor. So the thread does not begin before the lock is free, and until
/// then it can be told not to.
pub struct Loading {
    loaded: Receiver<Result<Scanner, SwapError>>,
    step: Arc<AtomicU8>,
    waited: bool,
}

/// The thread has made no call of the driver's yet.
const WAITS: u8 = 0;
/// The driver loads the kernel, or has loaded it.
const LOADS: u8 = 1;
/// The thread is to make no call of the driver's.
const GIVEN_UP: u8 = 2;

/// Goes from one step to another, if that is the one.
fn go(step: &AtomicU8, from: u8, to: u8) -> bool {
    step.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
}

/// Waits until the dynamic loader's lock is free.
fn await_loader() {
    // SAFETY: without a name it is the program itself, which stays.
    unsafe { libc::dlclose(libc::dlopen(std::ptr::null(), libc::RTLD_LAZY)) };
}

impl Loading {
    /// Begins to load the kernel into a context.
    ///
    /// # Errors
    /// The system has no thread for it.
    pub fn begin(driver: &'static Driver, context: CUcontext) -> std::io::Result<Self> {
        let (tell, loaded) = sync_channel(1);
        let step = Arc::new(AtomicU8::new(WAITS));
        let begins = step.clone();
        std::thread::Builder::new().name("nvshare-scan".into()).spawn(move || {
            // The application's signals are for its own threads, and their captures none of this one's business.
            let _ = nix::sys::signal::SigSet::all().thread_set_mask();
            await_loader();
            if !go(&begins, WAITS, LOADS) {
                return;
            }
            let _ = driver.exchange_capture_mode(CU_STREAM_CAPTURE_MODE_RELAXED);
            let current = driver.ctx_set_current(context).map_err(driver_said("cuCtxSetCurrent"));
            // Whoever does not wait any more has given the context up: the kernel goes with it.
            let _ = tell.send(current.and_then(|()| Scanner::new(driver)));
        })?;
        Ok(Self { loaded, step, waited: false })
    }

    /// The kernel, or why there is none; `None` if it is not there yet.
    pub fn look(&mut self) -> Option<Result<Scanner, SwapError>> {
        let patience = if self.waited { Duration::ZERO } else { LOADED_WITHIN };
        self.waited = true;
        match self.loaded.recv_timeout(patience) {
            Ok(loaded) => Some(loaded),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                Some(Err(SwapError::Panic("while loading a kernel".into())))
            }
        }
    }
}

impl Drop for Loading {
    /// Waits until nothing is loaded any more, and gives the kernel back if nobody has it. The context may end only then: the
    /// driver would go on in memory that it has freed.
    fn drop(&mut self) {
        if go(&self.step, WAITS, GIVEN_UP) {
            return;
        }
        match self.loaded.recv_timeout(GIVEN_UP_WITHIN) {
            Ok(Ok(scanner)) => scanner.destroy(),
            Ok(Err(_)) | Err(RecvTimeoutError::Disconnected) => {}
            Err(RecvTimeoutError::Timeout) => tracing::error!(
                "a context ends although the driver has been loading a kernel into it for {} s; the driver may crash",
                GIVEN_UP_WITHIN.as_secs()
            ),
        }
    }
}

#[cfg(test)]
mod tests;
