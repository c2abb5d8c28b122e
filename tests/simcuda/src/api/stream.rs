//! Streams, events and capture.

use std::ffi::{c_int, c_uint};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use super::driver_api;
use crate::abi::{Error, GraphEdgeData, Handle, HostFn, In, Out, Result, StreamCallback, UserData};
use crate::context::{self, Null};
use crate::driver::driver;
use crate::event::{self, Event};
use crate::graph::{self, Mode, Shown, Status};
use crate::handles;
use crate::ipc_event::SharedEvent;
use crate::op::Op;
use crate::stream::{Fence, Stream};

driver_api! {
    fn cuStreamCreate(stream: Out<Handle>, flags: c_uint) {
        stream.required()?;
        stream.set(context::create_stream(flags, 0)?)
    }

    fn cuStreamCreateWithPriority(stream: Out<Handle>, flags: c_uint, priority: c_int) {
        stream.required()?;
        stream.set(context::create_stream(flags, priority)?)
    }

    /// Work in the stream goes on.
    fn cuStreamDestroy_v2(stream: Handle) {
        let driver = driver()?;
        let found = driver.streams.get(stream)?;
        if found.capturing.load(SeqCst) {
            graph::invalidate(&found);
            return Err(Error::STREAM_CAPTURE_UNSUPPORTED);
        }
        found.core.healthy()?;
        driver.streams.remove(stream)?;
        found.close();
        Ok(())
    }

    fn cuStreamSynchronize / cuStreamSynchronize_ptsz |null| (stream: Handle) {
        let stream = self::outside_capture(null, stream)?;
        self::fences(&stream).iter().for_each(Fence::wait);
        crate::pool::synchronized();
        stream.core.healthy()
    }

    fn cuStreamQuery / cuStreamQuery_ptsz |null| (stream: Handle) {
        let stream = self::outside_capture(null, stream)?;
        let reached = self::fences(&stream).iter().all(Fence::reached);
        stream.core.healthy()?;
        if reached { Ok(()) } else { Err(Error::NOT_READY) }
    }

    fn cuStreamWaitEvent / cuStreamWaitEvent_ptsz |null| (stream: Handle, event: Handle, flags: c_uint) {
        if flags > 1 {
            return Err(Error::INVALID_VALUE);
        }
        let event = driver()?.events.get(event)?;
        event.wait_in(&context::stream(null, stream)?, flags == 1)
    }

    fn cuStreamGetFlags / cuStreamGetFlags_ptsz |null| (stream: Handle, flags: Out<c_uint>) {
        let stream = context::stream(null, stream)?;
        stream.core.healthy()?;
        flags.set(stream.flags)
    }

    fn cuStreamGetPriority / cuStreamGetPriority_ptsz |null| (stream: Handle, priority: Out<c_int>) {
        priority.set(context::stream(null, stream)?.priority)
    }

    fn cuStreamGetId / cuStreamGetId_ptsz |null| (stream: Handle, id: Out<u64>) {
        id.set(context::stream(null, stream)?.id)
    }

    fn cuStreamGetDevice / cuStreamGetDevice_ptsz |null| (stream: Handle, device: Out<c_int>) {
        device.set(context::stream(null, stream)?.core.device.index as c_int)
    }

    fn cuStreamGetCtx / cuStreamGetCtx_ptsz |null| (stream: Handle, context: Out<Handle>) {
        let stream = context::stream(null, stream)?;
        stream.core.healthy()?;
        context.set(stream.core.handle)
    }

    /// The primary context of a stream of a green context, and the green one.
    fn cuStreamGetCtx_v2 / cuStreamGetCtx_v2_ptsz |null| (stream: Handle, context: Out<Handle>, green: Out<Handle>) {
        let stream = context::stream(null, stream)?;
        stream.core.healthy()?;
        green.set_if_wanted(crate::api::green::of(stream.core.handle).unwrap_or(0));
        context.set_if_wanted(stream.core.owner);
        Ok(())
    }

    fn cuStreamGetGreenCtx(stream: Handle, green: Out<Handle>) {
        let stream = context::stream(Null::Legacy, stream)?;
        green.set(crate::api::green::of(stream.core.handle).unwrap_or(0))
    }

    fn cuLaunchHostFunc / cuLaunchHostFunc_ptsz |null| (stream: Handle, function: HostFn, data: UserData) {
        if function.is_none() {
            return Err(Error::INVALID_VALUE);
        }
        context::stream(null, stream)?.enqueue(Op::Host { function, data }).map(|_| ())
    }

    /// How the host waits for it is a hint.
    fn cuLaunchHostFunc_v2 / cuLaunchHostFunc_v2_ptsz |null| (
        stream: Handle, function: HostFn, data: UserData, waiting: c_uint,
    ) {
        if function.is_none() || waiting > 1 {
            return Err(Error::INVALID_VALUE);
        }
        context::stream(null, stream)?.enqueue(Op::Host { function, data }).map(|_| ())
    }

    fn cuStreamAddCallback / cuStreamAddCallback_ptsz |null| (
        stream: Handle, function: StreamCallback, data: UserData, flags: c_uint,
    ) {
        if function.is_none() || flags != 0 {
            return Err(Error::INVALID_VALUE);
        }
        let found = context::stream(null, stream)?;
        if found.capturing.load(SeqCst) {
            graph::invalidate(&found);
            return Err(Error::STREAM_CAPTURE_UNSUPPORTED);
        }
        found.enqueue(Op::Callback { function, stream, data }).map(|_| ())
    }

    fn cuEventCreate(event: Out<Handle>, flags: c_uint) {
        let context = context::healthy()?;
        event.required()?;
        let shared = flags & event::INTERPROCESS != 0;
        if flags & !event::KNOWN_FLAGS != 0 || shared && flags & event::DISABLE_TIMING == 0 {
            return Err(Error::INVALID_VALUE);
        }
        let driver = driver()?;
        let shared = if shared { Some(SharedEvent::create(driver)?) } else { None };
        let handle = handles::fresh();
        driver.events.insert(handle, Arc::new(Event::new(context.owner(), flags, shared)));
        event.set(handle)
    }

    fn cuEventDestroy_v2(event: Handle) {
        driver()?.events.remove(event).map(|_| ())
    }

    fn cuEventRecord / cuEventRecord_ptsz |null| (event: Handle, stream: Handle) {
        self::record(null, event, stream, 0)
    }

    fn cuEventRecordWithFlags / cuEventRecordWithFlags_ptsz |null| (event: Handle, stream: Handle, flags: c_uint) {
        self::record(null, event, stream, flags)
    }

    /// Not safe during a capture of a mode that forbids it, as NCCL's watchdog has taught everybody.
    fn cuEventQuery(event: Handle) {
        let event = driver()?.events.get(event)?;
        if let Ok(context) = context::by_handle(event.context) {
            graph::refuse_unsafe(&context.core)?;
            context.core.healthy()?;
        }
        event.query()
    }

    fn cuEventSynchronize(event: Handle) {
        driver()?.events.get(event)?.synchronize().inspect(|()| crate::pool::synchronized())
    }

    fn cuEventElapsedTime(ms: Out<f32>, start: Handle, end: Handle) {
        self::elapsed(ms, start, end)
    }

    fn cuEventElapsedTime_v2(ms: Out<f32>, start: Handle, end: Handle) {
        self::elapsed(ms, start, end)
    }

    fn cuStreamBeginCapture_v2 / cuStreamBeginCapture_v2_ptsz |null| (stream: Handle, mode: c_uint) {
        graph::begin(&context::stream(null, stream)?, Mode::from_raw(mode)?, None)
    }

    fn cuStreamBeginCaptureToGraph / cuStreamBeginCaptureToGraph_ptsz |null| (
        stream: Handle, graph: Handle, dependencies: In<Handle>, edges: In<GraphEdgeData>, count: usize, mode: c_uint,
    ) {
        if !edges.is_null() {
            return Err(Error::NOT_SUPPORTED);
        }
        let after = if count == 0 { Vec::new() } else { dependencies.to_vec(count)? };
        let graph = driver()?.graphs.get(graph)?;
        graph::begin(&context::stream(null, stream)?, Mode::from_raw(mode)?, Some((graph, &after)))
    }

    fn cuStreamEndCapture / cuStreamEndCapture_ptsz |null| (stream: Handle, graph: Out<Handle>) {
        graph.required()?;
        graph.set(0)?;
        let ended = graph::end(&context::stream(null, stream)?)?;
        graph.set(ended.handle)
    }

    /// Of the legacy stream it is refused while one captures that it would have to wait for; no capture is ruined by that.
    fn cuStreamIsCapturing / cuStreamIsCapturing_ptsz |null| (stream: Handle, status: Out<c_uint>) {
        let stream = context::stream(null, stream)?;
        stream.exists()?;
        if stream.role == crate::stream::Role::Legacy && !graph::implicit(&stream.core).is_empty() {
            return Err(Error::STREAM_CAPTURE_IMPLICIT);
        }
        status.set(graph::status(&stream) as c_uint)
    }

    fn cuStreamGetCaptureInfo_v2 / cuStreamGetCaptureInfo_v2_ptsz |null| (
        stream: Handle, status: Out<c_uint>, id: Out<u64>, graph: Out<Handle>, dependencies: Out<*const Handle>,
        count: Out<usize>,
    ) {
        self::capture_info(null, stream, status, id, graph, dependencies, count).map(|_| ())
    }

    fn cuStreamGetCaptureInfo_v3 / cuStreamGetCaptureInfo_v3_ptsz |null| (
        stream: Handle, status: Out<c_uint>, id: Out<u64>, graph: Out<Handle>, dependencies: Out<*const Handle>,
        edges: Out<*const GraphEdgeData>, count: Out<usize>,
    ) {
        if let Some(shown) = self::capture_info(null, stream, status, id, graph, dependencies, count)? {
            edges.set_if_wanted(shown.edges.as_ptr());
        }
        Ok(())
    }

    fn cuStreamUpdateCaptureDependencies_v2 / cuStreamUpdateCaptureDependencies_v2_ptsz |null| (
        stream: Handle, dependencies: In<Handle>, edges: In<GraphEdgeData>, count: usize, flags: c_uint,
    ) {
        if !edges.is_null() {
            return Err(Error::NOT_SUPPORTED);
        }
        self::update_dependencies(null, stream, dependencies, count, flags)
    }

    fn cuStreamUpdateCaptureDependencies / cuStreamUpdateCaptureDependencies_ptsz |null| (
        stream: Handle, dependencies: In<Handle>, count: usize, flags: c_uint,
    ) {
        self::update_dependencies(null, stream, dependencies, count, flags)
    }

    fn cuThreadExchangeStreamCaptureMode(mode: Out<c_uint>) {
        driver()?;
        let old = graph::exchange_mode(Mode::from_raw(mode.get()?)?);
        mode.set(old as c_uint)
    }
}

/// A stream that may be asked and waited for; a capture that it takes part in is ruined.
fn outside_capture(null: Null, stream: Handle) -> Result<Arc<Stream>> {
    let stream = context::stream(null, stream)?;
    stream.usable()?;
    if stream.capturing.load(SeqCst) {
        graph::invalidate(&stream);
        return Err(Error::STREAM_CAPTURE_UNSUPPORTED);
    }
    Ok(stream)
}

/// What waiting for a stream means: for the legacy stream, also the streams that it is ordered with.
fn fences(stream: &Arc<Stream>) -> Vec<Fence> {
    let mut fences = vec![Fence::of(stream)];
    if stream.role == crate::stream::Role::Legacy {
        fences.extend(stream.core.live_streams().iter().filter(|other| other.blocking()).map(Fence::of));
    }
    fences
}

fn record(null: Null, event: Handle, stream: Handle, flags: c_uint) -> Result {
    if flags > 1 {
        return Err(Error::INVALID_VALUE);
    }
    let event = driver()?.events.get(event)?;
    context::with_stream(null, stream, |stream| {
        if stream.core.owner != event.context {
            return Err(Error::INVALID_HANDLE);
        }
        event.record(stream, flags == 1)
    })
}

fn elapsed(ms: Out<f32>, start: Handle, end: Handle) -> Result {
    let events = &driver()?.events;
    let (start, end) = (events.get(start)?.time()?, events.get(end)?.time()?);
    ms.set((end as i64 - start as i64) as f32 / 1e6)
}

fn capture_info(
    null: Null,
    stream: Handle,
    status: Out<c_uint>,
    id: Out<u64>,
    graph: Out<Handle>,
    dependencies: Out<*const Handle>,
    count: Out<usize>,
) -> Result<Option<Arc<Shown>>> {
    let stream = context::stream(null, stream)?;
    stream.usable()?;
    let now = graph::status(&stream);
    status.set(now as c_uint)?;
    if now == Status::Active
        && let Some(part) = graph::show(&stream)
    {
        id.set_if_wanted(part.capture.id);
        graph.set_if_wanted(part.capture.graph.handle);
        dependencies.set_if_wanted(part.shown.nodes.as_ptr());
        count.set_if_wanted(part.shown.nodes.len());
        return Ok(Some(part.shown));
    }
    Ok(None)
}

fn update_dependencies(
    null: Null,
    stream: Handle,
    dependencies: In<Handle>,
    count: usize,
    flags: c_uint,
) -> Result {
    if flags > 1 {
        return Err(Error::INVALID_VALUE);
    }
    let nodes = if count == 0 { Vec::new() } else { dependencies.to_vec(count)? };
    graph::update_tail(&*context::stream(null, stream)?, &nodes, flags == 1)
}
