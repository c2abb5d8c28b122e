//! The examples run, take turns with each other and with a preloaded program, and all of them keep their data.
//!
//! Needs the other parts beside the tests: `cargo build --release --workspace`.

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use nvshare::client::Bookkeeper;
use nvshare::wire::Hello;
use nvshare::{Session, paths, register};
use nvshare_test_support::Patience;
use nvshare_tools::node::{self, Environment, Node, SimulatedGpu};
use nvshare_tools::status::{self, Client};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

const TIMEOUT: Patience = Patience::seconds(60);

const PLAIN: &str = env!("CARGO_BIN_EXE_embed-plain-memory");
const VMM: &str = env!("CARGO_BIN_EXE_embed-vmm");
const ASYNC: &str = env!("CARGO_BIN_EXE_embed-async");

fn gpu() -> SimulatedGpu {
    let set = |name: &'static str, value: &str| (name, value.to_owned());
    SimulatedGpu::new(&[set("MEMORY", "256MiB"), set("CONTEXT_BYTES", "2MiB"), set("LINK_BANDWIDTH", "8GiB")])
        .expect("the workspace is built: cargo build --release --workspace")
}

fn node(gpu: &SimulatedGpu, quantum: &str) -> Node {
    let arguments = ["--capacity", "56MiB", "--quantum", quantum].map(str::to_owned);
    Node::start(gpu.environment(&[]), &arguments).unwrap()
}

/// For programs that are clients by themselves: no preloaded library.
fn environment(node: &Node, gpu: &SimulatedGpu) -> Environment {
    let mut environment = gpu.environment(&[]);
    environment.push((paths::RUNTIME_DIR.into(), node.dir().into()));
    environment
}

fn clients(node: &Node) -> Vec<Client> {
    status::read(node.dir()).unwrap().gpus.remove(0).clients
}

/// A program that works until its standard input is closed.
struct Running {
    process: Child,
    input: Option<ChildStdin>,
    output: Receiver<String>,
}

impl Running {
    fn start(command: &[&str], environment: Environment) -> Self {
        let mut process = Command::new(command[0])
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
        Self { input: process.stdin.take(), process, output }
    }

    /// Its next line.
    fn says(&mut self) -> String {
        match self.output.recv_timeout(TIMEOUT.duration()) {
            Ok(line) => line,
            Err(why) => panic!("it says nothing more ({why}): {:?}", self.process.try_wait()),
        }
    }

    fn write(&mut self, line: &str) {
        writeln!(self.input.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Waits until it has given the GPU up so often, and its memory has gone out and in.
    fn takes_turns(&mut self, node: &Node, times: u64) {
        let pid = self.process.id();
        TIMEOUT.until("it has given way again and again", || {
            assert!(self.process.try_wait().unwrap().is_none(), "it has ended");
            clients(node).iter().any(|client| {
                client.pid == pid && client.yields >= times && client.bytes_in > 0 && client.bytes_out > 0
            })
        });
    }

    /// Closes its input and waits for its end; the last line it said.
    fn end(mut self) -> String {
        self.input = None;
        let mut last = String::new();
        while let Ok(line) = self.output.recv_timeout(TIMEOUT.duration()) {
            last = line;
        }
        let status = self.process.wait().unwrap();
        assert!(status.success(), "{status}: {last}");
        last
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// All have left, and every granule is back.
fn balances(node: &Node) {
    TIMEOUT.until("all clients have left", || clients(node).is_empty());
    let gpu = status::read(node.dir()).unwrap().gpus.remove(0);
    assert_eq!((gpu.free_bytes, gpu.repaired), (gpu.capacity_bytes as i64, 0));
}

fn take_turns(node: &Node, mut programs: Vec<Running>) {
    programs.iter_mut().for_each(|program| program.takes_turns(node, 3));
    for program in programs {
        let said = program.end();
        assert!(said.starts_with("right after ") || said.contains("\"right\":true"), "{said}");
    }
    balances(node);
}

#[test]
fn processes_on_plain_memory_take_turns_and_keep_their_data() {
    let gpu = gpu();
    let node = node(&gpu, "5ms");
    let start =
        |seed: &str| Running::start(&[PLAIN, "--mib", "32", "--seed", seed], environment(&node, &gpu));
    take_turns(&node, ["1", "2", "3"].map(start).into());
}

/// An arbiter that is ended with the test.
struct Next(Child);

impl Drop for Next {
    fn drop(&mut self) {
        let _ = nix::sys::signal::kill(Pid::from_raw(self.0.id() as i32), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// Turns need no arbiter. The next one finds the clients, and closes their books when they leave.
#[test]
fn clients_go_on_while_their_arbiter_is_dead_and_belong_to_the_next_one() {
    let gpu = gpu();
    let node = node(&gpu, "5ms");
    let start =
        |seed: &str| Running::start(&[PLAIN, "--mib", "32", "--seed", seed], environment(&node, &gpu));
    let mut programs: Vec<_> = ["1", "2"].map(start).into();
    programs.iter_mut().for_each(|program| program.takes_turns(&node, 1));
    nix::sys::signal::kill(Pid::from_raw(node.arbiter_pid() as i32), Signal::SIGKILL).unwrap();
    TIMEOUT.until("nobody answers", || !node::answers(node.dir()));
    let given_way = || clients(&node).iter().map(|client| client.yields).min().unwrap();
    let before = given_way();
    TIMEOUT.until("they go on", || given_way() > before + 2);

    let arguments = ["--capacity", "56MiB"].map(str::to_owned);
    let next = Next(node::start_arbiter(node.dir(), &arguments, &gpu.environment(&[])).unwrap().unwrap());
    let generation = || status::read(node.dir()).unwrap().gpus[0].arbiter_generation;
    TIMEOUT.until("it serves them", || generation() == 2);
    take_turns(&node, programs);
    drop(next);
}

#[test]
fn programs_that_move_their_cuda_memory_take_turns_with_a_preloaded_one() {
    let gpu = gpu();
    let node = node(&gpu, "20ms");
    let start = |seed: &str| Running::start(&[VMM, "--mib", "32", "--seed", seed], environment(&node, &gpu));
    let mut programs: Vec<_> = ["1", "2"].map(start).into();
    let nvshare = node::program().unwrap();
    let job = [nvshare.to_str().unwrap(), "internal", "job", "--size", "32MiB", "--controlled"];
    let mut job = Running::start(&job, node.environment());
    job.write("go");
    programs.push(job);
    take_turns(&node, programs);
}

/// Somebody else has the GPU. The program awaits it, and answers meanwhile: nothing in it is blocked.
#[test]
fn an_asynchronous_program_answers_while_it_awaits_the_gpu() {
    let gpu = gpu();
    let node = node(&gpu, "600s");
    let uuid = status::read(node.dir()).unwrap().gpus[0].uuid.parse().unwrap();
    let hello = Hello::new(uuid, "holder");
    let client =
        register::register(&paths::socket(node.dir()), &hello, Duration::ZERO).unwrap().into_client();
    let keeper = Bookkeeper::new(client.books(), 1);
    let holder = Session::start(client, keeper).unwrap();
    holder.grow(20, || ()).unwrap();
    let pass = holder.enter().unwrap();

    let mut program = Running::start(&[ASYNC, "--mib", "32"], environment(&node, &gpu));
    assert_eq!(program.says(), "asks for the GPU");
    let pid = program.process.id();
    let phase = || clients(&node).iter().find(|it| it.pid == pid).map(|it| it.phase.clone());
    TIMEOUT.until("it waits", || phase().as_deref() == Some("waiting"));
    for line in ["one", "two"] {
        program.write(line);
        assert_eq!(program.says(), format!("answers: {line}"));
    }
    drop(pass);
    // With nobody else to wait for, it keeps the GPU to the end of its work.
    assert_eq!([program.says(), program.says()], ["has the GPU", "has done its work"]);
    program.write("three");
    assert_eq!(program.says(), "answers: three");
    assert_eq!(program.end(), "right after 100 steps");
    holder.close().unwrap();
    balances(&node);
}
