//! A bound on log lines that a stranger can cause.
//!
//! In each [`WINDOW`], the first five lines of a kind are logged, the others are counted, and the count is logged. So
//! strangers cannot fill a disk, and the log still tells what happens and how often.

use crate::units::{Nanos, SECOND};

/// How many lines of a kind are logged in a [`WINDOW`].
const LINES: u32 = 5;

/// The time over which lines are counted, in ns.
pub const WINDOW: Nanos = 5 * SECOND;

/// The lines of one kind.
#[derive(Debug, Default)]
pub struct LogLimit {
    began: Nanos,
    logged: u32,
    suppressed: u64,
}

impl LogLimit {
    /// Whether a line may be logged at the time `time` (ns). Counts it if not.
    pub fn allows(&mut self, time: Nanos) -> bool {
        if self.logged == 0 || time.saturating_sub(self.began) >= WINDOW {
            (self.began, self.logged) = (time, 0);
        }
        if self.logged >= LINES {
            self.suppressed += 1;
            return false;
        }
        self.logged += 1;
        true
    }

    /// How many lines were not logged, if the window is over at the time `time` (ns); the count begins anew. `None`: none, or the
    /// window is not over.
    pub fn suppressed(&mut self, time: Nanos) -> Option<u64> {
        let over = self.suppressed > 0 && time.saturating_sub(self.began) >= WINDOW;
        over.then(|| std::mem::take(&mut self.suppressed))
    }

    /// When [`suppressed`](Self::suppressed) will return a number, ns. `None` if no line has been suppressed.
    pub fn due(&self) -> Option<Nanos> {
        (self.suppressed > 0).then_some(self.began + WINDOW)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_lines_are_logged_and_the_rest_is_counted() {
        let mut limit = LogLimit::default();
        let logged = |limit: &mut LogLimit, time| (0..1000).filter(|_| limit.allows(time)).count();
        assert_eq!(logged(&mut limit, SECOND), LINES as usize);
        assert_eq!((limit.suppressed(2 * SECOND), limit.due()), (None, Some(6 * SECOND)), "not over yet");
        assert_eq!(limit.suppressed(6 * SECOND), Some(1000 - u64::from(LINES)));
        assert_eq!((limit.suppressed(12 * SECOND), limit.due()), (None, None), "told once");
        assert_eq!(logged(&mut limit, 12 * SECOND), LINES as usize);
    }

    #[test]
    fn what_is_not_told_in_time_is_told_later() {
        let mut limit = LogLimit::default();
        assert_eq!((0..10).filter(|_| limit.allows(0)).count(), LINES as usize);
        assert!(limit.allows(WINDOW));
        assert_eq!((limit.suppressed(WINDOW), limit.suppressed(2 * WINDOW)), (None, Some(5)));
    }
}
