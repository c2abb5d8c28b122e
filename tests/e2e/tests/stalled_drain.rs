//! Work on the GPU that waits for a thread which is about to submit more. A drain that holds that thread would wait for
//! ever, and everybody behind it: so it lets the thread go on, and tries again.

use nvshare_e2e::application::gpu;
use nvshare_test_support::{Patience, program};
use nvshare_tools::node::{Environment, Node, SimulatedGpu};
use nvshare_tools::status::{self, Client};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const TIMEOUT: Patience = Patience::seconds(60);

/// A program that runs until its standard input ends. Killed when dropped.
struct Program(Child, Arc<AtomicUsize>);

impl Program {
    /// Returns when it says that it is ready.
    fn ready(command: &mut Command, environment: Environment) -> Self {
        let process = command.envs(environment).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut started = Self(process.unwrap(), Arc::default());
        let count = started.1.clone();
        let output = started.0.stdout.take().unwrap();
        let said = std::thread::spawn(move || {
            let mut lines = BufReader::new(output).lines();
            let first = lines.next().and_then(Result::ok);
            // What it says later is counted.
            std::thread::spawn(move || lines.for_each(|_| _ = count.fetch_add(1, Ordering::Relaxed)));
            first
        });
        TIMEOUT.until("it is ready", || said.is_finished());
        assert_eq!(said.join().unwrap().as_deref(), Some("ready"), "{:?}", started.0.wait());
        started
    }

    /// So many lines has it said since it was ready.
    fn lines(&self) -> usize {
        self.1.load(Ordering::Relaxed)
    }

    fn has_ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }

    /// It ends when it may, with the right data.
    fn ends_well(mut self) {
        drop(self.0.stdin.take());
        TIMEOUT.until("it has ended", || self.has_ended());
        assert!(self.0.wait().unwrap().success(), "wrong data, or a call that failed");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The simulated GPU's kernels, as a module to load.
fn kernels() -> &'static str {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../simcuda/kernels.ptx")
}

/// What the program's process has on each of its GPUs.
fn clients(node: &Node, program: &Program) -> Vec<Client> {
    let gpus = status::read(node.dir()).unwrap().gpus;
    let clients = gpus.into_iter().flat_map(|gpu| gpu.clients);
    clients.filter(|client| client.pid == program.0.id()).collect()
}

/// Why the program cannot give way.
fn stall(node: &Node, program: &Program) -> Option<String> {
    clients(node, program).into_iter().find_map(|client| client.stall)
}

/// A client with so much memory on a GPU, whose data is right after each of its turns.
fn client_of(node: &Node, mib: &str, gpu: &str) -> Program {
    let mut command = Command::new(program("compete"));
    let process = command.args([mib, "3", "0", gpu]).envs(node.environment()).stdout(Stdio::null()).spawn();
    Program(process.unwrap(), Arc::default())
}

/// One that does not fit beside the program.
fn competitor(node: &Node) -> Program {
    client_of(node, "48", "0")
}

fn quick_node(gpu: &SimulatedGpu) -> Node {
    node_with_quantum(gpu, "10ms")
}

fn node_with_quantum(gpu: &SimulatedGpu, quantum: &str) -> Node {
    let arguments = ["--capacity", "64MiB", "--quantum", quantum].map(str::to_owned);
    Node::start(gpu.environment(&[]), &arguments).unwrap()
}

#[track_caller]
fn both_go_on(case: &str, gpu: &SimulatedGpu) {
    both_go_on_at(case, &quick_node(gpu));
}

/// Both go on, and a drain came in the middle of it.
#[track_caller]
fn both_go_on_at(case: &str, node: &Node) {
    let mut command = Command::new(program("entangled"));
    let entangled = Program::ready(command.args([case, kernels()]), node.environment());
    let mut competitor = competitor(node);
    let (mut retries, mut stalls) = (0, 0);
    TIMEOUT.until(&format!("{case}: the competitor has had its turns"), || {
        let clients = clients(node, &entangled);
        retries = clients.iter().map(|client| client.drain_retries).sum::<u64>().max(retries);
        stalls = clients.iter().map(|client| client.stalls).sum::<u64>().max(stalls);
        if competitor.has_ended() && retries == 0 {
            // Its turns came at moments when nothing waited for a thread.
            assert!(competitor.0.wait().unwrap().success());
            competitor = self::competitor(node);
        }
        competitor.has_ended()
    });
    assert!(competitor.0.wait().unwrap().success(), "{case}: the competitor");
    entangled.ends_well();
    assert!(stalls > 0, "{case}: nobody was told");
    println!("{case}: {retries} drains were put off");
}

macro_rules! both_go_on {
    ($($name:ident: $case:literal;)*) => {
        $(
            #[test]
            fn $name() {
                both_go_on($case, &gpu());
            }
        )*
    };
}

both_go_on! {
    a_host_function_that_takes_a_lock_whose_holder_launches: "callback";
    a_host_function_that_takes_a_lock_whose_holder_allocates: "allocation";
    a_resident_kernel_that_a_copy_feeds: "copy";
    a_resident_kernel_that_a_copy_feeds_in_a_blocking_stream: "copy-blocking";
    a_resident_kernel_in_the_default_stream: "copy-beside-default";
    a_resident_kernel_that_mapped_host_memory_feeds: "mapped";
    a_stream_that_waits_for_a_value_of_32_bits: "value32";
    a_stream_that_waits_for_a_value_of_64_bits: "value64";
    a_thread_that_waits_for_an_event_with_a_lock_held: "event";
    a_thread_in_the_middle_of_a_call_that_waits: "synchronous";
    a_thread_that_frees_memory: "free";
}

fn gpu_with(settings: &[(&'static str, &str)]) -> SimulatedGpu {
    let settings: Vec<_> = settings.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    SimulatedGpu::new(&settings).expect("the workspace is built: cargo build --workspace")
}

fn two_gpus() -> SimulatedGpu {
    gpu_with(&[("GPUS", "2"), ("MEMORY", "256MiB"), ("CONTEXT_BYTES", "2MiB"), ("LOADS_WAIT", "1")])
}

/// While its slice lasts, a client finds out how much of its memory is in use, with a kernel of nvshare's. To load that, the driver
/// waits for all work, and keeps out the call that lets the work end. The kernel's code is at hand, or the driver must compile it.
#[test]
fn work_that_waits_beside_the_kernel_that_scans_memory() {
    for refuses_code in ["0", "1"] {
        let gpu = gpu_with(&[
            ("MEMORY", "256MiB"),
            ("CONTEXT_BYTES", "2MiB"),
            ("LOADS_WAIT", "1"),
            ("REFUSES_CODE", refuses_code),
        ]);
        for case in ["copy", "value64", "callback"] {
            both_go_on_at(case, &node_with_quantum(&gpu, "300ms"));
        }
    }
}

/// One process launches its part on one GPU, and not yet on the other.
#[test]
fn a_collective_over_two_gpus_of_one_process() {
    both_go_on("collective", &two_gpus());
}

/// A GPU that the process uses no more waits for its work there, which waits for a launch on another.
#[test]
fn a_last_context_that_is_destroyed_while_its_work_waits() {
    let gpu = two_gpus();
    let node = quick_node(&gpu);
    let mut command = Command::new(program("entangled"));
    let entangled = Program::ready(command.args(["destruction", kernels()]), node.environment());
    let mut competitor = competitor(&node);
    TIMEOUT.until("the competitor has had its turns", || competitor.has_ended());
    assert!(competitor.0.wait().unwrap().success());
    entangled.ends_well();
}

/// Work that no submission can end is told, and shuts its own process out for no longer than a try takes. When it ends, others
/// get their turn.
#[test]
fn a_kernel_that_never_ends_is_told_and_its_process_goes_on() {
    let gpu = gpu();
    let node = quick_node(&gpu);
    let mut command = Command::new(program("endless"));
    let mut endless = Program::ready(command.arg(kernels()), node.environment());
    let mut competitor = competitor(&node);
    TIMEOUT.until("it is told", || stall(&node, &endless).as_deref() == Some("endless-work"));
    // Each launch is one that went through the gate while the kernel ran.
    let launches = endless.lines();
    TIMEOUT.until("it goes on", || endless.lines() > launches + 10);
    assert_eq!(stall(&node, &endless).as_deref(), Some("endless-work"), "and the kernel still runs");
    assert!(!competitor.has_ended());
    drop(endless.0.stdin.take());
    TIMEOUT.until("the competitor has had its turns", || competitor.has_ended());
    assert!(competitor.0.wait().unwrap().success());
    endless.ends_well();
}

/// Nobody is at the gate: only the kernel runs, and that is told as well.
#[test]
fn a_kernel_that_never_ends_is_told_when_no_thread_submits() {
    let gpu = gpu();
    let node = quick_node(&gpu);
    let mut command = Command::new(program("endless"));
    let endless = Program::ready(command.args([kernels(), "quiet"]), node.environment());
    let mut competitor = competitor(&node);
    TIMEOUT.until("it is told", || stall(&node, &endless).as_deref() == Some("endless-work"));
    endless.ends_well();
    TIMEOUT.until("the competitor has had its turns", || competitor.has_ended());
    assert!(competitor.0.wait().unwrap().success());
}

/// Both of its GPUs are wanted: each is drained by itself, and both wait for the work on both.
#[test]
fn a_collective_over_two_gpus_that_are_both_wanted() {
    let gpu = two_gpus();
    let node = quick_node(&gpu);
    let mut command = Command::new(program("entangled"));
    let entangled = Program::ready(command.args(["collective", kernels()]), node.environment());
    let mut competitors = ["0", "1"].map(|gpu| client_of(&node, "48", gpu));
    TIMEOUT.until("both competitors have had their turns", || {
        competitors.iter_mut().all(|competitor| competitor.has_ended())
    });
    for mut competitor in competitors {
        assert!(competitor.0.wait().unwrap().success());
    }
    entangled.ends_well();
}

/// Whoever fits beside it does not wait for it with those who don't.
#[test]
fn who_fits_beside_a_kernel_that_never_ends_goes_on() {
    let gpu = gpu();
    let node = quick_node(&gpu);
    let mut command = Command::new(program("endless"));
    let endless = Program::ready(command.args([kernels(), "quiet"]), node.environment());
    let mut too_large = competitor(&node);
    TIMEOUT.until("it is told", || stall(&node, &endless).is_some());
    let mut small = client_of(&node, "16", "0");
    TIMEOUT.until("the small one has had its turns", || small.has_ended());
    assert!(small.0.wait().unwrap().success());
    assert!(!too_large.has_ended() && stall(&node, &endless).is_some());
    endless.ends_well();
    TIMEOUT.until("the large one has had its turns", || too_large.has_ended());
    assert!(too_large.0.wait().unwrap().success());
}

/// A context can be destroyed while its process waits for memory that another one does not give back.
#[test]
fn who_waits_for_a_kernel_that_never_ends_can_end_its_context() {
    let gpu = gpu();
    let node = quick_node(&gpu);
    let mut command = Command::new(program("endless"));
    let endless = Program::ready(command.args([kernels(), "quiet"]), node.environment());
    let mut command = Command::new(program("waits"));
    let piped = command.envs(node.environment()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut waits = Program(piped.spawn().unwrap(), Arc::default());
    TIMEOUT.until("it is let in, and finds no room", || {
        clients(&node, &waits).iter().any(|client| client.phase == "filling")
    });
    // The end of its input is what it waits for, too.
    drop(waits.0.stdin.take());
    TIMEOUT.until("it has ended", || waits.has_ended());
    assert!(waits.0.wait().unwrap().success());
    endless.ends_well();
}

/// A capture holds a drain off, and is told when it does so for long.
#[test]
fn a_capture_that_nobody_ends_is_told() {
    let gpu = gpu();
    let node = quick_node(&gpu);
    let mut command = Command::new(program("endless"));
    let captures = Program::ready(command.args([kernels(), "capture"]), node.environment());
    let mut competitor = competitor(&node);
    TIMEOUT.until("it is told", || stall(&node, &captures).as_deref() == Some("open-capture"));
    assert!(!competitor.has_ended());
    captures.ends_well();
    TIMEOUT.until("the competitor has had its turns", || competitor.has_ended());
    assert!(competitor.0.wait().unwrap().success());
}
