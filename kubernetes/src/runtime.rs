//! What the programs of this crate run on.

use crate::Error;
use std::future::Future;
use tokio::signal::unix::{SignalKind, signal};

/// Runs it to its end, on two threads.
///
/// # Errors
/// Its own, or threads cannot be started.
pub fn run(program: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|cause| Error::System { what: "threads cannot be started", cause })?;
    let done = runtime.block_on(program);
    // A call of NVML that hangs must not keep this process.
    runtime.shutdown_background();
    done
}

/// Ends when SIGTERM or SIGINT comes. They are waited for from the call on.
///
/// # Errors
/// The system's.
pub fn signals() -> Result<impl Future<Output = ()>, Error> {
    let on =
        |kind| signal(kind).map_err(|cause| Error::System { what: "signals cannot be waited for", cause });
    let (mut terminate, mut interrupt) = (on(SignalKind::terminate())?, on(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
