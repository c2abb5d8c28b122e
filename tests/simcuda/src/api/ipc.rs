//! CUDA IPC: memory and events of other processes, by handles of 64 bytes.
//!
//! Only what `cuMemAlloc` made can be told of so. Mappings go by file descriptor (see the topic `vmm`), and asking for
//! an IPC handle of one fails, as with the real driver. Nor can a process open a handle of its own.

use std::ffi::c_uint;
use std::sync::Arc;

use super::{driver_api, memory};
use crate::abi::{Error, Handle, IpcHandle, Out, Result};
use crate::context;
use crate::driver::driver;
use crate::event::{self, Event};
use crate::handles;
use crate::ipc_event::SharedEvent;
use crate::memory::sharing;
use crate::memory::va::Kind;

driver_api! {
    /// Any address of the allocation will do; the handle is of all of it.
    fn cuIpcGetMemHandle(handle: Out<IpcHandle>, pointer: u64) {
        context::healthy()?;
        let driver = driver()?;
        handle.required()?;
        let physical = {
            let space = driver.memory.space.read().unwrap_or_else(|e| e.into_inner());
            match space.find(pointer) {
                Some((_, region)) => match &region.kind {
                    Kind::Allocation { physical, .. } => physical.clone(),
                    _ => return Err(Error::INVALID_VALUE),
                },
                None => return Err(Error::INVALID_VALUE),
            }
        };
        handle.set(sharing::ipc_handle(driver, &physical)?)
    }

    fn cuIpcOpenMemHandle(pointer: Out<u64>, handle: IpcHandle, flags: c_uint) {
        self::open(pointer, handle, flags)
    }

    fn cuIpcOpenMemHandle_v2(pointer: Out<u64>, handle: IpcHandle, flags: c_uint) {
        self::open(pointer, handle, flags)
    }

    fn cuIpcCloseMemHandle(pointer: u64) {
        let context = context::healthy()?;
        let space = &driver()?.memory.space;
        let left = space.write().unwrap_or_else(|e| e.into_inner()).close_once(pointer)?;
        match left {
            0 => memory::free(&context, pointer, |kind| matches!(kind, Kind::Opened { .. })),
            _ => Ok(()),
        }
    }

    fn cuIpcGetEventHandle(handle: Out<IpcHandle>, event: Handle) {
        let driver = driver()?;
        handle.required()?;
        let event = driver.events.get(event)?;
        handle.set(event.shared.as_ref().ok_or(Error::INVALID_HANDLE)?.handle(driver)?)
    }

    fn cuIpcOpenEventHandle(event: Out<Handle>, handle: IpcHandle) {
        let context = context::healthy()?;
        let driver = driver()?;
        event.required()?;
        let shared = SharedEvent::open(driver, &handle)?;
        let opened = handles::fresh();
        let flags = event::DISABLE_TIMING | event::INTERPROCESS;
        driver.events.insert(opened, Arc::new(Event::new(context.owner(), flags, Some(shared))));
        event.set(opened)
    }
}

fn open(pointer: Out<u64>, handle: IpcHandle, flags: c_uint) -> Result {
    const LAZY_ENABLE_PEER_ACCESS: c_uint = 1;
    let context = context::healthy()?;
    let driver = driver()?;
    pointer.required()?;
    if flags != LAZY_ENABLE_PEER_ACCESS {
        return Err(Error::INVALID_VALUE);
    }
    let (words, owner) = (handle.words(), context.owner());
    let mut space = driver.memory.space.write().unwrap_or_else(|e| e.into_inner());
    if let Some(address) = space.open_again(&words, owner) {
        return pointer.set(address);
    }
    let physical = Arc::new(sharing::open_ipc(driver, &handle)?);
    let by = context.core.device.index;
    let kind = Kind::Opened { _physical: physical.clone(), handle: words, references: 1, by };
    pointer.set(space.allocate(&physical, kind, physical.location.id as usize, owner)?)
}
