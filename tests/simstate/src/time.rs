//! The time model: engines that are busy until a moment.
//!
//! A GPU has a compute engine and a copy engine each way. An engine is one word in the segment: the CLOCK_MONOTONIC
//! nanosecond until which it is taken. An operation of duration `d` takes it with a compare-and-swap from
//! `max(now, busy until)` on, does its real work, and sleeps until its time is over. Processes thus share an engine
//! without a lock, and one that is killed has taken nothing but time that passes anyway.
//!
//! Long operations are cut into slices of 2 ms. Between slices others get the engine, as a GPU's own time-slicing
//! would do, and a killed process blocks it for a slice at most. An engine taken further ahead than 10 s is garbage
//! and counts as free.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// Longest stretch for which an operation takes an engine at once.
pub const SLICE_NS: u64 = 2_000_000;

const ABSURD_NS: u64 = 10_000_000_000;

/// Waits shorter than this are spun, since going to sleep takes about as long.
const SPIN_NS: u64 = 50_000;

/// CLOCK_MONOTONIC, in nanoseconds.
pub fn now_ns() -> u64 {
    let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `ts` is a valid place for the answer, and CLOCK_MONOTONIC always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut ts) };
    ts.tv_sec as u64 * 1_000_000_000 + ts.tv_nsec as u64
}

/// Waits until CLOCK_MONOTONIC shows `deadline`.
pub fn sleep_until(deadline: u64) {
    loop {
        let now = now_ns();
        if now >= deadline {
            return;
        }
        if deadline - now <= SPIN_NS {
            std::hint::spin_loop();
            continue;
        }
        let wake = deadline - SPIN_NS / 2;
        let ts = libc::timespec {
            tv_sec: (wake / 1_000_000_000) as libc::time_t,
            tv_nsec: (wake % 1_000_000_000) as libc::c_long,
        };
        // SAFETY: `ts` is a valid time; a null remainder is allowed with TIMER_ABSTIME.
        unsafe {
            libc::clock_nanosleep(libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME, &ts, std::ptr::null_mut())
        };
    }
}

/// How long `bytes` take at `bandwidth` bytes/s.
pub fn transfer_ns(bytes: u64, bandwidth: u64) -> u64 {
    (u128::from(bytes) * 1_000_000_000 / u128::from(bandwidth.max(1))).min(u128::from(u64::MAX)) as u64
}

/// An engine's timeline. All zeros is an engine that is free.
#[repr(C, align(64))]
pub struct Timeline {
    busy_until: AtomicU64,
}

impl Timeline {
    /// Takes the engine for `ns` (a slice at most) from `from` or from when it is free; says when that begins.
    fn take(&self, from: u64, ns: u64) -> u64 {
        let mut seen = self.busy_until.load(SeqCst);
        loop {
            let start = if seen > now_ns() + ABSURD_NS { from } else { from.max(seen) };
            match self.busy_until.compare_exchange_weak(seen, start + ns, SeqCst, SeqCst) {
                Ok(_) => return start,
                Err(other) => seen = other,
            }
        }
    }

    /// Occupies the engine for `ns` in all, doing `work` once meanwhile; tells `slice` the start and length of each
    /// stretch that it took.
    pub fn occupy<R>(&self, ns: u64, work: impl FnOnce() -> R, mut slice: impl FnMut(u64, u64)) -> R {
        let first = ns.min(SLICE_NS);
        let start = self.take(now_ns(), first);
        slice(start, first);
        let result = work();
        let mut end = start + first;
        sleep_until(end);
        let mut left = ns - first;
        while left > 0 {
            // From the end of the last slice and not from now: waking up late must not cost the engine time.
            let next = left.min(SLICE_NS);
            let start = self.take(end, next);
            slice(start, next);
            end = start + next;
            left -= next;
            sleep_until(end);
        }
        result
    }
}

const BUCKETS: usize = 16;
const BUCKET_NS: u64 = 100_000_000;

/// How busy an engine was of late: per tenth of a second the microseconds it was taken.
#[repr(C, align(64))]
pub struct Load {
    // Each word is the number of the tenth (upper half) and the microseconds (lower half), so that one
    // compare-and-swap both adds and begins anew.
    buckets: [AtomicU64; BUCKETS],
}

impl Load {
    /// Notes that the engine is taken for `ns` from `start`.
    pub fn note(&self, start: u64, ns: u64) {
        let end = start + ns;
        let mut at = start;
        while at < end {
            let number = at / BUCKET_NS;
            let stop = end.min((number + 1) * BUCKET_NS);
            let micros = (stop - at) / 1000;
            let _ = self.buckets[number as usize % BUCKETS].fetch_update(SeqCst, SeqCst, |word| {
                let old = if word >> 32 == number & 0xffff_ffff { word & 0xffff_ffff } else { 0 };
                Some((number & 0xffff_ffff) << 32 | (old + micros).min(0xffff_ffff))
            });
            at = stop;
        }
    }

    /// Percent of the last second that the engine was taken.
    pub fn percent(&self, now: u64) -> u32 {
        let last = now / BUCKET_NS;
        let micros: u64 = (last.saturating_sub(10)..last)
            .map(|number| {
                let word = self.buckets[number as usize % BUCKETS].load(SeqCst);
                if word >> 32 == number & 0xffff_ffff { word & 0xffff_ffff } else { 0 }
            })
            .sum();
        (micros / 10_000).min(100) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine() -> Timeline {
        Timeline { busy_until: AtomicU64::new(0) }
    }

    #[test]
    fn an_engine_serves_one_at_a_time() {
        let engine = engine();
        let begin = now_ns();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| engine.occupy(5_000_000, || (), |_, _| ()));
            }
        });
        assert!(now_ns() - begin >= 20_000_000);
    }

    #[test]
    fn garbage_does_not_block() {
        let engine = engine();
        engine.busy_until.store(u64::MAX, SeqCst);
        let begin = now_ns();
        engine.occupy(1000, || (), |_, _| ());
        assert!(now_ns() - begin < 5_000_000_000);
    }

    #[test]
    fn load_is_a_share_of_the_last_second() {
        let load = Load { buckets: Default::default() };
        load.note(5_000_000_000, 500_000_000);
        assert_eq!(load.percent(6_000_000_000), 50);
        assert_eq!(load.percent(9_000_000_000), 0);
    }
}
