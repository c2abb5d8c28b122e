//! Takes a page over from an arbiter before: finds its memory, knows the clients that live, and closes the books of those
//! that ended meanwhile.

use super::page_from_client::{Listen, PAGE_TIMEOUT, wait_for_page};
use super::served::ServedPage;
use crate::client_lock::ClientLock;
use crate::process;
use nvshare::record::Record;
use nvshare::slot::SlotIndex;
use nvshare::units::{GpuUuid, format_nanos};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// A client that was alive when this arbiter took its page over.
pub struct Survivor {
    /// Its slot.
    pub slot: SlotIndex,
    /// Its lock file, unless somebody has removed it.
    pub lock: Option<ClientLock>,
    /// Its process, if it can be seen from here.
    pub pidfd: Option<OwnedFd>,
}

/// The numbers of all slots.
fn slots() -> impl Iterator<Item = SlotIndex> {
    (0..nvshare::slot::SLOTS).filter_map(SlotIndex::new)
}

/// The lock files of a GPU's clients in `dir`.
fn lock_files(dir: &Path, gpu: GpuUuid) -> impl Iterator<Item = ClientLock> {
    slots().filter_map(move |slot| ClientLock::open(dir, gpu, slot))
}

/// Removes the lock files of a page that is gone: nobody here knows their clients.
pub(super) fn remove_lock_files(dir: &Path, gpu: GpuUuid) {
    lock_files(dir, gpu).for_each(ClientLock::remove);
}

/// Takes over the page that a record names, with its clients. `None` if no process is left that has it.
///
/// # Errors
/// The page cannot be mapped, or the record cannot be written.
pub(super) fn take_over(
    record: Record,
    gpu: GpuUuid,
    dir: &Path,
    listen: Listen<'_>,
) -> io::Result<Option<(ServedPage, Vec<Survivor>)>> {
    let Some(file) = find_page(&record, gpu, dir, listen) else {
        log_stranded(dir, gpu);
        return Ok(None);
    };
    let served = ServedPage::from_record(record, gpu, file)?;
    let survivors = adopt_clients(&served, dir);
    Ok(Some((served, survivors)))
}

/// The page's memory: from a process that has it, or from a client that brings it.
fn find_page(record: &Record, gpu: GpuUuid, dir: &Path, listen: Listen<'_>) -> Option<File> {
    let any_alive = || lock_files(dir, gpu).any(|lock| lock.is_held());
    match record.page() {
        None if any_alive() => wait_for_page(record, gpu, listen()?, any_alive),
        found => found,
    }
}

/// Logs the clients that live and whose page nobody has brought.
fn log_stranded(dir: &Path, gpu: GpuUuid) {
    let alive = lock_files(dir, gpu).filter(ClientLock::is_held);
    let pids: Vec<_> = alive.map(|lock| lock.record.pid.to_string()).collect();
    if !pids.is_empty() {
        tracing::warn!(
            %gpu,
            "the clients with the pids {} live and have not brought their page within {}: they go on without an arbiter until they end, and share the GPU with nobody who comes now. End them if others are to have it",
            pids.join(", "),
            format_nanos(PAGE_TIMEOUT)
        );
    }
}

/// Finds the clients of a page that live, closes the books of the others, and audits.
fn adopt_clients(served: &ServedPage, dir: &Path) -> Vec<Survivor> {
    let ServedPage { page, gpu, .. } = served;
    page.adopt(std::process::id());
    let mut survivors: Vec<_> = slots().filter_map(|slot| survivor(served, dir, slot)).collect();
    page.rebuild_occupied();
    survivors.retain(|survivor| page.owner(survivor.slot).is_some());
    for slot in slots() {
        let of_slot = survivors.iter().find(|survivor| survivor.slot == slot);
        served.record_client(slot, of_slot.and_then(|survivor| survivor.lock.as_ref()));
    }
    tracing::info!(%gpu, clients = survivors.len(), "took its page over");
    // An arbiter that was killed between closing a slot and giving its granules back has left an account without an owner.
    for slot in slots().filter(|slot| page.owner(*slot).is_none()) {
        page.close_account(slot);
    }
    served.audit();
    survivors
}

/// The client in a slot, if it lives; else its books are closed.
fn survivor(served: &ServedPage, dir: &Path, slot: SlotIndex) -> Option<Survivor> {
    let ServedPage { page, gpu, .. } = served;
    let Some(lock) = ClientLock::open(dir, *gpu, slot) else { return survivor_without_lock(served, slot) };
    if !lock.is_held() {
        served.reap(slot, "its process ended, or ran another program, while no arbiter ran");
        lock.remove();
        return None;
    }
    let process = lock.record.process();
    if page.set_owner(slot, process, lock.record.generation) {
        tracing::warn!(%gpu, slot = slot.get(), pid = process.pid, "its page named somebody else as this slot's client: put right");
    }
    let pidfd = lock.record.is_seen().then(|| process::reopen(process)).flatten();
    Some(Survivor { slot, lock: Some(lock), pidfd })
}

/// The client in a slot that the page says is owned, and that has no lock file. An arbiter that was killed before it had
/// answered leaves such a slot, which nobody uses.
fn survivor_without_lock(served: &ServedPage, slot: SlotIndex) -> Option<Survivor> {
    let process = served.page.owner(slot)?;
    match process::reopen(process).filter(|_| served.page.is_claimed(slot)) {
        Some(pidfd) => Some(Survivor { slot, lock: None, pidfd: Some(pidfd) }),
        None => {
            served.reap(slot, "nobody was told of its slot");
            None
        }
    }
}
