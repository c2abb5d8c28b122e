//! The pace on a model of a GPU that runs one kernel after the other.

use super::*;
use crate::units::SECOND;
use proptest::prelude::*;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

const TARGET: Nanos = 50 * MILLISECOND;
const MICROSECOND: Nanos = 1_000;
/// Launches that the driver takes ahead of the GPU.
const DEPTH: usize = 512;
/// How long a launch takes in its thread, ns.
const LAUNCH: Nanos = 2 * MICROSECOND;

/// A GPU, and the one thread that submits to it.
#[derive(Default)]
struct Gpu {
    time: Cell<Nanos>,
    /// When each kernel ends, ns.
    ends: RefCell<Vec<Nanos>>,
    /// This many kernels at the beginning wait for each other: none ends before all are submitted.
    chain: Cell<usize>,
    worked: Cell<Nanos>,
    /// How often it was asked whether it has passed a marker.
    asked: Cell<u64>,
}

/// A marker behind this many kernels.
struct Behind(Rc<Gpu>, usize);

impl Marker for Behind {
    fn is_past(&self) -> bool {
        self.0.asked.set(self.0.asked.get() + 1);
        self.end() <= self.0.time.get()
    }

    fn since(&self, earlier: &Self) -> Option<Nanos> {
        Some(self.end() - earlier.end())
    }
}

impl Behind {
    fn end(&self) -> Nanos {
        if self.1 == 0 { 0 } else { self.0.ends.borrow()[self.1 - 1] }
    }
}

impl Gpu {
    fn mark(self: &Rc<Self>) -> Behind {
        Behind(self.clone(), self.ends.borrow().len())
    }

    fn launch(&self, length: Nanos) {
        self.time.set(self.time.get() + LAUNCH);
        // A full queue makes the thread wait.
        let launched = self.ends.borrow().len();
        if launched >= DEPTH {
            self.time.set(self.time.get().max(self.ends.borrow()[launched - DEPTH]));
        }
        let begins = if launched < self.chain.get() { 0 } else { self.last_end().max(self.time.get()) };
        let mut ends = self.ends.borrow_mut();
        let end = if launched < self.chain.get() { Nanos::MAX } else { begins + length };
        ends.push(end);
        if launched + 1 == self.chain.get() {
            ends.fill(self.time.get() + length);
        }
        drop(ends);
        self.worked.set(self.worked.get() + length);
    }

    fn last_end(&self) -> Nanos {
        self.ends.borrow().last().copied().unwrap_or(0)
    }

    /// How long a drain would take now, ns.
    fn drain(&self) -> Nanos {
        self.last_end().saturating_sub(self.time.get())
    }
}

/// A process that launches as fast as the pace allows.
struct Process {
    gpu: Rc<Gpu>,
    pace: Pace<Behind>,
    longest_drain: Nanos,
    waits: u64,
}

impl Process {
    fn new(until: Nanos, each: CostEstimate) -> Self {
        let gpu = Rc::<Gpu>::default();
        let pace = Pace::new(TARGET, until, each, 0);
        Self { gpu, pace, longest_drain: 0, waits: 0 }
    }

    /// Launches kernels of the lengths that `length` gives, until the time `end` (ns).
    fn runs(&mut self, end: Nanos, mut length: impl FnMut() -> Nanos) {
        while self.gpu.time.get() < end {
            let time = self.gpu.time.get();
            match self.pace.next(time) {
                Admission::Go => {
                    self.gpu.launch(length());
                    if self.gpu.time.get() >= self.pace.until {
                        self.longest_drain = self.longest_drain.max(self.gpu.drain());
                    }
                }
                Admission::Mark => {
                    let count = self.pace.submitted();
                    self.pace.marked(count, self.gpu.mark());
                }
                Admission::Wait(until) => {
                    assert!(until > time, "it gets on");
                    self.waits += 1;
                    self.gpu.time.set(until);
                }
            }
        }
    }

    /// The part of the time up to `end` in which the GPU worked, and the longest drain.
    fn share(&self, end: Nanos) -> f64 {
        let beyond = self.gpu.last_end().saturating_sub(end);
        (self.gpu.worked.get() - beyond) as f64 / end as f64
    }
}

/// Until it is known how long a kernel takes: two are in flight meanwhile.
fn settles(process: &mut Process, length: Nanos) {
    process.runs(3 * length, || length);
    process.longest_drain = 0;
}

fn runs(length: Nanos, until: Nanos, end: Nanos) -> Process {
    let mut process = Process::new(until, CostEstimate::UNKNOWN);
    settles(&mut process, length);
    process.runs(end, || length);
    process
}

#[test]
fn a_drain_takes_the_target_and_one_kernel_at_most_and_the_gpu_always_works() {
    for length in [5 * MICROSECOND, 5 * MILLISECOND, 500 * MILLISECOND] {
        let process = runs(length, 0, 20 * SECOND);
        let (drain, share) = (process.longest_drain, process.share(20 * SECOND));
        assert!(drain <= TARGET + length, "kernels of {length} ns: {drain} ns");
        assert!(share >= 0.99, "kernels of {length} ns: {share}");
        assert!(process.waits > 0);
    }
}

/// As a program that sets up with quick kernels and then works with slow ones: seen on an H100, where a thousand of 3 ms were
/// in flight before the first was done, and drains took 1.0 to 1.2 s.
#[test]
fn what_was_quick_in_the_last_slice_may_be_slow_in_this_one() {
    let quick = runs(5 * MICROSECOND, 0, SECOND);
    let each = quick.pace.drained(2 * SECOND);
    assert!(each.get().is_some_and(|known| known < 10 * MICROSECOND), "{each:?}");
    for length in [100 * MICROSECOND, 3 * MILLISECOND, 20 * MILLISECOND] {
        for until in [0, 1_600 * MILLISECOND] {
            let mut process = Process::new(until, each);
            process.runs(4 * SECOND, || length);
            let drain = process.longest_drain;
            assert!(drain <= TARGET + length, "kernels of {length} ns, {until} ns left: {drain} ns");
            assert!(process.share(4 * SECOND) >= 0.99, "{}", process.share(4 * SECOND));
        }
    }
    // Of kernels that are longer than the target, as few are in flight as of kernels of unknown length.
    let mut process = Process::new(0, each);
    process.runs(4 * SECOND, || 500 * MILLISECOND);
    assert!(process.longest_drain <= UNKNOWN * 500 * MILLISECOND, "{}", process.longest_drain);
}

/// It takes a dozen looks until the old estimate is believed again, and the GPU hardly waits meanwhile.
#[test]
fn what_was_known_is_soon_believed_again() {
    let each = runs(5 * MICROSECOND, 0, SECOND).pace.drained(2 * SECOND);
    let mut process = Process::new(SECOND, each);
    process.runs(100 * MILLISECOND, || 5 * MICROSECOND);
    assert!(process.waits <= 12, "{}", process.waits);
    assert!(process.share(100 * MILLISECOND) >= 0.99, "{}", process.share(100 * MILLISECOND));
}

/// The driver takes a microsecond to say whether the GPU has passed a marker. A quick kernel takes no longer.
#[test]
fn the_gpu_is_seldom_asked_while_little_is_in_flight() {
    let process = runs(5 * MICROSECOND, SECOND, SECOND);
    let (asked, submitted) = (process.gpu.asked.get(), process.pace.submitted());
    assert!(submitted > 150_000 && asked < submitted / 100, "{asked} times in {submitted} submissions");
}

/// Before its slice can end, a process may have work in flight for the time until then.
#[test]
fn a_young_slice_has_a_long_backlog() {
    let mut process = runs(5 * MILLISECOND, 10 * SECOND, 5 * SECOND);
    assert!(process.gpu.drain() > 2 * SECOND, "as much as the driver takes: {}", process.gpu.drain());
    process.runs(10 * SECOND, || 5 * MILLISECOND);
    assert!(process.gpu.drain() <= TARGET + 5 * MILLISECOND, "{}", process.gpu.drain());
    assert!(process.share(10 * SECOND) > 0.99);
}

/// Markers that were passed at different times are observed together, after the thread has been away.
#[test]
fn what_is_seen_late_was_not_quick() {
    let mut process = runs(3 * MILLISECOND, 2 * SECOND, SECOND);
    for _ in 0..5 {
        process.gpu.time.set(process.gpu.time.get() + SECOND);
        process.runs(process.gpu.time.get() + 20 * MILLISECOND, || 3 * MILLISECOND);
        assert!(process.gpu.drain() <= TARGET + 3 * MILLISECOND, "{}", process.gpu.drain());
    }
}

/// A process that waits for the GPU after each kernel, or does something else for a long time, is never held.
#[test]
fn who_waits_for_the_gpu_itself_is_not_held() {
    let mut process = Process::new(0, CostEstimate::UNKNOWN);
    let gpu = process.gpu.clone();
    for round in 0..1_000 {
        process.runs(gpu.time.get() + 1, || 3 * MILLISECOND);
        let thinks = if round % 100 == 99 { SECOND } else { 10 * MICROSECOND };
        gpu.time.set(gpu.last_end() + thinks);
    }
    assert_eq!(process.waits, 0);
}

#[test]
fn work_that_was_in_flight_before_is_waited_for() {
    let gpu = Rc::<Gpu>::default();
    (0..300).for_each(|_| gpu.launch(10 * MILLISECOND));
    let (before, time) = (gpu.last_end(), gpu.time.get());
    let pace = Pace::new(TARGET, 0, CostEstimate::UNKNOWN, time);
    let mut process = Process { gpu, pace, longest_drain: 0, waits: 0 };
    process.runs(before - SECOND, || 10 * MILLISECOND);
    // Some pass without progress: one after a second, two more a second later.
    let submitted = process.gpu.ends.borrow().len() - 300;
    assert!((UNKNOWN as usize..UNKNOWN as usize + 4).contains(&submitted), "{submitted}");
    process.longest_drain = 0;
    process.runs(before + 10 * SECOND, || 10 * MILLISECOND);
    assert!(process.longest_drain <= SECOND + TARGET);
    assert!(process.share(before + 10 * SECOND) > 0.99);
}

/// Kernels that wait for each other, or for a value that is written when all are submitted.
#[test]
fn work_that_waits_for_work_to_come_is_not_held_for_ever() {
    for chain in [8, 400] {
        waits_for_work_to_come(chain);
    }
}

fn waits_for_work_to_come(chain: usize) {
    let mut process = Process::new(0, CostEstimate::UNKNOWN);
    process.gpu.chain.set(chain);
    process.runs(12 * SECOND, || MILLISECOND);
    assert!(process.gpu.ends.borrow().len() > chain, "all are there");
    assert!(process.gpu.last_end() < Nanos::MAX);
    // After that it measures what a kernel takes: the first ones all ended together.
    process.runs(22 * SECOND, || MILLISECOND);
    process.longest_drain = 0;
    process.runs(40 * SECOND, || MILLISECOND);
    assert!(process.longest_drain <= TARGET + MILLISECOND);
    assert!(process.gpu.drain() > TARGET / 4);
}

/// A thread is told to put a marker, and the slice is another one when it hands the marker over.
#[test]
fn a_mark_of_an_earlier_slice_counts_for_no_more_than_was_submitted() {
    let gpu = Rc::<Gpu>::default();
    let mut pace = Pace::new(TARGET, 0, CostEstimate::UNKNOWN, 0);
    pace.marked(1_000, gpu.mark());
    assert_eq!(pace.next(1), Admission::Go);
    gpu.launch(MILLISECOND);
    assert_eq!((pace.submitted(), pace.done), (1, 0));
}

/// Slices that are shorter than a kernel: the cost is known when the first slice has been drained, although it had no two
/// markers in it.
#[test]
fn it_learns_from_slices_of_one_kernel() {
    const LENGTH: Nanos = 500 * MILLISECOND;
    const SLICE: Nanos = 300 * MILLISECOND;
    let mut each = CostEstimate::UNKNOWN;
    for slice in 0..5 {
        let mut process = Process::new(SLICE, each);
        process.runs(SLICE, || LENGTH);
        let drain = process.gpu.drain();
        assert!(slice == 0 || drain <= TARGET + LENGTH - SLICE, "slice {slice}: {drain} ns");
        let end = process.gpu.last_end();
        process.gpu.time.set(end);
        each = process.pace.drained(end);
        assert!(each.get().is_some_and(|known| known.abs_diff(LENGTH) <= LAUNCH), "{each:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Kernels of any length, and of lengths that differ by a half.
    #[test]
    fn the_bound_holds(length in 3 * MICROSECOND..SECOND, jitter in 0..50u64, seed: u64) {
        let mut random = seed | 1;
        let mut process = Process::new(0, CostEstimate::UNKNOWN);
        settles(&mut process, length + length * jitter / 100);
        process.runs(10 * SECOND, || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            length + length * ((random >> 33) % (jitter + 1)) / 100
        });
        // One kernel, and the time by which those before it took longer than expected.
        let longer = |time| time + time * jitter / 100;
        prop_assert!(process.longest_drain <= longer(TARGET + longer(length)), "{} ns", process.longest_drain);
        prop_assert!(process.share(10 * SECOND) >= 0.99 - length as f64 / (10 * SECOND) as f64, "{}", process.share(10 * SECOND));
    }

    /// For a while every kernel takes a hundred times as long, as when another process uses the GPU too. The process is back at
    /// its pace as soon as the work that was in flight is done.
    #[test]
    fn it_recovers_within_a_window(length in 5 * MICROSECOND..2 * MILLISECOND) {
        let mut process = Process::new(0, CostEstimate::UNKNOWN);
        process.runs(SECOND, || length);
        process.runs(3 * SECOND, || 100 * length);
        let (time, disturbed) = (process.gpu.time.get(), process.gpu.last_end());
        process.runs(disturbed + TARGET, || length);
        let before = process.gpu.worked.get() - process.gpu.drain();
        let from = process.gpu.time.get();
        process.runs(from + 5 * SECOND, || length);
        let worked = process.gpu.worked.get() - process.gpu.drain() - before;
        let share = worked as f64 / (process.gpu.time.get() - from) as f64;
        prop_assert!(share >= 0.99, "{share} after {time}");
    }
}
