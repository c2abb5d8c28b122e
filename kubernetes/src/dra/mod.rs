//! The driver for dynamic resource allocation (DRA, `resource.k8s.io/v1`): each GPU is one device that many claims share, and the
//! scheduler itself counts their shares, memory and computing.
//!
//! | module | what it holds |
//! |---|---|
//! | [`terms`] | what a GPU is offered for; pure |
//! | [`spread`] | the order of the devices, and how many claims each takes now; pure |
//! | [`slices`] | the ResourceSlices that say so; pure |
//! | [`claim`] | what a claim was given, and what its pods are promised for it; pure |
//! | [`quantity`] | quantities as Kubernetes writes them; pure |
//! | [`allocations`] | follows the claims in the API server |
//! | [`publisher`] | keeps the slices in the API server as they should be |
//! | [`prepare`] | makes claims ready: a CDI specification for each |
//! | [`kubelet`] | what the kubelet calls |
//! | [`sockets`] | where it calls |
//! | [`options`] | the command line |
//!
//! ```text
//!   NVML, arbiter ──▶ GPUs ───────┬──────────────▶ kubelet ◀── prepare, unprepare, health
//!                                 ▼                  │ reads a claim, writes CDI
//!   claims ──▶ allocations ──▶ publisher             ▼
//!      ▲                          │              container runtime
//!      │ allocates                ▼
//!      └────── scheduler ◀── ResourceSlices
//! ```
//!
//! The driver keeps nothing of its own. What was given to whom stands in the claims, what containers need in the CDI folder, so it
//! can end and begin at any time. Pods that run do not notice.

pub mod allocations;
pub mod claim;
pub mod kubelet;
pub mod options;
pub mod prepare;
pub mod publisher;
pub mod quantity;
pub mod slices;
pub mod sockets;
pub mod spread;
pub mod terms;

use crate::Error;
use crate::cdi;
use crate::error::chain;
use crate::inventory::{Gpu, Health, Inventory};
use crate::options::Common;
use crate::runtime;
use crate::socket::Found;
use k8s_openapi::api::resource::v1::{DeviceRequestAllocationResult, ResourceClaim};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Client, Config};
use kubelet::{Registrar, Services};
use options::DraDriver as Options;
use prepare::Preparer;
use publisher::{Offer, Publisher, Timing};
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tonic::transport::Server;

/// How often health is told to the kubelet, which forgets it after 30 seconds.
const HEALTH_EVERY: Duration = Duration::from_secs(10);

/// A watch ends after so many seconds and is begun again from where it was. So a watch that stands still unnoticed does so for this long
/// at most.
const WATCH_FOR: u32 = 60;

/// A connection on which nothing has come for so long is dead: every watch on it would have ended before.
const SILENT_FOR: Duration = Duration::from_secs(WATCH_FOR as u64 + 15);

/// How many claims may be waiting to be compared with what the watch has shown.
const CLAIMS_TO_COMPARE: usize = 256;

/// How often the sockets are looked at.
const SOCKETS_EVERY: Duration = Duration::from_secs(1);

/// Serves until a signal ends it (SIGTERM, SIGINT).
///
/// # Errors
/// NVML cannot be used, the API server's address is not known, or a socket cannot be made.
pub fn run(options: Options) -> Result<(), Error> {
    let common = &options.common;
    let inventory = Inventory::open(&common.nvml, &common.runtime_dir, common.arbiter_grace)?;
    runtime::run(async {
        let stop = runtime::signals()?;
        let client = client(&options).await?;
        let gpus = look_often(inventory, &options)?;
        serve(options, client, gpus, stop).await
    })
}

async fn client(options: &Options) -> Result<Client, Error> {
    let fail =
        |what: &'static str, cause: String| Error::System { what, cause: std::io::Error::other(cause) };
    let mut config = match &options.kubeconfig {
        Some(file) => {
            let what = "the file that --kubeconfig names cannot be used";
            let read = Kubeconfig::read_from(file).map_err(|error| fail(what, chain(&error)))?;
            let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await;
            config.map_err(|error| fail(what, chain(&error)))?
        }
        None => Config::incluster().map_err(|error| {
            fail("this is no pod with a service account, and there is no --kubeconfig", chain(&error))
        })?,
    };
    (config.read_timeout, config.reset_reader_on_write) = (Some(SILENT_FOR), true);
    Client::try_from(config)
        .map_err(|error| fail("the API server's address or certificates cannot be used", chain(&error)))
}

/// Looks at the GPUs again and again, in a thread of its own, because NVML may take its time.
fn look_often(mut inventory: Inventory, options: &Options) -> Result<watch::Receiver<Vec<Gpu>>, Error> {
    let (common, every, limit) = (options.common.clone(), options.interval, options.nvml_timeout);
    let (found, looks) = watch::channel(inventory.look());
    let look = move || {
        while !found.is_closed() {
            found.send_replace(inventory.look());
            std::thread::sleep(every);
        }
    };
    std::thread::Builder::new()
        .name("inventory".into())
        .spawn(look)
        .map_err(|cause| Error::System { what: "threads cannot be started", cause })?;
    let (tell, gpus) = watch::channel(judged(looks.borrow().clone(), &common));
    tokio::spawn(judge(looks, common, limit, tell));
    Ok(gpus)
}

/// Passes on what each look has found, if it is anything new, and says so when no look comes to its end any more.
async fn judge(
    mut looks: watch::Receiver<Vec<Gpu>>,
    common: Common,
    limit: Duration,
    tell: watch::Sender<Vec<Gpu>>,
) {
    loop {
        let now = match timeout(limit, looks.changed()).await {
            Ok(Ok(())) => judged(looks.borrow_and_update().clone(), &common),
            Ok(Err(_)) => return,
            Err(_) => all_unhealthy(
                looks.borrow().clone(),
                &format!(
                    "NVML has not answered for {limit:?}: the driver waits for a GPU of this node that has failed. `dmesg | grep -e Xid -e \
                     NVRM` on the node says which; reset it (nvidia-smi -r) or restart the node"
                ),
            ),
        };
        tell.send_if_modified(|told| {
            let changed = *told != now;
            *told = now;
            changed
        });
    }
}

/// Without the shim on this node, no GPU takes clients: a container would have one to itself.
fn judged(gpus: Vec<Gpu>, common: &Common) -> Vec<Gpu> {
    match cdi::missing_shim(common) {
        Some(why) => all_unhealthy(gpus, &why),
        None => gpus,
    }
}

fn all_unhealthy(gpus: Vec<Gpu>, why: &str) -> Vec<Gpu> {
    gpus.into_iter().map(|gpu| Gpu { health: Health::Unhealthy(why.to_owned()), ..gpu }).collect()
}

/// Serves the kubelet and publishes, until `stop` is over.
///
/// # Errors
/// A socket cannot be made, or a server ends by itself.
pub async fn serve(
    options: Options,
    client: Client,
    gpus: watch::Receiver<Vec<Gpu>>,
    stop: impl Future<Output = ()>,
) -> Result<(), Error> {
    let (driver, node) = (options.driver_name.clone(), options.node_name.clone());
    let (seen, prepared) = mpsc::channel(CLAIMS_TO_COMPARE);
    let preparer = Preparer {
        client: client.clone(),
        driver: driver.clone(),
        pool: node.clone(),
        terms: options.terms(),
        options: Arc::new(options.common.clone()),
        gpus: gpus.clone(),
        seen,
    };
    let (tell, claims) = watch::channel(None);
    let all = Api::all(client.clone());
    let watch = move || watcher(all.clone(), watched()).default_backoff();
    let mut tasks = JoinSet::new();
    tasks.spawn(allocations::follow(driver.clone(), node.clone(), watch, prepared, tell));
    tasks.spawn(tidy(preparer.clone(), claims.clone()));
    tasks.spawn(log_changes(gpus.clone()));
    let offer = Offer {
        driver: driver.clone(),
        node: node.clone(),
        terms: options.terms(),
        spread: options.spread,
        timing: Timing::new(options.reorder_interval),
    };
    tasks.spawn(Publisher::new(offer, client.clone(), gpus, claims).run());
    let services = Services { preparer, health_every: HEALTH_EVERY };
    let result = tokio::select! {
        result = keep_sockets(&options, services) => result,
        () = stop => Ok(()),
    };
    tasks.shutdown().await;
    if options.withdraw {
        match publisher::withdraw(client, &driver, &node).await {
            Ok(()) => tracing::info!(node, "ResourceSlices removed"),
            Err(why) => tracing::warn!(node, "ResourceSlices are left behind: {why}"),
        }
    }
    tracing::info!("ended; pods that run go on");
    result
}

/// Makes both sockets, and again when they are gone.
async fn keep_sockets(options: &Options, services: Services) -> Result<(), Error> {
    let (dir, driver) = (&options.common.kubelet_dir, &options.driver_name);
    let own = sockets::own(dir, driver);
    let registrar =
        Registrar { driver: driver.clone(), endpoint: own.clone(), registrations: watch::Sender::new(0) };
    let serve_own = || {
        let server = Server::builder()
            .add_service(kubelet::dra_v1::dra_plugin_server::DraPluginServer::new(services.clone()))
            .add_service(kubelet::dra_v1beta1::dra_plugin_server::DraPluginServer::new(services.clone()))
            .add_service(kubelet::health_v1::dra_resource_health_server::DraResourceHealthServer::new(
                services.clone(),
            ))
            .add_service(kubelet::health_v1alpha1::dra_resource_health_server::DraResourceHealthServer::new(
                services.clone(),
            ));
        sockets::start(own.clone(), |listener| server.serve_with_incoming(listener))
    };
    let serve_registration = || {
        let service = kubelet::registration::registration_server::RegistrationServer::new(registrar.clone());
        let server = Server::builder().add_service(service);
        sockets::start(sockets::registration(dir, driver), |listener| server.serve_with_incoming(listener))
    };
    // The kubelet connects to the driver's own socket as soon as it finds the other.
    let mut own_socket = serve_own()?;
    let mut registration = serve_registration()?;
    let mut tick = interval(SOCKETS_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        for serving in [&mut own_socket, &mut registration] {
            if let Some(error) = serving.ended().await {
                return Err(error);
            }
        }
        // The kubelet looks for its plugin only by the registration: a new own socket needs a new registration.
        if own_socket.found() == Found::Gone || registration.found() == Found::Gone {
            tracing::warn!("a socket in {} is gone: both are made anew", dir.display());
            drop(registration);
            own_socket = serve_own()?;
            registration = serve_registration()?;
        }
    }
}

/// Removes what claims have left behind that were deleted while no driver ran. Once: after that, the kubelet tells.
async fn tidy(preparer: Preparer, mut claims: watch::Receiver<Option<allocations::Allocations>>) {
    // First what is there, then what should be: a claim that comes in between is in the list.
    let before = prepare::files(&preparer.options.cdi_dir);
    let Ok(known) = claims.wait_for(Option::is_some).await.map(|known| known.clone()) else { return };
    preparer.tidy(before, |uid| known.as_ref().is_none_or(|known| known.has(uid))).await;
}

/// Says when a GPU takes no new clients any more, or takes them again.
async fn log_changes(mut gpus: watch::Receiver<Vec<Gpu>>) {
    let mut before: BTreeMap<String, Health> = BTreeMap::new();
    loop {
        for gpu in gpus.borrow_and_update().iter() {
            let (uuid, index) = (&gpu.uuid, gpu.index);
            let known = before.insert(uuid.clone(), gpu.health.clone());
            match &gpu.health {
                health if known.as_ref() == Some(health) => {}
                Health::Unhealthy(why) => tracing::warn!(gpu = %uuid, index, "takes no new claims: {why}"),
                Health::Healthy => tracing::info!(gpu = %uuid, index, model = %gpu.model, "takes claims"),
            }
        }
        if gpus.changed().await.is_err() {
            return;
        }
    }
}

/// How the driver watches.
fn watched() -> watcher::Config {
    watcher::Config::default().timeout(WATCH_FOR)
}

/// What a claim was given of this driver's devices.
fn claims_of<'a>(
    claim: &'a ResourceClaim,
    driver: &'a str,
) -> impl Iterator<Item = &'a DeviceRequestAllocationResult> {
    let allocation = claim.status.as_ref().and_then(|status| status.allocation.as_ref());
    let devices = allocation.and_then(|allocation| allocation.devices.as_ref());
    let results = devices.and_then(|devices| devices.results.as_deref()).unwrap_or_default();
    results.iter().filter(move |result| result.driver == driver)
}

/// An error of the API server, for people: its own sentence, and the right that is missing if that is what it says.
fn api_error(error: &(dyn std::error::Error + 'static), rights: &str) -> String {
    let mut errors = std::iter::successors(Some(error), |error| error.source());
    let status = errors.find_map(|error| match (error.downcast_ref(), error.downcast_ref()) {
        (Some(kube::Error::Api(status)), _) | (_, Some(watcher::Error::WatchError(status))) => Some(status),
        _ => None,
    });
    match status {
        Some(status) if status.code == 403 => {
            format!(
                "{}. The driver's service account needs {rights}, as its ClusterRole in deploy/ gives it",
                status.message
            )
        }
        Some(status) => status.message.clone(),
        None => chain(error),
    }
}

/// Logs what goes wrong when it begins, and not each time that it is tried again.
fn complain(last: &mut Option<String>, what: String) {
    if last.as_ref() != Some(&what) {
        tracing::warn!("{what}");
        *last = Some(what);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::Load;

    fn gpu(health: Health) -> Gpu {
        Gpu {
            uuid: "GPU-1".into(),
            index: 0,
            model: String::new(),
            memory: 1 << 30,
            numa_node: None,
            health,
            load: Load::default(),
        }
    }

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        common: Common,
    }

    fn common(library_dir: &std::path::Path) -> Common {
        let line = ["x", "--host-library-dir", library_dir.to_str().unwrap()];
        <Line as clap::Parser>::parse_from(line).common
    }

    #[test]
    fn a_node_without_the_shim_takes_no_clients() {
        let folder = tempfile::tempdir().unwrap();
        let why = |gpus: Vec<Gpu>| match &gpus[0].health {
            Health::Healthy => String::new(),
            Health::Unhealthy(why) => why.clone(),
        };
        assert!(why(judged(vec![gpu(Health::Healthy)], &common(folder.path()))).contains("libnvshare.so"));
        std::fs::write(folder.path().join("libnvshare.so"), "").unwrap();
        assert_eq!(why(judged(vec![gpu(Health::Healthy)], &common(folder.path()))), "");
    }

    // One thread: what one look brings about is seen before the next one is late.
    #[tokio::test]
    async fn nvml_that_does_not_answer_is_told_and_so_is_that_it_answers_again() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("libnvshare.so"), "").unwrap();
        let (found, looks) = watch::channel(vec![gpu(Health::Healthy)]);
        let (tell, mut gpus) = watch::channel(looks.borrow().clone());
        tokio::spawn(judge(looks, common(folder.path()), Duration::from_millis(10), tell));
        timeout(Duration::from_secs(10), gpus.changed()).await.expect("it is told").unwrap();
        assert!(
            matches!(&gpus.borrow_and_update()[0].health, Health::Unhealthy(why) if why.contains("10ms"))
        );
        found.send_replace(vec![gpu(Health::Healthy)]);
        timeout(Duration::from_secs(10), gpus.changed()).await.expect("it is told").unwrap();
        assert!(gpus.borrow_and_update()[0].health.is_healthy());
    }

    #[test]
    fn a_right_that_is_missing_is_named_whoever_tells_of_it() {
        let status = kube::core::Status { code: 403, message: "no".into(), ..Default::default() };
        let direct = kube::Error::Api(Box::new(status.clone()));
        let list = watcher::Error::InitialListFailed(kube::Error::Api(Box::new(status.clone())));
        let watch = watcher::Error::WatchError(Box::new(status));
        for error in [&direct as &(dyn std::error::Error + 'static), &list, &watch] {
            let text = api_error(error, "list on things");
            assert!(text.starts_with("no. ") && text.contains("needs list on things"), "{text}");
        }
    }
}
