//! The selected client: all that is known of it, and its part of the GPU's time as a graph.

use super::bar::graph;
use super::paint::{Paint, letter};
use super::text::{cut, harmless, per_second, percent, rate, size, span, width, wrapped};
use crate::model::Model;
use crate::order::Row;
use nvshare::page::Stall;
use nvshare_stats::Client;
use ratatui::text::{Line, Span};

/// Rows of the graph.
const ROWS: usize = 3;

/// The part of a screen that shows a client.
pub fn detail(model: &Model, row: &Row<'_>, columns: usize, paint: Paint) -> Vec<Line<'static>> {
    let client = row.client;
    let name = cut(&harmless(&client.name), columns / 2);
    let title = format!("── {} {name} on GPU {}, pid {} ", letter(client.slot), row.index(), client.pid);
    let rule = "─".repeat(columns.saturating_sub(width(&title)));
    let mut lines = vec![Line::from(vec![
        Span::styled(title, paint.client(client.slot)),
        Span::styled(rule, paint.faint()),
    ])];
    for fact in facts(row) {
        lines.extend(
            wrapped(&fact, columns).into_iter().map(|text| Line::from(Span::styled(text, paint.plain()))),
        );
    }
    lines.extend(trouble(client, columns, paint));
    let past = model.past.client(&row.key());
    let figures = past.into_iter().flat_map(|past| past.latest(columns));
    let drawn = graph(figures, 1.0, columns, ROWS);
    lines.extend(drawn.into_iter().map(|row| Line::from(Span::styled(row, paint.graph()))));
    lines
}

fn facts(row: &Row<'_>) -> [String; 4] {
    let client = row.client;
    let now = row.rates.unwrap_or_default();
    let known = |word: &str, text: Option<&String>| {
        text.map(|text| format!("{word} {}", harmless(text))).into_iter().collect::<Vec<_>>()
    };
    let mut whose: Vec<String> = vec![match (&client.user, client.uid) {
        (Some(user), _) => format!("user {}", harmless(user)),
        (None, Some(uid)) => format!("user {uid}"),
        (None, None) => "user unknown".into(),
    }];
    let pod = client.pod.as_ref().zip(client.namespace.as_ref());
    let pod = pod.map(|(pod, namespace)| format!("{namespace}/{pod}")).or_else(|| client.pod_uid.clone());
    whose.extend(known("pod", pod.as_ref()));
    whose.extend(known("container", client.container.as_ref().or(client.container_id.as_ref())));
    whose.extend(client.gang.map(|gang| format!("gang {gang}")));
    whose.extend(client.paused.then(|| "paused by a user (z resumes it)".to_owned()));
    let limit = client.memory_limit.as_deref().map_or_else(|| "none".into(), harmless);
    let time = client.compute_limit.map_or_else(|| "none".into(), percent);
    whose.push(format!(
        "weight {}, priority {}, limits: memory {limit}, time {time}",
        client.weight, client.priority
    ));
    let memory = format!(
        "needs {}, on GPU {}, not on GPU {}, cannot move {}, context {}",
        size(client.demand_bytes),
        size(client.resident_bytes),
        size(client.evicted_bytes),
        size(client.unmovable_bytes),
        size(client.pinned_bytes)
    );
    let work = format!(
        "{} slices, gave way {} times, copied out {} ({}), in {} ({}), ran {}, held {}{}",
        client.slices,
        client.yields,
        size(client.bytes_out),
        rate(now.bytes_out),
        size(client.bytes_in),
        rate(now.bytes_in),
        span(client.run_ns),
        span(client.held_ns),
        if client.takes_turns { format!(", {} compute turns", client.turns) } else { String::new() }
    );
    let submissions = format!(
        "submitted work {} times ({} a second), {} of them had to wait for the GPU",
        client.submissions,
        per_second(now.submissions),
        client.held_submissions
    );
    [whose.join(", "), memory, work, submissions]
}

/// Why it does not give way, if it is to.
fn trouble(client: &Client, columns: usize, paint: Paint) -> Vec<Line<'static>> {
    let stall = client.stall.as_deref().and_then(Stall::named);
    let text = match (stall, client.stalled_ns) {
        (Some(stall), Some(ns)) => {
            format!("cannot give way, for {}: {}; {}", span(ns), stall.reason(), stall.remedy())
        }
        _ if client.overdue => {
            "its work does not end, and others go on beside it: it may be stopped, or its kernels are long"
                .into()
        }
        _ => return vec![Line::from(Span::styled(" part of the GPU's time, lately:", paint.faint()))],
    };
    wrapped(&text, columns).into_iter().map(|text| Line::from(Span::styled(text, paint.bad()))).collect()
}
