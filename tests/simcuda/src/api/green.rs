//! Green contexts: contexts that share everything with the GPU's primary one but the streams, and a part of the
//! multiprocessors, which makes no difference here.

use std::ffi::{c_int, c_uint};
use std::sync::Arc;

use super::{device, driver_api};
use crate::abi::{DevResource, Error, Handle, In, Out, Result};
use crate::context::{self, Context};
use crate::driver::driver;
use crate::event::Event;
use crate::handles;
use crate::stream::{Fence, NON_BLOCKING};

const SM: c_uint = 1;
const DEFAULT_STREAM: c_uint = 1;

/// Multiprocessors of the simulated GPU, as its attribute says.
const MULTIPROCESSORS: u32 = 40;

driver_api! {
    fn cuDeviceGetDevResource(device: c_int, resource: Out<DevResource>, kind: c_uint) {
        driver()?.device(device)?;
        self::tell(resource, kind)
    }

    fn cuCtxGetDevResource(context: Handle, resource: Out<DevResource>, kind: c_uint) {
        context::by_handle(context)?;
        self::tell(resource, kind)
    }

    fn cuGreenCtxGetDevResource(green: Handle, resource: Out<DevResource>, kind: c_uint) {
        self::by_handle(green)?;
        self::tell(resource, kind)
    }

    /// As many groups of `least` multiprocessors as were asked for, or as there are.
    fn cuDevSmResourceSplitByCount(
        groups: Out<DevResource>, count: Out<c_uint>, whole: In<DevResource>, rest: Out<DevResource>, flags: c_uint,
        least: c_uint,
    ) {
        let whole = whole.get()?;
        let each = least.max(1);
        if whole.kind != SM || flags > 3 || each > whole.multiprocessors {
            return Err(Error::INVALID_VALUE);
        }
        let most = whole.multiprocessors / each;
        let made = if groups.is_null() { most } else { count.get()?.min(most) };
        groups.fill(std::iter::repeat_n(DevResource::of(SM, each), made as usize), made as usize);
        rest.set_if_wanted(DevResource::of(SM, whole.multiprocessors - made * each));
        count.set(made)
    }

    fn cuDevResourceGenerateDesc(description: Out<Handle>, resources: In<DevResource>, count: c_uint) {
        description.required()?;
        let resources = resources.to_vec(count as usize)?;
        let first = *resources.first().ok_or(Error::INVALID_VALUE)?;
        if resources.iter().any(|resource| resource.kind != SM) {
            return Err(Error::INVALID_RESOURCE_TYPE);
        }
        let handle = handles::fresh();
        driver()?.resources.insert(handle, Arc::new(first));
        description.set(handle)
    }

    /// It retains the primary context, for as long as it is there.
    fn cuGreenCtxCreate(green: Out<Handle>, description: Handle, device: c_int, flags: c_uint) {
        let driver = driver()?;
        let device = driver.device(device)?;
        green.required()?;
        driver.resources.get(description).map_err(|_| Error::INVALID_VALUE)?;
        if flags & !DEFAULT_STREAM != 0 {
            return Err(Error::INVALID_VALUE);
        }
        let context = Context::create_green(&*device::retain(device)?)?;
        let handle = handles::fresh();
        driver.greens.insert(handle, context);
        green.set(handle)
    }

    fn cuGreenCtxDestroy(green: Handle) {
        let context = self::by_handle(green)?;
        driver()?.greens.remove(green)?;
        context.destroy_green()?;
        device::release(context.core.device.index as c_int)
    }

    fn cuCtxFromGreenCtx(context: Out<Handle>, green: Handle) {
        context.set(self::by_handle(green)?.handle())
    }

    /// "This must be specified" is said of the flag.
    fn cuGreenCtxStreamCreate(stream: Out<Handle>, green: Handle, flags: c_uint, priority: c_int) {
        stream.required()?;
        if flags != NON_BLOCKING {
            return Err(Error::INVALID_VALUE);
        }
        stream.set(context::create_stream_in(&*self::by_handle(green)?, flags, priority)?)
    }

    /// Behind everything that was submitted in the green context, in whichever stream.
    fn cuGreenCtxRecordEvent(green: Handle, event: Handle) {
        let (context, event) = self::with_event(green, event)?;
        event.record_after(&context.legacy, context.core.live_streams().iter().map(Fence::of).collect())
    }

    fn cuGreenCtxWaitEvent(green: Handle, event: Handle) {
        let (context, event) = self::with_event(green, event)?;
        context.core.live_streams().iter().try_for_each(|stream| event.wait_in(stream, false))
    }

    fn cuGreenCtxGetId(green: Handle, id: Out<u64>) {
        id.set(self::by_handle(green)?.id)
    }
}

fn by_handle(green: Handle) -> Result<Arc<Context>> {
    driver()?.greens.get(green).map_err(|_| Error::INVALID_CONTEXT)
}

/// The green context behind a context's handle.
pub(super) fn of(context: Handle) -> Option<Handle> {
    driver().ok()?.greens.find(|green| green.handle() == context)
}

fn tell(resource: Out<DevResource>, kind: c_uint) -> Result {
    if kind != SM {
        return Err(Error::INVALID_RESOURCE_TYPE);
    }
    resource.set(DevResource::of(SM, MULTIPROCESSORS))
}

/// A green context and an event of the same primary context. A capture that is open in the green one is in the way.
fn with_event(green: Handle, event: Handle) -> Result<(Arc<Context>, Arc<Event>)> {
    let (context, event) = (by_handle(green)?, driver()?.events.get(event)?);
    if event.context != context.owner() {
        return Err(Error::INVALID_HANDLE);
    }
    if context.core.open_captures.load(std::sync::atomic::Ordering::SeqCst) > 0 {
        return Err(Error::STREAM_CAPTURE_UNSUPPORTED);
    }
    Ok((context, event))
}
