//! What the system says of a client's process: whose it is, and in which container it runs. Read once for each process.

use crate::container::{self, CONTAINER_LOGS, KubernetesName};
use nix::unistd::{Uid, User};
pub use nvshare::processes::started;
use nvshare::slot::Process;
use nvshare::sync::now;
use nvshare::units::{Nanos, SECOND};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What is known of a client's process beside what stands in the page.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProcessInfo {
    /// The user whose process it is.
    pub uid: Option<u32>,
    /// That user's name.
    pub user: Option<String>,
    /// The container's id, and the pod's UID.
    pub place: container::Place,
    /// What Kubernetes calls pod and container.
    pub kubernetes: Option<KubernetesName>,
}

/// Processes that were looked at. `/proc` is read once for each process. The kubelet's names of a container are looked for until
/// they are found.
pub struct Processes {
    known: HashMap<Process, ProcessInfo>,
    users: HashMap<u32, Option<String>>,
    logs: PathBuf,
    /// Of the containers that the kubelet's folder had when it was last read.
    names: HashMap<String, KubernetesName>,
    /// When it may be read again, ns.
    names_again: Nanos,
}

impl Default for Processes {
    fn default() -> Self {
        Self::with_container_logs(Path::new(CONTAINER_LOGS))
    }
}

/// Between two readings of the kubelet's folder, ns.
const NAMES_INTERVAL: Nanos = 10 * SECOND;

impl Processes {
    /// With another folder in the place of [`CONTAINER_LOGS`].
    pub fn with_container_logs(logs: &Path) -> Self {
        let (known, users, names) = Default::default();
        Self { known, users, logs: logs.to_owned(), names, names_again: 0 }
    }

    /// What is known of a process. Nothing, if it is not seen from here: it has ended, or its pid is of another pid namespace.
    pub fn look(&mut self, process: Process) -> ProcessInfo {
        if !self.known.contains_key(&process) {
            let info = self.read(process).unwrap_or_default();
            self.known.insert(process, info);
        }
        let mut info = self.known[&process].clone();
        if info.kubernetes.is_none()
            && info.place.pod.is_some()
            && let Some(id) = &info.place.container
        {
            info.kubernetes = self.kubernetes_name(id);
            self.known.insert(process, info.clone());
        }
        info
    }

    /// Forgets all processes but these.
    pub fn keep(&mut self, mut alive: impl FnMut(&Process) -> bool) {
        self.known.retain(|process, _| alive(process));
    }

    fn read(&mut self, process: Process) -> Option<ProcessInfo> {
        let read = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", process.pid)).ok();
        let uid = read("status").as_deref().and_then(real_uid);
        let place = read("cgroup").map(|text| container::place(&text)).unwrap_or_default();
        // Afterwards, so that what was read is of this process and of no other with its pid.
        if started(process.pid)? != process.started {
            return None;
        }
        let user = uid.and_then(|uid| self.user(uid));
        Some(ProcessInfo { uid, user, place, kubernetes: None })
    }

    fn user(&mut self, uid: u32) -> Option<String> {
        let lookup = |uid| User::from_uid(Uid::from_raw(uid)).ok().flatten().map(|user| user.name);
        self.users.entry(uid).or_insert_with(|| lookup(uid)).clone()
    }

    fn kubernetes_name(&mut self, id: &str) -> Option<KubernetesName> {
        if !self.names.contains_key(id) && now() >= self.names_again {
            self.names_again = now().saturating_add(NAMES_INTERVAL);
            let links = fs::read_dir(&self.logs).into_iter().flatten().flatten();
            let names = links.filter_map(|link| {
                let link = link.file_name();
                container::kubernetes_name(link.to_str()?).map(|(id, name)| (id.to_owned(), name))
            });
            self.names = names.collect();
        }
        self.names.get(id).cloned()
    }
}

/// The first of the four numbers behind `Uid:` in /proc/PID/status. (Whose the folder /proc/PID is says something else of a
/// process that may not be looked into: root.)
fn real_uid(status: &str) -> Option<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Process {
        let pid = std::process::id();
        Process { pid, started: started(pid).unwrap() }
    }

    #[test]
    fn a_process_is_known_by_its_user_and_another_of_its_pid_is_not() {
        let mut processes = Processes::default();
        let uid = nix::unistd::getuid();
        let info = processes.look(own());
        assert_eq!(info.uid, Some(uid.as_raw()));
        assert_eq!(info.user, User::from_uid(uid).unwrap().map(|user| user.name));
        let other = Process { started: own().started + 1, ..own() };
        assert_eq!(processes.look(other), ProcessInfo::default());
        processes.keep(|process| *process == own());
        assert_eq!(processes.known.len(), 1);
    }

    #[test]
    fn a_pods_name_is_found_when_the_kubelet_has_written_it() {
        let logs = tempfile::tempdir().unwrap();
        let id = "a1".repeat(32);
        let process = Process { pid: 1, started: 1 };
        let place = container::Place { container: Some(id.clone()), pod: Some("u".repeat(36)) };
        let mut processes = Processes::with_container_logs(logs.path());
        processes.known.insert(process, ProcessInfo { place, ..ProcessInfo::default() });
        assert_eq!(processes.look(process).kubernetes, None);
        std::fs::write(logs.path().join(format!("train_team-a_main-{id}.log")), []).unwrap();
        processes.names_again = 0;
        let name = processes.look(process).kubernetes.unwrap();
        assert_eq!((&*name.namespace, &*name.pod, &*name.container), ("team-a", "train", "main"));
    }
}
