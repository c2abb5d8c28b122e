//! Memory that was freed a moment ago is kept for the next allocation of its size, and belongs to nobody meanwhile.
//!
//! Most have it kept for an hour, so that whatever happens before is no matter of time.

use nvshare_e2e::application::books::{Competitor, balances, books, client, come_to};
use nvshare_e2e::application::{Application, MIB, SUCCESS, node, quick_gpu};
use nvshare_tools::node::Node;

/// As much of a pool of 64 MiB as is kept.
const SPARE: u64 = 32 * MIB;

/// Two that are kept beside one another, and a third that is kept beside the second.
const SIZES: [u64; 3] = [20 * MIB, 12 * MIB, 18 * MIB];

const AN_HOUR: (&str, &str) = ("NVSHARE_KEEP_FREED", "3600");

/// An application whose gate is open, and nothing of which is kept.
fn running(node: &Node, variables: &[(&str, &str)]) -> Application {
    let mut application = Application::start(node.environment(), variables);
    application.does("init");
    application.does("create 0");
    // The gate is open once a call has passed it.
    leaves_spare(&mut application, 4096);
    // With any context goes all that is kept.
    application.does("create 0");
    application.does("destroy 1");
    application.does("use 0");
    application
}

fn keeping(node: &Node) -> Application {
    running(node, &[AN_HOUR])
}

/// Allocates and frees what is kept then.
fn leaves_spare(one: &mut Application, bytes: u64) -> u64 {
    let address = one.alloc(bytes);
    one.writes(address, bytes, 1);
    one.does(&format!("free {address}"));
    address
}

#[test]
fn the_next_allocation_of_its_size_is_the_one_before() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = keeping(&node);
    let first = leaves_spare(&mut one, SPARE);
    let made = one.number("creates");
    for round in 0..20 {
        assert_eq!(books(&node, &one), (0, SPARE, 0), "it is needed by nobody, and there");
        assert_eq!(one.alloc(SPARE), first);
        assert_eq!(books(&node, &one), (SPARE, SPARE, 0));
        one.writes(first, SPARE, round);
        one.sees(first, SPARE, round);
        one.does(&format!("free {first}"));
    }
    assert_eq!(one.number("creates"), made, "the driver has made nothing");
    one.ends_well();
    balances(&node);
}

#[test]
fn a_small_one_finds_the_granule_of_the_one_before() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = keeping(&node);
    leaves_spare(&mut one, 4096);
    let made = one.number("creates");
    for bytes in [4096, 512 << 10, 4096, 1 << 20, 2 * MIB, 4096] {
        assert_eq!(books(&node, &one), (0, 2 * MIB, 0));
        leaves_spare(&mut one, bytes);
    }
    assert_eq!(one.number("creates"), made, "the driver has made nothing");
    one.ends_well();
    balances(&node);
}

#[test]
fn each_of_several_sizes_is_found_again() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = keeping(&node);
    let sizes = [SIZES[0], SIZES[1]];
    let first = sizes.map(|size| leaves_spare(&mut one, size));
    for _ in 0..10 {
        assert_eq!(sizes.map(|size| leaves_spare(&mut one, size)), first);
    }
    one.ends_well();
    balances(&node);
}

/// What was freed is free, whether it is kept or not.
#[test]
fn what_is_kept_is_told_as_free() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = keeping(&node);
    let before = one.ask("info");
    leaves_spare(&mut one, SPARE);
    assert_eq!(books(&node, &one), (0, SPARE, 0));
    assert_eq!(one.ask("info"), before);
    one.ends_well();
    balances(&node);
}

/// What is freed is no allocation: nothing is known of its address, and it is not freed twice.
#[test]
fn nothing_is_known_of_what_is_kept() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = keeping(&node);
    let freed = leaves_spare(&mut one, SPARE);
    assert_eq!(books(&node, &one), (0, SPARE, 0));
    assert_ne!(one.call(&format!("range {freed}")), SUCCESS);
    assert_ne!(one.call(&format!("free {freed}")), SUCCESS);
    assert_ne!(one.call(&format!("unmap {freed} {SPARE}")), SUCCESS);
    assert_eq!(books(&node, &one), (0, SPARE, 0));
    assert_eq!(one.alloc(SPARE), freed);
    one.writes(freed, SPARE, 2);
    one.sees(freed, SPARE, 2);
    one.end();
    balances(&node);
}

#[test]
fn it_goes_when_nobody_asks_for_it() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = running(&node, &[]);
    leaves_spare(&mut one, SPARE);
    come_to(&node, &one, (0, 0, 0));
    one.ends_well();
    balances(&node);
}

#[test]
fn no_more_than_half_of_the_pool_is_kept_and_the_oldest_goes() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = keeping(&node);
    let (larger, smaller) = (one.alloc(SIZES[0]), one.alloc(SIZES[1]));
    one.does(&format!("free {larger}"));
    one.does(&format!("free {smaller}"));
    let both = SIZES[0] + SIZES[1];
    assert!(both <= SPARE);
    assert_eq!(books(&node, &one), (0, both, 0));
    let third = one.alloc(SIZES[2]);
    one.does(&format!("free {third}"));
    assert_eq!(books(&node, &one), (0, SIZES[1] + SIZES[2], 0), "the first has gone");
    let too_large = one.alloc(SPARE + 2 * MIB);
    one.does(&format!("free {too_large}"));
    assert!(books(&node, &one).1 <= SPARE);
    one.ends_well();
    balances(&node);
}

#[test]
fn none_is_kept_by_who_wants_none() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = running(&node, &[("NVSHARE_KEEP_FREED", "0")]);
    leaves_spare(&mut one, SPARE);
    assert_eq!(books(&node, &one), (0, 0, 0));
    one.ends_well();
    balances(&node);
}

#[test]
fn who_lacks_room_has_it_at_once() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let (mut one, mut other) = (keeping(&node), running(&node, &[]));
    for round in 0..5 {
        leaves_spare(&mut one, SPARE);
        // It fits beside everything that is needed, and not beside what is kept.
        let theirs = other.alloc(44 * MIB);
        other.writes(theirs, 44 * MIB, round);
        other.sees(theirs, 44 * MIB, round);
        assert_eq!(books(&node, &other), (44 * MIB, 44 * MIB, 0));
        assert_eq!(books(&node, &one), (0, 0, 0));
        // And the one that has it needs it no less.
        let small = one.alloc(10 * MIB);
        one.does(&format!("free {small}"));
        other.does(&format!("free {theirs}"));
        come_to(&node, &other, (0, 0, 0));
    }
    one.ends_well();
    other.ends_well();
    balances(&node);
}

#[test]
fn who_waits_for_its_turn_has_it_at_once() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = keeping(&node);
    leaves_spare(&mut one, SPARE);
    let mut competitor = Competitor::start(&node);
    competitor.takes_all(&node, &one);
    assert_eq!(books(&node, &one), (0, 0, 0));
    assert_eq!(client(&node, &one).bytes_out, 0, "nothing was copied");
    competitor.ends();
    one.ends_well();
    balances(&node);
}

/// Spares of one size do not keep an allocation of another from the pool.
#[test]
fn an_allocation_of_another_size_takes_its_place() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = keeping(&node);
    for _ in 0..3 {
        leaves_spare(&mut one, SPARE);
        let large = one.alloc(56 * MIB);
        one.writes(large, 56 * MIB, 3);
        assert_eq!(books(&node, &one), (56 * MIB, 56 * MIB, 0));
        one.does(&format!("free {large}"));
        assert_eq!(books(&node, &one), (0, 0, 0), "it is too large to be kept");
    }
    one.ends_well();
    balances(&node);
}

#[test]
fn it_goes_with_its_context() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = keeping(&node);
    one.does("create 0");
    leaves_spare(&mut one, SPARE);
    assert_eq!(books(&node, &one), (0, SPARE, 0));
    one.does("destroy 2");
    assert_eq!(books(&node, &one), (0, 0, 0));
    one.does("use 0");
    // It is of no other context.
    leaves_spare(&mut one, SPARE);
    one.does("create 0");
    let made = one.number("creates");
    let there = one.alloc(SPARE);
    one.writes(there, SPARE, 5);
    assert!(one.number("creates") > made);
    one.does(&format!("free {there}"));
    one.ends_well();
    balances(&node);
}
