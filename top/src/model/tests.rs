use super::*;
use crate::order::Sort;
use nvshare_stats::{Client, Gpu};

fn node() -> Node {
    let client = |slot: usize, name: &str, priority: &str| Client {
        slot,
        pid: 100 + slot as u32,
        name: name.into(),
        priority: priority.into(),
        weight: 100,
        ..Client::default()
    };
    let gpu =
        |uuid: &str, index, clients| Gpu { uuid: uuid.into(), index: Some(index), clients, ..Gpu::default() };
    Node {
        gpus: vec![
            gpu("GPU-a", 0, vec![client(0, "train", "normal"), client(1, "notebook", "high")]),
            gpu("GPU-b", 3, vec![client(0, "serve", "low")]),
        ],
        ..Node::default()
    }
}

fn model() -> Model {
    let mut model = Model::new(Settings::default());
    model.update(Event::Reading(Box::new(node()), Duration::ZERO));
    model
}

fn press(model: &mut Model, keys: &[Key]) -> Option<Request> {
    keys.iter().fold(None, |_, key| model.update(Event::Key(*key)))
}

fn type_in(model: &mut Model, text: &str) -> Option<Request> {
    press(model, &text.chars().map(Key::Char).collect::<Vec<_>>())
}

fn selected(model: &Model) -> Option<String> {
    let rows = model.rows();
    model.selected(&rows).map(|line| rows[line].client.name.clone())
}

#[test]
fn the_selected_client_stays_selected_wherever_it_goes() {
    let mut model = model();
    assert_eq!(selected(&model), None);
    press(&mut model, &[Key::Down, Key::Down]);
    assert_eq!(selected(&model).as_deref(), Some("notebook"));
    model.choice.sort = Sort::Name;
    assert_eq!(selected(&model).as_deref(), Some("notebook"), "now it is the first line");
    press(&mut model, &[Key::Up]);
    assert_eq!(selected(&model).as_deref(), Some("notebook"));
    press(&mut model, &[Key::End]);
    assert_eq!(selected(&model).as_deref(), Some("train"));
    // It ends: whoever stands in its line is selected.
    let mut without = node();
    without.gpus[0].clients.remove(0);
    model.update(Event::Reading(Box::new(without), Duration::from_secs(1)));
    assert_eq!(selected(&model).as_deref(), Some("serve"));
    model.update(Event::Reading(Box::default(), Duration::from_secs(2)));
    assert_eq!(selected(&model), None);
}

#[test]
fn a_weight_is_typed_and_sent_and_a_wrong_one_is_not() {
    let mut model = model();
    assert_eq!(type_in(&mut model, "w"), None);
    assert!(
        model.message.as_ref().is_some_and(|(text, bad)| *bad && text.contains("Select")),
        "{:?}",
        model.message
    );
    press(&mut model, &[Key::Down]);
    assert_eq!(type_in(&mut model, "w3q00"), None, "letters are no digits, and end nothing");
    let Some(Request::Change(client, update)) = press(&mut model, &[Key::Enter]) else { panic!("{model:?}") };
    assert_eq!((client.pid, client.gpu.as_str()), (100, "GPU-a"));
    assert_eq!(update, SharesUpdate { weight: Some(300), ..SharesUpdate::default() });
    assert_eq!(model.mode, Mode::Commands);

    assert_eq!(type_in(&mut model, "w0"), None);
    assert_eq!(press(&mut model, &[Key::Enter]), None);
    assert!(
        model.message.as_ref().is_some_and(|(text, bad)| *bad && text.contains("weight")),
        "{:?}",
        model.message
    );
    press(&mut model, &[Key::Backspace, Key::Char('7'), Key::Escape]);
    assert_eq!(model.mode, Mode::Commands);
}

#[test]
fn a_priority_is_changed_by_one_step_within_its_bounds() {
    let mut model = model();
    press(&mut model, &[Key::Down]);
    let priority = |request| match request {
        Some(Request::Change(_, update)) => update.priority,
        _ => None,
    };
    assert_eq!(priority(type_in(&mut model, "+")), Some(Priority::High));
    assert_eq!(priority(type_in(&mut model, "-")), Some(Priority::Low));
    press(&mut model, &[Key::Down]);
    assert_eq!(type_in(&mut model, "+"), None);
    assert_eq!(model.message, Some(("Its priority is high already.".into(), true)));
}

#[test]
fn a_client_is_paused_and_one_that_is_paused_is_resumed() {
    let mut model = model();
    assert_eq!(type_in(&mut model, "z"), None);
    assert!(model.message.as_ref().is_some_and(|(text, bad)| *bad && text.contains("Select")));
    press(&mut model, &[Key::Down]);
    let key = model.rows()[0].key();
    assert_eq!(type_in(&mut model, "z"), Some(Request::Pause(key.clone())));
    let mut paused = node();
    paused.gpus[0].clients[0].paused = true;
    model.update(Event::Reading(Box::new(paused), Duration::from_secs(1)));
    assert_eq!(type_in(&mut model, "z"), Some(Request::Resume(key)));
}

#[test]
fn what_the_arbiter_says_is_shown_until_the_next_key() {
    let mut model = model();
    assert_eq!(model.update(Event::Answer("weight 300".into())), Some(Request::Read));
    model.update(Event::Reading(Box::new(node()), Duration::from_secs(1)));
    assert_eq!(model.message, Some(("weight 300".into(), false)));
    model.update(Event::Refused("it is another user's".into()));
    assert_eq!(model.message, Some(("it is another user's".into(), true)));
    press(&mut model, &[Key::Down]);
    assert_eq!(model.message, None);
}

#[test]
fn a_filter_is_seen_at_once_and_can_be_taken_back() {
    let mut model = model();
    let shown = |model: &Model| model.rows().len();
    type_in(&mut model, "/NOTE");
    assert_eq!(shown(&model), 1);
    press(&mut model, &[Key::Enter]);
    type_in(&mut model, "/book");
    assert_eq!(model.choice.filter, "NOTEbook");
    press(&mut model, &[Key::Control('u')]);
    assert_eq!(shown(&model), 3);
    press(&mut model, &[Key::Escape]);
    assert_eq!((model.choice.filter.as_str(), shown(&model)), ("NOTE", 1));
    // The first Escape gives the selection up, the second one the filter.
    press(&mut model, &[Key::Down, Key::Escape]);
    assert_eq!((selected(&model), shown(&model)), (None, 1));
    press(&mut model, &[Key::Escape]);
    assert_eq!(shown(&model), 3);
}

#[test]
fn a_digit_shows_the_gpu_of_that_number() {
    let mut model = model();
    type_in(&mut model, "3");
    assert_eq!(model.rows().iter().map(|row| row.client.name.as_str()).collect::<Vec<_>>(), ["serve"]);
    type_in(&mut model, "1");
    assert!(model.message.as_ref().is_some_and(|(text, _)| text == "There is no GPU 1 here."));
    assert_eq!(model.rows().len(), 1);
    type_in(&mut model, "3");
    assert_eq!(model.rows().len(), 3);
}

#[test]
fn a_paused_display_stands_still_and_goes_on_with_a_reading() {
    let mut model = model();
    assert_eq!(type_in(&mut model, "p"), None);
    model.update(Event::Reading(Box::default(), Duration::from_secs(1)));
    model.update(Event::Failed("it is gone".into()));
    assert_eq!((model.rows().len(), &model.trouble), (3, &None));
    assert_eq!(type_in(&mut model, "p"), Some(Request::Read));
    model.update(Event::Failed("it is gone".into()));
    assert_eq!((model.rows().len(), model.trouble.as_deref()), (0, Some("it is gone")));
}

#[test]
fn ctrl_c_ends_in_every_mode_and_q_only_where_it_is_a_command() {
    for before in ["", "/", "?", "p"] {
        let mut model = model();
        type_in(&mut model, before);
        assert_eq!(press(&mut model, &[Key::Control('c')]), Some(Request::Quit), "{before:?}");
    }
    let mut model = model();
    assert_eq!(type_in(&mut model, "/q"), None);
    assert_eq!(press(&mut model, &[Key::Enter, Key::Char('q')]), Some(Request::Quit));
    assert_eq!(press(&mut model, &[Key::Control('z')]), Some(Request::Suspend));
}
