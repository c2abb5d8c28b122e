//! The runtime directory: who may make it, and whose arbiter is believed in it.
//!
//! The arbiter's socket, its lock and its records are in it, so whoever can write the directory can be the arbiter. An
//! arbiter serves only in a directory that belongs to its own user or to root, where nobody else can
//! take away what is there, and that is no symbolic link; files in it that are another user's are refused; and a client believes only an arbiter that runs as root, as the client's own user, or as the user to
//! whom root has given the directory. Two defaults lie below directories that everybody can write or that may be
//! missing: there, the directory is made so that nobody else can enter it.

use nix::sys::stat::{Mode, SFlag, fstat, stat};
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Why an arbiter does not serve in a directory.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeDirError {
    /// It cannot be made or opened.
    #[error("the runtime directory {} cannot be {what}: {cause}", .path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        cause: io::Error,
    },
    /// It leads somewhere else.
    #[error(
        "the runtime directory {} is a symbolic link, which somebody else may have made: remove it, or name the directory itself with --runtime-dir or NVSHARE_RUNTIME_DIR",
        .0.display()
    )]
    Link(PathBuf),
    /// It is another user's.
    #[error(
        "the runtime directory {} belongs to user {owner}, who could take this arbiter's place: remove it, or name another with --runtime-dir or NVSHARE_RUNTIME_DIR",
        .path.display()
    )]
    Owner {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// Everybody can write it.
    #[error(
        "everybody can write the runtime directory {} (mode {mode:03o}), and so take this arbiter's place: chmod o-w, or name another with --runtime-dir or NVSHARE_RUNTIME_DIR",
        .path.display()
    )]
    Open {
        /// The directory.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
}

/// Makes the directory if it is missing, and checks that only its owner and root rule it: for who is to serve in it. A
/// client needs to enter the system's directory; all others are for their user alone.
///
/// # Errors
/// See the error.
pub fn prepare(dir: &Path) -> Result<(), RuntimeDirError> {
    let fail = |what| move |cause| RuntimeDirError::Io { path: dir.to_owned(), what, cause };
    let root = nix::unistd::geteuid().is_root();
    let mut builder = DirBuilder::new();
    match builder.mode(if root { 0o755 } else { 0o700 }).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            builder.recursive(true).create(dir).map_err(fail("made"))?;
        }
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(fail("made")(error)),
        _ => {}
    }
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let opened = match File::options().read(true).custom_flags(flags).open(dir) {
        Err(_) if dir.is_symlink() => return Err(RuntimeDirError::Link(dir.to_owned())),
        opened => opened.map_err(fail("opened"))?,
    };
    let data = fstat(&opened).map_err(io::Error::from).map_err(fail("looked at"))?;
    let mode = Mode::from_bits_truncate(data.st_mode);
    if data.st_uid != 0 && data.st_uid != nix::unistd::geteuid().as_raw() {
        return Err(RuntimeDirError::Owner { path: dir.to_owned(), owner: data.st_uid });
    }
    // Where it is sticky, as /tmp is, nobody can take away what is there; what others have put there is not used.
    if mode.contains(Mode::S_IWOTH) && !mode.contains(Mode::S_ISVTX) {
        return Err(RuntimeDirError::Open { path: dir.to_owned(), mode: mode.bits() });
    }
    Ok(())
}

/// Whether a client may believe an arbiter of this user at a socket in this directory.
pub fn believes(dir: &Path, arbiter: u32) -> bool {
    arbiter == 0 || arbiter == nix::unistd::geteuid().as_raw() || given_by_root(dir) == Some(arbiter)
}

/// To whom root has given a directory: its owner, if only root could have made it where it is.
fn given_by_root(dir: &Path) -> Option<u32> {
    let directory = |path: &Path| {
        let data = stat(path).ok()?;
        (SFlag::from_bits_truncate(data.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR).then_some(data)
    };
    let above = dir.canonicalize().ok()?.parent()?.to_owned();
    let roots = above.ancestors().all(|path| {
        directory(path).is_some_and(|data| {
            data.st_uid == 0
                && !Mode::from_bits_truncate(data.st_mode).intersects(Mode::S_IWGRP | Mode::S_IWOTH)
        })
    });
    if !roots {
        return None;
    }
    directory(dir).map(|data| data.st_uid)
}
