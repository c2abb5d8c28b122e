//! What the repository's documents say exists, exists: linked files and headings, files that are named, and commands with their
//! options. What the analysis quotes of a command is what the command prints and draws, and its two languages agree in their
//! sections, figures, code and links.
//!
//! Headings have the anchors that GitHub gives them. Links to other sites are not followed.

use nvshare_tools::node::TempDir;
use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

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

/// How many cells a row of a table has. A bar in a cell is written `\\|`, in code too.
fn cells(row: &str) -> usize {
    let bars = row.replace("\\|", "").matches('|').count();
    bars.saturating_sub(1)
}

/// The rows of tables that have more or fewer cells than their tables' heads: what is beyond the head is not shown.
fn uneven_rows(text: &str) -> Vec<String> {
    let (mut uneven, mut head, mut in_code) = (Vec::new(), None, false);
    for line in text.lines() {
        in_code ^= line.trim_start().starts_with("```");
        if in_code || !line.starts_with('|') {
            head = None;
        } else if cells(line) != *head.get_or_insert(cells(line)) {
            uneven.push(line.to_owned());
        }
    }
    uneven
}

#[test]
fn the_rows_of_a_table_have_as_many_cells_as_its_head() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for document in documents(&root) {
        let uneven = uneven_rows(&fs::read_to_string(&document).expect("a document can be read"));
        assert!(uneven.is_empty(), "{}:\n{}", document.display(), uneven.join("\n"));
    }
    let table = "| a | b |\n|---|---|\n| `x \\| y` | 1 |\n| 2 |\n\n```text\n| 1 | 2 |\n| 3 |\n```\n| c |\n|---|\n| 3 | 4 |\n";
    assert_eq!(uneven_rows(table), ["| 2 |", "| 3 | 4 |"]);
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
    // Chinese text has no spaces around a path.
    let is_path = |letter: char| letter.is_ascii_alphanumeric() || "_-./".contains(letter);
    // A path that begins with no folder of the repository is of another one.
    let folders =
        fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    let roots: Vec<_> = folders.map(|path| format!("{}/", path.file_name().unwrap().display())).collect();
    let endings = [
        ".rs", ".py", ".cu", ".cuh", ".c", ".h", ".ptx", ".toml", ".md", ".svg", ".sh", ".yaml", ".yml",
        ".proto",
    ];
    text.split(|letter| !is_path(letter))
        .map(|word| word.trim_end_matches('.'))
        .filter(|word| roots.iter().any(|root| word.starts_with(root.as_str())))
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
    assert_eq!(named_files("代码在src/no.rs里，见docs/x.md。"), ["src/no.rs", "docs/x.md"]);
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

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the repository is there")
}

/// The code of a document: each span, and each line of each block.
fn code(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut block: Option<String> = None;
    for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
        match event {
            Event::Start(Tag::CodeBlock(_)) => block = Some(String::new()),
            Event::Text(part) => block.iter_mut().for_each(|block| block.push_str(&part)),
            Event::End(TagEnd::CodeBlock) => {
                let block = block.take().unwrap_or_default().replace("\\\n", " ");
                found.extend(block.lines().map(str::to_owned));
            }
            Event::Code(span) => found.push(span.into_string()),
            _ => {}
        }
    }
    found
}

/// The commands of nvshare in a line of code, each with the words that follow, up to what is no argument of it any more.
fn commands(line: &str) -> Vec<Vec<&str>> {
    let ends = |word: &str| {
        matches!(word, "--" | "|" | "#" | "&&" | "||" | "\\" | "&" | "do" | "done") || word.starts_with('>')
    };
    let words: Vec<&str> = line.split_whitespace().collect();
    let is_ours = |word: &str| {
        let program = word.strip_prefix("target/release/").unwrap_or(word);
        matches!(program, "nvshare" | "nvshare-arbiter" | "nvsharectl")
    };
    // Elsewhere it is an argument of another program, such as a container's name.
    let comes_first = |before: Option<&&str>| match before {
        None => true,
        Some(word) => {
            word.contains('=') || ["$", "sudo", "|", "&&", "||", "do", "then", "{", "--"].contains(word)
        }
    };
    let starts = (0..words.len()).filter(|start| {
        is_ours(words[*start]) && comes_first(start.checked_sub(1).and_then(|i| words.get(i)))
    });
    starts
        .map(|start| {
            let arguments = words[start + 1..].iter().take_while(|word| !ends(word)).copied();
            std::iter::once(words[start].rsplit('/').next().unwrap_or_default()).chain(arguments).collect()
        })
        .collect()
}

/// The name of an option among a command's words: of `--quantum=2s,` it is `--quantum`.
fn option(word: &str) -> Option<&str> {
    let end = word.find(|letter: char| !letter.is_ascii_lowercase() && letter != '-').unwrap_or(word.len());
    Some(word[..end].trim_end_matches('-')).filter(|name| name.starts_with("--") && name.len() > 3)
}

/// What commands say of themselves.
struct Help(HashMap<Vec<String>, String>);

impl Help {
    fn of(&mut self, command: &[&str]) -> &str {
        let key: Vec<String> = command.iter().map(|word| (*word).to_owned()).collect();
        self.0.entry(key).or_insert_with(|| {
            let output =
                Command::new(env!("CARGO_BIN_EXE_nvshare")).args(command).arg("--help").output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        })
    }

    /// Whether a help text has a line that begins with this word, as those of options and subcommands do.
    fn names(text: &str, word: &str) -> bool {
        let same = |other: &str| other.trim_end_matches(',').split('=').next() == Some(word);
        text.lines().any(|line| line.split_whitespace().take(2).any(same))
    }

    /// What is wrong with a command of `nvshare`.
    fn wrong(&mut self, words: &[&str]) -> Option<String> {
        let plain = |word: &&str| word.starts_with(|letter: char| letter.is_ascii_lowercase());
        let subcommand = words.get(1).filter(|word| plain(word))?;
        let subcommand = subcommand.trim_end_matches(|letter: char| !letter.is_ascii_lowercase());
        // These are a binary of their own, which this package does not build; its folder has what they know.
        if ["device-plugin", "dra-driver"].contains(&subcommand) {
            return self.wrong_in_source("kubernetes/src", &words[2..]);
        }
        // `internal` is for tests, and no part of the help.
        if subcommand != "internal" && !Self::names(self.of(&[]), subcommand) {
            return Some(format!("nvshare has no command {subcommand}"));
        }
        let mut text = self.of(&[subcommand]).to_owned();
        if let Some(inner) = words.get(2).filter(|word| plain(word) && Self::names(&text, word)) {
            text.push_str(self.of(&[subcommand, inner]));
        }
        let unknown =
            words[2..].iter().filter_map(|word| option(word)).find(|name| !Self::names(&text, name));
        unknown.map(|name| format!("nvshare {subcommand} has no {name}"))
    }

    /// What is wrong with a command whose options are fields of a struct in this folder.
    fn wrong_in_source(&mut self, folder: &str, words: &[&str]) -> Option<String> {
        let sources = sources(&root().join(folder));
        let is_there =
            |name: &&str| sources.contains(&name[2..].replace('-', "_")) || sources.contains(&name[2..]);
        let unknown = words.iter().filter_map(|word| option(word)).find(|name| !is_there(name));
        unknown.map(|name| format!("{folder} knows no {name}"))
    }
}

/// All Rust sources below a folder, one after the other.
fn sources(folder: &Path) -> String {
    let mut all = String::new();
    for path in fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            all.push_str(&sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            all.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
    all
}

/// Whoever types what a document says gets no "unexpected argument".
#[test]
fn commands_that_documents_name_have_the_options_that_they_name() {
    let mut help = Help(HashMap::new());
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for document in documents(&root()) {
        if document.ends_with("CHANGELOG.md") {
            continue;
        }
        for line in code(&fs::read_to_string(&document).unwrap()) {
            for words in commands(&line) {
                let fault = match words[0] {
                    "nvshare" => help.wrong(&words),
                    "nvshare-arbiter" => help.wrong_in_source("arbiter/src", &words[1..]),
                    _ => None,
                };
                seen += words.iter().filter(|word| option(word).is_some()).count();
                wrong.extend(fault.map(|fault| format!("{}: {fault}: {line}", document.display())));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen > 50, "documents name options: {seen}");
    assert_eq!(help.wrong(&["nvshare", "sim", "x.toml", "--svg=y"]), None);
    for words in [
        &["nvshare", "sim", "x.toml", "--png"][..],
        &["nvshare", "fly"],
        &["nvshare", "ctl", "set", "--loud"],
    ] {
        assert!(help.wrong(words).is_some(), "{words:?}");
    }
    assert!(help.wrong_in_source("arbiter/src", &["--quantums"]).is_some());
}

/// A document of the analysis, and the same in Chinese.
fn pairs() -> Vec<(PathBuf, PathBuf)> {
    let folder = root().join("docs/analysis");
    let chinese = folder.join("zh");
    let english = documents_in(&folder, true).into_iter().filter(|path| !path.starts_with(&chinese));
    let mut pairs: Vec<_> =
        english.map(|path| (chinese.join(path.strip_prefix(&folder).unwrap()), path)).collect();
    pairs.iter_mut().for_each(|(chinese, english)| std::mem::swap(chinese, english));
    pairs
}

/// What two languages have in common: of a section, between two headings.
#[derive(Debug, Default, PartialEq, Eq)]
struct Section {
    level: usize,
    /// All but single digits, which the one language may write as a word and the other not.
    figures: BTreeSet<String>,
    code_blocks: Vec<String>,
    rows: usize,
    pictures: usize,
    /// Without `zh` in the path, and without the heading, which has another name there.
    links: BTreeSet<String>,
}

fn figures(text: &str) -> impl Iterator<Item = String> {
    let parts = text.split(|letter: char| !letter.is_ascii_digit() && !".,".contains(letter));
    parts
        .map(|part| part.trim_matches(|letter: char| !letter.is_ascii_digit()).replace(',', ""))
        .filter(|figure| figure.len() > 1)
}

/// A path without `.`, `..` and the Chinese folder, from the repository's root.
fn plain_target(document: &Path, link: &str) -> String {
    if link.contains("://") {
        return link.to_owned();
    }
    let path = link.split('#').next().unwrap_or_default();
    let mut whole = if path.is_empty() { document.to_owned() } else { document.parent().unwrap().join(path) };
    let mut plain = PathBuf::new();
    for component in whole.components() {
        match component {
            Component::ParentDir => drop(plain.pop()),
            Component::CurDir => {}
            other => plain.push(other),
        }
    }
    whole = plain.strip_prefix(root()).unwrap_or(&plain).to_owned();
    whole
        .display()
        .to_string()
        .replace("docs/analysis/zh", "docs/analysis")
        .replace("README.zh-CN.md", "README.md")
}

fn sections(document: &Path) -> Vec<Section> {
    let text = fs::read_to_string(document).unwrap_or_else(|error| panic!("{}: {error}", document.display()));
    let mut all = vec![Section::default()];
    let mut block: Option<String> = None;
    for event in Parser::new_ext(&text, Options::ENABLE_TABLES) {
        if let Event::Start(Tag::Heading { level, .. }) = &event {
            all.push(Section { level: *level as usize, ..Section::default() });
        }
        let section = all.last_mut().expect("there is one");
        match event {
            Event::Start(Tag::CodeBlock(_)) => block = Some(String::new()),
            Event::End(TagEnd::CodeBlock) => section.code_blocks.extend(block.take()),
            Event::Start(Tag::TableRow) => section.rows += 1,
            Event::Start(Tag::Image { .. }) => section.pictures += 1,
            Event::Start(Tag::Link { dest_url, .. }) => {
                section.links.insert(plain_target(document, &dest_url));
            }
            Event::Text(part) => match &mut block {
                Some(block) => block.push_str(&part),
                None => section.figures.extend(figures(&part)),
            },
            Event::Code(part) => section.figures.extend(figures(&part)),
            _ => {}
        }
    }
    all
}

/// In which two documents differ that should say the same.
fn differences(english: &Path, chinese: &Path) -> Vec<String> {
    let (one, other) = (sections(english), sections(chinese));
    let mut all = Vec::new();
    if one.iter().map(|section| section.level).ne(other.iter().map(|section| section.level)) {
        all.push(format!("other headings: {} and {} of them", one.len() - 1, other.len() - 1));
    }
    for (index, (one, other)) in one.iter().zip(&other).enumerate().filter(|(_, (one, other))| one != other) {
        let apart: Vec<_> = one.figures.symmetric_difference(&other.figures).collect();
        let links: Vec<_> = one.links.symmetric_difference(&other.links).collect();
        all.push(format!(
            "section {index}: figures of one only {apart:?}, links of one only {links:?}, rows {} and {}, pictures {} and {}, \
             code {}",
            one.rows,
            other.rows,
            one.pictures,
            other.pictures,
            if one.code_blocks == other.code_blocks { "alike" } else { "differs" },
        ));
    }
    all.into_iter().map(|line| format!("{}: {line}", chinese.display())).collect()
}

#[test]
fn both_languages_say_the_same() {
    let pairs = pairs();
    assert!(pairs.len() > 8, "{pairs:?}");
    let folder = root().join("docs/analysis/zh");
    let expected: BTreeSet<_> = pairs.iter().map(|(_, chinese)| chinese.clone()).collect();
    let surplus: Vec<_> =
        documents_in(&folder, true).into_iter().filter(|path| !expected.contains(path)).collect();
    assert!(surplus.is_empty(), "only in Chinese: {surplus:?}");
    let readme = (root().join("README.md"), root().join("README.zh-CN.md"));
    let all = pairs.iter().chain(std::iter::once(&readme));
    let wrong: Vec<_> = all.flat_map(|(english, chinese)| differences(english, chinese)).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_figure_a_row_or_a_link_that_only_one_language_has_is_named() {
    let folder = TempDir::new().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let english = write("a.md", "# One\n\nTwo of 1,024, [b](b.md)\n\n| a |\n|---|\n| 1.5 s |\n");
    let same = write("same.md", "# 一\n\n1024 个里的 2 个，[乙](b.md)\n\n| 甲 |\n|---|\n| 1.5 s |\n");
    assert_eq!(differences(&english, &same), Vec::<String>::new());
    for (wrong, names) in [
        ("# 一\n\n1,042 个里的 2 个，[乙](b.md)\n\n| 甲 |\n|---|\n| 1.5 s |\n", "1042"),
        ("# 一\n\n1,024 [乙](c.md)\n\n| 甲 |\n|---|\n| 1.5 s |\n", "c.md"),
        ("# 一\n\n1,024 [乙](b.md)\n\n| 甲 |\n|---|\n| 1.5 s |\n| 1.5 s |\n", "rows 1 and 2"),
        ("# 一\n\n## 二\n\n1,024 [乙](b.md)\n\n| 甲 |\n|---|\n| 1.5 s |\n", "other headings"),
    ] {
        let found = differences(&english, &write("wrong.md", wrong)).join("\n");
        assert!(found.contains(names), "{names} is not in {found:?}");
    }
}

/// Runs a command of a document in the repository's root.
fn run(command: &str) -> String {
    let words: Vec<&str> = command.split_whitespace().collect();
    let program = match words[0] {
        "nvshare" => env!("CARGO_BIN_EXE_nvshare"),
        "python3" => "python3",
        other => panic!("a document runs {other}"),
    };
    let output =
        Command::new(program).args(&words[1..]).current_dir(root()).env("COLUMNS", "200").output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The quotations of a document: a command, and lines that it prints.
fn quotations(text: &str) -> Vec<(String, Vec<String>)> {
    let mut all: Vec<(String, Vec<String>)> = Vec::new();
    let mut inside = false;
    for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
        match event {
            Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(kind))) => inside = &*kind == "console",
            Event::End(TagEnd::CodeBlock) => inside = false,
            Event::Text(part) if inside => {
                for line in part.lines() {
                    match (line.strip_prefix("$ "), all.last_mut()) {
                        (Some(command), _) => all.push((command.to_owned(), Vec::new())),
                        (None, Some((_, lines))) => lines.push(line.trim().to_owned()),
                        (None, None) => panic!("a quotation begins with no command: {line}"),
                    }
                }
            }
            _ => {}
        }
    }
    all
}

/// Each line that the analysis quotes is one that the command prints. The Chinese documents quote the same
/// ([`both_languages_say_the_same`]).
#[test]
fn what_the_analysis_quotes_is_what_the_command_prints() {
    let mut printed: HashMap<String, String> = HashMap::new();
    let mut quoted = 0;
    for (english, _) in pairs() {
        for (command, lines) in quotations(&fs::read_to_string(&english).unwrap()) {
            let output = printed.entry(command.clone()).or_insert_with(|| run(&command));
            for line in lines.iter().filter(|line| !line.is_empty()) {
                quoted += 1;
                let is_there = output.lines().any(|other| other.trim() == line);
                assert!(is_there, "{}: {command} does not print\n{line}\nbut\n{output}", english.display());
            }
        }
    }
    assert!(quoted > 20, "lines that are quoted: {quoted}");
}

/// Whoever changes the policy or a scenario draws the pictures anew.
#[test]
fn the_pictures_of_the_analysis_are_those_that_their_commands_draw() {
    let temporary = TempDir::new().unwrap();
    let mut drawn = BTreeSet::new();
    for (english, _) in pairs() {
        for line in code(&fs::read_to_string(&english).unwrap()) {
            let Some((command, picture)) = line.split_once(" --svg docs/analysis/") else { continue };
            let path = temporary.path().join("picture.svg");
            run(&format!("{command} --svg {}", path.display()));
            let stands = fs::read_to_string(root().join("docs/analysis").join(picture)).unwrap();
            assert!(fs::read_to_string(&path).unwrap() == stands, "{line}");
            drawn.insert(picture.to_owned());
        }
    }
    let stand = fs::read_dir(root().join("docs/analysis/pictures")).unwrap();
    let stand = stand.map(|entry| format!("pictures/{}", entry.unwrap().file_name().display()));
    assert_eq!(
        drawn,
        stand.collect(),
        "each picture has a command that draws it, and each command its picture"
    );
}
