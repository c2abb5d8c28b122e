//! Virtual memory management.

use std::ffi::{c_int, c_uint};

use simstate::counters::Count;

use super::driver_api;
use crate::abi::{
    Error, Handle, In, LOCATION_DEVICE, LOCATION_HOST, LOCATION_HOST_NUMA, LOCATION_HOST_NUMA_CURRENT,
    MemAccessDesc, MemAllocationProp, MemLocation, Out, Result,
};
use crate::context;
use crate::driver::driver;
use crate::memory::va::{Access, GRANULARITY};

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
        if prop.handle_types != 0 {
            return Err(Error::NOT_SUPPORTED);
        }
        let ledger = match prop.location.kind {
            LOCATION_DEVICE => Some(driver.device(prop.location.id)?.ledger()?),
            _ => None,
        };
        handle.set(driver.memory.create(size as u64, prop.location, ledger)?)?;
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
        let location = driver()?.memory.physical(handle)?.location;
        prop.set(MemAllocationProp { kind: 1, handle_types: 0, location, win32: 0, flags: [0; 8] })
    }

    fn cuMemMap(pointer: u64, size: usize, offset: usize, handle: Handle, flags: u64) {
        let memory = &driver()?.memory;
        let physical = memory.physical(handle)?;
        let size = size as u64;
        if !pointer.is_multiple_of(GRANULARITY) || !self::granular(size) || size > physical.size {
            return Err(Error::INVALID_VALUE);
        }
        // As documented: "must be zero", both of them.
        if offset != 0 || flags != 0 {
            return Err(Error::INVALID_VALUE);
        }
        memory.space.write().unwrap_or_else(|e| e.into_inner()).map(pointer, size, physical)
    }

    fn cuMemUnmap(pointer: u64, size: usize) {
        let memory = &driver()?.memory;
        memory.space.write().unwrap_or_else(|e| e.into_inner()).unmap(pointer, size as u64)
    }

    fn cuMemSetAccess(pointer: u64, size: usize, descriptions: In<MemAccessDesc>, count: usize) {
        let driver = driver()?;
        if count == 0 || count > 64 {
            return Err(Error::INVALID_VALUE);
        }
        let mut wanted = None;
        for description in descriptions.to_vec(count)? {
            let access = match description.flags {
                0 => Access::None,
                1 => Access::Read,
                3 => Access::ReadWrite,
                _ => return Err(Error::INVALID_VALUE),
            };
            match description.location.kind {
                LOCATION_DEVICE => {
                    driver.device(description.location.id)?;
                    wanted = Some(access);
                }
                // The host's access; device memory has none.
                LOCATION_HOST..=LOCATION_HOST_NUMA_CURRENT => {}
                _ => return Err(Error::INVALID_VALUE),
            }
        }
        let mut space = driver.memory.space.write().unwrap_or_else(|e| e.into_inner());
        match wanted {
            Some(access) => space.set_access(pointer, size as u64, access),
            None => Ok(()),
        }
    }

    fn cuMemGetAccess(flags: Out<u64>, location: In<MemLocation>, pointer: u64) {
        let memory = &driver()?.memory;
        location.get()?;
        let space = memory.space.read().unwrap_or_else(|e| e.into_inner());
        let (_, mapping) = space.find_mapping(pointer).ok_or(Error::INVALID_VALUE)?;
        flags.set(match mapping.access {
            Access::None => 0,
            Access::Read => 1,
            Access::ReadWrite => 3,
        })
    }
}

fn granular(size: u64) -> bool {
    size > 0 && size.is_multiple_of(GRANULARITY)
}

fn check_prop(prop: &MemAllocationProp) -> Result {
    const PINNED: c_uint = 1;
    if prop.kind != PINNED {
        return Err(Error::INVALID_VALUE);
    }
    match prop.location.kind {
        LOCATION_DEVICE => driver()?.device(prop.location.id as c_int).map(|_| ()),
        LOCATION_HOST | LOCATION_HOST_NUMA | LOCATION_HOST_NUMA_CURRENT => driver().map(|_| ()),
        _ => Err(Error::INVALID_VALUE),
    }
}
