//! CUDA IPC: memory of one process in another (cuIpcGetMemHandle, cuIpcOpenMemHandle, cuIpcCloseMemHandle).
//! PyTorch's multiprocessing passes tensors in this way, and NCCL its buffers.
//!
//! The driver gives no such handle for memory of cuMemCreate, as all memory of nvshare is. But such memory can be exported as
//! file descriptors, chunk by chunk, and nvshare creates every chunk with that property. So nvshare's handle names a
//! socket from which another process gets the descriptors:
//!
//! ```text
//!   the exporter                                            a process that opens the memory
//!   cuIpcGetMemHandle: the region stays on the GPU
//!     from now on; a handle of 64 bytes ([`handle`]) ────▶   cuIpcOpenMemHandle
//!   thread "nvshare-ipc" ([`server`], [`exports`])  ◀─────   sends number and key ([`client`], [`imports`])
//!     exports the chunks                            ─────▶   imports them, maps them contiguously
//!     counts how often it is open                   ◀─────   cuIpcCloseMemHandle, or the end of the process
//! ```
//!
//! Socket and thread exist only after the first export. Handles that are not nvshare's go to the driver unchanged, and so do
//! handles of events, which involve no memory.
//!
//! **Accounting.** NVML counts the memory for the exporter, and so does the exporter's account, as unmovable: other processes
//! use it whenever they run, so it cannot be evicted. If the exporter frees it while other processes have it open,
//! its application cannot use it any more, but the memory stays and counts until the last of them has
//! closed it or ended. If the exporter ends, the arbiter closes its account; NVML then counts the memory for the processes
//! that still have it open, and the arbiter counts it as part of their contexts. A process that opens memory does not account
//! for it.
//!
//! **Permission.** Processes of the same user, or of root, that present the allocation's key.
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

/// cuIpcGetMemHandle. `None` if the address is not nvshare's. The caller is inside the gate.
pub fn get(devices: &[Arc<Device>], address: CUdeviceptr) -> Option<Result<CUipcMemHandle, CuResult>> {
    let handle = devices.iter().find_map(|device| exports::get(device, address))?;
    Some(handle.map(|handle| handle.encode()))
}

/// cuIpcOpenMemHandle, in a context. `None` if the handle is not nvshare's.
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
                "cuIpcOpenMemHandle: the handle is of version {version}, and this release of nvshare reads version {}; run \
                 the same release in both processes, and pass handles on unchanged",
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
        // As the driver answers a process that opens its own handle.
        return Some(Err(CuResult::INVALID_CONTEXT));
    }
    Some(imports::open(device, context, &handle).map_err(|error| {
        let pid = handle.exporter.pid;
        tracing::warn!(gpu = %device.gpu, "memory of process {pid} could not be opened: {error}");
        error.cuda()
    }))
}

/// What identifies this process to those who open its memory; `None` before it has exported any.
pub fn this_process() -> Option<[u8; 16]> {
    exports::this_process().map(bytemuck::cast)
}

/// What identifies the process that has made a handle; `None` if it is not nvshare's.
pub fn exporter(handle: &CUipcMemHandle) -> Option<[u8; 16]> {
    match Handle::decode(handle) {
        Read::Ours(handle) => Some(bytemuck::cast(handle.exporter)),
        Read::Unreadable(_) | Read::Foreign => None,
    }
}

/// Closes the sockets in a forked child, where they belong to the parent.
pub fn after_fork() {
    imports::after_fork();
}
