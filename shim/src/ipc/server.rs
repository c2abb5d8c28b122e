//! The exporter's end of the channel: a thread that gives descriptors to whoever shows the key.
//!
//! It believes nothing and waits for nobody. A connection that sends anything but a request, or does not take its
//! answer, is closed; one that has opened nothing is closed after a while; and there is a bound to how many there
//! are. Only processes of the same user, or of root, get a connection at all. But anybody can connect: what that costs is
//! bounded too, in log lines and in time. After so many that were turned away, nobody is let in for a moment.

use crate::cuda::abi::CuResult;
use crate::ipc::channel::{Answer, Ask, BATCH, Extent, Pieces, Refusal, RequestKind, descriptors, peer};
use crate::ipc::handle::{Exporter, Key};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, listen, socket,
};
use nvshare::log_limit::LogLimit;
use nvshare::scm_rights::{receive, send_with};
use nvshare::sync::now;
use nvshare::units::{MILLISECOND, Nanos};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

/// Connections at a time: a process has one to each that it opened memory of.
const MOST_PEERS: usize = 128;

/// How long one that has opened nothing may stay.
const TIMEOUT: Nanos = 5_000 * MILLISECOND;

/// Until descriptors are tried again when the process had none left.
const RETRY_DELAY: Nanos = 100 * MILLISECOND;

/// So many may be turned away one after the other, and then nobody is let in for so long.
const TURNED_AWAY_AT_ONCE: u32 = 32;
const REST: Nanos = 10 * MILLISECOND;

/// What there is to give.
pub trait Lender {
    /// An allocation that somebody has open, until it is dropped.
    type Loan;

    /// Somebody opens an allocation.
    ///
    /// # Errors
    /// There is none of that number any more, or the key is wrong.
    fn lend(&self, number: u64, key: &Key) -> Result<(Self::Loan, Extent), Refusal>;

    /// Some of its pieces, `most` at most.
    ///
    /// # Errors
    /// The driver's.
    fn pieces(&self, loan: &Self::Loan, from: u32, most: usize) -> Result<Pieces, CuResult>;
}

/// The sockets of this process, for [`after_fork`]; no lock, because a forked child would find it held for ever.
static SOCKETS: [AtomicI32; MOST_PEERS + 1] = [const { AtomicI32::new(NONE) }; MOST_PEERS + 1];

const NONE: i32 = -1;

/// A socket that is on the list.
pub struct Socket {
    entry: Option<&'static AtomicI32>,
    fd: OwnedFd,
}

impl Socket {
    fn new(fd: OwnedFd) -> Self {
        let taken = |entry: &&AtomicI32| {
            entry.compare_exchange(NONE, fd.as_raw_fd(), Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        Self { entry: SOCKETS.iter().find(taken), fd }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Before it is closed: its number may be another's then.
        if let Some(entry) = self.entry {
            entry.store(NONE, Ordering::Release);
        }
    }
}

/// In a forked child: the thread that answers is not there, so nobody may think that somebody listens, or that this
/// process still lives when it has ended.
pub fn after_fork() {
    for entry in &SOCKETS {
        let fd = entry.swap(NONE, Ordering::AcqRel);
        if fd >= 0 {
            // SAFETY: the copy of a descriptor whose owner is a thread that this process does not have.
            unsafe { libc::close(fd) };
        }
    }
}

/// What strangers and broken peers can cause, by the lines that it is logged with.
#[derive(Debug, Default)]
struct Nuisances {
    other_user: LogLimit,
    nonsense: LogLimit,
    wrong_key: LogLimit,
    /// Since somebody was served, or since the last rest.
    turned_away: u32,
}

impl Nuisances {
    /// Says what was not logged.
    fn sum_up(&mut self, time: Nanos) {
        for (limit, what) in [
            (&mut self.other_user, "processes of other users that asked for memory of this one"),
            (&mut self.nonsense, "messages that were no request for memory"),
            (&mut self.wrong_key, "requests for memory with a wrong key"),
        ] {
            if let Some(count) = limit.suppressed(time) {
                tracing::warn!(count, "not logged, more {what}");
            }
        }
    }

    /// When there is something to say.
    fn due(&self) -> Option<Nanos> {
        [&self.other_user, &self.nonsense, &self.wrong_key].into_iter().filter_map(LogLimit::due).min()
    }
}

struct Peer<L> {
    socket: Socket,
    pid: i32,
    since: Nanos,
    loans: Vec<(u64, L, Extent)>,
}

/// Opens the socket where a process can be asked.
///
/// # Errors
/// The system's.
pub fn open(exporter: &Exporter) -> nix::Result<Socket> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    bind(listener.as_raw_fd(), &UnixAddr::new_abstract(exporter.socket_name().as_bytes())?)?;
    listen(&listener, Backlog::new(64).unwrap_or(Backlog::MAXCONN))?;
    // Before there is a thread for it: a fork may come first.
    Ok(Socket::new(listener))
}

/// Serves for ever.
pub fn serve<L: Lender>(listener: Socket, lender: &L) {
    let mut server = Server { listener, peers: Vec::new(), retry_at: None, nuisances: Nuisances::default() };
    loop {
        server.round(lender);
    }
}

struct Server<L> {
    listener: Socket,
    peers: Vec<Peer<L>>,
    /// No descriptors were left for a new connection, or too many were turned away: until when none is taken.
    retry_at: Option<Nanos>,
    nuisances: Nuisances,
}

impl<L> Server<L> {
    /// Waits for something to do, and does it.
    fn round(&mut self, lender: &impl Lender<Loan = L>) {
        self.make_room();
        let time = now();
        self.nuisances.sum_up(time);
        if self.nuisances.turned_away >= TURNED_AWAY_AT_ONCE {
            self.nuisances.turned_away = 0;
            self.retry_at = Some(time + REST);
        }
        self.retry_at = self.retry_at.filter(|end| *end > time);
        let ends = self.peers.iter().filter(|peer| peer.loans.is_empty()).map(|peer| peer.since + TIMEOUT);
        let until = ends.chain(self.retry_at).chain(self.nuisances.due()).min();
        let timeout = until.map_or(PollTimeout::NONE, |until| {
            // Rounded up, or the last millisecond is spent spinning.
            let left = until.saturating_sub(time).div_ceil(MILLISECOND);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let listens = self.retry_at.is_none() && self.peers.len() < MOST_PEERS;
        let interest = if listens { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut fds = vec![PollFd::new(self.listener.fd.as_fd(), interest)];
        fds.extend(self.peers.iter().map(|peer| PollFd::new(peer.socket.fd.as_fd(), PollFlags::POLLIN)));
        if poll(&mut fds, timeout).is_err() {
            // A signal, or no memory in the kernel for a moment: nothing is known, so everybody is looked at.
            std::thread::yield_now();
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        drop(fds);
        let mut told = ready[1..].iter();
        self.peers.retain_mut(|peer| {
            !told.next().is_some_and(|ready| *ready) || hear(peer, lender, &mut self.nuisances)
        });
        if ready[0] && listens {
            self.admit();
        }
    }

    /// Closes what has opened nothing for too long, or is in the way of others.
    fn make_room(&mut self) {
        let time = now();
        self.peers.retain(|peer| !peer.loans.is_empty() || peer.since + TIMEOUT > time);
        if self.peers.len() >= MOST_PEERS {
            let idle = self.peers.iter().position(|peer| peer.loans.is_empty());
            match idle {
                Some(index) => drop(self.peers.remove(index)),
                None => tracing::debug!("{MOST_PEERS} processes have opened memory of this one: no more can"),
            }
        }
    }

    fn admit(&mut self) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = match accept4(self.listener.fd.as_raw_fd(), flags) {
            // SAFETY: it was just made, and nobody else knows it.
            Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
            Err(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS) => {
                self.retry_at = Some(now() + RETRY_DELAY);
                return;
            }
            // It has gone away again.
            Err(_) => return,
        };
        match peer(&socket) {
            Ok((true, pid)) => {
                self.peers.push(Peer { socket: Socket::new(socket), pid, since: now(), loans: Vec::new() })
            }
            Ok((false, pid)) => {
                self.nuisances.turned_away += 1;
                if self.nuisances.other_user.allows(now()) {
                    tracing::warn!(
                        peer = pid,
                        "a process of another user asks for memory of this one, and gets none"
                    );
                }
            }
            Err(_) => self.nuisances.turned_away += 1,
        }
    }
}

/// Takes one message. False if the connection is to be closed.
fn hear<L>(peer: &mut Peer<L>, lender: &impl Lender<Loan = L>, nuisances: &mut Nuisances) -> bool {
    // Room for more than a request, so that a longer message is seen as one.
    let room = size_of::<Ask>() + 1;
    let (bytes, sent) = match receive(peer.socket.fd.as_fd(), room, MsgFlags::MSG_DONTWAIT) {
        // Whoever has opened something before it ends is no nuisance.
        Ok((bytes, _)) if bytes.is_empty() => {
            nuisances.turned_away += u32::from(peer.loans.is_empty());
            return false;
        }
        Ok(message) => message,
        Err(Errno::EAGAIN) => return true,
        Err(error) => {
            // A request has no descriptors, and certainly not that many.
            nuisances.turned_away += u32::from(error == Errno::ENOBUFS);
            return false;
        }
    };
    let Some((wish, ask)) = Ask::read(&bytes).filter(|_| sent.is_empty()) else {
        nuisances.turned_away += 1;
        if nuisances.nonsense.allows(now()) {
            tracing::warn!(
                peer = peer.pid,
                "a message of {} B that is no request for memory: hanging up",
                bytes.len()
            );
        }
        return false;
    };
    match wish {
        RequestKind::Open => answer(peer, lender, &ask, nuisances),
        RequestKind::Close => {
            if let Some(index) = peer.loans.iter().rposition(|(number, ..)| *number == ask.number) {
                peer.loans.remove(index);
                peer.since = now();
            }
            true
        }
    }
}

fn answer<L>(
    peer: &mut Peer<L>,
    lender: &impl Lender<Loan = L>,
    ask: &Ask,
    nuisances: &mut Nuisances,
) -> bool {
    let mut refused = |why| {
        nuisances.turned_away += u32::from(why == Refusal::Denied);
        if why == Refusal::Denied && nuisances.wrong_key.allows(now()) {
            tracing::warn!(
                peer = peer.pid,
                "a process asks for memory of this one with a wrong key, and gets none"
            );
        }
        let bytes = Answer::refused(why);
        let said = send_with(peer.socket.fd.as_fd(), bytemuck::bytes_of(&bytes), &[], MsgFlags::MSG_DONTWAIT);
        said.is_ok() && why != Refusal::Denied
    };
    if ask.from == 0 {
        match lender.lend(ask.number, &ask.key) {
            Ok((loan, extent)) => peer.loans.push((ask.number, loan, extent)),
            Err(why) => return refused(why),
        }
    }
    let Some((_, loan, extent)) = peer.loans.iter().rfind(|(number, ..)| *number == ask.number) else {
        return false;
    };
    if ask.from >= extent.pieces {
        return false;
    }
    let left = (extent.pieces - ask.from) as usize;
    match lender.pieces(loan, ask.from, left.min(BATCH)) {
        Ok(pieces) => {
            let bytes = Answer::given(*extent, &pieces);
            let fds = descriptors(&pieces);
            send_with(peer.socket.fd.as_fd(), bytemuck::bytes_of(&bytes), &fds, MsgFlags::MSG_DONTWAIT)
                .is_ok()
        }
        Err(result) => {
            let why = if result == CuResult::INVALID_VALUE { Refusal::Gone } else { Refusal::Driver(result) };
            let said = refused(why);
            // A refused one is not open any more.
            if let Some(index) = peer.loans.iter().rposition(|(number, ..)| *number == ask.number) {
                peer.loans.remove(index);
            }
            said
        }
    }
}
