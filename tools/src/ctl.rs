//! `nvshare ctl`: what there is to ask and to set while an arbiter runs.
//!
//! The arbiter makes every change, and reads a value as it reads the argument of that name.

use crate::layout::{self, words};
use crate::whom::{clients, only};
use crate::{Failure, say, set};
use comfy_table::presets;
use nvshare::change;
use nvshare::control::{PauseRequest, SettingsChange, SettingsRequest};
use nvshare::page::Suspension;
use nvshare::paths;
use nvshare::sync::now;
use nvshare::units::{GpuUuid, Nanos, format_size};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Options of `nvshare ctl`.
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = true,
    after_help = "\
Settings of the node are changed by root and by the user whom the arbiter runs as; a client is paused, resumed and given \
other shares by these and by whose it is. What holds is for everybody to see.

A change lasts until the arbiter ends, or reads its configuration again (SIGHUP, systemctl reload nvshare-arbiter). What is \
to last stands in /etc/nvshare/nvshare.toml, under the same names.

Examples:
  nvshare ctl get                          all settings, and who has set them
  nvshare ctl set quantum=2s               slices of two seconds
  nvshare ctl set quantum=auto quantum-factor=8 quantum-max=30s
  nvshare ctl set capacity=14.9GiB --gpu GPU-...   (its UUID)
  nvshare ctl set anti-thrash=off          nobody is preempted
  nvshare ctl reset                        as without these changes
  nvshare ctl pause 4242 --for 10m
  nvshare ctl resume 4242"
)]
pub struct Options {
    #[command(subcommand)]
    what: What,
    /// Directory of the control pages and the arbiter's socket [default: $NVSHARE_RUNTIME_DIR, or /run/nvshare, or one of
    /// your own]
    #[arg(long, value_name = "DIR", global = true)]
    runtime_dir: Option<PathBuf>,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Show the settings in force, and who has set them
    #[command(visible_alias = "show")]
    Get(Get),
    /// Change settings of the arbiter
    Set(Set),
    /// Take changes at run time back
    Reset(Reset),
    /// Take the GPU from a client until it is resumed
    #[command(after_help = "\
The client gives the GPU up at once: it drains, which takes as long as its submitted work. It keeps its slot, its shares and \
its memory; what it has on the GPU moves out when somebody needs the room. Nobody waits for it. Its calls wait meanwhile: \
to the program it looks as if others had the GPU.

A process with several GPUs is paused on all of them, and processes that wait for each other (a gang) are paused together. \
A pause outlives the arbiter.")]
    Pause(Pause),
    /// Let a paused client go on
    Resume(Resume),
    /// Change a client's weight, priority and limits: the same as `nvshare set`
    Client(set::Options),
}

#[derive(Debug, clap::Args)]
struct Get {
    /// Only these settings
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Only of this GPU
    #[arg(long, value_name = "UUID", value_parser = crate::gpu)]
    gpu: Option<GpuUuid>,
    /// Write one JSON object, for programs, instead of the tables
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct Set {
    /// The settings and their values, such as quantum=2s
    #[arg(required = true, value_name = "NAME=VALUE", value_parser = pair)]
    values: Vec<(String, String)>,
    /// Only for this GPU
    #[arg(long, value_name = "UUID", value_parser = crate::gpu)]
    gpu: Option<GpuUuid>,
}

#[derive(Debug, clap::Args)]
struct Reset {
    /// Which settings [default: all]
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Only for this GPU
    #[arg(long, value_name = "UUID", value_parser = crate::gpu)]
    gpu: Option<GpuUuid>,
}

#[derive(Debug, clap::Args)]
struct Pause {
    #[command(flatten)]
    which: Which,
    /// Resume it by itself after this time, such as 90s [default: never]
    #[arg(long = "for", value_name = "TIME", value_parser = crate::time)]
    lasts: Option<Nanos>,
}

#[derive(Debug, clap::Args)]
struct Resume {
    #[command(flatten)]
    which: Which,
}

#[derive(Debug, clap::Args)]
struct Which {
    /// Which client: its pid, slot or name, or one of them by pid:N, slot:N or name:TEXT
    client: String,
    /// Look for the client on this GPU only
    #[arg(long, value_name = "UUID", value_parser = crate::gpu)]
    gpu: Option<GpuUuid>,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text
        .split_once('=')
        .ok_or_else(|| format!("'{text}': write a setting's name, = and a value, such as quantum=2s"))?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

/// How long an arbiter that is just starting is waited for.
const TIMEOUT: Duration = Duration::from_secs(1);

/// What an arbiter says of its settings. `nvshare ctl get --json` has it as the arbiter wrote it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Report {
    /// The arbiter's release.
    pub release: String,
    /// Its configuration file, if there is one.
    pub file: Option<String>,
    /// Settings of the node.
    pub node: Vec<Setting>,
    /// Those of its GPUs.
    pub gpus: Vec<GpuSettings>,
}

/// The settings of a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct GpuSettings {
    /// Its UUID.
    pub uuid: String,
    /// Bytes in its pool.
    pub pool_bytes: u64,
    /// The settings.
    pub settings: Vec<Setting>,
}

/// A setting in force.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Setting {
    /// Its name.
    pub name: String,
    /// Its value, with its unit.
    pub value: Option<String>,
    /// Who has set it.
    pub origin: String,
    /// Whether it changes while the arbiter runs.
    pub changes_at_run_time: bool,
}

/// Asks the arbiter in `dir` for its settings, of a GPU or of all, or to change them first. Returns JSON.
///
/// # Errors
/// No arbiter answers, or it refuses.
pub fn ask(dir: &Path, gpu: Option<GpuUuid>, wanted: &SettingsChange) -> Result<String, Failure> {
    let request = SettingsRequest::new(gpu, wanted).map_err(Failure::usage)?;
    change::settings(&paths::socket(dir), &request, TIMEOUT)
        .map_err(|error| Failure::usage(error.to_string()))
}

/// Reads what [`ask`] returns.
///
/// # Errors
/// It is of an arbiter of another release.
pub fn read(text: &str) -> Result<Report, Failure> {
    serde_json::from_str(text).map_err(|error| {
        Failure::usage(format!(
            "the arbiter's settings cannot be read ({error}): it is of another release than this program; restart it: systemctl restart nvshare-arbiter"
        ))
    })
}

/// Does what was asked for.
///
/// # Errors
/// No arbiter answers, it refuses, or what was typed makes no sense.
pub fn run(options: &Options) -> Result<(), Failure> {
    let dir = options.runtime_dir.clone().unwrap_or_else(paths::runtime_dir);
    match &options.what {
        What::Get(get) => show(&dir, get),
        What::Set(Set { values, gpu }) => {
            let said = ask(&dir, *gpu, &SettingsChange::Set(values.clone()))?;
            changed(&read(&said)?, |name| values.iter().any(|(wanted, _)| wanted == name));
            Ok(())
        }
        What::Reset(Reset { names, gpu }) => {
            let said = ask(&dir, *gpu, &SettingsChange::Reset(names.clone()))?;
            changed(&read(&said)?, |name| names.is_empty() || names.iter().any(|wanted| wanted == name));
            Ok(())
        }
        What::Pause(Pause { which, lasts }) => {
            let suspension = lasts.map_or(Suspension::WithoutEnd, |lasts| Suspension::lasting(now(), lasts));
            suspend(&dir, which, suspension)
        }
        What::Resume(Resume { which }) => suspend(&dir, which, Suspension::None),
        What::Client(options) => set::run_in(&dir, options),
    }
}

fn suspend(dir: &Path, which: &Which, suspension: Suspension) -> Result<(), Failure> {
    let found = only(&which.client, which.gpu, clients(dir)?)?;
    let request = PauseRequest::new(found.gpu, found.client.slot, found.client.owner, suspension);
    let said = change::pause(&paths::socket(dir), &request, TIMEOUT)
        .map_err(|error| Failure::usage(format!("{found}: {error}")))?;
    say!("{found}: {said}");
    Ok(())
}

/// Says what settings are now.
fn changed(report: &Report, wanted: impl Fn(&str) -> bool) {
    let line = |whose: &str, setting: &Setting| {
        say!("{whose}: {} = {} ({})", setting.name, value(setting), setting.origin);
    };
    let at_run_time = |setting: &&Setting| setting.changes_at_run_time && wanted(&setting.name);
    report.node.iter().filter(at_run_time).for_each(|setting| line("node", setting));
    for gpu in &report.gpus {
        gpu.settings.iter().filter(at_run_time).for_each(|setting| line(&gpu.uuid, setting));
        if wanted("capacity") || wanted("headroom") {
            say!("{}: the pool has {}", gpu.uuid, format_size(gpu.pool_bytes));
        }
    }
}

fn value(setting: &Setting) -> &str {
    setting.value.as_deref().unwrap_or("-")
}

fn show(dir: &Path, get: &Get) -> Result<(), Failure> {
    let said = ask(dir, get.gpu, &SettingsChange::Ask)?;
    let report = read(&said)?;
    let all = || report.node.iter().chain(report.gpus.iter().flat_map(|gpu| &gpu.settings));
    if let Some(unknown) = get.names.iter().find(|name| !all().any(|setting| setting.name == **name)) {
        return Err(Failure::usage(format!("'{unknown}' is no setting; `nvshare ctl get` lists them")));
    }
    let wanted = |setting: &&Setting| get.names.is_empty() || get.names.contains(&setting.name);
    if get.json {
        return print_json(&said, &get.names);
    }
    let width = layout::width();
    let table = |settings: &[Setting]| {
        let cells = |setting: &Setting| {
            let when = if setting.changes_at_run_time { "at once" } else { "at a restart" };
            vec![setting.name.clone(), value(setting).to_owned(), setting.origin.clone(), when.to_owned()]
        };
        let rows: Vec<_> = settings.iter().filter(wanted).map(cells).collect();
        if !rows.is_empty() {
            let columns = [words("setting"), words("value"), words("set by"), words("changes")];
            say!("{}", layout::table(&columns, &rows, presets::NOTHING, width));
        }
    };
    if get.names.is_empty() {
        let file = report.file.as_deref().unwrap_or("none");
        say!("nvshare {}, configuration file: {file}", report.release);
    }
    table(&report.node);
    for gpu in &report.gpus {
        if gpu.settings.iter().any(|setting| wanted(&setting)) {
            say!("{}, a pool of {}", gpu.uuid, format_size(gpu.pool_bytes));
            table(&gpu.settings);
        }
    }
    Ok(())
}

/// The arbiter's own JSON, with the named settings only, if any are named.
fn print_json(said: &str, names: &[String]) -> Result<(), Failure> {
    let wrong = |error: serde_json::Error| Failure::with_status(1, error.to_string());
    let mut value: serde_json::Value = serde_json::from_str(said).map_err(wrong)?;
    let only_named = |settings: &mut serde_json::Value| {
        if let Some(settings) = settings.as_array_mut().filter(|_| !names.is_empty()) {
            settings.retain(|setting| names.iter().any(|name| setting["name"] == name.as_str()));
        }
    };
    only_named(&mut value["node"]);
    for gpu in value["gpus"].as_array_mut().into_iter().flatten() {
        only_named(&mut gpu["settings"]);
    }
    say!("{}", serde_json::to_string_pretty(&value).map_err(wrong)?);
    Ok(())
}
