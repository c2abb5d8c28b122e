//! How an engine ends: because its last context is destroyed, or because of an error.
//!
//! In either case no thread waits for it afterwards. After an error evicted memory cannot come back, so the process's CUDA
//! calls fail from then on, and the other clients get its granules.

use crate::cuda::abi::*;
use crate::memory::device::Device;
use crate::memory::region::{Backing, Region};
use crate::memory::swap::Swap;
use crate::process::engine::{Engine, SwapError};
use crate::settings::settings;
use crate::state;
use crate::submit::gate::gate;
use crate::submit::{captures, gang, turn_taking};
use nvshare::Client;
use nvshare::map::MappedPage;
use nvshare::sync::now;
use nvshare::units::{GpuUuid, Granules, MILLISECOND, Nanos, SECOND};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Once};
use std::time::Duration;

/// How long a failed engine waits for work in flight before it releases the memory.
const LAST_WORK: Nanos = 10 * SECOND;

/// The body of the engine's thread.
pub fn run_to_the_end(device: Arc<Device>, client: Client<MappedPage>, context: CUcontext) {
    keep_panics();
    ENGINE.set(true);
    let _ended = Ended(device.clone());
    let walked = panic::catch_unwind(AssertUnwindSafe(|| walk(device.clone(), client, context)));
    let error = match walked {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error,
        Err(panic) => SwapError::Panic(said(panic.as_ref())),
    };
    // Nor must a second panic leave a thread waiting.
    let failed = panic::catch_unwind(AssertUnwindSafe(|| fail(&device, &error)));
    if let Err(panic) = failed {
        tracing::error!(
            gpu = %device.gpu,
            "nvshare panicked while it released this process's memory on the GPU: {}",
            said(panic.as_ref())
        );
    }
}

/// Walks the client through its phases until its last context is destroyed.
fn walk(device: Arc<Device>, client: Client<MappedPage>, context: CUcontext) -> Result<(), SwapError> {
    // The engine's calls must neither become part of a capture of another thread nor invalidate it.
    let _ = device.driver.exchange_capture_mode(CU_STREAM_CAPTURE_MODE_RELAXED);
    let current = device.driver.ctx_set_current(context);
    current.map_err(|result| SwapError::Driver { call: "cuCtxSetCurrent", result })?;
    device.join_replicas();
    let swap = Swap::new(device.clone())?;
    let flow_control = settings().is_ok_and(|settings| settings.flow_control);
    let mut engine = Engine::new(device, client, swap, flow_control);
    engine.run()?;
    engine.leave();
    Ok(())
}

/// After an error: logs it, makes the process's calls fail, and gives up its memory and its slot.
fn fail(device: &Arc<Device>, error: &SwapError) {
    let (gpu, result) = (device.gpu, error.cuda());
    // Another GPU's engine has logged it.
    let told = state::intact().is_err();
    if error.is_shutdown() {
        tracing::debug!(%gpu, "the engine ends: {error}");
    } else if !told {
        tracing::error!(
            %gpu,
            "memory cannot be moved any more, every CUDA call of this process fails from now on ({result}): {error}. Start the process again; other processes go on"
        );
    }
    if result == CuResult::DEINITIALIZED {
        // The process is exiting. Exit handlers may still make calls, or wait for threads that do, so the gate must let them
        // through: the driver answers them. The arbiter closes the client's accounts.
        turn_taking::end(gpu, false);
        return gang::leave(gpu);
    }
    fail_process(gpu, result);
    turn_taking::end(gpu, true);
    await_last_work(device);
    give_up(device);
}

/// Waits for the work that may use the memory, but no longer than [`LAST_WORK`]. No thread submits any more.
fn await_last_work(device: &Device) {
    let until = now() + LAST_WORK;
    if !gate().vacated(until) {
        return;
    }
    // This GPU has left the gang already, so it is marked separately.
    let all = || gang::mark().and(device.streams.mark(device.driver));
    let Some(mut mark) = captures::with_no_capture(all) else { return };
    while !mark.look() && now() < until {
        std::thread::sleep(Duration::from_nanos(MILLISECOND));
    }
}

/// Releases all memory except chunks that were being moved when a panic came: their state is unknown, so they stay
/// counted as the process's until it ends.
fn give_up(device: &Arc<Device>) {
    let regions = {
        let mut memory = device.memory();
        memory.open = false;
        device.drop_spares(&mut memory);
        memory.take_all()
    };
    let moving = |region: &Region| -> Granules {
        let moving = region.chunks.iter().filter(|chunk| matches!(chunk.backing, Backing::Moving));
        moving.map(|chunk| chunk.granules()).sum()
    };
    let lost = regions.iter().map(moving).sum();
    regions.into_iter().for_each(|region| device.dispose(region));
    device.books.end(lost);
}

/// Announces that the engine has ended, in whatever way.
struct Ended(Arc<Device>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.set_moving(false);
        self.0.leave_replicas();
        self.0.engine_context.engine_ended();
    }
}

thread_local! {
    /// Whether this thread is an engine. A plain value without a destructor: the application's threads may read it even while
    /// their thread-locals are being destroyed.
    static ENGINE: Cell<bool> = const { Cell::new(false) };
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Installs a panic hook that keeps an engine's panic for the log, in one line with its consequences, and prints nothing.
fn keep_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !ENGINE.get() {
                return before(info);
            }
            let at = info.location().map_or_else(String::new, |location| format!(" at {location}"));
            PANIC.set(format!("{}{at}", info.payload_as_str().unwrap_or("for no known reason")));
        }));
    });
}

fn said(panic: &(dyn Any + Send)) -> String {
    let kept = PANIC.take();
    let payload =
        || panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    if kept.is_empty() { payload().unwrap_or("for no known reason").to_owned() } else { kept }
}

/// Makes every call of the process that uses a GPU return `result` from now on, because memory of one GPU cannot be moved any
/// more. Wakes the threads that wait for an engine, and the engines of the process's other GPUs, which end too.
fn fail_process(gpu: GpuUuid, result: CuResult) {
    state::set_failed(result);
    gate().fail();
    captures::wake_beginners();
    gang::leave(gpu);
    gang::wake_engines();
}
