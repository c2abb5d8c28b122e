//! `nvshare-arbiter`: see the library.

use clap::error::ErrorKind;
use nix::sys::signal::{SigSet, Signal};
use nvshare::standard_error::StandardError;
use nvshare::{paths, runtime_dir};
use nvshare_arbiter::configuration::{self, Configuration};
use nvshare_arbiter::directory::{self, DirectoryLock};
use nvshare_arbiter::gpu_selection::select_gpus;
use nvshare_arbiter::options::{LogFormat, Options};
use nvshare_arbiter::pages::Succession;
use nvshare_arbiter::server::{Server, SetLogLevel};
use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::path::Path;
use std::process::ExitCode;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

/// The exit status for bad input, and for a directory that another arbiter serves.
const USAGE_ERROR: u8 = 2;

fn main() -> ExitCode {
    // With libnvshare.so in /etc/ld.so.preload, this process has loaded it too. The arbiter must see the GPU as it is, and must not
    // ask itself for the pool.
    // SAFETY: there is no other thread yet that could read the environment.
    unsafe { std::env::set_var("NVSHARE_DISABLE", "1") };
    let arguments: Vec<_> = std::env::args_os().collect();
    let matches = configuration::parse(&arguments).unwrap_or_else(|error| {
        if error.kind() == ErrorKind::DisplayHelp {
            // The one that is shown has the variables.
            let _ = configuration::command().try_get_matches_from(&arguments).map_err(|help| help.exit());
        }
        error.exit()
    });
    let read = Configuration::new(&matches, |name| std::env::var_os(name), Path::new(configuration::FILE))
        .and_then(|configuration| Ok((configuration.options(None)?, configuration)));
    let (options, configuration) = match read {
        Ok(read) => read,
        Err(error) => return fail(&error),
    };
    if options.check_config {
        let _ = writeln!(std::io::stdout(), "{}", configuration.summary());
        return ExitCode::SUCCESS;
    }
    let set_log_level = init_log(&options);
    // A SIGHUP that comes while NVML starts, which takes seconds, waits until the event loop reads it.
    let _ = [Signal::SIGHUP].into_iter().collect::<SigSet>().thread_block();
    match serve(options, (configuration, set_log_level)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &str) -> ExitCode {
    let _ = writeln!(StandardError, "nvshare-arbiter: {error}");
    ExitCode::from(USAGE_ERROR)
}

/// Begins to log. Returns what sets the level from then on.
fn init_log(options: &Options) -> SetLogLevel {
    let (level, handle) = reload::Layer::new(options.log_level);
    let lines = tracing_subscriber::fmt::layer().with_writer(|| StandardError).with_target(false);
    let log = tracing_subscriber::registry().with(level);
    match options.log_format {
        LogFormat::Text => log.with(lines.with_ansi(false)).init(),
        LogFormat::Json => log.with(lines.json()).init(),
    }
    Box::new(move |level| {
        let _ = handle.reload(level);
    })
}

fn serve(options: Options, configured: (Configuration, SetLogLevel)) -> Result<(), String> {
    let dir = options.runtime_dir.clone().unwrap_or_else(paths::arbiter_dir);
    let is_new = !dir.exists();
    runtime_dir::prepare(&dir).map_err(|error| error.to_string())?;
    let result = directory::check_free_space(&dir)
        .and_then(|()| DirectoryLock::acquire(&dir))
        .and_then(|lock| serve_in(&dir, options, configured, lock));
    if is_new {
        // This fails, as it should, while something is in it.
        let _ = std::fs::remove_dir(&dir);
    }
    result
}

fn serve_in(
    dir: &Path,
    options: Options,
    configured: (Configuration, SetLogLevel),
    mut lock: DirectoryLock,
) -> Result<(), String> {
    let pools = options.pools();
    let same = lock.before.as_ref() == Some(&pools);
    let succession = if options.exit_when_idle && !same { Succession::Stranger } else { Succession::Heir };
    let ready = options.ready_fd;
    let started = select_gpus(&options).and_then(|(gpus, source)| {
        let sign = || lock.sign(&pools);
        Server::start(configured, dir.to_owned(), succession, &sign, gpus, source)
            .map_err(|error| error.to_string())
    });
    let server = started.inspect_err(|_| lock.give_up())?;
    tracing::info!(dir = %dir.display(), "serving");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    if let Some(fd) = ready {
        // SAFETY: whoever started us made this descriptor for this purpose, and we use it once.
        let mut pipe = unsafe { File::from_raw_fd(fd) };
        let _ = pipe.write_all(b"ready\n");
    }
    server.run().map_err(|error| error.to_string())
}
