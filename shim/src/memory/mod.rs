//! Memory of the GPU: what the application has allocated, where its bytes are, and how they move.
//!
//! | file | what it holds |
//! |---|---|
//! | [`device`] | one GPU of this process: what its engine and the application's threads share |
//! | [`devices`] | all of them, and the contexts on each |
//! | [`map`], [`region`], `index`, `gaps` | what is allocated, and where each chunk's bytes are; calls no driver |
//! | [`allocate`], [`free`] | cuMemAlloc and cuMemFree |
//! | [`keep_freed`], [`spares`] | memory that was freed a moment ago, for the next allocation |
//! | [`mapping`] | physical memory of a chunk, made and mapped |
//! | [`vmm`], [`mappings`], [`stale_objects`] | memory that the application maps itself (cuMemCreate, cuMemMap) |
//! | [`swap`], [`zero_scan`] | moving chunks between GPU and host; finding what holds nothing but zeros |
//! | [`host`] | the pool of host memory for what is evicted |
//! | [`engine_context`] | the context that the engine works in, and its way out of one that ends |
//! | [`bounds`] | where allocations end, for copies and memsets |
//! | [`peer_access`], [`sync_memops`] | rights and attributes that the driver refuses for mapped memory |
//! | [`unmovable`] | whether allocations are the driver's own, for tools that watch them |
//! | [`bookkeeping`] | what the books of many regions cost: a measurement |
//! | [`error`] | why memory could not be moved |
//!
//! May use `submit`, `cuda` and the files of the crate's root, and nothing above: neither the engine's phases nor the entry
//! points are known here.

pub mod allocate;
pub mod bookkeeping;
pub mod bounds;
pub mod device;
pub mod devices;
pub mod engine_context;
pub mod error;
pub mod free;
mod gaps;
pub mod host;
mod index;
pub mod keep_freed;
pub mod map;
pub mod mapping;
pub mod mappings;
pub mod peer_access;
pub mod region;
pub mod spares;
pub mod stale_objects;
pub mod swap;
pub mod sync_memops;
pub mod unmovable;
pub mod vmm;
pub mod zero_scan;

/// Bytes in a full chunk. Larger ones map faster, smaller ones hand on sooner (docs/driver-facts.md).
pub const CHUNK: u64 = 64 << 20;
