//! What scripts use: `nvshare wait`, `nvshare health`, and `nvshare run --simulate`.
//!
//! Needs the other parts beside the program: `cargo build --workspace` first.

use nvshare::paths;
use nvshare_test_support::Patience;
use nvshare_tools::health::{Health, Verdict};
use nvshare_tools::node::{Node, SimulatedGpu, TempDir};
use nvshare_tools::status;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Output, Stdio};

const TIMEOUT: Patience = Patience::seconds(20);

fn nvshare(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nvshare"));
    command.args(arguments).env_remove(paths::RUNTIME_DIR).env_remove("COLUMNS").stdin(Stdio::null());
    command
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn gpu() -> SimulatedGpu {
    SimulatedGpu::new(&[("MEMORY", "64MiB".into())]).expect("the workspace is built: cargo build --workspace")
}

/// A program that is killed when the test is over.
struct Killed(Child);

impl Killed {
    fn ends(&mut self) -> ExitStatus {
        let mut ended = None;
        TIMEOUT.until("it ends", || {
            ended = self.0.try_wait().unwrap();
            ended.is_some()
        });
        ended.unwrap()
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn waits(node_dir: &std::path::Path, arguments: &[&str]) -> Killed {
    let mut command = nvshare(&[&["wait"], arguments].concat());
    Killed(command.arg("--runtime-dir").arg(node_dir).spawn().unwrap())
}

/// A job that is a client of this name until its input ends.
fn job(node: &Node, name: &str) -> Killed {
    let mut command = nvshare(&["internal", "job", "--size", "4MiB", "--controlled"]);
    command.envs(node.environment()).env("NVSHARE_CLIENT_NAME", name);
    Killed(command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap())
}

#[test]
fn wait_ends_when_an_arbiter_serves_and_not_before() {
    let gpu = gpu();
    let dir = TempDir::new().unwrap();
    let output = nvshare(&["wait", "--timeout", "50ms", "--runtime-dir"]).arg(dir.path()).output().unwrap();
    assert!(
        output.status.code() == Some(1) && said(&output).contains("no arbiter answers"),
        "{}",
        said(&output)
    );
    let mut waiting = waits(dir.path(), &[]);
    assert!(waiting.0.try_wait().unwrap().is_none());
    let capacity = ["--capacity", "32MiB"].map(str::to_owned);
    let arbiter = nvshare_tools::node::start_arbiter(dir.path(), &capacity, &gpu.environment(&[])).unwrap();
    let _arbiter = Killed(arbiter.expect("there was none"));
    assert!(waiting.ends().success());
}

#[test]
fn wait_follows_a_client_through_its_states() {
    let gpu = gpu();
    let node = Node::start(gpu.environment(&[]), &["--capacity", "32MiB"].map(str::to_owned)).unwrap();
    let mut comes = waits(node.dir(), &["train", "--until", "registered"]);
    let mut gone_already = waits(node.dir(), &["name:train", "--until", "gone"]);
    assert!(gone_already.ends().success(), "there is none");
    assert!(comes.0.try_wait().unwrap().is_none());
    let job = job(&node, "train");
    assert!(comes.ends().success());
    let mut goes = waits(node.dir(), &["train", "--until", "gone"]);
    let late = nvshare(&["wait", "train", "--until", "gone", "--timeout", "50ms", "--runtime-dir"])
        .arg(node.dir())
        .output()
        .unwrap();
    assert!(late.status.code() == Some(1) && said(&late).contains("'train' is not gone"), "{}", said(&late));
    assert!(waits(node.dir(), &["train", "--until", "running"]).ends().success());
    drop(job);
    assert!(goes.ends().success());
    let wrong = nvshare(&["wait", "pid:x"]).output().unwrap();
    assert!(wrong.status.code() == Some(2) && said(&wrong).contains("pid: and a number"), "{}", said(&wrong));
}

fn health(dir: &std::path::Path, arguments: &[&str]) -> (Option<i32>, Health) {
    let mut command = nvshare(&[&["health", "--json"], arguments].concat());
    let output = command.arg("--runtime-dir").arg(dir).output().unwrap();
    (
        output.status.code(),
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", said(&output))),
    )
}

#[test]
fn health_ends_with_the_status_of_the_worst_that_it_finds() {
    let dir = TempDir::new().unwrap();
    let (code, found) = health(dir.path(), &["--liveness"]);
    assert_eq!((code, found.verdict), (Some(2), Verdict::Down), "{found:?}");
    let gpu = gpu();
    let node = Node::start(gpu.environment(&[]), &["--capacity", "32MiB"].map(str::to_owned)).unwrap();
    let find = |found: &Health, name: &str| {
        found.checks.iter().find(|check| check.name == name).map(|check| check.verdict)
    };
    let (_, found) = health(node.dir(), &[]);
    for name in ["arbiter", "versions", "pages", "books", "clients", "memory"] {
        assert_eq!(find(&found, name), Some(Verdict::Healthy), "{found:?}");
    }
    // The simulated GPU's NVML is not where this program looks.
    assert_eq!(find(&found, "nvml"), Some(Verdict::Degraded), "{found:?}");
    assert_eq!(health(node.dir(), &[]).0, Some(1));
    assert_eq!(health(node.dir(), &["--liveness"]).0, Some(0));
    let shown = nvshare(&["health", "--runtime-dir"]).arg(node.dir()).output().unwrap();
    let shown = said(&shown);
    assert!(shown.lines().all(|line| line.chars().count() <= 80), "{shown}");
    assert!(shown.starts_with("degraded\n") && shown.contains("-> install the NVIDIA driver"), "{shown}");
}

#[test]
fn a_program_runs_on_simulated_gpus_that_are_gone_afterwards() {
    let program = env!("CARGO_BIN_EXE_nvshare");
    let mut command =
        nvshare(&["run", "--simulate", "--gpus", "2", "--memory", "64MiB", "--name", "simulated", "--"]);
    command.args([program, "internal", "job", "--size", "40MiB", "--devices", "0,1", "--iterations", "3"]);
    let output = command.output().unwrap();
    let words = said(&output);
    assert!(output.status.success() && words.contains("\"right\":true"), "{words}");
    assert!(words.contains("2 GPUs simulated with 64.00 MiB each"), "{words}");
    let dir = words.split("--runtime-dir ").nth(1).unwrap().split_whitespace().next().unwrap();
    assert!(dir.starts_with('/') && !std::path::Path::new(dir).exists(), "{dir}");
}

#[test]
fn programs_of_one_shell_share_the_simulated_gpu_and_the_exit_status_is_the_programs() {
    let program = env!("CARGO_BIN_EXE_nvshare");
    let script = format!(
        "job() {{ {program} internal job --size 40MiB --iterations 5 --seed $1 >/dev/null; }}; \
         job 1 & first=$!; job 2 || exit 9; wait $first || exit 8; {program} status --json; exit 7"
    );
    let output =
        nvshare(&["run", "--simulate", "--memory", "66MiB", "--", "sh", "-c", &script]).output().unwrap();
    assert_eq!(output.status.code(), Some(7), "{}", said(&output));
    let node: status::Node = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((node.gpus.len(), node.gpus[0].capacity_bytes), (1, 66 << 20));
}

#[test]
fn a_signal_takes_the_program_and_the_simulated_gpu_with_it() {
    let mut command = nvshare(&["run", "--simulate", "--", "sh", "-c", "echo ready; exec sleep 600"]);
    let mut run = Killed(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(run.0.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    let mut first = String::new();
    BufReader::new(run.0.stderr.take().unwrap()).read_line(&mut first).unwrap();
    let dir = first.trim().rsplit(' ').next().unwrap().to_owned();
    assert!(std::path::Path::new(&dir).exists(), "{first}");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(run.0.id() as i32), nix::sys::signal::Signal::SIGTERM)
        .unwrap();
    assert_eq!(run.ends().code(), Some(128 + 15));
    assert!(!std::path::Path::new(&dir).exists(), "it is left behind");
}

#[test]
fn options_of_simulated_gpus_need_one() {
    for (arguments, words) in [
        (&["run", "--memory", "1GiB", "--", "true"][..], "--simulate"),
        (&["run", "--simulate", "--gpus", "17", "--", "true"], "1..=16"),
        (&["run", "--simulate", "--runtime-dir", "/x", "--", "true"], "cannot be used with"),
    ] {
        let output = nvshare(arguments).output().unwrap();
        assert!(output.status.code() == Some(2) && said(&output).contains(words), "{}", said(&output));
    }
}
