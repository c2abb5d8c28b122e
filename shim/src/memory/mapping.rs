//! Physical memory of chunks: creating, mapping, unmapping and releasing it through the driver.

use crate::cuda::abi::*;
use crate::memory::device::Device;
use crate::memory::error::SwapError;
use crate::memory::map::Memory;
use crate::memory::region::{Backing, ChunkMapping};
use nvshare::units::format_size;

impl Device {
    /// The properties with which a chunk's memory is created.
    fn prop(&self, place: &ChunkMapping, overflow: bool) -> CUmemAllocationProp {
        if overflow {
            let node =
                self.driver.device_attribute(CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID, self.ordinal).unwrap_or(0);
            return CUmemAllocationProp::pinned(CUmemLocation::host_numa(node.max(0)));
        }
        place.prop.unwrap_or_else(|| {
            let mut prop = CUmemAllocationProp::pinned(CUmemLocation::device(self.ordinal));
            if self.exportable {
                // Costs nothing (docs/decisions/0008), and the application may call cuIpcGetMemHandle at any time.
                prop.requested_handle_types = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
            }
            prop
        })
    }

    /// Creates GPU memory for a chunk, or with `overflow` host memory that the GPU can use, and maps it at all its addresses.
    ///
    /// # Errors
    /// The driver's; then nothing is mapped and the memory is released.
    pub fn map(
        &self,
        place: &ChunkMapping,
        overflow: bool,
    ) -> Result<CUmemGenericAllocationHandle, SwapError> {
        let created = self.driver.mem_create(place.size as usize, &self.prop(place, overflow));
        let handle = created.map_err(|result| SwapError::Driver { call: "cuMemCreate", result })?;
        if let Err(error) = self.map_at(place, handle) {
            let _ = self.driver.mem_release(handle);
            return Err(error);
        }
        Ok(handle)
    }

    /// Maps physical memory at all addresses of a chunk.
    ///
    /// # Errors
    /// The driver's; nothing is mapped then.
    pub fn map_at(
        &self,
        place: &ChunkMapping,
        handle: CUmemGenericAllocationHandle,
    ) -> Result<(), SwapError> {
        let home = (place.address, self.access());
        let mut mapped: Vec<CUdeviceptr> = Vec::new();
        for (address, access) in std::iter::once(&home).chain(&place.views) {
            let done = self.map_one(*address, place.size, handle, access);
            if let Err(error) = done {
                for address in mapped {
                    let _ = self.driver.mem_unmap(address, place.size as usize);
                }
                return Err(error);
            }
            mapped.push(*address);
        }
        Ok(())
    }

    /// Maps physical memory at one address.
    ///
    /// # Errors
    /// The driver's; nothing is mapped then.
    fn map_one(
        &self,
        address: CUdeviceptr,
        size: u64,
        handle: CUmemGenericAllocationHandle,
        access: &[CUmemAccessDesc],
    ) -> Result<(), SwapError> {
        let (size, said) = (size as usize, |call| move |result| SwapError::Driver { call, result });
        self.driver.mem_map(address, size, 0, handle, 0).map_err(said("cuMemMap"))?;
        if access.is_empty() {
            return Ok(());
        }
        self.driver.mem_set_access(address, size, access).map_err(|result| {
            let _ = self.driver.mem_unmap(address, size);
            SwapError::Driver { call: "cuMemSetAccess", result }
        })
    }

    /// Unmaps a chunk at all its addresses.
    pub fn unmap(&self, place: &ChunkMapping) {
        for address in std::iter::once(place.address).chain(place.views.iter().map(|(address, _)| *address)) {
            self.report(place, self.driver.mem_unmap(address, place.size as usize));
        }
    }

    /// Unmaps and releases a chunk's memory.
    pub fn release(&self, place: &ChunkMapping, handle: CUmemGenericAllocationHandle) {
        self.unmap(place);
        self.release_unmapped(place, handle);
    }

    /// Releases a chunk's memory, which is mapped no more.
    pub fn release_unmapped(&self, place: &ChunkMapping, handle: CUmemGenericAllocationHandle) {
        self.imported.forget(handle);
        self.report(place, self.driver.mem_release(handle));
    }

    fn report(&self, place: &ChunkMapping, released: Result<(), CuResult>) {
        let Err(result) = released else { return };
        if self.engine_context.is_leaving() {
            // The driver may have released it with the last context.
            tracing::debug!(
                gpu = %self.gpu,
                "{} at {:#x} could not be released, perhaps because its context is gone: {result}",
                format_size(place.size),
                place.address
            );
        } else if result != CuResult::DEINITIALIZED {
            tracing::error!(
                gpu = %self.gpu,
                "{} of GPU memory at {:#x} could not be released and may stay in use until the process ends: {result}",
                format_size(place.size),
                place.address
            );
        }
    }

    /// Creates and maps a chunk without access rights; [`Device::open_all`] gives them.
    pub(super) fn map_closed(&self, place: &ChunkMapping) -> Result<CUmemGenericAllocationHandle, CuResult> {
        let size = place.size as usize;
        let handle = self.driver.mem_create(size, &self.prop(place, false))?;
        self.driver.mem_map(place.address, size, 0, handle, 0).inspect_err(|_| {
            let _ = self.driver.mem_release(handle);
        })?;
        Ok(handle)
    }

    /// Gives access to contiguous chunks in one call, because that call is the most expensive part of mapping them.
    pub(super) fn open_all(
        &self,
        memory: &mut Memory,
        mapped: Vec<(ChunkMapping, CUmemGenericAllocationHandle)>,
    ) {
        let Some((first, _)) = mapped.first() else { return };
        let size: u64 = mapped.iter().map(|(place, _)| place.size).sum();
        let opened = self.driver.mem_set_access(first.address, size as usize, &self.access());
        for (place, handle) in mapped {
            if opened.is_ok() {
                memory.settle(place.address, Backing::Device(handle));
            } else {
                self.release(&place, handle);
                self.books.give(place.granules());
            }
        }
    }
}
