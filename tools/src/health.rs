//! `nvshare health`: whether the node is as it should be, for scripts and for probes of a container.
//!
//! What is judged is collected first ([`Facts`]), and judged by a function of it ([`checks`]).

use crate::ctl::{self, Report};
use crate::layout;
use crate::status::{self, Node};
use crate::{Failure, node, say};
use nvshare::control::SettingsChange;
use nvshare::page::Stall;
use nvshare::paths;
use nvshare::release::RELEASE;
use nvshare::units::{Nanos, SECOND, format_nanos, format_size};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Options of `nvshare health`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit status: 0 healthy; 1 degraded: clients run, and something should be done; 2 no arbiter serves, or the command line is \
wrong. With --liveness a node that is degraded ends with 0 too: nothing that is found there is mended by a restart.

Examples:
  nvshare health
  nvshare health --json | jq '.checks[] | select(.verdict != \"healthy\")'
  livenessProbe: {exec: {command: [nvshare, health, --liveness]}}")]
pub struct Options {
    /// Write one JSON object, for programs, instead of the table
    #[arg(long)]
    json: bool,
    /// Fail only if no arbiter serves
    #[arg(long)]
    liveness: bool,
    /// Directory of the control pages and the arbiter's socket [default: $NVSHARE_RUNTIME_DIR, or /run/nvshare, or one of
    /// your own]
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
}

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As it should be.
    Healthy,
    /// Clients run, and something should be done.
    Degraded,
    /// No arbiter serves.
    Down,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Degraded => "degraded",
            Self::Down => "down",
        }
    }
}

/// What was found of one matter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// The matter, a word.
    pub name: String,
    /// How it is.
    pub verdict: Verdict,
    /// What was found, a sentence.
    pub found: String,
    /// What to do; null if nothing.
    pub remedy: Option<String>,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// The worst of the checks.
    pub verdict: Verdict,
    /// What was found.
    pub checks: Vec<Check>,
}

/// What is judged.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Whether an arbiter takes a connection.
    pub answers: bool,
    /// Its settings, or why it gave none.
    pub report: Result<Report, String>,
    /// What the pages say, or why they cannot be read.
    pub node: Result<Node, String>,
    /// Why NVML cannot be loaded; `None` if it can.
    pub nvml: Option<String>,
}

/// A client that has been unable to give way for so long is reported, ns.
const STALLED: Nanos = 10 * SECOND;

/// Memory of foreign programs above this part of the pool is reported.
const FOREIGN_PERCENT: u64 = 10;

/// Host memory below this part is reported.
const HOST_PERCENT: u64 = 10;

/// Judges.
pub fn checks(facts: &Facts) -> Health {
    let mut checks = vec![arbiter(facts), versions(facts), pages(facts)];
    if let Ok(node) = &facts.node {
        checks.extend([books(node), clients(node), foreign(node)]);
    }
    checks.extend([host_memory(facts), nvml(facts)].into_iter().flatten());
    let verdict = checks.iter().map(|check| check.verdict).max().unwrap_or(Verdict::Down);
    Health { verdict, checks }
}

fn check(name: &str, verdict: Verdict, found: impl Into<String>, remedy: Option<String>) -> Check {
    Check { name: name.into(), verdict, found: found.into(), remedy }
}

fn healthy(name: &str, found: impl Into<String>) -> Check {
    check(name, Verdict::Healthy, found, None)
}

fn degraded(name: &str, found: impl Into<String>, remedy: impl Into<String>) -> Check {
    check(name, Verdict::Degraded, found, Some(remedy.into()))
}

fn arbiter(facts: &Facts) -> Check {
    let down = |found: &str, remedy: &str| check("arbiter", Verdict::Down, found, Some(remedy.into()));
    if !facts.answers {
        return down(
            "no arbiter answers; clients that run go on, and none can come",
            "systemctl start nvshare-arbiter, and journalctl -u nvshare-arbiter if it does not stay",
        );
    }
    let gpus = facts.node.iter().flat_map(|node| &node.gpus);
    let silent: Vec<_> = gpus.clone().filter(|gpu| !gpu.arbiter_alive).map(|gpu| gpu.uuid.as_str()).collect();
    match silent.is_empty() {
        true => healthy("arbiter", "an arbiter answers"),
        false => down(
            &format!("the arbiter of {} has not been alive for three seconds", silent.join(", ")),
            "it is stopped or hangs: systemctl restart nvshare-arbiter; clients go on meanwhile",
        ),
    }
}

fn versions(facts: &Facts) -> Check {
    match &facts.report {
        Ok(report) if report.release == RELEASE => {
            healthy("versions", format!("the arbiter and this program are nvshare {RELEASE}"))
        }
        Ok(report) => degraded(
            "versions",
            format!("the arbiter is nvshare {}, and this program is {RELEASE}", report.release),
            "after an upgrade: systemctl restart nvshare-arbiter; clients that run go on",
        ),
        Err(_) if !facts.answers => healthy("versions", "nothing to compare"),
        Err(why) => degraded(
            "versions",
            format!("the arbiter does not tell its settings: {why}"),
            "if it is of another release than this program: systemctl restart nvshare-arbiter",
        ),
    }
}

fn pages(facts: &Facts) -> Check {
    match &facts.node {
        Ok(node) if node.unreadable.is_empty() => {
            healthy("pages", format!("the pages of {} can be read", gpus(node.gpus.len())))
        }
        Ok(node) => degraded(
            "pages",
            format!("cannot be read: {}", node.unreadable.join("; ")),
            "restart the arbiter, which moves pages of other releases aside: systemctl restart nvshare-arbiter",
        ),
        Err(why) => check("pages", Verdict::Down, why.clone(), Some("start an arbiter first".into())),
    }
}

fn gpus(count: usize) -> String {
    if count == 1 { "1 GPU".into() } else { format!("{count} GPUs") }
}

fn books(node: &Node) -> Check {
    let repaired: u64 = node.gpus.iter().map(|gpu| gpu.repaired).sum();
    if repaired == 0 {
        return healthy("books", "the books have always balanced");
    }
    degraded(
        "books",
        format!("the books did not balance {repaired} times, and were repaired: they are right now"),
        "a client has written into the page what it must not, or nvshare has a fault: please report it with the arbiter's log",
    )
}

fn clients(node: &Node) -> Check {
    let all = || node.gpus.iter().flat_map(|gpu| gpu.clients.iter().map(move |client| (gpu, client)));
    let stalled = all().filter_map(|(gpu, client)| {
        let stall = Stall::named(client.stall.as_deref()?)?;
        let lasts = client.stalled_ns.filter(|lasts| *lasts >= STALLED)?;
        let who = format!("pid {} ({}) on {}", client.pid, client.name, gpu.uuid);
        let found = format!("{who} cannot give way for {}: {}", format_nanos(lasts), stall.reason());
        Some((found, stall.remedy().to_owned()))
    });
    let overdue = all().filter(|(_, client)| client.overdue).map(|(gpu, client)| {
        (
            format!("pid {} ({}) on {} does not give up its compute turn", client.pid, client.name, gpu.uuid),
            "it is stopped, or its kernels are long: continue it, or end it".to_owned(),
        )
    });
    let (found, mut remedies): (Vec<_>, Vec<_>) = stalled.chain(overdue).unzip();
    if found.is_empty() {
        return healthy("clients", "every client can give way");
    }
    remedies.dedup();
    degraded("clients", found.join("; "), remedies.join("; "))
}

fn foreign(node: &Node) -> Check {
    let mut found = Vec::new();
    for gpu in &node.gpus {
        if gpu.free_bytes < 0 {
            let owed = format_size(gpu.free_bytes.unsigned_abs());
            found.push(format!("{} is overbooked by {owed}", gpu.uuid));
        }
        if gpu.foreign_bytes > gpu.capacity_bytes / 100 * FOREIGN_PERCENT {
            let (count, has) = (gpu.foreign_processes, format_size(gpu.foreign_bytes));
            found.push(format!("{count} programs outside nvshare have {has} of {}", gpu.uuid));
        }
    }
    if found.is_empty() {
        return healthy("memory", "no GPU is overbooked, and programs outside nvshare have little");
    }
    degraded(
        "memory",
        found.join("; "),
        "start programs under nvshare (nvshare run, LD_PRELOAD); the arbiter's log names those that are not",
    )
}

fn host_memory(facts: &Facts) -> Option<Check> {
    let node = facts.node.as_ref().ok()?;
    let (available, total) = (node.host_available_bytes?, node.host_memory_bytes?);
    let found = format!("{} of {} host memory are available", format_size(available), format_size(total));
    Some(if available >= total / 100 * HOST_PERCENT {
        healthy("host-memory", found)
    } else {
        degraded(
            "host-memory",
            found,
            "what does not fit on the GPU moves there: end a program, or give clients memory limits (nvshare set)",
        )
    })
}

fn nvml(facts: &Facts) -> Option<Check> {
    facts.report.as_ref().ok()?;
    Some(match &facts.nvml {
        None => healthy("nvml", "NVML can be loaded"),
        Some(why) => degraded(
            "nvml",
            format!("NVML cannot be loaded here, so contexts may not be counted: {why}"),
            "install the NVIDIA driver, or name the library with nvml-library in /etc/nvshare/nvshare.toml",
        ),
    })
}

/// Why NVML cannot be loaded, from where the arbiter loads it.
fn look_for_nvml(report: &Report) -> Option<String> {
    let path = report.node.iter().find(|setting| setting.name == "nvml-library")?.value.as_deref()?;
    // SAFETY: this is NVML, whose initialisers do nothing but prepare it.
    unsafe { libloading::Library::new(path) }.err().map(|error| error.to_string())
}

/// Collects what is judged.
fn collect(dir: &std::path::Path) -> Facts {
    let answers = node::answers(dir);
    let message = |failure: Failure| failure.message;
    let report = match answers {
        true => ctl::ask(dir, None, &SettingsChange::Ask).and_then(|said| ctl::read(&said)).map_err(message),
        false => Err("no arbiter answers".into()),
    };
    Facts {
        answers,
        nvml: report.as_ref().ok().and_then(look_for_nvml),
        report,
        node: status::read(dir).map_err(message),
    }
}

/// Says how the node is.
///
/// # Errors
/// It is not healthy: the exit status says how.
pub fn run(options: &Options) -> Result<(), Failure> {
    let dir = options.runtime_dir.clone().unwrap_or_else(paths::runtime_dir);
    let health = checks(&collect(&dir));
    if options.json {
        let text = serde_json::to_string_pretty(&health)
            .map_err(|error| Failure::with_status(1, error.to_string()))?;
        say!("{text}");
    } else {
        print(&health);
    }
    match health.verdict {
        Verdict::Healthy => Ok(()),
        Verdict::Degraded if options.liveness => Ok(()),
        // What is wrong has been said.
        Verdict::Degraded => Err(Failure::with_status(1, "")),
        Verdict::Down => Err(Failure::with_status(2, "")),
    }
}

fn print(health: &Health) {
    const INDENT: usize = 22;
    let (width, indent) = (layout::width(), " ".repeat(INDENT));
    say!("{}", health.verdict.name());
    for check in &health.checks {
        let found = format!("{:<12} {:<9}{}", check.name, check.verdict.name(), check.found);
        say!("{}", layout::paragraph(&found, &indent, width));
        if let Some(remedy) = &check.remedy {
            say!("{}", layout::paragraph(&format!("{indent}-> {remedy}"), &format!("{indent}   "), width));
        }
    }
}

#[cfg(test)]
mod tests;
