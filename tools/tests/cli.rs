//! The command line from outside: exit statuses, and what is said to people whose input makes no sense.
//!
//! A socket that somebody listens on stands for the arbiter, and an empty file for the shim, which the dynamic linker
//! passes over: nothing but the program itself has to be built.

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::unistd::Pid;
use nvshare::map::{MappedPage, scribble};
use nvshare::page::PAGE_BYTES;
use nvshare::{GpuUuid, paths};
use nvshare_tools::node::TempDir;
use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// How a command ended, and what it said.
#[derive(Debug)]
struct Ended {
    status: i32,
    stdout: String,
    stderr: String,
}

impl Ended {
    #[track_caller]
    fn refused(&self, status: i32, sentences: &[&str]) {
        assert_eq!(self.status, status, "{self:?}");
        for sentence in sentences {
            assert!(self.stderr.contains(sentence), "{sentence:?} is not in {self:?}");
        }
        assert!(!self.stderr.contains("panicked"), "{self:?}");
    }
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nvshare"));
    command.args(arguments).stdin(Stdio::null());
    for name in
        [paths::RUNTIME_DIR, "NVSHARE_LIBRARY", "NVSHARE_CLIENT_NAME", "CUDA_MODULE_LOADING", "LD_PRELOAD"]
    {
        command.env_remove(name);
    }
    command
}

fn end(command: &mut Command) -> Ended {
    let output = command.output().expect("the program starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ended {
        status: output.status.code().expect("an exit status and no signal"),
        stdout: text(&output.stdout),
        stderr: text(&output.stderr),
    }
}

fn status(dir: &Path, more: &[&str]) -> Ended {
    end(command(&["status", "--runtime-dir"]).arg(dir).args(more))
}

fn page_path(dir: &Path, gpu: u8) -> PathBuf {
    paths::page(dir, GpuUuid([gpu; 16]))
}

/// A runtime directory whose arbiter takes connections, and never says anything.
struct Answering {
    dir: TempDir,
    _socket: OwnedFd,
}

impl Answering {
    fn new() -> Self {
        let dir = TempDir::new().expect("a directory");
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(socket.as_raw_fd(), &UnixAddr::new(&paths::socket(dir.path())).unwrap()).unwrap();
        listen(&socket, Backlog::new(8).unwrap()).unwrap();
        File::create(dir.path().join("shim")).unwrap();
        Self { dir, _socket: socket }
    }

    fn command(&self, options: &[&str], program: &[&str]) -> Command {
        let mut command = command(&["run", "--runtime-dir"]);
        command.arg(self.dir.path()).args(options).arg("--").args(program);
        command.env("NVSHARE_LIBRARY", self.dir.path().join("shim"));
        command
    }

    fn run(&self, program: &[&str]) -> Ended {
        end(&mut self.command(&[], program))
    }
}

#[test]
fn a_size_that_is_none_is_named_with_its_option() {
    for size in ["lots", "-1", "12XiB", "", "99999999999G"] {
        let ended = end(&mut command(&["run", &format!("--capacity={size}"), "--", "true"]));
        ended.refused(2, &["--capacity"]);
        assert!(size.is_empty() || ended.stderr.contains(size), "{ended:?}");
    }
    end(&mut command(&["bench", "switch", "--size", "much"])).refused(2, &["--size", "much"]);
}

#[test]
fn what_makes_no_sense_is_exit_status_2() {
    end(&mut command(&[])).refused(2, &["Usage"]);
    end(&mut command(&["fly"])).refused(2, &["fly"]);
    end(&mut command(&["run"])).refused(2, &["PROGRAM"]);
    end(&mut command(&["bench", "handoff", "--iterations", "0"])).refused(2, &["--iterations"]);
    let fits_twice = ["bench", "switch", "--capacity", "148MiB", "--size", "10MiB"];
    end(&mut command(&fits_twice)).refused(2, &["--size", "--capacity"]);
    end(&mut command(&["demo", "--jobs", "0"])).refused(2, &["--jobs"]);
}

#[test]
fn help_is_no_error_and_does_not_show_what_nobody_types() {
    let help = end(&mut command(&["--help"]));
    assert_eq!(help.status, 0);
    assert!(help.stdout.contains("Examples:") && !help.stdout.contains("internal"), "{help:?}");
}

#[test]
fn status_says_where_it_looked_and_what_to_do() {
    let dir = TempDir::new().unwrap();
    let missing = dir.path().join("nowhere");
    status(&missing, &[]).refused(2, &[missing.to_str().unwrap(), "nvshare run", "--runtime-dir"]);
    status(dir.path(), &[]).refused(2, &[dir.path().to_str().unwrap(), "no arbiter has made a page here"]);
}

#[test]
fn a_page_of_garbage_is_refused_by_name() {
    let cases: [(&[u8], &str); 4] = [
        (b"", "0 bytes"),
        (b"short", "5 bytes"),
        (&[0; PAGE_BYTES], "magic"),
        (&[0xff; PAGE_BYTES], "magic"),
    ];
    for (bytes, sentence) in cases {
        let dir = TempDir::new().unwrap();
        let page = page_path(dir.path(), 7);
        fs::write(&page, bytes).unwrap();
        for more in [&[][..], &["--json"]] {
            status(dir.path(), more).refused(2, &[page.to_str().unwrap(), sentence]);
        }
    }
}

/// A page with words of garbage everywhere but where its identity is checked.
fn garbage(path: &Path, words: &[u64]) {
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    file.set_len(PAGE_BYTES as u64).unwrap();
    let page = MappedPage::map(&file).unwrap();
    scribble(&page, words);
    page.initialise(GpuUuid([1; 16]), 74);
}

#[test]
fn garbage_behind_a_right_beginning_is_shown_and_breaks_nothing() {
    let patterns: [&[u64]; 4] = [
        &[u64::MAX],
        &[1 << 63],
        &[0x8000_0000_0000_0001, u64::MAX, 3, 0],
        &[u64::MAX / 3, 0x1b5b_1b5b_1b5b_1b5b],
    ];
    for words in patterns {
        let dir = TempDir::new().unwrap();
        garbage(&page_path(dir.path(), 1), words);
        let text = status(dir.path(), &[]);
        text.refused(0, &[]);
        assert!(!text.stdout.contains('\u{1b}'), "a name reached the terminal as it was: {text:?}");
        let json = status(dir.path(), &["--json"]);
        json.refused(0, &[]);
        let node: serde_json::Value = serde_json::from_str(&json.stdout).expect("JSON");
        assert_eq!(node["gpus"].as_array().map(Vec::len), Some(1));
    }
}

#[test]
fn a_broken_page_does_not_hide_a_whole_one() {
    let dir = TempDir::new().unwrap();
    garbage(&page_path(dir.path(), 1), &[0]);
    fs::write(page_path(dir.path(), 2), b"short").unwrap();
    let ended = status(dir.path(), &[]);
    ended.refused(2, &["5 bytes"]);
    assert!(ended.stdout.contains("148.00 MiB pool") && ended.stdout.contains("no clients"), "{ended:?}");
}

#[test]
fn a_library_that_is_not_there_is_named() {
    let node = Answering::new();
    let mut command = node.command(&[], &["true"]);
    end(command.env("NVSHARE_LIBRARY", "/nowhere/lib.so"))
        .refused(2, &["NVSHARE_LIBRARY", "/nowhere/lib.so"]);
}

#[test]
fn run_passes_the_exit_status_on() {
    let node = Answering::new();
    for status in [0, 1, 7, 255] {
        assert_eq!(node.run(&["sh", "-c", &format!("exit {status}")]).status, status);
    }
    assert_eq!(node.run(&["sh", "-c", "kill -KILL $$"]).status, 128 + 9);
    assert_eq!(node.run(&["sh", "-c", "kill -SEGV $$"]).status, 128 + 11);
}

#[test]
fn a_program_that_cannot_start_has_the_shells_statuses() {
    let node = Answering::new();
    node.run(&["nvshare-no-such-program"]).refused(127, &["nvshare-no-such-program", "no such program"]);
    let file = node.dir.path().join("data");
    fs::write(&file, "data").unwrap();
    fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
    node.run(&[file.to_str().unwrap()]).refused(126, &[file.to_str().unwrap()]);
}

#[test]
fn the_program_is_told_where_it_is() {
    let node = Answering::new();
    let show =
        "echo $LD_PRELOAD; echo $NVSHARE_RUNTIME_DIR; echo $NVSHARE_CLIENT_NAME; echo $CUDA_MODULE_LOADING";
    let mut command = node.command(&["--name", "notebook"], &["sh", "-c", show]);
    let ended = end(command.env("LD_PRELOAD", "before.so").env("CUDA_MODULE_LOADING", "EAGER"));
    let dir = node.dir.path().display();
    assert_eq!(ended.stdout, format!("{dir}/shim:before.so\n{dir}\nnotebook\nEAGER\n"));
}

#[test]
fn the_programs_options_are_its_own() {
    let node = Answering::new();
    assert_eq!(node.run(&["echo", "--capacity", "lots", "--help"]).stdout, "--capacity lots --help\n");
}

#[test]
fn signals_reach_the_program() {
    let node = Answering::new();
    let script = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.02; done";
    let mut child = node.command(&[], &["sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(5));
}

#[test]
fn a_bench_says_json_with_these_keys_and_no_others() {
    let ended = end(&mut command(&["bench", "handoff", "--iterations", "1000", "--json"]));
    assert_eq!(ended.status, 0, "{ended:?}");
    let rows: Vec<serde_json::Map<_, _>> =
        ended.stdout.lines().map(|line| serde_json::from_str(line).expect("an object a line")).collect();
    let names: Vec<_> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["handoff", "futex_pingpong", "handoff_ratio_p50", "handoff_ratio_p99"]);
    for row in &rows {
        let mut keys: Vec<_> = row.keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["max", "n", "name", "p50", "p99", "unit"]);
    }
}
