//! Calls on a range of addresses that may contain several mappings: cuMemUnmap and cuMemSetAccess.
//!
//! The driver accepts only whole mappings, and refuses a call before it changes anything. cuMemUnmap unmaps all mappings in a
//! range of one reservation, with any holes between them. cuMemSetAccess requires a range that begins and ends at the bounds of
//! mappings, and then changes the rights of the mappings before the first hole (tests/gpu/differential.py).
//!
//! A range may contain views of objects of several GPUs ([`crate::memory::vmm`]), and between them the driver's own mappings
//! (of imported memory, for example). Evicted memory is mapped nowhere, so the driver cannot judge the range. Therefore the
//! whole range is checked here first. Then the driver acts piece by piece, and if it refuses a piece, the earlier ones are
//! undone.

use crate::cuda::abi::*;
use crate::memory::device::Device;
use crate::memory::map::Memory;
use crate::memory::region::{View, present};
use nvshare::units::{GRANULE, format_size};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

/// The outcome of a call.
pub enum Verdict {
    /// It was made or refused, with this result.
    Answer(CuResult),
    /// Only the driver can decide, and only when memory is in place: call again inside the gate.
    InPlace,
}

/// A mapped chunk of an object in a view: address, bytes, and physical memory.
type Piece = (CUdeviceptr, usize, CUmemGenericAllocationHandle);

/// The maps of all GPUs, locked while no memory moves. No lock is held while this waits for another GPU's memory: memory of
/// one GPU may have to be evicted before that of another stops moving.
fn maps_at_rest(devices: &[Arc<Device>]) -> Vec<MutexGuard<'_, Memory>> {
    loop {
        devices.iter().for_each(|device| drop(device.memory_at_rest()));
        let maps: Vec<_> = devices.iter().map(|device| device.memory()).collect();
        if maps.iter().all(|memory| !memory.moving) {
            return maps;
        }
    }
}

/// A range, and the views in it.
struct Mapped<'a> {
    devices: &'a [Arc<Device>],
    maps: Vec<MutexGuard<'a, Memory>>,
    range: Range<CUdeviceptr>,
    /// By address: index of the GPU, base of the object, and the view.
    views: Vec<(usize, CUdeviceptr, View)>,
}

impl<'a> Mapped<'a> {
    /// `None` if there is no view in the range.
    fn find(devices: &'a [Arc<Device>], address: CUdeviceptr, size: u64) -> Option<Self> {
        let is_there = |device: &Arc<Device>| !device.memory().views_in(address, size).is_empty();
        if !devices.iter().any(is_there) {
            return None;
        }
        let maps = maps_at_rest(devices);
        let of_map = |(at, memory): (usize, &MutexGuard<'a, Memory>)| {
            memory.views_in(address, size).into_iter().map(move |(object, view)| (at, object, view))
        };
        let mut views: Vec<_> = maps.iter().enumerate().flat_map(of_map).collect();
        views.sort_unstable_by_key(|(_, _, view)| view.address);
        let range = address..address.saturating_add(size);
        (!views.is_empty()).then_some(Self { devices, maps, range, views })
    }

    fn driver(&self) -> &'static crate::cuda::driver::Driver {
        self.devices[0].driver
    }

    /// Whether the range covers a view only in part.
    fn cuts(&self) -> bool {
        let Range { start, end } = self.range;
        self.views.iter().any(|(_, _, view)| view.address < start || view.address + view.size > end)
    }

    /// The parts of the range that no view covers.
    fn gaps(&self) -> Vec<(CUdeviceptr, usize)> {
        let covered = self.views.iter().map(|(_, _, view)| (view.address, view.address + view.size));
        let mut at = self.range.start;
        let mut gaps = Vec::new();
        for (begin, after) in covered.chain([(self.range.end, self.range.end)]) {
            if begin > at {
                gaps.push((at, (begin - at) as usize));
            }
            at = at.max(after);
        }
        gaps
    }

    /// Whether the driver has mappings of its own in all of the gaps.
    fn is_whole(&self) -> bool {
        let driver = self.driver();
        self.gaps().iter().all(|(at, bytes)| {
            (0..*bytes as u64).step_by(GRANULE as usize).all(|offset| driver.is_mapped(at + offset))
        })
    }

    /// The mapping around an address: a view, or one of the driver's own.
    fn around(&self, address: CUdeviceptr) -> Option<Range<CUdeviceptr>> {
        let ours = self.views.iter().map(|(_, _, view)| view.address..view.address + view.size);
        let of_driver = || {
            let (base, size) = self.driver().mapping_around(address)?;
            Some(base..base + size)
        };
        ours.into_iter().find(|view| view.contains(&address)).or_else(of_driver)
    }

    /// Whether the range covers a mapping, a view or one of the driver's own, only in part.
    fn cuts_any(&self) -> bool {
        let Range { start, end } = self.range;
        self.cuts()
            || self.around(start).is_some_and(|mapping| mapping.start < start)
            || self.around(end - 1).is_some_and(|mapping| mapping.end > end)
    }

    /// Shortens the range to the mappings before the first hole.
    fn up_to_a_hole(&mut self) {
        let mut at = self.range.start;
        while at < self.range.end
            && let Some(mapping) = self.around(at)
        {
            at = mapping.end;
        }
        self.range.end = at;
        self.views.retain(|(_, _, view)| view.address < at);
    }

    fn pieces(&self, (of, object, view): &(usize, CUdeviceptr, View)) -> Vec<Piece> {
        let pieces = self.maps[*of].region(*object).into_iter().flat_map(present);
        let within = pieces.filter(|(at, ..)| *at < view.size);
        within.map(|(at, bytes, physical)| (view.address + at, bytes as usize, physical)).collect()
    }

    /// Calls `act` for the driver's own mappings, and then for each chunk of the views that is mapped now. If the driver
    /// refuses one, calls `undo` for the chunks before it, with their view.
    fn each(
        &self,
        act: impl Fn(CUdeviceptr, usize) -> Result<(), CuResult>,
        undo: impl Fn(Piece, &View),
    ) -> Result<(), CuResult> {
        for (at, bytes) in self.gaps() {
            // These are the driver's own whole mappings and holes. If the driver refuses any, it refuses the first, so nothing
            // has to be undone.
            act(at, bytes)?;
        }
        let all: Vec<_> = self
            .views
            .iter()
            .flat_map(|of| self.pieces(of).into_iter().map(|piece| (piece, &of.2)))
            .collect();
        for (done, (piece, _)) in all.iter().enumerate() {
            if let Err(result) = act(piece.0, piece.1) {
                all[..done].iter().for_each(|(piece, view)| undo(*piece, view));
                return Err(result);
            }
        }
        Ok(())
    }
}

/// cuMemUnmap. `None` if nothing of ours is mapped there.
pub fn unmap(devices: &[Arc<Device>], address: CUdeviceptr, size: u64) -> Option<CuResult> {
    let mut mapped = Mapped::find(devices, address, size)?;
    if mapped.cuts_any() || !(is_reserved(address, size) || mapped.is_whole()) {
        return Some(CuResult::INVALID_VALUE);
    }
    let driver = mapped.driver();
    let undo = |(at, bytes, physical), view: &View| {
        let again = driver.mem_map(at, bytes, 0, physical, 0).and_then(|()| match view.access.as_slice() {
            [] => Ok(()),
            access => driver.mem_set_access(at, bytes, access),
        });
        if let Err(result) = again {
            tracing::error!(
                "cuMemUnmap of several mappings was refused in part, and the memory at {at:#x} could not be mapped again: {result}"
            );
        }
    };
    if let Err(result) = mapped.each(|at, bytes| driver.mem_unmap(at, bytes), undo) {
        return Some(result);
    }
    for (of, _, view) in std::mem::take(&mut mapped.views) {
        if let Some(region) = mapped.maps[of].remove_view(view.address) {
            devices[of].dispose(region);
        }
    }
    Some(CuResult::SUCCESS)
}

/// cuMemSetAccess. `None` if there is no view in the range. Outside the gate some memory may not be mapped; then the call
/// succeeds only if the driver would certainly accept it for that memory. `inside` the gate all memory is mapped.
pub fn set_access(
    devices: &[Arc<Device>],
    (address, size): (CUdeviceptr, u64),
    access: &[CUmemAccessDesc],
    inside: bool,
) -> Option<Verdict> {
    let mut mapped = Mapped::find(devices, address, size)?;
    if mapped.cuts() {
        tracing::warn!(
            "cuMemSetAccess of {} at {address:#x} is refused: it covers a mapping in part, and access is given to whole mappings",
            format_size(size)
        );
    }
    let begins = mapped.around(address).is_some_and(|mapping| mapping.start == address);
    let ends = mapped.around(mapped.range.end - 1).is_some_and(|mapping| mapping.end == mapped.range.end);
    if !begins || !ends {
        return Some(Verdict::Answer(CuResult::INVALID_VALUE));
    }
    mapped.up_to_a_hole();
    let is_plain = |access: &CUmemAccessDesc, of: usize| {
        access.location == CUmemLocation::device(devices[of].ordinal) && is_access(access.flags)
    };
    let is_seen = |of: &(usize, CUdeviceptr, View)| !mapped.pieces(of).is_empty();
    let certain =
        |of: &(usize, _, _)| access.iter().all(|access| is_plain(access, of.0)) && !access.is_empty();
    if !inside && !mapped.views.iter().all(|of| is_seen(of) || certain(of)) {
        return Some(Verdict::InPlace);
    }
    let driver = mapped.driver();
    let undo = |(at, bytes, _), view: &View| {
        let _ = driver.mem_set_access(at, bytes, &as_before(view, access));
    };
    if let Err(result) = mapped.each(|at, bytes| driver.mem_set_access(at, bytes, access), undo) {
        return Some(Verdict::Answer(result));
    }
    for (of, _, view) in std::mem::take(&mut mapped.views) {
        if let Some(view) = mapped.maps[of].view_mut(view.address) {
            view.access.retain(|known| access.iter().all(|new| new.location != known.location));
            view.access.extend_from_slice(access);
        }
    }
    Some(Verdict::Answer(CuResult::SUCCESS))
}

/// `CUmemAccess_flags`.
fn is_access(flags: u32) -> bool {
    let known =
        [CU_MEM_ACCESS_FLAGS_PROT_NONE, CU_MEM_ACCESS_FLAGS_PROT_READ, CU_MEM_ACCESS_FLAGS_PROT_READWRITE];
    known.contains(&flags)
}

/// The former rights of a view, for the GPUs whose rights were to change.
fn as_before(view: &View, changed: &[CUmemAccessDesc]) -> Vec<CUmemAccessDesc> {
    let had = |changed: &CUmemAccessDesc| {
        let known = view.access.iter().find(|known| known.location == changed.location).copied();
        known.unwrap_or(CUmemAccessDesc { location: changed.location, flags: CU_MEM_ACCESS_FLAGS_PROT_NONE })
    };
    changed.iter().map(had).collect()
}

/// Ranges of addresses that the application has reserved: address and bytes.
static RESERVED: Mutex<BTreeMap<CUdeviceptr, u64>> = Mutex::new(BTreeMap::new());

fn reservations() -> MutexGuard<'static, BTreeMap<CUdeviceptr, u64>> {
    nvshare::sync::lock(&RESERVED)
}

/// Records a range that the driver has reserved for the application.
pub fn reserved(address: CUdeviceptr, size: u64) {
    reservations().insert(address, size);
}

/// Drops the record of a range that the driver has freed.
pub fn freed(address: CUdeviceptr) {
    reservations().remove(&address);
}

/// Whether a range consists of whole granules within one reservation of the application.
fn is_reserved(address: CUdeviceptr, size: u64) -> bool {
    let reserved = reservations().range(..=address).next_back().map(|(base, size)| base + size);
    let within = reserved.is_some_and(|end| address.checked_add(size).is_some_and(|after| after <= end));
    within && address.is_multiple_of(GRANULE) && size.is_multiple_of(GRANULE)
}

/// Whether the driver would accept a mapping at these addresses, although it cannot be asked now: they lie in one
/// reservation, and the driver has nothing mapped there.
pub fn is_free(device: &Device, address: CUdeviceptr, size: u64) -> bool {
    let granules = (0..size).step_by(GRANULE as usize);
    is_reserved(address, size)
        && !granules.into_iter().any(|offset| device.driver.is_mapped(address + offset))
}
