//! Metrics and JSON that an arbiter serves: what they say, and what whoever asks cannot do.

use nvshare_arbiter::monitor::metrics;
use nvshare_e2e::application::books::Competitor;
use nvshare_e2e::application::{Application, MIB, gpu};
use nvshare_e2e::monitor::{MonitoredNode, number, read};
use nvshare_test_support::Patience;
use nvshare_tools::status;
use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

const TIMEOUT: Patience = Patience::seconds(60);

#[test]
fn metrics_say_what_status_says_in_base_units() {
    let gpu = gpu();
    let monitored = MonitoredNode::start(&gpu, &[]);
    let mut one = Application::ready(&monitored.node);
    let block = one.alloc(32 * MIB);
    one.writes(block, 32 * MIB, 7);
    // Everything goes out, and comes in again.
    let mut other = Competitor::start(&monitored.node);
    other.takes_all(&monitored.node, &one);
    other.ends();
    one.sees(block, 32 * MIB, 7);
    let client = |gpu: &status::Gpu| gpu.clients.iter().find(|client| client.demand_bytes > 0).cloned();
    let status = || status::read(monitored.node.dir()).unwrap().gpus.remove(0);
    TIMEOUT.until("only the one is left, and has moved", || {
        let gpu = status();
        gpu.clients.len() == 1
            && client(&gpu).is_some_and(|client| client.bytes_in > 0 && client.phase == "idle")
    });
    TIMEOUT.until("the arbiter's thread has seen the switch", || {
        number(&monitored.metrics(), "nvshare_gpu_switch_duration_seconds_count", &[]) > Some(0.0)
    });
    let (gpu, text) = (status(), monitored.metrics());
    let client = client(&gpu).unwrap();
    let of = [format!("pid=\"{}\"", client.pid), format!("gpu=\"{}\"", gpu.uuid), "index=\"0\"".to_owned()];
    let of: Vec<_> = of.iter().map(String::as_str).collect();
    for (name, expected) in [
        ("nvshare_client_resident_bytes", client.resident_bytes as f64),
        ("nvshare_client_copied_out_bytes_total", client.bytes_out as f64),
        ("nvshare_client_copied_in_bytes_total", client.bytes_in as f64),
        ("nvshare_client_elided_bytes_total", client.bytes_elided as f64),
        ("nvshare_client_slices_total", client.slices as f64),
        ("nvshare_client_run_seconds_total", client.run_ns as f64 / 1e9),
    ] {
        assert_eq!(number(&text, name, &of), Some(expected), "{name}");
    }
    for (name, expected) in [
        ("nvshare_gpu_capacity_bytes", gpu.capacity_bytes as f64),
        ("nvshare_gpu_free_bytes", gpu.free_bytes as f64),
        ("nvshare_gpu_reaped_clients_total", gpu.reaped as f64),
        ("nvshare_gpu_memory_bytes", (256 * MIB) as f64),
    ] {
        assert_eq!(number(&text, name, &["index=\"0\""]), Some(expected), "{name}");
    }
    assert_eq!(number(&text, "nvshare_client_phase", &[of[0], "phase=\"idle\""]), Some(1.0));
    // Both drained once at least; whoever waited was counted.
    let counted = |name: &str| number(&text, &format!("nvshare_gpu_{name}_duration_seconds_count"), &[]);
    for name in ["switch", "handoff", "drain", "slice", "wait"] {
        assert!(counted(name) >= Some(1.0), "{name}");
    }
    let took = number(&text, "nvshare_gpu_switch_duration_seconds_sum", &[]).unwrap();
    assert!(took > 0.0 && took < 600.0, "{took}");
    one.ends_well();
}

#[test]
fn the_node_as_json_is_what_status_prints() {
    let gpu = gpu();
    let monitored = MonitoredNode::start(&gpu, &[]);
    let mut one = Application::ready(&monitored.node);
    let block = one.alloc(8 * MIB);
    one.writes(block, 8 * MIB, 7);
    TIMEOUT.until("it is idle", || {
        status::read(monitored.node.dir()).unwrap().gpus[0]
            .clients
            .iter()
            .all(|client| client.phase == "idle")
    });
    let served: status::Node = serde_json::from_value(monitored.json("/api/node")).unwrap();
    let own = nvshare_stats::Reader::new(monitored.node.dir()).read().unwrap();
    assert_eq!(served.gpus[0].clients, own.gpus[0].clients);
    assert_eq!(served.gpus[0].free_bytes, own.gpus[0].free_bytes);
    assert_eq!((served.gpus[0].index, own.gpus[0].index), (Some(0), None), "the arbiter asks NVML");
    let described = monitored.json("/api/describe");
    assert_eq!(described["schema_version"], served.schema_version);
    let timeline = monitored.json("/api/timeline?since=0");
    let running = |span: &serde_json::Value| {
        span["what"] == "running" && span["slot"] == served.gpus[0].clients[0].slot
    };
    assert!(timeline["gpus"][0]["spans"].as_array().unwrap().iter().any(running), "{timeline}");
    assert_eq!(timeline["gpus"][0]["current"][0]["what"], "idle");
    let since = timeline["now"].to_string();
    assert_eq!(
        monitored.json(&format!("/api/timeline?since={since}"))["gpus"][0]["spans"].as_array().unwrap().len(),
        0
    );
    one.ends_well();
}

#[test]
fn whoever_asks_can_change_nothing_and_a_page_from_elsewhere_can_read_nothing() {
    let gpu = gpu();
    let monitored = MonitoredNode::start(&gpu, &[]);
    let address = monitored.address;
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        let answer = monitored.ask(&format!("{method} / HTTP/1.1\r\nHost: {address}\r\n\r\n"));
        assert_eq!(answer.status, 405, "{method}: {answer:?}");
        assert!(!answer.head.contains("access-control"), "{answer:?}");
    }
    // A name that somebody has had this machine's browser look up as 127.0.0.1.
    for path in ["/", "/metrics", "/api/node"] {
        let answer = monitored.ask(&format!("GET {path} HTTP/1.1\r\nHost: evil.example\r\n\r\n"));
        assert_eq!(answer.status, 421, "{answer:?}");
        assert!(!answer.body.contains("nvshare_"));
    }
    assert_eq!(monitored.get("/etc/passwd").status, 404);
    let page = monitored.get("/");
    for part in [
        "content-security-policy: default-src 'none'; script-src 'nonce-",
        "x-content-type-options: nosniff",
        "frame-ancestors 'none'",
    ] {
        assert!(page.head.contains(part), "{part}: {}", page.head);
    }
    // Garbage and more than a head may hold are refused, and the arbiter is there.
    for request in
        ["\0\u{1}\u{2}\r\n\r\n".to_owned(), format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1 << 20))]
    {
        let mut stream = monitored.connect();
        // It may close before all is written.
        let _ = stream.write_all(request.as_bytes());
        let _ = std::io::Read::read_to_end(&mut stream, &mut Vec::new());
    }
    assert_eq!(monitored.get("/metrics").status, 200);
}

#[test]
fn connections_that_say_nothing_or_read_nothing_keep_neither_others_nor_clients_out() {
    let gpu = gpu();
    let monitored = MonitoredNode::start(&gpu, &[]);
    let silent: Vec<_> = (0..100).map(|_| monitored.connect()).collect();
    let mut greedy = monitored.connect();
    write!(greedy, "GET /metrics HTTP/1.1\r\nHost: {}\r\n\r\n", monitored.address).unwrap();
    // A client is served at once.
    let one = Application::ready(&monitored.node);
    // So is whoever asks, when those before have had their seconds.
    assert_eq!(monitored.get("/metrics").status, 200);
    assert_eq!(read(&mut greedy).status, 200);
    drop(silent);
    one.ends_well();
}

/// Every metric that the rules and the dashboard name is served.
#[test]
fn rules_and_dashboard_name_only_metrics_that_there_are() {
    let gpu = gpu();
    let monitored = MonitoredNode::start(&gpu, &[]);
    let text = monitored.metrics();
    let served: BTreeSet<_> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging");
    for file in ["prometheus/nvshare.rules.yml", "grafana/nvshare.json"] {
        let text = std::fs::read_to_string(packaging.join(file)).unwrap();
        let named = named_metrics(&text);
        assert!(named.len() > 5, "{file}: {named:?}");
        for name in named {
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|part| name.strip_suffix(part));
            let there = served.contains(&*name) || family.is_some_and(|family| served.contains(family));
            assert!(there, "{file} names {name}, which is not served");
        }
    }
    let listed: BTreeSet<_> = metrics::all().into_iter().map(|(name, ..)| name).collect();
    assert_eq!(served.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>(), listed);
}

/// The words in a text that begin as our metrics do; not the names of recording rules, which have a colon before.
fn named_metrics(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices("nvshare_") {
        let before = text[..at].chars().next_back().unwrap_or(' ');
        if before.is_alphanumeric() || before == ':' || before == '_' {
            continue;
        }
        let rest = &text[at..];
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        found.insert(rest[..end].to_owned());
    }
    found
}
