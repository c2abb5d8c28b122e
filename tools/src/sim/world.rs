//! All GPUs, the clock, and where clients are placed.

use super::gang::Seat;
use super::job::{Job, Requests};
use super::metrics::{ClientMetrics, GpuMetrics, START};
use super::random::Chance;
use super::scenario::{Class, Mode, Placement, Scenario, Work};
use super::{gpu, paging};
use nvshare::placement::{self, Load, Standing};
use nvshare::units::{Nanos, granules_for};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// What a simulation came to.
#[derive(Debug)]
pub struct Outcome {
    /// How long it was.
    pub time: Nanos,
    /// Every client on every GPU, in the order of class, number and part.
    pub clients: Vec<ClientMetrics>,
    /// Every GPU.
    pub gpus: Vec<GpuMetrics>,
    /// Clients that no GPU had a place for when the simulation ended.
    pub unplaced: u64,
    /// Times that the clock has jumped.
    pub events: u64,
}

/// A GPU of either kind.
enum Gpu {
    Nvshare(Box<gpu::Gpu>),
    Paging(Box<paging::Gpu>),
}

macro_rules! either {
    ($gpu:expr, $it:ident => $what:expr) => {
        match $gpu {
            Gpu::Nvshare($it) => $what,
            Gpu::Paging($it) => $what,
        }
    };
}

struct World {
    gpus: Vec<Gpu>,
    /// As of the last change on each.
    loads: Vec<Load>,
    per_node: usize,
    places: usize,
    placement: Placement,
    /// For placement by chance.
    chance: Chance,
    /// How many GPUs, which follow one another, know of each other: those of a node, if clients run on several of them at once.
    island: usize,
    /// When something is due on which island. What is not as in `next` is outdated.
    due: BinaryHeap<Reverse<(Nanos, usize)>>,
    next: Vec<Option<Nanos>>,
    waiting: VecDeque<Job>,
    gone: Vec<ClientMetrics>,
    record: bool,
}

/// More can't happen at one moment, on any number of GPUs.
const MOST_AT_ONCE: u64 = 10_000_000;

/// GPUs of an island look more often than that at what happens on the others at no moment.
const MOST_ROUNDS: u64 = 100_000;

/// Runs a scenario to its end; `record` what everybody does when.
pub fn simulate(scenario: &Scenario, seed: u64, record: bool) -> Outcome {
    let mut arrivals = arrivals(scenario, seed).into_iter().peekable();
    let mut world = World::of(scenario, seed, record);
    let until = scenario.until.map_or(Nanos::MAX, |time| START.saturating_add(time.0));
    let (mut now, mut events, mut standing) = (START, 0, 0u64);
    loop {
        let due = world.due.peek().map(|Reverse((time, _))| *time);
        let arrival = arrivals.peek().map(|job: &Job| job.arrives);
        let Some(time) = [due, arrival].into_iter().flatten().min() else { break };
        if time > until {
            now = until;
            break;
        }
        standing = if time > now { 0 } else { standing + 1 };
        assert!(standing < MOST_AT_ONCE, "the simulator's clock stands still at {} ns", now - START);
        now = time;
        events += 1;
        if due == Some(time) {
            let Some(Reverse((_, island))) = world.due.pop() else { break };
            if world.next[island] == Some(time) {
                world.advance(island, now);
            }
        } else if let Some(job) = arrivals.next() {
            world.waiting.push_back(job);
            world.place(now);
        }
    }
    let unplaced = world.waiting.len() as u64;
    let mut clients = world.gone;
    let mut gpus = Vec::new();
    for gpu in &mut world.gpus {
        either!(gpu, gpu => {
            clients.extend(gpu.close(now));
            assert_eq!(gpu.imbalance(), 0, "the simulator's books do not balance");
            gpus.push(std::mem::take(&mut gpu.tally));
        });
    }
    let mut clients: Vec<ClientMetrics> =
        clients.into_iter().map(ClientMetrics::counted_from_start).collect();
    clients.sort_by_key(|client| (client.class, client.number, client.part));
    Outcome { time: now - START, clients, gpus, unplaced, events }
}

impl World {
    fn of(scenario: &Scenario, seed: u64, record: bool) -> Self {
        let count = scenario.gpu_count();
        let gpus: Vec<Gpu> = match (scenario.policy.mode, paging::Machine::of(scenario)) {
            (Mode::DemandPaging, Some(machine)) => {
                let machine = Arc::new(machine);
                (0..count).map(|_| Gpu::Paging(Box::new(paging::Gpu::new(&machine)))).collect()
            }
            _ => {
                let machine = Arc::new(gpu::Machine::of(scenario));
                (0..count).map(|_| Gpu::Nvshare(Box::new(gpu::Gpu::new(&machine)))).collect()
            }
        };
        let together = scenario.clients.iter().any(Class::runs_together);
        let island = if together { scenario.gpus.per_node } else { 1 };
        Self {
            loads: gpus.iter().map(|gpu| either!(gpu, gpu => gpu.load())).collect(),
            gpus,
            per_node: scenario.gpus.per_node,
            places: scenario.gpus.vgpus,
            placement: scenario.gpus.placement,
            // Classes have the streams from 0 on.
            chance: Chance::new(seed, u64::MAX),
            island,
            due: BinaryHeap::new(),
            next: vec![None; count / island],
            waiting: VecDeque::new(),
            gone: Vec::new(),
            record,
        }
    }

    /// The GPUs of an island.
    fn gpus_of(&self, island: usize) -> Range<usize> {
        island * self.island..(island + 1) * self.island
    }

    /// Does all that is due on the GPUs of an island.
    fn advance(&mut self, island: usize, now: Nanos) {
        let (before, range) = (self.gone.len(), self.gpus_of(island));
        let gone = &mut self.gone;
        let gpus = &mut self.gpus[range.clone()];
        gpus.iter_mut().for_each(|gpu| either!(gpu, gpu => gpu.reckon(now)));
        // What happens on one may be what another one waits for.
        for round in 0.. {
            assert!(round < MOST_ROUNDS, "the simulator's clock stands still at {} ns", now - START);
            let mut changed = false;
            for gpu in &mut *gpus {
                changed |= either!(gpu, gpu => gpu.advance(now, gone));
            }
            if !changed || gpus.len() == 1 {
                break;
            }
        }
        if let [_, _, ..] = gpus {
            for gpu in &*gpus {
                if let Gpu::Nvshare(gpu) = gpu {
                    gpu.show_work();
                }
            }
            for gpu in &*gpus {
                if let Gpu::Nvshare(gpu) = gpu {
                    gpu.show_speed();
                }
            }
        }
        let next = gpus.iter().filter_map(|gpu| either!(gpu, gpu => gpu.next())).min();
        for index in range {
            self.loads[index] = either!(&self.gpus[index], gpu => gpu.load());
        }
        self.next[island] = next;
        if let Some(time) = next {
            self.due.push(Reverse((time, island)));
        }
        if self.gone.len() > before {
            self.place(now);
        }
    }

    /// Places those who wait for a GPU, in the order in which they came, as far as there are places.
    fn place(&mut self, now: Nanos) {
        while let Some(job) = self.waiting.pop_front() {
            let Some(chosen) = self.choose(&job, now) else {
                self.waiting.push_front(job);
                return;
            };
            let seats = if job.together { Seat::all_on(&chosen) } else { Vec::new() };
            for (part, index) in chosen.iter().copied().enumerate() {
                let tally = ClientMetrics::new(&job, part, index, now, self.record);
                match &mut self.gpus[index] {
                    Gpu::Nvshare(gpu) => gpu.arrive(job.clone(), tally, seats.get(part).cloned(), now),
                    Gpu::Paging(gpu) => gpu.arrive(job.clone(), tally, now),
                }
                if !job.together {
                    self.advance(index / self.island, now);
                }
            }
            if job.together {
                self.advance(chosen[0] / self.island, now);
            }
        }
    }

    /// The GPUs that a job gets: its own, or the best one and as many more of the same node as it asks for.
    fn choose(&mut self, job: &Job, now: Nanos) -> Option<Vec<usize>> {
        let (places, per_node) = (self.places, self.per_node);
        let loads = &self.loads;
        let free = |gpu: &usize| loads[*gpu].clients < places;
        if let Some(gpus) = &job.on {
            return gpus.iter().all(free).then(|| gpus.clone());
        }
        let node = |gpu: usize| gpu / per_node * per_node..(gpu / per_node + 1) * per_node;
        let enough = |gpu: &usize| job.vgpus == 1 || node(*gpu).filter(free).count() >= job.vgpus;
        let candidates = (0..loads.len()).filter(free).filter(enough).collect();
        let first = self.best_of(candidates, now)?;
        let mut chosen = vec![first];
        while chosen.len() < job.vgpus {
            let loads = &self.loads;
            let others =
                node(first).filter(|gpu| loads[*gpu].clients < places && !chosen.contains(gpu)).collect();
            chosen.push(self.best_of(others, now)?);
        }
        Some(chosen)
    }

    /// Of these GPUs the one that a client gets.
    fn best_of(&mut self, candidates: Vec<usize>, now: Nanos) -> Option<usize> {
        let clients = |gpu: &usize| self.loads[*gpu].clients;
        match self.placement {
            Placement::FewestClients => {
                placement::choose(candidates.into_iter().map(|gpu| (gpu, self.loads[gpu])))
            }
            Placement::LeastLoaded => {
                let mut standing = |gpu: usize| match &mut self.gpus[gpu] {
                    Gpu::Nvshare(one) => Standing::of(gpu, self.loads[gpu].clients, one.held_up(now)),
                    // A scenario with such GPUs is refused with this placement.
                    Gpu::Paging(_) => Standing::of(gpu, self.loads[gpu].clients, 0.0),
                };
                candidates.into_iter().map(&mut standing).min().map(|best| best.gpu)
            }
            Placement::Count => candidates.into_iter().min_by_key(|gpu| (clients(gpu), *gpu)),
            Placement::Packed => candidates.into_iter().max_by_key(|gpu| (clients(gpu), Reverse(*gpu))),
            Placement::Random => {
                let count = candidates.len();
                (count > 0).then(|| candidates[self.chance.below(count)])
            }
        }
    }
}

/// All jobs of a scenario, in the order in which they come.
fn arrivals(scenario: &Scenario, seed: u64) -> Vec<Job> {
    let mut jobs: Vec<Job> =
        scenario.clients.iter().enumerate().flat_map(|(index, class)| jobs_of(class, index, seed)).collect();
    jobs.sort_by_key(|job| (job.arrives, job.class, job.number));
    jobs
}

fn jobs_of(class: &Class, index: usize, seed: u64) -> Vec<Job> {
    let mut chance = Chance::new(seed, index as u64);
    let walks = if class.walks.is_empty() { vec![(0..class.buffers).collect()] } else { class.walks.clone() };
    let walks = Arc::new(walks);
    let mut arrives = START.saturating_add(class.arrival.from.0);
    (1..=class.count)
        .map(|number| {
            match (class.arrival.every, class.arrival.poisson) {
                (_, Some(mean)) => arrives += chance.exponential(mean.0),
                (Some(every), None) if number > 1 => arrives += every.0,
                _ => {}
            }
            let sizes = class.memory.all();
            let memory = sizes[chance.below(sizes.len())];
            let iteration = match &class.work {
                Work::Batch { iteration, .. } | Work::Training { iteration, .. } => iteration.0,
                Work::Interactive { .. } => nvshare::units::MILLISECOND,
            };
            Job {
                class: index,
                number,
                arrives,
                on: class.on.clone().or(class.gpu.map(|gpu| vec![gpu])),
                vgpus: class.seats(),
                together: class.runs_together(),
                memory: granules_for(memory.0),
                grows: class.grows.map(|grows| (granules_for(grows.to.0), grows.over.0)),
                weight: class.weight,
                priority: class.priority.0,
                compute_limit: class.compute_limit.0,
                iteration,
                unchanged: class.unchanged,
                in_flight: class.in_flight,
                buffers: class.buffers,
                walks: walks.clone(),
                requests: Requests::new(class, arrives, &mut chance),
            }
        })
        .collect()
}
