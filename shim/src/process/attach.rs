//! How this process becomes a client of a GPU and ceases to be one: cuInit, the first context, the last one, a fork.
//!
//! Before the first context nvshare has no thread and no connection in the process, and the gate is open, because there is
//! no memory to guard.

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::memory::device::Device;
use crate::memory::devices::{self, Attached, Left};
use crate::memory::engine_context::DriverPinner;
use crate::memory::host::{self, HostPool, HostPoolConfig};
use crate::memory::{peer_access, sync_memops, unmovable};
use crate::process::{engine, membership, reservation};
use crate::settings::{OnMissingArbiter, settings};
use crate::submit::gate::gate;
use crate::submit::green::{self, Green};
use crate::submit::{captures, flow, gang};
use crate::thread::{self, ThreadId};
use crate::{async_pool, ipc, local_socket, state};
use nvshare::map::MappedPage;
use nvshare::register::{self, RegisterError};
use nvshare::units::GpuUuid;
use nvshare::wire::Hello;
use nvshare::{Client, paths};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

/// A client that has registered and has neither an engine nor memory yet.
pub type UnattachedClient = Client<MappedPage>;

/// How many GPUs this process has attached to. An atomic, because a forked child cannot take a lock.
static ATTACHED: AtomicU32 = AtomicU32::new(0);

/// Called by cuInit: reads the settings, and checks that an arbiter answers.
///
/// # Errors
/// SYSTEM_NOT_READY without an arbiter, INVALID_VALUE for invalid settings. The log says why.
pub fn initialise() -> Result<(), CuResult> {
    crate::log::initialise();
    thread::at_end(&[captures::thread_ended, flow::thread_ended, pools_thread_ended]);
    let settings = settings().map_err(|error| {
        tracing::error!("cuInit fails with CUDA_ERROR_INVALID_VALUE: {error}");
        CuResult::INVALID_VALUE
    })?;
    unmovable::decide();
    static ATFORK: OnceLock<()> = OnceLock::new();
    ATFORK.get_or_init(|| {
        // SAFETY: the handler stores into atomics, closes descriptors, and wakes futexes of its own process, all of which are
        // allowed after a fork.
        unsafe { libc::pthread_atfork(None, None, Some(after_fork)) };
        // The driver has registered its exit handler in cuInit, so this one runs just before it.
        // SAFETY: the handler stores into an atomic.
        unsafe { libc::atexit(state::set_exiting) };
    });
    let path = paths::socket(&paths::runtime_dir());
    match register::dial(&path, settings.connect_timeout) {
        Ok(_connection) => Ok(()),
        Err(error) => missing_arbiter(&error, settings.on_missing_arbiter),
    }
}

/// Tells the pools that a thread and its own default streams have ended. In the relaxed mode, because otherwise querying an
/// event would invalidate captures of other threads and fail.
fn pools_thread_ended(thread: ThreadId) {
    if let Ok(driver) = Driver::get() {
        driver.relaxed(|| async_pool::thread_ended(thread));
    }
}

fn missing_arbiter(error: &RegisterError, policy: OnMissingArbiter) -> Result<(), CuResult> {
    if policy == OnMissingArbiter::Passthrough && matches!(error, RegisterError::NoArbiter { .. }) {
        tracing::warn!(
            "{error}; this process goes on without nvshare, because NVSHARE_ON_MISSING_ARBITER=passthrough is set"
        );
        state::set_passthrough();
        return Ok(());
    }
    tracing::error!("this process cannot use the GPU (CUDA_ERROR_SYSTEM_NOT_READY): {error}");
    Err(CuResult::SYSTEM_NOT_READY)
}

extern "C" fn after_fork() {
    local_socket::after_fork();
    ipc::after_fork();
    if ATTACHED.load(Ordering::Relaxed) > 0 {
        state::set_forked();
        host::after_fork();
        // The child has a copy of the parent's gate, perhaps shut, and no engine that could open it.
        gate().open();
    }
}

/// Registers this process as a client of a GPU.
///
/// # Errors
/// The arbiter gives no slot.
pub fn register(gpu: GpuUuid) -> Result<UnattachedClient, RegisterError> {
    // With invalid settings cuInit has failed already.
    let (hello, timeout) = match settings() {
        Ok(settings) => (Hello::new(gpu, &settings.name).with(settings.shares), settings.connect_timeout),
        Err(_) => (Hello::new(gpu, ""), Duration::ZERO),
    };
    let registration = register::register(&paths::socket(&paths::runtime_dir()), &hello, timeout)?;
    let client = Client::new(registration.page, registration.slot);
    Ok(client.telling(registration.private_phase))
}

/// Held while the process attaches to a GPU, which takes as long as the arbiter takes to answer. It comes before the lock of
/// the list of GPUs ([`devices`]), which is not held meanwhile, so that neither the process's other GPUs nor the threads at
/// the gate wait for the arbiter.
static ATTACHING: Mutex<()> = Mutex::new(());

/// Records a context that was created on a GPU. The first one attaches the process to the GPU, as `client` if the process has
/// registered already.
///
/// # Errors
/// SYSTEM_NOT_READY if the arbiter gives no slot; the log says why. The caller destroys the context.
pub fn context_made(
    context: CUcontext,
    device: CUdevice,
    client: Option<UnattachedClient>,
) -> Result<(), CuResult> {
    if devices::add_context(context, device) {
        client.into_iter().for_each(Client::leave);
        return Ok(());
    }
    let _one = nvshare::sync::lock(&ATTACHING);
    if devices::add_context(context, device) {
        // Another thread was faster.
        client.into_iter().for_each(Client::leave);
        return Ok(());
    }
    let driver = Driver::get().map_err(|error| {
        tracing::error!("{error}");
        CuResult::SYSTEM_NOT_READY
    })?;
    let uuid = driver.device_uuid(device).inspect_err(|result| {
        tracing::error!(
            "this process cannot use device {device}: the driver does not return its UUID (cuDeviceGetUuid): {result}"
        );
    })?;
    let gpu = GpuUuid(uuid.bytes);
    let settings = settings().map_err(|_| CuResult::INVALID_VALUE)?;
    let client = match client.map_or_else(|| register(gpu), Ok) {
        Ok(client) => client,
        Err(error) => return missing_arbiter(&error, settings.on_missing_arbiter),
    };
    let slot = client.books().slot();
    let config = HostPoolConfig { limit: settings.host_memory, ..HostPoolConfig::default() };
    let pinner = Arc::new(DriverPinner::new(driver, context));
    let host = HostPool::new(config, Box::new(pinner.clone()), Box::new(client.books().clone()));
    let books = client.books().clone();
    let oversubscribe = settings.oversubscribe;
    let device = Arc::new(Device::new(driver, device, gpu, books, host, pinner, oversubscribe));
    device.streams.add_context(context);
    tracing::info!(%gpu, slot = slot.get(), "attached");
    ATTACHED.fetch_add(1, Ordering::AcqRel);
    gang::join(device.gang_member());
    let engine = match engine::start(device.clone(), client, context) {
        Ok(engine) => engine,
        Err(error) => {
            tracing::error!(
                %gpu,
                "this process cannot use the GPU (CUDA_ERROR_SYSTEM_NOT_READY): a thread could not be started: {error}. Look at ulimit -u and the control group's pids.max"
            );
            ATTACHED.fetch_sub(1, Ordering::AcqRel);
            gang::leave(gpu);
            return Err(CuResult::SYSTEM_NOT_READY);
        }
    };
    devices::add(Attached { device, contexts: vec![context], engine: Some(engine) });
    membership::attached();
    Ok(())
}

/// Releases the memory of a context that was destroyed; nvshare has left it before. After the last one the process detaches
/// from the GPU.
pub fn context_ended(context: CUcontext) {
    peer_access::context_ends(context);
    sync_memops::context_ends(context);
    let Some(left) = devices::remove_context(context) else { return };
    let greens = green::remove_of(context).into_iter().map(|green| green.context);
    let over: Vec<_> = greens.chain([context]).collect();
    captures::captures_ended(|_, of| over.contains(&of));
    over.iter().for_each(|context| async_pool::context_ended(*context));
    match left {
        Left::Context(device, other) => {
            device.engine_context.go_back(other);
            device.release_context(context);
            ipc::context_ends(context);
            reservation::context_ended();
        }
        Left::Nothing(attached) => detach(attached, context),
    }
}

/// Records that a green context was destroyed: its streams are detached, and captures in them have ended.
pub fn green_ended(green: &Green) {
    devices::green_ended(green);
    captures::captures_ended(|_, context| context == green.context);
    async_pool::green_ended(green.context);
}

fn detach(Attached { device, engine, .. }: Attached, context: CUcontext) {
    device.end_engine();
    if let Some(engine) = engine
        && engine.join().is_err()
    {
        tracing::error!(gpu = %device.gpu, "nvshare's engine ended with a panic; this is a bug in nvshare");
    }
    async_pool::device_ended(device.ordinal, context);
    reservation::context_ended();
    ipc::context_ends(context);
    ATTACHED.fetch_sub(1, Ordering::AcqRel);
    gang::leave(device.gpu);
    tracing::info!(gpu = %device.gpu, "detached");
}
