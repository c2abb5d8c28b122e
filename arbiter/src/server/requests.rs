//! What processes may ask for with their first message: a slot, a look at a page, a change of a client's shares, that a client
//! joins a gang or leaves it, that a client pauses or settings change, or, of a client that registered with an arbiter before this one, to be known again.

use super::clients::RegisteredClient;
use super::log_limits::Nuisance;
use super::pending_connections::Peer;
use super::poller::ClientId;
use super::registration::{self, Registration};
use super::state::State;
use super::steering;
use crate::client_lock::ClientRecord;
use crate::permission;
use nvshare::gang_page::Place;
use nvshare::slot::SlotIndex;
use nvshare::units::GpuUuid;
use nvshare::wire::{Attach, Change, GangRequest, Hello, Message, Reply, RequestKind, SharesUpdate, Status};
use std::os::fd::{AsFd, OwnedFd};

/// Connections that one client may keep. It needs one.
const MAX_CONNECTIONS: usize = 4;

/// What a process gets for its message.
pub(super) struct Answer {
    pub reply: Reply,
    /// Descriptors that go with the reply.
    pub sent: Vec<OwnedFd>,
    /// The client that keeps the connection from now on.
    pub client: Option<ClientId>,
}

impl Answer {
    fn without_client(reply: Reply, sent: Vec<OwnedFd>) -> Self {
        Self { reply, sent, client: None }
    }
}

/// Does what a message asks for. `sent` are the descriptors that came with it. Errors: a refusal, and what kind of line in
/// the log it is.
pub(super) fn serve(
    state: &mut State,
    peer: Peer,
    bytes: &[u8],
    sent: &[OwnedFd],
) -> Result<Answer, (Nuisance, Box<Reply>)> {
    let message = Message::read(bytes).map_err(|refusal| (Nuisance::Nonsense, refusal))?;
    match message {
        Message::Hello(hello) => greet(state, peer, &hello),
        Message::Change(request, slot, edit) => change_shares(state, peer, &request, slot, edit)
            .map(|reply| Answer::without_client(reply, Vec::new())),
        Message::Attach(request, slot) => attach(state, &request, slot, sent),
        Message::Gang(request, slot) => gang(state, peer, &request, slot),
        Message::Pause(request, slot, suspension) => steering::pause(state, peer, &request, slot, suspension)
            .map(|reply| Answer::without_client(reply, Vec::new())),
        Message::Settings(gpu, change) => steering::settings(state, peer, gpu, &change)
            .map(|(reply, file)| Answer::without_client(reply, vec![file])),
    }
    .map_err(|refusal| (Nuisance::Request, refusal))
}

/// Gives the page, with a slot or to look at only.
fn greet(state: &mut State, peer: Peer, hello: &Hello) -> Result<Answer, Box<Reply>> {
    let gpu = state.index_of(GpuUuid(hello.gpu))?;
    let served = &state.gpus[gpu].served;
    // A process without a slot has nothing to write.
    let page = if hello.request_kind() == RequestKind::Slot { &served.file } else { &served.read_only };
    let page = page.as_fd().try_clone_to_owned().map_err(|error| {
        Reply::refuse(Status::Refused, &format!("the arbiter has no descriptor left: {error}"))
    })?;
    match hello.request_kind() {
        RequestKind::Slot => {
            let Registration { slot, client, lock } = registration::register(state, peer, hello, gpu)?;
            Ok(Answer { reply: Reply::welcome(slot), sent: vec![page, lock], client: Some(client) })
        }
        RequestKind::Look => {
            tracing::debug!(gpu = %served.gpu, "somebody looks at its page");
            Ok(Answer::without_client(Reply::shown(), vec![page]))
        }
    }
}

/// Knows a client of an arbiter before this one again, by the lock file that it shows.
fn attach(state: &State, request: &Attach, slot: SlotIndex, sent: &[OwnedFd]) -> Result<Answer, Box<Reply>> {
    let index = state.index_of(GpuUuid(request.gpu))?;
    let gpu = state.gpus[index].served.gpu;
    let shows_lock = |client: &RegisteredClient| {
        client.lock.as_ref().is_some_and(|lock| sent.iter().any(|fd| lock.is_same_file(fd)))
    };
    let client = state.clients.in_slot(index, slot).filter(|(_, client)| shows_lock(client));
    let Some((id, client)) = client else {
        let why = format!("slot {} of {gpu} is not that client's any more", slot.get());
        return Err(Reply::closed(&why));
    };
    if client.connection_count() >= MAX_CONNECTIONS {
        let why = format!("the client in slot {} of {gpu} keeps {MAX_CONNECTIONS} connections", slot.get());
        return Err(Reply::refuse(Status::Refused, &why));
    }
    tracing::info!(%gpu, slot = slot.get(), pid = request.pid, "is there still");
    Ok(Answer { reply: Reply::attached(slot), sent: Vec::new(), client: Some(id) })
}

/// Lets a client join a gang, or leave it, for a user who may.
fn gang(state: &mut State, peer: Peer, request: &GangRequest, slot: SlotIndex) -> Result<Answer, Box<Reply>> {
    let index = state.index_of(GpuUuid(request.gpu))?;
    let gpu = state.gpus[index].served.gpu;
    let refuse = |why: &str| Reply::refuse(Status::Refused, why);
    let known = state.clients.in_slot(index, slot).and_then(|(id, client)| {
        let record = client.lock.as_ref()?.record;
        ((record.pid, record.generation) == (request.pid, request.generation)).then_some((id, record))
    });
    let (id, record) = known
        .ok_or_else(|| refuse(&format!("slot {} of {gpu} is not that client's any more", slot.get())))?;
    permission::may_change(peer.user, Some(record.uid), nix::unistd::geteuid().as_raw())
        .map_err(|why| refuse(&why))?;
    let place = Place::new(index, slot).ok_or_else(|| {
        refuse(&format!(
            "{gpu} is one of too many GPUs: clients of the first {} may join gangs",
            nvshare::gang_page::COLUMNS
        ))
    })?;
    let (before, key) = (state.gangs.of(id), request.key);
    if !request.joins() {
        state.gangs.leave(id, key);
    } else if !state.gangs.join(id, place, record.process(), key, request.size) {
        return Err(refuse("that client has as many communicators, names and peers as one may have"));
    }
    state.write_gangs();
    let after = state.gangs.of(id);
    match (before, after) {
        (None, Some(gang)) => {
            tracing::info!(%gpu, slot = slot.get(), pid = record.pid, gang, "runs together with others that it waits for");
        }
        (Some(gang), None) => {
            tracing::info!(%gpu, slot = slot.get(), pid = record.pid, gang, "is in no gang any more");
        }
        _ => {}
    }
    let (count, size) = state.gangs.count(&key);
    if size > 0 && count > size as usize && request.joins() {
        tracing::warn!(%gpu, slot = slot.get(), pid = record.pid, "{count} processes have joined a gang of {size} (NVSHARE_GANG): give two jobs two names");
    }
    let page = state.gangs.file.as_fd().try_clone_to_owned();
    let page = page.map_err(|error| refuse(&format!("the arbiter has no descriptor left: {error}")))?;
    Ok(Answer::without_client(Reply::ganged(index), vec![page]))
}

/// Changes a client's shares, for a user who may.
fn change_shares(
    state: &State,
    peer: Peer,
    request: &Change,
    slot: SlotIndex,
    edit: SharesUpdate,
) -> Result<Reply, Box<Reply>> {
    let index = state.index_of(GpuUuid(request.gpu))?;
    let served = &state.gpus[index].served;
    let (gpu, page) = (served.gpu, &served.page);
    let ended = || {
        let why =
            format!("slot {} of {gpu} is no longer process {}'s: it has ended", slot.get(), request.pid);
        Reply::refuse(Status::Refused, &why)
    };
    let is_named =
        |record: &ClientRecord| (record.pid, record.generation) == (request.pid, request.generation);
    let lock = state.clients.in_slot(index, slot).and_then(|(_, client)| client.lock.as_ref());
    let record = lock.map(|lock| lock.record).filter(is_named).ok_or_else(ended)?;
    let client = page.details(slot).ok_or_else(ended)?;
    permission::may_change(peer.user, Some(record.uid), nix::unistd::geteuid().as_raw())
        .map_err(|why| Reply::refuse(Status::Refused, &why))?;
    let (before, shares) = (client.shares, edit.of(client.shares));
    page.set_shares(slot, shares);
    tracing::info!(
        %gpu,
        slot = slot.get(),
        pid = request.pid,
        client = client.name,
        by = peer.user,
        "its shares were: {before}; they are: {shares}"
    );
    Ok(Reply::changed(shares))
}
