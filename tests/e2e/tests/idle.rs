//! A holder without work gives way to who waits, however long its slice is; and while nobody waits, nobody looks.

use nvshare_e2e::application::books::{balances, client};
use nvshare_e2e::application::{Application, MIB, quick_gpu};
use nvshare_tools::node::{Node, SimulatedGpu};
use std::path::Path;

/// Neither fits beside the other in the pool of 64 MiB.
const MINE: u64 = 32 * MIB;
const OTHERS: u64 = 40 * MIB;

/// Works of a client, each of which takes longer than an engine that polls would sleep.
const WORKS: u64 = 20;

/// Two that do not fit, with slices that are not over in the time of the test. Their data, of seeds 1 and 2: the second one
/// has the GPU.
fn two(node: &Node) -> [(Application, u64, u64); 2] {
    [(MINE, 1), (OTHERS, 2)].map(|(bytes, seed)| {
        let mut application = Application::ready(node);
        let address = application.alloc(bytes);
        application.writes(address, bytes, seed);
        (application, address, bytes)
    })
}

fn node(gpu: &SimulatedGpu) -> Node {
    let options = ["--capacity", "64MiB", "--quantum", "60min"];
    Node::start(gpu.environment(&[]), &options.map(str::to_owned)).unwrap()
}

/// How often the thread of its engine has slept.
fn sleeps(application: &Application) -> u64 {
    let threads = format!("/proc/{}/task", application.pid());
    let read = |thread: &Path, what: &str| std::fs::read_to_string(thread.join(what)).unwrap();
    let is_engine = |thread: &Path| {
        read(thread, "comm") == "nvshare\n" && !thread.ends_with(application.pid().to_string())
    };
    let paths = std::fs::read_dir(threads).unwrap().map(|entry| entry.unwrap().path());
    let engines: Vec<_> = paths.filter(|thread| is_engine(thread)).collect();
    let [engine] = &engines[..] else { panic!("one engine: {engines:?}") };
    let status = read(engine, "status");
    let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
    count.trim().parse().unwrap()
}

#[test]
fn who_has_no_work_gives_way_though_its_slice_goes_on() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut both = two(&node);
    for _ in 0..3 {
        for (seed, (application, address, bytes)) in (1..).zip(&mut both) {
            application.sees(*address, *bytes, seed);
        }
    }
    let yields = both.each_ref().map(|(application, ..)| client(&node, application).yields);
    assert!(yields[0] >= 4 && yields[1] >= 3, "{yields:?}");
    for (application, ..) in both {
        drop(application.ends_well());
    }
    balances(&node);
}

/// Though not everything fits: the other one has its memory out, and wants nothing.
#[test]
fn nobody_looks_while_nobody_waits() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let [(other, ..), (mut holder, address, bytes)] = two(&node);
    let mut works = |seeds: std::ops::Range<u64>| {
        for seed in seeds {
            holder.writes(address, bytes, seed);
            holder.sees(address, bytes, seed);
        }
        [&holder, &other].map(sleeps)
    };
    // Whatever came with its turn is over then.
    let before = works(0..WORKS);
    assert_eq!(works(WORKS..2 * WORKS), before);
    drop((holder.ends_well(), other.ends_well()));
    balances(&node);
}

/// What a client has submitted and how much of it had to wait is in the books when its slice is over.
#[test]
fn submissions_are_counted_and_those_that_had_to_wait() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let [(mut counted, address, bytes), (mut other, others, other_bytes)] = two(&node);
    // It gets its slice, sees its data so many times, and the other one takes the GPU from it.
    let mut slice = |times: u64| {
        let before = client(&node, &counted);
        (0..times).for_each(|_| counted.sees(address, bytes, 1));
        other.sees(others, other_bytes, 2);
        let after = client(&node, &counted);
        (after.submissions - before.submissions, after.held_submissions - before.held_submissions)
    };
    let ((one, held), (two, held_again), (six, held_for_six)) = (slice(1), slice(2), slice(6));
    assert!(one > 0 && two > one, "{one}, {two}");
    assert_eq!(six - one, 5 * (two - one), "as many each time: {one}, {two}, {six}");
    assert_eq!([held, held_again, held_for_six], [1; 3], "the first of each slice waits for the GPU");
    drop((counted.ends_well(), other.ends_well()));
}
