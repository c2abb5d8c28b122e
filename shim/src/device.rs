//! One GPU of this process: its memory, its books, and what the application's threads do with them.

use crate::abi::*;
use crate::drain::{Mark, Streams};
use crate::driver::Driver;
use crate::hostpool::{HostPool, PinError, Pinner};
use crate::memory::{Allocation, Backing, CHUNK, Chunk, Freed, Kind, Left, Memory, Place, Region, SMALL};
use crate::session;
use crate::swap::SwapError;
use crate::together;
use crate::truth::Figures;
use nvshare::Books;
use nvshare::map::MappedPage;
use nvshare::policy;
use nvshare::shares::MemoryLimit;
use nvshare::slot::SlotSet;
use nvshare::snapshot::Snapshot;
use nvshare::sync::now;
use nvshare::units::{
    GRANULE, GpuUuid, Granules, MAX_GRANULES, MILLISECOND, Nanos, bytes_of, format_size, granules_for,
};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// How long an allocation that cannot wait for its engine waits for other clients to give back memory that they have freed, ns.
const SPARES_WAIT: Nanos = 10 * MILLISECOND;

/// What the engine and the application's threads share.
pub struct Shared {
    /// The driver.
    pub driver: &'static Driver,
    /// The GPU, as the driver counts.
    pub device: CUdevice,
    /// The GPU.
    pub gpu: GpuUuid,
    /// What this client has and asks for.
    pub books: Books<MappedPage>,
    /// Host memory for what is evicted.
    pub host: HostPool,
    /// The streams that may have work.
    pub streams: Streams,
    memory: Mutex<Memory>,
    /// Memory moves no more.
    settled: Condvar,
    /// Other processes may be given our memory to map.
    pub exportable: bool,
    /// More memory than there is may be allocated, and lies in host memory then.
    oversubscribe: bool,
    pinner: Arc<DriverPinner>,
    home: Mutex<Home>,
    moved: Condvar,
    /// The engine is to give everything back and end.
    pub leaving: AtomicBool,
}

/// Where the engine lives, if it is about to change.
#[derive(Default)]
struct Home {
    /// Where to move to.
    heir: Option<Heir>,
    /// It has nothing in any context.
    out: bool,
    /// Where it goes from there.
    back: Option<CUcontext>,
    engine_ended: bool,
}

/// Where the engine is to move to, because its context is about to be destroyed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heir {
    /// To another context.
    Context(CUcontext),
    /// Out of its context, which is the last one. It waits until it is known whether that one goes.
    Nowhere,
}

/// Registers host memory with the driver.
pub struct DriverPinner {
    driver: &'static Driver,
    /// The registration is good in all contexts and goes with this one.
    context: Mutex<CUcontext>,
}

impl DriverPinner {
    /// Registers in this context, for all contexts.
    pub fn new(driver: &'static Driver, context: CUcontext) -> Self {
        Self { driver, context: Mutex::new(context) }
    }

    fn context(&self) -> MutexGuard<'_, CUcontext> {
        self.context.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Pinner for Arc<DriverPinner> {
    fn pin(&self, address: *mut u8, length: usize) -> Result<(), PinError> {
        let refused = |result: CuResult| PinError::new(format!("cuMemHostRegister said {result}"));
        self.driver.ctx_push_current(*self.context()).map_err(refused)?;
        // SAFETY: the pool mapped this memory, keeps it while it is registered, and unpins it first.
        let pinned = unsafe { self.driver.mem_host_register(address, length, CU_MEMHOSTREGISTER_PORTABLE) };
        let _ = self.driver.ctx_pop_current();
        pinned.map_err(refused)
    }

    fn unpin(&self, address: *mut u8, _length: usize) {
        if self.driver.ctx_push_current(*self.context()).is_ok() {
            let _ = self.driver.mem_host_unregister(address);
            let _ = self.driver.ctx_pop_current();
        }
    }
}

impl Shared {
    /// The shared part of a client that has just registered.
    pub fn new(
        driver: &'static Driver,
        device: CUdevice,
        gpu: GpuUuid,
        books: Books<MappedPage>,
        host: HostPool,
        pinner: Arc<DriverPinner>,
        oversubscribe: bool,
    ) -> Self {
        let attribute = CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED;
        Self {
            exportable: driver.device_attribute(attribute, device) == Ok(1),
            oversubscribe,
            settled: Condvar::new(),
            driver,
            device,
            gpu,
            books,
            host,
            pinner,
            home: Mutex::default(),
            moved: Condvar::new(),
            streams: Streams::default(),
            memory: Mutex::default(),
            leaving: AtomicBool::new(false),
        }
    }

    /// The map of the application's memory.
    pub fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The map, in a moment when no memory moves.
    pub fn memory_at_rest(&self) -> MutexGuard<'_, Memory> {
        let at_rest = self.settled.wait_while(self.memory(), |memory| memory.moving);
        at_rest.unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Memory begins to move, or has come to rest.
    pub fn set_moving(&self, moving: bool) {
        self.memory().moving = moving;
        if !moving {
            self.settled.notify_all();
        }
    }

    /// Wakes the engine: something that it looks at has changed.
    pub fn knock(&self) {
        self.books.page().ring(self.books.slot());
    }

    /// What a chunk is made as.
    fn prop(&self, place: &Place, overflow: bool) -> CUmemAllocationProp {
        if overflow {
            let node =
                self.driver.device_attribute(CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID, self.device).unwrap_or(0);
            return CUmemAllocationProp::pinned(CUmemLocation::host_numa(node.max(0)));
        }
        place.prop.unwrap_or_else(|| {
            let mut prop = CUmemAllocationProp::pinned(CUmemLocation::device(self.device));
            if self.exportable {
                // Costs nothing (docs/decisions/0008), and cuIpcGetMemHandle may come at any time.
                prop.requested_handle_types = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
            }
            prop
        })
    }

    /// Makes a chunk of GPU memory, or of host memory that the GPU can use, and maps it at its places.
    ///
    /// # Errors
    /// The driver's; nothing is left behind.
    pub fn map(&self, place: &Place, overflow: bool) -> Result<CUmemGenericAllocationHandle, SwapError> {
        let created = self.driver.mem_create(place.size as usize, &self.prop(place, overflow));
        let handle = created.map_err(|result| SwapError::Driver { call: "cuMemCreate", result })?;
        if let Err(error) = self.map_at(place, handle) {
            let _ = self.driver.mem_release(handle);
            return Err(error);
        }
        Ok(handle)
    }

    /// Maps physical memory at a chunk's places.
    ///
    /// # Errors
    /// The driver's; nothing is mapped then.
    pub fn map_at(&self, place: &Place, handle: CUmemGenericAllocationHandle) -> Result<(), SwapError> {
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

    /// Unmaps a chunk at all its places.
    pub fn unmap(&self, place: &Place) {
        for address in std::iter::once(place.address).chain(place.views.iter().map(|(address, _)| *address)) {
            self.report(place, self.driver.mem_unmap(address, place.size as usize));
        }
    }

    /// Unmaps and releases a chunk's memory.
    pub fn release(&self, place: &Place, handle: CUmemGenericAllocationHandle) {
        self.unmap(place);
        self.report(place, self.driver.mem_release(handle));
    }

    fn report(&self, place: &Place, released: Result<(), CuResult>) {
        let Err(result) = released else { return };
        if self.leaving.load(Ordering::Acquire) {
            // The driver may have released it with the last context.
            tracing::debug!(gpu = %self.gpu, "{} at {:#x}: {result}", format_size(place.size), place.address);
        } else if result != CuResult::DEINITIALIZED {
            tracing::error!(
                gpu = %self.gpu,
                "{} at {:#x} could not be released: {result}",
                format_size(place.size),
                place.address
            );
        }
    }

    /// cuMemAlloc.
    ///
    /// # Errors
    /// As the driver's own: INVALID_VALUE for no bytes, OUT_OF_MEMORY for more than there can be.
    pub fn allocate(&self, bytes: u64, context: CUcontext) -> Result<CUdeviceptr, CuResult> {
        if bytes == 0 {
            tracing::warn!(gpu = %self.gpu, "an allocation of 0 B is refused, as the driver refuses it: ask for one byte or more");
            return Err(CuResult::INVALID_VALUE);
        }
        let mut memory = self.memory();
        if bytes > SMALL {
            let size = whole_granules(bytes);
            self.within_limits(bytes)?;
            if let Some(base) = self.reuse(&mut memory, size, Some(bytes), context) {
                return Ok(base);
            }
            let base = self.reserve(bytes)?;
            memory.add_whole(base, size, bytes, context);
            self.populate(&mut memory, base)?;
            return Ok(base);
        }
        if let Some(base) = memory.take_small(bytes, context) {
            return Ok(base);
        }
        self.within_limits(GRANULE)?;
        if self.reuse(&mut memory, GRANULE, None, context).is_none() {
            let slab = self.reserve(GRANULE)?;
            memory.add_slab(slab, context);
            self.populate(&mut memory, slab)?;
        }
        Ok(memory.take_small(bytes, context).expect("a new slab has room for a small allocation"))
    }

    /// The most granules that this client's allocations may come to. As if it had the GPU to itself: what
    /// other clients' contexts take of it meanwhile is made up for in host memory.
    fn limit(&self) -> Granules {
        if self.oversubscribe {
            MAX_GRANULES
        } else {
            self.books.page().capacity().saturating_sub(self.context())
        }
    }

    /// Granules of this client's context.
    fn context(&self) -> Granules {
        self.books.page().view(self.books.slot()).pinned
    }

    /// The client's memory limit: as it is now, since it may be changed at any time.
    fn memory_limit(&self) -> MemoryLimit {
        self.books.page().memory_limit(self.books.slot())
    }

    /// Whether `bytes` more are within the client's memory limit. Its allocations count, wherever they are, and its
    /// context, so that the limits of clients that fit beside one another add up to what the GPU has.
    ///
    /// # Errors
    /// OUT_OF_MEMORY, said in the log.
    pub fn within_limit(&self, bytes: u64) -> Result<(), CuResult> {
        let limit = self.memory_limit();
        let Some(granules) = limit.granules(self.books.page().capacity()) else { return Ok(()) };
        let context = self.context();
        let left = granules.saturating_sub(context).saturating_sub(self.books.demand());
        if bytes <= bytes_of(left) {
            return Ok(());
        }
        Err(self.refuse(
            bytes,
            &format!(
                "its memory limit is {}, of which its context takes {}. NVSHARE_MEMORY_LIMIT sets it, and `nvshare set --memory-limit` changes it",
                self.limit_text().unwrap_or_default(),
                format_size(bytes_of(context))
            ),
        ))
    }

    /// The client's memory limit for people, if it has one.
    pub fn limit_text(&self) -> Option<String> {
        let limit = self.memory_limit();
        let size = format_size(bytes_of(limit.granules(self.books.page().capacity())?));
        Some(if matches!(limit, MemoryLimit::Part(_)) {
            format!("{size} ({limit} of the pool)")
        } else {
            size
        })
    }

    /// Says in the log why an allocation is refused.
    pub fn refuse(&self, bytes: u64, why: &str) -> CuResult {
        tracing::warn!(
            gpu = %self.gpu,
            "an allocation of {} is refused: this process has {}, and {why}",
            format_size(bytes),
            format_size(bytes_of(self.books.demand()))
        );
        CuResult::OUT_OF_MEMORY
    }

    /// Whether the client may have `bytes` more: by its memory limit, and by what the GPU has.
    ///
    /// # Errors
    /// OUT_OF_MEMORY, said in the log; or what a process is told whose memory is lost.
    fn within_limits(&self, bytes: u64) -> Result<(), CuResult> {
        session::intact()?;
        self.within_limit(bytes)?;
        let limit = self.limit();
        if bytes <= bytes_of(limit.saturating_sub(self.books.demand())) {
            return Ok(());
        }
        let capacity = self.books.page().capacity();
        Err(self.refuse(
            bytes,
            &format!(
                "the pool has {} of which its context takes {}. NVSHARE_ENABLE_SINGLE_OVERSUB=1 allows more, in host memory",
                format_size(bytes_of(capacity)),
                format_size(bytes_of(capacity.saturating_sub(limit)))
            ),
        ))
    }

    /// Addresses for `bytes`, if the GPU and the host can ever hold them.
    ///
    /// # Errors
    /// OUT_OF_MEMORY, said in the log; or the driver's.
    pub fn reserve(&self, bytes: u64) -> Result<CUdeviceptr, CuResult> {
        self.within_limits(bytes)?;
        let size = whole_granules(bytes);
        self.host.commit(size).map_err(|error| self.refuse(bytes, &error.to_string()))?;
        self.driver
            .mem_address_reserve(size as usize, GRANULE as usize, 0, 0)
            .inspect_err(|_| self.host.uncommit(size))
    }

    /// Backs a new region with GPU memory if the client runs and there is room. If not, shuts the gate
    /// before the application learns the address, and leaves the region to the engine.
    ///
    /// While a capture is open the gate must stay open too: whoever captures goes through it to the
    /// capture's end, and the engine, which waits for that end before it moves anything, would wait for ever.
    /// So what finds no room then is mapped to host memory at once, and comes home later.
    ///
    /// # Errors
    /// OUT_OF_MEMORY: a capture is open, and the host has no memory either. The region is gone.
    pub fn populate(&self, memory: &mut Memory, base: CUdeviceptr) -> Result<(), CuResult> {
        let Some(granules) = memory.region(base).map(Region::granules) else { return Ok(()) };
        let admitted = self.books.grow(granules);
        if !memory.open {
            return Ok(());
        }
        if admitted {
            self.back(memory, base);
        }
        if memory.region(base).is_some_and(Region::usable) {
            return Ok(());
        }
        if session::close_unless_capturing(self.gpu) {
            self.knock();
            return Ok(());
        }
        let Err(error) = self.back_by_host(memory, base) else { return Ok(()) };
        if let Some(region) = memory.forget(base) {
            self.dispose(region);
        }
        Err(self.refuse(
            bytes_of(granules),
            &format!("a graph is being captured, so it cannot wait for room on the GPU, and {error}"),
        ))
    }

    /// Takes what the pool has for a region's chunks, one after the other.
    fn back(&self, memory: &mut Memory, base: CUdeviceptr) {
        let Some(region) = memory.region(base) else { return };
        let (places, in_one) = (region.missing(), region.is_untouched_allocation());
        let mut mapped = Vec::new();
        for place in places {
            let granules = place.granules();
            if !self.take_over_spares(memory, granules) {
                break;
            }
            if place.room {
                memory.settle(place.address, Backing::Booked);
                continue;
            }
            match self.make(memory, &place, in_one) {
                Some(handle) if in_one => mapped.push((place, handle)),
                Some(handle) => memory.settle(place.address, Backing::Device(handle)),
                None => {
                    self.books.give(granules);
                    break;
                }
            }
        }
        self.open_all(memory, mapped);
    }

    /// Takes granules of the pool, and has spares go for them if need be. False if there are none.
    fn take_over_spares(&self, memory: &mut Memory, granules: Granules) -> bool {
        let mut until = None;
        loop {
            let Err(free) = self.books.try_take(granules) else { return true };
            if self.drop_oldest_spare(memory) > 0 {
                continue;
            }
            // While a capture is open nobody can wait for the engine; but others give spares back at once.
            let until = *until.get_or_insert_with(|| now() + SPARES_WAIT);
            if !session::is_capturing() || now() >= until || !self.others_keep_spares() {
                return false;
            }
            self.books.wait_for_granules(free);
        }
    }

    /// Whether other clients hold more than they need, which they give back when somebody lacks it.
    fn others_keep_spares(&self) -> bool {
        !policy::keepers(&self.snapshot()).without(self.books.slot()).is_empty()
    }

    /// What the page of the GPU says now.
    pub fn snapshot(&self) -> Snapshot {
        let page = self.books.page();
        Snapshot::take(page, page.admitted())
    }

    /// Makes and maps a chunk. If the driver has no memory, spares go for it: something beside the pool may use the rest.
    fn make(&self, memory: &mut Memory, place: &Place, closed: bool) -> Option<CUmemGenericAllocationHandle> {
        loop {
            let made = if closed { self.map_closed(place).ok() } else { self.map(place, false).ok() };
            if made.is_some() || self.drop_oldest_spare(memory) == 0 {
                return made;
            }
        }
    }

    /// Makes and maps a chunk to which nobody has access yet.
    fn map_closed(&self, place: &Place) -> Result<CUmemGenericAllocationHandle, CuResult> {
        let size = place.size as usize;
        let handle = self.driver.mem_create(size, &self.prop(place, false))?;
        self.driver.mem_map(place.address, size, 0, handle, 0).inspect_err(|_| {
            let _ = self.driver.mem_release(handle);
        })?;
        Ok(handle)
    }

    /// Gives access to chunks that lie side by side, in one call: that is the dearest part of mapping them.
    fn open_all(&self, memory: &mut Memory, mapped: Vec<(Place, CUmemGenericAllocationHandle)>) {
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

    /// Maps all that is missing to host memory, because threads must go on and there is no room on the GPU: it comes home
    /// later. What the host holds the bytes of is not touched; nothing is, of a client that has not drained.
    ///
    /// # Errors
    /// The host has no memory for it either. What could be mapped is.
    pub fn back_all_by_host(&self, memory: &mut Memory) -> Result<(), SwapError> {
        for base in memory.missing() {
            self.back_by_host(memory, base)?;
        }
        Ok(())
    }

    /// Maps what is missing of a region to host memory.
    fn back_by_host(&self, memory: &mut Memory, base: CUdeviceptr) -> Result<(), SwapError> {
        for place in memory.region(base).map(Region::missing).unwrap_or_default() {
            if place.room {
                memory.settle(place.address, Backing::Denied);
                continue;
            }
            let handle = self.map(&place, true)?;
            memory.settle(place.address, Backing::Overflow(handle));
        }
        // The engine brings it home when the capture is over.
        self.knock();
        Ok(())
    }

    /// cuMemFree. False if the address is none that this process got here.
    ///
    /// As the driver's own, it returns when the work that may use the memory is done. While a capture is
    /// open there is no asking for that, and while memory moves the region is the engine's: the engine
    /// finishes the free then.
    pub fn free(&self, base: CUdeviceptr) -> bool {
        let (allocation, busy) = {
            let mut memory = self.memory();
            let Some(allocation) = memory.begin_free(base) else { return false };
            (allocation, memory.region(allocation.region).is_some_and(Region::in_use_by_gpu))
        };
        let unused = !busy || self.wait_for_work();
        self.end_free(self.memory(), allocation, unused);
        true
    }

    /// Frees what the caller knows to be unused, so that there is nothing to wait for. False as for
    /// [`Shared::free`].
    pub fn free_idle(&self, base: CUdeviceptr) -> bool {
        let mut memory = self.memory();
        let Some(allocation) = memory.begin_free(base) else { return false };
        self.end_free(memory, allocation, true);
        true
    }

    /// Finishes a free, or leaves it to the engine if the memory may be in use or moves.
    fn end_free(&self, mut memory: MutexGuard<'_, Memory>, allocation: Allocation, unused: bool) {
        if unused && !memory.moving {
            self.finish_free(&mut memory, allocation);
        } else {
            memory.doom(allocation);
            drop(memory);
            self.knock();
        }
    }

    fn finish_free(&self, memory: &mut Memory, allocation: Allocation) {
        if let Freed::Region(region) = memory.finish_free(allocation)
            && let Some(region) = memory.remove(region)
        {
            self.retire(memory, region);
        }
    }

    /// Waits for all work submitted so far, on whichever GPU: it may use this one's memory. False if an open
    /// capture forbids to ask.
    pub fn wait_for_work(&self) -> bool {
        // Nothing is held while it waits: the work may be waiting for a thread that begins a capture.
        let Some(mut mark) = session::with_no_capture(together::mark) else { return false };
        if !self.await_mark(&mut mark) {
            return false;
        }
        // A broken context does no work any more, so its memory is not in use either.
        if let Some(result) = mark.broken() {
            tracing::debug!(gpu = %self.gpu, "waiting for work: {result}");
        }
        true
    }

    /// Waits until a mark has passed. False if an open capture forbids to look.
    pub fn await_mark(&self, mark: &mut Mark) -> bool {
        loop {
            mark.wait();
            match session::with_no_capture(|| mark.look()) {
                Some(true) => return true,
                // A context that ends is waited for by the driver.
                Some(false) if mark.left() == 0 => std::thread::sleep(Duration::from_micros(100)),
                Some(false) => {}
                None => return false,
            }
        }
    }

    /// Finishes the frees that could not be finished at once.
    fn bury(&self) {
        let left = self.memory().left();
        if self.wait_for_work() {
            self.finish_left(left);
        }
    }

    /// Finishes the frees that were left when `left` was said. The work that may use their memory is done.
    pub fn finish_left(&self, left: Left) {
        let mut memory = self.memory();
        if memory.moving {
            return;
        }
        let Some((doomed, returned)) = memory.take_left(left) else { return };
        doomed.into_iter().for_each(|allocation| self.finish_free(&mut memory, allocation));
        returned.into_iter().for_each(|region| self.dispose(region));
    }

    /// Allocates by `attempt`; if there is no memory, again when what was freed before is given back. That it is free
    /// has been said already (see [`Shared::figures`]).
    ///
    /// # Errors
    /// What the last attempt said.
    pub fn once_freed<T>(&self, attempt: impl Fn() -> Result<T, CuResult>) -> Result<T, CuResult> {
        match attempt() {
            Err(CuResult::OUT_OF_MEMORY) if self.await_frees() => attempt(),
            result => result,
        }
    }

    /// Waits until the frees have ended that were put off. False if there is none, or if they cannot end now.
    pub fn await_frees(&self) -> bool {
        // Whoever is inside the gate would be waited for.
        if session::is_inside() || self.memory().put_off() == 0 {
            return false;
        }
        drop(self.memory_at_rest());
        self.bury();
        self.memory().put_off() == 0
    }

    /// Releases a region that nothing uses any more.
    pub fn dispose(&self, mut region: Region) {
        let granules = region.granules();
        let lost = region.chunks.iter().any(|chunk| matches!(chunk.backing, Backing::Moving));
        self.release_chunks(&mut region);
        crate::vmm::ended(&region);
        if !matches!(region.kind, Kind::Room) && !lost {
            // Where something may still be mapped, the addresses are the process's for good.
            self.free_addresses(&region);
            self.host.uncommit(region.size);
        }
        self.books.shrink(granules);
    }

    /// Gives back what a region has, wherever it is.
    pub fn release_chunks(&self, region: &mut Region) {
        for chunk in std::mem::take(&mut region.chunks) {
            self.dispose_chunk(region, chunk);
        }
    }

    /// Gives a region's addresses back, at which nothing is mapped any more.
    pub fn free_addresses(&self, region: &Region) {
        if let Err(result) = self.driver.mem_address_free(region.base, region.size as usize)
            && result != CuResult::DEINITIALIZED
            && !self.leaving.load(Ordering::Acquire)
        {
            tracing::error!(gpu = %self.gpu, "the addresses at {:#x} could not be freed: {result}", region.base);
        }
    }

    fn dispose_chunk(&self, region: &Region, chunk: Chunk) {
        let (place, granules) = (region.place(&chunk), chunk.granules());
        if chunk.fixed {
            self.books.unfix(granules);
        }
        match chunk.backing {
            Backing::Device(handle) => {
                self.release(&place, handle);
                self.books.give(granules);
            }
            Backing::Overflow(handle) => self.release(&place, handle),
            Backing::Evicted(copy) => self.host.free(copy.memory),
            Backing::Booked => self.books.give(granules),
            Backing::Absent | Backing::Denied => {}
            // Nothing is disposed of while memory moves, unless the engine has panicked: then nobody knows where it is.
            Backing::Moving => {}
        }
    }

    /// Where the engine is about to move to, because its own context will be destroyed.
    pub fn heir(&self) -> Option<Heir> {
        self.home().heir
    }

    fn home(&self) -> MutexGuard<'_, Home> {
        self.home.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Has the engine move what it has in `context` to its heir, and waits until it has. Nothing to do if its
    /// home is another one, or if it has ended.
    pub fn leave_context(&self, context: CUcontext, heir: Heir) {
        if *self.pinner.context() != context {
            return;
        }
        self.home().heir = Some(heir);
        self.knock();
        let waits = |home: &mut Home| home.heir.is_some() && !home.out && !home.engine_ended;
        drop(self.moved.wait_while(self.home(), waits));
    }

    /// If the engine has left all contexts, it goes to this one: the one before is still there, or another is.
    pub fn go_back(&self, context: CUcontext) {
        let mut home = self.home();
        if home.heir == Some(Heir::Nowhere) {
            home.back = Some(context);
            self.moved.notify_all();
        }
    }

    /// The last context is gone: the engine ends.
    pub fn end(&self) {
        {
            let _home = self.home();
            self.leaving.store(true, Ordering::Release);
            self.moved.notify_all();
        }
        self.knock();
    }

    /// The engine is at home in `context` now: the host memory too.
    pub fn at_home(&self, context: CUcontext) {
        self.host.repin(|| {
            *self.pinner.context() = context;
            true
        });
        self.home().heir = None;
        self.moved.notify_all();
    }

    /// The engine has nothing in any context, and neither has the host memory, until it is known what becomes of the one
    /// that it was in. The context to go to, unless the engine is to end.
    pub fn out_of_context(&self) -> Option<CUcontext> {
        let mut back = None;
        self.host.repin(|| {
            self.home().out = true;
            self.moved.notify_all();
            let undecided = |home: &mut Home| home.back.is_none() && !self.leaving.load(Ordering::Acquire);
            let decided = self.moved.wait_while(self.home(), undecided);
            let mut home = decided.unwrap_or_else(|poisoned| poisoned.into_inner());
            back = home.back.take();
            (home.heir, home.out) = (None, false);
            back.inspect(|context| *self.pinner.context() = *context).is_some()
        });
        back
    }

    /// Whether the engine has something to do that does not wait for room on the GPU.
    pub fn is_called_away(&self) -> bool {
        self.leaving.load(Ordering::Acquire) || self.heir().is_some() || session::intact().is_err()
    }

    /// The engine has ended: nobody waits for it any more.
    pub fn engine_ended(&self) {
        self.home().engine_ended = true;
        self.moved.notify_all();
    }

    /// A context is destroyed that was not the last one: its memory goes with it.
    pub fn release_context(&self, context: CUcontext) {
        // Nothing of it may be on its way.
        let regions = {
            let mut memory = self.memory_at_rest();
            self.drop_spares(&mut memory);
            memory.remove_context(context)
        };
        regions.into_iter().for_each(|region| self.dispose(region));
    }

    /// What this process is told about the GPU's memory.
    pub fn figures(&self) -> Figures {
        // Held, so that no free ends between the two looks.
        let memory = self.memory();
        let snapshot = Snapshot::take(self.books.page(), SlotSet::EMPTY);
        Figures::of(&snapshot, Some(self.books.slot()), self.memory_limit(), memory.put_off())
    }
}

fn whole_granules(bytes: u64) -> u64 {
    bytes_of(granules_for(bytes))
}

const _: () = assert!(CHUNK.is_multiple_of(GRANULE) && SMALL < GRANULE);
