//! Whatever keys are pressed and whatever the pages say, nothing panics, and every line fits.

use nvshare_stats::{Client, Gpu, Node, Switch};
use nvshare_top::{Event, Key, Model, Settings, view};
use proptest::prelude::*;
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use std::time::Duration;

fn key() -> impl Strategy<Value = Key> {
    prop_oneof![
        4 => prop::sample::select("qhsSrgpa/w+-=0123456789xj k?".chars().collect::<Vec<_>>()).prop_map(Key::Char),
        1 => any::<char>().prop_map(Key::Char),
        1 => prop::sample::select(vec!['c', 'l', 'u', 'z', 'x']).prop_map(Key::Control),
        4 => prop::sample::select(vec![
            Key::Up, Key::Down, Key::PageUp, Key::PageDown, Key::Home, Key::End, Key::Enter, Key::Escape, Key::Backspace
        ]),
    ]
}

fn words() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z]{0,12}",
        any::<String>(),
        Just("\u{1b}[2J\u{1b}]0;title\u{7}\n\r\t\u{202e}".to_owned()),
        Just("日本語🚂e\u{301}".repeat(9)),
    ]
}

prop_compose! {
    fn client()(
        slot in prop_oneof![0..48_usize, any::<usize>()], pid in any::<u32>(), name in words(), user in prop::option::of(words()),
        phase in prop_oneof![prop::sample::select(vec!["idle", "waiting", "filling", "running", "draining"]).prop_map(str::to_owned), words()],
        figures in prop::array::uniform16(prop_oneof![0..1_u64 << 44, any::<u64>()]),
        some in prop::array::uniform8(any::<bool>()), part in any::<f64>(), pod in prop::option::of(words()), stall in prop::option::of(prop_oneof![Just("endless-work".to_owned()), words()]),
    ) -> Client {
        Client {
            slot, pid, name, user, phase, pod: pod.clone(), container: pod, stall,
            demand_bytes: figures[0], resident_bytes: figures[1], evicted_bytes: figures[2], pinned_bytes: figures[3],
            waiting_ns: some[0].then_some(figures[4]), slice_left_ns: some[1].then_some(figures[5]),
            gang: some[2].then_some(figures[6]), weight: figures[7] as u32, priority: "high".into(),
            memory_limit_bytes: some[3].then_some(figures[8]), compute_limit: some[4].then_some(part),
            takes_turns: some[5], has_turn: some[6], turn_waiting_ns: some[7].then_some(figures[9]),
            gpu_ns: figures[10], charged_ns: figures[11], held_ns: figures[12], bytes_in: figures[13], bytes_out: figures[14],
            yields: figures[15], submissions: figures[9], held_submissions: figures[4], stalled_ns: some[0].then_some(figures[5]), overdue: some[1],
            ..Client::default()
        }
    }
}

prop_compose! {
    fn gpu()(
        uuid in words(), index in prop::option::of(0..10_u32), model in prop::option::of(words()), clients in prop::collection::vec(client(), 0..8),
        capacity_bytes in any::<u64>(), free_bytes in any::<i64>(), part in any::<f64>(), slots in any::<(Option<u32>, u32)>(), pinned_bytes in any::<u64>(),
        counts in any::<(u32, u32)>(), ago_ns in any::<u64>(),
    ) -> Gpu {
        let switch = Switch { ago_ns, took_ns: ago_ns, in_bytes: capacity_bytes, from_slot: slots.0, to_slot: slots.1, ..Switch::default() };
        Gpu {
            uuid, index, model, clients, capacity_bytes, free_bytes, pinned_bytes, utilization: Some(part), power_watts: Some(part),
            running: counts.0, waiting: counts.1, switches: vec![switch; 3], ..Gpu::default()
        }
    }
}

prop_compose! {
    fn node()(gpus in prop::collection::vec(gpu(), 0..10), unreadable in prop::collection::vec(words(), 0..3), release in words(), free in any::<Option<u64>>()) -> Node {
        Node { gpus, unreadable, release, host_memory_bytes: free, host_available_bytes: free, ..Node::default() }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Key(Key),
    Reading(Box<Node>, u64),
    Say(String, bool),
    Fail(String),
    Draw(u16, u16),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => key().prop_map(Step::Key),
        3 => (node(), 0..100_000_u64).prop_map(|(node, at)| Step::Reading(Box::new(node), at)),
        1 => (words(), any::<bool>()).prop_map(|(text, bad)| Step::Say(text, bad)),
        1 => words().prop_map(Step::Fail),
        6 => (1..220_u16, 1..70_u16).prop_map(|(columns, rows)| Step::Draw(columns, rows)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn nothing_panics_and_every_line_fits(steps in prop::collection::vec(step(), 1..40)) {
        let mut model = Model::new(Settings::default());
        for step in steps {
            match step {
                Step::Key(key) => drop(model.update(Event::Key(key))),
                Step::Reading(node, at) => drop(model.update(Event::Reading(node, Duration::from_millis(at)))),
                Step::Say(text, false) => drop(model.update(Event::Answer(text))),
                Step::Say(text, true) => drop(model.update(Event::Refused(text))),
                Step::Fail(why) => drop(model.update(Event::Failed(why))),
                Step::Draw(columns, rows) => {
                    let lines = view::screen(&model, columns.into(), Some(rows.into()));
                    prop_assert_eq!(lines.len(), usize::from(rows));
                    for line in &lines {
                        prop_assert!(line.width() <= usize::from(columns), "{:?}", line);
                        let text = line.to_string();
                        prop_assert!(!text.chars().any(|letter| letter.is_control() || letter == '\u{202e}'), "{text:?}");
                    }
                    let area = Rect::new(0, 0, columns, rows);
                    let mut buffer = Buffer::empty(area);
                    view::draw(&model, area, &mut buffer);
                }
            }
        }
        view::text(&model, 80, None);
    }
}
