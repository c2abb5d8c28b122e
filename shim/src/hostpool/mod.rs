//! Host memory for what is evicted: huge pages, touched by several threads, registered with the driver,
//! and kept between switches.
//!
//! cuMemHostAlloc takes 0.36 to 0.57 s per GiB. An anonymous mapping with MADV_HUGEPAGE that eight
//! threads touch and cuMemHostRegister then pins takes 0.05 s, at the same copy speed (DESIGN section 2).
//! The pool grows by *arenas*, and never hands out part of two. The slow part of growing happens outside
//! the lock, so blocks come and go meanwhile.
//!
//! MADV_DONTFORK, because data loaders fork, and pinned pages must not be copied on write.
//! MADV_DONTDUMP, because a core file need not hold everybody's tensors.
//!
//! What the application may need one day is *committed* when it allocates: if host memory could not hold
//! it, the allocation is refused then, and nobody is killed for it later.

mod limits;

use limits::Room;
use nvshare::sync::now;
use nvshare::units::{GRANULE, Nanos, SECOND, format_size};
use std::collections::BTreeMap;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard};

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
            Self::Map { wanted, why } => {
                write!(
                    out,
                    "the kernel gives no {} of host memory for evicted data: {why}",
                    format_size(*wanted)
                )
            }
        }
    }
}

/// How the pool grows and how far.
#[derive(Debug, Clone)]
pub struct HostPoolConfig {
    /// The most bytes, if the user set a bound.
    pub limit: Option<u64>,
    /// Bytes of an arena.
    pub arena: usize,
    /// Threads that touch a new arena.
    pub threads: usize,
}

impl Default for HostPoolConfig {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { limit: None, arena: 512 << 20, threads: cores.min(8) }
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
    fn take(&mut self, length: usize) -> Option<HostBlock> {
        let (offset, gap) = self.free.iter().map(|(o, l)| (*o, *l)).find(|(_, gap)| *gap >= length)?;
        self.free.remove(&offset);
        if gap > length {
            self.free.insert(offset + length, gap - length);
        }
        // SAFETY: the gap lies inside the arena.
        Some(HostBlock { address: unsafe { self.address.add(offset) }, length })
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

#[derive(Default)]
struct State {
    arenas: Vec<Arena>,
    committed: u64,
    probed: Option<(Nanos, Room)>,
    warned: bool,
}

/// The pool.
pub struct HostPool {
    config: HostPoolConfig,
    pinner: Box<dyn Pinner>,
    state: Mutex<State>,
    /// Held while an arena is made, so that two threads in need do not make two.
    growing: Mutex<()>,
}

impl HostPool {
    /// An empty pool.
    pub fn new(config: HostPoolConfig, pinner: Box<dyn Pinner>) -> Self {
        Self { config, pinner, state: Mutex::default(), growing: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Bytes in the pool, free or not.
    pub fn capacity(&self) -> u64 {
        self.state().arenas.iter().map(|arena| arena.length as u64).sum()
    }

    /// Reserves room for `bytes` that may one day be evicted, without taking it.
    ///
    /// # Errors
    /// The bound would be passed.
    pub fn commit(&self, bytes: u64) -> Result<(), HostPoolError> {
        let held = self.capacity();
        let mut state = self.state();
        let wanted = state.committed.saturating_add(bytes);
        // Looking at the machine takes several files: often enough is once a second, and whenever the
        // answer would be no.
        let fresh = state.probed.as_ref().is_some_and(|(when, room)| {
            now().saturating_sub(*when) < SECOND && wanted <= room.bytes.saturating_add(held)
        });
        if !fresh {
            state.probed = Some((now(), limits::probe(Path::new("/"))));
        }
        let (_, room) = state.probed.clone().expect("just probed");
        // What the pool holds already is no longer free on the machine, and is ours to use.
        let (mut most, mut bound) = (room.bytes.saturating_add(held), room.bound);
        if let Some(limit) = self.config.limit
            && limit < most
        {
            (most, bound) = (limit, format!("NVSHARE_HOST_MEMORY={}", format_size(limit)));
        }
        if wanted > most {
            let left = most.saturating_sub(state.committed);
            return Err(HostPoolError::Bound { wanted: bytes, left, bound });
        }
        state.committed = wanted;
        Ok(())
    }

    /// Takes a reservation back.
    pub fn uncommit(&self, bytes: u64) {
        let mut state = self.state();
        state.committed = state.committed.saturating_sub(bytes);
    }

    /// Grows until the pool has `bytes` in all.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn ensure(&self, bytes: u64) -> Result<(), HostPoolError> {
        while self.capacity() < bytes {
            let _growing = self.growing.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let missing = bytes.saturating_sub(self.capacity());
            if missing > 0 {
                self.grow(missing.min(self.config.arena as u64) as usize)?;
            }
        }
        Ok(())
    }

    /// A block of `length` bytes, a whole number of granules.
    ///
    /// # Errors
    /// Nothing free is large enough, and the kernel gives no more.
    pub fn alloc(&self, length: usize) -> Result<HostBlock, HostPoolError> {
        loop {
            if let Some(block) = self.take(length) {
                return Ok(block);
            }
            let _growing = self.growing.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            // Somebody may have grown it while this thread waited for its turn.
            if let Some(block) = self.take(length) {
                return Ok(block);
            }
            self.grow(length.max(self.config.arena))?;
        }
    }

    fn take(&self, length: usize) -> Option<HostBlock> {
        self.state().arenas.iter_mut().find_map(|arena| arena.take(length))
    }

    /// Takes a block back. Its memory stays for the next one.
    pub fn free(&self, block: HostBlock) {
        let mut state = self.state();
        match state.arenas.iter_mut().find(|arena| arena.contains(&block)) {
            Some(arena) => arena.give(&block),
            None => tracing::error!("a host block at {:p} is in no arena: it is leaked", block.as_ptr()),
        }
    }

    /// Gives unused arenas back to the kernel until no more than `keep` bytes are left, if it can.
    pub fn trim(&self, keep: u64) {
        let mut gone = Vec::new();
        {
            let mut state = self.state();
            let mut held: u64 = state.arenas.iter().map(|arena| arena.length as u64).sum();
            while held > keep {
                let Some(index) = state.arenas.iter().position(Arena::unused) else { break };
                let arena = state.arenas.swap_remove(index);
                held -= arena.length as u64;
                gone.push(arena);
            }
        }
        gone.into_iter().for_each(|arena| self.unmap(&arena));
    }

    fn unmap(&self, arena: &Arena) {
        if arena.pinned {
            self.pinner.unpin(arena.address.as_ptr(), arena.length);
        }
        // SAFETY: the arena is out of the pool with no block of it in use, so nobody knows the memory.
        unsafe { libc::munmap(arena.address.as_ptr().cast(), arena.length) };
    }

    /// Makes an arena of `length` bytes, outside the lock.
    fn grow(&self, length: usize) -> Result<(), HostPoolError> {
        let length = length.next_multiple_of(GRANULE as usize);
        let address = map(length).map_err(|why| HostPoolError::Map { wanted: length as u64, why })?;
        touch(address, length, self.config.threads);
        let pinned = self.pinner.pin(address.as_ptr(), length);
        let mut state = self.state();
        if let Err(PinError(why)) = &pinned
            && !std::mem::replace(&mut state.warned, true)
        {
            tracing::warn!(
                "host memory could not be pinned, switches will be 3 to 6 times slower: {why}. The limit on locked memory (ulimit -l, LimitMEMLOCK=) is {}",
                memlock()
            );
        }
        state.arenas.push(Arena {
            address,
            length,
            pinned: pinned.is_ok(),
            free: BTreeMap::from([(0, length)]),
        });
        Ok(())
    }
}

impl Drop for HostPool {
    fn drop(&mut self) {
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

/// Maps `length` bytes, aligned to a huge page.
fn map(length: usize) -> Result<NonNull<u8>, String> {
    let huge = GRANULE as usize;
    let whole = length + huge;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing of ours.
    let raw = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            whole,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if raw == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error().to_string());
    }
    let begin = raw as usize;
    let aligned = begin.next_multiple_of(huge);
    let (head, tail) = (aligned - begin, begin + whole - (aligned + length));
    // SAFETY: both ends are parts of the mapping just made, outside the aligned piece.
    unsafe {
        if head > 0 {
            libc::munmap(raw, head);
        }
        if tail > 0 {
            libc::munmap((aligned + length) as *mut libc::c_void, tail);
        }
        // Advice: a kernel that takes none of it costs speed, or room in a core file.
        for advice in [libc::MADV_HUGEPAGE, libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
            libc::madvise(aligned as *mut libc::c_void, length, advice);
        }
    }
    NonNull::new(aligned as *mut u8).ok_or_else(|| "a mapping at address 0".into())
}

/// Touches every page of a new mapping, with several threads: the kernel clears pages no faster than
/// one core each.
fn touch(address: NonNull<u8>, length: usize, threads: usize) {
    let begin = address.as_ptr() as usize;
    let share = length.div_ceil(threads.max(1)).next_multiple_of(GRANULE as usize);
    let touch_part = |from: usize, to: usize| {
        for page in (from..to).step_by(4096) {
            // SAFETY: inside the mapping, which nobody else knows yet.
            unsafe { (page as *mut u8).write_volatile(0) };
        }
    };
    std::thread::scope(|scope| {
        for part in (begin..begin + length).step_by(share) {
            let end = (part + share).min(begin + length);
            let spawned =
                std::thread::Builder::new().name("nvshare-touch".into()).spawn_scoped(scope, move || {
                    let _ = nix::sys::signal::SigSet::all().thread_set_mask();
                    touch_part(part, end);
                });
            if spawned.is_err() {
                // No thread to be had: this one does it.
                touch_part(part, end);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const BLOCK: usize = GRANULE as usize;

    #[derive(Default, Clone)]
    struct Count {
        pinned: Arc<AtomicUsize>,
        refuse: bool,
    }

    impl Pinner for Count {
        fn pin(&self, _address: *mut u8, length: usize) -> Result<(), PinError> {
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

    fn pool(arena: usize, limit: Option<u64>) -> (HostPool, Count) {
        let count = Count::default();
        (HostPool::new(HostPoolConfig { limit, arena, threads: 2 }, Box::new(count.clone())), count)
    }

    #[test]
    fn blocks_do_not_overlap_and_grow_together_again() {
        let (pool, count) = pool(8 * BLOCK, None);
        let blocks: Vec<_> =
            (0..8).map(|index| pool.alloc(if index % 2 == 0 { BLOCK } else { 2 * BLOCK }).unwrap()).collect();
        assert_eq!(pool.capacity(), 16 * GRANULE);
        let mut spans: Vec<_> = blocks.iter().map(|block| (block.as_ptr() as usize, block.length)).collect();
        spans.sort_unstable();
        assert!(spans.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{spans:?}");
        assert!(spans.iter().all(|(address, _)| address % BLOCK == 0));
        for block in blocks {
            // SAFETY: a live block of at least a granule.
            unsafe { block.as_ptr().write_bytes(7, BLOCK) };
            pool.free(block);
        }
        assert!(pool.state().arenas.iter().all(Arena::unused));
        assert_eq!(count.pinned.load(Ordering::Relaxed), 16 * BLOCK);
        pool.trim(8 * GRANULE);
        assert_eq!((pool.capacity(), count.pinned.load(Ordering::Relaxed)), (8 * GRANULE, 8 * BLOCK));
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
        pool.uncommit(6 * GRANULE);
        pool.commit(10 * GRANULE).unwrap();
        assert_eq!(pool.capacity(), 0, "committing takes nothing");
    }

    #[test]
    fn memory_that_cannot_be_pinned_is_used_all_the_same() {
        let config = HostPoolConfig { limit: None, arena: 2 * BLOCK, threads: 1 };
        let pool = HostPool::new(config, Box::new(Count { refuse: true, ..Count::default() }));
        let block = pool.alloc(2 * BLOCK).unwrap();
        pool.free(block);
        pool.trim(0);
        assert_eq!(pool.capacity(), 0);
    }

    #[test]
    fn a_child_and_a_core_file_do_not_get_it() {
        let (pool, _) = pool(2 * BLOCK, None);
        let block = pool.alloc(BLOCK).unwrap();
        let address = block.as_ptr() as usize;
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        let flags = maps.lines().find_map(|line| {
            if let Some((begin, end)) = line.split_whitespace().next().and_then(|range| range.split_once('-'))
            {
                let parse = |text| usize::from_str_radix(text, 16);
                if let (Ok(begin), Ok(end)) = (parse(begin), parse(end)) {
                    inside = (begin..end).contains(&address);
                }
            }
            line.strip_prefix("VmFlags:").filter(|_| inside)
        });
        let flags: Vec<_> = flags.unwrap().split_whitespace().collect();
        assert!(flags.contains(&"dc") && flags.contains(&"dd"), "{flags:?}");
        pool.free(block);
    }

    #[test]
    fn threads_share_it() {
        let (pool, _) = pool(16 * BLOCK, None);
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                let pool = &pool;
                scope.spawn(move || {
                    for _ in 0..50 {
                        let block = pool.alloc(BLOCK).unwrap();
                        // SAFETY: this thread's own block.
                        let bytes = unsafe { std::slice::from_raw_parts_mut(block.as_ptr(), BLOCK) };
                        bytes[..64].fill(thread);
                        std::thread::yield_now();
                        assert!(bytes[..64].iter().all(|byte| *byte == thread));
                        pool.free(block);
                    }
                });
            }
        });
        assert_eq!(pool.capacity(), 16 * GRANULE);
    }
}
