//! Accepting connections on a Unix socket, as descriptors that close themselves: nix returns bare numbers.

use nix::sys::socket::{SockFlag, accept4};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Accepts a connection, which does not block and is closed on exec.
///
/// # Errors
/// accept4's; EAGAIN if none waits and `listener` does not block.
pub fn accept(listener: &OwnedFd) -> nix::Result<OwnedFd> {
    let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    // SAFETY: accept4 has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
