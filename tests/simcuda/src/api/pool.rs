//! Stream-ordered memory: pools, allocations from them, and memory nodes of graphs.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::Arc;

use super::{driver_api, vmm};
use crate::abi::{
    Error, Handle, In, LOCATION_DEVICE, LOCATION_HOST, LOCATION_HOST_NUMA, MemAccessDesc, MemAllocNodeParams,
    MemLocation, MemPoolProps, Out, Result,
};
use crate::context::{self, Null};
use crate::driver::{Device, driver};
use crate::graph;
use crate::memory::va::{Access, Kind};
use crate::op::Op;
use crate::pool::{self, Block, DevicePools, Level, Pool};
use crate::stream::Stream;

const PINNED: c_uint = 1;
const POSIX_FILE_DESCRIPTOR: c_uint = 1;

driver_api! {
    fn cuDeviceGetDefaultMemPool(pool: Out<Handle>, device: c_int) {
        pool.set(DevicePools::default_of(driver()?.device(device)?)?.handle)
    }

    fn cuDeviceGetMemPool(pool: Out<Handle>, device: c_int) {
        pool.set(DevicePools::current_of(driver()?.device(device)?)?.handle)
    }

    fn cuDeviceSetMemPool(device: c_int, pool: Handle) {
        DevicePools::set_current(driver()?.device(device)?, self::find(pool)?)
    }

    fn cuMemGetDefaultMemPool(pool: Out<Handle>, location: In<MemLocation>, kind: c_uint) {
        pool.set(DevicePools::default_of(self::device_at(location, kind)?)?.handle)
    }

    fn cuMemGetMemPool(pool: Out<Handle>, location: In<MemLocation>, kind: c_uint) {
        pool.set(DevicePools::current_of(self::device_at(location, kind)?)?.handle)
    }

    fn cuMemSetMemPool(location: In<MemLocation>, kind: c_uint, pool: Handle) {
        DevicePools::set_current(self::device_at(location, kind)?, self::find(pool)?)
    }

    /// A pool may be made for sharing by descriptors, as on Linux; no entry point hands one out.
    fn cuMemPoolCreate(pool: Out<Handle>, props: In<MemPoolProps>) {
        let driver = driver()?;
        pool.required()?;
        let props = props.get()?;
        let known = match props.location.kind {
            LOCATION_DEVICE => driver.device(props.location.id).is_ok(),
            LOCATION_HOST | LOCATION_HOST_NUMA => true,
            _ => false,
        };
        if !known || props.kind != PINNED {
            return Err(Error::INVALID_VALUE);
        }
        if !matches!(props.handle_types, 0 | POSIX_FILE_DESCRIPTOR) {
            return Err(Error::NOT_SUPPORTED);
        }
        let created = Pool::create(props.location, props.max_size as u64);
        driver.pools.insert(created.handle, created.clone());
        pool.set(created.handle)
    }

    fn cuMemPoolDestroy(pool: Handle) {
        pool::destroy(pool)
    }

    fn cuMemPoolTrimTo(pool: Handle, keep: usize) {
        let pool = self::find(pool)?;
        if let Ok(context) = context::current() {
            graph::refuse_unsafe(&context.core)?;
        }
        pool.trim(keep as u64);
        Ok(())
    }

    fn cuMemPoolGetAttribute(pool: Handle, attribute: c_uint, value: Out<c_void>) {
        value.required()?;
        self::find(pool)?.state(|state| match attribute {
            1..=3 => value.of::<c_int>().set(state.reuse[attribute as usize - 1]),
            4 => value.of::<u64>().set(state.threshold),
            5 => value.of::<u64>().set(state.reserved.now),
            6 => value.of::<u64>().set(state.reserved.high),
            7 => value.of::<u64>().set(state.used.now),
            8 => value.of::<u64>().set(state.used.high),
            _ => Err(Error::INVALID_VALUE),
        })
    }

    /// The highest levels can only be forgotten.
    fn cuMemPoolSetAttribute(pool: Handle, attribute: c_uint, value: In<c_void>) {
        let forget = |level: &mut Level| match value.cast::<u64>().get()? {
            0 => {
                level.high = level.now;
                Ok(())
            }
            _ => Err(Error::INVALID_VALUE),
        };
        self::find(pool)?.state(|state| {
            match attribute {
                1..=3 => state.reuse[attribute as usize - 1] = value.cast::<c_int>().get()?,
                4 => state.threshold = value.cast::<u64>().get()?,
                6 => forget(&mut state.reserved)?,
                8 => forget(&mut state.used)?,
                _ => return Err(Error::INVALID_VALUE),
            }
            Ok(())
        })
    }

    fn cuMemPoolSetAccess(pool: Handle, accesses: In<MemAccessDesc>, count: usize) {
        let pool = self::find(pool)?;
        for (who, access) in vmm::rights(accesses, count)? {
            // Its own device is never shut out.
            if pool.location.kind == LOCATION_DEVICE && pool.location.id as usize == who && access != Access::ReadWrite {
                return Err(Error::INVALID_VALUE);
            }
            pool.set_rights(who, access);
        }
        Ok(())
    }

    fn cuMemPoolGetAccess(flags: Out<c_uint>, pool: Handle, location: In<MemLocation>) {
        flags.required()?;
        let who = vmm::who(&location.get()?)?;
        flags.set(vmm::flags(self::find(pool)?.rights_of(who)) as c_uint)
    }

    /// Whatever is refused, for whatever reason, gives address 0 (seen on an H200), before there is a context or a driver, too.
    fn cuMemAllocAsync / cuMemAllocAsync_ptsz |null| (pointer: Out<u64>, bytes: usize, stream: Handle) {
        let _ = pointer.set(0);
        let stream = context::stream(null, stream)?;
        let pool = DevicePools::current_of(stream.core.device)?;
        self::allocate(pointer, bytes, &pool, &stream)
    }

    fn cuMemAllocFromPoolAsync / cuMemAllocFromPoolAsync_ptsz |null| (
        pointer: Out<u64>, bytes: usize, pool: Handle, stream: Handle,
    ) {
        let _ = pointer.set(0);
        self::allocate(pointer, bytes, &self::find(pool)?, &context::stream(null, stream)?)
    }

    fn cuMemFreeAsync / cuMemFreeAsync_ptsz |null| (pointer: u64, stream: Handle) {
        self::free(null, pointer, stream)
    }

    fn cuDeviceGetGraphMemAttribute(device: c_int, attribute: c_uint, value: Out<u64>) {
        let device = driver()?.device(device)?;
        let level = |used| pool::graph_level(device, used);
        value.set(match attribute {
            0 => level(true).now,
            1 => level(true).high,
            2 => level(false).now,
            3 => level(false).high,
            _ => return Err(Error::INVALID_VALUE),
        })
    }

    fn cuDeviceSetGraphMemAttribute(device: c_int, attribute: c_uint, value: In<u64>) {
        let device = driver()?.device(device)?;
        if value.get()? != 0 || !matches!(attribute, 1 | 3) {
            return Err(Error::INVALID_VALUE);
        }
        pool::reset_graph_high(device, attribute == 1);
        Ok(())
    }

    fn cuDeviceGraphMemTrim(device: c_int) {
        pool::trim_graphs(driver()?.device(device)?)
    }

    fn cuGraphAddMemAllocNode(
        node: Out<Handle>, graph: Handle, before: In<Handle>, count: usize, params: Out<MemAllocNodeParams>,
    ) {
        let driver = driver()?;
        node.required()?;
        let mut given = params.get()?;
        let graph = driver.graphs.get(graph)?;
        let before = if count == 0 { Vec::new() } else { before.to_vec(count)? };
        let pool = &given.pool;
        if pool.kind != PINNED || pool.handle_types != 0 || pool.location.kind != LOCATION_DEVICE || given.bytes == 0 {
            return Err(Error::INVALID_VALUE);
        }
        let device = driver.device(pool.location.id)?;
        let rights = match given.access_count {
            0 => Vec::new(),
            count => vmm::rights(given.accesses, count)?,
        };
        let block = pool::graph_block(device, graph.handle, given.bytes as u64, &rights)?;
        given.pointer = block.address;
        node.set(graph.add_after(Op::Alive(block, true), &before)?)?;
        params.set(given)
    }

    fn cuGraphAddMemFreeNode(node: Out<Handle>, graph: Handle, before: In<Handle>, count: usize, pointer: u64) {
        node.required()?;
        let graph = driver()?.graphs.get(graph)?;
        let before = if count == 0 { Vec::new() } else { before.to_vec(count)? };
        node.set(graph.add_after(pool::graph_free(pointer, graph.handle)?, &before)?)
    }

    fn cuGraphMemFreeNodeGetParams(node: Handle, pointer: Out<u64>) {
        match &driver()?.nodes.get(node)?.op {
            Op::Alive(block, false) => pointer.set(block.address),
            _ => Err(Error::INVALID_VALUE),
        }
    }
}

fn find(pool: Handle) -> Result<Arc<Pool>> {
    driver()?.pools.get(pool).map_err(|_| Error::INVALID_VALUE)
}

/// The device at a location, which is the only kind of place that has pools of its own.
fn device_at(location: In<MemLocation>, kind: c_uint) -> Result<&'static Device> {
    let location = location.get()?;
    match (location.kind, kind) {
        (LOCATION_DEVICE, PINNED) => driver()?.device(location.id),
        (LOCATION_HOST | LOCATION_HOST_NUMA, _) => Err(Error::NOT_SUPPORTED),
        _ => Err(Error::INVALID_VALUE),
    }
}

fn allocate(pointer: Out<u64>, bytes: usize, pool: &Arc<Pool>, stream: &Arc<Stream>) -> Result {
    stream.exists()?;
    // What is refused is at address 0.
    pointer.set(0)?;
    stream.usable()?;
    if bytes == 0 {
        return Err(Error::INVALID_VALUE);
    }
    if !stream.capturing.load(std::sync::atomic::Ordering::SeqCst) {
        graph::refuse_unsafe(&stream.core)?;
        return pointer.set(pool.allocate(bytes as u64, stream)?);
    }
    if pool.location.kind != LOCATION_DEVICE {
        return Err(Error::NOT_SUPPORTED);
    }
    let (capture, _) = graph::position(stream)?;
    let driver = driver()?;
    let device = driver.device(pool.location.id)?;
    let rights: Vec<_> = (0..driver.devices.len()).map(|who| (who, pool.rights_of(who))).collect();
    let block = pool::graph_block(device, capture.graph.handle, bytes as u64, &rights)?;
    let address = block.address;
    graph::record(stream, Op::Alive(block, true))?;
    pointer.set(address)
}

fn free(null: Null, pointer: u64, stream: Handle) -> Result {
    let stream = context::stream(null, stream)?;
    stream.usable()?;
    if pointer == 0 {
        return Err(Error::INVALID_VALUE);
    }
    if stream.capturing.load(std::sync::atomic::Ordering::SeqCst) {
        let (capture, _) = graph::position(&stream)?;
        return graph::record(&stream, pool::graph_free(pointer, capture.graph.handle)?);
    }
    if Block::at(pointer).is_ok() {
        graph::refuse_unsafe(&stream.core)?;
        return pool::free(pointer, Some(&stream));
    }
    // What cuMemAlloc made can be freed so too.
    let ours = {
        let space = driver()?.memory.space.read().unwrap_or_else(|e| e.into_inner());
        let found = space.find(pointer);
        found.is_some_and(|(base, region)| base == pointer && matches!(region.kind, Kind::Allocation { .. }))
    };
    if ours { stream.enqueue(Op::Free(pointer)).map(|_| ()) } else { Err(Error::INVALID_VALUE) }
}
