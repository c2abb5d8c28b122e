//! Capture of streams into graphs, and graphs.
//!
//! A capture collects operations as nodes instead of running them. Every participating stream knows its `tail`: the
//! nodes that its next operation depends on. An event recorded there remembers the tail, and a stream that waits for
//! the event takes it over, which is also how further streams join. Nodes only depend on earlier ones, so the order of
//! collection is a valid order of execution, and a replay simply runs the nodes in that order.
//!
//! A capture is ruined ("invalidated") by what can't be expressed in a graph. `cuCtxSynchronize` ruins every capture of
//! the context, in any mode, as measured on real GPUs.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use crate::abi::{Error, GraphEdgeData, Handle, Result};
use crate::context::Core;
use crate::driver::{driver, lock, this_thread};
use crate::handles;
use crate::op::Op;
use crate::pool;
use crate::stream::{Role, Stream};

/// `CUstreamCaptureMode`: which threads may not make unsafe calls meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Global = 0,
    ThreadLocal = 1,
    Relaxed = 2,
}

impl Mode {
    pub fn from_raw(raw: u32) -> Result<Mode> {
        match raw {
            0 => Ok(Mode::Global),
            1 => Ok(Mode::ThreadLocal),
            2 => Ok(Mode::Relaxed),
            _ => Err(Error::INVALID_VALUE),
        }
    }
}

/// A node of a graph.
pub struct Node {
    pub handle: Handle,
    /// The graph that it is in; an instance has the nodes of its graph.
    pub graph: Handle,
    pub op: Op,
    /// Numbers of the nodes that come first.
    pub after: Vec<usize>,
}

/// A graph.
pub struct Graph {
    pub handle: Handle,
    pub nodes: Mutex<Vec<Arc<Node>>>,
    /// It is what a node of another graph does, and ends with that.
    pub embedded: bool,
    /// For a clone: each node's original, in the order of the nodes.
    pub originals: Vec<Handle>,
}

/// A graph that can be launched. What is under way keeps the nodes that it was launched with.
pub struct Exec {
    pub handle: Handle,
    pub nodes: Mutex<Arc<Vec<Arc<Node>>>>,
    pub flags: u64,
}

impl Exec {
    pub fn nodes(&self) -> Arc<Vec<Arc<Node>>> {
        lock(&self.nodes).clone()
    }
}

/// A capture.
pub struct Capture {
    pub id: u64,
    mode: Mode,
    thread: usize,
    origin: Handle,
    pub graph: Arc<Graph>,
    /// The graph is the application's: it was there before the capture.
    given: bool,
    invalidated: AtomicBool,
    /// The streams that take part.
    streams: Mutex<Vec<Arc<Stream>>>,
}

/// A stream's part in a capture.
#[derive(Clone)]
pub struct Participation {
    pub capture: Arc<Capture>,
    pub tail: Vec<usize>,
    /// The tail as callers are shown it; kept until they ask again, since they get its address.
    pub shown: Arc<Shown>,
}

/// The dependencies of a stream's next operation, as C arrays of equal length.
#[derive(Default)]
pub struct Shown {
    pub nodes: Vec<Handle>,
    /// No edge has any data.
    pub edges: Vec<GraphEdgeData>,
}

/// What a stream's capture is up to (`CUstreamCaptureStatus`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    None = 0,
    Active = 1,
    Invalidated = 2,
}

thread_local! {
    static MODE: Cell<Mode> = const { Cell::new(Mode::Global) };
}

/// Swaps the thread's own mode (`cuThreadExchangeStreamCaptureMode`).
pub fn exchange_mode(mode: Mode) -> Mode {
    MODE.replace(mode)
}

impl Graph {
    pub fn create() -> Result<Arc<Graph>> {
        Graph::register(Graph::empty(false, Vec::new()))
    }

    pub fn empty(embedded: bool, originals: Vec<Handle>) -> Graph {
        Graph { handle: handles::fresh(), nodes: Mutex::default(), embedded, originals }
    }

    pub fn register(graph: Graph) -> Result<Arc<Graph>> {
        let graph = Arc::new(graph);
        driver()?.graphs.insert(graph.handle, graph.clone());
        Ok(graph)
    }

    pub fn add(&self, op: Op, after: Vec<usize>) -> Result<usize> {
        let node = Arc::new(Node { handle: handles::fresh(), graph: self.handle, op, after });
        driver()?.nodes.insert(node.handle, node.clone());
        let mut nodes = lock(&self.nodes);
        nodes.push(node);
        Ok(nodes.len() - 1)
    }

    /// Adds a node behind others of the graph.
    pub fn add_after(&self, op: Op, before: &[Handle]) -> Result<Handle> {
        let after = self.numbers_of(before)?;
        if (1..after.len()).any(|i| after[..i].contains(&after[i])) {
            return Err(Error::INVALID_VALUE);
        }
        let number = self.add(op, after)?;
        Ok(lock(&self.nodes)[number].handle)
    }

    /// Drops the graph and its nodes.
    pub fn destroy(&self) -> Result {
        let driver = driver()?;
        driver.graphs.remove(self.handle)?;
        for node in lock(&self.nodes).iter() {
            let _ = driver.nodes.remove(node.handle);
            if let Op::Child(child) = &node.op {
                child.destroy()?;
            }
        }
        Ok(())
    }

    pub fn instantiate(&self, flags: u64) -> Result<Arc<Exec>> {
        pool::may_instantiate(self)?;
        let nodes = Mutex::new(self.snapshot());
        let exec = Arc::new(Exec { handle: handles::fresh(), nodes, flags });
        driver()?.execs.insert(exec.handle, exec.clone());
        pool::instantiated(&exec);
        Ok(exec)
    }

    fn numbers_of(&self, handles: &[Handle]) -> Result<Vec<usize>> {
        let known = lock(&self.nodes);
        let number = |handle: &Handle| {
            known.iter().position(|node| node.handle == *handle).ok_or(Error::INVALID_VALUE)
        };
        handles.iter().map(number).collect()
    }

    fn handles_of(&self, numbers: &[usize]) -> Vec<Handle> {
        let nodes = lock(&self.nodes);
        numbers.iter().filter_map(|&number| nodes.get(number)).map(|node| node.handle).collect()
    }

    /// Whether every node of `of` is among `from` or comes before one of it.
    fn covers(&self, from: &[usize], of: &[usize]) -> bool {
        let nodes = lock(&self.nodes);
        let mut reached = vec![false; nodes.len()];
        let mut todo: Vec<usize> = from.to_vec();
        while let Some(number) = todo.pop() {
            if let Some(seen) = reached.get_mut(number)
                && !std::mem::replace(seen, true)
            {
                todo.extend(&nodes[number].after);
            }
        }
        of.iter().all(|&number| reached.get(number).copied().unwrap_or(false))
    }
}

/// `cuStreamBeginCapture`, into a new graph or behind nodes of one that there is.
pub fn begin(stream: &Arc<Stream>, mode: Mode, into: Option<(Arc<Graph>, &[Handle])>) -> Result {
    static IDS: AtomicU64 = AtomicU64::new(1);
    stream.usable()?;
    if stream.role == Role::Legacy {
        return Err(Error::STREAM_CAPTURE_UNSUPPORTED);
    }
    let mut part = lock(&stream.capture);
    if part.is_some() {
        return Err(Error::ILLEGAL_STATE);
    }
    let given = into.is_some();
    let (graph, tail) = match into {
        Some((graph, after)) => {
            let tail = graph.numbers_of(after)?;
            (graph, tail)
        }
        None => (Graph::create()?, Vec::new()),
    };
    let capture = Arc::new(Capture {
        id: IDS.fetch_add(1, SeqCst),
        mode,
        thread: this_thread(),
        origin: stream.handle,
        graph,
        given,
        invalidated: AtomicBool::new(false),
        streams: Mutex::new(vec![stream.clone()]),
    });
    lock(&stream.core.captures).push(capture.clone());
    stream.core.open_captures.fetch_add(1, SeqCst);
    *part = Some(Participation { capture, tail, shown: Arc::default() });
    stream.capturing.store(true, SeqCst);
    Ok(())
}

/// `cuStreamEndCapture`.
pub fn end(stream: &Arc<Stream>) -> Result<Arc<Graph>> {
    let part = lock(&stream.capture).clone().ok_or(Error::ILLEGAL_STATE)?;
    let capture = part.capture;
    if capture.origin != stream.handle {
        capture.invalidated.store(true, SeqCst);
        return Err(Error::STREAM_CAPTURE_UNMATCHED);
    }
    if capture.mode != Mode::Relaxed && this_thread() != capture.thread {
        return Err(Error::STREAM_CAPTURE_WRONG_THREAD);
    }
    let streams = std::mem::take(&mut *lock(&capture.streams));
    let mut joined = true;
    for other in &streams {
        if let Some(other) = lock(&other.capture).take() {
            joined &= capture.graph.covers(&part.tail, &other.tail);
        }
        other.capturing.store(false, SeqCst);
    }
    lock(&stream.core.captures).retain(|open| open.id != capture.id);
    stream.core.open_captures.fetch_sub(1, SeqCst);
    let verdict = if capture.invalidated.load(SeqCst) {
        Err(Error::STREAM_CAPTURE_INVALIDATED)
    } else if !joined {
        Err(Error::STREAM_CAPTURE_UNJOINED)
    } else {
        stream.core.healthy()
    };
    match verdict {
        Ok(()) => Ok(capture.graph.clone()),
        Err(error) => {
            if !capture.given {
                capture.graph.destroy()?;
            }
            Err(error)
        }
    }
}

/// A stream ends with its thread, and with it a capture that it has begun; one of another stream is ruined.
pub fn abandon(stream: &Arc<Stream>) {
    let Some(part) = lock(&stream.capture).clone() else { return };
    let capture = part.capture;
    capture.invalidated.store(true, SeqCst);
    if capture.origin != stream.handle {
        return;
    }
    for other in std::mem::take(&mut *lock(&capture.streams)) {
        lock(&other.capture).take();
        other.capturing.store(false, SeqCst);
    }
    lock(&stream.core.captures).retain(|open| open.id != capture.id);
    stream.core.open_captures.fetch_sub(1, SeqCst);
    if !capture.given {
        let _ = capture.graph.destroy();
    }
}

/// Adds an operation to the capture that the stream takes part in.
pub fn record(stream: &Arc<Stream>, op: Op) -> Result {
    let mut part = lock(&stream.capture);
    let part = part.as_mut().ok_or(Error::ILLEGAL_STATE)?;
    if part.capture.invalidated.load(SeqCst) {
        return Err(Error::STREAM_CAPTURE_INVALIDATED);
    }
    let number = part.capture.graph.add(op, std::mem::take(&mut part.tail))?;
    part.tail = vec![number];
    Ok(())
}

/// The capture that the stream takes part in, and where it has come to.
pub fn position(stream: &Stream) -> Result<(Arc<Capture>, Vec<usize>)> {
    let part = lock(&stream.capture).clone().ok_or(Error::ILLEGAL_STATE)?;
    if part.capture.invalidated.load(SeqCst) {
        return Err(Error::STREAM_CAPTURE_INVALIDATED);
    }
    Ok((part.capture, part.tail))
}

/// Lets the stream go on only after `tail`; it joins the capture if it doesn't take part yet.
pub fn join(stream: &Arc<Stream>, capture: &Arc<Capture>, tail: &[usize]) -> Result {
    if stream.role == Role::Legacy {
        capture.invalidated.store(true, SeqCst);
        return Err(Error::STREAM_CAPTURE_IMPLICIT);
    }
    if capture.invalidated.load(SeqCst) {
        return Err(Error::STREAM_CAPTURE_INVALIDATED);
    }
    let mut streams = lock(&capture.streams);
    if streams.is_empty() {
        // The capture has ended: its nodes mean nothing any more.
        return Err(Error::CAPTURED_EVENT);
    }
    let mut part = lock(&stream.capture);
    match &mut *part {
        Some(part) if part.capture.id != capture.id => {
            part.capture.invalidated.store(true, SeqCst);
            capture.invalidated.store(true, SeqCst);
            Err(Error::STREAM_CAPTURE_MERGE)
        }
        Some(part) => {
            part.tail.extend_from_slice(tail);
            part.tail.sort_unstable();
            part.tail.dedup();
            Ok(())
        }
        None => {
            *part =
                Some(Participation { capture: capture.clone(), tail: tail.to_vec(), shown: Arc::default() });
            stream.capturing.store(true, SeqCst);
            streams.push(stream.clone());
            Ok(())
        }
    }
}

/// What the stream's capture is up to.
pub fn status(stream: &Stream) -> Status {
    match &*lock(&stream.capture) {
        None => Status::None,
        Some(part) if part.capture.invalidated.load(SeqCst) => Status::Invalidated,
        Some(_) => Status::Active,
    }
}

/// The stream's part in a capture, with the handles of the tail's nodes kept alive for the caller.
pub fn show(stream: &Stream) -> Option<Participation> {
    let mut part = lock(&stream.capture);
    let part = part.as_mut()?;
    let nodes = part.capture.graph.handles_of(&part.tail);
    let edges = vec![GraphEdgeData::default(); nodes.len()];
    part.shown = Arc::new(Shown { nodes, edges });
    Some(part.clone())
}

/// Replaces the stream's dependencies, or adds to them (`cuStreamUpdateCaptureDependencies`).
pub fn update_tail(stream: &Stream, nodes: &[Handle], replace: bool) -> Result {
    let mut part = lock(&stream.capture);
    let part = part.as_mut().ok_or(Error::ILLEGAL_STATE)?;
    if part.capture.invalidated.load(SeqCst) {
        return Err(Error::STREAM_CAPTURE_INVALIDATED);
    }
    let known = lock(&part.capture.graph.nodes);
    let number =
        |handle: &Handle| known.iter().position(|node| node.handle == *handle).ok_or(Error::INVALID_VALUE);
    let numbers: Vec<usize> = nodes.iter().map(number).collect::<Result<_>>()?;
    drop(known);
    if replace {
        part.tail.clear();
    }
    part.tail.extend(numbers);
    part.tail.sort_unstable();
    part.tail.dedup();
    Ok(())
}

/// Ruins the capture that the stream takes part in.
pub fn invalidate(stream: &Stream) {
    if let Some(part) = &*lock(&stream.capture) {
        part.capture.invalidated.store(true, SeqCst);
    }
}

/// Ruins every capture of a context.
pub fn invalidate_all(core: &Core) {
    for capture in lock(&core.captures).iter() {
        capture.invalidated.store(true, SeqCst);
    }
}

/// Refuses the use of the legacy stream while a stream that it would have to wait for is captured.
pub fn refuse_implicit(core: &Core) -> Result {
    let captures = implicit(core);
    captures.iter().for_each(|capture| capture.invalidated.store(true, SeqCst));
    if captures.is_empty() { Ok(()) } else { Err(Error::STREAM_CAPTURE_IMPLICIT) }
}

/// The captures in which a stream takes part that the legacy stream would have to wait for.
pub fn implicit(core: &Core) -> Vec<Arc<Capture>> {
    let mut captures = lock(&core.captures).clone();
    captures.retain(|capture| lock(&capture.streams).iter().any(|stream| stream.blocking()));
    captures
}

/// Refuses a call that isn't safe during a capture, if this thread may not make it.
pub fn refuse_unsafe(core: &Core) -> Result {
    if core.open_captures.load(SeqCst) == 0 {
        return Ok(());
    }
    let thread = this_thread();
    let captures = lock(&core.captures).clone();
    let forbids = |capture: &&Arc<Capture>| match MODE.get() {
        Mode::Relaxed => false,
        Mode::ThreadLocal => capture.thread == thread && capture.mode != Mode::Relaxed,
        Mode::Global => {
            capture.mode == Mode::Global || capture.thread == thread && capture.mode == Mode::ThreadLocal
        }
    };
    match captures.iter().find(forbids) {
        Some(capture) => {
            capture.invalidated.store(true, SeqCst);
            Err(Error::STREAM_CAPTURE_UNSUPPORTED)
        }
        None => Ok(()),
    }
}
