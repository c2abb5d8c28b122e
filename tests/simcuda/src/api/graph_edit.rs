//! Graphs made node by node, clones of them, and changes of instances.

use std::ffi::c_uint;
use std::sync::Arc;

use super::{copy, driver_api, launch};
use crate::abi::{
    Error, GraphEdgeData, GraphExecUpdateResultInfo, Handle, HostNodeParams, In, KernelNodeParams,
    KernelNodeParamsV2, Memcpy3D, MemsetNodeParams, Out, Result,
};
use crate::context;
use crate::driver::driver;
use crate::graph::{Exec, Graph};
use crate::op::Op;

driver_api! {
    fn cuGraphAddEmptyNode(node: Out<Handle>, graph: Handle, before: In<Handle>, count: usize) {
        self::add(node, graph, before, count, || Ok(Op::Nothing))
    }

    fn cuGraphAddKernelNode(
        node: Out<Handle>, graph: Handle, before: In<Handle>, count: usize, params: In<KernelNodeParams>,
    ) {
        self::add(node, graph, before, count, || launch::kernel_node(&params.get()?))
    }

    fn cuGraphAddKernelNode_v2(
        node: Out<Handle>, graph: Handle, before: In<Handle>, count: usize, params: In<KernelNodeParamsV2>,
    ) {
        self::add(node, graph, before, count, || self::kernel_of(params))
    }

    fn cuGraphAddMemcpyNode(
        node: Out<Handle>, graph: Handle, before: In<Handle>, count: usize, params: In<Memcpy3D>, context: Handle,
    ) {
        self::add(node, graph, before, count, || self::copy_of(params, context))
    }

    fn cuGraphAddMemsetNode(
        node: Out<Handle>, graph: Handle, before: In<Handle>, count: usize, params: In<MemsetNodeParams>,
        context: Handle,
    ) {
        self::add(node, graph, before, count, || self::set_of(params, context))
    }

    fn cuGraphAddHostNode(
        node: Out<Handle>, graph: Handle, before: In<Handle>, count: usize, params: In<HostNodeParams>,
    ) {
        self::add(node, graph, before, count, || {
            let HostNodeParams { function, data } = params.get()?;
            if function.is_none() { Err(Error::INVALID_VALUE) } else { Ok(Op::Host { function, data }) }
        })
    }

    /// The node gets a copy of the child.
    fn cuGraphAddChildGraphNode(node: Out<Handle>, graph: Handle, before: In<Handle>, count: usize, child: Handle) {
        self::add(node, graph, before, count, || Ok(Op::Child(driver()?.graphs.get(child)?.copy(true)?)))
    }

    fn cuGraphChildGraphNodeGetGraph(node: Handle, graph: Out<Handle>) {
        match &driver()?.nodes.get(node)?.op {
            Op::Child(child) => graph.set(child.handle),
            _ => Err(Error::INVALID_VALUE),
        }
    }

    fn cuGraphClone(clone: Out<Handle>, original: Handle) {
        clone.required()?;
        clone.set(driver()?.graphs.get(original)?.copy(false)?.handle)
    }

    fn cuGraphNodeFindInClone(node: Out<Handle>, original: Handle, clone: Handle) {
        node.set(driver()?.graphs.get(clone)?.find_in_clone(original)?)
    }

    fn cuGraphGetEdges(graph: Handle, from: Out<Handle>, to: Out<Handle>, count: Out<usize>) {
        self::edges(graph, from, to, count).map(|_| ())
    }

    /// No edge has any data.
    fn cuGraphGetEdges_v2(
        graph: Handle, from: Out<Handle>, to: Out<Handle>, data: Out<GraphEdgeData>, count: Out<usize>,
    ) {
        let written = self::edges(graph, from, to, count)?;
        data.fill(std::iter::repeat_n(GraphEdgeData::default(), written), written);
        Ok(())
    }

    fn cuGraphNodeGetDependencies(node: Handle, dependencies: Out<Handle>, count: Out<usize>) {
        let graph = driver()?.graphs.get(driver()?.nodes.get(node)?.graph)?;
        let edges = graph.edges();
        let from: Vec<Handle> = edges.iter().filter(|(_, to)| *to == node).map(|(from, _)| *from).collect();
        if dependencies.is_null() {
            return count.set(from.len());
        }
        let room = count.get()?;
        count.set(from.len().min(room))?;
        dependencies.fill(from.into_iter(), room);
        Ok(())
    }

    fn cuGraphKernelNodeSetParams(node: Handle, params: In<KernelNodeParams>) {
        self::set(node, launch::kernel_node(&params.get()?)?)
    }

    fn cuGraphKernelNodeSetParams_v2(node: Handle, params: In<KernelNodeParamsV2>) {
        self::set(node, self::kernel_of(params)?)
    }

    fn cuGraphMemcpyNodeSetParams(node: Handle, params: In<Memcpy3D>) {
        self::set(node, self::copy_of(params, context::current_handle())?)
    }

    fn cuGraphMemsetNodeSetParams(node: Handle, params: In<MemsetNodeParams>) {
        self::set(node, self::set_of(params, context::current_handle())?)
    }

    fn cuGraphExecKernelNodeSetParams(exec: Handle, node: Handle, params: In<KernelNodeParams>) {
        self::exec(exec)?.set_op(node, launch::kernel_node(&params.get()?)?)
    }

    fn cuGraphExecKernelNodeSetParams_v2(exec: Handle, node: Handle, params: In<KernelNodeParamsV2>) {
        self::exec(exec)?.set_op(node, self::kernel_of(params)?)
    }

    fn cuGraphExecMemcpyNodeSetParams(exec: Handle, node: Handle, params: In<Memcpy3D>, context: Handle) {
        self::exec(exec)?.set_op(node, self::copy_of(params, context)?)
    }

    fn cuGraphExecMemsetNodeSetParams(exec: Handle, node: Handle, params: In<MemsetNodeParams>, context: Handle) {
        self::exec(exec)?.set_op(node, self::set_of(params, context)?)
    }

    fn cuGraphExecChildGraphNodeSetParams(exec: Handle, node: Handle, child: Handle) {
        let child = driver()?.graphs.get(child)?;
        self::exec(exec)?.set_op(node, Op::Graph(child.snapshot()))
    }

    fn cuGraphExecUpdate(exec: Handle, graph: Handle, error_node: Out<Handle>, result: Out<c_uint>) {
        result.required()?;
        let info = self::update(exec, graph)?;
        error_node.set_if_wanted(info.error_from_node);
        result.set(info.result)?;
        self::verdict(&info)
    }

    fn cuGraphExecUpdate_v2(exec: Handle, graph: Handle, info: Out<GraphExecUpdateResultInfo>) {
        info.required()?;
        let updated = self::update(exec, graph)?;
        info.set(updated)?;
        self::verdict(&updated)
    }
}

fn add(
    node: Out<Handle>,
    graph: Handle,
    before: In<Handle>,
    count: usize,
    op: impl FnOnce() -> Result<Op>,
) -> Result {
    node.required()?;
    let graph = driver()?.graphs.get(graph)?;
    let before = if count == 0 { Vec::new() } else { before.to_vec(count)? };
    node.set(graph.add_after(op()?, &before)?)
}

fn kernel_of(params: In<KernelNodeParamsV2>) -> Result<Op> {
    let KernelNodeParamsV2 { common, kernel, context } = params.get()?;
    if context != 0 {
        context::by_handle(context)?;
    }
    let function = if common.function != 0 { common.function } else { kernel };
    launch::kernel_node(&KernelNodeParams { function, ..common })
}

fn copy_of(params: In<Memcpy3D>, context: Handle) -> Result<Op> {
    let context = context::by_handle(context)?;
    context.core.healthy()?;
    let copy = copy::space(&params.get()?)?;
    copy.is_possible(context.core.device)?;
    Ok(Op::Copy(copy))
}

fn set_of(params: In<MemsetNodeParams>, context: Handle) -> Result<Op> {
    let context = context::by_handle(context)?;
    context.core.healthy()?;
    let MemsetNodeParams { dst, pitch, value, element, width, height } = params.get()?;
    if !matches!(element, 1 | 2 | 4) || width == 0 || height == 0 {
        return Err(Error::INVALID_VALUE);
    }
    let set = copy::set(dst, value, element.into(), width, height, if height > 1 { pitch } else { 0 })?;
    set.is_possible(context.core.device)?;
    Ok(Op::Set(set))
}

fn set(node: Handle, op: Op) -> Result {
    let driver = driver()?;
    driver.graphs.get(driver.nodes.get(node)?.graph)?.set_op(node, op)
}

fn exec(exec: Handle) -> Result<Arc<Exec>> {
    context::healthy()?;
    driver()?.execs.get(exec)
}

fn update(exec: Handle, graph: Handle) -> Result<GraphExecUpdateResultInfo> {
    let graph: Arc<Graph> = driver()?.graphs.get(graph)?;
    let updated = self::exec(exec)?.update(&graph);
    Ok(match updated {
        Ok(()) => GraphExecUpdateResultInfo { result: 0, error_node: 0, error_from_node: 0 },
        Err(mismatch) => GraphExecUpdateResultInfo {
            result: mismatch.why as c_uint,
            error_node: mismatch.of_exec,
            error_from_node: mismatch.of_graph,
        },
    })
}

fn verdict(info: &GraphExecUpdateResultInfo) -> Result {
    if info.result == 0 { Ok(()) } else { Err(Error::GRAPH_EXEC_UPDATE_FAILURE) }
}

/// Says how many edges were written.
fn edges(graph: Handle, from: Out<Handle>, to: Out<Handle>, count: Out<usize>) -> Result<usize> {
    let edges = driver()?.graphs.get(graph)?.edges();
    if from.is_null() && to.is_null() {
        count.set(edges.len())?;
        return Ok(0);
    }
    from.required().and(to.required())?;
    let room = count.get()?;
    let written = edges.len().min(room);
    count.set(written)?;
    from.fill(edges.iter().map(|(from, _)| *from), written);
    to.fill(edges.iter().map(|(_, to)| *to), written);
    Ok(written)
}
