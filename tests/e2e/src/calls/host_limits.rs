//! What the process may have of the host's memory. No call of CUDA's.

use super::{Answer, Caller};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nvshare_tools::Failure;

/// Bytes of private writable memory that the process has.
fn data() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmData:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) << 10
}

impl Caller {
    pub(super) fn host_limits(&mut self, name: &str, numbers: &[u64]) -> Result<Option<Answer>, Failure> {
        let soft = match (name, numbers) {
            // So many bytes of private memory more, and no further.
            ("leave", [bytes]) => data() + bytes,
            ("unlimit", []) => nix::libc::RLIM_INFINITY,
            _ => return Ok(None),
        };
        let limits = getrlimit(Resource::RLIMIT_DATA);
        let set = limits.and_then(|(_, hard)| setrlimit(Resource::RLIMIT_DATA, soft.min(hard), hard));
        Ok(Some(set.map_or_else(|error| (error as i32, error.to_string()), |()| (0, String::new()))))
    }
}
