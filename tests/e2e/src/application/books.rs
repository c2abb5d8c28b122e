//! What the page of the first GPU says about applications.

use super::{Application, MIB};
use nvshare_test_support::Patience;
use nvshare_tools::node::Node;
use nvshare_tools::status::{self, Client, Gpu};

const TIMEOUT: Patience = Patience::seconds(60);

/// What one costs on the simulated GPU.
const CONTEXT: u64 = 2 * MIB;

/// A competitor's memory goes out in pieces: what others do not need of the GPU, it keeps.
const PIECE: u64 = 2 * MIB;

fn gpu(node: &Node) -> Gpu {
    status::read(node.dir()).unwrap().gpus.remove(0)
}

/// All of them.
pub fn clients(node: &Node) -> Vec<Client> {
    gpu(node).clients
}

/// What it says about this one.
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
    TIMEOUT.until(&format!("the books say {expected:?}"), || books(node, application) == expected);
}

/// Everybody is gone, and so is every granule that they had, on the page and on the GPU, of whose pool one client
/// can have 60 MiB.
pub fn balances(node: &Node) {
    TIMEOUT.until("all clients are reaped", || clients(node).is_empty());
    let gpu = gpu(node);
    assert_eq!((gpu.free_bytes, gpu.repaired), (gpu.capacity_bytes as i64, 0));
    // All of it can be used again.
    let mut next = Application::ready(node);
    let all = next.alloc(60 * MIB);
    next.writes(all, 60 * MIB, 9);
    next.sees(all, 60 * MIB, 9);
    next.end();
}

/// The GPU on which it is a client.
fn gpu_with(node: &Node, application: &Application) -> Gpu {
    let gpus = status::read(node.dir()).unwrap().gpus;
    let is_it = |client: &Client| application.client() == format!("nvshare[{}]", client.pid);
    gpus.into_iter().find(|gpu| gpu.clients.iter().any(is_it)).unwrap()
}

/// An application that needs all that two clients can have of a pool, so that its turns are without anything of
/// another's on the GPU.
#[derive(Debug)]
pub struct Competitor {
    application: Application,
    /// Address and bytes.
    pieces: Vec<(u64, u64)>,
    turns: u64,
}

impl Competitor {
    /// Beside one other.
    pub fn start(node: &Node) -> Self {
        Self::beside(node, 1)
    }

    /// Beside so many others, who need no more than their contexts or take turns with it.
    pub fn beside(node: &Node, others: u64) -> Self {
        Self::on(node, 0, others)
    }

    /// The same on that GPU.
    pub fn on(node: &Node, device: u32, others: u64) -> Self {
        let mut application = Application::on(node, device);
        let contexts = (others + 1) * CONTEXT;
        TIMEOUT.until("all contexts are counted", || gpu_with(node, &application).pinned_bytes == contexts);
        let bytes = gpu_with(node, &application).capacity_bytes - contexts;
        let pieces = (0..bytes).step_by(PIECE as usize).map(|at| PIECE.min(bytes - at));
        let pieces = pieces.map(|bytes| (application.alloc(bytes), bytes)).collect();
        Self { application, pieces, turns: 0 }
    }

    /// Has it use its memory: nothing of `other` is on the GPU afterwards, and so it stays until `other` needs some.
    #[track_caller]
    pub fn takes_all(&mut self, node: &Node, other: &Application) {
        self.sees_its_own();
        self.turns += 1;
        for (address, bytes) in &self.pieces {
            self.application.writes(*address, *bytes, self.turns);
        }
        let left = self.beside_it(node, other);
        assert_eq!(left.resident_bytes, 0, "something of it is still on the GPU: {left:#?}");
    }

    /// What the page of its GPU says about another application.
    pub fn beside_it(&self, node: &Node, other: &Application) -> Client {
        let is_it = |client: &Client| other.client() == format!("nvshare[{}]", client.pid);
        gpu_with(node, &self.application).clients.into_iter().find(is_it).expect("it is a client of this GPU")
    }

    /// Its data is what it last wrote.
    #[track_caller]
    pub fn sees_its_own(&mut self) {
        for (address, bytes) in self.pieces.iter().filter(|_| self.turns > 0) {
            self.application.sees(*address, *bytes, self.turns);
        }
    }

    /// Has it use its memory on and on, without a look at the other, until `enough` says so.
    pub fn works_until(&mut self, mut enough: impl FnMut() -> bool) {
        while !enough() {
            self.sees_its_own();
        }
    }

    /// Lets it end, with its data as it was.
    #[track_caller]
    pub fn ends(mut self) {
        assert!(self.turns > 0, "it never had a turn");
        self.sees_its_own();
        self.application.end();
    }
}
