//! How the arbiter knows that a client lives: descriptors that the client keeps from its registration to its end.
//!
//! A client ends when its process ends *or runs another program* (execve, which keeps the pid, the start time and the pidfd).
//! Both end all threads of the process but one, and close the descriptors that only those threads have. So a thread of the
//! client keeps three descriptors in a descriptor table of its own (`CLOSE_RANGE_UNSHARE`):
//!
//! - the **connection** to the arbiter: its end tells the arbiter at once that something has happened;
//! - the **life file**, with a lock on its open file description (`F_OFD_SETLK`) that the arbiter set before it sent the
//!   descriptor. The kernel releases the lock when the last descriptor is closed. This arbiter and every later one can ask
//!   whether the lock is held, also from another pid namespace. The lock is the proof that the client lives;
//! - the **page**, for a later arbiter that has lost it.
//!
//! A child of fork, vfork or clone gets the table of the thread that made it, and so none of these descriptors. An application
//! that closes all its descriptors, as a daemon does, closes those in its own table. docs/decisions/0019-who-is-dead.md has the table of cases.
//!
//! If the connection ends without [`Status::Closed`], the arbiter has ended. Then the thread tries to reach the next arbiter,
//! with longer and longer pauses, and sends it the descriptors. Otherwise the thread wakes only to answer the arbiter.

use crate::books::PrivatePhase;
use crate::connection::{self, Answer, RegisterError, Response};
use crate::map::MappedPage;
use crate::quiet_thread;
use crate::scm_rights;
use crate::sealed::PRESENCE_THREAD;
use crate::slot::{Owner, SlotIndex};
use crate::wire::{Attach, Reply, Status, Told};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::MsgFlags;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Once, OnceLock};
use std::time::Duration;

/// The descriptors that a registered client keeps, by their numbers, which are the same in both tables.
#[derive(Clone)]
pub(crate) struct Presence {
    /// The arbiter's socket.
    path: PathBuf,
    attach: Attach,
    connection: RawFd,
    /// The page and the life file, as the arbiter sent them.
    sent: Vec<RawFd>,
    private_phase: PrivatePhase,
}

impl Presence {
    /// The presence of a client that has claimed its slot.
    pub(crate) fn new(
        path: &Path,
        page: &MappedPage,
        slot: SlotIndex,
        private_phase: &PrivatePhase,
        answer: Answer,
    ) -> Self {
        let nobody = Owner { generation: 0, pid: 0 };
        let owner = page.details(slot).map_or(nobody, |details| details.owner);
        Self {
            // Absolute, because the application may change its directory.
            path: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
            attach: Attach::new(page.gpu(), slot, owner),
            connection: answer.connection.into_raw_fd(),
            private_phase: private_phase.clone(),
            sent: answer.sent.into_iter().map(IntoRawFd::into_raw_fd).collect(),
        }
    }

    fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        std::iter::once(self.connection).chain(self.sent.iter().copied())
    }
}

/// What is called when the process is known to a later arbiter, in the thread that keeps the descriptors.
static ON_ATTACH: OnceLock<fn()> = OnceLock::new();

/// Has `hook` called whenever the process has made itself known to a later arbiter, once for each GPU. Only the first hook
/// counts.
pub fn on_attach(hook: fn()) {
    let _ = ON_ATTACH.set(hook);
}

/// Keeps the descriptors until the process ends or runs another program, or the arbiter says that the slot is closed.
///
/// It starts a thread and does not wait for it: the caller may hold the dynamic linker's lock, which a new thread needs. If no
/// thread can be made, the descriptors stay in the process's own table and are closed with it.
pub(crate) fn keep(presence: Presence) {
    presence.descriptors().for_each(lend);
    let _ = spawn("nvshare-move", move || move_over(&presence));
}

/// Starts a thread of this module. It handles no signals: a handler of the application would not find the application's descriptors
/// in it.
fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let builder = std::thread::Builder::new().name(name.into()).stack_size(STACK);
    quiet_thread::spawn(builder, run).map(drop)
}

/// Bytes of stack for each of the two threads, whose calls do not nest deep.
const STACK: usize = 128 << 10;

/// Moves the descriptors from the process's table to that of a thread of their own. This second thread closes them in the
/// process's table, which the first one no longer has.
fn move_over(presence: &Presence) {
    let (tell, told) = channel();
    let own = presence.clone();
    if spawn(PRESENCE_THREAD, move || stay(own, &tell)).is_err() || told.recv() != Ok(Table::Own) {
        return;
    }
    for fd in presence.descriptors() {
        // SAFETY: `Presence::new` has taken the descriptor over, and nobody else knows its number.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
        take_back(fd);
    }
}

/// Which descriptor table a thread uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Table {
    /// One that no other thread uses.
    Own,
    /// The process's: the kernel is older than 5.9, or a filter of system calls forbids a table of its own.
    Shared,
}

/// Gives the calling thread a descriptor table of its own with only these descriptors in it.
fn own_table(keep: &[RawFd]) -> Table {
    let end = keep.iter().max().map_or(0, |last| last + 1);
    // Copies the table only up to where it closes.
    if close_range(end as u32, u32::MAX, libc::CLOSE_RANGE_UNSHARE).is_err() {
        // SAFETY: nothing in this thread uses a descriptor that another thread opens.
        if unshare(CloneFlags::CLONE_FILES).is_err() {
            return Table::Shared;
        }
        let listed = std::fs::read_dir("/proc/thread-self/fd").into_iter().flatten().flatten();
        let numbers = listed.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        numbers.filter(|fd: &RawFd| *fd >= end).for_each(close);
    }
    (0..end).filter(|fd| !keep.contains(fd)).for_each(close);
    Table::Own
}

/// Closes a descriptor of the calling thread's own table, if there is one of this number.
fn close(fd: RawFd) {
    // SAFETY: an integer; the table is this thread's alone.
    unsafe { libc::close(fd) };
}

fn close_range(first: u32, last: u32, flags: u32) -> nix::Result<()> {
    // SAFETY: three integers; the caller owns what is closed.
    nix::errno::Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) }).map(drop)
}

/// What the thread does that keeps the descriptors: it sleeps until the arbiter says something or ends.
fn stay(presence: Presence, tell: &Sender<Table>) {
    let fds: Vec<_> = presence.descriptors().collect();
    let table = own_table(&fds);
    let _ = tell.send(table);
    // SAFETY: in this thread's own table nobody else knows the numbers. In the process's, nobody closes them after
    // `move_over` was told so.
    let own = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
    let mut connection = own(presence.connection);
    let sent: Vec<_> = presence.sent.iter().copied().map(own).collect();
    while let Ended::Arbiter = wait_for_end(&connection, &presence.private_phase) {
        if table == Table::Shared {
            take_back(connection.as_raw_fd());
        }
        drop(connection);
        match attach(&presence, &sent) {
            Some(next) => {
                connection = next;
                ON_ATTACH.get().into_iter().for_each(|hook| hook());
            }
            None => break,
        }
        if table == Table::Shared {
            lend(connection.as_raw_fd());
        }
    }
    if table == Table::Shared {
        sent.iter().map(AsRawFd::as_raw_fd).for_each(take_back);
    }
}

/// What the end of a connection means.
enum Ended {
    /// The arbiter's end.
    Arbiter,
    /// The slot is closed.
    Slot,
}

fn wait_for_end(connection: &OwnedFd, private_phase: &PrivatePhase) -> Ended {
    loop {
        let _ = poll(&mut [PollFd::new(connection.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE);
        match scm_rights::receive(connection.as_fd(), size_of::<Reply>(), MsgFlags::MSG_DONTWAIT) {
            Err(nix::errno::Errno::EAGAIN) => {}
            Ok((bytes, _)) if bytes.is_empty() => return Ended::Arbiter,
            Err(_) => return Ended::Arbiter,
            Ok((bytes, _)) => match Reply::read(&bytes) {
                Ok((_, Status::Closed)) => return Ended::Slot,
                Ok((_, Status::Asked)) => {
                    let told = Told::new(private_phase.load(Ordering::Relaxed));
                    let _ = scm_rights::send(connection.as_fd(), bytemuck::bytes_of(&told), &[]);
                }
                _ => {}
            },
        }
    }
}

/// Between two tries to reach the next arbiter: doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// When one is there and refuses: it is another release's, or serves other GPUs.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);

/// The connection to the next arbiter, when there is one. `None`: it knows the slot as closed.
fn attach(presence: &Presence, sent: &[OwnedFd]) -> Option<OwnedFd> {
    let fds: Vec<_> = sent.iter().rev().map(AsFd::as_fd).collect();
    let mut pause = FIRST_PAUSE;
    loop {
        let path = &presence.path;
        let asked = connection::dial(path, Duration::ZERO).and_then(|connection| {
            connection::ask(connection, path, bytemuck::bytes_of(&presence.attach), &fds, Status::Attached)
        });
        let wait = match asked {
            Ok(Response::Answered(answer)) => return Some(answer.connection),
            Err(RegisterError::Refused { status: Status::Closed, .. }) => return None,
            Err(RegisterError::Refused { .. }) => REFUSED_PAUSE,
            Ok(Response::Hangup(_)) | Err(_) => {
                pause = (2 * pause).min(LONGEST_PAUSE);
                pause
            }
        };
        std::thread::sleep(wait);
    }
}

// --- In between -----------------------------------------------------------------------------------

/// The descriptors that are in the process's table still, each plus one: a child of fork closes them.
static LENT: [AtomicI32; 32] = [const { AtomicI32::new(0) }; 32];

fn lend(fd: RawFd) {
    static ATFORK: Once = Once::new();
    // SAFETY: the handler takes numbers from atomics and closes them, which is allowed after a fork.
    ATFORK.call_once(|| unsafe {
        libc::pthread_atfork(None, None, Some(close_lent));
    });
    let free =
        |word: &&AtomicI32| word.compare_exchange(0, fd + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok();
    // No place: a child of fork keeps it open, and its parent's end is known by its pidfd alone.
    let _ = LENT.iter().find(free);
}

fn take_back(fd: RawFd) {
    for word in &LENT {
        let _ = word.compare_exchange(fd + 1, 0, Ordering::AcqRel, Ordering::Relaxed);
    }
}

extern "C" fn close_lent() {
    for word in &LENT {
        match word.swap(0, Ordering::AcqRel) {
            0 => {}
            lent => close(lent - 1),
        }
    }
}
