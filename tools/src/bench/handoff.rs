//! What it costs to pass the right to run on to another process, with no memory to move.
//!
//! Two processes are clients of one page. They cannot run together, so they run in turn: the holder waits until the
//! other sleeps in the futex, notes the time, and releases; the other notes the time when its `acquire` returns. Between
//! blocks of hand-offs are blocks of bare futex ping-pong between the same two threads, in the same manner: so both are
//! measured under the same noise, and their ratio says what the protocol adds to the cheapest wake-up there is.

use super::stats::Row;
use crate::complain;
use crate::{Failure, node};
use memmap2::{MmapOptions, MmapRaw};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nvshare::client::NoMemory;
use nvshare::map::MappedPage;
use nvshare::page::{PAGE_BYTES, Quantum, Settings};
use nvshare::slot::{Process, SlotIndex};
use nvshare::sync::{futex_wait_low, futex_wake_low, now};
use nvshare::units::{Nanos, SECOND, parse_time};
use nvshare::{Client, GpuUuid};
use nvshare_stats::Reader;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Options of `nvshare bench handoff`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// How many hand-offs are measured, and as many futex wake-ups; 1000 to 10000000
    #[arg(long, default_value_t = 40_000, value_parser = clap::value_parser!(u32).range(1_000..=10_000_000))]
    iterations: u32,
    /// Beside it, read the page so often as a scrape of the metrics does, and twice a second what has happened, as an arbiter
    /// that serves metrics does; such as 1s
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    read_every: Option<Nanos>,
}

/// Reads a page as an arbiter that serves metrics does, in a thread of its own, until dropped.
struct Scraper {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// How often an arbiter that serves metrics looks at what has happened.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(500);

impl Scraper {
    fn start(page: MappedPage, every: Nanos) -> Self {
        let (end, ended) = channel::<()>();
        let thread = std::thread::spawn(move || {
            let mut reader = Reader::of_pages(vec![page]).with_news();
            let every = Duration::from_nanos(every).max(Duration::from_micros(1));
            let (mut scrape, mut follow) = (Instant::now(), Instant::now());
            while ended.recv_timeout(scrape.min(follow).saturating_duration_since(Instant::now()))
                == Err(RecvTimeoutError::Timeout)
            {
                let time = Instant::now();
                if time >= scrape {
                    std::hint::black_box(reader.read().ok());
                    scrape = time + every;
                }
                if time >= follow {
                    let _ = reader.follow();
                    follow = time + FOLLOW_INTERVAL;
                }
                std::hint::black_box(reader.take_news());
            }
        });
        Self { end: Some(end), thread: Some(thread) }
    }
}

impl Drop for Scraper {
    fn drop(&mut self) {
        drop(self.end.take());
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// What the second process is told.
#[derive(Debug, clap::Args)]
pub struct Peer {
    #[arg(long)]
    page: RawFd,
    #[arg(long)]
    board: RawFd,
    #[arg(long)]
    count: usize,
    #[arg(long)]
    first: u32,
}

/// Hand-offs in a row, then ping-pongs in a row. Even, so that every block begins with the same holder.
const BLOCK: usize = 100;
/// Blocks that are not counted.
const WARM_UP: usize = 10;

/// Neither of the two fits beside the other.
const CAPACITY: u32 = 100;
const DEMAND: u32 = 60;

/// Shared words: when the last message was sent, the ping-pong's futex, who is ready; then the samples.
struct Board {
    map: MmapRaw,
}

const SENT: usize = 0;
const BALL: usize = 8;
const READY: usize = 16;
const SAMPLES: usize = 24;

/// Which of the two is measured.
#[derive(Clone, Copy)]
enum Kind {
    Handoff = 0,
    PingPong = 1,
}

impl Board {
    fn bytes(count: usize) -> usize {
        8 * (SAMPLES + 2 * count)
    }

    fn map(file: &File, count: usize) -> Result<Self, Failure> {
        let map = MmapOptions::new().len(Self::bytes(count)).map_raw(file);
        map.map(|map| Self { map }).map_err(|error| system("memory cannot be shared", error))
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(8 * index < self.map.len());
        // SAFETY: within the mapping, aligned, and only ever used as an atomic by both processes.
        unsafe { &*self.map.as_mut_ptr().cast::<AtomicU64>().add(index) }
    }

    fn sample(&self, kind: Kind, number: usize, count: usize) -> &AtomicU64 {
        self.word(SAMPLES + kind as usize * count + number)
    }

    fn send(&self) {
        self.word(SENT).store(now(), Ordering::Release);
    }

    fn received(&self, kind: Kind, number: usize, count: usize) {
        let time = now();
        let sent = self.word(SENT).load(Ordering::Acquire);
        self.sample(kind, number, count).store(time.saturating_sub(sent), Ordering::Release);
    }
}

fn system(what: &str, error: impl std::fmt::Display) -> Failure {
    Failure::with_status(1, format!("{what}: {error}"))
}

/// Tells when the other process sleeps.
struct Sleeper(File);

impl Sleeper {
    fn of(pid: u32) -> Result<Self, Failure> {
        let path = format!("/proc/{pid}/stat");
        File::open(&path).map(Self).map_err(|error| system(&path, error))
    }

    /// Waits until its first thread, the only one it has, is asleep.
    fn wait(&self) {
        let mut text = [0; 512];
        loop {
            let Ok(length) = self.0.read_at(&mut text, 0) else { return };
            // The state follows the name, which is in parentheses and may itself contain some.
            let state =
                text[..length].iter().rposition(|byte| *byte == b')').and_then(|end| text.get(end + 2));
            match state {
                // It may need this very CPU to get there.
                Some(b'R') => std::thread::yield_now(),
                _ => return,
            }
        }
    }
}

/// One of the two processes.
struct Side {
    client: Client<MappedPage>,
    board: Board,
    other: Sleeper,
    count: usize,
    /// The one that holds at the beginning of every block.
    first: bool,
}

impl Side {
    fn run(mut self) {
        let blocks = self.count / BLOCK;
        for block in 0..blocks {
            let numbers = block * BLOCK..(block + 1) * BLOCK;
            for number in numbers.clone().step_by(2) {
                self.handoff(number);
            }
            for number in numbers.step_by(2) {
                self.ping_pong(number);
            }
        }
    }

    /// Message `number` goes from the first process to the second, and the next one back.
    fn handoff(&mut self, number: usize) {
        if self.first {
            self.pass_on();
            self.take(number + 1);
        } else {
            self.take(number);
            self.pass_on();
        }
    }

    fn pass_on(&mut self) {
        self.other.wait();
        self.board.send();
        self.client.release(true);
    }

    fn take(&mut self, number: usize) {
        let Ok(()) = self.client.acquire(&mut NoMemory);
        self.board.received(Kind::Handoff, number, self.count);
    }

    fn ping_pong(&mut self, number: usize) {
        if self.first {
            self.hit(number);
            self.catch(number + 1);
        } else {
            self.catch(number);
            self.hit(number + 1);
        }
    }

    fn hit(&self, number: usize) {
        self.other.wait();
        self.board.send();
        let ball = self.board.word(BALL);
        ball.store(number as u64 + 1, Ordering::Release);
        futex_wake_low(ball);
    }

    fn catch(&self, number: usize) {
        let ball = self.board.word(BALL);
        loop {
            let seen = ball.load(Ordering::Acquire);
            if seen == number as u64 + 1 {
                break;
            }
            futex_wait_low(ball, seen as u32, None);
        }
        self.board.received(Kind::PingPong, number, self.count);
    }
}

/// Measures.
///
/// # Errors
/// The system refuses something.
pub fn measure(options: &Options) -> Result<Vec<Row>, Failure> {
    let count = (options.iterations as usize).next_multiple_of(BLOCK) + WARM_UP * BLOCK;
    let memory = |name: &str, bytes: usize| {
        let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC).map_err(|error| system("no memfd", error))?;
        let file = File::from(fd);
        file.set_len(bytes as u64).map_err(|error| system("no memory", error))?;
        Ok::<_, Failure>(file)
    };
    let (page_file, board_file) = (memory("page", PAGE_BYTES)?, memory("board", Board::bytes(count))?);
    let page = MappedPage::map(&page_file).map_err(|error| system("the page", error))?;
    page.initialise(GpuUuid([0xbe; 16]), CAPACITY);
    // No slice ends, and both are the same to each other, whoever has used more while they started.
    let quantum = Quantum::Fixed(3_600 * SECOND);
    page.set_settings(Settings { quantum, deadline: 0, ..Settings::default() });
    let own = std::process::id();
    let board = Board::map(&board_file, count)?;
    // The pages of the samples are touched now and not while the clock runs.
    for number in 0..count {
        for kind in [Kind::Handoff, Kind::PingPong] {
            board.sample(kind, number, count).store(0, Ordering::Relaxed);
        }
    }
    let mut command = Command::new(node::program()?);
    command
        .args(["internal", "handoff-peer", "--count", &count.to_string(), "--first", &own.to_string()])
        .args(["--page", &page_file.as_raw_fd().to_string(), "--board", &board_file.as_raw_fd().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    node::pass_on(&mut command, &page_file);
    node::pass_on(&mut command, &board_file);
    let slot =
        |pid, name| page.open_slot(Process { pid, started: 0 }, name, 1).expect("a new page has free slots");
    let (first, second) = (slot(own, "first"), slot(1, "second"));
    debug_assert_eq!((first.get(), second.get()), (0, 1));
    let mut client = Client::new(page.clone(), first);
    client.books().grow(DEMAND);
    let Ok(()) = client.acquire(&mut NoMemory);

    let mut child = command.spawn().map_err(|error| system("this program cannot be started again", error))?;
    let other = Sleeper::of(child.id())?;
    // Without its peer this process would sleep for ever.
    let watch = std::thread::spawn(move || {
        let ended = child.wait();
        if !matches!(&ended, Ok(status) if status.success()) {
            complain!("nvshare: the second process of the benchmark failed: {ended:?}");
            std::process::exit(1);
        }
    });
    let ready = board.word(READY);
    while ready.load(Ordering::Acquire) == 0 {
        futex_wait_low(ready, 0, None);
    }
    let scraper = options.read_every.map(|every| Scraper::start(page.clone(), every));
    Side { client, board, other, count, first: true }.run();
    drop(scraper);
    let _ = watch.join();

    let board = Board::map(&board_file, count)?;
    let samples = |kind| {
        let counted = WARM_UP * BLOCK..count;
        counted.map(|number| board.sample(kind, number, count).load(Ordering::Acquire) as f64).collect()
    };
    let handoff = Row::of("handoff", "ns", samples(Kind::Handoff));
    let ping_pong = Row::of("futex_pingpong", "ns", samples(Kind::PingPong));
    let ratio =
        |name, of: fn(&Row) -> f64| Row::single(name, "x", handoff.n, of(&handoff) / of(&ping_pong).max(1.0));
    let ratios = [ratio("handoff_ratio_p50", |row| row.p50), ratio("handoff_ratio_p99", |row| row.p99)];
    Ok([handoff, ping_pong].into_iter().chain(ratios).collect())
}

/// The second process.
///
/// # Errors
/// The descriptors are not what the first process made.
pub fn peer(options: &Peer) -> Result<(), Failure> {
    // SAFETY: the first process made these descriptors for this one, which uses each once.
    let [page, board] = [options.page, options.board].map(|fd| unsafe { File::from_raw_fd(fd) });
    let page = MappedPage::open(&page).map_err(|error| system("the page", error))?;
    let board = Board::map(&board, options.count)?;
    let slot = SlotIndex::new(1).expect("a page has more than one slot");
    let mut client = Client::new(page, slot);
    client.books().grow(DEMAND);
    // In the queue before the first process releases for the first time.
    client.request();
    board.word(READY).store(1, Ordering::Release);
    futex_wake_low(board.word(READY));
    let other = Sleeper::of(options.first)?;
    Side { client, board, other, count: options.count, first: false }.run();
    Ok(())
}
