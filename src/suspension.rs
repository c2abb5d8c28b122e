//! Whether a client is paused, and until when, as a word.

use crate::units::{MILLISECOND, Nanos};

/// The unit in which the word has times, ns: a word of 32 bits holds 13 years since boot.
const UNIT: Nanos = 100 * MILLISECOND;

/// In the word: until the client is resumed.
const WITHOUT_END: u32 = u32::MAX;

/// Whether a client is paused, and until when.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Suspension {
    /// It is not.
    #[default]
    None,
    /// Until this time, CLOCK_MONOTONIC in units of 100 ms.
    Until(u32),
    /// Until it is resumed.
    WithoutEnd,
}

impl From<u32> for Suspension {
    /// Any word is some suspension.
    fn from(word: u32) -> Self {
        match word {
            0 => Self::None,
            WITHOUT_END => Self::WithoutEnd,
            until => Self::Until(until),
        }
    }
}

impl From<Suspension> for u32 {
    fn from(suspension: Suspension) -> Self {
        match suspension {
            Suspension::None => 0,
            Suspension::Until(until) => until.clamp(1, WITHOUT_END - 1),
            Suspension::WithoutEnd => WITHOUT_END,
        }
    }
}

impl Suspension {
    /// A pause that begins at `time` and lasts for `lasts`, both ns; rounded up to 100 ms.
    pub fn lasting(time: Nanos, lasts: Nanos) -> Self {
        let until = time.saturating_add(lasts).div_ceil(UNIT);
        Self::Until(until.clamp(1, u64::from(WITHOUT_END - 1)) as u32)
    }

    /// When it ends by itself, ns; `None` if it does not, or if there is none.
    pub fn ends(self) -> Option<Nanos> {
        match self {
            Self::Until(until) => Some(u64::from(until) * UNIT),
            Self::None | Self::WithoutEnd => None,
        }
    }

    /// Whether the client is paused at `time`, ns.
    pub fn holds(self, time: Nanos) -> bool {
        match self {
            Self::None => false,
            Self::WithoutEnd => true,
            Self::Until(_) => self.ends().is_some_and(|end| time < end),
        }
    }

    /// The one of two that ends later.
    #[must_use]
    pub fn later(self, other: Self) -> Self {
        if u32::from(self) >= u32::from(other) { self } else { other }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::units::SECOND;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_word_is_some_suspension_and_comes_back(word: u32, time: u64) {
            let suspension = Suspension::from(word);
            prop_assert_eq!(u32::from(suspension), word);
            prop_assert_eq!(suspension.later(Suspension::None), suspension);
            prop_assert_eq!(suspension.later(Suspension::WithoutEnd), Suspension::WithoutEnd);
            if let Some(end) = suspension.ends() {
                prop_assert_eq!(suspension.holds(time), time < end);
            }
        }

        #[test]
        fn a_pause_lasts_as_long_as_it_was_said(time in 0..1u64 << 58, lasts in 0..1_000 * SECOND) {
            let suspension = Suspension::lasting(time, lasts);
            prop_assert!(lasts == 0 || suspension.holds(time.saturating_add(lasts - 1)));
            prop_assert!(!suspension.holds(time.saturating_add(lasts).saturating_add(UNIT)));
        }
    }
}
