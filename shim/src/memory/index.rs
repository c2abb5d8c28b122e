//! The chunks by what can be done with them, so that nobody walks over all of them to find the next.
//!
//! Every change of a chunk goes through [`crate::memory::map::Memory::change`], which takes the chunk out of the index and
//! puts it back in as what it has become. Finding the next chunk, and asking how many there are of a kind, costs the same
//! however many there are.

use crate::cuda::abi::CUdeviceptr;
use crate::memory::CHUNK;
use crate::memory::region::{Backing, Chunk, InUse};
use nvshare::units::Granules;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

/// A chunk in the order in which chunks come in: room first, which is only ever in the GPU's memory and whose addresses
/// are the highest; a region from its beginning.
type ChunkMapping = (Reverse<CUdeviceptr>, CUdeviceptr);

/// What the index knows.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Index {
    /// Those that the GPU cannot use and that can be brought in. First those that are to be mapped to host memory: only
    /// then does the rest fit.
    missing: BTreeSet<(Reverse<bool>, ChunkMapping)>,
    /// Of those, the ones with a copy in host memory that come home to the GPU, by size.
    evicted: BTreeSet<(Granules, ChunkMapping)>,
    /// Those that are mapped to host memory and may come home.
    overflow: BTreeSet<ChunkMapping>,
    /// Granules that are mapped to host memory.
    overflowed: u64,
    /// Those that the GPU cannot use, on their way or not.
    unusable: usize,
    /// Those that can be evicted, by what a copy of them takes; and how many granules each has.
    by_need: BTreeMap<(Granules, CUdeviceptr), Granules>,
    /// Granules of those.
    evictable: u64,
    /// Of those, the ones that need a copy.
    resident: BTreeSet<CUdeviceptr>,
    /// Those on the GPU that nobody has looked at since the client last ran, and that a look can take.
    unseen: BTreeSet<CUdeviceptr>,
    /// Those that somebody has looked at since.
    seen: BTreeSet<CUdeviceptr>,
    /// Room that waits for the GPU.
    reservations: BTreeSet<CUdeviceptr>,
}

/// Granules of host memory that an eviction of a chunk takes.
fn need(chunk: &Chunk) -> Granules {
    match (&chunk.backing, chunk.seen) {
        (Backing::Booked, _) => 0,
        (_, Some(InUse::Granules(bits))) => bits.count_ones(),
        _ => chunk.granules(),
    }
}

/// Where the index has a chunk. A chunk that is in the map is unusable, missing, evictable, ... or none of that.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Keys {
    missing: Option<(Reverse<bool>, ChunkMapping)>,
    evicted: Option<(Granules, ChunkMapping)>,
    overflow: Option<ChunkMapping>,
    overflowed: Granules,
    unusable: bool,
    by_need: Option<((Granules, CUdeviceptr), Granules)>,
    resident: Option<CUdeviceptr>,
    unseen: Option<CUdeviceptr>,
    seen: Option<CUdeviceptr>,
    reservation: Option<CUdeviceptr>,
}

impl Keys {
    /// Of a chunk of the region at `base`.
    pub fn of(base: CUdeviceptr, is_reservation: bool, chunk: &Chunk) -> Self {
        let (address, granules) = (chunk.address, chunk.granules());
        let place = (Reverse(base), address);
        let (backing, need) = (&chunk.backing, need(chunk));
        let is_memory = matches!(backing, Backing::Device(_));
        let overflowed = matches!(backing, Backing::Overflow(_));
        let evictable = chunk.evictable();
        Self {
            missing: chunk.is_missing().then_some((Reverse(chunk.spill), place)),
            evicted: (matches!(backing, Backing::Evicted(_)) && !chunk.spill).then_some((granules, place)),
            overflow: (overflowed && !chunk.pinned).then_some(place),
            overflowed: if overflowed { granules } else { 0 },
            unusable: !backing.usable(),
            by_need: evictable.then_some(((need, address), granules)),
            resident: (evictable && need > 0).then_some(address),
            unseen: (evictable && is_memory && chunk.seen.is_none() && chunk.size <= CHUNK)
                .then_some(address),
            seen: chunk.seen.map(|_| address),
            reservation: (is_reservation && matches!(backing, Backing::Absent)).then_some(address),
        }
    }
}

fn change<T: Ord>(set: &mut BTreeSet<T>, before: Option<T>, after: Option<T>) {
    if before == after {
        return;
    }
    if let Some(key) = before {
        set.remove(&key);
    }
    set.extend(after);
}

impl Index {
    /// A chunk of the region at `base` is there from now on as what it is.
    pub fn insert(&mut self, base: CUdeviceptr, is_reservation: bool, chunk: &Chunk) {
        self.change(Keys::default(), Keys::of(base, is_reservation, chunk));
    }

    /// A chunk, as it was when it was inserted, is there no more.
    pub fn remove(&mut self, base: CUdeviceptr, is_reservation: bool, chunk: &Chunk) {
        self.change(Keys::of(base, is_reservation, chunk), Keys::default());
    }

    /// What a chunk is has changed. Only what differs is touched.
    pub fn change(&mut self, before: Keys, after: Keys) {
        change(&mut self.missing, before.missing, after.missing);
        change(&mut self.evicted, before.evicted, after.evicted);
        change(&mut self.overflow, before.overflow, after.overflow);
        change(&mut self.resident, before.resident, after.resident);
        change(&mut self.unseen, before.unseen, after.unseen);
        change(&mut self.seen, before.seen, after.seen);
        change(&mut self.reservations, before.reservation, after.reservation);
        self.overflowed = self.overflowed + u64::from(after.overflowed) - u64::from(before.overflowed);
        self.unusable = self.unusable + usize::from(after.unusable) - usize::from(before.unusable);
        if before.by_need != after.by_need {
            if let Some((key, granules)) = before.by_need {
                self.by_need.remove(&key);
                self.evictable -= u64::from(granules);
            }
            if let Some((key, granules)) = after.by_need {
                self.by_need.insert(key, granules);
                self.evictable += u64::from(granules);
            }
        }
    }

    /// The next one to bring in.
    pub fn next_missing(&self) -> Option<CUdeviceptr> {
        self.missing.first().map(|(_, (_, address))| *address)
    }

    /// All that can be brought in.
    pub fn missing(&self) -> impl Iterator<Item = CUdeviceptr> {
        self.missing.iter().map(|(_, (_, address))| *address)
    }

    /// Those that are to be mapped to host memory when they are brought in.
    pub fn spilled(&self) -> impl Iterator<Item = CUdeviceptr> {
        self.missing.iter().take_while(|(Reverse(spill), _)| *spill).map(|(_, (_, address))| *address)
    }

    /// The largest with a copy in host memory that has no more than `room` granules.
    pub fn next_evicted(&self, room: Granules) -> Option<CUdeviceptr> {
        let (granules, _) = *self.evicted.iter().next()?;
        if granules > room {
            return None;
        }
        let after = (room.saturating_add(1), (Reverse(CUdeviceptr::MAX), 0));
        self.evicted.range(..after).next_back().map(|(_, (_, address))| *address)
    }

    /// The next that is mapped to host memory and may come home.
    pub fn next_overflow(&self) -> Option<CUdeviceptr> {
        self.overflow.first().map(|(_, address)| *address)
    }

    /// Granules that are mapped to host memory.
    pub fn overflowed(&self) -> Granules {
        Granules::try_from(self.overflowed).unwrap_or(Granules::MAX)
    }

    /// Whether there is one that the GPU cannot use.
    pub fn is_missing(&self) -> bool {
        self.unusable > 0
    }

    /// The next one to evict that takes at most `most` granules of host memory. Those that need no copy come first; then
    /// from the end, because large allocations tend to lie there, and large chunks move best.
    pub fn next_resident(&self, most: Granules) -> Option<CUdeviceptr> {
        let ((need, smallest), _) = self.by_need.first_key_value()?;
        if *need == 0 {
            return Some(*smallest);
        }
        if self.by_need.last_key_value().is_some_and(|((largest, _), _)| *largest <= most) {
            return self.resident.last().copied();
        }
        self.by_need.range(..=(most, CUdeviceptr::MAX)).next_back().map(|((_, address), _)| *address)
    }

    /// Granules that can be evicted with as much host memory as it takes.
    pub fn evictable(&self) -> Granules {
        Granules::try_from(self.evictable).unwrap_or(Granules::MAX)
    }

    /// Granules that can be evicted with so many granules of host memory: of the smallest chunks. A chunk goes whole.
    pub fn evictable_with(&self, host: Granules) -> Granules {
        let mut left = host;
        let fits = self.by_need.iter().take_while(|((need, _), _)| {
            let fits = *need <= left;
            left = left.saturating_sub(*need);
            fits
        });
        fits.map(|(_, granules)| granules).sum()
    }

    /// Granules of host memory that some chunk takes at least when it is evicted.
    pub fn least_need(&self) -> Option<Granules> {
        self.by_need.first_key_value().map(|((need, _), _)| *need)
    }

    /// Those on the GPU that nobody has looked at.
    pub fn unseen(&self) -> impl Iterator<Item = CUdeviceptr> {
        self.unseen.iter().copied()
    }

    /// Those that somebody has looked at.
    pub fn seen(&self) -> Vec<CUdeviceptr> {
        self.seen.iter().copied().collect()
    }

    /// Room that waits for the GPU.
    pub fn waiting_reservations(&self) -> Vec<CUdeviceptr> {
        self.reservations.iter().copied().collect()
    }
}
