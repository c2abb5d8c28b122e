//! Spares: regions that the application has freed and that stay mapped, for the next allocation of their size.
//!
//! Creating 4 GiB by cuMemCreate, mapping and releasing them takes 8 ms; the driver's own cudaMalloc and cudaFree take
//! 1.4 ms. A program that allocates and frees repeatedly reuses spares instead. A spare is not an allocation and does not count
//! in the client's demand. Its granules are still taken from the pool, and are given back as soon as
//! any client lacks granules ([`crate::memory::keep_freed`]).

use crate::cuda::abi::{CUcontext, CUdeviceptr};
use crate::memory::region::{Backing, Kind, Region};
use nvshare::units::{Granules, Nanos};

/// The most spares, so that giving them all back takes some tens of milliseconds at most, and a search is short.
const MOST: usize = 256;

/// A region, and when it was freed, ns.
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
    /// The engine has been woken to release them in time.
    pub watched: bool,
}

impl Spares {
    /// Whether an unused region can be a spare: all of it is on the GPU, and no other process has it open.
    pub fn suits(region: &Region) -> bool {
        matches!(region.kind, Kind::Whole | Kind::Slab(_))
            && region.lent == 0
            && !region.context.is_null()
            && region.chunks.iter().all(|chunk| matches!(chunk.backing, Backing::Device(_)) && !chunk.pinned)
    }

    /// Whether another must be released before one of `granules` is kept, given that all may have `bound` granules.
    pub fn full(&self, granules: Granules, bound: Granules) -> bool {
        self.all.len() >= MOST || self.granules.saturating_add(granules) > bound
    }

    /// When the oldest one was freed, ns.
    pub fn oldest(&self) -> Option<Nanos> {
        self.all.first().map(|spare| spare.since)
    }

    /// Keeps a region.
    pub fn keep(&mut self, region: Region, since: Nanos) {
        self.granules += region.granules();
        self.all.push(Spare { region, since });
    }

    /// Takes the spare of this context and size that was freed last.
    pub fn take(&mut self, size: u64, context: CUcontext) -> Option<Region> {
        let suits = |spare: &Spare| spare.region.size == size && spare.region.context == context;
        let index = self.all.iter().rposition(suits)?;
        Some(self.remove(index))
    }

    /// Takes the oldest spare.
    pub fn take_oldest(&mut self) -> Option<Region> {
        (!self.all.is_empty()).then(|| self.remove(0))
    }

    fn remove(&mut self, index: usize) -> Region {
        let region = self.all.remove(index).region;
        self.granules -= region.granules();
        region
    }

    /// Whether a range of addresses overlaps a spare.
    pub fn overlap(&self, address: CUdeviceptr, size: u64) -> bool {
        let end = address.saturating_add(size);
        self.all.iter().any(|Spare { region, .. }| address < region.base + region.size && region.base < end)
    }
}
