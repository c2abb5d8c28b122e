//! The screens, as text: with 1, 4 and 60 clients, at 80 and 200 columns, without colour. And the pictures in the documents.
//!
//! After a change: `NVSHARE_WRITE_SCREENS=1 cargo test --release -p nvshare-top --test screens`, and look at what changed.

mod common;

use nvshare_stats::Node;
use nvshare_top::{Event, Key, Model, picture, view};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use std::path::{Path, PathBuf};

/// What the terminal shows.
fn drawn(model: &Model, columns: u16, rows: u16) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(columns, rows)).unwrap();
    terminal.draw(|frame| view::draw(model, frame.area(), frame.buffer_mut())).unwrap();
    terminal.backend().buffer().clone()
}

fn text(buffer: &Buffer) -> String {
    let row =
        |row: u16| (0..buffer.area.width).map(|column| buffer[(column, row)].symbol()).collect::<String>();
    (0..buffer.area.height).map(|line| row(line).trim_end().to_owned() + "\n").collect()
}

fn compare(file: &Path, found: &str) -> Result<(), String> {
    if std::env::var_os("NVSHARE_WRITE_SCREENS").is_some() {
        std::fs::write(file, found).unwrap();
    }
    let expected = std::fs::read_to_string(file).unwrap_or_default();
    if found == expected {
        return Ok(());
    }
    let other = found.lines().zip(expected.lines()).find(|(found, expected)| found != expected);
    Err(format!("{} is another one now; the first line that differs: {other:#?}", file.display()))
}

fn folder(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn press(model: &mut Model, keys: &[Key]) {
    keys.iter().for_each(|key| drop(model.update(Event::Key(*key))));
}

#[test]
fn the_screens_are_as_they_were_looked_at() {
    let nodes: [(&str, Node); 3] =
        [("one", common::one()), ("four", common::four()), ("sixty", common::sixty())];
    let mut wrong = Vec::new();
    for (name, node) in &nodes {
        for (columns, rows) in [(80, 24), (200, 60)] {
            let model = common::model(node, false);
            let file = folder(&format!("tests/screens/{name}-{columns}x{rows}.txt"));
            wrong.extend(compare(&file, &text(&drawn(&model, columns, rows))).err());
        }
    }
    let mut model = common::model(&common::four(), false);
    press(&mut model, &[Key::Down, Key::Down, Key::Down, Key::Down]);
    for (columns, rows) in [(80, 30), (140, 30)] {
        let file = folder(&format!("tests/screens/selected-{columns}x{rows}.txt"));
        wrong.extend(compare(&file, &text(&drawn(&model, columns, rows))).err());
    }
    press(&mut model, &[Key::Char('?')]);
    wrong.extend(compare(&folder("tests/screens/help-80x30.txt"), &text(&drawn(&model, 80, 30))).err());
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_pictures_in_the_documents_are_what_is_drawn() {
    let mut four = common::model(&common::four(), true);
    press(&mut four, &[Key::Down]);
    let sixty = common::model(&common::sixty(), true);
    let pictures = [
        ("top-four.svg", drawn(&four, 132, 24), "nvshare top: four clients that take turns on one GPU"),
        ("top-sixty.svg", drawn(&sixty, 160, 44), "nvshare top: sixty clients on eight GPUs"),
    ];
    let wrong: Vec<_> = pictures
        .iter()
        .filter_map(|(name, buffer, title)| {
            compare(&folder("../docs").join(name), &picture::svg(buffer, title)).err()
        })
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn colour_is_no_information_of_its_own() {
    let node = common::sixty();
    let (with, without) = (common::model(&node, true), common::model(&node, false));
    let (with, without) = (drawn(&with, 120, 40), drawn(&without, 120, 40));
    assert_eq!(text(&with), text(&without));
    let coloured = |buffer: &Buffer| {
        use ratatui::style::Color::Reset;
        buffer.content.iter().filter(|cell| cell.fg != Reset || cell.bg != Reset).count()
    };
    assert!(coloured(&with) > 500);
    assert_eq!(coloured(&without), 0);
}

#[test]
fn every_terminal_shows_what_fits() {
    for node in [common::one(), common::sixty(), Node::default()] {
        let mut model = common::model(&node, true);
        for keys in [
            &[][..],
            &[Key::End],
            &[Key::Char('?')],
            &[Key::Escape, Key::Char('/')],
            &[Key::Escape, Key::Char('w')],
        ] {
            press(&mut model, keys);
            for (columns, rows) in
                [(1, 1), (3, 2), (20, 5), (40, 10), (79, 23), (80, 3), (300, 100), (1000, 4)]
            {
                let buffer = drawn(&model, columns, rows);
                assert_eq!((buffer.area.width, buffer.area.height), (columns, rows));
            }
        }
    }
    let small = text(&drawn(&common::model(&common::one(), false), 20, 5));
    assert!(small.contains("nvshare") && small.contains("GPU 0"), "{small}");
}

/// Whatever the height, the selected client is among those that are shown.
#[test]
fn the_selected_client_is_on_the_screen() {
    let mut model = common::model(&common::sixty(), false);
    for _ in 0..60 {
        press(&mut model, &[Key::Down]);
        let rows = model.rows();
        let pid = rows[model.selected(&rows).unwrap()].client.pid.to_string();
        for rows in [12, 24, 50] {
            let shown = text(&drawn(&model, 80, rows));
            assert!(shown.lines().any(|line| line.contains(&pid)), "{pid} at {rows} rows:\n{shown}");
        }
    }
}

/// As `--once` prints it: as many lines as there is something to say, and all clients.
#[test]
fn the_text_of_a_node_has_all_clients_and_no_wide_line() {
    for columns in [40, 80, 200] {
        let text = view::text(&common::model(&common::sixty(), false), columns, None);
        assert!((30_000..30_060).all(|pid| columns < 80 || text.contains(&pid.to_string())), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= columns), "{text}");
        assert!(!text.contains("q end"), "there are no keys");
    }
}
