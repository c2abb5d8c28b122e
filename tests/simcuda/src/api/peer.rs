//! Several GPUs: who reaches whose memory, and copies between them.
//!
//! Every GPU can reach every other one. What `cuMemAlloc` made is open to the kernels of another context once that
//! context has asked for it; mappings (`cuMemMap`) are not touched by that and know only `cuMemSetAccess`. A plain copy
//! is made by the GPU of its stream, which therefore must be let into mappings at both ends. A peer copy names a
//! context for each end, and each end needs to be open to its own GPU alone.

use std::ffi::{c_int, c_uint};

use super::{copy, driver_api};
use crate::abi::{Error, Handle, In, MEMORYTYPE_DEVICE, Memcpy3D, Out, Result};
use crate::context;
use crate::driver::{driver, lock};
use crate::memory::access::Side;
use crate::op::Copy;

driver_api! {
    /// Not itself.
    fn cuDeviceCanAccessPeer(can: Out<c_int>, device: c_int, peer: c_int) {
        let driver = driver()?;
        let (device, peer) = (driver.device(device)?.index, driver.device(peer)?.index);
        can.set(c_int::from(device != peer))
    }

    fn cuDeviceGetP2PAttribute(value: Out<c_int>, attribute: c_uint, source: c_int, destination: c_int) {
        let driver = driver()?;
        value.required()?;
        if driver.device(source)?.index == driver.device(destination)?.index {
            return Err(Error::INVALID_DEVICE);
        }
        value.set(match attribute {
            1 => 0,     // performance rank: all links are alike
            2 => 1,     // access
            3 | 5 => 0, // atomics, as over PCIe
            4 => 1,     // access to arrays
            _ => return Err(Error::INVALID_VALUE),
        })
    }

    fn cuCtxEnablePeerAccess(peer: Handle, flags: c_uint) {
        let context = context::healthy()?;
        if flags != 0 {
            return Err(Error::INVALID_VALUE);
        }
        if peer == context.handle() || peer == context.owner() {
            return Err(Error::INVALID_CONTEXT);
        }
        let device = context::by_handle(peer)?.core.device.index;
        if device == context.core.device.index {
            return Err(Error::PEER_ACCESS_UNSUPPORTED);
        }
        let mut peers = lock(&context.core.peers);
        if peers.iter().any(|(handle, _)| *handle == peer) {
            return Err(Error::PEER_ACCESS_ALREADY_ENABLED);
        }
        peers.push((peer, device));
        Ok(())
    }

    fn cuCtxDisablePeerAccess(peer: Handle) {
        let context = context::healthy()?;
        context::by_handle(peer)?;
        let mut peers = lock(&context.core.peers);
        let at = peers.iter().position(|(handle, _)| *handle == peer).ok_or(Error::PEER_ACCESS_NOT_ENABLED)?;
        peers.remove(at);
        Ok(())
    }

    fn cuMemcpyPeer / cuMemcpyPeer_ptds |null| (dst: u64, to: Handle, src: u64, from: Handle, bytes: usize) {
        copy::now(null, self::linear(dst, to, src, from, bytes)?)
    }

    fn cuMemcpyPeerAsync / cuMemcpyPeerAsync_ptsz |null| (
        dst: u64, to: Handle, src: u64, from: Handle, bytes: usize, stream: Handle,
    ) {
        copy::later(null, stream, self::linear(dst, to, src, from, bytes)?)
    }

    fn cuMemcpy3DPeer / cuMemcpy3DPeer_ptds |null| (copy: In<Memcpy3D>) {
        copy::now(null, self::space(&copy.get()?)?)
    }

    fn cuMemcpy3DPeerAsync / cuMemcpy3DPeerAsync_ptsz |null| (copy: In<Memcpy3D>, stream: Handle) {
        copy::later(null, stream, self::space(&copy.get()?)?)
    }
}

fn device_of(context: Handle) -> Result<Option<usize>> {
    Ok(Some(context::by_handle(context)?.core.device.index))
}

fn linear(dst: u64, to: Handle, src: u64, from: Handle, bytes: usize) -> Result<Copy> {
    let plain = Copy::linear((dst, Side::Device), (src, Side::Device), bytes as u64);
    Ok(Copy { dst_device: device_of(to)?, src_device: device_of(from)?, ..plain })
}

/// Contexts count where there is device memory.
fn space(copy: &Memcpy3D) -> Result<Copy> {
    let device =
        |kind: c_uint, context| if kind == MEMORYTYPE_DEVICE { device_of(context) } else { Ok(None) };
    Ok(Copy {
        dst_device: device(copy.dst_type, copy.dst_context)?,
        src_device: device(copy.src_type, copy.src_context)?,
        ..copy::space(copy)?
    })
}
