//! The runtime directory: it must have room, and one arbiter serves it at a time.

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nvshare::paths;
use nvshare::units::format_size;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What the runtime directory must have left, in bytes: for the lock, the records of all GPUs, and their successors.
const MIN_FREE: u64 = 64 << 10;

/// Checks that the runtime directory's file system is not full, which would show only when a client registers.
///
/// # Errors
/// A sentence for the operator.
pub fn check_free_space(dir: &Path) -> Result<(), String> {
    let room = nix::sys::statvfs::statvfs(dir)
        .map_err(|error| format!("the runtime directory {} cannot be looked at: {error}", dir.display()))?;
    // Some file systems have no bound, and say so with zeros.
    let left = room.blocks_available().saturating_mul(room.fragment_size());
    if room.blocks() > 0 && left < MIN_FREE {
        return Err(format!(
            "the file system of the runtime directory {} is full: it has {} left, and the arbiter needs {}; make room there, or name another --runtime-dir",
            dir.display(),
            format_size(left),
            format_size(MIN_FREE)
        ));
    }
    Ok(())
}

/// The lock on a runtime directory's lock file, held for as long as this lives. The file holds the arbiter's pid, and how it
/// sizes its pools ([`crate::options::Options::pools`]).
pub struct DirectoryLock {
    path: PathBuf,
    file: Flock<File>,
    /// How the arbiter before sized its pools. `None`: not known.
    pub before: Option<String>,
}

/// The size of the lock file in bytes. It is always written whole and in one call, so whenever an arbiter is killed, the next one
/// reads either what was there or what was written.
const FILE_SIZE: usize = 256;

impl DirectoryLock {
    /// Locks a directory.
    ///
    /// # Errors
    /// A sentence for the operator: another arbiter serves the directory, or the file cannot be opened or written.
    pub fn acquire(dir: &Path) -> Result<Self, String> {
        let path = paths::arbiter_lock(dir);
        loop {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK)
                .open(&path)
                .map_err(|error| format!("{} cannot be opened: {error}", path.display()))?;
            let owner = file.metadata().map_err(|error| format!("{}: {error}", path.display()))?.uid();
            if owner != nix::unistd::geteuid().as_raw() {
                return Err(format!(
                    "{} belongs to user {owner}, who could keep every arbiter away with it: remove it, or name another --runtime-dir",
                    path.display()
                ));
            }
            let said = std::io::read_to_string(&file).unwrap_or_default();
            let mut said = said.lines();
            let pid = said.next().unwrap_or_default().trim().to_owned();
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                // The arbiter before may have ended and removed the file meanwhile: then this is a lock on a file without a name.
                Ok(file) if is_at(&path, &file) => {
                    let before = said.next().map(|pools| pools.trim().to_owned());
                    let lock = Self { path, file, before: before.filter(|pools| !pools.is_empty()) };
                    lock.sign(lock.before.as_deref().unwrap_or_default())
                        .map_err(|error| format!("{} cannot be written: {error}", lock.path.display()))?;
                    return Ok(lock);
                }
                Ok(_) => {}
                Err((_, Errno::EWOULDBLOCK)) => {
                    return Err(format!(
                        "another arbiter (pid {pid}) serves {} already; end it first, or give this one another --runtime-dir",
                        dir.display()
                    ));
                }
                Err((_, error)) => return Err(format!("{} cannot be locked: {error}", path.display())),
            }
        }
    }

    /// Writes down this arbiter's pid, and how it sizes its pools.
    ///
    /// # Errors
    /// The file system's.
    pub fn sign(&self, pools: &str) -> std::io::Result<()> {
        let said = format!("{}\n{pools}\n", std::process::id());
        self.file.write_all_at(format!("{said:<FILE_SIZE$}").as_bytes(), 0)
    }

    /// This arbiter does not serve after all. Removes the file, unless an arbiter before has written into it how it sized
    /// its pools: that stays for the next.
    pub fn give_up(&mut self) {
        if self.before.is_none() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Whether a file is the one that has this path.
fn is_at(path: &Path, file: &File) -> bool {
    let identity = |data: std::io::Result<std::fs::Metadata>| data.ok().map(|data| (data.dev(), data.ino()));
    identity(path.metadata()) == identity(file.metadata())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvshare_test_support::{Dice, Patience};
    use std::process::{Command, Stdio};

    /// In the environment of an arbiter that signs and signs: its directory.
    const SIGNS_IN: &str = "NVSHARE_TEST_SIGNS_IN";

    const ITSELF: &str =
        "directory::tests::an_arbiter_that_is_killed_while_it_signs_leaves_what_stood_there_or_what_it_says";

    const POOLS: [&str; 2] = ["a private arbiter with --capacity 64.00 MiB", "a service with --headroom 0 B"];

    #[test]
    fn an_arbiter_that_is_killed_while_it_signs_leaves_what_stood_there_or_what_it_says() {
        if let Some(dir) = std::env::var_os(SIGNS_IN) {
            let lock = DirectoryLock::acquire(Path::new(&dir)).unwrap();
            let parent = nix::unistd::getppid();
            let mut pools = POOLS.iter().cycle();
            while nix::unistd::getppid() == parent {
                lock.sign(pools.next().expect("a cycle has no end")).unwrap();
            }
            return;
        }
        let mut dice = Dice::from_environment(0x516e);
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let said = || std::fs::read_to_string(paths::arbiter_lock(dir)).unwrap_or_default();
        for _ in 0..60 {
            let mut arbiter = Command::new(std::env::current_exe().unwrap())
                .args([ITSELF, "--exact"])
                .env(SIGNS_IN, dir)
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            let signed = format!("{}\n", arbiter.id());
            Patience::seconds(10).until("it signs", || said().starts_with(&signed));
            dice.spin(300);
            arbiter.kill().unwrap();
            arbiter.wait().unwrap();
            let left = said();
            // It signs first with what stood there: the very first one found nothing.
            let pools = left.lines().nth(1).unwrap_or("nothing at all").trim();
            let whole = left.len() == FILE_SIZE && left.starts_with(&signed);
            assert!(whole && (POOLS.contains(&pools) || pools.is_empty()), "{left:?}");
        }
        // The next one reads what was left.
        let left = said();
        let before = DirectoryLock::acquire(dir).unwrap().before;
        assert_eq!(before.as_deref(), left.lines().nth(1).map(str::trim).filter(|pools| !pools.is_empty()));
    }
}
