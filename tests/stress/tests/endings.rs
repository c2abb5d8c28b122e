//! What a run has started does not outlive what it was started for.
//!
//! Needs the other parts beside the program: `cargo build --workspace` first.

use nvshare_test_support::Patience;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

const PATIENCE: Patience = Patience::seconds(20);

/// A fuzzer, killed when dropped, and a variable in its environment that is in those of its processes too.
struct Fuzzer {
    process: Child,
    mark: String,
}

impl Fuzzer {
    fn start(arguments: &[&str]) -> Self {
        let mark = format!("NVSHARE_TEST_MARK={}-{:?}", std::process::id(), std::thread::current().id());
        let (name, value) = mark.split_once('=').unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_nvshare-stress"))
            .arg("fuzz")
            .args(arguments)
            .env(name, value)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self { process, mark }
    }

    /// The names of the processes that it has started and that have not ended.
    fn others(&self) -> Vec<String> {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let own = self.process.id().to_string();
        let marked = processes.filter(|entry| {
            // One that has ended and that nobody has waited for has no environment any more.
            let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
            entry.file_name() != own.as_str()
                && environment.split(|byte| *byte == 0).any(|variable| variable == self.mark.as_bytes())
        });
        marked.filter_map(|entry| fs::read_to_string(entry.path().join("comm")).ok()).collect()
    }

    fn count(&self, name: &str) -> usize {
        self.others().iter().filter(|other| other.trim() == name).count()
    }
}

impl Drop for Fuzzer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn nothing_that_the_fuzzer_started_outlives_it() {
    let mut fuzzer = Fuzzer::start(&["--modes", "fits"]);
    PATIENCE.until("a program runs beside a competitor", || {
        fuzzer.count("nvshare-arbiter") == 2
            && fuzzer.count("compete") == 1
            && fuzzer.count("random_calls") == 1
    });
    fuzzer.process.kill().unwrap();
    fuzzer.process.wait().unwrap();
    PATIENCE.until("all have ended", || fuzzer.others().is_empty());
}

#[test]
fn what_was_started_for_a_seed_that_failed_ends() {
    // No line comes at once, so each seed is a hang.
    let mut fuzzer = Fuzzer::start(&["--modes", "fits", "--patience", "0", "--keep-going", "--no-shrink"]);
    let mut lines = BufReader::new(fuzzer.process.stdout.take().unwrap()).lines().map_while(Result::ok);
    for seed in 1..=4 {
        let begin = format!("==== seed {seed}, ");
        assert!(lines.any(|line| line.starts_with(&begin)), "seed {seed} hangs");
        // The next machine is made before the last one goes.
        let (arbiters, competitors) = (fuzzer.count("nvshare-arbiter"), fuzzer.count("compete"));
        assert!(arbiters <= 4 && competitors <= 2, "{arbiters} arbiters, {competitors} competitors");
    }
}
