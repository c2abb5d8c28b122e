//! `nvshare bench`: what this machine makes of nvshare.

pub mod bookkeeping;
pub mod handoff;
pub mod launch;
pub mod sim;
pub mod stats;
pub mod switch;

use crate::Failure;
use crate::digits::significant;
use crate::layout::{self, figures, words};
use crate::say;
use comfy_table::presets;
use stats::Row;

/// Options of `nvshare bench`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  nvshare bench handoff
  nvshare bench launch --json | jq 'select(.unit == \"ns\") | {name, p50}'
  nvshare bench switch --gpu

With --json, one object a line: name, unit, n (samples), p50, p99, max.
The simulated GPU is a test double: launch and switch say something about a GPU only with --gpu.")]
pub struct Options {
    #[command(subcommand)]
    what: What,
    /// Write one JSON object a line, for programs, instead of the table
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
        say!("{}", table(&rows, layout::width()));
    }
    Ok(())
}

fn table(rows: &[Row], width: usize) -> String {
    let columns =
        [words("name"), words("unit"), figures("n"), figures("p50"), figures("p99"), figures("max")];
    let cells = |row: &Row| {
        let [p50, p99, max] = [row.p50, row.p99, row.max].map(significant);
        vec![row.name.clone(), row.unit.clone(), row.n.to_string(), p50, p99, max]
    };
    let rows: Vec<Vec<String>> = rows.iter().map(cells).collect();
    layout::table(&columns, &rows, presets::NOTHING, width)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_fits_80_columns_and_has_three_significant_digits() {
        let rows = [
            Row::single("launch_syscalls_per_million", "calls", 1_000_000, 0.0),
            Row::of("evict_100000_regions", "us", vec![0.98765, 123.456, 98_765.4]),
        ];
        let text = table(&rows, layout::USUAL_WIDTH);
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.lines().all(|line| line.len() <= 80), "{text}");
        let last: Vec<&str> = text.lines().last().unwrap_or_default().split_whitespace().collect();
        assert_eq!(last, ["evict_100000_regions", "us", "3", "123", "98765", "98765"], "{text}");
    }
}
