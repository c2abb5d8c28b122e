//! The registered clients: who has which slot, the connections that they keep, and what they answer about their phase.
//!
//! Everybody who has the page can write it, so the arbiter keeps its own list of who has a slot, and asks a client itself
//! before it acts on a phase that the page shows.

use super::poller::{ClientId, Poller, Token};
use super::socket::send_reply;
use crate::client_lock::ClientLock;
use crate::process;
use crate::sampling::Source;
use nvshare::books::NOT_TOLD;
use nvshare::page::Phase;
use nvshare::slot::{SlotIndex, SlotSet};
use nvshare::sync::now;
use nvshare::units::{GpuUuid, MILLISECOND, Nanos, SECOND};
use nvshare::wire::Reply;
use std::collections::{HashMap, HashSet};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// How long a client may take to answer what its phase is. The thread that answers waits for nothing else.
const ANSWER_TIMEOUT: Nanos = SECOND;

/// How long a process that has executed another program may take to free the memory on the GPU of the one before, where
/// NVML does not show that it has.
const RELEASE_TIMEOUT: Nanos = 500 * MILLISECOND;

/// A client that has a slot.
pub(super) struct RegisteredClient {
    /// Index of its GPU.
    pub gpu: usize,
    /// Its slot.
    pub slot: SlotIndex,
    /// Its lock file with the arbiter's own record of whose the slot is. `None` if somebody removed the file while no
    /// arbiter ran.
    pub lock: Option<ClientLock>,
    /// Its process; `None` if that cannot be seen from here.
    pub pidfd: Option<OwnedFd>,
    /// The connections that it keeps, most often one. None while it has not attached to this arbiter yet.
    connections: HashSet<RawFd>,
    /// When its lock was first seen free.
    free_since: Option<Nanos>,
    /// When it was asked for its phase, until it answers.
    asked: Option<Nanos>,
    /// Its last answer, as a phase's word, and when it came.
    answered: Option<(Nanos, u32)>,
}

/// What a client says about its phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PhaseAnswer {
    /// It has been asked and may still answer.
    Pending,
    /// It has not answered in time: it is stopped, or there is no connection to it.
    Missing,
    /// It is in this phase.
    Phase(Phase),
    /// Its process does not tell its phase: the page has to be believed.
    AsThePage,
}

impl RegisteredClient {
    fn new(gpu: usize, slot: SlotIndex, lock: Option<ClientLock>, pidfd: Option<OwnedFd>) -> Self {
        let connections = HashSet::new();
        Self { gpu, slot, lock, pidfd, connections, free_since: None, asked: None, answered: None }
    }

    /// How many connections it keeps.
    pub fn connection_count(&self) -> usize {
        self.connections.len()
    }

    /// The user that registered it, if that is recorded.
    pub fn user(&self) -> Option<u32> {
        self.lock.as_ref().map(|lock| lock.record.uid)
    }

    /// The client's answer at `time` (ns), which is used up by that, and whether to ask (again) now.
    fn take_answer(&mut self, time: Nanos) -> (PhaseAnswer, bool) {
        let recent = |(at, word): (Nanos, u32)| (time.saturating_sub(at) < ANSWER_TIMEOUT).then_some(word);
        let answer = match (self.asked, self.answered.take().and_then(recent)) {
            (Some(since), _) if time.saturating_sub(since) >= ANSWER_TIMEOUT => {
                return (PhaseAnswer::Missing, false);
            }
            (Some(_), _) => return (PhaseAnswer::Pending, false),
            (None, None) => PhaseAnswer::Pending,
            (None, Some(NOT_TOLD)) => PhaseAnswer::AsThePage,
            (None, Some(word)) => PhaseAnswer::Phase(Phase::from(word)),
        };
        (answer, true)
    }

    /// Whether the client has ended, judged by its lock. Its pidfd reports by itself
    /// (docs/decisions/0019-who-is-dead.md).
    fn has_ended(&mut self, gpu: GpuUuid, source: Option<&dyn Source>) -> bool {
        if !self.connections.is_empty() || self.lock.as_ref().is_none_or(ClientLock::is_held) {
            // Also when a free lock is held again: a process that was not told of its slot lets the lock go, and gets the
            // same slot when it asks again.
            self.free_since = None;
            return false;
        }
        let since = *self.free_since.get_or_insert_with(now);
        match self.lock.as_ref().filter(|_| self.pidfd.is_some()).map(|lock| lock.record.pid) {
            // Its pidfd is about to report, and its memory on the GPU is free no sooner.
            Some(pid) if process::is_ending(pid) => false,
            Some(pid) if source.is_some_and(|source| has_no_memory(source, gpu, pid)) => true,
            _ => now() - since >= RELEASE_TIMEOUT,
        }
    }
}

/// Whether NVML shows that a process has no memory on a GPU.
fn has_no_memory(source: &dyn Source, gpu: GpuUuid, pid: u32) -> bool {
    source.read(gpu).is_ok_and(|reading| !reading.processes.contains_key(&pid))
}

/// A connection that a client keeps.
struct ClientConnection {
    socket: OwnedFd,
    client: ClientId,
}

/// All registered clients of all GPUs, and their connections.
#[derive(Default)]
pub(super) struct Clients {
    by_id: HashMap<ClientId, RegisteredClient>,
    next_id: ClientId,
    connections: HashMap<RawFd, ClientConnection>,
}

impl Clients {
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = (ClientId, &RegisteredClient)> {
        self.by_id.iter().map(|(id, client)| (*id, client))
    }

    pub fn get(&self, id: ClientId) -> Option<&RegisteredClient> {
        self.by_id.get(&id)
    }

    /// The client in a slot of the GPU with this index.
    pub fn in_slot(&self, gpu: usize, slot: SlotIndex) -> Option<(ClientId, &RegisteredClient)> {
        self.iter().find(|(_, client)| (client.gpu, client.slot) == (gpu, slot))
    }

    /// The slots of a GPU that have a client, whatever the page says.
    pub fn slots_of(&self, gpu: usize) -> SlotSet {
        self.by_id.values().filter(|client| client.gpu == gpu).map(|client| client.slot).collect()
    }

    /// Adds a client and watches its process.
    pub fn add(
        &mut self,
        poller: &Poller,
        gpu: usize,
        slot: SlotIndex,
        lock: Option<ClientLock>,
        pidfd: Option<OwnedFd>,
    ) -> ClientId {
        let id = self.next_id;
        self.next_id = (self.next_id + 1) & 0xffff_ffff;
        if let Some(pidfd) = &pidfd
            && let Err(error) = poller.add(pidfd, Token::Client(id))
        {
            tracing::error!("a client's process cannot be watched, its end will be seen later: {error}");
        }
        self.by_id.insert(id, RegisteredClient::new(gpu, slot, lock, pidfd));
        id
    }

    /// Removes a client. The sockets are those that it kept.
    pub fn remove(&mut self, id: ClientId) -> Option<(RegisteredClient, Vec<OwnedFd>)> {
        let client = self.by_id.remove(&id)?;
        let kept = client.connections.iter().filter_map(|fd| self.connections.remove(fd));
        let sockets = kept.map(|connection| connection.socket).collect();
        Some((client, sockets))
    }

    /// Keeps a connection of a client, and watches it.
    pub fn add_connection(&mut self, poller: &Poller, socket: OwnedFd, id: ClientId) {
        if let Err(error) = poller.add_connection(&socket) {
            tracing::error!("a client's connection cannot be watched, its end will be seen later: {error}");
        }
        let Some(client) = self.by_id.get_mut(&id) else { return };
        client.connections.insert(socket.as_raw_fd());
        // A question asked before went over no connection.
        client.asked = None;
        self.connections.insert(socket.as_raw_fd(), ClientConnection { socket, client: id });
    }

    /// The socket of a kept connection, and whose it is.
    pub fn connection(&self, fd: RawFd) -> Option<(&OwnedFd, ClientId)> {
        self.connections.get(&fd).map(|connection| (&connection.socket, connection.client))
    }

    /// Closes a connection.
    pub fn remove_connection(&mut self, fd: RawFd) {
        let Some(connection) = self.connections.remove(&fd) else { return };
        if let Some(client) = self.by_id.get_mut(&connection.client) {
            client.connections.remove(&fd);
        }
    }

    /// What the client says about its phase, which only its own process can. Asks it if it has not been asked. `time` in ns.
    pub fn ask_phase(&mut self, id: ClientId, time: Nanos) -> PhaseAnswer {
        let Some(client) = self.by_id.get_mut(&id) else { return PhaseAnswer::Missing };
        let (answer, ask) = client.take_answer(time);
        if ask {
            client.asked = Some(time);
            self.send_question(id);
        }
        answer
    }

    /// Sends the question for its phase over all of a client's connections. Its answer counts as unasked for, unless
    /// [`Clients::ask_phase`] is waiting for it.
    pub fn send_question(&self, id: ClientId) {
        let Some(client) = self.by_id.get(&id) else { return };
        for connection in client.connections.iter().filter_map(|fd| self.connections.get(fd)) {
            send_reply(&connection.socket, &Reply::asked(), &[]);
        }
    }

    /// Notes a client's answer, if it was waited for. `word` is a phase's.
    pub fn note_answer(&mut self, id: ClientId, word: u32) {
        let Some(client) = self.by_id.get_mut(&id) else { return };
        if client.asked.take().is_some() {
            client.answered = Some((now(), word));
        }
    }

    /// The clients whose locks say that they have ended. `gpu_of` gives a GPU's UUID for its index.
    pub fn ended(&mut self, gpu_of: impl Fn(usize) -> GpuUuid, source: Option<&dyn Source>) -> Vec<ClientId> {
        let clients = self.by_id.iter_mut();
        clients
            .filter_map(|(id, client)| client.has_ended(gpu_of(client.gpu), source).then_some(*id))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client_lock::ClientRecord;

    const GPU: GpuUuid = GpuUuid([7; 16]);

    #[test]
    fn a_lock_that_is_lent_again_counts_as_free_anew() {
        let dir = tempfile::tempdir().unwrap();
        let slot = SlotIndex::new(0).unwrap();
        let record = ClientRecord { pid: 1, started: 1, namespace: 0, generation: 1, uid: 0 };
        let lock = Some(ClientLock::create(dir.path(), GPU, slot, record).unwrap());
        let mut client = RegisteredClient::new(0, slot, lock, None);
        assert!(!client.has_ended(GPU, None) && client.free_since.is_some());
        let lent = client.lock.as_ref().unwrap().lend().unwrap();
        assert!(!client.has_ended(GPU, None));
        assert_eq!(client.free_since, None, "what runs now has just begun");
        drop(lent);
    }

    #[test]
    fn a_phase_is_asked_for_once_and_its_answer_is_used_once() {
        let mut client = RegisteredClient::new(0, SlotIndex::new(0).unwrap(), None, None);
        assert_eq!(client.take_answer(1), (PhaseAnswer::Pending, true));
        client.asked = Some(1);
        assert_eq!(client.take_answer(2), (PhaseAnswer::Pending, false));
        assert_eq!(client.take_answer(1 + ANSWER_TIMEOUT), (PhaseAnswer::Missing, false));
        (client.asked, client.answered) = (None, Some((10, Phase::Running as u32)));
        assert_eq!(client.take_answer(11), (PhaseAnswer::Phase(Phase::Running), true));
        assert_eq!(client.take_answer(12), (PhaseAnswer::Pending, true));
        client.answered = Some((10, NOT_TOLD));
        assert_eq!(client.take_answer(10 + ANSWER_TIMEOUT), (PhaseAnswer::Pending, true), "too old");
        client.answered = Some((10, NOT_TOLD));
        assert_eq!(client.take_answer(11), (PhaseAnswer::AsThePage, true));
    }
}
