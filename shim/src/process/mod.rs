//! The process as a client: how it attaches to a GPU, what contexts it has, and the engine that walks it through its phases.
//!
//! | file | what it holds |
//! |---|---|
//! | [`attach`] | cuInit, the first context on a GPU, the last one, a fork |
//! | [`contexts`], [`primary`] | how contexts come and go, green ones too |
//! | [`engine`] | the thread that walks the client through its phases, gives way and fills |
//! | [`reservation`], [`driver_memory`] | memory that only the driver can place, and the calls that do |
//! | [`first_context`] | memory for a process's first context, on a GPU that others have filled |
//! | [`memory_info`] | how much memory there is, for whoever asks by whatever name |
//!
//! May use all rooms but `interpose`.

pub mod attach;
pub mod contexts;
pub mod driver_memory;
pub mod engine;
pub mod first_context;
pub mod memory_info;
pub mod primary;
pub mod reservation;
