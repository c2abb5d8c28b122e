//! Commands whose output nobody reads any more, and commands that are interrupted: they end at once and without a word, and
//! take all their processes with them.

use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use nvshare_test_support::Patience;
use nvshare_tools::node::{Node, SimulatedGpu};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

const TIMEOUT: Patience = Patience::seconds(60);

const SCENARIO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/scenarios/four-jobs.toml");

/// A command in a session of its own, as a terminal's.
fn nvshare(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nvshare"));
    command.args(arguments).stdin(Stdio::null()).stderr(Stdio::piped());
    // SAFETY: setsid is allowed between fork and exec.
    unsafe { command.pre_exec(|| Ok(nix::unistd::setsid().map(drop)?)) };
    command
}

/// The processes of a session that live.
fn session(leader: u32) -> Vec<u32> {
    let stats = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = stats.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
        let stat = stat.unwrap_or_default();
        let fields: Vec<_> = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ').collect();
        fields.get(3) == Some(&leader.to_string().as_str()) && fields[0] != "Z"
    })
    .collect()
}

#[track_caller]
fn ends_quietly(mut child: Child, status: i32, what: &str) {
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    let ended = child.wait().unwrap();
    assert_eq!((ended.code(), said.as_str()), (Some(status), ""), "{what}");
    TIMEOUT.until("all its processes are gone", || session(child.id()).is_empty());
}

#[test]
fn nobody_reads_the_output() {
    let gpu = SimulatedGpu::new(&[("MEMORY", "256MiB".into())])
        .expect("the workspace is built: cargo build --workspace");
    let node = Node::start(gpu.environment(&[]), &["--capacity", "64MiB"].map(str::to_owned)).unwrap();
    let dir = node.dir().to_str().unwrap();
    for arguments in [
        &["status", "--runtime-dir", dir][..],
        &["status", "--json", "--runtime-dir", dir],
        &["sim", SCENARIO],
        &["bench", "handoff", "--iterations", "2000", "--json"],
        &["demo"],
    ] {
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        drop(read);
        let mut command = nvshare(arguments);
        let child = command.envs(gpu.environment(&[])).stdout(write).spawn().unwrap();
        // What a shell shows for a program that SIGPIPE has ended.
        ends_quietly(child, 141, arguments[0]);
    }
}

/// Whoever wants only the beginning of it.
#[test]
fn nobody_reads_the_demo_to_its_end() {
    let mut child = nvshare(&["demo"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("its memory is filled") {
        line.clear();
        assert!(output.read_line(&mut line).unwrap() > 0, "the demo ended by itself");
    }
    drop(output);
    ends_quietly(child, 141, "demo");
}

/// Ctrl-C goes to all processes of the terminal's foreground group.
#[test]
fn the_demo_is_interrupted() {
    for (signal, status) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        let mut child = nvshare(&["demo"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("its memory is filled") {
            line.clear();
            assert!(output.read_line(&mut line).unwrap() > 0, "the demo ended by itself");
        }
        killpg(Pid::from_raw(child.id() as i32), signal).unwrap();
        ends_quietly(child, status, "demo");
    }
}
