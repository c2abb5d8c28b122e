//! Granules for a process's first context on a GPU that other processes have filled.
//!
//! The driver allocates a context in its own memory and cannot ask other processes to make room. It returns
//! OUT_OF_MEMORY, and most applications then exit. The memory of other clients could be evicted, but only a client can ask for
//! that, and normally a process becomes one when it has a context. So a process that finds no memory for its first context
//! registers before it has one, makes a reservation in the calling thread (granules for which it waits for its turn, and
//! at which nothing is mapped), and repeats the call. If that succeeds, it attaches with the same slot; if not, it
//! gives up the slot.
//!
//! A process that has attached to the GPU already makes a reservation as for other memory that the driver places
//! ([`crate::process::reservation`]).
//!
//! **From reservation to context.** The arbiter counts as a context the memory that a process has on the GPU beyond its
//! granules, so as long as the reservation is held, the context is not seen. Therefore the granules are given back, and for a
//! moment the pool shows granules as free that the context occupies. The client keeps its demand for as many until the
//! arbiter has counted the context ([`FirstContext::hand_over`]). Because the demand counts as missing memory, clients that are
//! not admitted go on evicting for it. A client that is admitted beside this one may therefore find the driver short of
//! memory once or twice, but does not have to wait for the arbiter. The slice of this client never begins, so it cannot end
//! meanwhile.
//!
//! **Several GPUs.** This waits for one GPU while the process may hold others, whatever their order
//! ([`nvshare::gang_order`]). There is no deadlock, because:
//!
//! - The granules are held only until a call to the driver returns and the arbiter has counted the context, or for a bounded
//!   time without an arbiter. The process waits for nothing else while it holds them, so a client that waits for this GPU does
//!   not wait for any other GPU because of it.
//! - Giving up the process's other GPUs does not depend on the wait here. This GPU is not yet one of those that
//!   the process must have to run, and the engines of the others do not know of it, so their slices end as usual. The waiting
//!   thread holds nothing for which a drain waits: it is outside the gate, holds no lock except
//!   [`MAKING`], which no engine takes, and no capture is open or can begin (a capture that waited for
//!   this thread would never end).
//!
//! So in the graph of who waits for whom, a path may begin or end here, but none passes through.

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::memory::device::Device;
use crate::memory::devices;
use crate::process::attach;
use crate::process::reservation::{self, TRIES};
use crate::state;
use crate::submit::captures::CaptureHold;
use crate::submit::pass;
use nvshare::client::Next;
use nvshare::map::MappedPage;
use nvshare::sync::now;
use nvshare::units::{
    GpuUuid, Granules, MILLISECOND, Nanos, SECOND, bytes_of, format_nanos, format_size, granules_for,
};
use nvshare::{Books, Client, Fill, Phase, Runtime};
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

/// A client that has registered and has neither an engine nor memory yet.
pub type UnattachedClient = Client<MappedPage>;

/// How many granules are taken from the pool at a time, while other clients give them back.
const CHUNK: Granules = 32;

/// How long the client keeps its demand if the arbiter does not count the context. A running arbiter does so at least
/// twice in that time.
const SEEN_WITHIN: Nanos = 2 * SECOND;

/// The interval at which it is checked whether the arbiter has counted the context.
const POLL_INTERVAL: Nanos = 10 * MILLISECOND;

/// Held by a thread that makes a first context. The next thread may find the process attached, or more memory.
static MAKING: Mutex<()> = Mutex::new(());

/// The result of a `call` that creates a context on `device` and has returned `result` the first time. If the driver had no
/// memory, makes room and repeats the call. For a first context it also returns the client with which the process attaches.
pub fn with_room(
    result: CuResult,
    device: CUdevice,
    call: impl Fn() -> CuResult,
) -> (CuResult, Option<UnattachedClient>) {
    // A call within another call cannot wait for a turn, because a drain would wait for the outer call.
    if result != CuResult::OUT_OF_MEMORY || !state::enabled() || pass::is_inside() {
        return (result, None);
    }
    make_first(device, call)
}

#[cold]
fn make_first(device: CUdevice, call: impl Fn() -> CuResult) -> (CuResult, Option<UnattachedClient>) {
    let nothing = (CuResult::OUT_OF_MEMORY, None);
    let beside =
        |(device, context): (Arc<Device>, CUcontext)| (reservation::make_room(&device, context, &call), None);
    if let Some(attached) = devices::attached(device) {
        return beside(attached);
    }
    let Some(gpu) = Driver::get().ok().and_then(|driver| driver.device_uuid(device).ok()) else {
        return nothing;
    };
    let gpu = GpuUuid(gpu.bytes);
    let Some(hold) = CaptureHold::unless_capturing() else {
        refuse(
            gpu,
            "no room can be made for it while a graph is being captured on another GPU; create the context before or after the capture",
        );
        return nothing;
    };
    let one = nvshare::sync::lock(&MAKING);
    if let Some(attached) = devices::attached(device) {
        drop((one, hold));
        return beside(attached);
    }
    let client = match attach::register(gpu) {
        Ok(client) => client,
        Err(error) => {
            refuse(gpu, &format!("no room can be made for it: {error}"));
            return nothing;
        }
    };
    let (mut first, began) = (FirstContext::new(client), now());
    let result = first.make(&call);
    let held = format_size(bytes_of(first.books.resident()));
    if result.is_success() {
        let (ready, client) = (now(), first.hand_over());
        tracing::info!(
            %gpu,
            slot = client.books().slot().get(),
            "the GPU was full: this process's context was created after {}, in {held} reserved for it, which were returned after another {}",
            format_nanos(ready - began),
            format_nanos(now() - ready)
        );
        return (result, Some(client));
    }
    if result == CuResult::OUT_OF_MEMORY {
        let page = first.books.page();
        let (pool, movable) = (page.capacity(), first.books.usable().min(page.capacity()));
        refuse(
            gpu,
            &format!(
                "{held} reserved for it were not enough; of the pool's {} the contexts of other processes and memory that cannot move take {}. End a process on this GPU (`nvshare status` lists them), or start this one on another",
                format_size(bytes_of(pool)),
                format_size(bytes_of(pool - movable))
            ),
        );
    }
    first.client.leave();
    (result, None)
}

fn refuse(gpu: GpuUuid, why: &str) {
    tracing::error!(
        %gpu,
        "the driver has no memory for this process's first context (CUDA_ERROR_OUT_OF_MEMORY), and {why}"
    );
}

/// A runtime that takes granules and moves nothing. If the GPU has fewer usable granules than the reservation asks for,
/// because a context was created or has grown meanwhile, the reservation becomes smaller instead of waiting.
struct ReservationRuntime(Books<MappedPage>);

impl ReservationRuntime {
    fn excess(&self) -> Granules {
        self.0.demand().saturating_sub(self.0.usable())
    }
}

impl Runtime for ReservationRuntime {
    type Error = Infallible;

    fn fill(&mut self) -> Result<Fill, Infallible> {
        loop {
            let excess = self.excess();
            if excess > 0 {
                self.0.shrink(excess);
            }
            let missing = self.0.demand().saturating_sub(self.0.resident());
            if missing == 0 {
                return Ok(Fill::Complete);
            }
            let taken = self.0.take_unless(missing.min(CHUNK), || self.excess() > 0);
            if taken == Fill::Recalled && !self.0.admitted() {
                return Ok(Fill::Recalled);
            }
        }
    }

    fn evict(&mut self, granules: Granules) -> Result<(), Infallible> {
        self.0.give(granules);
        Ok(())
    }
}

/// A client that has registered before its context exists.
struct FirstContext {
    client: UnattachedClient,
    books: Books<MappedPage>,
    runtime: ReservationRuntime,
}

impl FirstContext {
    fn new(client: UnattachedClient) -> Self {
        let books = client.books().clone();
        Self { runtime: ReservationRuntime(books.clone()), client, books }
    }

    /// Repeats the call with larger and larger reservations, up to all usable granules.
    fn make(&mut self, call: impl Fn() -> CuResult) -> CuResult {
        let gpu = self.books.page().gpu();
        let mut tried = 0;
        for bytes in TRIES {
            let granules = granules_for(bytes).min(self.books.usable());
            if granules <= tried {
                break;
            }
            self.hold(granules);
            tried = self.books.resident();
            let reserved = format_size(bytes_of(tried));
            tracing::debug!(%gpu, "the driver is out of memory for a context: reserved {reserved}, trying again");
            let result = call();
            if result != CuResult::OUT_OF_MEMORY {
                return result;
            }
        }
        CuResult::OUT_OF_MEMORY
    }

    /// Waits for the client's turn, and until it has `granules`, or as many as the GPU has usable.
    fn hold(&mut self, granules: Granules) {
        self.books.grow(granules.saturating_sub(self.books.demand()));
        self.client.request();
        self.client.refill();
        while self.client.phase() != Phase::Running {
            let Ok(next) = self.client.poll(&mut self.runtime);
            match next {
                Next::Sleep { seen, until } => {
                    self.books.page().wait_doorbell(self.books.slot(), seen, until);
                }
                // Recalled when it asked for more: it has no work to drain.
                Next::Yield => self.client.release(true),
                // The slice is not begun, so that it cannot end during the driver's call.
                Next::Open => {}
            }
        }
    }

    /// Gives the granules back, and the demand too as soon as the arbiter has counted the context.
    fn hand_over(mut self) -> UnattachedClient {
        let (page, slot) = (self.books.page(), self.books.slot());
        let (counted, until) = (page.view(slot).context, now() + SEEN_WITHIN);
        self.books.give(self.books.resident());
        loop {
            let (seen, time) = (page.doorbell(slot), now());
            // The arbiter's next sample finds that the process has more memory than granules, and counts it.
            if page.view(slot).context > counted {
                break;
            }
            // If it was recalled, because another context has grown, there is nothing left to keep.
            if time >= until || !self.books.admitted() {
                tracing::debug!(
                    gpu = %page.gpu(),
                    "the arbiter has not counted this process's context yet: until it has, other processes may find less memory than the pool shows"
                );
                break;
            }
            page.wait_doorbell(slot, seen, Some(time + POLL_INTERVAL));
        }
        self.client.release(false);
        self.books.shrink(self.books.demand());
        self.client
    }
}
