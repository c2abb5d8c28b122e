//! The table of metrics in docs/operations/monitoring.md is made of the definition. `NVSHARE_WRITE_DOCUMENTS=1 cargo test -p
//! nvshare-arbiter --test metrics_document` writes it anew.

use nvshare_arbiter::monitor::metrics;
use std::path::Path;

const BEGIN: &str = "<!-- metrics: made by arbiter/tests/metrics_document.rs -->\n";
const END: &str = "<!-- end of metrics -->\n";

fn table() -> String {
    let mut table = "| metric | kind | what it says |\n|---|---|---|\n".to_owned();
    for (name, kind, description) in metrics::all() {
        table.push_str(&format!("| `{name}` | {kind} | {} |\n", description.replace('|', "\\|")));
    }
    table
}

#[test]
fn the_table_of_metrics_is_that_of_the_definition() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operations/monitoring.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).expect("the table's beginning is marked");
    let (written, after) = rest.split_once(END).expect("the table's end is marked");
    if std::env::var_os("NVSHARE_WRITE_DOCUMENTS").is_some() {
        std::fs::write(&path, format!("{before}{BEGIN}{}{END}{after}", table())).unwrap();
        return;
    }
    assert!(
        written == table(),
        "the table is not that of the definition: NVSHARE_WRITE_DOCUMENTS=1 writes it"
    );
}
