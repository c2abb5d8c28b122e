//! Real processes that take turns on the simulated GPU, and what `nvshare sim` says of the same.
//!
//! Jobs of which one fits at a time run under a private arbiter, and this process watches the page: who runs, how long
//! the others wait, what is copied. The same jobs are then simulated, with the iteration time that they really had, since
//! that is the CPU's and no question of scheduling. Both are looked at from the moment at which every job has run once
//! until the first one is done.

use super::stats::Row;
use super::switch::open_page;
use crate::Failure;
use crate::crew::{self, Crew, Message};
use crate::job::{Event, Job};
use crate::node::{Node, SimulatedGpu};
use crate::picture::State;
use crate::sim::scenario::Scenario;
use crate::sim::world::{self, Outcome};
use nvshare::page::{Page, Phase};
use nvshare::slot::{SLOTS, SlotIndex};
use nvshare::sync::now;
use nvshare::units::Nanos;
use std::time::{Duration, Instant};

/// Options of `nvshare bench sim`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// How many jobs there are, of which one fits at a time; 2 to 8
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(2..=8))]
    pub jobs: u32,
    /// How long each job runs while others wait, in ms; 50 to 10000
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(50..=10_000))]
    pub quantum: u32,
    /// How often each job walks over all of its memory; 10 to 100000
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(10..=100_000))]
    pub iterations: u32,
}

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const BUFFERS: u64 = 4;
const CONTEXT: u64 = 2 * MIB;
/// A granule for a job's small allocations.
const SMALL: u64 = 2 * MIB;
/// Bytes a second, slow enough that a small machine's memory keeps up with it, both ways at once.
const LINK: u64 = 512 * MIB;
/// Bytes a second that kernels touch: all of a job's memory in 15 ms.
const DEVICE: u64 = SIZE * 1_000 / 15;
/// Iterations that a job has before the GPU.
const IN_FLIGHT: u64 = 2;
const POLL_INTERVAL: Duration = Duration::from_micros(500);
const TIMEOUT: Duration = Duration::from_secs(120);

/// What jobs that take turns came to, really or by the simulator.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Run {
    /// How long it was, s.
    pub seconds: f64,
    /// Times that somebody gave way.
    pub switches: u64,
    /// Bytes copied to the GPU.
    pub bytes_in: u64,
    /// Bytes copied from it.
    pub bytes_out: u64,
    /// From a request for the GPU until it ran, s.
    pub waits: Vec<f64>,
    /// Who ran, one after the other.
    pub order: Vec<usize>,
    /// Time that each of them held the GPU, s.
    pub ran: Vec<f64>,
}

impl Run {
    /// The part of the least favoured one in the time that the GPU was held, times how many they are: 1 is fair.
    pub fn least_share(&self) -> f64 {
        let all: f64 = self.ran.iter().sum();
        self.ran.iter().copied().fold(f64::INFINITY, f64::min) * self.ran.len() as f64 / all.max(1e-9)
    }

    fn mean_wait(&self) -> f64 {
        self.waits.iter().sum::<f64>() / self.waits.len().max(1) as f64
    }
}

/// Measures.
///
/// # Errors
/// A part of nvshare is missing, or a job failed.
pub fn measure(options: &Options) -> Result<Vec<Row>, Failure> {
    crew::clean_up_when_interrupted();
    let (real, iteration) = really(options)?;
    let simulated = simulated(options, iteration)?;
    let n = real.order.len() as u64;
    let row = |name: &str, unit: &str, real: f64, simulated: f64| {
        [
            Row::single(&format!("{name}_real"), unit, n, real),
            Row::single(&format!("{name}_simulated"), unit, n, simulated),
            Row::single(&format!("{name}_ratio"), "x", n, simulated / real.max(1e-9)),
        ]
    };
    let rows = [
        row("time", "s", real.seconds, simulated.seconds),
        row("switches", "1", real.switches as f64, simulated.switches as f64),
        row("bytes_in", "MiB", mib(real.bytes_in), mib(simulated.bytes_in)),
        row("bytes_out", "MiB", mib(real.bytes_out), mib(simulated.bytes_out)),
        row("wait_mean", "s", real.mean_wait(), simulated.mean_wait()),
        row("least_share", "x", real.least_share(), simulated.least_share()),
    ];
    Ok(rows.into_iter().flatten().collect())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}

/// The pool: contexts, one job, and a little.
fn memory(options: &Options) -> u64 {
    SIZE + SMALL + u64::from(options.jobs) * CONTEXT + 12 * MIB
}

/// What the page counts, of one client.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    yields: u64,
    bytes_in: u64,
    bytes_out: u64,
    ran: Nanos,
}

/// Watches the page.
#[derive(Default)]
struct Watch {
    phases: Vec<Phase>,
    /// Since when each waits, as last seen.
    since: Vec<Nanos>,
    run: Run,
    /// The counts from which on it counts, when every one has run once, and when that was.
    base: Option<(Nanos, Vec<Counts>)>,
}

impl Watch {
    fn of(jobs: usize) -> Self {
        Self { phases: vec![Phase::Idle; jobs], since: vec![0; jobs], ..Self::default() }
    }

    /// The clients by slot, and what is counted of them.
    fn look(&mut self, page: &Page) -> Vec<Counts> {
        let time = now();
        let clients = (0..SLOTS).filter_map(SlotIndex::new).filter_map(|slot| page.details(slot));
        let mut counts = Vec::new();
        for (index, client) in clients.take(self.phases.len()).enumerate() {
            let phase = client.view.phase;
            if phase == Phase::Running && self.phases[index] != Phase::Running {
                if self.base.is_some() && self.since[index] != 0 {
                    self.run.waits.push((time - self.since[index]) as f64 / 1e9);
                }
                self.run.order.push(index);
            }
            if client.wait_since != 0 {
                self.since[index] = client.wait_since;
            }
            self.phases[index] = phase;
            let runs = phase == Phase::Running && client.view.slice_start < time;
            let running = if runs { time - client.view.slice_start } else { 0 };
            counts.push(Counts {
                yields: client.yields,
                bytes_in: client.bytes_in,
                bytes_out: client.bytes_out,
                ran: client.run_ns + running,
            });
        }
        let all = (0..self.phases.len()).all(|index| self.run.order.contains(&index));
        if self.base.is_none() && all {
            self.base = Some((time, counts.clone()));
            self.run.order.drain(..self.run.order.len() - 1);
        }
        counts
    }
}

/// Runs the jobs, and says what they came to and how long an iteration took, ns.
///
/// # Errors
/// A part of nvshare is missing, or a job failed.
pub fn really(options: &Options) -> Result<(Run, Nanos), Failure> {
    let gpu = SimulatedGpu::new(&[
        ("MEMORY", memory(options).to_string()),
        ("CONTEXT_BYTES", CONTEXT.to_string()),
        ("LINK_BANDWIDTH", LINK.to_string()),
        ("DEVICE_BANDWIDTH", DEVICE.to_string()),
    ])?;
    let quantum = format!("{}ms", options.quantum);
    let arguments = ["--capacity".into(), memory(options).to_string(), "--quantum".into(), quantum];
    let node = Node::start(gpu.environment(&[]), &arguments)?;
    let job = |seed| Job {
        size: SIZE,
        buffers: BUFFERS,
        devices: vec![0],
        iterations: options.iterations.into(),
        seed,
        managed: false,
        read_only: false,
        seconds: None,
        controlled: true,
    };
    let jobs: Vec<Job> = (1..=u64::from(options.jobs)).map(job).collect();
    let page = open_page(&node)?;
    let mut crew = Crew::start(&jobs, &node.environment())?;
    let failed = |why: String| Failure::with_status(1, why);
    let mut ready = 0;
    let mut last = Instant::now();
    let mut done = vec![0; jobs.len()];
    let mut watch = Watch::of(jobs.len());
    let mut at_base = done.clone();
    loop {
        crew::interrupted()?;
        let began = watch.base.is_none();
        let counts = if ready == jobs.len() { watch.look(&page) } else { Vec::new() };
        if began && watch.base.is_some() {
            at_base.clone_from(&done);
        }
        while let Some((index, message)) = crew.next(Instant::now()) {
            last = Instant::now();
            match message {
                Message::Event(Event::Ready { .. }) => {
                    ready += 1;
                    if ready == jobs.len() {
                        crew.go();
                    }
                }
                Message::Event(Event::Progress { done: so_far }) => done[index] = so_far,
                Message::Event(Event::Done(_)) => {}
                Message::Ended(said) => return Err(failed(format!("job {} failed: {said}", index + 1))),
            }
        }
        if done.contains(&u64::from(options.iterations)) && counts.len() == jobs.len() {
            let run = watch.conclude(&counts).ok_or_else(|| {
                failed("the first job was done before every one had run: ask for more --iterations".into())
            })?;
            let iterations: u64 = done.iter().zip(&at_base).map(|(done, base)| done - base).sum();
            let iteration = run.ran.iter().sum::<f64>() * 1e9 / iterations.max(1) as f64;
            return Ok((run, iteration as Nanos));
        }
        if last.elapsed() > TIMEOUT {
            return Err(failed(format!("no job has said anything for {} s", TIMEOUT.as_secs())));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

impl Watch {
    fn conclude(self, counts: &[Counts]) -> Option<Run> {
        let (began, base) = self.base?;
        let sum = |of: &dyn Fn(&Counts) -> u64| {
            counts.iter().map(of).sum::<u64>() - base.iter().map(of).sum::<u64>()
        };
        let ran = |(now, base): (&Counts, &Counts)| (now.ran - base.ran) as f64 / 1e9;
        Some(Run {
            seconds: (now() - began) as f64 / 1e9,
            switches: sum(&|counts| counts.yields),
            bytes_in: sum(&|counts| counts.bytes_in),
            bytes_out: sum(&|counts| counts.bytes_out),
            ran: counts.iter().zip(&base).map(ran).collect(),
            ..self.run
        })
    }
}

/// The same jobs by the simulator, with iterations of so many ns.
///
/// # Errors
/// The scenario is wrong.
pub fn simulated(options: &Options, iteration: Nanos) -> Result<Run, Failure> {
    let text = format!(
        r#"
        name = "bench sim"
        policy.quantum = "{}ms"
        [gpus]
        memory = "{}"
        context = "{CONTEXT}"
        link_in = "{LINK}"
        link_out = "{LINK}"
        chunk = "{}"
        [[clients]]
        name = "job"
        count = {}
        memory = "{}"
        in_flight = {IN_FLIGHT}
        work = {{ kind = "batch", iteration = "{iteration}ns", iterations = {} }}"#,
        options.quantum,
        memory(options),
        SIZE / BUFFERS,
        options.jobs,
        SIZE + SMALL,
        options.iterations
    );
    let mut scenario = Scenario::parse(&text).map_err(|why| Failure::with_status(1, why))?;
    let whole = world::simulate(&scenario, 1, true);
    let starts = |outcome: &Outcome| {
        let mut starts: Vec<(Nanos, usize)> = Vec::new();
        for (index, client) in outcome.clients.iter().enumerate() {
            let runs = client.segments.iter().flatten().filter(|segment| segment.state == State::Running);
            starts.extend(runs.map(|segment| (segment.from, index)));
        }
        starts.sort_unstable();
        starts
    };
    let first = |index| starts(&whole).iter().find(|(_, job)| *job == index).map_or(0, |(from, _)| *from);
    let base = (0..whole.clients.len()).map(first).max().unwrap_or(0);
    let end = whole.clients.iter().filter_map(|client| client.finished).min().unwrap_or(whole.time);
    let mut part = |time| {
        scenario.until = Some(crate::sim::Time(time));
        world::simulate(&scenario, 1, true)
    };
    let (before, after) = (part(base), part(end));
    let both = || before.clients.iter().zip(&after.clients);
    Ok(Run {
        seconds: (end - base) as f64 / 1e9,
        switches: both().map(|(before, after)| after.yields - before.yields).sum(),
        bytes_in: both().map(|(before, after)| after.bytes_in - before.bytes_in).sum(),
        bytes_out: both().map(|(before, after)| after.bytes_out - before.bytes_out).sum(),
        waits: both()
            .flat_map(|(before, after)| &after.waits[before.waits.len().min(after.waits.len())..])
            .map(|wait| *wait as f64 / 1e9)
            .collect(),
        order: starts(&after).into_iter().filter(|(from, _)| *from >= base).map(|(_, job)| job).collect(),
        ran: both().map(|(before, after)| (after.ran - before.ran) as f64 / 1e9).collect(),
    })
}
