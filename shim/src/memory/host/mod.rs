//! Host memory for evicted data: huge pages, touched by several threads, registered with the driver,
//! and kept between switches.
//!
//! cuMemHostAlloc takes 0.36 to 0.57 s per GiB. An anonymous mapping with MADV_HUGEPAGE that eight
//! threads touch and cuMemHostRegister then pins takes 0.05 s per GiB, at the same copy speed (docs/driver-facts.md).
//! The pool grows by *arenas*; a block lies in one arena. One thread at a time *resizes* the pool, and does
//! the slow part outside the lock. Blocks are allocated and freed meanwhile, and a thread that waits for a block gets
//! the first that fits, new or just freed.
//!
//! MADV_DONTFORK, because data loaders fork, and pinned pages must not be copied on write.
//! MADV_DONTDUMP, because a core file need not contain evicted data. A forked child calls
//! [`after_fork`]: its copy of the pool's state describes memory that it does not have.
//!
//! When the application allocates GPU memory, the same amount of host memory is *committed* (promised, not allocated). If
//! host memory could not hold it, the allocation is refused, so that no process is killed for lack of memory later. Free
//! memory in pieces does not break a commitment: an allocation may consist of several blocks, and an arena
//! that the kernel cannot map in one piece is made smaller.
//!
//! A new arena is checked against the same bound, measured again before it is mapped and repeatedly while its pages are
//! touched ([`promises::step`]), because other processes may have taken the memory since the promise or may be taking it
//! now. Then the arena is smaller than wanted, and the caller may try again.
//!
//! The bound is on the pool as a whole: what the machine has left now plus what the pool holds now. This sum
//! stays the same while the pool grows and shrinks, so it can be cached; the first term alone could not.
//! It is measured while no thread resizes, because an arena that is being made is in neither term. Memory that other pools
//! have promised and do not hold yet is subtracted ([`promises`]).

mod limits;
mod prefault;
mod promises;

pub use promises::Board;

use limits::{HostLimits, Sharers};
use nvshare::sync::now;
use nvshare::units::{GRANULE, Nanos, SECOND, format_nanos, format_size};
use promises::Promises;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// How long a measured bound is used.
const BELIEVED: Nanos = SECOND;

/// If less than this many bytes would remain below the bound, the bound is measured each time.
const NEAR: u64 = 1 << 30;

/// How many forks lie between the first process and this one. A pool with another count belongs to a parent.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// For the child of a fork, before it does anything else: the existing pools belong to its parent. They
/// refuse every request from now on, and neither unmap memory nor call the driver when they are dropped. Two atomic
/// writes and no lock, so a fork handler may call it.
pub fn after_fork() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    promises::after_fork();
}

/// Registers host memory with the driver, so that the GPU copies it at full speed.
pub trait Pinner: Send + Sync {
    /// Registers `length` bytes from `address`.
    ///
    /// # Errors
    /// Why it could not be.
    fn pin(&self, address: *mut u8, length: usize) -> Result<(), PinError>;

    /// Unregisters memory, before it is unmapped.
    fn unpin(&self, address: *mut u8, length: usize);
}

/// Why memory could not be registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinError(String);

impl PinError {
    /// With this reason.
    pub fn new(why: String) -> Self {
        Self(why)
    }
}

/// Why there is no host memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostPoolError {
    /// The bound is reached.
    Bound {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes left below the bound.
        left: u64,
        /// Which bound.
        bound: String,
    },
    /// The pool is of the process that this one was forked from.
    Forked,
    /// The kernel refused a mapping.
    Map {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes that are free in the pool.
        left: u64,
        /// The kernel's error.
        why: String,
    },
}

impl std::fmt::Display for HostPoolError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bound { wanted, left, bound } => write!(
                out,
                "host memory for evicted data has {} left and {} are needed; the bound is {bound}. Free host memory, raise that limit, or run fewer jobs",
                format_size(*left),
                format_size(*wanted)
            ),
            Self::Forked => write!(
                out,
                "host memory for evicted data belongs to the process that this one was forked from: start the process anew (spawn or forkserver) instead of using its GPU after a fork"
            ),
            Self::Map { wanted, why, .. } => write!(
                out,
                "the kernel maps no {} of host memory for evicted data: {why}. Look at ulimit -v, vm.max_map_count and vm.overcommit_memory",
                format_size(*wanted)
            ),
        }
    }
}

impl std::error::Error for HostPoolError {}

impl HostPoolError {
    /// Bytes that could be allocated instead, at that moment.
    pub fn left(&self) -> u64 {
        match self {
            Self::Bound { left, .. } | Self::Map { left, .. } => *left,
            Self::Forked => 0,
        }
    }
}

/// How the pool grows and how far.
#[derive(Clone)]
pub struct HostPoolConfig {
    /// The most bytes, if the user set a bound.
    pub limit: Option<u64>,
    /// Bytes of an arena.
    pub arena: usize,
    /// Arenas are a multiple of this, bytes, unless the bound allows less: in a pool that grew by each small
    /// allocation, larger requests would have to be served in many pieces.
    pub step: u64,
    /// Threads that touch a new arena.
    pub threads: usize,
    /// Measures how much the machine, the control groups and the process's limits leave.
    pub limits: Arc<dyn Fn() -> Vec<HostLimits> + Send + Sync>,
}

impl Default for HostPoolConfig {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            limit: None,
            arena: 512 << 20,
            step: crate::memory::CHUNK,
            threads: cores.min(8),
            limits: Arc::new(|| HostLimits::probe(Path::new("/"))),
        }
    }
}

/// A piece of an arena. Not `Clone`: it owns the bytes.
#[derive(Debug)]
struct HostBlock {
    address: NonNull<u8>,
    length: usize,
}

// SAFETY: a block is plain memory that only its holder uses, from any thread.
unsafe impl Send for HostBlock {}
// SAFETY: a shared block hands out nothing but its address.
unsafe impl Sync for HostBlock {}

/// Memory of the pool: whole granules, in one block or in several. Not `Clone`: it owns the bytes.
#[derive(Debug)]
pub struct HostMemory {
    blocks: Vec<HostBlock>,
}

impl HostMemory {
    /// Bytes.
    pub fn length(&self) -> u64 {
        self.blocks.iter().map(|block| block.length as u64).sum()
    }

    /// The pieces of the `length` bytes that begin at byte `from`: address and length of each, in order.
    pub fn pieces(&self, from: u64, length: u64) -> impl Iterator<Item = (*mut u8, u64)> {
        let (mut skip, mut left) = (from, length);
        self.blocks.iter().filter_map(move |block| {
            let whole = block.length as u64;
            let (at, here) = (skip.min(whole), whole.saturating_sub(skip).min(left));
            (skip, left) = (skip - at, left - here);
            // SAFETY: within the block.
            (here > 0).then(|| (unsafe { block.address.as_ptr().add(at as usize) }, here))
        })
    }

    /// Cuts it in two, the first of `length` bytes: whole granules, fewer than it has.
    pub fn split_at(self, length: u64) -> (Self, Self) {
        assert!(length < self.length() && length.is_multiple_of(GRANULE), "both parts are whole granules");
        let (mut first, mut rest, mut left) = (Vec::new(), Vec::new(), length as usize);
        for block in self.blocks {
            let HostBlock { address, length } = block;
            let here = length.min(left);
            left -= here;
            if here > 0 {
                first.push(HostBlock { address, length: here });
            }
            if here < length {
                // SAFETY: within the block.
                rest.push(HostBlock { address: unsafe { address.add(here) }, length: length - here });
            }
        }
        (Self { blocks: first }, Self { blocks: rest })
    }
}

/// One mapping of the pool.
struct Arena {
    length: usize,
    pinned: bool,
    /// Address and length of each free piece. No two pieces touch.
    free: BTreeMap<usize, usize>,
}

impl Arena {
    fn unused(&self) -> bool {
        self.free.first_key_value().is_some_and(|(_, length)| *length == self.length)
    }
}

/// A free piece: whether it is not pinned, its length and its address. The order is: pinned memory first, then by length.
type Gap = (bool, usize, usize);

/// How many bytes the pool may hold in total by each limit, before the promises of other pools are subtracted.
#[derive(Debug, Clone)]
struct Bound {
    measured: Nanos,
    limits: Vec<HostLimits>,
}

impl Bound {
    /// The limit that leaves the fewest bytes.
    fn tightest(limits: &[HostLimits]) -> HostLimits {
        let none = HostLimits { bytes: u64::MAX, sharers: Sharers::Machine, bound: "nothing".into() };
        limits.iter().min_by_key(|limits| limits.bytes).cloned().unwrap_or(none)
    }
}

#[derive(Default)]
struct State {
    /// By address.
    arenas: BTreeMap<usize, Arena>,
    /// The free pieces of all arenas.
    gaps: BTreeSet<Gap>,
    /// Bytes of all arenas.
    capacity: u64,
    /// Bytes of all gaps.
    free: u64,
    committed: u64,
    bound: Option<Bound>,
    /// A thread adds or removes arenas.
    resizing: bool,
    /// Threads asleep on [`HostPool::changed`].
    waiting: usize,
    warned: bool,
}

impl State {
    fn add(&mut self, address: NonNull<u8>, length: usize, pinned: bool) {
        let begin = address.as_ptr() as usize;
        let free = BTreeMap::from([(begin, length)]);
        self.arenas.insert(begin, Arena { length, pinned, free });
        self.gaps.insert((!pinned, length, begin));
        self.capacity += length as u64;
        self.free += length as u64;
    }

    /// Removes an arena that has no block in use.
    fn remove(&mut self, begin: usize) -> Option<Arena> {
        let arena = self.arenas.remove(&begin)?;
        self.gaps.remove(&(!arena.pinned, arena.length, begin));
        self.capacity -= arena.length as u64;
        self.free -= arena.length as u64;
        Some(arena)
    }

    /// Takes `length` bytes: from the smallest gap that fits, to keep the large ones; if none fits, from the largest
    /// gaps. Pinned memory first. `None` if fewer are free.
    fn take(&mut self, length: usize) -> Option<HostMemory> {
        if self.free < length as u64 {
            return None;
        }
        let (mut blocks, mut left) = (Vec::new(), length);
        while left > 0 {
            let gap = self.gap_for(left)?;
            let (_, size, address) = gap;
            let taken = size.min(left);
            self.shorten(gap, taken);
            blocks.push(HostBlock { address: NonNull::new(address as *mut u8)?, length: taken });
            left -= taken;
        }
        Some(HostMemory { blocks })
    }

    /// The smallest gap of at least `length` bytes, or else the largest gap.
    fn gap_for(&self, length: usize) -> Option<Gap> {
        let kinds = [false, true];
        let of = |unpinned: bool, from| (unpinned, from, 0)..=(unpinned, usize::MAX, usize::MAX);
        let fits = kinds.iter().find_map(|unpinned| self.gaps.range(of(*unpinned, length)).next());
        let largest = || kinds.iter().find_map(|unpinned| self.gaps.range(of(*unpinned, 0)).next_back());
        fits.or_else(largest).copied()
    }

    /// Takes `taken` bytes from the beginning of a gap.
    fn shorten(&mut self, gap: Gap, taken: usize) {
        let (unpinned, size, address) = gap;
        self.gaps.remove(&gap);
        self.free -= taken as u64;
        let Some((_, arena)) = self.arenas.range_mut(..=address).next_back() else { return };
        arena.free.remove(&address);
        if size > taken {
            arena.free.insert(address + taken, size - taken);
            self.gaps.insert((unpinned, size - taken, address + taken));
        }
    }

    /// Adds a freed block to the gaps. False if it lies in no arena.
    fn give(&mut self, block: &HostBlock) -> bool {
        let (mut begin, mut length) = (block.address.as_ptr() as usize, block.length);
        let found = self.arenas.range_mut(..=begin).next_back();
        let Some((_, arena)) = found.filter(|(at, arena)| begin - **at < arena.length) else { return false };
        let unpinned = !arena.pinned;
        self.free += length as u64;
        if let Some((before, gap)) = arena.free.range(..begin).next_back().map(|(at, gap)| (*at, *gap))
            && before + gap == begin
        {
            arena.free.remove(&before);
            self.gaps.remove(&(unpinned, gap, before));
            (begin, length) = (before, gap + length);
        }
        if let Some(gap) = arena.free.remove(&(begin + length)) {
            self.gaps.remove(&(unpinned, gap, begin + length));
            length += gap;
        }
        arena.free.insert(begin, length);
        self.gaps.insert((unpinned, length, begin));
        true
    }

    /// Records whether an arena is pinned.
    fn set_pinned(&mut self, begin: usize, pinned: bool) {
        let Some(arena) = self.arenas.get_mut(&begin) else { return };
        for (address, length) in &arena.free {
            self.gaps.remove(&(!arena.pinned, *length, *address));
            self.gaps.insert((!pinned, *length, *address));
        }
        arena.pinned = pinned;
    }
}

/// The pool.
pub struct HostPool {
    config: HostPoolConfig,
    pinner: Box<dyn Pinner>,
    promises: Promises,
    /// The value of [`FORKS`] when it was made.
    forks: u32,
    state: Mutex<State>,
    /// A resize ended, or memory was given back.
    changed: Condvar,
}

/// Pinner and board of a pool that belongs to no client.
struct Nobody;

impl Pinner for Nobody {
    fn pin(&self, _address: *mut u8, _length: usize) -> Result<(), PinError> {
        Err(PinError::new("this pool belongs to no GPU".into()))
    }

    fn unpin(&self, _address: *mut u8, _length: usize) {}
}

impl Board for Nobody {
    fn publish(&self, _promise: promises::Promise) {}

    fn others(&self) -> Vec<promises::Promise> {
        Vec::new()
    }
}

/// The right to add and remove arenas, one thread at a time.
struct Resizing<'a>(&'a HostPool);

impl Drop for Resizing<'_> {
    fn drop(&mut self) {
        self.0.state().resizing = false;
        self.0.changed.notify_all();
    }
}

impl HostPool {
    /// An empty pool.
    pub fn new(config: HostPoolConfig, pinner: Box<dyn Pinner>, board: Box<dyn Board>) -> Self {
        let forks = FORKS.load(Ordering::Relaxed);
        let promises = Promises::new(board);
        Self { config, pinner, promises, forks, state: Mutex::default(), changed: Condvar::new() }
    }

    /// A pool with one arena of `bytes` that is never touched: to measure the cost of its bookkeeping.
    ///
    /// # Errors
    /// The kernel cannot map it.
    pub fn untouched(bytes: u64) -> Result<Self, HostPoolError> {
        let pool = Self::new(HostPoolConfig::default(), Box::new(Nobody), Box::new(Nobody));
        let (address, length) = pool.map(bytes)?;
        pool.state().add(address, length, false);
        Ok(pool)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        nvshare::sync::lock(&self.state)
    }

    fn wait<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.waiting += 1;
        let mut state = self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        state.waiting -= 1;
        state
    }

    fn resize(&self) -> Resizing<'_> {
        let mut state = self.state();
        while state.resizing {
            state = self.wait(state);
        }
        state.resizing = true;
        Resizing(self)
    }

    /// Whether the pool belongs to a parent process. Checked before the lock is taken: in a forked child, the lock may be held
    /// by a thread that exists only in the parent.
    fn forked(&self) -> bool {
        self.forks != FORKS.load(Ordering::Relaxed)
    }

    fn ours(&self) -> Result<(), HostPoolError> {
        if self.forked() { Err(HostPoolError::Forked) } else { Ok(()) }
    }

    /// Bytes in the pool, free or not.
    pub fn capacity(&self) -> u64 {
        if self.forked() { 0 } else { self.state().capacity }
    }

    /// Bytes in the pool that nothing uses.
    pub fn free_bytes(&self) -> u64 {
        if self.forked() { 0 } else { self.state().free }
    }

    /// Promises host memory for `bytes` that may be evicted later, without allocating it.
    ///
    /// Measures the bound, which reads files, at most once a second unless the bound is near; then it also waits for the end of
    /// a resize.
    ///
    /// # Errors
    /// The promises would exceed the bound.
    pub fn commit(&self, bytes: u64) -> Result<(), HostPoolError> {
        self.ours()?;
        let measured = self.believed(bytes);
        let bound = measured.unwrap_or_else(|| self.measure(&self.resize()));
        let mut state = self.state();
        let before = state.committed;
        state.committed = before.saturating_add(bytes);
        // Publish before reading the promises of others: of two pools that promise at the same time, at least one then sees
        // the other's promise.
        self.publish(&state);
        let tightest = self.beside_others(&bound);
        if state.committed > tightest.bytes {
            state.committed = before;
            self.publish(&state);
            let left = tightest.bytes.saturating_sub(before);
            return Err(HostPoolError::Bound { wanted: bytes, left, bound: tightest.bound });
        }
        Ok(())
    }

    /// The cached bound, if it is recent and `bytes` more stay far below it.
    fn believed(&self, bytes: u64) -> Option<Bound> {
        let state = self.state();
        let bound = state.bound.as_ref()?;
        // During a resize the bound cannot be measured, so the cached one is used.
        let fresh = now().saturating_sub(bound.measured) < BELIEVED || state.resizing;
        let wanted = state.committed.saturating_add(bytes).saturating_add(NEAR);
        (fresh && wanted <= self.beside_others(bound).bytes).then(|| bound.clone())
    }

    /// The tightest limit after subtracting the promises of other pools.
    fn beside_others(&self, bound: &Bound) -> HostLimits {
        let others = self.promises.others();
        let less = |limits: &HostLimits| {
            let taken = others.below(limits.sharers);
            let bound = match taken {
                0 => limits.bound.clone(),
                _ => format!("{}, of which other jobs were promised {}", limits.bound, format_size(taken)),
            };
            HostLimits { bytes: limits.bytes.saturating_sub(taken), bound, ..*limits }
        };
        Bound::tightest(&bound.limits.iter().map(less).collect::<Vec<_>>())
    }

    /// Publishes how much this pool has promised and does not hold, for other pools.
    fn publish(&self, state: &State) {
        let limits = state.bound.as_ref().map_or(&[] as &[_], |bound| bound.limits.as_slice());
        self.promises.publish(state.committed.saturating_sub(state.capacity), limits);
    }

    /// Takes back a promise of [`HostPool::commit`].
    pub fn uncommit(&self, bytes: u64) {
        if !self.forked() {
            let mut state = self.state();
            state.committed = state.committed.saturating_sub(bytes);
            self.publish(&state);
        }
    }

    /// Measures the bound. The caller has the right to resize, so that every arena is counted either as held by the pool or as
    /// free on the machine.
    fn measure(&self, _resizing: &Resizing<'_>) -> Bound {
        let mut limits = (self.config.limits)();
        let mut state = self.state();
        for limit in &mut limits {
            limit.bytes = limit.bytes.saturating_add(state.capacity);
        }
        if let Some(limit) = self.config.limit {
            let bound = format!("NVSHARE_HOST_MEMORY={}", format_size(limit));
            limits.push(HostLimits { bytes: limit, sharers: Sharers::Pool, bound });
        }
        let bound = Bound { measured: now(), limits };
        state.bound = Some(bound.clone());
        bound
    }

    /// Grows until the pool has `bytes` in total, or as many as the bound allows.
    ///
    /// # Errors
    /// The bound is reached, or the kernel refused.
    pub fn ensure(&self, bytes: u64) -> Result<(), HostPoolError> {
        self.ours()?;
        loop {
            let resizing = self.resize();
            let missing = bytes.saturating_sub(self.capacity());
            if missing == 0 {
                return Ok(());
            }
            let bound = Bound::tightest(&self.measure(&resizing).limits);
            let left = self.left(&bound);
            if left == 0 {
                let left = self.free_bytes();
                return Err(HostPoolError::Bound { wanted: missing, left, bound: bound.bound });
            }
            self.grow(&resizing, self.arena_for(missing, left))?;
        }
    }

    /// Grows until `most` bytes are free, or as many as the bound allows; not at all if those are fewer than `least`.
    ///
    /// # Errors
    /// There cannot be `least` bytes, or the kernel refused.
    pub fn make_free(&self, least: u64, most: u64) -> Result<(), HostPoolError> {
        self.ours()?;
        let (free, capacity) = {
            let state = self.state();
            (state.free, state.capacity)
        };
        if free < least {
            let bound = Bound::tightest(&self.measure(&self.resize()).limits);
            let left = self.left(&bound).saturating_add(free);
            if left < least {
                return Err(HostPoolError::Bound { wanted: least, left, bound: bound.bound });
            }
        }
        self.ensure(capacity.saturating_add(most.saturating_sub(free)))
    }

    /// Checks that the bounds leave `bytes` outside the pool, for memory that the pool has promised and the driver will
    /// allocate. If they do not, unused arenas are given up, but only if the client has no work in flight (`quiet`): to unregister
    /// memory, the driver waits for all work of the context (tests/gpu/waits.cu).
    ///
    /// # Errors
    /// They leave fewer.
    pub fn spare(&self, bytes: u64, quiet: bool) -> Result<(), HostPoolError> {
        self.ours()?;
        let resizing = self.resize();
        let measure = || {
            let bound = Bound::tightest(&self.measure(&resizing).limits);
            (self.left(&bound), bound)
        };
        let (mut left, mut bound) = measure();
        if left < bytes && quiet {
            self.release(&resizing, 0);
            (left, bound) = measure();
        }
        if left < bytes {
            return Err(HostPoolError::Bound { wanted: bytes, left, bound: bound.bound });
        }
        Ok(())
    }

    /// Allocates `length` bytes, rounded up to whole granules. The content is undefined.
    ///
    /// # Errors
    /// Not enough bytes are free, and the bound or the kernel allows no more.
    pub fn alloc(&self, length: u64) -> Result<HostMemory, HostPoolError> {
        self.ours()?;
        let rounded = length.max(1).checked_next_multiple_of(GRANULE);
        let length = rounded.and_then(|length| usize::try_from(length).ok()).unwrap_or(usize::MAX);
        loop {
            let mut state = self.state();
            loop {
                if let Some(memory) = state.take(length) {
                    return Ok(memory);
                }
                if !state.resizing {
                    break;
                }
                state = self.wait(state);
            }
            state.resizing = true;
            let promised = state.committed.saturating_sub(state.capacity);
            let free = state.free;
            drop(state);
            let resizing = Resizing(self);
            let missing = (length as u64).saturating_sub(free);
            let bound = Bound::tightest(&self.measure(&resizing).limits);
            let left = self.left(&bound);
            if left < missing {
                let left = left.saturating_add(free);
                return Err(HostPoolError::Bound { wanted: length as u64, left, bound: bound.bound });
            }
            // The caller waits for this, so grow by what is missing or promised, and no more.
            self.grow(&resizing, missing.max(self.arena_for(promised, left)))?;
        }
    }

    /// Bytes of the next arena for a pool that lacks `missing` and may grow by `left`.
    fn arena_for(&self, missing: u64, left: u64) -> u64 {
        let steps = missing.div_ceil(self.config.step).saturating_mul(self.config.step);
        steps.min(self.config.arena as u64).min(left)
    }

    /// Whole granules by which the pool may grow.
    fn left(&self, bound: &HostLimits) -> u64 {
        let left = bound.bytes.saturating_sub(self.capacity());
        left - left % GRANULE
    }

    /// Frees memory. It stays in the pool.
    pub fn free(&self, memory: HostMemory) {
        if self.forked() {
            return;
        }
        let mut state = self.state();
        for block in &memory.blocks {
            if !state.give(block) {
                tracing::error!(
                    "freed host memory at {:p} does not belong to the pool, so it is leaked; this is a bug in nvshare",
                    block.address
                );
            }
        }
        if state.waiting > 0 {
            self.changed.notify_all();
        }
    }

    /// Unmaps unused arenas, as long as the pool keeps at least `keep` bytes. Waits for the work of the context.
    pub fn trim(&self, keep: u64) {
        if !self.forked() {
            self.release(&self.resize(), keep);
        }
    }

    fn release(&self, _resizing: &Resizing<'_>, keep: u64) {
        let mut gone = Vec::new();
        {
            let mut state = self.state();
            let mut held = state.capacity;
            let unused = state.arenas.iter().filter(|(_, arena)| arena.unused());
            let lengths: Vec<_> = unused.map(|(begin, arena)| (*begin, arena.length as u64)).collect();
            for (begin, length) in lengths {
                if held - length >= keep {
                    held -= length;
                    gone.extend(state.remove(begin).map(|arena| (begin, arena)));
                }
            }
            self.publish(&state);
        }
        gone.iter().for_each(|(begin, arena)| self.unmap(*begin, arena));
    }

    /// Unregisters all arenas, calls `change`, which moves the pinner to another context, and registers them again unless it
    /// returns false (there is no context any more). The caller ensures that no copy is in flight. An arena that cannot be
    /// registered is still used.
    pub fn repin(&self, change: impl FnOnce() -> bool) {
        if self.forked() {
            return;
        }
        // No other thread adds or removes an arena meanwhile.
        let _resizing = self.resize();
        let arenas: Vec<_> =
            self.state().arenas.iter().map(|(begin, arena)| (*begin, arena.length, arena.pinned)).collect();
        for (begin, length, _) in arenas.iter().filter(|(_, _, pinned)| *pinned) {
            self.pinner.unpin(*begin as *mut u8, *length);
        }
        let again = change();
        for (begin, length, _) in arenas {
            let pinned = again && self.pin(begin as *mut u8, length);
            self.state().set_pinned(begin, pinned);
        }
    }

    /// Registers memory. False if that fails, which is logged once.
    fn pin(&self, address: *mut u8, length: usize) -> bool {
        let Err(PinError(why)) = self.pinner.pin(address, length) else { return true };
        if !std::mem::replace(&mut self.state().warned, true) {
            tracing::warn!(
                "host memory could not be pinned, so switches will be 3 to 6 times slower: {why}. This process may lock {} (RLIMIT_MEMLOCK); if that is less than its GPU memory, raise it (ulimit -l unlimited, LimitMEMLOCK=infinity, docker run --ulimit memlock=-1) and start the process again",
                memlock()
            );
        }
        false
    }

    fn unmap(&self, begin: usize, arena: &Arena) {
        let address = begin as *mut u8;
        if arena.pinned {
            self.pinner.unpin(address, arena.length);
        }
        // SAFETY: the arena is no longer in the pool and none of its blocks is in use.
        if unsafe { libc::munmap(address.cast(), arena.length) } != 0 {
            let error = std::io::Error::last_os_error();
            tracing::error!(
                "{} of host memory could not be unmapped and stay in use until the process ends: {error}",
                format_size(arena.length as u64)
            );
        }
    }

    /// Makes an arena of `length` bytes without holding the lock. It is smaller if the kernel cannot map as much in one piece,
    /// or if the bound allows less while the pages are touched.
    fn grow(&self, resizing: &Resizing<'_>, length: u64) -> Result<(), HostPoolError> {
        let began = now();
        let (address, mapped) = self.map(length)?;
        let mut refused = None;
        let length = prefault::prefault(address, mapped, self.config.threads, |unfinished| {
            let tightest = self.shared_left();
            let step = promises::step(tightest.bytes.saturating_sub(unfinished));
            if step == 0 {
                refused = Some(tightest.bound);
            }
            step
        });
        prefault::cut(address, length, mapped);
        if length == 0 {
            let bound = refused.unwrap_or_default();
            return Err(HostPoolError::Bound { wanted: mapped as u64, left: self.free_bytes(), bound });
        }
        let pinned = self.pin(address.as_ptr(), length);
        let mut state = self.state();
        state.add(address, length, pinned);
        let capacity = state.capacity;
        self.publish(&state);
        drop(state);
        if refused.is_some() {
            self.measure(resizing);
        }
        tracing::debug!(
            "the pool of host memory grew by {} to {} in {}",
            format_size(length as u64),
            format_size(capacity),
            format_nanos(now() - began)
        );
        Ok(())
    }

    /// Maps `length` bytes in one piece; if the kernel refuses, half as much, and so on.
    fn map(&self, length: u64) -> Result<(NonNull<u8>, usize), HostPoolError> {
        let mut bytes = length;
        loop {
            let tried = usize::try_from(bytes)
                .map_err(std::io::Error::other)
                .and_then(|bytes| prefault::map(bytes).map(|address| (address, bytes)));
            match tried {
                Ok(mapped) => return Ok(mapped),
                Err(_) if bytes > GRANULE => bytes = (bytes / 2).next_multiple_of(GRANULE),
                Err(error) => {
                    let (left, why) = (self.free_bytes(), error.to_string());
                    return Err(HostPoolError::Map { wanted: length, left, why });
                }
            }
        }
    }

    /// What the limits shared with other processes leave now: other processes may be growing too while an arena is made.
    fn shared_left(&self) -> HostLimits {
        let mut limits = (self.config.limits)();
        // The process's own limits already count the mapping as a whole.
        limits.retain(|limits| matches!(limits.sharers, Sharers::Group(_) | Sharers::Machine));
        Bound::tightest(&limits)
    }
}

impl Drop for HostPool {
    fn drop(&mut self) {
        if self.forked() {
            return;
        }
        // Arenas with a block in use stay mapped: the block's holder may still access it.
        let arenas = std::mem::take(&mut *self.state()).arenas;
        for (begin, arena) in arenas.iter().filter(|(_, arena)| arena.unused()) {
            self.unmap(*begin, arena);
        }
        self.promises.publish(0, &[]);
    }
}

fn memlock() -> String {
    match nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK) {
        Ok((libc::RLIM_INFINITY, _)) => "unlimited".into(),
        Ok((soft, _)) => format_size(soft),
        Err(_) => "unknown".into(),
    }
}

#[cfg(test)]
mod tests;
