//! What a simulation came to, as figures: the same for the table, for JSON and for tests.

use super::fairness::{Indices, PROGRESS_WINDOW, WINDOW};
use super::metrics::{ClientMetrics, GpuMetrics, TimeUse};
use super::scenario::{Mode, Scenario};
use super::world::Outcome;
use crate::bench::stats::percentile;
use nvshare::units::Nanos;
use serde::Serialize;

/// All of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The scenario's name.
    pub scenario: String,
    /// Whose policy.
    pub mode: &'static str,
    /// What chance began with.
    pub seed: u64,
    /// How long the simulation was, s of its own time.
    pub seconds: f64,
    /// GPU time handed out, s, as if alone.
    pub gpu_seconds: f64,
    /// The part of all GPUs' time in which something computed, as `time.busy`.
    pub utilisation: f64,
    /// What all GPUs spent their time on.
    pub time: TimeShares,
    /// Times that somebody gave way.
    pub switches: u64,
    /// Bytes copied to GPUs.
    pub bytes_in: u64,
    /// Bytes copied from GPUs.
    pub bytes_out: u64,
    /// Bytes that left GPUs without a copy, because the host had them already.
    pub bytes_unchanged: u64,
    /// Clients for whom there was no place to the end.
    pub unplaced: u64,
    /// Times that the clock jumped.
    pub events: u64,
    /// How fairly GPUs were shared.
    pub fairness: Fairness,
    /// Whether clients run on several GPUs at once.
    pub gangs: bool,
    /// Whether everybody got on all the time.
    pub progress: Progress,
    /// Each class.
    pub classes: Vec<Row>,
    /// Each one by itself; left out when there are more than [`MOST_CLIENTS`].
    pub clients: Vec<Row>,
    /// Each GPU.
    pub gpus: Vec<Gpu>,
}

/// More clients than that are told of by class alone.
pub const MOST_CLIENTS: usize = 1_000;

/// Who got on in windows of time, which follow one another: each client counts in each window in which it wanted its GPU throughout,
/// on each of its GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Progress {
    /// How long a window is, s.
    pub window_seconds: f64,
    /// Windows of all clients.
    pub windows: u64,
    /// Those in which the client had no GPU time.
    pub without: u64,
    /// Times that somebody gave way, in a window on average.
    pub switches: f64,
}

impl Progress {
    fn of(outcome: &Outcome) -> Self {
        let mut all = super::fairness::Progress::default();
        outcome.gpus.iter().for_each(|gpu| all.and(gpu.progress.progress));
        let switches: u64 = outcome.clients.iter().map(|tally| tally.yields).sum();
        let windows = outcome.time as f64 / PROGRESS_WINDOW as f64;
        Self {
            window_seconds: seconds(PROGRESS_WINDOW),
            windows: all.windows,
            without: all.without,
            switches: if windows > 0.0 { switches as f64 / windows } else { 0.0 },
        }
    }
}

/// How fairly a GPU was shared, or all of them: Jain's index over GPU time per weight, from 1/n to 1. `null` where there is
/// no window.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Fairness {
    /// How long a window of time is, s.
    pub window_seconds: f64,
    /// Of the least fair window of time, among those who contended throughout.
    pub time_least: Option<f64>,
    /// On average over windows of time.
    pub time_mean: Option<f64>,
    /// How many windows of time there were with at least two such contenders.
    pub time_windows: u64,
    /// Of the least even round: n turns of n contenders of equal shares, one after the other.
    pub least: Option<f64>,
    /// How many rounds there were, each of n turns that follow one another.
    pub windows: u64,
}

impl Fairness {
    fn of<'a>(gpus: impl Iterator<Item = &'a GpuMetrics>, time: Nanos) -> Self {
        let (mut windows, mut turns) = (Indices::default(), Indices::default());
        for gpu in gpus {
            windows.and(gpu.windows.indices);
            turns.and(gpu.turns.indices);
        }
        Self {
            window_seconds: seconds(time.min(WINDOW)),
            time_least: windows.least,
            time_mean: windows.mean(),
            time_windows: windows.windows,
            least: turns.least,
            windows: turns.windows,
        }
    }
}

/// What GPUs spent their time on, as parts of it: they add up to 1, or are 0 if there was no time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct TimeShares {
    /// Something computed.
    pub busy: f64,
    /// Nothing computed, and memory moved, or a drain or a switch was under way.
    pub switching: f64,
    /// Nothing computed, because the holder paused and kept the GPU while others waited.
    pub kept: f64,
    /// Nobody had anything to do, or nobody might because of limits.
    pub idle: f64,
}

impl TimeShares {
    fn of(time: TimeUse) -> Self {
        let part = |part: Nanos| part as f64 / time.total().max(1) as f64;
        Self {
            busy: part(time.busy),
            switching: part(time.switching),
            kept: part(time.kept),
            idle: part(time.idle),
        }
    }
}

/// A client, or all of a class.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What it is called.
    pub name: String,
    /// Where it is; of a class, nothing.
    pub gpu: Option<usize>,
    /// How many.
    pub clients: u64,
    /// How many of them are done.
    pub finished: u64,
    /// GPU time that it had, s, as if alone.
    pub gpu_seconds: f64,
    /// From the request for the GPU until it runs, s.
    pub wait: Spread,
    /// From a request of its work until that is done, s.
    pub answer: Spread,
    /// Time per iteration while it had the GPU, s.
    pub iteration_seconds: f64,
    /// Times that it got the GPU.
    pub slices: u64,
    /// Times that it gave way.
    pub switches: u64,
    /// Bytes copied to the GPU.
    pub bytes_in: u64,
    /// Bytes copied from it.
    pub bytes_out: u64,
    /// Bytes that left it without a copy, because the host had them already.
    pub bytes_unchanged: u64,
    /// Time that answers took, against alone.
    pub slowdown: f64,
    /// When the last one was done, s.
    pub finish_seconds: Option<f64>,
}

/// How a time is spread.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Spread {
    /// How many.
    pub count: u64,
    /// Their mean.
    pub mean: f64,
    /// Half are at most this.
    pub p50: f64,
    /// 99 of 100 are.
    pub p99: f64,
    /// All are.
    pub max: f64,
}

/// A GPU.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Gpu {
    /// Its number.
    pub gpu: usize,
    /// The most clients at once.
    pub most_clients: usize,
    /// The part of its time in which something computed, as `time.busy`.
    pub utilisation: f64,
    /// What its time was spent on.
    pub time: TimeShares,
    /// How fairly it was shared.
    pub fairness: Fairness,
}

impl Report {
    /// Of an outcome.
    pub fn of(scenario: &Scenario, seed: u64, outcome: &Outcome) -> Self {
        let all: Vec<&ClientMetrics> = outcome.clients.iter().collect();
        let time = outcome.time;
        let class = |index: usize, name: &str| {
            let of_class: Vec<&ClientMetrics> =
                all.iter().copied().filter(|tally| tally.class == index).collect();
            Row::of(name.to_owned(), None, &of_class)
        };
        let single = |tally: &ClientMetrics| {
            let class = &scenario.clients[tally.class];
            let part = if class.seats() > 1 { format!(".{}", tally.part + 1) } else { String::new() };
            let name = if class.count > 1 {
                format!("{} {}{part}", class.name, tally.number)
            } else {
                format!("{}{part}", class.name)
            };
            Row::of(name, Some(tally.place), &[tally])
        };
        let mut spent = TimeUse::default();
        outcome.gpus.iter().for_each(|gpu| spent.and(gpu.time));
        let spent = TimeShares::of(spent);
        Self {
            scenario: scenario.name.clone(),
            mode: match scenario.policy.mode {
                Mode::Nvshare => "nvshare",
                Mode::DemandPaging => "demand-paging",
            },
            seed,
            seconds: seconds(time),
            gpu_seconds: all.iter().map(|tally| seconds(tally.gpu)).sum(),
            utilisation: spent.busy,
            time: spent,
            switches: all.iter().map(|tally| tally.yields).sum(),
            bytes_in: all.iter().map(|tally| tally.bytes_in).sum(),
            bytes_out: all.iter().map(|tally| tally.bytes_out).sum(),
            bytes_unchanged: all.iter().map(|tally| tally.bytes_unchanged).sum(),
            unplaced: outcome.unplaced,
            events: outcome.events,
            fairness: Fairness::of(outcome.gpus.iter(), time),
            gangs: scenario.clients.iter().any(super::scenario::Class::runs_together),
            progress: Progress::of(outcome),
            classes: scenario.clients.iter().enumerate().map(|(index, it)| class(index, &it.name)).collect(),
            clients: if all.len() > MOST_CLIENTS {
                Vec::new()
            } else {
                all.iter().map(|tally| single(tally)).collect()
            },
            gpus: outcome
                .gpus
                .iter()
                .enumerate()
                .map(|(index, gpu)| Gpu {
                    gpu: index,
                    most_clients: gpu.most_clients,
                    utilisation: TimeShares::of(gpu.time).busy,
                    time: TimeShares::of(gpu.time),
                    fairness: Fairness::of(std::iter::once(gpu), time),
                })
                .collect(),
        }
    }

    /// As JSON.
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report is plain data") + "\n"
    }
}

impl Row {
    fn of(name: String, gpu: Option<usize>, tallies: &[&ClientMetrics]) -> Self {
        let sum = |of: &dyn Fn(&ClientMetrics) -> u64| {
            tallies.iter().map(|tally| of(tally)).fold(0, u64::saturating_add)
        };
        let answered: Nanos =
            sum(&|tally| tally.answers.iter().fold(0, |sum, time| time.saturating_add(sum)));
        let needed = sum(&|tally| tally.needed);
        let iterations: f64 =
            tallies.iter().map(|tally| tally.gpu as f64 / tally.iteration.max(1) as f64).sum();
        let finished = tallies.iter().filter(|tally| tally.finished.is_some()).count() as u64;
        Self {
            name,
            gpu,
            clients: tallies.len() as u64,
            finished,
            gpu_seconds: seconds(sum(&|tally| tally.gpu)),
            wait: Spread::of(tallies.iter().flat_map(|tally| &tally.waits)),
            answer: Spread::of(tallies.iter().flat_map(|tally| &tally.answers)),
            iteration_seconds: if iterations > 0.0 {
                seconds(sum(&|tally| tally.ran)) / iterations
            } else {
                0.0
            },
            slices: sum(&|tally| tally.slices),
            switches: sum(&|tally| tally.yields),
            bytes_in: sum(&|tally| tally.bytes_in),
            bytes_out: sum(&|tally| tally.bytes_out),
            bytes_unchanged: sum(&|tally| tally.bytes_unchanged),
            slowdown: if needed > 0 { answered as f64 / needed as f64 } else { 0.0 },
            finish_seconds: tallies.iter().filter_map(|tally| tally.finished).max().map(seconds),
        }
    }
}

impl Spread {
    fn of<'a>(times: impl Iterator<Item = &'a Nanos>) -> Self {
        let mut times: Vec<f64> = times.map(|time| seconds(*time)).collect();
        times.sort_unstable_by(f64::total_cmp);
        let count = times.len() as u64;
        Self {
            count,
            mean: if count > 0 { times.iter().sum::<f64>() / count as f64 } else { 0.0 },
            p50: percentile(&times, 50),
            p99: percentile(&times, 99),
            max: percentile(&times, 100),
        }
    }
}

fn seconds(time: Nanos) -> f64 {
    time as f64 / 1e9
}
