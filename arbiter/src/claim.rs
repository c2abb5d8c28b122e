//! One arbiter for a GPU: whoever serves it holds a claim that every other arbiter of the machine finds.
//!
//! A runtime directory has one arbiter, and two users have two directories: each of their arbiters would deal out all of
//! the GPU's memory. So an arbiter binds a Unix socket whose abstract name is made of the GPU's UUID. The kernel gives a
//! name to one process, takes it back when that ends, however it does, and tells who it is; there is no file that somebody
//! could leave behind or plant. Whoever connects is told the runtime directory.
//!
//! Names are a network namespace's: arbiters in containers with their own cannot see each other's claims
//! (docs/decisions/0020-one-arbiter-a-gpu.md).

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, connect, getsockopt,
    listen, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nvshare::scm_rights;
use nvshare::units::GpuUuid;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// What a serving arbiter holds.
#[derive(Debug)]
pub struct Claim {
    listener: OwnedFd,
}

/// Who holds a claim that somebody else wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The GPU.
    pub gpu: GpuUuid,
    /// Its pid and user, as the kernel tells; 0 is a process that cannot be seen from here.
    pub process: Option<(i32, u32)>,
    /// Its runtime directory, as it says itself.
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

/// Why there is no claim.
#[derive(Debug)]
pub enum ClaimError {
    /// Somebody else has it.
    Held(Holder),
    /// The kernel's.
    System(Errno),
}

fn address(gpu: GpuUuid) -> nix::Result<UnixAddr> {
    UnixAddr::new_abstract(format!("nvshare-arbiter/{gpu}").as_bytes())
}

fn endpoint(flags: SockFlag) -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::SeqPacket, flags | SockFlag::SOCK_CLOEXEC, None)
}

impl Claim {
    /// Claims a GPU for this process.
    ///
    /// # Errors
    /// Somebody else has claimed it, or the kernel has no socket.
    pub fn new(gpu: GpuUuid) -> Result<Self, ClaimError> {
        match Self::bind(gpu) {
            Err(Errno::EADDRINUSE) => Err(ClaimError::Held(holder(gpu))),
            claim => claim.map_err(ClaimError::System),
        }
    }

    fn bind(gpu: GpuUuid) -> nix::Result<Self> {
        let listener = endpoint(SockFlag::SOCK_NONBLOCK)?;
        bind(listener.as_raw_fd(), &address(gpu)?)?;
        listen(&listener, Backlog::new(16)?)?;
        Ok(Self { listener })
    }

    /// Tells whoever asks where this arbiter serves.
    pub fn tell(&self, dir: &Path) {
        while let Ok(fd) =
            accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)
        {
            // SAFETY: accept4 has just made this descriptor, and nobody else knows it.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            let _ = scm_rights::send(fd.as_fd(), dir.as_os_str().as_encoded_bytes(), &[]);
        }
    }
}

impl AsFd for Claim {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// Who has claimed a GPU, as far as can be found out in a second.
fn holder(gpu: GpuUuid) -> Holder {
    let mut holder = Holder { gpu, process: None, dir: String::new() };
    let ask = || -> nix::Result<OwnedFd> {
        let fd = endpoint(SockFlag::empty())?;
        // One that is stopped, or means no good, neither takes connections nor answers.
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

    #[test]
    fn one_at_a_time_and_the_other_is_told_who() {
        let gpu = GpuUuid(*b"claim of a test ");
        let first = Claim::new(gpu).unwrap();
        let teller = std::thread::spawn(move || {
            let mut ready = [nix::poll::PollFd::new(first.as_fd(), nix::poll::PollFlags::POLLIN)];
            nix::poll::poll(&mut ready, nix::poll::PollTimeout::NONE).unwrap();
            first.tell(Path::new("/run/some\u{1b}where"));
        });
        let Err(ClaimError::Held(holder)) = Claim::new(gpu) else { panic!("claimed twice") };
        let (pid, user) = (std::process::id(), nix::unistd::geteuid());
        let said = format!("{gpu} is served already by process {pid} of user {user} in /run/some?where");
        assert_eq!(holder.to_string(), said);
        teller.join().unwrap();
        assert!(Claim::new(gpu).is_ok(), "it ends with who has it");
    }
}
