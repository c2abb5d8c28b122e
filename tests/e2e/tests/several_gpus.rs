//! Processes that use several simulated GPUs: they get all of theirs or wait for all, nobody blocks anybody,
//! and their data is right.

use nvshare_e2e::application::running::Running;
use nvshare_test_support::{Dice, Patience};
use nvshare_tools::crew::{Crew, Message};
use nvshare_tools::job::{Event, Job};
use nvshare_tools::node::{Node, SimulatedGpu};
use nvshare_tools::status::{self, Gpu};
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

const TIMEOUT: Patience = Patience::seconds(120);

/// A machine with so many GPUs, and pools of 50 MiB that hold one job's part and not two.
fn machine(gpus: u32) -> (SimulatedGpu, Node) {
    let set = |name: &'static str, value: &str| (name, value.to_owned());
    let gpu = SimulatedGpu::new(&[
        set("GPUS", &gpus.to_string()),
        set("MEMORY", "256MiB"),
        set("CONTEXT_BYTES", "2MiB"),
        set("LINK_BANDWIDTH", "8GiB"),
    ])
    .expect("the workspace is built: cargo build --workspace");
    let arguments = ["--capacity", "50MiB", "--quantum", "10ms"].map(str::to_owned);
    let node = Node::start(gpu.environment(&[]), &arguments).unwrap();
    (gpu, node)
}

/// With 32 MiB on each GPU, and a context first on the first one.
fn job(seed: u64, devices: &[i32], iterations: u64) -> Job {
    Job {
        size: devices.len() as u64 * (32 << 20),
        buffers: 2 * devices.len() as u64,
        devices: devices.to_vec(),
        iterations,
        seed,
        managed: false,
        read_only: false,
        seconds: None,
        controlled: false,
    }
}

/// As long as it is told to.
fn endless(seed: u64, devices: &[i32]) -> Job {
    Job { controlled: true, ..job(seed, devices, u64::MAX) }
}

fn gpus(node: &Node) -> Vec<Gpu> {
    status::read(node.dir()).unwrap().gpus
}

/// Everybody is gone, and so is every granule that they had, on every GPU.
fn balances(node: &Node) {
    TIMEOUT.until("all clients are reaped", || gpus(node).iter().all(|gpu| gpu.clients.is_empty()));
    for gpu in gpus(node) {
        assert_eq!(gpu.free_bytes, gpu.capacity_bytes as i64, "a granule of {} was lost", gpu.uuid);
        assert_eq!(gpu.repaired, 0, "the books of {} had to be repaired", gpu.uuid);
    }
}

/// All of these end with right data. The bytes that have come back to each GPU, at most at a time.
fn all_finish(count: u32, jobs: &[Job]) -> Vec<u64> {
    let (_gpu, node) = machine(count);
    let mut jobs: Vec<_> = jobs.iter().map(|job| Running::start(&node, job)).collect();
    let mut came_in = vec![0; count as usize];
    TIMEOUT.until("all have ended", || {
        for (most, gpu) in came_in.iter_mut().zip(gpus(&node)) {
            *most = gpu.clients.iter().map(|client| client.bytes_in).sum::<u64>().max(*most);
        }
        jobs.iter_mut().all(|job| job.ended().is_some())
    });
    for mut job in jobs {
        assert!(job.ended().unwrap().success(), "wrong data, or a CUDA error");
    }
    balances(&node);
    came_in
}

/// As above, and nobody has one of the GPUs to himself all the time: they take turns on each.
fn all_take_turns_everywhere(count: u32, jobs: &[Job]) {
    let came_in = all_finish(count, jobs);
    assert!(
        came_in.iter().all(|bytes| *bytes > 0),
        "on some GPU nobody's memory ever came back: {came_in:?}"
    );
}

#[test]
fn two_that_came_to_both_gpus_in_opposite_order() {
    all_take_turns_everywhere(2, &[job(1, &[0, 1], 60), job(2, &[1, 0], 60)]);
}

#[test]
fn three_in_a_ring() {
    all_take_turns_everywhere(3, &[job(1, &[0, 1], 40), job(2, &[1, 2], 40), job(3, &[2, 0], 40)]);
}

#[test]
fn one_that_needs_all_beside_some_that_need_one() {
    let jobs = [job(1, &[2, 0, 1], 40), job(2, &[0], 60), job(3, &[1], 60), job(4, &[2], 60)];
    let came_in = all_finish(3, &jobs);
    // One that needs one GPU may be done with it before the others have begun.
    assert!(came_in.iter().any(|bytes| *bytes > 0), "nobody's memory ever came back: {came_in:?}");
}

/// All of these go on and on, and none ends to make room for another: each gets its turns.
fn all_get_on(count: u32, uses: &[&[i32]]) {
    const ITERATIONS: u64 = 15;
    let (_gpu, node) = machine(count);
    let jobs: Vec<_> = uses.iter().zip(1..).map(|(devices, seed)| endless(seed, devices)).collect();
    let mut crew = Crew::start(&jobs, &node.environment()).unwrap();
    let (mut ready, mut done, mut outcomes) = (0, vec![0; jobs.len()], vec![None; jobs.len()]);
    let (end, mut stopped) = (Instant::now() + TIMEOUT.duration(), false);
    while outcomes.contains(&None) {
        let said = crew.next(end);
        match said.unwrap_or_else(|| panic!("somebody gets no turn: they have done {done:?} iterations")) {
            (_, Message::Event(Event::Ready { .. })) => {
                ready += 1;
                if ready == jobs.len() {
                    crew.go();
                }
            }
            (index, Message::Event(Event::Progress { done: so_far })) => done[index] = so_far,
            (index, Message::Event(Event::Done(outcome))) => outcomes[index] = Some(outcome),
            (index, Message::Ended(said)) if outcomes[index].is_none() => panic!("job {index}: {said}"),
            _ => {}
        }
        if !stopped && done.iter().all(|done| *done >= ITERATIONS) {
            crew.stop();
            stopped = true;
        }
    }
    assert!(outcomes.iter().flatten().all(|outcome| outcome.right), "{outcomes:?}");
}

#[test]
fn one_on_two_gpus_starves_nobody_on_one() {
    all_get_on(2, &[&[0, 1], &[0]]);
    all_get_on(2, &[&[0, 1], &[1]]);
}

#[test]
fn those_on_one_gpu_do_not_starve_one_on_two() {
    all_get_on(2, &[&[1, 0], &[0], &[1]]);
}

#[test]
fn whoever_is_killed_the_others_go_on() {
    const KILLS: u32 = 40;
    let mut dice = Dice::from_environment(0x6b5);
    let uses: [&[i32]; 5] = [&[0, 1], &[1, 0], &[0], &[1], &[1, 0]];
    let (_gpu, node) = machine(2);
    let start = |dice: &mut Dice| {
        let devices = uses[dice.below(uses.len() as u64) as usize];
        Running::start(&node, &job(dice.below(1 << 40), devices, 1 + dice.below(8)))
    };
    let mut jobs: Vec<_> = (0..3).map(|_| start(&mut dice)).collect();
    let (mut kills, mut finished) = (0, 0);
    while kills < KILLS {
        let moment = Instant::now() + Duration::from_micros(dice.below(400_000));
        let victim = dice.below(3) as usize;
        while Instant::now() < moment {
            for job in &mut jobs {
                if let Some(status) = job.ended() {
                    assert!(status.success(), "a job that nobody killed ended with {status}");
                    finished += 1;
                    *job = start(&mut dice);
                }
            }
            std::thread::yield_now();
        }
        let status = jobs[victim].kill();
        // It may have ended by itself in the last moment.
        assert!(status.signal() == Some(9) || status.success(), "{status}");
        kills += 1;
        jobs[victim] = start(&mut dice);
    }
    println!("{kills} killed, {finished} ended by themselves with right data");
    assert!(finished > 0, "no job ever ended, so nothing was shown");
    TIMEOUT.until("the last ones have ended", || {
        jobs.iter_mut().all(|job| job.ended().is_some_and(|status| status.success()))
    });
    balances(&node);
}
