//! What the kubelet calls: registration, claims, health. The services of all versions are made of the same answers.

use super::prepare::{ClaimName, Preparer, Ready};
use super::slices::device_name;
use crate::inventory::{Gpu, Health};
use std::collections::HashMap;
use std::path::PathBuf;
use std::pin::Pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Messages and services of dynamic resource allocation, v1.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod dra_v1 {
    tonic::include_proto!("k8s.io.kubelet.pkg.apis.dra.v1");
}
/// Messages and services of dynamic resource allocation, v1beta1: kubelets up to 1.33.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod dra_v1beta1 {
    tonic::include_proto!("k8s.io.kubelet.pkg.apis.dra.v1beta1");
}
/// Messages and service of devices' health, v1.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod health_v1 {
    tonic::include_proto!("v1");
}
/// Messages and service of devices' health, v1alpha1: kubelets up to 1.36.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod health_v1alpha1 {
    tonic::include_proto!("v1alpha1");
}
/// Messages and service of the registration.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod registration {
    tonic::include_proto!("pluginregistration");
}

/// What the kubelet is told that the driver's socket serves, the preferred ones first.
pub const SERVICES: [&str; 4] =
    ["v1.DRAPlugin", "v1beta1.DRAPlugin", "v1.DRAResourceHealth", "v1alpha1.DRAResourceHealth"];

/// The kubelet forgets what it has not heard for 30 seconds.
const HEALTH_LASTS: Duration = Duration::from_secs(30);

/// Who is there.
#[derive(Debug, Clone)]
pub struct Registrar {
    /// The driver's name.
    pub driver: String,
    /// The driver's socket.
    pub endpoint: PathBuf,
    /// Raised with each registration that the kubelet confirms.
    pub registrations: watch::Sender<u64>,
}

#[tonic::async_trait]
impl registration::registration_server::Registration for Registrar {
    async fn get_info(
        &self,
        _: Request<registration::InfoRequest>,
    ) -> Result<Response<registration::PluginInfo>, Status> {
        Ok(Response::new(registration::PluginInfo {
            r#type: "DRAPlugin".into(),
            name: self.driver.clone(),
            endpoint: self.endpoint.display().to_string(),
            supported_versions: SERVICES.map(str::to_owned).into(),
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<registration::RegistrationStatus>,
    ) -> Result<Response<registration::RegistrationStatusResponse>, Status> {
        let registration::RegistrationStatus { plugin_registered, error } = request.into_inner();
        if plugin_registered {
            tracing::info!(driver = self.driver, "registered with the kubelet");
            self.registrations.send_modify(|count| *count += 1);
        } else {
            tracing::warn!(driver = self.driver, "the kubelet does not take the registration: {error}");
        }
        Ok(Response::new(registration::RegistrationStatusResponse {}))
    }
}

/// The driver's services.
#[derive(Clone)]
pub struct Services {
    /// Makes claims ready.
    pub preparer: Preparer,
    /// How often health is told again although nothing has changed.
    pub health_every: Duration,
}

impl Services {
    async fn prepare(&self, claims: Vec<ClaimName>) -> Vec<(String, Result<Vec<Ready>, String>)> {
        // At once: one that waits for the API server must not use up the time of the others.
        let answers = claims.iter().map(|name| self.preparer.prepare(name));
        let answers = futures::future::join_all(answers).await;
        let named = claims.into_iter().zip(answers).map(|(name, answer)| {
            let claim = format!("{}/{}", name.namespace, name.name);
            match &answer {
                Ok(ready) => {
                    let devices: Vec<_> = ready.iter().map(|ready| ready.device.as_str()).collect();
                    tracing::info!(claim, uid = name.uid, devices = devices.join(" "), "claim is ready");
                }
                Err(why) => tracing::warn!(claim, uid = name.uid, "claim cannot be made ready: {why}"),
            }
            (name.uid, answer)
        });
        named.collect()
    }

    async fn unprepare(&self, claims: Vec<ClaimName>) -> Vec<(String, String)> {
        let mut answers = Vec::with_capacity(claims.len());
        for name in claims {
            let error = self.preparer.unprepare(&name.uid).await.err().unwrap_or_default();
            let claim = format!("{}/{}", name.namespace, name.name);
            match error.as_str() {
                "" => tracing::info!(claim, uid = name.uid, "claim is no longer in use"),
                why => tracing::warn!(claim, uid = name.uid, "claim cannot be taken back: {why}"),
            }
            answers.push((name.uid, error));
        }
        answers
    }

    /// Health now, at every change, and again before the kubelet forgets it.
    fn health<T: Send + 'static>(&self, message: fn(Vec<DeviceHealth>) -> T) -> HealthStream<T> {
        let (send, receive) = mpsc::channel(1);
        let mut gpus = self.preparer.gpus.clone();
        let pool = self.preparer.pool.clone();
        let mut tick = interval(self.health_every);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tokio::spawn(async move {
            let mut told = Vec::new();
            loop {
                let now: Vec<_> =
                    gpus.borrow_and_update().iter().map(|gpu| DeviceHealth::of(gpu, &pool)).collect();
                if now != told {
                    told = now;
                    tick.reset_immediately();
                }
                tokio::select! {
                    () = send.closed() => return,
                    changed = gpus.changed() => if changed.is_err() { return },
                    _ = tick.tick() => if send.send(Ok(message(told.clone()))).await.is_err() { return },
                }
            }
        });
        Box::pin(ReceiverStream::new(receive))
    }
}

type HealthStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The health of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
struct DeviceHealth {
    pool: String,
    device: String,
    /// Why it takes no clients; empty if it does.
    trouble: String,
}

impl DeviceHealth {
    fn of(gpu: &Gpu, pool: &str) -> Self {
        let trouble = match &gpu.health {
            Health::Healthy => String::new(),
            // The kubelet cuts at 1024 bytes, and would cut a letter in two.
            Health::Unhealthy(why) => why.chars().take(250).collect(),
        };
        Self { pool: pool.to_owned(), device: device_name(&gpu.uuid), trouble }
    }
}

fn seconds_since_1970() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

/// A device of a version's response; only v1 has `share_id`.
macro_rules! device {
    ($version:ident, $ready:ident $(, $share:ident)?) => {
        $version::Device {
            request_names: vec![$ready.request],
            pool_name: $ready.pool,
            device_name: $ready.device,
            cdi_device_ids: $ready.cdi_devices,
            $($share: $ready.$share,)?
        }
    };
}

/// The services of a version of dynamic resource allocation.
macro_rules! claims {
    ($version:ident $(, $share:ident)?) => {
        #[tonic::async_trait]
        impl $version::dra_plugin_server::DraPlugin for Services {
            async fn node_prepare_resources(
                &self,
                request: Request<$version::NodePrepareResourcesRequest>,
            ) -> Result<Response<$version::NodePrepareResourcesResponse>, Status> {
                let answers = self.prepare(request.into_inner().claims.into_iter().map(ClaimName::from).collect()).await;
                let entries = answers.into_iter().map(|(uid, answer)| {
                    let entry = match answer {
                        Ok(ready) => $version::NodePrepareResourceResponse {
                            devices: ready.into_iter().map(|ready| device!($version, ready $(, $share)?)).collect(),
                            error: String::new(),
                        },
                        Err(error) => $version::NodePrepareResourceResponse { devices: Vec::new(), error },
                    };
                    (uid, entry)
                });
                Ok(Response::new($version::NodePrepareResourcesResponse { claims: entries.collect::<HashMap<_, _>>() }))
            }

            async fn node_unprepare_resources(
                &self,
                request: Request<$version::NodeUnprepareResourcesRequest>,
            ) -> Result<Response<$version::NodeUnprepareResourcesResponse>, Status> {
                let answers = self.unprepare(request.into_inner().claims.into_iter().map(ClaimName::from).collect()).await;
                let entries = answers.into_iter().map(|(uid, error)| (uid, $version::NodeUnprepareResourceResponse { error }));
                Ok(Response::new($version::NodeUnprepareResourcesResponse { claims: entries.collect::<HashMap<_, _>>() }))
            }
        }

        impl From<$version::Claim> for ClaimName {
            fn from(claim: $version::Claim) -> Self {
                Self { namespace: claim.namespace, name: claim.name, uid: claim.uid }
            }
        }
    };
}

/// The service of a version of devices' health.
macro_rules! health {
    ($version:ident) => {
        #[tonic::async_trait]
        impl $version::dra_resource_health_server::DraResourceHealth for Services {
            type NodeWatchResourcesStream = HealthStream<$version::NodeWatchResourcesResponse>;

            async fn node_watch_resources(
                &self,
                _: Request<$version::NodeWatchResourcesRequest>,
            ) -> Result<Response<Self::NodeWatchResourcesStream>, Status> {
                tracing::info!("the kubelet watches the GPUs' health");
                Ok(Response::new(self.health(|devices| {
                    let now = seconds_since_1970();
                    let device = |DeviceHealth { pool, device, trouble }| {
                        use $version::HealthStatus::{Healthy, Unhealthy};
                        let health = if trouble.is_empty() { Healthy } else { Unhealthy };
                        $version::DeviceHealth {
                            device: Some($version::DeviceIdentifier { pool_name: pool, device_name: device }),
                            health: health.into(),
                            last_updated_time: now,
                            health_check_timeout_seconds: HEALTH_LASTS.as_secs() as i64,
                            message: trouble,
                        }
                    };
                    $version::NodeWatchResourcesResponse {
                        devices: devices.into_iter().map(device).collect(),
                    }
                })))
            }
        }
    };
}

claims!(dra_v1, share_id);
claims!(dra_v1beta1);
health!(health_v1);
health!(health_v1alpha1);
