//! All settings in force with their origins: what `nvshare ctl get` and `nvshare-arbiter --check-config` show.

use super::{Change, Configuration, Name};
use nvshare::units::GpuUuid;
use serde::Serialize;
use std::fmt::Write;

/// A setting in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Setting {
    /// Its name.
    pub name: String,
    /// Its value, with its unit; null if nobody has set it and it has no default.
    pub value: Option<String>,
    /// Who has set it.
    pub origin: String,
    /// Whether it changes while the arbiter runs.
    pub changes_at_run_time: bool,
    /// What it is for.
    pub description: String,
}

/// The settings of a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GpuSettings {
    /// Its UUID.
    pub uuid: String,
    /// The pool as it is, in bytes: the GPU may have less than the setting says.
    pub pool_bytes: u64,
    /// Those that may differ between GPUs.
    pub settings: Vec<Setting>,
}

/// The settings of an arbiter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The arbiter's release.
    pub release: String,
    /// Its configuration file, if there is one.
    pub file: Option<String>,
    /// Those of the node.
    pub node: Vec<Setting>,
    /// Those of the GPUs.
    pub gpus: Vec<GpuSettings>,
}

impl Configuration {
    /// All settings. `gpus` are the GPUs that are served, and their pools in bytes.
    pub fn report(&self, gpus: impl Iterator<Item = (GpuUuid, u64)>) -> Report {
        Report {
            release: env!("CARGO_PKG_VERSION").into(),
            file: self.file().map(|file| file.display().to_string()),
            node: self.settings(None, |name| name.change != Change::OfAGpu),
            gpus: gpus
                .map(|(gpu, pool_bytes)| GpuSettings {
                    uuid: gpu.to_string(),
                    pool_bytes,
                    settings: self.settings(Some(gpu), |name| name.change == Change::OfAGpu),
                })
                .collect(),
        }
    }

    fn settings(&self, gpu: Option<GpuUuid>, wanted: impl Fn(&Name) -> bool) -> Vec<Setting> {
        let wanted = self.names.iter().filter(|name| name.in_file && wanted(name));
        wanted
            .map(|name| {
                let value = self.shown(name, gpu);
                Setting {
                    name: name.name.clone(),
                    value: (!value.is_empty()).then_some(value),
                    origin: self.effective(name, gpu).1.to_string(),
                    changes_at_run_time: name.change != Change::AtStart,
                    description: name.help.clone(),
                }
            })
            .collect()
    }

    /// What holds, for whoever checks the configuration: a line for each setting that somebody has set.
    pub fn summary(&self) -> String {
        let file = self.file().map_or_else(
            || "no configuration file".to_owned(),
            |file| format!("{}: it is right", file.display()),
        );
        let mut said = file;
        for setting in self.settings(None, |_| true).into_iter().filter(|setting| setting.origin != "default")
        {
            let value = setting.value.unwrap_or_default();
            let _ = write!(said, "\n  {} = {value}  ({})", setting.name, setting.origin);
        }
        said
    }
}
