//! Which GPUs of the process may access the memory of which others.
//!
//! cuCtxEnablePeerAccess gives access to memory of cuMemAlloc, but not to memory mapped by cuMemMap, as all memory of nvshare
//! is. So the access that the application enables is recorded here and set for each mapping: at once for existing mappings,
//! and for later ones when they are made.

use crate::cuda::abi::*;
use crate::memory::device::Device;
use crate::memory::devices;
use crate::memory::region::{Backing, Kind};
use std::sync::{Mutex, MutexGuard};

/// A context (`owner`) whose memory another one (`user`) may access. Access to mappings is given to a GPU, so a GPU keeps it as
/// long as any of its contexts has it.
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

/// The other GPUs that may access the memory of this one.
fn users_of(owner: CUdevice) -> Vec<CUdevice> {
    let mut users: Vec<_> =
        pairs().iter().filter(|pair| pair.owner.0 == owner).map(|pair| pair.user.0).collect();
    users.sort_unstable();
    users.dedup();
    users
}

/// The pair of `user` and the owner `peer`, if they are on two different GPUs to which the process has attached.
fn pair_of(user: CUcontext, peer: CUcontext) -> Option<Pair> {
    let ((user, context), owner) = (devices::known(user)?, devices::of_context(peer)?);
    let pair = Pair { owner: (owner.ordinal, peer), user: (user.ordinal, context) };
    (pair.owner.0 != pair.user.0).then_some(pair)
}

/// Records that the driver has given a context access to the memory of `peer`, and gives it to the mappings.
pub fn enabled(user: CUcontext, peer: CUcontext) {
    let Some(pair) = pair_of(user, peer) else { return };
    pairs().push(pair);
    if let Some(owner) = devices::of_context(peer) {
        owner.let_use(pair.user.0, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    }
}

/// Records that the driver has taken a context's access to the memory of `peer`, and takes it from the mappings.
pub fn disabled(user: CUcontext, peer: CUcontext) {
    if let Some(pair) = pair_of(user, peer) {
        take_back(|known| *known == pair);
    }
}

/// Takes all access to and by a context that was destroyed.
pub fn context_ends(context: CUcontext) {
    take_back(|pair| pair.owner.1 == context || pair.user.1 == context);
}

/// Takes from the mappings the access that no context has any more.
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
    /// The access rights with which nvshare maps this GPU's memory.
    pub fn access(&self) -> Vec<CUmemAccessDesc> {
        std::iter::once(self.ordinal).chain(users_of(self.ordinal)).map(CUmemAccessDesc::read_write).collect()
    }

    /// Sets another GPU's access to all memory that is mapped now.
    fn let_use(&self, user: CUdevice, flags: u32) {
        let access = [CUmemAccessDesc { location: CUmemLocation::device(user), flags }];
        let mut memory = self.memory_at_rest();
        // Spares keep the access rights with which they were mapped, so they are released.
        self.drop_spares(&mut memory);
        let ours = memory.regions().filter(|region| matches!(region.kind, Kind::Whole | Kind::Slab(_)));
        for chunk in ours.flat_map(|region| &region.chunks) {
            if matches!(chunk.backing, Backing::Device(_) | Backing::Overflow(_))
                && let Err(result) = self.driver.mem_set_access(chunk.address, chunk.size as usize, &access)
            {
                tracing::warn!(
                    gpu = %self.gpu,
                    "the access of device {user} to the memory at {:#x} could not be changed (cuMemSetAccess): {result}",
                    chunk.address
                );
            }
        }
    }
}
