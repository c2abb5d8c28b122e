//! Contexts.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::atomic::Ordering::SeqCst;

use super::driver_api;
use crate::abi::{Error, Handle, In, Out, Result};
use crate::context::{self, Context};
use crate::driver::driver;
use crate::stream::{GREATEST_PRIORITY, LEAST_PRIORITY};

driver_api! {
    fn cuCtxCreate_v2(context: Out<Handle>, flags: c_uint, device: c_int) {
        self::create(context, flags, device)
    }

    fn cuCtxCreate_v3(context: Out<Handle>, affinity: In<c_void>, count: c_int, flags: c_uint, device: c_int) {
        if count != 0 || !affinity.is_null() {
            return Err(Error::NOT_SUPPORTED);
        }
        self::create(context, flags, device)
    }

    fn cuCtxCreate_v4(context: Out<Handle>, params: In<c_void>, flags: c_uint, device: c_int) {
        if !params.is_null() {
            return Err(Error::NOT_SUPPORTED);
        }
        self::create(context, flags, device)
    }

    fn cuCtxDestroy_v2(context: Handle) {
        self::destroy(context)
    }

    /// Of the current context, one more use of it.
    fn cuCtxAttach(context: Out<Handle>, flags: c_uint) {
        if flags != 0 {
            return Err(Error::INVALID_VALUE);
        }
        let current = context::current()?;
        context.required()?;
        current.usage.fetch_add(1, SeqCst);
        context.set(current.handle())
    }

    fn cuCtxDetach(context: Handle) {
        let found = context::by_handle(context)?;
        if found.primary || context::current_handle() != context {
            return Err(Error::INVALID_CONTEXT);
        }
        match found.usage.fetch_sub(1, SeqCst) {
            1 => self::destroy(context),
            _ => Ok(()),
        }
    }

    fn cuCtxPushCurrent_v2(context: Handle) {
        context::push(context::by_handle(context)?);
        Ok(())
    }

    fn cuCtxPopCurrent_v2(context: Out<Handle>) {
        driver()?;
        context.set_if_wanted(context::pop()?);
        Ok(())
    }

    fn cuCtxSetCurrent(context: Handle) {
        driver()?;
        context::set_current(context)
    }

    fn cuCtxGetCurrent(context: Out<Handle>) {
        driver()?;
        context.set(context::current_handle())
    }

    fn cuCtxGetDevice(device: Out<c_int>) {
        device.set(context::current()?.core.device.index as c_int)
    }

    fn cuCtxGetDevice_v2(device: Out<c_int>, context: Handle) {
        device.set(context::by_handle_or_current(context)?.core.device.index as c_int)
    }

    fn cuCtxGetFlags(flags: Out<c_uint>) {
        flags.set(context::current()?.flags.load(SeqCst))
    }

    fn cuCtxSetFlags(flags: c_uint) {
        context::current()?.flags.store(flags, SeqCst);
        Ok(())
    }

    fn cuCtxGetId(context: Handle, id: Out<u64>) {
        id.set(context::by_handle_or_current(context)?.id)
    }

    fn cuCtxSynchronize() {
        context::current()?.synchronize()
    }

    fn cuCtxSynchronize_v2(context: Handle) {
        context::by_handle_or_current(context)?.synchronize()
    }

    fn cuCtxGetApiVersion(context: Handle, version: Out<c_uint>) {
        context::by_handle_or_current(context)?;
        version.set(3020)
    }

    fn cuCtxGetStreamPriorityRange(least: Out<c_int>, greatest: Out<c_int>) {
        context::current()?;
        least.set_if_wanted(LEAST_PRIORITY);
        greatest.set_if_wanted(GREATEST_PRIORITY);
        Ok(())
    }

    fn cuCtxGetLimit(value: Out<usize>, limit: c_uint) {
        let context = context::current()?;
        let limit = context.limits.get(limit as usize).filter(|_| limit < 8);
        value.set(limit.ok_or(Error::UNSUPPORTED_LIMIT)?.load(SeqCst) as usize)
    }

    fn cuCtxSetLimit(limit: c_uint, value: usize) {
        let context = context::current()?;
        let limit = context.limits.get(limit as usize).filter(|_| limit < 7);
        limit.ok_or(Error::UNSUPPORTED_LIMIT)?.store(value as u64, SeqCst);
        Ok(())
    }

    fn cuCtxGetCacheConfig(config: Out<c_uint>) {
        config.set(context::current()?.cache_config.load(SeqCst))
    }

    fn cuCtxSetCacheConfig(config: c_uint) {
        if config > 3 {
            return Err(Error::INVALID_VALUE);
        }
        context::current()?.cache_config.store(config, SeqCst);
        Ok(())
    }

    fn cuCtxResetPersistingL2Cache() {
        context::current().map(|_| ())
    }
}

fn destroy(context: Handle) -> Result {
    let found = context::by_handle(context)?;
    if found.primary {
        return Err(Error::INVALID_CONTEXT);
    }
    if context::current_handle() == context {
        context::pop()?;
    }
    found.destroy()
}

fn create(out: Out<Handle>, flags: c_uint, device: c_int) -> Result {
    out.required()?;
    let context = Context::create(driver()?.device(device)?, None, flags)?;
    let handle = context.handle();
    context::push(context);
    out.set(handle)
}
