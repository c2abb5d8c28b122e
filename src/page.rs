//! The control page: one for each GPU, in shared memory, mapped by everyone.
//!
//! Anybody who maps the page may write anything into it at any moment. So no reader trusts a value: counts are bounded, enums
//! are decoded so that every word is one of them, and an index comes out of [`SlotIndex::new`]. Every access is atomic, so a
//! hostile writer can cause wrong numbers and never undefined behaviour.
//!
//! | file | what it holds |
//! |---|---|
//! | `layout` | the words and their places |
//! | `phase`, `stall` | what a client is doing, and why it cannot give way |
//! | `settings` | what the operator decides |
//! | `bandwidth` | the link's average |
//! | `shares` | a client's weight, priority and memory limit, as they stand in its row |
//!
//! The functions of [`Page`] that belong to one part of the protocol are with that part: [`crate::pool`], [`crate::lock`],
//! [`crate::audit`], [`crate::snapshot`].

mod bandwidth;
mod layout;
mod phase;
mod settings;
mod shares;
mod stall;

pub use bandwidth::{DEFAULT_BANDWIDTH, Direction};
pub use layout::{
    ForeignMemory, Header, LAYOUT_VERSION, Line, MAGIC, NAME_BYTES, OwnWords, PAGE_BYTES, Page, Slot,
};
pub use phase::Phase;
pub use settings::{Quantum, Settings};
pub use stall::Stall;

use crate::account::Free;
use crate::slot::{SLOTS, SlotIndex, SlotSet};
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use crate::units::{GpuUuid, Granules, MAX_GRANULES, MILLISECOND, Nanos, SECOND};
use std::cell::UnsafeCell;

/// In a word of bandwidth: nobody has measured yet.
const GUESSED: u64 = 1 << 63;
/// No link is faster, bytes a second: bounds what garbage can do to the reckoning.
const FASTEST: u64 = 1 << 44;
/// And above the bandwidth: of how many copies it is the average.
const COPY: u64 = 1 << 48;
/// The newest copy counts as one of so many at least.
const COPIES: u64 = 16;

/// The first eight bytes of a page: `nvshare` and a line feed, so that a text file is not one.
pub const MAGIC: u64 = u64::from_le_bytes(*b"nvshare\n");

/// Version of this layout. Both sides check it before anything else, and refuse a difference.
pub const LAYOUT_VERSION: u32 = 7;

/// The most bytes of a client's name that the page keeps.
pub const NAME_BYTES: usize = 64;

/// What a client is doing. Only the client itself writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u32)]
pub enum Phase {
    /// Wants nothing. Its memory stays on the GPU until someone needs the room.
    #[default]
    Idle = 0,
    /// Wants to run, and waits for its bit.
    Waiting = 1,
    /// Has its bit, and brings its memory in.
    Filling = 2,
    /// All its memory is in place, and its gate is open (I2), or opens when its process has its other GPUs too.
    Running = 3,
    /// It is to give way, and waits for the work it has submitted. Its gate is shut; or all its memory is in place, and the
    /// gate is open for a while, because the work waits for more to be submitted. Nobody asks it to evict.
    Draining = 4,
    /// Has given everything back and wants its slot to be cleared.
    Leaving = 5,
}

impl Phase {
    /// Reads a phase. What is none is Idle: a client that wants nothing and is given nothing.
    pub fn parse(word: u32) -> Self {
        match word {
            1 => Self::Waiting,
            2 => Self::Filling,
            3 => Self::Running,
            4 => Self::Draining,
            5 => Self::Leaving,
            _ => Self::Idle,
        }
    }

    /// Wants the GPU, or has it: a decision may admit it.
    pub fn wants_gpu(self) -> bool {
        matches!(self, Self::Waiting | Self::Filling | Self::Running)
    }

    /// The word in lower case, as `nvshare status` shows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Waiting => "waiting",
            Self::Filling => "filling",
            Self::Running => "running",
            Self::Draining => "draining",
            Self::Leaving => "leaving",
        }
    }
}

/// Why a client that is to give way cannot. Only the client itself writes it ([`crate::Books::stalled`]); its memory stays
/// in place meanwhile, and it tries again by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u32)]
pub enum Stall {
    /// It can, or need not.
    #[default]
    None = 0,
    /// Its submitted work does not end while threads that want to submit are held: one waits for the other.
    DrainAwaitsSubmission = 1,
    /// Its submitted work does not end, and none of its threads wants to submit: a kernel that runs for ever.
    EndlessWork = 2,
    /// It captures a graph, and has not ended the capture.
    OpenCapture = 3,
    /// Its work is done, and the host has no memory for what must go out.
    NoHostMemory = 4,
}

impl Stall {
    /// Reads a reason. What is none is no stall.
    pub fn parse(word: u32) -> Self {
        match word {
            1 => Self::DrainAwaitsSubmission,
            2 => Self::EndlessWork,
            3 => Self::OpenCapture,
            4 => Self::NoHostMemory,
            _ => Self::None,
        }
    }

    /// The reason as a word for programs, as in `nvshare status --json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::DrainAwaitsSubmission => "drain-awaits-submission",
            Self::EndlessWork => "endless-work",
            Self::OpenCapture => "open-capture",
            Self::NoHostMemory => "no-host-memory",
        }
    }

    /// The reason with this word, if there is one.
    pub fn named(name: &str) -> Option<Self> {
        (1..=4).map(Self::parse).find(|stall| stall.name() == name)
    }

    /// The reason for people: the end of a sentence that begins with "it cannot give way:".
    pub fn reason(self) -> &'static str {
        match self {
            Self::None => "no reason",
            Self::DrainAwaitsSubmission => {
                "its work on the GPU waits for work that its threads have yet to submit"
            }
            Self::EndlessWork => "its work on the GPU does not end",
            Self::OpenCapture => "it captures a graph and has not ended the capture",
            Self::NoHostMemory => "the host has no memory for its data",
        }
    }

    /// What an operator does about it, in the imperative.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::None => "do nothing",
            Self::DrainAwaitsSubmission => {
                "if it does not end: end the process, or run it alone on its GPU (a resident kernel cannot take turns)"
            }
            Self::EndlessWork => "end the process if its kernel never returns, or run it alone on its GPU",
            Self::OpenCapture => {
                "end the process if it is stopped or stuck between cuStreamBeginCapture and cuStreamEndCapture"
            }
            Self::NoHostMemory => {
                "free host memory, raise the control group's limit or NVSHARE_HOST_MEMORY, or end a process"
            }
        }
    }
}

/// How long a client runs while others wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantum {
    /// Always this long, in ns.
    Fixed(Nanos),
    /// A multiple of the switch that the slice's end causes.
    Auto {
        /// The multiple, in thousandths: 5,000 is five times the switch.
        factor_milli: u32,
        /// What it grows to while everybody uses up slice after slice, in thousandths.
        longest_milli: u32,
        /// No slice is shorter, in ns.
        min: Nanos,
        /// No slice is longer, in ns.
        max: Nanos,
    },
}

impl Default for Quantum {
    fn default() -> Self {
        Self::Auto { factor_milli: 5_000, longest_milli: 20_000, min: 100 * MILLISECOND, max: 60 * SECOND }
    }
}

/// What the operator decides, one for a GPU; the arbiter writes it, everybody reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// How long a client runs while others wait.
    pub quantum: Quantum,
    /// A holder that has had no work for this long, in ns, gives way to a waiter.
    pub idle_grace: Nanos,
    /// How far away, in ns, the deadline of a client is at most that begins to wait.
    pub deadline: Nanos,
    /// How long, in ns, the work that a holder has in flight may take while its slice can end; 0: any time.
    pub drain_target: Nanos,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            quantum: Quantum::default(),
            idle_grace: 5 * MILLISECOND,
            deadline: 60 * SECOND,
            drain_target: 50 * MILLISECOND,
        }
    }
}

/// Which way a copy goes over the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Host to GPU.
    In,
    /// GPU to host.
    Out,
}

/// Bandwidth assumed of a link that nobody has measured yet, in bytes a second: PCIe 3 x16.
pub const DEFAULT_BANDWIDTH: u64 = 12 << 30;

/// Bytes that nobody uses. They have a type because other processes may write them too, at any time: of
/// plain padding behind a shared reference, Rust would assume that it stands still.
struct Padding<const N: usize>(UnsafeCell<[u8; N]>);

// SAFETY: nothing reads or writes the bytes, so threads cannot meet in them.
unsafe impl<const N: usize> Sync for Padding<N> {}

impl<const N: usize> Padding<N> {
    fn new() -> Self {
        Self(UnsafeCell::new([0; N]))
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
    /// Bytes in the whole page.
    pub(crate) page_bytes: AtomicU64,
    /// The GPU's UUID, two halves.
    pub(crate) gpu: [AtomicU64; 2],
    /// Granules in the pool.
    pub(crate) capacity: AtomicU64,
    /// A bit per slot in use. The arbiter writes it.
    pub(crate) occupied: AtomicU64,

    quantum_mode: AtomicU32,
    factor_milli: AtomicU32,
    quantum_fixed: AtomicU64,
    quantum_min: AtomicU64,
    quantum_max: AtomicU64,
    idle_grace: AtomicU64,
    bandwidth: [AtomicU64; 2],
    longest_milli: AtomicU32,
    _after_longest: Padding<4>,
    deadline: AtomicU64,
    drain_target: AtomicU64,

    pub(crate) arbiter_pid: AtomicU32,
    /// How many arbiters this page has had.
    pub(crate) arbiter_generation: AtomicU32,
    /// When the arbiter last looked, CLOCK_MONOTONIC ns.
    pub(crate) heartbeat: AtomicU64,
    pub(crate) audits: AtomicU64,
    pub(crate) repaired: AtomicU64,
    pub(crate) reaped: AtomicU64,
    /// processes:32 | granules:32 of the GPU's memory that NVML shows for processes that are no clients.
    foreign: AtomicU64,
    _to_the_next_line: Padding<72>,

    pub(crate) free: Line,
    pub(crate) lock: Line,
    pub(crate) next_ticket: Line,
}

/// A word with two cache lines to itself: adjacent lines are fetched in pairs.
#[repr(C, align(128))]
pub struct Line(pub(crate) AtomicU64, Padding<120>);

impl std::ops::Deref for Line {
    type Target = AtomicU64;
    fn deref(&self) -> &AtomicU64 {
        &self.0
    }
}

/// One client's row.
#[repr(C, align(128))]
pub struct Slot {
    /// generation:32 | pid:32. Pid 0: nobody. The arbiter writes it.
    pub(crate) owner: AtomicU64,
    /// When the owner's process started, in clock ticks since boot: with the pid, a process for ever.
    pub(crate) started: AtomicU64,
    /// Granules of the client's context, never movable. The arbiter writes it.
    pub(crate) pinned: AtomicU64,
    /// Its shares ([`crate::shares`]): the arbiter writes all three.
    pub(crate) weight: AtomicU32,
    pub(crate) priority: AtomicU32,
    pub(crate) memory_limit: AtomicU64,
    pub(crate) name: [AtomicU64; NAME_BYTES / 8],
    /// 1 from when the owner's process knows of it ([`Page::claim`]), which says so itself, once.
    pub(crate) claimed: AtomicU64,
    _to_the_next_line: Padding<16>,

    /// What the owner writes.
    pub(crate) own: OwnWords,
    /// What helpers write beside the owner.
    pub(crate) account: Line,
    /// What others write: rings.
    pub(crate) doorbell: Bell,
}

/// A futex with two cache lines to itself.
#[repr(C, align(128))]
pub struct Bell(pub(crate) AtomicU32, Padding<124>);

/// A slot's words that only its owner writes.
#[repr(C, align(128))]
pub struct OwnWords {
    pub(crate) phase: AtomicU32,
    /// Slices that it has used up one after the other.
    pub(crate) consecutive_slices: AtomicU32,
    /// Granules its allocations need.
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
    pub(crate) bytes_in: AtomicU64,
    pub(crate) bytes_out: AtomicU64,
    /// Time that its copies in took, by the GPU's clock, ns.
    pub(crate) fill_ns: AtomicU64,
    /// Time that its copies out took, by the GPU's clock, ns.
    pub(crate) evict_ns: AtomicU64,
    /// Time spent running, ns.
    pub(crate) run_ns: AtomicU64,
    /// Granules of its resident ones that cannot be evicted: memory that other processes map too, or that
    /// only the driver can place.
    pub(crate) unmovable: AtomicU64,
    /// When it should have its next slice, ns.
    pub(crate) deadline: AtomicU64,
    /// GPU time that it has had, by its weight, ns of virtual time, as it was when it last ran ([`crate::policy`]).
    pub(crate) virtual_time: AtomicU64,
    /// Why it cannot give way ([`Stall`]).
    pub(crate) stall: AtomicU32,
    _after_stall: Padding<4>,
    /// Since when it cannot, ns; 0 when it can.
    pub(crate) stall_since: AtomicU64,
    /// Times that it could not.
    pub(crate) stalls: AtomicU64,
    /// Times that it let its threads go on in the middle of a drain, and began to drain again later.
    pub(crate) drain_retries: AtomicU64,
    /// Host memory that it was promised and has not made yet, as those read it who share that memory with it.
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
    _to_the_next_line: Padding<48>,
}

/// The whole page.
#[repr(C)]
pub struct Page {
    /// What belongs to the GPU.
    pub header: Header,
    /// A row per client.
    pub slots: [Slot; SLOTS],
}

/// Bytes that a page takes up.
pub const PAGE_BYTES: usize = size_of::<Page>();

/// Why a mapped file is not a page that this program can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// The file is shorter than a page.
    #[error(
        "it has {found} bytes and a control page of layout {LAYOUT_VERSION} has {PAGE_BYTES}; it was truncated or is some other file"
    )]
    Short {
        /// Bytes found.
        found: u64,
    },
    /// It does not begin with [`MAGIC`].
    #[error(
        "it does not begin with nvshare's magic (found {found:#018x}); it is not a control page, or it was overwritten"
    )]
    Magic {
        /// The first eight bytes.
        found: u64,
    },
    /// A release with another layout wrote it.
    #[error(
        "it has layout version {found} and this program has {LAYOUT_VERSION}; run the same nvshare release on both sides, and restart the arbiter after an update"
    )]
    Version {
        /// The page's version.
        found: u32,
    },
    /// The version is right, and the number of slots or of bytes is not.
    #[error(
        "it claims {slots} slots in {bytes} bytes, and layout {LAYOUT_VERSION} has {SLOTS} in {PAGE_BYTES}; it was overwritten"
    )]
    Geometry {
        /// Slots claimed.
        slots: u32,
        /// Bytes claimed.
        bytes: u64,
    },
}

impl Page {
    /// Makes a page of a zeroed one: identity, a pool of `capacity` free granules, default settings. The magic comes last, so
    /// that nobody takes a half-made page for a whole one.
    pub fn initialise(&self, gpu: GpuUuid, capacity: Granules) {
        let header = &self.header;
        let capacity = capacity.min(MAX_GRANULES);
        header.capacity.store(u64::from(capacity), Ordering::Relaxed);
        header.free.store(Free { granules: capacity as i32, tag: None }, Ordering::Relaxed);
        header.next_ticket.store(1, Ordering::Relaxed);
        self.set_settings(Settings::default());
        for word in &header.bandwidth {
            word.store(Bandwidth::guess(DEFAULT_BANDWIDTH), Ordering::Relaxed);
        }
        self.restore_identity(gpu);
    }

    /// Writes what [`check`](Page::check) reads, whatever stood there: everybody can write the page, and the arbiter
    /// knows which page it is.
    pub fn restore_identity(&self, gpu: GpuUuid) {
        let header = &self.header;
        header.layout_version.store(LAYOUT_VERSION, Ordering::Relaxed);
        header.slot_count.store(SLOTS as u32, Ordering::Relaxed);
        header.page_bytes.store(PAGE_BYTES as u64, Ordering::Relaxed);
        for (half, word) in gpu.0.chunks_exact(8).zip(&header.gpu) {
            word.store(u64::from_le_bytes(half.try_into().expect("eight bytes")), Ordering::Relaxed);
        }
        header.magic.store(MAGIC, Ordering::Release);
    }

    /// Checks that this is a page of this layout.
    ///
    /// # Errors
    /// What is wrong with it, in a sentence that begins with "it".
    pub fn check(&self) -> Result<(), PageError> {
        let header = &self.header;
        let magic = header.magic.load(Ordering::Acquire);
        if magic != MAGIC {
            return Err(PageError::Magic { found: magic });
        }
        let version = header.layout_version.load(Ordering::Relaxed);
        if version != LAYOUT_VERSION {
            return Err(PageError::Version { found: version });
        }
        let (slots, bytes) =
            (header.slot_count.load(Ordering::Relaxed), header.page_bytes.load(Ordering::Relaxed));
        if (slots, bytes) != (SLOTS as u32, PAGE_BYTES as u64) {
            return Err(PageError::Geometry { slots, bytes });
        }
        Ok(())
    }

    /// The GPU that the page is for.
    pub fn gpu(&self) -> GpuUuid {
        let mut bytes = [0; 16];
        for (half, word) in bytes.chunks_exact_mut(8).zip(&self.header.gpu) {
            half.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        GpuUuid(bytes)
    }

    /// Granules in the pool.
    pub fn capacity(&self) -> Granules {
        self.header.capacity.load(Ordering::Relaxed).min(u64::from(MAX_GRANULES)) as Granules
    }

    /// The row of a slot.
    pub fn slot(&self, slot: SlotIndex) -> &Slot {
        &self.slots[slot.get()]
    }

    /// The slots that have an owner.
    pub fn occupied(&self) -> SlotSet {
        self.header.occupied.load(Ordering::Acquire)
    }

    /// What processes that are no clients have on the GPU.
    pub fn foreign(&self) -> ForeignMemory {
        self.header.foreign.load(Ordering::Relaxed)
    }

    /// Writes what processes that are no clients have on the GPU. For the arbiter, which asks NVML.
    pub fn set_foreign(&self, foreign: ForeignMemory) {
        self.header.foreign.store(foreign, Ordering::Relaxed);
    }

    /// The link's bandwidth, in bytes a second, measured or as first guessed; never 0.
    pub fn bandwidth(&self, direction: Direction) -> u64 {
        self.header.bandwidth[direction as usize].load(Ordering::Relaxed).bytes_per_second
    }

    /// Takes a copy of `bytes` that took `took` ns into the average. The first one replaces the guess, and copies of less
    /// than 64 MiB are left out.
    pub fn observe_copy(&self, direction: Direction, bytes: u64, took: Nanos) {
        let word = &self.header.bandwidth[direction as usize];
        // Not one atomic step: a lost update loses one sample of an average.
        if let Some(average) = word.load(Ordering::Relaxed).with_copy(bytes, took) {
            word.store(average, Ordering::Relaxed);
        }
    }

    /// Sets the bandwidth that holds until the first measurement, in bytes a second each way. What is measured stays.
    pub fn guess_bandwidth(&self, bytes_per_second: u64) {
        for word in self.header.bandwidth.iter().filter(|word| word.load(Ordering::Relaxed).guessed) {
            word.store(Bandwidth::guess(bytes_per_second), Ordering::Relaxed);
        }
    }

    /// The arbiter that serves this page: its pid (0: none yet), how many arbiters the page has had, and when the last one
    /// was last alive (CLOCK_MONOTONIC ns).
    pub fn arbiter(&self) -> (u32, u32, Nanos) {
        let header = &self.header;
        (
            header.arbiter_pid.load(Ordering::Relaxed),
            header.arbiter_generation.load(Ordering::Relaxed),
            header.heartbeat.load(Ordering::Relaxed),
        )
    }

    /// Sleeps while a slot's doorbell shows `seen`, at most until the time `until` (CLOCK_MONOTONIC ns). May return for no
    /// reason: the caller looks again.
    pub fn wait_doorbell(&self, slot: SlotIndex, seen: u32, until: Option<Nanos>) {
        crate::sync::futex_wait(&self.slot(slot).doorbell, seen, until);
    }

    /// What a slot's doorbell shows: a count of rings. Read it before the words whose change a ring announces, and give it to
    /// [`Page::wait_doorbell`].
    pub fn doorbell(&self, slot: SlotIndex) -> u32 {
        self.slot(slot).doorbell.load(Ordering::Acquire)
    }

    /// Rings a slot's doorbell: its owner looks at the page again.
    pub fn ring(&self, slot: SlotIndex) {
        let bell = &self.slot(slot).doorbell;
        bell.fetch_add(1, Ordering::AcqRel);
        crate::sync::futex_wake(bell);
    }

    /// An [initialised](Page::initialise) page on the heap, for models and tests.
    pub fn on_heap(gpu: GpuUuid, capacity: Granules) -> Box<Self> {
        let page = Box::new(Self::zeroed());
        page.initialise(gpu, capacity);
        page
    }

    /// A page on the heap, of some GPU.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn for_tests(capacity: Granules) -> Box<Self> {
        Self::on_heap(GpuUuid([7; 16]), capacity)
    }

    fn zeroed() -> Self {
        fn word() -> AtomicU64 {
            AtomicU64::new(0)
        }
        fn half() -> AtomicU32 {
            AtomicU32::new(0)
        }
        let slot = |_| Slot {
            owner: word(),
            started: word(),
            pinned: word(),
            weight: half(),
            priority: half(),
            memory_limit: word(),
            name: std::array::from_fn(|_| word()),
            claimed: word(),
            _to_the_next_line: Padding::new(),
            own: OwnWords {
                phase: half(),
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
                stall: half(),
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
                _to_the_next_line: Padding::new(),
            },
            account: Line(AtomicU64::new(Account::default().into()), Padding::new()),
            doorbell: Bell(half(), Padding::new()),
        };
        Self {
            header: Header {
                magic: word(),
                layout_version: half(),
                slot_count: half(),
                page_bytes: word(),
                gpu: [word(), word()],
                capacity: word(),
                occupied: word(),
                quantum_mode: half(),
                factor_milli: half(),
                quantum_fixed: word(),
                quantum_min: word(),
                quantum_max: word(),
                idle_grace: word(),
                bandwidth: [word(), word()],
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
                foreign: word(),
                _to_the_next_line: Padding::new(),
                free: Line(word(), Padding::new()),
                lock: Line(word(), Padding::new()),
                next_ticket: Line(word(), Padding::new()),
            },
            slots: std::array::from_fn(slot),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_another_kind_is_refused_by_name() {
        let page = Page::for_tests(1);
        assert_eq!(page.check(), Ok(()));
        page.header.layout_version.store(9, Ordering::Relaxed);
        let error = page.check().unwrap_err().to_string();
        assert!(error.contains("version 9") && error.contains("has 6"), "{error}");
        page.header.magic.store(3, Ordering::Relaxed);
        assert!(matches!(page.check(), Err(PageError::Magic { found: 3 })));
    }
}
