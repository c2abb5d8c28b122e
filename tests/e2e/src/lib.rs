//! What tests of the whole of nvshare share: real processes under the shim, with an arbiter, on the simulated GPU.
//!
//! | module | what it holds |
//! |---|---|
//! | [`application`] | an application that makes the CUDA calls a test names, one at a time |
//! | [`application::case`] | a C program of `tests/programs` that goes through a case |
//! | [`application::running`] | a process that does a job and checks its data |
//! | [`application::books`] | what the page says about applications; a competitor for the GPU |
//! | [`monitor`] | an arbiter that serves metrics and the page |
//! | [`application::async_pool`], [`application::ipc`], [`application::vmm`] | calls of one kind: stream-ordered memory, memory that several processes open, memory that the application maps itself |
//! | [`ranks`] | jobs whose ranks are processes that wait for each other |
//!
//! The tests start what is built beside them: `cargo build --workspace` first, with the same profile.

pub mod application;
pub mod monitor;
pub mod ranks;

use std::path::PathBuf;

/// A program of the workspace, such as `nvshare` or `nvshare-arbiter`.
///
/// # Panics
/// It is not built.
pub fn built(name: &str) -> PathBuf {
    nvshare_tools::node::beside(name).unwrap_or_else(|| {
        panic!("{name} is not built: cargo build --workspace, with the profile of the test")
    })
}
