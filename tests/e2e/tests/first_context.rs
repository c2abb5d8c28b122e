//! Processes that make their first context on a GPU that others have filled, to the last byte of the card: it is made,
//! whoever holds the memory, and everybody goes on with right data.

use nvshare_e2e::application::running::Running;
use nvshare_e2e::application::{Application, MIB, SUCCESS};
use nvshare_test_support::Patience;
use nvshare_tools::crew::{Crew, Message};
use nvshare_tools::job::{Event, Job};
use nvshare_tools::node::{Node, SimulatedGpu};
use nvshare_tools::status::{self, Gpu};
use std::time::Instant;

const TIMEOUT: Patience = Patience::seconds(120);

const OUT_OF_MEMORY: i32 = 2;

const CARD: u64 = 256 * MIB;

/// A machine with so many GPUs, of which nothing is kept out of the pools.
fn machine(gpus: u32, context: u64) -> (SimulatedGpu, Node) {
    let settings = [
        ("GPUS", gpus.to_string()),
        ("MEMORY", CARD.to_string()),
        ("CONTEXT_BYTES", context.to_string()),
        ("LINK_BANDWIDTH", "8GiB".to_owned()),
    ];
    let gpu = SimulatedGpu::new(&settings).expect("the workspace is built: cargo build --workspace");
    let arguments = ["--capacity", &CARD.to_string(), "--quantum", "10ms"].map(str::to_owned);
    let node = Node::start(gpu.environment(&[]), &arguments).unwrap();
    (gpu, node)
}

fn gpu(node: &Node, index: usize) -> Gpu {
    status::read(node.dir()).unwrap().gpus.remove(index)
}

/// Waits until the arbiter has counted so many bytes of contexts, on each GPU.
fn counted(node: &Node, contexts: &[u64]) {
    TIMEOUT.until("the contexts are counted", || {
        (0..contexts.len()).all(|index| gpu(node, index).pinned_bytes == contexts[index])
    });
}

/// Everybody is gone, and so is every granule that they had.
fn balances(node: &Node) {
    TIMEOUT.until("all clients are reaped", || {
        status::read(node.dir()).unwrap().gpus.iter().all(|gpu| gpu.clients.is_empty())
    });
    for gpu in status::read(node.dir()).unwrap().gpus {
        assert_eq!(gpu.free_bytes, gpu.capacity_bytes as i64, "a granule of {} was lost", gpu.uuid);
        assert_eq!(gpu.repaired, 0, "the books of {} had to be repaired", gpu.uuid);
    }
}

/// Memory that holds something.
struct Data {
    address: u64,
    bytes: u64,
    seed: u64,
}

impl Data {
    fn new(application: &mut Application, bytes: u64, seed: u64) -> Self {
        let address = application.alloc(bytes);
        application.does(&format!("write {address} {bytes} {seed}"));
        Self { address, bytes, seed }
    }

    fn is_right(&self, application: &mut Application) {
        let Self { address, bytes, seed } = self;
        assert_eq!(application.ask(&format!("check {address} {bytes} {seed}")), (SUCCESS, "right".into()));
    }
}

fn initialised(node: &Node) -> Application {
    let mut application = Application::start(node.environment(), &[("NVSHARE_LOG", "info")]);
    application.does("init");
    application
}

/// Its log has no failure in it, nor a fill that found no memory where the books had some.
fn ends_well(application: Application) -> String {
    let said = application.ends_well();
    assert!(!said.contains("that should be free"), "{said}");
    said
}

fn first_context_on_a_full_gpu(make: &str) {
    const CONTEXT: u64 = 80 * MIB;
    let (_gpu, node) = machine(1, CONTEXT);
    let mut holder = initialised(&node);
    holder.does("create");
    counted(&node, &[CONTEXT]);
    let held = Data::new(&mut holder, CARD - CONTEXT, 1);
    // A reservation of 64 MiB is not enough for it.
    let mut late = initialised(&node);
    late.does(make);
    assert_eq!(gpu(&node, 0).clients.len(), 2, "it has attached by the slot that it took for this");
    if make == "retain" {
        late.does("use 0");
    }
    let own = Data::new(&mut late, 64 * MIB, 2);
    for _ in 0..3 {
        held.is_right(&mut holder);
        own.is_right(&mut late);
    }
    counted(&node, &[2 * CONTEXT]);
    let said = ends_well(late);
    assert!(said.contains("this process's context was created"), "{said}");
    held.is_right(&mut holder);
    ends_well(holder);
    balances(&node);
}

#[test]
fn a_context_is_made_on_a_gpu_that_another_process_has_filled() {
    first_context_on_a_full_gpu("create");
}

#[test]
fn so_is_a_primary_context() {
    first_context_on_a_full_gpu("retain");
}

/// A process that has attached takes room as for anything else.
#[test]
fn a_second_context_finds_room_too() {
    const CONTEXT: u64 = 16 * MIB;
    let (_gpu, node) = machine(1, CONTEXT);
    let (mut two, mut holder) = (initialised(&node), initialised(&node));
    two.does("create");
    holder.does("create");
    counted(&node, &[2 * CONTEXT]);
    let held = Data::new(&mut holder, CARD - 2 * CONTEXT, 1);
    two.does("create");
    assert_eq!(gpu(&node, 0).clients.len(), 2);
    let own = Data::new(&mut two, 32 * MIB, 2);
    held.is_right(&mut holder);
    own.is_right(&mut two);
    two.end();
    held.is_right(&mut holder);
    holder.end();
    balances(&node);
}

/// Where contexts fill the GPU there is nothing to move. Whoever comes too late is told why, and leaves nothing behind.
#[test]
fn a_context_that_nobody_can_make_room_for_is_refused() {
    const CONTEXT: u64 = 100 * MIB;
    let (_gpu, node) = machine(1, CONTEXT);
    let (mut one, mut two, mut late) = (initialised(&node), initialised(&node), initialised(&node));
    one.does("create");
    two.does("create");
    counted(&node, &[2 * CONTEXT]);
    let data = Data::new(&mut one, CARD - 2 * CONTEXT, 1);
    assert_eq!(late.call("create"), OUT_OF_MEMORY);
    assert_eq!(late.call("retain"), OUT_OF_MEMORY);
    TIMEOUT.until("its slots are cleared", || gpu(&node, 0).clients.len() == 2);
    data.is_right(&mut one);
    two.works();
    two.end();
    TIMEOUT.until("there is room", || gpu(&node, 0).clients.len() == 1);
    late.does("create");
    late.works();
    data.is_right(&mut one);
    late.ends_having_said(&[
        "ERROR",
        "GPU-",
        "first context",
        "56.00 MiB reserved for it",
        "200.00 MiB",
        "End a process",
    ]);
    ends_well(one);
    balances(&node);
}

fn job(seed: u64, size: u64, devices: &[i32], iterations: u64) -> Job {
    Job {
        size,
        buffers: 2 * devices.len() as u64,
        devices: devices.to_vec(),
        iterations,
        seed,
        managed: false,
        read_only: false,
        seconds: None,
        controlled: iterations == u64::MAX,
    }
}

/// Those who have filled the GPU never stop working, and one process after the other comes and goes.
#[test]
fn processes_come_and_go_while_the_others_work() {
    let (_gpu, node) = machine(1, 40 * MIB);
    let jobs = [job(1, 200 * MIB, &[0], u64::MAX)];
    let mut crew = Crew::start(&jobs, &node.environment()).unwrap();
    let end = Instant::now() + TIMEOUT.duration();
    let (mut come, mut outcome) = (0, None);
    while outcome.is_none() {
        match crew.next(end).expect("it gets its turns") {
            (_, Message::Event(Event::Ready { .. })) => crew.go(),
            (_, Message::Event(Event::Progress { .. })) if come < 3 => {
                // Each of them has work for several slices, and two are there at a time.
                let mut two = [2, 3].map(|seed| Running::start(&node, &job(seed, 120 * MIB, &[0], 8)));
                two.iter_mut().for_each(Running::ends_well);
                come += 1;
                if come == 3 {
                    crew.stop();
                }
            }
            (_, Message::Event(Event::Progress { .. })) => {}
            (_, Message::Event(Event::Done(said))) => outcome = Some(said),
            (_, Message::Ended(said)) => panic!("it ended: {said}"),
        }
    }
    assert!(outcome.is_some_and(|outcome| outcome.right), "the others' coming and going changed its data");
    drop(crew);
    balances(&node);
}

/// Each fills the GPU that the other one wants next, and holds it while it waits.
#[test]
fn two_that_want_each_others_gpu_do_not_block_each_other() {
    const CONTEXT: u64 = 40 * MIB;
    let (_gpu, node) = machine(2, CONTEXT);
    let (mut one, mut two) = (initialised(&node), initialised(&node));
    one.does("create 0");
    two.does("create 1");
    counted(&node, &[CONTEXT, CONTEXT]);
    let ones = Data::new(&mut one, CARD - CONTEXT, 1);
    let twos = Data::new(&mut two, CARD - CONTEXT, 2);
    one.tell("create 1");
    two.tell("create 0");
    assert_eq!(one.answer("create 1").0, SUCCESS);
    assert_eq!(two.answer("create 0").0, SUCCESS);
    one.works();
    two.works();
    // Contexts are numbered in the order in which they were made.
    one.does("use 0");
    two.does("use 0");
    for _ in 0..3 {
        ones.is_right(&mut one);
        twos.is_right(&mut two);
    }
    ends_well(one);
    ends_well(two);
    balances(&node);
}

/// The same with work under way, and more processes than GPUs: each makes its next context while it has the GPUs
/// before, in orders that form a ring.
#[test]
fn a_ring_of_processes_that_want_the_next_gpu() {
    let (_gpu, node) = machine(3, 40 * MIB);
    let rings: [&[i32]; 4] = [&[0, 1], &[1, 2], &[2, 0], &[2, 1, 0]];
    let mut jobs: Vec<_> = rings
        .iter()
        .zip(1..)
        .map(|(devices, seed)| {
            Running::start(&node, &job(seed, devices.len() as u64 * 90 * MIB, devices, 20))
        })
        .collect();
    jobs.iter_mut().for_each(Running::ends_well);
    balances(&node);
}

/// An open capture keeps its process's GPUs until it ends, so nobody may wait for another one inside it.
#[test]
fn nobody_waits_for_a_gpu_inside_a_capture() {
    const CONTEXT: u64 = 40 * MIB;
    let (_gpu, node) = machine(2, CONTEXT);
    let (mut holder, mut captures) = (initialised(&node), initialised(&node));
    holder.does("create 1");
    captures.does("create 0");
    counted(&node, &[CONTEXT, CONTEXT]);
    let held = Data::new(&mut holder, CARD - CONTEXT, 1);
    let stream = captures.number("stream 1");
    captures.does(&format!("begin {stream} 2"));
    assert_eq!(captures.call("create 1"), OUT_OF_MEMORY);
    captures.number(&format!("end {stream}"));
    captures.does("create 1");
    captures.works();
    held.is_right(&mut holder);
    captures.does("use 0");
    captures.does(&format!("begin {stream} 2"));
    captures.number(&format!("end {stream}"));
    captures.ends_having_said(&["ERROR", "GPU-", "being captured"]);
    ends_well(holder);
    balances(&node);
}
