//! What NVML shows of a GPU's memory, and whose that memory is.
//!
//! - `nvml`: the GPUs, their memory, and how much of it each process has.
//! - `attribution`: a pure function that says whose each byte is that the GPU has in use.
//! - `tracker`: takes samples into the page, and learns from several of them.
//!
//! A client's *context* is what NVML shows for its process less what the books say is resident: the CUDA context, its
//! modules, the libraries' workspaces. A sample of a context counts only if the client's
//! account was at rest and the same before and after; otherwise a chunk that moves would be taken for a context.
//!
//! NVML shows clients in one of three ways ([`View`]). In a container it may show the host's pids, which the arbiter can't
//! match with its clients, or no process at all; then the sum of all contexts is known, and each counts as an equal part
//! of it.

mod attribution;
mod nvml;
mod tracker;

pub use attribution::View;
pub use nvml::{DeviceMemory, Gpu, NvmlSource, Reading, Source};
pub use tracker::{Change, Tracker};
