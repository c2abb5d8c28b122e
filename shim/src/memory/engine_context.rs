//! The context that a GPU's engine works in, and its way out of one that ends.
//!
//! The engine has streams and events in one context, and host memory is registered through one. Both must be out of a context
//! before the driver destroys it. So whoever ends a context asks the engine to move to a *successor*, and waits.

use crate::cuda::abi::*;
use crate::cuda::driver::Driver;
use crate::memory::device::Device;
use crate::memory::host::{PinError, Pinner};
use crate::state;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

/// Where the engine lives, if it is about to change.
#[derive(Default)]
pub struct Home {
    /// Where to move to.
    heir: Option<Successor>,
    /// It has nothing in any context.
    out: bool,
    /// Where it goes from there.
    back: Option<CUcontext>,
    engine_ended: bool,
}

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
        self.context.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
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

impl Device {
    /// Where the engine is about to move to, because its own context will be destroyed.
    pub fn heir(&self) -> Option<Successor> {
        self.home().heir
    }

    fn home(&self) -> MutexGuard<'_, Home> {
        self.home.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Has the engine move what it has in `context` to its heir, and waits until it has. Nothing to do if its
    /// home is another one, or if it has ended.
    pub fn leave_context(&self, context: CUcontext, heir: Successor) {
        if *self.pinner.context() != context {
            return;
        }
        self.home().heir = Some(heir);
        self.knock();
        let waits = |home: &mut Home| home.heir.is_some() && !home.out && !home.engine_ended;
        drop(self.moved.wait_while(self.home(), waits));
    }

    /// If the engine has left all contexts, it goes to this one: the one before is still there, or another is.
    pub fn go_back(&self, context: CUcontext) {
        let mut home = self.home();
        if home.heir == Some(Successor::None) {
            home.back = Some(context);
            self.moved.notify_all();
        }
    }

    /// The last context is gone: the engine ends.
    pub fn end(&self) {
        {
            let _home = self.home();
            self.leaving.store(true, Ordering::Release);
            self.moved.notify_all();
        }
        self.knock();
    }

    /// The engine is at home in `context` now: the host memory too.
    pub fn at_home(&self, context: CUcontext) {
        self.host.repin(|| {
            *self.pinner.context() = context;
            true
        });
        self.home().heir = None;
        self.moved.notify_all();
    }

    /// The engine has nothing in any context, and neither has the host memory, until it is known what becomes of the one
    /// that it was in. The context to go to, unless the engine is to end.
    pub fn out_of_context(&self) -> Option<CUcontext> {
        let mut back = None;
        self.host.repin(|| {
            self.home().out = true;
            self.moved.notify_all();
            let undecided = |home: &mut Home| home.back.is_none() && !self.leaving.load(Ordering::Acquire);
            let decided = self.moved.wait_while(self.home(), undecided);
            let mut home = decided.unwrap_or_else(|poisoned| poisoned.into_inner());
            back = home.back.take();
            (home.heir, home.out) = (None, false);
            back.inspect(|context| *self.pinner.context() = *context).is_some()
        });
        back
    }

    /// Whether the engine has something to do that does not wait for room on the GPU.
    pub fn is_called_away(&self) -> bool {
        self.leaving.load(Ordering::Acquire) || self.heir().is_some() || state::intact().is_err()
    }

    /// The engine has ended: nobody waits for it any more.
    pub fn engine_ended(&self) {
        self.home().engine_ended = true;
        self.moved.notify_all();
    }
}
