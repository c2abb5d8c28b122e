//! The page in a real browser, Chromium without a window. Where it is not installed the tests say so and are skipped;
//! `tests/metrics/install` installs it.

use nvshare_e2e::application::{Application, MIB, gpu};
use nvshare_e2e::monitor::MonitoredNode;
use nvshare_test_support::Patience;
use nvshare_tools::status;
use std::process::{Command, Stdio};

const TIMEOUT: Patience = Patience::seconds(60);

/// What a browser makes of the page after some seconds of its own time, as HTML. `None`: there is no browser.
fn browsed(monitored: &MonitoredNode, more: &[&str]) -> Option<String> {
    let profile = tempfile::tempdir().unwrap();
    let child = Command::new("chromium")
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
        .arg("--disable-extensions")
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .args(["--virtual-time-budget=4000", "--window-size=1400,900", "--dump-dom"])
        .args(more)
        .arg(format!("http://{}/", monitored.address))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(child) = child else {
        assert!(std::env::var_os("NVSHARE_NEEDS_CHROMIUM").is_none(), "chromium is not installed");
        println!("SKIPPED: chromium is not installed; tests/metrics/install installs it");
        return None;
    };
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    Some(String::from_utf8(output.stdout).unwrap())
}

/// The text of the cell in this column of a slot's row.
fn cell(html: &str, slot: usize, column: &str) -> String {
    let row = html.split("<tr").find(|row| row.contains(&format!("data-slot=\"{slot}\""))).expect("a row");
    let cell =
        row.split("<td").find(|cell| cell.contains(&format!("data-column=\"{column}\""))).expect("a cell");
    let text = &cell[cell.find('>').unwrap() + 1..cell.find("</td>").unwrap()];
    // The dots of colour have no text.
    let mut plain = String::new();
    for part in text.split('<') {
        plain.push_str(
            part.split_once('>').map_or(part, |(tag, text)| {
                if tag.contains(' ') || tag.starts_with('/') { text } else { part }
            }),
        );
    }
    plain
}

#[test]
fn the_page_shows_what_status_says() {
    let gpu = gpu();
    let monitored = MonitoredNode::start(&gpu, &[]);
    let mut one = Application::ready(&monitored.node);
    let block = one.alloc(24 * MIB);
    one.writes(block, 24 * MIB, 7);
    let Some(html) = browsed(&monitored, &[]) else { return };
    let client = status::read(monitored.node.dir()).unwrap().gpus.remove(0).clients.remove(0);
    let size = nvshare::units::format_size;
    for (column, expected) in [
        ("pid", client.pid.to_string()),
        ("client", client.name.clone()),
        ("phase", client.phase.clone()),
        ("needs", size(client.demand_bytes)),
        ("on GPU", size(client.resident_bytes)),
        ("context", size(client.pinned_bytes)),
        ("slices", client.slices.to_string()),
        ("in", size(client.bytes_in)),
        ("user", client.user.clone().or(client.uid.map(|uid| uid.to_string())).unwrap()),
    ] {
        assert_eq!(cell(&html, client.slot, column), expected, "{column}");
    }
    for part in ["GPU 0", "alive", "64.00 MiB", "what 1 clients did in the last 120 s"] {
        assert!(html.contains(part), "{part}: {html}");
    }
    one.ends_well();
}

#[test]
fn a_hostile_name_is_text_and_does_nothing() {
    let gpu = gpu();
    let monitored = MonitoredNode::start(&gpu, &[]);
    // 64 bytes are what a name can have.
    let names = [
        "<img src=x onerror=\"document.title='taken'\">",
        "</td><script>document.title='taken'</script>",
        "\"><svg onload=document.title='taken'>",
    ];
    let applications: Vec<_> = names
        .into_iter()
        .map(|name| {
            let mut application =
                Application::start(monitored.node.environment(), &[("NVSHARE_CLIENT_NAME", name)]);
            application.does("init");
            application.does("create");
            application
        })
        .collect();
    TIMEOUT.until("all are clients", || {
        status::read(monitored.node.dir()).unwrap().gpus[0].clients.len() == names.len()
    });
    let Some(html) = browsed(&monitored, &[]) else { return };
    assert!(html.contains("<title>nvshare</title>"), "{html}");
    assert!(html.contains("&lt;img src=x onerror="), "the name is there as text: {html}");
    let body = &html[html.find("<main").unwrap()..html.find("<noscript").unwrap()];
    for element in ["<img", "<script", "<svg"] {
        assert!(!body.contains(element), "{element}: {body}");
    }
    for application in applications {
        application.end();
    }
}
