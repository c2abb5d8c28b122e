//! Joining and leaving a gang: one [`GangRequest`] to the arbiter's socket, one [`Reply`](crate::wire::Reply) back, with the
//! descriptor of the page on which the processes of gangs show each other what they have ([`crate::gang_page`]).
//!
//! The arbiter checks the user who asks, as for a change of shares ([`crate::change`]), and the message names the client by its
//! slot *and* its owner word.

use crate::connection::{RegisterError, talk};
use crate::gang_page::Place;
use crate::map::MappedGangPage;
use crate::slot::{Owner, SlotIndex};
use crate::units::GpuUuid;
use crate::wire::{GangKey, GangRequest, Status};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::time::Duration;

/// The key of something that the processes of a gang have in common. `kind` tells apart what is of different kinds. A digest of
/// 128 bits: two gangs with one key would run as one.
pub fn key(kind: &str, common: &[u8]) -> GangKey {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, kind, common).hash(&mut hasher);
        hasher.finish()
    };
    bytemuck::cast([half(0), half(1)])
}

/// The key of what two processes have in common, which is the same for both. `own` and `peer` are what each is identified by.
pub fn key_of_two(kind: &str, own: &[u8], peer: &[u8]) -> GangKey {
    key(kind, &[own.min(peer), own.max(peer)].concat())
}

/// Reads a gang's name and the number of its processes, as in `training:2`: two or more. `None` if it is something else.
pub fn parse_name(text: &str) -> Option<(String, u32)> {
    let (name, size) = text.rsplit_once(':')?;
    let size = size.trim().parse().ok().filter(|size| (2..=MOST).contains(size))?;
    (!name.is_empty()).then(|| (name.to_owned(), size))
}

/// The most processes of a gang: as many as the GPUs that have rows have slots.
const MOST: u32 = (crate::gang_page::COLUMNS * crate::slot::SLOTS) as u32;

/// A client that has joined a gang: the page, and its place there.
pub type Membership = (MappedGangPage, Place);

/// Asks the arbiter at `path` to let a client join a gang, or leave it (`joins`). Waits for an arbiter as
/// [`crate::register::register`] does.
///
/// # Errors
/// Nobody answers within `timeout`, the answer is a refusal, or makes no sense.
pub fn ask(
    path: &Path,
    (gpu, slot, owner): (GpuUuid, SlotIndex, Owner),
    (key, size): (GangKey, u32),
    joins: bool,
    timeout: Duration,
) -> Result<Membership, RegisterError> {
    let request = GangRequest::new(gpu, slot, owner, key, size, joins);
    let nonsense = |what: String| RegisterError::Nonsense { path: path.to_owned(), what };
    let answer = talk(path, bytemuck::bytes_of(&request), Status::Ganged, timeout)?;
    let sent = answer.sent.first().ok_or_else(|| nonsense("it sent no page of gangs".into()))?;
    let page = MappedGangPage::open(sent).map_err(|error| nonsense(error.to_string()))?;
    let column = answer.reply.slot as usize;
    let place = Place::new(column, slot).ok_or_else(|| nonsense(format!("it gave column {column}")))?;
    Ok((page, place))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_of_its_kind_and_of_every_byte() {
        let mut common = [7; 128];
        let first = key("nccl", &common);
        assert_eq!(first, key("nccl", &common));
        assert_ne!(first, key("name", &common));
        common[127] = 8;
        assert_ne!(first, key("nccl", &common));
    }

    #[test]
    fn two_processes_have_one_key_whoever_asks() {
        let [one, two, three] = [[1; 16], [2; 16], [3; 16]];
        assert_eq!(key_of_two("ipc", &one, &two), key_of_two("ipc", &two, &one));
        assert_ne!(key_of_two("ipc", &one, &two), key_of_two("ipc", &one, &three));
        assert_ne!(key_of_two("ipc", &one, &two), key_of_two("descriptors", &one, &two));
    }
}
