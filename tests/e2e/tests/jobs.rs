//! Jobs as processes on the simulated GPU, alone and beside others.

use nvshare_tools::crew::{Crew, Message};
use nvshare_tools::job::{Event, Job, Outcome};
use nvshare_tools::node::{Environment, Node, SimulatedGpu};
use std::time::{Duration, Instant};

fn gpu(memory: &str) -> SimulatedGpu {
    let settings = [("MEMORY", memory.into()), ("CONTEXT_BYTES", "2MiB".into())];
    SimulatedGpu::new(&settings).expect("the workspace is built: cargo build --workspace")
}

fn job(seed: u64, iterations: u64) -> Job {
    Job {
        size: 20 << 20,
        buffers: 3,
        devices: vec![0],
        iterations,
        seed,
        managed: false,
        read_only: false,
        seconds: None,
        controlled: false,
    }
}

fn outcomes(jobs: &[Job], environment: &Environment) -> Vec<Outcome> {
    let mut crew = Crew::start(jobs, environment).unwrap();
    let mut outcomes = vec![None; jobs.len()];
    let until = Instant::now() + Duration::from_secs(120);
    while outcomes.contains(&None) {
        match crew.next(until).expect("jobs end") {
            (index, Message::Event(Event::Done(outcome))) => outcomes[index] = Some(outcome),
            (index, Message::Ended(said)) if outcomes[index].is_none() => panic!("job {index}: {said}"),
            _ => {}
        }
    }
    outcomes.into_iter().flatten().collect()
}

#[test]
fn a_job_alone_is_right() {
    let gpu = gpu("64MiB");
    for managed in [false, true] {
        let [outcome] = &outcomes(&[Job { managed, ..job(1, 10) }], &gpu.environment(&[]))[..] else {
            panic!("one job, one outcome")
        };
        assert!(outcome.right && outcome.iterations == 10, "{outcome:?}");
    }
}

#[test]
fn jobs_that_do_not_fit_together_are_right_under_nvshare() {
    let gpu = gpu("32MiB");
    let arguments = ["--capacity", "32MiB", "--quantum", "30ms"].map(str::to_owned);
    let node = Node::start(gpu.environment(&[]), &arguments).unwrap();
    let jobs: Vec<Job> = (1..=3).map(|seed| job(seed, 60)).collect();
    for outcome in outcomes(&jobs, &node.environment()) {
        assert!(outcome.right && outcome.iterations == 60, "{outcome:?}");
    }
}

#[test]
fn without_nvshare_they_run_out_of_memory() {
    let gpu = gpu("32MiB");
    let mut crew = Crew::start(&[Job { size: 40 << 20, ..job(1, 1) }], &gpu.environment(&[])).unwrap();
    let until = Instant::now() + Duration::from_secs(30);
    let said = loop {
        match crew.next(until).expect("the job ends") {
            (_, Message::Ended(said)) => break said,
            (_, Message::Event(Event::Done(outcome))) => panic!("{outcome:?}"),
            _ => {}
        }
    };
    assert!(said.contains("cuMemAlloc said CUDA_ERROR_OUT_OF_MEMORY"), "{said}");
}

#[test]
fn a_controlled_job_starts_and_ends_when_it_is_told() {
    let gpu = gpu("64MiB");
    let endless = Job { controlled: true, ..job(1, u64::MAX) };
    let mut crew = Crew::start(&[endless], &gpu.environment(&[])).unwrap();
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        match crew.next(until).expect("the job says something") {
            (_, Message::Event(Event::Ready { .. })) => crew.go(),
            (_, Message::Event(Event::Progress { done })) if done > 3 => crew.stop(),
            (_, Message::Event(Event::Done(outcome))) => {
                assert!(outcome.right && outcome.iterations > 3, "{outcome:?}");
                break;
            }
            (_, Message::Ended(said)) => panic!("{said}"),
            _ => {}
        }
    }
}
