//! How much host memory this process may take, so that an allocation is refused now, instead of a
//! process being killed later.
//!
//! There are four bounds, and the tightest one applies: what the user set, what the process's own limits allow
//! (`RLIMIT_AS`, `RLIMIT_DATA`), what the control group still allows (v2 `memory.max` and v1
//! `memory.limit_in_bytes`, of the group and of every group above it), and what the machine has left
//! (`MemAvailable`). The last two are shared with other processes, so a reserve is subtracted from them.
//!
//! A group's usage includes the page cache, so a job that has read its data set may be at the limit for that
//! reason alone. The kernel drops such pages before it kills a process, so inactive page cache does not count here (nor
//! does it in Kubernetes' working set).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// A control group that limits memory, by an identifier that all of its processes compute alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group(pub(super) u16);

impl Group {
    /// From a number that identifies the group. Two groups may get the same identifier: then they subtract each other's
    /// promises and promise too little, which is safe.
    pub fn new(number: u64) -> Self {
        // Zero means no group.
        Self((number % u64::from(u16::MAX)) as u16 + 1)
    }
}

/// Who shares a bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharers {
    /// One pool of this process.
    Pool,
    /// The pools of this process: it has one for each GPU.
    Process,
    /// The processes of a control group.
    Group(Group),
    /// All processes of the machine.
    Machine,
}

/// One limit: bytes that may still be taken, and where the limit comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostLimits {
    /// Bytes left.
    pub bytes: u64,
    /// Who shares them.
    pub sharers: Sharers,
    /// Where the limit comes from, for messages.
    pub bound: String,
}

/// The least reserve that is left for other processes, in bytes; 5 % of the limit if that is more.
pub(super) const RESERVE: u64 = 256 << 20;

fn less_reserve(limit: u64, used: u64) -> u64 {
    limit.saturating_sub(used).saturating_sub(RESERVE.max(limit / 20))
}

/// A limit of cgroup v1 from this value on means "none": the kernel writes the largest multiple of a page.
const UNLIMITED: u64 = 1 << 62;

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

impl HostLimits {
    /// What the process's limits, the control groups and the machine leave, read below `root` (`/` except in tests).
    /// The groups are ordered from the process's own up to the root.
    pub fn probe(root: &Path) -> Vec<Self> {
        process(root).into_iter().chain(groups(root)).chain(machine(root)).collect()
    }
}

/// Bytes that are left below a limit of the process, for the application's own allocations and threads.
const OWN_RESERVE: u64 = 64 << 20;

/// What the limits of the process leave. `RLIMIT_DATA` counts private writable memory, so it counts this pool's.
fn process(root: &Path) -> Vec<HostLimits> {
    let read = |path| fs::read_to_string(root.join(path)).ok();
    let (Some(limits), Some(status)) = (read("proc/self/limits"), read("proc/self/status")) else {
        return Vec::new();
    };
    let left = |name: &str, field: &str, setting: &str| {
        let soft = limits.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?;
        let limit: u64 = soft.parse().ok()?;
        let used = status.lines().find_map(|line| line.strip_prefix(field))?.split_whitespace().next()?;
        let used = used.parse::<u64>().ok()?.checked_mul(1024)?;
        let bytes = limit.saturating_sub(used).saturating_sub(OWN_RESERVE);
        Some(HostLimits { bytes, sharers: Sharers::Process, bound: format!("the process's {setting}") })
    };
    [
        left("Max address space", "VmSize:", "RLIMIT_AS (ulimit -v)"),
        left("Max data size", "VmData:", "RLIMIT_DATA (ulimit -d)"),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn machine(root: &Path) -> Option<HostLimits> {
    let text = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
    };
    let (total, available) = (field("MemTotal:")?, field("MemAvailable:")?);
    Some(HostLimits {
        bytes: less_reserve(total, total.saturating_sub(available)),
        sharers: Sharers::Machine,
        bound: "the machine's free memory (MemAvailable)".into(),
    })
}

/// What each control group that limits memory leaves, from the process's own up to the root.
fn groups(root: &Path) -> Vec<HostLimits> {
    let Ok(text) = fs::read_to_string(root.join("proc/self/cgroup")) else { return Vec::new() };
    let mut left = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let (base, limit, usage, cache) = if controllers.is_empty() {
            ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
        } else if controllers.split(',').any(|name| name == "memory") {
            ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        } else {
            continue;
        };
        let base = root.join(base);
        // In a container the path may be that of the host, of which only the mount's root exists. A process outside the root of
        // its cgroup namespace sees `/../..`, which would lead out of the mount.
        let own: PathBuf =
            Path::new(path).components().filter(|part| matches!(part, Component::Normal(_))).collect();
        for group in own.ancestors().map(|part| base.join(part)) {
            let limit_bytes = number(&group.join(limit)).filter(|bytes| *bytes < UNLIMITED);
            if let Some(limit_bytes) = limit_bytes {
                let used = number(&group.join(usage)).unwrap_or(0);
                let used = used.saturating_sub(inactive(&group, cache));
                left.push(HostLimits {
                    bytes: less_reserve(limit_bytes, used),
                    sharers: Sharers::Group(named(&group)),
                    bound: format!("the control group's {}", group.join(limit).display()),
                });
            }
        }
    }
    left
}

/// The identifier of a group. Its path differs between namespaces, so it is made of the directory's inode and device.
fn named(group: &Path) -> Group {
    Group::new(fs::metadata(group).map_or(0, |directory| directory.ino() ^ directory.dev().rotate_left(32)))
}

/// Bytes of page cache that the kernel can drop at once.
fn inactive(group: &Path, name: &str) -> u64 {
    let Ok(text) = fs::read_to_string(group.join("memory.stat")) else { return 0 };
    let mut fields = text.lines().filter_map(|line| line.split_once(' '));
    fields.find(|(key, _)| *key == name).and_then(|(_, value)| value.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    const GIB: u64 = 1 << 30;

    /// The tightest bound.
    fn tightest(root: impl AsRef<Path>) -> HostLimits {
        let none = HostLimits { bytes: u64::MAX, sharers: Sharers::Process, bound: "nothing".into() };
        HostLimits::probe(root.as_ref()).into_iter().min_by_key(|limits| limits.bytes).unwrap_or(none)
    }

    fn tree(files: &[(&str, String)]) -> TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = root.path().join(path);
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
        let root = tree(&[meminfo(100 * GIB, 50 * GIB)]);
        assert_eq!(tightest(&root).bytes, 45 * GIB);
    }

    #[test]
    fn every_group_up_to_the_root_bounds_it() {
        let root = tree(&[
            meminfo(100 * GIB, 100 * GIB),
            ("proc/self/cgroup", "0::/pods/job\n".into()),
            ("sys/fs/cgroup/pods/job/memory.max", "max\n".into()),
            ("sys/fs/cgroup/pods/memory.max", (20 * GIB).to_string()),
            ("sys/fs/cgroup/pods/memory.current", (10 * GIB).to_string()),
        ]);
        let limits = tightest(&root);
        assert_eq!(limits.bytes, 9 * GIB);
        assert!(limits.bound.contains("pods/memory.max"), "{}", limits.bound);
    }

    #[test]
    fn the_first_version_of_control_groups_counts_too() {
        let root = tree(&[
            ("proc/self/cgroup", "5:cpu:/x\n4:memory:/job\n1:name=systemd:/job\n".into()),
            ("sys/fs/cgroup/memory/job/memory.limit_in_bytes", (8 * GIB).to_string()),
            ("sys/fs/cgroup/memory/job/memory.usage_in_bytes", (7 * GIB).to_string()),
        ]);
        assert_eq!(tightest(&root).bytes, GIB - 8 * GIB / 20);
    }

    #[test]
    fn the_group_itself_counts_when_it_is_tighter_than_those_above() {
        let root = tree(&[
            meminfo(100 * GIB, 100 * GIB),
            ("proc/self/cgroup", "0::/pods/job/step\n".into()),
            ("sys/fs/cgroup/pods/job/step/memory.max", (4 * GIB).to_string()),
            ("sys/fs/cgroup/pods/job/memory.max", (8 * GIB).to_string()),
            ("sys/fs/cgroup/pods/memory.max", "max\n".into()),
        ]);
        // 5 % of 4 GiB would be less than the least reserve.
        assert_eq!(tightest(&root).bytes, 4 * GIB - RESERVE);
    }

    #[test]
    fn a_container_sees_only_its_own_group_at_the_root_of_the_mount() {
        let root = tree(&[
            ("proc/self/cgroup", "0::/../../kubepods/elsewhere\n".into()),
            ("sys/fs/cgroup/memory.max", (40 * GIB).to_string()),
            ("sys/memory.max", GIB.to_string()),
        ]);
        assert_eq!(tightest(&root).bytes, 38 * GIB);
    }

    #[test]
    fn page_cache_is_not_in_the_way() {
        let root = tree(&[
            ("proc/self/cgroup", "0::/job\n".into()),
            ("sys/fs/cgroup/job/memory.max", (20 * GIB).to_string()),
            ("sys/fs/cgroup/job/memory.current", (19 * GIB).to_string()),
            ("sys/fs/cgroup/job/memory.stat", format!("anon 5\ninactive_file {}\nfile 7\n", 9 * GIB)),
        ]);
        assert_eq!(tightest(&root).bytes, 9 * GIB);
    }

    #[test]
    fn a_group_of_the_first_version_without_a_limit_bounds_nothing() {
        let root = tree(&[
            ("proc/self/cgroup", "4:memory:/\n".into()),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n".into()),
        ]);
        assert_eq!(tightest(&root).bytes, u64::MAX);
    }

    #[test]
    fn a_group_smaller_than_the_reserve_leaves_nothing() {
        let root = tree(&[
            ("proc/self/cgroup", "0::/job\n".into()),
            ("sys/fs/cgroup/job/memory.max", (200u64 << 20).to_string()),
        ]);
        assert_eq!(tightest(&root).bytes, 0);
    }

    #[test]
    fn garbage_bounds_nothing() {
        let root = tree(&[
            ("proc/self/cgroup", "::::\nfoo\n0::\n".into()),
            ("proc/meminfo", "MemTotal: lots".into()),
        ]);
        assert_eq!(tightest(&root).bytes, u64::MAX);
        assert_eq!(tightest(Path::new("/nowhere/at/all")).bytes, u64::MAX);
    }

    #[test]
    fn the_limits_of_the_process_bound_it_alone() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units\n\
                      Max data size             1073741824           unlimited            bytes\n\
                      Max address space         unlimited            unlimited            bytes\n";
        let root = tree(&[
            meminfo(100 * GIB, 100 * GIB),
            ("proc/self/limits", limits.into()),
            ("proc/self/status", "VmSize:\t 9000000 kB\nVmData:\t  524288 kB\n".into()),
        ]);
        let limits = tightest(&root);
        assert_eq!((limits.bytes, limits.sharers), (GIB / 2 - OWN_RESERVE, Sharers::Process));
        assert!(limits.bound.contains("RLIMIT_DATA"), "{}", limits.bound);
    }

    #[test]
    fn processes_in_different_places_name_a_group_alike() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let group = |of: &str, text: &str| {
            let files = [("proc/self/cgroup", text.to_owned())];
            for (path, content) in files {
                fs::create_dir_all(root.join(of).join(path).parent().unwrap()).unwrap();
                fs::write(root.join(of).join(path), content).unwrap();
            }
            let shared = root.join("pods/job");
            fs::create_dir_all(&shared).unwrap();
            fs::write(shared.join("memory.max"), GIB.to_string()).unwrap();
            let mount = root.join(of).join("sys/fs/cgroup");
            fs::create_dir_all(mount.parent().unwrap()).unwrap();
            let _ = std::os::unix::fs::symlink(if of == "host" { root } else { &shared }, &mount);
            HostLimits::probe(&root.join(of)).pop().expect("the group bounds it").sharers
        };
        // On the host by its whole path, in a container as the root of the mount.
        assert_eq!(group("host", "0::/pods/job\n"), group("container", "0::/\n"));
    }
}
