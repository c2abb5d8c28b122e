//! The events of all slots of a node, read once or again and again, joined to spans.

use super::Lived;
use crate::Failure;
use nvshare::map::MappedPage;
use nvshare::slot::{SLOTS, SlotIndex};
use nvshare::timeline::Span;
use nvshare::units::Nanos;
use nvshare_stats::Pages;
use nvshare_stats::history::Journals;
use std::collections::BTreeMap;
use std::path::Path;

/// What was read of a node.
pub struct Recording {
    pages: Vec<MappedPage>,
    journals: Vec<Journals>,
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
        let journals = pages.iter().map(|_| Journals::default()).collect();
        Ok(Self { pages, journals, spans: Vec::new() })
    }

    /// Reads what has come since the last time.
    pub fn read(&mut self) {
        for (gpu, (page, journals)) in self.pages.iter().zip(&mut self.journals).enumerate() {
            self.spans.extend(journals.read(page).into_iter().map(|(slot, span)| (gpu, slot, span)));
        }
    }

    /// The GPUs' UUIDs.
    pub fn gpus(&self) -> Vec<String> {
        self.pages.iter().map(|page| page.gpu().to_string()).collect()
    }

    /// Events that were overwritten before they were read, after the first reading.
    pub fn lost(&self) -> u64 {
        self.journals.iter().map(Journals::lost).sum()
    }

    /// All spans that lie in the time from `since` to `now`, ns, those that go on among them; cut off where they begin before.
    pub fn since(self, since: Nanos, now: Nanos) -> Vec<Lived> {
        let mut spans = self.spans;
        // Of those that have a slot: the name, and the pid that their spans have.
        let mut present: BTreeMap<(usize, usize), (u32, String)> = BTreeMap::new();
        for (gpu, (page, journals)) in self.pages.iter().zip(&self.journals).enumerate() {
            for slot in 0..SLOTS {
                if let Some(client) = SlotIndex::new(slot).and_then(|slot| page.details(slot)) {
                    present.insert((gpu, slot), (journals.pid(slot), client.name));
                    spans.extend(journals.unfinished(slot, now).map(|span| (gpu, slot, span)));
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
