//! Makes the page of a GPU, or takes it over from an arbiter before.

use super::page_from_client::Listen;
use super::served::ServedPage;
use super::takeover::{self, Survivor};
use nvshare::page::{LAYOUT_VERSION, Settings};
use nvshare::paths;
use nvshare::record::{Record, RecordError};
use nvshare::release::RELEASE;
use nvshare::units::{GpuUuid, Granules, bytes_of, format_size};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

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
        /// The system's error.
        cause: io::Error,
    },
    /// The page has clients, and this arbiter may not change their pool.
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
    /// It may take over their clients, and give the pool its own size: it is the operator's, or has the same settings.
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

/// Takes over the page of a GPU with its clients, or makes one with a pool of `capacity`. A record in `dir` that makes no
/// sense is moved aside; clients whose page nobody brings are on their own. `listen` is where they can bring it.
///
/// # Errors
/// The file system's, there is no memory for a page, or it has clients whose pool this arbiter may not change.
pub fn open(
    dir: &Path,
    gpu: GpuUuid,
    capacity: Granules,
    settings: Settings,
    succession: Succession,
    listen: Listen<'_>,
) -> Result<(ServedPage, Vec<Survivor>), PageError> {
    let fail = |what| move |cause| PageError::Io { gpu, dir: dir.to_owned(), what, cause };
    let taken_over = match open_record(dir, gpu)? {
        Some(record) => takeover::take_over(record, gpu, dir, listen).map_err(fail("taken over"))?,
        None => None,
    };
    let Some((served, survivors)) = taken_over else {
        takeover::remove_lock_files(dir, gpu);
        let served = ServedPage::create(dir, gpu, capacity).map_err(fail("made"))?;
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

/// The record that an arbiter before has left, if there is one. One that makes no sense is moved aside.
fn open_record(dir: &Path, gpu: GpuUuid) -> Result<Option<Record>, PageError> {
    let fail = |what| move |cause| PageError::Io { gpu, dir: dir.to_owned(), what, cause };
    match Record::open(dir, gpu, true) {
        Ok(record) => Ok(Some(record)),
        Err(RecordError::Io(error)) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(RecordError::Io(error)) => Err(fail("opened")(error)),
        Err(RecordError::Foreign(why)) => {
            let path = paths::page(dir, gpu);
            tracing::warn!(%gpu, "{} cannot be taken over, it is no record of an arbiter ({why}): moving it aside", path.display());
            move_aside(&path).map_err(fail("moved aside"))?;
            Ok(None)
        }
        Err(RecordError::Layout { found }) => {
            let path = paths::page(dir, gpu);
            tracing::warn!(%gpu, "{} cannot be taken over: it has page layout {found} and this arbiter, nvshare {RELEASE}, has {LAYOUT_VERSION}; moving it aside. Clients of that release that still live keep their memory for themselves: end them and start them again", path.display());
            move_aside(&path).map_err(fail("moved aside"))?;
            Ok(None)
        }
    }
}

/// Renames a file to the first free name of the form `.page.bad-N`.
fn move_aside(path: &Path) -> io::Result<()> {
    let mut names = (1..).map(|number| path.with_extension(format!("page.bad-{number}")));
    let aside = names.find(|path| !path.exists()).expect("numbers do not end");
    fs::rename(path, aside)
}
