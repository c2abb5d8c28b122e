//! The interface to the application: the entry points of the driver and of NVML, and the functions that replace them.
//!
//! | file | what it holds |
//! |---|---|
//! | `rows` | the table of entry points: a row for each exported symbol |
//! | [`entry_points`] | what a row means, and the functions that replace the driver's |
//! | [`driver_calls`] | functions that call the driver's own |
//! | [`hooks`] | the entry points that need more than the gate |
//! | [`dlsym`], [`proc_address`] | how programs find entry points |
//! | [`deepbind`] | libraries loaded with a flag by which they would find the driver's functions instead |
//! | [`nvml`] | the functions of NVML that report memory |
//! | [`nccl`] | the functions of NCCL that make communicators, by which those who wait for each other are known |
//! | [`probe`] | functions for tests and benchmarks |
//! | [`hook`] | types that these share |
//!
//! The uppermost room: it may use all others, and nothing uses it.

pub mod deepbind;
pub mod dlsym;
pub mod driver_calls;
pub mod entry_points;
pub mod hook;
pub mod hooks;
pub mod nccl;
pub mod nvml;
pub mod probe;
pub mod proc_address;
mod rows;
