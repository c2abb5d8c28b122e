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
//!
//! A socket is made under another name and then moved into place, so that nobody finds it before it is listened on.

use super::folder::Folder;
use super::plugin::Plugin;
use super::protocol::RegisterRequest;
use super::protocol::device_plugin_server::DevicePluginServer;
use super::protocol::registration_client::RegistrationClient;
use crate::Error;
use crate::cdi;
use crate::options::DeviceInjection;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Endpoint, Server};

/// The version of the protocol.
pub const VERSION: &str = "v1beta1";

/// How long the kubelet may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Tells the kubelet's socket from the one that another kubelet has put in its place, perhaps in the same inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileId {
    file: Inode,
    changed: (i64, i64),
}

/// Tells the plugin's own socket from another's: no other has its inode while it is listened on.
type Inode = (u64, u64);

impl FileId {
    fn of(path: &Path) -> Option<Self> {
        let data = fs::symlink_metadata(path).ok()?;
        Some(Self { file: (data.dev(), data.ino()), changed: (data.ctime(), data.ctime_nsec()) })
    }
}

/// A socket that is served.
struct Serving {
    socket: Inode,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.server.abort();
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
        let found = self.found();
        match (&self.serving, found) {
            (_, None) => {
                tracing::warn!(socket = %self.socket.display(), "the socket is gone, as after a restart of the kubelet: it is made anew");
                self.serve()?;
            }
            (Some(serving), Some(found)) if serving.socket == found => {}
            (Some(_), Some(_)) => {
                tracing::warn!(socket = %self.socket.display(), "another plugin serves this socket now: this one steps back");
                self.serving = None;
            }
            (None, Some(_)) => {}
        }
        let Some(serving) = &mut self.serving else { return Ok(()) };
        if serving.server.is_finished() {
            let cause = match (&mut serving.server).await {
                Ok(Ok(())) => "it was ended".into(),
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            return Err(Error::Server { path: self.socket.clone(), cause });
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

    /// The socket that is in this plugin's place.
    fn found(&self) -> Option<Inode> {
        FileId::of(&self.socket).map(|id| id.file)
    }

    fn complain(&mut self, what: String) {
        if self.complaint.as_ref() != Some(&what) {
            tracing::warn!("{what}");
            self.complaint = Some(what);
        }
    }

    /// Makes the socket and serves it, in place of whatever was there.
    fn serve(&mut self) -> Result<(), Error> {
        let fail = |cause| Error::file(&self.socket, "the socket cannot be made", cause);
        let made = self.socket.with_extension(format!("{}.new", std::process::id()));
        let _ = fs::remove_file(&made);
        let listener = UnixListener::bind(&made).map_err(fail)?;
        fs::rename(&made, &self.socket).map_err(fail)?;
        let socket = self.found();
        let server = Server::builder().add_service(DevicePluginServer::new(self.plugin.clone()));
        let server = tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
        // One that has vanished again is found at the next look.
        self.serving = socket.map(|socket| Serving { socket, server });
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
        let own = self.serving.take().is_some_and(|serving| self.found() == Some(serving.socket));
        if own {
            let _ = fs::remove_file(&self.socket);
        }
        tracing::info!("ended; containers that run go on");
    }
}

/// An error with its causes: tonic's own say little.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
