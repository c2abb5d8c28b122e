//! CUDA IPC: memory of one process in another (cuIpcGetMemHandle, cuIpcOpenMemHandle, cuIpcCloseMemHandle).
//! PyTorch's multiprocessing passes tensors so, and NCCL its buffers.
//!
//! The driver gives no such handle for memory of cuMemCreate, which all of ours is. But such memory can be exported as
//! file descriptors, chunk by chunk, and every chunk is made so that it can. So a handle of ours is the name of a
//! channel where those are to be had:
//!
//! ```text
//!   the process whose memory it is                          one that opens it
//!   cuIpcGetMemHandle: the region stays on the GPU
//!     from now on; 64 bytes of ours ([`handle`])  ───────▶   cuIpcOpenMemHandle
//!   "nvshare-ipc" ([`server`], [`exports`])       ◀───────   number and key ([`client`], [`imports`])
//!     exports the chunks                          ───────▶   imports them, maps them side by side
//!     counts who has it open                      ◀───────   cuIpcCloseMemHandle, or the end of the process
//! ```
//!
//! Nothing of it is there before the first export. Handles that are not ours go to the driver as they are, and so do
//! those of events, which need no memory of ours.
//!
//! **Who counts it.** NVML counts the memory for the exporter, and so do the books, as unmovable: other processes use
//! it whenever they run, so it cannot be taken from under them. If the exporter frees it while others have it open,
//! its addresses are free for its application and the memory stays, and is counted, until the last of them has
//! closed it or died. If the exporter dies, the arbiter closes its books; what others still have open is then what
//! NVML shows for them, which the arbiter counts as their context's. An opener books nothing.
//!
//! **Who may.** Processes of the same user, or root, that show the allocation's key.
//!
//! What it costs is in `docs/decisions/0008-ipc.md`.

mod channel;
mod client;
mod exports;
mod handle;
mod imports;
mod server;
#[cfg(test)]
mod tests;

pub use imports::{Closing, close, closing, containing, context_ends};

use crate::cuda::abi::*;
use crate::memory::device::Device;
use handle::{Handle, Read};
use std::sync::Arc;

/// cuIpcGetMemHandle. `None` if the address is none of ours. The caller is inside the gate.
pub fn get(devices: &[Arc<Device>], address: CUdeviceptr) -> Option<Result<CUipcMemHandle, CuResult>> {
    let handle = devices.iter().find_map(|device| exports::get(device, address))?;
    Some(handle.map(|handle| handle.encode()))
}

/// cuIpcOpenMemHandle, in a context. `None` if the handle is none of ours.
pub fn open(
    device: &Arc<Device>,
    context: CUcontext,
    handle: &CUipcMemHandle,
    flags: u32,
) -> Option<Result<CUdeviceptr, CuResult>> {
    let handle = match Handle::decode(handle) {
        Read::Ours(handle) => handle,
        Read::Unreadable(version) => {
            tracing::warn!(
                gpu = %device.gpu,
                "cuIpcOpenMemHandle: a handle of version {version}, and this release of nvshare makes version {}, or it \
                 was changed on its way; run the same release in both processes",
                handle::VERSION
            );
            return Some(Err(CuResult::INVALID_VALUE));
        }
        Read::Foreign => return None,
    };
    if flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS {
        return Some(Err(CuResult::INVALID_VALUE));
    }
    if exports::this_process() == Some(handle.exporter) {
        // As the driver says to a process that opens a handle of its own.
        return Some(Err(CuResult::INVALID_CONTEXT));
    }
    Some(imports::open(device, context, &handle).map_err(|error| {
        let pid = handle.exporter.pid;
        tracing::warn!(gpu = %device.gpu, "memory of process {pid} could not be opened: {error}");
        error.cuda()
    }))
}

/// In a forked child: the GPU is the parent's.
pub fn after_fork() {
    server::after_fork();
    imports::after_fork();
}
