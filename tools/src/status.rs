//! `nvshare status`: what the pages of this node say.
//!
//! It reads the pages itself and asks nobody, so it works while the arbiter is down, and shows what every
//! client sees.

use crate::digits::{self, bandwidth};
use crate::layout::{self, Column, figures, words};
use crate::{Failure, say};
use comfy_table::presets;
use nvshare::page::Stall;
use nvshare::paths;
use nvshare::shares::{ComputeLimit, Shares};
use nvshare::units::{Nanos, format_size};
use nvshare_stats::description::{FieldDescription, describe};
pub use nvshare_stats::{Client, Gpu, Node};
use nvshare_stats::{ReadError, Reader};
use std::path::{Path, PathBuf};

/// The NVML library, as the loader finds it.
const NVML: &str = "libnvidia-ml.so.1";

/// Options of `nvshare status`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A process is told the pool as the GPU's memory, by CUDA and by NVML. Free for it is the pool less what it needs, its \
context, and what others have that cannot move: their contexts and what is fixed. Their other data moves out of its way.

Below the clients stand those that are to give way and cannot, with the reason, those that run together with others \
because they wait for each other (a gang), and those whose weight, priority or limit is not the usual one; `nvshare set` \
changes them. Where clients take compute turns (where they differ in these), each has a line with its part of the GPU's \
time over the last seconds.

A screen that is too narrow for the table has further columns below. COLUMNS sets its width.

Examples:
  nvshare status
  nvshare status --describe          what each field means
  nvshare status --json | jq '.gpus[].clients[] | {name, phase}'")]
pub struct Options {
    /// Write one JSON object, for programs, instead of the tables
    #[arg(long)]
    json: bool,
    /// List every field of the JSON with its kind, its unit and what it says; with --json, for programs
    #[arg(long)]
    describe: bool,
    /// Directory of the control pages [default: $NVSHARE_RUNTIME_DIR, or /run/nvshare, or one of your own]
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
}

/// Reads all pages of a runtime directory.
///
/// # Errors
/// The directory has none.
pub fn read(dir: &Path) -> Result<Node, Failure> {
    Ok(nvshare_stats::read(dir)?)
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        Self::usage(error.to_string())
    }
}

/// Prints the status.
///
/// # Errors
/// There is nothing to show, or some page cannot be read.
pub fn run(options: &Options) -> Result<(), Failure> {
    if options.describe {
        return explain(options.json);
    }
    let dir = options.runtime_dir.clone().unwrap_or_else(paths::runtime_dir);
    let mut reader = Reader::new(&dir);
    if options.json {
        reader = reader.with_hardware(Path::new(NVML));
    }
    let node = reader.read()?;
    if options.json {
        print_json(&node)?;
    } else {
        let width = layout::width();
        for (index, gpu) in node.gpus.iter().enumerate() {
            if index > 0 {
                say!();
            }
            print(gpu, width);
        }
    }
    if node.unreadable.is_empty() { Ok(()) } else { Err(Failure::usage(node.unreadable.join("\n         "))) }
}

fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value);
    say!("{}", text.map_err(|error| Failure::with_status(1, error.to_string()))?);
    Ok(())
}

/// Prints the definitions of all statistics.
fn explain(json: bool) -> Result<(), Failure> {
    let all = describe();
    if json {
        return print_json(&all);
    }
    let width = layout::width();
    say!("Version {} of the JSON.", all.schema_version);
    for subject in &all.subjects {
        let headline = format!("{}: {}", subject.subject, subject.description);
        say!("\n{}", layout::paragraph(&headline, "  ", width));
        for field in &subject.fields {
            say!("  {}", heading(field));
            let indented = format!("      {}", field.description);
            say!("{}", layout::paragraph(&indented, "      ", width));
        }
    }
    Ok(())
}

/// A field's name, kind and unit.
fn heading(field: &FieldDescription) -> String {
    let unit = field.unit.map(|unit| format!(", {unit}")).unwrap_or_default();
    format!("{} ({}{unit})", field.name, field.kind)
}

fn print(gpu: &Gpu, width: usize) {
    let arbiter = if gpu.arbiter_alive { "alive" } else { "NOT ALIVE: no new clients until it is back" };
    let free = if gpu.free_bytes < 0 {
        format!("{} owed", format_size(gpu.free_bytes.unsigned_abs()))
    } else {
        format!("{} free", format_size(gpu.free_bytes as u64))
    };
    say!("{}", gpu.uuid);
    say!("  {} pool, {free}, {} in contexts", format_size(gpu.capacity_bytes), format_size(gpu.pinned_bytes));
    let indented = |text: &str| say!("{}", layout::paragraph(text, "    ", width));
    indented(&format!(
        "  arbiter {} {arbiter}; link {} in, {} out",
        gpu.arbiter_pid,
        bandwidth(gpu.bandwidth_in),
        bandwidth(gpu.bandwidth_out)
    ));
    if gpu.foreign_processes > 0 {
        let (count, has) = match gpu.foreign_processes {
            1 => ("1 process".to_owned(), "has"),
            several => (format!("{several} processes"), "have"),
        };
        say!("  {count} outside nvshare {has} {}", format_size(gpu.foreign_bytes));
    }
    if gpu.clients.is_empty() {
        say!("  no clients");
        return;
    }
    let rows: Vec<Vec<String>> = gpu.clients.iter().map(cells).collect();
    say!("{}", layout::table(&COLUMNS, &rows, presets::NOTHING, width));
    gpu.clients.iter().filter_map(stall).for_each(|line| indented(&line));
    gpu.clients.iter().filter_map(shares).for_each(|line| indented(&line));
    gpu.clients.iter().filter_map(compute).for_each(|line| indented(&line));
}

/// Of the table of clients. Those that are asked for most come first: a narrow screen has the others below.
const COLUMNS: [Column; 12] = [
    figures("slot"),
    figures("pid"),
    words("name"),
    words("phase"),
    words("since"),
    figures("needs"),
    figures("on GPU"),
    figures("fixed"),
    figures("context"),
    figures("slices"),
    figures("in"),
    figures("out"),
];

fn cells(client: &Client) -> Vec<String> {
    let since = match (client.waiting_ns, client.slice_left_ns) {
        (Some(ns), _) => format!("waits {}", span(ns)),
        (None, Some(ns)) => format!("{} left", span(ns)),
        (None, None) => "-".into(),
    };
    vec![
        client.slot.to_string(),
        client.pid.to_string(),
        client.name.clone(),
        client.phase.clone(),
        since,
        format_size(client.demand_bytes),
        format_size(client.resident_bytes),
        format_size(client.unmovable_bytes),
        format_size(client.pinned_bytes),
        client.slices.to_string(),
        format_size(client.bytes_in),
        format_size(client.bytes_out),
    ]
}

fn span(ns: Nanos) -> String {
    digits::time(ns as f64 / 1e9)
}

/// What keeps a client from giving way, for how long, and what to do about it.
fn stall(client: &Client) -> Option<String> {
    let stall = Stall::named(client.stall.as_deref()?)?;
    Some(format!(
        "  slot {} (pid {}) cannot give way, for {}: {}; {}",
        client.slot,
        client.pid,
        span(client.stalled_ns?),
        stall.reason(),
        stall.remedy()
    ))
}

/// What a client's gang and shares are, if they are not the usual ones: few have any, and the table is wide enough.
fn shares(client: &Client) -> Option<String> {
    let usual = Shares::default();
    let mut unusual = Vec::new();
    if client.paused {
        unusual.push(format!("paused; `nvshare ctl resume slot:{}` lets it go on", client.slot));
    }
    unusual.extend(client.gang.map(|gang| format!("runs together with gang {gang}")));
    if client.weight != usual.weight {
        unusual.push(format!("weight {}", client.weight));
    }
    if client.priority != usual.priority.name() {
        unusual.push(format!("priority {}", client.priority));
    }
    if let (Some(bytes), Some(limit)) = (client.memory_limit_bytes, &client.memory_limit) {
        let part = if limit.ends_with('%') { format!(" ({limit})") } else { String::new() };
        unusual.push(format!("at most {}{part}", format_size(bytes)));
    }
    (!unusual.is_empty())
        .then(|| format!("  slot {} (pid {}): {}", client.slot, client.pid, unusual.join(", ")))
}

/// A client's part of the GPU's time, if it takes compute turns, and what it waits for.
fn compute(client: &Client) -> Option<String> {
    let share = client.gpu_share?;
    let limit = client.compute_limit.map(|limit| ComputeLimit::Part((limit * 1e6).round() as u32));
    let limit = limit.map(|limit| format!(" (at most {limit})")).unwrap_or_default();
    let overdue = if client.overdue {
        "; its work does not end, and others go on beside it: it may be stopped, or its kernels are long"
    } else {
        ""
    };
    Some(format!(
        "  slot {} (pid {}): {:.0}% of the GPU's time lately{limit}, {} in all, held for {}{overdue}",
        client.slot,
        client.pid,
        share * 100.0,
        span(client.gpu_ns),
        span(client.held_ns)
    ))
}
