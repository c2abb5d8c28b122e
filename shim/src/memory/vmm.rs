//! Memory that the application maps itself: cuMemCreate, cuMemMap, cuMemSetAccess, cuMemUnmap, cuMemRelease.
//! PyTorch's expandable segments and XLA's allocator work so.
//!
//! What cuMemCreate returns under nvshare is a handle to an *object* of ours ([`crate::memory::map`]): physical
//! memory comes and goes beneath it. The object is mapped at a home of its own, from where it is copied, and
//! at each address that the application maps it to, its *views*, for whom the application gave access. A
//! chunk that leaves is unmapped everywhere; one that comes is mapped everywhere again.
//!
//! Mapping and unmapping need no turn on the GPU: while the memory is out they are written down, and what is
//! written down is done when it comes. Only a moment in which memory moves is waited for. What the driver would refuse is
//! refused at once all the same, before anything has changed ([`crate::memory::mappings`]); where only the driver can tell, memory
//! comes in first, and it is asked.
//!
//! Memory that another process may map as well cannot be taken from under it, so from the moment in which a
//! descriptor of it leaves the process it stays on the GPU, and the books say so.

use crate::cuda::abi::*;
use crate::memory::device::Device;
use crate::memory::map::Allocation;
use crate::memory::mappings::{Verdict, is_free};
use crate::memory::region::{Backing, Chunk, View, present};
use crate::memory::stale_objects;
use nvshare::units::{GRANULE, format_size};

impl Device {
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
        stale_objects::reused(base);
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

    /// cuMemMap, of an object to addresses where nothing `overlaps`. `None` if the handle is none of ours. Whoever calls from
    /// `inside` the gate has the driver see all of the memory.
    pub fn map_object(
        &self,
        (address, size): (CUdeviceptr, u64),
        offset: u64,
        handle: CUmemGenericAllocationHandle,
        flags: u64,
        overlaps: bool,
        inside: bool,
    ) -> Option<Verdict> {
        let mut memory = self.memory_at_rest();
        let region = memory.object(handle)?;
        if offset != 0 {
            // So says the driver too, of memory on a GPU (tests/gpu/facts.cu).
            return Some(Verdict::Answer(CuResult::NOT_SUPPORTED));
        }
        let dead = region.object().is_none_or(|object| object.references == 0);
        if flags != 0 || size == 0 || dead {
            return Some(Verdict::Answer(CuResult::INVALID_VALUE));
        }
        if size > region.size {
            // So the driver says before it looks at the addresses.
            return Some(Verdict::Answer(CuResult::NOT_SUPPORTED));
        }
        if overlaps {
            return Some(Verdict::Answer(CuResult::INVALID_VALUE));
        }
        if size < region.size && !region.chunks.iter().any(|chunk| chunk.address - region.base == size) {
            tracing::warn!(
                gpu = %self.gpu,
                "cuMemMap of the first {} of {}: nvshare maps memory whole, or in pieces of 64 MiB",
                format_size(size),
                format_size(region.size)
            );
            return Some(Verdict::Answer(CuResult::NOT_SUPPORTED));
        }
        let seen: u64 = present(region).map(|(_, bytes, _)| bytes).sum();
        if !inside && seen < size && !is_free(self, address, size) {
            return Some(Verdict::InPlace);
        }
        let mut mapped: Vec<(u64, u64)> = Vec::new();
        for (at, bytes, physical) in present(region).filter(|(at, ..)| *at < size) {
            if let Err(result) = self.driver.mem_map(address + at, bytes as usize, 0, physical, 0) {
                for (at, bytes) in mapped {
                    let _ = self.driver.mem_unmap(address + at, bytes as usize);
                }
                return Some(Verdict::Answer(result));
            }
            mapped.push((at, bytes));
        }
        memory.add_view(handle, View { address, size, access: Vec::new() });
        Some(Verdict::Answer(CuResult::SUCCESS))
    }

    /// Whether the application has mapped an object in a range.
    pub fn is_mapped(&self, address: CUdeviceptr, size: u64) -> bool {
        !self.memory().views_in(address, size).is_empty()
    }

    /// Whether something of ours is mapped in a range: then its addresses cannot be freed, as the driver would say
    /// if it knew, wherever the memory is now.
    pub fn has_mapped(&self, address: CUdeviceptr, size: u64) -> bool {
        let mapped = self.is_mapped(address, size);
        if mapped {
            tracing::warn!(
                gpu = %self.gpu,
                "cuMemAddressFree of {} at {address:#x}: memory is mapped there; unmap it first",
                format_size(size)
            );
        }
        mapped
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
        Some(self.memory().object(handle)?.object()?.prop)
    }

    /// Makes a call that hands an object on by handles of these `types`, with the driver's own handle to it. If the driver
    /// does, the object stays on the GPU from now on. The caller is inside the gate. `None` if the handle is none of ours.
    pub fn hand_on(
        &self,
        handle: CUmemGenericAllocationHandle,
        types: u32,
        call: impl FnOnce(CUmemGenericAllocationHandle) -> CuResult,
    ) -> Option<CuResult> {
        let mut memory = self.memory_at_rest();
        let region = memory.object(handle)?;
        if types & !region.object()?.prop.requested_handle_types != 0 {
            // As the driver says.
            return Some(CuResult::INVALID_VALUE);
        }
        Some(match region.chunks.as_slice() {
            [Chunk { backing: Backing::Device(physical), .. }] => {
                // It cannot leave meanwhile: the map is locked.
                let result = call(*physical);
                if result.is_success() {
                    self.books.pin(memory.pin(handle));
                }
                result
            }
            // Too large for one piece, or not on the GPU.
            _ => {
                tracing::warn!(
                    gpu = %self.gpu,
                    "{} cannot be handed to another process: nvshare hands on what cuMemCreate made with a handle type, up to {}, and has on the GPU",
                    format_size(region.size),
                    format_size(crate::memory::region::WHOLE)
                );
                CuResult::NOT_SUPPORTED
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
        self.share_if(address, || Ok(()))
    }

    /// The same, if a call that hands the memory on is made.
    ///
    /// # Errors
    /// Also what the call says; nothing is pinned then.
    pub fn share_if(
        &self,
        address: CUdeviceptr,
        call: impl FnOnce() -> Result<(), CuResult>,
    ) -> Result<Allocation, CuResult> {
        let mut memory = self.memory_at_rest();
        let allocation = memory.containing(address).ok_or(CuResult::INVALID_VALUE)?;
        let region = memory.region(allocation.region).ok_or(CuResult::INVALID_VALUE)?;
        let in_place = |chunk: &Chunk| matches!(chunk.backing, Backing::Device(_));
        if !self.exportable || !region.chunks.iter().all(in_place) {
            return Err(CuResult::NOT_SUPPORTED);
        }
        call()?;
        self.books.pin(memory.pin(allocation.region));
        Ok(allocation)
    }
}
