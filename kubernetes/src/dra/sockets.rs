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
use crate::socket::Serving;
use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport;

/// The driver's own socket.
pub fn own(kubelet_dir: &Path, driver: &str) -> PathBuf {
    kubelet_dir.join("plugins").join(driver).join("dra.sock")
}

/// The socket by which the kubelet finds the driver.
pub fn registration(kubelet_dir: &Path, driver: &str) -> PathBuf {
    kubelet_dir.join("plugins_registry").join(format!("nvshare@{driver}-reg.sock"))
}

/// Makes a socket in place of whatever is there, and the folder if there is none, and serves it.
///
/// # Errors
/// The path is too long, or nothing can be made there.
pub fn start<F>(path: PathBuf, serve: impl FnOnce(UnixListenerStream) -> F) -> Result<Serving, Error>
where
    F: Future<Output = Result<(), transport::Error>> + Send + 'static,
{
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder).map_err(|cause| Error::file(folder, "the folder cannot be made", cause))?;
    Serving::start(path, serve)
}
