//! Who a client is, and whether it lives: pidfds, and start times against pids that are used again.

use nix::errno::Errno;
use nvshare::audit::Process;
use std::fs;
use std::os::fd::{FromRawFd, OwnedFd};

/// When a process started, in clock ticks since boot: field 22 of /proc/PID/stat.
pub fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, and may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

/// A descriptor that becomes readable when the process ends.
///
/// # Errors
/// ESRCH if there is no such process.
pub fn pidfd(pid: u32) -> nix::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers; what it returns is a new descriptor of ours, or an error.
    unsafe {
        let fd = nix::libc::syscall(nix::libc::SYS_pidfd_open, pid, 0);
        Errno::result(fd).map(|fd| OwnedFd::from_raw_fd(fd as i32))
    }
}

/// A descriptor for a process that is known from the page: `None` if that one is gone, whoever may have
/// its pid now.
pub fn reopen(process: Process) -> Option<OwnedFd> {
    let fd = pidfd(process.pid).ok()?;
    // In this order: as long as the descriptor's process lives, its pid is not used again.
    (started(process.pid)? == process.started).then_some(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_lives_and_another_of_its_pid_does_not() {
        let pid = std::process::id();
        let process = Process { pid, started: started(pid).unwrap() };
        assert!(reopen(process).is_some());
        assert!(reopen(Process { started: process.started + 1, ..process }).is_none());
        assert!(reopen(Process { pid: u32::MAX / 2, started: 1 }).is_none());
    }
}
