//! The events of all slots of a node, read once or again and again, joined to spans.

use super::Lived;
use crate::Failure;
use crate::status::Pages;
use nvshare::map::MappedPage;
use nvshare::slot::{SLOTS, SlotIndex};
use nvshare::timeline::{Span, Track};
use nvshare::units::Nanos;
use std::collections::BTreeMap;
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
    pages: Vec<MappedPage>,
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
        let Pages { pages, unreadable } = Pages::of(dir)?;
        if pages.is_empty() {
            return Err(Failure::usage(unreadable.join("\n         ")));
        }
        let readers = pages.iter().map(|_| (0..SLOTS).map(|_| Reader::default()).collect()).collect();
        Ok(Self { pages, readers, spans: Vec::new() })
    }

    /// Reads what has come since the last time.
    pub fn read(&mut self) {
        for (gpu, (page, readers)) in self.pages.iter().zip(&mut self.readers).enumerate() {
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
        self.pages.iter().map(|page| page.gpu().to_string()).collect()
    }

    /// Events that were overwritten before they were read, after the first reading.
    pub fn lost(&self) -> u64 {
        self.readers.iter().flatten().map(|reader| reader.lost).sum()
    }

    /// All spans that lie in the time from `since` to `now`, ns, those that go on among them; cut off where they begin before.
    pub fn since(self, since: Nanos, now: Nanos) -> Vec<Lived> {
        let mut spans = self.spans;
        // Of those that have a slot: the name, and the pid that their spans have.
        let mut present: BTreeMap<(usize, usize), (u32, String)> = BTreeMap::new();
        for (gpu, (page, readers)) in self.pages.iter().zip(&self.readers).enumerate() {
            for (slot, reader) in readers.iter().enumerate() {
                if let Some(client) = SlotIndex::new(slot).and_then(|slot| page.details(slot)) {
                    present.insert((gpu, slot), (reader.track.pid(), client.name));
                    spans.extend(reader.track.unfinished(now).map(|span| (gpu, slot, span)));
                }
            }
        }
        let name = |place, pid| {
            present.get(&place).filter(|(present, _)| *present == pid).map(|(_, name)| name.clone())
        };
        spans
            .into_iter()
            .filter(|(_, _, span)| span.ended > since)
            .map(|(gpu, slot, span)| {
                let name = name((gpu, slot), span.pid).unwrap_or_default();
                Lived { gpu, slot, span: Span { begun: span.begun.max(since), ..span }, name }
            })
            .collect()
    }
}
