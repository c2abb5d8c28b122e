//! What the clients of a GPU did lately: the journals of all slots of a page, followed from one look to the next and joined to
//! spans ([`nvshare::timeline`]).

use nvshare::page::{Page, Phase};
use nvshare::slot::SLOTS;
use nvshare::timeline::{Activity, Span, Switches, Track};
use nvshare::units::Nanos;
use std::collections::VecDeque;

/// One slot, as far as it was read.
#[derive(Default)]
struct Follower {
    track: Track,
    /// The number of the next event.
    next: u64,
    lost: u64,
}

/// The journals of a page, as far as they were read. Reading goes on where the last time ended, so it costs next to nothing when
/// nothing has happened.
pub struct Journals(Vec<Follower>);

impl Default for Journals {
    fn default() -> Self {
        Self((0..SLOTS).map(|_| Follower::default()).collect())
    }
}

impl Journals {
    /// Reads what has come since the last time: spans that have ended, each with its slot, slot by slot.
    pub fn read(&mut self, page: &Page) -> Vec<(usize, Span)> {
        let mut spans = Vec::new();
        for (slot, follower) in self.0.iter_mut().enumerate() {
            let reading = page.journals[slot].read(follower.next);
            if reading.lost > 0 && follower.next > 0 {
                // What went on before the gap ended somewhere in it.
                follower.track.forget();
                follower.lost += reading.lost;
            }
            follower.next = reading.next;
            for at in reading.events {
                spans.extend(follower.track.feed(at).map(|span| (slot, span)));
            }
        }
        spans
    }

    /// Events that were overwritten before they were read, after the first reading.
    pub fn lost(&self) -> u64 {
        self.0.iter().map(|follower| follower.lost).sum()
    }

    /// The pid of the process that has a slot or had it last, as it sees itself; 0 if its registration was not seen.
    pub fn pid(&self, slot: usize) -> u32 {
        self.0.get(slot).map_or(0, |follower| follower.track.pid())
    }

    /// What goes on in a slot at the time `now`, ns, as if it ended then.
    pub fn unfinished(&self, slot: usize, now: Nanos) -> impl Iterator<Item = Span> {
        self.0.get(slot).into_iter().flat_map(move |follower| follower.track.unfinished(now))
    }
}

/// A switch that was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SwitchSeen {
    /// When it ended, CLOCK_MONOTONIC ns.
    pub ended: Nanos,
    /// How long it took, ns.
    pub took: Nanos,
    /// The slot and the process that gave way first, as far as it was seen.
    pub from: Option<(usize, u32)>,
    /// The slot and the process that runs now.
    pub to: (usize, u32),
    /// Bytes that came in.
    pub bytes: u64,
    /// How long after the client before had drained the next one began to bring its memory in, ns: the decision and the wake-up. 0
    /// if it had begun before.
    pub handoff: Nanos,
}

/// The switches of a GPU, out of the spans of all its slots.
#[derive(Default)]
pub struct SwitchWatch {
    switches: Switches,
    /// Who has begun to drain first since the last switch.
    from: Option<(usize, u32)>,
    /// When the latest drain ended, ns.
    drained: Nanos,
}

impl SwitchWatch {
    /// Takes a span in; spans come in the order in which they ended. The switch, if the span ends one.
    pub fn feed(&mut self, slot: usize, span: &Span) -> Option<SwitchSeen> {
        if span.activity == Activity::Phase(Phase::Draining) {
            self.from.get_or_insert((slot, span.pid));
            self.drained = span.ended;
        }
        let took = self.switches.feed(span)?;
        let from = self.from.take();
        let handoff = span.begun.saturating_sub(self.drained);
        Some(SwitchSeen { ended: span.ended, took, from, to: (slot, span.pid), bytes: span.bytes, handoff })
    }
}

/// The latest switches that are remembered.
const MOST_SWITCHES: usize = 16;

/// What happened on a GPU, followed from one look to the next: spans in the order in which they ended, and the latest switches.
#[derive(Default)]
pub struct History {
    journals: Journals,
    /// Spans that ended after the last reading had begun: of others that ended before them the journals may not be read yet.
    early: Vec<(usize, Span)>,
    watch: SwitchWatch,
    latest: VecDeque<SwitchSeen>,
}

impl History {
    /// Reads what has come since the last time, which is everything that the journals have the first time. `begun` is a time, ns,
    /// that was taken before. The spans that have ended by then, in the order in which they ended, and the switches among them.
    pub fn read(&mut self, page: &Page, begun: Nanos) -> (Vec<(usize, Span)>, Vec<SwitchSeen>) {
        let mut spans = std::mem::take(&mut self.early);
        spans.extend(self.journals.read(page));
        // In one slot a phase ends where the next one begins, in the journal's order.
        spans.sort_by_key(|(_, span)| span.ended);
        let ripe = spans.partition_point(|(_, span)| span.ended <= begun);
        self.early = spans.split_off(ripe);
        let switches: Vec<_> = spans.iter().filter_map(|(slot, span)| self.watch.feed(*slot, span)).collect();
        self.latest.extend(&switches);
        let surplus = self.latest.len().saturating_sub(MOST_SWITCHES);
        self.latest.drain(..surplus);
        (spans, switches)
    }

    /// The latest switches, the latest first.
    pub fn latest(&self) -> impl Iterator<Item = &SwitchSeen> {
        self.latest.iter().rev()
    }

    /// The journals.
    pub fn journals(&self) -> &Journals {
        &self.journals
    }
}
