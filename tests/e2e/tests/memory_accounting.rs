//! What a client is promised is there: contexts count from the first moment, also where NVML shows the clients' processes
//! under other pids or not at all, and so does memory that the driver keeps for itself.

use nvshare_e2e::application::books::{balances, books, client};
use nvshare_e2e::application::{Application, MIB, SUCCESS};
use nvshare_test_support::Patience;
use nvshare_tools::node::{Node, SimulatedGpu};
use nvshare_tools::status::{self, Gpu};

const TIMEOUT: Patience = Patience::seconds(60);

/// Large enough that nobody takes one for rounding.
const CONTEXT: u64 = 48 * MIB;

/// A GPU of 512 MiB whose contexts are large. The arbiter's NVML shows processes by these pids.
fn gpu(pids: &str) -> SimulatedGpu {
    let settings =
        [("MEMORY", "512MiB"), ("CONTEXT_BYTES", "48MiB"), ("LINK_BANDWIDTH", "64GiB"), ("NVML_PIDS", pids)];
    SimulatedGpu::new(&settings.map(|(name, value)| (name, value.to_owned())))
        .expect("the workspace is built: cargo build --workspace")
}

/// An arbiter whose pool is all of the GPU.
fn node(gpu: &SimulatedGpu) -> Node {
    Node::start(gpu.environment(&[]), &["--headroom", "0MiB"].map(str::to_owned)).unwrap()
}

fn pool(node: &Node) -> Gpu {
    status::read(node.dir()).unwrap().gpus.remove(0)
}

fn context(node: &Node, application: &Application) -> u64 {
    client(node, application).pinned_bytes
}

#[test]
fn a_context_is_counted_when_the_client_has_its_slot() {
    let gpu = gpu("own");
    let node = node(&gpu);
    for _ in 0..3 {
        let mut client = Application::ready(&node);
        // Not waited for: nobody may have been promised this memory meanwhile.
        assert_eq!(context(&node, &client), CONTEXT);
        let left = client.number("left");
        assert_eq!(left, 512 * MIB - CONTEXT);
        // All that it was told of is there, in pieces of the smallest size.
        let pieces: Vec<_> = (0..left / (2 * MIB)).map(|_| client.alloc(2 * MIB)).collect();
        client.writes(*pieces.last().unwrap(), 2 * MIB, 5);
        client.sees(*pieces.last().unwrap(), 2 * MIB, 5);
        client.ends_well();
        TIMEOUT.until("it is reaped", || pool(&node).clients.is_empty());
    }
}

/// Two clients that fit beside each other: they do not take turns, and the pool stays as large as it is.
fn contexts_are_known_and_clients_are_not_foreign(pids: &str) {
    let gpu = gpu(pids);
    let node = node(&gpu);
    let mut clients = [(); 2].map(|()| Application::ready(&node));
    for client in &clients {
        assert_eq!(context(&node, client), CONTEXT, "{pids}");
    }
    let memory = clients.each_mut().map(|client| {
        let address = client.alloc(150 * MIB);
        client.writes(address, 150 * MIB, 3);
        address
    });
    let heartbeats = pool(&node).audits;
    // A sample is taken twice a second, an audit ten times: all of this was sampled three times at least.
    TIMEOUT.until("the arbiter has looked at it", || pool(&node).audits > heartbeats + 20);
    for (client, address) in clients.iter_mut().zip(memory) {
        client.sees(address, 150 * MIB, 3);
        assert_eq!(context(&node, client), CONTEXT, "{pids}: data is no context");
    }
    let shown = pool(&node);
    assert_eq!(shown.capacity_bytes, 512 * MIB, "{pids}: their memory is not foreign");
    for client in &shown.clients {
        assert_eq!((client.bytes_out, client.yields), (0, 0), "{pids}: they fit");
    }
    for client in clients {
        client.ends_well();
    }
}

#[test]
fn clients_fit_where_nvml_shows_them_under_other_pids() {
    contexts_are_known_and_clients_are_not_foreign("other");
}

#[test]
fn clients_fit_where_nvml_shows_no_process() {
    contexts_are_known_and_clients_are_not_foreign("none");
}

/// A pool whose memory other processes may open is the driver's, and so is its memory: it is counted before it is there.
#[test]
fn memory_of_a_pool_that_can_be_shared_is_counted() {
    let gpu = nvshare_e2e::application::gpu();
    let node = nvshare_e2e::application::node(&gpu);
    let (mut user, mut other) = (Application::ready(&node), Application::ready(&node));
    let large = other.alloc(56 * MIB);
    other.writes(large, 56 * MIB, 1);
    let (stream, pool) = (user.number("stream 1"), user.number("pool 0 1"));
    // There is room for it only if the other's data makes room.
    let address = user.number(&format!("alloc-from {} {pool} {stream}", 16 * MIB));
    assert_eq!(books(&node, &user), (16 * MIB, 16 * MIB, 16 * MIB));
    user.writes(address, 16 * MIB, 2);
    user.sees(address, 16 * MIB, 2);
    other.sees(large, 56 * MIB, 1);
    user.sees(address, 16 * MIB, 2);
    user.does(&format!("free-async {address} {stream}"));
    assert_eq!(books(&node, &user), (0, 0, 0));
    assert_eq!(user.call(&format!("destroy-pool {pool}")), SUCCESS);
    user.ends_well();
    other.ends_well();
    balances(&node);
}
