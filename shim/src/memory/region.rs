//! Regions, the chunks that they consist of, and where a chunk's bytes are.

use crate::cuda::abi::{
    CUcontext, CUdeviceptr, CUmemAccessDesc, CUmemAllocationProp, CUmemGenericAllocationHandle,
};
use crate::memory::CHUNK;
use crate::memory::fingerprint::Fingerprints;
use crate::memory::gaps::Gaps;
use crate::memory::host::HostMemory;
use crate::memory::scan::SLOTS;
use crate::replicas::Digest;
use nvshare::units::{GRANULE, Granules};
use std::sync::Arc;

/// Objects of up to this many bytes that the application may export to another process are one chunk, because an export
/// has one handle. Larger ones move in chunks like any other memory and cannot be exported: XLA asks for most
/// of the GPU in one exportable object.
pub const WHOLE: u64 = 512 << 20;

/// Which granules of a chunk hold anything but zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InUse {
    /// All of them, or not known.
    All,
    /// One bit per granule, the lowest for the first.
    Granules(u32),
}

impl InUse {
    /// Bytes in use of a chunk of `size` bytes.
    pub fn bytes(self, size: u64) -> u64 {
        match self {
            Self::All => size,
            Self::Granules(bits) => u64::from(bits.count_ones()) * GRANULE,
        }
    }

    /// The runs of granules that are in use and also in `some`: offset in the chunk, offset in the copy, and length of each, in bytes. The
    /// copy has all granules in use.
    pub fn runs_of(self, size: u64, some: Self) -> Vec<(u64, u64, u64)> {
        if (self, some) == (Self::All, Self::All) {
            return vec![(0, 0, size)];
        }
        let mut runs: Vec<(u64, u64, u64)> = Vec::new();
        let mut copied = 0;
        for granule in (0..size / GRANULE).filter(|granule| self.has(*granule)) {
            let offset = granule * GRANULE;
            if some.has(granule) {
                match runs.last_mut() {
                    Some((begin, _, length)) if *begin + *length == offset => *length += GRANULE,
                    _ => runs.push((offset, copied, GRANULE)),
                }
            }
            copied += GRANULE;
        }
        runs
    }

    /// Whether a granule is one of them. `Granules` knows the first 32 only.
    pub(super) fn has(self, granule: u64) -> bool {
        match self {
            Self::All => true,
            Self::Granules(bits) => granule < 32 && bits >> granule & 1 == 1,
        }
    }
}

/// What scans have found of a chunk since its client last ran.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Its granules in use.
    pub in_use: InUse,
    /// Their fingerprints, if these were asked for.
    pub fingerprints: Option<Arc<Fingerprints>>,
}

/// A copy of a chunk in host memory: its granules in use, one after the other.
#[derive(Debug)]
pub struct HostCopy {
    /// The bytes.
    pub memory: HostMemory,
    /// Which granules they are.
    pub in_use: InUse,
    /// The fingerprints that they had when they were copied, if these were asked for.
    pub fingerprints: Option<Arc<Fingerprints>>,
}

impl Seen {
    /// What stands for a chunk of `size` bytes in which scans have found this, among replicas. `None` without the fingerprints of all
    /// of its granules in use, or if none are.
    pub fn digest(&self, size: u64) -> Option<Digest> {
        digest(size, self.in_use, self.fingerprints.as_deref()?)
    }
}

fn digest(size: u64, in_use: InUse, fingerprints: &Fingerprints) -> Option<Digest> {
    let granules =
        u32::try_from(size / GRANULE).ok().filter(|granules| (1..=SLOTS as u32).contains(granules))?;
    let places = (0..granules).filter(|granule| in_use.has(u64::from(*granule)));
    let sums = |place: u32| fingerprints[place as usize].sums();
    let bits = places.clone().try_fold(0, |bits, place| sums(place).map(|_| bits | 1 << place))?;
    (bits != 0).then(|| Digest::of(size, bits, places.filter_map(sums)))
}

impl HostCopy {
    /// What stands for the chunk of `size` bytes that it is a copy of ([`Seen::digest`]).
    pub fn digest(&self, size: u64) -> Option<Digest> {
        digest(size, self.in_use, self.fingerprints.as_deref()?)
    }

    /// The pieces to copy for a chunk of `size` bytes: offset in the chunk, host address, and length of each, in bytes.
    pub fn pieces(&self, size: u64) -> impl Iterator<Item = (u64, *mut u8, u64)> {
        self.pieces_of(size, InUse::All)
    }

    /// The same for those of its granules that are also in `some`.
    pub fn pieces_of(&self, size: u64, some: InUse) -> impl Iterator<Item = (u64, *mut u8, u64)> {
        self.in_use.runs_of(size, some).into_iter().flat_map(|(at, from, length)| {
            let mut done = 0;
            self.memory.pieces(from, length).map(move |(address, length)| {
                done += length;
                (at + done - length, address, length)
            })
        })
    }
}

impl HostCopy {
    /// Whether both hold the same bytes in `some` of their granules in use, which are the same granules in both. `size`: of the chunk,
    /// in bytes.
    ///
    /// # Safety
    /// Nothing writes to either meanwhile.
    pub unsafe fn holds_the_same(&self, other: &Self, size: u64, some: InUse) -> bool {
        // SAFETY: a piece of the copy's own memory, and as the caller has promised.
        let piece =
            |(_, at, length): (u64, *mut u8, u64)| unsafe { std::slice::from_raw_parts(at, length as usize) };
        let bytes = |copy: &Self| copy.pieces_of(size, some).map(piece).collect();
        let (ours, theirs): (Vec<&[u8]>, Vec<&[u8]>) = (bytes(self), bytes(other));
        same_bytes(ours, theirs)
    }

    /// Of a chunk with so many granules in which scans have found this, the granules in use that differ from the copy, one bit for
    /// each. `None` if that is not known, or if other granules are in use than in the copy, which then has no place for them.
    pub fn changed(&self, seen: &Seen, granules: Granules) -> Option<u32> {
        let (then, now) = (self.fingerprints.as_deref()?, seen.fingerprints.as_deref()?);
        let differs = |granule: &u64| {
            let at = *granule as usize;
            self.in_use.has(*granule) && !then[at].is_still(now[at])
        };
        (self.in_use == seen.in_use)
            .then(|| (0..u64::from(granules)).filter(differs).fold(0, |bits, granule| bits | 1 << granule))
    }

    /// Cuts it in two where granule number `first` of the chunk begins. `size` is what the chunk has, in bytes. A part with no
    /// granules in use is `None`.
    fn cut(self, first: Granules, size: u64) -> [Option<Self>; 2] {
        let (before, after) = match self.in_use {
            InUse::All => (InUse::All, InUse::All),
            InUse::Granules(bits) => {
                (InUse::Granules(bits & ((1u32 << first) - 1)), InUse::Granules(bits >> first))
            }
        };
        let of_the_rest = self.fingerprints.as_deref().map(|all| {
            let mut rest = *all;
            rest.rotate_left(first as usize);
            Arc::new(rest)
        });
        let copy = |memory, in_use, fingerprints| Some(Self { memory, in_use, fingerprints });
        let offset = u64::from(first) * GRANULE;
        let length = before.bytes(offset);
        match (length, after.bytes(size - offset)) {
            (0, 0) => [None, None],
            (0, _) => [None, copy(self.memory, after, of_the_rest)],
            (_, 0) => [copy(self.memory, before, self.fingerprints), None],
            (length, _) => {
                let (head, tail) = self.memory.split_at(length);
                [copy(head, before, self.fingerprints), copy(tail, after, of_the_rest)]
            }
        }
    }
}

/// Whether two sequences of pieces hold the same bytes, wherever each piece begins and ends.
fn same_bytes(ours: Vec<&[u8]>, theirs: Vec<&[u8]>) -> bool {
    let (mut ours, mut theirs) = (ours.into_iter(), theirs.into_iter());
    let (mut one, mut other): (&[u8], &[u8]) = (&[], &[]);
    loop {
        while one.is_empty() {
            match ours.next() {
                Some(piece) => one = piece,
                None => return other.is_empty() && theirs.all(<[u8]>::is_empty),
            }
        }
        while other.is_empty() {
            match theirs.next() {
                Some(piece) => other = piece,
                None => return false,
            }
        }
        let length = one.len().min(other.len());
        if one[..length] != other[..length] {
            return false;
        }
        (one, other) = (&one[length..], &other[length..]);
    }
}

/// The most evictions that a chunk which changes goes without fingerprints, as a power of two.
const LONGEST_REST: u32 = 6;

/// What part of a chunk must stay the same for fingerprints to be worth while: to copy a granule takes about a hundred times as
/// long as to look at it, and the copy takes host memory while it is kept.
const WORTH_WHILE: u32 = 8;

/// Whether it is worth while to take a chunk's fingerprints when it is evicted, and to keep its copy when it is filled: what
/// changes each time, as in training, is soon left alone, and tried again after 2, 4, ... 64 evictions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Constancy {
    /// Evictions before which it had changed, one after the other.
    failures: u32,
    /// Evictions that it goes without fingerprints.
    rests: u32,
}

impl Constancy {
    /// Whether its next eviction is one with fingerprints.
    pub fn is_tried(self) -> bool {
        self.rests == 0
    }

    /// It is evicted without fingerprints.
    pub(super) fn rest(&mut self) {
        self.rests = self.rests.saturating_sub(1);
    }

    /// It is evicted, and of its `in_use` granules in use, so many hold the same as when it was evicted before.
    pub(super) fn compared(&mut self, unchanged: u32, in_use: u32) {
        if unchanged.saturating_mul(WORTH_WHILE) >= in_use {
            self.failures = 0;
        } else {
            self.failures = (self.failures + 1).min(LONGEST_REST);
            self.rests = 1 << self.failures;
        }
    }
}

/// Where a chunk's bytes are.
#[derive(Debug)]
pub enum Backing {
    /// It has none: it was never used, or is all zero. Filling it copies nothing.
    Absent,
    /// On the GPU, counted as resident.
    Device(CUmemGenericAllocationHandle),
    /// In host memory, and nothing is mapped.
    Evicted(HostCopy),
    /// In host memory that is mapped at the chunk's address: the GPU can use it, slowly.
    Overflow(CUmemGenericAllocationHandle),
    /// A chunk of a reservation: counted as resident, and nothing is mapped.
    Booked,
    /// A chunk of a reservation for which no room can be made.
    Denied,
    /// The swap engine is moving it from one of these states to another.
    Moving,
}

impl Backing {
    /// Whether the GPU can use the chunk, or never needs to.
    pub fn usable(&self) -> bool {
        matches!(self, Self::Device(_) | Self::Overflow(_) | Self::Booked | Self::Denied)
    }
}

/// The unit in which memory moves. In the map, it is changed by [`crate::memory::map::Memory::change`] alone.
#[derive(Debug)]
pub struct Chunk {
    /// Where it is mapped.
    pub address: CUdeviceptr,
    /// Bytes, a whole number of granules.
    pub size: u64,
    /// Where its bytes are.
    pub backing: Backing,
    /// It stays on the GPU, because another process maps it too.
    pub pinned: bool,
    /// It is to be filled in host memory, because it does not fit on the GPU.
    pub(super) spill: bool,
    /// Another replica hands it over: it is filled from host memory after all others, if at all.
    pub(super) promised: bool,
    /// The result of a scan since the client last ran.
    pub(super) seen: Option<Seen>,
    /// While it is on the GPU: what it held when it was last evicted, in host memory.
    pub kept: Option<HostCopy>,
    /// Whether it is worth while to keep that.
    pub(super) constancy: Constancy,
}

impl Chunk {
    fn new(address: CUdeviceptr, size: u64) -> Self {
        Self {
            address,
            size,
            backing: Backing::Absent,
            pinned: false,
            spill: false,
            promised: false,
            seen: None,
            kept: None,
            constancy: Constancy::default(),
        }
    }

    /// Its size in granules.
    pub fn granules(&self) -> Granules {
        (self.size / GRANULE) as Granules
    }

    /// The granules in use, as far as it is known.
    pub(super) fn in_use(&self) -> InUse {
        self.seen.as_ref().map_or(InUse::All, |seen| seen.in_use)
    }

    /// The granules in use that differ from the copy that was kept ([`HostCopy::changed`]); `None` if there is none.
    pub(super) fn changed(&self) -> Option<u32> {
        self.kept.as_ref()?.changed(self.seen.as_ref()?, self.granules())
    }

    /// What stands for its contents among replicas, while it is in host memory and is to come to the GPU.
    pub(super) fn digest_of_copy(&self) -> Option<Digest> {
        match &self.backing {
            Backing::Evicted(copy) if !self.spill => copy.digest(self.size),
            _ => None,
        }
    }

    pub(super) fn evictable(&self) -> bool {
        matches!(self.backing, Backing::Device(_) | Backing::Booked) && !self.pinned
    }

    /// Whether it is not on the GPU and can be filled.
    pub(super) fn is_missing(&self) -> bool {
        matches!(self.backing, Backing::Absent | Backing::Evicted(_))
    }
}

/// Where the application has mapped an object.
#[derive(Debug, Clone)]
pub struct View {
    /// The address.
    pub address: CUdeviceptr,
    /// Bytes, from the object's beginning.
    pub size: u64,
    /// Which GPUs may access it there.
    pub access: Vec<CUmemAccessDesc>,
}

/// Physical memory that the application created by cuMemCreate.
#[derive(Debug)]
pub struct Object {
    /// The properties that it asked for.
    pub prop: CUmemAllocationProp,
    /// Handles to it that the application holds.
    pub references: u32,
    /// Where the application has mapped it.
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
    Reservation,
}

impl Kind {
    /// Whether a region of this kind and of `size` bytes is one chunk, because it may be exported as one handle.
    fn is_one_piece(&self, size: u64) -> bool {
        matches!(self, Self::Object(object) if object.prop.requested_handle_types != 0) && size <= WHOLE
    }
}

/// A reserved range of addresses.
#[derive(Debug)]
pub struct Region {
    /// Where it begins.
    pub base: CUdeviceptr,
    /// Bytes, a whole number of granules.
    pub size: u64,
    /// The context with which it is destroyed; null if with none.
    pub context: CUcontext,
    /// Its chunks, by address.
    pub chunks: Vec<Chunk>,
    /// How many regions were made before it.
    pub born: u64,
    /// Allocations in it that the application has not freed.
    pub(super) allocations: u32,
    /// How often other processes have it open: it exists until they have closed it.
    pub(super) lent: u32,
    /// The application has freed it.
    pub(super) abandoned: bool,
    /// What it is for.
    pub kind: Kind,
}

/// Where a chunk is mapped, and with which properties.
#[derive(Debug, Clone)]
pub struct ChunkMapping {
    /// At home.
    pub address: CUdeviceptr,
    /// Bytes.
    pub size: u64,
    /// Where the application has mapped it, and which GPUs may access it there.
    pub views: Vec<(CUdeviceptr, Vec<CUmemAccessDesc>)>,
    /// The properties of the object that it is a part of; `None` for other regions.
    pub prop: Option<CUmemAllocationProp>,
    /// It is a chunk of a reservation: nothing is mapped there.
    pub reservation: bool,
}

impl ChunkMapping {
    /// Its size in granules.
    pub fn granules(&self) -> Granules {
        (self.size / GRANULE) as Granules
    }
}

impl Region {
    pub(super) fn new(base: CUdeviceptr, size: u64, context: CUcontext, kind: Kind) -> Self {
        let chunk = if kind.is_one_piece(size) { size } else { CHUNK };
        let chunks = (0..size.div_ceil(chunk))
            .map(|index| Chunk::new(base + index * chunk, chunk.min(size - index * chunk)))
            .collect();
        Self { base, size, context, chunks, born: 0, allocations: 0, lent: 0, abandoned: false, kind }
    }

    /// Whether it is one allocation of which no chunk has memory yet. Its chunks are contiguous and have no views.
    pub fn is_untouched_allocation(&self) -> bool {
        matches!(self.kind, Kind::Whole)
            && self.chunks.iter().all(|chunk| matches!(chunk.backing, Backing::Absent))
    }

    /// Whether it is a reservation, where nothing is ever mapped.
    pub(super) fn is_reservation(&self) -> bool {
        matches!(self.kind, Kind::Reservation)
    }

    /// A slab's context, the length of its largest gap, and its base.
    pub(super) fn as_slab(&self) -> Option<(CUcontext, u64, CUdeviceptr)> {
        match &self.kind {
            Kind::Slab(gaps) => Some((self.context, gaps.largest(), self.base)),
            _ => None,
        }
    }

    /// Its size in granules.
    pub fn granules(&self) -> Granules {
        (self.size / GRANULE) as Granules
    }

    /// Whether its memory may be another replica's instead: memory of cuMemAlloc, all of which has the same properties and no
    /// views.
    pub(super) fn may_change_hands(&self) -> bool {
        matches!(self.kind, Kind::Whole | Kind::Slab(_)) && self.lent == 0
    }

    /// Whether the GPU can use all of it.
    pub fn usable(&self) -> bool {
        self.chunks.iter().all(|chunk| chunk.backing.usable())
    }

    /// The mappings of the chunks that the GPU cannot use.
    pub fn missing(&self) -> Vec<ChunkMapping> {
        self.chunks.iter().filter(|chunk| !chunk.backing.usable()).map(|chunk| self.place(chunk)).collect()
    }

    /// Whether the GPU can use any of it.
    pub fn in_use_by_gpu(&self) -> bool {
        self.chunks.iter().any(|chunk| chunk.backing.usable())
    }

    /// Whether the application no longer uses it, so that only other processes may have it open.
    pub(super) fn is_orphan(&self) -> bool {
        match &self.kind {
            Kind::Slab(gaps) => gaps.empty(),
            _ => self.abandoned,
        }
    }

    /// The mapping of one of its chunks.
    pub fn place(&self, chunk: &Chunk) -> ChunkMapping {
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
        ChunkMapping { address, size, views, prop, reservation: matches!(self.kind, Kind::Reservation) }
    }

    /// Its object, if it is one.
    pub fn object_mut(&mut self) -> Option<&mut Object> {
        match &mut self.kind {
            Kind::Object(object) => Some(object),
            _ => None,
        }
    }

    /// Its object, if it is one.
    pub fn object(&self) -> Option<&Object> {
        match &self.kind {
            Kind::Object(object) => Some(object),
            _ => None,
        }
    }

    /// The index of the chunk that contains an address.
    pub(super) fn chunk_at(&self, address: CUdeviceptr) -> Option<usize> {
        let after = self.chunks.partition_point(|chunk| chunk.address <= address);
        let index = after.checked_sub(1)?;
        (address - self.chunks[index].address < self.chunks[index].size).then_some(index)
    }

    /// Whether single granules of it may be filled in host memory.
    pub(super) fn may_spill(&self) -> bool {
        !matches!(self.kind, Kind::Reservation) && !self.kind.is_one_piece(self.size)
    }

    /// Cuts the chunk at `index` so that the granule at `offset` bytes in it is a chunk of its own. Returns the indices of the
    /// chunks it was cut into, and the index of that granule.
    pub(super) fn cut_out(&mut self, index: usize, offset: u64) -> (std::ops::Range<usize>, usize) {
        let before = self.chunks.len();
        let mut at = index;
        if offset > 0 {
            self.cut(index, offset);
            at += 1;
        }
        if self.chunks[at].size > GRANULE {
            self.cut(at, GRANULE);
        }
        (index..index + 1 + self.chunks.len() - before, at)
    }

    /// Cuts a chunk that is not on the GPU in two.
    fn cut(&mut self, index: usize, offset: u64) {
        let chunk = &mut self.chunks[index];
        let mut rest = Chunk::new(chunk.address + offset, chunk.size - offset);
        // What a replica hands over has the size of the whole.
        chunk.promised = false;
        rest.constancy = chunk.constancy;
        if let Backing::Evicted(copy) = std::mem::replace(&mut chunk.backing, Backing::Absent) {
            let [before, after] = copy.cut((offset / GRANULE) as Granules, chunk.size);
            let backing = |copy: Option<HostCopy>| copy.map_or(Backing::Absent, Backing::Evicted);
            (chunk.backing, rest.backing) = (backing(before), backing(after));
        }
        chunk.size = offset;
        self.chunks.insert(index + 1, rest);
    }
}

/// The chunks of a region that are mapped now: offset in the region, bytes, and physical memory of each.
pub fn present(region: &Region) -> impl Iterator<Item = (u64, u64, CUmemGenericAllocationHandle)> {
    region.chunks.iter().filter_map(|chunk| match chunk.backing {
        Backing::Device(handle) | Backing::Overflow(handle) => {
            Some((chunk.address - region.base, chunk.size, handle))
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::same_bytes;
    use proptest::prelude::*;

    fn cut(bytes: &[u8], mut ends: Vec<usize>) -> Vec<&[u8]> {
        ends.iter_mut().for_each(|end| *end %= bytes.len() + 1);
        ends.extend([0, bytes.len()]);
        ends.sort_unstable();
        ends.windows(2).map(|two| &bytes[two[0]..two[1]]).collect()
    }

    proptest! {
        #[test]
        fn pieces_are_compared_wherever_they_begin(
            bytes in prop::collection::vec(any::<u8>(), 1..200),
            ours in prop::collection::vec(any::<usize>(), 0..8),
            theirs in prop::collection::vec(any::<usize>(), 0..8),
            at in any::<prop::sample::Index>(),
        ) {
            prop_assert!(same_bytes(cut(&bytes, ours.clone()), cut(&bytes, theirs.clone())));
            let mut other = bytes.clone();
            *at.get_mut(&mut other) ^= 1;
            prop_assert!(!same_bytes(cut(&bytes, ours.clone()), cut(&other, theirs.clone())));
            prop_assert!(!same_bytes(cut(&bytes, ours.clone()), cut(&bytes[..bytes.len() - 1], theirs.clone())));
            prop_assert!(!same_bytes(cut(&bytes[..bytes.len() - 1], ours), cut(&bytes, theirs)));
        }
    }
}
