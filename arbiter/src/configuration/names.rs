//! The names of the options: arguments, variables and keys of the file. All come from one definition, [`Options`], so an option
//! that is added there has all three.

use crate::options::Options;
use clap::builder::Resettable;
use clap::{Arg, ArgAction, Command, CommandFactory};

/// Options that say something about one start of an arbiter, or where its configuration is, and are no settings of the node.
const ONLY_ARGUMENTS: [&str; 4] = ["check-config", "exit-when-idle", "owner-pid", "ready-fd"];

/// The same, but there is a variable.
const NOT_IN_THE_FILE: [&str; 1] = ["config"];

/// Variables that have been there before the others, or are read by other programs too.
const OTHER_VARIABLES: [(&str, &str); 4] = [
    ("runtime-dir", "NVSHARE_RUNTIME_DIR"),
    ("log-level", "NVSHARE_LOG"),
    ("allow-second-arbiter", "NVSHARE_ALLOW_SECOND_ARBITER"),
    ("config", "NVSHARE_CONFIG"),
];

/// Settings that change while the arbiter runs, for one GPU or for all.
const OF_A_GPU: [&str; 13] = [
    "capacity",
    "headroom",
    "anti-thrash",
    "quantum",
    "quantum-factor",
    "quantum-longest",
    "quantum-min",
    "quantum-max",
    "deadline",
    "drain-target",
    "idle-grace",
    "unresponsive-after",
    "kill-unresponsive",
];

/// Settings that change while the arbiter runs, for the node.
const OF_THE_NODE: [&str; 2] = ["slots-per-user", "log-level"];

/// When a change of an option takes effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// At once, for one GPU or for all.
    OfAGpu,
    /// At once, for the node.
    OfTheNode,
    /// When the arbiter starts.
    AtStart,
}

/// An option.
#[derive(Debug, Clone)]
pub struct Name {
    /// What clap calls it.
    pub(super) id: String,
    /// The argument without its dashes, and the key of the file.
    pub name: String,
    /// Its variable.
    pub variable: Option<String>,
    /// Whether the file may have it.
    pub in_file: bool,
    /// It is given without a value, or with true or false.
    pub is_switch: bool,
    /// It may be given several times.
    pub is_list: bool,
    /// When a change of it takes effect.
    pub change: Change,
    /// What it holds when it is not given.
    pub default: Option<String>,
    /// What it is for, in a sentence or two.
    pub help: String,
}

/// The command line as it is shown: with the variables.
pub fn command() -> Command {
    Options::command().mut_args(|arg| match variable(&arg) {
        Some(variable) => arg.env(&*variable.leak()).hide_env_values(true),
        None => arg,
    })
}

/// The command line as it is read: variables are read apart ([`super`]).
pub(super) fn arguments() -> Command {
    Options::command().mut_args(|arg| arg.env(Resettable::Reset))
}

fn long(arg: &Arg) -> Option<&str> {
    arg.get_long().filter(|long| !["help", "version"].contains(long))
}

fn variable(arg: &Arg) -> Option<String> {
    let name = long(arg)?;
    if ONLY_ARGUMENTS.contains(&name) {
        return None;
    }
    let other =
        OTHER_VARIABLES.iter().find(|(of, _)| *of == name).map(|(_, variable)| (*variable).to_owned());
    Some(other.unwrap_or_else(|| format!("NVSHARE_ARBITER_{}", name.replace('-', "_").to_uppercase())))
}

/// All options.
pub fn names() -> Vec<Name> {
    Options::command().get_arguments().filter_map(name).collect()
}

fn name(arg: &Arg) -> Option<Name> {
    let long = long(arg)?;
    let change = if OF_A_GPU.contains(&long) {
        Change::OfAGpu
    } else if OF_THE_NODE.contains(&long) {
        Change::OfTheNode
    } else {
        Change::AtStart
    };
    let is_switch = matches!(arg.get_action(), ArgAction::SetTrue);
    let default = arg.get_default_values().first().map(|value| value.to_string_lossy().into_owned());
    Some(Name {
        id: arg.get_id().to_string(),
        name: long.to_owned(),
        variable: variable(arg),
        in_file: !ONLY_ARGUMENTS.contains(&long) && !NOT_IN_THE_FILE.contains(&long),
        is_switch,
        is_list: matches!(arg.get_action(), ArgAction::Append),
        change,
        default: default.or_else(|| is_switch.then(|| "false".into())),
        help: arg.get_help().map(ToString::to_string).unwrap_or_default(),
    })
}

/// The name that is nearest to one that nobody knows, if any is near.
pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let likeness = known.map(|known| (strsim::jaro_winkler(name, known), known));
    let (likeness, nearest) = likeness.max_by(|(first, _), (second, _)| first.total_cmp(second))?;
    (likeness > 0.75).then_some(nearest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<String> {
        names().into_iter().map(|name| name.name).collect()
    }

    #[test]
    fn every_name_that_is_treated_in_a_special_way_is_an_option() {
        let others = OTHER_VARIABLES.iter().map(|(name, _)| name);
        let special = ONLY_ARGUMENTS.iter().chain(&NOT_IN_THE_FILE).chain(others);
        let all = all();
        for name in special.chain(&OF_A_GPU).chain(&OF_THE_NODE) {
            assert!(all.iter().any(|known| known == name), "--{name} is no option");
        }
    }

    #[test]
    fn every_option_of_the_node_has_a_variable_and_a_key() {
        for name in names() {
            let special = ONLY_ARGUMENTS.contains(&&*name.name);
            assert_eq!(name.variable.is_none(), special, "{name:?}");
            assert!(name.in_file || special || NOT_IN_THE_FILE.contains(&&*name.name), "{name:?}");
        }
    }

    #[test]
    fn the_command_line_shows_the_variables() {
        let help = command().render_help().to_string();
        let unwrapped = help.split_whitespace().collect::<Vec<_>>().join(" ");
        for variable in ["NVSHARE_ARBITER_QUANTUM_MIN", "NVSHARE_RUNTIME_DIR", "NVSHARE_LOG"] {
            assert!(unwrapped.contains(&format!("[env: {variable}]")), "{variable}: {help}");
        }
        assert!(help.lines().all(|line| line.chars().count() <= 80), "{help}");
    }

    #[test]
    fn a_slip_of_the_pen_is_recognised() {
        let (all, near) =
            (all(), |name: &str| nearest(name, ["quantum", "headroom", "idle-grace"].into_iter()));
        for (slip, name) in [("qauntum", "quantum"), ("idle_grace", "idle-grace"), ("head-room", "headroom")]
        {
            assert_eq!(near(slip), Some(name));
        }
        assert_eq!(near("xyz"), None);
        assert_eq!(nearest("capcity", all.iter().map(String::as_str)), Some("capacity"));
    }
}
