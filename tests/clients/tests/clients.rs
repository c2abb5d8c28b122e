//! Programs on libraries of others run as they are: on the simulated GPU, under nvshare alone, and several at the same
//! time where only one of them fits, so that their memory moves out and in between two of their launches.
//!
//! Needs the other parts beside the tests (`cargo build --release --workspace`) and the Python environment that
//! `tests/clients/make-venv` makes.

use nvshare::paths;
use nvshare_test_support::Patience;
use nvshare_tools::node::{self, Environment, Node, SimulatedGpu, TempDir};
use nvshare_tools::status::{self, Client};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};

/// After so long, a test has failed because something never happened. No verdict depends on it otherwise.
const TIMEOUT: Patience = Patience::seconds(120);

/// The size of each of a program's two buffers, in MiB.
const MIB: u64 = 16;

/// Two programs' buffers do not fit, and the contexts of four do beside the buffers of one.
const CAPACITY: &str = "56MiB";

const ROUNDS: u32 = 3;

#[derive(Clone, Copy, Debug)]
enum Kind {
    Cudarc,
    CudaBindings,
}

impl Kind {
    /// The program with its arguments.
    fn command(self, seed: u32) -> Vec<String> {
        let mut command = match self {
            Kind::Cudarc => vec![env!("CARGO_BIN_EXE_cudarc-client").to_owned()],
            Kind::CudaBindings => vec![
                python().to_str().unwrap().to_owned(),
                concat!(env!("CARGO_MANIFEST_DIR"), "/cuda_bindings_client.py").to_owned(),
            ],
        };
        command.extend([format!("--mib={MIB}"), format!("--rounds={ROUNDS}"), format!("--seed={seed}")]);
        command
    }

    /// What the program says in the end, if its data is right.
    fn right(self) -> String {
        let name = match self {
            Kind::Cudarc => "cudarc",
            Kind::CudaBindings => "cuda-bindings",
        };
        format!("{name}: 2 x {MIB} MiB, {ROUNDS} rounds: right")
    }
}

/// The Python of the environment that `make-venv` makes in the target directory, which this test runs in.
fn python() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let wanted = include_str!("../requirements.txt");
    let made = |venv: &PathBuf| {
        std::fs::read_to_string(venv.join("requirements.txt")).is_ok_and(|has| has == wanted)
            && venv.join("bin/python").is_file()
    };
    match own.ancestors().map(|dir| dir.join("venv")).find(made) {
        Some(venv) => venv.join("bin/python"),
        None => panic!(
            "no Python environment with the packages of tests/clients/requirements.txt: run tests/clients/make-venv"
        ),
    }
}

/// A program that runs. It waits for a line before each of its rounds.
struct Running {
    kind: Kind,
    process: Child,
    input: Option<ChildStdin>,
    output: Receiver<String>,
}

impl Running {
    fn start(kind: Kind, command: &[String], environment: Environment) -> Self {
        let mut process = Command::new(&command[0])
            .args(&command[1..])
            .envs(environment)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", command[0]));
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let (sender, output) = mpsc::channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Self { kind, input: process.stdin.take(), process, output }
    }

    /// Waits for its next line, which must be this one.
    fn says(&mut self, wanted: &str) {
        match self.output.recv_timeout(TIMEOUT.duration()) {
            Ok(line) => assert_eq!(line, wanted, "{:?}", self.kind),
            Err(RecvTimeoutError::Disconnected) => {
                panic!("{:?} ended with {} before '{wanted}'", self.kind, self.process.wait().unwrap())
            }
            Err(RecvTimeoutError::Timeout) => panic!("{:?} still does not say '{wanted}'", self.kind),
        }
    }

    /// Lets it begin the next round.
    fn go_on(&mut self) {
        writeln!(self.input.as_mut().unwrap()).unwrap();
    }

    /// Lets it do all of its rounds that are left, and waits for its end with the data right.
    fn finish(mut self, rounds: std::ops::RangeInclusive<u32>) {
        self.input = None;
        for round in rounds {
            self.says(&format!("round {round}"));
        }
        self.says(&self.kind.right());
        let status = self.process.wait().unwrap();
        assert!(status.success(), "{:?} ended with {status} after its data was right", self.kind);
    }
}

impl Drop for Running {
    /// A test that fails leaves nobody behind: without its input, a program goes on to its end, and this ends it sooner.
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn gpu() -> SimulatedGpu {
    let set = |name: &'static str, value: &str| (name, value.to_owned());
    SimulatedGpu::new(&[set("MEMORY", "256MiB"), set("CONTEXT_BYTES", "2MiB"), set("LINK_BANDWIDTH", "8GiB")])
        .expect("the workspace is built: cargo build --release --workspace")
}

fn clients(dir: &Path) -> Vec<Client> {
    status::read(dir).unwrap().gpus.remove(0).clients
}

/// Without nvshare: what the simulated GPU's driver lacks shows here.
fn runs_on_the_simulated_gpu(kind: Kind) {
    let gpu = gpu();
    let mut program = Running::start(kind, &kind.command(1), gpu.environment(&[]));
    program.says("loaded");
    program.finish(1..=ROUNDS);
}

#[test]
fn cudarc_runs_on_the_simulated_gpu() {
    runs_on_the_simulated_gpu(Kind::Cudarc);
}

#[test]
fn cuda_bindings_runs_on_the_simulated_gpu() {
    runs_on_the_simulated_gpu(Kind::CudaBindings);
}

/// cuda-bindings gets its entry points from cuGetProcAddress. Were the simulated GPU's own functions found by their
/// names, it would find the preloaded shim's and give those out, and the shim's part in this would not be tested.
#[test]
fn the_simulated_driver_gives_out_its_own_functions() {
    let (driver, shim) = (node::simulated_gpu().unwrap().0, node::shim().unwrap());
    let preload = format!("{}:{}", shim.display(), driver.display());
    let output =
        Command::new("true").envs([("LD_PRELOAD", &*preload), ("LD_DEBUG", "bindings")]).output().unwrap();
    let bindings = String::from_utf8_lossy(&output.stderr);
    let from_driver = format!("binding file {}", driver.display());
    let mut bindings = bindings.lines().filter(|line| line.contains(&from_driver)).peekable();
    assert!(bindings.peek().is_some(), "the dynamic linker does not say what it binds");
    let to_shim = format!("to {}", shim.display());
    let hooked: Vec<_> =
        bindings.filter(|line| line.contains(&to_shim) && line.contains("symbol `cu")).collect();
    assert!(hooked.is_empty(), "{hooked:#?}");
}

/// With `nvshare run` as a user types it: the program is a client, all of its memory is counted, and nothing moves.
fn runs_alone_under_nvshare(kind: Kind) {
    let (gpu, dir) = (gpu(), TempDir::new().unwrap());
    let mut command = vec![node::program().unwrap().to_str().unwrap().to_owned()];
    command.extend(["run", "--capacity", CAPACITY, "--"].map(str::to_owned));
    command.extend(kind.command(1));
    let mut environment = gpu.environment(&[]);
    environment.push((paths::RUNTIME_DIR.into(), dir.path().into()));
    let mut program = Running::start(kind, &command, environment);
    program.says("loaded");
    for round in 1..ROUNDS {
        program.go_on();
        program.says(&format!("round {round}"));
    }
    let [client] = &clients(dir.path())[..] else { panic!("not one client: {:?}", clients(dir.path())) };
    assert_eq!(client.demand_bytes, (2 * MIB) << 20, "{client:?}");
    assert_eq!((client.yields, client.bytes_in, client.bytes_out), (0, 0, 0), "{client:?}");
    program.finish(ROUNDS..=ROUNDS);
}

#[test]
fn cudarc_runs_alone_under_nvshare() {
    runs_alone_under_nvshare(Kind::Cudarc);
}

#[test]
fn cuda_bindings_runs_alone_under_nvshare() {
    runs_alone_under_nvshare(Kind::CudaBindings);
}

/// All hold their memory before the first round, and in each round every one needs it in place, so each must have been
/// moved out and in again after two rounds, whoever was faster.
#[test]
fn two_of_each_share_a_pool_that_holds_one() {
    let gpu = gpu();
    let arguments = ["--capacity", CAPACITY, "--quantum", "20ms"].map(str::to_owned);
    let node = Node::start(gpu.environment(&[]), &arguments).unwrap();
    let kinds = [Kind::Cudarc, Kind::CudaBindings, Kind::Cudarc, Kind::CudaBindings];
    let start = |(kind, seed): (Kind, u32)| Running::start(kind, &kind.command(seed), node.environment());
    let mut programs: Vec<_> = kinds.into_iter().zip(1..).map(start).collect();
    programs.iter_mut().for_each(|program| program.says("loaded"));
    for round in 1..ROUNDS {
        programs.iter_mut().for_each(Running::go_on);
        programs.iter_mut().for_each(|program| program.says(&format!("round {round}")));
    }
    let moved = |client: &Client| {
        client.yields > 0 && client.slices > 1 && client.bytes_in > 0 && client.bytes_out > 0
    };
    let of = |program: &Running| clients(node.dir()).into_iter().find(|it| it.pid == program.process.id());
    for program in &programs {
        // The counters may follow the moves that they count.
        TIMEOUT.until("all memory has moved out and in", || moved(&of(program).expect("it is a client")));
        println!("{:?}: {:?}", program.kind, of(program));
    }
    for program in programs {
        program.finish(ROUNDS..=ROUNDS);
    }
    TIMEOUT.until("all clients are reaped", || clients(node.dir()).is_empty());
    let gpu = status::read(node.dir()).unwrap().gpus.remove(0);
    assert_eq!(gpu.free_bytes, gpu.capacity_bytes as i64, "a granule was lost");
    assert_eq!(gpu.repaired, 0, "the books had to be repaired");
}
