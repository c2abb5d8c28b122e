//! Arbiters and clients in pid namespaces that do not see each other: nobody who lives is reaped, and nobody who has ended
//! is kept. Needs root, to make namespaces.

use nix::fcntl::{Flock, FlockArg};
use nvshare::map::MappedPage;
use nvshare::paths;
use nvshare::register::{self, Hello};
use nvshare_test_support::Patience;
use std::fs::File;
use std::io::{BufRead, BufReader, Lines};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;

const PATIENCE: Patience = Patience::seconds(30);

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
    PATIENCE.until("it has ended", || Flock::lock(lock(), FlockArg::LockSharedNonblock).is_ok());
}

type Log = Lines<BufReader<ChildStderr>>;

fn start_arbiter(dir: &Path, own_namespace: bool) -> (Running, Log) {
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
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut said = Vec::new();
    let serves = log.by_ref().map(Result::unwrap).any(|line| {
        said.push(line);
        said.last().is_some_and(|line| line.contains("serving dir="))
    });
    assert!(serves, "{said:#?}");
    (Running(child), log)
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
    let dir = std::env::temp_dir().join(format!("nvshare-lives-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();

    let (arbiter, _) = start_arbiter(&dir, false);
    let page = look(&dir);
    let (one, first) = start_client(&dir, false);
    let (two, second) = start_client(&dir, true);
    assert_eq!(slots(&page), [first, second]);
    end_arbiter(arbiter, &dir);

    // One that sees neither.
    let (arbiter, mut log) = start_arbiter(&dir, true);
    assert_eq!(slots(&page), [first, second]);
    attached(&mut log, 2);
    let (three, third) = start_client(&dir, false);
    assert_eq!(slots(&page), [first, second, third], "and a new one is given a slot");
    one.end();
    PATIENCE.until("the dead one's slot is closed", || slots(&page) == [second, third]);
    end_arbiter(arbiter, &dir);

    // One that sees all of them, after one has ended that the arbiter before saw under no pid.
    three.end();
    let (arbiter, mut log) = start_arbiter(&dir, false);
    assert_eq!(slots(&page), [second]);
    attached(&mut log, 1);
    two.end();
    PATIENCE.until("the last one's slot is closed", || slots(&page).is_empty());
    drop((arbiter, log));
    std::fs::remove_dir_all(dir).unwrap();
}

/// It neither ends nor attaches, and an arbiter that begins meanwhile cannot ask it.
#[test]
fn a_client_that_is_stopped_while_the_arbiter_restarts_is_kept() {
    let dir = std::env::temp_dir().join(format!("nvshare-stopped-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let (arbiter, _) = start_arbiter(&dir, false);
    let page = look(&dir);
    let (client, slot) = start_client(&dir, false);
    let pid = nix::unistd::Pid::from_raw(client.0.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    arbiter.end();
    let (arbiter, mut log) = start_arbiter(&dir, false);
    // As often as it looks.
    let seen = page.audit_counts().0;
    PATIENCE.until("it has looked a few times", || page.audit_counts().0 > seen + 8);
    assert_eq!(slots(&page), [slot]);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).unwrap();
    attached(&mut log, 1);
    client.end();
    PATIENCE.until("its slot is closed", || slots(&page).is_empty());
    drop((arbiter, log));
    std::fs::remove_dir_all(dir).unwrap();
}
