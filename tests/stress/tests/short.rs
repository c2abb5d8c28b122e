//! A short run of each kind; long ones are started by hand (docs/testing.md).
//!
//! Needs the other parts beside the program: `cargo build --workspace` first.

use std::process::Command;

fn runs_well(arguments: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_nvshare-stress")).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{arguments:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn processes_that_come_and_go_at_random_hang_nowhere_and_leave_nothing() {
    runs_well(&[
        "stress",
        "--seconds",
        "16",
        "--busy",
        "7",
        "--seed",
        "1",
        "--processes",
        "3",
        "--without",
        "locks,atexit",
    ]);
}

#[test]
fn random_calls_have_the_same_answers_natively_and_beside_a_competitor() {
    runs_well(&["fuzz", "--seeds", "6", "--steps", "60", "--no-shrink"]);
}
