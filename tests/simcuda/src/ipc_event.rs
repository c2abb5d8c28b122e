//! Events that several processes use (`CU_EVENT_INTERPROCESS`).
//!
//! They are two numbers in memory that the processes share: how often the event has been recorded, and up to which of
//! those its streams have come. Waiting for it is waiting for the last recording at that moment. A process that dies
//! never comes to what it has recorded, so the last recorder is noted too, and nobody waits for a dead one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use simstate::process::ProcessId;

use crate::abi::{Error, IpcHandle, Result};
use crate::driver::Driver;
use crate::memory::backing::Extent;
use crate::memory::sharing::Whereabouts;

/// `kind` of the handle of an event.
const IPC_EVENT: u64 = 0x200;

const BYTES: u64 = 64 << 10;

/// How long a waiter sleeps between looks: processes of a simulated machine have no other bell.
const NAP: Duration = Duration::from_micros(20);

/// The part that processes share. All zeros is an event that was never recorded.
#[repr(C)]
struct Words {
    recorded: AtomicU64,
    reached: AtomicU64,
    recorder: AtomicU64,
}

/// An event of several processes, as one of them sees it.
pub struct SharedEvent {
    extent: Extent,
    words: &'static Words,
}

impl SharedEvent {
    pub fn create(driver: &Driver) -> Result<Arc<SharedEvent>> {
        SharedEvent::map(driver.memory.backing.extent(BYTES)?)
    }

    pub fn open(driver: &Driver, handle: &IpcHandle) -> Result<Arc<SharedEvent>> {
        let (place, _) = Whereabouts::read(driver, IPC_EVENT, handle)?;
        SharedEvent::map(place.open()?)
    }

    fn map(extent: Extent) -> Result<Arc<SharedEvent>> {
        let (rw, offset) = (libc::PROT_READ | libc::PROT_WRITE, extent.offset as libc::off_t);
        let (nowhere, len) = (std::ptr::null_mut(), BYTES as usize);
        // SAFETY: maps part of a memfd at an address that the kernel chooses.
        let at = unsafe { libc::mmap(nowhere, len, rw, libc::MAP_SHARED, extent.fd(), offset) };
        if at == libc::MAP_FAILED || extent.size != BYTES {
            return Err(Error::OUT_OF_MEMORY);
        }
        // SAFETY: the mapping is longer than the words, page-aligned, and stays until the event is dropped; the words
        // are atomics, which other processes may change at any time and for which any bytes are valid.
        let words = unsafe { &*at.cast::<Words>() };
        Ok(Arc::new(SharedEvent { extent, words }))
    }

    pub fn handle(&self, driver: &Driver) -> Result<IpcHandle> {
        Ok(Whereabouts::of(&self.extent)?.handle(driver, IPC_EVENT, [0; 2]))
    }

    /// Notes a recording; its number.
    pub fn record(&self) -> u64 {
        self.words.recorder.store(ProcessId::current().bits(), SeqCst);
        self.words.recorded.fetch_add(1, SeqCst) + 1
    }

    /// The stream has come to the recording of that number.
    pub fn reach(&self, number: u64) {
        self.words.reached.fetch_max(number, SeqCst);
    }

    /// The number of the last recording.
    pub fn last(&self) -> u64 {
        self.words.recorded.load(SeqCst)
    }

    pub fn reached(&self, number: u64) -> bool {
        self.words.reached.load(SeqCst) >= number
    }

    /// Waits for the recording of that number.
    pub fn wait(&self, number: u64) {
        let mut naps = 0u32;
        while !self.reached(number) {
            naps += 1;
            let recorder = ProcessId::from_bits(self.words.recorder.load(SeqCst));
            if naps.is_multiple_of(64) && !recorder.alive() {
                return;
            }
            std::thread::sleep(NAP);
        }
    }
}

impl Drop for SharedEvent {
    fn drop(&mut self) {
        let at = std::ptr::from_ref(self.words).cast_mut();
        // SAFETY: the mapping is this event's, and nobody can reach its words any more.
        unsafe { libc::munmap(at.cast(), BYTES as usize) };
    }
}
