//! Memory that the application has freed is kept for a moment, for the next allocation of its size
//! ([`crate::memory::spares::Spares`]).
//!
//! It is in the books as what it is: granules that this client has on the GPU and that nothing needs. So others see it
//! ([`policy::spare_holders`]), and this client gives it back: when anybody lacks granules, when it evicts, when it
//! needs them itself, and in any case after a second (NVSHARE_KEEP_FREED). It is kept only while the client runs and nobody waits.

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
    /// Keeps a region that nothing uses any more, if it can be of use, or releases it.
    pub fn retire(&self, memory: &mut Memory, region: Region) {
        if !memory.open || !Spares::suits(&region) || !self.may_keep(memory, region.granules()) {
            return self.dispose(region);
        }
        self.host.uncommit(region.size);
        let granules = region.granules();
        memory.spares.keep(region, now());
        self.books.shrink(granules);
        if !std::mem::replace(&mut memory.spares.watched, true) {
            self.wake_engine();
        }
    }

    /// Makes the room among the spares for one of so many granules. False if it is more than half of the pool, or if
    /// anybody could use it now.
    fn may_keep(&self, memory: &mut Memory, granules: Granules) -> bool {
        let snapshot = self.snapshot();
        let bound = snapshot.capacity / 2;
        if life() == 0 || granules > bound || policy::spares_are_wanted(&snapshot) {
            return false;
        }
        while memory.spares.full(granules, bound) && self.drop_oldest_spare(memory) > 0 {}
        true
    }

    /// A spare of this size, as a new allocation of so many bytes, or as a slab. Its content is what was there.
    pub fn reuse(
        &self,
        memory: &mut Memory,
        size: u64,
        bytes: Option<u64>,
        context: CUcontext,
    ) -> Option<CUdeviceptr> {
        // While memory moves or the gate is shut, what is allocated is the engine's to fill.
        if !memory.open {
            return None;
        }
        let region = memory.spares.take(size, context)?;
        if self.host.commit(size).is_err() {
            // The allocation is about to be refused, by whoever can say why.
            self.release_spare(region);
            return None;
        }
        let (base, granules) = (region.base, region.granules());
        memory.add_spare(region, bytes);
        self.books.grow(granules);
        Some(base)
    }

    /// Gives the oldest spare back. How many granules it was; 0 if there is none.
    pub fn drop_oldest_spare(&self, memory: &mut Memory) -> Granules {
        let Some(region) = memory.spares.take_oldest() else { return 0 };
        let granules = region.granules();
        self.release_spare(region);
        granules
    }

    /// Gives all spares back. How many granules they were.
    pub fn drop_spares(&self, memory: &mut Memory) -> Granules {
        std::iter::from_fn(|| Some(self.drop_oldest_spare(memory)).filter(|granules| *granules > 0)).sum()
    }

    fn release_spare(&self, mut region: Region) {
        self.release_chunks(&mut region);
        self.free_addresses(&region);
    }

    /// Gives back what somebody lacks, or what nobody has asked for. When to look again, ns.
    pub fn tidy_spares(&self) -> Option<Nanos> {
        loop {
            // One at a time: the application's threads go on in between.
            let mut memory = self.memory();
            let due = memory.spares.oldest().map(|since| since.saturating_add(life()));
            if due.is_none_or(|due| now() < due && !self.is_wanted()) {
                memory.spares.watched = due.is_some();
                return due;
            }
            self.drop_oldest_spare(&mut memory);
        }
    }

    /// Whether anybody could use a spare of this client's now.
    fn is_wanted(&self) -> bool {
        policy::spares_are_wanted(&self.snapshot())
    }
}
