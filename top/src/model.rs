//! What the monitor knows, and what a key or a reading changes.

use crate::order::{Choice, Row, rows};
use crate::rates::{ClientKey, Past};
use nvshare::shares::{Priority, parse_weight};
use nvshare::wire::SharesUpdate;
use nvshare_stats::Node;
use std::time::Duration;

/// What does not change while the monitor runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// How often the node is read.
    pub interval: Duration,
    /// Whether the screen has colours.
    pub colour: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { interval: Duration::from_secs(1), colour: true }
    }
}

/// A key, as the monitor tells them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// A character.
    Char(char),
    /// A character with the Control key.
    Control(char),
    /// The arrow up.
    Up,
    /// The arrow down.
    Down,
    /// A page up.
    PageUp,
    /// A page down.
    PageDown,
    /// To the first line.
    Home,
    /// To the last line.
    End,
    /// The Enter key.
    Enter,
    /// The Escape key.
    Escape,
    /// The Backspace key.
    Backspace,
}

/// What happens.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The node was read, at this time since the monitor began.
    Reading(Box<Node>, Duration),
    /// The node could not be read, and why.
    Failed(String),
    /// A key was pressed.
    Key(Key),
    /// What the arbiter says to a change.
    Answer(String),
    /// Why a change was not made.
    Refused(String),
}

/// What the loop is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// End.
    Quit,
    /// Give the terminal back to the shell, until it is taken up again.
    Suspend,
    /// Draw everything anew: something else wrote on the terminal.
    Repaint,
    /// Read the node at once.
    Read,
    /// Change a client's shares.
    Change(ClientKey, SharesUpdate),
    /// Take the GPU from a client until it is resumed.
    Pause(ClientKey),
    /// Give a paused client its turns again.
    Resume(ClientKey),
}

/// What the keys mean now.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Mode {
    /// Each key is a command.
    #[default]
    Commands,
    /// They are the text that clients are filtered by; what it was before.
    Filter(String),
    /// They are the new weight of this client.
    Weight(ClientKey, String),
    /// Any key leaves the help.
    Help,
}

/// How far a page goes.
const PAGE: isize = 10;

/// The longest text that can be typed.
const LONGEST: usize = 48;

/// What the monitor knows.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Model {
    /// What does not change.
    pub settings: Settings,
    /// The reading that is shown.
    pub node: Node,
    /// Rates, and what they were.
    pub past: Past,
    /// Which clients are shown.
    pub choice: Choice,
    /// What the keys mean.
    pub mode: Mode,
    /// The display stands still.
    pub paused: bool,
    /// Whether graphs are shown.
    pub graphs: bool,
    /// Why there is nothing to show.
    pub trouble: Option<String>,
    /// What was said last, and whether it is bad news.
    pub message: Option<(String, bool)>,
    /// The selected client, and its line when it was last there.
    selected: Option<(ClientKey, usize)>,
}

impl Model {
    /// Nothing is known yet.
    pub fn new(settings: Settings) -> Self {
        Self { settings, graphs: true, ..Self::default() }
    }

    /// The clients that are shown, in their order.
    pub fn rows(&self) -> Vec<Row<'_>> {
        rows(&self.node, &self.past, &self.choice)
    }

    /// The line of the selected client. If that client is gone, the line where it was.
    pub fn selected(&self, rows: &[Row<'_>]) -> Option<usize> {
        let (key, line) = self.selected.as_ref()?;
        let found = rows.iter().position(|row| row.key() == *key);
        found.or_else(|| Some((*line).min(rows.len().checked_sub(1)?)))
    }

    /// Takes an event in. What the loop is to do, if anything.
    pub fn update(&mut self, event: Event) -> Option<Request> {
        match event {
            Event::Reading(..) | Event::Failed(_) if self.paused => None,
            Event::Reading(node, at) => {
                self.past.take(&node, at, self.settings.interval / 2);
                self.node = *node;
                self.trouble = None;
                self.follow_selected();
                None
            }
            Event::Failed(why) => {
                self.trouble = Some(why);
                self.node = Node::default();
                None
            }
            Event::Answer(text) => {
                self.message = Some((text, false));
                // The table shows it at once.
                Some(Request::Read)
            }
            Event::Refused(text) => {
                self.message = Some((text, true));
                None
            }
            Event::Key(key) => self.key(key),
        }
    }

    /// Remembers where the selected client is now.
    fn follow_selected(&mut self) {
        let rows = self.rows();
        let line = self.selected(&rows);
        let now = line.map(|line| (rows[line].key(), line));
        self.selected = now;
    }

    fn key(&mut self, key: Key) -> Option<Request> {
        match key {
            Key::Control('c') => return Some(Request::Quit),
            Key::Control('z') => return Some(Request::Suspend),
            Key::Control('l') => return Some(Request::Repaint),
            _ => {}
        }
        match std::mem::take(&mut self.mode) {
            Mode::Commands => self.command(key),
            Mode::Help => None,
            Mode::Filter(before) => {
                self.filter(key, before);
                None
            }
            Mode::Weight(client, typed) => self.weight(key, client, typed),
        }
    }

    fn command(&mut self, key: Key) -> Option<Request> {
        self.message = None;
        match key {
            Key::Char('q') => return Some(Request::Quit),
            Key::Char('?' | 'h') => self.mode = Mode::Help,
            Key::Char('p' | ' ') => {
                self.paused = !self.paused;
                return (!self.paused).then_some(Request::Read);
            }
            Key::Char('g') => self.graphs = !self.graphs,
            Key::Char('/') => self.mode = Mode::Filter(self.choice.filter.clone()),
            Key::Char('s') => self.choice.sort = self.choice.sort.step(1),
            Key::Char('S') => self.choice.sort = self.choice.sort.step(-1),
            Key::Char('r') => self.choice.reverse = !self.choice.reverse,
            Key::Char('a') => self.choice.gpu = None,
            Key::Char(digit @ '0'..='9') => self.show_gpu(digit),
            Key::Char('k') | Key::Up => self.go(-1),
            Key::Char('j') | Key::Down => self.go(1),
            Key::PageUp => self.go(-PAGE),
            Key::PageDown => self.go(PAGE),
            Key::Home => self.go(isize::MIN),
            Key::End => self.go(isize::MAX),
            // What was done last is undone first.
            Key::Escape if self.selected.is_some() => self.selected = None,
            Key::Escape => self.choice = Choice { sort: self.choice.sort, ..Choice::default() },
            Key::Char('w') => {
                let client = self.selected_key();
                match client {
                    Some(client) => self.mode = Mode::Weight(client, String::new()),
                    None => self.say_select(),
                }
            }
            Key::Char('+' | '=') => return self.change_priority(1),
            Key::Char('-') => return self.change_priority(-1),
            Key::Char('z') => return self.pause_or_resume(),
            _ => {}
        }
        self.follow_selected();
        None
    }

    /// Only the GPU with this number; the second time, all again.
    fn show_gpu(&mut self, digit: char) {
        let number = digit.to_digit(10).unwrap_or(0);
        let place = |(place, gpu): (usize, &nvshare_stats::Gpu)| {
            (gpu.index.unwrap_or(place as u32) == number).then_some(place)
        };
        match self.node.gpus.iter().enumerate().find_map(place) {
            Some(place) if self.choice.gpu == Some(place) => self.choice.gpu = None,
            Some(place) => self.choice.gpu = Some(place),
            None => self.message = Some((format!("There is no GPU {number} here."), true)),
        }
    }

    fn go(&mut self, by: isize) {
        let rows = self.rows();
        let last = rows.len().saturating_sub(1);
        let line = match self.selected(&rows) {
            Some(line) => line.saturating_add_signed(by).min(last),
            None if by > 1 => last,
            None => 0,
        };
        let selected = rows.get(line).map(|row| (row.key(), line));
        self.selected = selected;
    }

    fn selected_key(&self) -> Option<ClientKey> {
        let rows = self.rows();
        self.selected(&rows).map(|line| rows[line].key())
    }

    /// Pauses the selected client, or resumes it if it is paused.
    fn pause_or_resume(&mut self) -> Option<Request> {
        let rows = self.rows();
        let Some(line) = self.selected(&rows) else {
            drop(rows);
            self.say_select();
            return None;
        };
        let (key, paused) = (rows[line].key(), rows[line].client.paused);
        Some(if paused { Request::Resume(key) } else { Request::Pause(key) })
    }

    fn say_select(&mut self) {
        self.message = Some(("Select a client first, with the arrow keys.".into(), true));
    }

    fn filter(&mut self, key: Key, before: String) {
        let filter = &mut self.choice.filter;
        match key {
            Key::Enter => return self.follow_selected(),
            Key::Escape => {
                *filter = before;
                return self.follow_selected();
            }
            Key::Backspace => drop(filter.pop()),
            Key::Control('u') => filter.clear(),
            Key::Char(letter) if filter.chars().count() < LONGEST && !letter.is_control() => {
                filter.push(letter)
            }
            _ => {}
        }
        self.mode = Mode::Filter(before);
        self.follow_selected();
    }

    fn weight(&mut self, key: Key, client: ClientKey, mut typed: String) -> Option<Request> {
        match key {
            Key::Escape => return None,
            Key::Enter => match parse_weight(&typed) {
                Ok(weight) => {
                    let update = SharesUpdate { weight: Some(weight), ..SharesUpdate::default() };
                    return Some(Request::Change(client, update));
                }
                Err(error) => self.message = Some((error.to_string(), true)),
            },
            Key::Backspace => drop(typed.pop()),
            Key::Char(digit @ '0'..='9') if typed.len() < 4 => typed.push(digit),
            _ => {}
        }
        self.mode = Mode::Weight(client, typed);
        None
    }

    fn change_priority(&mut self, by: isize) -> Option<Request> {
        const ORDER: [Priority; 3] = [Priority::Low, Priority::Normal, Priority::High];
        let rows = self.rows();
        let Some(line) = self.selected(&rows) else {
            drop(rows);
            self.say_select();
            return None;
        };
        let (key, now) = (rows[line].key(), &rows[line].client.priority);
        let at = ORDER.iter().position(|priority| priority.name() == *now).unwrap_or(1);
        let wanted = ORDER[at.saturating_add_signed(by).min(2)];
        if wanted == ORDER[at] {
            self.message = Some((format!("Its priority is {wanted} already."), true));
            return None;
        }
        let update = SharesUpdate { priority: Some(wanted), ..SharesUpdate::default() };
        Some(Request::Change(key, update))
    }
}

#[cfg(test)]
mod tests;
