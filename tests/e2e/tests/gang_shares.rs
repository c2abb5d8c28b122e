//! Weights and priorities of gangs, and three gangs on the same GPUs: real processes that always have work, no two jobs of which fit
//! together. Verdicts are on rounds that the jobs have done while all lived, by comparison with each other.

use nvshare_e2e::built;
use nvshare_e2e::ranks::{Job, Machine, Shape, TIMEOUT, job, machine_of, machine_with};
use serde_json::Value;
use std::process::Command;

/// Two GPUs whose arbiter waits for pauses as long as a busy machine may make them: all jobs here always have work.
fn two_gpus(more: &[&str]) -> Machine {
    machine_with(2, "any", &[&["--idle-grace", "200ms"], more].concat())
}

/// A job of two ranks on the GPUs 0 and 1, both with these variables.
fn pair(variables: &[(&'static str, &str)]) -> Shape {
    let variables = variables.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    Shape { variables, ..job(&[0, 1]) }
}

/// The rounds that each of these jobs has done by the time at which all have done `least` since all were ready. All end well.
fn rounds_beside_each_other(machine: &Machine, shapes: &[Shape], least: u64) -> Vec<u64> {
    let start = |(number, shape): (usize, &Shape)| Job::start(machine, &format!("job{number}"), shape);
    let jobs: Vec<_> = shapes.iter().enumerate().map(start).collect();
    TIMEOUT.until("all jobs are ready", || jobs.iter().all(Job::is_ready));
    let before: Vec<_> = jobs.iter().map(Job::rounds).collect();
    let done = || jobs.iter().zip(&before).map(|(job, before)| job.rounds() - before).collect::<Vec<_>>();
    TIMEOUT.until("all jobs get on", || done().iter().all(|rounds| *rounds >= least));
    let rounds = done();
    println!("rounds in the same time: {rounds:?}");
    jobs.into_iter().for_each(Job::ends_well);
    machine.balances();
    rounds
}

/// Three times the weight: three times the time, and about as many rounds.
#[test]
fn a_gang_of_more_weight_gets_on_faster() {
    let machine = two_gpus(&[]);
    let shapes = [pair(&[("NVSHARE_WEIGHT", "300")]), pair(&[])];
    let rounds = rounds_beside_each_other(&machine, &shapes, 60);
    assert!(rounds[0] > rounds[1] * 3 / 2, "{rounds:?}");
}

/// Whoever is of high priority is next, each time that it asks: of three it has every other turn.
#[test]
fn a_gang_of_high_priority_has_more_turns_and_the_others_get_on() {
    let machine = two_gpus(&[]);
    let shapes = [pair(&[("NVSHARE_PRIORITY", "high")]), pair(&[]), pair(&[])];
    let rounds = rounds_beside_each_other(&machine, &shapes, 60);
    for other in [1, 2] {
        assert!(rounds[0] > rounds[other] * 5 / 4, "{rounds:?}");
    }
}

/// Whoever is of low priority has a turn when its deadline has come, which is short here.
#[test]
fn a_gang_of_low_priority_gets_on_all_the_same() {
    let machine = two_gpus(&["--deadline", "2s"]);
    let shapes = [pair(&[("NVSHARE_PRIORITY", "low")]), pair(&[])];
    let rounds = rounds_beside_each_other(&machine, &shapes, 10);
    assert!(rounds[1] > rounds[0] * 3 / 2, "{rounds:?}");
}

/// Each has its turn again and again, and none has much more than another.
#[test]
fn three_gangs_on_the_same_gpus_get_on_alike() {
    let machine = two_gpus(&[]);
    let rounds = rounds_beside_each_other(&machine, &[pair(&[]), pair(&[]), pair(&[])], 100);
    assert!(rounds.iter().max() < rounds.iter().min().map(|least| least * 2).as_ref(), "{rounds:?}");
}

/// How often memory came in ahead of a turn on each of two GPUs, in the order of their UUIDs.
fn prefetches(machine: &Machine) -> [usize; 2] {
    let mut command = Command::new(built("nvshare"));
    let done = command.arg("trace").arg("--runtime-dir").arg(machine.node.dir()).arg("-").output().unwrap();
    let trace: Value = serde_json::from_slice(&done.stdout).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let on =
        |gpu: u64| events.iter().filter(|event| event["name"] == "prefetches" && event["pid"] == gpu).count();
    [on(0), on(1)]
}

/// A rank is idle on its GPU as long as its gang waits for an earlier one. The next gang's memory comes in there all the same, while
/// another one runs, and what goes for it is that of the one after it.
#[test]
fn the_next_gangs_memory_comes_in_on_all_its_gpus() {
    let machine = machine_of(2, "ascending", "200MiB", "200ms", &["--idle-grace", "200ms"]);
    let large = Shape { mib: 130, ..pair(&[]) };
    let jobs = ["first", "second", "third"].map(|name| Job::start(&machine, name, &large));
    TIMEOUT.until("all jobs are ready", || jobs.iter().all(Job::is_ready));
    TIMEOUT.until("memory has come in ahead of its turn on both GPUs", || {
        prefetches(&machine).iter().all(|times| *times >= 3)
    });
    println!("{:?}", prefetches(&machine));
    jobs.into_iter().for_each(Job::ends_well);
    machine.balances();
}
