//! epoll, with a typed token for each descriptor that it watches.

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nvshare::units::{MILLISECOND, Nanos};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

/// The number of a registered client, unique for as long as the arbiter runs. It fits into 32 bits.
pub(super) type ClientId = u64;

/// What a descriptor that epoll reports is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    /// The socket on which clients connect.
    Listener,
    /// The signalfd.
    Signals,
    /// The pidfd of the process that started a private arbiter.
    Owner,
    /// The socket of a GPU's lock: another arbiter asks who holds it.
    GpuLock,
    /// A connection to a process.
    Connection(RawFd),
    /// The pidfd of a client's process.
    Client(ClientId),
}

impl From<Token> for u64 {
    fn from(token: Token) -> Self {
        match token {
            Token::Listener => 0,
            Token::Signals => 1,
            Token::Owner => 2,
            Token::GpuLock => 3,
            Token::Connection(fd) => 1 << 32 | fd as u64,
            Token::Client(id) => 2 << 32 | id,
        }
    }
}

impl From<u64> for Token {
    fn from(word: u64) -> Self {
        match (word >> 32, word & 0xffff_ffff) {
            (0, 0) => Self::Listener,
            (0, 1) => Self::Signals,
            (0, 3) => Self::GpuLock,
            (1, fd) => Self::Connection(fd as RawFd),
            (2, id) => Self::Client(id),
            _ => Self::Owner,
        }
    }
}

/// The descriptors that the arbiter waits for. A descriptor leaves the set when it is closed.
pub(super) struct Poller(Epoll);

impl Poller {
    /// Errors: epoll_create1's.
    pub fn new() -> nix::Result<Self> {
        Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map(Self)
    }

    /// Watches a descriptor for input. Errors: epoll_ctl's.
    pub fn add(&self, fd: impl AsFd, token: Token) -> nix::Result<()> {
        self.0.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token.into()))
    }

    /// Watches a connection, which may be watched already. Errors: epoll_ctl's.
    pub fn add_connection(&self, socket: &OwnedFd) -> nix::Result<()> {
        match self.add(socket, Token::Connection(socket.as_raw_fd())) {
            Err(Errno::EEXIST) => Ok(()),
            added => added,
        }
    }

    /// Waits for input, at most `timeout` ns (rounded up to ms) and at most a second. Returns up to 64 tokens; none after
    /// the timeout or an interrupting signal. Errors: epoll_wait's.
    pub fn wait(&self, timeout: Nanos) -> nix::Result<Vec<Token>> {
        let mut events = [EpollEvent::empty(); 64];
        let milliseconds = timeout.div_ceil(MILLISECOND).min(1_000) as u16;
        match self.0.wait(&mut events, EpollTimeout::from(milliseconds)) {
            Err(Errno::EINTR) => Ok(Vec::new()),
            result => Ok(events[..result?].iter().map(|event| Token::from(event.data())).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_its_way_through_epoll() {
        use Token::{Client, Connection, GpuLock, Listener, Owner, Signals};
        for token in
            [Listener, Signals, Owner, GpuLock, Connection(0), Connection(RawFd::MAX), Client(0xffff_ffff)]
        {
            assert_eq!(Token::from(u64::from(token)), token);
        }
    }
}
