//! Finds the granules that hold only zeros, so that they are never copied: a framework that allocates most of the
//! GPU and uses a little of it then switches at the cost of what it uses. The kernel scans 16 GiB in 4 ms
//! (docs/driver-facts.md).
//!
//! A wrong "all zero" loses an application's data, a wrong "in use" costs a copy of 2 MiB. So a granule counts as zero only
//! if the kernel has read all of it and written so; in every other case it counts as in use.

use crate::cuda::abi::CUdeviceptr;
use crate::memory::scan::compiled::{Compiled, compiled};
use crate::memory::scan::{Entry, SLOTS};
use std::ffi::CStr;

/// What the kernel writes for a granule that is all zero.
const ZERO: u8 = 1;

/// One chunk in the table: the kernel writes a byte for each granule.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ZeroEntry {
    address: CUdeviceptr,
    granules: u64,
    zero: [u8; SLOTS],
}

// SAFETY: every byte is a valid one.
unsafe impl Entry for ZeroEntry {
    const PTX: &'static CStr =
        match CStr::from_bytes_with_nul(concat!(include_str!("zero_scan.ptx"), "\0").as_bytes()) {
            Ok(text) => text,
            Err(_) => panic!("the text has no NUL"),
        };
    const COMPILED: &'static [Compiled] = compiled!("zero_scan");
    const KERNEL: &'static CStr = c"nvshare_zero_granules";
    /// A bit for each granule, the lowest for the first. It is clear if the granule is all zero.
    type Answer = u32;

    fn new(address: CUdeviceptr, granules: u64) -> Self {
        Self { address, granules, zero: [0; SLOTS] }
    }

    fn answer(&self) -> u32 {
        (0..self.granules as usize).filter(|i| self.zero[*i] != ZERO).fold(0, |bits, i| bits | 1 << i)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::CHUNK;
    use crate::memory::scan::THREADS;
    use nvshare::units::GRANULE;

    #[test]
    fn an_entry_is_what_the_kernel_reads() {
        assert_eq!(size_of::<ZeroEntry>(), 48);
        assert_eq!(std::mem::offset_of!(ZeroEntry, granules), 8);
        assert_eq!(std::mem::offset_of!(ZeroEntry, zero), 16);
        let kernel = include_str!("zero_scan.ptx");
        assert!(kernel.contains(&format!(".entry {}(", ZeroEntry::KERNEL.to_str().unwrap())));
        assert!(kernel.contains(&format!(".reqntid {THREADS}, 1, 1")));
        assert!(kernel.contains(&format!("add.u64         %end, %at, {GRANULE};")));
    }

    #[test]
    fn granules_that_were_not_found_zero_are_in_use() {
        let mut entry = ZeroEntry::new(CHUNK, CHUNK / GRANULE);
        assert_eq!(entry.answer(), u32::MAX, "no answer");
        entry.zero = [ZERO; SLOTS];
        assert_eq!(entry.answer(), 0);
        entry.zero[31] = 0;
        entry.zero[4] = 0xff;
        assert_eq!(entry.answer(), 1 << 31 | 1 << 4);
        let mut entry = ZeroEntry::new(CHUNK, 3);
        assert_eq!(entry.answer(), 0b111);
        entry.zero[1] = ZERO;
        assert_eq!(entry.answer(), 0b101, "and nothing of what lies behind the chunk");
    }
}
