//! The help: the keys, and what the signs mean.

use super::paint::Paint;
use super::text::fit;
use ratatui::text::{Line, Span};

/// Each key, and what it does.
pub const KEYS: [(&str, &str); 15] = [
    ("q, Ctrl-C", "end"),
    ("?, h", "this help"),
    ("↑ ↓, k j, PgUp PgDn, Home End", "select a client, and see its details"),
    ("Esc", "select none; then: show all clients"),
    ("s, S", "sort by the next, by the previous column"),
    ("r", "the other way round"),
    ("/", "only clients with this name, user, pod, phase, pid"),
    ("0 to 9", "only this GPU's clients; again, or a: all"),
    ("p, Space", "pause the display, and go on"),
    ("g", "graphs on and off"),
    ("w", "give the selected client another weight"),
    ("+, -", "raise, lower its priority"),
    ("z", "pause the selected client, resume it"),
    ("Ctrl-L", "draw everything anew"),
    ("Ctrl-Z", "back to the shell; fg goes on"),
];

/// Who may do what.
const RIGHTS: &str = "  Whose client it is, whom the arbiter runs as, and root may change it.";

/// What the signs mean.
const SIGNS: [&str; 8] = [
    "In the bars a letter is a client's memory, # is contexts, · is free. The bar",
    "\"host\" has memory that is not on the GPU, in the same scale.",
    "\"time\" is the part of the GPU's time that a client had. Where several ran at",
    "once and take no compute turns, the policy divides it among them.",
    "\"held\" is how many threads waited for a compute turn, on the average.",
    "\"launches\" is how often a second a client submitted work, copies too, as",
    "its engine told last: at the end of a slice, and often while somebody waits.",
    "\"load\" is NVML's; \"out\" and \"in\" are what clients copied.",
];

/// The lines of the help.
pub fn help(columns: usize, paint: Paint) -> Vec<Line<'static>> {
    let left = if columns >= 70 { 31 } else { 14 };
    let mut lines = vec![Line::from(Span::styled("Keys", paint.heading()))];
    lines.extend(KEYS.map(|(keys, what)| {
        Line::from(vec![
            Span::styled(fit(&format!("  {keys}"), left, false), paint.strong()),
            Span::styled(format!(" {what}"), paint.plain()),
        ])
    }));
    lines.push(Line::from(Span::styled(RIGHTS, paint.plain())));
    lines.push(Line::default());
    lines.push(Line::from(Span::styled("Signs", paint.heading())));
    lines.extend(SIGNS.map(|text| Line::from(Span::styled(format!("  {text}"), paint.plain()))));
    lines
}
