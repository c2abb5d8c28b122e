//! The engine: one thread per GPU that walks the client through its phases.
//!
//! It sleeps on the slot's doorbell, which rings for everything that concerns it: a decision of another
//! client's, a thread at the gate, an allocation that found no room, a capture that ended. While nobody
//! else wants the GPU it never wakes.

use crate::abi::*;
use crate::device::{Heir, Shared};
use crate::drain::Mark;
use crate::flow;
use crate::session::{self, CaptureHold};
use crate::settings::settings;
use crate::starved::Starved;
use crate::swap::{Swap, SwapError};
use crate::together;
use nvshare::client::Next;
use nvshare::map::MappedPage;
use nvshare::policy;
use nvshare::sync::now;
use nvshare::units::{Granules, MILLISECOND, Nanos, bytes_of, format_nanos};
use nvshare::{Client, Phase};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Starts the engine of a client that has just registered.
///
/// # Errors
/// The system has no thread for it.
pub fn start(
    shared: Arc<Shared>,
    client: Client<MappedPage>,
    context: CUcontext,
) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("nvshare".into()).spawn(move || {
        // The application's signals are for its own threads.
        let _ = nix::sys::signal::SigSet::all().thread_set_mask();
        let _ended = Ended(shared.clone());
        // What the engine does is never meant for a graph that some other thread captures.
        let _ = shared.driver.exchange_capture_mode(CU_STREAM_CAPTURE_MODE_RELAXED);
        run(shared, client, context);
    })
}

/// Says, however the engine ends, that it has.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.engine_ended();
    }
}

fn run(shared: Arc<Shared>, client: Client<MappedPage>, context: CUcontext) {
    let gpu = shared.gpu;
    let begun = shared
        .driver
        .ctx_set_current(context)
        .map_err(|result| SwapError::Driver { call: "cuCtxSetCurrent", result })
        .and_then(|()| Swap::new(shared.clone()));
    match begun {
        Ok(swap) => {
            let (idle, growing, starved) = Default::default();
            let flow_control = settings().is_ok_and(|settings| settings.flow_control);
            Engine { shared, client, swap, idle, flow_control, drained_at: 0, growing, grown_for: 0, starved }
                .run()
        }
        Err(error) => {
            tracing::error!(%gpu, "the engine could not start: {error}");
            session::break_down(gpu, error.cuda());
        }
    }
}

impl SwapError {
    /// What the application is told.
    fn cuda(&self) -> CuResult {
        match self {
            Self::Driver { result, .. } => *result,
            Self::Host(_) | Self::Gpu(_) => CuResult::OUT_OF_MEMORY,
        }
    }

    /// Whether the process is ending, or its context, and nothing is wrong.
    fn is_farewell(&self) -> bool {
        let farewells = [CuResult::DEINITIALIZED, CuResult::CONTEXT_IS_DESTROYED, CuResult::INVALID_CONTEXT];
        matches!(self, Self::Driver { result, .. } if farewells.contains(result))
    }
}

/// How often a client with memory in host memory looks whether the GPU has room for it again.
const OVERFLOW_LOOK: Nanos = 500 * MILLISECOND;

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

/// What a holder makes of its GPU while somebody waits.
enum Use {
    /// Nothing.
    Idle,
    /// It works, or may; look again at this time, ns.
    Look(Nanos),
    /// It holds it for when it has its other GPUs too.
    Kept,
}

/// Whether a client that waits still makes something of its turn.
enum Turn {
    Wanted,
    /// Nobody stands at the gate yet; look again at this time, ns.
    Look(Nanos),
    NotWanted,
}

/// Finds out whether a holder has run out of work.
#[derive(Default)]
struct Idle {
    passes: u32,
    since: Nanos,
    /// The end of all work at the last pass.
    mark: Option<Mark>,
}

struct Engine {
    shared: Arc<Shared>,
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
    starved: Starved,
}

impl Engine {
    fn run(mut self) {
        loop {
            if self.shared.leaving.load(Ordering::Acquire) {
                return self.leave();
            }
            if let Some(heir) = self.shared.heir() {
                match self.move_to(heir) {
                    Ok(()) => continue,
                    Err(error) => return self.break_down(&error),
                }
            }
            match self.client.poll(&mut self.swap) {
                Ok(Next::Open) => self.open(),
                // Recalled while it made use of the GPU: it has more to do, as far as anybody knows yet.
                Ok(Next::Yield) => self.give_way(true),
                Ok(Next::Sleep { seen, until }) => self.rest(seen, until),
                Err(error) if error.is_farewell() => {
                    tracing::debug!(gpu = %self.shared.gpu, "the engine ends: {error}");
                    return self.driver_has_gone(&error);
                }
                Err(SwapError::Host(why) | SwapError::Gpu(why)) => self.no_memory(&why),
                Err(error) => return self.break_down(&error),
            }
        }
    }

    fn page(&self) -> &nvshare::Page {
        self.shared.books.page()
    }

    fn slot(&self) -> nvshare::SlotIndex {
        self.shared.books.slot()
    }

    /// The context that the engine lives in may be destroyed. If others of the process go on, everything that is bound to
    /// it is made anew in one of those. If not, it is given back, and made anew in the same one if that stays after all.
    /// Nothing is being copied now.
    fn move_to(&mut self, heir: Heir) -> Result<(), SwapError> {
        self.idle.mark = None;
        flow::forget();
        match heir {
            Heir::Context(context) => {
                self.swap.move_to(context)?;
                self.shared.at_home(context);
                tracing::debug!(gpu = %self.shared.gpu, "moved to another context: the one before is destroyed");
            }
            Heir::Nowhere => {
                self.await_growing();
                self.swap.leave();
                let _ = self.shared.driver.ctx_set_current(CUcontext::NULL);
                if let Some(context) = self.shared.out_of_context() {
                    self.swap.move_to(context)?;
                    tracing::debug!(gpu = %self.shared.gpu, "back in its context: the driver did not destroy it");
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
        let mut memory = self.shared.memory();
        if memory.is_missing() {
            drop(memory);
            self.client.refill();
            return;
        }
        memory.open = true;
        memory.unsee();
        self.swap.quiet = false;
        together::ready(self.shared.gpu);
        drop(memory);
        self.starved.filled(&self.shared);
        self.idle.since = now();
        tracing::trace!(gpu = %self.shared.gpu, "running");
    }

    /// Something may be due that the page does not know of; if not, sleep.
    fn rest(&mut self, seen: u32, until: Option<Nanos>) {
        // Everything that a ring announces is looked at here, after `seen` was read: a ring that came
        // before that is not waited for, so what it announced must not be missed.
        if self.shared.leaving.load(Ordering::Acquire) || self.shared.heir().is_some() {
            return;
        }
        if self.shared.memory().has_doomed() {
            self.shared.bury();
        }
        crate::ipc::sweep();
        let gpu = self.shared.gpu;
        let starved = self.starved.look(&self.shared);
        let until = match self.client.phase() {
            Phase::Idle if self.starved.asks_at().is_some() => self.starved.asks_at(),
            Phase::Idle if session::gate().waiting() > 0 && together::may_ask(gpu) => {
                return self.client.request();
            }
            Phase::Running => {
                self.limit();
                if together::must_give_up(gpu) {
                    return self.give_way(false);
                }
                if self.grown() {
                    return;
                }
                self.grow_host_pool();
                let until = match self.overflow_look() {
                    Some(Overflow::ComesHome) => return self.give_way(true),
                    Some(Overflow::Stays(look_again)) => by(until, look_again),
                    None => until,
                };
                if self.client.awaited() {
                    match self.look_idle() {
                        Use::Idle => return self.give_way(false),
                        Use::Look(again) => by(until, again),
                        Use::Kept => until,
                    }
                } else {
                    until
                }
            }
            Phase::Waiting if together::must_give_up(gpu) => {
                self.client.withdraw();
                return together::out(gpu);
            }
            Phase::Waiting => {
                together::waiting(gpu);
                self.grow_host_pool();
                match self.wants_its_turn() {
                    Turn::Wanted => until,
                    Turn::Look(again) => by(until, again),
                    Turn::NotWanted => {
                        self.client.withdraw();
                        return together::out(gpu);
                    }
                }
            }
            _ => until,
        };
        let until = starved.map_or(until, |look_again| by(until, look_again));
        self.page().wait_doorbell(self.slot(), seen, until);
    }

    /// While its slice can end, the work in flight is held to the drain target.
    fn limit(&self) {
        let target = self.page().settings().drain_target;
        if target == 0 || !self.flow_control {
            return;
        }
        let snapshot = nvshare::snapshot::Snapshot::take(self.page(), self.page().admitted());
        flow::limit(self.shared.gpu, policy::earliest_end(&snapshot, self.slot(), now()), target);
    }

    /// An allocation found no room, and shut the gate.
    fn grown(&mut self) -> bool {
        let mut memory = self.shared.memory();
        if memory.is_missing() {
            memory.open = false;
            together::growing(self.shared.gpu);
            drop(memory);
            self.client.refill();
            return true;
        }
        if memory.open && !together::is_ready(self.shared.gpu) {
            // An allocation shut the gate, and was freed before it was filled.
            together::ready(self.shared.gpu);
        }
        false
    }

    /// What of it lies in host memory can come home when the GPU has room for it again: then the client
    /// drains, and fills anew.
    fn overflow_look(&self) -> Option<Overflow> {
        let overflow = self.shared.memory().overflow();
        if overflow == 0 {
            return None;
        }
        let books = &self.shared.books;
        let fits = books.demand() <= books.usable();
        let room = fits && session::with_no_capture(|| ()).is_some();
        // Nothing announces that a context has ended, or that room was given back.
        Some(if room { Overflow::ComesHome } else { Overflow::Stays(now() + OVERFLOW_LOOK) })
    }

    /// Whether the process makes use of this GPU. Called only while somebody waits for it.
    ///
    /// It is the process that is idle, and not the GPU alone: what runs on another GPU of the process may use
    /// this one's memory, and nothing can be submitted there without this one.
    fn look_idle(&mut self) -> Use {
        if together::waits_beyond(self.shared.gpu) {
            // It keeps what it has for a slice that is to come, and not for one that it had (crate::order).
            return if self.shared.books.slice_has_begun() { Use::Idle } else { Use::Kept };
        }
        let (time, grace) = (now(), self.page().settings().idle_grace);
        let gate = session::gate();
        let passes = gate.passes();
        // Who stands before the gate is about to have all GPUs.
        if passes != self.idle.passes || gate.occupied() || gate.waiting() > 0 || flow::holds_somebody() {
            self.idle.passes = passes;
            self.idle.since = time;
            self.idle.mark = None;
            return Use::Look(time + grace);
        }
        let quiet_until = self.idle.since + grace;
        if time < quiet_until {
            return Use::Look(quiet_until);
        }
        if self.idle.mark.is_none() {
            self.idle.mark = session::with_no_capture(together::mark);
        }
        if self.idle.mark.as_ref().is_some_and(Mark::is_done) {
            self.idle.mark = None;
            tracing::debug!(gpu = %self.shared.gpu, "idle for {}: giving way", format_nanos(time - self.idle.since));
            return Use::Idle;
        }
        Use::Look(time + (grace / 2).max(MILLISECOND))
    }

    /// A client whose slice was over is back in the queue before its threads are back at the gate: they were waiting
    /// for its work, which is done only now. If they don't come, it has nothing to do.
    fn wants_its_turn(&self) -> Turn {
        if session::gate().waiting() > 0 {
            return Turn::Wanted;
        }
        let quiet = self.drained_at + self.page().settings().idle_grace;
        if now() < quiet { Turn::Look(quiet) } else { Turn::NotWanted }
    }

    /// Shuts the gate, drains, and lets others run. With `more` to do it asks for the GPU again at once.
    fn give_way(&mut self, more: bool) {
        loop {
            let hold = CaptureHold::new();
            together::out(self.shared.gpu);
            session::gate().shut();
            if !hold.is_broken() {
                break;
            }
            // Under the map's lock: an allocation may have shut the gate meanwhile (I2).
            let memory = self.shared.memory();
            if !memory.is_missing() {
                together::ready(self.shared.gpu);
            }
        }
        flow::end(self.shared.gpu);
        self.shared.memory().open = false;
        let ran = self.client.drain();
        let began = now();
        // On whichever GPU: it may use this one's memory.
        if let Err(result) = together::mark().wait() {
            // The application's own calls will tell it: its context is broken. There is no work left to
            // wait for, and its memory can go.
            tracing::debug!(gpu = %self.shared.gpu, "while draining: {result}");
        }
        let drained = now();
        let took = drained - began;
        // The numbers are for programs: what came when, and how long it was.
        tracing::debug!(
            gpu = %self.shared.gpu, at_ns = began, ran_ns = ran, drained_ns = took,
            "drained in {} after a slice of {}", format_nanos(took), format_nanos(ran)
        );
        self.drained_at = drained;
        flow::drained();
        self.swap.quiet = true;
        crate::pools::drained(&self.shared);
        let more = more || session::gate().waiting() > 0;
        let may_ask = together::may_ask(self.shared.gpu) && self.starved.asks_at().is_none();
        self.client.drained(more && may_ask);
    }

    /// Host memory for what may have to go out, made before it has to. Only where memory is short: a
    /// process that fits beside all others never pins any.
    fn grow_host_pool(&mut self) {
        let snapshot = nvshare::snapshot::Snapshot::take(self.page(), self.page().admitted());
        let wanted: u64 = snapshot.clients().map(|(_, view)| u64::from(view.demand)).sum();
        let demand = self.shared.books.demand();
        if wanted <= u64::from(snapshot.usable()) || self.grown_for == demand {
            return;
        }
        self.grown_for = demand;
        // What is all zero will not be copied, so no memory is made for it. What nobody has used yet will be.
        let bytes = match self.client.phase() {
            Phase::Running => self.swap.forecast(),
            _ => bytes_of(demand),
        };
        self.shared.bury();
        if self.shared.host.capacity() >= bytes || self.growing.swap(true, Ordering::AcqRel) {
            return;
        }
        let (shared, growing) = (self.shared.clone(), self.growing.clone());
        let grown = std::thread::Builder::new().name("nvshare-host".into()).spawn(move || {
            // As the engine's own thread: registering memory here must not ruin a capture elsewhere.
            let _ = shared.driver.exchange_capture_mode(CU_STREAM_CAPTURE_MODE_RELAXED);
            let began = now();
            match shared.host.ensure(bytes) {
                Ok(()) => {
                    tracing::debug!(gpu = %shared.gpu, "host memory ready in {}", format_nanos(now() - began))
                }
                Err(error) => tracing::warn!(gpu = %shared.gpu, "host memory ahead of need: {error}"),
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
            return self.starved.cannot_evict(&self.shared, why);
        }
        self.starved.cannot_fill(&self.shared, why);
        // If its work is under way it drains first.
        self.give_way(false);
        self.client.withdraw();
    }

    /// Memory could not be moved, and the application's data with it: its calls fail from now on, and
    /// the others get the room.
    fn break_down(self, error: &SwapError) {
        tracing::error!(
            gpu = %self.shared.gpu,
            "memory could not be moved, every CUDA call of this process fails from now on: {error}"
        );
        session::break_down(self.shared.gpu, error.cuda());
        let regions = self.shared.memory().take_all();
        regions.into_iter().for_each(|region| self.shared.dispose(region));
        self.client.leave();
    }

    /// The process is ending. Exit handlers may still make calls, and wait for other threads that do: the driver answers
    /// them all, and no memory is in the way.
    fn driver_has_gone(&self, error: &SwapError) {
        if error.cuda() == CuResult::DEINITIALIZED {
            together::leave(self.shared.gpu);
        }
    }

    /// The last context goes: everything back.
    fn leave(mut self) {
        together::out(self.shared.gpu);
        session::gate().shut();
        flow::end(self.shared.gpu);
        let _ = together::mark().wait();
        self.idle.mark = None;
        let regions = {
            let mut memory = self.shared.memory();
            memory.open = false;
            memory.take_all()
        };
        regions.into_iter().for_each(|region| self.shared.dispose(region));
        self.await_growing();
        self.swap.destroy();
        self.starved.end();
        self.shared.host.trim(0);
        self.client.leave();
    }
}
