//! How an engine ends: as its last context goes, or because it cannot go on.
//!
//! Whatever ends it, nobody waits for it any more. If it was not to end, memory that is out will not come back, so the
//! process's calls fail from then on, and the others get the room.

use crate::cuda::abi::*;
use crate::memory::device::Device;
use crate::memory::region::{Backing, Region};
use crate::memory::swap::Swap;
use crate::process::engine::{Engine, SwapError};
use crate::settings::settings;
use crate::state;
use crate::submit::gate::gate;
use crate::submit::{captures, gang};
use nvshare::Client;
use nvshare::map::MappedPage;
use nvshare::sync::now;
use nvshare::units::{GpuUuid, Granules, MILLISECOND, Nanos, SECOND};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Once};
use std::time::Duration;

/// The work in flight has so long to end before its memory goes, when an engine cannot go on.
const LAST_WORK: Nanos = 10 * SECOND;

/// The engine's thread.
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
    // A second panic must not leave anybody waiting either.
    let failed = panic::catch_unwind(AssertUnwindSafe(|| fail(&device, &error)));
    if let Err(panic) = failed {
        tracing::error!(gpu = %device.gpu, "while giving its memory up: {}", said(panic.as_ref()));
    }
}

/// Walks the client through its phases until its last context goes.
fn walk(device: Arc<Device>, client: Client<MappedPage>, context: CUcontext) -> Result<(), SwapError> {
    // What the engine does is never meant for a graph that some other thread captures.
    let _ = device.driver.exchange_capture_mode(CU_STREAM_CAPTURE_MODE_RELAXED);
    let current = device.driver.ctx_set_current(context);
    current.map_err(|result| SwapError::Driver { call: "cuCtxSetCurrent", result })?;
    let swap = Swap::new(device.clone())?;
    let flow_control = settings().is_ok_and(|settings| settings.flow_control);
    let mut engine = Engine::new(device, client, swap, flow_control);
    engine.run()?;
    engine.leave();
    Ok(())
}

/// The engine cannot go on: says so, has the process's calls fail, and gives its memory and its slot up.
fn fail(device: &Arc<Device>, error: &SwapError) {
    let (gpu, result) = (device.gpu, error.cuda());
    // Another GPU's engine has said it.
    let told = state::intact().is_err();
    if error.is_shutdown() {
        tracing::debug!(%gpu, "the engine ends: {error}");
    } else if !told {
        tracing::error!(
            %gpu,
            "memory cannot be moved any more, every CUDA call of this process fails from now on ({result}): {error}"
        );
    }
    if result == CuResult::DEINITIALIZED {
        // The process is ending. Exit handlers may still make calls, and wait for other threads that do: the driver answers
        // them all, and no memory is in the way. The arbiter closes the books.
        return gang::leave(gpu);
    }
    fail_process(gpu, result);
    await_last_work(device);
    give_up(device);
}

/// Nobody submits any more. What was submitted may use the memory: it has a while to end.
fn await_last_work(device: &Device) {
    let until = now() + LAST_WORK;
    if !gate().vacated(until) {
        return;
    }
    // This GPU is none of those any more that the process has together.
    let all = || gang::mark().and(device.streams.mark(device.driver));
    let Some(mut mark) = captures::with_no_capture(all) else { return };
    while !mark.look() && now() < until {
        std::thread::sleep(Duration::from_nanos(MILLISECOND));
    }
}

/// Gives all memory back, but what was on its way when a panic came: nobody knows where that is, so it is the process's until
/// it ends.
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

/// Says, however the engine ends, that it has.
struct Ended(Arc<Device>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.set_moving(false);
        self.0.engine_context.engine_ended();
    }
}

thread_local! {
    /// This thread is an engine. A plain value: the application's threads ask for it to their very end.
    static ENGINE: Cell<bool> = const { Cell::new(false) };
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Has a panic of an engine be told in the log, in one line with what follows from it, and not by the panic itself.
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

/// Memory of a GPU cannot be moved any more: every call that uses a GPU returns `result` from now on. Whoever waits for an
/// engine is woken. The process's other GPUs are of no use to it.
fn fail_process(gpu: GpuUuid, result: CuResult) {
    state::set_failed(result);
    gate().fail();
    captures::wake_beginners();
    gang::leave(gpu);
    gang::wake_engines();
}
