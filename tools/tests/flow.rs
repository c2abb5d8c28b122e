//! Flow control: a client whose slice can end keeps little work in flight, and nobody else is held.

mod application;

use application::books::{balances, come_to};
use application::{Application, MIB, quick_gpu};
use nvshare_tools::node::Node;

/// Neither fits beside the other in the pool of 64 MiB.
const MINE: u64 = 32 * MIB;
const OTHERS: u64 = 40 * MIB;

/// Kernels, of some milliseconds each: far more than the drain target allows.
const KERNELS: u64 = 60;

/// An application that launches all its kernels without waiting for any, beside another that has `others` bytes and
/// nothing to do. How often it was held.
fn holds(variables: &[(&str, &str)], options: &[&str], others: u64) -> u64 {
    let gpu = quick_gpu();
    let options: Vec<_> = ["--capacity", "64MiB", "--quantum", "1ms"]
        .iter()
        .chain(options)
        .map(|word| word.to_string())
        .collect();
    let node = Node::start(gpu.environment(&[]), &options).unwrap();
    let mut other = Application::ready(&node);
    let its = other.alloc(others);
    other.writes(its, others, 1);
    let mut one = Application::start(node.environment(), variables);
    for call in ["init", "retain", "use 0"] {
        one.does(call);
    }
    let data = one.alloc(MINE);
    one.writes(data, MINE, 2);
    come_to(&node, &one, (MINE, MINE, 0));
    let stream = one.number("stream 1");
    for round in 0..KERNELS {
        one.does(&format!("iota {data} {} {round} {}", MINE / 8, if round % 2 == 0 { 0 } else { stream }));
    }
    let holds = one.number("holds");
    one.does("synchronize 0");
    other.sees(its, others, 1);
    assert_eq!(other.number("holds"), 0, "it waits for each of its copies");
    [one, other].into_iter().for_each(|application| drop(application.ends_well()));
    balances(&node);
    holds
}

#[test]
fn who_can_be_asked_to_give_way_at_any_moment_is_held() {
    assert!(holds(&[], &[], OTHERS) > 0);
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
