//! The CUDA driver: its types, its library, and the calls that nvshare makes for itself.
//!
//! | file | what it holds |
//! |---|---|
//! | [`abi`] | types and constants of `cuda.h` |
//! | [`library`] | `libcuda.so.1` by its name, and the C library's own `dlsym` |
//! | [`symbol`] | the address of one entry point |
//! | [`driver`] | the driver's functions that nvshare calls |

pub mod abi;
pub mod driver;
pub mod library;
pub mod symbol;
