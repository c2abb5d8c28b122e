//! Calls of several GPUs: who may use whose memory, and copies between memory of two. Contexts go by their numbers.

use super::{Answer, Caller, Code, DevicePointer, Handle, driver};
use nvshare_tools::Failure;
use std::ffi::c_uint;

/// `CU_MEMORYTYPE_DEVICE`.
const DEVICE: c_uint = 2;

/// One end of a `CUDA_MEMCPY3D_PEER`.
#[repr(C)]
#[derive(Default)]
struct End {
    x: usize,
    y: usize,
    z: usize,
    level: usize,
    kind: c_uint,
    host: usize,
    device: DevicePointer,
    array: Handle,
    context: Handle,
    pitch: usize,
    height: usize,
}

/// `CUDA_MEMCPY3D_PEER`.
#[repr(C)]
#[derive(Default)]
struct Copy3DPeer {
    src: End,
    dst: End,
    width: usize,
    height: usize,
    depth: usize,
}

const _: () = assert!(size_of::<Copy3DPeer>() == 200);

impl Caller {
    /// `None` if it is no such call.
    pub(super) fn peer_access(&mut self, name: &str, numbers: &[u64]) -> Result<Option<Answer>, Failure> {
        let nothing = |code: Code| (code, String::new());
        // SAFETY, for every call below: as in the module above.
        let answer = match (name, numbers) {
            // The current context may use the memory of another one.
            ("enable-peer", [context]) => {
                let enable = driver!(self, b"cuCtxEnablePeerAccess", fn(Handle, c_uint));
                // SAFETY: as said.
                nothing(unsafe { enable(self.context(*context)?, 0) })
            }
            ("disable-peer", [context]) => {
                let disable = driver!(self, b"cuCtxDisablePeerAccess", fn(Handle));
                // SAFETY: as said.
                nothing(unsafe { disable(self.context(*context)?) })
            }
            // By the GPU of the stream.
            ("copy", [dst, src, bytes, stream]) => {
                let copy =
                    driver!(self, b"cuMemcpyDtoDAsync_v2", fn(DevicePointer, DevicePointer, usize, Handle));
                // SAFETY: as said.
                nothing(unsafe { copy(*dst, *src, *bytes as usize, *stream as Handle) })
            }
            ("copy-peer", [dst, to, src, from, bytes]) => {
                let copy =
                    driver!(self, b"cuMemcpyPeer", fn(DevicePointer, Handle, DevicePointer, Handle, usize));
                let (to, from) = (self.context(*to)?, self.context(*from)?);
                // SAFETY: as said.
                nothing(unsafe { copy(*dst, to, *src, from, *bytes as usize) })
            }
            ("copy-peer-async", [dst, to, src, from, bytes, stream]) => {
                let copy = driver!(
                    self,
                    b"cuMemcpyPeerAsync",
                    fn(DevicePointer, Handle, DevicePointer, Handle, usize, Handle)
                );
                let (to, from) = (self.context(*to)?, self.context(*from)?);
                // SAFETY: as said.
                nothing(unsafe { copy(*dst, to, *src, from, *bytes as usize, *stream as Handle) })
            }
            // Every second row of so many bytes to where it is in the other memory; those between stay as they are.
            ("copy-rows-peer", [dst, to, src, from, width, rows]) => {
                let copy = driver!(self, b"cuMemcpy3DPeer", fn(*const Copy3DPeer));
                let end = |address: u64, context| End {
                    kind: DEVICE,
                    device: address,
                    context,
                    pitch: 2 * *width as usize,
                    height: *rows as usize,
                    ..End::default()
                };
                let plan = Copy3DPeer {
                    src: end(*src, self.context(*from)?),
                    dst: end(*dst, self.context(*to)?),
                    width: *width as usize,
                    height: *rows as usize,
                    depth: 1,
                };
                // SAFETY: as said, and a plan that lives until the call is over.
                nothing(unsafe { copy(&plan) })
            }
            _ => return Ok(None),
        };
        Ok(Some(answer))
    }
}
