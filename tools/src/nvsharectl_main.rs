//! `nvsharectl`: see `nvsharectl --help`.

use clap::Parser;
use nvshare_tools::nvsharectl::{Cli, run};
use nvshare_tools::{Failure, complain, output};
use std::process::ExitCode;

fn main() -> ExitCode {
    match run(&Cli::parse()).and_then(|()| output::finish()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { status, message }) => {
            if !message.is_empty() {
                complain!("nvsharectl: {message}");
            }
            ExitCode::from(status)
        }
    }
}
