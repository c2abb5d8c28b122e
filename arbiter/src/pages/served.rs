//! A page that is served, and what the arbiter alone writes there.

use crate::client_lock::ClientLock;
use nvshare::audit::Audit;
use nvshare::map::{self, MapError, MappedPage};
use nvshare::page::Settings;
use nvshare::record::Record;
use nvshare::sealed;
use nvshare::slot::SlotIndex;
use nvshare::sync::now;
use nvshare::units::{GpuUuid, Granules, bytes_of, format_size};
use std::fs::File;
use std::io;
use std::path::Path;

/// A page that this arbiter serves.
pub struct ServedPage {
    /// The GPU.
    pub gpu: GpuUuid,
    /// The page.
    pub page: MappedPage,
    /// The page's memory, which clients get.
    pub file: File,
    /// The same memory for processes that only look: this descriptor cannot write.
    pub read_only: File,
    /// Where the next arbiter finds the page.
    pub record: Record,
}

impl ServedPage {
    /// Makes a page for a GPU with a pool of `capacity`, and its record in `dir`.
    ///
    /// # Errors
    /// There is no memory for the page, or the record cannot be written.
    pub(super) fn create(dir: &Path, gpu: GpuUuid, capacity: Granules) -> io::Result<Self> {
        let (file, page) = map::create(gpu, capacity).map_err(|error| match error {
            MapError::Io(error) => error,
            MapError::Page(error) => io::Error::other(error),
        })?;
        let record = Record::create(dir, gpu, &file)?;
        Ok(Self { gpu, page, read_only: sealed::read_only(&file)?, file, record })
    }

    /// Maps the page that a record names, and takes the record over.
    ///
    /// # Errors
    /// The memory cannot be mapped or is no page, or the record cannot be written.
    pub(super) fn from_record(mut record: Record, gpu: GpuUuid, file: File) -> io::Result<Self> {
        record.take_over(gpu)?;
        let page = match MappedPage::map(&file) {
            Err(MapError::Io(error)) => return Err(error),
            other => other.map_err(io::Error::other)?,
        };
        // The kernel identifies the memory, so it is the page that the record names, whatever somebody has written into it.
        page.restore_identity(gpu);
        Ok(Self { gpu, page, read_only: sealed::read_only(&file)?, file, record })
    }

    /// Puts right what the arbiter alone decides and everybody can overwrite: which page it is, and the operator's settings.
    pub fn restore(&self, settings: Settings) {
        self.page.restore_identity(self.gpu);
        self.page.set_settings(settings);
    }

    /// Checks that the books balance, and logs a repair if they did not.
    pub fn audit(&self) {
        if let Audit::Repaired(granules) = self.page.audit() {
            tracing::warn!(
                gpu = %self.gpu,
                granules,
                "the books did not balance: the pool's counter was off by {} and is right now",
                format_size(bytes_of(granules.unsigned_abs().min(u64::from(u32::MAX)) as u32))
            );
        }
    }

    /// Closes the books of the client in a slot, if there is one, and logs it. `why` is the log's message.
    pub fn reap(&self, slot: SlotIndex, why: &str) {
        let began = now();
        let name = self.page.details(slot).map_or_else(String::new, |details| details.name);
        let Some(reaped) = self.page.reap(slot) else { return };
        tracing::info!(
            gpu = %self.gpu,
            slot = slot.get(),
            pid = reaped.process.pid,
            client = name,
            phase = reaped.phase.name(),
            returned = %format_size(bytes_of(reaped.returned)),
            us = (now() - began) / 1_000,
            "{why}"
        );
    }

    /// Writes into the record that the client in a slot has the page, if its process can be seen from here. A failure is
    /// logged: the next arbiter then waits for a client to bring the page.
    pub fn record_client(&self, slot: SlotIndex, client: Option<&ClientLock>) {
        let pid = client.filter(|lock| lock.record.is_seen()).map_or(0, |lock| lock.record.pid);
        if let Err(error) = self.record.set_client(slot, pid) {
            tracing::warn!(slot = slot.get(), "the record of who has the page cannot be written: {error}");
        }
    }
}
