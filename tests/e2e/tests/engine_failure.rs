//! A client whose memory can no longer be moved: its calls fail, once and for all and with a line in the log, others get
//! what it had, and nobody waits for it.

use nvshare_e2e::application::gpu;
use nvshare_test_support::{Patience, program};
use nvshare_tools::node::Node;
use nvshare_tools::status;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

const TIMEOUT: Patience = Patience::seconds(60);

/// A program of `tests/programs/broken.c`. Killed when dropped.
struct Broken {
    process: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Broken {
    fn start(node: &Node, variables: &[(&str, &str)]) -> Self {
        let mut command = Command::new(program("broken"));
        command.envs(node.environment()).envs(variables.iter().copied());
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = piped.spawn().unwrap();
        let (input, output) = (process.stdin.take(), BufReader::new(process.stdout.take().unwrap()));
        Self { process, input, output }
    }

    /// The next line that it says.
    fn says(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Its calls fail with this code, all of them.
    #[track_caller]
    fn fails_with(&mut self, code: i32) {
        let mut said = vec![self.says(), self.says()];
        if said[0] == "ready" {
            said = vec![said.remove(1), self.says()];
        }
        if said != [format!("failed {code}"), "all fail".to_owned()] {
            let _ = self.process.kill();
            let mut log = String::new();
            let _ = self.process.stderr.take().unwrap().read_to_string(&mut log);
            panic!("it said {said:?}, and: {log}");
        }
    }

    fn tell(&mut self) {
        self.input.as_ref().unwrap().write_all(b"now\n").unwrap();
    }

    /// Its calls have failed, and it ends well. What the log says about it, in one line.
    fn ends(mut self) -> String {
        drop(self.input.take());
        let mut log = String::new();
        self.process.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        assert!(self.process.wait().unwrap().success(), "{log}");
        let errors: Vec<_> =
            log.lines().filter(|line| line.contains(" ERROR ") || line.contains("panick")).collect();
        assert_eq!(errors.len(), 1, "one line says what happened: {log}");
        errors[0].to_owned()
    }
}

impl Drop for Broken {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn node(gpu: &nvshare_tools::node::SimulatedGpu) -> Node {
    let arguments = ["--capacity", "64MiB", "--quantum", "10ms"].map(str::to_owned);
    Node::start(gpu.environment(&[]), &arguments).unwrap()
}

/// A client that does not fit beside the broken one, with its own right data.
fn another_has_its_turns(node: &Node, rounds: &str) {
    let mut command = Command::new(program("compete"));
    let mut other =
        command.args(["48", rounds]).envs(node.environment()).stdout(Stdio::null()).spawn().unwrap();
    TIMEOUT.until("the other client has had its turns", || other.try_wait().unwrap().is_some());
    assert!(other.wait().unwrap().success());
}

/// Nothing is left on the GPU of a client that lives and has broken down.
fn has_nothing_left(node: &Node, broken: &Broken) {
    TIMEOUT.until("its slot is closed", || {
        let gpu = status::read(node.dir()).unwrap().gpus.remove(0);
        gpu.clients.iter().all(|client| client.pid != broken.process.id())
    });
}

/// A sandbox that is entered after the first CUDA call: the engine panics when it wants to shut the gate.
#[test]
fn a_panic_of_the_engine_is_told_and_leaves_nobody_waiting() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut broken = Broken::start(&node, &[]);
    assert_eq!(broken.says(), "ready");
    broken.tell();
    another_has_its_turns(&node, "3");
    broken.fails_with(999);
    has_nothing_left(&node, &broken);
    let line = broken.ends();
    assert!(line.contains("membarrier") && line.contains("CUDA_ERROR_UNKNOWN"), "{line}");
}

/// A copy into the GPU fails in a fill.
#[test]
fn a_fill_that_fails_is_told_and_leaves_nobody_waiting() {
    let gpu = gpu();
    let node = node(&gpu);
    let fails = [("NVSHARE_SIM_FAIL", "cuMemcpyHtoDAsync_v2:1000:700")];
    let mut broken = Broken::start(&node, &fails);
    assert_eq!(broken.says(), "ready");
    another_has_its_turns(&node, "3");
    broken.fails_with(700);
    has_nothing_left(&node, &broken);
    another_has_its_turns(&node, "1");
    let line = broken.ends();
    assert!(line.contains("every CUDA call of this process fails") && line.contains("gpu=GPU-"), "{line}");
}

/// The driver has no event for the engine, which cannot begin.
#[test]
fn an_engine_that_cannot_begin_is_told_and_leaves_nobody_waiting() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut broken = Broken::start(&node, &[("NVSHARE_SIM_FAIL", "cuEventCreate:1:2")]);
    broken.fails_with(2);
    has_nothing_left(&node, &broken);
    another_has_its_turns(&node, "1");
    broken.ends();
}
