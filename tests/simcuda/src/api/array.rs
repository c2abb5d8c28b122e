//! Arrays, copies with them, textures and surfaces.

use std::ffi::{c_int, c_uint};
use std::sync::Arc;

use super::{copy, driver_api};
use crate::abi::{
    Array3DDescriptor, ArrayDescriptor, ArrayRequirements, Error, Handle, In, Out, ResourceDesc, Result,
};
use crate::array::{self, Array, Mipmap, Object};
use crate::context;
use crate::driver::driver;
use crate::graph;
use crate::handles;
use crate::memory::access::Side;
use crate::op::Copy;

driver_api! {
    fn cuArrayCreate_v2(array: Out<Handle>, descriptor: In<ArrayDescriptor>) {
        let ArrayDescriptor { width, height, format, channels } = descriptor.get()?;
        self::create(array, Array3DDescriptor { width, height, depth: 0, format, channels, flags: 0 })
    }

    fn cuArray3DCreate_v2(array: Out<Handle>, descriptor: In<Array3DDescriptor>) {
        self::create(array, descriptor.get()?)
    }

    fn cuArrayGetDescriptor_v2(descriptor: Out<ArrayDescriptor>, array: Handle) {
        let Array3DDescriptor { width, height, format, channels, .. } = self::find(array)?.descriptor;
        descriptor.set(ArrayDescriptor { width, height, format, channels })
    }

    fn cuArray3DGetDescriptor_v2(descriptor: Out<Array3DDescriptor>, array: Handle) {
        descriptor.set(self::find(array)?.descriptor)
    }

    fn cuArrayGetMemoryRequirements(requirements: Out<ArrayRequirements>, array: Handle, device: c_int) {
        driver()?.device(device)?;
        let size = self::find(array)?.size as usize;
        requirements.set(ArrayRequirements { size, alignment: 64 << 10, reserved: [0; 4] })
    }

    /// Not a level of a mipmapped array. Waits for the work of the context, as freeing memory does.
    fn cuArrayDestroy(array: Handle) {
        let context = context::healthy()?;
        graph::refuse_unsafe(&context.core)?;
        let found = self::find(array)?;
        if found.level_of != 0 {
            return Err(Error::INVALID_HANDLE);
        }
        array::destroy(&context, &found)
    }

    fn cuMipmappedArrayCreate(mipmap: Out<Handle>, descriptor: In<Array3DDescriptor>, levels: c_uint) {
        let context = context::healthy()?;
        mipmap.required()?;
        graph::refuse_unsafe(&context.core)?;
        mipmap.set(Mipmap::create(&context, descriptor.get()?, levels)?.handle)
    }

    fn cuMipmappedArrayGetLevel(array: Out<Handle>, mipmap: Handle, level: c_uint) {
        let found = driver()?.mipmaps.get(mipmap)?;
        array.set(found.levels.get(level as usize).ok_or(Error::INVALID_VALUE)?.handle)
    }

    fn cuMipmappedArrayDestroy(mipmap: Handle) {
        let context = context::healthy()?;
        graph::refuse_unsafe(&context.core)?;
        let found = driver()?.mipmaps.remove(mipmap)?;
        found.levels.iter().try_for_each(|level| array::destroy(&context, level))
    }

    fn cuMemcpyHtoA_v2 / cuMemcpyHtoA_v2_ptds |null| (dst: Handle, offset: usize, src: u64, bytes: usize) {
        let dst = self::end(dst, offset, bytes)?;
        copy::now(null, Copy::linear(dst, (src, Side::Host), bytes as u64))
    }

    fn cuMemcpyAtoH_v2 / cuMemcpyAtoH_v2_ptds |null| (dst: u64, src: Handle, offset: usize, bytes: usize) {
        let src = self::end(src, offset, bytes)?;
        copy::now(null, Copy::linear((dst, Side::Host), src, bytes as u64))
    }

    fn cuMemcpyDtoA_v2 / cuMemcpyDtoA_v2_ptds |null| (dst: Handle, offset: usize, src: u64, bytes: usize) {
        let dst = self::end(dst, offset, bytes)?;
        copy::now(null, Copy::linear(dst, (src, Side::Device), bytes as u64))
    }

    fn cuMemcpyAtoD_v2 / cuMemcpyAtoD_v2_ptds |null| (dst: u64, src: Handle, offset: usize, bytes: usize) {
        let src = self::end(src, offset, bytes)?;
        copy::now(null, Copy::linear((dst, Side::Device), src, bytes as u64))
    }

    fn cuMemcpyAtoA_v2 / cuMemcpyAtoA_v2_ptds |null| (
        dst: Handle, to: usize, src: Handle, from: usize, bytes: usize,
    ) {
        let (dst, src) = (self::end(dst, to, bytes)?, self::end(src, from, bytes)?);
        copy::now(null, Copy::linear(dst, src, bytes as u64))
    }

    fn cuMemcpyHtoAAsync_v2 / cuMemcpyHtoAAsync_v2_ptsz |null| (
        dst: Handle, offset: usize, src: u64, bytes: usize, stream: Handle,
    ) {
        let dst = self::end(dst, offset, bytes)?;
        copy::later(null, stream, Copy::linear(dst, (src, Side::Host), bytes as u64))
    }

    fn cuMemcpyAtoHAsync_v2 / cuMemcpyAtoHAsync_v2_ptsz |null| (
        dst: u64, src: Handle, offset: usize, bytes: usize, stream: Handle,
    ) {
        let src = self::end(src, offset, bytes)?;
        copy::later(null, stream, Copy::linear((dst, Side::Host), src, bytes as u64))
    }

    fn cuTexObjectCreate(
        object: Out<u64>, resource: In<ResourceDesc>, texture: In<[u32; 26]>, view: In<[u64; 14]>,
    ) {
        object.required()?;
        let resource = resource.get()?;
        self::check(&resource, false)?;
        let view = if view.is_null() { None } else { Some(view.get()?) };
        object.set(self::keep(resource, Some(texture.get()?), view)?)
    }

    fn cuTexObjectDestroy(object: u64) {
        self::drop_object(object, true)
    }

    fn cuTexObjectGetResourceDesc(resource: Out<ResourceDesc>, object: u64) {
        resource.set(self::object(object, true)?.resource)
    }

    fn cuTexObjectGetTextureDesc(texture: Out<[u32; 26]>, object: u64) {
        texture.set(self::object(object, true)?.texture.ok_or(Error::INVALID_VALUE)?)
    }

    fn cuTexObjectGetResourceViewDesc(view: Out<[u64; 14]>, object: u64) {
        view.set(self::object(object, true)?.view.ok_or(Error::INVALID_VALUE)?)
    }

    fn cuSurfObjectCreate(object: Out<u64>, resource: In<ResourceDesc>) {
        object.required()?;
        let resource = resource.get()?;
        self::check(&resource, true)?;
        object.set(self::keep(resource, None, None)?)
    }

    fn cuSurfObjectDestroy(object: u64) {
        self::drop_object(object, false)
    }

    fn cuSurfObjectGetResourceDesc(resource: Out<ResourceDesc>, object: u64) {
        resource.set(self::object(object, false)?.resource)
    }
}

fn create(array: Out<Handle>, descriptor: Array3DDescriptor) -> Result {
    let context = context::healthy()?;
    array.required()?;
    graph::refuse_unsafe(&context.core)?;
    array.set(Array::create(&context, descriptor, 0)?.handle)
}

fn find(array: Handle) -> Result<Arc<Array>> {
    driver()?.arrays.get(array)
}

/// An end of a copy that is part of an array.
fn end(array: Handle, offset: usize, bytes: usize) -> Result<(u64, Side)> {
    Ok((self::find(array)?.linear(offset, bytes)?, Side::Array))
}

/// Whether there is what the object is to be made of. A surface is an array that was made for it.
fn check(resource: &ResourceDesc, surface: bool) -> Result {
    const ARRAY: c_uint = 0;
    const MIPMAP: c_uint = 1;
    const LINEAR: c_uint = 2;
    const PITCH_2D: c_uint = 3;
    if resource.flags != 0 {
        return Err(Error::INVALID_VALUE);
    }
    let driver = driver()?;
    let handle = resource.words[0] as Handle;
    match resource.kind {
        ARRAY => {
            let flags = driver.arrays.get(handle)?.descriptor.flags;
            if surface && flags & array::SURFACE_LDST == 0 { Err(Error::INVALID_VALUE) } else { Ok(()) }
        }
        MIPMAP if !surface => driver.mipmaps.get(handle).map(|_| ()),
        LINEAR | PITCH_2D if !surface => {
            let format = resource.words[1];
            array::element(format as u32, (format >> 32) as u32)?;
            let space = driver.memory.space.read().unwrap_or_else(|e| e.into_inner());
            space.find(resource.words[0]).map(|_| ()).ok_or(Error::INVALID_VALUE)
        }
        _ => Err(Error::INVALID_VALUE),
    }
}

fn keep(resource: ResourceDesc, texture: Option<[u32; 26]>, view: Option<[u64; 14]>) -> Result<u64> {
    let context = context::healthy()?.owner();
    let handle = handles::fresh();
    driver()?.objects.insert(handle, Arc::new(Object { context, resource, texture, view }));
    Ok(handle as u64)
}

fn object(object: u64, texture: bool) -> Result<Arc<Object>> {
    let found = driver()?.objects.get(object as Handle).map_err(|_| Error::INVALID_VALUE)?;
    if found.texture.is_some() == texture { Ok(found) } else { Err(Error::INVALID_VALUE) }
}

fn drop_object(handle: u64, texture: bool) -> Result {
    self::object(handle, texture)?;
    driver()?.objects.remove(handle as Handle).map(|_| ())
}
