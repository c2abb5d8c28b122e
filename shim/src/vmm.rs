//! Memory that the application maps itself: cuMemCreate, cuMemMap, cuMemSetAccess, cuMemUnmap, cuMemRelease.
//! PyTorch's expandable segments and XLA's allocator work so.
//!
//! What cuMemCreate returns under nvshare is a handle to an *object* of ours ([`crate::memory`]): physical
//! memory comes and goes beneath it. The object is mapped at a home of its own, from where it is copied, and
//! at each address that the application maps it to, its *views*, for whom the application gave access. A
//! chunk that leaves is unmapped everywhere; one that comes is mapped everywhere again.
//!
//! Mapping and unmapping need no turn on the GPU: while the memory is out they are written down, and what is
//! written down is done when it comes. Only a moment in which memory moves is waited for. The price: what is
//! wrong with an address that was never reserved shows at the next fill and not in the call, if the memory is
//! out at the time.
//!
//! Memory that another process may map as well cannot be taken from under it, so from the moment in which a
//! descriptor of it leaves the process it stays on the GPU, and the books say so.

use crate::abi::*;
use crate::device::Shared;
use crate::memory::{Allocation, Backing, Chunk, Memory, Region, View};
use nvshare::units::{GRANULE, format_size};
use std::ops::Range;

/// The part of a region that the GPU has now: offset, bytes, and physical memory of each chunk.
fn present(region: &Region) -> impl Iterator<Item = (u64, u64, CUmemGenericAllocationHandle)> {
    region.chunks.iter().filter_map(|chunk| match chunk.backing {
        Backing::Device(handle) | Backing::Overflow(handle) => {
            Some((chunk.address - region.base, chunk.size, handle))
        }
        _ => None,
    })
}

/// Does something to what is mapped now of a view, piece by piece. The first failure is the one to tell.
fn each_piece(
    memory: &Memory,
    object: CUdeviceptr,
    view: &View,
    act: impl Fn(CUdeviceptr, usize) -> Result<(), CuResult>,
) -> Result<(), CuResult> {
    let pieces = memory.region(object).into_iter().flat_map(present).filter(|(at, ..)| *at < view.size);
    let mut result = Ok(());
    for (at, bytes, _) in pieces {
        result = result.and(act(view.address + at, bytes as usize));
    }
    result
}

/// Does something to the parts of a range that no view covers: what the application has mapped there is the
/// driver's. The first failure is the one to tell.
fn between(
    views: &[(CUdeviceptr, View)],
    range: Range<CUdeviceptr>,
    act: impl Fn(CUdeviceptr, usize) -> Result<(), CuResult>,
) -> Result<(), CuResult> {
    let (mut at, mut result) = (range.start, Ok(()));
    let covered = views.iter().map(|(_, view)| (view.address, view.address + view.size));
    for (begin, after) in covered.chain([(range.end, range.end)]) {
        if begin > at {
            result = result.and(act(at, (begin - at) as usize));
        }
        at = at.max(after);
    }
    result
}

/// Whether a range takes a part of a view and leaves the rest.
fn cuts(range: &Range<CUdeviceptr>, views: &[(CUdeviceptr, View)]) -> bool {
    views.iter().any(|(_, view)| view.address < range.start || view.address + view.size > range.end)
}

impl Shared {
    /// cuMemCreate, for memory of this GPU.
    ///
    /// # Errors
    /// As the driver's own: INVALID_VALUE for a size that is not whole granules, OUT_OF_MEMORY for more than
    /// there can be, and whatever it says about properties that it does not have.
    pub fn create_object(
        &self,
        size: u64,
        prop: CUmemAllocationProp,
    ) -> Result<CUmemGenericAllocationHandle, CuResult> {
        if size == 0 || !size.is_multiple_of(GRANULE) {
            return Err(CuResult::INVALID_VALUE);
        }
        self.can_be(&prop)?;
        // Before what is left is looked at, so that two at once do not both have the last of it.
        let mut memory = self.memory();
        let base = self.reserve(size)?;
        memory.add_object(base, size, prop);
        self.populate(&mut memory, base)?;
        Ok(base)
    }

    /// Asks the driver whether there is memory of these properties. It may be out of memory, which says
    /// nothing about them; and of plain memory everybody knows.
    fn can_be(&self, prop: &CUmemAllocationProp) -> Result<(), CuResult> {
        if prop.requested_handle_types == 0 && prop.alloc_flags.is_plain() {
            return Ok(());
        }
        match self.driver.mem_create(GRANULE as usize, prop) {
            Ok(probe) => self.driver.mem_release(probe),
            Err(CuResult::OUT_OF_MEMORY) => Ok(()),
            Err(result) => Err(result),
        }
    }

    /// cuMemRelease. `None` if the handle is none of ours.
    pub fn release_object(&self, handle: CUmemGenericAllocationHandle) -> Option<CuResult> {
        let mut memory = self.memory_at_rest();
        let object = memory.object(handle)?.object_mut()?;
        if object.references == 0 {
            return Some(CuResult::INVALID_VALUE);
        }
        object.references -= 1;
        if object.references == 0
            && object.views.is_empty()
            && let Some(region) = memory.remove(handle)
        {
            self.dispose(region);
        }
        Some(CuResult::SUCCESS)
    }

    /// cuMemMap. `None` if the handle is none of ours.
    pub fn map_object(
        &self,
        address: CUdeviceptr,
        size: u64,
        offset: u64,
        handle: CUmemGenericAllocationHandle,
        flags: u64,
    ) -> Option<CuResult> {
        let mut memory = self.memory_at_rest();
        let overlaps = !memory.views_in(address, size).is_empty();
        let region = memory.object(handle)?;
        if offset != 0 {
            // So says the driver too, of memory on a GPU (tests/gpu/facts.cu).
            return Some(CuResult::NOT_SUPPORTED);
        }
        let dead = region.object().is_none_or(|object| object.references == 0);
        if flags != 0 || size == 0 || size > region.size || dead || overlaps {
            return Some(CuResult::INVALID_VALUE);
        }
        if size < region.size && !region.chunks.iter().any(|chunk| chunk.address - region.base == size) {
            tracing::warn!(
                gpu = %self.gpu,
                "cuMemMap of the first {} of {}: nvshare maps memory whole, or in pieces of 64 MiB",
                format_size(size),
                format_size(region.size)
            );
            return Some(CuResult::NOT_SUPPORTED);
        }
        let mut mapped: Vec<(u64, u64)> = Vec::new();
        for (at, bytes, physical) in present(region).filter(|(at, ..)| *at < size) {
            if let Err(result) = self.driver.mem_map(address + at, bytes as usize, 0, physical, 0) {
                for (at, bytes) in mapped {
                    let _ = self.driver.mem_unmap(address + at, bytes as usize);
                }
                return Some(result);
            }
            mapped.push((at, bytes));
        }
        memory.add_view(handle, View { address, size, access: Vec::new() });
        Some(CuResult::SUCCESS)
    }

    /// cuMemUnmap. `None` if nothing of ours is mapped there.
    pub fn unmap_objects(&self, address: CUdeviceptr, size: u64) -> Option<CuResult> {
        let mut memory = self.memory_at_rest();
        let views = memory.views_in(address, size);
        if views.is_empty() {
            return None;
        }
        let range = address..address.saturating_add(size);
        if cuts(&range, &views) {
            // Mappings go whole (tests/gpu/facts.cu).
            return Some(CuResult::INVALID_VALUE);
        }
        let unmap = |at, bytes| self.driver.mem_unmap(at, bytes);
        let mut result = between(&views, range, unmap);
        for (object, view) in views {
            result = result.and(each_piece(&memory, object, &view, unmap));
            if let Some(region) = memory.remove_view(view.address) {
                self.dispose(region);
            }
        }
        Some(result.err().unwrap_or(CuResult::SUCCESS))
    }

    /// Whether something of ours is mapped in a range: then its addresses cannot be freed, as the driver would say
    /// if it knew, wherever the memory is now.
    pub fn has_mapped(&self, address: CUdeviceptr, size: u64) -> bool {
        let mapped = !self.memory().views_in(address, size).is_empty();
        if mapped {
            tracing::warn!(
                gpu = %self.gpu,
                "cuMemAddressFree of {} at {address:#x}: memory is mapped there; unmap it first",
                format_size(size)
            );
        }
        mapped
    }

    /// cuMemSetAccess. `None` if nothing of ours is mapped there.
    pub fn set_access(
        &self,
        address: CUdeviceptr,
        size: u64,
        access: &[CUmemAccessDesc],
    ) -> Option<CuResult> {
        let mut memory = self.memory_at_rest();
        let views = memory.views_in(address, size);
        if views.is_empty() {
            return None;
        }
        let range = address..address.saturating_add(size);
        if cuts(&range, &views) {
            tracing::warn!(
                gpu = %self.gpu,
                "cuMemSetAccess of {} at {address:#x} covers a mapping in part: nvshare gives access to whole ones",
                format_size(size)
            );
            return Some(CuResult::INVALID_VALUE);
        }
        let allow = |at, bytes| self.driver.mem_set_access(at, bytes, access);
        let mut result = between(&views, range, allow);
        for (object, view) in views {
            result = result.and(each_piece(&memory, object, &view, allow));
            if let (Ok(()), Some(view)) = (result, memory.view_mut(view.address)) {
                view.access.retain(|known| access.iter().all(|new| new.location != known.location));
                view.access.extend_from_slice(access);
            }
        }
        Some(result.err().unwrap_or(CuResult::SUCCESS))
    }

    /// cuMemRetainAllocationHandle. `None` if nothing of ours is mapped there.
    pub fn retain_object(&self, address: CUdeviceptr) -> Option<CUmemGenericAllocationHandle> {
        let mut memory = self.memory();
        let (object, _) = memory.views_in(address, 1).into_iter().next()?;
        memory.object(object)?.object_mut()?.references += 1;
        Some(object)
    }

    /// cuMemGetAllocationPropertiesFromHandle. `None` if the handle is none of ours.
    pub fn object_prop(&self, handle: CUmemGenericAllocationHandle) -> Option<CUmemAllocationProp> {
        let mut memory = self.memory();
        let object = memory.object(handle)?.object()?;
        // What is only mapped any more has no handle.
        (object.references > 0).then_some(object.prop)
    }

    /// The driver's own handle to an object, which stays on the GPU from now on: for calls that hand it on, by
    /// handles of these `types`. The caller is inside the gate. `None` if the handle is none of ours.
    pub fn fix_object(
        &self,
        handle: CUmemGenericAllocationHandle,
        types: u32,
    ) -> Option<Result<CUmemGenericAllocationHandle, CuResult>> {
        let mut memory = self.memory_at_rest();
        let region = memory.object(handle)?;
        if types & !region.object()?.prop.requested_handle_types != 0 {
            // As the driver says; and what does not go anywhere must not stay for it.
            return Some(Err(CuResult::INVALID_VALUE));
        }
        Some(match region.chunks.as_slice() {
            [Chunk { backing: Backing::Device(physical), .. }] => {
                let physical = *physical;
                self.books.fix(memory.fix(handle));
                Ok(physical)
            }
            // Too large for one piece, or not on the GPU.
            _ => {
                tracing::warn!(
                    gpu = %self.gpu,
                    "{} cannot be handed to another process: nvshare hands on what cuMemCreate made with a handle type, up to {}, and has on the GPU",
                    format_size(region.size),
                    format_size(crate::memory::WHOLE)
                );
                Err(CuResult::NOT_SUPPORTED)
            }
        })
    }

    /// Fixes the region of the allocation that `address` lies in on the GPU, for as long as it lives, so that
    /// others can map it too. The caller is inside the gate, so all of it is in place.
    ///
    /// # Errors
    /// INVALID_VALUE if no allocation of ours is there; NOT_SUPPORTED if part of it lies in host memory for
    /// want of room, or if this GPU's memory cannot be handed to other processes.
    pub fn share(&self, address: CUdeviceptr) -> Result<Allocation, CuResult> {
        let mut memory = self.memory_at_rest();
        let allocation = memory.containing(address).ok_or(CuResult::INVALID_VALUE)?;
        let region = memory.region(allocation.region).ok_or(CuResult::INVALID_VALUE)?;
        let in_place = |chunk: &Chunk| matches!(chunk.backing, Backing::Device(_));
        if !self.exportable || !region.chunks.iter().all(in_place) {
            return Err(CuResult::NOT_SUPPORTED);
        }
        self.books.fix(memory.fix(allocation.region));
        Ok(allocation)
    }
}
