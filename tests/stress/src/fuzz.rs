//! The same random driver calls natively and under nvshare beside a competitor; the answers are compared line by line.
//!
//! The run under nvshare goes first: what it was refused for want of memory the native run takes as refused. In `fits` a
//! pool is large enough for the program and not for both, and nothing may be refused; in `small` it is too small for
//! the program alone; `overflow` is the same with NVSHARE_ENABLE_SINGLE_OVERSUB=1.

use crate::autopsy;
use crate::children;
use crate::clock::{Signs, Silence, TICK};
use crate::machine::{Machine, Plan};
use clap::ValueEnum;
use nvshare_test_support::program;
use nvshare_tools::node::Environment;
use nvshare_tools::status;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// What the program asks for at most. Contexts come on top.
const LIMIT: u64 = 36 * MIB;

/// How large the pool is, and what happens to what does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    Fits,
    Small,
    Overflow,
}

impl Mode {
    fn pool(self) -> u64 {
        match self {
            Self::Fits => LIMIT + 16 * MIB,
            Self::Small | Self::Overflow => 28 * MIB,
        }
    }
}

/// Options of `nvshare-stress fuzz`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The first seed
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// How many seeds
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// Calls of each
    #[arg(long, default_value_t = 150)]
    steps: u32,
    /// Which pools; seeds take them in turn
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Mode::Fits, Mode::Small, Mode::Overflow])]
    modes: Vec<Mode>,
    /// Only these steps of each
    #[arg(long, value_delimiter = ',')]
    only: Vec<u32>,
    /// What not to do: managed, mapped, streams, captures, contexts, pools, queries, wrong, primary,
    /// attribute-N, half-info, global-captures
    #[arg(long, default_value = "")]
    without: String,
    /// Most microseconds between two calls under nvshare
    #[arg(long, default_value_t = 1500)]
    nap_us: u64,
    /// Do not make a failure shorter
    #[arg(long)]
    no_shrink: bool,
    /// Report what differs, and go on
    #[arg(long)]
    keep_going: bool,
    /// Seconds without a line and without any sign of progress that are a hang; ten times as many with signs
    #[arg(long, default_value_t = 60)]
    patience: u64,
    /// Show all lines of the run under nvshare
    #[arg(long)]
    show: bool,
}

/// Runs the seeds.
pub fn run(options: &Options) -> Result<(), String> {
    let begin = Instant::now();
    let (mut failures, mut calls) = (0, 0);
    let mut nodes =
        options.modes.iter().map(|&mode| Fuzz::new(options, mode)).collect::<Result<Vec<_>, _>>()?;
    for seed in options.first..options.first + options.seeds {
        let turn = (seed - options.first) as usize % nodes.len();
        let steps = if options.only.is_empty() {
            (0..options.steps).collect()
        } else {
            options.only.iter().copied().collect()
        };
        match nodes[turn].compare(seed, &steps)? {
            Outcome::Same(lines) => calls += lines,
            Outcome::Differs(what) => {
                failures += 1;
                nodes[turn].report(seed, steps, &what)?;
                if !options.keep_going {
                    break;
                }
                nodes[turn] = Fuzz::new(options, options.modes[turn])?;
            }
        }
        if seed % 50 == 0 {
            println!(
                "seed {seed}: {calls} lines, {failures} failures, {:.0} s",
                begin.elapsed().as_secs_f64()
            );
        }
    }
    println!("{} seeds in {:?}: {calls} lines alike, {failures} failures", options.seeds, options.modes);
    if failures == 0 { Ok(()) } else { Err(format!("{failures} seeds differ")) }
}

/// What came of a comparison.
enum Outcome {
    /// So many lines.
    Same(usize),
    Differs(String),
}

/// How a program ended, and what it said.
struct Run {
    lines: Vec<String>,
    /// Not the way that it should have.
    failure: Option<String>,
}

struct Fuzz<'a> {
    options: &'a Options,
    mode: Mode,
    machine: Machine,
    /// A GPU of its own for the native runs, with room for everything.
    native: Machine,
    competitor: Competitor,
}

impl<'a> Fuzz<'a> {
    fn new(options: &'a Options, mode: Mode) -> Result<Self, String> {
        let plan = |pool| Plan {
            gpus: 1,
            memory: 512 * MIB,
            pool,
            arbiter: ["--quantum", "4ms", "--quantum-min", "2ms"].map(str::to_owned).to_vec(),
        };
        let machine = Machine::start(plan(mode.pool()))?;
        let native = Machine::start(plan(256 * MIB))?;
        let competitor = Competitor::start(&machine, mode.pool() - 8 * MIB)?;
        Ok(Self { options, mode, machine, native, competitor })
    }

    fn refused(&self) -> PathBuf {
        self.machine.scratch().join("refused")
    }

    fn command(&self, seed: u64, steps: &BTreeSet<u32>, environment: Environment) -> Command {
        let mut command = children::command(program("random_calls"));
        command
            .args([seed.to_string(), self.options.steps.to_string()])
            .envs(environment)
            .env("FUZZ_ONLY", list(steps))
            .env("FUZZ_WITHOUT", format!("{},", self.options.without))
            .env("FUZZ_LIMIT", LIMIT.to_string());
        command
    }

    fn compare(&mut self, seed: u64, steps: &BTreeSet<u32>) -> Result<Outcome, String> {
        self.competitor.must_live()?;
        let mut shared = self.command(seed, steps, self.machine.client()?);
        shared
            .env("FUZZ_POOL", self.mode.pool().to_string())
            .env("FUZZ_REFUSED", self.refused())
            .env("FUZZ_NAP_US", self.options.nap_us.to_string());
        if self.mode == Mode::Overflow {
            shared.env("NVSHARE_ENABLE_SINGLE_OVERSUB", "1");
        }
        let shared = self.execute(shared)?;
        if self.options.show {
            shared.lines.iter().for_each(|line| println!("{line}"));
        }
        if let Some(failure) = shared.failure {
            return Ok(Outcome::Differs(failure));
        }
        let mut native = self.command(seed, steps, self.native.native());
        native.env("FUZZ_REPLAY", self.refused());
        let native = self.execute(native)?;
        if let Some(failure) = native.failure {
            return Err(format!("the native run of seed {seed}: {failure}"));
        }
        Ok(match difference(&native.lines, &shared.lines) {
            None => Outcome::Same(shared.lines.len()),
            Some(difference) => Outcome::Differs(difference),
        })
    }

    /// Runs the program to its end, or until it says nothing for too long.
    fn execute(&self, mut command: Command) -> Result<Run, String> {
        let log = self.machine.scratch().join("stderr");
        let error = File::create(&log).map_err(|error| format!("{}: {error}", log.display()))?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(error).spawn();
        let mut child = child.map_err(|error| format!("the program cannot be started: {error}"))?;
        let (send, receive) = channel();
        let output = child.stdout.take().ok_or("no standard output")?;
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        let mut run = Run { lines: Vec::new(), failure: None };
        let patience = Duration::from_secs(self.options.patience);
        let mut silence = Silence::default();
        loop {
            let before = Instant::now();
            match receive.recv_timeout(TICK.min(patience)) {
                Ok(line) => {
                    silence.ends();
                    run.lines.push(line);
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    if !silence.is_hang(patience, before.elapsed(), || self.signs(child.id())) {
                        continue;
                    }
                    run.failure = Some(self.hang(child.id(), &run.lines));
                    let _ = child.kill();
                    break;
                }
            }
        }
        let status = child.wait().map_err(|error| error.to_string())?;
        let _ = reader.join();
        if run.failure.is_none() && !status.success() {
            let last = run.lines.last().cloned().unwrap_or_default();
            run.failure = Some(format!("{status}; last: {last}\n{}", autopsy::tail(&log, 12)));
        }
        Ok(run)
    }

    /// What shows that the program goes on.
    fn signs(&self, pid: u32) -> Signs {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name may hold spaces. After it come the fields from the third on; the 14th and 15th are the processor time.
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
        let spent = fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
        let node = status::read(&self.machine.runtime_dir()).ok();
        let clients = node.iter().flat_map(|node| &node.gpus).flat_map(|gpu| &gpu.clients);
        let own = clients.filter(|client| client.pid == pid);
        own.fold([spent, 0, 0, 0], |[spent, slices, bytes_in, bytes_out], client| {
            [spent, slices + client.slices, bytes_in + client.bytes_in, bytes_out + client.bytes_out]
        })
    }

    fn hang(&self, pid: u32, lines: &[String]) -> String {
        let mut text = format!("it hangs; last: {}\n", lines.last().map_or("", String::as_str));
        let _ = writeln!(text, "status: {}", autopsy::status(&self.machine.runtime_dir()));
        text += &autopsy::stacks(pid);
        text
    }

    /// Says what differs, and the fewest steps that it takes.
    fn report(&mut self, seed: u64, mut steps: BTreeSet<u32>, what: &str) -> Result<(), String> {
        println!("\n==== seed {seed}, {:?}: {what}", self.mode);
        let mut last = what.to_owned();
        if !self.options.no_shrink && !what.starts_with("it hangs") {
            self.shrink(seed, &mut steps, &mut last)?;
        }
        let mode = self.mode.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        println!("---- with the fewest steps found: {last}");
        println!(
            "repeat: nvshare-stress fuzz --first {seed} --seeds 1 --modes {mode} --steps {} --nap-us {} --without '{}' --only {} --show",
            self.options.steps,
            self.options.nap_us,
            self.options.without,
            list(&steps)
        );
        Ok(())
    }

    /// Leaves out steps, first many at once, as long as the same still differs. Each is tried twice: the competitor is not
    /// always in the way at the same moment.
    fn shrink(&mut self, seed: u64, steps: &mut BTreeSet<u32>, what: &mut String) -> Result<(), String> {
        let mut size = steps.len() / 2;
        let mut tries = 0;
        while size > 0 {
            let all: Vec<u32> = steps.iter().copied().collect();
            for part in all.chunks(size) {
                let fewer: BTreeSet<u32> =
                    steps.iter().copied().filter(|step| !part.contains(step)).collect();
                for _ in 0..2 {
                    tries += 1;
                    if tries > 250 {
                        return Ok(());
                    }
                    if let Outcome::Differs(difference) = self.compare(seed, &fewer)?
                        && kind(&difference) == kind(what)
                    {
                        (*steps, *what) = (fewer, difference);
                        break;
                    }
                }
            }
            size /= 2;
        }
        Ok(())
    }
}

fn list(steps: &BTreeSet<u32>) -> String {
    steps.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

/// What two differences have in common that may have the same cause: the last line, without its numbers but for results.
fn kind(difference: &str) -> String {
    let last = difference.lines().find(|line| line.starts_with("  nvshare: ")).or(difference.lines().next());
    let (call, results) =
        last.unwrap_or_default().rsplit_once("->").unwrap_or((last.unwrap_or_default(), ""));
    call.chars().filter(|char| !char.is_ascii_digit()).chain(results.chars()).collect()
}

/// The first lines that are not alike, with some before them.
fn difference(native: &[String], shared: &[String]) -> Option<String> {
    let at = (0..native.len().max(shared.len())).find(|&at| native.get(at) != shared.get(at))?;
    let mut text = "the answers differ\n".to_owned();
    for line in &native[at.saturating_sub(6).min(native.len())..at.min(native.len())] {
        let _ = writeln!(text, "    {line}");
    }
    let _ = writeln!(text, "  native:  {}", native.get(at).map_or("(nothing)", String::as_str));
    let _ = write!(text, "  nvshare: {}", shared.get(at).map_or("(nothing)", String::as_str));
    Some(text)
}

/// Somebody who wants the GPU all the time, and nearly all of the pool.
struct Competitor(Child, PathBuf);

impl Competitor {
    fn start(machine: &Machine, bytes: u64) -> Result<Self, String> {
        let mut command = children::command(program("compete"));
        let log = machine.scratch().join("competitor");
        let error = File::create(&log).map_err(|error| format!("{}: {error}", log.display()))?;
        command.args([(bytes / MIB).to_string(), "100000000".into(), "3".into()]).envs(machine.client()?);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(error).spawn();
        child.map(|child| Self(child, log)).map_err(|error| format!("the competitor: {error}"))
    }

    fn must_live(&mut self) -> Result<(), String> {
        match self.0.try_wait() {
            Ok(None) => Ok(()),
            ended => {
                Err(format!("the competitor has ended: {ended:?}\n{}", autopsy::tail(Path::new(&self.1), 5)))
            }
        }
    }
}

impl Drop for Competitor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
