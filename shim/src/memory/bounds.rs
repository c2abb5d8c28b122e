//! Where allocations end, for copies and memsets.
//!
//! The driver knows an allocation to the byte, and refuses a copy or a memset that reaches beyond its end before anything
//! runs. Under nvshare an allocation lies in granules that nvshare maps, and for the driver all of a granule is there to be
//! used. So the call that natively is an error would write into memory that another small allocation has, or that nobody has.
//! The ends are looked up here instead, for what copies or sets one row of bytes. Kernels are not judged: natively
//! they reach what lies in the same granule too.
//!
//! Every copy looks an end up, so the ends are kept apart from the map of memory ([`crate::memory::map`]), which is locked while
//! memory is mapped. A look costs about 40 ns among few allocations and 55 ns among a thousand, and the looks of several threads
//! do not wait for each other.

use crate::cuda::abi::{CUdeviceptr, CuResult};
use crate::cuda::driver::Driver;
use crate::state;
use nvshare::units::format_size;
use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

/// Where an allocation ends, and where the memory ends that it lies in.
#[derive(Clone, Copy)]
struct End {
    bytes: CUdeviceptr,
    region: CUdeviceptr,
}

/// By where allocations begin.
static ENDS: RwLock<BTreeMap<CUdeviceptr, End>> = RwLock::new(BTreeMap::new());

/// An allocation is there: where it begins, its bytes, and where the region ends that it lies in.
pub fn add(base: CUdeviceptr, bytes: u64, region_end: CUdeviceptr) {
    let end = End { bytes: base + bytes, region: region_end };
    ENDS.write().unwrap_or_else(PoisonError::into_inner).insert(base, end);
}

/// An allocation is there no more.
pub fn remove(base: CUdeviceptr) {
    ENDS.write().unwrap_or_else(PoisonError::into_inner).remove(&base);
}

/// Begin and end of the allocation that a range overruns. The range begins in it, or between its end and the end of its region,
/// and reaches beyond its end. `None` if no allocation is overrun.
fn overrun(address: CUdeviceptr, bytes: u64) -> Option<(CUdeviceptr, CUdeviceptr)> {
    let ends = ENDS.read().unwrap_or_else(PoisonError::into_inner);
    let (&base, &end) = ends.range(..=address).next_back()?;
    let beyond = address.checked_add(bytes).is_none_or(|after| after > end.bytes);
    (bytes > 0 && address < end.region && beyond).then_some((base, end.bytes))
}

/// Refuses a call that copies or sets a range, as the driver does, if it reaches beyond the end of an allocation.
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
    // A process that has broken down is told so, and without a context, or in one that is broken, the driver refuses the
    // call for that.
    state::intact().ok()?;
    Driver::get().ok()?.ctx_intact().ok()?;
    tracing::warn!(
        "{call}: {} at {address:#x} reach beyond the end of the allocation of {} at {base:#x}",
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
        assert_eq!(overrun(BASE, 1001), None, "what is freed is the driver's to judge");
    }

    /// `cargo test --release -p nvshare-shim a_look -- --ignored --nocapture`
    #[test]
    #[ignore = "measures"]
    fn a_look_among_ten_thousand_allocations_takes_so_long() {
        const BASE: CUdeviceptr = 0x5000_0000_0000;
        for n in 0..10_000 {
            add(BASE + (n << 21), 1 << 20, BASE + ((n + 1) << 21));
        }
        // The time that this thread has run, whatever else the machine does.
        let spent = || {
            let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: the place is a timespec of this function.
            unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
            time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
        };
        for allocations in [10, 1000, 10_000] {
            let (looks, began) = (5_000_000_u64, spent());
            let at = |n: &u64| BASE + ((n * 7919 % allocations) << 21);
            let beyond = (0..looks).filter(|n| overrun(at(n), 4096).is_some()).count();
            println!("{allocations}: {} ns, {beyond} beyond", (spent() - began) / looks);
        }
    }
}
