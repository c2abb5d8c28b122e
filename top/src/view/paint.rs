//! Colours, and what stands for them where there are none.

use ratatui::style::{Color, Modifier, Style};

/// How things look.
#[derive(Debug, Clone, Copy)]
pub struct Paint {
    colour: bool,
}

/// The colours of clients. The sixteen of the terminal's own, so that they suit its background.
const CLIENTS: [Color; 6] =
    [Color::Cyan, Color::Green, Color::Yellow, Color::Magenta, Color::LightBlue, Color::LightRed];

impl Paint {
    /// With or without colour.
    pub fn new(colour: bool) -> Self {
        Self { colour }
    }

    fn with(self, colour: Color) -> Style {
        if self.colour { Style::new().fg(colour) } else { Style::new() }
    }

    /// Ordinary text.
    pub fn plain(self) -> Style {
        Style::new()
    }

    /// What is read first.
    pub fn strong(self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    /// What is read last.
    pub fn faint(self) -> Style {
        if self.colour { Style::new().fg(Color::DarkGray) } else { Style::new() }
    }

    /// A heading of columns.
    pub fn heading(self) -> Style {
        self.with(Color::Cyan).add_modifier(Modifier::BOLD)
    }

    /// A client, by its slot.
    pub fn client(self, slot: usize) -> Style {
        self.with(CLIENTS[slot % CLIENTS.len()])
    }

    /// A client's part of a bar.
    pub fn bar(self, slot: usize) -> Style {
        if self.colour {
            Style::new().fg(Color::Black).bg(CLIENTS[slot % CLIENTS.len()])
        } else {
            Style::new()
        }
    }

    /// Memory that nobody can move.
    pub fn fixed(self) -> Style {
        if self.colour { Style::new().fg(Color::White).bg(Color::DarkGray) } else { Style::new() }
    }

    /// A phase.
    pub fn phase(self, phase: &str) -> Style {
        match phase {
            "running" => self.with(Color::Green),
            "waiting" => self.with(Color::Yellow),
            "filling" | "draining" => self.with(Color::Cyan),
            _ => self.faint(),
        }
    }

    /// Bad news.
    pub fn bad(self) -> Style {
        self.with(Color::Red).add_modifier(Modifier::BOLD)
    }

    /// Good news.
    pub fn good(self) -> Style {
        self.with(Color::Green)
    }

    /// The selected line.
    pub fn selected(self) -> Style {
        Style::new().add_modifier(Modifier::REVERSED)
    }

    /// A graph of the link's traffic.
    pub fn traffic(self) -> Style {
        self.with(Color::Cyan)
    }

    /// A graph.
    pub fn graph(self) -> Style {
        self.with(Color::Green)
    }
}

/// The letter that stands for a client on its GPU: one for each of the 48 slots.
pub fn letter(slot: usize) -> char {
    let letters = ('a'..='z').chain('A'..='Z');
    letters.into_iter().nth(slot).unwrap_or('?')
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_slot_has_a_letter_of_its_own() {
        let letters: BTreeSet<_> = (0..nvshare::slot::SLOTS).map(letter).collect();
        assert_eq!(letters.len(), nvshare::slot::SLOTS);
        assert!(!letters.contains(&'?') && letter(usize::MAX) == '?');
    }

    #[test]
    fn without_colour_there_is_none() {
        let paint = Paint::new(false);
        let all = [
            paint.heading(),
            paint.client(1),
            paint.bar(2),
            paint.fixed(),
            paint.phase("running"),
            paint.bad(),
        ];
        assert!(all.iter().all(|style| style.fg.is_none() && style.bg.is_none()));
    }
}
