//! Whatever became of an application's standard error, a line of the shim's log never matters to it.
//!
//! The program (`tests/programs/quiet.c`) is refused allocations, which the log says.

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nvshare_e2e::application::{gpu, node};
use nvshare_test_support::program;
use nvshare_tools::node::Node;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Output, Stdio};

/// What the application does about SIGPIPE.
const DISPOSITIONS: [&str; 3] = ["default", "ignored", "handled"];

fn quiet(node: &Node, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("quiet"));
    command.args(arguments).envs(node.environment()).env("NVSHARE_LOG", "debug").stdin(Stdio::null());
    command
}

#[track_caller]
fn all_well(output: &Output) {
    assert!(output.status.success(), "{}", output.status);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "all well\n");
}

fn pipe() -> (std::fs::File, OwnedFd) {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
    (read.into(), write)
}

#[test]
fn a_pipe_that_nobody_reads_any_more() {
    let gpu = gpu();
    let node = node(&gpu);
    for disposition in DISPOSITIONS {
        let (read, write) = pipe();
        drop(read);
        all_well(&quiet(&node, &[disposition]).stderr(write).output().unwrap());
    }
}

#[test]
fn a_socket_that_nobody_reads_any_more() {
    let gpu = gpu();
    let node = node(&gpu);
    for disposition in DISPOSITIONS {
        let (read, write) = std::os::unix::net::UnixStream::pair().unwrap();
        drop(read);
        all_well(&quiet(&node, &[disposition]).stderr(OwnedFd::from(write)).output().unwrap());
    }
}

#[test]
fn a_pipe_that_is_full() {
    let gpu = gpu();
    let node = node(&gpu);
    for blocking in [true, false] {
        let (_unread, write) = pipe();
        fcntl(&write, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let mut full = std::fs::File::from(write);
        while full.write(&[b'x'; 4096]).is_ok() {}
        if blocking {
            fcntl(&full, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        }
        all_well(&quiet(&node, &["default"]).stderr(full).output().unwrap());
    }
}

#[test]
fn none_at_all() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut command = Command::new("sh");
    let shell = command.args(["-c", "exec \"$0\" default 2>&-"]).arg(program("quiet"));
    all_well(&shell.envs(node.environment()).env("NVSHARE_LOG", "debug").output().unwrap());
}

/// The application has closed it, and its number is that of a file with the application's data.
#[test]
fn a_file_of_the_applications_that_has_its_number() {
    let gpu = gpu();
    let node = node(&gpu);
    let file = node.dir().join("data");
    all_well(&quiet(&node, &["default", file.to_str().unwrap()]).output().unwrap());
    assert_eq!(std::fs::read(file).unwrap(), b"mine");
}

#[test]
fn one_that_is_read_says_why_allocations_are_refused() {
    let gpu = gpu();
    let node = node(&gpu);
    let (mut read, write) = pipe();
    let mut command = quiet(&node, &["default"]);
    let reader = std::thread::spawn(move || {
        let mut said = String::new();
        read.read_to_string(&mut said).unwrap();
        said
    });
    all_well(&command.stderr(write).output().unwrap());
    drop(command);
    let said = reader.join().unwrap();
    assert_eq!(said.matches("an allocation of 10.00 GiB is refused").count(), 20, "{said}");
}
