//! How clients end: their process ends, executes another program, or leaves its slot. Then the arbiter closes their books,
//! so that their granules go back to the pool, and the slot is free.

use super::clients::PhaseAnswer;
use super::log_limits::Nuisance;
use super::poller::ClientId;
use super::socket::send_reply;
use super::state::State;
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use nvshare::books::NOT_TOLD;
use nvshare::page::Phase;
use nvshare::scm_rights::receive;
use nvshare::units::Nanos;
use nvshare::wire::{Reply, Told};
use std::os::fd::{AsFd, RawFd};

/// The reason for closing a client whose lock is free.
const LOCK_FREE: &str = "its process runs another program, or ended";

/// The phase of a client that leaves, as a word in its answer.
const LEAVING: u32 = Phase::Leaving as u32;

/// Closes a client's books and its connections, and frees its slot. `why` is for the log and for the client.
pub(super) fn close(state: &mut State, id: ClientId, why: &str) {
    let Some((client, sockets)) = state.clients.remove(id) else { return };
    let (gpu, slot) = (client.gpu, client.slot);
    let served = &state.gpus[gpu].served;
    // Somebody may have written another owner into its row, which must not keep the slot open.
    if let Some(lock) = &client.lock {
        served.page.set_owner(slot, lock.record.process(), lock.record.generation);
    }
    served.reap(slot, why);
    served.record_client(slot, None);
    for socket in sockets {
        send_reply(&socket, &Reply::closed(why), &[]);
    }
    if let Some(lock) = client.lock {
        lock.remove();
    }
    state.gpus[gpu].tracker.slot_closed(slot);
    state.overdue.remove(gpu, slot);
    state.gangs.ended(id);
    state.write_gangs();
}

/// A client's pidfd reports.
pub(super) fn process_ended(state: &mut State, id: ClientId) {
    close(state, id, "its process ended");
}

/// A connection that a client keeps is readable: an answer has come, or the connection has ended.
pub(super) fn connection_readable(state: &mut State, fd: RawFd) {
    let Some((socket, client)) = state.clients.connection(fd) else { return };
    match receive(socket.as_fd(), 2 * size_of::<Told>(), MsgFlags::MSG_DONTWAIT) {
        Err(Errno::EAGAIN) => return,
        Ok((bytes, _)) if let Some(told) = Told::read(&bytes) => return answered(state, client, told),
        _ => {}
    }
    state.clients.remove_connection(fd);
    close_ended(state);
}

/// A client has told its phase. If it leaves, its slot is closed.
fn answered(state: &mut State, id: ClientId, told: Told) {
    state.clients.note_answer(id, told.phase);
    let Some(client) = state.clients.get(id) else { return };
    let page_says_so = || state.gpus[client.gpu].served.page.view(client.slot).phase == Phase::Leaving;
    // A client that says that it leaves is believed whatever the page says: an arbiter that was killed while it closed the
    // slot has cleared the page, but not the lock file, which the client holds until it hears that its slot is closed.
    if told.phase == LEAVING || told.phase == NOT_TOLD && page_says_so() {
        close(state, id, "left");
    }
}

/// Asks those clients that leave according to the page, which everybody can write. Their answers close them. `time` in ns.
pub(super) fn ask_leaving(state: &mut State, time: Nanos) {
    let phase_in_page = |gpu: usize, slot| state.gpus[gpu].served.page.view(slot).phase;
    let clients = state.clients.iter();
    let leaving: Vec<_> = clients
        .filter(|(_, client)| phase_in_page(client.gpu, client.slot) == Phase::Leaving)
        .map(|(id, client)| (id, client.gpu, client.slot))
        .collect();
    for (id, gpu, slot) in leaving {
        if let PhaseAnswer::Phase(phase) = state.clients.ask_phase(id, time)
            && phase != Phase::Leaving
            && state.log_limits.allows(Nuisance::Overwritten, time)
        {
            tracing::warn!(gpu = %state.gpus[gpu].served.gpu, slot = slot.get(), "the page says that the client leaves, and the client does not say so ({}): somebody has written into the page", phase.name());
        }
    }
}

/// Closes the clients whose locks say that they have ended. Called when a connection ends, and at every tick after that,
/// because a lock is released a moment after the connection.
pub(super) fn close_ended(state: &mut State) {
    let gpus = &state.gpus;
    let ended = state.clients.ended(|index| gpus[index].served.gpu, state.sampler.source());
    ended.into_iter().for_each(|id| close(state, id, LOCK_FREE));
}
