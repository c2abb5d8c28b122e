//! Processes: pidfds, and start times, which tell a process from a later one with the same pid.

use nix::errno::Errno;
pub use nvshare::processes::started;
use nvshare::slot::Process;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A bit in the start time of a client whose process the arbiter cannot see. Instead of its start time the word then has the
/// time of its registration in ns, which is unique.
pub const UNSEEN: u64 = 1 << 63;

/// Whether a process has been killed or is exiting, so that its pidfd will report and its memory be free then. Not so a
/// process that has executed another program.
pub fn is_ending(pid: u32) -> bool {
    /// The kernel's `PF_EXITING`, in field 9 of /proc/PID/stat.
    const EXITING: u64 = 4;
    const KILL: u64 = 1 << (nix::libc::SIGKILL - 1);
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).ok();
    // `status` before `stat`: a process whose SIGKILL is no longer pending in the first is exiting in the second.
    let killed = read("status").and_then(|status| {
        let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:"))?;
        u64::from_str_radix(pending.trim(), 16).ok()
    });
    let Some(stat) = read("stat") else { return true };
    let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
    let state = fields.next();
    let flags: u64 = fields.nth(5).and_then(|flags| flags.parse().ok()).unwrap_or(0);
    killed.is_some_and(|pending| pending & KILL != 0)
        || flags & EXITING != 0
        || matches!(state, Some("Z" | "X"))
}

/// A descriptor that becomes readable when the process ends.
///
/// # Errors
/// ESRCH if there is no such process; EMFILE and the like.
pub fn pidfd(pid: u32) -> nix::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers; what it returns is a new descriptor of ours, or an error.
    unsafe {
        let fd = nix::libc::syscall(nix::libc::SYS_pidfd_open, pid, 0);
        Errno::result(fd).map(|fd| OwnedFd::from_raw_fd(fd as i32))
    }
}

/// Sends SIGKILL to the process of a pidfd, and to no other that may have its pid by now.
///
/// # Errors
/// ESRCH if it has ended, EPERM if this user may not.
pub fn kill(pidfd: &OwnedFd) -> nix::Result<()> {
    // SAFETY: pidfd_send_signal takes two integers, no information about the signal, and no flags.
    let result = unsafe {
        nix::libc::syscall(
            nix::libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            nix::libc::SIGKILL,
            std::ptr::null::<nix::libc::siginfo_t>(),
            0,
        )
    };
    Errno::result(result).map(drop)
}

/// A pidfd of a process that is known by pid and start time: `None` if it has ended, even if another has its pid now.
pub fn reopen(process: Process) -> Option<OwnedFd> {
    let fd = pidfd(process.pid).ok()?;
    // The descriptor first: as long as the descriptor's process lives, its pid is not used again.
    (started(process.pid)? == process.started).then_some(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_killed_is_ending_and_one_that_lives_is_not() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        assert!(!is_ending(child.id()) && !is_ending(std::process::id()));
        child.kill().unwrap();
        // From when the signal was sent, not only when the process is gone.
        assert!(is_ending(child.id()));
        child.wait().unwrap();
        assert!(is_ending(child.id()));
    }

    #[test]
    fn this_process_lives_and_another_of_its_pid_does_not() {
        let pid = std::process::id();
        let process = Process { pid, started: started(pid).unwrap() };
        assert!(reopen(process).is_some());
        assert!(reopen(Process { started: process.started + 1, ..process }).is_none());
        assert!(reopen(Process { pid: u32::MAX / 2, started: 1 }).is_none());
    }
}
