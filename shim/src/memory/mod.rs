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

mod gaps;
mod region;
#[cfg(test)]
mod tests;

pub use region::{Backing, CHUNK, Chunk, HostCopy, InUse, Kind, Object, Place, Region, View, WHOLE};

use crate::abi::{CUcontext, CUdeviceptr, CUmemAllocationProp, CUmemGenericAllocationHandle};
use gaps::Gaps;
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
const ROOM: CUdeviceptr = 1 << 62;

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
    /// Allocations whose memory synchronous operations wait for, by base; gone with the allocation.
    synchronous: BTreeSet<CUdeviceptr>,
    /// Allocations made so far.
    made: u64,
    /// Rooms made so far.
    rooms: u64,
    /// Regions made so far.
    born: u64,
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
        self.insert(Region::new(base, size, context, Kind::Whole));
        self.add_allocation(base, requested, base);
    }

    fn add_allocation(&mut self, base: CUdeviceptr, size: u64, region: CUdeviceptr) {
        self.allocations.insert(base, Allocation { base, size, region, number: self.made });
        self.made += 1;
    }

    fn insert(&mut self, region: Region) {
        self.regions.insert(region.base, Region { born: self.born, ..region });
        self.born += 1;
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
    pub fn add_room(&mut self, size: u64, context: CUcontext) -> CUdeviceptr {
        self.rooms += 1;
        let base = ROOM + (self.rooms << 44);
        self.insert(Region::new(base, size, context, Kind::Room));
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
        self.add_allocation(base, requested, region);
        Some(base)
    }

    /// The allocation that `address` lies in.
    pub fn containing(&self, address: CUdeviceptr) -> Option<Allocation> {
        let (_, allocation) = self.allocations.range(..=address).next_back()?;
        (address - allocation.base < allocation.size).then_some(*allocation)
    }

    /// Whether an address is among those reserved for a region, in use or not.
    pub fn covers(&self, address: CUdeviceptr) -> bool {
        self.overlaps(address, 1)
    }

    /// Whether any of a range of addresses is among those reserved for a region.
    pub fn overlaps(&self, address: CUdeviceptr, size: u64) -> bool {
        let last = self.regions.range(..address.saturating_add(size)).next_back();
        last.is_some_and(|(_, region)| address < region.base + region.size)
    }

    /// Has synchronous operations on an allocation's memory wait, or no longer.
    pub fn set_synchronous(&mut self, base: CUdeviceptr, on: bool) {
        if on && self.allocations.contains_key(&base) {
            self.synchronous.insert(base);
        } else {
            self.synchronous.remove(&base);
        }
    }

    /// Whether synchronous operations on an allocation's memory wait.
    pub fn is_synchronous(&self, base: CUdeviceptr) -> bool {
        self.synchronous.contains(&base)
    }

    /// Strikes an allocation off the list of those that can be freed or looked up. Its room in a slab
    /// is not free before [`Memory::finish_free`]: the GPU may still use it.
    pub fn begin_free(&mut self, base: CUdeviceptr) -> Option<Allocation> {
        self.exports.remove(&base);
        self.synchronous.remove(&base);
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

    /// Granules that the frees left to the engine will give back: the application has them no more.
    pub fn put_off(&self) -> Granules {
        let in_use = |base| self.allocations.values().any(|allocation| allocation.region == base);
        let doomed = self.doomed.iter().map(|allocation| allocation.region).filter(|base| !in_use(*base));
        // Several allocations may have been a slab's last.
        let going: BTreeSet<_> = doomed.chain(self.returned.iter().copied()).collect();
        let going = going.iter().filter_map(|base| self.regions.get(base));
        going.filter(|region| region.lent == 0).map(Region::granules).sum()
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
        self.synchronous.clear();
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
        self.synchronous.retain(|base| self.allocations.contains_key(base));
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

    /// Takes a chunk that was evicted, is to come home to the GPU and has no more than `room` granules, marking it as
    /// moving.
    pub fn next_evicted(&mut self, room: Granules) -> Option<(Place, HostCopy)> {
        let fits = |chunk: &Chunk| {
            matches!(chunk.backing, Backing::Evicted(_)) && chunk.granules() <= room && !chunk.spill
        };
        match self.take(fits)? {
            (place, Backing::Evicted(copy)) => Some((place, copy)),
            _ => unreachable!("just matched"),
        }
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

    /// Chooses what is to be filled in host memory: `shortage` granules of those that are missing. Says how many
    /// it found.
    ///
    /// They are spread evenly, so that a kernel that walks over them waits for the link here and there, and goes
    /// on at full speed elsewhere meanwhile: 72 MiB in 9 GiB cost 1.1 ms that way, 1.4 ms in one piece
    /// (tests/gpu/facts.cu, H200). And they are of the youngest memory, [`SPREAD`] granules for each: what a
    /// program allocates last is mostly what it writes its results to, once each, and what it allocates first,
    /// parameters and inputs, it reads again and again.
    pub fn spill(&mut self, shortage: Granules) -> Granules {
        let may = |chunk: &Chunk| matches!(chunk.backing, Backing::Absent | Backing::Evicted(_));
        let mut missing = Vec::new();
        for region in self.regions.values_mut().filter(|region| region.may_spill()) {
            for chunk in &mut region.chunks {
                chunk.spill = false;
                if may(chunk) {
                    let granules = 0..chunk.size / GRANULE;
                    let address = |granule| chunk.address + granule * GRANULE;
                    missing.extend(granules.map(|granule| (region.born, region.base, address(granule))));
                }
            }
        }
        missing.sort_unstable_by_key(|(born, _, address)| (Reverse(*born), *address));
        missing.truncate((shortage as usize).saturating_mul(SPREAD));
        let (all, wanted) = (missing.len(), (shortage as usize).min(missing.len()));
        for index in 0..wanted {
            // The middle of each of as many equal parts.
            let (_, base, address) = missing[(2 * index + 1) * all / (2 * wanted)];
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
