//! What the arbiter knows while it serves: its GPUs, their clients, and how much of what has been logged. The other files
//! of this folder are functions of it.

use super::clients::{Clients, RegisteredClient};
use super::gangs::Gangs;
use super::log_limits::{LogLimits, Nuisance};
use super::overdue::OverdueClients;
use super::poller::{ClientId, Poller};
use super::sampler::Sampler;
use super::served_gpu::ServedGpu;
use crate::client_lock::ClientLock;
use crate::configuration::Configuration;
use crate::options::Options;
use nvshare::slot::SlotIndex;
use nvshare::units::{GpuUuid, Nanos};
use nvshare::wire::{Reply, Status};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use tracing_subscriber::filter::LevelFilter;

/// Sets what is logged from now on.
pub type SetLogLevel = Box<dyn Fn(LevelFilter)>;

/// What the arbiter knows while it serves. GPUs are named by their index in `gpus`.
pub(super) struct State {
    pub configuration: Configuration,
    /// The configuration's, for the node.
    pub options: Options,
    pub set_log_level: SetLogLevel,
    /// The runtime directory.
    pub dir: PathBuf,
    pub poller: Poller,
    pub gpus: Vec<ServedGpu>,
    pub clients: Clients,
    pub gangs: Gangs,
    pub sampler: Sampler,
    pub log_limits: LogLimits,
    pub overdue: OverdueClients,
}

impl State {
    /// The index of a GPU. Errors: a refusal, if this arbiter does not serve it.
    pub fn index_of(&self, wanted: GpuUuid) -> Result<usize, Box<Reply>> {
        self.gpus.iter().position(|gpu| gpu.served.gpu == wanted).ok_or_else(|| {
            let known: Vec<_> = self.gpus.iter().map(|gpu| gpu.served.gpu.to_string()).collect();
            Reply::refuse(
                Status::UnknownGpu,
                &format!("no GPU {wanted} is served here; there is {}", known.join(", ")),
            )
        })
    }

    /// Does what the configuration says now, after it has changed.
    pub fn reconfigure(&mut self) {
        // A configuration has been read as options before it holds.
        if let Ok(options) = self.configuration.options(None) {
            (self.set_log_level)(options.log_level);
            self.options = options;
        }
        for gpu in &mut self.gpus {
            if let Ok(options) = self.configuration.options(Some(gpu.served.gpu)) {
                gpu.reconfigure(options);
            }
        }
    }

    /// Adds a client and watches its process.
    pub fn add_client(
        &mut self,
        gpu: usize,
        slot: SlotIndex,
        lock: Option<ClientLock>,
        pidfd: Option<OwnedFd>,
    ) -> ClientId {
        self.clients.add(&self.poller, gpu, slot, lock, pidfd)
    }

    /// Samples a GPU now.
    pub fn sample(&mut self, gpu: usize) {
        self.sampler.sample(&mut self.gpus[gpu]);
    }

    /// Puts right, in all pages, what the arbiter alone decides and everybody can overwrite. `time` in ns.
    pub fn restore_pages(&mut self, time: Nanos) {
        self.gpus.iter().for_each(|gpu| gpu.served.restore(gpu.options.settings()));
        for (_, RegisteredClient { gpu, slot, lock, .. }) in self.clients.iter() {
            let (served, Some(lock)) = (&self.gpus[*gpu].served, lock) else { continue };
            if served.page.set_owner(*slot, lock.record.process(), lock.record.generation)
                && self.log_limits.allows(Nuisance::Overwritten, time)
            {
                tracing::warn!(gpu = %served.gpu, slot = slot.get(), pid = lock.record.pid, "somebody has overwritten in the page whose the slot is: put right");
            }
        }
    }

    /// Writes into the pages who is in which gang: after a change, and to put right what everybody can overwrite.
    pub fn write_gangs(&self) {
        self.gangs.write();
        for (id, client) in self.clients.iter() {
            let page = &self.gpus[client.gpu].served.page;
            if page.set_gang(client.slot, self.gangs.of(id).unwrap_or(0)) {
                page.decide();
            }
        }
        self.pause_gangs();
    }
}
