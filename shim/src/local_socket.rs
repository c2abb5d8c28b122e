//! Unix sockets between processes of one user on this machine: SOCK_SEQPACKET in the abstract namespace, so that nothing is left
//! in a file system when a process is killed, and every message has a beginning and an end.
//!
//! Memory travels over them as descriptors ([`nvshare::scm_rights`]), so a forked child must not keep its copies: it would keep the
//! memory, and peers would not notice when the parent ends. Every [`Socket`] is on a list that the child closes ([`after_fork`]).

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, connect, getsockopt, listen, socket,
    sockopt,
};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

/// As many as a process has in the worst case: 128 peers for CUDA IPC, for replicas 48 each way and the memory under way, and half of
/// all for memory that came from replicas (128 GiB). Those beyond are not closed in a child.
pub const MOST: usize = 4096;

/// The descriptors of this process that a forked child closes. Without a lock, because in a forked child it might be held forever.
static SOCKETS: [AtomicI32; MOST] = [const { AtomicI32::new(NONE) }; MOST];

const NONE: i32 = -1;

/// The flags of all sockets here.
fn flags() -> SockFlag {
    SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK
}

/// A descriptor that a forked child closes: a socket, or memory that came over one.
#[derive(Debug)]
pub struct Socket {
    entry: Option<&'static AtomicI32>,
    fd: OwnedFd,
}

impl Socket {
    /// Puts a descriptor on the list.
    pub fn new(fd: OwnedFd) -> Self {
        let taken = |entry: &&AtomicI32| {
            entry.compare_exchange(NONE, fd.as_raw_fd(), Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        Self { entry: SOCKETS.iter().find(taken), fd }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Before it is closed, after which its number may be reused.
        if let Some(entry) = self.entry {
            entry.store(NONE, Ordering::Release);
        }
    }
}

/// In a forked child, which does not have the threads that use the sockets: closes its copies, so that peers do not connect in
/// vain, and notice when the parent ends.
pub fn after_fork() {
    for entry in &SOCKETS {
        let fd = entry.swap(NONE, Ordering::AcqRel);
        if fd >= 0 {
            // SAFETY: the copy of a descriptor whose owner is a thread that exists only in the parent.
            unsafe { libc::close(fd) };
        }
    }
}

/// A socket of this name to which others connect.
///
/// # Errors
/// The system's.
pub fn listen_at(name: &str) -> nix::Result<Socket> {
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags(), None)?;
    bind(listener.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
    listen(&listener, Backlog::new(64).unwrap_or(Backlog::MAXCONN))?;
    Ok(Socket::new(listener))
}

/// The next connection to a listener, which is not on the list yet.
///
/// # Errors
/// The system's; EAGAIN if there is none.
pub fn accept(listener: &Socket) -> nix::Result<OwnedFd> {
    let fd = accept4(listener.fd.as_raw_fd(), flags())?;
    // SAFETY: a descriptor that was just opened and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A connection to the listener of this name. It does not wait: neither does anything that is read from it or written to it.
///
/// # Errors
/// The system's: ECONNREFUSED if nobody listens, EAGAIN if too many wait there.
pub fn connect_to(name: &str) -> nix::Result<Socket> {
    let ours = socket(AddressFamily::Unix, SockType::SeqPacket, flags(), None)?;
    connect(ours.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
    Ok(Socket::new(ours))
}

/// Whether the process at the other end may see this one's memory: it is the same user's, or root's, who could
/// read it anyway.
///
/// # Errors
/// The socket's.
pub fn peer(socket: impl AsFd) -> nix::Result<(bool, i32)> {
    let peer = getsockopt(&socket, sockopt::PeerCredentials)?;
    let ours = nix::unistd::geteuid().as_raw();
    Ok((peer.uid() == ours || peer.uid() == 0, peer.pid()))
}
