//! Who a process is, and whether it still lives.
//!
//! A process is a pid and the time it started, since pids are used again. Processes of other pid namespaces look dead
//! from here, so all users of one simulated GPU have to share one.

use std::fmt;

/// A process in one word: the pid above, 31 bits of its start time below. Never zero.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ProcessId(u64);

const START_BITS: u32 = 31;

impl ProcessId {
    /// The calling process.
    pub fn current() -> ProcessId {
        let pid = std::process::id();
        ProcessId::new(pid, start_time(pid).unwrap_or(0))
    }

    fn new(pid: u32, start: u64) -> ProcessId {
        ProcessId(u64::from(pid) << START_BITS | start & ((1 << START_BITS) - 1))
    }

    /// The process that has that word.
    pub fn from_bits(bits: u64) -> ProcessId {
        ProcessId(bits)
    }

    /// The word.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Its pid.
    pub fn pid(self) -> u32 {
        (self.0 >> START_BITS) as u32
    }

    /// Whether it lives. A killed process whose parent has not waited for it yet is dead.
    pub fn alive(self) -> bool {
        start_time(self.pid()).is_some_and(|start| ProcessId::new(self.pid(), start) == self)
    }
}

impl fmt::Debug for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.pid())
    }
}

/// When a process started, in clock ticks since boot; `None` if there is no such process, or only its remains.
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command may contain anything, but the last parenthesis ends it.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    match fields.next()? {
        "Z" | "X" | "x" => None,
        _ => fields.nth(18)?.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_killed_child_is_dead_before_it_is_waited_for() {
        assert!(ProcessId::current().alive());
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let id = ProcessId::new(child.id(), start_time(child.id()).unwrap());
        assert!(id.alive());
        child.kill().unwrap();
        let begin = std::time::Instant::now();
        while id.alive() {
            assert!(begin.elapsed().as_secs() < 10);
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(!id.alive());
    }
}
