//! Regions that the application has freed and that are still mapped, for the next allocation of their size.
//!
//! Making 4 GiB by cuMemCreate, mapping and releasing them again takes 8 ms; the driver's own cudaMalloc and cudaFree take
//! 1.4. A program that allocates and frees again and again finds here what it had. Nothing else is known of a spare: it is
//! no allocation, and it is in nobody's demand. Its granules are still taken from the pool, and are given back as soon as
//! anybody lacks any ([`crate::memory::keep_freed`]).

use crate::cuda::abi::{CUcontext, CUdeviceptr};
use crate::memory::region::{Backing, Kind, Region};
use nvshare::units::{Granules, Nanos};

/// No more than so many are kept: giving them all back takes some tens of milliseconds at most, and finding one is quick.
const MOST: usize = 256;

/// A region, and since when nobody has used it.
#[derive(Debug)]
struct Spare {
    region: Region,
    since: Nanos,
}

/// The spares, the oldest first.
#[derive(Debug, Default)]
pub struct Spares {
    all: Vec<Spare>,
    granules: Granules,
    /// The engine is going to look at them.
    pub watched: bool,
}

impl Spares {
    /// Whether a region that nothing is in could be one: all of it is on the GPU, and nobody else has it open.
    pub fn suits(region: &Region) -> bool {
        matches!(region.kind, Kind::Whole | Kind::Slab(_))
            && region.lent == 0
            && !region.context.is_null()
            && region.chunks.iter().all(|chunk| matches!(chunk.backing, Backing::Device(_)) && !chunk.pinned)
    }

    /// Whether one of so many granules can only be kept when another goes, if all of them may have `bound` granules.
    pub fn full(&self, granules: Granules, bound: Granules) -> bool {
        self.all.len() >= MOST || self.granules.saturating_add(granules) > bound
    }

    /// Since when the oldest one is there, ns.
    pub fn oldest(&self) -> Option<Nanos> {
        self.all.first().map(|spare| spare.since)
    }

    /// Keeps a region.
    pub fn keep(&mut self, region: Region, since: Nanos) {
        self.granules += region.granules();
        self.all.push(Spare { region, since });
    }

    /// The one of this context and size that was kept last.
    pub fn take(&mut self, size: u64, context: CUcontext) -> Option<Region> {
        let suits = |spare: &Spare| spare.region.size == size && spare.region.context == context;
        let index = self.all.iter().rposition(suits)?;
        Some(self.remove(index))
    }

    /// The oldest one.
    pub fn take_oldest(&mut self) -> Option<Region> {
        (!self.all.is_empty()).then(|| self.remove(0))
    }

    fn remove(&mut self, index: usize) -> Region {
        let region = self.all.remove(index).region;
        self.granules -= region.granules();
        region
    }

    /// Whether any of a range of addresses is one's.
    pub fn overlap(&self, address: CUdeviceptr, size: u64) -> bool {
        let end = address.saturating_add(size);
        self.all.iter().any(|Spare { region, .. }| address < region.base + region.size && region.base < end)
    }
}
