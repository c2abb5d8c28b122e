//! Copies and memsets.
//!
//! Synchronous ones are operations in the null stream that the caller waits for. Asynchronous copies with pageable
//! memory are waited for too, as the real driver copies such memory before it returns.

use std::ffi::c_uint;

use super::driver_api;
use crate::abi::{
    Error, Handle, In, MEMORYTYPE_ARRAY, MEMORYTYPE_DEVICE, MEMORYTYPE_HOST, MEMORYTYPE_UNIFIED, Memcpy2D,
    Memcpy3D, Result,
};
use crate::context::{self, Null};
use crate::driver::driver;
use crate::memory::access::Side;
use crate::memory::va::{Kind, Region};
use crate::op::{Copy, Op, Set};

driver_api! {
    fn cuMemcpy / cuMemcpy_ptds |null| (dst: u64, src: u64, bytes: usize) {
        now(null, Copy::linear((dst, Side::Host), (src, Side::Host), bytes as u64))
    }

    fn cuMemcpyAsync / cuMemcpyAsync_ptsz |null| (dst: u64, src: u64, bytes: usize, stream: Handle) {
        later(null, stream, Copy::linear((dst, Side::Host), (src, Side::Host), bytes as u64))
    }

    fn cuMemcpyHtoD_v2 / cuMemcpyHtoD_v2_ptds |null| (dst: u64, src: u64, bytes: usize) {
        now(null, Copy::linear((dst, Side::Device), (src, Side::Host), bytes as u64))
    }

    fn cuMemcpyDtoH_v2 / cuMemcpyDtoH_v2_ptds |null| (dst: u64, src: u64, bytes: usize) {
        now(null, Copy::linear((dst, Side::Host), (src, Side::Device), bytes as u64))
    }

    fn cuMemcpyDtoD_v2 / cuMemcpyDtoD_v2_ptds |null| (dst: u64, src: u64, bytes: usize) {
        now(null, Copy::linear((dst, Side::Device), (src, Side::Device), bytes as u64))
    }

    fn cuMemcpyHtoDAsync_v2 / cuMemcpyHtoDAsync_v2_ptsz |null| (dst: u64, src: u64, bytes: usize, stream: Handle) {
        later(null, stream, Copy::linear((dst, Side::Device), (src, Side::Host), bytes as u64))
    }

    fn cuMemcpyDtoHAsync_v2 / cuMemcpyDtoHAsync_v2_ptsz |null| (dst: u64, src: u64, bytes: usize, stream: Handle) {
        later(null, stream, Copy::linear((dst, Side::Host), (src, Side::Device), bytes as u64))
    }

    fn cuMemcpyDtoDAsync_v2 / cuMemcpyDtoDAsync_v2_ptsz |null| (dst: u64, src: u64, bytes: usize, stream: Handle) {
        later(null, stream, Copy::linear((dst, Side::Device), (src, Side::Device), bytes as u64))
    }

    fn cuMemcpy2D_v2 / cuMemcpy2D_v2_ptds |null| (copy: In<Memcpy2D>) {
        now(null, self::plane(&copy.get()?)?)
    }

    fn cuMemcpy2DUnaligned_v2 / cuMemcpy2DUnaligned_v2_ptds |null| (copy: In<Memcpy2D>) {
        now(null, self::plane(&copy.get()?)?)
    }

    fn cuMemcpy2DAsync_v2 / cuMemcpy2DAsync_v2_ptsz |null| (copy: In<Memcpy2D>, stream: Handle) {
        later(null, stream, self::plane(&copy.get()?)?)
    }

    fn cuMemcpy3D_v2 / cuMemcpy3D_v2_ptds |null| (copy: In<Memcpy3D>) {
        now(null, self::space(&copy.get()?)?)
    }

    fn cuMemcpy3DAsync_v2 / cuMemcpy3DAsync_v2_ptsz |null| (copy: In<Memcpy3D>, stream: Handle) {
        later(null, stream, self::space(&copy.get()?)?)
    }

    fn cuMemsetD8_v2 / cuMemsetD8_v2_ptds |null| (dst: u64, value: u8, n: usize) {
        set_now(null, set(dst, value.into(), 1, n, 1, 0)?)
    }

    fn cuMemsetD16_v2 / cuMemsetD16_v2_ptds |null| (dst: u64, value: u16, n: usize) {
        set_now(null, set(dst, value.into(), 2, n, 1, 0)?)
    }

    fn cuMemsetD32_v2 / cuMemsetD32_v2_ptds |null| (dst: u64, value: c_uint, n: usize) {
        set_now(null, set(dst, value, 4, n, 1, 0)?)
    }

    fn cuMemsetD2D8_v2 / cuMemsetD2D8_v2_ptds |null| (dst: u64, pitch: usize, value: u8, width: usize, height: usize) {
        set_now(null, set(dst, value.into(), 1, width, height, pitch)?)
    }

    fn cuMemsetD2D16_v2 / cuMemsetD2D16_v2_ptds |null| (
        dst: u64, pitch: usize, value: u16, width: usize, height: usize,
    ) {
        set_now(null, set(dst, value.into(), 2, width, height, pitch)?)
    }

    fn cuMemsetD2D32_v2 / cuMemsetD2D32_v2_ptds |null| (
        dst: u64, pitch: usize, value: c_uint, width: usize, height: usize,
    ) {
        set_now(null, set(dst, value, 4, width, height, pitch)?)
    }

    fn cuMemsetD8Async / cuMemsetD8Async_ptsz |null| (dst: u64, value: u8, n: usize, stream: Handle) {
        set_later(null, stream, set(dst, value.into(), 1, n, 1, 0)?)
    }

    fn cuMemsetD16Async / cuMemsetD16Async_ptsz |null| (dst: u64, value: u16, n: usize, stream: Handle) {
        set_later(null, stream, set(dst, value.into(), 2, n, 1, 0)?)
    }

    fn cuMemsetD32Async / cuMemsetD32Async_ptsz |null| (dst: u64, value: c_uint, n: usize, stream: Handle) {
        set_later(null, stream, set(dst, value, 4, n, 1, 0)?)
    }

    fn cuMemsetD2D8Async / cuMemsetD2D8Async_ptsz |null| (
        dst: u64, pitch: usize, value: u8, width: usize, height: usize, stream: Handle,
    ) {
        set_later(null, stream, set(dst, value.into(), 1, width, height, pitch)?)
    }

    fn cuMemsetD2D16Async / cuMemsetD2D16Async_ptsz |null| (
        dst: u64, pitch: usize, value: u16, width: usize, height: usize, stream: Handle,
    ) {
        set_later(null, stream, set(dst, value.into(), 2, width, height, pitch)?)
    }

    fn cuMemsetD2D32Async / cuMemsetD2D32Async_ptsz |null| (
        dst: u64, pitch: usize, value: c_uint, width: usize, height: usize, stream: Handle,
    ) {
        set_later(null, stream, set(dst, value, 4, width, height, pitch)?)
    }
}

/// Refuses a row of bytes that reaches beyond the end of an allocation, which the driver knows to the byte.
fn bounded(address: u64, bytes: u64) -> Result {
    let space = driver()?.memory.space.read().unwrap_or_else(|e| e.into_inner());
    match space.find(address) {
        Some((base, Region { kind: Kind::Allocation { requested, .. }, .. }))
            if address.saturating_add(bytes) > base + requested =>
        {
            Err(Error::INVALID_VALUE)
        }
        _ => Ok(()),
    }
}

fn bounded_copy(copy: &Copy) -> Result {
    if !copy.linear {
        return Ok(());
    }
    self::bounded(copy.dst, copy.width)?;
    self::bounded(copy.src, copy.width)
}

fn bounded_set(set: &Set) -> Result {
    if set.pitch > 0 { Ok(()) } else { self::bounded(set.dst, set.width.saturating_mul(set.element)) }
}

pub(super) fn now(null: Null, copy: Copy) -> Result {
    let stream = context::stream(null, 0)?;
    if copy.width == 0 {
        return stream.usable();
    }
    stream.exists()?;
    self::bounded_copy(&copy)?;
    stream.run(Op::Copy(copy))
}

pub(super) fn later(null: Null, stream: Handle, copy: Copy) -> Result {
    let stream = context::stream(null, stream)?;
    if copy.width == 0 {
        return stream.usable();
    }
    stream.exists()?;
    self::bounded_copy(&copy)?;
    if let Some(fence) = stream.enqueue(Op::Copy(copy))?
        && copy.pageable()
    {
        fence.wait();
        stream.core.healthy()?;
    }
    Ok(())
}

fn set_now(null: Null, set: Set) -> Result {
    let stream = context::stream(null, 0)?;
    if set.width == 0 {
        return stream.usable();
    }
    stream.exists()?;
    self::bounded_set(&set)?;
    stream.run(Op::Set(set))
}

fn set_later(null: Null, stream: Handle, set: Set) -> Result {
    let stream = context::stream(null, stream)?;
    if set.width == 0 {
        return stream.usable();
    }
    stream.exists()?;
    self::bounded_set(&set)?;
    stream.enqueue(Op::Set(set)).map(|_| ())
}

pub(super) fn set(
    dst: u64,
    value: u32,
    element: u64,
    width: usize,
    height: usize,
    pitch: usize,
) -> Result<Set> {
    let aligned = dst.is_multiple_of(element) && (pitch as u64).is_multiple_of(element);
    if !aligned || height > 1 && (pitch as u64) < (width as u64).saturating_mul(element) {
        return Err(Error::INVALID_VALUE);
    }
    Ok(Set { dst, value, element, width: width as u64, height: height as u64, pitch: pitch as u64 })
}

/// One end of a copy of a box, as a caller describes it.
struct Described {
    kind: c_uint,
    host: u64,
    device: u64,
    array: Handle,
    pitch: usize,
    /// Rows of a slice.
    rows: usize,
    at: [usize; 3],
}

/// One end of a copy of a box: where it begins, what that must be, and how far rows and slices are apart.
struct Corner {
    begin: (u64, Side),
    pitch: u64,
    slice: u64,
}

impl Described {
    fn corner(&self, extent: [usize; 3]) -> Result<Corner> {
        let (base, side) = match self.kind {
            MEMORYTYPE_HOST => (self.host, Side::Host),
            MEMORYTYPE_DEVICE => (self.device, Side::Device),
            MEMORYTYPE_UNIFIED => (self.device, Side::Host),
            MEMORYTYPE_ARRAY => {
                let part = driver()?.arrays.get(self.array)?.corner(self.at, extent)?;
                return Ok(Corner {
                    begin: (part.address, Side::Array),
                    pitch: part.pitch,
                    slice: part.slice,
                });
            }
            _ => return Err(Error::INVALID_VALUE),
        };
        let [x, y, z] = self.at.map(|n| n as u64);
        let pitch = self.pitch as u64;
        let slice = pitch.wrapping_mul(self.rows as u64);
        let rows = y.wrapping_mul(pitch).wrapping_add(z.wrapping_mul(slice));
        Ok(Corner { begin: (base.wrapping_add(x).wrapping_add(rows), side), pitch, slice })
    }
}

fn boxed(dst: &Described, src: &Described, extent: [usize; 3]) -> Result<Copy> {
    let (dst, src) = (dst.corner(extent)?, src.corner(extent)?);
    let [width, height, depth] = extent.map(|n| n as u64);
    Ok(Copy {
        height,
        depth,
        dst_pitch: dst.pitch,
        dst_slice: dst.slice,
        src_pitch: src.pitch,
        src_slice: src.slice,
        linear: false,
        ..Copy::linear(dst.begin, src.begin, width)
    })
}

fn plane(copy: &Memcpy2D) -> Result<Copy> {
    let pitch = |kind: c_uint, pitch: usize, x: usize| -> Result<usize> {
        match pitch {
            0 => Ok(copy.width),
            _ if kind == MEMORYTYPE_ARRAY => Ok(copy.width),
            _ if pitch < copy.width.saturating_add(x) && copy.height > 1 => Err(Error::INVALID_VALUE),
            _ => Ok(pitch),
        }
    };
    let dst = Described {
        kind: copy.dst_type,
        host: copy.dst_host,
        device: copy.dst_device,
        array: copy.dst_array,
        pitch: pitch(copy.dst_type, copy.dst_pitch, copy.dst_x)?,
        rows: 0,
        at: [copy.dst_x, copy.dst_y, 0],
    };
    let src = Described {
        kind: copy.src_type,
        host: copy.src_host,
        device: copy.src_device,
        array: copy.src_array,
        pitch: pitch(copy.src_type, copy.src_pitch, copy.src_x)?,
        rows: 0,
        at: [copy.src_x, copy.src_y, 0],
    };
    boxed(&dst, &src, [copy.width, copy.height, 1])
}

pub(super) fn space(copy: &Memcpy3D) -> Result<Copy> {
    if copy.src_lod != 0 || copy.dst_lod != 0 {
        return Err(Error::INVALID_VALUE);
    }
    let or = |value: usize, default: usize| if value == 0 { default } else { value };
    let dst = Described {
        kind: copy.dst_type,
        host: copy.dst_host,
        device: copy.dst_device,
        array: copy.dst_array,
        pitch: or(copy.dst_pitch, copy.width),
        rows: or(copy.dst_height, copy.height),
        at: [copy.dst_x, copy.dst_y, copy.dst_z],
    };
    let src = Described {
        kind: copy.src_type,
        host: copy.src_host,
        device: copy.src_device,
        array: copy.src_array,
        pitch: or(copy.src_pitch, copy.width),
        rows: or(copy.src_height, copy.height),
        at: [copy.src_x, copy.src_y, copy.src_z],
    };
    boxed(&dst, &src, [copy.width, copy.height, copy.depth])
}
