//! Flow control: a client whose slice can end keeps little work in flight, and nobody else is held.

use nvshare_e2e::application::books::{balances, client};
use nvshare_e2e::application::{Application, MIB, quick_gpu};
use nvshare_test_support::Patience;
use nvshare_tools::node::{Node, SimulatedGpu};

const TIMEOUT: Patience = Patience::seconds(60);

/// Neither fits beside the other in the pool of 64 MiB.
const MINE: u64 = 32 * MIB;
const OTHERS: u64 = 40 * MIB;

/// Kernels, of some milliseconds each: far more than the drain target allows.
const KERNELS: u64 = 60;

/// One that has the GPU and could be asked for it at any moment, by another that has `others` bytes and nothing to do.
/// Where its data is, and a stream of its own.
struct Scene {
    node: Node,
    one: Application,
    data: u64,
    stream: u64,
    other: Application,
    /// Where the other's data is, and its bytes.
    its: (u64, u64),
    _gpu: SimulatedGpu,
}

impl Scene {
    fn new(variables: &[(&str, &str)], options: &[&str], others: u64) -> Self {
        let gpu = quick_gpu();
        let options: Vec<_> = ["--capacity", "64MiB", "--quantum", "1ms"]
            .iter()
            .chain(options)
            .map(|word| word.to_string())
            .collect();
        let node = Node::start(gpu.environment(&[]), &options).unwrap();
        let mut other = Application::ready(&node);
        let its = (other.alloc(others), others);
        other.writes(its.0, its.1, 1);
        let mut one = Application::start(node.environment(), variables);
        for call in ["init", "retain", "use 0"] {
            one.does(call);
        }
        let data = one.alloc(MINE);
        // Slices are over at once, so the other one is back in the queue for a moment when it has given way, and may have
        // the GPU once more before it finds that it has nothing to do.
        TIMEOUT.until("one has the GPU and the other wants nothing", || {
            one.writes(data, MINE, 2);
            let [has, wants] = [&one, &other].map(|application| client(&node, application).phase);
            // Where both fit, both run.
            has == "running" && ["idle", "running"].contains(&wants.as_str())
        });
        let stream = one.number("stream 1");
        Self { node, one, data, stream, other, its, _gpu: gpu }
    }

    fn launch(&self, round: u64, stream: u64) -> String {
        format!("iota {} {} {round} {stream}", self.data, MINE / 8)
    }

    fn ends(self) {
        let Self { node, one, other, its, .. } = self;
        drop(one.ends_well());
        others_is_well(&node, other, its);
    }
}

/// The other has its data, and never was held: it waits for each of its copies.
fn others_is_well(node: &Node, mut other: Application, (address, bytes): (u64, u64)) {
    other.sees(address, bytes, 1);
    assert_eq!(other.number("holds"), 0);
    drop(other.ends_well());
    balances(node);
}

/// Launches all kernels without waiting for any. How often it was held.
fn holds(variables: &[(&str, &str)], options: &[&str], others: u64) -> u64 {
    let mut scene = Scene::new(variables, options, others);
    for round in 0..KERNELS {
        let launch = scene.launch(round, if round % 2 == 0 { 0 } else { scene.stream });
        scene.one.does(&launch);
    }
    let holds = scene.one.number("holds");
    scene.one.does("synchronize 0");
    scene.ends();
    holds
}

/// Nothing that it launches is ever done, so sooner or later it has too much in flight. It goes on nevertheless, for want
/// of progress: this ends.
#[test]
fn who_can_be_asked_to_give_way_at_any_moment_is_held() {
    let mut scene = Scene::new(&[], &[], OTHERS);
    let before = scene.one.number("holds");
    scene.one.does(&format!("hold {}", scene.stream));
    for round in 0.. {
        let launch = scene.launch(round % 2, scene.stream);
        scene.one.does(&launch);
        if scene.one.number("holds") > before {
            break;
        }
    }
    scene.one.does("let-go");
    scene.ends();
}

/// What tells how work gets on is no barrier between the streams of an application, though the legacy stream, which waits for
/// all blocking ones and has all of them wait, would tell the same; and what is in flight in one counts for no other.
#[test]
fn streams_do_not_wait_for_each_other() {
    let mut scene = Scene::new(&[], &[], OTHERS);
    let [slow, quick] = [(); 2].map(|()| scene.one.number("stream 0"));
    scene.one.does(&format!("hold {slow}"));
    for round in 0..KERNELS / 2 {
        let launch = scene.launch(round, quick);
        scene.one.does(&launch);
    }
    TIMEOUT.until("the quick one is through", || scene.one.call(&format!("query {quick}")) == 0);
    scene.one.does("let-go");
    scene.ends();
}

#[test]
fn nobody_is_held_where_all_fit() {
    assert_eq!(holds(&[], &[], 8 * MIB), 0);
}

#[test]
fn nobody_is_held_where_it_is_switched_off() {
    assert_eq!(holds(&[("NVSHARE_FLOW_CONTROL", "0")], &[], OTHERS), 0);
    assert_eq!(holds(&[], &["--drain-target", "0s"], OTHERS), 0);
}

/// What is captured is no work yet. A look at the work in flight would ruin the capture.
#[test]
fn nobody_is_held_while_a_capture_is_open() {
    const GLOBAL: u32 = 0;
    let mut scene = Scene::new(&[], &[], OTHERS);
    scene.one.does(&format!("begin {} {GLOBAL}", scene.stream));
    let before = scene.one.number("holds");
    for round in 0..KERNELS {
        let launch = scene.launch(round, scene.stream);
        scene.one.does(&launch);
    }
    assert_eq!(scene.one.number("holds"), before);
    let end = format!("end {}", scene.stream);
    scene.one.number(&end);
    scene.ends();
}

/// Its work does not get on, so it is held after a few launches; and then it is killed.
#[test]
fn who_dies_while_it_is_held_is_in_nobodys_way() {
    let mut scene = Scene::new(&[], &[], OTHERS);
    scene.one.does(&format!("hold {}", scene.stream));
    // Nobody waits for the answers: one of them does not come.
    for round in 0..KERNELS {
        let launch = scene.launch(round, scene.stream);
        scene.one.tell(&launch);
    }
    let Scene { node, mut one, other, its, .. } = scene;
    one.kill();
    others_is_well(&node, other, its);
}
