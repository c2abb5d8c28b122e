//! Real processes under the real shim share the simulated GPU: their data is right, also when others are
//! killed beside them, and the books balance.
//!
//! The job is `nvshare internal job`: driver API, buffers filled and mixed by kernels, checked to the last
//! word. Wrong data is exit status 1.

use nvshare_e2e::built;
use nvshare_test_support::{Dice, Patience};
use nvshare_tools::node::{Node, SimulatedGpu};
use nvshare_tools::status::{self, Client};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const TIMEOUT: Patience = Patience::seconds(60);

fn gpu() -> SimulatedGpu {
    let set = |name: &'static str, value: &str| (name, value.to_owned());
    SimulatedGpu::new(&[set("MEMORY", "256MiB"), set("CONTEXT_BYTES", "2MiB"), set("LINK_BANDWIDTH", "8GiB")])
        .unwrap()
}

fn node(gpu: &SimulatedGpu, capacity: &str, quantum: &str) -> Node {
    let arguments = ["--capacity", capacity, "--quantum", quantum].map(str::to_owned);
    Node::start(gpu.environment(&[]), &arguments).unwrap()
}

fn job(node: &Node, size: &str, iterations: u32, seed: u64) -> Child {
    Command::new(built("nvshare"))
        .args(["internal", "job", "--size", size, "--buffers", "2"])
        .args(["--iterations", &iterations.to_string(), "--seed", &seed.to_string()])
        .envs(node.environment())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn clients(node: &Node) -> Vec<Client> {
    status::read(node.dir()).unwrap().gpus.remove(0).clients
}

/// Everybody is gone, and so is every granule that they had.
fn balances(node: &Node) {
    TIMEOUT.until("all clients are reaped", || clients(node).is_empty());
    let gpu = status::read(node.dir()).unwrap().gpus.remove(0);
    assert_eq!(gpu.free_bytes, gpu.capacity_bytes as i64, "a granule was lost");
    assert_eq!(gpu.repaired, 0, "the books had to be repaired");
}

#[test]
fn those_who_fit_never_switch() {
    let gpu = gpu();
    let node = node(&gpu, "200MiB", "1ms");
    let mut jobs: Vec<_> = (1..=3).map(|seed| job(&node, "32MiB", 40, seed)).collect();
    let mut yields = 0;
    TIMEOUT.until("all have ended", || {
        yields = clients(&node).iter().filter(|client| client.bytes_out > 0).count().max(yields);
        jobs.iter_mut().all(|job| job.try_wait().unwrap().is_some())
    });
    for mut job in jobs {
        assert!(job.wait().unwrap().success());
    }
    assert_eq!(yields, 0, "somebody's memory was moved");
    balances(&node);
}

#[test]
fn those_who_do_not_fit_take_turns_and_keep_their_data() {
    let gpu = gpu();
    let node = node(&gpu, "100MiB", "20ms");
    let mut jobs: Vec<_> = (1..=3).map(|seed| job(&node, "64MiB", 60, seed)).collect();
    let mut moved = 0;
    TIMEOUT.until("all have ended", || {
        moved = clients(&node).iter().map(|client| client.bytes_in).sum::<u64>().max(moved);
        jobs.iter_mut().all(|job| job.try_wait().unwrap().is_some())
    });
    for mut job in jobs {
        assert!(job.wait().unwrap().success(), "wrong data");
    }
    assert!(moved > 0, "nobody's memory ever came back, so nothing was shown");
    balances(&node);
}

#[test]
fn whoever_is_killed_the_others_keep_their_data() {
    const KILLS: u32 = 100;
    let mut dice = Dice::from_environment(0xda7a);
    let gpu = gpu();
    let node = node(&gpu, "26MiB", "5ms");
    let start = |dice: &mut Dice| job(&node, "12MiB", 1 + dice.below(12) as u32, dice.below(1 << 40));
    let mut jobs: Vec<_> = (0..3).map(|_| start(&mut dice)).collect();
    let (mut kills, mut finished) = (0, 0);
    while kills < KILLS {
        let moment = Instant::now() + Duration::from_micros(dice.below(400_000));
        let victim = dice.below(3) as usize;
        while Instant::now() < moment {
            for job in &mut jobs {
                if let Some(status) = job.try_wait().unwrap() {
                    assert!(
                        status.success(),
                        "a job that nobody killed ended with {status}: wrong data or a CUDA error"
                    );
                    finished += 1;
                    *job = start(&mut dice);
                }
            }
            std::thread::yield_now();
        }
        jobs[victim].kill().unwrap();
        let status = jobs[victim].wait().unwrap();
        // It may have ended by itself in the last moment.
        assert!(status.signal() == Some(9) || status.success(), "{status}");
        kills += 1;
        jobs[victim] = start(&mut dice);
    }
    println!("{kills} killed, {finished} ended by themselves with right data");
    assert!(finished > 0, "no job ever ended, so nothing was shown");
    for mut job in jobs {
        assert!(job.wait().unwrap().success());
    }
    balances(&node);
}
