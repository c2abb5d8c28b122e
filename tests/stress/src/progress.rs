//! The file in which each process of a stress run has a row: what its threads do, and what they did before.
//!
//! `tests/programs/random_client.c` has the same layout and writes the rows; they are only read here, but for a row's
//! state, which is freed once its process is gone.

use memmap2::MmapRaw;
use std::fmt::Write;
use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

const ROWS: usize = 512;
const LANES: usize = 16;
const EVENTS: usize = 100;

const FREE: u32 = 0;
const LIVING: u32 = 1;
const KILLS_ITSELF: u32 = 3;

/// Text that another process writes at any time.
struct Text<const N: usize>([AtomicU64; N]);

impl<const N: usize> Text<N> {
    fn read(&self) -> String {
        let bytes: Vec<u8> =
            self.0.iter().flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect();
        let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    }
}

#[repr(C)]
struct Lane {
    thread: AtomicU32,
    serial: AtomicU32,
    what: Text<7>,
}

#[repr(C)]
struct Event {
    when: AtomicU64,
    /// The thread, and the first four bytes of what it did.
    words: Text<7>,
}

#[repr(C)]
struct Row {
    state: AtomicU32,
    pid: AtomicU32,
    seed: AtomicU64,
    actions: AtomicU64,
    refused: AtomicU64,
    next_event: AtomicU64,
    begun: AtomicU64,
    unused: [AtomicU64; 2],
    lanes: [Lane; LANES],
    events: [Event; EVENTS],
    rest: [AtomicU64; 88],
}

const _: () = assert!(size_of::<Row>() == 8192);

/// What a thread does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doing {
    /// Its number in its process.
    pub lane: usize,
    /// Its thread id.
    pub thread: u32,
    /// Counts up with each thing that it does.
    pub serial: u32,
    /// What.
    pub what: String,
}

impl Doing {
    /// Whether this may last as long as somebody else lets it.
    pub fn may_last(&self) -> bool {
        self.what.starts_with('~')
    }
}

/// What a process has done.
#[derive(Debug, Clone, Copy, Default)]
pub struct Done {
    /// Actions that it began.
    pub actions: u64,
    /// Allocations that were refused for want of memory.
    pub refused: u64,
}

/// The file, mapped.
pub struct Progress(MmapRaw);

impl Progress {
    /// Makes the file.
    pub fn create(path: &Path) -> std::io::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        file.set_len((ROWS * size_of::<Row>()) as u64)?;
        MmapRaw::map_raw(&file).map(Self)
    }

    fn rows(&self) -> &[Row] {
        // SAFETY: the mapping has this size and is page-aligned, and rows are made of atomics, for which any bytes are
        // valid and which other processes may change.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast::<Row>(), ROWS) }
    }

    fn row_of(&self, pid: u32) -> impl Iterator<Item = &Row> {
        let is_its = move |row: &&Row| {
            row.state.load(Ordering::Acquire) != FREE && row.pid.load(Ordering::Relaxed) == pid
        };
        self.rows().iter().filter(is_its)
    }

    /// The processes that have a row, each once.
    pub fn processes(&self) -> Vec<u32> {
        let taken = self.rows().iter().filter(|row| row.state.load(Ordering::Acquire) != FREE);
        let mut pids: Vec<u32> =
            taken.map(|row| row.pid.load(Ordering::Relaxed)).filter(|&pid| pid != 0).collect();
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// What the threads of a process do, in the program that it runs now: after exec it has another row, too.
    pub fn doing(&self, pid: u32) -> Vec<Doing> {
        let Some(row) = self.row_of(pid).max_by_key(|row| row.begun.load(Ordering::Relaxed)) else {
            return Vec::new();
        };
        let lane = |(lane, it): (usize, &Lane)| {
            let thread = it.thread.load(Ordering::Relaxed);
            let doing =
                Doing { lane, thread, serial: it.serial.load(Ordering::Relaxed), what: it.what.read() };
            (thread != 0).then_some(doing)
        };
        row.lanes.iter().enumerate().filter_map(lane).collect()
    }

    /// Whether it has said that it kills itself.
    pub fn kills_itself(&self, pid: u32) -> bool {
        self.row_of(pid).any(|row| row.state.load(Ordering::Acquire) == KILLS_ITSELF)
    }

    /// Whether it has not said that it ends.
    pub fn lives_on(&self, pid: u32) -> bool {
        self.row_of(pid).any(|row| row.state.load(Ordering::Acquire) == LIVING)
    }

    /// What it last did, and when, oldest first.
    pub fn history(&self, pid: u32, most: usize) -> String {
        let mut text = String::new();
        for row in self.row_of(pid) {
            let next = row.next_event.load(Ordering::Relaxed);
            let first = next.saturating_sub(most.min(EVENTS) as u64);
            let _ = writeln!(text, "  process {pid}, seed {}:", row.seed.load(Ordering::Relaxed));
            for at in first..next {
                let event = &row.events[(at % EVENTS as u64) as usize];
                let thread = event.words.0[0].load(Ordering::Relaxed) as u32;
                let when = event.when.load(Ordering::Relaxed) as f64 / 1e6;
                let _ = writeln!(text, "    {when:.6} [{thread}] {}", event.what());
            }
        }
        text
    }

    /// Frees the rows of a process that is gone, and says what it has done.
    pub fn close(&self, pid: u32) -> Done {
        let mut done = Done::default();
        for row in self.row_of(pid) {
            done.actions += row.actions.load(Ordering::Relaxed);
            done.refused += row.refused.load(Ordering::Relaxed);
            row.pid.store(0, Ordering::Relaxed);
            row.state.store(FREE, Ordering::Release);
        }
        done
    }
}

impl Event {
    fn what(&self) -> String {
        let bytes: Vec<u8> =
            self.words.0.iter().flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect();
        let text = &bytes[size_of::<u32>()..];
        let end = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
        String::from_utf8_lossy(&text[..end]).into_owned()
    }
}
