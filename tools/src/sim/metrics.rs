//! What is counted while the simulation runs.

use super::fairness::{PROGRESS_WINDOW, TimeWindows, TurnWindows};
pub use crate::picture::{Segment, State};
use nvshare::units::{Nanos, SECOND};
use nvshare::usage;
use std::ops::Range;

/// When the clock starts, ns. A page says "never" with 0, so nothing may happen at 0. Results count from here.
pub const START: Nanos = SECOND;

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
    /// Times from a request to its answer, and the time that these would have taken alone.
    pub answers: Vec<Nanos>,
    pub needed: Nanos,
    pub slices: u64,
    pub yields: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// Bytes that left the GPU without a copy, because the host had them already.
    pub bytes_unchanged: u64,
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
            bytes_unchanged: 0,
            segments: record.then(Vec::new),
            state: (State::Idle, now),
        }
    }

    /// A request that takes so long alone was answered so long after it came.
    pub fn answered(&mut self, took: Nanos, alone: Nanos) {
        self.answers.push(took);
        self.needed = self.needed.saturating_add(alone);
    }

    /// The same, with times that count from [`START`].
    pub fn counted_from_start(mut self) -> Self {
        self.arrived -= START;
        self.finished = self.finished.map(|time| time - START);
        for segment in self.segments.iter_mut().flatten() {
            segment.from -= START;
            segment.to -= START;
        }
        self
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
            match segments.last_mut() {
                // It was something else for no time in between.
                Some(last) if last.to == since && last.state == before => last.to = now,
                _ => segments.push(Segment { from: since, to: now, state: before }),
            }
        }
        self.state = (state, now);
    }
}

/// What a GPU spends time on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Something computes.
    Busy,
    /// Nothing computes, and memory moves, or a drain or what a switch costs beside its copies is under way.
    Switching,
    /// Nothing computes, because the holder pauses and keeps the GPU while others wait.
    Kept,
    /// Nobody has anything to do, or nobody may because of limits.
    Idle,
}

/// What a GPU spent its time on, ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TimeUse {
    pub busy: Nanos,
    pub switching: Nanos,
    pub kept: Nanos,
    pub idle: Nanos,
}

impl TimeUse {
    pub fn spend(&mut self, on: Use, time: Nanos) {
        *match on {
            Use::Busy => &mut self.busy,
            Use::Switching => &mut self.switching,
            Use::Kept => &mut self.kept,
            Use::Idle => &mut self.idle,
        } += time;
    }

    /// Adds another GPU's.
    pub fn and(&mut self, other: Self) {
        self.busy += other.busy;
        self.switching += other.switching;
        self.kept += other.kept;
        self.idle += other.idle;
    }

    /// All of it.
    pub fn total(&self) -> Nanos {
        self.busy + self.switching + self.kept + self.idle
    }
}

/// What one GPU came to.
#[derive(Debug)]
pub struct GpuMetrics {
    /// What its time was spent on.
    pub time: TimeUse,
    /// The time that something was on the GPU, faded, and when it was that.
    usage: (Nanos, Nanos),
    /// The part of the last second in which something was on the GPU, faded, and when it was that.
    recently: (f64, Nanos),
    /// How fairly turns were taken.
    pub turns: TurnWindows,
    /// How fairly the GPU was shared in windows of time.
    pub windows: TimeWindows,
    /// Who got on in shorter windows.
    pub progress: TimeWindows,
    /// The most clients at once.
    pub most_clients: usize,
    /// Granules in use beyond the pool, at most: a context is there at once, whether there is room for it or not.
    pub most_debt: u64,
}

impl Default for GpuMetrics {
    fn default() -> Self {
        Self {
            time: TimeUse::default(),
            usage: (0, 0),
            recently: (0.0, START),
            turns: TurnWindows::default(),
            windows: TimeWindows::default(),
            progress: TimeWindows::of(PROGRESS_WINDOW),
            most_clients: 0,
            most_debt: 0,
        }
    }
}

/// What is left after so long of what fades in about a second.
fn left_of(time: Nanos) -> f64 {
    (-(time as f64 / SECOND as f64)).exp()
}

impl GpuMetrics {
    /// In all of `time` it did this; those in `contenders` (bits of seats) contended, and each seat in `rates` had so much
    /// GPU time per weight in each ns.
    pub fn spend(&mut self, on: Use, time: Range<Nanos>, contenders: u64, rates: &[(usize, f64)]) {
        self.time.spend(on, time.end - time.start);
        let time = time.start - START..time.end - START;
        self.progress.spend(time.clone(), contenders, rates);
        self.windows.spend(time, contenders, rates);
    }

    /// The simulation ends.
    pub fn finish(&mut self, now: Nanos) {
        self.windows.finish(now - START);
    }

    /// Something was on the GPU all the time.
    pub fn computed(&mut self, time: Range<Nanos>) {
        let (usage, at) = self.usage;
        self.usage = (usage::slice_over(usage, at, time.start, time.end).usage, time.end);
        self.recently = (1.0 - (1.0 - self.recently(time.start)) * left_of(time.end - time.start), time.end);
    }

    /// The part of the last second in which something was on the GPU, as NVML's utilisation, 0 to 1.
    pub fn recently(&self, now: Nanos) -> f64 {
        let (part, at) = self.recently;
        part * left_of(now.saturating_sub(at))
    }

    /// A client has come; so many are there.
    pub fn came(&mut self, clients: usize) {
        self.most_clients = self.most_clients.max(clients);
        self.turns.interrupt();
    }

    /// So many granules are in use beyond the pool; less than nothing if some are free.
    pub fn owes(&mut self, granules: i64) {
        self.most_debt = self.most_debt.max(granules.max(0) as u64);
    }

    /// The client in this seat has left.
    pub fn left(&mut self, seat: usize) {
        self.turns.interrupt();
        self.windows.vacate(seat);
        self.progress.vacate(seat);
    }

    /// GPU time used lately, ns, as [`nvshare::usage`] has it.
    pub fn usage(&self) -> Nanos {
        self.usage.0
    }
}
