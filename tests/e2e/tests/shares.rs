//! Weight, priority and memory limit of real processes: asked for in the environment or with `nvshare run`, changed
//! with `nvshare set` while they run, and told alike by everybody who is asked.

use nvshare::slot::SlotIndex;
use nvshare::snapshot::Snapshot;
use nvshare::{policy, record};
use nvshare_e2e::application::{Application, MIB, SUCCESS, gpu, node};
use nvshare_e2e::built;
use nvshare_test_support::Patience;
use nvshare_tools::node::{Node, SimulatedGpu};
use nvshare_tools::status::{self, Client};
use std::process::{Command, Output, Stdio};

/// After so long, a test has failed because something never happened. No verdict depends on it otherwise.
const TIMEOUT: Patience = Patience::seconds(60);

const POOL: u64 = 64 * MIB;
/// A context, in the simulated GPU of these tests.
const CONTEXT: u64 = 2 * MIB;
const OUT_OF_MEMORY: i32 = 2;

fn clients(node: &Node) -> Vec<Client> {
    status::read(node.dir()).unwrap().gpus.into_iter().flat_map(|gpu| gpu.clients).collect()
}

fn nvshare(node: &Node, arguments: &[&str]) -> Output {
    on_screen(node, arguments, None)
}

/// On a screen of so many columns, or without one.
fn on_screen(node: &Node, arguments: &[&str], columns: Option<&str>) -> Output {
    let mut command = Command::new(built("nvshare"));
    command.args(arguments).envs(node.environment()).env_remove("COLUMNS").stdin(Stdio::null());
    command.envs(columns.map(|columns| ("COLUMNS", columns))).output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// `nvshare set`, which must come off.
#[track_caller]
fn set(node: &Node, arguments: &[&str]) -> String {
    let output = nvshare(node, &[&["set"], arguments].concat());
    assert!(output.status.success(), "{arguments:?}: {}", said(&output));
    said(&output)
}

/// `nvshare set`, which must be refused.
#[track_caller]
fn refused(node: &Node, arguments: &[&str]) -> String {
    let output = nvshare(node, &[&["set"], arguments].concat());
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", said(&output));
    said(&output)
}

fn numbers(application: &mut Application, call: &str) -> Vec<u64> {
    let (code, said) = application.ask(call);
    assert_eq!(code, SUCCESS, "{call}");
    said.split_whitespace().map(|word| word.parse().unwrap()).collect()
}

/// All four ways to ask say that there is so much, and that so much of it is free: once the arbiter has seen the context.
#[track_caller]
fn told(application: &mut Application, total: u64, free: u64) {
    TIMEOUT.until("the context counts", || numbers(application, "info") == [free, total]);
    assert_eq!(numbers(application, "total 0"), [total]);
    assert_eq!(numbers(application, "nvml 0"), [total, free, total - free]);
    assert_eq!(numbers(application, "nvml2 0 2"), [total, 0, free, total - free]);
}

fn started(node: &Node, variables: &[(&str, &str)]) -> Application {
    let mut application = Application::start(node.environment(), variables);
    application.does("init");
    application.does("create");
    application
}

#[test]
fn the_page_has_what_the_environment_asks_for() {
    let gpu = gpu();
    let node = node(&gpu);
    let usual = started(&node, &[("NVSHARE_CLIENT_NAME", "usual")]);
    let variables = [
        ("NVSHARE_CLIENT_NAME", "asks"),
        ("NVSHARE_WEIGHT", "300"),
        ("NVSHARE_PRIORITY", "high"),
        ("NVSHARE_MEMORY_LIMIT", "25%"),
        ("NVSHARE_COMPUTE_LIMIT", "30%"),
    ];
    let asks = started(&node, &variables);
    let shares = |client: &Client| {
        (client.weight, client.priority.clone(), client.memory_limit_bytes, client.memory_limit.clone())
    };
    let [first, second] = &clients(&node)[..] else { panic!("two clients") };
    assert_eq!(shares(first), (100, "normal".into(), None, None));
    assert_eq!(shares(second), (300, "high".into(), Some(16 * MIB), Some("25%".into())));

    // People see it below the table, and see nothing of it where all is as usual.
    let shown = said(&nvshare(&node, &["status"]));
    let unusual: Vec<_> = shown.lines().filter(|line| line.contains("weight")).collect();
    let right = format!("  slot 1 (pid {}): weight 300, priority high, at most 16.00 MiB (25%)", second.pid);
    assert_eq!(unusual, [right], "{shown}");
    // Where they differ, each is told what it has of the GPU's time.
    let times: Vec<_> = shown.lines().filter(|line| line.contains("of the GPU's time lately")).collect();
    assert!(times.len() == 2 && times[1].contains("lately (at most 30%), 0 s in all"), "{shown}");
    assert_eq!((first.compute_limit, second.compute_limit), (None, Some(0.3)));
    asks.end();
    TIMEOUT.until("it is gone", || clients(&node).len() == 1);
    let shown = said(&nvshare(&node, &["status"]));
    assert!(shown.contains("usual") && !shown.contains("weight"), "{shown}");
    usual.end();
}

/// Also the longest that a line on a client's shares can be.
#[test]
fn what_status_says_fits_80_columns_and_uses_more_where_there_are_more() {
    let gpu = SimulatedGpu::new(&[("MEMORY", "16GiB".into())]).unwrap();
    let node = Node::start(gpu.environment(&[]), &["--capacity", "9GiB"].map(str::to_owned)).unwrap();
    let variables =
        [("NVSHARE_WEIGHT", "1000"), ("NVSHARE_PRIORITY", "high"), ("NVSHARE_MEMORY_LIMIT", "12.3456%")];
    let application = started(&node, &variables);
    let shown = said(&nvshare(&node, &["status"]));
    let line = shown.lines().find(|line| line.contains("weight 1000")).expect("its shares");
    assert!(line.contains("(12.3456%)") && line.len() <= 80, "{line}");
    for (columns, parts) in [("80", 2), ("200", 1)] {
        let shown = said(&on_screen(&node, &["status"], Some(columns)));
        let width: usize = columns.parse().unwrap();
        assert!(shown.lines().all(|line| line.chars().count() <= width), "{shown}");
        assert_eq!(
            shown.lines().filter(|line| line.trim_start().starts_with("slot  ")).count(),
            parts,
            "{shown}"
        );
        for title in ["pid", "phase", "on GPU", "context", "slices", "out"] {
            assert!(shown.contains(title), "{title}: {shown}");
        }
    }
    application.end();
}

#[test]
fn run_passes_the_flags_on() {
    let gpu = gpu();
    let node = node(&gpu);
    let script = "echo $NVSHARE_WEIGHT $NVSHARE_PRIORITY $NVSHARE_MEMORY_LIMIT $NVSHARE_COMPUTE_LIMIT";
    let flags = ["--weight", "7", "--priority", "low", "--memory-limit", "12.5%", "--compute-limit", "30%"];
    let output = nvshare(&node, &[&["run"], &flags[..], &["--", "sh", "-c", script]].concat());
    assert_eq!(String::from_utf8_lossy(&output.stdout), "7 low 12.5% 30%\n", "{}", said(&output));
    let output = nvshare(&node, &["run", "--", "sh", "-c", script]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "\n", "{}", said(&output));
}

#[test]
fn out_of_memory_comes_at_the_limit_and_everybody_tells_it() {
    const LIMIT: u64 = 32 * MIB;
    let gpu = gpu();
    let node = node(&gpu);
    let mut one = Application::start(node.environment(), &[("NVSHARE_MEMORY_LIMIT", "32MiB")]);
    one.does("init");
    // Before it has a context it is told the same.
    assert_eq!(numbers(&mut one, "total 0"), [LIMIT]);
    assert_eq!(numbers(&mut one, "nvml 0"), [LIMIT, LIMIT, 0]);
    one.does("create");
    told(&mut one, LIMIT, LIMIT - CONTEXT);

    let first = one.alloc(20 * MIB);
    told(&mut one, LIMIT, LIMIT - CONTEXT - 20 * MIB);
    // Not a granule more, by whatever call; and all that is left, to the last byte.
    let left = LIMIT - CONTEXT - 20 * MIB;
    for call in [format!("alloc {}", left + 1), format!("object {} 0 0", left + 2 * MIB)] {
        assert_eq!(one.call(&call), OUT_OF_MEMORY, "{call}");
    }
    let second = one.alloc(left);
    told(&mut one, LIMIT, 0);
    assert_eq!(one.call("alloc 1"), OUT_OF_MEMORY);
    one.writes(first, 20 * MIB, 1);
    one.writes(second, left, 2);
    one.sees(first, 20 * MIB, 1);

    // Another client is not limited by it, and sees nothing of it.
    let mut two = Application::ready(&node);
    let its = two.alloc(POOL - 2 * CONTEXT);
    two.writes(its, POOL - 2 * CONTEXT, 3);
    one.sees(second, left, 2);
    two.end();

    one.does(&format!("free {first}"));
    TIMEOUT.until("the other is gone", || clients(&node).len() == 1);
    told(&mut one, LIMIT, 20 * MIB);
    one.works();
    one.ends_having_said(&[
        "2.00 MiB is refused",
        "has 30.00 MiB",
        "memory limit is 32.00 MiB",
        "NVSHARE_MEMORY_LIMIT",
    ]);
}

/// Memory that only the driver can place, and memory in a stream's order, are the application's too.
#[test]
fn every_kind_of_memory_counts_against_the_limit() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut one = started(&node, &[("NVSHARE_MEMORY_LIMIT", "50%")]);
    told(&mut one, POOL / 2, POOL / 2 - CONTEXT);
    let kept = one.alloc(20 * MIB);
    for call in [format!("managed {}", 12 * MIB), format!("array {}", 12 * MIB)] {
        assert_eq!(one.call(&call), OUT_OF_MEMORY, "{call}");
    }
    assert_eq!(one.call(&format!("alloc-async {} 0", 12 * MIB)), OUT_OF_MEMORY);
    let managed = one.number(&format!("managed {}", 6 * MIB));
    told(&mut one, POOL / 2, 4 * MIB);
    assert_eq!(one.call(&format!("alloc {}", 6 * MIB)), OUT_OF_MEMORY);
    one.does(&format!("free {managed}"));
    one.does(&format!("free {kept}"));
    told(&mut one, POOL / 2, POOL / 2 - CONTEXT);
    let log = one.end();
    let named = |what: &str| {
        log.lines().any(|line| line.contains(what) && line.contains("32.00 MiB (50% of the pool)"))
    };
    assert!(
        named("an allocation of 12.00 MiB") && named("a stream-ordered allocation of 12.00 MiB"),
        "{log}"
    );
}

/// Threads that allocate at once do not each have what is left.
#[test]
fn the_limit_is_one_for_all_threads() {
    const LIMIT: u64 = 32 * MIB;
    let gpu = gpu();
    let node = node(&gpu);
    for _ in 0..10 {
        let mut one = started(&node, &[("NVSHARE_MEMORY_LIMIT", "32MiB")]);
        told(&mut one, LIMIT, LIMIT - CONTEXT);
        assert_eq!(one.number(&format!("race-objects 16 {} 0", 4 * MIB)), (LIMIT - CONTEXT) / (4 * MIB));
        told(&mut one, LIMIT, 2 * MIB);
        one.end();
    }
}

#[test]
fn a_running_process_sees_the_change_at_once() {
    let gpu = gpu();
    let node = node(&gpu);
    let mut one = started(&node, &[("NVSHARE_CLIENT_NAME", "job")]);
    told(&mut one, POOL, POOL - CONTEXT);
    let data = one.alloc(30 * MIB);
    one.writes(data, 30 * MIB, 5);

    let words = set(&node, &["job", "--memory-limit", "40MiB", "--weight", "300", "--priority", "low"]);
    assert!(words.contains("weight 300, priority low, memory limit 40.00 MiB"), "{words}");
    assert!(
        words.contains("(was: weight 100, priority normal, memory limit none, compute limit none)"),
        "{words}"
    );
    let client = clients(&node).remove(0);
    assert_eq!((client.weight, client.priority.as_str()), (300, "low"));
    told(&mut one, 40 * MIB, 8 * MIB);
    assert_eq!(one.call(&format!("alloc {}", 8 * MIB + 1)), OUT_OF_MEMORY);

    // Below what it has: it keeps that, and gets no more until it has less.
    set(&node, &["job", "--memory-limit", "10MiB"]);
    told(&mut one, 10 * MIB, 0);
    assert_eq!(one.call("alloc 1"), OUT_OF_MEMORY);
    one.sees(data, 30 * MIB, 5);
    assert_eq!(clients(&node)[0].demand_bytes, 30 * MIB);
    one.does(&format!("free {data}"));
    told(&mut one, 10 * MIB, 8 * MIB);
    one.works();

    // What is not named stays as it is.
    set(&node, &["job", "--memory-limit", "none"]);
    told(&mut one, POOL, POOL - CONTEXT);
    assert_eq!(clients(&node)[0].weight, 300);
    one.works();
    one.end();
}

#[test]
fn a_client_goes_by_pid_slot_or_name_and_no_guess_is_made() {
    let gpu = gpu();
    let node = node(&gpu);
    let one = started(&node, &[("NVSHARE_CLIENT_NAME", "train")]);
    let two = started(&node, &[("NVSHARE_CLIENT_NAME", "train")]);
    let three = started(&node, &[("NVSHARE_CLIENT_NAME", "1")]);
    let listed = clients(&node);
    let weights = || clients(&node).iter().map(|client| client.weight).collect::<Vec<_>>();
    let pid = listed[1].pid.to_string();

    set(&node, &[&pid, "--weight", "2"]);
    set(&node, &["0", "--weight", "1"]);
    set(&node, &["name:1", "--weight", "3"]);
    assert_eq!(weights(), [1, 2, 3]);
    set(&node, &["slot:1", "--weight", "20"]);
    set(&node, &[&format!("pid:{}", listed[0].pid), "--weight", "10"]);
    assert_eq!(weights(), [10, 20, 3]);

    // Two of a name, and a number that is one's slot and another's name.
    for (whom, candidates) in [("train", [0, 1]), ("1", [1, 2])] {
        let words = refused(&node, &[whom, "--weight", "50"]);
        for slot in candidates {
            let candidate = format!("slot:{slot} on {}, pid:{}", gpu_of(&node), listed[slot].pid);
            assert!(words.contains(&candidate), "{whom}: {words}");
        }
    }
    let elsewhere = "GPU-00000000-0000-0000-0000-000000000099";
    for arguments in [&["nobody"][..], &["slot:40"], &["pid:1"], &["0", "--gpu", elsewhere]] {
        let words = refused(&node, &[arguments, &["--weight", "50"]].concat());
        assert!(words.contains(&format!("'{}' is no client", arguments[0])), "{words}");
    }
    assert!(refused(&node, &["slot:x", "--weight", "5"]).contains("'slot:x'"));
    assert_eq!(weights(), [10, 20, 3], "nothing was guessed");
    set(&node, &["0", "--gpu", &gpu_of(&node), "--priority", "high"]);
    assert_eq!(clients(&node)[0].priority, "high");
    for application in [one, two, three] {
        application.end();
    }
}

/// The one that waits is told, reckons anew, and stands behind the other or before it.
#[test]
fn a_change_of_priority_counts_for_a_turn_that_is_waited_for() {
    let gpu = gpu();
    // Nobody's deadline comes while this runs but that of who is to be next.
    let options = ["--capacity", "64MiB", "--quantum", "100s"].map(str::to_owned);
    let node = Node::start(gpu.environment(&[]), &options).unwrap();
    let mut jobs: Vec<_> = (0..3).map(|_| started(&node, &[])).collect();
    let data: Vec<_> = jobs.iter_mut().map(|job| job.alloc(40 * MIB)).collect();
    let write = |index: usize| format!("write {} {} {index}", data[index], 40 * MIB);
    // Whoever has it keeps it, and the others queue one after the other.
    jobs[0].does(&write(0));
    jobs[0].stop();
    for index in [1, 2] {
        jobs[index].tell(&write(index));
        TIMEOUT.until("it waits", || clients(&node)[index].phase == "waiting");
    }
    let page = record::open_page(node.dir(), gpu_of(&node).parse().unwrap()).unwrap();
    let next = || policy::first_waiter(&Snapshot::take(&page, page.admitted())).map(SlotIndex::get);
    for (priority, first) in [("low", 2), ("high", 1), ("low", 2)] {
        set(&node, &["slot:1", "--priority", priority]);
        TIMEOUT.until(&format!("slot 1 is {priority}, and slot {first} next"), || next() == Some(first));
    }
    jobs[0].go_on();
    for index in [1, 2] {
        assert_eq!(jobs[index].answer(&write(index)).0, SUCCESS);
    }
    for (index, mut job) in jobs.into_iter().enumerate() {
        job.sees(data[index], 40 * MIB, index as u64);
        job.end();
    }
}

fn gpu_of(node: &Node) -> String {
    status::read(node.dir()).unwrap().gpus.remove(0).uuid
}

#[test]
fn without_an_arbiter_nothing_is_changed_and_that_is_said() {
    let gpu = gpu();
    let node = node(&gpu);
    let one = started(&node, &[("NVSHARE_CLIENT_NAME", "job")]);
    let arbiter = nix::unistd::Pid::from_raw(node.arbiter_pid() as i32);
    nix::sys::signal::kill(arbiter, nix::sys::signal::Signal::SIGKILL).unwrap();
    TIMEOUT.until("the arbiter is gone", || !nvshare_tools::node::answers(node.dir()));
    let words = refused(&node, &["job", "--weight", "5"]);
    assert!(words.contains("no arbiter answers"), "{words}");
    assert_eq!(clients(&node)[0].weight, 100);
    one.end();
}
