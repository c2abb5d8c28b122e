//! A program that computes: kernels of one length, without a pause or in bursts, plain or in graphs. The tests and the programs
//! for real GPUs run it beside others, to see who gets how much GPU time and how long bursts take.
//!
//! Its kernels take GPU time and not time: while another process has the GPU they do not get on. So the number of kernels
//! that are done is a measure of the GPU time that it had.
//!
//! It reads lines from the standard input: `go` begins, and the end of the input ends it. It says a line of JSON when it is ready and
//! another when it is over.

use crate::Failure;
use crate::cuda::{DevicePointer, Gpu, Handle, Kernels, Result};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io::{BufRead, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// What it does.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct Compute {
    /// How long a kernel takes alone, us: to measure how many iterations that is
    #[arg(long, default_value_t = 1_000.0)]
    kernel_us: f64,
    /// How many iterations a kernel has, if that is known
    #[arg(long)]
    iterations: Option<u64>,
    /// Launch graphs of so many kernels; 0: the kernels themselves
    #[arg(long, default_value_t = 0)]
    graph: u64,
    /// In bursts of so many kernels, waiting for each burst; 0: without a pause
    #[arg(long, default_value_t = 0)]
    burst: u64,
    /// From the beginning of a burst to that of the next, ms
    #[arg(long, default_value_t = 50.0)]
    period_ms: f64,
    /// How much work it launches ahead of the GPU, ms
    #[arg(long, default_value_t = 100.0)]
    ahead_ms: f64,
    /// End after so many kernels, if the input has not ended before
    #[arg(long, default_value_t = u64::MAX)]
    kernels: u64,
    /// Bytes of GPU memory that it has
    #[arg(long, value_parser = crate::size, default_value = "2MiB")]
    size: u64,
}

/// What it says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// It is ready.
    Ready {
        /// Its process.
        pid: u32,
        /// The iterations of a kernel.
        iterations: u64,
    },
    /// It is over.
    Done {
        /// Kernels that are done.
        kernels: u64,
        /// How long that took, s.
        seconds: f64,
        /// When how many were done: CLOCK_MONOTONIC in s, and the kernels.
        samples: Vec<(f64, u64)>,
        /// How long each burst took, s.
        bursts: Vec<f64>,
    },
}

fn say(event: &Event) {
    let line = serde_json::to_string(event).expect("events are plain data");
    // Nobody may be listening any more: the work goes on.
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// The work of one completion that is looked for: about a millisecond.
const STEP_US: f64 = 1_000.0;

/// The least time between two samples.
const SAMPLE: Duration = Duration::from_millis(2);

struct Worker<'a> {
    options: &'a Compute,
    gpu: &'a Gpu,
    kernels: Kernels<'a>,
    stream: Handle,
    out: DevicePointer,
    iterations: u64,
    graph: Option<Handle>,
}

impl<'a> Worker<'a> {
    fn new(options: &'a Compute, gpu: &'a Gpu) -> Result<Self> {
        let (kernels, stream) = (gpu.kernels()?, gpu.stream()?);
        let out = gpu.alloc(options.size.max(8))?;
        let mut worker = Self { options, gpu, kernels, stream, out, iterations: 0, graph: None };
        worker.iterations = match options.iterations {
            Some(iterations) => iterations,
            None => worker.calibrate()?,
        };
        if options.graph > 0 {
            let kernels = || (0..options.graph).try_for_each(|_| worker.kernel());
            worker.graph = Some(gpu.graph(worker.stream, kernels)?);
        }
        Ok(worker)
    }

    /// How many iterations take as long as a kernel is to take, if nobody else uses the GPU.
    fn calibrate(&self) -> Result<u64> {
        let time = |iterations| -> Result<f64> {
            let began = Instant::now();
            self.kernels.work(self.out, iterations, self.stream)?;
            self.gpu.synchronize(self.stream)?;
            Ok(began.elapsed().as_secs_f64())
        };
        time(1_000_000)?;
        let scale = (0.03 / time(1_000_000)?.max(1e-4) * 1e6) as u64;
        let mut rates: Vec<f64> = Vec::new();
        for _ in 0..5 {
            rates.push((time(2 * scale)? - time(scale)?) / scale as f64);
        }
        rates.sort_by(f64::total_cmp);
        Ok((self.options.kernel_us / 1e6 / rates[2].max(1e-12)).round().max(1.0) as u64)
    }

    fn kernel(&self) -> Result {
        self.kernels.work(self.out, self.iterations, self.stream)
    }

    /// Kernels of one submission.
    fn each(&self) -> u64 {
        self.options.graph.max(1)
    }

    fn submit(&self) -> Result {
        match self.graph {
            Some(graph) => self.gpu.launch_graph(graph, self.stream),
            None => self.kernel(),
        }
    }

    /// In bursts, until it is told to stop: how long each took.
    fn bursts(&self, stop: &AtomicBool) -> Result<Vec<f64>> {
        let period = Duration::from_secs_f64(self.options.period_ms / 1e3);
        let (mut took, mut due) = (Vec::new(), Instant::now());
        while !stop.load(Ordering::Relaxed) && (took.len() as u64) < self.options.kernels {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let began = Instant::now();
            for _ in 0..self.options.burst {
                self.submit()?;
            }
            self.gpu.synchronize(self.stream)?;
            took.push(began.elapsed().as_secs_f64());
            due = (due + period).max(began);
        }
        Ok(took)
    }

    /// Without a pause, until it is told to stop: when how many were done.
    fn busy(&self, stop: &AtomicBool) -> Result<Vec<(f64, u64)>> {
        let submission_us = self.options.kernel_us * self.each() as f64;
        let batch = (STEP_US / submission_us).ceil().max(1.0) as u64;
        let ahead = (self.options.ahead_ms * 1e3 / submission_us / batch as f64).ceil().max(2.0) as usize;
        let (done, samples) = (AtomicU64::new(0), std::sync::Mutex::new(vec![(monotonic(), 0)]));
        std::thread::scope(|scope| {
            let (marked, marks) = mpsc::sync_channel::<Handle>(ahead);
            let (passed, spare) = mpsc::channel::<Handle>();
            let watcher = scope.spawn({
                let (done, samples) = (&done, &samples);
                move || -> Result {
                    self.gpu.make_current()?;
                    let mut said = Instant::now();
                    for event in marks {
                        self.gpu.wait(event)?;
                        let now_done =
                            done.fetch_add(batch * self.each(), Ordering::Relaxed) + batch * self.each();
                        if said.elapsed() >= SAMPLE {
                            said = Instant::now();
                            samples.lock().expect("no thread panics").push((monotonic(), now_done));
                        }
                        let _ = passed.send(event);
                    }
                    Ok(())
                }
            });
            let mut events: VecDeque<Handle> =
                (0..ahead + 1).map(|_| self.gpu.event()).collect::<Result<_>>()?;
            let mut submitted = 0;
            while !stop.load(Ordering::Relaxed) && submitted < self.options.kernels {
                for _ in 0..batch {
                    self.submit()?;
                }
                submitted += batch * self.each();
                let event = match events.pop_front() {
                    Some(event) => event,
                    None => match spare.recv() {
                        Ok(event) => event,
                        Err(_) => break,
                    },
                };
                self.gpu.record(event, self.stream)?;
                if marked.send(event).is_err() {
                    break;
                }
            }
            drop(marked);
            watcher.join().expect("it does not panic")?;
            self.gpu.synchronize(self.stream)
        })?;
        let mut samples = samples.into_inner().expect("no thread panics");
        samples.push((monotonic(), done.into_inner()));
        Ok(samples)
    }
}

fn monotonic() -> f64 {
    nvshare::sync::now() as f64 / 1e9
}

fn compute(options: &Compute) -> Result {
    let gpu = Gpu::open(0)?;
    let worker = Worker::new(options, &gpu)?;
    say(&Event::Ready { pid: std::process::id(), iterations: worker.iterations });
    let mut line = String::new();
    let _ = std::io::stdin().lock().read_line(&mut line);
    let stop = std::sync::Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    std::thread::spawn(move || {
        let _ = std::io::stdin().lock().read_to_end(&mut Vec::new());
        stopped.store(true, Ordering::Relaxed);
    });
    let began = Instant::now();
    let (samples, bursts) = if options.burst > 0 {
        (Vec::new(), worker.bursts(&stop)?)
    } else {
        (worker.busy(&stop)?, Vec::new())
    };
    let kernels =
        samples.last().map_or(bursts.len() as u64 * options.burst * worker.each(), |(_, done)| *done);
    say(&Event::Done { kernels, seconds: began.elapsed().as_secs_f64(), samples, bursts });
    Ok(())
}

/// Computes in this process.
///
/// # Errors
/// The driver's.
pub fn run_here(options: &Compute) -> std::result::Result<(), Failure> {
    compute(options).map_err(Failure::from)
}
