//! Processes that do not outlive this one.

use nix::errno::Errno;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{getpid, getppid};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// A command whose process the kernel kills when this process ends, however it ends: a supervisor that is killed runs no
/// destructor. The kernel goes by the thread that starts the process, so that must be the main thread.
pub fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    let supervisor = getpid();
    // SAFETY: both are plain system calls, allowed between fork and exec.
    unsafe {
        command.pre_exec(move || {
            set_pdeathsig(Signal::SIGKILL)?;
            // It may have ended before it could be waited for.
            if getppid() == supervisor { Ok(()) } else { Err(Errno::ESRCH.into()) }
        })
    };
    command
}
