//! The pages: made, adopted from an arbiter before, or moved aside.

use crate::liveness;
use nvshare::audit::Audit;
use nvshare::lock::SlotSet;
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

/// Clients that were alive when this arbiter took a page over: their slots, and a descriptor for each.
pub type Survivors = Vec<(SlotIndex, OwnedFd)>;

/// Why a page could not be served.
#[derive(Debug, thiserror::Error)]
#[error("the page {} cannot be {what}: {cause}", .path.display())]
pub struct PageFileError {
    path: PathBuf,
    what: &'static str,
    cause: io::Error,
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
) -> Result<(Served, Survivors), PageFileError> {
    let path = paths::page(dir, gpu);
    let fail = |what| {
        let path = path.clone();
        move |cause| PageFileError { path, what, cause }
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
        return serve(dir, gpu, capacity, settings);
    };
    let survivors = adopt(&page, gpu);
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

/// Takes over a page with its clients: reaps those that died meanwhile, and audits.
fn adopt(page: &Page, gpu: GpuUuid) -> Survivors {
    page.adopt(std::process::id());
    page.rebuild_occupied();
    let mut survivors = Vec::new();
    for slot in page.occupied().iter() {
        let Some(process) = page.owner(slot) else { continue };
        match liveness::reopen(process) {
            Some(fd) => survivors.push((slot, fd)),
            None => reap(page, gpu, slot, "died while no arbiter ran"),
        }
    }
    tracing::info!(%gpu, clients = survivors.len(), "took its page over");
    settle_unowned(page);
    audit(page, gpu);
    survivors
}

/// An arbiter that was killed between closing a slot and giving its granules back left an account that
/// nobody owns.
fn settle_unowned(page: &Page) {
    let all: SlotSet = (0..nvshare::page::SLOTS).filter_map(SlotIndex::new).collect();
    for slot in all.iter().filter(|slot| page.owner(*slot).is_none()) {
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
