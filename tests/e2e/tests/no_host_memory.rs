//! The host has no memory for what should go out: nobody stands still, nobody dies, and all data is right.

use nvshare_e2e::application::books::{balances, books, client, clients};
use nvshare_e2e::application::{Application, MIB, SUCCESS, node, quick_gpu};
use nvshare_test_support::Patience;
use nvshare_tools::node::{Node, SimulatedGpu};

const TIMEOUT: Patience = Patience::seconds(60);

const OUT_OF_MEMORY: i32 = 2;

/// Memory that may be handed to other processes.
const POSIX_FD: u32 = 1;

const POOL: u64 = 64 * MIB;
const CONTEXT: u64 = 2 * MIB;
const PIECE: u64 = 2 * MIB;

/// What a process keeps for itself below a limit of its own, of which none goes to what is evicted.
const OWN: u64 = 64 * MIB;

/// An application with memory in small pieces, so that it needs next to nothing on the host to fill and check it.
struct Job {
    application: Application,
    pieces: Vec<u64>,
    round: u64,
}

impl Job {
    fn of(node: &Node, bytes: u64) -> Self {
        let mut application = Application::ready(node);
        let pieces = (0..bytes / PIECE).map(|_| application.alloc(PIECE)).collect();
        Self { application, pieces, round: 0 }
    }

    fn writes(&mut self) {
        self.round += 1;
        for piece in &self.pieces {
            self.application.writes(*piece, PIECE, self.round);
        }
    }

    /// Reads all of its memory, and writes it anew.
    #[track_caller]
    fn goes_on(&mut self) {
        for piece in &self.pieces {
            self.application.sees(*piece, PIECE, self.round);
        }
        self.writes();
    }
}

fn stall(node: &Node, application: &Application) -> Option<String> {
    client(node, application).stall
}

fn contexts_are_counted(node: &Node, count: usize) {
    TIMEOUT.until("all contexts are counted", || {
        let clients = clients(node);
        clients.len() == count && clients.iter().all(|client| client.pinned_bytes == CONTEXT)
    });
}

#[test]
fn who_cannot_evict_goes_on_and_so_does_the_waiter() {
    const MINE: u64 = 36 * MIB;
    const THEIRS: u64 = 40 * MIB;
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = Job::of(&node, MINE);
    one.writes();
    one.application.does(&format!("leave {OWN}"));
    let mut other = Job::of(&node, THEIRS);
    contexts_are_counted(&node, 2);
    // It comes in although nothing goes out, and lies in host memory with the rest.
    other.writes();
    assert_eq!(stall(&node, &one.application).as_deref(), Some("no-host-memory"));
    for _ in 0..3 {
        one.goes_on();
        other.goes_on();
        assert_eq!(books(&node, &one.application), (MINE, MINE, MINE));
        assert!(books(&node, &other.application).1 <= POOL - 2 * CONTEXT - MINE);
    }
    // When there is memory again it moves again, and the other's comes home.
    one.application.does("unlimit");
    TIMEOUT.until("nothing is held any more", || stall(&node, &one.application).is_none());
    assert_eq!(books(&node, &one.application).2, 0);
    TIMEOUT.until("all of the other's is on the GPU", || {
        other.goes_on();
        books(&node, &other.application).1 == THEIRS
    });
    for _ in 0..2 {
        one.goes_on();
        other.goes_on();
    }
    assert!(client(&node, &one.application).bytes_out > 0);
    other.application.ends_well();
    let name = one.application.client();
    let said = one.application.end();
    let lines = |part: &str| said.lines().filter(|line| line.contains(&name) && line.contains(part)).count();
    assert_eq!(lines(" ERROR "), 1, "{said}");
    assert_eq!(lines("cannot be evicted and stay on the GPU"), 1, "{said}");
    assert!(lines("RLIMIT_DATA") > 0 && lines("can evict its memory again") == 1, "{said}");
    balances(&node);
}

/// Only one of two finds a place: it goes on, and the other when the first is gone.
#[test]
fn who_finds_no_place_anywhere_waits_and_is_named() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = Job::of(&node, 40 * MIB);
    one.writes();
    one.application.does(&format!("leave {OWN}"));
    let mut other = Job::of(&node, 40 * MIB);
    other.application.does(&format!("leave {OWN}"));
    let write = format!("write {} 8 5", other.pieces[0]);
    other.application.tell(&write);
    TIMEOUT.until("it is named", || stall(&node, &other.application).as_deref() == Some("no-host-memory"));
    for _ in 0..3 {
        one.goes_on();
    }
    one.application.end();
    assert_eq!(other.application.answer(&write).0, SUCCESS);
    other.application.does("unlimit");
    TIMEOUT.until("it is named no more", || stall(&node, &other.application).is_none());
    other.writes();
    other.goes_on();
    other.application.end();
    balances(&node);
}

/// A pool with more memory than the machine.
fn large_gpu() -> (SimulatedGpu, Node) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap();
    let total = total.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10;
    let settings = [("MEMORY", format!("{}MiB", 2 * total / MIB)), ("CONTEXT_BYTES", "2MiB".into())];
    let gpu = SimulatedGpu::new(&settings).unwrap();
    let node = Node::start(gpu.environment(&[]), &[]).unwrap();
    (gpu, node)
}

/// Each of them within what the machine has, and all of them together not: who comes last is refused, and nobody is
/// killed for it later.
#[test]
fn what_several_processes_are_promised_of_one_machine_is_there() {
    const STEP: u64 = 1 << 30;
    let (_gpu, node) = large_gpu();
    let mut one = Application::ready(&node);
    // Nothing of it is ever used, so none of the machine's memory is either.
    while one.call(&format!("alloc {STEP}")) == SUCCESS {}
    let mut other = Application::ready(&node);
    assert_eq!(other.call(&format!("alloc {}", 2 * STEP)), OUT_OF_MEMORY);
    one.kill();
    TIMEOUT.until("it is reaped", || clients(&node).len() == 1);
    other.alloc(STEP);
    other.ends_having_said(&["an allocation of 2.00 GiB is refused", "of which other jobs were promised"]);
}

/// Memory in one piece for which the GPU has a granule too little: it lies in host memory as a whole.
#[test]
fn what_must_be_in_one_piece_and_finds_no_room_on_the_gpu_is_used_all_the_same() {
    const OBJECT: u64 = POOL - CONTEXT;
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = Application::ready(&node);
    contexts_are_counted(&node, 1);
    let object = one.number(&format!("object {OBJECT} 0 {POSIX_FD}"));
    let view = one.reserve(OBJECT);
    one.map(view, OBJECT, object);
    one.writes(view, OBJECT, 1);
    assert_eq!(books(&node, &one), (OBJECT, OBJECT, 0));
    // Another context leaves it too little.
    let mut other = Application::ready(&node);
    contexts_are_counted(&node, 2);
    other.works();
    one.sees(view, OBJECT, 1);
    one.writes(view, OBJECT, 2);
    assert_eq!(books(&node, &one).1, 0, "it is in host memory, and in one piece");
    other.works();
    other.end();
    TIMEOUT.until("it is at home again", || {
        // Who runs comes home.
        one.sees(view, 8, 2);
        books(&node, &one).1 == OBJECT
    });
    one.sees(view, OBJECT, 2);
    one.ends_well();
}
