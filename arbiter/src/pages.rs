//! The pages: made, adopted from an arbiter before, or moved aside.

use crate::liveness;
use crate::lives::{Life, Record as LifeRecord};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, SockFlag, accept4};
use nvshare::audit::Audit;
use nvshare::map::{self, MapError, MappedPage};
use nvshare::page::{Page, Settings};
use nvshare::record::{Record, RecordError};
use nvshare::scm_rights::receive;
use nvshare::slot::SlotIndex;
use nvshare::sync::now;
use nvshare::units::{GpuUuid, Granules, MILLISECOND, Nanos, SECOND, bytes_of, format_nanos, format_size};
use nvshare::{paths, sealed};
use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// A page that this arbiter serves.
pub struct Served {
    /// The GPU.
    pub gpu: GpuUuid,
    /// The page.
    pub page: MappedPage,
    /// Its memory, which clients get.
    pub file: File,
    /// The same for those that only look: this descriptor cannot write.
    pub read_only: File,
    /// Where the next arbiter finds the page.
    pub record: Record,
}

/// A client that was alive when this arbiter took its page over.
pub struct Survivor {
    /// Its slot.
    pub slot: SlotIndex,
    /// Its life file, unless somebody has removed it.
    pub life: Option<Life>,
    /// Its process, if it can be seen from here.
    pub pidfd: Option<OwnedFd>,
}

/// Why a page could not be served.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    /// The file system's.
    #[error("the page of {gpu} cannot be {what} in {}: {cause}{}", .dir.display(), hint(.cause))]
    Io {
        /// Whose page.
        gpu: GpuUuid,
        /// The runtime directory.
        dir: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        cause: io::Error,
    },
    /// It has clients, and this arbiter is none that may change their pool.
    #[error(
        "{gpu} has {clients} living clients in {}, in a pool of {}, of an arbiter with other settings; a private arbiter does not change a pool under its clients. Start that arbiter again, end its clients, or use another --runtime-dir",
        .dir.display(), format_size(bytes_of(*.capacity))
    )]
    Lived {
        /// The GPU.
        gpu: GpuUuid,
        /// The runtime directory.
        dir: PathBuf,
        /// How many.
        clients: usize,
        /// The pool's size.
        capacity: Granules,
    },
}

/// What an arbiter is to those before it in the same directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Succession {
    /// It may take over their clients, and give the pool its own size: it is the operator's, or says the same as they did.
    Heir,
    /// A private arbiter with other settings.
    Stranger,
}

fn hint(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::StorageFull => {
            "; its file system is full: make room there, or name another --runtime-dir"
        }
        io::ErrorKind::OutOfMemory => "; the machine or this control group has no memory left for it",
        _ => "",
    }
}

/// Gives the socket that clients come to, on which nobody is served yet.
pub type Listen<'a> = &'a dyn Fn() -> Option<&'a OwnedFd>;

/// Takes over the page of a GPU with its clients, or makes one. A record that is there and makes no sense is moved aside;
/// clients whose page nobody gives are on their own. `listen` is where they can bring it.
///
/// # Errors
/// The file system's, or there is no memory for a page.
pub fn serve(
    dir: &Path,
    gpu: GpuUuid,
    capacity: Granules,
    settings: Settings,
    succession: Succession,
    listen: Listen<'_>,
) -> Result<(Served, Vec<Survivor>), PageError> {
    let fail = |what| move |cause| PageError::Io { gpu, dir: dir.to_owned(), what, cause };
    let taken = match Record::open(dir, gpu, true) {
        Ok(record) => take_over(record, gpu, dir, listen).map_err(fail("taken over"))?,
        Err(RecordError::Io(error)) if error.kind() == io::ErrorKind::NotFound => None,
        Err(RecordError::Io(error)) => return Err(fail("opened")(error)),
        Err(RecordError::Foreign(why)) => {
            let path = paths::page(dir, gpu);
            tracing::warn!(%gpu, "{} cannot be taken over, it is no record of an arbiter of this release ({why}): moving it aside", path.display());
            move_aside(&path).map_err(fail("moved aside"))?;
            None
        }
    };
    let Some((served, survivors)) = taken else {
        // Those of a page that is gone: nobody here knows their clients.
        slots().filter_map(|slot| Life::find(dir, gpu, slot)).for_each(Life::end);
        let served = create(dir, gpu, capacity).map_err(fail("made"))?;
        served.page.set_settings(settings);
        served.page.adopt(std::process::id());
        tracing::info!(%gpu, capacity = %format_size(bytes_of(capacity)), "made its page");
        return Ok((served, Vec::new()));
    };
    let page = &served.page;
    if !survivors.is_empty() && succession == Succession::Stranger {
        let (dir, clients, capacity) = (dir.to_owned(), survivors.len(), page.capacity());
        return Err(PageError::Lived { gpu, dir, clients, capacity });
    }
    page.set_settings(settings);
    if page.set_capacity(capacity) {
        tracing::info!(%gpu, capacity = %format_size(bytes_of(capacity)), "the pool has another size now");
    }
    page.decide();
    Ok((served, survivors))
}

fn create(dir: &Path, gpu: GpuUuid, capacity: Granules) -> io::Result<Served> {
    let (file, page) = map::create(gpu, capacity).map_err(|error| match error {
        MapError::Io(error) => error,
        MapError::Page(error) => io::Error::other(error),
    })?;
    let record = Record::create(dir, gpu, &file)?;
    Ok(Served { gpu, page, read_only: sealed::read_only(&file)?, file, record })
}

/// How long clients that live have time to bring their page. They try once a second at least.
const BROUGHT_WITHIN: Nanos = 5 * SECOND;

/// Takes over the page that a record tells of, with its clients. `None` if nobody is left who has it.
fn take_over(
    mut record: Record,
    gpu: GpuUuid,
    dir: &Path,
    listen: Listen<'_>,
) -> io::Result<Option<(Served, Vec<Survivor>)>> {
    let alive = || slots().filter_map(|slot| Life::find(dir, gpu, slot)).filter(Life::is_held);
    let found = match record.page() {
        None if alive().next().is_some() => {
            listen().and_then(|listener| brought(&record, gpu, listener, || alive().next().is_some()))
        }
        found => found,
    };
    let Some(file) = found else {
        let pids: Vec<_> = alive().map(|life| life.record.pid.to_string()).collect();
        if !pids.is_empty() {
            tracing::warn!(
                %gpu,
                "the clients with the pids {} live and have not brought their page within {}: they go on without an arbiter until they end, and share the GPU with nobody who comes now. End them if others are to have it",
                pids.join(", "),
                format_nanos(BROUGHT_WITHIN)
            );
        }
        return Ok(None);
    };
    record.take_over(gpu)?;
    let page = match MappedPage::map(&file) {
        Err(MapError::Io(error)) => return Err(error),
        other => other.map_err(io::Error::other)?,
    };
    // The kernel says which memory it is: it is the page that the record tells of, whatever somebody has written into it.
    page.restore_identity(gpu);
    let served = Served { gpu, page, read_only: sealed::read_only(&file)?, file, record };
    let survivors = adopt(&served, dir);
    Ok(Some((served, survivors)))
}

/// Waits until a client brings the page: of a process that this arbiter cannot see or cannot look into. Everybody is turned
/// away meanwhile, and comes again. Nobody is waited for who is not `alive` any more: a process that the arbiter before
/// had not told of its slot lets the slot go, and brings nothing.
fn brought(record: &Record, gpu: GpuUuid, listener: &OwnedFd, alive: impl Fn() -> bool) -> Option<File> {
    let until = now() + BROUGHT_WITHIN;
    tracing::info!(%gpu, "waiting for a client to bring its page");
    let mut silent = VecDeque::new();
    while now() < until && alive() {
        wait_for_any(listener, &silent, until.saturating_sub(now()).min(LOOK_AGAIN));
        // The socket does not block.
        while let Ok(socket) = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            // SAFETY: accept4 has just made this descriptor, and nobody else knows it.
            silent.push_back(unsafe { OwnedFd::from_raw_fd(socket) });
            if silent.len() > MOST_SILENT {
                break;
            }
        }
        let mut shown = Vec::new();
        silent.retain(|socket| match receive(socket.as_fd(), 512, MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EAGAIN) => true,
            said => {
                shown.extend(said.into_iter().flat_map(|(_, sent)| sent));
                false
            }
        });
        let found = shown.into_iter().map(File::from).find(|file| record.is_page(file));
        if found.is_some() {
            return found;
        }
        // Who is honest speaks as soon as it is connected.
        let too_many = silent.len().saturating_sub(MOST_SILENT);
        silent.drain(..too_many);
    }
    if now() < until {
        tracing::info!(%gpu, "no client is left that could bring the page");
    }
    None
}

/// How often the arbiter looks whether those who may bring the page are alive.
const LOOK_AGAIN: Nanos = 100 * MILLISECOND;

/// Connections that say nothing and are kept, while the arbiter waits for a page.
const MOST_SILENT: usize = 256;

fn wait_for_any(listener: &OwnedFd, silent: &VecDeque<OwnedFd>, longest: Nanos) {
    let mut polled: Vec<_> = std::iter::once(listener)
        .chain(silent)
        .map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN))
        .collect();
    let _ = poll(&mut polled, PollTimeout::from(longest.div_ceil(MILLISECOND) as u16));
}

fn move_aside(path: &Path) -> io::Result<()> {
    let aside =
        (1..).map(|number| path.with_extension(format!("page.bad-{number}"))).find(|path| !path.exists());
    fs::rename(path, aside.expect("numbers do not end"))
}

fn slots() -> impl Iterator<Item = SlotIndex> {
    (0..nvshare::slot::SLOTS).filter_map(SlotIndex::new)
}

/// Takes over a page with its clients: reaps those that died meanwhile, and audits.
fn adopt(served: &Served, dir: &Path) -> Vec<Survivor> {
    let Served { page, gpu, record, .. } = served;
    page.adopt(std::process::id());
    let mut survivors: Vec<_> = slots().filter_map(|slot| survivor(page, *gpu, dir, slot)).collect();
    page.rebuild_occupied();
    survivors.retain(|survivor| page.owner(survivor.slot).is_some());
    for slot in slots() {
        let of_slot = survivors.iter().find(|survivor| survivor.slot == slot);
        write_down(record, slot, of_slot.and_then(|survivor| survivor.life.as_ref()));
    }
    tracing::info!(%gpu, clients = survivors.len(), "took its page over");
    settle_unowned(page);
    audit(page, *gpu);
    survivors
}

/// Writes down where the page is to be had: at the process of the client in a slot, if it can be seen from here.
pub fn write_down(record: &Record, slot: SlotIndex, client: Option<&Life>) {
    let pid = client.filter(|life| life.record.is_seen()).map_or(0, |life| life.record.pid);
    if let Err(error) = record.set_client(slot, pid) {
        // Clients bring the page themselves, only later.
        tracing::warn!(slot = slot.get(), "the record of who has the page cannot be written: {error}");
    }
}

/// The client in a slot, if it lives; else its books are closed.
fn survivor(page: &Page, gpu: GpuUuid, dir: &Path, slot: SlotIndex) -> Option<Survivor> {
    let Some(life) = Life::find(dir, gpu, slot) else { return survivor_without_file(page, gpu, slot) };
    let LifeRecord { generation, .. } = life.record;
    if !life.is_held() {
        reap(page, gpu, slot, "its process ended, or ran another program, while no arbiter ran");
        life.end();
        return None;
    }
    let process = life.record.process();
    if page.set_owner(slot, process, generation) {
        tracing::warn!(%gpu, slot = slot.get(), pid = process.pid, "its page named somebody else as this slot's client: put right");
    }
    let pidfd = life.record.is_seen().then(|| liveness::reopen(process)).flatten();
    Some(Survivor { slot, life: Some(life), pidfd })
}

/// A slot that the page says is owned, and that has no life file. An arbiter that was killed before it had answered leaves
/// one, which nobody uses.
fn survivor_without_file(page: &Page, gpu: GpuUuid, slot: SlotIndex) -> Option<Survivor> {
    let process = page.owner(slot)?;
    match liveness::reopen(process).filter(|_| page.is_claimed(slot)) {
        Some(pidfd) => Some(Survivor { slot, life: None, pidfd: Some(pidfd) }),
        None => {
            reap(page, gpu, slot, "nobody was told of its slot");
            None
        }
    }
}

/// An arbiter that was killed between closing a slot and giving its granules back left an account that
/// nobody owns.
fn settle_unowned(page: &Page) {
    for slot in slots().filter(|slot| page.owner(*slot).is_none()) {
        page.close_account(slot);
    }
}

/// Closes the books of a client, and says so.
pub fn reap(page: &Page, gpu: GpuUuid, slot: SlotIndex, why: &str) {
    let began = nvshare::sync::now();
    let name = page.details(slot).map_or_else(String::new, |details| details.name);
    let Some(reaped) = page.reap(slot) else { return };
    tracing::info!(
        %gpu,
        slot = slot.get(),
        pid = reaped.process.pid,
        client = name,
        phase = reaped.phase.name(),
        returned = %format_size(bytes_of(reaped.returned)),
        us = (nvshare::sync::now() - began) / 1_000,
        "{why}"
    );
}

/// Puts right what the arbiter alone decides and everybody can overwrite: which page it is, and the operator's settings.
pub fn restore(served: &Served, settings: Settings) {
    served.page.restore_identity(served.gpu);
    served.page.set_settings(settings);
}

/// Checks that the books balance, and says so if they did not.
pub fn audit(page: &Page, gpu: GpuUuid) {
    if let Audit::Repaired(granules) = page.audit() {
        tracing::warn!(
            %gpu,
            granules,
            "the books did not balance: the pool's counter was off by {} and is right now",
            format_size(bytes_of(granules.unsigned_abs().min(u64::from(u32::MAX)) as u32))
        );
    }
}
