//! `nvshare-arbiter`: see the library.

use clap::Parser;
use nix::sys::signal::{SigSet, Signal};
use nvshare::standard_error::StandardError;
use nvshare::{paths, runtime_dir};
use nvshare_arbiter::directory::{self, DirectoryLock};
use nvshare_arbiter::gpu_selection::select_gpus;
use nvshare_arbiter::options::{LogFormat, Options};
use nvshare_arbiter::pages::Succession;
use nvshare_arbiter::server::Server;
use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::path::Path;
use std::process::ExitCode;

/// The exit status for bad input, and for a directory that another arbiter serves.
const USAGE_ERROR: u8 = 2;

fn main() -> ExitCode {
    // With libnvshare.so in /etc/ld.so.preload, this process has loaded it too. The arbiter must see the GPU as it is, and must not
    // ask itself for the pool.
    // SAFETY: there is no other thread yet that could read the environment.
    unsafe { std::env::set_var("NVSHARE_DISABLE", "1") };
    let options = Options::parse();
    init_log(&options);
    // A SIGHUP that comes while NVML starts, which takes seconds, waits until the event loop reads it.
    let _ = [Signal::SIGHUP].into_iter().collect::<SigSet>().thread_block();
    match serve(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(StandardError, "nvshare-arbiter: {error}");
            ExitCode::from(USAGE_ERROR)
        }
    }
}

fn init_log(options: &Options) {
    let builder = tracing_subscriber::fmt()
        .with_max_level(options.log_level)
        .with_writer(|| StandardError)
        .with_target(false);
    match options.log_format {
        LogFormat::Text => builder.with_ansi(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}

fn serve(options: Options) -> Result<(), String> {
    let dir = options.runtime_dir.clone().unwrap_or_else(paths::arbiter_dir);
    let is_new = !dir.exists();
    runtime_dir::prepare(&dir).map_err(|error| error.to_string())?;
    let result = directory::check_free_space(&dir)
        .and_then(|()| DirectoryLock::acquire(&dir))
        .and_then(|lock| serve_in(&dir, options, lock));
    if is_new {
        // This fails, as it should, while something is in it.
        let _ = std::fs::remove_dir(&dir);
    }
    result
}

fn serve_in(dir: &Path, options: Options, mut lock: DirectoryLock) -> Result<(), String> {
    let pools = options.pools();
    let same = lock.before.as_ref() == Some(&pools);
    let succession = if options.exit_when_idle && !same { Succession::Stranger } else { Succession::Heir };
    let ready = options.ready_fd;
    let started = select_gpus(&options).and_then(|(gpus, source)| {
        let sign = || lock.sign(&pools);
        Server::start(options, dir.to_owned(), succession, &sign, gpus, source)
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
