//! CDI specifications (<https://github.com/cncf-tags/container-device-interface>): files from which the container runtime learns what to
//! put into a container that has a device.
//!
//! A runtime reads the folder while files come and go. Each is written under another name and moved into place, so that it is there as a whole or not at
//! all; one that says the same already is left alone.

use crate::Error;
use crate::options::Common;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The version that the files have: mounts and environment, and a kind with dots, are in it, and containerd 1.7 knows no newer one.
const VERSION: &str = "0.5.0";

/// The kind of the device that every client of nvshare needs.
pub const CLIENT_KIND: &str = "nvshare.com/client";

/// The name of that device; there is one, because it is the same for all.
pub const CLIENT_NAME: &str = "shared";

/// A file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec {
    /// Of the specification.
    pub cdi_version: String,
    /// VENDOR/CLASS of all its devices.
    pub kind: String,
    /// The devices.
    pub devices: Vec<Device>,
}

/// A device: what a container that has it gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Device {
    /// KIND=NAME is how it is asked for.
    pub name: String,
    /// What is changed in the container.
    pub container_edits: Edits,
}

/// What is changed in a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Edits {
    /// Variables, as NAME=VALUE. They replace the container's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// What is mounted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<Mount>,
}

/// A folder or file of the host in the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Mount {
    /// Where it is on the host.
    pub host_path: PathBuf,
    /// Where it is in the container.
    pub container_path: PathBuf,
    /// As for mount(8).
    pub options: Vec<String>,
}

impl Spec {
    /// With these devices.
    pub fn new(kind: &str, devices: Vec<Device>) -> Self {
        Self { cdi_version: VERSION.into(), kind: kind.into(), devices }
    }

    /// The name of its file in a folder of specifications.
    pub fn file_name(&self) -> String {
        format!("{}.json", self.kind.replace('/', "-"))
    }

    /// Writes it to its own file. Whether that has changed.
    ///
    /// # Errors
    /// The folder cannot be made or written.
    pub fn write(&self, folder: &Path) -> Result<bool, Error> {
        write(&folder.join(self.file_name()), self)
    }
}

/// Writes a specification to a file, as a whole or not at all; makes the folder if there is none. Whether the file has changed.
///
/// # Errors
/// The folder cannot be made or written.
pub fn write(file: &Path, spec: &Spec) -> Result<bool, Error> {
    let fail =
        |cause| Error::file(file, "the CDI specification cannot be written, which --cdi-dir names", cause);
    let mut text = serde_json::to_string_pretty(spec).map_err(|error| fail(error.into()))?;
    text.push('\n');
    if fs::read_to_string(file).is_ok_and(|before| before == text) {
        return Ok(false);
    }
    replace(file, text.as_bytes()).map_err(fail)?;
    Ok(true)
}

fn replace(file: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    // The runtime reads names that end with .json or .yaml.
    let mut made = tempfile::Builder::new().prefix(".nvshare-").suffix(".tmp").tempfile_in(folder)?;
    made.write_all(bytes)?;
    made.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
    // After a crash of the machine a name must not lead to an empty file.
    made.as_file().sync_all()?;
    made.persist(file).map_err(|error| error.error)?;
    Ok(())
}

/// Takes a specification away, if it is there.
///
/// # Errors
/// It is there and cannot be taken away.
pub fn remove(file: &Path) -> Result<(), Error> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::file(file, "the CDI specification cannot be removed", error))
        }
        _ => Ok(()),
    }
}

/// The device that every client needs, as it is asked for.
pub fn client_device() -> String {
    format!("{CLIENT_KIND}={CLIENT_NAME}")
}

/// What every client's container needs, without the GPU itself: the shim and the arbiter's socket (docs/operations/containers.md).
pub fn client_edits(options: &Common) -> Edits {
    let read_only = |path: &Path| Mount {
        host_path: path.to_owned(),
        container_path: path.to_owned(),
        // The folder and not the file: what is in it is replaced by an upgrade, or by an arbiter that starts anew.
        options: ["ro", "nosuid", "nodev", "rbind"].map(str::to_owned).to_vec(),
    };
    Edits {
        env: client_environment(options).into_iter().map(|(name, value)| format!("{name}={value}")).collect(),
        mounts: vec![read_only(&options.host_library_dir), read_only(options.host_runtime_dir())],
    }
}

/// The shim in a container, as on the host.
fn shim(options: &Common) -> PathBuf {
    options.host_library_dir.join("libnvshare.so")
}

/// Why no container can become a client: the shim is not where containers look for it. The loader would only complain and start the program
/// without it, on a GPU that others share. `None` also where this process does not see that folder of the host.
pub fn missing_shim(options: &Common) -> Option<String> {
    let (dir, shim) = (&options.host_library_dir, shim(options));
    (dir.is_dir() && !shim.is_file()).then(|| {
        format!(
            "{} is not there, so a container would run without nvshare: install it on this node (nvshare's DaemonSets do when they start, or \
             the Debian package), or name its folder with --host-library-dir",
            shim.display()
        )
    })
}

/// The variables that every client needs.
pub fn client_environment(options: &Common) -> Vec<(&'static str, String)> {
    vec![
        ("LD_PRELOAD", shim(options).display().to_string()),
        (nvshare::paths::RUNTIME_DIR, options.host_runtime_dir().display().to_string()),
        ("CUDA_MODULE_LOADING", "LAZY".into()),
    ]
}

/// The specification of what every client needs.
pub fn client_spec(options: &Common) -> Spec {
    Spec::new(CLIENT_KIND, vec![Device { name: CLIENT_NAME.into(), container_edits: client_edits(options) }])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn spec(variable: &str) -> Spec {
        let container_edits = Edits { env: vec![variable.into()], ..Edits::default() };
        Spec::new("example.com/thing", vec![Device { name: "one".into(), container_edits }])
    }

    #[test]
    fn a_file_is_replaced_as_a_whole_and_left_alone_if_nothing_changes() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("not/there/yet");
        let file = dir.join("example.com-thing.json");
        assert!(spec("A=1").write(&dir).unwrap());
        let first = fs::metadata(&file).unwrap();
        assert_eq!(first.mode() & 0o777, 0o644, "the runtime may be another user");
        assert!(!spec("A=1").write(&dir).unwrap());
        assert_eq!(fs::metadata(&file).unwrap().ino(), first.ino());
        // Whoever has opened the old one reads it to its end.
        let open = fs::File::open(&file).unwrap();
        assert!(spec("A=2").write(&dir).unwrap());
        let old: Spec = serde_json::from_reader(open).unwrap();
        let new: Spec = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
        assert_eq!((old, new), (spec("A=1"), spec("A=2")));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing is left beside it");
        remove(&file).unwrap();
        remove(&file).unwrap();
        assert!(!file.exists());
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named_with_its_option() {
        let folder = tempfile::NamedTempFile::new().unwrap();
        let error = spec("A=1").write(folder.path()).unwrap_err().to_string();
        assert!(error.contains("--cdi-dir") && error.contains("example.com-thing.json"), "{error}");
    }
}
