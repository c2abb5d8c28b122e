//! Why the arbiter cannot begin to serve, or cannot go on.

use crate::gpu_lock::Holder;
use crate::monitor::Listen;
use crate::pages::PageError;
use nix::errno::Errno;

/// Why the arbiter could not begin to serve.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The socket or the event loop could not be made.
    #[error("{what}: {cause}")]
    System {
        /// What was tried.
        what: String,
        /// The kernel's error.
        cause: Errno,
    },
    /// A page could not be served.
    #[error(transparent)]
    Page(#[from] PageError),
    /// The settings that size the pools could not be written into the lock file.
    #[error("how the pools are sized cannot be written into the arbiter's lock file: {0}")]
    Sign(std::io::Error),
    /// The configuration makes no sense.
    #[error("{0}")]
    Configuration(String),
    /// Metrics and page cannot be served where the operator wants them.
    #[error("--listen {place}: {cause}. Another program may listen there; give another place, or none")]
    Listen {
        /// Where.
        place: Listen,
        /// The system's reason.
        cause: std::io::Error,
    },
    /// Another arbiter serves a GPU.
    #[error(
        "{0}, and each of two arbiters would deal out all of the GPU's memory. Use that one (--runtime-dir, NVSHARE_RUNTIME_DIR), end it, or serve the GPU twice all the same with --allow-second-arbiter (NVSHARE_ALLOW_SECOND_ARBITER=1)"
    )]
    Held(Holder),
}

/// For `map_err`: a system call failed while `what` was tried.
pub(super) fn failed(what: impl Into<String>) -> impl FnOnce(Errno) -> StartError {
    let what = what.into();
    move |cause| StartError::System { what, cause }
}
