//! Replicas: processes that hold the same data, such as servers of one model, hand GPU memory to each other instead of copying it
//! from host memory (NVSHARE_REPLICAS; docs/decisions/0031-replicas.md).
//!
//! Clients of one GPU, of one user, with the same name are a *group*. A client that evicts is a *giver*, and one that is filled a
//! *taker*. They talk over a socket of the taker's, whose name both can compute from the page:
//!
//! ```text
//!   the giver's engine ([`giving`])                        a thread of the taker's ([`taking`])
//!   "I am of this group and have this key"       ─────▶    "so am I, and I have this key"
//!   "these chunks I could evict now": digests    ─────▶    which of them it lacks: they are promised
//!   unmaps a chunk, and sends its memory         ─────▶    puts it in the inbox, from which the taker's engine takes it
//!   gives its granules back to the pool          ◀─────    "taken, or dropped"
//! ```
//!
//! A *digest* stands for a chunk's contents. Both must take fingerprints with the same random key, so the younger key gives way to
//! the older one ([`key`]).
//!
//! **Nothing is lost.** The giver has a copy of the chunk in host memory, and so has the taker; what is handed over is only a faster
//! way to the same bytes. Whoever is killed, stopped or talks nonsense: the other one copies as it would without a replica, and the
//! driver frees memory that is under way when the last descriptor is closed. Nobody waits for the other for longer than
//! [`giving::PATIENCE`] at a time.
//!
//! This room knows neither the map of memory nor the driver.

pub mod giving;
mod group;
pub mod inbox;
pub mod key;
mod message;
pub mod taking;
#[cfg(test)]
mod tests;

pub use group::Group;
pub use message::{Digest, MOST_OFFERED};

use nvshare::Page;
use nvshare::slot::SlotIndex;
use nvshare::units::GpuUuid;

/// The most chunks that are on their way to a taker and that it has neither taken nor dropped: what a taker that is stopped can hold.
pub const MOST_UNDER_WAY: usize = 8;

/// A group's identity: of the user, the GPU and the name. Not a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupId([u8; 16]);

impl GroupId {
    /// The group of this name, of this process's user, on a GPU.
    pub fn new(gpu: GpuUuid, name: &str) -> Self {
        let user = nix::unistd::geteuid().as_raw().to_le_bytes();
        Self(nvshare::membership::key("replicas", &[&user[..], &gpu.0, name.as_bytes()].concat()))
    }
}

/// The abstract name of the socket of the client that has a slot. `None` if nobody has it. Any client can write the page, so the name
/// may lead to any process: both ends look whose the other one is.
fn socket_name(page: &Page, slot: SlotIndex) -> Option<String> {
    let (process, generation) = (page.owner(slot)?, page.generation(slot));
    let (slot, gpu) = (slot.get(), page.gpu());
    Some(format!("nvshare-replica-{gpu}-{slot}-{generation}-{}-{}", process.pid, process.started))
}
