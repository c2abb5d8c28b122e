//! Fingerprints of granules: two contents of a granule with the same fingerprint are taken for the same, so that a granule whose
//! former copy is still in host memory need not be copied again.
//!
//! A fingerprint has 128 bits: the sums of two folded products over the granule, with multipliers that each process draws at random
//! (`fingerprint.ptx` has the definition). So nobody can aim at a collision from outside, and two different contents have
//! the same fingerprint with a probability of about 2^-108: each of the two sums forgets a difference in each of a thread's
//! 1,024 steps with 2^-64. docs/decisions/0030-clean-granules.md has the argument and what it means for a node.
//!
//! A wrong "the same" loses an application's data, so a granule has a fingerprint only if the kernel has written one.

use crate::cuda::abi::CUdeviceptr;
use crate::memory::scan::compiled::{Compiled, compiled};
use crate::memory::scan::{Entry, SLOTS};
use std::collections::hash_map::RandomState;
use std::ffi::CStr;
use std::hash::BuildHasher;
use std::sync::LazyLock;

/// The fingerprint of a granule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Fingerprint([u64; 2]);

impl Fingerprint {
    /// What stands in the table until the kernel has written: no fingerprint. (One in 2^128 granules would have it as its own, and
    /// would be copied.)
    const NONE: Self = Self([0; 2]);

    /// Its two sums, for a digest of several; `None` if it is none.
    pub fn sums(self) -> Option<[u64; 2]> {
        (self != Self::NONE).then_some(self.0)
    }

    /// One that only tests have.
    #[cfg(test)]
    pub fn of(number: u64) -> Self {
        Self([number, 1])
    }

    /// Whether a granule that had this fingerprint, and has `now`, still holds the same.
    pub fn is_still(self, now: Self) -> bool {
        self == now && now != Self::NONE
    }
}

/// The fingerprints of a chunk's granules, by their places in the chunk.
pub type Fingerprints = [Fingerprint; SLOTS];

/// One chunk in the table: the kernel writes a fingerprint for each granule.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct FingerprintEntry {
    address: CUdeviceptr,
    granules: u64,
    fingerprints: Fingerprints,
}

/// The multipliers of a process that has no replicas: two random numbers, from the system's source of randomness (which std seeds its
/// hash maps with).
pub fn own_keys() -> [u64; 2] {
    static KEYS: LazyLock<[u64; 2]> =
        LazyLock::new(|| [0_u8, 1].map(|which| RandomState::new().hash_one(which)));
    *KEYS
}

// SAFETY: every word is a valid one.
unsafe impl Entry for FingerprintEntry {
    const PTX: &'static CStr =
        match CStr::from_bytes_with_nul(concat!(include_str!("fingerprint.ptx"), "\0").as_bytes()) {
            Ok(text) => text,
            Err(_) => panic!("the text has no NUL"),
        };
    const COMPILED: &'static [Compiled] = compiled!("fingerprint");
    const KERNEL: &'static CStr = c"nvshare_fingerprints";
    type Answer = Fingerprints;

    fn new(address: CUdeviceptr, granules: u64) -> Self {
        Self { address, granules, fingerprints: [Fingerprint::NONE; SLOTS] }
    }

    fn answer(&self) -> Fingerprints {
        self.fingerprints
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::scan::THREADS;
    use nvshare::units::GRANULE;

    #[test]
    fn an_entry_is_what_the_kernel_reads() {
        assert_eq!(size_of::<FingerprintEntry>(), 528);
        assert_eq!(std::mem::offset_of!(FingerprintEntry, granules), 8);
        assert_eq!(std::mem::offset_of!(FingerprintEntry, fingerprints), 16);
        let kernel = include_str!("fingerprint.ptx");
        assert!(kernel.contains(&format!(".entry {}(", FingerprintEntry::KERNEL.to_str().unwrap())));
        assert!(kernel.contains(&format!(".reqntid {THREADS}, 1, 1")));
        assert!(kernel.contains("mul.lo.u64      %entry, %entry, 528;"));
        assert!(kernel.contains(&format!("add.u64         %end, %at, {GRANULE};")));
    }

    #[test]
    fn what_was_not_written_is_no_fingerprint() {
        let nothing = Fingerprint::NONE;
        assert!(!nothing.is_still(nothing));
        let [one, other] = [Fingerprint([0, 1]), Fingerprint([1, 0])];
        assert!(
            one.is_still(one) && !one.is_still(other) && !one.is_still(nothing) && !nothing.is_still(one)
        );
    }

    #[test]
    fn the_keys_of_a_process_stay_and_differ() {
        let [first, second] = own_keys();
        assert_ne!(first, second);
        assert_eq!(own_keys(), [first, second]);
    }
}
