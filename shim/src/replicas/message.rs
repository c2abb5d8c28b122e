//! What replicas say to each other. Each message is a head and what its kind has behind it; nothing in it is trusted.

use crate::replicas::GroupId;
use crate::replicas::key::Key;
use bytemuck::{Pod, Zeroable};
use nvshare::units::{GRANULE, Granules};
use std::hash::{DefaultHasher, Hash, Hasher};

const MAGIC: u64 = u64::from_le_bytes(*b"nvsh-rep");

/// The version of the messages. Processes of different versions are no replicas of each other.
const VERSION: u32 = 1;

/// The most digests in an offer.
pub const MOST_OFFERED: usize = 2048;

/// The most bytes of a message. A message is received with room for one byte more, so that one that is too long is seen.
pub const MOST_BYTES: usize = size_of::<Head>() + MOST_OFFERED * size_of::<Digest>();

/// Stands for the contents of a chunk: its bytes, which of its granules are in use, and their fingerprints, which are taken with a
/// secret key. Two chunks with the same digest are taken for the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Digest([u64; 2]);

impl Digest {
    /// The digest of a chunk of `size` bytes of which these granules are in use, one bit for each, with these fingerprints one
    /// after the other.
    pub fn of(size: u64, in_use: u32, fingerprints: impl Iterator<Item = [u64; 2]> + Clone) -> Self {
        let half = |salt: u8| {
            let mut hasher = DefaultHasher::new();
            (salt, size, in_use).hash(&mut hasher);
            fingerprints.clone().for_each(|fingerprint| fingerprint.hash(&mut hasher));
            hasher.finish()
        };
        Self([half(0), half(1)])
    }
}

/// What every message begins with.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Head {
    magic: u64,
    version: u32,
    what: u32,
    /// Of what there are several.
    count: u32,
    /// Granules.
    granules: u32,
}

/// What one replica says to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// From both, first: who they are, and with which key they take fingerprints.
    Hello(GroupId, Key),
    /// From the giver: chunks that it could evict now, of which it means to evict so many granules.
    Offer(Granules, Vec<Digest>),
    /// From the taker, to an offer: which of them it lacks, by their places in the offer, in this order. It does not copy them from
    /// host memory before they have come or the giver has taken the promise back.
    Wanted(Vec<u32>),
    /// From the giver: a chunk of so many bytes, by its place in the last offer. Its memory comes beside it.
    Here(u32, u64),
    /// From the taker: it has taken one chunk, or dropped it.
    Done,
    /// From the giver: of what was wanted, nothing more will come.
    Over,
}

/// Whose message it is.
const HELLO: u32 = 1;
const OFFER: u32 = 2;
const WANTED: u32 = 3;
const HERE: u32 = 4;
const DONE: u32 = 5;
const OVER: u32 = 6;

impl Message {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let (what, count, granules) = match self {
            Self::Hello(..) => (HELLO, 0, 0),
            Self::Offer(granules, digests) => (OFFER, digests.len() as u32, *granules),
            Self::Wanted(places) => (WANTED, places.len() as u32, 0),
            Self::Here(place, size) => (HERE, *place, (size / GRANULE) as u32),
            Self::Done => (DONE, 0, 0),
            Self::Over => (OVER, 0, 0),
        };
        let head = Head { magic: MAGIC, version: VERSION, what, count, granules };
        let mut bytes = bytemuck::bytes_of(&head).to_vec();
        match self {
            Self::Hello(group, key) => {
                bytes.extend(group.0);
                bytes.extend(bytemuck::bytes_of(key));
            }
            Self::Offer(_, digests) => bytes.extend(bytemuck::cast_slice::<_, u8>(digests)),
            Self::Wanted(places) => bytes.extend(bytemuck::cast_slice::<_, u8>(places)),
            Self::Here(..) | Self::Done | Self::Over => {}
        }
        bytes
    }

    /// Reads what came over a socket. `None` if it is no message of this version.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (head, rest) = bytes.split_at_checked(size_of::<Head>())?;
        let head: Head = bytemuck::pod_read_unaligned(head);
        if (head.magic, head.version) != (MAGIC, VERSION) {
            return None;
        }
        let count = head.count as usize;
        let message = match head.what {
            HELLO => {
                let (group, key) = rest.split_at_checked(size_of::<GroupId>())?;
                let key = bytemuck::try_pod_read_unaligned(key).ok()?;
                return Some(Self::Hello(GroupId(group.try_into().ok()?), key));
            }
            OFFER if count <= MOST_OFFERED => Self::Offer(head.granules, words(rest, count)?),
            WANTED if count <= MOST_OFFERED => {
                let places: Vec<u32> = words(rest, count)?;
                if !places.is_sorted_by(|one, next| one < next) {
                    return None;
                }
                return Some(Self::Wanted(places));
            }
            HERE => Self::Here(head.count, u64::from(head.granules) * GRANULE),
            DONE => Self::Done,
            OVER => Self::Over,
            _ => return None,
        };
        let has_more = matches!(message, Self::Here(..) | Self::Done | Self::Over) && !rest.is_empty();
        (!has_more).then_some(message)
    }
}

/// Exactly `count` values.
fn words<T: Pod>(bytes: &[u8], count: usize) -> Option<Vec<T>> {
    (bytes.len() == count * size_of::<T>())
        .then(|| bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn digests(count: usize) -> Vec<Digest> {
        (0..count as u64).map(|number| Digest([number, !number])).collect()
    }

    fn some() -> Vec<Message> {
        vec![
            Message::Hello(GroupId([7; 16]), Key::draw()),
            Message::Offer(300, digests(5)),
            Message::Offer(0, Vec::new()),
            Message::Offer(u32::MAX, digests(MOST_OFFERED)),
            Message::Wanted(vec![0, 3, 4]),
            Message::Wanted((0..MOST_OFFERED as u32).collect()),
            Message::Here(3, 32 * GRANULE),
            Message::Done,
            Message::Over,
        ]
    }

    #[test]
    fn a_message_is_read_as_it_was_written_and_no_other_length_is() {
        for message in some() {
            let mut bytes = message.encode();
            assert!(bytes.len() <= MOST_BYTES);
            assert_eq!(Message::decode(&bytes), Some(message.clone()));
            assert_eq!(Message::decode(&bytes[..bytes.len() - 1]), None, "{message:?} cut");
            bytes.push(0);
            assert_eq!(Message::decode(&bytes), None, "{message:?} and a byte");
        }
    }

    #[test]
    fn more_than_the_most_and_places_out_of_order_are_refused() {
        assert_eq!(Message::decode(&Message::Offer(1, digests(MOST_OFFERED + 1)).encode()), None);
        for places in [vec![1, 0], vec![2, 2]] {
            assert_eq!(Message::decode(&Message::Wanted(places).encode()), None);
        }
    }

    #[test]
    fn a_digest_tells_contents_apart() {
        let of =
            |size, in_use, fingerprints: &[[u64; 2]]| Digest::of(size, in_use, fingerprints.iter().copied());
        let one = of(2 * GRANULE, 3, &[[1, 2], [3, 4]]);
        assert_eq!(one, of(2 * GRANULE, 3, &[[1, 2], [3, 4]]));
        for other in [
            of(3 * GRANULE, 3, &[[1, 2], [3, 4]]),
            of(2 * GRANULE, 5, &[[1, 2], [3, 4]]),
            of(2 * GRANULE, 3, &[[3, 4], [1, 2]]),
            of(2 * GRANULE, 3, &[[1, 2], [3, 5]]),
            of(2 * GRANULE, 3, &[[1, 2]]),
        ] {
            assert!(one != other && one.0[0] != other.0[0] && one.0[1] != other.0[1]);
        }
    }

    proptest! {
        #[test]
        fn garbage_is_no_message(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(Message::decode(&bytes), None);
        }

        /// Whatever is changed in a message, what is read of it is within bounds, and says the same when it is written again.
        #[test]
        fn a_lie_is_seen_or_does_no_harm(which in 0usize..9, at: prop::sample::Index, to: u8, cut: Option<prop::sample::Index>) {
            let mut bytes = some()[which].encode();
            *at.get_mut(&mut bytes) = to;
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len() + 1));
            }
            if let Some(read) = Message::decode(&bytes) {
                match &read {
                    Message::Offer(_, digests) => prop_assert!(digests.len() <= MOST_OFFERED),
                    Message::Wanted(places) => prop_assert!(places.len() <= MOST_OFFERED && places.is_sorted()),
                    _ => {}
                }
                prop_assert_eq!(Message::decode(&read.encode()), Some(read));
            }
        }
    }
}
