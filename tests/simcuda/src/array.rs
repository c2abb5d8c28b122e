//! Arrays: memory with a shape, which only copies and textures know how to get at.
//!
//! Its bytes are rows one behind the other, at addresses that no kernel and no plain copy may use (see
//! [`crate::memory::va::User`]). Textures and surfaces are objects that remember what they were made of; no kernel reads
//! them.

use std::sync::Arc;

use crate::abi::{Array3DDescriptor, Error, Handle, LOCATION_DEVICE, MemLocation, ResourceDesc, Result};
use crate::context::Context;
use crate::driver::driver;
use crate::handles;
use crate::memory::backing::Physical;
use crate::memory::va::Kind;

const LAYERED: u32 = 1;
pub const SURFACE_LDST: u32 = 2;
const CUBEMAP: u32 = 4;
/// These three, texture gather, depth texture and colour attachment; sparse and deferred ones are not supported.
const KNOWN_FLAGS: u32 = 0x3f;

const UNIT: u64 = 64 << 10;

/// An array.
pub struct Array {
    pub handle: Handle,
    /// What it was made of, with zeros for the dimensions that it hasn't.
    pub descriptor: Array3DDescriptor,
    pub context: Handle,
    /// The mipmapped array that it is a level of, or 0.
    pub level_of: Handle,
    pub size: u64,
    /// Where its bytes are.
    pub address: u64,
}

/// An array in several resolutions, finest first.
pub struct Mipmap {
    pub handle: Handle,
    pub context: Handle,
    pub levels: Vec<Arc<Array>>,
}

/// Where a part of an array begins, and how far its rows and slices are apart.
pub struct Corner {
    pub address: u64,
    pub pitch: u64,
    pub slice: u64,
}

/// Bytes of an element.
pub fn element(format: u32, channels: u32) -> Result<u64> {
    let channel = match format {
        0x01 | 0x08 => 1,
        0x02 | 0x09 | 0x10 => 2,
        0x03 | 0x0a | 0x20 => 4,
        // Compressed and planar ones.
        0x50 | 0x91..=0xcb => return Err(Error::NOT_SUPPORTED),
        _ => return Err(Error::INVALID_VALUE),
    };
    if matches!(channels, 1 | 2 | 4) { Ok(channel * u64::from(channels)) } else { Err(Error::INVALID_VALUE) }
}

fn check(descriptor: &Array3DDescriptor) -> Result {
    let Array3DDescriptor { width, height, depth, flags, .. } = *descriptor;
    let layered = flags & LAYERED != 0;
    let shaped = match flags & CUBEMAP {
        0 => width > 0 && (depth == 0 || height > 0 || layered),
        _ => width > 0 && width == height && if layered { depth > 0 && depth % 6 == 0 } else { depth == 6 },
    };
    match flags & !KNOWN_FLAGS {
        0 if shaped && (!layered || depth > 0) => Ok(()),
        0 => Err(Error::INVALID_VALUE),
        _ => Err(Error::NOT_SUPPORTED),
    }
}

impl Array {
    pub fn create(context: &Context, descriptor: Array3DDescriptor, level_of: Handle) -> Result<Arc<Array>> {
        check(&descriptor)?;
        let driver = driver()?;
        let rows = descriptor.height.max(1).checked_mul(descriptor.depth.max(1));
        let elements =
            rows.and_then(|rows| rows.checked_mul(descriptor.width)).ok_or(Error::INVALID_VALUE)?;
        let bytes = (elements as u64).checked_mul(element(descriptor.format, descriptor.channels)?);
        let size =
            bytes.and_then(|bytes| bytes.checked_next_multiple_of(UNIT)).ok_or(Error::INVALID_VALUE)?;
        let device = context.core.device;
        let location = MemLocation { kind: LOCATION_DEVICE, id: device.index as i32 };
        let ledger = Some(device.ledger()?);
        let physical = Arc::new(Physical::new(&driver.memory.backing, 0, size, location, ledger)?);
        let kind = Kind::Array { _physical: physical.clone() };
        let address = {
            let mut space = driver.memory.space.write().unwrap_or_else(|e| e.into_inner());
            space.allocate(&physical, kind, device.index, context.owner())?
        };
        let array = Arc::new(Array {
            handle: handles::fresh(),
            descriptor,
            context: context.owner(),
            level_of,
            size,
            address,
        });
        driver.arrays.insert(array.handle, array.clone());
        Ok(array)
    }

    /// Bytes of a row.
    fn row(&self) -> u64 {
        let bytes = element(self.descriptor.format, self.descriptor.channels).unwrap_or(0);
        self.descriptor.width as u64 * bytes
    }

    /// The part at these coordinates, `x` in bytes; an error if it isn't all within.
    pub fn corner(&self, at: [usize; 3], extent: [usize; 3]) -> Result<Corner> {
        let (pitch, rows) = (self.row(), self.descriptor.height.max(1) as u64);
        let bounds = [pitch, rows, self.descriptor.depth.max(1) as u64];
        for ((at, extent), bound) in at.into_iter().zip(extent).zip(bounds) {
            if at.checked_add(extent).is_none_or(|end| end as u64 > bound) {
                return Err(Error::INVALID_VALUE);
            }
        }
        let [x, y, z] = at.map(|n| n as u64);
        Ok(Corner { address: self.address + x + (y + z * rows) * pitch, pitch, slice: rows * pitch })
    }

    /// The address of byte `offset`, with `bytes` behind it.
    pub fn linear(&self, offset: usize, bytes: usize) -> Result<u64> {
        let all = self.row() * (self.descriptor.height.max(1) * self.descriptor.depth.max(1)) as u64;
        match offset.checked_add(bytes) {
            Some(end) if end as u64 <= all => Ok(self.address + offset as u64),
            _ => Err(Error::INVALID_VALUE),
        }
    }
}

impl Mipmap {
    /// With so many levels, or as many as there can be.
    pub fn create(context: &Context, descriptor: Array3DDescriptor, levels: u32) -> Result<Arc<Mipmap>> {
        check(&descriptor)?;
        let layers = descriptor.flags & (LAYERED | CUBEMAP) != 0;
        let deepest = if layers { 0 } else { descriptor.depth };
        let most = descriptor.width.max(descriptor.height).max(deepest).ilog2() + 1;
        if levels == 0 {
            return Err(Error::INVALID_VALUE);
        }
        let handle = handles::fresh();
        let smaller = |n: usize, level: u32| if n == 0 { 0 } else { (n >> level).max(1) };
        let mut made = Vec::new();
        for level in 0..levels.min(most) {
            let depth = if layers { descriptor.depth } else { smaller(descriptor.depth, level) };
            let (width, height) = (smaller(descriptor.width, level), smaller(descriptor.height, level));
            match Array::create(context, Array3DDescriptor { width, height, depth, ..descriptor }, handle) {
                Ok(array) => made.push(array),
                Err(error) => {
                    made.iter().try_for_each(|array| destroy(context, array))?;
                    return Err(error);
                }
            }
        }
        let mipmap = Arc::new(Mipmap { handle, context: context.owner(), levels: made });
        driver()?.mipmaps.insert(handle, mipmap.clone());
        Ok(mipmap)
    }
}

/// Frees an array's memory.
pub fn destroy(context: &Context, array: &Array) -> Result {
    let driver = driver()?;
    driver.arrays.remove(array.handle)?;
    for stream in context.core.all_streams() {
        crate::stream::Fence::of(&stream).wait();
    }
    let mut space = driver.memory.space.write().unwrap_or_else(|e| e.into_inner());
    space.free(array.address, |kind| matches!(kind, Kind::Array { .. }));
    Ok(())
}

/// A texture or a surface: what it was made of.
pub struct Object {
    pub context: Handle,
    pub resource: ResourceDesc,
    /// `CUDA_TEXTURE_DESC`; none for a surface.
    pub texture: Option<[u32; 26]>,
    /// `CUDA_RESOURCE_VIEW_DESC`.
    pub view: Option<[u64; 14]>,
}
