use super::*;
use crate::ctl::Setting;
use crate::status::{Client, Gpu};
use proptest::prelude::*;

fn client() -> Client {
    // Every field has a value in JSON that is nothing in particular.
    let text = r#"{"slot":3,"pid":4242,"name":"train","phase":"running","admitted":true,"demand_bytes":0,"resident_bytes":0,
        "pinned_bytes":0,"unmovable_bytes":0,"waiting_ns":null,"slice_left_ns":null,"gang":null,"paused":false,"weight":100,
        "priority":"normal","memory_limit_bytes":null,"memory_limit":null,"compute_limit":null,"takes_turns":false,"gpu_ns":0,
        "gpu_share":null,"charged_ns":0,"held_ns":0,"turns":0,"overruns":0,"overdue":false,"slices":0,"yields":0,"bytes_in":0,
        "bytes_out":0,"fill_ns":0,"evict_ns":0,"run_ns":0,"stall":null,"stalled_ns":null,"stalls":0,"drain_retries":0}"#;
    serde_json::from_str(text).unwrap()
}

fn gpu() -> Gpu {
    Gpu {
        uuid: "GPU-00000000-0000-0000-0000-000000000001".into(),
        capacity_bytes: 100 << 30,
        free_bytes: 1 << 30,
        pinned_bytes: 0,
        foreign_bytes: 0,
        foreign_processes: 0,
        bandwidth_in: 1,
        bandwidth_out: 1,
        arbiter_pid: 7,
        arbiter_alive: true,
        arbiter_generation: 1,
        audits: 5,
        repaired: 0,
        reaped: 0,
        clients: vec![client()],
    }
}

fn good() -> Facts {
    let nvml = Setting {
        name: "nvml-library".into(),
        value: Some("libnvidia-ml.so.1".into()),
        origin: "default".into(),
        changes_at_run_time: false,
    };
    let report = Report { release: RELEASE.into(), file: None, node: vec![nvml], gpus: Vec::new() };
    Facts {
        answers: true,
        report: Ok(report),
        node: Ok(Node { gpus: vec![gpu()], unreadable: Vec::new() }),
        host_memory: Some((50 << 30, 100 << 30)),
        nvml: None,
    }
}

/// The facts with one thing wrong.
fn with(change: impl FnOnce(&mut Facts)) -> Facts {
    let mut facts = good();
    change(&mut facts);
    facts
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
        (with(|facts| facts.host_memory = Some((9 << 30, 100 << 30))), "host-memory", Degraded, "9.00 GiB"),
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
            facts.host_memory = Some((host << 30, 100 << 30));
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
