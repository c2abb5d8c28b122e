//! What /proc says of processes: by when one started it is told from a later one with the same pid, and pids mean something only
//! within their namespace.

use std::fs;
use std::os::unix::fs::MetadataExt;

/// When a process started, in clock ticks since boot: field 22 of /proc/PID/stat. `None` if there is no such process.
pub fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, and may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

/// The inode number of this process's pid namespace; 0 without /proc.
pub fn own_namespace() -> u64 {
    fs::metadata("/proc/self/ns/pid").map_or(0, |namespace| namespace.ino())
}
