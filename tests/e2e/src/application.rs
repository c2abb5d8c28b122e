//! An application under the shim that makes the CUDA calls a test names, one at a time: `nvshare-test-calls`.

pub mod async_pool;
pub mod books;
pub mod case;
pub mod ipc;
pub mod running;
pub mod vmm;

use crate::built;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use nvshare_tools::node::{Environment, Node, SimulatedGpu};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// `CUDA_SUCCESS`.
pub const SUCCESS: i32 = 0;
/// `CUDA_ERROR_INVALID_VALUE`.
pub const INVALID_VALUE: i32 = 1;

/// Bytes.
pub const MIB: u64 = 1 << 20;

/// A simulated GPU of 256 MiB.
pub fn gpu() -> SimulatedGpu {
    SimulatedGpu::new(&[("MEMORY", "256MiB".into()), ("CONTEXT_BYTES", "2MiB".into())])
        .expect("the workspace is built: cargo build --workspace")
}

/// The same with a link that costs next to nothing, for what goes in and out many times.
pub fn quick_gpu() -> SimulatedGpu {
    let settings = [("MEMORY", "256MiB"), ("CONTEXT_BYTES", "2MiB"), ("LINK_BANDWIDTH", "256GiB")];
    SimulatedGpu::new(&settings.map(|(name, value)| (name, value.to_owned())))
        .expect("the workspace is built: cargo build --workspace")
}

/// As the first, for applications that unmap nothing themselves and free nothing while they submit: a call that comes
/// while their memory is out is an illegal access.
pub fn watched_gpu() -> SimulatedGpu {
    let settings = [("MEMORY", "256MiB".into()), ("CONTEXT_BYTES", "2MiB".into()), ("WATCH", "1".into())];
    SimulatedGpu::new(&settings).expect("the workspace is built: cargo build --workspace")
}

/// An arbiter with a pool of 64 MiB on it.
pub fn node(gpu: &SimulatedGpu) -> Node {
    Node::start(gpu.environment(&[]), &["--capacity", "64MiB"].map(str::to_owned)).unwrap()
}

/// The application. Waits for each answer, so there is nothing to sleep for.
#[derive(Debug)]
pub struct Application {
    process: Child,
    calls: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Application {
    /// In this environment, with these variables beside.
    pub fn start(environment: Environment, variables: &[(&str, &str)]) -> Self {
        let mut command = Command::new(built("nvshare-test-calls"));
        command.envs(environment).envs(variables.iter().copied());
        Self::started(&mut command)
    }

    /// Another program that makes the calls it is told to.
    pub fn started(command: &mut Command) -> Self {
        let mut process =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (calls, answers) = (process.stdin.take(), BufReader::new(process.stdout.take().unwrap()));
        Self { process, calls, answers }
    }

    /// What its lines in the log begin with.
    pub fn client(&self) -> String {
        format!("nvshare[{}]", self.process.id())
    }

    /// With a context.
    pub fn ready(node: &Node) -> Self {
        Self::on(node, 0)
    }

    /// With a context on that GPU.
    pub fn on(node: &Node, device: u32) -> Self {
        let mut application = Self::start(node.environment(), &[]);
        assert_eq!(application.call("init"), SUCCESS);
        assert_eq!(application.call(&format!("create {device}")), SUCCESS);
        application
    }

    /// Has it make a call: the `CUresult`, and what else the call gave.
    pub fn ask(&mut self, call: &str) -> (i32, String) {
        self.tell(call);
        self.answer(call)
    }

    /// Has it make a call, and does not wait for the answer: that is the next one that is asked for.
    pub fn tell(&mut self, call: &str) {
        writeln!(self.calls.as_ref().unwrap(), "{call}").unwrap();
    }

    /// Waits for the answer to a call that it was told to make.
    pub fn answer(&mut self, call: &str) -> (i32, String) {
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        let (code, given) = answer.trim_end_matches('\n').split_once(' ').unwrap_or_else(|| {
            // Killed first, if it lives: its log has no end before it has one.
            let _ = self.process.kill();
            let mut said = String::new();
            let _ = self.process.stderr.take().unwrap().read_to_string(&mut said);
            panic!("it ended at '{call}': {said}")
        });
        (code.parse().unwrap(), given.to_owned())
    }

    /// Has it make a call: the `CUresult`.
    pub fn call(&mut self, call: &str) -> i32 {
        self.ask(call).0
    }

    /// A call that must come off.
    #[track_caller]
    pub fn does(&mut self, call: &str) {
        assert_eq!(self.call(call), SUCCESS, "{call}");
    }

    /// A call that must come off, and the number that it gives.
    #[track_caller]
    pub fn number(&mut self, call: &str) -> u64 {
        let (code, given) = self.ask(call);
        assert_eq!(code, SUCCESS, "{call}: {given}");
        given.parse().unwrap_or_else(|_| panic!("'{call}' gave '{given}'"))
    }

    /// An allocation that must come off.
    #[track_caller]
    pub fn alloc(&mut self, bytes: u64) -> u64 {
        self.number(&format!("alloc {bytes}"))
    }

    /// Writes words of its own to memory.
    pub fn writes(&mut self, address: u64, bytes: u64, seed: u64) {
        self.does(&format!("write {address} {bytes} {seed}"));
    }

    /// Finds the words of a write there.
    #[track_caller]
    pub fn sees(&mut self, address: u64, bytes: u64, seed: u64) {
        let seen = self.ask(&format!("check {address} {bytes} {seed}"));
        assert_eq!(seen, (SUCCESS, "right".into()), "{bytes} B at {address:#x} of {seed}");
    }

    /// Kills it, and keeps its answers open, for what it leaves behind.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Stops it where it is: it gives nothing up before it [goes on](Self::go_on).
    pub fn stop(&self) {
        self.signal(Signal::SIGSTOP);
        let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        let status = waitid(Id::Pid(self.pid()), flags).unwrap();
        assert!(matches!(status, WaitStatus::Stopped(..)), "{status:?}");
    }

    /// Lets it go on after a [stop](Self::stop).
    pub fn go_on(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.process.id() as i32)
    }

    fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// It still computes what it should.
    pub fn works(&mut self) {
        let address = self.alloc(4 * MIB);
        assert_eq!(self.call(&format!("write {address} {} 7", 4 * MIB)), SUCCESS);
        assert_eq!(self.ask(&format!("check {address} {} 7", 4 * MIB)), (SUCCESS, "right".into()));
        assert_eq!(self.call(&format!("free {address}")), SUCCESS);
    }

    /// Lets it end, which it does by itself and well. What it has logged.
    pub fn end(mut self) -> String {
        drop(self.calls.take());
        let mut said = String::new();
        self.process.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        let status = self.process.wait().unwrap();
        assert!(status.success(), "{status}: {said}");
        said
    }

    /// As [`end`](Self::end), and there is no error in the log.
    #[track_caller]
    pub fn ends_well(self) -> String {
        let said = self.end();
        assert!(!said.contains(" ERROR "), "{said}");
        said
    }

    /// As [`end`](Self::end), and one line of the log names the process and all of these.
    pub fn ends_having_said(self, parts: &[&str]) {
        let client = self.client();
        let said = self.end();
        let all = |line: &str| line.contains(&client) && parts.iter().all(|part| line.contains(part));
        assert!(said.lines().any(all), "no line with {client} and {parts:?}: {said}");
    }
}

/// The application's own failures would be ours otherwise.
impl Drop for Application {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
