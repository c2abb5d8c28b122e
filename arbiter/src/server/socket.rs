//! The socket on which clients connect: bound, accepted from, answered on.

use super::error::{StartError, failed};
use super::pending_connections::{Connection, Peer};
use crate::accept;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, getsockopt, listen, socket, sockopt,
};
use nvshare::scm_rights::send;
use nvshare::sync::now;
use nvshare::wire::Reply;
use std::cell::OnceCell;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// The listening socket, bound when it is first needed.
pub(super) struct LazyListener {
    path: PathBuf,
    socket: OnceCell<OwnedFd>,
}

impl LazyListener {
    pub fn new(path: PathBuf) -> Self {
        Self { path, socket: OnceCell::new() }
    }

    /// The socket; binds it the first time. Errors: it cannot be bound.
    pub fn open(&self) -> Result<&OwnedFd, StartError> {
        if let Some(socket) = self.socket.get() {
            return Ok(socket);
        }
        let socket = bind_socket(&self.path)?;
        Ok(self.socket.get_or_init(|| socket))
    }

    /// The same, by value.
    pub fn into_open(self) -> Result<OwnedFd, StartError> {
        self.open()?;
        Ok(self.socket.into_inner().expect("it was just opened"))
    }
}

/// Binds the socket. The permissions of its directory decide who may connect.
fn bind_socket(path: &Path) -> Result<OwnedFd, StartError> {
    let what = || format!("the socket {} cannot be made", path.display());
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).map_err(failed(what()))?;
    // This arbiter holds the directory's lock, so a socket that is there belongs to an arbiter that has ended.
    let _ = std::fs::remove_file(path);
    bind(fd.as_raw_fd(), &UnixAddr::new(path).map_err(failed(what()))?).map_err(failed(what()))?;
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    let _ = std::fs::set_permissions(path, everybody);
    listen(&fd, Backlog::MAXCONN).map_err(failed(what()))?;
    Ok(fd)
}

/// Accepts one connection, with its peer's pid and user. The outer `None`: no connection waits. The inner one: its peer
/// cannot be found out, and the connection is closed.
pub(super) fn accept(listener: &OwnedFd) -> Option<Option<Connection>> {
    let socket = accept::accept(listener).ok()?;
    let peer = peer(&socket).ok();
    Some(peer.map(|peer| Connection { socket, peer, since: now() }))
}

/// The peer's pid and user, as the kernel recorded them when it connected.
fn peer(socket: &OwnedFd) -> nix::Result<Peer> {
    let peer = getsockopt(socket, sockopt::PeerCredentials)?;
    Ok(Peer { user: peer.uid(), pid: peer.pid() as u32 })
}

/// Sends a reply and descriptors, without waiting. A client that is gone, or whose receive buffer is full, gets nothing.
pub(super) fn send_reply(socket: &OwnedFd, reply: &Reply, sent: &[OwnedFd]) {
    let sent: Vec<_> = sent.iter().map(AsFd::as_fd).collect();
    let _ = send(socket.as_fd(), bytemuck::bytes_of(reply), &sent);
}
