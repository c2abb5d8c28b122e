//! Every link between the repository's documents leads somewhere: the file exists, and so does the heading that the link
//! names.
//!
//! Headings have the anchors that GitHub gives them. Links to other sites are not followed.

use nvshare_tools::node::TempDir;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The documents of a repository: those in its root, and all below `docs`.
fn documents(root: &Path) -> Vec<PathBuf> {
    let mut found = documents_in(root, false);
    found.extend(documents_in(&root.join("docs"), true));
    found.sort();
    found
}

fn documents_in(folder: &Path, and_below: bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    for path in entries.map(|entry| entry.unwrap().path()) {
        if and_below && path.is_dir() {
            found.extend(documents_in(&path, true));
        } else if path.extension().is_some_and(|extension| extension == "md") {
            found.push(path);
        }
    }
    found
}

/// The lines of a document that are not in a fenced block.
fn outside_fences(text: &str) -> String {
    let mut fence: Option<&str> = None;
    let mut kept = String::new();
    for line in text.lines() {
        let trimmed = line.trim_start();
        let length = trimmed.len() - trimmed.trim_start_matches(['`', '~']).len();
        let marker = &trimmed[..length];
        match fence {
            Some(open) if marker.starts_with(open) && trimmed.trim_end() == marker => fence = None,
            Some(_) => {}
            None if length >= 3 => fence = Some(marker),
            None => {
                kept.push_str(line);
                kept.push('\n');
            }
        }
    }
    kept
}

/// The text without what stands between backticks. A span ends in its paragraph.
fn without_code_spans(text: &str) -> String {
    let mut kept = String::new();
    let mut rest = text;
    while let Some(begin) = rest.find('`') {
        let (before, span) = rest.split_at(begin);
        kept.push_str(before);
        let ticks = span.len() - span.trim_start_matches('`').len();
        let (mark, after) = span.split_at(ticks);
        let paragraph = after.find("\n\n").unwrap_or(after.len());
        // The closing mark has as many backticks as the opening one.
        let end = after[..paragraph].match_indices(mark).map(|(at, _)| at).find(|at| {
            let alone = |neighbour: Option<char>| neighbour != Some('`');
            alone(after[..*at].chars().next_back()) && alone(after[at + ticks..].chars().next())
        });
        rest = end.map_or(after, |end| &after[end + ticks..]);
    }
    kept + rest
}

/// What stands before the parenthesis that closes the one before `text`.
fn until_closed(text: &str) -> Option<&str> {
    let mut depth = 0;
    for (at, character) in text.char_indices() {
        match character {
            '(' => depth += 1,
            ')' if depth == 0 => return Some(&text[..at]),
            ')' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// The targets of a document's links and images.
fn links(text: &str) -> Vec<String> {
    let prose = without_code_spans(&outside_fences(text));
    let inline = prose.split("](").skip(1).filter_map(until_closed);
    let definitions = prose
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix('[')?.split_once("]: "))
        .map(|(_, target)| target);
    // A title may follow the target.
    let target =
        |link: &str| link.split_whitespace().next().map(|word| word.trim_matches(['<', '>']).to_owned());
    inline.chain(definitions).filter_map(target).collect()
}

/// The anchor that GitHub gives a heading.
fn anchor(heading: &str) -> String {
    let mut text = heading.trim().to_owned();
    // Of a link, its text counts.
    while let Some(begin) = text.find("](") {
        let Some(target) = until_closed(&text[begin + 2..]) else { break };
        let end = begin + 2 + target.len() + 1;
        text.replace_range(begin..end, "");
    }
    text.chars()
        .filter(|character| character.is_alphanumeric() || matches!(character, ' ' | '-' | '_'))
        .flat_map(char::to_lowercase)
        .map(|character| if character == ' ' { '-' } else { character })
        .collect()
}

/// The anchors of a document's headings.
fn anchors(text: &str) -> HashSet<String> {
    let mut seen: HashMap<String, usize> = HashMap::new();
    let mut all = HashSet::new();
    for line in outside_fences(text).lines() {
        let heading = line.trim_start_matches('#');
        if !(1..=6).contains(&(line.len() - heading.len())) || !heading.starts_with(' ') {
            continue;
        }
        let plain = anchor(heading);
        let before = seen.entry(plain.clone()).or_default();
        all.insert(if *before == 0 { plain } else { format!("{plain}-{before}") });
        *before += 1;
    }
    all
}

/// Why a link of `document` leads nowhere.
fn broken(root: &Path, document: &Path, link: &str) -> Option<String> {
    if link.contains("://") || link.starts_with("mailto:") {
        return None;
    }
    let (path, heading) = link.split_once('#').map_or((link, None), |(path, heading)| (path, Some(heading)));
    let file = match path {
        "" => document.to_owned(),
        path => document.parent().expect("a document is in a folder").join(path),
    };
    let Ok(file) = file.canonicalize() else { return Some("there is no such file".into()) };
    if !file.starts_with(root.canonicalize().expect("the repository is there")) {
        return Some("it leads out of the repository".into());
    }
    let heading = heading.filter(|_| file.extension().is_some_and(|extension| extension == "md"))?;
    let text = fs::read_to_string(&file).expect("a document can be read");
    (!anchors(&text).contains(heading)).then(|| format!("{} has no such heading", file.display()))
}

fn broken_links(root: &Path) -> Vec<String> {
    let mut all = Vec::new();
    for document in documents(root) {
        let text = fs::read_to_string(&document).expect("a document can be read");
        for link in links(&text) {
            let why = broken(root, &document, &link);
            all.extend(why.map(|why| format!("{}: ({link}): {why}", document.display())));
        }
    }
    all
}

#[test]
fn every_link_between_documents_leads_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    assert!(documents(&root).len() > 30, "{:?}", documents(&root));
    let broken = broken_links(&root);
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn links_that_lead_nowhere_are_named() {
    let root = TempDir::new().unwrap();
    let write = |name: &str, text: &str| fs::write(root.path().join(name), text).unwrap();
    fs::create_dir_all(root.path().join("docs/deep")).unwrap();
    write(
        "README.md",
        "[right](docs/a.md#the-end-of-it) [wrong](docs/b.md) [far](https://example.org/b.md)\n",
    );
    write(
        "docs/a.md",
        "# The end of `it`\n\n[up](../README.md), [wrong](#the-end)\n\n[out]: ../../elsewhere.md\n",
    );
    write(
        "docs/deep/c.md",
        "`[no](link.md)`\n\n```text\n[no](link.md)\n```\n\n![wrong\npicture](a.svg \"title\")\n",
    );
    let broken = broken_links(root.path());
    for link in ["(docs/b.md)", "(#the-end)", "(../../elsewhere.md)", "(a.svg)"] {
        assert!(broken.iter().any(|line| line.contains(link)), "{link} is not in {broken:?}");
    }
    assert_eq!(broken.len(), 4, "{broken:?}");
}

#[test]
fn headings_have_the_anchors_of_github() {
    let text =
        "# A, b: `c_d` - e!\n## Twice\n## Twice\n### [1.0](x.md) Linked\n```text\n# no heading\n```\n#tag\n";
    let expected = ["a-b-c_d---e", "twice", "twice-1", "10-linked"].map(str::to_owned);
    assert_eq!(anchors(text), HashSet::from(expected));
}

/// Whoever looks for the test of a thing looks in that map.
#[test]
fn the_map_of_tests_names_every_file_of_them() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let testing = fs::read_to_string(root.join("docs/testing.md")).unwrap();
    let (_, map) = testing.split_once("## Where the test of a thing is\n").expect("there is a map");
    let map = map.split("\n## ").next().unwrap();
    for folder in
        ["tests/e2e/tests", "tools/tests", "arbiter/tests", "shim/tests", "loom-tests/tests", "tests"]
    {
        let files = fs::read_dir(root.join(folder)).unwrap().map(|entry| entry.unwrap().path());
        for file in files.filter(|file| file.extension().is_some_and(|extension| extension == "rs")) {
            let name = file.file_stem().unwrap().to_str().unwrap();
            let named = [format!("`{name}`"), format!("{folder}/{name}.rs`")];
            assert!(
                named.iter().any(|name| map.contains(name)),
                "docs/testing.md does not name {folder}/{name}.rs"
            );
        }
    }
}
