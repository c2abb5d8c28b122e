//! The simulated GPU's CUDA driver, to be loaded as `libcuda.so.1` on machines without a GPU.
//!
//! It is a test double: what it says about time follows from configured rates, not from any GPU. What it is strict
//! about is memory. Bytes are real, so lost or mixed-up data is seen; capacity is shared by all processes of the
//! machine, so over-commitment fails; and a GPU access to memory that isn't mapped is `CUDA_ERROR_ILLEGAL_ADDRESS`,
//! judged when the operation runs, and sticky.
//!
//! Put a directory with links `libcuda.so.1` and `libcuda.so` to `libsimcuda.so`, and `libnvidia-ml.so.1` to
//! `libsimnvml.so`, on `LD_LIBRARY_PATH`. The environment variables are listed in [`simstate::config`]. Tests look
//! inside with `nvsharesim_counters` and `nvsharesim_usage` or with the crate `simstate`.
//!
//! A function that isn't exported isn't supported: neither `dlsym` nor `cuGetProcAddress` finds it. Those that nvshare's
//! gate holds are all exported, and say `CUDA_ERROR_NOT_SUPPORTED` if they aren't implemented.
//!
//! | module | concept |
//! |---|---|
//! | `abi` | the edge to C, and the only place that follows callers' pointers |
//! | `api` | the entry points, by topic |
//! | `driver` | initialisation, devices, faults on demand, fork |
//! | `context` | contexts, the current one, and which stream a handle means |
//! | `memory` | physical memory, the address space, moving bytes |
//! | `pool` | stream-ordered memory, and that of graphs |
//! | `array` | arrays, textures and surfaces |
//! | `um` | where the pages of managed memory are |
//! | `stream`, `event`, `op` | queues, moments in them, and what they carry |
//! | `ipc_event` | events of several processes |
//! | `graph`, `graph_edit` | capture and replay; clones, graphs in graphs and updates |
//! | `module`, `kernels` | PTX images and the kernels that really compute |
//! | `value` | values in memory that streams and kernels wait for |
//! | `watch` | calls that come while memory is out |
//! | `scans` | nvshare's own kernels, which look for memory that need not be copied |

mod abi;
mod api;
mod array;
mod context;
mod driver;
mod event;
mod graph;
mod graph_edit;
mod handles;
mod ipc_event;
mod kernels;
mod memory;
mod module;
mod op;
mod pool;
mod scans;
mod stream;
mod um;
mod value;
mod watch;
