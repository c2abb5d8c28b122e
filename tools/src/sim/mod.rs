//! `nvshare sim`: what a scenario would come to, by the very policy that decides on a real GPU.
//!
//! A discrete-event simulation: every GPU knows when something is next due on it, and the clock jumps from one such
//! moment to the next. GPUs know nothing of one another once clients are placed, but for those of a node where clients of
//! several GPUs run together.
//!
//! | module | what it holds |
//! |---|---|
//! | [`scenario`], `quantity` | the file |
//! | `random`, `job`, `task` | what clients do, and when they come |
//! | `gpu`, `observed` | a GPU under nvshare: the phases, the link; the snapshot, and what the policy says of it |
//! | `gang` | clients of several GPUs that run together |
//! | `turns` | who computes, among those whose memory is in place |
//! | `paging` | a GPU under the C nvshare: turns, and pages that the driver moves |
//! | [`world`] | all of them, and where clients are placed |
//! | `metrics`, `fairness` | what is counted |
//! | [`report`], [`table`] | how it is told; the picture is [`crate::picture`]'s |

mod fairness;
mod gang;
mod gpu;
mod job;
mod metrics;
mod observed;
mod paging;
mod quantity;
mod random;
pub mod report;
pub mod scenario;
pub mod table;
mod task;
mod turns;
pub mod world;

use crate::picture::{self, Lane};
use crate::{Failure, layout, output};
pub use quantity::Time;
use scenario::Scenario;
use std::path::{Path, PathBuf};

/// Options of `nvshare sim`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  nvshare sim examples/scenarios/field-report-nvshare.toml --svg timeline.svg
  nvshare sim examples/scenarios/vgpus.toml --seed 7 --json - | jq .fairness

docs/simulator.md describes what is modelled, the file and the results.")]
pub struct Options {
    /// File that says what to simulate, in TOML
    scenario: PathBuf,
    /// Write the results as JSON to this file; - is the standard output, without the table
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw what every client did when, as SVG, into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Number that chance begins with, in place of the scenario's
    #[arg(long)]
    seed: Option<u64>,
}

/// Simulates and tells.
///
/// # Errors
/// The scenario is none, or the results cannot be written.
pub fn run(options: &Options) -> Result<(), Failure> {
    let scenario = Scenario::read(&options.scenario)?;
    let seed = options.seed.unwrap_or(scenario.seed);
    let outcome = world::simulate(&scenario, seed, options.svg.is_some());
    let report = report::Report::of(&scenario, seed, &outcome);
    if let Some(path) = &options.svg {
        write(path, &draw(&scenario, &outcome))?;
    }
    let Some(path) = &options.json else {
        output::write(format_args!("{}", table::of(&report, layout::width())));
        return Ok(());
    };
    let json = report.json();
    if path == Path::new("-") {
        output::write(format_args!("{json}"));
        return Ok(());
    }
    output::write(format_args!("{}", table::of(&report, layout::width())));
    write(path, &json)
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    std::fs::write(path, text)
        .map_err(|error| Failure::with_status(1, format!("{}: {error}", path.display())))
}

/// What the clients did, as a picture. The outcome must have been recorded.
pub fn draw(scenario: &Scenario, outcome: &world::Outcome) -> String {
    let mut clients: Vec<_> = outcome.clients.iter().collect();
    clients.sort_by_key(|tally| (tally.place, tally.arrived, tally.class, tally.number));
    let lanes: Vec<_> = clients
        .into_iter()
        .map(|tally| Lane {
            group: format!("GPU {}", tally.place),
            label: format!("{} {}", scenario.clients[tally.class].name, tally.number),
            segments: tally.segments.iter().flatten().copied().collect(),
            remark: if tally.finished.is_none() { "unfinished" } else { "" },
        })
        .collect();
    picture::draw(&scenario.name, &lanes, outcome.time)
}
