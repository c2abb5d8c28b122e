//! What is known of the node, for whoever asks over HTTP.

use super::durations::AllDurations;
use super::metrics::{self, Sample};
use super::tallies::Tallies;
use super::timeline::{Timeline, TimelineAnswer};
use nvshare::map::MappedPage;
use nvshare::sync::now;
use nvshare::units::{GpuUuid, MILLISECOND, Nanos};
use nvshare_stats::{Node, Reader};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// What was read so recently, ns, is not read again, however many ask.
const FRESH: Nanos = 50 * MILLISECOND;

/// What is known.
pub struct Watch {
    pages: Vec<MappedPage>,
    reader: Reader,
    durations: AllDurations,
    timeline: Timeline,
    tallies: BTreeMap<GpuUuid, Arc<Tallies>>,
    /// When the arbiter started, seconds since 1970.
    started: f64,
    latest: Option<(Nanos, Node)>,
}

impl Watch {
    /// Of these pages, with what the arbiter counts, and with NVML if there is one by this path or name.
    pub fn new(pages: Vec<MappedPage>, tallies: BTreeMap<GpuUuid, Arc<Tallies>>, nvml: &Path) -> Self {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            reader: Reader::of_pages(pages.clone()).with_hardware(nvml).with_news(),
            pages,
            durations: AllDurations::since(now()),
            timeline: Timeline::default(),
            tallies,
            started: since_1970.as_secs_f64(),
            latest: None,
        }
    }

    /// Takes in what the clients have done. To be called so often that they do not write their journals full in between.
    pub fn follow(&mut self) {
        // Given pages can always be read.
        let _ = self.reader.follow();
        self.take_news();
    }

    fn take_news(&mut self) {
        for news in self.reader.take_news() {
            self.durations.feed(&news);
            self.timeline.feed(news, now());
        }
        for page in &self.pages {
            if let Some(history) = self.reader.history(page.gpu()) {
                self.timeline.note_names(page, history);
            }
        }
    }

    /// The node now.
    pub fn node(&mut self) -> Node {
        let time = now();
        if let Some((read, node)) = &self.latest
            && time.saturating_sub(*read) < FRESH
        {
            return node.clone();
        }
        let node = self.reader.read().unwrap_or_default();
        self.take_news();
        self.latest = Some((time, node.clone()));
        node
    }

    /// The metrics as text.
    pub fn metrics(&mut self) -> String {
        let node = self.node();
        let lost = self.pages.iter().map(|page| {
            let history = self.reader.history(page.gpu());
            (page.gpu(), history.map_or(0, |history| history.journals().lost()))
        });
        let sample = Sample {
            node,
            lost: lost.collect(),
            durations: self.durations.clone(),
            tallies: self.tallies.clone(),
            started: self.started,
        };
        metrics::text(sample).unwrap_or_default()
    }

    /// What the clients did and do: what ended after `since`, CLOCK_MONOTONIC ns.
    pub fn timeline(&mut self, since: Nanos) -> TimelineAnswer {
        self.follow();
        let gpus = self.pages.iter().map(|page| (&**page, self.reader.history(page.gpu())));
        self.timeline.answer(gpus, since)
    }
}
