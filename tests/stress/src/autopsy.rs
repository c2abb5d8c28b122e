//! What is shown of processes that are stuck.

use crate::children;
use nvshare_tools::status;
use std::path::Path;

/// The stacks of all threads of a process, if gdb is there and may look.
pub fn stacks(pid: u32) -> String {
    let commands = ["-batch", "-nx", "-ex", "set pagination off", "-ex", "thread apply all bt 24"];
    let output = children::command("gdb").args(["-p", &pid.to_string()]).args(commands).output();
    match output {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            let mut threads: Vec<String> = Vec::new();
            for line in text.lines() {
                match (line.starts_with("Thread "), line.starts_with('#'), threads.last_mut()) {
                    (true, ..) => threads.push(format!("  {line}\n")),
                    (_, true, Some(thread)) => thread.push_str(&format!("  {line}\n")),
                    _ => {}
                }
            }
            // Threads of the simulated GPU that wait for work say nothing.
            let is_idle = |thread: &&String| thread.contains("\"sim-stream") && thread.contains("Condvar");
            threads.iter().filter(|thread| !is_idle(thread)).map(String::as_str).collect()
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
