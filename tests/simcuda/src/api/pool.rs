//! Stream-ordered memory, as plainly as its rules allow: an allocation is there at once, and a free waits for all work
//! of the context. Pools have handles and settings; what is allocated from them is counted nowhere.

use std::collections::HashMap;
use std::ffi::{c_int, c_uint, c_void};
use std::sync::{LazyLock, Mutex};

use super::{driver_api, memory};
use crate::abi::{Error, Handle, In, LOCATION_DEVICE, MemAccessDesc, MemLocation, Out, Result};
use crate::context;
use crate::driver::{driver, lock};
use crate::graph::{self, Status};
use crate::handles;

/// `CUmemPoolProps`, as far as it is looked at.
#[derive(Clone, Copy)]
#[repr(C)]
struct PoolProps {
    kind: c_uint,
    handle_types: c_uint,
    location: MemLocation,
    win32: usize,
    max_size: usize,
    usage: u16,
    reserved: [u8; 54],
}

struct Pool {
    device: c_int,
    /// Attributes 1 to 3, switches.
    switches: [c_int; 3],
    threshold: u64,
    is_default: bool,
}

#[derive(Default)]
struct Pools {
    pools: HashMap<Handle, Pool>,
    /// By device: the one that it began with, and the one that it has now.
    of_device: HashMap<c_int, (Handle, Handle)>,
}

static POOLS: LazyLock<Mutex<Pools>> = LazyLock::new(Mutex::default);

impl Pools {
    fn make(&mut self, device: c_int, is_default: bool) -> Handle {
        let handle = handles::fresh();
        self.pools.insert(handle, Pool { device, switches: [1; 3], threshold: 0, is_default });
        handle
    }

    fn of_device(&mut self, device: c_int) -> Result<&mut (Handle, Handle)> {
        driver()?.device(device)?;
        if !self.of_device.contains_key(&device) {
            let pool = self.make(device, true);
            self.of_device.insert(device, (pool, pool));
        }
        self.of_device.get_mut(&device).ok_or(Error::INVALID_DEVICE)
    }

    fn get(&mut self, pool: Handle) -> Result<&mut Pool> {
        self.pools.get_mut(&pool).ok_or(Error::INVALID_VALUE)
    }
}

driver_api! {
    fn cuDeviceGetDefaultMemPool(pool: Out<Handle>, device: c_int) {
        pool.set(lock(&POOLS).of_device(device)?.0)
    }

    fn cuDeviceGetMemPool(pool: Out<Handle>, device: c_int) {
        pool.set(lock(&POOLS).of_device(device)?.1)
    }

    fn cuDeviceSetMemPool(device: c_int, pool: Handle) {
        let mut pools = lock(&POOLS);
        if pools.get(pool)?.device != device {
            return Err(Error::INVALID_VALUE);
        }
        pools.of_device(device)?.1 = pool;
        Ok(())
    }

    fn cuMemPoolCreate(pool: Out<Handle>, props: In<PoolProps>) {
        pool.required()?;
        let props = props.get()?;
        if props.kind != 1 || props.location.kind != LOCATION_DEVICE || props.handle_types != 0 {
            return Err(Error::NOT_SUPPORTED);
        }
        driver()?.device(props.location.id)?;
        pool.set(lock(&POOLS).make(props.location.id, false))
    }

    /// A device that had it has its default one again.
    fn cuMemPoolDestroy(pool: Handle) {
        let mut pools = lock(&POOLS);
        if pools.get(pool)?.is_default {
            return Err(Error::INVALID_VALUE);
        }
        pools.pools.remove(&pool);
        pools.of_device.values_mut().filter(|(_, now)| *now == pool).for_each(|(first, now)| *now = *first);
        Ok(())
    }

    fn cuMemPoolSetAttribute(pool: Handle, attribute: c_uint, value: In<c_void>) {
        let mut pools = lock(&POOLS);
        let pool = pools.get(pool)?;
        match attribute {
            1..=3 => pool.switches[attribute as usize - 1] = value.cast::<c_int>().get()?,
            4 => pool.threshold = value.cast::<u64>().get()?,
            6 | 8 if value.cast::<u64>().get()? == 0 => {}
            _ => return Err(Error::INVALID_VALUE),
        }
        Ok(())
    }

    fn cuMemPoolGetAttribute(pool: Handle, attribute: c_uint, value: Out<c_void>) {
        let mut pools = lock(&POOLS);
        let pool = pools.get(pool)?;
        match attribute {
            1..=3 => value.of::<c_int>().set(pool.switches[attribute as usize - 1]),
            4 => value.of::<u64>().set(pool.threshold),
            5..=8 => value.of::<u64>().set(0),
            _ => Err(Error::INVALID_VALUE),
        }
    }

    fn cuMemPoolSetAccess(pool: Handle, map: In<MemAccessDesc>, count: usize) {
        lock(&POOLS).get(pool)?;
        map.to_vec(count).map(|_| ())
    }

    fn cuMemPoolTrimTo(pool: Handle, keep: usize) {
        let _ = keep;
        lock(&POOLS).get(pool).map(|_| ())
    }

    fn cuMemAllocAsync / cuMemAllocAsync_ptsz |null| (pointer: Out<u64>, bytes: usize, stream: Handle) {
        pointer.required()?;
        self::outside_capture(null, stream)?;
        pointer.set(memory::allocate(bytes as u64)?)
    }

    fn cuMemAllocFromPoolAsync / cuMemAllocFromPoolAsync_ptsz |null| (
        pointer: Out<u64>, bytes: usize, pool: Handle, stream: Handle,
    ) {
        pointer.required()?;
        lock(&POOLS).get(pool)?;
        self::outside_capture(null, stream)?;
        pointer.set(memory::allocate(bytes as u64)?)
    }

    fn cuMemFreeAsync / cuMemFreeAsync_ptsz |null| (pointer: u64, stream: Handle) {
        self::outside_capture(null, stream)?;
        memory::free_allocation(pointer)
    }
}

/// Memory nodes are not supported.
fn outside_capture(null: context::Null, stream: Handle) -> Result {
    let stream = context::stream(null, stream)?;
    stream.usable()?;
    if graph::status(&stream) == Status::None { Ok(()) } else { Err(Error::NOT_SUPPORTED) }
}
