//! `nvshare run --simulate`: a program on simulated GPUs, which are made for it and gone afterwards.
//!
//! The program and all that it starts find them as the CUDA driver and NVML, by LD_LIBRARY_PATH, and have an arbiter of their own.

use crate::node::{Node, SimulatedGpu};
use crate::{Failure, complain};
use nvshare::units::format_size;
use std::ffi::OsString;

/// Options of simulated GPUs.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct Options {
    /// Run the program on simulated GPUs, which need no hardware and no driver: see below
    #[arg(long)]
    pub simulate: bool,
    /// How many GPUs are simulated, 1 to 16
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16), requires = "simulate")]
    pub gpus: u32,
    /// The memory of each simulated GPU; what a program uses of it is the host's
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = crate::size, requires = "simulate")]
    pub memory: u64,
    /// Bytes a second between host and simulated GPU, each way
    #[arg(long, value_name = "SIZE", default_value = "2GiB", value_parser = crate::size, requires = "simulate")]
    pub link: u64,
    /// Bytes a second that kernels of a simulated GPU read and write
    #[arg(long, value_name = "SIZE", default_value = "8GiB", value_parser = crate::size, requires = "simulate")]
    pub speed: u64,
}

/// Simulated GPUs with an arbiter. Gone when dropped, the arbiter first.
#[derive(Debug)]
pub struct Simulated {
    node: Node,
    _gpus: SimulatedGpu,
}

impl Simulated {
    /// Makes them, and starts an arbiter with these arguments.
    ///
    /// # Errors
    /// The simulated GPU or another part of nvshare is not there, or the arbiter does not start.
    pub fn start(options: &Options, arguments: &[String]) -> Result<Self, Failure> {
        let gpus = SimulatedGpu::new(&[
            ("GPUS", options.gpus.to_string()),
            ("MEMORY", options.memory.to_string()),
            ("LINK_BANDWIDTH", options.link.to_string()),
            ("DEVICE_BANDWIDTH", options.speed.to_string()),
        ])?;
        let mut arguments = arguments.to_vec();
        if !arguments.iter().any(|argument| argument == "--capacity") {
            // The usual headroom is for a real driver.
            arguments.extend(["--headroom".to_owned(), "0".to_owned()]);
        }
        let node = Node::start(gpus.environment(&[]), &arguments)?;
        complain!(
            "nvshare: {} simulated with {} each; to watch: nvshare status --runtime-dir {}",
            if options.gpus == 1 { "1 GPU".into() } else { format!("{} GPUs", options.gpus) },
            format_size(options.memory),
            node.dir().display()
        );
        Ok(Self { node, _gpus: gpus })
    }

    /// For programs that are to find them. What `nvshare run` sets itself is left out.
    pub fn environment(&self) -> impl Iterator<Item = (String, OsString)> {
        self.node.environment().into_iter().filter(|(name, _)| name != "LD_PRELOAD")
    }

    /// The arbiter's directory.
    pub fn dir(&self) -> std::path::PathBuf {
        self.node.dir().to_owned()
    }
}
