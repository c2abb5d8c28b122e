//! What is known of a node: each statistic of a node, a GPU, a client and a switch is defined once, with its unit and description.
//!
//! ```no_run
//! use nvshare_stats::Reader;
//!
//! let mut reader = Reader::new(&nvshare::paths::runtime_dir());
//! for gpu in reader.read()?.gpus {
//!     println!("{}: {} clients run, {} wait", gpu.uuid, gpu.running, gpu.waiting);
//! }
//! # Ok::<(), nvshare_stats::ReadError>(())
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | [`definition`] | what a statistic is: unit, kind, description; the macro [`statistics!`] |
//! | [`model`] | the statistics themselves |
//! | [`digits`] | figures for people |
//! | [`description`] | all definitions, as text and for programs |
//! | [`reader`] | reads a node |
//! | [`pages`] | the pages of a runtime directory |
//! | [`history`] | what clients did lately, and the switches in it |
//! | [`process`], [`container`] | whose process a client is, and in which container it runs |
//! | [`hardware`] | what NVML says |
//!
//! Reading takes the pages as every client sees them: no arbiter need run, for users who may open the pages.

pub mod container;
pub mod definition;
pub mod description;
pub mod digits;
pub mod hardware;
pub mod history;
pub mod model;
pub mod pages;
pub mod process;
pub mod reader;

pub use model::{Client, Gpu, Node, SCHEMA_VERSION, Switch};
pub use pages::{Pages, ReadError};
pub use reader::{News, Reader, read};
