//! Memory of other processes: how an allocation is told of, and how a process takes part in one.
//!
//! The bytes are a memfd that several processes map. How much of a GPU they take is counted once, in a slot of the
//! shared segment ([`simstate::shared`]); a [`Hold`] is this process's part in that.
//!
//! - **A file descriptor** (`cuMemExportToShareableHandle`) is the memfd itself. Behind the bytes is a page that says
//!   what they are ([`Label`]), for the process that the descriptor comes to.
//! - **An IPC handle** (`cuIpcGetMemHandle`) is 64 bytes that say where a part of some process's memfd is. It is opened
//!   through `/proc`, so that process has to live, as with the real driver.
//!
//! A descriptor that is under way while no process holds the memory keeps the bytes but not the room, which whoever
//! imports it has to find anew. The real driver keeps both.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use simstate::Ledger;
use simstate::shared::Share;

use super::backing::{self, Extent, Physical};
use crate::abi::{Error, Handle, IpcHandle, LOCATION_DEVICE, MemLocation, Result};
use crate::driver::{Driver, lock};

/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
pub const HANDLE_FD: u32 = 1;

const PAGE: u64 = 4096;
const WORD: usize = size_of::<u64>();

const IPC: u64 = u64::from_le_bytes(*b"sim-ipc1");

/// How often this process holds what several may; it joins with the first and leaves with the last.
static HOLDS: Mutex<Option<HashMap<(usize, Share), usize>>> = Mutex::new(None);

/// This process's part in an allocation that several may hold.
pub struct Hold {
    ledger: &'static Ledger,
    share: Share,
}

impl Hold {
    fn key(&self) -> (usize, Share) {
        (std::ptr::from_ref(self.ledger) as usize, self.share)
    }

    /// Of the process that made the allocation and has just shared it.
    pub fn first(ledger: &'static Ledger, share: Share) -> Hold {
        let hold = Hold { ledger, share };
        *lock(&HOLDS).get_or_insert_default().entry(hold.key()).or_default() += 1;
        hold
    }

    /// Takes part in what somebody holds; `None` if nobody does any more.
    pub fn join(ledger: &'static Ledger, share: Share) -> Option<Hold> {
        let hold = Hold { ledger, share };
        let mut holds = lock(&HOLDS);
        let holds = holds.get_or_insert_default();
        if !holds.contains_key(&hold.key()) && !ledger.join(share) {
            return None;
        }
        *holds.entry(hold.key()).or_default() += 1;
        Some(hold)
    }

    pub fn ledger(&self) -> &'static Ledger {
        self.ledger
    }

    pub fn share(&self) -> Share {
        self.share
    }

    /// Ends it; says whether nobody holds the allocation any more.
    pub fn release(self) -> bool {
        let mut holds = lock(&HOLDS);
        let holds = holds.get_or_insert_default();
        let count = holds.entry(self.key()).or_default();
        *count = count.saturating_sub(1);
        *count == 0 && holds.remove(&self.key()).is_some() && self.ledger.leave(self.share)
    }
}

/// What the page behind exportable memory says.
#[derive(Clone, Copy)]
struct Label {
    size: u64,
    location: MemLocation,
    handle_types: u32,
    /// Zeros until it is exported.
    share: Share,
}

const LABEL: u64 = u64::from_le_bytes(*b"sim-vmm1");
const LABEL_WORDS: usize = 7;

impl Label {
    fn words(&self, driver: &Driver) -> [u64; LABEL_WORDS] {
        let location = u64::from(self.location.kind) << 32 | u64::from(self.location.id as u32);
        let Share { slot, identity } = self.share;
        [LABEL, machine(driver), self.size, location, self.handle_types.into(), slot, identity]
    }

    fn write(&self, driver: &Driver, fd: i32) -> Result {
        let bytes: Vec<u8> = self.words(driver).iter().flat_map(|word| word.to_le_bytes()).collect();
        // SAFETY: writes the bytes of a vector to a file.
        let n = unsafe { libc::pwrite(fd, bytes.as_ptr().cast(), bytes.len(), self.size as libc::off_t) };
        if n == bytes.len() as isize { Ok(()) } else { Err(Error::OPERATING_SYSTEM) }
    }

    /// Reads the label of a file that any process may have passed: nothing about it is certain.
    fn read(driver: &Driver, fd: i32) -> Result<Label> {
        // SAFETY: asks about a descriptor, which the kernel checks, into a struct made of integers.
        let len = unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            if libc::fstat(fd, &mut stat) < 0 { 0 } else { stat.st_size as u64 }
        };
        let size = len.checked_sub(PAGE).ok_or(Error::INVALID_VALUE)?;
        let mut bytes = [0u8; LABEL_WORDS * WORD];
        // SAFETY: reads as many bytes as the array has.
        let n = unsafe { libc::pread(fd, bytes.as_mut_ptr().cast(), bytes.len(), size as libc::off_t) };
        let word = |i: usize| {
            let mut word = [0; WORD];
            word.copy_from_slice(&bytes[i * WORD..][..WORD]);
            u64::from_le_bytes(word)
        };
        let ours = n == bytes.len() as isize && word(0) == LABEL && word(1) == machine(driver);
        if !ours || word(2) != size || size == 0 {
            return Err(Error::INVALID_VALUE);
        }
        Ok(Label {
            size,
            location: MemLocation { kind: (word(3) >> 32) as u32, id: word(3) as u32 as i32 },
            handle_types: word(4) as u32,
            share: Share { slot: word(5), identity: word(6) },
        })
    }
}

/// Tells machines apart.
fn machine(driver: &Driver) -> u64 {
    u64::from_le_bytes(driver.segment.uuid(0)[..WORD].try_into().unwrap_or_default())
}

/// Makes memory that can be exported as a file descriptor.
pub fn exportable(
    driver: &Driver,
    handle: Handle,
    size: u64,
    location: MemLocation,
    ledger: Option<&'static Ledger>,
) -> Result<Physical> {
    Physical::charged(handle, location, HANDLE_FD, ledger, size, || {
        let file = backing::memfd(size + PAGE).map_err(|_| Error::OPERATING_SYSTEM)?;
        let share = Share { slot: 0, identity: 0 };
        Label { size, location, handle_types: HANDLE_FD, share }.write(driver, file.as_raw_fd())?;
        Ok(Extent { file, offset: 0, size })
    })
}

fn duplicate(fd: i32) -> Result<OwnedFd> {
    // SAFETY: the kernel checks the descriptor.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if copy < 0 {
        return Err(Error::INVALID_VALUE);
    }
    // SAFETY: the copy was just made and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// A descriptor of the caller's own for exportable memory. Who has imported it cannot export it again, as on an H200.
pub fn export(driver: &Driver, physical: &Physical) -> Result<OwnedFd> {
    if physical.imported {
        return Err(Error::INVALID_VALUE);
    }
    if let Some(share) = physical.share()? {
        let (location, handle_types) = (physical.location, physical.handle_types);
        Label { size: physical.size(), location, handle_types, share }.write(driver, physical.extent.fd())?;
    }
    duplicate(physical.extent.fd())
}

/// Changes the first byte.
fn spoil(fd: i32) -> Result {
    let mut byte = [0u8];
    // SAFETY: reads and writes one byte of a file, from and to a byte of our own.
    let done = unsafe {
        let read = libc::pread(fd, byte.as_mut_ptr().cast(), 1, 0);
        byte[0] ^= 1;
        read == 1 && libc::pwrite(fd, byte.as_ptr().cast(), 1, 0) == 1
    };
    if done { Ok(()) } else { Err(Error::OPERATING_SYSTEM) }
}

/// The memory that a descriptor stands for; the descriptor stays the caller's.
pub fn import(driver: &'static Driver, fd: i32, handle: Handle) -> Result<Physical> {
    let mut label = Label::read(driver, fd)?;
    let file = Arc::new(duplicate(fd)?);
    if driver.config.spoil_imports {
        spoil(fd)?;
    }
    let extent = Extent { file, offset: 0, size: label.size };
    let (location, types) = (label.location, label.handle_types);
    if location.kind != LOCATION_DEVICE {
        return Ok(Physical::joined(extent, handle, location, types, None));
    }
    let ledger = driver.device(location.id)?.ledger()?;
    if let Some(hold) = Hold::join(ledger, label.share) {
        return Ok(Physical::joined(extent, handle, location, types, Some(hold)));
    }
    let mut physical = Physical::charged(handle, location, types, Some(ledger), label.size, || Ok(extent))?;
    physical.imported = true;
    if let Some(share) = physical.share()? {
        label.share = share;
        label.write(driver, fd)?;
    }
    Ok(physical)
}

/// Where a part of a process's memfd is, for other processes: the first words of an IPC handle.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Whereabouts {
    pid: u32,
    fd: i32,
    /// Which file that descriptor was.
    inode: u64,
    offset: u64,
    size: u64,
}

fn inode(fd: i32) -> Result<u64> {
    // SAFETY: asks about a descriptor, which the kernel checks, into a struct made of integers.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        if libc::fstat(fd, &mut stat) < 0 { Err(Error::INVALID_VALUE) } else { Ok(stat.st_ino) }
    }
}

impl Whereabouts {
    pub fn of(extent: &Extent) -> Result<Whereabouts> {
        let (fd, pid) = (extent.fd(), std::process::id());
        Ok(Whereabouts { pid, fd, inode: inode(fd)?, offset: extent.offset, size: extent.size })
    }

    /// An IPC handle with it and two words more, of a kind that `kind` tells from others.
    pub fn handle(&self, driver: &Driver, kind: u64, more: [u64; 2]) -> IpcHandle {
        let place = u64::from(self.pid) << 32 | u64::from(self.fd as u32);
        let mark = IPC ^ machine(driver);
        IpcHandle::new([mark, kind, place, self.inode, self.offset, self.size, more[0], more[1]])
    }

    /// Reads a handle, which may be any 64 bytes. One of this very process can't be opened.
    pub fn read(driver: &Driver, kind: u64, handle: &IpcHandle) -> Result<(Whereabouts, [u64; 2])> {
        let [mark, has, place, inode, offset, size, more @ ..] = handle.words();
        if mark != IPC ^ machine(driver) || has != kind {
            return Err(Error::INVALID_VALUE);
        }
        let pid = (place >> 32) as u32;
        if pid == std::process::id() {
            return Err(Error::INVALID_CONTEXT);
        }
        Ok((Whereabouts { pid, fd: place as u32 as i32, inode, offset, size }, more))
    }

    /// Opens the other process's file; an error if that process, or the file, is gone.
    pub fn open(&self) -> Result<Extent> {
        let path = format!("/proc/{}/fd/{}", self.pid, self.fd);
        let file = std::fs::File::options().read(true).write(true).open(path);
        let file = Arc::new(OwnedFd::from(file.map_err(|_| Error::INVALID_VALUE)?));
        let end = self.offset.checked_add(self.size).ok_or(Error::INVALID_VALUE)?;
        let aligned = self.offset.is_multiple_of(PAGE) && self.size.is_multiple_of(PAGE) && self.size > 0;
        if inode(file.as_raw_fd())? != self.inode || !aligned || end > backing::FILE_BYTES {
            return Err(Error::INVALID_VALUE);
        }
        Ok(Extent { file, offset: self.offset, size: self.size })
    }
}

/// `kind` of a handle of memory: its GPU is part of it.
const IPC_MEMORY: u64 = 0x100;

/// An IPC handle of a `cuMemAlloc` allocation.
pub fn ipc_handle(driver: &Driver, physical: &Physical) -> Result<IpcHandle> {
    let share = physical.share()?.ok_or(Error::INVALID_VALUE)?;
    let kind = IPC_MEMORY | physical.location.id as u64;
    Ok(Whereabouts::of(&physical.extent)?.handle(driver, kind, [share.slot, share.identity]))
}

/// Opens the memory of an IPC handle.
pub fn open_ipc(driver: &'static Driver, handle: &IpcHandle) -> Result<Physical> {
    let kind = handle.words()[1];
    let device = driver.device((kind & 0xff) as i32).map_err(|_| Error::INVALID_VALUE)?;
    let (place, [slot, identity]) = Whereabouts::read(driver, IPC_MEMORY | device.index as u64, handle)?;
    let extent = place.open()?;
    let hold = Hold::join(device.ledger()?, Share { slot, identity }).ok_or(Error::INVALID_VALUE)?;
    let location = MemLocation { kind: LOCATION_DEVICE, id: device.index as i32 };
    Ok(Physical::joined(extent, 0, location, 0, Some(hold)))
}
