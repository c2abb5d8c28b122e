//! Where a node's pages and the arbiter's socket are.

use crate::page::SlotIndex;
use crate::units::GpuUuid;
use std::path::{Path, PathBuf};

/// Names the runtime directory; takes precedence over the defaults.
pub const RUNTIME_DIR: &str = "NVSHARE_RUNTIME_DIR";

/// The runtime directory: `$NVSHARE_RUNTIME_DIR`, else `/run/nvshare` if it is there or this is root,
/// else `$XDG_RUNTIME_DIR/nvshare`, else `/tmp/nvshare-UID`.
pub fn runtime_dir() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(dir) = set(RUNTIME_DIR) {
        return dir;
    }
    let system = Path::new("/run/nvshare");
    let uid = nix::unistd::Uid::effective();
    if system.is_dir() || uid.is_root() {
        return system.to_owned();
    }
    set("XDG_RUNTIME_DIR").map_or_else(|| format!("/tmp/nvshare-{uid}").into(), |dir| dir.join("nvshare"))
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
