//! What tests ask the simulated GPU itself.

use std::ffi::{c_int, c_uint};

use simstate::{Counters, ProcessUsage, ledger};

use super::vmm;
use crate::abi::{Error, Out};
use crate::driver::driver;

/// Writes what happened on a GPU in all processes since its segment was made: [`Counters`], eight 64-bit numbers in
/// the order bytes in, bytes out, launches, illegal accesses, refused allocations, `cuMemCreate` calls, managed pages
/// brought in, managed pages driven out. Needs `cuInit`.
#[unsafe(no_mangle)]
extern "C" fn nvsharesim_counters(gpu: c_uint, counters: Out<Counters>) -> c_int {
    super::enter("nvsharesim_counters", || {
        let gpu = driver()?.segment.gpu(gpu as usize).ok_or(Error::INVALID_DEVICE)?;
        counters.set(gpu.counters())
    })
}

/// Writes what every living process uses of a GPU, as many [`ProcessUsage`] as there is room for, and sets `count`,
/// which says how much room there is, to how many processes there are. Needs `cuInit`.
#[unsafe(no_mangle)]
extern "C" fn nvsharesim_usage(gpu: c_uint, usage: Out<ProcessUsage>, count: Out<c_uint>) -> c_int {
    super::enter("nvsharesim_usage", || {
        let gpu = driver()?.segment.gpu(gpu as usize).ok_or(Error::INVALID_DEVICE)?;
        let room = count.get()? as usize;
        let all = ledger::usage(gpu);
        count.set(all.len() as c_uint)?;
        usage.fill(all.into_iter(), room);
        Ok(())
    })
}

/// Writes what a GPU of this process may do with mapped memory, as `CUmemAccess_flags`, whoever has mapped it. Needs
/// `cuInit`. The driver has no such call: `cuMemGetAccess` answers for the caller's own mappings, and under nvshare an
/// allocation of `cuMemAlloc` is a mapping that the application knows nothing of.
#[unsafe(no_mangle)]
extern "C" fn nvsharesim_rights(pointer: u64, gpu: c_uint, rights: Out<u64>) -> c_int {
    super::enter("nvsharesim_rights", || {
        let space = driver()?.memory.space.read().unwrap_or_else(|e| e.into_inner());
        let (_, mapping) = space.find_mapping(pointer).ok_or(Error::INVALID_VALUE)?;
        rights.set(vmm::flags(mapping.rights.of(gpu as usize)))
    })
}
