//! The arbiter's configuration file: read at the start, checked without one, read again at SIGHUP.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nvshare::map::MappedPage;
use nvshare::page::Quantum;
use nvshare::units::{GpuUuid, MILLISECOND, SECOND};
use nvshare::{paths, record, register};
use nvshare_test_support::Patience;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use tempfile::TempDir;

const GPU: &str = "GPU-00000000-0000-0000-0000-0000000000cf";

const TIMEOUT: Patience = Patience::seconds(20);

struct Node {
    folder: TempDir,
    arbiter: Option<Child>,
}

impl Node {
    /// A directory with a configuration file.
    fn with(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let node = Self { folder, arbiter: None };
        node.write(text);
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, text: &str) {
        let text = format!("nvml-library = \"/nonexistent/nvml.so\"\ngpu = [\"{GPU}\"]\n{text}");
        std::fs::write(self.path("nvshare.toml"), text).unwrap();
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nvshare-arbiter"));
        command
            .env("NVSHARE_CONFIG", self.path("nvshare.toml"))
            .env("NVSHARE_RUNTIME_DIR", self.path("run"))
            .env("NVSHARE_ALLOW_SECOND_ARBITER", "1")
            .env_remove("NVSHARE_LOG")
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    fn start(&mut self, arguments: &[&str]) {
        let log = File::create(self.path("log")).unwrap();
        self.arbiter = Some(self.command(arguments).stderr(log).spawn().unwrap());
        TIMEOUT.until("the arbiter answers", || {
            register::dial(&paths::socket(&self.path("run")), Duration::ZERO).is_ok()
        });
    }

    fn hang_up(&self) {
        kill(Pid::from_raw(self.arbiter.as_ref().unwrap().id() as i32), Signal::SIGHUP).unwrap();
    }

    fn page(&self) -> MappedPage {
        record::view_page(&self.path("run"), GPU.parse::<GpuUuid>().unwrap()).unwrap()
    }

    /// Waits until the log has all of these in one line.
    fn logs(&self, words: &[&str]) {
        TIMEOUT.until(&format!("{words:?} in the log"), || {
            let log = std::fs::read_to_string(self.path("log")).unwrap();
            log.lines().any(|line| words.iter().all(|word| line.contains(word)))
        });
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(arbiter) = &mut self.arbiter {
            let _ = arbiter.kill();
            let _ = arbiter.wait();
        }
    }
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn an_arbiter_starts_with_nothing_but_a_file() {
    let mut node = Node::with("capacity = \"64MiB\"\nquantum = \"700ms\"\nidle-grace = \"9ms\"\n");
    node.start(&["--idle-grace", "8ms"]);
    let settings = node.page().settings();
    assert_eq!((settings.quantum, node.page().capacity()), (Quantum::Fixed(700 * MILLISECOND), 32));
    assert_eq!(settings.idle_grace, 8 * MILLISECOND, "an argument goes before the file");
}

#[test]
fn a_wrong_file_is_shown_with_a_caret_and_nothing_is_served() {
    let node = Node::with("capacity = \"64MiB\"\ndeadlin = \"5s\"\n");
    for arguments in [&[][..], &["--check-config"]] {
        let output = node.command(arguments).output().unwrap();
        let said = said(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("nvshare.toml:4:1: 'deadlin' is no setting; is 'deadline' meant?"), "{said}");
        assert!(said.contains(" 4 | deadlin = \"5s\"\n   | ^^^^^^^"), "{said}");
        assert!(!node.path("run").exists(), "it has made nothing");
    }
}

#[test]
fn a_configuration_is_checked_without_an_arbiter() {
    let node = Node::with("capacity = \"64MiB\"\n");
    let output = node.command(&["--check-config", "--deadline", "5s"]).output().unwrap();
    let said = said(&output);
    assert!(output.status.success(), "{said}");
    for part in ["it is right", "capacity = 64MiB  (", "nvshare.toml:3)", "deadline = 5s  (--deadline)"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!Path::new(&node.path("run")).exists());
}

#[test]
fn at_sighup_what_can_change_changes_and_what_cannot_is_named() {
    let mut node = Node::with("capacity = \"64MiB\"\nquantum = \"700ms\"\n");
    node.start(&[]);
    node.write("capacity = \"128MiB\"\nquantum = \"2s\"\nlog-format = \"json\"\nlog-level = \"debug\"\n");
    node.hang_up();
    node.logs(&["quantum was 700ms and is 2s"]);
    assert_eq!((node.page().settings().quantum, node.page().capacity()), (Quantum::Fixed(2 * SECOND), 64));
    node.logs(&["log-format is text and will be json", "systemctl restart nvshare-arbiter"]);
    // What is logged from now on is more.
    assert!(
        register::look(&paths::socket(&node.path("run")), GPU.parse().unwrap(), TIMEOUT.duration()).is_ok()
    );
    node.logs(&["DEBUG", "somebody looks at its page"]);
}

#[test]
fn a_file_that_is_wrong_at_sighup_changes_nothing_and_is_logged() {
    let mut node = Node::with("capacity = \"64MiB\"\nquantum = \"700ms\"\n");
    node.start(&[]);
    node.write("capacity = \"128MiB\"\nquantum = \"soon\"\n");
    node.hang_up();
    node.logs(&["nothing changes", "nvshare.toml:4:11: 'soon'"]);
    assert_eq!(node.page().settings().quantum, Quantum::Fixed(700 * MILLISECOND));
    assert_eq!(node.page().capacity(), 32);
    node.write("capacity = \"64MiB\"\nquantum = \"3s\"\n");
    node.hang_up();
    node.logs(&["quantum was 700ms and is 3s"]);
}
