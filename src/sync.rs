//! The only module that knows about loom: atomics, fences and futexes, real or modelled.
//!
//! There are two kinds of futex, because the kernel tells them apart: futexes in the page, which other processes see
//! ([`futex_wait`]), and futexes between threads of one process ([`park`]). The latter go through `atomic-wait`, which always
//! waits with FUTEX_PRIVATE_FLAG and so must never be used on the page.
//!
//! [`light_barrier`] and [`heavy_barrier`] are the two halves of one sequentially consistent fence between two threads. The light
//! half costs nothing, because the heavy half makes the kernel run a fence on every CPU that runs a thread of this process
//! (membarrier(2), PRIVATE_EXPEDITED). So a thread that passes the gate a million times a second pays nothing, and the engine
//! pays a microsecond each time it shuts the gate.

#[cfg(not(loom))]
pub use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
#[cfg(not(loom))]
pub use std::sync::{Arc, Mutex, MutexGuard};

#[cfg(loom)]
pub use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
#[cfg(loom)]
pub use loom::sync::{Arc, Mutex, MutexGuard};

/// Locks a mutex, also one that a thread held while it panicked. For data that is valid between any two statements of the
/// code that holds the lock, so that a panic leaves nothing half done.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(not(loom))]
mod real {
    use super::{AtomicU32, AtomicU64, Ordering, fence};
    use crate::units::Nanos;
    use std::ptr;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, compiler_fence};

    /// The time on CLOCK_MONOTONIC, in ns. Comparable between processes of one machine.
    pub fn now() -> Nanos {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a valid timespec to write to; CLOCK_MONOTONIC exists on every Linux.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
        time.tv_sec as Nanos * crate::units::SECOND + time.tv_nsec as Nanos
    }

    fn wait(word: *const u32, expected: u32, until: Option<Nanos>, private: i32) {
        let timeout = until.map(|ns| libc::timespec {
            tv_sec: (ns / 1_000_000_000) as _,
            tv_nsec: (ns % 1_000_000_000) as _,
        });
        // SAFETY: `word` points into a live atomic. FUTEX_WAIT_BITSET takes an absolute
        // CLOCK_MONOTONIC time, or none; every error (EAGAIN, EINTR, ETIMEDOUT) means "look again".
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                word,
                libc::FUTEX_WAIT_BITSET | private,
                expected,
                timeout.as_ref().map_or(ptr::null(), ptr::from_ref),
                ptr::null::<u32>(),
                libc::FUTEX_BITSET_MATCH_ANY,
            );
        }
    }

    fn wake(word: *const u32) {
        // SAFETY: `word` points into a live atomic; FUTEX_WAKE reads no other argument.
        unsafe { libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAKE, i32::MAX) };
    }

    /// Sleeps while `word` is `expected`, until woken, at most until the time `until` (CLOCK_MONOTONIC ns). It may also return
    /// for no reason, so the caller looks again. Works between processes.
    pub fn futex_wait(word: &AtomicU32, expected: u32, until: Option<Nanos>) {
        wait(word.as_ptr(), expected, until, 0);
    }

    /// Wakes all threads that sleep on `word`, in any process.
    pub fn futex_wake(word: &AtomicU32) {
        wake(word.as_ptr());
    }

    /// As [`futex_wait`], on the low half of a 64-bit word.
    pub fn futex_wait_low(word: &AtomicU64, expected: u32, until: Option<Nanos>) {
        wait(low_half(word), expected, until, 0);
    }

    /// As [`futex_wake`], on the low half of a 64-bit word.
    pub fn futex_wake_low(word: &AtomicU64) {
        wake(low_half(word));
    }

    fn low_half(word: &AtomicU64) -> *const u32 {
        // The page is little-endian by definition (`page`): the low half comes first.
        const { assert!(cfg!(target_endian = "little")) };
        word.as_ptr().cast::<u32>().cast_const()
    }

    /// Sleeps while `word` is `expected`, until woken. It may also return for no reason. Between threads of this process only.
    pub fn park(word: &AtomicU32, expected: u32) {
        atomic_wait::wait(word, expected);
    }

    /// As [`park`], at most until the time `until` (CLOCK_MONOTONIC ns).
    pub fn park_until(word: &AtomicU32, expected: u32, until: Nanos) {
        wait(word.as_ptr(), expected, Some(until), libc::FUTEX_PRIVATE_FLAG);
    }

    /// Wakes every thread of this process that is [parked](park) on `word`.
    pub fn unpark_all(word: &AtomicU32) {
        atomic_wait::wake_all(word);
    }

    const MEMBARRIER_PRIVATE_EXPEDITED: i32 = 1 << 3;
    const MEMBARRIER_REGISTER_PRIVATE_EXPEDITED: i32 = 1 << 4;

    static ASYMMETRIC: AtomicBool = AtomicBool::new(false);

    fn membarrier(command: i32) -> bool {
        if cfg!(miri) {
            return false; // Miri knows no such call; without it the fences are real ones.
        }
        // SAFETY: membarrier takes three integers and touches no memory of ours.
        unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
    }

    /// Asks the kernel for membarrier(2), once in a process. If the kernel refuses (an old one, or a sandbox), both halves are
    /// full fences, which is correct and slower.
    pub fn register_barriers() {
        static ONCE: OnceLock<()> = OnceLock::new();
        ONCE.get_or_init(|| {
            ASYMMETRIC.store(membarrier(MEMBARRIER_REGISTER_PRIVATE_EXPEDITED), Ordering::SeqCst);
        });
    }

    /// The frequent half: orders this thread's earlier stores before its later loads, against a thread that runs
    /// [`heavy_barrier`].
    #[inline(always)]
    pub fn light_barrier() {
        if ASYMMETRIC.load(Ordering::Relaxed) {
            compiler_fence(Ordering::SeqCst);
        } else {
            fence(Ordering::SeqCst);
        }
    }

    /// The rare half: when it returns, every thread of this process has passed a full fence.
    pub fn heavy_barrier() {
        fence(Ordering::SeqCst);
        if ASYMMETRIC.load(Ordering::Relaxed) && !membarrier(MEMBARRIER_PRIVATE_EXPEDITED) {
            // The kernel accepted the registration, so it should not refuse now. To go on could let memory move under a
            // running kernel.
            panic!(
                "membarrier(2) was allowed at first and then refused (a seccomp filter?): {}",
                std::io::Error::last_os_error()
            );
        }
    }
}

#[cfg(not(loom))]
pub use real::*;

/// Futexes under loom: one condition variable stands for every address. A wake-up for another address is a spurious wake-up,
/// which real futexes have too, so the model hides no fault. A lost wake-up leaves a thread blocked for ever, and loom reports
/// a deadlock. Time stands still, so a protocol that relies on a timeout instead of a wake-up is caught.
#[cfg(loom)]
mod model {
    use super::{AtomicU32, AtomicU64, Ordering, fence};
    use crate::units::Nanos;
    use loom::sync::{Condvar, Mutex};

    loom::lazy_static! {
        static ref QUEUE: (Mutex<u64>, Condvar) = (Mutex::new(0), Condvar::new());
    }

    /// Time stands still.
    pub fn now() -> Nanos {
        1
    }

    fn wait(matches: impl Fn() -> bool) {
        let (lock, queue) = &*QUEUE;
        let woken = lock.lock().unwrap();
        // As in the kernel, the word is compared under the lock that a wake-up takes.
        if matches() {
            drop(queue.wait(woken).unwrap());
        }
    }

    fn wake() {
        let (lock, queue) = &*QUEUE;
        *lock.lock().unwrap() += 1;
        queue.notify_all();
    }

    /// The modelled wait; `until` never comes.
    pub fn futex_wait(word: &AtomicU32, expected: u32, _until: Option<Nanos>) {
        wait(|| word.load(Ordering::Acquire) == expected);
    }

    /// The modelled wake-up.
    pub fn futex_wake(_word: &AtomicU32) {
        wake();
    }

    /// As [`futex_wait`], on the low half.
    pub fn futex_wait_low(word: &AtomicU64, expected: u32, _until: Option<Nanos>) {
        wait(|| word.load(Ordering::Acquire) as u32 == expected);
    }

    /// As [`futex_wake`], on the low half.
    pub fn futex_wake_low(_word: &AtomicU64) {
        wake();
    }

    /// The modelled in-process wait.
    pub fn park(word: &AtomicU32, expected: u32) {
        futex_wait(word, expected, None);
    }

    /// The modelled in-process wait; `until` never comes.
    pub fn park_until(word: &AtomicU32, expected: u32, _until: Nanos) {
        futex_wait(word, expected, None);
    }

    /// The modelled in-process wake-up.
    pub fn unpark_all(_word: &AtomicU32) {
        wake();
    }

    /// Nothing to register.
    pub fn register_barriers() {}

    /// A full fence: loom has no asymmetric ones, and the pair is at least as strong as one.
    pub fn light_barrier() {
        fence(Ordering::SeqCst);
    }

    /// A full fence.
    pub fn heavy_barrier() {
        fence(Ordering::SeqCst);
    }
}

#[cfg(loom)]
pub use model::*;
