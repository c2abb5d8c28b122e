//! The swap engine: moves chunks between the GPU and the host, in bulk and in a pipeline.
//!
//! Up to [`DEPTH`] copies are in flight, so that the link never waits for a mapping: while one chunk is
//! copied, the one before it is unmapped and released, or the one after it created and mapped. Each
//! chunk's granules go back to the pool, or are taken from it, one chunk at a time. So the client that fills
//! runs only a few chunks behind the client that evicts.
//!
//! Granules that hold only zeros are not copied. Before an eviction the GPU itself scans the chunks
//! ([`crate::memory::zero_scan`]), once after each time the client ran. A chunk that is all zero is dropped, and comes back
//! as fresh memory, which is zero (docs/driver-facts.md). Of other chunks only the granules in use are copied.
//!
//! Nor are granules copied that have not changed (NVSHARE_KEEP_COPIES). When a chunk comes back, its copy in host memory is
//! kept. Before the next eviction the GPU takes the fingerprints of its granules ([`crate::memory::fingerprint`]), and those that
//! are the same as when the copy was made stay as they are in it. The copy is given up as soon as anything else needs the host
//! memory. A chunk that changes each time is not kept ([`crate::memory::region::Constancy`]).
//!
//! Memory that does not fit on the GPU, because contexts of other clients have grown, is mapped to host memory
//! ([`Backing::Overflow`]), which the GPU uses over the link. It returns to the GPU at the first fill that has room.
//!
//! A chunk that is being moved is [`Backing::Moving`], and only the swap engine touches it. The map is locked only
//! to take a chunk out and to put it back.

mod hand_over;

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::memory::device::Device;
use crate::memory::error::{SwapError, driver_said};
use crate::memory::fingerprint::{FingerprintEntry, own_keys};
use crate::memory::host::HostPoolError;
use crate::memory::map::Outgoing;
use crate::memory::region::{Backing, ChunkMapping, HostCopy, InUse, Seen};
use crate::memory::scan::Scan;
use crate::memory::scan::kernel::Kernel;
use crate::memory::zero_scan::ZeroEntry;
use crate::replicas::giving::{Giving, Wanted};
use crate::settings::{KeepCopies, settings};
use crate::submit::gang;
use crate::submit::gate::gate;
use nvshare::page::{Direction, Phase};
use nvshare::sync::now;
use nvshare::units::{GRANULE, Granules, MILLISECOND, Nanos, SECOND, bytes_of, format_nanos, format_size};
use nvshare::{Fill, Runtime};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Copies in flight. On an H100 (PCIe 5), eight switch at 39.6 GiB/s and four at 38.9 (docs/benchmarks.md).
const DEPTH: usize = 8;

/// How long a forecast waits for the GPU's answer.
const FORECAST_WAIT: Nanos = 5 * MILLISECOND;

/// How long a fill retries when the driver has no memory although the pool had room. Then the client gives up its turn.
const CREATE_TIMEOUT: Nanos = 5 * SECOND;

/// Whether copies in host memory are kept.
fn keep_copies() -> KeepCopies {
    settings().map_or(KeepCopies::Off, |settings| settings.keep_copies)
}

/// The events recorded before and after a copy.
#[derive(Clone, Copy)]
struct Ends {
    begin: CUevent,
    end: CUevent,
}

/// Creates, in the current context, a stream, and events for [`DEPTH`] copies in flight and one more.
fn stream_and_events(driver: &Driver) -> Result<(CUstream, Vec<Ends>), SwapError> {
    let stream = driver.stream_create(CU_STREAM_NON_BLOCKING).map_err(driver_said("cuStreamCreate"))?;
    let event = || driver.event_create(CU_EVENT_BLOCKING_SYNC).map_err(driver_said("cuEventCreate"));
    let events =
        (0..=DEPTH).map(|_| Ok(Ends { begin: event()?, end: event()? })).collect::<Result<_, _>>()?;
    Ok((stream, events))
}

/// The error for host memory that the driver would not map for the GPU.
fn no_host_memory(error: SwapError) -> SwapError {
    if error.is_out_of_memory() {
        SwapError::Host("the driver cannot allocate host memory that the GPU can use".into())
    } else {
        error
    }
}

/// A copy in flight, and the state of its chunk afterwards.
struct InFlight {
    place: ChunkMapping,
    ends: Ends,
    transfer: Transfer,
}

enum Transfer {
    /// To the GPU; the host copy is kept or freed afterwards.
    In { handle: CUmemGenericAllocationHandle, overflow: bool, source: Option<HostCopy> },
    /// To the host; the GPU memory is freed afterwards.
    Out { handle: CUmemGenericAllocationHandle, way: WayOut },
}

/// Into which copy a chunk leaves the GPU.
struct WayOut {
    target: HostCopy,
    /// Of the granules in use, those that are copied into it. The others are in it already.
    changed: InUse,
    expected: Option<Expected>,
}

/// A copy that should not differ from the one under way, to find out whether fingerprints tell the truth.
struct Expected {
    copy: HostCopy,
    /// The granules that should not differ, one bit for each.
    unchanged: u32,
}

/// A scan that a forecast waits for.
enum PendingScan {
    /// A scan of no chunks, to see whether the GPU runs anything beside the application's work.
    Probe(Scan<ZeroEntry>),
    /// A scan of memory. The memory counts as moving until the scan ends.
    Memory(Scan<ZeroEntry>),
}

impl PendingScan {
    fn scan(&self) -> &Scan<ZeroEntry> {
        let (Self::Probe(scan) | Self::Memory(scan)) = self;
        scan
    }

    /// Whether memory is being scanned.
    fn holds_memory(&self) -> bool {
        matches!(self, Self::Memory(..))
    }
}

/// Moves one client's memory.
pub struct Swap {
    device: Arc<Device>,
    stream: CUstream,
    events: Vec<Ends>,
    in_flight: VecDeque<InFlight>,
    /// How long the copies of the present fill, prefetch or eviction have taken, by the GPU's clock, ns.
    copying: Nanos,
    zero_scan: Kernel<ZeroEntry>,
    fingerprints: Kernel<FingerprintEntry>,
    /// The scan that a forecast waits for.
    pending: Option<PendingScan>,
    /// When a probe was last seen to have ended ([`PendingScan::Probe`]), if no forecast has used that yet.
    probed: Option<Nanos>,
    /// The result of a forecast that ended after its caller had stopped waiting, bytes.
    forecast: Option<u64>,
    /// No work of the client is under way: memory that it uses may be replaced by other memory.
    pub quiet: bool,
    /// The connections to replicas, if the client is a member of a group.
    giving: Option<Giving>,
    /// During an eviction: the chunks that a replica lacks, by address.
    handing: BTreeMap<CUdeviceptr, Wanted>,
    /// During a fill: the chunks whose memory has come from a replica, and their bytes.
    taken: Vec<(CUdeviceptr, u64)>,
    /// During a fill: when the first of them came, ns, and how many bytes came.
    arrivals: Option<(Nanos, u64)>,
    /// How long the last fill took, ns, if more of it came from replicas than over the link.
    taken_over_in: Option<Nanos>,
}

impl Swap {
    /// A swap engine whose stream and events belong to the current context.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: Arc<Device>) -> Result<Self, SwapError> {
        let (stream, events) = stream_and_events(device.driver)?;
        Ok(Self {
            giving: device.replicas.get().cloned().map(Giving::new),
            handing: BTreeMap::new(),
            taken: Vec::new(),
            arrivals: None,
            taken_over_in: None,
            device,
            stream,
            events,
            in_flight: VecDeque::new(),
            copying: 0,
            zero_scan: Kernel::NotTried,
            fingerprints: Kernel::NotTried,
            pending: None,
            probed: None,
            forecast: None,
            quiet: true,
        })
    }

    /// Destroys the stream and the events and creates new ones in `context`, which becomes current.
    ///
    /// # Errors
    /// The driver's.
    pub fn move_to(&mut self, context: CUcontext) -> Result<(), SwapError> {
        self.leave();
        self.device.driver.ctx_set_current(context).map_err(driver_said("cuCtxSetCurrent"))?;
        (self.stream, self.events) = stream_and_events(self.device.driver)?;
        Ok(())
    }

    /// Destroys the stream and the events.
    pub fn destroy(mut self) {
        self.leave();
    }

    /// Destroys the stream and the events, if there are any. The context may be destroyed afterwards.
    pub fn leave(&mut self) {
        if self.stream.is_null() {
            return;
        }
        let _ = self.finish();
        let _ = self.finish_scan();
        self.zero_scan.leave();
        self.fingerprints.leave();
        for Ends { begin, end } in self.events.drain(..) {
            let _ = self.device.driver.event_destroy(begin);
            let _ = self.device.driver.event_destroy(end);
        }
        let _ = self.device.driver.stream_destroy(std::mem::replace(&mut self.stream, CUstream::NULL));
    }

    fn launch(&mut self, place: ChunkMapping, transfer: Transfer) -> Result<(), SwapError> {
        let driver = self.device.driver;
        let ends = self.events.pop().expect("events for one copy more than are in flight");
        let begun = driver.event_record(ends.begin, self.stream);
        let copied = begun.and_then(|()| match &transfer {
            Transfer::In { source: Some(copy), .. } => copy.pieces(place.size).try_for_each(
                // SAFETY: a piece of the copy's own memory, which stays until the event has passed.
                |(at, source, length)| unsafe {
                    driver.memcpy_htod_async(place.address + at, source, length as usize, self.stream)
                },
            ),
            Transfer::In { source: None, .. } => Ok(()),
            Transfer::Out { way, .. } => way.target.pieces_of(place.size, way.changed).try_for_each(
                // SAFETY: as above, and nobody else writes to it.
                |(at, target, length)| unsafe {
                    driver.memcpy_dtoh_async(target, place.address + at, length as usize, self.stream)
                },
            ),
        });
        let recorded = copied.and_then(|()| driver.event_record(ends.end, self.stream));
        self.in_flight.push_back(InFlight { place, ends, transfer });
        if let Err(result) = recorded {
            // The chunk keeps its former backing: its bytes are still there.
            let failed = self.in_flight.pop_back().expect("just pushed");
            self.events.push(failed.ends);
            self.undo(failed);
            return Err(SwapError::Driver { call: "cuMemcpyAsync", result });
        }
        while self.in_flight.len() >= DEPTH {
            self.retire()?;
        }
        Ok(())
    }

    /// Restores the state of a chunk whose copy failed: its bytes are where they were.
    fn undo(&self, failed: InFlight) {
        let backing = match failed.transfer {
            Transfer::In { handle, overflow, source } => {
                self.device.release(&failed.place, handle);
                if !overflow {
                    self.device.books.give(failed.place.granules());
                }
                source.map_or(Backing::Absent, Backing::Evicted)
            }
            Transfer::Out { handle, way } => {
                self.free_copies([way.target].into_iter().chain(way.expected.map(|expected| expected.copy)));
                Backing::Device(handle)
            }
        };
        self.device.memory().settle(failed.place.address, backing);
    }

    /// Waits for the oldest copy in flight, and records where its chunk is now.
    fn retire(&mut self) -> Result<(), SwapError> {
        let Some(oldest) = self.in_flight.pop_front() else { return Ok(()) };
        let driver = self.device.driver;
        let Ends { begin, end } = oldest.ends;
        let arrived = driver.event_synchronize(end);
        self.events.push(oldest.ends);
        if let Err(result) = arrived {
            self.undo(oldest);
            return Err(SwapError::Driver { call: "cuEventSynchronize", result });
        }
        let milliseconds = driver.event_elapsed_ms(begin, end).unwrap_or(0.0);
        self.copying += (f64::from(milliseconds) * MILLISECOND as f64) as Nanos;
        let InFlight { place, transfer, .. } = oldest;
        match transfer {
            Transfer::In { handle, overflow, source } => match source {
                Some(source) if !overflow && source.fingerprints.is_some() => {
                    self.device.memory().settle_kept(place.address, handle, source);
                }
                source => {
                    let backing = if overflow { Backing::Overflow(handle) } else { Backing::Device(handle) };
                    self.device.memory().settle(place.address, backing);
                    self.free_copies(source);
                }
            },
            Transfer::Out { handle, way: WayOut { target, expected, .. } } => {
                if let Some(expected) = expected {
                    self.verify(&place, &target, expected);
                }
                self.release_resident(&place, handle, Backing::Evicted(target))
            }
        }
        Ok(())
    }

    fn free_copies(&self, copies: impl IntoIterator<Item = HostCopy>) {
        copies.into_iter().for_each(|copy| self.device.host.free(copy.memory));
    }

    /// Gives up copies of chunks that are on the GPU, so that `bytes` more of host memory are free. False if there are none.
    fn give_up_copies(&self, bytes: u64) -> bool {
        let copies = self.device.memory().take_kept(bytes);
        let some = !copies.is_empty();
        self.free_copies(copies);
        some
    }

    /// Compares what has just been copied with the copy that was there before.
    fn verify(&self, place: &ChunkMapping, target: &HostCopy, expected: Expected) {
        let unchanged = InUse::Granules(expected.unchanged);
        // SAFETY: the copy into `target` is done, and nothing else writes to either.
        if !unsafe { target.holds_the_same(&expected.copy, place.size, unchanged) } {
            tracing::error!(
                gpu = %self.device.gpu,
                "memory at {:#x} has changed and its fingerprints have not: set NVSHARE_KEEP_COPIES=off on this GPU, and report this as a bug in nvshare",
                place.address
            );
        }
        self.free_copies([expected.copy]);
    }

    /// Gives a chunk's GPU memory back to the pool: its bytes have been copied out, or are all zero.
    fn release_resident(
        &mut self,
        place: &ChunkMapping,
        handle: CUmemGenericAllocationHandle,
        backing: Backing,
    ) {
        // Release first, then account: the GPU never holds more than the accounts say, and what is on its way to a replica.
        self.unmap_or_hand_over(place, handle);
        self.device.memory().settle(place.address, backing);
        self.device.books.give(place.granules());
    }

    fn finish(&mut self) -> Result<(), SwapError> {
        let mut result = Ok(());
        while !self.in_flight.is_empty() {
            // Every chunk must get a final state; the first failure is the one to report.
            result = result.and(self.retire());
        }
        result
    }

    /// Runs `act`, which moves memory and counts the bytes, and waits for its copies. Returns its result, the bytes moved, and
    /// the time it took, ns.
    fn moving<T>(
        &mut self,
        act: impl FnOnce(&mut Self, &mut u64) -> Result<T, SwapError>,
    ) -> (Result<T, SwapError>, u64, Nanos) {
        let (began, mut moved) = (now(), 0);
        self.copying = 0;
        self.forecast = None;
        self.device.set_moving(true);
        let acted = act(self, &mut moved);
        let acted = self.finish().and(acted);
        self.device.set_moving(self.pending.as_ref().is_some_and(PendingScan::holds_memory));
        (acted, moved, now() - began)
    }

    fn fill_all(&mut self, moved: &mut u64) -> Result<Fill, SwapError> {
        loop {
            let filled = self.fill_chunks(moved);
            if !self.drop_what_is_wrong()? || filled != Ok(Fill::Complete) {
                return filled;
            }
        }
    }

    fn fill_chunks(&mut self, moved: &mut u64) -> Result<Fill, SwapError> {
        // A fill means that memory is wanted: release freed memory that was kept for reuse.
        self.device.drop_spares(&mut self.device.memory());
        let (mut refused, mut heard) = (None, None);
        self.spill()?;
        loop {
            if self.takes_handed(&mut heard)? {
                continue;
            }
            let next = self.device.memory().next_missing();
            let Some((place, backing, spill)) = next else {
                self.finish()?;
                return self.bring_home(moved);
            };
            match if spill { TakeOutcome::Ready } else { self.take_for_chunk(place.granules()) } {
                TakeOutcome::Ready => {}
                // The GPU has less usable memory than when the fill began.
                TakeOutcome::TooLarge => {
                    self.device.memory().settle(place.address, backing);
                    if self.spill()? == 0 {
                        // Only reservations are missing, which cannot lie in host memory.
                        self.device.memory().deny_reservations();
                    }
                    continue;
                }
                TakeOutcome::HandedOver => {
                    self.device.memory().settle(place.address, backing);
                    continue;
                }
                TakeOutcome::Interrupted => {
                    self.device.memory().settle(place.address, backing);
                    self.finish()?;
                    return Err(SwapError::Interrupted);
                }
                TakeOutcome::Recalled => {
                    self.device.memory().settle(place.address, backing);
                    self.finish()?;
                    return Ok(Fill::Recalled);
                }
            }
            if place.reservation {
                self.device.memory().settle(place.address, Backing::Booked);
                continue;
            }
            let handle = match self.device.map(&place, spill) {
                Ok(handle) => handle,
                Err(error) => {
                    // Return the granules before the retry. The arbiter estimates the size of contexts from memory that is in
                    // use and not accounted for; granules that are accounted for and not in use would hide a context, and
                    // the arbiter would never make room for it.
                    self.device.memory().settle(place.address, backing);
                    if !spill {
                        self.device.books.give(place.granules());
                    }
                    if spill {
                        return Err(no_host_memory(error));
                    }
                    self.try_again(error, place.size, &mut refused)?;
                    continue;
                }
            };
            let source = match backing {
                Backing::Evicted(copy) => Some(copy),
                _ => None,
            };
            *moved += source.as_ref().map_or(0, |copy| copy.in_use.bytes(place.size));
            self.launch(place, Transfer::In { handle, overflow: spill, source })?;
        }
    }

    /// Fills evicted chunks that fit in free granules of the pool. Chunks with nothing to copy are left for the fill, for
    /// which they cost little. Ends when threads are back that find the client idle, and it can ask for its turn: those of a process
    /// that waits for another GPU first may have stood at the gate all the time.
    fn prefetch_some(&mut self, moved: &mut u64) -> Result<(), SwapError> {
        let books = &self.device.books;
        let idle = books.page().view(books.slot()).phase == Phase::Idle;
        while !(idle && gate().waiting() > 0 && gang::may_ask(self.device.gpu)) {
            let room = self.device.books.ahead();
            let next = self.device.memory().next_evicted(room);
            let Some((place, copy)) = next else { return Ok(()) };
            if !self.device.books.take_ahead(place.granules()) {
                self.device.memory().settle(place.address, Backing::Evicted(copy));
                return Ok(());
            }
            match self.device.map(&place, false) {
                Ok(handle) => {
                    *moved += copy.in_use.bytes(place.size);
                    self.launch(place, Transfer::In { handle, overflow: false, source: Some(copy) })?;
                }
                Err(error) => {
                    // Nothing is lost: the fill will bring it in.
                    self.device.memory().settle(place.address, Backing::Evicted(copy));
                    self.device.books.give(place.granules());
                    tracing::debug!(gpu = %self.device.gpu, "prefetch stopped, the next fill loads the rest: {error}");
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Granules of the client's demand that do not fit on the GPU even if every other client is evicted.
    fn shortage(&self) -> Granules {
        let books = &self.device.books;
        let overflowed = self.device.memory().overflow();
        // Count transfers to host memory that are already in flight, or the same shortage would be spilled twice.
        let under_way = self.in_flight.iter().map(|flight| match flight.transfer {
            Transfer::In { overflow: true, .. } => flight.place.granules(),
            _ => 0,
        });
        let spilled = overflowed + under_way.sum::<Granules>();
        books.demand().saturating_sub(spilled).saturating_sub(books.usable())
    }

    /// Chooses the chunks to fill in host memory because the GPU has no room for them; returns how many granules.
    ///
    /// # Errors
    /// The host has not enough memory; or work is in flight, and there may be enough when it is done ([`HostPool::spare`]).
    ///
    /// [`HostPool::spare`]: crate::memory::host::HostPool::spare
    fn spill(&mut self) -> Result<Granules, SwapError> {
        let shortage = self.shortage();
        let mut memory = self.device.memory();
        let spilled = memory.spill(shortage);
        drop(memory);
        if spilled > 0 {
            let bytes = bytes_of(spilled);
            if let Err(error) = self.device.host.spare(bytes, self.quiet) {
                if !self.quiet && self.device.host.capacity() > 0 {
                    return Err(SwapError::InFlight);
                }
                // With the copies goes what memory from replicas is compared with.
                self.drop_what_is_wrong()?;
                let spared = if self.give_up_copies(u64::MAX) {
                    self.device.host.spare(bytes, self.quiet)
                } else {
                    Err(error)
                };
                spared.map_err(|error| SwapError::Host(error.to_string()))?;
            }
            tracing::info!(
                gpu = %self.device.gpu,
                "this process needs {} more than the GPU has left for it: it uses as much host memory over the link, which is slower",
                format_size(bytes)
            );
        }
        Ok(spilled)
    }

    /// How long a switch takes, ns. The policy has computed `reckoned` from the bytes that go over the link. If most of the last fill came
    /// from replicas, and not over the link, the time of that fill is the better estimate.
    pub fn switch_time(&self, reckoned: Nanos) -> Nanos {
        self.taken_over_in.map_or(reckoned, |took| took.min(reckoned))
    }

    /// Whether the engine is called to another task.
    fn is_called_away(&self) -> bool {
        self.device.engine_context.is_called_away() || !self.quiet && gang::is_called_away(self.device.gpu)
    }

    /// Takes granules for a chunk from the pool. Waits while other clients can still free as many.
    fn take_for_chunk(&self, granules: Granules) -> TakeOutcome {
        let books = &self.device.books;
        // The common case: free granules, so that nothing else need be checked.
        if books.admitted() && books.try_take(granules).is_ok() {
            return TakeOutcome::Ready;
        }
        let too_large = || self.shortage() > 0;
        let called_away = || self.is_called_away();
        loop {
            if !books.admitted() {
                return TakeOutcome::Recalled;
            }
            if called_away() {
                return TakeOutcome::Interrupted;
            }
            if too_large() {
                return TakeOutcome::TooLarge;
            }
            if self.has_handed() {
                return TakeOutcome::HandedOver;
            }
            let gives_up = || too_large() || called_away() || self.has_handed();
            if books.take_unless(granules, gives_up) == Fill::Complete {
                return TakeOutcome::Ready;
            }
        }
    }

    /// Moves chunks that are mapped to host memory back to the GPU, as far as there is room. All other chunks are in place.
    fn bring_home(&mut self, moved: &mut u64) -> Result<Fill, SwapError> {
        if !self.quiet || self.device.memory().overflow() == 0 {
            return Ok(Fill::Complete);
        }
        let driver = self.device.driver;
        let mut home = 0;
        loop {
            let Some((place, host)) = self.device.memory().next_overflow() else { break };
            let settle = |backing| self.device.memory().settle(place.address, backing);
            match self.take_for_chunk(place.granules()) {
                TakeOutcome::Ready => {}
                TakeOutcome::Recalled => {
                    settle(Backing::Overflow(host));
                    return Ok(Fill::Recalled);
                }
                TakeOutcome::TooLarge | TakeOutcome::Interrupted | TakeOutcome::HandedOver => {
                    settle(Backing::Overflow(host));
                    break;
                }
            }
            // Copy it to a temporary address while it is still mapped at its own.
            let size = place.size as usize;
            let began = now();
            let arrived = driver
                .mem_address_reserve(size, GRANULE as usize, 0, 0)
                .map_err(driver_said("cuMemAddressReserve"))
                .and_then(|address| {
                    let staging = ChunkMapping { address, views: Vec::new(), ..place.clone() };
                    let copied = self.device.map(&staging, false).and_then(|handle| {
                        let copied = driver
                            .memcpy_dtod_async(address, place.address, size, self.stream)
                            .and_then(|()| driver.stream_synchronize(self.stream));
                        self.device.unmap(&staging);
                        copied.map(|()| handle).map_err(|result| {
                            let _ = driver.mem_release(handle);
                            SwapError::Driver { call: "cuMemcpyDtoDAsync", result }
                        })
                    });
                    let _ = driver.mem_address_free(address, size);
                    copied
                });
            match arrived {
                Ok(handle) => {
                    self.device.unmap(&place);
                    if let Err(error) = self.device.map_at(&place, handle) {
                        let _ = driver.mem_release(handle);
                        self.device.books.give(place.granules());
                        // Its bytes are still in host memory.
                        let back = self.device.map_at(&place, host);
                        settle(Backing::Overflow(host));
                        back?;
                        tracing::debug!(gpu = %self.device.gpu, "stays in host memory: {error}");
                        break;
                    }
                    let _ = driver.mem_release(host);
                    settle(Backing::Device(handle));
                    self.copying += now() - began;
                    *moved += place.size;
                    home += place.size;
                }
                Err(error) => {
                    settle(Backing::Overflow(host));
                    self.device.books.give(place.granules());
                    tracing::debug!(gpu = %self.device.gpu, "stays in host memory: {error}");
                    break;
                }
            }
        }
        if home > 0 {
            tracing::info!(gpu = %self.device.gpu, "{} are back from host memory", format_size(home));
        }
        Ok(Fill::Complete)
    }

    /// Waits 20 ms after the driver refused memory although the pool had granules: a context has grown and is not counted
    /// yet, or another program uses the GPU without nvshare. `refused` is when the first such refusal was, ns.
    ///
    /// # Errors
    /// The driver has refused for [`CREATE_TIMEOUT`], or the error is another.
    fn try_again(&self, error: SwapError, size: u64, refused: &mut Option<Nanos>) -> Result<(), SwapError> {
        if !error.is_out_of_memory() {
            return Err(error);
        }
        let why = || {
            format!(
                "the GPU has no {} that should be free: a CUDA context has grown, or a program uses the GPU without nvshare (see nvidia-smi)",
                format_size(size)
            )
        };
        let since = *refused.get_or_insert_with(|| {
            tracing::warn!(gpu = %self.device.gpu, "{}; retrying for {}", why(), format_nanos(CREATE_TIMEOUT));
            now()
        });
        if now() - since >= CREATE_TIMEOUT {
            return Err(SwapError::Gpu(why()));
        }
        // Nothing signals that memory outside nvshare's accounts was freed.
        std::thread::sleep(Duration::from_millis(20));
        Ok(())
    }

    /// Evicts `granules`, as far as there is host memory: if a chunk does not fit in it, smaller chunks are evicted instead.
    fn evict_some(&mut self, granules: Granules, moved: &mut u64) -> Result<(), SwapError> {
        self.agree_on_key();
        self.scan_unseen()?;
        let spare = self.device.drop_spares(&mut self.device.memory());
        let (mut left, mut most, mut refused) = (granules.saturating_sub(spare), u64::MAX, None);
        let resident = self.device.books.resident();
        // What is on its way out, granules.
        let mut leaving = 0;
        let mut lacked = self.offer(left);
        while left > 0 {
            // Others may have given way meanwhile whose memory is needed later, and nobody may need it any more.
            let gone = resident.saturating_sub(self.device.books.resident());
            left = left.min(self.device.books.to_evict().saturating_sub(leaving - gone.min(leaving)));
            if left == 0 {
                break;
            }
            let first = lacked.pop_front();
            let next = match first {
                Some(address) => self.device.memory().take_resident(address),
                None => self.device.memory().next_resident(most),
            };
            if first.is_some() && next.is_none() {
                continue;
            }
            let Some(Outgoing { place, backing, seen, kept, changed }) = next else { break };
            let Backing::Device(handle) = backing else {
                self.device.memory().settle(place.address, Backing::Absent);
                self.device.books.give(place.granules());
                left = left.saturating_sub(place.granules());
                leaving += place.granules();
                continue;
            };
            let bytes = seen.in_use.bytes(place.size);
            // A copy that has no place for what is in use now is of no use.
            let (kept, stale) = if changed.is_some() { (kept, None) } else { (None, kept) };
            self.free_copies(stale);
            if bytes == 0 {
                self.free_copies(kept);
                self.device.books.elided(place.size);
                self.release_resident(&place, handle, Backing::Absent);
                left = left.saturating_sub(place.granules());
                leaving += place.granules();
                continue;
            }
            let way = match self.way_out(&place, seen, kept.zip(changed)) {
                Ok(way) => way,
                Err((error, kept)) => {
                    match kept {
                        Some(kept) => self.device.memory().settle_kept(place.address, handle, kept),
                        None => self.device.memory().settle(place.address, Backing::Device(handle)),
                    }
                    if !self.give_up_copies(bytes) {
                        // Smaller each time, so the loop ends.
                        most = error.left().min(bytes - GRANULE);
                        refused = Some(SwapError::Host(error.to_string()));
                    }
                    continue;
                }
            };
            self.device.books.elided(place.size.saturating_sub(bytes));
            left = left.saturating_sub(place.granules());
            leaving += place.granules();
            let copied: u64 = way.target.pieces_of(place.size, way.changed).map(|(.., length)| length).sum();
            *moved += copied;
            self.device.books.unchanged(bytes - copied);
            if copied == 0 {
                self.release_resident(&place, handle, Backing::Evicted(way.target));
            } else {
                self.launch(place, Transfer::Out { handle, way })?;
            }
        }
        refused.filter(|_| left > 0).map_or(Ok(()), Err)
    }

    /// How a chunk leaves the GPU in which scans have found this: into its kept copy, as far as it has changed, or into new host
    /// memory.
    ///
    /// # Errors
    /// There is no host memory. With the kept copy.
    fn way_out(
        &self,
        place: &ChunkMapping,
        seen: Seen,
        kept: Option<(HostCopy, u32)>,
    ) -> Result<WayOut, (HostPoolError, Option<HostCopy>)> {
        let verifies = keep_copies() == KeepCopies::Verify;
        let Seen { in_use, fingerprints } = seen;
        let (kept, changed) = match kept {
            Some((kept, changed)) if !verifies => {
                let (target, changed) = (HostCopy { fingerprints, ..kept }, InUse::Granules(changed));
                return Ok(WayOut { target, changed, expected: None });
            }
            Some((kept, changed)) => (Some(kept), changed),
            None => (None, u32::MAX),
        };
        match self.device.host.alloc(in_use.bytes(place.size)) {
            Ok(memory) => {
                let target = HostCopy { memory, in_use, fingerprints };
                let expected = kept.map(|copy| Expected { copy, unchanged: !changed });
                Ok(WayOut { target, changed: InUse::All, expected })
            }
            Err(error) => Err((error, kept)),
        }
    }

    /// The key with which fingerprints are taken.
    fn keys(&self) -> [u64; 2] {
        self.giving.as_ref().map_or_else(own_keys, |giving| giving.group().key().halves())
    }

    /// Scans the chunks that were not scanned since the client last ran. None of the client's work may be under way: the
    /// engine drains before it evicts.
    fn scan_unseen(&mut self) -> Result<(), SwapError> {
        let (unseen, tried) = {
            let memory = self.device.memory();
            let unseen = memory.unseen();
            let tried = if keep_copies() == KeepCopies::Off { Vec::new() } else { memory.tried(&unseen) };
            (unseen, tried)
        };
        if unseen.is_empty() {
            return Ok(());
        }
        let keeps = !tried.is_empty();
        let keys = self.keys();
        let (device, stream) = (&self.device, self.stream);
        if keeps {
            // So that both kernels are compiled at the same time, if they must be.
            self.fingerprints.prepare(device);
        }
        let Some(scanner) = self.zero_scan.load(device) else { return Ok(()) };
        let scan = scanner.scan(&unseen, stream, [0; 2])?;
        let fingerprints = if keeps { self.fingerprints.load(device) } else { None };
        let mut found = BTreeMap::new();
        if let Some(scanner) = fingerprints {
            let scan = scanner.scan(&tried, stream, keys)?;
            let answers = scanner.finish(scan)?;
            found.extend(tried.iter().map(|(address, _)| *address).zip(answers));
        }
        let seen = scanner.finish(scan)?;
        let mut memory = device.memory();
        for ((address, size), bits) in unseen.into_iter().zip(seen) {
            let all = InUse::Granules(bits).bytes(size) == size;
            let in_use = if all { InUse::All } else { InUse::Granules(bits) };
            memory.saw(address, Seen { in_use, fingerprints: found.remove(&address).map(Arc::new) });
        }
        Ok(())
    }

    /// Submits a scan of chunks for granules that are zero, if the kernel is loaded; with no chunks, a probe of when the GPU runs it.
    fn submit_scan(&mut self, chunks: &[(CUdeviceptr, u64)]) -> Result<Option<Scan<ZeroEntry>>, SwapError> {
        // What must be compiled is compiled meanwhile, so that the first eviction need not wait for that. It is loaded then.
        self.zero_scan.prepare(&self.device);
        if keep_copies() != KeepCopies::Off {
            self.fingerprints.prepare(&self.device);
        }
        let Some(scanner) = self.zero_scan.ready() else { return Ok(None) };
        scanner.scan(chunks, self.stream, [0; 2]).map(Some)
    }

    /// Loads the kernels for scans, if their code is at hand. Only while no work of the client is in flight.
    fn load_kernels(&mut self) {
        if self.quiet {
            self.zero_scan.load_if_compiled(&self.device);
            if keep_copies() != KeepCopies::Off {
                self.fingerprints.load_if_compiled(&self.device);
            }
        }
    }

    /// Bytes that evicting everything would copy now, so that host memory can be allocated before it is needed. The
    /// application's work continues, so this is only a forecast. Nothing may be unmapped while the GPU scans it, so frees wait
    /// as they do while memory moves.
    ///
    /// `None` if the GPU has not run the scan yet, because the application's work takes long or never ends; call again. Frees
    /// do not wait for that: memory is scanned only if the GPU has just run a probe.
    pub fn forecast(&mut self) -> Option<u64> {
        if let Some(bytes) = self.forecast.take() {
            return Some(bytes);
        }
        let until = now() + FORECAST_WAIT;
        if !self.pending.as_ref().is_some_and(PendingScan::holds_memory) {
            if !self.probe(until)? {
                return Some(self.unseen_bytes());
            }
            self.device.set_moving(true);
            let chunks = self.device.memory().unseen();
            match self.submit_scan(&chunks) {
                Ok(Some(scan)) => self.pending = Some(PendingScan::Memory(scan)),
                Ok(None) | Err(_) => {
                    self.device.set_moving(false);
                    return Some(self.unseen_bytes());
                }
            }
        }
        self.is_answered(until).then_some(())?;
        Some(self.finish_scan().unwrap_or_else(|| self.unseen_bytes()))
    }

    /// Whether the GPU has just run a probe beside the application's work; `None` if not until `until`, ns. False if the GPU
    /// cannot scan.
    fn probe(&mut self, until: Nanos) -> Option<bool> {
        if self.probed.take().is_some_and(|ended| now() - ended < FORECAST_WAIT) {
            return Some(true);
        }
        if self.pending.is_none() {
            let Ok(Some(scan)) = self.submit_scan(&[]) else { return Some(false) };
            self.pending = Some(PendingScan::Probe(scan));
        }
        self.is_answered(until).then(|| {
            self.finish_scan();
            true
        })
    }

    fn unseen_bytes(&self) -> u64 {
        self.device.memory().unseen().iter().map(|(_, size)| size).sum()
    }

    /// Waits for the pending scan until `until`, ns. Whether it has ended.
    fn is_answered(&self, until: Nanos) -> bool {
        let Some(pending) = &self.pending else { return true };
        while !pending.scan().is_answered(self.device.driver) {
            if now() >= until {
                return false;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        true
    }

    /// Ends a pending scan that the GPU has run, even if nobody asks for the forecast again: memory counts as moving while it
    /// is scanned, and threads of the application wait. False if memory is still being scanned.
    pub fn end_forecast(&mut self) -> bool {
        let Some(pending) = &self.pending else { return true };
        let holds_memory = pending.holds_memory();
        if !pending.scan().is_answered(self.device.driver) {
            return !holds_memory;
        }
        let bytes = self.finish_scan();
        if holds_memory {
            self.forecast = Some(bytes.unwrap_or_else(|| self.unseen_bytes()));
        } else {
            self.probed = Some(now());
        }
        true
    }

    /// Waits for the pending scan. The bytes in use, if it was a scan of memory and succeeded.
    fn finish_scan(&mut self) -> Option<u64> {
        let pending = self.pending.take()?;
        let held = pending.holds_memory();
        let (PendingScan::Probe(scan) | PendingScan::Memory(scan)) = pending;
        let seen = match &mut self.zero_scan {
            Kernel::Ready(scanner) => scanner.finish(scan).ok(),
            _ => None,
        };
        if held {
            self.device.set_moving(false);
        }
        let bits = seen.filter(|_| held)?;
        Some(bits.iter().map(|bits| u64::from(bits.count_ones()) * GRANULE).sum())
    }

    fn log(&self, what: &str, bytes: u64, took: Nanos) {
        tracing::debug!(
            gpu = %self.device.gpu,
            slot = self.device.books.slot().get(),
            at_ns = now(),
            "{what} {} in {} ({:.1} GiB/s)",
            format_size(bytes),
            format_nanos(took),
            bytes as f64 / took.max(1) as f64 * 1e9 / (1u64 << 30) as f64
        );
    }
}

/// Whether the pool has granules for a chunk.
enum TakeOutcome {
    /// Its granules are taken.
    Ready,
    /// The client's memory does not fit on the GPU: some must be spilled to host memory first.
    TooLarge,
    /// The client is no longer admitted.
    Recalled,
    /// The engine is called to another task, and will fill again afterwards.
    Interrupted,
    /// A replica has handed memory over, which is taken first.
    HandedOver,
}

impl Runtime for Swap {
    type Error = SwapError;

    fn fill(&mut self) -> Result<Fill, SwapError> {
        // The process's next GPU can be asked for and filled at the same time.
        gang::filling(self.device.gpu);
        self.load_kernels();
        let (filled, moved, took) = self.moving(Self::fill_all);
        self.end_taking();
        let taken = self.arrivals.take();
        if moved > 0 || taken.is_some() {
            self.taken_over_in = taken.filter(|(_, bytes)| *bytes > moved).map(|(since, _)| now() - since);
        }
        // Only the time of the copies counts, not the time waiting for another client to evict.
        self.device.books.copied(Direction::In, moved, self.copying);
        if moved > 0 {
            self.log("filled", moved, took);
        }
        filled
    }

    fn prefetch(&mut self) -> Result<(), SwapError> {
        let (fetched, moved, took) = self.moving(Self::prefetch_some);
        // Other clients use the GPU and the link meanwhile, so the time taken says nothing about the bandwidth of the link.
        self.device.books.moved(Direction::In, moved);
        if moved > 0 {
            self.log("prefetched", moved, took);
        }
        fetched
    }

    fn evict(&mut self, granules: Granules) -> Result<(), SwapError> {
        let (evicted, moved, took) = self.moving(|swap, moved| swap.evict_some(granules, moved));
        self.end_handing();
        // Only the time of the copies counts, not that of allocating host memory (once per process) and of scanning.
        self.device.books.copied(Direction::Out, moved, self.copying);
        self.log("evicted", moved, took);
        evicted
    }
}
