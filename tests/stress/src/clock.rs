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

/// Time since a program last said something.
#[derive(Debug, Default)]
pub struct Silence(Duration);

impl Silence {
    /// It has said something.
    pub fn ends(&mut self) {
        self.0 = Duration::ZERO;
    }

    /// A tick has passed, and took so long. Whether the silence has lasted as long as the `patience`.
    pub fn exceeds(&mut self, patience: Duration, elapsed: Duration) -> bool {
        self.0 += credited(elapsed);
        self.0 >= patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(1);
    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_machine_that_stands_still_is_no_silence() {
        let mut silence = Silence::default();
        for _ in 0..10 {
            assert!(!silence.exceeds(PATIENCE, HOUR));
        }
    }

    #[test]
    fn a_program_that_says_nothing_exceeds_the_patience_and_one_that_speaks_does_not() {
        let ticks = (PATIENCE.as_millis() / TICK.as_millis()) as usize;
        let mut silence = Silence::default();
        for _ in 0..3 {
            assert!((1..ticks).all(|_| !silence.exceeds(PATIENCE, TICK)));
            silence.ends();
        }
        assert!((1..ticks).all(|_| !silence.exceeds(PATIENCE, TICK)));
        assert!(silence.exceeds(PATIENCE, TICK));
    }
}
