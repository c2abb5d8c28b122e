//! The channel between real processes, with files in memory in place of GPU memory.
//!
//! The exporter is this test program, started again with an environment variable.

use crate::cuda::abi::{CUipcMemHandle, CuResult};
use crate::ipc::channel::{Answer, Ask, Extent, Pieces, Refusal, RequestKind};
use crate::ipc::client::{Connection, OpenError};
use crate::ipc::handle::{Exporter, Handle, Key, Read};
use crate::ipc::{exports, server};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, send, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::Pid;
use nvshare::scm_rights::MOST_DESCRIPTORS;
use nvshare::units::GRANULE;
use std::fs::File;
use std::io::{BufRead, BufReader, Read as _, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

const ROLE: &str = "NVSHARE_TEST_ROLE";

/// Lends allocations, each with as many pieces as its number.
struct Files {
    key: Key,
}

static LOANS: AtomicU64 = AtomicU64::new(0);

struct Loan(u64);

impl Drop for Loan {
    fn drop(&mut self) {
        LOANS.fetch_sub(1, Ordering::SeqCst);
    }
}

fn text(number: u64, piece: u64) -> String {
    format!("piece {piece} of {number}")
}

impl server::Lender for Files {
    type Loan = Loan;

    fn lend(&self, number: u64, key: &Key) -> Result<(Loan, Extent), Refusal> {
        if !self.key.is(key) {
            return Err(Refusal::Denied);
        }
        if number == 0 {
            return Err(Refusal::Gone);
        }
        LOANS.fetch_add(1, Ordering::SeqCst);
        Ok((Loan(number), Extent::new(number * GRANULE, 512, GRANULE - 512, number as u32)))
    }

    fn pieces(&self, loan: &Loan, from: u32, most: usize) -> Result<Pieces, CuResult> {
        let piece = |index: u64| {
            let mut file = File::from(memfd_create(c"piece", MFdFlags::empty()).unwrap());
            file.write_all(text(loan.0, index).as_bytes()).unwrap();
            (OwnedFd::from(file), GRANULE)
        };
        Ok((u64::from(from)..loan.0).take(most).map(piece).collect())
    }
}

fn say(what: &str) {
    println!("\n{what}");
    std::io::stdout().flush().unwrap();
}

fn hex(handle: &Handle) -> String {
    handle.encode().reserved.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The body of the exporter: serves, and prints the number of loans on request.
#[test]
fn be_an_exporter() {
    match std::env::var(ROLE).as_deref() {
        Ok("files") => {
            let (exporter, key) = (Exporter::here().unwrap(), Key::draw().unwrap());
            crate::log::initialise();
            let listener = server::open(&exporter).unwrap();
            say(&hex(&Handle::new(exporter, 300, key)));
            std::thread::spawn(move || server::serve(listener, &Files { key }));
            for _ in std::io::stdin().lines() {
                say(&LOANS.load(Ordering::SeqCst).to_string());
            }
        }
        Ok("forks") => {
            let exporter = exports::serve().unwrap();
            // SAFETY: the child only closes a descriptor and waits.
            match unsafe { nix::unistd::fork() }.unwrap() {
                nix::unistd::ForkResult::Child => {
                    crate::local_socket::after_fork();
                    let handle = hex(&Handle::new(exporter, 1, Key::draw().unwrap()));
                    nix::unistd::write(std::io::stdout(), format!("\n{handle}\n").as_bytes()).unwrap();
                    // Wait until the test has ended, in whatever way.
                    let stdout = std::io::stdout();
                    let mut listens = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
                    while poll(&mut listens, PollTimeout::NONE).is_err() {}
                    // SAFETY: ends the process at once, without exit handlers.
                    unsafe { libc::_exit(0) }
                }
                nix::unistd::ForkResult::Parent { child } => {
                    // Wait until the test is done.
                    let _ = std::io::stdin().lines().next();
                    say(&child.to_string());
                    let _ = std::io::stdin().lines().next();
                }
            }
        }
        _ => {}
    }
}

struct Other {
    process: Child,
    said: BufReader<ChildStdout>,
    handle: Handle,
}

impl Other {
    fn start(role: &str) -> Self {
        Self::start_with(role, None)
    }

    fn start_with(role: &str, log: Option<File>) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["ipc::tests::be_an_exporter", "--exact", "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log.map_or_else(Stdio::inherit, Stdio::from))
            .spawn()
            .unwrap();
        let mut said = BufReader::new(process.stdout.take().unwrap());
        let handle = loop {
            let mut line = String::new();
            assert!(said.read_line(&mut line).unwrap() > 0, "it ended without a handle");
            let bytes: Vec<u8> = (0..line.trim().len() / 2)
                .filter_map(|at| u8::from_str_radix(&line[2 * at..2 * at + 2], 16).ok())
                .collect();
            if let Ok(reserved) = bytes.try_into()
                && let Read::Ours(handle) = Handle::decode(&CUipcMemHandle { reserved })
            {
                break handle;
            }
        };
        Self { process, said, handle }
    }

    fn handle(&self, number: u64) -> Handle {
        Handle::new(self.handle.exporter, number, self.handle.key)
    }

    fn connect(&self) -> Connection {
        Connection::to(&self.handle.exporter).unwrap()
    }

    fn ask(&mut self) -> i32 {
        writeln!(self.process.stdin.as_mut().unwrap()).unwrap();
        loop {
            let mut line = String::new();
            assert!(self.said.read_line(&mut line).unwrap() > 0, "it ended");
            if let Ok(number) = line.trim().parse() {
                return number;
            }
        }
    }

    /// Waits until it has so many loans: it notices the end of a connection a little later.
    fn has_lent(&mut self, loans: i32) {
        nvshare_test_support::Patience::seconds(60).until("the loans are right", || self.ask() == loans);
    }

    /// Waits until the process is stopped: until then it may still answer.
    fn has_stopped(&self) {
        let stat = format!("/proc/{}/stat", self.process.id());
        nvshare_test_support::Patience::seconds(20).until("it has stopped", || {
            let stat = std::fs::read_to_string(&stat).unwrap();
            stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
        });
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id() as i32), signal).unwrap();
    }

    fn dies(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    fn works(&self) {
        assert_eq!(open(&self.connect(), &self.handle(2)).unwrap().pieces, 2);
    }

    /// A connection on which the test can send any bytes.
    fn hostile(&self) -> OwnedFd {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::seconds(60)).unwrap();
        let name = self.handle.exporter.socket_name();
        connect(fd.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes()).unwrap()).unwrap();
        fd
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Opens an allocation, and checks every piece.
fn open(connection: &Connection, handle: &Handle) -> Result<Extent, OpenError> {
    let mut seen = 0;
    let extent = connection.open(handle, |extent, at, fd, size| {
        assert_eq!((extent.size, at, size), (handle.number * GRANULE, seen * GRANULE, GRANULE));
        let (mut file, mut found) = (File::from(fd), String::new());
        file.rewind().unwrap();
        file.read_to_string(&mut found).unwrap();
        assert_eq!(found, text(handle.number, seen));
        seen += 1;
        Ok(())
    })?;
    assert_eq!(seen, handle.number);
    Ok(extent)
}

/// Whether the other end has closed the connection, perhaps after other messages.
fn hung_up(socket: &OwnedFd) -> bool {
    let mut bytes = [0; size_of::<Answer>()];
    loop {
        match nix::sys::socket::recv(socket.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
            Ok(0) | Err(Errno::ECONNRESET) => return true,
            Ok(_) => {}
            Err(_) => return false,
        }
    }
}

#[test]
fn three_hundred_pieces_come_in_their_order_and_the_loan_ends_with_the_close() {
    let mut other = Other::start("files");
    let connection = other.connect();
    let (many, few) = (other.handle(300), other.handle(3));
    let extent = open(&connection, &many).unwrap();
    assert_eq!((extent.offset, extent.bytes), (512, GRANULE - 512));
    open(&connection, &few).unwrap();
    open(&connection, &few).unwrap();
    other.has_lent(3);
    connection.close(&few);
    other.has_lent(2);
    connection.close(&many);
    connection.close(&many);
    other.has_lent(1);
    drop(connection);
    other.has_lent(0);
}

#[test]
fn an_allocation_that_cannot_be_mapped_is_closed_again() {
    let mut other = Other::start("files");
    let connection = other.connect();
    let mut seen = 0;
    let failed = connection.open(&other.handle(100), |_, _, _, _| {
        seen += 1;
        let result = CuResult::OUT_OF_MEMORY;
        if seen < 70 { Ok(()) } else { Err(OpenError::Driver { call: "cuMemMap", result }) }
    });
    assert_eq!(failed.unwrap_err().cuda(), CuResult::OUT_OF_MEMORY);
    other.has_lent(0);
    open(&connection, &other.handle(70)).unwrap();
}

#[test]
fn a_wrong_key_opens_nothing() {
    let mut other = Other::start("files");
    let wrong = Handle::new(other.handle.exporter, 5, Key::draw().unwrap());
    let refused = open(&other.connect(), &wrong).unwrap_err();
    assert!(matches!(refused, OpenError::Refused(Refusal::Denied)), "{refused}");
    assert_eq!(refused.cuda(), CuResult::INVALID_VALUE);
    assert!(!refused.leaves_it_usable());
    other.has_lent(0);
    let gone = open(&other.connect(), &other.handle(0)).unwrap_err();
    assert!(
        matches!(gone, OpenError::Refused(Refusal::Gone)) && gone.to_string().contains("freed"),
        "{gone}"
    );
}

#[test]
fn the_end_of_a_killed_exporter_is_noticed() {
    let mut other = Other::start("files");
    let (connection, handle) = (other.connect(), other.handle(300));
    let mut seen = 0;
    let failed = connection.open(&handle, |_, _, _, _| {
        seen += 1;
        if seen == 10 {
            other.dies();
        }
        Ok(())
    });
    assert!(matches!(failed, Err(OpenError::HungUp(_))), "{failed:?}");
    assert_eq!(seen, 64, "what had come was taken");
    let gone = Connection::to(&handle.exporter).err().unwrap();
    assert!(matches!(gone, OpenError::NoExporter), "{gone}");
    assert_eq!(gone.cuda(), CuResult::INVALID_VALUE);
}

#[test]
fn a_stopped_exporter_is_not_waited_for_forever() {
    let mut other = Other::start("files");
    let connection = other.connect();
    other.signal(Signal::SIGSTOP);
    other.has_stopped();
    let failed = open(&connection, &other.handle(3)).unwrap_err();
    assert!(matches!(failed, OpenError::Silence), "{failed}");
    assert_eq!(failed.cuda(), CuResult::MAP_FAILED);
    assert!(!failed.leaves_it_usable(), "its answer is still to come");
    other.signal(Signal::SIGCONT);
    other.works();
    drop(connection);
    other.has_lent(0);
}

#[test]
fn an_invalid_message_closes_the_connection() {
    let mut other = Other::start("files");
    let ask = Ask::new(RequestKind::Open, 3, other.handle.key, 0);
    let beyond = Ask::new(RequestKind::Open, 3, other.handle.key, u32::MAX);
    let good = bytemuck::bytes_of(&ask);
    let mut wrong = good.to_vec();
    wrong[12] = 9;
    for bytes in
        [&b"x"[..], &good[1..], &wrong, &[good, &[0]].concat(), &[7; 5000], bytemuck::bytes_of(&beyond)]
    {
        let hostile = other.hostile();
        send(hostile.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL).unwrap();
        assert!(hung_up(&hostile), "after {} B", bytes.len());
    }
    // A request must not carry descriptors.
    let gift = File::open("/dev/null").unwrap();
    for count in [1, MOST_DESCRIPTORS, MOST_DESCRIPTORS + 1, 253] {
        let hostile = other.hostile();
        nvshare::scm_rights::send(hostile.as_fd(), good, &vec![gift.as_fd(); count]).unwrap();
        assert!(hung_up(&hostile), "with {count} descriptors");
    }
    other.has_lent(0);
    other.works();
}

/// A peer that sends requests and receives no answers is disconnected, and others are served meanwhile.
#[test]
fn a_peer_that_receives_no_answers_is_disconnected() {
    let mut other = Other::start("files");
    let hostile = other.hostile();
    let ask = Ask::new(RequestKind::Open, 64, other.handle.key, 0);
    loop {
        match send(
            hostile.as_raw_fd(),
            bytemuck::bytes_of(&ask),
            MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
        ) {
            Ok(_) => {}
            // Its queue is full for now.
            Err(Errno::EAGAIN) => other.works(),
            Err(_) => break,
        }
    }
    drop(hostile);
    other.has_lent(0);
    other.works();
}

#[test]
fn connections_that_open_nothing_keep_no_other_out() {
    let mut other = Other::start("files");
    let first = other.connect();
    open(&first, &other.handle(2)).unwrap();
    let crowd: Vec<_> = (0..200).map(|_| other.hostile()).collect();
    other.works();
    assert!(hung_up(&crowd[0]), "those that came first make room");
    open(&first, &other.handle(3)).unwrap();
    other.has_lent(2);
}

/// A peer that floods an exporter must not fill its standard error, which may be a file.
#[test]
fn garbage_is_logged_a_few_times_and_counted() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut other = Other::start_with("files", Some(log.reopen().unwrap()));
    for _ in 0..1_000 {
        // Some are refused before they have sent anything.
        let _ = send(other.hostile().as_raw_fd(), b"garbage", MsgFlags::MSG_NOSIGNAL);
    }
    other.works();
    other.has_lent(0);
    let said = || std::fs::read_to_string(log.path()).unwrap();
    nvshare_test_support::Patience::seconds(20)
        .until("the rest is counted", || said().contains("not logged"));
    let lines = said()
        .lines()
        .filter(|line| line.contains("no request for GPU memory of this process: the connection is closed"))
        .count();
    assert!((1..=20).contains(&lines), "{lines} lines for 1000 messages");
}

/// Needs root, to change the user of one thread.
#[test]
fn another_user_is_refused_and_not_trusted() {
    if !nix::unistd::geteuid().is_root() {
        println!("not root: not tested");
        return;
    }
    let become_nobody = || {
        // SAFETY: the arguments are numbers; the raw system call changes only this thread.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, -1, 65534, -1) }, 0);
    };
    let mut other = Other::start("files");
    let (exporter, handle) = (other.handle.exporter, other.handle(3));
    let opened = std::thread::spawn(move || {
        become_nobody();
        Connection::to(&exporter).and_then(|connection| open(&connection, &handle))
    });
    let opened = opened.join().unwrap();
    // Only the connecting thread is another user; the exporter, root, closes the connection.
    assert!(matches!(opened, Err(OpenError::HungUp(_))), "{opened:?}");
    other.has_lent(0);
    // No request is sent to an exporter of another user.
    let stranger = Exporter::here().unwrap();
    let listening = std::thread::spawn(move || {
        become_nobody();
        server::open(&stranger).unwrap()
    });
    let _listener = listening.join().unwrap();
    let refused = Connection::to(&stranger).err().unwrap();
    assert!(matches!(refused, OpenError::OtherUser), "{refused}");
    assert_eq!(refused.cuda(), CuResult::INVALID_VALUE);
}

#[test]
fn a_forked_child_does_not_listen() {
    let mut other = Other::start("forks");
    let exporter = other.handle.exporter;
    drop(Connection::to(&exporter).unwrap());
    let child = Pid::from_raw(other.ask());
    other.dies();
    assert!(matches!(Connection::to(&exporter), Err(OpenError::NoExporter)), "the child listens");
    kill(child, None).expect("the child is alive");
}
