//! A client that needs more than the GPU can give it: the rest lies in host memory, its data is right from there,
//! and it comes home when there is room again.

use nvshare_e2e::application::books::{Competitor, balances, books, client, clients, come_to};
use nvshare_e2e::application::{Application, MIB, SUCCESS, node, quick_gpu};
use nvshare_test_support::Patience;
use nvshare_tools::node::Node;

const TIMEOUT: Patience = Patience::seconds(60);

const OUT_OF_MEMORY: i32 = 2;
const NOT_SUPPORTED: i32 = 801;

const POOL: u64 = 64 * MIB;
/// On the simulated GPU of these tests.
const CONTEXT: u64 = 2 * MIB;

/// A recording during which nothing is forbidden.
const RELAXED: u32 = 2;

/// Memory of every kind, which the GPU has just room for beside one context.
struct Everything {
    whole: u64,
    object: u64,
    views: [u64; 2],
    small: [u64; 2],
    untouched: u64,
}

impl Everything {
    const WHOLE: u64 = 36 * MIB;
    const OBJECT: u64 = 16 * MIB;
    const SMALL: u64 = MIB / 2;
    const UNTOUCHED: u64 = 8 * MIB;
    /// With the slab that the small ones share, and that has room for one more.
    const ALL: u64 = Self::WHOLE + Self::OBJECT + 2 * MIB + Self::UNTOUCHED;

    const IN_USE: u64 = Self::ALL - Self::UNTOUCHED;

    fn of(application: &mut Application) -> Self {
        let whole = application.alloc(Self::WHOLE);
        let object = application.object(Self::OBJECT);
        let range = application.reserve(2 * Self::OBJECT);
        let views = [range, range + Self::OBJECT];
        views.iter().for_each(|view| application.map(*view, Self::OBJECT, object));
        let small = [(); 2].map(|()| application.alloc(Self::SMALL));
        let untouched = application.alloc(Self::UNTOUCHED);
        Self { whole, object, views, small, untouched }
    }

    fn write(&self, application: &mut Application, seed: u64) {
        application.writes(self.whole, Self::WHOLE, seed);
        application.writes(self.views[seed as usize % 2], Self::OBJECT, seed + 1);
        for (address, seed) in self.small.iter().zip(seed + 2..) {
            application.writes(*address, Self::SMALL, seed);
        }
    }

    #[track_caller]
    fn check(&self, application: &mut Application, seed: u64) {
        application.sees(self.whole, Self::WHOLE, seed);
        self.views.iter().for_each(|view| application.sees(*view, Self::OBJECT, seed + 1));
        for (address, seed) in self.small.iter().zip(seed + 2..) {
            application.sees(*address, Self::SMALL, seed);
        }
        application.sees_zeros(self.untouched, Self::UNTOUCHED);
    }

    fn free(self, application: &mut Application) {
        for address in [self.whole, self.untouched].iter().chain(&self.small) {
            application.does(&format!("free {address}"));
        }
        application.unmap(self.views[0], 2 * Self::OBJECT);
        application.release(self.object);
    }
}

/// So many others that have a context, and nothing else in the end.
fn onlookers<const COUNT: usize>(node: &Node) -> [Application; COUNT] {
    let mut onlookers = [(); COUNT].map(|()| Application::ready(node));
    TIMEOUT.until("all contexts are counted", || {
        clients(node).iter().all(|client| client.pinned_bytes == CONTEXT)
    });
    // Whoever has too much makes room when somebody asks for it.
    onlookers[0].works();
    onlookers
}

/// Waits until the client, which works on, has these bytes of what it needs on the GPU.
#[track_caller]
fn has(node: &Node, application: &mut Application, address: u64, resident: u64) {
    TIMEOUT.until(&format!("{resident} B are on the GPU"), || {
        // Only who runs has what it can have: the call goes through the gate.
        application.does(&format!("write {address} 8 0"));
        books(node, application).1 == resident
    });
}

#[test]
fn what_the_contexts_of_others_take_lies_in_host_memory_until_they_go() {
    const OTHERS: usize = 4;
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = Application::ready(&node);
    let all = Everything::of(&mut one);
    all.write(&mut one, 10);
    let mark = one.alloc(8);
    assert_eq!(books(&node, &one), (Everything::ALL, Everything::ALL, 0));
    assert_eq!(Everything::ALL + CONTEXT, POOL, "the test means that all of the pool is taken");
    for round in 0..3 {
        let others = onlookers::<OTHERS>(&node);
        let left = POOL - (1 + OTHERS as u64) * CONTEXT;
        has(&node, &mut one, mark, left);
        all.check(&mut one, 10 + round);
        // Kernels and copies work on all of it from there.
        all.write(&mut one, 11 + round);
        all.check(&mut one, 11 + round);
        others.into_iter().for_each(|other| drop(other.end()));
        // It comes home by itself, also if the application makes no call.
        come_to(&node, &one, (Everything::ALL, Everything::ALL, 0));
        all.check(&mut one, 11 + round);
    }
    one.does(&format!("free {mark}"));
    all.free(&mut one);
    come_to(&node, &one, (0, 0, 0));
    one.ends_well();
    balances(&node);
}

/// What lies in host memory stays there while the rest takes its turns on the GPU.
#[test]
fn who_lies_in_host_memory_in_part_takes_turns_with_the_rest() {
    const BEFORE: u64 = POOL - CONTEXT;
    const NOW: u64 = POOL - 4 * CONTEXT;
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = Application::ready(&node);
    let all = Everything::of(&mut one);
    all.write(&mut one, 1);
    let onlookers = onlookers::<2>(&node);
    let mut other = Competitor::beside(&node, 3);
    for round in 0..5 {
        other.takes_all(&node, &one);
        all.check(&mut one, 1 + round);
        assert_eq!(books(&node, &one), (BEFORE, NOW, 0));
        all.write(&mut one, 2 + round);
        other.takes_all(&node, &one);
        // Written while part of it was in host memory, read after it was brought in and out.
        all.check(&mut one, 2 + round);
    }
    assert!(client(&node, &one).bytes_out > 0);
    onlookers.into_iter().for_each(|other| drop(other.end()));
    // The other's context stays, so not all comes home: as much as there is room for, whenever it is filled.
    TIMEOUT.until("all is at home that there is room for", || {
        other.sees_its_own();
        one.does(&format!("write {} 8 0", all.small[0]));
        books(&node, &one).1 == POOL - 2 * CONTEXT
    });
    all.write(&mut one, 90);
    all.check(&mut one, 90);
    other.ends();
    has(&node, &mut one, all.small[0], BEFORE);
    all.write(&mut one, 91);
    all.check(&mut one, 91);
    all.free(&mut one);
    come_to(&node, &one, (0, 0, 0));
    one.ends_well();
    balances(&node);
}

/// Freed, unmapped and mapped from host memory; and what is there cannot be handed on.
#[test]
fn what_lies_in_host_memory_is_freed_mapped_and_refused_like_any_other() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = Application::ready(&node);
    let all = Everything::of(&mut one);
    all.write(&mut one, 5);
    let others = [(); 3].map(|()| Application::ready(&node));
    let mut competitor = Competitor::beside(&node, 4);
    // All of it is out at once, so all of it has its part in what is not on the GPU then.
    competitor.takes_all(&node, &one);
    all.check(&mut one, 5);
    all.write(&mut one, 6);
    assert_eq!(books(&node, &one), (Everything::ALL, POOL - 5 * CONTEXT, 0));
    assert_eq!(
        client(&node, &one).bytes_in,
        Everything::IN_USE,
        "each byte is copied once, wherever it goes"
    );
    assert_eq!(one.call(&format!("ipc-get {}", all.whole)), NOT_SUPPORTED, "part of it is no GPU's");
    // A view more or less while part of the object is there.
    let more = one.reserve(Everything::OBJECT);
    one.map(more, Everything::OBJECT, all.object);
    one.sees(more, Everything::OBJECT, 7);
    one.writes(more, Everything::OBJECT, 70);
    one.sees(all.views[0], Everything::OBJECT, 70);
    one.unmap(more, Everything::OBJECT);
    // As natively: there is nothing left to be unmapped.
    one.unmap(more, Everything::OBJECT);
    one.sees(all.views[1], Everything::OBJECT, 70);
    // With less to need, the rest fits, and comes home.
    one.does(&format!("free {}", all.untouched));
    let rest = Everything::ALL - Everything::UNTOUCHED;
    come_to(&node, &one, (rest, rest, 0));
    one.sees(all.whole, Everything::WHOLE, 6);
    one.sees(all.views[0], Everything::OBJECT, 70);
    assert_eq!(one.call(&format!("ipc-get {}", all.whole)), SUCCESS);
    assert_eq!(books(&node, &one).2, Everything::WHOLE);
    competitor.ends();
    others.into_iter().for_each(|other| drop(other.end()));
    one.end();
    balances(&node);
}

#[test]
fn one_process_may_have_more_than_the_gpu_if_it_says_so() {
    const HALF: u64 = 50 * MIB;
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut strict = Application::ready(&node);
    let half = strict.alloc(HALF);
    assert_eq!(strict.call(&format!("alloc {HALF}")), OUT_OF_MEMORY);
    strict.does(&format!("free {half}"));
    strict.ends_having_said(&["an allocation of 50.00 MiB is refused", "NVSHARE_ENABLE_SINGLE_OVERSUB=1"]);

    let mut one = Application::start(node.environment(), &[("NVSHARE_ENABLE_SINGLE_OVERSUB", "1")]);
    one.does("init");
    one.does("create");
    let halves = [one.alloc(HALF), one.alloc(HALF)];
    for (address, seed) in halves.iter().zip(1..) {
        one.writes(*address, HALF, seed);
    }
    let mut other = Competitor::start(&node);
    for round in 0..4 {
        other.takes_all(&node, &one);
        for (address, seed) in halves.iter().zip(round + 1..) {
            one.sees(*address, HALF, seed);
            one.writes(*address, HALF, seed + 1);
        }
        assert_eq!(books(&node, &one), (2 * HALF, POOL - 2 * CONTEXT, 0));
        // The competitor's own data is evicted and filled as ever.
        other.sees_its_own();
    }
    let (stream, words) = (one.number("stream 0"), HALF / 8);
    one.does(&format!("iota {} {words} 3 {stream}", halves[0]));
    one.does(&format!("mix {} {words} 4 {stream}", halves[0]));
    one.does(&format!("synchronize {stream}"));
    other.takes_all(&node, &one);
    assert_eq!(one.ask(&format!("mixed {} {words} 3 4", halves[0])), (SUCCESS, "right".into()));
    one.does(&format!("free {}", halves[0]));
    come_to(&node, &one, (HALF, HALF, 0));
    one.sees(halves[1], HALF, 6);
    one.does(&format!("free {}", halves[1]));
    come_to(&node, &one, (0, 0, 0));
    other.ends();
    one.ends_well();
    balances(&node);
}

/// While a graph is recorded nothing may be moved, and nobody can wait for room: what is allocated then is used from
/// host memory, and comes home after it.
#[test]
fn what_a_recording_allocates_without_room_comes_home_when_it_is_over() {
    const NEW: u64 = 20 * MIB;
    let gpu = quick_gpu();
    let node = node(&gpu);
    let (mut one, mut other) = (Application::ready(&node), Application::ready(&node));
    let (mine, theirs) = (one.alloc(30 * MIB), other.alloc(30 * MIB));
    other.writes(theirs, 30 * MIB, 2);
    one.writes(mine, 30 * MIB, 1);
    assert_eq!(books(&node, &other).1, 30 * MIB, "the test means that both fit");
    let stream = one.number("stream 1");
    one.does(&format!("begin {stream} {RELAXED}"));
    let new = one.alloc(NEW);
    assert_eq!(books(&node, &one), (30 * MIB + NEW, 30 * MIB, 0));
    one.does(&format!("iota {new} {} 7 {stream}", NEW / 8));
    let graph = one.number(&format!("end {stream}"));
    let mark = one.alloc(8);
    has(&node, &mut one, mark, 52 * MIB);
    let exec = one.number(&format!("instantiate {graph}"));
    one.does(&format!("launch {exec} {stream}"));
    one.does(&format!("synchronize {stream}"));
    assert_eq!(one.ask(&format!("mixed {new} {} 7", NEW / 8)), (SUCCESS, "right".into()));
    other.sees(theirs, 30 * MIB, 2);
    one.sees(mine, 30 * MIB, 1);
    for address in [mine, new, mark] {
        one.does(&format!("free {address}"));
    }
    come_to(&node, &one, (0, 0, 0));
    one.end();
    other.end();
    balances(&node);
}
