//! What a stranger can do to an arbiter and its clients: another user who reaches the socket, or who has the page.
//!
//! Tests with two users need root; without it they say so and end.

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::socket::MsgFlags;
use nix::unistd::Pid;
use nvshare::change;
use nvshare::control::{PauseRequest, SettingsChange, SettingsRequest};
use nvshare::map::{MappedPage, scribble};
use nvshare::page::{Phase, Suspension};
use nvshare::register::{self, RegisterError, Registration};
use nvshare::scm_rights;
use nvshare::sealed;
use nvshare::units::GpuUuid;
use nvshare::wire::{Change, Hello, SharesUpdate, Status};
use nvshare::{Client, paths, record};
use nvshare_test_support::Patience;
use std::fs::{File, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use tempfile::TempDir;

const GPU: &str = "GPU-00000000-0000-0000-0000-0000000000dd";

/// Users that nobody is.
const STRANGER: u32 = 64_321;
const OTHER: u32 = 64_322;

const TIMEOUT: Patience = Patience::seconds(20);

fn gpu() -> GpuUuid {
    GPU.parse().unwrap()
}

/// Whether this can be tested here: what another user can do.
fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: only root can start processes of two users");
    }
    root
}

/// A directory into which every user may look.
fn directory(name: &str) -> TempDir {
    let mode = Permissions::from_mode(0o755);
    tempfile::Builder::new().prefix(&format!("nvshare-{name}-")).permissions(mode).tempdir().unwrap()
}

fn arbiter(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nvshare-arbiter"));
    command
        .arg("--runtime-dir")
        .arg(dir)
        .args(["--nvml-library", "/nonexistent/libnvidia-ml.so", "--gpu", GPU, "--capacity", "64MiB"])
        // The tests run side by side, and the GPU is none.
        .arg("--allow-second-arbiter")
        .args(arguments)
        .env_remove("NVSHARE_LOG")
        .stdin(Stdio::null());
    command
}

struct Arbiter {
    dir: TempDir,
    child: Child,
    log: PathBuf,
}

impl Arbiter {
    fn start(name: &str, arguments: &[&str]) -> Self {
        Self::start_in(directory(name), arguments)
    }

    fn start_in(dir: TempDir, arguments: &[&str]) -> Self {
        let log = dir.path().join("log");
        let child = Self::spawn(&dir, &log, arguments);
        Self { dir, child, log }
    }

    fn spawn(dir: &TempDir, log: &Path, arguments: &[&str]) -> Child {
        let log = File::options().append(true).create(true).open(log).unwrap();
        let child = arbiter(dir.path(), arguments).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        TIMEOUT.until("the arbiter answers", || {
            register::dial(&paths::socket(dir.path()), Duration::ZERO).is_ok()
        });
        child
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn restart(&mut self, arguments: &[&str]) {
        self.kill();
        self.child = Self::spawn(&self.dir, &self.log, arguments);
    }

    fn socket(&self) -> PathBuf {
        paths::socket(self.dir.path())
    }

    fn register(&self) -> Registration {
        register::register(&self.socket(), &Hello::new(gpu(), "test"), TIMEOUT.duration()).unwrap()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    fn lives(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Arbiter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process that ends with the test, however that ends.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process of this test binary, as a user: what it does is in [`other_process`].
fn process(user: u32, does: &str, dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "other_process", "--ignored", "--nocapture", "--test-threads=1"])
        .env("NVSHARE_TEST_DOES", does)
        .env("NVSHARE_TEST_DIR", dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    if user != nix::unistd::geteuid().as_raw() {
        command.uid(user).gid(user);
    }
    command
}

/// Waits for the line that a process says when it is done.
fn said(child: &mut Child) -> String {
    let mut output = BufReader::new(child.stdout.take().unwrap());
    loop {
        let mut line = String::new();
        assert_ne!(output.read_line(&mut line).unwrap(), 0, "it ended without a word");
        // The test harness has written its own words before, on the same line.
        if let Some((_, said)) = line.split_once("said: ") {
            child.stdout = Some(output.into_inner());
            return said.trim_end().to_owned();
        }
    }
}

/// The change that a process asks for.
fn set(quantum: &str) -> SettingsChange {
    SettingsChange::Set(vec![("quantum".into(), quantum.into())])
}

/// As a user, and ends.
fn as_user(user: u32, does: &str, dir: &Path) -> String {
    let mut child = process(user, does, dir).spawn().unwrap();
    let line = said(&mut child);
    assert!(child.wait().unwrap().success());
    line
}

#[test]
#[ignore = "the body of the processes that the other tests start"]
fn other_process() {
    let dir = PathBuf::from(std::env::var_os("NVSHARE_TEST_DIR").expect("started by another test"));
    let does = std::env::var("NVSHARE_TEST_DOES").unwrap();
    let (what, argument) = does.split_once(' ').unwrap_or((&does, ""));
    let socket = paths::socket(&dir);
    let ask = |hello: &Hello| register::register(&socket, hello, Duration::from_secs(5));
    let hello = Hello::new(gpu(), "other");
    match what {
        "look" => match ask(&Hello::look(gpu())) {
            Ok(seen) => println!("said: {} MiB", 2 * seen.page.capacity()),
            Err(error) => println!("said: {error}"),
        },
        // A client until its input ends.
        "client" => {
            let Registration { page, slot, private_phase } = ask(&hello).unwrap();
            let client = Client::new(page, slot).telling(private_phase);
            println!("said: slot {}", slot.get());
            let _ = std::io::stdin().read(&mut [0]);
            client.leave();
        }
        // As many slots as it can get, until its input ends.
        "slots" => {
            let mut all = Vec::new();
            let refusal = loop {
                match ask(&hello) {
                    Ok(registration) => all.push(registration),
                    Err(error) => break error,
                }
            };
            println!("said: {} {refusal}", all.len());
            let _ = std::io::stdin().read(&mut [0]);
        }
        "set" => match SettingsRequest::new(None, &set(argument)) {
            Ok(request) => match change::settings(&socket, &request, Duration::from_secs(5)) {
                Ok(settings) => println!("said: {}", settings.contains(argument)),
                Err(error) => println!("said: {error}"),
            },
            Err(error) => println!("said: {error}"),
        },
        // Pauses the client in slot 0, or resumes it.
        "pause" | "resume" => {
            let slot = nvshare::SlotIndex::new(0).unwrap();
            let owner = ask(&Hello::look(gpu())).unwrap().page.details(slot).unwrap().owner;
            let suspension = if what == "pause" { Suspension::WithoutEnd } else { Suspension::None };
            let request = PauseRequest::new(gpu(), slot, owner, suspension);
            match change::pause(&socket, &request, Duration::from_secs(5)) {
                Ok(done) => println!("said: {done}"),
                Err(error) => println!("said: {error}"),
            }
        }
        "garbage" => {
            for _ in 0..argument.parse().unwrap() {
                let fd = register::dial(&socket, Duration::from_secs(5)).unwrap();
                let _ = scm_rights::send(fd.as_fd(), &[7; 300], &[]);
            }
            println!("said: done");
        }
        _ => panic!("{does}"),
    }
}

// --- Steering ---------------------------------------------------------------------------------------

#[test]
fn only_root_and_the_arbiters_user_change_settings_and_everybody_may_ask() {
    let arbiter = Arbiter::start("settings", &[]);
    let own = nix::unistd::geteuid().as_raw();
    assert_eq!(as_user(own, "set 1234ms", arbiter.dir.path()), "true");
    let page = record::view_page(arbiter.dir.path(), gpu()).unwrap();
    let quantum = || page.settings().quantum;
    assert_eq!(quantum(), nvshare::page::Quantum::Fixed(1_234_000_000));
    if is_root() {
        let said = as_user(STRANGER, "set 2s", arbiter.dir.path());
        assert!(said.contains("changed by root") && said.contains(&format!("user {STRANGER}")), "{said}");
        assert_eq!(quantum(), nvshare::page::Quantum::Fixed(1_234_000_000));
    }
    let wrong = as_user(own, "set soon", arbiter.dir.path());
    assert!(wrong.contains("quantum: 'soon'"), "{wrong}");
}

#[test]
fn a_client_is_paused_by_its_own_user_and_not_by_another() {
    if !is_root() {
        return;
    }
    let arbiter = Arbiter::start("pause", &[]);
    let mut client = process(STRANGER, "client", arbiter.dir.path()).spawn().unwrap();
    assert_eq!(said(&mut client), "slot 0");
    let page = record::view_page(arbiter.dir.path(), gpu()).unwrap();
    let paused = || page.suspension(nvshare::SlotIndex::new(0).unwrap()) != Suspension::None;
    let refused = as_user(OTHER, "pause", arbiter.dir.path());
    assert!(refused.contains(&format!("the client belongs to user {STRANGER}")) && !paused(), "{refused}");
    assert_eq!(as_user(STRANGER, "pause", arbiter.dir.path()), "paused until it is resumed");
    assert!(paused());
    let refused = as_user(OTHER, "resume", arbiter.dir.path());
    assert!(refused.contains(&format!("you are user {OTHER}")) && paused(), "{refused}");
    assert_eq!(as_user(0, "resume", arbiter.dir.path()), "resumed");
    assert!(!paused());
    drop(client.stdin.take());
    client.wait().unwrap();
}

// --- The page -------------------------------------------------------------------------------------

/// The descriptors that this process has of the page, as they came from the arbiter.
fn descriptors_of_the_page() -> Vec<File> {
    let links = std::fs::read_dir("/proc/self/fd").unwrap().map(|link| link.unwrap().path());
    let pages = links.filter(|link| {
        std::fs::read_link(link).is_ok_and(|name| name.to_string_lossy().starts_with("/memfd:nvshare:"))
    });
    pages.filter_map(|link| File::options().read(true).write(true).open(link).ok()).collect()
}

#[test]
fn no_client_can_change_the_size_of_the_page() {
    let arbiter = Arbiter::start("size", &[]);
    let client = arbiter.register();
    let pages = descriptors_of_the_page();
    assert!(!pages.is_empty(), "a client can write the page");
    for page in pages {
        assert!(sealed::is_sealed(&page));
        for size in [0, 4096, 1 << 20] {
            assert_eq!(page.set_len(size).unwrap_err().raw_os_error(), Some(Errno::EPERM as i32));
        }
    }
    assert_eq!(client.page.capacity(), 32);
}

/// The descriptor that comes with an answer to this hello.
fn received(socket: &Path, hello: &Hello) -> File {
    let connection = register::dial(socket, TIMEOUT.duration()).unwrap();
    let words = [
        &hello.magic.to_le_bytes()[..],
        &hello.layout_version.to_le_bytes(),
        &hello.weight.to_le_bytes(),
        &hello.gpu,
        &hello.name,
        &hello.memory_limit.to_le_bytes(),
        &hello.priority.to_le_bytes(),
        &hello.pid.to_le_bytes(),
        &hello.compute_limit.to_le_bytes(),
        &hello.reserved.to_le_bytes(),
    ];
    scm_rights::send(connection.as_fd(), &words.concat(), &[]).unwrap();
    let (_, fds) = scm_rights::receive(connection.as_fd(), 1024, MsgFlags::empty()).unwrap();
    File::from(fds.into_iter().next().expect("a descriptor comes with the answer"))
}

#[test]
fn whoever_only_looks_cannot_write() {
    let arbiter = Arbiter::start("look", &[]);
    let mut looked_at = received(&arbiter.socket(), &Hello::look(gpu()));
    assert!(sealed::is_read_only(&looked_at) && sealed::is_sealed(&looked_at));
    assert!(looked_at.write_all(b"no").is_err() && looked_at.set_len(0).is_err());
    let page = MappedPage::open(&looked_at).unwrap();
    assert_eq!(page.capacity(), 32);
    // It is the page, and not a copy.
    let client = arbiter.register();
    assert!(page.owner(client.slot).is_some());
    assert_eq!(looked_at.metadata().unwrap().mode() & 0o777, 0o600, "others cannot open it again to write");
}

#[test]
fn everybody_may_look_and_nobody_else_may_open_the_record() {
    if !is_root() {
        return;
    }
    let arbiter = Arbiter::start("everybody", &[]);
    assert_eq!(as_user(STRANGER, "look", arbiter.dir.path()), "64 MiB");
    let record = paths::page(arbiter.dir.path(), gpu());
    assert_eq!(record.metadata().unwrap().mode() & 0o777, 0o600);
    assert!(record::open_page(arbiter.dir.path(), gpu()).is_ok());
}

#[test]
fn the_next_arbiter_takes_the_page_over_from_any_of_its_clients() {
    let mut arbiter = Arbiter::start("takeover", &[]);
    let mut clients: Vec<_> = (0..3)
        .map(|_| process(nix::unistd::geteuid().as_raw(), "client", arbiter.dir.path()).spawn().unwrap())
        .collect();
    clients.iter_mut().for_each(|client| drop(said(client)));
    let generation = || record::open_page(arbiter.dir.path(), gpu()).unwrap().arbiter().1;
    assert_eq!(generation(), 1);
    for left in (0..3).rev() {
        arbiter.restart(&[]);
        let page = record::open_page(arbiter.dir.path(), gpu()).unwrap();
        assert_eq!((page.arbiter().1, page.occupied().len()), (4 - left as u32, left + 1));
        let mut client = clients.pop().unwrap();
        client.kill().unwrap();
        client.wait().unwrap();
        TIMEOUT.until("its slot is closed", || page.occupied().len() == left);
    }
    // Nobody has it now: the next one makes another.
    arbiter.restart(&[]);
    let page = record::open_page(arbiter.dir.path(), gpu()).unwrap();
    assert_eq!((page.arbiter().1, page.occupied().len(), page.free().granules), (1, 0, 32));
}

#[test]
fn a_page_that_somebody_has_written_full_is_taken_over_with_its_clients() {
    let mut arbiter = Arbiter::start("scribbled", &[]);
    let client = arbiter.register();
    let stranger = arbiter.register();
    arbiter.kill();
    scribble(&stranger.page, &[u64::MAX, 0, 0x1234_5678]);
    arbiter.restart_dead();
    let page = record::open_page(arbiter.dir.path(), gpu()).unwrap();
    let own = std::process::id();
    for slot in [client.slot, stranger.slot] {
        assert_eq!(client.page.owner(slot).map(|owner| owner.pid), Some(own));
        assert!(page.owner(slot).is_some(), "it is the same page");
    }
    assert_eq!(page.occupied().len(), 2, "and nobody else is in it");
}

impl Arbiter {
    fn restart_dead(&mut self) {
        self.child = Self::spawn(&self.dir, &self.log, &[]);
    }
}

// --- What the page says of others -----------------------------------------------------------------

/// Writes a pid where the page says whose a slot is.
fn forge_owner(page: &MappedPage, client: u32, forged: u32) {
    // The owner's word is generation:32 | pid:32, and nothing else in the page looks like it.
    let size = nvshare::page::PAGE_BYTES;
    // SAFETY: the page is as long, and consists of atomics alone.
    let words = unsafe {
        std::slice::from_raw_parts(
            std::ptr::from_ref::<nvshare::Page>(page).cast::<std::sync::atomic::AtomicU64>(),
            size / 8,
        )
    };
    for word in words {
        let value = word.load(std::sync::atomic::Ordering::Relaxed);
        if value as u32 == client && (1..1000).contains(&(value >> 32)) {
            let forged = value >> 32 << 32 | u64::from(forged);
            word.store(forged, std::sync::atomic::Ordering::Relaxed);
        }
    }
}

#[test]
fn what_is_killed_is_the_client_and_not_whom_the_page_names() {
    let arguments = ["--kill-unresponsive", "--unresponsive-after", "200ms"];
    let arbiter = Arbiter::start("kill", &arguments);
    let mut victim = Command::new("sleep").arg("600").spawn().unwrap();
    let user = nix::unistd::geteuid().as_raw();
    let mut client = process(user, "client", arbiter.dir.path()).spawn().unwrap();
    let slot = said(&mut client);
    let hostile = arbiter.register();
    let page = hostile.page.clone();
    let forger = std::thread::spawn({
        let (client, victim) = (client.id(), victim.id());
        move || {
            // As fast as it can, until it is over: whenever the arbiter looks, it may see the lie.
            while state(client).is_some_and(|state| state != 'Z') {
                for _ in 0..100 {
                    forge_owner(&page, client, victim);
                }
            }
        }
    });
    // It holds the GPU without a right to it, as the page says: a client that does not react.
    let number = slot.trim_start_matches("slot ").parse().unwrap();
    let slot = nvshare::SlotIndex::new(number).unwrap();
    lie_about_phase(&hostile.page, slot, Phase::Draining);
    nix::sys::signal::kill(Pid::from_raw(client.id() as i32), Signal::SIGSTOP).unwrap();
    TIMEOUT.until("the client is killed", || client.try_wait().unwrap().is_some());
    forger.join().unwrap();
    assert!(victim.try_wait().unwrap().is_none(), "another process was killed");
    victim.kill().unwrap();
    victim.wait().unwrap();
}

fn state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Makes the page say that a client is in this phase: whoever owns another slot can do it as this does.
fn lie_about_phase(page: &MappedPage, slot: nvshare::SlotIndex, phase: Phase) {
    // SAFETY: the row is in the page, which consists of atomics; the phase is the first of the owner's own words.
    let word = unsafe {
        &*std::ptr::from_ref(page.slot(slot)).cast::<u8>().add(128).cast::<std::sync::atomic::AtomicU32>()
    };
    word.store(phase as u32, std::sync::atomic::Ordering::Release);
    assert_eq!(page.view(slot).phase, phase, "the layout has moved");
}

/// A client that lives and does nothing, and somebody who writes into its row all the time.
fn lied_about(phase: Phase, arguments: &[&str]) {
    let mut arbiter = Arbiter::start(phase.name(), arguments);
    let user = nix::unistd::geteuid().as_raw();
    let mut client = process(user, "client", arbiter.dir.path()).spawn().unwrap();
    let slot = said(&mut client).trim_start_matches("slot ").parse().unwrap();
    let slot = nvshare::SlotIndex::new(slot).unwrap();
    let hostile = arbiter.register();
    TIMEOUT.until("the lie is found out", || {
        lie_about_phase(&hostile.page, slot, phase);
        arbiter.log().contains("somebody has written into the page")
            || arbiter.log().contains("Somebody has written into the page")
    });
    assert!(client.try_wait().unwrap().is_none(), "it was killed for a lie");
    assert_eq!(hostile.page.owner(slot).map(|owner| owner.pid), Some(client.id()));
    // When it does leave, that is believed.
    lie_about_phase(&hostile.page, slot, Phase::Idle);
    drop(client.stdin.take());
    assert!(client.wait().unwrap().success());
    TIMEOUT.until("its slot is closed", || hostile.page.owner(slot).is_none());
    assert!(arbiter.lives());
}

#[test]
fn a_client_does_not_lose_its_slot_because_the_page_says_that_it_leaves() {
    lied_about(Phase::Leaving, &[]);
}

#[test]
fn a_client_is_not_killed_because_the_page_says_that_it_does_not_give_way() {
    lied_about(Phase::Draining, &["--kill-unresponsive", "--unresponsive-after", "200ms"]);
}

#[test]
fn a_slot_stays_its_owners_whatever_stands_in_the_page() {
    let arbiter = Arbiter::start("owner", &[]);
    let client = arbiter.register();
    let page = &client.page;
    let owner = page.details(client.slot).unwrap().owner;
    forge_owner(page, std::process::id(), 1);
    assert_eq!(page.owner(client.slot).unwrap().pid, 1);
    // A change of shares is for whom the arbiter has registered, and nobody who has its pid in the page.
    let edit = SharesUpdate { weight: Some(7), ..SharesUpdate::default() };
    let forged = nvshare::slot::Owner { pid: 1, ..owner };
    let ask = |owner| {
        change::change(&arbiter.socket(), &Change::new(gpu(), client.slot, owner, edit), TIMEOUT.duration())
    };
    assert!(matches!(ask(forged), Err(RegisterError::Refused { status: Status::Refused, .. })));
    assert!(ask(owner).is_ok());
    TIMEOUT.until("the page is put right", || {
        page.owner(client.slot).is_some_and(|owner| owner.pid == std::process::id())
    });
    TIMEOUT.until("that is logged", || arbiter.log().contains("overwritten"));
}

// --- Floods ---------------------------------------------------------------------------------------

#[test]
fn garbage_is_logged_a_few_times_and_counted() {
    let mut arbiter = Arbiter::start("garbage", &[]);
    let user = nix::unistd::geteuid().as_raw();
    assert_eq!(as_user(user, "garbage 2000", arbiter.dir.path()), "done");
    let refused = |log: &str| log.lines().filter(|line| line.contains("refused")).count();
    TIMEOUT.until("some are logged", || refused(&arbiter.log()) >= 5);
    arbiter.register();
    let log = arbiter.log();
    assert!(refused(&log) <= 10 && log.len() < 10_000, "{} bytes: {log}", log.len());
    TIMEOUT.until("the rest is counted", || arbiter.log().contains("count=1"));
    assert!(arbiter.lives());
}

/// One process keeps so many connections that say nothing.
fn silent(socket: &Path, count: usize) -> Vec<std::os::fd::OwnedFd> {
    (0..count).map(|_| register::dial(socket, TIMEOUT.duration()).unwrap()).collect()
}

#[test]
fn a_client_that_speaks_is_served_among_any_number_of_silent_ones() {
    let mut arbiter = Arbiter::start("silent", &[]);
    let pid = arbiter.child.id();
    // The honest one was here first: it is not the one that has to go.
    let honest = register::dial(&arbiter.socket(), TIMEOUT.duration()).unwrap();
    let _silent = silent(&arbiter.socket(), 900);
    let _more = as_user(nix::unistd::geteuid().as_raw(), "garbage 50", arbiter.dir.path());
    drop(honest);
    let before = std::time::Instant::now();
    let client = arbiter.register();
    assert_eq!(client.page.capacity(), 32);
    // Not a verdict on speed: a client that is turned away waits and asks again.
    assert!(before.elapsed() < Duration::from_secs(5));
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    assert!(open < 200, "{open} descriptors are open for silent connections");
    assert!(arbiter.lives());
}

/// As many descriptors as a message can have, more than the arbiter takes in: it closes those that the kernel has made for it.
#[test]
fn a_message_with_too_many_descriptors_leaves_none_open() {
    let mut arbiter = Arbiter::start("gifts", &[]);
    let pid = arbiter.child.id();
    let gift = File::open("/dev/null").unwrap();
    for count in [scm_rights::MOST_DESCRIPTORS + 1, 253] {
        let connection = register::dial(&arbiter.socket(), TIMEOUT.duration()).unwrap();
        scm_rights::send(connection.as_fd(), &[7; 300], &vec![gift.as_fd(); count]).unwrap();
        // An answer, or the end of the connection: the message has been taken in.
        let _ = scm_rights::receive(connection.as_fd(), 1024, MsgFlags::empty());
    }
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let gifts = open.filter(|link| {
        let name = link.as_ref().map(|link| std::fs::read_link(link.path()));
        name.is_ok_and(|name| name.is_ok_and(|name| name == Path::new("/dev/null")))
    });
    let gifts = gifts.count();
    assert!(gifts <= 3, "{gifts} descriptors are open, with standard input and output");
    assert!(arbiter.lives());
}

#[test]
fn one_user_cannot_take_all_slots_and_is_told_so() {
    if !is_root() {
        return;
    }
    let arbiter = Arbiter::start("slots", &["--slots-per-user", "3"]);
    let mut greedy = process(STRANGER, "slots", arbiter.dir.path()).spawn().unwrap();
    let words = said(&mut greedy);
    assert!(words.starts_with("3 ") && words.contains("--slots-per-user"), "{words}");
    assert!(words.contains(&format!("user {STRANGER} has 3 slots")), "{words}");
    // Others are not bound by what that user has, and root by nothing.
    let mut other = process(OTHER, "slots", arbiter.dir.path()).spawn().unwrap();
    assert!(said(&mut other).starts_with("3 "));
    let own: Vec<_> = (0..nvshare::slot::SLOTS - 6).map(|_| arbiter.register()).collect();
    for mut child in [greedy, other] {
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
    }
    drop(own);
}

// --- The runtime directory ------------------------------------------------------------------------

fn refused(output: &Output, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(words.iter().all(|word| said.contains(word)), "{said}");
}

#[test]
fn an_arbiter_does_not_serve_where_others_could_take_its_place() {
    let parent = directory("places");
    let dir = parent.path().join("run");
    std::os::unix::fs::symlink(parent.path(), &dir).unwrap();
    refused(&arbiter(&dir, &[]).output().unwrap(), &["symbolic link", dir.to_str().unwrap()]);
    std::fs::remove_file(&dir).unwrap();
    std::fs::create_dir(&dir).unwrap();
    std::fs::set_permissions(&dir, Permissions::from_mode(0o777)).unwrap();
    refused(&arbiter(&dir, &[]).output().unwrap(), &["everybody can write", "777"]);
    std::fs::set_permissions(&dir, Permissions::from_mode(0o755)).unwrap();
    if is_root() {
        std::os::unix::fs::chown(&dir, Some(STRANGER), None).unwrap();
        refused(&arbiter(&dir, &[]).output().unwrap(), &[&format!("belongs to user {STRANGER}")]);
    }
}

#[test]
fn a_link_in_the_runtime_directory_is_not_followed() {
    let dir = directory("links");
    let victim = dir.path().join("precious");
    std::fs::write(&victim, "precious").unwrap();
    std::os::unix::fs::symlink(&victim, paths::arbiter_lock(dir.path())).unwrap();
    refused(&arbiter(dir.path(), &[]).output().unwrap(), &["arbiter.lock"]);
    std::fs::remove_file(paths::arbiter_lock(dir.path())).unwrap();
    std::os::unix::fs::symlink(&victim, paths::page(dir.path(), gpu())).unwrap();
    refused(&arbiter(dir.path(), &[]).output().unwrap(), &["page", GPU]);
    assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious");
}

/// Where everybody can write and nobody can take away, as in /tmp, others may have put their files first.
#[test]
fn files_of_others_in_the_runtime_directory_are_not_used() {
    if !is_root() {
        return;
    }
    let dir = directory("sticky");
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o1777)).unwrap();
    let (lock, page) = (paths::arbiter_lock(dir.path()), paths::page(dir.path(), gpu()));
    let plant = |path: &Path| {
        std::fs::write(path, [0; 1216]).unwrap();
        std::os::unix::fs::chown(path, Some(STRANGER), None).unwrap();
    };
    plant(&lock);
    let named = format!("arbiter.lock belongs to user {STRANGER}");
    refused(&arbiter(dir.path(), &[]).output().unwrap(), &[&named]);
    std::fs::remove_file(&lock).unwrap();
    plant(&page);
    let arbiter = Arbiter::start_in(dir, &[]);
    assert_eq!(page.metadata().unwrap().uid(), 0, "it has its own");
    assert!(arbiter.log().contains("moving it aside"), "{}", arbiter.log());
}

#[test]
fn an_arbiter_makes_a_directory_that_is_its_users_own() {
    if !is_root() {
        return;
    }
    let parent = directory("made");
    std::os::unix::fs::chown(parent.path(), Some(STRANGER), None).unwrap();
    let dir = parent.path().join("run");
    let child = arbiter(&dir, &[]).uid(STRANGER).gid(STRANGER).stderr(Stdio::null()).spawn();
    let _child = Ending(child.unwrap());
    TIMEOUT.until("it serves", || paths::socket(&dir).exists());
    let data = dir.metadata().unwrap();
    assert_eq!((data.mode() & 0o777, data.uid()), (0o700, STRANGER));
}

#[test]
fn a_client_does_not_believe_another_users_arbiter() {
    if !is_root() {
        return;
    }
    let dir = directory("planted");
    std::os::unix::fs::chown(dir.path(), Some(STRANGER), None).unwrap();
    let planted = arbiter(dir.path(), &[]).uid(STRANGER).gid(STRANGER).stderr(Stdio::null()).spawn();
    let _planted = Ending(planted.unwrap());
    TIMEOUT.until("it listens", || paths::socket(dir.path()).exists());
    let words = as_user(OTHER, "look", dir.path());
    let named =
        [format!("runs as user {STRANGER}"), format!("of user {OTHER}"), "NVSHARE_RUNTIME_DIR".into()];
    assert!(named.iter().all(|name| words.contains(name)), "{words}");
    assert_eq!(as_user(STRANGER, "look", dir.path()), "64 MiB", "its own user believes it");
    assert!(register::dial(&paths::socket(dir.path()), Duration::ZERO).is_err(), "nor does root");
}

#[test]
fn a_full_file_system_is_an_error_that_says_so() {
    if !is_root() {
        return;
    }
    let dir = directory("full");
    // A mount of its own, seen by this process alone.
    let script = format!("mount -t tmpfs -o size=16k none '{0}' && exec \"$@\"", dir.path().display());
    let command = arbiter(dir.path(), &[]);
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", &script, "sh"])
        .arg(command.get_program())
        .args(command.get_args())
        .output()
        .unwrap();
    refused(&output, &["is full", dir.path().to_str().unwrap(), "--runtime-dir"]);
}
