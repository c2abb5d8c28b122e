//! The field test of docs/test-plan-2xT4.md (tests/scripts/run) on two simulated GPUs: what is counted and ordered there is the verdict.
//! And that it sees what is wrong.
//!
//! Needs the other parts beside the program, Python and a C compiler: `cargo build --workspace` first.

use nvshare_e2e::built;
use nvshare_tools::node::TempDir;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

fn field_test(programs: &Path, arguments: &[&str]) -> Output {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/run"))
        .arg("--simulated")
        .arg("--bin")
        .arg(programs)
        .args(arguments)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("python3 runs")
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn passes(scenarios: &[&str]) {
    let output = field_test(built("nvshare").parent().unwrap(), &[&["--only"], scenarios].concat());
    let said = said(&output);
    assert!(output.status.success(), "{said}");
    for scenario in scenarios {
        assert!(said.contains(&format!("PASS {scenario}: ")), "{said}");
    }
    assert!(!said.contains("SKIP"), "{said}");
}

#[test]
fn one_alone_and_four_that_fit_never_switch() {
    passes(&["alone", "four_fit"]);
}

#[test]
fn two_and_four_that_do_not_fit_take_turns_with_either_quantum() {
    passes(&["two_turns", "four_turns", "fixed_quantum"]);
}

#[test]
fn two_gpus_are_two_matters() {
    passes(&["field_report", "two_by_two"]);
}

#[test]
fn the_others_go_on_when_a_process_or_the_arbiter_is_killed() {
    passes(&["killed", "arbiter_killed"]);
}

#[test]
fn clients_go_on_through_an_upgrade() {
    passes(&["upgrade"]);
}

/// With a library that does nothing, jobs that do not fit fail natively, and those that fit are seen by no arbiter.
#[test]
fn without_the_shim_the_field_test_fails() {
    let nvshare = built("nvshare");
    let real = nvshare.parent().unwrap();
    let folder = TempDir::new().unwrap();
    for name in ["nvshare", "nvshare-arbiter", "libsimcuda.so", "libsimnvml.so"] {
        symlink(real.join(name), folder.path().join(name)).unwrap();
    }
    let empty = folder.path().join("libnvshare.so");
    let compiled =
        Command::new("cc").args(["-shared", "-x", "c", "/dev/null", "-o"]).arg(&empty).status().unwrap();
    assert!(compiled.success());
    let output = field_test(folder.path(), &["--only", "four_turns"]);
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("FAIL four_turns: ") && said.contains("1 failed"), "{said}");
}
