//! Where allocations end, for copies and memsets.
//!
//! Natively the driver knows the size of an allocation to the byte, and refuses a copy or a memset that reaches beyond its end
//! before anything runs. Under nvshare an allocation lies in granules that nvshare maps, and the driver accepts any address
//! in a mapped granule. A call that is an error natively would then overwrite another small allocation, or unused memory. So
//! nvshare checks calls that copy or set one contiguous range of bytes (rows with `checks` in `interpose/rows.rs`).
//! Kernels are not checked: natively too they can access the rest of the granule.
//!
//! Every copy makes this lookup, so the ends are kept apart from the map of memory ([`crate::memory::map`]), which is locked
//! while memory is mapped. A lookup costs about 40 ns among few allocations and 55 ns among a thousand. Lookups of several
//! threads do not wait for each other.

use crate::cuda::abi::{CUdeviceptr, CuResult};
use crate::cuda::driver::Driver;
use crate::state;
use nvshare::units::format_size;
use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

/// Where an allocation ends, and where its region ends.
#[derive(Clone, Copy)]
struct End {
    bytes: CUdeviceptr,
    region: CUdeviceptr,
}

/// The ends, by the address at which the allocation begins.
static ENDS: RwLock<BTreeMap<CUdeviceptr, End>> = RwLock::new(BTreeMap::new());

/// Records an allocation of `bytes` bytes at `base`, in a region that ends at `region_end`.
pub fn add(base: CUdeviceptr, bytes: u64, region_end: CUdeviceptr) {
    let end = End { bytes: base + bytes, region: region_end };
    ENDS.write().unwrap_or_else(PoisonError::into_inner).insert(base, end);
}

/// Drops the record of an allocation.
pub fn remove(base: CUdeviceptr) {
    ENDS.write().unwrap_or_else(PoisonError::into_inner).remove(&base);
}

/// Begin and end of the allocation that a range overruns: the range begins in the allocation, or between the end of the
/// allocation and the end of its region, and reaches beyond the end of the allocation. `None` if no allocation is overrun.
fn overrun(address: CUdeviceptr, bytes: u64) -> Option<(CUdeviceptr, CUdeviceptr)> {
    let ends = ENDS.read().unwrap_or_else(PoisonError::into_inner);
    let (&base, &end) = ends.range(..=address).next_back()?;
    let beyond = address.checked_add(bytes).is_none_or(|after| after > end.bytes);
    (bytes > 0 && address < end.region && beyond).then_some((base, end.bytes))
}

/// CUDA_ERROR_INVALID_VALUE, as the driver answers, if the range of a copy or memset reaches beyond the end of an allocation.
#[inline]
pub fn refuse(call: &str, address: usize, bytes: usize) -> Option<CuResult> {
    if !state::enabled() {
        // A forked child takes no lock: a thread of the parent may have held it.
        return None;
    }
    let (base, end) = overrun(address as CUdeviceptr, bytes as u64)?;
    refused(call, (address as CUdeviceptr, bytes as u64), (base, end))
}

#[cold]
fn refused(
    call: &str,
    (address, bytes): (CUdeviceptr, u64),
    (base, end): (CUdeviceptr, CUdeviceptr),
) -> Option<CuResult> {
    // In a failed process, without a current context or in a broken one, the call gets that error instead, from the gate or
    // from the driver.
    state::intact().ok()?;
    Driver::get().ok()?.ctx_intact().ok()?;
    tracing::warn!(
        "{call} refused with CUDA_ERROR_INVALID_VALUE: {} at {address:#x} reach beyond the end of the allocation of {} at {base:#x}, as without nvshare",
        format_size(bytes),
        format_size(end - base)
    );
    Some(CuResult::INVALID_VALUE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_may_not_reach_beyond_the_allocation_that_it_begins_in() {
        const BASE: CUdeviceptr = 0x6000_0000_0000;
        let (small, region) = (BASE + 0x400, BASE + (2 << 20));
        add(BASE, 1000, region);
        add(small, 100, region);
        let cases = [
            (BASE, 1000, false),
            (BASE, 1001, true),
            (BASE + 999, 1, false),
            (BASE + 1000, 1, true),
            (BASE, 0x400 + 50, true),
            (small, 100, false),
            (small + 100, 1, true),
            (region - 1, 1, true),
            (region, 1, false),
            (BASE - 1, 1, false),
            (small + 50, u64::MAX, true),
            (small + 200, 0, false),
        ];
        for (address, bytes, beyond) in cases {
            assert_eq!(overrun(address, bytes).is_some(), beyond, "{bytes} bytes at {address:#x}");
        }
        remove(small);
        remove(BASE);
        assert_eq!(overrun(BASE, 1001), None, "freed memory is left to the driver");
    }

    /// `cargo test --release -p nvshare-shim cost_of_a_lookup -- --ignored --nocapture`
    #[test]
    #[ignore = "measures"]
    fn cost_of_a_lookup_among_ten_thousand_allocations() {
        const BASE: CUdeviceptr = 0x5000_0000_0000;
        for n in 0..10_000 {
            add(BASE + (n << 21), 1 << 20, BASE + ((n + 1) << 21));
        }
        // The CPU time of this thread, so that other load does not count.
        let spent = || {
            let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: the place is a timespec of this function.
            unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
            time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
        };
        for allocations in [10, 1000, 10_000] {
            let (lookups, began) = (5_000_000_u64, spent());
            let at = |n: &u64| BASE + ((n * 7919 % allocations) << 21);
            let beyond = (0..lookups).filter(|n| overrun(at(n), 4096).is_some()).count();
            println!("{allocations}: {} ns, {beyond} beyond", (spent() - began) / lookups);
        }
    }
}
