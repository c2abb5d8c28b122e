//! The swap engine: moves chunks between the GPU and the host, in bulk and in a pipeline.
//!
//! Up to [`DEPTH`] copies are in flight, so that the link never waits for a mapping: while one chunk is
//! copied, the one before it is unmapped and released, or the one after it created and mapped. Each
//! chunk's granules go to the pool, or come from it, as its turn comes, and so the client that fills
//! follows the client that evicts at a distance of a few chunks.
//!
//! A chunk on its way is [`Backing::Moving`] and belongs to this engine alone; the map is locked only
//! for the moments between.

use crate::abi::*;
use crate::device::Shared;
use crate::driver::Driver;
use crate::hostpool::HostBlock;
use crate::memory::Backing;
use nvshare::page::Direction;
use nvshare::sync::now;
use nvshare::units::{GRANULE, Granules, Nanos, SECOND, format_nanos, format_size};
use nvshare::{Fill, Runtime};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Copies in flight. On an H100 (PCIe 5), eight switch at 39.6 GiB/s and four at 38.9 (docs/benchmarks.md).
const DEPTH: usize = 8;

/// How long a fill tries again when the driver has no memory although the pool had room.
const CREATE_PATIENCE: Nanos = 30 * SECOND;

/// Why memory could not be moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SwapError {
    /// The driver refused.
    Driver {
        /// What was tried.
        call: &'static str,
        /// What it said.
        result: CuResult,
    },
    /// There is no host memory for a copy.
    Host(String),
}

impl std::fmt::Display for SwapError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Driver { call, result } => write!(out, "{call} said {result}"),
            Self::Host(why) => write!(out, "no host memory for a copy: {why}"),
        }
    }
}

/// A stream, and an event for each copy in flight and one more, in the current context.
fn lines(driver: &Driver) -> Result<(CUstream, Vec<CUevent>), SwapError> {
    let stream = driver.stream_create(CU_STREAM_NON_BLOCKING).map_err(driver_said("cuStreamCreate"))?;
    let events = (0..=DEPTH)
        .map(|_| driver.event_create(CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING))
        .collect::<Result<_, _>>()
        .map_err(driver_said("cuEventCreate"))?;
    Ok((stream, events))
}

/// Makes an error of what the driver said to `call`.
pub fn driver_said(call: &'static str) -> impl Fn(CuResult) -> SwapError {
    move |result| SwapError::Driver { call, result }
}

/// A copy in flight, and what becomes of its chunk.
struct InFlight {
    address: CUdeviceptr,
    size: u64,
    event: CUevent,
    cargo: Cargo,
}

enum Cargo {
    /// Comes in; the host copy is free when it is there.
    In { handle: CUmemGenericAllocationHandle, overflow: bool, source: Option<HostBlock> },
    /// Goes out; the GPU memory is free when it is gone.
    Out { handle: CUmemGenericAllocationHandle, target: HostBlock },
}

/// Moves one client's memory.
pub struct Swap {
    shared: Arc<Shared>,
    stream: CUstream,
    events: Vec<CUevent>,
    in_flight: VecDeque<InFlight>,
}

impl Swap {
    /// An engine whose streams belong to the context that is current.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(shared: Arc<Shared>) -> Result<Self, SwapError> {
        let (stream, events) = lines(shared.driver)?;
        Ok(Self { shared, stream, events, in_flight: VecDeque::new() })
    }

    /// Makes the stream and the events anew in `context`, which becomes current.
    ///
    /// # Errors
    /// The driver's.
    pub fn move_to(&mut self, context: CUcontext) -> Result<(), SwapError> {
        self.give_back();
        self.shared.driver.ctx_set_current(context).map_err(driver_said("cuCtxSetCurrent"))?;
        (self.stream, self.events) = lines(self.shared.driver)?;
        Ok(())
    }

    /// Gives the stream and the events back.
    pub fn destroy(mut self) {
        self.give_back();
    }

    fn give_back(&mut self) {
        let _ = self.finish();
        for event in self.events.drain(..) {
            let _ = self.shared.driver.event_destroy(event);
        }
        let _ = self.shared.driver.stream_destroy(self.stream);
    }

    fn launch(&mut self, address: CUdeviceptr, size: u64, cargo: Cargo) -> Result<(), SwapError> {
        let driver = self.shared.driver;
        let event = self.events.pop().expect("one event more than copies in flight");
        let copied = match &cargo {
            // SAFETY: the block is `size` bytes of ours, and stays until the event has passed.
            Cargo::In { source: Some(block), .. } => unsafe {
                driver.memcpy_htod_async(address, block.as_ptr(), size as usize, self.stream)
            },
            Cargo::In { source: None, .. } => Ok(()),
            // SAFETY: as above, and nobody else writes to it.
            Cargo::Out { target, .. } => unsafe {
                driver.memcpy_dtoh_async(target.as_ptr(), address, size as usize, self.stream)
            },
        };
        let recorded = copied.and_then(|()| driver.event_record(event, self.stream));
        self.in_flight.push_back(InFlight { address, size, event, cargo });
        if let Err(result) = recorded {
            // The chunk goes back to where it was: its bytes are still there.
            let failed = self.in_flight.pop_back().expect("just pushed");
            self.events.push(failed.event);
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
        let backing = match failed.cargo {
            Cargo::In { handle, overflow, source } => {
                self.shared.release(failed.address, failed.size, handle);
                if !overflow {
                    self.shared.books.give((failed.size / GRANULE) as Granules);
                }
                source.map_or(Backing::Absent, Backing::Evicted)
            }
            Cargo::Out { handle, target } => {
                self.shared.host.free(target);
                Backing::Device(handle)
            }
        };
        self.shared.memory().settle(failed.address, backing);
    }

    /// Waits for the oldest copy in flight, and writes down where its chunk is now.
    fn retire(&mut self) -> Result<(), SwapError> {
        let Some(oldest) = self.in_flight.pop_front() else { return Ok(()) };
        let arrived = self.shared.driver.event_synchronize(oldest.event);
        self.events.push(oldest.event);
        if let Err(result) = arrived {
            self.undo(oldest);
            return Err(SwapError::Driver { call: "cuEventSynchronize", result });
        }
        let InFlight { address, size, cargo, .. } = oldest;
        match cargo {
            Cargo::In { handle, overflow, source } => {
                let backing = if overflow { Backing::Overflow(handle) } else { Backing::Device(handle) };
                self.shared.memory().settle(address, backing);
                if let Some(source) = source {
                    self.shared.host.free(source);
                }
            }
            Cargo::Out { handle, target } => {
                // Released first and counted after: the GPU never holds more than the books say.
                self.shared.release(address, size, handle);
                self.shared.memory().settle(address, Backing::Evicted(target));
                self.shared.books.give((size / GRANULE) as Granules);
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), SwapError> {
        let mut result = Ok(());
        while !self.in_flight.is_empty() {
            // Every chunk must end somewhere; the first failure is the one to tell.
            result = result.and(self.retire());
        }
        result
    }

    fn fill_all(&mut self, moved: &mut u64, starved: &mut Nanos) -> Result<Fill, SwapError> {
        let mut refused = None;
        loop {
            let Some((address, size, backing)) = self.shared.memory().next_missing() else {
                self.finish()?;
                return Ok(Fill::Complete);
            };
            let granules = (size / GRANULE) as Granules;
            let began = now();
            let room = self.room_for(granules);
            *starved += now() - began;
            let overflow = match room {
                Room::Pool => false,
                Room::Host => true,
                Room::Recalled => {
                    self.shared.memory().settle(address, backing);
                    self.finish()?;
                    return Ok(Fill::Recalled);
                }
            };
            let handle = match self.shared.map(address, size, overflow) {
                Ok(handle) => handle,
                Err(error) => {
                    // Given back before the next try: what is booked and not there hides somebody's
                    // context from the arbiter, which would then never make the room.
                    self.shared.memory().settle(address, backing);
                    if !overflow {
                        self.shared.books.give(granules);
                    }
                    if overflow || !self.may_try_again(&error, size, &mut refused) {
                        return Err(error);
                    }
                    continue;
                }
            };
            let source = match backing {
                Backing::Evicted(block) => Some(block),
                _ => None,
            };
            if source.is_some() {
                *moved += size;
            }
            self.launch(address, size, Cargo::In { handle, overflow, source })?;
        }
    }

    /// Where a chunk of this size can go. Waits for the pool as long as the pool can ever have it.
    fn room_for(&mut self, granules: Granules) -> Room {
        let (books, shared) = (&self.shared.books, &self.shared);
        let too_large = || {
            let overflowed = shared.memory().overflow();
            books.demand().saturating_sub(overflowed) > books.usable()
        };
        loop {
            if !books.admitted() {
                return Room::Recalled;
            }
            if too_large() {
                return Room::Host;
            }
            if books.take_unless(granules, too_large) == Fill::Complete {
                return Room::Pool;
            }
        }
    }

    /// The driver had no room that the pool had: a context grew that is not counted yet, or a program uses
    /// the GPU beside nvshare. Waits a little. False if that went on for too long.
    fn may_try_again(&self, error: &SwapError, size: u64, refused: &mut Option<Nanos>) -> bool {
        if !matches!(error, SwapError::Driver { result: CuResult::OUT_OF_MEMORY, .. }) {
            return false;
        }
        let since = *refused.get_or_insert_with(|| {
            tracing::warn!(
                gpu = %self.shared.gpu,
                "the GPU has no room for {} that the pool had: a context has grown, or another program uses the GPU beside nvshare; trying again for {}",
                format_size(size),
                format_nanos(CREATE_PATIENCE)
            );
            now()
        });
        // Nothing announces that memory outside the books was freed.
        std::thread::sleep(Duration::from_millis(20));
        now() - since < CREATE_PATIENCE
    }

    fn evict_some(&mut self, granules: Granules, moved: &mut u64) -> Result<(), SwapError> {
        let mut left = granules;
        while left > 0 {
            let Some((address, size, handle)) = self.shared.memory().next_resident() else { break };
            let target = match self.shared.host.alloc(size as usize) {
                Ok(block) => block,
                Err(error) => {
                    self.shared.memory().settle(address, Backing::Device(handle));
                    return Err(SwapError::Host(error.to_string()));
                }
            };
            *moved += size;
            left = left.saturating_sub((size / GRANULE) as Granules);
            self.launch(address, size, Cargo::Out { handle, target })?;
        }
        Ok(())
    }

    fn log(&self, what: &str, bytes: u64, took: Nanos) {
        tracing::debug!(
            gpu = %self.shared.gpu,
            slot = self.shared.books.slot().get(),
            "{what} {} in {} ({:.1} GiB/s)",
            format_size(bytes),
            format_nanos(took),
            bytes as f64 / took.max(1) as f64 * 1e9 / (1u64 << 30) as f64
        );
    }
}

enum Room {
    Pool,
    Host,
    Recalled,
}

impl Runtime for Swap {
    type Error = SwapError;

    fn fill(&mut self) -> Result<Fill, SwapError> {
        let (began, mut moved, mut starved) = (now(), 0, 0);
        self.shared.memory().moving = true;
        let filled = self.fill_all(&mut moved, &mut starved);
        let filled = self.finish().and(filled);
        self.shared.memory().moving = false;
        let took = now() - began;
        // The time spent waiting for the other side is the other side's.
        self.shared.books.copied(Direction::In, moved, took.saturating_sub(starved));
        if moved > 0 {
            self.log("filled", moved, took);
        }
        self.shared.bury();
        filled
    }

    fn evict(&mut self, granules: Granules) -> Result<(), SwapError> {
        let (began, mut moved) = (now(), 0);
        self.shared.memory().moving = true;
        let evicted = self.evict_some(granules, &mut moved);
        let evicted = self.finish().and(evicted);
        self.shared.memory().moving = false;
        let took = now() - began;
        self.shared.books.copied(Direction::Out, moved, took);
        self.log("evicted", moved, took);
        self.shared.bury();
        evicted
    }
}
