//! How fairly a GPU was shared, measured in two ways, both with Jain's index over GPU time per weight.
//!
//! - [`TimeWindows`]: over windows of [`WINDOW`]. It holds for any schedule: several clients that run at once, any weights,
//!   turns that are interrupted. A client counts in a window if it contended throughout, but for a hundredth ([`MOST_AWAY`]).
//! - [`TurnWindows`]: over rounds, in which each contender has one turn, one after the other. It shows what time windows
//!   hide: turns that become longer from one to the next. It means nothing where turns overlap or are interrupted, where a
//!   client that lags has several in a row, or where weights or priorities differ, so it looks at no such turns; whether
//!   those are fair is for time windows to say.
//!
//! (Jain, Chiu and Hawe, "A quantitative measure of fairness and discrimination for resource allocation in shared computer
//! systems", 1984.)

use nvshare::units::{Nanos, SECOND};
use std::collections::VecDeque;
use std::ops::Range;

/// How long a window of time is, ns: two rounds at the deadline of a minute that is the default. A simulation that is
/// shorter has one window, all of it.
pub const WINDOW: Nanos = 120 * SECOND;

/// How long a window is in which it is counted who gets on at all, ns.
pub const PROGRESS_WINDOW: Nanos = 10 * SECOND;

/// A client that contended in all but this part of a window contended throughout: short pauses between its turns change
/// nothing in what it should have.
pub const MOST_AWAY: Nanos = 100;

/// Clients of a GPU are known by a seat below this, which no two have at a time.
pub const SEATS: usize = 64;

/// Jain's index of `n` shares, of which those that are not 0 are given: 1 when all are equal, 1/n when one has all.
pub fn jain(shares: impl Iterator<Item = f64>, n: usize) -> f64 {
    let (sum, squares) =
        shares.fold((0.0, 0.0), |(sum, squares), share| (sum + share, squares + share * share));
    if squares == 0.0 { 1.0 } else { sum * sum / (n as f64 * squares) }
}

/// The indices of many windows.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Indices {
    /// The least one.
    pub least: Option<f64>,
    /// Of all of them.
    pub sum: f64,
    pub windows: u64,
}

impl Indices {
    fn add(&mut self, index: f64) {
        self.and(Self { least: Some(index), sum: index, windows: 1 });
    }

    /// Adds those of another GPU.
    pub fn and(&mut self, other: Self) {
        self.least = [self.least, other.least].into_iter().flatten().min_by(f64::total_cmp);
        self.sum += other.sum;
        self.windows += other.windows;
    }

    pub fn mean(&self) -> Option<f64> {
        (self.windows > 0).then(|| self.sum / self.windows as f64)
    }
}

/// The share of a GPU that contenders got in windows of time, which follow one another from 0.
#[derive(Debug)]
pub struct TimeWindows {
    /// How long each is.
    length: Nanos,
    /// When the present window began.
    begun: Nanos,
    /// Time in this window in which the client did not contend, by seat.
    away: [Nanos; SEATS],
    /// Seats whose client has left since time was last spent.
    vacated: u64,
    /// GPU time per weight in this window, by seat.
    time: [f64; SEATS],
    pub indices: Indices,
    pub progress: Progress,
}

/// Who got on in windows of time: each client counts in each window that it contended throughout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Windows of clients.
    pub windows: u64,
    /// Those in which the client had no GPU time.
    pub without: u64,
}

impl Progress {
    /// Adds those of another GPU.
    pub fn and(&mut self, other: Self) {
        self.windows += other.windows;
        self.without += other.without;
    }
}

impl Default for TimeWindows {
    fn default() -> Self {
        Self::of(WINDOW)
    }
}

impl TimeWindows {
    /// Windows of this length, ns.
    pub fn of(length: Nanos) -> Self {
        Self {
            length,
            begun: 0,
            away: [0; SEATS],
            vacated: 0,
            time: [0.0; SEATS],
            indices: Indices::default(),
            progress: Progress::default(),
        }
    }

    /// The client in this seat has left; the next one there is another.
    pub fn vacate(&mut self, seat: usize) {
        self.vacated |= 1 << seat;
    }

    /// In all of `time`, those in `contenders` (as bits) contended, and each seat in `rates` had so much GPU time per weight
    /// in each ns. Time that reaches into the next window is split there.
    pub fn spend(&mut self, time: Range<Nanos>, contenders: u64, rates: &[(usize, f64)]) {
        let mut from = time.start;
        while from < time.end {
            let end = self.begun + self.length;
            let to = time.end.min(end);
            let others_in_seats = if from == self.begun { 0 } else { self.vacated };
            self.vacated = 0;
            for (seat, away) in self.away.iter_mut().enumerate() {
                if others_in_seats >> seat & 1 == 1 {
                    *away = self.length;
                } else if contenders >> seat & 1 == 0 {
                    *away += to - from;
                }
            }
            for (seat, rate) in rates {
                self.time[*seat] += rate * (to - from) as f64;
            }
            if to == end {
                self.close(end);
                // Windows in which nobody contends have no index.
                if contenders.count_ones() < 2 {
                    self.begun += (time.end - end) / self.length * self.length;
                }
            }
            from = to.max(self.begun);
        }
    }

    fn close(&mut self, end: Nanos) {
        let most = (end - self.begun) / MOST_AWAY;
        let shares = || (0..SEATS).filter(|seat| self.away[*seat] <= most).map(|seat| self.time[seat]);
        let n = shares().count();
        if n >= 2 {
            self.indices.add(jain(shares(), n));
        }
        self.progress.windows += n as u64;
        self.progress.without += shares().filter(|time| *time == 0.0).count() as u64;
        let (indices, progress) = (self.indices, self.progress);
        *self = Self { begun: end, indices, progress, ..Self::of(self.length) };
    }

    /// The simulation ends. A window that has not come to its end counts only if it is the first.
    pub fn finish(&mut self, now: Nanos) {
        if self.begun == 0 && now > 0 {
            self.close(now);
        }
    }
}

/// A turn that is used up.
#[derive(Debug, Clone, Copy)]
pub struct Turn {
    pub seat: usize,
    /// When its first slice began, ns.
    pub begun: Nanos,
    pub ended: Nanos,
    /// GPU time in it, ns.
    pub time: Nanos,
    /// Who wanted the GPU too, as bits.
    pub contenders: u64,
    /// All of them have the same weight and priority.
    pub equals: bool,
    /// Nobody else runs at its end.
    pub alone: bool,
}

/// How equal the turns of a round are: of as many turns, one after the other, as there are contenders, one of each.
#[derive(Debug, Default)]
pub struct TurnWindows {
    /// Who contended, as bits; a window lies within one such time.
    contenders: u64,
    /// Whose turn, and its GPU time, ns.
    window: VecDeque<(usize, f64)>,
    /// When the last turn ended.
    ended: Nanos,
    pub indices: Indices,
}

impl TurnWindows {
    /// Who was there is not the same as before.
    pub fn interrupt(&mut self) {
        self.window.clear();
    }

    /// A turn is over. One that was interrupted lies beside the turns in between, so it is not one after the other.
    pub fn turn(&mut self, turn: Turn) {
        let contenders = turn.contenders | 1 << turn.seat;
        let one_at_a_time = turn.alone && turn.begun >= self.ended;
        self.ended = self.ended.max(turn.ended);
        if contenders != self.contenders || !one_at_a_time || !turn.equals {
            self.window.clear();
            self.contenders = contenders;
        }
        let n = contenders.count_ones() as usize;
        if n < 2 || !one_at_a_time || !turn.equals {
            return;
        }
        self.window.push_back((turn.seat, turn.time as f64));
        if self.window.len() > n {
            self.window.pop_front();
        }
        let seats = self.window.iter().fold(0u64, |seats, (seat, _)| seats | 1 << seat);
        if seats.count_ones() as usize == n {
            self.indices.add(jain(self.window.iter().map(|(_, time)| *time), n));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jains_index() {
        assert_eq!(jain([3.0, 3.0].into_iter(), 2), 1.0);
        assert_eq!(jain([3.0].into_iter(), 4), 0.25);
        assert!((jain([1.0, 2.0, 3.0].into_iter(), 3) - 36.0 / 42.0).abs() < 1e-12);
    }

    fn turn(seat: usize, from: Nanos, contenders: u64) -> Turn {
        Turn { seat, begun: from, ended: from + 10, time: 10, contenders, equals: true, alone: true }
    }

    #[test]
    fn a_window_of_turns_is_of_one_set_of_contenders() {
        let mut turns = TurnWindows::default();
        turns.turn(turn(0, 0, 0b11));
        turns.turn(turn(1, 10, 0b111));
        assert_eq!(turns.indices.least, None, "a third one has come");
        turns.turn(turn(2, 20, 0b111));
        turns.turn(turn(0, 30, 0b111));
        assert_eq!(turns.indices.least, Some(1.0));
        turns.turn(turn(1, 40, 0b111));
        turns.turn(Turn { time: 20, ..turn(2, 50, 0b111) });
        assert_eq!(turns.indices.least, Some(16.0 / 18.0), "one has had a turn twice as long");
    }

    #[test]
    fn a_round_has_a_turn_of_each() {
        let mut turns = TurnWindows::default();
        for (index, seat) in [0, 1, 0, 1, 1, 2, 2, 0].into_iter().enumerate() {
            turns.turn(turn(seat, 10 * index as Nanos, 0b111));
        }
        assert_eq!(turns.indices.windows, 0);
        turns.turn(turn(1, 80, 0b111));
        assert_eq!((turns.indices.windows, turns.indices.least), (1, Some(1.0)));
    }

    #[test]
    fn turns_that_overlap_or_are_of_different_weights_are_in_no_window_of_turns() {
        let mut turns = TurnWindows::default();
        let overlap = |from| [turn(0, from, 0b11), turn(1, from + 5, 0b11)];
        overlap(0).into_iter().chain(overlap(15)).for_each(|turn| turns.turn(turn));
        // The second of them runs still.
        turns.turn(Turn { alone: false, ..turn(0, 30, 0b11) });
        turns.turn(Turn { equals: false, ..turn(1, 40, 0b11) });
        turns.turn(Turn { equals: false, ..turn(0, 50, 0b11) });
        assert_eq!(turns.indices.windows, 0);
        turns.turn(turn(1, 60, 0b11));
        turns.turn(turn(0, 70, 0b11));
        assert_eq!((turns.indices.windows, turns.indices.least), (1, Some(1.0)));
    }

    /// One client has the GPU from half of a window to half of the next, in one piece; the other one has the rest.
    #[test]
    fn time_is_split_where_a_window_ends() {
        let mut windows = TimeWindows::default();
        let half = WINDOW / 2;
        windows.spend(0..half, 0b11, &[(0, 1.0)]);
        windows.spend(half..3 * half, 0b11, &[(1, 1.0)]);
        windows.spend(3 * half..3 * half + half / 2, 0b11, &[(0, 1.0)]);
        windows.spend(3 * half + half / 2..4 * half, 0b11, &[(1, 1.0)]);
        windows.finish(4 * half);
        // Half and half; and a quarter and three quarters: 1 / (2 * (1/16 + 9/16)).
        assert_eq!((windows.indices.windows, windows.indices.least), (2, Some(0.8)));
        assert_eq!(windows.indices.mean(), Some(0.9));
    }

    #[test]
    fn gpu_time_counts_by_weight_and_several_may_have_it_at_once() {
        let mut windows = TimeWindows::default();
        // The third one contends in vain; rates are of weights 1 and 2, and both run at once.
        windows.spend(0..WINDOW, 0b111, &[(0, 0.5 / 1.0), (1, 0.5 / 2.0)]);
        let expected = 0.75f64.powi(2) / (3.0 * (0.25 + 0.0625));
        assert!((windows.indices.least.unwrap() - expected).abs() < 1e-12, "{:?}", windows.indices);
    }

    #[test]
    fn only_who_contends_throughout_a_window_counts_in_it() {
        let mut windows = TimeWindows::default();
        let away = WINDOW / MOST_AWAY;
        // The second and the third one have nothing to do for a little too long.
        windows.spend(0..away + 1, 0b101, &[(0, 1.0)]);
        windows.spend(away + 1..2 * away + 2, 0b011, &[(0, 1.0)]);
        windows.spend(2 * away + 2..WINDOW, 0b111, &[(0, 1.0)]);
        assert_eq!(windows.indices.windows, 0, "the first one alone");
        // Another client in the same seat, without any time between the two.
        windows.spend(WINDOW..WINDOW + 10, 0b011, &[(1, 1.0)]);
        windows.vacate(1);
        windows.spend(WINDOW + 10..2 * WINDOW, 0b011, &[(0, 1.0)]);
        assert_eq!(windows.indices.windows, 0);
        // For a shorter time that is no matter.
        let mut shortly = TimeWindows::default();
        shortly.spend(0..away, 0b01, &[(0, 1.0)]);
        shortly.spend(away..WINDOW, 0b11, &[(1, 1.0)]);
        assert_eq!(shortly.indices.windows, 1);
        // Where one window ends and the next begins that is no interruption.
        windows.vacate(1);
        windows.spend(2 * WINDOW..3 * WINDOW, 0b011, &[(0, 0.5), (1, 0.5)]);
        assert_eq!((windows.indices.windows, windows.indices.least), (1, Some(1.0)));
    }

    #[test]
    fn a_simulation_shorter_than_a_window_is_one_and_else_the_rest_is_none() {
        let mut windows = TimeWindows::default();
        windows.spend(0..WINDOW / 3, 0b11, &[(0, 0.5), (1, 0.5)]);
        windows.finish(WINDOW / 3);
        assert_eq!(windows.indices.windows, 1);
        let mut windows = TimeWindows::default();
        windows.spend(0..WINDOW * 7 / 3, 0b11, &[(0, 0.5), (1, 0.5)]);
        windows.finish(WINDOW * 7 / 3);
        assert_eq!(windows.indices.windows, 2);
    }

    #[test]
    fn who_contends_and_has_nothing_of_a_window_gets_on_in_none() {
        let mut windows = TimeWindows::of(PROGRESS_WINDOW);
        let half = PROGRESS_WINDOW / 2;
        windows.spend(0..3 * half, 0b111, &[(0, 1.0)]);
        windows.spend(3 * half..4 * half, 0b011, &[(1, 1.0)]);
        assert_eq!(
            windows.progress,
            Progress { windows: 5, without: 2 },
            "the third one leaves in the second window"
        );
    }

    #[test]
    fn a_day_without_contenders_is_passed_over_at_once() {
        let mut windows = TimeWindows::default();
        windows.spend(0..100_000_007 * WINDOW, 0b1, &[(0, 1.0)]);
        windows.spend(100_000_007 * WINDOW..100_000_009 * WINDOW, 0b11, &[(0, 0.5), (1, 0.5)]);
        assert_eq!(windows.indices.windows, 2);
    }
}
