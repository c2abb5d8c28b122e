//! `nvshare`: see `nvshare --help`.

use clap::{Parser, Subcommand};
use nvshare_tools::{Failure, run, status};
use std::process::ExitCode;

/// Several processes share one GPU as if each had all of it.
#[derive(Debug, Parser)]
#[command(name = "nvshare", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a program on the shared GPUs
    Run(run::Options),
    /// Show GPUs and clients: who runs, who waits, whose memory is where
    Status(status::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(options) => run::run(options),
        Command::Status(options) => status::run(&options).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|Failure { status, message }| {
        eprintln!("nvshare: {message}");
        ExitCode::from(status)
    })
}
