//! One GPU under the C nvshare: turns of a fixed length, in the order of arrival, and memory that the driver pages.
//!
//! Whoever has the lock runs alone, whether others would fit beside it or not. The driver keeps pages on the GPU, brings
//! in what an iteration touches and is not there, and drives out another page where there is no room. Which one, is
//! [`Order`]: the driver sees faults and not uses, so to it the oldest page is the one that faulted in first, and a page
//! that is used all the time goes as soon as any other. Every iteration's walk is done page by page, so thrashing is
//! nowhere written down: it is what comes of a walk over a little more than fits.

use super::fairness::{SEATS, Turn};
use super::job::Job;
use super::metrics::{ClientMetrics, GpuMetrics, START, State, Use};
use super::scenario::{Order, Paging, Scenario};
use super::task::Task;
use nvshare::placement::Load;
use nvshare::units::{GRANULE, Granules, Nanos, bytes_of, granules_for};
use std::collections::VecDeque;

/// What is the same for all GPUs.
#[derive(Debug, Clone)]
pub struct Machine {
    capacity: Granules,
    context: Granules,
    turn: Nanos,
    switch: Nanos,
    paging: Paging,
}

impl Machine {
    /// The scenario's, if it says how the driver pages.
    pub fn of(scenario: &Scenario) -> Option<Self> {
        Some(Self {
            capacity: scenario.capacity(),
            context: granules_for(scenario.gpus.context.0),
            turn: scenario.policy.turn(),
            switch: scenario.gpus.switch.0,
            paging: scenario.gpus.paging?,
        })
    }
}

/// A page of a client's.
type PageOf = (u64, u32);

#[derive(Debug)]
struct Client {
    /// Its number on this GPU, never used again.
    id: u64,
    /// What it is known by in windows of fairness: a number that no other client has meanwhile.
    seat: usize,
    task: Task,
    /// For each of its pages, when it came in or was last used; 0: it is not on the GPU.
    pages: Vec<u64>,
    /// Which of the walks is next.
    walk: usize,
    wait_since: Nanos,
    had: Nanos,
}

#[derive(Debug)]
struct Holder {
    id: u64,
    since: Nanos,
    iteration: Option<Iteration>,
}

/// An iteration that is under way.
#[derive(Debug, Clone, Copy)]
struct Iteration {
    begun: Nanos,
    end: Nanos,
    /// Its GPU time as if nothing faulted.
    work: Nanos,
}

impl Iteration {
    /// What part of its time it computes in; in the rest pages fault.
    fn computing(&self) -> f64 {
        self.work as f64 / (self.end - self.begun).max(1) as f64
    }
}

/// A GPU.
#[derive(Debug)]
pub struct Gpu {
    machine: std::sync::Arc<Machine>,
    clients: Vec<Client>,
    /// Who waits, in order.
    queue: VecDeque<u64>,
    holder: Option<Holder>,
    /// The lock may be taken from then on.
    free_at: Nanos,
    /// Pages on the GPU, the first to go in front; those whose stamp is another have been used since.
    order: VecDeque<(PageOf, u64)>,
    resident: usize,
    stamp: u64,
    next_id: u64,
    /// Up to when the use of time is reckoned.
    now: Nanos,
    pub tally: GpuMetrics,
}

impl Gpu {
    /// An empty one.
    pub fn new(machine: &std::sync::Arc<Machine>) -> Self {
        Self {
            machine: machine.clone(),
            clients: Vec::new(),
            queue: VecDeque::new(),
            holder: None,
            free_at: 0,
            order: VecDeque::new(),
            resident: 0,
            stamp: 0,
            next_id: 0,
            now: START,
            tally: GpuMetrics::default(),
        }
    }

    /// What is on it.
    pub fn load(&self) -> Load {
        let demand = self.clients.iter().map(|client| client.task.job.memory).sum();
        Load { clients: self.clients.len(), demand, busy: self.tally.usage() }
    }

    /// A client comes.
    pub fn arrive(&mut self, job: Job, tally: ClientMetrics, now: Nanos) {
        self.reckon(now);
        let id = self.next_id;
        self.next_id += 1;
        let seat = (0..SEATS).find(|seat| self.clients.iter().all(|client| client.seat != *seat));
        let seat = seat.expect("placement leaves a seat");
        let pages = vec![0; job.memory as usize];
        let task = Task::new(job, tally, now);
        self.clients.push(Client { id, seat, task, pages, walk: 0, wait_since: now, had: 0 });
        self.tally.came(self.clients.len());
        // Its context drives out what is there.
        while self.resident > self.room() {
            self.drive_out();
        }
    }

    /// Pages that fit beside the contexts.
    fn room(&self) -> usize {
        let contexts = self.machine.context.saturating_mul(self.clients.len() as u32);
        self.machine.capacity.saturating_sub(contexts) as usize
    }

    fn at(&self, id: u64) -> usize {
        self.clients.iter().position(|client| client.id == id).expect("whoever has a number is there")
    }

    /// True if there was a page to drive out.
    fn drive_out(&mut self) -> bool {
        while let Some(((id, page), stamp)) = self.order.pop_front() {
            let Some(client) = self.clients.iter_mut().find(|client| client.id == id) else { continue };
            let present = &mut client.pages[page as usize];
            if *present == stamp {
                *present = 0;
                client.task.tally.bytes_out += GRANULE;
                self.resident -= 1;
                return true;
            }
        }
        false
    }

    /// One iteration's walk: how many pages faulted in, and how many were driven out for them.
    fn walk(&mut self, at: usize) -> (u64, u64) {
        let job = &self.clients[at].task.job;
        let (walks, per_buffer) = (job.walks.clone(), job.memory / job.buffers as u32);
        let walk = &walks[self.clients[at].walk % walks.len()];
        self.clients[at].walk += 1;
        let (id, room) = (self.clients[at].id, self.room());
        let (mut came, mut went) = (0, 0);
        for step in 0..per_buffer {
            for buffer in walk {
                let page = *buffer as u32 * per_buffer + step;
                let present = self.clients[at].pages[page as usize];
                if present != 0 && self.machine.paging.order == Order::FirstIn {
                    continue;
                }
                self.stamp += 1;
                if present == 0 {
                    came += 1;
                    if self.resident >= room && self.drive_out() {
                        went += 1;
                    }
                    self.resident += 1;
                }
                self.clients[at].pages[page as usize] = self.stamp;
                self.order.push_back(((id, page), self.stamp));
            }
        }
        // Stamps of pages that have been used since.
        if self.order.len() > 4 * self.resident + 1024 {
            let clients = &self.clients;
            self.order.retain(|((id, page), stamp)| {
                clients.iter().any(|client| client.id == *id && client.pages[*page as usize] == *stamp)
            });
        }
        (came, went)
    }

    /// Does all that is due by `now`.
    /// Up to `now`, up to which all has been reckoned. False: nobody else must look.
    pub fn advance(&mut self, now: Nanos, gone: &mut Vec<ClientMetrics>) -> bool {
        loop {
            for client in &mut self.clients {
                client.task.collect(now);
            }
            let mut changed = self.ask(now) | self.end_iteration(now);
            changed |= self.release(now, gone) | self.grant(now);
            self.leave(now, gone);
            if !changed {
                return false;
            }
        }
    }

    /// Says what the time up to `now` went to. An iteration's faults are spread over all of it.
    pub fn reckon(&mut self, now: Nanos) {
        let time = std::mem::replace(&mut self.now, now)..now;
        if time.is_empty() {
            return;
        }
        let waits = !self.queue.is_empty();
        let contends = |client: &&Client| client.task.has_work() || (waits && self.holds(client.id));
        let contenders = self.clients.iter().filter(contends).fold(0, |bits, client| bits | 1 << client.seat);
        let on = match &self.holder {
            Some(Holder { id, iteration: Some(iteration), .. }) => {
                let client = &self.clients[self.at(*id)];
                let computing = iteration.computing();
                let rate = (client.seat, computing / f64::from(client.task.tally.weight));
                let busy = ((time.end - time.start) as f64 * computing) as Nanos;
                let faults = time.start..time.end - busy.min(time.end - time.start);
                self.tally.spend(Use::Switching, faults.clone(), contenders, &[rate]);
                self.tally.spend(Use::Busy, faults.end..time.end, contenders, &[rate]);
                return;
            }
            Some(_) if waits => Use::Kept,
            None if waits => Use::Switching,
            _ => Use::Idle,
        };
        self.tally.spend(on, time, contenders, &[]);
    }

    fn holds(&self, id: u64) -> bool {
        self.holder.as_ref().is_some_and(|holder| holder.id == id)
    }

    /// Those who have something to do and neither hold the lock nor wait for it get in line.
    fn ask(&mut self, now: Nanos) -> bool {
        let mut asked = false;
        for at in 0..self.clients.len() {
            let id = self.clients[at].id;
            if self.clients[at].task.has_work() && !self.holds(id) && !self.queue.contains(&id) {
                self.queue.push_back(id);
                self.clients[at].wait_since = now;
                self.clients[at].task.tally.becomes(State::Waiting, now);
                asked = true;
            }
        }
        asked
    }

    fn grant(&mut self, now: Nanos) -> bool {
        if self.holder.is_some() || self.free_at > now {
            return false;
        }
        let Some(id) = self.queue.pop_front() else { return false };
        let at = self.at(id);
        let client = &mut self.clients[at];
        client.task.tally.waits.push(now - client.wait_since);
        client.task.tally.slices += 1;
        client.had = client.task.tally.gpu;
        self.holder = Some(Holder { id, since: now, iteration: None });
        true
    }

    fn end_iteration(&mut self, now: Nanos) -> bool {
        let Some(holder) = &mut self.holder else { return false };
        let id = holder.id;
        let Some(done) = holder.iteration.take_if(|iteration| iteration.end <= now) else { return false };
        let at = self.at(id);
        self.clients[at].task.works(done.work, now);
        true
    }

    /// Begins the holder's next iteration, or takes the lock from it.
    fn release(&mut self, now: Nanos, gone: &mut Vec<ClientMetrics>) -> bool {
        let Some(Holder { id, since, iteration: None }) = self.holder else { return false };
        let at = self.at(id);
        let task = &self.clients[at].task;
        let idle = !task.has_work();
        let quiet = task.idle_since.max(since) + self.machine.paging.idle_release.0;
        let over = !self.queue.is_empty() && since + self.machine.turn <= now;
        if (idle && (task.is_over() || quiet <= now)) || (!idle && over) {
            self.holder = None;
            self.free_at = now + self.machine.switch;
            let waiting = || self.queue.iter().map(|id| &self.clients[self.at(*id)]);
            let contenders = waiting().fold(0, |bits, client| bits | 1 << client.seat);
            let weight = self.clients[at].task.tally.weight;
            let equals = waiting().all(|client| client.task.tally.weight == weight);
            let client = &mut self.clients[at];
            client.task.tally.yields += u64::from(!client.task.is_over());
            client.task.tally.ran += now - since;
            let time = client.task.tally.gpu - client.had;
            let turn =
                Turn { seat: client.seat, begun: since, ended: now, time, contenders, equals, alone: true };
            client.task.tally.becomes(State::Idle, now);
            if idle {
                self.tally.turns.interrupt();
            } else {
                self.tally.turns.turn(turn);
            }
            self.leave(now, gone);
            return true;
        }
        if idle {
            let state = if self.queue.is_empty() { State::Idle } else { State::Kept };
            self.clients[at].task.tally.becomes(state, now);
            return false;
        }
        self.begin_iteration(at, now);
        true
    }

    fn begin_iteration(&mut self, at: usize, now: Nanos) {
        let (came, went) = self.walk(at);
        let paging = self.machine.paging;
        let took = paging.fault.time(came * GRANULE) + paging.evict.time(went * GRANULE);
        let task = &mut self.clients[at].task;
        task.tally.bytes_in += came * GRANULE;
        task.tally.becomes(if came > 0 { State::Filling } else { State::Running }, now);
        let work = task.left().min(task.job.iteration.max(1));
        let whole = work + took;
        self.tally.computed(now..now + whole);
        if let Some(holder) = &mut self.holder {
            holder.iteration = Some(Iteration { begun: now, end: now + whole, work });
        }
    }

    fn leave(&mut self, now: Nanos, gone: &mut Vec<ClientMetrics>) {
        while let Some(at) =
            self.clients.iter().position(|client| client.task.is_over() && !self.holds(client.id))
        {
            let mut client = self.clients.remove(at);
            self.resident -= client.pages.iter().filter(|stamp| **stamp != 0).count();
            client.task.tally.becomes(State::Idle, now);
            client.task.tally.finished = Some(now);
            gone.push(client.task.tally);
            self.tally.left(client.seat);
        }
    }

    /// When something is next due.
    pub fn next(&self) -> Option<Nanos> {
        let requests = self.clients.iter().filter_map(|client| client.task.next_request()).min();
        let lock = match &self.holder {
            Some(Holder { iteration: Some(iteration), .. }) => Some(iteration.end),
            Some(Holder { id, since, iteration: None }) => {
                let task = &self.clients[self.at(*id)].task;
                Some(task.idle_since.max(*since) + self.machine.paging.idle_release.0)
            }
            None if self.queue.is_empty() => None,
            None => Some(self.free_at),
        };
        [requests, lock].into_iter().flatten().min()
    }

    /// Those who are still there at the end, and what they have come to.
    pub fn close(&mut self, now: Nanos) -> Vec<ClientMetrics> {
        self.reckon(now);
        self.tally.finish(now);
        if let Some(Holder { id, since, .. }) = self.holder.take() {
            let at = self.at(id);
            self.clients[at].task.tally.ran += now.saturating_sub(since);
        }
        let close = |client: &mut Client| {
            client.task.tally.becomes(State::Idle, now);
            client.task.tally.clone()
        };
        self.clients.iter_mut().map(close).collect()
    }

    /// Bytes on the GPU that nobody has; 0 unless this module is wrong.
    pub fn imbalance(&self) -> i64 {
        let held = self.clients.iter().flat_map(|client| &client.pages).filter(|stamp| **stamp != 0).count();
        bytes_of(self.resident as Granules) as i64 - bytes_of(held as Granules) as i64
    }
}
