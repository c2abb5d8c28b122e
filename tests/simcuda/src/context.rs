//! Contexts, and which one is current.
//!
//! What streams need of their context is its [`Core`]: the sticky error and the counts that ordering with the legacy
//! stream rests on. The [`Context`] around it is what handles name. A context costs memory on its GPU, and everything
//! that was made in it goes away with it.

use std::cell::RefCell;
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, Weak};

use simstate::{Kind, counters::Count};

use crate::abi::{Error, Handle, Result};
use crate::driver::{Device, driver, lock};
use crate::graph::Capture;
use crate::handles::{self, Cache};
use crate::memory::va::{self, User};
use crate::stream::{self, Fence, Role, Stream};

/// The error of the first operation that failed. It breaks all contexts of the process, and no further one can be made, also when
/// they have all been destroyed, and on another GPU (docs/driver-facts.md).
static FAILED: AtomicI32 = AtomicI32::new(0);

/// The part of a context that its streams share.
pub struct Core {
    pub handle: Handle,
    /// The context that memory, events and modules belong to: of a green context its primary context, else itself.
    pub owner: Handle,
    pub device: &'static Device,
    /// Unfinished operations in blocking streams, and in the legacy stream.
    pub blocking_pending: AtomicUsize,
    pub legacy_pending: AtomicUsize,
    pub streams: Mutex<Vec<Weak<Stream>>>,
    pub captures: Mutex<Vec<Arc<Capture>>>,
    /// The contexts whose allocations this one's kernels may use (`cuCtxEnablePeerAccess`), with their GPUs.
    pub peers: Arc<Mutex<Vec<(Handle, usize)>>>,
    /// The green contexts that were made of it.
    pub greens: Mutex<Vec<Weak<Core>>>,
    /// How many captures are open; the first thing that a launch looks at.
    pub open_captures: AtomicUsize,
    /// Modules that are being loaded into it.
    pub loading: AtomicUsize,
}

impl Core {
    fn new(
        device: &'static Device,
        handle: Handle,
        owner: Handle,
        peers: Arc<Mutex<Vec<(Handle, usize)>>>,
    ) -> Arc<Core> {
        Arc::new(Core {
            handle,
            owner,
            device,
            blocking_pending: AtomicUsize::new(0),
            legacy_pending: AtomicUsize::new(0),
            streams: Mutex::default(),
            captures: Mutex::default(),
            peers,
            greens: Mutex::default(),
            open_captures: AtomicUsize::new(0),
            loading: AtomicUsize::new(0),
        })
    }

    /// The sticky error, if an operation of this process has failed.
    #[inline]
    pub fn healthy(&self) -> Result {
        match FAILED.load(SeqCst) {
            0 => Ok(()),
            error => Err(Error(error)),
        }
    }

    /// Makes every later call fail with `error`; the first one stays.
    pub fn fail(&self, error: Error) {
        self.fail_because(error, || {
            let (process, address) = (std::process::id(), crate::memory::va::FAULT.get());
            format!("process {process} has no memory at {address:#x}")
        });
    }

    /// The same, with what is said about it if it is an illegal access.
    pub fn fail_because(&self, error: Error, said: impl FnOnce() -> String) {
        if error == Error::ILLEGAL_ADDRESS
            && let Ok(ledger) = self.device.ledger()
        {
            ledger.count(Count::IllegalAccesses, 1);
        }
        let first = FAILED.compare_exchange(0, error.0, SeqCst, SeqCst).is_ok();
        if first && error == Error::ILLEGAL_ADDRESS {
            // As the real driver does in the system's log (Xid 31).
            eprintln!("simulated GPU: {}", said());
        }
    }

    /// Who uses memory when a kernel of the context does.
    pub fn user(&self) -> User {
        let peers = lock(&self.peers).iter().fold(0, |peers, (_, device)| peers | 1 << device);
        User { device: self.device.index, peers, arrays: false }
    }

    pub fn live_streams(&self) -> Vec<Arc<Stream>> {
        let mut streams = lock(&self.streams);
        streams.retain(|stream| stream.strong_count() > 0);
        streams.iter().filter_map(Weak::upgrade).collect()
    }

    /// The same, and those of its green contexts.
    pub fn all_streams(&self) -> Vec<Arc<Stream>> {
        let mut streams = self.live_streams();
        for green in lock(&self.greens).iter().filter_map(Weak::upgrade) {
            streams.extend(green.live_streams());
        }
        streams
    }

    pub fn add_stream(&self, stream: &Arc<Stream>) {
        let mut streams = lock(&self.streams);
        if streams.len() == streams.capacity() {
            streams.retain(|stream| stream.strong_count() > 0);
        }
        streams.push(Arc::downgrade(stream));
    }
}

/// A context.
pub struct Context {
    pub core: Arc<Core>,
    pub legacy: Arc<Stream>,
    /// Counts up and never repeats (`cuCtxGetId`).
    pub id: u64,
    /// What the application cannot destroy by its handle: a primary context, or a green one.
    pub primary: bool,
    /// How often it is attached to (`cuCtxAttach`).
    pub usage: AtomicU32,
    pub flags: AtomicU32,
    pub cache_config: AtomicU32,
    pub limits: [AtomicU64; 16],
    bytes: u64,
    destroyed: AtomicBool,
}

impl Context {
    /// Makes a context, which costs memory. A GPU's primary context always goes by the same handle.
    pub fn create(device: &'static Device, primary: Option<Handle>, flags: u32) -> Result<Arc<Context>> {
        if let error @ 1.. = FAILED.load(SeqCst) {
            return Err(Error(error));
        }
        let driver = driver()?;
        let bytes = driver.config.context_bytes;
        let ledger = device.ledger()?;
        if ledger.take(Kind::Context, bytes).is_err() {
            ledger.count(Count::OutOfMemory, 1);
            return Err(Error::OUT_OF_MEMORY);
        }
        let handle = primary.unwrap_or_else(handles::fresh);
        let core = Core::new(device, handle, handle, Arc::default());
        Context::around(core, primary.is_some(), flags, bytes)
    }

    /// Makes a green context of a primary one: streams and captures of its own, and everything else the primary's. It
    /// costs no memory to speak of.
    pub fn create_green(primary: &Context) -> Result<Arc<Context>> {
        let Core { handle, device, peers, .. } = &*primary.core;
        let core = Core::new(device, handles::fresh(), *handle, peers.clone());
        lock(&primary.core.greens).push(Arc::downgrade(&core));
        Context::around(core, true, primary.flags.load(SeqCst), 0)
    }

    fn around(core: Arc<Core>, primary: bool, flags: u32, bytes: u64) -> Result<Arc<Context>> {
        static IDS: AtomicU64 = AtomicU64::new(1);
        let legacy = Stream::create(&core, Role::Legacy, 0, 0, None);
        let context = Arc::new(Context {
            core,
            legacy,
            id: IDS.fetch_add(1, SeqCst),
            primary,
            usage: AtomicU32::new(1),
            flags: AtomicU32::new(flags),
            cache_config: AtomicU32::new(0),
            limits: Default::default(),
            bytes,
            destroyed: AtomicBool::new(false),
        });
        for (limit, default) in [1024, 1 << 20, 8 << 20, 2, 2048, 64].into_iter().enumerate() {
            context.limits[limit].store(default, SeqCst);
        }
        driver()?.contexts.insert(context.core.handle, context.clone());
        Ok(context)
    }

    pub fn handle(&self) -> Handle {
        self.core.handle
    }

    /// The context that what is made in this one belongs to.
    pub fn owner(&self) -> Handle {
        self.core.owner
    }

    /// Whether it is a green one.
    pub fn is_green(&self) -> bool {
        self.core.owner != self.core.handle
    }

    /// Ends a green context. Its streams stay, detached: whatever they have begun goes on, and they can be destroyed.
    pub fn destroy_green(&self) -> Result {
        if !self.destroyed.swap(true, SeqCst) {
            let _ = driver()?.contexts.remove(self.handle());
            crate::graph::invalidate_all(&self.core);
            self.core.live_streams().iter().for_each(|stream| stream.detach());
        }
        Ok(())
    }

    /// Waits for all work of the context.
    pub fn synchronize(&self) -> Result {
        self.core.healthy()?;
        if self.core.open_captures.load(SeqCst) > 0 {
            crate::graph::invalidate_all(&self.core);
            return Err(Error::STREAM_CAPTURE_UNSUPPORTED);
        }
        for stream in self.core.all_streams() {
            Fence::of(&stream).wait();
        }
        crate::pool::synchronized();
        self.core.healthy()
    }

    /// Ends the context and everything in it.
    pub fn destroy(&self) -> Result {
        let driver = driver()?;
        if self.destroyed.swap(true, SeqCst) {
            return Err(Error::INVALID_CONTEXT);
        }
        if self.core.loading.load(SeqCst) > 0 {
            // The real driver goes on loading into what is freed: the process ends by signal 11, soon or later.
            eprintln!("simulated GPU: a context ends while a module is being loaded into it");
            std::process::abort();
        }
        for stream in self.core.all_streams() {
            Fence::of(&stream).wait();
            stream.close();
        }
        let handle = self.handle();
        for green in driver.contexts.remove_if(|green| green.owner() == handle && green.is_green()) {
            green.destroyed.store(true, SeqCst);
        }
        let _ = driver.contexts.remove(handle);
        for other in driver.contexts.all() {
            lock(&other.core.peers).retain(|(peer, _)| *peer != handle);
        }
        driver.streams.remove_if(|stream| stream.core.owner == handle);
        driver.events.remove_if(|event| event.context == handle);
        driver.functions.remove_if(|function| function.context == handle);
        driver.modules.remove_if(|module| module.context == handle);
        driver.arrays.remove_if(|array| array.context == handle);
        driver.mipmaps.remove_if(|mipmap| mipmap.context == handle);
        driver.objects.remove_if(|object| object.context == handle);
        let mut space = driver.memory.space.write().unwrap_or_else(|e| e.into_inner());
        for address in space.of_context(handle) {
            if let Some(region) = space.free(address, |_| true)
                && matches!(region.kind, va::Kind::Managed)
            {
                let ledger = self.core.device.ledger()?;
                lock(&self.core.device.pager).forget(ledger, address, region.size);
            }
        }
        drop(space);
        self.core.device.ledger()?.give(Kind::Context, self.bytes);
        Ok(())
    }

    fn usable(&self) -> Result {
        if self.destroyed.load(SeqCst) { Err(Error::CONTEXT_IS_DESTROYED) } else { Ok(()) }
    }
}

/// Which stream the null handle means to a caller: that depends on the flavour of the entry point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Null {
    Legacy,
    PerThread,
}

const STREAM_LEGACY: Handle = 1;
const STREAM_PER_THREAD: Handle = 2;

thread_local! {
    // The real driver answers a thread that has run all its destructors, too: nothing here is ever destroyed but what
    // `End` throws away.
    static CURRENT: ManuallyDrop<RefCell<Vec<Arc<Context>>>> =
        const { ManuallyDrop::new(RefCell::new(Vec::new())) };
    /// The thread's own default streams, one for each context that it used; they end with the thread.
    static PER_THREAD: ManuallyDrop<RefCell<Vec<Arc<Stream>>>> =
        const { ManuallyDrop::new(RefCell::new(Vec::new())) };
    static END: End = const { End };
    static LAST_STREAM: Cache<Stream> = const { Cache::new() };
}

/// A thread that ends has no context any more, and no streams. It may use a context again.
struct End;

impl Drop for End {
    fn drop(&mut self) {
        drop(CURRENT.with(|stack| stack.take()));
        for stream in PER_THREAD.with(|own| own.take()) {
            crate::graph::abandon(&stream);
            stream.close();
        }
    }
}

/// What the thread uses goes when it ends.
fn use_until_end() {
    let _ = END.try_with(|_| ());
}

/// Calls `f` with the current context, which must be there; its sticky error is `f`'s business.
#[inline]
pub fn with_current<R>(f: impl FnOnce(&Arc<Context>) -> Result<R>) -> Result<R> {
    driver()?;
    let with = |stack: &RefCell<Vec<Arc<Context>>>| {
        let stack = stack.borrow();
        let context = stack.last().ok_or(Error::INVALID_CONTEXT)?;
        match context.usable() {
            // A primary context that was reset, and retained again.
            Err(error) if context.primary => match by_handle(context.handle()) {
                Ok(again) => f(&again),
                Err(_) => Err(error),
            },
            usable => usable.and_then(|()| f(context)),
        }
    };
    CURRENT.with(|stack| with(stack))
}

/// The current context, whatever state it is in.
pub fn current() -> Result<Arc<Context>> {
    with_current(|context| Ok(context.clone()))
}

/// The current context, without a sticky error.
pub fn healthy() -> Result<Arc<Context>> {
    let context = current()?;
    context.core.healthy()?;
    Ok(context)
}

/// Fails if the current context has failed. Without a context it does not.
pub fn unbroken() -> Result {
    current().map_or(Ok(()), |context| context.core.healthy())
}

/// The handle of the current context, or 0.
pub fn current_handle() -> Handle {
    CURRENT.with(|stack| stack.borrow().last().map_or(0, |context| context.handle()))
}

/// The context with that handle.
pub fn by_handle(handle: Handle) -> Result<Arc<Context>> {
    driver()?.contexts.get(handle).map_err(|_| Error::INVALID_CONTEXT)
}

/// The context with that handle, or the current one for 0.
pub fn by_handle_or_current(handle: Handle) -> Result<Arc<Context>> {
    if handle == 0 { current() } else { by_handle(handle) }
}

pub fn push(context: Arc<Context>) {
    use_until_end();
    CURRENT.with(|stack| stack.borrow_mut().push(context));
}

pub fn pop() -> Result<Handle> {
    let popped = CURRENT.with(|stack| stack.borrow_mut().pop());
    popped.map(|context| context.handle()).ok_or(Error::INVALID_CONTEXT)
}

/// Replaces the top of the stack; 0 leaves the thread without a context.
pub fn set_current(handle: Handle) -> Result {
    let context = if handle == 0 { None } else { Some(by_handle(handle)?) };
    use_until_end();
    CURRENT.with(|stack| {
        let mut stack = stack.borrow_mut();
        stack.pop();
        stack.extend(context);
    });
    Ok(())
}

/// Calls `f` with the stream that a handle means.
#[inline]
pub fn with_stream<R>(null: Null, handle: Handle, f: impl FnOnce(&Arc<Stream>) -> Result<R>) -> Result<R> {
    match (handle, null) {
        (0, Null::Legacy) | (STREAM_LEGACY, _) => with_current(|context| f(&context.legacy)),
        (0, Null::PerThread) | (STREAM_PER_THREAD, _) => f(&per_thread()?),
        _ => driver()?.streams.with(&LAST_STREAM, handle, f)?,
    }
}

/// The stream that a handle means.
pub fn stream(null: Null, handle: Handle) -> Result<Arc<Stream>> {
    with_stream(null, handle, |stream| Ok(stream.clone()))
}

fn per_thread() -> Result<Arc<Stream>> {
    let context = current()?;
    use_until_end();
    PER_THREAD.with(|own| {
        let mut own = own.borrow_mut();
        own.retain(|stream| !stream.closed());
        if let Some(stream) = own.iter().find(|stream| stream.core.handle == context.handle()) {
            return Ok(stream.clone());
        }
        let stream = Stream::create(&context.core, Role::PerThread, 0, 0, Some(context.legacy.clone()));
        own.push(stream.clone());
        Ok(stream)
    })
}

/// Makes a stream in the current context.
pub fn create_stream(flags: u32, priority: i32) -> Result<Handle> {
    create_stream_in(&*healthy()?, flags, priority)
}

/// Makes a stream in a context.
pub fn create_stream_in(context: &Context, flags: u32, priority: i32) -> Result<Handle> {
    if flags & !stream::NON_BLOCKING != 0 {
        return Err(Error::INVALID_VALUE);
    }
    let priority = priority.clamp(stream::GREATEST_PRIORITY, stream::LEAST_PRIORITY);
    let stream = Stream::create(&context.core, Role::Created, flags, priority, Some(context.legacy.clone()));
    driver()?.streams.insert(stream.handle, stream.clone());
    Ok(stream.handle)
}
