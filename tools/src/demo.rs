//! `nvshare demo`: several jobs, each of which needs most of the GPU, in four ways: one after another, together under
//! nvshare, the same with jobs that only read their memory, and together in Unified Memory.
//!
//! The simulated GPU is the field report's T4 at a hundredth of its size and of its rates, in half its time:
//!
//! | | T4 | here |
//! |---|---|---|
//! | memory | 14,913 MiB | 148 MiB |
//! | a job, in four buffers | 11,968 MiB | 120 MiB |
//! | a context, modules loaded at once (native) / when needed (as `nvshare run` has it) | 1,006 / 718 MiB | 10 / 6 MiB |
//! | an iteration over all of a job's memory | 39 ms | 20 ms, or what the CPU takes to compute it |
//! | pinned copies, each way | 12 GB/s | 240 MB/s |
//! | Unified Memory that is faulted in while as much is driven out | 1.3 to 1.6 s an iteration | 0.75 s |
//!
//! Memory goes in granules of 2 MiB, so contexts are a little smaller than a hundredth.

use crate::crew::{self, Crew, Message};
use crate::digits::{self, significant, time};
use crate::job::{Event, Job};
use crate::layout::{self, figures, words};
use crate::node::{Environment, Node, SimulatedGpu, natively};
use crate::{Failure, say, status};
use comfy_table::presets;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use nvshare::units::format_size;
use std::collections::HashMap;
use std::io::IsTerminal;
use std::path::Path;
use std::time::{Duration, Instant};

/// Options of `nvshare demo`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  nvshare demo                              a minute or two, on any machine
  nvshare demo --jobs 3 --iterations 500    longer, and more to the point
  nvshare demo --gpu                        on this machine's GPU

Every job checks all of its data at the end, to the last bit.")]
pub struct Options {
    /// Use the machine's GPU instead of a simulated one
    #[arg(long)]
    gpu: bool,
    /// How many jobs share the GPU; 1 to 16, of which 4 find room on the simulated one
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=16))]
    jobs: u32,
    /// How often each job walks over all of its memory; few walks show little but start-up [default: 200, 2000 with --gpu]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    iterations: Option<u32>,
    /// Size of the pool, such as 14.9GiB; only with --gpu [default: 14.9GiB]
    #[arg(long, value_name = "SIZE", value_parser = crate::size, requires = "gpu")]
    capacity: Option<u64>,
    /// Memory of each job, such as 12GiB; only with --gpu [default: 12GiB]
    #[arg(long, value_name = "SIZE", value_parser = crate::size, requires = "gpu")]
    size: Option<u64>,
}

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The simulated T4.
const MEMORY: u64 = 148 * MIB;
const JOB: u64 = 120 * MIB;
const CONTEXT_EAGER: u64 = 10 * MIB;
const CONTEXT_LAZY: u64 = 6 * MIB;
/// What a job needs beside its buffers: a granule for its small allocations.
const SMALL: u64 = 2 * MIB;
/// Bytes a second that kernels touch: a job's 120 MiB in 20 ms.
const DEVICE_BANDWIDTH: u64 = 6_291_456_000;
const LINK_BANDWIDTH: u64 = 240_000_000;
/// In and out together, as measured in the field; here it is all charged to the way in.
const UM_BANDWIDTH: u64 = 168_000_000;
const NEVER_SLOW: u64 = 1 << 40;

/// Two of the ways.
const TOGETHER: &str = "together, nvshare";
const READING: &str = "reading, nvshare";

/// Unified Memory would take all day: it gets this long, and the rest is reckoned from its rate.
const UM_SECONDS: f64 = 15.0;

/// A job that says nothing for so long is stuck.
const SILENCE: Duration = Duration::from_secs(300);

/// Processes, contexts and an arbiter start in about as long, s.
const START_UP: f64 = 1.0;

/// The multiple of a switch that the first slices last (`--quantum-factor` of the arbiter).
const FIRST_SLICE: f64 = 5.0;

/// One of the ways to run the jobs.
struct Way {
    name: &'static str,
    /// Time for all of them.
    seconds: f64,
    /// It was stopped, and the time is reckoned.
    reckoned: bool,
    /// Times that the GPU changed hands; `None` where nothing counts them.
    switches: Option<u64>,
    /// Bytes that were copied out of the GPU; `None` where nothing counts them.
    out: Option<u64>,
    right: usize,
    jobs: usize,
    /// Time in which a job iterated, on average, s.
    work: f64,
}

struct Stage {
    gpu: Option<SimulatedGpu>,
    capacity: u64,
    job: Job,
    jobs: usize,
    screen: Screen,
    /// Columns of the screen.
    width: usize,
}

/// Runs the demo.
///
/// # Errors
/// The options make no sense, a part of nvshare is missing, or a job failed.
pub fn run(options: &Options) -> Result<(), Failure> {
    let stage = Stage::of(options)?;
    crew::clean_up_when_interrupted();
    stage.introduce();
    let native = stage.one_after_another()?;
    let (shared, switch) = stage.shared(TOGETHER, false)?;
    let (reading, _) = stage.shared(READING, true)?;
    let managed = if options.gpu { None } else { Some(stage.managed()?) };
    let ways: Vec<Way> = [Some(native), Some(shared), Some(reading), managed].into_iter().flatten().collect();
    stage.conclude(&ways, switch);
    match ways.iter().find(|way| way.right < way.jobs) {
        Some(way) => Err(Failure::with_status(1, format!("{}: wrong results", way.name))),
        None => Ok(()),
    }
}

impl Stage {
    fn of(options: &Options) -> Result<Self, Failure> {
        let capacity = options.capacity.unwrap_or(if options.gpu { 149 * GIB / 10 } else { MEMORY });
        let size = options.size.unwrap_or(if options.gpu { 12 * GIB } else { JOB });
        if size.saturating_add(SMALL) > capacity {
            return Err(Failure::usage(format!(
                "--size {}: a job does not fit in --capacity {}",
                format_size(size),
                format_size(capacity)
            )));
        }
        let contexts = u64::from(options.jobs) * CONTEXT_LAZY;
        if !options.gpu && contexts + JOB + SMALL > MEMORY {
            return Err(Failure::usage(format!(
                "--jobs {}: their contexts alone take {} of the simulated GPU's {}, and no job fits beside them; there can be {}",
                options.jobs,
                format_size(contexts),
                format_size(MEMORY),
                (MEMORY - JOB - SMALL) / CONTEXT_LAZY
            )));
        }
        let gpu = if options.gpu {
            None
        } else {
            Some(SimulatedGpu::new(&[
                ("MEMORY", MEMORY.to_string()),
                ("CONTEXT_BYTES", CONTEXT_LAZY.to_string()),
                ("DEVICE_BANDWIDTH", DEVICE_BANDWIDTH.to_string()),
                ("LINK_BANDWIDTH", LINK_BANDWIDTH.to_string()),
                ("UM_FAULT_BANDWIDTH", UM_BANDWIDTH.to_string()),
                ("UM_EVICT_BANDWIDTH", NEVER_SLOW.to_string()),
            ])?)
        };
        let job = Job {
            size,
            buffers: 4,
            iterations: options.iterations.unwrap_or(if options.gpu { 2_000 } else { 200 }).into(),
            devices: vec![0],
            seed: 1,
            managed: false,
            read_only: false,
            seconds: None,
            controlled: false,
        };
        Ok(Self {
            gpu,
            capacity,
            job,
            jobs: options.jobs as usize,
            screen: Screen::new(),
            width: layout::width(),
        })
    }

    fn environment(&self, other: &[(&'static str, String)]) -> Environment {
        self.gpu.as_ref().map(|gpu| gpu.environment(other)).unwrap_or_default()
    }

    fn introduce(&self) {
        let kind = if self.gpu.is_some() {
            "a simulated GPU (a T4 at a hundredth of its size)"
        } else {
            "this machine's GPU"
        };
        self.tell(&format!(
            "{} jobs of {} each, {} iterations, on {kind} with {}: one fits at a time.",
            self.jobs,
            format_size(self.job.size),
            self.job.iterations,
            format_size(self.capacity)
        ));
        say!();
    }

    fn view(&self, name: &str) -> View {
        self.screen.view(name, self.jobs, self.job.iterations, self.width)
    }

    /// A paragraph.
    fn tell(&self, text: &str) {
        say!("{}", layout::paragraph(text, "", self.width));
    }

    fn job(&self, index: usize) -> Job {
        Job { seed: index as u64 + 1, ..self.job.clone() }
    }

    fn one_after_another(&self) -> Result<Way, Failure> {
        let name = "one after another";
        let view = self.view(name);
        let began = Instant::now();
        let (mut right, mut work) = (0, 0.0);
        for index in 0..self.jobs {
            let ended = play(&[self.job(index)], &natively(self.environment(&[])), &view, index, &mut || ())?;
            right += ended.right;
            work += ended.work / self.jobs as f64;
        }
        let seconds = began.elapsed().as_secs_f64();
        view.close();
        let (switches, out) = (Some(0), Some(0));
        Ok(Way { name, seconds, reckoned: false, switches, out, right, jobs: self.jobs, work })
    }

    /// Also gives how long a switch takes, s; 0 where no page says how fast the link is.
    fn shared(&self, name: &'static str, read_only: bool) -> Result<(Way, f64), Failure> {
        let arguments = ["--capacity".to_owned(), self.capacity.to_string()];
        let node = Node::start(self.environment(&[]), &arguments)?;
        let jobs: Vec<Job> = (0..self.jobs).map(|index| Job { read_only, ..self.job(index) }).collect();
        let view = self.view(name);
        let began = Instant::now();
        let mut looks = Looks::default();
        let ended = play(&jobs, &node.environment(), &view, 0, &mut || looks.look(node.dir()))?;
        let seconds = began.elapsed().as_secs_f64();
        view.close();
        let (switches, out) = (Some(looks.switches()), Some(looks.out()));
        let work = ended.work / self.jobs as f64;
        let way =
            Way { name, seconds, reckoned: false, switches, out, right: ended.right, jobs: self.jobs, work };
        Ok((way, if looks.bandwidth == 0 { 0.0 } else { self.job.size as f64 / looks.bandwidth as f64 }))
    }

    fn managed(&self) -> Result<Way, Failure> {
        let name = "together, Unified Memory";
        let job = |index| Job { managed: true, seconds: Some(UM_SECONDS), ..self.job(index) };
        let jobs: Vec<Job> = (0..self.jobs).map(job).collect();
        let view = self.view(name);
        let environment = natively(self.environment(&[("CONTEXT_BYTES", CONTEXT_EAGER.to_string())]));
        let began = Instant::now();
        let ended = play(&jobs, &environment, &view, 0, &mut || ())?;
        let elapsed = began.elapsed().as_secs_f64();
        view.close();
        let wanted = (self.job.iterations * self.jobs as u64) as f64;
        let reckoned = ended.iterations < self.job.iterations * self.jobs as u64;
        let seconds = if reckoned { elapsed * wanted / ended.iterations.max(1) as f64 } else { elapsed };
        let work = ended.work / self.jobs as f64;
        let (switches, out) = (None, None);
        Ok(Way { name, seconds, reckoned, switches, out, right: ended.right, jobs: self.jobs, work })
    }

    fn conclude(&self, ways: &[Way], switch: f64) {
        let (alone, work) = ways.first().map_or((1.0, 1.0), |way| (way.seconds, way.work));
        let columns = ["total", "slowdown", "switches", "copied out", "results"].map(figures);
        let columns: Vec<_> = std::iter::once(words("")).chain(columns).collect();
        let cells = |way: &Way| {
            let about = if way.reckoned { "~ " } else { "" };
            vec![
                way.name.to_owned(),
                format!("{about}{}", time(way.seconds)),
                format!("{about}{} x", significant(way.seconds / alone)),
                way.switches.map_or("-".into(), |switches| switches.to_string()),
                way.out.map_or("-".into(), format_size),
                if way.right == way.jobs {
                    "right".into()
                } else {
                    format!("WRONG in {} of {}", way.jobs - way.right, way.jobs)
                },
            ]
        };
        let rows: Vec<Vec<String>> = ways.iter().map(cells).collect();
        say!("\n{}", layout::table(&columns, &rows, presets::UTF8_HORIZONTAL_ONLY, self.width));
        self.tell("slowdown: the total against one after another.");
        self.tell(&format!(
            "{READING}: the jobs only read what they have, as servers do with weights. It is copied out once; when it leaves the GPU again, nothing of it has changed, and it needs no copy."
        ));
        if let Some(short) = too_short(work, switch, alone / self.jobs as f64) {
            self.tell(&short);
        }
        if ways.iter().any(|way| way.reckoned) {
            self.tell(&format!(
                "~ Unified Memory was stopped after {UM_SECONDS} s of iterations; its total is reckoned from its rate."
            ));
        }
        if self.gpu.is_none() {
            self.tell(
                "Unified Memory is left out on a real GPU: jobs that together need more managed memory than the card has free could bring down what else runs there.",
            );
        }
    }
}

/// Why a run says little, if it does: a job works for `work` seconds, which are fewer than start-up takes, or than its
/// first slice of [`FIRST_SLICE`] switches of `switch` seconds, or than half of the `alone` seconds that it takes by itself.
fn too_short(work: f64, switch: f64, alone: f64) -> Option<String> {
    (work < START_UP || work < FIRST_SLICE * switch || work < alone / 2.0).then(|| {
        format!(
            "This run is too short to tell much: a job works for {}, and a switch takes {}, so start-up and the first switches weigh heavily in the totals. More --iterations tell more.",
            time(work),
            time(switch)
        )
    })
}

/// What a run of some jobs came to.
#[derive(Default)]
struct Ended {
    right: usize,
    iterations: u64,
    /// From a job's memory being filled until it was done, of all of them together, s.
    work: f64,
}

/// Runs jobs at once to their end, the first of them on line `first` of the view. `look` is called ever so often.
fn play(
    jobs: &[Job],
    environment: &Environment,
    view: &View,
    first: usize,
    look: &mut dyn FnMut(),
) -> Result<Ended, Failure> {
    let mut crew = Crew::start(jobs, environment)?;
    let mut done = vec![false; jobs.len()];
    let mut ready = vec![None; jobs.len()];
    let mut ended = Ended::default();
    let mut last = Instant::now();
    while done.contains(&false) {
        crew::interrupted()?;
        look();
        let Some((index, message)) = crew.next(Instant::now() + Duration::from_millis(20)) else {
            if last.elapsed() > SILENCE {
                return Err(Failure::with_status(
                    1,
                    format!("no job has said anything for {} s", SILENCE.as_secs()),
                ));
            }
            continue;
        };
        last = Instant::now();
        match message {
            Message::Event(Event::Ready { .. }) => {
                ready[index] = Some(Instant::now());
                view.ready(first + index);
            }
            Message::Event(Event::Progress { done }) => view.progress(first + index, done),
            Message::Event(Event::Done(outcome)) => {
                done[index] = true;
                ended.work += ready[index].map_or(0.0, |since| since.elapsed().as_secs_f64());
                ended.right += usize::from(outcome.right);
                ended.iterations += outcome.iterations;
                view.done(first + index, outcome.iterations, outcome.right);
            }
            Message::Ended(_) if done[index] => {}
            Message::Ended(said) => {
                return Err(Failure::with_status(1, format!("job {} failed: {said}", first + index + 1)));
            }
        }
    }
    Ok(ended)
}

/// What the page said. Clients leave, and their rows with them, so it is looked at meanwhile.
#[derive(Default)]
struct Looks {
    /// How often each client has given way.
    yields: HashMap<u32, u64>,
    /// What each client has copied out, bytes.
    out: HashMap<u32, u64>,
    /// Into the GPU, as measured last, bytes a second.
    bandwidth: u64,
}

impl Looks {
    fn look(&mut self, dir: &Path) {
        for gpu in status::read(dir).into_iter().flat_map(|node| node.gpus) {
            self.bandwidth = gpu.bandwidth_in;
            for client in gpu.clients {
                let yields = self.yields.entry(client.pid).or_default();
                *yields = client.yields.max(*yields);
                let out = self.out.entry(client.pid).or_default();
                *out = client.bytes_out.max(*out);
            }
        }
    }

    fn switches(&self) -> u64 {
        self.yields.values().sum()
    }

    fn out(&self) -> u64 {
        self.out.values().sum()
    }
}

/// Where progress is shown: bars on a terminal, else a line now and then.
enum Screen {
    Bars,
    Lines,
}

/// One way's progress.
struct View {
    bars: Vec<ProgressBar>,
    lines: bool,
    iterations: u64,
}

impl Screen {
    fn new() -> Self {
        if std::io::stdout().is_terminal() { Self::Bars } else { Self::Lines }
    }

    fn view(&self, name: &str, jobs: usize, iterations: u64, width: usize) -> View {
        say!("{name}");
        // Bars of its own for each way: those of the one before stay as they are.
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stdout());
        // Beside the bar are 38 columns at most: name, iterations, rate and result.
        let bar = width.saturating_sub(40).clamp(10, 40);
        let style = format!("  {{prefix}} {{bar:{bar}.cyan/blue}} {{pos:>5}}/{{len}} {{rate:>9}} {{msg}}");
        let style = ProgressStyle::with_template(&style).expect("the template is well-formed");
        let style = style.with_key("rate", |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            // What cannot be written is not shown.
            let _ = out.write_str(&digits::rate(state.per_sec()));
        });
        let bar = |index| {
            let bar = match self {
                Self::Bars => all.add(ProgressBar::new(iterations)),
                Self::Lines => ProgressBar::hidden(),
            };
            bar.set_length(iterations);
            bar.set_style(style.clone());
            bar.set_prefix(format!("job {}", index + 1));
            bar.tick();
            bar
        };
        View { bars: (0..jobs).map(bar).collect(), lines: matches!(self, Self::Lines), iterations }
    }
}

impl View {
    fn ready(&self, job: usize) {
        self.bars[job].reset_elapsed();
        self.say(job, "its memory is filled");
    }

    fn progress(&self, job: usize, done: u64) {
        let quarter = |done: u64| 4 * done / self.iterations;
        let before = self.bars[job].position();
        self.bars[job].set_position(done);
        if quarter(done) > quarter(before) && done < self.iterations {
            self.say(job, &format!("{done}/{}", self.iterations));
        }
    }

    fn done(&self, job: usize, iterations: u64, right: bool) {
        let result = if right { "right" } else { "WRONG" };
        self.bars[job].set_position(iterations);
        self.bars[job].abandon_with_message(result);
        self.say(job, &format!("{iterations}/{}, {result}", self.iterations));
    }

    fn say(&self, job: usize, what: &str) {
        if self.lines {
            say!("  job {}: {what}", job + 1);
        }
    }

    /// The bars stay where they are; what comes next goes below.
    fn close(self) {
        if !self.lines {
            say!();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_is_mostly_start_up_says_so() {
        let short = too_short(0.4, 0.52, 0.7).expect("20 iterations are less than a slice");
        assert!(
            short.contains("400 ms") && short.contains("520 ms") && short.contains("--iterations"),
            "{short}"
        );
        assert!(too_short(4.0, 0.52, 9.0).is_some(), "more than half is start-up");
        assert!(too_short(0.05, 0.001, 0.06).is_some(), "processes take longer to start");
        assert_eq!(too_short(4.0, 0.52, 4.3), None);
    }
}
