//! Allocations, host memory, managed memory, and what is known about a pointer.

use std::collections::BTreeSet;
use std::ffi::{c_int, c_uint, c_void};
use std::sync::{Arc, Mutex};

use super::driver_api;
use crate::abi::{
    Error, Handle, In, LOCATION_DEVICE, MEMORYTYPE_DEVICE, MEMORYTYPE_HOST, MemLocation, Out, Result,
};
use crate::context::{self, Context, Null};
use crate::driver::{Driver, driver, lock};
use crate::graph;
use crate::memory::backing::Physical;
use crate::memory::va::{self, Access, Kind};
use crate::op::{Op, Prefetch};
use crate::pool::{self, Block};

/// `cuMemAlloc` takes memory in units of this size.
const UNIT: u64 = 64 << 10;

driver_api! {
    fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) {
        let context = context::healthy()?;
        let capacity = driver()?.segment.memory();
        let used = context.core.device.ledger()?.used();
        free.set_if_wanted(capacity.saturating_sub(used) as usize);
        total.set_if_wanted(capacity as usize);
        Ok(())
    }

    /// Of the time when sizes had 32 bits.
    fn cuMemGetInfo(free: Out<c_uint>, total: Out<c_uint>) {
        let context = context::healthy()?;
        let capacity = driver()?.segment.memory();
        let used = context.core.device.ledger()?.used();
        free.set_if_wanted(capacity.saturating_sub(used).try_into().unwrap_or(c_uint::MAX));
        total.set_if_wanted(capacity.try_into().unwrap_or(c_uint::MAX));
        Ok(())
    }

    /// What is refused is at address 0. In a context that has failed nothing is looked at, here and where memory is freed.
    fn cuMemAlloc_v2(pointer: Out<u64>, bytes: usize) {
        context::unbroken()?;
        pointer.set(0)?;
        pointer.set(self::allocate(bytes as u64)?)
    }

    /// Says the pitch of what it then refuses for want of memory too.
    fn cuMemAllocPitch_v2(pointer: Out<u64>, pitch: Out<usize>, width: usize, height: usize, element: c_uint) {
        context::unbroken()?;
        pointer.set_if_wanted(0);
        pitch.set_if_wanted(0);
        pointer.required()?;
        pitch.required()?;
        context::healthy()?;
        if !matches!(element, 4 | 8 | 16) || height == 0 {
            return Err(Error::INVALID_VALUE);
        }
        let row = width.checked_next_multiple_of(512).unwrap_or(0);
        pitch.set(row)?;
        match row.checked_mul(height) {
            Some(bytes) => pointer.set(self::allocate(bytes as u64)?),
            None if row.wrapping_mul(height) == 0 => Err(Error::INVALID_VALUE),
            None => Err(Error::OUT_OF_MEMORY),
        }
    }

    /// Waits for the work of the context first, as the real one does, but not for stream-ordered memory.
    fn cuMemFree_v2(pointer: u64) {
        driver()?;
        context::unbroken()?;
        if pointer == 0 {
            return Ok(());
        }
        let context = context::healthy()?;
        graph::refuse_unsafe(&context.core)?;
        if let Ok(block) = Block::at(pointer) {
            return pool::free(block.address, None);
        }
        let freeable = |kind: &Kind| matches!(kind, Kind::Allocation { .. } | Kind::Managed);
        self::free(&context, pointer, freeable)
    }

    fn cuMemGetAddressRange_v2(base: Out<u64>, size: Out<usize>, pointer: u64) {
        base.set_if_wanted(0);
        size.set_if_wanted(0);
        context::healthy()?;
        let known = self::describe(driver()?, pointer).filter(|known| known.access != 0).ok_or(Error::NOT_FOUND)?;
        base.set_if_wanted(known.allocation.0);
        size.set_if_wanted(known.allocation.1 as usize);
        Ok(())
    }

    fn cuMemAllocHost_v2(pointer: Out<u64>, bytes: usize) {
        self::allocate_host(pointer, bytes, 0)
    }

    fn cuMemHostAlloc(pointer: Out<u64>, bytes: usize, flags: c_uint) {
        if flags & !7 != 0 {
            return Err(Error::INVALID_VALUE);
        }
        self::allocate_host(pointer, bytes, flags)
    }

    fn cuMemFreeHost(pointer: u64) {
        let context = context::healthy()?;
        graph::refuse_unsafe(&context.core)?;
        self::free(&context, pointer, |kind| matches!(kind, Kind::HostAllocation { .. }))
    }

    fn cuMemHostGetDevicePointer_v2(device: Out<u64>, host: u64, flags: c_uint) {
        context::healthy()?;
        if flags != 0 {
            return Err(Error::INVALID_VALUE);
        }
        self::host_flags(host)?;
        device.set(host)
    }

    fn cuMemHostGetFlags(flags: Out<c_uint>, host: u64) {
        context::healthy()?;
        flags.set(self::host_flags(host)?)
    }

    fn cuMemHostRegister_v2(host: u64, bytes: usize, flags: c_uint) {
        let context = context::healthy()?;
        if host == 0 || bytes == 0 || flags & !0xf != 0 {
            return Err(Error::INVALID_VALUE);
        }
        if flags & 0x4 != 0 {
            // Memory of other devices.
            return Err(Error::NOT_SUPPORTED);
        }
        graph::refuse_unsafe(&context.core)?;
        let mut space = driver()?.memory.space.write().unwrap_or_else(|e| e.into_inner());
        space.register(host, bytes as u64, flags, context.core.device.index, context.owner())
    }

    fn cuMemHostUnregister(host: u64) {
        let context = context::healthy()?;
        graph::refuse_unsafe(&context.core)?;
        crate::module::await_work(context.owner());
        self::free(&context, host, |kind| matches!(kind, Kind::HostRegistration { .. }))
            .map_err(|_| Error::HOST_MEMORY_NOT_REGISTERED)
    }

    fn cuMemAllocManaged(pointer: Out<u64>, bytes: usize, flags: c_uint) {
        let context = context::current()?;
        pointer.set(0)?;
        if bytes == 0 || !matches!(flags, 1 | 2) {
            return Err(Error::INVALID_VALUE);
        }
        context.core.healthy()?;
        graph::refuse_unsafe(&context.core)?;
        let mut space = driver()?.memory.space.write().unwrap_or_else(|e| e.into_inner());
        let device = context.core.device.index;
        pointer.set(space.allocate_host(bytes as u64, Kind::Managed, device, context.owner())?)
    }

    fn cuMemPrefetchAsync / cuMemPrefetchAsync_ptsz |null| (
        pointer: u64, bytes: usize, device: c_int, stream: Handle,
    ) {
        let kind = if device == -1 { crate::abi::LOCATION_HOST } else { LOCATION_DEVICE };
        self::prefetch(null, pointer, bytes, MemLocation { kind, id: device }, stream)
    }

    fn cuMemPrefetchAsync_v2 / cuMemPrefetchAsync_v2_ptsz |null| (
        pointer: u64, bytes: usize, location: MemLocation, flags: c_uint, stream: Handle,
    ) {
        if flags != 0 {
            return Err(Error::INVALID_VALUE);
        }
        self::prefetch(null, pointer, bytes, location, stream)
    }

    /// Advice is checked and has no effect: pages go by their last use alone.
    fn cuMemAdvise(pointer: u64, bytes: usize, advice: c_uint, device: c_int) {
        let _ = device;
        self::advise(pointer, bytes, advice)
    }

    fn cuMemAdvise_v2(pointer: u64, bytes: usize, advice: c_uint, location: MemLocation) {
        let _ = location;
        self::advise(pointer, bytes, advice)
    }

    fn cuStreamAttachMemAsync / cuStreamAttachMemAsync_ptsz |null| (
        stream: Handle, pointer: u64, len: usize, flags: c_uint,
    ) {
        let _ = len;
        let stream = context::stream(null, stream)?;
        stream.usable()?;
        if !matches!(flags, 1 | 2 | 4) {
            return Err(Error::INVALID_VALUE);
        }
        self::require_managed(pointer, 1)
    }

    fn cuPointerGetAttribute(data: Out<c_void>, attribute: c_uint, pointer: u64) {
        let driver = driver()?;
        data.required()?;
        let known = self::describe(driver, pointer).filter(Pointer::is_memory).ok_or(Error::INVALID_VALUE)?;
        let zero = |error| {
            data.of::<u64>().set_if_wanted(0);
            Err(error)
        };
        match attribute {
            // As the current context sees it, which may not be able to.
            3 if context::current().is_err() => zero(Error::INVALID_CONTEXT),
            3 if known.access == 0 => zero(Error::INVALID_VALUE),
            4 if !known.host => zero(Error::INVALID_VALUE),
            _ => known.answer(driver, data, attribute),
        }
    }

    /// Unlike the function for a single attribute, answers zeros for a pointer it doesn't know.
    fn cuPointerGetAttributes(count: c_uint, attributes: In<c_uint>, data: In<Out<c_void>>, pointer: u64) {
        let driver = driver()?;
        let known = self::describe(driver, pointer).unwrap_or(Pointer { address: pointer, ..Pointer::default() });
        for i in 0..count as usize {
            known.answer(driver, data.at(i)?, attributes.at(i)?)?;
        }
        Ok(())
    }

    /// Synchronous memory operations are the only attribute that can be set, and not of memory that is mapped by hand.
    /// All of them are synchronous here.
    fn cuPointerSetAttribute(value: In<c_uint>, attribute: c_uint, pointer: u64) {
        let on = value.get()? != 0;
        let known = self::describe(driver()?, pointer).filter(Pointer::is_memory).ok_or(Error::INVALID_VALUE)?;
        if known.reserved {
            return Err(Error::NOT_SUPPORTED);
        }
        if attribute != 6 {
            return Err(Error::INVALID_VALUE);
        }
        known.set_synchronous(on);
        Ok(())
    }
}

/// The regions that have been made synchronous, by their number.
static SYNCHRONOUS: Mutex<BTreeSet<u64>> = Mutex::new(BTreeSet::new());

fn allocate(bytes: u64) -> Result<u64> {
    let context = context::healthy()?;
    if bytes == 0 {
        return Err(Error::INVALID_VALUE);
    }
    graph::refuse_unsafe(&context.core)?;
    let unit = if bytes >= va::GRANULARITY { va::GRANULARITY } else { UNIT };
    let size = bytes.checked_next_multiple_of(unit).ok_or(Error::OUT_OF_MEMORY)?;
    let driver = driver()?;
    let device = context.core.device;
    let location = MemLocation { kind: LOCATION_DEVICE, id: device.index as c_int };
    let backing = &driver.memory.backing;
    let physical = Arc::new(Physical::new(backing, 0, size, location, Some(device.ledger()?))?);
    let mut space = driver.memory.space.write().unwrap_or_else(|e| e.into_inner());
    let kind = Kind::Allocation { physical: physical.clone(), requested: bytes };
    space.allocate(&physical, kind, device.index, context.owner())
}

fn allocate_host(pointer: Out<u64>, bytes: usize, flags: c_uint) -> Result {
    let context = context::healthy()?;
    pointer.required()?;
    if bytes == 0 {
        return Err(Error::INVALID_VALUE);
    }
    graph::refuse_unsafe(&context.core)?;
    let mut space = driver()?.memory.space.write().unwrap_or_else(|e| e.into_inner());
    let kind = Kind::HostAllocation { flags };
    pointer.set(space.allocate_host(bytes as u64, kind, context.core.device.index, context.owner())?)
}

/// Frees what begins at `pointer` once nothing uses it any more.
pub(super) fn free(context: &Arc<Context>, pointer: u64, which: impl Fn(&Kind) -> bool + Copy) -> Result {
    let driver = driver()?;
    {
        let space = driver.memory.space.read().unwrap_or_else(|e| e.into_inner());
        let (base, region) = space.find(pointer).ok_or(Error::INVALID_VALUE)?;
        if base != pointer || !which(&region.kind) {
            return Err(Error::INVALID_VALUE);
        }
    }
    for stream in context.core.all_streams() {
        crate::stream::Fence::of(&stream).wait();
    }
    let mut space = driver.memory.space.write().unwrap_or_else(|e| e.into_inner());
    let region = space.free(pointer, which).ok_or(Error::INVALID_VALUE)?;
    drop(space);
    if matches!(region.kind, Kind::Managed) {
        let device = driver.device(region.device as c_int)?;
        lock(&device.pager).forget(device.ledger()?, pointer, region.size);
    }
    context.core.healthy()
}

fn host_flags(host: u64) -> Result<c_uint> {
    let space = driver()?.memory.space.read().unwrap_or_else(|e| e.into_inner());
    match space.find(host).ok_or(Error::INVALID_VALUE)?.1.kind {
        // Host allocations are mapped and portable whether that was asked for or not.
        Kind::HostAllocation { flags } => Ok(flags | 2),
        Kind::HostRegistration { flags } => Ok(flags | 2),
        _ => Err(Error::INVALID_VALUE),
    }
}

fn require_managed(pointer: u64, bytes: usize) -> Result {
    let space = driver()?.memory.space.read().unwrap_or_else(|e| e.into_inner());
    match space.find(pointer) {
        Some((base, region))
            if matches!(region.kind, Kind::Managed) && bytes as u64 <= region.size - (pointer - base) =>
        {
            Ok(())
        }
        _ => Err(Error::INVALID_VALUE),
    }
}

fn prefetch(null: Null, pointer: u64, bytes: usize, location: MemLocation, stream: Handle) -> Result {
    if bytes == 0 {
        return Err(Error::INVALID_VALUE);
    }
    require_managed(pointer, bytes)?;
    let to_gpu = match location.kind {
        LOCATION_DEVICE => {
            driver()?.device(location.id)?;
            true
        }
        2..=4 => false,
        _ => return Err(Error::INVALID_VALUE),
    };
    let operation = Op::Prefetch(Prefetch { address: pointer, len: bytes as u64, to_gpu });
    context::stream(null, stream)?.enqueue(operation).map(|_| ())
}

fn advise(pointer: u64, bytes: usize, advice: c_uint) -> Result {
    context::healthy()?;
    if !(1..=6).contains(&advice) {
        return Err(Error::INVALID_VALUE);
    }
    require_managed(pointer, bytes)
}

/// What is known about a pointer.
#[derive(Default)]
struct Pointer {
    address: u64,
    memory_type: c_uint,
    context: Handle,
    device: c_int,
    base: u64,
    size: u64,
    mapping: (u64, u64),
    /// What cuMemGetAddressRange says: of reserved addresses, the mapping.
    allocation: (u64, u64),
    /// Mapped by hand.
    reserved: bool,
    host: bool,
    managed: bool,
    mapped: bool,
    access: c_uint,
    /// How `cuMemExportToShareableHandle` can export it, and whether `cuIpcGetMemHandle` can.
    handle_types: c_uint,
    legacy_ipc: bool,
    id: u64,
}

fn describe(driver: &Driver, address: u64) -> Option<Pointer> {
    let space = driver.memory.space.read().unwrap_or_else(|e| e.into_inner());
    let (base, region) =
        space.find(address).filter(|(_, region)| !matches!(region.kind, Kind::Array { .. }))?;
    let mut known = Pointer {
        address,
        memory_type: MEMORYTYPE_DEVICE,
        context: region.context,
        device: region.device as c_int,
        base,
        size: region.size,
        mapping: (base, region.size),
        allocation: (base, region.size),
        reserved: false,
        host: false,
        managed: false,
        mapped: true,
        access: 3,
        handle_types: 0,
        legacy_ipc: matches!(region.kind, Kind::Allocation { .. }),
        id: region.id,
    };
    match &region.kind {
        // It ends with the last byte that was asked for.
        Kind::Allocation { requested, .. } if address - base >= *requested => return None,
        Kind::Allocation { requested, .. } => (known.size, known.allocation.1) = (*requested, *requested),
        Kind::Pooled { .. } => known.context = 0,
        Kind::Opened { .. } | Kind::Array { .. } => {}
        Kind::Managed => (known.managed, known.host) = (true, true),
        Kind::HostAllocation { .. } | Kind::HostRegistration { .. } => {
            (known.memory_type, known.host) = (MEMORYTYPE_HOST, true);
        }
        Kind::Reservation { .. } => match space.find_mapping(address) {
            Some((base, mapping)) => {
                (known.mapping, known.allocation) = ((base, mapping.size), (base, mapping.size));
                known.reserved = true;
                // Each mapping has a number of its own.
                known.id = base;
                known.mapped = mapping.rights.most() != Access::None;
                known.access = if known.mapped { 3 } else { 0 };
                known.handle_types = mapping.physical.handle_types;
                if mapping.on_gpu() {
                    known.device = mapping.physical.location.id;
                } else {
                    known.memory_type = MEMORYTYPE_HOST;
                }
            }
            None => return Some(Pointer { address, base, size: region.size, ..Pointer::default() }),
        },
    }
    Some(known)
}

impl Pointer {
    /// Whether anything is there: addresses may be reserved and no more, and all that is known of those is their range.
    fn is_memory(&self) -> bool {
        self.memory_type != 0
    }

    fn set_synchronous(&self, on: bool) {
        let mut synchronous = lock(&SYNCHRONOUS);
        if on {
            synchronous.insert(self.id);
        } else {
            synchronous.remove(&self.id);
        }
    }

    /// Writes the value of a `CUpointer_attribute`.
    fn answer(&self, driver: &Driver, data: Out<c_void>, attribute: c_uint) -> Result {
        let known = self.is_memory();
        match attribute {
            1 => data.of::<Handle>().set(self.context),
            2 => data.of::<c_uint>().set(self.memory_type),
            3 => data.of::<u64>().set(if known && self.access != 0 { self.address } else { 0 }),
            // What is not known may be the host's.
            4 => data.of::<u64>().set(if self.host || !known { self.address } else { 0 }),
            // Tokens that mean nothing here. Who has them reads and writes beside the driver.
            5 => {
                self.set_synchronous(true);
                data.of::<[u64; 2]>().set([self.id, 1])
            }
            6 => data.of::<c_uint>().set(lock(&SYNCHRONOUS).contains(&self.id).into()),
            7 => data.of::<u64>().set(self.id),
            8 => data.of::<c_uint>().set(c_uint::from(self.managed)),
            9 => data.of::<c_int>().set(if known { self.device } else { -2 }),
            10 => data.of::<c_uint>().set(c_uint::from(self.legacy_ipc)),
            11 => data.of::<u64>().set(self.base),
            12 => data.of::<usize>().set(self.size as usize),
            13 => data.of::<c_uint>().set(c_uint::from(known && self.mapped)),
            14 => data.of::<u64>().set(self.handle_types.into()),
            // GPUDirect RDMA, and decompression by hardware.
            15 | 21 => data.of::<c_uint>().set(self.legacy_ipc.into()),
            16 => data.of::<c_uint>().set(self.access),
            17 if !known => data.of::<Handle>().set(0),
            17 => data.of::<Handle>().set(Block::at(self.base).map_or(0, |block| block.pool())),
            18 => data.of::<usize>().set(self.mapping.1 as usize),
            19 => data.of::<u64>().set(self.mapping.0),
            20 if !known => data.of::<u64>().set(0),
            20 => {
                let space = driver.memory.space.read().unwrap_or_else(|e| e.into_inner());
                let block = match space.find_mapping(self.address) {
                    Some((_, mapping)) => mapping.physical.handle as u64,
                    None => self.id,
                };
                data.of::<u64>().set(block)
            }
            _ => Err(Error::INVALID_VALUE),
        }
    }
}
