//! A report for the terminal.

use super::report::{Report, Row};
use comfy_table::{CellAlignment, Table, presets};
use nvshare::units::format_size;

/// More rows than that are one for each class.
const MOST_ROWS: usize = 24;

/// The report as text.
pub fn of(report: &Report) -> String {
    let by_client = !report.clients.is_empty() && report.clients.len() <= MOST_ROWS;
    let rows = if by_client { &report.clients } else { &report.classes };
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header([
        if by_client { "client" } else { "class" },
        if by_client { "gpu" } else { "clients" },
        "GPU time",
        "wait mean",
        "p50",
        "p99",
        "max",
        "answer p50",
        "p99",
        "s/iteration",
        "switches",
        "in",
        "out",
        "slowdown",
        "finish",
    ]);
    rows.iter().for_each(|row| {
        table.add_row(cells(row));
    });
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    let fairness = report.fairness.least.map_or("nobody took turns".into(), |least| {
        format!("Jain's index {least:.3} in the least fair of {} windows", report.fairness.windows)
    });
    let unplaced = match report.unplaced {
        0 => String::new(),
        many => format!(" {many} clients found no place."),
    };
    let head = format!("{} ({}, seed {})", report.scenario, report.mode, report.seed);
    let body = format!(
        "{} simulated; {} of GPU time handed out, GPUs busy {:.1} %; {} switches, {} in, {} out; {fairness}.{unplaced}",
        time(report.seconds),
        time(report.gpu_seconds),
        100.0 * report.utilisation,
        report.switches,
        format_size(report.bytes_in),
        format_size(report.bytes_out),
    );
    format!("{head}\n\n{table}\n\n{}{body}\n", gpus(report))
}

fn cells(row: &Row) -> Vec<String> {
    let place = row.gpu.map_or(row.clients.to_string(), |gpu| gpu.to_string());
    let times = [
        row.gpu_seconds,
        row.wait.mean,
        row.wait.p50,
        row.wait.p99,
        row.wait.max,
        row.answer.p50,
        row.answer.p99,
    ];
    let mut cells = vec![row.name.clone(), place];
    cells.extend(times.map(time));
    cells.extend([
        format!("{:.4}", row.iteration_seconds),
        row.switches.to_string(),
        format_size(row.bytes_in),
        format_size(row.bytes_out),
        format!("{:.2} x", row.slowdown),
        row.finish_seconds.map_or("-".into(), time),
    ]);
    cells
}

fn gpus(report: &Report) -> String {
    if report.gpus.len() > MOST_ROWS {
        return String::new();
    }
    let line = |gpu: &super::report::Gpu| {
        let fairness =
            gpu.fairness.map_or(String::new(), |index| format!(", Jain's index at least {index:.3}"));
        format!(
            "GPU {}: busy {:.1} %, at most {} clients{fairness}\n",
            gpu.gpu,
            100.0 * gpu.utilisation,
            gpu.most_clients
        )
    };
    report.gpus.iter().map(line).collect::<String>() + "\n"
}

/// A time for people.
fn time(seconds: f64) -> String {
    match seconds {
        0.0 => "0 s".into(),
        s if s < 0.001 => format!("{:.0} us", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s if s < 1_000.0 => format!("{s:.1} s"),
        s if s < 100_000.0 => format!("{s:.0} s"),
        s => format!("{:.0} h", s / 3_600.0),
    }
}
