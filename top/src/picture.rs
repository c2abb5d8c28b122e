//! A screen as SVG, for the documentation.

use ratatui::buffer::{Buffer, Cell};
use ratatui::style::{Color, Modifier};
use std::fmt::Write;

/// A character's width and a line's height, in pixels.
const COLUMN: f64 = 8.4;
const ROW: f64 = 17.0;
const MARGIN: f64 = 10.0;

const BACKGROUND: &str = "#1b1d23";
const FOREGROUND: &str = "#d5d8df";

/// The sixteen colours of a terminal.
fn colour(colour: Color) -> Option<&'static str> {
    Some(match colour {
        Color::Black => "#14161b",
        Color::Red => "#e06c75",
        Color::Green => "#8fc46c",
        Color::Yellow => "#e0b85c",
        Color::Blue => "#5b8fd6",
        Color::Magenta => "#c27fd6",
        Color::Cyan => "#5bb8c4",
        Color::Gray => "#b5b9c2",
        Color::DarkGray => "#7b808c",
        Color::LightRed => "#f08a80",
        Color::LightGreen => "#a8dc88",
        Color::LightYellow => "#f0d080",
        Color::LightBlue => "#84aef0",
        Color::LightMagenta => "#d8a0ea",
        Color::LightCyan => "#80d4de",
        Color::White => "#f2f4f8",
        _ => return None,
    })
}

#[derive(PartialEq, Clone, Copy)]
struct Look {
    front: &'static str,
    back: &'static str,
    bold: bool,
}

fn look(cell: &Cell) -> Look {
    let (mut front, mut back) =
        (colour(cell.fg).unwrap_or(FOREGROUND), colour(cell.bg).unwrap_or(BACKGROUND));
    if cell.modifier.contains(Modifier::REVERSED) {
        (front, back) = (back, front);
    }
    Look { front, back, bold: cell.modifier.contains(Modifier::BOLD) }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The buffer as an SVG with this title.
pub fn svg(buffer: &Buffer, title: &str) -> String {
    let area = buffer.area;
    let (width, height) =
        (f64::from(area.width) * COLUMN + 2.0 * MARGIN, f64::from(area.height) * ROW + 2.0 * MARGIN);
    let mut out = String::new();
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" font-family=\"ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace\" font-size=\"14\">\n<title>{}</title>\n<rect width=\"100%\" height=\"100%\" rx=\"6\" fill=\"{BACKGROUND}\"/>",
        escaped(title)
    );
    for row in 0..area.height {
        let cells: Vec<_> = (0..area.width).map(|column| &buffer[(column, row)]).collect();
        let y = MARGIN + f64::from(row) * ROW;
        let mut begin = 0;
        while begin < cells.len() {
            let style = look(cells[begin]);
            let end = (begin..cells.len()).find(|at| look(cells[*at]) != style).unwrap_or(cells.len());
            run(&mut out, &cells[begin..end], style, MARGIN + begin as f64 * COLUMN, y);
            begin = end;
        }
    }
    out.push_str("</svg>\n");
    out
}

/// Cells of one look.
fn run(out: &mut String, cells: &[&Cell], style: Look, x: f64, y: f64) {
    let width = cells.len() as f64 * COLUMN;
    if style.back != BACKGROUND {
        let _ = writeln!(
            out,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{ROW}\" fill=\"{}\"/>",
            style.back
        );
    }
    let text: String = cells.iter().map(|cell| cell.symbol()).collect();
    if text.trim().is_empty() {
        return;
    }
    let weight = if style.bold { " font-weight=\"bold\"" } else { "" };
    // The width is given, whatever font the reader has.
    let _ = writeln!(
        out,
        "<text x=\"{x:.1}\" y=\"{:.1}\" fill=\"{}\"{weight} textLength=\"{width:.1}\" xml:space=\"preserve\">{}</text>",
        y + 0.76 * ROW,
        style.front,
        escaped(&text)
    );
}
