//! Operations: what streams carry and graphs are made of.
//!
//! An operation is judged when it runs, not when it is submitted: its memory may have come and gone in between. It
//! occupies an engine of the GPU for as long as the configured rates say, and does its real work meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use simstate::counters::Count;
use simstate::time::{Timeline, now_ns, sleep_until, transfer_ns};

use crate::abi::{Error, Handle, HostFn, Result, StreamCallback, UserData, call_host, call_stream};
use crate::context::Core;
use crate::driver::{Device, driver, lock};
use crate::event::Event;
use crate::graph::{Graph, Node};
use crate::ipc_event::SharedEvent;
use crate::kernels::Launch;
use crate::memory::access::{End, Side};
use crate::memory::va::{Kind, Place, User};
use crate::pool::Block;
use crate::value::{Condition, Value};

/// An operation.
#[derive(Clone)]
pub enum Op {
    /// Only waits for its fences.
    Nothing,
    Kernel(Launch),
    Copy(Copy),
    Set(Set),
    Prefetch(Prefetch),
    /// The beginning, or the end, of stream-ordered memory.
    Alive(Arc<Block>, bool),
    /// The end of what `cuMemAlloc` made.
    Free(u64),
    Host {
        function: HostFn,
        data: UserData,
    },
    /// Unlike a host function, runs after errors too.
    Callback {
        function: StreamCallback,
        stream: Handle,
        data: UserData,
    },
    /// Notes the time for an event.
    Time(Arc<AtomicU64>),
    /// Tells other processes that the stream has come to a recording of an event.
    Reach(Arc<SharedEvent>, u64),
    /// Waits for a recording, perhaps by another process.
    AwaitReached(Arc<SharedEvent>, u64),
    /// Waits until a value is in memory.
    AwaitValue(Value, Condition),
    /// Writes a value to memory.
    WriteValue(Value),
    /// Records an event from inside a graph.
    Stamp(Arc<Event>),
    /// Waits for an event from inside a graph.
    Await(Arc<Event>),
    Graph(Arc<Vec<Arc<Node>>>),
    /// A graph inside a graph, which can still be edited; an instance has its nodes as they were.
    Child(Arc<Graph>),
}

/// A copy of a box of bytes; a plain copy is a box of one row.
#[derive(Clone, Copy, Debug)]
pub struct Copy {
    pub dst: u64,
    pub dst_side: Side,
    pub src: u64,
    pub src_side: Side,
    pub width: u64,
    pub height: u64,
    pub depth: u64,
    pub dst_pitch: u64,
    pub dst_slice: u64,
    pub src_pitch: u64,
    pub src_slice: u64,
    /// It is a single row of bytes, and was asked for as one.
    pub linear: bool,
    /// The GPUs that use the two ends, where a caller says so; else the one that it runs on uses both.
    pub dst_device: Option<usize>,
    pub src_device: Option<usize>,
}

/// A memset of rows.
#[derive(Clone, Copy, Debug)]
pub struct Set {
    pub dst: u64,
    pub value: u32,
    /// Bytes of an element: 1, 2 or 4.
    pub element: u64,
    /// Elements of a row.
    pub width: u64,
    pub height: u64,
    pub pitch: u64,
}

/// Moves managed memory to the GPU or away from it.
#[derive(Clone, Copy, Debug)]
pub struct Prefetch {
    pub address: u64,
    pub len: u64,
    pub to_gpu: bool,
}

impl Op {
    /// `CUgraphNodeType`.
    pub fn node_type(&self) -> u32 {
        match self {
            Op::Kernel(_) => 0,
            Op::Copy(_) => 1,
            Op::Set(_) => 2,
            Op::Host { .. } | Op::Callback { .. } => 3,
            Op::Graph(_) | Op::Child(_) => 4,
            Op::Alive(_, true) => 10,
            Op::Alive(_, false) => 11,
            Op::Nothing
            | Op::Prefetch(_)
            | Op::Free(_)
            | Op::Time(_)
            | Op::Reach(..)
            | Op::AwaitReached(..) => 5,
            Op::AwaitValue(..) | Op::WriteValue(_) => 12,
            Op::Await(_) => 6,
            Op::Stamp(_) => 7,
        }
    }

    /// Does it.
    pub fn execute(&self, core: &Core) -> Result {
        if let Op::Callback { function, stream, data } = self {
            let status = core.healthy().err().map_or(0, |error| error.0);
            call_stream(*function, *stream, status, *data);
            return Ok(());
        }
        if let Op::Time(stamp) = self {
            stamp.store(now_ns(), SeqCst);
            return Ok(());
        }
        if let Op::Reach(event, number) = self {
            event.reach(*number);
            return Ok(());
        }
        if core.healthy().is_err() {
            // What was queued behind a failure never runs.
            return Ok(());
        }
        let device = core.device;
        match self {
            Op::Nothing | Op::Callback { .. } | Op::Time(_) | Op::Reach(..) => Ok(()),
            Op::AwaitReached(event, number) => {
                event.wait(*number);
                Ok(())
            }
            Op::AwaitValue(value, condition) => value.wait(core, *condition),
            Op::WriteValue(value) => value.write(core),
            Op::Kernel(launch) => launch.execute(core),
            Op::Copy(copy) => copy.execute(device),
            Op::Set(set) => set.execute(device),
            Op::Prefetch(prefetch) => prefetch.execute(device),
            Op::Alive(block, live) => {
                block.set_live(*live);
                Ok(())
            }
            Op::Free(address) => {
                let mut space = driver()?.memory.space.write().unwrap_or_else(|e| e.into_inner());
                space.free(*address, |kind| matches!(kind, Kind::Allocation { .. }));
                Ok(())
            }
            Op::Host { function, data } => {
                call_host(*function, *data);
                Ok(())
            }
            Op::Stamp(event) => {
                event.stamp();
                Ok(())
            }
            Op::Await(event) => event.synchronize(),
            Op::Graph(nodes) => nodes.iter().try_for_each(|node| node.op.execute(core)),
            Op::Child(graph) => Op::Graph(graph.snapshot()).execute(core),
        }
    }
}

/// Occupies the compute engine.
pub fn compute<R>(device: &Device, ns: u64, work: impl FnOnce() -> R) -> R {
    device.gpu.compute.occupy(ns, work, |start, ns| device.gpu.compute_load.note(start, ns))
}

fn link<R>(device: &Device, engine: &Timeline, ns: u64, work: impl FnOnce() -> R) -> R {
    engine.occupy(ns, work, |start, ns| device.gpu.copy_load.note(start, ns))
}

impl Copy {
    /// A plain copy.
    pub fn linear(dst: (u64, Side), src: (u64, Side), len: u64) -> Copy {
        Copy {
            dst: dst.0,
            dst_side: dst.1,
            src: src.0,
            src_side: src.1,
            width: len,
            height: 1,
            depth: 1,
            dst_pitch: len,
            dst_slice: len,
            src_pitch: len,
            src_slice: len,
            linear: true,
            dst_device: None,
            src_device: None,
        }
    }

    fn bytes(&self) -> u64 {
        self.width.saturating_mul(self.height).saturating_mul(self.depth)
    }

    fn rows(&self) -> impl Iterator<Item = (u64, u64)> {
        let copy = *self;
        (0..copy.depth).flat_map(move |z| {
            (0..copy.height).map(move |y| {
                let dst = copy
                    .dst
                    .wrapping_add(z.wrapping_mul(copy.dst_slice))
                    .wrapping_add(y.wrapping_mul(copy.dst_pitch));
                let src = copy
                    .src
                    .wrapping_add(z.wrapping_mul(copy.src_slice))
                    .wrapping_add(y.wrapping_mul(copy.src_pitch));
                (dst, src)
            })
        })
    }

    /// Fails if a GPU address in it is none now, as a node of a graph must not have one.
    pub fn is_possible(&self, device: &Device) -> Result {
        let memory = &driver()?.memory;
        let missing = |address, side, write| {
            let user = User { arrays: side == Side::Array, ..User::driver(device.index) };
            let end = memory.locate(address, self.width, user, side, write);
            side == Side::Device && end == Err(Error::ILLEGAL_ADDRESS)
        };
        let missing = |(dst, src)| missing(dst, self.dst_side, true) || missing(src, self.src_side, false);
        if self.rows().any(missing) { Err(Error::INVALID_VALUE) } else { Ok(()) }
    }

    /// Whether an end of it is pageable host memory, which the driver copies before it returns.
    pub fn pageable(&self) -> bool {
        let Ok(driver) = driver() else { return false };
        let pageable = |address, side| {
            let user = User::driver(0);
            driver.memory.locate(address, 1, user, side, false) == Ok(End::Pageable)
        };
        pageable(self.src, self.src_side) || pageable(self.dst, self.dst_side)
    }

    fn execute(&self, device: &'static Device) -> Result {
        let driver = driver()?;
        let bytes = self.bytes();
        if bytes == 0 {
            return Ok(());
        }
        let memory = &driver.memory;
        let user = |named: Option<usize>, side| User {
            arrays: side == Side::Array,
            ..User::driver(named.unwrap_or(device.index))
        };
        let to = user(self.dst_device, self.dst_side);
        let from = user(self.src_device, self.src_side);
        let mut ends = (End::Pageable, End::Pageable);
        for (i, (dst, src)) in self.rows().enumerate() {
            let dst = memory.locate(dst, self.width, to, self.dst_side, true)?;
            let src = memory.locate(src, self.width, from, self.src_side, false)?;
            if i == 0 {
                ends = (dst, src);
            }
        }
        let mut paging = 0;
        for (dst, src) in self.rows() {
            paging += page_in(device, dst, self.width)? + page_in(device, src, self.width)?;
        }
        let on_gpu = |end| matches!(end, End::Known(Place::Device(_) | Place::Managed(_)));
        let config = &driver.config;
        let rate = if ends.0 == End::Pageable || ends.1 == End::Pageable {
            config.pageable_bandwidth
        } else {
            config.link_bandwidth
        };
        let ledger = device.ledger()?;
        let work = || {
            self.rows()
                .try_for_each(|(dst, src)| memory.copy((dst, ends.0, to), (src, ends.1, from), self.width))
        };
        match (on_gpu(ends.0), on_gpu(ends.1)) {
            (true, false) => {
                link(device, &device.gpu.copy_in, paging + transfer_ns(bytes, rate), work)?;
                ledger.count(Count::BytesIn, bytes);
            }
            (false, true) => {
                link(device, &device.gpu.copy_out, paging + transfer_ns(bytes, rate), work)?;
                ledger.count(Count::BytesOut, bytes);
            }
            // Read and written.
            (true, true) => {
                compute(
                    device,
                    paging + transfer_ns(bytes.saturating_mul(2), config.device_bandwidth),
                    work,
                )?;
            }
            (false, false) => {
                let end = now_ns() + transfer_ns(bytes, config.pageable_bandwidth);
                work()?;
                sleep_until(end);
            }
        }
        Ok(())
    }
}

impl Set {
    /// As [`Copy::is_possible`].
    pub fn is_possible(&self, device: &Device) -> Result {
        let memory = &driver()?.memory;
        let row = self.width.saturating_mul(self.element);
        let rows = (0..self.height).map(|y| self.dst.wrapping_add(y.wrapping_mul(self.pitch)));
        let missing =
            |address| memory.locate(address, row, User::driver(device.index), Side::Device, true).is_err();
        if rows.into_iter().any(missing) { Err(Error::INVALID_VALUE) } else { Ok(()) }
    }

    fn execute(&self, device: &'static Device) -> Result {
        let driver = driver()?;
        let row = self.width.saturating_mul(self.element);
        let bytes = row.saturating_mul(self.height);
        if bytes == 0 {
            return Ok(());
        }
        let rows = || (0..self.height).map(|y| self.dst.wrapping_add(y.wrapping_mul(self.pitch)));
        let mut paging = 0;
        let user = User::driver(device.index);
        for address in rows() {
            driver.memory.locate(address, row, user, Side::Device, true)?;
            paging += page_in(device, address, row)?;
        }
        compute(device, paging + transfer_ns(bytes, driver.config.device_bandwidth), || {
            rows().try_for_each(|address| {
                driver.memory.fill(user, address, self.value, self.element, self.width)
            })
        })
    }
}

impl Prefetch {
    fn execute(&self, device: &'static Device) -> Result {
        let driver = driver()?;
        let space = driver.memory.space.read().unwrap_or_else(|e| e.into_inner());
        space.check(self.address, self.len.max(1), User::driver(device.index), false)?;
        let ranges = space.managed_in(self.address, self.address + self.len);
        drop(space);
        let ledger = device.ledger()?;
        for (begin, end, _) in ranges {
            let moved = {
                let mut pager = lock(&device.pager);
                if self.to_gpu {
                    pager.touch(ledger, begin, end - begin).faulted
                } else {
                    pager.evict(ledger, begin, end - begin)
                }
            };
            let engine = if self.to_gpu { &device.gpu.copy_in } else { &device.gpu.copy_out };
            link(
                device,
                engine,
                transfer_ns(moved * simstate::ledger::MANAGED_PAGE, driver.config.link_bandwidth),
                || (),
            );
        }
        Ok(())
    }
}

/// Brings the managed pages of a range to the GPU; says how long that takes.
pub fn page_in(device: &'static Device, address: u64, len: u64) -> Result<u64> {
    let driver = driver()?;
    let end = address.saturating_add(len);
    let ranges = driver.memory.space.read().unwrap_or_else(|e| e.into_inner()).managed_in(address, end);
    let mut ns = 0;
    for (begin, end, _) in ranges {
        let moved = lock(&device.pager).touch(device.ledger()?, begin, end - begin);
        let page = simstate::ledger::MANAGED_PAGE;
        ns += transfer_ns(moved.faulted * page, driver.config.um_fault_bandwidth);
        ns += transfer_ns(moved.evicted * page, driver.config.um_evict_bandwidth);
    }
    Ok(ns)
}
