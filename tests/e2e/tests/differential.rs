//! The driver's own answers, natively and under nvshare: tests/gpu/differential.py on the simulated GPU.
//!
//! Needs the other parts beside the program, and Python: `cargo build --workspace` first.

use nvshare_e2e::built;
use std::path::Path;
use std::process::Command;

/// Runs the sequences of calls that match, natively, alone and beside a competitor: no answer may be other than natively
/// that is not explained.
fn no_unexplained_difference(sequences: &[&str]) {
    let nvshare = built("nvshare");
    let programs = nvshare.parent().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../gpu/differential.py");
    let output = Command::new("python3")
        .arg(script)
        .arg("--bin")
        .arg(programs)
        .args(["--simulated", "--jobs", "2", "--pause", "0", "--only"])
        .args(sequences)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("python3 runs");
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn how_much_memory_there_is_may_be_asked_for_in_part() {
    no_unexplained_difference(&["memory_info", "out_of_memory"]);
}

#[test]
fn no_other_call_takes_an_allocation_apart() {
    no_unexplained_difference(&["frees", "frees_by_other_calls", "reserving_addresses"]);
}

#[test]
fn calls_in_the_wrong_state_fail_as_the_drivers_own() {
    no_unexplained_difference(&["before_init", "without_context", "no_context_current"]);
}

#[test]
fn what_is_said_of_a_pointer_is_what_the_driver_says_of_its_own() {
    no_unexplained_difference(&["pointer_to_large_device_memory", "pointer_to_pitched_memory", "captures"]);
}

#[test]
fn what_is_said_of_mapped_memory_is_what_the_driver_says() {
    no_unexplained_difference(&["pointer_to_two_mappings", "pointer_to_mapped_memory_without_access"]);
}

#[test]
fn ranges_with_holes_are_unmapped_and_get_rights_as_by_the_driver() {
    no_unexplained_difference(&[
        "unmapping_with_a_hole*",
        "access_with_a_hole*",
        "mapping",
        "mapping_with_odd_arguments",
    ]);
}

#[test]
fn nothing_reaches_beyond_the_end_of_an_allocation() {
    no_unexplained_difference(&["beyond_the_end", "copying_memory"]);
}

#[test]
fn a_capture_forbids_what_the_driver_forbids() {
    no_unexplained_difference(&["during_a_capture[cuMemAlloc_v2,0]", "during_a_capture[cuMemFree_v2,1]"]);
}

#[test]
fn in_a_broken_context_all_fails_that_natively_fails() {
    no_unexplained_difference(&["in_a_broken_context"]);
}

#[test]
fn an_allocation_can_be_made_synchronous_and_is_told_apart() {
    no_unexplained_difference(&[
        "synchronous_operations",
        "buffers_are_told_apart",
        "rights_of_other_memory",
    ]);
}
