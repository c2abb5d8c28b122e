//! Bars that are divided among clients, and graphs of the past.

use super::paint::{Paint, letter};
use ratatui::text::{Line, Span};

/// Whose a part of a bar is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The client in a slot.
    Client(usize),
    /// Contexts, which cannot move.
    Contexts,
    /// Nobody's.
    Free,
}

/// Divides `columns` among parts of these sizes, the rest of `whole` being free. Every column belongs to whoever has its middle. If the
/// parts are more than the whole, they are the whole.
pub fn divide(parts: &[(Part, u64)], whole: u64, columns: usize) -> Vec<(Part, usize)> {
    let sum = parts.iter().fold(0_u128, |sum, (_, bytes)| sum + u128::from(*bytes));
    let whole = u128::from(whole).max(sum).max(1);
    let (mut before, mut begun, mut divided) = (0_u128, 0, Vec::new());
    for (part, bytes) in parts {
        before += u128::from(*bytes);
        let end = ((2 * before * columns as u128 + whole) / (2 * whole)) as usize;
        divided.push((*part, end - begun));
        begun = end;
    }
    divided.push((Part::Free, columns - begun));
    divided
}

/// A bar between brackets, in exactly `columns` columns (3 at least, else nothing). Each client's part shows its letter again and
/// again, so that it can be told from others without colour.
pub fn bar(parts: &[(Part, u64)], whole: u64, columns: usize, paint: Paint) -> Line<'static> {
    let Some(inner) = columns.checked_sub(2).filter(|inner| *inner > 0) else { return Line::default() };
    let mut spans = vec![Span::styled("[", paint.faint())];
    for (part, columns) in divide(parts, whole, inner) {
        let (sign, style) = match part {
            Part::Client(slot) => (letter(slot), paint.bar(slot)),
            Part::Contexts => ('#', paint.fixed()),
            Part::Free => ('·', paint.faint()),
        };
        if columns > 0 {
            spans.push(Span::styled(sign.to_string().repeat(columns), style));
        }
    }
    spans.push(Span::styled("]", paint.faint()));
    Line::from(spans)
}

const EIGHTHS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The figures as a graph of so many columns and rows, the latest at the right; `largest` fills a column.
pub fn graph(figures: impl Iterator<Item = f64>, largest: f64, columns: usize, rows: usize) -> Vec<String> {
    let figures: Vec<f64> = figures.collect();
    let figures = &figures[figures.len().saturating_sub(columns)..];
    let height = |figure: f64| {
        let part = if largest > 0.0 { (figure / largest).clamp(0.0, 1.0) } else { 0.0 };
        let eighths = (part * (8 * rows) as f64).round() as usize;
        // Whatever is more than nothing is seen.
        if part > 0.0 { eighths.max(1) } else { 0 }
    };
    let row = |row: usize| {
        let below = 8 * (rows - 1 - row);
        let column = |figure: &f64| EIGHTHS[height(*figure).saturating_sub(below).min(8)];
        " ".repeat(columns - figures.len()) + &figures.iter().map(column).collect::<String>()
    };
    (0..rows).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_divided_by_size_and_nothing_is_lost_by_rounding() {
        let parts = [(Part::Client(0), 3), (Part::Client(1), 3), (Part::Contexts, 1)];
        assert_eq!(
            divide(&parts, 10, 10),
            [(Part::Client(0), 3), (Part::Client(1), 3), (Part::Contexts, 1), (Part::Free, 3)]
        );
        for columns in 0..50 {
            let sum: usize = divide(&parts, 10, columns).iter().map(|(_, columns)| columns).sum();
            assert_eq!(sum, columns);
        }
        let text = bar(&parts, 10, 12, Paint::new(false)).to_string();
        assert_eq!(text, "[aaabbb#···]");
        // A debt: more than there is.
        assert_eq!(bar(&parts, 5, 9, Paint::new(false)).to_string(), "[aaabbb#]");
        let garbage = [(Part::Client(0), u64::MAX), (Part::Client(1), u64::MAX)];
        assert_eq!(bar(&garbage, 0, 6, Paint::new(false)).to_string(), "[aabb]");
        assert_eq!(bar(&parts, 10, 2, Paint::new(false)).to_string(), "");
    }

    #[test]
    fn a_graph_has_the_latest_at_the_right_and_a_column_for_each_figure() {
        let figures = [9.0, 0.0, 0.5, 1.0, 0.001];
        assert_eq!(graph(figures.into_iter(), 1.0, 4, 1), [" ▄█▁"]);
        assert_eq!(graph(figures.into_iter(), 1.0, 6, 2), [" █  █ ", " █ ██▁"]);
        assert_eq!(graph([1.0].into_iter(), 0.0, 2, 1), ["  "]);
        assert_eq!(graph([].into_iter(), 1.0, 0, 1), [""]);
    }
}
