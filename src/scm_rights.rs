//! Messages with file descriptors over a Unix socket (SCM_RIGHTS, unix(7)).
//!
//! A received descriptor is close-on-exec. It is owned from the moment at which it is seen, so an early return leaks none.

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Descriptors that [`receive`] has room for in one message. The kernel closes those for which there is no room; it sends
/// at most 253.
pub const MOST_DESCRIPTORS: usize = 64;

/// Sends one message, and descriptors with it.
///
/// # Errors
/// The socket's.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> nix::Result<()> {
    send_with(socket, bytes, fds, MsgFlags::empty())
}

/// As [`send`], with flags; MSG_NOSIGNAL is always set.
///
/// # Errors
/// The socket's.
pub fn send_with(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: MsgFlags,
) -> nix::Result<()> {
    let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let control: Vec<_> = (!fds.is_empty()).then_some(ControlMessage::ScmRights(&fds)).into_iter().collect();
    let flags = flags | MsgFlags::MSG_NOSIGNAL;
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], &control, flags, None) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
            Ok(_) => return Ok(()),
        }
    }
}

/// Receives one message of at most `room` bytes, and the descriptors that come with it. No bytes: the other end is closed.
///
/// # Errors
/// The socket's.
pub fn receive(socket: BorrowedFd<'_>, room: usize, flags: MsgFlags) -> nix::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; room];
    let mut control = cmsg_space!([RawFd; MOST_DESCRIPTORS]);
    let mut fds = Vec::new();
    let length = loop {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
            Ok(message) => {
                for part in message.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(received) = part {
                        // SAFETY: the kernel has just installed these descriptors for this message;
                        // nobody else knows them, so they are ours to close.
                        fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                    }
                }
                break message.bytes;
            }
        }
    };
    bytes.truncate(length);
    Ok((bytes, fds))
}
