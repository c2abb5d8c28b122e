//! Connections from their acceptance on: the first message is answered as soon as it comes, and after that the connection
//! is either closed or belongs to a client ([`super::closing`] reads those). Nothing here waits for a process.

use super::closing;
use super::pending_connections::{Connection, PendingConnections};
use super::poller::ClientId;
use super::requests::{self, Answer};
use super::socket::{accept, send_reply};
use super::state::State;
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use nvshare::scm_rights::receive;
use nvshare::units::{Nanos, SECOND};
use nvshare::wire::{MESSAGE_BYTES, Reply, Status};
use std::os::fd::{AsFd, OwnedFd, RawFd};

/// How long a connection may stay without a message.
const MESSAGE_TIMEOUT: Nanos = 5 * SECOND;

/// Connections that are accepted before the arbiter looks at anything else again.
const MAX_ACCEPTED_AT_ONCE: usize = 64;

/// The listening socket, and the connections whose first message has not come.
pub(super) struct Connections {
    listener: OwnedFd,
    pending: PendingConnections,
}

impl Connections {
    /// `listener` must not block.
    pub fn new(listener: OwnedFd) -> Self {
        Self { listener, pending: PendingConnections::default() }
    }

    pub fn none_pending(&self) -> bool {
        self.pending.is_empty()
    }

    /// Closes the connections whose message has not come in time at `time` (ns).
    pub fn close_timed_out(&mut self, time: Nanos) {
        self.pending.close_older(time.saturating_sub(MESSAGE_TIMEOUT));
    }

    /// Accepts waiting connections.
    pub fn accept(&mut self, state: &mut State) {
        for _ in 0..MAX_ACCEPTED_AT_ONCE {
            match accept(&self.listener) {
                Some(Some(connection)) => self.first_message(state, connection),
                Some(None) => {}
                None => return,
            }
        }
    }

    /// A connection is readable: a message has come, or it has ended.
    pub fn readable(&mut self, state: &mut State, fd: RawFd) {
        match self.pending.remove(fd) {
            Some(connection) => self.first_message(state, connection),
            None => closing::connection_readable(state, fd),
        }
    }

    /// Answers the first message, or waits for it.
    fn first_message(&mut self, state: &mut State, connection: Connection) {
        let Some(pending) = serve(state, connection) else { return };
        // A connection that cannot be watched is closed: its process tries again.
        if state.poller.add_connection(&pending.socket).is_err() {
            return;
        }
        if let Some(displaced) = self.pending.add(pending) {
            // It is closed, unless its message has come by now.
            let _ = serve(state, displaced);
        }
    }
}

/// Answers a connection's first message. Returns the connection if no message has come yet.
fn serve(state: &mut State, connection: Connection) -> Option<Connection> {
    let Connection { socket, peer, .. } = &connection;
    let (bytes, sent) = match receive(socket.as_fd(), 2 * MESSAGE_BYTES, MsgFlags::MSG_DONTWAIT) {
        Err(Errno::EAGAIN) => return Some(connection),
        // A connection that ends without a message: its process wanted to know whether an arbiter is here.
        Err(_) => return None,
        Ok((bytes, _)) if bytes.is_empty() => return None,
        Ok(message) => message,
    };
    match requests::serve(state, *peer, &bytes, &sent) {
        Ok(Answer { reply, sent, client }) => {
            send_reply(socket, &reply, &sent);
            if let Some(client) = client {
                state.clients.add_connection(&state.poller, connection.socket, client);
                ask_attached(state, &reply, client);
            }
        }
        Err((kind, refusal)) => {
            state.log_limits.log_refusal(kind, *peer, &refusal);
            send_reply(socket, &refusal, &[]);
        }
    }
    None
}

/// Asks a client that has just attached for its phase. It may have left, and the arbiter before may have been killed while
/// it closed the slot: then the page no longer shows that the client leaves, and nothing else would ask it.
fn ask_attached(state: &State, reply: &Reply, client: ClientId) {
    if reply.status == Status::Attached as u32 {
        state.clients.send_question(client);
    }
}
