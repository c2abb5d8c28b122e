//! The side channel between the process whose memory it is and those that open it: what is said, and how
//! descriptors travel.
//!
//! A SOCK_SEQPACKET Unix socket in the abstract namespace, so nothing is left in a file system when a process is
//! killed, and every message has a beginning and an end. The opener asks and the exporter answers, one [`Answer`] to
//! one [`Ask`] that opens; so neither can fill the other's queue. An answer carries up to [`BATCH`] descriptors, and
//! the opener asks again until it has them all: how many are under way at once does not depend on how large the
//! memory is. (The kernel takes at most 253 in a message, and counts those under way against a user's limit.)
//!
//! The connection stays while the opener has anything open: its end, however it comes, is how the exporter learns
//! that nobody has.

use crate::cuda::abi::CuResult;
use crate::ipc::handle::{Key, MAGIC, VERSION};
use bytemuck::{Pod, Zeroable};
use nvshare::scm_rights::MOST_DESCRIPTORS;
use nvshare::units::GRANULE;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Descriptors in one answer.
pub const BATCH: usize = 64;
const _: () = assert!(BATCH <= MOST_DESCRIPTORS);

/// More pieces than any memory has: 1 TiB in chunks of a granule.
const MOST_PIECES: u32 = 1 << 19;

/// What an opener says.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Ask {
    magic: u64,
    version: u32,
    what: u32,
    /// Which allocation.
    pub number: u64,
    /// That it was given a handle.
    pub key: Key,
    /// The first piece that it wants now.
    pub from: u32,
    zero: u32,
}

/// What an opener wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// To open memory: a piece, and those after it.
    Open,
    /// To close it again. It is not answered.
    Close,
}

impl Ask {
    /// A request.
    pub fn new(wish: RequestKind, number: u64, key: Key, from: u32) -> Self {
        let what = match wish {
            RequestKind::Open => 1,
            RequestKind::Close => 2,
        };
        Self { magic: MAGIC, version: VERSION, what, number, key, from, zero: 0 }
    }

    /// Reads what came over a socket. `None` if it is no request.
    pub fn read(bytes: &[u8]) -> Option<(RequestKind, Self)> {
        let ask: Self = bytemuck::try_pod_read_unaligned(bytes).ok()?;
        let wish = match ask.what {
            1 => RequestKind::Open,
            2 => RequestKind::Close,
            _ => return None,
        };
        ((ask.magic, ask.version, ask.zero) == (MAGIC, VERSION, 0)).then_some((wish, ask))
    }
}

/// What an allocation is, to those that map it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Extent {
    /// Bytes to be mapped.
    pub size: u64,
    /// Where the allocation begins in them.
    pub offset: u64,
    /// Its own bytes.
    pub bytes: u64,
    /// In how many pieces of physical memory they are.
    pub pieces: u32,
    zero: u32,
}

impl Extent {
    /// An allocation of `bytes` at `offset` of `size` bytes in so many pieces.
    pub fn new(size: u64, offset: u64, bytes: u64, pieces: u32) -> Self {
        Self { size, offset, bytes, pieces, zero: 0 }
    }

    /// Whether there can be such an allocation.
    fn is_sound(&self) -> bool {
        let inside = self.offset.checked_add(self.bytes).is_some_and(|end| end <= self.size);
        inside
            && self.bytes > 0
            && self.size.is_multiple_of(GRANULE)
            && (1..=MOST_PIECES).contains(&self.pieces)
            && u64::from(self.pieces) <= self.size / GRANULE
    }
}

/// What the exporter answers.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Answer {
    magic: u64,
    version: u32,
    /// [`GIVEN`] or another.
    status: u32,
    extent: Extent,
    /// Pieces that come with it.
    count: u32,
    /// What the driver said, if it refused.
    result: i32,
    /// Bytes of each.
    sizes: [u64; BATCH],
}

const GIVEN: u32 = 1;
const GONE: u32 = 2;
const DENIED: u32 = 3;
const FAILED: u32 = 4;

/// Why an exporter gives nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The allocation was freed.
    Gone,
    /// The key is another one's.
    Denied,
    /// The driver would not export it.
    Driver(CuResult),
}

/// Pieces of memory, and how many bytes each has.
pub type Pieces = Vec<(OwnedFd, u64)>;

impl Answer {
    /// Pieces of an allocation; the descriptors go beside it.
    pub fn given(extent: Extent, pieces: &Pieces) -> Self {
        let mut answer =
            Self { status: GIVEN, extent, count: pieces.len() as u32, ..Self::refused(Refusal::Gone) };
        for (place, (_, size)) in answer.sizes.iter_mut().zip(pieces) {
            *place = *size;
        }
        answer
    }

    /// Nothing.
    pub fn refused(why: Refusal) -> Self {
        let (status, result) = match why {
            Refusal::Gone => (GONE, 0),
            Refusal::Denied => (DENIED, 0),
            Refusal::Driver(result) => (FAILED, result.0),
        };
        Self {
            magic: MAGIC,
            version: VERSION,
            status,
            extent: Extent::default(),
            count: 0,
            result,
            sizes: [0; BATCH],
        }
    }

    /// Reads what came over a socket, with these descriptors, to the request for what begins at piece `from`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(
        bytes: &[u8],
        fds: Vec<OwnedFd>,
        from: u32,
    ) -> Result<Result<(Extent, Pieces), Refusal>, String> {
        let answer: Self = bytemuck::try_pod_read_unaligned(bytes)
            .map_err(|_| format!("its answer has {} bytes instead of {}", bytes.len(), size_of::<Self>()))?;
        if (answer.magic, answer.version) != (MAGIC, VERSION) {
            return Err(format!("its answer is of version {} instead of {VERSION}", answer.version));
        }
        match answer.status {
            GIVEN => {}
            GONE => return Ok(Err(Refusal::Gone)),
            DENIED => return Ok(Err(Refusal::Denied)),
            FAILED => return Ok(Err(Refusal::Driver(CuResult(answer.result)))),
            other => return Err(format!("its answer has the unknown status {other}")),
        }
        let (extent, count) = (answer.extent, answer.count as usize);
        if !extent.is_sound() {
            return Err(format!("there is no such memory: {extent:?}"));
        }
        if count == 0 || count > BATCH || count != fds.len() || from + answer.count > extent.pieces {
            return Err(format!(
                "{count} pieces from {from} of {}, with {} descriptors",
                extent.pieces,
                fds.len()
            ));
        }
        let sizes = &answer.sizes[..count];
        if sizes.iter().any(|size| *size == 0 || !size.is_multiple_of(GRANULE) || *size > extent.size) {
            return Err(format!("pieces of {sizes:?} B"));
        }
        Ok(Ok((extent, fds.into_iter().zip(sizes.iter().copied()).collect())))
    }
}

/// The descriptors of some pieces, to be [sent](nvshare::scm_rights::send_with).
pub fn descriptors(pieces: &Pieces) -> Vec<BorrowedFd<'_>> {
    pieces.iter().map(|(fd, _)| fd.as_fd()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn descriptors(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect()
    }

    fn answer(pieces: u32, count: usize) -> Answer {
        let extent = Extent::new(u64::from(pieces) * GRANULE, 512, 1000, pieces);
        Answer::given(extent, &descriptors(count).into_iter().map(|fd| (fd, GRANULE)).collect())
    }

    fn reads(answer: &Answer, fds: usize, from: u32) -> bool {
        matches!(Answer::read(bytemuck::bytes_of(answer), descriptors(fds), from), Ok(Ok(_)))
    }

    proptest! {
        #[test]
        fn garbage_is_no_request(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(Ask::read(&bytes).is_none());
        }

        #[test]
        fn garbage_is_no_answer(bytes in prop::collection::vec(any::<u8>(), 0..1000), fds in 0usize..3) {
            prop_assert!(Answer::read(&bytes, descriptors(fds), 0).is_err());
        }

        /// Whatever is changed in an answer, what is read of it can be mapped.
        #[test]
        fn a_lie_is_seen_or_does_no_harm(at in 0usize..size_of::<Answer>(), to: u8, from in 0u32..4) {
            let mut bytes = bytemuck::bytes_of(&answer(3, 2)).to_vec();
            bytes[at] = to;
            if let Ok(Ok((extent, pieces))) = Answer::read(&bytes, descriptors(2), from) {
                prop_assert!(extent.is_sound());
                prop_assert_eq!(pieces.len(), 2);
                prop_assert!(from + 2 <= extent.pieces);
                prop_assert!(pieces.iter().all(|(_, size)| *size > 0 && *size <= extent.size));
            }
        }
    }

    #[test]
    fn an_answer_has_as_many_descriptors_as_it_says() {
        assert!(reads(&answer(5, 3), 3, 2));
        assert!(!reads(&answer(5, 3), 2, 2));
        assert!(!reads(&answer(5, 3), 4, 2));
        assert!(!reads(&answer(5, 3), 3, 3), "more than there are");
        assert!(!reads(&answer(5, 0), 0, 0), "none at all would be asked for for ever");
    }

    #[test]
    fn a_refusal_is_one() {
        for refusal in [Refusal::Gone, Refusal::Denied, Refusal::Driver(CuResult::OUT_OF_MEMORY)] {
            let answer = Answer::refused(refusal);
            assert_eq!(
                Answer::read(bytemuck::bytes_of(&answer), Vec::new(), 0).unwrap().unwrap_err(),
                refusal
            );
        }
    }
}
