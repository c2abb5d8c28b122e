//! A real Prometheus and its promtool: metrics, rules and alerts. Where they are not installed the tests say so and are skipped;
//! `tests/metrics/install` installs them.

use nvshare::record;
use nvshare_e2e::application::books::Competitor;
use nvshare_e2e::application::{Application, MIB, gpu};
use nvshare_e2e::monitor::MonitoredNode;
use nvshare_test_support::Patience;
use nvshare_tools::status;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const TIMEOUT: Patience = Patience::seconds(30);

/// Whether these programs are here. If not, the test is skipped, or fails if NVSHARE_NEEDS_PROMETHEUS says that they must be.
fn has(programs: &[&str]) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = |program: &&&str| std::env::split_paths(&paths).any(|dir| dir.join(program).is_file());
    let Some(missing) = programs.iter().find(|program| !found(program)) else { return true };
    assert!(std::env::var_os("NVSHARE_NEEDS_PROMETHEUS").is_none(), "{missing} is not installed");
    println!("SKIPPED: {missing} is not installed; tests/metrics/install installs it");
    false
}

fn packaged(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../packaging/prometheus")
        .join(file)
        .canonicalize()
        .unwrap()
}

#[track_caller]
fn promtool(arguments: &[&str], input: &str) {
    let mut command = Command::new("promtool");
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_owned();
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
    assert!(output.status.success(), "promtool {arguments:?}: {said:?}");
    assert!(!said[1].contains("should"), "promtool {arguments:?} has advice: {said:?}");
    writer.join().unwrap().unwrap();
}

#[test]
fn promtool_has_nothing_against_metrics_rules_and_alerts() {
    if !has(&["promtool"]) {
        return;
    }
    let gpu = gpu();
    let monitored = MonitoredNode::start(&gpu, &[]);
    let mut one = Application::ready(&monitored.node);
    let block = one.alloc(8 * MIB);
    one.writes(block, 8 * MIB, 7);
    let mut odd = Application::start(
        monitored.node.environment(),
        &[("NVSHARE_CLIENT_NAME", "odd \"name\\ {with} <everything> é")],
    );
    odd.does("init");
    odd.does("create");
    TIMEOUT
        .until("both are clients", || status::read(monitored.node.dir()).unwrap().gpus[0].clients.len() == 2);
    promtool(&["check", "metrics"], &monitored.metrics());
    promtool(&["check", "rules", packaged("nvshare.rules.yml").to_str().unwrap()], "");
    promtool(&["test", "rules", packaged("nvshare.rules.test.yml").to_str().unwrap()], "");
    one.ends_well();
    odd.end();
}

/// A Prometheus that scrapes twice a second. Killed when dropped.
struct Prometheus {
    child: Child,
    address: SocketAddr,
    _dir: tempfile::TempDir,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Prometheus {
    fn start(target: SocketAddr) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = format!(
            "global: {{scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 500ms}}\nrule_files: ['{}']\nscrape_configs:\n- job_name: nvshare\n  honor_labels: true\n  static_configs: [{{targets: ['{target}']}}]\n",
            packaged("nvshare.rules.yml").display()
        );
        std::fs::write(dir.path().join("prometheus.yml"), config).unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", dir.path().join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(dir.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let mut started = Self { child, address, _dir: dir };
        TIMEOUT.until("Prometheus answers", || {
            assert!(started.child.try_wait().unwrap().is_none(), "{}", started.log());
            started.get("/-/ready").is_some()
        });
        started
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self._dir.path().join("log")).unwrap_or_default()
    }

    fn get(&self, path: &str) -> Option<String> {
        let mut stream = TcpStream::connect(self.address).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {}\r\n\r\n", self.address).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        head.contains(" 200 ").then(|| body.to_owned())
    }

    fn json(&self, path: &str) -> Value {
        self.get(path).and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
    }

    /// What an expression without spaces comes to now: a number for each series.
    fn query(&self, expression: &str) -> Vec<f64> {
        let answer = self.json(&format!("/api/v1/query?query={expression}"));
        let series = answer["data"]["result"].as_array().cloned().unwrap_or_default();
        series.iter().filter_map(|one| one["value"][1].as_str()?.parse().ok()).collect()
    }

    /// The alerts that fire.
    fn firing(&self) -> Vec<String> {
        let answer = self.json("/api/v1/alerts");
        let alerts = answer["data"]["alerts"].as_array().cloned().unwrap_or_default();
        let firing = alerts.iter().filter(|alert| alert["state"] == "firing");
        firing.filter_map(|alert| alert["labels"]["alertname"].as_str().map(str::to_owned)).collect()
    }
}

#[test]
fn a_real_prometheus_scrapes_and_an_alert_fires_when_the_books_were_repaired() {
    if !has(&["prometheus"]) {
        return;
    }
    let gpu = gpu();
    let monitored = MonitoredNode::start(&gpu, &[]);
    let prometheus = Prometheus::start(monitored.address);
    let mut one = Application::ready(&monitored.node);
    let block = one.alloc(32 * MIB);
    one.writes(block, 32 * MIB, 7);
    let mut other = Competitor::start(&monitored.node);
    other.takes_all(&monitored.node, &one);
    TIMEOUT.until("Prometheus has seen both clients", || {
        prometheus.query("count(nvshare_client_resident_bytes)") == [2.0]
    });
    let moved = status::read(monitored.node.dir()).unwrap().gpus[0]
        .clients
        .iter()
        .map(|client| client.bytes_out)
        .max();
    TIMEOUT.until("Prometheus has what status shows", || {
        prometheus.query("max(nvshare_client_copied_out_bytes_total)") == [moved.unwrap() as f64]
    });
    TIMEOUT.until("Prometheus has the switch", || {
        prometheus.query("sum(nvshare_gpu_switch_duration_seconds_count)").iter().any(|count| *count >= 1.0)
    });
    TIMEOUT.until("the recording rules have results", || {
        !prometheus.query("count(client:nvshare_gpu_time:ratio_rate5m)").is_empty()
    });
    assert_eq!(prometheus.firing(), [""; 0]);
    // Somebody writes into the page: five granules are gone from the pool's counter.
    let uuid = status::read(monitored.node.dir()).unwrap().gpus[0].uuid.parse().unwrap();
    let page = record::open_page(monitored.node.dir(), uuid).unwrap();
    // SAFETY: the mapping is a page, whose counter is at this place (src/page/layout.rs has a test of it), and atomic.
    let free = unsafe { &*((page.address() + 256) as *const AtomicU64) };
    let _ = free.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |word| {
        Some(word & !0xffff_ffff | u64::from((word as u32).wrapping_sub(5)))
    });
    TIMEOUT.until("the alert fires", || prometheus.firing() == ["NvshareBooksRepaired"]);
    other.ends();
    one.end();
}
