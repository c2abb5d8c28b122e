//! Random work from a seed on the simulated GPU, to find what nobody thought of.
//!
//! `stress`: real processes come, go, stop, fork, exec and are killed, and so is the arbiter; nobody may hang, see a wrong
//! byte or leave anything behind. `fuzz`: random driver calls, natively and under nvshare, must give the same answers.
//!
//! | module | what it holds |
//! |---|---|
//! | [`machine`] | a simulated machine with an arbiter that can be killed, and what must be left when all have ended |
//! | [`progress`] | the file in which each process says what its threads do |
//! | [`stress`] | the supervisor of the processes of `tests/programs/random_client.c` |
//! | [`fuzz`] | runs `tests/programs/random_calls.c` twice and compares; makes a failing seed short |
//! | [`autopsy`] | what is shown of processes that are stuck |
//! | [`children`] | starting processes that end with this one |
//! | [`clock`] | what counts as time without progress |

mod autopsy;
mod children;
mod clock;
mod fuzz;
mod machine;
mod progress;
mod stress;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Random work from a seed on the simulated GPU.
#[derive(Debug, Parser)]
#[command(name = "nvshare-stress")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Many processes that come, go and are killed: no hang, no wrong byte, no leak
    Stress(stress::Options),
    /// The same random driver calls natively and under nvshare: the same answers
    Fuzz(fuzz::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Stress(options) => stress::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            println!("\nFAILED: {why}");
            ExitCode::FAILURE
        }
    }
}
