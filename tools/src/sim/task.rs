//! A client's work: requests for GPU time, as they come, and how far it is with them.

use super::job::Job;
use super::metrics::ClientMetrics;
use nvshare::units::{Granules, Nanos};
use std::collections::VecDeque;

/// In how many equal steps a client's memory grows.
pub const GROWTH_STEPS: u32 = 16;

/// A client with its work.
#[derive(Debug)]
pub struct Task {
    pub job: Job,
    pub tally: ClientMetrics,
    /// Requests that have come: when, and their GPU time. The first one is worked on.
    queue: VecDeque<(Nanos, Nanos)>,
    /// GPU time of the first one that is left, as if alone.
    left: Nanos,
    /// GPU time that is left until its next pause within a request.
    until_pause: Nanos,
    /// The pause within a request that it makes ends then.
    pause_ends: Option<Nanos>,
    /// How long the pauses within the first request have been together.
    paused: Nanos,
    /// Steps in which its memory has grown.
    grown: u32,
    /// Since when it has none.
    pub idle_since: Nanos,
}

impl Task {
    /// One that comes now.
    pub fn new(job: Job, tally: ClientMetrics, now: Nanos) -> Self {
        let mut task = Self {
            until_pause: job.requests.pause_every().unwrap_or(Nanos::MAX),
            job,
            tally,
            queue: VecDeque::new(),
            left: 0,
            pause_ends: None,
            paused: 0,
            grown: 0,
            idle_since: now,
        };
        task.collect(now);
        task
    }

    /// Takes the requests that have come by `now`, and ends a pause that is over.
    pub fn collect(&mut self, now: Nanos) {
        self.pause_ends.take_if(|end| *end <= now);
        while let Some((came, size)) = self.job.requests.take(now) {
            if self.queue.is_empty() {
                self.left = size;
            }
            self.queue.push_back((came, size));
        }
    }

    /// Whether it has something to do.
    pub fn has_work(&self) -> bool {
        !self.queue.is_empty() && self.pause_ends.is_none()
    }

    /// Whether it never has again.
    pub fn is_over(&self) -> bool {
        self.queue.is_empty() && self.job.requests.next().is_none()
    }

    /// When its next request comes, or its pause ends.
    pub fn next_request(&self) -> Option<Nanos> {
        [self.job.requests.next(), self.pause_ends].into_iter().flatten().min()
    }

    /// GPU time that it can use until the present request is done, or a pause begins, ns.
    fn until_idle(&self) -> Nanos {
        if self.pause_ends.is_some() { 0 } else { self.left.min(self.until_pause) }
    }

    /// The same, or until its memory grows.
    pub fn left(&self) -> Nanos {
        self.until_idle().min(self.until_growth())
    }

    /// GPU time that is left until its memory grows, ns.
    fn until_growth(&self) -> Nanos {
        let Some((_, over)) = self.job.grows.filter(|_| self.grown < GROWTH_STEPS) else { return Nanos::MAX };
        let at = u128::from(over) * u128::from(self.grown + 1) / u128::from(GROWTH_STEPS);
        (at as Nanos).saturating_sub(self.tally.gpu)
    }

    /// Granules that it needs more from now on.
    pub fn grow(&mut self) -> Granules {
        let Some((to, _)) = self.job.grows else { return 0 };
        let from = self.job.memory;
        let needs = |grown: u32| {
            let more = u64::from(to.saturating_sub(from)) * u64::from(grown) / u64::from(GROWTH_STEPS);
            from + more as Granules
        };
        let before = needs(self.grown);
        while self.until_growth() == 0 {
            self.grown += 1;
        }
        needs(self.grown) - before
    }

    /// GPU time that is submitted and must be waited for when it has to give way, ns.
    pub fn submitted(&self) -> Nanos {
        let iteration = self.job.iteration.max(1);
        let ahead = (self.job.in_flight - 1).saturating_mul(iteration);
        (self.left % iteration).saturating_add(ahead).min(self.until_idle())
    }

    /// GPU time that is left of the kernel under way, ns; 0 between two kernels.
    pub fn kernel_left(&self) -> Nanos {
        self.left % self.job.iteration.max(1)
    }

    /// GPU time until the first kernel ends of those that end in `time` ns or later, ns.
    pub fn until_kernel_ends(&self, time: Nanos) -> Nanos {
        let (first, each) = (self.kernel_left(), self.job.iteration.max(1));
        let more = time.saturating_sub(first).div_ceil(each).saturating_mul(each);
        first.saturating_add(more).max(1)
    }

    /// It had `time` of the GPU.
    pub fn works(&mut self, time: Nanos, now: Nanos) {
        let time = time.min(self.until_idle());
        self.left -= time;
        self.until_pause -= time;
        self.tally.gpu += time;
        if self.left == 0
            && let Some((came, size)) = self.queue.pop_front()
        {
            self.tally.answered(now - came, size + std::mem::take(&mut self.paused));
            self.job.requests.done(now);
            self.collect(now);
            self.left = self.queue.front().map_or(0, |(_, size)| *size);
            self.idle_since = now;
        } else if self.until_pause == 0 {
            let pause = self.job.requests.pause();
            self.until_pause = self.job.requests.pause_every().unwrap_or(Nanos::MAX);
            self.pause_ends = (pause > 0).then(|| now.saturating_add(pause));
            self.paused = self.paused.saturating_add(pause);
            self.idle_since = now;
        }
    }
}
