//! The context that a GPU's engine works in, and its way out of one that ends.
//!
//! The engine has streams and events in one context, and host memory is registered through one. Both must be out of a context
//! before the driver destroys it. So whoever ends a context asks the engine to move to a *successor*, and waits.

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::memory::host::{HostPool, PinError, Pinner};
use crate::state;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// Where the engine is to move to, because its context is about to be destroyed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Successor {
    /// To another context.
    Context(CUcontext),
    /// Out of its context, which is the last one. It waits until it is known whether that one goes.
    None,
}

/// Registers host memory with the driver.
pub struct DriverPinner {
    driver: &'static Driver,
    /// The registration is good in all contexts and goes with this one.
    context: Mutex<CUcontext>,
}

impl DriverPinner {
    /// Registers in this context, for all contexts.
    pub fn new(driver: &'static Driver, context: CUcontext) -> Self {
        Self { driver, context: Mutex::new(context) }
    }

    fn context(&self) -> MutexGuard<'_, CUcontext> {
        nvshare::sync::lock(&self.context)
    }
}

impl Pinner for Arc<DriverPinner> {
    fn pin(&self, address: *mut u8, length: usize) -> Result<(), PinError> {
        let refused = |result: CuResult| PinError::new(format!("cuMemHostRegister said {result}"));
        self.driver.ctx_push_current(*self.context()).map_err(refused)?;
        // SAFETY: the pool mapped this memory, keeps it while it is registered, and unpins it first.
        let pinned = unsafe { self.driver.mem_host_register(address, length, CU_MEMHOSTREGISTER_PORTABLE) };
        let _ = self.driver.ctx_pop_current();
        pinned.map_err(refused)
    }

    fn unpin(&self, address: *mut u8, _length: usize) {
        if self.driver.ctx_push_current(*self.context()).is_ok() {
            let _ = self.driver.mem_host_unregister(address);
            let _ = self.driver.ctx_pop_current();
        }
    }
}

/// The context that an engine works in, and whoever waits for it to leave.
pub struct EngineContext {
    pinner: Arc<DriverPinner>,
    moving: Mutex<Moving>,
    changed: Condvar,
    /// The engine is to give everything back and end.
    leaving: AtomicBool,
}

/// How far the engine has got on its way out of its context.
#[derive(Default)]
struct Moving {
    /// Where to move to.
    successor: Option<Successor>,
    /// It has nothing in any context.
    is_out: bool,
    /// Where it goes from there.
    back: Option<CUcontext>,
    engine_ended: bool,
}

impl EngineContext {
    /// Of an engine that works in the context of `pinner`.
    pub fn new(pinner: Arc<DriverPinner>) -> Self {
        Self { pinner, moving: Mutex::default(), changed: Condvar::new(), leaving: AtomicBool::new(false) }
    }

    fn moving(&self) -> MutexGuard<'_, Moving> {
        nvshare::sync::lock(&self.moving)
    }

    /// Where the engine is about to move to, because its own context will be destroyed.
    pub fn successor(&self) -> Option<Successor> {
        self.moving().successor
    }

    /// Whether the engine is to give everything back and end.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }

    /// Whether the engine has something to do that does not wait for memory on the GPU.
    pub fn is_called_away(&self) -> bool {
        self.is_leaving() || self.successor().is_some() || state::intact().is_err()
    }

    /// Has the engine move what it has in `context` to a successor, and waits until it has. `wake` wakes the engine. Nothing to
    /// do if it works in another context, or if it has ended.
    pub fn leave(&self, context: CUcontext, successor: Successor, wake: impl FnOnce()) {
        if *self.pinner.context() != context {
            return;
        }
        self.moving().successor = Some(successor);
        wake();
        let waits =
            |moving: &mut Moving| moving.successor.is_some() && !moving.is_out && !moving.engine_ended;
        drop(self.changed.wait_while(self.moving(), waits));
    }

    /// If the engine has left all contexts, it goes to this one: the one before is still there, or another is.
    pub fn go_back(&self, context: CUcontext) {
        let mut moving = self.moving();
        if moving.successor == Some(Successor::None) {
            moving.back = Some(context);
            self.changed.notify_all();
        }
    }

    /// The last context is gone: the engine is to end. The caller wakes it.
    pub fn end(&self) {
        let _moving = self.moving();
        self.leaving.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// The engine works in `context` now. The host memory is registered through it too.
    pub fn moved_to(&self, context: CUcontext, host: &HostPool) {
        host.repin(|| {
            *self.pinner.context() = context;
            true
        });
        self.moving().successor = None;
        self.changed.notify_all();
    }

    /// The engine has nothing in any context, and neither has the host memory, until it is known what becomes of the one
    /// that it was in. The context to go to, unless the engine is to end.
    pub fn out_of_context(&self, host: &HostPool) -> Option<CUcontext> {
        let mut back = None;
        host.repin(|| {
            self.moving().is_out = true;
            self.changed.notify_all();
            let undecided = |moving: &mut Moving| moving.back.is_none() && !self.is_leaving();
            let decided = self.changed.wait_while(self.moving(), undecided);
            let mut moving = decided.unwrap_or_else(|poisoned| poisoned.into_inner());
            back = moving.back.take();
            (moving.successor, moving.is_out) = (None, false);
            back.inspect(|context| *self.pinner.context() = *context).is_some()
        });
        back
    }

    /// The engine has ended: nobody waits for it any more.
    pub fn engine_ended(&self) {
        self.moving().engine_ended = true;
        self.changed.notify_all();
    }
}
