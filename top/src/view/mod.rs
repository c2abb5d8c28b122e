//! The screens: pure functions of the model, a width and a height.
//!
//! ```text
//!   title     release, how many GPUs and clients, host memory
//!   GPUs      one to five lines each, by what the height allows
//!   clients   the table
//!   detail    the selected client, or else graphs of GPUs, where there is room
//!   footer    what was said last, what is being typed, or the keys
//! ```

mod bar;
mod clients;
mod detail;
mod gpus;
mod help;
mod lately;
mod paint;
mod text;

use crate::model::{Mode, Model};
use paint::Paint;
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};
use text::{cut_line, fit, harmless, harmless_line, line, size, width, wrapped};

/// Lines that the table of clients has at least, where there are so many clients.
const FEWEST_CLIENTS: usize = 6;

/// The screen as lines: `rows` of them, or without a height as many as there is something to say.
pub fn screen(model: &Model, columns: usize, rows: Option<usize>) -> Vec<Line<'static>> {
    let paint = Paint::new(model.settings.colour);
    let mut lines = vec![title(model, columns, paint)];
    let height = rows.unwrap_or(usize::MAX);
    let body = height.saturating_sub(2);
    if model.mode == Mode::Help {
        lines.extend(help::help(columns, paint));
    } else if let Some(why) = &model.trouble {
        lines.push(Line::default());
        lines.extend(wrapped(why, columns).into_iter().map(|text| line(text, paint.bad())));
    } else {
        lines.extend(node(model, columns, body, paint));
    }
    if let Some(height) = rows {
        lines.resize(height.saturating_sub(1), Line::default());
        if height > 0 {
            lines.push(footer(model, columns, paint));
        }
    }
    lines.into_iter().map(|line| cut_line(harmless_line(line), columns)).collect()
}

/// Draws the screen.
pub fn draw(model: &Model, area: Rect, buffer: &mut Buffer) {
    let lines = screen(model, area.width.into(), Some(area.height.into()));
    for (row, line) in lines.iter().enumerate().take(area.height.into()) {
        buffer.set_line(area.x, area.y + row as u16, line, area.width);
    }
}

/// The screen as text, without styles and without spaces at the ends of lines.
pub fn text(model: &Model, columns: usize, rows: Option<usize>) -> String {
    let lines = screen(model, columns, rows);
    lines.iter().map(|line| line.to_string().trim_end().to_owned() + "\n").collect()
}

fn title(model: &Model, columns: usize, paint: Paint) -> Line<'static> {
    let node = &model.node;
    let count = |of: fn(&nvshare_stats::Gpu) -> usize| node.gpus.iter().map(of).sum::<usize>();
    let clients = count(|gpu| gpu.clients.len());
    let (running, waiting) = (count(|gpu| gpu.running as usize), count(|gpu| gpu.waiting as usize));
    let plural = |count: usize, word: &str| format!("{count} {word}{}", if count == 1 { "" } else { "s" });
    let left = format!(
        " nvshare {}   {}, {}: {running} run, {waiting} wait",
        harmless(&node.release),
        plural(node.gpus.len(), "GPU"),
        plural(clients, "client")
    );
    let memory = node.host_available_bytes.zip(node.host_memory_bytes);
    let (long, short) = memory.map_or_else(Default::default, |(free, all)| {
        let (free, all) = (size(free), size(all));
        (format!("host memory {free} free of {all}"), format!("host {free} free"))
    });
    let paused = if model.paused { "PAUSED" } else { "" };
    // What is said in fewer words, where there is less room.
    let rights = [format!("{paused}   {long}"), format!("{paused}  {short}"), paused.to_owned()];
    let gap = |right: &String| columns.saturating_sub(width(&left) + width(right.trim()) + 1);
    let fits = rights.iter().find(|right| gap(right) > 1);
    let text = match fits {
        Some(right) => format!("{left}{}{} ", " ".repeat(gap(right)), right.trim()),
        None if model.paused => format!(" PAUSED {left}"),
        None => left,
    };
    line(fit(&text, columns, false), paint.selected())
}

/// The GPUs, the clients and the selected client, in `body` lines.
fn node(model: &Model, columns: usize, body: usize, paint: Paint) -> Vec<Line<'static>> {
    let rows = model.rows();
    let selected = model.selected(&rows).map(|line| rows[line]);
    let gpus: Vec<_> = model.node.gpus.iter().enumerate().collect();
    let unreadable = &model.node.unreadable;
    let table = (rows.len() + 1).min(FEWEST_CLIENTS.max(body / 3));
    // The detail has room if every GPU keeps two lines and the table its few.
    let details = selected.map(|row| detail::detail(model, &row, columns, paint)).unwrap_or_default();
    let wanted = details.len();
    let fits =
        |detail: usize, each: usize| gpus.len() * (each + 1) + table + detail + unreadable.len() <= body;
    let detail = if fits(wanted, 2) { wanted } else { 0 };
    let each = (2..=gpus::MOST_LINES).rev().find(|each| fits(detail, *each));
    let mut lines = Vec::new();
    match each {
        Some(each) => {
            for (place, gpu) in gpus {
                lines.extend(gpus::block(model, place, gpu, columns, each, paint));
                lines.push(Line::default());
            }
        }
        None => {
            // One line each, as many as there is room for beside a few clients, the selected one's among them.
            let room = body.saturating_sub(table.min(FEWEST_CLIENTS) + 1).clamp(1, gpus.len().max(1));
            let first = selected
                .map_or(0, |row| row.place)
                .saturating_sub(room / 2)
                .min(gpus.len() - room.min(gpus.len()));
            for (place, gpu) in gpus.into_iter().skip(first).take(room) {
                lines.extend(gpus::block(model, place, gpu, columns, 1, paint));
            }
        }
    }
    lines.extend(unreadable.iter().map(|why| line(harmless(why), paint.bad())));
    let left = body.saturating_sub(lines.len() + detail);
    lines.extend(clients::table(model, &rows, columns, left.min(rows.len() + 1), paint));
    if rows.is_empty() {
        lines.push(line(nobody(model), paint.faint()));
    }
    let spare = body.saturating_sub(lines.len() + detail);
    if model.graphs && detail == 0 && body < usize::MAX - 2 {
        lines.extend(graphs(model, columns, spare, paint));
    }
    if detail > 0 {
        if body < usize::MAX - 2 {
            lines.resize(body.saturating_sub(detail), Line::default());
        }
        lines.extend(details);
    }
    lines.truncate(body);
    lines
}

/// Graphs of as many GPUs as there is room for, at the bottom of `spare` lines: of the one that was chosen, or of the first ones.
fn graphs(model: &Model, columns: usize, spare: usize, paint: Paint) -> Vec<Line<'static>> {
    let gpus = model.node.gpus.iter().enumerate();
    let wanted = gpus.filter(|(place, _)| model.choice.gpu.is_none_or(|only| only == *place));
    // A line stays empty above.
    let fit = spare.saturating_sub(1) / lately::LINES;
    let mut graphs: Vec<_> =
        wanted.take(fit).flat_map(|(place, gpu)| lately::lately(model, place, gpu, columns, paint)).collect();
    let above = spare.saturating_sub(graphs.len());
    let mut lines = vec![Line::default(); above];
    lines.append(&mut graphs);
    lines
}

fn nobody(model: &Model) -> &'static str {
    if model.node.gpus.iter().all(|gpu| gpu.clients.is_empty()) {
        "  no clients: start a program with `nvshare run -- PROGRAM`"
    } else {
        "  no client is like that: Esc shows all"
    }
}

/// What was said last, what is being typed, or the keys.
fn footer(model: &Model, columns: usize, paint: Paint) -> Line<'static> {
    match &model.mode {
        Mode::Help => return line(" any key: back", paint.faint()),
        Mode::Filter(_) => {
            let text =
                format!(" show only: {}_   (Enter: keep, Esc: as before)", harmless(&model.choice.filter));
            return line(text, paint.strong());
        }
        Mode::Weight(client, typed) => {
            let refused = model.message.as_ref().map(|(text, _)| format!("   {text}")).unwrap_or_default();
            let text = format!(
                " weight of pid {}, 1 to 1000: {typed}_   (Enter: change, Esc: not){refused}",
                client.pid
            );
            return line(text, paint.strong());
        }
        Mode::Commands => {}
    }
    if let Some((text, bad)) = &model.message {
        let text = format!(" {}", harmless(text));
        return line(text, if *bad { paint.bad() } else { paint.good() });
    }
    let mut now = vec![format!("by {}", model.choice.sort.name())];
    if !model.choice.filter.is_empty() {
        now.push(format!("only \"{}\"", harmless(&model.choice.filter)));
    }
    if let Some(gpu) = model.choice.gpu.and_then(|place| Some((place, model.node.gpus.get(place)?))) {
        now.push(format!("only GPU {}", gpu.1.index.unwrap_or(gpu.0 as u32)));
    }
    let keys = [
        ("q", "end"),
        ("?", "help"),
        ("↑↓", "select"),
        ("s", "sort"),
        ("/", "filter"),
        ("p", "pause"),
        ("w", "weight"),
        ("+-", "priority"),
        ("z", "pause client"),
        ("g", "graphs"),
    ];
    let state = format!(" {} ", now.join(", "));
    let mut footer = Line::default();
    for (key, what) in keys {
        if footer.width() + key.len() + what.len() + 3 + width(&state) > columns {
            break;
        }
        footer.push_span(Span::styled(format!(" {key}"), paint.strong()));
        footer.push_span(Span::styled(format!(" {what}"), paint.faint()));
    }
    let gap = columns.saturating_sub(footer.width() + width(&state));
    footer.push_span(Span::raw(" ".repeat(gap)));
    footer.push_span(Span::styled(state, paint.plain()));
    footer
}
