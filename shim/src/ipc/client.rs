//! The opener's end of the channel.

use crate::cuda::abi::CuResult;
use crate::ipc::channel::{Answer, Ask, Extent, Refusal, RequestKind};
use crate::ipc::handle::{Exporter, Handle};
use crate::local_socket::peer;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nvshare::scm_rights::{receive, send, send_with};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// How long an exporter may take to answer, seconds.
const ANSWER_TIMEOUT: i64 = 5;

/// Why memory of another process could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No process listens.
    #[error("it has ended, or is in another network namespace (containers need a common one)")]
    NoExporter,
    /// It belongs to another user.
    #[error("it belongs to another user, and memory is shared among processes of one user only")]
    OtherUser,
    /// The exporter refuses.
    #[error("{}", match .0 {
        Refusal::Gone => "it has freed that memory, or cannot export it any more".to_owned(),
        Refusal::Denied => "it does not know this handle's key; a handle must be passed on unchanged".to_owned(),
        Refusal::Driver(result) => format!("exporting it failed there with {result}"),
    })]
    Refused(Refusal),
    /// It does not answer.
    #[error("it accepted the request and did not answer for {ANSWER_TIMEOUT} s: it is stopped, or hangs")]
    Silence,
    /// It ended, or closed the connection.
    #[error("it closed the connection before it had answered ({0}): it ended, or has no descriptors left")]
    HungUp(Errno),
    /// The answer is invalid.
    #[error("its answer is invalid: {0}")]
    Nonsense(String),
    /// The system gives no socket or connection.
    #[error("no connection to it could be made: {0}")]
    System(Errno),
    /// The memory could not be mapped.
    #[error("{call} failed with {result}")]
    Driver {
        /// The call.
        call: &'static str,
        /// Its result.
        result: CuResult,
    },
}

impl OpenError {
    /// The result that the application gets: as the driver's, that the handle is invalid or that it could not be mapped.
    pub fn cuda(&self) -> CuResult {
        match self {
            Self::NoExporter | Self::OtherUser | Self::Refused(Refusal::Gone | Refusal::Denied) => {
                CuResult::INVALID_VALUE
            }
            Self::Refused(Refusal::Driver(result)) | Self::Driver { result, .. } => *result,
            _ => CuResult::MAP_FAILED,
        }
    }
}

impl OpenError {
    /// Whether the connection can be used for another request: the exporter has answered, and no further message will come.
    pub fn leaves_it_usable(&self) -> bool {
        matches!(self, Self::Refused(Refusal::Gone | Refusal::Driver(_)) | Self::Driver { .. })
    }
}

/// A connection to a process whose memory this process opens. When it is dropped, the exporter counts all memory that was
/// opened through it as closed.
pub struct Connection(OwnedFd);

impl Connection {
    /// Connects to an exporter.
    ///
    /// # Errors
    /// The exporter does not exist, or belongs to another user.
    pub fn to(exporter: &Exporter) -> Result<Self, OpenError> {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
            .map_err(OpenError::System)?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::seconds(ANSWER_TIMEOUT))
            .map_err(OpenError::System)?;
        setsockopt(&fd, sockopt::SendTimeout, &TimeVal::seconds(ANSWER_TIMEOUT))
            .map_err(OpenError::System)?;
        let address = UnixAddr::new_abstract(exporter.socket_name().as_bytes()).map_err(OpenError::System)?;
        loop {
            match connect(fd.as_raw_fd(), &address) {
                Ok(()) => break,
                Err(Errno::EINTR) => {}
                Err(Errno::ECONNREFUSED) => return Err(OpenError::NoExporter),
                Err(Errno::EAGAIN) => return Err(OpenError::Silence),
                Err(error) => return Err(OpenError::System(error)),
            }
        }
        // After the exporter has ended, another process may have bound its name.
        match peer(&fd) {
            Ok((true, _)) => Ok(Self(fd)),
            Ok((false, _)) => Err(OpenError::OtherUser),
            Err(error) => Err(OpenError::System(error)),
        }
    }

    /// The descriptor, for [`super::imports`], which closes it in a forked child.
    pub fn raw(&self) -> i32 {
        self.0.as_raw_fd()
    }

    /// Opens an allocation: passes each of its pieces to `take`, in order, with its offset, descriptor and bytes.
    ///
    /// # Errors
    /// It could not be opened, or `take` failed; then it is closed again.
    pub fn open(
        &self,
        handle: &Handle,
        mut take: impl FnMut(&Extent, u64, OwnedFd, u64) -> Result<(), OpenError>,
    ) -> Result<Extent, OpenError> {
        let (mut known, mut at, mut from) = (None, 0u64, 0);
        let opened = loop {
            match self.next(handle, &mut known, &mut at, &mut from, &mut take) {
                Ok(false) => {}
                Ok(true) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        match (opened, known) {
            (Ok(()), Some(extent)) => Ok(extent),
            // After a refusal the exporter does not count it as open.
            (Err(error @ OpenError::Refused(_)), _) => Err(error),
            (opened, known) => {
                if known.is_some() {
                    self.close(handle);
                }
                opened?;
                Err(OpenError::Nonsense("it has no pieces".into()))
            }
        }
    }

    /// Requests and handles one batch of pieces. True if it was the last.
    fn next(
        &self,
        handle: &Handle,
        known: &mut Option<Extent>,
        at: &mut u64,
        from: &mut u32,
        take: &mut impl FnMut(&Extent, u64, OwnedFd, u64) -> Result<(), OpenError>,
    ) -> Result<bool, OpenError> {
        let (extent, pieces) = self.ask(handle, *from)?;
        if *known.get_or_insert(extent) != extent {
            return Err(OpenError::Nonsense(format!("the allocation was {known:?} and is now {extent:?}")));
        }
        for (fd, size) in pieces {
            if size > extent.size - *at {
                return Err(OpenError::Nonsense(format!("its pieces are more than {} B", extent.size)));
            }
            take(&extent, *at, fd, size)?;
            *at += size;
            *from += 1;
        }
        match (*from == extent.pieces, *at == extent.size) {
            (false, _) => Ok(false),
            (true, true) => Ok(true),
            (true, false) => Err(OpenError::Nonsense(format!("its pieces are {at} of {} B", extent.size))),
        }
    }

    fn ask(&self, handle: &Handle, from: u32) -> Result<(Extent, super::channel::Pieces), OpenError> {
        let ask = Ask::new(RequestKind::Open, handle.number, handle.key, from);
        let failed = |error| match error {
            Errno::EAGAIN => OpenError::Silence,
            Errno::ENOBUFS => OpenError::Nonsense(
                "it came with more descriptors than an answer has, or than this process may have".into(),
            ),
            error => OpenError::HungUp(error),
        };
        send(self.0.as_fd(), bytemuck::bytes_of(&ask), &[]).map_err(failed)?;
        // One byte longer than an answer, so that a message that is too long is detected.
        let room = size_of::<Answer>() + 1;
        let (bytes, fds) = receive(self.0.as_fd(), room, MsgFlags::empty()).map_err(failed)?;
        if bytes.is_empty() {
            return Err(OpenError::HungUp(Errno::ECONNRESET));
        }
        Answer::read(&bytes, fds, from).map_err(OpenError::Nonsense)?.map_err(OpenError::Refused)
    }

    /// Tells the exporter that an allocation is closed. Errors are ignored: the exporter may have ended.
    pub fn close(&self, handle: &Handle) {
        let ask = Ask::new(RequestKind::Close, handle.number, handle.key, 0);
        let _ = send_with(self.0.as_fd(), bytemuck::bytes_of(&ask), &[], MsgFlags::MSG_DONTWAIT);
    }
}
