//! One arbiter for a GPU: the one that serves it holds a lock that every other arbiter of the machine finds. (The documents
//! and the log say that the GPU is claimed.)
//!
//! A runtime directory has one arbiter, and two users have two directories: each of their arbiters would deal out all of
//! the GPU's memory. So an arbiter binds a Unix socket whose abstract name is made of the GPU's UUID. The kernel gives a
//! name to one process, takes it back when that process ends, and tells who it is; there is no file that could be left behind
//! or planted. A process that connects is told the runtime directory.
//!
//! Abstract names belong to a network namespace: arbiters in containers with their own do not see each other's locks
//! (docs/decisions/0020-one-arbiter-a-gpu.md).

use crate::accept::accept;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nvshare::scm_rights;
use nvshare::units::GpuUuid;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

/// What a serving arbiter holds, until it is dropped.
#[derive(Debug)]
pub struct GpuLock {
    listener: OwnedFd,
}

/// The arbiter that holds a lock that this one wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The GPU.
    pub gpu: GpuUuid,
    /// Its pid and user, as the kernel recorded them; pid 0 is a process that cannot be seen from here. `None`: it did not
    /// answer.
    pub process: Option<(i32, u32)>,
    /// Its runtime directory, as it says itself; empty if it did not.
    pub dir: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} is served already by ", self.gpu)?;
        match self.process {
            Some((pid, user)) => write!(out, "process {pid} of user {user}")?,
            None => write!(out, "a process that does not answer")?,
        }
        if !self.dir.is_empty() {
            write!(out, " in {}", self.dir)?;
        }
        Ok(())
    }
}

/// Why a GPU could not be locked.
#[derive(Debug)]
pub enum GpuLockError {
    /// Another process holds it.
    Held(Holder),
    /// The kernel's error.
    System(Errno),
}

fn address(gpu: GpuUuid) -> nix::Result<UnixAddr> {
    UnixAddr::new_abstract(format!("nvshare-arbiter/{gpu}").as_bytes())
}

fn endpoint(flags: SockFlag) -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::SeqPacket, flags | SockFlag::SOCK_CLOEXEC, None)
}

impl GpuLock {
    /// Locks a GPU for this process.
    ///
    /// # Errors
    /// Another process holds the lock (the answer takes up to 2 s), or the kernel has no socket.
    pub fn acquire(gpu: GpuUuid) -> Result<Self, GpuLockError> {
        match Self::bind(gpu) {
            Err(Errno::EADDRINUSE) => Err(GpuLockError::Held(holder(gpu))),
            lock => lock.map_err(GpuLockError::System),
        }
    }

    fn bind(gpu: GpuUuid) -> nix::Result<Self> {
        let listener = endpoint(SockFlag::SOCK_NONBLOCK)?;
        bind(listener.as_raw_fd(), &address(gpu)?)?;
        listen(&listener, Backlog::new(16)?)?;
        Ok(Self { listener })
    }

    /// Tells all processes that have connected that this arbiter serves in `dir`. Does not wait.
    pub fn answer(&self, dir: &Path) {
        while let Ok(fd) = accept(&self.listener) {
            let _ = scm_rights::send(fd.as_fd(), dir.as_os_str().as_encoded_bytes(), &[]);
        }
    }
}

impl AsFd for GpuLock {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// The process that holds a GPU's lock, as far as can be found out within 2 s.
fn holder(gpu: GpuUuid) -> Holder {
    let mut holder = Holder { gpu, process: None, dir: String::new() };
    let ask = || -> nix::Result<OwnedFd> {
        let fd = endpoint(SockFlag::empty())?;
        // A process that is stopped, or hostile, neither accepts connections nor answers.
        setsockopt(&fd, sockopt::SendTimeout, &TimeVal::seconds(1))?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::seconds(1))?;
        connect(fd.as_raw_fd(), &address(gpu)?)?;
        Ok(fd)
    };
    let Ok(fd) = ask() else { return holder };
    holder.process =
        getsockopt(&fd, sockopt::PeerCredentials).ok().map(|holder| (holder.pid(), holder.uid()));
    if let Ok((bytes, _)) = scm_rights::receive(fd.as_fd(), 4096, MsgFlags::empty()) {
        holder.dir = nvshare::text::printable(&bytes);
    }
    holder
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvshare_test_support::Patience;

    #[test]
    fn one_process_at_a_time_has_a_lock_and_another_is_told_which() {
        let gpu = GpuUuid(*b"claim of a test ");
        let first = GpuLock::acquire(gpu).unwrap();
        let teller = std::thread::spawn(move || {
            let mut ready = [nix::poll::PollFd::new(first.as_fd(), nix::poll::PollFlags::POLLIN)];
            nix::poll::poll(&mut ready, nix::poll::PollTimeout::NONE).unwrap();
            first.answer(Path::new("/run/some\u{1b}where"));
        });
        let Err(GpuLockError::Held(holder)) = GpuLock::acquire(gpu) else { panic!("locked twice") };
        let (pid, user) = (std::process::id(), nix::unistd::geteuid());
        let said = format!("{gpu} is served already by process {pid} of user {user} in /run/some?where");
        assert_eq!(holder.to_string(), said);
        teller.join().unwrap();
        // A child that another test starts at this moment has the socket until its exec.
        Patience::seconds(60).until("it is released by whoever had it", || GpuLock::acquire(gpu).is_ok());
    }
}
