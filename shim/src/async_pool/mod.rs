//! Stream-ordered memory: cuMemAllocAsync, cuMemFreeAsync, and their pools.
//!
//! Memory in the driver's own pools cannot be moved, so nvshare serves the application's pools itself. A pool's memory
//! consists of segments from [`Device::allocate`], which move like other memory, divided into blocks. The driver's pool stays
//! empty; its handle identifies nvshare's pool, and it keeps the settings that nvshare does not use.
//!
//! | part | what it holds |
//! |---|---|
//! | [`nvshare::stream_arena`] | the blocks of one pool, and which stream may get each |
//! | [`progress`] | the progress of the streams in which memory was freed |
//! | here | the pools of this process, and where their memory comes from and goes |
//!
//! **An allocation takes**, in the order of the driver's documentation: memory that was freed in the same stream, or that any
//! stream may use; memory whose freeing stream has passed the free by now (if the pool allows it); a new segment. If there is no
//! room for a segment: the unused segments of all pools are released, and a new segment is tried again; then memory freed in
//! another stream, for which this stream is made to wait (if the pool allows it); at last all frees are waited for.
//!
//! **Unused memory** up to its release threshold stays in the pool. The driver releases the rest when the
//! application synchronises. nvshare would have to hook very frequent calls for that, so it
//! releases the rest when it makes a difference: when the application queries memory (cuMemGetInfo, attributes of the
//! pool), when any allocation finds no room, when the GPU goes to another client ([`drained`]: otherwise unused memory would be
//! copied), and at cuMemPoolTrimTo and cuMemPoolDestroy.
//!
//! **Locks.** There is one lock for all pools, because a block may be freed in a stream of any GPU. A thread that holds it
//! neither passes the gate nor waits for the GPU.

mod progress;

pub use progress::StreamRef;

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::memory::device::Device;
use crate::memory::devices;
use crate::thread::ThreadId;
use nvshare::stream_arena::{self, Arena, Freed, StreamId};
use nvshare::units::{GRANULE, format_size};
use progress::StreamProgress;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Bytes that a pool takes at a time, if there is room, as the driver's own pools do: thousands of small tensors then share a
/// mapping.
const SEGMENT: u64 = 32 << 20;

/// One pool.
struct Pool {
    /// The driver's handle; another pool may get it when this one is destroyed.
    handle: CUmemoryPool,
    destroyed: bool,
    /// While the driver is being asked to destroy it: a number that identifies it, because the handle may already be reused.
    destroying: Option<u64>,
    device: CUdevice,
    /// The most bytes that it may hold; `None`: no limit.
    limit: Option<u64>,
    /// How many unused bytes it keeps.
    threshold: u64,
    /// Whether freed memory may be reused in another stream once the freeing stream has passed the free.
    opportunistic: bool,
    /// Whether a stream may be made to wait for another stream's free.
    internal: bool,
    arena: Arena,
}

impl Pool {
    fn new(handle: CUmemoryPool, device: CUdevice, limit: u64) -> Self {
        Self {
            handle,
            destroyed: false,
            destroying: None,
            device,
            limit: (limit > 0).then_some(limit),
            threshold: 0,
            opportunistic: true,
            internal: true,
            arena: Arena::default(),
        }
    }

    fn is_named(&self, handle: CUmemoryPool) -> bool {
        self.handle == handle && !self.destroyed && self.destroying.is_none()
    }

    fn keeps(&self) -> u64 {
        if self.destroyed { 0 } else { self.threshold }
    }

    /// The size of a segment for an allocation of `bytes`, if `free` bytes and the pool's limit allow one.
    fn segment_for(&self, bytes: u64, free: u64) -> Option<u64> {
        let allowed = self.limit.map_or(u64::MAX, |limit| limit.saturating_sub(self.arena.reserved.now));
        let room = free.min(allowed);
        let least = stream_arena::rounded(bytes)?.checked_next_multiple_of(GRANULE)?;
        [least.max(SEGMENT), least].into_iter().find(|size| *size <= room)
    }
}

/// All pools of the process.
#[derive(Default)]
struct Pools {
    pools: Vec<Pool>,
    progress: StreamProgress,
    /// Allocations of cuMemAlloc that cuMemFreeAsync has freed, and the point in the stream that must be passed.
    whole: Vec<(CUdevice, CUdeviceptr, Freed)>,
    /// Those whose point was passed; they must still be released.
    over: Vec<(CUdevice, CUdeviceptr)>,
    /// How often a pool was to be destroyed so far.
    hidden: u64,
}

static POOLS: Mutex<Option<Pools>> = Mutex::new(None);

/// Whether stream-ordered memory was ever used: most processes never do.
static USED: AtomicBool = AtomicBool::new(false);

fn with_pools<T>(action: impl FnOnce(&mut Pools) -> T) -> T {
    let mut pools = nvshare::sync::lock(&POOLS);
    action(pools.get_or_insert_default())
}

impl Pools {
    fn by_handle(&mut self, handle: CUmemoryPool) -> Option<&mut Pool> {
        self.pools.iter_mut().find(|pool| pool.is_named(handle))
    }

    fn owner(&mut self, address: CUdeviceptr) -> Option<&mut Pool> {
        self.pools.iter_mut().find(|pool| pool.arena.owns(address))
    }

    /// Updates the progress of the streams, and settles the frees that they have passed.
    fn advance(&mut self, driver: &Driver) {
        self.progress.advance(driver);
        self.settle();
    }

    /// Makes memory whose freeing stream has passed the free available to all streams.
    fn settle(&mut self) {
        for (stream_id, done) in self.progress.progress() {
            self.pools.iter_mut().for_each(|pool| pool.arena.settle(stream_id, done));
            let Self { whole, over, .. } = self;
            whole.retain(|(device, base, freed)| {
                let past = freed.stream_id == stream_id && freed.ticket <= done;
                if past {
                    over.push((*device, *base));
                }
                !past
            });
        }
    }

    /// Takes out the unused segments on a GPU, except the bytes that each pool keeps. The caller releases them without the lock.
    fn unused(&mut self, device: CUdevice, keeps: impl Fn(&Pool) -> u64) -> Vec<CUdeviceptr> {
        let mut unused: Vec<_> =
            self.over.extract_if(.., |(of, _)| *of == device).map(|(_, base)| base).collect();
        for pool in self.pools.iter_mut().filter(|pool| pool.device == device) {
            unused.extend(pool.arena.trim(keeps(pool)));
        }
        self.pools.retain(|pool| !pool.destroyed || !pool.arena.is_empty());
        unused
    }

    /// Takes memory that a stream may use now, if necessary after updating the progress of other streams.
    fn take(
        &mut self,
        driver: &Driver,
        handle: CUmemoryPool,
        stream_id: StreamId,
        bytes: u64,
    ) -> Result<Option<CUdeviceptr>, CuResult> {
        let pool = self.by_handle(handle).ok_or(CuResult::INVALID_VALUE)?;
        let found = pool.arena.take(stream_id, bytes);
        if found.is_some() || !pool.opportunistic || !pool.arena.is_pending() {
            return Ok(found);
        }
        self.advance(driver);
        let pool = self.by_handle(handle).ok_or(CuResult::INVALID_VALUE)?;
        Ok(pool.arena.take(stream_id, bytes))
    }

    /// Takes memory from a new segment, if there is room for one.
    fn grow(
        &mut self,
        device: &Device,
        handle: CUmemoryPool,
        stream_id: StreamId,
        bytes: u64,
    ) -> Result<Option<CUdeviceptr>, CuResult> {
        let pool = self.by_handle(handle).ok_or(CuResult::INVALID_VALUE)?;
        let Some(size) = pool.segment_for(bytes, device.figures().free) else { return Ok(None) };
        // A pool belongs to its GPU, not to a context: its memory is released with the GPU's last context.
        match device.allocate(size, CUcontext::NULL) {
            Ok(base) => pool.arena.add(base, size),
            Err(CuResult::OUT_OF_MEMORY) => return Ok(None),
            Err(result) => return Err(result),
        }
        Ok(pool.arena.take(stream_id, bytes))
    }

    /// Takes memory that another stream has not passed the free of yet, and makes this stream wait for that.
    fn take_behind(
        &mut self,
        driver: &Driver,
        handle: CUmemoryPool,
        place: &StreamRef,
        bytes: u64,
    ) -> Result<Option<CUdeviceptr>, CuResult> {
        let Self { pools, progress, .. } = self;
        let pool = pools.iter_mut().find(|pool| pool.is_named(handle));
        let pool = pool.ok_or(CuResult::INVALID_VALUE)?;
        if !pool.internal {
            return Ok(None);
        }
        let found =
            pool.arena.pending(bytes).into_iter().find(|(_, freed)| progress.follow(driver, *freed, place));
        Ok(found.and_then(|(address, _)| pool.arena.take_at(address, bytes)))
    }
}

fn release(device: &Device, unused: Vec<CUdeviceptr>) -> bool {
    for base in &unused {
        device.free_idle(*base);
    }
    !unused.is_empty()
}

/// cuMemAllocFromPoolAsync from a pool that nvshare serves on that GPU.
///
/// # Errors
/// As the driver's own. For OUT_OF_MEMORY the log says why.
pub fn allocate(
    device: &Device,
    handle: CUmemoryPool,
    place: &StreamRef,
    bytes: u64,
) -> Result<CUdeviceptr, CuResult> {
    USED.store(true, Ordering::Relaxed);
    let driver = device.driver;
    let stream_id = with_pools(|pools| pools.progress.of(place));
    let take_or_grow = |pools: &mut Pools| match pools.take(driver, handle, stream_id, bytes)? {
        None => pools.grow(device, handle, stream_id, bytes),
        found => Ok(found),
    };
    if let Some(address) = with_pools(take_or_grow)? {
        return Ok(address);
    }
    if reclaim(device)
        && let Some(address) = with_pools(|pools| pools.grow(device, handle, stream_id, bytes))?
    {
        return Ok(address);
    }
    if let Some(address) = with_pools(|pools| pools.take_behind(driver, handle, place, bytes))? {
        return Ok(address);
    }
    for event in with_pools(|pools| pools.progress.last_marks(driver)) {
        // Fails if its context is broken, and then there is no work to wait for.
        let _ = driver.event_synchronize(event);
    }
    if let Some(address) = with_pools(take_or_grow)? {
        return Ok(address);
    }
    reclaim(device);
    device.await_frees();
    with_pools(|pools| match pools.grow(device, handle, stream_id, bytes)? {
        None => Err(refusal(device, pools.by_handle(handle), bytes)),
        Some(address) => Ok(address),
    })
}

fn refusal(device: &Device, pool: Option<&mut Pool>, bytes: u64) -> CuResult {
    let (limit, reserved, used) =
        pool.map_or((None, 0, 0), |pool| (pool.limit, pool.arena.reserved.now, pool.arena.used.now));
    tracing::warn!(
        gpu = %device.gpu,
        "a stream-ordered allocation of {} is refused: its pool has {}{}, of which {} is in use, and the GPU has \
         {} left for this process{}",
        format_size(bytes),
        format_size(reserved),
        limit.map(|limit| format!(" of at most {}", format_size(limit))).unwrap_or_default(),
        format_size(used),
        format_size(device.figures().free),
        device.limit_text().map(|limit| format!(", whose memory limit is {limit}")).unwrap_or_default(),
    );
    CuResult::OUT_OF_MEMORY
}

/// cuMemFreeAsync. `None` if the address is not nvshare's.
pub fn free_in_order(driver: &Driver, place: &StreamRef, address: CUdeviceptr) -> Option<CuResult> {
    let freed = with_pools(|pools| {
        if pools.whole.iter().any(|(_, base, _)| *base == address) {
            return Some((CuResult::INVALID_VALUE, None));
        }
        let pool = pools.owner(address)?;
        if pool.arena.containing(address).is_none_or(|live| live.base != address) {
            return Some((CuResult::INVALID_VALUE, None));
        }
        let ended = pool.destroyed.then_some(pool.device);
        let freed = pools.progress.free(driver, place);
        pools.owner(address)?.arena.give(address, Some(freed));
        Some((CuResult::SUCCESS, ended))
    });
    if let Some((result, ended)) = freed {
        ended.and_then(devices::of_device).iter().for_each(|device| collect(device));
        return Some(result);
    }
    // Memory of cuMemAlloc may be freed in stream order too.
    let begins = |device: &Arc<Device>| {
        device.memory().containing(address).is_some_and(|allocation| allocation.base == address)
    };
    let device = devices::all().into_iter().find(begins)?;
    USED.store(true, Ordering::Relaxed);
    with_pools(|pools| {
        let freed = pools.progress.free(driver, place);
        pools.whole.push((device.ordinal, address, freed));
        // Earlier ones may be passed by now.
        pools.advance(driver);
    });
    collect(&device);
    Some(CuResult::SUCCESS)
}

/// cuMemFree of stream-ordered memory, which the application must have ceased to use. `None` if the address is not in a
/// pool.
pub fn free_now(address: CUdeviceptr) -> Option<CuResult> {
    if !USED.load(Ordering::Relaxed) {
        return None;
    }
    let (result, ended) = with_pools(|pools| {
        if pools.whole.iter().any(|(_, base, _)| *base == address) {
            return Some((CuResult::INVALID_VALUE, None));
        }
        let pool = pools.owner(address)?;
        let given = pool.arena.give(address, None);
        let result = if given { CuResult::SUCCESS } else { CuResult::INVALID_VALUE };
        Some((result, pool.destroyed.then_some(pool.device)))
    })?;
    ended.and_then(devices::of_device).iter().for_each(|device| collect(device));
    Some(result)
}

/// Where an address lies.
pub enum Found {
    /// In an allocation: its address, bytes, and pool.
    Live(CUdeviceptr, u64, CUmemoryPool),
    /// In memory of a pool that is not allocated.
    Unused,
}

/// Whether an allocation from a pool begins at an address.
pub fn begins(address: CUdeviceptr) -> bool {
    matches!(find(address), Some(Found::Live(base, ..)) if base == address)
}

/// Where an address lies; `None` if not in memory of a pool.
pub fn find(address: CUdeviceptr) -> Option<Found> {
    if !USED.load(Ordering::Relaxed) {
        return None;
    }
    with_pools(|pools| {
        let pool = pools.owner(address)?;
        let handle = pool.handle;
        let live = pool.arena.containing(address);
        Some(live.map_or(Found::Unused, |live| Found::Live(live.base, live.size, handle)))
    })
}

// --- Releasing unused memory --------------------------------------------------------------------

/// Releases the unused memory of a GPU's pools beyond their thresholds.
pub fn collect(device: &Device) {
    if USED.load(Ordering::Relaxed) {
        let unused = with_pools(|pools| {
            pools.advance(device.driver);
            pools.unused(device.ordinal, Pool::keeps)
        });
        release(device, unused);
    }
}

/// Releases all unused memory of a GPU's pools, because an allocation found no room. False if there is none.
pub fn reclaim(device: &Device) -> bool {
    let unused = with_pools(|pools| {
        pools.advance(device.driver);
        pools.unused(device.ordinal, |_| 0)
    });
    release(device, unused)
}

/// Releases the unused memory of a GPU's pools beyond their thresholds, because all work is done and the GPU goes to another
/// client: otherwise it would be evicted.
pub fn drained(device: &Device) {
    if USED.load(Ordering::Relaxed) {
        let unused = with_pools(|pools| {
            pools.progress.drained(device.ordinal);
            pools.settle();
            pools.unused(device.ordinal, Pool::keeps)
        });
        release(device, unused);
    }
}

/// Marks the end of a stream that is about to be destroyed, because its work goes on.
pub fn stream_ends(driver: &Driver, stream: CUstream) {
    if USED.load(Ordering::Relaxed) {
        with_pools(|pools| pools.progress.end_stream(driver, stream));
    }
}

/// Marks the ends of the calling thread's own default streams, because the thread ends and their work goes on.
pub fn thread_ended(thread: ThreadId) {
    if USED.load(Ordering::Relaxed)
        && let Ok(driver) = Driver::get()
    {
        with_pools(|pools| {
            if pools.progress.end_thread(driver, thread) {
                // The streams of threads that have ended earlier may be done.
                pools.advance(driver);
            }
        });
    }
}

/// Drops the streams of a context that is being destroyed, whose work is done. The pools belong to the GPU and stay.
pub fn context_ended(context: CUcontext) {
    if USED.load(Ordering::Relaxed) {
        with_pools(|pools| {
            pools.progress.end_context(context);
            pools.settle();
        });
    }
}

/// Drops the default streams of a green context that was destroyed. Its work goes on.
pub fn green_ended(context: CUcontext) {
    if USED.load(Ordering::Relaxed) {
        with_pools(|pools| pools.progress.end_green(context));
    }
}

/// Drops all memory of a GPU whose last context was destroyed.
pub fn device_ended(device: CUdevice, context: CUcontext) {
    context_ended(context);
    with_pools(|pools| {
        pools.whole.retain(|(of, ..)| *of != device);
        pools.over.retain(|(of, _)| *of != device);
        pools.pools.iter_mut().filter(|pool| pool.device == device).for_each(|pool| pool.arena.clear());
        pools.pools.retain(|pool| !pool.destroyed || !pool.arena.is_empty());
    });
}

// --- The pools themselves -----------------------------------------------------------------------

/// Adds a pool that nvshare serves.
pub fn made(handle: CUmemoryPool, device: CUdevice, limit: u64) {
    with_pools(|pools| {
        if pools.by_handle(handle).is_none() {
            pools.pools.push(Pool::new(handle, device, limit));
        }
    });
}

/// The GPU of a pool that nvshare serves. `None` for a pool that the driver serves: one that other processes can open, that is
/// on the host or managed, or whose GPU this process has not attached to.
pub fn gpu_of(driver: &Driver, handle: CUmemoryPool) -> Option<Arc<Device>> {
    if crate::memory::unmovable::wanted() {
        return None;
    }
    let known = || with_pools(|pools| pools.by_handle(handle).map(|pool| pool.device));
    if let Some(device) = known() {
        return devices::of_device(device);
    }
    let is_default = |device: &Arc<Device>| driver.device_default_mem_pool(device.ordinal) == Ok(handle);
    let device = devices::all().into_iter().find(is_default)?;
    made(handle, device.ordinal, 0);
    Some(device)
}

/// Destroys a pool with `call`. Its allocations stay valid, and its memory is released with the last of them.
///
/// The driver may reuse the handle as soon as the pool is destroyed. So the pool is hidden before the call, and shown again
/// if the driver refuses; the application may not use a pool while it is being destroyed.
/// The caller [releases](collect) the unused memory of the GPU that this returns.
pub fn destroy(handle: CUmemoryPool, call: impl FnOnce() -> CuResult) -> (CuResult, Option<Arc<Device>>) {
    let hidden = with_pools(|pools| {
        pools.hidden += 1;
        let name = pools.hidden;
        let pool = pools.by_handle(handle)?;
        pool.destroying = Some(name);
        Some(name)
    });
    let result = call();
    let device = with_pools(|pools| {
        let pool = pools.pools.iter_mut().find(|pool| hidden.is_some() && pool.destroying == hidden)?;
        pool.destroying = None;
        pool.destroyed = result.is_success();
        pool.destroyed.then_some(pool.device)
    });
    with_pools(|pools| pools.pools.retain(|pool| !pool.destroyed || !pool.arena.is_empty()));
    (result, device.and_then(devices::of_device))
}

/// cuMemPoolTrimTo.
pub fn trim_to(device: &Device, handle: CUmemoryPool, keep: u64) {
    let unused = with_pools(|pools| {
        pools.advance(device.driver);
        pools.by_handle(handle).map(|pool| pool.arena.trim(keep))
    });
    release(device, unused.unwrap_or_default());
}

/// An attribute that says how much memory a pool has, which the driver cannot know.
pub fn attribute(device: &Device, handle: CUmemoryPool, attribute: CUmemPool_attribute) -> Option<u64> {
    collect(device);
    with_pools(|pools| {
        let arena = &pools.by_handle(handle)?.arena;
        match attribute {
            CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT => Some(arena.reserved.now),
            CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH => Some(arena.reserved.high),
            CU_MEMPOOL_ATTR_USED_MEM_CURRENT => Some(arena.used.now),
            CU_MEMPOOL_ATTR_USED_MEM_HIGH => Some(arena.used.high),
            _ => None,
        }
    })
}

/// Records an attribute that the driver has accepted.
pub fn set_attribute(handle: CUmemoryPool, attribute: CUmemPool_attribute, value: u64) {
    with_pools(|pools| {
        let Some(pool) = pools.by_handle(handle) else { return };
        match attribute {
            CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC => pool.opportunistic = value != 0,
            CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES => pool.internal = value != 0,
            CU_MEMPOOL_ATTR_RELEASE_THRESHOLD => pool.threshold = value,
            CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH => pool.arena.reserved.reset_high(),
            CU_MEMPOOL_ATTR_USED_MEM_HIGH => pool.arena.used.reset_high(),
            _ => {}
        }
    });
}
