//! Log lines on standard error, in a process whose standard error belongs to the application.
//!
//! The application may have closed standard error, or connected it to a program that reads slowly or not at all. It may have
//! closed descriptor 2 and opened a file of its own, which then has that number. A log line must do no harm in any of these
//! cases:
//!
//! - It is written only if descriptor 2 is the file that it was when the process began ([`remember`]), or a terminal, or the
//!   same file as standard output.
//! - It raises no SIGPIPE.
//! - It waits for a slow reader at most 100 ms. After that, lines are dropped without waiting until one can be written
//!   again; that one says how many are missing.

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::stat::{FileStat, SFlag, fstat};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// How long a reader may take until lines are dropped, in ms.
const TIMEOUT_MS: u16 = 100;

/// In bytes: what a pipe takes as a whole or not at all (pipe(7)), so that lines of several processes do not mix.
const PIECE: usize = libc::PIPE_BUF;

/// Identifies an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    special: u64,
}

impl Identity {
    fn of(data: &FileStat) -> Self {
        Self { device: data.st_dev, inode: data.st_ino, special: data.st_rdev }
    }
}

static AT_FIRST: OnceLock<Option<Identity>> = OnceLock::new();

/// Remembers which file descriptor 2 is. To be called early, before the application can change it; later calls do nothing.
pub fn remember() {
    AT_FIRST.get_or_init(|| fstat(standard_error()).ok().map(|data| Identity::of(&data)));
}

fn standard_error() -> BorrowedFd<'static> {
    // SAFETY: whether it is open, and what it is, is looked at before each use.
    unsafe { BorrowedFd::borrow_raw(libc::STDERR_FILENO) }
}

/// Writes a line to standard error as a whole, or drops it. Never fails.
#[derive(Debug, Clone, Copy, Default)]
pub struct StandardError;

impl io::Write for StandardError {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        static OUTPUT: Output = Output::new();
        remember();
        if let Ok(data) = fstat(standard_error())
            && is_for_people(&data)
        {
            OUTPUT.line(standard_error(), kind(&data), line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn kind(data: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(data.st_mode) & SFlag::S_IFMT
}

/// Whether descriptor 2, with this status, is standard error, and not a file of the application that has got its number.
fn is_for_people(data: &FileStat) -> bool {
    let identity = Identity::of(data);
    if AT_FIRST.get().copied().flatten() == Some(identity) {
        return true;
    }
    // SAFETY: as for standard error.
    let output = unsafe { BorrowedFd::borrow_raw(libc::STDOUT_FILENO) };
    let same_as_output = || fstat(output).is_ok_and(|output| Identity::of(&output) == identity);
    nix::unistd::isatty(standard_error()).unwrap_or(false) || same_as_output()
}

/// A descriptor that lines go to.
struct Output {
    /// The last line was dropped, so the next one does not wait.
    stalled: AtomicBool,
    dropped: AtomicU64,
}

impl Output {
    const fn new() -> Self {
        Self { stalled: AtomicBool::new(false), dropped: AtomicU64::new(0) }
    }

    fn line(&self, fd: BorrowedFd<'_>, kind: SFlag, line: &[u8]) {
        let missing = self.dropped.swap(0, Ordering::Relaxed);
        let note = match missing {
            0 => String::new(),
            missing => format!(
                "nvshare[{}] lines of the log before this one are missing, because standard error was full: {missing}\n",
                std::process::id()
            ),
        };
        if self.all(fd, kind, note.as_bytes()) && self.all(fd, kind, line) {
            self.stalled.store(false, Ordering::Relaxed);
        } else {
            self.stalled.store(true, Ordering::Relaxed);
            self.dropped.fetch_add(missing + 1, Ordering::Relaxed);
        }
    }

    fn all(&self, fd: BorrowedFd<'_>, kind: SFlag, bytes: &[u8]) -> bool {
        bytes.chunks(PIECE).all(|piece| self.piece(fd, kind, piece))
    }

    /// Writes a piece of a line. False if the reader was too slow and the piece was dropped.
    fn piece(&self, fd: BorrowedFd<'_>, kind: SFlag, mut piece: &[u8]) -> bool {
        let quiet = QuietPipe::new();
        while !piece.is_empty() {
            if !self.has_room(fd) {
                return false;
            }
            match write(fd, kind, piece) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(written) => piece = &piece[written..],
                // Another writer has filled it meanwhile.
                Err(Errno::EAGAIN) => return false,
                Err(Errno::EPIPE) => {
                    quiet.swallow();
                    return true;
                }
                // It is closed or broken: later lines will not be read either.
                Err(_) => return true,
            }
        }
        true
    }

    fn has_room(&self, fd: BorrowedFd<'_>) -> bool {
        let timeout = if self.stalled.load(Ordering::Relaxed) { 0 } else { TIMEOUT_MS };
        loop {
            match poll(&mut [PollFd::new(fd, PollFlags::POLLOUT)], PollTimeout::from(timeout)) {
                Ok(ready) => return ready > 0,
                Err(Errno::EINTR) => {}
                Err(_) => return true,
            }
        }
    }
}

/// Writes, without waiting where the kernel can do that: another thread may fill the room that was seen.
fn write(fd: BorrowedFd<'_>, kind: SFlag, piece: &[u8]) -> nix::Result<usize> {
    if kind == SFlag::S_IFSOCK {
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: the pointer and the length are of one slice.
        let sent = unsafe { libc::send(fd.as_raw_fd(), piece.as_ptr().cast(), piece.len(), flags) };
        return Errno::result(sent).map(|sent| sent as usize);
    }
    if kind == SFlag::S_IFIFO {
        match write_now(fd.as_raw_fd(), piece) {
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => {}
            written => return written,
        }
    }
    nix::unistd::write(fd, piece)
}

fn write_now(fd: RawFd, piece: &[u8]) -> nix::Result<usize> {
    let part = libc::iovec { iov_base: piece.as_ptr().cast_mut().cast(), iov_len: piece.len() };
    // SAFETY: one part, of a slice that is only read. An offset of -1 means the file's own.
    let written = unsafe { libc::pwritev2(fd, &raw const part, 1, -1, libc::RWF_NOWAIT) };
    Errno::result(written).map(|written| written as usize)
}

/// While it exists, SIGPIPE is blocked in this thread, so that one that a write raises can be taken back.
struct QuietPipe {
    before: Option<SigSet>,
    was_pending: bool,
}

impl QuietPipe {
    fn new() -> Self {
        let pipe: SigSet = [Signal::SIGPIPE].into_iter().collect();
        let before = pipe.thread_swap_mask(SigmaskHow::SIG_BLOCK).ok();
        Self { before, was_pending: is_pending() }
    }

    /// Takes back the SIGPIPE that a write has just raised.
    fn swallow(&self) {
        if self.was_pending || !is_pending() {
            return;
        }
        let pipe: SigSet = [Signal::SIGPIPE].into_iter().collect();
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: a set and a time that live for the call; no information about the signal is asked for.
        unsafe { libc::sigtimedwait(pipe.as_ref(), std::ptr::null_mut(), &raw const now) };
    }
}

impl Drop for QuietPipe {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            let _ = before.thread_set_mask();
        }
    }
}

fn is_pending() -> bool {
    let mut pending = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the kernel fills the set; it is read only when it has.
    unsafe {
        libc::sigpending(pending.as_mut_ptr()) == 0 && libc::sigismember(pending.as_ptr(), libc::SIGPIPE) == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::OFlag;
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::{AsFd, OwnedFd};

    fn pipe() -> (File, OwnedFd) {
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        (File::from(read), write)
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no pipes like these")]
    fn a_full_pipe_takes_what_it_can_and_tells_what_is_missing() {
        let (mut read, write) = pipe();
        let output = Output::new();
        let line = [b'x'; 1000];
        while !output.stalled.load(Ordering::Relaxed) {
            output.line(write.as_fd(), SFlag::S_IFIFO, &line);
        }
        output.line(write.as_fd(), SFlag::S_IFIFO, &line);
        assert_eq!(output.dropped.load(Ordering::Relaxed), 2);
        let mut bytes = vec![0; 1 << 20];
        let held = read.read(&mut bytes).unwrap();
        assert!(held >= PIECE && bytes[..held].iter().all(|byte| *byte == b'x'));
        output.line(write.as_fd(), SFlag::S_IFIFO, b"again\n");
        let held = read.read(&mut bytes).unwrap();
        let text = String::from_utf8_lossy(&bytes[..held]).into_owned();
        assert!(text.contains("was full: 2\n") && text.ends_with("again\n"), "{text}");
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no pipes like these")]
    fn a_pipe_without_a_reader_raises_nothing() {
        // The default action of SIGPIPE would end the test program.
        // SAFETY: no handler of anybody's is replaced in this test program.
        unsafe { nix::sys::signal::signal(Signal::SIGPIPE, nix::sys::signal::SigHandler::SigDfl) }.unwrap();
        let (read, write) = pipe();
        drop(read);
        let output = Output::new();
        (0..3).for_each(|_| output.line(write.as_fd(), SFlag::S_IFIFO, b"to nobody\n"));
        assert!(!is_pending());
    }
}
