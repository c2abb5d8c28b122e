//! The supervisor of a stress run.
//!
//! A run is a sequence of machines, and on each some busy times, after each of which everybody ends and nothing may be
//! left. What happens when follows from the seed; how it meets with what else happens does not, so a seed that failed
//! may have to run again several times.
//!
//! **What is a hang.** A thread that does the same thing for `--patience` seconds of the supervisor's own time, which
//! stands while a process is stopped and gains at most two ticks at once: on a machine that is busy with other things
//! it is slow as well.

use crate::autopsy;
use crate::children;
use crate::clock::{self, TICK};
use crate::machine::{Machine, Plan};
use crate::progress::{Done, Progress};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use nvshare_test_support::{Dice, program};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// Options of `nvshare-stress stress`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// How long to go on
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// What happens, and in which order
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Processes at once, beside those that they start themselves
    #[arg(long, default_value_t = 4)]
    processes: usize,
    /// What not to do: kills, stops, arbiter, tools, oversubscription, limits, or an action of tests/programs/random_client.c
    #[arg(long, value_delimiter = ',')]
    without: Vec<String>,
    /// Seconds without progress that are a hang
    #[arg(long, default_value_t = 60)]
    patience: u64,
    /// Seconds of each busy time
    #[arg(long, default_value_t = 12)]
    busy: u64,
    /// Run the clients without nvshare: what fails then is a fault of the client or of the simulated GPU
    #[arg(long)]
    native: bool,
    /// Report what fails, and go on with the next machine
    #[arg(long)]
    keep_going: bool,
}

/// What was done.
#[derive(Debug, Default)]
struct Counts {
    machines: u64,
    busy_times: u64,
    processes: u64,
    ended: u64,
    killed: u64,
    stopped: u64,
    signals: u64,
    arbiters: u64,
    tools: u64,
    actions: u64,
    refused: u64,
    repairs: u64,
}

/// Runs until the time is over or something fails.
pub fn run(options: &Options) -> Result<(), String> {
    nix::sys::prctl::set_child_subreaper(true).map_err(|error| format!("orphans are not ours: {error}"))?;
    let mut run = Run {
        options,
        dice: Dice::new(options.seed),
        end: Instant::now() + Duration::from_secs(options.seconds),
        client: program("random_client"),
        counts: Counts::default(),
        log: BTreeMap::new(),
    };
    let mut failures = 0;
    while Instant::now() < run.end {
        if let Err(why) = run.machine() {
            failures += 1;
            println!(
                "\n==== failure {failures}, seed {}, machine {}: {why}",
                options.seed, run.counts.machines
            );
            if !options.keep_going {
                break;
            }
        }
    }
    run.report();
    match failures {
        0 => Ok(()),
        _ => Err(format!("{failures} failures; repeat with --seed {}", options.seed)),
    }
}

struct Run<'a> {
    options: &'a Options,
    dice: Dice,
    end: Instant,
    client: PathBuf,
    counts: Counts,
    /// Lines of the clients' logs without their numbers, and how often each was there.
    log: BTreeMap<String, u64>,
}

impl Run<'_> {
    fn with(&self, what: &str) -> bool {
        !self.options.without.iter().any(|without| without == what)
    }

    fn once_in(&mut self, times: u64) -> bool {
        self.dice.below(times) == 0
    }

    fn plan(&mut self) -> (Plan, u64) {
        let gpus = if self.with("second-gpu") { 1 + self.dice.below(2) as u32 } else { 1 };
        let pool = (48 + 8 * self.dice.below(8)) * MIB;
        let quantum = ["5ms", "20ms", "60ms", "auto", "auto"][self.dice.below(5) as usize];
        let least = ["20ms", "100ms"][self.dice.below(2) as usize];
        let arbiter = ["--quantum", quantum, "--quantum-min", least, "--unresponsive-after", "2s"];
        let plan = Plan { gpus, memory: 320 * MIB, pool, arbiter: arbiter.map(str::to_owned).to_vec() };
        (plan, pool / (2 + self.dice.below(3)))
    }

    /// A machine's life.
    fn machine(&mut self) -> Result<(), String> {
        self.counts.machines += 1;
        let (plan, bytes) = self.plan();
        println!("machine {}: {plan:?}, up to {} MiB a process", self.counts.machines, bytes / MIB);
        let machine = Machine::start(plan.clone())?;
        let progress =
            Progress::create(&machine.scratch().join("progress")).map_err(|error| error.to_string())?;
        let mut busy = Busy {
            machine,
            progress,
            gpus: plan.gpus,
            bytes,
            clock: Duration::ZERO,
            children: BTreeMap::new(),
            lanes: BTreeMap::new(),
            killed: BTreeSet::new(),
            stopped: Vec::new(),
            tools: BTreeSet::new(),
            arbiters: BTreeSet::new(),
            arbiter_back: None,
            files: 0,
        };
        busy.nothing_is_left()?;
        for _ in 0..3 {
            if Instant::now() >= self.end {
                break;
            }
            let result = self.busy_time(&mut busy);
            self.read_logs(&busy);
            if let Err(why) = result {
                let report = busy.report(&why);
                busy.end_all();
                return Err(report);
            }
        }
        self.counts.repairs += busy.machine.repairs();
        Ok(())
    }

    /// Everybody works; then everybody ends.
    fn busy_time(&mut self, busy: &mut Busy) -> Result<(), String> {
        self.counts.busy_times += 1;
        let end = self.end.min(Instant::now() + Duration::from_secs(self.options.busy));
        while Instant::now() < end {
            self.something_happens(busy)?;
            busy.tick(self)?;
        }
        busy.calm(self)?;
        while !busy.everybody_has_ended() {
            busy.tick(self)?;
        }
        busy.nothing_is_left()
    }

    fn something_happens(&mut self, busy: &mut Busy) -> Result<(), String> {
        if busy.children.len() < self.options.processes && self.once_in(4) {
            busy.start_process(self)?;
        }
        match self.dice.below(100) {
            0 | 1 if self.with("kills") => busy.kill_one(self),
            2..=4 if self.with("stops") => busy.stop_one(self),
            5..=9 if self.with("signals") => busy.signal_one(self),
            10 if self.with("arbiter") && self.once_in(2) => busy.end_arbiter(self),
            11 if self.with("tools") => busy.use_tool(self)?,
            _ => {}
        }
        Ok(())
    }

    fn read_logs(&mut self, busy: &Busy) {
        for path in busy.logs() {
            let text = std::fs::read(&path).unwrap_or_default();
            for line in String::from_utf8_lossy(&text).lines() {
                let message = line.split_once(" ERROR ").or_else(|| line.split_once(" WARN "));
                let Some((_, message)) = message else { continue };
                let shape: String = message.chars().filter(|char| !char.is_ascii_digit()).take(110).collect();
                *self.log.entry(shape).or_default() += 1;
            }
            let _ = std::fs::remove_file(path);
        }
    }

    fn report(&self) {
        println!("\nWarnings and errors that clients logged:");
        let mut lines: Vec<_> = self.log.iter().collect();
        lines.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        for (line, count) in lines.iter().take(15) {
            println!("{count:8} {line}");
        }
        println!("\n{:#?}", self.counts);
    }
}

/// A machine with processes on it.
struct Busy {
    machine: Machine,
    progress: Progress,
    gpus: u32,
    bytes: u64,
    /// Time in which everybody could have made progress.
    clock: Duration,
    /// Processes that this one has started: when, and their logs.
    children: BTreeMap<u32, (Duration, PathBuf)>,
    /// What each thread does: its serial number, and since when.
    lanes: BTreeMap<(u32, usize), (u32, Duration)>,
    killed: BTreeSet<u32>,
    stopped: Vec<(u32, Instant)>,
    tools: BTreeSet<u32>,
    /// Arbiters that were told to end.
    arbiters: BTreeSet<u32>,
    arbiter_back: Option<Instant>,
    files: u64,
}

impl Busy {
    /// A while: what ended is seen, what is due is done, who is stuck is found.
    fn tick(&mut self, run: &mut Run) -> Result<(), String> {
        let before = Instant::now();
        std::thread::sleep(TICK);
        self.reap(run)?;
        self.close_rows(run)?;
        self.go_on();
        if self.arbiter_back.is_some_and(|time| time <= Instant::now()) {
            self.arbiter_back = None;
            self.machine.start_arbiter()?;
        }
        if self.stopped.is_empty() && self.arbiter_back.is_none() {
            self.clock += clock::credited(before.elapsed());
        }
        self.find_stuck(Duration::from_secs(run.options.patience))
    }

    fn start_process(&mut self, run: &mut Run) -> Result<(), String> {
        let seed = run.dice.below(1 << 62);
        let path = self.machine.scratch().join(format!("log-{}", self.files));
        self.files += 1;
        let log = File::create(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let error = log.try_clone().map_err(|error| error.to_string())?;
        let mut command = children::command(&run.client);
        command
            .args([seed.to_string(), "0".to_owned()])
            .envs(if run.options.native { self.machine.native() } else { self.machine.client()? })
            .env("STRESS_PROGRESS", self.machine.scratch().join("progress"))
            .env("STRESS_GPUS", self.gpus.to_string())
            .env("STRESS_BYTES", self.bytes.to_string())
            .env("STRESS_WITHOUT", run.options.without.join(","));
        if run.with("oversubscription") && run.once_in(4) {
            command.env("NVSHARE_ENABLE_SINGLE_OVERSUB", "1");
        }
        if run.with("limits") && run.once_in(5) {
            let limits =
                [("NVSHARE_WEIGHT", "300"), ("NVSHARE_PRIORITY", "high"), ("NVSHARE_MEMORY_LIMIT", "50%")];
            let (name, value) = limits[run.dice.below(3) as usize];
            command.env(name, value);
        }
        let child = command.stdin(Stdio::null()).stdout(log).stderr(error).spawn();
        let pid = child.map_err(|error| format!("{}: {error}", run.client.display()))?.id();
        self.children.insert(pid, (self.clock, path));
        run.counts.processes += 1;
        Ok(())
    }

    /// Sees all ends of processes.
    fn reap(&mut self, run: &mut Run) -> Result<(), String> {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
                Ok(WaitStatus::Exited(pid, code)) => self.ended(run, pid.as_raw() as u32, code, None)?,
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    self.ended(run, pid.as_raw() as u32, 0, Some(signal))?
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(format!("waitpid: {error}")),
            }
        }
    }

    fn ended(&mut self, run: &mut Run, pid: u32, code: i32, signal: Option<Signal>) -> Result<(), String> {
        if self.tools.remove(&pid) || self.arbiters.remove(&pid) {
            return Ok(());
        }
        if self.machine.arbiter() == Some(pid) {
            return Err(format!("the arbiter has ended by itself: {code}, {signal:?}"));
        }
        let may_be_killed = self.killed.contains(&pid) || self.progress.kills_itself(pid);
        let well = code == 0 && signal.is_none_or(|signal| signal == Signal::SIGKILL && may_be_killed);
        if !well {
            let log = self.children.get(&pid).map(|(_, path)| autopsy::tail(path, 12)).unwrap_or_default();
            let history = self.progress.history(pid, 100);
            return Err(format!("process {pid} ended with {code}, {signal:?}:\n{log}{history}"));
        }
        self.close(run, pid);
        Ok(())
    }

    fn close(&mut self, run: &mut Run, pid: u32) {
        let Done { actions, refused } = self.progress.close(pid);
        run.counts.actions += actions;
        run.counts.refused += refused;
        run.counts.ended += 1;
        self.children.remove(&pid);
        self.killed.remove(&pid);
        self.lanes.retain(|(its, _), _| *its != pid);
        self.stopped.retain(|(its, _)| *its != pid);
    }

    /// Closes the rows of processes that others have started and seen the end of.
    fn close_rows(&mut self, run: &mut Run) -> Result<(), String> {
        for pid in self.progress.processes() {
            if kill(Pid::from_raw(pid as i32), None) != Err(Errno::ESRCH) {
                continue;
            }
            if self.progress.lives_on(pid) && !self.killed.contains(&pid) {
                return Err(format!(
                    "process {pid} ended before its end:\n{}",
                    self.progress.history(pid, 100)
                ));
            }
            self.close(run, pid);
        }
        Ok(())
    }

    fn any(&self, run: &mut Run) -> Option<u32> {
        let processes = self.progress.processes();
        (!processes.is_empty()).then(|| processes[run.dice.below(processes.len() as u64) as usize])
    }

    fn kill_one(&mut self, run: &mut Run) {
        if let Some(pid) = self.any(run) {
            run.counts.killed += 1;
            self.killed.insert(pid);
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
    }

    fn stop_one(&mut self, run: &mut Run) {
        let Some(pid) = self.any(run) else { return };
        let longest = if run.once_in(5) { 2_500 } else { 300 };
        let time = Duration::from_millis(run.dice.below(longest));
        run.counts.stopped += 1;
        let _ = kill(Pid::from_raw(pid as i32), Signal::SIGSTOP);
        self.stopped.push((pid, Instant::now() + time));
    }

    fn go_on(&mut self) {
        let (due, later): (Vec<_>, Vec<_>) =
            self.stopped.drain(..).partition(|(_, time)| *time <= Instant::now());
        self.stopped = later;
        for (pid, _) in due {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGCONT);
        }
    }

    /// A signal for which the client has a handler once it has a row.
    fn signal_one(&mut self, run: &mut Run) {
        if let Some(pid) =
            self.any(run).filter(|&pid| self.progress.doing(pid).iter().any(|doing| doing.serial > 1))
        {
            run.counts.signals += 1;
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGUSR1);
        }
    }

    fn end_arbiter(&mut self, run: &mut Run) {
        let signal = if run.once_in(3) { Signal::SIGTERM } else { Signal::SIGKILL };
        if let Some(pid) = self.machine.end_arbiter(signal) {
            run.counts.arbiters += 1;
            self.arbiters.insert(pid);
            self.arbiter_back = Some(Instant::now() + Duration::from_millis(run.dice.below(800)));
        }
    }

    /// Somebody looks, or changes a client's shares.
    fn use_tool(&mut self, run: &mut Run) -> Result<(), String> {
        let program = nvshare_tools::node::program().map_err(|failure| failure.message)?;
        let mut command = children::command(program);
        let client = self.any(run).map(|pid| pid.to_string());
        match client.filter(|_| run.once_in(2)) {
            Some(pid) => {
                let priority = ["low", "normal", "high"][run.dice.below(3) as usize];
                command.args(["set", &pid, "--priority", priority]);
            }
            None => {
                command.args(["status", "--json"]);
            }
        }
        command.env(nvshare::paths::RUNTIME_DIR, self.machine.runtime_dir());
        let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.tools.insert(command.spawn().map_err(|error| format!("nvshare: {error}"))?.id());
        run.counts.tools += 1;
        Ok(())
    }

    /// From now on nothing happens from outside.
    fn calm(&mut self, run: &mut Run) -> Result<(), String> {
        for (_, time) in &mut self.stopped {
            *time = Instant::now();
        }
        if self.arbiter_back.take().is_some() {
            self.machine.start_arbiter()?;
        }
        self.tick(run)
    }

    fn everybody_has_ended(&self) -> bool {
        self.children.is_empty() && self.progress.processes().is_empty() && self.tools.is_empty()
    }

    fn find_stuck(&mut self, patience: Duration) -> Result<(), String> {
        let mut now = BTreeMap::new();
        for pid in self.progress.processes() {
            for doing in self.progress.doing(pid) {
                let key = (pid, doing.lane);
                let since = match self.lanes.get(&key) {
                    Some((serial, since)) if *serial == doing.serial && !doing.may_last() => *since,
                    _ => self.clock,
                };
                if self.clock - since > patience {
                    return Err(format!("process {pid}, thread {} is stuck: {}", doing.thread, doing.what));
                }
                now.insert(key, (doing.serial, since));
            }
        }
        self.lanes = now;
        for (pid, (since, _)) in &self.children {
            if self.progress.doing(*pid).is_empty()
                && self.clock - *since > 2 * patience + Duration::from_secs(60)
            {
                return Err(format!("process {pid} does nothing"));
            }
        }
        Ok(())
    }

    /// Now that all have ended. What the arbiter does a moment later may be awaited.
    fn nothing_is_left(&mut self) -> Result<(), String> {
        let mut left = Vec::new();
        for _ in 0..500 {
            left = self.machine.left_behind();
            if left.is_empty() {
                return Ok(());
            }
            std::thread::sleep(TICK);
        }
        Err(format!("all have ended, and something is left: {}", left.join("; ")))
    }

    fn logs(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.machine.scratch()).into_iter().flatten().flatten();
        let is_log =
            |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("log-"));
        entries.map(|entry| entry.path()).filter(is_log).collect()
    }

    /// All that helps to find out what happened.
    fn report(&self, why: &str) -> String {
        let mut text = format!("{why}\nwhat all do:\n");
        for pid in self.progress.processes() {
            for doing in self.progress.doing(pid) {
                let since = self
                    .lanes
                    .get(&(pid, doing.lane))
                    .map_or(Duration::ZERO, |(_, since)| self.clock - *since);
                let _ = writeln!(text, "  {pid} [{}] {} (for {since:.1?})", doing.thread, doing.what);
            }
        }
        let _ = writeln!(text, "status: {}", autopsy::status(&self.machine.runtime_dir()));
        for pid in self.progress.processes() {
            let _ = write!(text, "stacks of {pid}:\n{}", autopsy::stacks(pid));
            text += &self.progress.history(pid, 30);
        }
        let said = |path: &PathBuf| {
            let tail = autopsy::tail(path, 15);
            (!tail.is_empty()).then(|| format!("{}:\n{tail}", name(path)))
        };
        text.extend(self.logs().iter().filter_map(said));
        let _ = write!(text, "the arbiter's log:\n{}", self.machine.arbiter_log());
        text
    }

    fn end_all(&mut self) {
        let all: Vec<u32> =
            self.progress.processes().into_iter().chain(self.children.keys().copied()).collect();
        for pid in all {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
        // The arbiter is a child, too; it ends with the machine.
        let arbiter = self.machine.end_arbiter(Signal::SIGKILL);
        let _ = arbiter;
        while waitpid(None, None).is_ok() {}
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
