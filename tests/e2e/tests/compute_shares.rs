//! Compute shares of real processes whose memory fits: weight, limit and priority, and a holder of the compute turn that is
//! stopped, killed, or whose work does not end.
//!
//! The programs are `nvshare internal compute`: they say when how many of their kernels were done. Verdicts are on counts of
//! kernels, turns and GPU time, which a slow machine does not change much: the simulated GPU does the kernels of all one after the
//! other.

use nvshare::map::MappedPage;
use nvshare::record;
use nvshare::slot::SlotIndex;
use nvshare::turns::Competition;
use nvshare_e2e::application::quick_gpu;
use nvshare_e2e::built;
use nvshare_test_support::{Patience, program};
use nvshare_tools::compute::Event;
use nvshare_tools::node::{Environment, Node, SimulatedGpu};
use nvshare_tools::status::{self, Client};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// After so long, a test has failed because something never happened.
const TIMEOUT: Patience = Patience::seconds(60);

/// The kernels of most tests, us.
const KERNEL_US: u64 = 2_000;

fn started(options: &[&str]) -> (SimulatedGpu, Node) {
    let gpu = quick_gpu();
    let options: Vec<_> =
        ["--capacity", "64MiB"].iter().chain(options).map(|word| word.to_string()).collect();
    let node = Node::start(gpu.environment(&[]), &options).unwrap();
    (gpu, node)
}

/// A process that computes. Killed when dropped.
struct Program {
    process: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

/// When how many of its kernels were done.
struct Done {
    kernels: u64,
    seconds: f64,
    samples: Vec<(f64, u64)>,
}

impl Done {
    /// Kernels that were done at a time, s.
    fn at(&self, time: f64) -> u64 {
        self.samples.iter().take_while(|(at, _)| *at <= time).last().map_or(0, |(_, kernels)| *kernels)
    }

    fn ended(&self) -> f64 {
        self.samples.last().expect("there is one at the end").0
    }
}

impl Program {
    fn new(command: &mut Command, environment: Environment, shares: &[(&str, &str)]) -> Self {
        let command = command.envs(environment).envs(shares.iter().copied());
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (process.stdin.take(), BufReader::new(process.stdout.take().unwrap()));
        Self { process, input, output }
    }

    /// One that is ready to compute in kernels of [`KERNEL_US`]. An iteration of the simulated GPU takes a nanosecond.
    fn ready(node: &Node, shares: &[(&str, &str)], options: &[&str]) -> Self {
        let (us, ns) = (KERNEL_US.to_string(), (KERNEL_US * 1_000).to_string());
        let mut command = Command::new(built("nvshare"));
        command.args(["internal", "compute", "--kernel-us", &us, "--iterations", &ns]).args(options);
        let mut ready = Self::new(&mut command, node.environment(), shares);
        assert!(matches!(ready.says(), Event::Ready { .. }));
        ready
    }

    fn says(&mut self) -> Event {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: '{line}'"))
    }

    fn go(&mut self) {
        writeln!(self.input.as_ref().unwrap(), "go").unwrap();
    }

    /// Waits for its end, which comes by itself if it has only so many kernels to do.
    fn done(&mut self) -> Done {
        let Event::Done { kernels, seconds, samples, .. } = self.says() else { panic!("it is ready twice") };
        assert!(self.process.wait().unwrap().success());
        Done { kernels, seconds, samples }
    }

    /// Tells it to end, and waits for that.
    fn end(mut self) -> Done {
        drop(self.input.take());
        self.done()
    }

    fn client(&self, node: &Node) -> Client {
        let clients = status::read(node.dir()).unwrap().gpus.remove(0).clients;
        clients.into_iter().find(|client| client.pid == self.process.id()).expect("it is a client")
    }

    fn slot(&self, node: &Node) -> SlotIndex {
        SlotIndex::new(self.client(node).slot).unwrap()
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(self.pid(), signal).unwrap();
    }

    fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.process.id() as i32)
    }

    /// Stops it: it does nothing any more.
    fn stop(&self) {
        use nix::sys::wait::{Id, WaitPidFlag, waitid};
        self.signal(nix::sys::signal::Signal::SIGSTOP);
        waitid(Id::Pid(self.pid()), WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
            .unwrap();
    }

    fn go_on(&self) {
        self.signal(nix::sys::signal::Signal::SIGCONT);
    }

    /// Stops it at a moment when it has the turn.
    fn stop_with_the_turn(&self, node: &Node) {
        let (page, slot) = (page(node), self.slot(node));
        TIMEOUT.until("it is stopped with the turn", || {
            self.stop();
            let has = page.turn().holder == Some(slot);
            if !has {
                self.go_on();
            }
            has
        });
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn page(node: &Node) -> MappedPage {
    let uuid = status::read(node.dir()).unwrap().gpus.remove(0).uuid;
    record::open_page(node.dir(), uuid.parse().unwrap()).unwrap()
}

fn set(node: &Node, program: &Program, arguments: &[&str]) {
    let whom = format!("pid:{}", program.process.id());
    let mut command = Command::new(built("nvshare"));
    command.args(["set", &whom]).args(arguments).envs(node.environment()).stdin(Stdio::null());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// 300:100, as nvshare counts it within a tenth, and in kernels that are done within a quarter: a slow machine wakes up threads late.
fn weights_hold(options: &[&str]) {
    let (_gpu, node) = started(&[]);
    let mut heavy =
        Program::ready(&node, &[("NVSHARE_WEIGHT", "300")], &[options, &["--kernels", "600"]].concat());
    let mut light = Program::ready(&node, &[], options);
    let each = if options.contains(&"--graph") { 5 } else { 1 };
    light.go();
    heavy.go();
    let mut had = [0; 2];
    TIMEOUT.until("both have computed for a second", || {
        had = [&heavy, &light].map(|program| program.client(&node).gpu_ns);
        had.iter().sum::<u64>() > 1_000_000_000
    });
    let ratio = had[0] as f64 / had[1] as f64;
    // One turn more or less of either.
    assert!((2.7..=3.3).contains(&ratio), "{had:?} ns of GPU time are {ratio}:1");
    let heavy = heavy.done();
    let light = light.end();
    let kernels = [heavy.kernels, light.at(heavy.ended())];
    let ratio = kernels[0] as f64 / kernels[1] as f64;
    assert!((2.25..=3.75).contains(&ratio), "{kernels:?} kernels of {each} a launch are {ratio}:1");
}

#[test]
fn busy_programs_share_by_weight() {
    weights_hold(&[]);
}

#[test]
fn so_do_graphs() {
    weights_hold(&["--graph", "5"]);
}

/// At most its part of the time, 20 ms, and what is in flight.
#[test]
fn a_limit_holds_for_kernels_and_graphs() {
    let (_gpu, node) = started(&[]);
    for options in [&[][..], &["--graph", "3"]] {
        let each = if options.is_empty() { 1 } else { 3 };
        let mut limited = Program::ready(&node, &[("NVSHARE_COMPUTE_LIMIT", "20%")], options);
        limited.go();
        TIMEOUT.until("it has computed", || limited.client(&node).gpu_ns > 150_000_000);
        let seen = limited.client(&node);
        let done = limited.end();
        let most = 0.2 * done.seconds + 0.020 + (KERNEL_US * (each + 1)) as f64 / 1e6;
        let had = (done.kernels * KERNEL_US) as f64 / 1e6;
        assert!(had <= most, "{had} s of {} s, with {options:?}", done.seconds);
        assert!(seen.takes_turns && seen.held_ns > 0, "what it cost to wait is told: {seen:#?}");
    }
}

/// While the one with high priority has work, of the other not more than what was in flight is done.
#[test]
fn priority_is_strict() {
    let (_gpu, node) = started(&[]);
    let mut low = Program::ready(&node, &[("NVSHARE_PRIORITY", "low")], &[]);
    let mut high = Program::ready(&node, &[("NVSHARE_PRIORITY", "high")], &["--kernels", "200"]);
    // With it the shares differ to the end: GPU time is counted only while they do.
    let _other = Program::ready(&node, &[("NVSHARE_PRIORITY", "high")], &[]);
    low.go();
    TIMEOUT.until("it computes", || low.client(&node).gpu_ns > 50_000_000);
    high.go();
    let high = high.done();
    let had = low.client(&node).gpu_ns;
    TIMEOUT.until("it goes on", || low.client(&node).gpu_ns > had + 20_000_000);
    let low = low.end();
    let first = high.samples[1].0;
    let beside = low.at(high.ended()) - low.at(first);
    // A thread that gets no processor for 10 ms has no work.
    assert!(beside <= 20, "{beside} kernels of low priority were done beside 200 of high priority");
}

/// A holder that is stopped holds the others up for a second, once, and goes on later.
#[test]
fn a_holder_that_is_stopped_holds_nobody_up() {
    let (_gpu, node) = started(&[]);
    let mut stopped = Program::ready(&node, &[("NVSHARE_WEIGHT", "300")], &[]);
    let mut other = Program::ready(&node, &[], &["--kernels", "200"]);
    // With it the shares differ to the end: GPU time is counted only while they do.
    let _idle = Program::ready(&node, &[], &[]);
    stopped.go();
    TIMEOUT.until("it has turns", || stopped.client(&node).turns > 0);
    stopped.stop_with_the_turn(&node);
    other.go();
    assert_eq!(other.done().kernels, 200);
    let seen = stopped.client(&node);
    assert!(seen.overdue && seen.overruns == 1, "{seen:#?}");
    stopped.go_on();
    let had = seen.gpu_ns;
    TIMEOUT.until("it goes on, and takes turns again", || {
        let seen = stopped.client(&node);
        !seen.overdue && seen.gpu_ns > had + 20_000_000
    });
    stopped.end();
}

/// A holder that is killed leaves the turn to whoever waits for it.
#[test]
fn a_holder_that_is_killed_leaves_the_turn_to_the_next() {
    let (_gpu, node) = started(&[]);
    let page = page(&node);
    for _ in 0..3 {
        let mut killed = Program::ready(&node, &[("NVSHARE_WEIGHT", "300")], &[]);
        let mut other = Program::ready(&node, &[("NVSHARE_COMPUTE_LIMIT", "90%")], &["--kernels", "100"]);
        let slot = other.slot(&node);
        killed.go();
        other.go();
        TIMEOUT.until("both have turns", || {
            [&killed, &other].iter().all(|program| program.client(&node).turns > 0)
        });
        killed.stop_with_the_turn(&node);
        killed.process.kill().unwrap();
        killed.process.wait().unwrap();
        TIMEOUT.until("the turn goes on", || page.turn().holder == Some(slot));
        assert_eq!(other.done().kernels, 100);
        TIMEOUT.until("all are gone", || page.occupied().is_empty());
        assert_eq!(page.turn().holder, None);
    }
}

/// Others go on beside a kernel that does not end, and its process submits more.
#[test]
fn an_endless_kernel_holds_nobody_up() {
    let (_gpu, node) = started(&[]);
    let kernels = concat!(env!("CARGO_MANIFEST_DIR"), "/../simcuda/kernels.ptx");
    let mut command = Command::new(program("endless"));
    let mut endless = Program::new(command.arg(kernels), node.environment(), &[("NVSHARE_WEIGHT", "300")]);
    let mut line = String::new();
    endless.output.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    let mut other = Program::ready(&node, &[], &["--kernels", "200"]);
    other.go();
    assert_eq!(other.done().kernels, 200);
    let seen = endless.client(&node);
    assert!(seen.overdue && seen.overruns > 0, "{seen:#?}");
    for _ in 0..10 {
        line.clear();
        endless.output.read_line(&mut line).unwrap();
        assert_eq!(line, "launched\n");
    }
    drop(endless.input.take());
    // What it has said meanwhile.
    while endless.output.read_line(&mut line).unwrap() > 0 {}
    assert!(endless.process.wait().unwrap().success(), "its data is right");
}

/// Nobody takes turns before they differ, nor after.
#[test]
fn shares_change_at_run_time() {
    let (_gpu, node) = started(&[]);
    let mut one = Program::ready(&node, &[], &[]);
    let mut two = Program::ready(&node, &[], &[]);
    let turns = |one: &Program, two: &Program| [one, two].map(|program| program.client(&node).turns);
    one.go();
    two.go();
    let page = page(&node);
    assert_eq!(turns(&one, &two), [0, 0], "all are equal");
    for (arguments, back) in [
        (["--weight", "300"], ["--weight", "100"]),
        (["--priority", "high"], ["--priority", "normal"]),
        (["--compute-limit", "50%"], ["--compute-limit", "none"]),
    ] {
        let before = turns(&one, &two);
        set(&node, &one, &arguments);
        TIMEOUT.until(&format!("it takes turns with {arguments:?}"), || turns(&one, &two)[0] > before[0] + 1);
        set(&node, &one, &back);
        // Whoever had claimed the turn before has one more.
        TIMEOUT.until("nobody takes turns any more", || {
            let now = Competition::take(&page);
            now.turn.holder.is_none() && now.occupied.iter().all(|slot| now.client(slot).claim.is_none())
        });
        let settled = turns(&one, &two);
        // Kernels are done without a turn: both say how many in the end, so a third program counts the time.
        let mut clock = Program::ready(&node, &[], &["--kernels", "20"]);
        clock.go();
        clock.done();
        assert_eq!(turns(&one, &two), settled, "after {back:?}");
    }
    for program in [one, two] {
        let done = program.end();
        assert!(done.kernels > 0);
    }
}

/// Memory moves, and whoever has its memory in place takes turns.
#[test]
fn shares_hold_where_memory_does_not_fit() {
    let (_gpu, node) = started(&["--quantum", "20ms"]);
    let sized = ["--size", "40MiB"];
    let one = Program::ready(&node, &[("NVSHARE_WEIGHT", "300")], &sized);
    let two = Program::ready(&node, &[("NVSHARE_COMPUTE_LIMIT", "60%")], &sized);
    let three =
        Program::ready(&node, &[("NVSHARE_PRIORITY", "high")], &["--burst", "1", "--period-ms", "10"]);
    let mut programs = [one, two, three];
    programs.iter_mut().for_each(Program::go);
    TIMEOUT.until("all have had compute turns, and those that do not fit several slices", || {
        let clients = programs.each_ref().map(|program| program.client(&node));
        let slices = clients[..2].iter().all(|client| client.slices > 2);
        slices && clients.iter().all(|client| client.turns > 2)
    });
    for program in programs {
        assert!(program.end().kernels > 0);
    }
}

/// Who sets nothing takes no turn.
#[test]
fn who_is_like_everybody_takes_no_turns() {
    let (_gpu, node) = started(&[]);
    let mut programs: Vec<_> = (0..3).map(|_| Program::ready(&node, &[], &[])).collect();
    programs.iter_mut().for_each(Program::go);
    TIMEOUT.until("all compute", || programs.iter().all(|program| program.client(&node).phase == "running"));
    let mut clock = Program::ready(&node, &[], &["--kernels", "50"]);
    clock.go();
    assert_eq!(clock.done().kernels, 50);
    for program in &programs {
        let client = program.client(&node);
        assert_eq!((client.turns, client.gpu_ns, client.gpu_share, client.takes_turns), (0, 0, None, false));
    }
    programs.into_iter().for_each(|program| assert!(program.end().kernels > 0));
}
