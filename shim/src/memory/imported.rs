//! GPU memory that another process has made and this one has imported.
//!
//! The driver does not export imported memory (CUDA_ERROR_INVALID_VALUE on an H200). But the descriptor from which it was imported
//! can be sent on. So that descriptor is kept as long as the memory.

use crate::cuda::abi::{CUmemGenericAllocationHandle, CuResult};
use crate::cuda::driver::Driver;
use crate::local_socket::Socket;
use nvshare::sync::lock;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;

/// The part of the process's descriptors that may be kept: the application needs the others.
const PART: u64 = 4;

/// The descriptors of imported memory, by its handle.
#[derive(Debug, Default)]
pub struct Imported {
    descriptors: Mutex<BTreeMap<CUmemGenericAllocationHandle, Socket>>,
}

/// How many descriptors may be kept: a quarter of those that the process may open (RLIMIT_NOFILE), and no more than a forked child closes.
fn most() -> usize {
    let (soft, _) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap_or((0, 0));
    usize::try_from(soft / PART).unwrap_or(usize::MAX).min(crate::local_socket::MOST / 2)
}

impl Imported {
    /// How many chunks more may be imported.
    pub fn room(&self) -> usize {
        most().saturating_sub(lock(&self.descriptors).len())
    }

    /// Imports memory that is handed on later.
    ///
    /// # Errors
    /// The driver's; OPERATING_SYSTEM if the process has no descriptor left for it.
    pub fn import(
        &self,
        driver: &Driver,
        memory: impl AsFd,
    ) -> Result<CUmemGenericAllocationHandle, CuResult> {
        let kept = memory.as_fd().try_clone_to_owned().map_err(|_| CuResult::OPERATING_SYSTEM)?;
        let handle = driver.mem_import(memory.as_fd())?;
        lock(&self.descriptors).insert(handle, Socket::new(kept));
        Ok(handle)
    }

    /// A descriptor of memory, wherever that comes from.
    ///
    /// # Errors
    /// The driver's; OPERATING_SYSTEM if the process has no descriptor left for it.
    pub fn export(&self, driver: &Driver, handle: CUmemGenericAllocationHandle) -> Result<OwnedFd, CuResult> {
        match lock(&self.descriptors).get(&handle) {
            Some(kept) => kept.as_fd().try_clone_to_owned().map_err(|_| CuResult::OPERATING_SYSTEM),
            None => driver.mem_export(handle),
        }
    }

    /// The memory is about to be released. Afterwards the driver may give its handle to other memory.
    pub fn forget(&self, handle: CUmemGenericAllocationHandle) {
        let kept = lock(&self.descriptors).remove(&handle);
        // The lock is not held while the descriptor is closed.
        drop(kept);
    }
}
