//! cuMemAlloc: whether a client may have more memory, the addresses, and the memory first mapped there.

use crate::cuda::abi::*;
use crate::memory::CHUNK;
use crate::memory::device::Device;
use crate::memory::error::SwapError;
use crate::memory::map::{Memory, SMALL};
use crate::memory::region::{Backing, ChunkMapping, Region};
use crate::state;
use crate::submit::{captures, gang};
use nvshare::policy;
use nvshare::shares::MemoryLimit;
use nvshare::sync::now;
use nvshare::units::{
    GRANULE, Granules, MAX_GRANULES, MILLISECOND, Nanos, bytes_of, format_size, granules_for,
};

/// How long an allocation that cannot wait for its engine waits for other clients to give back their spares, ns.
const SPARES_WAIT: Nanos = 10 * MILLISECOND;

impl Device {
    /// cuMemAlloc.
    ///
    /// # Errors
    /// As the driver's own: INVALID_VALUE for 0 bytes, OUT_OF_MEMORY for more than the limits allow.
    pub fn allocate(&self, bytes: u64, context: CUcontext) -> Result<CUdeviceptr, CuResult> {
        if bytes == 0 {
            tracing::warn!(gpu = %self.gpu, "an allocation of 0 B is refused, as without nvshare: ask for one byte or more");
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

    /// The most granules that this client may have allocated, as if it had the GPU to itself. If contexts of other
    /// clients leave less, the difference lies in host memory.
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

    /// The client's present memory limit, which may be changed at any time.
    pub fn memory_limit(&self) -> MemoryLimit {
        self.books.page().memory_limit(self.books.slot())
    }

    /// Checks that `bytes` more are within the client's memory limit. Its allocations count, wherever their bytes are, and its
    /// context too, so that clients fit on the GPU together if their limits add up to no more than the GPU has.
    ///
    /// # Errors
    /// OUT_OF_MEMORY; the log says why.
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

    /// The client's memory limit for messages, if it has one.
    pub fn limit_text(&self) -> Option<String> {
        let limit = self.memory_limit();
        let size = format_size(bytes_of(limit.granules(self.books.page().capacity())?));
        Some(if matches!(limit, MemoryLimit::Part(_)) {
            format!("{size} ({limit} of the pool)")
        } else {
            size
        })
    }

    /// Logs why an allocation is refused; returns OUT_OF_MEMORY.
    pub fn refuse(&self, bytes: u64, why: &str) -> CuResult {
        tracing::warn!(
            gpu = %self.gpu,
            "an allocation of {} is refused: this process has {}, and {why}",
            format_size(bytes),
            format_size(bytes_of(self.books.demand()))
        );
        CuResult::OUT_OF_MEMORY
    }

    /// Checks that the client may have `bytes` more, by its memory limit and by the size of the pool.
    ///
    /// # Errors
    /// OUT_OF_MEMORY, and the log says why; or the error of a failed process ([`state::intact`]).
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

    /// Reserves addresses for `bytes`, if the limits allow them and the host could hold them.
    ///
    /// # Errors
    /// OUT_OF_MEMORY, and the log says why; or the driver's.
    pub fn reserve(&self, bytes: u64) -> Result<CUdeviceptr, CuResult> {
        self.within_limits(bytes)?;
        let size = whole_granules(bytes);
        self.host.commit(size).map_err(|error| self.refuse(bytes, &error.to_string()))?;
        self.driver
            .mem_address_reserve(size as usize, GRANULE as usize, 0, 0)
            .inspect_err(|_| self.host.uncommit(size))
    }

    /// Backs a new region with GPU memory if the client runs and the pool has free granules. If not, shuts the gate
    /// before the application learns the address, and leaves the region to the engine.
    ///
    /// While a capture is open the gate must stay open: the capturing thread has to pass it to end the
    /// capture, and the engine waits for the capture to end before it moves anything, so a shut gate would be a deadlock.
    /// Memory for which there is no room then is mapped to host memory at once, and moves to the GPU later. So is memory that is
    /// allocated while a drain is paused.
    ///
    /// # Errors
    /// OUT_OF_MEMORY if a capture is open and the host has no memory either. The region is removed.
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
        // The threads go on for work that does not end without them, so they must not wait for room.
        if gang::is_paused(self.gpu) && self.back_by_host(memory, base).is_ok() {
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
            &format!("it cannot wait for room on the GPU while a graph is being captured, and {error}"),
        ))
    }

    /// Backs a region's chunks one after the other, as long as the pool has granules.
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

    /// Takes granules from the pool, releasing spares to get them if necessary. False if there are not enough.
    fn take_over_spares(&self, memory: &mut Memory, granules: Granules) -> bool {
        let mut until = None;
        loop {
            let Err(free) = self.books.try_take(granules) else { return true };
            if self.drop_oldest_spare(memory) > 0 {
                continue;
            }
            // While a capture is open, this thread cannot wait for the engine; but other clients give spares back quickly.
            let until = *until.get_or_insert_with(|| now() + SPARES_WAIT);
            if !captures::is_capturing() || now() >= until || !self.others_keep_spares() {
                return false;
            }
            self.books.wait_for_granules(free);
        }
    }

    /// Whether other clients hold spares, which they give back when another client lacks granules.
    fn others_keep_spares(&self) -> bool {
        !policy::spare_holders(&self.snapshot()).without(self.books.slot()).is_empty()
    }

    /// Creates and maps a chunk. If the driver has no memory for it, because something outside the pool uses some, releases
    /// spares and tries again.
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

    /// Maps all missing memory to host memory, because threads must go on and there is no room on the GPU. It moves to the GPU
    /// later. Evicted chunks are not touched; a client that has not drained has none.
    ///
    /// # Errors
    /// The host has not enough memory. Chunks for which it has are mapped.
    pub fn back_all_by_host(&self, memory: &mut Memory) -> Result<(), SwapError> {
        for base in memory.missing() {
            self.back_by_host(memory, base)?;
        }
        Ok(())
    }

    /// Maps the missing chunks of a region to host memory.
    fn back_by_host(&self, memory: &mut Memory, base: CUdeviceptr) -> Result<(), SwapError> {
        for place in memory.region(base).map(Region::missing).unwrap_or_default() {
            if place.reservation {
                memory.settle(place.address, Backing::Denied);
                continue;
            }
            let handle = self.map(&place, true)?;
            memory.settle(place.address, Backing::Overflow(handle));
        }
        // The engine moves it to the GPU when the capture is over.
        self.wake_engine();
        Ok(())
    }

    /// Allocates by `attempt`; if there is no memory, waits for deferred frees and tries again. Their memory is reported as
    /// free already (see [`Device::figures`]).
    ///
    /// # Errors
    /// The error of the last attempt.
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
