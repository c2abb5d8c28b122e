//! `nvshare-kubernetes`: see the library.

use clap::Parser;
use nvshare::standard_error::StandardError;
use nvshare_kubernetes::options::{Cli, Command, Log, LogFormat};
use nvshare_kubernetes::{device_plugin, dra};
use std::io::Write;
use std::process::ExitCode;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

fn main() -> ExitCode {
    // With libnvshare.so in /etc/ld.so.preload, this process has loaded it too. NVML must tell the GPUs as they are.
    // SAFETY: there is no other thread yet that could read the environment.
    unsafe { std::env::set_var("NVSHARE_DISABLE", "1") };
    let Cli { command, log } = Cli::parse();
    init_log(&log);
    let result = match command {
        Command::DevicePlugin(options) => device_plugin::run(options),
        Command::DraDriver(options) => dra::run(options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(StandardError, "nvshare-kubernetes: {error}");
            ExitCode::FAILURE
        }
    }
}

fn init_log(options: &Log) {
    let lines = tracing_subscriber::fmt::layer().with_writer(|| StandardError).with_target(false);
    let log = tracing_subscriber::registry().with(options.log_level);
    match options.log_format {
        LogFormat::Text => log.with(lines.with_ansi(false)).init(),
        LogFormat::Json => log.with(lines.json()).init(),
    }
}
