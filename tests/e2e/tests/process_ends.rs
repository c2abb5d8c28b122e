//! A client's slot is closed when its process ends or runs another program, in whatever way; and nobody's is who lives.
//!
//! The programs know nothing of nvshare (`tests/programs/exec.c` and `ends.c`).

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nvshare_e2e::application::{gpu, node};
use nvshare_test_support::{Patience, program};
use nvshare_tools::node::{Node, start_arbiter};
use nvshare_tools::status;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

const TIMEOUT: Patience = Patience::seconds(60);

/// Two of these do not fit into the pool of 64 MiB.
const SIZE: &str = "50";

/// A program under the shim, with its input and output.
struct Running {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Running {
    fn start(node: &Node, name: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(program(name));
        let mut child = command
            .args(arguments)
            .envs(node.environment())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, input, output }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    #[track_caller]
    fn says(&mut self, line: &str) {
        assert_eq!(self.line(), line);
    }

    /// One that ends in a way of `ends.c`, when it has memory on the GPU; and its client's pid.
    fn that_ends(node: &Node, how: &str) -> (Self, u32) {
        let mut running = Self::start(node, "ends", &[how, SIZE]);
        let line = running.line();
        let pid = line.strip_suffix(" of the client").unwrap_or_else(|| panic!("{how}: '{line}'"));
        let pid = pid.parse().unwrap();
        assert_eq!(clients(node), [pid]);
        (running, pid)
    }

    fn go_on(&mut self) {
        writeln!(self.input.as_ref().unwrap()).unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Those who live on end with their standard input.
        drop(self.input.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn clients(node: &Node) -> Vec<u32> {
    status::read(node.dir()).unwrap().gpus[0].clients.iter().map(|client| client.pid).collect()
}

/// Another client has all of the GPU.
fn another_runs(node: &Node) {
    let ran = Command::new(program("compete")).args([SIZE, "2"]).envs(node.environment()).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
}

fn runs(pid: u32, name: &str) -> bool {
    std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("comm"))
        .is_ok_and(|comm| comm.trim() == name)
}

#[test]
fn whoever_runs_another_program_is_no_client_any_more() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut client = Running::start(&node, "exec", &[SIZE, "cat"]);
    client.says("exec");
    let pid = client.child.id();
    TIMEOUT.until("it runs another program", || runs(pid, "cat"));
    TIMEOUT.until("its slot is closed", || clients(&node).is_empty());
    another_runs(&node);
    assert!(runs(pid, "cat"), "under the same pid");
}

#[test]
fn a_program_that_cannot_be_run_changes_nothing() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut client = Running::start(&node, "exec", &[SIZE, "/nonexistent"]);
    client.says("exec");
    client.says("no exec");
    for _ in 0..2 {
        client.go_on();
        client.says("right");
        another_runs(&node);
        TIMEOUT.until("it alone is there", || clients(&node) == [client.child.id()]);
    }
}

#[test]
fn whoever_ends_leaves_no_slot_behind_and_its_children_keep_none_open() {
    for how in ["_exit", "vfork", "daemon", "left", "clone", "runs"] {
        let gpu = gpu();
        let node = node(&gpu);
        let (mut client, pid) = Running::that_ends(&node, how);
        client.go_on();
        if ["left", "clone", "runs"].contains(&how) {
            let line = client.line();
            assert!(line.ends_with(" lives on"), "{how}: '{line}'");
        }
        TIMEOUT.until(how, || clients(&node).is_empty());
        another_runs(&node);
        println!("{how}: {pid} is gone");
    }
}

#[test]
fn who_closes_all_descriptors_is_a_client_still() {
    let gpu = gpu();
    let node = node(&gpu);
    let (mut client, pid) = Running::that_ends(&node, "closed");
    let mut goes_on = || {
        client.go_on();
        client.says("right");
        another_runs(&node);
        TIMEOUT.until("it alone is there", || clients(&node) == [pid]);
    };
    goes_on();
    // The next arbiter has nothing but what the client has kept.
    kill_arbiter(&node);
    let next = start_arbiter(node.dir(), &["--capacity", "64MiB"].map(str::to_owned), &gpu.environment(&[]));
    let mut next = next.unwrap().expect("no other is started");
    assert_eq!(clients(&node), [pid], "it is taken over");
    goes_on();
    drop(client);
    next.kill().unwrap();
    next.wait().unwrap();
}

fn kill_arbiter(node: &Node) {
    let pid = node.arbiter_pid();
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
    let stat = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    TIMEOUT.until("the arbiter has ended", || stat().contains(") Z "));
}

/// What tells the arbiter that a client lives is where no child inherits it.
#[test]
fn an_application_finds_none_of_it_among_its_own_descriptors() {
    let gpu = gpu();
    let node = node(&gpu);
    let (client, pid) = Running::that_ends(&node, "_exit");
    let open = || -> Vec<String> {
        let listed = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        listed
            .filter_map(|entry| std::fs::read_link(entry.path()).ok())
            .map(|target| target.display().to_string())
            .collect()
    };
    let its_own =
        |target: &String| target.starts_with("socket:") || target.contains(node.dir().to_str().unwrap());
    TIMEOUT.until("they are in a table of their own", || !open().iter().any(its_own));
    drop(client);
}
