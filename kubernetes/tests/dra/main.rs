//! The driver for dynamic resource allocation as the API server and the kubelet meet it. The tests play both, over the driver's real
//! sockets; a scheduler that takes the first device that fits allocates.

mod api_server;
mod kubelet;

use api_server::{ApiServer, DRIVER, Listening, NODE, allocated};
use clap::Parser;
use kubelet::{Kubelet, registration_socket};
use nvshare_kubernetes::Error;
use nvshare_kubernetes::dra;
use nvshare_kubernetes::dra::kubelet::{dra_v1beta1, health_v1, health_v1alpha1};
use nvshare_kubernetes::inventory::{Gpu, Health, Load};
use nvshare_kubernetes::options::{Cli, Command};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

/// Waits for what must happen.
async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future)
        .await
        .unwrap_or_else(|_| panic!("still not: {what}"))
}

const GIB: u64 = 1 << 30;

fn gpu(index: u32) -> Gpu {
    Gpu {
        uuid: format!("GPU-00000000-0000-0000-0000-{index:012}"),
        index,
        model: "NVIDIA T4".into(),
        memory: 14 * GIB,
        numa_node: None,
        health: Health::Healthy,
        load: Load::default(),
    }
}

fn device(index: u32) -> String {
    gpu(index).uuid.to_lowercase()
}

fn busy(tenants: u32, busy: f64) -> Load {
    Load { tenants, demand: u64::from(tenants) << 30, waiting: Duration::ZERO, busy }
}

/// A node: its folders, its GPUs, its API server.
struct Machine {
    folder: tempfile::TempDir,
    gpus: watch::Sender<Vec<Gpu>>,
    api: ApiServer,
}

/// A driver that runs, until it goes.
struct Driver {
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), Error>>,
    _listening: Listening,
}

impl Driver {
    /// Ends it in an orderly way.
    async fn end(mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        within("the driver ends", self.task).await.unwrap().unwrap();
    }
}

impl Machine {
    fn new(gpus: u32) -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            gpus: watch::Sender::new((0..gpus).map(gpu).collect()),
            api: ApiServer::new(),
        }
    }

    fn kubelet_dir(&self) -> PathBuf {
        self.folder.path().join("kubelet")
    }

    fn cdi_dir(&self) -> PathBuf {
        self.folder.path().join("cdi")
    }

    fn change(&self, index: usize, how: impl FnOnce(&mut Gpu)) {
        self.gpus.send_modify(|gpus| how(&mut gpus[index]));
    }

    async fn driver(&self, more: &[&str]) -> Driver {
        let (kubelet, cdi) = (self.kubelet_dir(), self.cdi_dir());
        let folders = ["--kubelet-dir", kubelet.to_str().unwrap(), "--cdi-dir", cdi.to_str().unwrap()];
        let usual =
            ["nvshare-kubernetes", "dra-driver", "--node-name", NODE, "--host-runtime-dir", "/run/host"];
        let Command::DraDriver(options) = Cli::parse_from(usual.iter().chain(&folders).chain(more)).command
        else {
            panic!("that is what was asked for")
        };
        let (client, listening) = self.api.listen().await;
        let (stop, stopped) = oneshot::channel();
        let ended = async {
            let _ = stopped.await;
        };
        let task = tokio::spawn(dra::serve(options, client, self.gpus.subscribe(), ended));
        Driver { stop: Some(stop), task, _listening: listening }
    }

    async fn kubelet(&self) -> Kubelet {
        Kubelet::register(&self.kubelet_dir()).await
    }

    /// The CDI specifications of claims, by the names of their files.
    fn specs(&self) -> BTreeMap<String, Value> {
        let entries = std::fs::read_dir(self.cdi_dir()).into_iter().flatten().flatten();
        let specs = entries.filter_map(|entry| match std::fs::read(entry.path()) {
            Ok(text) => {
                Some((entry.file_name().into_string().unwrap(), serde_json::from_slice(&text).unwrap()))
            }
            // The driver removes them meanwhile.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => panic!("{}: {error}", entry.path().display()),
        });
        specs.collect()
    }

    /// How often the devices that are there were given.
    fn given(&self) -> BTreeMap<usize, usize> {
        let mut given = BTreeMap::new();
        for device in self.api.claimed() {
            *given.entry(device).or_default() += 1;
        }
        given
    }
}

/// The variables of the only device of a specification.
fn variables(spec: &Value, device: usize) -> BTreeMap<String, String> {
    let env = spec["devices"][device]["containerEdits"]["env"].as_array().unwrap();
    let split = |line: &Value| {
        line.as_str().unwrap().split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()))
    };
    env.iter().filter_map(split).collect()
}

fn config(fields: Value) -> Value {
    let mut parameters = json!({"apiVersion": "nvshare.com/v1", "kind": "ClientConfig"});
    parameters.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    json!([{"source": "FromClaim", "requests": [], "opaque": {"driver": DRIVER, "parameters": parameters}}])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_registers_and_publishes_its_gpus() {
    let machine = Machine::new(2);
    machine.change(0, |gpu| gpu.load = busy(1, 0.9));
    let _driver = machine.driver(&[]).await;
    let kubelet = machine.kubelet().await;
    let endpoint = machine.kubelet_dir().join("plugins/gpu.nvshare.com/dra.sock");
    assert_eq!(kubelet.info.endpoint, endpoint.to_str().unwrap());
    assert_eq!(
        kubelet.info.supported_versions,
        ["v1.DRAPlugin", "v1beta1.DRAPlugin", "v1.DRAResourceHealth", "v1alpha1.DRAResourceHealth"]
    );
    let devices = machine.api.until_order(&[1, 0]).await;
    assert!(devices.iter().all(|device| device["allowMultipleAllocations"] == true), "{devices:?}");
    let slices = machine.api.slices();
    let owner = &slices[0]["metadata"]["ownerReferences"][0];
    assert_eq!((&owner["kind"], &owner["uid"]), (&json!("Node"), &json!("node-uid")));
    assert_eq!(slices[0]["spec"]["pool"], json!({"name": NODE, "generation": 1, "resourceSliceCount": 1}));
    assert_eq!((slices.len(), machine.api.writes()), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_order_follows_the_load_and_nothing_is_written_without_need() {
    let machine = Machine::new(3);
    let _driver = machine.driver(&["--reorder-interval", "0s"]).await;
    machine.api.until_order(&[0, 1, 2]).await;
    machine.change(0, |gpu| gpu.load = busy(2, 0.9));
    machine.api.until_order(&[1, 2, 0]).await;
    let writes = machine.api.writes();
    // A change that changes no order, and one that does: the second one's write is the next.
    machine.change(0, |gpu| gpu.load.busy = 0.91);
    machine.change(1, |gpu| gpu.load = busy(1, 0.1));
    machine.api.until_order(&[2, 1, 0]).await;
    assert_eq!(machine.api.writes(), writes + 1);
    assert_eq!(machine.api.slices()[0]["spec"]["pool"]["generation"], 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slices_that_somebody_deletes_or_changes_are_made_anew() {
    let machine = Machine::new(1);
    let _driver = machine.driver(&[]).await;
    machine.api.until_order(&[0]).await;
    machine.api.delete_slices();
    machine.api.until_order(&[0]).await;
    assert_eq!(machine.api.slices()[0]["spec"]["pool"]["generation"], 2);
    machine.api.spoil_slices();
    machine
        .api
        .until("generation 3", |api| (api.slices()[0]["spec"]["pool"]["generation"] == 3).then_some(()))
        .await;
    assert_eq!(machine.api.devices()[0]["capacity"]["shares"]["value"], "10");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eighty_claims_at_once_spread_evenly_over_eight_gpus() {
    let machine = Machine::new(8);
    let _driver = machine.driver(&[]).await;
    machine.api.until_order(&[0, 1, 2, 3, 4, 5, 6, 7]).await;
    for number in 0..80 {
        // As fast as there is room, with no wait for the driver in between.
        machine.api.until("room for a claim", |api| api.schedule(&format!("c-{number}"))).await;
        let given = machine.given();
        let most = given.values().max().copied().unwrap_or_default();
        let fewest = if given.len() < 8 { 0 } else { given.values().min().copied().unwrap_or_default() };
        assert!(most <= fewest + 1, "{given:?}");
    }
    assert_eq!(machine.given(), (0..8).map(|gpu| (gpu, 10)).collect());
    // They leave unevenly: 2 has none then, 5 has four, 7 has six. The next ten even that out.
    for (gpu, leave) in [(2, 10), (5, 6), (7, 4)] {
        let there = machine.api.claims_with_devices().into_iter().filter(|(_, on)| *on == gpu);
        for (number, _) in there.take(leave) {
            machine.api.delete_claim(&format!("c-{number}"));
        }
    }
    // Until the driver has seen that they have left, their places are there for others.
    let one_place = |api: &ApiServer| {
        let devices = api.devices();
        let seen = devices.iter().all(|device| api.places_left(device) <= 1);
        (seen && devices[0]["name"] == device(2)).then_some(())
    };
    machine.api.until("GPU 2 is the first, and no GPU has more than one place", one_place).await;
    for number in 100..110 {
        let on = machine.api.until("room for a claim", |api| api.schedule(&format!("c-{number}"))).await;
        assert!(number > 100 || on == 2, "the first went to {on}");
    }
    let given = machine.given();
    let three = [given[&2], given[&5], given[&7]];
    assert!(three.iter().all(|given| (6..=7).contains(given)), "{given:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_wants_all_gpus_finds_room_on_each_after_a_while() {
    let machine = Machine::new(3);
    let _driver = machine.driver(&[]).await;
    machine.api.until_order(&[0, 1, 2]).await;
    assert_eq!(machine.api.schedule("c-1"), Some(0));
    let room = |api: &ApiServer| api.devices().iter().filter(|device| api.has_room(device)).count();
    machine.api.until("room on all three", |api| (room(api) == 3).then_some(())).await;
    let order: Vec<_> = machine.api.devices().iter().map(|device| device["name"].clone()).collect();
    assert_eq!(order, [device(1), device(2), device(0)]);
}

// The scheduler looks once at a pod for which it finds no room, and again when the slices change.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scheduler_that_has_counted_a_claim_twice_is_made_to_count_again() {
    let machine = Machine::new(2);
    let _driver = machine.driver(&[]).await;
    machine.api.until_order(&[0, 1]).await;
    assert_eq!((machine.api.schedule("c-1"), machine.api.schedule("c-2")), (Some(0), Some(1)));
    let room =
        |api: &ApiServer| api.devices().iter().all(|device| api.has_room(device)).then(|| api.generation());
    let counted = machine.api.until("a place on both", room).await;
    // It has taken both for full. There is nothing to change: both have a place, whether claims come or not.
    for time in 1..=2 {
        let again = |api: &ApiServer| (api.generation() >= counted + time).then(|| api.devices());
        let devices = machine.api.until("the scheduler counts again", again).await;
        assert!(devices.iter().all(|device| device["capacity"]["places"]["value"] == "2"), "{devices:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_of_claims_that_stands_still_keeps_no_pod_waiting() {
    let machine = Machine::new(2);
    let _driver = machine.driver(&[]).await;
    let kubelet = machine.kubelet().await;
    machine.api.until_order(&[0, 1]).await;
    machine.api.stand_still().await;
    // The two places that there are.
    assert_eq!((machine.api.schedule("c-1"), machine.api.schedule("c-2")), (Some(0), Some(1)));
    kubelet.prepare_one("c-1").await.unwrap();
    machine.api.until("room for a claim", |api| api.schedule("c-3")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gpu_in_trouble_is_tainted_until_it_is_well() {
    let machine = Machine::new(2);
    let _driver = machine.driver(&[]).await;
    machine.api.until_order(&[0, 1]).await;
    machine.change(0, |gpu| gpu.health = Health::Unhealthy("no arbiter answers".into()));
    let devices = machine.api.until_order(&[1, 0]).await;
    assert_eq!(devices[0]["taints"], Value::Null);
    assert_eq!(devices[1]["taints"][0]["effect"], "NoSchedule");
    machine.change(0, |gpu| gpu.health = Health::Healthy);
    let devices = machine.api.until_order(&[0, 1]).await;
    assert!(devices.iter().all(|device| device["taints"].is_null()), "{devices:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_becomes_a_cdi_specification_and_nothing_else_remains() {
    let machine = Machine::new(2);
    let driver = machine.driver(&[]).await;
    let kubelet = machine.kubelet().await;
    let consumed = json!({"memory": "8Gi", "cores": "30", "shares": "1", "places": "1"});
    let usual = json!({"memory": "14Gi", "cores": "10", "shares": "1", "places": "1"});
    let devices = [(&*device(0), consumed), (&*device(1), usual)];
    machine.api.put_claim(&allocated("c", &devices, config(json!({"priority": "high"}))));
    let ready = kubelet.prepare_one("c").await.unwrap();
    let answer: Vec<_> = ready
        .iter()
        .map(|one| (one.pool_name.as_str(), one.device_name.as_str(), one.share_id.as_deref()))
        .collect();
    assert_eq!(answer, [(NODE, &*device(0), Some("share-c-0")), (NODE, &*device(1), Some("share-c-1"))]);
    assert_eq!(ready.iter().map(|one| one.request_names.clone()).collect::<Vec<_>>(), [["gpu"], ["gpu-1"]]);
    assert_eq!(
        ready[1].cdi_device_ids,
        [format!("nvidia.com/gpu={}", gpu(1).uuid), "nvshare.com/claim=uid-of-c-1".into()]
    );
    let specs = machine.specs();
    assert_eq!(specs.keys().collect::<Vec<_>>(), ["nvshare.com-claim_uid-of-c.json"]);
    let spec = specs.values().next().unwrap();
    assert_eq!(
        (&spec["kind"], &spec["devices"][0]["name"]),
        (&json!("nvshare.com/claim"), &json!("uid-of-c-0"))
    );
    let first = variables(spec, 0);
    for (name, value) in [
        ("LD_PRELOAD", "/usr/lib/nvshare/libnvshare.so"),
        ("NVSHARE_RUNTIME_DIR", "/run/host"),
        ("NVSHARE_MEMORY_LIMIT", "8.00GiB"),
        ("NVSHARE_WEIGHT", "300"),
        ("NVSHARE_PRIORITY", "high"),
    ] {
        let found = first.get(name).unwrap_or_else(|| panic!("{name} is missing: {first:?}"));
        assert_eq!(found.replace(".00", ""), value.replace(".00", ""), "{name}");
    }
    let second = variables(spec, 1);
    assert_eq!((second.get("NVSHARE_MEMORY_LIMIT"), second["NVSHARE_WEIGHT"].as_str()), (None, "100"));
    // Again, and by another driver.
    assert_eq!(kubelet.prepare_one("c").await.unwrap(), ready);
    driver.end().await;
    let _driver = machine.driver(&[]).await;
    let kubelet = machine.kubelet().await;
    assert_eq!(kubelet.prepare_one("c").await.unwrap(), ready);
    assert_eq!(machine.specs(), specs);
    for _ in 0..2 {
        assert_eq!(kubelet.unprepare(&["c", "never-seen"]).await.into_values().collect::<Vec<_>>(), ["", ""]);
        assert!(machine.specs().is_empty(), "{:?}", machine.specs());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_made_ready_says_what_to_do_and_holds_up_no_other() {
    let machine = Machine::new(2);
    machine.change(1, |gpu| gpu.health = Health::Unhealthy("no arbiter answers: start it again".into()));
    let _driver = machine.driver(&[]).await;
    let kubelet = machine.kubelet().await;
    let usual = json!({"memory": "14Gi", "cores": "10", "shares": "1"});
    let put = |name: &str, device: &str, consumed: &Value, config: Value| {
        machine.api.put_claim(&allocated(name, &[(device, consumed.clone())], config));
    };
    put("good", &device(0), &usual, json!([]));
    put("wrong-config", &device(0), &usual, config(json!({"wieght": 1})));
    put("greedy", &device(0), &json!({"memory": "4Gi"}), config(json!({"memoryLimit": "5Gi"})));
    put("too-large", &device(0), &json!({"memory": "15Gi"}), json!([]));
    put("unhealthy", &device(1), &usual, json!([]));
    put("gone", "gpu-of-yesterday", &usual, json!([]));
    put("another", &device(0), &usual, json!([]));
    let mut elsewhere = allocated("elsewhere", &[(&device(0), usual.clone())], json!([]));
    elsewhere["status"]["allocation"]["devices"]["results"][0]["pool"] = json!("node-2");
    machine.api.put_claim(&elsewhere);
    machine.api.put_claim(&allocated("nothing", &[], json!([])));
    let cases = [
        ("wrong-config", "unknown field `wieght`"),
        ("greedy", "capacity.requests.memory"),
        ("too-large", "whose pool is 14.00 GiB now"),
        ("unhealthy", "no arbiter answers: start it again"),
        ("gone", "gpu-of-yesterday is no GPU of node node-1 any more"),
        ("elsewhere", "the pod is on the wrong node"),
        ("nothing", "has no device of gpu.nvshare.com"),
        ("deleted", "deleted meanwhile"),
    ];
    let uids: Vec<_> = cases.iter().map(|(name, _)| format!("uid-of-{name}")).collect();
    let mut asked: Vec<_> = cases.iter().zip(&uids).map(|((name, _), uid)| (*name, uid.as_str())).collect();
    asked.extend([("good", "uid-of-good"), ("another", "uid-of-an-older-one")]);
    let mut answers = kubelet.prepare(&asked).await;
    assert_eq!(answers.len(), asked.len(), "an entry for each claim");
    for ((name, part), uid) in cases.iter().zip(&uids) {
        let error = answers.remove(uid).unwrap().unwrap_err();
        assert!(error.contains(part), "{name}: {error}");
    }
    let error = answers.remove("uid-of-an-older-one").unwrap().unwrap_err();
    assert!(error.contains("another one by now") && error.contains("uid-of-another"), "{error}");
    assert!(answers.remove("uid-of-good").unwrap().is_ok());
    assert_eq!(machine.specs().into_keys().collect::<Vec<_>>(), ["nvshare.com-claim_uid-of-good.json"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_api_server_a_claim_waits_and_the_slices_come_later() {
    let machine = Machine::new(1);
    machine.api.away(true);
    let _driver = machine.driver(&[]).await;
    let kubelet = machine.kubelet().await;
    let error = kubelet.prepare_one("c").await.unwrap_err();
    assert!(error.starts_with("Unavailable: ") && error.contains("tries again"), "{error}");
    // To take a claim back needs no API server.
    assert_eq!(kubelet.unprepare(&["c"]).await.into_values().collect::<Vec<_>>(), [""]);
    machine.api.away(false);
    machine.api.until_order(&[0]).await;
    machine.api.put_claim(&allocated("c", &[(&device(0), json!({}))], json!([])));
    kubelet.prepare_one("c").await.unwrap();
    // Away again: what is published stays, and comes up to date afterwards.
    machine.api.away(true);
    machine.change(0, |gpu| gpu.health = Health::Unhealthy("broken".into()));
    machine.api.away(false);
    machine.api.until("the taint", |api| api.devices()[0]["taints"].is_array().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_right_that_is_missing_is_named() {
    let machine = Machine::new(1);
    machine.api.forbid("get ResourceClaim");
    let _driver = machine.driver(&[]).await;
    let error = machine.kubelet().await.prepare_one("c").await.unwrap_err();
    assert!(
        error.contains("cannot get ResourceClaim") && error.contains("needs get on resourceclaims"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubelets_of_older_releases_are_served_too() {
    use dra_v1beta1::dra_plugin_client::DraPluginClient;
    use health_v1alpha1::dra_resource_health_client::DraResourceHealthClient;
    let machine = Machine::new(1);
    let _driver = machine.driver(&[]).await;
    let kubelet = machine.kubelet().await;
    machine.api.put_claim(&allocated("c", &[(&device(0), json!({}))], json!([])));
    let name = || dra_v1beta1::Claim { namespace: "pods".into(), name: "c".into(), uid: "uid-of-c".into() };
    let mut plugin = DraPluginClient::new(kubelet.channel.clone());
    let request = dra_v1beta1::NodePrepareResourcesRequest { claims: vec![name()] };
    let answer = plugin.node_prepare_resources(request).await.unwrap().into_inner();
    assert_eq!(answer.claims["uid-of-c"].devices[0].device_name, device(0));
    let request = dra_v1beta1::NodeUnprepareResourcesRequest { claims: vec![name()] };
    let answer = plugin.node_unprepare_resources(request).await.unwrap().into_inner();
    assert_eq!(answer.claims["uid-of-c"].error, "");
    let mut health = DraResourceHealthClient::new(kubelet.channel.clone());
    let mut stream = health
        .node_watch_resources(health_v1alpha1::NodeWatchResourcesRequest {})
        .await
        .unwrap()
        .into_inner();
    let first = within("health", stream.message()).await.unwrap().unwrap();
    assert_eq!(first.devices[0].health(), health_v1alpha1::HealthStatus::Healthy);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_is_told_at_once_at_every_change_and_again() {
    use health_v1::HealthStatus::{Healthy, Unhealthy};
    let machine = Machine::new(2);
    let _driver = machine.driver(&[]).await;
    let kubelet = machine.kubelet().await;
    let mut stream = kubelet.watch_health().await;
    let first = within("health", stream.message()).await.unwrap().unwrap();
    assert_eq!(first.devices.iter().map(|device| device.health()).collect::<Vec<_>>(), [Healthy, Healthy]);
    assert!(first.devices.iter().all(|device| device.health_check_timeout_seconds == 30));
    // Load is no health.
    machine.change(0, |gpu| gpu.load = busy(1, 1.0));
    let long = "é".repeat(2_000);
    machine.change(1, |gpu| gpu.health = Health::Unhealthy(long));
    let second = within("health", stream.message()).await.unwrap().unwrap();
    let told = &second.devices[1];
    assert_eq!((told.health(), told.device.as_ref().unwrap().pool_name.as_str()), (Unhealthy, NODE));
    assert_eq!(told.device.as_ref().unwrap().device_name, device(1));
    assert!(told.message.starts_with('é') && told.message.len() <= 1024, "{} bytes", told.message.len());
    // Nothing changes, and the kubelet hears of it before it forgets.
    let third = within("health", stream.message()).await.unwrap().unwrap();
    let untimed = |told: Vec<health_v1::DeviceHealth>| -> Vec<_> {
        told.into_iter().map(|device| health_v1::DeviceHealth { last_updated_time: 0, ..device }).collect()
    };
    assert_eq!(untimed(third.devices), untimed(second.devices));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sockets_that_somebody_removes_are_made_anew() {
    let machine = Machine::new(1);
    let _driver = machine.driver(&[]).await;
    machine.kubelet().await;
    let socket = registration_socket(&machine.kubelet_dir()).await;
    for gone in [socket, machine.kubelet_dir().join("plugins/gpu.nvshare.com/dra.sock")] {
        std::fs::remove_file(&gone).unwrap();
        let back = async {
            while !gone.exists() {
                tokio::task::yield_now().await;
            }
        };
        within("the socket is back", back).await;
        machine.kubelet().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_end_leaves_the_slices_unless_they_are_to_go() {
    let machine = Machine::new(1);
    let driver = machine.driver(&[]).await;
    machine.kubelet().await;
    machine.api.until_order(&[0]).await;
    let writes = machine.api.writes();
    driver.end().await;
    assert_eq!(std::fs::read_dir(machine.kubelet_dir().join("plugins_registry")).unwrap().count(), 0);
    assert_eq!((machine.api.slices().len(), machine.api.writes()), (1, writes));
    let driver = machine.driver(&["--withdraw"]).await;
    machine.kubelet().await;
    driver.end().await;
    assert_eq!(machine.api.slices().len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_claim_has_left_behind_is_removed_at_the_next_start() {
    let machine = Machine::new(1);
    let driver = machine.driver(&[]).await;
    let kubelet = machine.kubelet().await;
    for name in ["stays", "goes"] {
        machine.api.put_claim(&allocated(name, &[(&device(0), json!({}))], json!([])));
        kubelet.prepare_one(name).await.unwrap();
    }
    std::fs::write(machine.cdi_dir().join("nvidia.com-gpu.json"), "{}").unwrap();
    driver.end().await;
    machine.api.delete_claim("goes");
    let _driver = machine.driver(&[]).await;
    let tidy = async {
        while machine.specs().len() != 2 {
            tokio::task::yield_now().await;
        }
    };
    within("it is removed", tidy).await;
    assert_eq!(
        machine.specs().into_keys().collect::<Vec<_>>(),
        ["nvidia.com-gpu.json", "nvshare.com-claim_uid-of-stays.json"]
    );
}
