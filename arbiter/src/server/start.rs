//! How an arbiter begins to serve: signals, the locks of its GPUs, their pages with the clients that live, the socket.

use super::clients::Clients;
use super::connections::Connections;
use super::error::{StartError, failed};
use super::event_loop::Server;
use super::gangs::Gangs;
use super::log_limits::LogLimits;
use super::overdue::OverdueClients;
use super::poller::{Poller, Token};
use super::sampler::Sampler;
use super::served_gpu::ServedGpu;
use super::socket::LazyListener;
use super::state::{SetLogLevel, State};
use crate::configuration::Configuration;
use crate::gpu_lock::{GpuLock, GpuLockError};
use crate::monitor::{self, Listener};
use crate::options::Options;
use crate::pages::{self, Succession, Survivor};
use crate::process;
use crate::sampling::{Gpu, Source};
use crate::stall_log::StallLog;
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nvshare::paths;
use nvshare::sync::now;
use nvshare::units::{GpuUuid, granules_in};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Between two attempts to lock a GPU, whose last arbiter may be ending.
const LOCK_RETRY_DELAY: Duration = Duration::from_millis(50);
const LOCK_ATTEMPTS: usize = 20;

/// A client that lived before this arbiter, and the index of its GPU.
type Survivors = Vec<(usize, Survivor)>;

impl Server {
    /// Serves `gpus` in `dir` as the configuration says; takes over what is there. `sign` writes down how this arbiter sizes its pools. It is called
    /// before a pool gets another size under living clients, so that what is written down is never of an arbiter before the
    /// one that sized the pools; and not by an arbiter that is refused.
    ///
    /// # Errors
    /// Another arbiter serves a GPU, or a page, the socket or the event loop cannot be made.
    pub fn start(
        (configuration, set_log_level): (Configuration, SetLogLevel),
        dir: PathBuf,
        succession: Succession,
        sign: &dyn Fn() -> std::io::Result<()>,
        gpus: Vec<Gpu>,
        source: Option<Box<dyn Source>>,
    ) -> Result<Self, StartError> {
        let options = configuration.options(None).map_err(StartError::Configuration)?;
        let socket = paths::socket(&dir);
        let poller = Poller::new().map_err(failed("no epoll"))?;
        let signals = block_signals()?;
        let gpu_locks = lock_gpus(&gpus, &options)?;
        if succession == Succession::Heir {
            sign().map_err(StartError::Sign)?;
        }
        // It is bound after the pages are there, so that whoever can connect finds them; or earlier, for clients that must
        // bring their page.
        let listener = LazyListener::new(socket.clone());
        let (served, survivors) = open_pages(&gpus, &dir, &options, succession, &listener)?;
        if succession == Succession::Stranger {
            // It was not refused: there is no client, and nobody gets a slot before the socket is open.
            sign().map_err(StartError::Sign)?;
        }
        let listener = listener.into_open()?;
        poller.add(&listener, Token::Listener).map_err(not_watched())?;
        let listeners = open_listeners(&options, &dir)?;
        let gangs = Gangs::new(gpus.iter().map(|gpu| gpu.uuid)).map_err(|error| {
            let cause = error.raw_os_error().map_or(Errno::ENOMEM, Errno::from_raw);
            failed("no memory for the page of gangs")(cause)
        })?;
        let state = State {
            gangs,
            dir,
            poller,
            gpus: served,
            clients: Clients::default(),
            sampler: Sampler::new(source),
            log_limits: LogLimits::default(),
            overdue: OverdueClients::default(),
            configuration,
            options,
            set_log_level,
        };
        let connections = Connections::new(listener);
        let stalls = StallLog::default();
        let mut server = Self { state, connections, socket, signals, gpu_locks, owner: None, stalls };
        server.watch_descriptors()?;
        for (gpu, Survivor { slot, lock, pidfd }) in survivors {
            server.state.add_client(gpu, slot, lock, pidfd);
        }
        server.start_monitor(listeners);
        Ok(server)
    }

    /// Serves metrics and page, in a thread of its own, if they are wanted anywhere.
    fn start_monitor(&self, listeners: Vec<Listener>) {
        let State { gpus, options, .. } = &self.state;
        if listeners.is_empty() {
            return;
        }
        let pages = gpus.iter().map(|gpu| gpu.served.page.clone()).collect();
        let tallies = gpus.iter().map(|gpu| (gpu.served.gpu, gpu.tallies.clone())).collect();
        if let Err(error) = monitor::start(listeners, pages, tallies, options.nvml_library.clone()) {
            tracing::warn!("no thread can be made for metrics and page, which are not served: {error}");
        }
    }

    /// Watches signals, the GPUs' locks, and the owner of a private arbiter.
    fn watch_descriptors(&mut self) -> Result<(), StartError> {
        let State { options, poller, .. } = &self.state;
        poller.add(&self.signals, Token::Signals).map_err(not_watched())?;
        for lock in &self.gpu_locks {
            poller.add(lock, Token::GpuLock).map_err(not_watched())?;
        }
        self.owner = options.owner_pid.and_then(|pid| process::pidfd(pid as u32).ok());
        if let Some(owner) = &self.owner {
            poller.add(owner, Token::Owner).map_err(not_watched())?;
        }
        Ok(())
    }
}

/// Opens the places where metrics and page are served. What the operator asked for must be had; the default need not.
fn open_listeners(options: &Options, dir: &Path) -> Result<Vec<Listener>, StartError> {
    let (places, asked) = options.listen_in(dir);
    let mut open = Vec::new();
    for place in places {
        match place.open() {
            Ok(listener) => open.extend(listener),
            Err(cause) if asked => return Err(StartError::Listen { place, cause }),
            Err(cause) => tracing::warn!(
                "metrics and page are not served at {place}: {cause}. Another program listens there; --listen names another place, or none"
            ),
        }
        if place.is_on_the_network() {
            tracing::warn!(
                "metrics and page are served at {place}: whoever reaches it sees who uses the GPUs, without a password and unencrypted"
            );
        }
    }
    for listener in &open {
        tracing::info!(at = %listener, "metrics and page are served");
    }
    Ok(open)
}

fn not_watched() -> impl FnOnce(nix::errno::Errno) -> StartError {
    failed("a descriptor cannot be watched")
}

/// The signals that the loop handles, as a descriptor.
fn block_signals() -> Result<SignalFd, StartError> {
    let mask = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect::<SigSet>();
    mask.thread_block().map_err(failed("signals cannot be blocked"))?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(failed("no signalfd"))
}

/// Locks the GPUs that are to be served. A GPU that another arbiter holds is served without a lock if the options allow it.
fn lock_gpus(gpus: &[Gpu], options: &Options) -> Result<Vec<GpuLock>, StartError> {
    let locks = gpus.iter().map(|gpu| lock_gpu(gpu.uuid, options.allow_second_arbiter));
    Ok(locks.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
}

fn lock_gpu(gpu: GpuUuid, allow_second: bool) -> Result<Option<GpuLock>, StartError> {
    let mut attempts = 1;
    loop {
        match GpuLock::acquire(gpu) {
            Ok(lock) => return Ok(Some(lock)),
            Err(GpuLockError::System(cause)) => {
                return Err(failed(format!("{gpu} cannot be claimed"))(cause));
            }
            Err(GpuLockError::Held(holder)) if allow_second => {
                tracing::warn!(
                    "{holder}; serving it too, as --allow-second-arbiter says: together they deal out more memory than it has"
                );
                return Ok(None);
            }
            Err(GpuLockError::Held(holder)) if attempts == LOCK_ATTEMPTS => {
                return Err(StartError::Held(holder));
            }
            Err(GpuLockError::Held(_)) => {
                attempts += 1;
                std::thread::sleep(LOCK_RETRY_DELAY);
            }
        }
    }
}

/// Opens the page of each GPU, with the clients that live.
fn open_pages(
    gpus: &[Gpu],
    dir: &Path,
    options: &Options,
    succession: Succession,
    listener: &LazyListener,
) -> Result<(Vec<ServedGpu>, Survivors), StartError> {
    let mut all_served = Vec::new();
    let mut all_survivors = Vec::new();
    for gpu in gpus {
        let capacity = granules_in(options.capacity.unwrap_or(gpu.total.saturating_sub(options.headroom)));
        let listen = || listener.open().ok();
        let (served, survivors) =
            pages::open(dir, gpu.uuid, capacity, options.settings(), succession, &listen)?;
        if let Some(bandwidth) = gpu.link {
            served.page.guess_bandwidth(bandwidth);
        }
        all_survivors.extend(survivors.into_iter().map(|survivor| (all_served.len(), survivor)));
        // Clients that connect before the first tick see an arbiter that is alive.
        served.page.beat(now());
        let (tracker, tallies) = Default::default();
        let options = options.clone();
        all_served.push(ServedGpu { served, total: gpu.total, tracker, tallies, options });
    }
    Ok((all_served, all_survivors))
}
