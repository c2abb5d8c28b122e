//! How much host memory this process may take, so that an allocation is refused in time instead of a
//! process killed too late.
//!
//! Three bounds, and the tightest one holds: what the user set, what the control group still allows (v2
//! `memory.max` and v1 `memory.limit_in_bytes`, of the group and of every group above it), and what the
//! machine has left (`MemAvailable`). The last two keep a reserve for everybody else.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes that may still be taken, and what sets the bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// Bytes left.
    pub bytes: u64,
    /// For a person: where the bound comes from.
    pub bound: String,
}

/// The least that is left for others, in bytes; 5 % of a bound if that is more.
const RESERVE: u64 = 256 << 20;

fn less_reserve(limit: u64, used: u64) -> u64 {
    limit.saturating_sub(used).saturating_sub(RESERVE.max(limit / 20))
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// What the machine and the control groups leave, read below `root` (`/` but in tests).
pub fn probe(root: &Path) -> Room {
    let machine = machine(root);
    groups(root)
        .into_iter()
        .chain(machine)
        .min_by_key(|room| room.bytes)
        .unwrap_or(Room { bytes: u64::MAX, bound: "nothing".into() })
}

fn machine(root: &Path) -> Option<Room> {
    let text = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
    };
    let (total, available) = (field("MemTotal:")?, field("MemAvailable:")?);
    Some(Room {
        bytes: less_reserve(total, total.saturating_sub(available)),
        bound: "the machine's free memory (MemAvailable)".into(),
    })
}

/// A room for each control group that limits memory, from the process's own up to the root.
fn groups(root: &Path) -> Vec<Room> {
    let Ok(text) = fs::read_to_string(root.join("proc/self/cgroup")) else { return Vec::new() };
    let mut rooms = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let (base, limit, usage) = if controllers.is_empty() {
            ("sys/fs/cgroup", "memory.max", "memory.current")
        } else if controllers.split(',').any(|name| name == "memory") {
            ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
        } else {
            continue;
        };
        let base = root.join(base);
        // In a container the path is the host's, and only the mount's root is there.
        let own = PathBuf::from(path.trim_start_matches('/'));
        for group in own.ancestors().map(|part| base.join(part)) {
            if let Some(limit_bytes) = number(&group.join(limit)) {
                let used = number(&group.join(usage)).unwrap_or(0);
                rooms.push(Room {
                    bytes: less_reserve(limit_bytes, used),
                    bound: format!("the control group's {}", group.join(limit).display()),
                });
            }
        }
    }
    rooms
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn tree(name: &str, files: &[(&str, String)]) -> PathBuf {
        let root = std::env::temp_dir().join(format!("nvshare-limits-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        for (path, content) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        root
    }

    fn meminfo(total: u64, available: u64) -> (&'static str, String) {
        ("proc/meminfo", format!("MemTotal: {} kB\nMemAvailable: {} kB\n", total >> 10, available >> 10))
    }

    #[test]
    fn the_machine_bounds_it() {
        let root = tree("machine", &[meminfo(100 * GIB, 50 * GIB)]);
        assert_eq!(probe(&root).bytes, 45 * GIB);
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn every_group_up_to_the_root_bounds_it() {
        let root = tree(
            "v2",
            &[
                meminfo(100 * GIB, 100 * GIB),
                ("proc/self/cgroup", "0::/pods/job\n".into()),
                ("sys/fs/cgroup/pods/job/memory.max", "max\n".into()),
                ("sys/fs/cgroup/pods/memory.max", (20 * GIB).to_string()),
                ("sys/fs/cgroup/pods/memory.current", (10 * GIB).to_string()),
            ],
        );
        let room = probe(&root);
        assert_eq!(room.bytes, 9 * GIB);
        assert!(room.bound.contains("pods/memory.max"), "{}", room.bound);
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn the_first_version_of_control_groups_counts_too() {
        let root = tree(
            "v1",
            &[
                ("proc/self/cgroup", "5:cpu:/x\n4:memory:/job\n1:name=systemd:/job\n".into()),
                ("sys/fs/cgroup/memory/job/memory.limit_in_bytes", (8 * GIB).to_string()),
                ("sys/fs/cgroup/memory/job/memory.usage_in_bytes", (7 * GIB).to_string()),
            ],
        );
        assert_eq!(probe(&root).bytes, GIB - 8 * GIB / 20);
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn garbage_bounds_nothing() {
        let root = tree(
            "garbage",
            &[("proc/self/cgroup", "::::\nfoo\n0::\n".into()), ("proc/meminfo", "MemTotal: lots".into())],
        );
        assert_eq!(probe(&root).bytes, u64::MAX);
        assert_eq!(probe(Path::new("/nowhere/at/all")).bytes, u64::MAX);
        fs::remove_dir_all(root).unwrap();
    }
}
