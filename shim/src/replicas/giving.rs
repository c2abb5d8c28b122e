//! The giver's end: finds the other replicas, asks what they lack, and sends them memory.
//!
//! The engine does this, in an eviction, so it waits for nobody for longer than [`PATIENCE`]. Whoever does not answer is left alone for
//! a second, then for two, and so on up to a minute.

use crate::local_socket::{Socket, connect_to, peer};
use crate::replicas::message::{Digest, MOST_BYTES, MOST_OFFERED, Message};
use crate::replicas::{Group, MOST_UNDER_WAY, socket_name};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::MsgFlags;
use nvshare::Page;
use nvshare::scm_rights::{receive, send_with};
use nvshare::slot::{SlotIndex, SlotSet};
use nvshare::sync::now;
use nvshare::units::{Granules, MILLISECOND, Nanos, SECOND};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// How long either end waits for the other one at a time, ns. An answer comes in far less, from a thread that has nothing else to do, and
/// the wait ends with it; so it is so long only for a process that is stopped.
pub const PATIENCE: Nanos = 500 * MILLISECOND;

/// How long a client that has refused, or has not answered, is not asked again, ns; at first and at most.
const PAUSE: Nanos = SECOND;
const LONGEST_PAUSE: Nanos = 64 * SECOND;

/// Another client of the GPU.
#[derive(Debug)]
struct Peer {
    slot: SlotIndex,
    /// Its socket's, which no other client ever has.
    name: String,
    state: State,
}

#[derive(Debug)]
enum State {
    /// A replica.
    Open(Connection),
    /// Not asked before that time, ns; and the pause before that.
    Away(Nanos, Nanos),
}

#[derive(Debug)]
struct Connection {
    socket: Socket,
    /// Chunks that it has neither taken nor dropped yet.
    under_way: usize,
    /// It waits for chunks that were promised.
    expects: bool,
}

impl State {
    /// Not asked for so long, ns, and for twice as long the next time.
    fn away_for(pause: Nanos) -> Self {
        Self::Away(now() + pause, (2 * pause).min(LONGEST_PAUSE))
    }
}

/// What has come from the other end of a connection.
enum Heard {
    /// Nothing yet.
    Nothing,
    /// That a chunk has arrived, which was counted.
    Arrived,
    /// Another message.
    Said(Message),
    /// Nonsense, or the end.
    Broken,
}

/// Why there is no connection.
#[derive(Debug)]
enum Refusal {
    /// Nobody listens: the client has no replicas, or is in another network namespace.
    Nobody,
    /// It is of another user, of another group, of another version, or does not answer.
    NoReplica,
}

impl Connection {
    /// Connects to a client, and says who this one is.
    fn to(name: &str, group: &Group) -> Result<Self, Refusal> {
        let socket = connect_to(name).map_err(|_| Refusal::Nobody)?;
        // The page is everybody's to write, so the name may be that of anybody's socket.
        if !peer(&socket).is_ok_and(|(is_ours, _)| is_ours) {
            return Err(Refusal::NoReplica);
        }
        let mut connection = Self { socket, under_way: 0, expects: false };
        connection.say(&Message::Hello(group.id, group.oldest()), &[]).map_err(|_| Refusal::NoReplica)?;
        match connection.answer() {
            Some(Message::Hello(id, key)) if id == group.id => {
                group.saw(key);
                Ok(connection)
            }
            _ => Err(Refusal::NoReplica),
        }
    }

    fn say(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> nix::Result<()> {
        send_with(self.socket.as_fd(), &message.encode(), fds, MsgFlags::MSG_DONTWAIT)
    }

    /// What has come, without waiting.
    fn hear(&mut self) -> Heard {
        match receive(self.socket.as_fd(), MOST_BYTES + 1, MsgFlags::MSG_DONTWAIT) {
            Ok((bytes, fds)) if fds.is_empty() => match Message::decode(&bytes) {
                Some(Message::Done) if self.under_way > 0 => {
                    self.under_way -= 1;
                    Heard::Arrived
                }
                Some(Message::Done) | None => Heard::Broken,
                Some(message) => Heard::Said(message),
            },
            Err(Errno::EAGAIN) => Heard::Nothing,
            _ => Heard::Broken,
        }
    }

    /// The next message. Waits for it until `until`, ns. `None` if none comes, or nonsense.
    fn next(&mut self, until: Nanos) -> Option<Message> {
        loop {
            match self.hear() {
                Heard::Said(message) => return Some(message),
                Heard::Arrived => {}
                Heard::Nothing if now() < until => self.wait(until),
                Heard::Nothing | Heard::Broken => return None,
            }
        }
    }

    fn answer(&mut self) -> Option<Message> {
        self.next(now() + PATIENCE)
    }

    /// Sleeps until something comes, or until `until`, ns.
    fn wait(&self, until: Nanos) {
        let left = until.saturating_sub(now()).div_ceil(MILLISECOND);
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        // A signal, or no memory in the kernel: the caller looks, and comes back.
        let _ = poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], timeout);
    }

    /// Waits until less than the most is under way. False if the peer takes nothing for [`PATIENCE`], or is gone.
    fn has_room(&mut self) -> bool {
        let until = now() + PATIENCE;
        loop {
            match self.hear() {
                Heard::Arrived => {}
                Heard::Nothing if self.under_way < MOST_UNDER_WAY => return true,
                Heard::Nothing if now() < until => self.wait(until),
                Heard::Nothing | Heard::Said(_) | Heard::Broken => return false,
            }
        }
    }
}

/// A chunk that a replica lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Its place among those that were offered by the caller.
    pub at: usize,
    /// Who lacks it.
    by: SlotIndex,
    /// Its place in what was offered to that one.
    place: u32,
}

/// The giver's end of all connections of a client.
#[derive(Debug)]
pub struct Giving {
    group: Arc<Group>,
    peers: Vec<Peer>,
}

impl Giving {
    /// Of a member of a group.
    pub fn new(group: Arc<Group>) -> Self {
        Self { group, peers: Vec::new() }
    }

    /// The group.
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// Finds the replicas among the other clients of the page, and exchanges keys with those that it has not met. Clients that have
    /// refused are asked again after a pause.
    pub fn meet(&mut self, page: &Page, own: SlotIndex) {
        let others = page.occupied().without(own);
        let names: Vec<_> = others.iter().filter_map(|slot| Some((slot, socket_name(page, slot)?))).collect();
        self.peers.retain(|peer| names.iter().any(|(slot, name)| (*slot, name) == (peer.slot, &peer.name)));
        for (slot, name) in names {
            let known = self.peers.iter().position(|peer| peer.slot == slot);
            let pause = match known.map(|at| &self.peers[at].state) {
                Some(State::Open(_)) => continue,
                Some(State::Away(until, _)) if now() < *until => continue,
                Some(State::Away(_, pause)) => *pause,
                None => PAUSE,
            };
            let state = match Connection::to(&name, &self.group) {
                Ok(connection) => {
                    tracing::debug!(gpu = %self.group.gpu, slot = slot.get(), "found a replica of this process");
                    State::Open(connection)
                }
                Err(why) => {
                    tracing::trace!(gpu = %self.group.gpu, slot = slot.get(), "no replica: {why:?}");
                    State::away_for(pause)
                }
            };
            match known {
                Some(at) => self.peers[at].state = state,
                None => self.peers.push(Peer { slot, name, state }),
            }
        }
    }

    /// Offers chunks to the replicas among the `admitted` clients, which are those that are being filled: their digests, of which
    /// `granules` granules are to be evicted. What they lack of them, in the order of the offer for each.
    pub fn offer(&mut self, admitted: SlotSet, digests: &[Digest], granules: Granules) -> Vec<Wanted> {
        let mut left: Vec<usize> = (0..digests.len().min(MOST_OFFERED)).collect();
        let mut wanted = Vec::new();
        for peer in self.peers.iter_mut().filter(|peer| admitted.contains(peer.slot)) {
            let State::Open(connection) = &mut peer.state else { continue };
            if left.is_empty() {
                break;
            }
            let offer = left.iter().map(|at| digests[*at]).collect();
            let said = connection.say(&Message::Offer(granules, offer), &[]);
            let answer = if said.is_ok() { connection.answer() } else { None };
            match answer {
                Some(Message::Wanted(places))
                    if places.iter().all(|place| (*place as usize) < left.len()) =>
                {
                    connection.expects = !places.is_empty();
                    let by = peer.slot;
                    let new: Vec<_> = places
                        .iter()
                        .map(|place| Wanted { at: left[*place as usize], by, place: *place })
                        .collect();
                    left.retain(|at| !new.iter().any(|wanted| wanted.at == *at));
                    wanted.extend(new);
                }
                answer => {
                    tracing::debug!(
                        gpu = %self.group.gpu,
                        slot = peer.slot.get(),
                        "a replica did not say what it lacks ({answer:?}): memory is evicted without it"
                    );
                    peer.state = State::away_for(PAUSE);
                }
            }
        }
        wanted
    }

    fn peer(&mut self, slot: SlotIndex) -> Option<&mut Peer> {
        self.peers.iter_mut().find(|peer| peer.slot == slot)
    }

    /// Whether the replica that wants a chunk can be sent one now. If not, it gets no more in this eviction.
    pub fn has_room(&mut self, wanted: &Wanted) -> bool {
        let Some(peer) = self.peer(wanted.by) else { return false };
        let State::Open(connection) = &mut peer.state else { return false };
        let has_room = connection.expects && connection.has_room();
        if !has_room {
            // The end of the connection tells it that nothing more comes.
            peer.state = State::away_for(PAUSE);
            tracing::debug!(
                gpu = %self.group.gpu,
                slot = wanted.by.get(),
                "a replica does not take what it lacks: memory is evicted without it"
            );
        }
        has_room
    }

    /// Sends a chunk of `size` bytes to the replica that wants it. False if that cannot be done.
    pub fn send(&mut self, wanted: &Wanted, size: u64, memory: BorrowedFd<'_>) -> bool {
        let Some(peer) = self.peer(wanted.by) else { return false };
        let State::Open(connection) = &mut peer.state else { return false };
        let sent = connection.say(&Message::Here(wanted.place, size), &[memory]).is_ok();
        if sent {
            connection.under_way += 1;
        } else {
            peer.state = State::away_for(PAUSE);
        }
        sent
    }

    /// Tells the replicas that nothing more of what they wanted will come.
    pub fn over(&mut self) {
        for peer in &mut self.peers {
            let State::Open(connection) = &mut peer.state else { continue };
            if std::mem::take(&mut connection.expects) && connection.say(&Message::Over, &[]).is_err() {
                peer.state = State::away_for(PAUSE);
            }
        }
    }
}
