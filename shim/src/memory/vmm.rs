//! Memory that the application maps itself: cuMemCreate, cuMemMap, cuMemSetAccess, cuMemUnmap, cuMemRelease.
//! PyTorch's expandable segments and XLA's allocator use these.
//!
//! Under nvshare cuMemCreate returns a handle to an *object* of nvshare's ([`crate::memory::map`]), whose physical
//! memory can be replaced. The object is mapped at a home address of its own, from which it is copied, and
//! at each address at which the application maps it, its *views*, with the access rights that the application has set. A
//! chunk that is evicted is unmapped everywhere; when it is filled it is mapped everywhere again.
//!
//! Mapping and unmapping need no turn on the GPU: while the memory is evicted, they are only recorded, and
//! carried out when it is filled. These calls wait only while memory is moving. A call that the driver would refuse is
//! refused at once, before anything has changed ([`crate::memory::mappings`]). If only the driver can decide, the memory is
//! filled first, and then the driver is called.
//!
//! Memory that another process may map cannot be evicted, so as soon as a
//! descriptor of it leaves the process, it stays on the GPU and is accounted for as such.

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
    /// As the driver's own: INVALID_VALUE for a size that is not a multiple of the granule, OUT_OF_MEMORY for more than
    /// the limits allow, and the driver's error for properties that it does not support.
    pub fn create_object(
        &self,
        size: u64,
        prop: CUmemAllocationProp,
    ) -> Result<CUmemGenericAllocationHandle, CuResult> {
        if size == 0 || !size.is_multiple_of(GRANULE) {
            return Err(CuResult::INVALID_VALUE);
        }
        self.can_be(&prop)?;
        // The lock is taken before the limits are checked, so that two threads cannot both get the last granules.
        let mut memory = self.memory();
        let base = self.reserve(size)?;
        stale_objects::reused(base);
        memory.add_object(base, size, prop);
        self.populate(&mut memory, base)?;
        Ok(base)
    }

    /// Asks the driver whether it supports these properties, unless they are those of plain memory. If the driver is out of
    /// memory, they count as supported.
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

    /// cuMemRelease. `None` if the handle is not nvshare's.
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

    /// cuMemMap of an object. `overlaps` says whether something is mapped at the addresses already; `inside` the gate all
    /// memory is in place, so that the driver judges the call. `None` if the handle is not nvshare's.
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
            // As the driver answers for memory on a GPU (tests/gpu/facts.cu).
            return Some(Verdict::Answer(CuResult::NOT_SUPPORTED));
        }
        let dead = region.object().is_none_or(|object| object.references == 0);
        if flags != 0 || size == 0 || dead {
            return Some(Verdict::Answer(CuResult::INVALID_VALUE));
        }
        if size > region.size {
            // As the driver answers before it checks the addresses.
            return Some(Verdict::Answer(CuResult::NOT_SUPPORTED));
        }
        if overlaps {
            return Some(Verdict::Answer(CuResult::INVALID_VALUE));
        }
        if size < region.size && !region.chunks.iter().any(|chunk| chunk.address - region.base == size) {
            tracing::warn!(
                gpu = %self.gpu,
                "cuMemMap of the first {} of {} is refused with CUDA_ERROR_NOT_SUPPORTED: nvshare maps an object whole, or a multiple of 64 MiB of it",
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

    /// Whether an object is mapped in a range, evicted or not: then its addresses cannot be freed. The driver would refuse that
    /// too, but does not see evicted memory.
    pub fn has_mapped(&self, address: CUdeviceptr, size: u64) -> bool {
        let mapped = self.is_mapped(address, size);
        if mapped {
            tracing::warn!(
                gpu = %self.gpu,
                "cuMemAddressFree of {} at {address:#x} is refused, as without nvshare: memory is mapped there; unmap it first",
                format_size(size)
            );
        }
        mapped
    }

    /// cuMemRetainAllocationHandle. `None` if no object is mapped there.
    pub fn retain_object(&self, address: CUdeviceptr) -> Option<CUmemGenericAllocationHandle> {
        let mut memory = self.memory();
        let (object, _) = memory.views_in(address, 1).into_iter().next()?;
        memory.object(object)?.object_mut()?.references += 1;
        Some(object)
    }

    /// cuMemGetAllocationPropertiesFromHandle. `None` if the handle is not nvshare's.
    pub fn object_prop(&self, handle: CUmemGenericAllocationHandle) -> Option<CUmemAllocationProp> {
        Some(self.memory().object(handle)?.object()?.prop)
    }

    /// Makes a `call` that exports an object by handles of these `types`, passing it the driver's handle. If the call
    /// succeeds, the object stays on the GPU from now on. The caller is inside the gate. `None` if the handle is not nvshare's.
    pub fn hand_on(
        &self,
        handle: CUmemGenericAllocationHandle,
        types: u32,
        call: impl FnOnce(CUmemGenericAllocationHandle) -> CuResult,
    ) -> Option<CuResult> {
        let mut memory = self.memory_at_rest();
        let region = memory.object(handle)?;
        if types & !region.object()?.prop.requested_handle_types != 0 {
            // As the driver answers.
            return Some(CuResult::INVALID_VALUE);
        }
        Some(match region.chunks.as_slice() {
            [Chunk { backing: Backing::Device(physical), .. }] => {
                // It cannot be evicted meanwhile, because the map is locked.
                let result = call(*physical);
                if result.is_success() {
                    self.books.pin(memory.pin(handle));
                }
                result
            }
            // More than one chunk, or not on the GPU.
            _ => {
                tracing::warn!(
                    gpu = %self.gpu,
                    "{} cannot be exported to another process (CUDA_ERROR_NOT_SUPPORTED): nvshare exports memory that cuMemCreate made with a handle type, of up to {}, if it is on the GPU and not in host memory",
                    format_size(region.size),
                    format_size(crate::memory::region::WHOLE)
                );
                CuResult::NOT_SUPPORTED
            }
        })
    }

    /// Keeps the region of the allocation that contains `address` on the GPU, as long as it exists, so that
    /// other processes can map it too. The caller is inside the gate, so all of it is in place.
    ///
    /// # Errors
    /// INVALID_VALUE if there is no allocation of nvshare's; NOT_SUPPORTED if part of it is mapped to host memory,
    /// or if this GPU's memory cannot be exported.
    pub fn share(&self, address: CUdeviceptr) -> Result<Allocation, CuResult> {
        self.share_if(address, || Ok(()))
    }

    /// The same, if `call`, which exports the memory, succeeds.
    ///
    /// # Errors
    /// Also those of the call.
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
