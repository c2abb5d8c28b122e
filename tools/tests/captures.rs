//! Captures: which are open, and which are over although nobody has ended them. While one is open its process cannot
//! give way; when none is, it must.

mod application;

use application::{gpu, node};
use nvshare_test_support::{Patience, program};
use nvshare_tools::node::{Environment, Node, SimulatedGpu};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

const PATIENCE: Patience = Patience::seconds(60);

/// A program that holds 40 MiB after a case of `tests/programs/captures.c`. Killed when dropped.
struct Capturer(Child);

impl Capturer {
    /// Returns when the case is over.
    fn ready(case: &str, environment: Environment) -> Self {
        let mut command = Command::new(program("captures"));
        command.args([case, "40"]).envs(environment).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut started = Self(command.spawn().unwrap());
        let output = started.0.stdout.take().unwrap();
        let said = std::thread::spawn(move || {
            let mut line = String::new();
            BufReader::new(output).read_line(&mut line).map(|_| line)
        });
        // One that hangs is killed, when the test has given up.
        PATIENCE.until("the case is over", || said.is_finished());
        assert_eq!(said.join().unwrap().unwrap(), "ready\n", "{case}: {:?}", started.0.wait());
        started
    }

    /// Its data is right at the end.
    fn ends_well(mut self) {
        drop(self.0.stdin.take());
        PATIENCE.until("the capturing program has ended", || self.0.try_wait().unwrap().is_some());
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Capturer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A client that does not fit beside the capturer gets the GPU.
fn another_gets_its_turn(node: &Node) {
    let mut command = Command::new(program("compete"));
    command.args(["48", "2"]).envs(node.environment()).stdout(Stdio::null());
    let mut other = Capturer(command.spawn().unwrap());
    PATIENCE.until("the other client has had its turn", || other.0.try_wait().unwrap().is_some());
    assert!(other.0.wait().unwrap().success());
}

#[track_caller]
fn gives_way_after(case: &str) {
    let gpu: SimulatedGpu = gpu();
    Capturer::ready(case, gpu.environment(&[])).ends_well();
    let node = node(&gpu);
    let capturer = Capturer::ready(case, node.environment());
    another_gets_its_turn(&node);
    capturer.ends_well();
}

#[test]
fn two_threads_capture_their_own_default_streams_by_one_handle() {
    gives_way_after("two-threads");
}

#[test]
fn two_threads_capture_their_own_default_streams_by_the_null_handle() {
    gives_way_after("two-threads-by-null");
}

#[test]
fn a_capture_is_over_when_the_thread_ends_whose_own_stream_it_is() {
    gives_way_after("thread-ends");
}

#[test]
fn a_capture_goes_on_when_the_driver_refuses_to_end_it() {
    gives_way_after("refused");
}

#[test]
fn a_ruined_capture_is_over_when_it_is_ended() {
    gives_way_after("ruined");
}

#[test]
fn a_capture_is_open_until_its_end_although_its_stream_was_to_be_destroyed() {
    gives_way_after("destroyed");
}

#[test]
fn a_capture_to_a_graph_is_a_capture() {
    gives_way_after("to-a-graph");
}

#[test]
fn a_thread_captures_while_a_free_waits_for_the_gpu() {
    gives_way_after("during-a-free");
}

#[test]
fn a_capture_is_over_when_its_context_is_destroyed() {
    gives_way_after("context-destroyed");
}

#[test]
fn a_capture_is_over_when_its_context_is_reset() {
    gives_way_after("context-reset");
}
