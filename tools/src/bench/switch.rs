//! What it costs when two processes that don't fit together change places.
//!
//! Two [jobs](crate::job) run under a private arbiter with a short quantum, in a pool that holds one of them and a bit.
//! A third party, this process, watches the page: a switch begins when the holder leaves Running and ends when the
//! other one runs, and the bytes filled are what the page counted meanwhile. Beside it stands what the link does without
//! nvshare, in pinned copies of the same run.

use super::stats::Row;
use crate::crew::{self, Crew, Message};
use crate::job::{Event, Job};
use crate::node::{self, Environment, Node, SimulatedGpu};
use crate::say;
use crate::{Failure, cuda};
use nvshare::map::MappedPage;
use nvshare::page::{Page, Phase};
use nvshare::slot::{SLOTS, SlotIndex};
use nvshare::sync::now;
use nvshare::units::{GRANULE, Nanos, format_size};
use std::collections::HashMap;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Options of `nvshare bench switch`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Use the machine's GPU instead of a simulated one
    #[arg(long)]
    gpu: bool,
    /// Size of the pool, such as 14.9GiB [default: 148MiB, 14.9GiB with --gpu]
    #[arg(long, value_name = "SIZE", value_parser = crate::size)]
    capacity: Option<u64>,
    /// Memory of each of the two processes, such as 12GiB [default: 120MiB, 12GiB with --gpu]
    #[arg(long, value_name = "SIZE", value_parser = crate::size)]
    size: Option<u64>,
    /// The two only read their memory, as servers do with weights: what leaves the GPU needs no copy after the first time
    #[arg(long)]
    read_only: bool,
    /// How many switches are measured; 1 to 100000
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    iterations: u32,
}

/// Pinned copies, for `nvshare internal`.
#[derive(Debug, clap::Args)]
pub struct Copies {
    #[arg(long)]
    bytes: u64,
    #[arg(long)]
    times: u32,
}

const GIB: f64 = (1u64 << 30) as f64;

/// A simulated context.
const CONTEXT: u64 = GRANULE;
/// The most buffers of a job. A buffer is at least one chunk, and several chunks make a pipeline.
const BUFFERS: u64 = 12;
/// A link slow enough that a small machine's memory keeps up with it, both ways at once.
const SIMULATED_LINK: &str = "512MiB";
/// How long each of the two runs between switches.
const QUANTUM: Duration = Duration::from_millis(300);
/// Between two looks at the page.
const POLL_INTERVAL: Duration = Duration::from_micros(250);
/// A switch that takes longer than this does not come any more.
const TIMEOUT: Duration = Duration::from_secs(120);
/// The first switches grow the pool of host memory, which happens once in a process.
const WARM_UP: usize = 2;

/// What is asked for, checked.
struct Plan {
    capacity: u64,
    size: u64,
    read_only: bool,
    switches: usize,
}

impl Plan {
    fn of(options: &Options) -> Result<Self, Failure> {
        let (capacity, size) =
            if options.gpu { (14.9 * GIB, 12.0 * GIB) } else { (148.0 * 1048576.0, 120.0 * 1048576.0) };
        let capacity = options.capacity.unwrap_or(capacity as u64);
        let size = options.size.unwrap_or(size as u64);
        if size.saturating_mul(2) <= capacity {
            return Err(Failure::usage(format!(
                "--size {}: two of them fit in --capacity {}, and nothing would ever switch; it must be more than half of it",
                format_size(size),
                format_size(capacity)
            )));
        }
        // Its small allocations share a granule; on a real GPU nobody knows yet what contexts will take.
        let contexts = if options.gpu { 0 } else { 2 * CONTEXT };
        let need =
            size.checked_next_multiple_of(GRANULE).and_then(|size| size.checked_add(GRANULE + contexts));
        if need.is_none_or(|need| need > capacity) {
            return Err(Failure::usage(format!(
                "--size {}: not even one of them fits in --capacity {} beside {} of contexts; ask for at most {}",
                format_size(size),
                format_size(capacity),
                format_size(contexts),
                format_size(capacity.saturating_sub(GRANULE + contexts) / GRANULE * GRANULE)
            )));
        }
        Ok(Self { capacity, size, read_only: options.read_only, switches: options.iterations as usize })
    }
}

/// Measures.
///
/// # Errors
/// The sizes make no sense, a part of nvshare is missing, or the GPU cannot be used.
pub fn measure(options: &Options) -> Result<Vec<Row>, Failure> {
    let plan = Plan::of(options)?;
    crew::clean_up_when_interrupted();
    let simulated = if options.gpu {
        None
    } else {
        let settings = [
            ("MEMORY", plan.capacity.to_string()),
            ("LINK_BANDWIDTH", SIMULATED_LINK.into()),
            ("CONTEXT_BYTES", CONTEXT.to_string()),
        ];
        Some(SimulatedGpu::new(&settings)?)
    };
    let gpu = simulated.as_ref().map(|gpu| gpu.environment(&[])).unwrap_or_default();
    let (bytes, times) = if options.gpu { (1 << 30, 20) } else { (64 << 20, 8) };
    let (pinned_in, pinned_out) = pinned(&gpu, bytes, times)?;
    let node = Node::start(
        gpu,
        &[
            "--capacity".into(),
            plan.capacity.to_string(),
            "--quantum".into(),
            format!("{}ms", QUANTUM.as_millis()),
        ],
    )?;
    let switches = forced(&node, &plan)?;
    let seconds = |switch: &Switch| switch.took as f64 / 1e9;
    let times = switches.iter().map(|switch| seconds(switch) * 1e3).collect();
    let rates: Vec<f64> =
        switches.iter().map(|switch| switch.filled as f64 / GIB / seconds(switch).max(1e-9)).collect();
    let link = super::stats::percentile(&sorted(&pinned_in), 50);
    let shares = rates.iter().map(|rate| rate / link.max(1e-9)).collect();
    Ok(vec![
        Row::of("switch_time", "ms", times),
        Row::of("switch_bandwidth", "GiB/s", rates),
        Row::of("pinned_in", "GiB/s", pinned_in),
        Row::of("pinned_out", "GiB/s", pinned_out),
        Row::of("switch_efficiency", "x", shares),
    ])
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut samples = samples.to_vec();
    samples.sort_unstable_by(f64::total_cmp);
    samples
}

/// GiB/s of pinned copies in and out, one way at a time, in a process of its own without nvshare.
fn pinned(gpu: &Environment, bytes: u64, times: u32) -> Result<(Vec<f64>, Vec<f64>), Failure> {
    let failed = |why: String| Failure::with_status(1, format!("pinned copies: {why}"));
    let output = Command::new(node::program()?)
        .args(["internal", "copies", "--bytes", &bytes.to_string(), "--times", &times.to_string()])
        .envs(gpu.iter().cloned())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(output.status.to_string()));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| failed(error.to_string()))
}

/// The pinned copies, in their process.
///
/// # Errors
/// The GPU's.
pub fn copies(options: &Copies) -> Result<(), Failure> {
    let gpu = cuda::Gpu::open(0)?;
    let stream = gpu.stream()?;
    let mut host = gpu.pinned(options.bytes as usize)?;
    let device = gpu.alloc(options.bytes)?;
    let (mut into, mut out) = (Vec::new(), Vec::new());
    let rate = |began: Instant| options.bytes as f64 / GIB / began.elapsed().as_secs_f64();
    // The first pair warms up.
    for number in 0..=options.times {
        let began = Instant::now();
        gpu.copy_in(device, &host, stream)?;
        gpu.synchronize(stream)?;
        let rate_in = rate(began);
        let began = Instant::now();
        gpu.copy_out(&mut host, device, stream)?;
        gpu.synchronize(stream)?;
        if number > 0 {
            into.push(rate_in);
            out.push(rate(began));
        }
    }
    drop(host);
    gpu.free(device)?;
    say!("{}", serde_json::to_string(&(into, out)).expect("numbers"));
    Ok(())
}

/// One switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Switch {
    took: Nanos,
    filled: u64,
}

/// Runs the two jobs, and watches until they have switched often enough; then checks what they hold.
fn forced(node: &Node, plan: &Plan) -> Result<Vec<Switch>, Failure> {
    let job = |seed| Job {
        size: plan.size,
        // Each of them whole granules, or rounding would make the job larger.
        buffers: (1..=BUFFERS).rev().find(|buffers| plan.size.is_multiple_of(buffers * GRANULE)).unwrap_or(1),
        devices: vec![0],
        iterations: u64::MAX,
        seed,
        managed: false,
        read_only: plan.read_only,
        seconds: None,
        controlled: true,
    };
    let page = open_page(node)?;
    let mut crew = Crew::start(&[job(1), job(2)], &node.environment())?;
    wait_for(&mut crew, "fill its memory", |event| matches!(event, Event::Ready { .. }))?;
    crew.go();
    let mut watch = Watch::default();
    let mut last = Instant::now();
    let mut switches = Vec::new();
    while switches.len() < WARM_UP + plan.switches {
        crew::interrupted()?;
        if let Some(switch) = watch.look(&page, now()) {
            switches.push(switch);
            last = Instant::now();
        }
        while let Some((index, message)) = crew.next(Instant::now()) {
            if let Message::Ended(said) = message {
                return Err(Failure::with_status(1, format!("job {} ended early: {said}", index + 1)));
            }
        }
        if last.elapsed() > TIMEOUT {
            return Err(Failure::with_status(1, format!("no switch in {} s", TIMEOUT.as_secs())));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    crew.stop();
    wait_for(&mut crew, "end", |event| match event {
        Event::Done(outcome) => outcome.right,
        _ => false,
    })?;
    Ok(switches.split_off(WARM_UP))
}

/// The page of the node's first GPU.
pub(super) fn open_page(node: &Node) -> Result<MappedPage, Failure> {
    let failed = |why: String| Failure::with_status(1, format!("the control page: {why}"));
    let pages = nvshare::paths::pages(node.dir()).map_err(|error| failed(error.to_string()))?;
    let (gpu, _) = pages.first().ok_or_else(|| failed("there is none".into()))?;
    nvshare::record::open_page(node.dir(), *gpu).map_err(|error| failed(error.to_string()))
}

/// Waits until every job has said what is wanted.
fn wait_for(crew: &mut Crew, what: &str, wanted: impl Fn(&Event) -> bool) -> Result<(), Failure> {
    let mut waiting = [true, true];
    let until = Instant::now() + TIMEOUT;
    while waiting.contains(&true) {
        crew::interrupted()?;
        match crew.next(until.min(Instant::now() + Duration::from_millis(100))) {
            Some((index, Message::Event(event))) if wanted(&event) => waiting[index] = false,
            Some((index, Message::Event(Event::Done(outcome)))) => {
                return Err(Failure::with_status(
                    1,
                    format!("job {}: wrong data in buffers {:?}", index + 1, outcome.wrong_buffers),
                ));
            }
            Some((index, Message::Ended(said))) if waiting[index] => {
                return Err(Failure::with_status(1, format!("job {} could not {what}: {said}", index + 1)));
            }
            Some(_) => {}
            None if Instant::now() < until => {}
            None => {
                return Err(Failure::with_status(
                    1,
                    format!("a job did not {what} within {} s", TIMEOUT.as_secs()),
                ));
            }
        }
    }
    Ok(())
}

/// Sees switches in a page.
#[derive(Default)]
struct Watch {
    /// Who runs.
    holder: Option<SlotIndex>,
    /// When the last holder stopped running.
    stopped: Option<Nanos>,
    /// What each had brought in when it was last seen to begin to run.
    brought: HashMap<SlotIndex, u64>,
}

impl Watch {
    fn look(&mut self, page: &Page, time: Nanos) -> Option<Switch> {
        let running = (0..SLOTS)
            .filter_map(SlotIndex::new)
            .filter_map(|slot| page.details(slot))
            .find(|details| details.view.phase == Phase::Running);
        let Some(running) = running else {
            if self.holder.take().is_some() {
                self.stopped = Some(time);
            }
            return None;
        };
        if self.holder == Some(running.slot) {
            return None;
        }
        let changed = self.holder.replace(running.slot).is_some();
        let before = self.brought.insert(running.slot, running.bytes_in);
        // A change of places that was too fast to be seen begins now and took no time: no sample.
        let began = self.stopped.take().filter(|_| !changed)?;
        let filled = running.bytes_in.saturating_sub(before?);
        (filled > 0).then_some(Switch { took: time - began, filled })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(capacity: &str, size: &str) -> Result<Plan, Failure> {
        Plan::of(&Options {
            gpu: false,
            capacity: Some(crate::size(capacity).unwrap()),
            size: Some(crate::size(size).unwrap()),
            read_only: false,
            iterations: 1,
        })
    }

    #[test]
    fn sizes_that_would_not_switch_are_refused_by_name() {
        assert!(plan("148MiB", "120MiB").is_ok());
        let small = plan("148MiB", "74MiB").err().unwrap();
        assert!(small.status == 2 && small.message.contains("74.00 MiB"), "{small:?}");
        let large = plan("148MiB", "147MiB").err().unwrap();
        assert!(large.status == 2 && large.message.contains("147.00 MiB"), "{large:?}");
    }
}
