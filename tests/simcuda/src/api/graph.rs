//! Graphs.

use std::ffi::{c_char, c_uint};
use std::sync::Arc;

use super::driver_api;
use crate::abi::{Error, GraphInstantiateParams, Handle, Out, Result};
use crate::context;
use crate::driver::{driver, lock};
use crate::graph::{Graph, Node};
use crate::pool;

driver_api! {
    fn cuGraphCreate(graph: Out<Handle>, flags: c_uint) {
        graph.required()?;
        if flags != 0 {
            return Err(Error::INVALID_VALUE);
        }
        graph.set(Graph::create()?.handle)
    }

    fn cuGraphDestroy(graph: Handle) {
        let graph = driver()?.graphs.get(graph)?;
        // It ends with the node that does it.
        if graph.embedded { Err(Error::INVALID_VALUE) } else { graph.destroy() }
    }

    fn cuGraphGetNodes(graph: Handle, nodes: Out<Handle>, count: Out<usize>) {
        self::list(graph, nodes, count, |_| true)
    }

    fn cuGraphGetRootNodes(graph: Handle, nodes: Out<Handle>, count: Out<usize>) {
        self::list(graph, nodes, count, |node| node.after.is_empty())
    }

    fn cuGraphNodeGetType(node: Handle, kind: Out<c_uint>) {
        kind.set(driver()?.nodes.get(node)?.op.node_type())
    }

    fn cuGraphInstantiate(exec: Out<Handle>, graph: Handle, node: Out<Handle>, log: Out<c_char>, len: usize) {
        node.set_if_wanted(0);
        log.fill([0].into_iter(), len);
        self::instantiate(exec, graph, 0)
    }

    fn cuGraphInstantiate_v2(exec: Out<Handle>, graph: Handle, node: Out<Handle>, log: Out<c_char>, len: usize) {
        node.set_if_wanted(0);
        log.fill([0].into_iter(), len);
        self::instantiate(exec, graph, 0)
    }

    fn cuGraphInstantiateWithFlags(exec: Out<Handle>, graph: Handle, flags: u64) {
        self::instantiate(exec, graph, flags)
    }

    fn cuGraphInstantiateWithParams / cuGraphInstantiateWithParams_ptsz |null| (
        exec: Out<Handle>, graph: Handle, params: Out<GraphInstantiateParams>,
    ) {
        let mut given = params.get()?;
        if given.upload_stream != 0 {
            context::stream(null, given.upload_stream)?;
        }
        self::instantiate(exec, graph, given.flags)?;
        (given.error_node, given.result) = (0, 0);
        params.set(given)
    }

    fn cuGraphExecGetFlags(exec: Handle, flags: Out<u64>) {
        flags.set(driver()?.execs.get(exec)?.flags)
    }

    fn cuGraphExecDestroy(exec: Handle) {
        driver()?.execs.remove(exec).map(|_| ())
    }

    /// Nothing has to be brought anywhere.
    fn cuGraphUpload / cuGraphUpload_ptsz |null| (exec: Handle, stream: Handle) {
        driver()?.execs.get(exec)?;
        context::stream(null, stream)?.usable()
    }

    fn cuGraphLaunch / cuGraphLaunch_ptsz |null| (exec: Handle, stream: Handle) {
        let exec = driver()?.execs.get(exec)?;
        pool::launch(&exec, &context::stream(null, stream)?)
    }
}

fn instantiate(exec: Out<Handle>, graph: Handle, flags: u64) -> Result {
    context::healthy()?;
    exec.required()?;
    // Launches from the GPU itself (4) are not supported; the other flags change nothing here.
    if flags & !0xf != 0 || flags & 4 != 0 {
        return Err(Error::INVALID_VALUE);
    }
    exec.set(driver()?.graphs.get(graph)?.instantiate(flags)?.handle)
}

fn list(graph: Handle, nodes: Out<Handle>, count: Out<usize>, which: impl Fn(&Node) -> bool) -> Result {
    let graph = driver()?.graphs.get(graph)?;
    let all = lock(&graph.nodes);
    let chosen: Vec<&Arc<Node>> = all.iter().filter(|node| which(node)).collect();
    if nodes.is_null() {
        return count.set(chosen.len());
    }
    let room = count.get()?;
    // Room beyond the last node is filled with nulls, as documented.
    let padded = chosen.iter().map(|node| node.handle).chain(std::iter::repeat(0));
    nodes.fill(padded, room);
    count.set(chosen.len().min(room))
}
