//! A C program of `tests/programs` that goes through a case, says "ready", and goes on with its memory until its input ends.

use super::{gpu, node};
use nvshare_test_support::{Patience, program};
use nvshare_tools::node::{Environment, Node};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};

const TIMEOUT: Patience = Patience::seconds(60);

/// Killed when dropped.
#[derive(Debug)]
pub struct Case(Child);

impl Case {
    /// Starts a program with 40 MiB, and waits until its case is over.
    #[track_caller]
    pub fn ready(name: &str, case: &str, environment: Environment, variables: &[(&str, &str)]) -> Self {
        let mut command = Command::new(program(name));
        command.args([case, "40"]).envs(environment).envs(variables.iter().copied());
        let mut started = Self(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
        let output = started.0.stdout.take().unwrap();
        let said = std::thread::spawn(move || {
            let mut line = String::new();
            BufReader::new(output).read_line(&mut line).map(|_| line)
        });
        // One that hangs is killed, when the test has given up.
        TIMEOUT.until("the case is over", || said.is_finished());
        assert_eq!(said.join().unwrap().unwrap(), "ready\n", "{case}: {:?}", started.0.wait());
        started
    }

    /// Its data is right at the end.
    #[track_caller]
    pub fn ends_well(mut self) {
        drop(self.0.stdin.take());
        assert!(self.ended("the program has ended").success());
    }

    fn ended(&mut self, what: &str) -> ExitStatus {
        TIMEOUT.until(what, || self.0.try_wait().unwrap().is_some());
        self.0.wait().unwrap()
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A client that does not fit beside the program gets the GPU, and its data is right.
#[track_caller]
pub fn another_gets_its_turn(node: &Node) {
    another_goes_through(node, &["48", "2"]);
}

/// The same, with other arguments of that client's.
#[track_caller]
pub fn another_goes_through(node: &Node, arguments: &[&str]) {
    let mut command = Command::new(program("compete"));
    command.args(arguments).envs(node.environment()).stdout(Stdio::null());
    let mut other = Case(command.spawn().unwrap());
    assert!(other.ended("the other client has had its turn").success());
}

/// A case is right natively and under nvshare, and afterwards the program shares the GPU.
#[track_caller]
pub fn is_right(name: &str, case: &str, variables: &[(&str, &str)]) {
    let gpu = gpu();
    Case::ready(name, case, gpu.environment(&[]), variables).ends_well();
    let node = node(&gpu);
    let program = Case::ready(name, case, node.environment(), variables);
    another_gets_its_turn(&node);
    program.ends_well();
}
