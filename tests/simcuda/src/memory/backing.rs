//! Physical memory: extents of one memfd.
//!
//! The memfd is sparse and far larger than any GPU, extents are handed out once and never again, and giving one back
//! punches a hole. So fresh memory is always zero, freed memory costs nothing, and a process needs a single descriptor
//! however many allocations it has. What is charged to a GPU is booked in its ledger for as long as the extent lives:
//! until the last handle is released and the last mapping is gone.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use simstate::{Kind, Ledger, counters::Count};

use crate::abi::{Error, Handle, MemLocation, Result};

const FILE_BYTES: u64 = 1 << 46;

/// The memfd.
pub struct Backing {
    file: OwnedFd,
    next: AtomicU64,
}

impl Backing {
    pub fn new() -> io::Result<Backing> {
        // SAFETY: the name is a C string; the call has no other preconditions.
        let fd = unsafe { libc::memfd_create(c"simulated-gpu".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and nobody else owns it.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: changes the size of our own file.
        if unsafe { libc::ftruncate(file.as_raw_fd(), FILE_BYTES as libc::off_t) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Backing { file, next: AtomicU64::new(0) })
    }

    pub fn fd(&self) -> i32 {
        self.file.as_raw_fd()
    }
}

/// A physical allocation.
pub struct Physical {
    backing: Arc<Backing>,
    /// Its handle, which may be released while mappings keep the allocation alive.
    pub handle: Handle,
    pub offset: u64,
    pub size: u64,
    pub location: MemLocation,
    charge: Option<&'static Ledger>,
}

impl Physical {
    /// Makes `size` bytes of zeros, charged to `charge` or to nobody.
    pub fn new(
        backing: Arc<Backing>,
        handle: Handle,
        size: u64,
        location: MemLocation,
        charge: Option<&'static Ledger>,
    ) -> Result<Physical> {
        if let Some(ledger) = charge
            && ledger.take(Kind::Allocation, size).is_err()
        {
            ledger.count(Count::OutOfMemory, 1);
            return Err(Error::OUT_OF_MEMORY);
        }
        let offset = backing.next.fetch_add(size, Ordering::Relaxed);
        let physical = Physical { backing, handle, offset, size, location, charge };
        if offset.saturating_add(size) > FILE_BYTES { Err(Error::OUT_OF_MEMORY) } else { Ok(physical) }
    }

    pub fn fd(&self) -> i32 {
        self.backing.fd()
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (offset, size) = (self.offset as libc::off_t, self.size as libc::off_t);
        // SAFETY: frees pages of our own file that nothing maps any more, since every mapping keeps its allocation.
        unsafe { libc::fallocate(self.fd(), mode, offset, size) };
        if let Some(ledger) = self.charge {
            ledger.give(Kind::Allocation, self.size);
        }
    }
}
