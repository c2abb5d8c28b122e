//! What the commands start this program again as. Nobody types these.

use crate::Failure;
use crate::bench::{handoff, launch, switch};
use crate::compute::{self, Compute};
use crate::job::{self, Job};

/// Options of `nvshare internal`.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// A job; says its events on the standard output
    Job(Job),
    /// Kernels of one length, without a pause or in bursts; says how many were done when
    Compute(Compute),
    /// The second process of `bench handoff`
    HandoffPeer(handoff::Peer),
    /// The measured process of `bench launch`
    Launches(launch::Measured),
    /// Its traced process
    TracedLaunches,
    /// Pinned copies
    Copies(switch::Copies),
}

/// Runs one of them.
///
/// # Errors
/// Its own.
pub fn run(options: Options) -> Result<(), Failure> {
    match options.what {
        What::Job(job) => {
            let outcome = job::run_here(&job)?;
            if outcome.right {
                Ok(())
            } else {
                Err(Failure::with_status(1, format!("wrong data in buffers {:?}", outcome.wrong_buffers)))
            }
        }
        What::Compute(options) => compute::run_here(&options),
        What::HandoffPeer(options) => handoff::peer(&options),
        What::Launches(options) => launch::measured(&options),
        What::TracedLaunches => launch::traced(),
        What::Copies(options) => switch::copies(&options),
    }
}
