//! What the plugin answers the kubelet, and where it has it from.

use super::answer;
use super::protocol::device_plugin_server::DevicePlugin;
use super::protocol::{
    AllocateRequest, AllocateResponse, ContainerPreferredAllocationResponse, Device, DevicePluginOptions,
    Empty, ListAndWatchResponse, PreStartContainerRequest, PreStartContainerResponse,
    PreferredAllocationRequest, PreferredAllocationResponse,
};
use crate::Error;
use crate::cdi;
use crate::inventory::{Gpu, Health, Inventory};
use crate::options::DevicePlugin as Options;
use nvshare::units::format_nanos;
use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::WatchStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

/// A request waits so long for fresh figures; then those of the last look count.
const FRESH_WITHIN: Duration = Duration::from_secs(3);

/// The plugin. Its clones are the same one.
#[derive(Clone)]
pub struct Plugin(Arc<Shared>);

struct Shared {
    options: Options,
    /// To the thread that looks: who wants to know.
    looker: mpsc::Sender<oneshot::Sender<Vec<Gpu>>>,
    /// What the last look found.
    gpus: Mutex<Vec<Gpu>>,
    /// The list for the kubelet; told anew only when it differs.
    devices: watch::Sender<Vec<Device>>,
}

impl Plugin {
    /// With the GPUs of this inventory. A thread of its own looks at them: NVML may take long, and hangs while a driver waits for a GPU that
    /// has failed.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn new(options: Options, mut inventory: Inventory) -> Result<Self, Error> {
        let (looker, asked) = mpsc::channel::<oneshot::Sender<Vec<Gpu>>>();
        let looks = std::thread::Builder::new().name("inventory".into()).spawn(move || {
            while let Ok(first) = asked.recv() {
                // One look is for all who have asked before it.
                let all: Vec<_> = std::iter::once(first).chain(asked.try_iter()).collect();
                let gpus = inventory.look();
                for who in all {
                    // Who has waited too long has gone.
                    let _ = who.send(gpus.clone());
                }
            }
        });
        looks.map_err(|cause| Error::System { what: "a thread cannot be started", cause })?;
        let shared =
            Shared { options, looker, gpus: Mutex::new(Vec::new()), devices: watch::Sender::new(Vec::new()) };
        Ok(Self(Arc::new(shared)))
    }

    /// What it was told on its command line.
    pub fn options(&self) -> &Options {
        &self.0.options
    }

    /// What the kubelet is told at the registration.
    pub fn offered(&self) -> DevicePluginOptions {
        DevicePluginOptions { pre_start_required: false, get_preferred_allocation_available: true }
    }

    /// Looks at the GPUs now and then, for ever. If NVML does not answer, no GPU can be relied on: all are unhealthy until it does.
    pub async fn watch(&self) {
        let mut tick = interval(self.0.options.interval);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let look = self.look();
            tokio::pin!(look);
            let most = self.0.options.nvml_timeout;
            if timeout(most, &mut look).await.is_err() {
                self.hangs(most);
                look.await;
            }
        }
    }

    /// Looks at the GPUs, tells whoever watches if their health has changed, and logs it.
    pub async fn look(&self) -> Vec<Gpu> {
        let (answer, found) = oneshot::channel();
        // The thread lives as long as this.
        let _ = self.0.looker.send(answer);
        let Ok(gpus) = found.await else { return self.last() };
        let gpus = match cdi::missing_shim(&self.0.options.common) {
            Some(why) => all_unhealthy(gpus, &why),
            None => gpus,
        };
        self.publish(gpus.clone());
        gpus
    }

    fn hangs(&self, waited: Duration) {
        let waited = format_nanos(u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX));
        let why = format!(
            "NVML has not answered for {waited}: the driver waits for a GPU of this node that has failed. `dmesg | grep -e Xid -e NVRM` on the \
             node says which; reset it (nvidia-smi -r) or restart the node"
        );
        self.publish(all_unhealthy(self.last(), &why));
    }

    fn publish(&self, now: Vec<Gpu>) {
        let devices = answer::devices(&now, self.0.options.common.shares);
        let mut last = self.lock();
        log_changes(&last, &now);
        *last = now;
        self.0.devices.send_if_modified(|told| {
            let changed = *told != devices;
            *told = devices;
            changed
        });
    }

    /// The GPUs as they are now, or as they were when they were last looked at, if NVML takes long.
    async fn gpus(&self) -> Vec<Gpu> {
        timeout(FRESH_WITHIN, self.look()).await.unwrap_or_else(|_| self.last())
    }

    fn last(&self) -> Vec<Gpu> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Gpu>> {
        self.0.gpus.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn all_unhealthy(gpus: Vec<Gpu>, why: &str) -> Vec<Gpu> {
    let unhealthy = |gpu| Gpu { health: Health::Unhealthy(why.to_owned()), ..gpu };
    gpus.into_iter().map(unhealthy).collect()
}

fn log_changes(before: &[Gpu], now: &[Gpu]) {
    let before: BTreeMap<_, _> = before.iter().map(|gpu| (&gpu.uuid, &gpu.health)).collect();
    for gpu in now {
        let (uuid, index) = (&gpu.uuid, gpu.index);
        match (before.get(uuid), &gpu.health) {
            (Some(before), health) if *before == health => {}
            (_, Health::Unhealthy(why)) => {
                tracing::warn!(gpu = %uuid, index, "takes no new containers: {why}");
            }
            (_, Health::Healthy) => {
                tracing::info!(gpu = %uuid, index, model = %gpu.model, "takes containers");
            }
        }
    }
}

#[tonic::async_trait]
impl DevicePlugin for Plugin {
    type ListAndWatchStream = Pin<Box<dyn Stream<Item = Result<ListAndWatchResponse, Status>> + Send>>;

    async fn get_device_plugin_options(
        &self,
        _: Request<Empty>,
    ) -> Result<Response<DevicePluginOptions>, Status> {
        Ok(Response::new(self.offered()))
    }

    async fn list_and_watch(&self, _: Request<Empty>) -> Result<Response<Self::ListAndWatchStream>, Status> {
        tracing::info!("the kubelet watches the list of virtual GPUs");
        let lists = WatchStream::new(self.0.devices.subscribe());
        let answers = lists.map(|devices| Ok(ListAndWatchResponse { devices }));
        Ok(Response::new(Box::pin(answers)))
    }

    async fn get_preferred_allocation(
        &self,
        request: Request<PreferredAllocationRequest>,
    ) -> Result<Response<PreferredAllocationResponse>, Status> {
        let gpus = self.gpus().await;
        let shares = self.0.options.common.shares;
        let mut answer = PreferredAllocationResponse::default();
        for container in &request.get_ref().container_requests {
            let ids = answer::preferred(&gpus, shares, container)?;
            tracing::debug!(ids = ids.join(" "), "the next container should get");
            answer.container_responses.push(ContainerPreferredAllocationResponse { device_i_ds: ids });
        }
        Ok(Response::new(answer))
    }

    async fn allocate(
        &self,
        request: Request<AllocateRequest>,
    ) -> Result<Response<AllocateResponse>, Status> {
        let gpus = self.gpus().await;
        let options = &self.0.options;
        let mut answer = AllocateResponse::default();
        for container in &request.get_ref().container_requests {
            let ids = container.devices_ids.join(" ");
            let chosen = answer::gpus_of(&gpus, options.common.shares, &container.devices_ids)
                .inspect_err(|status| tracing::warn!(ids, "refused to a container: {}", status.message()))?;
            let numbers: Vec<_> = chosen.iter().map(|(gpu, _)| gpu.index.to_string()).collect();
            tracing::info!(ids, gpus = numbers.join(","), "given to a container");
            answer.container_responses.push(answer::container(options, &chosen));
        }
        Ok(Response::new(answer))
    }

    async fn pre_start_container(
        &self,
        _: Request<PreStartContainerRequest>,
    ) -> Result<Response<PreStartContainerResponse>, Status> {
        // The options say that this is not called.
        Ok(Response::new(PreStartContainerResponse {}))
    }
}
