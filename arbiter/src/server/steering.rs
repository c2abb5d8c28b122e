//! Steering at run time: clients are paused and resumed, settings are asked for and changed.
//!
//! **Who is paused together.** A process runs only when it has all its GPUs, and a gang only when all its processes run
//! ([`nvshare::gang_order`]). So a client is paused and resumed with the others of its process and of its gang: else those would
//! hold GPUs and wait. Whoever joins a gang of which one is paused, is paused too ([`State::pause_gangs`]).

use super::clients::RegisteredClient;
use super::pending_connections::Peer;
use super::poller::ClientId;
use super::state::State;
use crate::configuration::Change;
use crate::permission;
use nvshare::control::{PauseRequest, SettingsChange};
use nvshare::page::Suspension;
use nvshare::slot::SlotIndex;
use nvshare::sync::now;
use nvshare::units::{GpuUuid, bytes_of, format_nanos};
use nvshare::wire::{Reply, Status};
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

fn refuse(why: &str) -> Box<Reply> {
    Reply::refuse(Status::Refused, why)
}

/// Pauses a client, or resumes it, with those that must stop with it, for a user who may.
pub(super) fn pause(
    state: &mut State,
    peer: Peer,
    request: &PauseRequest,
    slot: SlotIndex,
    suspension: Suspension,
) -> Result<Reply, Box<Reply>> {
    let index = state.index_of(GpuUuid(request.gpu))?;
    let gpu = state.gpus[index].served.gpu;
    let known = state.clients.in_slot(index, slot).filter(|(_, client)| {
        client.lock.as_ref().is_some_and(|lock| {
            (lock.record.pid, lock.record.generation) == (request.pid, request.generation)
        })
    });
    let (id, _) = known.ok_or_else(|| {
        refuse(&format!("slot {} of {gpu} is no longer process {}'s: it has ended", slot.get(), request.pid))
    })?;
    let together = state.paused_with(id);
    for client in together.iter().filter_map(|id| state.clients.get(*id)) {
        permission::may_change(peer.user, client.user(), nix::unistd::geteuid().as_raw()).map_err(|why| {
            refuse(&format!("slot {} of {}: {why}", client.slot.get(), state.gpus[client.gpu].served.gpu))
        })?;
    }
    state.suspend(&together, suspension);
    let what = match suspension {
        Suspension::None => "resumed".to_owned(),
        Suspension::WithoutEnd => "paused until it is resumed".into(),
        Suspension::Until(_) => {
            let left = suspension.ends().unwrap_or_default().saturating_sub(now());
            format!("paused for {}", format_nanos(left))
        }
    };
    let others = match together.len() - 1 {
        0 => String::new(),
        1 => ", with 1 other client of its process or gang".into(),
        others => format!(", with {others} other clients of its process or gang"),
    };
    tracing::info!(%gpu, slot = slot.get(), pid = request.pid, by = peer.user, "{what}{others}");
    Ok(Reply::done(&format!("{what}{others}")))
}

impl State {
    /// A client, and those that are paused with it: of its process, of its gang, and of the processes of that.
    fn paused_with(&self, id: ClientId) -> Vec<ClientId> {
        let process = |client: &RegisteredClient| client.lock.as_ref().map(|lock| lock.record.process());
        let (mut found, mut new) = (BTreeSet::from([id]), vec![id]);
        while let Some(one) = new.pop() {
            let Some(client) = self.clients.get(one) else { continue };
            let (of, gang) = (process(client), self.gangs.of(one));
            let belongs = |(other, client): &(ClientId, &RegisteredClient)| {
                of.is_some() && process(client) == of || gang.is_some() && self.gangs.of(*other) == gang
            };
            new.extend(
                self.clients
                    .iter()
                    .filter(belongs)
                    .map(|(other, _)| other)
                    .filter(|other| found.insert(*other)),
            );
        }
        found.into_iter().collect()
    }

    fn suspend(&self, clients: &[ClientId], suspension: Suspension) {
        for client in clients.iter().filter_map(|id| self.clients.get(*id)) {
            self.gpus[client.gpu].served.page.suspend(client.slot, suspension);
        }
    }

    /// Pauses those that have come to a process or a gang of which one is paused.
    pub fn pause_gangs(&self) {
        let suspension =
            |client: &RegisteredClient| self.gpus[client.gpu].served.page.suspension(client.slot);
        for (id, client) in self.clients.iter() {
            let paused = suspension(client);
            if paused == Suspension::None {
                continue;
            }
            let behind = |id: &ClientId| {
                self.clients
                    .get(*id)
                    .is_some_and(|other| suspension(other).later(paused) != suspension(other))
            };
            let behind: Vec<_> = self.paused_with(id).into_iter().filter(behind).collect();
            self.suspend(&behind, paused);
        }
    }
}

/// Gives the settings of a GPU, or of all, changed before as a user asks for who may.
pub(super) fn settings(
    state: &mut State,
    peer: Peer,
    gpu: Option<GpuUuid>,
    change: &SettingsChange,
) -> Result<(Reply, OwnedFd), Box<Reply>> {
    gpu.map(|gpu| state.index_of(gpu)).transpose()?;
    if *change != SettingsChange::Ask {
        permission::may_configure(peer.user, nix::unistd::geteuid().as_raw()).map_err(|why| refuse(&why))?;
        state.configuration.request(gpu, change, peer.user).map_err(|why| refuse(&why))?;
        let whose = gpu.map_or_else(|| "all GPUs".into(), |gpu| gpu.to_string());
        tracing::info!(by = peer.user, "settings of {whose} were changed at run time: {}", in_words(change));
        state.reconfigure();
    }
    let gpus = state.gpus.iter().filter(|served| gpu.is_none_or(|gpu| gpu == served.served.gpu));
    let report = state
        .configuration
        .report(gpus.map(|served| (served.served.gpu, bytes_of(served.served.page.capacity()))));
    let file = serde_json::to_vec(&report).map_err(io::Error::other).and_then(|text| in_memory(&text));
    let file = file.map_err(|error| refuse(&format!("the arbiter has no memory for an answer: {error}")))?;
    Ok((Reply::settings(), file.into()))
}

fn in_words(change: &SettingsChange) -> String {
    match change {
        SettingsChange::Ask => String::new(),
        SettingsChange::Set(values) => {
            values.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(", ")
        }
        SettingsChange::Reset(names) if names.is_empty() => "all as they are without such changes".into(),
        SettingsChange::Reset(names) => format!("{} as without such changes", names.join(", ")),
    }
}

/// A text as memory whose descriptor can be sent.
fn in_memory(text: &[u8]) -> io::Result<File> {
    let file = nvshare::sealed::create("nvshare-settings", text.len())?;
    file.write_all_at(text, 0)?;
    Ok(file)
}

/// Reads the configuration file again. A file that is wrong changes nothing.
pub(super) fn reload(state: &mut State) {
    let changed = match state.configuration.reload() {
        Ok(changed) => changed,
        Err(why) => {
            tracing::error!("the configuration is wrong and nothing changes: {why}");
            return;
        }
    };
    state.reconfigure();
    let (at_start, at_once): (Vec<_>, Vec<_>) =
        changed.into_iter().partition(|changed| changed.change == Change::AtStart);
    for changed in &at_once {
        tracing::info!("{} was {} and is {}", changed.name, shown(&changed.before), shown(&changed.after));
    }
    for changed in &at_start {
        tracing::warn!(
            "{} is {} and will be {} when the arbiter starts again: systemctl restart nvshare-arbiter; clients go on meanwhile",
            changed.name,
            shown(&changed.before),
            shown(&changed.after)
        );
    }
    if at_once.is_empty() && at_start.is_empty() {
        tracing::info!("the configuration is as it was");
    }
}

fn shown(value: &str) -> &str {
    if value.is_empty() { "not set" } else { value }
}
