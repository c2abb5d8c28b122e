//! What the page of the first GPU says about applications.

use super::{Application, MIB};
use nvshare_test_support::Patience;
use nvshare_tools::node::Node;
use nvshare_tools::status::{self, Client, Gpu};

const PATIENCE: Patience = Patience::seconds(60);

/// What one costs on the simulated GPU.
const CONTEXT: u64 = 2 * MIB;

fn gpu(node: &Node) -> Gpu {
    status::read(node.dir()).unwrap().gpus.remove(0)
}

pub fn clients(node: &Node) -> Vec<Client> {
    gpu(node).clients
}

pub fn client(node: &Node, application: &Application) -> Client {
    let is_it = |client: &Client| application.client() == format!("nvshare[{}]", client.pid);
    clients(node).into_iter().find(is_it).unwrap()
}

/// Bytes that the client asks for, has on the GPU, and cannot move.
pub fn books(node: &Node, application: &Application) -> (u64, u64, u64) {
    let client = client(node, application);
    (client.demand_bytes, client.resident_bytes, client.unmovable_bytes)
}

/// What takes its way: what other processes close, and what the engine finishes.
#[track_caller]
pub fn come_to(node: &Node, application: &Application, expected: (u64, u64, u64)) {
    PATIENCE.until(&format!("the books say {expected:?}"), || books(node, application) == expected);
}

/// Everybody is gone, and so is every granule that they had, on the page and on the GPU, of whose pool one client
/// can have 60 MiB.
pub fn balances(node: &Node) {
    PATIENCE.until("all clients are reaped", || clients(node).is_empty());
    let gpu = gpu(node);
    assert_eq!((gpu.free_bytes, gpu.repaired), (gpu.capacity_bytes as i64, 0));
    // All of it can be used again.
    let mut next = Application::ready(node);
    let all = next.alloc(60 * MIB);
    next.writes(all, 60 * MIB, 9);
    next.sees(all, 60 * MIB, 9);
    next.end();
}

/// An application that needs all that two clients can have of a pool, so that its turns are without anything of
/// another's on the GPU.
pub struct Competitor {
    application: Application,
    address: u64,
    bytes: u64,
    turns: u64,
}

impl Competitor {
    /// Beside one other.
    pub fn start(node: &Node) -> Self {
        let mut application = Application::ready(node);
        PATIENCE.until("both contexts are counted", || gpu(node).pinned_bytes == 2 * CONTEXT);
        let bytes = gpu(node).capacity_bytes - 2 * CONTEXT;
        let address = application.alloc(bytes);
        Self { application, address, bytes, turns: 0 }
    }

    /// Has it use its memory: nothing of `other` is on the GPU afterwards, and so it stays until `other` needs some.
    #[track_caller]
    pub fn takes_all(&mut self, node: &Node, other: &Application) {
        self.application.sees_last(self.address, self.bytes, self.turns);
        self.turns += 1;
        self.application.writes(self.address, self.bytes, self.turns);
        assert_eq!(books(node, other).1, 0, "something of it is still on the GPU: {:#?}", gpu(node));
    }

    /// Lets it end, with its data as it was.
    #[track_caller]
    pub fn ends(mut self) {
        self.application.sees_last(self.address, self.bytes, self.turns);
        assert!(self.turns > 0, "it never had a turn");
        self.application.end();
    }
}

impl Application {
    /// The words of the last write, if there was one.
    #[track_caller]
    fn sees_last(&mut self, address: u64, bytes: u64, turns: u64) {
        if turns > 0 {
            self.sees(address, bytes, turns);
        }
    }
}
