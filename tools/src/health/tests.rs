use super::*;
use crate::ctl::Setting;
use crate::status::{Client, Gpu};
use proptest::prelude::*;

fn gpu() -> Gpu {
    let name = "train".into();
    let client =
        Client { slot: 3, pid: 4242, name, phase: "running".into(), admitted: true, ..Client::default() };
    Gpu {
        uuid: "GPU-00000000-0000-0000-0000-000000000001".into(),
        capacity_bytes: 100 << 30,
        free_bytes: 1 << 30,
        arbiter_alive: true,
        clients: vec![client],
        ..Gpu::default()
    }
}

fn node() -> Node {
    let (available, total) = (Some(50 << 30), Some(100 << 30));
    Node { gpus: vec![gpu()], host_available_bytes: available, host_memory_bytes: total, ..Node::default() }
}

fn good() -> Facts {
    let nvml = Setting {
        name: "nvml-library".into(),
        value: Some("libnvidia-ml.so.1".into()),
        origin: "default".into(),
        changes_at_run_time: false,
    };
    let report = Report { release: RELEASE.into(), file: None, node: vec![nvml], gpus: Vec::new() };
    Facts { answers: true, report: Ok(report), node: Ok(node()), nvml: None }
}

/// The facts with one thing wrong.
fn with(change: impl FnOnce(&mut Facts)) -> Facts {
    let mut facts = good();
    change(&mut facts);
    facts
}

/// So much of its 100 GiB is left to the host.
fn host_memory(gib: u64) -> impl FnOnce(&mut Facts) {
    move |facts| facts.node.as_mut().unwrap().host_available_bytes = Some(gib << 30)
}

fn with_gpu(change: impl FnOnce(&mut Gpu)) -> Facts {
    with(|facts| change(&mut facts.node.as_mut().unwrap().gpus[0]))
}

/// The check that is not healthy: it is the only one.
#[track_caller]
fn only(facts: &Facts) -> Check {
    let health = checks(facts);
    let bad: Vec<_> = health.checks.iter().filter(|check| check.verdict != Verdict::Healthy).collect();
    assert_eq!(bad.len(), 1, "{bad:?}");
    assert_eq!(health.verdict, bad[0].verdict);
    assert!(bad[0].remedy.is_some(), "what to do is said: {bad:?}");
    bad[0].clone()
}

#[test]
fn a_node_that_is_as_it_should_be_is_healthy() {
    let health = checks(&good());
    assert_eq!(health.verdict, Verdict::Healthy, "{health:?}");
    assert!(health.checks.len() == 8 && health.checks.iter().all(|check| check.remedy.is_none()));
}

#[test]
fn each_thing_that_can_be_wrong_is_found_by_its_name() {
    use Verdict::{Degraded, Down};
    let stall = |ns| {
        move |gpu: &mut Gpu| {
            gpu.clients[0].stall = Some("endless-work".into());
            gpu.clients[0].stalled_ns = Some(ns);
        }
    };
    for (facts, name, verdict, words) in [
        (with_gpu(|gpu| gpu.arbiter_alive = false), "arbiter", Down, "has not been alive"),
        (
            with(|facts| facts.report.as_mut().unwrap().release = "9.9.9".into()),
            "versions",
            Degraded,
            "nvshare 9.9.9",
        ),
        (
            with(|facts| facts.node.as_mut().unwrap().unreadable.push("GPU-x.page: short".into())),
            "pages",
            Degraded,
            "GPU-x.page",
        ),
        (with_gpu(|gpu| gpu.repaired = 2), "books", Degraded, "2 times"),
        (with_gpu(stall(11 * SECOND)), "clients", Degraded, "pid 4242 (train)"),
        (with_gpu(|gpu| gpu.clients[0].overdue = true), "clients", Degraded, "compute turn"),
        (with_gpu(|gpu| gpu.free_bytes = -(3 << 30)), "memory", Degraded, "overbooked by 3.00 GiB"),
        (with_gpu(|gpu| gpu.foreign_bytes = 11 << 30), "memory", Degraded, "outside nvshare"),
        (with(host_memory(9)), "host-memory", Degraded, "9.00 GiB"),
        (with(|facts| facts.nvml = Some("no such file".into())), "nvml", Degraded, "no such file"),
    ] {
        let check = only(&facts);
        assert_eq!((check.name.as_str(), check.verdict), (name, verdict), "{check:?}");
        assert!(check.found.contains(words), "{check:?}");
    }
    assert_eq!(checks(&with_gpu(stall(9 * SECOND))).verdict, Verdict::Healthy, "it may end yet");
}

#[test]
fn without_an_arbiter_the_node_is_down() {
    let facts = with(|facts| {
        facts.answers = false;
        facts.report = Err("no arbiter answers".into());
    });
    assert_eq!(only(&facts).name, "arbiter");
    assert_eq!(checks(&facts).verdict, Verdict::Down);
}

proptest! {
    /// What else is wrong makes nothing better.
    #[test]
    fn the_worst_check_decides(
        answers: bool, alive: bool, free in -5i64..5, foreign in 0..200u64, host in 0..100u64, repaired in 0..2u64,
    ) {
        let facts = with(|facts| {
            facts.answers = answers;
            host_memory(host)(facts);
            let gpu = &mut facts.node.as_mut().unwrap().gpus[0];
            (gpu.arbiter_alive, gpu.free_bytes, gpu.foreign_bytes) = (alive, free << 30, foreign << 30);
            gpu.repaired = repaired;
        });
        let health = checks(&facts);
        prop_assert_eq!(health.verdict == Verdict::Down, !answers || !alive);
        let all_well = free >= 0 && foreign <= 10 && host >= 10 && repaired == 0;
        prop_assert_eq!(health.verdict == Verdict::Healthy, answers && alive && all_well);
    }
}
