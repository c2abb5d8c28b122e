//! The engine: one thread per GPU that walks the client through its phases.
//!
//! It sleeps on the slot's doorbell, which rings for every event that concerns it: a decision published by another
//! client, a thread that waits at the gate, an allocation that found no room, a capture that ended. While no other
//! client wants the GPU, it never wakes.

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
use crate::submit::{captures, flow, gang, turn_taking};
use giving_way::{GivingWay, Look};
use idle::{Idle, Use};
use nvshare::client::Next;
use nvshare::map::MappedPage;
use nvshare::snapshot::Snapshot;
use nvshare::sync::now;
use nvshare::units::{GRANULE, Granules, MILLISECOND, Nanos, SECOND, bytes_of, format_nanos, format_size};
use nvshare::{Books, Client, Phase, policy};
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
        // It polls work in flight at intervals of tens of microseconds.
        let _ = nix::sys::prctl::set_timerslack(1_000);
        ending::run_to_the_end(device, client, context);
    })
}

/// The name of the engine's thread.
pub const THREAD: &str = "nvshare";

/// How often a client that uses host memory in place of GPU memory checks whether the GPU has room again.
const OVERFLOW_POLL_INTERVAL: Nanos = 500 * MILLISECOND;

/// How often an engine checks whether the work that may use freed memory is done.
const TIDY_POLL_INTERVAL: Nanos = 5 * MILLISECOND;

/// How often a process that waits for one of several GPUs checks whether a client there cannot give way.
const STUCK_POLL_INTERVAL: Nanos = 500 * MILLISECOND;

/// The longest pause between two attempts to move memory from the host back to the GPU, for a client whose drains fail.
const RETURN_PAUSE: Nanos = 60 * SECOND;

/// The earlier of two times, ns.
fn by(until: Option<Nanos>, again: Nanos) -> Option<Nanos> {
    Some(until.map_or(again, |until| until.min(again)))
}

/// How often the process has submitted work.
#[derive(Default)]
struct Submissions {
    /// What the gate counted at the last look.
    seen: u32,
    /// Since the process began.
    total: u64,
}

impl Submissions {
    fn look(&mut self, books: &Books<MappedPage>) {
        let entered = gate().entered();
        let new = entered.wrapping_sub(self.seen) & (u32::MAX >> 1);
        // A difference of more than half of the counter's range means that this look counted fewer than the last one: threads were
        // passing. The next look catches up.
        if new < u32::MAX / 4 {
            (self.seen, self.total) = (entered, self.total + u64::from(new));
            books.submitted(self.total, gate().held());
        }
    }
}

/// Whether memory that is mapped to the host can move back to the GPU.
enum Overflow {
    Returns,
    /// Not now; check again at this time, ns.
    Stays(Nanos),
}

/// Whether a client in the queue still needs its turn.
enum Turn {
    Wanted,
    /// No thread waits at the gate yet; check again at this time, ns.
    Look(Nanos),
    NotWanted,
}

struct Engine {
    device: Arc<Device>,
    client: Client<MappedPage>,
    swap: Swap,
    idle: Idle,
    flow_control: bool,
    /// When the last drain ended, ns.
    drained_at: Nanos,
    /// A thread allocates host memory.
    growing: Arc<AtomicBool>,
    /// The demand for which host memory was last allocated, granules.
    grown_for: Granules,
    /// The members of the gang on this GPU do not fit there together.
    too_large: bool,
    /// The state of evictions and fills that found no host memory.
    host_shortage: HostShortage,
    /// The drain in progress.
    giving_way: Option<GivingWay>,
    /// Deferred frees that wait for work in flight, and the marker of that work if it could be made.
    freeing: Option<(Option<CompletionMarker>, Left)>,
    /// The same for memory of other processes that was closed.
    closing: Option<(Option<CompletionMarker>, Closing)>,
    /// When memory mapped to the host may next be moved back to the GPU, ns, and the pause after that attempt, ns.
    returns: (Nanos, Nanos),
    submissions: Submissions,
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
            too_large: false,
            giving_way: None,
            freeing: None,
            closing: None,
            returns: (0, OVERFLOW_POLL_INTERVAL),
            host_shortage: HostShortage::default(),
            submissions: Submissions::default(),
        }
    }

    /// Walks the client through its phases, until its last context is destroyed.
    ///
    /// # Errors
    /// Memory could not be moved, or the engine of another GPU of the process has failed.
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
                // Recalled while it used the GPU: assume that it has more work.
                Ok(Next::Yield) => self.give_way(true),
                Ok(Next::Sleep { seen, until }) => self.rest(seen, until),
                // Recalled or not: what its work waits for may be waiting for what this fill waits for.
                Err(SwapError::Interrupted)
                    if self.client.has_work() && gang::is_called_away(self.device.gpu) =>
                {
                    self.give_way(true);
                }
                Err(SwapError::Interrupted) => {}
                Err(SwapError::InFlight) if self.client.has_work() => self.give_way(true),
                Err(SwapError::InFlight) => self.swap.quiet = true,
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

    /// Leaves the engine's context, which is about to be destroyed. If the process has another context on this GPU, the
    /// streams and events are created there. If not, they are destroyed, and created again in the same context if the driver
    /// does not destroy it. No copy is in flight.
    fn move_to(&mut self, successor: Successor) -> Result<(), SwapError> {
        self.idle.drop_markers();
        self.freeing = None;
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
                // Until the driver has decided, the engine cannot react when other clients need these granules.
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

    /// Waits for the thread that allocates host memory.
    fn await_growing(&self) {
        while self.growing.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
    }

    /// All memory is in place: opens the gate. The map is locked from the last check until the gate is open, so that no
    /// allocation can add missing memory in between.
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

    /// Does what is due and is not recorded in the page; if nothing is, sleeps.
    fn rest(&mut self, seen: u32, until: Option<Nanos>) {
        // Every condition that rings the doorbell is checked here, after `seen` was read: an earlier ring does not end
        // the sleep, so its condition must be found now.
        if self.device.engine_context.is_leaving() || self.device.engine_context.successor().is_some() {
            return;
        }
        self.submissions.look(&self.device.books);
        let until = if self.tidy_up() { until } else { by(until, now() + TIDY_POLL_INTERVAL) };
        let gpu = self.device.gpu;
        let host_shortage = self.host_shortage.look(&self.device);
        let spares = self.device.tidy_spares();
        let of_gang = self.update_gang();
        let asks = self.client.phase() == Phase::Idle && gang::is_wanted() && gang::may_ask(gpu);
        // A client that asks below tells no forecast: while it is Idle without one, others could take the memory that it has brought in.
        if self.client.phase() == Phase::Idle && !asks && self.client.foresee(gang::asks_at(gpu)) {
            // The forecast has changed, so the client may have to bring its memory in now.
            return;
        }
        let until = match self.client.phase() {
            Phase::Idle if self.client.is_paused() => {
                // A user has paused it. The arbiter rings when it is resumed; `until` is when the pause ends by itself.
                self.client.withdraw();
                gang::out(gpu);
                until
            }
            Phase::Idle if self.host_shortage.asks_at().is_some() => self.host_shortage.asks_at(),
            Phase::Idle if self.leaves_it_to_others() => by(until, now() + STUCK_POLL_INTERVAL),
            Phase::Idle if asks => {
                self.idle.returns();
                return self.client.request();
            }
            Phase::Running => {
                self.limit();
                if gang::must_give_up(gpu) {
                    return self.give_way(false);
                }
                if gang::is_called_to_drain() {
                    return self.give_way(true);
                }
                if self.grown() {
                    return;
                }
                let until = if self.grow_host_pool() { until } else { by(until, now() + TIDY_POLL_INTERVAL) };
                let until = match self.overflow_look() {
                    Some(Overflow::Returns) => return self.give_way(true),
                    Some(Overflow::Stays(look_again)) => by(until, look_again),
                    None => until,
                };
                let snapshot = self.device.snapshot();
                match self.look_idle(&snapshot) {
                    Use::Idle => return self.give_way(false),
                    Use::Look(again) => by(until, again),
                    Use::Kept => until,
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
        let until = [host_shortage, spares, of_gang].into_iter().flatten().fold(until, by);
        self.page().wait_doorbell(self.slot(), seen, until);
    }

    /// Tells the other processes of the gang what they must know of this GPU, and looks what they have. Returns when to look
    /// again at the latest, ns, if ever.
    fn update_gang(&mut self) -> Option<Nanos> {
        let gpu = self.device.gpu;
        if !gang::is_shared() {
            return gang::update(gpu, gang::Report::default());
        }
        let (snapshot, phase) = (self.device.snapshot(), self.client.phase());
        let needed = match phase {
            Phase::Running => policy::needed(&snapshot).is_some(),
            Phase::Draining => self.client.is_needed(),
            _ => false,
        };
        let beside = gang::beside(gpu);
        let movable = |slot| u64::from(snapshot.view(slot).movable());
        let together: u64 = beside.with(self.slot()).iter().map(movable).sum();
        let too_large = !beside.is_empty() && together > u64::from(snapshot.usable());
        let stuck = snapshot.clients().any(|(slot, view)| slot != self.slot() && view.stuck);
        let blocked = phase == Phase::Waiting && stuck && !snapshot.admitted.contains(self.slot());
        if too_large && !self.too_large {
            tracing::warn!(
                %gpu,
                "the processes that wait for each other on this GPU need {} together and there are {}: they take turns, and are slow or stand still while one waits for another. Put them on different GPUs, or make them smaller",
                format_size(together.saturating_mul(GRANULE)), format_size(bytes_of(snapshot.usable()))
            );
        }
        self.too_large = too_large;
        let contended = self.others_use_it(&snapshot);
        let turn = if phase == Phase::Waiting { policy::turn_comes(&snapshot, self.slot()) } else { None };
        let again = gang::update(gpu, gang::Report { needed, contended, too_large, blocked, turn });
        // Nothing rings when a client's work has not ended for long.
        let watch = (phase == Phase::Waiting).then(|| now() + STUCK_POLL_INTERVAL);
        [again, watch].into_iter().flatten().min()
    }

    /// Whether other clients have this GPU or wait for it.
    fn others_use_it(&self, snapshot: &Snapshot) -> bool {
        snapshot.clients().any(|(slot, view)| slot != self.slot() && view.phase.wants_gpu())
    }

    /// Whether the process cannot run before a process that is stopped goes on, or before a client's work on another GPU ends, and
    /// others have a use for this GPU.
    fn leaves_it_to_others(&self) -> bool {
        gang::is_blocked(self.device.gpu) && self.others_use_it(&self.device.snapshot())
    }

    /// While the slice can end, limits the work in flight so that a drain takes no longer than the drain target. Begins to take
    /// compute turns if the clients of the GPU differ in their shares.
    fn limit(&self) {
        turn_taking::look(|| self.device.gang_member(), self.page());
        let target = self.page().settings().drain_target;
        if target == 0 || !self.flow_control {
            return;
        }
        let snapshot = self.device.snapshot();
        flow::limit(self.device.gpu, policy::earliest_end(&snapshot, self.slot()), target);
    }

    /// Whether an allocation found no room and shut the gate; then the client fills again.
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
            // An allocation shut the gate and was freed before it was filled.
            gang::ready(self.device.gpu);
        }
        false
    }

    /// Whether memory that is mapped to the host can move back, because the GPU has room again. To do so, the client drains
    /// and fills. `None` if there is no such memory.
    fn overflow_look(&self) -> Option<Overflow> {
        let overflow = self.device.memory().overflow();
        if overflow == 0 {
            return None;
        }
        let books = &self.device.books;
        let fits = books.demand() <= books.usable() && now() >= self.returns.0;
        let room = fits && captures::with_no_capture(|| ()).is_some();
        // Nothing signals that a context has ended or that a reservation was released, so this is polled.
        Some(if room { Overflow::Returns } else { Overflow::Stays(now() + OVERFLOW_POLL_INTERVAL) })
    }

    /// Releases memory that was freed or closed, once the work that may use it is done. False if this must be checked again
    /// soon. It never waits, because the work may never end.
    fn tidy_up(&mut self) -> bool {
        // Even if no forecast is needed any more: the client may have freed memory, others may have ended, or it waits.
        let scanned = self.swap.end_forecast();
        if self.giving_way.is_some() {
            // Done after the drain. Until then only the drain makes markers of the work in flight.
            return scanned;
        }
        let freed = self.finish_deferred() && scanned;
        if self.closing.is_none()
            && let Some(closing) = crate::ipc::closing()
        {
            self.closing = Some((None, closing));
        }
        let Some((mark, closing)) = self.closing.take() else { return freed };
        match done(mark) {
            Done::Yes => closing.end(),
            Done::No(mark) => {
                self.closing = Some((Some(mark), closing));
                return false;
            }
            // The end of the capture rings the doorbell.
            Done::Capturing => self.closing = Some((None, closing)),
        }
        freed
    }

    /// The same for deferred frees only.
    fn finish_deferred(&mut self) -> bool {
        if self.freeing.is_none() {
            let memory = self.device.memory();
            if !memory.has_deferred_frees() || memory.moving {
                return true;
            }
            self.freeing = Some((None, memory.left()));
        }
        let Some((mark, left)) = self.freeing.take() else { return true };
        match done(mark) {
            Done::Yes => {
                self.device.finish_left(left);
                !self.device.memory().has_deferred_frees()
            }
            Done::No(mark) => {
                self.freeing = Some((Some(mark), left));
                false
            }
            Done::Capturing => true,
        }
    }

    /// Allocates host memory before evictions need it. Only if the clients' demands exceed the GPU: a process that fits
    /// beside all others never pins host memory. False if this must be checked again soon.
    fn grow_host_pool(&mut self) -> bool {
        let snapshot = self.device.snapshot();
        let wanted: u64 = snapshot.clients().map(|(_, view)| u64::from(view.demand)).sum();
        let demand = self.device.books.demand();
        if wanted <= u64::from(snapshot.usable()) || self.grown_for == demand {
            return true;
        }
        // Memory that is all zero needs no host memory, so a running client asks the GPU how much is in use. A client that
        // waits may use all that it has asked for.
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
            // As in the engine's thread: registering memory must not invalidate a capture of another thread.
            let _ = device.driver.exchange_capture_mode(CU_STREAM_CAPTURE_MODE_RELAXED);
            let began = now();
            match device.host.ensure(bytes) {
                Ok(()) => {
                    tracing::debug!(gpu = %device.gpu, "host memory ready in {}", format_nanos(now() - began))
                }
                Err(error) => tracing::warn!(
                    gpu = %device.gpu,
                    "less host memory than this process may need when another takes its turn: {error}"
                ),
            }
            growing.store(false, Ordering::Release);
        });
        if grown.is_err() {
            self.growing.store(false, Ordering::Release);
        }
    }

    /// An eviction found no host memory, or a fill found neither GPU nor host memory. All data is where it was, so nothing
    /// is lost: other clients go on, and this one too if it can.
    fn no_memory(&mut self, why: &str) {
        if self.client.phase() != Phase::Filling {
            return self.host_shortage.cannot_evict(&self.device, why);
        }
        self.host_shortage.cannot_fill(&self.device, why);
        if self.client.has_work() {
            // Drain first.
            return self.give_way(false);
        }
        gang::out(self.device.gpu);
        self.client.withdraw();
    }

    /// The last context is being destroyed: releases everything.
    fn leave(mut self) {
        self.drain_for_good();
        self.idle.drop_markers();
        (self.freeing, self.closing) = (None, None);
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
        turn_taking::end(self.device.gpu, true);
        self.client.leave();
    }
}

/// Whether the work that may use some memory is done.
enum Done {
    Yes,
    /// It will be when this marker has passed.
    No(CompletionMarker),
    /// Unknown, because an open capture forbids querying. The end of the capture rings the doorbell.
    Capturing,
}

/// Whether the work before a marker is done; without a marker, the work submitted until now.
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
