//! Processes are killed at random moments, in every phase, the arbiter among them; the others go on, and
//! the books balance to the granule.
//!
//! The clients move granules and no bytes, so a round takes milliseconds and hundreds of them fit into a
//! test. (What happens to bytes is the business of the tests on the simulated GPU.)

use nvshare::audit::Audit;
use nvshare::client::Bookkeeper;
use nvshare::map::MappedPage;
use nvshare::page::Phase;
use nvshare::register;
use nvshare::units::GpuUuid;
use nvshare::wire::Hello;
use nvshare::{Client, paths, record};
use nvshare_test_support::{Dice, Patience};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

const TIMEOUT: Patience = Patience::seconds(30);

const GPU: &str = "GPU-00000000-0000-0000-0000-0000000000aa";
/// The pool, in granules. Each client needs 60, so they take turns.
const CAPACITY: u32 = 100;
const DEMAND: u32 = 60;
const ROUNDS: u32 = 400;

/// What a client process does: takes turns for ever, and checks I2 whenever it runs.
#[test]
#[ignore = "the body of the client processes that the other test starts"]
fn client() {
    let dir = PathBuf::from(std::env::var_os("NVSHARE_TEST_DIR").expect("started by the other test"));
    let hello = Hello::new(GPU.parse().unwrap(), "victim");
    let registration = register::register(&paths::socket(&dir), &hello, Duration::from_secs(20)).unwrap();
    let mut client = Client::new(registration.page, registration.slot).telling(registration.private_phase);
    let books = client.books().clone();
    books.grow(DEMAND);
    let mut runtime = Bookkeeper::new(&books, 4);
    loop {
        client.acquire(&mut runtime).unwrap();
        assert_eq!(books.resident(), DEMAND, "I2: Running implies that all memory is in place");
        client.release(true);
        if std::os::unix::process::parent_id() == 1 {
            return;
        }
    }
}

struct Node {
    dir: TempDir,
    arbiter: Child,
    clients: Vec<Child>,
}

fn arbiter(dir: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_nvshare-arbiter"))
        .arg("--runtime-dir")
        .arg(dir)
        .args(["--gpu", GPU, "--capacity", &format!("{}M", 2 * CAPACITY), "--quantum", "1ms"])
        .args(["--nvml-library", "/nonexistent/libnvidia-ml.so"])
        // The tests run side by side and call their GPU the same.
        .arg("--allow-second-arbiter")
        .env("NVSHARE_LOG", "error")
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

fn victim(dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "client", "--ignored", "--test-threads=1"])
        .env("NVSHARE_TEST_DIR", dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

impl Node {
    fn page(&self) -> MappedPage {
        record::open_page(self.dir.path(), GPU.parse::<GpuUuid>().unwrap()).unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for child in self.clients.iter_mut().chain([&mut self.arbiter]) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn whoever_is_killed_the_others_go_on_and_no_granule_is_lost() {
    let mut dice = Dice::from_environment(0x5eed_cafe);
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node { arbiter: arbiter(dir.path()), clients: Vec::new(), dir };
    TIMEOUT.until("the socket is there", || paths::socket(node.dir.path()).exists());
    node.clients = (0..3).map(|_| victim(node.dir.path())).collect();
    let page = node.page();
    let slices =
        || -> u64 { page.occupied().iter().filter_map(|slot| page.details(slot)).map(|d| d.slices).sum() };
    let mut phases = std::collections::HashSet::new();
    for round in 0..ROUNDS {
        TIMEOUT.until("three clients take turns", || page.occupied().len() == 3 && slices() > 0);
        dice.spin(3_000);
        let (with_client, with_arbiter) = match dice.below(8) {
            0 => (false, true),
            1 => (true, true),
            _ => (true, false),
        };
        let victim_index = dice.below(3) as usize;
        let pid = node.clients[victim_index].id();
        let slot =
            page.occupied().iter().find(|slot| page.owner(*slot).is_some_and(|owner| owner.pid == pid));
        if with_client {
            phases.extend(slot.map(|slot| page.view(slot).phase.name()));
            node.clients[victim_index].kill().unwrap();
        }
        if with_arbiter {
            node.arbiter.kill().unwrap();
            node.arbiter.wait().unwrap();
        }
        if with_client {
            node.clients[victim_index].wait().unwrap();
        }
        if with_arbiter {
            // Hand-offs go on without an arbiter, if two live clients are there to hand over.
            if !with_client {
                let before = slices();
                TIMEOUT.until("turns are taken without an arbiter", || slices() > before);
            }
            node.arbiter = arbiter(node.dir.path());
        }
        if with_client {
            if let Some(slot) = slot {
                TIMEOUT.until("the dead one is reaped", || {
                    page.owner(slot).is_none_or(|owner| owner.pid != pid)
                });
            }
            node.clients[victim_index] = victim(node.dir.path());
        }
        for (index, child) in node.clients.iter_mut().enumerate() {
            assert!(child.try_wait().unwrap().is_none(), "round {round}: client {index} ended by itself");
        }
    }
    println!("killed in phases: {phases:?}");
    assert!(phases.len() >= 3, "the dice never found more than {phases:?}");
    for child in &mut node.clients {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    TIMEOUT.until("all are reaped", || page.occupied().is_empty());
    assert_eq!(page.free().granules, CAPACITY as i32, "a granule was lost");
    TIMEOUT.until("the books can be looked at", || page.audit() != Audit::Busy);
    assert_eq!(page.audit(), Audit::Balanced);
    assert_eq!(page.audit_counts().1, 0, "an audit had to repair the books");
    assert!((0..48).filter_map(nvshare::SlotIndex::new).all(|slot| page.view(slot).phase != Phase::Running));
}
