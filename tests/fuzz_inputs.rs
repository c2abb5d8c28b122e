//! What the fuzzers start from, and what they have found, run once by an ordinary test: `tests/fuzz/inputs`
//! has a folder for each target. A finding goes in there under a name that says what it shows.

use std::path::Path;

#[path = "fuzz/harness/page.rs"]
mod page;
#[path = "fuzz/harness/text.rs"]
mod text;
#[path = "fuzz/harness/wire.rs"]
mod wire;

fn replay(target: &str, run: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/inputs").join(target);
    let mut count = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        // Captured unless the test fails: then the last line names the input.
        println!("{}", path.display());
        run(&std::fs::read(path).unwrap());
        count += 1;
    }
    assert!(count > 0, "{} holds nothing", folder.display());
}

#[test]
fn pages() {
    replay("page", page::run);
}

#[test]
fn messages() {
    replay("wire", wire::run);
}

#[test]
fn texts() {
    replay("text", text::run);
}
