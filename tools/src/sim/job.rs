//! What a client needs, and what it will do: its requests for GPU time, as they come.

use super::quantity::{Span, Time};
use super::random::Chance;
use super::scenario::{Class, First, Work};
use nvshare::shares::{ComputeLimit, Priority};
use nvshare::units::{Granules, Nanos};
use std::sync::Arc;

/// A client that comes: what it needs, and what it will do.
#[derive(Debug, Clone)]
pub struct Job {
    /// Which of the scenario's classes it is of.
    pub class: usize,
    /// Which of the class's clients it is, from 1.
    pub number: u64,
    pub arrives: Nanos,
    /// The GPUs that it is on, if it is not placed.
    pub on: Option<Vec<usize>>,
    /// On how many GPUs it is.
    pub vgpus: usize,
    /// It is there as one: it runs on all of its GPUs at once.
    pub together: bool,
    /// What it needs when it comes.
    pub memory: Granules,
    /// What its memory grows to, and in which GPU time, ns.
    pub grows: Option<(Granules, Nanos)>,
    pub weight: u32,
    pub priority: Priority,
    pub compute_limit: ComputeLimit,
    pub iteration: Nanos,
    /// The part of its memory that never changes.
    pub unchanged: f64,
    pub in_flight: u64,
    pub buffers: usize,
    pub walks: Arc<Vec<Vec<usize>>>,
    pub requests: Requests,
}

/// The time between two requests of an interactive client, ns.
fn interval(every: Option<Time>, poisson: Option<Time>, chance: &mut Chance) -> Nanos {
    match (every, poisson) {
        (Some(every), _) => every.0,
        (None, Some(mean)) => chance.exponential(mean.0),
        (None, None) => Nanos::MAX,
    }
}

/// The requests of one client, as they come.
#[derive(Debug, Clone)]
pub struct Requests {
    work: Work,
    chance: Chance,
    /// When the next one comes.
    next: Option<Nanos>,
    /// How many may still come.
    left: u64,
    /// None comes from then on.
    until: Nanos,
}

impl Requests {
    /// Those of a client of `class` that comes at `arrives`, by the class's chance.
    pub fn new(class: &Class, arrives: Nanos, chance: &mut Chance) -> Self {
        let life = |lifetime: &Option<Span>, chance: &mut Chance| {
            lifetime.map_or(Nanos::MAX, |span| arrives.saturating_add(span.draw(chance)))
        };
        let (left, until) = match &class.work {
            Work::Batch { .. } => (1, Nanos::MAX),
            Work::Training { rounds, lifetime, .. } => (rounds.unwrap_or(u64::MAX), life(lifetime, chance)),
            Work::Interactive { requests, lifetime, .. } => {
                (requests.unwrap_or(u64::MAX), life(lifetime, chance))
            }
        };
        // Its own stream, so that what it draws depends on nobody's turns.
        let (seed, stream) = (chance.unit().to_bits(), chance.unit().to_bits());
        let mut requests =
            Self { work: class.work.clone(), chance: Chance::new(seed, stream), next: None, left, until };
        let first = requests.first_interval();
        requests.comes(arrives.saturating_add(first));
        requests
    }

    /// How long after its arrival a client's first request comes.
    fn first_interval(&mut self) -> Nanos {
        match &self.work {
            Work::Training { first: First::AfterInterval, pause, .. } => pause.draw(&mut self.chance),
            Work::Interactive { first: First::AfterInterval, every, poisson, .. } => {
                interval(*every, *poisson, &mut self.chance)
            }
            _ => 0,
        }
    }

    /// When the next one comes; not known before the present one is done where pauses lie between them.
    pub fn next(&self) -> Option<Nanos> {
        self.next
    }

    /// The GPU time of the request that has come by `now`, if one has.
    pub fn take(&mut self, now: Nanos) -> Option<(Nanos, Nanos)> {
        let came = self.next.filter(|time| *time <= now)?;
        self.left -= 1;
        self.next = None;
        let size = match &self.work {
            Work::Batch { iteration, iterations, gpu_time, .. } => match (iterations, gpu_time) {
                (Some(iterations), _) => iteration.0.saturating_mul(*iterations),
                (None, Some(span)) => {
                    span.draw(&mut self.chance).div_ceil(iteration.0).saturating_mul(iteration.0)
                }
                (None, None) => 0,
            },
            Work::Training { iteration, iterations, .. } => iteration.0.saturating_mul(*iterations),
            Work::Interactive { burst, every, poisson, .. } => {
                let size = burst.draw(&mut self.chance);
                let distance = interval(*every, *poisson, &mut self.chance);
                self.comes(came.saturating_add(distance));
                size
            }
        };
        Some((came, size.max(1)))
    }

    /// GPU time between two pauses within a request, ns, if it has any.
    pub fn pause_every(&self) -> Option<Nanos> {
        match &self.work {
            Work::Batch { iteration, pause_every: Some(every), .. } => {
                Some(iteration.0.saturating_mul(*every))
            }
            _ => None,
        }
    }

    /// How long the next pause within a request is, ns.
    pub fn pause(&mut self) -> Nanos {
        match &self.work {
            Work::Batch { pause: Some(pause), .. } => pause.draw(&mut self.chance),
            _ => 0,
        }
    }

    fn comes(&mut self, at: Nanos) {
        self.next = (self.left > 0 && at < self.until).then_some(at);
    }

    /// The present one is done.
    pub fn done(&mut self, now: Nanos) {
        if let Work::Training { pause, .. } = &self.work {
            let pause = pause.draw(&mut self.chance);
            self.comes(now.saturating_add(pause));
        }
    }
}
