//! Memory that the application has freed is kept for a moment, for the next allocation of its size ([`crate::memory::Spares`]).
//!
//! It is in the books as what it is: granules that this client has on the GPU and that nothing needs. So others see it
//! ([`nvshare::Books::ring_hoarders`]), and this client gives it back: when anybody lacks granules, when it evicts, when it
//! needs them itself, and in any case after a second. It is kept only while the client runs and nobody waits.

use crate::abi::CUcontext;
use crate::abi::CUdeviceptr;
use crate::device::Shared;
use crate::memory::{Memory, Region, Spares};
use nvshare::policy;
use nvshare::snapshot::Snapshot;
use nvshare::sync::now;
use nvshare::units::{Granules, Nanos, SECOND};

/// So long a spare is kept.
const LIFE: Nanos = SECOND;

impl Shared {
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
            self.knock();
        }
    }

    /// No more than half of the pool, and nothing that anybody else could use now.
    fn may_keep(&self, memory: &Memory, granules: Granules) -> bool {
        let page = self.books.page();
        let snapshot = Snapshot::take(page, page.admitted());
        memory.spares.granules().saturating_add(granules) <= snapshot.capacity / 2
            && policy::first_waiter(&snapshot).is_none()
            && policy::lacking(&snapshot) == 0
    }

    /// A spare of this size, as a new allocation of `bytes`. Its content is what was there.
    pub fn reuse(
        &self,
        memory: &mut Memory,
        size: u64,
        bytes: u64,
        context: CUcontext,
    ) -> Option<CUdeviceptr> {
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

    /// Gives all spares back. How many granules they were.
    pub fn drop_spares(&self, memory: &mut Memory) -> Granules {
        let granules = memory.spares.granules();
        memory.spares.take_until(Nanos::MAX).into_iter().for_each(|region| self.release_spare(region));
        granules
    }

    fn release_spare(&self, mut region: Region) {
        self.release_chunks(&mut region);
        self.free_addresses(&region);
    }

    /// Gives back what somebody lacks, or what nobody has asked for. When to look again, ns.
    pub fn tidy_spares(&self) -> Option<Nanos> {
        let mut memory = self.memory();
        if memory.spares.oldest().is_some() {
            let page = self.books.page();
            let snapshot = Snapshot::take(page, page.admitted());
            let wanted = policy::lacking(&snapshot) > 0 || policy::first_waiter(&snapshot).is_some();
            let until = if wanted { Nanos::MAX } else { now().saturating_sub(LIFE) };
            let old = memory.spares.take_until(until);
            old.into_iter().for_each(|region| self.release_spare(region));
        }
        let oldest = memory.spares.oldest();
        memory.spares.watched = oldest.is_some();
        oldest.map(|since| since + LIFE)
    }
}
