//! Room for a context on a GPU that others have filled.
//!
//! The driver makes a context in memory of its own and knows nobody whom it could ask to make room, so it says
//! OUT_OF_MEMORY, and most applications end there. What the other clients have can move; only, a process asks for it as
//! a client, and becomes one when it has a context. So whoever finds no memory for its first context registers before
//! it has one, takes *room* in the calling thread (granules like any others, for which it waits its turn, and behind
//! which nothing is mapped), and makes the call again. With the context it attaches by the very same slot; without, it
//! leaves.
//!
//! A process that has attached to the GPU already takes room as for anything else that the driver places
//! ([`crate::process::reservation`]).
//!
//! **From room to context.** While the room is held it hides the context: the arbiter counts as a context what the
//! process has on the GPU beyond its granules. So the granules are given back, and for a moment the pool shows as free
//! what is not. The client keeps its right to as many until the arbiter has seen the context
//! ([`FirstContext::hand_over`]), and as a right counts as something lacking, those who are not admitted go on making room
//! for it: who is admitted beside it may find the driver short once or twice, and not until the arbiter looks. The
//! client's slice never begins, so none ends meanwhile.
//!
//! **Several GPUs.** This asks for one GPU while the process may have others, whatever their order ([`nvshare::gang_order`]),
//! and still nobody blocks anybody:
//!
//! - What is held here is held only until a call of the driver's returns and the arbiter has looked, or for a bounded
//!   while without an arbiter. Nothing else is waited for with it in hand, so whoever waits for this GPU waits for
//!   no other because of it.
//! - What the process has of its other GPUs does not depend on what is waited for here. This GPU is none of those that
//!   it must have to run, its engines know nothing of it, and so each of its slices ends as if nobody waited here. For
//!   that the waiting thread keeps from nothing that a drain waits for: it is outside the gate, it has no lock but
//!   [`MAKING`], which no engine takes, and no capture is open or can begin, since one that waits for
//!   this thread would never end.
//!
//! So an edge of "waits for" ends here or begins here, and no chain goes through.

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

/// A client without an engine: it has registered, and holds nothing.
pub type UnattachedClient = Client<MappedPage>;

/// Granules that are taken at a time, as others give them back.
const CHUNK: Granules = 32;

/// How long the right to what was given back is kept for an arbiter that does not look. One that is there looks twice
/// as often at least.
const SEEN_WITHIN: Nanos = 2 * SECOND;

/// Between two looks whether the arbiter has looked.
const POLL_INTERVAL: Nanos = 10 * MILLISECOND;

/// One at a time: the next one finds the process attached, or more room.
static MAKING: Mutex<()> = Mutex::new(());

/// What became of a context on `device`, given that the driver said `result` to the first `call` for it. Makes room and
/// the call again if the driver had no memory. With the first context of the process comes the client that attaches by
/// it.
pub fn with_room(
    result: CuResult,
    device: CUdevice,
    call: impl Fn() -> CuResult,
) -> (CuResult, Option<UnattachedClient>) {
    // A call within a call cannot wait: a drain would wait for it.
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
            "none can be made while a graph is being captured on another GPU; make the context before or after",
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
            refuse(gpu, &format!("none can be made: {error}"));
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
            "the GPU was full: made this process's context after {}, with {held} of room, which was back after another {}",
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
                "{held} of room did not do; of the pool's {} the contexts of other processes and memory that cannot move take {}. End a process on this GPU (`nvshare status` lists them), or start this one on another",
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

/// Takes granules, and moves nothing. Whoever needs room can do with less than it asked for: what the GPU cannot have,
/// because a context was made or grew meanwhile, is not waited for.
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

/// A client that has registered to make its context.
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

    /// Makes the call with more and more room, up to all that takes turns.
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
            let room = format_size(bytes_of(tried));
            tracing::debug!(%gpu, "the driver is out of memory for a context: made room for {room}, trying again");
            let result = call();
            if result != CuResult::OUT_OF_MEMORY {
                return result;
            }
        }
        CuResult::OUT_OF_MEMORY
    }

    /// Waits for its turn, and until it has so many granules, or as many as the GPU can have.
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
                // Recalled as it asked for more: nothing of its own is under way.
                Next::Yield => self.client.release(true),
                // The slice does not begin, so that it does not end in the middle of the driver's call.
                Next::Open => {}
            }
        }
    }

    /// Gives the room back, and with it the right to run, as soon as the arbiter has counted the context.
    fn hand_over(mut self) -> UnattachedClient {
        let (page, slot) = (self.books.page(), self.books.slot());
        let (counted, until) = (page.view(slot).context, now() + SEEN_WITHIN);
        self.books.give(self.books.resident());
        loop {
            let (seen, time) = (page.doorbell(slot), now());
            // What the process has beyond its granules is more now: the next sample shows more.
            if page.view(slot).context > counted {
                break;
            }
            // Recalled, because a context grew elsewhere: there is nothing left to keep.
            if time >= until || !self.books.admitted() {
                tracing::debug!(
                    gpu = %page.gpu(),
                    "the arbiter has not counted this process's context yet: until it has, others may find less memory than the pool shows"
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
