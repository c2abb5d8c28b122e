//! A kubelet that the tests play, and the plugin as a process beside a real arbiter on simulated GPUs.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nvshare_kubernetes::device_plugin::protocol::device_plugin_client::DevicePluginClient;
use nvshare_kubernetes::device_plugin::protocol::registration_server::{Registration, RegistrationServer};
use nvshare_kubernetes::device_plugin::protocol::{
    AllocateRequest, AllocateResponse, ContainerAllocateRequest, ContainerPreferredAllocationRequest, Device,
    Empty, ListAndWatchResponse, PreferredAllocationRequest, RegisterRequest,
};
use nvshare_test_support::Patience;
use nvshare_tools::node::{Environment, Node, SimulatedGpu};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

/// For what must happen.
pub const PATIENCE: Patience = Patience::seconds(20);

/// Waits for what must happen.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE.duration(), future).await.unwrap_or_else(|_| panic!("still not: {what}"))
}

/// A machine with so many simulated GPUs, whose UUIDs ascend with their numbers, and a file of faults that they have.
pub struct Machine {
    pub gpu: SimulatedGpu,
    pub dir: tempfile::TempDir,
}

impl Machine {
    pub fn new(gpus: u32) -> Self {
        let set = |name: &'static str, value: &str| (name, value.to_owned());
        let gpu = SimulatedGpu::new(&[
            set("GPUS", &gpus.to_string()),
            set("MEMORY", "256MiB"),
            set("CONTEXT_BYTES", "2MiB"),
            set("UUIDS", "ascending"),
        ])
        .expect("the workspace is built: cargo build --workspace");
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("kubelet/device-plugins")).unwrap();
        std::fs::write(dir.path().join("faults"), "").unwrap();
        Self { gpu, dir }
    }

    /// An arbiter with pools of 64 MiB.
    pub fn arbiter(&self) -> Node {
        Node::start(self.gpu.environment(&[]), &["--capacity", "64MiB"].map(str::to_owned)).unwrap()
    }

    pub fn environment(&self) -> Environment {
        let mut environment = self.gpu.environment(&[]);
        environment.push(("NVSHARE_SIM_NVML_FAULTS".into(), self.dir.path().join("faults").into()));
        environment
    }

    /// From now on the GPUs have these faults.
    pub fn faults(&self, lines: &str) {
        let (new, file) = (self.dir.path().join("faults.new"), self.dir.path().join("faults"));
        std::fs::write(&new, lines).unwrap();
        std::fs::rename(new, file).unwrap();
    }

    pub fn device_plugins(&self) -> PathBuf {
        self.dir.path().join("kubelet/device-plugins")
    }

    pub fn cdi(&self) -> PathBuf {
        self.dir.path().join("cdi")
    }

    /// The plugin's command line, beside the arbiter of this directory.
    pub fn command(&self, runtime_dir: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nvshare-kubernetes"));
        command
            .envs(self.environment())
            .env("NVSHARE_KUBELET_DIR", self.dir.path().join("kubelet"))
            .env("NVSHARE_CDI_DIR", self.cdi())
            .env("NVSHARE_RUNTIME_DIR", runtime_dir)
            .env("NVSHARE_INTERVAL", "20ms")
            .env("NVSHARE_ARBITER_GRACE", "0s")
            .arg("device-plugin")
            .args(arguments);
        command
    }

    /// Starts the plugin. What is usual here stands in variables, so an argument goes before it.
    pub fn plugin(&self, runtime_dir: &Path, arguments: &[&str]) -> Plugin {
        Plugin::start(&mut self.command(runtime_dir, arguments), self.device_plugins())
    }
}

/// The plugin, as a process.
pub struct Plugin {
    process: Child,
    said: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    socket: PathBuf,
}

impl Plugin {
    fn start(command: &mut Command, folder: PathBuf) -> Self {
        let mut process = command.stderr(Stdio::piped()).spawn().unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let (lines, heard) = (BufReader::new(process.stderr.take().unwrap()), said.clone());
        let reader = std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                let mut heard = heard.lock().unwrap();
                heard.push_str(&line);
                heard.push('\n');
            }
        });
        Self { process, said, reader: Some(reader), socket: folder.join("nvshare.com-gpu.sock") }
    }

    /// What it has logged until now.
    pub fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    /// Waits until it has logged this.
    pub fn says(&self, what: &str) {
        PATIENCE.until(what, || self.said().contains(what));
    }

    /// Ends it with SIGTERM; how it ended, and all that it has logged.
    pub fn end(mut self) -> (ExitStatus, String) {
        kill(Pid::from_raw(self.process.id() as i32), Signal::SIGTERM).unwrap();
        let status = self.process.wait().unwrap();
        self.reader.take().unwrap().join().unwrap();
        (status, self.said())
    }

    /// Connects as the kubelet does.
    pub async fn client(&self) -> DevicePluginClient<Channel> {
        let endpoint = Endpoint::from_shared(format!("unix://{}", self.socket.display())).unwrap();
        DevicePluginClient::new(
            within("the plugin's socket takes a connection", endpoint.connect()).await.unwrap(),
        )
    }

    /// What a container gets that is given these.
    pub async fn allocate(&self, ids: &[&str]) -> Result<AllocateResponse, Status> {
        let devices_ids = ids.iter().map(|&id| id.to_owned()).collect();
        let request = AllocateRequest { container_requests: vec![ContainerAllocateRequest { devices_ids }] };
        let answer = self.client().await.allocate(request).await;
        answer.map(Response::into_inner)
    }

    /// The list as it comes.
    pub async fn watch(&self) -> Lists {
        Lists(self.client().await.list_and_watch(Empty {}).await.unwrap().into_inner())
    }

    /// The list in which all virtual GPUs can be given away.
    pub async fn all_healthy(&self) -> Vec<Device> {
        let all = |list: &[Device]| list.iter().all(|one| one.health == "Healthy");
        self.watch().await.until("all are healthy", all).await
    }

    /// Which the plugin would choose of these.
    pub async fn preferred(&self, available: &BTreeSet<String>, size: i32) -> Vec<String> {
        let request = ContainerPreferredAllocationRequest {
            available_device_i_ds: available.iter().cloned().collect(),
            must_include_device_i_ds: vec![],
            allocation_size: size,
        };
        let request = PreferredAllocationRequest { container_requests: vec![request] };
        let answer = self.client().await.get_preferred_allocation(request).await.unwrap().into_inner();
        answer.container_responses[0].device_i_ds.clone()
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("the plugin has said:\n{}", self.said());
        }
    }
}

/// Lists of virtual GPUs as the kubelet gets them.
pub struct Lists(Streaming<ListAndWatchResponse>);

impl Lists {
    pub async fn next(&mut self) -> Vec<Device> {
        let list = within("a list comes", self.0.message()).await;
        list.expect("the stream goes on").expect("the stream goes on").devices
    }

    /// Waits for the list in which this is so.
    pub async fn until(&mut self, what: &str, so: impl Fn(&[Device]) -> bool) -> Vec<Device> {
        let search = async {
            loop {
                let list = self.next().await;
                if so(&list) {
                    return list;
                }
            }
        };
        within(what, search).await
    }
}

/// How many virtual GPUs of each GPU can be given away, by the number that ends its UUID.
pub fn healthy(devices: &[Device]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for device in devices {
        let gpu = device.id.split("::").next().unwrap().to_owned();
        *counts.entry(gpu).or_default() += usize::from(device.health == "Healthy");
    }
    counts
}

struct Takes(mpsc::UnboundedSender<RegisterRequest>);

#[tonic::async_trait]
impl Registration for Takes {
    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<Empty>, Status> {
        self.0.send(request.into_inner()).map_err(|_| Status::unavailable("the test has ended"))?;
        Ok(Response::new(Empty {}))
    }
}

/// The kubelet's part of the protocol.
pub struct Kubelet {
    folder: PathBuf,
    registrations: mpsc::UnboundedReceiver<RegisterRequest>,
    server: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Kubelet {
    /// Begins as a real one: it removes all sockets, then makes its own.
    pub fn start(folder: &Path) -> Self {
        for entry in std::fs::read_dir(folder).unwrap() {
            std::fs::remove_file(entry.unwrap().path()).unwrap();
        }
        Self::take_over(folder)
    }

    /// Makes its socket in the place of another's, and leaves the plugins' sockets where they are.
    pub fn take_over(folder: &Path) -> Self {
        let _ = std::fs::remove_file(folder.join("kubelet.sock"));
        let listener = UnixListener::bind(folder.join("kubelet.sock")).unwrap();
        let (sender, registrations) = mpsc::unbounded_channel();
        let server = Server::builder().add_service(RegistrationServer::new(Takes(sender)));
        let server = tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
        Self { folder: folder.to_owned(), registrations, server }
    }

    /// The next plugin that registers.
    pub async fn registration(&mut self) -> RegisterRequest {
        within("the plugin registers", self.registrations.recv()).await.unwrap()
    }

    /// Ends as a real one that is killed: its socket stays.
    pub fn end(self) -> PathBuf {
        self.folder.clone()
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.server.abort();
    }
}
