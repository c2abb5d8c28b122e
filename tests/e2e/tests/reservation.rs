//! Room for what only the driver can place: on a GPU that others have filled it is made, it is in the books as what
//! cannot move, it comes back, and nobody's data is lost over it.

use nvshare_e2e::application::books::{Competitor, balances, books, come_to};
use nvshare_e2e::application::{Application, MIB, SUCCESS, node, quick_gpu};
use nvshare_tools::node::{Node, SimulatedGpu};

const OUT_OF_MEMORY: i32 = 2;
const NOT_SUPPORTED: i32 = 801;

/// A recording during which nothing is forbidden.
const RELAXED: u32 = 2;

const DATA: u64 = 30 * MIB;

/// A GPU whose pool is all that it has: what is in nobody's books finds no memory on it.
fn full_gpu() -> SimulatedGpu {
    let settings = [("MEMORY", "64MiB"), ("CONTEXT_BYTES", "2MiB"), ("LINK_BANDWIDTH", "256GiB")];
    SimulatedGpu::new(&settings.map(|(name, value)| (name, value.to_owned()))).unwrap()
}

/// With the primary context, and a driver that fails as the rules say (`NVSHARE_SIM_FAIL`).
fn failing(node: &Node, rules: &str) -> Application {
    let mut application = Application::start(node.environment(), &[("NVSHARE_SIM_FAIL", rules)]);
    for call in ["init", "retain", "use 0"] {
        application.does(call);
    }
    application
}

/// Has it allocate and use its data while the other has the rest of the GPU, to the last granule. Where the data is.
fn fill(node: &Node, one: &mut Application, other: &mut Competitor) -> u64 {
    let data = one.alloc(DATA);
    one.writes(data, DATA, 1);
    other.takes_all(node, one);
    one.sees(data, DATA, 1);
    assert_eq!(books(node, one), (DATA, DATA, 0));
    data
}

/// The application's data and the other's are as they were, and the books know of nothing else.
fn nothing_is_lost(node: &Node, mut one: Application, mut other: Competitor, data: u64) {
    one.sees(data, DATA, 1);
    other.sees_its_own();
    one.sees(data, DATA, 1);
    one.does(&format!("free {data}"));
    come_to(node, &one, (0, 0, 0));
    one.ends_well();
    other.ends();
    balances(node);
}

#[test]
fn an_array_has_room_that_nobody_takes_away_until_it_is_destroyed() {
    const ARRAY: u64 = 24 * MIB;
    let gpu = full_gpu();
    let node = node(&gpu);
    let (mut one, mut other) = (Application::ready(&node), Competitor::start(&node));
    let data = fill(&node, &mut one, &mut other);
    for round in 0..3 {
        // Two more granules than it has room for, in the end; and then as many as it has.
        let array = one.number(&format!("array {ARRAY}"));
        one.does(&format!("write-array {array} {ARRAY} {round}"));
        assert_eq!(books(&node, &one), (DATA + ARRAY, DATA + ARRAY, ARRAY));
        let too_large = one.ask(&format!("array {}", 8 * MIB));
        assert_eq!(too_large.0, OUT_OF_MEMORY, "the GPU has 6 MiB left for this client");
        assert_eq!(books(&node, &one).0, DATA + ARRAY, "what is refused is in no books");
        for _ in 0..2 {
            // The other cannot have all now; what it lacks lies in host memory.
            other.sees_its_own();
            assert_eq!(books(&node, &one).1, ARRAY, "its data is out, and its array stays");
            let seen = one.ask(&format!("check-array {array} {ARRAY} {round}"));
            assert_eq!(seen, (SUCCESS, "right".into()));
            one.sees(data, DATA, 1);
        }
        one.does(&format!("destroy-array {array}"));
        come_to(&node, &one, (DATA, DATA, 0));
    }
    assert_eq!(one.number("refused"), 0, "the driver was only asked when there was room");
    nothing_is_lost(&node, one, other, data);
}

/// In a recording nobody can wait for room: it is there, or the call is refused.
#[test]
fn a_recording_does_not_wait_for_room() {
    const ARRAY: u64 = 24 * MIB;
    let gpu = full_gpu();
    let node = node(&gpu);
    let (mut one, mut other) = (Application::ready(&node), Competitor::start(&node));
    let data = fill(&node, &mut one, &mut other);
    let stream = one.number("stream 1");
    one.does(&format!("begin {stream} {RELAXED}"));
    assert_eq!(one.call(&format!("array {ARRAY}")), OUT_OF_MEMORY);
    one.does(&format!("iota {data} {} 1 {stream}", DATA / 8));
    one.number(&format!("end {stream}"));
    let array = one.number(&format!("array {ARRAY}"));
    come_to(&node, &one, (DATA + ARRAY, DATA + ARRAY, ARRAY));
    one.does(&format!("destroy-array {array}"));
    nothing_is_lost(&node, one, other, data);
}

#[test]
fn managed_memory_has_room_until_it_is_freed() {
    const MANAGED: u64 = 16 * MIB;
    let gpu = full_gpu();
    let node = node(&gpu);
    let (mut one, mut other) = (Application::ready(&node), Competitor::start(&node));
    let data = fill(&node, &mut one, &mut other);
    let managed = one.number(&format!("managed {MANAGED}"));
    assert_eq!(books(&node, &one), (DATA + MANAGED, DATA + MANAGED, MANAGED));
    for seed in 0..3 {
        one.does(&format!("iota {managed} {} {seed} 0", MANAGED / 8));
        other.sees_its_own();
        assert_eq!(books(&node, &one).1, MANAGED);
        let seen = one.ask(&format!("mixed {managed} {} {seed}", MANAGED / 8));
        assert_eq!(seen, (SUCCESS, "right".into()));
    }
    one.does(&format!("free {managed}"));
    assert_eq!(books(&node, &one).2, 0);
    nothing_is_lost(&node, one, other, data);
}

/// The driver says that it has no memory, and room is made: the second try comes off. What is left for the client is
/// less than what is tried first.
#[test]
fn whatever_finds_no_memory_is_tried_again_with_room() {
    for (function, call, undo) in [
        ("cuModuleLoadDataEx", "load", Some("unload")),
        ("cuStreamCreateWithPriority", "stream-with-priority 1", Some("destroy-stream")),
        ("cuCtxCreate_v2", "create", None),
        ("cuArrayCreate_v2", "array 1024", Some("destroy-array")),
    ] {
        let gpu = quick_gpu();
        let node = node(&gpu);
        let rule = format!("{function}:1:{OUT_OF_MEMORY}");
        let mut one = failing(&node, &rule);
        let mut other = Competitor::start(&node);
        let data = fill(&node, &mut one, &mut other);
        let (code, made) = one.ask(call);
        assert_eq!(code, SUCCESS, "{function}");
        if let Some(undo) = undo {
            one.does(&format!("{undo} {made}"));
            // The room was the rest of the GPU, and the other has it back.
            assert_eq!(books(&node, &one), (DATA, DATA, 0), "{function}");
            other.takes_all(&node, &one);
        }
        nothing_is_lost(&node, one, other, data);
    }
}

/// A driver that says so again and again is believed, and a refusal that is not about memory at once.
#[test]
fn what_room_does_not_help_is_told_to_the_application() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let rules = format!("cuModuleLoadDataEx:2:{OUT_OF_MEMORY},cuArrayCreate_v2:1:{NOT_SUPPORTED}");
    let (mut one, mut other) = (failing(&node, &rules), Competitor::start(&node));
    let data = fill(&node, &mut one, &mut other);
    assert_eq!(one.call("load"), OUT_OF_MEMORY);
    assert_eq!(books(&node, &one), (DATA, DATA, 0), "no room is kept for what is not there");
    one.number("load");
    assert_eq!(one.call(&format!("array {}", 20 * MIB)), NOT_SUPPORTED);
    assert_eq!(books(&node, &one), (DATA, DATA, 0));
    let array = one.number(&format!("array {}", 20 * MIB));
    one.does(&format!("destroy-array {array}"));
    nothing_is_lost(&node, one, other, data);
}

/// The same with memory that is really gone: all of the GPU is in the books of two clients, and small arrays and
/// another context, of which the books know nothing, find none.
#[test]
fn a_gpu_that_is_full_has_memory_for_what_the_driver_needs() {
    const SMALL: u64 = 64 << 10;
    let gpu = full_gpu();
    let node = node(&gpu);
    let (mut one, mut other) = (Application::ready(&node), Competitor::start(&node));
    let data = fill(&node, &mut one, &mut other);
    let mut arrays = Vec::new();
    for seed in 0..3 {
        let array = one.number(&format!("array {SMALL}"));
        one.does(&format!("write-array {array} {SMALL} {seed}"));
        arrays.push(array);
    }
    let refused = one.number("refused");
    assert!(refused > 0, "the test means that there was no memory for them");
    one.does("create");
    one.does("use 0");
    for _ in 0..2 {
        other.sees_its_own();
        one.sees(data, DATA, 1);
        for (array, seed) in arrays.iter().zip(0..) {
            let seen = one.ask(&format!("check-array {array} {SMALL} {seed}"));
            assert_eq!(seen, (SUCCESS, "right".into()));
        }
    }
    for array in arrays {
        one.does(&format!("destroy-array {array}"));
    }
    one.does("destroy 1");
    nothing_is_lost(&node, one, other, data);
}
