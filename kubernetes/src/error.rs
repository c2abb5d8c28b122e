//! Why a program of this crate ends.

use std::io;
use std::path::{Path, PathBuf};

/// Why a program of this crate cannot begin or go on. The sentences say what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// NVML cannot be used.
    #[error(
        "NVML ({}) cannot be used: {cause}. Install the NVIDIA driver on this node, or name the library with --nvml", .library.display()
    )]
    Nvml {
        /// What was to be loaded.
        library: PathBuf,
        /// NVML's or the loader's sentence.
        cause: String,
    },
    /// This node has no GPU.
    #[error("NVML lists no GPU on this node: keep this program to nodes that have one, by a nodeSelector")]
    NoGpu,
    /// A file or a folder cannot be read or written.
    #[error("{}: {what}: {cause}", .path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// What was to be done.
        what: &'static str,
        /// The system's reason.
        cause: io::Error,
    },
    /// Something of the system that every program may have.
    #[error("{what}: {cause}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// The system's reason.
        cause: io::Error,
    },
    /// A gRPC server ended by itself.
    #[error("the server of {} ended: {cause}", .path.display())]
    Server {
        /// Its socket.
        path: PathBuf,
        /// What the server says.
        cause: String,
    },
}

impl Error {
    /// Of a file.
    pub fn file(path: &Path, what: &'static str, cause: io::Error) -> Self {
        Self::File { path: path.to_owned(), what, cause }
    }
}

/// An error with its causes: tonic's and kube's own sentences say little.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
