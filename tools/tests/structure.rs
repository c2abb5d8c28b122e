//! The structure of the code: which files import which. A room of the shim uses those below it and none above, and no files
//! import each other in a circle, except where the head of one of them says why.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The shim's rooms and the files of its root, from the lowest up. Those in one row do not use each other.
const ROOMS: [&[&str]; 9] = [
    &["thread", "settings", "log", "local_socket"],
    &["cuda"],
    &["state"],
    &["submit", "replicas"],
    &["memory"],
    &["async_pool", "ipc"],
    &["process"],
    &["interpose"],
    &["lib"],
];

/// What a file's head says if it is part of a circle on purpose.
const EXCUSE: &str = "import each other:";

/// A module by its path: `["memory", "host"]`. Empty for the crate's root.
type Module = Vec<String>;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

fn module_of(file: &Path, source: &Path) -> Module {
    let path = file.strip_prefix(source).unwrap().with_extension("");
    let mut module: Module = path.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
    if ["mod", "lib"].contains(&module.last().unwrap().as_str()) {
        module.pop();
    }
    module
}

/// The modules of a crate, with their texts. Test modules are not looked at: they may use whatever they test.
fn modules(source: &Path) -> BTreeMap<Module, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![source.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs")
                && path.file_name().unwrap() != "tests.rs"
            {
                found.insert(module_of(&path, source), std::fs::read_to_string(&path).unwrap());
            }
        }
    }
    assert!(found.len() > 5, "there is code in {}", source.display());
    found
}

/// A file's code, without comments and without a module of tests at its end.
fn code(text: &str) -> String {
    const TESTS: [&str; 3] = [
        "\n#[cfg(test)]\nmod ",
        "\n#[cfg(all(test, not(loom)))]\nmod ",
        "\n#[cfg(all(test, not(loom), not(miri)))]\nmod ",
    ];
    let tests = TESTS.iter().filter_map(|begin| text.find(begin)).min().unwrap_or(text.len());
    let line = |line: &str| line.split("//").next().unwrap().to_owned();
    text[..tests].lines().map(line).collect::<Vec<_>>().join("\n")
}

/// The paths that an import names, braces taken apart: `a::{b, c::d}` is `a::b` and `a::c::d`.
fn leaves(import: &str) -> Vec<String> {
    let Some((before, rest)) = import.split_once('{') else { return vec![import.trim().to_owned()] };
    let inner = &rest[..rest.rfind('}').expect("braces are closed")];
    let (mut parts, mut depth, mut part) = (Vec::new(), 0, String::new());
    for letter in inner.chars() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(std::mem::take(&mut part));
                continue;
            }
            _ => {}
        }
        part.push(letter);
    }
    parts.push(part);
    let whole = |part: &String| leaves(part).into_iter().map(|leaf| format!("{}{leaf}", before.trim()));
    parts.iter().filter(|part| !part.trim().is_empty()).flat_map(whole).collect()
}

/// Every path in a file's code that begins with `crate::`, `super::` or `self::`.
fn paths(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for begin in ["crate::", "super::", "self::"] {
        for (at, _) in code.match_indices(begin) {
            let before = code[..at].chars().next_back();
            if before.is_some_and(|letter| letter.is_alphanumeric() || letter == '_' || letter == ':') {
                continue;
            }
            let in_use = code[..at].trim_end().ends_with("use");
            let end = code[at..].find(|letter: char| match in_use {
                true => letter == ';',
                false => !letter.is_alphanumeric() && letter != '_' && letter != ':',
            });
            found.extend(leaves(&code[at..end.map_or(code.len(), |end| at + end)]));
        }
    }
    found
}

/// The module that a path leads to, as seen from a module.
fn target(path: &str, from: &Module, modules: &BTreeMap<Module, String>) -> Module {
    let mut parts = path.split("::").map(str::trim).peekable();
    let mut to = from.clone();
    match parts.next() {
        Some("crate") => to.clear(),
        Some("super") => {
            to.pop();
        }
        _ => {}
    }
    while parts.next_if(|part| *part == "super").is_some() {
        to.pop();
    }
    to.extend(parts.map(str::to_owned));
    while !to.is_empty() && !modules.contains_key(&to) {
        to.pop();
    }
    to
}

/// Which modules each module imports or names.
fn imports(modules: &BTreeMap<Module, String>) -> BTreeMap<Module, BTreeSet<Module>> {
    let of = |(module, text): (&Module, &String)| {
        let targets = paths(&code(text)).into_iter().map(|path| target(&path, module, modules));
        (module.clone(), targets.filter(|to| to != module && !to.is_empty()).collect())
    };
    modules.iter().map(of).collect()
}

fn name(module: &Module) -> String {
    if module.is_empty() { "lib".to_owned() } else { module.join("/") }
}

/// Whatever can be reached from a module.
fn reachable(from: &Module, imports: &BTreeMap<Module, BTreeSet<Module>>) -> BTreeSet<Module> {
    let mut reached = BTreeSet::new();
    let mut next: Vec<_> = imports[from].iter().cloned().collect();
    while let Some(module) = next.pop() {
        if reached.insert(module.clone()) {
            next.extend(imports.get(&module).into_iter().flatten().cloned());
        }
    }
    reached
}

/// Pairs of modules that import each other, by whatever way, where no head says why.
fn circles(modules: &BTreeMap<Module, String>) -> Vec<String> {
    let mut imports = imports(modules);
    // A circle that goes through an excused import is the same circle: leave the excused file's imports out.
    let excused = |module: &Module| {
        let head = modules[module].lines().take_while(|line| line.starts_with("//!"));
        head.collect::<String>().contains(EXCUSE)
    };
    for (module, targets) in &mut imports {
        if excused(module) {
            targets.clear();
        }
    }
    let in_circle = |module: &&Module| reachable(module, &imports).contains(*module);
    imports.keys().filter(in_circle).map(name).collect()
}

/// Imports from a room into one that is not below it.
fn upward(modules: &BTreeMap<Module, String>) -> Vec<String> {
    let room = |module: &Module| module.first().cloned().unwrap_or("lib".to_owned());
    let level = |room: &str| {
        let at = ROOMS.iter().position(|row| row.contains(&room));
        at.unwrap_or_else(|| panic!("{room} is in no row of ROOMS"))
    };
    let mut found = Vec::new();
    for (from, targets) in imports(modules) {
        for to in targets {
            if room(&from) != room(&to) && level(&room(&to)) >= level(&room(&from)) {
                found.push(format!("{} uses {}", name(&from), name(&to)));
            }
        }
    }
    found
}

#[test]
fn the_rooms_of_the_shim_use_only_those_below() {
    let found = upward(&modules(&root().join("shim/src")));
    assert!(found.is_empty(), "against the order of the rooms: {found:#?}");
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    for source in ["src", "top/src", "stats/src", "shim/src", "arbiter/src", "tools/src"] {
        let found = circles(&modules(&root().join(source)));
        assert!(found.is_empty(), "{source}: these are part of a circle of imports: {found:#?}");
    }
}

#[test]
fn an_import_upward_and_a_circle_are_found() {
    let module = |name: &str, text: &str| (name.split('/').map(str::to_owned).collect(), text.to_owned());
    let code = BTreeMap::from([
        module(
            "memory/device",
            "use crate::submit::{gate, pass::{self, enter}};\nfn f() { crate::process::attach::g(); }",
        ),
        module("process/attach", "use crate::memory::device::Device;"),
        module(
            "submit/gate",
            "// use crate::memory::device;\n#[cfg(test)]\nmod tests {\n use crate::memory::device;\n}",
        ),
        module("submit/pass", "use super::gate::gate;"),
    ]);
    let targets = &imports(&code)[&vec!["memory".to_owned(), "device".to_owned()]];
    assert_eq!(
        targets.iter().map(name).collect::<Vec<_>>(),
        ["process/attach", "submit/gate", "submit/pass"]
    );
    assert_eq!(upward(&code), ["memory/device uses process/attach"]);
    assert_eq!(circles(&code), ["memory/device", "process/attach"]);
    let excuse =
        "//! This file and the other import each other: for a test.\nuse crate::memory::device::Device;";
    let excused = code.into_iter().chain([module("process/attach", excuse)]).collect();
    assert!(circles(&excused).is_empty());
}
