//! Real processes with data under the real shim are killed on the simulated GPU: a client in every phase of
//! the protocol, the arbiter in the middle of a switch, both at once, a client while no arbiter lives, an
//! arbiter while it takes over, and whoever it hits at random moments. The others finish with right data, the
//! books balance to the granule, and what the dead held is in the pool again.
//!
//! **How a phase is hit.** Seeing a client in a phase and killing it leaves it time to go on. So a client that
//! is seen in the wanted moment is stopped first, looked at again, and killed only if it stands there still:
//! it certainly died in that moment, and no verdict depends on who was faster.
//!
//! **How the books are read.** By this test itself and not by the arbiter's audit, which repairs what it
//! finds: granules count as held only if a process that lives holds them. The audit's own figures are then
//! held against it: nothing but an arbiter's death may ever give it something to repair.

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use nvshare::account::Account;
use nvshare::map::MappedPage;
use nvshare::page::Phase;
use nvshare::policy;
use nvshare::slot::{SLOTS, SlotIndex};
use nvshare::snapshot::Snapshot;
use nvshare::units::{GRANULE, GpuUuid, Granules};
use nvshare_e2e::built;
use nvshare_test_support::{Dice, Patience};
use nvshare_tools::node::{self, SimulatedGpu, TempDir};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Instant;

const TIMEOUT: Patience = Patience::seconds(60);

/// Rounds in a batch. At the end of each, everybody ends and the pool must be whole.
const ROUNDS: u32 = 30;
const BATCHES: u32 = 8;

/// Jobs that iterate, beside one that holds memory and does nothing until its batch ends.
const WORKERS: usize = 3;

/// The pool. Jobs have 12 to 20 MiB and a context of 2 MiB each, so never more than one or two fit.
const CAPACITY: u64 = 34 << 20;
const QUANTUM: &str = "3ms";

/// A client must have been killed so many times in each moment.
const EACH: u32 = 10;

/// Where in the protocol a client is killed: its phase, and what its memory does meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Moment {
    /// Idle, with memory that may be anywhere.
    Idle,
    /// Waiting, and not moving.
    Waiting,
    /// Filling, and not all is there.
    Filling,
    Running,
    Draining,
    Leaving,
    /// Idle or Waiting, part of its memory out, and it must move more out.
    Evicting,
}

const MOMENTS: [Moment; 7] = [
    Moment::Idle,
    Moment::Waiting,
    Moment::Filling,
    Moment::Running,
    Moment::Draining,
    Moment::Leaving,
    Moment::Evicting,
];

/// What happens in a round.
#[derive(Debug, Clone, Copy)]
enum Round {
    Client,
    Arbiter,
    Both,
    ClientWithoutArbiter,
    Chance,
}

/// As often as they happen; a batch is a whole number of these.
const DECK: [Round; 10] = [
    Round::Client,
    Round::Client,
    Round::Client,
    Round::Client,
    Round::Arbiter,
    Round::Both,
    Round::Both,
    Round::ClientWithoutArbiter,
    Round::Chance,
    Round::Chance,
];

impl Moment {
    fn is_now(self, page: &MappedPage, slot: SlotIndex) -> bool {
        let snapshot = Snapshot::take(page, page.admitted());
        let view = snapshot.view(slot);
        let partly = view.resident < view.demand;
        let evicts = policy::evict_share(&snapshot, slot) > 0;
        match self {
            Self::Idle => view.phase == Phase::Idle && view.demand > 0,
            Self::Waiting => view.phase == Phase::Waiting && !evicts,
            Self::Filling => view.phase == Phase::Filling && partly,
            Self::Running => view.phase == Phase::Running,
            Self::Draining => view.phase == Phase::Draining,
            Self::Leaving => view.phase == Phase::Leaving,
            Self::Evicting => {
                matches!(view.phase, Phase::Idle | Phase::Waiting) && evicts && partly && view.resident > 0
            }
        }
    }
}

/// A process that holds data on the GPU.
struct Client {
    child: Child,
    /// Closed to end its iterations; it begins with them at a line.
    input: Option<ChildStdin>,
    works: bool,
}

impl Client {
    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its slot. It may have one more that it does not know of, from an arbiter that was killed before it could
    /// tell: nothing is ever asked for in that one.
    fn slot(&self, page: &MappedPage) -> Option<SlotIndex> {
        let own = |slot: &SlotIndex| page.owner(*slot).is_some_and(|owner| owner.pid == self.pid());
        page.occupied().iter().filter(own).max_by_key(|slot| page.view(*slot).ticket)
    }

    /// Whether it has a slot and knows of it, or is about to hear of it: it goes on without an arbiter. One that was not
    /// told waits for the next arbiter, whatever the page says; its life file is free.
    fn goes_on_alone(&self, page: &MappedPage, dir: &Path) -> bool {
        let own =
            page.occupied().iter().filter(|slot| page.owner(*slot).is_some_and(|it| it.pid == self.pid()));
        own.into_iter().any(|slot| is_held(&nvshare::paths::life(dir, page.gpu(), slot)))
    }

    fn signal(&self, signal: Signal) {
        // It may have ended, and is not yet waited for, so its pid is nobody else's.
        kill(Pid::from_raw(self.pid() as i32), signal).unwrap();
    }

    /// Stops all its threads. False if it ended instead.
    fn stop(&self) -> bool {
        self.signal(Signal::SIGSTOP);
        let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        let status = waitid(Id::Pid(Pid::from_raw(self.pid() as i32)), flags).unwrap();
        matches!(status, WaitStatus::Stopped(..))
    }

    /// Kills it. False if it was faster and ended by itself.
    fn kill(&mut self) -> bool {
        self.child.kill().unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.signal() == Some(9) || status.success(), "it ended by itself with {status}");
        status.signal() == Some(9)
    }

    fn go(&mut self) {
        if let Some(input) = &mut self.input {
            // One that has just died says so by itself.
            let _ = input.write_all(b"go\n");
        }
    }
}

/// Whether a process holds the lock of a life file.
fn is_held(life: &Path) -> bool {
    let Ok(file) = File::options().read(true).write(true).open(life) else { return false };
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock)).unwrap();
    libc::c_int::from(lock.l_type) != libc::F_UNLCK
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whose a slot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Nobody,
    Living,
    Dead,
}

/// What a slot has.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    owner: Owner,
    account: Account,
    context: Granules,
    demand: Granules,
}

/// The books, word by word. Two looks that are the same saw one moment: accounts count their moves.
#[derive(Debug, PartialEq, Eq)]
struct Look {
    free: i32,
    rows: Vec<Row>,
}

/// What was seen, for the verdict at the end and for people.
#[derive(Debug, Default)]
struct ClientMetrics {
    moments: BTreeMap<Moment, u32>,
    clients: u32,
    arbiters: u32,
    /// Clients that died in a wanted moment while no arbiter lived.
    alone: u32,
    finished: u32,
    /// Repairs that audits made after an arbiter's death.
    repaired: u64,
}

struct Stage {
    dice: Dice,
    rounds: Vec<Round>,
    moments: Vec<Moment>,
    gpu: SimulatedGpu,
    arbiter: Option<Child>,
    dir: TempDir,
    page: MappedPage,
    clients: Vec<Client>,
    tally: ClientMetrics,
}

fn arbiter(gpu: &SimulatedGpu, dir: &Path) -> Child {
    let program = built("nvshare-arbiter");
    let mut command = Command::new(program);
    command
        .arg("--runtime-dir")
        .arg(dir)
        .args(["--capacity", &CAPACITY.to_string(), "--quantum", QUANTUM])
        .args(["--exit-when-idle", "--owner-pid", &std::process::id().to_string()])
        .envs(gpu.environment(&[]))
        .env("NVSHARE_LOG", std::env::var_os("NVSHARE_LOG").unwrap_or_else(|| "error".into()))
        .stdin(Stdio::null());
    command.spawn().unwrap()
}

fn answers(dir: &Path) {
    TIMEOUT.until("an arbiter answers", || node::answers(dir));
}

impl Drop for Stage {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let pids: Vec<_> = self.clients.iter().map(|client| (client.pid(), client.works)).collect();
            eprintln!("living clients, and whether they work: {pids:?}");
            eprintln!("admitted: {:?}, {:?}", self.page.admitted(), self.page.free());
            for details in self.page.occupied().iter().filter_map(|slot| self.page.details(slot)) {
                eprintln!("{details:?}");
            }
        }
        if let Some(arbiter) = &mut self.arbiter {
            let _ = arbiter.kill();
            let _ = arbiter.wait();
        }
    }
}

impl Stage {
    fn new(dice: Dice) -> Self {
        let set = |name: &'static str, value: &str| (name, value.to_owned());
        // Slow enough that a switch of a few MiB has a middle, fast enough for hundreds of them.
        let gpu = SimulatedGpu::new(&[
            set("MEMORY", "96MiB"),
            set("CONTEXT_BYTES", "2MiB"),
            set("LINK_BANDWIDTH", "2GiB"),
            set("DEVICE_BANDWIDTH", "8GiB"),
        ])
        .unwrap();
        let dir = TempDir::new().unwrap();
        let arbiter = arbiter(&gpu, dir.path());
        answers(dir.path());
        let (uuid, _) = nvshare::paths::pages(dir.path()).unwrap().remove(0);
        let page = nvshare::record::open_page(dir.path(), uuid).unwrap();
        assert_ne!(page.gpu(), GpuUuid([0; 16]));
        let mut stage = Self {
            dice,
            rounds: Vec::new(),
            moments: Vec::new(),
            gpu,
            arbiter: Some(arbiter),
            dir,
            page,
            clients: Vec::new(),
            tally: ClientMetrics::default(),
        };
        stage.recruit();
        stage
    }

    fn client(&mut self, works: bool) -> Client {
        let size = (12 + 2 * self.dice.below(5)) << 20;
        let iterations = if works { 1 + self.dice.below(12) } else { 3 };
        let mut command = Command::new(built("nvshare"));
        command
            .args(["internal", "job", "--controlled", "--buffers", "4"])
            .arg(format!("--size={size}"))
            .arg(format!("--iterations={iterations}"))
            .arg(format!("--seed={}", self.dice.below(1 << 24)))
            .envs(self.gpu.environment(&[]))
            .env("LD_PRELOAD", node::shim().unwrap())
            .env(nvshare::paths::RUNTIME_DIR, self.dir.path())
            // It may have to wait for the arbiter to come back, on a machine that is busy with other things.
            .env("NVSHARE_CONNECT_TIMEOUT", "60")
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        // SAFETY: prctl is a plain system call, allowed between fork and exec. Should the test be killed, its
        // jobs must not go on for ever.
        unsafe { command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?)) };
        let mut child = command.spawn().unwrap();
        let input = child.stdin.take();
        let mut client = Client { child, input, works };
        if works {
            client.go();
        }
        client
    }

    /// Takes away those who have ended, who must have found right data, and brings the crew up to strength.
    fn recruit(&mut self) {
        self.dismiss();
        while self.clients.iter().filter(|client| client.works).count() < WORKERS {
            let client = self.client(true);
            self.clients.push(client);
        }
        if self.clients.iter().all(|client| client.works) {
            let client = self.client(false);
            self.clients.push(client);
        }
    }

    fn dismiss(&mut self) {
        let mut index = 0;
        while index < self.clients.len() {
            match self.clients[index].child.try_wait().unwrap() {
                None => index += 1,
                Some(status) => {
                    assert!(
                        status.success(),
                        "a job that nobody killed ended with {status}: wrong data or a CUDA error"
                    );
                    self.clients.swap_remove(index);
                    self.tally.finished += 1;
                }
            }
        }
    }

    /// Waits until a client is in the moment that is next, and stops it there. The others go on, and come and go. `None` if
    /// no arbiter lives and those who were told of their slot have all ended: then it never comes.
    fn stop_one(&mut self) -> Option<usize> {
        let moment = self.dice.draw(&mut self.moments, &MOMENTS);
        let mut stopped = None;
        let mut looks = 0;
        TIMEOUT.until(&format!("a client is {moment:?}"), || {
            // Not at every look: system calls slow down those who are looked at.
            if looks % 64 == 0 {
                self.recruit();
            }
            looks += 1;
            stopped = (0..self.clients.len()).find(|index| {
                let client = &self.clients[*index];
                let Some(slot) = client.slot(&self.page).filter(|slot| moment.is_now(&self.page, *slot))
                else {
                    return false;
                };
                if !client.stop() {
                    return false;
                }
                // It had a moment to go on before the signal reached it.
                let there = client.slot(&self.page) == Some(slot) && moment.is_now(&self.page, slot);
                if !there {
                    client.signal(Signal::SIGCONT);
                }
                there
            });
            // Not at every look, either.
            let nobody = self.arbiter.is_none() && looks % 64 == 1 && {
                let alone = |it: &Client| it.works && it.goes_on_alone(&self.page, self.dir.path());
                !self.clients.iter().any(alone)
            };
            stopped.is_some() || nobody
        });
        let index = stopped?;
        *self.tally.moments.entry(moment).or_default() += 1;
        Some(index)
    }

    fn kill_client(&mut self, index: usize) -> u32 {
        let mut victim = self.clients.swap_remove(index);
        let pid = victim.pid();
        if victim.kill() {
            self.tally.clients += 1;
        } else {
            self.tally.finished += 1;
        }
        pid
    }

    fn kill_arbiter(&mut self) {
        let mut arbiter = self.arbiter.take().expect("one arbiter serves at a time");
        arbiter.kill().unwrap();
        let status = arbiter.wait().unwrap();
        assert_eq!(status.signal(), Some(9), "the arbiter ended by itself with {status}");
        self.tally.arbiters += 1;
    }

    /// Starts an arbiter on what is there; at times kills it while it takes over, and starts another.
    fn start_arbiter(&mut self) {
        // This one does not end before it is told to, so it must still be a client afterwards. Not in a slot of which no
        // arbiter lived to tell it: that one it asks for nothing in, and loses.
        let sleeper = self.clients.iter().find(|client| !client.works).map(Client::pid);
        let slots = |page: &MappedPage| {
            let slots = page.occupied().iter();
            let own = slots.filter(|slot| page.owner(*slot).map(|it| it.pid) == sleeper);
            own.filter(|slot| page.view(*slot).demand > 0).collect::<Vec<_>>()
        };
        let before = slots(&self.page);
        while self.dice.below(3) == 0 {
            self.arbiter = Some(arbiter(&self.gpu, self.dir.path()));
            self.dice.spin(30_000);
            self.kill_arbiter();
        }
        self.arbiter = Some(arbiter(&self.gpu, self.dir.path()));
        // It listens while it waits for a client to bring the page, and shows a page only when it serves.
        let (uuid, socket) = (self.page.gpu(), nvshare::paths::socket(self.dir.path()));
        nvshare::register::look(&socket, uuid, TIMEOUT.duration()).expect("an arbiter shows its page");
        // If all clients were dead, nobody had the old page any more, and there is another.
        self.page = nvshare::record::open_page(self.dir.path(), uuid).unwrap();
        let after = slots(&self.page);
        assert!(
            before.iter().all(|slot| after.contains(slot)),
            "a living client lost its slot in a take-over: it had {before:?} and has {after:?}"
        );
    }

    /// A client dies in a moment of the protocol.
    fn round_of_a_client(&mut self) -> Vec<u32> {
        let victim = self.stop_one().expect("an arbiter lives");
        vec![self.kill_client(victim)]
    }

    /// The arbiter dies in the middle of a switch, which must come to its end without it.
    fn round_of_the_arbiter(&mut self) -> Vec<u32> {
        let mut filler = None;
        TIMEOUT.until("a switch is half done", || {
            self.recruit();
            filler = self.clients.iter().find_map(|client| {
                let slot = client.slot(&self.page)?;
                // A turn that begins, and not one that goes on because the client has allocated more.
                let begins = self.page.details(slot).is_some_and(|it| it.wait_since != 0);
                (begins && Moment::Filling.is_now(&self.page, slot)).then_some((client.pid(), slot))
            });
            filler.is_some()
        });
        let (pid, slot) = filler.expect("until has seen it");
        let slices =
            |page: &MappedPage| page.details(slot).filter(|it| it.owner.pid == pid).map(|it| it.slices);
        let before = slices(&self.page);
        self.kill_arbiter();
        TIMEOUT.until("the switch is done without an arbiter", || {
            slices(&self.page) > before || slices(&self.page).is_none() || {
                // Nobody clears its slot now: a client that had time to end has had its turn.
                self.clients.iter_mut().any(|it| it.pid() == pid && it.child.try_wait().unwrap().is_some())
            }
        });
        self.start_arbiter();
        Vec::new()
    }

    /// A client dies in a moment, and the arbiter at the same time: before it, or while it reaps.
    fn round_of_both(&mut self) -> Vec<u32> {
        let victim = self.stop_one().expect("an arbiter lives");
        let pid = if self.dice.below(2) == 0 {
            let pid = self.kill_client(victim);
            self.dice.spin(300);
            self.kill_arbiter();
            pid
        } else {
            self.kill_arbiter();
            self.kill_client(victim)
        };
        self.start_arbiter();
        vec![pid]
    }

    /// A client dies in a moment while no arbiter lives, and one more at any. The next arbiter must find both.
    fn round_without_an_arbiter(&mut self) -> Vec<u32> {
        self.kill_arbiter();
        let mut dead: Vec<_> = self.stop_one().into_iter().map(|victim| self.kill_client(victim)).collect();
        self.tally.alone += dead.len() as u32;
        if self.dice.below(2) == 0 {
            let victim = self.dice.below(self.clients.len() as u64) as usize;
            dead.push(self.kill_client(victim));
        }
        self.start_arbiter();
        dead
    }

    /// Somebody dies, at a moment that nobody looked for.
    fn round_of_chance(&mut self) -> Vec<u32> {
        self.dice.spin(100_000);
        let who = self.dice.below(4);
        let (with_client, with_arbiter) = (who != 0, who <= 1);
        let mut pids = Vec::new();
        if with_client {
            let victim = self.dice.below(self.clients.len() as u64) as usize;
            pids.push(self.kill_client(victim));
        }
        if with_arbiter {
            self.kill_arbiter();
            self.start_arbiter();
        }
        pids
    }

    fn round(&mut self) {
        self.recruit();
        let (arbiters, repaired) = (self.tally.arbiters, self.page.audit_counts().1);
        let dead = match self.dice.draw(&mut self.rounds, &DECK) {
            Round::Client => self.round_of_a_client(),
            Round::Arbiter => self.round_of_the_arbiter(),
            Round::Both => self.round_of_both(),
            Round::ClientWithoutArbiter => self.round_without_an_arbiter(),
            Round::Chance => self.round_of_chance(),
        };
        for pid in dead {
            TIMEOUT.until("the dead one is reaped", || {
                self.page.occupied().iter().all(|slot| self.page.owner(slot).is_none_or(|it| it.pid != pid))
            });
        }
        self.balances();
        self.check_repairs(arbiters, repaired);
    }

    /// An arbiter may die between the two words that it changes when a context's size changes, and the next one
    /// finds the difference. Nothing else may ever make the books wrong.
    fn check_repairs(&mut self, arbiters_before: u32, repaired_before: u64) {
        let repaired = self.page.audit_counts().1.saturating_sub(repaired_before);
        let arbiters = self.tally.arbiters - arbiters_before;
        assert!(
            repaired <= u64::from(arbiters),
            "the audit had to repair the books {repaired} times, and {arbiters} arbiters were killed"
        );
        self.tally.repaired += repaired;
    }

    /// Every granule is free, or in the context or among the data of a process that lives; nobody has more than
    /// it asked for, but for memory that was freed a moment ago and goes within a second.
    fn balances(&mut self) {
        TIMEOUT.until("the books balance", || {
            let first = self.look();
            // Nothing can be said while granules are on the move.
            let quiet = first.rows.iter().all(|row| row.account.operation.is_none()) && self.look() == first;
            let keeps = |row: &Row| row.owner == Owner::Living && row.account.resident > row.demand;
            if quiet && !first.rows.iter().any(keeps) {
                for (index, row) in
                    first.rows.iter().enumerate().filter(|(_, row)| row.owner == Owner::Nobody)
                {
                    let held = row.account.resident + row.context;
                    assert_eq!(held, 0, "slot {index} is nobody's and holds granules: {row:?}");
                }
                let living = first.rows.iter().filter(|row| row.owner == Owner::Living);
                let held: u32 = living.map(|row| row.account.resident + row.context).sum();
                if i64::from(first.free) + i64::from(held) == (CAPACITY / GRANULE) as i64 {
                    return true;
                }
            }
            // Those who have ended by themselves are still to be reaped.
            self.recruit();
            false
        });
    }

    fn look(&self) -> Look {
        let row = |slot| {
            let owner = match self.page.owner(slot) {
                None => Owner::Nobody,
                Some(owner) if self.clients.iter().any(|client| client.pid() == owner.pid) => Owner::Living,
                Some(_) => Owner::Dead,
            };
            let view = self.page.view(slot);
            Row { owner, account: self.page.account(slot), context: view.context, demand: view.demand }
        };
        Look {
            free: self.page.free().granules,
            rows: (0..SLOTS).filter_map(SlotIndex::new).map(row).collect(),
        }
    }

    /// Nobody is left, and so nobody has anything.
    fn is_whole(&self) {
        TIMEOUT.until("all are reaped", || self.page.occupied().is_empty());
        for slot in (0..SLOTS).filter_map(SlotIndex::new) {
            let (view, account) = (self.page.view(slot), self.page.account(slot));
            assert_eq!(
                (view.resident, view.context, view.demand),
                (0, 0, 0),
                "slot {} keeps something",
                slot.get()
            );
            assert_eq!((view.phase, account.operation), (Phase::Idle, None), "slot {}", slot.get());
        }
        TIMEOUT.until("nobody is admitted", || self.page.admitted().is_empty());
        assert_eq!(self.page.free().granules, (CAPACITY / GRANULE) as i32, "a granule was lost");
    }

    /// All that live finish, and find their data.
    fn finish(&mut self) {
        for client in &mut self.clients {
            client.go();
        }
        TIMEOUT.until("all have ended", || {
            self.dismiss();
            self.clients.is_empty()
        });
        self.is_whole();
    }

    /// All die at once, the arbiter too.
    fn massacre(&mut self) {
        let arbiter_first = self.dice.below(2) == 0;
        if arbiter_first {
            self.kill_arbiter();
        }
        while !self.clients.is_empty() {
            self.kill_client(0);
        }
        if !arbiter_first {
            self.kill_arbiter();
        }
        self.start_arbiter();
        self.is_whole();
    }
}

#[test]
fn whoever_is_killed_in_whatever_phase_the_others_keep_their_data_and_no_granule_is_lost() {
    let mut stage = Stage::new(Dice::from_environment(nvshare::sync::now() | 1));
    for batch in 1..=BATCHES {
        let began = Instant::now();
        for _ in 0..ROUNDS {
            stage.round();
        }
        let (arbiters, repaired) = (stage.tally.arbiters, stage.page.audit_counts().1);
        stage.finish();
        stage.recruit();
        if batch % 2 == 0 {
            stage.dice.spin(100_000);
            stage.massacre();
        }
        stage.check_repairs(arbiters, repaired);
        println!("batch {batch}: {:.1} s, {:?}", began.elapsed().as_secs_f64(), stage.tally);
    }
    stage.finish();
    let tally = &stage.tally;
    for moment in MOMENTS {
        let hits = tally.moments.get(&moment).copied().unwrap_or(0);
        assert!(hits >= EACH, "only {hits} clients died {moment:?}, {EACH} must: {tally:?}");
    }
    assert!(tally.alone >= EACH, "too few clients died while no arbiter lived: {tally:?}");
    assert!(tally.finished >= ROUNDS, "too few jobs were left to end: {tally:?}");
}
