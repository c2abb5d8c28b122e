//! cuMemAlloc: whether a client may have more memory, its addresses, and what stands behind them at first.

use crate::cuda::abi::*;
use crate::memory::CHUNK;
use crate::memory::device::Device;
use crate::memory::error::SwapError;
use crate::memory::map::{Memory, SMALL};
use crate::memory::region::{Backing, ChunkMapping, Region};
use crate::state;
use crate::submit::captures;
use nvshare::policy;
use nvshare::shares::MemoryLimit;
use nvshare::sync::now;
use nvshare::units::{
    GRANULE, Granules, MAX_GRANULES, MILLISECOND, Nanos, bytes_of, format_size, granules_for,
};

/// How long an allocation that cannot wait for its engine waits for other clients to give back memory that they have freed, ns.
const SPARES_WAIT: Nanos = 10 * MILLISECOND;

impl Device {
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
        self.books.page().view(self.books.slot()).context
    }

    /// The client's memory limit: as it is now, since it may be changed at any time.
    pub fn memory_limit(&self) -> MemoryLimit {
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
        state::intact()?;
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
        if captures::close_unless_capturing(self.gpu) {
            self.wake_engine();
            return Ok(());
        }
        let Err(error) = self.back_by_host(memory, base) else { return Ok(()) };
        if let Some(region) = memory.remove_unpublished(base) {
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
            if place.reservation {
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
            if !captures::is_capturing() || now() >= until || !self.others_keep_spares() {
                return false;
            }
            self.books.wait_for_granules(free);
        }
    }

    /// Whether other clients hold more than they need, which they give back when somebody lacks it.
    fn others_keep_spares(&self) -> bool {
        !policy::spare_holders(&self.snapshot()).without(self.books.slot()).is_empty()
    }

    /// Makes and maps a chunk. If the driver has no memory, spares go for it: something beside the pool may use the rest.
    fn make(
        &self,
        memory: &mut Memory,
        place: &ChunkMapping,
        closed: bool,
    ) -> Option<CUmemGenericAllocationHandle> {
        loop {
            let made = if closed { self.map_closed(place).ok() } else { self.map(place, false).ok() };
            if made.is_some() || self.drop_oldest_spare(memory) == 0 {
                return made;
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
            if place.reservation {
                memory.settle(place.address, Backing::Denied);
                continue;
            }
            let handle = self.map(&place, true)?;
            memory.settle(place.address, Backing::Overflow(handle));
        }
        // The engine brings it home when the capture is over.
        self.wake_engine();
        Ok(())
    }

    /// Allocates by `attempt`; if there is no memory, again when what was freed before is given back. That it is free
    /// has been said already (see [`Device::figures`]).
    ///
    /// # Errors
    /// What the last attempt said.
    pub fn once_freed<T>(&self, attempt: impl Fn() -> Result<T, CuResult>) -> Result<T, CuResult> {
        match attempt() {
            Err(CuResult::OUT_OF_MEMORY) if self.await_frees() => attempt(),
            result => result,
        }
    }
}

fn whole_granules(bytes: u64) -> u64 {
    bytes_of(granules_for(bytes))
}

const _: () = assert!(CHUNK.is_multiple_of(GRANULE) && SMALL < GRANULE);
