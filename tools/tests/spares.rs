//! Memory that was freed a moment ago: the next allocation of its size has it, and so has anybody who lacks room.

mod application;

use application::books::{balances, books, come_to};
use application::{Application, MIB, node, quick_gpu};
use nvshare_test_support::Patience;

const PATIENCE: Patience = Patience::seconds(60);

/// As much of a pool of 64 MiB as is kept.
const SPARE: u64 = 32 * MIB;

/// An application whose gate is open.
fn running(node: &nvshare_tools::node::Node) -> Application {
    let mut application = Application::ready(node);
    application.works();
    application
}

#[test]
fn the_next_allocation_of_its_size_is_the_one_before() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = running(&node);
    let mut address = one.alloc(SPARE);
    one.writes(address, SPARE, 1);
    // The application may be slower than the life of a spare: then it tries again.
    PATIENCE.until("an allocation was there before", || {
        one.does(&format!("free {address}"));
        let kept = books(&node, &one) == (0, SPARE, 0);
        let before = std::mem::replace(&mut address, one.alloc(SPARE));
        assert_eq!(books(&node, &one), (SPARE, SPARE, 0));
        one.writes(address, SPARE, 2);
        one.sees(address, SPARE, 2);
        kept && address == before
    });
    one.does(&format!("free {address}"));
    // Nobody asks for it any more.
    come_to(&node, &one, (0, 0, 0));
    one.ends_well();
    balances(&node);
}

#[test]
fn who_lacks_room_has_it_at_once() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let (mut one, mut other) = (running(&node), running(&node));
    for round in 0..5 {
        let mine = one.alloc(SPARE);
        one.writes(mine, SPARE, round);
        one.does(&format!("free {mine}"));
        // It fits beside everything that is needed, and not beside what is kept.
        let theirs = other.alloc(44 * MIB);
        other.writes(theirs, 44 * MIB, round);
        other.sees(theirs, 44 * MIB, round);
        assert_eq!(books(&node, &other), (44 * MIB, 44 * MIB, 0));
        assert_eq!(books(&node, &one), (0, 0, 0));
        // And the one that has it needs it no less.
        let large = one.alloc(10 * MIB);
        one.does(&format!("free {large}"));
        other.does(&format!("free {theirs}"));
    }
    one.ends_well();
    other.ends_well();
    balances(&node);
}

/// Spares of one size do not keep an allocation of another from the pool.
#[test]
fn an_allocation_of_another_size_takes_its_place() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut one = running(&node);
    for _ in 0..3 {
        let spare = one.alloc(SPARE);
        one.does(&format!("free {spare}"));
        let large = one.alloc(56 * MIB);
        one.writes(large, 56 * MIB, 3);
        assert_eq!(books(&node, &one), (56 * MIB, 56 * MIB, 0));
        one.does(&format!("free {large}"));
    }
    one.end();
    balances(&node);
}
