//! The arbiter as a process: what good and bad input gets.

use nvshare::page::LAYOUT_VERSION;
use nvshare::paths;
use nvshare::register::{self, RegisterError};
use nvshare::release::RELEASE;
use nvshare::scm_rights;
use nvshare::shares::{ComputeLimit, MemoryLimit, Priority, Shares};
use nvshare::slot::{Owner, SLOTS};
use nvshare::units::GpuUuid;
use nvshare::wire::{Change, Hello, SharesUpdate, Status};
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const GPU: &str = "GPU-00000000-0000-0000-0000-0000000000bb";

struct Arbiter {
    dir: PathBuf,
    child: Child,
}

fn command(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nvshare-arbiter"));
    command
        .arg("--runtime-dir")
        .arg(dir)
        .args(["--nvml-library", "/nonexistent/libnvidia-ml.so"])
        // The tests run side by side and call their GPU the same.
        .arg("--allow-second-arbiter")
        .args(arguments)
        .stdin(Stdio::null());
    command
}

fn directory(name: &str) -> PathBuf {
    // The tests remove it: some hand it from one arbiter to the next.
    tempfile::Builder::new().prefix(&format!("nvshare-{name}-")).tempdir().unwrap().keep()
}

impl Arbiter {
    fn start(dir: PathBuf) -> Self {
        let child =
            command(&dir, &["--gpu", GPU, "--capacity", "64MiB"]).stderr(Stdio::null()).spawn().unwrap();
        let arbiter = Self { dir, child };
        let until = Instant::now() + Duration::from_secs(20);
        while register::dial(&paths::socket(&arbiter.dir), Duration::ZERO).is_err() {
            assert!(Instant::now() < until, "no arbiter answers");
        }
        arbiter
    }

    fn register(&self, hello: &Hello) -> Result<register::Registration, RegisterError> {
        register::register(&paths::socket(&self.dir), hello, Duration::from_secs(5))
    }
}

impl Drop for Arbiter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn hello() -> Hello {
    Hello::new(GPU.parse().unwrap(), "test")
}

fn refused(result: Result<register::Registration, RegisterError>) -> (Status, String) {
    match result {
        Err(RegisterError::Refused { status, text, .. }) => (status, text),
        Err(other) => panic!("not a refusal: {other}"),
        Ok(_) => panic!("not refused"),
    }
}

/// What an arbiter says that is to be refused. One that serves all the same would do so for ever.
fn refusal(command: &mut Command) -> Output {
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while child.try_wait().unwrap().is_none() && Instant::now() < until {
        std::thread::yield_now();
    }
    let _ = child.kill();
    child.wait_with_output().unwrap()
}

fn fails_with_two(output: &Output, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(words.iter().all(|word| said.contains(word)), "{said}");
}

#[test]
fn a_second_arbiter_is_refused_with_the_pid_of_the_first() {
    let first = Arbiter::start(directory("second"));
    let output = refusal(&mut command(&first.dir, &["--gpu", GPU, "--capacity", "64MiB"]));
    fails_with_two(&output, &[&first.child.id().to_string(), first.dir.to_str().unwrap()]);
}

#[test]
fn values_that_make_no_sense_are_named() {
    let dir = directory("values");
    for (arguments, words) in [
        (&["--gpu", "card-0"][..], &["'card-0'", "nvidia-smi"][..]),
        (&["--capacity", "lots"], &["'lots'", "14.9GiB"]),
        (&["--quantum", "soon"], &["'soon'", "500ms"]),
        (&["--quantum-factor=-1"], &["'-1'", "between 0.1 and 1000"]),
        (&["--capacity", "1GiB"], &["NVML", "--gpu"]),
    ] {
        fails_with_two(&refusal(&mut command(&dir, arguments)), words);
    }
    let _ = std::fs::remove_dir_all(dir);
}

#[test]
fn a_place_to_listen_at_that_was_asked_for_must_be_had() {
    let dir = directory("listen");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let place = taken.local_addr().unwrap().to_string();
    let own = ["--gpu", GPU, "--capacity", "64MiB", "--listen"];
    let with = |place: &str| refusal(&mut command(&dir, &[&own[..], &[place]].concat()));
    fails_with_two(&with(&place), &["--listen", &place, "or none"]);
    fails_with_two(&with("localhost"), &["'localhost'", "127.0.0.1:9478"]);
    let _ = std::fs::remove_dir_all(dir);
}

#[test]
fn who_cannot_be_served_is_told_why() {
    let arbiter = Arbiter::start(directory("refusals"));
    let other: GpuUuid = "GPU-00000000-0000-0000-0000-0000000000cc".parse().unwrap();
    let (status, text) = refused(arbiter.register(&Hello::new(other, "test")));
    assert!(
        status == Status::UnknownGpu && text.contains(&other.to_string()) && text.contains(GPU),
        "{text}"
    );
    let (status, text) = refused(arbiter.register(&Hello { layout_version: 77, ..hello() }));
    assert!(
        status == Status::LayoutVersion
            && text.contains("77")
            && text.contains(&format!("this arbiter, nvshare {RELEASE}, has {LAYOUT_VERSION}"))
            && text.contains("restart the arbiter")
            && text.contains(&format!("this program has nvshare {RELEASE}")),
        "{text}"
    );
    let (status, _) = refused(arbiter.register(&Hello { magic: 0, ..hello() }));
    assert_eq!(status, Status::Malformed);
    let all: Vec<_> = (0..SLOTS).map(|_| arbiter.register(&hello()).unwrap()).collect();
    let (status, text) = refused(arbiter.register(&hello()));
    assert!(status == Status::Full && text.contains("48"), "{text}");
    drop(all);
}

#[test]
fn who_looks_sees_the_page_and_takes_no_slot() {
    let arbiter = Arbiter::start(directory("look"));
    let (socket, gpu) = (paths::socket(&arbiter.dir), GPU.parse().unwrap());
    let look = || register::look(&socket, gpu, Duration::from_secs(5));
    // More than there are slots.
    let pages: Vec<_> = (0..2 * SLOTS).map(|_| look().unwrap()).collect();
    assert!(pages.iter().all(|page| page.occupied().is_empty()));
    assert_eq!(pages[0].capacity(), 32);
    // It is the page, and not a copy.
    let registration = arbiter.register(&hello()).unwrap();
    assert!(pages.iter().all(|page| page.owner(registration.slot).is_some()));

    let other: GpuUuid = "GPU-00000000-0000-0000-0000-0000000000cc".parse().unwrap();
    let refused = |hello: &Hello| match register::register(&socket, hello, Duration::from_secs(5)) {
        Err(RegisterError::Refused { status, .. }) => status,
        _ => panic!("not refused"),
    };
    assert_eq!(refused(&Hello::look(other)), Status::UnknownGpu);
    assert_eq!(refused(&Hello { layout_version: 77, ..Hello::look(gpu) }), Status::LayoutVersion);
    // All slots taken: a look is not refused.
    let all: Vec<_> = (1..SLOTS).map(|_| arbiter.register(&hello()).unwrap()).collect();
    assert!(arbiter.register(&hello()).is_err() && look().is_ok());
    drop(all);
}

#[test]
fn nonsense_on_the_socket_harms_nobody() {
    let arbiter = Arbiter::start(directory("nonsense"));
    let mut noise = 0x9e37_79b9_7f4a_7c15u64;
    for length in (0..600).step_by(7) {
        let bytes: Vec<u8> = (0..length)
            .map(|_| {
                noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (noise >> 56) as u8
            })
            .collect();
        let fd = register::dial(&paths::socket(&arbiter.dir), Duration::from_secs(5)).unwrap();
        let _ = scm_rights::send(std::os::fd::AsFd::as_fd(&fd), &bytes, &[]);
    }
    // Connections that say nothing, more than are kept waiting.
    let silent: Vec<_> = (0..100)
        .map(|_| register::dial(&paths::socket(&arbiter.dir), Duration::from_secs(5)).unwrap())
        .collect();
    drop(silent);
    assert!(arbiter.register(&hello()).is_ok());
}

#[test]
fn a_page_of_garbage_is_moved_aside() {
    let dir = directory("garbage-page");
    let path = paths::page(&dir, GPU.parse().unwrap());
    for bytes in [&b"short"[..], &[0xa5; 64 << 10]] {
        std::fs::write(&path, bytes).unwrap();
        let arbiter = Arbiter::start(dir.clone());
        assert!(arbiter.register(&hello()).is_ok());
        let aside = dir.join(format!("{GPU}.page.bad-1"));
        assert_eq!(std::fs::read(aside).unwrap(), bytes);
        drop(arbiter);
        std::fs::create_dir_all(&dir).unwrap();
    }
    let _ = std::fs::remove_dir_all(dir);
}

#[test]
fn a_record_of_another_page_layout_is_moved_aside_and_the_log_says_what_becomes_of_its_clients() {
    use std::os::unix::fs::FileExt;
    let dir = directory("other-layout");
    let path = paths::page(&dir, GPU.parse().unwrap());
    let mut first = Arbiter::start(dir.clone());
    // A client, so that the record stays.
    let client = first.register(&hello()).unwrap();
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    // Its layout stands behind the magic.
    let record = std::fs::File::options().write(true).open(&path).unwrap();
    record.write_all_at(&(LAYOUT_VERSION - 1).to_le_bytes(), 8).unwrap();

    let mut next = command(&dir, &["--gpu", GPU, "--capacity", "64MiB"]);
    let mut child = next.stderr(Stdio::piped()).spawn().unwrap();
    let said = BufReader::new(child.stderr.take().unwrap());
    let moved = said.lines().map(Result::unwrap).find(|line| line.contains("moving it aside")).unwrap();
    // It is said before it is done.
    wait_for("the record is aside", || dir.join(format!("{GPU}.page.bad-1")).exists());
    child.kill().unwrap();
    child.wait().unwrap();
    for word in [
        &format!(
            "page layout {} and this arbiter, nvshare {RELEASE}, has {LAYOUT_VERSION}",
            LAYOUT_VERSION - 1
        ),
        "end them and start them again",
        GPU,
    ] {
        assert!(moved.contains(word), "{moved}");
    }
    drop(client);
}

#[test]
fn sigterm_leaves_the_page_and_the_next_one_takes_it_over() {
    let mut first = Arbiter::start(directory("takeover"));
    let client = first.register(&hello()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(first.child.id() as i32), nix::sys::signal::SIGTERM)
        .unwrap();
    assert!(first.child.wait().unwrap().success());
    assert!(!paths::socket(&first.dir).exists());
    first.child =
        command(&first.dir, &["--gpu", GPU, "--capacity", "32MiB"]).stderr(Stdio::null()).spawn().unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while client.page.arbiter().1 < 2 || client.page.capacity() != 16 {
        assert!(Instant::now() < until, "nobody took the page over");
    }
    assert_eq!(client.page.owner(client.slot).unwrap().pid, std::process::id(), "the client is still there");
}

#[test]
fn sighup_ends_no_arbiter_and_is_logged() {
    let dir = directory("hangup");
    let mut child =
        command(&dir, &["--gpu", GPU, "--capacity", "64MiB"]).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(log.any(|line| line.contains("serving")));
    let arbiter = Arbiter { dir, child };
    // The last line comes before the loop begins, so the first of these may be early.
    for _ in 0..2 {
        let pid = nix::unistd::Pid::from_raw(arbiter.child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::SIGHUP).unwrap();
        assert!(log.any(|line| line.contains("SIGHUP") && line.contains("again")));
    }
    assert!(arbiter.register(&hello()).is_ok());
}

/// Five failed starts in ten seconds are enough for systemd to give up by default, and RestartSec=1 does five in five.
#[test]
fn the_unit_is_started_again_however_often_it_fails() {
    let unit = include_str!("../nvshare-arbiter.service");
    let (head, service) = unit.split_once("[Service]").unwrap();
    assert!(head.lines().any(|line| line == "StartLimitIntervalSec=0"), "it belongs to [Unit]");
    assert!(service.lines().any(|line| line == "Restart=always"));
    // Another arbiter's claim of a GPU could not be seen from a network namespace of its own.
    assert!(!unit.contains("PrivateNetwork=yes"));
}

// --- Private arbiters -----------------------------------------------------------------------------

/// A private arbiter of a process that is there for as long as the test, with its log.
fn private(dir: &Path, arguments: &[&str]) -> Command {
    let own = std::process::id().to_string();
    let mut command = command(dir, &["--gpu", GPU, "--exit-when-idle", "--owner-pid", &own]);
    command.args(arguments);
    command
}

fn serves(dir: &Path) -> bool {
    register::dial(&paths::socket(dir), Duration::ZERO).is_ok()
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < until, "still not: {what}");
        std::thread::yield_now();
    }
}

fn ends(arbiter: &mut Arbiter, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(arbiter.child.id() as i32), signal).unwrap();
    arbiter.child.wait().unwrap();
}

#[test]
fn a_gpu_that_another_arbiter_serves_elsewhere_is_refused_unless_asked_for() {
    const SHARED: &str = "GPU-00000000-0000-0000-0000-0000000020bb";
    let [one, two] = ["claim-one", "claim-two"].map(directory);
    let start = |dir: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nvshare-arbiter"));
        command.arg("--runtime-dir").arg(dir).args(["--nvml-library", "/nonexistent", "--capacity", "64MiB"]);
        command.args(["--gpu", SHARED]).stderr(Stdio::piped());
        command
    };
    let mut first = Arbiter { child: start(&one).stderr(Stdio::null()).spawn().unwrap(), dir: one.clone() };
    wait_for("the first serves", || serves(&one));
    let refused = refusal(&mut start(&two));
    let (pid, user) = (first.child.id().to_string(), format!("user {}", nix::unistd::geteuid()));
    fails_with_two(&refused, &[SHARED, &pid, &user, one.to_str().unwrap(), "--allow-second-arbiter"]);
    assert!(!paths::is_served(&two), "and leaves nothing behind");

    let child = start(&two).env("NVSHARE_ALLOW_SECOND_ARBITER", "1").stderr(Stdio::piped()).spawn().unwrap();
    let mut second = Arbiter { child, dir: two.clone() };
    let mut log = BufReader::new(second.child.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(
        log.any(|line| line.contains("served already") && line.contains("as --allow-second-arbiter says"))
    );
    wait_for("both serve", || serves(&two));
    ends(&mut second, nix::sys::signal::Signal::SIGTERM);

    // A claim ends with its process, however that ends.
    ends(&mut first, nix::sys::signal::Signal::SIGKILL);
    second.child = start(&two).stderr(Stdio::null()).spawn().unwrap();
    wait_for("the second serves", || serves(&two));
}

/// What stands in the lock file: the arbiter's pid, and how its pools are sized.
fn signed(dir: &Path) -> String {
    std::fs::read_to_string(paths::arbiter_lock(dir)).unwrap()
}

#[test]
fn a_private_arbiter_changes_no_pool_under_living_clients() {
    let dir = directory("stranger");
    let start = |arguments: &[&str]| private(&dir, arguments).stderr(Stdio::null()).spawn().unwrap();
    let mut arbiter = Arbiter { child: start(&["--capacity", "64MiB"]), dir: dir.clone() };
    wait_for("it serves", || serves(&dir));
    let client = arbiter.register(&hello()).unwrap();
    ends(&mut arbiter, nix::sys::signal::Signal::SIGKILL);
    for _ in 0..2 {
        // Nor if it tries again.
        let refused = refusal(&mut private(&dir, &["--capacity", "32MiB"]));
        fails_with_two(&refused, &["1 living clients", "64.00 MiB", "--runtime-dir"]);
        assert_eq!(client.page.capacity(), 32);
        assert!(signed(&dir).contains("private arbiter with --capacity 64.00 MiB"), "{}", signed(&dir));
    }
    // One that says the same takes over.
    arbiter.child = start(&["--capacity", "64MiB"]);
    wait_for("a successor serves", || serves(&dir));
    ends(&mut arbiter, nix::sys::signal::Signal::SIGKILL);
    // The operator's may change what the operator wants.
    arbiter.child =
        command(&dir, &["--gpu", GPU, "--capacity", "32MiB"]).stderr(Stdio::null()).spawn().unwrap();
    wait_for("the operator's has changed it", || client.page.capacity() == 16);
    // Written down by then, or an arbiter that is killed now leaves a pool of which nobody knows who sized it.
    assert!(signed(&dir).contains("a service with --capacity 32.00 MiB"), "{}", signed(&dir));
    assert!(client.page.owner(client.slot).is_some());
    // And what a private one says after that is not what the operator's said.
    ends(&mut arbiter, nix::sys::signal::Signal::SIGKILL);
    fails_with_two(&refusal(&mut private(&dir, &["--capacity", "32MiB"])), &["living clients"]);
}

#[test]
fn a_private_arbiter_changes_no_pool_of_which_nobody_knows_who_sized_it() {
    let dir = directory("unsigned");
    let mut arbiter = Arbiter {
        child: private(&dir, &["--capacity", "64MiB"]).stderr(Stdio::null()).spawn().unwrap(),
        dir: dir.clone(),
    };
    wait_for("it serves", || serves(&dir));
    let client = arbiter.register(&hello()).unwrap();
    ends(&mut arbiter, nix::sys::signal::Signal::SIGKILL);
    for nothing in ["", "4711\n", "4711\n\n"] {
        std::fs::write(paths::arbiter_lock(&dir), nothing).unwrap();
        fails_with_two(&refusal(&mut private(&dir, &["--capacity", "32MiB"])), &["1 living clients"]);
        assert_eq!(client.page.capacity(), 32);
    }
}

#[test]
fn a_private_arbiter_without_clients_leaves_nothing_behind() {
    let above = directory("clean");
    let dir = above.join("made/by/it");
    let child = private(&dir, &["--capacity", "64MiB"]).stderr(Stdio::null()).spawn().unwrap();
    let mut arbiter = Arbiter { child, dir: dir.clone() };
    wait_for("it serves", || serves(&dir));
    ends(&mut arbiter, nix::sys::signal::Signal::SIGTERM);
    assert!(
        !dir.exists(),
        "{:?}",
        std::fs::read_dir(&dir).map(|entries| entries.flatten().collect::<Vec<_>>())
    );
    assert!(!refusal(&mut private(&dir, &["--capacity", "none"])).status.success());
    assert!(!dir.exists());
    let _ = std::fs::remove_dir_all(above);
}

// --- Shares ---------------------------------------------------------------------------------------

/// Registers with these shares, and says what stands in the page.
fn client(arbiter: &Arbiter, shares: Shares) -> (register::Registration, Owner) {
    let registration = arbiter.register(&hello().with(shares)).unwrap();
    let owner = registration.page.details(registration.slot).unwrap().owner;
    (registration, owner)
}

fn change(arbiter: &Arbiter, change: &Change) -> Result<String, RegisterError> {
    nvshare::change::change(&paths::socket(&arbiter.dir), change, Duration::from_secs(5))
}

fn change_refused(result: Result<String, RegisterError>) -> (Status, String) {
    match result {
        Err(RegisterError::Refused { status, text, .. }) => (status, text),
        other => panic!("not a refusal: {other:?}"),
    }
}

const ASKED: Shares = Shares {
    weight: 300,
    priority: Priority::High,
    memory_limit: MemoryLimit::Part(250_000),
    compute_limit: ComputeLimit::Part(300_000),
};

#[test]
fn shares_are_what_was_asked_for_and_what_they_are_changed_to() {
    let arbiter = Arbiter::start(directory("shares"));
    let gpu: GpuUuid = GPU.parse().unwrap();
    let (usual, _) = client(&arbiter, Shares::default());
    let (one, owner) = client(&arbiter, ASKED);
    assert_eq!(one.page.shares(one.slot), ASKED);
    assert_eq!(one.page.shares(usual.slot), Shares::default());

    let edit = SharesUpdate {
        weight: Some(50),
        memory_limit: Some(MemoryLimit::Size(7)),
        compute_limit: Some(ComputeLimit::None),
        ..SharesUpdate::default()
    };
    let changed = Shares { priority: Priority::High, ..edit.of(Shares::default()) };
    let seen = one.page.doorbell(one.slot);
    let said = change(&arbiter, &Change::new(gpu, one.slot, owner, edit)).unwrap();
    assert_eq!((said, one.page.shares(one.slot)), (changed.to_string(), changed));
    assert_ne!(one.page.doorbell(one.slot), seen, "it is told to look");
    assert_eq!(one.page.shares(usual.slot), Shares::default(), "nobody else's");

    // A client that has gone, and one that is not there.
    let gone = Owner { generation: owner.generation.wrapping_sub(1), ..owner };
    for (slot, owner) in [(one.slot, gone), (one.slot, Owner { pid: 1, ..owner }), (usual.slot, gone)] {
        let (status, text) = change_refused(change(&arbiter, &Change::new(gpu, slot, owner, edit)));
        assert!(status == Status::Refused && text.contains("ended"), "{text}");
    }
    let other: GpuUuid = "GPU-00000000-0000-0000-0000-0000000000cc".parse().unwrap();
    let (status, _) = change_refused(change(&arbiter, &Change::new(other, one.slot, owner, edit)));
    assert_eq!(status, Status::UnknownGpu);
    assert_eq!(one.page.shares(one.slot), changed);
}

#[test]
fn garbage_changes_nothing_and_the_arbiter_goes_on() {
    let arbiter = Arbiter::start(directory("garbage"));
    let gpu: GpuUuid = GPU.parse().unwrap();
    let (one, owner) = client(&arbiter, ASKED);
    let good = Change::new(gpu, one.slot, owner, SharesUpdate { weight: Some(5), ..SharesUpdate::default() });
    for bad in [
        Change { weight: 0, ..good },
        Change { weight: u32::MAX, ..good },
        Change { which: u32::MAX, ..good },
        Change { which: 0, ..good },
        Change { priority: 77, which: 2, ..good },
        Change { memory_limit: u64::MAX, which: 4, ..good },
        Change { compute_limit: 9_999, which: 8, ..good },
        Change { slot: u32::MAX, ..good },
    ] {
        assert_eq!(change_refused(change(&arbiter, &bad)).0, Status::Malformed, "{bad:?}");
    }
    assert_eq!(
        change_refused(change(&arbiter, &Change { layout_version: 77, ..good })).0,
        Status::LayoutVersion
    );
    // Messages of every length, and a register's words that are out of their bounds.
    let mut words = bytemuck::bytes_of(&good).to_vec();
    words.resize(200, 0xff);
    for length in 1..words.len() {
        if length != size_of::<Change>() {
            let fd = register::dial(&paths::socket(&arbiter.dir), Duration::from_secs(5)).unwrap();
            scm_rights::send(fd.as_fd(), &words[..length], &[]).unwrap();
        }
    }
    let wild =
        Hello { weight: u32::MAX, priority: 99, memory_limit: u64::MAX, compute_limit: u32::MAX, ..hello() };
    let wild = arbiter.register(&wild).unwrap();
    let bounded = Shares {
        weight: 1000,
        priority: Priority::Normal,
        memory_limit: MemoryLimit::Part(1_000_000),
        compute_limit: ComputeLimit::Part(1_000_000),
    };
    assert_eq!(wild.page.shares(wild.slot), bounded);
    assert_eq!(one.page.shares(one.slot), ASKED);
    assert!(change(&arbiter, &good).is_ok(), "it is still there");
    assert_eq!(one.page.shares(one.slot).weight, 5);
}

/// A thread of root's may ask as another user; who is no root cannot test this, and `changes` has the rule by itself.
#[test]
fn another_user_is_refused() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not root: the rule is tested in arbiter/src/permission.rs alone");
        return;
    }
    let arbiter = Arbiter::start(directory("other-user"));
    for dir in [arbiter.dir.as_path(), arbiter.dir.parent().unwrap()] {
        assert!(dir.metadata().unwrap().permissions().mode() & 0o001 != 0, "{}", dir.display());
    }
    let (one, owner) = client(&arbiter, ASKED);
    let edit = SharesUpdate { weight: Some(1000), ..SharesUpdate::default() };
    let wanted = Change::new(GPU.parse().unwrap(), one.slot, owner, edit);
    let as_stranger = || {
        const STRANGER: nix::libc::uid_t = 4321;
        // SAFETY: integers; the system call itself changes this thread alone, and it ends after its question.
        let changed = unsafe { nix::libc::syscall(nix::libc::SYS_setresuid, STRANGER, STRANGER, STRANGER) };
        assert_eq!(changed, 0);
        change_refused(change(&arbiter, &wanted))
    };
    let (status, text) = std::thread::scope(|scope| scope.spawn(as_stranger).join().unwrap());
    assert!(status == Status::Refused && text.contains("you are user 4321"), "{text}");
    assert_eq!(one.page.shares(one.slot), ASKED, "and nothing is changed");
    assert!(change(&arbiter, &wanted).is_ok(), "root may");
}
