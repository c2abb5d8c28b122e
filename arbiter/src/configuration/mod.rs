//! What the arbiter is configured to do, and by whom: requests at run time go before arguments, arguments before variables,
//! variables before the configuration file, and that before the defaults.
//!
//! | file | what it holds |
//! |---|---|
//! | `names` | the names of the options, all made of [`Options`] |
//! | `file` | the configuration file |
//! | `report` | all settings with their origins, for people and programs |
//!
//! Each value stays the text that somebody wrote until all are known; then they are read as one command line, so a value means
//! the same wherever it stands. [`Configuration::reload`] reads the file again and drops what was asked for at run time: the
//! arbiter then has the settings that it would start with.

mod file;
mod names;
mod report;

pub use file::Entry;
pub use names::{Change, Name, command, names};
pub use report::{GpuSettings, Report, Setting};

use crate::options::Options;
use clap::parser::ValueSource;
use clap::{ArgMatches, FromArgMatches};
use nvshare::control::SettingsChange;
use nvshare::units::GpuUuid;
use std::collections::BTreeMap;
use std::error::Error;
use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Where the operator's configuration is.
pub const FILE: &str = "/etc/nvshare/nvshare.toml";

/// The values of some options, by name.
type Layer = BTreeMap<String, Vec<OsString>>;

/// A value that somebody asked for at run time.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Requested {
    /// For this GPU; `None` for all.
    gpu: Option<GpuUuid>,
    name: String,
    value: String,
    /// Who.
    user: u32,
}

/// Who has set something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody.
    Default,
    /// The file, in this line.
    File(PathBuf, usize),
    /// The variable of this name.
    Variable(String),
    /// The argument.
    Argument(String),
    /// A user, at run time.
    Request(u32),
}

impl std::fmt::Display for Origin {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Default => out.write_str("default"),
            Self::File(path, line) => write!(out, "{}:{line}", path.display()),
            Self::Variable(name) => out.write_str(name),
            Self::Argument(name) => write!(out, "--{name}"),
            Self::Request(user) => write!(out, "nvshare ctl (user {user})"),
        }
    }
}

/// A setting that [`Configuration::reload`] has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// Which.
    pub name: String,
    /// What it was and is, as people write it.
    pub before: String,
    /// What it is.
    pub after: String,
    /// When that takes effect.
    pub change: Change,
}

/// What the arbiter is configured to do.
#[derive(Debug, Clone)]
pub struct Configuration {
    names: Vec<Name>,
    arguments: Layer,
    variables: Layer,
    /// The configuration file, and whether it must be there.
    path: Option<(PathBuf, bool)>,
    entries: Vec<Entry>,
    requests: Vec<Requested>,
}

impl Configuration {
    /// From arguments, whose first is the program's name, from variables, and from the file that they name or else
    /// `default_file`, which need not be there. A private arbiter reads only a file that is named.
    ///
    /// # Errors
    /// What is wrong: a sentence, or several with the places in the file.
    pub fn new(
        matches: &ArgMatches,
        variable: impl Fn(&str) -> Option<OsString>,
        default_file: &Path,
    ) -> Result<Self, String> {
        let names = names();
        let mut arguments = Layer::new();
        for name in &names {
            if matches.value_source(&name.id) == Some(ValueSource::CommandLine) {
                let values = match name.is_switch {
                    true => vec!["true".into()],
                    false => matches.get_raw(&name.id).into_iter().flatten().map(OsString::from).collect(),
                };
                arguments.insert(name.name.clone(), values);
            }
        }
        let variables = read_variables(&names, variable)?;
        let named = ["config"].iter().find_map(|name| arguments.get(*name).or_else(|| variables.get(*name)));
        let private = arguments.contains_key("exit-when-idle");
        let path = match named.and_then(|values| values.first()) {
            Some(path) => Some((PathBuf::from(path), true)),
            None => (!private).then(|| (default_file.to_owned(), false)),
        };
        let requests = Vec::new();
        let mut configuration = Self { names, arguments, variables, path, entries: Vec::new(), requests };
        configuration.entries = configuration.read_file()?;
        configuration.options(None)?;
        Ok(configuration)
    }

    /// From these arguments alone.
    ///
    /// # Errors
    /// As for [`Configuration::new`].
    pub fn of_arguments(arguments: &[&str]) -> Result<Self, String> {
        let matches = parse(std::iter::once("nvshare-arbiter").chain(arguments.iter().copied()))
            .map_err(|error| error.to_string())?;
        Self::new(&matches, |_| None, Path::new("/nonexistent/nvshare.toml"))
    }

    fn read_file(&self) -> Result<Vec<Entry>, String> {
        let Some((path, must_be_there)) = &self.path else { return Ok(Vec::new()) };
        match std::fs::read_to_string(path) {
            Ok(text) => file::read(path, &text, &self.names, |name, values| {
                check(name, &values.iter().map(OsString::from).collect::<Vec<_>>())
            }),
            Err(error) if error.kind() == ErrorKind::NotFound && !must_be_there => Ok(Vec::new()),
            Err(error) => Err(format!(
                "the configuration {} cannot be read: {error}. --config and NVSHARE_CONFIG name another one",
                path.display()
            )),
        }
    }

    /// The configuration file, if it has been read.
    pub fn file(&self) -> Option<&Path> {
        self.path.as_ref().map(|(path, _)| path.as_path()).filter(|path| path.exists())
    }

    fn name(&self, name: &str) -> Result<&Name, String> {
        self.names.iter().find(|known| known.name == name).ok_or_else(|| {
            let changes = self.names.iter().filter(|known| known.change != Change::AtStart);
            let near = names::nearest(name, changes.map(|known| known.name.as_str()));
            let hint = near.map_or_else(
                || "`nvshare ctl get` lists the settings".to_owned(),
                |near| format!("is '{near}' meant?"),
            );
            format!("'{name}' is no setting; {hint}")
        })
    }

    /// The value of an option for a GPU, or for the node, and who has set it. No value: nobody has, and there is no default.
    fn effective(&self, name: &Name, gpu: Option<GpuUuid>) -> (Vec<OsString>, Origin) {
        let requested = |of: Option<GpuUuid>| {
            self.requests.iter().find(move |request| request.name == name.name && request.gpu == of)
        };
        let own = gpu.and_then(|gpu| requested(Some(gpu)));
        if let Some(request) = own.or_else(|| requested(None)) {
            return (vec![request.value.clone().into()], Origin::Request(request.user));
        }
        if let Some(values) = self.arguments.get(&name.name) {
            return (values.clone(), Origin::Argument(name.name.clone()));
        }
        if let (Some(values), Some(variable)) = (self.variables.get(&name.name), &name.variable) {
            return (values.clone(), Origin::Variable(variable.clone()));
        }
        if let (Some(entry), Some((path, _))) =
            (self.entries.iter().find(|entry| entry.name == name.name), &self.path)
        {
            let values = entry.values.iter().map(OsString::from).collect();
            return (values, Origin::File(path.clone(), entry.line));
        }
        (name.default.iter().map(OsString::from).collect(), Origin::Default)
    }

    fn shown(&self, name: &Name, gpu: Option<GpuUuid>) -> String {
        let values = self.effective(name, gpu).0;
        values.iter().map(|value| value.to_string_lossy()).collect::<Vec<_>>().join(", ")
    }

    /// The options for a GPU, or for the node.
    ///
    /// # Errors
    /// They do not go together.
    pub fn options(&self, gpu: Option<GpuUuid>) -> Result<Options, String> {
        let mut line = Vec::new();
        for name in &self.names {
            let (values, origin) = self.effective(name, gpu);
            if origin != Origin::Default {
                line.extend(as_arguments(name, &values)?);
            }
        }
        parse(std::iter::once(OsString::from("nvshare-arbiter")).chain(line))
            .and_then(|matches| Options::from_arg_matches(&matches))
            .map_err(|error| reason(&error))
    }

    /// Does what a user asks for, who may. Nothing changes if any part of it is wrong.
    ///
    /// # Errors
    /// What is wrong, and what would be right.
    pub fn request(
        &mut self,
        gpu: Option<GpuUuid>,
        change: &SettingsChange,
        user: u32,
    ) -> Result<(), String> {
        let mut next = self.clone();
        match change {
            SettingsChange::Ask => return Ok(()),
            SettingsChange::Set(values) => {
                for (name, value) in values {
                    let name = next.changeable(name, gpu)?.clone();
                    check(&name, &[value.into()]).map_err(|why| format!("{}: {why}", name.name))?;
                    next.forget(&name.name, gpu);
                    let (name, value) = (name.name, value.clone());
                    next.requests.push(Requested { gpu, name, value, user });
                }
            }
            SettingsChange::Reset(names) if names.is_empty() => {
                next.requests.retain(|request| gpu.is_some() && request.gpu != gpu);
            }
            SettingsChange::Reset(names) => {
                for name in names {
                    let name = next.changeable(name, gpu)?.name.clone();
                    next.forget(&name, gpu);
                }
            }
        }
        next.options(None)?;
        *self = next;
        Ok(())
    }

    /// Whatever is asked for all GPUs replaces what was asked for one.
    fn forget(&mut self, name: &str, gpu: Option<GpuUuid>) {
        self.requests.retain(|request| request.name != name || gpu.is_some() && request.gpu != gpu);
    }

    fn changeable(&self, name: &str, gpu: Option<GpuUuid>) -> Result<&Name, String> {
        let name = self.name(name)?;
        match (name.change, gpu) {
            (Change::OfAGpu, _) | (Change::OfTheNode, None) => Ok(name),
            (Change::OfTheNode, Some(_)) => {
                Err(format!("{} holds for the whole node: leave out the GPU", name.name))
            }
            (Change::AtStart, _) => Err(format!(
                "{} changes only when the arbiter starts: set it in {FILE}, and `systemctl restart nvshare-arbiter`; clients go on meanwhile",
                name.name
            )),
        }
    }

    /// Reads the file again, and drops what was asked for at run time. Returns what has changed.
    ///
    /// # Errors
    /// The file is wrong. Nothing has changed then.
    pub fn reload(&mut self) -> Result<Vec<Changed>, String> {
        let mut next = self.clone();
        next.entries = next.read_file()?;
        next.requests.clear();
        next.options(None)?;
        // What was asked for one GPU counts as a change too.
        let gpus: Vec<_> = self.requests.iter().map(|request| request.gpu).chain([None]).collect();
        let mut changed: Vec<Changed> = Vec::new();
        for name in &self.names {
            for gpu in &gpus {
                let (before, after) = (self.shown(name, *gpu), next.shown(name, None));
                if before != after && !changed.iter().any(|known| known.name == name.name) {
                    changed.push(Changed { name: name.name.clone(), before, after, change: name.change });
                }
            }
        }
        *self = next;
        Ok(changed)
    }
}

/// Reads a command line, without the variables.
///
/// # Errors
/// clap's.
pub fn parse<T: Into<OsString> + Clone>(
    arguments: impl IntoIterator<Item = T>,
) -> Result<ArgMatches, clap::Error> {
    names::arguments().try_get_matches_from(arguments)
}

/// What a variable is set to. One that is set to nothing says nothing.
fn read_variables(names: &[Name], variable: impl Fn(&str) -> Option<OsString>) -> Result<Layer, String> {
    let mut layer = Layer::new();
    for name in names {
        let Some(of) = &name.variable else { continue };
        let Some(value) = variable(of).filter(|value| !value.is_empty()) else { continue };
        let values = match name.is_list {
            true => value.to_string_lossy().split(',').map(|item| item.trim().into()).collect(),
            false => vec![value],
        };
        check(name, &values).map_err(|why| format!("{of}: {why}"))?;
        layer.insert(name.name.clone(), values);
    }
    Ok(layer)
}

/// Whether a switch is on.
fn truth(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" | "y" | "t" => Some(true),
        "false" | "no" | "off" | "0" | "n" | "f" => Some(false),
        _ => None,
    }
}

/// Values as a command line has them.
fn as_arguments(name: &Name, values: &[OsString]) -> Result<Vec<OsString>, String> {
    let argument = |value: &OsString| {
        let mut argument = OsString::from(format!("--{}=", name.name));
        argument.push(value);
        argument
    };
    if !name.is_switch {
        return Ok(values.iter().map(argument).collect());
    }
    let text = values.first().map(|value| value.to_string_lossy().into_owned()).unwrap_or_default();
    match truth(&text) {
        Some(true) => Ok(vec![format!("--{}", name.name).into()]),
        Some(false) => Ok(Vec::new()),
        None => Err(format!("'{text}' is neither true nor false")),
    }
}

/// What is wrong with the values of an option.
fn check(name: &Name, values: &[OsString]) -> Result<(), String> {
    let arguments = as_arguments(name, values)?;
    let line = std::iter::once(OsString::from("nvshare-arbiter")).chain(arguments);
    parse(line)
        .and_then(|matches| Options::from_arg_matches(&matches))
        .map(|_| ())
        .map_err(|error| reason(&error))
}

/// What clap says is wrong, without what it adds for a command line.
fn reason(error: &clap::Error) -> String {
    if let Some(source) = error.source() {
        return source.to_string();
    }
    let said = error.to_string();
    let lines = said.lines().take_while(|line| !line.trim().is_empty());
    let lines: Vec<_> = lines.map(|line| line.trim().trim_start_matches("error: ")).collect();
    lines.join(" ")
}

#[cfg(test)]
mod tests;
