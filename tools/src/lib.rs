//! The command line of nvshare, and what its tests share with it.
//!
//! | module | what it holds |
//! |---|---|
//! | [`cli`] | the command line |
//! | [`ctl`], [`nvsharectl`] | steering at run time, and the same as users of the C nvshare type it |
//! | [`whom`] | which client a person means |
//! | [`wait`], [`health`] | for scripts and probes: until something is so; whether the node is as it should be |
//! | [`run`], [`status`], [`top`], [`set`], [`bench`](mod@bench), [`demo`], [`sim`], [`trace`] | the commands |
//! | [`kubernetes`] | what a node of Kubernetes runs: another program |
//! | [`simulate`] | simulated GPUs for `nvshare run` |
//! | [`node`] | the parts of nvshare on this machine; a private arbiter, a simulated GPU |
//! | [`job`], [`crew`] | a program that checks what it computes, and several of them as processes |
//! | [`cuda`] | the CUDA driver |
//! | [`output`] | what the commands write, to whoever still reads it |
//! | [`digits`], [`layout`] | figures with as many digits as help; tables and paragraphs that fit the screen |
//! | [`picture`] | what clients did when, as an SVG |
//! | [`internal`] | what the commands start themselves again as |

pub mod bench;
pub mod cli;
pub mod compute;
pub mod crew;
pub mod ctl;
pub mod cuda;
pub mod demo;
pub mod health;
pub mod internal;
pub mod job;
pub mod kubernetes;
pub mod layout;
pub mod node;
pub mod nvsharectl;
pub mod output;
pub mod picture;
pub mod run;
pub mod set;
pub mod sim;
pub mod simulate;
pub mod status;
pub mod top;
pub mod trace;
pub mod wait;
pub mod whom;

pub use nvshare_stats::digits;

/// Why a command failed, and with which exit status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Exit status.
    pub status: u8,
    /// A sentence for the person who typed the command; empty if that person knows already.
    pub message: String,
}

impl Failure {
    /// Bad input, or a state of the node that the user must change: exit status 2.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { status: 2, message: message.into() }
    }

    /// With another exit status.
    pub fn with_status(status: u8, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }
}

impl From<cuda::CudaError> for Failure {
    fn from(error: cuda::CudaError) -> Self {
        Self::with_status(1, error.to_string())
    }
}

/// Reads a priority from the command line.
fn priority(text: &str) -> Result<nvshare::shares::Priority, String> {
    text.parse().map_err(|error: nvshare::shares::ShareError| error.to_string())
}

/// Reads a weight from the command line.
fn weight(text: &str) -> Result<u32, String> {
    nvshare::shares::parse_weight(text).map_err(|error| error.to_string())
}

/// Reads a memory limit from the command line.
fn memory_limit(text: &str) -> Result<nvshare::shares::MemoryLimit, String> {
    text.parse().map_err(|error: nvshare::shares::ShareError| error.to_string())
}

/// Reads a compute limit from the command line.
fn compute_limit(text: &str) -> Result<nvshare::shares::ComputeLimit, String> {
    text.parse().map_err(|error: nvshare::shares::ShareError| error.to_string())
}

/// Reads a GPU's UUID from the command line.
fn gpu(text: &str) -> Result<nvshare::GpuUuid, String> {
    text.parse().map_err(|error: nvshare::units::UuidError| error.to_string())
}

/// Reads a time from the command line, ns.
fn time(text: &str) -> Result<nvshare::Nanos, String> {
    nvshare::units::parse_time(text).map_err(|error| error.to_string())
}

/// Reads a size from the command line.
fn size(text: &str) -> Result<u64, String> {
    nvshare::units::parse_size(text).map_err(|error| error.to_string())
}
