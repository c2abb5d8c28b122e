//! `nvshare device-plugin` and `nvshare dra-driver`: another program, `nvshare-kubernetes`, which only nodes of Kubernetes need.

use crate::{Failure, node};
use std::convert::Infallible;
use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// The program.
const PROGRAM: &str = "nvshare-kubernetes";

/// Options of `nvshare device-plugin` and `nvshare dra-driver`: the other program's own.
#[derive(Debug, clap::Args)]
#[command(
    disable_help_flag = true,
    after_help = "\
It is another program, nvshare-kubernetes, which is installed with nvshare: its manual pages are nvshare-kubernetes(8) and those of its \
commands."
)]
pub struct Options {
    /// An option of nvshare-kubernetes; --help lists them
    #[arg(value_name = "OPTION", trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Goes on as `nvshare-kubernetes COMMAND`, with the same arguments.
///
/// # Errors
/// That program is not installed, or cannot be started.
pub fn run(command: &str, options: &Options) -> Result<Infallible, Failure> {
    let program = node::beside(PROGRAM).unwrap_or_else(|| PathBuf::from(PROGRAM));
    let error = Command::new(&program).arg(command).args(&options.arguments).exec();
    Err(Failure::usage(if error.kind() == io::ErrorKind::NotFound {
        format!(
            "{PROGRAM} is neither beside this program nor in $PATH: the Debian package and the container image have it, and \
             `cargo build --release -p {PROGRAM}` in nvshare's sources makes it"
        )
    } else {
        format!("{} cannot be started: {error}", program.display())
    }))
}
