//! Registration: how a process gets its slot and the page's descriptor.
//!
//! Once per process and GPU, over a SOCK_SEQPACKET Unix socket: one [`Hello`] out, one [`Reply`] back,
//! with the page's descriptor (SCM_RIGHTS) when the status is [`Status::Welcome`]. A container needs
//! only the socket. Messages are plain structs of fixed size, so there is nothing to parse and little
//! to get wrong; what does not fit is refused with a sentence that says why.
//!
//! Whoever only wants to know how large the pool is sends the same hello with another magic: it gets the page
//! and no slot ([`look`]). An arbiter that does not know this question refuses it as malformed. Over the same socket go
//! changes of a running client's shares ([`crate::change`]).
//!
//! The process then claims its slot in the page ([`Page::claim`](crate::page::Page::claim)). One that it has not claimed,
//! because the arbiter ended between opening it and answering, is what it is given when it asks again.
//!
//! Whoever only looks gets a descriptor that only reads. All descriptors of pages are of sealed memory
//! ([`crate::sealed`]), and no other is taken; nor is an answer of somebody whom [`crate::runtime_dir`] does not believe.
//!
//! A page exists for as long as somebody has it, so an arbiter that ends after it has sent a page, and before the process
//! has mapped it, may have a successor with another page. If the connection is still open when the page is mapped, every
//! later arbiter finds it; if not, the process asks again.
//!
//! With the slot comes a second descriptor, the slot's life file. Whoever registers keeps it and the connection for as
//! long as the process lives and runs the same program ([`crate::presence`]): that is how the arbiter knows.

use crate::change::CHANGE_MAGIC;
use crate::client::{NOT_TOLD, Truth};
use crate::map::{MapError, MappedPage};
use crate::page::{LAYOUT_VERSION, NAME_BYTES};
use crate::presence::{self, ATTACH_MAGIC, Presence};
use crate::shares::{Priority, Shares};
use crate::slot::SlotIndex;
use crate::sync::now;
use crate::units::{GpuUuid, Nanos, format_nanos};
use crate::{runtime_dir, sealed};
use bytemuck::{Pod, Zeroable};
use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect,
    getsockopt, recv, recvmsg, sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// First eight bytes of every message but one.
pub const WIRE_MAGIC: u64 = u64::from_le_bytes(*b"nvshare?");

/// First eight bytes of a hello that asks for the page and for no slot.
pub const LOOK_MAGIC: u64 = u64::from_le_bytes(*b"nvlook??");

/// What a message to the arbiter may begin with.
pub(crate) const TALK_MAGICS: [u64; 4] = [WIRE_MAGIC, LOOK_MAGIC, CHANGE_MAGIC, ATTACH_MAGIC];

/// Bytes of the sentence in a reply.
const TEXT_BYTES: usize = 256;

/// What a client says.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Hello {
    /// [`WIRE_MAGIC`] or [`LOOK_MAGIC`]: what it wants.
    pub magic: u64,
    /// [`LAYOUT_VERSION`] of the client.
    pub layout_version: u32,
    /// Its weight, 1 to [`crate::fair::MAX_WEIGHT`].
    pub weight: u32,
    /// The GPU that it wants.
    pub gpu: [u8; 16],
    /// What it calls itself, zero-padded UTF-8.
    pub name: [u8; NAME_BYTES],
    /// Its memory limit's word.
    pub memory_limit: u64,
    /// Its priority's word.
    pub priority: u32,
    /// Its pid as it sees it itself: what an arbiter that cannot see it calls it.
    pub pid: u32,
}

impl Hello {
    /// A client's request for a slot on a GPU, with the usual shares.
    pub fn new(gpu: GpuUuid, name: &str) -> Self {
        Self {
            magic: WIRE_MAGIC,
            layout_version: LAYOUT_VERSION,
            weight: 0,
            gpu: gpu.0,
            name: padded(name),
            memory_limit: 0,
            priority: 0,
            pid: std::process::id(),
        }
        .with(Shares::default())
    }

    /// The same, asking for these shares.
    pub fn with(self, shares: Shares) -> Self {
        Self {
            weight: shares.weight,
            priority: shares.priority as u32,
            memory_limit: shares.memory_limit.into(),
            ..self
        }
    }

    /// The shares that it asks for, within their bounds.
    pub fn shares(&self) -> Shares {
        Shares {
            weight: crate::fair::weight(self.weight),
            priority: Priority::read(self.priority).unwrap_or_default(),
            memory_limit: self.memory_limit.into(),
        }
    }

    /// A request to see a GPU's page, of somebody who is no client of it yet.
    pub fn look(gpu: GpuUuid) -> Self {
        Self { magic: LOOK_MAGIC, ..Self::new(gpu, "") }
    }

    /// What the sender wants.
    pub fn wish(&self) -> Wish {
        if self.magic == LOOK_MAGIC { Wish::Look } else { Wish::Slot }
    }

    /// Its name, as far as it is text.
    pub fn name(&self) -> String {
        text(&self.name)
    }

    /// Reads what came over a socket.
    ///
    /// # Errors
    /// The reply to send instead: it says what is wrong.
    pub fn read(bytes: &[u8]) -> Result<Self, Box<Reply>> {
        check_release(bytes)?;
        let hello: Self = bytemuck::try_pod_read_unaligned(bytes).map_err(|_| {
            Reply::refuse(
                Status::Malformed,
                &format!("a hello has {} bytes and this message has {}", size_of::<Self>(), bytes.len()),
            )
        })?;
        if ![WIRE_MAGIC, LOOK_MAGIC].contains(&hello.magic) {
            return Err(Reply::refuse(Status::Malformed, "this is not an nvshare hello (wrong magic)"));
        }
        Ok(hello)
    }
}

/// Checks that a message is of this release, as far as its beginning tells: before its length, which other releases may
/// have changed.
pub(crate) fn check_release(bytes: &[u8]) -> Result<(), Box<Reply>> {
    let Some((magic, rest)) = bytes.split_first_chunk() else { return Ok(()) };
    let Some(version) = rest.first_chunk().map(|version| u32::from_le_bytes(*version)) else { return Ok(()) };
    if !TALK_MAGICS.contains(&u64::from_le_bytes(*magic)) || version == LAYOUT_VERSION {
        return Ok(());
    }
    Err(Reply::refuse(
        Status::LayoutVersion,
        &format!(
            "the client has page layout {version} and the arbiter {LAYOUT_VERSION}; run the same nvshare release on both sides",
        ),
    ))
}

/// What a hello asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// A slot, and the page that it is in.
    Slot,
    /// The page alone.
    Look,
}

impl Wish {
    /// The answer that grants it.
    fn granted(self) -> Status {
        match self {
            Self::Slot => Status::Welcome,
            Self::Look => Status::Shown,
        }
    }
}

/// How a registration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// A slot and the page's descriptor come with it.
    Welcome = 1,
    /// The two sides have different page layouts.
    LayoutVersion = 2,
    /// No such GPU here.
    UnknownGpu = 3,
    /// All slots of this GPU are taken.
    Full = 4,
    /// The hello made no sense.
    Malformed = 5,
    /// Anything else; the text says what.
    Refused = 6,
    /// The page's descriptor comes with it, and no slot: that is all that was asked for.
    Shown = 7,
    /// The client's shares are what the text says.
    Changed = 8,
    /// The arbiter knows the client that was there before it.
    Attached = 9,
    /// The client's slot is closed. Also said without a question, over the connection that the client keeps.
    Closed = 10,
    /// The arbiter asks over that connection what the client does.
    Asked = 11,
}

impl Status {
    fn parse(word: u32) -> Option<Self> {
        [
            Self::Welcome,
            Self::LayoutVersion,
            Self::UnknownGpu,
            Self::Full,
            Self::Malformed,
            Self::Refused,
            Self::Shown,
            Self::Changed,
            Self::Attached,
            Self::Closed,
            Self::Asked,
        ]
        .into_iter()
        .find(|status| *status as u32 == word)
    }
}

/// What the arbiter answers.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Reply {
    /// [`WIRE_MAGIC`].
    pub magic: u64,
    /// [`LAYOUT_VERSION`] of the arbiter.
    pub layout_version: u32,
    /// A [`Status`].
    pub status: u32,
    /// The slot's index.
    pub slot: u32,
    /// Zero.
    pub reserved: u32,
    /// A sentence for a person, zero-padded UTF-8.
    pub text: [u8; TEXT_BYTES],
}

impl Reply {
    /// A slot for the client.
    pub fn welcome(slot: SlotIndex) -> Self {
        Self { slot: slot.get() as u32, ..*Self::refuse(Status::Welcome, "") }
    }

    /// The page, for somebody who only looks.
    pub fn shown() -> Self {
        *Self::refuse(Status::Shown, "")
    }

    /// The client is known.
    pub fn attached(slot: SlotIndex) -> Self {
        Self { slot: slot.get() as u32, ..*Self::refuse(Status::Attached, "") }
    }

    /// What is the client doing?
    pub fn asked() -> Self {
        *Self::refuse(Status::Asked, "")
    }

    /// A client's slot is closed, and why.
    pub fn closed(why: &str) -> Box<Self> {
        Self::refuse(Status::Closed, why)
    }

    /// A client's shares are these now.
    pub fn changed(shares: Shares) -> Self {
        *Self::refuse(Status::Changed, &shares.to_string())
    }

    /// Nothing, and why.
    pub fn refuse(status: Status, why: &str) -> Box<Self> {
        Box::new(Self {
            magic: WIRE_MAGIC,
            layout_version: LAYOUT_VERSION,
            status: status as u32,
            slot: 0,
            reserved: 0,
            text: padded(why),
        })
    }

    /// The sentence, as far as it is text.
    pub fn text(&self) -> String {
        text(&self.text)
    }

    /// Reads what came over a socket, and how the registration ended.
    ///
    /// # Errors
    /// What is wrong with it, in words that follow the name of who sent it.
    pub fn read(bytes: &[u8]) -> Result<(Self, Status), String> {
        let reply: Self = bytemuck::try_pod_read_unaligned(bytes)
            .map_err(|_| format!("its answer has {} bytes instead of {}", bytes.len(), size_of::<Self>()))?;
        if reply.magic != WIRE_MAGIC {
            return Err("its answer begins with the wrong magic".into());
        }
        let status = Status::parse(reply.status)
            .ok_or_else(|| format!("its answer has the unknown status {}", reply.status))?;
        Ok((reply, status))
    }
}

fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    let fits = text.floor_char_boundary(N);
    bytes[..fits].copy_from_slice(&text.as_bytes()[..fits]);
    bytes
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

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
        /// What the last try said.
        cause: Errno,
    },
    /// The arbiter answered, with a reason.
    #[error("the arbiter at {} refused: {text}", .path.display())]
    Refused {
        /// Its socket.
        path: PathBuf,
        /// The kind of refusal.
        status: Status,
        /// Its sentence.
        text: String,
    },
    /// Something answered that is not our arbiter.
    #[error("what answers at {} is not an nvshare arbiter of this release: {what}", .path.display())]
    Nonsense {
        /// The socket.
        path: PathBuf,
        /// What was wrong with its answer.
        what: String,
    },
    /// Somebody else's arbiter, or whatever it is.
    #[error(
        "what answers at {} runs as user {user}, and this process, of user {}, believes an arbiter only if it runs as root, as its own user, or as the user to whom root has given that directory: somebody else may have put the socket there. Name another directory with NVSHARE_RUNTIME_DIR",
        .path.display(), nix::unistd::geteuid()
    )]
    Stranger {
        /// The socket.
        path: PathBuf,
        /// Who listens there.
        user: u32,
    },
    /// The page that came is not usable.
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

/// A slot, and the page that it is in.
pub struct Registration {
    /// The GPU's page.
    pub page: MappedPage,
    /// The client's slot in it.
    pub slot: SlotIndex,
    /// What the client tells the arbiter of its phase ([`crate::Client::telling`]).
    pub truth: Truth,
}

/// How long an arbiter that has accepted a connection may take to answer.
const ANSWER_TIMEOUT: i64 = 5;

/// Between two tries to reach an arbiter that is starting.
const DIAL_AGAIN: Duration = Duration::from_millis(10);

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
        // A stopped arbiter whose queue is full would keep us in `connect` for as long as it is stopped.
        setsockopt(&fd, sockopt::SendTimeout, &TimeVal::seconds(ANSWER_TIMEOUT)).map_err(fail)?;
        match connect(fd.as_raw_fd(), &address) {
            Ok(()) => return believed(fd, path),
            Err(Errno::EINTR) => {}
            Err(cause) if now() - begin >= timeout.as_nanos() as Nanos => return Err(fail(cause)),
            // The arbiter is starting: there is nothing to wait on before its socket exists.
            Err(_) => std::thread::sleep(DIAL_AGAIN),
        }
    }
}

/// The connection, if who listens is one whom this process believes.
fn believed(fd: OwnedFd, path: &Path) -> Result<OwnedFd, RegisterError> {
    let stranger = |user| RegisterError::Stranger { path: path.to_owned(), user };
    // Of whoever began to listen, as the kernel knows it.
    let user = getsockopt(&fd, sockopt::PeerCredentials).map_err(|_| stranger(u32::MAX))?.uid();
    let dir = path.parent().unwrap_or(Path::new("."));
    if runtime_dir::believes(dir, user) { Ok(fd) } else { Err(stranger(user)) }
}

/// Registers this process with the arbiter at `path`. If the arbiter ends before it has answered, the
/// next one is asked, as long as `timeout` lasts.
///
/// # Errors
/// Nobody answers within `timeout`, the answer is a refusal, or makes no sense.
pub fn register(path: &Path, hello: &Hello, timeout: Duration) -> Result<Registration, RegisterError> {
    let begin = now();
    loop {
        let left = timeout.saturating_sub(Duration::from_nanos(now() - begin));
        let (registration, answer) = ask_for(path, hello, left)?;
        if hello.wish() == Wish::Look {
            return Ok(registration);
        }
        let claimed = registration.page.claim(registration.slot);
        if has_ended(&answer.connection) {
            drop((registration, answer));
            if left.is_zero() {
                let cause = Errno::ECONNRESET;
                return Err(RegisterError::NoArbiter { path: path.to_owned(), waited: now() - begin, cause });
            }
            // Its successor may not be there yet.
            std::thread::sleep(DIAL_AGAIN);
            continue;
        }
        if claimed {
            presence::keep(Presence::new(path, &registration, answer));
            return Ok(registration);
        }
        // Threads take the same slot once each. Only a page that lies gets here for ever.
        if left.is_zero() {
            let what = format!("it gave slot {}, which is taken", registration.slot.get());
            return Err(RegisterError::Nonsense { path: path.to_owned(), what });
        }
    }
}

/// Whether nobody is at the other end any more.
fn has_ended(connection: &OwnedFd) -> bool {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    !matches!(recv(connection.as_raw_fd(), &mut [0], flags), Err(Errno::EAGAIN | Errno::EINTR) | Ok(1..))
}

/// The page, and the slot that the arbiter gives this process; another thread may have been given the same one. And the
/// answer that they came with.
fn ask_for(path: &Path, hello: &Hello, timeout: Duration) -> Result<(Registration, Answer), RegisterError> {
    let gpu = GpuUuid(hello.gpu);
    let nonsense = |what: String| RegisterError::Nonsense { path: path.to_owned(), what };
    let answer = talk(path, bytemuck::bytes_of(hello), hello.wish().granted(), timeout)?;
    // The slot means nothing to whoever only looks.
    let slot = SlotIndex::new(answer.reply.slot as usize)
        .ok_or_else(|| nonsense(format!("it gave slot {}", answer.reply.slot)))?;
    let sent = answer.sent.first().ok_or_else(|| nonsense("it sent no page".into()))?;
    let page =
        MappedPage::open(sent).map_err(|cause| RegisterError::Page { path: path.to_owned(), gpu, cause })?;
    if !sealed::is_sealed(sent) {
        return Err(nonsense(format!(
            "the page that it sent for {gpu} is not sealed: others could shorten it"
        )));
    }
    if page.gpu() != gpu {
        return Err(nonsense(format!("it sent the page of {} for {gpu}", page.gpu())));
    }
    let truth = Truth::new(NOT_TOLD.into());
    Ok((Registration { page, slot, truth }, answer))
}

/// The page of a GPU, without a slot in it. Waits as [`register`] does.
///
/// # Errors
/// As for [`register`].
pub fn look(path: &Path, gpu: GpuUuid, timeout: Duration) -> Result<MappedPage, RegisterError> {
    register(path, &Hello::look(gpu), timeout).map(|registration| registration.page)
}

/// What an arbiter answered.
pub(crate) struct Answer {
    pub(crate) reply: Box<Reply>,
    /// The descriptors that came with it: the page, and with a slot its life file.
    pub(crate) sent: Vec<OwnedFd>,
    /// Over which it came.
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
            Said::This(answer) => return Ok(answer),
            Said::Hangup(cause) if left.is_zero() => {
                return Err(RegisterError::NoArbiter { path: path.to_owned(), waited: now() - begin, cause });
            }
            // Its successor is starting, as in `dial`.
            Said::Hangup(_) => std::thread::sleep(DIAL_AGAIN),
        }
    }
}

pub(crate) enum Said {
    This(Answer),
    /// The other end closed without a word: it has ended. Should it have opened a slot already, its
    /// successor gives out that one.
    Hangup(Errno),
}

/// Sends one message over a connection to the arbiter, with these descriptors, and waits for the answer `wanted`.
pub(crate) fn ask(
    connection: OwnedFd,
    path: &Path,
    message: &[u8],
    fds: &[BorrowedFd<'_>],
    wanted: Status,
) -> Result<Said, RegisterError> {
    let fd = &connection;
    let nonsense = |what: String| RegisterError::Nonsense { path: path.to_owned(), what };
    let broke = |error: Errno| nonsense(format!("the connection broke: {error}"));
    setsockopt(fd, sockopt::ReceiveTimeout, &TimeVal::seconds(ANSWER_TIMEOUT)).map_err(broke)?;
    let (reply, sent) = match send(fd.as_fd(), message, fds) {
        // A refusal may come before the arbiter has read anything.
        // Room for more than a reply, so that a longer message is seen as one.
        Ok(()) | Err(Errno::EPIPE) => match receive(fd.as_fd(), size_of::<Reply>() + 1, MsgFlags::empty()) {
            Ok((reply, _)) if reply.is_empty() => return Ok(Said::Hangup(Errno::ECONNRESET)),
            Err(cause @ (Errno::ECONNRESET | Errno::EPIPE)) => return Ok(Said::Hangup(cause)),
            Err(Errno::EAGAIN) => {
                let what = format!("it took the connection and said nothing for {ANSWER_TIMEOUT} s");
                return Err(nonsense(what));
            }
            reply => reply.map_err(broke)?,
        },
        Err(cause @ Errno::ECONNRESET) => return Ok(Said::Hangup(cause)),
        Err(error) => return Err(broke(error)),
    };
    let (reply, status) = Reply::read(&reply).map_err(nonsense)?;
    match status {
        granted if granted == wanted => Ok(Said::This(Answer { reply: reply.into(), sent, connection })),
        Status::Welcome | Status::Shown | Status::Changed | Status::Attached | Status::Asked => {
            Err(nonsense(format!("it said {status:?} to who asked for {wanted:?}")))
        }
        _ => Err(RegisterError::Refused { path: path.to_owned(), status, text: reply.text() }),
    }
}

/// Sends one message, and descriptors with it.
///
/// # Errors
/// The socket's.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> nix::Result<()> {
    let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let control: Vec<_> = (!fds.is_empty()).then_some(ControlMessage::ScmRights(&fds)).into_iter().collect();
    let flags = MsgFlags::MSG_NOSIGNAL;
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], &control, flags, None) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
            Ok(_) => return Ok(()),
        }
    }
}

/// Receives one message of at most `room` bytes, and the descriptors that come with it. No bytes: the other end is closed.
///
/// # Errors
/// The socket's.
pub fn receive(socket: BorrowedFd<'_>, room: usize, flags: MsgFlags) -> nix::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; room];
    let mut control = cmsg_space!([i32; 4]);
    let mut fds = Vec::new();
    let length = loop {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
            Ok(message) => {
                for part in message.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(received) = part {
                        // SAFETY: the kernel has just installed these descriptors for this message;
                        // nobody else knows them, so they are ours to close.
                        fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                    }
                }
                break message.bytes;
            }
        }
    };
    bytes.truncate(length);
    Ok((bytes, fds))
}
