//! What has come from other replicas and waits for the engine.
//!
//! Memory in it is nobody's in the books: the giver has given the granules back, and the taker has not taken them yet. So it holds
//! little ([`crate::replicas::MOST_UNDER_WAY`] from each giver), and nothing for long ([`KEPT_FOR`]).

use crate::local_socket::Socket;
use crate::replicas::message::Message;
use nix::sys::socket::MsgFlags;
use nvshare::scm_rights::send_with;
use nvshare::sync::{lock, now};
use nvshare::units::{MILLISECOND, Nanos};
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// How long something waits in it before it is dropped, ns.
pub const KEPT_FOR: Nanos = 1_000 * MILLISECOND;

/// The memory of a chunk that another replica has handed over. When it is dropped, taken or not, the giver is told, after the
/// descriptor was closed.
#[derive(Debug)]
pub struct Handed {
    /// The descriptor of the memory.
    pub memory: Socket,
    /// The chunk here that has the same contents.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    /// What it holds, as the giver says.
    pub digest: super::Digest,
    /// When it came, ns.
    pub(super) since: Nanos,
    /// Tells the giver. The last field, because fields are dropped in their order.
    pub(super) _giver: Giver,
}

/// The connection to the giver of a chunk, which is told when this is dropped.
#[derive(Debug)]
pub(super) struct Giver(pub(super) Arc<Socket>);

impl Drop for Giver {
    fn drop(&mut self) {
        // Its queue has room for as many answers as it has chunks under way; if it is gone, nobody needs the answer.
        let _ = send_with(self.0.as_fd(), &Message::Done.encode(), &[], MsgFlags::MSG_DONTWAIT);
    }
}

/// The inbox.
#[derive(Debug, Default)]
pub struct Inbox {
    waiting: Mutex<VecDeque<Handed>>,
    arrived: Condvar,
}

impl Inbox {
    /// Puts something into it.
    pub(super) fn push(&self, handed: Handed) {
        lock(&self.waiting).push_back(handed);
        self.arrived.notify_all();
    }

    /// Takes what has waited longest.
    pub fn pop(&self) -> Option<Handed> {
        lock(&self.waiting).pop_front()
    }

    /// Whether something waits.
    pub fn has_some(&self) -> bool {
        !lock(&self.waiting).is_empty()
    }

    /// Waits until something is there, for `time` at most. Whether there is.
    pub fn wait(&self, time: Duration) -> bool {
        let waiting = lock(&self.waiting);
        let waited = self.arrived.wait_timeout_while(waiting, time, |waiting| waiting.is_empty());
        let (waiting, _) = waited.unwrap_or_else(|poisoned| poisoned.into_inner());
        !waiting.is_empty()
    }

    /// Drops everything.
    pub fn clear(&self) {
        // The lock is not held while descriptors are closed, which may free memory.
        let dropped = std::mem::take(&mut *lock(&self.waiting));
        drop(dropped);
    }

    /// Drops what has been there for too long. When to look again, ns.
    pub(super) fn tidy(&self) -> Option<Nanos> {
        let time = now();
        let mut waiting = lock(&self.waiting);
        let old = waiting.partition_point(|handed| handed.since.saturating_add(KEPT_FOR) <= time);
        let dropped: Vec<_> = waiting.drain(..old).collect();
        let next = waiting.front().map(|handed| handed.since.saturating_add(KEPT_FOR));
        drop(waiting);
        drop(dropped);
        next
    }
}
