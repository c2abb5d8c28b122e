//! The exporter's end of the channel: a thread that sends descriptors to processes that present the key.
//!
//! It trusts no peer and waits for none. A connection that sends anything but a request, or does not receive its
//! answer, is closed; one that has opened nothing is closed after a while; and the number of connections is bounded.
//! Only processes of the same user, or of root, are served. Since any process can connect, the cost of refusing others is
//! bounded too, in log lines and in time: after a number of refusals no connection is accepted for a moment.

use crate::cuda::abi::CuResult;
use crate::ipc::channel::{Answer, Ask, BATCH, Extent, Pieces, Refusal, RequestKind, descriptors};
use crate::ipc::handle::{Exporter, Key};
use crate::local_socket::{self, Socket, peer};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::MsgFlags;
use nvshare::log_limit::LogLimit;
use nvshare::scm_rights::{receive, send_with};
use nvshare::sync::now;
use nvshare::units::{MILLISECOND, Nanos};
use std::os::fd::AsFd;

/// The most connections at a time. A process has one to each exporter whose memory it has open.
const MOST_PEERS: usize = 128;

/// How long a connection that has opened nothing may stay.
const TIMEOUT: Nanos = 5_000 * MILLISECOND;

/// How long no connection is accepted after the process had no descriptors left.
const RETRY_DELAY: Nanos = 100 * MILLISECOND;

/// After so many refusals without a success, no connection is accepted for [`REST`].
const TURNED_AWAY_AT_ONCE: u32 = 32;
const REST: Nanos = 10 * MILLISECOND;

/// The allocations that can be opened.
pub trait Lender {
    /// An allocation that a process has open, until it is dropped.
    type Loan;

    /// Opens an allocation for a process.
    ///
    /// # Errors
    /// No allocation has that number any more, or the key is wrong.
    fn lend(&self, number: u64, key: &Key) -> Result<(Self::Loan, Extent), Refusal>;

    /// Its pieces from the number `from` on, at most `most`.
    ///
    /// # Errors
    /// The driver's.
    fn pieces(&self, loan: &Self::Loan, from: u32, most: usize) -> Result<Pieces, CuResult>;
}

/// Refusals of strangers and of broken peers, whose log lines are limited.
#[derive(Debug, Default)]
struct Nuisances {
    other_user: LogLimit,
    nonsense: LogLimit,
    wrong_key: LogLimit,
    /// Refusals since the last rest.
    turned_away: u32,
}

impl Nuisances {
    /// Logs how many lines were suppressed.
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

    /// When the next such line is due, ns.
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

/// Opens the socket of an exporter.
///
/// # Errors
/// The system's.
pub fn open(exporter: &Exporter) -> nix::Result<Socket> {
    // It is on the list of sockets before its thread starts, because the process may fork before that.
    local_socket::listen_at(&exporter.socket_name())
}

/// Serves forever.
pub fn serve<L: Lender>(listener: Socket, lender: &L) {
    let mut server = Server { listener, peers: Vec::new(), retry_at: None, nuisances: Nuisances::default() };
    loop {
        server.round(lender);
    }
}

struct Server<L> {
    listener: Socket,
    peers: Vec<Peer<L>>,
    /// Until when no connection is accepted, because no descriptors were left or too many were refused, ns.
    retry_at: Option<Nanos>,
    nuisances: Nuisances,
}

impl<L> Server<L> {
    /// Waits for messages or connections, and handles them.
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
            // Rounded up, or the last millisecond would be spent polling.
            let left = until.saturating_sub(time).div_ceil(MILLISECOND);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let listens = self.retry_at.is_none() && self.peers.len() < MOST_PEERS;
        let interest = if listens { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut fds = vec![PollFd::new(self.listener.as_fd(), interest)];
        fds.extend(self.peers.iter().map(|peer| PollFd::new(peer.socket.as_fd(), PollFlags::POLLIN)));
        if poll(&mut fds, timeout).is_err() {
            // A signal, or the kernel had no memory: the state of the sockets is unknown, so all are tried.
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

    /// Closes connections that have opened nothing for too long, or whose place is needed for others.
    fn make_room(&mut self) {
        let time = now();
        self.peers.retain(|peer| !peer.loans.is_empty() || peer.since + TIMEOUT > time);
        if self.peers.len() >= MOST_PEERS {
            let idle = self.peers.iter().position(|peer| peer.loans.is_empty());
            match idle {
                Some(index) => drop(self.peers.remove(index)),
                None => tracing::debug!(
                    "{MOST_PEERS} processes have memory of this one open, which is the most: no other can open any"
                ),
            }
        }
    }

    fn admit(&mut self) {
        let socket = match local_socket::accept(&self.listener) {
            Ok(fd) => fd,
            Err(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS) => {
                self.retry_at = Some(now() + RETRY_DELAY);
                return;
            }
            // The peer has closed the connection already.
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
                        "a process of another user asked for GPU memory of this process and was refused"
                    );
                }
            }
            Err(_) => self.nuisances.turned_away += 1,
        }
    }
}

/// Handles one message. False if the connection must be closed.
fn hear<L>(peer: &mut Peer<L>, lender: &impl Lender<Loan = L>, nuisances: &mut Nuisances) -> bool {
    // One byte longer than a request, so that a message that is too long is detected.
    let room = size_of::<Ask>() + 1;
    let (bytes, sent) = match receive(peer.socket.as_fd(), room, MsgFlags::MSG_DONTWAIT) {
        // A peer that has opened something before it disconnects does not count as refused.
        Ok((bytes, _)) if bytes.is_empty() => {
            nuisances.turned_away += u32::from(peer.loans.is_empty());
            return false;
        }
        Ok(message) => message,
        Err(Errno::EAGAIN) => return true,
        Err(error) => {
            // A request has no descriptors; a message with more than can be received is refused.
            nuisances.turned_away += u32::from(error == Errno::ENOBUFS);
            return false;
        }
    };
    let Some((wish, ask)) = Ask::read(&bytes).filter(|_| sent.is_empty()) else {
        nuisances.turned_away += 1;
        if nuisances.nonsense.allows(now()) {
            tracing::warn!(
                peer = peer.pid,
                "a process sent {} B that are no request for GPU memory of this process: the connection is closed",
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
                "a process asked for GPU memory of this process with a wrong key and was refused"
            );
        }
        let bytes = Answer::refused(why);
        let said = send_with(peer.socket.as_fd(), bytemuck::bytes_of(&bytes), &[], MsgFlags::MSG_DONTWAIT);
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
            send_with(peer.socket.as_fd(), bytemuck::bytes_of(&bytes), &fds, MsgFlags::MSG_DONTWAIT).is_ok()
        }
        Err(result) => {
            let why = if result == CuResult::INVALID_VALUE { Refusal::Gone } else { Refusal::Driver(result) };
            let said = refused(why);
            // After a refusal the allocation does not count as open.
            if let Some(index) = peer.loans.iter().rposition(|(number, ..)| *number == ask.number) {
                peer.loans.remove(index);
            }
            said
        }
    }
}
