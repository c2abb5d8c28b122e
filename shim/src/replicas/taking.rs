//! The taker's end: a thread that says what the client lacks, and puts what comes into the inbox.
//!
//! It trusts no peer and waits for none. Only processes of the same user, or of root, are served, and of these only members of the
//! group. A connection on which something else comes is closed, and so is one that does not say soon who it is. What was promised to
//! a giver is taken back when its connection ends. Since any process can connect, the cost of refusing others is bounded too, in log
//! lines and in time: after a number of refusals no connection is accepted for a moment.

use crate::local_socket::{self, Socket, peer};
use crate::replicas::group::Serving;
use crate::replicas::inbox::{Giver, Handed};
use crate::replicas::message::{Digest, MOST_BYTES, Message};
use crate::replicas::{Group, MOST_UNDER_WAY, socket_name};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::MsgFlags;
use nvshare::Page;
use nvshare::log_limit::LogLimit;
use nvshare::scm_rights::{receive, send_with};
use nvshare::slot::{SLOTS, SlotIndex};
use nvshare::sync::now;
use nvshare::units::{Granules, MILLISECOND, Nanos};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// The most connections at a time: one for each other client of the GPU.
const MOST_PEERS: usize = SLOTS;

/// How long a connection may stay on which nobody has said who it is.
const TIMEOUT: Nanos = 1_000 * MILLISECOND;

/// After so many refusals without a success, and after the process had no descriptors left, no connection is accepted for [`REST`].
const TURNED_AWAY_AT_ONCE: u32 = 32;
const REST: Nanos = 10 * MILLISECOND;

/// What the client lacks.
pub trait Taker: Send + 'static {
    /// Of the offered chunks, those that it lacks, of `most` granules together: the place of each in the offer, in that order, and
    /// the address of the chunk that has the same contents. Until it is taken back, or until its engine has waited for long, it
    /// does not copy that from host memory.
    fn promise(&self, offered: &[Digest], most: Granules) -> Vec<(u32, u64)>;

    /// The chunks at these addresses will not come.
    fn take_back(&self, promised: &[u64]);
}

/// Serves other replicas of the client that has this slot, until it [leaves](Group::leave).
///
/// # Errors
/// The system has no socket, no thread or no pipe; or another process has the socket's name.
pub fn start(group: &Arc<Group>, page: &Page, slot: SlotIndex, taker: impl Taker) -> std::io::Result<()> {
    let name = socket_name(page, slot).ok_or(Errno::ESRCH)?;
    let (stop, serving) = Serving::new()?;
    let member = group.clone();
    let listener = local_socket::listen_at(&name)?;
    std::thread::Builder::new().name("nvshare-replica".into()).spawn(move || {
        // The application's signals are for its own threads.
        let _ = nix::sys::signal::SigSet::all().thread_set_mask();
        let gpu = member.gpu;
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut server = Server::new(member, listener, stop.into(), taker);
            while server.round() {}
        }));
        if ended.is_err() {
            tracing::error!(
                %gpu,
                "nvshare panicked while it served replicas of this process: they hand it nothing any more, and it copies from host memory"
            );
        }
    })?;
    group.serves(serving);
    Ok(())
}

/// Refusals of strangers and of broken peers, whose log lines are limited.
#[derive(Debug, Default)]
struct Nuisances {
    other_user: LogLimit,
    nonsense: LogLimit,
    /// Refusals since the last rest.
    turned_away: u32,
}

impl Nuisances {
    /// Logs how many lines were suppressed.
    fn sum_up(&mut self, time: Nanos) {
        for (limit, what) in [
            (&mut self.other_user, "processes of other users that asked what this one lacks on the GPU"),
            (&mut self.nonsense, "messages that no replica of this process sends"),
        ] {
            if let Some(count) = limit.suppressed(time) {
                tracing::warn!(count, "not logged, more {what}");
            }
        }
    }

    fn due(&self) -> Option<Nanos> {
        [&self.other_user, &self.nonsense].into_iter().filter_map(LogLimit::due).min()
    }
}

struct Peer {
    socket: Arc<Socket>,
    pid: i32,
    since: Nanos,
    /// It has said that it is of the group.
    greeted: bool,
    /// What was promised of its last offer and has not come: by the place in the offer, address and digest.
    promised: BTreeMap<u32, (u64, Digest)>,
}

struct Server<T: Taker> {
    group: Arc<Group>,
    listener: Socket,
    stop: OwnedFd,
    taker: T,
    peers: Vec<Peer>,
    /// Until when no connection is accepted, ns.
    rests_until: Option<Nanos>,
    nuisances: Nuisances,
}

impl<T: Taker> Server<T> {
    fn new(group: Arc<Group>, listener: Socket, stop: OwnedFd, taker: T) -> Self {
        let nuisances = Nuisances::default();
        Self { group, listener, stop, taker, peers: Vec::new(), rests_until: None, nuisances }
    }

    /// Waits for messages or connections, and handles them. False when it is to end.
    fn round(&mut self) -> bool {
        let time = now();
        self.nuisances.sum_up(time);
        if self.nuisances.turned_away >= TURNED_AWAY_AT_ONCE {
            self.nuisances.turned_away = 0;
            self.rests_until = Some(time + REST);
        }
        self.rests_until = self.rests_until.filter(|end| *end > time);
        self.make_room(time);
        let inbox = self.group.inbox.tidy();
        let strangers = self.peers.iter().filter(|peer| !peer.greeted).map(|peer| peer.since + TIMEOUT);
        let until = strangers.chain(self.rests_until).chain(inbox).chain(self.nuisances.due()).min();
        let timeout = until.map_or(PollTimeout::NONE, |until| {
            // Rounded up, or the last millisecond would be spent polling.
            let left = until.saturating_sub(time).div_ceil(MILLISECOND);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let listens = self.rests_until.is_none() && self.peers.len() < MOST_PEERS;
        let interest = if listens { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut fds = vec![
            PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), interest),
        ];
        fds.extend(self.peers.iter().map(|peer| PollFd::new(peer.socket.as_fd(), PollFlags::POLLIN)));
        if poll(&mut fds, timeout).is_err() {
            // A signal, or the kernel had no memory: the state of the sockets is unknown, so all are tried.
            std::thread::yield_now();
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        let stops = fds[0].any().unwrap_or(false);
        drop(fds);
        if stops {
            self.group.inbox.clear();
            return false;
        }
        let mut told = ready[2..].iter();
        let (group, taker, nuisances) = (&self.group, &self.taker, &mut self.nuisances);
        self.peers.retain_mut(|peer| {
            let stays = !told.next().is_some_and(|ready| *ready) || hear(peer, group, taker, nuisances);
            if !stays {
                take_back(peer, taker);
            }
            stays
        });
        if ready[1] && listens {
            self.admit();
        }
        true
    }

    /// Closes connections on which nobody has said in time who it is, or whose place is needed for others.
    fn make_room(&mut self, time: Nanos) {
        self.peers.retain(|peer| peer.greeted || peer.since + TIMEOUT > time);
        if self.peers.len() >= MOST_PEERS
            && let Some(stranger) = self.peers.iter().position(|peer| !peer.greeted)
        {
            self.peers.remove(stranger);
        }
    }

    fn admit(&mut self) {
        let socket = match local_socket::accept(&self.listener) {
            Ok(fd) => fd,
            Err(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS) => {
                self.rests_until = Some(now() + REST);
                return;
            }
            // The peer has closed the connection already.
            Err(_) => return,
        };
        match peer(&socket) {
            Ok((true, pid)) => self.peers.push(Peer {
                socket: Arc::new(Socket::new(socket)),
                pid,
                since: now(),
                greeted: false,
                promised: BTreeMap::new(),
            }),
            Ok((false, pid)) => {
                self.nuisances.turned_away += 1;
                if self.nuisances.other_user.allows(now()) {
                    tracing::warn!(
                        gpu = %self.group.gpu,
                        peer = pid,
                        "a process of another user asked what this process lacks on the GPU, as replicas do, and was refused"
                    );
                }
            }
            Err(_) => self.nuisances.turned_away += 1,
        }
    }
}

/// Takes back what was promised to a peer.
fn take_back(peer: &mut Peer, taker: &impl Taker) {
    let addresses: Vec<_> =
        std::mem::take(&mut peer.promised).into_values().map(|(address, _)| address).collect();
    if !addresses.is_empty() {
        taker.take_back(&addresses);
    }
}

/// Sends a message. False if that does not come off at once.
fn say(peer: &Peer, message: &Message) -> bool {
    send_with(peer.socket.as_fd(), &message.encode(), &[], MsgFlags::MSG_DONTWAIT).is_ok()
}

/// Handles one message. False if the connection must be closed.
fn hear(peer: &mut Peer, group: &Group, taker: &impl Taker, nuisances: &mut Nuisances) -> bool {
    let (bytes, mut sent) = match receive(peer.socket.as_fd(), MOST_BYTES + 1, MsgFlags::MSG_DONTWAIT) {
        // A peer that has said who it is before it disconnects does not count as refused.
        Ok((bytes, _)) if bytes.is_empty() => {
            nuisances.turned_away += u32::from(!peer.greeted);
            return false;
        }
        Ok(message) => message,
        Err(Errno::EAGAIN) => return true,
        Err(error) => {
            nuisances.turned_away += u32::from(error == Errno::ENOBUFS);
            return false;
        }
    };
    let message = Message::decode(&bytes);
    let memory = sent.pop();
    let stays = match (message, memory, sent.is_empty()) {
        // Not another word to a process of another group, not even the key.
        (Some(Message::Hello(id, _)), None, _) if id != group.id => return false,
        (Some(Message::Hello(_, key)), None, _) if !peer.greeted => {
            peer.greeted = true;
            group.saw(key);
            Some(say(peer, &Message::Hello(group.id, group.oldest())))
        }
        (Some(Message::Offer(most, digests)), None, _) if peer.greeted => {
            take_back(peer, taker);
            let wanted = taker.promise(&digests, most);
            let digest = |place: u32| digests[place as usize];
            peer.promised =
                wanted.iter().map(|(place, address)| (*place, (*address, digest(*place)))).collect();
            Some(say(peer, &Message::Wanted(wanted.into_iter().map(|(place, _)| place).collect())))
        }
        (Some(Message::Over), None, _) if peer.greeted => {
            take_back(peer, taker);
            Some(true)
        }
        (Some(Message::Here(place, size)), Some(memory), true) => {
            // Each that is under way holds the socket; so does, for a moment, one for which the giver has just been told that it is done.
            let few = Arc::strong_count(&peer.socket) <= MOST_UNDER_WAY + 1;
            let promised = if few { peer.promised.remove(&place) } else { None };
            promised.map(|(address, digest)| {
                let (memory, _giver, since) = (Socket::new(memory), Giver(peer.socket.clone()), now());
                group.inbox.push(Handed { memory, address, size, digest, since, _giver });
                true
            })
        }
        _ => None,
    };
    stays.unwrap_or_else(|| {
        nuisances.turned_away += 1;
        if nuisances.nonsense.allows(now()) {
            tracing::warn!(
                gpu = %group.gpu,
                peer = peer.pid,
                "a process sent {} B that no replica of this process sends: the connection is closed. Do all of the group run the same release of nvshare?",
                bytes.len()
            );
        }
        false
    })
}
