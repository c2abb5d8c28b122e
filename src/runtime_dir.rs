//! The runtime directory: in which one an arbiter serves, and which user's arbiter a client believes there.
//!
//! The arbiter's socket, its lock and its records are in this directory, so a user who can write it can take the arbiter's
//! place. Therefore:
//!
//! - An arbiter serves only in a directory that belongs to its own user or to root, in which nobody else can remove files, and
//!   that is no symbolic link. Files of other users in it are refused.
//! - A client believes only an arbiter that runs as root, as the client's own user, or as the user to whom root has given the
//!   directory.
//! - A user's default directory lies below one that everybody can write or that may be missing, so it is made with mode 0700.

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
        /// What was tried: a participle for the message.
        what: &'static str,
        /// What the kernel said.
        cause: io::Error,
    },
    /// It is a symbolic link.
    #[error(
        "the runtime directory {} is a symbolic link, which somebody else may have made: remove it, or name the directory itself with --runtime-dir or NVSHARE_RUNTIME_DIR",
        .0.display()
    )]
    Link(PathBuf),
    /// It belongs to another user.
    #[error(
        "the runtime directory {} belongs to user {owner}, who could take this arbiter's place: remove it, or name another with --runtime-dir or NVSHARE_RUNTIME_DIR",
        .path.display()
    )]
    Owner {
        /// The directory.
        path: PathBuf,
        /// The user to whom it belongs.
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

/// Makes the directory if it is missing, and checks that nobody but its owner and root can replace files in it. For an arbiter
/// that is about to serve in it. Root's directory gets mode 0755, because all clients must enter it; a user's own gets 0700.
///
/// # Errors
/// The directory cannot be made or opened, or is not safe to serve in.
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
    // In a sticky directory, such as /tmp, nobody can remove files of others; files that others have put there are not used.
    if mode.contains(Mode::S_IWOTH) && !mode.contains(Mode::S_ISVTX) {
        return Err(RuntimeDirError::Open { path: dir.to_owned(), mode: mode.bits() });
    }
    Ok(())
}

/// Whether a client may believe an arbiter that runs as this user and has its socket in this directory.
pub fn believes(dir: &Path, arbiter: u32) -> bool {
    arbiter == 0 || arbiter == nix::unistd::geteuid().as_raw() || given_by_root(dir) == Some(arbiter)
}

/// The user to whom root has given a directory: its owner, if only root could have made it there.
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
