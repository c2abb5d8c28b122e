//! A library that is loaded with RTLD_DEEPBIND does not get past the shim.

use nvshare_e2e::application::{MIB, gpu, node};
use nvshare_test_support::{Patience, library, program};
use nvshare_tools::node::Node;
use nvshare_tools::status;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

const TIMEOUT: Patience = Patience::seconds(60);

/// What the library allocates twice.
const MIB_EACH: u64 = 8;

fn start(node: &Node, variables: &[(&str, &str)]) -> Child {
    let mut child = Command::new(program("deepbind"))
        .arg(library("plugin"))
        .arg(MIB_EACH.to_string())
        .envs(node.environment())
        .envs(variables.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert_eq!(said.trim(), "allocated");
    child
}

/// What the books know of it.
fn in_the_books(node: &Node, child: &Child) -> u64 {
    let gpus = status::read(node.dir()).unwrap().gpus;
    let client = gpus.into_iter().flat_map(|gpu| gpu.clients).find(|client| client.pid == child.id());
    client.expect("it is a client").demand_bytes
}

fn end(mut child: Child) {
    drop(child.stdin.take());
    TIMEOUT.until("it ends", || child.try_wait().unwrap().is_some_and(|status| status.success()));
}

#[test]
fn what_a_deeply_bound_library_allocates_is_in_the_books() {
    let gpu = gpu();
    let node = node(&gpu);
    let child = start(&node, &[]);
    assert_eq!(in_the_books(&node, &child), 2 * MIB_EACH * MIB);
    end(child);
}

#[test]
fn who_says_so_keeps_the_flag_and_gets_past() {
    let gpu = gpu();
    let node = node(&gpu);
    let child = start(&node, &[("NVSHARE_DEEPBIND", "1")]);
    assert_eq!(in_the_books(&node, &child), 0);
    end(child);
}
