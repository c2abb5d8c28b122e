//! Memory of the GPU: what the application has allocated, where its bytes are, and how they move.
//!
//! | file | what it holds |
//! |---|---|
//! | [`device`] | one GPU of this process: what its engine and the application's threads share |
//! | [`devices`] | all of them, and the contexts on each |
//! | [`map`], [`region`], `index`, `gaps` | what is allocated, and where each chunk's bytes are; these never call the driver |
//! | [`allocate`], [`free`] | cuMemAlloc and cuMemFree |
//! | [`imported`] | the descriptors of memory that came from another process |
//! | [`keep_freed`], [`spares`] | memory that was freed a moment ago, for the next allocation |
//! | [`mapping`] | physical memory of chunks: creating and mapping it |
//! | [`vmm`], [`mappings`], [`stale_objects`] | memory that the application maps itself (cuMemCreate, cuMemMap) |
//! | [`swap`] | moving chunks between GPU and host |
//! | [`replicas`] | what other processes with the same data are told of this one's memory |
//! | [`scan`], [`zero_scan`], [`fingerprint`] | what the GPU finds in its memory before it moves: granules that are all zero, fingerprints of the others |
//! | [`host`] | the pool of host memory for evicted data |
//! | [`engine_context`] | the context that the engine works in, and how it leaves one that is being destroyed |
//! | [`bounds`] | where allocations end, for copies and memsets |
//! | [`peer_access`], [`sync_memops`] | rights and attributes that the driver refuses for mapped memory |
//! | [`unmovable`] | whether allocations are the driver's own, for tools that watch them |
//! | [`bookkeeping`] | a measurement of what the bookkeeping of many regions costs |
//! | [`error`] | why memory could not be moved |
//!
//! May use `submit`, `replicas`, `cuda` and the files of the crate's root, and no room above: neither the engine nor the entry points.

pub mod allocate;
pub mod bookkeeping;
pub mod bounds;
pub mod device;
pub mod devices;
pub mod engine_context;
pub mod error;
pub mod fingerprint;
pub mod free;
mod gaps;
pub mod host;
pub mod imported;
mod index;
pub mod keep_freed;
pub mod map;
pub mod mapping;
pub mod mappings;
pub mod peer_access;
pub mod region;
pub mod replicas;
pub mod scan;
pub mod spares;
pub mod stale_objects;
pub mod swap;
pub mod sync_memops;
pub mod unmovable;
pub mod vmm;
pub mod zero_scan;

/// Bytes in a full chunk. Larger chunks map faster; smaller ones pass granules to the next client sooner
/// (docs/driver-facts.md).
pub const CHUNK: u64 = 64 << 20;
