//! The device plugin as the kubelet meets it: a process beside a real arbiter and simulated GPUs, and a kubelet that the test plays.

mod common;

use common::{Kubelet, Machine, healthy};
use nvshare_e2e::application::{Application, MIB};
use nvshare_kubernetes::cdi::Spec;
use nvshare_kubernetes::device_plugin::protocol::{
    ContainerAllocateResponse, DevicePluginOptions, Empty, RegisterRequest,
};
use nvshare_tools::node::start_arbiter;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output};
use tonic::Code;

/// The GPU of this number on a machine whose UUIDs ascend.
fn uuid(devices: &BTreeMap<String, usize>, number: usize) -> String {
    devices.keys().nth(number).unwrap().clone()
}

#[tokio::test]
async fn it_registers_and_offers_each_gpu_ten_times() {
    let machine = Machine::new(2);
    let node = machine.arbiter();
    let mut kubelet = Kubelet::start(&machine.device_plugins());
    let plugin = machine.plugin(node.dir(), &[]);
    let options = DevicePluginOptions { pre_start_required: false, get_preferred_allocation_available: true };
    let expected = RegisterRequest {
        version: "v1beta1".into(),
        endpoint: "nvshare.com-gpu.sock".into(),
        resource_name: "nvshare.com/gpu".into(),
        options: Some(options),
    };
    assert_eq!(kubelet.registration().await, expected);
    let told = plugin.client().await.get_device_plugin_options(Empty {}).await.unwrap().into_inner();
    assert_eq!(told, options);
    let list = plugin.all_healthy().await;
    let ids: BTreeSet<_> = list.iter().map(|one| one.id.as_str()).collect();
    assert_eq!((list.len(), ids.len()), (20, 20));
    assert_eq!(healthy(&list).into_values().collect::<Vec<_>>(), [10, 10]);
}

#[tokio::test]
async fn it_registers_again_with_a_kubelet_that_has_started_anew() {
    let machine = Machine::new(1);
    let node = machine.arbiter();
    // The kubelet comes after the plugin, as after a reboot.
    let plugin = machine.plugin(node.dir(), &[]);
    plugin.says("waiting for the kubelet");
    let mut kubelet = Kubelet::start(&machine.device_plugins());
    kubelet.registration().await;
    let before = plugin.watch().await.next().await;
    for _ in 0..2 {
        let folder = kubelet.end();
        kubelet = Kubelet::start(&folder);
        kubelet.registration().await;
        assert_eq!(plugin.watch().await.next().await, before);
    }
    // Another kubelet's socket is in the place of the one before, and the plugin's is still there.
    let folder = kubelet.end();
    kubelet = Kubelet::take_over(&folder);
    kubelet.registration().await;
    // Somebody removes the socket, and the kubelet stays.
    fs::remove_file(machine.device_plugins().join("nvshare.com-gpu.sock")).unwrap();
    kubelet.registration().await;
    assert_eq!(plugin.watch().await.next().await, before);
}

#[tokio::test]
async fn its_own_restart_changes_nothing_of_what_it_answers() {
    let machine = Machine::new(2);
    let node = machine.arbiter();
    let mut kubelet = Kubelet::start(&machine.device_plugins());
    let mut answers = Vec::new();
    for _ in 0..2 {
        let plugin = machine.plugin(node.dir(), &[]);
        kubelet.registration().await;
        let list = plugin.watch().await.next().await;
        let answer = plugin.allocate(&[&list[3].id, &list[17].id]).await.unwrap();
        answers.push((list, answer));
        let (status, said) = plugin.end();
        assert!(status.success(), "{said}");
        assert!(!machine.device_plugins().join("nvshare.com-gpu.sock").exists(), "its socket is left behind");
        assert!(said.contains("given to a container"), "{said}");
    }
    assert_eq!(answers[0], answers[1]);
}

#[tokio::test]
async fn the_new_plugin_of_an_upgrade_takes_over_while_the_old_one_ends() {
    let machine = Machine::new(1);
    let node = machine.arbiter();
    let mut kubelet = Kubelet::start(&machine.device_plugins());
    let old = machine.plugin(node.dir(), &["--host-library-dir", "/opt/old"]);
    kubelet.registration().await;
    let new = machine.plugin(node.dir(), &["--host-library-dir", "/opt/new"]);
    kubelet.registration().await;
    old.says("this one steps back");
    let (status, said) = old.end();
    assert!(status.success(), "{said}");
    // The new one's socket has always been there, and so has its specification.
    assert!(!new.said().contains("the socket is gone"), "{}", new.said());
    assert!(!new.watch().await.next().await.is_empty());
    assert!(
        fs::read_to_string(machine.cdi().join("nvshare.com-client.json"))
            .unwrap()
            .contains("/opt/new/libnvshare.so")
    );
}

#[tokio::test]
async fn a_gpu_that_fails_is_offered_no_more() {
    let machine = Machine::new(3);
    let node = machine.arbiter();
    let mut kubelet = Kubelet::start(&machine.device_plugins());
    let plugin = machine.plugin(node.dir(), &[]);
    kubelet.registration().await;
    let mut lists = plugin.watch().await;
    let all = healthy(
        &lists.until("all are healthy", |list| healthy(list).values().all(|count| *count == 10)).await,
    );
    let count = |list: &[_], number| healthy(list)[&uuid(&all, number)];
    let id = |number| format!("{}::0", uuid(&all, number));

    machine.faults("1 lost");
    let list = lists.until("the lost one is unhealthy", |list| count(list, 1) == 0).await;
    assert_eq!((count(&list, 0), list.len()), (10, 30), "the others stay, and the list is whole");
    let refused = plugin.allocate(&[&id(1)]).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    for part in [&uuid(&all, 1), "fell off the bus", "nvidia-smi -r"] {
        assert!(refused.message().contains(part), "{}", refused.message());
    }
    plugin.allocate(&[&id(0)]).await.unwrap();
    machine.faults("");
    lists.until("it is back", |list| count(list, 1) == 10).await;

    // A program's own fault, then the GPU's. The driver tells them in this order.
    machine.faults("0 xid 31\n2 xid 79");
    let list = lists.until("the one with the error is unhealthy", |list| count(list, 2) == 0).await;
    assert_eq!(count(&list, 0), 10, "an illegal address in a program is no fault of the GPU");
    let refused = plugin.allocate(&[&id(2)]).await.unwrap_err();
    assert!(refused.message().contains("Xid 79"), "{}", refused.message());
    // The error is over, but nobody has mended the GPU.
    machine.faults("1 lost");
    let list = lists.until("another one is unhealthy", |list| count(list, 1) == 0).await;
    assert_eq!(count(&list, 2), 0);
}

#[tokio::test]
async fn without_the_shim_on_the_node_nothing_is_offered() {
    let machine = Machine::new(1);
    let node = machine.arbiter();
    let mut kubelet = Kubelet::start(&machine.device_plugins());
    let library = machine.dir.path().join("library");
    fs::create_dir(&library).unwrap();
    let plugin = machine.plugin(node.dir(), &["--host-library-dir", library.to_str().unwrap()]);
    kubelet.registration().await;
    let mut lists = plugin.watch().await;
    let all = |list: &[_], wanted| healthy(list).values().all(|count| *count == wanted);
    let list = lists.next().await;
    assert!(all(&list, 0), "{list:?}");
    let refused = plugin.allocate(&[&list[0].id]).await.unwrap_err();
    assert!(refused.message().contains("library/libnvshare.so is not there"), "{}", refused.message());
    fs::write(library.join("libnvshare.so"), "").unwrap();
    lists.until("it is there", |list| all(list, 10)).await;
}

#[tokio::test]
async fn while_nvml_hangs_nothing_is_offered() {
    let machine = Machine::new(2);
    let node = machine.arbiter();
    let mut kubelet = Kubelet::start(&machine.device_plugins());
    let plugin = machine.plugin(node.dir(), &["--nvml-timeout", "100ms"]);
    kubelet.registration().await;
    let mut lists = plugin.watch().await;
    let all = |list: &[_], wanted| healthy(list).values().all(|count| *count == wanted);
    let list = lists.until("all are healthy", |list| all(list, 10)).await;
    machine.faults("1 hang");
    lists.until("NVML hangs", |list| all(list, 0)).await;
    // The kubelet waits for the answer to every request.
    let refused = plugin.allocate(&[&list[0].id]).await.unwrap_err();
    assert!(refused.message().contains("NVML has not answered"), "{}", refused.message());
    machine.faults("");
    lists.until("NVML answers again", |list| all(list, 10)).await;
    plugin.allocate(&[&list[0].id]).await.unwrap();
}

/// An arbiter in this directory, which another one may have served before.
fn arbiter_in(machine: &Machine, dir: &Path) -> Child {
    let arguments = ["--capacity", "64MiB"].map(str::to_owned);
    start_arbiter(dir, &arguments, &machine.gpu.environment(&[]))
        .unwrap()
        .expect("no other arbiter serves there")
}

#[tokio::test]
async fn without_an_arbiter_nothing_is_offered() {
    let machine = Machine::new(2);
    let runtime = machine.dir.path().join("run");
    let mut kubelet = Kubelet::start(&machine.device_plugins());
    let plugin = machine.plugin(&runtime, &[]);
    kubelet.registration().await;
    let mut lists = plugin.watch().await;
    let all = |list: &[_], wanted| healthy(list).values().all(|count| *count == wanted);
    let list = lists.next().await;
    assert!(list.len() == 20 && all(&list, 0), "{list:?}");
    let id = list[0].id.clone();
    for _ in 0..2 {
        let refused = plugin.allocate(&[&id]).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        for part in ["no arbiter answers", "systemctl restart nvshare-arbiter", &id] {
            assert!(refused.message().contains(part), "{}", refused.message());
        }
        let mut arbiter = arbiter_in(&machine, &runtime);
        lists.until("the arbiter serves", |list| all(list, 10)).await;
        plugin.allocate(&[&id]).await.unwrap();
        arbiter.kill().unwrap();
        arbiter.wait().unwrap();
        lists.until("the arbiter has gone", |list| all(list, 0)).await;
    }
}

#[tokio::test]
async fn an_arbiter_that_starts_anew_is_waited_for() {
    let machine = Machine::new(1);
    let node = machine.arbiter();
    let mut kubelet = Kubelet::start(&machine.device_plugins());
    let plugin = machine.plugin(node.dir(), &["--arbiter-grace", "1h"]);
    kubelet.registration().await;
    let list = plugin.all_healthy().await;
    drop(node);
    // A container that comes now waits for the next arbiter, as every client does.
    plugin.allocate(&[&list[0].id]).await.unwrap();
}

/// Asks for one virtual GPU after another, as pods that come one by one, and follows the answers.
async fn come(plugin: &common::Plugin, free: &mut BTreeSet<String>, count: usize) -> Vec<String> {
    let mut gpus = Vec::new();
    for _ in 0..count {
        let chosen = plugin.preferred(free, 1).await;
        assert_eq!(chosen.len(), 1);
        assert!(free.remove(&chosen[0]), "{} is not available", chosen[0]);
        plugin.allocate(&[&chosen[0]]).await.unwrap();
        gpus.push(chosen[0].split("::").next().unwrap().to_owned());
    }
    gpus
}

#[tokio::test]
async fn eighty_pods_are_spread_over_eight_gpus() {
    let machine = Machine::new(8);
    let node = machine.arbiter();
    let mut kubelet = Kubelet::start(&machine.device_plugins());
    let plugin = machine.plugin(node.dir(), &[]);
    kubelet.registration().await;
    let list = plugin.all_healthy().await;
    let mut free: BTreeSet<_> = list.into_iter().map(|one| one.id).collect();
    let gpus = come(&plugin, &mut free, 80).await;
    let first: BTreeSet<_> = gpus[..8].iter().collect();
    assert_eq!(first.len(), 8, "two came to one GPU while another was empty: {gpus:?}");
    let mut counts: BTreeMap<&String, usize> = BTreeMap::new();
    gpus.iter().for_each(|gpu| *counts.entry(gpu).or_default() += 1);
    assert!(counts.values().all(|count| *count == 10), "{counts:?}");
    assert_eq!(plugin.preferred(&free, 1).await, Vec::<String>::new(), "there is none left");
}

#[tokio::test]
async fn a_pod_comes_to_the_gpu_that_is_least_loaded() {
    let machine = Machine::new(3);
    let node = machine.arbiter();
    let mut kubelet = Kubelet::start(&machine.device_plugins());
    let plugin = machine.plugin(node.dir(), &[]);
    kubelet.registration().await;
    let list = plugin.all_healthy().await;
    let all = healthy(&list);
    let mut free: BTreeSet<_> = list.into_iter().map(|one| one.id).collect();
    // Each GPU has a tenant. What they need differs from what their number says.
    assert_eq!(
        come(&plugin, &mut free, 3).await,
        (0..3).map(|number| uuid(&all, number)).collect::<Vec<_>>()
    );
    let mut tenants = Vec::new();
    for (device, mib) in [(0, 40), (1, 8), (2, 24)] {
        let mut tenant = Application::on(&node, device);
        tenant.alloc(mib * MIB);
        tenants.push(tenant);
    }
    assert_eq!(come(&plugin, &mut free, 1).await, [uuid(&all, 1)]);
    // A container that wants two gets two GPUs, and not twice the best one.
    let two: BTreeSet<_> =
        plugin.preferred(&free, 2).await.iter().map(|id| id.split("::").next().unwrap().to_owned()).collect();
    assert_eq!(two.len(), 2);
    assert!(!two.contains(&uuid(&all, 0)), "{two:?}");
}

fn envs(container: &ContainerAllocateResponse) -> BTreeMap<&str, &str> {
    container.envs.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
}

#[tokio::test]
async fn a_container_gets_cdi_devices_and_what_it_was_promised() {
    let machine = Machine::new(2);
    let node = machine.arbiter();
    let mut kubelet = Kubelet::start(&machine.device_plugins());
    let arguments = [
        "--memory-per-share",
        "8MiB",
        "--weight-per-share",
        "50",
        "--host-runtime-dir",
        "/run/on-host",
        "--host-library-dir",
        "/opt/nvshare",
    ];
    let plugin = machine.plugin(node.dir(), &arguments);
    kubelet.registration().await;
    let list = plugin.all_healthy().await;
    let (first, second) = (list[0].id.clone(), list[10].id.clone());
    let gpu = |id: &str| format!("nvidia.com/gpu={}", id.split("::").next().unwrap());

    let one = plugin.allocate(&[&first]).await.unwrap().container_responses.remove(0);
    let names: Vec<_> = one.cdi_devices.iter().map(|device| device.name.clone()).collect();
    assert_eq!(names, [gpu(&first), "nvshare.com/client=shared".into()]);
    assert_eq!(envs(&one), BTreeMap::from([("NVSHARE_MEMORY_LIMIT", "8MiB"), ("NVSHARE_WEIGHT", "50")]));
    assert_eq!((one.mounts.len(), one.devices.len()), (0, 0));

    // Two of one GPU and one of another: each GPU once, and so much as was asked for of the first.
    let three = plugin.allocate(&[&second, &list[1].id, &first]).await.unwrap().container_responses.remove(0);
    let names: Vec<_> = three.cdi_devices.iter().map(|device| device.name.clone()).collect();
    assert_eq!(names, [gpu(&first), gpu(&second), "nvshare.com/client=shared".into()]);
    assert_eq!(envs(&three)["NVSHARE_MEMORY_LIMIT"], "16MiB");

    // What the name leads the container runtime to.
    let spec: Spec =
        serde_json::from_str(&fs::read_to_string(machine.cdi().join("nvshare.com-client.json")).unwrap())
            .unwrap();
    assert_eq!((spec.kind.as_str(), spec.devices[0].name.as_str()), ("nvshare.com/client", "shared"));
    let edits = &spec.devices[0].container_edits;
    assert_eq!(
        edits.env,
        [
            "LD_PRELOAD=/opt/nvshare/libnvshare.so",
            "NVSHARE_RUNTIME_DIR=/run/on-host",
            "CUDA_MODULE_LOADING=LAZY"
        ]
    );
    for (mount, path) in edits.mounts.iter().zip(["/opt/nvshare", "/run/on-host"]) {
        assert_eq!((mount.host_path.to_str(), mount.container_path.to_str()), (Some(path), Some(path)));
        assert!(mount.options.contains(&"ro".to_owned()));
    }
}

#[tokio::test]
async fn a_container_runtime_without_cdi_gets_mounts_and_environment() {
    let machine = Machine::new(2);
    let node = machine.arbiter();
    let mut kubelet = Kubelet::start(&machine.device_plugins());
    let plugin =
        machine.plugin(node.dir(), &["--device-injection", "mounts", "--host-runtime-dir", "/run/on-host"]);
    kubelet.registration().await;
    let list = plugin.all_healthy().await;
    let container =
        plugin.allocate(&[&list[0].id, &list[10].id]).await.unwrap().container_responses.remove(0);
    assert_eq!(container.cdi_devices, []);
    let mounts: Vec<_> = container
        .mounts
        .iter()
        .map(|mount| (mount.host_path.as_str(), mount.container_path.as_str(), mount.read_only))
        .collect();
    assert_eq!(
        mounts,
        [("/usr/lib/nvshare", "/usr/lib/nvshare", true), ("/run/on-host", "/run/on-host", true)]
    );
    let uuids = healthy(&list).into_keys().collect::<Vec<_>>().join(",");
    let expected = [
        ("LD_PRELOAD", "/usr/lib/nvshare/libnvshare.so"),
        ("NVSHARE_RUNTIME_DIR", "/run/on-host"),
        ("CUDA_MODULE_LOADING", "LAZY"),
        ("NVIDIA_VISIBLE_DEVICES", uuids.as_str()),
    ];
    assert_eq!(envs(&container), BTreeMap::from(expected));
    assert!(!machine.cdi().exists(), "nobody would read a CDI specification");
}

#[tokio::test]
async fn requests_that_cannot_be_served_are_told_why() {
    let machine = Machine::new(1);
    let node = machine.arbiter();
    let mut kubelet = Kubelet::start(&machine.device_plugins());
    let plugin = machine.plugin(node.dir(), &["--shares", "4"]);
    kubelet.registration().await;
    let list = plugin.all_healthy().await;
    assert_eq!(list.len(), 4);
    let first = list[0].id.clone();
    let beyond = first.replace("::0", "::4");
    let stranger = "GPU-00000000-0000-0000-0000-00000000000f::0";
    let cases: [(&[&str], Code, &str); 5] = [
        (&[], Code::InvalidArgument, "request at least 1"),
        (&["gpu"], Code::NotFound, "'gpu' is not the name of a virtual GPU"),
        (&[stranger], Code::NotFound, "this node has no GPU GPU-00000000-0000-0000-0000-00000000000f"),
        (&[&beyond], Code::NotFound, "offered as 4 virtual ones"),
        (&[&first, &first], Code::InvalidArgument, "twice"),
    ];
    for (ids, code, part) in cases {
        let refused = plugin.allocate(ids).await.unwrap_err();
        assert_eq!(refused.code(), code, "{ids:?}: {}", refused.message());
        assert!(refused.message().contains(part), "{ids:?}: {}", refused.message());
    }
    plugin.says("refused to a container");
}

fn run(command: &mut Command) -> (Output, String) {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output, said)
}

#[test]
fn the_order_of_placement_can_be_printed() {
    let machine = Machine::new(2);
    let node = machine.arbiter();
    let mut tenant = Application::on(&node, 0);
    tenant.alloc(8 * MIB);
    let (output, said) = run(&mut machine.command(node.dir(), &["--print=json"]));
    assert!(output.status.success(), "{said}");
    let printed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let of = |place: usize| {
        (
            printed[place]["index"].as_u64(),
            printed[place]["tenants"].as_u64(),
            printed[place]["healthy"].as_bool(),
        )
    };
    assert_eq!(of(0), (Some(1), Some(0), Some(true)));
    assert_eq!(of(1), (Some(0), Some(1), Some(true)));
    assert_eq!(printed[1]["demand_bytes"].as_u64(), Some(10 * MIB), "8 MiB and the context");
    assert_eq!(printed[1]["pool_bytes"].as_u64(), Some(64 * MIB));
    drop(node);
    let nowhere = machine.dir.path().join("nowhere");
    let (output, said) = run(&mut machine.command(&nowhere, &["--print"]));
    assert!(output.status.success(), "{said}");
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("unhealthy") && table.contains("no arbiter answers"), "{table}");
}

#[test]
fn what_is_missing_on_the_node_is_said() {
    let machine = Machine::new(1);
    let runtime = machine.dir.path();
    let (output, said) = run(&mut machine.command(runtime, &["--nvml", "/nowhere/libnvidia-ml.so.1"]));
    assert!(!output.status.success());
    assert!(
        said.contains("NVML (/nowhere/libnvidia-ml.so.1) cannot be used") && said.contains("--nvml"),
        "{said}"
    );
    let (output, said) = run(&mut machine.command(runtime, &["--kubelet-dir", "/nowhere"]));
    assert!(!output.status.success());
    assert!(said.contains("/nowhere/device-plugins") && said.contains("--kubelet-dir"), "{said}");
}
