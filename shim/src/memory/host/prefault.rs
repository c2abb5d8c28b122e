//! Maps host memory and touches all of its pages. The kernel clears pages at the speed of the one core that touches
//! them, so several threads touch a new mapping.
//!
//! The application does not know of these threads: every signal is blocked in them from their
//! first instruction on, so that the application's handlers never run there, and they leave a real-time scheduling class that
//! they would inherit.

use nix::sys::signal::{SigSet, SigmaskHow};
use nvshare::units::GRANULE;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::{io, thread};

const HUGE: usize = GRANULE as usize;
/// The smallest page size: if huge pages are off, each such page must be touched.
const PAGE: usize = 4096;
/// Bytes that a thread takes at a time: few, so that all threads end at about the same time; whole huge pages, so that no two
/// threads fault on the same page.
const STRIPE: usize = 16 * HUGE;

/// Maps `length` bytes, aligned to a huge page, that are neither inherited by a forked child nor written to a core file.
pub fn map(length: usize) -> io::Result<NonNull<u8>> {
    let whole = length.checked_add(HUGE).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
    // SAFETY: a new anonymous mapping at an address that the kernel chooses.
    let raw = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            whole,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if raw == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let begin = raw as usize;
    let aligned = begin.next_multiple_of(HUGE);
    let (head, tail) = (aligned - begin, begin + whole - (aligned + length));
    let address = aligned as *mut libc::c_void;
    // SAFETY: both ends are parts of the mapping just made, outside the aligned piece.
    unsafe {
        if head > 0 {
            libc::munmap(raw, head);
        }
        if tail > 0 {
            libc::munmap(address.byte_add(length), tail);
        }
    }
    // SAFETY: the aligned piece is part of the mapping just made.
    unsafe {
        // Without these two, copies are slower and core files larger.
        libc::madvise(address, length, libc::MADV_HUGEPAGE);
        libc::madvise(address, length, libc::MADV_DONTDUMP);
        // Without this one, the parent could get new pages on a write after a fork, and the GPU would go on using the old ones.
        if libc::madvise(address, length, libc::MADV_DONTFORK) != 0 {
            let error = io::Error::last_os_error();
            libc::munmap(address, length);
            return Err(error);
        }
    }
    NonNull::new(address.cast()).ok_or_else(|| io::Error::other("a mapping at address 0"))
}

/// How much of a mapping has been touched, as offsets and bytes.
struct Progress<P> {
    /// Everything before this offset is claimed by some thread.
    next: usize,
    /// Up to this offset bytes may be claimed before `permit` is called again.
    allowed: usize,
    /// Bytes that are claimed and not touched yet.
    unfinished: usize,
    end: usize,
    permit: P,
}

impl<P: FnMut(u64) -> u64> Progress<P> {
    /// The next piece, its begin and end, for a thread that has finished `finished` bytes.
    fn claim(&mut self, finished: usize) -> Option<(usize, usize)> {
        self.unfinished -= finished;
        if self.next < self.end && self.next >= self.allowed {
            let more = usize::try_from((self.permit)(self.unfinished as u64)).unwrap_or(usize::MAX);
            self.allowed = self.next.saturating_add(more);
            if more == 0 {
                self.end = self.next;
            }
        }
        let from = self.next;
        let to = self.end.min(self.allowed).min(from + STRIPE);
        self.next = to.max(from);
        self.unfinished += self.next - from;
        (to > from).then_some((from, to))
    }
}

/// Touches all pages of a new mapping, with up to `threads` threads including this one. If a thread cannot be started, the
/// others do its part.
///
/// `permit` gets the number of bytes that are claimed and not touched yet, and returns how many further bytes may be touched
/// before it is called again, whole granules; 0 ends it. Returns how many bytes from the beginning have been touched.
pub fn prefault(
    address: NonNull<u8>,
    length: usize,
    threads: usize,
    permit: impl FnMut(u64) -> u64 + Send,
) -> usize {
    let begin = address.as_ptr() as usize;
    let progress = Mutex::new(Progress { next: 0, allowed: 0, unfinished: 0, end: length, permit });
    let claim = |finished| nvshare::sync::lock(&progress).claim(finished);
    let work = || {
        let mut finished = 0;
        while let Some((from, to)) = claim(finished) {
            for offset in (from..to).step_by(PAGE) {
                // SAFETY: inside the mapping, which nothing else uses yet.
                unsafe { ((begin + offset) as *mut u8).write_volatile(0) };
            }
            finished = to - from;
        }
    };
    let helpers = threads.min(length.div_ceil(STRIPE)).saturating_sub(1);
    thread::scope(|scope| {
        // A new thread inherits the signal mask of the thread that starts it.
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK);
        for _ in 0..helpers {
            let helper = thread::Builder::new().name("nvshare-touch".into()).spawn_scoped(scope, || {
                leave_realtime();
                work();
            });
            if helper.is_err() {
                break;
            }
        }
        if let Ok(before) = before {
            let _ = before.thread_set_mask();
        }
        work();
    });
    progress.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()).end
}

/// Unmaps the end of a mapping, from `kept` bytes on.
pub fn cut(address: NonNull<u8>, kept: usize, length: usize) {
    if kept < length {
        // SAFETY: the end of a mapping that nothing else uses yet.
        unsafe { libc::munmap(address.as_ptr().byte_add(kept).cast(), length - kept) };
    }
}

fn leave_realtime() {
    // SAFETY: all-zero parameters are valid ones, and 0 is the calling thread.
    unsafe {
        let parameters: libc::sched_param = std::mem::zeroed();
        // Leaving the class needs no privilege; if it fails nevertheless, the inherited class works too.
        libc::sched_setscheduler(0, libc::SCHED_OTHER, &parameters);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// `VmFlags` and the sizes in kB that smaps shows for the mapping at `address`.
    fn smaps(address: NonNull<u8>) -> (Vec<String>, HashMap<String, usize>) {
        let wanted = address.as_ptr() as usize;
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut inside, mut flags, mut sizes) = (false, Vec::new(), HashMap::new());
        for line in text.lines() {
            let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
            let hex = |text| usize::from_str_radix(text, 16).ok();
            if let Some((begin, end)) = first.split_once('-').and_then(|(a, b)| hex(a).zip(hex(b))) {
                inside = (begin..end).contains(&wanted);
            } else if inside && first == "VmFlags:" {
                flags = rest.split_whitespace().map(str::to_owned).collect();
            } else if inside && let Some(size) = rest.trim().strip_suffix(" kB") {
                sizes.insert(first.trim_end_matches(':').to_owned(), size.parse().unwrap());
            }
        }
        (flags, sizes)
    }

    fn unmap(address: NonNull<u8>, length: usize) {
        // SAFETY: the test's own mapping, used no more.
        unsafe { libc::munmap(address.as_ptr().cast(), length) };
    }

    #[test]
    fn a_child_and_a_core_file_do_not_get_it() {
        let length = 3 * HUGE;
        let address = map(length).unwrap();
        assert_eq!(address.as_ptr() as usize % HUGE, 0);
        let (flags, sizes) = smaps(address);
        assert!(flags.iter().any(|flag| flag == "dc"), "copied at a fork: {flags:?}");
        assert!(flags.iter().any(|flag| flag == "dd"), "dumped: {flags:?}");
        assert_eq!(sizes["Size"] * 1024, length);
        unmap(address, length);
    }

    #[test]
    fn the_bytes_cut_off_for_the_alignment_are_unmapped() {
        let size = || {
            let text = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = text.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
            line.split_whitespace().next().unwrap().parse::<usize>().unwrap() << 10
        };
        let before = size();
        for _ in 0..2000 {
            unmap(map(HUGE).unwrap(), HUGE);
        }
        // Without the cut 4 GiB would be left mapped; other tests that run meanwhile map less.
        assert!(size() < before + (2 << 30));
    }

    #[test]
    fn every_page_is_in_place_whatever_the_number_of_threads() {
        for threads in [0, 1, 2, 8, 100] {
            let length = 2 * STRIPE + HUGE;
            let address = map(length).unwrap();
            assert_eq!(prefault(address, length, threads, |_| u64::MAX), length);
            let (_, sizes) = smaps(address);
            assert_eq!(sizes["Rss"] * 1024, length, "{threads} threads");
            unmap(address, length);
        }
    }

    #[test]
    fn the_callers_signal_mask_is_as_before() {
        let before = SigSet::thread_get_mask().unwrap();
        let address = map(4 * STRIPE).unwrap();
        prefault(address, 4 * STRIPE, 4, |_| u64::MAX);
        assert_eq!(SigSet::thread_get_mask().unwrap(), before);
        unmap(address, 4 * STRIPE);
    }

    /// The masks of blocked signals of the helpers that are alive.
    fn helpers() -> Vec<u64> {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let mask = |task: io::Result<std::fs::DirEntry>| {
            // The thread may have ended meanwhile.
            let text = std::fs::read_to_string(task.ok()?.path().join("status")).ok()?;
            text.starts_with("Name:\tnvshare-touch\n").then_some(())?;
            let mask = text.lines().find_map(|line| line.strip_prefix("SigBlk:"))?;
            u64::from_str_radix(mask.trim(), 16).ok()
        };
        tasks.filter_map(mask).collect()
    }

    #[test]
    fn no_handler_of_the_program_runs_in_a_helper() {
        let length = 4 * STRIPE;
        let seen = (0..50).find_map(|_| {
            let address = map(length).unwrap();
            let masks = thread::scope(|scope| {
                let begin = address.as_ptr() as usize;
                let busy = scope.spawn(move || {
                    prefault(NonNull::new(begin as *mut u8).unwrap(), length, 4, |_| u64::MAX);
                });
                let mut masks = Vec::new();
                while !busy.is_finished() {
                    masks.extend(helpers());
                }
                masks
            });
            unmap(address, length);
            (!masks.is_empty()).then_some(masks)
        });
        let all = [libc::SIGALRM, libc::SIGPROF, libc::SIGUSR1, libc::SIGTERM, libc::SIGCHLD];
        let wanted = all.iter().fold(0, |mask, signal| mask | 1u64 << (signal - 1));
        let seen = seen.expect("a helper was seen at work");
        assert!(seen.iter().all(|mask| mask & wanted == wanted), "{seen:x?}");
    }

    #[test]
    fn an_impossible_mapping_is_an_error() {
        assert!(map(usize::MAX - 4096).is_err());
        assert!(map(1 << 60).is_err());
    }

    #[test]
    fn touching_ends_where_the_permit_ends() {
        for threads in [1, 4] {
            let length = 4 * STRIPE;
            let address = map(length).unwrap();
            let mut left = 5;
            let (mut asked, mut most) = (0, 0);
            let touched = prefault(address, length, threads, |unfinished| {
                (asked, most) = (asked + 1, most.max(unfinished));
                left -= 1;
                if left > 0 { 3 * GRANULE } else { 0 }
            });
            assert_eq!((touched, asked), (12 * HUGE, 5), "{threads} threads");
            assert!(most <= 12 * GRANULE);
            let (_, sizes) = smaps(address);
            assert_eq!(sizes["Rss"] * 1024, touched);
            cut(address, touched, length);
            let (_, sizes) = smaps(address);
            assert_eq!(sizes["Size"] * 1024, touched);
            unmap(address, touched);
        }
    }
}
