//! What the application has allocated, and where its bytes are.
//!
//! Memory comes in *regions*, reserved ranges of addresses that never change while the region lives. A
//! region consists of *chunks* of up to 64 MiB, the unit in which memory moves. There are regions of four
//! kinds ([`Kind`]): one allocation; a *slab* of one granule that small allocations share; an *object*,
//! physical memory that the application asked for by cuMemCreate and maps at addresses of its own, its
//! *views*; and a *reservation*, granules that the client takes for memory that only the driver can place. This module
//! is the map of all that and never calls the driver: [`crate::memory::device`] and [`crate::memory::swap`] do, and record
//! the result here.
//!
//! Every region has an address range of its own, its *home*; an object too, because its bytes must be mapped somewhere to
//! be copied while the application has not mapped it. (Reservations have invented addresses, beyond those that any GPU maps.) The
//! handle of an object that the application gets is its home address, so the physical memory behind it can change.

#[cfg(test)]
mod tests;

use crate::cuda::abi::{CUcontext, CUdeviceptr, CUmemAllocationProp, CUmemGenericAllocationHandle};
use crate::memory::bounds;
use crate::memory::fingerprint::Fingerprints;
use crate::memory::gaps::Gaps;
use crate::memory::index::{Index, Keys};
use crate::memory::region::{
    Backing, Chunk, ChunkMapping, HostCopy, InUse, Kind, Object, Region, Seen, View,
};
use crate::memory::scan::SLOTS;
use crate::memory::spares::Spares;
use crate::replicas::{Digest, MOST_OFFERED};
use nvshare::units::{GRANULE, Granules};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Allocations of up to this many bytes share slabs.
pub const SMALL: u64 = 1 << 20;

/// Alignment of every allocation, as the driver gives it.
const ALIGNMENT: u64 = 512;

/// Of the youngest memory, at most one granule in so many is filled in host memory ([`Memory::spill`]).
const SPREAD: usize = 64;

/// Where the invented addresses of reservations begin: no GPU has so many.
const RESERVATIONS: CUdeviceptr = 1 << 62;

/// One allocation of the application.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    /// What cuMemAlloc returned.
    pub base: CUdeviceptr,
    /// Bytes asked for.
    pub size: u64,
    /// The region it lies in, by its base.
    pub region: CUdeviceptr,
    /// How many allocations were made before it.
    pub number: u64,
}

/// A chunk on its way out.
#[derive(Debug)]
pub struct Outgoing {
    /// Where it is mapped.
    pub place: ChunkMapping,
    /// Where its bytes are.
    pub backing: Backing,
    /// What scans have found. With fingerprints if its copy is to be kept when it comes back.
    pub seen: Seen,
    /// What it held when it was last evicted.
    pub kept: Option<HostCopy>,
    /// The granules in use that differ from that, one bit for each; `None` if that is not known.
    pub changed: Option<u32>,
}

/// The map.
#[derive(Debug, Default)]
pub struct Memory {
    regions: BTreeMap<CUdeviceptr, Region>,
    /// The chunks by state, to find the next one to move.
    index: Index,
    /// The slabs: context, length of the largest gap, and base.
    slabs: BTreeSet<(CUcontext, u64, CUdeviceptr)>,
    allocations: BTreeMap<CUdeviceptr, Allocation>,
    /// Where objects are mapped: address, and the object's base.
    views: BTreeMap<CUdeviceptr, CUdeviceptr>,
    /// Allocations that the application has freed and the engine must release, because memory was
    /// moving or because an open capture forbade waiting for their last use. Their regions still exist.
    deferred_frees: Vec<Allocation>,
    /// The numbers by which other processes know allocations, by base address; removed with the allocation.
    exports: BTreeMap<CUdeviceptr, u64>,
    /// Regions that the application has freed and the last other process has closed since. The engine
    /// releases them.
    returned: Vec<CUdeviceptr>,
    /// Allocations made so far.
    made: u64,
    /// Reservations made so far.
    reservations: u64,
    /// Regions made so far.
    born: u64,
    /// How often deferred frees were taken out of their lists.
    deferrals_taken: u64,
    /// The engine moves chunks, and nobody else may touch their backing.
    pub moving: bool,
    /// The gate is open: a new allocation must be usable at once, or the gate be shut again.
    pub open: bool,
    /// Freed regions kept for the next allocation. They are not in the map.
    pub spares: Spares,
    /// Regions and chunks that were visited so far.
    #[cfg(test)]
    visits: std::cell::Cell<u64>,
}

/// The frees that were deferred to the engine at some moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Left {
    deferrals_taken: u64,
    deferred_frees: usize,
    returned: usize,
}

/// What remains to be done after an allocation is freed.
#[derive(Debug, PartialEq, Eq)]
pub enum Freed {
    /// Nothing: its slab has other allocations, or another process has its region open.
    Nothing,
    /// The region is unused: release the region with this base.
    Region(CUdeviceptr),
}

impl Memory {
    /// Makes a region of `size` bytes for one allocation of `requested` bytes.
    pub fn add_whole(&mut self, base: CUdeviceptr, size: u64, requested: u64, context: CUcontext) {
        self.insert(Region::new(base, size, context, Kind::Whole));
        self.add_allocation(base, requested, base);
    }

    /// Puts a spare region back into the map: for one allocation of `requested` bytes, or as a slab.
    pub fn add_spare(&mut self, mut region: Region, requested: Option<u64>) {
        let base = region.base;
        region.abandoned = false;
        region.kind = if requested.is_some() { Kind::Whole } else { Kind::Slab(Gaps::new(region.size)) };
        // An earlier scan says nothing about what the application will write.
        region.chunks.iter_mut().for_each(|chunk| chunk.seen = None);
        self.insert(region);
        if let Some(bytes) = requested {
            self.add_allocation(base, bytes, base);
        }
    }

    fn add_allocation(&mut self, base: CUdeviceptr, size: u64, region: CUdeviceptr) {
        self.allocations.insert(base, Allocation { base, size, region, number: self.made });
        self.made += 1;
        if let Some(region) = self.regions.get_mut(&region) {
            region.allocations += 1;
            bounds::add(base, size, region.base + region.size);
        }
    }

    fn remove_allocation(&mut self, base: CUdeviceptr) -> Option<Allocation> {
        self.exports.remove(&base);
        let allocation = self.allocations.remove(&base)?;
        bounds::remove(base);
        if let Some(region) = self.regions.get_mut(&allocation.region) {
            region.allocations -= 1;
        }
        Some(allocation)
    }

    fn insert(&mut self, region: Region) {
        let region = Region { born: self.born, ..region };
        self.born += 1;
        for chunk in &region.chunks {
            self.index.insert(region.base, region.is_reservation(), chunk);
        }
        self.slabs.extend(region.as_slab());
        self.regions.insert(region.base, region);
    }

    /// Takes a region out of the map, the index and the slabs; not its allocations and views.
    fn take_region(&mut self, base: CUdeviceptr) -> Option<Region> {
        let region = self.regions.remove(&base)?;
        for chunk in &region.chunks {
            self.visit();
            self.index.remove(base, region.is_reservation(), chunk);
        }
        if let Some(slab) = region.as_slab() {
            self.slabs.remove(&slab);
        }
        Some(region)
    }

    /// Counts a visit of a region or a chunk, for tests.
    fn visit(&self) {
        #[cfg(test)]
        self.visits.set(self.visits.get() + 1);
    }

    /// Changes the chunk that begins at an address. Every change of a chunk in the map is made here.
    fn change<T>(&mut self, address: CUdeviceptr, change: impl FnOnce(&mut Chunk) -> T) -> Option<T> {
        self.visit();
        let (base, region) = self.regions.range_mut(..=address).next_back()?;
        let (base, is_reservation, at) = (*base, region.is_reservation(), region.chunk_at(address)?);
        let chunk = &mut region.chunks[at];
        let before = Keys::of(base, is_reservation, chunk);
        let changed = change(chunk);
        self.index.change(before, Keys::of(base, is_reservation, chunk));
        Some(changed)
    }

    /// The region that contains an address, and the index of the chunk in it.
    fn chunk(&self, address: CUdeviceptr) -> Option<(&Region, usize)> {
        self.visit();
        let (_, region) = self.regions.range(..=address).next_back()?;
        Some((region, region.chunk_at(address)?))
    }

    /// Makes a slab.
    pub fn add_slab(&mut self, base: CUdeviceptr, context: CUcontext) {
        self.insert(Region::new(base, GRANULE, context, Kind::Slab(Gaps::new(GRANULE))));
    }

    /// Makes an object at its home.
    pub fn add_object(&mut self, base: CUdeviceptr, size: u64, prop: CUmemAllocationProp) {
        let object = Object { prop, references: 1, views: Vec::new() };
        self.insert(Region::new(base, size, CUcontext::NULL, Kind::Object(object)));
    }

    /// Makes a reservation of `size` bytes; returns its base.
    pub fn add_reservation(&mut self, size: u64, context: CUcontext) -> CUdeviceptr {
        self.reservations += 1;
        let base = RESERVATIONS + (self.reservations << 44);
        self.insert(Region::new(base, size, context, Kind::Reservation));
        base
    }

    /// Places a small allocation in a slab of the context: of the slabs whose largest gap fits it, in the one where that gap
    /// is smallest.
    pub fn take_small(&mut self, requested: u64, context: CUcontext) -> Option<CUdeviceptr> {
        let size = requested.next_multiple_of(ALIGNMENT);
        let slabs = (context, size, 0)..=(context, CUdeviceptr::MAX, CUdeviceptr::MAX);
        let (.., region) = *self.slabs.range(slabs).next()?;
        let offset = self.change_gaps(region, |gaps| gaps.take(size)).flatten()?;
        let base = region + offset;
        self.add_allocation(base, requested, region);
        Some(base)
    }

    /// Changes what is free in a slab. `None` if there is no slab.
    fn change_gaps<T>(&mut self, base: CUdeviceptr, change: impl FnOnce(&mut Gaps) -> T) -> Option<T> {
        self.visit();
        let region = self.regions.get_mut(&base)?;
        let before = region.as_slab()?;
        let Kind::Slab(gaps) = &mut region.kind else { return None };
        let changed = change(gaps);
        self.slabs.remove(&before);
        self.slabs.extend(region.as_slab());
        Some(changed)
    }

    /// The allocation that `address` lies in.
    pub fn containing(&self, address: CUdeviceptr) -> Option<Allocation> {
        let (_, allocation) = self.allocations.range(..=address).next_back()?;
        (address - allocation.base < allocation.size).then_some(*allocation)
    }

    /// Whether an address is in the range of a region or of a spare.
    pub fn covers(&self, address: CUdeviceptr) -> bool {
        self.overlaps(address, 1)
    }

    /// The region in whose range an address is: its base and bytes.
    pub fn around(&self, address: CUdeviceptr) -> Option<(CUdeviceptr, u64)> {
        let (_, region) = self.regions.range(..=address).next_back()?;
        (address - region.base < region.size).then_some((region.base, region.size))
    }

    /// Whether a range of addresses overlaps that of a region or of a spare.
    pub fn overlaps(&self, address: CUdeviceptr, size: u64) -> bool {
        let last = self.regions.range(..address.saturating_add(size)).next_back();
        last.is_some_and(|(_, region)| address < region.base + region.size)
            || self.spares.overlap(address, size)
    }

    /// Removes an allocation from those that can be freed or looked up. Its bytes in a slab stay in use until
    /// [`Memory::finish_free`], because the GPU may still use them.
    pub fn begin_free(&mut self, base: CUdeviceptr) -> Option<Allocation> {
        self.remove_allocation(base)
    }

    /// The GPU no longer uses the allocation.
    pub fn finish_free(&mut self, allocation: Allocation) -> Freed {
        let base = allocation.region;
        let in_slab = self.change_gaps(base, |gaps| {
            gaps.give(allocation.base - base, allocation.size.next_multiple_of(ALIGNMENT));
            gaps.empty()
        });
        if in_slab == Some(false) {
            return Freed::Nothing;
        }
        let Some(region) = self.regions.get_mut(&base) else { return Freed::Nothing };
        region.abandoned = true;
        if region.lent > 0 { Freed::Nothing } else { Freed::Region(base) }
    }

    /// Gives an allocation a number by which other processes know it, if it has none yet. `None` if no
    /// allocation begins there.
    pub fn export(&mut self, base: CUdeviceptr, fresh: impl FnOnce() -> u64) -> Option<u64> {
        self.allocations.contains_key(&base).then(|| *self.exports.entry(base).or_insert_with(fresh))
    }

    /// The allocation at `base` and its region, if other processes know that allocation by this number.
    pub fn exported(&self, base: CUdeviceptr, number: u64) -> Option<(Allocation, &Region)> {
        let allocation = self.allocations.get(&base).filter(|_| self.exports.get(&base) == Some(&number))?;
        Some((*allocation, self.regions.get(&allocation.region)?))
    }

    /// Another process has opened a region.
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

    /// Defers the rest of a free to the engine.
    pub fn defer_free(&mut self, allocation: Allocation) {
        self.deferred_frees.push(allocation);
    }

    /// The frees that are deferred to the engine now.
    pub fn left(&self) -> Left {
        Left {
            deferrals_taken: self.deferrals_taken,
            deferred_frees: self.deferred_frees.len(),
            returned: self.returned.len(),
        }
    }

    /// Takes the deferred frees that [`Memory::left`] reported: the allocations to finish, and the regions that no process has
    /// open any more. `None` if some were taken since.
    pub fn take_left(&mut self, left: Left) -> Option<(Vec<Allocation>, Vec<Region>)> {
        if left.deferrals_taken != self.deferrals_taken {
            return None;
        }
        self.deferrals_taken += 1;
        let deferred_frees = self.deferred_frees.drain(..left.deferred_frees).collect();
        let bases: Vec<_> = self.returned.drain(..left.returned).collect();
        // A slab may have been taken into use again.
        let over = |region: &Region| region.lent == 0 && region.is_orphan();
        let mut release =
            |base: &_| self.regions.get(base).is_some_and(over).then(|| self.take_region(*base));
        Some((deferred_frees, bases.iter().filter_map(|base| release(base).flatten()).collect()))
    }

    /// Whether a free is deferred to the engine.
    pub fn has_deferred_frees(&self) -> bool {
        !self.deferred_frees.is_empty() || !self.returned.is_empty()
    }

    /// Granules that the deferred frees will release.
    pub fn deferred(&self) -> Granules {
        let in_use = |base| self.regions.get(&base).is_some_and(|region| region.allocations > 0);
        let deferred_frees =
            self.deferred_frees.iter().map(|allocation| allocation.region).filter(|base| !in_use(*base));
        // A set, because several deferred allocations may lie in the same slab.
        let going: BTreeSet<_> = deferred_frees.chain(self.returned.iter().copied()).collect();
        let going = going.iter().filter_map(|base| self.regions.get(base));
        going.filter(|region| region.lent == 0).map(Region::granules).sum()
    }

    /// Takes out of the map a region whose address the application was never given, and its allocation.
    pub fn remove_unpublished(&mut self, region: CUdeviceptr) -> Option<Region> {
        self.remove_allocation(region);
        self.take_region(region)
    }

    /// Takes a region out of the map.
    pub fn remove(&mut self, region: CUdeviceptr) -> Option<Region> {
        self.take_region(region)
    }

    /// A region.
    pub fn region(&self, base: CUdeviceptr) -> Option<&Region> {
        self.regions.get(&base)
    }

    /// Keeps all chunks of a region on the GPU from now on. Returns the granules of those for which that is new.
    pub fn pin(&mut self, base: CUdeviceptr) -> Granules {
        let Some(region) = self.regions.get(&base) else { return 0 };
        let loose: Vec<_> =
            region.chunks.iter().filter(|chunk| !chunk.pinned).map(|chunk| chunk.address).collect();
        let pin = |chunk: &mut Chunk| {
            chunk.pinned = true;
            chunk.granules()
        };
        loose.into_iter().filter_map(|address| self.change(address, pin)).sum()
    }

    /// All regions.
    pub fn regions(&self) -> impl Iterator<Item = &Region> {
        self.regions.values().inspect(|_| self.visit())
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

    /// The views that overlap a range of addresses, each with the base of its object.
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

    /// The view that begins at an address.
    pub fn view_mut(&mut self, address: CUdeviceptr) -> Option<&mut View> {
        let object = self.views.get(&address)?;
        let views = &mut self.regions.get_mut(object)?.object_mut()?.views;
        views.iter_mut().find(|view| view.address == address)
    }

    /// The application has unmapped an object. Returns its region if it has no handle and no view left.
    pub fn remove_view(&mut self, address: CUdeviceptr) -> Option<Region> {
        let base = self.views.remove(&address)?;
        let object = self.regions.get_mut(&base)?.object_mut()?;
        object.views.retain(|view| view.address != address);
        (object.references == 0 && object.views.is_empty()).then(|| self.take_region(base)).flatten()
    }

    /// Takes everything out of the map.
    pub fn take_all(&mut self) -> Vec<Region> {
        self.deferrals_taken += 1;
        std::mem::take(&mut self.allocations).into_keys().for_each(bounds::remove);
        self.views.clear();
        self.deferred_frees.clear();
        self.exports.clear();
        self.returned.clear();
        self.slabs.clear();
        self.index = Index::default();
        std::mem::take(&mut self.regions).into_values().collect()
    }

    /// Takes the regions of a context out of the map and returns them. Regions that other processes have open stay, without a
    /// context.
    pub fn remove_context(&mut self, context: CUcontext) -> Vec<Region> {
        let of_context = |region: &&Region| region.context == context;
        let bases: BTreeSet<_> = self.regions.values().filter(of_context).map(|region| region.base).collect();
        let gone: Vec<_> =
            self.allocations.values().filter(|allocation| bases.contains(&allocation.region)).collect();
        let gone: Vec<_> = gone.iter().map(|allocation| allocation.base).collect();
        for base in gone {
            self.remove_allocation(base);
        }
        self.deferrals_taken += 1;
        self.deferred_frees.retain(|allocation| !bases.contains(&allocation.region));
        let is_lent = |base: &_| self.regions.get(base).is_some_and(|region| region.lent > 0);
        let (stay, go): (Vec<_>, Vec<_>) = bases.into_iter().partition(is_lent);
        for base in stay {
            if let Some(region) = self.regions.get_mut(&base) {
                if let Some(slab) = region.as_slab() {
                    self.slabs.remove(&slab);
                }
                (region.context, region.kind, region.abandoned) = (CUcontext::NULL, Kind::Whole, true);
            }
        }
        go.into_iter().filter_map(|base| self.take_region(base)).collect()
    }

    /// Records where a chunk is now. Its region still exists: while chunks move, frees are deferred.
    pub fn settle(&mut self, address: CUdeviceptr, backing: Backing) {
        self.change(address, |chunk| {
            chunk.backing = backing;
            // A chunk is chosen for host memory for one fill; the next fill chooses again.
            chunk.spill &= chunk.is_missing();
            chunk.promised &= matches!(chunk.backing, Backing::Evicted(_));
        });
    }

    /// Records that a chunk is on the GPU, and that a copy of what it held when it was evicted is kept.
    pub fn settle_kept(
        &mut self,
        address: CUdeviceptr,
        handle: CUmemGenericAllocationHandle,
        copy: HostCopy,
    ) {
        self.change(address, |chunk| chunk.kept = Some(copy));
        self.settle(address, Backing::Device(handle));
    }

    /// Takes kept copies of at least `bytes` bytes, or all.
    pub fn take_kept(&mut self, bytes: u64) -> Vec<HostCopy> {
        let (mut copies, mut taken) = (Vec::new(), 0);
        while taken < bytes {
            let Some(address) = self.index.kept().next() else { break };
            let copy = self.change(address, |chunk| chunk.kept.take()).flatten();
            taken += copy.as_ref().map_or(0, |copy| copy.memory.length());
            copies.extend(copy);
        }
        copies
    }

    /// Takes a chunk to be moved and marks it as moving. Returns where it is mapped, its backing, and what `read` finds of it.
    fn take<T>(
        &mut self,
        address: Option<CUdeviceptr>,
        read: impl FnOnce(&mut Chunk) -> T,
    ) -> Option<(ChunkMapping, Backing, T)> {
        let address = address?;
        let (region, at) = self.chunk(address)?;
        let place = region.place(&region.chunks[at]);
        self.change(address, |chunk| {
            let read = read(chunk);
            (place, std::mem::replace(&mut chunk.backing, Backing::Moving), read)
        })
    }

    /// Takes the next chunk that the GPU cannot use and marks it as moving. Also returns whether it is to be filled in host
    /// memory: such chunks come first, because the others fit on the GPU only without them.
    pub fn next_missing(&mut self) -> Option<(ChunkMapping, Backing, bool)> {
        self.take(self.index.next_missing(), |chunk| chunk.spill)
    }

    /// Takes the largest evicted chunk of at most `room` granules that is to be filled on the GPU, and marks it as moving.
    pub fn next_evicted(&mut self, room: Granules) -> Option<(ChunkMapping, HostCopy)> {
        match self.take(self.index.next_evicted(room), |_| ())? {
            (place, Backing::Evicted(copy), ..) => Some((place, copy)),
            _ => unreachable!("the index says that it is evicted"),
        }
    }

    /// Takes the next chunk that is mapped to host memory, and marks it as moving.
    pub fn next_overflow(&mut self) -> Option<(ChunkMapping, CUmemGenericAllocationHandle)> {
        match self.take(self.index.next_overflow(), |_| ())? {
            (place, Backing::Overflow(handle), ..) => Some((place, handle)),
            _ => unreachable!("the index says that it is in host memory"),
        }
    }

    /// Chunks on the GPU that were not scanned since the client last ran: address and bytes. Only those that a scan can
    /// handle, of at most [`crate::memory::CHUNK`] bytes.
    pub fn unseen(&self) -> Vec<(CUdeviceptr, u64)> {
        let chunk = |address| self.chunk(address).map(|(region, at)| (address, region.chunks[at].size));
        self.index.unseen().filter_map(chunk).collect()
    }

    /// Of these chunks, given by [`Memory::unseen`], those that are to be evicted with fingerprints.
    pub fn tried(&self, unseen: &[(CUdeviceptr, u64)]) -> Vec<(CUdeviceptr, u64)> {
        let tried = |(address, _): &&_| {
            self.chunk(*address).is_some_and(|(region, at)| region.chunks[at].constancy.is_tried())
        };
        unseen.iter().filter(tried).copied().collect()
    }

    /// Records what a scan of a chunk has found.
    pub fn saw(&mut self, address: CUdeviceptr, seen: Seen) {
        self.change(address, |chunk| chunk.seen = Some(seen));
    }

    /// The client runs: earlier scans are no longer valid.
    pub fn unsee(&mut self) {
        for address in self.index.seen() {
            self.change(address, |chunk| chunk.seen = None);
        }
    }

    /// Takes the next chunk to be evicted that needs at most `most` bytes of host memory, and marks it as moving. Chunks that
    /// need no copy come first.
    pub fn next_resident(&mut self, most: u64) -> Option<Outgoing> {
        let most = Granules::try_from(most / GRANULE).unwrap_or(Granules::MAX);
        self.outgoing(self.index.next_resident(most)?)
    }

    /// The same for the chunk that begins at an address, if it can be evicted.
    pub fn take_resident(&mut self, address: CUdeviceptr) -> Option<Outgoing> {
        let (region, at) = self.chunk(address)?;
        let chunk = &region.chunks[at];
        (chunk.address == address && chunk.evictable()).then(|| self.outgoing(address))?
    }

    fn outgoing(&mut self, address: CUdeviceptr) -> Option<Outgoing> {
        let (place, backing, (seen, kept, changed)) = self.take(Some(address), |chunk| {
            let mut seen = chunk.seen.clone().unwrap_or(Seen { in_use: InUse::All, fingerprints: None });
            let (changed, all) = (chunk.changed(), seen.in_use.bytes(chunk.size) / GRANULE);
            match (&seen.fingerprints, &chunk.kept) {
                (None, _) => chunk.constancy.rest(),
                (Some(_), None) => {}
                (Some(_), Some(_)) => {
                    let unchanged = changed.map_or(0, |changed| all as u32 - changed.count_ones());
                    chunk.constancy.compared(unchanged, all as u32);
                }
            }
            seen.fingerprints = seen.fingerprints.filter(|_| chunk.constancy.is_tried());
            (seen, chunk.kept.take(), changed)
        })?;
        Some(Outgoing { place, backing, seen, kept, changed })
    }

    /// What could be handed over to a replica if it was evicted: the address of each chunk, and what stands for its contents. At most
    /// `most`, those first that need no copy.
    pub fn offers(&self, most: usize) -> Vec<(CUdeviceptr, Digest)> {
        let offer = |address: CUdeviceptr| {
            let (region, at) = self.chunk(address)?;
            let chunk = &region.chunks[at];
            let seen = chunk.seen.as_ref().filter(|_| region.may_change_hands())?;
            Some((address, seen.digest(chunk.size)?))
        };
        self.index.by_need().filter_map(offer).take(most).collect()
    }

    /// Of chunks that a replica offers, those that are in host memory here, until they have `most` granules together: the place of each
    /// in the offer, in that order, and the address of the chunk with the same contents. They are promised from now on.
    pub fn promise(&mut self, offered: &[Digest], most: Granules) -> Vec<(u32, CUdeviceptr)> {
        let mut lacking: BTreeMap<Digest, Vec<(CUdeviceptr, Granules)>> = BTreeMap::new();
        for address in self.index.evicted().take(2 * MOST_OFFERED) {
            let Some((region, at)) = self.chunk(address) else { continue };
            let chunk = &region.chunks[at];
            if let Some(digest) = chunk.digest_of_copy().filter(|_| region.may_change_hands()) {
                lacking.entry(digest).or_default().push((address, chunk.granules()));
            }
        }
        let mut left = most;
        let mut promised = Vec::new();
        for (place, digest) in (0..).zip(offered) {
            // Chunks are only evicted whole, so the last one may be too large by a part.
            if left == 0 {
                break;
            }
            if let Some((address, granules)) = lacking.get_mut(digest).and_then(Vec::pop) {
                left = left.saturating_sub(granules);
                promised.push((place, address));
            }
        }
        for (_, address) in &promised {
            self.change(*address, |chunk| chunk.promised = true);
        }
        promised
    }

    /// Chunks that were promised will not come, or not in time.
    pub fn unpromise(&mut self, addresses: &[CUdeviceptr]) {
        for address in addresses {
            self.change(*address, |chunk| chunk.promised &= chunk.address != *address);
        }
    }

    /// The chunks that are promised.
    pub fn promised(&self) -> Vec<CUdeviceptr> {
        self.index.promised().collect()
    }

    /// The next chunk to fill on the GPU: its granules, and whether it is promised. `None` if there is none, or if another is to be
    /// filled in host memory first.
    pub fn next_on_gpu(&self) -> Option<(Granules, bool)> {
        let (region, at) = self.chunk(self.index.next_missing()?)?;
        let chunk = &region.chunks[at];
        (!chunk.spill).then_some((chunk.granules(), chunk.promised))
    }

    /// Takes the chunk of `size` bytes that begins at an address and marks it as moving, if it is in host memory and has these
    /// contents: its memory has come from a replica.
    pub fn take_handed(
        &mut self,
        address: CUdeviceptr,
        size: u64,
        digest: Digest,
    ) -> Option<(ChunkMapping, HostCopy)> {
        let (region, at) = self.chunk(address)?;
        let chunk = &region.chunks[at];
        let fits = (chunk.address, chunk.size) == (address, size) && region.may_change_hands();
        if !fits || chunk.digest_of_copy() != Some(digest) {
            return None;
        }
        match self.take(Some(address), |_| ())? {
            (place, Backing::Evicted(copy), ()) => Some((place, copy)),
            _ => unreachable!("a chunk with the digest of a copy has one"),
        }
    }

    /// Takes the chunk that begins at an address and marks it as moving, if its contents are not those of the copy that is kept of it,
    /// or are not known: its memory, and that copy. `now` is what scans have found: the granules that are not all zero, one bit for
    /// each, and fingerprints.
    pub fn take_wrong(
        &mut self,
        address: CUdeviceptr,
        now: Option<(u32, &Fingerprints)>,
    ) -> Option<(ChunkMapping, CUmemGenericAllocationHandle, HostCopy)> {
        let (region, at) = self.chunk(address)?;
        let (chunk, kept) = (&region.chunks[at], region.chunks[at].kept.as_ref()?);
        let is_right = now.is_some_and(|(not_zero, fingerprints)| {
            // What the copy has no place for is zero.
            let beyond = (0..SLOTS as u64).any(|at| not_zero & 1 << at != 0 && !kept.in_use.has(at));
            let seen = Seen { in_use: kept.in_use, fingerprints: Some(Arc::new(*fingerprints)) };
            !beyond && kept.changed(&seen, chunk.granules()) == Some(0)
        });
        if is_right || !matches!(chunk.backing, Backing::Device(_)) {
            return None;
        }
        match self.take(Some(address), |chunk| chunk.kept.take())? {
            (place, Backing::Device(handle), Some(copy)) => Some((place, handle, copy)),
            _ => unreachable!("it is on the GPU and has a copy"),
        }
    }

    /// Forgets all fingerprints, which were taken with another key than those to come. Returns the copies that were kept and are of no
    /// use without them.
    pub fn forget_fingerprints(&mut self) -> Vec<HostCopy> {
        self.unsee();
        let copies = self.take_kept(u64::MAX);
        let missing: Vec<_> = self.index.missing().collect();
        for address in missing {
            self.change(address, |chunk| {
                if let Backing::Evicted(copy) = &mut chunk.backing {
                    copy.fingerprints = None;
                }
            });
        }
        copies
    }

    /// Granules that can be evicted if there is enough host memory.
    pub fn evictable(&self) -> Granules {
        self.index.evictable()
    }

    /// Granules that can be evicted with `bytes` of host memory.
    pub fn evictable_with(&self, bytes: u64) -> Granules {
        self.index.evictable_with(Granules::try_from(bytes / GRANULE).unwrap_or(Granules::MAX))
    }

    /// The least bytes of host memory with which a chunk can be evicted.
    pub fn least_need(&self) -> u64 {
        self.index.least_need().map_or(0, |granules| u64::from(granules) * GRANULE)
    }

    /// Denies the reservations that wait: no room can be made for them, and the threads that wait get an error.
    pub fn deny_reservations(&mut self) {
        for address in self.index.waiting_reservations() {
            self.settle(address, Backing::Denied);
        }
    }

    /// Whether there is a chunk that the GPU cannot use.
    pub fn is_missing(&self) -> bool {
        self.index.is_missing()
    }

    /// The regions that the GPU cannot use and whose missing chunks have never had memory.
    pub fn missing(&self) -> Vec<CUdeviceptr> {
        let new = |region: &&Region| {
            let mut out = region.chunks.iter().filter(|chunk| !chunk.backing.usable());
            !region.usable() && out.all(|chunk| matches!(chunk.backing, Backing::Absent))
        };
        self.regions.values().filter(new).map(|region| region.base).collect()
    }

    /// Granules that are mapped to host memory because they do not fit on the GPU.
    pub fn overflow(&self) -> Granules {
        self.index.overflowed()
    }

    /// Chooses `shortage` granules of the missing ones to be filled in host memory. Returns how many it found.
    ///
    /// They are spread evenly, so that a kernel that reads all of the memory waits for the link in a few of its blocks
    /// while the others run at full speed: 72 MiB in 9 GiB cost 1.1 ms that way, 1.4 ms in one piece
    /// (tests/gpu/facts.cu, H200). They are chosen among the youngest memory, one in [`SPREAD`] granules: what a
    /// program allocates last is mostly where it writes results, once each, and what it allocates first,
    /// parameters and inputs, it reads again and again.
    ///
    /// Memory that must be one chunk is chosen whole, and only if no other is left: otherwise the fill would wait forever for
    /// room that cannot be made.
    pub fn spill(&mut self, shortage: Granules) -> Granules {
        let chosen_before: Vec<_> = self.index.spilled().collect();
        for address in chosen_before {
            self.change(address, |chunk| chunk.spill = false);
        }
        if shortage == 0 {
            return 0;
        }
        let (mut missing, mut whole) = (Vec::new(), Vec::new());
        for address in self.index.missing() {
            let Some((region, at)) = self.chunk(address) else { continue };
            let granules = region.chunks[at].granules();
            if region.may_spill() {
                let address = |granule| address + u64::from(granule) * GRANULE;
                missing.extend((0..granules).map(|granule| (Reverse(region.born), address(granule))));
            } else if !region.is_reservation() {
                whole.push((Reverse(region.born), address));
            }
        }
        missing.sort_unstable();
        missing.truncate((shortage as usize).saturating_mul(SPREAD));
        let (all, wanted) = (missing.len(), (shortage as usize).min(missing.len()));
        // The middles of as many equal parts.
        (0..wanted).for_each(|index| self.spill_granule(missing[(2 * index + 1) * all / (2 * wanted)].1));
        whole.sort_unstable();
        let spill = |chunk: &mut Chunk| {
            chunk.spill = true;
            chunk.granules()
        };
        let mut spilled = wanted as Granules;
        for (_, address) in whole {
            if spilled >= shortage {
                break;
            }
            spilled += self.change(address, spill).unwrap_or(0);
        }
        spilled
    }

    /// Makes the granule at an address a chunk of its own, to be filled in host memory.
    fn spill_granule(&mut self, address: CUdeviceptr) {
        self.visit();
        let Some((base, region)) = self.regions.range_mut(..=address).next_back() else { return };
        let Some(at) = region.chunk_at(address) else { return };
        let offset = address - region.chunks[at].address;
        self.index.remove(*base, false, &region.chunks[at]);
        let (pieces, at) = region.cut_out(at, offset);
        region.chunks[at].spill = true;
        region.chunks[pieces].iter().for_each(|chunk| self.index.insert(*base, false, chunk));
    }
}
