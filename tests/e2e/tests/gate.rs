//! Nothing slips past the gate: whatever submits work, or looks at memory, waits while the client's memory is out.
//!
//! The simulated GPU is told to watch (`NVSHARE_SIM_WATCH`): a call that comes while memory is out is an illegal
//! access, whatever its arguments. The entry points are those of the shim's own table.

use nvshare_e2e::application::{Application, MIB, SUCCESS, node, watched_gpu};
use nvshare_test_support::Patience;
use nvshare_tools::node::Node;

const TIMEOUT: Patience = Patience::seconds(60);

/// Neither fits beside the other in the pool of 64 MiB.
const MINE: u64 = 32 * MIB;
const OTHERS: u64 = 40 * MIB;

const SEED: u64 = 7;

/// Copies among the calls that are about data: `cuMemcpy`, `DtoH` and `HtoD`, at once or in a stream, in both flavours.
const COPIES: u64 = 12;

/// One whose memory is out, with its address, and one that has the GPU until it is told to let go.
fn one_out_and_one_in(node: &Node) -> (Application, u64, Application) {
    let (mut out, mut holder) = (Application::ready(node), Application::ready(node));
    let data = out.alloc(MINE);
    out.does(&format!("write {data} {MINE} {SEED}"));
    let others = holder.alloc(OTHERS);
    holder.does(&format!("write {others} {OTHERS} {SEED}"));
    // Its work does not end, so it neither falls idle nor drains.
    let stream = holder.number("stream 1");
    holder.does(&format!("hold {stream}"));
    (out, data, holder)
}

/// Calls everything at once, in the way that `call` names.
fn all_wait(call: &str) {
    let gpu = watched_gpu();
    let node = node(&gpu);
    let (mut out, data, mut holder) = one_out_and_one_in(&node);
    let calls = out.number(&format!("{call} {data} {SEED}"));
    TIMEOUT.until("all stand before the gate", || {
        assert_eq!(out.ask("returned").1, "", "of what should wait");
        out.number("waiting") == calls
    });
    // Allocating and freeing need no turn.
    let more = out.alloc(2 * MIB);
    out.does(&format!("free {more}"));
    assert_eq!(out.number("waiting"), calls);
    assert_eq!((out.ask("returned").1.as_str(), out.number("illegal")), ("", 0));

    holder.does("let-go");
    let (died, outcomes) = out.ask("join");
    let outcomes: Vec<u64> = outcomes.split(' ').map(|count| count.parse().unwrap()).collect();
    let [returned, copied, wrong, illegal] = outcomes[..] else { panic!("{outcomes:?}") };
    assert_eq!((died, returned, copied, wrong, illegal), (0, calls, COPIES, 0, 0));
    println!("{call}: {calls} calls were held");
    assert_eq!((out.number("waiting"), out.number("illegal")), (0, 0));
    assert_eq!(out.ask(&format!("check {data} {MINE} {SEED}")), (SUCCESS, "right".into()));
    out.works();
    holder.end();
    out.ends_well();
}

#[test]
fn whatever_is_linked_waits_until_memory_is_back() {
    all_wait("hold-exported");
}

#[test]
fn whatever_is_looked_up_waits_until_memory_is_back() {
    all_wait("hold-looked-up");
}

/// What the tests above rest on. The process's context is broken afterwards.
#[test]
fn whatever_goes_past_the_gate_is_seen() {
    let gpu = watched_gpu();
    let node = node(&gpu);
    let (mut out, _, mut holder) = one_out_and_one_in(&node);
    assert_eq!(out.number("illegal"), 0);
    let (_, seen) = out.ask("past-gate");
    let (all, seen) = seen.split_once(' ').unwrap();
    assert_eq!(all, seen, "seen, and then the names of those that were not");
    println!("{all} entry points are watched");
    assert_eq!(out.number("illegal").to_string(), all);
    assert_eq!(out.call("synchronize 0"), 700, "it sticks");
    holder.does("let-go");
    holder.works();
}
