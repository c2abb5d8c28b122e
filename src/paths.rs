//! The runtime directory of a machine, and the names of the files in it.

use crate::slot::SlotIndex;
use crate::units::GpuUuid;
use std::path::{Path, PathBuf};

/// The environment variable that names the runtime directory. It takes precedence over the defaults.
pub const RUNTIME_DIR: &str = "NVSHARE_RUNTIME_DIR";

/// The directory of the arbiter that serves all users of a machine.
pub const SYSTEM_DIR: &str = "/run/nvshare";

/// A directory that the environment names.
fn named(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The directory in which this process looks for its arbiter, the first that fits:
///
/// 1. `$NVSHARE_RUNTIME_DIR`;
/// 2. [`SYSTEM_DIR`] if it [is served](is_served);
/// 3. if the private directory is not served either, for root, and for others where the directory exists: [`SYSTEM_DIR`]. Where
///    nobody serves yet, only the system's arbiter will come by itself: `nvshare run` names the private directory to its programs;
/// 4. the user's own ([`private_dir`]).
pub fn runtime_dir() -> PathBuf {
    let system = PathBuf::from(SYSTEM_DIR);
    let private = private_dir();
    let root = nix::unistd::Uid::effective().is_root();
    named(RUNTIME_DIR).unwrap_or_else(|| {
        let system_first = is_served(&system) || (root || system.is_dir()) && !is_served(&private);
        if system_first { system } else { private }
    })
}

/// The directory in which an arbiter serves by default: `$NVSHARE_RUNTIME_DIR`, else [`SYSTEM_DIR`] for root and the user's own
/// for others.
pub fn arbiter_dir() -> PathBuf {
    let root = nix::unistd::Uid::effective().is_root();
    named(RUNTIME_DIR).unwrap_or_else(|| if root { SYSTEM_DIR.into() } else { private_dir() })
}

/// The directory in which `nvshare run` starts a private arbiter: `$NVSHARE_RUNTIME_DIR`, or [`private_dir`]. Never
/// [`SYSTEM_DIR`]: everybody would take the arbiter there for the system's.
pub fn own_arbiter_dir() -> PathBuf {
    named(RUNTIME_DIR).unwrap_or_else(private_dir)
}

/// This user's own runtime directory: `$XDG_RUNTIME_DIR/nvshare`, else `/tmp/nvshare-UID`.
pub fn private_dir() -> PathBuf {
    let uid = nix::unistd::Uid::effective();
    named("XDG_RUNTIME_DIR").map_or_else(|| format!("/tmp/nvshare-{uid}").into(), |dir| dir.join("nvshare"))
}

/// Whether an arbiter serves in a directory, or has served there and left clients: then its lock file is still there. The
/// existence of the directory says nothing, because an unused one may be left over.
pub fn is_served(dir: &Path) -> bool {
    socket(dir).exists() || arbiter_lock(dir).exists()
}

/// The arbiter's socket in a runtime directory.
pub fn socket(dir: &Path) -> PathBuf {
    dir.join("arbiter.sock")
}

/// The file that the serving arbiter holds a lock on.
pub fn arbiter_lock(dir: &Path) -> PathBuf {
    dir.join("arbiter.lock")
}

/// The record of a GPU's page ([`crate::record`]).
pub fn page(dir: &Path, gpu: GpuUuid) -> PathBuf {
    dir.join(format!("{gpu}.page"))
}

/// The life file of a slot: its lock tells whether the client lives ([`crate::presence`]).
pub fn life(dir: &Path, gpu: GpuUuid, slot: SlotIndex) -> PathBuf {
    dir.join(format!("{gpu}.slot-{}.client", slot.get()))
}

/// The GPUs that have a record in a runtime directory, and the record's path, in the order of their UUIDs.
///
/// # Errors
/// The directory cannot be read.
pub fn pages(dir: &Path) -> std::io::Result<Vec<(GpuUuid, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let gpu = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_suffix(".page"))
            .and_then(|name| name.parse().ok());
        if let Some(gpu) = gpu {
            found.push((gpu, path));
        }
    }
    found.sort();
    Ok(found)
}
