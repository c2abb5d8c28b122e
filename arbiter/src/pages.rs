//! The pages: made, adopted from an arbiter before, or moved aside.

use crate::liveness;
use crate::lives::{Life, Record};
use nvshare::audit::Audit;
use nvshare::map::{MapError, MappedPage};
use nvshare::page::{PAGE_BYTES, Page, Settings, SlotIndex};
use nvshare::paths;
use nvshare::units::{GpuUuid, Granules, bytes_of, format_size};
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// A page that this arbiter serves.
pub struct Served {
    /// The GPU.
    pub gpu: GpuUuid,
    /// The page.
    pub page: MappedPage,
    /// Its file, which clients get.
    pub file: File,
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
pub enum PageFileError {
    /// The file system's.
    #[error("the page {} cannot be {what}: {cause}", .path.display())]
    Io {
        /// The page.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        cause: io::Error,
    },
    /// It has clients, and this arbiter is none that may change their pool.
    #[error(
        "the page {} has {clients} living clients in a pool of {}, of an arbiter with other settings; a private arbiter does not change a pool under its clients. Start that arbiter again, end its clients, or use another --runtime-dir",
        .path.display(), format_size(bytes_of(*.capacity))
    )]
    Lived {
        /// The page.
        path: PathBuf,
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

/// Opens the page of a GPU, or makes it. A page of this layout that is there already is taken over with
/// its clients; anything else is moved aside, and its clients are on their own.
///
/// # Errors
/// The file system's.
pub fn serve(
    dir: &Path,
    gpu: GpuUuid,
    capacity: Granules,
    settings: Settings,
    succession: Succession,
) -> Result<(Served, Vec<Survivor>), PageFileError> {
    let path = paths::page(dir, gpu);
    let fail = |what| {
        let path = path.clone();
        move |cause| PageFileError::Io { path, what, cause }
    };
    let found = match File::options().read(true).write(true).open(&path) {
        Ok(file) => match MappedPage::open(&file) {
            Ok(page) if page.gpu() == gpu => Some((file, page)),
            Ok(page) => {
                tracing::warn!(%gpu, "the page {} is of {}: moving it aside", path.display(), page.gpu());
                None
            }
            Err(MapError::Io(cause)) => return Err(fail("mapped")(cause)),
            Err(MapError::Page(why)) => {
                tracing::warn!(%gpu, "the page {} cannot be taken over, {why}: moving it aside", path.display());
                None
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // Those of a page that was moved aside: nobody here knows their clients.
            slots().filter_map(|slot| Life::find(dir, gpu, slot)).for_each(Life::end);
            let (file, page) = create(&path, gpu, capacity).map_err(fail("made"))?;
            page.set_settings(settings);
            page.adopt(std::process::id());
            tracing::info!(%gpu, capacity = %format_size(bytes_of(capacity)), "made its page");
            return Ok((Served { gpu, page, file }, Vec::new()));
        }
        Err(error) => return Err(fail("opened")(error)),
    };
    let Some((file, page)) = found else {
        move_aside(&path).map_err(fail("moved aside"))?;
        return serve(dir, gpu, capacity, settings, succession);
    };
    let survivors = adopt(&page, gpu, dir);
    if !survivors.is_empty() && succession == Succession::Stranger {
        return Err(PageFileError::Lived { path, clients: survivors.len(), capacity: page.capacity() });
    }
    page.set_settings(settings);
    if page.set_capacity(capacity) {
        tracing::info!(%gpu, capacity = %format_size(bytes_of(capacity)), "the pool has another size now");
    }
    page.decide();
    Ok((Served { gpu, page, file }, survivors))
}

fn create(path: &Path, gpu: GpuUuid, capacity: Granules) -> io::Result<(File, MappedPage)> {
    // Under another name until it is whole, so that nobody maps half a page.
    let draft = path.with_extension(format!("draft-{}", std::process::id()));
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&draft)?;
    file.set_len(PAGE_BYTES as u64)?;
    let page = MappedPage::map(&file).map_err(|error| io::Error::other(error.to_string()))?;
    page.initialise(gpu, capacity);
    fs::rename(&draft, path)?;
    Ok((file, page))
}

fn move_aside(path: &Path) -> io::Result<()> {
    let aside =
        (1..).map(|number| path.with_extension(format!("page.bad-{number}"))).find(|path| !path.exists());
    fs::rename(path, aside.expect("numbers do not end"))
}

fn slots() -> impl Iterator<Item = SlotIndex> {
    (0..nvshare::page::SLOTS).filter_map(SlotIndex::new)
}

/// Takes over a page with its clients: reaps those that died meanwhile, and audits.
fn adopt(page: &Page, gpu: GpuUuid, dir: &Path) -> Vec<Survivor> {
    page.adopt(std::process::id());
    let mut survivors: Vec<_> = slots().filter_map(|slot| survivor(page, gpu, dir, slot)).collect();
    page.rebuild_occupied();
    survivors.retain(|survivor| page.owner(survivor.slot).is_some());
    tracing::info!(%gpu, clients = survivors.len(), "took its page over");
    settle_unowned(page);
    audit(page, gpu);
    survivors
}

/// The client in a slot, if it lives; else its books are closed.
fn survivor(page: &Page, gpu: GpuUuid, dir: &Path, slot: SlotIndex) -> Option<Survivor> {
    let Some(life) = Life::find(dir, gpu, slot) else { return survivor_without_file(page, gpu, slot) };
    let Record { generation, .. } = life.record;
    if !life.is_held() {
        reap(page, gpu, slot, "its process ended, or ran another program, while no arbiter ran");
        life.end();
        return None;
    }
    let process = life.record.process();
    if page.owner(slot) != Some(process) || page.generation(slot) != generation {
        tracing::warn!(%gpu, slot = slot.get(), pid = process.pid, "its page named somebody else as this slot's client: put right");
        page.set_owner(slot, process, generation);
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
