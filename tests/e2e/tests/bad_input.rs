//! What an application under the shim does wrong, or finds wrong: it gets the CUDA error that the driver would give,
//! the log says what was wrong with which value and what would be right, and the application goes on to its own end.
//!
//! The application is `nvshare-test-calls`, which makes the calls that a test names, one at a time.

use nix::sys::socket::{AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr};
use nix::sys::socket::{accept4, bind, listen, recv, socket};
use nvshare::map::{self, MappedPage, scribble};
use nvshare::page::{LAYOUT_VERSION, PAGE_BYTES};
use nvshare::release::RELEASE;
use nvshare::scm_rights;
use nvshare::sealed;
use nvshare::slot::{SLOTS, SlotIndex};
use nvshare::wire::{Hello, Reply};
use nvshare::{GpuUuid, paths};
use nvshare_e2e::application::{Application, INVALID_VALUE, MIB, SUCCESS, gpu, node};
use nvshare_tools::node::{Environment, Node, SimulatedGpu, TempDir};
use nvshare_tools::status;
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

const OUT_OF_MEMORY: i32 = 2;
const INVALID_CONTEXT: i32 = 201;
const SYSTEM_NOT_READY: i32 = 802;

fn uuid(node: &Node) -> String {
    status::read(node.dir()).unwrap().gpus.remove(0).uuid.to_string()
}

// --- Settings -----------------------------------------------------------------------------------

#[test]
fn a_setting_that_makes_no_sense_is_named_and_cuinit_fails() {
    let gpu = gpu();
    let node = node(&gpu);
    for (name, value, right) in [
        ("NVSHARE_CONNECT_TIMEOUT", "soon", "seconds"),
        ("NVSHARE_CONNECT_TIMEOUT", "-1", "seconds"),
        ("NVSHARE_CONNECT_TIMEOUT", "1e99", "seconds"),
        ("NVSHARE_ON_MISSING_ARBITER", "maybe", "fail or passthrough"),
        ("NVSHARE_HOST_MEMORY", "lots", "64GiB"),
        ("NVSHARE_HOST_MEMORY", "99999999999TiB", "64GiB"),
        ("NVSHARE_DISABLE", "yes", "write 1"),
        ("NVSHARE_WEIGHT", "1001", "1 to 1000"),
        ("NVSHARE_WEIGHT", "heavy", "whole number"),
        ("NVSHARE_PRIORITY", "urgent", "low, normal or high"),
        ("NVSHARE_MEMORY_LIMIT", "lots", "8GiB"),
        ("NVSHARE_MEMORY_LIMIT", "101%", "25%"),
        ("NVSHARE_MEMORY_LIMIT", "0", "2MiB or more"),
    ] {
        let mut application = Application::start(node.environment(), &[(name, value)]);
        assert_eq!(application.call("init"), INVALID_VALUE, "{name}={value}");
        application.ends_having_said(&[&format!("{name}='{value}'"), right, "cuInit"]);
    }
}

#[test]
fn a_setting_that_is_no_text_is_refused_and_not_overlooked() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut environment = node.environment();
    environment.push(("NVSHARE_HOST_MEMORY".into(), OsString::from_vec(b"1\xffGiB".to_vec())));
    let mut application = Application::start(environment, &[]);
    assert_eq!(application.call("init"), INVALID_VALUE);
    application.ends_having_said(&["NVSHARE_HOST_MEMORY='1\u{fffd}GiB'", "64GiB"]);
}

#[test]
fn a_log_level_that_is_none_is_told_and_the_log_still_warns() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut application = Application::start(node.environment(), &[("NVSHARE_LOG", "chatty")]);
    assert_eq!((application.call("init"), application.call("create")), (SUCCESS, SUCCESS));
    assert_eq!(application.call("free 12345"), INVALID_VALUE);
    application.works();
    let said = application.end();
    assert!(said.contains("NVSHARE_LOG='chatty'") && said.contains("set it to error, warn"), "{said}");
    assert!(said.contains("cuMemFree"), "the warning is lost: {said}");
}

#[test]
fn a_name_may_be_anything() {
    let gpu = gpu();
    let node = node(&gpu);
    let long = "x".repeat(4096);
    for name in ["", "two words", "line\nbreak", &long] {
        let mut application = Application::start(node.environment(), &[("NVSHARE_CLIENT_NAME", name)]);
        assert_eq!((application.call("init"), application.call("create")), (SUCCESS, SUCCESS));
        application.works();
        application.end();
    }
}

// --- Allocations --------------------------------------------------------------------------------

#[test]
fn an_allocation_of_nothing_is_refused() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut application = Application::ready(&node);
    assert_eq!(application.call("alloc 0"), INVALID_VALUE);
    assert_eq!(application.call("pitch 0 4 4"), INVALID_VALUE);
    assert_eq!(application.call("pitch 4 0 4"), INVALID_VALUE);
    assert_eq!(application.call("pitch 4 4 3"), INVALID_VALUE);
    application.works();
    application.ends_having_said(&["0 B", &uuid(&node), "ask for"]);
}

#[test]
fn an_allocation_that_overflows_is_refused() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut application = Application::ready(&node);
    for bytes in [u64::MAX, u64::MAX - 4095, 1 << 63, 1 << 41] {
        assert_eq!(application.call(&format!("alloc {bytes}")), OUT_OF_MEMORY, "{bytes}");
    }
    // A row that cannot be rounded up makes no sense to the driver.
    assert_eq!(application.call(&format!("pitch {} 1 4", u64::MAX)), INVALID_VALUE);
    // What wraps to nothing is nothing to the driver.
    assert_eq!(application.call(&format!("pitch {} {} 4", 1u64 << 33, 1u64 << 33)), INVALID_VALUE);
    application.works();
    application.ends_having_said(&["cuMemAllocPitch", "8589934592 rows of 8589934592 B", &uuid(&node)]);
}

#[test]
fn more_than_the_gpu_has_is_refused() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut application = Application::ready(&node);
    let kept = application.alloc(8 * MIB);
    assert_eq!(application.call(&format!("write {kept} {} 3", 8 * MIB)), SUCCESS);
    assert_eq!(application.call(&format!("alloc {}", 64 * MIB)), OUT_OF_MEMORY);
    application.works();
    assert_eq!(application.ask(&format!("check {kept} {} 3", 8 * MIB)), (SUCCESS, "right".into()));
    application.ends_having_said(&[
        "64.00 MiB is refused",
        "has 8.00 MiB",
        "pool has 64.00 MiB",
        &uuid(&node),
    ]);
}

#[test]
fn more_than_the_host_memory_allowed_is_refused() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut application = Application::start(node.environment(), &[("NVSHARE_HOST_MEMORY", "8MiB")]);
    assert_eq!((application.call("init"), application.call("create")), (SUCCESS, SUCCESS));
    assert_eq!(application.call(&format!("alloc {}", 16 * MIB)), OUT_OF_MEMORY);
    application.works();
    application.ends_having_said(&["16.00 MiB", "NVSHARE_HOST_MEMORY=8.00 MiB", &uuid(&node)]);
}

#[test]
fn freeing_what_was_never_allocated_is_refused() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut application = Application::ready(&node);
    assert_eq!(application.call("free 0"), SUCCESS, "as the driver has it");
    assert_eq!(application.call("free 3735928559"), INVALID_VALUE);
    assert_eq!(application.call(&format!("free {}", u64::MAX)), INVALID_VALUE);
    let address = application.alloc(4 * MIB);
    assert_eq!(application.call(&format!("free {}", address + 512)), INVALID_VALUE);
    assert_eq!(application.call(&format!("write {address} {} 5", 4 * MIB)), SUCCESS, "it is still there");
    application.works();
    let inside = format!("cuMemFree({:#x})", address + 512);
    let client = application.client();
    let said = application.end();
    for parts in
        [["cuMemFree(0xdeadbeef)", "never made"], [&inside, &format!("at {address:#x}; free that address")]]
    {
        let named = |line: &str| line.contains(&client) && parts.iter().all(|part| line.contains(part));
        assert!(said.lines().any(named), "{parts:?}: {said}");
    }
}

#[test]
fn freeing_twice_is_refused() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut application = Application::ready(&node);
    // A large one, and a small one whose slab others keep alive.
    let (large, small, _other) = (application.alloc(4 * MIB), application.alloc(100), application.alloc(100));
    for address in [large, small] {
        assert_eq!(application.call(&format!("free {address}")), SUCCESS);
        assert_eq!(application.call(&format!("free {address}")), INVALID_VALUE);
    }
    application.works();
    application.ends_having_said(&[&format!("cuMemFree({small:#x})"), "freed already"]);
}

#[test]
fn without_a_context_the_driver_answers() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut application = Application::start(node.environment(), &[]);
    assert_eq!(application.call("init"), SUCCESS);
    assert_eq!(application.call("alloc 4096"), INVALID_CONTEXT);
    assert_eq!(application.call("create"), SUCCESS);
    application.works();
    application.end();
}

// --- The arbiter --------------------------------------------------------------------------------

/// The environment of a client of whoever listens in `dir`.
fn client_of(dir: &Path, gpu: &SimulatedGpu) -> Environment {
    let mut environment = gpu.environment(&[]);
    environment.push(("LD_PRELOAD".into(), nvshare_tools::node::shim().unwrap().into()));
    environment.push((paths::RUNTIME_DIR.into(), dir.into()));
    environment
}

#[test]
fn without_an_arbiter_cuinit_fails() {
    let (gpu, dir) = (gpu(), TempDir::new().unwrap());
    let quick = [("NVSHARE_CONNECT_TIMEOUT", "0.05")];
    let mut application = Application::start(client_of(dir.path(), &gpu), &quick);
    assert_eq!(application.call("init"), SYSTEM_NOT_READY);
    let socket = paths::socket(dir.path());
    application.ends_having_said(&["no arbiter answers", socket.to_str().unwrap(), "Start nvshare-arbiter"]);
}

#[test]
fn without_an_arbiter_who_asked_for_it_goes_on() {
    let (gpu, dir) = (gpu(), TempDir::new().unwrap());
    let settings = [("NVSHARE_CONNECT_TIMEOUT", "0"), ("NVSHARE_ON_MISSING_ARBITER", "passthrough")];
    let mut application = Application::start(client_of(dir.path(), &gpu), &settings);
    assert_eq!((application.call("init"), application.call("create")), (SUCCESS, SUCCESS));
    application.works();
    application.ends_having_said(&["no arbiter answers", "passthrough"]);
}

#[test]
fn a_gpu_that_the_arbiter_does_not_serve_is_named() {
    let (served, other) = (gpu(), gpu());
    let node = node(&served);
    let mut application = Application::start(client_of(node.dir(), &other), &[]);
    assert_eq!(application.call("init"), SUCCESS);
    assert_eq!(application.call("create"), SYSTEM_NOT_READY);
    assert_eq!(application.call("retain"), SYSTEM_NOT_READY, "and again, not something worse");
    application.ends_having_said(&["no GPU GPU-", "is served here", &format!("there is {}", uuid(&node))]);
}

#[test]
fn one_more_than_there_are_slots_is_refused() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut clients: Vec<_> = (0..SLOTS).map(|_| Application::ready(&node)).collect();
    let mut late = Application::start(node.environment(), &[]);
    assert_eq!(late.call("init"), SUCCESS);
    assert_eq!(late.call("create"), SYSTEM_NOT_READY);
    // A slot that becomes free is the late one's: it tries again and works.
    clients.pop().unwrap().end();
    while status::read(node.dir()).unwrap().gpus[0].clients.len() == SLOTS {
        std::thread::yield_now();
    }
    assert_eq!(late.call("create"), SUCCESS);
    late.works();
    let slots = format!("all {SLOTS} slots");
    late.ends_having_said(&[&slots, &uuid(&node), "end a client first"]);
    clients.into_iter().for_each(|client| drop(client.end()));
}

/// Answers every hello as a test wishes.
fn fake_arbiter(dir: &Path, answer: impl Fn(&Hello) -> (Vec<u8>, Option<File>) + Send + 'static) {
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(&paths::socket(dir)).unwrap()).unwrap();
    listen(&listener, Backlog::new(8).unwrap()).unwrap();
    std::thread::spawn(move || {
        while let Ok(fd) = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            // SAFETY: just accepted, and nobody else's.
            let client = unsafe { OwnedFd::from_raw_fd(fd) };
            let mut bytes = vec![0; 1024];
            let length = recv(client.as_raw_fd(), &mut bytes, MsgFlags::empty()).unwrap_or(0);
            // cuInit only looks whether somebody is there.
            if let Ok(hello) = Hello::read(&bytes[..length]) {
                let (reply, page) = answer(&hello);
                if !reply.is_empty() {
                    let page: Vec<_> = page.iter().map(File::as_fd).collect();
                    let _ = scm_rights::send(client.as_fd(), &reply, &page);
                }
            }
        }
    });
}

/// An application whose arbiter answers so: no context is to be had, and the log says why.
fn answered(
    answer: impl Fn(&Hello) -> (Vec<u8>, Option<File>) + Send + 'static,
    why: &[&str],
    settings: &[(&str, &str)],
) {
    let (gpu, dir) = (gpu(), TempDir::new().unwrap());
    fake_arbiter(dir.path(), answer);
    let mut application = Application::start(client_of(dir.path(), &gpu), settings);
    assert_eq!(application.call("init"), SUCCESS);
    assert_eq!(application.call("create"), SYSTEM_NOT_READY, "{why:?}");
    let socket = paths::socket(dir.path());
    application.ends_having_said(&[why, &[socket.to_str().unwrap()]].concat());
}

fn welcome() -> Reply {
    Reply::welcome(SlotIndex::new(0).unwrap())
}

fn bytes(reply: &Reply) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(reply.magic.to_le_bytes());
    for word in [reply.layout_version, reply.status, reply.slot, reply.reserved] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(reply.text);
    bytes
}

#[test]
fn a_socket_that_answers_nonsense_is_no_arbiter() {
    let good = bytes(&welcome());
    let long = [&good[..], b"!"].concat();
    let random: Vec<u8> = (0..good.len()).map(|at| (at * 131 + 17) as u8).collect();
    let status = bytes(&Reply { status: 77, ..welcome() });
    let slot = bytes(&Reply { slot: SLOTS as u32, ..welcome() });
    for (reply, why) in [
        (b"HTTP/1.1 400 Bad Request".to_vec(), "24 bytes"),
        (long, "281 bytes"),
        (random, "wrong magic"),
        (status, "unknown status 77"),
        (slot, "slot 48"),
        (good, "no page"),
    ] {
        let not_ours = "is not an nvshare arbiter of this release";
        answered(move |_| (reply.clone(), None), &[why, not_ours], &[]);
    }
}

/// An arbiter that ends before it has answered is asked again, or its successor is, until the time is over.
#[test]
fn an_arbiter_that_always_hangs_up_is_missing() {
    let patience = [("NVSHARE_CONNECT_TIMEOUT", "0.1")];
    answered(
        |_| (Vec::new(), None),
        &["no arbiter answers at", "ECONNRESET", "Start nvshare-arbiter"],
        &patience,
    );
}

#[test]
fn nonsense_is_no_missing_arbiter() {
    let passthrough = [("NVSHARE_ON_MISSING_ARBITER", "passthrough")];
    answered(|_| (b"?".to_vec(), None), &["1 bytes"], &passthrough);
}

/// A page as the arbiter makes it for this GPU, then changed.
fn page(gpu: [u8; 16], change: impl Fn(&MappedPage)) -> File {
    let (file, page) = map::create(GpuUuid(gpu), 32).unwrap();
    change(&page);
    file
}

/// Its version stands behind the magic.
const VERSION_AT: u64 = 8;

#[test]
fn a_page_of_another_layout_version_is_refused() {
    use std::os::unix::fs::FileExt;
    let other = |hello: &Hello| {
        let file = page(hello.gpu, |_| {});
        file.write_all_at(&(LAYOUT_VERSION + 1).to_le_bytes(), VERSION_AT).unwrap();
        (bytes(&welcome()), Some(file))
    };
    let theirs = format!("page layout {} and this program", LAYOUT_VERSION + 1);
    let ours = format!("nvshare {RELEASE}, has {LAYOUT_VERSION};");
    answered(other, &[&theirs, &ours, "for GPU-", "start this program again"], &[]);
}

#[test]
fn an_arbiter_of_another_layout_version_is_refused() {
    let refuse = |_: &Hello| {
        let why =
            "the client has page layout 1 and this arbiter, nvshare 9.9.9, has 9; start the program again";
        (bytes(&Reply::refuse(nvshare::wire::Status::LayoutVersion, why)), None)
    };
    let this = format!("this program has nvshare {RELEASE}");
    answered(refuse, &["page layout 1", "nvshare 9.9.9, has 9", "start the program again", &this], &[]);
}

#[test]
fn a_page_of_garbage_is_refused() {
    let garbage = |hello: &Hello| {
        (bytes(&welcome()), Some(page(hello.gpu, |page| scribble(page, &[0x6761_7262_6167_6521, u64::MAX]))))
    };
    answered(garbage, &["does not begin with nvshare's magic", "0x6761726261676521", "for GPU-"], &[]);
    let zeros = |hello: &Hello| (bytes(&welcome()), Some(page(hello.gpu, |page| scribble(page, &[0]))));
    answered(zeros, &["does not begin with nvshare's magic", "for GPU-"], &[]);
    let short = |_: &Hello| (bytes(&welcome()), Some(sealed::create("page", 100).unwrap()));
    answered(short, &["it has 100 bytes", "truncated", "for GPU-"], &[]);
    let anothers = |hello: &Hello| (bytes(&welcome()), Some(page(hello.gpu.map(|byte| !byte), |_| {})));
    answered(anothers, &["it sent the page of GPU-"], &[]);
    // One that it could shorten when it likes: whoever touched it then would be killed.
    let unsealed = |hello: &Hello| {
        let memory = nix::sys::memfd::memfd_create(c"page", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
        let file = File::from(memory);
        file.set_len(PAGE_BYTES as u64).unwrap();
        MappedPage::map(&file).unwrap().initialise(GpuUuid(hello.gpu), 32);
        (bytes(&welcome()), Some(file))
    };
    answered(unsealed, &["is not sealed", "for GPU-"], &[]);
}
