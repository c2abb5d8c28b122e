//! Waits for a client to bring a page that the arbiter cannot reach itself, because it cannot see the processes that have
//! the page, or cannot look into them.
//!
//! Clients try to attach at least once a second, and send the page with that. Everybody is turned away meanwhile, and comes
//! again.

use crate::accept::accept;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::MsgFlags;
use nvshare::record::Record;
use nvshare::scm_rights::receive;
use nvshare::sync::now;
use nvshare::units::{GpuUuid, MILLISECOND, Nanos, SECOND};
use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

/// Gives the socket that clients connect to, and on which nobody is served yet. `None` if it cannot be bound.
pub type Listen<'a> = &'a dyn Fn() -> Option<&'a OwnedFd>;

/// How long living clients have time to bring their page.
pub(super) const PAGE_TIMEOUT: Nanos = 5 * SECOND;

/// How often the arbiter checks whether those who may bring the page are alive.
const POLL_INTERVAL: Nanos = 100 * MILLISECOND;

/// Connections without a message that are kept meanwhile.
const MAX_SILENT: usize = 256;

/// Waits until a client brings the page of `record`, or none of those who have it is `alive`, or the time is up. (A process
/// that the arbiter before had not told of its slot lets the slot go, and brings nothing.)
pub(super) fn wait_for_page(
    record: &Record,
    gpu: GpuUuid,
    listener: &OwnedFd,
    alive: impl Fn() -> bool,
) -> Option<File> {
    let until = now() + PAGE_TIMEOUT;
    tracing::info!(%gpu, "waiting for a client to bring its page");
    let mut silent = VecDeque::new();
    while now() < until && alive() {
        wait_for_input(listener, &silent, until.saturating_sub(now()).min(POLL_INTERVAL));
        accept_all(listener, &mut silent);
        let found = received_files(&mut silent).into_iter().find(|file| record.is_page(file));
        if found.is_some() {
            return found;
        }
        // The oldest go: an honest client sends its message as soon as it is connected.
        let too_many = silent.len().saturating_sub(MAX_SILENT);
        silent.drain(..too_many);
    }
    if now() < until {
        tracing::info!(%gpu, "no client is left that could bring the page");
    }
    None
}

/// Waits for a connection or a message, at most `timeout` ns (rounded up to ms).
fn wait_for_input(listener: &OwnedFd, silent: &VecDeque<OwnedFd>, timeout: Nanos) {
    let mut polled: Vec<_> = std::iter::once(listener)
        .chain(silent)
        .map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN))
        .collect();
    let _ = poll(&mut polled, PollTimeout::from(timeout.div_ceil(MILLISECOND) as u16));
}

/// Accepts the connections that wait, until there are too many.
fn accept_all(listener: &OwnedFd, silent: &mut VecDeque<OwnedFd>) {
    // The listener does not block.
    while let Ok(socket) = accept(listener) {
        silent.push_back(socket);
        if silent.len() > MAX_SILENT {
            return;
        }
    }
}

/// The descriptors that have come. Connections with a message, or without a peer, are closed.
fn received_files(silent: &mut VecDeque<OwnedFd>) -> Vec<File> {
    let mut files = Vec::new();
    silent.retain(|socket| match receive(socket.as_fd(), 512, MsgFlags::MSG_DONTWAIT) {
        Err(Errno::EAGAIN) => true,
        message => {
            files.extend(message.into_iter().flat_map(|(_, sent)| sent).map(File::from));
            false
        }
    });
    files
}
