//! CUDA IPC under the shim: processes open each other's memory, it is the same memory, and the books know where it is.

use nvshare_e2e::application::books::{balances, books, client, clients, come_to};
use nvshare_e2e::application::{Application, INVALID_VALUE, MIB, SUCCESS, gpu, node};
use nvshare_test_support::Patience;
use nvshare_tools::node::Node;

const TIMEOUT: Patience = Patience::seconds(60);

const INVALID_CONTEXT: i32 = 201;

/// CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.
const LAZY: u32 = 1;

#[test]
fn shared_memory_stays_while_everything_else_takes_turns() {
    const SHARED: u64 = 8 * MIB;
    let gpu = gpu();
    let node = node(&gpu);
    let [mut maker, mut user, mut third] = [(); 3].map(|()| Application::ready(&node));
    let (shared, own) = (maker.alloc(SHARED), maker.alloc(24 * MIB));
    maker.writes(shared, SHARED, 1);
    maker.writes(own, 24 * MIB, 2);
    let opened = user.open(&maker.export(shared));
    let theirs = user.alloc(24 * MIB);
    user.writes(theirs, 24 * MIB, 3);
    let large = third.alloc(48 * MIB);
    for round in 0..4 {
        third.writes(large, 48 * MIB, 10 + round);
        // The third has what there is of the GPU now, but for this.
        assert_eq!(books(&node, &maker), (SHARED + 24 * MIB, SHARED, SHARED));
        user.sees(opened, SHARED, 1 + 100 * round);
        user.sees(theirs, 24 * MIB, 3);
        third.sees(large, 48 * MIB, 10 + round);
        maker.sees(own, 24 * MIB, 2);
        maker.writes(shared, SHARED, 50 + round);
        third.sees(large, 48 * MIB, 10 + round);
        user.sees(opened, SHARED, 50 + round);
        user.writes(opened, SHARED, 1 + 100 * (round + 1));
        maker.sees(shared, SHARED, 1 + 100 * (round + 1));
    }
    assert_eq!(books(&node, &user).2, 0, "it is counted once, for who made it");
    for application in [&maker, &user, &third] {
        assert!(client(&node, application).bytes_out > 0, "nothing of it was ever out");
    }
    user.close(opened);
    for application in [maker, user, third] {
        application.ends_well();
    }
    balances(&node);
}

#[test]
fn handles_are_as_the_drivers() {
    const RANGE_START: u32 = 11;
    const RANGE_SIZE: u32 = 12;
    const IPC_CAPABLE: u32 = 10;
    let gpu = gpu();
    let node = node(&gpu);
    let (mut maker, mut user) = (Application::ready(&node), Application::ready(&node));
    let memory = maker.alloc(3 * MIB);
    maker.writes(memory, 3 * MIB, 4);
    assert_eq!(maker.ask(&format!("attribute {memory} {IPC_CAPABLE}")), (SUCCESS, "1".into()));
    let handle = maker.export(memory);
    assert_eq!(maker.export(memory + MIB), handle, "of the whole allocation, and the same one");
    assert_eq!(maker.try_open(&handle), Err(INVALID_CONTEXT), "not in the same process");
    assert_eq!(user.call(&format!("ipc-open 0 {handle}")), INVALID_VALUE, "the flag is required");
    let opened = user.open(&handle);
    let (code, again) = user.ask(&format!("ipc-open-v1 {LAZY} {handle}"));
    assert_eq!((code, again), (SUCCESS, opened.to_string()), "opened twice, there once");
    assert_eq!(user.ask(&format!("range {}", opened + 4096)), (SUCCESS, format!("{opened} {}", 3 * MIB)));
    assert_eq!(user.ask(&format!("attribute {} {RANGE_START}", opened + 8)), (SUCCESS, opened.to_string()));
    assert_eq!(user.ask(&format!("attribute {opened} {RANGE_SIZE}")), (SUCCESS, (3 * MIB).to_string()));
    assert_eq!(user.call(&format!("ipc-get {opened}")), INVALID_VALUE, "it is not ours to pass on");
    assert_eq!(user.call(&format!("free {opened}")), INVALID_VALUE, "nor to free");
    user.close(opened);
    user.sees(opened, 3 * MIB, 4);
    user.close(opened);
    assert_eq!(user.call(&format!("ipc-close {opened}")), INVALID_VALUE);
    for wrong in ["7 7 7 7 7 7 7 7", "0 0 0 0 0 0 0 0"] {
        assert_eq!(user.try_open(wrong), Err(INVALID_VALUE));
    }
    // One word of it changed: another version, no such process, no such allocation, another key, no handle.
    for changed in 0..8 {
        let mut words: Vec<u64> = handle.split(' ').map(|word| word.parse().unwrap()).collect();
        words[changed] ^= 1 << 17;
        let changed: Vec<_> = words.iter().map(u64::to_string).collect();
        assert_eq!(user.try_open(&changed.join(" ")), Err(INVALID_VALUE), "{changed:?}");
    }
    let opened = user.open(&handle);
    user.sees(opened, 3 * MIB, 4);
    // Stream-ordered memory has no handle.
    let (code, stream_ordered) = maker.ask(&format!("alloc-async {MIB} 0"));
    assert_eq!((code, maker.call(&format!("ipc-get {stream_ordered}"))), (SUCCESS, INVALID_VALUE));
    assert_eq!(maker.ask(&format!("attribute {stream_ordered} {IPC_CAPABLE}")), (SUCCESS, "0".into()));
    user.ends_having_said(&["could not be opened", "does not know this handle's key"]);
    maker.end();
    balances(&node);
}

/// Small allocations share a granule, and large ones consist of many pieces.
#[test]
fn an_allocation_of_any_size_is_opened_where_it_begins() {
    let gpu = gpu();
    let node = Node::start(gpu.environment(&[]), &["--capacity", "200MiB"].map(str::to_owned)).unwrap();
    let (mut maker, mut user) = (Application::ready(&node), Application::ready(&node));
    let (first, second) = (maker.alloc(1000), maker.alloc(1000));
    assert_eq!(second, first + 1024, "the test means two neighbours");
    let large = maker.alloc(150 * MIB);
    maker.writes(first, 1000, 1);
    maker.writes(second, 1000, 2);
    maker.writes(large, 150 * MIB, 3);
    let handles = [first, second, large].map(|address| maker.export(address));
    let [one, two, three] = handles.map(|handle| user.open(&handle));
    user.sees(one, 1000, 1);
    user.sees(two, 1000, 2);
    user.sees(three, 150 * MIB, 3);
    assert_eq!(user.ask(&format!("range {}", two + 999)), (SUCCESS, format!("{two} 1000")));
    assert_eq!(
        user.ask(&format!("range {}", three + 100 * MIB)),
        (SUCCESS, format!("{three} {}", 150 * MIB))
    );
    assert_eq!(books(&node, &maker).2, 152 * MIB, "with the granule that the small ones share");
    for address in [one, two, three] {
        user.close(address);
    }
    for address in [first, second, large] {
        maker.does(&format!("free {address}"));
    }
    come_to(&node, &maker, (0, 0, 0));
}

#[test]
fn what_is_freed_while_it_is_open_is_counted_until_it_is_closed() {
    let gpu = gpu();
    let node = node(&gpu);
    let (mut maker, mut user) = (Application::ready(&node), Application::ready(&node));
    let memory = maker.alloc(20 * MIB);
    maker.writes(memory, 20 * MIB, 5);
    let handle = maker.export(memory);
    let opened = user.open(&handle);
    maker.does(&format!("free {memory}"));
    assert_eq!(maker.call(&format!("free {memory}")), INVALID_VALUE, "freed twice");
    assert_eq!(books(&node, &maker), (20 * MIB, 20 * MIB, 20 * MIB));
    // Others find room around it.
    let large = maker.alloc(30 * MIB);
    maker.writes(large, 30 * MIB, 6);
    let other = user.alloc(30 * MIB);
    user.writes(other, 30 * MIB, 7);
    user.sees(opened, 20 * MIB, 5);
    maker.sees(large, 30 * MIB, 6);
    assert_eq!(user.try_open(&handle), Ok(opened), "it has it already");
    user.close(opened);
    maker.does(&format!("free {large}"));
    come_to(&node, &maker, (20 * MIB, 20 * MIB, 20 * MIB));
    user.close(opened);
    come_to(&node, &maker, (0, 0, 0));
    assert_eq!(user.try_open(&handle), Err(INVALID_VALUE), "nobody has it any more");
    // The other way round; and at the same address it is another allocation.
    let memory = maker.alloc(20 * MIB);
    let fresh = maker.export(memory);
    assert_ne!(fresh, handle);
    let opened = user.open(&fresh);
    user.close(opened);
    maker.does(&format!("free {memory}"));
    come_to(&node, &maker, (0, 0, 0));
    maker.end();
    user.ends_having_said(&["could not be opened", "it has freed that memory"]);
    balances(&node);
}

#[test]
fn whoever_dies_has_closed_although_its_child_lives() {
    let gpu = gpu();
    let node = node(&gpu);
    let (mut maker, mut user, mut other) =
        (Application::ready(&node), Application::ready(&node), Application::ready(&node));
    let memory = maker.alloc(20 * MIB);
    maker.writes(memory, 20 * MIB, 5);
    let handle = maker.export(memory);
    let opened = other.open(&handle);
    user.open(&handle);
    user.does("fork");
    maker.does(&format!("free {memory}"));
    user.kill();
    TIMEOUT.until("the dead one is reaped", || clients(&node).len() == 2);
    other.sees(opened, 20 * MIB, 5);
    come_to(&node, &maker, (20 * MIB, 20 * MIB, 20 * MIB));
    other.close(opened);
    come_to(&node, &maker, (0, 0, 0));
    drop(user);
    maker.end();
    other.end();
    balances(&node);
}

#[test]
fn the_memory_of_a_dead_process_is_there_until_it_is_closed() {
    let gpu = gpu();
    let node = node(&gpu);
    let (mut maker, mut user) = (Application::ready(&node), Application::ready(&node));
    let (memory, unopened) = (maker.alloc(8 * MIB), maker.alloc(8 * MIB));
    maker.writes(memory, 8 * MIB, 5);
    let opened = user.open(&maker.export(memory));
    let handle = maker.export(unopened);
    // The child does not answer in its place.
    maker.does("fork");
    maker.kill();
    TIMEOUT.until("the dead one is reaped", || clients(&node).len() == 1);
    user.sees(opened, 8 * MIB, 5);
    assert_eq!(user.try_open(&handle), Err(INVALID_VALUE));
    user.works();
    user.close(opened);
    drop(maker);
    user.ends_having_said(&["could not be opened", "it has ended"]);
    balances(&node);
}

#[test]
fn what_a_context_has_open_ends_with_it_and_what_it_has_lent_does_not() {
    let gpu = gpu();
    let node = node(&gpu);
    let (mut maker, mut user) = (Application::ready(&node), Application::ready(&node));
    let memory = maker.alloc(8 * MIB);
    maker.writes(memory, 8 * MIB, 5);
    let handle = maker.export(memory);
    let first = user.open(&handle);
    user.does("create");
    let second = user.open(&handle);
    user.sees(second, 8 * MIB, 5);
    maker.does("create");
    maker.does("destroy 0");
    maker.does("use 1");
    assert_eq!(maker.call(&format!("free {memory}")), INVALID_VALUE, "it went with its context");
    assert_eq!(books(&node, &maker), (8 * MIB, 8 * MIB, 8 * MIB));
    user.does("destroy 0");
    user.does("use 1");
    assert_eq!(user.call(&format!("ipc-close {first}")), INVALID_VALUE, "it went with its context");
    user.sees(second, 8 * MIB, 5);
    assert_eq!(books(&node, &maker), (8 * MIB, 8 * MIB, 8 * MIB));
    user.does("destroy 1");
    come_to(&node, &maker, (0, 0, 0));
    maker.works();
    maker.end();
    user.end();
    balances(&node);
}

/// While a graph is recorded nobody may ask whether memory is still in use: it goes when the recording ends.
#[test]
fn what_is_closed_during_a_capture_goes_after_it() {
    let gpu = gpu();
    let node = node(&gpu);
    let (mut maker, mut user) = (Application::ready(&node), Application::ready(&node));
    let memory = maker.alloc(8 * MIB);
    let handle = maker.export(memory);
    let opened = user.open(&handle);
    let (code, stream) = user.ask("stream 1");
    assert_eq!(code, SUCCESS);
    user.does(&format!("begin {stream} 0"));
    let other = maker.alloc(8 * MIB);
    let inside = user.open(&maker.export(other));
    user.close(opened);
    maker.does(&format!("free {memory}"));
    assert_eq!(books(&node, &maker), (16 * MIB, 16 * MIB, 16 * MIB));
    user.does(&format!("end {stream}"));
    come_to(&node, &maker, (8 * MIB, 8 * MIB, 8 * MIB));
    user.close(inside);
    maker.end();
    user.end();
    balances(&node);
}

/// A process without nvshare and one with it understand each other where the driver's own handles are concerned.
#[test]
fn the_drivers_handles_are_the_drivers() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut native = Application::start(node.environment(), &[("NVSHARE_DISABLE", "1")]);
    native.does("init");
    native.does("create");
    let mut managed = Application::ready(&node);
    let memory = native.alloc(4 * MIB);
    native.writes(memory, 4 * MIB, 5);
    let opened = managed.open(&native.export(memory));
    managed.sees(opened, 4 * MIB, 5);
    managed.close(opened);
    // Nobody but nvshare understands its own.
    let memory = managed.alloc(4 * MIB);
    assert_eq!(native.try_open(&managed.export(memory)), Err(INVALID_VALUE));
    managed.end();
    native.end();
    balances(&node);
}
