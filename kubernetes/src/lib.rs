//! GPUs of a Kubernetes node, each for several pods.
//!
//! | module | what it holds |
//! |---|---|
//! | [`options`] | the command line |
//! | [`inventory`] | the GPUs of this node: NVML, the arbiter's pages, health |
//! | [`virtual_gpu`] | the names of virtual GPUs |
//! | [`placement`] | in which order GPUs are filled; pure |
//! | [`grant`] | what a container was promised, and the environment that tells the shim |
//! | [`cdi`] | CDI specifications: what a container needs that uses the GPU |
//! | [`runtime`], [`socket`], [`mod@error`] | threads, signals, sockets and errors of both programs |
//! | [`device_plugin`] | the kubelet's device plugin protocol |
//! | [`dra`] | the driver for dynamic resource allocation |

pub mod cdi;
pub mod device_plugin;
pub mod dra;
pub mod error;
pub mod grant;
pub mod inventory;
pub mod options;
pub mod placement;
pub mod runtime;
pub mod socket;
pub mod virtual_gpu;

pub use error::Error;
