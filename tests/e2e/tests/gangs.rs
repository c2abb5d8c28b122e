//! Jobs whose ranks are processes that wait for each other on the GPU, several of them on the same simulated GPUs, where no two
//! fit together: all get on, and their data is right.
//!
//! The programs know nothing of nvshare (`tests/programs/ranks.c`), and their collectives are those of a stand-in for NCCL.

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use nvshare_e2e::application::{self, Application, MIB};
use nvshare_e2e::ranks::{Job, Rank, Shape, TIMEOUT, all_get_on, all_take_turns, job, machine, machine_with};
use nvshare_test_support::{Dice, program_with_nccl};
use nvshare_tools::node::Node;
use nvshare_tools::status::{self, Client};
use std::os::unix::process::ExitStatusExt;

/// The exit status of a rank that has lost another one.
const LOST: i32 = 5;

#[test]
fn two_jobs_of_two_ranks() {
    all_take_turns(2, &[job(&[0, 1]), job(&[0, 1])]);
}

#[test]
fn three_jobs_whose_ranks_are_in_another_order() {
    all_take_turns(2, &[job(&[0, 1]), job(&[1, 0]), job(&[0, 1])]);
}

/// Those that are behind catch up with those that are ahead, so that a slice's end takes one try.
#[test]
fn ranks_that_launch_far_ahead_of_each_other() {
    let ahead = Shape { ahead: 64, variables: vec![("LATE_US", "3000".into())], ..job(&[0, 1]) };
    let (slices, retries) = all_take_turns(2, &[ahead.clone(), ahead]);
    assert!(4 * retries < slices, "{retries} drains were tried again, of {slices}");
}

#[test]
fn one_process_with_both_gpus_beside_a_gang() {
    let alone = Shape { ranks: vec![vec![1, 0]], ..job(&[]) };
    all_take_turns(2, &[job(&[0, 1]), alone]);
}

#[test]
fn those_that_use_one_gpu_beside_a_gang() {
    all_take_turns(2, &[job(&[0, 1]), job(&[0]), job(&[1])]);
}

#[test]
fn gangs_on_overlapping_gpus() {
    all_take_turns(3, &[job(&[0, 1]), job(&[1, 2]), job(&[2, 0])]);
}

#[test]
fn ranks_that_find_nccl_at_run_time() {
    let at_run_time = Shape { variables: vec![("NCCL_AT_RUN_TIME", "1".into())], ..job(&[0, 1]) };
    all_take_turns(2, &[at_run_time.clone(), at_run_time]);
}

/// A program that has NCCL inside it, which nobody sees.
fn named(name: &str) -> Shape {
    let gang = format!("{name}:2");
    Shape {
        program: program_with_nccl("ranks", true),
        variables: vec![("NVSHARE_GANG", gang)],
        ..job(&[0, 1])
    }
}

#[test]
fn gangs_that_are_named() {
    all_take_turns(2, &[named("first"), named("second")]);
}

#[test]
fn whoever_shares_a_communicator_is_one_gang_and_others_are_not() {
    let machine = machine(2);
    let small = Shape { mib: 4, ..job(&[0, 1]) };
    let (first, second) = (Job::start(&machine, "first", &small), Job::start(&machine, "second", &small));
    let alone = Job::start(&machine, "alone", &Shape { mib: 4, ..job(&[0]) });
    let all = [&first, &second, &alone];
    TIMEOUT.until("all jobs are ready", || all.iter().all(|job| job.is_ready()));
    let clients = machine.clients();
    let gang = |rank: &Rank| clients.iter().find(|client| client.pid == rank.process.id()).unwrap().gang;
    let gangs = |job: &Job| job.ranks.iter().map(gang).collect::<Vec<_>>();
    assert!(gangs(&first)[0].is_some() && gangs(&first)[0] == gangs(&first)[1], "{clients:?}");
    assert!(gangs(&second)[0].is_some() && gangs(&second)[0] == gangs(&second)[1], "{clients:?}");
    assert_ne!(gangs(&first), gangs(&second));
    assert_eq!(gangs(&alone), [None]);
    [first, second, alone].into_iter().for_each(Job::ends_well);
    machine.balances();
}

#[test]
fn a_rank_that_is_killed_leaves_the_others_what_nccl_gives_them_and_other_jobs_go_on() {
    let machine = machine(2);
    let (mut first, second) =
        (Job::start(&machine, "first", &job(&[0, 1])), Job::start(&machine, "second", &job(&[0, 1])));
    all_get_on(&[&first, &second]);
    first.ranks[1].process.kill().unwrap();
    assert_eq!(first.ended(1).signal(), Some(9));
    assert_eq!(first.ended(0).code(), Some(LOST));
    let third = Job::start(&machine, "third", &job(&[0, 1]));
    all_get_on(&[&second, &third]);
    [second, third].into_iter().for_each(Job::ends_well);
    machine.balances();
}

/// A rank is stopped while its job waits for its turn: a job that needs only the GPU of the other rank goes on, and when the rank
/// goes on, its job does too. If it is the first rank, its GPU comes first in the order of GPUs; if it is the second one, last.
fn nobody_else_waits_for_a_stopped_rank(rank: usize) {
    let machine = machine_with(2, "ascending", &[]);
    let first = Job::start(&machine, "first", &job(&[0, 1]));
    let alone = Job::start(&machine, "alone", &job(&[1 - rank as u32]));
    all_get_on(&[&first, &alone]);
    let stopped = Pid::from_raw(first.ranks[rank].process.id() as i32);
    let waits = || {
        let clients = machine.clients();
        let of_first = |client: &&Client| first.ranks.iter().any(|rank| rank.process.id() == client.pid);
        clients.iter().filter(of_first).all(|client| ["idle", "waiting"].contains(&client.phase.as_str()))
    };
    TIMEOUT.until("the rank is stopped between two turns", || {
        kill(stopped, Signal::SIGSTOP).unwrap();
        let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        let status = waitid(Id::Pid(stopped), flags).unwrap();
        assert!(matches!(status, WaitStatus::Stopped(..)), "{status:?}");
        waits() || {
            kill(stopped, Signal::SIGCONT).unwrap();
            false
        }
    });
    all_get_on(&[&alone]);
    all_get_on(&[&alone]);
    kill(stopped, Signal::SIGCONT).unwrap();
    all_get_on(&[&first, &alone]);
    [first, alone].into_iter().for_each(Job::ends_well);
    machine.balances();
}

#[test]
fn nobody_else_waits_for_the_first_rank_if_it_is_stopped() {
    nobody_else_waits_for_a_stopped_rank(0);
}

#[test]
fn nobody_else_waits_for_the_second_rank_if_it_is_stopped() {
    nobody_else_waits_for_a_stopped_rank(1);
}

/// The gangs of the clients of the first GPU, by slot.
fn gangs(node: &Node) -> Vec<Option<u64>> {
    let clients = status::read(node.dir()).unwrap().gpus.remove(0).clients;
    clients.iter().map(|client| client.gang).collect()
}

/// Two processes that have memory of each other open may wait for each other's kernels; one that only opens another's does not.
#[test]
fn processes_that_have_memory_of_each_other_open_are_a_gang() {
    let gpu = application::gpu();
    let node = application::node(&gpu);
    let [mut first, mut second, mut third] = [(); 3].map(|()| Application::ready(&node));
    let gangs = || gangs(&node);
    let [one, two] = [&mut first, &mut second].map(|application| {
        let address = application.alloc(2 * MIB);
        application.export(address)
    });
    third.open(&one);
    let of_first = second.open(&one);
    assert_eq!(gangs(), [None; 3], "the first one has opened nothing");
    first.open(&two);
    assert!(gangs()[0].is_some() && gangs()[0] == gangs()[1], "{:?}", gangs());
    assert_eq!(gangs()[2], None);
    second.close(of_first);
    [first, second, third].into_iter().for_each(|application| _ = application.ends_well());
}

/// Memory that `from` has made to be exported: the descriptor comes to `to`, which imports it.
fn pass(from: &mut Application, to: &mut Application) {
    let object = from.number(&format!("object {} 0 1", 2 * MIB));
    let descriptor = from.number(&format!("export-object {object}"));
    let pid = to.number("mailbox");
    from.does(&format!("post {descriptor} {pid}"));
    let came = to.number("collect");
    to.number(&format!("import-object {came}"));
}

/// The same for memory that the application exports itself and whose descriptors it passes itself: nvshare sees neither socket nor
/// message.
#[test]
fn processes_that_have_imported_descriptors_of_each_other_are_a_gang() {
    let gpu = application::gpu();
    let node = application::node(&gpu);
    let [mut first, mut second, mut third] = [(); 3].map(|()| Application::ready(&node));
    let gangs = || gangs(&node);
    pass(&mut first, &mut second);
    pass(&mut first, &mut third);
    assert_eq!(gangs(), [None; 3], "the first one has imported nothing");
    pass(&mut second, &mut first);
    assert!(gangs()[0].is_some() && gangs()[0] == gangs()[1], "{:?}", gangs());
    assert_eq!(gangs()[2], None);
    // The third one's memory comes to another than the one whose memory it has.
    pass(&mut third, &mut second);
    assert_eq!(gangs()[2], None);
    // What a process exports and imports itself makes it no gang.
    let object = third.number(&format!("object {} 0 1", 2 * MIB));
    let own = third.number(&format!("export-object {object}"));
    third.number(&format!("import-object {own}"));
    assert_eq!(gangs()[2], None);
    pass(&mut third, &mut first);
    assert_eq!(
        gangs()[2],
        gangs()[0],
        "those who wait for one that waits for a third may wait for that one too"
    );
    [first, second, third].into_iter().for_each(|application| _ = application.ends_well());
}

/// Two processes that say that they wait for each other, and do not fit together on their GPU: they are told, and take turns as
/// strangers do. (These do not really wait, or they could not run at all.)
#[test]
fn processes_of_a_gang_that_do_not_fit_on_their_gpu_together_take_turns() {
    let gang = || vec![("NVSHARE_GANG", "together:2".to_owned())];
    let one = Shape { variables: gang(), ..job(&[0]) };
    all_take_turns(1, &[one.clone(), one]);
}

/// Ranks on one GPU that fit there run together beside a job that does not fit beside them.
#[test]
fn two_ranks_on_one_gpu() {
    let pair = Shape { mib: 24, ..job(&[0, 0]) };
    all_take_turns(1, &[pair.clone(), pair]);
}

#[test]
fn the_next_arbiter_knows_the_gangs() {
    let machine = machine(2);
    let (first, second) =
        (Job::start(&machine, "first", &job(&[0, 1])), Job::start(&machine, "second", &job(&[0, 1])));
    all_get_on(&[&first, &second]);
    machine.next_arbiter();
    let in_gangs = || machine.clients().iter().filter(|client| client.gang.is_some()).count();
    TIMEOUT.until("the new arbiter knows both gangs", || in_gangs() == 4);
    all_get_on(&[&first, &second]);
    [first, second].into_iter().for_each(Job::ends_well);
    machine.balances();
}

/// Jobs as they begin: ranks that fit beside each other's, until each has allocated its largest block.
fn training(variables: &[(&'static str, &str)]) -> Shape {
    Shape {
        mib: 32,
        ahead: 3,
        program: program_with_nccl("trainer", false),
        variables: variables.iter().map(|(name, value)| (*name, (*value).to_owned())).collect(),
        ..job(&[0, 1])
    }
}

/// On each GPU another job came first, and so keeps the GPU when both have allocated more than fits: a rank of each job waits for
/// memory, and its other rank is to give way.
#[test]
fn two_jobs_that_grow_and_of_which_each_is_the_first_on_one_gpu() {
    let machine = machine(2);
    let first = training(&[("AFTER", "second"), ("AFTER_RANK", "1")]);
    let second = training(&[("AFTER", "first"), ("AFTER_RANK", "0")]);
    let jobs = [("first", first), ("second", second)].map(|(name, shape)| Job::start(&machine, name, &shape));
    all_get_on(&[&jobs[0], &jobs[1]]);
    jobs.into_iter().for_each(Job::ends_well);
    machine.balances();
}

/// With a driver that waits for all work of a context when it loads a module, and holds its lock meanwhile: the rank's engine cannot
/// do anything before the other rank has submitted what the work waits for.
#[test]
fn a_rank_that_waits_in_the_driver_for_what_the_other_one_submits() {
    let machine = machine(2);
    let shape = training(&[("LOADS", "1"), ("NVSHARE_SIM_LOADS_WAIT", "1")]);
    let jobs = ["first", "second"].map(|name| Job::start(&machine, name, &shape));
    all_get_on(&[&jobs[0], &jobs[1]]);
    jobs.into_iter().for_each(Job::ends_well);
    machine.balances();
}

/// Three jobs that allocate, copy, load modules and make communicators while their collectives are in flight, each in its own order
/// of ranks and at its own pace.
#[test]
fn three_jobs_that_grow_while_collectives_are_in_flight() {
    let mut dice = Dice::from_environment(3);
    for _ in 0..4 {
        let machine = machine(2);
        let jobs = ["first", "second", "third"].map(|name| {
            let seed = dice.below(1000).to_string();
            let gpus = if dice.below(3) == 0 { [1, 0] } else { [0, 1] };
            let shape = training(&[("SEED", &seed), ("NVSHARE_SIM_LOADS_WAIT", "1")]);
            Job::start(&machine, name, &Shape { ranks: gpus.map(|gpu| vec![gpu]).to_vec(), ..shape })
        });
        let all = jobs.each_ref();
        TIMEOUT.until("all jobs are ready", || all.iter().all(|job| job.is_ready()));
        jobs.into_iter().for_each(Job::ends_well);
        machine.balances();
    }
}
