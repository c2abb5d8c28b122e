//! Where a node's pages and the arbiter's socket are.

use crate::slot::SlotIndex;
use crate::units::GpuUuid;
use std::path::{Path, PathBuf};

/// Names the runtime directory; takes precedence over the defaults.
pub const RUNTIME_DIR: &str = "NVSHARE_RUNTIME_DIR";

/// The directory of the arbiter that serves all users of a machine.
pub const SYSTEM_DIR: &str = "/run/nvshare";

/// A directory that the environment names.
fn named(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Where this process finds its arbiter: `$NVSHARE_RUNTIME_DIR`, else the system's directory if an arbiter serves there,
/// or did and has clients; else this user's own; else, for root, the system's all the same.
pub fn runtime_dir() -> PathBuf {
    let system = PathBuf::from(SYSTEM_DIR);
    let private = private_dir();
    let root = nix::unistd::Uid::effective().is_root();
    named(RUNTIME_DIR).unwrap_or_else(|| {
        let system_first = is_served(&system) || root && !is_served(&private);
        if system_first { system } else { private }
    })
}

/// Where an arbiter serves that is told no directory: the system's for root, else the user's own.
pub fn arbiter_dir() -> PathBuf {
    let root = nix::unistd::Uid::effective().is_root();
    named(RUNTIME_DIR).unwrap_or_else(|| if root { SYSTEM_DIR.into() } else { private_dir() })
}

/// Where `nvshare run` starts an arbiter of this user's own: `$NVSHARE_RUNTIME_DIR`, or [`private_dir`]. Never in the
/// system's directory, where everybody would take it for the system's.
pub fn own_arbiter_dir() -> PathBuf {
    named(RUNTIME_DIR).unwrap_or_else(private_dir)
}

/// This user's own runtime directory: `$XDG_RUNTIME_DIR/nvshare`, else `/tmp/nvshare-UID`.
pub fn private_dir() -> PathBuf {
    let uid = nix::unistd::Uid::effective();
    named("XDG_RUNTIME_DIR").map_or_else(|| format!("/tmp/nvshare-{uid}").into(), |dir| dir.join("nvshare"))
}

/// Whether an arbiter serves in a directory, or has left clients in it. A directory alone says nothing: one that nobody
/// uses may be left over.
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

/// The page of a GPU.
pub fn page(dir: &Path, gpu: GpuUuid) -> PathBuf {
    dir.join(format!("{gpu}.page"))
}

/// The file that shows whether the client in a slot lives.
pub fn life(dir: &Path, gpu: GpuUuid, slot: SlotIndex) -> PathBuf {
    dir.join(format!("{gpu}.slot-{}.client", slot.get()))
}

/// The GPUs that have a page in a runtime directory, by UUID.
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
