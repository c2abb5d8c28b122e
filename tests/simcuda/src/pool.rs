//! Stream-ordered memory: pools, and the memory of graphs.
//!
//! A [`Block`] is a range of addresses that comes to life when its stream reaches the allocation, and ends when it
//! reaches the free. Both are operations, so the table answers an access by where the streams have come to: one that
//! runs before the allocation or after the free finds nothing, however the calls were made. What a race allows to be
//! in time is in time here too.
//!
//! **A pool** keeps freed blocks for later allocations of the same size: at once in the same stream, elsewhere once the
//! free has been reached, and if nothing else helps by letting the allocation wait for it. At the next synchronisation
//! it gives back what is more than its release threshold. Blocks are not split and not merged.
//!
//! **A graph's** block keeps its addresses for as long as the graph lives. It gets memory when a launch needs it, and
//! keeps that until it is trimmed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, Weak};

use crate::abi::{Error, Handle, LOCATION_DEVICE, MemLocation, Result};
use crate::driver::{Device, driver, lock};
use crate::graph::{Exec, Graph, Node};
use crate::handles;
use crate::memory::backing::Physical;
use crate::memory::va::{Access, Live, Rights};
use crate::op::Op;
use crate::stream::{Fence, Stream};

/// Sizes are rounded to this.
const UNIT: u64 = 64 << 10;

/// A figure and the highest that it has been.
#[derive(Clone, Copy, Default)]
pub struct Level {
    pub now: u64,
    pub high: u64,
}

impl Level {
    fn change(&mut self, now: u64) {
        *self = Level { now, high: self.high.max(now) };
    }
}

/// A range of addresses that streams bring to life.
pub struct Block {
    pub address: u64,
    pub size: u64,
    live: Arc<Live>,
    owner: Owner,
    /// Whether it is the application's now, as far as calls go.
    allocated: AtomicBool,
}

enum Owner {
    Pool(Arc<Pool>),
    Graph(OfGraph),
}

/// What is known of a graph's block.
struct OfGraph {
    device: &'static Device,
    graph: Handle,
    /// The graph that has its free node.
    freed_in: Mutex<Option<Handle>>,
    /// The only instance of its graph.
    exec: Mutex<Weak<Exec>>,
    /// The last launch that uses it.
    launched: Mutex<Option<Fence>>,
}

impl Block {
    fn new(size: u64, device: usize, rights: Arc<AtomicU64>, owner: Owner) -> Result<Arc<Block>> {
        let live = Arc::new(Live { now: AtomicBool::new(false), rights });
        let mut space = driver()?.memory.space.write().unwrap_or_else(|e| e.into_inner());
        let address = space.reserve_block(size, device, &live)?;
        let block = Arc::new(Block { address, size, live, owner, allocated: AtomicBool::new(false) });
        space.name_block(address, Arc::downgrade(&block));
        Ok(block)
    }

    /// The allocation, or the free, as a stream comes to it.
    pub fn set_live(&self, live: bool) {
        self.live.now.store(live, SeqCst);
    }

    fn back(&self, physical: Physical) -> Result {
        let mut space = driver()?.memory.space.write().unwrap_or_else(|e| e.into_inner());
        space.back_block(self.address, Some(Arc::new(physical)))
    }

    /// The handle of its pool; 0 for a graph's.
    pub fn pool(&self) -> Handle {
        match &self.owner {
            Owner::Pool(pool) => pool.handle,
            Owner::Graph(_) => 0,
        }
    }

    /// The block that begins at an address.
    pub fn at(address: u64) -> Result<Arc<Block>> {
        let space = driver()?.memory.space.read().unwrap_or_else(|e| e.into_inner());
        space.block(address).ok_or(Error::INVALID_VALUE)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Ok(driver) = driver() {
            let mut space = driver.memory.space.write().unwrap_or_else(|e| e.into_inner());
            space.free(self.address, |_| true);
        }
    }
}

/// A pool.
pub struct Pool {
    pub handle: Handle,
    pub location: MemLocation,
    /// The most that it may hold; 0 sets no bound.
    max: u64,
    rights: Arc<AtomicU64>,
    state: Mutex<State>,
}

#[derive(Default)]
pub struct State {
    /// Whether memory freed elsewhere is used again: after events, by chance, by waiting.
    pub reuse: [i32; 3],
    pub threshold: u64,
    pub reserved: Level,
    pub used: Level,
    destroyed: bool,
    in_use: HashMap<u64, Arc<Block>>,
    idle: Vec<Idle>,
}

/// A block that was freed, where and when; without a moment it may be used at once.
struct Idle {
    block: Arc<Block>,
    freed: Option<Fence>,
}

/// How many blocks of all pools are idle: what a synchronisation looks at first.
static IDLE: AtomicUsize = AtomicUsize::new(0);

impl Idle {
    fn ready(&self) -> bool {
        self.freed.as_ref().is_none_or(Fence::reached)
    }

    fn freed_in(&self, stream: &Stream) -> bool {
        self.freed.as_ref().is_some_and(|fence| fence.stream.handle == stream.handle)
    }
}

impl Pool {
    pub fn create(location: MemLocation, max: u64) -> Arc<Pool> {
        let at_home = if location.kind == LOCATION_DEVICE { location.id as usize } else { Rights::HOST };
        let rights = Live::bits(0, at_home, Access::ReadWrite);
        let pool = Pool {
            handle: handles::fresh(),
            location,
            max,
            rights: Arc::new(AtomicU64::new(rights)),
            state: Mutex::new(State { reuse: [1; 3], ..State::default() }),
        };
        Arc::new(pool)
    }

    pub fn state<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        f(&mut lock(&self.state))
    }

    pub fn rights_of(&self, who: usize) -> Access {
        Live::right(self.rights.load(SeqCst), who)
    }

    pub fn set_rights(&self, who: usize, access: Access) {
        let _ = self.rights.fetch_update(SeqCst, SeqCst, |bits| Some(Live::bits(bits, who, access)));
    }

    fn is_at(&self, device: usize) -> bool {
        self.location.kind == LOCATION_DEVICE && self.location.id as usize == device
    }

    fn grow(self: &Arc<Pool>, state: &mut State, size: u64) -> Result<Arc<Block>> {
        let driver = driver()?;
        let reserved = state.reserved.now + size;
        if self.max != 0 && reserved > self.max {
            return Err(Error::OUT_OF_MEMORY);
        }
        let device = if self.location.kind == LOCATION_DEVICE { self.location.id } else { 0 };
        let device = driver.device(device)?;
        let ledger = if self.is_at(device.index) { Some(device.ledger()?) } else { None };
        let block = Block::new(size, device.index, self.rights.clone(), Owner::Pool(self.clone()))?;
        block.back(Physical::new(&driver.memory.backing, 0, size, self.location, ledger)?)?;
        state.reserved.change(reserved);
        Ok(block)
    }

    /// Finds a block for an allocation in `stream`, and a moment that it has to wait for.
    fn find(
        self: &Arc<Pool>,
        state: &mut State,
        size: u64,
        stream: &Stream,
    ) -> Result<(Arc<Block>, Option<Fence>)> {
        let fits = |idle: &Idle| idle.block.size == size;
        let [_, by_chance, by_waiting] = state.reuse.map(|allowed| allowed != 0);
        let now = |idle: &Idle| fits(idle) && (idle.freed_in(stream) || by_chance && idle.ready());
        if let Some(at) = state.idle.iter().position(now) {
            return Ok((take_idle(state, at).block, None));
        }
        if let Ok(block) = self.grow(state, size) {
            return Ok((block, None));
        }
        if by_waiting && let Some(at) = state.idle.iter().position(fits) {
            let Idle { block, freed } = take_idle(state, at);
            return Ok((block, freed));
        }
        trim(state, 0);
        self.grow(state, size).map(|block| (block, None))
    }

    /// `cuMemAllocFromPoolAsync`, outside captures.
    pub fn allocate(self: &Arc<Pool>, size: u64, stream: &Arc<Stream>) -> Result<u64> {
        let size = size.checked_next_multiple_of(UNIT).ok_or(Error::OUT_OF_MEMORY)?;
        let mut state = lock(&self.state);
        let (block, after) = self.find(&mut state, size, stream)?;
        block.allocated.store(true, SeqCst);
        let used = state.used.now + size;
        state.used.change(used);
        state.in_use.insert(block.address, block.clone());
        let address = block.address;
        stream.submit(Op::Alive(block, true), after.into_iter().collect());
        Ok(address)
    }

    /// Takes a block back that is free from `freed` on.
    fn take_back(&self, block: &Arc<Block>, freed: Option<Fence>) {
        let mut state = lock(&self.state);
        let used = state.used.now.saturating_sub(block.size);
        state.used.change(used);
        // Of a pool that is gone, the free's own operation holds the block last.
        if let Some(block) = state.in_use.remove(&block.address)
            && !state.destroyed
        {
            state.idle.push(Idle { block, freed });
            IDLE.fetch_add(1, SeqCst);
        }
    }

    /// Gives back what isn't used until no more than `keep` bytes are held.
    pub fn trim(&self, keep: u64) {
        trim(&mut lock(&self.state), keep);
    }
}

fn take_idle(state: &mut State, at: usize) -> Idle {
    IDLE.fetch_sub(1, SeqCst);
    state.idle.remove(at)
}

fn trim(state: &mut State, keep: u64) {
    let mut at = 0;
    while state.reserved.now > keep && at < state.idle.len() {
        if state.idle[at].ready() {
            let size = take_idle(state, at).block.size;
            state.reserved.change(state.reserved.now - size);
        } else {
            at += 1;
        }
    }
}

/// After the host has waited for something: pools give back what they hold beyond their thresholds.
pub fn synchronized() {
    if IDLE.load(SeqCst) == 0 {
        return;
    }
    let Ok(driver) = driver() else { return };
    for pool in driver.pools.all() {
        let mut state = lock(&pool.state);
        let keep = state.threshold;
        trim(&mut state, keep);
    }
}

/// The pools of a device.
#[derive(Default)]
pub struct DevicePools {
    default: Mutex<Option<Arc<Pool>>>,
    current: Mutex<Option<Arc<Pool>>>,
    graphs: Mutex<Graphs>,
}

impl DevicePools {
    /// Its own pool, which is made when it is first asked for.
    pub fn default_of(device: &Device) -> Result<Arc<Pool>> {
        let mut own = lock(&device.pools.default);
        if let Some(pool) = &*own {
            return Ok(pool.clone());
        }
        let pool = Pool::create(MemLocation { kind: LOCATION_DEVICE, id: device.index as i32 }, 0);
        driver()?.pools.insert(pool.handle, pool.clone());
        *own = Some(pool.clone());
        Ok(pool)
    }

    /// The one that `cuMemAllocAsync` takes from.
    pub fn current_of(device: &Device) -> Result<Arc<Pool>> {
        let current = lock(&device.pools.current).clone();
        current.map_or_else(|| DevicePools::default_of(device), Ok)
    }

    pub fn set_current(device: &Device, pool: Arc<Pool>) -> Result {
        if !pool.is_at(device.index) {
            return Err(Error::INVALID_VALUE);
        }
        *lock(&device.pools.current) = Some(pool);
        Ok(())
    }
}

/// `cuMemPoolDestroy`: what is allocated stays until it is freed.
pub fn destroy(pool: Handle) -> Result {
    let driver = driver()?;
    let found = driver.pools.get(pool).map_err(|_| Error::INVALID_VALUE)?;
    for device in &driver.devices {
        if lock(&device.pools.default).as_ref().is_some_and(|own| own.handle == pool) {
            return Err(Error::INVALID_VALUE);
        }
        lock(&device.pools.current).take_if(|current| current.handle == pool);
    }
    let _ = driver.pools.remove(pool);
    let mut state = lock(&found.state);
    state.destroyed = true;
    let idle = std::mem::take(&mut state.idle);
    IDLE.fetch_sub(idle.len(), SeqCst);
    Ok(())
}

/// `cuMemFreeAsync` of a block, outside captures; `None` frees it at once (`cuMemFree`).
pub fn free(address: u64, stream: Option<&Arc<Stream>>) -> Result {
    let block = Block::at(address)?;
    if !block.allocated.swap(false, SeqCst) {
        return Err(Error::INVALID_VALUE);
    }
    let fence = match stream {
        Some(stream) => Some(stream.submit(Op::Alive(block.clone(), false), Vec::new())),
        None => {
            block.set_live(false);
            None
        }
    };
    match &block.owner {
        Owner::Pool(pool) => pool.take_back(&block, fence),
        Owner::Graph(of) => {
            *lock(&of.launched) = fence;
            lock(&of.device.pools.graphs).escaped.remove(&block.address);
        }
    }
    Ok(())
}

/// The memory of a device's graphs.
#[derive(Default)]
struct Graphs {
    blocks: Vec<Weak<Block>>,
    reserved: Level,
    used_high: u64,
    /// Allocated by a graph and not freed in it.
    escaped: HashMap<u64, Arc<Block>>,
}

impl Graphs {
    fn blocks(&mut self) -> Vec<Arc<Block>> {
        self.blocks.retain(|block| block.strong_count() > 0);
        self.blocks.iter().filter_map(Weak::upgrade).collect()
    }
}

impl OfGraph {
    fn busy(&self) -> bool {
        lock(&self.launched).as_ref().is_some_and(|fence| !fence.reached())
    }
}

/// Makes the block of an allocation node, open to these besides the device itself.
pub fn graph_block(
    device: &'static Device,
    graph: Handle,
    size: u64,
    rights: &[(usize, Access)],
) -> Result<Arc<Block>> {
    let size = size.checked_next_multiple_of(UNIT).ok_or(Error::OUT_OF_MEMORY)?;
    let own = Live::bits(0, device.index, Access::ReadWrite);
    let bits = rights.iter().fold(own, |bits, &(who, access)| Live::bits(bits, who, access));
    let (freed_in, exec, launched) = Default::default();
    let owner = Owner::Graph(OfGraph { device, graph, freed_in, exec, launched });
    let block = Block::new(size, device.index, Arc::new(AtomicU64::new(bits)), owner)?;
    lock(&device.pools.graphs).blocks.push(Arc::downgrade(&block));
    Ok(block)
}

/// The operation of a free node in `graph` for a graph's block.
pub fn graph_free(address: u64, graph: Handle) -> Result<Op> {
    let block = Block::at(address)?;
    let Owner::Graph(of) = &block.owner else { return Err(Error::INVALID_VALUE) };
    let mut freed_in = lock(&of.freed_in);
    if freed_in.is_some() {
        return Err(Error::INVALID_VALUE);
    }
    *freed_in = Some(graph);
    drop(freed_in);
    Ok(Op::Alive(block, false))
}

fn blocks(nodes: &[Arc<Node>], of: bool) -> impl Iterator<Item = (&Arc<Block>, &OfGraph)> {
    nodes.iter().filter_map(move |node| match &node.op {
        Op::Alive(block, live) if *live == of => match &block.owner {
            Owner::Graph(graph) => Some((block, graph)),
            Owner::Pool(_) => None,
        },
        _ => None,
    })
}

/// Whether some of these nodes allocate or free.
pub fn in_graph(nodes: &[Arc<Node>]) -> bool {
    blocks(nodes, true).chain(blocks(nodes, false)).next().is_some()
}

/// A graph with memory has one instance at a time.
pub fn may_instantiate(graph: &Graph) -> Result {
    let nodes = lock(&graph.nodes).clone();
    let taken = blocks(&nodes, true).any(|(_, of)| lock(&of.exec).upgrade().is_some());
    if taken { Err(Error::INVALID_VALUE) } else { Ok(()) }
}

pub fn instantiated(exec: &Arc<Exec>) {
    blocks(&exec.nodes(), true).for_each(|(_, of)| *lock(&of.exec) = Arc::downgrade(exec));
}

/// Gives the graph's blocks memory and launches it. An allocation that is still there from the last launch is in the
/// way, unless the graph was instantiated so that it is freed.
pub fn launch(exec: &Exec, stream: &Arc<Stream>) -> Result {
    const AUTO_FREE_ON_LAUNCH: u64 = 1;
    let nodes = &exec.nodes();
    if stream.capturing.load(SeqCst) && in_graph(nodes) {
        return Err(Error::NOT_SUPPORTED);
    }
    for (block, of) in blocks(nodes, true) {
        if block.allocated.load(SeqCst) {
            if exec.flags & AUTO_FREE_ON_LAUNCH == 0 {
                return Err(Error::INVALID_VALUE);
            }
            free(block.address, Some(stream))?;
        }
        back_for_launch(block, of)?;
    }
    let fence = stream.enqueue(Op::Graph(nodes.clone()))?;
    for (block, of) in blocks(nodes, true) {
        *lock(&of.launched) = fence.clone();
        let escapes = *lock(&of.freed_in) != Some(of.graph);
        let mut graphs = lock(&of.device.pools.graphs);
        if escapes {
            block.allocated.store(true, SeqCst);
            graphs.escaped.insert(block.address, block.clone());
        }
    }
    for (block, of) in blocks(nodes, false) {
        block.allocated.store(false, SeqCst);
        *lock(&of.launched) = fence.clone();
        lock(&of.device.pools.graphs).escaped.remove(&block.address);
    }
    for (_, of) in blocks(nodes, true) {
        let used = graph_level(of.device, true).now;
        let mut graphs = lock(&of.device.pools.graphs);
        graphs.used_high = graphs.used_high.max(used);
    }
    Ok(())
}

fn back_for_launch(block: &Arc<Block>, of: &OfGraph) -> Result {
    let driver = driver()?;
    let mut graphs = lock(&of.device.pools.graphs);
    if driver.memory.space.read().unwrap_or_else(|e| e.into_inner()).block_is_backed(block.address) {
        return Ok(());
    }
    let location = MemLocation { kind: LOCATION_DEVICE, id: of.device.index as i32 };
    let ledger = Some(of.device.ledger()?);
    block.back(Physical::new(&driver.memory.backing, 0, block.size, location, ledger)?)?;
    let reserved = reserved_by(&graphs.blocks());
    graphs.reserved.change(reserved);
    Ok(())
}

fn reserved_by(blocks: &[Arc<Block>]) -> u64 {
    let Ok(driver) = driver() else { return 0 };
    let space = driver.memory.space.read().unwrap_or_else(|e| e.into_inner());
    blocks.iter().filter(|block| space.block_is_backed(block.address)).map(|block| block.size).sum()
}

/// How much memory the graphs of a device use, or hold.
pub fn graph_level(device: &Device, used: bool) -> Level {
    let mut graphs = lock(&device.pools.graphs);
    let blocks = graphs.blocks();
    if used {
        let in_use = |block: &&Arc<Block>| {
            let busy = matches!(&block.owner, Owner::Graph(of) if of.busy());
            busy || block.allocated.load(SeqCst)
        };
        let now = blocks.iter().filter(in_use).map(|block| block.size).sum();
        graphs.used_high = graphs.used_high.max(now);
        return Level { now, high: graphs.used_high };
    }
    let now = reserved_by(&blocks);
    graphs.reserved.change(now);
    graphs.reserved
}

/// Forgets how high it has been.
pub fn reset_graph_high(device: &Device, used: bool) {
    let now = graph_level(device, used).now;
    let mut graphs = lock(&device.pools.graphs);
    if used {
        graphs.used_high = now;
    } else {
        graphs.reserved.high = now;
    }
}

/// Takes the memory of all blocks that nothing uses (`cuDeviceGraphMemTrim`).
pub fn trim_graphs(device: &Device) -> Result {
    let blocks = lock(&device.pools.graphs).blocks();
    for block in blocks {
        let busy = matches!(&block.owner, Owner::Graph(of) if of.busy());
        if !busy && !block.allocated.load(SeqCst) {
            let mut space = driver()?.memory.space.write().unwrap_or_else(|e| e.into_inner());
            space.back_block(block.address, None)?;
        }
    }
    Ok(())
}
