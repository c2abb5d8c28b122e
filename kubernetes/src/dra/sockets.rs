//! The driver's two sockets: its own with its services, and the one by which the kubelet finds it.
//!
//! The kubelet looks for sockets in `plugins_registry`, asks each who is there, and then connects to the driver's own socket. When a
//! socket there goes, the kubelet takes the driver for gone, and after half a minute deletes its slices. So whatever removes
//! them, both are made again.
//!
//! **The name of the registration's socket has an `@` in it.** The kubelet connects with Go's gRPC, which sends the socket's path as the
//! request's `:authority`, with `%2F` for each slash. The `http` crate, on which tonic is built, takes such an authority for
//! malformed and ends the connection, unless the escapes stand before an `@`, where a URI has the user's name.

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

/// The driver's own socket.
pub fn own(kubelet_dir: &Path, driver: &str) -> PathBuf {
    kubelet_dir.join("plugins").join(driver).join("dra.sock")
}

/// The socket by which the kubelet finds the driver.
pub fn registration(kubelet_dir: &Path, driver: &str) -> PathBuf {
    kubelet_dir.join("plugins_registry").join(format!("nvshare@{driver}-reg.sock"))
}

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
    /// Another one is in its place: the next driver's, in an upgrade that starts it before this one ends.
    Anothers,
}

impl Serving {
    /// Makes a socket in place of whatever is there, and the folder if there is none, and serves it.
    ///
    /// # Errors
    /// The path is too long, or nothing can be made there.
    pub fn start<F>(path: PathBuf, serve: impl FnOnce(UnixListenerStream) -> F) -> Result<Self, Error>
    where
        F: Future<Output = Result<(), transport::Error>> + Send + 'static,
    {
        let fail = |cause| Error::file(&path, "the socket cannot be made", cause);
        // Made under another name and moved into place: nobody finds it before it is listened on.
        let made = path.with_extension("new");
        if made.as_os_str().len().max(path.as_os_str().len()) > LONGEST {
            let why = format!(
                "its path has more than {LONGEST} bytes: give a shorter --kubelet-dir or --driver-name"
            );
            return Err(fail(std::io::Error::other(why)));
        }
        fs::create_dir_all(path.parent().unwrap_or(Path::new("/"))).map_err(fail)?;
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
            Ok(Err(error)) => super::chain(&error),
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
