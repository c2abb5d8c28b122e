//! Promises of host memory, counted together.
//!
//! Several pools draw on the same memory: those of one process (one for each GPU), and those of other
//! processes of the same control group or the same machine. What one of them has promised to its application and does
//! not hold yet is free memory to a measurement, so each of them would promise it again. So each publishes how
//! much that is, and takes off what the others have published: the pools of this process in a counter, other processes
//! in their rows of the control page ([`nvshare::page`]). A row goes with its client, and its promise with it.
//!
//! A promise is published before the others' are looked at. Of two that promise at a time, at least one sees the other.
//! Both may, and both refuse: what is refused by mistake can be asked for again, what is promised twice can not be had.
//!
//! Clients of other GPUs that are other processes are not seen. They may be promised the same memory; making it is
//! safe all the same ([`step`]), and who cannot evict says so and goes on.

use crate::memory::host::limits::{Group, HostLimits, Sharers};
use nvshare::Books;
use nvshare::map::MappedPage;
use nvshare::units::{GRANULE, Granules, bytes_of};
use std::sync::atomic::{AtomicU64, Ordering};

/// What a pool has promised and does not hold, and the groups that it draws on: one word in the page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Promise {
    /// Granules that were promised and are not held yet.
    pub granules: Granules,
    /// The innermost and the outermost of the groups that bound the process.
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
    /// Of so many bytes, for a process with these limits.
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

/// Where promises are published, and those of other processes found.
pub trait Board: Send + Sync {
    /// Publishes this pool's.
    fn publish(&self, promise: Promise);

    /// What other processes have published.
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

/// See [`Board::of_process`]. A forked child has other pools.
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

    /// This pool has promised so many bytes and does not hold them. One thread at a time.
    pub fn publish(&self, bytes: u64, limits: &[HostLimits]) {
        let before = self.mine.swap(bytes, Ordering::SeqCst);
        self.board.of_process().fetch_add(bytes.wrapping_sub(before), Ordering::SeqCst);
        self.board.publish(Promise::new(bytes, limits));
    }

    /// What others were promised.
    pub fn others(&self) -> Others {
        let all = self.board.of_process().load(Ordering::SeqCst);
        let here = all.saturating_sub(self.mine.load(Ordering::SeqCst));
        Others { here, elsewhere: self.board.others() }
    }
}

/// What other pools were promised and do not hold.
pub struct Others {
    /// Bytes, of pools of this process.
    here: u64,
    /// Of other processes.
    elsewhere: Vec<Promise>,
}

impl Others {
    /// Bytes of it below a limit that these share.
    pub fn below(&self, sharers: Sharers) -> u64 {
        let drawn = self.elsewhere.iter().filter(|promise| promise.draws_on(sharers));
        let elsewhere: u64 = drawn.map(|promise| bytes_of(promise.granules)).sum();
        if sharers == Sharers::Pool { 0 } else { self.here.saturating_add(elsewhere) }
    }
}

/// Most processes that make host memory at a time, by which [`step`] is safe: all clients of a GPU, and some.
const MAKERS: u64 = 64;

/// Bytes that may be taken of `left` before what is left is measured anew: so few that all who have measured the same
/// can take as much each.
pub fn step(left: u64) -> u64 {
    let part = left / MAKERS;
    // Below, the reserve that every bound keeps makes up for it.
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
