//! Jobs whose ranks are processes that wait for each other on the GPU (`tests/programs/ranks.c`), on a machine with simulated GPUs.
//!
//! The programs know nothing of nvshare, and their collectives are those of a stand-in for NCCL.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nvshare_test_support::{Patience, program_with_nccl};
use nvshare_tools::node::{Node, SimulatedGpu, TempDir, start_arbiter};
use nvshare_tools::status::{self, Client, Gpu};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// After so long, a test has failed because something never happened. No verdict depends on it otherwise.
pub const TIMEOUT: Patience = Patience::seconds(120);

/// Rounds that each job gets on by while all live.
pub const ROUNDS: u64 = 60;

/// Simulated GPUs with pools of 64 MiB, and an arbiter whose quantum is 50 ms.
pub struct Machine {
    gpu: SimulatedGpu,
    /// The arbiter's node.
    pub node: Node,
    arguments: Vec<String>,
    dir: TempDir,
}

/// A machine with so many GPUs.
///
/// # Panics
/// The workspace is not built.
pub fn machine(gpus: u32) -> Machine {
    machine_with(gpus, "any", &[])
}

/// A machine whose GPUs' UUIDs are in this order ("ascending" or "any"), which is the order in which gangs take them, and whose
/// arbiter has further arguments.
///
/// # Panics
/// The workspace is not built.
pub fn machine_with(gpus: u32, uuids: &str, more: &[&str]) -> Machine {
    machine_of(gpus, uuids, "64MiB", "50ms", more)
}

/// The same with pools of another size, 256 MiB at most, and another quantum.
///
/// # Panics
/// The workspace is not built.
pub fn machine_of(gpus: u32, uuids: &str, capacity: &str, quantum: &str, more: &[&str]) -> Machine {
    let set = |name: &'static str, value: &str| (name, value.to_owned());
    let gpu = SimulatedGpu::new(&[
        set("UUIDS", uuids),
        set("GPUS", &gpus.to_string()),
        set("MEMORY", "256MiB"),
        set("CONTEXT_BYTES", "2MiB"),
        set("LINK_BANDWIDTH", "8GiB"),
    ])
    .expect("the workspace is built: cargo build --workspace");
    let usual = ["--capacity", capacity, "--quantum", quantum];
    let arguments: Vec<_> = usual.iter().chain(more).map(ToString::to_string).collect();
    let node = Node::start(gpu.environment(&[]), &arguments);
    Machine { gpu, node: node.unwrap(), arguments, dir: TempDir::new().unwrap() }
}

impl Machine {
    /// The GPUs, as `nvshare status` has them.
    ///
    /// # Panics
    /// There is no arbiter.
    pub fn gpus(&self) -> Vec<Gpu> {
        status::read(self.node.dir()).unwrap().gpus
    }

    /// The clients of all GPUs.
    pub fn clients(&self) -> Vec<Client> {
        self.gpus().into_iter().flat_map(|gpu| gpu.clients).collect()
    }

    /// Ends the arbiter, and starts another one in the same place.
    ///
    /// # Panics
    /// It does not start.
    pub fn next_arbiter(&self) {
        let before = self.node.arbiter_pid();
        kill(Pid::from_raw(before as i32), Signal::SIGKILL).unwrap();
        let started = start_arbiter(self.node.dir(), &self.arguments, &self.gpu.environment(&[])).unwrap();
        assert!(started.is_some_and(|arbiter| arbiter.id() != before));
    }

    /// Everybody is gone, and so is every granule that they had, on every GPU.
    ///
    /// # Panics
    /// It is not so.
    pub fn balances(&self) {
        TIMEOUT.until("all clients are reaped", || self.clients().is_empty());
        for gpu in self.gpus() {
            assert_eq!(gpu.free_bytes, gpu.capacity_bytes as i64, "a granule of {} was lost", gpu.uuid);
            assert_eq!(gpu.repaired, 0, "the books of {} had to be repaired", gpu.uuid);
        }
    }
}

/// How a job is run.
#[derive(Clone)]
pub struct Shape {
    /// The GPUs of each rank.
    pub ranks: Vec<Vec<u32>>,
    /// Memory of each rank on each of its GPUs.
    pub mib: u32,
    /// How many rounds a rank launches before it waits for its GPU.
    pub ahead: u32,
    /// The program.
    pub program: PathBuf,
    /// Its environment.
    pub variables: Vec<(&'static str, String)>,
}

/// A rank for each of these GPUs, with 50 MiB, so that no two fit.
pub fn job(gpus: &[u32]) -> Shape {
    Shape {
        ranks: gpus.iter().map(|gpu| vec![*gpu]).collect(),
        mib: 50,
        ahead: 1,
        program: program_with_nccl("ranks", false),
        variables: Vec::new(),
    }
}

/// One process of a job.
pub struct Rank {
    /// The process.
    pub process: Child,
    input: Option<ChildStdin>,
    ready: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
}

/// Killed when dropped.
impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A job that runs.
pub struct Job {
    /// Its ranks.
    pub ranks: Vec<Rank>,
}

impl Job {
    /// Starts a job with this name.
    ///
    /// # Panics
    /// A process cannot be started.
    pub fn start(machine: &Machine, name: &str, shape: &Shape) -> Self {
        let file = machine.dir.path().join(name);
        let count = shape.ranks.len().to_string();
        let ranks = shape.ranks.iter().enumerate().map(|(rank, devices)| {
            let mut command = Command::new(&shape.program);
            command.arg(&file).args([
                &rank.to_string(),
                &count,
                &shape.mib.to_string(),
                &shape.ahead.to_string(),
            ]);
            command.args(devices.iter().map(u32::to_string)).envs(machine.node.environment());
            command.envs(shape.variables.iter().map(|(name, value)| (name, value)));
            let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            let (ready, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
            let output = BufReader::new(process.stdout.take().unwrap());
            let (is_ready, so_far) = (ready.clone(), rounds.clone());
            std::thread::spawn(move || {
                for line in output.lines().map_while(Result::ok) {
                    match line.split_once(' ') {
                        None if line == "ready" => is_ready.store(true, Ordering::Release),
                        Some(("round", number)) => so_far.store(number.parse().unwrap(), Ordering::Release),
                        _ => {}
                    }
                }
            });
            Rank { input: process.stdin.take(), process, ready, rounds }
        });
        Self { ranks: ranks.collect() }
    }

    /// Whether each rank has done a round.
    pub fn is_ready(&self) -> bool {
        self.ranks.iter().all(|rank| rank.ready.load(Ordering::Acquire))
    }

    /// The rounds of the rank that has done the fewest.
    ///
    /// # Panics
    /// It has no rank.
    pub fn rounds(&self) -> u64 {
        self.ranks.iter().map(|rank| rank.rounds.load(Ordering::Acquire)).min().unwrap()
    }

    /// The ranks end by themselves, with right data.
    ///
    /// # Panics
    /// They do not.
    pub fn ends_well(mut self) {
        self.ranks.iter_mut().for_each(|rank| drop(rank.input.take()));
        for rank in 0..self.ranks.len() {
            let status = self.ended(rank);
            assert!(status.success(), "rank {rank}: {status}: wrong data, or a CUDA error");
        }
    }

    /// Waits until a rank has ended.
    ///
    /// # Panics
    /// It does not.
    pub fn ended(&mut self, rank: usize) -> ExitStatus {
        let process = &mut self.ranks[rank].process;
        TIMEOUT.until("a rank has ended", || process.try_wait().unwrap().is_some());
        process.wait().unwrap()
    }
}

/// All of them get on by some rounds while all live.
///
/// # Panics
/// They do not.
pub fn all_get_on(jobs: &[&Job]) {
    TIMEOUT.until("all jobs are ready", || jobs.iter().all(|job| job.is_ready()));
    let before: Vec<_> = jobs.iter().map(|job| job.rounds()).collect();
    let done = || jobs.iter().zip(&before).map(|(job, before)| job.rounds() - before).collect::<Vec<_>>();
    TIMEOUT.until("all jobs get on", || done().iter().all(|rounds| *rounds >= ROUNDS));
    println!("rounds in the same time: {:?}", done());
}

/// All of these get on and end well, and take turns on each of their GPUs. How many slices they had, and how many drains were
/// tried again.
///
/// # Panics
/// They do not.
pub fn all_take_turns(gpus: u32, shapes: &[Shape]) -> (u64, u64) {
    let machine = machine(gpus);
    let start = |(number, shape): (usize, &Shape)| Job::start(&machine, &format!("job{number}"), shape);
    let jobs: Vec<_> = shapes.iter().enumerate().map(start).collect();
    all_get_on(&jobs.iter().collect::<Vec<_>>());
    let clients = machine.clients();
    assert!(
        clients.iter().all(|client| client.bytes_in > 0),
        "somebody's memory never came back: {clients:?}"
    );
    let (slices, retries) = clients
        .iter()
        .fold((0, 0), |(slices, retries), client| (slices + client.slices, retries + client.drain_retries));
    println!("{slices} slices, {retries} drains tried again");
    jobs.into_iter().for_each(Job::ends_well);
    machine.balances();
    (slices, retries)
}
