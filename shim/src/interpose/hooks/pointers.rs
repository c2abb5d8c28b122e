//! Attributes of pointers.
//!
//! An allocation consists of chunks that nvshare maps by cuMemMap, some perhaps to host memory, and its last granule may be used
//! only in part. For such mappings the driver's answers differ from those for its own allocations: the context, where the
//! memory is, where it begins and ends, how it can be exported. nvshare answers as the driver does for its own allocations.
//! For all other attributes and pointers the driver answers.

#![allow(non_snake_case, clippy::missing_safety_doc, missing_docs)]

use super::guard::{guarded, relaxed};
use crate::async_pool;
use crate::cuda::abi::*;
use crate::cuda::driver::{Driver, NOBODYS};
use crate::interpose::driver_calls;
use crate::memory::device::Device;
use crate::memory::{devices, sync_memops};
use crate::submit::pass;
use std::ffi::c_void;
use std::sync::Arc;

/// The allocation or mapping that contains an address.
pub(super) struct Allocated {
    pub(super) base: CUdeviceptr,
    pub(super) size: u64,
    kind: AllocatedBy,
}

/// The call that made it.
enum AllocatedBy {
    /// cuMemAlloc.
    Plain(Plain),
    /// cuMemAllocAsync.
    Pool { pool: CUmemoryPool, device: Option<CUdevice>, segment: (CUdeviceptr, u64) },
    /// cuMemMap, of an object on this GPU that can be exported by these types of handles; `usable` if this GPU has access.
    Mapped { device: CUdevice, handle_types: u32, object: CUdeviceptr, usable: bool },
    /// cuIpcOpenMemHandle.
    Imported,
}

struct Plain {
    device: Arc<Device>,
    context: CUcontext,
    /// Address and bytes of its region, which several small allocations share.
    mapping: (CUdeviceptr, u64),
    number: u64,
    block: u64,
}

/// The value of an attribute, as wide as the driver writes it; booleans are 32 bits.
enum Answer {
    Word(u32),
    Long(u64),
}

impl Allocated {
    /// The allocation that contains an address. `None` if there is none.
    pub(super) fn at(address: CUdeviceptr) -> Option<Self> {
        match async_pool::find(address) {
            Some(async_pool::Found::Live(base, size, pool)) => {
                let owner = |device: &Arc<Device>| Some((device.ordinal, device.memory().around(base)?));
                let owner = devices::all().iter().find_map(owner);
                let (device, segment) =
                    owner.map_or((None, (base, size)), |(device, segment)| (Some(device), segment));
                return Some(Self { base, size, kind: AllocatedBy::Pool { pool, device, segment } });
            }
            Some(async_pool::Found::Unused) => return None,
            None => {}
        }
        devices::all()
            .into_iter()
            .find_map(|device| Self::plain(&device, address).or_else(|| Self::mapped(&device, address)))
            .or_else(|| {
                let (base, size) = crate::ipc::containing(address)?;
                Some(Self { base, size, kind: AllocatedBy::Imported })
            })
    }

    fn plain(device: &Arc<Device>, address: CUdeviceptr) -> Option<Self> {
        let memory = device.memory();
        let allocation = memory.containing(address)?;
        let region = memory.region(allocation.region)?;
        let plain = Plain {
            device: device.clone(),
            context: region.context,
            mapping: (region.base, region.size),
            number: unique(device, allocation.number),
            block: unique(device, region.born),
        };
        Some(Self { base: allocation.base, size: allocation.size, kind: AllocatedBy::Plain(plain) })
    }

    /// For memory that the application maps itself, the driver's answers are about the mapping.
    fn mapped(device: &Arc<Device>, address: CUdeviceptr) -> Option<Self> {
        let memory = device.memory();
        let (object, view) = memory.views_in(address, 1).into_iter().next()?;
        let prop = memory.region(object)?.object()?.prop;
        let own = CUmemLocation::device(device.ordinal);
        let usable = |access: &CUmemAccessDesc| {
            access.location == own && access.flags != CU_MEM_ACCESS_FLAGS_PROT_NONE
        };
        let kind = AllocatedBy::Mapped {
            device: device.ordinal,
            handle_types: prop.requested_handle_types,
            object,
            usable: view.access.iter().any(usable),
        };
        Some(Self { base: view.address, size: view.size, kind })
    }

    fn device(&self) -> Option<CUdevice> {
        match &self.kind {
            AllocatedBy::Plain(plain) => Some(plain.device.ordinal),
            AllocatedBy::Pool { device, .. } => *device,
            AllocatedBy::Mapped { device, .. } => Some(*device),
            AllocatedBy::Imported => None,
        }
    }

    /// Whether its GPU has access to it.
    fn is_usable(&self) -> bool {
        !matches!(self.kind, AllocatedBy::Mapped { usable: false, .. })
    }

    /// Whether CU_POINTER_ATTRIBUTE_SYNC_MEMOPS can be set for it.
    fn can_be_synchronous(&self) -> bool {
        matches!(self.kind, AllocatedBy::Plain(_) | AllocatedBy::Pool { .. })
    }

    /// Whether the application has mapped the memory itself.
    pub(super) fn is_mapped(&self) -> bool {
        matches!(self.kind, AllocatedBy::Mapped { .. })
    }

    /// The value of an attribute. `None` if the driver is to answer.
    fn answer(&self, attribute: CUpointer_attribute, address: CUdeviceptr) -> Option<Answer> {
        let plain = match &self.kind {
            AllocatedBy::Plain(plain) => Some(plain),
            _ => None,
        };
        Some(match (attribute, &self.kind) {
            (CU_POINTER_ATTRIBUTE_MEMORY_TYPE, _) => Answer::Word(CU_MEMORYTYPE_DEVICE),
            (CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, _) => Answer::Word(self.device()? as u32),
            // The address in the current context; without a context the driver answers.
            (CU_POINTER_ATTRIBUTE_DEVICE_POINTER, _) if self.is_usable() && has_context() => {
                Answer::Long(address)
            }
            (CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR, AllocatedBy::Mapped { .. }) => Answer::Long(self.base),
            (CU_POINTER_ATTRIBUTE_MAPPING_SIZE, AllocatedBy::Mapped { .. }) => Answer::Long(self.size),
            (CU_POINTER_ATTRIBUTE_BUFFER_ID, AllocatedBy::Mapped { .. } | AllocatedBy::Pool { .. }) => {
                Answer::Long(by_address(self.base))
            }
            (CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID, AllocatedBy::Mapped { object, .. }) => {
                Answer::Long(by_address(*object))
            }
            (CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR, AllocatedBy::Pool { segment, .. }) => {
                Answer::Long(segment.0)
            }
            (CU_POINTER_ATTRIBUTE_MAPPING_SIZE, AllocatedBy::Pool { segment, .. }) => Answer::Long(segment.1),
            (CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID, AllocatedBy::Pool { segment, .. }) => {
                Answer::Long(by_address(segment.0))
            }
            (CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES, AllocatedBy::Mapped { handle_types, .. }) => {
                Answer::Long((*handle_types).into())
            }
            // The driver answers 1, except that it has been seen to answer 0 for memory that was just filled again.
            (CU_POINTER_ATTRIBUTE_SYNC_MEMOPS, AllocatedBy::Mapped { .. }) => Answer::Word(1),
            // The driver answers all others; its range is that of the application's reservation.
            (_, AllocatedBy::Mapped { .. }) => return None,
            (CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, _) => Answer::Long(self.base),
            (CU_POINTER_ATTRIBUTE_RANGE_SIZE, _) => Answer::Long(self.size),
            (CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES, _) => Answer::Long(0),
            (CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE, AllocatedBy::Pool { pool, .. }) => {
                Answer::Long(pool.0 as u64)
            }
            (CU_POINTER_ATTRIBUTE_SYNC_MEMOPS, _) if self.can_be_synchronous() => {
                Answer::Word(sync_memops::is_set(self.base).into())
            }
            (CU_POINTER_ATTRIBUTE_CONTEXT, _) => Answer::Long(plain?.context.0 as u64),
            // The driver would answer 0, as for all memory of cuMemCreate; for its own allocations it answers 1.
            (CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, _) => {
                Answer::Word(plain?.device.exportable.into())
            }
            (CU_POINTER_ATTRIBUTE_BUFFER_ID, _) => Answer::Long(plain?.number),
            (CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR, _) => Answer::Long(plain?.mapping.0),
            (CU_POINTER_ATTRIBUTE_MAPPING_SIZE, _) => Answer::Long(plain?.mapping.1),
            (CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID, _) => Answer::Long(plain?.block),
            _ => return None,
        })
    }

    /// Writes the value of an attribute. False if the driver is to answer.
    ///
    /// # Safety
    /// `data` points to where the value of this attribute goes.
    unsafe fn write(&self, data: *mut c_void, attribute: CUpointer_attribute, address: CUdeviceptr) -> bool {
        // SAFETY: the caller's promise, and the value is as wide as the attribute. The pointer need not be aligned.
        unsafe {
            match self.answer(attribute, address) {
                Some(Answer::Word(value)) => data.cast::<u32>().write_unaligned(value),
                Some(Answer::Long(value)) => data.cast::<u64>().write_unaligned(value),
                None => return false,
            }
        }
        true
    }

    /// Called after the driver has answered: as in the driver, querying the tokens for GPUDirect RDMA sets
    /// CU_POINTER_ATTRIBUTE_SYNC_MEMOPS.
    fn told(&self, attribute: CUpointer_attribute) {
        if attribute == CU_POINTER_ATTRIBUTE_P2P_TOKENS && self.can_be_synchronous() {
            let _ = relaxed(|| sync_memops::set(self.base, true));
        }
    }
}

/// Whether the calling thread has a context.
fn has_context() -> bool {
    let current = || Driver::get().ok()?.ctx_current().ok();
    current().is_some_and(|context| !context.is_null())
}

/// An identifier of what begins at an address: unique while that exists, and different from the driver's.
fn by_address(address: CUdeviceptr) -> u64 {
    1 << 63 | address
}

/// An identifier that is unique in the process, and different from the driver's.
fn unique(device: &Device, number: u64) -> u64 {
    1 << 62 | (device.ordinal as u64) << 48 | number
}

/// The address to pass to the driver: an unknown one instead of an address that nvshare has mapped and the application has not
/// allocated.
fn as_known(address: CUdeviceptr, known: Option<&Allocated>) -> CUdeviceptr {
    let ours = || devices::all().iter().any(|device| device.memory().covers(address));
    if known.is_none() && ours() { NOBODYS } else { address }
}

pub unsafe fn cuPointerGetAttribute(
    data: *mut c_void,
    attribute: CUpointer_attribute,
    ptr: CUdeviceptr,
) -> CuResult {
    guarded(|| {
        let known = Allocated::at(ptr);
        if !data.is_null()
            && let Some(known) = &known
            // SAFETY: the caller's pointer to where this attribute goes, not null.
            && unsafe { known.write(data, attribute, ptr) }
        {
            return CuResult::SUCCESS;
        }
        let _pass = match pass::enter_query() {
            Ok(pass) => pass,
            Err(result) => return result,
        };
        // SAFETY: the caller's arguments.
        let result =
            unsafe { driver_calls::cuPointerGetAttribute(data, attribute, as_known(ptr, known.as_ref())) };
        if result.is_success()
            && let Some(known) = known
        {
            known.told(attribute);
        }
        result
    })
}

pub unsafe fn cuPointerGetAttributes(
    num_attributes: u32,
    attributes: *mut CUpointer_attribute,
    data: *mut *mut c_void,
    ptr: CUdeviceptr,
) -> CuResult {
    guarded(|| {
        let _pass = match pass::enter_query() {
            Ok(pass) => pass,
            Err(result) => return result,
        };
        let known = Allocated::at(ptr);
        let asked = as_known(ptr, known.as_ref());
        // SAFETY: the caller's arguments.
        let result = unsafe { driver_calls::cuPointerGetAttributes(num_attributes, attributes, data, asked) };
        if result.is_success() {
            for index in 0..num_attributes as usize {
                // SAFETY: the driver has just read these arrays of `num_attributes`, and written where they point to.
                let (attribute, data) = unsafe { (*attributes.add(index), *data.add(index)) };
                let Some(known) = &known else {
                    if asked != ptr && attribute == CU_POINTER_ATTRIBUTE_HOST_POINTER {
                        // For an address that the driver does not know, it answers that the host may have it.
                        // SAFETY: as above; an address is eight bytes.
                        unsafe { data.cast::<u64>().write_unaligned(ptr) };
                    }
                    continue;
                };
                known.told(attribute);
                // SAFETY: as above.
                unsafe { known.write(data, attribute, ptr) };
            }
        }
        result
    })
}

pub unsafe fn cuPointerSetAttribute(
    value: *const c_void,
    attribute: CUpointer_attribute,
    ptr: CUdeviceptr,
) -> CuResult {
    guarded(|| {
        let known = Allocated::at(ptr);
        let asked = as_known(ptr, known.as_ref());
        if let Some(known) = known.filter(Allocated::can_be_synchronous) {
            if attribute != CU_POINTER_ATTRIBUTE_SYNC_MEMOPS || value.is_null() {
                return CuResult::INVALID_VALUE;
            }
            // SAFETY: the caller's pointer to the value, not null: a word, as the driver reads it.
            let on = unsafe { value.cast::<u32>().read_unaligned() } != 0;
            return relaxed(|| sync_memops::set(known.base, on))
                .map_or_else(|result| result, |()| CuResult::SUCCESS);
        }
        let _pass = match pass::enter_query() {
            Ok(pass) => pass,
            Err(result) => return result,
        };
        // SAFETY: the caller's arguments.
        unsafe { driver_calls::cuPointerSetAttribute(value, attribute, asked) }
    })
}

pub unsafe fn cuMemGetAddressRange_v2(
    base: *mut CUdeviceptr,
    size: *mut usize,
    dptr: CUdeviceptr,
) -> CuResult {
    guarded(|| {
        let known = Allocated::at(dptr);
        let asked = match &known {
            // As the driver does, which does not find memory to which its GPU has no access.
            Some(known) if !known.is_usable() => NOBODYS,
            known => as_known(dptr, known.as_ref()),
        };
        let intact = || Driver::get().is_ok_and(|driver| driver.ctx_intact().is_ok());
        let Some(known) = known.filter(|known| known.is_usable() && intact()) else {
            // SAFETY: the caller's arguments.
            return unsafe { driver_calls::cuMemGetAddressRange_v2(base, size, asked) };
        };
        // SAFETY: the caller's pointers to where the answers go; each may be null, and is then not wanted.
        unsafe {
            if !base.is_null() {
                base.write_unaligned(known.base);
            }
            if !size.is_null() {
                size.write_unaligned(known.size as usize);
            }
        }
        CuResult::SUCCESS
    })
}

pub unsafe fn cuMemGetAccess(flags: *mut u64, location: *const CUmemLocation, ptr: CUdeviceptr) -> CuResult {
    guarded(|| {
        let _pass = match pass::enter_query() {
            Ok(pass) => pass,
            Err(result) => return result,
        };
        let known = Allocated::at(ptr);
        // SAFETY: the caller's arguments.
        let result = unsafe { driver_calls::cuMemGetAccess(flags, location, as_known(ptr, known.as_ref())) };
        // Only mappings of the application have access rights. For its own allocations the driver answers 0.
        if result.is_success() && known.is_some_and(|known| !known.is_mapped()) {
            // SAFETY: the driver has just written there.
            unsafe { flags.write_unaligned(0) };
        }
        result
    })
}

pub unsafe fn cuCtxGetFlags(flags: *mut u32) -> CuResult {
    // SAFETY: the caller's arguments.
    let result = unsafe { driver_calls::cuCtxGetFlags(flags) };
    guarded(|| {
        if result.is_success() && sync_memops::is_flagged() {
            // SAFETY: the driver has just written there.
            unsafe { *flags &= !CU_CTX_SYNC_MEMOPS };
        }
        result
    })
}

pub unsafe fn cuCtxSetFlags(flags: u32) -> CuResult {
    guarded(|| {
        let added = if sync_memops::is_flagged() { CU_CTX_SYNC_MEMOPS } else { 0 };
        // SAFETY: the caller's arguments, and the flag that its memory needs.
        let result = unsafe { driver_calls::cuCtxSetFlags(flags | added) };
        if result.is_success() && flags & CU_CTX_SYNC_MEMOPS != 0 {
            sync_memops::flag_is_the_applications();
        }
        result
    })
}
