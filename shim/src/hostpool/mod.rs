//! Host memory for what is evicted: huge pages, touched by several threads, registered with the driver,
//! and kept between switches.
//!
//! cuMemHostAlloc takes 0.36 to 0.57 s per GiB. An anonymous mapping with MADV_HUGEPAGE that eight
//! threads touch and cuMemHostRegister then pins takes 0.05 s, at the same copy speed (DESIGN section 2).
//! The pool grows by *arenas*, and a block lies in one. One thread at a time *resizes* the pool, and does
//! the slow part outside the lock: blocks come and go meanwhile, and who waits for a block gets the first
//! that fits, be it new or just given back.
//!
//! MADV_DONTFORK, because data loaders fork, and pinned pages must not be copied on write.
//! MADV_DONTDUMP, because a core file need not hold everybody's tensors. A child that forked calls
//! [`forget`]: its copy of the books describes memory that it does not have.
//!
//! What the application may need one day is *committed* when it allocates: if host memory could not hold
//! it, the allocation is refused then, and nobody is killed for it later. An arena is held to the same
//! bound, measured anew, since others may have taken what was there when the promise was made: then a
//! block is refused, and the caller may try again.
//!
//! The bound is on the pool as a whole: what the machine leaves now plus what the pool holds now. This sum
//! stays as it is while the pool grows and shrinks, so it can be kept for a while, which the first term
//! alone could not. It is measured while nobody resizes, because an arena in the making is in neither.

mod limits;
mod prefault;

use limits::HostLimits;
use nvshare::sync::now;
use nvshare::units::{GRANULE, Nanos, SECOND, format_nanos, format_size};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};

/// How long a measured bound is believed.
const BELIEVED: Nanos = SECOND;

/// So close to the bound it is measured each time.
const NEAR: u64 = 1 << 30;

/// Counts the forks that this process is the child of. A pool of an earlier count is the parent's.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// For the child of a fork, before it does anything else: the pools that exist are its parent's. They
/// refuse everything from now on, and leave memory and driver alone when they are dropped. One atomic
/// addition and no lock, so a fork handler may call it.
pub fn forget() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// Registers host memory with the driver, so that the GPU copies it at full speed.
pub trait Pinner: Send + Sync {
    /// Registers `length` bytes from `address`.
    ///
    /// # Errors
    /// Why it could not be.
    fn pin(&self, address: *mut u8, length: usize) -> Result<(), PinError>;

    /// Takes a registration back, before the memory goes.
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
        /// What it said.
        why: String,
    },
}

impl std::fmt::Display for HostPoolError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bound { wanted, left, bound } => write!(
                out,
                "host memory for evicted data has {} left and {} are wanted; the bound is {bound}. Free host memory, raise the limit, or run fewer jobs",
                format_size(*left),
                format_size(*wanted)
            ),
            Self::Forked => write!(
                out,
                "host memory for evicted data belongs to the process that this one was forked from: start the process anew (spawn or forkserver) instead of using its GPU after a fork"
            ),
            Self::Map { wanted, why } => write!(
                out,
                "the kernel maps no {} of host memory for evicted data: {why}. Look at ulimit -v, vm.max_map_count and vm.overcommit_memory",
                format_size(*wanted)
            ),
        }
    }
}

impl std::error::Error for HostPoolError {}

/// How the pool grows and how far.
#[derive(Debug, Clone)]
pub struct HostPoolConfig {
    /// The most bytes, if the user set a bound.
    pub limit: Option<u64>,
    /// Bytes of an arena.
    pub arena: usize,
    /// What arenas are a multiple of, bytes, unless the bound is nearer: a pool that grew by each small
    /// allocation would have no arena for a block that is larger than one of them.
    pub step: u64,
    /// Threads that touch a new arena.
    pub threads: usize,
    /// Where `/proc` and `/sys` are found: `/` but in tests.
    pub root: PathBuf,
}

impl Default for HostPoolConfig {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            limit: None,
            arena: 512 << 20,
            step: crate::memory::CHUNK,
            threads: cores.min(8),
            root: "/".into(),
        }
    }
}

/// A piece of an arena. Not `Clone`: whoever has it owns the bytes.
#[derive(Debug)]
pub struct HostBlock {
    address: NonNull<u8>,
    length: usize,
}

// SAFETY: a block is plain memory that its holder alone uses, from whichever thread.
unsafe impl Send for HostBlock {}
// SAFETY: a shared block hands out nothing but its address.
unsafe impl Sync for HostBlock {}

impl HostBlock {
    /// Its first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// Cuts it in two, the first of `length` bytes: whole granules, fewer than it has.
    pub fn split_at(self, length: usize) -> (Self, Self) {
        assert!(
            length < self.length && length.is_multiple_of(GRANULE as usize),
            "both parts are whole granules"
        );
        // SAFETY: within the block.
        let rest = unsafe { self.address.add(length) };
        (Self { address: self.address, length }, Self { address: rest, length: self.length - length })
    }
}

struct Arena {
    address: NonNull<u8>,
    length: usize,
    pinned: bool,
    /// Offset and length of what is free, apart from each other.
    free: BTreeMap<usize, usize>,
}

// SAFETY: an arena is a mapping that the pool owns; only the pool touches its description.
unsafe impl Send for Arena {}

impl Arena {
    /// The length of the smallest gap that holds `length`, and where it is.
    fn fit(&self, length: usize) -> Option<(usize, usize)> {
        self.free.iter().filter(|(_, gap)| **gap >= length).map(|(offset, gap)| (*gap, *offset)).min()
    }

    fn take(&mut self, (gap, offset): (usize, usize), length: usize) -> HostBlock {
        self.free.remove(&offset);
        if gap > length {
            self.free.insert(offset + length, gap - length);
        }
        // SAFETY: the gap lies inside the arena.
        HostBlock { address: unsafe { self.address.add(offset) }, length }
    }

    fn contains(&self, block: &HostBlock) -> bool {
        let begin = self.address.as_ptr() as usize;
        (begin..begin + self.length).contains(&(block.as_ptr() as usize))
    }

    fn give(&mut self, block: &HostBlock) {
        let mut offset = block.as_ptr() as usize - self.address.as_ptr() as usize;
        let mut length = block.length;
        if let Some((before, gap)) = self.free.range(..offset).next_back().map(|(o, l)| (*o, *l))
            && before + gap == offset
        {
            self.free.remove(&before);
            (offset, length) = (before, gap + length);
        }
        if let Some(gap) = self.free.remove(&(offset + length)) {
            length += gap;
        }
        self.free.insert(offset, length);
    }

    fn unused(&self) -> bool {
        self.free.get(&0) == Some(&self.length)
    }
}

/// What the pool may hold in all.
#[derive(Debug, Clone)]
struct Bound {
    measured: Nanos,
    most: u64,
    what: String,
}

#[derive(Default)]
struct State {
    arenas: Vec<Arena>,
    committed: u64,
    bound: Option<Bound>,
    /// A thread adds or removes arenas.
    resizing: bool,
    /// Threads asleep on [`HostPool::changed`].
    waiting: usize,
    warned: bool,
}

impl State {
    fn capacity(&self) -> u64 {
        self.arenas.iter().map(|arena| arena.length as u64).sum()
    }

    /// From the smallest gap that fits, so that the large ones last; pinned memory first.
    fn take(&mut self, length: usize) -> Option<HostBlock> {
        let fits = self.arenas.iter_mut().filter_map(|arena| Some((arena.fit(length)?, arena)));
        let (gap, arena) = fits.min_by_key(|(gap, arena)| (!arena.pinned, *gap))?;
        Some(arena.take(gap, length))
    }
}

/// The pool.
pub struct HostPool {
    config: HostPoolConfig,
    pinner: Box<dyn Pinner>,
    /// The value of [`FORKS`] when it was made.
    forks: u32,
    state: Mutex<State>,
    /// A resize ended, or a block was given back.
    changed: Condvar,
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
    pub fn new(config: HostPoolConfig, pinner: Box<dyn Pinner>) -> Self {
        let forks = FORKS.load(Ordering::Relaxed);
        Self { config, pinner, forks, state: Mutex::default(), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
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

    /// Checked before the lock is touched: in a child, a thread that is not there may hold it.
    fn forked(&self) -> bool {
        self.forks != FORKS.load(Ordering::Relaxed)
    }

    fn ours(&self) -> Result<(), HostPoolError> {
        if self.forked() { Err(HostPoolError::Forked) } else { Ok(()) }
    }

    /// Bytes in the pool, free or not.
    pub fn capacity(&self) -> u64 {
        if self.forked() { 0 } else { self.state().capacity() }
    }

    /// Reserves room for `bytes` that may one day be evicted, without taking it.
    ///
    /// Reads no file but once a second and near the bound; near the bound it waits for the end of a resize.
    ///
    /// # Errors
    /// The bound would be passed.
    pub fn commit(&self, bytes: u64) -> Result<(), HostPoolError> {
        self.ours()?;
        {
            let mut state = self.state();
            let wanted = state.committed.saturating_add(bytes);
            // While somebody resizes there is nothing to measure, and an old bound must do.
            let fits = state.bound.as_ref().is_some_and(|bound| {
                (now().saturating_sub(bound.measured) < BELIEVED || state.resizing)
                    && wanted.saturating_add(NEAR) <= bound.most
            });
            if fits {
                state.committed = wanted;
                return Ok(());
            }
        }
        let bound = self.measure(&self.resize());
        let mut state = self.state();
        let wanted = state.committed.saturating_add(bytes);
        if wanted > bound.most {
            let left = bound.most.saturating_sub(state.committed);
            return Err(HostPoolError::Bound { wanted: bytes, left, bound: bound.what });
        }
        state.committed = wanted;
        Ok(())
    }

    /// Takes a reservation back.
    pub fn uncommit(&self, bytes: u64) {
        if !self.forked() {
            let mut state = self.state();
            state.committed = state.committed.saturating_sub(bytes);
        }
    }

    /// Looks at the machine. The books are the machine's while nobody else resizes.
    fn measure(&self, _resizing: &Resizing<'_>) -> Bound {
        let limits = HostLimits::probe(&self.config.root);
        let mut state = self.state();
        let mut bound = Bound {
            measured: now(),
            most: limits.bytes.saturating_add(state.capacity()),
            what: limits.bound,
        };
        if let Some(limit) = self.config.limit
            && limit < bound.most
        {
            (bound.most, bound.what) = (limit, format!("NVSHARE_HOST_MEMORY={}", format_size(limit)));
        }
        state.bound = Some(bound.clone());
        bound
    }

    /// Grows until the pool has `bytes` in all, or all that the bound allows.
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
            let bound = self.measure(&resizing);
            let left = self.left(&bound);
            if left == 0 {
                return Err(HostPoolError::Bound { wanted: missing, left, bound: bound.what });
            }
            self.grow(&resizing, self.arena_for(missing, left))?;
        }
    }

    /// A block of `length` bytes, rounded up to whole granules. Its content is what was there before.
    ///
    /// # Errors
    /// Nothing free is large enough, and the bound or the kernel gives no more.
    pub fn alloc(&self, length: usize) -> Result<HostBlock, HostPoolError> {
        self.ours()?;
        let rounded = length.max(1).checked_next_multiple_of(GRANULE as usize);
        let length = rounded.unwrap_or(usize::MAX);
        loop {
            let mut state = self.state();
            loop {
                if let Some(block) = state.take(length) {
                    return Ok(block);
                }
                if !state.resizing {
                    break;
                }
                state = self.wait(state);
            }
            state.resizing = true;
            drop(state);
            let resizing = Resizing(self);
            let length = length as u64;
            // What is free lies in arenas that are too small for this block, and often for the next.
            let promised = self.state().committed;
            if self.capacity().saturating_add(length) > promised {
                self.release(&resizing, promised.saturating_sub(length));
            }
            let bound = self.measure(&resizing);
            let mut left = self.left(&bound);
            if left < length && left.saturating_add(self.unused()) >= length {
                self.release(&resizing, 0);
                left = self.left(&bound);
            }
            if left < length {
                return Err(HostPoolError::Bound { wanted: length, left, bound: bound.what });
            }
            // Somebody waits for this block: nothing is made for him that nobody may ever want.
            let wanted = promised.saturating_sub(self.capacity());
            self.grow(&resizing, length.max(self.arena_for(wanted, left)))?;
        }
    }

    /// Bytes of the next arena for a pool that lacks `missing` and may grow by `left`.
    fn arena_for(&self, missing: u64, left: u64) -> u64 {
        let steps = missing.div_ceil(self.config.step).saturating_mul(self.config.step);
        steps.min(self.config.arena as u64).min(left)
    }

    /// Whole granules by which the pool may grow.
    fn left(&self, bound: &Bound) -> u64 {
        let left = bound.most.saturating_sub(self.capacity());
        left - left % GRANULE
    }

    fn unused(&self) -> u64 {
        let state = self.state();
        state.arenas.iter().filter(|arena| arena.unused()).map(|arena| arena.length as u64).sum()
    }

    /// Takes a block back. Its memory stays for the next one.
    pub fn free(&self, block: HostBlock) {
        if self.forked() {
            return;
        }
        let mut state = self.state();
        match state.arenas.iter_mut().find(|arena| arena.contains(&block)) {
            Some(arena) => arena.give(&block),
            None => tracing::error!("a host block at {:p} is in no arena: it is leaked", block.as_ptr()),
        }
        if state.waiting > 0 {
            self.changed.notify_all();
        }
    }

    /// Gives unused arenas back to the kernel, as many as leave the pool with `keep` bytes or more.
    pub fn trim(&self, keep: u64) {
        if !self.forked() {
            self.release(&self.resize(), keep);
        }
    }

    fn release(&self, _resizing: &Resizing<'_>, keep: u64) {
        let mut gone = Vec::new();
        {
            let mut state = self.state();
            let mut held = state.capacity();
            let spare = |arena: &Arena, held: u64| arena.unused() && held - arena.length as u64 >= keep;
            while let Some(index) = state.arenas.iter().position(|arena| spare(arena, held)) {
                let arena = state.arenas.swap_remove(index);
                held -= arena.length as u64;
                gone.push(arena);
            }
        }
        gone.iter().for_each(|arena| self.unmap(arena));
    }

    /// Registers everything anew after `change`, which moves the pinner to another context. The caller sees
    /// to it that nothing is being copied. What cannot be registered again is used all the same.
    pub fn repin(&self, change: impl FnOnce()) {
        if self.forked() {
            return;
        }
        // Nobody makes or releases an arena meanwhile.
        let _resizing = self.resize();
        let arenas: Vec<_> =
            self.state().arenas.iter().map(|arena| (arena.address, arena.length, arena.pinned)).collect();
        for (address, length, _) in arenas.iter().filter(|(_, _, pinned)| *pinned) {
            self.pinner.unpin(address.as_ptr(), *length);
        }
        change();
        for (address, length, _) in arenas {
            let pinned = self.pin(address, length);
            let mut state = self.state();
            if let Some(arena) = state.arenas.iter_mut().find(|arena| arena.address == address) {
                arena.pinned = pinned;
            }
        }
    }

    /// Registers memory. Whether it could be; if not, says so once.
    fn pin(&self, address: NonNull<u8>, length: usize) -> bool {
        let Err(PinError(why)) = self.pinner.pin(address.as_ptr(), length) else { return true };
        if !std::mem::replace(&mut self.state().warned, true) {
            tracing::warn!(
                "host memory could not be pinned, so switches will be 3 to 6 times slower: {why}. This process may lock {} (RLIMIT_MEMLOCK); if that is less than its GPU memory, raise it (ulimit -l unlimited, LimitMEMLOCK=infinity, docker run --ulimit memlock=-1) and start the process again",
                memlock()
            );
        }
        false
    }

    fn unmap(&self, arena: &Arena) {
        if arena.pinned {
            self.pinner.unpin(arena.address.as_ptr(), arena.length);
        }
        // SAFETY: the arena is out of the pool with no block of it in use, so nobody knows the memory.
        if unsafe { libc::munmap(arena.address.as_ptr().cast(), arena.length) } != 0 {
            let error = std::io::Error::last_os_error();
            tracing::error!("{} of host memory stays mapped: {error}", format_size(arena.length as u64));
        }
    }

    /// Makes an arena of `length` bytes, outside the lock.
    fn grow(&self, _resizing: &Resizing<'_>, length: u64) -> Result<(), HostPoolError> {
        let refused = |why| HostPoolError::Map { wanted: length, why };
        let began = now();
        let bytes = usize::try_from(length).map_err(|error| refused(error.to_string()))?;
        let address = prefault::map(bytes).map_err(|error| refused(error.to_string()))?;
        prefault::prefault(address, bytes, self.config.threads);
        let pinned = self.pin(address, bytes);
        let mut state = self.state();
        let free = BTreeMap::from([(0, bytes)]);
        state.arenas.push(Arena { address, length: bytes, pinned, free });
        let capacity = state.capacity();
        drop(state);
        tracing::debug!(
            "the pool of host memory grew by {} to {} in {}",
            format_size(length),
            format_size(capacity),
            format_nanos(now() - began)
        );
        Ok(())
    }
}

impl Drop for HostPool {
    fn drop(&mut self) {
        if self.forked() {
            return;
        }
        // What a block still uses stays mapped: its holder may yet touch it.
        let arenas = std::mem::take(&mut self.state().arenas);
        for arena in arenas.iter().filter(|arena| arena.unused()) {
            self.unmap(arena);
        }
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
