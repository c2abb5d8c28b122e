//! Sockets that programs of this crate serve in the kubelet's folders.
//!
//! A socket is made under another name and then moved into place, so that nobody finds it before it is listened on. Whoever
//! starts takes the place of the one before, which finds that out by the inode: no other socket has it while it is listened on.

use crate::Error;
use std::fs;
use std::future::Future;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport;

/// The longest path of a Unix socket, bytes.
const LONGEST: usize = 107;

/// A socket that is served.
pub struct Serving {
    path: PathBuf,
    inode: Option<(u64, u64)>,
    server: JoinHandle<Result<(), transport::Error>>,
}

/// How a socket was found.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// As it was made.
    Served,
    /// It has been removed.
    Gone,
    /// Another one is in its place: the next program's, in an upgrade that starts it before this one ends.
    Anothers,
}

impl Serving {
    /// Makes a socket in place of whatever is there, and serves it.
    ///
    /// # Errors
    /// The path is too long, or nothing can be made there.
    pub fn start<F>(path: PathBuf, serve: impl FnOnce(UnixListenerStream) -> F) -> Result<Self, Error>
    where
        F: Future<Output = Result<(), transport::Error>> + Send + 'static,
    {
        let fail = |cause| Error::file(&path, "the socket cannot be made", cause);
        // Two may start at once, as in an upgrade.
        let made = path.with_extension(format!("{}.new", std::process::id()));
        if made.as_os_str().len().max(path.as_os_str().len()) > LONGEST {
            let why = format!(
                "its path has more than {LONGEST} bytes: give a shorter --kubelet-dir, --driver-name or --resource-name"
            );
            return Err(fail(std::io::Error::other(why)));
        }
        let _ = fs::remove_file(&made);
        let listener = UnixListener::bind(&made).map_err(fail)?;
        fs::rename(&made, &path).map_err(fail)?;
        let inode = inode(&path);
        let server = tokio::spawn(serve(UnixListenerStream::new(listener)));
        Ok(Self { path, inode, server })
    }

    /// How the socket is now.
    pub fn found(&self) -> Found {
        match inode(&self.path) {
            None => Found::Gone,
            found if found == self.inode => Found::Served,
            Some(_) => Found::Anothers,
        }
    }

    /// Why the server has ended by itself, if it has.
    pub async fn ended(&mut self) -> Option<Error> {
        if !self.server.is_finished() {
            return None;
        }
        let cause = match (&mut self.server).await {
            Ok(Ok(())) => "it was ended".into(),
            Ok(Err(error)) => crate::error::chain(&error),
            Err(error) => error.to_string(),
        };
        Some(Error::Server { path: self.path.clone(), cause })
    }
}

/// The socket goes with its server, unless it is another's by now.
impl Drop for Serving {
    fn drop(&mut self) {
        self.server.abort();
        if self.found() == Found::Served {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|data| (data.dev(), data.ino()))
}
