//! What counts as time without progress.
//!
//! A machine that stands still, or is busy with other things, stands still for the supervisor as well. So time is counted in
//! ticks, and a tick that took long counts as two at most.

use std::time::Duration;

/// How long the supervisor waits before it looks again.
pub const TICK: Duration = Duration::from_millis(20);

/// The part of a tick that took `elapsed` in which others could have made progress.
pub fn credited(elapsed: Duration) -> Duration {
    elapsed.min(2 * TICK)
}

/// So many times the patience is a hang also of a program that uses the processor and takes turns.
const MOST: u32 = 10;

/// What shows that a program that says nothing goes on: the processor time that it has used, its turns of the GPU, and the bytes
/// that were moved for them.
pub type Signs = [u64; 4];

/// How long a program has said nothing.
#[derive(Debug, Default)]
pub struct Silence {
    /// Since it last said something, or was last looked at.
    time: Duration,
    /// The signs when it was last looked at.
    signs: Option<Signs>,
    looks: u32,
}

impl Silence {
    /// It has said something.
    pub fn ends(&mut self) {
        *self = Self::default();
    }

    /// A tick has passed, and took so long. Whether the program hangs: it has said nothing for the `patience` and shown no sign
    /// meanwhile, or has said nothing for [`MOST`] times as long. A program that is slow because the machine is busy shows
    /// signs.
    pub fn is_hang(&mut self, patience: Duration, elapsed: Duration, signs: impl FnOnce() -> Signs) -> bool {
        self.time += credited(elapsed);
        if self.time < patience {
            return false;
        }
        let before = self.signs.replace(signs());
        (self.time, self.looks) = (Duration::ZERO, self.looks + 1);
        before == self.signs || self.looks >= MOST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(1);
    const HOUR: Duration = Duration::from_secs(3600);
    const TICKS: u32 = (PATIENCE.as_millis() / TICK.as_millis()) as u32;

    #[test]
    fn a_machine_that_stands_still_is_no_hang() {
        let mut silence = Silence::default();
        assert!((0..10).all(|_| !silence.is_hang(PATIENCE, HOUR, || [0; 4])));
    }

    /// Ticks until it is a hang.
    fn ticks(mut signs: impl FnMut() -> Signs) -> u32 {
        let mut silence = Silence::default();
        1 + (0..).take_while(|_| !silence.is_hang(PATIENCE, TICK, &mut signs)).count() as u32
    }

    #[test]
    fn who_shows_no_sign_from_one_look_to_the_next_hangs() {
        assert_eq!(ticks(|| [7; 4]), 2 * TICKS);
    }

    #[test]
    fn who_shows_signs_has_longer_and_not_for_ever() {
        let mut turns = 0;
        let signs = || {
            turns += 1;
            [0, turns, 0, 0]
        };
        assert_eq!(ticks(signs), MOST * TICKS);
    }

    #[test]
    fn who_says_something_begins_anew() {
        let mut silence = Silence::default();
        for _ in 0..3 {
            assert!((1..2 * TICKS).all(|_| !silence.is_hang(PATIENCE, TICK, || [0; 4])));
            silence.ends();
        }
    }
}
