//! The context that a GPU's engine works in, and how the engine leaves one that is about to be destroyed.
//!
//! The engine has streams and events in one context, and host memory is registered through that context. Both must be removed
//! from it before the driver destroys it. So a thread that destroys the context asks the engine to move to a *successor*, and
//! waits.

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
    /// To none, because its context is the last one. The engine waits until it is known whether the driver destroys it.
    None,
}

/// Registers host memory with the driver.
pub struct DriverPinner {
    driver: &'static Driver,
    /// Registrations are valid in all contexts, and end with this one.
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
        let refused = |result: CuResult| PinError::new(format!("cuMemHostRegister failed with {result}"));
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

/// The context that an engine works in, and the state of its move to another.
pub struct EngineContext {
    pinner: Arc<DriverPinner>,
    moving: Mutex<Moving>,
    changed: Condvar,
    /// The engine must release everything and end.
    leaving: AtomicBool,
}

/// The state of the engine's move out of its context.
#[derive(Default)]
struct Moving {
    /// Where the engine must move.
    successor: Option<Successor>,
    /// The engine has left all contexts.
    is_out: bool,
    /// The context to which it moves after that.
    back: Option<CUcontext>,
    engine_ended: bool,
}

impl EngineContext {
    /// For an engine that works in the context of `pinner`.
    pub fn new(pinner: Arc<DriverPinner>) -> Self {
        Self { pinner, moving: Mutex::default(), changed: Condvar::new(), leaving: AtomicBool::new(false) }
    }

    fn moving(&self) -> MutexGuard<'_, Moving> {
        nvshare::sync::lock(&self.moving)
    }

    /// Where the engine must move, if its context is about to be destroyed.
    pub fn successor(&self) -> Option<Successor> {
        self.moving().successor
    }

    /// Whether the engine must release everything and end.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }

    /// Whether the engine has a task that must not wait until the GPU has memory.
    pub fn is_called_away(&self) -> bool {
        self.is_leaving() || self.successor().is_some() || state::intact().is_err()
    }

    /// Makes the engine move from `context` to a successor, and waits until it has. `wake` wakes the engine. Does nothing if
    /// the engine works in another context or has ended.
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

    /// Makes an engine that has left all contexts move to this one: its former one, if that was not destroyed, or another.
    pub fn go_back(&self, context: CUcontext) {
        let mut moving = self.moving();
        if moving.successor == Some(Successor::None) {
            moving.back = Some(context);
            self.changed.notify_all();
        }
    }

    /// Makes the engine end, because the last context is gone. The caller wakes it.
    pub fn end(&self) {
        let _moving = self.moving();
        self.leaving.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// The engine has moved to `context`: registers the host memory through it too.
    pub fn moved_to(&self, context: CUcontext, host: &HostPool) {
        host.repin(|| {
            *self.pinner.context() = context;
            true
        });
        self.moving().successor = None;
        self.changed.notify_all();
    }

    /// Unregisters the host memory, and waits until it is known whether the driver has destroyed the last context. Returns the
    /// context to which the engine moves; `None` if it must end.
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

    /// The engine has ended: wakes the threads that wait for it.
    pub fn engine_ended(&self) {
        self.moving().engine_ended = true;
        self.changed.notify_all();
    }
}
