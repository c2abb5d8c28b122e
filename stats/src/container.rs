//! In which container and pod a process runs, as far as its control group's path says it (`/proc/PID/cgroup`).
//!
//! The shapes are those of the kubelet's two drivers (cgroupfs and systemd) and of containerd, CRI-O, Docker and Podman. A process
//! in a pid namespace of its own sees other paths for itself; these are the paths as the host sees them.

/// What a control group's path says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Place {
    /// The container's id: 64 hexadecimal digits.
    pub container: Option<String>,
    /// The UID of the Kubernetes pod.
    pub pod: Option<String>,
}

/// Before a container's id in the name of a systemd scope.
const RUNTIMES: [&str; 5] = ["cri-containerd-", "crio-", "docker-", "libpod-", "containerd-"];

/// Reads the text of `/proc/PID/cgroup`: lines of `hierarchy:controllers:path`. The first line that names a container or a pod
/// counts, because control groups of version 1 have a line for each controller, and of some the path may be the root.
pub fn place(cgroup: &str) -> Place {
    let paths = cgroup.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let places: Vec<_> = paths.map(of_path).collect();
    let container = places.iter().find(|place| place.container.is_some());
    container.or_else(|| places.iter().find(|place| place.pod.is_some())).cloned().unwrap_or_default()
}

fn of_path(path: &str) -> Place {
    let mut found = Place::default();
    for part in path.split('/') {
        if let Some(pod) = pod(part) {
            // A pod's own group; what is above it is another node's, as where a cluster runs in containers.
            found = Place { container: None, pod: Some(pod) };
        }
        if let Some(container) = container(part) {
            found.container = Some(container);
        }
    }
    found
}

/// `podUID`, or `kubepods-burstable-podUID.slice` with underscores in the UID.
fn pod(part: &str) -> Option<String> {
    let part = part.split_once(".slice").map_or(part, |(name, _)| name);
    let uid = match part.strip_prefix("pod") {
        Some(uid) => uid,
        None => part.strip_prefix("kubepods")?.rsplit_once("-pod")?.1,
    };
    let uid = uid.replace('_', "-");
    // A UUID, or the hash of a static pod's manifest.
    let sensible =
        uid.len() >= 32 && uid.len() <= 36 && uid.bytes().all(|c| c.is_ascii_hexdigit() || c == b'-');
    sensible.then_some(uid)
}

/// The id alone, `RUNTIME-ID.scope`, or, with containerd's cgroupfs driver under systemd, `PREFIX:cri-containerd:ID`.
fn container(part: &str) -> Option<String> {
    let part = part.strip_suffix(".scope").unwrap_or(part);
    let part = part.rsplit_once(':').map_or(part, |(_, id)| id);
    let id = RUNTIMES.iter().find_map(|runtime| part.strip_prefix(runtime)).unwrap_or(part);
    (id.len() == 64 && id.bytes().all(|c| c.is_ascii_hexdigit())).then(|| id.to_owned())
}

/// What Kubernetes calls a container.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct KubernetesName {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod.
    pub pod: String,
    /// The container in it.
    pub container: String,
}

/// Where the kubelet has a link to each container's log, named `POD_NAMESPACE_CONTAINER-ID.log`: the only place on a node where
/// these names stand and that needs neither credentials nor a question to anybody.
pub const CONTAINER_LOGS: &str = "/var/log/containers";

/// Reads the name of such a link: the container's id, and what Kubernetes calls it. None of the names can hold an underscore.
pub fn kubernetes_name(link: &str) -> Option<(&str, KubernetesName)> {
    let mut parts = link.strip_suffix(".log")?.split('_');
    let (pod, namespace, rest) = (parts.next()?, parts.next()?, parts.next()?);
    let (container, id) = rest.rsplit_once('-')?;
    let whole = parts.next().is_none() && ![pod, namespace, container].contains(&"");
    let name = KubernetesName { namespace: namespace.into(), pod: pod.into(), container: container.into() };
    (whole && self::container(id).is_some()).then_some((id, name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: &str = "1f2d3c4b5a69788796a5b4c3d2e1f00112233445566778899aabbccddeeff001";
    const POD: &str = "0f3dbd6a-6b0e-4d3a-9d2c-2f4a1c7e8b90";

    fn found(cgroup: &str) -> (Option<String>, Option<String>) {
        let Place { container, pod } = place(
            &cgroup.replace("{ID}", ID).replace("{POD}", POD).replace("{POD_}", &POD.replace('-', "_")),
        );
        (container, pod)
    }

    #[test]
    fn a_container_and_its_pod_are_read_whatever_runs_it() {
        let both = (Some(ID.to_owned()), Some(POD.to_owned()));
        for cgroup in [
            // containerd and CRI-O, version 2, systemd driver.
            "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{POD_}.slice/cri-containerd-{ID}.scope\n",
            "0::/kubepods.slice/kubepods-pod{POD_}.slice/crio-{ID}.scope\n",
            "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{POD_}.slice/crio-{ID}.scope/container\n",
            // The cgroupfs driver.
            "0::/kubepods/besteffort/pod{POD}/{ID}\n",
            // Version 1: a line for each controller, of which some have nothing to say.
            "12:rdma:/\n11:memory:/kubepods/burstable/pod{POD}/{ID}\n1:name=systemd:/kubepods/burstable/pod{POD}/{ID}\n",
            "5:devices:/kubepods.slice/kubepods-pod{POD_}.slice/docker-{ID}.scope\n",
            "4:cpu:/system.slice/containerd.service/kubepods-burstable-pod{POD_}.slice:cri-containerd:{ID}\n",
            // A cluster in a container: the inner one is what runs.
            "0::/system.slice/docker-ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff.scope/kubelet/kubepods/pod{POD}/{ID}\n",
        ] {
            assert_eq!(found(cgroup), both, "{cgroup}");
        }
    }

    #[test]
    fn a_container_without_a_pod_is_one_too() {
        for cgroup in [
            "0::/system.slice/docker-{ID}.scope\n",
            "3:memory:/docker/{ID}\n0::/\n",
            "0::/machine.slice/libpod-{ID}.scope/container\n",
            "0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope\n",
        ] {
            assert_eq!(found(cgroup), (Some(ID.to_owned()), None), "{cgroup}");
        }
    }

    #[test]
    fn what_is_no_container_is_none() {
        for cgroup in [
            "0::/user.slice/user-1000.slice/session-3.scope\n",
            "0::/\n",
            "",
            "nonsense",
            "0::/system.slice/podman.service\n",
            "0::/docker/short\n",
            "0::/podcast/x\n",
        ] {
            assert_eq!(found(cgroup), (None, None), "{cgroup}");
        }
    }

    #[test]
    fn the_kubelets_links_name_pod_namespace_and_container() {
        let link = format!("train-7b9c_team-a_pytorch-main-{ID}.log");
        let (id, name) = kubernetes_name(&link).unwrap();
        assert_eq!(id, ID);
        let expected = ("team-a", "train-7b9c", "pytorch-main");
        assert_eq!((&*name.namespace, &*name.pod, &*name.container), expected);
        for other in ["x.log", "a_b_c-123.log", &format!("a_b_c_d-{ID}.log"), &format!("__c-{ID}.log")] {
            assert_eq!(kubernetes_name(other), None, "{other}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read(text: String) {
            let _ = (place(&text), kubernetes_name(&text));
        }
    }
}
