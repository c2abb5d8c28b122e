//! Stream-ordered memory under the shim: an application gets what the driver would give it, in the order of its
//! streams, and its memory moves out and in like all else.
//!
//! A stream is held while a test looks, so that no verdict depends on how fast anything is.

use nvshare_e2e::application::{Application, INVALID_VALUE, MIB, SUCCESS, gpu, node};
use nvshare_test_support::{Dice, Patience};
use nvshare_tools::node::Node;
use nvshare_tools::status;

const TIMEOUT: Patience = Patience::seconds(60);

const OUT_OF_MEMORY: i32 = 2;
const NOT_READY: i32 = 600;

/// The thread's own default stream, by name.
const PER_THREAD: u64 = 2;

const INTERNAL_DEPENDENCIES: u32 = 3;
const THRESHOLD: u32 = 4;
const RESERVED: u32 = 5;
const RESERVED_HIGH: u32 = 6;
const USED: u32 = 7;
const USED_HIGH: u32 = 8;

/// What a pool takes at a time.
const SEGMENT: u64 = 32 * MIB;

fn demand(node: &Node, application: &Application) -> u64 {
    let clients = status::read(node.dir()).unwrap().gpus.remove(0).clients;
    clients
        .iter()
        .find(|client| application.client() == format!("nvshare[{}]", client.pid))
        .unwrap()
        .demand_bytes
}

#[test]
fn a_stream_has_its_memory_back_at_once_and_another_when_the_free_is_over() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut app = Application::ready(&node);
    let (first, second) = (app.stream(), app.stream());
    let block = app.alloc_in(20 * MIB, first);
    app.does(&format!("hold {first}"));
    app.free_in(block, first);
    assert_eq!(app.alloc_in(20 * MIB, first), block, "in the stream's own order it is free");
    app.free_in(block, first);
    let other = app.alloc_in(20 * MIB, second);
    assert_ne!(other, block, "work of the first stream may still use it");
    app.does("let-go");
    app.does(&format!("synchronize {first}"));
    assert_eq!(app.alloc_in(20 * MIB, second), block, "the free is over");
    app.end();
}

/// The same for the two default streams, which are marked and not asked.
#[test]
fn a_free_in_the_legacy_stream_comes_after_the_streams_that_it_waits_for() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut app = Application::ready(&node);
    let (blocking, other) = (app.number("stream 0"), app.stream());
    let block = app.alloc_in(20 * MIB, 0);
    app.does(&format!("hold {blocking}"));
    app.free_in(block, 0);
    let spare = app.alloc_in(20 * MIB, other);
    assert_ne!(spare, block, "the blocking stream may still use it");
    app.does("let-go");
    app.does("synchronize 0");
    assert_eq!(app.number(&format!("alloc-async {} {other}", 20 * MIB)), block);
    app.free_in(block, other);
    app.does(&format!("synchronize {other}"));
    assert_eq!(app.number(&format!("alloc-per-thread {}", 20 * MIB)), block);
    app.does(&format!("free {spare}"));
    app.does(&format!("hold {PER_THREAD}"));
    app.does(&format!("free-per-thread {block}"));
    assert_eq!(app.alloc_in(20 * MIB, other), spare);
    assert_eq!(app.number(&format!("alloc-per-thread {}", 20 * MIB)), block, "it is this stream's own");
    app.does(&format!("free-per-thread {block}"));
    app.does("let-go");
    app.does(&format!("synchronize {PER_THREAD}"));
    assert_eq!(app.alloc_in(20 * MIB, other), block);
    app.end();
}

/// There is no room for a second block: the stream is made to wait for the first one's.
#[test]
fn without_room_a_stream_waits_for_anothers_free() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut app = Application::ready(&node);
    let (first, second) = (app.stream(), app.stream());
    let block = app.alloc_in(40 * MIB, first);
    app.does(&format!("hold {first}"));
    app.does(&format!("set {block} {} 1 {first}", 40 * MIB));
    app.free_in(block, first);
    assert_eq!(app.alloc_in(40 * MIB, second), block);
    app.does(&format!("set {block} {} 2 {second}", 40 * MIB));
    assert_eq!(app.call(&format!("query {second}")), NOT_READY, "it does not wait for the first stream");
    app.does("let-go");
    app.does(&format!("synchronize {second}"));
    assert_eq!(app.ask(&format!("holds {block} {} 2", 40 * MIB)), (SUCCESS, "right".into()));
    app.end();
}

/// If the pool forbids that, the call itself waits until the memory is there.
#[test]
fn without_leave_to_wait_in_the_stream_the_call_waits() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut app = Application::ready(&node);
    let (first, second) = (app.stream(), app.stream());
    let pool = app.number("default-pool");
    app.does(&format!("pool-set {pool} {INTERNAL_DEPENDENCIES} 0"));
    let block = app.alloc_in(40 * MIB, first);
    app.does(&format!("set {block} {} 1 {first}", 40 * MIB));
    app.free_in(block, first);
    let again = app.alloc_in(50 * MIB, second);
    app.does(&format!("set {again} {} 2 {second}", 50 * MIB));
    app.does(&format!("synchronize {second}"));
    assert_eq!(app.ask(&format!("holds {again} {} 2", 50 * MIB)), (SUCCESS, "right".into()));
    assert_eq!(app.call(&format!("alloc-async {} {second}", 50 * MIB)), OUT_OF_MEMORY);
    app.ends_having_said(&["stream-ordered allocation of 50.00 MiB is refused", "is in use"]);
}

#[test]
fn small_allocations_share_mappings_and_keep_their_bytes() {
    const ROUNDS: u64 = 2000;
    let mut dice = Dice::from_environment(0x5eed);
    let gpu = gpu();
    let node = node(&gpu);
    let mut app = Application::ready(&node);
    let streams = [app.stream(), app.stream(), 0];
    let before = app.number("creates");
    let mut live: Vec<(u64, u64, u64)> = Vec::new();
    for round in 0..ROUNDS {
        let stream = streams[dice.below(3) as usize];
        if live.len() > 100 || (live.len() > 3 && dice.below(2) == 0) {
            let (address, bytes, value) = live.swap_remove(dice.below(live.len() as u64) as usize);
            // Whoever wrote it, all work is done: so it may be freed in any stream.
            assert_eq!(app.ask(&format!("holds {address} {bytes} {value}")), (SUCCESS, "right".into()));
            app.free_in(address, stream);
        } else {
            let (bytes, value) = (1 + dice.below(64 << 10), round % 251);
            let address = app.alloc_in(bytes, stream);
            assert_eq!(address % 512, 0);
            app.does(&format!("set {address} {bytes} {value} {stream}"));
            app.does(&format!("synchronize {stream}"));
            live.push((address, bytes, value));
        }
    }
    assert_eq!(app.number("creates") - before, 1, "one segment for {ROUNDS} calls");
    app.end();
}

#[test]
fn a_pool_tells_what_it_has_and_gives_back_what_it_does_not_keep() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut app = Application::ready(&node);
    let (stream, pool) = (app.stream(), app.number("default-pool"));
    let all = app.left();
    let block = app.alloc_in(1000, stream);
    assert_eq!((app.pool_get(pool, USED), app.pool_get(pool, RESERVED)), (1024, SEGMENT));
    assert_eq!(app.left(), all - SEGMENT, "what a pool has is used, as the driver counts it");
    app.does(&format!("pool-set {pool} {THRESHOLD} {}", u64::MAX));
    app.free_in(block, stream);
    app.does(&format!("synchronize {stream}"));
    assert_eq!((app.pool_get(pool, USED), app.pool_get(pool, RESERVED)), (0, SEGMENT), "it keeps it");
    app.does(&format!("trim {pool} {SEGMENT}"));
    assert_eq!(app.pool_get(pool, RESERVED), SEGMENT, "so much was to be kept");
    app.does(&format!("trim {pool} 0"));
    assert_eq!((app.pool_get(pool, RESERVED), app.left()), (0, all));
    assert_eq!((app.pool_get(pool, USED_HIGH), app.pool_get(pool, RESERVED_HIGH)), (1024, SEGMENT));
    app.does(&format!("pool-set {pool} {USED_HIGH} 0"));
    app.does(&format!("pool-set {pool} {RESERVED_HIGH} 0"));
    assert_eq!((app.pool_get(pool, USED_HIGH), app.pool_get(pool, RESERVED_HIGH)), (0, 0));
    // Without a threshold it is gone once the application has waited and looks.
    app.does(&format!("pool-set {pool} {THRESHOLD} 0"));
    let block = app.alloc_in(50 * MIB, stream);
    app.does(&format!("hold {stream}"));
    app.free_in(block, stream);
    assert_eq!(app.left(), all - 50 * MIB, "the stream may still use it");
    app.does("let-go");
    app.does(&format!("synchronize {stream}"));
    assert_eq!(app.left(), all);
    assert_eq!(app.pool_get(pool, THRESHOLD), 0);
    app.end();
}

/// What a pool keeps for itself makes room for cuMemAlloc too.
#[test]
fn what_a_pool_keeps_does_not_stand_in_the_way() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut app = Application::ready(&node);
    let (stream, pool) = (app.stream(), app.number("default-pool"));
    app.does(&format!("pool-set {pool} {THRESHOLD} {}", u64::MAX));
    let block = app.alloc_in(40 * MIB, stream);
    app.free_in(block, stream);
    app.does(&format!("synchronize {stream}"));
    let plain = app.alloc(50 * MIB);
    assert_eq!(app.pool_get(pool, RESERVED), 0);
    app.does(&format!("free {plain}"));
    app.end();
}

#[test]
fn each_kind_of_memory_is_freed_by_either_call() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut app = Application::ready(&node);
    let (first, second) = (app.stream(), app.stream());
    let all = app.left();
    // cuMemFree says that nobody uses it any more, whatever the streams do.
    let block = app.alloc_in(20 * MIB, first);
    app.does(&format!("hold {first}"));
    app.does(&format!("free {block}"));
    assert_eq!(app.call(&format!("free {block}")), INVALID_VALUE, "freed twice");
    assert_eq!(app.alloc_in(20 * MIB, second), block);
    app.does(&format!("free {block}"));
    // cuMemFreeAsync of what cuMemAlloc gave waits for its turn.
    let plain = app.alloc(4 * MIB);
    app.free_in(plain, first);
    assert_eq!(app.call(&format!("free-async {plain} {second}")), INVALID_VALUE, "freed twice");
    assert_eq!(app.call(&format!("free {plain}")), INVALID_VALUE, "freed twice");
    assert_eq!(app.left(), all - 4 * MIB, "the stream may still use it");
    app.does("let-go");
    app.does(&format!("synchronize {first}"));
    assert_eq!(app.left(), all);
    for wrong in [0x1234, block, plain, block + 512] {
        assert_eq!(app.call(&format!("free-async {wrong} {first}")), INVALID_VALUE);
    }
    app.ends_having_said(&["cuMemFreeAsync(0x1234)", "never made"]);
}

#[test]
fn an_address_tells_its_allocation_and_its_pool() {
    const RANGE_START: u32 = 11;
    const RANGE_SIZE: u32 = 12;
    const POOL: u32 = 17;
    let gpu = gpu();
    let node = node(&gpu);
    let mut app = Application::ready(&node);
    let (stream, own) = (app.stream(), app.number("pool 0 0"));
    let default = app.number("default-pool");
    let (low, high) = (app.alloc_in(700, stream), app.alloc_in(700, stream));
    assert_eq!(high, low + 1024, "the test means two neighbours");
    app.does(&format!("set-pool {own}"));
    let third = app.alloc_in(700, stream);
    let named = app.number(&format!("alloc-from 700 {default} {stream}"));
    for (block, pool) in [(low, default), (high, default), (third, own), (named, default)] {
        assert_eq!(app.ask(&format!("range {}", block + 600)), (SUCCESS, format!("{block} 700")));
        assert_eq!(app.number(&format!("attribute {} {RANGE_START}", block + 600)), block);
        assert_eq!(app.number(&format!("attribute {block} {RANGE_SIZE}")), 700);
        assert_eq!(app.number(&format!("attribute {block} {POOL}")), pool);
    }
    app.end();
}

#[test]
fn a_pool_has_its_limit_and_outlives_its_name() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut app = Application::ready(&node);
    let (stream, pool) = (app.stream(), app.number(&format!("pool {} 0", 8 * MIB)));
    let all = app.left();
    let block = app.number(&format!("alloc-from {} {pool} {stream}", 6 * MIB));
    assert_eq!(app.call(&format!("alloc-from {} {pool} {stream}", 6 * MIB)), OUT_OF_MEMORY);
    app.does(&format!("write {block} {} 5", 6 * MIB));
    app.does(&format!("destroy-pool {pool}"));
    assert_eq!(app.call(&format!("alloc-from 1 {pool} {stream}")), INVALID_VALUE);
    assert_eq!(app.ask(&format!("check {block} {} 5", 6 * MIB)), (SUCCESS, "right".into()));
    assert_eq!(app.left(), all - 6 * MIB);
    app.free_in(block, stream);
    app.does(&format!("synchronize {stream}"));
    assert_eq!(app.left(), all);
    let default = app.number("default-pool");
    assert_eq!(app.call(&format!("destroy-pool {default}")), INVALID_VALUE);
    app.number(&format!("alloc-from 1 {default} {stream}"));
    app.ends_having_said(&["stream-ordered allocation of 6.00 MiB is refused", "of at most 8.00 MiB"]);
}

/// The simulated GPU's driver is told to fail once, which a real one may do for reasons of its own.
#[test]
fn a_pool_that_the_driver_fails_to_destroy_is_as_before() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut app = Application::start(node.environment(), &[("NVSHARE_SIM_FAIL", "cuMemPoolDestroy:1:999")]);
    assert_eq!((app.call("init"), app.call("create 0")), (SUCCESS, SUCCESS));
    let (stream, pool) = (app.stream(), app.number(&format!("pool {} 0", 8 * MIB)));
    let all = app.left();
    let block = app.number(&format!("alloc-from {} {pool} {stream}", 4 * MIB));
    app.does(&format!("write {block} {} 5", 4 * MIB));
    assert_eq!(app.call(&format!("destroy-pool {pool}")), 999);
    let other = app.number(&format!("alloc-from {} {pool} {stream}", 4 * MIB));
    assert_eq!(
        app.call(&format!("alloc-from {} {pool} {stream}", 4 * MIB)),
        OUT_OF_MEMORY,
        "it has its limit"
    );
    assert_eq!(app.ask(&format!("check {block} {} 5", 4 * MIB)), (SUCCESS, "right".into()));
    app.free_in(block, stream);
    app.free_in(other, stream);
    app.does(&format!("destroy-pool {pool}"));
    app.does(&format!("synchronize {stream}"));
    assert_eq!(app.left(), all);
    app.end();
}

#[test]
fn a_free_is_over_after_its_stream_is_destroyed() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut app = Application::ready(&node);
    let (first, second) = (app.stream(), app.stream());
    let block = app.alloc_in(20 * MIB, first);
    app.does(&format!("hold {first}"));
    app.free_in(block, first);
    app.does(&format!("destroy-stream {first}"));
    let third = app.stream();
    assert_ne!(app.alloc_in(20 * MIB, third), block, "its work goes on");
    app.does("let-go");
    let mut found = 0;
    TIMEOUT.until("the free is over", || {
        found = app.alloc_in(20 * MIB, second);
        app.does(&format!("free {found}"));
        found == block
    });
    app.end();
}

#[test]
fn memory_of_a_pool_survives_the_context_that_asked_for_it() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut app = Application::ready(&node);
    let stream = app.stream();
    let (gone, block) = (app.alloc_in(MIB, stream), app.alloc_in(4 * MIB, stream));
    app.does(&format!("write {block} {} 9", 4 * MIB));
    app.free_in(gone, stream);
    app.does("create");
    app.does("destroy 0");
    app.does("use 1");
    assert_eq!(app.ask(&format!("check {block} {} 9", 4 * MIB)), (SUCCESS, "right".into()));
    let stream = app.stream();
    assert_eq!(app.alloc_in(MIB, stream), gone, "its stream's work ended with the context");
    app.free_in(block, stream);
    // With the last one everything goes, and a new one begins with nothing.
    app.does("destroy 1");
    app.does("create");
    app.does("use 2");
    let stream = app.stream();
    assert_eq!(app.call(&format!("free-async {gone} {stream}")), INVALID_VALUE);
    let block = app.alloc_in(4 * MIB, stream);
    app.does(&format!("set {block} {} 3 {stream}", 4 * MIB));
    app.does(&format!("synchronize {stream}"));
    assert_eq!(app.ask(&format!("holds {block} {} 3", 4 * MIB)), (SUCCESS, "right".into()));
    app.ends_well();
}

/// A capture of the relaxed mode is not spoilt by what other streams allocate and free meanwhile. (In the other modes the driver
/// refuses it: `captures.rs`.)
#[test]
fn others_allocate_while_a_stream_captures() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut app = Application::ready(&node);
    let (capturing, first, second) = (app.stream(), app.stream(), app.stream());
    let blocking = app.number("stream 0");
    let outside = app.alloc_in(MIB, first);
    let pending = app.alloc_in(MIB, 0);
    app.does(&format!("begin {blocking} 2"));
    app.does(&format!("begin {capturing} 2"));
    // The driver's own business: the one becomes a node of the graph, the other has nothing to do with it.
    assert_eq!(app.call(&format!("alloc-async {MIB} {capturing}")), SUCCESS);
    assert_eq!(app.call(&format!("free-async {outside} {capturing}")), INVALID_VALUE);
    app.free_in(outside, first);
    assert_eq!(app.alloc_in(MIB, first), outside, "it was not freed in the capture");
    app.free_in(outside, first);
    for stream in [second, first, second] {
        let block = app.alloc_in(MIB, stream);
        app.does(&format!("set {block} {MIB} 4 {stream}"));
        app.free_in(block, stream);
    }
    // Other streams' frees are looked at, and a segment is made, too.
    let large = app.alloc_in(30 * MIB, second);
    app.does(&format!("set {large} {MIB} 4 {second}"));
    app.does(&format!("end {capturing}"));
    app.does(&format!("end {blocking}"));
    app.free_in(pending, 0);
    app.does("synchronize 0");
    app.does(&format!("synchronize {second}"));
    assert_eq!(app.ask(&format!("holds {large} {MIB} 4")), (SUCCESS, "right".into()));
    app.end();
}

#[test]
fn two_clients_take_turns_and_keep_their_data() {
    let gpu = gpu();
    let node = node(&gpu);
    let (mut one, mut two) = (Application::ready(&node), Application::ready(&node));
    let streams = (one.stream(), two.stream());
    let blocks = (one.alloc_in(40 * MIB, streams.0), two.alloc_in(40 * MIB, streams.1));
    one.does(&format!("write {} {} 1", blocks.0, 40 * MIB));
    two.does(&format!("write {} {} 2", blocks.1, 40 * MIB));
    for _ in 0..3 {
        assert_eq!(one.ask(&format!("check {} {} 1", blocks.0, 40 * MIB)), (SUCCESS, "right".into()));
        assert_eq!(two.ask(&format!("check {} {} 2", blocks.1, 40 * MIB)), (SUCCESS, "right".into()));
    }
    let moved = |client: &status::Client| client.bytes_out > 0 && client.bytes_in > 0;
    TIMEOUT.until("the memory of both was out and in", || {
        status::read(node.dir()).unwrap().gpus.remove(0).clients.iter().all(moved)
    });
    one.end();
    two.end();
    TIMEOUT.until("all clients are reaped", || {
        status::read(node.dir()).unwrap().gpus.remove(0).clients.is_empty()
    });
    let gpu = status::read(node.dir()).unwrap().gpus.remove(0);
    assert_eq!((gpu.free_bytes, gpu.repaired), (gpu.capacity_bytes as i64, 0));
}

/// What a pool does not use, and was not told to keep, is not moved out when others want the GPU: it goes.
#[test]
fn what_nobody_uses_goes_when_others_want_the_gpu() {
    let gpu = gpu();
    let node = node(&gpu);
    let (mut one, mut two) = (Application::ready(&node), Application::ready(&node));
    let stream = one.stream();
    let block = one.alloc_in(40 * MIB, stream);
    one.does(&format!("write {block} {} 1", 40 * MIB));
    one.free_in(block, stream);
    assert_eq!(demand(&node, &one), 40 * MIB);
    let large = two.alloc(40 * MIB);
    two.does(&format!("write {large} {} 3", 40 * MIB));
    assert_eq!(demand(&node, &one), 0);
    let clients = status::read(node.dir()).unwrap().gpus.remove(0).clients;
    assert!(clients.iter().all(|client| client.bytes_out == 0), "unused memory was copied: {clients:?}");
    one.works();
    two.end();
    one.end();
}
