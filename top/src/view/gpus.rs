//! The upper part: a block of lines for each GPU.

use super::bar::{Part, bar};
use super::paint::{Paint, letter};
use super::text::{cut, fit, harmless, percent, rate, size, span, width};
use crate::model::Model;
use nvshare_stats::{Client, Gpu};
use ratatui::text::{Line, Span};

/// How many lines a GPU has, from one to [`MOST_LINES`].
pub const MOST_LINES: usize = 5;

/// Columns of the words before a line.
const LABEL: usize = 9;

/// The lines of a GPU, `lines` at most: the more important ones first, in their usual order.
pub fn block(
    model: &Model,
    place: usize,
    gpu: &Gpu,
    columns: usize,
    lines: usize,
    paint: Paint,
) -> Vec<Line<'static>> {
    match lines {
        0 => Vec::new(),
        1 => vec![one_line(model, place, gpu, columns, paint)],
        _ => {
            let mut block = vec![title(model, place, gpu, columns, paint), memory(gpu, columns, paint)];
            if lines > 2 {
                block.push(turns(gpu, columns, paint));
            }
            if lines > 3 {
                block.insert(2, host(gpu, columns, paint));
            }
            if lines > 4 {
                block.push(switches(gpu, columns, paint));
            }
            block
        }
    }
}

fn label(word: &str, paint: Paint) -> Span<'static> {
    Span::styled(fit(&format!("  {word}"), LABEL, false), paint.faint())
}

fn number(place: usize, gpu: &Gpu) -> String {
    gpu.index.map_or_else(|| place.to_string(), |index| index.to_string())
}

/// Joins what there is, with a gap between; leaves out from the end what does not fit.
fn joined(parts: Vec<Vec<Span<'static>>>, columns: usize) -> Line<'static> {
    let mut line = Line::default();
    for part in parts.into_iter().filter(|part| !part.is_empty()) {
        let gap = if line.spans.is_empty() { 0 } else { 2 };
        let more: usize = part.iter().map(Span::width).sum();
        if line.width() + gap + more > columns {
            continue;
        }
        line.push_span(Span::raw(" ".repeat(gap)));
        part.into_iter().for_each(|span| line.push_span(span));
    }
    line
}

/// Number, model, UUID, load, traffic.
fn title(model: &Model, place: usize, gpu: &Gpu, columns: usize, paint: Paint) -> Line<'static> {
    let figure = |what: &str, value: String| {
        vec![Span::styled(format!("{what} "), paint.faint()), Span::styled(value, paint.plain())]
    };
    let wide = columns >= 120;
    let uuid = harmless(&gpu.uuid);
    let uuid = if wide { uuid } else { cut(&uuid, 13) };
    let name = gpu.model.as_deref().map_or_else(|| "model unknown".into(), harmless);
    let rates = model.past.gpu_rates(&gpu.uuid);
    let traffic = rates.map_or(("-".into(), "-".into()), |now| (rate(now.bytes_out), rate(now.bytes_in)));
    let used = rates.map(|now| figure("clients", percent(now.time))).unwrap_or_default();
    let alive = if gpu.arbiter_alive { Vec::new() } else { vec![Span::styled("no arbiter", paint.bad())] };
    let parts = vec![
        vec![
            Span::styled(format!("GPU {}", number(place, gpu)), paint.strong()),
            Span::styled(format!("  {}", cut(&name, if wide { 40 } else { 24 })), paint.strong()),
        ],
        alive,
        figure("load", gpu.utilization.map_or_else(|| "-".into(), percent)),
        figure("out", traffic.0),
        figure("in", traffic.1),
        if columns >= 100 { used } else { Vec::new() },
        if wide {
            gpu.temperature_celsius.map(|degrees| figure("temp", format!("{degrees} °C"))).unwrap_or_default()
        } else {
            Vec::new()
        },
        if wide {
            gpu.power_watts.map(|watts| figure("power", format!("{watts:.0} W"))).unwrap_or_default()
        } else {
            Vec::new()
        },
        vec![Span::styled(uuid, paint.faint())],
    ];
    joined(parts, columns)
}

/// The label, the bar and what stands behind it.
fn barred(
    word: &str,
    parts: &[(Part, u64)],
    whole: u64,
    behind: &str,
    columns: usize,
    paint: Paint,
) -> Line<'static> {
    // All bars begin and end in the same columns.
    const BEHIND: usize = 27;
    let behind = if columns >= LABEL + BEHIND + 12 { fit(behind, BEHIND, false) } else { String::new() };
    let mut line = Line::from(label(word, paint));
    line.spans.extend(bar(parts, whole, columns.saturating_sub(LABEL + width(&behind)), paint).spans);
    line.push_span(Span::styled(behind, paint.plain()));
    line
}

fn sum(gpu: &Gpu, of: fn(&Client) -> u64) -> u64 {
    gpu.clients.iter().fold(0, |sum, client| sum.saturating_add(of(client)))
}

fn parts(gpu: &Gpu, of: fn(&Client) -> u64) -> Vec<(Part, u64)> {
    gpu.clients
        .iter()
        .map(|client| (Part::Client(client.slot), of(client)))
        .filter(|(_, bytes)| *bytes > 0)
        .collect()
}

fn on_gpu(gpu: &Gpu) -> Vec<(Part, u64)> {
    let mut parts = parts(gpu, |client| client.resident_bytes);
    parts.push((Part::Contexts, gpu.pinned_bytes));
    parts
}

/// Whose memory is on the GPU.
fn memory(gpu: &Gpu, columns: usize, paint: Paint) -> Line<'static> {
    let free = match gpu.free_bytes {
        debt if debt < 0 => format!(" {} owed", size(debt.unsigned_abs())),
        free => format!(" {} free", size(free.unsigned_abs())),
    };
    let behind = format!("{free} of {}", size(gpu.capacity_bytes));
    barred("GPU", &on_gpu(gpu), gpu.capacity_bytes, &behind, columns, paint)
}

/// Whose memory is not.
fn host(gpu: &Gpu, columns: usize, paint: Paint) -> Line<'static> {
    let evicted = sum(gpu, |client| client.evicted_bytes);
    let behind = format!(" {} not on GPU", size(evicted));
    barred("host", &parts(gpu, |client| client.evicted_bytes), gpu.capacity_bytes, &behind, columns, paint)
}

fn who(client: &Client, paint: Paint) -> Span<'static> {
    let name = cut(&harmless(&client.name), 16);
    Span::styled(format!("{} {name}", letter(client.slot)), paint.client(client.slot))
}

/// Who is before whom: those that have the GPU, and those that wait, the longest first.
fn turns(gpu: &Gpu, columns: usize, paint: Paint) -> Line<'static> {
    let mut parts = vec![vec![label("runs", paint)]];
    let mut have: Vec<_> = gpu
        .clients
        .iter()
        .filter(|it| ["running", "filling", "draining"].contains(&it.phase.as_str()))
        .collect();
    have.sort_by_key(|client| client.phase != "running");
    let nobody = have.is_empty();
    for client in have {
        let left = client.slice_left_ns.map(|ns| format!(", {} left", span(ns))).unwrap_or_default();
        let doing = if client.phase == "running" { String::new() } else { format!(" {}", client.phase) };
        let turn = if client.has_turn && client.takes_turns { " has the turn" } else { "" };
        parts.push(vec![who(client, paint), Span::styled(format!("{doing}{turn}{left}"), paint.plain())]);
    }
    if nobody {
        parts.push(vec![Span::styled("nobody", paint.faint())]);
    }
    let mut wait: Vec<_> = gpu
        .clients
        .iter()
        .filter(|it| it.phase == "waiting")
        .filter_map(|it| Some((it.waiting_ns?, it)))
        .collect();
    wait.sort_by_key(|(since, _)| std::cmp::Reverse(*since));
    if !wait.is_empty() {
        parts.push(vec![Span::styled(format!("{} wait", wait.len()), paint.faint())]);
    }
    for (since, client) in wait {
        parts.push(vec![who(client, paint), Span::styled(format!(" {}", span(since)), paint.plain())]);
    }
    joined_close(parts, columns)
}

/// The latest switches: how long ago, from whom to whom, how long they took, what came in.
fn switches(gpu: &Gpu, columns: usize, paint: Paint) -> Line<'static> {
    let mut parts = vec![vec![label("switch", paint)]];
    for switch in &gpu.switches {
        let name = |slot: u32| letter(slot as usize).to_string();
        let from = switch.from_slot.map_or_else(String::new, |slot| format!("{} → ", name(slot)));
        let to =
            Span::styled(format!("{from}{}", name(switch.to_slot)), paint.client(switch.to_slot as usize));
        let what = format!(" {}, {} in", span(switch.took_ns), size(switch.in_bytes));
        let when = Span::styled(format!("{} ago ", span(switch.ago_ns)), paint.faint());
        parts.push(vec![when, to, Span::styled(what, paint.plain())]);
    }
    if gpu.switches.is_empty() {
        parts.push(vec![Span::styled("none lately", paint.faint())]);
    }
    joined_close(parts, columns)
}

/// As [`joined`], with the first part as a label, and ends at the first that does not fit.
fn joined_close(parts: Vec<Vec<Span<'static>>>, columns: usize) -> Line<'static> {
    let mut line = Line::default();
    for (at, part) in parts.into_iter().enumerate() {
        let gap = if at < 2 { 0 } else { 2 };
        let more: usize = part.iter().map(Span::width).sum();
        if at > 1 && line.width() + gap + more > columns {
            if line.width() + 2 <= columns {
                line.push_span(Span::raw(" …"));
            }
            break;
        }
        line.push_span(Span::raw(" ".repeat(gap)));
        part.into_iter().for_each(|span| line.push_span(span));
    }
    line
}

/// A GPU in one line, where there are many.
fn one_line(model: &Model, place: usize, gpu: &Gpu, columns: usize, paint: Paint) -> Line<'static> {
    let busy = model.past.gpu_rates(&gpu.uuid).map_or_else(|| "-".into(), |now| percent(now.time));
    let load = gpu.utilization.map_or(busy, percent);
    let before = format!("GPU {} {} ", fit(&number(place, gpu), 2, false), fit(&load, 4, true));
    let behind = format!(" {} run {} wait", gpu.running, gpu.waiting);
    let behind = if columns >= 60 { fit(&behind, 16, false) } else { String::new() };
    let mut line = Line::from(Span::styled(before, paint.strong()));
    let left = columns.saturating_sub(line.width() + width(&behind));
    line.spans.extend(bar(&on_gpu(gpu), gpu.capacity_bytes, left, paint).spans);
    line.push_span(Span::styled(behind, paint.plain()));
    line
}
