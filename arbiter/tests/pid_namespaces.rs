//! Arbiters and clients in pid namespaces that do not see each other: nobody who lives is reaped, and nobody who has ended
//! is kept. Needs root, to make namespaces.

use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::MsgFlags;
use nvshare::map::MappedPage;
use nvshare::page::Phase;
use nvshare::register;
use nvshare::scm_rights;
use nvshare::wire::Hello;
use nvshare::{Client, SlotIndex, paths};
use nvshare_test_support::Patience;
use std::fs::File;
use std::io::{BufRead, BufReader, Lines};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

const TIMEOUT: Patience = Patience::seconds(30);

const GPU: &str = "GPU-00000000-0000-0000-0000-0000000019aa";

/// The body of the client processes that the tests start. It ends with its standard input.
#[test]
#[ignore = "the body of the client processes that the other tests start"]
fn client() {
    let dir = PathBuf::from(std::env::var_os(paths::RUNTIME_DIR).unwrap());
    let hello = Hello::new(GPU.parse().unwrap(), "lives");
    let registration = register::register(&paths::socket(&dir), &hello, Duration::from_secs(20)).unwrap();
    println!("\nregistered {}", registration.slot.get());
    let _ = std::io::stdin().read_line(&mut String::new());
    std::process::exit(0);
}

/// A command, in a pid namespace of its own or in this one.
fn command(program: &Path, own_namespace: bool) -> Command {
    if !own_namespace {
        return Command::new(program);
    }
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "--"]).arg(program);
    command
}

/// A process, killed when dropped.
struct Running(Child);

impl Running {
    /// `unshare` waits for the process that it has made, which dies with it.
    fn end(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A client, when it has its slot.
fn start_client(dir: &Path, own_namespace: bool) -> (Running, usize) {
    let mut command = command(&std::env::current_exe().unwrap(), own_namespace);
    let mut child = command
        .args(["--exact", "client", "--ignored", "--nocapture"])
        .env(paths::RUNTIME_DIR, dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let slot = lines.find_map(|line| line.strip_prefix("registered ")?.parse().ok()).expect("a slot");
    (Running(child), slot)
}

/// Ends an arbiter. One in a namespace of its own dies a moment after `unshare`, and the next one must not meet it.
fn end_arbiter(arbiter: Running, dir: &Path) {
    arbiter.end();
    let lock = || File::open(paths::arbiter_lock(dir)).unwrap();
    TIMEOUT.until("it has ended", || Flock::lock(lock(), FlockArg::LockSharedNonblock).is_ok());
}

type Log = Lines<BufReader<ChildStderr>>;

fn start_arbiter(dir: &Path, own_namespace: bool) -> (Running, Log) {
    let (arbiter, mut log) = spawn_arbiter(dir, own_namespace);
    until_it_serves(&mut log);
    (arbiter, log)
}

fn spawn_arbiter(dir: &Path, own_namespace: bool) -> (Running, Log) {
    let mut child = command(Path::new(env!("CARGO_BIN_EXE_nvshare-arbiter")), own_namespace)
        .arg("--runtime-dir")
        .arg(dir)
        .args(["--gpu", GPU, "--capacity", "64MiB", "--nvml-library", "/nonexistent"])
        // The tests run side by side and call their GPU the same.
        .arg("--allow-second-arbiter")
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let log = BufReader::new(child.stderr.take().unwrap()).lines();
    (Running(child), log)
}

/// What an arbiter says until it serves.
fn until_it_serves(log: &mut Log) -> Vec<String> {
    let mut said = Vec::new();
    let serves = log.by_ref().map(Result::unwrap).any(|line| {
        said.push(line);
        said.last().is_some_and(|line| line.contains("serving dir="))
    });
    assert!(serves, "{said:#?}");
    said
}

fn slots(page: &MappedPage) -> Vec<usize> {
    page.occupied().iter().map(|slot| slot.get()).collect()
}

fn look(dir: &Path) -> MappedPage {
    register::look(&paths::socket(dir), GPU.parse().unwrap(), Duration::from_secs(5)).unwrap()
}

/// Waits until so many clients have made themselves known to an arbiter that began after them.
fn attached(log: &mut Log, clients: usize) {
    let known = log.map(Result::unwrap).filter(|line| line.contains("is there still"));
    assert_eq!(known.take(clients).count(), clients);
}

#[test]
fn an_arbiter_reaps_nobody_because_it_cannot_see_them() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not root: no namespaces can be made");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();

    let (arbiter, _) = start_arbiter(dir, false);
    let page = look(dir);
    let (one, first) = start_client(dir, false);
    let (two, second) = start_client(dir, true);
    assert_eq!(slots(&page), [first, second]);
    end_arbiter(arbiter, dir);

    // One that sees neither.
    let (arbiter, mut log) = start_arbiter(dir, true);
    assert_eq!(slots(&page), [first, second]);
    attached(&mut log, 2);
    let (three, third) = start_client(dir, false);
    assert_eq!(slots(&page), [first, second, third], "and a new one is given a slot");
    one.end();
    TIMEOUT.until("the dead one's slot is closed", || slots(&page) == [second, third]);
    end_arbiter(arbiter, dir);

    // One that sees all of them, after one has ended that the arbiter before saw under no pid.
    three.end();
    let (arbiter, mut log) = start_arbiter(dir, false);
    assert_eq!(slots(&page), [second]);
    attached(&mut log, 1);
    two.end();
    TIMEOUT.until("the last one's slot is closed", || slots(&page).is_empty());
    drop((arbiter, log));
}

/// It neither ends nor attaches, and an arbiter that begins meanwhile cannot ask it.
#[test]
fn a_client_that_is_stopped_while_the_arbiter_restarts_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let (arbiter, _) = start_arbiter(dir, false);
    let page = look(dir);
    let (client, slot) = start_client(dir, false);
    let pid = nix::unistd::Pid::from_raw(client.0.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    arbiter.end();
    let (arbiter, mut log) = start_arbiter(dir, false);
    // As often as it looks.
    let seen = page.audit_counts().0;
    TIMEOUT.until("it has looked a few times", || page.audit_counts().0 > seen + 8);
    assert_eq!(slots(&page), [slot]);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).unwrap();
    attached(&mut log, 1);
    client.end();
    TIMEOUT.until("its slot is closed", || slots(&page).is_empty());
    drop((arbiter, log));
}

/// An arbiter that is killed while it closes the slot of a client that leaves has cleared the page, and the client has not
/// heard of it: it still holds its life file.
#[test]
fn a_client_that_left_while_its_arbiter_was_killed_keeps_no_slot() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let (arbiter, _) = start_arbiter(dir, false);
    let hello = Hello::new(GPU.parse().unwrap(), "leaves");
    let client = register::register(&paths::socket(dir), &hello, TIMEOUT.duration()).unwrap();
    client.private_phase.store(Phase::Leaving.into(), Ordering::Relaxed);
    arbiter.end();
    client.page.reap(client.slot).unwrap();
    let (arbiter, mut log) = start_arbiter(dir, false);
    attached(&mut log, 1);
    TIMEOUT.until("its slot is closed", || slots(&client.page).is_empty());
    let life = paths::life(dir, GPU.parse().unwrap(), client.slot);
    TIMEOUT.until("its life file is gone", || !life.exists());
    drop((arbiter, log));
}

/// A process whose slot was opened, and whose arbiter was killed before the process had read the answer.
fn untold(dir: &Path, log: &mut Log) -> OwnedFd {
    let connection = register::dial(&paths::socket(dir), TIMEOUT.duration()).unwrap();
    let hello = Hello::new(GPU.parse().unwrap(), "untold");
    scm_rights::send(connection.as_fd(), bytemuck::bytes_of(&hello), &[]).unwrap();
    assert!(log.map(Result::unwrap).any(|line| line.contains("registered:") && line.contains("untold")));
    // The answer is on its way, or there.
    TIMEOUT.until("it is answered", || {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        nix::sys::socket::recv(connection.as_raw_fd(), &mut [0], flags).is_ok()
    });
    connection
}

#[test]
fn a_process_that_was_not_told_of_its_slot_loses_it_and_a_client_beside_it_keeps_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let (arbiter, mut log) = start_arbiter(dir, false);
    let page = look(dir);
    let (client, kept) = start_client(dir, false);
    let connection = untold(dir, &mut log);
    assert_eq!(slots(&page).len(), 2);
    arbiter.end();
    // The answer may still be read: that process may live with this slot.
    let (arbiter, _log) = start_arbiter(dir, false);
    assert_eq!(slots(&page).len(), 2);
    drop(connection);
    TIMEOUT.until("the slot of which nobody knows is closed", || slots(&page) == [kept]);
    arbiter.end();

    let (arbiter, mut log) = start_arbiter(dir, false);
    drop(untold(dir, &mut log));
    arbiter.end();
    let (_arbiter, _log) = start_arbiter(dir, false);
    assert_eq!(slots(&page), [kept], "at once, if nobody can read the answer any more");
    client.end();
    TIMEOUT.until("the client's slot is closed", || slots(&page).is_empty());
}

#[test]
fn no_arbiter_waits_for_the_page_of_a_process_that_has_let_its_slot_go() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let (arbiter, mut log) = start_arbiter(dir, false);
    let connection = untold(dir, &mut log);
    arbiter.end();
    let (_arbiter, mut log) = spawn_arbiter(dir, false);
    // Nobody has the page but the answer, from which no arbiter can take it.
    assert!(
        log.by_ref().map(Result::unwrap).any(|line| line.contains("waiting for a client to bring its page"))
    );
    drop(connection);
    let said = until_it_serves(&mut log);
    assert!(
        said.iter().any(|line| line.contains("no client is left that could bring the page")),
        "{said:#?}"
    );
    assert!(slots(&look(dir)).is_empty());
}

#[test]
fn silent_connections_keep_no_client_from_bringing_its_page() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not root: no namespaces can be made");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let (arbiter, _) = start_arbiter(dir, false);
    let (client, slot) = start_client(dir, false);
    end_arbiter(arbiter, dir);
    let socket = paths::socket(dir);
    let silent = std::thread::spawn(move || {
        (0..200).map(|_| register::dial(&socket, TIMEOUT.duration()).unwrap()).collect::<Vec<_>>()
    });
    // It does not see the client, and so cannot take the page from it.
    let (arbiter, mut log) = spawn_arbiter(dir, true);
    let said = until_it_serves(&mut log);
    assert!(said.iter().any(|line| line.contains("took its page over")), "{said:#?}");
    assert_eq!(slots(&look(dir)), [slot]);
    attached(&mut log, 1);
    drop((silent.join().unwrap(), client, arbiter, log));
}

/// The states that an arbiter leaves which is killed between two steps of opening or closing a slot.
#[test]
fn what_a_killed_arbiter_left_half_done_the_next_one_finishes() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let (arbiter, _) = start_arbiter(dir, false);
    let hello = Hello::new(GPU.parse().unwrap(), "stays");
    let client = register::register(&paths::socket(dir), &hello, TIMEOUT.duration()).unwrap();
    let (kept, page) = (client.slot.get(), &client.page);
    let (dead, slot) = start_client(dir, false);
    let dead_slot = SlotIndex::new(slot).unwrap();
    let (holder, third) = start_client(dir, false);
    let third = SlotIndex::new(third).unwrap();
    let own = page.owner(client.slot).unwrap();
    arbiter.end();
    dead.end();
    holder.end();

    // Closing: the page is cleared, and the dead client's life file is there.
    page.reap(dead_slot).unwrap();
    // Closing: nothing is done yet, and the dead client has granules.
    let books = Client::new(&**page, third).books().clone();
    books.grow(5);
    books.try_take(5).unwrap();
    assert_eq!(page.free().granules, 27);
    // Opening: the slot is a living process's, which has not been told of it: there is no life file yet.
    let opened = SlotIndex::new(40).unwrap();
    page.open_slot_at(opened, own, "opened", 100);

    let (arbiter, mut log) = start_arbiter(dir, false);
    assert_eq!(slots(page), [kept]);
    assert_eq!((page.view(third).resident, page.free().granules), (0, 32));
    assert!(!paths::life(dir, page.gpu(), dead_slot).exists());
    attached(&mut log, 1);
    drop((arbiter, log));
}
