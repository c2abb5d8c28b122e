//! The loop: one thread around epoll. It waits for descriptors and for the next tick; nothing in it waits for a client.

use super::connections::Connections;
use super::error::{StartError, failed};
use super::poller::Token;
use super::state::State;
use super::{closing, steering, unresponsive};
use crate::gpu_lock::GpuLock;
use crate::stall_log::StallLog;
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use nvshare::paths;
use nvshare::sync::now;
use nvshare::units::{MILLISECOND, Nanos, SECOND};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// Between two ticks, with clients and without.
const TICK_INTERVAL: Nanos = 100 * MILLISECOND;
const IDLE_TICK_INTERVAL: Nanos = SECOND;

/// The arbiter.
pub struct Server {
    pub(super) state: State,
    pub(super) connections: Connections,
    /// The path of the socket.
    pub(super) socket: PathBuf,
    pub(super) signals: SignalFd,
    pub(super) gpu_locks: Vec<GpuLock>,
    /// The pidfd of the process that started a private arbiter; `None` once it has ended.
    pub(super) owner: Option<OwnedFd>,
    pub(super) stalls: StallLog,
}

impl Server {
    /// Serves until a signal, or until a private arbiter's owner and clients are gone.
    ///
    /// # Errors
    /// epoll_wait's.
    pub fn run(mut self) -> Result<(), StartError> {
        let mut next_tick = 0;
        loop {
            let time = now();
            if time >= next_tick {
                self.tick(time);
                next_tick = now() + self.tick_interval();
            }
            if self.state.options.exit_when_idle && self.owner.is_none() && self.state.clients.is_empty() {
                tracing::info!("nobody is left: ending");
                return self.end();
            }
            let tokens = self.state.poller.wait(next_tick.saturating_sub(now())).map_err(failed("epoll"))?;
            // Connections are accepted last, so that known ones are served first.
            let (listener, others): (Vec<_>, Vec<_>) =
                tokens.into_iter().partition(|token| *token == Token::Listener);
            for token in others {
                if token == Token::Signals && self.is_ended_by_signal() {
                    return self.end();
                }
                self.handle(token);
            }
            if !listener.is_empty() {
                self.connections.accept(&mut self.state);
            }
        }
    }

    fn tick_interval(&self) -> Nanos {
        let idle = self.state.clients.is_empty() && self.connections.none_pending();
        if idle { IDLE_TICK_INTERVAL } else { TICK_INTERVAL }
    }

    fn handle(&mut self, token: Token) {
        match token {
            Token::Listener | Token::Signals => {}
            Token::GpuLock => self.gpu_locks.iter().for_each(|lock| lock.answer(&self.state.dir)),
            Token::Owner => self.owner = None,
            Token::Connection(fd) => self.connections.readable(&mut self.state, fd),
            Token::Client(id) => closing::process_ended(&mut self.state, id),
        }
    }

    /// Reads a signal and logs who sent it. Whether it ends the arbiter: SIGHUP does not.
    fn is_ended_by_signal(&mut self) -> bool {
        let Ok(Some(signal)) = self.signals.read_signal() else { return false };
        let (pid, user) = (signal.ssi_pid, signal.ssi_uid);
        if Signal::try_from(signal.ssi_signo as i32) == Ok(Signal::SIGHUP) {
            tracing::info!(pid, user, "SIGHUP: reading the configuration again");
            steering::reload(&mut self.state);
            return false;
        }
        tracing::info!(
            signal = signal.ssi_signo,
            pid,
            user,
            "ending; clients go on, and the next arbiter takes over"
        );
        true
    }

    /// What is done ever so often. `time` in ns.
    fn tick(&mut self, time: Nanos) {
        let state = &mut self.state;
        self.connections.close_timed_out(time);
        state.log_limits.log_suppressed(time);
        state.restore_pages(time);
        state.write_gangs();
        closing::ask_leaving(state, time);
        closing::close_ended(state);
        for gpu in &state.gpus {
            gpu.served.page.beat(time);
            gpu.served.audit();
        }
        for (index, gpu) in state.gpus.iter().enumerate() {
            let bound = gpu.options.unresponsive_after;
            self.stalls.update(index, gpu.served.gpu, &gpu.served.page, bound, time);
        }
        unresponsive::check(state, time);
        state.sampler.sample_if_due(&mut state.gpus, time);
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
    }

    /// The pages stay, as far as they have clients: those go on, and the next arbiter takes them over. Without clients a
    /// private arbiter leaves nothing behind, and a service removes its lock file: no arbiter serves here now.
    fn end(self) -> Result<(), StartError> {
        let State { options, dir, gpus, clients, .. } = &self.state;
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        let _ = std::fs::remove_file(&self.socket);
        if !clients.is_empty() {
            return Ok(());
        }
        if options.exit_when_idle {
            for gpu in gpus {
                let _ = std::fs::remove_file(paths::page(dir, gpu.served.gpu));
            }
        }
        let _ = std::fs::remove_file(paths::arbiter_lock(dir));
        Ok(())
    }
}
