//! Compiling a kernel by the driver, for a GPU that its code is not at hand for.

use crate::cuda::abi::{CU_STREAM_CAPTURE_MODE_RELAXED, CUcontext};
use crate::cuda::driver::Driver;
use crate::memory::error::{SwapError, driver_said};
use crate::memory::scan::Entry;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

/// How long an engine waits for the compiler, which takes some tenths of a second.
const COMPILED_WITHIN: Duration = Duration::from_secs(2);

/// How long the end of a context is delayed because a kernel is being compiled in it. No compilation takes so long: one that
/// does is waiting for the dynamic loader's lock, which was free when it began, and the thread that holds the lock may be the
/// one that destroys the context.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(30);

/// A kernel while it is being compiled.
///
/// The driver opens its compiler, which is a library, and so needs the dynamic loader's lock. An application's
/// library that does CUDA work in a constructor holds that lock while it waits at the gate for this client's next turn. So a
/// separate thread compiles the kernel. The engine waits for that thread once, and until the kernel is loaded, copies zeros like
/// other data.
///
/// That library may also destroy its context in the constructor. So the thread does not begin before the lock is
/// free, and until then it can be cancelled.
///
/// The driver's linker compiles without waiting for the GPU, unlike its loader of modules (tests/gpu/waits.cu).
pub struct Compiling<E: Entry> {
    compiled: Receiver<Result<Vec<u8>, SwapError>>,
    step: Arc<AtomicU8>,
    waited: bool,
    entry: PhantomData<E>,
}

/// The thread has not called the driver yet.
const WAITS: u8 = 0;
/// The driver compiles the kernel, or has done so.
const COMPILES: u8 = 1;
/// The thread must not call the driver.
const GIVEN_UP: u8 = 2;

/// Changes the step from `from` to `to`. False if it is another.
fn go(step: &AtomicU8, from: u8, to: u8) -> bool {
    step.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
}

/// Waits until the dynamic loader's lock is free.
fn await_loader() {
    // SAFETY: without a name this opens the program itself, which is never unloaded.
    unsafe { libc::dlclose(libc::dlopen(std::ptr::null(), libc::RTLD_LAZY)) };
}

impl<E: Entry> Compiling<E> {
    /// Begins to compile the kernel for the GPU of a context.
    ///
    /// # Errors
    /// The system has no thread for it.
    pub fn begin(driver: &'static Driver, context: CUcontext) -> std::io::Result<Self> {
        let (tell, compiled) = sync_channel(1);
        let step = Arc::new(AtomicU8::new(WAITS));
        let begins = step.clone();
        std::thread::Builder::new().name("nvshare-scan".into()).spawn(move || {
            // The application's signals are for its own threads.
            let _ = nix::sys::signal::SigSet::all().thread_set_mask();
            await_loader();
            if !go(&begins, WAITS, COMPILES) {
                return;
            }
            let _ = driver.exchange_capture_mode(CU_STREAM_CAPTURE_MODE_RELAXED);
            let current = driver.ctx_set_current(context).map_err(driver_said("cuCtxSetCurrent"));
            let compile = || driver.compile(E::PTX).map_err(driver_said("the compiler (cuLinkAddData)"));
            // The receiver may be gone.
            let _ = tell.send(current.and_then(|()| compile()));
        })?;
        Ok(Self { compiled, step, waited: false, entry: PhantomData })
    }

    /// The kernel's code, or why there is none; `None` if it is not compiled yet. The first call waits for it.
    pub fn look(&mut self) -> Option<Result<Vec<u8>, SwapError>> {
        let patience = if self.waited { Duration::ZERO } else { COMPILED_WITHIN };
        self.waited = true;
        match self.compiled.recv_timeout(patience) {
            Ok(compiled) => Some(compiled),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                Some(Err(SwapError::Panic("while compiling a kernel".into())))
            }
        }
    }
}

impl<E: Entry> Drop for Compiling<E> {
    /// Cancels it, or waits for its end. The context may be destroyed only after that.
    fn drop(&mut self) {
        if go(&self.step, WAITS, GIVEN_UP) {
            return;
        }
        if let Err(RecvTimeoutError::Timeout) = self.compiled.recv_timeout(GIVEN_UP_WITHIN) {
            tracing::error!(
                "a context is being destroyed although the driver has been compiling nvshare's kernel in it for {} s; the driver may crash",
                GIVEN_UP_WITHIN.as_secs()
            );
        }
    }
}
