//! The loop: it takes the terminal over, draws, waits for keys and for the time of the next reading, and gives the terminal back.
//!
//! The terminal is given back however the program ends: by a key, by an error, by a panic (ratatui's hook), and by the signals that end
//! a program, which one thread waits for while all others block them. When the terminal itself is closed, nothing is left to be given
//! back, and the program ends too.

use super::steer::{change_client, suspend_client};
use crate::{Failure, complain, output};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, raise};
use nvshare::page::Suspension;
use nvshare_stats::Reader;
use nvshare_top::{Event, Key, Model, Request, Settings, view};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Instant;

/// What other threads tell the loop.
enum Input {
    Event(Event),
    /// The terminal has another size.
    Resized,
    /// No key can be read any more.
    Closed,
    Signal(Signal),
}

/// The signals that end a program, and the one that stops it.
const SIGNALS: [Signal; 5] =
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGTSTP];

/// The terminal, which is given back when this is dropped.
struct Screen(DefaultTerminal);

impl Screen {
    fn take() -> Result<Self, Failure> {
        ratatui::try_init()
            .map(Self)
            .map_err(|error| Failure::with_status(1, format!("the terminal cannot be taken over: {error}")))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is closed takes nothing back.
        let _ = ratatui::try_restore();
    }
}

/// Why the loop ended.
enum End {
    Wanted,
    /// The terminal is gone.
    Closed,
    Signal(Signal),
}

/// Shows the node until it is told to end.
///
/// # Errors
/// The terminal cannot be used.
pub fn run(mut reader: Reader, dir: &Path, settings: Settings) -> Result<(), Failure> {
    // Before any other thread is there, so that all of them have it.
    let signals = SIGNALS.into_iter().collect::<SigSet>();
    let blocked = signals.thread_block();
    blocked.map_err(|error| Failure::with_status(1, format!("signals cannot be blocked: {error}")))?;
    let (sender, inputs) = channel();
    let end = {
        let screen = Screen::take()?;
        wait_for_signals(signals, sender.clone());
        wait_for_keys(sender.clone());
        let monitor = Monitor {
            model: Model::new(settings),
            dir,
            begun: Instant::now(),
            inputs,
            sender,
            screen: Some(screen),
        };
        monitor.run(&mut reader)
    };
    match end {
        End::Wanted => Ok(()),
        End::Closed => Err(Failure::with_status(1, "")),
        // As a shell shows a program that the signal has ended.
        End::Signal(signal) => Err(Failure::with_status(128 + signal as u8, "")),
    }
}

fn wait_for_signals(signals: SigSet, sender: Sender<Input>) {
    std::thread::spawn(move || {
        while let Ok(signal) = signals.wait() {
            if sender.send(Input::Signal(signal)).is_err() {
                break;
            }
        }
    });
}

fn wait_for_keys(sender: Sender<Input>) {
    std::thread::spawn(move || {
        loop {
            let input = match event::read() {
                Ok(event::Event::Key(pressed)) if pressed.kind != KeyEventKind::Release => {
                    match key(pressed) {
                        Some(key) => Input::Event(Event::Key(key)),
                        None => continue,
                    }
                }
                Ok(event::Event::Resize(..)) => Input::Resized,
                Ok(_) => continue,
                Err(_) => Input::Closed,
            };
            let closed = matches!(input, Input::Closed);
            if sender.send(input).is_err() || closed {
                break;
            }
        }
    });
}

fn key(pressed: KeyEvent) -> Option<Key> {
    Some(match pressed.code {
        KeyCode::Char(letter) if pressed.modifiers.contains(KeyModifiers::CONTROL) => {
            Key::Control(letter.to_ascii_lowercase())
        }
        KeyCode::Char(letter) => Key::Char(letter),
        KeyCode::Up => Key::Up,
        KeyCode::Down => Key::Down,
        KeyCode::PageUp => Key::PageUp,
        KeyCode::PageDown => Key::PageDown,
        KeyCode::Home => Key::Home,
        KeyCode::End => Key::End,
        KeyCode::Enter => Key::Enter,
        KeyCode::Esc => Key::Escape,
        KeyCode::Backspace => Key::Backspace,
        _ => return None,
    })
}

/// Whether the terminal is closed at its other end.
fn is_closed() -> bool {
    let input = std::io::stdin();
    let mut fds = [PollFd::new(input.as_fd(), PollFlags::empty())];
    let _ = poll(&mut fds, PollTimeout::ZERO);
    fds[0].revents().is_some_and(|found| found.intersects(PollFlags::POLLHUP | PollFlags::POLLNVAL))
}

struct Monitor<'a> {
    model: Model,
    dir: &'a Path,
    begun: Instant,
    inputs: Receiver<Input>,
    sender: Sender<Input>,
    /// None only while the terminal is the shell's.
    screen: Option<Screen>,
}

impl Monitor<'_> {
    fn run(mut self, reader: &mut Reader) -> End {
        let mut next = Instant::now();
        loop {
            if Instant::now() >= next {
                self.read(reader);
                // What was missed is not made up for.
                next = (next + self.model.settings.interval).max(Instant::now());
            }
            if is_closed() || self.draw().is_err() {
                return End::Closed;
            }
            let first = match self.inputs.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(input) => input,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return End::Closed,
            };
            // Whatever has come meanwhile is drawn together.
            let mut input = Some(first);
            while let Some(came) = input {
                match self.take(came, reader) {
                    Some(end) => return end,
                    None => input = self.inputs.try_recv().ok(),
                }
            }
        }
    }

    fn read(&mut self, reader: &mut Reader) {
        let event = match reader.read() {
            Ok(node) => Event::Reading(Box::new(node), self.begun.elapsed()),
            Err(error) => Event::Failed(error.to_string()),
        };
        self.model.update(event);
    }

    fn draw(&mut self) -> std::io::Result<()> {
        let model = &self.model;
        let Some(Screen(terminal)) = &mut self.screen else { return Ok(()) };
        terminal.draw(|frame| view::draw(model, frame.area(), frame.buffer_mut())).map(drop)
    }

    fn take(&mut self, input: Input, reader: &mut Reader) -> Option<End> {
        let request = match input {
            Input::Event(event) => self.model.update(event)?,
            Input::Resized => return None,
            Input::Closed => return Some(End::Closed),
            Input::Signal(Signal::SIGTSTP) => Request::Suspend,
            Input::Signal(signal) => return Some(End::Signal(signal)),
        };
        match request {
            Request::Quit => return Some(End::Wanted),
            Request::Suspend => return self.suspend(),
            Request::Repaint => {
                if let Some(Screen(terminal)) = &mut self.screen {
                    let _ = terminal.clear();
                }
            }
            Request::Read => self.read(reader),
            Request::Change(client, update) => {
                self.ask(move |dir| change_client(dir, &client, update));
            }
            Request::Pause(client) => {
                self.ask(move |dir| suspend_client(dir, &client, Suspension::WithoutEnd));
            }
            Request::Resume(client) => self.ask(move |dir| suspend_client(dir, &client, Suspension::None)),
        }
        None
    }

    /// Asks the arbiter in a thread of its own: one that is down is waited for, and the screen goes on meanwhile.
    fn ask(&self, what: impl FnOnce(&Path) -> Result<String, String> + Send + 'static) {
        let (dir, sender) = (self.dir.to_owned(), self.sender.clone());
        std::thread::spawn(move || {
            let event = what(&dir).map_or_else(Event::Refused, Event::Answer);
            let _ = sender.send(Input::Event(event));
        });
    }

    /// Gives the terminal to the shell and stops; goes on when the shell says so.
    fn suspend(&mut self) -> Option<End> {
        self.screen = None;
        let _ = raise(Signal::SIGSTOP);
        match Screen::take() {
            Ok(screen) => self.screen = Some(screen),
            Err(error) => {
                complain!("nvshare: {}", error.message);
                let _ = output::check();
                return Some(End::Closed);
            }
        }
        None
    }
}
