//! Physical memory: extents of memfds.
//!
//! Nearly all of it lies in one memfd of the process, sparse and far larger than any GPU. Extents are handed out once
//! and never again, and giving one back punches a hole. So fresh memory is always zero, freed memory costs nothing, and
//! a process needs a single descriptor however many allocations it has. Memory that may be exported as a file
//! descriptor is the exception: it has a memfd of its own, with a page behind the bytes that says what it is (see
//! [`super::sharing`]).
//!
//! What is charged to a GPU is booked in its ledger for as long as the memory lives: until the last handle is released
//! and the last mapping is gone, in the last process that has any.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use simstate::shared::Share;
use simstate::{Kind, Ledger, counters::Count};

use super::sharing::Hold;
use crate::abi::{Error, Handle, MemLocation, Result};
use crate::driver::lock;

/// As much as a memfd is made to hold.
pub const FILE_BYTES: u64 = 1 << 46;

/// The process's memfd.
pub struct Backing {
    file: Arc<OwnedFd>,
    next: AtomicU64,
}

impl Backing {
    pub fn new() -> io::Result<Backing> {
        Ok(Backing { file: memfd(FILE_BYTES)?, next: AtomicU64::new(0) })
    }

    /// Bytes that nobody ever had.
    pub fn extent(&self, size: u64) -> Result<Extent> {
        let offset = self.next.fetch_add(size, Ordering::Relaxed);
        if offset.saturating_add(size) > FILE_BYTES {
            return Err(Error::OUT_OF_MEMORY);
        }
        Ok(Extent { file: self.file.clone(), offset, size })
    }
}

/// Makes a sparse file of zeros.
pub fn memfd(size: u64) -> io::Result<Arc<OwnedFd>> {
    // SAFETY: the name is a C string; the call has no other preconditions.
    let fd = unsafe { libc::memfd_create(c"simulated-gpu".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nobody else owns it.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: changes the size of our own file.
    if unsafe { libc::ftruncate(file.as_raw_fd(), size as libc::off_t) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Arc::new(file))
}

/// Part of a memfd, of this process or of another one.
#[derive(Clone)]
pub struct Extent {
    pub file: Arc<OwnedFd>,
    pub offset: u64,
    pub size: u64,
}

impl Extent {
    pub fn fd(&self) -> i32 {
        self.file.as_raw_fd()
    }

    /// Frees the pages. Only when nothing maps them any more.
    fn punch(&self) {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (offset, size) = (self.offset as libc::off_t, self.size as libc::off_t);
        // SAFETY: frees pages of a memfd that nothing maps any more, since every mapping keeps its allocation.
        unsafe { libc::fallocate(self.fd(), mode, offset, size) };
    }
}

/// Books bytes with a GPU.
pub fn charge(ledger: &Ledger, size: u64) -> Result {
    if ledger.take(Kind::Allocation, size).is_err() {
        ledger.count(Count::OutOfMemory, 1);
        return Err(Error::OUT_OF_MEMORY);
    }
    Ok(())
}

/// A physical allocation.
pub struct Physical {
    pub extent: Extent,
    /// Its handle, which may be released while mappings keep the allocation alive.
    pub handle: Handle,
    pub location: MemLocation,
    /// `CUmemAllocationHandleType`s by which it can be exported.
    pub handle_types: u32,
    /// It came from another process.
    pub imported: bool,
    /// The account of its GPU, if it is on one.
    ledger: Option<&'static Ledger>,
    /// The process's part in it, if others may have one too. Until then, this process pays.
    hold: Mutex<Option<Hold>>,
}

impl Physical {
    /// Makes `size` bytes of zeros, charged to `ledger` or to nobody.
    pub fn new(
        backing: &Backing,
        handle: Handle,
        size: u64,
        location: MemLocation,
        ledger: Option<&'static Ledger>,
    ) -> Result<Physical> {
        Physical::charged(handle, location, 0, ledger, size, || backing.extent(size))
    }

    /// The same, of bytes that `extent` makes once they are paid for.
    pub fn charged(
        handle: Handle,
        location: MemLocation,
        handle_types: u32,
        ledger: Option<&'static Ledger>,
        size: u64,
        extent: impl FnOnce() -> Result<Extent>,
    ) -> Result<Physical> {
        if let Some(ledger) = ledger {
            charge(ledger, size)?;
        }
        let hold = Mutex::default();
        match extent() {
            Ok(extent) => {
                Ok(Physical { extent, handle, location, handle_types, imported: false, ledger, hold })
            }
            Err(error) => {
                ledger.inspect(|ledger| ledger.give(Kind::Allocation, size));
                Err(error)
            }
        }
    }

    /// What another process made and this one holds by `hold`.
    pub fn joined(
        extent: Extent,
        handle: Handle,
        location: MemLocation,
        handle_types: u32,
        hold: Option<Hold>,
    ) -> Physical {
        let ledger = hold.as_ref().map(Hold::ledger);
        Physical { extent, handle, location, handle_types, imported: true, ledger, hold: Mutex::new(hold) }
    }

    pub fn size(&self) -> u64 {
        self.extent.size
    }

    /// Lets other processes hold it too; `None` if it is on no GPU, where there is nothing to count.
    pub fn share(&self) -> Result<Option<Share>> {
        let Some(ledger) = self.ledger else { return Ok(None) };
        let mut hold = lock(&self.hold);
        if let Some(hold) = &*hold {
            return Ok(Some(hold.share()));
        }
        let share = ledger.share(self.size()).ok_or(Error::OUT_OF_MEMORY)?;
        *hold = Some(Hold::first(ledger, share));
        Ok(Some(share))
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        let last = match lock(&self.hold).take() {
            Some(hold) => hold.release(),
            None => {
                self.ledger.inspect(|ledger| ledger.give(Kind::Allocation, self.size()));
                true
            }
        };
        // A file of its own frees its pages by itself, since a descriptor of it may be on its way somewhere.
        if last && self.handle_types == 0 {
            self.extent.punch();
        }
    }
}
