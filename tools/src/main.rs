//! `nvshare`: see `nvshare --help`.

use clap::Parser;
use nvshare_tools::cli::{self, Cli, Command};
use nvshare_tools::{
    Failure, bench, complain, ctl, demo, health, internal, kubernetes, output, run, set, sim, status, top,
    trace, wait,
};
use std::process::ExitCode;

fn main() -> ExitCode {
    let done = |()| ExitCode::SUCCESS;
    let result = match Cli::parse_from(cli::arguments(std::env::args_os().collect())).command {
        Command::Run(options) => run::run(options),
        Command::Status(options) => status::run(&options).map(done),
        Command::Top(options) => top::run(&options).map(done),
        Command::Set(options) => set::run(&options).map(done),
        Command::Ctl(options) => ctl::run(&options).map(done),
        Command::Wait(options) => wait::run(&options).map(done),
        Command::Health(options) => health::run(&options).map(done),
        Command::Bench(options) => bench::run(&options).map(done),
        Command::Demo(options) => demo::run(&options).map(done),
        Command::Sim(options) => sim::run(&options).map(done),
        Command::Trace(options) => trace::run(&options).map(done),
        Command::DevicePlugin(options) => {
            kubernetes::run("device-plugin", &options).map(|never| match never {})
        }
        Command::DraDriver(options) => kubernetes::run("dra-driver", &options).map(|never| match never {}),
        Command::Internal(options) => internal::run(options).map(done),
    };
    result.and_then(|code| output::finish().map(|()| code)).unwrap_or_else(|Failure { status, message }| {
        if !message.is_empty() {
            complain!("nvshare: {message}");
        }
        ExitCode::from(status)
    })
}
