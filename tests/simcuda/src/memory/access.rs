//! Moving bytes: the only place that reads and writes device memory.
//!
//! Work is done in pieces of a MiB. For every piece the address table is locked for reading and asked again, so a
//! range that is unmapped in the middle of an operation makes it fail at the next piece, and nothing ever faults.
//! Pageable host memory, which no table knows, is read and written through the kernel (`process_vm_readv` on
//! ourselves), which says so if it isn't there.

use std::sync::RwLockReadGuard;

use super::Memory;
use super::va::{Place, Space, User};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Release};

use crate::abi::{Error, Result};

const PIECE: u64 = 1 << 20;

/// One end of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Known to the table.
    Known(Place),
    /// Ordinary host memory.
    Pageable,
}

/// What a caller said about an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The GPU must be able to use it.
    Device,
    /// The host's, unless the table knows better.
    Host,
    /// Of an array.
    Array,
}

impl Memory {
    fn table(&self) -> RwLockReadGuard<'_, Space> {
        self.space.read().unwrap_or_else(|e| e.into_inner())
    }

    /// Where a range is; an error if it can't be used.
    pub fn locate(&self, address: u64, len: u64, user: User, side: Side, write: bool) -> Result<End> {
        let table = self.table();
        if side == Side::Host && table.find(address).is_none() {
            return Ok(End::Pageable);
        }
        table.check(address, len.max(1), user, write).map(End::Known)
    }

    /// Copies `len` bytes between two ranges as [`Memory::locate`] found them for these users.
    pub fn copy(&self, dst: (u64, End, User), src: (u64, End, User), len: u64) -> Result {
        let mut done = 0;
        while done < len {
            let n = PIECE.min(len - done);
            let (to, from) = (dst.0 + done, src.0 + done);
            let table = self.table();
            if matches!(src.1, End::Known(_)) {
                table.check(from, n, src.2, false)?;
            }
            if matches!(dst.1, End::Known(_)) {
                table.check(to, n, dst.2, true)?;
            }
            if dst.1 == End::Pageable || src.1 == End::Pageable {
                through_kernel(to, dst.1 == End::Pageable, from, n)?;
            } else {
                // SAFETY: the table vouches for both ranges while its lock is held.
                unsafe { std::ptr::copy(from as *const u8, to as *mut u8, n as usize) };
            }
            done += n;
        }
        Ok(())
    }

    /// Writes a pattern of 1, 2 or 4 bytes over a range.
    pub fn fill(&self, user: User, address: u64, value: u32, width: u64, count: u64) -> Result {
        self.pieces(user, &[Range { address, element: width, write: true }], count, |at, _, n| {
            let at = at[0];
            for i in 0..n as usize {
                // SAFETY: `pieces` vouches for `n` elements of `width` bytes at `at`.
                unsafe {
                    match width {
                        1 => (at as *mut u8).add(i).write_unaligned(value as u8),
                        2 => (at as *mut u16).add(i).write_unaligned(value as u16),
                        _ => (at as *mut u32).add(i).write_unaligned(value),
                    }
                }
            }
        })
    }

    /// Checks several arrays of `count` elements without touching them.
    pub fn check_arrays(&self, user: User, arrays: &[Range], count: u64) -> Result {
        let table = self.table();
        for array in arrays {
            let len = array.element.checked_mul(count).ok_or(Error::ILLEGAL_ADDRESS)?;
            if len > 0 {
                table.check(array.address, len, user, array.write)?;
            }
        }
        Ok(())
    }

    /// Walks over arrays of `count` elements in step. `f` gets the addresses of a piece of each, the number of the
    /// first element and how many there are, and may use them until it returns.
    pub fn pieces(
        &self,
        user: User,
        arrays: &[Range],
        count: u64,
        mut f: impl FnMut(&[u64], u64, u64),
    ) -> Result {
        let widest = arrays.iter().map(|array| array.element).max().unwrap_or(1);
        let mut done = 0;
        while done < count {
            let n = (PIECE / widest).min(count - done);
            let table = self.table();
            let mut at = [0; 3];
            for (array, at) in arrays.iter().zip(&mut at) {
                *at = array.address + done * array.element;
                table.check(*at, n * array.element, user, array.write)?;
            }
            f(&at[..arrays.len()], done, n);
            done += n;
        }
        Ok(())
    }

    /// Reads a word of 64 or 32 bits that the GPU can use, as it is at this moment: others may be writing it.
    pub fn read_word(&self, user: User, address: u64, wide: bool) -> Result<u64> {
        let table = self.table();
        table.check(address, if wide { 8 } else { 4 }, user, false)?;
        // SAFETY: the table vouches for the word while its lock is held, and the caller for its alignment.
        Ok(unsafe {
            if wide {
                AtomicU64::from_ptr(address as *mut u64).load(Acquire)
            } else {
                AtomicU32::from_ptr(address as *mut u32).load(Acquire).into()
            }
        })
    }

    /// Writes one.
    pub fn write_word(&self, user: User, address: u64, value: u64, wide: bool) -> Result {
        let table = self.table();
        table.check(address, if wide { 8 } else { 4 }, user, true)?;
        // SAFETY: as above.
        unsafe {
            if wide {
                AtomicU64::from_ptr(address as *mut u64).store(value, Release);
            } else {
                AtomicU32::from_ptr(address as *mut u32).store(value as u32, Release);
            }
        }
        Ok(())
    }

    /// Lets `f` use one 64-bit word of device memory.
    pub fn with_word(&self, user: User, address: u64, f: impl FnOnce(&mut u64)) -> Result {
        let table = self.table();
        table.check(address, 8, user, true)?;
        // SAFETY: the table vouches for the word while its lock is held. Kernels check its alignment.
        let mut word = unsafe { (address as *const u64).read_unaligned() };
        f(&mut word);
        // SAFETY: as above.
        unsafe { (address as *mut u64).write_unaligned(word) };
        Ok(())
    }
}

/// An array of device memory that an operation uses.
#[derive(Clone, Copy)]
pub struct Range {
    pub address: u64,
    /// Bytes of an element.
    pub element: u64,
    pub write: bool,
}

/// Copies with pageable memory at one end or both.
fn through_kernel(dst: u64, dst_pageable: bool, src: u64, len: u64) -> Result {
    let iov = |address: u64| libc::iovec { iov_base: address as *mut _, iov_len: len as usize };
    let (to, from) = (iov(dst), iov(src));
    // The "remote" end is the one that may not be there; the "local" one must be. Where both are pageable, the kernel
    // answers EFAULT for either.
    // SAFETY: the kernel checks both ranges itself; the end that isn't pageable is vouched for by the table.
    let copied = unsafe {
        // By its own number: the first thread, whose number is the process's, may have ended.
        let me = libc::gettid();
        if dst_pageable {
            libc::process_vm_writev(me, &from, 1, &to, 1, 0)
        } else {
            libc::process_vm_readv(me, &to, 1, &from, 1, 0)
        }
    };
    if copied == len as isize {
        return Ok(());
    }
    let refused = std::io::Error::last_os_error().raw_os_error();
    if copied < 0 && matches!(refused, Some(libc::ENOSYS | libc::EPERM)) {
        // A sandbox without these calls: trust the application, as memcpy would.
        // SAFETY: the application vouches for its own memory, the table for the device's.
        unsafe { std::ptr::copy(src as *const u8, dst as *mut u8, len as usize) };
        return Ok(());
    }
    Err(Error::ILLEGAL_ADDRESS)
}
