//! The entry points that need more than the gate, by families of the driver's functions.
//!
//! Each function has the signature of the driver's entry point of that name, and is called in its place. None may
//! unwind into C: code that could panic runs inside [`guard::guarded`].
//!
//! | file | entry points |
//! |---|---|
//! | [`memory`] | cuInit, cuMemAlloc, cuMemFree, cuMemGetInfo |
//! | [`pointers`] | attributes of pointers, and where allocations begin |
//! | [`vmm`] | memory that the application maps itself |
//! | [`async_pool`] | stream-ordered memory and its pools |
//! | [`unmovable`] | memory that only the driver can place: arrays, managed memory |
//! | [`ipc`] | memory of other processes |
//! | [`context`], [`stream`], [`capture`] | contexts, streams, captures of graphs |

#![allow(missing_docs)]

mod async_pool;
mod capture;
mod context;
mod guard;
mod ipc;
mod memory;
mod pointers;
mod stream;
mod unmovable;
mod vmm;

pub use async_pool::*;
pub use capture::*;
pub use context::*;
pub use ipc::*;
pub use memory::*;
pub use pointers::*;
pub use stream::*;
pub use unmovable::*;
pub use vmm::*;
