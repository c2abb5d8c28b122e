//! A client's work: requests for GPU time, as they come, and how far it is with them.

use super::amount::Span;
use super::chance::Chance;
use super::scenario::{Class, Work};
use super::tally::Tally;
use nvshare::shares::Priority;
use nvshare::units::{Granules, Nanos};
use std::collections::VecDeque;
use std::sync::Arc;

/// A client that comes: what it needs, and what it will do.
#[derive(Debug, Clone)]
pub struct Job {
    /// Which of the scenario's classes it is of.
    pub class: usize,
    /// Which of the class's clients it is, from 1.
    pub number: u64,
    pub arrives: Nanos,
    /// The one GPU that it is on, if it is not placed.
    pub gpu: Option<usize>,
    pub vgpus: usize,
    pub memory: Granules,
    pub weight: u32,
    pub priority: Priority,
    pub iteration: Nanos,
    pub in_flight: u64,
    pub buffers: usize,
    pub walks: Arc<Vec<Vec<usize>>>,
    pub requests: Requests,
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
        let next = (left > 0).then_some(arrives);
        Self { work: class.work.clone(), chance: Chance::new(seed, stream), next, left, until }
    }

    /// When the next one comes; not known before the present one is done where pauses lie between them.
    pub fn next(&self) -> Option<Nanos> {
        self.next
    }

    /// The GPU time of the request that has come by `now`, if one has.
    fn take(&mut self, now: Nanos) -> Option<(Nanos, Nanos)> {
        let came = self.next.filter(|time| *time <= now)?;
        self.left -= 1;
        self.next = None;
        let size = match &self.work {
            Work::Batch { iteration, iterations, gpu_time } => match (iterations, gpu_time) {
                (Some(iterations), _) => iteration.0.saturating_mul(*iterations),
                (None, Some(span)) => {
                    span.draw(&mut self.chance).div_ceil(iteration.0).saturating_mul(iteration.0)
                }
                (None, None) => 0,
            },
            Work::Training { iteration, iterations, .. } => iteration.0.saturating_mul(*iterations),
            Work::Interactive { burst, every, poisson, .. } => {
                let size = burst.draw(&mut self.chance);
                let distance = match (every, poisson) {
                    (Some(every), _) => every.0,
                    (None, Some(mean)) => self.chance.exponential(mean.0),
                    (None, None) => Nanos::MAX,
                };
                self.comes(came.saturating_add(distance));
                size
            }
        };
        Some((came, size.max(1)))
    }

    fn comes(&mut self, at: Nanos) {
        self.next = (self.left > 0 && at < self.until).then_some(at);
    }

    /// The present one is done.
    fn done(&mut self, now: Nanos) {
        if let Work::Training { pause, .. } = &self.work {
            let pause = pause.draw(&mut self.chance);
            self.comes(now.saturating_add(pause));
        }
    }
}

/// A client with its work.
#[derive(Debug)]
pub struct Task {
    pub job: Job,
    pub tally: Tally,
    /// Requests that have come: when, and their GPU time. The first one is worked on.
    queue: VecDeque<(Nanos, Nanos)>,
    /// GPU time of the first one that is left, as if alone.
    left: Nanos,
    /// Since when it has none.
    pub idle_since: Nanos,
}

impl Task {
    /// One that comes now.
    pub fn new(job: Job, tally: Tally, now: Nanos) -> Self {
        let mut task = Self { job, tally, queue: VecDeque::new(), left: 0, idle_since: now };
        task.collect(now);
        task
    }

    /// Takes the requests that have come by `now`.
    pub fn collect(&mut self, now: Nanos) {
        while let Some((came, size)) = self.job.requests.take(now) {
            if self.queue.is_empty() {
                self.left = size;
            }
            self.queue.push_back((came, size));
        }
    }

    /// Whether it has something to do.
    pub fn has_work(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Whether it never has again.
    pub fn is_over(&self) -> bool {
        self.queue.is_empty() && self.job.requests.next().is_none()
    }

    /// When its next request comes.
    pub fn next_request(&self) -> Option<Nanos> {
        self.job.requests.next()
    }

    /// GPU time that is left of the present request, ns.
    pub fn left(&self) -> Nanos {
        self.left
    }

    /// GPU time that is submitted and must be waited for when it has to give way, ns.
    pub fn submitted(&self) -> Nanos {
        let iteration = self.job.iteration.max(1);
        let ahead = (self.job.in_flight - 1).saturating_mul(iteration);
        (self.left % iteration).saturating_add(ahead).min(self.left)
    }

    /// It had `time` of the GPU.
    pub fn works(&mut self, time: Nanos, now: Nanos) {
        let time = time.min(self.left);
        self.left -= time;
        self.tally.gpu += time;
        if self.left == 0
            && let Some((came, size)) = self.queue.pop_front()
        {
            self.tally.answered(now - came, size);
            self.job.requests.done(now);
            self.collect(now);
            self.left = self.queue.front().map_or(0, |(_, size)| *size);
            self.idle_since = now;
        }
    }
}
