//! Messages with file descriptors over a Unix socket (SCM_RIGHTS, unix(7)).
//!
//! A received descriptor is close-on-exec. It is owned from the moment at which the kernel has made it, so that an early
//! return leaks none, and a message that is refused leaks none either. (That is why the control message is taken apart here:
//! nix reports one that was cut short as an error, and does not say which descriptors have been made for it.)

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

/// The most descriptors that [`receive`] takes in with one message. (The kernel sends at most 253.)
pub const MOST_DESCRIPTORS: usize = 64;

/// Bytes of a control message with [`MOST_DESCRIPTORS`] descriptors.
// SAFETY: CMSG_SPACE only calculates.
const CONTROL_BYTES: usize =
    unsafe { libc::CMSG_SPACE((MOST_DESCRIPTORS * size_of::<RawFd>()) as u32) } as usize;

/// Sends one message, and descriptors with it. Waits while the other end's queue is full.
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

/// Receives one message, of which it keeps the first `room` bytes, and the descriptors that come with it. No bytes: the other
/// end is closed.
///
/// # Errors
/// The socket's. ENOBUFS: more descriptors came than [`MOST_DESCRIPTORS`], or than this process may have; the message is
/// gone, and all its descriptors are closed.
pub fn receive(socket: BorrowedFd<'_>, room: usize, flags: MsgFlags) -> nix::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0u8; room];
    // Of words, because the kernel's headers in it are aligned to 8 bytes.
    let mut control = [0u64; CONTROL_BYTES.div_ceil(8)];
    let mut slice = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let (message, length) = loop {
        let mut message = libc::msghdr {
            msg_name: ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: &mut slice,
            msg_iovlen: 1,
            msg_control: control.as_mut_ptr().cast(),
            msg_controllen: CONTROL_BYTES,
            msg_flags: 0,
        };
        // SAFETY: the header names a buffer of `room` bytes and one of CONTROL_BYTES, which both outlive the call and which
        // nobody else accesses.
        let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, flags.bits()) };
        match Errno::result(length) {
            Err(Errno::EINTR) => {}
            length => break (message, length? as usize),
        }
    };
    // SAFETY: recvmsg has just filled the header and the buffers, which are alive.
    let fds = unsafe { descriptors(&message) };
    if message.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(Errno::ENOBUFS);
    }
    bytes.truncate(length);
    Ok((bytes, fds))
}

/// The descriptors of a message, which are the caller's from now on.
///
/// # Safety
/// recvmsg has filled the header, the control buffer that it names is still alive, and this is called once.
unsafe fn descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the kernel has written whole headers into the first `msg_controllen` bytes, each followed by as many bytes as
    // it says. The descriptors were made for this message, and nobody else knows them.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(message);
        while let Some(header) = at.as_ref() {
            if (header.cmsg_level, header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let count = (header.cmsg_len - libc::CMSG_LEN(0) as usize) / size_of::<RawFd>();
                let data = libc::CMSG_DATA(at).cast::<RawFd>();
                fds.extend((0..count).map(|i| OwnedFd::from_raw_fd(data.add(i).read_unaligned())));
            }
            at = libc::CMSG_NXTHDR(message, at);
        }
    }
    fds
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    /// Sends `count` copies of a pipe's writing end. The pipe's reader learns when all of them are closed.
    fn send_writers(socket: &OwnedFd, count: usize) -> std::io::PipeReader {
        let (reader, writer) = std::io::pipe().unwrap();
        send(socket.as_fd(), b"word", &vec![writer.as_fd(); count]).unwrap();
        reader
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs a socket")]
    fn descriptors_arrive_and_are_close_on_exec() {
        let (ours, theirs) = pair();
        for count in [0, 1, MOST_DESCRIPTORS] {
            let mut reader = send_writers(&ours, count);
            let (bytes, fds) = receive(theirs.as_fd(), 100, MsgFlags::empty()).unwrap();
            assert_eq!((bytes.as_slice(), fds.len()), (&b"word"[..], count));
            for fd in fds {
                // SAFETY: F_GETFD takes no argument.
                let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) };
                assert_eq!(flags, libc::FD_CLOEXEC);
                std::io::PipeWriter::from(fd).write_all(b".").unwrap();
            }
            let mut heard = String::new();
            reader.read_to_string(&mut heard).unwrap();
            assert_eq!(heard.len(), count);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs a socket")]
    fn more_descriptors_than_are_taken_in_are_refused_and_none_is_left_open() {
        let (ours, theirs) = pair();
        let mut reader = send_writers(&ours, MOST_DESCRIPTORS + 1);
        assert_eq!(receive(theirs.as_fd(), 100, MsgFlags::empty()).unwrap_err(), Errno::ENOBUFS);
        // The end comes when the last writer is closed; one that was left open would keep it from coming.
        nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        send(ours.as_fd(), b"next", &[]).unwrap();
        assert_eq!(receive(theirs.as_fd(), 100, MsgFlags::empty()).unwrap().0, b"next");
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs a socket")]
    fn a_message_is_cut_to_the_room_and_an_end_has_no_bytes() {
        let (ours, theirs) = pair();
        send(ours.as_fd(), b"word", &[]).unwrap();
        assert_eq!(receive(theirs.as_fd(), 2, MsgFlags::empty()).unwrap().0, b"wo");
        let nothing = receive(theirs.as_fd(), 2, MsgFlags::MSG_DONTWAIT).unwrap_err();
        assert_eq!(nothing, Errno::EAGAIN, "the rest of a message is gone");
        drop(ours);
        let (bytes, fds) = receive(theirs.as_fd(), 2, MsgFlags::empty()).unwrap();
        assert!(bytes.is_empty() && fds.is_empty());
    }
}
