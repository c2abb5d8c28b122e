//! Keeps memory that the application has freed for a short time, for the next allocation of its size
//! ([`crate::memory::spares::Spares`]).
//!
//! The accounts show it as granules that the client has on the GPU and does not need, so other clients can see it
//! ([`policy::spare_holders`]). The client gives it back when any client lacks granules, when it evicts, when it
//! needs the granules itself, and after a second at the latest (NVSHARE_KEEP_FREED). Memory is kept only while the client runs
//! and no client waits.

use crate::cuda::abi::{CUcontext, CUdeviceptr};
use crate::memory::device::Device;
use crate::memory::map::Memory;
use crate::memory::region::Region;
use crate::memory::spares::Spares;
use crate::settings::settings;
use nvshare::policy;
use nvshare::sync::now;
use nvshare::units::{Granules, Nanos};

/// How long a spare is kept, ns.
fn life() -> Nanos {
    settings().map_or(0, |settings| settings.keep_freed.as_nanos() as Nanos)
}

impl Device {
    /// Keeps an unused region as a spare if that is useful, or releases it.
    pub fn retire(&self, memory: &mut Memory, mut region: Region) {
        if !memory.open || !Spares::suits(&region) || !self.may_keep(memory, region.granules()) {
            return self.dispose(region);
        }
        // Host memory is promised for it no more.
        for copy in region.chunks.iter_mut().filter_map(|chunk| chunk.kept.take()) {
            self.host.free(copy.memory);
        }
        self.host.uncommit(region.size);
        let granules = region.granules();
        memory.spares.keep(region, now());
        self.books.shrink(granules);
        if !std::mem::replace(&mut memory.spares.watched, true) {
            self.wake_engine();
        }
    }

    /// Whether a spare of `granules` may be kept; releases older ones to make place for it. False if it is more than half of
    /// the pool, or if another client needs granules now.
    fn may_keep(&self, memory: &mut Memory, granules: Granules) -> bool {
        let snapshot = self.snapshot();
        let bound = snapshot.capacity / 2;
        if life() == 0 || granules > bound || policy::spares_are_wanted(&snapshot) {
            return false;
        }
        while memory.spares.full(granules, bound) && self.drop_oldest_spare(memory) > 0 {}
        true
    }

    /// Makes a spare of this size a new allocation of `bytes` bytes, or a slab. It keeps its former content.
    pub fn reuse(
        &self,
        memory: &mut Memory,
        size: u64,
        bytes: Option<u64>,
        context: CUcontext,
    ) -> Option<CUdeviceptr> {
        // While memory moves or the gate is shut, only the engine may back new allocations.
        if !memory.open {
            return None;
        }
        let region = memory.spares.take(size, context)?;
        if self.host.commit(size).is_err() {
            // The caller will find that the allocation must be refused, and log why.
            self.release_spare(region);
            return None;
        }
        let (base, granules) = (region.base, region.granules());
        memory.add_spare(region, bytes);
        self.books.grow(granules);
        Some(base)
    }

    /// Gives back the oldest spare. Returns its granules; 0 if there is none.
    pub fn drop_oldest_spare(&self, memory: &mut Memory) -> Granules {
        let Some(region) = memory.spares.take_oldest() else { return 0 };
        let granules = region.granules();
        self.release_spare(region);
        granules
    }

    /// Gives back all spares. Returns their granules.
    pub fn drop_spares(&self, memory: &mut Memory) -> Granules {
        std::iter::from_fn(|| Some(self.drop_oldest_spare(memory)).filter(|granules| *granules > 0)).sum()
    }

    fn release_spare(&self, mut region: Region) {
        self.release_chunks(&mut region);
        self.free_addresses(&region);
    }

    /// Gives back spares that are too old or that another client needs. Returns when to call again, ns.
    pub fn tidy_spares(&self) -> Option<Nanos> {
        loop {
            // The lock is released between two spares, so that the application's threads can go on.
            let mut memory = self.memory();
            let due = memory.spares.oldest().map(|since| since.saturating_add(life()));
            if due.is_none_or(|due| now() < due && !self.is_wanted()) {
                memory.spares.watched = due.is_some();
                return due;
            }
            self.drop_oldest_spare(&mut memory);
        }
    }

    /// Whether another client needs this one's spares now.
    fn is_wanted(&self) -> bool {
        policy::spares_are_wanted(&self.snapshot())
    }
}
