//! Where the application meets nvshare: the entry points of the driver and of NVML, and what stands in for them.
//!
//! | file | what it holds |
//! |---|---|
//! | `rows` | the table of entry points: a row for each exported symbol |
//! | [`entry_points`] | what a row means, and the functions that stand in for the driver's |
//! | [`driver_calls`] | the driver's own functions |
//! | [`hooks`] | the entry points that need more than the gate |
//! | [`dlsym`], [`proc_address`] | how programs find entry points |
//! | [`deepbind`] | libraries that are loaded so that they would find the driver's |
//! | [`nvml`] | the same for NVML, as far as it tells how much memory there is |
//! | [`probe`] | what tests and benchmarks ask the shim itself |
//! | [`hook`] | types that these share |
//!
//! The uppermost room: it may use all others, and nothing uses it.

pub mod deepbind;
pub mod dlsym;
pub mod driver_calls;
pub mod entry_points;
pub mod hook;
pub mod hooks;
pub mod nvml;
pub mod probe;
pub mod proc_address;
mod rows;
