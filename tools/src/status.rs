//! `nvshare status`: what the pages of this node say.
//!
//! It reads the pages itself and asks nobody, so it works while the arbiter is down, and shows what every
//! client sees.

use crate::digits::{self, bandwidth};
use crate::layout::{self, Column, figures, words};
use crate::{Failure, say};
use comfy_table::presets;
use nvshare::map::MappedPage;
use nvshare::page::{Direction, Page, Stall};
use nvshare::shares::{ComputeLimit, MemoryLimit, Shares};
use nvshare::slot::{SLOTS, SlotIndex};
use nvshare::snapshot::Snapshot;
use nvshare::sync::now;
use nvshare::units::{GRANULE, Granules, Nanos, SECOND, bytes_of, format_size};
use nvshare::{paths, policy, record};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

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
  nvshare status --json | jq '.gpus[].clients[] | {name, phase}'")]
pub struct Options {
    /// Write one JSON object, for programs, instead of the tables
    #[arg(long)]
    json: bool,
    /// Directory of the control pages [default: $NVSHARE_RUNTIME_DIR, or /run/nvshare, or one of your own]
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
}

/// All GPUs of a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// The GPUs that have a page, by UUID.
    pub gpus: Vec<Gpu>,
    /// Pages that cannot be read, and why.
    pub unreadable: Vec<String>,
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Gpu {
    /// Its UUID.
    pub uuid: String,
    /// Bytes in the pool.
    pub capacity_bytes: u64,
    /// Bytes that are free; negative is a debt.
    pub free_bytes: i64,
    /// Bytes of all clients' contexts.
    pub pinned_bytes: u64,
    /// Bytes that NVML shows for processes that are no clients.
    pub foreign_bytes: u64,
    /// How many such processes there are.
    pub foreign_processes: u32,
    /// Measured or assumed bandwidth into the GPU, bytes a second.
    pub bandwidth_in: u64,
    /// The same out of it.
    pub bandwidth_out: u64,
    /// The arbiter's pid.
    pub arbiter_pid: u32,
    /// Whether it was alive within the last 3 s.
    pub arbiter_alive: bool,
    /// How many arbiters the page has had.
    pub arbiter_generation: u32,
    /// Times that the books were checked.
    pub audits: u64,
    /// Times that they did not balance and were repaired.
    pub repaired: u64,
    /// Clients that were cleaned up after.
    pub reaped: u64,
    /// The clients, by slot.
    pub clients: Vec<Client>,
}

/// One client.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Client {
    /// Its slot.
    pub slot: usize,
    /// Its process, as the arbiter sees it.
    pub pid: u32,
    /// What it calls itself.
    pub name: String,
    /// idle, waiting, filling, running, draining or leaving.
    pub phase: String,
    /// Whether it may load and run.
    pub admitted: bool,
    /// Bytes that its allocations need.
    pub demand_bytes: u64,
    /// Bytes of them on the GPU.
    pub resident_bytes: u64,
    /// Bytes of its context.
    pub pinned_bytes: u64,
    /// Bytes of the resident ones that cannot be evicted.
    pub unmovable_bytes: u64,
    /// How long it has been waiting, ns; null if it does not wait.
    pub waiting_ns: Option<u64>,
    /// How long its slice lasts yet, ns; null if nobody waits for its end.
    pub slice_left_ns: Option<u64>,
    /// The number of the gang of processes that it runs together with; null if it belongs to none.
    pub gang: Option<u64>,
    /// Whether a user has paused it: it is not admitted until it is resumed.
    pub paused: bool,
    /// Its share against others', 1 to 1000.
    pub weight: u32,
    /// low, normal or high: how soon its turn comes.
    pub priority: String,
    /// The most bytes that its allocations and its context may come to; null without a limit.
    pub memory_limit_bytes: Option<u64>,
    /// The limit as it was given, such as 25%; null without one.
    pub memory_limit: Option<String>,
    /// The most of the GPU's time that it may have over any two seconds, 0 to 1; null without a limit.
    pub compute_limit: Option<f64>,
    /// Whether it takes compute turns: the clients of the GPU differ in their shares.
    pub takes_turns: bool,
    /// GPU time that it has had in compute turns, in all, ns.
    pub gpu_ns: u64,
    /// Its part of the GPU's time over the last seconds, 0 to 1; null if it takes no compute turns. A second ago counts half.
    pub gpu_share: Option<f64>,
    /// GPU time that the policy has charged it with, ns: of each slice a k-th where k ran at once, whatever they did.
    pub charged_ns: u64,
    /// Time for which its threads have waited for a compute turn, ns.
    pub held_ns: u64,
    /// Compute turns that it has had.
    pub turns: u64,
    /// Times that others went on beside it, because it did not give up a compute turn.
    pub overruns: u64,
    /// Whether others go on beside it now.
    pub overdue: bool,
    /// Times that it was admitted and filled.
    pub slices: u64,
    /// Times that it gave way.
    pub yields: u64,
    /// Bytes copied to the GPU.
    pub bytes_in: u64,
    /// Bytes copied to the host.
    pub bytes_out: u64,
    /// Time spent copying in, ns.
    pub fill_ns: u64,
    /// Time spent copying out, ns.
    pub evict_ns: u64,
    /// Time spent running in slices that have ended, ns.
    pub run_ns: u64,
    /// Why it cannot give way although it is to: drain-awaits-submission, endless-work, open-capture or no-host-memory;
    /// null if it can.
    pub stall: Option<String>,
    /// How long it has been unable to, ns; null if it can.
    pub stalled_ns: Option<u64>,
    /// Times that it was unable to.
    pub stalls: u64,
    /// Times that it let its threads go on in the middle of a drain, and began to drain again later.
    pub drain_retries: u64,
}

/// The pages of a runtime directory.
pub struct Pages {
    /// Those that can be read, by UUID.
    pub pages: Vec<MappedPage>,
    /// The others, and why they cannot.
    pub unreadable: Vec<String>,
}

impl Pages {
    /// Opens all of them.
    ///
    /// # Errors
    /// There is none, neither good nor bad.
    pub fn of(dir: &Path) -> Result<Self, Failure> {
        let nothing = |why: &str| {
            Failure::usage(format!(
                "{}: {why}. Start nvshare-arbiter or a program with `nvshare run`, or name the directory with --runtime-dir",
                dir.display()
            ))
        };
        let found = paths::pages(dir)
            .map_err(|error| nothing(&format!("there is no nvshare node here ({error})")))?;
        let mut all = Self { pages: Vec::new(), unreadable: Vec::new() };
        for (uuid, path) in found {
            match record::view_page(dir, uuid) {
                Ok(page) => all.pages.push(page),
                Err(why) => all.unreadable.push(format!("{}: {why}", path.display())),
            }
        }
        if all.pages.is_empty() && all.unreadable.is_empty() {
            return Err(nothing("no arbiter has made a page here"));
        }
        Ok(all)
    }
}

/// Reads all pages of a runtime directory.
///
/// # Errors
/// The directory has none.
pub fn read(dir: &Path) -> Result<Node, Failure> {
    let Pages { pages, unreadable } = Pages::of(dir)?;
    Ok(Node { gpus: pages.iter().map(|page| gpu(page)).collect(), unreadable })
}

fn gpu(page: &Page) -> Gpu {
    let time = now();
    let snapshot = Snapshot::take(page, page.admitted());
    let (arbiter_pid, arbiter_generation, heartbeat) = page.arbiter();
    let (audits, repaired, reaped) = page.audit_counts();
    let contexts: u64 = snapshot.clients().map(|(_, view)| bytes_of(view.context)).sum();
    let foreign = page.foreign();
    Gpu {
        uuid: page.gpu().to_string(),
        capacity_bytes: bytes_of(snapshot.capacity),
        free_bytes: i64::from(snapshot.free) * GRANULE as i64,
        pinned_bytes: contexts,
        foreign_bytes: bytes_of(foreign.granules),
        foreign_processes: foreign.processes,
        bandwidth_in: page.bandwidth(Direction::In),
        bandwidth_out: page.bandwidth(Direction::Out),
        arbiter_pid,
        arbiter_alive: time.saturating_sub(heartbeat) < 3 * SECOND,
        arbiter_generation,
        audits,
        repaired,
        reaped,
        clients: (0..SLOTS)
            .filter_map(SlotIndex::new)
            .filter_map(|slot| client(page, &snapshot, slot, time))
            .collect(),
    }
}

fn client(page: &Page, snapshot: &Snapshot, slot: SlotIndex, time: u64) -> Option<Client> {
    let details = page.details(slot)?;
    let bytes = |granules: Granules| bytes_of(granules);
    let Shares { weight, priority, memory_limit, compute_limit } = details.shares;
    let compute = page.compute_use(slot, time);
    let takes_turns = page.shares_are_set();
    let stalled = details.stalled_for(time);
    let waiting = (details.wait_since != 0).then(|| time.saturating_sub(details.wait_since));
    Some(Client {
        slot: slot.get(),
        pid: details.owner.pid,
        name: details.name,
        phase: details.view.phase.name().into(),
        admitted: snapshot.admitted.contains(slot),
        demand_bytes: bytes(details.view.demand),
        resident_bytes: bytes(details.view.resident),
        pinned_bytes: bytes(details.view.context),
        unmovable_bytes: bytes(details.view.unmovable),
        waiting_ns: waiting,
        slice_left_ns: policy::slice_end(snapshot, slot)
            .filter(|_| snapshot.admitted.contains(slot))
            .map(|end| end.saturating_sub(time)),
        gang: (details.view.gang != 0).then_some(details.view.gang),
        paused: details.view.paused,
        weight,
        priority: priority.to_string(),
        memory_limit_bytes: memory_limit.granules(snapshot.capacity).map(bytes),
        memory_limit: (memory_limit != MemoryLimit::None).then(|| memory_limit.to_string()),
        compute_limit: compute_limit.millionths().map(|part| f64::from(part) / 1e6),
        takes_turns,
        gpu_ns: compute.gpu_ns,
        gpu_share: takes_turns.then_some(compute.recent_share),
        charged_ns: details.charged_ns.saturating_add(policy::charged(snapshot, slot)),
        held_ns: compute.held_ns,
        turns: compute.turns,
        overruns: compute.overruns,
        overdue: compute.overdue,
        slices: details.slices,
        yields: details.yields,
        bytes_in: details.bytes_in,
        bytes_out: details.bytes_out,
        fill_ns: details.fill_ns,
        evict_ns: details.evict_ns,
        run_ns: details.run_ns,
        stall: stalled.map(|_| details.stall.name().into()),
        stalled_ns: stalled,
        stalls: details.stalls,
        drain_retries: details.drain_retries,
    })
}

/// Prints the status.
///
/// # Errors
/// There is nothing to show, or some page cannot be read.
pub fn run(options: &Options) -> Result<(), Failure> {
    let dir = options.runtime_dir.clone().unwrap_or_else(paths::runtime_dir);
    let node = read(&dir)?;
    if options.json {
        say!(
            "{}",
            serde_json::to_string_pretty(&node)
                .map_err(|error| Failure::with_status(1, error.to_string()))?
        );
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
