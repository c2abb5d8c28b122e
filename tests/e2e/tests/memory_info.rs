//! What programs under the shim are told about memory, in a pool smaller than the card: the driver and NVML agree,
//! before there is a context and after, whatever others do.

use nvshare_e2e::application::{Application, MIB, SUCCESS, gpu, node};
use nvshare_test_support::Patience;
use nvshare_tools::node::{Node, SimulatedGpu, TempDir};
use nvshare_tools::status;
use std::process::Command;

/// After so long, a test has failed because something never happened. No verdict depends on it otherwise.
const TIMEOUT: Patience = Patience::seconds(60);

const CARD: u64 = 256 * MIB;
const POOL: u64 = 64 * MIB;
/// A context, in the simulated GPU of these tests.
const CONTEXT: u64 = 2 * MIB;

const NVML_INVALID_ARGUMENT: i32 = 2;
const NVML_VERSION_MISMATCH: i32 = 25;

/// What a client should be told, in bytes.
#[derive(Clone, Copy)]
struct Told {
    total: u64,
    own: u64,
    others: u64,
}

impl Told {
    fn free(self) -> u64 {
        self.total - self.own - self.others
    }

    /// By NVML's first form, whose "used" has what is reserved, and its second.
    fn by_nvml(self) -> [Vec<u64>; 2] {
        let Told { total, own, others } = self;
        [vec![total, self.free(), own + others], vec![total, others, self.free(), own]]
    }
}

fn ask(application: &mut Application, call: &str) -> Vec<u64> {
    let (code, said) = application.ask(call);
    assert_eq!(code, SUCCESS, "{call}");
    said.split_whitespace().map(|word| word.parse().unwrap()).collect()
}

/// Waits until everybody says so: the arbiter sees a context a moment after it is made.
fn all_say(application: &mut Application, told: Told, context: bool) {
    let [first, second] = told.by_nvml();
    let mut right = vec![
        ("total 0", vec![told.total]),
        ("total32 0", vec![told.total]),
        ("nvml 0", first),
        ("nvml2 0 2", second),
    ];
    if context {
        right.extend([("info", vec![told.free(), told.total]), ("info32", vec![told.free(), told.total])]);
    }
    let mut said = Vec::new();
    let agree = || {
        said = right.iter().map(|(call, _)| (*call, ask(application, call))).collect();
        said == right
    };
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| TIMEOUT.until("agree", agree))).is_err() {
        panic!("right is {right:?}, and they say {said:?}");
    }
}

fn clients(node: &Node) -> usize {
    status::read(node.dir()).unwrap().gpus.remove(0).clients.len()
}

#[test]
fn driver_and_nvml_agree_at_every_step() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut one = Application::start(node.environment(), &[]);
    assert_eq!(one.call("init"), SUCCESS);
    all_say(&mut one, Told { total: POOL, own: 0, others: 0 }, false);
    assert_eq!(clients(&node), 0, "asking takes no slot");

    assert_eq!(one.call("create"), SUCCESS);
    let empty = Told { total: POOL, own: CONTEXT, others: 0 };
    all_say(&mut one, empty, true);
    let large = one.alloc(20 * MIB);
    all_say(&mut one, Told { own: CONTEXT + 20 * MIB, ..empty }, true);
    // Part of a granule takes all of it.
    let small = one.alloc(1000);
    all_say(&mut one, Told { own: CONTEXT + 22 * MIB, ..empty }, true);

    // Another client's context takes room, its data moves out of the way. It sees the same from its side.
    let mut two = Application::start(node.environment(), &[]);
    assert_eq!(two.call("init"), SUCCESS);
    all_say(&mut two, Told { total: POOL, own: 0, others: CONTEXT }, false);
    assert_eq!(two.call("create"), SUCCESS);
    let data = two.alloc(50 * MIB);
    assert_eq!(two.call(&format!("write {data} {} 7", 50 * MIB)), SUCCESS);
    all_say(&mut two, Told { total: POOL, own: CONTEXT + 50 * MIB, others: CONTEXT }, true);
    all_say(&mut one, Told { total: POOL, own: CONTEXT + 22 * MIB, others: CONTEXT }, true);

    assert_eq!(one.call(&format!("free {large}")), SUCCESS);
    assert_eq!(one.call(&format!("free {small}")), SUCCESS);
    all_say(&mut one, Told { total: POOL, own: CONTEXT, others: CONTEXT }, true);
    assert_eq!(two.ask(&format!("check {data} {} 7", 50 * MIB)), (SUCCESS, "right".into()));
    two.end();
    all_say(&mut one, empty, true);
    assert_eq!(one.call("destroy 0"), SUCCESS);
    all_say(&mut one, Told { total: POOL, own: 0, others: 0 }, false);
    one.end();
}

/// What is said to be free can be had, to the last byte.
#[test]
fn what_is_free_can_be_allocated() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut application = Application::ready(&node);
    all_say(&mut application, Told { total: POOL, own: CONTEXT, others: 0 }, true);
    let address = application.alloc(POOL - CONTEXT);
    assert_eq!(application.call(&format!("write {address} {} 3", POOL - CONTEXT)), SUCCESS);
    all_say(&mut application, Told { total: POOL, own: POOL, others: 0 }, true);
    application.end();
}

/// While its memory moves, what an application frees is given back later. It is told as free all the same, and can be
/// had: whoever needs it waits until it is.
#[test]
fn what_is_freed_while_memory_moves_is_free() {
    let gpu = gpu();
    let node = node(&gpu);
    let (mut one, mut other) = (Application::ready(&node), Application::ready(&node));
    // Whoever came first keeps its turn when it grows.
    let first = one.alloc(8 * MIB);
    one.does(&format!("write {first} {} 2", 8 * MIB));
    let others = other.alloc(40 * MIB);
    other.does(&format!("write {others} {} 1", 40 * MIB));
    let told = Told { total: POOL, own: CONTEXT + 8 * MIB, others: CONTEXT };
    all_say(&mut one, told, true);
    // The other one has what this one needs now, and cannot give it up.
    other.stop();
    let second = one.alloc(30 * MIB);
    TIMEOUT.until("it waits for memory", || {
        let clients = status::read(node.dir()).unwrap().gpus.remove(0).clients;
        clients.iter().any(|client| client.phase == "filling" && client.demand_bytes == 38 * MIB)
    });
    one.does(&format!("free {first}"));
    let told = Told { own: CONTEXT + 30 * MIB, ..told };
    assert_eq!(ask(&mut one, "info"), [told.free(), POOL]);
    let [by_nvml, by_nvml2] = told.by_nvml();
    assert_eq!(ask(&mut one, "nvml 0"), by_nvml);
    assert_eq!(ask(&mut one, "nvml2 0 2"), by_nvml2);

    let call = format!("alloc {}", told.free());
    one.tell(&call);
    other.go_on();
    let (code, third) = one.answer(&call);
    assert_eq!(code, SUCCESS);
    one.does(&format!("write {second} {} 3", 30 * MIB));
    one.does(&format!("write {third} {} 4", told.free()));
    assert_eq!(one.ask(&format!("check {second} {} 3", 30 * MIB)), (SUCCESS, "right".into()));
    assert_eq!(one.ask(&format!("check {third} {} 4", told.free())), (SUCCESS, "right".into()));
    assert_eq!(other.ask(&format!("check {others} {} 1", 40 * MIB)), (SUCCESS, "right".into()));
    assert_eq!(ask(&mut one, "info"), [0, POOL]);
    other.end();
    one.end();
}

#[test]
fn nvml_alone_tells_the_pool_and_takes_no_slot() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut monitor = Application::start(node.environment(), &[]);
    assert_eq!(ask(&mut monitor, "nvml 0"), [POOL, POOL, 0]);
    assert_eq!(clients(&node), 0);
    // What others do shows at the next look.
    let other = Application::ready(&node);
    TIMEOUT
        .until("sees the other's context", || ask(&mut monitor, "nvml 0") == [POOL, POOL - CONTEXT, CONTEXT]);
    other.end();
    monitor.end();
}

#[test]
fn what_nvml_refuses_stays_refused() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut application = Application::ready(&node);
    for call in ["nvml 7", "nvml2 7 2"] {
        assert_eq!(application.call(call), NVML_INVALID_ARGUMENT, "{call}");
    }
    assert_eq!(application.call("nvml2 0 3"), NVML_VERSION_MISMATCH);
    application.works();
    application.end();
}

#[test]
fn sizes_of_32_bits_tell_as_much_as_they_can() {
    let gpu = SimulatedGpu::new(&[("MEMORY", "16GiB".into())]).unwrap();
    let node = Node::start(gpu.environment(&[]), &["--capacity", "8GiB"].map(str::to_owned)).unwrap();
    let mut application = Application::ready(&node);
    assert_eq!(ask(&mut application, "total 0"), [8 << 30]);
    assert_eq!(ask(&mut application, "total32 0"), [u64::from(u32::MAX)]);
    assert_eq!(ask(&mut application, "info32"), [u64::from(u32::MAX); 2]);
    application.end();
}

#[test]
fn whoever_does_without_nvshare_is_told_of_the_card() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut off = Application::start(node.environment(), &[("NVSHARE_DISABLE", "1")]);
    assert_eq!(off.call("init"), SUCCESS);
    assert_eq!(ask(&mut off, "total 0"), [CARD]);
    assert_eq!(ask(&mut off, "nvml 0"), [CARD, CARD, 0]);
    off.end();

    // No arbiter: NVML answers all the same, before and after cuInit.
    let nobody = TempDir::new().unwrap();
    let variables = [
        ("NVSHARE_RUNTIME_DIR", nobody.path().to_str().unwrap()),
        ("NVSHARE_CONNECT_TIMEOUT", "0"),
        ("NVSHARE_ON_MISSING_ARBITER", "passthrough"),
    ];
    let mut alone = Application::start(node.environment(), &variables);
    assert_eq!(ask(&mut alone, "nvml 0"), [CARD, CARD, 0]);
    assert_eq!(alone.call("init"), SUCCESS);
    assert_eq!(ask(&mut alone, "total 0"), [CARD]);
    assert_eq!(ask(&mut alone, "nvml2 0 2"), [CARD, 0, CARD, 0]);
    alone.end();
}

/// The page is there without its arbiter, and whoever has seen it need not ask again.
#[test]
fn an_arbiter_that_is_gone_is_not_missed() {
    let gpu = gpu();
    let node = node(&gpu);
    let start = || {
        let mut application = Application::start(node.environment(), &[("NVSHARE_CONNECT_TIMEOUT", "0.1")]);
        assert_eq!(application.call("init"), SUCCESS);
        application
    };
    let (mut knows, mut late) = (start(), start());
    assert_eq!(ask(&mut knows, "total 0"), [POOL]);
    let arbiter = nix::unistd::Pid::from_raw(node.arbiter_pid() as i32);
    nix::sys::signal::kill(arbiter, nix::sys::signal::Signal::SIGKILL).unwrap();
    TIMEOUT.until("the arbiter is gone", || !nvshare_tools::node::answers(node.dir()));
    assert_eq!(ask(&mut knows, "total 0"), [POOL]);
    assert_eq!(ask(&mut knows, "nvml 0"), [POOL, POOL, 0]);
    assert_eq!(ask(&mut late, "total 0"), [CARD], "nobody has told it");
    knows.end();
    late.end();
}

#[test]
fn python_programs_are_told_the_same() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut python = Command::new("python3");
    python.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/memory_info/figures.py")).envs(node.environment());
    let mut python = Application::started(&mut python);
    let nvml = |told: Told| told.by_nvml().concat();
    let empty = Told { total: POOL, own: 0, others: 0 };
    assert_eq!(ask(&mut python, "nvml"), nvml(empty));
    assert_eq!(ask(&mut python, "child"), nvml(empty), "a child has its parent's list and not its mapping");
    ask(&mut python, "init");
    assert_eq!(ask(&mut python, "driver"), [POOL; 3]);
    ask(&mut python, "create");
    let said =
        |python: &mut Application| [ask(python, "nvml"), ask(python, "driver"), ask(python, "info")].concat();
    let right = |told: Told| [nvml(told), vec![POOL; 3], vec![told.free(), POOL]].concat();
    for (call, own) in [("nvml", CONTEXT), ("alloc 30000000", CONTEXT + 30 * MIB), ("free", CONTEXT)] {
        ask(&mut python, call);
        let right = right(Told { own, ..empty });
        TIMEOUT.until(&format!("{call}: {right:?}"), || said(&mut python) == right);
    }
    python.end();
}
