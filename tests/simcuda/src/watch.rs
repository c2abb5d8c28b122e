//! Calls that come while memory is out.
//!
//! An access to memory that isn't mapped is found when it runs. That says little about a gate which lets calls through
//! too early: most of them carry arguments that happen to do no harm, or submit work that runs when all is over. So
//! with `NVSHARE_SIM_WATCH=1` a call is judged by its moment, whatever its arguments: an entry point that submits work
//! or looks at memory ([`crate::api`] lists them) fails with `CUDA_ERROR_ILLEGAL_ADDRESS` while memory of the process
//! is out, the error sticks to the context, and it is counted as an illegal access.
//!
//! **Memory is out** while a range that was mapped (`cuMemMap`) is unmapped and still reserved: there are addresses
//! that the application has been told and that mean nothing now.
//!
//! **Whose calls.** Those of every thread but the one that made the gap. Moving memory takes copies, and whoever moves
//! it makes them from the thread that maps and unmaps; those are judged by their addresses alone, as always.
//!
//! No real driver does this, and a program may have gaps of its own making: it is for programs that unmap nothing
//! themselves and free nothing while they submit.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::abi::{Error, Result};
use crate::driver::driver;
use crate::{api, context};

static ON: AtomicBool = AtomicBool::new(false);

/// Watches from now on.
pub fn start() {
    ON.store(true, Relaxed);
}

/// Fails if the call of this name comes too early.
#[inline]
pub fn check(name: &str) -> Result {
    if ON.load(Relaxed) { look(name) } else { Ok(()) }
}

#[cold]
fn look(name: &str) -> Result {
    if !api::is_gated(name) {
        return Ok(());
    }
    let driver = driver()?;
    let out = driver.memory.space.read().unwrap_or_else(|e| e.into_inner()).gaps.made_by_others();
    if out == 0 {
        return Ok(());
    }
    let said = format!("process {} calls {name} while {out} B of its memory are out", std::process::id());
    match context::current() {
        Ok(context) => context.core.fail_because(Error::ILLEGAL_ADDRESS, || said),
        // Nobody can say which context it was meant for.
        Err(_) => driver
            .contexts
            .all()
            .iter()
            .for_each(|context| context.core.fail_because(Error::ILLEGAL_ADDRESS, || said.clone())),
    }
    Err(Error::ILLEGAL_ADDRESS)
}
