//! Tells of changes in a folder, with the kernel's inotify.

use crate::Error;
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use std::path::Path;
use std::sync::Arc;
use tokio::sync::Notify;

/// A folder whose entries are watched, by a thread of its own, for as long as this process lives.
pub struct Folder(Arc<Notify>);

impl Folder {
    /// Watches this folder from now on.
    ///
    /// # Errors
    /// It is not there, or the system has no more watches.
    pub fn watch(path: &Path) -> Result<Self, Error> {
        let inotify = watch(path).map_err(|cause| {
            let what =
                "the folder cannot be watched; --kubelet-dir names the kubelet's folder, where it must be";
            Error::file(path, what, cause.into())
        })?;
        let changed = Arc::new(Notify::new());
        let teller = changed.clone();
        let watched = path.to_owned();
        let thread = std::thread::Builder::new().name("kubelet-folder".into()).spawn(move || {
            loop {
                match inotify.read_events() {
                    Ok(_) => teller.notify_one(),
                    Err(Errno::EINTR) => {}
                    // Whoever waits looks at every tick too.
                    Err(error) => {
                        return tracing::warn!(folder = %watched.display(), "changes cannot be read: {error}");
                    }
                }
            }
        });
        thread.map_err(|cause| Error::System { what: "a thread cannot be started", cause })?;
        Ok(Self(changed))
    }

    /// Waits until an entry has come or gone since [`Folder::watch`], or since this was last called. Several changes at once are told once.
    pub async fn changed(&self) {
        self.0.notified().await;
    }
}

fn watch(path: &Path) -> Result<Inotify, Errno> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC)?;
    let entries = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_ONLYDIR;
    inotify.add_watch(path, entries)?;
    Ok(inotify)
}
