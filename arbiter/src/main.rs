//! `nvshare-arbiter`: see the library.

use clap::Parser;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SigSet, Signal};
use nvshare::standard_error::StandardError;
use nvshare::units::{GRANULE, GpuUuid, format_size};
use nvshare::{paths, runtime_dir};
use nvshare_arbiter::options::{LogFormat, Options};
use nvshare_arbiter::pages::Succession;
use nvshare_arbiter::sampling::{Gpu, NvmlSource, Source};
use nvshare_arbiter::server::Server;
use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Bad input, or a directory that another arbiter serves.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let options = Options::parse();
    log(&options);
    // It waits until the loop reads it: NVML takes seconds to begin.
    let _ = [Signal::SIGHUP].into_iter().collect::<SigSet>().thread_block();
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
    let dir = options.runtime_dir.clone().unwrap_or_else(paths::arbiter_dir);
    let made = !dir.exists();
    runtime_dir::prepare(&dir).map_err(|error| error.to_string())?;
    let result = check_room(&dir)
        .and_then(|()| Directory::lock(&dir))
        .and_then(|directory| serve_in(&dir, options, directory));
    if made {
        // Not if something is in it still.
        let _ = std::fs::remove_dir(&dir);
    }
    result
}

fn serve_in(dir: &Path, options: Options, mut directory: Directory) -> Result<(), String> {
    let pools = options.pools();
    let same = directory.before.as_ref() == Some(&pools);
    let succession = if options.exit_when_idle && !same { Succession::Stranger } else { Succession::Heir };
    let ready = options.ready_fd;
    let started = gpus(&options).and_then(|(gpus, source)| {
        let sign = || directory.sign(&pools);
        Server::start(options, dir.to_owned(), succession, &sign, gpus, source)
            .map_err(|error| error.to_string())
    });
    let server = started.inspect_err(|_| directory.give_up())?;
    tracing::info!(dir = %dir.display(), "serving");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    if let Some(fd) = ready {
        // SAFETY: whoever started us made this descriptor for this purpose, and we use it once.
        let mut pipe = unsafe { File::from_raw_fd(fd) };
        let _ = pipe.write_all(b"ready\n");
    }
    server.run().map_err(|error| error.to_string())
}

/// What the runtime directory must have left, in bytes: for the lock, the records of all GPUs, and their successors.
const ROOM: u64 = 64 << 10;

/// Checks that the runtime directory's file system is not full, which would show only when a client registers.
fn check_room(dir: &Path) -> Result<(), String> {
    let room = nix::sys::statvfs::statvfs(dir)
        .map_err(|error| format!("the runtime directory {} cannot be looked at: {error}", dir.display()))?;
    // Some file systems have no bound, and say so with zeros.
    let left = room.blocks_available().saturating_mul(room.fragment_size());
    if room.blocks() > 0 && left < ROOM {
        return Err(format!(
            "the file system of the runtime directory {} is full: it has {} left, and the arbiter needs {}; make room there, or name another --runtime-dir",
            dir.display(),
            format_size(left),
            format_size(ROOM)
        ));
    }
    Ok(())
}

/// One arbiter a directory: the lock on a file in it, for as long as this lives. In the file stand the arbiter's pid, and
/// how it sizes its pools ([`Options::pools`]).
struct Directory {
    path: PathBuf,
    file: Flock<File>,
    /// What the arbiter before said of its pools. `None`: nobody knows.
    before: Option<String>,
}

/// Bytes of the lock file. It is always written whole and in one call, so whenever an arbiter is killed, the next one
/// reads either what was there or what was written.
const SIGNED: usize = 256;

impl Directory {
    fn lock(dir: &Path) -> Result<Self, String> {
        let path = paths::arbiter_lock(dir);
        loop {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK)
                .open(&path)
                .map_err(|error| format!("{} cannot be opened: {error}", path.display()))?;
            let owner = file.metadata().map_err(|error| format!("{}: {error}", path.display()))?.uid();
            if owner != nix::unistd::geteuid().as_raw() {
                return Err(format!(
                    "{} belongs to user {owner}, who could keep every arbiter away with it: remove it, or name another --runtime-dir",
                    path.display()
                ));
            }
            let said = std::io::read_to_string(&file).unwrap_or_default();
            let mut said = said.lines();
            let pid = said.next().unwrap_or_default().trim().to_owned();
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                // Its owner may have ended and removed it meanwhile: then somebody else may have the one that is there.
                Ok(file) if is_at(&path, &file) => {
                    let before = said.next().map(|pools| pools.trim().to_owned());
                    let directory = Self { path, file, before: before.filter(|pools| !pools.is_empty()) };
                    directory.sign(directory.before.as_deref().unwrap_or_default()).map_err(|error| {
                        format!("{} cannot be written: {error}", directory.path.display())
                    })?;
                    return Ok(directory);
                }
                Ok(_) => {}
                Err((_, Errno::EWOULDBLOCK)) => {
                    return Err(format!(
                        "another arbiter (pid {pid}) serves {} already; end it first, or give this one another --runtime-dir",
                        dir.display()
                    ));
                }
                Err((_, error)) => return Err(format!("{} cannot be locked: {error}", path.display())),
            }
        }
    }

    /// Says who serves here, and how it sizes its pools.
    fn sign(&self, pools: &str) -> std::io::Result<()> {
        let said = format!("{}\n{pools}\n", std::process::id());
        self.file.write_all_at(format!("{said:<SIGNED$}").as_bytes(), 0)
    }

    /// This arbiter does not serve. What one before it said stays, for the next.
    fn give_up(&mut self) {
        if self.before.is_none() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Whether a file is the one that has this path.
fn is_at(path: &Path, file: &File) -> bool {
    let identity = |data: std::io::Result<std::fs::Metadata>| data.ok().map(|data| (data.dev(), data.ino()));
    identity(path.metadata()) == identity(file.metadata())
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever reads while an arbiter signs sees what an arbiter would leave that is killed then.
    #[test]
    fn an_arbiter_that_is_killed_while_it_signs_leaves_what_stood_there_or_what_it_says() {
        let dir = std::env::temp_dir().join(format!("nvshare-sign-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let directory = Directory::lock(&dir).unwrap();
        assert_eq!(directory.before, None);
        let pools = ["a private arbiter with --capacity 64.00 MiB", "a service with --headroom 0 B"];
        directory.sign(pools[0]).unwrap();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for pools in pools.iter().cycle() {
                    directory.sign(pools).unwrap();
                    if done.load(std::sync::atomic::Ordering::Relaxed) {
                        return;
                    }
                }
            });
            let said = |_| std::fs::read_to_string(paths::arbiter_lock(&dir)).unwrap();
            let torn = (0..20_000).map(said).find(|said| {
                let lines: Vec<_> = said.lines().collect();
                lines[..2.min(lines.len())] != [std::process::id().to_string().as_str(), pools[0]]
                    && lines[..2.min(lines.len())] != [std::process::id().to_string().as_str(), pools[1]]
            });
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(torn, None);
        });
        directory.sign(pools[1]).unwrap();
        drop(directory);
        assert_eq!(Directory::lock(&dir).unwrap().before.as_deref(), Some(pools[1]));
        std::fs::remove_dir_all(dir).unwrap();
    }
}
