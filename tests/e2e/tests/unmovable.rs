//! Allocations that a tool watches are the driver's own: in the books as what cannot move, and others work beside them.

use nvshare_e2e::application::books::{Competitor, balances, books, come_to};
use nvshare_e2e::application::{Application, MIB, node, quick_gpu};
use nvshare_tools::node::Node;

const DATA: u64 = 30 * MIB;

/// What each way to have it so says in the log.
const WAYS: [(&str, &str, &str); 3] = [
    ("NV_SANITIZER_INJECTION_PORT_BASE", "49152", "compute-sanitizer is attached"),
    (
        "CUDA_INJECTION64_PATH",
        "/opt/compute-sanitizer/libsanitizer-collection.so",
        "compute-sanitizer is attached",
    ),
    ("NVSHARE_UNMOVABLE", "1", "NVSHARE_UNMOVABLE=1"),
];

fn watched(node: &Node, variables: &[(&str, &str)]) -> Application {
    let mut application = Application::start(node.environment(), variables);
    application.does("init");
    application.does("create 0");
    application
}

#[test]
fn what_compute_sanitizer_watches_is_the_drivers_own_and_in_the_books() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    for (name, value, said) in WAYS {
        // What is freed is the driver's at once, so that a use of it is found.
        let mut one = watched(&node, &[(name, value), ("NVSHARE_KEEP_FREED", "3600")]);
        let made = one.number("creates");
        let (plain, ordered) = (one.alloc(DATA), one.number(&format!("alloc-async {} 0", 4 * MIB)));
        let all = DATA + 4 * MIB;
        assert_eq!(books(&node, &one), (all, all, all), "{name}");
        assert_eq!(one.number("creates"), made, "{name}: nvshare has made no memory to map");
        one.writes(plain, DATA, 1);
        one.sees(plain, DATA, 1);
        one.does(&format!("free {plain}"));
        one.does(&format!("free-async {ordered} 0"));
        come_to(&node, &one, (0, 0, 0));
        let log = one.ends_well();
        assert_eq!(log.matches(said).count(), 1, "{log}");
    }
    balances(&node);
}

#[test]
fn who_does_not_want_it_has_movable_memory_beside_a_tool() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = watched(&node, &[(WAYS[0].0, WAYS[0].1), ("NVSHARE_UNMOVABLE", "0")]);
    let data = one.alloc(DATA);
    one.writes(data, DATA, 1);
    assert_eq!(books(&node, &one), (DATA, DATA, 0));
    assert_eq!(one.ends_well().matches("sanitizer").count(), 0);
}

#[test]
fn others_take_turns_beside_what_cannot_move() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = watched(&node, &[("NVSHARE_UNMOVABLE", "1")]);
    let mut other = Competitor::start(&node);
    other.takes_all(&node, &one);
    // Waits for the other to make room.
    let data = one.alloc(DATA);
    one.writes(data, DATA, 1);
    for _ in 0..3 {
        // It cannot have all now; what it lacks lies in host memory.
        other.sees_its_own();
        one.sees(data, DATA, 1);
        assert_eq!(books(&node, &one), (DATA, DATA, DATA));
    }
    one.does(&format!("free {data}"));
    other.sees_its_own();
    one.ends_well();
    other.ends();
    balances(&node);
}
