//! `nvshare`: see `nvshare --help`.

use clap::{Parser, Subcommand};
use nvshare_tools::{Failure, bench, complain, demo, internal, output, run, set, sim, status, trace};
use std::process::ExitCode;

/// Several processes share one GPU as if each had all of it.
#[derive(Debug, Parser)]
#[command(
    name = "nvshare",
    version,
    arg_required_else_help = true,
    max_term_width = 80,
    after_help = "Examples:
  nvshare demo                        see it work, without a GPU
  nvshare run -- python3 train.py     run a program, as many at once as you like
  nvshare status                      who runs, who waits, whose memory is where
  nvshare set 4242 --priority high    change what a running client may have
  nvshare bench handoff               what a hand-off between processes costs

`nvshare COMMAND --help` has more."
)]
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
    /// Change a running client's weight, priority or memory limit
    Set(set::Options),
    /// Measure this machine: a launch, a hand-off, a switch
    Bench(bench::Options),
    /// See several jobs share a GPU that is too small for them; simulated, or real with --gpu
    Demo(demo::Options),
    /// Simulate clients, GPUs and policy from a scenario file: what would be, in seconds
    Sim(sim::Options),
    /// What the clients did lately, or do from now on, for a trace viewer or as a picture
    Trace(trace::Options),
    #[command(hide = true)]
    Internal(internal::Options),
}

fn main() -> ExitCode {
    let done = |()| ExitCode::SUCCESS;
    let result = match Cli::parse().command {
        Command::Run(options) => run::run(options),
        Command::Status(options) => status::run(&options).map(done),
        Command::Set(options) => set::run(&options).map(done),
        Command::Bench(options) => bench::run(&options).map(done),
        Command::Demo(options) => demo::run(&options).map(done),
        Command::Sim(options) => sim::run(&options).map(done),
        Command::Trace(options) => trace::run(&options).map(done),
        Command::Internal(options) => internal::run(options).map(done),
    };
    result.and_then(|code| output::finish().map(|()| code)).unwrap_or_else(|Failure { status, message }| {
        if !message.is_empty() {
            complain!("nvshare: {message}");
        }
        ExitCode::from(status)
    })
}
