//! The command line of `nvshare`. In the library, so that the manual pages and completions are made of it too.

use crate::{bench, ctl, demo, health, internal, kubernetes, run, set, sim, status, top, trace, wait};
use clap::{Parser, Subcommand};

/// Several processes share one GPU as if each had all of it.
#[derive(Debug, Parser)]
#[command(
    name = "nvshare",
    version,
    arg_required_else_help = true,
    max_term_width = 80,
    after_help = "Examples:
  nvshare demo                        see it work, without a GPU
  nvshare run -- python3 train.py     run a program, as many at once as you like
  nvshare status                      who runs, who waits, whose memory is where
  nvshare top                         the same, live
  nvshare set 4242 --priority high    change what a running client may have
  nvshare ctl set quantum=2s          change what the arbiter does
  nvshare bench handoff               what a hand-off between processes costs

`nvshare COMMAND --help` has more."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a program on the shared GPUs
    Run(run::Options),
    /// Show GPUs and clients: who runs, who waits, whose memory is where
    Status(status::Options),
    /// Watch GPUs and clients live, and steer clients
    Top(top::Options),
    /// Change a running client's weight, priority or memory limit
    Set(set::Options),
    /// Show and change settings while it runs, pause and resume clients
    Ctl(ctl::Options),
    /// Wait until an arbiter serves, or until a client is in some state
    Wait(wait::Options),
    /// Say whether the node is as it should be, for scripts and probes
    Health(health::Options),
    /// Measure this machine: a launch, a hand-off, a switch
    Bench(bench::Options),
    /// See several jobs share a GPU that is too small for them; simulated, or real with --gpu
    Demo(demo::Options),
    /// Simulate clients, GPUs and policy from a scenario file: what would be, in seconds
    Sim(sim::Options),
    /// What the clients did lately, or do from now on, for a trace viewer or as a picture
    Trace(trace::Options),
    /// Offer this node's GPUs to pods of Kubernetes as virtual ones, by the kubelet's device plugin protocol
    DevicePlugin(kubernetes::Options),
    /// Offer this node's GPUs to claims of Kubernetes as devices with memory, compute and shares (DRA)
    DraDriver(kubernetes::Options),
    /// What the commands start themselves again as
    #[command(hide = true)]
    Internal(internal::Options),
}

/// The arguments of this program, as if it had been called `nvshare`: a link to it with the name `nvshare-top` is `nvshare top`.
pub fn arguments(mut given: Vec<std::ffi::OsString>) -> Vec<std::ffi::OsString> {
    let name = given.first().map(std::path::Path::new).and_then(std::path::Path::file_name);
    if name.is_some_and(|name| name == "nvshare-top") {
        given[0] = "nvshare".into();
        given.insert(1, "top".into());
    }
    given
}
