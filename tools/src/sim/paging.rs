//! One GPU under the C nvshare: turns of a fixed length, in the order of arrival, and memory that the driver pages.
//!
//! Whoever has the lock runs alone, whether others would fit beside it or not. The driver keeps pages on the GPU, brings
//! in what an iteration touches and is not there, and drives out another page where there is no room. Which one, is
//! [`Order`]: the driver sees faults and not uses, so to it the oldest page is the one that faulted in first, and a page
//! that is used all the time goes as soon as any other. Every iteration's walk is done page by page, so thrashing is
//! nowhere written down: it is what comes of a walk over a little more than fits.

use super::job::Job;
use super::metrics::{ClientMetrics, GpuMetrics, State};
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
    /// The end of the iteration that is under way, and its GPU time as if nothing faulted.
    iteration: Option<(Nanos, Nanos)>,
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
        let id = self.next_id;
        self.next_id += 1;
        let pages = vec![0; job.memory as usize];
        let task = Task::new(job, tally, now);
        self.clients.push(Client { id, task, pages, walk: 0, wait_since: now, had: 0 });
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
    pub fn advance(&mut self, now: Nanos, gone: &mut Vec<ClientMetrics>) {
        loop {
            for client in &mut self.clients {
                client.task.collect(now);
            }
            let mut changed = self.ask(now) | self.end_iteration(now);
            changed |= self.release(now, gone) | self.grant(now);
            self.leave(now, gone);
            if !changed {
                return;
            }
        }
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
        let Some((_, work)) = holder.iteration.take_if(|(end, _)| *end <= now) else { return false };
        let at = self.at(id);
        self.clients[at].task.works(work, now);
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
            let waiting = self.queue.iter().fold(0u64, |bits, id| bits | 1 << (self.at(*id) % 64));
            let client = &mut self.clients[at];
            client.task.tally.yields += u64::from(!client.task.is_over());
            client.task.tally.ran += now - since;
            let time = (client.task.tally.gpu - client.had) as f64;
            client.task.tally.becomes(State::Idle, now);
            if idle {
                self.tally.fairness.interrupt();
            } else {
                self.tally.fairness.slice(at % 64, time, waiting);
            }
            self.leave(now, gone);
            return true;
        }
        if idle {
            self.clients[at].task.tally.becomes(State::Idle, now);
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
            holder.iteration = Some((now + whole, work));
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
            self.tally.fairness.interrupt();
        }
    }

    /// When something is next due.
    pub fn next(&self) -> Option<Nanos> {
        let requests = self.clients.iter().filter_map(|client| client.task.next_request()).min();
        let lock = match &self.holder {
            Some(Holder { iteration: Some((end, _)), .. }) => Some(*end),
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
        if let Some(Holder { id, since, iteration }) = self.holder.take() {
            let at = self.at(id);
            self.clients[at].task.tally.ran += now.saturating_sub(since);
            self.tally.busy -= iteration.map_or(0, |(end, _)| end.saturating_sub(now));
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
