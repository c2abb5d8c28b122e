//! Stream-ordered memory: cuMemAllocAsync, cuMemFreeAsync, and the pools between them.
//!
//! What the driver's own pools hold cannot be moved. So a pool of an application's is served from here: its memory
//! are segments of [`Device::allocate`], which move like all else, cut into blocks. The driver's pool stays empty;
//! its handle is the name that ours goes by, and it keeps the settings that concern neither.
//!
//! | part | what it holds |
//! |---|---|
//! | [`nvshare::stream_arena`] | the blocks of one pool, and whom each may go to |
//! | [`progress`] | how far the streams have got that memory was freed in |
//! | here | the pools of this process, and where their memory comes from and goes |
//!
//! **Where memory for an allocation is looked for**, in the order of the driver's documentation: what was freed in
//! the same stream, or is anybody's; what other streams turn out to be past (if the pool allows it); a new segment;
//! and where there is no room for one: unused segments of any pool go back and it is tried again; another stream's
//! free that the stream can be made to wait for (if the pool allows it); waiting for all frees.
//!
//! **When unused memory goes back.** Up to its release threshold a pool keeps what it has. The driver gives the rest
//! back when the application synchronises. Here that would put a hook into the most frequent calls there are, so it
//! goes back when it makes a difference: when the application asks how much there is (cuMemGetInfo, the pool's own
//! figures), when an allocation of any kind finds no room, when the GPU goes to others ([`drained`]: then it would be
//! copied for nothing), and at cuMemPoolTrimTo and cuMemPoolDestroy.
//!
//! **Locks.** One for all pools, because a block may be freed in a stream of any GPU. Nobody passes the gate or waits
//! for the GPU with it.

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

/// What a pool takes at a time, if there is room: thousands of small tensors then share a mapping. It is what the
/// driver's own pools take.
const SEGMENT: u64 = 32 << 20;

/// One pool.
struct Pool {
    /// The driver's name for it; another may have it when this one is destroyed.
    handle: CUmemoryPool,
    destroyed: bool,
    /// The driver is being asked to destroy it: by which number of ours it goes meanwhile.
    destroying: Option<u64>,
    device: CUdevice,
    /// The most that it may take; `None`: no limit.
    limit: Option<u64>,
    /// How much it keeps unused.
    threshold: u64,
    /// Whether memory may go to another stream once its free is over.
    opportunistic: bool,
    /// Whether a stream may be made to wait for another's free.
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

    /// What to take for an allocation, if there is room for it.
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
    /// What cuMemAlloc gave and cuMemFreeAsync freed: where it is, and when that is over.
    whole: Vec<(CUdevice, CUdeviceptr, Freed)>,
    /// Of those, what is over, and has still to be released.
    over: Vec<(CUdevice, CUdeviceptr)>,
    /// How many pools were to be destroyed so far.
    hidden: u64,
}

static POOLS: Mutex<Option<Pools>> = Mutex::new(None);

/// Whether there is, or was, anything in the pools: most processes never have any.
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

    /// Looks how far the streams have got.
    fn advance(&mut self, driver: &Driver) {
        self.progress.advance(driver);
        self.settle();
    }

    /// What the streams are past is everybody's.
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

    /// Takes out what nobody uses on a GPU, but for what each pool keeps, to be released without the lock.
    fn unused(&mut self, device: CUdevice, keeps: impl Fn(&Pool) -> u64) -> Vec<CUdeviceptr> {
        let mut unused: Vec<_> =
            self.over.extract_if(.., |(of, _)| *of == device).map(|(_, base)| base).collect();
        for pool in self.pools.iter_mut().filter(|pool| pool.device == device) {
            unused.extend(pool.arena.trim(keeps(pool)));
        }
        self.pools.retain(|pool| !pool.destroyed || !pool.arena.is_empty());
        unused
    }

    /// What a stream may have at once, or once it is seen how far others have got.
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

    /// The same, from a new segment if there is room for one.
    fn grow(
        &mut self,
        device: &Device,
        handle: CUmemoryPool,
        stream_id: StreamId,
        bytes: u64,
    ) -> Result<Option<CUdeviceptr>, CuResult> {
        let pool = self.by_handle(handle).ok_or(CuResult::INVALID_VALUE)?;
        let Some(size) = pool.segment_for(bytes, device.figures().free) else { return Ok(None) };
        // A pool is its GPU's, whatever context uses it: its memory goes with no context but the last.
        match device.allocate(size, CUcontext::NULL) {
            Ok(base) => pool.arena.add(base, size),
            Err(CuResult::OUT_OF_MEMORY) => return Ok(None),
            Err(result) => return Err(result),
        }
        Ok(pool.arena.take(stream_id, bytes))
    }

    /// What another stream has still to get past: this one waits for it.
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

/// cuMemAllocFromPoolAsync, from a pool of ours on that GPU.
///
/// # Errors
/// OUT_OF_MEMORY where the driver's own would say so; the log says why.
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
        // If its context is broken, there is nothing to wait for.
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

/// cuMemFreeAsync. `None` for an address that is none of ours.
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
    // What cuMemAlloc gave may be freed in a stream's order too.
    let begins = |device: &Arc<Device>| {
        device.memory().containing(address).is_some_and(|allocation| allocation.base == address)
    };
    let device = devices::all().into_iter().find(begins)?;
    USED.store(true, Ordering::Relaxed);
    with_pools(|pools| {
        let freed = pools.progress.free(driver, place);
        pools.whole.push((device.ordinal, address, freed));
        // Those before it may be over.
        pools.advance(driver);
    });
    collect(&device);
    Some(CuResult::SUCCESS)
}

/// cuMemFree of stream-ordered memory: the application has seen to it that nobody uses it any more. `None` for
/// an address that is none of the pools'.
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
    /// In an allocation: where it begins, its size, and its pool.
    Live(CUdeviceptr, u64, CUmemoryPool),
    /// In memory of a pool that is nobody's at present.
    Unused,
}

/// Whether an allocation of ours begins at an address.
pub fn begins(address: CUdeviceptr) -> bool {
    matches!(find(address), Some(Found::Live(base, ..)) if base == address)
}

/// Where an address lies, if in a pool's memory.
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

// --- What is unused goes back -------------------------------------------------------------------

/// Gives back what the pools of a GPU have, do not use, and do not keep.
pub fn collect(device: &Device) {
    if USED.load(Ordering::Relaxed) {
        let unused = with_pools(|pools| {
            pools.advance(device.driver);
            pools.unused(device.ordinal, Pool::keeps)
        });
        release(device, unused);
    }
}

/// There is no room: gives back all that the pools of a GPU do not use. False if that is nothing.
pub fn reclaim(device: &Device) -> bool {
    let unused = with_pools(|pools| {
        pools.advance(device.driver);
        pools.unused(device.ordinal, |_| 0)
    });
    release(device, unused)
}

/// All work of a GPU is done, and others are about to have it: what its pools do not use and do not keep goes back
/// instead of being moved out.
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

/// A stream is about to be destroyed. Its work goes on.
pub fn stream_ends(driver: &Driver, stream: CUstream) {
    if USED.load(Ordering::Relaxed) {
        with_pools(|pools| pools.progress.end_stream(driver, stream));
    }
}

/// The calling thread ends, and its own default streams with it. Their work goes on.
pub fn thread_ended(thread: ThreadId) {
    if USED.load(Ordering::Relaxed)
        && let Ok(driver) = Driver::get()
    {
        with_pools(|pools| {
            if pools.progress.end_thread(driver, thread) {
                // Those of threads before it may be through.
                pools.advance(driver);
            }
        });
    }
}

/// A context's work is done, and its streams are going. The pools stay: they are the GPU's.
pub fn context_ended(context: CUcontext) {
    if USED.load(Ordering::Relaxed) {
        with_pools(|pools| {
            pools.progress.end_context(context);
            pools.settle();
        });
    }
}

/// A green context is gone, and its default streams. Its work goes on.
pub fn green_ended(context: CUcontext) {
    if USED.load(Ordering::Relaxed) {
        with_pools(|pools| pools.progress.end_green(context));
    }
}

/// The last context of a GPU has gone, and all memory with it.
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

/// A pool was made whose memory can come from here.
pub fn made(handle: CUmemoryPool, device: CUdevice, limit: u64) {
    with_pools(|pools| {
        if pools.by_handle(handle).is_none() {
            pools.pools.push(Pool::new(handle, device, limit));
        }
    });
}

/// The GPU whose memory a pool is to be served from here. `None` for the driver's business: pools that other
/// processes can open, that are on the host or managed, or whose GPU this process has not attached to.
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

/// Destroys a pool with `call`. What is allocated from it lives on, and its memory goes with the last of that.
///
/// Afterwards the driver may give the handle to another pool at once, so ours is taken out of the way before, and put back
/// if the driver refuses: nobody may use a pool while it is being destroyed.
/// What it does not use any more is [collected](collect) by the caller, of the GPU that this returns.
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

/// An attribute that the driver cannot know: how much memory a pool has.
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

/// An attribute was set that the driver has taken.
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
