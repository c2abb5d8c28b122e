//! What becomes of a graph after its nodes are there: it is cloned, put into another, and instances are changed.
//!
//! An instance has its nodes under the handles that they have in the graph that it was made of, so that a caller names
//! them by those. A change replaces the list of nodes; what is under way keeps the one that it was launched with.
//!
//! Graphs with memory of their own are neither cloned nor put into others, nor are instances of them updated, as
//! documented. All of that is `CUDA_ERROR_NOT_SUPPORTED` here.

use std::sync::Arc;

use crate::abi::{Error, Handle, Result};
use crate::driver::{driver, lock};
use crate::graph::{Exec, Graph, Node};
use crate::op::{Copy, Op, Set};
use crate::pool;

/// Why an instance can't be updated (`CUgraphExecUpdateResult`), and where: the node of the instance, and the one of
/// the graph that doesn't go with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    pub why: Why,
    pub of_exec: Handle,
    pub of_graph: Handle,
}

/// `CUgraphExecUpdateResult`, as far as it can happen here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    Topology = 2,
    NodeType = 3,
    Parameters = 5,
    NotSupported = 6,
}

impl Graph {
    /// The nodes as an instance has them: what a graph inside does is settled.
    pub fn snapshot(&self) -> Arc<Vec<Arc<Node>>> {
        let settled = |node: &Arc<Node>| match &node.op {
            Op::Child(child) => with_op(node, Op::Graph(child.snapshot())),
            _ => node.clone(),
        };
        Arc::new(lock(&self.nodes).iter().map(settled).collect())
    }

    /// A graph of its own with the same nodes; `embedded` if a node of another graph will do it.
    pub fn copy(&self, embedded: bool) -> Result<Arc<Graph>> {
        let nodes = lock(&self.nodes).clone();
        if pool::in_graph(&nodes) {
            return Err(Error::NOT_SUPPORTED);
        }
        let copy = Graph::empty(embedded, nodes.iter().map(|node| node.handle).collect());
        for node in &nodes {
            let op = match &node.op {
                Op::Child(child) => Op::Child(child.copy(true)?),
                op => op.clone(),
            };
            copy.add(op, node.after.clone())?;
        }
        Graph::register(copy)
    }

    /// The clone's node that was made of this one.
    pub fn find_in_clone(&self, original: Handle) -> Result<Handle> {
        let number = self.originals.iter().position(|&known| known == original);
        let nodes = lock(&self.nodes);
        number.and_then(|number| nodes.get(number)).map(|node| node.handle).ok_or(Error::INVALID_VALUE)
    }

    /// The edges, by the handles of their ends.
    pub fn edges(&self) -> Vec<(Handle, Handle)> {
        let nodes = lock(&self.nodes);
        let into = |node: &Arc<Node>| {
            let to = node.handle;
            node.after.iter().map(|&from| (nodes[from].handle, to)).collect::<Vec<_>>()
        };
        nodes.iter().flat_map(into).collect()
    }

    /// Has a node do something else of the same kind.
    pub fn set_op(&self, node: Handle, op: Op) -> Result {
        let mut nodes = lock(&self.nodes);
        let number = nodes.iter().position(|known| known.handle == node).ok_or(Error::INVALID_VALUE)?;
        goes_with(&nodes[number].op, &op).map_err(|_| Error::INVALID_VALUE)?;
        nodes[number] = with_op(&nodes[number], op);
        driver()?.nodes.insert(node, nodes[number].clone());
        Ok(())
    }
}

impl Exec {
    /// Has a node of the instance do something else of the same kind, from the next launch on.
    pub fn set_op(&self, node: Handle, op: Op) -> Result {
        let mut nodes = lock(&self.nodes);
        let number = nodes.iter().position(|known| known.handle == node).ok_or(Error::INVALID_VALUE)?;
        let op = settle(&nodes[number].op, op).map_err(|_| Error::INVALID_VALUE)?;
        let mut changed = nodes.to_vec();
        changed[number] = with_op(&nodes[number], op);
        *nodes = Arc::new(changed);
        Ok(())
    }

    /// Has the instance do what a graph of the same shape does (`cuGraphExecUpdate`).
    pub fn update(&self, graph: &Graph) -> std::result::Result<(), Mismatch> {
        let mut nodes = lock(&self.nodes);
        *nodes = merged(&nodes, &graph.snapshot())?;
        Ok(())
    }
}

fn with_op(node: &Node, op: Op) -> Arc<Node> {
    Arc::new(Node { handle: node.handle, graph: node.graph, op, after: node.after.clone() })
}

/// The nodes of an instance, with what those of a graph do.
fn merged(exec: &[Arc<Node>], graph: &[Arc<Node>]) -> std::result::Result<Arc<Vec<Arc<Node>>>, Mismatch> {
    let mismatch = |why, at: usize| Mismatch {
        why,
        of_exec: exec.get(at).map_or(0, |node| node.handle),
        of_graph: graph.get(at).map_or(0, |node| node.handle),
    };
    let alike = exec.iter().zip(graph).position(|(old, new)| old.after != new.after);
    if let Some(at) = alike.or((exec.len() != graph.len()).then_some(exec.len().min(graph.len()))) {
        return Err(mismatch(Why::Topology, at));
    }
    let pairs = exec.iter().zip(graph).enumerate();
    let merge = |(at, (old, new)): (usize, (&Arc<Node>, &Arc<Node>))| {
        settle(&old.op, new.op.clone()).map(|op| with_op(old, op)).map_err(|why| mismatch(why, at))
    };
    pairs.map(merge).collect::<std::result::Result<Vec<_>, _>>().map(Arc::new)
}

/// What a node of an instance does from now on, instead of `old`.
fn settle(old: &Op, new: Op) -> std::result::Result<Op, Why> {
    goes_with(old, &new)?;
    let new = match new {
        Op::Child(child) => Op::Graph(child.snapshot()),
        new => new,
    };
    match (old, new) {
        (Op::Graph(old), Op::Graph(new)) => merged(old, &new).map(Op::Graph).map_err(|mismatch| mismatch.why),
        (_, new) => Ok(new),
    }
}

/// Whether a node may do `new` in place of `old`.
fn goes_with(old: &Op, new: &Op) -> std::result::Result<(), Why> {
    match (old, new) {
        _ if old.node_type() != new.node_type() => Err(Why::NodeType),
        (Op::Alive(..), _) => Err(Why::NotSupported),
        // From where to where must stay: host, GPU or array.
        (Op::Copy(Copy { dst_side, src_side, .. }), Op::Copy(new))
            if (new.dst_side, new.src_side) != (*dst_side, *src_side) =>
        {
            Err(Why::Parameters)
        }
        // Rows don't become a plane.
        (Op::Set(Set { height: old, .. }), Op::Set(Set { height: new, .. })) if (*old > 1) != (*new > 1) => {
            Err(Why::Parameters)
        }
        _ => Ok(()),
    }
}
