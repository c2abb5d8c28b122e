//! Processes that hold the same data hand GPU memory to each other instead of copying it from host memory (NVSHARE_REPLICAS).

use nvshare_e2e::application::books::{Competitor, balances, client};
use nvshare_e2e::application::{Application, MIB, node, quick_gpu};
use nvshare_tools::node::Node;

const GRANULE: u64 = 2 * MIB;

/// Bytes of an allocation, which is one chunk.
const PIECE: u64 = 4 * GRANULE;

/// Allocations of a replica: 40 MiB, of which one and a half fit beside two contexts in a pool of 64 MiB.
const PIECES: u64 = 5;

/// Data that several processes hold: the seed of each piece.
type Model = Vec<u64>;

fn model() -> Model {
    (1..=PIECES).collect()
}

/// A member of a group, and where its pieces are.
struct Replica {
    application: Application,
    pieces: Vec<u64>,
}

impl Replica {
    /// With this data on the GPU.
    fn start(node: &Node, variables: &[(&str, &str)], model: &Model) -> Self {
        let mut application = Application::start(node.environment(), variables);
        application.does("init");
        application.does("create 0");
        let pieces: Vec<_> = model.iter().map(|_| application.alloc(PIECE)).collect();
        let mut replica = Self { application, pieces };
        replica.loads(model);
        replica
    }

    fn of(node: &Node, group: &str, model: &Model) -> Self {
        Self::start(node, &[("NVSHARE_REPLICAS", group)], model)
    }

    fn loads(&mut self, model: &Model) {
        for (piece, seed) in self.pieces.iter().zip(model) {
            self.application.writes(*piece, PIECE, *seed);
        }
    }

    /// It has its turn, and all of its data is right.
    #[track_caller]
    fn sees(&mut self, model: &Model) {
        for (piece, seed) in self.pieces.iter().zip(model) {
            self.application.sees(*piece, PIECE, *seed);
        }
    }

    fn moved(&self, node: &Node) -> Moved {
        let client = client(node, &self.application);
        Moved {
            copied_in: client.bytes_in,
            copied_out: client.bytes_out,
            handed: client.bytes_handed_over,
            taken: client.bytes_taken_over,
            missing: client.demand_bytes - client.resident_bytes,
        }
    }
}

/// Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Moved {
    copied_in: u64,
    copied_out: u64,
    handed: u64,
    taken: u64,
    /// Not on the GPU now.
    missing: u64,
}

#[test]
fn what_a_replica_has_on_the_gpu_is_never_copied_in() {
    let gpu = quick_gpu();
    let node = node(&gpu);
    let model = model();
    let mut replicas = [(); 2].map(|()| Replica::of(&node, "model", &model));
    for turn in 0..8 {
        let [next, other] = if turn % 2 == 0 { [0, 1] } else { [1, 0] };
        let (before, giver) = (replicas[next].moved(&node), replicas[other].moved(&node));
        assert!(before.missing > 0, "it has to come in");
        replicas[next].sees(&model);
        let (after, gave) = (replicas[next].moved(&node), replicas[other].moved(&node));
        assert_eq!(after.taken - before.taken, before.missing, "turn {turn}: {before:?} {after:?} {gave:?}");
        assert_eq!(gave.handed - giver.handed, before.missing, "turn {turn}: {giver:?} {gave:?}");
        assert_eq!((after.copied_in, gave.copied_in), (0, 0), "turn {turn}");
    }
    for replica in &replicas {
        let moved = replica.moved(&node);
        assert!(moved.copied_out <= PIECES * PIECE, "each piece goes out once at most: {moved:?}");
    }
    for mut replica in replicas {
        replica.sees(&model);
        replica.application.ends_well();
    }
    balances(&node);
}
