//! CUDA calls where threads, processes and libraries begin and end do what they do without nvshare.
//!
//! The programs know nothing of nvshare (`tests/programs/last_calls.c`, `opens.c`, `constructor.c`,
//! `attaches.c` and `come_and_go.c`).

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nvshare_e2e::application::{gpu, node, quick_gpu};
use nvshare_test_support::{Patience, library, program};
use nvshare_tools::node::{Node, SimulatedGpu};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

const TIMEOUT: Patience = Patience::seconds(60);

/// One that hangs ends with the test.
struct Running {
    child: Child,
    input: Option<ChildStdin>,
    output: Receiver<String>,
}

impl Running {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        let (tell, said) = channel();
        std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| tell.send(line)));
        Self { child, input, output: said }
    }

    fn under_nvshare(node: &Node, name: &str, arguments: &[&str]) -> Self {
        Self::start(Command::new(program(name)).args(arguments).envs(node.environment()))
    }

    /// Waits until it has said so many more lines.
    fn says_lines(&mut self, count: usize) {
        for _ in 0..count {
            self.output.recv_timeout(TIMEOUT.duration()).expect("it has stopped, or ended too early");
        }
    }

    fn reads_a_line(&mut self) {
        self.input.as_mut().unwrap().write_all(b"\n").unwrap();
    }

    /// Ends its input, and waits until it has ended. What else it has said.
    #[track_caller]
    fn ends_well(mut self) -> String {
        self.input = None;
        TIMEOUT.until("it has ended", || self.child.try_wait().unwrap().is_some());
        let status = self.child.wait().unwrap();
        let said: String = self.output.iter().map(|line| line + "\n").collect();
        assert!(status.success(), "{status}: {said}");
        said
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What it says without nvshare, which is the same with it.
#[track_caller]
fn same_with_and_without(name: &str, arguments: &[&str]) -> String {
    let gpu = gpu();
    let alone = Running::start(Command::new(program(name)).args(arguments).envs(gpu.environment(&[])));
    let natively = alone.ends_well();
    let node = node(&gpu);
    assert_eq!(Running::under_nvshare(&node, name, arguments).ends_well(), natively);
    natively
}

/// What the calls say of which something went wrong. They say 0 each, and where the driver has gone 4, but for the one word
/// that is copied and the context.
fn wrong<'a>(said: &'a str, where_: &str, answer: &str) -> Vec<&'a str> {
    let mut lines = said.lines().filter(|line| line.starts_with(where_)).peekable();
    assert!(lines.peek().is_some(), "nothing of {where_} in {said}");
    let calls = |line: &'a str| line.split_once(": ").map_or(line, |(_, calls)| calls);
    let number = |word: &&str| word.chars().all(|letter| letter.is_ascii_digit());
    let is_wrong = |line: &&'a str| {
        let words = calls(line).split([' ', ',']).filter(|word| !word.is_empty());
        words.filter(number).any(|word| word != answer)
    };
    lines.filter(is_wrong).collect()
}

#[test]
fn a_thread_makes_every_call_in_the_destructors_of_its_thread_locals() {
    let said = same_with_and_without("last_calls", &["thread-local"]);
    assert_eq!(wrong(&said, "thread-local,", "0"), [""; 0]);
}

#[test]
fn a_thread_makes_every_call_in_the_destructors_of_its_keys_in_each_round() {
    let said = same_with_and_without("last_calls", &["key"]);
    for key in ["key from before cuInit", "key from after cuInit"] {
        assert_eq!(wrong(&said, key, "0"), [""; 0]);
        assert!(said.contains(&format!("{key}, round 3")), "{said}");
    }
}

#[test]
fn exit_handlers_make_every_call_until_the_driver_has_gone() {
    for how in ["return", "exit"] {
        let said = same_with_and_without("last_calls", &[how]);
        assert_eq!(wrong(&said, "thread-local of the first thread", "0"), [""; 0]);
        assert_eq!(wrong(&said, "exit handler from after cuInit", "0"), [""; 0]);
        assert_eq!(wrong(&said, "exit handler from before cuInit", "4"), [""; 0]);
        assert_eq!(wrong(&said, "destructor", "4"), [""; 0]);
    }
}

#[test]
fn a_process_that_skips_its_exit_handlers_ends_at_once() {
    for how in ["quick_exit", "_exit"] {
        assert_eq!(same_with_and_without("last_calls", &[how]), "");
    }
}

#[test]
fn other_threads_go_on_when_the_first_has_ended() {
    let said = same_with_and_without("last_calls", &["pthread_exit"]);
    for place in ["another thread", "exit handler from after cuInit"] {
        assert_eq!(wrong(&said, place, "0"), [""; 0]);
    }
}

/// An arbiter for clients that take short turns.
fn contended(gpu: &SimulatedGpu) -> Node {
    let options = ["--capacity", "64MiB", "--quantum", "20ms"];
    Node::start(gpu.environment(&[]), &options.map(str::to_owned)).unwrap()
}

/// A program that checks its memory again and again, and says so, is right while that moves out and in: another that does not
/// fit beside it takes turns with it. It ends well while the other goes on.
fn takes_turns(name: &str, arguments: &[&str]) {
    let gpu = quick_gpu();
    let node = contended(&gpu);
    let mut running = Running::under_nvshare(&node, name, arguments);
    running.says_lines(2);
    let mut competitor = Running::under_nvshare(&node, "compete", &["50", "1000000"]);
    for _ in 0..3 {
        competitor.says_lines(2);
        running.says_lines(2);
    }
    running.ends_well();
}

#[test]
fn memory_moves_while_a_thread_is_in_the_destructors_of_its_thread_locals() {
    takes_turns("last_calls", &["thread-local-loop"]);
}

#[test]
fn memory_moves_while_a_thread_is_in_the_last_destructors_of_its_keys() {
    takes_turns("last_calls", &["key-loop"]);
}

#[test]
fn memory_moves_while_a_library_that_is_being_opened_works_in_a_constructor() {
    let library = library("constructor");
    takes_turns("opens", &[library.to_str().unwrap()]);
}

#[test]
fn a_process_ends_while_other_threads_submit_work() {
    let gpu = quick_gpu();
    let node = contended(&gpu);
    let mut competitor = None;
    for how in ["return", "quick_exit", "_exit", "pthread_exit", "joined"] {
        let running = Running::under_nvshare(&node, "last_calls", &["launching", how]);
        let competitor =
            competitor.get_or_insert_with(|| Running::under_nvshare(&node, "compete", &["50", "1000000"]));
        // The first waits meanwhile, with threads at the gate.
        competitor.says_lines(5);
        let said = running.ends_well();
        let seen = said.matches("a thread has seen 4\n").count();
        assert_eq!(seen, if how == "joined" { 8 } else { 0 }, "{how}: {said}");
    }
}

/// Whether a thread of this name waits for a message (recvmsg).
fn waits_for_a_message(process: u32, name: &str) -> bool {
    let read = |task: &Path, what: &str| std::fs::read_to_string(task.join(what)).unwrap_or_default();
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap().map(|task| task.unwrap().path());
    let mut threads = tasks.filter(|task| read(task, "comm").trim_end() == name);
    threads.any(|task| read(&task, "syscall").split(' ').next() == Some(&nix::libc::SYS_recvmsg.to_string()))
}

#[test]
fn a_process_works_on_one_gpu_while_it_registers_for_another() {
    let settings = [("GPUS", "2"), ("MEMORY", "256MiB"), ("CONTEXT_BYTES", "2MiB")];
    let gpu = SimulatedGpu::new(&settings.map(|(name, value)| (name, value.to_owned()))).unwrap();
    let node = node(&gpu);
    let mut running = Running::under_nvshare(&node, "attaches", &[]);
    running.says_lines(1);
    let arbiter = Pid::from_raw(node.arbiter_pid() as i32);
    kill(arbiter, Signal::SIGSTOP).unwrap();
    running.reads_a_line();
    let process = running.child.id();
    TIMEOUT.until("it waits for the arbiter", || waits_for_a_message(process, "attaching"));
    running.reads_a_line();
    let round = running.output.recv_timeout(Duration::from_secs(5));
    kill(arbiter, Signal::SIGCONT).unwrap();
    assert_eq!(round.as_deref(), Ok("round"));
    assert_eq!(running.ends_well(), "attached\n");
}

#[test]
fn threads_streams_and_contexts_that_come_and_go_leave_nothing_behind() {
    let gpu = gpu();
    let node = node(&gpu);
    let said = Running::under_nvshare(&node, "come_and_go", &["5000", "20000", "300"]).ends_well();
    for line in said.lines() {
        let pages: i64 = line.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap();
        // Leaks that there were: 2,179 pages of threads, 2,500 of streams, 2,033 of contexts.
        assert!(pages < 250, "{said}");
    }
}
