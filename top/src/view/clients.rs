//! The table of clients.

use super::bar::graph;
use super::paint::{Paint, letter};
use super::text::{fit, harmless, per_second, percent, rate, size, span};
use crate::model::Model;
use crate::order::{Row, Sort};
use nvshare::page::Phase;
use nvshare_stats::Client;
use ratatui::text::{Line, Span};

/// A column of the table.
struct Column {
    title: &'static str,
    columns: usize,
    right: bool,
    /// The less, the sooner it is there on a narrow screen.
    rank: u8,
    sort: Option<Sort>,
    cell: fn(&Row<'_>) -> String,
}

const fn column(title: &'static str, columns: usize, rank: u8, cell: fn(&Row<'_>) -> String) -> Column {
    Column { title, columns, right: true, rank, sort: None, cell }
}

impl Column {
    const fn left(self) -> Self {
        Self { right: false, ..self }
    }

    const fn by(self, sort: Sort) -> Self {
        Self { sort: Some(sort), ..self }
    }
}

/// All columns, from left to right. The name has what is left over.
const COLUMNS: [Column; 21] = [
    column("", 1, 0, |row| letter(row.client.slot).to_string()).left(),
    column("GPU", 4, 1, |row| row.index().to_string()).by(Sort::Gpu),
    column("pid", 7, 2, |row| row.client.pid.to_string()).by(Sort::Pid),
    column("name", 11, 0, |row| harmless(&row.client.name)).left().by(Sort::Name),
    column("user", 8, 11, |row| user(row.client)).left(),
    column("where", 20, 18, |row| place(row.client)).left(),
    column("phase", 8, 1, |row| phase(row.client)).left(),
    column("since", 12, 3, |row| since(row.client)).by(Sort::Waiting),
    column("time", 5, 2, |row| row.rates.map_or_else(dash, |now| percent(now.time))).by(Sort::Time),
    column("on GPU", 8, 4, |row| size(row.client.resident_bytes)),
    column("needs", 8, 4, |row| size(row.client.demand_bytes)).by(Sort::Memory),
    column("context", 8, 15, |row| size(row.client.pinned_bytes)),
    column("weight", 7, 7, |row| row.client.weight.to_string()).by(Sort::Weight),
    column("prio", 6, 9, |row| row.client.priority.clone()).left(),
    column("limit", 12, 14, |row| limits(row.client)),
    column("switches", 8, 12, |row| row.client.yields.to_string()),
    column("held", 5, 13, held),
    column("launches", 8, 19, |row| row.rates.map_or_else(dash, |now| per_second(now.submissions))),
    column("out", 10, 10, |row| row.rates.map_or_else(dash, |now| rate(now.bytes_out))).by(Sort::Link),
    column("in", 10, 10, |row| row.rates.map_or_else(dash, |now| rate(now.bytes_in))),
    // Drawn by the table itself.
    column("time, lately", 16, 12, |_| String::new()).left(),
];

/// The place of the column with the name, which is as wide as may be.
const NAME: usize = 3;

/// The widest name is so wide; what is left over then is for graphs.
const WIDEST_NAME: usize = 28;

/// The places of the columns with bytes out and in, which are both there or neither.
const LINK: [usize; 2] = [18, 19];

/// The place of the column with the graphs.
const GRAPH: usize = 20;

fn dash() -> String {
    "-".into()
}

fn user(client: &Client) -> String {
    let number = || client.uid.map_or_else(dash, |uid| uid.to_string());
    client.user.as_deref().map_or_else(number, harmless)
}

/// Pod and container, as far as they are known.
fn place(client: &Client) -> String {
    let pod = client.pod.as_deref().or(client.pod_uid.as_deref());
    let container = client.container.as_deref().or(client.container_id.as_deref());
    match (pod, container) {
        (Some(pod), Some(container)) if client.container.is_some() => harmless(&format!("{pod}/{container}")),
        (Some(pod), _) => harmless(pod),
        (None, Some(container)) => harmless(container),
        (None, None) => dash(),
    }
}

/// Its phase, or that a user has paused it and it has given way.
fn phase(client: &Client) -> String {
    if client.paused && client.phase == Phase::Idle.name() { "paused".into() } else { client.phase.clone() }
}

/// For how long it has waited, or how long its slice lasts yet.
pub fn since(client: &Client) -> String {
    match (client.waiting_ns, client.slice_left_ns, client.turn_waiting_ns) {
        (Some(ns), ..) => format!("waits {}", span(ns)),
        (None, _, Some(ns)) => format!("held {}", span(ns)),
        (None, Some(ns), None) => format!("{} left", span(ns)),
        (None, None, None) => dash(),
    }
}

/// Its limits of memory and of the GPU's time.
fn limits(client: &Client) -> String {
    let memory = client.memory_limit_bytes.map(size);
    let time = client.compute_limit.map(|part| format!("{} time", percent(part)));
    match (memory, time) {
        (None, None) => dash(),
        (memory, time) => [memory, time].into_iter().flatten().collect::<Vec<_>>().join(" "),
    }
}

/// For what part of the time its threads were held at the gate. Several threads may be held at once.
fn held(row: &Row<'_>) -> String {
    row.rates.map_or_else(dash, |now| if now.held > 0.0 { per_second(now.held) } else { dash() })
}

/// Which columns fit, how wide the name is, and how wide the graphs are.
struct Layout {
    shown: Vec<usize>,
    name: usize,
    graph: usize,
}

impl Layout {
    fn new(columns: usize, graphs: bool) -> Self {
        let mut order: Vec<_> = (0..COLUMNS.len()).filter(|at| graphs || *at != GRAPH).collect();
        order.sort_by_key(|at| COLUMNS[*at].rank);
        let (mut shown, mut used) = (Vec::new(), 0);
        for at in order {
            // The first of the two makes sure that there is room for the second.
            let also = if at == LINK[0] { 1 + COLUMNS[LINK[1]].columns } else { 0 };
            let wanted = at != LINK[1] || shown.contains(&LINK[0]);
            let more = COLUMNS[at].columns + usize::from(!shown.is_empty());
            if wanted && used + more + also <= columns {
                shown.push(at);
                used += more;
            }
        }
        shown.sort_unstable();
        let left = columns.saturating_sub(used);
        let name = COLUMNS[NAME].columns + left.min(WIDEST_NAME - COLUMNS[NAME].columns);
        let left = left.saturating_sub(name - COLUMNS[NAME].columns);
        Self { shown, name, graph: COLUMNS[GRAPH].columns + left }
    }

    fn width(&self, at: usize) -> usize {
        match at {
            NAME => self.name,
            GRAPH => self.graph,
            at => COLUMNS[at].columns,
        }
    }

    fn line(&self, cell: impl Fn(usize, usize) -> Span<'static>) -> Line<'static> {
        let mut line = Line::default();
        for (place, at) in self.shown.iter().enumerate() {
            line.push_span(Span::raw(if place > 0 { " " } else { "" }));
            line.push_span(cell(*at, self.width(*at)));
        }
        line
    }
}

/// The heading, and `lines` lines of the table at most, so that the selected one is among them.
pub fn table(
    model: &Model,
    rows: &[Row<'_>],
    columns: usize,
    lines: usize,
    paint: Paint,
) -> Vec<Line<'static>> {
    if lines == 0 {
        return Vec::new();
    }
    let layout = Layout::new(columns, model.graphs);
    let arrow = if model.choice.reverse { "▴" } else { "▾" };
    let title = |at: usize, columns: usize| {
        let column = &COLUMNS[at];
        let sorted = column.sort == Some(model.choice.sort);
        let text = if sorted { format!("{}{arrow}", column.title) } else { column.title.to_owned() };
        Span::styled(fit(&text, columns, column.right), paint.heading())
    };
    let mut table = vec![layout.line(title)];
    let selected = model.selected(rows);
    // If they do not all fit, a line says how many there are.
    let all_fit = rows.len() < lines;
    let window = if all_fit { rows.len() } else { lines.saturating_sub(2) };
    let middle = selected.map_or(0, |line| line.saturating_sub(window / 2));
    let first = middle.min(rows.len() - window);
    for (line, row) in rows.iter().enumerate().skip(first).take(window) {
        let shown = client_line(model, &layout, row, paint);
        table.push(if selected == Some(line) { shown.patch_style(paint.selected()) } else { shown });
    }
    if !all_fit && lines > 1 {
        let below = rows.len() - first - window;
        let text =
            format!("  clients {} to {} of {}, {below} more below", first + 1, first + window, rows.len());
        table.push(Line::from(Span::styled(text, paint.faint())));
    }
    table
}

fn client_line(model: &Model, layout: &Layout, row: &Row<'_>, paint: Paint) -> Line<'static> {
    let client = row.client;
    let past = model.past.client(&row.key());
    let drawn = |columns: usize| {
        past.map_or_else(String::new, |past| graph(past.latest(columns), 1.0, columns, 1).concat())
    };
    let cell = |at: usize, columns: usize| {
        let column = &COLUMNS[at];
        let style = match column.title {
            "" | "name" => paint.client(client.slot),
            "phase" if client.stall.is_some() || client.overdue => paint.bad(),
            "phase" => paint.phase(&phase(client)),
            _ if at == GRAPH => paint.graph(),
            _ => paint.plain(),
        };
        let text = if at == GRAPH { drawn(columns) } else { harmless(&(column.cell)(row)) };
        Span::styled(fit(&text, columns, column.right), style)
    };
    layout.line(cell)
}
