//! `nvshare-arbiter`: see the library.

use clap::Parser;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nvshare::paths;
use nvshare::standard_error::StandardError;
use nvshare::units::{GRANULE, GpuUuid, format_size};
use nvshare_arbiter::options::{LogFormat, Options};
use nvshare_arbiter::sampling::{Gpu, NvmlSource, Source};
use nvshare_arbiter::server::Server;
use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::path::Path;
use std::process::ExitCode;

/// Bad input, or a directory that another arbiter serves.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let options = Options::parse();
    log(&options);
    match serve(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(StandardError, "nvshare-arbiter: {error}");
            ExitCode::from(USAGE)
        }
    }
}

fn log(options: &Options) {
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
    let dir = options.runtime_dir.clone().unwrap_or_else(paths::runtime_dir);
    std::fs::create_dir_all(&dir)
        .map_err(|error| format!("the runtime directory {} cannot be made: {error}", dir.display()))?;
    let _lock = lock(&dir)?;
    let (gpus, source) = gpus(&options)?;
    let ready = options.ready_fd;
    let server = Server::start(options, dir.clone(), gpus, source).map_err(|error| error.to_string())?;
    tracing::info!(dir = %dir.display(), "serving");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    if let Some(fd) = ready {
        // SAFETY: whoever started us made this descriptor for this purpose, and we use it once.
        let mut pipe = unsafe { File::from_raw_fd(fd) };
        let _ = pipe.write_all(b"ready\n");
    }
    server.run().map_err(|error| error.to_string())
}

/// One arbiter a directory: holds a lock for as long as the result lives.
fn lock(dir: &Path) -> Result<Flock<File>, String> {
    let path = paths::arbiter_lock(dir);
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|error| format!("{} cannot be opened: {error}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            let _ = lock.set_len(0);
            let _ = writeln!(&mut *lock, "{}", std::process::id());
            Ok(lock)
        }
        Err((_, Errno::EWOULDBLOCK)) => {
            let pid = std::fs::read_to_string(&path).unwrap_or_default();
            Err(format!(
                "another arbiter (pid {}) serves {} already; end it first, or give this one another --runtime-dir",
                pid.trim(),
                dir.display()
            ))
        }
        Err((_, error)) => Err(format!("{} cannot be locked: {error}", path.display())),
    }
}

/// NVML, if there is one.
type Sampler = Option<Box<dyn Source>>;

/// The GPUs to serve, and where samples come from.
fn gpus(options: &Options) -> Result<(Vec<Gpu>, Sampler), String> {
    let source = match NvmlSource::open(&options.nvml_library) {
        Ok(source) => source,
        Err(error) => {
            let Some(total) = options.capacity.filter(|_| !options.gpus.is_empty()) else {
                return Err(format!(
                    "NVML ({}) cannot be used: {error}. Install the NVIDIA driver, name the library with --nvml-library, or give --gpu UUID and --capacity SIZE to do without",
                    options.nvml_library.display()
                ));
            };
            tracing::warn!("NVML cannot be used, so contexts are not counted: {error}");
            let named = options.gpus.iter().map(|uuid| Gpu { uuid: *uuid, total, link: None }).collect();
            return Ok((named, None));
        }
    };
    let found = source.gpus().map_err(|error| format!("NVML does not list the GPUs: {error}"))?;
    let list = |gpus: &[Gpu]| gpus.iter().map(|gpu| gpu.uuid.to_string()).collect::<Vec<_>>().join(", ");
    if let Some(unknown) = options.gpus.iter().find(|uuid| !found.iter().any(|gpu| gpu.uuid == **uuid)) {
        return Err(format!("--gpu {unknown}: there is no such GPU; there is {}", list(&found)));
    }
    let wanted = |uuid: GpuUuid| options.gpus.is_empty() || options.gpus.contains(&uuid);
    let served: Vec<_> = found.into_iter().filter(|gpu| wanted(gpu.uuid)).collect();
    if served.is_empty() {
        return Err("NVML lists no GPU on this node".into());
    }
    let nothing = |gpu: &&Gpu| gpu.total.saturating_sub(options.headroom) < GRANULE;
    if options.capacity.is_none()
        && let Some(small) = served.iter().find(nothing)
    {
        return Err(format!(
            "{} has {}, and --headroom {} leaves no pool of it: give less, or --capacity",
            small.uuid,
            format_size(small.total),
            format_size(options.headroom)
        ));
    }
    if let Some(capacity) = options.capacity
        && let Some(small) = served.iter().find(|gpu| gpu.total < capacity)
    {
        return Err(format!(
            "--capacity {}: {} has {}",
            format_size(capacity),
            small.uuid,
            format_size(small.total)
        ));
    }
    Ok((served, Some(Box::new(source))))
}
