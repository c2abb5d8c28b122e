//! How busy something has been lately, as a time that fades: a second that lies [`HALF_LIFE`] back counts half. Where new clients
//! are placed depends on it ([`crate::placement`]). Also the bounds of a client's weight. What a client may expect against
//! others is another matter ([`crate::policy`]).

use crate::units::{Nanos, SECOND, scaled};

/// The time after which used GPU time counts half, ns.
pub const HALF_LIFE: Nanos = 60 * SECOND;

/// The weight of a client that asks for none.
pub const DEFAULT_WEIGHT: u32 = 100;

/// The largest weight.
pub const MAX_WEIGHT: u32 = 1_000;

/// A weight within its bounds, 1 to [`MAX_WEIGHT`].
pub fn weight(word: u32) -> u32 {
    word.clamp(1, MAX_WEIGHT)
}

/// GPU time as virtual time, ns, of a client of this weight, or of several whose weights are this together: a client of
/// [`DEFAULT_WEIGHT`] has one for the other.
pub fn virtual_of(time: Nanos, weight: u64) -> Nanos {
    scaled(time, u64::from(DEFAULT_WEIGHT), weight)
}

/// The other way round: virtual time, ns, as GPU time of a client of this weight, ns.
pub fn real_of(time: Nanos, weight: u64) -> Nanos {
    scaled(time, weight, u64::from(DEFAULT_WEIGHT))
}

fn fraction_left(elapsed: Nanos) -> f64 {
    libm::exp2(-(elapsed as f64) / HALF_LIFE as f64)
}

/// What is left of `usage`, ns, after `elapsed` ns without any.
pub fn faded(usage: Nanos, elapsed: Nanos) -> Nanos {
    (usage as f64 * fraction_left(elapsed)) as Nanos
}

/// What `usage`, ns, has become after `ran` ns on the GPU: the old fades while the new comes.
pub fn after_running(usage: Nanos, ran: Nanos) -> Nanos {
    let most = HALF_LIFE as f64 / std::f64::consts::LN_2;
    let gained = most * (1.0 - fraction_left(ran));
    faded(usage, ran).saturating_add(gained as Nanos)
}

/// What a slice leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// How long it was, ns.
    pub ran: Nanos,
    /// What its holder's usage is at the end of it, ns.
    pub usage: Nanos,
}

/// The slice that ends at `now`, of a client whose usage was `usage` when it last ran. One that has not begun
/// ([`crate::policy::NOT_BEGUN`]) is no time that it ran.
pub fn slice_over(usage: Nanos, last_ran: Nanos, slice_start: Nanos, now: Nanos) -> Slice {
    let ran = now.saturating_sub(slice_start);
    let rested = slice_start.min(now).saturating_sub(last_ran);
    Slice { ran, usage: after_running(faded(usage, rested), ran) }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn near(found: Nanos, expected: Nanos) -> bool {
        found.abs_diff(expected) <= expected / 1_000 + 1
    }

    #[test]
    fn a_second_counts_half_after_the_half_life() {
        assert!(near(faded(SECOND, HALF_LIFE), SECOND / 2));
        assert!(near(faded(SECOND, 2 * HALF_LIFE), SECOND / 4));
        assert_eq!(faded(SECOND, 0), SECOND);
        assert!(near(after_running(0, 10 * crate::units::MILLISECOND), 10 * crate::units::MILLISECOND));
    }

    proptest! {
        /// It does not matter how often somebody looks.
        #[test]
        fn two_steps_are_as_good_as_one(usage in 0..100 * SECOND, first in 0..300 * SECOND, second in 0..300 * SECOND) {
            prop_assert!(near(faded(faded(usage, first), second), faded(usage, first + second)));
            prop_assert!(near(after_running(after_running(usage, first), second), after_running(usage, first + second)));
        }

        /// Whatever a page says, and however long.
        #[test]
        fn usage_has_a_limit(usage in any::<u64>(), ran in any::<u64>()) {
            let most = (HALF_LIFE as f64 / std::f64::consts::LN_2) as u64 + 1;
            prop_assert!(after_running(usage.min(most), ran) <= most + 1);
            prop_assert!(faded(usage, ran) <= usage.saturating_add(usage / 1_000_000));
        }
    }
}
