//! The pages of a runtime directory, opened to look at.

use nvshare::map::MappedPage;
use nvshare::units::GpuUuid;
use nvshare::{paths, record};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Why there is nothing to read in a runtime directory. The sentences say what to do.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The directory is not there or cannot be read.
    #[error("{}: there is no nvshare node here ({cause}). {START}", .dir.display())]
    NoNode {
        /// The directory.
        dir: PathBuf,
        /// The system's reason.
        cause: std::io::Error,
    },
    /// It has no pages.
    #[error("{}: no arbiter has made a page here. {START}", .dir.display())]
    NoPage {
        /// The directory.
        dir: PathBuf,
    },
}

const START: &str =
    "Start nvshare-arbiter or a program with `nvshare run`, or name the directory with --runtime-dir";

/// The pages of a runtime directory.
pub struct Pages {
    /// Those that can be read, by UUID.
    pub pages: Vec<MappedPage>,
    /// The others, and why they cannot.
    pub unreadable: Vec<String>,
}

impl Pages {
    /// Opens all of them.
    ///
    /// # Errors
    /// There is none, neither good nor bad.
    pub fn of(dir: &Path) -> Result<Self, ReadError> {
        let mut open = OpenPages::new(dir);
        open.refresh()?;
        let mut all = Self { pages: Vec::new(), unreadable: Vec::new() };
        for (_, opened) in open.pages {
            match opened {
                Ok(page) => all.pages.push(page),
                Err(why) => all.unreadable.push(why),
            }
        }
        Ok(all)
    }
}

/// Tells a record from the one that another arbiter, or the same one started again, has put in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RecordId {
    device: u64,
    inode: u64,
    written: (i64, i64),
}

impl RecordId {
    fn of(path: &Path) -> Option<Self> {
        let data = fs::symlink_metadata(path).ok()?;
        Some(Self { device: data.dev(), inode: data.ino(), written: (data.mtime(), data.mtime_nsec()) })
    }
}

/// The pages of a runtime directory, which stay open between one look and the next.
pub(crate) struct OpenPages {
    dir: PathBuf,
    records: BTreeMap<GpuUuid, RecordId>,
    /// By UUID; or why a page cannot be read.
    pub pages: BTreeMap<GpuUuid, Result<MappedPage, String>>,
}

impl OpenPages {
    /// Of this directory; none is open yet.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), records: BTreeMap::new(), pages: BTreeMap::new() }
    }

    /// Opens pages that are new, those whose record has changed, and again those that could not be read; closes those that
    /// are gone.
    ///
    /// # Errors
    /// There is none, neither good nor bad.
    pub fn refresh(&mut self) -> Result<(), ReadError> {
        let dir = || self.dir.clone();
        let found = paths::pages(&self.dir).map_err(|cause| ReadError::NoNode { dir: dir(), cause })?;
        if found.is_empty() {
            return Err(ReadError::NoPage { dir: dir() });
        }
        let here = |gpu: &GpuUuid| found.iter().any(|(found, _)| found == gpu);
        self.pages.retain(|gpu, _| here(gpu));
        for (gpu, path) in &found {
            // Before the page is opened: a record that is replaced meanwhile is looked at again.
            let record = RecordId::of(path);
            let same = record.is_some() && record == self.records.get(gpu).copied();
            if same && matches!(self.pages.get(gpu), Some(Ok(_))) {
                continue;
            }
            let page = record::view_page(&self.dir, *gpu).map_err(|why| format!("{}: {why}", path.display()));
            self.pages.insert(*gpu, page);
            match record {
                Some(record) => self.records.insert(*gpu, record),
                None => self.records.remove(gpu),
            };
        }
        Ok(())
    }
}
