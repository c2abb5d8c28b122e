//! CUDA graphs under the shim while another client wants the GPU: captured in every mode, launched after the memory
//! has been out and back, updated, and with graphs inside.
//!
//! Applications are told what to do step by step, so no verdict depends on how fast anything is.

use nvshare_e2e::application::{Application, MIB, SUCCESS, node, watched_gpu};
use nvshare_test_support::Patience;
use nvshare_tools::node::Node;
use nvshare_tools::status;

const TIMEOUT: Patience = Patience::seconds(60);

/// Neither fits beside the other in the pool of 64 MiB.
const MINE: u64 = 32 * MIB;
const OTHERS: u64 = 40 * MIB;
const WORDS: u64 = MINE / 8;

const NON_BLOCKING: u32 = 1;
const UPDATE_FAILURE: i32 = 910;

/// Whether it has been promised the GPU, and waits for the room there.
fn waits(node: &Node, application: &Application) -> bool {
    let clients = status::read(node.dir()).unwrap().gpus.remove(0).clients;
    let is_it = |client: &&status::Client| application.client() == format!("nvshare[{}]", client.pid);
    clients.iter().find(is_it).unwrap().phase == "filling"
}

/// Two clients that take turns: one with graphs, and one that has the other's memory out whenever it is asked to.
struct Pair {
    node: Node,
    app: Application,
    data: u64,
    stream: u64,
    other: Application,
    others: u64,
}

impl Pair {
    fn new(node: Node) -> Self {
        let (mut app, mut other) = (Application::ready(&node), Application::ready(&node));
        let (data, stream) = (app.alloc(MINE), app.number(&format!("stream {NON_BLOCKING}")));
        let others = other.alloc(OTHERS);
        Self { node, app, data, stream, other, others }
    }

    fn write(&self) -> String {
        format!("write {} {OTHERS} 5", self.others)
    }

    /// The other has had the GPU for itself since.
    fn out(&mut self) {
        self.other.does(&self.write());
    }

    /// The other wants the GPU, and this one has been told to give way.
    fn is_wanted(&mut self) {
        self.other.tell(&self.write());
        TIMEOUT.until("the other waits", || waits(&self.node, &self.other));
    }

    /// The other has got it.
    fn was_given(&mut self) {
        assert_eq!(self.other.answer("write").0, SUCCESS);
    }

    /// There is what an iota and these mixes make.
    fn is_mixed(&mut self, seed: u64, mixes: &[u64]) {
        self.app.does(&format!("synchronize {}", self.stream));
        let mixes: String = mixes.iter().map(|seed| format!(" {seed}")).collect();
        let asked = format!("mixed {} {WORDS} {seed}{mixes}", self.data);
        assert_eq!(self.app.ask(&asked), (SUCCESS, "right".into()), "{asked}");
    }

    /// A kernel, in the stream.
    fn kernel(&mut self, name: &str, seed: u64) {
        self.app.does(&format!("{name} {} {WORDS} {seed} {}", self.data, self.stream));
    }

    /// A kernel as a node of a graph.
    fn add(&mut self, name: &str, graph: u64, after: u64, seed: u64) -> u64 {
        self.app.number(&format!("add-{name} {graph} {after} {} {WORDS} {seed}", self.data))
    }

    fn launch(&mut self, exec: u64) {
        self.app.does(&format!("launch {exec} {}", self.stream));
    }

    fn end(mut self) {
        for application in [&mut self.app, &mut self.other] {
            assert_eq!(application.number("illegal"), 0);
            application.works();
        }
        self.other.end();
        self.app.ends_well();
    }
}

/// The capture is open when the other begins to wait: it goes on to its end, and only then does memory move.
#[test]
fn a_capture_in_any_mode_goes_on_while_another_client_wants_the_gpu() {
    let gpu = watched_gpu();
    let mut pair = Pair::new(node(&gpu));
    for mode in 0..3 {
        let stream = pair.stream;
        pair.kernel("iota", mode);
        pair.app.does(&format!("begin {stream} {mode}"));
        pair.kernel("mix", 10);
        pair.is_wanted();
        pair.kernel("mix", 11);
        assert!(waits(&pair.node, &pair.other), "for the end of the capture");
        let graph = pair.app.number(&format!("end {stream}"));
        pair.was_given();
        let exec = pair.app.number(&format!("instantiate {graph}"));
        pair.is_mixed(mode, &[]);
        pair.out();
        pair.launch(exec);
        pair.is_mixed(mode, &[10, 11]);
        pair.out();
        pair.launch(exec);
        pair.launch(exec);
        pair.is_mixed(mode, &[10, 11, 10, 11, 10, 11]);
    }
    pair.end();
}

/// The first client that does not fit beside this one comes in the middle of a capture: host memory for what will have
/// to go out is registered meanwhile, which the mode forbids the application's own threads.
#[test]
fn host_memory_is_made_ready_beside_a_capture() {
    let gpu = watched_gpu();
    let node = node(&gpu);
    let mut app = Application::ready(&node);
    let (data, stream) = (app.alloc(MINE), app.number(&format!("stream {NON_BLOCKING}")));
    app.does(&format!("iota {data} {WORDS} 1 {stream}"));
    app.does(&format!("begin {stream} 0"));
    let mut other = Application::ready(&node);
    let others = other.alloc(OTHERS);
    let mut pair = Pair { node, app, data, stream, other, others };
    pair.is_wanted();
    pair.kernel("mix", 2);
    let graph = pair.app.number(&format!("end {stream}"));
    pair.was_given();
    let exec = pair.app.number(&format!("instantiate {graph}"));
    pair.launch(exec);
    pair.is_mixed(1, &[2]);
    pair.end();
}

/// A stream that forks into the capture, and one begun while the other waits: the first belongs to the open capture,
/// the second would come after.
#[test]
fn a_second_capture_goes_into_an_open_one_while_another_client_wants_the_gpu() {
    let gpu = watched_gpu();
    let mut pair = Pair::new(node(&gpu));
    let (stream, second) = (pair.stream, pair.app.number(&format!("stream {NON_BLOCKING}")));
    let small = pair.app.alloc(4096);
    pair.kernel("iota", 3);
    pair.app.does(&format!("begin {stream} 2"));
    pair.is_wanted();
    pair.app.does(&format!("begin {second} 2"));
    pair.app.does(&format!("iota {small} 512 4 {second}"));
    pair.kernel("mix", 5);
    let graphs = [stream, second].map(|stream| pair.app.number(&format!("end {stream}")));
    pair.was_given();
    for graph in graphs {
        let exec = pair.app.number(&format!("instantiate {graph}"));
        pair.out();
        pair.launch(exec);
    }
    pair.is_mixed(3, &[5]);
    assert_eq!(pair.app.ask(&format!("mixed {small} 512 4")), (SUCCESS, "right".into()));
    pair.end();
}

#[test]
fn an_instance_is_updated_and_launched_between_turns() {
    let gpu = watched_gpu();
    let mut pair = Pair::new(node(&gpu));
    let mut made = Vec::new();
    for seed in [1, 2] {
        let graph = pair.app.number("graph");
        let first = pair.add("iota", graph, 0, seed);
        made.push((graph, first, pair.add("mix", graph, first, 10 * seed)));
    }
    let [(first, iota, mix), (second, ..)] = made[..] else { unreachable!() };
    let exec = pair.app.number(&format!("instantiate {first}"));
    pair.out();
    pair.launch(exec);
    pair.is_mixed(1, &[10]);
    pair.out();
    pair.app.does(&format!("update {exec} {second}"));
    pair.out();
    pair.launch(exec);
    pair.is_mixed(2, &[20]);
    let (data, words) = (pair.data, WORDS);
    pair.app.does(&format!("exec-iota {exec} {iota} {data} {words} 6"));
    pair.app.does(&format!("exec-mix {exec} {mix} {data} {words} 7"));
    pair.out();
    pair.launch(exec);
    pair.is_mixed(6, &[7]);
    // One node more.
    pair.add("mix", second, 0, 8);
    assert_eq!(pair.app.call(&format!("update {exec} {second}")), UPDATE_FAILURE);
    pair.out();
    pair.launch(exec);
    pair.is_mixed(6, &[7]);
    pair.end();
}

/// Copies between two allocations, one of them in a graph inside the graph, whose addresses the driver looks at when
/// the node is made.
#[test]
fn a_graph_inside_a_graph_is_made_and_replaced_between_turns() {
    let gpu = watched_gpu();
    let mut pair = Pair::new(node(&gpu));
    let half = MINE / 2;
    let (front, back) = (pair.data, pair.data + half);
    let child_of = |pair: &mut Pair, seed: u64| {
        let child = pair.app.number("graph");
        let first = pair.app.number(&format!("add-iota {child} 0 {front} {} {seed}", half / 8));
        pair.out();
        pair.app.number(&format!("add-copy {child} {first} {back} {front} {half}"));
        child
    };
    let (child, other) = (child_of(&mut pair, 1), child_of(&mut pair, 2));
    let parent = pair.app.number("graph");
    pair.out();
    let inside = pair.app.number(&format!("add-child {parent} 0 {child}"));
    pair.app.number(&format!("add-mix {parent} {inside} {front} {} 9", half / 8));
    let exec = pair.app.number(&format!("instantiate {parent}"));
    let stream = pair.stream;
    let check = |pair: &mut Pair, seed: u64| {
        pair.out();
        pair.launch(exec);
        pair.app.does(&format!("synchronize {stream}"));
        let words = half / 8;
        for (address, mixes) in [(front, " 9"), (back, "")] {
            let asked = format!("mixed {address} {words} {seed}{mixes}");
            assert_eq!(pair.app.ask(&asked), (SUCCESS, "right".into()), "{asked}");
        }
    };
    check(&mut pair, 1);
    pair.out();
    pair.app.does(&format!("exec-child {exec} {inside} {other}"));
    check(&mut pair, 2);
    pair.end();
}
