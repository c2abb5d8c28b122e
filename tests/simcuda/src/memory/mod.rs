//! Memory: physical allocations ([`backing`]) and those of other processes ([`sharing`]), the address space ([`va`])
//! and what was taken out of it (`gaps`), and moving bytes between ([`access`]).

pub mod access;
pub mod backing;
mod gaps;
pub mod sharing;
pub mod va;

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, RwLock};

use crate::abi::{Error, Handle, Result};
use crate::driver::lock;
use crate::handles;
use backing::{Backing, Physical};
use va::Space;

/// The process's memory: what exists and where it is mapped.
pub struct Memory {
    pub backing: Arc<Backing>,
    pub space: RwLock<Space>,
    handles: Mutex<HashMap<Handle, Owned>>,
}

/// A physical allocation and how often it has been created or retained.
struct Owned {
    physical: Arc<Physical>,
    references: u32,
}

impl Memory {
    pub fn new() -> io::Result<Memory> {
        let backing = Arc::new(Backing::new()?);
        Ok(Memory { backing, space: RwLock::default(), handles: Mutex::default() })
    }

    /// Gives a physical allocation the handle that `make` is told (`cuMemCreate` and its like).
    pub fn create(&self, make: impl FnOnce(Handle) -> Result<Physical>) -> Result<Handle> {
        let handle = handles::fresh();
        let physical = Arc::new(make(handle)?);
        lock(&self.handles).insert(handle, Owned { physical, references: 1 });
        Ok(handle)
    }

    pub fn physical(&self, handle: Handle) -> Result<Arc<Physical>> {
        lock(&self.handles).get(&handle).map(|owned| owned.physical.clone()).ok_or(Error::INVALID_VALUE)
    }

    /// Adds a reference (`cuMemRetainAllocationHandle`); the handle may have been released while it was mapped.
    pub fn retain(&self, physical: &Arc<Physical>) -> Handle {
        let mut handles = lock(&self.handles);
        let fresh = || Owned { physical: physical.clone(), references: 0 };
        handles.entry(physical.handle).or_insert_with(fresh).references += 1;
        physical.handle
    }

    /// Drops a reference (`cuMemRelease`).
    pub fn release(&self, handle: Handle) -> Result {
        let mut handles = lock(&self.handles);
        let owned = handles.get_mut(&handle).ok_or(Error::INVALID_VALUE)?;
        owned.references -= 1;
        if owned.references == 0 {
            handles.remove(&handle);
        }
        Ok(())
    }
}
