//! One GPU under nvshare: clients, phases, link.
//!
//! Who runs, how long and who makes room is decided by [`nvshare::policy`] alone, on a [`Snapshot`] of the same shape
//! as a page's. This module does to the snapshot what [`nvshare::client`] does to the page at the same arrows, and
//! moves memory as the swap engine does: chunk by chunk, each way over the link at once, granules taken before a chunk
//! comes in and given back when it has gone out. A switch is nowhere written down: it is what comes of that.

use super::fairness::Turn;
use super::gang::{Seat, Speed};
use super::job::Job;
use super::metrics::{ClientMetrics, GpuMetrics, START, State, Use};
use super::observed::Observed;
use super::quantity::Rate;
use super::scenario::Scenario;
use super::task::Task;
use super::turns::{GpuTime, Turns, Work};
use nvshare::gang_order::GpuState;
use nvshare::page::{Phase, Settings};
use nvshare::pauses::{Pauses, Rhythm};
use nvshare::placement::{self, Load};
use nvshare::policy::{NOT_BEGUN, Spent};
use nvshare::slot::{SLOTS, SlotIndex, SlotSet};
use nvshare::snapshot::{SlotView, Snapshot};
use nvshare::step::{Action, Facts, step};
use nvshare::units::{Granules, Nanos, bytes_of, granules_for, granules_in};
use nvshare::{policy, usage};

/// How long it takes to unmap and to release a granule that needs no copy, ns (`tests/gpu/fill.cu`, H200: 46 us for 64 MiB).
const RELEASE: Nanos = 1_400;

/// What is the same for all GPUs.
#[derive(Debug, Clone)]
pub struct Machine {
    capacity: Granules,
    context: Granules,
    chunk: Granules,
    link_in: Rate,
    link_out: Rate,
    overflow: Option<Rate>,
    switch: Nanos,
    drain: Nanos,
    settings: Settings,
}

impl Machine {
    /// The scenario's.
    pub fn of(scenario: &Scenario) -> Self {
        let gpus = &scenario.gpus;
        Self {
            capacity: scenario.capacity(),
            context: granules_for(gpus.context.0),
            chunk: granules_in(gpus.chunk.0).max(1),
            link_in: gpus.link_in,
            link_out: gpus.link_out,
            overflow: gpus.overflow,
            switch: gpus.switch.0,
            drain: gpus.drain.0,
            settings: scenario.policy.settings(),
        }
    }
}

/// A client of the GPU.
#[derive(Debug)]
struct Client {
    task: Task,
    /// Granules that were never in use: no copy brings them in.
    absent: Granules,
    /// Granules on the GPU of which the host has a copy from before.
    kept: Granules,
    /// Granules that it still has to give up of what it was asked for.
    evicting: Granules,
    wait_since: Option<Nanos>,
    /// When it last decided in this phase because a slice was over.
    decided: Nanos,
    /// All is in place; it runs from then on.
    ready_at: Option<Nanos>,
    /// GPU time of the work that a drain waits for.
    submitted: Nanos,
    /// That work is done; it has drained then.
    drained_at: Option<Nanos>,
    /// When its present turn began to run, and the GPU time that it had had by then.
    turn: Option<(Nanos, Nanos)>,
    /// It has used up its turn, as far as it had come when it began to drain.
    turn_over: bool,
    pauses: Pauses,
    rhythm: Rhythm,
    /// When it takes its request back unless it has work again.
    withdraws: Option<Nanos>,
    /// Since when it has nothing to do, while somebody waits or since it gave way.
    paused: Option<Nanos>,
    /// Since when it has nothing to do, if that was seen.
    idle_from: Option<Nanos>,
    /// What it had had in compute turns when its slice began.
    gpu_time: GpuTime,
    /// How long its pauses of the present slice were together that were seen to begin while nobody needed the GPU.
    unused: Nanos,
    /// Since when it has run without interruption.
    running_since: Nanos,
    /// It has run since it last drained: work that it submitted may be on the GPU.
    undrained: bool,
    /// Its seat among those that it runs together with.
    seat: Option<Seat>,
}

impl Client {
    /// Granules leave the GPU, first those that the host has a copy of. How many bytes must be copied for that.
    fn copied_out(&mut self, granules: Granules) -> u64 {
        let kept = self.kept.min(granules);
        self.kept -= kept;
        let unchanged = (bytes_of(kept) as f64 * self.task.job.unchanged) as u64;
        let bytes = bytes_of(granules) - unchanged;
        self.task.tally.bytes_out += bytes;
        self.task.tally.bytes_unchanged += unchanged;
        bytes
    }
}

/// A chunk on its way.
#[derive(Debug, Clone, Copy)]
struct Transfer {
    slot: SlotIndex,
    granules: Granules,
    arrives: Nanos,
}

/// One direction of the link.
#[derive(Debug, Default)]
struct Link {
    transfer: Option<Transfer>,
    /// Whose chunk was last: those who use the link take turns.
    last: usize,
}

impl Link {
    /// Of those in `slots`, the next one's turn.
    fn next(&self, slots: impl Iterator<Item = SlotIndex> + Clone) -> Option<SlotIndex> {
        slots.clone().find(|slot| slot.get() > self.last).or_else(|| slots.min())
    }
}

/// A GPU.
#[derive(Debug)]
pub struct Gpu {
    machine: std::sync::Arc<Machine>,
    snapshot: Observed,
    /// Which of those who could compute does.
    turns: Turns,
    clients: Vec<Option<Client>>,
    next_ticket: u64,
    to_gpu: Link,
    to_host: Link,
    pub tally: GpuMetrics,
}

impl Gpu {
    /// An empty one.
    pub fn new(machine: &std::sync::Arc<Machine>) -> Self {
        let snapshot = Snapshot {
            now: START,
            capacity: machine.capacity,
            free: machine.capacity as i32,
            admitted: SlotSet::EMPTY,
            occupied: SlotSet::EMPTY,
            settings: machine.settings,
            bandwidth_in: machine.link_in.0,
            bandwidth_out: machine.link_out.0,
            slots: [SlotView::default(); SLOTS],
        };
        Self {
            machine: machine.clone(),
            turns: Turns::new(machine.settings.deadline),
            snapshot: snapshot.into(),
            clients: Vec::new(),
            next_ticket: 1,
            to_gpu: Link::default(),
            to_host: Link::default(),
            tally: GpuMetrics::default(),
        }
    }

    /// What is on it.
    pub fn load(&self) -> Load {
        let demand = self.snapshot.clients().map(|(_, view)| view.demand).sum();
        Load { clients: self.snapshot.occupied.len(), demand, busy: self.tally.usage() }
    }

    /// How much a newcomer would be held up, by what can be seen of the GPU now.
    pub fn held_up(&mut self, now: Nanos) -> f64 {
        self.reckon(now);
        let need: Granules = self.snapshot.clients().map(|(_, view)| view.demand + view.context).sum();
        let waits = self.clients.iter().flatten().filter_map(|client| client.wait_since);
        let longest = waits.map(|since| now.saturating_sub(since)).max().unwrap_or(0);
        let need = f64::from(need) / f64::from(self.machine.capacity.max(1));
        placement::held_up(need, self.tally.recently(now), longest)
    }

    /// A client comes, with its seat if it runs together with others. There is a slot for it.
    pub fn arrive(&mut self, job: Job, tally: ClientMetrics, seat: Option<Seat>, now: Nanos) {
        self.reckon(now);
        let slot = (0..SLOTS).filter_map(SlotIndex::new).find(|slot| !self.snapshot.occupied.contains(*slot));
        let slot = slot.expect("placement leaves a slot");
        if self.clients.len() <= slot.get() {
            self.clients.resize_with(slot.get() + 1, || None);
        }
        self.snapshot.slots[slot.get()] = SlotView {
            demand: job.memory,
            context: self.machine.context,
            weight: usage::weight(job.weight),
            priority: job.priority,
            ..SlotView::default()
        };
        self.snapshot.free -= self.machine.context as i32;
        self.snapshot.occupied = self.snapshot.occupied.with(slot);
        self.turns.arrive(slot, &job);
        seat.iter().for_each(|seat| seat.sit(slot));
        self.clients[slot.get()] = Some(Client {
            absent: job.memory,
            kept: 0,
            task: Task::new(job, tally, now),
            evicting: 0,
            wait_since: None,
            decided: 0,
            ready_at: None,
            submitted: 0,
            drained_at: None,
            turn: None,
            turn_over: false,
            pauses: Pauses::default(),
            rhythm: Rhythm::default(),
            withdraws: None,
            paused: None,
            idle_from: None,
            gpu_time: GpuTime::default(),
            unused: 0,
            running_since: now,
            undrained: false,
            seat,
        });
        self.tally.came(self.snapshot.occupied.len());
        self.decide();
    }

    fn client(&self, slot: SlotIndex) -> &Client {
        self.clients[slot.get()].as_ref().expect("an occupied slot has a client")
    }

    fn client_mut(&mut self, slot: SlotIndex) -> &mut Client {
        self.clients[slot.get()].as_mut().expect("an occupied slot has a client")
    }

    fn view_mut(&mut self, slot: SlotIndex) -> &mut SlotView {
        &mut self.snapshot.slots[slot.get()]
    }

    fn slots(&self) -> impl Iterator<Item = SlotIndex> + Clone + use<> {
        let bits = self.snapshot.occupied.bits();
        (0..SLOTS).filter(move |index| bits >> index & 1 == 1).filter_map(SlotIndex::new)
    }

    /// As [`nvshare::Page::decide`]. True if it changed something.
    fn decide(&mut self) -> bool {
        let admitted = self.snapshot.admit();
        if admitted == self.snapshot.admitted {
            return false;
        }
        self.snapshot.admitted = admitted;
        true
    }

    fn enter(&mut self, slot: SlotIndex, phase: Phase, now: Nanos) {
        self.view_mut(slot).phase = phase;
        let client = self.client_mut(slot);
        client.decided = 0;
        client.ready_at = None;
        client.show(phase, false, now);
        self.show_state(slot);
    }

    /// Shows the others of its team what a client has of the GPU.
    fn show_state(&self, slot: SlotIndex) {
        let Some(seat) = &self.client(slot).seat else { return };
        let admitted = self.snapshot.admitted.contains(slot);
        seat.has(match self.snapshot.view(slot).phase {
            Phase::Waiting if !admitted => GpuState::Waiting,
            Phase::Filling => GpuState::Growing,
            Phase::Running => GpuState::Ready,
            Phase::Draining => GpuState::Draining,
            Phase::Waiting | Phase::Idle | Phase::Leaving => GpuState::Out,
        });
    }

    /// Granules of a client's memory that the GPU cannot give it whoever makes room: used over the link.
    fn overflow(&self, slot: SlotIndex) -> Granules {
        self.snapshot.view(slot).demand.saturating_sub(self.snapshot.usable())
    }

    /// Granules that it must still bring in before it runs.
    fn missing(&self, slot: SlotIndex) -> Granules {
        self.snapshot.view(slot).missing().saturating_sub(self.overflow(slot))
    }

    /// What one ns of the GPU is worth to this client, as a fraction: less where it uses memory over the link.
    fn worth(&self, slot: SlotIndex) -> Speed {
        let iteration = u128::from(self.client(slot).task.job.iteration.max(1));
        let over = bytes_of(self.overflow(slot));
        let extra = self.machine.overflow.filter(|_| over > 0).map_or(0, |rate| rate.time(over));
        (iteration, iteration + u128::from(extra))
    }

    /// Whether its work is on the GPU now.
    fn computes(&self, slot: SlotIndex) -> bool {
        let together = |seat: &Seat| seat.speed().is_some();
        self.can_compute(slot) && self.has_turn(slot) && self.client(slot).seat.as_ref().is_none_or(together)
    }

    /// Whether it may submit work, as far as compute turns go. Those that run together with others take none.
    fn has_turn(&self, slot: SlotIndex) -> bool {
        self.client(slot).seat.is_some() || self.turns.has(slot)
    }

    /// How fast it computes while `k` do on this GPU: a k-th, and no faster than those that it runs together with.
    fn speed(&self, slot: SlotIndex, k: u128) -> Speed {
        let (worth, of) = self.worth(slot);
        self.client(slot).seat.as_ref().and_then(Seat::speed).unwrap_or((worth, of * k))
    }

    /// Tells those that run together with others whether they could compute: not before all of them can. True if that
    /// makes a difference.
    pub fn show_work(&self) {
        for slot in self.slots() {
            if let Some(seat) = &self.client(slot).seat {
                seat.could_compute(self.can_compute(slot).then(|| self.worth(slot)));
            }
        }
    }

    /// Tells them how fast they could compute beside the others here that do.
    pub fn show_speed(&self) {
        let computing: Vec<SlotIndex> = self.slots().filter(|slot| self.computes(*slot)).collect();
        for slot in &computing {
            if let Some(seat) = &self.client(*slot).seat {
                let (worth, of) = self.worth(*slot);
                seat.could_compute(Some((worth, of * computing.len() as u128)));
            }
        }
    }

    /// Tells them whether somebody needs this GPU.
    fn show_need(&self) {
        let needed = self.snapshot.needed().is_some();
        for slot in self.slots() {
            self.client(slot).seat.iter().for_each(|seat| seat.is_needed(needed));
        }
    }

    /// Those that wait for this GPU tell the others of their team when their turn is likely to come, and those that wait for an
    /// earlier one are expected here when that is. True if somebody is that was not.
    fn foresee(&mut self) -> bool {
        let mut changed = false;
        for slot in self.slots() {
            let Some(seat) = self.client(slot).seat.clone() else { continue };
            match self.snapshot.view(slot).phase {
                Phase::Waiting => seat.expects(self.snapshot.turn_comes(slot)),
                Phase::Idle => {
                    seat.expects(None);
                    // One that pauses has said when it will be back.
                    if let Some(at) = seat.asks_at() {
                        changed |= self.snapshot.foresees(slot, at);
                    }
                }
                _ => seat.expects(None),
            }
        }
        changed
    }

    /// Whether it has work and all its memory is in place: it computes, if it takes no turns or has the turn.
    fn can_compute(&self, slot: SlotIndex) -> bool {
        let works = self.client(slot).seat.as_ref().is_none_or(Seat::works);
        match self.snapshot.view(slot).phase {
            _ if !works => false,
            Phase::Running => self.client(slot).task.left() > 0,
            // One that fills while its earlier work is still under way has grown.
            Phase::Draining | Phase::Filling => self.client(slot).submitted > 0,
            _ => false,
        }
    }

    /// Its work, as those see it who take compute turns.
    fn work(&self, slot: SlotIndex) -> Work {
        match self.snapshot.view(slot).phase {
            _ if !self.can_compute(slot) || self.client(slot).seat.is_some() => Work::None,
            Phase::Running if self.client(slot).task.kernel_left() == 0 => Work::BetweenKernels,
            _ => Work::UnderWay,
        }
    }

    /// Ends and begins compute turns. True if another client has the turn.
    fn take_turns(&mut self, now: Nanos) -> bool {
        let mut work = [Work::None; SLOTS];
        for slot in self.slots() {
            work[slot.get()] = self.work(slot);
        }
        self.turns.look(|slot| work[slot.get()], now)
    }

    /// GPU time of the work that a client has in flight when it shuts its gate, ns. Without the turn it has none.
    fn in_flight(&self, slot: SlotIndex) -> Nanos {
        let works = self.client(slot).seat.as_ref().map_or_else(|| self.turns.has(slot), Seat::works);
        if works { self.client(slot).task.submitted() } else { 0 }
    }

    /// Whether a client wants the GPU, or keeps it from others in a pause.
    fn contends(&self, slot: SlotIndex) -> bool {
        if self.client(slot).seat.is_some() {
            // It may have to wait for another GPU before it asks for this one.
            return self.client(slot).task.has_work();
        }
        match self.snapshot.view(slot).phase {
            Phase::Running | Phase::Draining if !self.client(slot).task.has_work() => self.snapshot.awaited(),
            phase => phase.wants_gpu() || phase == Phase::Draining,
        }
    }

    /// What the GPU's time goes to; `busy` if somebody computes.
    fn use_of_time(&self, busy: bool) -> Use {
        if busy {
            return Use::Busy;
        }
        // It has the GPU for when its team has all of its GPUs.
        let holds = |slot: SlotIndex| {
            let waits = |seat: &Seat| !seat.works();
            let runs = self.snapshot.view(slot).phase == Phase::Running;
            runs && self.client(slot).seat.as_ref().is_some_and(waits)
        };
        let phase = |slot: SlotIndex| self.snapshot.view(slot).phase;
        let any = |which: &dyn Fn(SlotIndex) -> bool| self.slots().any(which);
        let moves = any(&|slot| self.moves(slot));
        let fills = any(&|slot| phase(slot) == Phase::Filling && self.snapshot.admitted.contains(slot));
        let drains = any(&|slot| phase(slot) == Phase::Draining || self.client(slot).ready_at.is_some());
        if self.turns.all_wait() {
            Use::Idle
        } else if drains || (fills && moves) {
            Use::Switching
        } else if any(&|slot| phase(slot) == Phase::Running) && self.snapshot.needed().is_some()
            || any(&holds)
        {
            Use::Kept
        } else if moves || any(&|slot| self.client(slot).task.has_work()) {
            Use::Switching
        } else {
            Use::Idle
        }
    }

    /// Reckons up to `now` what those who compute have done meanwhile: each of k a k-th.
    pub fn reckon(&mut self, now: Nanos) {
        let time = self.snapshot.pass(now)..now;
        if time.is_empty() {
            return;
        }
        let computing: Vec<SlotIndex> = self.slots().filter(|slot| self.computes(*slot)).collect();
        let k = computing.len();
        let rate = |slot: &SlotIndex| {
            let weight = self.client(*slot).task.tally.weight;
            (slot.get(), 1.0 / (k as f64 * f64::from(weight)))
        };
        let rates: Vec<(usize, f64)> = computing.iter().map(rate).collect();
        let contenders: SlotSet = self.slots().filter(|slot| self.contends(*slot)).collect();
        self.tally.spend(self.use_of_time(k > 0), time.clone(), contenders.bits(), &rates);
        if computing.is_empty() {
            return;
        }
        let elapsed = time.end - time.start;
        self.tally.computed(time);
        for slot in &computing {
            let (worth, of) = self.speed(*slot, k as u128);
            let done = (u128::from(elapsed) * worth / of) as Nanos;
            let client = self.client_mut(*slot);
            client.submitted = client.submitted.saturating_sub(done);
            client.task.works(done, now);
            self.turns.computed(*slot, elapsed, now);
        }
    }

    /// Does all that is due by `now`, up to which all has been reckoned. True if something changed, which others may have to look
    /// at.
    pub fn advance(&mut self, now: Nanos, gone: &mut Vec<ClientMetrics>) -> bool {
        let mut any = false;
        loop {
            let mut changed = self.arrived(now);
            for slot in self.slots() {
                changed |= self.walk(slot, now, gone);
            }
            changed |= self.depart(now);
            changed |= self.take_turns(now);
            changed |= self.foresee();
            self.show_need();
            self.tally.owes(-i64::from(self.snapshot.free));
            if !changed {
                return any;
            }
            any = true;
        }
    }

    /// What a client does that runs together with others, before it does what its phase says ([`nvshare::gang_order`]); as the
    /// engine of a GPU does. True if it did something.
    fn walk_together(&mut self, slot: SlotIndex, now: Nanos) -> bool {
        let Some(seat) = self.client(slot).seat.clone() else { return false };
        let task = &self.client(slot).task;
        let (has_work, is_over) = (task.has_work(), task.is_over());
        match self.snapshot.view(slot).phase {
            Phase::Running if seat.must_give_up() || seat.is_called_to_drain() => {
                self.drain(slot, now);
                true
            }
            Phase::Running if seat.begins() => {
                self.view_mut(slot).slice_start = now;
                let client = self.client_mut(slot);
                client.wait_since = None;
                client.running_since = now;
                client.task.tally.waits.push(seat.waited(now));
                client.task.tally.slices += 1;
                client.show(Phase::Running, false, now);
                if self.snapshot.awaited() {
                    self.decide();
                }
                true
            }
            // It has no work, and one of its GPUs is needed: it gives all of them up.
            Phase::Running if !has_work && !is_over && seat.works() => {
                let gives_way = self.keeps_until(slot) <= now && seat.anybody_is_needed();
                if gives_way {
                    self.drain(slot, now);
                }
                gives_way
            }
            Phase::Waiting if !self.snapshot.admitted.contains(slot) && seat.must_give_up() => {
                self.view_mut(slot).consecutive_slices = 0;
                self.enter(slot, Phase::Idle, now);
                self.decide();
                true
            }
            _ => false,
        }
    }

    /// As [`nvshare::client::Client::poll`], one [`step`] at a time. True if it went along one.
    fn walk(&mut self, slot: SlotIndex, now: Nanos, gone: &mut Vec<ClientMetrics>) -> bool {
        let phase = self.snapshot.view(slot).phase;
        let awaited = self.snapshot.needed().is_some();
        // Both are asked only where they matter: each looks at all clients.
        let watched = awaited || phase == Phase::Running && policy::watches_pauses(&self.snapshot, slot);
        let idle = self.client(slot).idle_from.is_some();
        let long = if idle { policy::head_start(&self.snapshot, slot) } else { 0 };
        let client = self.client_mut(slot);
        client.task.collect(now);
        client.watch_pause(phase, (awaited, watched), long, now);
        if phase == Phase::Running {
            client.show(phase, awaited, now);
        }
        let admitted = self.snapshot.admitted.contains(slot);
        let busy = match phase {
            Phase::Idle | Phase::Waiting => self.moves(slot),
            Phase::Filling => self.brings_in(slot),
            _ => false,
        };
        if busy {
            return false;
        }
        if self.walk_together(slot, now) {
            return true;
        }
        let client = self.client(slot);
        match step(phase, Facts { admitted, in_flight: client.undrained }) {
            Action::StartFilling => {
                self.enter(slot, Phase::Filling, now);
                true
            }
            Action::Queue => {
                self.enter(slot, Phase::Waiting, now);
                true
            }
            Action::Fill if self.missing(slot) == 0 => match client.ready_at {
                None => {
                    let switch = if client.undrained { 0 } else { self.machine.switch };
                    self.client_mut(slot).ready_at = Some(now + switch);
                    true
                }
                Some(ready) if ready <= now => {
                    self.begin_running(slot, now);
                    true
                }
                Some(_) => false,
            },
            Action::Yield => {
                self.drain(slot, now);
                true
            }
            Action::Run if !client.task.has_work() => self.without_work(slot, now, gone),
            Action::Run => self.grow(slot, now) || self.end_of_slice(slot, now),
            Action::AwaitDrain if client.submitted == 0 => match client.drained_at {
                None => {
                    self.client_mut(slot).drained_at = Some(now + self.machine.drain);
                    true
                }
                Some(drained) if drained <= now && client.seat.as_ref().is_none_or(Seat::has_drained) => {
                    self.drained(slot, now);
                    true
                }
                Some(_) => false,
            },
            Action::GiveUpBit => self.decide(),
            Action::Serve if phase == Phase::Waiting && client.withdraws_at().is_some_and(|at| at <= now) => {
                self.view_mut(slot).consecutive_slices = 0;
                self.becomes_idle(slot, now);
                true
            }
            Action::Serve if phase == Phase::Idle && client.task.is_over() => {
                self.leave(slot, now, gone);
                true
            }
            Action::Serve
                if phase == Phase::Idle
                    && client.task.has_work()
                    && client.seat.as_ref().is_none_or(Seat::may_ask) =>
            {
                self.queue(slot, true, now);
                true
            }
            Action::Serve => {
                let share = self.snapshot.evict_share(slot);
                if share > 0 {
                    // A whole chunk, so it may be a little more. Who else could make room is asked anew after it.
                    let all = self.snapshot.view(slot).evictable();
                    self.client_mut(slot).evicting = self.machine.chunk.min(all);
                    self.client_mut(slot).task.tally.becomes(State::Evicting, now);
                    return true;
                }
                phase == Phase::Waiting && self.end_of_slice(slot, now)
            }
            Action::Fill | Action::AwaitDrain | Action::AwaitEnd => false,
        }
    }

    /// Idle or drained -> Waiting, for the next turn or for what is left of the one that was interrupted.
    fn queue(&mut self, slot: SlotIndex, next_turn: bool, now: Nanos) {
        let entry = policy::enter_queue(&self.snapshot, slot);
        if next_turn {
            self.takes_ticket(slot);
            let view = self.view_mut(slot);
            (view.virtual_time, view.turn_start, view.turn_used, view.credit) =
                (entry.virtual_time, entry.virtual_time, 0, entry.credit);
        }
        self.view_mut(slot).deadline = entry.deadline;
        self.client_mut(slot).wait_since = Some(now);
        self.client(slot).seat.iter().for_each(|seat| seat.waits(now));
        self.enter(slot, Phase::Waiting, now);
        self.decide();
        self.show_state(slot);
    }

    fn takes_ticket(&mut self, slot: SlotIndex) {
        self.view_mut(slot).ticket = self.next_ticket;
        self.next_ticket += 1;
    }

    /// It runs on though its turn is over: the next one begins.
    fn begin_next_turn(&mut self, slot: SlotIndex, now: Nanos) {
        if let Some(turn) = policy::next_turn(&self.snapshot, slot) {
            self.end_turn(slot, now);
            self.takes_ticket(slot);
            let client = self.client_mut(slot);
            client.turn = Some((now, client.task.tally.gpu));
            let view = self.view_mut(slot);
            (view.turn_start, view.turn_used, view.credit) = (turn.turn_start, turn.turn_used, 0);
            view.consecutive_slices += 1;
            self.decide();
        }
    }

    fn end_of_slice(&mut self, slot: SlotIndex, now: Nanos) -> bool {
        let due = self.snapshot.next_decision(self.client(slot).decided);
        if due.is_none_or(|due| due > now) {
            return false;
        }
        self.client_mut(slot).decided = now;
        self.decide();
        self.begin_next_turn(slot, now);
        true
    }

    /// Its memory grows, if it is to grow now: at once where there is room; else it fills, while its work in flight goes on,
    /// as [`nvshare::Client::refill`] has it. True if it grew.
    fn grow(&mut self, slot: SlotIndex, now: Nanos) -> bool {
        let client = self.client_mut(slot);
        let more = client.task.grow();
        if more == 0 {
            return false;
        }
        client.absent += more;
        self.view_mut(slot).demand += more;
        self.decide();
        let missing = self.missing(slot);
        if self.snapshot.admitted.contains(slot) && i64::from(missing) <= i64::from(self.snapshot.free) {
            self.snapshot.takes(slot, missing);
            let client = self.client_mut(slot);
            client.absent = client.absent.saturating_sub(missing);
        } else {
            self.client_mut(slot).submitted = self.in_flight(slot);
            self.enter(slot, Phase::Filling, now);
        }
        true
    }

    fn begin_running(&mut self, slot: SlotIndex, now: Nanos) {
        let client = self.client_mut(slot);
        client.submitted = 0;
        if !std::mem::replace(&mut client.undrained, true) {
            client.running_since = now;
        }
        if client.seat.is_some() {
            if client.wait_since.take().is_some() {
                client.turn.get_or_insert((now, client.task.tally.gpu));
                self.view_mut(slot).slice_start = NOT_BEGUN;
            }
        } else if let Some(since) = client.wait_since.take() {
            client.task.tally.waits.push(now - since);
            client.task.tally.slices += 1;
            client.turn.get_or_insert((now, client.task.tally.gpu));
            let gpu_time = self.turns.gpu_time(slot);
            self.client_mut(slot).gpu_time = gpu_time;
            self.view_mut(slot).slice_start = now;
        }
        self.enter(slot, Phase::Running, now);
        if self.snapshot.awaited() {
            self.decide();
        }
    }

    /// It runs and has nothing to do: it leaves, or gives way when somebody waits. True if it did.
    fn without_work(&mut self, slot: SlotIndex, now: Nanos, gone: &mut Vec<ClientMetrics>) -> bool {
        let client = self.client(slot);
        if client.task.is_over() {
            self.give_way(slot, now);
            self.leave(slot, now, gone);
            return true;
        }
        if client.seat.is_some() {
            return self.end_of_slice(slot, now);
        }
        let returns_at = client.returns_at();
        let ahead = || returns_at > now && policy::gives_way_ahead(&self.snapshot, slot, returns_at);
        if self.keeps_until(slot) <= now && (self.snapshot.needed().is_some() || ahead()) {
            self.give_way(slot, now);
            return true;
        }
        self.end_of_slice(slot, now)
    }

    /// Until when it keeps the GPU without work, if somebody waits, or is expected.
    fn keeps_until(&self, slot: SlotIndex) -> Nanos {
        let longest = || policy::head_start(&self.snapshot, slot);
        let switch = self.snapshot.needed().unwrap_or_else(longest);
        let client = self.client(slot);
        let grace = self.snapshot.settings.idle_grace;
        let kept = client.pauses.worth_waiting(switch);
        client.task.idle_since.saturating_add(kept.max(grace))
    }

    fn give_way(&mut self, slot: SlotIndex, now: Nanos) {
        self.drain(slot, now);
        self.drained(slot, now);
    }

    /// Running -> Draining.
    fn drain(&mut self, slot: SlotIndex, now: Nanos) {
        let client = self.client_mut(slot);
        let unused = std::mem::take(&mut client.unused) + client.pauses_beside_nobody(now);
        let client = self.client(slot);
        // Those that run together with others take no compute turns.
        let measured = if client.seat.is_none() { self.turns.measured(slot, client.gpu_time) } else { None };
        let spent = Spent { measured, unused };
        let end = policy::end_slice(&self.snapshot, slot, spent);
        let running = self.snapshot.view(slot).phase == Phase::Running;
        let view = self.view_mut(slot);
        (view.virtual_time, view.turn_used, view.last_ran) = (end.virtual_time, end.turn_used, now);
        let (in_flight, admitted) = (self.in_flight(slot), self.snapshot.admitted.contains(slot));
        let client = self.client_mut(slot);
        // Who gives way with others though nobody recalled it leaves the rest of its turn.
        client.turn_over = end.used_up || client.seat.is_some() && admitted;
        client.seat.iter().for_each(Seat::drains);
        if running {
            client.submitted = in_flight;
        }
        client.drained_at = None;
        client.task.tally.yields += 1;
        self.enter(slot, Phase::Draining, now);
    }

    /// Draining -> Waiting or Idle.
    fn drained(&mut self, slot: SlotIndex, now: Nanos) {
        let keeps = if self.snapshot.needed().is_some() { self.keeps_until(slot) } else { 0 };
        let client = self.client_mut(slot);
        client.submitted = 0;
        client.undrained = false;
        client.task.tally.ran += now - client.running_since;
        // In a pause that it would have kept the GPU for, it wants its next turn.
        let pauses = (keeps > now && !client.task.is_over() && client.seat.is_none()).then_some(keeps);
        client.withdraws = pauses;
        // It waits for another GPU first, and asks for this one later.
        let gives_up = client.seat.as_ref().is_some_and(Seat::must_give_up);
        let more = (client.task.has_work() || pauses.is_some()) && !gives_up;
        let turn_over = client.turn_over;
        let view = self.view_mut(slot);
        view.consecutive_slices = policy::turns_in_a_row(view.consecutive_slices, more, turn_over);
        if more {
            if turn_over {
                self.end_turn(slot, now);
            }
            self.queue(slot, turn_over, now);
        } else {
            self.client_mut(slot).turn = None;
            self.tally.turns.interrupt();
            if self.client(slot).task.has_work() {
                self.enter(slot, Phase::Idle, now);
                self.decide();
            } else {
                self.becomes_idle(slot, now);
            }
        }
    }

    /// It says since when it has no work, and until when. A pause in which it gave way counts.
    fn becomes_idle(&mut self, slot: SlotIndex, now: Nanos) {
        let client = self.client_mut(slot);
        let since = client.task.idle_since;
        client.paused = Some(since);
        let (pause, returns_at) = (client.pauses.expected(now - since), client.returns_at());
        let view = self.view_mut(slot);
        (view.idle_since, view.pause, view.returns_at) = (since, pause, returns_at);
        self.enter(slot, Phase::Idle, now);
        self.decide();
    }

    /// Counts a turn that is used up.
    fn end_turn(&mut self, slot: SlotIndex, now: Nanos) {
        let client = self.client_mut(slot);
        let gpu = client.task.tally.gpu;
        let Some((begun, had)) = client.turn.take() else { return };
        let own = self.snapshot.view(slot);
        let others = || self.slots().filter(|other| *other != slot);
        let contenders = others().filter(|other| self.contends(*other));
        let shares = |view: &SlotView| (view.weight, view.priority);
        let runs =
            |other: SlotIndex| matches!(self.snapshot.view(other).phase, Phase::Running | Phase::Draining);
        let turn = Turn {
            seat: slot.get(),
            begun,
            ended: now,
            time: gpu - had,
            equals: contenders.clone().all(|other| shares(self.snapshot.view(other)) == shares(own)),
            contenders: contenders.collect::<SlotSet>().bits(),
            alone: !others().any(runs),
        };
        self.tally.turns.turn(turn);
    }

    /// It has nothing to do any more, and its memory and its context go.
    fn leave(&mut self, slot: SlotIndex, now: Nanos, gone: &mut Vec<ClientMetrics>) {
        let view = std::mem::take(self.view_mut(slot));
        self.snapshot.free += (view.resident + view.context) as i32;
        self.snapshot.occupied = self.snapshot.occupied.without(slot);
        self.turns.leave(slot);
        if let Some(mut client) = self.clients[slot.get()].take() {
            client.seat.iter().for_each(Seat::leave);
            client.task.tally.becomes(State::Idle, now);
            client.task.tally.finished = Some(now);
            gone.push(client.task.tally);
        }
        self.tally.left(slot.get());
        self.decide();
    }

    /// The chunks that have arrived by `now`. True if one has.
    fn arrived(&mut self, now: Nanos) -> bool {
        let here = |transfer: &mut Transfer| transfer.arrives <= now;
        let came = self.to_gpu.transfer.take_if(here).is_some();
        let went = self.to_host.transfer.take_if(here);
        if let Some(Transfer { slot, granules, .. }) = went {
            self.snapshot.gives(slot, granules);
            let phase = self.snapshot.view(slot).phase;
            let client = self.client_mut(slot);
            client.evicting -= granules;
            if client.evicting == 0 {
                client.show(phase, false, now);
            }
        }
        came || went.is_some()
    }

    /// Sends the next chunks on their way. True if something changed.
    fn depart(&mut self, now: Nanos) -> bool {
        let mut changed = false;
        let evicting = |gpu: &Self, slot: SlotIndex| gpu.client(slot).evicting > 0;
        if self.to_host.transfer.is_none()
            && let Some(slot) = self
                .to_host
                .next(self.slots().filter(|slot| evicting(self, *slot)).collect::<Vec<_>>().into_iter())
        {
            let granules = self.client(slot).evicting.min(self.machine.chunk);
            let bytes = self.client_mut(slot).copied_out(granules);
            let arrives = now + self.machine.link_out.time(bytes).max(u64::from(granules) * RELEASE);
            self.to_host = Link { transfer: Some(Transfer { slot, granules, arrives }), last: slot.get() };
            changed = true;
        }
        if self.to_gpu.transfer.is_none() {
            let ready: Vec<SlotIndex> =
                self.slots().filter(|slot| self.next_piece(*slot).is_some()).collect();
            if let Some(slot) = self.to_gpu.next(ready.into_iter())
                && let Some(granules) = self.next_piece(slot)
            {
                self.snapshot.takes(slot, granules);
                let client = self.client_mut(slot);
                let fresh = client.absent.min(granules);
                client.absent -= fresh;
                client.kept += granules - fresh;
                let bytes = bytes_of(granules - fresh);
                client.task.tally.bytes_in += bytes;
                let arrives = now + self.machine.link_in.time(bytes);
                self.to_gpu = Link { transfer: Some(Transfer { slot, granules, arrives }), last: slot.get() };
                changed = true;
            }
        }
        changed
    }

    /// Whether a chunk of a client is on its way to the GPU.
    fn brings_in(&self, slot: SlotIndex) -> bool {
        self.to_gpu.transfer.is_some_and(|transfer| transfer.slot == slot)
    }

    /// Whether a client's thread evicts, or waits for a chunk that it brings in ahead of its turn.
    fn moves(&self, slot: SlotIndex) -> bool {
        self.client(slot).evicting > 0 || self.brings_in(slot)
    }

    /// The granules of the next chunk that a client brings in, if it may and there is room.
    fn next_piece(&self, slot: SlotIndex) -> Option<Granules> {
        let wanted = match self.snapshot.view(slot).phase {
            Phase::Filling if self.snapshot.admitted.contains(slot) => self.missing(slot),
            Phase::Waiting | Phase::Idle if self.client(slot).evicting == 0 => {
                match self.snapshot.prefetch(slot) {
                    0 => 0,
                    room => room.min(self.missing(slot)),
                }
            }
            _ => 0,
        };
        let granules = wanted.min(self.machine.chunk);
        (granules > 0 && i64::from(granules) <= i64::from(self.snapshot.free)).then_some(granules)
    }

    /// When something is next due.
    pub fn next(&self) -> Option<Nanos> {
        let k = self.slots().filter(|slot| self.computes(*slot)).count() as u128;
        let transfers = [self.to_gpu.transfer, self.to_host.transfer].into_iter().flatten();
        let of_client = |slot: SlotIndex| {
            let client = self.client(slot);
            let takes = |work: Nanos| {
                let (worth, of) = self.speed(slot, k);
                self.snapshot.now.saturating_add((u128::from(work) * of).div_ceil(worth) as Nanos)
            };
            // Whoever waits for others to compute with is told when they do.
            let has =
                client.seat.as_ref().map_or_else(|| self.turns.has(slot), |seat| seat.speed().is_some());
            // A turn ends with the kernel that is under way then.
            let turn_ends =
                self.turns.end().filter(|(holder, _)| *holder == slot).map(|(_, end)| {
                    takes(client.task.until_kernel_ends(end.saturating_sub(self.snapshot.now)))
                });
            let decision = || self.snapshot.next_decision(client.decided);
            let phase = self.snapshot.view(slot).phase;
            let [first, second] = match phase {
                Phase::Running if client.task.has_work() && has => {
                    let ends = takes(client.task.left());
                    [Some(turn_ends.map_or(ends, |end| end.min(ends))), decision()]
                }
                Phase::Running if client.task.has_work() => [None, decision()],
                Phase::Running => {
                    [Some(self.keeps_until(slot)).filter(|at| *at > self.snapshot.now), decision()]
                }
                Phase::Draining if client.submitted > 0 => [has.then(|| takes(client.submitted)), None],
                Phase::Draining => [client.drained_at, None],
                Phase::Filling => {
                    [client.ready_at, (client.submitted > 0 && has).then(|| takes(client.submitted))]
                }
                // It decides when its thread has moved what it moves.
                Phase::Waiting if !self.moves(slot) => [decision(), client.withdraws_at()],
                Phase::Idle => {
                    [policy::expected_from(&self.snapshot, slot).filter(|at| *at > self.snapshot.now), None]
                }
                _ => [None, None],
            };
            [first, second, client.task.next_request()].into_iter().flatten().min()
        };
        let clients = self.slots().filter_map(of_client);
        // What is past waits for a change, and those come with events of their own.
        let limits = self.turns.allowed_next();
        clients
            .chain(transfers.map(|transfer| transfer.arrives))
            .chain(limits)
            .min()
            .map(|due| due.max(self.snapshot.now))
    }

    /// Those who are still there at the end, and what they have come to.
    pub fn close(&mut self, now: Nanos) -> Vec<ClientMetrics> {
        self.reckon(now);
        self.tally.finish(now);
        let slots: Vec<SlotIndex> = self.slots().collect();
        let close = |slot: SlotIndex| {
            let client = self.clients[slot.get()].as_mut()?;
            client.task.tally.becomes(State::Idle, now);
            if client.undrained {
                client.task.tally.ran += now - client.running_since;
            }
            Some(client.task.tally.clone())
        };
        slots.into_iter().filter_map(close).collect()
    }

    /// Granules that are in the books wrongly; 0 unless this module is wrong.
    pub fn imbalance(&self) -> i64 {
        let held: i64 =
            self.snapshot.clients().map(|(_, view)| i64::from(view.resident) + i64::from(view.context)).sum();
        i64::from(self.snapshot.capacity) - i64::from(self.snapshot.free) - held
    }
}

impl Client {
    /// When it takes its request back, if it has no work.
    fn withdraws_at(&self) -> Option<Nanos> {
        self.withdraws.filter(|_| !self.task.has_work())
    }

    /// When it has work again, if its pauses are regular and this one was seen to begin; else 0.
    fn returns_at(&self) -> Nanos {
        let at = |since: Nanos| Some(since.saturating_add(self.rhythm.expected()?));
        self.idle_from.and_then(at).unwrap_or(0)
    }

    /// For how long it has paused, if the pause was seen to begin while nobody needed the GPU.
    fn pauses_beside_nobody(&self, now: Nanos) -> Nanos {
        self.idle_from.filter(|_| self.paused.is_none()).map_or(0, |since| now - since)
    }

    /// Counts a pause that has ended. One is seen to begin only while somebody waits.
    fn watch_pause(&mut self, phase: Phase, (awaited, watched): (bool, bool), long: Nanos, now: Nanos) {
        if self.task.has_work() {
            if phase == Phase::Running {
                self.unused += self.pauses_beside_nobody(now);
            }
            if let Some(since) = self.paused.take() {
                self.pauses.observe(now - since);
            }
            if let Some(since) = self.idle_from.take().filter(|since| now - since > long) {
                self.rhythm.observe(now - since);
            }
        } else if phase == Phase::Running && self.task.idle_since == now {
            self.paused = awaited.then_some(now);
            self.idle_from = watched.then_some(now);
        }
    }

    fn show(&mut self, phase: Phase, awaited: bool, now: Nanos) {
        let state = match phase {
            Phase::Waiting => State::Waiting,
            Phase::Filling => State::Filling,
            Phase::Running if self.task.has_work() => State::Running,
            Phase::Draining => State::Draining,
            Phase::Running if awaited => State::Kept,
            // It may run, and has nothing to do.
            Phase::Running | Phase::Idle | Phase::Leaving => State::Idle,
        };
        self.task.tally.becomes(state, now);
    }
}
