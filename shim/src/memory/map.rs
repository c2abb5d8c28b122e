//! What the application has allocated, and where its bytes are.
//!
//! Memory comes in *regions*, reserved ranges of addresses that never change while the region lives. A
//! region consists of *chunks* of up to 64 MiB, the unit in which memory moves. There are regions of four
//! kinds ([`Kind`]): one allocation; a *slab* of one granule that small allocations share; an *object*,
//! physical memory that the application asked for by cuMemCreate and maps at addresses of its own, its
//! *views*; and *room*, which the client has booked for memory that only the driver can place. This module
//! is the map of all that and calls no driver: [`crate::memory::device`] and [`crate::memory::swap`] act, and write down
//! here what they did.
//!
//! Every region has addresses of its own, its *home*, an object too: where its bytes are while nobody has
//! mapped it, and from where it is copied. (Room has made-up ones, beyond what any GPU maps.) An object's
//! handle, as the application sees it, is its home: physical memory comes and goes beneath it.

#[cfg(test)]
mod tests;

use crate::cuda::abi::{CUcontext, CUdeviceptr, CUmemAllocationProp, CUmemGenericAllocationHandle};
use crate::memory::bounds;
use crate::memory::gaps::Gaps;
use crate::memory::index::{Index, Keys};
use crate::memory::region::{Backing, Chunk, ChunkMapping, HostCopy, InUse, Kind, Object, Region, View};
use crate::memory::spares::Spares;
use nvshare::units::{GRANULE, Granules};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

/// Allocations of up to this many bytes share slabs.
pub const SMALL: u64 = 1 << 20;

/// Alignment of every allocation, as the driver gives it.
const ALIGNMENT: u64 = 512;

/// What lies in host memory for want of room is one granule in at least so many of the youngest.
const SPREAD: usize = 64;

/// Where the made-up addresses of room begin: no GPU has so many.
const RESERVATIONS: CUdeviceptr = 1 << 62;

/// One allocation of the application's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    /// What cuMemAlloc returned.
    pub base: CUdeviceptr,
    /// Bytes asked for.
    pub size: u64,
    /// The region it lies in, by its base.
    pub region: CUdeviceptr,
    /// How many were made before it.
    pub number: u64,
}

/// The map.
#[derive(Debug, Default)]
pub struct Memory {
    regions: BTreeMap<CUdeviceptr, Region>,
    /// The chunks by what can be done with them.
    index: Index,
    /// The slabs: context, length of the largest gap, and base.
    slabs: BTreeSet<(CUcontext, u64, CUdeviceptr)>,
    allocations: BTreeMap<CUdeviceptr, Allocation>,
    /// Where objects are mapped: address, and the object's base.
    views: BTreeMap<CUdeviceptr, CUdeviceptr>,
    /// Allocations that the application has freed and the engine must release, because memory was
    /// moving or because an open capture forbade to wait for their last use. Their regions live on.
    deferred_frees: Vec<Allocation>,
    /// By what number other processes know an allocation, by its base; gone with the allocation.
    exports: BTreeMap<CUdeviceptr, u64>,
    /// Regions that the application has done with, and by now the last other process too. The engine
    /// releases them.
    returned: Vec<CUdeviceptr>,
    /// Allocations made so far.
    made: u64,
    /// Rooms made so far.
    reservations: u64,
    /// Regions made so far.
    born: u64,
    /// Times that frees which were left to the engine were taken out of their lists.
    deferrals_taken: u64,
    /// The engine moves chunks, and nobody else may touch their backing.
    pub moving: bool,
    /// The gate is open: what is allocated now must be usable, or shut it again.
    pub open: bool,
    /// What the application has freed, for the next allocation. It is not in the map.
    pub spares: Spares,
    /// Regions and chunks that were looked at so far.
    #[cfg(test)]
    visits: std::cell::Cell<u64>,
}

/// What was left to the engine at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Left {
    deferrals_taken: u64,
    deferred_frees: usize,
    returned: usize,
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
        self.insert(Region::new(base, size, context, Kind::Whole));
        self.add_allocation(base, requested, base);
    }

    /// Makes a spare a region again: for one allocation of so many bytes, or a slab.
    pub fn add_spare(&mut self, mut region: Region, requested: Option<u64>) {
        let base = region.base;
        region.abandoned = false;
        region.kind = if requested.is_some() { Kind::Whole } else { Kind::Slab(Gaps::new(region.size)) };
        // What was seen in it was there before the application wrote to it.
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

    /// Takes a region out of the map, and whatever points to it but allocations and views.
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

    /// Counts a region or a chunk that is looked at, for tests.
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

    /// The region that an address lies in, and the index of its chunk there.
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

    /// Makes room of `size` bytes, and says by what base it goes.
    pub fn add_reservation(&mut self, size: u64, context: CUcontext) -> CUdeviceptr {
        self.reservations += 1;
        let base = RESERVATIONS + (self.reservations << 44);
        self.insert(Region::new(base, size, context, Kind::Reservation));
        base
    }

    /// Finds room for a small allocation in a slab of the context's: in the one with the smallest gap of those whose
    /// largest has room.
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

    /// Whether an address is among those reserved for a region, in use or not, or kept.
    pub fn covers(&self, address: CUdeviceptr) -> bool {
        self.overlaps(address, 1)
    }

    /// The region whose reserved addresses one is among: where it begins, and bytes.
    pub fn around(&self, address: CUdeviceptr) -> Option<(CUdeviceptr, u64)> {
        let (_, region) = self.regions.range(..=address).next_back()?;
        (address - region.base < region.size).then_some((region.base, region.size))
    }

    /// Whether any of a range of addresses is among those reserved for a region.
    pub fn overlaps(&self, address: CUdeviceptr, size: u64) -> bool {
        let last = self.regions.range(..address.saturating_add(size)).next_back();
        last.is_some_and(|(_, region)| address < region.base + region.size)
            || self.spares.overlap(address, size)
    }

    /// Strikes an allocation off the list of those that can be freed or looked up. Its room in a slab
    /// is not free before [`Memory::finish_free`]: the GPU may still use it.
    pub fn begin_free(&mut self, base: CUdeviceptr) -> Option<Allocation> {
        self.remove_allocation(base)
    }

    /// The allocation's last use is over.
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

    /// Leaves the end of a free to the engine.
    pub fn defer_free(&mut self, allocation: Allocation) {
        self.deferred_frees.push(allocation);
    }

    /// What is left to the engine as yet.
    pub fn left(&self) -> Left {
        Left {
            deferrals_taken: self.deferrals_taken,
            deferred_frees: self.deferred_frees.len(),
            returned: self.returned.len(),
        }
    }

    /// Of what was left when [`Memory::left`] said so: the frees to finish, which are the caller's then, and the regions that
    /// nobody has open any more, neither here nor elsewhere. `None` if some of it was taken since.
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

    /// Whether a free is left to the engine.
    pub fn has_deferred_frees(&self) -> bool {
        !self.deferred_frees.is_empty() || !self.returned.is_empty()
    }

    /// Granules that the frees left to the engine will give back: the application has them no more.
    pub fn deferred(&self) -> Granules {
        let in_use = |base| self.regions.get(&base).is_some_and(|region| region.allocations > 0);
        let deferred_frees =
            self.deferred_frees.iter().map(|allocation| allocation.region).filter(|base| !in_use(*base));
        // Several allocations may have been a slab's last.
        let going: BTreeSet<_> = deferred_frees.chain(self.returned.iter().copied()).collect();
        let going = going.iter().filter_map(|base| self.regions.get(base));
        going.filter(|region| region.lent == 0).map(Region::granules).sum()
    }

    /// Takes a region out of the map that the application never got to know.
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

    /// All of a region's chunks stay on the GPU from now on, as far as they do not already: so many granules.
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

    /// Takes out of the map all that goes with a context. What other processes have open stays, and is
    /// nobody's here.
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

    /// Puts a chunk where it now is. The chunk's region cannot have gone: while chunks move, regions
    /// are only deferred_frees.
    pub fn settle(&mut self, address: CUdeviceptr, backing: Backing) {
        self.change(address, |chunk| {
            chunk.backing = backing;
            // It was chosen for one fill; the next one chooses anew.
            chunk.spill &= chunk.is_missing();
        });
    }

    /// Takes a chunk away, marking it as moving. Also says what is known of its use, and whether it is to be mapped to
    /// host memory.
    fn take(&mut self, address: Option<CUdeviceptr>) -> Option<(ChunkMapping, Backing, InUse, bool)> {
        let address = address?;
        let (region, at) = self.chunk(address)?;
        let place = region.place(&region.chunks[at]);
        self.change(address, |chunk| {
            let backing = std::mem::replace(&mut chunk.backing, Backing::Moving);
            (place, backing, chunk.seen.unwrap_or(InUse::All), chunk.spill)
        })
    }

    /// Takes the next chunk that the GPU cannot use, marking it as moving. Also says whether it is to be
    /// mapped to host memory: such chunks come first, because only then does the rest fit.
    pub fn next_missing(&mut self) -> Option<(ChunkMapping, Backing, bool)> {
        let (place, backing, _, spill) = self.take(self.index.next_missing())?;
        Some((place, backing, spill))
    }

    /// Takes a chunk that was evicted, is to come home to the GPU and has no more than `room` granules, marking it as
    /// moving.
    pub fn next_evicted(&mut self, room: Granules) -> Option<(ChunkMapping, HostCopy)> {
        match self.take(self.index.next_evicted(room))? {
            (place, Backing::Evicted(copy), ..) => Some((place, copy)),
            _ => unreachable!("the index says that it is evicted"),
        }
    }

    /// Takes the next chunk that is in host memory for want of room, marking it as moving.
    pub fn next_overflow(&mut self) -> Option<(ChunkMapping, CUmemGenericAllocationHandle)> {
        match self.take(self.index.next_overflow())? {
            (place, Backing::Overflow(handle), ..) => Some((place, handle)),
            _ => unreachable!("the index says that it is in host memory"),
        }
    }

    /// Chunks on the GPU that nobody has looked at since the client last ran: address and bytes. Such as a
    /// look can take: [`crate::memory::CHUNK`] at most.
    pub fn unseen(&self) -> Vec<(CUdeviceptr, u64)> {
        let chunk = |address| self.chunk(address).map(|(region, at)| (address, region.chunks[at].size));
        self.index.unseen().filter_map(chunk).collect()
    }

    /// What a look at a chunk has found.
    pub fn saw(&mut self, address: CUdeviceptr, in_use: InUse) {
        self.change(address, |chunk| chunk.seen = Some(in_use));
    }

    /// The client runs: what was seen counts no more.
    pub fn unsee(&mut self) {
        for address in self.index.seen() {
            self.change(address, |chunk| chunk.seen = None);
        }
    }

    /// Takes the next chunk to be evicted that needs at most `most` bytes of host memory, marking it as moving, and says
    /// what of it is in use. Those that need no copy come first.
    pub fn next_resident(&mut self, most: u64) -> Option<(ChunkMapping, Backing, InUse)> {
        let most = Granules::try_from(most / GRANULE).unwrap_or(Granules::MAX);
        let (place, backing, in_use, _) = self.take(self.index.next_resident(most))?;
        Some((place, backing, in_use))
    }

    /// Granules that can be evicted with as much host memory as it takes.
    pub fn evictable(&self) -> Granules {
        self.index.evictable()
    }

    /// Granules that can be evicted with `bytes` of host memory.
    pub fn evictable_with(&self, bytes: u64) -> Granules {
        self.index.evictable_with(Granules::try_from(bytes / GRANULE).unwrap_or(Granules::MAX))
    }

    /// Bytes of host memory that are needed at least to evict anything.
    pub fn least_need(&self) -> u64 {
        self.index.least_need().map_or(0, |granules| u64::from(granules) * GRANULE)
    }

    /// There will be no room: whoever waits for it is told so.
    pub fn deny_reservations(&mut self) {
        for address in self.index.waiting_reservations() {
            self.settle(address, Backing::Denied);
        }
    }

    /// Whether there is a chunk that the GPU cannot use.
    pub fn is_missing(&self) -> bool {
        self.index.is_missing()
    }

    /// The regions of which something is missing that has never been anywhere.
    pub fn missing(&self) -> Vec<CUdeviceptr> {
        let new = |region: &&Region| {
            let mut out = region.chunks.iter().filter(|chunk| !chunk.backing.usable());
            !region.usable() && out.all(|chunk| matches!(chunk.backing, Backing::Absent))
        };
        self.regions.values().filter(new).map(|region| region.base).collect()
    }

    /// Granules that are mapped to host memory for want of room.
    pub fn overflow(&self) -> Granules {
        self.index.overflowed()
    }

    /// Chooses what is to be filled in host memory: `shortage` granules of those that are missing. Says how many
    /// it found.
    ///
    /// They are spread evenly, so that a kernel that walks over them waits for the link here and there, and goes
    /// on at full speed elsewhere meanwhile: 72 MiB in 9 GiB cost 1.1 ms that way, 1.4 ms in one piece
    /// (tests/gpu/facts.cu, H200). And they are of the youngest memory, [`SPREAD`] granules for each: what a
    /// program allocates last is mostly what it writes its results to, once each, and what it allocates first,
    /// parameters and inputs, it reads again and again.
    ///
    /// What must be in one piece goes there as a whole, and only if nothing else is left: or the fill would wait for
    /// room that cannot be.
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

    /// Makes a chunk of the granule at an address, which is to be filled in host memory.
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
