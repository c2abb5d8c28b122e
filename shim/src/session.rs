//! The process's part in sharing: the gate that its threads pass, the GPUs that it has attached to,
//! the captures that it has open.
//!
//! Nothing here exists before the first context: no thread, no connection, and a gate that stands open
//! because there is nothing to guard.

use crate::abi::*;
use crate::arrival::Newcomer;
use crate::contexts;
use crate::device::{DriverPinner, Heir, Shared};
use crate::drain::{Green, Mark, WorkBefore};
use crate::driver::Driver;
use crate::engine;
use crate::flow::Queue;
use crate::gate::{Gate, Lane};
use crate::hostpool::{HostPool, HostPoolConfig};
use crate::settings::{OnMissingArbiter, settings};
use crate::thread::ThreadId;
use crate::together;
use nvshare::register::{self, RegisterError};
use nvshare::sync::now;
use nvshare::units::{GpuUuid, Nanos};
use nvshare::wire::Hello;
use nvshare::{Client, paths};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::CStr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

static GATE: LazyLock<Gate> = LazyLock::new(|| {
    let gate = Gate::new();
    gate.open();
    gate
});

/// The process's gate.
pub fn gate() -> &'static Gate {
    &GATE
}

/// Set in a forked child of a process that had attached: the GPUs are the parent's.
static FORGOTTEN: AtomicBool = AtomicBool::new(false);

/// No arbiter answered, and the user asked to go on without one.
static PASSTHROUGH: AtomicBool = AtomicBool::new(false);

/// What every call returns once memory could not be moved: the application's data is lost.
static BROKEN: AtomicI32 = AtomicI32::new(0);

/// Whether nvshare does anything in this process.
pub fn enabled() -> bool {
    static ON: OnceLock<bool> = OnceLock::new();
    *ON.get_or_init(|| {
        // SAFETY: getenv with a C string; the value is looked at before anybody can change it.
        let value = unsafe { libc::getenv(c"NVSHARE_DISABLE".as_ptr()) };
        // SAFETY: a C string, if there is one.
        value.is_null() || unsafe { CStr::from_ptr(value) } != c"1"
    }) && !FORGOTTEN.load(Ordering::Relaxed)
        && !PASSTHROUGH.load(Ordering::Relaxed)
}

thread_local! {
    /// This thread's lane, or null before its first pass. Apart from its owner below, because a plain
    /// pointer can be read without asking whether it was initialised or destroyed.
    static LANE: Cell<*const Lane> = const { Cell::new(std::ptr::null()) };
    static OWNER: RefCell<Option<LaneOwner>> = const { RefCell::new(None) };
}

struct LaneOwner(Arc<Lane>);

impl Drop for LaneOwner {
    fn drop(&mut self) {
        LANE.set(std::ptr::null());
        GATE.retire(self.0.clone());
    }
}

/// Leave to be inside; ends when dropped.
///
/// Points to a lane; or one byte further, if the lane ends with the pass; or is [`Pass::OUTSIDE`].
pub struct Pass(*const Lane);

/// A bit of a pass: a thread whose thread-locals are gone has a lane for each pass.
const LATE: usize = 1;

impl Pass {
    /// Of a call that the gate does not hold: in a process without nvshare, or in the middle of another call.
    const OUTSIDE: Self = Self(std::ptr::without_provenance(LATE));
}

impl Drop for Pass {
    #[inline]
    fn drop(&mut self) {
        if self.0.addr() & LATE != 0 {
            return self.end_late();
        }
        // SAFETY: the lane lives as long as its thread, and a pass stays in its thread.
        GATE.leave(unsafe { &*self.0 });
    }
}

impl Pass {
    #[cold]
    #[inline(never)]
    fn end_late(&self) {
        let lane = self.0.map_addr(|address| address & !LATE);
        if lane.is_null() {
            return;
        }
        LANE.set(std::ptr::null());
        // SAFETY: the reference that `own_lane` keeps for this pass alone.
        let lane = unsafe { Arc::from_raw(lane) };
        GATE.leave(&lane);
        GATE.retire(lane);
        crate::thread::call_ends();
    }
}

/// Set by an exit handler that runs beside the driver's own: from then on the driver may be gone any time.
static EXITING: AtomicBool = AtomicBool::new(false);

/// Whether the process is ending and the driver has gone already: it answers every call with DEINITIALIZED from then on.
pub fn driver_has_gone() -> bool {
    EXITING.load(Ordering::Relaxed)
        && Driver::get().is_ok_and(|driver| driver.ctx_current() == Err(CuResult::DEINITIALIZED))
}

extern "C" fn exiting() {
    EXITING.store(true, Ordering::Relaxed);
}

/// Whether this thread is inside the gate, in the middle of a call.
pub fn is_inside() -> bool {
    let lane = LANE.get();
    // SAFETY: the lane lives as long as its thread.
    !lane.is_null() && unsafe { &*lane }.inside()
}

/// Goes through the gate to submit work to a queue of the GPU's, waiting while memory is out, or while too much of that queue's
/// work is in flight.
///
/// # Errors
/// What the driver's call must return instead: memory could not be moved, and data is lost.
#[inline]
pub fn enter(queue: impl Fn() -> Queue) -> Result<Pass, CuResult> {
    quickly().map_or_else(|| enter_slowly(&|| crate::flow::pace(queue())), Ok)
}

/// Goes through the gate for a call that wants memory mapped and submits nothing.
///
/// # Errors
/// As [`enter`].
#[inline]
pub fn enter_query() -> Result<Pass, CuResult> {
    quickly().map_or_else(|| enter_slowly(&|| ()), Ok)
}

/// Through a gate that is open to all, from outside.
#[inline]
fn quickly() -> Option<Pass> {
    let lane = LANE.get();
    if !lane.is_null() {
        // SAFETY: as above.
        let inside = unsafe { &*lane };
        if !inside.inside() && GATE.try_enter(inside) {
            return Some(Pass(lane));
        }
    }
    None
}

#[cold]
#[inline(never)]
fn enter_slowly(keep_pace: &dyn Fn()) -> Result<Pass, CuResult> {
    if !enabled() || is_inside() {
        // Inside: a call within a call, of a driver callback or of a library that wraps the driver.
        return Ok(Pass::OUTSIDE);
    }
    if driver_has_gone() {
        // Nobody opens the gate any more.
        return Err(CuResult::DEINITIALIZED);
    }
    let (lane, late) = own_lane();
    // SAFETY: a lane of this thread's lives as long as the thread, and one that ends with the pass at least as long.
    GATE.enter(unsafe { &*lane }, keep_pace, knock);
    let pass = Pass(lane.map_addr(|address| address | if late { LATE } else { 0 }));
    // A gate that has failed lets everybody in, to be told so here.
    intact().map(|()| pass)
}

/// This thread's lane, and whether it ends with the pass: nobody would give it back, because the thread-locals are gone.
fn own_lane() -> (*const Lane, bool) {
    let known = LANE.get();
    if !known.is_null() {
        return (known, false);
    }
    let lane = GATE.lane();
    let pointer = Arc::as_ptr(&lane);
    LANE.set(pointer);
    let mut lane = Some(lane);
    let _ = OWNER.try_with(|owner| *owner.borrow_mut() = lane.take().map(LaneOwner));
    // Without an owner, the pass keeps the reference.
    (pointer, lane.map(Arc::into_raw).is_some())
}

/// Tells the engines that a thread stands before the gate.
fn knock() {
    for device in devices().iter() {
        device.shared.knock();
    }
}

/// A GPU that this process has attached to.
struct Attached {
    shared: Arc<Shared>,
    contexts: Vec<CUcontext>,
    /// Green contexts, each made of one of the contexts.
    greens: Vec<Green>,
    engine: Option<JoinHandle<()>>,
}

impl Attached {
    fn owner_of(&self, context: CUcontext) -> Option<CUcontext> {
        if self.contexts.contains(&context) {
            return Some(context);
        }
        self.greens.iter().find(|green| green.context == context).map(|green| green.owner)
    }
}

static DEVICES: Mutex<Vec<Attached>> = Mutex::new(Vec::new());

fn devices() -> MutexGuard<'static, Vec<Attached>> {
    DEVICES.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The shared part of the GPU of the current context, and the context that memory belongs to which is allocated now: the
/// current one, or the primary context of a green one.
pub fn current() -> Option<(Arc<Shared>, CUcontext)> {
    let context = Driver::get().ok()?.ctx_current().ok().filter(|context| !context.is_null())?;
    known(context).or_else(|| contexts::adopt(context))
}

/// The shared part of the GPU of a context, and the context that memory belongs to which is allocated in it.
pub fn known(context: CUcontext) -> Option<(Arc<Shared>, CUcontext)> {
    devices().iter().find_map(|device| Some((device.shared.clone(), device.owner_of(context)?)))
}

/// The shared part of the GPU of a context.
pub fn of_context(context: CUcontext) -> Option<Arc<Shared>> {
    known(context).map(|(shared, _)| shared)
}

/// The context that memory, events and modules belong to which are made in a context: the primary context of a green one.
pub fn owner_of(context: CUcontext) -> CUcontext {
    known(context).map_or(context, |(_, owner)| owner)
}

/// A green context by its own handle, and the GPU.
pub fn green(handle: CUgreenCtx) -> Option<(Arc<Shared>, Green)> {
    let of = |device: &Attached| {
        let green = device.greens.iter().find(|green| green.green == handle)?;
        Some((device.shared.clone(), *green))
    };
    devices().iter().find_map(of)
}

/// The green context that a context stands for, or null.
pub fn green_of(context: CUcontext) -> CUgreenCtx {
    let devices = devices();
    let mut greens = devices.iter().flat_map(|device| &device.greens);
    greens.find(|green| green.context == context).map_or(CUgreenCtx::NULL, |green| green.green)
}

/// A green context was made of a context that is known.
pub fn green_made(green: Green) {
    for device in devices().iter_mut().filter(|device| device.contexts.contains(&green.owner)) {
        if !device.greens.contains(&green) {
            device.greens.push(green);
            device.shared.streams.add_green(green);
        }
    }
}

/// A green context was destroyed: its streams are detached, and captures in them are over.
pub fn green_ended(green: &Green) {
    for device in devices().iter_mut() {
        device.greens.retain(|known| known != green);
        device.shared.streams.remove_green(green);
    }
    forget_captures(|_, context| context == green.context);
    crate::pools::green_ended(green.context);
}

/// The shared parts of all GPUs.
pub fn all() -> Vec<Arc<Shared>> {
    devices().iter().map(|device| device.shared.clone()).collect()
}

/// The shared part of a GPU.
pub fn of_device(device: CUdevice) -> Option<Arc<Shared>> {
    devices().iter().find(|attached| attached.shared.device == device).map(|attached| attached.shared.clone())
}

/// All contexts that the process has.
pub fn contexts() -> Vec<CUcontext> {
    devices().iter().flat_map(|device| device.contexts.clone()).collect()
}

/// The shared part of a GPU, and a context on it.
pub fn attached(device: CUdevice) -> Option<(Arc<Shared>, CUcontext)> {
    devices()
        .iter()
        .find(|attached| attached.shared.device == device)
        .and_then(|attached| Some((attached.shared.clone(), *attached.contexts.first()?)))
}

/// The shared part of a GPU, by its UUID.
pub fn of_gpu(gpu: GpuUuid) -> Option<Arc<Shared>> {
    devices().iter().find(|attached| attached.shared.gpu == gpu).map(|attached| attached.shared.clone())
}

/// How many GPUs this process has attached to; for a forked child, which can take no lock.
static ATTACHED: AtomicU32 = AtomicU32::new(0);

/// cuInit was called: is there an arbiter?
///
/// # Errors
/// SYSTEM_NOT_READY without one, INVALID_VALUE for settings that make no sense. The log says why.
pub fn initialise() -> Result<(), CuResult> {
    crate::log::initialise();
    let settings = settings().map_err(|error| {
        tracing::error!("cuInit fails with CUDA_ERROR_INVALID_VALUE: {error}");
        CuResult::INVALID_VALUE
    })?;
    crate::unmovable::decide();
    static ATFORK: OnceLock<()> = OnceLock::new();
    ATFORK.get_or_init(|| {
        // SAFETY: the handler stores into atomics, closes descriptors, and wakes nobody's futex but its own, all of which is
        // allowed after a fork.
        unsafe { libc::pthread_atfork(None, None, Some(forget)) };
        // The driver's own exit handler is from cuInit: this one comes just before it.
        // SAFETY: the handler stores into an atomic.
        unsafe { libc::atexit(exiting) };
    });
    let path = paths::socket(&paths::runtime_dir());
    match register::dial(&path, settings.connect_timeout) {
        Ok(_connection) => Ok(()),
        Err(error) => missing_arbiter(&error, settings.on_missing_arbiter),
    }
}

fn missing_arbiter(error: &RegisterError, policy: OnMissingArbiter) -> Result<(), CuResult> {
    if policy == OnMissingArbiter::Passthrough && matches!(error, RegisterError::NoArbiter { .. }) {
        tracing::warn!("{error}; going on without nvshare, as NVSHARE_ON_MISSING_ARBITER=passthrough says");
        PASSTHROUGH.store(true, Ordering::Relaxed);
        return Ok(());
    }
    tracing::error!("this process cannot use the GPU (CUDA_ERROR_SYSTEM_NOT_READY): {error}");
    Err(CuResult::SYSTEM_NOT_READY)
}

extern "C" fn forget() {
    crate::ipc::forget();
    if ATTACHED.load(Ordering::Relaxed) > 0 {
        FORGOTTEN.store(true, Ordering::Relaxed);
        crate::hostpool::forget();
        // The child has the parent's gate and none of its engines.
        GATE.open();
    }
}

/// Makes this process a client of a GPU, which holds nothing yet.
///
/// # Errors
/// The arbiter gives no slot.
pub fn register(gpu: GpuUuid) -> Result<Newcomer, RegisterError> {
    // cuInit fails if the settings make no sense.
    let (hello, timeout) = match settings() {
        Ok(settings) => (Hello::new(gpu, &settings.name).with(settings.shares), settings.connect_timeout),
        Err(_) => (Hello::new(gpu, ""), Duration::ZERO),
    };
    let registration = register::register(&paths::socket(&paths::runtime_dir()), &hello, timeout)?;
    let client = Client::new(registration.page, registration.slot);
    Ok(client.telling(registration.truth))
}

/// Held while the process attaches to a GPU, which takes as long as the arbiter takes to answer. Taken before [`DEVICES`],
/// which nobody holds meanwhile: the process's other GPUs, and the threads at the gate, do not wait for that answer.
static ATTACHING: Mutex<()> = Mutex::new(());

/// Notes a context, if the process has attached to its GPU.
fn add_context(context: CUcontext, device: CUdevice) -> bool {
    let mut devices = devices();
    let Some(attached) = devices.iter_mut().find(|attached| attached.shared.device == device) else {
        return false;
    };
    if !attached.contexts.contains(&context) {
        attached.contexts.push(context);
        attached.shared.streams.add_context(context);
    }
    true
}

/// A context was made on a GPU. The first one attaches the process to it, as the client that it has registered for it
/// if it has.
///
/// # Errors
/// SYSTEM_NOT_READY if the arbiter gives no slot; the log says why. The caller destroys the context.
pub fn context_made(
    context: CUcontext,
    device: CUdevice,
    newcomer: Option<Newcomer>,
) -> Result<(), CuResult> {
    if add_context(context, device) {
        newcomer.into_iter().for_each(Client::leave);
        return Ok(());
    }
    let _one = ATTACHING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if add_context(context, device) {
        // Another thread was faster.
        newcomer.into_iter().for_each(Client::leave);
        return Ok(());
    }
    let driver = Driver::get().map_err(|error| {
        tracing::error!("{error}");
        CuResult::SYSTEM_NOT_READY
    })?;
    let uuid = driver.device_uuid(device).inspect_err(|result| {
        tracing::error!("device {device}: the driver does not tell its UUID: {result}");
    })?;
    let gpu = GpuUuid(uuid.bytes);
    let settings = settings().map_err(|_| CuResult::INVALID_VALUE)?;
    let client = match newcomer.map_or_else(|| register(gpu), Ok) {
        Ok(client) => client,
        Err(error) => return missing_arbiter(&error, settings.on_missing_arbiter),
    };
    let slot = client.books().slot();
    let config = HostPoolConfig { limit: settings.host_memory, ..HostPoolConfig::default() };
    let pinner = Arc::new(DriverPinner::new(driver, context));
    let host = HostPool::new(config, Box::new(pinner.clone()), Box::new(client.books().clone()));
    let shared = Arc::new(Shared::new(
        driver,
        device,
        gpu,
        client.books().clone(),
        host,
        pinner,
        settings.oversubscribe,
    ));
    shared.streams.add_context(context);
    tracing::info!(%gpu, slot = slot.get(), "attached");
    ATTACHED.fetch_add(1, Ordering::AcqRel);
    together::join(shared.clone());
    let engine = match engine::start(shared.clone(), client, context) {
        Ok(engine) => engine,
        Err(error) => {
            tracing::error!(%gpu, "no thread for the engine: {error}");
            ATTACHED.fetch_sub(1, Ordering::AcqRel);
            together::leave(gpu);
            return Err(CuResult::SYSTEM_NOT_READY);
        }
    };
    devices().push(Attached { shared, contexts: vec![context], greens: Vec::new(), engine: Some(engine) });
    Ok(())
}

/// The GPU of a context that is about to end, and where its engine moves to. `None` if the context is not known, or is a
/// green one.
pub fn ending(context: CUcontext) -> Option<(Arc<Shared>, Heir)> {
    let devices = devices();
    let attached = devices.iter().find(|attached| attached.contexts.contains(&context))?;
    let other = attached.contexts.iter().copied().find(|other| *other != context);
    Some((attached.shared.clone(), other.map_or(Heir::Nowhere, Heir::Context)))
}

/// A context was destroyed, and nothing of nvshare's was left in it. Its memory goes with it; the last one detaches the
/// process.
pub fn context_ended(context: CUcontext) {
    crate::peers::context_ends(context);
    crate::synchronous::context_ends(context);
    let (over, attached) = {
        let mut devices = devices();
        let Some(index) = devices.iter().position(|attached| attached.contexts.contains(&context)) else {
            return;
        };
        let attached = &mut devices[index];
        attached.contexts.retain(|known| *known != context);
        let greens =
            attached.greens.extract_if(.., |green| green.owner == context).map(|green| green.context);
        let over: Vec<_> = greens.chain([context]).collect();
        match attached.contexts.first() {
            None => (over, Err(devices.swap_remove(index))),
            Some(other) => (over, Ok((attached.shared.clone(), *other))),
        }
    };
    forget_captures(|_, of| over.contains(&of));
    over.iter().for_each(|context| crate::pools::context_ended(*context));
    match attached {
        Ok((shared, other)) => {
            shared.go_back(other);
            shared.release_context(context);
            crate::ipc::context_ends(context);
            crate::room::context_ended();
        }
        Err(attached) => detach(attached, context),
    }
}

fn detach(Attached { shared, engine, .. }: Attached, context: CUcontext) {
    shared.end();
    if let Some(engine) = engine
        && engine.join().is_err()
    {
        tracing::error!(gpu = %shared.gpu, "the engine ended with a panic");
    }
    crate::pools::device_ended(shared.device, context);
    crate::room::context_ended();
    crate::ipc::context_ends(context);
    ATTACHED.fetch_sub(1, Ordering::AcqRel);
    together::leave(shared.gpu);
    tracing::info!(gpu = %shared.gpu, "detached");
}

/// Memory of a GPU cannot be moved any more: every call that uses a GPU returns this from now on. Whoever waits for an engine
/// is woken.
pub fn break_down(gpu: GpuUuid, result: CuResult) {
    // The first one stays, as with the driver's own.
    let _ = BROKEN.compare_exchange(0, result.0, Ordering::SeqCst, Ordering::Relaxed);
    GATE.fail();
    nvshare::sync::unpark_all(&HOLD_CAPTURES);
    together::leave(gpu);
    // The process's other GPUs are of no use to it.
    together::ring_all();
}

/// Whether memory can be moved.
///
/// # Errors
/// What every call that uses a GPU returns, because it cannot.
pub fn intact() -> Result<(), CuResult> {
    match BROKEN.load(Ordering::Acquire) {
        0 => Ok(()),
        code => Err(CuResult(code)),
    }
}

// --- Captures -----------------------------------------------------------------------------------

/// The streams that capture. A thread's own default stream is one for each thread and context, whatever handle or entry
/// point names it.
#[derive(Default)]
struct Captures {
    /// Those that began, each from its beginning to its end.
    open: HashMap<Queue, Capture>,
    /// Those that joined one of them, as they came; until none is open.
    joined: HashMap<Queue, WorkBefore>,
    /// Threads that may be having a stream join one at this moment.
    joining: u32,
}

struct Capture {
    context: CUcontext,
    since: Nanos,
    before: WorkBefore,
}

impl Captures {
    fn are_open(&self) -> bool {
        !self.open.is_empty()
    }

    /// What work a stream had before it captured.
    fn work_before(&self, stream: CUstream) -> WorkBefore {
        let queue = Queue::of(stream, false);
        let open = self.open.get(&queue).map(|capture| &capture.before);
        open.or_else(|| self.joined.get(&queue)).cloned().unwrap_or(WorkBefore::Unknown)
    }
}

static CAPTURING: LazyLock<Mutex<Captures>> = LazyLock::new(Mutex::default);

/// How many.
static CAPTURES: AtomicU32 = AtomicU32::new(0);

/// Engines that want to drain: no new capture begins. A word to sleep on.
static HOLD_CAPTURES: AtomicU32 = AtomicU32::new(0);

fn capturing() -> MutexGuard<'static, Captures> {
    CAPTURING.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Whether a capture is open.
pub fn is_capturing() -> bool {
    CAPTURES.load(Ordering::SeqCst) > 0
}

/// Refuses a call that is not safe while a stream captures, as the driver does, which invalidates the capture too. What is
/// refused depends on the mode of the capture, on the thread that began it, and on the calling thread's own mode. So the
/// driver itself is asked, by a call that it refuses alike and that does nothing else: whether an event has happened that was
/// never recorded. To make an event and to destroy it is safe.
///
/// # Errors
/// What the driver says.
pub fn refuse_unsafe() -> Result<(), CuResult> {
    if !is_capturing() {
        return Ok(());
    }
    let Ok(driver) = Driver::get() else { return Ok(()) };
    let Ok(event) = driver.event_create(CU_EVENT_DISABLE_TIMING) else { return Ok(()) };
    let answer = driver.event_query(event);
    let _ = driver.event_destroy(event);
    match answer {
        Err(CuResult::STREAM_CAPTURE_UNSUPPORTED | CuResult::STREAM_CAPTURE_INVALIDATED) => answer,
        _ => Ok(()),
    }
}

/// Begins a capture of a stream with `call`, in a moment when nobody wants to drain.
pub fn begin_capture(stream: CUstream, per_thread: bool, call: impl FnOnce() -> CuResult) -> CuResult {
    let (_pass, mut set) = loop {
        match enter_query() {
            Ok(pass) => {
                // Held while it is looked whether to begin: see CaptureHold::unless_capturing.
                let set = capturing();
                let hold = HOLD_CAPTURES.load(Ordering::SeqCst);
                // A stream that forks into another's capture belongs to an open one: let it.
                let held = hold != 0 && CAPTURES.load(Ordering::SeqCst) == 0;
                // An allocation may have closed the gate behind this thread: see close_unless_capturing.
                if !held && GATE.is_open() {
                    break (pass, set);
                }
                drop((pass, set));
                if held {
                    nvshare::sync::park(&HOLD_CAPTURES, hold);
                }
            }
            Err(result) => return result,
        }
    };
    let before = work_before(stream.named(per_thread));
    let result = call();
    if result.is_success() {
        let queue = Queue::of(stream, per_thread);
        let context = queue.context().unwrap_or(CUcontext::NULL);
        let capture = Capture { context, since: now(), before };
        if set.open.insert(queue, capture).is_none() {
            CAPTURES.fetch_add(1, Ordering::SeqCst);
        }
    }
    result
}

/// What work a stream has, by its explicit name, that is about to capture: afterwards nobody can ask.
fn work_before(stream: CUstream) -> WorkBefore {
    let Ok(driver) = Driver::get() else { return WorkBefore::Unknown };
    if stream.is_default() {
        return WorkBefore::Unknown;
    }
    // It may capture already: then the call fails, or changes nothing.
    let status = driver.stream_capture_status(stream);
    let context = driver.stream_ctx(stream);
    match (status, context) {
        (Ok(CU_STREAM_CAPTURE_STATUS_NONE), Ok(context)) => {
            driver.relaxed(|| WorkBefore::of(driver, owner_of(context), stream))
        }
        _ => WorkBefore::Unknown,
    }
}

/// Whether the driver says that a stream, by its explicit name, captures.
fn captures(stream: CUstream) -> bool {
    let status = Driver::get().map(|driver| driver.stream_capture_status(stream));
    matches!(status, Ok(Ok(status)) if status != CU_STREAM_CAPTURE_STATUS_NONE)
}

/// What work a stream that captures had before.
pub fn work_before_capture(stream: CUstream) -> WorkBefore {
    capturing().work_before(stream)
}

/// Lets a stream wait for an event with `call`. If that is one of a capture, the stream takes part in it from then on.
pub fn join_capture(stream: CUstream, per_thread: bool, call: impl FnOnce() -> CuResult) -> CuResult {
    if CAPTURES.load(Ordering::SeqCst) == 0 {
        return call();
    }
    // A stream that somebody marks does not begin to capture meanwhile. The set is not held for that: the driver may block in
    // these calls, until a thread goes on that wants the set.
    let _joining = Joining::begin();
    let stream = stream.named(per_thread);
    let captured = captures(stream);
    let before = work_before(stream);
    let result = call();
    if !captured && captures(stream) {
        capturing().joined.insert(Queue::of(stream, per_thread), before);
    }
    result
}

/// A stream may join a capture, until dropped.
struct Joining(());

impl Joining {
    fn begin() -> Self {
        capturing().joining += 1;
        Self(())
    }
}

impl Drop for Joining {
    fn drop(&mut self) {
        capturing().joining -= 1;
    }
}

/// Ends the capture of a stream with `call`. The driver may refuse: another thread has begun the capture, or the stream
/// captures nothing or for another. The capture then goes on, unless the driver says that the stream captures no more,
/// as for a capture that was invalidated.
pub fn end_capture(stream: CUstream, per_thread: bool, call: impl FnOnce() -> CuResult) -> CuResult {
    let result = call();
    if result.is_success() || !captures(stream.named(per_thread)) {
        let ended = Queue::of(stream, per_thread);
        forget_captures(|queue, _| *queue == ended);
    }
    result
}

/// A stream that the application made is destroyed, and a capture of it has ended with it.
pub fn stream_ended(stream: CUstream) {
    let ended = Queue::of(stream, false);
    forget_captures(|queue, _| *queue == ended);
}

/// A thread ends, and its own default streams with it.
pub fn thread_ended(thread: ThreadId) {
    forget_captures(|queue, _| queue.is_of_thread(thread));
}

/// Captures are over that nobody has ended: their stream, their context or their thread is gone.
fn forget_captures(is_over: impl Fn(&Queue, CUcontext) -> bool) {
    let over = {
        let mut set = capturing();
        let before = set.open.len();
        set.open.retain(|queue, capture| !is_over(queue, capture.context));
        if !set.are_open() {
            set.joined.clear();
        }
        before - set.open.len()
    };
    if over > 0 {
        CAPTURES.fetch_sub(over as u32, Ordering::SeqCst);
        // An engine may have put off a free, or a drain, until now.
        knock();
    }
}

/// Closes the gate, because a GPU has more memory than is in place, unless a capture is open; none can begin
/// once it is closed. Whether it did.
pub fn close_unless_capturing(gpu: GpuUuid) -> bool {
    let set = capturing();
    let none = !set.are_open();
    if none {
        together::growing(gpu);
    }
    none
}

/// Runs `action` while no capture is open and none can begin, or not at all. The action waits for nothing: threads that
/// begin or end a capture, allocate or free are held meanwhile.
pub fn with_no_capture<T>(action: impl FnOnce() -> T) -> Option<T> {
    let set = capturing();
    (!set.are_open()).then(action)
}

/// The end of all work so far, although captures are open, if that can be told without ruining one. The gate is shut, and
/// nobody is inside.
///
/// Nothing of a stream that captures is on its way to the GPU but what it had before, and that was marked. All others can be
/// asked and marked by a thread in the relaxed mode.
pub fn mark_beside_captures() -> Option<Mark> {
    let set = capturing();
    (set.joining == 0).then(|| together::mark_beside(|stream| set.work_before(stream)))?
}

/// Looks whether such a mark has passed. `None` if that cannot be told any more: a capture has come that forbids it.
pub fn look_beside_captures(mark: &mut Mark) -> Option<bool> {
    let set = capturing();
    if set.are_open() && !mark.is_complete() && !together::may_mark_defaults() {
        return None;
    }
    Some(mark.look())
}

/// When the latest of the captures that are open began, ns.
pub fn latest_capture() -> Option<Nanos> {
    capturing().open.values().map(|capture| capture.since).max()
}

/// Keeps new captures from beginning, but for those that belong to an open one.
pub struct CaptureHold(());

impl CaptureHold {
    /// Begins to. Waits for nothing: whoever drains leaves the gate open while a capture [is](CaptureHold::is_broken), so
    /// that it can end, and looks again when one has ended, which rings the engines.
    pub fn begin() -> Self {
        HOLD_CAPTURES.fetch_add(1, Ordering::SeqCst);
        Self(())
    }

    /// Keeps new captures from beginning, or nothing if one is open, for whoever cannot wait for its end: it may be
    /// the caller's own.
    pub fn unless_capturing() -> Option<Self> {
        HOLD_CAPTURES.fetch_add(1, Ordering::SeqCst);
        let hold = Self(());
        // Whoever begins one has the set for all of that: it is in there now, or finds the hold.
        with_no_capture(|| hold)
    }

    /// Whether a capture is open: still, or because it slipped in.
    pub fn is_broken(&self) -> bool {
        CAPTURES.load(Ordering::SeqCst) > 0
    }
}

impl Drop for CaptureHold {
    fn drop(&mut self) {
        HOLD_CAPTURES.fetch_sub(1, Ordering::SeqCst);
        nvshare::sync::unpark_all(&HOLD_CAPTURES);
    }
}
