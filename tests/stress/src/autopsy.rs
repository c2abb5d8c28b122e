//! What is shown of processes that are stuck.

use nvshare_tools::status;
use std::path::Path;
use std::process::Command;

/// The stacks of all threads of a process, if gdb is there and may look.
pub fn stacks(pid: u32) -> String {
    let commands = ["-batch", "-nx", "-ex", "set pagination off", "-ex", "thread apply all bt 24"];
    let output = Command::new("gdb").args(["-p", &pid.to_string()]).args(commands).output();
    match output {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            let interesting = |line: &&str| line.starts_with("Thread ") || line.starts_with('#');
            text.lines().filter(interesting).map(|line| format!("  {line}\n")).collect()
        }
        Err(error) => format!("  gdb: {error}\n"),
    }
}

/// What the pages say, as `nvshare status --json` does.
pub fn status(dir: &Path) -> String {
    match status::read(dir) {
        Ok(node) => serde_json::to_string(&node).unwrap_or_else(|error| error.to_string()),
        Err(failure) => failure.message,
    }
}

/// The last lines of a file.
pub fn tail(path: &Path, lines: usize) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].iter().map(|line| format!("  {line}\n")).collect()
}
