//! Text that fits: names of other processes made harmless, cut to a width, figures that are short.

use nvshare_stats::digits::{bandwidth, significant, time};
use ratatui::style::Style;
use ratatui::text::{Line, Span};
use unicode_segmentation::UnicodeSegmentation;
use unicode_width::UnicodeWidthStr;

/// Columns that a text has on a screen.
pub fn width(text: &str) -> usize {
    text.width()
}

/// Text of another process, for a screen: without control characters, and without those that turn the direction of what follows or
/// have no width of their own.
pub fn harmless(text: &str) -> String {
    text.chars().map(shown).collect()
}

/// What is shown of a character.
fn shown(letter: char) -> char {
    match letter {
        letter if letter.is_control() => '?',
        // Marks of direction, joiners, the byte order mark, tags.
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' => '?',
        '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}' => '?',
        letter => letter,
    }
}

/// The same of a whole line: whatever part of it came from where.
pub fn harmless_line(mut line: Line<'static>) -> Line<'static> {
    for span in &mut line.spans {
        if span.content.chars().any(|letter| shown(letter) != letter) {
            span.content = harmless(&span.content).into();
        }
    }
    line
}

/// The text if it fits into so many columns, else its beginning and an ellipsis.
pub fn cut(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    let (mut shown, mut used) = (String::new(), 0);
    for letter in text.graphemes(true) {
        let more = width(letter);
        if used + more + 1 > columns {
            break;
        }
        shown.push_str(letter);
        used += more;
    }
    if columns > 0 {
        shown.push('…');
    }
    shown
}

/// The text in exactly so many columns, at their left or right side.
pub fn fit(text: &str, columns: usize, right: bool) -> String {
    let shown = cut(text, columns);
    let gap = " ".repeat(columns.saturating_sub(width(&shown)));
    if right { gap + &shown } else { shown + &gap }
}

/// The line as far as it fits into so many columns.
pub fn cut_line(line: Line<'static>, columns: usize) -> Line<'static> {
    if line.width() <= columns {
        return line;
    }
    let (mut spans, mut left) = (Vec::new(), columns);
    for span in line.spans {
        let has = span.width();
        if has <= left {
            left -= has;
            spans.push(span);
        } else {
            spans.push(Span::styled(cut(&span.content, left), span.style));
            break;
        }
    }
    Line { spans, ..line }
}

/// Text in lines of at most so many columns, broken between words.
pub fn wrapped(text: &str, columns: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in harmless(text).split_whitespace() {
        let last = lines.last_mut().expect("there is a line");
        if !last.is_empty() && width(last) + 1 + width(word) >= columns {
            lines.push(format!(" {word}"));
        } else {
            last.push(' ');
            last.push_str(word);
        }
    }
    lines
}

/// A line of one text and one style.
pub fn line(text: impl Into<String>, style: Style) -> Line<'static> {
    Line::from(Span::styled(text.into(), style))
}

/// A size: `12.0 GiB`. Three digits, as rates have.
pub fn size(bytes: u64) -> String {
    bandwidth(bytes).trim_end_matches("/s").to_owned()
}

/// A rate of bytes; a dash for none.
pub fn rate(bytes_per_second: f64) -> String {
    if bytes_per_second < 1.0 { "-".into() } else { bandwidth(bytes_per_second as u64) }
}

/// A span of time, ns.
pub fn span(ns: u64) -> String {
    match ns as f64 / 1e9 {
        // More digits would only flicker.
        seconds if (1.0..100.0).contains(&seconds) => format!("{seconds:.1} s"),
        seconds => time(seconds),
    }
}

/// A part, 0 to 1, as a percentage.
pub fn percent(part: f64) -> String {
    format!("{:.0}%", part.clamp(0.0, 1.0) * 100.0)
}

/// Events a second; a dash for none.
pub fn per_second(events: f64) -> String {
    if events <= 0.0 { "-".into() } else { significant(events) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_is_shown_harmlessly() {
        assert_eq!(harmless("a\x1b[2J\u{9b}b\u{202e}c\u{feff}"), "a?[2J?b?c?");
        assert_eq!(harmless("naïve 日本 🚂"), "naïve 日本 🚂");
    }

    #[test]
    fn a_text_is_cut_by_columns_and_not_by_characters() {
        assert_eq!(cut("notebook", 8), "notebook");
        assert_eq!(cut("notebook", 5), "note…");
        assert_eq!(cut("日本語日本語", 5), "日本…");
        assert_eq!(cut("日本語", 2), "…");
        assert_eq!((cut("abc", 0), cut("abc", 1)), (String::new(), "…".into()));
        assert_eq!(fit("日本", 6, true), "  日本");
        for columns in 0..20 {
            assert_eq!(width(&fit("a 日 e\u{301} 🚂 end", columns, false)), columns);
        }
    }

    #[test]
    fn figures_are_short() {
        assert_eq!(size(12 << 30), "12.0 GiB");
        assert_eq!((size(0), rate(0.0), rate(11.2e9)), ("0 B".into(), "-".into(), "10.4 GiB/s".into()));
        let times = [0, 312_000_000, 1_234_000_000, 99_960_000_000, 123_000_000_000].map(span);
        assert_eq!(times, ["0 s", "312 ms", "1.2 s", "100.0 s", "123 s"]);
        assert_eq!((percent(0.974), percent(7.0)), ("97%".into(), "100%".into()));
    }
}
