//! How a process gets a slot: which one, whose it is from now on, and the lock file that it holds for as long as it lives.

use super::clients::RegisteredClient;
use super::closing;
use super::pending_connections::Peer;
use super::poller::ClientId;
use super::state::State;
use crate::client_lock::{ClientLock, ClientRecord, own_namespace};
use crate::process::{self, UNSEEN};
use nvshare::slot::{Process, SLOTS, SlotIndex};
use nvshare::sync::now;
use nvshare::wire::{Hello, Reply, Status};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// What a process gets that registers.
pub(super) struct Registration {
    pub slot: SlotIndex,
    pub client: ClientId,
    /// The locked descriptor that it is to keep.
    pub lock: OwnedFd,
}

/// Opens a slot of a GPU for a process. Errors: a refusal.
pub(super) fn register(
    state: &mut State,
    peer: Peer,
    hello: &Hello,
    gpu: usize,
) -> Result<Registration, Box<Reply>> {
    // A process that makes and destroys contexts one after the other would have all slots between two ticks, so clients
    // that leave are asked now.
    closing::ask_leaving(state, now());
    let (process, pidfd) = identify(peer, hello.pid);
    let shares = hello.shares();
    let slot = slot_for(state, gpu, process, hello, peer.user)?;
    let (client, lent) = match known_client(state, gpu, slot) {
        Some(known) => known,
        None => new_client(state, gpu, slot, process, pidfd, peer)?,
    };
    let lock = lent.map_err(|error| {
        closing::close(state, client, "it could not be given its life file");
        no_lock_file(&state.dir, &error)
    })?;
    let served = &state.gpus[gpu].served;
    served.page.set_shares(slot, shares);
    tracing::info!(gpu = %served.gpu, slot = slot.get(), pid = process.pid, client = hello.name(), "registered: {shares}");
    // In most cases its context is there already. It is counted before the client hears of its slot, so that nobody is
    // promised the memory that the context has.
    state.sample(gpu);
    Ok(Registration { slot, client, lock })
}

/// The process that registers, and its pidfd if it can be seen from here.
fn identify(peer: Peer, own_pid: u32) -> (Process, Option<OwnedFd>) {
    let pid = peer.pid;
    let seen = process::pidfd(pid).ok().zip(process::started(pid));
    match seen {
        Some((pidfd, started)) => (Process { pid, started }, Some(pidfd)),
        // It is in a pid namespace that this one does not contain, and another process may have the same pid in yet another.
        None => (Process { pid: own_pid.max(1), started: now() | UNSEEN }, None),
    }
}

/// The slot for a process: one that was opened for it by an arbiter that was killed before it had answered, or a new one.
fn slot_for(
    state: &State,
    gpu: usize,
    process: Process,
    hello: &Hello,
    user: u32,
) -> Result<SlotIndex, Box<Reply>> {
    let page = &state.gpus[gpu].served.page;
    let untold = |client: &RegisteredClient| {
        let own = client.lock.as_ref().is_some_and(|lock| lock.record.process() == process);
        client.gpu == gpu && own && !page.is_claimed(client.slot)
    };
    if let Some((_, client)) = state.clients.iter().find(|(_, client)| untold(client)) {
        page.describe(client.slot, &hello.name(), hello.shares().weight);
        return Ok(client.slot);
    }
    check_user(state, gpu, user)?;
    let slot = free_slot(state, gpu)?;
    page.open_slot_at(slot, process, &hello.name(), hello.shares().weight);
    Ok(slot)
}

/// Refuses a user who has as many slots as one may have.
fn check_user(state: &State, gpu: usize, user: u32) -> Result<(), Box<Reply>> {
    let Some(most) = state.options.most_slots_of(user) else { return Ok(()) };
    let of_user = |client: &RegisteredClient| client.gpu == gpu && client.user() == Some(user);
    if state.clients.iter().filter(|(_, client)| of_user(client)).count() < most {
        return Ok(());
    }
    Err(Reply::refuse(
        Status::Full,
        &format!(
            "user {user} has {most} slots of {}, as many as one user may have here (--slots-per-user of nvshare-arbiter); end a client first",
            state.gpus[gpu].served.gpu
        ),
    ))
}

/// A slot that no client has, whatever the page says.
fn free_slot(state: &State, gpu: usize) -> Result<SlotIndex, Box<Reply>> {
    let taken = state.clients.slots_of(gpu);
    (0..SLOTS).filter_map(SlotIndex::new).find(|slot| !taken.contains(*slot)).ok_or_else(|| {
        Reply::refuse(
            Status::Full,
            &format!(
                "all {SLOTS} slots of {} are taken; end a client first (`nvshare status` lists them)",
                state.gpus[gpu].served.gpu
            ),
        )
    })
}

/// A client, and the descriptor that it is lent or why there is none.
type Lent = (ClientId, io::Result<OwnedFd>);

/// The client in a slot that was opened for the process before, and that it was not told of.
fn known_client(state: &State, gpu: usize, slot: SlotIndex) -> Option<Lent> {
    let (id, client) = state.clients.in_slot(gpu, slot)?;
    Some((id, client.lock.as_ref()?.lend()))
}

/// Makes a lock file for a slot that has just been opened, and watches its client.
fn new_client(
    state: &mut State,
    gpu: usize,
    slot: SlotIndex,
    process: Process,
    pidfd: Option<OwnedFd>,
    peer: Peer,
) -> Result<Lent, Box<Reply>> {
    let served = &state.gpus[gpu].served;
    let record = ClientRecord {
        pid: process.pid,
        started: process.started,
        namespace: pidfd.as_ref().map_or(0, |_| own_namespace()),
        generation: served.page.generation(slot),
        uid: peer.user,
    };
    match ClientLock::create(&state.dir, served.gpu, slot, record) {
        Ok(lock) => {
            let lent = lock.lend();
            served.record_client(slot, Some(&lock));
            Ok((state.add_client(gpu, slot, Some(lock), pidfd), lent))
        }
        Err(error) => {
            served.page.reap(slot);
            Err(no_lock_file(&state.dir, &error))
        }
    }
}

fn no_lock_file(dir: &Path, error: &io::Error) -> Box<Reply> {
    Reply::refuse(
        Status::Refused,
        &format!("the arbiter cannot write down its client in {}: {error}", dir.display()),
    )
}
