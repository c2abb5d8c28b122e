//! The pieces of nvshare on this machine: where they are, and a private arbiter to use them with.

use crate::Failure;
use nvshare::paths;
use nvshare::register;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Finds a file of ours: beside the running program, beside its test binaries' parent, or where packages
/// put libraries.
fn beside(name: &str) -> Option<PathBuf> {
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

/// The simulated GPU's libraries, beside this program.
///
/// # Errors
/// They are not built.
pub fn simulated_gpu() -> Result<(PathBuf, PathBuf), Failure> {
    let find = |name: &str| {
        beside(name).ok_or_else(|| {
            Failure::usage(format!(
                "the simulated GPU ({name}) is not beside this program: build it with `cargo build --release`"
            ))
        })
    };
    Ok((find("libsimcuda.so")?, find("libsimnvml.so")?))
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
    environment: &[(String, String)],
) -> Result<Option<Child>, Failure> {
    let (ready, write) = nix::unistd::pipe()
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
    keep_open(&mut command, &ready);
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

/// The arbiter outlives the pipe's other end: only the write end may pass on.
fn keep_open(command: &mut Command, read_end: &OwnedFd) {
    let read_end = read_end.as_raw_fd();
    // SAFETY: close is allowed between fork and exec, and the child has no other use for this descriptor.
    unsafe {
        command.pre_exec(move || {
            nix::libc::close(read_end);
            Ok(())
        })
    };
}

/// What the arbiter logs appears among this process's own messages, for as long as this process lives.
fn forward_log(child: &mut Child) {
    if let Some(stderr) = child.stderr.take() {
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                eprintln!("{line}");
            }
        });
    }
}
