//! What the clients did in the last minutes, for the page.

use nvshare::page::Page;
use nvshare::slot::{SLOTS, SlotIndex};
use nvshare::sync::now;
use nvshare::timeline::{Activity, Span};
use nvshare::units::{GpuUuid, Nanos, SECOND};
use nvshare_stats::News;
use nvshare_stats::history::History;
use serde::Serialize;
use std::collections::{BTreeMap, VecDeque};

/// How long spans are kept after they have ended, ns.
pub const KEPT: Nanos = 300 * SECOND;
/// The most spans of a GPU that are kept; of more, the oldest are dropped.
const MOST: usize = 20_000;

/// A client's process: its slot, and its pid, as it sees itself.
type Who = (usize, u32);

/// The spans of the last minutes, by GPU.
#[derive(Default)]
pub struct Timeline {
    spans: BTreeMap<GpuUuid, VecDeque<(usize, Span)>>,
    names: BTreeMap<(GpuUuid, Who), String>,
}

/// What the page draws.
#[derive(Debug, Serialize)]
pub struct TimelineAnswer {
    /// The time, CLOCK_MONOTONIC ns, on which all other times are.
    pub now: Nanos,
    /// How long spans are kept, ns.
    pub kept: Nanos,
    /// By UUID.
    pub gpus: Vec<GpuTimeline>,
}

/// What happened on a GPU.
#[derive(Debug, Serialize)]
pub struct GpuTimeline {
    /// Its UUID.
    pub uuid: String,
    /// Spans that have ended, in the order in which they ended.
    pub spans: Vec<ShownSpan>,
    /// What goes on.
    pub current: Vec<ShownSpan>,
}

/// A span.
#[derive(Debug, Serialize)]
pub struct ShownSpan {
    /// The client's slot.
    slot: usize,
    /// Its pid, as it sees itself.
    pid: u32,
    /// Its name; empty if it was not seen while it was there.
    name: String,
    /// What it did: a phase, evicts, prefetches or stalled.
    what: &'static str,
    /// When that began, ns.
    begun: Nanos,
    /// When that ended, ns.
    ended: Nanos,
    /// Bytes that were copied.
    bytes: u64,
    /// Why a drain began, or why the client could not give way; empty for others.
    why: &'static str,
}

impl Timeline {
    /// Takes in what has happened.
    pub fn feed(&mut self, news: News, time: Nanos) {
        let spans = self.spans.entry(news.gpu).or_default();
        spans.extend(news.spans);
        let surplus = spans.len().saturating_sub(MOST);
        spans.drain(..surplus);
        // They are in the order in which they ended.
        while spans.front().is_some_and(|(_, span)| span.ended.saturating_add(KEPT) < time) {
            spans.pop_front();
        }
    }

    /// Remembers the names of the clients that are there, and forgets those that no span is of.
    pub fn note_names(&mut self, page: &Page, history: &History) {
        let gpu = page.gpu();
        let empty = VecDeque::new();
        let spans = self.spans.get(&gpu).unwrap_or(&empty);
        let occupied = page.occupied();
        self.names.retain(|(of, (slot, pid)), _| {
            *of != gpu
                || SlotIndex::new(*slot).is_some_and(|slot| occupied.contains(slot))
                || spans.iter().any(|(at, span)| at == slot && span.pid == *pid)
        });
        for slot in occupied.iter() {
            let who = (slot.get(), history.journals().pid(slot.get()));
            if let Some(details) = page.details(slot) {
                self.names.insert((gpu, who), details.name);
            }
        }
    }

    /// What ended after `since`, ns, and what goes on, of these GPUs.
    pub fn answer<'a>(
        &self,
        gpus: impl Iterator<Item = (&'a Page, Option<&'a History>)>,
        since: Nanos,
    ) -> TimelineAnswer {
        let time = now();
        let gpus = gpus.map(|(page, history)| self.gpu(page, history, since, time)).collect();
        TimelineAnswer { now: time, kept: KEPT, gpus }
    }

    fn gpu(&self, page: &Page, history: Option<&History>, since: Nanos, time: Nanos) -> GpuTimeline {
        let gpu = page.gpu();
        let show = |slot: usize, span: &Span| ShownSpan {
            slot,
            pid: span.pid,
            name: self.names.get(&(gpu, (slot, span.pid))).cloned().unwrap_or_default(),
            what: span.activity.name(),
            begun: span.begun,
            ended: span.ended,
            bytes: span.bytes,
            why: match span.activity {
                Activity::Stalled(stall) => stall.name(),
                _ => span.why.map_or("", |why| why.name()),
            },
        };
        let ended = self.spans.get(&gpu).into_iter().flatten().filter(|(_, span)| span.ended > since);
        let present = (0..SLOTS).filter_map(SlotIndex::new).filter(|slot| page.occupied().contains(*slot));
        let current = present.flat_map(|slot| {
            let spans =
                history.into_iter().flat_map(move |history| history.journals().unfinished(slot.get(), time));
            spans.map(move |span| (slot.get(), span))
        });
        GpuTimeline {
            uuid: gpu.to_string(),
            spans: ended.map(|(slot, span)| show(*slot, span)).collect(),
            current: current.map(|(slot, span)| show(slot, &span)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvshare::page::Phase;

    #[test]
    fn what_is_long_over_and_what_is_too_much_is_dropped_and_the_latest_stays() {
        let span = |ended| Span {
            activity: Activity::Phase(Phase::Running),
            begun: ended - 1,
            ended,
            bytes: 0,
            why: None,
            pid: 1,
        };
        let gpu = GpuUuid([1; 16]);
        let news = |ends: Vec<Nanos>| News {
            gpu,
            spans: ends.into_iter().map(|end| (0, span(end))).collect(),
            switches: vec![],
        };
        let mut timeline = Timeline::default();
        timeline.feed(news(vec![SECOND, 2 * SECOND, KEPT]), KEPT + 2 * SECOND);
        assert_eq!(
            timeline.spans[&gpu].iter().map(|(_, span)| span.ended).collect::<Vec<_>>(),
            [2 * SECOND, KEPT]
        );
        timeline.feed(news((0..2 * MOST as u64).map(|more| KEPT + 1 + more).collect()), KEPT + 2 * SECOND);
        assert_eq!(timeline.spans[&gpu].len(), MOST);
        assert_eq!(timeline.spans[&gpu].back().unwrap().1.ended, KEPT + 2 * MOST as u64);
    }
}
