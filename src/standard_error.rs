//! A log line on standard error, in a process whose standard error is somebody else's business.
//!
//! The application may have closed it, or handed it to a program that reads no more, or reads slowly; it may have closed
//! descriptor 2 and opened a file of its own, which then has that number. None of that may matter to the application, so a
//! line is written only where descriptor 2 is what it was when the process began ([`remember`]), or a terminal, or where the
//! standard output goes too; it raises no SIGPIPE, and waits for a reader no longer than `PATIENCE`, once: then lines are dropped until one can be written again, which says
//! how many are missing.

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
const PATIENCE: u16 = 100;

/// What a pipe takes at once or not at all, so that lines of several processes do not mix.
const PIECE: usize = libc::PIPE_BUF;

/// A file, among all files.
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

/// Remembers which file descriptor 2 is. The earlier, the surer.
pub fn remember() {
    AT_FIRST.get_or_init(|| fstat(standard_error()).ok().map(|data| Identity::of(&data)));
}

fn standard_error() -> BorrowedFd<'static> {
    // SAFETY: whether it is open, and what it is, is looked at before each use.
    unsafe { BorrowedFd::borrow_raw(libc::STDERR_FILENO) }
}

/// Writes whole lines to standard error, or not. Never fails.
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

/// Whether this, which is descriptor 2, is standard error, and no file of the application's that got the number.
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
    /// The last line was dropped: the next one does not wait.
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

    /// Writes a piece of a line. False if it had to be dropped for want of room.
    fn piece(&self, fd: BorrowedFd<'_>, kind: SFlag, mut piece: &[u8]) -> bool {
        let quiet = QuietPipe::new();
        while !piece.is_empty() {
            if !self.has_room(fd) {
                return false;
            }
            match write(fd, kind, piece) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(written) => piece = &piece[written..],
                // Somebody else has filled it meanwhile.
                Err(Errno::EAGAIN) => return false,
                Err(Errno::EPIPE) => {
                    quiet.swallow();
                    return true;
                }
                // Nobody will ever read it.
                Err(_) => return true,
            }
        }
        true
    }

    fn has_room(&self, fd: BorrowedFd<'_>) -> bool {
        let patience = if self.stalled.load(Ordering::Relaxed) { 0 } else { PATIENCE };
        loop {
            match poll(&mut [PollFd::new(fd, PollFlags::POLLOUT)], PollTimeout::from(patience)) {
                Ok(ready) => return ready > 0,
                Err(Errno::EINTR) => {}
                Err(_) => return true,
            }
        }
    }
}

/// Writes without waiting where the kernel can: there is room, but another thread may be faster.
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

/// While it lives, a SIGPIPE of this thread's own waits, and can be taken back.
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
