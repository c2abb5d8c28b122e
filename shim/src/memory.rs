//! What the application has allocated, and where its bytes are.
//!
//! An application's allocation lies in a *region*, a reserved range of addresses that never changes
//! while the allocation lives. A region consists of *chunks* of up to 64 MiB, the unit in which memory
//! moves; small allocations share a region of one granule, a *slab*. This module is the map of all
//! that and calls no driver: [`crate::device`] and [`crate::swap`] act, and write down here what they
//! did.

use crate::abi::{CUcontext, CUdeviceptr, CUmemGenericAllocationHandle};
use crate::hostpool::HostBlock;
use nvshare::units::{GRANULE, Granules};
use std::collections::BTreeMap;

/// Bytes in a full chunk. Larger ones map faster, smaller ones hand on sooner (DESIGN section 2).
pub const CHUNK: u64 = 64 << 20;

/// Allocations of up to this many bytes share slabs.
pub const SMALL: u64 = 1 << 20;

/// Alignment of every allocation, as the driver gives it.
const ALIGNMENT: u64 = 512;

/// Where a chunk's bytes are.
#[derive(Debug)]
pub enum Backing {
    /// Nowhere: it was never used. Filling it copies nothing.
    Absent,
    /// On the GPU, counted as resident.
    Device(CUmemGenericAllocationHandle),
    /// In host memory, and nothing is mapped.
    Evicted(HostBlock),
    /// In host memory that is mapped at the chunk's address: slow and usable.
    Overflow(CUmemGenericAllocationHandle),
    /// The engine has it, between two of these.
    Moving,
}

impl Backing {
    /// Whether the GPU can use the chunk.
    pub fn usable(&self) -> bool {
        matches!(self, Self::Device(_) | Self::Overflow(_))
    }
}

/// The unit in which memory moves.
#[derive(Debug)]
pub struct Chunk {
    /// Where it is mapped.
    pub address: CUdeviceptr,
    /// Bytes, a whole number of granules.
    pub size: u64,
    /// Where its bytes are.
    pub backing: Backing,
}

impl Chunk {
    /// Its size in granules.
    pub fn granules(&self) -> Granules {
        (self.size / GRANULE) as Granules
    }
}

/// A reserved range of addresses.
#[derive(Debug)]
pub struct Region {
    /// Where it begins.
    pub base: CUdeviceptr,
    /// Bytes, a whole number of granules.
    pub size: u64,
    /// The context that it goes with.
    pub context: CUcontext,
    /// Its pieces, by address.
    pub chunks: Vec<Chunk>,
    /// What is free in it, if it is a slab.
    slab: Option<Gaps>,
}

impl Region {
    fn new(base: CUdeviceptr, size: u64, context: CUcontext, slab: bool) -> Self {
        let chunks = (0..size.div_ceil(CHUNK))
            .map(|index| Chunk {
                address: base + index * CHUNK,
                size: CHUNK.min(size - index * CHUNK),
                backing: Backing::Absent,
            })
            .collect();
        Self { base, size, context, chunks, slab: slab.then(|| Gaps::new(size)) }
    }

    /// Its size in granules.
    pub fn granules(&self) -> Granules {
        (self.size / GRANULE) as Granules
    }

    /// Whether the GPU can use any of it.
    pub fn in_use_by_gpu(&self) -> bool {
        self.chunks.iter().any(|chunk| chunk.backing.usable())
    }
}

/// Free room in a slab: offset and length of each gap, by offset.
#[derive(Debug)]
struct Gaps {
    whole: u64,
    gaps: BTreeMap<u64, u64>,
}

impl Gaps {
    fn new(whole: u64) -> Self {
        Self { whole, gaps: BTreeMap::from([(0, whole)]) }
    }

    fn take(&mut self, size: u64) -> Option<u64> {
        let (offset, length) = self.gaps.iter().map(|(o, l)| (*o, *l)).find(|(_, length)| *length >= size)?;
        self.gaps.remove(&offset);
        if length > size {
            self.gaps.insert(offset + size, length - size);
        }
        Some(offset)
    }

    fn give(&mut self, mut offset: u64, mut size: u64) {
        if let Some((before, length)) = self.gaps.range(..offset).next_back().map(|(o, l)| (*o, *l))
            && before + length == offset
        {
            self.gaps.remove(&before);
            (offset, size) = (before, size + length);
        }
        if let Some(length) = self.gaps.remove(&(offset + size)) {
            size += length;
        }
        self.gaps.insert(offset, size);
    }

    fn empty(&self) -> bool {
        self.gaps.get(&0) == Some(&self.whole)
    }
}

/// One allocation of the application's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    /// What cuMemAlloc returned.
    pub base: CUdeviceptr,
    /// Bytes asked for.
    pub size: u64,
    /// The region it lies in, by its base.
    pub region: CUdeviceptr,
}

/// The map.
#[derive(Debug, Default)]
pub struct Memory {
    regions: BTreeMap<CUdeviceptr, Region>,
    allocations: BTreeMap<CUdeviceptr, Allocation>,
    /// Allocations that the application has freed and the engine must release, because memory was
    /// moving or because an open capture forbade to wait for their last use. Their regions live on.
    doomed: Vec<Allocation>,
    /// The engine moves chunks, and nobody else may touch their backing.
    pub moving: bool,
    /// The gate is open: what is allocated now must be usable, or shut it again.
    pub open: bool,
}

/// What freeing an allocation leaves to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Freed {
    /// Others still live in its slab.
    Nothing,
    /// Its region is empty: release this region, by its base.
    Region(CUdeviceptr),
}

impl Memory {
    /// Makes a region of `size` bytes for one allocation of `requested` bytes.
    pub fn add_whole(&mut self, base: CUdeviceptr, size: u64, requested: u64, context: CUcontext) {
        self.regions.insert(base, Region::new(base, size, context, false));
        self.allocations.insert(base, Allocation { base, size: requested, region: base });
    }

    /// Makes a slab.
    pub fn add_slab(&mut self, base: CUdeviceptr, context: CUcontext) {
        self.regions.insert(base, Region::new(base, GRANULE, context, true));
    }

    /// Finds room for a small allocation in a slab of the context's.
    pub fn take_small(&mut self, requested: u64, context: CUcontext) -> Option<CUdeviceptr> {
        let size = requested.next_multiple_of(ALIGNMENT);
        let (region, offset) = self
            .regions
            .values_mut()
            .filter(|region| region.context == context)
            .find_map(|region| Some((region.base, region.slab.as_mut()?.take(size)?)))?;
        let base = region + offset;
        self.allocations.insert(base, Allocation { base, size: requested, region });
        Some(base)
    }

    /// The allocation that `address` lies in.
    pub fn containing(&self, address: CUdeviceptr) -> Option<Allocation> {
        let (_, allocation) = self.allocations.range(..=address).next_back()?;
        (address - allocation.base < allocation.size).then_some(*allocation)
    }

    /// Strikes an allocation off the list of those that can be freed or looked up. Its room in a slab
    /// is not free before [`Memory::finish_free`]: the GPU may still use it.
    pub fn begin_free(&mut self, base: CUdeviceptr) -> Option<Allocation> {
        self.allocations.remove(&base)
    }

    /// The allocation's last use is over.
    pub fn finish_free(&mut self, allocation: Allocation) -> Freed {
        let Some(region) = self.regions.get_mut(&allocation.region) else { return Freed::Nothing };
        if let Some(gaps) = &mut region.slab {
            gaps.give(allocation.base - region.base, allocation.size.next_multiple_of(ALIGNMENT));
            if !gaps.empty() {
                return Freed::Nothing;
            }
        }
        Freed::Region(region.base)
    }

    /// Leaves the end of a free to the engine.
    pub fn doom(&mut self, allocation: Allocation) {
        self.doomed.push(allocation);
    }

    /// The frees to finish, which are the caller's then.
    pub fn take_doomed(&mut self) -> Vec<Allocation> {
        std::mem::take(&mut self.doomed)
    }

    /// Whether a free is left to the engine.
    pub fn has_doomed(&self) -> bool {
        !self.doomed.is_empty()
    }

    /// Takes a region out of the map.
    pub fn remove(&mut self, region: CUdeviceptr) -> Option<Region> {
        self.regions.remove(&region)
    }

    /// A region.
    pub fn region(&self, base: CUdeviceptr) -> Option<&Region> {
        self.regions.get(&base)
    }

    /// A region, to write into.
    pub fn region_mut(&mut self, base: CUdeviceptr) -> Option<&mut Region> {
        self.regions.get_mut(&base)
    }

    /// Takes everything out of the map.
    pub fn take_all(&mut self) -> Vec<Region> {
        self.allocations.clear();
        self.doomed.clear();
        std::mem::take(&mut self.regions).into_values().collect()
    }

    /// Takes out of the map all that goes with a context.
    pub fn remove_context(&mut self, context: CUcontext) -> Vec<Region> {
        let bases: Vec<_> = self
            .regions
            .values()
            .filter(|region| region.context == context)
            .map(|region| region.base)
            .collect();
        self.allocations.retain(|_, allocation| !bases.contains(&allocation.region));
        self.doomed.retain(|allocation| !bases.contains(&allocation.region));
        bases.iter().filter_map(|base| self.regions.remove(base)).collect()
    }

    /// Puts a chunk where it now is. The chunk's region cannot have gone: while chunks move, regions
    /// are only doomed.
    pub fn settle(&mut self, address: CUdeviceptr, backing: Backing) {
        if let Some(chunk) = self.chunk_mut(address) {
            chunk.backing = backing;
        }
    }

    fn chunk_mut(&mut self, address: CUdeviceptr) -> Option<&mut Chunk> {
        let (_, region) = self.regions.range_mut(..=address).next_back()?;
        region.chunks.iter_mut().find(|chunk| chunk.address == address)
    }

    /// Takes the next chunk that the GPU cannot use, marking it as moving.
    pub fn next_missing(&mut self) -> Option<(CUdeviceptr, u64, Backing)> {
        self.regions
            .values_mut()
            .flat_map(|region| &mut region.chunks)
            .find(|chunk| matches!(chunk.backing, Backing::Absent | Backing::Evicted(_)))
            .map(|chunk| (chunk.address, chunk.size, std::mem::replace(&mut chunk.backing, Backing::Moving)))
    }

    /// Takes the next chunk that is on the GPU, marking it as moving. From the end, because large
    /// allocations tend to lie there, and large chunks move best.
    pub fn next_resident(&mut self) -> Option<(CUdeviceptr, u64, CUmemGenericAllocationHandle)> {
        let chunk = self
            .regions
            .values_mut()
            .rev()
            .flat_map(|region| region.chunks.iter_mut().rev())
            .find(|chunk| matches!(chunk.backing, Backing::Device(_)))?;
        match std::mem::replace(&mut chunk.backing, Backing::Moving) {
            Backing::Device(handle) => Some((chunk.address, chunk.size, handle)),
            _ => unreachable!("just matched"),
        }
    }

    /// Whether there is a chunk that the GPU cannot use.
    pub fn is_missing(&self) -> bool {
        self.regions.values().flat_map(|region| &region.chunks).any(|chunk| !chunk.backing.usable())
    }

    /// Granules that are mapped to host memory for want of room.
    pub fn overflow(&self) -> Granules {
        self.regions
            .values()
            .flat_map(|region| &region.chunks)
            .filter(|chunk| matches!(chunk.backing, Backing::Overflow(_)))
            .map(Chunk::granules)
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTEXT: CUcontext = CUcontext(1);

    #[test]
    fn a_region_is_cut_into_chunks() {
        let mut memory = Memory::default();
        memory.add_whole(1 << 40, 2 * CHUNK + GRANULE, 2 * CHUNK + 5, CONTEXT);
        let region = memory.region(1 << 40).unwrap();
        assert_eq!(region.chunks.iter().map(|chunk| chunk.size).collect::<Vec<_>>(), [CHUNK, CHUNK, GRANULE]);
        assert_eq!(region.chunks[2].address, (1 << 40) + 2 * CHUNK);
        assert!(memory.is_missing());
    }

    #[test]
    fn addresses_find_their_allocation() {
        let mut memory = Memory::default();
        memory.add_whole(0x1000_0000, GRANULE, 100, CONTEXT);
        assert_eq!(memory.containing(0x1000_0000 + 99).map(|found| found.base), Some(0x1000_0000));
        assert_eq!(memory.containing(0x1000_0000 + 100), None);
        assert_eq!(memory.containing(0xfff_ffff), None);
        assert!(memory.begin_free(0x1000_0000).is_some());
        assert_eq!(memory.begin_free(0x1000_0000), None, "freed twice");
    }

    #[test]
    fn small_ones_share_a_slab_and_the_last_one_takes_it_down() {
        let mut memory = Memory::default();
        assert_eq!(memory.take_small(1, CONTEXT), None);
        memory.add_slab(0x4000_0000, CONTEXT);
        let first = memory.take_small(1, CONTEXT).unwrap();
        let second = memory.take_small(SMALL, CONTEXT).unwrap();
        assert_eq!((first, second), (0x4000_0000, 0x4000_0000 + ALIGNMENT));
        assert_eq!(memory.take_small(SMALL, CONTEXT), None, "full");
        assert_eq!(memory.take_small(1, CUcontext(2)), None, "another context's");
        for (base, left) in [(first, Freed::Nothing), (second, Freed::Region(0x4000_0000))] {
            let allocation = memory.begin_free(base).unwrap();
            assert_eq!(memory.finish_free(allocation), left);
        }
    }

    #[test]
    fn gaps_grow_together() {
        let mut gaps = Gaps::new(4096);
        let offsets: Vec<_> = (0..8).map(|_| gaps.take(512).unwrap()).collect();
        assert_eq!(gaps.take(1), None);
        for offset in
            [offsets[2], offsets[0], offsets[1], offsets[7], offsets[5], offsets[6], offsets[4], offsets[3]]
        {
            gaps.give(offset, 512);
        }
        assert!(gaps.empty());
    }

    #[test]
    fn a_freed_allocation_is_gone_for_the_application_and_not_for_the_engine() {
        let mut memory = Memory::default();
        memory.add_whole(1 << 30, GRANULE, GRANULE, CONTEXT);
        let allocation = memory.begin_free(1 << 30).unwrap();
        memory.doom(allocation);
        assert_eq!(memory.containing(1 << 30), None);
        assert!(memory.region(1 << 30).is_some() && memory.has_doomed());
        assert_eq!(memory.take_doomed(), [allocation]);
        assert_eq!(memory.finish_free(allocation), Freed::Region(1 << 30));
    }
}
