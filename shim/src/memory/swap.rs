//! The swap engine: moves chunks between the GPU and the host, in bulk and in a pipeline.
//!
//! Up to [`DEPTH`] copies are in flight, so that the link never waits for a mapping: while one chunk is
//! copied, the one before it is unmapped and released, or the one after it created and mapped. Each
//! chunk's granules go to the pool, or come from it, as its turn comes, and so the client that fills
//! follows the client that evicts at a distance of a few chunks.
//!
//! What holds nothing but zeros is not copied: before anything goes out, the GPU itself looks at all of it
//! ([`crate::memory::zero_scan`]), once for each time that the client ran. Such chunks are dropped, and come back as fresh
//! memory, which is zero (docs/driver-facts.md); of others only the granules in use travel.
//!
//! What the GPU cannot have, because the contexts of others have taken the room, is mapped to host memory
//! ([`Backing::Overflow`]): the GPU uses it over the link. It comes home at the first fill that has room.
//!
//! A chunk on its way is [`Backing::Moving`] and belongs to this engine alone; the map is locked only
//! for the moments between.

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::memory::device::Device;
use crate::memory::error::{SwapError, driver_said};
use crate::memory::region::{Backing, ChunkMapping, HostCopy, InUse};
use crate::memory::zero_scan::{Loading, Scan, Scanner};
use nvshare::page::Direction;
use nvshare::sync::now;
use nvshare::units::{GRANULE, Granules, MILLISECOND, Nanos, SECOND, bytes_of, format_nanos, format_size};
use nvshare::{Fill, Runtime};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Copies in flight. On an H100 (PCIe 5), eight switch at 39.6 GiB/s and four at 38.9 (docs/benchmarks.md).
const DEPTH: usize = 8;

/// How long a forecast waits for the GPU.
const FORECAST_WAIT: Nanos = 5 * MILLISECOND;

/// How long a fill tries again when the driver has no memory although the pool had room, before it lets others go first.
const CREATE_TIMEOUT: Nanos = 5 * SECOND;

/// The events before a copy and behind it.
#[derive(Clone, Copy)]
struct Ends {
    begin: CUevent,
    end: CUevent,
}

/// A stream, and the events of each copy in flight and of one more, in the current context.
fn lines(driver: &Driver) -> Result<(CUstream, Vec<Ends>), SwapError> {
    let stream = driver.stream_create(CU_STREAM_NON_BLOCKING).map_err(driver_said("cuStreamCreate"))?;
    let event = || driver.event_create(CU_EVENT_BLOCKING_SYNC).map_err(driver_said("cuEventCreate"));
    let events =
        (0..=DEPTH).map(|_| Ok(Ends { begin: event()?, end: event()? })).collect::<Result<_, _>>()?;
    Ok((stream, events))
}

/// What it comes to that host memory could not be mapped.
fn for_want_of_host_memory(error: SwapError) -> SwapError {
    if error.is_out_of_memory() {
        SwapError::Host("the driver gives none that the GPU can use".into())
    } else {
        error
    }
}

/// A copy in flight, and what becomes of its chunk.
struct InFlight {
    place: ChunkMapping,
    ends: Ends,
    transfer: Transfer,
}

enum Transfer {
    /// Comes in; the host copy is free when it is there.
    In { handle: CUmemGenericAllocationHandle, overflow: bool, source: Option<HostCopy> },
    /// Goes out; the GPU memory is free when it is gone.
    Out { handle: CUmemGenericAllocationHandle, target: HostCopy },
}

/// Looks for granules that are all zero.
enum ZeroScan {
    /// Nothing was evicted yet.
    NotTried,
    Loading(Loading),
    Ready(Scanner),
    /// The driver cannot compile the kernel: everything is copied.
    Unavailable,
}

/// What a forecast waits for.
enum Asked {
    /// Whether the GPU comes to anything beside the application's work: it looks at nothing.
    Whether(Scan),
    /// What it finds in memory, which counts as moving meanwhile.
    What(Scan),
}

impl Asked {
    fn scan(&self) -> &Scan {
        let (Self::Whether(scan) | Self::What(scan)) = self;
        scan
    }

    /// Whether memory is being looked at.
    fn holds_memory(&self) -> bool {
        matches!(self, Self::What(..))
    }
}

/// Moves one client's memory.
pub struct Swap {
    device: Arc<Device>,
    stream: CUstream,
    events: Vec<Ends>,
    in_flight: VecDeque<InFlight>,
    /// How long copies have taken since memory last began to move, by the GPU's clock, ns.
    copying: Nanos,
    zero_scan: ZeroScan,
    /// What is under way for a forecast.
    asked: Option<Asked>,
    /// When the GPU was last seen to have come to nothing but a look, and nobody has made use of that since.
    came: Option<Nanos>,
    /// What a forecast came to whose caller was gone by then.
    foreseen: Option<u64>,
    /// No work of the client is under way: what it has may be moved to other memory.
    pub quiet: bool,
}

impl Swap {
    /// An engine whose streams belong to the context that is current.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: Arc<Device>) -> Result<Self, SwapError> {
        let (stream, events) = lines(device.driver)?;
        Ok(Self {
            device,
            stream,
            events,
            in_flight: VecDeque::new(),
            copying: 0,
            zero_scan: ZeroScan::NotTried,
            asked: None,
            came: None,
            foreseen: None,
            quiet: true,
        })
    }

    /// Makes the stream and the events anew in `context`, which becomes current.
    ///
    /// # Errors
    /// The driver's.
    pub fn move_to(&mut self, context: CUcontext) -> Result<(), SwapError> {
        self.leave();
        self.device.driver.ctx_set_current(context).map_err(driver_said("cuCtxSetCurrent"))?;
        (self.stream, self.events) = lines(self.device.driver)?;
        Ok(())
    }

    /// Gives the stream and the events back.
    pub fn destroy(mut self) {
        self.leave();
    }

    /// Gives the stream and the events back, if it has any. The context may end then.
    pub fn leave(&mut self) {
        if self.stream.is_null() {
            return;
        }
        let _ = self.finish();
        let _ = self.answer();
        match std::mem::replace(&mut self.zero_scan, ZeroScan::NotTried) {
            ZeroScan::Ready(scanner) => scanner.destroy(),
            // It is waited for.
            ZeroScan::Loading(loading) => drop(loading),
            ZeroScan::NotTried | ZeroScan::Unavailable => {}
        }
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
            Transfer::Out { target, .. } => target.pieces(place.size).try_for_each(
                // SAFETY: as above, and nobody else writes to it.
                |(at, target, length)| unsafe {
                    driver.memcpy_dtoh_async(target, place.address + at, length as usize, self.stream)
                },
            ),
        });
        let recorded = copied.and_then(|()| driver.event_record(ends.end, self.stream));
        self.in_flight.push_back(InFlight { place, ends, transfer });
        if let Err(result) = recorded {
            // The chunk goes back to where it was: its bytes are still there.
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

    /// A copy that did not happen: the bytes are where they were.
    fn undo(&self, failed: InFlight) {
        let backing = match failed.transfer {
            Transfer::In { handle, overflow, source } => {
                self.device.release(&failed.place, handle);
                if !overflow {
                    self.device.books.give(failed.place.granules());
                }
                source.map_or(Backing::Absent, Backing::Evicted)
            }
            Transfer::Out { handle, target } => {
                self.device.host.free(target.memory);
                Backing::Device(handle)
            }
        };
        self.device.memory().settle(failed.place.address, backing);
    }

    /// Waits for the oldest copy in flight, and writes down where its chunk is now.
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
            Transfer::In { handle, overflow, source } => {
                let backing = if overflow { Backing::Overflow(handle) } else { Backing::Device(handle) };
                self.device.memory().settle(place.address, backing);
                if let Some(source) = source {
                    self.device.host.free(source.memory);
                }
            }
            Transfer::Out { handle, target } => self.gone(&place, handle, Backing::Evicted(target)),
        }
        Ok(())
    }

    /// A chunk's bytes are elsewhere, or nowhere: its GPU memory goes back to the pool.
    fn gone(&self, place: &ChunkMapping, handle: CUmemGenericAllocationHandle, backing: Backing) {
        // Released first and counted after: the GPU never holds more than the books say.
        self.device.release(place, handle);
        self.device.memory().settle(place.address, backing);
        self.device.books.give(place.granules());
    }

    fn finish(&mut self) -> Result<(), SwapError> {
        let mut result = Ok(());
        while !self.in_flight.is_empty() {
            // Every chunk must end somewhere; the first failure is the one to tell.
            result = result.and(self.retire());
        }
        result
    }

    /// Moves memory by what `act` does, which counts the bytes. What came of it when all copies are through, the bytes, and how
    /// long it took, ns.
    fn moving<T>(
        &mut self,
        act: impl FnOnce(&mut Self, &mut u64) -> Result<T, SwapError>,
    ) -> (Result<T, SwapError>, u64, Nanos) {
        let (began, mut moved) = (now(), 0);
        self.copying = 0;
        self.foreseen = None;
        self.device.set_moving(true);
        let acted = act(self, &mut moved);
        let acted = self.finish().and(acted);
        self.device.set_moving(self.asked.as_ref().is_some_and(Asked::holds_memory));
        (acted, moved, now() - began)
    }

    fn fill_all(&mut self, moved: &mut u64) -> Result<Fill, SwapError> {
        // Something found no room: what nobody needs must not be in its way.
        self.device.drop_spares(&mut self.device.memory());
        let mut refused = None;
        self.spill()?;
        loop {
            let next = self.device.memory().next_missing();
            let Some((place, backing, spill)) = next else {
                self.finish()?;
                return self.bring_home(moved);
            };
            match if spill { TakeOutcome::Ready } else { self.take_for_chunk(place.granules()) } {
                TakeOutcome::Ready => {}
                // Less is usable than when the fill began.
                TakeOutcome::TooLarge => {
                    self.device.memory().settle(place.address, backing);
                    if self.spill()? == 0 {
                        // Only room is missing, which nothing but the GPU can give.
                        self.device.memory().deny_reservations();
                    }
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
                    // Given back before the next try: what is booked and not there hides somebody's
                    // context from the arbiter, which would then never make the room.
                    self.device.memory().settle(place.address, backing);
                    if !spill {
                        self.device.books.give(place.granules());
                    }
                    if spill {
                        return Err(for_want_of_host_memory(error));
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

    /// Brings in what was evicted and fits in free room. What has no bytes to copy is left for the fill, which is
    /// quick with it.
    fn prefetch_some(&mut self, moved: &mut u64) -> Result<(), SwapError> {
        loop {
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
                    // Nothing is lost: its turn will come.
                    self.device.memory().settle(place.address, Backing::Evicted(copy));
                    self.device.books.give(place.granules());
                    tracing::debug!(gpu = %self.device.gpu, "nothing more ahead of its turn: {error}");
                    return Ok(());
                }
            }
        }
    }

    /// Granules that the client needs and the GPU cannot give it whoever else makes room.
    fn shortage(&self) -> Granules {
        let books = &self.device.books;
        let overflowed = self.device.memory().overflow();
        // What is on its way there is as good as there: or as much again would follow it.
        let under_way = self.in_flight.iter().map(|flight| match flight.transfer {
            Transfer::In { overflow: true, .. } => flight.place.granules(),
            _ => 0,
        });
        let spilled = overflowed + under_way.sum::<Granules>();
        books.demand().saturating_sub(spilled).saturating_sub(books.usable())
    }

    /// Chooses what goes to host memory for want of room; says how many granules.
    ///
    /// # Errors
    /// The host has no memory for so many.
    fn spill(&self) -> Result<Granules, SwapError> {
        let shortage = self.shortage();
        let mut memory = self.device.memory();
        let spilled = memory.spill(shortage);
        drop(memory);
        if spilled > 0 {
            let bytes = bytes_of(spilled);
            self.device.host.spare(bytes).map_err(|error| SwapError::Host(error.to_string()))?;
            tracing::info!(
                gpu = %self.device.gpu,
                "{} more than the GPU has left for this process: they are used from host memory, over the link",
                format_size(bytes)
            );
        }
        Ok(spilled)
    }

    /// Room for a chunk of this size. Waits for the pool as long as the pool can ever have it.
    fn take_for_chunk(&self, granules: Granules) -> TakeOutcome {
        let books = &self.device.books;
        // As long as there is room, nothing more need be known.
        if books.admitted() && books.try_take(granules).is_ok() {
            return TakeOutcome::Ready;
        }
        let too_large = || self.shortage() > 0;
        let called_away = || self.device.engine_context.is_called_away();
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
            if books.take_unless(granules, || too_large() || called_away()) == Fill::Complete {
                return TakeOutcome::Ready;
            }
        }
    }

    /// Brings what lies in host memory back to the GPU, as far as it can have room there. All else is in place.
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
                TakeOutcome::TooLarge | TakeOutcome::Interrupted => {
                    settle(Backing::Overflow(host));
                    break;
                }
            }
            // A place to copy it to while it is still mapped at its own.
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
                        // Where it was, its bytes still are.
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

    /// The driver had no room that the pool had: a context grew that is not counted yet, or a program uses
    /// the GPU beside nvshare. Waits a little.
    ///
    /// # Errors
    /// That went on for too long, or something else is wrong.
    fn try_again(&self, error: SwapError, size: u64, refused: &mut Option<Nanos>) -> Result<(), SwapError> {
        if !error.is_out_of_memory() {
            return Err(error);
        }
        let why = || {
            format!(
                "the GPU has no room for {} that the pool had: a context has grown, or another program uses the GPU beside nvshare",
                format_size(size)
            )
        };
        let since = *refused.get_or_insert_with(|| {
            tracing::warn!(gpu = %self.device.gpu, "{}; trying again for {}", why(), format_nanos(CREATE_TIMEOUT));
            now()
        });
        if now() - since >= CREATE_TIMEOUT {
            return Err(SwapError::Gpu(why()));
        }
        // Nothing announces that memory outside the books was freed.
        std::thread::sleep(Duration::from_millis(20));
        Ok(())
    }

    /// Evicts so many granules, as far as there is host memory for them: when there is none for a chunk, smaller ones go.
    fn evict_some(&mut self, granules: Granules, moved: &mut u64) -> Result<(), SwapError> {
        self.look()?;
        let spare = self.device.drop_spares(&mut self.device.memory());
        let (mut left, mut most, mut refused) = (granules.saturating_sub(spare), u64::MAX, None);
        let resident = self.device.books.resident();
        // What is on its way out, granules.
        let mut leaving = 0;
        while left > 0 {
            // Others may have given way meanwhile whose memory is needed later, and nobody may need it any more.
            let gone = resident.saturating_sub(self.device.books.resident());
            left = left.min(self.device.books.to_evict().saturating_sub(leaving - gone.min(leaving)));
            if left == 0 {
                break;
            }
            let next = self.device.memory().next_resident(most);
            let Some((place, backing, in_use)) = next else { break };
            let Backing::Device(handle) = backing else {
                self.device.memory().settle(place.address, Backing::Absent);
                self.device.books.give(place.granules());
                left = left.saturating_sub(place.granules());
                leaving += place.granules();
                continue;
            };
            let bytes = in_use.bytes(place.size);
            if bytes == 0 {
                self.gone(&place, handle, Backing::Absent);
                left = left.saturating_sub(place.granules());
                leaving += place.granules();
                continue;
            }
            let target = match self.device.host.alloc(bytes) {
                Ok(memory) => HostCopy { memory, in_use },
                Err(error) => {
                    self.device.memory().settle(place.address, Backing::Device(handle));
                    // Less each time, so this ends.
                    most = error.left().min(bytes - GRANULE);
                    refused = Some(SwapError::Host(error.to_string()));
                    continue;
                }
            };
            *moved += bytes;
            left = left.saturating_sub(place.granules());
            leaving += place.granules();
            self.launch(place, Transfer::Out { handle, target })?;
        }
        refused.filter(|_| left > 0).map_or(Ok(()), Err)
    }

    /// Finds out what of the client's memory is in use, where that is not known. Only while none of its work
    /// is under way: whoever evicts has drained.
    fn look(&mut self) -> Result<(), SwapError> {
        let unseen = self.device.memory().unseen();
        let Some(seen) = self.scan(&unseen)? else { return Ok(()) };
        let mut memory = self.device.memory();
        for ((address, size), bits) in unseen.into_iter().zip(seen) {
            let all = InUse::Granules(bits).bytes(size) == size;
            memory.saw(address, if all { InUse::All } else { InUse::Granules(bits) });
        }
        Ok(())
    }

    /// A bit for each granule of each chunk that is in use; `None` if there is no telling.
    fn scan(&mut self, chunks: &[(CUdeviceptr, u64)]) -> Result<Option<Vec<u32>>, SwapError> {
        if chunks.is_empty() {
            return Ok(None);
        }
        match (self.ask(chunks)?, &mut self.zero_scan) {
            (Some(scan), ZeroScan::Ready(scanner)) => scanner.finish(scan).map(Some),
            _ => Ok(None),
        }
    }

    /// Has the GPU look at chunks, if it can; at none, so that it is known when it has come to it.
    fn ask(&mut self, chunks: &[(CUdeviceptr, u64)]) -> Result<Option<Scan>, SwapError> {
        self.open_eyes();
        let ZeroScan::Ready(scanner) = &mut self.zero_scan else { return Ok(None) };
        scanner.scan(chunks, self.stream).map(Some)
    }

    fn open_eyes(&mut self) {
        if matches!(self.zero_scan, ZeroScan::NotTried) {
            let driver = self.device.driver;
            let context = driver.ctx_current().unwrap_or(CUcontext::NULL);
            match Loading::begin(driver, context) {
                Ok(loading) => self.zero_scan = ZeroScan::Loading(loading),
                Err(error) => return self.stay_blind(&error),
            }
        }
        let ZeroScan::Loading(loading) = &mut self.zero_scan else { return };
        match loading.look() {
            Some(Ok(scanner)) => self.zero_scan = ZeroScan::Ready(scanner),
            Some(Err(error)) => self.stay_blind(&error),
            None => {}
        }
    }

    fn stay_blind(&mut self, why: &dyn std::fmt::Display) {
        tracing::info!(gpu = %self.device.gpu, "memory that is all zero will be copied like any other: {why}");
        self.zero_scan = ZeroScan::Unavailable;
    }

    /// Bytes that an eviction of everything would copy, as things stand: for making host memory ahead of
    /// need. The application's work goes on meanwhile, so this is no more than a forecast; but nothing may be
    /// unmapped while the GPU looks at it, so frees wait as they do while memory moves.
    ///
    /// `None` if the GPU has not come to it yet: the application's work may take long, or never end. Then nothing is held
    /// back: memory is looked at only when the GPU has just come to something else. Ask again.
    pub fn forecast(&mut self) -> Option<u64> {
        if let Some(bytes) = self.foreseen.take() {
            return Some(bytes);
        }
        let until = now() + FORECAST_WAIT;
        if !self.asked.as_ref().is_some_and(Asked::holds_memory) {
            if !self.gpu_comes(until)? {
                return Some(self.unseen_bytes());
            }
            self.device.set_moving(true);
            let chunks = self.device.memory().unseen();
            match self.ask(&chunks) {
                Ok(Some(scan)) => self.asked = Some(Asked::What(scan)),
                Ok(None) | Err(_) => {
                    self.device.set_moving(false);
                    return Some(self.unseen_bytes());
                }
            }
        }
        self.is_answered(until).then_some(())?;
        Some(self.answer().unwrap_or_else(|| self.unseen_bytes()))
    }

    /// Whether the GPU has just come to something beside the application's work; `None` if not, by then, ns. False if it cannot
    /// be asked.
    fn gpu_comes(&mut self, until: Nanos) -> Option<bool> {
        if self.came.take().is_some_and(|came| now() - came < FORECAST_WAIT) {
            return Some(true);
        }
        if self.asked.is_none() {
            let Ok(Some(scan)) = self.ask(&[]) else { return Some(false) };
            self.asked = Some(Asked::Whether(scan));
        }
        self.is_answered(until).then(|| {
            self.answer();
            true
        })
    }

    fn unseen_bytes(&self) -> u64 {
        self.device.memory().unseen().iter().map(|(_, size)| size).sum()
    }

    /// Waits for the answer until then, ns. Whether it is there.
    fn is_answered(&self, until: Nanos) -> bool {
        let Some(asked) = &self.asked else { return true };
        while !asked.scan().is_answered(self.device.driver) {
            if now() >= until {
                return false;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        true
    }

    /// Ends a look whose answer is there, whether or not anybody asks for the forecast again: as long as memory is looked at it
    /// counts as moving, and threads of the application wait. False if the GPU has not come to it yet.
    pub fn end_forecast(&mut self) -> bool {
        let Some(asked) = &self.asked else { return true };
        let holds_memory = asked.holds_memory();
        if !asked.scan().is_answered(self.device.driver) {
            return !holds_memory;
        }
        let bytes = self.answer();
        if holds_memory {
            self.foreseen = Some(bytes.unwrap_or_else(|| self.unseen_bytes()));
        } else {
            self.came = Some(now());
        }
        true
    }

    /// Waits for what is under way. Bytes that are in use, if that was asked and there is telling.
    fn answer(&mut self) -> Option<u64> {
        let asked = self.asked.take()?;
        let held = asked.holds_memory();
        let (Asked::Whether(scan) | Asked::What(scan)) = asked;
        let seen = match &mut self.zero_scan {
            ZeroScan::Ready(scanner) => scanner.finish(scan).ok(),
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

/// Whether a chunk can go to the GPU.
enum TakeOutcome {
    /// Its granules are taken.
    Ready,
    /// Not before something else goes to host memory.
    TooLarge,
    /// The client may load no more.
    Recalled,
    /// The engine has something else to do, and tries again.
    Interrupted,
}

impl Runtime for Swap {
    type Error = SwapError;

    fn fill(&mut self) -> Result<Fill, SwapError> {
        let (filled, moved, took) = self.moving(Self::fill_all);
        // The time spent waiting for the other side's memory, while copies may be in flight, is the other side's.
        self.device.books.copied(Direction::In, moved, self.copying);
        if moved > 0 {
            self.log("filled", moved, took);
        }
        filled
    }

    fn prefetch(&mut self) -> Result<(), SwapError> {
        let (fetched, moved, took) = self.moving(Self::prefetch_some);
        // Others use the GPU and the link meanwhile: how long it took says nothing of the link.
        self.device.books.moved(Direction::In, moved);
        if moved > 0 {
            self.log("prefetched", moved, took);
        }
        fetched
    }

    fn evict(&mut self, granules: Granules) -> Result<(), SwapError> {
        let (evicted, moved, took) = self.moving(|swap, moved| swap.evict_some(granules, moved));
        // Not the time spent making host memory, which each process does once, and looking for zeros.
        self.device.books.copied(Direction::Out, moved, self.copying);
        self.log("evicted", moved, took);
        evicted
    }
}
