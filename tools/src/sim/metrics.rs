//! What is counted while the simulation runs.

use nvshare::units::Nanos;
use nvshare::usage;
use std::collections::VecDeque;
use std::ops::Range;

/// What a client is doing, as the picture shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// It has nothing to do, whether it has the GPU or not.
    Idle,
    /// It wants the GPU.
    Waiting,
    /// Its memory comes in; of Unified Memory: it runs, and pages fault.
    Filling,
    /// It has the GPU and works.
    Running,
    /// It gives way, and its work in flight goes on.
    Draining,
    /// It makes room.
    Evicting,
}

/// A span of a client's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub from: Nanos,
    pub to: Nanos,
    pub state: State,
}

/// What one client came to.
#[derive(Debug, Clone)]
pub struct ClientMetrics {
    pub class: usize,
    pub number: u64,
    /// Which of its job's GPUs, from 0.
    pub part: usize,
    /// The number of its GPU.
    pub place: usize,
    pub weight: u32,
    pub iteration: Nanos,
    pub arrived: Nanos,
    pub finished: Option<Nanos>,
    /// GPU time, as if alone.
    pub gpu: Nanos,
    /// Time that it held the GPU.
    pub ran: Nanos,
    pub waits: Vec<Nanos>,
    /// Times from a request to its answer, and the GPU time that the requests needed.
    pub answers: Vec<Nanos>,
    pub needed: Nanos,
    pub slices: u64,
    pub yields: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// What it did when, if somebody wants to see it.
    pub segments: Option<Vec<Segment>>,
    state: (State, Nanos),
}

impl ClientMetrics {
    /// Of a client that comes now.
    pub fn new(job: &super::job::Job, part: usize, place: usize, now: Nanos, record: bool) -> Self {
        Self {
            class: job.class,
            number: job.number,
            part,
            place,
            weight: job.weight,
            iteration: job.iteration,
            arrived: job.arrives,
            finished: None,
            gpu: 0,
            ran: 0,
            waits: Vec::new(),
            answers: Vec::new(),
            needed: 0,
            slices: 0,
            yields: 0,
            bytes_in: 0,
            bytes_out: 0,
            segments: record.then(Vec::new),
            state: (State::Idle, now),
        }
    }

    /// A request of so much GPU time was answered so long after it came.
    pub fn answered(&mut self, took: Nanos, size: Nanos) {
        self.answers.push(took);
        self.needed = self.needed.saturating_add(size);
    }

    /// From now on it does this.
    pub fn becomes(&mut self, state: State, now: Nanos) {
        let (before, since) = self.state;
        if before == state {
            return;
        }
        if now > since
            && before != State::Idle
            && let Some(segments) = &mut self.segments
        {
            segments.push(Segment { from: since, to: now, state: before });
        }
        self.state = (state, now);
    }
}

/// The share that contenders got of a GPU, over any window of as many slices as there were contenders.
#[derive(Debug, Default)]
pub struct Fairness {
    /// Who contended, as bits; a window lies within one such time.
    contenders: u64,
    /// Whose slice, and GPU time over weight.
    window: VecDeque<(usize, f64)>,
    /// The least fair window.
    pub least: Option<f64>,
    pub windows: u64,
}

impl Fairness {
    /// Who was there is not the same as before.
    pub fn interrupt(&mut self) {
        self.window.clear();
    }

    /// A slice of the client in `slot` is over, with so much GPU time for its weight, while those in `contenders`
    /// wanted the GPU too.
    pub fn slice(&mut self, slot: usize, time: f64, contenders: u64) {
        let contenders = contenders | 1 << slot;
        if contenders != self.contenders {
            self.window.clear();
            self.contenders = contenders;
        }
        let n = contenders.count_ones() as usize;
        if n < 2 {
            return;
        }
        self.window.push_back((slot, time));
        if self.window.len() > n {
            self.window.pop_front();
        }
        if self.window.len() == n {
            let mut shares = [0.0; 64];
            self.window.iter().for_each(|(slot, time)| shares[*slot] += time);
            let index = jain(shares.iter().copied().filter(|share| *share > 0.0), n);
            self.least = Some(self.least.map_or(index, |least: f64| least.min(index)));
            self.windows += 1;
        }
    }
}

/// What one GPU came to.
#[derive(Debug, Default)]
pub struct GpuMetrics {
    /// Time in which something computed.
    pub busy: Nanos,
    /// The same, faded, and when it was that.
    usage: (Nanos, Nanos),
    /// How fairly turns were taken.
    pub fairness: Fairness,
    /// The most clients at once.
    pub most_clients: usize,
}

impl GpuMetrics {
    /// Something computed all the time.
    pub fn computed(&mut self, time: Range<Nanos>) {
        self.busy += time.end - time.start;
        let (usage, at) = self.usage;
        self.usage = (usage::slice_over(usage, at, time.start, time.end).usage, time.end);
    }

    /// A client has come; so many are there.
    pub fn came(&mut self, clients: usize) {
        self.most_clients = self.most_clients.max(clients);
        self.fairness.interrupt();
    }

    /// GPU time used lately, ns, as [`fair`] reckons it.
    pub fn usage(&self) -> Nanos {
        self.usage.0
    }
}

/// Jain's index of `n` shares, of which those that are not 0 are given: 1 when all are equal, 1/n when one has all.
pub fn jain(shares: impl Iterator<Item = f64>, n: usize) -> f64 {
    let (sum, squares) =
        shares.fold((0.0, 0.0), |(sum, squares), share| (sum + share, squares + share * share));
    if squares == 0.0 { 1.0 } else { sum * sum / (n as f64 * squares) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jains_index() {
        assert_eq!(jain([3.0, 3.0].into_iter(), 2), 1.0);
        assert_eq!(jain([3.0].into_iter(), 4), 0.25);
        assert!((jain([1.0, 2.0, 3.0].into_iter(), 3) - 36.0 / 42.0).abs() < 1e-12);
    }

    #[test]
    fn a_window_is_of_one_set_of_contenders() {
        let mut fairness = Fairness::default();
        fairness.slice(0, 1.0, 0b11);
        fairness.slice(1, 1.0, 0b111);
        assert_eq!(fairness.least, None, "a third one has come");
        fairness.slice(2, 1.0, 0b111);
        fairness.slice(0, 1.0, 0b111);
        assert_eq!(fairness.least, Some(1.0));
        fairness.slice(0, 1.0, 0b111);
        assert!(fairness.least.is_some_and(|least| least < 0.61), "two of three, one twice");
    }
}
