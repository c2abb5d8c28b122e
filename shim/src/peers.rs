//! Which GPUs of the process may use the memory of which others.
//!
//! cuCtxEnablePeerAccess reaches memory of cuMemAlloc, and not memory that is mapped by hand, which all of ours
//! is. So what the application enables is written down here, and given to each mapping: to those that are there
//! at once, to others when they come.

use crate::abi::*;
use crate::device::Shared;
use crate::memory::{Backing, Kind};
use crate::session;
use std::sync::{Mutex, MutexGuard};

/// Whose memory, and who may use it.
static PAIRS: Mutex<Vec<(CUdevice, CUdevice)>> = Mutex::new(Vec::new());

fn pairs() -> MutexGuard<'static, Vec<(CUdevice, CUdevice)>> {
    PAIRS.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The other GPUs that may use the memory of this one.
fn users_of(owner: CUdevice) -> Vec<CUdevice> {
    pairs().iter().filter(|(of, _)| *of == owner).map(|(_, user)| *user).collect()
}

/// The driver has let the current context use the memory of `peer`.
pub fn enabled(peer: CUcontext) {
    change(peer, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
}

/// The driver lets the current context use the memory of `peer` no more.
pub fn disabled(peer: CUcontext) {
    change(peer, CU_MEM_ACCESS_FLAGS_PROT_NONE);
}

fn change(peer: CUcontext, flags: u32) {
    let (Some((user, _)), Some(owner)) = (session::current(), session::of_context(peer)) else { return };
    let pair = (owner.device, user.device);
    if pair.0 == pair.1 {
        return;
    }
    {
        let mut pairs = pairs();
        pairs.retain(|known| *known != pair);
        if flags != CU_MEM_ACCESS_FLAGS_PROT_NONE {
            pairs.push(pair);
        }
    }
    owner.let_use(user.device, flags);
}

impl Shared {
    /// Who may use this GPU's memory where nvshare has mapped it.
    pub fn access(&self) -> Vec<CUmemAccessDesc> {
        std::iter::once(self.device).chain(users_of(self.device)).map(CUmemAccessDesc::read_write).collect()
    }

    /// Lets another GPU use what is mapped now, or no more.
    fn let_use(&self, user: CUdevice, flags: u32) {
        let access = [CUmemAccessDesc { location: CUmemLocation::device(user), flags }];
        let memory = self.memory_at_rest();
        let ours = memory.regions().filter(|region| matches!(region.kind, Kind::Whole | Kind::Slab(_)));
        for chunk in ours.flat_map(|region| &region.chunks) {
            if matches!(chunk.backing, Backing::Device(_) | Backing::Overflow(_))
                && let Err(result) = self.driver.mem_set_access(chunk.address, chunk.size as usize, &access)
            {
                tracing::warn!(gpu = %self.gpu, "device {user} cannot use the memory at {:#x}: {result}", chunk.address);
            }
        }
    }
}
