//! The configuration file: TOML whose keys are the names of the options.
//!
//! ```toml
//! capacity = "14.9GiB"
//! quantum = "auto"
//! quantum-factor = 5
//! kill-unresponsive = false
//! gpu = ["GPU-00000000-0000-0000-0000-000000000001"]
//! ```
//!
//! Whatever is wrong is said with file, line and column, the line itself and a caret under the place; all of it at once.

use super::names::{Name, nearest};
use std::fmt::Write;
use std::ops::Range;
use std::path::Path;
use toml::de::{DeTable, DeValue};

/// A setting in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The option.
    pub name: String,
    /// Its values, as arguments would have them: one, or several of a list.
    pub values: Vec<String>,
    /// In which line it is.
    pub line: usize,
}

/// Reads the text of a file. `check` says what is wrong with a value of an option.
///
/// # Errors
/// What is wrong, for people, several lines.
pub fn read(
    path: &Path,
    text: &str,
    names: &[Name],
    check: impl Fn(&Name, &[String]) -> Result<(), String>,
) -> Result<Vec<Entry>, String> {
    let wrong = |span: Range<usize>, what: &str| located(path, text, span, what);
    let table = DeTable::parse(text).map_err(|error| {
        let what = format!("this is no TOML: {}", error.message().trim());
        wrong(error.span().unwrap_or(0..0), &what)
    })?;
    let (mut entries, mut errors) = (Vec::new(), Vec::new());
    for (key, value) in table.get_ref() {
        let known = names.iter().filter(|name| name.in_file);
        let Some(name) = known.clone().find(|name| name.name == key.get_ref().as_ref()) else {
            let near = nearest(key.get_ref(), known.map(|name| name.name.as_str()));
            let hint = match names.iter().find(|name| name.name == key.get_ref().as_ref()) {
                Some(name) => format!("--{} is an argument only", name.name),
                None => near.map_or_else(
                    || "nvshare-arbiter --help lists the options".to_owned(),
                    |near| format!("is '{near}' meant?"),
                ),
            };
            errors.push((key.span(), format!("'{}' is no setting; {hint}", key.get_ref())));
            continue;
        };
        match values(name, value.get_ref()) {
            Err(what) => errors.push((value.span(), what)),
            Ok(values) => match check(name, &values) {
                Err(what) => errors.push((value.span(), what)),
                Ok(()) => {
                    let line = place(text, key.span().start).0;
                    entries.push(Entry { name: name.name.clone(), values, line });
                }
            },
        }
    }
    if errors.is_empty() {
        return Ok(entries);
    }
    errors.sort_by_key(|(span, _)| span.start);
    let errors: Vec<_> = errors.into_iter().map(|(span, what)| wrong(span, &what)).collect();
    Err(errors.join("\n"))
}

/// A value as arguments have it.
fn values(name: &Name, value: &DeValue<'_>) -> Result<Vec<String>, String> {
    let kind = || {
        let (wanted, example) = match (name.is_switch, name.is_list) {
            (true, _) => ("true or false", "true"),
            (_, true) => ("a list of texts", "[\"...\"]"),
            _ => ("a text or a number", "\"...\""),
        };
        format!("{} is {wanted}, as in {} = {example}", name.name, name.name)
    };
    match value {
        DeValue::Boolean(switch) if name.is_switch => Ok(vec![switch.to_string()]),
        DeValue::Array(items) if name.is_list => {
            items.iter().map(|item| scalar(item.get_ref()).ok_or_else(kind)).collect()
        }
        value if !name.is_switch => Ok(vec![scalar(value).ok_or_else(kind)?]),
        _ => Err(kind()),
    }
}

fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Some(number.as_str().to_owned()),
        DeValue::Float(number) => Some(number.as_str().to_owned()),
        _ => None,
    }
}

/// The line and the column of a place in a text, from 1 on; the column in characters.
fn place(text: &str, at: usize) -> (usize, usize) {
    let before = &text[..text.floor_char_boundary(at)];
    let begin = before.rfind('\n').map_or(0, |end| end + 1);
    (before.matches('\n').count() + 1, before[begin..].chars().count() + 1)
}

/// An error at a place of the file: where, what, the line, and a caret under the place.
fn located(path: &Path, text: &str, span: Range<usize>, what: &str) -> String {
    let (line, column) = place(text, span.start);
    let shown = text.lines().nth(line - 1).unwrap_or("").replace('\t', " ");
    let width = shown.chars().count().saturating_sub(column - 1);
    let carets = text.get(span).map_or(1, |part| part.chars().count()).min(width).max(1);
    let margin = " ".repeat(line.to_string().len());
    let mut said = format!("{}:{line}:{column}: {what}\n", path.display());
    let _ = writeln!(said, " {margin} |");
    let _ = writeln!(said, " {line} | {shown}");
    let _ = write!(said, " {margin} | {}{}", " ".repeat(column - 1), "^".repeat(carets));
    said
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::configuration::names::names;
    use proptest::prelude::*;

    fn reads(text: &str) -> Result<Vec<Entry>, String> {
        let check = |name: &Name, values: &[String]| match values {
            [value] if value == "soon" => Err(format!("'soon' is no {}", name.name)),
            _ => Ok(()),
        };
        read(Path::new("/etc/nvshare.toml"), text, &names(), check)
    }

    #[test]
    fn keys_are_the_names_of_the_options() {
        let text = "# a comment\nquantum = \"2s\"\nslots-per-user = 3\nquantum-factor = 2.5\nkill-unresponsive = true\ngpu = [\"a\", \"b\"]\n";
        let entries = reads(text).unwrap();
        let find = |name: &str| entries.iter().find(|entry| entry.name == name).unwrap();
        assert_eq!((find("quantum").values.as_slice(), find("quantum").line), (&["2s".to_owned()][..], 2));
        assert_eq!(find("slots-per-user").values, ["3"]);
        assert_eq!(find("quantum-factor").values, ["2.5"]);
        assert_eq!(find("kill-unresponsive").values, ["true"]);
        assert_eq!(find("gpu").values, ["a", "b"]);
    }

    #[test]
    fn what_is_wrong_is_shown_with_its_line_and_a_caret() {
        let said = reads("quantum = \"2s\"\ndeadline = \"soon\"\n").unwrap_err();
        let wanted = "\
/etc/nvshare.toml:2:12: 'soon' is no deadline
   |
 2 | deadline = \"soon\"
   |            ^^^^^^";
        assert_eq!(said, wanted);
    }

    #[test]
    fn everything_that_is_wrong_is_said_at_once() {
        let said = reads("qauntum = \"2s\"\nready-fd = 3\nkill-unresponsive = \"yes\"\nidle-grace = {}\n")
            .unwrap_err();
        for part in [
            ":1:1: 'qauntum' is no setting; is 'quantum' meant?",
            ":2:1: 'ready-fd' is no setting; --ready-fd is an argument only",
            ":3:21: kill-unresponsive is true or false, as in kill-unresponsive = true",
            ":4:14: idle-grace is a text or a number",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        let said = reads("a = 1\nquantum = \n").unwrap_err();
        assert!(said.contains(":2:") && said.contains("TOML") && said.contains("2 | quantum ="), "{said}");
    }

    proptest! {
        #[test]
        fn any_text_is_a_configuration_or_an_error_that_names_a_place(text in "(?s).{0,60}") {
            if let Err(said) = reads(&text) {
                prop_assert!(said.starts_with("/etc/nvshare.toml:"), "{}", said);
            }
        }
    }
}
