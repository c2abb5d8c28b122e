//! Measures the bookkeeping of many regions: everything that a switch does except calls to the driver and copies, on a
//! separate page, map and pool. `nvshare bench bookkeeping` prints it.

use crate::cuda::abi::CUcontext;
use crate::memory::host::{HostPool, HostPoolError};
use crate::memory::map::{Freed, Memory, Outgoing};
use crate::memory::region::{Backing, HostCopy, InUse, Seen};
use nix::time::{ClockId, clock_gettime};
use nvshare::slot::Process;
use nvshare::units::{GRANULE, GpuUuid, Granules, Nanos, SECOND};
use nvshare::{Client, Page};
use std::sync::Arc;

/// The thread's CPU time, ns, so that other programs do not count.
fn now() -> Nanos {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("Linux has this clock");
    time.tv_sec() as Nanos * SECOND + time.tv_nsec() as Nanos
}

const CONTEXT: CUcontext = CUcontext(1);
const BEGIN: u64 = 1 << 40;

/// The times to allocate, evict, fill and free `regions` regions of one granule, ns.
///
/// # Errors
/// The kernel cannot map as many bytes of host memory. None of it is touched.
pub fn measure(regions: Granules) -> Result<[Nanos; 4], HostPoolError> {
    let page: Arc<Page> = Page::on_heap(GpuUuid([0; 16]), regions).into();
    let slot = page.open_slot(Process { pid: 1, started: 1 }, "bookkeeping", 1);
    let client = Client::new(page.clone(), slot.expect("a new page has slots"));
    let books = client.books();
    let host = HostPool::untouched(u64::from(regions) * GRANULE)?;
    let mut memory = Memory::default();
    let bases = || (0..u64::from(regions)).map(|index| BEGIN + 2 * index * GRANULE);

    let began = now();
    for base in bases() {
        memory.add_whole(base, GRANULE, GRANULE, CONTEXT);
        books.grow(1);
        books.try_take(1).expect("the pool is as large");
        memory.settle(base, Backing::Device(1));
    }
    let allocated = now();
    for (address, _) in memory.unseen() {
        memory.saw(address, Seen { in_use: InUse::All, fingerprints: None });
    }
    while let Some(Outgoing { place, seen, .. }) = memory.next_resident(u64::MAX) {
        let copy = HostCopy { memory: host.alloc(place.size)?, in_use: seen.in_use, fingerprints: None };
        memory.settle(place.address, Backing::Evicted(copy));
        books.give(1);
    }
    let evicted = now();
    while let Some((place, backing, _)) = memory.next_missing() {
        books.try_take(1).expect("the pool is as large");
        memory.settle(place.address, Backing::Device(1));
        if let Backing::Evicted(copy) = backing {
            host.free(copy.memory);
        }
    }
    memory.unsee();
    let filled = now();
    for base in bases() {
        let allocation = memory.begin_free(base).expect("it was allocated");
        if let Freed::Region(region) = memory.finish_free(allocation) {
            memory.remove(region);
            books.give(1);
            books.shrink(1);
        }
    }
    Ok([allocated - began, evicted - allocated, filled - evicted, now() - filled])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_is_measured() {
        assert!(measure(500).unwrap().iter().all(|took| *took > 0));
    }
}
