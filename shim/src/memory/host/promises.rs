//! Promises of host memory, counted over all pools.
//!
//! Several pools use the same memory: those of one process (one per GPU), and those of other
//! processes in the same control group or on the same machine. Memory that a pool has promised to its application and does
//! not hold yet is measured as free, so every pool would promise it again. Therefore each pool publishes how much that is,
//! and subtracts what the others have published: pools of the same process in a counter, other processes
//! in their rows of the control page ([`nvshare::page`]). A client's promise is removed with its row.
//!
//! A pool publishes its promise before it reads the others'. So of two pools that promise at the same time at least one sees
//! the other. If both do, both refuse, which is the safer error: a refused allocation can be repeated, memory that is
//! promised twice does not exist.
//!
//! Processes that are clients of other GPUs only are not seen, so the same memory may be promised to them too. Allocating it
//! is still safe ([`step`]), and a client that cannot evict for lack of host memory says so and goes on.

use crate::memory::host::limits::{Group, HostLimits, Sharers};
use nvshare::Books;
use nvshare::map::MappedPage;
use nvshare::units::{GRANULE, Granules, bytes_of};
use std::sync::atomic::{AtomicU64, Ordering};

/// How much a pool has promised and does not hold, and the control groups whose memory it uses: one word in the page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Promise {
    /// Granules that were promised and are not held yet.
    pub granules: Granules,
    /// The innermost and the outermost of the groups that limit the process.
    pub groups: [Option<Group>; 2],
}

impl From<u64> for Promise {
    fn from(word: u64) -> Self {
        let group = |bits: u64| Some(Group(bits as u16)).filter(|group| group.0 != 0);
        Self { granules: word as u32, groups: [group(word >> 32), group(word >> 48)] }
    }
}

impl From<Promise> for u64 {
    fn from(promise: Promise) -> Self {
        let [inner, outer] = promise.groups.map(|group| group.map_or(0, |group| u64::from(group.0)));
        outer << 48 | inner << 32 | u64::from(promise.granules)
    }
}

impl Promise {
    /// A promise of `bytes`, for a process with these limits.
    pub fn new(bytes: u64, limits: &[HostLimits]) -> Self {
        let mut groups = limits.iter().filter_map(|limits| match limits.sharers {
            Sharers::Group(group) => Some(group),
            _ => None,
        });
        let granules = Granules::try_from(bytes.div_ceil(GRANULE)).unwrap_or(Granules::MAX);
        Self { granules, groups: [groups.clone().next(), groups.next_back()] }
    }

    fn draws_on(&self, sharers: Sharers) -> bool {
        match sharers {
            Sharers::Pool | Sharers::Process => false,
            Sharers::Group(group) => self.groups.contains(&Some(group)),
            Sharers::Machine => true,
        }
    }
}

/// Where promises are published and those of other processes are read.
pub trait Board: Send + Sync {
    /// Publishes this pool's promise.
    fn publish(&self, promise: Promise);

    /// The promises of other processes.
    fn others(&self) -> Vec<Promise>;

    /// Bytes that all pools of this process have promised and do not hold.
    fn of_process(&self) -> &AtomicU64 {
        &OF_THIS_PROCESS
    }
}

impl Board for Books<MappedPage> {
    fn publish(&self, promise: Promise) {
        self.promise_host(promise.into());
    }

    fn others(&self) -> Vec<Promise> {
        self.host_promises().map(Promise::from).collect()
    }
}

/// See [`Board::of_process`]. Zero again in a forked child, whose pools are new.
static OF_THIS_PROCESS: AtomicU64 = AtomicU64::new(0);

/// For the child of a fork.
pub fn after_fork() {
    OF_THIS_PROCESS.store(0, Ordering::Relaxed);
}

/// One pool's promises.
pub struct Promises {
    board: Box<dyn Board>,
    /// What this pool has published, bytes.
    mine: AtomicU64,
}

impl Promises {
    /// None yet.
    pub fn new(board: Box<dyn Board>) -> Self {
        Self { board, mine: AtomicU64::new(0) }
    }

    /// Publishes that this pool has promised `bytes` that it does not hold. Only one thread at a time may call it.
    pub fn publish(&self, bytes: u64, limits: &[HostLimits]) {
        let before = self.mine.swap(bytes, Ordering::SeqCst);
        self.board.of_process().fetch_add(bytes.wrapping_sub(before), Ordering::SeqCst);
        self.board.publish(Promise::new(bytes, limits));
    }

    /// The promises of other pools.
    pub fn others(&self) -> Others {
        let all = self.board.of_process().load(Ordering::SeqCst);
        let here = all.saturating_sub(self.mine.load(Ordering::SeqCst));
        Others { here, elsewhere: self.board.others() }
    }
}

/// How much other pools have promised and do not hold.
pub struct Others {
    /// Bytes, by other pools of this process.
    here: u64,
    /// By other processes.
    elsewhere: Vec<Promise>,
}

impl Others {
    /// Bytes of those promises that count against a limit with these sharers.
    pub fn below(&self, sharers: Sharers) -> u64 {
        let drawn = self.elsewhere.iter().filter(|promise| promise.draws_on(sharers));
        let elsewhere: u64 = drawn.map(|promise| bytes_of(promise.granules)).sum();
        if sharers == Sharers::Pool { 0 } else { self.here.saturating_add(elsewhere) }
    }
}

/// The number of processes that may allocate host memory at the same time so that [`step`] is safe: more than a GPU has
/// clients.
const MAKERS: u64 = 64;

/// Bytes that may be taken of `left` before it is measured again: so few that [`MAKERS`] processes that have measured the
/// same `left` can each take as many.
pub fn step(left: u64) -> u64 {
    let part = left / MAKERS;
    // With little left, each takes one granule; the reserve of every bound covers the excess.
    (part - part % GRANULE).max(GRANULE).min(left - left % GRANULE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_is_read_as_it_was_written() {
        let groups = [Some(Group::new(7)), None];
        for promise in [Promise { granules: Granules::MAX, groups }, Promise::default()] {
            assert_eq!(Promise::from(u64::from(promise)), promise);
        }
    }

    #[test]
    fn all_who_measured_the_same_may_take_their_step() {
        let reserve = super::super::limits::RESERVE;
        for left in [0, 1, GRANULE, 5 * GRANULE, 100 << 20, 1 << 30, 100 << 30] {
            assert!(MAKERS * step(left) <= left + reserve, "{left}");
            assert!(step(left) <= left && (step(left) > 0) == (left >= GRANULE), "{left}");
        }
    }
}
