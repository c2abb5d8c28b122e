//! A connection to the arbiter: how a process finds it, decides whether to believe it, and asks it one question.

use crate::map::MapError;
use crate::release::RELEASE;
use crate::runtime_dir;
use crate::scm_rights::{receive, send};
use crate::sync::now;
use crate::units::{GpuUuid, Nanos, format_nanos};
use crate::wire::{Reply, Status};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt, recv, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why a process got no slot.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// Nobody answers.
    #[error(
        "no arbiter answers at {} (waited {}): {cause}. Start nvshare-arbiter, or use `nvshare run`, which starts one; NVSHARE_RUNTIME_DIR names its directory",
        .path.display(), format_nanos(*.waited)
    )]
    NoArbiter {
        /// Its socket.
        path: PathBuf,
        /// How long, ns.
        waited: Nanos,
        /// The error of the last try.
        cause: Errno,
    },
    /// The arbiter refused.
    #[error("the arbiter at {} refused: {text}", .path.display())]
    Refused {
        /// Its socket.
        path: PathBuf,
        /// The kind of refusal.
        status: Status,
        /// The reason, as the arbiter gives it.
        text: String,
    },
    /// The answer is not one of an arbiter of this release.
    #[error("what answers at {} is not an nvshare arbiter of this release: {what}", .path.display())]
    Nonsense {
        /// The socket.
        path: PathBuf,
        /// What is wrong with the answer.
        what: String,
    },
    /// The process that listens there belongs to a user whom this process does not believe.
    #[error(
        "what answers at {} runs as user {user}, and this process, of user {}, believes an arbiter only if it runs as root, as its own user, or as the user to whom root has given that directory: somebody else may have put the socket there. Name another directory with NVSHARE_RUNTIME_DIR",
        .path.display(), nix::unistd::geteuid()
    )]
    Stranger {
        /// The socket.
        path: PathBuf,
        /// The user of the process that listens there.
        user: u32,
    },
    /// The page that the arbiter sent is not usable.
    #[error("the page that the arbiter at {} sent for {gpu} is not usable: {cause}", .path.display())]
    Page {
        /// The socket.
        path: PathBuf,
        /// The GPU.
        gpu: GpuUuid,
        /// Why.
        cause: MapError,
    },
}

/// How long an arbiter that has accepted a connection may take to answer, in seconds.
const ANSWER_TIMEOUT: i64 = 5;

/// The pause between two tries to reach an arbiter that is starting.
pub(crate) const DIAL_AGAIN: Duration = Duration::from_millis(10);

/// Connects to the arbiter, trying again until `timeout` is over.
///
/// # Errors
/// [`RegisterError::NoArbiter`], or [`RegisterError::Stranger`] at once.
pub fn dial(path: &Path, timeout: Duration) -> Result<OwnedFd, RegisterError> {
    let begin = now();
    let fail = |cause| RegisterError::NoArbiter { path: path.to_owned(), waited: now() - begin, cause };
    let address = UnixAddr::new(path).map_err(fail)?;
    loop {
        let fd =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).map_err(fail)?;
        // Without a timeout, `connect` would wait for as long as an arbiter with a full queue is stopped.
        setsockopt(&fd, sockopt::SendTimeout, &TimeVal::seconds(ANSWER_TIMEOUT)).map_err(fail)?;
        match connect(fd.as_raw_fd(), &address) {
            Ok(()) => return believed(fd, path),
            Err(Errno::EINTR) => {}
            Err(cause) if now() - begin >= timeout.as_nanos() as Nanos => return Err(fail(cause)),
            // The arbiter may be starting. There is nothing to wait on before its socket exists, so this is a poll.
            Err(_) => std::thread::sleep(DIAL_AGAIN),
        }
    }
}

/// The connection, if this process believes the user who listens.
fn believed(fd: OwnedFd, path: &Path) -> Result<OwnedFd, RegisterError> {
    let stranger = |user| RegisterError::Stranger { path: path.to_owned(), user };
    // The kernel tells who began to listen.
    let user = getsockopt(&fd, sockopt::PeerCredentials).map_err(|_| stranger(u32::MAX))?.uid();
    let dir = path.parent().unwrap_or(Path::new("."));
    if runtime_dir::believes(dir, user) { Ok(fd) } else { Err(stranger(user)) }
}

/// Whether the other end is closed.
pub(crate) fn has_ended(connection: &OwnedFd) -> bool {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    !matches!(recv(connection.as_raw_fd(), &mut [0], flags), Err(Errno::EAGAIN | Errno::EINTR) | Ok(1..))
}

/// An arbiter's answer.
pub(crate) struct Answer {
    pub(crate) reply: Box<Reply>,
    /// The descriptors that came with it: the page, and with a slot its life file.
    pub(crate) sent: Vec<OwnedFd>,
    /// The connection that it came over.
    pub(crate) connection: OwnedFd,
}

/// Sends one message to the arbiter at `path` and waits for the answer `wanted`.
pub(crate) fn talk(
    path: &Path,
    message: &[u8],
    wanted: Status,
    timeout: Duration,
) -> Result<Answer, RegisterError> {
    let begin = now();
    loop {
        let left = timeout.saturating_sub(Duration::from_nanos(now() - begin));
        match ask(dial(path, left)?, path, message, &[], wanted)? {
            Response::Answered(answer) => return Ok(answer),
            Response::Hangup(cause) if left.is_zero() => {
                return Err(RegisterError::NoArbiter { path: path.to_owned(), waited: now() - begin, cause });
            }
            // Its successor is starting, as in `dial`.
            Response::Hangup(_) => std::thread::sleep(DIAL_AGAIN),
        }
    }
}

/// How a question to the arbiter ended.
pub(crate) enum Response {
    Answered(Answer),
    /// The other end closed without an answer: the arbiter has ended. If it has opened a slot already, the next arbiter gives
    /// out the same slot.
    Hangup(Errno),
}

/// Sends one message over a connection to the arbiter, with these descriptors, and waits for the answer `wanted`.
pub(crate) fn ask(
    connection: OwnedFd,
    path: &Path,
    message: &[u8],
    fds: &[BorrowedFd<'_>],
    wanted: Status,
) -> Result<Response, RegisterError> {
    let fd = &connection;
    let nonsense = |what: String| RegisterError::Nonsense { path: path.to_owned(), what };
    let broke = |error: Errno| nonsense(format!("the connection broke: {error}"));
    setsockopt(fd, sockopt::ReceiveTimeout, &TimeVal::seconds(ANSWER_TIMEOUT)).map_err(broke)?;
    let (reply, sent) = match send(fd.as_fd(), message, fds) {
        // A refusal may come before the arbiter has read anything.
        // Room for more than a reply, so that a longer message is seen as one.
        Ok(()) | Err(Errno::EPIPE) => match receive(fd.as_fd(), size_of::<Reply>() + 1, MsgFlags::empty()) {
            Ok((reply, _)) if reply.is_empty() => return Ok(Response::Hangup(Errno::ECONNRESET)),
            Err(cause @ (Errno::ECONNRESET | Errno::EPIPE)) => return Ok(Response::Hangup(cause)),
            Err(Errno::EAGAIN) => {
                let what = format!("it took the connection and said nothing for {ANSWER_TIMEOUT} s");
                return Err(nonsense(what));
            }
            reply => reply.map_err(broke)?,
        },
        Err(cause @ Errno::ECONNRESET) => return Ok(Response::Hangup(cause)),
        Err(error) => return Err(broke(error)),
    };
    let (reply, status) = Reply::read(&reply).map_err(nonsense)?;
    match status {
        granted if granted == wanted => {
            Ok(Response::Answered(Answer { reply: reply.into(), sent, connection }))
        }
        Status::Welcome
        | Status::Shown
        | Status::Changed
        | Status::Attached
        | Status::Asked
        | Status::Ganged
        | Status::Settings => Err(nonsense(format!("it said {status:?} to who asked for {wanted:?}"))),
        Status::LayoutVersion => {
            // The arbiter cannot know the release of this program, only its layout.
            let text = format!("{} (this program has nvshare {RELEASE})", reply.text());
            Err(RegisterError::Refused { path: path.to_owned(), status, text })
        }
        _ => Err(RegisterError::Refused { path: path.to_owned(), status, text: reply.text() }),
    }
}
