//! Lock files of clients: how this arbiter and every later one know whether a client lives. (The documents call them life
//! files.)
//!
//! A registered client has a file in the runtime directory, `GPU-….slot-N.client`. The arbiter writes into it whose it is,
//! and gives the client a read-only descriptor of it, with a lock on the open file description. The client keeps the
//! descriptor where no child inherits it ([`nvshare::presence`]), so the kernel releases the lock when the client's process
//! ends or executes another program, whether or not an arbiter runs then, and whether or not it could see the process.
//!
//! Only the arbiter's user can open the file, so its content can be trusted, unlike the page; and a process that shows a
//! descriptor of the file is the client.

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nvshare::SlotIndex;
use nvshare::paths;
pub use nvshare::processes::own_namespace;
use nvshare::slot::Process;
use nvshare::units::GpuUuid;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Whose a slot is, as the arbiter wrote it down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientRecord {
    /// The pid: the arbiter's for the process, or the process's own if the arbiter cannot see it.
    pub pid: u32,
    /// When the process started, in clock ticks since boot, or a unique number ([`crate::process::UNSEEN`]).
    pub started: u64,
    /// The pid namespace of that pid ([`own_namespace`]), or 0 if the arbiter cannot see the process.
    pub namespace: u64,
    /// How many owners the slot has had, this one included.
    pub generation: u32,
    /// The user that registered.
    pub uid: u32,
}

impl ClientRecord {
    /// The process, as the page names it.
    pub fn process(&self) -> Process {
        Process { pid: self.pid, started: self.started }
    }

    /// Whether the pid is of this process's pid namespace.
    pub fn is_seen(&self) -> bool {
        self.namespace != 0 && self.namespace == own_namespace()
    }
}

/// A slot's lock file. It stays when this is dropped, for the next arbiter; [`ClientLock::remove`] removes it.
#[derive(Debug)]
pub struct ClientLock {
    path: PathBuf,
    /// The arbiter's own open file description, which has no lock.
    file: File,
    /// Whose it is.
    pub record: ClientRecord,
}

impl ClientLock {
    /// Creates a slot's file, in place of an older owner's.
    ///
    /// # Errors
    /// The file system's.
    pub fn create(dir: &Path, gpu: GpuUuid, slot: SlotIndex, record: ClientRecord) -> io::Result<Self> {
        let path = paths::life(dir, gpu, slot);
        // It has another name until it is complete; and it is a new file, which no process has a descriptor of.
        let draft = path.with_extension("draft");
        let _ = fs::remove_file(&draft);
        let mut file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&draft)?;
        file.write_all(&serde_json::to_vec(&record)?)?;
        fs::rename(&draft, &path)?;
        Ok(Self { path, file, record })
    }

    /// Opens the file that an arbiter before created for a slot. `None` if there is none, or if it makes no sense.
    pub fn open(dir: &Path, gpu: GpuUuid, slot: SlotIndex) -> Option<Self> {
        let path = paths::life(dir, gpu, slot);
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let mut file = File::options().read(true).write(true).custom_flags(flags).open(&path).ok()?;
        // In a directory like /tmp another user may have made it.
        if file.metadata().ok()?.uid() != nix::unistd::geteuid().as_raw() {
            return None;
        }
        let mut text = Vec::new();
        file.read_to_end(&mut text).ok()?;
        let record = serde_json::from_slice(&text).ok()?;
        Some(Self { path, file, record })
    }

    /// A read-only descriptor for the client, with the lock.
    ///
    /// # Errors
    /// The file system's.
    pub fn lend(&self) -> io::Result<OwnedFd> {
        let lent = File::open(&self.path)?;
        fcntl(lent.as_fd(), FcntlArg::F_OFD_SETLK(&whole(libc::F_RDLCK)))?;
        Ok(lent.into())
    }

    /// Whether some process has a descriptor that was lent: the client lives. True too if that cannot be found out.
    pub fn is_held(&self) -> bool {
        let mut lock = whole(libc::F_WRLCK);
        match fcntl(self.file.as_fd(), FcntlArg::F_OFD_GETLK(&mut lock)) {
            Ok(_) => libc::c_int::from(lock.l_type) != libc::F_UNLCK,
            Err(_) => true,
        }
    }

    /// Whether a descriptor is of this file.
    pub fn is_same_file(&self, fd: &OwnedFd) -> bool {
        let Ok(shown) = fd.try_clone().map(File::from).and_then(|file| file.metadata()) else { return false };
        self.file.metadata().is_ok_and(|own| (own.dev(), own.ino()) == (shown.dev(), shown.ino()))
    }

    /// Removes the file: the client has ended, and its books are closed.
    pub fn remove(self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// A lock of this kind on a whole file, as fcntl takes it.
fn whole(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPU: GpuUuid = GpuUuid([5; 16]);

    fn create() -> (tempfile::TempDir, ClientLock) {
        let dir = tempfile::tempdir().unwrap();
        let record =
            ClientRecord { pid: 42, started: 7, namespace: own_namespace(), generation: 3, uid: 1000 };
        let lock = ClientLock::create(dir.path(), GPU, SlotIndex::new(9).unwrap(), record).unwrap();
        (dir, lock)
    }

    #[test]
    fn a_lock_is_free_with_the_last_descriptor_and_any_arbiter_sees_it() {
        let (dir, lock) = create();
        assert!(!lock.is_held(), "nobody was lent it");
        let lent = lock.lend().unwrap();
        let successor = ClientLock::open(dir.path(), GPU, SlotIndex::new(9).unwrap()).unwrap();
        assert_eq!(successor.record, lock.record);
        assert!(lock.is_held() && successor.is_held());
        let inherited = lent.try_clone().unwrap();
        drop(lent);
        assert!(successor.is_held(), "one is left");
        assert!(successor.is_same_file(&inherited));
        drop(inherited);
        assert!(!successor.is_held() && !lock.is_held());
    }

    #[test]
    fn the_next_owner_of_a_slot_has_another_file() {
        let (dir, first) = create();
        let held = first.lend().unwrap();
        let second = ClientLock::create(dir.path(), GPU, SlotIndex::new(9).unwrap(), first.record).unwrap();
        assert!(!second.is_held() && !second.is_same_file(&held));
        assert!(second.lend().is_ok_and(|lent| second.is_same_file(&lent)));
        second.remove();
        assert!(ClientLock::open(dir.path(), GPU, SlotIndex::new(9).unwrap()).is_none());
    }

    #[test]
    fn a_client_cannot_write_what_it_is_lent() {
        let (dir, lock) = create();
        let lent = File::from(lock.lend().unwrap());
        assert!(lent.set_len(0).is_err() && (&lent).write_all(b"root").is_err());
        assert_eq!(
            fs::metadata(dir.path().join(format!("{GPU}.slot-9.client"))).unwrap().mode() & 0o777,
            0o600
        );
    }
}
