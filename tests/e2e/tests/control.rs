//! Steering real processes while they run: `nvshare ctl` pauses and resumes clients, and changes quantum, anti-thrash and the pool;
//! `nvsharectl` does as users of the C nvshare know it. The data is right afterwards.
//!
//! Verdicts are on counts: of iterations of jobs that check what they compute, and of their slices.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nvshare_e2e::application::{Application, MIB, quick_gpu};
use nvshare_e2e::built;
use nvshare_test_support::Patience;
use nvshare_tools::crew::{Crew, Message};
use nvshare_tools::ctl;
use nvshare_tools::job::{Event, Job};
use nvshare_tools::node::{Node, SimulatedGpu, start_arbiter};
use nvshare_tools::status::{self, Client, Gpu};
use std::process::{Command, Output, Stdio};
use std::time::Instant;

/// After so long, a test has failed because something never happened.
const TIMEOUT: Patience = Patience::seconds(60);

fn arguments(capacity: &str) -> [String; 4] {
    ["--capacity", capacity, "--quantum", "10ms"].map(str::to_owned)
}

fn node(gpu: &SimulatedGpu, capacity: &str) -> Node {
    Node::start(gpu.environment(&[]), &arguments(capacity)).unwrap()
}

fn run(node: &Node, program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(built(program));
    command.args(arguments).envs(node.environment()).env("COLUMNS", "160").stdin(Stdio::null());
    command.output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// `nvshare ctl`, which must come off.
#[track_caller]
fn ctl(node: &Node, arguments: &[&str]) -> String {
    let output = run(node, "nvshare", &[&["ctl"], arguments].concat());
    assert!(output.status.success(), "{arguments:?}: {}", said(&output));
    said(&output)
}

/// `nvshare ctl`, which must be refused.
#[track_caller]
fn refused(node: &Node, arguments: &[&str], words: &str) {
    let output = run(node, "nvshare", &[&["ctl"], arguments].concat());
    assert!(
        output.status.code() == Some(2) && said(&output).contains(words),
        "{arguments:?}: {}",
        said(&output)
    );
}

fn the_gpu(node: &Node) -> Gpu {
    status::read(node.dir()).unwrap().gpus.remove(0)
}

fn client(node: &Node, pid: u32) -> Client {
    let clients = status::read(node.dir()).unwrap().gpus.into_iter().flat_map(|gpu| gpu.clients);
    clients.into_iter().find(|client| client.pid == pid).expect("it is a client")
}

/// Jobs that go on until they are told to end.
struct Jobs {
    crew: Crew,
    /// Iterations of each that are done.
    done: Vec<u64>,
    /// Those that have ended, with right data.
    right: Vec<usize>,
}

impl Jobs {
    fn start(node: &Node, count: u64, size: u64) -> Self {
        let job = |seed| Job {
            size,
            buffers: 2,
            devices: vec![0],
            iterations: u64::MAX,
            seed,
            managed: false,
            read_only: false,
            seconds: None,
            controlled: true,
        };
        let jobs: Vec<_> = (1..=count).map(job).collect();
        let crew = Crew::start(&jobs, &node.environment()).unwrap();
        let mut jobs = Self { crew, done: vec![0; count as usize], right: Vec::new() };
        let mut ready = 0;
        while ready < count {
            ready += u64::from(matches!(jobs.next(), Some(Event::Ready { .. })));
        }
        jobs.crew.go();
        jobs
    }

    /// Waits until somebody says something.
    fn next(&mut self) -> Option<Event> {
        let said = self.crew.next(Instant::now() + TIMEOUT.duration()).expect("somebody gets on");
        self.note(said)
    }

    /// Takes in what they have said before now.
    fn catch_up(&mut self) {
        while let Some(said) = self.crew.next(Instant::now()) {
            self.note(said);
        }
    }

    fn note(&mut self, (index, message): (usize, Message)) -> Option<Event> {
        let event = match message {
            Message::Event(event) => event,
            Message::Ended(_) if self.right.contains(&index) => return None,
            Message::Ended(said) => panic!("job {index} ended: {said}"),
        };
        match &event {
            Event::Progress { done } => self.done[index] = *done,
            Event::Done(outcome) => {
                assert!(outcome.right, "wrong data: {outcome:?}");
                self.right.push(index);
            }
            Event::Ready { .. } => {}
        }
        Some(event)
    }

    /// Waits until these have done so many iterations more.
    fn get_on(&mut self, who: &[usize], by: u64) {
        let before = self.done.clone();
        while !who.iter().all(|index| self.done[*index] >= before[*index] + by) {
            self.next();
        }
    }

    fn pid(&self, index: usize) -> String {
        self.crew.pid(index).to_string()
    }

    /// Tells them to end, and checks their data.
    fn end(mut self) {
        self.crew.stop();
        while self.right.len() < self.done.len() {
            self.next();
        }
    }
}

/// Everybody is gone, and so is every granule that they had.
fn balances(node: &Node) {
    TIMEOUT.until("all clients are reaped", || the_gpu(node).clients.is_empty());
    let gpu = the_gpu(node);
    assert_eq!((gpu.free_bytes, gpu.repaired), (gpu.capacity_bytes as i64, 0), "a granule was lost");
}

#[test]
fn a_paused_client_stands_still_whatever_becomes_of_the_arbiter_and_goes_on_when_it_is_resumed() {
    let gpu = quick_gpu();
    let node = node(&gpu, "64MiB");
    let mut jobs = Jobs::start(&node, 3, 40 * MIB);
    jobs.get_on(&[0, 1, 2], 2);
    let (pid, number) = (jobs.pid(0), jobs.crew.pid(0));
    assert!(ctl(&node, &["pause", &pid]).contains("paused until it is resumed"));
    TIMEOUT.until("it has given way", || {
        let client = client(&node, number);
        client.paused && !client.admitted && client.phase == "idle"
    });
    // What it has said before is in the pipe until then.
    jobs.catch_up();
    jobs.get_on(&[1, 2], 3);
    let (before, slices) = (jobs.done[0], client(&node, number).slices);
    jobs.get_on(&[1, 2], 4);
    assert!(said(&run(&node, "nvshare", &["status"])).contains("paused; `nvshare ctl resume"));
    kill(Pid::from_raw(node.arbiter_pid() as i32), Signal::SIGKILL).unwrap();
    // The one that was killed may be ending yet.
    TIMEOUT.until("another arbiter serves", || {
        let started = start_arbiter(node.dir(), &arguments("64MiB"), &gpu.environment(&[]));
        started.is_ok_and(|started| started.is_some())
    });
    jobs.get_on(&[1, 2], 4);
    assert_eq!((jobs.done[0], client(&node, number).slices), (before, slices), "it has got on");
    assert!(client(&node, number).paused);
    assert!(ctl(&node, &["resume", &pid]).contains("resumed"));
    jobs.get_on(&[0, 1, 2], 3);
    assert!(!client(&node, number).paused);
    jobs.end();
    balances(&node);
}

#[test]
fn a_client_is_paused_while_everybody_fits_too_and_for_a_time_only() {
    let gpu = quick_gpu();
    let node = node(&gpu, "128MiB");
    let mut jobs = Jobs::start(&node, 2, 40 * MIB);
    jobs.get_on(&[0, 1], 2);
    let number = jobs.crew.pid(0);
    ctl(&node, &["pause", &jobs.pid(0), "--for", "1h"]);
    TIMEOUT.until("it has given way", || client(&node, number).phase == "idle");
    jobs.catch_up();
    jobs.get_on(&[1], 3);
    let before = jobs.done[0];
    jobs.get_on(&[1], 10);
    assert_eq!(jobs.done[0], before, "it has got on");
    assert_eq!(client(&node, number).bytes_out, 0, "nobody needs its memory");
    // An earlier end takes the place of the later one, and nobody need end it.
    ctl(&node, &["pause", &jobs.pid(0), "--for", "100ms"]);
    jobs.get_on(&[0], 3);
    assert!(!client(&node, number).paused);
    jobs.end();
    balances(&node);
}

/// Slices that have begun, of all.
fn slices(node: &Node) -> u64 {
    the_gpu(node).clients.iter().map(|client| client.slices).sum()
}

#[test]
fn the_quantum_and_anti_thrash_change_how_often_clients_switch() {
    let gpu = quick_gpu();
    // A machine with much to do must not make a holder look idle.
    let arguments = [&arguments("64MiB")[..], &["--idle-grace", "1h"].map(str::to_owned)].concat();
    let node = Node::start(gpu.environment(&[]), &arguments).unwrap();
    let mut jobs = Jobs::start(&node, 2, 40 * MIB);
    // An iteration takes 5 ms of GPU time at least, so six of each are several slices of 10 ms.
    let take_turns = |jobs: &mut Jobs| {
        jobs.catch_up();
        let before = slices(&node);
        jobs.get_on(&[0, 1], 6);
        slices(&node) - before
    };
    assert!(take_turns(&mut jobs) > 1);
    for change in [
        &(|node: &Node| drop(ctl(node, &["set", "quantum=1h", "deadline=1h"]))) as &dyn Fn(&Node),
        &|node| assert!(said(&run(node, "nvsharectl", &["-T", "3600"])).contains("3600 s")),
        &|node| assert!(said(&run(node, "nvsharectl", &["-S", "off"])).contains("until it has no work")),
    ] {
        change(&node);
        // A switch may be under way.
        let all_do = |jobs: &mut Jobs, iterations: u64| {
            jobs.catch_up();
            let before = jobs.done.iter().sum::<u64>();
            while jobs.done.iter().sum::<u64>() < before + iterations {
                jobs.next();
            }
        };
        all_do(&mut jobs, 20);
        let before = slices(&node);
        all_do(&mut jobs, 40);
        assert_eq!(slices(&node), before, "nobody's slice is over");
        ctl(&node, &["reset"]);
        assert!(take_turns(&mut jobs) > 1);
    }
    jobs.end();
    balances(&node);
}

#[test]
fn a_pool_that_shrinks_under_clients_moves_their_memory_and_they_go_on() {
    let gpu = quick_gpu();
    let node = node(&gpu, "128MiB");
    let mut jobs = Jobs::start(&node, 2, 40 * MIB);
    jobs.get_on(&[0, 1], 5);
    assert!(the_gpu(&node).clients.iter().all(|client| client.bytes_out == 0), "they fit");
    assert!(ctl(&node, &["set", "capacity=64MiB"]).contains("the pool has 64.00 MiB"));
    jobs.get_on(&[0, 1], 5);
    let shrunk = the_gpu(&node);
    assert_eq!(shrunk.capacity_bytes, 64 * MIB);
    TIMEOUT.until("the debt is paid", || the_gpu(&node).free_bytes >= 0);
    // Bytes are counted after the granules that they were on.
    TIMEOUT.until("memory has moved", || the_gpu(&node).clients.iter().any(|client| client.bytes_out > 0));
    // Smaller than either of them: one at a time, and what does not fit lies in host memory.
    ctl(&node, &["set", "capacity=32MiB"]);
    jobs.get_on(&[0, 1], 3);
    ctl(&node, &["set", "capacity=128MiB"]);
    jobs.get_on(&[0, 1], 5);
    TIMEOUT.until("both are in", || {
        the_gpu(&node).clients.iter().all(|client| client.admitted && client.resident_bytes >= 40 * MIB)
    });
    jobs.end();
    balances(&node);
}

#[test]
fn settings_are_shown_with_who_has_set_them_and_mistakes_are_named() {
    let gpu = quick_gpu();
    let node = node(&gpu, "64MiB");
    let user = nix::unistd::geteuid();
    ctl(&node, &["set", "idle-grace=7ms"]);
    let report = ctl::read(&ctl(&node, &["get", "--json"])).unwrap();
    let find = |name: &str| {
        let setting = report.gpus[0].settings.iter().find(|setting| setting.name == name).unwrap();
        (setting.value.as_deref().unwrap_or(""), setting.origin.as_str())
    };
    assert_eq!(find("idle-grace"), ("7ms", &*format!("nvshare ctl (user {user})")));
    assert_eq!(find("quantum"), ("10ms", "--quantum"));
    assert_eq!(find("deadline"), ("60s", "default"));
    assert_eq!(report.gpus[0].pool_bytes, 64 * MIB);
    let shown = ctl(&node, &["show", "quantum", "nvml-library"]);
    assert!(
        shown.contains("at a restart") && shown.contains("10ms") && !shown.contains("deadline"),
        "{shown}"
    );
    refused(&node, &["set", "quantum=soon"], "'soon'");
    refused(&node, &["set", "quantun=1s"], "is 'quantum' meant?");
    refused(&node, &["set", "nvml-library=/x"], "systemctl restart");
    refused(&node, &["set", "quantum"], "NAME");
    refused(&node, &["get", "nonsense"], "is no setting");
    refused(&node, &["set", "quantum=1s", "--gpu", "GPU-00000000-0000-0000-0000-0000000000ee"], "no GPU");
    refused(&node, &["pause", "nobody"], "'nobody' is no client");
    assert!(run(&node, "nvshare", &["ctl", "get", "--runtime-dir", "/nonexistent"]).status.code() == Some(2));
}

/// Two processes on two GPUs that wait for each other, and one that doesn't.
#[test]
fn who_is_paused_is_paused_on_all_gpus_and_with_its_gang_and_nobody_waits_for_it() {
    let settings =
        [("GPUS", "2"), ("MEMORY", "256MiB"), ("CONTEXT_BYTES", "2MiB"), ("LINK_BANDWIDTH", "256GiB")];
    let gpu = SimulatedGpu::new(&settings.map(|(name, value)| (name, value.to_owned()))).unwrap();
    let node = node(&gpu, "64MiB");
    let started = |is_gang: bool| {
        let gang = [("NVSHARE_GANG", "pair:2")];
        let mut application = Application::start(node.environment(), if is_gang { &gang } else { &[] });
        application.does("init");
        application.does("create 1");
        application.does("create 0");
        let address = application.alloc(40 * MIB);
        (application, address)
    };
    let mut pair = [started(true), started(true)];
    let (mut other, others_address) = started(false);
    let clients = || -> Vec<Client> {
        status::read(node.dir()).unwrap().gpus.into_iter().flat_map(|gpu| gpu.clients).collect()
    };
    TIMEOUT.until("they are a gang", || clients().iter().filter(|client| client.gang.is_some()).count() == 4);
    let own = other.pid().as_raw() as u32;
    let first = clients().into_iter().find(|client| client.pid != own).unwrap();
    let uuid = status::read(node.dir()).unwrap().gpus[1].uuid.clone();
    let answer = ctl(&node, &["pause", &format!("pid:{}", first.pid), "--gpu", &uuid]);
    assert!(answer.contains("with 3 other clients"), "{answer}");
    assert!(clients().iter().all(|client| client.paused == (client.pid != own)));
    pair.iter_mut().for_each(|(application, address)| {
        application.tell(&format!("write {address} {} 7", 40 * MIB));
    });
    for seed in 0..20 {
        other.writes(others_address, 40 * MIB, seed);
        other.sees(others_address, 40 * MIB, seed);
    }
    let moved = |client: &Client| client.pid == own || !client.admitted && client.phase == "idle";
    TIMEOUT.until("none of them has a GPU", || clients().iter().all(moved));
    ctl(&node, &["resume", &format!("pid:{}", first.pid), "--gpu", &uuid]);
    assert!(clients().iter().all(|client| !client.paused));
    for (application, address) in &mut pair {
        assert_eq!(application.answer("write").0, 0);
        application.sees(*address, 40 * MIB, 7);
    }
    other.sees(others_address, 40 * MIB, 19);
}
