//! What the application has allocated, and where its bytes are.
//!
//! Memory comes in *regions*, reserved ranges of addresses that never change while the region lives. A
//! region consists of *chunks* of up to 64 MiB, the unit in which memory moves. There are regions of four
//! kinds ([`Kind`]): one allocation; a *slab* of one granule that small allocations share; an *object*,
//! physical memory that the application asked for by cuMemCreate and maps at addresses of its own, its
//! *views*; and *room*, which the client has booked for memory that only the driver can place. This module
//! is the map of all that and calls no driver: [`crate::device`] and [`crate::swap`] act, and write down
//! here what they did.
//!
//! Every region has addresses of its own, its *home*, an object too: where its bytes are while nobody has
//! mapped it, and from where it is copied. (Room has made-up ones, beyond what any GPU maps.) An object's
//! handle, as the application sees it, is its home: physical memory comes and goes beneath it.

use crate::abi::{
    CUcontext, CUdeviceptr, CUmemAccessDesc, CUmemAllocationProp, CUmemGenericAllocationHandle,
};
use crate::hostpool::HostBlock;
use nvshare::units::{GRANULE, Granules};
use std::collections::BTreeMap;

/// Bytes in a full chunk. Larger ones map faster, smaller ones hand on sooner (DESIGN section 2).
pub const CHUNK: u64 = 64 << 20;

/// Allocations of up to this many bytes share slabs.
pub const SMALL: u64 = 1 << 20;

/// Alignment of every allocation, as the driver gives it.
const ALIGNMENT: u64 = 512;

/// Objects of up to this many bytes that may be handed to another process are one chunk, since one handle is
/// what is handed on. Larger ones move in chunks like any other memory, and are not handed on: XLA asks for most
/// of the GPU in one object that could be.
pub const WHOLE: u64 = 512 << 20;

/// Where the made-up addresses of room begin: no GPU has so many.
const ROOM: CUdeviceptr = 1 << 62;

/// Which granules of a chunk hold anything but zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InUse {
    /// All, as far as anybody knows.
    All,
    /// A bit for each, the lowest for the first.
    Granules(u32),
}

impl InUse {
    /// Bytes that a copy of them takes, for a chunk of `size` bytes.
    pub fn bytes(self, size: u64) -> u64 {
        match self {
            Self::All => size,
            Self::Granules(bits) => u64::from(bits.count_ones()) * GRANULE,
        }
    }

    /// What is to be copied: offset in the chunk, offset in the copy, and length of each run, in bytes.
    pub fn runs(self, size: u64) -> Vec<(u64, u64, u64)> {
        let Self::Granules(bits) = self else { return vec![(0, 0, size)] };
        let mut runs: Vec<(u64, u64, u64)> = Vec::new();
        let mut copied = 0;
        for offset in (0..size / GRANULE).filter(|granule| bits >> granule & 1 == 1).map(|g| g * GRANULE) {
            match runs.last_mut() {
                Some((begin, _, length)) if *begin + *length == offset => *length += GRANULE,
                _ => runs.push((offset, copied, GRANULE)),
            }
            copied += GRANULE;
        }
        runs
    }
}

/// A copy in host memory of what a chunk holds: of the granules in use, one after the other.
#[derive(Debug)]
pub struct HostCopy {
    /// The bytes.
    pub block: HostBlock,
    /// Which granules they are.
    pub in_use: InUse,
}

/// Where a chunk's bytes are.
#[derive(Debug)]
pub enum Backing {
    /// Nowhere: it was never used, or is all zero. Filling it copies nothing.
    Absent,
    /// On the GPU, counted as resident.
    Device(CUmemGenericAllocationHandle),
    /// In host memory, and nothing is mapped.
    Evicted(HostCopy),
    /// In host memory that is mapped at the chunk's address: slow and usable.
    Overflow(CUmemGenericAllocationHandle),
    /// A chunk of room: counted as resident, and nothing is there.
    Booked,
    /// A chunk of room that there can be none for.
    Denied,
    /// The engine has it, between two of these.
    Moving,
}

impl Backing {
    /// Whether the GPU can use the chunk, or need not.
    pub fn usable(&self) -> bool {
        matches!(self, Self::Device(_) | Self::Overflow(_) | Self::Booked | Self::Denied)
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
    /// It stays on the GPU: somebody else maps it too.
    pub fixed: bool,
    /// It is to be filled in host memory, for want of room.
    spill: bool,
    /// What a look at it has found since the client last ran.
    seen: Option<InUse>,
}

impl Chunk {
    fn new(address: CUdeviceptr, size: u64) -> Self {
        Self { address, size, backing: Backing::Absent, fixed: false, spill: false, seen: None }
    }

    /// Its size in granules.
    pub fn granules(&self) -> Granules {
        (self.size / GRANULE) as Granules
    }

    fn evictable(&self) -> bool {
        matches!(self.backing, Backing::Device(_) | Backing::Booked) && !self.fixed
    }
}

/// Where the application has mapped an object.
#[derive(Debug, Clone)]
pub struct View {
    /// The address.
    pub address: CUdeviceptr,
    /// Bytes, from the object's beginning.
    pub size: u64,
    /// Who may use it there.
    pub access: Vec<CUmemAccessDesc>,
}

/// Physical memory that the application asked for.
#[derive(Debug)]
pub struct Object {
    /// What it asked for.
    pub prop: CUmemAllocationProp,
    /// Handles that it holds.
    pub references: u32,
    /// Where it has mapped it.
    pub views: Vec<View>,
}

/// What a region is for.
#[derive(Debug)]
pub enum Kind {
    /// One allocation.
    Whole,
    /// Small allocations. What is free in it.
    Slab(Gaps),
    /// Physical memory that the application maps itself.
    Object(Object),
    /// Memory that only the driver can place.
    Room,
}

/// A reserved range of addresses.
#[derive(Debug)]
pub struct Region {
    /// Where it begins.
    pub base: CUdeviceptr,
    /// Bytes, a whole number of granules.
    pub size: u64,
    /// The context that it goes with; null if it goes with none.
    pub context: CUcontext,
    /// Its pieces, by address.
    pub chunks: Vec<Chunk>,
    /// How often other processes have it open: it stays until they have closed it.
    lent: u32,
    /// The application has freed what was in it.
    abandoned: bool,
    /// What it is for.
    pub kind: Kind,
}

/// Where a chunk is mapped, and as what.
#[derive(Debug, Clone)]
pub struct Place {
    /// At home.
    pub address: CUdeviceptr,
    /// Bytes.
    pub size: u64,
    /// Where the application has mapped it, and for whom.
    pub views: Vec<(CUdeviceptr, Vec<CUmemAccessDesc>)>,
    /// What the application asked for, if it asked for something in particular.
    pub prop: Option<CUmemAllocationProp>,
    /// Nothing is mapped there: it is room.
    pub room: bool,
}

impl Place {
    /// Its size in granules.
    pub fn granules(&self) -> Granules {
        (self.size / GRANULE) as Granules
    }
}

impl Region {
    fn new(base: CUdeviceptr, size: u64, context: CUcontext, kind: Kind) -> Self {
        // What may be handed to another process as one handle is one chunk.
        let exportable = matches!(&kind, Kind::Object(object) if object.prop.requested_handle_types != 0);
        let whole = exportable && size <= WHOLE;
        let chunk = if whole { size } else { CHUNK };
        let chunks = (0..size.div_ceil(chunk))
            .map(|index| Chunk::new(base + index * chunk, chunk.min(size - index * chunk)))
            .collect();
        Self { base, size, context, chunks, lent: 0, abandoned: false, kind }
    }

    /// Its size in granules.
    pub fn granules(&self) -> Granules {
        (self.size / GRANULE) as Granules
    }

    /// Whether the GPU can use all of it.
    pub fn usable(&self) -> bool {
        self.chunks.iter().all(|chunk| chunk.backing.usable())
    }

    /// Where the chunks are that the GPU cannot use.
    pub fn missing(&self) -> Vec<Place> {
        self.chunks.iter().filter(|chunk| !chunk.backing.usable()).map(|chunk| self.place(chunk)).collect()
    }

    /// Whether the GPU can use any of it.
    pub fn in_use_by_gpu(&self) -> bool {
        self.chunks.iter().any(|chunk| chunk.backing.usable())
    }

    /// Whether only other processes keep it.
    fn is_orphan(&self) -> bool {
        match &self.kind {
            Kind::Slab(gaps) => gaps.empty(),
            _ => self.abandoned,
        }
    }

    /// Where one of its chunks is mapped.
    pub fn place(&self, chunk: &Chunk) -> Place {
        let (address, size) = (chunk.address, chunk.size);
        let offset = address - self.base;
        let (views, prop) = match &self.kind {
            Kind::Object(object) => {
                let covering = object.views.iter().filter(|view| offset + size <= view.size);
                let views = covering.map(|view| (view.address + offset, view.access.clone())).collect();
                (views, Some(object.prop))
            }
            _ => (Vec::new(), None),
        };
        Place { address, size, views, prop, room: matches!(self.kind, Kind::Room) }
    }

    /// The object that it is.
    pub fn object_mut(&mut self) -> Option<&mut Object> {
        match &mut self.kind {
            Kind::Object(object) => Some(object),
            _ => None,
        }
    }

    /// The object that it is.
    pub fn object(&self) -> Option<&Object> {
        match &self.kind {
            Kind::Object(object) => Some(object),
            _ => None,
        }
    }

    /// Cuts the chunk at `index` so that the granule at `offset` bytes in it is a chunk of its own, and
    /// returns that one.
    fn cut_out(&mut self, index: usize, offset: u64) -> &mut Chunk {
        let mut at = index;
        if offset > 0 {
            self.cut(index, offset);
            at += 1;
        }
        if self.chunks[at].size > GRANULE {
            self.cut(at, GRANULE);
        }
        &mut self.chunks[at]
    }

    /// Cuts a chunk that is not on the GPU in two.
    fn cut(&mut self, index: usize, offset: u64) {
        let chunk = &mut self.chunks[index];
        let mut rest = Chunk::new(chunk.address + offset, chunk.size - offset);
        let first = (offset / GRANULE) as u32;
        let split = |in_use: InUse| match in_use {
            InUse::All => (InUse::All, InUse::All),
            InUse::Granules(bits) => {
                (InUse::Granules(bits & ((1u32 << first) - 1)), InUse::Granules(bits >> first))
            }
        };
        (chunk.backing, rest.backing) = match std::mem::replace(&mut chunk.backing, Backing::Absent) {
            Backing::Evicted(HostCopy { block, in_use }) => {
                let (before, after) = split(in_use);
                let length = before.bytes(offset);
                match (length, after.bytes(rest.size)) {
                    (0, _) => (Backing::Absent, Backing::Evicted(HostCopy { block, in_use: after })),
                    (_, 0) => (Backing::Evicted(HostCopy { block, in_use: before }), Backing::Absent),
                    (length, _) => {
                        let (head, tail) = block.split_at(length as usize);
                        (
                            Backing::Evicted(HostCopy { block: head, in_use: before }),
                            Backing::Evicted(HostCopy { block: tail, in_use: after }),
                        )
                    }
                }
            }
            _ => (Backing::Absent, Backing::Absent),
        };
        chunk.size = offset;
        self.chunks.insert(index + 1, rest);
    }
}

/// Free room in a slab: offset and length of each gap, by offset.
#[derive(Debug)]
pub struct Gaps {
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
    /// Where objects are mapped: address, and the object's base.
    views: BTreeMap<CUdeviceptr, CUdeviceptr>,
    /// Allocations that the application has freed and the engine must release, because memory was
    /// moving or because an open capture forbade to wait for their last use. Their regions live on.
    doomed: Vec<Allocation>,
    /// By what number other processes know an allocation, by its base; gone with the allocation.
    exports: BTreeMap<CUdeviceptr, u64>,
    /// Regions that the application has done with, and by now the last other process too. The engine
    /// releases them.
    returned: Vec<CUdeviceptr>,
    /// Rooms made so far.
    rooms: u64,
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
        self.regions.insert(base, Region::new(base, size, context, Kind::Whole));
        self.allocations.insert(base, Allocation { base, size: requested, region: base });
    }

    /// Makes a slab.
    pub fn add_slab(&mut self, base: CUdeviceptr, context: CUcontext) {
        self.regions.insert(base, Region::new(base, GRANULE, context, Kind::Slab(Gaps::new(GRANULE))));
    }

    /// Makes an object at its home.
    pub fn add_object(&mut self, base: CUdeviceptr, size: u64, prop: CUmemAllocationProp) {
        let object = Object { prop, references: 1, views: Vec::new() };
        self.regions.insert(base, Region::new(base, size, CUcontext(0), Kind::Object(object)));
    }

    /// Makes room of `size` bytes, and says by what base it goes.
    pub fn add_room(&mut self, size: u64, context: CUcontext) -> CUdeviceptr {
        self.rooms += 1;
        let base = ROOM + (self.rooms << 44);
        self.regions.insert(base, Region::new(base, size, context, Kind::Room));
        base
    }

    /// Finds room for a small allocation in a slab of the context's.
    pub fn take_small(&mut self, requested: u64, context: CUcontext) -> Option<CUdeviceptr> {
        let size = requested.next_multiple_of(ALIGNMENT);
        let (region, offset) =
            self.regions.values_mut().filter(|region| region.context == context).find_map(|region| {
                let Kind::Slab(gaps) = &mut region.kind else { return None };
                Some((region.base, gaps.take(size)?))
            })?;
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
        self.exports.remove(&base);
        self.allocations.remove(&base)
    }

    /// The allocation's last use is over.
    pub fn finish_free(&mut self, allocation: Allocation) -> Freed {
        let Some(region) = self.regions.get_mut(&allocation.region) else { return Freed::Nothing };
        if let Kind::Slab(gaps) = &mut region.kind {
            gaps.give(allocation.base - region.base, allocation.size.next_multiple_of(ALIGNMENT));
            if !gaps.empty() {
                return Freed::Nothing;
            }
        }
        region.abandoned = true;
        if region.lent > 0 { Freed::Nothing } else { Freed::Region(region.base) }
    }

    /// Gives an allocation a number by which other processes know it, if it has none yet. `None` if no
    /// allocation begins there.
    pub fn export(&mut self, base: CUdeviceptr, fresh: impl FnOnce() -> u64) -> Option<u64> {
        self.allocations.contains_key(&base).then(|| *self.exports.entry(base).or_insert_with(fresh))
    }

    /// The allocation that begins there, if it is still the one that other processes know by this number,
    /// and its region.
    pub fn exported(&self, base: CUdeviceptr, number: u64) -> Option<(Allocation, &Region)> {
        let allocation = self.allocations.get(&base).filter(|_| self.exports.get(&base) == Some(&number))?;
        Some((*allocation, self.regions.get(&allocation.region)?))
    }

    /// Another process opens a region.
    pub fn lend(&mut self, region: CUdeviceptr) {
        if let Some(region) = self.regions.get_mut(&region) {
            region.lent += 1;
        }
    }

    /// Another process has closed a region. True if the engine is to release it now.
    pub fn take_back(&mut self, base: CUdeviceptr) -> bool {
        let Some(region) = self.regions.get_mut(&base) else { return false };
        region.lent = region.lent.saturating_sub(1);
        let over = region.lent == 0 && region.is_orphan();
        if over {
            self.returned.push(base);
        }
        over
    }

    /// The regions that nobody has open any more, neither here nor elsewhere.
    pub fn take_returned(&mut self) -> Vec<Region> {
        let bases = std::mem::take(&mut self.returned);
        // A slab may have been taken into use again.
        let over = |region: &Region| region.lent == 0 && region.is_orphan();
        let mut release = |base| self.regions.get(base).is_some_and(over).then(|| self.regions.remove(base));
        bases.iter().filter_map(|base| release(base).flatten()).collect()
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
        !self.doomed.is_empty() || !self.returned.is_empty()
    }

    /// Takes a region out of the map that the application never got to know.
    pub fn forget(&mut self, region: CUdeviceptr) -> Option<Region> {
        self.allocations.remove(&region);
        self.exports.remove(&region);
        self.regions.remove(&region)
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

    /// All regions.
    pub fn regions(&self) -> impl Iterator<Item = &Region> {
        self.regions.values()
    }

    /// The object that the application knows by this handle.
    pub fn object(&mut self, handle: CUmemGenericAllocationHandle) -> Option<&mut Region> {
        self.regions.get_mut(&handle).filter(|region| matches!(region.kind, Kind::Object(_)))
    }

    /// The application has mapped an object.
    pub fn add_view(&mut self, object: CUdeviceptr, view: View) {
        self.views.insert(view.address, object);
        if let Some(object) = self.regions.get_mut(&object).and_then(Region::object_mut) {
            object.views.push(view);
        }
    }

    /// The views that lie in a range of addresses: the base of each one's object, and the view.
    pub fn views_in(&self, address: CUdeviceptr, size: u64) -> Vec<(CUdeviceptr, View)> {
        let before = self.views.range(..=address).next_back().map_or(address, |(first, _)| *first);
        self.views
            .range(before..address.saturating_add(size))
            .filter_map(|(at, object)| {
                let views = &self.regions.get(object)?.object()?.views;
                let view = views.iter().find(|view| view.address == *at)?;
                (view.address + view.size > address).then(|| (*object, view.clone()))
            })
            .collect()
    }

    /// A view, to write into.
    pub fn view_mut(&mut self, address: CUdeviceptr) -> Option<&mut View> {
        let object = self.views.get(&address)?;
        let views = &mut self.regions.get_mut(object)?.object_mut()?.views;
        views.iter_mut().find(|view| view.address == address)
    }

    /// The application has unmapped an object. Its region, if nothing holds it any more.
    pub fn remove_view(&mut self, address: CUdeviceptr) -> Option<Region> {
        let base = self.views.remove(&address)?;
        let object = self.regions.get_mut(&base)?.object_mut()?;
        object.views.retain(|view| view.address != address);
        (object.references == 0 && object.views.is_empty()).then(|| self.regions.remove(&base)).flatten()
    }

    /// Takes everything out of the map.
    pub fn take_all(&mut self) -> Vec<Region> {
        self.allocations.clear();
        self.views.clear();
        self.doomed.clear();
        self.exports.clear();
        self.returned.clear();
        std::mem::take(&mut self.regions).into_values().collect()
    }

    /// Takes out of the map all that goes with a context. What other processes have open stays, and is
    /// nobody's here.
    pub fn remove_context(&mut self, context: CUcontext) -> Vec<Region> {
        let bases: Vec<_> = self
            .regions
            .values()
            .filter(|region| region.context == context)
            .map(|region| region.base)
            .collect();
        self.allocations.retain(|_, allocation| !bases.contains(&allocation.region));
        self.doomed.retain(|allocation| !bases.contains(&allocation.region));
        self.exports.retain(|base, _| self.allocations.contains_key(base));
        let (stay, go): (Vec<_>, Vec<_>) =
            bases.into_iter().partition(|base| self.regions.get(base).is_some_and(|region| region.lent > 0));
        for base in stay {
            if let Some(region) = self.regions.get_mut(&base) {
                (region.context, region.kind, region.abandoned) = (CUcontext::NULL, Kind::Whole, true);
            }
        }
        go.iter().filter_map(|base| self.regions.remove(base)).collect()
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

    /// Takes a chunk away, marking it as moving.
    fn take(&mut self, which: impl Fn(&Chunk) -> bool) -> Option<(Place, Backing)> {
        // Room first: it is only ever in the GPU's memory. Its addresses are the highest.
        self.regions.values_mut().rev().find_map(|region| {
            let index = region.chunks.iter().position(&which)?;
            let place = region.place(&region.chunks[index]);
            Some((place, std::mem::replace(&mut region.chunks[index].backing, Backing::Moving)))
        })
    }

    /// Takes the next chunk that the GPU cannot use, marking it as moving. Also says whether it is to be
    /// mapped to host memory: such chunks come first, because only then does the rest fit.
    pub fn next_missing(&mut self) -> Option<(Place, Backing, bool)> {
        let missing = |chunk: &Chunk| matches!(chunk.backing, Backing::Absent | Backing::Evicted(_));
        if let Some((place, backing)) = self.take(|chunk| missing(chunk) && chunk.spill) {
            return Some((place, backing, true));
        }
        self.take(missing).map(|(place, backing)| (place, backing, false))
    }

    /// Takes the next chunk that is in host memory for want of room, marking it as moving.
    pub fn next_overflow(&mut self) -> Option<(Place, CUmemGenericAllocationHandle)> {
        match self.take(|chunk| matches!(chunk.backing, Backing::Overflow(_)) && !chunk.fixed)? {
            (place, Backing::Overflow(handle)) => Some((place, handle)),
            _ => unreachable!("just matched"),
        }
    }

    /// Chunks on the GPU that nobody has looked at since the client last ran: address and bytes. Such as a
    /// look can take: [`CHUNK`] at most.
    pub fn unseen(&self) -> Vec<(CUdeviceptr, u64)> {
        self.regions
            .values()
            .flat_map(|region| &region.chunks)
            .filter(|chunk| matches!(chunk.backing, Backing::Device(_)) && !chunk.fixed)
            .filter(|chunk| chunk.seen.is_none() && chunk.size <= CHUNK)
            .map(|chunk| (chunk.address, chunk.size))
            .collect()
    }

    /// What a look at a chunk has found.
    pub fn saw(&mut self, address: CUdeviceptr, in_use: InUse) {
        if let Some(chunk) = self.chunk_mut(address) {
            chunk.seen = Some(in_use);
        }
    }

    /// The client runs: what was seen counts no more, and whoever spilled may come home next time.
    pub fn unsee(&mut self) {
        for chunk in self.regions.values_mut().flat_map(|region| &mut region.chunks) {
            chunk.seen = None;
        }
    }

    /// Takes the next chunk to be evicted, marking it as moving, and says what of it is in use. Those that
    /// need no copy come first; then from the end, because large allocations tend to lie there, and large
    /// chunks move best.
    pub fn next_resident(&mut self) -> Option<(Place, Backing, InUse)> {
        let empty = |chunk: &Chunk| {
            chunk.evictable()
                && (chunk.seen == Some(InUse::Granules(0)) || matches!(chunk.backing, Backing::Booked))
        };
        for wanted in [&empty as &dyn Fn(&Chunk) -> bool, &Chunk::evictable] {
            for region in self.regions.values_mut().rev() {
                if let Some(index) = region.chunks.iter().rposition(wanted) {
                    let place = region.place(&region.chunks[index]);
                    let chunk = &mut region.chunks[index];
                    let in_use = chunk.seen.unwrap_or(InUse::All);
                    return Some((place, std::mem::replace(&mut chunk.backing, Backing::Moving), in_use));
                }
            }
        }
        None
    }

    /// There will be no room: whoever waits for it is told so.
    pub fn deny_room(&mut self) {
        for region in self.regions.values_mut().filter(|region| matches!(region.kind, Kind::Room)) {
            for chunk in region.chunks.iter_mut().filter(|chunk| matches!(chunk.backing, Backing::Absent)) {
                chunk.backing = Backing::Denied;
            }
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

    /// Chooses what is to be filled in host memory: `shortage` granules of those that are missing, spread
    /// evenly over them. A kernel that walks over them then waits for the link here and there, and goes on
    /// at full speed elsewhere meanwhile: 72 MiB in 9 GiB cost 1.1 ms that way, 1.4 ms in one piece
    /// (tests/gpu/facts.cu, H200). Says how many granules it found.
    pub fn spill(&mut self, shortage: Granules) -> Granules {
        let may = |chunk: &Chunk| matches!(chunk.backing, Backing::Absent | Backing::Evicted(_));
        let regions = |memory: &'_ mut Self| {
            let movable = |region: &&mut Region| match &region.kind {
                Kind::Object(object) => object.prop.requested_handle_types == 0 || region.size > WHOLE,
                Kind::Room => false,
                _ => true,
            };
            memory.regions.values_mut().filter(movable).map(|region| region.base).collect::<Vec<_>>()
        };
        let bases = regions(self);
        let mut missing = Vec::new();
        for base in &bases {
            for chunk in self.regions.get_mut(base).into_iter().flat_map(|region| &mut region.chunks) {
                chunk.spill = false;
                if may(chunk) {
                    missing.extend((0..chunk.size / GRANULE).map(|g| (*base, chunk.address + g * GRANULE)));
                }
            }
        }
        let (all, wanted) = (missing.len(), (shortage as usize).min(missing.len()));
        for index in 0..wanted {
            // The middle of each of as many equal parts.
            let (base, address) = missing[(2 * index + 1) * all / (2 * wanted)];
            let Some(region) = self.regions.get_mut(&base) else { continue };
            let holds = |chunk: &Chunk| (chunk.address..chunk.address + chunk.size).contains(&address);
            if let Some(at) = region.chunks.iter().position(holds) {
                let offset = address - region.chunks[at].address;
                region.cut_out(at, offset).spill = true;
            }
        }
        wanted as Granules
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

    #[test]
    fn what_others_have_open_outlives_its_free_and_its_number_does_not() {
        let mut memory = Memory::default();
        memory.add_whole(1 << 30, GRANULE, GRANULE, CONTEXT);
        assert_eq!(memory.export(1 << 30, || 7), Some(7));
        assert_eq!(memory.export(1 << 30, || 8), Some(7), "asked for twice");
        assert_eq!(memory.export((1 << 30) + 512, || 9), None);
        memory.lend(1 << 30);
        memory.lend(1 << 30);
        let allocation = memory.begin_free(1 << 30).unwrap();
        assert!(memory.exported(1 << 30, 7).is_none());
        assert_eq!(memory.finish_free(allocation), Freed::Nothing);
        assert!(!memory.take_back(1 << 30) && memory.take_back(1 << 30));
        assert!(memory.has_doomed());
        assert_eq!(memory.take_returned().len(), 1);
        assert!(memory.region(1 << 30).is_none() && !memory.has_doomed());
        // An allocation at the same address is another one.
        memory.add_whole(1 << 30, GRANULE, GRANULE, CONTEXT);
        assert!(memory.exported(1 << 30, 7).is_none());
        memory.lend(1 << 30);
        assert!(!memory.take_back(1 << 30), "the application still has it");
    }

    #[test]
    fn a_slab_that_others_have_open_can_be_used_again() {
        let mut memory = Memory::default();
        memory.add_slab(1 << 30, CONTEXT);
        let free = |memory: &mut Memory| {
            let allocation = memory.begin_free(1 << 30).unwrap();
            assert_eq!(memory.finish_free(allocation), Freed::Nothing);
        };
        assert_eq!(memory.take_small(1, CONTEXT), Some(1 << 30));
        memory.lend(1 << 30);
        free(&mut memory);
        assert_eq!(memory.take_small(1, CONTEXT), Some(1 << 30));
        assert!(!memory.take_back(1 << 30));
        memory.lend(1 << 30);
        free(&mut memory);
        assert!(memory.take_back(1 << 30));
        assert_eq!(memory.take_small(1, CONTEXT), Some(1 << 30), "before the engine came");
        assert!(memory.take_returned().is_empty());
        let allocation = memory.begin_free(1 << 30).unwrap();
        assert_eq!(memory.finish_free(allocation), Freed::Region(1 << 30));
    }

    #[test]
    fn what_others_have_open_outlives_its_context() {
        let mut memory = Memory::default();
        memory.add_slab(1 << 30, CONTEXT);
        memory.take_small(1, CONTEXT).unwrap();
        memory.add_whole(1 << 31, GRANULE, GRANULE, CONTEXT);
        memory.lend(1 << 30);
        let gone: Vec<_> = memory.remove_context(CONTEXT).iter().map(|region| region.base).collect();
        assert_eq!(gone, [1 << 31]);
        assert_eq!((memory.containing(1 << 30), memory.take_small(1, CUcontext::NULL)), (None, None));
        assert!(memory.take_back(1 << 30));
        assert_eq!(memory.take_returned().len(), 1);
    }
}
