//! A report for the terminal.

use super::report::{Fairness, Report, Row, Spread, TimeShares};
use crate::digits::{significant, time};
use crate::layout::{self, Column, figures, words};
use comfy_table::presets;
use nvshare::units::format_size;

/// More rows than that are one for each class.
const MOST_ROWS: usize = 24;

/// Of the table by client. Two lines each, so that columns are narrow.
const COLUMNS: [Column; 15] = [
    words("client"),
    figures("gpu"),
    figures("GPU\ntime"),
    figures("wait\nmean"),
    figures("wait\np50"),
    figures("wait\np99"),
    figures("wait\nmax"),
    figures("answer\np50"),
    figures("answer\np99"),
    figures("time per\niteration"),
    figures("switches"),
    figures("in"),
    figures("out"),
    figures("slowdown"),
    figures("finish"),
];

/// The report as text, for a screen of so many columns.
pub fn of(report: &Report, width: usize) -> String {
    let by_client = !report.clients.is_empty() && report.clients.len() <= MOST_ROWS;
    let rows = if by_client { &report.clients } else { &report.classes };
    let mut columns = COLUMNS;
    if !by_client {
        columns[0] = words("class");
        columns[1] = figures("clients");
    }
    let cells: Vec<Vec<String>> = rows.iter().map(cells).collect();
    let table = layout::table(&columns, &cells, presets::NOTHING, width);
    let fairness = fairness(&report.fairness).unwrap_or("nobody contended throughout a window".into());
    let progress = progress(report);
    let unplaced = match report.unplaced {
        0 => String::new(),
        many => format!(" {many} clients found no place."),
    };
    let unchanged = match report.bytes_unchanged {
        0 => String::new(),
        bytes => format!(", {} unchanged", format_size(bytes)),
    };
    let head = format!("{} ({}, seed {})", report.scenario, report.mode, report.seed);
    let body = format!(
        "{} simulated; {} of GPU time handed out; GPUs {}; {} switches, {} in, {} out{unchanged}; {fairness}.{progress}{unplaced}",
        time(report.seconds),
        time(report.gpu_seconds),
        shares(&report.time),
        report.switches,
        format_size(report.bytes_in),
        format_size(report.bytes_out),
    );
    let body = layout::paragraph(&body, "", width);
    let head = layout::paragraph(&head, "", width);
    format!("{head}\n\n{table}\n\n{}{body}\n", gpus(report, width))
}

fn cells(row: &Row) -> Vec<String> {
    let place = row.gpu.map_or(row.clients.to_string(), |gpu| gpu.to_string());
    // What there is none of has no length: 0 s would be the best of all.
    let some = |spread: &Spread, of: f64| if spread.count == 0 { "-".into() } else { time(of) };
    let (wait, answer) = (&row.wait, &row.answer);
    vec![
        row.name.clone(),
        place,
        time(row.gpu_seconds),
        some(wait, wait.mean),
        some(wait, wait.p50),
        some(wait, wait.p99),
        some(wait, wait.max),
        some(answer, answer.p50),
        some(answer, answer.p99),
        if row.iteration_seconds == 0.0 { "-".into() } else { time(row.iteration_seconds) },
        row.switches.to_string(),
        format_size(row.bytes_in),
        format_size(row.bytes_out),
        if answer.count == 0 { "-".into() } else { format!("{} x", significant(row.slowdown)) },
        finish(row),
    ]
}

/// When all of a row were done, or how many are.
fn finish(row: &Row) -> String {
    match row.finish_seconds {
        Some(finish) if row.finished == row.clients => time(finish),
        _ if row.clients == 1 => "unfinished".into(),
        _ => format!("{} of {}", row.finished, row.clients),
    }
}

/// Whether those who wanted a GPU got on, where some of them need several at once.
fn progress(report: &Report) -> String {
    let progress = &report.progress;
    if !report.gangs || progress.windows == 0 {
        return String::new();
    }
    format!(
        " In {} of {} windows of {} a client that wanted its GPU throughout had none of it; {} switches in each.",
        progress.without,
        progress.windows,
        time(progress.window_seconds),
        significant(progress.switches)
    )
}

/// What GPUs spent their time on.
fn shares(time: &TimeShares) -> String {
    let parts =
        [("busy", time.busy), ("switching", time.switching), ("kept", time.kept), ("idle", time.idle)];
    parts.map(|(name, part)| format!("{name} {:.1} %", 100.0 * part)).join(", ")
}

/// How fairly GPUs were shared, if that can be said.
fn fairness(fairness: &Fairness) -> Option<String> {
    let windows = fairness.time_least.map(|least| {
        let (mean, many) = (fairness.time_mean.unwrap_or(least), fairness.time_windows);
        let length = time(fairness.window_seconds);
        format!("at least {least:.3} ({mean:.3} on average) in {many} windows of {length}")
    });
    let turns = fairness.least.map(|least| format!("at least {least:.3} over any round of turns"));
    let parts: Vec<String> = [windows, turns].into_iter().flatten().collect();
    (!parts.is_empty()).then(|| format!("Jain's index {}", parts.join(", ")))
}

fn gpus(report: &Report, width: usize) -> String {
    if report.gpus.len() > MOST_ROWS {
        return String::new();
    }
    let line = |gpu: &super::report::Gpu| {
        let fairness = fairness(&gpu.fairness).map_or(String::new(), |fairness| format!("; {fairness}"));
        let line =
            format!("GPU {}: {}; at most {} clients{fairness}", gpu.gpu, shares(&gpu.time), gpu.most_clients);
        layout::paragraph(&line, "  ", width) + "\n"
    };
    report.gpus.iter().map(line).collect::<String>() + "\n"
}
