//! cuMemFree and other ways to release memory, once the work that may use it is done.

use crate::cuda::abi::*;
use crate::memory::device::Device;
use crate::memory::map::{Allocation, Freed, Left, Memory};
use crate::memory::region::{Backing, Chunk, Kind, Region};
use crate::memory::stale_objects;
use crate::submit::drain::CompletionMarker;
use crate::submit::{captures, gang, pass};
use nvshare::units::format_size;
use std::sync::MutexGuard;
use std::time::Duration;

impl Device {
    /// cuMemFree. False if no allocation of nvshare begins at the address.
    ///
    /// Like the driver's own, it returns when the work that may use the memory is done. If a capture is
    /// open, that cannot be queried, and while memory moves, only the engine may touch the region: in both cases the engine
    /// finishes the free later.
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

    /// Frees an allocation that the caller knows to be unused by the GPU, so that there is nothing to wait for. False as
    /// for [`Device::free`].
    pub fn free_idle(&self, base: CUdeviceptr) -> bool {
        let mut memory = self.memory();
        let Some(allocation) = memory.begin_free(base) else { return false };
        self.end_free(memory, allocation, true);
        true
    }

    /// Finishes a free, or defers it to the engine if the memory may be in use or moves.
    fn end_free(&self, mut memory: MutexGuard<'_, Memory>, allocation: Allocation, unused: bool) {
        if unused && !memory.moving {
            self.finish_free(&mut memory, allocation);
        } else {
            memory.defer_free(allocation);
            drop(memory);
            self.wake_engine();
        }
    }

    fn finish_free(&self, memory: &mut Memory, allocation: Allocation) {
        if let Freed::Region(region) = memory.finish_free(allocation)
            && let Some(region) = memory.remove(region)
        {
            self.retire(memory, region);
        }
    }

    /// Waits for all work submitted so far on any GPU of the process, because it may use this GPU's memory. False if an open
    /// capture forbids querying it.
    pub fn wait_for_work(&self) -> bool {
        // No lock is held while this waits: the work may be waiting for a thread that begins a capture.
        let Some(mut mark) = captures::with_no_capture(gang::mark) else { return false };
        if !self.await_mark(&mut mark) {
            return false;
        }
        // A broken context does no work any more, so its memory is not in use either.
        if let Some(result) = mark.broken() {
            tracing::debug!(gpu = %self.gpu, "a context is broken, so its work counts as done: {result}");
        }
        true
    }

    /// Waits until a marker has passed. False if an open capture forbids querying it.
    pub fn await_mark(&self, mark: &mut CompletionMarker) -> bool {
        loop {
            mark.wait();
            match captures::with_no_capture(|| mark.look()) {
                Some(true) => return true,
                // All is marked and has passed, but a context is being destroyed with work that only the driver waits for.
                Some(false) if mark.left() == 0 => std::thread::sleep(Duration::from_micros(100)),
                Some(false) => {}
                None => return false,
            }
        }
    }

    /// Finishes the deferred frees.
    fn finish_deferred(&self) {
        let left = self.memory().left();
        if self.wait_for_work() {
            self.finish_left(left);
        }
    }

    /// Finishes the deferred frees that `left` stands for. The work that may use their memory is done.
    pub fn finish_left(&self, left: Left) {
        let mut memory = self.memory();
        if memory.moving {
            return;
        }
        let Some((deferred_frees, returned)) = memory.take_left(left) else { return };
        deferred_frees.into_iter().for_each(|allocation| self.finish_free(&mut memory, allocation));
        returned.into_iter().for_each(|region| self.dispose(region));
    }

    /// Waits until the deferred frees have ended. False if there are none, or if they cannot end now.
    pub fn await_frees(&self) -> bool {
        // A thread inside the gate would wait for an engine that waits for this thread.
        if pass::is_inside() || self.memory().deferred() == 0 {
            return false;
        }
        drop(self.memory_at_rest());
        self.finish_deferred();
        self.memory().deferred() == 0
    }

    /// Releases a region that is unused.
    pub fn dispose(&self, mut region: Region) {
        let granules = region.granules();
        let lost = region.chunks.iter().any(|chunk| matches!(chunk.backing, Backing::Moving));
        self.release_chunks(&mut region);
        stale_objects::ended(&region);
        if !matches!(region.kind, Kind::Reservation) && !lost {
            // If a chunk was lost, it may still be mapped, so the addresses are not freed.
            self.free_addresses(&region);
            self.host.uncommit(region.size);
        }
        self.books.shrink(granules);
    }

    /// Releases the memory of a region's chunks, on the GPU or the host.
    pub fn release_chunks(&self, region: &mut Region) {
        for chunk in std::mem::take(&mut region.chunks) {
            self.dispose_chunk(region, chunk);
        }
    }

    /// Frees a region's addresses, at which nothing is mapped any more.
    pub fn free_addresses(&self, region: &Region) {
        if let Err(result) = self.driver.mem_address_free(region.base, region.size as usize)
            && result != CuResult::DEINITIALIZED
            && !self.engine_context.is_leaving()
        {
            tracing::error!(
                gpu = %self.gpu,
                "{} of addresses at {:#x} could not be freed and stay reserved until the process ends: {result}",
                format_size(region.size),
                region.base
            );
        }
    }

    fn dispose_chunk(&self, region: &Region, chunk: Chunk) {
        let (place, granules) = (region.place(&chunk), chunk.granules());
        if chunk.pinned {
            self.books.unpin(granules);
        }
        if let Some(kept) = chunk.kept {
            self.host.free(kept.memory);
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
            // Regions are not released while memory moves, unless the engine has panicked: then the chunk's state is unknown.
            Backing::Moving => {}
        }
    }

    /// Releases the memory of a context that was destroyed and was not the last one.
    pub fn release_context(&self, context: CUcontext) {
        // None of its memory may be moving.
        let regions = {
            let mut memory = self.memory_at_rest();
            self.drop_spares(&mut memory);
            memory.remove_context(context)
        };
        regions.into_iter().for_each(|region| self.dispose(region));
    }
}
