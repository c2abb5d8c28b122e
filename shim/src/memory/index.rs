//! The chunks by state, so that the next one to move is found without walking over all of them.
//!
//! Every change of a chunk goes through [`crate::memory::map::Memory::change`], which updates the chunk's entries in the
//! index. Finding the next chunk takes time logarithmic in the number of chunks, and counting those of a state constant time.

use crate::cuda::abi::CUdeviceptr;
use crate::memory::CHUNK;
use crate::memory::region::{Backing, Chunk, InUse};
use nvshare::units::Granules;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

/// A chunk's position in the order of fills, by the base of its region and its own address. Regions with higher bases come
/// first, so reservations come before all others: their addresses are the highest, and they cannot lie in host memory. Within a region
/// chunks come from the beginning.
type FillOrder = (Reverse<CUdeviceptr>, CUdeviceptr);

/// A chunk that can be filled. Those that are to be filled in host memory come first, because the others fit on the GPU only without
/// them; those that another replica hands over come last.
type Missing = (Reverse<bool>, bool, FillOrder);

/// The index.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Index {
    /// Chunks that are not on the GPU and can be filled.
    missing: BTreeSet<Missing>,
    /// Of `missing`, the chunks with a copy in host memory that are to be filled from it on the GPU, by size.
    evicted: BTreeSet<(Granules, FillOrder)>,
    /// Chunks that are mapped to host memory and may move to the GPU.
    overflow: BTreeSet<FillOrder>,
    /// Granules that are mapped to host memory.
    overflowed: u64,
    /// How many chunks the GPU cannot use, including those that are being moved.
    unusable: usize,
    /// Chunks that can be evicted, by what it takes; the value is the chunk's granules.
    by_need: BTreeMap<Need, Granules>,
    /// The sum of the granules in `by_need`.
    evictable: u64,
    /// Of `by_need`, the chunks that need host memory.
    resident: BTreeSet<CUdeviceptr>,
    /// Chunks on the GPU that were not scanned since the client last ran, and that a scan can handle.
    unseen: BTreeSet<CUdeviceptr>,
    /// Chunks that were scanned since.
    seen: BTreeSet<CUdeviceptr>,
    /// Chunks on the GPU of which a copy was kept.
    kept: BTreeSet<CUdeviceptr>,
    /// Reservations that wait for the GPU.
    reservations: BTreeSet<CUdeviceptr>,
}

/// What it takes to evict a chunk: granules of host memory beside what it has there, granules to be copied; and its address.
type Need = (Granules, Granules, CUdeviceptr);

fn need(chunk: &Chunk) -> Need {
    let (host, copies) = match (&chunk.backing, chunk.changed(), chunk.in_use()) {
        (Backing::Booked, ..) => (0, 0),
        (_, Some(changed), _) => (0, changed.count_ones()),
        (_, None, InUse::Granules(bits)) => (bits.count_ones(), bits.count_ones()),
        (_, None, InUse::All) => (chunk.granules(), chunk.granules()),
    };
    (host, copies, chunk.address)
}

/// A chunk's entries in the index: for each set the key, if the chunk is in it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Keys {
    missing: Option<Missing>,
    evicted: Option<(Granules, FillOrder)>,
    overflow: Option<FillOrder>,
    overflowed: Granules,
    unusable: bool,
    by_need: Option<(Need, Granules)>,
    resident: Option<CUdeviceptr>,
    unseen: Option<CUdeviceptr>,
    seen: Option<CUdeviceptr>,
    kept: Option<CUdeviceptr>,
    reservation: Option<CUdeviceptr>,
}

impl Keys {
    /// The entries of a chunk of the region at `base`.
    pub fn of(base: CUdeviceptr, is_reservation: bool, chunk: &Chunk) -> Self {
        let (address, granules) = (chunk.address, chunk.granules());
        let place = (Reverse(base), address);
        let (backing, need) = (&chunk.backing, need(chunk));
        let is_memory = matches!(backing, Backing::Device(_));
        let overflowed = matches!(backing, Backing::Overflow(_));
        let evictable = chunk.evictable();
        Self {
            missing: chunk.is_missing().then_some((Reverse(chunk.spill), chunk.promised, place)),
            evicted: (matches!(backing, Backing::Evicted(_)) && !chunk.spill && !chunk.promised)
                .then_some((granules, place)),
            overflow: (overflowed && !chunk.pinned).then_some(place),
            overflowed: if overflowed { granules } else { 0 },
            unusable: !backing.usable(),
            by_need: evictable.then_some((need, granules)),
            resident: (evictable && need.0 > 0).then_some(address),
            unseen: (evictable && is_memory && chunk.seen.is_none() && chunk.size <= CHUNK)
                .then_some(address),
            seen: chunk.seen.as_ref().map(|_| address),
            kept: chunk.kept.as_ref().map(|_| address),
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
    /// Adds a chunk of the region at `base`.
    pub fn insert(&mut self, base: CUdeviceptr, is_reservation: bool, chunk: &Chunk) {
        self.change(Keys::default(), Keys::of(base, is_reservation, chunk));
    }

    /// Removes a chunk, whose state must be that of the last update.
    pub fn remove(&mut self, base: CUdeviceptr, is_reservation: bool, chunk: &Chunk) {
        self.change(Keys::of(base, is_reservation, chunk), Keys::default());
    }

    /// Updates the entries of a chunk. Only those that differ are touched.
    pub fn change(&mut self, before: Keys, after: Keys) {
        change(&mut self.missing, before.missing, after.missing);
        change(&mut self.evicted, before.evicted, after.evicted);
        change(&mut self.overflow, before.overflow, after.overflow);
        change(&mut self.resident, before.resident, after.resident);
        change(&mut self.unseen, before.unseen, after.unseen);
        change(&mut self.seen, before.seen, after.seen);
        change(&mut self.kept, before.kept, after.kept);
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

    /// The next chunk to fill.
    pub fn next_missing(&self) -> Option<CUdeviceptr> {
        self.missing.first().map(|(.., (_, address))| *address)
    }

    /// The chunks that another replica hands over.
    pub fn promised(&self) -> impl Iterator<Item = CUdeviceptr> {
        self.missing.iter().filter(|(_, promised, _)| *promised).map(|(.., (_, address))| *address)
    }

    /// The chunks with a copy in host memory that are to be filled from it on the GPU.
    pub fn evicted(&self) -> impl Iterator<Item = CUdeviceptr> {
        self.evicted.iter().map(|(_, (_, address))| *address)
    }

    /// The chunks that can be evicted, those first that need least host memory and are to be copied least.
    pub fn by_need(&self) -> impl Iterator<Item = CUdeviceptr> {
        self.by_need.keys().map(|(.., address)| *address)
    }

    /// All chunks that can be filled.
    pub fn missing(&self) -> impl Iterator<Item = CUdeviceptr> {
        self.missing.iter().map(|(.., (_, address))| *address)
    }

    /// The chunks that are to be filled in host memory.
    pub fn spilled(&self) -> impl Iterator<Item = CUdeviceptr> {
        self.missing.iter().take_while(|(Reverse(spill), ..)| *spill).map(|(.., (_, address))| *address)
    }

    /// The largest chunk with a copy in host memory that has at most `room` granules.
    pub fn next_evicted(&self, room: Granules) -> Option<CUdeviceptr> {
        let (granules, _) = *self.evicted.iter().next()?;
        if granules > room {
            return None;
        }
        let after = (room.saturating_add(1), (Reverse(CUdeviceptr::MAX), 0));
        self.evicted.range(..after).next_back().map(|(_, (_, address))| *address)
    }

    /// The next chunk that is mapped to host memory and may move to the GPU.
    pub fn next_overflow(&self) -> Option<CUdeviceptr> {
        self.overflow.first().map(|(_, address)| *address)
    }

    /// Granules that are mapped to host memory.
    pub fn overflowed(&self) -> Granules {
        Granules::try_from(self.overflowed).unwrap_or(Granules::MAX)
    }

    /// Whether there is a chunk that the GPU cannot use.
    pub fn is_missing(&self) -> bool {
        self.unusable > 0
    }

    /// The next chunk to evict that needs at most `most` granules of host memory. Chunks that need none come first, and of these
    /// the ones that need no copy; then those with the highest addresses, because large allocations tend to lie there, and large
    /// chunks move fastest.
    pub fn next_resident(&self, most: Granules) -> Option<CUdeviceptr> {
        let ((need, _, smallest), _) = self.by_need.first_key_value()?;
        if *need == 0 {
            return Some(*smallest);
        }
        if self.by_need.last_key_value().is_some_and(|((largest, ..), _)| *largest <= most) {
            return self.resident.last().copied();
        }
        let within = (most, Granules::MAX, CUdeviceptr::MAX);
        self.by_need.range(..=within).next_back().map(|((.., address), _)| *address)
    }

    /// The chunks of which a copy was kept.
    pub fn kept(&self) -> impl Iterator<Item = CUdeviceptr> {
        self.kept.iter().copied()
    }

    /// Granules that can be evicted if there is enough host memory.
    pub fn evictable(&self) -> Granules {
        Granules::try_from(self.evictable).unwrap_or(Granules::MAX)
    }

    /// Granules that can be evicted with `host` granules of host memory, taking the chunks that need least. Chunks are only
    /// evicted whole.
    pub fn evictable_with(&self, host: Granules) -> Granules {
        let mut left = host;
        let fits = self.by_need.iter().take_while(|((need, ..), _)| {
            let fits = *need <= left;
            left = left.saturating_sub(*need);
            fits
        });
        fits.map(|(_, granules)| granules).sum()
    }

    /// The least granules of host memory with which a chunk can be evicted.
    pub fn least_need(&self) -> Option<Granules> {
        self.by_need.first_key_value().map(|((need, ..), _)| *need)
    }

    /// The chunks on the GPU that were not scanned.
    pub fn unseen(&self) -> impl Iterator<Item = CUdeviceptr> {
        self.unseen.iter().copied()
    }

    /// The chunks that were scanned.
    pub fn seen(&self) -> Vec<CUdeviceptr> {
        self.seen.iter().copied().collect()
    }

    /// Reservations that wait for the GPU.
    pub fn waiting_reservations(&self) -> Vec<CUdeviceptr> {
        self.reservations.iter().copied().collect()
    }
}
