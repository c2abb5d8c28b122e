//! The process as a client: attaching to GPUs, its contexts, and the engines that walk it through its phases.
//!
//! | file | what it holds |
//! |---|---|
//! | [`attach`] | cuInit, the first context on a GPU, the last one, a fork |
//! | [`contexts`], [`primary`] | how contexts are created and destroyed, green ones too |
//! | [`engine`] | the thread that walks the client through its phases, drains and fills |
//! | [`reservation`], [`driver_memory`] | granules for memory that only the driver can place, and the calls that need them |
//! | [`descriptors`] | who has exported a descriptor of memory |
//! | [`first_context`] | granules for a process's first context on a GPU that other processes have filled |
//! | [`membership`] | what the process has in common with others that it waits for |
//! | [`memory_info`] | how much memory there is, for all calls that query it |
//!
//! May use all rooms but `interpose`.

pub mod attach;
pub mod contexts;
pub mod descriptors;
pub mod driver_memory;
pub mod engine;
pub mod first_context;
pub mod membership;
pub mod memory_info;
pub mod primary;
pub mod reservation;
