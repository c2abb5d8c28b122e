//! A kubelet that the tests play: it finds the driver by its registration, as the real one does, and calls it.

use super::api_server::DRIVER;
use super::within;
use hyper::Uri;
use nvshare_kubernetes::dra::kubelet::dra_v1::dra_plugin_client::DraPluginClient;
use nvshare_kubernetes::dra::kubelet::dra_v1::{
    Claim, Device, NodePrepareResourcesRequest, NodeUnprepareResourcesRequest,
};
use nvshare_kubernetes::dra::kubelet::health_v1::dra_resource_health_client::DraResourceHealthClient;
use nvshare_kubernetes::dra::kubelet::health_v1::{NodeWatchResourcesRequest, NodeWatchResourcesResponse};
use nvshare_kubernetes::dra::kubelet::registration::registration_client::RegistrationClient;
use nvshare_kubernetes::dra::kubelet::registration::{InfoRequest, PluginInfo, RegistrationStatus};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

/// The socket in `plugins_registry`, as soon as there is one.
pub async fn registration_socket(dir: &Path) -> PathBuf {
    let registry = dir.join("plugins_registry");
    let found = async {
        loop {
            let sockets =
                std::fs::read_dir(&registry).into_iter().flatten().flatten().map(|entry| entry.path());
            // The real kubelet takes every socket whose name has no dot in front.
            if let Some(socket) =
                sockets.into_iter().find(|path| path.extension().is_some_and(|end| end == "sock"))
            {
                return socket;
            }
            tokio::task::yield_now().await;
        }
    };
    within("a socket in plugins_registry", found).await
}

/// Connects as the kubelet's plugin watcher does: Go's gRPC sends the path as the authority, with every slash escaped.
async fn dial_by_path(socket: &Path) -> Channel {
    let escaped = socket.display().to_string().replace('/', "%2F");
    let origin: Uri = format!("http://{escaped}").parse().expect("an authority that the http crate takes");
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap().origin(origin);
    endpoint.connect().await.unwrap()
}

async fn dial(socket: &Path) -> Channel {
    Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap().connect().await.unwrap()
}

/// The kubelet, after it has registered the driver.
pub struct Kubelet {
    pub info: PluginInfo,
    pub channel: Channel,
}

impl Kubelet {
    pub async fn register(dir: &Path) -> Self {
        let socket = registration_socket(dir).await;
        let mut registrar = RegistrationClient::new(dial_by_path(&socket).await);
        let info = registrar.get_info(InfoRequest {}).await.unwrap().into_inner();
        assert_eq!((info.r#type.as_str(), info.name.as_str()), ("DRAPlugin", DRIVER));
        let channel = dial(Path::new(&info.endpoint)).await;
        let registered = RegistrationStatus { plugin_registered: true, error: String::new() };
        registrar.notify_registration_status(registered).await.unwrap();
        Self { info, channel }
    }

    /// Prepares claims, each by its name and UID. What came of each: its devices or why not.
    pub async fn prepare(&self, claims: &[(&str, &str)]) -> BTreeMap<String, Result<Vec<Device>, String>> {
        let request = NodePrepareResourcesRequest { claims: claims.iter().map(claim).collect() };
        let answer =
            DraPluginClient::new(self.channel.clone()).node_prepare_resources(request).await.unwrap();
        let entries = answer.into_inner().claims.into_iter();
        entries
            .map(|(uid, entry)| {
                (uid, if entry.error.is_empty() { Ok(entry.devices) } else { Err(entry.error) })
            })
            .collect()
    }

    /// Prepares one claim of the name, with the UID that [`super::api_server::allocated`] gives it.
    pub async fn prepare_one(&self, name: &str) -> Result<Vec<Device>, String> {
        let uid = format!("uid-of-{name}");
        self.prepare(&[(name, &uid)]).await.remove(&uid).expect("an entry for the claim")
    }

    /// The errors of taking claims back.
    pub async fn unprepare(&self, names: &[&str]) -> BTreeMap<String, String> {
        let uids: Vec<_> = names.iter().map(|name| format!("uid-of-{name}")).collect();
        let claims = names.iter().zip(&uids).map(|(name, uid)| claim(&(*name, uid.as_str()))).collect();
        let request = NodeUnprepareResourcesRequest { claims };
        let answer =
            DraPluginClient::new(self.channel.clone()).node_unprepare_resources(request).await.unwrap();
        answer.into_inner().claims.into_iter().map(|(uid, entry)| (uid, entry.error)).collect()
    }

    pub async fn watch_health(&self) -> Streaming<NodeWatchResourcesResponse> {
        let mut client = DraResourceHealthClient::new(self.channel.clone());
        client.node_watch_resources(NodeWatchResourcesRequest {}).await.unwrap().into_inner()
    }
}

fn claim((name, uid): &(&str, &str)) -> Claim {
    Claim { namespace: "pods".into(), name: (*name).into(), uid: (*uid).into() }
}
