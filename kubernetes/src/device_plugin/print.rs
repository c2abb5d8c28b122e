//! `--print`: the GPUs, and in which order the next containers get them.

use crate::Error;
use crate::inventory::{Gpu, Health, Inventory};
use crate::options::{DevicePlugin as Options, PrintFormat};
use crate::placement::{self, Candidate};
use comfy_table::{Table, presets};
use nvshare::units::{format_nanos, format_size};
use serde::Serialize;
use std::io::{self, Write};

/// A GPU, for programs.
#[derive(Debug, Serialize)]
struct Line<'a> {
    uuid: &'a str,
    index: u32,
    model: &'a str,
    healthy: bool,
    reason: Option<&'a str>,
    pool_bytes: u64,
    numa_node: Option<i64>,
    tenants: u32,
    demand_bytes: u64,
    waiting_ns: u64,
    busy: f64,
    score: f64,
    virtual_gpus: u32,
}

/// Writes the GPUs in the order in which the next containers get them. Which virtual GPUs were given away only the kubelet knows: here each
/// client stands for one.
///
/// # Errors
/// Standard output cannot be written.
pub fn print(mut inventory: Inventory, options: &Options, format: PrintFormat) -> Result<(), Error> {
    let gpus = inventory.look();
    let text = match format {
        PrintFormat::Table => table(&gpus, options.common.shares),
        PrintFormat::Json => {
            let lines: Vec<_> = ordered(&gpus, options.common.shares)
                .iter()
                .map(|gpu| line(gpu, options.common.shares))
                .collect();
            serde_json::to_string_pretty(&lines)
                .map_err(|error| Error::System { what: "JSON cannot be made", cause: error.into() })?
        }
    };
    match writeln!(io::stdout(), "{text}") {
        Err(cause) if cause.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::System { what: "standard output cannot be written", cause })
        }
        _ => Ok(()),
    }
}

fn ordered(gpus: &[Gpu], shares: u32) -> Vec<Candidate<'_>> {
    let mut all: Vec<_> = gpus.iter().map(|gpu| Candidate { gpu, given: gpu.load.tenants }).collect();
    placement::order(&mut all, shares);
    all
}

fn line<'a>(candidate: &Candidate<'a>, shares: u32) -> Line<'a> {
    let Gpu { uuid, index, model, memory, numa_node, health, load } = candidate.gpu;
    Line {
        uuid,
        index: *index,
        model,
        healthy: health.is_healthy(),
        reason: match health {
            Health::Healthy => None,
            Health::Unhealthy(why) => Some(why),
        },
        pool_bytes: *memory,
        numa_node: *numa_node,
        tenants: load.tenants,
        demand_bytes: load.demand,
        waiting_ns: u64::try_from(load.waiting.as_nanos()).unwrap_or(u64::MAX),
        busy: load.busy,
        score: candidate.score(shares),
        virtual_gpus: shares,
    }
}

fn table(gpus: &[Gpu], shares: u32) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header([
        "next", "GPU", "UUID", "model", "pool", "needed", "tenants", "waiting", "busy", "score", "health",
    ]);
    for (place, candidate) in ordered(gpus, shares).iter().enumerate() {
        let Gpu { uuid, index, model, memory, health, load, .. } = candidate.gpu;
        let health = match health {
            Health::Healthy => "healthy",
            Health::Unhealthy(_) => "unhealthy",
        };
        table.add_row([
            (place + 1).to_string(),
            index.to_string(),
            uuid.clone(),
            model.clone(),
            format_size(*memory),
            format_size(load.demand),
            load.tenants.to_string(),
            format_nanos(u64::try_from(load.waiting.as_nanos()).unwrap_or(u64::MAX)),
            format!("{:.0}%", load.busy * 100.0),
            format!("{:.2}", candidate.score(shares)),
            health.to_owned(),
        ]);
    }
    let reasons = gpus.iter().filter_map(|gpu| match &gpu.health {
        Health::Unhealthy(why) => Some(format!("\n{why}")),
        Health::Healthy => None,
    });
    table.trim_fmt() + &reasons.collect::<String>()
}
