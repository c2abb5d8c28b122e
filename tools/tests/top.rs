//! `nvshare top` on a real pseudo terminal, beside real clients on the simulated GPU: what it shows, what its keys do, and that it
//! gives the terminal back however it ends.
//!
//! Needs the other parts beside the program: `cargo build --release --workspace` first.

use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nvshare::client::Bookkeeper;
use nvshare::wire::Hello;
use nvshare::{Session, paths, register};
use nvshare_test_support::Patience;
use nvshare_tools::node::{self, Node, SimulatedGpu, TempDir};
use nvshare_tools::status;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const TIMEOUT: Patience = Patience::seconds(30);

/// A program on a terminal of its own.
struct OnTerminal {
    child: Child,
    keys: Option<File>,
    /// The other end, to look at the terminal's modes.
    terminal: OwnedFd,
    screen: Arc<Mutex<vt100::Parser>>,
    /// Reads what the program writes, until it is told to end.
    reader: Option<std::thread::JoinHandle<()>>,
    closing: Arc<AtomicBool>,
}

/// A pseudo terminal of this size: its own end, and the one that programs get. No child of another test inherits them.
fn terminal(columns: u16, rows: u16) -> (OwnedFd, OwnedFd) {
    let mut name = [0; 64];
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the calls take a descriptor of this function's and places that are there.
    let (master, name) = unsafe {
        let master = libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC);
        assert!(master >= 0 && libc::grantpt(master) == 0 && libc::unlockpt(master) == 0);
        assert_eq!(libc::ptsname_r(master, name.as_mut_ptr(), name.len()), 0);
        assert_eq!(libc::ioctl(master, libc::TIOCSWINSZ, &size), 0);
        (OwnedFd::from_raw_fd(master), std::ffi::CStr::from_ptr(name.as_ptr()).to_str().unwrap().to_owned())
    };
    let slave = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(name).unwrap();
    (master, slave.into())
}

impl OnTerminal {
    fn start(mut command: Command, columns: u16, rows: u16) -> Self {
        let (master, slave) = terminal(columns, rows);
        let end = || slave.try_clone().unwrap();
        command.stdin(end()).stdout(end()).stderr(end()).env("TERM", "xterm-256color");
        // SAFETY: two system calls between fork and exec: a session of its own, whose terminal this is.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                if libc::ioctl(0, libc::TIOCSCTTY, 0) == 0 {
                    Ok(())
                } else {
                    Err(std::io::Error::last_os_error())
                }
            });
        }
        let child = command.spawn().unwrap();
        let screen = Arc::new(Mutex::new(vt100::Parser::new(rows, columns, 0)));
        let (mut output, shown) = (File::from(master.try_clone().unwrap()), screen.clone());
        let closing = Arc::new(AtomicBool::new(false));
        let closes = closing.clone();
        let reader = std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while !closes.load(Ordering::Relaxed) {
                match output.read(&mut bytes) {
                    Ok(count @ 1..) => shown.lock().unwrap().process(&bytes[..count]),
                    _ => break,
                }
            }
        });
        Self { child, keys: Some(File::from(master)), terminal: slave, screen, reader: Some(reader), closing }
    }

    fn shows(&self) -> String {
        self.screen.lock().unwrap().screen().contents()
    }

    /// Waits until the screen says so.
    fn says(&mut self, what: &str) {
        let mut ended = None;
        TIMEOUT.until(&format!("it shows {what:?}"), || {
            let shown = self.shows();
            ended = self.child.try_wait().unwrap();
            assert!(ended.is_none() || shown.contains(what), "{ended:?} without {what:?}:\n{shown}");
            shown.contains(what)
        });
    }

    fn press(&mut self, keys: &str) {
        self.keys.as_mut().unwrap().write_all(keys.as_bytes()).unwrap();
    }

    /// Closes the terminal's own end. The reader of its output sees that at the program's next output.
    fn close(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
        self.reader.take().unwrap().join().unwrap();
        self.keys = None;
    }

    /// Whether the terminal is as a shell wants it: lines, echo, the usual screen, the cursor.
    fn is_restored(&self) -> bool {
        // SAFETY: plain data, of which zero is a value.
        let mut modes: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: the terminal is open, and the place is there.
        assert_eq!(unsafe { libc::tcgetattr(self.terminal.as_raw_fd(), &mut modes) }, 0);
        let wanted = libc::ICANON | libc::ECHO | libc::ISIG;
        let screen = self.screen.lock().unwrap();
        modes.c_lflag & wanted == wanted
            && !screen.screen().alternate_screen()
            && !screen.screen().hide_cursor()
    }

    fn ends(&mut self) -> ExitStatus {
        let mut status = None;
        TIMEOUT.until("it ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A node with two clients that this process has; the second one waits for the first.
struct Busy {
    _gpu: SimulatedGpu,
    node: Node,
    clients: Vec<Session>,
}

impl Busy {
    fn new() -> Self {
        let set = |name: &'static str, value: &str| (name, value.to_owned());
        let gpu = SimulatedGpu::new(&[set("MEMORY", "256MiB")]).unwrap();
        let arguments = ["--capacity", "100MiB", "--quantum", "600s"].map(str::to_owned);
        let node = Node::start(gpu.environment(&[]), &arguments).unwrap();
        let uuid = status::read(node.dir()).unwrap().gpus[0].uuid.parse().unwrap();
        let client = |name: &str| {
            let hello = Hello::new(uuid, name);
            let client =
                register::register(&paths::socket(node.dir()), &hello, Duration::ZERO).unwrap().into_client();
            let keeper = Bookkeeper::new(client.books(), 1);
            let session = Session::start(client, keeper).unwrap();
            session.grow(40, || ()).unwrap();
            session
        };
        let clients = vec![client("train"), client("evil\x1b[31m\u{202e}name")];
        Self { _gpu: gpu, node, clients }
    }

    fn top(&self) -> Command {
        let mut command = Command::new(node::program().unwrap());
        command.args(["top", "--runtime-dir", self.node.dir().to_str().unwrap(), "--interval", "100ms"]);
        command
    }
}

#[test]
fn a_monitor_beside_real_clients_shows_them_obeys_keys_and_gives_the_terminal_back() {
    let busy = Busy::new();
    let pass = busy.clients[0].enter().unwrap();
    let waits = std::thread::scope(|scope| {
        let waiter = scope.spawn(|| busy.clients[1].enter().map(drop));
        let mut top = OnTerminal::start(busy.top(), 100, 30);
        top.says("train");
        top.says("evil?[31m?name");
        top.says("waits");
        top.says("1 run, 1 wait");
        assert!(!top.is_restored(), "it has the terminal");

        // The first client has another weight, and the table says so.
        top.press("\x1b[B");
        top.says("a train on GPU 0");
        top.press("w321\r");
        top.says("weight 321, priority normal");
        assert_eq!(status::read(busy.node.dir()).unwrap().gpus[0].clients[0].weight, 321);
        top.press("+");
        top.says("weight 321, priority high");

        // Only the other one, by its name, and then all again.
        top.press("/evil\r");
        TIMEOUT.until("the filter works", || {
            !top.shows().contains("b train") && top.shows().contains("only \"evil\"")
        });
        top.press("?");
        top.says("Whose client it is");
        top.press("x");
        top.says("q end");
        top.press("q");
        assert!(top.ends().success());
        TIMEOUT.until("the terminal is given back", || top.is_restored());
        drop(pass);
        waiter.join().unwrap()
    });
    waits.unwrap();
}

#[test]
fn signals_end_it_and_give_the_terminal_back() {
    let busy = Busy::new();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let mut top = OnTerminal::start(busy.top(), 80, 24);
        top.says("train");
        kill(Pid::from_raw(top.child.id() as i32), signal).unwrap();
        assert_eq!(top.ends().code(), Some(128 + signal as i32));
        TIMEOUT.until("the terminal is given back", || top.is_restored());
    }
}

/// Ctrl-Z: the shell has its terminal back, and the monitor goes on when the shell says so.
#[test]
fn a_stopped_monitor_has_given_the_terminal_back_and_takes_it_again() {
    let busy = Busy::new();
    let mut top = OnTerminal::start(busy.top(), 80, 24);
    top.says("train");
    top.press("\x1a");
    let pid = Pid::from_raw(top.child.id() as i32);
    let state = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    TIMEOUT.until("it is stopped", || state().contains(") T "));
    TIMEOUT.until("the terminal is given back", || top.is_restored());
    kill(pid, Signal::SIGCONT).unwrap();
    TIMEOUT.until("it has the terminal", || !top.is_restored());
    top.says("train");
    top.press("q");
    assert!(top.ends().success());
}

/// The window is closed, and no signal comes: the program sees it by itself.
#[test]
fn it_ends_when_its_terminal_is_closed() {
    let busy = Busy::new();
    let mut top = OnTerminal::start(busy.top(), 80, 24);
    top.says("train");
    top.close();
    top.ends();
}

#[test]
fn a_node_that_is_not_there_yet_is_waited_for() {
    let dir = TempDir::new().unwrap();
    let mut command = Command::new(node::program().unwrap());
    command.args(["top", "--interval", "100ms", "--runtime-dir"]).arg(dir.path());
    let mut top = OnTerminal::start(command, 80, 24);
    top.says("no arbiter has made a page here");
    top.press("\x03");
    assert!(top.ends().success());
}

fn output(command: &mut Command) -> Output {
    command.output().unwrap()
}

#[test]
fn its_figures_are_those_of_status() {
    let busy = Busy::new();
    drop(busy.clients[0].enter().unwrap());
    let json = |arguments: &[&str]| -> status::Node {
        let mut command = Command::new(node::program().unwrap());
        command.args(arguments).args(["--runtime-dir", busy.node.dir().to_str().unwrap()]);
        let output = output(&mut command);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    // What changes with the moment is left out; nothing else happens on this node.
    let still = |mut node: status::Node| {
        node.host_available_bytes = None;
        for gpu in &mut node.gpus {
            gpu.audits = 0;
            gpu.utilization = None;
            gpu.power_watts = None;
            gpu.switches.clear();
            gpu.clients.iter_mut().for_each(|client| client.charged_ns = 0);
        }
        node
    };
    let (top, status) = (still(json(&["top", "--once", "--json"])), still(json(&["status", "--json"])));
    assert_eq!(top, status);
    assert_eq!(top.gpus[0].clients.iter().map(|client| &*client.name).collect::<Vec<_>>()[0], "train");
    assert_eq!(top.gpus[0].clients[0].resident_bytes, 80 << 20);

    let once = output(busy.top().arg("--once").env("COLUMNS", "90"));
    let text = String::from_utf8(once.stdout).unwrap();
    assert!(once.status.success() && text.contains("train") && text.contains("80.0 MiB"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 90), "{text}");
    assert!(!text.contains('\x1b'), "{text}");
}

#[test]
fn json_is_a_line_for_each_reading_until_nobody_reads() {
    use std::io::{BufRead, BufReader};
    let busy = Busy::new();
    let mut stream = busy.top().arg("--json").stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(stream.stdout.take().unwrap()).lines();
    for _ in 0..3 {
        let node: status::Node = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        assert_eq!(node.gpus[0].clients.len(), 2);
    }
    drop(lines);
    assert_eq!(stream.wait().unwrap().code(), Some(141));
}

#[test]
fn without_a_terminal_it_says_what_to_do() {
    let busy = Busy::new();
    let refused = output(&mut busy.top());
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("nvshare top --once"), "{refused:?}");
    let dir = TempDir::new().unwrap();
    let link = dir.path().join("nvshare-top");
    std::os::unix::fs::symlink(node::program().unwrap(), &link).unwrap();
    let help = output(Command::new(&link).arg("--help"));
    let text = String::from_utf8(help.stdout).unwrap();
    assert!(
        text.contains("nvshare top --once --json") && text.lines().all(|line| line.len() <= 80),
        "{text}"
    );
    assert!(help.status.signal().is_none() && help.status.success());
}
