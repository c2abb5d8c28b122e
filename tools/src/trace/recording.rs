//! The events of all slots of a node, read once or again and again, joined to spans.

use super::Lived;
use crate::Failure;
use nvshare::journal::Event;
use nvshare::map::MappedPage;
use nvshare::slot::{SLOTS, SlotIndex};
use nvshare::timeline::{Span, Track};
use nvshare::units::Nanos;
use nvshare::{Page, paths, record};
use std::path::Path;

/// One slot, as far as it was read.
#[derive(Default)]
struct Reader {
    track: Track,
    /// The number of the next event.
    next: u64,
    lost: u64,
}

/// What was read of a node.
pub struct Recording {
    pages: Vec<(String, MappedPage)>,
    readers: Vec<Vec<Reader>>,
    /// By GPU and slot, in the order in which they ended.
    spans: Vec<(usize, usize, Span)>,
}

impl Recording {
    /// Of the pages in a runtime directory.
    ///
    /// # Errors
    /// There is none that can be read.
    pub fn of(dir: &Path) -> Result<Self, Failure> {
        let found = paths::pages(dir).map_err(|why| {
            Failure::usage(format!("{}: there is no nvshare node here ({why})", dir.display()))
        })?;
        let (mut pages, mut refused) = (Vec::new(), Vec::new());
        for (uuid, path) in found {
            match record::view_page(dir, uuid) {
                Ok(page) => pages.push((uuid.to_string(), page)),
                Err(why) => refused.push(format!("{}: {why}", path.display())),
            }
        }
        if pages.is_empty() {
            let why = if refused.is_empty() {
                format!(
                    "{}: no arbiter has made a page here; start nvshare-arbiter, or a program with `nvshare run`",
                    dir.display()
                )
            } else {
                refused.join("\n         ")
            };
            return Err(Failure::usage(why));
        }
        let readers = pages.iter().map(|_| (0..SLOTS).map(|_| Reader::default()).collect()).collect();
        Ok(Self { pages, readers, spans: Vec::new() })
    }

    /// Reads what has come since the last time.
    pub fn read(&mut self) {
        for (gpu, ((_, page), readers)) in self.pages.iter().zip(&mut self.readers).enumerate() {
            for (slot, reader) in readers.iter_mut().enumerate() {
                let reading = page.journals[slot].read(reader.next);
                if reading.lost > 0 && reader.next > 0 {
                    // What went on before the gap ended somewhere in it.
                    reader.track.forget();
                    reader.lost += reading.lost;
                }
                reader.next = reading.next;
                for at in reading.events {
                    self.spans.extend(reader.track.feed(at).map(|span| (gpu, slot, span)));
                }
            }
        }
    }

    /// The GPUs' UUIDs.
    pub fn gpus(&self) -> Vec<String> {
        self.pages.iter().map(|(uuid, _)| uuid.clone()).collect()
    }

    /// Events that were overwritten before they were read, after the first reading.
    pub fn lost(&self) -> u64 {
        self.readers.iter().flatten().map(|reader| reader.lost).sum()
    }

    /// All spans that lie in the time from `since` to `now`, ns, those that go on among them; cut off where they begin before.
    pub fn since(self, since: Nanos, now: Nanos) -> Vec<Lived> {
        let mut spans = self.spans;
        for (gpu, readers) in self.readers.iter().enumerate() {
            for (slot, reader) in readers.iter().enumerate() {
                let lives = lives(&self.pages[gpu].1, slot);
                spans.extend(reader.track.unfinished(now).filter(|_| lives).map(|span| (gpu, slot, span)));
            }
        }
        spans
            .into_iter()
            .filter(|(_, _, span)| span.ended > since)
            .map(|(gpu, slot, span)| {
                let name = name(&self.pages[gpu].1, slot, span.pid);
                Lived { gpu, slot, span: Span { begun: span.begun.max(since), ..span }, name }
            })
            .collect()
    }
}

fn lives(page: &Page, slot: usize) -> bool {
    SlotIndex::new(slot).is_some_and(|slot| page.details(slot).is_some())
}

/// What the process calls itself, if it still has the slot: the latest that registered there has this pid.
fn name(page: &Page, slot: usize, pid: u32) -> String {
    let events = page.journals[slot].read(0).events;
    let latest = events.iter().rev().find_map(|at| match at.event {
        Event::Registered { pid } => Some(pid),
        _ => None,
    });
    let is_same = latest.is_none_or(|latest| latest == pid);
    let details = SlotIndex::new(slot).and_then(|slot| page.details(slot));
    details.filter(|_| is_same).map_or(String::new(), |details| details.name)
}
