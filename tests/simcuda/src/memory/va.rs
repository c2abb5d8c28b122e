//! The address space: which addresses mean something to the GPU.
//!
//! Device addresses are addresses of this process. A reservation is an inaccessible mapping of nothing; mapping an
//! allocation puts its part of the memfd there, still inaccessible, and setting access unlocks it. The table here says
//! the same as the kernel's page tables, so that an access can be judged before it is made: no GPU operation ever
//! faults, an illegal one is found in the table.
//!
//! Whoever touches device memory holds the table's lock for reading while it does (see [`super::access`]), and whoever
//! changes a mapping holds it for writing. So memory never disappears under a running operation; the operation finds
//! it gone when it looks at the next piece.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Weak};

use simstate::segment::MAX_GPUS;

use super::backing::Physical;
use super::gaps::Gaps;
use crate::abi::{Error, Result};
use crate::pool::Block;

thread_local! {
    /// The last address that this thread found to be no business of the GPU's, for the message.
    pub static FAULT: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// What the granularity of `cuMemCreate` and friends is.
pub const GRANULARITY: u64 = 2 << 20;

/// What an address may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    None,
    Read,
    ReadWrite,
}

/// Who wants to use memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// The GPU.
    pub device: usize,
    /// A bit for every GPU whose `cuMemAlloc` memory it may use beside its own.
    pub peers: u32,
    /// Whether it knows how to get at arrays.
    pub arrays: bool,
}

impl User {
    /// The driver, copying by means of that GPU: it gets at all that `cuMemAlloc` made, but in mapped memory it has no
    /// rights that the GPU hasn't.
    pub fn driver(device: usize) -> User {
        User { device, peers: u32::MAX, arrays: false }
    }
}

/// What each GPU may do with a mapping, and behind them all the host.
#[derive(Clone, Copy)]
pub struct Rights([Access; MAX_GPUS + 1]);

impl Rights {
    /// Whose are the host's.
    pub const HOST: usize = MAX_GPUS;

    const NONE: Rights = Rights([Access::None; MAX_GPUS + 1]);

    pub fn of(&self, who: usize) -> Access {
        self.0.get(who).copied().unwrap_or(Access::None)
    }

    /// What the one that may do most may do.
    pub fn most(&self) -> Access {
        self.0.iter().copied().max().unwrap_or(Access::None)
    }
}

/// Whether a block of stream-ordered memory is there now, and for whom: two bits for each GPU and the host.
pub struct Live {
    pub now: AtomicBool,
    /// Those of its pool.
    pub rights: Arc<AtomicU64>,
}

impl Live {
    /// What `who` may do by these bits.
    pub fn right(bits: u64, who: usize) -> Access {
        match bits >> (2 * who) & 3 {
            0 => Access::None,
            1 => Access::Read,
            _ => Access::ReadWrite,
        }
    }

    /// The bits with another right for `who`.
    pub fn bits(bits: u64, who: usize, access: Access) -> u64 {
        bits & !(3 << (2 * who)) | (access as u64) << (2 * who)
    }
}

/// An allocation in a reservation.
pub struct Mapping {
    pub size: u64,
    pub physical: Arc<Physical>,
    pub rights: Rights,
}

impl Mapping {
    pub fn on_gpu(&self) -> bool {
        self.physical.location.kind == crate::abi::LOCATION_DEVICE
    }
}

/// What a range of addresses is.
pub enum Kind {
    /// `cuMemAddressReserve`.
    Reservation { maps: BTreeMap<u64, Mapping> },
    /// `cuMemAlloc`, with what it keeps alive, and the bytes that were asked for.
    Allocation { physical: Arc<Physical>, requested: u64 },
    /// `cuIpcOpenMemHandle` of what another process allocated: by which handle, how often, and for which GPU.
    Opened { _physical: Arc<Physical>, handle: [u64; 8], references: u32, by: usize },
    /// Stream-ordered memory.
    Pooled { live: Arc<Live>, block: Weak<Block>, physical: Option<Arc<Physical>> },
    /// An array's.
    Array { _physical: Arc<Physical> },
    /// `cuMemAllocManaged`.
    Managed,
    /// `cuMemHostAlloc`, with its flags.
    HostAllocation { flags: u32 },
    /// `cuMemHostRegister`, with its flags.
    HostRegistration { flags: u32 },
}

/// A range of addresses.
pub struct Region {
    pub size: u64,
    pub kind: Kind,
    /// The device it belongs to.
    pub device: usize,
    /// The context it goes away with; 0 for reservations, which belong to none.
    pub context: usize,
    /// `CU_POINTER_ATTRIBUTE_BUFFER_ID`.
    pub id: u64,
}

/// Where the bytes at an address are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On that GPU.
    Device(usize),
    /// Managed memory of that GPU.
    Managed(usize),
    /// In page-locked host memory.
    Pinned,
}

/// All ranges of the process, by their first address.
#[derive(Default)]
pub struct Space {
    regions: BTreeMap<u64, Region>,
    next_id: u64,
    pub gaps: Gaps,
}

fn os() -> Error {
    // The kernel refuses mappings only for want of memory or of mappings.
    Error::OUT_OF_MEMORY
}

fn map(address: u64, size: u64, protection: i32, flags: i32, fd: i32, offset: u64) -> Result<u64> {
    // SAFETY: with MAP_FIXED the address lies in a range that the table holds as ours (the callers look it up under
    // the write lock) and nothing else uses; without it, the kernel chooses unused addresses.
    let at =
        unsafe { libc::mmap(address as *mut _, size as usize, protection, flags, fd, offset as libc::off_t) };
    if at == libc::MAP_FAILED { Err(os()) } else { Ok(at as u64) }
}

fn unmap(address: u64, size: u64) {
    if size > 0 {
        // SAFETY: the range is ours and is being given up; the table no longer holds it.
        unsafe { libc::munmap(address as *mut _, size as usize) };
    }
}

const NOTHING: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Finds unused addresses, inaccessible for now; `wanted` is a wish.
fn reserve(size: u64, alignment: u64, wanted: u64) -> Result<u64> {
    if wanted != 0 && wanted.is_multiple_of(alignment) {
        let at = map(wanted, size, libc::PROT_NONE, NOTHING, -1, 0)?;
        if at == wanted {
            return Ok(at);
        }
        unmap(at, size);
    }
    let room = size.checked_add(alignment).ok_or(Error::OUT_OF_MEMORY)?;
    let at = map(0, room, libc::PROT_NONE, NOTHING, -1, 0)?;
    let aligned = at.next_multiple_of(alignment);
    unmap(at, aligned - at);
    unmap(aligned + size, at + room - aligned - size);
    Ok(aligned)
}

/// Whether an address lies inside a mapping, and not at its beginning.
fn cuts(maps: &BTreeMap<u64, Mapping>, address: u64) -> bool {
    maps.range(..address).next_back().is_some_and(|(&at, mapping)| at + mapping.size > address)
}

fn protect(address: u64, size: u64, access: Access) -> Result {
    // The host side can't tell GPU reads from writes, and the application's own CPU has no business here either way:
    // read-only is enforced by the table.
    let protection =
        if access == Access::None { libc::PROT_NONE } else { libc::PROT_READ | libc::PROT_WRITE };
    // SAFETY: the range is a mapping that the table holds as ours, under the write lock.
    let rc = unsafe { libc::mprotect(address as *mut _, size as usize, protection) };
    if rc == 0 { Ok(()) } else { Err(os()) }
}

impl Space {
    fn add(&mut self, address: u64, size: u64, kind: Kind, device: usize, context: usize) {
        self.next_id += 1;
        self.regions.insert(address, Region { size, kind, device, context, id: self.next_id });
    }

    /// The range that holds `address`, with its first address.
    pub fn find(&self, address: u64) -> Option<(u64, &Region)> {
        let (&base, region) = self.regions.range(..=address).next_back()?;
        (address - base < region.size).then_some((base, region))
    }

    /// What `address` is mapped to inside a reservation, with the mapping's first address.
    pub fn find_mapping(&self, address: u64) -> Option<(u64, &Mapping)> {
        let (_, region) = self.find(address)?;
        let Kind::Reservation { maps } = &region.kind else { return None };
        let (&base, mapping) = maps.range(..=address).next_back()?;
        (address - base < mapping.size).then_some((base, mapping))
    }

    /// Where `address` is, and how far that holds; `None` if `user` may not use it so.
    fn place(&self, address: u64, user: User, write: bool) -> Option<(Place, u64)> {
        let (base, region) = self.find(address)?;
        let rest = base + region.size - address;
        match &region.kind {
            Kind::Reservation { .. } => {
                let (base, mapping) = self.find_mapping(address)?;
                let needed = if write { Access::ReadWrite } else { Access::Read };
                let place = if mapping.on_gpu() {
                    Place::Device(mapping.physical.location.id as usize)
                } else {
                    Place::Pinned
                };
                (mapping.rights.of(user.device) >= needed).then_some((place, base + mapping.size - address))
            }
            Kind::Allocation { .. } => {
                let reached = region.device == user.device || user.peers >> region.device & 1 == 1;
                reached.then_some((Place::Device(region.device), rest))
            }
            Kind::Opened { by, .. } => {
                let reached = user.device == *by || region.device == user.device;
                reached.then_some((Place::Device(region.device), rest))
            }
            Kind::Pooled { live, physical, .. } => {
                let needed = if write { Access::ReadWrite } else { Access::Read };
                let open = Live::right(live.rights.load(SeqCst), user.device) >= needed;
                let location = physical.as_ref()?.location;
                let on_gpu = location.kind == crate::abi::LOCATION_DEVICE;
                let place = if on_gpu { Place::Device(location.id as usize) } else { Place::Pinned };
                (open && live.now.load(SeqCst)).then_some((place, rest))
            }
            Kind::Array { .. } => {
                let reached = region.device == user.device || user.peers >> region.device & 1 == 1;
                (user.arrays && reached).then_some((Place::Device(region.device), rest))
            }
            Kind::Managed => Some((Place::Managed(region.device), rest)),
            Kind::HostAllocation { .. } | Kind::HostRegistration { .. } => Some((Place::Pinned, rest)),
        }
    }

    /// Where a range begins; an error if `user` may not use all of it.
    pub fn check(&self, address: u64, len: u64, user: User, write: bool) -> Result<Place> {
        let fault = |at: u64| {
            FAULT.set(at);
            Error::ILLEGAL_ADDRESS
        };
        let end = address.checked_add(len).ok_or_else(|| fault(address))?;
        let (first, mut holds) = self.place(address, user, write).ok_or_else(|| fault(address))?;
        let mut at = address;
        while holds < end - at {
            at += holds;
            holds = self.place(at, user, write).ok_or_else(|| fault(at))?.1;
        }
        Ok(first)
    }

    /// Whether the range touches anything in the table.
    fn overlaps(&self, address: u64, size: u64) -> bool {
        let below = self.regions.range(..address.saturating_add(size)).next_back();
        below.is_some_and(|(&base, region)| base + region.size > address)
    }

    pub fn reserve(&mut self, size: u64, alignment: u64, wanted: u64, device: usize) -> Result<u64> {
        let alignment = alignment.max(GRANULARITY);
        let address = reserve(size, alignment, wanted)?;
        self.add(address, size, Kind::Reservation { maps: BTreeMap::new() }, device, 0);
        Ok(address)
    }

    pub fn free_reservation(&mut self, address: u64, size: u64) -> Result {
        match self.regions.get(&address) {
            Some(Region { size: has, kind: Kind::Reservation { maps }, .. })
                if *has == size && maps.is_empty() =>
            {
                self.regions.remove(&address);
                self.gaps.close(address, size);
                unmap(address, size);
                Ok(())
            }
            _ => Err(Error::INVALID_VALUE),
        }
    }

    pub fn map(&mut self, address: u64, size: u64, physical: Arc<Physical>) -> Result {
        let end = address.checked_add(size).ok_or(Error::INVALID_VALUE)?;
        let region = self.regions.range_mut(..=address).next_back();
        let Some((&base, Region { size: has, kind: Kind::Reservation { maps }, .. })) = region else {
            return Err(Error::INVALID_VALUE);
        };
        let taken = maps.range(..end).next_back().is_some_and(|(&at, mapping)| at + mapping.size > address);
        if end > base + *has || taken {
            return Err(Error::INVALID_VALUE);
        }
        map(
            address,
            size,
            libc::PROT_NONE,
            libc::MAP_SHARED | libc::MAP_FIXED,
            physical.extent.fd(),
            physical.extent.offset,
        )?;
        maps.insert(address, Mapping { size, physical, rights: Rights::NONE });
        self.gaps.close(address, size);
        Ok(())
    }

    /// The mappings of the reservation that a range lies in.
    fn mappings(&mut self, address: u64, size: u64) -> Result<&mut BTreeMap<u64, Mapping>> {
        let end = address.checked_add(size).filter(|_| size > 0).ok_or(Error::INVALID_VALUE)?;
        match self.regions.range_mut(..=address).next_back() {
            Some((&base, Region { size: has, kind: Kind::Reservation { maps }, .. }))
                if end <= base + *has && (end - address).is_multiple_of(GRANULARITY) =>
            {
                Ok(maps)
            }
            _ => Err(Error::INVALID_VALUE),
        }
    }

    /// Unmaps the mappings in a range, which may have holes, or be one; an error if it cuts a mapping.
    pub fn unmap(&mut self, address: u64, size: u64) -> Result {
        let maps = self.mappings(address, size)?;
        let end = address + size;
        if !address.is_multiple_of(GRANULARITY) || cuts(maps, address) || cuts(maps, end) {
            return Err(Error::INVALID_VALUE);
        }
        let gone: Vec<(u64, u64)> =
            maps.range(address..end).map(|(&at, mapping)| (at, mapping.size)).collect();
        for &(at, size) in &gone {
            map(at, size, libc::PROT_NONE, NOTHING | libc::MAP_FIXED, -1, 0)?;
            maps.remove(&at);
        }
        gone.iter().for_each(|&(at, size)| self.gaps.open(at, size));
        Ok(())
    }

    /// Gives each of `wanted` its rights in the mappings that a range begins with; nobody else's change. The driver looks
    /// whether the range begins and ends with a mapping, and then goes from mapping to mapping, up to a hole.
    pub fn set_access(&mut self, address: u64, size: u64, wanted: &[(usize, Access)]) -> Result {
        let maps = self.mappings(address, size)?;
        let end = address + size;
        let ends = |(&at, mapping): (&u64, &Mapping)| at + mapping.size == end;
        if !maps.contains_key(&address) || !maps.range(..end).next_back().is_some_and(ends) {
            return Err(Error::INVALID_VALUE);
        }
        let mut at = address;
        let mut keys = Vec::new();
        while at < end
            && let Some(mapping) = maps.get(&at)
        {
            keys.push(at);
            at += mapping.size;
        }
        // The host can be let into host memory only.
        let for_host = wanted.iter().any(|&(who, _)| who == Rights::HOST);
        if for_host && keys.iter().any(|key| maps.get(key).is_none_or(Mapping::on_gpu)) {
            return Err(Error::INVALID_VALUE);
        }
        for key in keys {
            let Some(mapping) = maps.get_mut(&key) else { continue };
            let mut rights = mapping.rights;
            wanted.iter().for_each(|&(who, access)| rights.0[who] = access);
            protect(key, mapping.size, rights.most())?;
            mapping.rights = rights;
        }
        Ok(())
    }

    /// Maps a physical allocation somewhere, accessible (`cuMemAlloc` and its like); `kind` keeps it.
    pub fn allocate(
        &mut self,
        physical: &Arc<Physical>,
        kind: Kind,
        device: usize,
        context: usize,
    ) -> Result<u64> {
        let size = physical.size();
        let alignment = if size >= GRANULARITY { GRANULARITY } else { 64 << 10 };
        let address = reserve(size, alignment, 0)?;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let extent = &physical.extent;
        map(address, size, rw, libc::MAP_SHARED | libc::MAP_FIXED, extent.fd(), extent.offset)
            .inspect_err(|_| unmap(address, size))?;
        self.add(address, size, kind, device, context);
        Ok(address)
    }

    /// Addresses for stream-ordered memory, without any for now.
    pub fn reserve_block(&mut self, size: u64, device: usize, live: &Arc<Live>) -> Result<u64> {
        let alignment = if size >= GRANULARITY { GRANULARITY } else { 64 << 10 };
        let address = reserve(size, alignment, 0)?;
        let kind = Kind::Pooled { live: live.clone(), block: Weak::new(), physical: None };
        self.add(address, size, kind, device, 0);
        Ok(address)
    }

    /// Says whose the addresses are.
    pub fn name_block(&mut self, address: u64, owner: Weak<Block>) {
        if let Some(Region { kind: Kind::Pooled { block, .. }, .. }) = self.regions.get_mut(&address) {
            *block = owner;
        }
    }

    /// The block that begins at an address.
    pub fn block(&self, address: u64) -> Option<Arc<Block>> {
        match self.regions.get(&address) {
            Some(Region { kind: Kind::Pooled { block, .. }, .. }) => block.upgrade(),
            _ => None,
        }
    }

    pub fn block_is_backed(&self, address: u64) -> bool {
        let kind = self.regions.get(&address).map(|region| &region.kind);
        matches!(kind, Some(Kind::Pooled { physical: Some(_), .. }))
    }

    /// Gives a block memory, or takes it.
    pub fn back_block(&mut self, address: u64, memory: Option<Arc<Physical>>) -> Result {
        let Some(Region { kind: Kind::Pooled { physical, .. }, size, .. }) = self.regions.get_mut(&address)
        else {
            return Err(Error::INVALID_VALUE);
        };
        match &memory {
            Some(memory) => {
                let rw = libc::PROT_READ | libc::PROT_WRITE;
                let extent = &memory.extent;
                map(address, *size, rw, libc::MAP_SHARED | libc::MAP_FIXED, extent.fd(), extent.offset)?
            }
            None => map(address, *size, libc::PROT_NONE, NOTHING | libc::MAP_FIXED, -1, 0)?,
        };
        *physical = memory;
        Ok(())
    }

    /// The address at which the context has opened an IPC handle, which is counted once more.
    pub fn open_again(&mut self, handle: &[u64; 8], context: usize) -> Option<u64> {
        self.regions.iter_mut().find_map(|(&base, region)| match &mut region.kind {
            Kind::Opened { handle: opened, references, .. }
                if opened == handle && region.context == context =>
            {
                *references += 1;
                Some(base)
            }
            _ => None,
        })
    }

    /// Counts an opened IPC handle once less; says how often it is still open.
    pub fn close_once(&mut self, address: u64) -> Result<u32> {
        match self.regions.get_mut(&address) {
            Some(Region { kind: Kind::Opened { references, .. }, .. }) => {
                *references -= 1;
                Ok(*references)
            }
            _ => Err(Error::INVALID_VALUE),
        }
    }

    /// Makes zeroed host memory (`cuMemAllocManaged`, `cuMemHostAlloc`).
    pub fn allocate_host(&mut self, size: u64, kind: Kind, device: usize, context: usize) -> Result<u64> {
        let alignment = if matches!(kind, Kind::Managed) { GRANULARITY } else { 4096 };
        let size = size.checked_next_multiple_of(alignment).ok_or(Error::OUT_OF_MEMORY)?;
        let address = reserve(size, alignment, 0)?;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        map(address, size, rw, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED, -1, 0)
            .inspect_err(|_| unmap(address, size))?;
        self.add(address, size, kind, device, context);
        Ok(address)
    }

    pub fn register(&mut self, address: u64, size: u64, flags: u32, device: usize, context: usize) -> Result {
        if self.overlaps(address, size) {
            return Err(Error::HOST_MEMORY_ALREADY_REGISTERED);
        }
        self.add(address, size, Kind::HostRegistration { flags }, device, context);
        Ok(())
    }

    /// Takes the range that begins at `address` out of the table if `which` agrees. The addresses are freed unless
    /// they are the application's.
    pub fn free(&mut self, address: u64, which: impl Fn(&Kind) -> bool) -> Option<Region> {
        if !which(&self.regions.get(&address)?.kind) {
            return None;
        }
        let region = self.regions.remove(&address)?;
        if !matches!(region.kind, Kind::HostRegistration { .. }) {
            unmap(address, region.size);
        }
        Some(region)
    }

    /// The ranges that go away with a context.
    pub fn of_context(&self, context: usize) -> Vec<u64> {
        self.regions.iter().filter(|(_, region)| region.context == context).map(|(&base, _)| base).collect()
    }

    /// The next range of managed memory at or after `address`, before `end`.
    pub fn managed_in(&self, address: u64, end: u64) -> Vec<(u64, u64, usize)> {
        let first = self.find(address).map_or(address, |(base, _)| base);
        let regions = self.regions.range((Bound::Included(first), Bound::Excluded(end)));
        regions
            .filter(|(_, region)| matches!(region.kind, Kind::Managed))
            .map(|(&base, region)| (base.max(address), (base + region.size).min(end), region.device))
            .collect()
    }
}
