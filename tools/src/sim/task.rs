//! A client's work: requests for GPU time, as they come, and how far it is with them.

use super::job::Job;
use super::metrics::ClientMetrics;
use nvshare::units::Nanos;
use std::collections::VecDeque;

/// A client with its work.
#[derive(Debug)]
pub struct Task {
    pub job: Job,
    pub tally: ClientMetrics,
    /// Requests that have come: when, and their GPU time. The first one is worked on.
    queue: VecDeque<(Nanos, Nanos)>,
    /// GPU time of the first one that is left, as if alone.
    left: Nanos,
    /// Since when it has none.
    pub idle_since: Nanos,
}

impl Task {
    /// One that comes now.
    pub fn new(job: Job, tally: ClientMetrics, now: Nanos) -> Self {
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
