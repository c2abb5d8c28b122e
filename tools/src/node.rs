//! The pieces of nvshare on this machine: where they are, and a private arbiter to use them with.

use crate::Failure;
use crate::complain;
use nix::fcntl::{FcntlArg, FdFlag, OFlag};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::unistd::Pid;
use nvshare::paths;
use nvshare::register;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Finds a file of ours: beside the running program, beside its test binaries' parent, or where packages
/// put libraries.
pub fn beside(name: &str) -> Option<PathBuf> {
    let own = std::env::current_exe().ok()?;
    let dir = own.parent()?;
    [
        dir.join(name),
        dir.join("..").join(name),
        dir.join("../lib/nvshare").join(name),
        dir.join("../lib").join(name),
    ]
    .into_iter()
    .find(|path| path.is_file())
    .and_then(|path| path.canonicalize().ok())
}

/// The shim: $NVSHARE_LIBRARY, or beside this program.
///
/// # Errors
/// It is nowhere.
pub fn shim() -> Result<PathBuf, Failure> {
    if let Some(path) = std::env::var_os("NVSHARE_LIBRARY").map(PathBuf::from) {
        return if path.is_file() {
            Ok(path)
        } else {
            Err(Failure::usage(format!(
                "NVSHARE_LIBRARY='{}': no such file; it names libnvshare.so",
                path.display()
            )))
        };
    }
    beside("libnvshare.so").ok_or_else(|| {
        Failure::usage(
            "libnvshare.so is not beside this program nor in ../lib/nvshare: build it with `cargo build --release`, or name it in NVSHARE_LIBRARY",
        )
    })
}

/// The arbiter, beside this program or in $PATH.
fn arbiter() -> PathBuf {
    beside("nvshare-arbiter").unwrap_or_else(|| "nvshare-arbiter".into())
}

/// The simulated GPU's libraries: beside this program, or where packages put them, in a folder of their own.
///
/// # Errors
/// They are not built.
pub fn simulated_gpu() -> Result<(PathBuf, PathBuf), Failure> {
    let find = |name: &str| {
        beside(name).or_else(|| beside(&format!("simulated/{name}"))).ok_or_else(|| {
            Failure::usage(format!(
                "the simulated GPU ({name}) is not beside this program nor in ../lib/nvshare/simulated: the Debian package has it, and `cargo build --release` in nvshare's sources makes it"
            ))
        })
    };
    Ok((find("libsimcuda.so")?, find("libsimnvml.so")?))
}

/// The program `nvshare` itself, also when a test asks.
///
/// # Errors
/// It is not built.
pub fn program() -> Result<PathBuf, Failure> {
    std::env::current_exe()
        .ok()
        .filter(|path| path.file_name().is_some_and(|name| name == "nvshare"))
        .or_else(|| beside("nvshare"))
        .ok_or_else(|| {
            Failure::usage("nvshare is not beside this program: build it with `cargo build --release`")
        })
}

/// Whether an arbiter answers in this directory.
pub fn answers(dir: &Path) -> bool {
    register::dial(&paths::socket(dir), Duration::ZERO).is_ok()
}

/// Starts an arbiter of this process's own in `dir` and waits until clients can connect. It ends by
/// itself when this process has ended and its last client too. `None` if another one was faster.
///
/// # Errors
/// It does not start; the message is its own.
pub fn start_arbiter(
    dir: &Path,
    arguments: &[String],
    environment: &[(String, OsString)],
) -> Result<Option<Child>, Failure> {
    let (ready, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)
        .map_err(|error| Failure::with_status(1, format!("no pipe can be made: {error}")))?;
    let program = arbiter();
    let mut command = Command::new(&program);
    command
        .arg("--runtime-dir")
        .arg(dir)
        .args(["--exit-when-idle", "--owner-pid", &std::process::id().to_string()])
        .args(["--ready-fd", &write.as_raw_fd().to_string()])
        .args(arguments)
        .envs(environment.iter().cloned())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // Ctrl-C is for the program; its arbiter ends after it.
        .process_group(0);
    if std::env::var_os("NVSHARE_LOG").is_none() {
        command.env("NVSHARE_LOG", "warn");
    }
    pass_on(&mut command, &write);
    let mut child = command.spawn().map_err(|error| {
        Failure::usage(format!("the arbiter ({}) cannot be started: {error}", program.display()))
    })?;
    drop(write);
    let mut word = String::new();
    let _ = BufReader::new(File::from(ready)).read_line(&mut word);
    if word.trim() == "ready" {
        forward_log(&mut child);
        return Ok(Some(child));
    }
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        let _ = stderr.read_to_string(&mut said);
    }
    let _ = child.wait();
    // Several `nvshare run` at once each start one, and the directory's lock lets one of them serve.
    if register::dial(&paths::socket(dir), Duration::from_secs(2)).is_ok() {
        return Ok(None);
    }
    Err(Failure::usage(format!("the arbiter did not start: {}", said.trim())))
}

/// Lets the child, and no other program that starts meanwhile, inherit a descriptor.
pub(crate) fn pass_on(command: &mut Command, fd: &impl AsRawFd) {
    let fd = fd.as_raw_fd();
    // SAFETY: fcntl is allowed between fork and exec; the descriptor is open in the child, which has all of ours.
    unsafe {
        command.pre_exec(move || {
            let fd = BorrowedFd::borrow_raw(fd);
            nix::fcntl::fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
            Ok(())
        })
    };
}

/// What the arbiter logs appears among this process's own messages, for as long as this process lives.
fn forward_log(child: &mut Child) {
    if let Some(stderr) = child.stderr.take() {
        // A thread begins with its maker's mask. Signals are for whoever waits for them: one that came to this thread
        // would kill the process, or, a SIGCHLD, be lost.
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                complain!("{line}");
            }
        });
        let _ = before.and_then(|before| before.thread_set_mask());
    }
}

/// Environment variables for a program.
pub type Environment = Vec<(String, OsString)>;

/// The same environment for programs that are to run without nvshare, also where /etc/ld.so.preload names the shim.
pub fn natively(mut environment: Environment) -> Environment {
    environment.push(("NVSHARE_DISABLE".into(), "1".into()));
    environment
}

/// A directory of this process's own, gone when dropped.
#[derive(Debug)]
pub struct TempDir(PathBuf);

impl TempDir {
    /// Makes one.
    ///
    /// # Errors
    /// The system's.
    pub fn new() -> Result<Self, Failure> {
        let template = std::env::temp_dir().join("nvshare-XXXXXX");
        nix::unistd::mkdtemp(&template).map(Self).map_err(|error| {
            Failure::with_status(1, format!("no directory can be made as {}: {error}", template.display()))
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A simulated GPU of this process's own: programs that get its [environment](Self::environment) find it as
/// `libcuda.so.1` and `libcuda.so`. Gone when dropped.
#[derive(Debug)]
pub struct SimulatedGpu {
    libraries: TempDir,
    name: String,
    settings: Vec<(&'static str, String)>,
}

impl SimulatedGpu {
    /// Makes one. The settings are variables of the simulated GPU without `NVSHARE_SIM_`, such as `MEMORY`.
    ///
    /// # Errors
    /// The simulated GPU is not built.
    pub fn new(settings: &[(&'static str, String)]) -> Result<Self, Failure> {
        let (cuda, nvml) = simulated_gpu()?;
        let libraries = TempDir::new()?;
        // Some programs try libcuda.so before libcuda.so.1, and with a real driver they would find that one's.
        let links = [(&cuda, "libcuda.so.1"), (&cuda, "libcuda.so"), (&nvml, "libnvidia-ml.so.1")];
        for (library, link) in links {
            std::os::unix::fs::symlink(library, libraries.path().join(link))
                .map_err(|error| Failure::with_status(1, format!("{}: {error}", library.display())))?;
        }
        // With the directory's name, because a process that was killed leaves its GPU, and its pid comes again.
        let unique = libraries.path().file_name().unwrap_or_default().to_string_lossy();
        let name = format!("nvshare-{}-{unique}", std::process::id());
        Ok(Self { libraries, name, settings: settings.to_vec() })
    }

    /// For programs that are to find it. `other` replaces settings.
    pub fn environment(&self, other: &[(&'static str, String)]) -> Environment {
        let mut path = OsString::from(self.libraries.path());
        if let Some(before) = std::env::var_os("LD_LIBRARY_PATH").filter(|value| !value.is_empty()) {
            path.push(":");
            path.push(before);
        }
        let settings = self.settings.iter().chain(other);
        let mut environment: Environment =
            settings.map(|(name, value)| (format!("NVSHARE_SIM_{name}"), value.into())).collect();
        environment.push(("NVSHARE_SIM_NAME".into(), self.name.clone().into()));
        environment.push(("LD_LIBRARY_PATH".into(), path));
        environment
    }
}

impl Drop for SimulatedGpu {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(Path::new("/dev/shm").join(&self.name));
    }
}

/// A private arbiter in a directory of its own, and how programs become its clients. Both gone when dropped.
#[derive(Debug)]
pub struct Node {
    dir: TempDir,
    arbiter: Child,
    gpu: Environment,
    shim: PathBuf,
}

impl Node {
    /// Starts an arbiter with these arguments, on the GPU that this environment leads to: a simulated one's, or
    /// nothing for the machine's own.
    ///
    /// # Errors
    /// A part is not built, or the arbiter does not start; the message is its own.
    pub fn start(gpu: Environment, arguments: &[String]) -> Result<Self, Failure> {
        let shim = shim()?;
        let dir = TempDir::new()?;
        let arbiter = start_arbiter(dir.path(), arguments, &gpu)?
            .ok_or_else(|| Failure::with_status(1, "somebody else's arbiter is in a directory just made"))?;
        Ok(Self { dir, arbiter, gpu, shim })
    }

    /// Its runtime directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The arbiter's pid.
    pub fn arbiter_pid(&self) -> u32 {
        self.arbiter.id()
    }

    /// For programs that are to be its clients.
    pub fn environment(&self) -> Environment {
        let mut environment = self.gpu.clone();
        environment.extend([
            ("LD_PRELOAD".into(), self.shim.clone().into()),
            // Whatever this command's own environment says.
            ("NVSHARE_DISABLE".into(), "0".into()),
            (paths::RUNTIME_DIR.into(), self.dir().into()),
            ("CUDA_MODULE_LOADING".into(), "LAZY".into()),
        ]);
        environment
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = nix::sys::signal::kill(Pid::from_raw(self.arbiter.id() as i32), Signal::SIGTERM);
        let _ = self.arbiter.wait();
    }
}
