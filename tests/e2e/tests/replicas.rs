//! Processes that hold the same data hand GPU memory to each other instead of copying it from host memory (NVSHARE_REPLICAS).

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, send, socket};
use nvshare_e2e::application::books::{Competitor, balances, client, clients};
use nvshare_e2e::application::{Application, MIB, node, quick_gpu};
use nvshare_test_support::{Dice, Patience};
use nvshare_tools::node::Node;
use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

const TIMEOUT: Patience = Patience::seconds(60);

const GRANULE: u64 = 2 * MIB;

/// Bytes of an allocation, which is one chunk.
const PIECE: u64 = 4 * GRANULE;

/// Allocations of a replica: 40 MiB, of which one and a half fit beside two contexts in a pool of 64 MiB.
const PIECES: u64 = 5;

/// Data that several processes hold: the seed of each piece.
type Model = Vec<u64>;

fn model() -> Model {
    (1..=PIECES).collect()
}

/// A member of a group, and where its pieces are.
struct Replica {
    application: Application,
    pieces: Vec<u64>,
}

impl Replica {
    /// With this data on the GPU.
    fn start(node: &Node, variables: &[(&str, &str)], model: &Model) -> Self {
        let mut application = Application::start(node.environment(), variables);
        application.does("init");
        application.does("create 0");
        let pieces: Vec<_> = model.iter().map(|_| application.alloc(PIECE)).collect();
        let mut replica = Self { application, pieces };
        replica.loads(model);
        replica
    }

    fn of(node: &Node, group: &str, model: &Model) -> Self {
        Self::start(node, &[("NVSHARE_REPLICAS", group)], model)
    }

    fn loads(&mut self, model: &Model) {
        for (piece, seed) in self.pieces.iter().zip(model) {
            self.application.writes(*piece, PIECE, *seed);
        }
    }

    /// It has its turn, and all of its data is right.
    #[track_caller]
    fn sees(&mut self, model: &Model) {
        for (piece, seed) in self.pieces.iter().zip(model) {
            self.application.sees(*piece, PIECE, *seed);
        }
    }

    fn moved(&self, node: &Node) -> Moved {
        let client = client(node, &self.application);
        Moved {
            copied_in: client.bytes_in,
            copied_out: client.bytes_out,
            handed: client.bytes_handed_over,
            taken: client.bytes_taken_over,
            missing: client.demand_bytes - client.resident_bytes,
        }
    }
}

/// Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Moved {
    copied_in: u64,
    copied_out: u64,
    handed: u64,
    taken: u64,
    /// Not on the GPU now.
    missing: u64,
}

#[test]
fn what_a_replica_has_on_the_gpu_is_never_copied_in() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let model = model();
    let mut replicas = [(); 2].map(|()| Replica::of(&node, "model", &model));
    for turn in 0..8 {
        let [next, other] = if turn % 2 == 0 { [0, 1] } else { [1, 0] };
        let (before, giver) = (replicas[next].moved(&node), replicas[other].moved(&node));
        assert!(before.missing > 0, "it has to come in");
        replicas[next].sees(&model);
        let (after, gave) = (replicas[next].moved(&node), replicas[other].moved(&node));
        assert_eq!(after.taken - before.taken, before.missing, "turn {turn}: {before:?} {after:?} {gave:?}");
        assert_eq!(gave.handed - giver.handed, before.missing, "turn {turn}: {giver:?} {gave:?}");
        assert_eq!((after.copied_in, gave.copied_in), (0, 0), "turn {turn}");
    }
    for replica in &replicas {
        let moved = replica.moved(&node);
        assert!(moved.copied_out <= PIECES * PIECE, "each piece goes out once at most: {moved:?}");
    }
    for mut replica in replicas {
        replica.sees(&model);
        replica.application.ends_well();
    }
    balances(&node);
}

/// The driver does not export memory that was imported.
#[test]
fn memory_that_came_from_a_replica_can_be_opened_by_others() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let mut replicas = two(&node, [OF_A_GROUP; 2]);
    replicas[0].sees(&model());
    assert!(replicas[0].moved(&node).taken > 0);
    let mut user = Application::ready(&node);
    for at in 0..replicas[0].pieces.len() {
        let piece = replicas[0].pieces[at];
        let opened = user.open(&replicas[0].application.export(piece));
        user.sees(opened, PIECE, model()[at]);
        user.close(opened);
    }
    user.ends_well();
    for replica in replicas {
        replica.application.ends_well();
    }
    balances(&node);
}

/// Two replicas that have each been out, so that each has a copy in host memory of all that was.
fn two(node: &Node, groups: [&[(&str, &str)]; 2]) -> [Replica; 2] {
    let model = model();
    let mut replicas = groups.map(|variables| Replica::start(node, variables, &model));
    for turn in 0..4 {
        replicas[turn % 2].sees(&model);
    }
    replicas
}

const OF_A_GROUP: &[(&str, &str)] = &[("NVSHARE_REPLICAS", "model")];

#[test]
fn processes_of_different_groups_hand_nothing_to_each_other() {
    let gpu = quick_gpu();
    for other in [&[("NVSHARE_REPLICAS", "another")][..], &[], &[("NVSHARE_REPLICAS", "")]] {
        let node = node(&gpu);
        let replicas = two(&node, [OF_A_GROUP, other]);
        for replica in replicas {
            let moved = replica.moved(&node);
            assert_eq!((moved.handed, moved.taken), (0, 0), "{other:?}");
            assert!(moved.copied_in > 0, "{other:?}");
            replica.application.ends_well();
        }
        balances(&node);
    }
}

/// One that keeps no copies has nothing to hand over, and says so.
#[test]
fn replicas_that_keep_no_copies_are_none() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let without = [("NVSHARE_REPLICAS", "model"), ("NVSHARE_KEEP_COPIES", "off")];
    let [one, other] = two(&node, [OF_A_GROUP, &without]);
    assert_eq!(other.moved(&node).taken + one.moved(&node).taken, 0);
    one.application.ends_well();
    other.application.ends_having_said(&["NVSHARE_REPLICAS=model", "NVSHARE_KEEP_COPIES=off"]);
    balances(&node);
}

/// Each changes a word of its own in each turn: that piece is copied, and the others are handed over.
#[test]
fn what_differs_is_copied_and_each_keeps_its_own() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let model = model();
    let mut replicas = two(&node, [OF_A_GROUP; 2]);
    let own = |replica: &Replica| replica.pieces[2] + 3 * GRANULE - 8;
    let before = [0, 1].map(|which| replicas[which].moved(&node));
    for turn in 0..8 {
        let which = turn % 2;
        let seed = 1000 + which as u64;
        let replica = &mut replicas[which];
        if turn >= 2 {
            replica.application.sees(own(replica), 8, seed);
        }
        replica.application.writes(replica.pieces[2], PIECE, model[2]);
        replica.sees(&model);
        replica.application.writes(own(replica), 8, seed);
    }
    let after = [0, 1].map(|which| replicas[which].moved(&node));
    for which in [0, 1] {
        let [taken, copied] =
            [after[which].taken - before[which].taken, after[which].copied_in - before[which].copied_in];
        assert!(taken > 0, "{before:?} {after:?}");
        assert!(copied <= 4 * PIECE, "more than the piece that differs: {before:?} {after:?}");
    }
    for (which, mut replica) in replicas.into_iter().enumerate() {
        let at = own(&replica);
        replica.application.sees(at, 8, 1000 + which as u64);
        replica.application.writes(replica.pieces[2], PIECE, model[2]);
        replica.sees(&model);
        replica.application.ends_well();
    }
    balances(&node);
}

#[test]
fn three_replicas_hand_round_what_two_of_them_have_on_the_gpu() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let model = model();
    let mut replicas = [(); 3].map(|()| Replica::of(&node, "model", &model));
    for _ in 0..4 {
        for replica in &mut replicas {
            replica.sees(&model);
        }
    }
    let moved = [0, 1, 2].map(|which: usize| replicas[which].moved(&node));
    let sum = |read: fn(&Moved) -> u64| moved.iter().map(read).sum::<u64>();
    assert_eq!(sum(|moved| moved.handed), sum(|moved| moved.taken), "nothing was lost under way: {moved:?}");
    assert!(moved.iter().all(|moved| moved.taken > 0), "{moved:?}");
    for replica in replicas {
        replica.application.ends_well();
    }
    balances(&node);
}

/// What is freed, and what another client needs, is as without replicas.
#[test]
fn a_replica_that_ends_or_frees_leaves_the_other_with_its_data() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let model = model();
    let [mut one, mut other] = two(&node, [OF_A_GROUP; 2]);
    // Memory that was handed over is freed by the one that has it now.
    let (address, seed) = (one.pieces.remove(1), model[1]);
    one.application.sees(address, PIECE, seed);
    one.application.does(&format!("free {address}"));
    other.sees(&model);
    let left: Vec<_> = model.iter().copied().filter(|seed| *seed != model[1]).collect();
    one.sees(&left);
    one.application.ends_well();
    let mut competitor = Competitor::start(&node);
    for _ in 0..2 {
        competitor.takes_all(&node, &other.application);
        other.sees(&model);
    }
    competitor.ends();
    other.application.ends_well();
    balances(&node);
}

/// Killed at moments of chance, most of them in the middle of a switch: the other one has its data, and the books balance.
#[test]
fn a_replica_that_is_killed_takes_nothing_from_the_other() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let model = model();
    let mut dice = Dice::from_environment(11);
    let mut stays = Replica::of(&node, "model", &model);
    let mut handed = 0;
    for round in 0..12 {
        let mut dies = Replica::of(&node, "model", &model);
        for _ in 0..3 {
            stays.sees(&model);
            dies.sees(&model);
        }
        // Either it gives, because the other one has its turn, or it takes.
        if round % 2 == 0 {
            stays.application.tell(&format!("check {} {PIECE} {}", stays.pieces[0], model[0]));
        } else {
            stays.sees(&model);
            dies.application.tell(&format!("check {} {PIECE} {}", dies.pieces[0], model[0]));
        }
        (0..dice.below(2_000)).for_each(|_| std::thread::yield_now());
        dies.application.kill();
        if round % 2 == 0 {
            assert_eq!(stays.application.answer("check"), (0, "right".into()));
        }
        stays.sees(&model);
        TIMEOUT.until("the dead one is reaped", || clients(&node).len() == 1);
        handed += stays.moved(&node).handed;
    }
    assert!(handed > 0, "nothing was ever handed over");
    stays.application.ends_well();
    balances(&node);
}

/// Stopped at moments of chance, in the middle of giving or of taking, for longer than the other one waits for it: both go on with
/// their data.
#[test]
fn a_replica_that_is_stopped_for_a_while_loses_nothing() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let model = model();
    let mut dice = Dice::from_environment(17);
    let mut replicas = two(&node, [OF_A_GROUP; 2]);
    for round in 0..8 {
        let [taker, giver] = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        replicas[giver].sees(&model);
        let call = format!("check {} {PIECE} {}", replicas[taker].pieces[4], model[4]);
        replicas[taker].application.tell(&call);
        let stopped = [taker, giver][dice.below(2) as usize];
        (0..dice.below(2_000)).for_each(|_| std::thread::yield_now());
        replicas[stopped].application.stop();
        // Not to wait for something: whether the other one gives up meanwhile is chance, as when it is stopped.
        std::thread::sleep(Duration::from_millis(dice.below(2) * 700));
        replicas[stopped].application.go_on();
        assert_eq!(replicas[taker].application.answer(&call), (0, "right".into()));
        replicas[taker].sees(&model);
    }
    for mut replica in replicas {
        replica.sees(&model);
        replica.application.ends_well();
    }
    balances(&node);
}

/// A child of a fork has none of the parent's sockets and memory.
#[test]
fn a_child_keeps_nothing_of_what_was_handed_over() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let model = model();
    let [mut one, mut other] = two(&node, [OF_A_GROUP; 2]);
    one.application.does("fork");
    let sockets = inodes(&one);
    let pid = one.application.pid();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let child: i32 = children.trim().parse().unwrap();
    assert!(has_one_of(pid.as_raw(), &sockets), "the parent has none of {sockets:?}");
    TIMEOUT.until("the child has closed its copies", || !has_one_of(child, &sockets));
    other.sees(&model);
    one.sees(&model);
    one.application.kill();
    TIMEOUT.until("the dead one is reaped, although its child lives", || clients(&node).len() == 1);
    other.sees(&model);
    drop(one);
    other.application.ends_well();
    balances(&node);
}

/// The names of the sockets on which replicas of this process listen.
fn sockets(replica: &Replica) -> Vec<String> {
    let pid = format!("-{}-", replica.application.pid());
    let all = std::fs::read_to_string("/proc/net/unix").unwrap();
    let names = all.lines().filter_map(|line| line.split('@').nth(1));
    let of_process = |name: &&str| name.starts_with("nvshare-replica-") && name.contains(&pid);
    // Once for the listener, and once for each connection.
    names.filter(of_process).map(str::to_owned).collect::<BTreeSet<_>>().into_iter().collect()
}

/// The inodes of the sockets with these names: the listener's, and those of connections to it.
fn inodes(replica: &Replica) -> Vec<String> {
    let names = sockets(replica);
    let all = std::fs::read_to_string("/proc/net/unix").unwrap();
    let ours = all.lines().filter(|line| names.iter().any(|name| line.ends_with(name)));
    ours.map(|line| format!("socket:[{}]", line.split_whitespace().nth(6).unwrap())).collect()
}

/// Whether a process has one of some sockets open.
fn has_one_of(pid: i32, sockets: &[String]) -> bool {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    fds.filter_map(|fd| std::fs::read_link(fd.path()).ok())
        .any(|link| sockets.iter().any(|socket| link.to_str() == Some(socket)))
}

fn connected(name: &str) -> OwnedFd {
    let ours = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    connect(ours.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes()).unwrap()).unwrap();
    ours
}

#[test]
fn garbage_on_the_socket_disturbs_nobody() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let model = model();
    let mut dice = Dice::from_environment(5);
    let [mut one, mut other] = two(&node, [OF_A_GROUP; 2]);
    let names = sockets(&one);
    assert_eq!(names.len(), 1, "{names:?}");
    let before = one.moved(&node).taken + other.moved(&node).taken;
    let mut silent = Vec::new();
    for _ in 0..40 {
        let stranger = connected(&names[0]);
        let bytes: Vec<u8> = (0..dice.below(300)).map(|_| dice.below(256) as u8).collect();
        // It may have hung up already.
        let _ = send(stranger.as_raw_fd(), &bytes, nix::sys::socket::MsgFlags::MSG_NOSIGNAL);
        silent.push(connected(&names[0]));
    }
    for _ in 0..2 {
        one.sees(&model);
        other.sees(&model);
    }
    assert!(one.moved(&node).taken + other.moved(&node).taken > before, "they hand on");
    drop(silent);
    one.application.ends_having_said(&["that no replica of this process sends"]);
    other.application.ends_well();
    balances(&node);
}

/// The driver of a replica fails when memory is exported, or imported: it is copied.
#[test]
fn memory_that_cannot_change_hands_is_copied() {
    let gpu = quick_gpu();
    for fails in ["cuMemExportToShareableHandle:1000", "cuMemImportFromShareableHandle:1000:2"] {
        let node = node(&gpu);
        let failing = [("NVSHARE_REPLICAS", "model"), ("NVSHARE_SIM_FAIL", fails)];
        let replicas = two(&node, [&failing; 2]);
        for replica in replicas {
            let moved = replica.moved(&node);
            assert!(moved.taken == 0 && moved.copied_in > 0, "{fails}: {moved:?}");
            replica.application.ends_well();
        }
        balances(&node);
    }
}

/// One whose memory changes on its way: the other one sees that before its application does.
#[test]
fn memory_that_holds_something_else_than_was_said_is_copied() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let model = model();
    let spoiled = [("NVSHARE_REPLICAS", "model"), ("NVSHARE_SIM_SPOIL_IMPORTS", "1")];
    let [mut sound, mut other] = two(&node, [OF_A_GROUP, &spoiled]);
    let taken = other.moved(&node).taken;
    assert!(taken > 0, "nothing was handed over");
    for _ in 0..2 {
        sound.sees(&model);
        other.sees(&model);
    }
    assert_eq!(other.moved(&node).taken, taken, "it takes nothing any more");
    sound.application.ends_well();
    other.application.ends_having_said(&["hold something else than they said", "copied from host memory"]);
    balances(&node);
}
