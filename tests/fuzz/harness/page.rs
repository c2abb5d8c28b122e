//! A sequence of operations on one page, with lies between them: bytes become the sequence.
//!
//! A step is ten bytes, `what`, `whom` and a 64-bit value, and nothing a fuzzer changes in one step moves
//! another: cutting, repeating and exchanging steps are the mutations that find something here. That is
//! why the bytes are cut up by hand and not by a crate; and so `tests/fuzz_inputs.rs` can run the same
//! sequences under a stable compiler without one.
//!
//! As long as no step has lied, the books must balance after every step, to the granule. After a lie the
//! numbers may be wrong, and everything must still end, stay within bounds and agree with itself.

use nvshare::audit::Audit;
use nvshare::client::{Next, NoMemory};
use nvshare::page::{Direction, Header, NAME_BYTES, Page, Phase, Quantum, Settings, Slot};
use nvshare::shares::{ComputeLimit, MemoryLimit, Priority, Shares};
use nvshare::slot::{Process, SLOTS, SlotIndex, SlotSet};
use nvshare::snapshot::Snapshot;
use nvshare::units::{GpuUuid, Granules, MAX_GRANULES, MILLISECOND};
use nvshare::usage::MAX_WEIGHT;
use nvshare::{Books, Client, Fill, Runtime, policy};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a step.
const STEP: usize = 10;

/// Steps of a sequence; a longer one finds nothing that this many do not.
const MOST_STEPS: usize = 400;

/// Granules in the pool at first.
const CAPACITY: Granules = 100;

/// Slots that lies and clients crowd in; the readers look at all.
const CROWDED: usize = 4;

/// Words of the header and of a row.
const HEADER_WORDS: usize = size_of::<Header>() / 8;
const ROW_WORDS: usize = size_of::<Slot>() / 8;

/// Values that sit at the edge of some field.
const EDGES: [u64; 16] = [
    0,
    1,
    u64::MAX,
    1 << 63,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 32,
    (1 << 48) - 1,
    0xffff << 48,
    MAX_GRANULES as u64,
    MAX_GRANULES as u64 + 1,
    // An account with a move in flight: announced, applied.
    1 << 62,
    1 << 63 | 0xfffff << 20,
    // A counter whose tag names slot 0, and one whose tag names nobody.
    5,
    0xff << 32 | 0x8000_0000,
];

/// Moves no memory, and does not wait: a fill that finds too little is an error, which the caller meets.
struct Impatient {
    books: Books<Arc<Page>>,
    steps: u32,
}

#[derive(Debug)]
struct Starved;

impl Impatient {
    /// One poll has no reason to ask for this much.
    fn count(&mut self) {
        self.steps += 1;
        assert!(self.steps < 10_000, "a poll that does not end");
    }
}

impl Runtime for Impatient {
    type Error = Starved;

    fn fill(&mut self) -> Result<Fill, Starved> {
        self.count();
        let missing = self.books.demand().saturating_sub(self.books.resident());
        if !self.books.admitted() {
            return Ok(Fill::Recalled);
        }
        if missing > 0 && self.books.try_take(missing).is_err() {
            return Err(Starved);
        }
        Ok(Fill::Complete)
    }

    fn evict(&mut self, granules: Granules) -> Result<(), Starved> {
        self.count();
        self.books.give(granules);
        Ok(())
    }
}

struct World {
    page: Arc<Page>,
    clients: [Option<Client<Arc<Page>>>; CROWDED],
    /// Nobody has lied yet.
    honest: bool,
}

/// Runs the sequence that the bytes are.
pub fn run(bytes: &[u8]) {
    let mut world = World {
        page: Page::on_heap(GpuUuid([3; 16]), CAPACITY).into(),
        clients: [const { None }; CROWDED],
        honest: true,
    };
    for step in bytes.chunks_exact(STEP).take(MOST_STEPS) {
        let value = u64::from_le_bytes(step[2..].try_into().expect("eight bytes"));
        world.step(step[0], step[1], value);
        if world.honest {
            assert_eq!(world.page.audit(), Audit::Balanced, "after step {step:?}");
        }
    }
    world.read_everything();
}

fn all_slots() -> impl Iterator<Item = SlotIndex> {
    (0..SLOTS).filter_map(SlotIndex::new)
}

impl World {
    fn step(&mut self, what: u8, whom: u8, value: u64) {
        let page = self.page.clone();
        let index = usize::from(whom) % CROWDED;
        let slot = SlotIndex::new(index).expect("few slots");
        let small = (value % 64) as Granules;
        let granules = value as Granules;
        match what % 32 {
            0 => self.lie(usize::from(whom) % HEADER_WORDS, value),
            1 => self.lie(usize::from(whom) % HEADER_WORDS, EDGES[value as usize % EDGES.len()]),
            2 => self.lie(HEADER_WORDS + usize::from(whom) % (CROWDED * ROW_WORDS), value),
            3 => self.lie(
                HEADER_WORDS + usize::from(whom) % (CROWDED * ROW_WORDS),
                EDGES[value as usize % EDGES.len()],
            ),
            4 => self.flip(usize::from(whom) % (HEADER_WORDS + CROWDED * ROW_WORDS), 1 << (value % 64)),
            5 => self.scribble(value),
            6 => self.read_everything(),
            7 | 8 => self.open(whom, value),
            9 => self.check_decision(&page.decide()),
            10 => self.check_audit(),
            11 => page.rebuild_occupied(),
            12 => {
                if page.owner(slot).is_some() {
                    self.clients[index] = None;
                    self.check_reap(slot);
                }
            }
            13 => {
                // For slots of nobody: what an arbiter does that finds a page of another's.
                if page.owner(slot).is_none() {
                    self.clients[index] = None;
                    page.close_account(slot);
                    assert_eq!(page.account(slot).operation, None);
                    assert_eq!(page.account(slot).resident, 0);
                }
            }
            14 => _ = page.set_context(slot, if whom & 0x80 == 0 { small } else { granules }),
            15 => {
                page.set_capacity(if whom & 0x80 == 0 { small * 4 } else { granules });
                self.check_decision(&page.decide());
            }
            16 => page.set_settings(settings(whom, value)),
            17 => {
                page.adopt(granules);
                page.beat(value);
                page.guess_bandwidth(value);
                page.set_shares(slot, shares(whom, value));
            }
            18 => page.ring(slot),
            19 => page.wait_doorbell(slot, page.doorbell(slot), Some(value.min(1))),
            _ => self.act(what, index, small, granules, value),
        }
    }

    /// A client does something.
    fn act(&mut self, what: u8, index: usize, small: Granules, granules: Granules, value: u64) {
        let Some(client) = &mut self.clients[index] else { return };
        let books = client.books().clone();
        match what % 32 {
            20 if value & 3 == 3 => client.withdraw(),
            20 => client.request(),
            21 | 22 => {
                let mut runtime = Impatient { books: books.clone(), steps: 0 };
                if let Ok(Next::Open) = client.poll(&mut runtime) {
                    assert_eq!(client.phase(), Phase::Running);
                    let view = self.page.view(client.books().slot());
                    assert!(!self.honest || view.missing() == 0, "runs without its memory (I2)");
                    // One in two waits for another GPU of its process first.
                    if value & 1 == 0 {
                        books.begin_slice();
                        books.renew_slice();
                    }
                }
            }
            23 => client.refill(),
            24 => {
                client.drain();
            }
            25 => client.drained(value & 1 == 1),
            26 => {
                // A client that grows shuts its gate first.
                client.refill();
                books.grow(small);
            }
            27 => books.shrink(small),
            28 => self.check_take(&books, if value >> 32 == 0 { small } else { granules }),
            29 => self.check_give(&books, granules),
            30 => {
                let direction = if value & 1 == 0 { Direction::In } else { Direction::Out };
                books.copied(direction, value, value.rotate_left(32));
                let _ = (client.should_yield(), client.awaited(), books.usable());
                // One that has no memory of its own, and is told to give some back.
                let _ = client.poll(&mut NoMemory);
            }
            31 => {
                if let Some(client) = self.clients[index].take() {
                    client.leave();
                    if self.honest {
                        assert_eq!(books.resident(), 0);
                    }
                }
            }
            _ => unreachable!("the world's own steps"),
        }
    }

    fn words(&self) -> &[AtomicU64] {
        let page = Arc::as_ptr(&self.page).cast::<AtomicU64>();
        // SAFETY: a page is a whole number of 8-byte aligned words, all of them atomics, and lives as long
        // as `self` does.
        unsafe { std::slice::from_raw_parts(page, size_of::<Page>() / 8) }
    }

    fn lie(&mut self, index: usize, value: u64) {
        self.honest = false;
        self.words()[index].store(value, Ordering::Relaxed);
    }

    fn flip(&mut self, index: usize, bit: u64) {
        self.honest = false;
        self.words()[index].fetch_xor(bit, Ordering::Relaxed);
    }

    /// Garbage everywhere, of which the value is the seed.
    fn scribble(&mut self, seed: u64) {
        self.honest = false;
        let mut state = seed | 1;
        for word in self.words() {
            // Xorshift: every word another one, and the same every time.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.store(state, Ordering::Relaxed);
        }
    }

    fn open(&mut self, whom: u8, value: u64) {
        let process = Process { pid: u32::from(whom) + 1, started: value };
        let name: String =
            value.to_le_bytes().iter().map(|byte| char::from(*byte)).cycle().take(70).collect();
        let page = &self.page;
        let Some(slot) = page.open_slot(process, &name, 1) else { return };
        assert_eq!(page.owner(slot), Some(process));
        assert!(page.occupied().contains(slot));
        // One in four is never told of it, and may be given it when it asks again.
        let told = value & 3 != 0;
        if told {
            let claimed = page.claim(slot);
            assert!(claimed || !self.honest);
        }
        if let Some(place) = self.clients.get_mut(slot.get()) {
            *place = told.then(|| Client::new(page.clone(), slot));
        }
    }

    fn check_take(&self, books: &Books<Arc<Page>>, amount: Granules) {
        let (free, account) = (self.page.free().granules, self.page.account(books.slot()));
        let taken = books.try_take(amount);
        let after = self.page.account(books.slot());
        assert_eq!(after.operation, None, "a move that was never closed");
        match taken {
            Ok(()) => {
                assert_eq!(i64::from(self.page.free().granules), i64::from(free) - i64::from(amount));
                assert_eq!(after.resident, account.resident.saturating_add(amount).min(MAX_GRANULES));
            }
            Err(seen) => {
                assert!(i64::from(seen.granules) < i64::from(amount), "refused though there was enough");
                assert_eq!((self.page.free().granules, after.resident), (free, account.resident));
            }
        }
    }

    fn check_give(&self, books: &Books<Arc<Page>>, amount: Granules) {
        let (free, account) = (self.page.free().granules, self.page.account(books.slot()));
        books.give(amount);
        let given = amount.min(account.resident);
        assert_eq!(self.page.free().granules, free.saturating_add_unsigned(given));
        assert_eq!(self.page.account(books.slot()).resident, account.resident - given);
    }

    fn check_audit(&self) {
        let busy = all_slots().any(|slot| self.page.account(slot).operation.is_some());
        let sum = || -> i64 {
            all_slots()
                .map(|slot| {
                    i64::from(self.page.account(slot).resident) + i64::from(self.page.view(slot).context)
                })
                .sum()
        };
        match self.page.audit() {
            Audit::Busy => assert!(busy, "busy with nothing in flight and nobody else here"),
            Audit::Repaired(off) => {
                assert_ne!(off, 0);
                assert_eq!(self.page.audit(), Audit::Balanced, "a repair that did not hold");
            }
            Audit::Balanced => assert!(!busy),
        }
        if !busy {
            assert_eq!(i64::from(self.page.free().granules), i64::from(self.page.capacity()) - sum());
        }
    }

    fn check_reap(&self, slot: SlotIndex) {
        let process = self.page.owner(slot);
        let reaped = self.page.reap(slot).expect("it has an owner");
        assert_eq!(Some(reaped.process), process);
        assert!(reaped.returned <= MAX_GRANULES);
        assert_eq!(self.page.owner(slot), None);
        assert!(!self.page.occupied().contains(slot));
        assert_eq!(self.page.view(slot).resident, 0);
        assert_eq!(self.page.view(slot).phase, Phase::Idle);
        assert_eq!(self.page.account(slot).operation, None);
    }

    fn check_decision(&self, snapshot: &Snapshot) {
        assert_eq!(snapshot.admitted, self.page.admitted());
        check_admitted(snapshot, snapshot.admitted);
    }

    /// Everything that reads a page.
    fn read_everything(&self) {
        let page = &*self.page;
        let _ = (page.check(), page.gpu(), page.arbiter(), page.audit_counts(), page.settings());
        let snapshot = Snapshot::take(page, page.admitted());
        assert!(snapshot.capacity <= MAX_GRANULES && snapshot.usable() <= snapshot.capacity);
        assert!(snapshot.bandwidth_in > 0 && snapshot.bandwidth_out > 0);
        for now in [0, nvshare::sync::now(), u64::MAX] {
            check_admitted(&snapshot, policy::admit(&snapshot.at(now)));
        }
        let evictors = policy::evictors(&snapshot);
        let shares: u64 = snapshot
            .clients()
            .map(|(slot, view)| {
                let share = policy::evict_share(&snapshot, slot);
                assert!(share <= view.resident);
                assert_eq!(evictors.contains(slot), share > 0);
                u64::from(share)
            })
            .sum();
        // For those who run; or, when they have all of theirs, for what the first waiter may bring in meanwhile.
        let ahead = policy::first_waiter(&snapshot).map_or(0, |first| snapshot.view(first).missing());
        let most = match policy::lacking(&snapshot) {
            0 => ahead,
            lacking => lacking,
        };
        assert!(shares <= u64::from(most));
        let first = policy::first_waiter(&snapshot);
        assert!(first.is_none_or(|first| !snapshot.admitted.contains(first)));
        assert!(first.is_some() || policy::next_decision(&snapshot, 0).is_none());
        for slot in all_slots() {
            let _ = (policy::quantum(&snapshot, slot), policy::switch_time(&snapshot, slot));
            let (view, shares) = (page.view(slot), page.shares(slot));
            assert_eq!((view.weight, view.priority), (shares.weight, shares.priority));
            assert!((1..=MAX_WEIGHT).contains(&shares.weight));
            assert!(shares.memory_limit.within(page.capacity()) <= page.capacity());
            let now = some_time(&snapshot);
            assert!(policy::enter_queue(&snapshot.at(now), slot).deadline >= now);
            let _ = (
                policy::turn_length(&snapshot, slot),
                policy::end_slice(&snapshot, slot, policy::Spent::default()),
            );
            let _ = (policy::next_turn(&snapshot, slot), policy::needed(&snapshot));
            assert!(
                [view.demand, view.resident, view.context].into_iter().all(|count| count <= MAX_GRANULES)
            );
            assert!(page.account(slot).closed().resident <= MAX_GRANULES);
            assert_eq!(page.details(slot).is_some(), page.owner(slot).is_some());
            if let Some(details) = page.details(slot) {
                // Three bytes at most stand for one that is no UTF-8.
                assert!(details.name.len() <= 3 * NAME_BYTES);
                assert!(!details.name.chars().any(char::is_control), "a name that talks to terminals");
            }
        }
    }
}

/// Whom a decision admits wants the GPU, and fits or is the only one that needs anything (I3).
fn check_admitted(snapshot: &Snapshot, admitted: SlotSet) {
    let demands: Vec<Granules> = admitted
        .iter()
        .map(|slot| {
            assert!(snapshot.occupied.contains(slot) && snapshot.view(slot).phase.wants_gpu());
            // What cannot move is there whoever runs.
            snapshot.view(slot).movable()
        })
        .collect();
    let sum: u64 = demands.iter().copied().map(u64::from).sum();
    let needy = demands.iter().filter(|demand| **demand > 0).count();
    assert!(sum <= u64::from(snapshot.usable()) || needy == 1, "{demands:?} in {}", snapshot.usable());
    // Who runs and was recalled has yet to see it, and comes back as a waiter. Who is paused is not admitted.
    let recalled = |slot, phase| phase == Phase::Running && !snapshot.admitted.contains(slot);
    let somebody = snapshot
        .clients()
        .any(|(slot, view)| view.phase.wants_gpu() && !view.paused && !recalled(slot, view.phase));
    assert_eq!(admitted.is_empty(), !somebody, "somebody must run");
}

/// Some time that a page could have.
fn some_time(snapshot: &Snapshot) -> u64 {
    snapshot.clients().map(|(_, view)| view.last_ran).max().unwrap_or_default()
}

fn shares(whom: u8, value: u64) -> Shares {
    Shares {
        weight: value as u32 % MAX_WEIGHT + 1,
        priority: Priority::read(u32::from(whom) % 3).expect("there are three"),
        memory_limit: MemoryLimit::from(value.rotate_left(1)),
        compute_limit: ComputeLimit::from(value as u32 >> (whom % 32)),
    }
}

fn settings(whom: u8, value: u64) -> Settings {
    let quantum = match whom % 3 {
        0 => Quantum::Fixed(value),
        1 => Quantum::Fixed(value % 3 * MILLISECOND),
        _ => Quantum::Auto {
            factor_milli: value as u32,
            longest_milli: (value >> 7) as u32,
            min: value >> 32,
            max: value.rotate_left(16),
        },
    };
    Settings { quantum, idle_grace: value, deadline: value.rotate_left(32), drain_target: value }
}
