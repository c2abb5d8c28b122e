use super::*;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, Barrier, mpsc};
use std::time::Duration;
use tempfile::TempDir;

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

/// A configuration without limits, so that a test does not depend on the machine.
fn config(arena: usize, limit: Option<u64>) -> HostPoolConfig {
    HostPoolConfig { limit, arena, step: GRANULE, threads: 2, limits: Arc::new(Vec::new) }
}

/// The board of a client that shares memory with no other.
#[derive(Default)]
struct Alone(AtomicU64);

impl Board for Alone {
    fn publish(&self, _promise: promises::Promise) {}

    fn others(&self) -> Vec<promises::Promise> {
        Vec::new()
    }

    fn of_process(&self) -> &AtomicU64 {
        &self.0
    }
}

fn pool_of(config: HostPoolConfig, pinner: impl Pinner + 'static) -> HostPool {
    HostPool::new(config, Box::new(pinner), Box::new(Alone::default()))
}

fn pool(arena: usize, limit: Option<u64>) -> (HostPool, Count) {
    let count = Count::default();
    (pool_of(config(arena, limit), count.clone()), count)
}

impl HostMemory {
    /// Its first byte.
    fn as_ptr(&self) -> *mut u8 {
        self.blocks[0].address.as_ptr()
    }
}

/// The blocks in use, in order of address; fails if two overlap.
fn spans<'a>(memory: impl IntoIterator<Item = &'a HostMemory>) -> Vec<(usize, usize)> {
    let blocks = memory.into_iter().flat_map(|memory| &memory.blocks);
    let mut spans: Vec<_> = blocks.map(|block| (block.address.as_ptr() as usize, block.length)).collect();
    spans.sort_unstable();
    assert!(spans.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "overlap: {spans:x?}");
    assert!(spans.iter().all(|(address, length)| address % BLOCK == 0 && length % BLOCK == 0));
    spans
}

/// Checks that free and used bytes add up to the capacity, that no two gaps touch, and that all is free when nothing is used.
fn audit(pool: &HostPool, blocks: &[HostMemory]) {
    let used: usize = spans(blocks).iter().map(|(_, length)| length).sum();
    let state = pool.state();
    let free: usize = state.arenas.values().flat_map(|arena| arena.free.values()).sum();
    assert_eq!((free + used, free as u64), (state.capacity as usize, state.free));
    let gaps = |(_, arena): (&usize, &Arena)| -> Vec<Gap> {
        arena.free.iter().map(|(address, length)| (!arena.pinned, *length, *address)).collect()
    };
    assert_eq!(state.arenas.iter().flat_map(gaps).collect::<BTreeSet<_>>(), state.gaps);
    for arena in state.arenas.values() {
        let gaps: Vec<_> = arena.free.iter().collect();
        assert!(gaps.iter().all(|(_, length)| **length > 0));
        assert!(gaps.windows(2).all(|pair| pair[0].0 + pair[0].1 < *pair[1].0), "not joined: {gaps:?}");
    }
    if blocks.is_empty() {
        assert!(state.arenas.values().all(Arena::unused));
    }
}

#[test]
fn any_sequence_of_allocations_and_frees_keeps_the_pool_consistent() {
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
                0..=4 => match pool.alloc(below(6 * GRANULE)) {
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
    let blocks = [0, 1, GRANULE - 1, GRANULE, GRANULE + 1].map(|length| pool.alloc(length).unwrap());
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
    let block = pool.alloc(9 * GRANULE).unwrap();
    assert_eq!(pool.capacity(), 9 * GRANULE);
    pool.free(block);
    assert!(pool.alloc(u64::MAX).is_err());
}

#[test]
fn the_last_arena_is_smaller_and_the_bound_is_not_passed() {
    let (pool, _) = pool(8 * BLOCK, Some(11 * GRANULE + 5));
    pool.ensure(10 * GRANULE).unwrap();
    assert_eq!(pool.capacity(), 10 * GRANULE);
    let error = pool.ensure(50 * GRANULE).unwrap_err();
    assert_eq!(pool.capacity(), 11 * GRANULE, "all that the bound allows");
    assert!(error.to_string().contains("NVSHARE_HOST_MEMORY=22.00 MiB"), "{error}");
    let blocks: Vec<_> = (0..11).map(|_| pool.alloc(GRANULE).unwrap()).collect();
    assert!(matches!(pool.alloc(GRANULE), Err(HostPoolError::Bound { left: 0, .. })));
    audit(&pool, &blocks);
}

/// Promised memory can be allocated even if the free memory is in pieces, and the pool does not grow for it.
#[test]
fn a_promise_holds_however_fragmented_the_free_memory_is() {
    let (pool, count) = pool(4 * BLOCK, Some(16 * GRANULE));
    pool.commit(16 * GRANULE).unwrap();
    pool.ensure(16 * GRANULE).unwrap();
    let mut all: Vec<_> = (0..16).map(|_| pool.alloc(GRANULE).unwrap()).collect();
    all.sort_unstable_by_key(|block| block.as_ptr());
    // Every other granule is free, in four arenas.
    let (mut kept, mut given) = (Vec::new(), Vec::new());
    for (index, block) in all.into_iter().enumerate() {
        if index % 2 == 0 { kept.push(block) } else { given.push(block) }
    }
    given.into_iter().for_each(|block| pool.free(block));
    let scattered = pool.alloc(8 * GRANULE).unwrap();
    assert_eq!((scattered.blocks.len(), scattered.length()), (8, 8 * GRANULE));
    kept.push(scattered);
    audit(&pool, &kept);
    assert_eq!(count.tried.load(Ordering::Relaxed), 4, "no arena was made for it");
    let error = pool.alloc(GRANULE).unwrap_err();
    assert_eq!(error.left(), 0, "{error}");
    kept.into_iter().for_each(|block| pool.free(block));
    audit(&pool, &[]);
}

#[test]
fn memory_in_several_blocks_is_one_range_of_bytes() {
    let (pool, _) = pool(2 * BLOCK, None);
    pool.ensure(6 * GRANULE).unwrap();
    let memory = pool.alloc(5 * GRANULE).unwrap();
    assert!(memory.blocks.len() >= 3, "the test means several");
    let (from, length) = (GRANULE / 2, 4 * GRANULE);
    let pieces: Vec<_> = memory.pieces(from, length).collect();
    assert_eq!(pieces.iter().map(|(_, length)| length).sum::<u64>(), length);
    let (first, rest) = memory.split_at(3 * GRANULE);
    assert_eq!((first.length(), rest.length()), (3 * GRANULE, 2 * GRANULE));
    let before: Vec<_> = first.pieces(from, 3 * GRANULE - from).collect();
    let after: Vec<_> = rest.pieces(0, length - (3 * GRANULE - from)).collect();
    let total = |pieces: &[(*mut u8, u64)]| pieces.iter().map(|(_, length)| length).sum::<u64>();
    assert_eq!(total(&before) + total(&after), length);
    assert_eq!((before[0], after.last()), (pieces[0], pieces.last()));
    pool.free(first);
    pool.free(rest);
    audit(&pool, &[]);
}

#[test]
fn trimming_keeps_the_requested_bytes_and_blocks_in_use() {
    let (pool, count) = pool(4 * BLOCK, None);
    pool.ensure(16 * GRANULE).unwrap();
    let block = pool.alloc(GRANULE).unwrap();
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
    assert!(error.contains("8.00 MiB left") && error.contains("NVSHARE_HOST_MEMORY=20.00 MiB"), "{error}");
    assert!(pool.commit(u64::MAX).is_err());
    pool.uncommit(6 * GRANULE);
    pool.commit(10 * GRANULE).unwrap();
    assert_eq!(pool.capacity(), 0, "committing takes nothing");
}

/// A machine that has `free` bytes left beyond the reserve.
struct Machine(TempDir);

impl Machine {
    fn new(free: u64) -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("proc")).unwrap();
        let machine = Self(root);
        machine.has(free);
        machine
    }

    fn has(&self, free: u64) {
        let text = format!("MemTotal: 5120000 kB\nMemAvailable: {} kB\n", (free + 256 * MIB) >> 10);
        fs::write(self.0.path().join("proc/meminfo"), text).unwrap();
    }

    fn pool(&self) -> HostPool {
        self.pool_with(Alone::default())
    }

    fn pool_with(&self, board: impl Board + 'static) -> HostPool {
        let root = self.0.path().to_owned();
        let limits = Arc::new(move || HostLimits::probe(&root));
        let config = HostPoolConfig { limits, ..config(8 * BLOCK, None) };
        HostPool::new(config, Box::new(Count::default()), Box::new(board))
    }
}

#[test]
fn growing_does_not_move_the_bound() {
    let machine = Machine::new(32 * MIB);
    let pool = machine.pool();
    pool.commit(2 * MIB).unwrap();
    pool.ensure(16 * MIB).unwrap();
    machine.has(16 * MIB);
    let refused = pool.commit(40 * MIB).unwrap_err();
    assert!(matches!(refused, HostPoolError::Bound { left, .. } if left == 30 * MIB), "{refused:?}");
    pool.commit(30 * MIB).unwrap();
}

#[test]
fn the_bound_is_cached_except_near_it_and_for_an_arena() {
    let machine = Machine::new(4096 * MIB);
    let pool = machine.pool();
    pool.commit(2 * MIB).unwrap();
    // Far from the bound a recent measurement is used.
    machine.has(0);
    pool.commit(2 * MIB).unwrap();
    // An old measurement is not used.
    pool.state().bound.as_mut().unwrap().measured -= 2 * BELIEVED;
    assert!(pool.commit(2 * MIB).is_err());
    // Near the bound none is used.
    machine.has(512 * MIB);
    pool.commit(2 * MIB).unwrap();
    machine.has(0);
    assert!(pool.commit(2 * MIB).is_err());
    // Others have taken what was promised: the allocation fails, so that no process is killed.
    assert!(matches!(pool.alloc(GRANULE), Err(HostPoolError::Bound { left: 0, .. })));
    machine.has(16 * MIB);
    pool.free(pool.alloc(GRANULE).unwrap());
    assert_eq!(pool.capacity(), 6 * MIB, "all that is promised, in one arena");
}

#[test]
fn memory_that_cannot_be_pinned_is_still_used() {
    let count = Count { refuse: true, ..Count::default() };
    let pool = pool_of(config(2 * BLOCK, None), count.clone());
    let blocks = [pool.alloc(2 * GRANULE).unwrap(), pool.alloc(2 * GRANULE).unwrap()];
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
fn a_failed_pin_is_logged_once_with_the_limit_and_the_remedy() {
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
        pool_of(config(2 * BLOCK, None), count).ensure(6 * GRANULE).unwrap();
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
                    let block = pool.alloc(length as u64).unwrap();
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

/// A pinner that blocks until the test lets it go on.
struct Slow {
    entered: mpsc::Sender<()>,
    go: Mutex<mpsc::Receiver<()>>,
    held: Arc<AtomicBool>,
}

impl Pinner for Slow {
    fn pin(&self, _address: *mut u8, _length: usize) -> Result<(), PinError> {
        if self.held.load(Ordering::Acquire) {
            self.entered.send(()).unwrap();
            // Not forever: if the test fails, this thread must end too.
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
    let pool = pool_of(config(4 * BLOCK, None), slow);
    pool.ensure(4 * GRANULE).unwrap();
    pool.commit(GRANULE).unwrap();
    held.store(true, Ordering::Release);
    std::thread::scope(|scope| {
        let go = go;
        scope.spawn(|| pool.ensure(8 * GRANULE).unwrap());
        pinning.recv().unwrap();
        // The new arena is being made, and the pinner keeps it so.
        let all = pool.alloc(4 * GRANULE).unwrap();
        pool.commit(GRANULE).unwrap();
        pool.uncommit(GRANULE);
        // An allocation that finds nothing waits for the arena, or for a block that is freed before that.
        let (done, got) = mpsc::channel();
        let waiter = &pool;
        scope.spawn(move || done.send(waiter.alloc(GRANULE).unwrap()).unwrap());
        assert!(got.recv_timeout(Duration::from_millis(50)).is_err());
        pool.free(all);
        pool.free(got.recv_timeout(Duration::from_secs(5)).expect("a block was given back"));
        assert_eq!(pool.capacity(), 4 * GRANULE, "still growing");
        go.send(()).unwrap();
    });
    assert_eq!(pool.capacity(), 8 * GRANULE);
}

#[test]
fn arenas_are_made_in_steps_up_to_the_bound() {
    let config = HostPoolConfig { step: 8 * GRANULE, ..config(64 * BLOCK, Some(20 * GRANULE)) };
    let pool = pool_of(config, Count::default());
    for (wanted, made) in [(1, 8), (8, 8), (9, 16), (17, 20)] {
        pool.ensure(wanted * GRANULE).unwrap();
        assert_eq!(pool.capacity(), made * GRANULE, "for {wanted}");
    }
}

#[test]
fn arenas_are_registered_again_in_another_context() {
    let (pool, count) = pool(2 * BLOCK, None);
    pool.commit(4 * GRANULE).unwrap();
    let used = pool.alloc(GRANULE).unwrap();
    pool.ensure(4 * GRANULE).unwrap();
    let whole = pool.capacity() as usize;
    assert_eq!(count.pinned.load(Ordering::Relaxed), whole);
    pool.repin(|| {
        assert_eq!(count.pinned.load(Ordering::Relaxed), 0, "before the pinner moves");
        true
    });
    assert_eq!(count.pinned.load(Ordering::Relaxed), whole);
    pool.free(used);
    pool.trim(0);
    assert_eq!(count.pinned.load(Ordering::Relaxed), 0, "unregistered once each");
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
                pool.alloc(GRANULE).unwrap()
            });
        }
    });
    assert_eq!(count.tried.load(Ordering::Relaxed), 1);
}

#[test]
fn a_child_has_neither_the_memory_nor_the_pool() {
    let (pool, count) = pool(2 * BLOCK, None);
    pool.commit(2 * GRANULE).unwrap();
    let block = pool.alloc(GRANULE).unwrap();
    let address = block.as_ptr();
    let locked = pool.state();
    // SAFETY: the child only loads and stores atomics and asks the kernel, then exits at once.
    let child = unsafe { libc::fork() };
    if child == 0 {
        after_fork();
        // The lock is held, as it may be at any fork: an attempt to take it hangs, and the alarm ends the child.
        // SAFETY: as above.
        unsafe { libc::alarm(10) };
        let mut resident = 0;
        // SAFETY: mincore only reads the table of mappings.
        let mapped = unsafe { libc::mincore(address.cast(), BLOCK.min(4096), &mut resident) } == 0;
        let refused = matches!(pool.alloc(GRANULE), Err(HostPoolError::Forked))
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
    pool.free(pool.alloc(2 * GRANULE).expect("the parent goes on"));
}

/// The rows of a page in which several clients publish.
#[derive(Clone, Default)]
struct Rows(Arc<Mutex<BTreeMap<u32, promises::Promise>>>);

struct Row(Rows, u32, AtomicU64);

impl Board for Row {
    fn publish(&self, promise: promises::Promise) {
        self.0.0.lock().unwrap().insert(self.1, promise);
    }

    fn others(&self) -> Vec<promises::Promise> {
        let rows = self.0.0.lock().unwrap();
        rows.iter().filter(|(row, _)| **row != self.1).map(|(_, promise)| *promise).collect()
    }

    fn of_process(&self) -> &AtomicU64 {
        &self.2
    }
}

/// Four clients of one machine, each within its bound: the memory promised to them all exists.
#[test]
fn promises_of_several_clients_are_counted_together() {
    let machine = Machine::new(40 * MIB);
    let rows = Rows::default();
    let pools: Vec<_> =
        (0..4).map(|row| machine.pool_with(Row(rows.clone(), row, AtomicU64::new(0)))).collect();
    for pool in &pools[..3] {
        pool.commit(12 * MIB).unwrap();
    }
    let error = pools[3].commit(12 * MIB).unwrap_err();
    assert_eq!(error.left(), 4 * MIB, "{error:?}");
    assert!(error.to_string().contains("other jobs were promised 36.00 MiB"), "{error}");
    pools[3].commit(4 * MIB).unwrap();
    // Memory that is allocated is measured, and no longer counts as promised.
    pools[0].ensure(12 * MIB).unwrap();
    machine.has(28 * MIB);
    assert!(pools[3].commit(2 * MIB).is_err());
    pools[0].free(pools[0].alloc(12 * MIB).unwrap());
    pools[1].uncommit(6 * MIB);
    pools[3].commit(6 * MIB).unwrap();
    // A client that ends leaves its row and its memory.
    rows.0.lock().unwrap().remove(&2);
    pools[3].commit(12 * MIB).unwrap();
}

/// The pools of one process for its GPUs.
#[test]
fn promises_of_a_process_on_several_gpus_are_counted_together() {
    static PROMISED: AtomicU64 = AtomicU64::new(0);
    struct Gpu;
    impl Board for Gpu {
        fn publish(&self, _promise: promises::Promise) {}

        fn others(&self) -> Vec<promises::Promise> {
            Vec::new()
        }

        fn of_process(&self) -> &AtomicU64 {
            &PROMISED
        }
    }
    let machine = Machine::new(40 * MIB);
    let [first, second] = [(); 2].map(|()| machine.pool_with(Gpu));
    first.commit(30 * MIB).unwrap();
    assert_eq!(second.commit(30 * MIB).unwrap_err().left(), 10 * MIB);
    drop(first);
    second.commit(30 * MIB).unwrap();
}

/// While an arena is made, another process takes memory that was measured before: the arena becomes as large as possible.
#[test]
fn an_arena_ends_where_the_memory_does() {
    let looks = Arc::new(AtomicU64::new(0));
    let counted = looks.clone();
    let limits = Arc::new(move || {
        let taken = counted.fetch_add(1, Ordering::Relaxed) * 2 * MIB;
        let (bytes, bound) = ((20 * MIB).saturating_sub(taken), "the test".to_owned());
        vec![HostLimits { bytes, sharers: Sharers::Machine, bound }]
    });
    let count = Count::default();
    let pool = pool_of(HostPoolConfig { limits, threads: 1, ..config(64 * BLOCK, None) }, count.clone());
    // The first measurement is 20 MiB, and each later one is less by a granule.
    let error = pool.make_free(2 * MIB, 40 * MIB).unwrap_err();
    assert!(matches!(error, HostPoolError::Bound { left, .. } if left == 16 * MIB), "{error:?}");
    assert_eq!((pool.capacity(), count.pinned.load(Ordering::Relaxed) as u64), (16 * MIB, 16 * MIB));
    assert!(looks.load(Ordering::Relaxed) >= 9, "it looked before each step");
    let error = pool.alloc(18 * MIB).unwrap_err();
    assert_eq!(error.left(), 16 * MIB, "{error:?}");
    audit(&pool, &[]);
}

/// If the kernel maps no large piece (RLIMIT_AS, RLIMIT_DATA), several small arenas are made.
#[test]
fn an_arena_that_cannot_be_mapped_whole_is_made_in_pieces() {
    assert!(matches!(pool(BLOCK, None).0.map(1 << 60), Ok((_, length)) if length < 1 << 47));
}
