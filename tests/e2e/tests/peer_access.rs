//! Memory of one GPU that a context on another one may use: its kernels and copies find the right bytes, wherever the
//! memory has been meanwhile, and none when they may use it no more.

use nvshare_e2e::application::books::{Competitor, balances};
use nvshare_e2e::application::{Application, MIB, SUCCESS, node};
use nvshare_test_support::Patience;
use nvshare_tools::node::{Environment, Node, SimulatedGpu};
use nvshare_tools::status;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

const TIMEOUT: Patience = Patience::seconds(60);

const ILLEGAL_ADDRESS: i32 = 700;
const ALREADY_ENABLED: i32 = 704;
const NOT_ENABLED: i32 = 705;

const LARGE: u64 = 12 * MIB;
const SMALL: u64 = 64 << 10;

/// A machine with two GPUs of 256 MiB, and a link that costs next to nothing.
fn two_gpus(more: &[(&'static str, &str)]) -> SimulatedGpu {
    let two = [("GPUS", "2"), ("MEMORY", "256MiB"), ("CONTEXT_BYTES", "2MiB"), ("LINK_BANDWIDTH", "256GiB")];
    let settings: Vec<_> = two.iter().chain(more).map(|(name, value)| (*name, (*value).to_owned())).collect();
    SimulatedGpu::new(&settings).expect("the workspace is built: cargo build --workspace")
}

/// A process with context 0 on GPU 0 and context 1 on GPU 1.
fn on_both(environment: Environment) -> Application {
    let mut application = Application::start(environment, &[]);
    for call in ["init", "create 0", "create 1"] {
        application.does(call);
    }
    application
}

/// Memory of GPU 0, and what kernels have made of it.
struct Data {
    address: u64,
    words: u64,
    seed: u64,
    mixes: Vec<u64>,
}

impl Data {
    /// Allocated and written by context 0.
    fn new(application: &mut Application, bytes: u64, seed: u64) -> Self {
        application.does("use 0");
        let (address, words) = (application.alloc(bytes), bytes / 8);
        application.does(&format!("iota {address} {words} {seed} 0"));
        application.does("synchronize 0");
        Self { address, words, seed, mixes: Vec::new() }
    }

    /// A kernel of this context reads and writes all of it.
    #[track_caller]
    fn mix(&mut self, application: &mut Application, context: u64) {
        let seed = 1000 * context + self.mixes.len() as u64;
        application.does(&format!("use {context}"));
        application.does(&format!("mix {} {} {seed} 0", self.address, self.words));
        application.does("synchronize 0");
        self.mixes.push(seed);
    }

    /// The copy at `address` is right, as this context sees it.
    #[track_caller]
    fn is_at(&self, application: &mut Application, address: u64, context: u64) {
        application.does(&format!("use {context}"));
        self.part_is_at(application, address, 0..self.words);
    }

    /// The words of these numbers are at `address`, as the current context sees it.
    #[track_caller]
    fn part_is_at(&self, application: &mut Application, address: u64, part: Range<u64>) {
        let mixes: String = self.mixes.iter().map(|seed| format!(" {seed}")).collect();
        let (words, seed) = (part.end - part.start, self.seed + part.start);
        let seen = application.ask(&format!("mixed {address} {words} {seed}{mixes}"));
        assert_eq!(seen, (SUCCESS, "right".into()), "the words {part:?} at {address:#x}");
    }

    /// It is right, as both contexts see it.
    #[track_caller]
    fn is_right(&self, application: &mut Application) {
        self.is_at(application, self.address, 0);
        self.is_at(application, self.address, 1);
    }

    fn free(self, application: &mut Application) {
        application.does(&format!("free {}", self.address));
    }
}

/// Nothing of it is left on the GPU of the competitor, and of nobody on either GPU.
fn over(node: &Node, mut one: Application, other: Competitor, all: impl IntoIterator<Item = Data>) {
    all.into_iter().for_each(|data| data.free(&mut one));
    TIMEOUT.until("all is given back", || other.beside_it(node, &one).demand_bytes == 0);
    let said = one.ends_well();
    assert!(!said.contains("WARN"), "{said}");
    other.ends();
    balances(node);
    let gpus = || status::read(node.dir()).unwrap().gpus;
    TIMEOUT.until("all clients are reaped", || gpus().iter().all(|gpu| gpu.clients.is_empty()));
    for gpu in gpus() {
        assert_eq!((gpu.free_bytes, gpu.repaired), (gpu.capacity_bytes as i64, 0), "of {}", gpu.uuid);
    }
}

#[test]
fn a_peer_reaches_what_was_there_before_it_asked_and_what_came_after() {
    let gpu = two_gpus(&[]);
    let node = node(&gpu);
    let mut one = on_both(node.environment());
    let before = [Data::new(&mut one, LARGE, 1), Data::new(&mut one, SMALL, 2)];
    one.does("use 1");
    one.does("enable-peer 0");
    assert_eq!(one.call("enable-peer 0"), ALREADY_ENABLED);
    // The small ones are parts of the same granule.
    let mut all = Vec::from(before);
    all.extend([Data::new(&mut one, LARGE, 3), Data::new(&mut one, SMALL, 4)]);
    for data in &mut all {
        data.mix(&mut one, 1);
        data.is_right(&mut one);
    }
    let mut other = Competitor::start(&node);
    for round in 0..5 {
        other.takes_all(&node, &one);
        if round == 2 {
            // One that comes while the others are away.
            all.push(Data::new(&mut one, LARGE, 5));
            other.takes_all(&node, &one);
        }
        // Whichever context comes first has it brought back for both.
        for data in &mut all {
            data.mix(&mut one, 1);
            data.mix(&mut one, 0);
            data.is_right(&mut one);
        }
        other.takes_all(&node, &one);
        for data in &all {
            data.is_right(&mut one);
        }
    }
    let out = other.beside_it(&node, &one).bytes_out;
    assert!(out >= 9 * 2 * LARGE, "it was out twice in each round: {out}");
    over(&node, one, other, all);
}

/// Asked for, and given up, while the memory is in host memory.
#[test]
fn rights_that_change_while_the_memory_is_out_hold_when_it_is_back() {
    let gpu = two_gpus(&[]);
    let node = node(&gpu);
    let (mut one, mut other) = (on_both(node.environment()), Competitor::start(&node));
    let mut all = [Data::new(&mut one, LARGE, 1), Data::new(&mut one, SMALL, 2)];
    one.does("use 1");
    for _ in 0..3 {
        other.takes_all(&node, &one);
        one.does("enable-peer 0");
        assert_eq!(other.beside_it(&node, &one).resident_bytes, 0, "asking needs no turn");
        for data in &mut all {
            data.mix(&mut one, 1);
            data.is_right(&mut one);
        }
        other.takes_all(&node, &one);
        one.does("disable-peer 0");
        assert_eq!(one.call("disable-peer 0"), NOT_ENABLED);
        for data in &all {
            data.is_at(&mut one, data.address, 0);
            assert_eq!(one.number(&format!("rights {} 1", data.address)), 0, "it was taken back");
        }
        one.does("use 1");
    }
    over(&node, one, other, all);
}

/// What GPU 0 cannot have lies in host memory, and the other GPU uses it from there.
#[test]
fn a_peer_reaches_what_lies_in_host_memory_for_want_of_room() {
    const POOL: u64 = 64 * MIB;
    const CONTEXT: u64 = 2 * MIB;
    let gpu = two_gpus(&[]);
    let node = node(&gpu);
    let mut one = on_both(node.environment());
    let mut all = [Data::new(&mut one, 40 * MIB, 1), Data::new(&mut one, POOL - CONTEXT - 40 * MIB, 2)];
    let mut onlookers = [(); 3].map(|()| Application::ready(&node));
    let mut other = Competitor::beside(&node, 4);
    let spilled = POOL - 5 * CONTEXT;
    one.does("use 1");
    one.does("enable-peer 0");
    for _ in 0..3 {
        other.takes_all(&node, &one);
        for data in &mut all {
            data.mix(&mut one, 1);
            data.is_right(&mut one);
        }
        assert_eq!(other.beside_it(&node, &one).resident_bytes, spilled, "the rest is in host memory");
    }
    // Given up and asked for again while it is there.
    one.does("disable-peer 0");
    for data in &all {
        for granule in (data.address..data.address + 8 * data.words).step_by(2 << 20) {
            assert_eq!(one.number(&format!("rights {granule} 1")), 0, "also in host memory");
        }
    }
    one.does("enable-peer 0");
    all[1].mix(&mut one, 1);
    all[0].mix(&mut one, 1);
    onlookers.iter_mut().for_each(Application::works);
    onlookers.into_iter().for_each(|onlooker| drop(onlooker.end()));
    TIMEOUT.until("all is at home that there is room for", || {
        other.sees_its_own();
        all[0].is_right(&mut one);
        other.beside_it(&node, &one).resident_bytes == POOL - 2 * CONTEXT
    });
    for data in &mut all {
        data.is_right(&mut one);
        data.mix(&mut one, 1);
        data.is_right(&mut one);
    }
    over(&node, one, other, all);
}

/// Who has asked is a context, not a GPU.
#[test]
fn one_contexts_rights_outlive_anothers() {
    let gpu = two_gpus(&[]);
    let node = node(&gpu);
    let mut one = on_both(node.environment());
    // Two contexts on each GPU: 0 and 2 on the first, 1 and 3 on the second.
    one.does("create 0");
    one.does("create 1");
    let mut other = Competitor::beside(&node, 2);
    let mut data = Data::new(&mut one, LARGE, 1);
    let mut reached = |one: &mut Application, other: &mut Competitor| {
        for _ in 0..2 {
            data.mix(one, 1);
            data.is_right(one);
            other.takes_all(&node, one);
        }
    };
    one.does("use 1");
    one.does("enable-peer 0");
    reached(&mut one, &mut other);
    // Another one on the same GPU asks as well, and gives up.
    one.does("use 3");
    one.does("enable-peer 0");
    one.does("disable-peer 0");
    reached(&mut one, &mut other);
    // The same one asks for the memory of another context as well, and gives that up.
    one.does("use 1");
    one.does("enable-peer 2");
    one.does("disable-peer 2");
    reached(&mut one, &mut other);
    // A context that had asked goes.
    one.does("use 3");
    one.does("enable-peer 0");
    one.does("destroy 3");
    reached(&mut one, &mut other);
    one.does("use 1");
    one.does("disable-peer 0");
    data.is_at(&mut one, data.address, 0);
    assert_eq!(one.number(&format!("rights {} 1", data.address)), 0, "nobody asks any more");
    over(&node, one, other, [data]);
}

/// A context that is gone has no rights, and its GPU has none by it.
#[test]
fn rights_go_with_their_context() {
    let gpu = two_gpus(&[]);
    let node = node(&gpu);
    for owner_goes in [true, false] {
        let mut one = on_both(node.environment());
        let mut data = Data::new(&mut one, LARGE, 1);
        if owner_goes {
            // Whoever may use the memory of one context may use no other's when that one goes.
            one.does("create 0");
            one.does("use 1");
            one.does("enable-peer 2");
            one.does("destroy 2");
        } else {
            one.does("use 1");
            one.does("enable-peer 0");
            data.mix(&mut one, 1);
            one.does("destroy 1");
            one.does("create 1");
        }
        one.does("use 0");
        let allowed = |one: &mut Application| one.number(&format!("rights {} 1", data.address));
        assert_eq!(allowed(&mut one), 0, "the owner goes: {owner_goes}");
        let mut other = Competitor::start(&node);
        other.takes_all(&node, &one);
        data.is_at(&mut one, data.address, 0);
        assert_eq!(allowed(&mut one), 0, "and it does not come back with the memory");
        over(&node, one, other, [data]);
    }
}

/// An access that is made when it is allowed no more.
struct Refused {
    /// What `takes_all` of a competitor comes before, if there is one.
    out: bool,
    bytes: u64,
    call: fn(address: u64, own: u64, words: u64) -> String,
}

/// What the application hears: of the access and of the wait for it, then in the context that made it, and in the
/// other one. An illegal access breaks both.
fn hears(mut one: Application, access: &Refused, between: impl FnOnce(&Application)) -> Vec<(i32, String)> {
    let mut data = Data::new(&mut one, access.bytes, 1);
    one.does("use 1");
    let own = one.alloc(access.bytes);
    one.does("enable-peer 0");
    data.mix(&mut one, 1);
    one.does("disable-peer 0");
    between(&one);
    let words = data.words;
    let calls = [
        (access.call)(data.address, own, words),
        "synchronize 0".into(),
        format!("iota {own} {words} 1 0"),
        "use 0".into(),
        "synchronize 0".into(),
        format!("mixed {} {words} 1 1000", data.address),
    ];
    calls.iter().map(|call| one.ask(call)).collect()
}

/// With and without nvshare, wherever the memory was.
#[test]
fn what_is_given_up_is_refused_as_the_driver_refuses_it() {
    let gpu = two_gpus(&[]);
    let calls: [fn(u64, u64, u64) -> String; 2] = [
        |address, _, words| format!("mix {address} {words} 7 0"),
        |address, _, words| format!("iota {address} {words} 7 0"),
    ];
    for call in calls {
        for (bytes, out) in [(LARGE, false), (LARGE, true), (SMALL, false), (SMALL, true)] {
            let access = Refused { out, bytes, call };
            let native = hears(on_both(gpu.environment(&[])), &access, |_| ());
            assert_eq!(native[1].0, ILLEGAL_ADDRESS, "the test means that the driver refuses it");
            assert_eq!(native[4].0, ILLEGAL_ADDRESS, "and that this breaks the other context as well");
            let node = node(&gpu);
            let one = on_both(node.environment());
            let mut other = Competitor::start(&node);
            let shared = hears(one, &access, |one| {
                if access.out {
                    other.takes_all(&node, one)
                }
            });
            assert_eq!(shared, native, "{bytes} B, out: {out}");
        }
    }
}

/// The memory of both GPUs is out before each copy. A copy between the memory of two contexts needs nobody's leave.
#[test]
fn copies_between_gpus_bring_both_ends_back() {
    const ROW: u64 = 64 << 10;
    const ROWS: u64 = LARGE / (2 * ROW);
    let gpu = two_gpus(&[]);
    let node = node(&gpu);
    let mut one = on_both(node.environment());
    let mut others = [0, 1].map(|device| Competitor::on(&node, device, 1));
    let mut here = Data::new(&mut one, LARGE, 1);
    let back = one.alloc(LARGE);
    one.does("use 1");
    let (there, stream) = (one.alloc(LARGE), one.number("stream 1"));
    let mut takes_both = |one: &Application| others.iter_mut().for_each(|other| other.takes_all(&node, one));
    for _ in 0..3 {
        here.mix(&mut one, 0);
        takes_both(&one);
        one.does(&format!("copy-peer {there} 1 {} 0 {LARGE}", here.address));
        takes_both(&one);
        here.is_at(&mut one, there, 1);
        one.does(&format!("copy-peer-async {back} 0 {there} 1 {LARGE} {stream}"));
        one.does(&format!("synchronize {stream}"));
        takes_both(&one);
        here.is_at(&mut one, back, 0);
        // The rows between are those from before.
        let before = here.mixes.clone();
        here.mix(&mut one, 0);
        takes_both(&one);
        one.does(&format!("copy-rows-peer {there} 1 {} 0 {ROW} {ROWS}", here.address));
        takes_both(&one);
        one.does("use 1");
        let old = Data { mixes: before, ..here };
        for row in 0..2 * ROWS {
            let part = row * ROW / 8..(row + 1) * ROW / 8;
            let from = if row % 2 == 0 { &here } else { &old };
            from.part_is_at(&mut one, there + row * ROW, part);
        }
    }
    for (address, context) in [(back, 0), (there, 1)] {
        one.does(&format!("use {context}"));
        one.does(&format!("free {address}"));
    }
    let [other, on_the_second] = others;
    on_the_second.ends();
    over(&node, one, other, [here]);
}

/// Kernels and copies of both contexts, in each other's memory, are on their way when others want the GPUs: those get
/// their turns, and nothing is done while memory is out.
#[test]
fn others_get_both_gpus_while_work_goes_across() {
    const ROUNDS: u64 = 40;
    let gpu = two_gpus(&[]);
    let node = node(&gpu);
    let mut one = on_both(node.environment());
    let mut others = [0, 1].map(|device| Competitor::on(&node, device, 1));
    let mut here = Data::new(&mut one, LARGE, 1);
    one.does("enable-peer 1");
    one.does("use 1");
    one.does("enable-peer 0");
    let there = one.alloc(LARGE);
    others.iter_mut().for_each(|other| other.takes_all(&node, &one));
    let bytes_out = |other: &Competitor, one: &Application| other.beside_it(&node, one).bytes_out;
    let before = [0, 1].map(|device| bytes_out(&others[device], &one));
    let over_yet = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for other in &mut others {
            scope.spawn(|| other.works_until(|| over_yet.load(Ordering::Relaxed)));
        }
        let ended = OnDrop(&over_yet);
        for round in 0..ROUNDS {
            let (address, words) = (here.address, here.words);
            // Each context's kernels work on the other's memory, and each copies its own there or fetches it.
            let calls = [
                format!("use {}", round % 2),
                format!("mix {address} {words} {} 0", 2 * round),
                format!("copy {there} {address} {LARGE} 0"),
                format!("mix {there} {words} {} 0", 2 * round + 1),
                format!("copy {address} {there} {LARGE} 0"),
                "synchronize 0".into(),
            ];
            calls.iter().for_each(|call| one.tell(call));
            for call in &calls {
                assert_eq!(one.answer(call).0, SUCCESS, "{call}");
            }
            here.mixes.extend([2 * round, 2 * round + 1]);
        }
        drop(ended);
    });
    for (other, before) in others.iter().zip(before) {
        assert!(bytes_out(other, &one) > before, "nothing was ever out during the work");
    }
    here.is_right(&mut one);
    here.is_at(&mut one, there, 0);
    here.is_at(&mut one, there, 1);
    one.does(&format!("free {there}"));
    let [other, on_the_second] = others;
    on_the_second.ends();
    over(&node, one, other, [here]);
}

/// Tells those who work until something is over, also if it fails.
struct OnDrop<'a>(&'a AtomicBool);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
