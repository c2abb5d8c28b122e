//! Tables and paragraphs that fit the reader's screen.

use comfy_table::{CellAlignment, Table};
use textwrap::core::display_width;

/// The width where there is neither a terminal nor COLUMNS: what is read in a log or a mail fits a usual terminal too.
pub const USUAL_WIDTH: usize = 80;

/// Columns of the reader's screen: COLUMNS says it, or the terminal, or it is [`USUAL_WIDTH`].
pub fn width() -> usize {
    let named = std::env::var("COLUMNS").ok().and_then(|text| text.trim().parse().ok());
    let terminal = || terminal_size::terminal_size_of(std::io::stdout()).map(|(width, _)| width.0.into());
    named.filter(|width| *width > 0).or_else(terminal).filter(|width| *width > 0).unwrap_or(USUAL_WIDTH)
}

/// A paragraph, wrapped between words. Lines after the first begin with `indent`.
pub fn paragraph(text: &str, indent: &str, width: usize) -> String {
    let options = textwrap::Options::new(width)
        .subsequent_indent(indent)
        .break_words(false)
        .word_splitter(textwrap::WordSplitter::NoHyphenation);
    textwrap::fill(text, options)
}

/// A column of a table: its title, and on which side its cells stand.
#[derive(Debug, Clone, Copy)]
pub struct Column(&'static str, CellAlignment);

/// A column of words.
pub const fn words(title: &'static str) -> Column {
    Column(title, CellAlignment::Left)
}

/// A column of figures.
pub const fn figures(title: &'static str) -> Column {
    Column(title, CellAlignment::Right)
}

/// A table as text. Where it is wider than `width`, it goes on below with further columns, each part with the first
/// column, so that no cell is broken.
pub fn table(columns: &[Column], rows: &[Vec<String>], preset: &str, width: usize) -> String {
    let part = |picked: &[usize]| {
        let mut table = Table::new();
        table.load_preset(preset);
        table.set_header(picked.iter().map(|column| columns[*column].0));
        for row in rows {
            table.add_row(picked.iter().map(|column| &row[*column]));
        }
        for (column, picked) in table.column_iter_mut().zip(picked) {
            column.set_cell_alignment(columns[*picked].1);
        }
        table.trim_fmt()
    };
    let fits = |picked: &[usize]| part(picked).lines().all(|line| display_width(line) <= width);
    let mut parts = vec![vec![0]];
    for column in 1..columns.len() {
        let last = parts.last_mut().expect("there is a first part");
        last.push(column);
        // A part has two columns at least, however narrow the screen is.
        if last.len() > 2 && !fits(last) {
            last.pop();
            parts.push(vec![0, column]);
        }
    }
    parts.iter().map(|picked| part(picked)).collect::<Vec<_>>().join("\n\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use comfy_table::presets::NOTHING;

    const COLUMNS: [Column; 4] = [words("name"), figures("here"), figures("there"), words("what it does")];

    fn rows() -> Vec<Vec<String>> {
        [["a", "1", "2", "waits 5 s"], ["long name", "10", "20", "-"]]
            .iter()
            .map(|row| row.iter().map(|cell| (*cell).to_owned()).collect())
            .collect()
    }

    #[test]
    fn a_table_that_fits_is_one() {
        let text = table(&COLUMNS, &rows(), NOTHING, 80);
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.contains(" long name    10     20  -"), "{text}");
    }

    #[test]
    fn a_table_that_is_too_wide_goes_on_below_and_breaks_no_cell() {
        for width in [10, 20, 25, 30] {
            let text = table(&COLUMNS, &rows(), NOTHING, width);
            assert!(text.lines().count() > 3, "{width}: {text}");
            assert!(text.lines().all(|line| line.len() <= width.max(26)), "{width}: {text}");
            for whole in ["what it does", "waits 5 s"] {
                assert_eq!(text.matches(whole).count(), 1, "{width}: {text}");
            }
            // Every part says whose figures they are.
            let parts = text.split("\n\n");
            assert!(parts.into_iter().all(|part| part.contains("long name")), "{width}: {text}");
        }
    }

    #[test]
    fn paragraphs_are_wrapped_between_words() {
        let path = "/a/path/that/is/longer/than/the/line";
        let text = paragraph(&format!("a client at {path} waits"), "  ", 20);
        assert_eq!(text, format!("a client at\n  {path}\n  waits"));
    }
}
