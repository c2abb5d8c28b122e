//! Regions that the application has freed and that are still mapped, for the next allocation of their size.
//!
//! Making 4 GiB by cuMemCreate, mapping and releasing them again takes 8 ms; the driver's own cudaMalloc and cudaFree take
//! 1.4. A program that allocates and frees again and again finds here what it had. Nothing else is known of a spare: it is
//! no allocation, and it is in nobody's demand. Its granules are still taken from the pool, and are given back as soon as
//! anybody lacks any ([`crate::spare`]).

use super::region::{Backing, Kind, Region};
use crate::abi::{CUcontext, CUdeviceptr};
use nvshare::units::{Granules, Nanos};

/// Smaller ones are not kept: what they cost is not worth it.
pub const LEAST: u64 = 32 << 20;

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
    /// Whether a region could be one: all of it is on the GPU, and it is nobody else's.
    pub fn suits(region: &Region) -> bool {
        matches!(region.kind, Kind::Whole)
            && region.size >= LEAST
            && region.lent == 0
            && !region.context.is_null()
            && region.chunks.iter().all(|chunk| matches!(chunk.backing, Backing::Device(_)) && !chunk.fixed)
    }

    /// Granules of all of them.
    pub fn granules(&self) -> Granules {
        self.granules
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
        let region = self.all.remove(index).region;
        self.granules -= region.granules();
        Some(region)
    }

    /// Takes those that are there since before a time, ns.
    pub fn take_until(&mut self, time: Nanos) -> Vec<Region> {
        let old = self.all.partition_point(|spare| spare.since < time);
        let taken: Vec<_> = self.all.drain(..old).map(|spare| spare.region).collect();
        self.granules -= taken.iter().map(Region::granules).sum::<Granules>();
        taken
    }

    /// Whether any of a range of addresses is one's.
    pub fn overlap(&self, address: CUdeviceptr, size: u64) -> bool {
        let end = address.saturating_add(size);
        self.all.iter().any(|Spare { region, .. }| address < region.base + region.size && region.base < end)
    }
}
