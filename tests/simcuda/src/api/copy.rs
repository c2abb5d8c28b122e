//! Copies and memsets.
//!
//! Synchronous ones are operations in the null stream that the caller waits for. Asynchronous copies with pageable
//! memory are waited for too, as the real driver copies such memory before it returns.

use std::ffi::c_uint;

use super::driver_api;
use crate::abi::{
    Error, Handle, In, MEMORYTYPE_DEVICE, MEMORYTYPE_HOST, MEMORYTYPE_UNIFIED, Memcpy2D, Memcpy3D, Result,
};
use crate::context::{self, Null};
use crate::memory::access::Side;
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

pub(super) fn now(null: Null, copy: Copy) -> Result {
    let stream = context::stream(null, 0)?;
    if copy.width == 0 {
        return stream.usable();
    }
    stream.run(Op::Copy(copy))
}

pub(super) fn later(null: Null, stream: Handle, copy: Copy) -> Result {
    let stream = context::stream(null, stream)?;
    if copy.width == 0 {
        return stream.usable();
    }
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
    stream.run(Op::Set(set))
}

fn set_later(null: Null, stream: Handle, set: Set) -> Result {
    let stream = context::stream(null, stream)?;
    if set.width == 0 {
        return stream.usable();
    }
    stream.enqueue(Op::Set(set)).map(|_| ())
}

fn set(dst: u64, value: u32, element: u64, width: usize, height: usize, pitch: usize) -> Result<Set> {
    let aligned = dst.is_multiple_of(element) && (pitch as u64).is_multiple_of(element);
    if !aligned || height > 1 && (pitch as u64) < (width as u64).saturating_mul(element) {
        return Err(Error::INVALID_VALUE);
    }
    Ok(Set { dst, value, element, width: width as u64, height: height as u64, pitch: pitch as u64 })
}

/// The address that one end of a box copy begins at, and what it must be.
fn corner(
    kind: c_uint,
    host: u64,
    device: u64,
    pitch: usize,
    slice: u64,
    at: [usize; 3],
) -> Result<(u64, Side)> {
    let (base, side) = match kind {
        MEMORYTYPE_HOST => (host, Side::Host),
        MEMORYTYPE_DEVICE => (device, Side::Device),
        MEMORYTYPE_UNIFIED => (device, Side::Host),
        // There are no arrays.
        3 => return Err(Error::NOT_SUPPORTED),
        _ => return Err(Error::INVALID_VALUE),
    };
    let [x, y, z] = at.map(|n| n as u64);
    let rows = y.wrapping_mul(pitch as u64).wrapping_add(z.wrapping_mul(slice));
    Ok((base.wrapping_add(x).wrapping_add(rows), side))
}

fn plane(copy: &Memcpy2D) -> Result<Copy> {
    let pitch = |pitch: usize, x: usize| -> Result<usize> {
        match pitch {
            0 => Ok(copy.width),
            _ if pitch < copy.width.saturating_add(x) && copy.height > 1 => Err(Error::INVALID_VALUE),
            _ => Ok(pitch),
        }
    };
    let (dst_pitch, src_pitch) = (pitch(copy.dst_pitch, copy.dst_x)?, pitch(copy.src_pitch, copy.src_x)?);
    let dst =
        corner(copy.dst_type, copy.dst_host, copy.dst_device, dst_pitch, 0, [copy.dst_x, copy.dst_y, 0])?;
    let src =
        corner(copy.src_type, copy.src_host, copy.src_device, src_pitch, 0, [copy.src_x, copy.src_y, 0])?;
    Ok(Copy {
        height: copy.height as u64,
        dst_pitch: dst_pitch as u64,
        src_pitch: src_pitch as u64,
        ..Copy::linear(dst, src, copy.width as u64)
    })
}

pub(super) fn space(copy: &Memcpy3D) -> Result<Copy> {
    if copy.src_lod != 0 || copy.dst_lod != 0 {
        return Err(Error::INVALID_VALUE);
    }
    let or = |value: usize, default: usize| if value == 0 { default } else { value };
    let (dst_pitch, src_pitch) = (or(copy.dst_pitch, copy.width), or(copy.src_pitch, copy.width));
    let dst_slice = dst_pitch as u64 * or(copy.dst_height, copy.height) as u64;
    let src_slice = src_pitch as u64 * or(copy.src_height, copy.height) as u64;
    let dst_at = [copy.dst_x, copy.dst_y, copy.dst_z];
    let src_at = [copy.src_x, copy.src_y, copy.src_z];
    let dst = corner(copy.dst_type, copy.dst_host, copy.dst_device, dst_pitch, dst_slice, dst_at)?;
    let src = corner(copy.src_type, copy.src_host, copy.src_device, src_pitch, src_slice, src_at)?;
    Ok(Copy {
        height: copy.height as u64,
        depth: copy.depth as u64,
        dst_pitch: dst_pitch as u64,
        dst_slice,
        src_pitch: src_pitch as u64,
        src_slice,
        ..Copy::linear(dst, src, copy.width as u64)
    })
}
