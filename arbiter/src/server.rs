//! The loop: one thread around epoll. New connections, hellos, deaths, signals and a timer; nothing in
//! it waits for a client.

use crate::changes;
use crate::claim::{Claim, ClaimError, Holder};
use crate::connections::{Connection, Peer, Silent};
use crate::liveness;
use crate::lives::{Life, Record, own_namespace};
use crate::options::Options;
use crate::pages::{self, Served, Succession, Survivor};
use crate::sampling::{Follower, Gpu, Source, View};
use crate::stalls::Stalls;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, getsockopt, listen,
    socket, sockopt,
};
use nvshare::books::NOT_TOLD;
use nvshare::log_limit::LogLimit;
use nvshare::page::{Phase, Stall};
use nvshare::scm_rights::{receive, send};
use nvshare::slot::{Process, SLOTS, SlotIndex, SlotSet};
use nvshare::sync::now;
use nvshare::units::{GpuUuid, MILLISECOND, Nanos, SECOND, bytes_of, format_nanos, format_size, granules_in};
use nvshare::wire::{Attach, Change, Hello, Message, Reply, RequestKind, SharesUpdate, Status, Told};
use nvshare::{paths, policy, snapshot::Snapshot};
use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

/// Between two looks at everything, while there are clients and while there are none.
const TICK: Nanos = 100 * MILLISECOND;
const QUIET_TICK: Nanos = SECOND;

/// Between two samples of NVML.
const SAMPLE_EVERY: Nanos = 500 * MILLISECOND;

/// How long a connection may say nothing.
const PATIENCE: Nanos = 5 * SECOND;

/// Connections that are taken before the arbiter looks at anything else again.
const ACCEPTED_AT_ONCE: usize = 64;

/// Connections that one client keeps. It needs one.
const MOST_KEPT: usize = 4;

/// Why the books of a client are closed whose life file is free.
const ENDED: &str = "its process runs another program, or ended";

/// A phase as a client tells it.
const LEAVING: u32 = Phase::Leaving as u32;

/// What a descriptor that epoll reports is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Listener,
    Signals,
    Owner,
    Claims,
    Connection(RawFd),
    Client(u64),
}

impl Token {
    fn word(self) -> u64 {
        match self {
            Self::Listener => 0,
            Self::Signals => 1,
            Self::Owner => 2,
            Self::Claims => 3,
            Self::Connection(fd) => 1 << 32 | fd as u64,
            Self::Client(number) => 2 << 32 | number,
        }
    }

    fn parse(word: u64) -> Self {
        match (word >> 32, word & 0xffff_ffff) {
            (0, 0) => Self::Listener,
            (0, 1) => Self::Signals,
            (0, 3) => Self::Claims,
            (1, fd) => Self::Connection(fd as RawFd),
            (2, number) => Self::Client(number),
            _ => Self::Owner,
        }
    }
}

/// A client that lives.
struct Live {
    gpu: usize,
    slot: SlotIndex,
    /// Whose the slot is, as the arbiter knows it: the page says so too, and everybody can write the page. `None` if
    /// somebody removed the file while no arbiter ran.
    life: Option<Life>,
    /// `None` for a process that cannot be seen from here.
    pidfd: Option<OwnedFd>,
    /// That the client keeps, most often one. None while it has not attached to this arbiter yet.
    connections: HashSet<RawFd>,
    /// When its life file was first seen free.
    free_since: Option<Nanos>,
    /// Since when it has not answered what it does.
    asked: Option<Nanos>,
    /// What it has answered, a phase's word, and when.
    told: Option<(Nanos, u32)>,
}

/// What a client says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Says {
    /// It has been asked just now.
    NothingYet,
    /// It does not answer: it is stopped, or there is no connection to it.
    Nothing,
    /// It is in this phase.
    Phase(Phase),
    /// Its process does not say: the page has to be believed.
    LikeThePage,
}

/// How long a client may take to say what it does. The thread that answers waits for nothing else.
const ANSWERED_WITHIN: Nanos = SECOND;

impl Live {
    /// What the client says of itself, which only its own process can: it is asked if it has not been.
    fn says(&mut self, kept: &HashMap<RawFd, Kept>, time: Nanos) -> Says {
        let recent = |(at, word): (Nanos, u32)| (time.saturating_sub(at) < ANSWERED_WITHIN).then_some(word);
        let says = match (self.asked, self.told.take().and_then(recent)) {
            (Some(since), _) if time.saturating_sub(since) >= ANSWERED_WITHIN => return Says::Nothing,
            (Some(_), _) => return Says::NothingYet,
            (None, None) => Says::NothingYet,
            (None, Some(NOT_TOLD)) => Says::LikeThePage,
            (None, Some(word)) => Says::Phase(Phase::parse(word)),
        };
        // Once more, for the next time that somebody wants to know.
        self.asked = Some(time);
        for kept in self.connections.iter().filter_map(|fd| kept.get(fd)) {
            answer(&kept.fd, &Reply::asked(), &[]);
        }
        says
    }

    /// Whether the client has ended, by what its life file says. Its pidfd says so by itself
    /// (docs/decisions/0019-who-is-dead.md).
    fn is_over(&mut self, gpu: GpuUuid, source: Option<&dyn Source>) -> bool {
        if !self.connections.is_empty() || self.life.as_ref().is_none_or(Life::is_held) {
            // A process that was not told of its slot lets it go, and is given the same one when it asks again.
            self.free_since = None;
            return false;
        }
        let since = *self.free_since.get_or_insert_with(now);
        match self.life.as_ref().filter(|_| self.pidfd.is_some()).map(|life| life.record.pid) {
            // Its pidfd is about to tell, and its memory on the GPU is free no sooner.
            Some(pid) if liveness::is_ending(pid) => false,
            Some(pid) if source.is_some_and(|source| is_without_memory(source, gpu, pid)) => true,
            _ => now() - since >= LET_GO_WITHIN,
        }
    }
}

/// How long a process that runs another program may take to free what the one before had on the GPU, where NVML does not
/// say that it has.
const LET_GO_WITHIN: Nanos = 500 * MILLISECOND;

fn is_without_memory(source: &dyn Source, gpu: GpuUuid, pid: u32) -> bool {
    source.read(gpu).is_ok_and(|reading| !reading.processes.contains_key(&pid))
}

/// A connection that a client keeps.
struct Kept {
    fd: OwnedFd,
    client: u64,
}

/// What strangers can do that is logged: each kind has its own bound on lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Nuisance {
    /// A message that makes no sense.
    Nonsense,
    /// A message that makes sense, and asks for what is not to be had.
    Request,
    /// What stands in the page is not what the arbiter wrote.
    Overwritten,
}

/// The arbiter.
pub struct Server {
    options: Options,
    dir: PathBuf,
    socket: PathBuf,
    epoll: Epoll,
    listener: OwnedFd,
    signals: SignalFd,
    claims: Vec<Claim>,
    /// Of the process that started a private arbiter; `None` once it has ended.
    owner: Option<OwnedFd>,
    gpus: Vec<Served>,
    totals: HashMap<GpuUuid, u64>,
    followers: Vec<Follower>,
    source: Option<Box<dyn Source>>,
    source_failed: bool,
    sampled: Nanos,
    clients: HashMap<u64, Live>,
    next_client: u64,
    kept: HashMap<RawFd, Kept>,
    silent: Silent,
    log_limits: HashMap<Nuisance, LogLimit>,
    reported: HashSet<(usize, SlotIndex)>,
    overdue: HashMap<(usize, SlotIndex), Nanos>,
    stalls: Stalls,
}

/// Why the arbiter could not begin to serve.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The socket or the loop could not be made.
    #[error("{what}: {cause}")]
    System {
        /// What was tried.
        what: String,
        /// What the kernel said.
        cause: Errno,
    },
    /// A page could not be served.
    #[error(transparent)]
    Page(#[from] pages::PageError),
    /// How this arbiter sizes its pools could not be written down.
    #[error("how the pools are sized cannot be written into the arbiter's lock file: {0}")]
    Sign(std::io::Error),
    /// Another arbiter serves a GPU.
    #[error(
        "{0}, and each of two arbiters would deal out all of the GPU's memory. Use that one (--runtime-dir, NVSHARE_RUNTIME_DIR), end it, or serve the GPU twice all the same with --allow-second-arbiter (NVSHARE_ALLOW_SECOND_ARBITER=1)"
    )]
    Held(Holder),
}

/// Between two tries to claim a GPU, whose last arbiter may be ending.
const CLAIM_AGAIN: Duration = Duration::from_millis(50);
const CLAIM_TRIES: usize = 20;

/// Claims the GPUs that are to be served.
fn claim(gpus: &[Gpu], options: &Options) -> Result<Vec<Claim>, StartError> {
    let mut claims = Vec::new();
    for gpu in gpus {
        let mut tries = 1;
        loop {
            match Claim::new(gpu.uuid) {
                Ok(claim) => {
                    claims.push(claim);
                    break;
                }
                Err(ClaimError::System(cause)) => {
                    return Err(failed(format!("{} cannot be claimed", gpu.uuid))(cause));
                }
                Err(ClaimError::Held(holder)) if options.allow_second_arbiter => {
                    tracing::warn!(
                        "{holder}; serving it too, as --allow-second-arbiter says: together they deal out more memory than it has"
                    );
                    break;
                }
                Err(ClaimError::Held(holder)) if tries == CLAIM_TRIES => {
                    return Err(StartError::Held(holder));
                }
                Err(ClaimError::Held(_)) => {
                    tries += 1;
                    std::thread::sleep(CLAIM_AGAIN);
                }
            }
        }
    }
    Ok(claims)
}

fn failed(what: impl Into<String>) -> impl FnOnce(Errno) -> StartError {
    let what = what.into();
    move |cause| StartError::System { what, cause }
}

impl Server {
    /// Serves `gpus` in `dir`; takes over what is there. `sign` writes down how this arbiter sizes its pools. It is called
    /// before a pool gets another size under living clients, so that what is written down is never of an arbiter before the
    /// one that sized the pools; and not by an arbiter that is refused.
    ///
    /// # Errors
    /// A page, the socket or the loop cannot be made.
    pub fn start(
        options: Options,
        dir: PathBuf,
        succession: Succession,
        sign: &dyn Fn() -> std::io::Result<()>,
        gpus: Vec<Gpu>,
        source: Option<Box<dyn Source>>,
    ) -> Result<Self, StartError> {
        let path = paths::socket(&dir);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed("no epoll"))?;
        let mask = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect::<SigSet>();
        mask.thread_block().map_err(failed("signals cannot be blocked"))?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(failed("no signalfd"))?;
        let claims = claim(&gpus, &options)?;
        if succession == Succession::Heir {
            sign().map_err(StartError::Sign)?;
        }
        // Who can connect finds pages, but for clients whose page cannot be had otherwise: those bring it.
        let door = Door { path: path.clone(), socket: OnceCell::new() };
        let mut served = Vec::new();
        let mut survivors = Vec::new();
        for gpu in &gpus {
            let capacity =
                granules_in(options.capacity.unwrap_or(gpu.total.saturating_sub(options.headroom)));
            let (page, alive) =
                pages::serve(&dir, gpu.uuid, capacity, options.settings(), succession, &|| door.open().ok())?;
            if let Some(link) = gpu.link {
                page.page.guess_bandwidth(link);
            }
            survivors.extend(alive.into_iter().map(|survivor| (served.len(), survivor)));
            served.push(page);
        }
        if succession == Succession::Stranger {
            // It has not been refused: there is no client, and nobody gets a slot before the door is open.
            sign().map_err(StartError::Sign)?;
        }
        door.open()?;
        let listener = door.socket.into_inner().expect("it was just opened");
        let owner = options.owner_pid.and_then(|pid| liveness::pidfd(pid as u32).ok());
        let add = |fd: &dyn AsFd, token: Token| {
            epoll
                .add(fd.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, token.word()))
                .map_err(failed("a descriptor cannot be watched"))
        };
        add(&listener, Token::Listener)?;
        add(&signals, Token::Signals)?;
        for claim in &claims {
            add(claim, Token::Claims)?;
        }
        if let Some(owner) = &owner {
            add(owner, Token::Owner)?;
        }
        let mut server = Self {
            dir,
            socket: path,
            epoll,
            listener,
            signals,
            claims,
            owner,
            followers: served.iter().map(|_| Follower::default()).collect(),
            totals: gpus.iter().map(|gpu| (gpu.uuid, gpu.total)).collect(),
            gpus: served,
            source,
            source_failed: false,
            sampled: 0,
            clients: HashMap::new(),
            next_client: 0,
            kept: HashMap::new(),
            silent: Silent::default(),
            log_limits: HashMap::new(),
            reported: HashSet::new(),
            overdue: HashMap::new(),
            stalls: Stalls::default(),
            options,
        };
        for (gpu, Survivor { slot, life, pidfd }) in survivors {
            server.watch(gpu, slot, life, pidfd);
        }
        Ok(server)
    }

    /// Serves until a signal, or until a private arbiter's owner and clients are gone.
    ///
    /// # Errors
    /// epoll's.
    pub fn run(mut self) -> Result<(), StartError> {
        let mut events = [EpollEvent::empty(); 64];
        let mut next_tick = 0;
        loop {
            let time = now();
            if time >= next_tick {
                self.tick(time);
                next_tick =
                    now() + if self.clients.is_empty() && self.silent.is_empty() { QUIET_TICK } else { TICK };
            }
            if self.options.exit_when_idle && self.owner.is_none() && self.clients.is_empty() {
                tracing::info!("nobody is left: ending");
                return self.end();
            }
            let milliseconds = next_tick.saturating_sub(now()).div_ceil(MILLISECOND).min(1_000) as u16;
            let count = match self.epoll.wait(&mut events, EpollTimeout::from(milliseconds)) {
                Err(Errno::EINTR) => continue,
                result => result.map_err(failed("epoll"))?,
            };
            let mut newcomers = false;
            for event in &events[..count] {
                match Token::parse(event.data()) {
                    // Those that are known come first.
                    Token::Listener => newcomers = true,
                    Token::Signals => {
                        if let Ok(Some(signal)) = self.signals.read_signal() {
                            let by = (signal.ssi_pid, signal.ssi_uid);
                            if Signal::try_from(signal.ssi_signo as i32) == Ok(Signal::SIGHUP) {
                                tracing::info!(
                                    pid = by.0,
                                    user = by.1,
                                    "SIGHUP: there is nothing to read again, settings are arguments; going on"
                                );
                                continue;
                            }
                            tracing::info!(
                                signal = signal.ssi_signo,
                                pid = by.0,
                                user = by.1,
                                "ending; clients go on, and the next arbiter takes over"
                            );
                            return self.end();
                        }
                    }
                    Token::Claims => self.claims.iter().for_each(|claim| claim.tell(&self.dir)),
                    Token::Owner => {
                        self.owner = None;
                    }
                    Token::Connection(fd) => self.hello(fd),
                    Token::Client(number) => self.died(number),
                }
            }
            if newcomers {
                self.accept();
            }
        }
    }

    /// The pages stay, as far as they have clients: those go on, and the next arbiter takes them over. Without clients a
    /// private arbiter leaves nothing behind, and a service says that it serves no more.
    fn end(self) -> Result<(), StartError> {
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        let _ = std::fs::remove_file(&self.socket);
        if !self.clients.is_empty() {
            return Ok(());
        }
        if self.options.exit_when_idle {
            for served in &self.gpus {
                let _ = std::fs::remove_file(paths::page(&self.dir, served.gpu));
            }
        }
        let _ = std::fs::remove_file(paths::arbiter_lock(&self.dir));
        Ok(())
    }

    fn watch(&mut self, gpu: usize, slot: SlotIndex, life: Option<Life>, pidfd: Option<OwnedFd>) -> u64 {
        let number = self.next_client;
        self.next_client = (self.next_client + 1) & 0xffff_ffff;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, Token::Client(number).word());
        if let Some(pidfd) = &pidfd
            && let Err(error) = self.epoll.add(pidfd, event)
        {
            tracing::error!("a client's process cannot be watched, its end will be seen later: {error}");
        }
        self.clients.insert(
            number,
            Live {
                gpu,
                slot,
                life,
                pidfd,
                connections: HashSet::new(),
                free_since: None,
                asked: None,
                told: None,
            },
        );
        number
    }

    /// Keeps a client's connection, and watches it.
    fn keep(&mut self, fd: OwnedFd, client: u64) {
        if let Err(error) = self.watch_connection(&fd) {
            tracing::error!("a client's connection cannot be watched, its end will be seen later: {error}");
        }
        let Some(live) = self.clients.get_mut(&client) else { return };
        live.connections.insert(fd.as_raw_fd());
        // What was asked before went nowhere.
        live.asked = None;
        self.kept.insert(fd.as_raw_fd(), Kept { fd, client });
    }

    /// Asks a client that has just attached what it does: it may have left, and the arbiter before may have been killed
    /// while it closed the slot. Then the page does not say any more that the client leaves, and nobody else would ask.
    fn ask_survivor(&mut self, reply: &Reply, client: u64) {
        let Some(live) = self.clients.get(&client).filter(|_| reply.status == Status::Attached as u32) else {
            return;
        };
        for kept in live.connections.iter().filter_map(|fd| self.kept.get(fd)) {
            answer(&kept.fd, &Reply::asked(), &[]);
        }
    }

    /// Something came over a connection that a client keeps, or it has ended.
    fn hung_up(&mut self, fd: RawFd) {
        let Some(Kept { fd: socket, client }) = self.kept.get(&fd) else { return };
        match receive(socket.as_fd(), 2 * size_of::<Told>(), MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EAGAIN) => return,
            Ok((bytes, _)) if let Some(told) = Told::read(&bytes) => return self.told(*client, told),
            _ => {}
        }
        let Some(Kept { client, .. }) = self.kept.remove(&fd) else { return };
        if let Some(live) = self.clients.get_mut(&client) {
            live.connections.remove(&fd);
        }
        self.close_ended();
    }

    /// A client has said what it does.
    fn told(&mut self, client: u64, told: Told) {
        let Some(live) = self.clients.get_mut(&client) else { return };
        if live.asked.take().is_some() {
            live.told = Some((now(), told.phase));
        }
        let leaves = || self.gpus[live.gpu].page.view(live.slot).phase == Phase::Leaving;
        // A client that says so is believed whatever the page says: an arbiter that was killed while it closed the slot has
        // cleared the page, and left the life file, which the client holds until it hears that its slot is closed.
        if told.phase == LEAVING || told.phase == NOT_TOLD && leaves() {
            self.close(client, "left");
        }
    }

    /// Closes the slots of those that leave: they are asked, because everybody can write into the page that they do.
    fn close_left(&mut self, time: Nanos) {
        for live in self.clients.values_mut() {
            let Served { gpu, page, .. } = &self.gpus[live.gpu];
            if page.view(live.slot).phase != Phase::Leaving {
                continue;
            }
            if let Says::Phase(phase) = live.says(&self.kept, time)
                && phase != Phase::Leaving
                && self.log_limits.entry(Nuisance::Overwritten).or_default().allows(time)
            {
                tracing::warn!(%gpu, slot = live.slot.get(), "the page says that the client leaves, and the client does not say so ({}): somebody has written into the page", phase.name());
            }
        }
    }

    /// Closes the books of those whose life files say that they have ended. Called when a connection ends and ever so
    /// often after that: a lock goes a moment after its connection.
    fn close_ended(&mut self) {
        let (gpus, source) = (&self.gpus, self.source.as_deref());
        let over: Vec<_> = self
            .clients
            .iter_mut()
            .filter_map(|(number, live)| live.is_over(gpus[live.gpu].gpu, source).then_some(*number))
            .collect();
        over.into_iter().for_each(|number| self.close(number, ENDED));
    }

    fn died(&mut self, number: u64) {
        self.close(number, "its process ended");
    }

    fn close(&mut self, number: u64, why: &str) {
        let Some(live) = self.clients.remove(&number) else { return };
        let served = &self.gpus[live.gpu];
        // Whoever wrote into its row must not keep the slot open.
        if let Some(life) = &live.life {
            served.page.set_owner(live.slot, life.record.process(), life.record.generation);
        }
        pages::reap(&served.page, served.gpu, live.slot, why);
        pages::write_down(&served.record, live.slot, None);
        for kept in live.connections.iter().filter_map(|fd| self.kept.remove(fd)) {
            answer(&kept.fd, &Reply::closed(why), &[]);
        }
        if let Some(life) = live.life {
            life.end();
        }
        self.followers[live.gpu].forget(live.slot);
        self.reported.remove(&(live.gpu, live.slot));
        self.overdue.remove(&(live.gpu, live.slot));
    }

    fn accept(&mut self) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        for _ in 0..ACCEPTED_AT_ONCE {
            let Ok(socket) = accept4(self.listener.as_raw_fd(), flags) else { return };
            // SAFETY: accept4 has just made this descriptor, and nobody else knows it.
            let socket = unsafe { OwnedFd::from_raw_fd(socket) };
            let Ok(peer) = peer(&socket) else { continue };
            self.hear(Connection { socket, peer, since: now() });
        }
    }

    /// A connection has spoken, or has ended.
    fn hello(&mut self, fd: RawFd) {
        match self.silent.remove(fd) {
            Some(connection) => self.hear(connection),
            None => self.hung_up(fd),
        }
    }

    /// Serves whoever has spoken already, and keeps the connection of who has not.
    fn hear(&mut self, connection: Connection) {
        let Some(silent) = self.served(connection) else { return };
        // One that cannot be watched is closed: its process tries again.
        if self.watch_connection(&silent.socket).is_err() {
            return;
        }
        if let Some(displaced) = self.silent.add(silent) {
            // The last chance of the one that goes: what has not spoken now is closed.
            let _ = self.served(displaced);
        }
    }

    fn watch_connection(&self, socket: &OwnedFd) -> nix::Result<()> {
        let token = Token::Connection(socket.as_raw_fd());
        match self.epoll.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, token.word())) {
            Err(Errno::EEXIST) => Ok(()),
            added => added,
        }
    }

    /// Takes a message and answers it. The connection again if it is silent.
    fn served(&mut self, connection: Connection) -> Option<Connection> {
        let socket = &connection.socket;
        let (bytes, sent) = match receive(socket.as_fd(), 2 * size_of::<Hello>(), MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EAGAIN) => return Some(connection),
            // A connection that ends without a word asked whether somebody is here.
            Err(_) => return None,
            Ok((bytes, _)) if bytes.is_empty() => return None,
            Ok(message) => message,
        };
        match self.reply(connection.peer, &bytes, &sent) {
            Ok(Answer { reply, sent, client }) => {
                answer(socket, &reply, &sent);
                if let Some(client) = client {
                    self.keep(connection.socket, client);
                    self.ask_survivor(&reply, client);
                }
            }
            Err((kind, refusal)) => {
                self.log_refusal(kind, connection.peer, &refusal);
                answer(socket, &refusal, &[]);
            }
        }
        None
    }

    fn log_refusal(&mut self, kind: Nuisance, peer: Peer, refusal: &Reply) {
        if self.log_limits.entry(kind).or_default().allows(now()) {
            tracing::warn!(pid = peer.pid, user = peer.user, "somebody is refused: {}", refusal.text());
        }
    }

    fn log_suppressed(&mut self, time: Nanos) {
        for (kind, limit) in &mut self.log_limits {
            if let Some(count) = limit.suppressed(time) {
                tracing::warn!(count, "not logged, more of the same: {kind:?}");
            }
        }
    }

    /// What whoever is at the other end gets for its message.
    fn reply(
        &mut self,
        peer: Peer,
        bytes: &[u8],
        sent: &[OwnedFd],
    ) -> Result<Answer, (Nuisance, Box<Reply>)> {
        let message = Message::read(bytes).map_err(|refusal| (Nuisance::Nonsense, refusal))?;
        match message {
            Message::Hello(hello) => self.greet(peer, &hello),
            Message::Change(change, slot, edit) => self
                .change(peer, &change, slot, edit)
                .map(|reply| Answer { reply, sent: Vec::new(), client: None }),
            Message::Attach(attach, slot) => self.attach(&attach, slot, sent),
        }
        .map_err(|refusal| (Nuisance::Request, refusal))
    }

    /// A client that registered with an arbiter before this one makes itself known, by showing its life file.
    fn attach(&mut self, attach: &Attach, slot: SlotIndex, sent: &[OwnedFd]) -> Result<Answer, Box<Reply>> {
        let index = self.index_of(GpuUuid(attach.gpu))?;
        let shown = |live: &Live| {
            let life = live.life.as_ref().filter(|_| (live.gpu, live.slot) == (index, slot));
            life.is_some_and(|life| sent.iter().any(|fd| life.is_shown_by(fd)))
        };
        let gpu = self.gpus[index].gpu;
        let Some((client, live)) = self.clients.iter().find(|(_, live)| shown(live)) else {
            let why = format!("slot {} of {gpu} is not that client's any more", slot.get());
            return Err(Reply::closed(&why));
        };
        if live.connections.len() >= MOST_KEPT {
            let why = format!("the client in slot {} of {gpu} keeps {MOST_KEPT} connections", slot.get());
            return Err(Reply::refuse(Status::Refused, &why));
        }
        tracing::info!(%gpu, slot = slot.get(), pid = attach.pid, "is there still");
        Ok(Answer { reply: Reply::attached(slot), sent: Vec::new(), client: Some(*client) })
    }

    fn index_of(&self, wanted: GpuUuid) -> Result<usize, Box<Reply>> {
        self.gpus.iter().position(|served| served.gpu == wanted).ok_or_else(|| {
            let known: Vec<_> = self.gpus.iter().map(|served| served.gpu.to_string()).collect();
            Reply::refuse(
                Status::UnknownGpu,
                &format!("no GPU {wanted} is served here; there is {}", known.join(", ")),
            )
        })
    }

    /// A slot or a look, and the page with it.
    fn greet(&mut self, peer: Peer, hello: &Hello) -> Result<Answer, Box<Reply>> {
        let wanted = GpuUuid(hello.gpu);
        let index = self.index_of(wanted)?;
        let Served { file, read_only, .. } = &self.gpus[index];
        // Whoever has no slot has nothing to write.
        let page = if hello.request_kind() == RequestKind::Slot { file } else { read_only };
        let page = page.as_fd().try_clone_to_owned().map_err(|error| {
            Reply::refuse(Status::Refused, &format!("the arbiter has no descriptor left: {error}"))
        })?;
        match hello.request_kind() {
            RequestKind::Slot => {
                let (slot, client, life) = self.register(peer, hello, index)?;
                Ok(Answer { reply: Reply::welcome(slot), sent: vec![page, life], client: Some(client) })
            }
            RequestKind::Look => {
                tracing::debug!(gpu = %wanted, "somebody looks at its page");
                Ok(Answer { reply: Reply::shown(), sent: vec![page], client: None })
            }
        }
    }

    /// The client that has a slot.
    fn live(&self, index: usize, slot: SlotIndex) -> Option<&Live> {
        self.clients.values().find(|live| (live.gpu, live.slot) == (index, slot))
    }

    /// The slots of a GPU that somebody has, whatever the page says.
    fn taken(&self, index: usize) -> SlotSet {
        self.clients.values().filter(|live| live.gpu == index).map(|live| live.slot).collect()
    }

    /// Refuses a user who has as many slots as one may have.
    fn check_user(&self, index: usize, user: u32) -> Result<(), Box<Reply>> {
        let Some(most) = self.options.most_slots_of(user) else { return Ok(()) };
        let of_user = |live: &&Live| {
            live.gpu == index && live.life.as_ref().is_some_and(|life| life.record.uid == user)
        };
        if self.clients.values().filter(of_user).count() < most {
            return Ok(());
        }
        Err(Reply::refuse(
            Status::Full,
            &format!(
                "user {user} has {most} slots of {}, as many as one user may have here (--slots-per-user of nvshare-arbiter); end a client first",
                self.gpus[index].gpu
            ),
        ))
    }

    /// The slot for a process: one that was opened for it and that it was not told of, because an arbiter ended before it
    /// had answered, or a new one.
    fn slot_for(
        &self,
        index: usize,
        process: Process,
        hello: &Hello,
        user: u32,
    ) -> Result<SlotIndex, Box<Reply>> {
        let Served { page, gpu, .. } = &self.gpus[index];
        let untold = |live: &&Live| {
            let own = live.life.as_ref().is_some_and(|life| life.record.process() == process);
            live.gpu == index && own && !page.is_claimed(live.slot)
        };
        if let Some(live) = self.clients.values().find(untold) {
            page.describe(live.slot, &hello.name(), hello.shares().weight);
            return Ok(live.slot);
        }
        self.check_user(index, user)?;
        let taken = self.taken(index);
        let all = (0..SLOTS).filter_map(SlotIndex::new);
        let slot = all.into_iter().find(|slot| !taken.contains(*slot)).ok_or_else(|| {
            Reply::refuse(
                Status::Full,
                &format!(
                    "all {SLOTS} slots of {gpu} are taken; end a client first (`nvshare status` lists them)"
                ),
            )
        })?;
        page.open_slot_at(slot, process, &hello.name(), hello.shares().weight);
        Ok(slot)
    }

    /// Changes a client's shares, for whoever may.
    fn change(
        &self,
        peer: Peer,
        change: &Change,
        slot: SlotIndex,
        edit: SharesUpdate,
    ) -> Result<Reply, Box<Reply>> {
        let index = self.index_of(GpuUuid(change.gpu))?;
        let Served { page, gpu, .. } = &self.gpus[index];
        let asker = peer.user;
        let ended = || {
            let why =
                format!("slot {} of {gpu} is no longer process {}'s: it has ended", slot.get(), change.pid);
            Reply::refuse(Status::Refused, &why)
        };
        let record = self.live(index, slot).and_then(|live| live.life.as_ref()).map(|life| life.record);
        let named = |record: &Record| (record.pid, record.generation) == (change.pid, change.generation);
        let record = record.filter(named).ok_or_else(ended)?;
        let client = page.details(slot).ok_or_else(ended)?;
        changes::may_change(asker, Some(record.uid), nix::unistd::geteuid().as_raw())
            .map_err(|why| Reply::refuse(Status::Refused, &why))?;
        let (before, shares) = (client.shares, edit.of(client.shares));
        page.set_shares(slot, shares);
        tracing::info!(
            %gpu,
            slot = slot.get(),
            pid = change.pid,
            client = client.name,
            by = asker,
            "its shares were: {before}; they are: {shares}"
        );
        Ok(Reply::changed(shares))
    }

    /// Opens a slot for whoever is at the other end: the slot, its client, and what the client is to keep.
    fn register(
        &mut self,
        peer: Peer,
        hello: &Hello,
        index: usize,
    ) -> Result<(SlotIndex, u64, OwnedFd), Box<Reply>> {
        // A process that makes and destroys contexts one after the other would have all slots between two ticks: whoever
        // says that it leaves is asked now.
        self.close_left(now());
        let (process, pidfd) = identify(peer, hello.pid);
        let shares = hello.shares();
        let slot = self.slot_for(index, process, hello, peer.user)?;
        let served = &self.gpus[index];
        let wanted = served.gpu;
        // A slot that it was to be given before, and was not told of, is watched already.
        let known = self.clients.iter().find(|(_, live)| (live.gpu, live.slot) == (index, slot));
        let known = known.and_then(|(number, live)| Some((*number, live.life.as_ref()?.lend())));
        let (client, lent) = match known {
            Some(known) => known,
            None => {
                let namespace = pidfd.as_ref().map_or(0, |_| own_namespace());
                let record = Record {
                    pid: process.pid,
                    started: process.started,
                    namespace,
                    generation: served.page.generation(slot),
                    uid: peer.user,
                };
                match Life::begin(&self.dir, wanted, slot, record) {
                    Ok(life) => {
                        let lent = life.lend();
                        pages::write_down(&served.record, slot, Some(&life));
                        (self.watch(index, slot, Some(life), pidfd), lent)
                    }
                    Err(error) => {
                        served.page.reap(slot);
                        return Err(no_life(&self.dir, &error));
                    }
                }
            }
        };
        let lent = lent.map_err(|error| {
            self.close(client, "it could not be given its life file");
            no_life(&self.dir, &error)
        })?;
        self.gpus[index].page.set_shares(slot, shares);
        tracing::info!(gpu = %wanted, slot = slot.get(), pid = process.pid, client = hello.name(), "registered: {shares}");
        // Its context is there already, in most cases. Counted before the client hears of its slot, so that nobody is
        // promised the memory that the context has.
        self.sample_gpu(index);
        Ok((slot, client, lent))
    }

    fn tick(&mut self, time: Nanos) {
        self.silent.close_older(time.saturating_sub(PATIENCE));
        self.log_suppressed(time);
        self.restore(time);
        self.close_left(time);
        self.close_ended();
        for served in &self.gpus {
            served.page.beat(time);
            pages::audit(&served.page, served.gpu);
        }
        for (index, served) in self.gpus.iter().enumerate() {
            let bound = self.options.unresponsive_after;
            self.stalls.look(index, served.gpu, &served.page, bound, time);
        }
        self.look_for_unresponsive(time);
        if time.saturating_sub(self.sampled) >= SAMPLE_EVERY {
            self.sampled = time;
            self.sample();
        }
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
    }

    /// Puts right what the arbiter alone decides and everybody can overwrite.
    fn restore(&mut self, time: Nanos) {
        self.gpus.iter().for_each(|served| pages::restore(served, self.options.settings()));
        for live in self.clients.values() {
            let (Served { page, gpu, .. }, Some(life)) = (&self.gpus[live.gpu], &live.life) else { continue };
            if page.set_owner(live.slot, life.record.process(), life.record.generation)
                && self.log_limits.entry(Nuisance::Overwritten).or_default().allows(time)
            {
                tracing::warn!(%gpu, slot = live.slot.get(), pid = life.record.pid, "somebody has overwritten in the page whose the slot is: put right");
            }
        }
    }

    fn sample(&mut self) {
        (0..self.gpus.len()).for_each(|index| self.sample_gpu(index));
    }

    /// Looks what the memory of a GPU is used for, and has the page show it.
    fn sample_gpu(&mut self, index: usize) {
        let Some(source) = &self.source else { return };
        let (served, follower) = (&self.gpus[index], &mut self.followers[index]);
        match follower.sample(&served.page, source.as_ref()) {
            Ok(change) => {
                if let Some(view) = change.view {
                    say_how_contexts_are_counted(served.gpu, view, follower.physical().is_some());
                }
                for (pid, bytes) in follower.take_unreported() {
                    say_who_is_outside(served.gpu, pid, bytes);
                }
                served.page.set_foreign(follower.foreign_processes(), granules_in(follower.foreign()));
                if change.contexts | resize(&self.options, &self.totals, served, follower) {
                    served.page.decide();
                }
                self.source_failed = false;
            }
            Err(error) => {
                if !std::mem::replace(&mut self.source_failed, true) {
                    tracing::warn!(gpu = %served.gpu, "NVML does not answer, contexts are not counted meanwhile: {error}");
                }
            }
        }
    }

    /// Reports clients that hold the GPU though somebody waits and their right to it has ended: stopped
    /// by a signal or a debugger, or stuck in a kernel. Memory is never taken from them.
    fn look_for_unresponsive(&mut self, time: Nanos) {
        for (index, served) in self.gpus.iter().enumerate() {
            let snapshot = Snapshot::take(&served.page, served.page.admitted());
            let awaited = policy::first_waiter(&snapshot).is_some();
            for (slot, view) in snapshot.clients() {
                let key = (index, slot);
                let recalled = !snapshot.admitted.contains(slot)
                    && matches!(view.phase, Phase::Running | Phase::Filling | Phase::Draining);
                let sits = awaited && snapshot.admitted.contains(slot) && view.phase == Phase::Waiting;
                if !recalled && !sits {
                    self.overdue.remove(&key);
                    self.reported.remove(&key);
                    continue;
                }
                let since = *self.overdue.entry(key).or_insert(time);
                if time - since < self.options.unresponsive_after || self.reported.contains(&key) {
                    continue;
                }
                let Some(details) = served.page.details(slot) else { continue };
                // The process that registered for the slot, whatever stands in the page.
                let Some(live) = self.clients.values_mut().find(|live| (live.gpu, live.slot) == key) else {
                    continue;
                };
                let pid = live.life.as_ref().map_or(details.owner.pid, |life| life.record.pid);
                match live.says(&self.kept, time) {
                    Says::NothingYet => continue,
                    Says::Phase(phase) if phase != view.phase => {
                        self.overdue.insert(key, time);
                        if self.log_limits.entry(Nuisance::Overwritten).or_default().allows(time) {
                            tracing::warn!(
                                gpu = %served.gpu,
                                slot = slot.get(),
                                pid,
                                "the page says that the client does not give way ({}), and the client says something else ({}): it is left alone. Somebody has written into the page",
                                view.phase.name(),
                                phase.name()
                            );
                        }
                        continue;
                    }
                    Says::Phase(_) | Says::Nothing | Says::LikeThePage => {}
                }
                self.reported.insert(key);
                // What it says itself is reported as such; for want of host memory nobody is to die.
                let stalled = details.stall != Stall::None;
                if !stalled {
                    tracing::warn!(
                        gpu = %served.gpu,
                        slot = slot.get(),
                        pid,
                        client = details.name,
                        phase = view.phase.name(),
                        "it has not given way for {}: it is stopped (SIGSTOP, a debugger) or runs a kernel that long; others wait. Continue or end it",
                        format_nanos(time - since)
                    );
                }
                let pidfd = live.pidfd.as_ref().filter(|_| live.life.is_some());
                let kills = self.options.kill_unresponsive && details.stall != Stall::NoHostMemory;
                if let Some(pidfd) = pidfd.filter(|_| kills) {
                    let killed = liveness::kill(pidfd);
                    tracing::warn!(gpu = %served.gpu, pid, "killed it, as --kill-unresponsive says: {killed:?}");
                }
            }
        }
    }
}

/// Says, once, how the size of contexts is known.
fn say_how_contexts_are_counted(gpu: GpuUuid, view: View, memory_known: bool) {
    match view {
        View::ByPid => tracing::info!(%gpu, "NVML shows each client's process: contexts are counted exactly"),
        View::OtherPids => tracing::warn!(
            %gpu,
            "NVML shows the clients' processes under other pids, as in a container: each context is counted as an equal part of what they have beside their data. For exact figures run the arbiter in the host's pid namespace (hostPID: true, or docker run --pid=host)"
        ),
        View::Hidden if memory_known => tracing::warn!(
            %gpu,
            "NVML does not show the clients' processes: each context is counted as an equal part of what the GPU has in use beside the clients' data. For exact figures run the arbiter in the host's pid namespace (hostPID: true, or docker run --pid=host)"
        ),
        View::Hidden => tracing::warn!(
            %gpu,
            "NVML shows neither the clients' processes nor what the GPU has in use: contexts are counted as 0 bytes, and memory may be promised that is not there. Give --headroom as much as all contexts need, 0.5 to 2 GiB for each client"
        ),
    }
}

/// A process has memory of a GPU and is no client.
fn say_who_is_outside(gpu: GpuUuid, pid: u32, bytes: u64) {
    let who = std::fs::read_to_string(format!("/proc/{pid}/comm")).map_or_else(
        |_| format!("a process that NVML calls {pid}, and that cannot be seen from here,"),
        |name| format!("{} (pid {pid})", name.trim()),
    );
    tracing::warn!(
        %gpu,
        "{who} has {} of the GPU and is no client: nvshare neither moves its memory nor holds its work. It was started without `nvshare run`, or LD_PRELOAD does not reach it: it is linked statically, has other rights than who started it (setuid), or loads the driver in a namespace of its own (dlmopen)",
        format_size(bytes)
    );
}

/// The pool is never larger than what is left of the GPU beside programs outside nvshare and memory that belongs to nobody.
/// True if it changed.
fn resize(options: &Options, totals: &HashMap<GpuUuid, u64>, served: &Served, follower: &Follower) -> bool {
    let Some(total) = totals.get(&served.gpu) else { return false };
    let page = &served.page;
    let wanted = options
        .capacity
        .unwrap_or_else(|| total.saturating_sub(options.headroom).saturating_sub(follower.foreign()));
    let capacity = granules_in(follower.physical().map_or(wanted, |physical| physical.min(wanted)));
    // A few granules more or less are not worth a decision, but for a way back to the size that was asked for.
    let small = capacity.abs_diff(page.capacity()) < 16;
    if capacity == page.capacity() || small && options.capacity.map(granules_in) != Some(capacity) {
        return false;
    }
    tracing::info!(
        gpu = %served.gpu,
        "the pool has {} now and had {}: programs outside nvshare, or memory that outlived its process, take another part of the GPU",
        format_size(bytes_of(capacity)),
        format_size(bytes_of(page.capacity()))
    );
    page.set_capacity(capacity)
}

/// Who registers, and its process where it can be seen from here.
fn identify(peer: Peer, own_pid: u32) -> (Process, Option<OwnedFd>) {
    let pid = peer.pid;
    let seen = liveness::pidfd(pid).ok().zip(liveness::started(pid));
    match seen {
        Some((pidfd, started)) => (Process { pid, started }, Some(pidfd)),
        // In a pid namespace that this one does not contain: two such may have the same pid.
        None => (Process { pid: own_pid.max(1), started: now() | UNSEEN }, None),
    }
}

/// In the start time of a process that cannot be seen, where a time stands that is unique.
pub(crate) const UNSEEN: u64 = 1 << 63;

fn no_life(dir: &std::path::Path, error: &std::io::Error) -> Box<Reply> {
    Reply::refuse(
        Status::Refused,
        &format!("the arbiter cannot write down its client in {}: {error}", dir.display()),
    )
}

/// Who is at the other end.
fn peer(socket: &OwnedFd) -> nix::Result<Peer> {
    let peer = getsockopt(socket, sockopt::PeerCredentials)?;
    Ok(Peer { user: peer.uid(), pid: peer.pid() as u32 })
}

/// What somebody gets for its message.
struct Answer {
    reply: Reply,
    sent: Vec<OwnedFd>,
    /// Whose connection it is from now on.
    client: Option<u64>,
}

fn answer(fd: &OwnedFd, reply: &Reply, sent: &[OwnedFd]) {
    let sent: Vec<_> = sent.iter().map(AsFd::as_fd).collect();
    // A client that is gone, or that has filled its own socket, learns nothing: its loss.
    let _ = send(fd.as_fd(), bytemuck::bytes_of(reply), &sent);
}

/// The socket, bound when it is first needed.
struct Door {
    path: PathBuf,
    socket: OnceCell<OwnedFd>,
}

impl Door {
    fn open(&self) -> Result<&OwnedFd, StartError> {
        if let Some(socket) = self.socket.get() {
            return Ok(socket);
        }
        let socket = bind_socket(&self.path)?;
        Ok(self.socket.get_or_init(|| socket))
    }
}

/// Binds the socket. Who may connect is a matter of the directory's permissions.
fn bind_socket(path: &std::path::Path) -> Result<OwnedFd, StartError> {
    let what = || format!("the socket {} cannot be made", path.display());
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).map_err(failed(what()))?;
    // This arbiter holds the directory's lock: a socket that is there is a dead one's.
    let _ = std::fs::remove_file(path);
    bind(fd.as_raw_fd(), &UnixAddr::new(path).map_err(failed(what()))?).map_err(failed(what()))?;
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    let _ = std::fs::set_permissions(path, everybody);
    listen(&fd, Backlog::MAXCONN).map_err(failed(what()))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPU: GpuUuid = GpuUuid([7; 16]);

    #[test]
    fn a_life_that_is_lent_again_ends_anew() {
        let dir = std::env::temp_dir().join(format!("nvshare-lent-again-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let slot = SlotIndex::new(0).unwrap();
        let record = Record { pid: 1, started: 1, namespace: 0, generation: 1, uid: 0 };
        let life = Some(Life::begin(&dir, GPU, slot, record).unwrap());
        let mut live = Live {
            gpu: 0,
            slot,
            life,
            pidfd: None,
            connections: HashSet::new(),
            free_since: None,
            asked: None,
            told: None,
        };
        assert!(!live.is_over(GPU, None) && live.free_since.is_some());
        let lent = live.life.as_ref().unwrap().lend().unwrap();
        assert!(!live.is_over(GPU, None));
        assert_eq!(live.free_since, None, "what runs now has just begun");
        drop(lent);
        std::fs::remove_dir_all(dir).unwrap();
    }
}
