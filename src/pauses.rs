//! How long a client's pauses are, and how long a holder should keep the GPU for one.
//!
//! A training waits a few milliseconds for its next batch of data after each step; a notebook, for a person. A holder that
//! gives way at a short pause pays a switch for it, and another one to come back; one that keeps the GPU for a long pause
//! lets others wait for nothing. How long a pause will be shows only afterwards, but pauses resemble one another, so the
//! latest ones are counted here, by length.
//!
//! Keeping the GPU for the time `h` costs each pause that is shorter what it lasts, and each longer one `h` and the switch.
//! [`Pauses::worth_waiting`] is the `h` for which that is least over the pauses counted, at most the time of the switch. This
//! is the ski-rental problem with a known distribution (Karlin and others, "Competitive randomized algorithms for
//! nonuniform problems", 1994): nobody who knew only the distribution could do better. In operating systems a scheduler
//! that waits for a process's next request before it turns to another is called anticipatory (Iyer and Druschel,
//! "Anticipatory scheduling", 2001).

use crate::units::{MILLISECOND, Nanos};

/// Lengths that are told apart: bucket `b` counts pauses of less than 2^(b+1) ms, and not those of the ones before.
const BUCKETS: usize = 20;

/// What a pause adds to its bucket; with less left of it than one, it is forgotten.
const ONE: u32 = 256;

/// So many pauses count; with each further one all count less.
const MEMORY: u32 = 32;

/// How long a pause is worth waiting for of a client that has not paused before, ns: little, and enough for the pause of most
/// trainings.
const FIRST: Nanos = 15 * MILLISECOND;

/// The latest pauses of one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pauses {
    counts: [u32; BUCKETS],
}

/// The bucket of a pause.
fn bucket(pause: Nanos) -> usize {
    let ms = pause / MILLISECOND;
    (ms.checked_ilog2().unwrap_or(0) as usize).min(BUCKETS - 1)
}

/// No pause of the bucket is longer, ns.
fn longest(bucket: usize) -> Nanos {
    MILLISECOND << (bucket + 1)
}

/// What a pause of the bucket is taken to last, ns: the middle of it.
fn middle(bucket: usize) -> Nanos {
    longest(bucket) / 4 * 3
}

impl Pauses {
    /// Counts a pause of so many ns.
    pub fn observe(&mut self, pause: Nanos) {
        let total: u32 = self.counts.iter().sum();
        if total >= MEMORY * ONE {
            self.counts.iter_mut().for_each(|count| *count -= count.div_ceil(MEMORY));
        }
        self.counts[bucket(pause)] += ONE;
    }

    /// How long a holder should keep the GPU in a pause of which nobody knows how long it will be, ns: 0 if it
    /// pays to give way at once, and a little if no pause was counted yet. Giving way costs a switch, of `switch` ns. Twice as long as the pauses that
    /// are worth it, because nobody measures a pause to the millisecond, and at most `switch`.
    pub fn worth_waiting(&self, switch: Nanos) -> Nanos {
        if self.counts.iter().all(|count| *count == 0) {
            return FIRST.min(switch);
        }
        let cost = |time: Nanos| -> u128 {
            let each = self.counts.iter().enumerate().map(|(bucket, count)| {
                let costs = if longest(bucket) <= time {
                    middle(bucket)
                } else if middle(bucket) <= time {
                    // A part of the bucket's pauses are over by then, and more are nearly.
                    middle(bucket).saturating_add(switch / 2)
                } else {
                    time.saturating_add(switch)
                };
                u128::from(*count) * u128::from(costs)
            });
            each.sum()
        };
        let edges = (0..BUCKETS).map(longest).filter(|time| *time < switch);
        let times = std::iter::once(0).chain(edges).chain(std::iter::once(switch));
        times.min_by_key(|time| cost(*time)).map_or(0, |time| time.saturating_mul(2).min(switch))
    }

    /// How long a pause is that has lasted for `waited` ns, on average, ns; 0 if none so long was counted.
    pub fn expected(&self, waited: Nanos) -> Nanos {
        let longer = || self.counts.iter().enumerate().filter(|(bucket, _)| longest(*bucket) > waited);
        let count: u128 = longer().map(|(_, count)| u128::from(*count)).sum();
        let sum: u128 = longer().map(|(bucket, count)| u128::from(*count) * u128::from(middle(bucket))).sum();
        sum.checked_div(count).unwrap_or(0) as Nanos
    }
}

/// So many of the latest long pauses are compared.
const COMPARED: usize = 3;

/// Pauses are regular if the longest of them is not longer than the shortest by more than this part of it.
const SPREAD: Nanos = 4;

/// Whether a client's long pauses are regular: those for which it gives way, each longer than a switch.
///
/// Buckets say what is worth waiting for, and are too coarse to say when a client will be back. One pause of another length
/// ends the forecasts until as many have been alike again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rhythm {
    /// The latest ones, ns; 0 for one that there was not.
    latest: [Nanos; COMPARED],
}

impl Rhythm {
    /// Takes note of a pause of so many ns.
    pub fn observe(&mut self, pause: Nanos) {
        self.latest.rotate_left(1);
        self.latest[COMPARED - 1] = pause;
    }

    /// How long the next one will be, at least, ns; `None` if they are not regular.
    pub fn expected(&self) -> Option<Nanos> {
        let (least, most) = (self.latest.iter().min()?, self.latest.iter().max()?);
        (*least > 0 && most - least <= least / SPREAD).then_some(*least)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::units::SECOND;
    use proptest::prelude::*;

    fn pauses(lengths: impl IntoIterator<Item = Nanos>) -> Pauses {
        let mut pauses = Pauses::default();
        lengths.into_iter().for_each(|length| pauses.observe(length));
        pauses
    }

    #[test]
    fn nothing_is_known_of_the_first_pause() {
        assert_eq!(Pauses::default().worth_waiting(SECOND), FIRST);
        assert_eq!(Pauses::default().worth_waiting(MILLISECOND), MILLISECOND);
        assert_eq!(Pauses::default().expected(0), 0);
    }

    #[test]
    fn short_pauses_are_worth_waiting_for_and_long_ones_are_not() {
        for ms in [3, 20, 100] {
            let kept = pauses([ms * MILLISECOND]).worth_waiting(300 * MILLISECOND);
            assert!((2 * ms * MILLISECOND..=4 * ms * MILLISECOND).contains(&kept), "{kept} for {ms} ms");
        }
        assert_eq!(pauses([SECOND]).worth_waiting(300 * MILLISECOND), 0);
    }

    #[test]
    fn between_many_short_pauses_a_long_one_changes_little() {
        let steps = (0..60).map(|step| if step % 20 == 0 { 10 * SECOND } else { 5 * MILLISECOND });
        assert_eq!(pauses(steps).worth_waiting(300 * MILLISECOND), 16 * MILLISECOND);
    }

    #[test]
    fn what_was_long_ago_is_forgotten() {
        let short = std::iter::repeat_n(5 * MILLISECOND, 1_000);
        let long = std::iter::repeat_n(10 * SECOND, 120);
        let pauses = pauses(short.chain(long));
        assert_eq!(pauses.worth_waiting(300 * MILLISECOND), 0);
        assert!(pauses.expected(0) > 5 * SECOND);
    }

    #[test]
    fn what_is_expected_depends_on_how_long_it_has_lasted() {
        let pauses = pauses([5 * MILLISECOND, 5 * MILLISECOND, 2 * SECOND]);
        assert!((SECOND / 2..SECOND).contains(&pauses.expected(0)));
        assert!((SECOND..=3 * SECOND).contains(&pauses.expected(100 * MILLISECOND)));
        assert_eq!(pauses.expected(10 * SECOND), 0);
    }

    fn rhythm(lengths: impl IntoIterator<Item = u64>) -> Rhythm {
        let mut rhythm = Rhythm::default();
        lengths.into_iter().for_each(|ms| rhythm.observe(ms * MILLISECOND));
        rhythm
    }

    #[test]
    fn three_that_are_alike_are_a_forecast_and_another_one_ends_it() {
        let after = |lengths: &[u64]| rhythm(lengths.iter().copied()).expected();
        assert_eq!((after(&[]), after(&[1_000, 1_000])), (None, None));
        assert_eq!(after(&[1_100, 1_000, 1_250]), Some(SECOND), "the shortest");
        assert_eq!(after(&[1_100, 1_000, 1_251]), None);
        assert_eq!(after(&[1_000, 1_000, 1_000, 2_000]), None);
        assert_eq!(after(&[1_000, 1_000, 1_000, 2_000, 2_000]), None);
        assert_eq!(after(&[1_000, 1_000, 1_000, 2_000, 2_000, 2_000]), Some(2 * SECOND));
    }

    proptest! {
        /// At most one switch's time; and whoever waits so long for any mixture of pauses pays at most twice what somebody
        /// would pay who knew them beforehand, but for the width of the buckets.
        #[test]
        fn no_more_than_a_switch_and_never_much_worse_than_foresight(
            lengths in prop::collection::vec(MILLISECOND..30 * SECOND, 1..30),
            switch in MILLISECOND..5 * SECOND,
        ) {
            let kept = pauses(lengths.clone()).worth_waiting(switch);
            prop_assert!(kept <= switch);
            let paid: u64 = lengths.iter().map(|pause| if *pause <= kept { *pause } else { kept + switch }).sum();
            let best: u64 = lengths.iter().map(|pause| (*pause).min(switch)).sum();
            prop_assert!(paid <= best * 4, "{paid} where {best} could have been paid");
        }
    }
}
