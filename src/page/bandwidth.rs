//! How fast the link between the host and the GPU is: an average of measured copies, one word for each direction.

use crate::units::{Nanos, SECOND};

/// Bandwidth assumed of a link that nobody has measured yet, in bytes a second: PCIe 3 x16.
pub const DEFAULT_BANDWIDTH: u64 = 12 << 30;

/// In bytes a second: more than any link has. It bounds what garbage can do to the arithmetic.
const MAX_BANDWIDTH: u64 = 1 << 44;

/// The average is of this many copies at most, in its effect: from then on the newest copy counts for one part in this many.
const MAX_COPIES: u64 = 16;

/// The least copy that is taken into the average, in bytes. The time of a shorter one says more about latency than about the
/// link.
const MIN_COPY: u64 = 64 << 20;

/// Which way a copy goes over the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Host to GPU.
    In,
    /// GPU to host.
    Out,
}

/// A word of bandwidth: `guessed:1 | (unused):11 | copies:4 | bytes a second:48`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bandwidth {
    /// 1 to [`MAX_BANDWIDTH`].
    pub(super) bytes_per_second: u64,
    /// Copies that it is the average of, below [`MAX_COPIES`].
    copies: u64,
    /// Nobody has measured yet.
    pub(super) guessed: bool,
}

const COPIES_SHIFT: u32 = 48;
const GUESSED: u64 = 1 << 63;

impl From<u64> for Bandwidth {
    /// Any 64 bits are some bandwidth, within its bounds and never 0.
    fn from(word: u64) -> Self {
        Self {
            bytes_per_second: (word % (1 << COPIES_SHIFT)).clamp(1, MAX_BANDWIDTH),
            copies: word >> COPIES_SHIFT & (MAX_COPIES - 1),
            guessed: word & GUESSED != 0,
        }
    }
}

impl From<Bandwidth> for u64 {
    fn from(bandwidth: Bandwidth) -> Self {
        let guessed = if bandwidth.guessed { GUESSED } else { 0 };
        bandwidth.bytes_per_second | bandwidth.copies << COPIES_SHIFT | guessed
    }
}

impl Bandwidth {
    /// What is assumed until the first measurement.
    pub(super) fn guess(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.clamp(1, MAX_BANDWIDTH), copies: 0, guessed: true }
    }

    /// With one more copy in the average: `bytes` that took `took` ns. The first one replaces a guess. `None` for a copy that
    /// is too short to count.
    ///
    /// What is averaged is the time that a byte takes, because a time is what the bandwidth is used for. (An average of
    /// bandwidths would believe the fast copies.) It is the mean of the first copies, and from the sixteenth on each has a
    /// sixteenth: two switches in turn differ by some per cent, and slices that did, too, would not be fair
    /// (docs/decisions/0013-bandwidth-over-sixteen-switches.md).
    pub(super) fn with_copy(self, bytes: u64, took: Nanos) -> Option<Self> {
        if bytes < MIN_COPY || took == 0 {
            return None;
        }
        let measured = u128::from(bytes) * u128::from(SECOND) / u128::from(took);
        let measured = measured.clamp(1, u128::from(MAX_BANDWIDTH));
        let (average, copies) = if self.guessed {
            (measured, 1)
        } else {
            // 1 / ((n / old + 1 / measured) / (n + 1))
            let (old, n) = (u128::from(self.bytes_per_second), u128::from(self.copies));
            let sum = n * measured + old;
            ((n + 1) * old * measured / sum, (self.copies + 1).min(MAX_COPIES - 1))
        };
        let bytes_per_second = (average as u64).clamp(1, MAX_BANDWIDTH);
        Some(Self { bytes_per_second, copies, guessed: false })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::page::Page;
    use crate::sync::Ordering;

    #[test]
    fn bandwidth_is_an_average_of_large_copies() {
        let page = Page::for_tests(1);
        page.observe_copy(Direction::Out, 30 << 30, SECOND);
        assert_eq!(page.bandwidth(Direction::Out), 30 << 30, "a new page has a guess");
        page.guess_bandwidth(400 << 30);
        page.observe_copy(Direction::In, 1 << 20, 1);
        assert_eq!(page.bandwidth(Direction::In), 400 << 30, "too small to tell");
        page.observe_copy(Direction::In, 40 << 30, SECOND);
        assert_eq!(page.bandwidth(Direction::In), 40 << 30, "a guess is no measurement");
        page.observe_copy(Direction::In, 20 << 30, SECOND);
        let [fast, slow] = [40, 20].map(|gib| SECOND / gib);
        let is = |per_gib: Nanos| page.bandwidth(Direction::In).abs_diff((SECOND << 30) / per_gib) < 1 << 20;
        assert!(is((fast + slow) / 2), "the mean of two: {}", page.bandwidth(Direction::In));
        (0..100).for_each(|_| page.observe_copy(Direction::In, 40 << 30, SECOND));
        let before = page.bandwidth(Direction::In);
        page.observe_copy(Direction::In, 20 << 30, SECOND);
        assert!(
            before > 39 << 30 && is((15 * ((SECOND << 30) / before) + slow) / 16),
            "a sixteenth of the copies"
        );
        assert_eq!(page.bandwidth(Direction::Out), 30 << 30, "what is measured is not guessed again");
    }

    #[test]
    fn a_bandwidth_of_garbage_is_within_its_bounds() {
        let page = Page::for_tests(1);
        for garbage in [0, 1, u64::MAX, GUESSED, !GUESSED] {
            for bytes in [u64::MAX, 64 << 20] {
                page.header.bandwidth[0].atomic().store(garbage, Ordering::Relaxed);
                page.observe_copy(Direction::In, bytes, 1);
                page.observe_copy(Direction::In, bytes, u64::MAX);
                assert!((1..=MAX_BANDWIDTH).contains(&page.bandwidth(Direction::In)));
            }
        }
    }

    #[test]
    fn a_bandwidth_is_read_as_it_was_written() {
        for bandwidth in [
            Bandwidth::guess(DEFAULT_BANDWIDTH),
            Bandwidth { bytes_per_second: MAX_BANDWIDTH, copies: MAX_COPIES - 1, guessed: false },
        ] {
            assert_eq!(Bandwidth::from(u64::from(bandwidth)), bandwidth);
        }
    }
}
