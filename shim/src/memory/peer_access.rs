//! Which GPUs of the process may use the memory of which others.
//!
//! cuCtxEnablePeerAccess reaches memory of cuMemAlloc, and not memory that is mapped by hand, which all of ours
//! is. So what the application enables is written down here, and given to each mapping: to those that are there
//! at once, to others when they come.

use crate::cuda::abi::*;
use crate::memory::device::Device;
use crate::memory::devices;
use crate::memory::region::{Backing, Kind};
use std::sync::{Mutex, MutexGuard};

/// A context whose memory another one may use. Rights to mappings are a GPU's, so a GPU has them for as long as any
/// context on it does.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Pair {
    owner: (CUdevice, CUcontext),
    user: (CUdevice, CUcontext),
}

impl Pair {
    fn devices(&self) -> (CUdevice, CUdevice) {
        (self.owner.0, self.user.0)
    }
}

static PAIRS: Mutex<Vec<Pair>> = Mutex::new(Vec::new());

fn pairs() -> MutexGuard<'static, Vec<Pair>> {
    nvshare::sync::lock(&PAIRS)
}

/// The other GPUs that may use the memory of this one.
fn users_of(owner: CUdevice) -> Vec<CUdevice> {
    let mut users: Vec<_> =
        pairs().iter().filter(|pair| pair.owner.0 == owner).map(|pair| pair.user.0).collect();
    users.sort_unstable();
    users.dedup();
    users
}

/// The pair of a context that uses memory and of `peer`, if both are on GPUs that nvshare shares, and these are two.
fn pair_of(user: CUcontext, peer: CUcontext) -> Option<Pair> {
    let ((user, context), owner) = (devices::known(user)?, devices::of_context(peer)?);
    let pair = Pair { owner: (owner.ordinal, peer), user: (user.ordinal, context) };
    (pair.owner.0 != pair.user.0).then_some(pair)
}

/// The driver has let a context use the memory of `peer`.
pub fn enabled(user: CUcontext, peer: CUcontext) {
    let Some(pair) = pair_of(user, peer) else { return };
    pairs().push(pair);
    if let Some(owner) = devices::of_context(peer) {
        owner.let_use(pair.user.0, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    }
}

/// The driver lets a context use the memory of `peer` no more.
pub fn disabled(user: CUcontext, peer: CUcontext) {
    if let Some(pair) = pair_of(user, peer) {
        take_back(|known| *known == pair);
    }
}

/// A context is about to be destroyed: nobody uses its memory, and it uses nobody's.
pub fn context_ends(context: CUcontext) {
    take_back(|pair| pair.owner.1 == context || pair.user.1 == context);
}

/// Takes rights back that no context has any more.
fn take_back(is_over: impl Fn(&Pair) -> bool) {
    let (over, left): (Vec<_>, Vec<_>) = {
        let mut pairs = pairs();
        let over = pairs.extract_if(.., |pair| is_over(pair)).map(|pair| pair.devices()).collect();
        (over, pairs.iter().map(Pair::devices).collect())
    };
    for (owner, user) in over.into_iter().filter(|devices| !left.contains(devices)) {
        if let Some(owner) = devices::of_device(owner) {
            owner.let_use(user, CU_MEM_ACCESS_FLAGS_PROT_NONE);
        }
    }
}

impl Device {
    /// Who may use this GPU's memory where nvshare has mapped it.
    pub fn access(&self) -> Vec<CUmemAccessDesc> {
        std::iter::once(self.ordinal).chain(users_of(self.ordinal)).map(CUmemAccessDesc::read_write).collect()
    }

    /// Lets another GPU use what is mapped now, or no more.
    fn let_use(&self, user: CUdevice, flags: u32) {
        let access = [CUmemAccessDesc { location: CUmemLocation::device(user), flags }];
        let mut memory = self.memory_at_rest();
        // Those have the rights that they were mapped with.
        self.drop_spares(&mut memory);
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
