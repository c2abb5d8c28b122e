//! Life files: how this arbiter and every later one know whether a client lives.
//!
//! A registered client has a file in the runtime directory, `GPU-….slot-N.client`. The arbiter writes down whose it is,
//! and gives the client a descriptor of it, read-only, with a lock on the open file description. The client keeps the
//! descriptor where nobody else has it ([`nvshare::presence`]), so the kernel takes the lock back when the client's process
//! ends or runs another program, whether or not an arbiter runs then, and whether or not it could see the process.
//!
//! Only the arbiter's user can open the file, so what it says can be trusted, other than the page; and whoever shows a
//! descriptor of it is the client.

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nvshare::SlotIndex;
use nvshare::paths;
use nvshare::slot::Process;
use nvshare::units::GpuUuid;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Whose a slot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The pid: as the arbiter sees it, or, of a process that it cannot see, as that sees itself.
    pub pid: u32,
    /// When the process started ([`Process::started`]).
    pub started: u64,
    /// The pid namespace in which that is so ([`own_namespace`]), or 0 if the arbiter cannot see the process.
    pub namespace: u64,
    /// How many owners the slot has had.
    pub generation: u32,
    /// The user that registered.
    pub uid: u32,
}

impl Record {
    /// The process, as the page names it.
    pub fn process(&self) -> Process {
        Process { pid: self.pid, started: self.started }
    }

    /// Whether the pid means the same here.
    pub fn is_seen(&self) -> bool {
        self.namespace != 0 && self.namespace == own_namespace()
    }
}

/// This process's pid namespace.
pub fn own_namespace() -> u64 {
    fs::metadata("/proc/self/ns/pid").map_or(0, |namespace| namespace.ino())
}

/// A slot's life file. Gone when dropped with [`Life::end`].
#[derive(Debug)]
pub struct Life {
    path: PathBuf,
    /// The arbiter's own description, which has no lock.
    file: File,
    /// Whose it is.
    pub record: Record,
}

impl Life {
    /// Makes a slot's file, in place of an older owner's.
    ///
    /// # Errors
    /// The file system's.
    pub fn begin(dir: &Path, gpu: GpuUuid, slot: SlotIndex, record: Record) -> io::Result<Self> {
        let path = paths::life(dir, gpu, slot);
        // Under another name until it is whole; and a new file, which nobody has a descriptor of.
        let draft = path.with_extension("draft");
        let _ = fs::remove_file(&draft);
        let mut file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&draft)?;
        file.write_all(&serde_json::to_vec(&record)?)?;
        fs::rename(&draft, &path)?;
        Ok(Self { path, file, record })
    }

    /// The file that an arbiter before made for a slot, if there is one.
    pub fn find(dir: &Path, gpu: GpuUuid, slot: SlotIndex) -> Option<Self> {
        let path = paths::life(dir, gpu, slot);
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let mut file = File::options().read(true).write(true).custom_flags(flags).open(&path).ok()?;
        // In a directory like /tmp somebody else may have made it.
        if file.metadata().ok()?.uid() != nix::unistd::geteuid().as_raw() {
            return None;
        }
        let mut text = Vec::new();
        file.read_to_end(&mut text).ok()?;
        let record = serde_json::from_slice(&text).ok()?;
        Some(Self { path, file, record })
    }

    /// A descriptor for the client, with its lock.
    ///
    /// # Errors
    /// The file system's.
    pub fn lend(&self) -> io::Result<OwnedFd> {
        let lent = File::open(&self.path)?;
        fcntl(lent.as_fd(), FcntlArg::F_OFD_SETLK(&whole(libc::F_RDLCK)))?;
        Ok(lent.into())
    }

    /// Whether some process has a descriptor that was lent: the client lives. What cannot be found out is a life.
    pub fn is_held(&self) -> bool {
        let mut lock = whole(libc::F_WRLCK);
        match fcntl(self.file.as_fd(), FcntlArg::F_OFD_GETLK(&mut lock)) {
            Ok(_) => libc::c_int::from(lock.l_type) != libc::F_UNLCK,
            Err(_) => true,
        }
    }

    /// Whether a descriptor is of this file.
    pub fn is_shown_by(&self, fd: &OwnedFd) -> bool {
        let Ok(shown) = fd.try_clone().map(File::from).and_then(|file| file.metadata()) else { return false };
        self.file.metadata().is_ok_and(|own| (own.dev(), own.ino()) == (shown.dev(), shown.ino()))
    }

    /// The client has ended, and its books are closed.
    pub fn end(self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// A lock on all of a file.
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

    fn begin(name: &str) -> (PathBuf, Life) {
        let dir = std::env::temp_dir().join(format!("nvshare-lives-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let record = Record { pid: 42, started: 7, namespace: own_namespace(), generation: 3, uid: 1000 };
        let life = Life::begin(&dir, GPU, SlotIndex::new(9).unwrap(), record).unwrap();
        (dir, life)
    }

    #[test]
    fn a_life_ends_with_the_last_descriptor_and_any_arbiter_sees_it() {
        let (dir, life) = begin("ends");
        assert!(!life.is_held(), "nobody was lent it");
        let lent = life.lend().unwrap();
        let successor = Life::find(&dir, GPU, SlotIndex::new(9).unwrap()).unwrap();
        assert_eq!(successor.record, life.record);
        assert!(life.is_held() && successor.is_held());
        let inherited = lent.try_clone().unwrap();
        drop(lent);
        assert!(successor.is_held(), "one is left");
        assert!(successor.is_shown_by(&inherited));
        drop(inherited);
        assert!(!successor.is_held() && !life.is_held());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn the_next_owner_of_a_slot_has_another_file() {
        let (dir, first) = begin("next");
        let held = first.lend().unwrap();
        let second = Life::begin(&dir, GPU, SlotIndex::new(9).unwrap(), first.record).unwrap();
        assert!(!second.is_held() && !second.is_shown_by(&held));
        assert!(second.lend().is_ok_and(|lent| second.is_shown_by(&lent)));
        second.end();
        assert!(Life::find(&dir, GPU, SlotIndex::new(9).unwrap()).is_none());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_client_cannot_write_what_it_is_lent() {
        let (dir, life) = begin("lent");
        let lent = File::from(life.lend().unwrap());
        assert!(lent.set_len(0).is_err() && (&lent).write_all(b"root").is_err());
        assert_eq!(fs::metadata(dir.join(format!("{GPU}.slot-9.client"))).unwrap().mode() & 0o777, 0o600);
        fs::remove_dir_all(dir).unwrap();
    }
}
