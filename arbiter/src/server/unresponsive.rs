//! What happens to clients that hold the GPU though others wait and their right to it has ended: stopped by a signal or a
//! debugger, or in a kernel that runs that long. They are reported, or killed if the operator says so. Memory is never
//! taken from them.

use super::clients::{PhaseAnswer, RegisteredClient};
use super::log_limits::Nuisance;
use super::overdue::Overdue;
use super::state::State;
use crate::options::Options;
use crate::process;
use nvshare::page::{Phase, Stall};
use nvshare::snapshot::{ClientInfo, Snapshot};
use nvshare::units::{GpuUuid, Nanos, format_nanos};

/// Looks at all clients at `time` (ns).
pub(super) fn check(state: &mut State, time: Nanos) {
    for index in 0..state.gpus.len() {
        let page = &state.gpus[index].served.page;
        let snapshot = Snapshot::take(page, page.admitted());
        let bound = state.gpus[index].options.unresponsive_after;
        for overdue in state.overdue.update(index, &snapshot, bound, time) {
            check_client(state, index, overdue, time);
        }
        state.gpus[index].tallies.set_unresponsive(state.overdue.reported(index));
    }
}

/// Asks an overdue client, and reports it if it does not deny that it holds the GPU.
fn check_client(state: &mut State, index: usize, overdue: Overdue, time: Nanos) {
    let Overdue { slot, phase, since } = overdue;
    let served = &state.gpus[index].served;
    let Some(details) = served.page.details(slot) else { return };
    // The process that registered for the slot, whatever the page says.
    let Some((id, client)) = state.clients.in_slot(index, slot) else { return };
    let pid = pid(client, &details);
    match state.clients.ask_phase(id, time) {
        PhaseAnswer::Pending => return,
        PhaseAnswer::Phase(answer) if answer != phase => {
            state.overdue.restart(index, slot, time);
            log_denial(state, index, overdue, pid, answer, time);
            return;
        }
        PhaseAnswer::Phase(_) | PhaseAnswer::Missing | PhaseAnswer::AsThePage => {}
    }
    state.overdue.set_reported(index, slot);
    let tallies = &state.gpus[index].tallies;
    tallies.reported();
    let Some(client) = state.clients.get(id) else { return };
    report(served.gpu, client, &details, phase, time - since);
    if kill(served.gpu, client, &details, &state.gpus[index].options) {
        tallies.killed();
    }
}

/// Logs that a client denies what the page says about it.
fn log_denial(state: &mut State, index: usize, overdue: Overdue, pid: u32, answer: Phase, time: Nanos) {
    if state.log_limits.allows(Nuisance::Overwritten, time) {
        tracing::warn!(
            gpu = %state.gpus[index].served.gpu,
            slot = overdue.slot.get(),
            pid,
            "the page says that the client does not give way ({}), and the client says something else ({}): it is left alone. Somebody has written into the page",
            overdue.phase.name(),
            answer.name()
        );
    }
}

/// The pid that the arbiter recorded, or that the page shows if nothing is recorded.
fn pid(client: &RegisteredClient, details: &ClientInfo) -> u32 {
    client.lock.as_ref().map_or(details.owner.pid, |lock| lock.record.pid)
}

/// Logs that a client is unresponsive. Not if the client itself says why it cannot give way: [`crate::stall_log`] logs that.
fn report(gpu: GpuUuid, client: &RegisteredClient, details: &ClientInfo, phase: Phase, overdue_for: Nanos) {
    if details.stall != Stall::None {
        return;
    }
    tracing::warn!(
        %gpu,
        slot = client.slot.get(),
        pid = pid(client, details),
        client = details.name,
        phase = phase.name(),
        "it has not given way for {}: it is stopped (SIGSTOP, a debugger) or runs a kernel that long; others wait. Continue or end it",
        format_nanos(overdue_for)
    );
}

/// Kills an unresponsive client, if the operator says so. Not for want of host memory, and not a process of which nothing
/// is recorded. Whether it was killed.
fn kill(gpu: GpuUuid, client: &RegisteredClient, details: &ClientInfo, options: &Options) -> bool {
    if !options.kill_unresponsive || details.stall == Stall::NoHostMemory || client.lock.is_none() {
        return false;
    }
    let Some(pidfd) = &client.pidfd else { return false };
    let killed = process::kill(pidfd);
    tracing::warn!(%gpu, pid = pid(client, details), "killed it, as --kill-unresponsive says: {killed:?}");
    killed.is_ok()
}
