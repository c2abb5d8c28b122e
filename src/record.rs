//! What one arbiter writes down for the next: which memory a page is, and which processes have it.
//!
//! A page is a sealed memfd ([`crate::sealed`]), which has no name. It exists for as long as the arbiter or a client has it open
//! or mapped. The next arbiter gets it from a process that the record names ([`Record::page`]), or a client sends it
//! ([`crate::presence`]). When no process has it any more, none needs it.
//!
//! A record is a file in the runtime directory that only the arbiter's user can open. Its name, `GPU-….page`, tells everybody
//! which GPUs are served. Its disk space is allocated when it is made, so it can always be written.

use crate::map::MappedPage;
use crate::page::LAYOUT_VERSION;
use crate::paths;
use crate::register::RegisterError;
use crate::release;
use crate::sealed::{self, Identity};
use crate::slot::{SLOTS, SlotIndex};
use crate::units::GpuUuid;
use bytemuck::{Pod, Zeroable};
use nix::fcntl::posix_fallocate;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

const MAGIC: u64 = u64::from_le_bytes(*b"nvsh-rec");

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Head {
    magic: u64,
    layout_version: u32,
    slots: u32,
    gpu: [u8; 16],
    device: u64,
    inode: u64,
    arbiter: u32,
    zero: u32,
}

/// Why a record could not be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file system's.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The file is no record.
    #[error("it is no record of an arbiter ({0})")]
    Foreign(String),
    /// An arbiter of a release with another page layout wrote it.
    #[error("it {}", release::of_an_arbiter(*.found, LAYOUT_VERSION))]
    Layout {
        /// Its layout.
        found: u32,
    },
}

/// An arbiter's record of one GPU.
#[derive(Debug)]
pub struct Record {
    file: File,
    page: Identity,
    arbiter: u32,
    /// The user who owns the file, and so the page.
    user: u32,
}

impl Record {
    /// Makes the record of a page that this process serves. Replaces a file of that name.
    ///
    /// # Errors
    /// The file system's.
    pub fn create(dir: &Path, gpu: GpuUuid, page: &File) -> io::Result<Self> {
        let path = paths::page(dir, gpu);
        // Under another name until it is whole, so that nobody reads half a record.
        let draft = path.with_extension(format!("draft-{}", std::process::id()));
        let _ = std::fs::remove_file(&draft);
        let made = File::options().read(true).write(true).create_new(true).mode(0o600).open(&draft);
        let filled = made.and_then(|file| Self::fill(file, gpu, page));
        let record = filled.and_then(|record| std::fs::rename(&draft, &path).map(|()| record));
        if record.is_err() {
            let _ = std::fs::remove_file(&draft);
        }
        record
    }

    fn fill(file: File, gpu: GpuUuid, page: &File) -> io::Result<Self> {
        posix_fallocate(&file, 0, place(SLOTS) as i64)?;
        let page = Identity::of(page)?;
        let record = Self { user: file.metadata()?.uid(), file, page, arbiter: std::process::id() };
        record.write_head(gpu)?;
        Ok(record)
    }

    fn write_head(&self, gpu: GpuUuid) -> io::Result<()> {
        let head = Head {
            magic: MAGIC,
            layout_version: LAYOUT_VERSION,
            slots: SLOTS as u32,
            gpu: gpu.0,
            device: self.page.device,
            inode: self.page.inode,
            arbiter: self.arbiter,
            zero: 0,
        };
        self.file.write_all_at(bytemuck::bytes_of(&head), 0)
    }

    /// Opens the record of a GPU, to read it or also to write it.
    ///
    /// # Errors
    /// There is none, it cannot be opened, or it is not a record of this release and, to write it, of this user.
    pub fn open(dir: &Path, gpu: GpuUuid, write: bool) -> Result<Self, RecordError> {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = File::options().read(true).write(write).custom_flags(flags).open(paths::page(dir, gpu))?;
        let data = file.metadata()?;
        let foreign = |why: String| Err(RecordError::Foreign(why));
        let wrong_size = || format!("it has {} bytes instead of {}", data.len(), place(SLOTS));
        let mut head = Head::zeroed();
        if data.len() < size_of::<Head>() as u64 {
            return foreign(wrong_size());
        }
        file.read_exact_at(bytemuck::bytes_of_mut(&mut head), 0)?;
        if write && data.uid() != nix::unistd::geteuid().as_raw() {
            return foreign(format!("it belongs to user {}", data.uid()));
        }
        if head.magic != MAGIC {
            return foreign("wrong magic".into());
        }
        if head.layout_version != LAYOUT_VERSION {
            // Before the size, which may differ between releases.
            return Err(RecordError::Layout { found: head.layout_version });
        }
        if data.len() != place(SLOTS) {
            return foreign(wrong_size());
        }
        if head.slots != SLOTS as u32 {
            return foreign(format!("{} slots instead of {SLOTS}", head.slots));
        }
        if head.gpu != gpu.0 {
            return foreign(format!("it is of {}", GpuUuid(head.gpu)));
        }
        let page = Identity { device: head.device, inode: head.inode };
        Ok(Self { file, page, arbiter: head.arbiter, user: data.uid() })
    }

    /// Writes that this process serves the page from now on.
    ///
    /// # Errors
    /// The file system's.
    pub fn take_over(&mut self, gpu: GpuUuid) -> io::Result<()> {
        self.arbiter = std::process::id();
        self.write_head(gpu)
    }

    /// Writes the process of the client in a slot, by the pid that this process sees; 0 for none.
    ///
    /// # Errors
    /// The file system's.
    pub fn set_client(&self, slot: SlotIndex, pid: u32) -> io::Result<()> {
        self.file.write_all_at(&pid.to_le_bytes(), place(slot.get()))
    }

    /// Whether an open file is the page of this record.
    pub fn is_page(&self, file: &File) -> bool {
        sealed::is(file, self.page, self.user)
    }

    /// The page, opened through the first process in the record that has it and that this process may look into.
    pub fn page(&self) -> Option<File> {
        let mut pids = [0u32; SLOTS];
        self.file.read_exact_at(bytemuck::cast_slice_mut(&mut pids), place(0)).ok()?;
        let pids = std::iter::once(self.arbiter).chain(pids).filter(|pid| *pid != 0);
        pids.into_iter().find_map(|pid| sealed::at_process(pid, self.page, self.user))
    }
}

fn place(index: usize) -> u64 {
    (size_of::<Head>() + index * size_of::<u32>()) as u64
}

/// The page of a GPU, whether an arbiter runs or not. For root and for the arbiter's user; other users ask the arbiter
/// ([`crate::register::look`]).
///
/// # Errors
/// There is no record, this user may not open it, or no process has the page any more.
pub fn open_page(dir: &Path, gpu: GpuUuid) -> io::Result<MappedPage> {
    let record = Record::open(dir, gpu, false).map_err(|error| match error {
        RecordError::Io(error) => error,
        foreign => io::Error::other(foreign),
    })?;
    let gone = || {
        io::Error::new(io::ErrorKind::NotFound, "no arbiter runs, and no client is left that has the page")
    };
    MappedPage::open(record.page().ok_or_else(gone)?).map_err(io::Error::other)
}

/// The page of a GPU to look at: by [`open_page`] if this user may, else from the arbiter, which sends it to everybody
/// read-only.
///
/// # Errors
/// A sentence that says why neither was possible.
pub fn view_page(dir: &Path, gpu: GpuUuid) -> Result<MappedPage, String> {
    let own = match open_page(dir, gpu) {
        Ok(page) => return Ok(page),
        Err(error) => error,
    };
    match crate::register::look(&paths::socket(dir), gpu, Duration::ZERO) {
        Ok(page) => Ok(page),
        // Without an arbiter, only the page that this user may open by itself is left.
        Err(RegisterError::NoArbiter { .. }) if own.kind() != io::ErrorKind::PermissionDenied => {
            Err(own.to_string())
        }
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map;

    const GPU: GpuUuid = GpuUuid([6; 16]);

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no memfd")]
    fn the_next_arbiter_reads_what_the_last_one_wrote() {
        let dir = tempfile::tempdir().unwrap();
        let (file, page) = map::create(GPU, 9).unwrap();
        let record = Record::create(dir.path(), GPU, &file).unwrap();
        let slot = SlotIndex::new(1).unwrap();
        record.set_client(slot, std::process::id()).unwrap();
        // Not through the process that wrote it, which is this one: through the client.
        record.file.write_all_at(&0u32.to_le_bytes(), std::mem::offset_of!(Head, arbiter) as u64).unwrap();
        let next = Record::open(dir.path(), GPU, true).unwrap();
        assert!(next.is_page(&file) && !next.is_page(&map::create(GPU, 9).unwrap().0));
        assert_eq!(Identity::of(&next.page().unwrap()).unwrap(), Identity::of(&file).unwrap());
        page.set_capacity(12);
        assert_eq!(open_page(dir.path(), GPU).unwrap().capacity(), 12);
        drop((file, page));
        let gone = open_page(dir.path(), GPU).err().unwrap().to_string();
        assert!(next.page().is_none() && gone.contains("no client is left"), "{gone}");
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no memfd")]
    fn what_is_no_record_is_refused() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        let path = paths::page(dir.path(), GPU);
        let (file, _page) = map::create(GPU, 9).unwrap();
        let why = || Record::open(dir.path(), GPU, true).unwrap_err().to_string();
        std::fs::write(&path, b"short").unwrap();
        assert!(why().contains("5 bytes"), "{}", why());
        std::fs::write(&path, vec![0; place(SLOTS) as usize]).unwrap();
        assert!(why().contains("wrong magic"), "{}", why());
        Record::create(dir.path(), GPU, &file).unwrap().file.write_all_at(&9u32.to_le_bytes(), 8).unwrap();
        assert!(
            why().contains("page layout 9 and this program") && why().contains("start this program again"),
            "{}",
            why()
        );
        // Also if a record of that release has another size.
        File::options().write(true).open(&path).unwrap().set_len(size_of::<Head>() as u64 + 8).unwrap();
        assert!(
            matches!(Record::open(dir.path(), GPU, true), Err(RecordError::Layout { found: 9 })),
            "{}",
            why()
        );
        std::fs::remove_file(&path).unwrap();
        let victim = dir.path().join("victim");
        File::create(&victim).unwrap().write_all(b"precious").unwrap();
        std::os::unix::fs::symlink(&victim, &path).unwrap();
        assert!(
            matches!(Record::open(dir.path(), GPU, true), Err(RecordError::Io(_))),
            "no link is followed"
        );
        Record::create(dir.path(), GPU, &file).unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
    }
}
