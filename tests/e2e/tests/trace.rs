//! `nvshare trace`: what the clients did, as their journals in the page have it.

use nvshare_e2e::built;
use nvshare_tools::crew::{Crew, Message};
use nvshare_tools::job::{Event, Job};
use nvshare_tools::node::{Node, SimulatedGpu};
use serde_json::Value;
use std::process::Command;
use std::time::{Duration, Instant};

fn gpu() -> SimulatedGpu {
    SimulatedGpu::new(&[("MEMORY", "32MiB".into()), ("CONTEXT_BYTES", "2MiB".into())]).unwrap()
}

/// Two jobs that do not fit beside one another, to their end.
fn two_take_turns(node: &Node) {
    let job = |seed| Job {
        size: 20 << 20,
        buffers: 3,
        devices: vec![0],
        iterations: 60,
        seed,
        managed: false,
        read_only: false,
        seconds: None,
        controlled: false,
    };
    let mut crew = Crew::start(&[job(1), job(2)], &node.environment()).unwrap();
    let (until, mut done) = (Instant::now() + Duration::from_secs(120), [false; 2]);
    while done.contains(&false) {
        match crew.next(until).expect("jobs end") {
            (index, Message::Event(Event::Done(outcome))) => {
                assert!(outcome.right);
                done[index] = true;
            }
            (index, Message::Ended(said)) if !done[index] => panic!("job {index}: {said}"),
            _ => {}
        }
    }
}

fn trace(node: &Node, arguments: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(built("nvshare"));
    command.arg("trace").arg("--runtime-dir").arg(node.dir()).args(arguments);
    let done = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (done.status.code().unwrap(), text(&done.stdout), text(&done.stderr))
}

/// Spans of one name: client, beginning and end in us, arguments.
fn spans(trace: &Value, name: &str) -> Vec<(u64, f64, f64, Value)> {
    let events = trace["traceEvents"].as_array().unwrap();
    events
        .iter()
        .filter(|event| event["ph"] == "X" && event["name"] == name)
        .map(|event| {
            let (from, took) = (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap());
            (event["tid"].as_u64().unwrap(), from, from + took, event["args"].clone())
        })
        .collect()
}

#[test]
fn what_happened_is_told_after_the_clients_have_ended() {
    let gpu = gpu();
    let arguments = ["--capacity", "32MiB", "--quantum", "30ms"].map(str::to_owned);
    let node = Node::start(gpu.environment(&[]), &arguments).unwrap();
    two_take_turns(&node);
    let (status, json, said) = trace(&node, &["-"]);
    assert_eq!((status, said.as_str()), (0, ""));
    let told: Value = serde_json::from_str(&json).unwrap();

    let mut runs = spans(&told, "running");
    runs.sort_by(|one, next| one.1.total_cmp(&next.1));
    let clients: std::collections::BTreeSet<_> = runs.iter().map(|run| run.0).collect();
    assert_eq!(clients.len(), 2, "both ran: {json}");
    // Before both have allocated all they need, both may run.
    let first = spans(&told, "evicts").iter().map(|span| span.1).fold(f64::INFINITY, f64::min);
    let later: Vec<_> = runs.iter().filter(|run| run.1 > first).collect();
    assert!(!later.is_empty(), "{json}");
    for pair in later.windows(2) {
        assert!(pair[0].0 == pair[1].0 || pair[0].2 <= pair[1].1, "two ran at a time: {pair:?}");
    }
    // One had to go out for the other, at least once, and came back.
    let bytes =
        |name| spans(&told, name).iter().map(|span| span.3["bytes"].as_u64().unwrap_or(0)).sum::<u64>();
    assert!(bytes("evicts") > 0, "{json}");
    assert!(bytes("filling") + bytes("prefetches") > 0, "{json}");
    let drains = spans(&told, "draining");
    assert!(
        drains.iter().any(|drain| drain.3["why"] == "turn over" || drain.3["why"] == "interrupted"),
        "{json}"
    );
    // A drain follows a run, or a fill of one that had run and grew.
    let before: Vec<_> = runs.iter().cloned().chain(spans(&told, "filling")).collect();
    for drain in &drains {
        let follows = |span: &(u64, f64, f64, Value)| span.0 == drain.0 && (span.2 - drain.1).abs() < 0.01;
        assert!(before.iter().any(follows), "a drain without a run: {drain:?}: {json}");
    }

    let picture = gpu_picture(&node);
    assert!(picture.starts_with("<svg") && picture.ends_with("</svg>\n"), "{picture}");
    assert!(picture.matches("<rect").count() > 10, "{picture}");
    assert!(picture.contains(">pid "), "those who have gone are told by their pid: {picture}");
}

fn gpu_picture(node: &Node) -> String {
    let file = node.dir().join("picture.svg");
    let (status, _, said) = trace(node, &[file.to_str().unwrap()]);
    assert_eq!((status, said.as_str()), (0, ""));
    std::fs::read_to_string(file).unwrap()
}

#[test]
fn a_recording_has_what_happens_while_it_lasts_and_no_more() {
    let gpu = gpu();
    let arguments = ["--capacity", "32MiB", "--quantum", "30ms"].map(str::to_owned);
    let node = Node::start(gpu.environment(&[]), &arguments).unwrap();
    two_take_turns(&node);
    let (status, json, _) = trace(&node, &["--record", "1ms", "-"]);
    assert_eq!(status, 0);
    let told: Value = serde_json::from_str(&json).unwrap();
    assert!(spans(&told, "running").is_empty(), "what was before is left out: {json}");
}

#[test]
fn bad_names_and_empty_nodes_are_told() {
    let gpu = gpu();
    let node = Node::start(gpu.environment(&[]), &["--capacity".into(), "32MiB".into()]).unwrap();
    let (status, _, said) = trace(&node, &["picture.png"]);
    assert_eq!(status, 2);
    assert!(said.contains(".json or .svg"), "{said}");
    let nowhere = Command::new(built("nvshare"))
        .args(["trace", "--runtime-dir", "/nonexistent", "-"])
        .output()
        .unwrap();
    assert_eq!(nowhere.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("/nonexistent"));
}
