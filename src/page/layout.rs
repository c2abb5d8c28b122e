//! The words of a page, and their places.
//!
//! The layout is fixed, little-endian, and consists of atomics and of bytes that nobody uses. A slot's row keeps apart what
//! the arbiter writes, what the owner writes and what others write, each on two cache lines of its own: a doorbell that
//! rings does not slow the owner's own words. (Two, because adjacent lines are fetched in pairs.)
//!
//! A change of the layout, or of a word's meaning, needs another [`LAYOUT_VERSION`].

use super::bandwidth::Bandwidth;
use super::phase::Phase;
use super::stall::Stall;
use crate::account::{Account, Free};
use crate::journal::Journal;
use crate::lock_word::LockWord;
use crate::packed::{Atomic, Packed};
use crate::shares::{ComputeLimit, MemoryLimit, Priority};
use crate::slot::{Owner, SLOTS, SlotSet};
use crate::suspension::Suspension;
use crate::sync::{AtomicU32, AtomicU64};
use crate::turns::Turn;
use crate::units::{Granules, MAX_GRANULES};
use std::cell::UnsafeCell;

/// The first eight bytes of a page: `nvshare` and a line feed, so that a text file is not one.
pub const MAGIC: u64 = u64::from_le_bytes(*b"nvshare\n");

/// Version of this layout. Both sides check it before anything else, and refuse a difference.
pub const LAYOUT_VERSION: u32 = 8;

/// The most bytes of a client's name that the page keeps.
pub const NAME_BYTES: usize = 64;

/// Bytes in a page.
pub const PAGE_BYTES: usize = size_of::<Page>();

/// Bytes that nobody uses. They have a type because other processes may write them too, at any time: Rust would assume
/// that plain padding behind a shared reference does not change.
pub(super) struct Padding<const N: usize>(UnsafeCell<[u8; N]>);

// SAFETY: nothing reads or writes the bytes, so no two threads access them.
unsafe impl<const N: usize> Sync for Padding<N> {}

impl<const N: usize> Padding<N> {
    fn new() -> Self {
        Self(UnsafeCell::new([0; N]))
    }
}

/// A word with two cache lines to itself. `REST` is what the word leaves of 128 bytes.
#[repr(C, align(128))]
pub struct Line<T, const REST: usize = 120>(T, Padding<REST>);

impl<T, const REST: usize> Line<T, REST> {
    fn new(word: T) -> Self {
        // The atomics of a model are larger.
        const { assert!(cfg!(loom) || size_of::<T>() + REST == 128) };
        Self(word, Padding::new())
    }
}

impl<T, const REST: usize> std::ops::Deref for Line<T, REST> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// What belongs to the GPU as a whole.
#[repr(C, align(128))]
pub struct Header {
    /// [`MAGIC`].
    pub(crate) magic: AtomicU64,
    /// [`LAYOUT_VERSION`].
    pub(crate) layout_version: AtomicU32,
    /// [`SLOTS`].
    pub(crate) slot_count: AtomicU32,
    /// [`PAGE_BYTES`].
    pub(crate) page_bytes: AtomicU64,
    /// The GPU's UUID, two halves.
    pub(crate) gpu: [AtomicU64; 2],
    /// Granules in the pool.
    pub(crate) capacity: AtomicU64,
    /// The slots that have an owner. The arbiter writes it.
    pub(crate) occupied: Packed<SlotSet>,

    // The operator's settings (`super::settings`), with the link's bandwidth among them.
    pub(super) quantum_mode: AtomicU32,
    pub(super) factor_milli: AtomicU32,
    pub(super) quantum_fixed: AtomicU64,
    pub(super) quantum_min: AtomicU64,
    pub(super) quantum_max: AtomicU64,
    pub(super) idle_grace: AtomicU64,
    /// Into the GPU and out of it ([`super::Direction`]).
    pub(super) bandwidth: [Packed<Bandwidth>; 2],
    pub(super) longest_milli: AtomicU32,
    _after_longest: Padding<4>,
    pub(super) deadline: AtomicU64,
    pub(super) drain_target: AtomicU64,

    /// The arbiter that serves the page; 0 before there is one.
    pub(crate) arbiter_pid: AtomicU32,
    /// How many arbiters this page has had.
    pub(crate) arbiter_generation: AtomicU32,
    /// When the arbiter was last alive, CLOCK_MONOTONIC ns.
    pub(crate) heartbeat: AtomicU64,
    /// Audits that found an answer, since the page was made.
    pub(crate) audits: AtomicU64,
    /// Audits that repaired the pool's counter.
    pub(crate) repaired: AtomicU64,
    /// Clients whose books the arbiter has closed.
    pub(crate) reaped: AtomicU64,
    /// What NVML shows for processes that are no clients.
    pub(super) foreign: Packed<ForeignMemory>,
    /// The clients from which others have taken the compute turn, because they did not give it up ([`crate::turns`]).
    pub(crate) overdue: Packed<SlotSet>,
    _to_the_next_line: Padding<64>,

    /// The pool's counter, and a futex for those who wait for granules.
    pub(crate) free: Line<Packed<Free>>,
    /// The clients that may load and run.
    pub(crate) lock: Line<Packed<LockWord>>,
    /// The place in the queue that the next client to wait gets.
    pub(crate) next_ticket: Line<AtomicU64>,
    /// Who has the compute turn.
    pub(crate) turn: Line<Packed<Turn>>,
}

/// What programs that are no clients have on the GPU, as NVML shows it. One word: `processes:32 | granules:32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForeignMemory {
    /// How many processes.
    pub processes: u32,
    /// Granules of the GPU's memory that they have together.
    pub granules: Granules,
}

impl From<u64> for ForeignMemory {
    /// Any 64 bits are some amount, within the bounds of a pool.
    fn from(word: u64) -> Self {
        Self { processes: (word >> 32) as u32, granules: (word as Granules).min(MAX_GRANULES) }
    }
}

impl From<ForeignMemory> for u64 {
    fn from(foreign: ForeignMemory) -> Self {
        Self::from(foreign.processes) << 32 | Self::from(foreign.granules)
    }
}

/// One client's row.
#[repr(C, align(128))]
pub struct Slot {
    /// Whose slot it is. The arbiter writes it.
    pub(crate) owner: Packed<Owner>,
    /// When the owner's process started, in clock ticks since boot. With the pid it identifies the process for ever.
    pub(crate) started: AtomicU64,
    /// Granules of the client's context, never movable. The arbiter writes it.
    pub(crate) context: AtomicU64,
    /// The client's weight, and below its priority and its memory limit ([`crate::shares`]). The arbiter writes all three.
    pub(crate) weight: AtomicU32,
    pub(crate) priority: Packed<Priority, AtomicU32>,
    pub(crate) memory_limit: Packed<MemoryLimit>,
    /// UTF-8, zeros behind it.
    pub(crate) name: [AtomicU64; NAME_BYTES / 8],
    /// 1 once the owner's process knows that the slot is its own ([`Page::claim`]). That process writes it, once.
    pub(crate) claimed: AtomicU64,
    /// The gang that the client belongs to ([`crate::gang_page`]); 0 if none. The arbiter writes it.
    pub(crate) gang: AtomicU64,
    /// The client's compute limit ([`crate::shares`]). The arbiter writes it.
    pub(crate) compute_limit: Packed<ComputeLimit, AtomicU32>,
    /// Whether somebody has paused the client ([`Suspension`]). The arbiter writes it.
    pub(crate) suspension: Packed<Suspension, AtomicU32>,

    /// What the owner writes.
    pub(crate) own: OwnWords,
    /// What the owner writes about its compute turns.
    pub(crate) compute: ComputeWords,
    /// What the owner writes, and helpers beside it.
    pub(crate) account: Line<Packed<Account>>,
    /// A futex that others write: how often it has rung.
    pub(crate) doorbell: Line<AtomicU32, 124>,
}

/// A slot's words that only its owner writes.
#[repr(C, align(128))]
pub struct OwnWords {
    pub(crate) phase: Packed<Phase, AtomicU32>,
    /// Slices that it has used up one after the other.
    pub(crate) consecutive_slices: AtomicU32,
    /// Granules that its allocations need.
    pub(crate) demand: AtomicU64,
    /// Its place in the queue.
    pub(crate) ticket: AtomicU64,
    /// Since when it waits, ns; 0 when it does not.
    pub(crate) wait_since: AtomicU64,
    /// When its slice began, ns, or [`crate::policy::NOT_BEGUN`]; 0 before it has the GPU.
    pub(crate) slice_start: AtomicU64,
    /// When it last ran, ns.
    pub(crate) last_ran: AtomicU64,
    /// Times that it was admitted and filled.
    pub(crate) slices: AtomicU64,
    /// Times that it gave way.
    pub(crate) yields: AtomicU64,
    /// Bytes that it has copied to the GPU.
    pub(crate) bytes_in: AtomicU64,
    /// Bytes that it has copied to the host.
    pub(crate) bytes_out: AtomicU64,
    /// Time that its copies in took, by the GPU's clock, ns.
    pub(crate) fill_ns: AtomicU64,
    /// Time that its copies out took, by the GPU's clock, ns.
    pub(crate) evict_ns: AtomicU64,
    /// Time spent running, ns.
    pub(crate) run_ns: AtomicU64,
    /// Granules of its resident ones that cannot be evicted: memory that other processes map too, or that only the driver
    /// can place.
    pub(crate) unmovable: AtomicU64,
    /// When it should have its next slice, ns.
    pub(crate) deadline: AtomicU64,
    /// GPU time that it has had, by its weight, ns of virtual time, as it was when it last ran ([`crate::policy`]).
    pub(crate) virtual_time: AtomicU64,
    /// Why it cannot give way.
    pub(crate) stall: Packed<Stall, AtomicU32>,
    _after_stall: Padding<4>,
    /// Since when it cannot give way, ns; 0 when it can.
    pub(crate) stall_since: AtomicU64,
    /// Times that it could not give way.
    pub(crate) stalls: AtomicU64,
    /// Times that it let its threads go on in the middle of a drain, and began to drain again later.
    pub(crate) drain_retries: AtomicU64,
    /// Host memory that it was promised and has not allocated yet, in a format that its readers know
    /// ([`crate::Books::promise_host`]).
    pub(crate) host_promise: AtomicU64,
    /// Its virtual time when its turn began, ns.
    pub(crate) turn_start: AtomicU64,
    /// What it had used of its turn before its present slice, ns, two's complement: negative if the turn began within it.
    pub(crate) turn_used: AtomicU64,
    /// How far its virtual time was behind the mean when it came from phase Idle, ns.
    pub(crate) credit: AtomicU64,
    /// When it last had work, ns, if it has none.
    pub(crate) idle_since: AtomicU64,
    /// How long it is expected to have none from then on, ns; 0 if nobody knows.
    pub(crate) pause: AtomicU64,
    /// When it is expected to have work again, ns, if its pauses are regular; 0 if nobody knows.
    pub(crate) returns_at: AtomicU64,
    /// GPU time of its slices that have ended, as the policy charges it: a k-th where k ran at once, ns.
    pub(crate) charged_ns: AtomicU64,
    /// Bytes that it has given up on the GPU without copying them, because they were zero.
    pub(crate) bytes_elided: AtomicU64,
    /// Times that threads of its process passed the gate to submit work.
    pub(crate) submissions: AtomicU64,
    /// Of these, those that had to wait at the gate.
    pub(crate) held_submissions: AtomicU64,
    /// Bytes that it has given up on the GPU without copying them, because the host had the same.
    pub(crate) bytes_unchanged: AtomicU64,
}

/// A slot's words about compute turns ([`crate::turns`]). Only its owner writes them, from several threads.
#[repr(C, align(128))]
pub struct ComputeWords {
    /// Since when it has work and has not had the turn, ns; 0 if it has no work. While it has the turn, of no other meaning.
    pub(crate) claim: AtomicU64,
    /// GPU time that it has had in turns, by its weight, ns of virtual time.
    pub(crate) virtual_time: AtomicU64,
    /// Its limit: the time at which it has used no more than its limit allows, ns ([`crate::turns`]).
    pub(crate) paid_until: AtomicU64,
    /// GPU time that it has had in turns, ns.
    pub(crate) gpu_ns: AtomicU64,
    /// The same, with what is long ago faded out, ns.
    pub(crate) recent_ns: AtomicU64,
    /// When that was computed, ns.
    pub(crate) recent_at: AtomicU64,
    /// Since when it takes turns, ns.
    pub(crate) since: AtomicU64,
    /// Time for which threads have waited for a turn, ns.
    pub(crate) held_ns: AtomicU64,
    /// Turns that it has had.
    pub(crate) turns: AtomicU64,
    /// Times that others went on beside it, because it did not give up the turn.
    pub(crate) overruns: AtomicU64,
    /// Not about turns: its own words have no room left. Bytes whose GPU memory it has handed to replicas, which need not copy them in.
    pub(crate) bytes_handed_over: AtomicU64,
    /// Bytes whose GPU memory it was handed by replicas, so that it has not copied them in.
    pub(crate) bytes_taken_over: AtomicU64,
    _to_the_next_line: Padding<32>,
}

impl ComputeWords {
    /// All of them, to be cleared for the slot's next owner.
    pub(crate) fn all(&self) -> [&AtomicU64; 12] {
        [
            &self.claim,
            &self.virtual_time,
            &self.paid_until,
            &self.gpu_ns,
            &self.recent_ns,
            &self.recent_at,
            &self.since,
            &self.held_ns,
            &self.turns,
            &self.overruns,
            &self.bytes_handed_over,
            &self.bytes_taken_over,
        ]
    }
}

/// The whole page.
#[repr(C)]
pub struct Page {
    /// What belongs to the GPU.
    pub header: Header,
    /// A row for each client.
    pub slots: [Slot; SLOTS],
    /// What each slot's client did lately; who reads it need not read the rows, and the other way round.
    pub journals: [Journal; SLOTS],
}

impl Page {
    /// A page of zeros, as in a new file.
    pub(super) fn zeroed() -> Self {
        fn word() -> AtomicU64 {
            AtomicU64::new(0)
        }
        fn half() -> AtomicU32 {
            AtomicU32::new(0)
        }
        fn packed<T, A: Atomic>() -> Packed<T, A>
        where
            T: From<A::Word> + Into<A::Word>,
        {
            Packed::of_word(A::Word::default())
        }
        let slot = |_| Slot {
            owner: packed(),
            started: word(),
            context: word(),
            weight: half(),
            priority: packed(),
            memory_limit: packed(),
            name: std::array::from_fn(|_| word()),
            claimed: word(),
            gang: word(),
            compute_limit: packed(),
            suspension: packed(),
            own: OwnWords {
                phase: packed(),
                consecutive_slices: half(),
                demand: word(),
                ticket: word(),
                wait_since: word(),
                slice_start: word(),
                last_ran: word(),
                slices: word(),
                yields: word(),
                bytes_in: word(),
                bytes_out: word(),
                fill_ns: word(),
                evict_ns: word(),
                run_ns: word(),
                unmovable: word(),
                deadline: word(),
                virtual_time: word(),
                stall: packed(),
                _after_stall: Padding::new(),
                stall_since: word(),
                stalls: word(),
                drain_retries: word(),
                host_promise: word(),
                turn_start: word(),
                turn_used: word(),
                credit: word(),
                idle_since: word(),
                pause: word(),
                returns_at: word(),
                charged_ns: word(),
                bytes_elided: word(),
                submissions: word(),
                held_submissions: word(),
                bytes_unchanged: word(),
            },
            compute: ComputeWords {
                claim: word(),
                virtual_time: word(),
                paid_until: word(),
                gpu_ns: word(),
                recent_ns: word(),
                recent_at: word(),
                since: word(),
                held_ns: word(),
                turns: word(),
                overruns: word(),
                bytes_handed_over: word(),
                bytes_taken_over: word(),
                _to_the_next_line: Padding::new(),
            },
            account: Line::new(packed()),
            doorbell: Line::new(half()),
        };
        Self {
            header: Header {
                magic: word(),
                layout_version: half(),
                slot_count: half(),
                page_bytes: word(),
                gpu: [word(), word()],
                capacity: word(),
                occupied: packed(),
                quantum_mode: half(),
                factor_milli: half(),
                quantum_fixed: word(),
                quantum_min: word(),
                quantum_max: word(),
                idle_grace: word(),
                bandwidth: [packed(), packed()],
                longest_milli: half(),
                _after_longest: Padding::new(),
                deadline: word(),
                drain_target: word(),
                arbiter_pid: half(),
                arbiter_generation: half(),
                heartbeat: word(),
                audits: word(),
                repaired: word(),
                reaped: word(),
                foreign: packed(),
                overdue: packed(),
                _to_the_next_line: Padding::new(),
                free: Line::new(packed()),
                lock: Line::new(packed()),
                next_ticket: Line::new(word()),
                turn: Line::new(packed()),
            },
            slots: std::array::from_fn(slot),
            journals: std::array::from_fn(|_| Journal::new()),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn slots_are_whole_cache_lines_and_writers_are_apart() {
        assert_eq!(size_of::<Slot>() % 128, 0);
        assert_eq!(offset_of!(Slot, own) % 128, 0);
        assert_eq!(offset_of!(Slot, compute) % 128, 0);
        assert_eq!(offset_of!(Slot, account) % 128, 0);
        assert_eq!(offset_of!(Slot, doorbell) % 128, 0);
        assert_eq!(offset_of!(Page, slots) % 128, 0);
        assert_eq!(PAGE_BYTES % 128, 0);
    }

    #[test]
    fn the_layout_has_not_moved() {
        // Another number here needs another LAYOUT_VERSION.
        assert_eq!(LAYOUT_VERSION, 8);
        assert_eq!((size_of::<Header>(), size_of::<Slot>(), size_of::<Journal>()), (768, 768, 8192));
        assert_eq!(PAGE_BYTES, 768 + 48 * (768 + 8192));
        assert_eq!(offset_of!(Header, free), 256);
    }
}
