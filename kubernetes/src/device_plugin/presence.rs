//! The plugin's socket, and its registration with the kubelet.
//!
//! A kubelet that starts removes every socket of its folder and makes its own anew. A plugin that starts takes the place of the one before. So
//! what is there is compared with what should be, whenever an entry of the folder changes and at every tick:
//!
//! | found | what is done |
//! |---|---|
//! | no socket of this plugin | it is made, and the plugin registers |
//! | another plugin's socket in its place | nothing: during an upgrade the new plugin starts before the old one ends. It serves from now on |
//! | the kubelet's socket is another one than at the registration | the plugin registers |

use super::folder::Folder;
use super::plugin::Plugin;
use super::protocol::RegisterRequest;
use super::protocol::device_plugin_server::DevicePluginServer;
use super::protocol::registration_client::RegistrationClient;
use crate::Error;
use crate::cdi;
use crate::error::chain;
use crate::options::DeviceInjection;
use crate::socket::{Found, Serving};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};
use tonic::transport::{Endpoint, Server};

/// The version of the protocol.
pub const VERSION: &str = "v1beta1";

/// How long the kubelet may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Tells the kubelet's socket from the one that another kubelet has put in its place, perhaps in the same inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileId {
    file: (u64, u64),
    changed: (i64, i64),
}

impl FileId {
    fn of(path: &Path) -> Option<Self> {
        let data = fs::symlink_metadata(path).ok()?;
        Some(Self { file: (data.dev(), data.ino()), changed: (data.ctime(), data.ctime_nsec()) })
    }
}

/// The plugin's place in the kubelet's folder.
pub struct Presence {
    plugin: Plugin,
    folder: Folder,
    socket: PathBuf,
    kubelet: PathBuf,
    serving: Option<Serving>,
    /// The kubelet's socket at the last registration.
    registered: Option<FileId>,
    /// What was last complained of: said once and not at each tick.
    complaint: Option<String>,
}

impl Presence {
    /// In the kubelet's folder. Nothing is served yet.
    ///
    /// # Errors
    /// There is no such folder, or the CDI specification cannot be written.
    pub fn new(plugin: Plugin) -> Result<Self, Error> {
        let options = plugin.options();
        if options.device_injection == DeviceInjection::Cdi {
            let spec = cdi::client_spec(&options.common);
            if spec.write(&options.common.cdi_dir)? {
                let file = options.common.cdi_dir.join(spec.file_name());
                tracing::info!(file = %file.display(), "CDI specification written");
            }
        }
        let dir = options.common.kubelet_dir.join("device-plugins");
        let name = format!("{}.sock", options.resource_name.replace('/', "-"));
        Ok(Self {
            folder: Folder::watch(&dir)?,
            socket: dir.join(name),
            kubelet: dir.join("kubelet.sock"),
            plugin,
            serving: None,
            registered: None,
            complaint: None,
        })
    }

    /// Serves and registers, again and again where it must.
    ///
    /// # Errors
    /// The socket cannot be made, or the server ends by itself.
    pub async fn keep(&mut self, every: Duration) -> Result<(), Error> {
        let mut tick = interval(every);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The one before may have ended without a word, or still be there.
        self.serve()?;
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = self.folder.changed() => {}
            }
            self.reconcile().await?;
        }
    }

    async fn reconcile(&mut self) -> Result<(), Error> {
        match self.found() {
            Found::Served => {}
            Found::Gone => {
                tracing::warn!(socket = %self.socket.display(), "the socket is gone, as after a restart of the kubelet: it is made anew");
                self.serve()?;
            }
            Found::Anothers => {
                if self.serving.take().is_some() {
                    tracing::warn!(socket = %self.socket.display(), "another plugin serves this socket now: this one steps back");
                }
            }
        }
        let Some(serving) = &mut self.serving else { return Ok(()) };
        if let Some(error) = serving.ended().await {
            return Err(error);
        }
        match FileId::of(&self.kubelet) {
            Some(kubelet) if self.registered != Some(kubelet) => match self.register().await {
                Ok(()) => {
                    self.registered = Some(kubelet);
                    self.complaint = None;
                }
                Err(why) => self.complain(format!("the kubelet does not take the registration: {why}")),
            },
            Some(_) => {}
            None => {
                self.complain(format!("{} is not there: waiting for the kubelet", self.kubelet.display()));
            }
        }
        Ok(())
    }

    /// How the socket is now. A plugin that has stepped back serves again when there is none.
    fn found(&self) -> Found {
        match &self.serving {
            Some(serving) => serving.found(),
            None if self.socket.symlink_metadata().is_ok() => Found::Anothers,
            None => Found::Gone,
        }
    }

    fn complain(&mut self, what: String) {
        if self.complaint.as_ref() != Some(&what) {
            tracing::warn!("{what}");
            self.complaint = Some(what);
        }
    }

    /// Makes the socket and serves it, in place of whatever was there.
    fn serve(&mut self) -> Result<(), Error> {
        let server = Server::builder().add_service(DevicePluginServer::new(self.plugin.clone()));
        let serving = Serving::start(self.socket.clone(), |listener| server.serve_with_incoming(listener))?;
        self.serving = Some(serving);
        self.registered = None;
        Ok(())
    }

    async fn register(&self) -> Result<(), String> {
        let options = self.plugin.options();
        let address = format!("unix://{}", self.kubelet.display());
        let endpoint = Endpoint::from_shared(address).map_err(|error| error.to_string())?;
        let channel = endpoint.connect_timeout(ANSWER_WITHIN).timeout(ANSWER_WITHIN).connect().await;
        let request = RegisterRequest {
            version: VERSION.into(),
            endpoint: self.socket.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            resource_name: options.resource_name.clone(),
            options: Some(self.plugin.offered()),
        };
        let channel = channel.map_err(|error| chain(&error))?;
        RegistrationClient::new(channel)
            .register(request)
            .await
            .map_err(|status| status.message().to_owned())?;
        tracing::info!(
            resource = options.resource_name,
            shares = options.common.shares,
            "registered with the kubelet"
        );
        Ok(())
    }

    /// Takes the socket away, if it is still this plugin's.
    pub fn leave(&mut self) {
        self.serving = None;
        tracing::info!("ended; containers that run go on");
    }
}
