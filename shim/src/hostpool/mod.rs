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
            let length = missing.next_multiple_of(self.config.step).min(self.config.arena as u64).min(left);
            self.grow(&resizing, length)?;
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
            let wanted = promised.saturating_sub(self.capacity()).min(self.config.arena as u64);
            self.grow(
                &resizing,
                length.max(wanted.next_multiple_of(self.config.step).min(self.config.arena as u64).min(left)),
            )?;
        }
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
            let pinned = self.pinner.pin(address.as_ptr(), length);
            if let Err(PinError(why)) = &pinned {
                tracing::warn!(
                    "host memory could not be pinned again, so switches will be 3 to 6 times slower: {why}"
                );
            }
            let mut state = self.state();
            if let Some(arena) = state.arenas.iter_mut().find(|arena| arena.address == address) {
                arena.pinned = pinned.is_ok();
            }
        }
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
        let pinned = self.pinner.pin(address.as_ptr(), bytes);
        let mut state = self.state();
        let warn = pinned.is_err() && !std::mem::replace(&mut state.warned, pinned.is_err());
        let free = BTreeMap::from([(0, bytes)]);
        state.arenas.push(Arena { address, length: bytes, pinned: pinned.is_ok(), free });
        let capacity = state.capacity();
        drop(state);
        if let Err(PinError(why)) = pinned
            && warn
        {
            tracing::warn!(
                "host memory could not be pinned, so switches will be 3 to 6 times slower: {why}. This process may lock {} (RLIMIT_MEMLOCK); if that is less than its GPU memory, raise it (ulimit -l unlimited, LimitMEMLOCK=infinity, docker run --ulimit memlock=-1) and start the process again",
                memlock()
            );
        }
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
mod tests {
    use super::*;
    use std::fs;
    use std::sync::atomic::{AtomicBool, AtomicUsize};
    use std::sync::{Arc, Barrier, mpsc};
    use std::time::Duration;

    const BLOCK: usize = GRANULE as usize;
    const MIB: u64 = 1 << 20;

    #[derive(Default, Clone)]
    struct Count {
        pinned: Arc<AtomicUsize>,
        tried: Arc<AtomicUsize>,
        refuse: bool,
    }

    impl Pinner for Count {
        fn pin(&self, _address: *mut u8, length: usize) -> Result<(), PinError> {
            self.tried.fetch_add(1, Ordering::Relaxed);
            if self.refuse {
                return Err(PinError::new("no".into()));
            }
            self.pinned.fetch_add(length, Ordering::Relaxed);
            Ok(())
        }

        fn unpin(&self, _address: *mut u8, length: usize) {
            self.pinned.fetch_sub(length, Ordering::Relaxed);
        }
    }

    /// A machine without limits, so that a test asks nothing of the one it runs on.
    fn config(arena: usize, limit: Option<u64>) -> HostPoolConfig {
        HostPoolConfig { limit, arena, step: GRANULE, threads: 2, root: "/nowhere/at/all".into() }
    }

    fn pool(arena: usize, limit: Option<u64>) -> (HostPool, Count) {
        let count = Count::default();
        (HostPool::new(config(arena, limit), Box::new(count.clone())), count)
    }

    /// What is in use, in order of address; fails where two blocks share a byte.
    fn spans<'a>(blocks: impl IntoIterator<Item = &'a HostBlock>) -> Vec<(usize, usize)> {
        let mut spans: Vec<_> =
            blocks.into_iter().map(|block| (block.as_ptr() as usize, block.length)).collect();
        spans.sort_unstable();
        assert!(spans.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "overlap: {spans:x?}");
        assert!(spans.iter().all(|(address, length)| address % BLOCK == 0 && length % BLOCK == 0));
        spans
    }

    /// Free and used bytes are the capacity, free extents do not touch, and all is free when none is used.
    fn audit(pool: &HostPool, blocks: &[HostBlock]) {
        let used: usize = spans(blocks).iter().map(|(_, length)| length).sum();
        let state = pool.state();
        let free: usize = state.arenas.iter().flat_map(|arena| arena.free.values()).sum();
        assert_eq!(free + used, state.capacity() as usize);
        for arena in &state.arenas {
            let gaps: Vec<_> = arena.free.iter().collect();
            assert!(gaps.iter().all(|(_, length)| **length > 0));
            assert!(gaps.windows(2).all(|pair| pair[0].0 + pair[0].1 < *pair[1].0), "not joined: {gaps:?}");
        }
        if blocks.is_empty() {
            assert!(state.arenas.iter().all(Arena::unused));
        }
    }

    #[test]
    fn any_history_of_blocks_keeps_the_books() {
        let limit = 40 * GRANULE;
        for seed in 1..=60u64 {
            let (pool, count) = pool(8 * BLOCK, Some(limit));
            let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut below = |bound: u64| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random % bound
            };
            let mut blocks = Vec::new();
            for _ in 0..120 {
                match below(10) {
                    0..=4 => match pool.alloc(below(6 * GRANULE) as usize) {
                        Ok(block) => blocks.push(block),
                        Err(HostPoolError::Bound { .. }) => assert!(pool.capacity() > limit - 6 * GRANULE),
                        Err(error) => panic!("{error}"),
                    },
                    5..=8 if !blocks.is_empty() => {
                        pool.free(blocks.swap_remove(below(blocks.len() as u64) as usize));
                    }
                    5..=8 => {}
                    _ => pool.trim(below(limit)),
                }
                assert!(pool.capacity() <= limit, "seed {seed}");
                assert_eq!(count.pinned.load(Ordering::Relaxed) as u64, pool.capacity());
                audit(&pool, &blocks);
            }
            blocks.drain(..).for_each(|block| pool.free(block));
            audit(&pool, &[]);
            pool.trim(0);
            assert_eq!((pool.capacity(), count.pinned.load(Ordering::Relaxed)), (0, 0));
        }
    }

    #[test]
    fn blocks_are_whole_granules_and_never_none() {
        let (pool, _) = pool(8 * BLOCK, None);
        let blocks = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1].map(|length| pool.alloc(length).unwrap());
        assert_eq!(spans(&blocks).iter().map(|(_, length)| length / BLOCK).sum::<usize>(), 6);
        audit(&pool, &blocks);
        for block in blocks {
            // SAFETY: a live block of at least a granule.
            unsafe { block.as_ptr().write_bytes(7, BLOCK) };
            pool.free(block);
        }
        audit(&pool, &[]);
    }

    #[test]
    fn a_block_larger_than_an_arena_gets_one_of_its_own() {
        let (pool, _) = pool(4 * BLOCK, None);
        let block = pool.alloc(9 * BLOCK).unwrap();
        assert_eq!(pool.capacity(), 9 * GRANULE);
        pool.free(block);
        assert!(pool.alloc(usize::MAX).is_err());
    }

    #[test]
    fn the_last_arena_is_smaller_and_the_bound_is_not_passed() {
        let (pool, _) = pool(8 * BLOCK, Some(11 * GRANULE + 5));
        pool.ensure(10 * GRANULE).unwrap();
        assert_eq!(pool.capacity(), 10 * GRANULE);
        let error = pool.ensure(50 * GRANULE).unwrap_err();
        assert_eq!(pool.capacity(), 11 * GRANULE, "all that the bound allows");
        assert!(error.to_string().contains("NVSHARE_HOST_MEMORY=22.00 MiB"), "{error}");
        let blocks: Vec<_> = (0..11).map(|_| pool.alloc(BLOCK).unwrap()).collect();
        assert!(matches!(pool.alloc(BLOCK), Err(HostPoolError::Bound { left: 0, .. })));
        audit(&pool, &blocks);
    }

    #[test]
    fn unused_arenas_make_way_for_a_block_that_none_of_them_holds() {
        let (pool, count) = pool(4 * BLOCK, Some(8 * GRANULE));
        pool.ensure(8 * GRANULE).unwrap();
        let block = pool.alloc(6 * BLOCK).unwrap();
        assert!(pool.capacity() <= 8 * GRANULE);
        assert_eq!(count.pinned.load(Ordering::Relaxed) as u64, pool.capacity());
        pool.free(block);
    }

    #[test]
    fn trimming_keeps_what_it_was_told_to_and_what_is_in_use() {
        let (pool, count) = pool(4 * BLOCK, None);
        pool.ensure(16 * GRANULE).unwrap();
        let block = pool.alloc(BLOCK).unwrap();
        pool.trim(9 * GRANULE);
        assert_eq!(pool.capacity(), 12 * GRANULE, "a further arena less would be too few");
        pool.trim(0);
        assert_eq!((pool.capacity(), count.pinned.load(Ordering::Relaxed)), (4 * GRANULE, 4 * BLOCK));
        // SAFETY: a live block of a granule.
        unsafe { block.as_ptr().write_bytes(1, BLOCK) };
        pool.free(block);
        pool.trim(0);
        assert_eq!(pool.capacity(), 0);
    }

    #[test]
    fn a_commitment_past_the_bound_is_refused_with_the_bound_in_it() {
        let (pool, _) = pool(8 * BLOCK, Some(10 * GRANULE));
        pool.commit(6 * GRANULE).unwrap();
        let error = pool.commit(5 * GRANULE).unwrap_err().to_string();
        assert!(
            error.contains("8.00 MiB left") && error.contains("NVSHARE_HOST_MEMORY=20.00 MiB"),
            "{error}"
        );
        assert!(pool.commit(u64::MAX).is_err());
        pool.uncommit(6 * GRANULE);
        pool.commit(10 * GRANULE).unwrap();
        assert_eq!(pool.capacity(), 0, "committing takes nothing");
    }

    /// A machine that has `free` bytes to give beyond the reserve.
    struct Machine(PathBuf);

    impl Machine {
        fn new(name: &str, free: u64) -> Self {
            let root = std::env::temp_dir().join(format!("nvshare-hostpool-{}-{name}", std::process::id()));
            fs::create_dir_all(root.join("proc")).unwrap();
            let machine = Self(root);
            machine.has(free);
            machine
        }

        fn has(&self, free: u64) {
            let text = format!("MemTotal: 5120000 kB\nMemAvailable: {} kB\n", (free + 256 * MIB) >> 10);
            fs::write(self.0.join("proc/meminfo"), text).unwrap();
        }

        fn pool(&self) -> HostPool {
            let config = HostPoolConfig { root: self.0.clone(), ..config(8 * BLOCK, None) };
            HostPool::new(config, Box::new(Count::default()))
        }
    }

    impl Drop for Machine {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn growing_does_not_move_the_bound() {
        let machine = Machine::new("grown", 32 * MIB);
        let pool = machine.pool();
        pool.commit(2 * MIB).unwrap();
        pool.ensure(16 * MIB).unwrap();
        machine.has(16 * MIB);
        let refused = pool.commit(40 * MIB).unwrap_err();
        assert!(matches!(refused, HostPoolError::Bound { left, .. } if left == 30 * MIB), "{refused:?}");
        pool.commit(30 * MIB).unwrap();
    }

    #[test]
    fn the_machine_is_not_asked_each_time_but_near_the_bound_and_for_an_arena() {
        let machine = Machine::new("asked", 4096 * MIB);
        let pool = machine.pool();
        pool.commit(2 * MIB).unwrap();
        // Far from the bound: what was measured just now is believed.
        machine.has(0);
        pool.commit(2 * MIB).unwrap();
        // An old measurement is not.
        pool.state().bound.as_mut().unwrap().measured -= 2 * BELIEVED;
        assert!(pool.commit(2 * MIB).is_err());
        // Near the bound no measurement is.
        machine.has(512 * MIB);
        pool.commit(2 * MIB).unwrap();
        machine.has(0);
        assert!(pool.commit(2 * MIB).is_err());
        // Others took what was promised: no block rather than a killed process.
        assert!(matches!(pool.alloc(BLOCK), Err(HostPoolError::Bound { left: 0, .. })));
        machine.has(16 * MIB);
        pool.free(pool.alloc(BLOCK).unwrap());
        assert_eq!(pool.capacity(), 6 * MIB, "all that is promised, in one arena");
    }

    #[test]
    fn memory_that_cannot_be_pinned_is_used_all_the_same() {
        let count = Count { refuse: true, ..Count::default() };
        let pool = HostPool::new(config(2 * BLOCK, None), Box::new(count.clone()));
        let blocks = [pool.alloc(2 * BLOCK).unwrap(), pool.alloc(2 * BLOCK).unwrap()];
        assert!(pool.state().warned);
        for block in blocks {
            // SAFETY: a live block of two granules.
            unsafe { block.as_ptr().write_bytes(3, 2 * BLOCK) };
            pool.free(block);
        }
        pool.trim(0);
        assert_eq!(pool.capacity(), 0);
        assert_eq!(count.tried.load(Ordering::Relaxed), 2);
        assert_eq!(count.pinned.load(Ordering::Relaxed), 0, "what was never pinned is not unpinned");
    }

    #[test]
    fn a_failed_pin_is_told_once_with_the_limit_and_the_remedy() {
        #[derive(Clone, Default)]
        struct Log(Arc<Mutex<Vec<String>>>);
        impl tracing::field::Visit for Log {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                if field.name() == "message" {
                    self.0.lock().unwrap().push(format!("{value:?}"));
                }
            }
        }
        impl tracing::Subscriber for Log {
            fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
                *metadata.level() <= tracing::Level::WARN
            }
            fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
                tracing::span::Id::from_u64(1)
            }
            fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
            fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
            fn event(&self, event: &tracing::Event<'_>) {
                event.record(&mut self.clone());
            }
            fn enter(&self, _: &tracing::span::Id) {}
            fn exit(&self, _: &tracing::span::Id) {}
        }
        let log = Log::default();
        tracing::subscriber::with_default(log.clone(), || {
            let count = Count { refuse: true, ..Count::default() };
            HostPool::new(config(2 * BLOCK, None), Box::new(count)).ensure(6 * GRANULE).unwrap();
        });
        let log = log.0.lock().unwrap();
        assert_eq!(log.len(), 1, "{log:?}");
        for part in ["slower: no.", "RLIMIT_MEMLOCK", "LimitMEMLOCK=infinity"] {
            assert!(log[0].contains(part), "{log:?}");
        }
    }

    #[test]
    fn threads_share_it() {
        let (pool, count) = pool(16 * BLOCK, Some(24 * GRANULE));
        pool.commit(16 * GRANULE).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                let pool = &pool;
                scope.spawn(move || {
                    for round in 0..200 {
                        let length = (1 + (usize::from(thread) + round) % 3) * BLOCK;
                        let block = pool.alloc(length).unwrap();
                        for end in [0, length - 64] {
                            // SAFETY: inside this thread's own block.
                            unsafe { block.as_ptr().add(end).write_bytes(thread, 64) };
                        }
                        std::thread::yield_now();
                        for end in [0, length - 64] {
                            // SAFETY: inside this thread's own block, written above.
                            let bytes = unsafe { std::slice::from_raw_parts(block.as_ptr().add(end), 64) };
                            assert!(bytes.iter().all(|byte| *byte == thread));
                        }
                        pool.free(block);
                    }
                });
            }
        });
        audit(&pool, &[]);
        assert_eq!(pool.capacity(), 16 * GRANULE, "12 granules at once need no second arena");
        assert_eq!(count.pinned.load(Ordering::Relaxed), 16 * BLOCK);
    }

    /// Pins at the pace of a test.
    struct Slow {
        entered: mpsc::Sender<()>,
        go: Mutex<mpsc::Receiver<()>>,
        held: Arc<AtomicBool>,
    }

    impl Pinner for Slow {
        fn pin(&self, _address: *mut u8, _length: usize) -> Result<(), PinError> {
            if self.held.load(Ordering::Acquire) {
                self.entered.send(()).unwrap();
                // Not for ever: a test that fails lets it go, or is stuck and must come to its end.
                let _ = self.go.lock().unwrap().recv_timeout(Duration::from_secs(10));
            }
            Ok(())
        }

        fn unpin(&self, _address: *mut u8, _length: usize) {}
    }

    #[test]
    fn blocks_come_and_go_while_the_pool_grows() {
        let ((entered, pinning), (go, wait)) = (mpsc::channel(), mpsc::channel());
        let held = Arc::new(AtomicBool::new(false));
        let slow = Slow { entered, go: Mutex::new(wait), held: held.clone() };
        let pool = HostPool::new(config(4 * BLOCK, None), Box::new(slow));
        pool.ensure(4 * GRANULE).unwrap();
        pool.commit(GRANULE).unwrap();
        held.store(true, Ordering::Release);
        std::thread::scope(|scope| {
            let go = go;
            scope.spawn(|| pool.ensure(8 * GRANULE).unwrap());
            pinning.recv().unwrap();
            // The new arena is in the making and stays so.
            let all = pool.alloc(4 * BLOCK).unwrap();
            pool.commit(GRANULE).unwrap();
            pool.uncommit(GRANULE);
            // Who finds nothing waits for the arena, or for what comes back before it is ready.
            let (done, got) = mpsc::channel();
            let waiter = &pool;
            scope.spawn(move || done.send(waiter.alloc(BLOCK).unwrap()).unwrap());
            assert!(got.recv_timeout(Duration::from_millis(50)).is_err());
            pool.free(all);
            pool.free(got.recv_timeout(Duration::from_secs(5)).expect("a block was given back"));
            assert_eq!(pool.capacity(), 4 * GRANULE, "still growing");
            go.send(()).unwrap();
        });
        assert_eq!(pool.capacity(), 8 * GRANULE);
    }

    #[test]
    fn a_block_that_fits_no_arena_takes_the_place_of_those_that_are_too_small() {
        let (pool, _) = pool(64 * BLOCK, None);
        pool.commit(4 * GRANULE).unwrap();
        pool.ensure(2 * GRANULE).unwrap();
        pool.ensure(4 * GRANULE).unwrap();
        let block = pool.alloc(4 * BLOCK).unwrap();
        assert_eq!(pool.capacity(), 4 * GRANULE, "as much as is promised and no more");
        pool.free(block);
        // What is in use stays, and what is promised for others is not given up for it.
        let small = [pool.alloc(3 * BLOCK).unwrap(), pool.alloc(BLOCK).unwrap()];
        let large = pool.alloc(2 * BLOCK).unwrap();
        assert_eq!(pool.capacity(), 6 * GRANULE);
        pool.free(large);
        small.into_iter().for_each(|block| pool.free(block));
    }

    #[test]
    fn arenas_are_made_in_steps_up_to_the_bound() {
        let config = HostPoolConfig { step: 8 * GRANULE, ..config(64 * BLOCK, Some(20 * GRANULE)) };
        let pool = HostPool::new(config, Box::new(Count::default()));
        for (wanted, made) in [(1, 8), (8, 8), (9, 16), (17, 20)] {
            pool.ensure(wanted * GRANULE).unwrap();
            assert_eq!(pool.capacity(), made * GRANULE, "for {wanted}");
        }
    }

    #[test]
    fn two_in_need_make_one_arena() {
        let (pool, count) = pool(64 * BLOCK, None);
        pool.commit(4 * GRANULE).unwrap();
        let start = Barrier::new(4);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    start.wait();
                    pool.alloc(BLOCK).unwrap()
                });
            }
        });
        assert_eq!(count.tried.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_child_has_neither_the_memory_nor_the_pool() {
        let (pool, count) = pool(2 * BLOCK, None);
        pool.commit(2 * GRANULE).unwrap();
        let block = pool.alloc(BLOCK).unwrap();
        let address = block.as_ptr();
        let locked = pool.state();
        // SAFETY: the child only loads and stores atomics and asks the kernel, then exits at once.
        let child = unsafe { libc::fork() };
        if child == 0 {
            forget();
            // The lock is held, as it may be at any fork: whoever touches it hangs, and the alarm ends it.
            // SAFETY: as above.
            unsafe { libc::alarm(10) };
            let mut resident = 0;
            // SAFETY: mincore only reads the table of mappings.
            let mapped = unsafe { libc::mincore(address.cast(), BLOCK.min(4096), &mut resident) } == 0;
            let refused = matches!(pool.alloc(BLOCK), Err(HostPoolError::Forked))
                && matches!(pool.commit(1), Err(HostPoolError::Forked))
                && matches!(pool.ensure(1), Err(HostPoolError::Forked))
                && pool.capacity() == 0;
            pool.free(block);
            pool.uncommit(1);
            pool.trim(0);
            std::mem::forget(locked);
            drop(pool);
            let untouched = count.pinned.load(Ordering::Relaxed) == 2 * BLOCK;
            let code = i32::from(mapped) | i32::from(!refused) << 1 | i32::from(!untouched) << 2;
            // SAFETY: no exit handler of the parent's runs.
            unsafe { libc::_exit(code) };
        }
        let mut status = 0;
        // SAFETY: waits for this test's own child.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        drop(locked);
        assert!(libc::WIFEXITED(status), "hung: {status:x}");
        assert_eq!(libc::WEXITSTATUS(status), 0, "1: mapped, 2: not refused, 4: unpinned");
        pool.free(block);
        pool.free(pool.alloc(2 * BLOCK).expect("the parent goes on"));
    }
}
