//! `nvshare bench`: what this machine makes of nvshare.

pub mod bookkeeping;
pub mod handoff;
pub mod launch;
pub mod sim;
pub mod stats;
pub mod switch;

use crate::Failure;
use crate::say;
use stats::{Row, figure};

/// Options of `nvshare bench`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  nvshare bench handoff
  nvshare bench launch --json | jq 'select(.name == \"launch_added_1_thread\") | .p50'
  nvshare bench switch --gpu

With --json, one object a line: name, unit, n (samples), p50, p99, max.
The simulated GPU is a test double: launch and switch say something about a GPU only with --gpu.")]
pub struct Options {
    #[command(subcommand)]
    what: What,
    /// One JSON object a line, for programs
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// What nvshare adds to a kernel launch while nobody waits for the GPU
    Launch(launch::Options),
    /// The right to run, passed on between two processes with no memory to move
    Handoff(handoff::Options),
    /// Two processes that don't fit together change places
    Switch(switch::Options),
    /// The books of many small allocations that go out and come in, without a GPU
    Bookkeeping(bookkeeping::Options),
    /// Processes that take turns on the simulated GPU, against what `nvshare sim` says of them
    Sim(sim::Options),
}

/// Measures and prints.
///
/// # Errors
/// The machine cannot be measured, or the options make no sense.
pub fn run(options: &Options) -> Result<(), Failure> {
    let rows = match &options.what {
        What::Launch(options) => launch::measure(options)?,
        What::Handoff(options) => handoff::measure(options)?,
        What::Switch(options) => switch::measure(options)?,
        What::Bookkeeping(options) => bookkeeping::measure(options)?,
        What::Sim(options) => sim::measure(options)?,
    };
    if options.json {
        rows.iter().for_each(|row| say!("{}", row.json()));
    } else {
        say!("{}", table(&rows));
    }
    Ok(())
}

fn table(rows: &[Row]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["name", "unit", "n", "p50", "p99", "max"]);
    for row in rows {
        table.add_row([
            row.name.clone(),
            row.unit.clone(),
            row.n.to_string(),
            figure(row.p50),
            figure(row.p99),
            figure(row.max),
        ]);
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(comfy_table::CellAlignment::Right);
    }
    table
}
