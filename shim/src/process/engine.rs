//! The engine: one thread per GPU that walks the client through its phases.
//!
//! It sleeps on the slot's doorbell, which rings for everything that concerns it: a decision of another
//! client's, a thread at the gate, an allocation that found no room, a capture that ended. While nobody
//! else wants the GPU it never wakes.

mod ending;
mod giving_way;
mod host_shortage;
mod idle;

use crate::cuda::abi::*;
use crate::ipc::Closing;
use crate::memory::device::Device;
use crate::memory::engine_context::Successor;
use crate::memory::error::SwapError;
use crate::memory::map::Left;
use crate::memory::swap::Swap;
use crate::process::engine::host_shortage::HostShortage;
use crate::state;
use crate::submit::drain::CompletionMarker;
use crate::submit::gate::gate;
use crate::submit::{captures, flow, gang};
use giving_way::{GivingWay, Look};
use idle::{Idle, Use};
use nvshare::client::Next;
use nvshare::map::MappedPage;
use nvshare::sync::now;
use nvshare::units::{Granules, MILLISECOND, Nanos, SECOND, bytes_of, format_nanos};
use nvshare::{Client, Phase, policy};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Starts the engine of a client that has just registered.
///
/// # Errors
/// The system has no thread for it.
pub fn start(
    device: Arc<Device>,
    client: Client<MappedPage>,
    context: CUcontext,
) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(THREAD.into()).spawn(move || {
        // The application's signals are for its own threads.
        let _ = nix::sys::signal::SigSet::all().thread_set_mask();
        // It looks at work in flight at moments that it chooses to the microsecond.
        let _ = nix::sys::prctl::set_timerslack(1_000);
        ending::run_to_the_end(device, client, context);
    })
}

/// What the engine's thread is called.
pub const THREAD: &str = "nvshare";

/// How often a client with memory in host memory looks whether the GPU has room for it again.
const OVERFLOW_POLL_INTERVAL: Nanos = 500 * MILLISECOND;

/// How often an engine looks whether the work is done that may use what was freed.
const TIDY_POLL_INTERVAL: Nanos = 5 * MILLISECOND;

/// The longest rest between two tries to bring home what lies in host memory, of a client that cannot be drained.
const COMES_HOME_REST: Nanos = 60 * SECOND;

/// A sleep until then, ns, and no longer than until `again`.
fn by(until: Option<Nanos>, again: Nanos) -> Option<Nanos> {
    Some(until.map_or(again, |until| until.min(again)))
}

/// What becomes of memory that lies in host memory for want of room.
enum Overflow {
    ComesHome,
    /// Until somebody looks again, ns.
    Stays(Nanos),
}

/// Whether a client that waits still makes something of its turn.
enum Turn {
    Wanted,
    /// Nobody stands at the gate yet; look again at this time, ns.
    Look(Nanos),
    NotWanted,
}

struct Engine {
    device: Arc<Device>,
    client: Client<MappedPage>,
    swap: Swap,
    idle: Idle,
    flow_control: bool,
    /// When it was last through with draining, ns.
    drained_at: Nanos,
    growing: Arc<AtomicBool>,
    /// The demand that host memory was last made for, granules.
    grown_for: Granules,
    /// There is no host memory for what it should evict.
    host_shortage: HostShortage,
    /// It gives way, or tries to.
    giving_way: Option<GivingWay>,
    /// The end of the work that may use what was freed, and what that is.
    burial: Option<(Option<CompletionMarker>, Left)>,
    /// The same, for memory of other processes that was closed.
    closing: Option<(Option<CompletionMarker>, Closing)>,
    /// What lies in host memory is not tried to bring home before, ns, and how long after that again.
    comes_home: (Nanos, Nanos),
}

impl Engine {
    fn new(device: Arc<Device>, client: Client<MappedPage>, swap: Swap, flow_control: bool) -> Self {
        let (idle, growing) = Default::default();
        Self {
            device,
            client,
            swap,
            idle,
            flow_control,
            drained_at: 0,
            growing,
            grown_for: 0,
            giving_way: None,
            burial: None,
            closing: None,
            comes_home: (0, OVERFLOW_POLL_INTERVAL),
            host_shortage: HostShortage::default(),
        }
    }

    /// Walks the client through its phases, until its last context goes.
    ///
    /// # Errors
    /// Why it cannot any more: memory could not be moved, or the process breaks down for the sake of another GPU.
    fn run(&mut self) -> Result<(), SwapError> {
        loop {
            if self.device.engine_context.is_leaving() {
                return Ok(());
            }
            state::intact().map_err(|result| SwapError::Driver { call: "another GPU's engine", result })?;
            if let Some(successor) = self.device.engine_context.successor() {
                self.move_to(successor)?;
                continue;
            }
            match self.client.poll(&mut self.swap) {
                Ok(Next::Open) => self.open(),
                // Recalled while it made use of the GPU: it has more to do, as far as anybody knows yet.
                Ok(Next::Yield) => self.give_way(true),
                Ok(Next::Sleep { seen, until }) => self.rest(seen, until),
                Err(SwapError::Interrupted) => {}
                Err(SwapError::Host(why) | SwapError::Gpu(why)) => self.no_memory(&why),
                Err(error) => return Err(error),
            }
        }
    }

    fn page(&self) -> &nvshare::Page {
        self.device.books.page()
    }

    fn slot(&self) -> nvshare::SlotIndex {
        self.device.books.slot()
    }

    /// The context that the engine lives in may be destroyed. If others of the process go on, everything that is bound to
    /// it is made anew in one of those. If not, it is given back, and made anew in the same one if that stays after all.
    /// Nothing is being copied now.
    fn move_to(&mut self, successor: Successor) -> Result<(), SwapError> {
        self.idle.drop_markers();
        self.burial = None;
        if let Some((mark, _)) = &mut self.closing {
            *mark = None;
        }
        self.giving_way.iter_mut().for_each(GivingWay::drop_markers);
        flow::drop_markers();
        match successor {
            Successor::Context(context) => {
                self.swap.move_to(context)?;
                self.device.engine_context.moved_to(context, &self.device.host);
                tracing::debug!(gpu = %self.device.gpu, "moved to another context: the one before is destroyed");
            }
            Successor::None => {
                self.await_growing();
                // Nobody would hear that others want them, until the driver has decided.
                self.device.drop_spares(&mut self.device.memory());
                self.swap.leave();
                let _ = self.device.driver.ctx_set_current(CUcontext::NULL);
                if let Some(context) = self.device.engine_context.out_of_context(&self.device.host) {
                    self.swap.move_to(context)?;
                    tracing::debug!(gpu = %self.device.gpu, "back in its context: the driver did not destroy it");
                }
            }
        }
        Ok(())
    }

    /// Waits for the thread that makes host memory.
    fn await_growing(&self) {
        while self.growing.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
    }

    /// All memory is in place. Under the map's lock, because an allocation must not slip in between the
    /// last look and the gate (I2).
    fn open(&mut self) {
        self.limit();
        let mut memory = self.device.memory();
        if memory.is_missing() {
            drop(memory);
            self.client.refill();
            return;
        }
        memory.open = true;
        memory.unsee();
        self.swap.quiet = false;
        gang::ready(self.device.gpu);
        drop(memory);
        self.host_shortage.filled(&self.device);
        self.idle.begins();
        tracing::trace!(gpu = %self.device.gpu, "running");
    }

    /// Something may be due that the page does not know of; if not, sleep.
    fn rest(&mut self, seen: u32, until: Option<Nanos>) {
        // Everything that a ring announces is looked at here, after `seen` was read: a ring that came
        // before that is not waited for, so what it announced must not be missed.
        if self.device.engine_context.is_leaving() || self.device.engine_context.successor().is_some() {
            return;
        }
        let until = if self.tidy_up() { until } else { by(until, now() + TIDY_POLL_INTERVAL) };
        let gpu = self.device.gpu;
        let host_shortage = self.host_shortage.look(&self.device);
        let spares = self.device.tidy_spares();
        let until = match self.client.phase() {
            Phase::Idle if self.host_shortage.asks_at().is_some() => self.host_shortage.asks_at(),
            Phase::Idle if gate().waiting() > 0 && gang::may_ask(gpu) => {
                self.idle.returns();
                return self.client.request();
            }
            Phase::Running => {
                self.limit();
                if gang::must_give_up(gpu) {
                    return self.give_way(false);
                }
                if self.grown() {
                    return;
                }
                let until = if self.grow_host_pool() { until } else { by(until, now() + TIDY_POLL_INTERVAL) };
                let until = match self.overflow_look() {
                    Some(Overflow::ComesHome) => return self.give_way(true),
                    Some(Overflow::Stays(look_again)) => by(until, look_again),
                    None => until,
                };
                match policy::needed(&self.device.snapshot()) {
                    None => by(until, self.note_use()),
                    Some(switch) => match self.look_idle(switch) {
                        Use::Idle => return self.give_way(false),
                        Use::Look(again) => by(until, again),
                        Use::Kept => until,
                    },
                }
            }
            Phase::Waiting if gang::must_give_up(gpu) => {
                self.client.withdraw();
                return gang::out(gpu);
            }
            Phase::Draining => match self.look_drained() {
                Look::Drained => return self.gave_way(),
                Look::Again(_) if self.resume_if_not_needed() => return,
                Look::Again(look_again) => by(until, look_again),
            },
            Phase::Waiting => {
                gang::waiting(gpu);
                self.grow_host_pool();
                match self.wants_its_turn() {
                    Turn::Wanted => until,
                    Turn::Look(again) => by(until, again),
                    Turn::NotWanted => {
                        self.client.withdraw();
                        return gang::out(gpu);
                    }
                }
            }
            _ => until,
        };
        let until = [host_shortage, spares].into_iter().flatten().fold(until, by);
        self.page().wait_doorbell(self.slot(), seen, until);
    }

    /// While its slice can end, the work in flight is held to the drain target.
    fn limit(&self) {
        let target = self.page().settings().drain_target;
        if target == 0 || !self.flow_control {
            return;
        }
        let snapshot = self.device.snapshot();
        flow::limit(self.device.gpu, policy::earliest_end(&snapshot, self.slot()), target);
    }

    /// An allocation found no room, and shut the gate.
    fn grown(&mut self) -> bool {
        let mut memory = self.device.memory();
        if memory.is_missing() {
            memory.open = false;
            gang::growing(self.device.gpu);
            drop(memory);
            self.client.refill();
            return true;
        }
        if memory.open && !gang::is_ready(self.device.gpu) {
            // An allocation shut the gate, and was freed before it was filled.
            gang::ready(self.device.gpu);
        }
        false
    }

    /// What of it lies in host memory can come home when the GPU has room for it again: then the client
    /// drains, and fills anew.
    fn overflow_look(&self) -> Option<Overflow> {
        let overflow = self.device.memory().overflow();
        if overflow == 0 {
            return None;
        }
        let books = &self.device.books;
        let fits = books.demand() <= books.usable() && now() >= self.comes_home.0;
        let room = fits && captures::with_no_capture(|| ()).is_some();
        // Nothing announces that a context has ended, or that room was given back.
        Some(if room { Overflow::ComesHome } else { Overflow::Stays(now() + OVERFLOW_POLL_INTERVAL) })
    }

    /// Finishes what was freed, and closed, when the work is done that may use it. False if that is to be looked at again
    /// soon. Nothing is waited for: the work may never end.
    fn tidy_up(&mut self) -> bool {
        // Also when nobody asks for the forecast any more: the client may have shrunk, others may have gone, or it waits.
        let seen = self.swap.end_forecast();
        if self.giving_way.is_some() {
            // When it has drained. Until then it alone marks the work in flight.
            return seen;
        }
        let buried = self.finish_deferred() && seen;
        if self.closing.is_none()
            && let Some(closing) = crate::ipc::closing()
        {
            self.closing = Some((None, closing));
        }
        let Some((mark, closing)) = self.closing.take() else { return buried };
        match done(mark) {
            Done::Yes => closing.end(),
            Done::No(mark) => {
                self.closing = Some((Some(mark), closing));
                return false;
            }
            // The end of the capture rings.
            Done::Capturing => self.closing = Some((None, closing)),
        }
        buried
    }

    /// The same, for what was freed.
    fn finish_deferred(&mut self) -> bool {
        if self.burial.is_none() {
            let memory = self.device.memory();
            if !memory.has_deferred_frees() || memory.moving {
                return true;
            }
            self.burial = Some((None, memory.left()));
        }
        let Some((mark, left)) = self.burial.take() else { return true };
        match done(mark) {
            Done::Yes => {
                self.device.finish_left(left);
                !self.device.memory().has_deferred_frees()
            }
            Done::No(mark) => {
                self.burial = Some((Some(mark), left));
                false
            }
            Done::Capturing => true,
        }
    }

    /// Host memory for what may have to go out, made before it has to. Only where memory is short: a
    /// process that fits beside all others never pins any.
    /// False if that is to be looked at again soon.
    fn grow_host_pool(&mut self) -> bool {
        let snapshot = self.device.snapshot();
        let wanted: u64 = snapshot.clients().map(|(_, view)| u64::from(view.demand)).sum();
        let demand = self.device.books.demand();
        if wanted <= u64::from(snapshot.usable()) || self.grown_for == demand {
            return true;
        }
        // What is all zero will not be copied, so no memory is made for it. What nobody has used yet will be.
        let bytes = match self.client.phase() {
            Phase::Running => match self.swap.forecast() {
                Some(bytes) => bytes,
                None => return false,
            },
            _ => bytes_of(demand),
        };
        self.grown_for = demand;
        self.make_host_memory(bytes);
        true
    }

    fn make_host_memory(&self, bytes: u64) {
        if self.device.host.capacity() >= bytes || self.growing.swap(true, Ordering::AcqRel) {
            return;
        }
        let (device, growing) = (self.device.clone(), self.growing.clone());
        let grown = std::thread::Builder::new().name("nvshare-host".into()).spawn(move || {
            // As the engine's own thread: registering memory here must not ruin a capture elsewhere.
            let _ = device.driver.exchange_capture_mode(CU_STREAM_CAPTURE_MODE_RELAXED);
            let began = now();
            match device.host.ensure(bytes) {
                Ok(()) => {
                    tracing::debug!(gpu = %device.gpu, "host memory ready in {}", format_nanos(now() - began))
                }
                Err(error) => tracing::warn!(gpu = %device.gpu, "host memory ahead of need: {error}"),
            }
            growing.store(false, Ordering::Release);
        });
        if grown.is_err() {
            self.growing.store(false, Ordering::Release);
        }
    }

    /// There is no memory to move to: not on the host for what should go out, or neither there nor on the GPU for what
    /// should come in. Everything is where it was, so nothing is lost: others go on, and this client too if it can.
    fn no_memory(&mut self, why: &str) {
        if self.client.phase() != Phase::Filling {
            return self.host_shortage.cannot_evict(&self.device, why);
        }
        self.host_shortage.cannot_fill(&self.device, why);
        if self.client.has_work() {
            // It drains first.
            return self.give_way(false);
        }
        gang::out(self.device.gpu);
        self.client.withdraw();
    }

    /// The last context goes: everything back.
    fn leave(mut self) {
        self.drain_for_good();
        self.idle.drop_markers();
        (self.burial, self.closing) = (None, None);
        let regions = {
            let mut memory = self.device.memory();
            memory.open = false;
            self.device.drop_spares(&mut memory);
            memory.take_all()
        };
        regions.into_iter().for_each(|region| self.device.dispose(region));
        self.await_growing();
        self.swap.destroy();
        self.host_shortage.end();
        self.device.host.trim(0);
        self.client.leave();
    }
}

/// Whether the work that may use some memory is done.
enum Done {
    Yes,
    /// It will be when this has passed.
    No(CompletionMarker),
    /// A capture is open, which forbids to ask. Its end rings.
    Capturing,
}

/// Looks whether all work is done that was submitted when the mark was made; now, if there is none.
fn done(mark: Option<CompletionMarker>) -> Done {
    let Some(mut mark) = mark.or_else(|| captures::with_no_capture(gang::mark)) else {
        return Done::Capturing;
    };
    match captures::with_no_capture(|| mark.look()) {
        Some(true) => Done::Yes,
        Some(false) => Done::No(mark),
        None => Done::Capturing,
    }
}
