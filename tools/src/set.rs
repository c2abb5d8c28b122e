//! `nvshare set`: a running client's weight, priority and limits.
//!
//! The client is looked up in the pages, as `nvshare status` shows them; the arbiter makes the change.

use crate::Failure;
use crate::say;
use crate::whom::{clients, only};
use nvshare::change;
use nvshare::paths;
use nvshare::shares::{ComputeLimit, MemoryLimit, Priority};
use nvshare::units::GpuUuid;
use nvshare::wire::{Change, SharesUpdate};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Options of `nvshare set`.
#[derive(Debug, clap::Args)]
#[command(
    group = clap::ArgGroup::new("shares").required(true).multiple(true),
    // The generated one is a line of more than 80 columns, which is not wrapped.
    override_usage = "\
nvshare set [OPTIONS] <CLIENT>
                   [--weight <WEIGHT>] [--priority <PRIORITY>]
                   [--memory-limit <SIZE|PERCENT|none>]
                   [--compute-limit <PERCENT|none>]",
    after_help = "\
At least one of --weight, --priority, --memory-limit and --compute-limit is needed.

CLIENT is a pid, a slot's number or a client's name, as `nvshare status` shows them. If it means more than one client, \
they are listed: write pid:4242, slot:3 or name:train, and --gpu where a process has several GPUs.

Whose client it is, whom the arbiter runs as, and root may change it. It takes effect at once. A memory limit below what \
the client has takes nothing away: it gets no more until it has less.

Examples:
  nvshare set 4242 --weight 300            three times the GPU time of the usual
  nvshare set train --priority low         its turn comes later than others'
  nvshare set slot:3 --memory-limit 25%    a quarter of the GPU
  nvshare set slot:3 --memory-limit none
  nvshare set train --compute-limit 30%    at most that part of the GPU's time"
)]
pub struct Options {
    /// Which client: its pid, slot or name, or one of them by pid:N, slot:N or name:TEXT
    client: String,
    /// Share of GPU time against other clients', 1 to 1000; 100 is usual
    #[arg(long, group = "shares", value_parser = crate::weight)]
    weight: Option<u32>,
    /// How soon the client's turn comes: low, normal or high
    #[arg(long, group = "shares", value_parser = crate::priority)]
    priority: Option<Priority>,
    /// The most GPU memory that the client may have: a size, such as 8GiB, a part of the GPU, such as 25%, or none
    #[arg(long, group = "shares", value_name = "SIZE|PERCENT|none", value_parser = crate::memory_limit)]
    memory_limit: Option<MemoryLimit>,
    /// The most of the GPU's time that the client may have, over any two seconds: a part, such as 30%, or none
    #[arg(long, group = "shares", value_name = "PERCENT|none", value_parser = crate::compute_limit)]
    compute_limit: Option<ComputeLimit>,
    /// Look for the client on this GPU only
    #[arg(long, value_name = "UUID", value_parser = crate::gpu)]
    gpu: Option<GpuUuid>,
    /// Directory of the control pages and the arbiter's socket [default: $NVSHARE_RUNTIME_DIR, or /run/nvshare, or one of
    /// your own]
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
}

/// How long an arbiter that is just starting is waited for.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Changes a client's shares, and says what they are then.
///
/// # Errors
/// There is no such client, or more than one; no arbiter answers, or it refuses.
pub fn run(options: &Options) -> Result<(), Failure> {
    run_in(&options.runtime_dir.clone().unwrap_or_else(paths::runtime_dir), options)
}

/// The same in this directory, whatever the options say.
///
/// # Errors
/// As for [`run`].
pub fn run_in(dir: &Path, options: &Options) -> Result<(), Failure> {
    let found = only(&options.client, options.gpu, clients(dir)?)?;
    let Options { weight, priority, memory_limit, compute_limit, .. } = *options;
    let edit = SharesUpdate { weight, priority, memory_limit, compute_limit };
    let wanted = Change::new(found.gpu, found.client.slot, found.client.owner, edit);
    let shares = change::change(&paths::socket(dir), &wanted, TIMEOUT)
        .map_err(|error| Failure::usage(format!("{found}: {error}")))?;
    say!("{found}: {shares} (was: {})", found.client.shares);
    Ok(())
}
