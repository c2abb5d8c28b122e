//! Every link between the repository's documents leads somewhere: the file exists, and so does the heading that the link
//! names.
//!
//! Headings have the anchors that GitHub gives them. Links to other sites are not followed.

use nvshare_tools::node::TempDir;
use pulldown_cmark::{Event, Parser, Tag, TagEnd};
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

/// The targets of a document's links and images. A reference that nothing defines is no link; a definition that
/// nothing refers to counts all the same.
fn links(text: &str) -> Vec<String> {
    let parser = Parser::new(text);
    let defined: Vec<_> =
        parser.reference_definitions().iter().map(|(_, link)| link.dest.to_string()).collect();
    let used = parser.filter_map(|event| match event {
        Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
            Some(dest_url.into_string())
        }
        _ => None,
    });
    used.chain(defined).collect()
}

/// The anchor that GitHub gives a heading.
fn anchor(heading: &str) -> String {
    heading
        .trim()
        .chars()
        .filter(|character| character.is_alphanumeric() || matches!(character, ' ' | '-' | '_'))
        .flat_map(char::to_lowercase)
        .map(|character| if character == ' ' { '-' } else { character })
        .collect()
}

/// The anchors of a document's headings.
fn anchors(text: &str) -> HashSet<String> {
    let mut seen: HashMap<String, usize> = HashMap::new();
    let mut all = HashSet::new();
    let mut heading: Option<String> = None;
    for event in Parser::new(text) {
        match event {
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            // Of a link, its text counts.
            Event::Text(part) | Event::Code(part) => {
                if let Some(heading) = &mut heading {
                    heading.push_str(&part);
                }
            }
            Event::End(TagEnd::Heading(_)) => {
                let plain = anchor(&heading.take().unwrap_or_default());
                let before = seen.entry(plain.clone()).or_default();
                all.insert(if *before == 0 { plain } else { format!("{plain}-{before}") });
                *before += 1;
            }
            _ => {}
        }
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

/// The paths of files that a text names, as `shim/src/lib.rs` or examples/scenarios/four-jobs.toml.
fn named_files(text: &str) -> Vec<&str> {
    let is_path = |letter: char| letter.is_alphanumeric() || "_-./".contains(letter);
    let roots = ["src/", "shim/", "arbiter/", "tools/", "tests/", "loom-tests/", "examples/", "docs/"];
    let endings = [".rs", ".py", ".cu", ".cuh", ".c", ".h", ".ptx", ".toml", ".md", ".svg", ".sh"];
    text.split(|letter| !is_path(letter))
        .map(|word| word.trim_end_matches('.'))
        .filter(|word| roots.iter().any(|root| word.starts_with(root)))
        .filter(|word| endings.iter().any(|ending| word.ends_with(ending)) && !word.contains("NAME"))
        .collect()
}

/// Files that documents name have not moved away. What a change of the past was, or a decision was made on, stays as it was said.
#[test]
fn files_that_documents_name_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap();
    let mut missing = Vec::new();
    let mut named = 0;
    for document in documents(&root) {
        if document.ends_with("CHANGELOG.md") {
            continue;
        }
        let text = fs::read_to_string(&document).unwrap();
        let beside = document.parent().unwrap();
        for file in named_files(&text) {
            named += 1;
            if !root.join(file).exists() && !beside.join(file).exists() {
                missing.push(format!("{}: {file}", document.strip_prefix(&root).unwrap().display()));
            }
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
    assert!(named > 50, "documents name files: {named}");
    assert_eq!(named_files("see `src/no.rs`, and docs/x.md."), ["src/no.rs", "docs/x.md"]);
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
