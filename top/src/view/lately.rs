//! Graphs of a GPU: the part of its time that clients had, and the link's traffic.

use super::bar::graph;
use super::paint::Paint;
use super::text::{cut, percent, rate, width};
use crate::model::Model;
use nvshare_stats::Gpu;
use ratatui::text::{Line, Span};

/// Rows of a graph.
const ROWS: usize = 3;

/// Lines of a GPU's graphs, the title among them.
pub const LINES: usize = ROWS + 1;

/// The fewest columns in which two graphs beside each other say something.
const FEWEST: usize = 40;

/// The graphs of a GPU; nothing where there is no past yet, or too little room.
pub fn lately(model: &Model, place: usize, gpu: &Gpu, columns: usize, paint: Paint) -> Vec<Line<'static>> {
    let past = model.past.gpu(&gpu.uuid).filter(|_| columns >= FEWEST);
    let (Some(past), Some(now)) = (past, model.past.gpu_rates(&gpu.uuid)) else { return Vec::new() };
    let left = (columns - 2) / 2;
    let right = columns - 2 - left;
    let traffic: Vec<f64> =
        past.bytes_in.latest(right).zip(past.bytes_out.latest(right)).map(|(into, out)| into + out).collect();
    let most = traffic.iter().copied().fold(0.0, f64::max);
    let number = gpu.index.unwrap_or(place as u32);
    let title = |text: String, columns: usize| {
        let text = cut(&format!("── {text} "), columns);
        let rule = "─".repeat(columns.saturating_sub(width(&text)));
        [Span::styled(text, paint.plain()), Span::styled(rule, paint.faint())]
    };
    let mut head =
        Line::from(title(format!("GPU {number}, clients' time {}", percent(now.time)), left).to_vec());
    head.push_span(Span::raw("  "));
    let sum = rate(now.bytes_in + now.bytes_out);
    head.spans.extend(title(format!("out and in {sum}, most {}", rate(most)), right));
    let times = graph(past.time.latest(left), 1.0, left, ROWS);
    let traffic = graph(traffic.into_iter(), most, right, ROWS);
    let mut lines = vec![head];
    lines.extend(times.into_iter().zip(traffic).map(|(time, traffic)| {
        Line::from(vec![
            Span::styled(time, paint.graph()),
            Span::raw("  "),
            Span::styled(traffic, paint.traffic()),
        ])
    }));
    lines
}
