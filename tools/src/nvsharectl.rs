//! `nvsharectl`: what users of the C nvshare type, and what it means here.
//!
//! `-T` sets the quantum of every GPU. `-S off` let all programs of the C nvshare run at once, on memory that the driver pages on
//! demand. Here memory moves as a whole, so what does not fit cannot run at once; with `-S off` nobody is preempted any more:
//! whoever has the GPU keeps it until it has no work. Programs whose memory fits run at once either way.

use crate::ctl::{ask, read};
use crate::{Failure, say};
use clap::Parser;
use nvshare::control::SettingsChange;
use nvshare::paths;
use std::path::PathBuf;

/// Settings of the nvshare arbiter, as the C nvshare has them. `nvshare ctl` has all
#[derive(Debug, Parser)]
#[command(
    name = "nvsharectl",
    version,
    arg_required_else_help = true,
    max_term_width = 80,
    group = clap::ArgGroup::new("what").required(true).multiple(true),
    after_help = "\
With -S off nobody is preempted: whoever has the GPU keeps it until it has no work, and the others wait. (Memory that does \
not fit is not paged on demand, so it cannot thrash.) Programs whose memory fits run at once either way.

Examples:
  nvsharectl -T 30
  nvsharectl -S off
  nvshare ctl get        what holds, and who has set it"
)]
pub struct Cli {
    /// The time quantum in seconds: how long a client runs while others wait
    #[arg(short = 'T', long = "set-tq", value_name = "N", group = "what", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    set_tq: Option<u32>,
    /// Whether clients take turns when their memory does not fit: on or off
    #[arg(short = 'S', long = "anti-thrash", value_name = "on|off", group = "what", value_parser = ["on", "off"], hide_possible_values = true)]
    anti_thrash: Option<String>,
    /// Directory of the arbiter's socket [default: $NVSHARE_RUNTIME_DIR, or /run/nvshare, or one of your own]
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
}

/// Does what was asked for.
///
/// # Errors
/// No arbiter answers, or it refuses.
pub fn run(cli: &Cli) -> Result<(), Failure> {
    let dir = cli.runtime_dir.clone().unwrap_or_else(paths::runtime_dir);
    let quantum = cli.set_tq.map(|seconds| ("quantum".to_owned(), format!("{seconds}s")));
    let anti_thrash = cli.anti_thrash.clone().map(|switch| ("anti-thrash".to_owned(), switch));
    let values: Vec<_> = quantum.into_iter().chain(anti_thrash).collect();
    read(&ask(&dir, None, &SettingsChange::Set(values))?)?;
    if let Some(seconds) = cli.set_tq {
        say!("the time quantum is {seconds} s on all GPUs");
    }
    match cli.anti_thrash.as_deref() {
        Some("off") => say!("anti-thrash is off: whoever has the GPU keeps it until it has no work"),
        Some(_) => say!("anti-thrash is on: clients take turns when their memory does not fit"),
        None => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_users_of_the_c_nvshare_type_is_understood() {
        for line in [
            &["-T", "30"][..],
            &["-T30"],
            &["--set-tq=30"],
            &["-S", "off"],
            &["--anti-thrash=on"],
            &["-T", "3", "-S", "on"],
        ] {
            assert!(Cli::try_parse_from([&["nvsharectl"], line].concat()).is_ok(), "{line:?}");
        }
        for line in [&["-T", "0"][..], &["-T", "-3"], &["-T", "soon"], &["-S", "perhaps"], &[]] {
            assert!(Cli::try_parse_from([&["nvsharectl"], line].concat()).is_err(), "{line:?}");
        }
    }
}
