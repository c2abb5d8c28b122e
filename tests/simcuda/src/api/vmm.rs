//! Virtual memory management.

use std::ffi::{c_int, c_uint, c_void};
use std::os::fd::IntoRawFd;

use simstate::counters::Count;

use super::driver_api;
use crate::abi::{
    Error, Handle, In, LOCATION_DEVICE, LOCATION_HOST, LOCATION_HOST_NUMA, LOCATION_HOST_NUMA_CURRENT,
    MemAccessDesc, MemAllocationProp, MemLocation, Out, Result,
};
use crate::context;
use crate::driver::driver;
use crate::memory::backing::Physical;
use crate::memory::sharing::{self, HANDLE_FD};
use crate::memory::va::{Access, GRANULARITY, Kind, Rights};

driver_api! {
    fn cuMemGetAllocationGranularity(granularity: Out<usize>, prop: In<MemAllocationProp>, option: c_uint) {
        self::check_prop(&prop.get()?)?;
        if option > 1 {
            return Err(Error::INVALID_VALUE);
        }
        granularity.set(GRANULARITY as usize)
    }

    fn cuMemAddressReserve(pointer: Out<u64>, size: usize, alignment: usize, wanted: u64, flags: u64) {
        let driver = driver()?;
        pointer.required()?;
        let alignment = alignment as u64;
        if !self::granular(size as u64) || flags != 0 || alignment != 0 && !alignment.is_power_of_two() {
            return Err(Error::INVALID_VALUE);
        }
        let device = context::current().map_or(0, |context| context.core.device.index);
        let mut space = driver.memory.space.write().unwrap_or_else(|e| e.into_inner());
        pointer.set(space.reserve(size as u64, alignment, wanted, device)?)
    }

    fn cuMemAddressFree(pointer: u64, size: usize) {
        let driver = driver()?;
        let mut space = driver.memory.space.write().unwrap_or_else(|e| e.into_inner());
        space.free_reservation(pointer, size as u64)
    }

    /// Device memory is charged to its GPU, host memory to nobody.
    fn cuMemCreate(handle: Out<Handle>, size: usize, prop: In<MemAllocationProp>, flags: u64) {
        let driver = driver()?;
        handle.required()?;
        let prop = prop.get()?;
        self::check_prop(&prop)?;
        if !self::granular(size as u64) || flags != 0 {
            return Err(Error::INVALID_VALUE);
        }
        let location = prop.location;
        let ledger = match location.kind {
            LOCATION_DEVICE => Some(driver.device(location.id)?.ledger()?),
            _ => None,
        };
        let size = size as u64;
        handle.set(driver.memory.create(|handle| match prop.handle_types {
            0 => Physical::new(&driver.memory.backing, handle, size, location, ledger),
            _ => sharing::exportable(driver, handle, size, location, ledger),
        })?)?;
        let counts = match ledger {
            Some(ledger) => ledger,
            None => driver.device(0)?.ledger()?,
        };
        counts.count(Count::VmmCreates, 1);
        Ok(())
    }

    fn cuMemRelease(handle: Handle) {
        driver()?.memory.release(handle)
    }

    fn cuMemRetainAllocationHandle(handle: Out<Handle>, address: u64) {
        let memory = &driver()?.memory;
        handle.required()?;
        let space = memory.space.read().unwrap_or_else(|e| e.into_inner());
        let (_, mapping) = space.find_mapping(address).ok_or(Error::INVALID_VALUE)?;
        handle.set(memory.retain(&mapping.physical))
    }

    fn cuMemGetAllocationPropertiesFromHandle(prop: Out<MemAllocationProp>, handle: Handle) {
        let physical = driver()?.memory.physical(handle)?;
        let (location, handle_types) = (physical.location, physical.handle_types);
        prop.set(MemAllocationProp { kind: PINNED, handle_types, location, win32: 0, flags: [0; 8] })
    }

    /// The descriptor is the caller's, and so is closing it.
    fn cuMemExportToShareableHandle(shareable: Out<c_void>, handle: Handle, kind: c_uint, flags: u64) {
        let driver = driver()?;
        shareable.required()?;
        let physical = driver.memory.physical(handle)?;
        if flags != 0 || kind != HANDLE_FD || physical.handle_types & kind == 0 {
            return Err(Error::INVALID_VALUE);
        }
        shareable.of::<c_int>().set(sharing::export(driver, &physical)?.into_raw_fd())
    }

    /// The descriptor travels in the place of a pointer, and stays the caller's.
    fn cuMemImportFromShareableHandle(handle: Out<Handle>, shareable: usize, kind: c_uint) {
        let driver = driver()?;
        handle.required()?;
        let fd = c_int::try_from(shareable).map_err(|_| Error::INVALID_VALUE)?;
        if kind != HANDLE_FD {
            return Err(Error::NOT_SUPPORTED);
        }
        handle.set(driver.memory.create(|handle| sharing::import(driver, fd, handle))?)
    }

    fn cuMemMap(pointer: u64, size: usize, offset: usize, handle: Handle, flags: u64) {
        let memory = &driver()?.memory;
        let physical = memory.physical(handle)?;
        let size = size as u64;
        if size == 0 || flags != 0 || pointer == 0 {
            return Err(Error::INVALID_VALUE);
        }
        let whole = pointer.is_multiple_of(GRANULARITY) && self::granular(size) && size <= physical.size();
        if !whole || offset != 0 {
            return Err(Error::NOT_SUPPORTED);
        }
        memory.space.write().unwrap_or_else(|e| e.into_inner()).map(pointer, size, physical)
    }

    fn cuMemUnmap(pointer: u64, size: usize) {
        let memory = &driver()?.memory;
        memory.space.write().unwrap_or_else(|e| e.into_inner()).unmap(pointer, size as u64)
    }

    fn cuMemSetAccess(pointer: u64, size: usize, descriptions: In<MemAccessDesc>, count: usize) {
        let driver = driver()?;
        let wanted = self::rights(descriptions, count)?;
        let mut space = driver.memory.space.write().unwrap_or_else(|e| e.into_inner());
        space.set_access(pointer, size as u64, &wanted)
    }

    fn cuMemGetAccess(flags: Out<u64>, location: In<MemLocation>, pointer: u64) {
        let memory = &driver()?.memory;
        let who = self::who(&location.get()?)?;
        flags.set(0)?;
        let space = memory.space.read().unwrap_or_else(|e| e.into_inner());
        match space.find(pointer) {
            // Memory that was not mapped by cuMemMap has no rights that can be asked for (seen on an H100).
            Some((_, region)) if !matches!(region.kind, Kind::Reservation { .. }) => Ok(()),
            _ => {
                let (_, mapping) = space.find_mapping(pointer).ok_or(Error::INVALID_VALUE)?;
                flags.set(self::flags(mapping.rights.of(who)))
            }
        }
    }
}

const PINNED: c_uint = 1;

/// `CUmemAccess_flags`.
pub(super) fn flags(access: Access) -> u64 {
    match access {
        Access::None => 0,
        Access::Read => 1,
        Access::ReadWrite => 3,
    }
}

/// Who is to have which rights.
pub(super) fn rights(descriptions: In<MemAccessDesc>, count: usize) -> Result<Vec<(usize, Access)>> {
    if count == 0 || count > 64 {
        return Err(Error::INVALID_VALUE);
    }
    let right = |description: &MemAccessDesc| {
        let all = [Access::None, Access::Read, Access::ReadWrite];
        let access = all.into_iter().find(|&access| self::flags(access) == u64::from(description.flags));
        let who = self::who(&description.location).map_err(|_| Error::INVALID_VALUE)?;
        Ok((who, access.ok_or(Error::INVALID_VALUE)?))
    };
    descriptions.to_vec(count)?.iter().map(right).collect()
}

/// Whose rights a location stands for.
pub(super) fn who(location: &MemLocation) -> Result<usize> {
    match location.kind {
        LOCATION_DEVICE => driver()?.device(location.id).map(|device| device.index),
        LOCATION_HOST..=LOCATION_HOST_NUMA_CURRENT => Ok(Rights::HOST),
        _ => Err(Error::INVALID_VALUE),
    }
}

fn granular(size: u64) -> bool {
    size > 0 && size.is_multiple_of(GRANULARITY)
}

fn check_prop(prop: &MemAllocationProp) -> Result {
    if prop.kind != PINNED {
        return Err(Error::INVALID_VALUE);
    }
    match prop.location.kind {
        LOCATION_DEVICE => driver()?.device(prop.location.id as c_int).map(|_| ())?,
        // "HOST allocations are not IPC capable"; and "current" is no place to stay.
        LOCATION_HOST if prop.handle_types != 0 => return Err(Error::INVALID_VALUE),
        LOCATION_HOST | LOCATION_HOST_NUMA => driver().map(|_| ())?,
        _ => return Err(Error::INVALID_VALUE),
    }
    // The other types are of Windows, or need a fabric.
    if prop.handle_types & !HANDLE_FD != 0 { Err(Error::NOT_SUPPORTED) } else { Ok(()) }
}
