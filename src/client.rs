//! One process's part in the protocol: a client on one GPU, which goes through phases.
//!
//! ```text
//!            request                admitted             all in place
//!   Idle ───────────────▶ Waiting ───────────▶ Filling ───────────────▶ Running
//!    ▲                     ▲   ▲                  │                       │ │
//!    │                     │   └────── recalled ──┘◀──── grown ───────────┘ │ recalled, or
//!    │ nothing more to do  │ more to do                                     │ idle and awaited
//!    └─────────────────────┴──────────────── Draining ◀─────────────────────┘
//! ```
//!
//! A client that allocates while it runs goes back to Filling, with its earlier work still under way. If it is recalled there,
//! it drains before it waits, as it does from Running: a waiting client may be asked to evict at any moment, and work in flight
//! must not lose its memory.
//!
//! A drain may stand still, because the work waits for threads that want to submit more. Then the client lets these threads go
//! on, still in phase Draining and with all its memory in place, and tries again later. Nobody asks it to evict meanwhile. If
//! nobody needs its memory any more, it goes on as a client that has grown does ([`Client::resume`]).
//!
//! A [`Client`] belongs to one thread, which takes it along these arrows; [`Client::poll`] does what is due and says what to
//! wait for. A [`Runtime`] moves the memory: the shim's moves CUDA allocations. [`Books`] may be used from every thread of the
//! process: they hold what the client has and what it asks for.
//!
//! A runtime that needs no thread of its own calls [`Client::acquire`], [`Client::should_yield`] and
//! [`Client::release`] around its work, and [`Client::serve`] while it has none.

use crate::books::{Books, Fill, PrivatePhase, STARVED_POLL_INTERVAL, add};
use crate::journal::{Event, Why};
use crate::page::{Direction, Page, Phase, Suspension};
use crate::policy::{self, NOT_BEGUN, Order, Spent, Standing};
use crate::shares::Priority;
use crate::slot::SlotIndex;
use crate::step::{Action, Facts, step};
use crate::sync::{AtomicU64, Ordering, now};
use crate::turns::GpuTime;
use crate::units::{Granules, MILLISECOND, Nanos};
use std::ops::Deref;

/// What moves a client's memory.
pub trait Runtime {
    /// Why memory could not be moved.
    type Error;

    /// Brings in all memory that is not on the GPU. Takes granules with [`Books::take`] before it maps memory, chunk by
    /// chunk, and ends early when that returns [`Fill::Recalled`].
    ///
    /// # Errors
    /// A copy or a mapping failed for a reason that waiting does not remove.
    fn fill(&mut self) -> Result<Fill, Self::Error>;

    /// Moves out at least `granules`, and gives each chunk back with [`Books::give`] as soon as it is unmapped. The client has
    /// drained: nothing on the GPU uses the memory.
    ///
    /// # Errors
    /// As for [`Runtime::fill`].
    fn evict(&mut self, granules: Granules) -> Result<(), Self::Error>;

    /// Brings in memory that fits into free granules while others run. Takes granules with [`Books::take_ahead`] before it maps
    /// memory, chunk by chunk, and ends when that returns false. The default does nothing.
    ///
    /// # Errors
    /// As for [`Runtime::fill`].
    fn prefetch(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }
}

/// How long a client that is asked to evict waits first for others to give back granules that they do not need, in ns.
const SPARES_FIRST: Nanos = 10 * MILLISECOND;

/// How much a client evicts at a time for one that is only expected back, granules: 1 GiB. In between it looks whether its own
/// threads are back, and the other brings in what has become free.
const AT_A_TIME: Granules = 512;

/// What a client's thread does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// All memory is in place: open the gate, and [begin the slice](Books::begin_slice) at the same moment.
    Open,
    /// The client must give way: shut the gate, [begin to drain](Client::drain), wait for the submitted work, and call
    /// [`Client::drained`].
    Yield,
    /// Nothing is due. Sleep on the doorbell while it shows `seen`, at most until `until`.
    Sleep {
        /// What the doorbell showed before the client looked at the page.
        seen: u32,
        /// When something is due without a ring, CLOCK_MONOTONIC ns; `None`: nothing is.
        until: Option<Nanos>,
    },
}

/// Which turn a client queues for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// A new one: it has used up the one before, or comes from phase Idle.
    Next,
    /// The one that was interrupted.
    Same,
}

/// A registered client: the thread that walks it through its phases.
pub struct Client<P> {
    books: Books<P>,
    phase: Phase,
    /// It has run since it last drained: its work may be in flight, and its memory must not go out.
    undrained: bool,
    /// It has used up its turn, as far as it had come when it began to drain.
    turn_over: bool,
    /// When it last decided in this phase because a slice was over, ns: it does so once for each end.
    decided: Nanos,
    /// The weight and the priority that its deadline was computed from.
    deadline_shares: (u32, Priority),
    /// Since when it has waited for others' spare granules instead of evicting, ns.
    left_to_spares: Option<Nanos>,
    /// Bytes that it had copied in when it last entered phase Filling.
    bytes_before: u64,
    /// It wants the GPU and is paused: it asks again when it is resumed.
    held: bool,
    /// The GPU time that it had had in compute turns when its slice began.
    gpu_time: GpuTime,
    /// For how long it has had no work in its present slice while nobody needed the GPU, ns.
    unused: Nanos,
    /// When it said that it will be back because it then has another GPU, ns; 0 if it has not.
    foreseen: Nanos,
}

impl<P: Deref<Target = Page> + Clone> Client<P> {
    /// The client that owns `slot` of `page`. Registration has just opened the slot for it.
    pub fn new(page: P, slot: SlotIndex) -> Self {
        crate::sync::register_barriers();
        let books = Books::new(page, slot);
        books.note(Event::Registered { pid: std::process::id() });
        Self {
            books,
            phase: Phase::Idle,
            undrained: false,
            turn_over: false,
            decided: 0,
            deadline_shares: (0, Priority::default()),
            left_to_spares: None,
            bytes_before: 0,
            held: false,
            gpu_time: GpuTime::default(),
            unused: 0,
            foreseen: 0,
        }
    }

    /// The same client, which also writes its phase into this word. The word comes with its registration, and the arbiter is
    /// told what it holds.
    #[must_use]
    pub fn telling(mut self, private_phase: PrivatePhase) -> Self {
        private_phase.store(self.phase.into(), std::sync::atomic::Ordering::Relaxed);
        self.books.private_phase = Some(private_phase);
        self
    }

    /// The client's books.
    pub fn books(&self) -> &Books<P> {
        &self.books
    }

    /// The client's phase.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    fn page(&self) -> &Page {
        &self.books.page
    }

    fn own(&self) -> &crate::page::OwnWords {
        &self.page().slot(self.books.slot).own
    }

    /// Changes the phase, in this process and in the page.
    fn enter(&mut self, phase: Phase) {
        self.enter_by(phase, Event::Phase(phase));
    }

    /// The same with an event that says more than the phase.
    fn enter_by(&mut self, phase: Phase, event: Event) {
        if phase == Phase::Filling {
            self.bytes_before = self.moved(Direction::In);
        }
        self.phase = phase;
        self.decided = 0;
        self.books.tell(phase);
        self.own().phase.store(phase, Ordering::Release);
        self.books.note(event);
    }

    /// Moves memory, and writes that into the journal if any has moved. (An eviction that finds no host memory moves nothing, and
    /// is tried again and again.)
    fn noted<T>(
        &self,
        direction: Direction,
        begins: Event,
        ends: impl FnOnce(u64) -> Event,
        moves: impl FnOnce() -> T,
    ) -> T {
        let (resident, bytes, begun) = (self.books.resident(), self.moved(direction), now());
        let result = moves();
        if self.books.resident() != resident {
            self.books.note_span(begun, begins, ends(self.moved(direction).wrapping_sub(bytes)));
        }
        result
    }

    /// Bytes that it has copied in this direction.
    fn moved(&self, direction: Direction) -> u64 {
        match direction {
            Direction::In => self.own().bytes_in.load(Ordering::Relaxed),
            Direction::Out => self.own().bytes_out.load(Ordering::Relaxed),
        }
    }

    /// Idle or drained -> Waiting: takes a place in the queue.
    fn queue(&mut self, turn: Turn) {
        self.take_place(turn);
        self.enter(Phase::Waiting);
        self.page().decide();
    }

    fn take_place(&mut self, turn: Turn) {
        let snapshot = self.look();
        let (entry, own) = (policy::enter_queue(&snapshot, self.books.slot), self.own());
        let write = |word: &AtomicU64, value| word.store(value, Ordering::Relaxed);
        if turn == Turn::Next {
            self.take_ticket();
            write(&own.virtual_time, entry.virtual_time);
            write(&own.turn_start, entry.virtual_time);
            write(&own.turn_used, 0);
            write(&own.credit, entry.credit);
        }
        write(&own.wait_since, snapshot.now);
        write(&own.deadline, entry.deadline);
        self.deadline_shares = self.page().weight_and_priority(self.books.slot);
    }

    fn take_ticket(&self) {
        let ticket = self.page().header.next_ticket.fetch_add(1, Ordering::Relaxed);
        self.own().ticket.store(ticket, Ordering::Relaxed);
    }

    /// Running on though its turn is over, because nobody stands before it: the next one begins.
    fn begin_next_turn(&mut self) {
        let Some(turn) = policy::next_turn(&self.look(), self.books.slot) else { return };
        self.take_ticket();
        let own = self.own();
        own.turn_start.store(turn.turn_start, Ordering::Relaxed);
        own.turn_used.store(turn.turn_used as u64, Ordering::Relaxed);
        own.credit.store(0, Ordering::Relaxed);
        let used_up = &own.consecutive_slices;
        used_up.store(used_up.load(Ordering::Relaxed).saturating_add(1), Ordering::Release);
        self.page().decide();
    }

    /// Whether it waits, and its shares have changed since its deadline was computed.
    fn shares_changed(&self) -> bool {
        self.phase == Phase::Waiting
            && self.page().weight_and_priority(self.books.slot) != self.deadline_shares
    }

    /// Computes its deadline by its present shares. The time counts from when it began to wait, so nobody gains by changing the
    /// shares again and again.
    fn compute_deadline(&mut self) {
        self.deadline_shares = self.page().weight_and_priority(self.books.slot);
        let mut snapshot = self.look();
        snapshot.now = self.own().wait_since.load(Ordering::Relaxed);
        let deadline = policy::enter_queue(&snapshot, self.books.slot).deadline;
        self.own().deadline.store(deadline, Ordering::Relaxed);
    }

    /// Asks for the GPU. Does nothing unless the client is Idle.
    pub fn request(&mut self) {
        if self.phase == Phase::Idle {
            self.queue(Turn::Next);
        }
    }

    /// Waiting -> Idle: takes the request back, because the process must have another GPU first ([`crate::gang_order`]). Also
    /// from Filling, for a client that cannot be filled; memory that is in place stays until the client is asked to evict. Does
    /// nothing while work is in flight: such a client drains. If a decision has admitted the client meanwhile, the next
    /// [`Client::poll`] gives the bit back.
    pub fn withdraw(&mut self) {
        self.held = false;
        if self.phase == Phase::Waiting || (self.phase == Phase::Filling && !self.undrained) {
            let own = self.own();
            own.wait_since.store(0, Ordering::Relaxed);
            own.consecutive_slices.store(0, Ordering::Relaxed);
            self.enter(Phase::Idle);
            self.page().decide();
        }
    }

    /// Whether a user has paused the client.
    pub fn is_paused(&self) -> bool {
        self.page().suspension(self.books.slot) != Suspension::None
    }

    /// Waiting -> Idle if the client has been paused: it stands in no queue. Idle -> Waiting when it is resumed, with a new place,
    /// so that it goes ahead of nobody by what it waited meanwhile. True if the phase has changed.
    fn hold_or_ask_again(&mut self) -> bool {
        match (self.phase, self.is_paused()) {
            (Phase::Waiting, true) => {
                self.withdraw();
                self.held = true;
                true
            }
            (Phase::Idle, false) if self.held => {
                self.held = false;
                self.request();
                true
            }
            _ => false,
        }
    }

    /// Does what is due in the present phase, and says what the caller does next.
    ///
    /// # Errors
    /// The runtime's. The phase is as before and the books are right; the caller decides whether to go on or to
    /// [leave](Client::leave).
    pub fn poll<R: Runtime>(&mut self, runtime: &mut R) -> Result<Next, R::Error> {
        let (mut evicts, mut prefetches) = (true, true);
        loop {
            let seen = self.page().doorbell(self.books.slot);
            let facts = Facts { admitted: self.books.admitted(), in_flight: self.undrained };
            match step(self.phase, facts) {
                Action::StartFilling => self.enter(Phase::Filling),
                Action::Yield => return Ok(Next::Yield),
                Action::Queue => self.enter(Phase::Waiting),
                Action::Fill => {
                    if runtime.fill()? == Fill::Complete && self.books.admitted() {
                        self.begin_running();
                        return Ok(Next::Open);
                    }
                    // Recalled: the next round sees it. Or the client has allocated meanwhile: fill again.
                }
                Action::Run => match self.look_ahead() {
                    Some(due) if due <= now() => {
                        self.end_of_slice();
                        self.begin_next_turn();
                    }
                    until => return Ok(Next::Sleep { seen, until }),
                },
                Action::GiveUpBit => {
                    self.enter(Phase::Idle);
                    self.page().decide();
                }
                Action::Serve if self.hold_or_ask_again() => {}
                Action::Serve if self.shares_changed() => {
                    self.compute_deadline();
                    self.page().decide();
                }
                Action::Serve => {
                    let snapshot = self.look();
                    let standing = Standing::of(&snapshot);
                    let order = Order::new(&snapshot, &standing);
                    let share = order.evict_shares()[self.books.slot.get()];
                    if let Some(until) = self.leaves_it_to_spares(&snapshot, share) {
                        return Ok(Next::Sleep { seen, until: Some(until) });
                    }
                    if share > 0 && evicts {
                        let before = self.books.resident();
                        let expected = policy::expected(&snapshot).is_some();
                        let share = if expected { share.min(AT_A_TIME) } else { share };
                        let evicted = |bytes| Event::Evicted { bytes };
                        self.noted(Direction::Out, Event::Evicts, evicted, || runtime.evict(share))?;
                        if policy::lacking(&snapshot) == 0 {
                            // The room is for one that is not admitted, which has not been told of it.
                            order.prefetcher().into_iter().for_each(|slot| self.page().ring(slot));
                        }
                        // A page that lies about the account asks for memory that the client does not have: evict no more in
                        // this call.
                        evicts = self.books.resident() < before;
                        if expected && evicts {
                            return Ok(Next::Sleep { seen, until: Some(now()) });
                        }
                        continue;
                    }
                    if prefetches && order.prefetch(self.books.slot) > 0 {
                        // Once for each call: memory that the runtime has left out does not fit.
                        prefetches = false;
                        let fetched = |bytes| Event::Prefetched { bytes };
                        self.noted(Direction::In, Event::Prefetches, fetched, || runtime.prefetch())?;
                        continue;
                    }
                    let until = match self.phase {
                        Phase::Waiting => policy::next_decision(&snapshot, self.decided),
                        // Then others make room for what it brings in.
                        _ => policy::expected_from(&snapshot, self.books.slot)
                            .filter(|from| *from > self.decided),
                    };
                    let retry = (!evicts).then(|| now().saturating_add(STARVED_POLL_INTERVAL));
                    let resumed = self.page().suspension(self.books.slot).ends();
                    match until {
                        Some(due) if due <= now() => self.end_of_slice(),
                        until => {
                            let until = [until, retry, resumed].into_iter().flatten().min();
                            return Ok(Next::Sleep { seen, until });
                        }
                    }
                }
                Action::AwaitDrain | Action::AwaitEnd => return Ok(Next::Sleep { seen, until: None }),
            }
        }
    }

    /// Until when, in ns, a client that is asked to evict `share` granules waits first. Others may hold granules that they do not
    /// need; the same decision has rung them, and what they give back may be enough. After [`SPARES_FIRST`] the client evicts
    /// all the same, because one of the others may be stopped.
    fn leaves_it_to_spares(
        &mut self,
        snapshot: &crate::snapshot::Snapshot,
        share: Granules,
    ) -> Option<Nanos> {
        if share == 0 || policy::spare_holders(snapshot).without(self.books.slot).is_empty() {
            self.left_to_spares = None;
            return None;
        }
        let time = now();
        let until = self.left_to_spares.get_or_insert(time).saturating_add(SPARES_FIRST);
        (time < until).then_some(until)
    }

    fn look(&self) -> crate::snapshot::Snapshot {
        crate::snapshot::Snapshot::take(self.page(), self.page().admitted())
    }

    fn look_ahead(&self) -> Option<Nanos> {
        policy::next_decision(&self.look(), self.decided)
    }

    fn end_of_slice(&mut self) {
        // The time is taken before the decision: a slice that ends in between is decided by the next one.
        self.decided = now();
        self.page().decide();
    }

    fn begin_running(&mut self) {
        let own = self.own();
        if own.wait_since.swap(0, Ordering::Relaxed) != 0 {
            // Before the phase, so that nobody sees the phase Running with the beginning of an earlier slice.
            own.slice_start.store(NOT_BEGUN, Ordering::Relaxed);
            add(&own.slices, 1);
            self.gpu_time = GpuTime::now(self.page(), self.books.slot);
        }
        self.undrained = true;
        let bytes = self.moved(Direction::In).wrapping_sub(self.bytes_before);
        self.enter_by(Phase::Running, Event::Runs { bytes });
        // If a waiter has come while this client was filling, its decision has rung this client, as it rings every admitted
        // one, and the next look finds the waiter and the end of the slice. Another client's slice may be over now that was
        // not over while this client was filling: so decide. The same for a client that is expected: nobody was while this one was
        // filling, and one that is next on another GPU has no time at which it wakes.
        let snapshot = self.look();
        if policy::awaited(&snapshot) || policy::expected(&snapshot).is_some() {
            self.page().decide();
        }
    }

    /// Running -> Filling: not all memory is in place any more, because the client has allocated. The gate is shut. The work in
    /// flight need not be drained, because it uses only memory that is in place. If the client is recalled before all memory is
    /// in place, [`Client::poll`] returns [`Next::Yield`].
    pub fn refill(&mut self) {
        if self.phase == Phase::Running {
            self.enter(Phase::Filling);
        }
    }

    /// Whether some client waits that is not admitted.
    pub fn awaited(&self) -> bool {
        policy::awaited(&self.look())
    }

    /// Whether work of the client may be in flight and it has not begun to drain.
    pub fn has_work(&self) -> bool {
        self.undrained && self.phase != Phase::Draining
    }

    /// Says that the client had no work for `time` ns of its present slice, in a pause in which nobody needed the GPU: it is not
    /// charged for that.
    pub fn paused_beside_nobody(&mut self, time: Nanos) {
        self.unused = self.unused.saturating_add(time);
    }

    /// Running -> Draining: the gate is shut and the submitted work goes on. Also from Filling, for a client that has grown and
    /// has work in flight. Returns how long the slice was, in ns; 0 if the client has no work to drain.
    pub fn drain(&mut self) -> Nanos {
        if !self.has_work() {
            return 0;
        }
        let snapshot = self.look();
        let measured = self.gpu_time.since(self.page(), self.books.slot);
        let spent = Spent { measured, unused: std::mem::take(&mut self.unused) };
        let end = policy::end_slice(&snapshot, self.books.slot, spent);
        let own = self.own();
        add(&own.run_ns, end.ran);
        add(&own.charged_ns, end.charged);
        own.virtual_time.store(end.virtual_time, Ordering::Relaxed);
        own.turn_used.store(end.turn_used as u64, Ordering::Relaxed);
        own.last_ran.store(snapshot.now, Ordering::Relaxed);
        add(&own.yields, 1);
        // Who gives way though nobody recalled it leaves the rest of its turn.
        let by_itself = self.books.admitted();
        self.turn_over = end.used_up || by_itself;
        let why = match (by_itself, end.used_up) {
            (true, _) => Why::ByItself,
            (false, true) => Why::TurnOver,
            (false, false) => Why::Interrupted,
        };
        self.enter_by(Phase::Draining, Event::Drains(why));
        end.ran
    }

    /// Draining -> Filling: the work has not ended, and nobody waits for the client's memory any more. Its memory is in place,
    /// so it runs on if a decision admits it; else [`Client::poll`] returns [`Next::Yield`].
    pub fn resume(&mut self) {
        if self.phase == Phase::Draining {
            self.take_place(Turn::Same);
            // Who was admitted meanwhile came before.
            self.take_ticket();
            self.enter(Phase::Filling);
            self.page().decide();
        }
    }

    /// Whether the client must give way: an admitted client lacks granules, or a client waits for its turn, or a user has paused
    /// this one.
    pub fn is_needed(&self) -> bool {
        self.is_paused() || policy::spares_are_wanted(&self.look())
    }

    /// Draining -> Waiting, if there is `more` to do: at the end of the queue if it has used up its turn, else where it stood
    /// before, with what is left of its turn. Without more -> Idle.
    pub fn drained(&mut self, more: bool) {
        if self.phase != Phase::Draining {
            return;
        }
        self.undrained = false;
        let used_up = &self.own().consecutive_slices;
        let turns = policy::turns_in_a_row(used_up.load(Ordering::Relaxed), more, self.turn_over);
        used_up.store(turns, Ordering::Relaxed);
        match (more, self.turn_over) {
            (true, true) => self.queue(Turn::Next),
            (true, false) => self.queue(Turn::Same),
            (false, _) => {
                // Unless somebody has said so more exactly.
                let idle_since = self.own().idle_since.load(Ordering::Relaxed);
                let last_ran = self.own().last_ran.load(Ordering::Relaxed);
                if idle_since < self.own().slice_start.load(Ordering::Relaxed) {
                    self.idle(last_ran, 0, 0);
                }
                self.enter(Phase::Idle);
                self.page().decide();
            }
        }
    }

    /// Says that the client, which is about to give way because it is idle, has had no work since the time `since`, ns, and is
    /// expected to have none for `pause` ns from then on; 0 if nobody knows. It is decided by this whose memory goes first.
    ///
    /// One whose pauses are regular has work again at the time `returns_at`, ns, and brings its memory in before, if it can
    /// ([`policy::expected`]); 0 if nobody knows.
    pub fn idle(&self, since: Nanos, pause: Nanos, returns_at: Nanos) {
        self.own().idle_since.store(since, Ordering::Relaxed);
        self.own().pause.store(pause, Ordering::Relaxed);
        self.own().returns_at.store(returns_at, Ordering::Relaxed);
    }

    /// Says when an idle client will need the GPU, ns, or that it is [`policy::NEXT`], because its process is likely to have another GPU then that it waits for
    /// ([`crate::gang_order::GangOrder::asks_at`]); or that this is not so any more. True if it is anything new: then
    /// [`Client::poll`] may have something to do.
    pub fn foresee(&mut self, asks_at: Option<Nanos>) -> bool {
        let (at, own) = (asks_at.unwrap_or(0), &self.own().returns_at);
        // What it has said of a pause since then stays.
        let said = self.foreseen != 0 && own.load(Ordering::Relaxed) == self.foreseen;
        if self.phase != Phase::Idle || (at == 0 && !said) || (said && at == self.foreseen) {
            return false;
        }
        own.store(at, Ordering::Relaxed);
        self.foreseen = at;
        // Others may have to make room for it, or need not any more.
        self.page().decide();
        true
    }

    /// Gives the slot up. The caller has released all memory; the books say so, whatever they said
    /// before. The arbiter clears the slot when it next looks.
    pub fn leave(self) {
        self.books.end(0);
    }

    /// Waits for the GPU and brings all memory in. When it returns, the client runs. The caller has waited for the work that it
    /// submitted before.
    ///
    /// # Errors
    /// The runtime's.
    pub fn acquire<R: Runtime>(&mut self, runtime: &mut R) -> Result<(), R::Error> {
        self.request();
        while self.phase != Phase::Running {
            match self.poll(runtime)? {
                Next::Sleep { seen, until } => self.page().wait_doorbell(self.books.slot, seen, until),
                // It has allocated, and is not admitted any more.
                Next::Yield => self.release(true),
                Next::Open => {}
            }
        }
        self.books.begin_slice();
        Ok(())
    }

    /// Whether a running client should [release](Client::release) the GPU now: its slice is over and somebody waits.
    pub fn should_yield(&mut self) -> bool {
        if self.phase != Phase::Running {
            return false;
        }
        if self.books.admitted() && self.look_ahead().is_some_and(|due| due <= now()) {
            self.end_of_slice();
            self.begin_next_turn();
        }
        !self.books.admitted()
    }

    /// Stops running. The caller has waited for its work. With `more` to do, the client queues again at once.
    pub fn release(&mut self, more: bool) {
        self.drain();
        self.drained(more);
    }

    /// Makes room for others while this client does not run, and sleeps until something has happened, at most until the time
    /// `until` (CLOCK_MONOTONIC ns).
    ///
    /// # Errors
    /// The runtime's.
    pub fn serve<R: Runtime>(&mut self, runtime: &mut R, until: Option<Nanos>) -> Result<(), R::Error> {
        if let Next::Sleep { seen, until: due } = self.poll(runtime)? {
            let until = [until, due].into_iter().flatten().min();
            self.page().wait_doorbell(self.books.slot, seen, until);
        }
        Ok(())
    }
}

/// A runtime with no memory to move: for clients that only take turns.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoMemory;

impl Runtime for NoMemory {
    type Error = std::convert::Infallible;

    fn fill(&mut self) -> Result<Fill, Self::Error> {
        Ok(Fill::Complete)
    }

    fn evict(&mut self, _granules: Granules) -> Result<(), Self::Error> {
        Ok(())
    }
}

/// A runtime without memory: it takes granules and gives them back. For the model checker and the benchmarks.
pub struct Bookkeeper<P> {
    books: Books<P>,
    chunk: Granules,
}

impl<P: Deref<Target = Page> + Clone> Bookkeeper<P> {
    /// Takes and gives back `chunk` granules at a time.
    pub fn new(books: &Books<P>, chunk: Granules) -> Self {
        Self { books: books.clone(), chunk }
    }
}

impl<P: Deref<Target = Page>> Runtime for Bookkeeper<P> {
    type Error = std::convert::Infallible;

    fn fill(&mut self) -> Result<Fill, Self::Error> {
        loop {
            let missing = self.books.demand().saturating_sub(self.books.resident());
            if missing == 0 {
                return Ok(Fill::Complete);
            }
            if self.books.take(missing.min(self.chunk)) == Fill::Recalled {
                return Ok(Fill::Recalled);
            }
        }
    }

    fn evict(&mut self, granules: Granules) -> Result<(), Self::Error> {
        let mut left = granules;
        while left > 0 {
            let chunk = left.min(self.chunk);
            self.books.give(chunk);
            left -= chunk;
        }
        Ok(())
    }

    fn prefetch(&mut self) -> Result<(), Self::Error> {
        while self.books.take_ahead(self.books.ahead().clamp(1, self.chunk)) {}
        Ok(())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::page::Stall;
    use crate::page::{Quantum, Settings};
    use crate::shares::Shares;
    use crate::slot::Process;
    use crate::units::SECOND;

    type Shared = std::sync::Arc<Page>;

    fn client(page: &Shared, demand: Granules) -> (Client<Shared>, Bookkeeper<Shared>) {
        let slot = page.open_slot(Process { pid: 7, started: 7 }, "", 1).expect("a slot is free");
        let client = Client::new(page.clone(), slot);
        client.books().grow(demand);
        let runtime = Bookkeeper::new(client.books(), 1);
        (client, runtime)
    }

    /// A page with time for everything: no slice ends by itself.
    fn page(capacity: Granules) -> Shared {
        let page = Shared::from(Page::for_tests(capacity));
        let quantum = Quantum::Fixed(u64::MAX);
        page.set_settings(Settings { quantum, ..Settings::default() });
        page
    }

    /// Its process waits for another GPU: it brings its memory in before it asks, and says no more of it afterwards than of its pauses.
    #[test]
    fn an_idle_client_is_expected_when_its_process_is_likely_to_have_another_gpu() {
        let page = page(8);
        let (mut client, mut runtime) = client(&page, 4);
        let said = |client: &Client<Shared>| client.own().returns_at.load(Ordering::Relaxed);
        let sleeps_until = |next| match next {
            Ok(Next::Sleep { until, .. }) => until,
            other => panic!("{other:?}"),
        };
        let later = now() + 1_000 * SECOND;
        assert!(client.foresee(Some(later)) && !client.foresee(Some(later)));
        let until = sleeps_until(client.poll(&mut runtime)).expect("it is expected before that");
        assert!(until < later && client.books().resident() == 0);
        assert!(client.foresee(Some(now())));
        let _ = client.poll(&mut runtime);
        assert_eq!((client.books().resident(), client.phase()), (4, Phase::Idle));
        assert!(client.foresee(None) && !client.foresee(None));
        assert_eq!(said(&client), 0);
        // What it says of a pause is not taken back.
        assert!(client.foresee(Some(later)));
        client.idle(1, 2, 3);
        assert!(!client.foresee(None));
        assert_eq!(said(&client), 3);
        client.request();
        assert!(!client.foresee(Some(later)), "it has asked");
        assert_eq!(said(&client), 3);
    }

    /// Nobody is expected while a client fills. Afterwards the one that is next is, and nothing else would wake it.
    #[test]
    fn who_is_next_on_another_gpu_is_rung_when_a_fill_is_over() {
        let page = page(8);
        let (mut holder, mut holders) = client(&page, 4);
        let (mut next, mut runtime) = client(&page, 4);
        holder.request();
        assert!(next.foresee(Some(policy::NEXT)));
        let _ = next.poll(&mut runtime);
        assert_eq!(next.books().resident(), 0, "the other one fills");
        let rung = || page.doorbell(next.books().slot());
        let before = rung();
        assert_eq!(holder.poll(&mut holders), Ok(Next::Open));
        assert_ne!(rung(), before);
        let _ = next.poll(&mut runtime);
        assert_eq!(next.books().resident(), 4);
    }

    /// The holder's process waits for another GPU, so its slice has not begun, and is not over although a client waits.
    #[test]
    fn a_slice_is_not_over_before_it_has_begun() {
        let page = page(4);
        page.set_settings(Settings { quantum: Quantum::Fixed(0), ..Settings::default() });
        let (mut holder, mut moves) = client(&page, 3);
        let (mut waiter, mut its_moves) = client(&page, 3);
        holder.request();
        assert_eq!(holder.poll(&mut moves), Ok(Next::Open));
        waiter.request();
        for _ in 0..2 {
            assert!(matches!(holder.poll(&mut moves), Ok(Next::Sleep { until: None, .. })));
            assert!(matches!(waiter.poll(&mut its_moves), Ok(Next::Sleep { until: None, .. })));
        }
        assert!(holder.books().begin_slice(), "and now it begins");
        assert!(!holder.books().begin_slice(), "once");
        holder.books().renew_slice();
        assert_eq!(holder.poll(&mut moves), Ok(Next::Yield), "somebody waits, so it is not renewed");
    }

    /// Granules that a client keeps and does not need are given back before another client evicts. If they are not given back in
    /// time, the other evicts all the same.
    #[test]
    fn what_nobody_needs_goes_before_what_somebody_needs() {
        let page = page(10);
        let (mut spare_holder, mut its_moves) = client(&page, 4);
        let (mut idle, mut moves) = client(&page, 4);
        spare_holder.acquire(&mut its_moves).unwrap();
        idle.acquire(&mut moves).unwrap();
        idle.release(false);
        assert!(matches!(idle.poll(&mut moves), Ok(Next::Sleep { .. })));
        spare_holder.books().shrink(4);
        let rung = page.doorbell(spare_holder.books().slot());
        let (mut third, _) = client(&page, 6);
        third.request();
        assert!(third.books().admitted());
        assert_ne!(page.doorbell(spare_holder.books().slot()), rung, "it is told that somebody lacks room");
        assert!(matches!(idle.poll(&mut moves), Ok(Next::Sleep { until: Some(_), .. })));
        assert_eq!(idle.books().resident(), 4, "it waits for what nobody needs");
        spare_holder.books().give(4);
        assert!(matches!(idle.poll(&mut moves), Ok(Next::Sleep { until: None, .. })));
        assert_eq!(idle.books().resident(), 4);
        // One that is stopped gives nothing back.
        spare_holder.books().try_take(4).unwrap();
        while idle.books().resident() > 0 {
            assert!(matches!(idle.poll(&mut moves), Ok(Next::Sleep { .. })));
        }
    }

    /// Who makes room depends on the time. Whoever the decision rang may have looked when another one was to make room.
    #[test]
    fn a_fill_that_lacks_room_rings_those_who_are_to_make_it_until_it_has_it() {
        let page = page(10);
        let (mut idle, mut moves) = client(&page, 4);
        idle.acquire(&mut moves).unwrap();
        idle.release(false);
        let (mut filler, _) = client(&page, 8);
        filler.request();
        assert!(filler.books().admitted());
        for _ in 0..3 {
            let rung = page.doorbell(idle.books().slot());
            filler.books().wait_for_granules(filler.books().try_take(8).unwrap_err());
            assert_ne!(page.doorbell(idle.books().slot()), rung, "the one that has the memory");
        }
        assert!(matches!(idle.poll(&mut moves), Ok(Next::Sleep { .. })));
        assert_eq!(idle.books().resident(), 2);
        filler.books().try_take(8).unwrap();
    }

    #[test]
    fn a_slice_that_nobody_waits_for_begins_anew() {
        let page = page(4);
        let (mut holder, mut moves) = client(&page, 3);
        holder.acquire(&mut moves).unwrap();
        let begun = page.view(holder.books().slot()).slice_start;
        while now() == begun {}
        holder.books().renew_slice();
        assert!(page.view(holder.books().slot()).slice_start > begun);
    }

    /// Its pauses are no part of what it is charged with, once.
    #[test]
    fn a_pause_in_which_nobody_needed_the_gpu_is_not_charged() {
        let page = page(4);
        let (mut holder, mut moves) = client(&page, 3);
        let slot = holder.books().slot();
        let charged = |page: &Page| page.slot(slot).own.charged_ns.load(Ordering::Relaxed);
        holder.acquire(&mut moves).unwrap();
        let begun = page.view(slot).slice_start;
        while now() < begun + MILLISECOND {}
        holder.paused_beside_nobody(SECOND);
        holder.release(true);
        assert_eq!((charged(&page), page.view(slot).virtual_time), (0, 0));
        holder.acquire(&mut moves).unwrap();
        let begun = page.view(slot).slice_start;
        while now() < begun + MILLISECOND {}
        holder.release(false);
        assert!(charged(&page) >= MILLISECOND && page.view(slot).virtual_time >= MILLISECOND);
    }

    /// While clients take compute turns it is measured how long each had the GPU, and it is charged with that.
    #[test]
    fn who_takes_compute_turns_is_charged_with_what_was_measured() {
        let page = page(4);
        let (mut holder, mut moves) = client(&page, 3);
        let slot = holder.books().slot();
        let charged = |page: &Page| page.slot(slot).own.charged_ns.load(Ordering::Relaxed);
        let slice = |holder: &mut Client<Shared>, moves: &mut Bookkeeper<Shared>, within: &dyn Fn(&Page)| {
            let before = charged(&page);
            holder.acquire(moves).unwrap();
            let begun = page.view(slot).slice_start;
            while now() < begun + MILLISECOND {}
            within(&page);
            holder.release(false);
            charged(&page) - before
        };
        page.begin_turns(slot, now());
        let measured = |page: &Page| page.charge_turn(slot, 7_000, now());
        assert_eq!(slice(&mut holder, &mut moves, &measured), 7_000);
        // It took none for a while, or only from the middle of the slice on, or others went on beside it.
        page.end_turns(slot);
        assert!(slice(&mut holder, &mut moves, &measured) >= MILLISECOND);
        assert!(slice(&mut holder, &mut moves, &|page: &Page| page.begin_turns(slot, now())) >= MILLISECOND);
        assert_eq!(slice(&mut holder, &mut moves, &measured), 7_000);
        let overruns = |page: &Page| add(&page.slot(slot).compute.overruns, 1);
        assert!(slice(&mut holder, &mut moves, &overruns) >= MILLISECOND);
    }

    /// Its priority is changed while it waits: its deadline follows as soon as it looks, and counts from when it began.
    #[test]
    fn a_waiter_with_new_shares_has_a_new_deadline() {
        let page = page(4);
        let (mut holder, mut moves) = client(&page, 3);
        let (mut waiter, mut its_moves) = client(&page, 3);
        holder.acquire(&mut moves).unwrap();
        let slot = waiter.books().slot();
        // It has had more than its share, so that its deadline is not nearer for that.
        page.slot(slot).own.virtual_time.store(1 << 60, Ordering::Relaxed);
        page.slot(slot).own.slice_start.store(1, Ordering::Relaxed);
        page.slot(slot).own.last_ran.store(2, Ordering::Relaxed);
        waiter.request();
        let deadline = |page: &Page| page.view(slot).deadline;
        let since = page.slot(slot).own.wait_since.load(Ordering::Relaxed);
        page.set_settings(Settings { quantum: Quantum::Fixed(60 * SECOND), ..page.settings() });
        page.set_shares(slot, Shares { weight: 200, ..Shares::default() });
        waiter.poll(&mut its_moves).unwrap();
        let normal = deadline(&page) - since;
        assert!(normal >= page.settings().deadline + 2 * 60 * SECOND, "and twice the turn of the other");
        page.set_shares(slot, Shares::default());
        let low = since + 2 * normal;
        for (priority, right) in [(Priority::Low, low), (Priority::High, since), (Priority::Low, low)] {
            let seen = page.doorbell(slot);
            page.set_shares(slot, Shares { priority, ..Shares::default() });
            assert_ne!(page.doorbell(slot), seen, "it is rung");
            waiter.poll(&mut its_moves).unwrap();
            assert_eq!(deadline(&page), right, "{priority}");
        }
        assert_eq!(waiter.phase(), Phase::Waiting);
    }

    /// They take turns by themselves, with no time to any of them.
    #[test]
    fn who_gives_the_gpu_up_by_itself_stands_behind_those_who_wait() {
        let page = page(4);
        page.set_settings(Settings { deadline: 0, ..page.settings() });
        let mut clients = [client(&page, 3), client(&page, 3)];
        let (holder, moves) = &mut clients[0];
        holder.acquire(moves).unwrap();
        clients[1].0.request();
        for turn in 0..6 {
            clients[turn % 2].0.release(true);
            assert!(clients[(turn + 1) % 2].0.books().admitted(), "turn {turn}");
            // The one makes room, and the other fills.
            for index in [turn % 2, (turn + 1) % 2] {
                let (client, moves) = &mut clients[index];
                client.poll(moves).unwrap();
            }
            assert!(clients[(turn + 1) % 2].0.books().begin_slice());
        }
    }

    /// The granule that it could not release stays in the books, as one that cannot move.
    #[test]
    fn a_client_that_breaks_down_gives_back_what_it_can() {
        let page = page(4);
        let (mut broken, mut moves) = client(&page, 3);
        let (mut waiter, mut its_moves) = client(&page, 3);
        broken.acquire(&mut moves).unwrap();
        waiter.request();
        broken.books().end(1);
        let view = page.view(broken.books().slot());
        assert_eq!((view.phase, view.resident, view.unmovable, view.demand), (Phase::Idle, 1, 1, 1));
        waiter.acquire(&mut its_moves).unwrap();
        broken.books().end(0);
        assert_eq!(page.view(broken.books().slot()).phase, Phase::Leaving);
        assert_eq!(page.free().granules, 1);
    }

    /// Its work did not end, and the client that wanted its memory has left: it runs on, and its memory was not touched.
    #[test]
    fn a_drain_that_nobody_needs_any_more_is_given_up() {
        let page = page(4);
        let (mut first, mut moves) = client(&page, 3);
        let (mut second, _) = client(&page, 3);
        page.set_settings(Settings { quantum: Quantum::Fixed(0), ..Settings::default() });
        first.acquire(&mut moves).unwrap();
        second.request();
        assert_eq!(first.poll(&mut moves), Ok(Next::Yield));
        first.drain();
        assert!(second.books().admitted() && first.is_needed());
        assert!(matches!(first.poll(&mut moves), Ok(Next::Sleep { .. })));
        assert_eq!(first.books().resident(), 3, "nobody is asked to evict what work may use");
        second.leave();
        assert!(!first.is_needed());
        first.resume();
        assert_eq!(first.poll(&mut moves), Ok(Next::Open));
        assert_eq!((first.phase(), first.books().resident()), (Phase::Running, 3));
    }

    /// As above, and another client asks for the GPU in between: it drains again before it evicts.
    #[test]
    fn a_drain_that_is_given_up_in_vain_begins_again() {
        let page = page(4);
        let (mut first, mut moves) = client(&page, 3);
        let (mut second, mut its_moves) = client(&page, 3);
        first.acquire(&mut moves).unwrap();
        first.drain();
        second.request();
        assert!(second.books().admitted());
        first.resume();
        assert_eq!(first.poll(&mut moves), Ok(Next::Yield));
        first.drain();
        first.drained(true);
        first.poll(&mut moves).unwrap();
        second.acquire(&mut its_moves).unwrap();
        assert_eq!(first.books().resident(), 1);
    }

    #[test]
    fn a_stall_lasts_from_when_it_began_until_it_ends() {
        let page = page(4);
        let (client, _) = client(&page, 3);
        let books = client.books();
        let told = || {
            let details = page.details(books.slot()).unwrap();
            (details.stall, details.stalls)
        };
        let since = || page.details(books.slot()).unwrap().stall_since;
        assert_eq!((told(), since()), ((Stall::None, 0), 0));
        books.stalled(Stall::DrainAwaitsSubmission);
        let begun = since();
        while now() == begun {}
        books.stalled(Stall::EndlessWork);
        assert_eq!((told(), since()), ((Stall::EndlessWork, 1), begun), "for another reason, since then");
        books.stall_ended();
        assert_eq!((told(), since()), ((Stall::None, 1), 0));
        books.stalled(Stall::NoHostMemory);
        assert_eq!(told(), (Stall::NoHostMemory, 2));
    }

    #[test]
    fn who_withdraws_is_not_in_anybodys_way() {
        let page = page(4);
        let (mut first, mut moves) = client(&page, 3);
        let (mut second, mut its_moves) = client(&page, 3);
        let (mut third, mut last_moves) = client(&page, 3);
        first.acquire(&mut moves).unwrap();
        second.request();
        third.request();
        second.withdraw();
        assert_eq!(second.phase(), Phase::Idle);
        first.release(false);
        assert!(third.books().admitted(), "it is next");
        first.poll(&mut moves).unwrap();
        third.acquire(&mut last_moves).unwrap();
        third.release(false);
        // Admitted between two looks of its own, it takes no memory and gives the right back.
        second.request();
        assert!(second.books().admitted());
        second.withdraw();
        second.poll(&mut its_moves).unwrap();
        assert_eq!((second.books().admitted(), second.books().resident()), (false, 0));
    }

    /// Two that fit run. The second one grows while its work is under way, and no longer fits.
    #[test]
    fn a_client_that_grew_and_was_recalled_drains_before_anything_is_evicted() {
        let page = page(4);
        let (mut first, mut moves) = client(&page, 2);
        let (mut second, mut its_moves) = client(&page, 2);
        first.acquire(&mut moves).unwrap();
        second.acquire(&mut its_moves).unwrap();
        assert!(!second.books().grow(1), "the one that came later is recalled");
        second.refill();
        // The first one asks for what the second one has.
        first.books().grow(2);
        first.refill();
        assert_eq!(second.poll(&mut its_moves), Ok(Next::Yield));
        assert_eq!(second.books().resident(), 2, "its work still uses it");
        second.drain();
        assert_eq!(second.phase(), Phase::Draining);
        second.poll(&mut its_moves).unwrap();
        assert_eq!(second.books().resident(), 2, "and still does");
        second.drained(true);
        second.poll(&mut its_moves).unwrap();
        assert_eq!(second.books().resident(), 0, "now it makes room");
        first.acquire(&mut moves).unwrap();
        assert_eq!(first.books().resident(), 4);
    }

    /// As above, for a runtime that asks for its turn again and has no work under way then.
    #[test]
    #[cfg_attr(miri, ignore = "the kernel's look at half a word is a race of two sizes to Miri")]
    fn a_client_that_grew_and_was_recalled_queues_again() {
        let page = page(4);
        let (mut first, mut moves) = client(&page, 2);
        let (mut second, mut its_moves) = client(&page, 2);
        first.acquire(&mut moves).unwrap();
        second.acquire(&mut its_moves).unwrap();
        second.books().grow(1);
        second.refill();
        let waiter = second.books().slot();
        let again = std::thread::spawn(move || {
            second.acquire(&mut its_moves).unwrap();
            second.books().resident()
        });
        while page.view(waiter).phase != Phase::Waiting {
            std::thread::yield_now();
        }
        first.release(false);
        while page.view(waiter).phase != Phase::Running {
            first.poll(&mut moves).unwrap();
        }
        assert_eq!(again.join().unwrap(), 3);
    }
}
